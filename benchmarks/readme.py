"""The tables of the README and of docs/, written from results/*.json."""
import re
import statistics
from dataclasses import dataclass
from functools import partial

from benchmarks import ROOT, pages, report
from benchmarks.record import (
    CAUSAL,
    DENSE,
    DENSE_FP32,
    OURS,
    PEER,
    TAUGHT,
    TWIN,
    mean_of,
    read,
    write_atomically,
)
from configurator import close_match, require

BEGIN, END = "<!-- rows: {} -->", "<!-- end of rows -->"
BLOCK = re.compile(BEGIN.format("(.+?)") + f"\n.*?{END}", re.DOTALL)


@dataclass(frozen=True)
class Readme:
    """Write the tables of README.md, README.ko.md and docs/ from results/*.json."""
    check: bool = False  # change nothing: exit with status 2 if one of these pages is not up to date


def readme(cfg):
    records, stale = records_of(ROOT / "results"), []
    for path in (ROOT / "README.md", ROOT / "README.ko.md", *sorted((ROOT / "docs").glob("*.md"))):
        name, old = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        new = filled(old, name, records)
        if new != old:
            stale.append(name)
            if not cfg.check:
                write_atomically(path, new)
    require(not cfg.check or not stale,
            f"{', '.join(stale)}: not what results/*.json say: type python bench.py readme")
    print(f"written anew: {', '.join(stale)}" if stale else "the README and docs/ are up to date")


def records_of(folder):
    """{name: record} of every *.json in a folder."""
    return {path.name: read(path) for path in sorted(folder.glob("*.json"))}


def filled(text, page, records):
    """The text of a page, its path below the root, with every block between BEGIN and END written anew."""
    said = {len(BLOCK.findall(text)), text.count(BEGIN.partition("{")[0]), text.count(END)}
    require(len(said) == 1, f"{page} has lost a mark: a block of rows begins with '{BEGIN.format('NAME')}' "
            f"and ends with '{END}', each on a line of its own")

    def write(match):
        name = match[1]
        require(name in BLOCKS, f"{page} asks for the rows of '{name}'{close_match(name, BLOCKS)}: it must "
                f"be one of {', '.join(BLOCKS)}")
        return "\n".join((BEGIN.format(name), seen_from(page, BLOCKS[name](records)), END))
    return BLOCK.sub(write, text)


def seen_from(page, rows):
    """Rows whose links begin at the root, as a page has to write them."""
    return rows.replace("](docs/", "](").replace("](results/", "](../results/") if "/" in page else rows


def results_table(records):
    """Every record as rows of the markdown tables TABLES, and the places where they ran."""
    hardware = [found["hardware"] for found in records.values()]
    places = [f"{h['gpu'] or h['cpu']}, {h['threads']} threads, torch {h['torch']}" for h in hardware]
    return "\n".join([*tables(records, dict.fromkeys(records, ".*")),
                      pages.wrapped("Medians; " + "; ".join(dict.fromkeys(places)) + ". Each record holds "
                                    "its command, commit, spread and load average.")])


def mechanism(page, records):
    """What the records say of one mechanism: its arms in the table, and its rows of the other records."""
    return "\n".join([*pages.own_rows(page, records), *tables(records, page.elsewhere)]).rstrip("\n")


def tables(records, wanted):
    """Lines of TABLES with the rows whose first cell fits. wanted: {record: pattern of that cell}."""
    lines = []
    for head, subcommands, rows_of in TABLES:
        lines += table(head, [f"| {row} | [{name}](results/{name}) |"
                              for name, pattern in wanted.items() if name in records
                              if records[name]["subcommand"] in subcommands or not subcommands
                              for row in rows_of(records[name])
                              if re.fullmatch(pattern, row.split(" | ")[0])])
    return lines


def table(head, rows):
    """Lines of a markdown table with an empty one behind it; none without rows."""
    head += " | record"
    return [f"| {head} |", "|" + "---|" * (head.count("|") + 1), *rows, ""] if rows else []


def decisive(names, records):
    """The fronts in time of searches on one trained model."""
    rows = [f"| {row} | [{name}](results/{name}) |" for name in names if name in records
            for row in front_rows(records[name])]
    return "\n".join(table(FRONT, rows)).rstrip("\n")


COLUMNS = 0, 1, 2, 3, 4, 7, 8, 10, 14, 17      # of report.HEAD that fit here; the report has the others


def arm_rows(record):
    """Every arm of the table, losers too."""
    for cells in report.main_rows(record):
        yield " | ".join(cells[column] for column in COLUMNS)


def peer_rows(record):
    """Every measurement with nanoGPT beside ours."""
    for name, result in record.get("measurements", {}).items():
        what = f"{record['subcommand']} {record['config'].get('shape', '')}".strip()
        yield from measurement_rows(f"{what}: {name}, {result['unit']}", result)


def measurement_rows(what, result):
    peer = result["sides"].get(PEER)
    rivals = result.get("against", {})
    for side, s in result["sides"].items() if peer else ():
        if side != PEER and side not in rivals:
            ratio = f"{result['ratio'][side]:.2f}x" if side in result["ratio"] else ""
            twin = result.get("to_twin", {}).get(side)
            label = what if side == OURS else f"{what} ({side.removeprefix('ours').strip()})"
            if twin:
                label += f", {twin:.2f}x its dense twin" if "twins" in result else NO_TWIN
            yield f"{label} | {figure(s)} | {figure(peer)} | {ratio}"


def rival_rows(record):
    """Ours beside every other engine with the same weights."""
    for name, result in record["measurements"].items():
        sides, rivals = result["sides"], result.get("against", {})
        what = f"{record['config']['shape']}: {name}, {result['unit']}"
        for rival, ratios in rivals.items():
            for side, ratio in ratios.items():
                if side != rival:
                    yield (f"{what} ({side}) | {figure(sides[side])} | {rival} | {figure(sides[rival])} "
                           f"| {ratio:.2f}x")


NO_TWIN = ", squared ReLU; superseded: no dense twin beside it"


def quality_rows(record):
    for arm, s in record["measurements"]["val loss"]["sides"].items():
        first = record["runs"][arm][0]
        zeros = first["counters"].get("zeros")
        delta = f"{statistics.fmean(s['to_twin']):+.4f}" if s["to_twin"] and arm != TWIN else ""
        shown = f"{zeros:.0%}" if zeros is not None else ""
        yield f"{arm} | {mean_of(s)} | {s['repeats']} | {delta} | {first['parameters']:,} | {shown}"
        for share in first["policy"]:
            losses = [run["policy"][share] for run in record["runs"][arm]]
            twin = [run["val_loss"] for run in record["runs"].get(TWIN, ())]
            delta = f"{statistics.fmean(losses) - statistics.fmean(twin):+.4f}" if twin else ""
            seen = {"mean": statistics.fmean(losses), "min": min(losses), "max": max(losses)}
            yield (f"{arm}, {float(share):.0%} of the units read | {mean_of(seen)} | {s['repeats']} "
                   f"| {delta} | |")


def change_rows(record):
    for name, s in record["measurements"]["val loss"]["sides"].items():
        yield f"{name} | {mean_of(s)} | {s['repeats']} | {s['to_ours']:+.4f}"


def mlp_rows(record):
    """All sides at one width; of the other widths what gates before the up projection, in bf16."""
    whole = "width 768" if "width 768" in record["measurements"] else next(iter(record["measurements"]))
    for width, result in record["measurements"].items():
        for side, s in result["sides"].items():
            if width != whole and not re.fullmatch(r"(columns|predicted) .*, bfloat16", side):
                continue
            work = record["work"].get(f"{side}, {width.removeprefix('width ')}", {})
            mib = f"{work['bytes'] / 2**20:.2f} MiB" if work else ""
            if side in result.get("to_twin", {}):
                side_said = f"{side}, {result['to_twin'][side]:.2f}x its dense twin"
            else:                                # the dense side of older records has GELU: no block's twin
                side_said = side if "to_twin" in result else re.sub("^dense,", "dense with GELU,", side)
            yield (f"{width}: {side_said} | {figure(s)} | {result['against'][DENSE][side]:.2f}x "
                   f"| {result['against'][DENSE_FP32][side]:.2f}x | {mib}")


def screen_rows(record):
    """Every point of a run: its weights and what is screened."""
    rates = record["measurements"].get("decode", {}).get("sides", {})
    for name, p in record["points"].items():
        if "loss" in p:
            low, high = p["nats"]["interval"]
            change = f"{p['nats']['mean']:+.4f} ({low:+.4f} to {high:+.4f}) | {p['percent']:+.2f}%"
            rate = figure(rates[name]) if name in rates else ""
            yield f"{name} | {p['loss']:.4f} | {change} | {p['bytes'] / 1e6:.1f} | {rate}"


def sparsify_rows(record):
    """Every trial of a search: what it loses, on the windows of the search and on others, and reads."""
    points = record["points"]
    first = points["dense"]["bytes"] + points["dense"]["kv_bytes"]
    for name, p in points.items():
        if p["interval"]:
            fresh = ""
            if "fresh" in p and not p["trained"]:
                own, of = (statistics.fmean(each["fresh"]) for each in (p, points["dense"]))
                fresh = f"{own / of - 1:+.2%}"
            low, high = p["interval"]
            size = p["bytes"] + p["kv_bytes"]
            yield (f"{name} | {p['share']:+.2%} ({low:+.2%} to {high:+.2%}) | {fresh} | {size / 1e6:.1f} "
                   f"| {size / first:.0%}")


def front_rows(record):
    """The points of a search whose decode steps were timed in turns, beside the dense model in bf16 and in 8
    bits."""
    sides, points = record["measurements"].get("decode", {}).get("sides", {}), record["points"]
    for name, side in sides.items():
        loss = statistics.fmean(points[name]["fresh"]) / statistics.fmean(points["dense"]["fresh"]) - 1
        if points[name]["trained"] is not None:
            continue                             # its loss stands beside the dense model trained on as long
        beside = [f"{side['median'] / sides[rival]['median']:.2f}x" if rival in sides else ""
                  for rival in ("dense", "quantize=int8")]
        yield (f"{name} | {loss:+.2%} | {(points[name]['bytes'] + points[name]['kv_bytes']) / 1e6:.1f} | "
               + " | ".join([figure(side), *beside]))


def retrofit_rows(record):
    """Blocks of a trained dense model beside the dense model trained on as long, seed by seed; how they
    decode beside it, and in 8 bits beside it in 8 bits."""
    runs, rates = record["runs"], record["measurements"].get("decode", {"sides": {}})["sides"]

    def beside(side):
        return [run["val_loss"] - dense["val_loss"] for run, dense in zip(runs.get(side, ()), runs[TWIN])]

    def speed(side, kind=""):
        mine, twin = rates.get(side + kind), rates.get(TWIN + kind)
        return f"{mine['median']:,.0f}, {mine['median'] / twin['median']:.2f}x" if mine else ""

    for side, found in runs.items():
        if not side.endswith(TAUGHT):
            off, taught = beside(side), beside(side + TAUGHT)
            spread = f" ({min(off):+.4f} to {max(off):+.4f})" * (len(off) > 1)
            policy = [run["decoding"] - run["val_loss"] for run in found if "decoding" in run]
            read = record.get("decode", {}).get(side, {}).get("weight_bytes")
            yield " | ".join((
                side, f"{found[0]['untouched']:+.4f}" if side != TWIN and "untouched" in found[0] else "",
                f"{statistics.fmean(run['val_loss'] for run in found):.4f}",
                f"{statistics.fmean(off):+.4f}{spread}" if side != TWIN else "",
                f"{statistics.fmean(taught):+.4f}" if taught else "",
                f"{statistics.fmean(policy):+.4f}" if policy else "", f"{read / 1e6:.2f}" if read else "",
                speed(side), speed(side, ", int8"), str(len(found))))


def step_rows(record):
    for title, result in record["measurements"].items():
        case = title.removeprefix("training step")
        for arm, s in result["sides"].items():
            yield f"{arm}{case} | {figure(s)} ({s['min']:.4g} to {s['max']:.4g}) | {s['to_twin']:.2f}x"


def window_rows(record):
    for title, result in record["measurements"].items():
        for side, s in result["sides"].items():
            faster = f"{result['against'][side]:.2f}x" if side in result.get("against", {}) else ""
            cache = record["cache_bytes"].get(side)
            cache = f"{cache / 2**20:.1f} MiB" if cache else ""
            yield f"{title}: {side} | {figure(s)} | {faster} | {cache}"


def depth_rows(record):
    """Models and policies by the layers that a token passes."""
    for name, p in record["points"].items():
        rate = p.get("tokens_per_second") or 1e3 / p["token_ms"]["median"]
        step = figure(p["step_ms"]) if "step_ms" in p else ""
        loss = f"{p['val_loss']:.4f}" if "val_loss" in p else ""
        yield f"{name} | {p['layers']:.2f} | {loss} | {rate:,.0f} | {step}"


def drafted_rows(record):
    """Self-speculation: how many tokens are those of all layers, how many drafts stood, what it gained."""
    for name, d in record.get("drafted", {}).items():
        yield (f"{name} | {d['equal']:,} of {d['tokens']:,} | {d['accepted']:.0%} "
               f"| {d['tokens_per_round']:.2f} | {d['to_twin']:.2f}x | {d['ceiling']:.2f}x")


def growth_rows(record):
    for name, s in record["measurements"]["val loss"]["sides"].items():
        seconds = statistics.median(run["step_seconds"] for run in record["runs"][name])
        first = record["runs"][name][0]
        yield (f"{name} | {mean_of(s)} | {s['repeats']} | {seconds:.0f} "
               f"| {first['curve'][-1][2] / 1e12:.2f} | {first['iters']}")


def kernel_rows(record):
    """The sparse side of every product, and our own dense one."""
    for title, result in record["measurements"].items():
        for side, s in result["sides"].items():
            if side != "F.linear":
                yield (f"{title}: {side} | {figure(s)} | {result['against']['F.linear'][side]:.2f}x "
                       f"| {s['GB_per_s']:.1f}")


def fertility_rows(record):
    for text, sides in record["fertility"].items():
        for name, s in sides.items():
            change = s["tokens"] / sides["GPT-2"]["tokens"] - 1
            yield (f"{text} | {name}, {record['vocab_sizes'][name]:,} ids | {s['tokens_per_char']:.4f} "
                   f"| {s['bits_per_byte']:.3f} | {change:+.1%}")


ARCHIVERS = "gzip -9", "zstd -19", "xz -9e", "compress.py"


def compression_rows(record):
    for text, one in record["files"].items():
        bits = " | ".join(f"{one['bits_per_byte'][name]:.3f}" for name in ARCHIVERS)
        yield (f"{text} | {one['bytes']:,} | {bits} | {one['seconds']['compress']:.0f} and "
               f"{one['seconds']['decompress']:.0f}")


def continual_rows(record):
    for name, s in record["summary"].items():
        yield (f"{name} | {s['first']:.3f} | {s['forgetting']:.3f} | {s['cut']:.1%} | {s['second']:.3f} "
               f"({s['second_to_plain']:+.1%}) | {s['step_to_plain']:.2f}x | {record['config']['repeats']}")


def energy_rows(record):
    for name, found in record["points"].items():
        macs, loss = (statistics.fmean(p[key] for p in found) for key in ("macs", "val_loss"))
        joules = found[0]["joules_per_token"]
        yield (f"{name} | {macs:,.0f} | {loss:.4f} | {joules if joules == 'n/a' else f'{joules:.2g}'} "
               f"| {len(found)}")


def quantized_rows(record):
    """Losses of one model with its weights in other forms."""
    dense = record["losses"]["dense"]["loss"]
    for name, found in record["losses"].items():
        size = f"{found['bytes'] / 2**20:.0f} MiB" if found["bytes"] else ""
        loss = found["loss"]
        yield f"{name} | {loss:.4f} | {loss - dense:+.4f} | {loss / dense - 1:+.2%} | {size}"


def fault_rows(record):
    """Faults: how many of what was injected held."""
    for row, found in sorted(record["faults"].items(), key=lambda item: int(item[0][1:])):
        yield (f"{row}, {found['about']} | {found['held']}/{found['held'] + found['failed']} "
               f"| {found['seconds']:.0f}")


def version_of(name):
    """"2.14.1" -> (2, 14, 1)."""
    return tuple(int(part) for part in re.findall(r"\d+", name))


def suite_rows(record):
    """The whole test suite on each PyTorch."""
    for torch, found in sorted(record["suite"].items(), key=lambda item: version_of(item[0])):
        yield (f"PyTorch {torch}, Python {found['python']} | {found['passed']:,} | {found['skipped']} "
               f"| {found['failed']} | {found['seconds'] / 60:.0f}")


TESTED = {"": "The whole test suite passes on PyTorch {} (CPU).",
          " in Korean": "모든 테스트가 PyTorch {}에서 통과합니다(CPU)."}


def tested(sentence, records):
    """The sentence of a README on versions; nothing without a record."""
    suite = records.get("suite_cpu.json", {"suite": {}})["suite"]
    whole = sorted((torch for torch, found in suite.items() if not found["failed"]), key=version_of)
    return sentence.format(", ".join(whole)) if whole else ""


def paper_rows(record):
    """Decode times by arithmetic."""
    for name, p in record["points"].items():
        rates = " | ".join(figure({"median": 1 / seconds}) for seconds in p["seconds"].values())
        lose = f"{p['may_lose']:.3f} (below {p['beside']})" if p["may_lose"] else ""
        yield f"{name} | {(p['weight_bytes'] + p['kv_bytes']) / 1e6:,.0f} | {rates} | {lose}"


def launch_rows(record):
    """Kernels that a card launches for a decode step."""
    for name, p in record["points"].items():
        yield f"{name} | " + " | ".join(
            f"{p[f'{side}_layer']:g} | {p[f'{side}_outside']:g}" if f"{side}_layer" in p else f"{p[side]} |"
            for side in ("before", "after"))


def predicted_rows(record):
    """What bytes and launches would take."""
    for target, what, value, unit in record["predictions"]:
        yield f"{target}: {what} | " + (f"{value:.2f} {unit}" if unit else "")


def figure(s):
    """A median in four digits, thousands apart."""
    return f"{s['median']:,.0f}" if s["median"] >= 1000 else f"{s['median']:.4g}"


FRONT = ("a trained run decodes with | loss on windows that chose nothing | MB a step | tokens/s | to bf16 "
         "| to int8")

# heads, the subcommands whose records have rows here (none named: all), and what gives a record's rows
TABLES = (
    (" | ".join(report.HEAD[column] for column in COLUMNS), ("table",), arm_rows),
    ("measured | ours | nanoGPT | ratio", (), peer_rows),
    ("the same weights at batch 1 | ours | engine | the engine's | ratio", ("decode",), rival_rows),
    ("block | val loss | seeds | to its dense twin | parameters | zeros into W_down", ("quality",),
     quality_rows),
    ("a training step with the block | ms | its dense twin's time", ("steps",), step_rows),
    ("a trained run's weights, and a copy that picks a share of the units | held-out loss | to the run's own "
     "weights, nats (95%, paired) | % | MB a token | tokens/s", ("screen",), screen_rows),
    ("a trained run made sparse | held-out loss to the run's own (95%, paired) | on windows that chose "
     "nothing | MB a decode step reads | of the run's own", ("sparsify",), sparsify_rows),
    (FRONT, ("sparsify",), front_rows),
    ("retrofit | untouched | val loss | to dense trained on as long (seeds) | with a teacher | shortcuts on "
     "| MB a token | tokens/s, to dense | in int8 | seeds", ("retrofit",), retrofit_rows),
    (f"one token through an MLP | us | times {DENSE} | times {DENSE_FP32} | weights read", ("mlp",),
     mlp_rows),
    (f"attention, forward and backward; a decoded token | ms | times {CAUSAL} | cache", ("window",),
     window_rows),
    ("depth | layers per token | val loss | tokens/s, greedy | a training step, ms", ("depth", "ponder"),
     depth_rows),
    ("drafts | tokens that all layers would choose | drafts that stand | tokens a round "
     "| times the dense twin's tokens/s | what the weights read allow", ("depth",), drafted_rows),
    ("growth | val loss | seeds | training steps, s | TFLOP | iterations", ("grow",), growth_rows),
    ("the race's config with | val loss | seeds | to ours", ("ablate",), change_rows),
    ("second task learnt with | loss on the first | forgetting | less than fine-tuning | loss on the second "
     "| a step's time | seeds", ("continual",), continual_rows),
    ("energy budget | multiply-adds of the blocks, a decode step | val loss | joules a token | seeds",
     ("energy",), energy_rows),
    ("a product of weights that no cache holds | us | times F.linear | GB/s of weights", ("kernels",),
     kernel_rows),
    ("text | vocabulary | tokens per character | bits per byte, flat | tokens, to GPT-2's", ("fertility",),
     fertility_rows),
    ("weights of 63 M | val loss | nats to dense | % | bytes", ("quantize",), quantized_rows),
    ("arithmetic, not a measurement | MB a token | this CPU, tokens/s | RTX 3090 | RTX 4090 | H100 "
     "| what it may lose, nats", ("scaling",), paper_rows),
    ("a decode step on a card | forward's ops a layer | outside | kernels a layer | outside", ("launches",),
     launch_rows),
    ("arithmetic, not a measurement: bytes at 4 TB/s, 3 us a launch | predicted", ("launches",),
     predicted_rows),
    ("injected | held | seconds", ("faults",), fault_rows),
    ("the suite on | passed | skipped | failed | minutes", ("suite",), suite_rows),
    (f"bits per byte | bytes | {' | '.join(ARCHIVERS)} | s, there and back", ("compress",), compression_rows),
)

# what may stand between the marks of a page, by the name in the first one
BLOCKS = {"all": results_table} | {f"{part}{language}": partial(make, words)
                                   for part, make in (("opening", pages.opening), ("table", pages.main_table),
                                                      ("brief", pages.brief_table),
                                                      ("lighter", pages.lighter),
                                                      ("first", pages.first_minute))
                                   for language, words in pages.LANGUAGES.items()}
BLOCKS |= {name: partial(mechanism, page) for name, page in pages.MECHANISMS.items()}
BLOCKS |= {"longer": pages.longer_table, "steps": pages.step_table}
BLOCKS["reliability"] = partial(mechanism, pages.Page((), {"faults_cpu.json": ".*"}))
BLOCKS |= {f"versions{language}": partial(tested, sentence) for language, sentence in TESTED.items()}
BLOCKS["scaling"] = partial(mechanism, pages.Page((), {"scaling_paper.json": ".*"}))
BLOCKS |= {name: partial(pages.first_minute, pages.LANGUAGES[""], name=record) for name, record in (
    ("pretrained", "compare_smollm2_cpu.json"), ("pretrained_epyc", "compare_smollm2_epyc_cpu.json"))}
BLOCKS["decides"] = partial(decisive, ("sparsify_63m_cpu.json", "sparsify_63m_2_cpu.json"))
BLOCKS["launches"] = partial(mechanism, pages.Page((), {"launches_paper.json": ".*"}))
BLOCKS["retrofits"] = partial(mechanism, pages.Page((), {name: ".*" for name in (
    pages.RETROFITS, pages.OTHER_RETROFITS, "retrofit_pylib_shorter_cpu.json",
    "retrofit_pylib_longer_cpu.json")}))
BLOCKS["suite"] = partial(mechanism, pages.Page((), {"suite_cpu.json": ".*"}))
