"""Growing up beside full depth from the start."""
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks import Recipe
from benchmarks.record import mean_of
from benchmarks.runs import (
    QUALITY_VALIDATION,
    fixed_loss,
    losses_of,
    seeds,
    trained_model,
    trained_with,
    validation_of,
)
from data import dataset as datasets
from viz.figures import drawing


@dataclass(frozen=True)
class Grow(Recipe):
    """A model that grows up beside one of full depth from the start: loss against time and against FLOPs."""
    repeats: int = 3  # seeds of each
    threads: int = 2  # CPU threads of a run
    layers: int = 6  # layers in the end
    grow: str = "2:0.25,4:0.25"  # stages of the one that grows, LAYERS:SHARE by commas
    plot: str = ""  # also draw loss against seconds and against FLOPs into this PNG (needs matplotlib)


FROM_THE_START, GROWN, GROWN_LONGER = "full depth", "grown", "grown, equal time"


def grow(cfg):
    data = datasets.prepare_if_missing("pylib").resolve()
    runs = {FROM_THE_START: [], GROWN: [], GROWN_LONGER: []}
    with tempfile.TemporaryDirectory() as work:
        for seed in range(cfg.repeats):
            [(growing, plain)] = beside_twins(cfg)
            full = grown_run(cfg, data, Path(work) / f"{seed}a", plain, seed, cfg.iters)
            grown = grown_run(cfg, data, Path(work) / f"{seed}b", growing, seed, cfg.iters)
            iters = round(grown["iters"] * full["step_seconds"] / grown["step_seconds"])
            longer = grown_run(cfg, data, Path(work) / f"{seed}c", growing, seed, iters)
            for name, run in zip(runs, (full, grown, longer)):
                runs[name].append(run)
    losses = losses_of(runs)
    print("val loss, mean of seeds (least to most); seconds of training steps; TFLOP; iterations")
    for name, found in runs.items():
        print(f"  {name:20}{mean_of(losses['sides'][name])}  "
              f"{statistics.median(run['step_seconds'] for run in found):6.1f} s  "
              f"{found[0]['curve'][-1][2] / 1e12:.2f}  {found[0]['iters']}")
    if cfg.plot:
        draw_growth(cfg.plot, runs)
    return {"measurements": {"val loss": losses}, "validation": QUALITY_VALIDATION, "seeds": seeds(cfg),
            "runs": runs}


def beside_twins(cfg):
    """(flags of the one that grows up, flags of the one of full depth)."""
    return [(dict(n_layer=cfg.layers, grow=cfg.grow), dict(n_layer=cfg.layers))]


def grown_run(cfg, data, out_dir, flags, seed, iters):
    """-> val loss on fixed batches, seconds of all training steps, curve of [seconds, val loss, FLOPs]."""
    rows = trained_with(cfg, data, out_dir, [], flags, seed, iters, eval_interval=100)
    model, seconds, flops, curve = trained_model(out_dir), 0.0, 0.0, []
    for row, after in pairwise(rows):
        model.use_layers(row.get("layers", cfg.layers))
        if row.get("val_loss") and row["iter"]:
            curve.append([seconds, row["val_loss"], flops])
        seconds += row["ms"] / 1e3
        flops += model.flops_per_token() * (after["tokens"] - row["tokens"])
    curve.append([seconds, rows[-1]["val_loss"], flops])
    model.use_layers(cfg.layers)
    shutil.rmtree(out_dir)
    found = {"val_loss": fixed_loss(model, data, validation_of(model)), "step_seconds": seconds,
             "iters": rows[-1]["iter"], "curve": curve}
    print(f"seed {seed}, {flags}: val loss {found['val_loss']:.4f}, {seconds:.0f} s", file=sys.stderr)
    return found


def draw_growth(path, runs):
    with drawing(path, columns=2, size=(9, 4), sharey=True) as axes:
        for name, colour in zip(runs, ("black", "tab:red", "tab:orange")):
            for run in runs[name]:
                seconds, losses, flops = zip(*run["curve"])
                axes[0].plot(seconds, losses, color=colour, lw=1, label=name * (run is runs[name][0]))
                axes[1].plot([f / 1e12 for f in flops], losses, color=colour, lw=1)
        axes[0].set(xlabel="seconds of training steps", ylabel="validation loss, nats", ylim=(None, 2.2))
        axes[1].set(xlabel="TFLOP")
        axes[0].legend(frameon=False, fontsize=8)
