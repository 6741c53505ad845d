"""Draw what runs have logged and learnt.

    python bench.py plot out-pylib                                      one run
    python bench.py plot out-a out-b out-c --out=plots                  several, on the same axes

From metrics.jsonl of each run: the losses against steps, tokens, seconds and multiply-adds, and what its
sparse layers did. From its checkpoint: how open its gates are, and the frequencies of oscillating units.
Every figure is a PNG and an SVG; what no run has is left out, and said.
"""
import functools
import glob
import json
import math
import os
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, zip_longest
from pathlib import Path

import numpy as np
import torch

from bio_modules import BranchGate, ColumnGate, EventGate, ExpertGate, Oscillating
from configurator import ConfigError, configure, require
from data import dataset as datasets
from model import build_model
from training import checkpoint as ckpt
from viz.figures import drawing, pyplot

USAGE = "type python bench.py plot out-pylib, for example; --help lists the keys"


@dataclass(frozen=True)
class Plots:
    """Draw the runs whose folders are named: losses, sparsity, gates, frequencies."""
    out: str = "out-plots"  # folder that the figures are written into
    smooth: float = 0.08  # the training loss is the mean over this share of its rows; 0: as it was logged
    tokens: int = 1024  # tokens of the validation data that gates are looked at with

    def __post_init__(self):
        require(0 <= self.smooth < 1, f"smooth={self.smooth} must be in [0, 1): a share of the rows")
        require(self.tokens >= 1, f"tokens={self.tokens} must be at least 1")


class Lacks(Exception):
    """Why a run is not in a figure, for a sentence that begins with its name."""


# ------------------------------------------------------------------------------------------------------------
# runs

class Run:
    """What one folder holds. rows: of metrics.jsonl, with the multiply-adds spent before each as "macs";
    found: {figure: what it draws of this run, or Lacks}. The weights are not kept."""

    def __init__(self, name, folder, cfg):
        self.name, self.rows, self.model, self.settings = name, read_rows(folder), None, {}
        try:
            loaded, path = ckpt.read(folder)
            self.model, self.settings = build_model(loaded, path).eval(), loaded.get("config", {})
            add_multiply_adds(self.rows, self.model)
        except ConfigError as error:
            self.why = f"it has no weights to look at: {error}"
        self.found = {figure: self.look(find, cfg) for figure, (find, _) in FIGURES.items()}
        self.model = None

    def look(self, find, cfg):
        try:
            return find(self, cfg)
        except Lacks as reason:
            return reason

    def weights(self):
        if self.model is None:
            raise Lacks(self.why)
        return self.model


def read_rows(folder):
    """The rows of a run's metrics.jsonl, [dict]. A last line that a crash has torn does not count."""
    path = Path(folder) / "metrics.jsonl"
    require(os.path.isfile(path), f"{folder} holds no metrics.jsonl: name the out_dir of a run of train.py")
    *lines, last = [line for line in path.read_bytes().splitlines() if line.strip()] or [b""]
    rows = [row_of(line) for line in lines]
    bad = next((number for number, row in enumerate(rows, 1) if row is None), None)
    require(bad is None, f"{path}: row {bad} is not one of train.py's: only the last one may be torn")
    rows += [row_of(last)] if row_of(last) else []
    require(len(rows) >= 2, f"{path} has {len(rows)} row{'s' * (len(rows) != 1)}, and a curve needs two: let "
                            "the run go on, or leave it out")
    return rows


def row_of(line):
    """One row as a dict, None where it is none."""
    try:
        row = json.loads(line)
        return row if is_number(row["iter"]) and is_number(row["tokens"]) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def add_multiply_adds(rows, model):
    """Give each row "macs": what training has multiplied before it, forward and backward, in the layers that
    were in use. Between two rows these count as they are in the first of them."""
    @functools.cache
    def a_token(layers):
        model.use_layers(layers)
        return model.flops_per_token() / 2

    spent, every = 0.0, model.config.n_layer
    for row, after in pairwise([*rows, rows[-1]]):
        row["macs"] = spent
        spent += a_token(row.get("layers", every)) * (after["tokens"] - row["tokens"])
    model.use_layers(every)


def names_of(folders):
    """The shortest ends of paths that tell the folders apart."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return folders


# ------------------------------------------------------------------------------------------------------------
# what a run shows

AXES = {"steps": ("iter", "iterations"), "tokens": ("tokens", "tokens"), "seconds": ("seconds", "seconds"),
        "macs": ("macs", "multiply-adds, forward and backward")}
LOSSES = {"loss": "training loss, with what mechanisms add", "val_loss": "validation loss"}


def losses(axis, run, cfg):
    """-> {loss: (x, y)}, arrays of the rows that have both numbers."""
    key, _ = AXES[axis]
    if key == "macs":
        run.weights()
    curves = {loss: series(run.rows, key, loss) for loss in LOSSES}
    if not any(len(x) for x, _ in curves.values()):
        raise Lacks("its log has no losses there")
    return curves


def series(rows, x, y):
    pairs = [(row[x], row[y]) for row in rows if is_number(row.get(x)) and is_number(row.get(y))]
    return tuple(np.array(pairs, dtype=float).reshape(-1, 2).T)


def smoothed(values, share):
    """Each value's mean with the neighbours in a window of this share of all: smaller at the steep beginning,
    cut off at the end."""
    at = np.arange(len(values))
    reach = np.minimum(int(share * len(values) / 2), at)
    first, behind = at - reach, np.minimum(at + reach + 1, len(values))
    sums = np.concatenate(([0.0], np.cumsum(values)))
    return (sums[behind] - sums[first]) / (behind - first)


# of what counters.counters knows; bytes go with the multiply-adds
ALWAYS = {"zeros": "zeros into W_down, share of units", "active_groups": "columns or experts open, a token",
          "open_branches": "branches open, a token", "recall": "energy of the predicted units, share"}
WHERE_THEY_DIFFER = {"dead_units": "units silent for all tokens", "dead_groups": "columns or experts idle",
                     "dead_branches": "branches shut for all tokens",
                     "mlp_macs": "multiply-adds of the MLP, a decode step",
                     "attn_macs": "multiply-adds of attention, a decode step"}
COUNTERS = ALWAYS | WHERE_THEY_DIFFER


def sparsity(run, cfg):
    """-> {counter: (iterations (n,), values (n, layers), nan where a layer has none)}."""
    rows = [row for row in run.rows if row.get("by_layer")]
    found = {counter: grid(rows, counter) for counter in COUNTERS}
    found = {counter: (at, values) for counter, (at, values) in found.items() if np.isfinite(values).any()}
    if not found:
        raise Lacks("its log has no counters of layers that can be silent")
    return found


def grid(rows, counter):
    rows = [row for row in rows if row["by_layer"].get(counter)]
    values = np.array([row["by_layer"][counter] for row in rows], dtype=float)
    return np.array([row["iter"] for row in rows]), values.reshape(len(rows), -1 if rows else 0)


@dataclass
class Gates:
    """How open the gates of one kind are. by_layer: {layer: values (n,)}; aim: what a flag asks for, or None.
    """
    by_layer: dict
    aim: float | None = None


THRESHOLDS, PROBES = "thresholds of event gates", "how sure exit probes are"
OPENED = {BranchGate: "branches of dendrites: share of tokens that open each",
          ColumnGate: "columns: share of tokens that open each",
          ExpertGate: "experts: share of tokens that visit each"}


def gates(run, cfg):
    """-> {kind: Gates}. Thresholds are in the weights; how often the others open is seen on validation data.
    """
    model = run.weights()
    found = defaultdict(lambda: Gates({}))
    for layer, module in of_kind(model, EventGate):
        found[THRESHOLDS].by_layer[layer] = (module.GAIN * module.threshold).exp().detach().numpy()
    if model.config.exits or any(of_kind(model, *OPENED)):
        watch_opening(model, validation(run, cfg), found)
    if not found:
        raise Lacks("it has no gates")
    return dict(found)


def of_kind(model, *kinds):
    """(layer, module) of all modules in the blocks that are of a kind."""
    return [(layer, module) for layer, block in enumerate(model.transformer.h) for module in block.modules()
            if isinstance(module, kinds)]


def validation(run, cfg):
    """About cfg.tokens ids (rows, T) of the validation data that the run names."""
    config = run.model.config
    T = min(config.block_size, cfg.tokens)
    name = run.settings.get("tasks") or run.settings.get("dataset", "")
    try:
        sources = [(datasets.find(part), weight) for part, weight in datasets.named(name)]
        stream = datasets.open_stream(sources, "val", T, max(1, cfg.tokens // T), seed=0,
                                      vocab_size=config.vocab_size)
        return stream.batch(0)[0]
    except (ConfigError, OSError) as error:
        raise Lacks(f"how open its gates are takes its data: {error}") from error


@torch.inference_mode()
def watch_opening(model, idx, found):
    """Run the model on ids (B, T) and write the share of tokens that open each part of its gates, and how
    sure each exit's probe is of each token, into `found`."""
    def see_gate(layer, kind, module, args, opened):
        kind = found[OPENED[kind]]
        kind.by_layer[layer] = (opened > 0).float().flatten(0, -2).mean(dim=0).numpy()
        kind.aim = module.k / opened.size(-1)

    def see_probe(depth, module, args, logits):
        found[PROBES].by_layer[depth - 1] = logits.float().sigmoid().flatten().numpy()

    hooks = [module.register_forward_hook(partial(see_gate, layer, type(module)))
             for layer, module in of_kind(model, *OPENED)]
    if model.config.exits:
        exits = model.transformer.exits
        found[PROBES].aim = model.config.exit_threshold
        model.choose(leave_at=1.0)               # asked, never obeyed
        hooks += [probe.register_forward_hook(partial(see_probe, depth))
                  for depth, probe in zip(exits.after, exits.probes)]
    model(idx)
    for hook in hooks:
        hook.remove()


def frequencies(run, cfg):
    """-> {parameter: {layer: values (units,)}} of oscillating units."""
    units = of_kind(run.weights(), Oscillating)
    if not units:
        raise Lacks("its units do not oscillate (act='osc')")
    return {name: {layer: getattr(module, name).detach().numpy() for layer, module in units}
            for name in Oscillating.BEGIN}


# ------------------------------------------------------------------------------------------------------------
# figures: each draws {name of a run: what was found of it}

MOST_POINTS = 2000                              # of a curve: more is not seen, and makes an SVG slow
STROKES = "-", "--", ":", "-."
BAND, FAINT, PALE = 0.10, 0.25, "0.82"


def colours(names):
    """{name: colour and stroke}, different ones for the first forty."""
    return {name: dict(color=f"C{i % 10}", ls=STROKES[i // 10 % len(STROKES)])
            for i, name in enumerate(names)}


def plain(name):
    """A name as matplotlib shows it letter by letter: it reads $ as mathematics and hides a first _."""
    name = name if len(name) <= 44 else "..." + name[-42:]
    return (" " * name.startswith("_") + name).replace("$", r"\$")


def legend(axes, lines, notes=()):
    """Right of all axes a line of each run, {name: line}, behind the notes; a single run is named above."""
    figure = axes.flat[0].figure
    if len(lines) == 1:
        return figure.suptitle(plain(*lines), fontsize=10)
    labels = [" ".join(words) for words in zip_longest(notes, map(plain, lines), fillvalue="")]
    figure.legend(lines.values(), labels, loc="upper right", frameon=False, fontsize=8, handlelength=3)


def dress(axis, title, xlabel, **more):
    """What all axes have in common: large numbers as 20k, 3M, 1.5T, whole numbers of layers."""
    from matplotlib.ticker import EngFormatter, MaxNLocator
    axis.set(xlabel=xlabel, **more)
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=FAINT)
    if xlabel == "layer":
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def draw_losses(paths, axis, found, looks, cfg):
    """Training losses, smoothed and as they were, beside validation losses, on logarithmic scales."""
    from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter
    ends, lines = {name: last_of(found[name]) for name in found}, {}
    with drawing(paths, columns=2, size=(10, 4.6)) as axes:
        for name in sorted(ends, key=ends.get):
            (x, y), (at, values) = (found[name][loss] for loss in LOSSES)
            raw = FAINT / len(found) ** 0.5 * bool(cfg.smooth)
            axes[0].plot(*thinned(x, y), color=looks[name]["color"], lw=0.6, alpha=raw)
            axes[0].plot(*thinned(x, smoothed(y, cfg.smooth)), lw=1.3, **looks[name])
            lines[name], = axes[1].plot(at, values, lw=1.3, marker="o", ms=2.5, **looks[name])
        for panel, title in zip(axes, LOSSES.values()):
            dress(panel, title, AXES[axis][1], yscale="log", ylabel="nats")
            panel.yaxis.set_major_locator(MaxNLocator(9))
            panel.yaxis.set_minor_locator(NullLocator())
            panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        legend(axes, lines, [f"{end:.3f} " for end in sorted(ends.values())])


def last_of(curves):
    """The last validation loss, or the last training loss where there is none."""
    return next((y[-1] for _, y in reversed(curves.values()) if len(y)), math.inf)


def thinned(x, y):
    every = max(1, math.ceil(len(x) / MOST_POINTS))
    return x[::every], y[::every]


def draw_sparsity(paths, found, looks, cfg):
    """Layers by iterations for one run; for several the mean of their layers, and the layers at the end."""
    counters = [counter for counter in COUNTERS if differs(counter, found) or
                (counter in ALWAYS and any(counter in grids for grids in found.values()))]
    if len(found) == 1:
        draw_heat(paths, counters, *found.items())
    else:
        draw_profiles(paths, counters, found, looks)


def differs(counter, found):
    """Is there more than one value of a counter, in all runs together?"""
    values = [np.nan_to_num(grids[counter][1]).ravel() for grids in found.values() if counter in grids]
    return bool(values) and len(np.unique(np.concatenate(values))) > 1


def draw_heat(paths, counters, run):
    name, grids = run
    columns, layers = min(2, len(counters)), max(values.shape[1] for _, values in grids.values())
    rows = -(-len(counters) // columns)
    height = rows * (1.2 + 0.2 * min(24, max(4, layers))) + 0.4
    with drawing(paths, columns, (5.4 * columns, height), rows=rows, squeeze=False) as axes:
        for axis, counter in zip(axes.flat, counters):
            heat(axis, COUNTERS[counter], *grids[counter])
        for axis in axes.flat[len(counters):]:
            axis.set_axis_off()
        legend(axes, {name: None})


def heat(axis, title, at, values):
    """One map: a column each evaluation, a row each layer, the first one below."""
    from matplotlib.ticker import MaxNLocator
    low, high = np.nanmin(values), np.nanmax(values)
    even = max(1e-9, 0.05 * abs(high)) * (high - low <= 1e-3 * abs(high))    # a colour bar has a range
    image = axis.imshow(values.T, aspect="auto", origin="lower", interpolation="nearest", vmin=low - even,
                        vmax=high + even)
    axis.figure.colorbar(image, ax=axis, pad=0.02)
    axis.set(xlabel="iterations", ylabel="layer")
    axis.set_title(title, fontsize=9)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    shown = range(0, len(at), -(-len(at) // 7))
    axis.set_xticks(shown, [f"{at[i]:,}" for i in shown])


def draw_profiles(paths, counters, found, looks):
    lines, size = {}, (10, 2.6 * len(counters) + 0.3)
    with drawing(paths, 2, size, rows=len(counters), squeeze=False, sharey="row") as axes:
        for (over_time, at_the_end), counter in zip(axes, counters):
            for name in [name for name in found if counter in found[name]]:
                at, values = found[name][counter]
                over_time.plot(at, np.nanmean(values, axis=1), lw=1.2, marker="o", ms=2, **looks[name])
                lines[name], = at_the_end.plot(values[-1], lw=1.2, marker="o", ms=3, **looks[name])
            dress(over_time, f"{COUNTERS[counter]}: mean of layers", "iterations")
            dress(at_the_end, "the same by layer, at the end", "layer")
        legend(axes, lines)


def draw_gates(paths, found, looks, cfg):
    """One kind of gates beside the other, by layer: boxes for one run, medians and 5% to 95% for several."""
    kinds = list(dict.fromkeys(kind for gates in found.values() for kind in gates))
    lines, draw = {}, draw_boxes if len(found) == 1 else draw_medians
    with drawing(paths, len(kinds), (4.8 * len(kinds), 4.2), squeeze=False) as axes:
        for axis, kind in zip(axes[0], kinds):
            having = [name for name in found if kind in found[name]]
            for name in having:
                lines[name] = draw(axis, found[name][kind], looks[name], min(BAND, 0.4 / len(having)))
            dress(axis, kind, "layer", **{} if kind == THRESHOLDS else dict(ylim=(-0.03, 1.03)))
        legend(axes, lines)


def draw_boxes(axis, gates, look, pale):
    layers = sorted(gates.by_layer)
    axis.boxplot([gates.by_layer[layer] for layer in layers], positions=layers, widths=0.5, whis=(5, 95),
                 flierprops=dict(marker=".", ms=2, alpha=FAINT), manage_ticks=False)
    if gates.aim is not None:
        axis.axhline(gates.aim, color=look["color"], lw=1, ls="--")


def draw_medians(axis, gates, look, pale):
    layers = sorted(gates.by_layer)
    low, middle, high = np.transpose([np.quantile(gates.by_layer[layer], (0.05, 0.5, 0.95))
                                      for layer in layers])
    axis.fill_between(layers, low, high, color=look["color"], alpha=pale, lw=0)
    return axis.plot(layers, middle, marker="o", ms=3, lw=1.3, **look)[0]


SYMBOLS, MOST_LAYERS = {"w": "frequency w", "phi": "phase phi"}, 12


def draw_frequencies(paths, found, looks, cfg):
    """Histograms of w and phi, a row each layer (of many layers some), before them what they began as."""
    every = sorted({layer for parameters in found.values() for layer in parameters["w"]})
    layers = [every[i] for i in np.unique(np.linspace(0, len(every) - 1, MOST_LAYERS).round().astype(int))]
    lines, size = {}, (9, 1.2 * len(layers) + 1.0)
    with drawing(paths, 2, size, rows=len(layers), squeeze=False, sharex="col", sharey="col") as axes:
        for column, (name, (mean, deviation)) in zip(axes.T, Oscillating.BEGIN.items()):
            values = np.concatenate([v for run in found.values() for v in run[name].values()])
            bins = np.linspace(min(values.min(), mean - 3.5 * deviation),
                               max(values.max(), mean + 3.5 * deviation), 60)
            bell = np.exp(-((bins - mean) / deviation) ** 2 / 2) / (deviation * math.sqrt(2 * math.pi))
            for axis, layer in zip(column, reversed(layers)):
                axis.fill_between(bins, bell, color=PALE, lw=0)
                for run in [run for run in found if layer in found[run][name]]:
                    counts, _ = np.histogram(found[run][name][layer], bins, density=True)
                    lines[run] = axis.stairs(counts, bins, lw=1.1, **looks[run])
                axis.set_ylabel(f"layer {layer}", fontsize=8)
                axis.set_yticks([])
            column[-1].set_xlabel(f"{SYMBOLS[name]}; grey: at the start, N({mean:g}, {deviation:g})")
        legend(axes, lines)


FIGURES = {f"loss_{axis}": (partial(losses, axis), partial(draw_losses, axis=axis)) for axis in AXES} | {
    "sparsity": (sparsity, draw_sparsity),
    "gates": (gates, draw_gates),
    "frequencies": (frequencies, draw_frequencies),
}

# ------------------------------------------------------------------------------------------------------------
# the command


def folders_of(words):
    """The words that name folders, patterns included where the shell has left them -> existing folders."""
    found = [path for word in words for path in (sorted(glob.glob(word)) if "*" in word else [word])]
    require(found, f"no run's folder is named: {USAGE}")
    for folder in found:
        require(os.path.isdir(folder), f"'{folder}' is not a folder: {USAGE}")
    return list({Path(folder).resolve(): folder for folder in found}.values())


def make_folder(out):
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={out} cannot be made ({error.strerror}): type "
                          "--out=ANOTHER_FOLDER") from error


def report(figure, runs, paths):
    """What was drawn, and of which runs not, in lines for people."""
    missing = {run.name: run.found[figure] for run in runs if isinstance(run.found[figure], Lacks)}
    drawn = len(missing) < len(runs)
    if drawn:
        print("wrote " + ", ".join(map(str, paths)))
    for reason in dict.fromkeys(map(str, missing.values())):
        names = [name for name, why in missing.items() if str(why) == reason]
        print(f"{'  without' if drawn else f'left out {figure}:'} {', '.join(names)}: {reason}")


def main(words):
    keys = [word for word in words if word.startswith("-")]
    cfg, folders = configure(Plots, keys), folders_of([word for word in words if word not in keys])
    pyplot()                                     # better missed now than behind twenty checkpoints
    runs = [Run(name, folder, cfg) for name, folder in zip(names_of(folders), folders)]
    looks = colours([run.name for run in runs])
    make_folder(cfg.out)
    for figure, (_, draw) in FIGURES.items():
        found = {run.name: run.found[figure] for run in runs if not isinstance(run.found[figure], Lacks)}
        paths = [Path(cfg.out, f"{figure}.{ending}") for ending in ("png", "svg")]
        if found:
            draw(paths, found=found, looks=looks, cfg=cfg)
        report(figure, runs, paths)

