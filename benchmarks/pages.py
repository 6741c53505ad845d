"""What the README and the pages of docs/ show of the records: which arms and rows belong to which mechanism,
the main table in few columns, the opening sentences, in both languages."""
import re
import statistics
import textwrap
from dataclasses import dataclass, field

from benchmarks import ROOT, report
from benchmarks.record import LLAMA, OURS, OURS_FP32, TAUGHT, TWIN, read
from configurator import require

TABLE = "table_cpu.json"
COMMAND = f"`python bench.py table --out=results/{TABLE}`"


@dataclass(frozen=True)
class Page:
    """What docs/NAME.md shows of the records."""
    arms: tuple = ()                             # of the table
    elsewhere: dict = field(default_factory=dict)    # {record: pattern of the first cells of its rows}


STEPS = "steps_cpu.json", "steps_avx2_cpu.json"     # training steps on two kinds of processor


def quality(arms, record="quality_pylib_cpu.json"):
    return {record: f"({arms})(, .*)?", STEPS[0]: f"({arms}), .*"}


def context(arms):
    return quality(arms, "quality_context_cpu.json")


def at_gpt2s_shape(sides):
    """Tokens/s at 124M parameters."""
    return {"decode_gpt2_cpu.json": rf"decode gpt2: decode, tokens/s( \((dense.*|{sides})\).*)?"}


RETROFITS, OTHER_RETROFITS = "retrofit_pylib_cpu.json", "retrofit_pylib_others_cpu.json"


def retrofitted(arms, record=RETROFITS):
    """In one trained dense model, beside it trained on as long."""
    return {record: f"dense|{arms}"}


def of_mlp(sides):
    return {"mlp_cpu.json": rf"width \d+: ({sides}|dense), bfloat16.*|width 768: F.linear, bfloat16"}


TWO_OF_FOUR = "quality_two_of_four_cpu.json"
MECHANISMS = {
    "osc": Page(("osc", "osc+window"), quality("dense|gelu|osc")),
    "mlp_topk": Page(("topk",), {"quality_pylib_cpu.json": "dense|predict"} | of_mlp("top 10%")
                     | at_gpt2s_shape("top 10%") | retrofitted("topk")),
    "winners": Page(("winners",), quality("dense|winners") | retrofitted("winners")),
    "event_gate": Page(("event",), quality("dense|event") | retrofitted("event")),
    "columns": Page(("columns", "columns*2", "columns*4", "columns+window+2:4"),
                    quality(r"dense|dense/4|columns(\*\d)?") | of_mlp("columns 3 of 32")
                    | at_gpt2s_shape("columns 3 of 32") | retrofitted("columns")),
    "compartments": Page(("compartments",), quality("dense|compartments")),
    "experts": Page(("experts",), quality("dense|experts") | retrofitted("experts", OTHER_RETROFITS)),
    "mlp_predict": Page(("predict", "predict+window", "hierarchy+predict"),
                        quality("dense|predict") | of_mlp("predicted 20%")
                        | at_gpt2s_shape("predicted 20%") | retrofitted("predict")),
    "mlp_screen": Page((), {"screen_63m_cpu.json": ".*", "screen_63m_losses.json":
                       r"bfloat16, ([238]-bit copy, .*|4-bit copy, (5|20|30)%)|int8, 4-bit copy, 20%"}
                       | retrofitted("screened units")),
    "window": Page(("window", "predict+window", "osc+window", "columns+window+2:4"),
                   context("dense|window") | {"window_cpu.json": ".*"} | at_gpt2s_shape("window 128")
                   | retrofitted("window")),
    "dendrites": Page(("dendrites", "dendrites1", "dendrites4"),
                      context(r"dense|dendrites\d?") | at_gpt2s_shape("1 of 4 dendrites")),
    "hierarchy": Page(("hierarchy", "hierarchy+predict"),
                      context("dense|hierarchy") | at_gpt2s_shape("hierarchy 4")),
    "exits": Page(("exits",), {"depth_cpu.json": ".*"} | retrofitted("exits", OTHER_RETROFITS)),
    "ponder": Page(("ponder",), {"ponder_cpu.json": ".*"} | retrofitted("ponder", OTHER_RETROFITS)),
    "grow": Page((), {"grow_cpu.json": ".*"}),
    "weights": Page(("2:4", "columns+window+2:4"),
                    {TWO_OF_FOUR: "dense|2:4", "kernels_cpu.json": ".*"} | at_gpt2s_shape("2:4")
                    | retrofitted("2:4")),
    "attn_topk": Page(("attn_topk",), {TWO_OF_FOUR: "dense|attn_topk"}
                      | at_gpt2s_shape(r"columns \+ a quarter of attention")
                      | retrofitted("attn_topk", OTHER_RETROFITS)),
    "screen": Page((), at_gpt2s_shape("screened head")),
    "quantize": Page((), {"quantize_63m_cpu.json": ".*"}),
    "continual": Page((), {"continual_cpu.json": ".*"}),
    "energy_budget": Page((), {"energy_cpu.json": ".*"}),
    "presets": Page(("efficient", "lossless", "quality"),
                    {TWO_OF_FOUR: "dense|efficient.*"} | at_gpt2s_shape(r"efficient.*|columns \+.*")),
}
PAGE_OF = {arm: name for name, page in reversed(MECHANISMS.items()) for arm in page.arms}
PAGES = PAGE_OF | {"screened units": "mlp_screen"}          # which is an arm of retrofits alone


def named(arm):
    """An arm's name with a link to its page, as seen from the root; combinations lead to their first part."""
    return f"[{arm}](docs/{PAGES[arm]}.md)" if arm in PAGES else arm


# -------------------------------------------------- a mechanism's own rows ----------------------------------

OWN = ("arm", "val loss, nats (95%)", "to its dense twin (95%)", "p", "p (Holm)", "decode tokens/s, batch 1",
       "training tokens/s", "M multiply-adds a token", "pays: nats beyond the dense frontier in", "record")
OF_HEAD = 0, 1, 2, 3, 4, 8, 7, 11, 17               # where report.HEAD has these


def own_rows(page, records):
    """Lines of a markdown table of a page's arms below their dense twin; or where it will come from."""
    if not page.arms:
        return []
    if TABLE not in records:
        return [f"Its row of the main table is not measured yet: {COMMAND} makes it.", ""]
    found = {cells[0]: cells for cells in report.main_rows(records[TABLE])}
    for name, first in records[TABLE].get("same_as", {}).items():
        found[name] = [f"{name} (the same model as {first})", *found[first][1:]]
    arms = [arm for arm in (TWIN, *page.arms) if arm in found]
    rows = [[*(found[arm][column] for column in OF_HEAD), f"[{TABLE}](results/{TABLE})"] for arm in arms]
    missing = [f"`{arm}`" for arm in page.arms if arm not in found]
    return [*report.lines_of(OWN, rows), "",
            *[f"Not in that record: {', '.join(missing)}.", ""] * bool(missing)]


# -------------------------------------------------- the main table ------------------------------------------

@dataclass(frozen=True)
class Language:
    """The words of the generated parts of a README."""
    head: tuple
    brief_head: tuple
    brief: str
    rival: str
    no: str
    leaks: str
    axes: dict
    told: str
    missing: str
    opening: str
    best: str
    rivals: str
    lighter: str
    first_head: tuple
    verdict: str
    same: str
    rounds: str
    no_rounds: str


def main_table(words, records):
    """One row for each arm, losers too, in few columns."""
    if TABLE not in records:
        return words.missing.format(COMMAND)
    record = records[TABLE]
    rows = {name: row for name, row in report.rows_once(record).items() if row["share"] == 1}
    lines = report.lines_of(words.head, [short(words, name, row, record) for name, row in rows.items()])
    h = record["hardware"]
    told = words.told.format(tokens=f"{record['tokens']:,}", seeds=len(record["seeds"]),
                             place=f"{h['gpu'] or h['cpu']}, torch {h['torch']}",
                             link=f"[{TABLE}](results/{TABLE})", tests=len(report.corrected(record)[0]))
    told += "".join(words.same.format(name=named(name), first=named(first))
                    for name, first in record.get("same_as", {}).items())
    told += words.rounds if report.rounds_of(record) else words.no_rounds
    return "\n".join([*lines, "", wrapped(told)])


LONGER = 3200                                    # iterations of the runs that go on longer than the table's


def longer_table(records, folder=ROOT / "results" / "runs"):
    """What is there of the runs that are several times as long as the table's: loss, and to the dense twin's
    of the same seeds, beside what the table says of that."""
    found, copied = {}, {}
    for path in sorted(folder.glob("*.json")):
        run = read(path)
        if run.get("iters") == LONGER and "arm" in run:
            found.setdefault(run["arm"], {})[run["seed"]] = run["val_loss"]
            if run.get("copying") is not None:
                copied.setdefault(run["arm"], []).append(f"{run['copying']:.2f}")
    twin, table = found.get(TWIN, {}), records.get(TABLE, {"rows": {}})
    rows = []
    order = [TWIN, *table["rows"], *found]
    for arm in (arm for arm in dict.fromkeys(order) if twin.keys() & found.get(arm, {}).keys()):
        losses = {seed: loss for seed, loss in found[arm].items() if seed in twin}
        delta = statistics.mean(loss - twin[seed] for seed, loss in losses.items())
        short = table["rows"].get(arm, {}).get("to_twin")
        rows.append([named(arm), f"{statistics.mean(losses.values()):.4f}", str(len(losses)),
                     *["" if arm == TWIN else f"{delta:+.4f}"], ", ".join(copied.get(arm, [])),
                     f"{short['mean']:+.4f}" if short else ""])
    head = "arm", "val loss", "seeds", "to the dense model", "copying", f"the same in {TABLE}"
    arm, apart = max(((arm, max(losses.values()) - min(losses.values())) for arm, losses in found.items()),
                     key=lambda pair: pair[1], default=("", 0))
    seeds = f" One seed says little: those of {arm} lie up to {apart:.2f} apart." if apart else ""
    return "\n".join([*report.lines_of(head, rows), "", wrapped(
        f"{LONGER:,} iterations, {LONGER * 1280:,} tokens a run, five a parameter; the rest of the table's "
        f"runs is still to be trained.{seeds}")])


def step_table(records):
    """Training tokens/s of every block beside its dense twin's, a column for each shape, threads and machine.
    """
    cases, cells = [], {}
    for record in (records[name] for name in STEPS if name in records):
        cpu = re.sub(r"\(R\)| Processor", "", record["hardware"]["cpu"])
        for title, result in record["measurements"].items():
            shape, threads = title.removeprefix("training step, ").split(", ")
            cases.append(f"{shape}, {threads.removesuffix('s') if threads[:2] == '1 ' else threads}, {cpu}")
            for arm, s in result["sides"].items():
                cells.setdefault(arm, {})[cases[-1]] = f"{1 / s['to_twin']:.2f}x"
    rows = [[named(arm), *(of.get(case, "") for case in cases)] for arm, of in cells.items() if arm != TWIN]
    links = ", ".join(f"[{name}](results/{name})" for name in STEPS if name in records)
    return "\n".join([*report.lines_of(("arm", *cases), rows), "", wrapped(
        "Training tokens/s to the dense twin's; small: 4 x 128, 20 x 64 tokens, baby: 6 x 384, 8 x 256 "
        "tokens; medians of rounds in one process. Records:"), links + "."])


MOST = 10                                        # rows of the README's own table


def brief_table(words, records):
    """A trained dense model and each block switched on in it, as they decode: dense ones first, then the less
    lost the higher; of more than MOST rows those that lose least, and the one that loses most."""
    if RETROFITS not in records:
        return words.missing.format(f"`python bench.py retrofit --out=results/{RETROFITS}`")
    record = records[RETROFITS]
    losses = {side: as_decoded(runs) for side, runs in record["runs"].items()}
    lost = {side: losses.get(side + TAUGHT, losses[side]) - losses[TWIN]
            for side in losses if not side.endswith(TAUGHT)}
    rivals = [side for side in lost if side.startswith(TWIN)]
    blocks = sorted(lost.keys() - set(rivals), key=lost.get)
    blocks = blocks[:MOST - len(rivals) - 1] + blocks[-1:] if len(rivals) + len(blocks) > MOST else blocks
    lines = report.lines_of(words.brief_head, [in_brief(record, losses, side) for side in rivals + blocks])
    shape, h, decode = record["dense"]["model_args"], record["hardware"], record["decode"]
    change = max((abs(run["loss"] / decode[side.removesuffix(", int8")]["loss"] - 1)
                  for side, run in decode.items() if side.endswith(", int8")), default=0)
    return "\n".join([*lines, "", wrapped(words.brief.format(
        layers=shape["n_layer"], width=shape["n_embd"], tokens=record["tokens"] * record["dense"]["iters"],
        more=record["tokens"] * record["config"]["more"], seeds=len(record["seeds"]), cpu=h["cpu"],
        threads=h["threads"], change=100 * change, link=f"[record](results/{RETROFITS})"))])


def as_decoded(runs):
    """The mean loss of runs, shortcuts on where they have any."""
    return statistics.fmean(run.get("decoding", run["val_loss"]) for run in runs)


def in_brief(record, losses, side):
    """A row's cells."""
    rates = record["measurements"].get("decode", {}).get("sides", {})
    read = record["decode"].get(side, {}).get("weight_bytes")
    beside = [f"{losses[name] - losses[TWIN]:+.3f}" if name in losses and name != TWIN else ""
              for name in (side, side + TAUGHT)]
    return [named(side), f"{losses[side]:.3f}", *beside, f"{read / 1e6:.2f}" if read else "",
            *(speed(rates, side + kind) for kind in ("", ", int8"))]


def speed(rates, side):
    """Tokens/s, and beside the dense model's; "" where that was not timed."""
    if side not in rates:
        return ""
    return f"{rates[side]['median']:,.0f} ({rates[side]['median'] / rates[TWIN]['median']:.2f}x)"


def short(words, name, row, record):
    """An arm's cells."""
    twin, delta = record["rows"][TWIN], row["to_twin"]
    times = [f"{row['speed'][key]['median'] / twin['speed'][key]['median']:.2f}x"
             for key in ("decode, batch 1", "training step")]
    p, holm = delta["p"] if delta else None, report.corrected(record)[0].get(name)
    p = "" if p is None else f" (p {p:.2g})" if holm is None else f" (p {p:.2g}, {holm:.2g})"
    return [named(name), f"{row['val_loss']['mean']:.4f}", f"{delta['mean']:+.4f}{p}" if delta else "",
            *times, f"{row['macs'] / 1e6:.2f}", pays(words, name, row, record["axes"])]


def pays(words, name, row, axes):
    """In which costs an arm lies beyond the dense frontier."""
    if row["kind"] == "dense":
        return words.rival
    if row["sees_the_future"]:
        return words.leaks
    return ", ".join(words.axes[axis] for axis in won(name, axes)) or words.no


def won(name, axes):
    return [axis for axis in report.SHOWN if axes[axis]["to_frontier"].get(name, {}).get("pays")]


# -------------------------------------------------- the opening ---------------------------------------------

GPT2, RACE, SCREEN = "decode_gpt2_cpu.json", "race_shakespeare_cpu.json", "screen_63m_cpu.json"
FIRST = "first_minute_cpu.json"


def opening(words, records):
    """What it buys, in measured numbers."""
    for name in (GPT2, RACE):
        require(name in records, f"results/{name} is missing: the README's opening sentences quote it")
    times, race = (records[name]["measurements"][of]["ratio"]
                   for name, of in ((GPT2, "decode"), (RACE, "time")))
    best, where = max(times, key=times.get), records[GPT2]["hardware"]
    return wrapped(words.opening.format(
        threads=where["threads"], cpu=where["cpu"], decode=times[OURS], exact=times[OURS_FP32],
        best=words.best.format(best=times[best], name=best) if best != OURS else "",
        rivals=rivals_said(words, records[GPT2]["measurements"]["decode"].get("against", {})),
        race=race[OURS], verdict=verdict(words, records)))


def rivals_said(words, against):
    """How ours stands beside llama.cpp with weights of as many bits, where that was measured."""
    sides = (OURS, f"{LLAMA} bf16"), (f"{OURS}, int8", f"{LLAMA} q8_0"), (f"{OURS}, int4", f"{LLAMA} q4_0")
    found = [against.get(rival, {}).get(side) for side, rival in sides]
    return words.rivals.format(*found) if all(found) else ""


def lighter(words, records):
    """What a trained model gains from zeros, screened units and integer weights, where that was measured."""
    if SCREEN not in records:
        return ""
    record = records[SCREEN]
    points, sides = record["points"], record["measurements"]["decode"]["sides"]
    where, first = record["hardware"], sides["bfloat16, all rows"]["median"]
    speed = {name: side["median"] / first for name, side in sides.items()}
    screened, whole = "bfloat16, 4-bit copy, 15%", "int8, 4-bit copy, 15%"
    return wrapped(words.lighter.format(
        size=record["model"]["parameters"] / 1e6, cpu=where["cpu"], threads=where["threads"],
        zeros=speed["bfloat16"], screened=speed[screened], screened_cost=points[screened]["percent"],
        int8=speed["int8"], int8_cost=points["int8"]["percent"], both=speed[whole],
        both_cost=points[whole]["percent"], least=speed["q4_all"], least_cost=points["q4_all"]["percent"],
        rival=speed[f"{LLAMA} q8_0"], rival4=speed[f"{LLAMA} q4_0"], link=f"[record](results/{SCREEN})"))


def first_minute(words, records, name=FIRST):
    """What the first command of the README has printed, or another `bench.py compare`, as a table."""
    if name not in records:
        return ""
    record = records[name]
    runs, sides = record["runs"], record["measurements"]["decode"]["sides"]
    first = next(iter(runs))
    rows = []
    for name, run in runs.items():
        rate = sides[name]["median"]
        change = f"{run['loss'] / runs[first]['loss'] - 1:+.2%}" * (name != first)
        rows.append([f"`{name}`", f"{run['loss']:.3f}", change, f"{run['weight_bytes'] / 1e6:.2f}",
                     f"{rate:,.0f}", f"{rate / sides[first]['median']:.2f}x"])
    return "\n".join(report.lines_of(words.first_head, rows))


def wrapped(text):
    """Prose in lines as those of the pages."""
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def verdict(words, records):
    """How many arms of the table pay."""
    if TABLE not in records:
        return ""
    axes, holm = records[TABLE]["axes"], report.corrected(records[TABLE])[1]
    arms = [name for name, row in report.rows_once(records[TABLE]).items() if row["kind"] == "arm"]
    paying = [name for name in arms if won(name, axes)]
    sure = [name for name in paying if any(holm[name, axis] < 0.05 for axis in won(name, axes))]
    return words.verdict.format(arms=len(arms), paying=len(paying), losing=len(arms) - len(paying),
                                tests=len(holm), sure=len(sure))


LANGUAGES = {
    "": Language(
        head=("arm", "val loss", "to its dense twin", "decode speed", "training speed",
              "M multiply-adds a token", "pays in"),
        brief_head=("model", "val loss", "to dense", "taught by dense", "MB a token", "tokens/s",
                    "in 8 bits"),
        brief="A dense model of {layers} layers, {width} wide, trained with {tokens:,} tokens; each block "
              "switched on in it and trained on with {more:,} more, as was the dense model, without and with "
              "the dense model as teacher; `dense/2` keeps half of its MLP's units. {seeds} seeds, {threads} "
              "thread of an {cpu}, {link}; nats a byte of each as it decodes, speeds beside dense bf16; 8 "
              "bits change a loss by {change:.2f}% at most.",
        rival="rival", no="no", leaks="no: it sees the future",
        axes={axis: axis for axis in report.SHOWN},
        told="{tokens} tokens a run, {seeds} seeds, {place}. Val loss: nats a byte, of the model as it "
             "decodes, shortcuts on; p of the paired t test, then Holm's for {tests} tests; speeds: "
             "multiples of the dense twin's in the same interleaved rounds; multiply-adds of weights: "
             "counted from what a decode step runs. "
             "*Pays*: the whole 95% interval lies beyond the frontier of plain models of other widths and "
             "depths. At this width a decode step is calls more than bytes; at GPT-2's shape see "
             "[docs/presets.md](docs/presets.md). All of it: [report](results/table_cpu.md), {link}.",
        missing="This table is not measured yet: {} makes it.",
        opening="On {threads} CPU cores ({cpu}) GPT-2's shape decodes {decode:.0f} times as fast as "
                "nanoGPT's `generate`, which has no KV cache and computes in fp32 there ({exact:.0f} times "
                "in fp32{best}){rivals}. nanoGPT's documented CPU run on Shakespeare reaches its loss in "
                "{race:.0f} times less time{verdict}.",
        best="; {best:.0f} times with {name}, random weights, so that is speed alone",
        rivals=", in the same rounds {:.1f} times as fast as llama.cpp in bf16, {:.1f} times in 8 bits and "
               "{:.1f} times in 4",
        lighter="A trained model of {size:.0f} M weights with squared ReLU ({cpu}, {threads} threads, "
                "{link}), beside a step that reads all of its bf16 weights: left unread where units are zero "
                "{zeros:.2f} times as fast, screened {screened:.2f} ({screened_cost:+.2f}% loss); in 8 bits "
                "{int8:.2f} ({int8_cost:+.2f}%), with the screen {both:.2f} ({both_cost:+.2f}%); all in 4 "
                "bits {least:.2f} ({least_cost:+.2f}%); llama.cpp at that shape {rival:.2f} in q8_0 and "
                "{rival4:.2f} in q4_0.",
        first_head=("run", "val loss", "change", "MB a token", "decode tokens/s", "speed"),
        verdict=". Of {arms} blocks and combinations trained at one small scale {paying} beat dense models "
                "of every size in at least one cost ({sure} of them after Holm's correction for {tests} "
                "tests), {losing} in none",
        same=" {name} is the same model as {first}, flag by flag, and counts once.",
        rounds=" Intervals in time hold seeds and rounds of timing together.",
        no_rounds=" This record keeps no rounds of timing: its intervals in time hold the seeds alone and "
                  "are too narrow; the next run keeps them."),
    " in Korean": Language(
        head=("블록", "검증 손실", "밀집 쌍둥이와의 차", "디코드 속도", "학습 속도", "토큰당 곱셈-덧셈(백만)",
              "이득이 있는 곳"),
        brief_head=("모델", "검증 손실", "dense와의 차", "dense를 교사로", "토큰당 MB", "tokens/s", "8비트"),
        brief="{tokens:,}토큰으로 학습한 {layers}층, 폭 {width}의 dense 모델 하나에서 블록마다 켠 다음 "
              "{more:,}토큰을 더 학습했고, dense 모델도 똑같이 더 학습했습니다. dense 모델을 교사로 둔 "
              "경우와 두지 않은 경우가 함께 있으며 `dense/2`는 MLP 유닛의 절반만 남긴 것입니다. 시드 "
              "{seeds}개, {cpu} 스레드 {threads}개, {link}. 손실은 실제로 디코드하는 모델의 바이트당 nat, "
              "속도는 bf16 dense 모델과 견준 값이고, 8비트는 손실을 많아야 {change:.2f}% 바꿉니다.",
        rival="경쟁 상대", no="없음", leaks="없음: 미래를 본다",
        axes={"decode time": "디코드 시간", "decode bytes": "디코드 바이트", "training time": "학습 시간"},
        told="실행마다 {tokens}토큰, 시드 {seeds}개, {place}. 검증 손실: 지름길을 켜고 실제로 디코드하는 "
             "모델의 바이트당 nat. p: 대응표본 t 검정, 그다음은 검정 {tests}개에 대한 Holm 보정값. "
             "속도: 같은 회차에 번갈아 잰 밀집 쌍둥이의 몇 배인가. "
             "곱셈-덧셈: 디코드 한 단계가 실제로 실행한 가중치 연산을 센 값. *이득*은 95% 구간 "
             "전체가 폭과 깊이가 다른 평범한 모델들의 경계선을 넘을 때만 인정합니다. 이 폭에서 디코드 한 "
             "단계는 바이트보다 호출이 좌우하니, GPT-2 크기는 [docs/presets.md](docs/presets.md)를 "
             "보세요. 전체: [보고서](results/table_cpu.md), {link}.",
        missing="이 표는 아직 측정되지 않았습니다. {} 명령이 만듭니다.",
        opening="CPU {threads}코어({cpu})에서 GPT-2 크기의 모델을 nanoGPT의 `generate`보다 {decode:.0f}배 "
                "빠르게 디코드합니다. nanoGPT는 KV 캐시 없이 fp32로 계산하며, 우리도 fp32로 하면 "
                "{exact:.0f}배입니다{best}{rivals}. nanoGPT 문서에 나오는 셰익스피어 CPU 실행의 손실에는 "
                "{race:.0f}배 적은 시간으로 도달합니다{verdict}.",
        best="({name}은 {best:.0f}배, 무작위 가중치라 속도만의 비교)",
        rivals=". 같은 회차에 잰 llama.cpp와 견주면 bf16으로 {:.1f}배, 8비트로 {:.1f}배, 4비트로 "
               "{:.1f}배입니다",
        lighter="squared ReLU로 학습한 가중치 {size:.0f}백만 개의 모델({cpu}, 스레드 {threads}개, {link})이 "
                "bf16 가중치를 모두 읽는 단계에 견주어 얼마나 빨라지는지입니다. 0인 유닛의 행을 읽지 않으면 "
                "{zeros:.2f}배, 선별 유닛은 {screened:.2f}배(손실 {screened_cost:+.2f}%), 8비트는 "
                "{int8:.2f}배({int8_cost:+.2f}%), 둘을 함께 쓰면 {both:.2f}배({both_cost:+.2f}%), 모두 "
                "4비트면 {least:.2f}배({least_cost:+.2f}%)입니다. 같은 크기의 llama.cpp는 q8_0이 "
                "{rival:.2f}배, q4_0이 {rival4:.2f}배입니다.",
        first_head=("실행", "검증 손실", "변화", "토큰당 MB", "디코드 tokens/s", "속도"),
        verdict=". 작은 규모 하나에서 학습한 블록과 조합 {arms}개 가운데 {paying}개가 적어도 한 가지 "
                "비용에서 모든 크기의 dense 모델을 이겼고(검정 {tests}개에 대한 Holm 보정 뒤에는 {sure}개), "
                "{losing}개는 어느 것에서도 이기지 못했습니다",
        same=" {name}는 플래그까지 {first}와 같은 모델이라 한 번만 셉니다.",
        rounds=" 시간의 구간은 시드와 측정 회차를 함께 담습니다.",
        no_rounds=" 이 기록은 회차별 시간을 남기지 않아 시간의 구간이 시드만 담고 있어 너무 좁습니다. 다음 "
                  "측정부터는 회차도 담습니다."),
}


def verdict_line(page, record):
    """The sentence that a mechanism's page opens with, of the main table's record; "" where no arm of the
    page is in it."""
    arms = [arm for arm in page.arms if arm in record["rows"]]
    if not arms:
        return ""
    found = {axis: record["axes"][axis]["to_frontier"] for axis in report.SHOWN}
    won = {arm: listed([axis for axis in found if found[axis].get(arm, {}).get("pays")]) for arm in arms}
    if won[arms[0]]:
        said = f"pays in {won[arms[0]]} at one small scale"
    else:
        more = [f"as `{arm}` it pays in {won[arm]}" for arm in arms if won[arm]]
        said = "; ".join(["does not pay alone at one small scale", *more[:1]])
    return f"**Verdict:** {said} ([table](table.md))."


def listed(names):
    """["a", "b", "c"] -> "a, b and c"."""
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)
