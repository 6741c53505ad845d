"""What `compare` found, for people: the cells of its table, one sentence, one picture."""
import importlib.util
import io
import math

from viz.figures import drawing, name_points

HEAD = ("run", "loss, nats", "to the first (95%, paired)", "%", "bits/byte", "parameters", "MB a token",
        "M multiply-adds", "decode tokens/s (quartiles)", "x the first", "training tokens/s")


def cells(side, first):
    """A row of the table."""
    f, beside = side.found, side is not first
    s, difference = f["decode"], f.get("to_first")
    low, high = s["quartiles"]
    return [side.name, f"{f['loss']:.4f}" if "loss" in f else "",
            signed(difference) if difference and beside else "",
            f"{f['percent']:+.2f}" if difference and beside else "",
            f"{f['bits_per_byte']:.4f}" if f.get("bits_per_byte") else "", f"{f['parameters']:,}",
            f"{f['weight_bytes'] / 1e6:.3g}", f"{f['macs'] / 1e6:.3g}",
            f"{s['median']:,.0f} ({low:,.0f}, {high:,.0f})",
            f"{s['median'] / first.found['decode']['median']:.2f}" if beside else "",
            f"{f['training_tokens_per_second']:,.0f}" if f["training_tokens_per_second"] else ""]


def signed(s):
    return f"{s['mean']:+.4f}" + (" ({:+.4f}, {:+.4f})".format(*s["interval"]) if s["interval"] else "")


def text_table(head, rows):
    """Lines of a table for a terminal; columns that no row has are left out."""
    kept = [n for n in range(len(head)) if any(row[n] for row in rows)]
    lines = [[row[n] for n in kept] for row in (head, *rows)]
    wide = [max(len(row[n]) for row in lines) for n in range(len(kept))]
    return ["  ".join(cell.rjust(width) if n else cell.ljust(width)
                      for n, (cell, width) in enumerate(zip(row, wide))).rstrip() for row in lines]


def about_of(sides, behind, new):
    """The sentence on what the numbers are of: `new` tokens were timed behind so many."""
    told = [side.found for side in sides if "loss" in side.found][:1]
    text = (f"Losses are of {told[0]['held_out_tokens']:,} held-out tokens of {told[0]['data']} in windows "
            f"of {told[0]['block']}, of each model as it decodes. " if told else "")
    repeats = sides[0].found["decode"]["repeats"]
    return (f"{text}Decoding: {new} tokens behind {behind}, batch 1, {repeats} rounds in turns, "
            "medians; MB and multiply-adds are of weights, counted in these steps.")


def verdict(sides):
    """One sentence: what the other run does beside the first; of several, the fastest and the best."""
    first, others = sides[0], sides[1:]
    if not others:
        return (f"{first.name} has nothing to stand beside: name another run, or add --quantize=int8.")
    if len(others) == 1:
        return beside(first, others[0]) + "."
    fastest = fastest_of(sides)
    fast = f"none decodes surely faster than {first.name}" if fastest is first else beside(first, fastest)
    said = [f"Of {len(sides)}, {fast}"]
    judged = [side for side in sides if "to_first" in side.found]
    best = min(judged, key=lambda side: side.found["loss"]) if len(judged) > 1 else fastest
    if best is first:
        said.append(f"no other loss is below {first.name}'s")
    elif best is not fastest:
        said.append(f"{best.name} has the lowest loss: it {beside(first, best).removeprefix(best.name)[1:]}")
    return "; ".join(said) + "."


def fastest_of(sides):
    """Of the sides that decode as fast as the fastest, the one with the lowest loss, where that is known."""
    most = max(sides, key=lambda side: side.found["decode"]["median"])
    alike = [side for side in sides if overlap(side, most) and "to_first" in side.found]
    return min(alike, key=lambda side: side.found["loss"], default=most)


def overlap(one, other):
    """Do the quartiles of two sides' speeds overlap?"""
    a, b = (side.found["decode"]["quartiles"] for side in (one, other))
    return a[0] <= b[1] and b[0] <= a[1]


def beside(first, side):
    """"B decodes 1.4x as fast as A at +0.8% loss, reading 45% of its bytes"."""
    one, other = first.found, side.found
    a, b = one["decode"], other["decode"]
    ratio, share = b["median"] / a["median"], other["weight_bytes"] / one["weight_bytes"]
    speed = f"as fast as {first.name}" if overlap(first, side) else f"{ratio:.2f}x as fast as {first.name}"
    size = f"{share:.0%} of its bytes" if share < 2 else f"{share:.1f}x its bytes"
    return f"{side.name} decodes {speed} {loss_words(other)}, reading {size}"


def loss_words(found):
    """What a side's loss is beside the first one's, or its bits a byte where only these compare."""
    if "to_first" in found:
        change, of, what = found["percent"], found["to_first"], "loss"
    elif "bits_to_first" in found:
        change, of, what = found["bits_to_first"]["percent"], found["bits_to_first"], "bits a byte"
    else:
        return "(their losses do not compare)"
    if abs(change) < 0.005:                      # of a percent
        return f"at the same {what}"
    low, high = of["interval"] or (-math.inf, math.inf)
    return f"at {percent(change)} {what}" + " (its 95% interval includes no change)" * (low <= 0 <= high)


def percent(value):
    return f"{value:+.1f}%" if abs(value) >= 0.1 else f"{value:+.2f}%"


# -------------------------------------------------- the picture ---------------------------------------------

PICTURE = "Loss against decode time"


def drawn(cfg, sides):
    """The picture as PNG, also in the file that cfg.plot names -> (its bytes or None, why there is none)."""
    if not cfg.plot and not cfg.html:
        return None, ""
    shown = [side for side in sides if "to_first" in side.found]
    if not shown:
        return None, "no picture: it needs losses that compare"
    if importlib.util.find_spec("matplotlib") is None:
        return None, "no picture: figures need matplotlib: pip install matplotlib"
    png = io.BytesIO()
    with drawing([png, *[cfg.plot] * bool(cfg.plot)], size=(7, 4.5)) as axis:
        for side in shown:
            draw_point(axis, side)
        axis.set(xlabel="ms a decoded token, batch 1", ylabel="held-out loss, nats")
        axis.set_title("bars: quartiles of the time; 95% of the loss's difference to the first", fontsize=8)
        axis.margins(0.2)
        name_points(axis, [(s.name, 1e3 / s.found["decode"]["median"], s.found["loss"]) for s in shown])
    return png.getvalue(), ""


def draw_point(axis, side):
    f, (low, high) = side.found, side.found["decode"]["quartiles"]
    x, y, interval = 1e3 / f["decode"]["median"], f["loss"], f["to_first"]["interval"]
    half = (interval[1] - interval[0]) / 2 if interval else 0
    axis.errorbar([x], [y], yerr=half, xerr=[[x - 1e3 / high], [1e3 / low - x]], fmt="o", markersize=5,
                  capsize=2, elinewidth=0.8)
