"""What `table` found, for people: markdown, plots, and one HTML file that opens without a network.

    python -m benchmarks.report results/table_cpu.json

writes them anew, beside a record that is there.
"""
import base64
import html
import json
import sys
from pathlib import Path

from benchmarks import ROOT, stats
from benchmarks.frontier import frontier
from benchmarks.record import PEER, TWIN, read, write_atomically
from configurator import require, run_script
from viz.figures import drawing, name_points

SHOWN = ("decode time", "decode bytes", "training time")
UNITS = {"decode time": "ms a decoded token, batch 1", "decode bytes": "MB of weights read a decoded token",
         "training time": "seconds of training steps"}
SCALES = {"decode time": 1e3, "decode bytes": 1e-6, "training time": 1.0}
SHAPE_RECORD = ROOT / "results" / "decode_gpt2_cpu.json"


# -------------------------------------------------- cells and tables ---------------------------------------

def signed(s):
    """A mean over seeds with its 95% interval, signs written."""
    if s is None:
        return ""
    return f"{s['mean']:+.4f}" + ("" if not s["interval"] else " ({:+.4f} to {:+.4f})".format(*s["interval"]))


def plain(s):
    return f"{s['mean']:.4f}" + ("" if not s["interval"] else " ({:.4f} to {:.4f})".format(*s["interval"]))


def speed(row, key, twin):
    """Tokens/s, and times the dense twin's of the same rounds."""
    s = row["speed"][key]
    return f"{s['median']:,.0f} ({s['median'] / twin['speed'][key]['median']:.2f}x)" if s else ""


def pays(name, row, axes):
    """On which axes an arm lies beyond the dense frontier, by how much; or that it does on none."""
    if row["kind"] == "dense":
        return "is the rival" if row["share"] == 1 else ""
    if row["sees_the_future"]:
        return "no: it sees the future, its loss means nothing"
    won = [f"{axis} {signed(axes[axis]['to_frontier'][name]['gain'])}" for axis in SHOWN
           if axes[axis]["to_frontier"].get(name, {}).get("pays")]
    slow = row["speed"]["decode, batch 1"]["quartiles"][1] < row["slowest_as_fast"]
    return (", ".join(won) or "no") + "; decodes slower than dense" * slow


# -------------------------------------------------- which rows, which tests ---------------------------------

def rows_once(result):
    """The rows of a table without those of an arm that is the model of another one: it counts once."""
    return {name: row for name, row in result["rows"].items() if name not in result.get("same_as", {})}


def same_said(result):
    """Sentences: which arms are one model; where a record timed it twice, how far timing alone goes."""
    for name, first in result.get("same_as", {}).items():
        said = f"{name} is the same model as {first}, flag by flag: it has no row of its own and counts once."
        rates = [result["rows"][arm]["speed"]["decode, batch 1"]["median"] for arm in (first, name)
                 if arm in result["rows"]]
        yield said + (f" This record timed it twice: {rates[0]:,.0f} and {rates[1]:,.0f} tokens/s, "
                      f"{abs(rates[1] / rates[0] - 1):.0%} apart, are the noise of timing."
                      if len(rates) == 2 else "")


def corrected(result):
    """-> ({arm: Holm's p of its difference to its dense twin}, {(arm, axis): Holm's p of its gain}).

    A test of each family is an arm that counts, and an arm that counts on an axis; rivals are no claims.
    """
    arms = {name: row for name, row in rows_once(result).items() if row["kind"] == "arm"}
    losses = {name: row["to_twin"]["p"] for name, row in arms.items() if row["to_twin"]}
    gains = {(name, axis): p_of_gain(result, name, axis) for name in arms for axis in SHOWN}
    return tuple(stats.holm({test: p for test, p in of.items() if p is not None}) for of in (losses, gains))


def p_of_gain(result, name, axis):
    return stats.p_of(result["axes"][axis]["to_frontier"].get(name, {}).get("gain"))


def timing_said(result):
    """The sentence on what the intervals of timed costs hold."""
    rounds = rounds_of(result)
    return (f"Intervals in time hold seeds and the {rounds} rounds of timing, drawn together (bootstrap), by "
            "Student's t." if rounds else "This record keeps no rounds of timing: its intervals in time hold "
            "the seeds alone and are too narrow; the next run of `bench.py table` keeps them.")


def rounds_of(result):
    """Rounds of timing that the intervals of a table's record hold, 0 without any."""
    gains = [found["gain"] for axis in SHOWN for found in result["axes"][axis]["to_frontier"].values()]
    return max((gain.get("rounds", 0) for gain in gains if gain), default=0)


def cells(name, row, result, holm):
    """A row of the main table. holm: corrected(result)'s first."""
    twin, axes = result["rows"][TWIN], result["axes"]
    to_twin, equal = row["to_twin"], axes["equal time"]["to_frontier"].get(name)
    zeros, held = row["counters"].get("zeros"), row.get("held")
    return [name, plain(row["val_loss"]), signed(to_twin),
            f"{to_twin['p']:.2g}" if to_twin and to_twin["p"] is not None else "",
            f"{holm[name]:.2g}" if name in holm else "",
            signed(opposite(equal["gain"])) if equal else "", f"{row['bits_per_byte']:.3f}",
            speed(row, "training step", twin), speed(row, "decode, batch 1", twin),
            speed(row, "decode, batch 8", twin),
            f"{row['weight_bytes'] / 1e6:.2f}" if "macs" in row else "",
            f"{row['macs'] / 1e6:.2f}" if "macs" in row else "",
            f"{sum(held.values()) / 2**20:.2f}" if held else "", f"{row['parameters']:,}",
            f"{zeros:.0%}" if zeros is not None else "",
            f"{row['joules']:.3g}" if row.get("joules") else "n/a" if "macs" in row else "",
            "yes" if row["sees_the_future"] else "no", pays(name, row, axes)]


HEAD = ("arm", "val loss, nats (95%)", "to its dense twin", "p", "p (Holm)", "at its twin's time",
        "bits/byte", "training tokens/s", "decode tokens/s, batch 1", "batch 8", "MB of weights a token",
        "M multiply-adds", "MiB held", "parameters", "zeros into W_down", "J a token", "sees the future",
        "pays: nats beyond the dense frontier in")


def opposite(s):
    """The frontier's gain as a difference of losses, arm less rival."""
    return s and {"mean": -s["mean"], "interval": s["interval"] and [-v for v in reversed(s["interval"])]}


def lines_of(head, rows):
    """A markdown table."""
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head),
            *("| " + " | ".join(row) + " |" for row in rows)]


def main_rows(result):
    """The main table's cells; how fast the slowest quarter of the dense twin's rounds was goes with them."""
    twin = result["rows"][TWIN]["speed"]["decode, batch 1"]["quartiles"][0]
    holm = corrected(result)[0]
    return [cells(name, row | {"slowest_as_fast": twin}, result, holm)
            for name, row in rows_once(result).items()]


def frontier_rows(result):
    """Every arm against the dense frontier on every axis."""
    holm = corrected(result)[1]
    for name, row in rows_once(result).items():
        for axis in SHOWN:
            found = result["axes"][axis]["to_frontier"].get(name)
            if found and found["cheaper"] and not row["sees_the_future"]:
                at_least = "at least " * found["at_least"]
                p = p_of_gain(result, name, axis)
                yield [name, axis, signed(found["gain"]) or "cheaper than every dense model",
                       "" if p is None else f"{p:.2g}",
                       f"{holm[name, axis]:.2g}" if (name, axis) in holm else "",
                       f"{at_least}{found['cheaper']:.2f}x", "yes" if found["pays"] else "no"]


def aim(result):
    """The sentence that answers: which arm decodes how much faster than a dense model of equal loss?"""
    told = []
    for axis in ("decode time", "decode bytes"):
        rows = rows_once(result)
        found = {name: f for name, f in result["axes"][axis]["to_frontier"].items() if name in rows
                 and f["cheaper"] and not rows[name]["sees_the_future"] and rows[name]["kind"] == "arm"}
        if found:
            name = max(found, key=lambda name: found[name]["cheaper"])
            bound = "at least " * found[name]["at_least"]
            told.append(f"{name} with {bound}{found[name]['cheaper']:.2f}x in {axis}")
    return "Furthest from a dense model of equal loss (aim: 2x): " + "; ".join(told) + "." if told else ""


def presets(result):
    """Sentences: what the presets lose in bits per byte and what they save, against the dense twin."""
    rows, twin, same = result["rows"], result["rows"][TWIN], result.get("same_as", {})
    for name in ("efficient", "lossless", "quality"):
        if same.get(name, name) in rows:
            row = rows[same.get(name, name)]
            said = f"config/{name}.py" + f" (the same model as {same.get(name)})" * (name in same)
            more = row["bits_per_byte"] / twin["bits_per_byte"] - 1
            times = {key: row["speed"][key]["median"] / twin["speed"][key]["median"]
                     for key in ("decode, batch 1", "training step")}
            yield (f"{said}: {more:+.2%} bits per byte against its dense twin, "
                   f"{times['decode, batch 1']:.2f}x its decode speed, {times['training step']:.2f}x its "
                   f"training speed, {twin['weight_bytes'] / row['weight_bytes']:.2f}x fewer bytes of weights"
                   " a token.")


def shape_rows(path=SHAPE_RECORD):
    """Decoding at GPT-2's shape, random weights: a record of its own."""
    if not path.is_file():
        return []
    record = read(path)
    decode = record["measurements"]["decode"]
    sides, twins = decode["sides"], decode.get("twins", {})
    peer = sides.get(PEER, {}).get("median")
    ceilings = {name: record["work"][name]["ceiling"] for name in twins}
    return [[name, f"{s['median']:.1f}",
             f"{s['median'] / sides[twins[name]]['median']:.2f}x" if name in twins else "",
             f"{ceilings[name]:.2f}x" if ceilings.get(name) else "",
             f"{s['median'] / peer:.1f}x" if peer else ""] for name, s in sides.items()]


def shape_said(path=SHAPE_RECORD):
    """The sentence above these rows."""
    superseded = "twins" not in read(path)["measurements"]["decode"]
    return ("Another record, decode_gpt2_cpu.json: 124M parameters, random weights, so no loss is known."
            + f" {SUPERSEDED}" * superseded)


SUPERSEDED = ("Superseded: its blocks have squared ReLU and its dense side GELU, so what the blocks are "
              "worth beside a dense twin is not in this record; `python bench.py decode --shape=gpt2 "
              "--blocks=True` makes it anew.")
SHAPE_HEAD = ("124M shape, random weights", "tokens/s", "its dense twin", "ceiling by bytes", "nanoGPT")


def told(result):
    """The report's parts: (title, sentences, head, rows)."""
    missing = [f"Missing: {run}: {why}" for run, why in result["missing"].items()]
    yield ("Arms beside their dense twin", [
        f"{result['tokens']:,} tokens a run ({result['iterations']} iterations), seeds {result['seeds']}; "
        "means with 95% intervals (Student's t); differences are paired by seed, p by the paired t test, "
        f"beside it Holm's correction for the {len(corrected(result)[0])} arms that are tested. "
        "Losses are those of the model as it decodes, shortcuts on. Speeds are medians of interleaved rounds "
        f"({result['place']}), and times the dense twin's. MiB held: weights and the cache of one full "
        "context when decoding, counted. At its twin's time: against the dense twin trained for as many "
        f"seconds of steps as the arm. Joules: {result['energy']}.",
        *same_said(result), *presets(result), *missing],
        HEAD, main_rows(result))
    yield ("Arms and the dense frontier", [
        "The frontier is what plain models of other widths and depths reach, on a straight line over the log "
        "of the cost between two of them; beyond its last model it stays level. Nats: the frontier's loss at "
        "the arm's cost less the arm's, so above zero is beyond it. It pays where the whole interval is; "
        f"p: that it is zero; Holm: corrected for all {len(corrected(result)[1])} tests. "
        f"{timing_said(result)} At this width a decode step is calls more than bytes: decode time says "
        "little of large models.",
        aim(result)], ("arm", "cost", "nats beyond the frontier (95%)", "p", "p (Holm)",
                       "cheaper at equal loss", "pays"),
        list(frontier_rows(result)))
    rows = shape_rows()
    if rows:
        yield "Decoding at GPT-2's shape", [shape_said()], SHAPE_HEAD, rows


def markdown(result):
    lines = []
    for title, said, head, rows in told(result):
        lines += [f"## {title}", "", *[part for line in said if line for part in (line, "")],
                  *lines_of(head, rows), ""]
    return "\n".join(lines)


# -------------------------------------------------- plots --------------------------------------------------

def draw_axis(path, result, axis):
    """Loss against a cost: every model a point, the dense frontier a line; those on it and beyond it have
    names; what sees the future is left out."""
    scale, costs, rows = SCALES[axis], result["axes"][axis]["costs"], result["rows"]
    points = {name: (costs[name] * scale, rows[name]["val_loss"]["mean"]) for name in costs
              if name in rows_once(result) and not rows[name]["sees_the_future"]}
    names = []
    with drawing(path, size=(8, 5)) as axes:
        line = frontier([xy for name, xy in points.items() if rows[name]["kind"] == "dense"])
        axes.plot(*zip(*line), "-", color="black", lw=1, label="the frontier of dense models")
        for name, (x, y) in points.items():
            pays = result["axes"][axis]["to_frontier"].get(name, {}).get("pays", False)
            dense, named = rows[name]["kind"] == "dense", pays or (x, y) in line
            colour = "tab:green" if pays else "black" if dense and named else "tab:gray"
            names += [(name, x, y)] * named
            interval = rows[name]["val_loss"]["interval"]
            axes.plot([x], [y], "o" if dense else "s", color=colour, ms=5 if named else 3)
            if interval:
                axes.vlines(x, *interval, color=colour, lw=0.5, alpha=0.5)
        axes.plot([], [], "s", color="tab:green", ms=5, label="a block, all of its 95% interval beyond it")
        axes.plot([], [], "s", color="tab:gray", ms=3,
                  label="a block that is not; circles: other dense models")
        axes.set(xscale="log", xlabel=UNITS[axis], ylabel="validation loss, nats")
        plain_ticks(axes.xaxis)
        axes.margins(x=0.08)
        axes.legend(frameon=False, fontsize=8)
        name_points(axes, names, 9)


def frontier_names(rows, costs):
    """The names of the dense models on the frontier."""
    points = {name: (costs[name], row["val_loss"]["mean"]) for name, row in rows.items()
              if row["kind"] == "dense" and name in costs}
    line = frontier(list(points.values()))
    return [name for name, point in points.items() if point in line]


def plain_ticks(axis):
    """Numbers as people write them on a logarithmic axis."""
    for set_formatter in (axis.set_major_formatter, axis.set_minor_formatter):
        set_formatter(lambda x, place: f"{x:g}" if f"{x:.0e}"[0] in "1235" else "")


def draw_sparsity(path, result):
    """Of every arm, zeros into W_down where its units are counted, and the multiply-adds that a token costs.
    """
    rows = {name: row for name, row in rows_once(result).items() if "macs" in row}
    most = rows[TWIN]["macs"]
    with drawing(path, columns=2, size=(8, 0.22 * len(rows) + 1.2), sharey=True) as axes:
        zeros = [row["counters"].get("zeros") for row in rows.values()]
        axes[0].barh(list(rows), [share or 0 for share in zeros], color="tab:blue")
        for place, share in enumerate(zeros):
            if not share:                        # an empty row would not say which of the two it is
                axes[0].text(0.01, place, "not counted" if share is None else "none", va="center", fontsize=7)
        axes[1].barh(list(rows), [row["macs"] / most for row in rows.values()], color="tab:orange")
        axes[0].set(xlabel="share of zeros into W_down", xlim=(0, 1))
        axes[1].set(xlabel="multiply-adds a token, dense is 1")
        axes[0].set_ylim(len(rows) - 0.4, -0.6)
        for axis in axes:
            axis.tick_params(labelsize=7)


# -------------------------------------------------- files --------------------------------------------------

def write(out, result, where):
    """Beside the record `out`: .md, .html with the plots inside, and the plots as PNG."""
    pictures = {}
    for axis in SHOWN:
        pictures[f"Loss against {axis}"] = path = beside(out, axis)
        draw_axis(path, result, axis)
    pictures["Sparsity"] = path = beside(out, "sparsity")
    draw_sparsity(path, result)
    write_atomically(out.with_suffix(".md"), markdown(result))
    write_atomically(out.with_suffix(".html"), page(result, where, pictures))


def beside(out, name):
    return out.with_name(f"{out.stem}_{name.replace(' ', '_')}.png")


BRIEF = ("arm", "val loss, nats (95%)", "to its dense twin", "training tokens/s", "decode tokens/s, batch 1",
         "MB of weights a token", "pays: nats beyond the dense frontier in")


def brief(result):
    """The page's first table: BRIEF's seven columns of HEAD; arms that are broken on purpose come last."""
    at = [HEAD.index(column) for column in BRIEF]
    rows = [[row[i] for i in at] for row in main_rows(result)]
    return sorted(rows, key=lambda row: result["rows"][row[0]]["kind"] == "broken")


def page(result, where, pictures):
    """One HTML file; pictures: {title: PNG}, written into it. The figures come first, then seven columns of
    the table, then everything."""
    broken = [name for name, row in result["rows"].items() if row["kind"] == "broken"]
    parts = [(title, said, head, sorted(rows, key=lambda row: row[0] in broken))
             for title, said, head, rows in told(result)]
    said = [f"Broken on purpose, to be told apart: {', '.join(broken)}."] * bool(broken)
    parts.insert(0, ("Which arm pays", said, BRIEF, brief(result)))
    return document("every arm beside its dense twin", where, parts,
                    {title: Path(path).read_bytes() for title, path in pictures.items()})


def machine(where):
    """The sentence of the hardware and versions that a page's numbers belong to."""
    on = where.get("gpu") or where.get("cpu") or "an unknown machine"
    more = [f"{where[key]} {key[:-1] if where[key] == 1 else key}" for key in ("cores", "threads")
            if where.get(key)]
    more += [f"{name} {where[name.lower()]}" for name in ("torch", "Python") if where.get(name.lower())]
    said = f"Measured on {', '.join([on, *more])}"
    rest = {key: value for key, value in where.items()
            if value and key not in ("gpu", "cpu", "cores", "threads", "torch", "python")}
    return said + "".join(f"; {plainly(key, value)}" for key, value in rest.items()) + "."


def plainly(key, value):
    """A fact of a record in words: versions by name, others behind their key."""
    if key == "versions":
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return f"{key} {value if isinstance(value, str) else json.dumps(value)}"


def document(name, where, parts, pictures, verdict=""):
    """One HTML file that needs no other: parts as `told` gives them; pictures: {title: PNG's bytes}, which
    come first, behind the verdict. A click on a head sorts its table."""
    body = [f'<p class="verdict">{html.escape(verdict)}</p>'] * bool(verdict)
    body.append(f"<p>{html.escape(machine(where))}</p>")
    for title, content in pictures.items():
        data = base64.b64encode(content).decode()
        body += [f"<h2>{html.escape(title)}</h2>",
                 f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">']
    for title, said, head, rows in parts:
        body += [f"<h2>{html.escape(title)}</h2>", *(f"<p>{html.escape(line)}</p>" for line in said if line),
                 "<div><table>", f"<thead>{row_of('th', head)}</thead><tbody>",
                 *(row_of("td", row, head) for row in rows), "</tbody></table></div>"]
    return PAGE.format(name=html.escape(name), body="\n".join(body), script=SORT)


def row_of(tag, values, head=()):
    """A table's row; the cell below a head that begins with `pays` has its verdict's colour."""
    def cell(n, value):
        mark = verdict_of(value) if n < len(head) and head[n].startswith("pays") else ""
        return f"<{tag}{f' class={mark}' * bool(mark)}>{html.escape(str(value))}</{tag}>"
    return "<tr>" + "".join(cell(n, value) for n, value in enumerate(values)) + "</tr>"


def verdict_of(said):
    """The class of a verdict's colour: it pays, it does not, or it is neither: a rival, an empty cell."""
    if not said or said.startswith("is the rival"):
        return ""
    return "no" if said.startswith("no") else "yes"


SORT = """
for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const n = [...head.parentNode.children].indexOf(head), body = head.closest("table").tBodies[0];
  const text = row => row.children[n].textContent;
  const number = row => +(text(row).replace(/,/g, "").match(/-?\\d+(\\.\\d+)?/) || [NaN])[0];
  const down = head.dataset.down = head.dataset.down === "1" ? "" : "1";
  const rows = [...body.rows], numbers = n && rows.some(row => !isNaN(number(row)));
  rows.sort((a, b) => { const [x, y] = numbers ? [number(a), number(b)] : [text(a), text(b)];
    if (numbers && (isNaN(x) || isNaN(y))) return isNaN(x) - isNaN(y);            // empty cells stay below
    return (x < y ? -1 : x > y ? 1 : 0) * (down ? 1 : -1); });
  body.append(...rows);
};
"""


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>nanoCortex: {name}</title>
<style>
body {{ font: 14px/1.4 sans-serif; margin: 2em; max-width: 110em }}
div {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: 12px }}
td, th {{ border: 1px solid #ccc; padding: 2px 6px; text-align: right; white-space: nowrap }}
td:first-child, th:first-child {{ text-align: left }}
img {{ max-width: 100% }}
p.verdict {{ font-weight: bold }}
th {{ cursor: pointer }}
td.yes {{ background: #d9f2d9 }}
td.no {{ background: #f7dcdc }}
</style></head><body>
<h1>nanoCortex: {name}</h1>
{body}
<script>{script}</script>
</body></html>
"""


def main(words):
    if words in (["--help"], ["-h"]):
        print("python -m benchmarks.report RECORD.json: the pages and plots of a record of bench.py table")
        return
    require(len(words) == 1 and words[0].endswith(".json"), f"{' '.join(words) or 'no word'}: name one "
            "record of bench.py table: type python -m benchmarks.report results/table_cpu.json")
    record = read(words[0])
    require("axes" in record, f"{words[0]} is no record of bench.py table: type results/table_cpu.json")
    write(Path(words[0]), record, record["hardware"])
    print(f"written: {Path(words[0]).with_suffix('.html')}, .md and the plots beside it")


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
