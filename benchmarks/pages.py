"""What the README and the pages of docs/ show of the records: which arms and rows belong to which mechanism,
the main table in few columns, the opening sentences, in both languages."""
from dataclasses import dataclass, field

from benchmarks import report
from benchmarks.record import OURS, OURS_FP32, TWIN
from configurator import require

TABLE = "table_cpu.json"
COMMAND = f"`python bench.py table --out=results/{TABLE}`"


@dataclass(frozen=True)
class Page:
    """What docs/NAME.md shows of the records."""
    arms: tuple = ()                             # of the table
    elsewhere: dict = field(default_factory=dict)    # {record: pattern of the first cells of its rows}


def quality(arms):
    return {"quality_pylib_cpu.json": f"({arms})(, .*)?", "steps_blocks_cpu.json": arms}


def context(arms):
    return {"quality_context_cpu.json": f"({arms})(, .*)?", "steps_context_cpu.json": arms}


def at_gpt2s_shape(sides):
    """Tokens/s at 124M parameters."""
    return {"decode_gpt2_cpu.json": rf"decode gpt2: decode, tokens/s( \((dense.*|{sides})\).*)?"}


def of_mlp(sides):
    return {"mlp_cpu.json": rf"width \d+: ({sides}|dense), bfloat16.*|width 768: F.linear, bfloat16"}


TWO_OF_FOUR = "quality_two_of_four_cpu.json"
MECHANISMS = {
    "osc": Page(("osc", "osc+window"), quality("dense|gelu|osc")),
    "mlp_topk": Page(("topk",), {"quality_pylib_cpu.json": "dense|predict"} | of_mlp("top 10%")
                     | at_gpt2s_shape("top 10%")),
    "winners": Page(("winners",), quality("dense|winners")),
    "event_gate": Page(("event",), quality("dense|event")),
    "columns": Page(("columns", "columns*2", "columns*4", "columns+window+2:4"),
                    quality(r"dense|dense/4|columns(\*\d)?") | of_mlp("columns 3 of 32")
                    | at_gpt2s_shape("columns 3 of 32")),
    "compartments": Page(("compartments",), quality("dense|compartments")),
    "experts": Page(("experts",), quality("dense|experts")),
    "mlp_predict": Page(("predict", "predict+window", "hierarchy+predict"),
                        quality("dense|predict") | of_mlp("predicted 20%")
                        | at_gpt2s_shape("predicted 20%")),
    "mlp_screen": Page((), {"screen_63m_cpu.json": ".*", "screen_63m_losses.json": ".*"}),
    "window": Page(("window", "predict+window", "osc+window", "columns+window+2:4"),
                   context("dense|window") | {"window_cpu.json": ".*"} | at_gpt2s_shape("window 128")),
    "dendrites": Page(("dendrites", "dendrites1", "dendrites4"),
                      context(r"dense|dendrites\d?") | at_gpt2s_shape("1 of 4 dendrites")),
    "hierarchy": Page(("hierarchy", "hierarchy+predict"),
                      context("dense|hierarchy") | at_gpt2s_shape("hierarchy 4")),
    "exits": Page(("exits",), {"depth_cpu.json": ".*"}),
    "ponder": Page(("ponder",), {"ponder_cpu.json": ".*"}),
    "grow": Page((), {"grow_cpu.json": ".*"}),
    "weights": Page(("2:4", "columns+window+2:4"),
                    {TWO_OF_FOUR: "dense|2:4", "kernels_cpu.json": ".*"} | at_gpt2s_shape("2:4")),
    "attn_topk": Page(("attn_topk",), {TWO_OF_FOUR: "dense|attn_topk"}
                      | at_gpt2s_shape(r"columns \+ a quarter of attention")),
    "screen": Page((), at_gpt2s_shape("screened head")),
    "continual": Page((), {"continual_cpu.json": ".*"}),
    "energy_budget": Page((), {"energy_cpu.json": ".*"}),
    "presets": Page(("efficient", "quality"),
                    {TWO_OF_FOUR: "dense|efficient.*"} | at_gpt2s_shape(r"efficient.*|columns \+.*")),
}
PAGE_OF = {arm: name for name, page in reversed(MECHANISMS.items()) for arm in page.arms}


def named(arm):
    """An arm's name with a link to its page, as seen from the root; combinations lead to their first part."""
    return f"[{arm}](docs/{PAGE_OF[arm]}.md)" if arm in PAGE_OF else arm


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
    rival: str
    no: str
    leaks: str
    axes: dict
    told: str
    missing: str
    opening: str
    best: str
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
    return "\n".join([*lines, "", told])


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

GPT2, RACE = "decode_gpt2_cpu.json", "race_shakespeare_cpu.json"


def opening(words, records):
    """What this is, in two sentences with measured numbers."""
    for name in (GPT2, RACE):
        require(name in records, f"results/{name} is missing: the README's opening sentences quote it")
    times, race = (records[name]["measurements"][of]["ratio"]
                   for name, of in ((GPT2, "decode"), (RACE, "time")))
    best, where = max(times, key=times.get), records[GPT2]["hardware"]
    return words.opening.format(
        threads=where["threads"], cpu=where["cpu"], decode=times[OURS], exact=times[OURS_FP32],
        best=words.best.format(best=times[best], name=best) if best != OURS else "",
        race=race[OURS], verdict=verdict(words, records))


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
        opening="**nanoCortex is nanoGPT with every brain-inspired block behind a flag, each one trained, "
                "timed and counted beside its dense twin, the losers shown too; with all flags off it is "
                "nanoGPT's GPT-2, bit for bit.** On {threads} CPU cores ({cpu}) it decodes at GPT-2's "
                "shape {decode:.1f} times as fast as nanoGPT's own `generate` in bf16 and {exact:.1f} "
                "times in fp32{best}, and reaches the loss of nanoGPT's documented CPU run on Shakespeare "
                "in {race:.1f} times less time{verdict}.",
        best=" ({best:.1f} times with {name}: random weights and squared ReLU, so that is speed alone)",
        verdict="; of {arms} bio arms trained at one small scale {paying} lie beyond what plain models of "
                "any size reach in at least one cost ({sure} of them also after Holm's correction for "
                "{tests} tests), {losing} do not",
        same=" {name} is the same model as {first}, flag by flag, and counts once.",
        rounds=" Intervals in time hold seeds and rounds of timing together.",
        no_rounds=" This record keeps no rounds of timing: its intervals in time hold the seeds alone and "
                  "are too narrow; the next run keeps them."),
    " in Korean": Language(
        head=("블록", "검증 손실", "밀집 쌍둥이와의 차", "디코드 속도", "학습 속도", "토큰당 곱셈-덧셈(백만)",
              "이득이 있는 곳"),
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
        opening="**nanoCortex는 뇌에서 착안한 블록을 모두 플래그 뒤에 둔 nanoGPT로, 블록마다 밀집(dense) "
                "쌍둥이와 나란히 학습시켜 시간을 재고 연산을 세며 진 것까지 그대로 보여 주고, 플래그를 "
                "모두 끄면 nanoGPT의 GPT-2와 비트까지 같습니다.** CPU {threads}코어({cpu})에서 GPT-2 크기를 "
                "nanoGPT의 `generate`보다 bf16으로 {decode:.1f}배, fp32로 {exact:.1f}배 빠르게 "
                "디코드하고{best}, nanoGPT 문서에 나오는 셰익스피어 CPU 실행의 손실에 {race:.1f}배 적은 "
                "시간으로 도달합니다{verdict}.",
        best="({name}: {best:.1f}배, 무작위 가중치와 제곱 ReLU이므로 속도만의 비교)",
        verdict=". 작은 규모 하나에서 학습한 뇌 모방 구성 {arms}개 가운데 {paying}개는 적어도 한 가지 "
                "비용에서 모든 크기의 평범한 모델이 닿는 선을 넘었고(검정 {tests}개에 대한 Holm 보정 "
                "뒤에도 넘는 것은 {sure}개), {losing}개는 넘지 못했습니다",
        same=" {name}는 플래그까지 {first}와 같은 모델이라 한 번만 셉니다.",
        rounds=" 시간의 구간은 시드와 측정 회차를 함께 담습니다.",
        no_rounds=" 이 기록은 회차별 시간을 남기지 않아 시간의 구간이 시드만 담고 있어 너무 좁습니다. 다음 "
                  "측정부터는 회차도 담습니다."),
}
