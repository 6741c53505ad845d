"""The honest table of every block: what it loses or gains beside its dense twin."""
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import Recipe
from benchmarks.arms import ARMS, check_arms, chosen_arms, described, steps_alone, trained
from benchmarks.record import TWIN, mean_of, read
from benchmarks.runs import QUALITY_VALIDATION, fixed_loss, losses_of, seeds, trained_model, validation_of
from configurator import require
from data import dataset as datasets
from model import GPTConfig
from viz.figures import drawing

SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)


@dataclass(frozen=True)
class Quality(Recipe):
    """Validation loss of every block beside its dense twin: the same data, seeds, recipe and iterations."""
    repeats: int = 3  # seeds of each arm
    threads: int = 1  # CPU threads of a run
    jobs: int = 1  # runs at a time
    arms: str = ""  # some of the arms, by commas; empty: all
    keep: str = ""  # an earlier record of this recipe: its runs of arms that are not trained now stay
    equal_time: str = ""  # arms, by commas, also trained for their dense twin's time; steps are timed first
    plot: str = ""  # also draw loss against the share of units read into this PNG (needs matplotlib)

    def __post_init__(self):
        super().__post_init__()
        require(self.jobs >= 1, f"jobs={self.jobs} must be at least 1")
        require(not self.keep or os.path.isfile(self.keep), f"keep='{self.keep}' does not exist")
        check_arms(self)


def quality(cfg):
    earlier = earlier_runs(cfg)
    data = datasets.prepare_if_missing("pylib").resolve()
    wanted = chosen_arms(cfg)
    todo = [(arm, seed, 0) for seed in range(cfg.repeats) for arm in wanted]
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(cfg.jobs) as pool:
        also = [name for name in cfg.equal_time.split(",") if name]
        step = steps_alone(cfg, data, Path(work), [TWIN, *also]) if also else {}
        done = list(pool.map(lambda job: quality_run(cfg, data, Path(work), *job), todo))
        longer = [(arm, seed, round(done[0]["iters"] * step[TWIN]["median"] / step[arm]["median"]))
                  for arm, seed, _ in todo if arm in also]
        more = list(pool.map(lambda job: quality_run(cfg, data, Path(work), *job), longer))
    runs = {}
    for (arm, _, iters), run in zip(todo + longer, done + more):
        runs.setdefault(arm + ", equal time" * bool(iters), []).append(run)
    if cfg.keep:
        runs = {arm: runs.get(arm) or earlier[arm] for arm in ARMS if arm in runs | earlier}
    losses = losses_of(runs)
    print(f"val loss, mean of {cfg.repeats} seeds (least to most); mean difference to the dense twin; "
          "parameters; shares of zeros")
    for arm, found in runs.items():
        paired = [a["val_loss"] - b["val_loss"] for a, b in zip(found, runs.get(TWIN, ()))]
        losses["sides"][arm]["to_twin"] = paired
        print(f"  {arm:32}{mean_of(losses['sides'][arm])}"
              + (f"  {statistics.fmean(paired):+.4f}" if paired else "")
              + f"  {found[0]['parameters']:,}  {tell_counters(found[0])}")
        for share in found[0]["policy"]:
            print(f"    {float(share):5.0%} of the units read: "
                  f"{statistics.fmean(run['policy'][share] for run in found):.4f}")
    if cfg.plot and "dendrites" in runs:
        draw_branches(cfg.plot, runs["dendrites"])
    elif cfg.plot:
        draw_quality(cfg.plot, runs)
    for arm, s in step.items():
        print(f"  {arm:32}{s['median']:8.2f} ms a step ({s['min']:.2f} to {s['max']:.2f})")
    return {"measurements": {"val loss": losses}, "validation": QUALITY_VALIDATION, "ms": step,
            "trained_now": wanted, "seeds": seeds(cfg), "runs": runs}


def earlier_runs(cfg):
    """The runs of the record `keep`; {} without one. What was trained otherwise is not kept."""
    record = read(cfg.keep) if cfg.keep else {"runs": {}}
    for key in ("config", "iters", "repeats") if cfg.keep else ():
        there, here = record["config"].get(key), getattr(cfg, key)
        require(there == here, f"keep='{cfg.keep}' was made with {key}={there} and this is {key}={here}, so "
                               f"its runs stand beside no twin: type --{key}={there} or leave --keep out")
    if cfg.keep:
        there, here = record["hardware"]["torch"], torch.__version__
        require(there.partition("+")[0] == here.partition("+")[0],
                f"keep='{cfg.keep}' was made by torch {there} and this is {here}: its runs stand beside no "
                "twin; leave --keep out")
    return record["runs"]


def quality_run(cfg, data, work, arm, seed, iters):
    """Train one arm with one seed -> its losses and counters."""
    out_dir, clock = work / f"{list(ARMS).index(arm)}_{seed}", time.perf_counter()
    rows = trained(cfg, data, out_dir, arm, seed, iters)
    seconds = time.perf_counter() - clock
    model = trained_model(out_dir)
    validation = validation_of(model)
    found = {"val_loss": fixed_loss(model, data, validation), "policy": {}, "seconds": seconds,
             "open_branches": [[row["iter"], row["open_branches"]] for row in rows if "open_branches" in row],
             **described(model, rows)}
    for share in SHARES if model.config.mlp_predict else ():
        for block in model.use_policy().transformer.h:
            block.mlp.active = max(1, round(share * model.config.units()))
        found["policy"][str(share)] = fixed_loss(model, data, validation)
    shutil.rmtree(out_dir)
    print(f"seed {seed}, {arm}: val loss {found['val_loss']:.4f}, {seconds:.0f} s", file=sys.stderr,
          flush=True)
    return found


def tell_counters(run):
    return ", ".join(f"{key} {value:.4g}" for key, value in run["counters"].items())


def draw_quality(path, runs):
    """Loss against the share of the dense twin's MLP units that a token reads, and the dense frontier."""
    mean = {arm: statistics.fmean(run["val_loss"] for run in found) for arm, found in runs.items()}
    with drawing(path, size=(7, 4.5)) as axis:
        dense = {0.25: "dense/4", 0.5: "dense/2", 1.0: TWIN}
        dense = {share: mean[arm] for share, arm in dense.items() if arm in mean}
        axis.plot(dense.keys(), dense.values(), "o-", color="black", label="dense models of that width")
        for found in (runs.get("predict") or [])[:1]:
            units = [GPTConfig(**runs[arm][0]["model_args"]).units() for arm in ("predict", TWIN)]
            curve = {float(s) * units[0] / units[1]: statistics.fmean(r["policy"][s] for r in runs["predict"])
                     for s in found["policy"]}
            axis.plot(curve.keys(), curve.values(), "o-", color="tab:red", label="predicted units of top 10%")
            axis.axhline(mean["predict"], color="tab:red", lw=0.8, ls=":",
                         label="exact top 10%, W_up read whole")
        for arm, share in (("columns", 0.25), ("columns*2", 0.5), ("columns*4", 1.0), ("experts", 0.25)):
            if arm in mean:
                axis.plot([share], [mean[arm]], "s", label=arm)
        axis.set(xlabel="share of the dense twin's units whose weights a token reads", xscale="log",
                 ylabel="validation loss, nats")
        axis.set_xticks([0.05, 0.1, 0.2, 0.5, 1.0], ["5%", "10%", "20%", "50%", "100%"])
        axis.legend(frameon=False, fontsize=8)


def draw_branches(path, found):
    """Share of closed dendritic branches over training, one line a seed."""
    with drawing(path, size=(6, 3.6)) as axis:
        branches = GPTConfig(**found[0]["model_args"]).dendrites
        for place, run in enumerate(found, 1):
            axis.plot(*zip(*[(i, 1 - opened / branches) for i, opened in run["open_branches"]]), lw=1,
                      label=f"seed {place} of {len(found)}")
        axis.set(xlabel="iterations", ylabel="share of branches closed, mean of layers", ylim=(0, 1))
        axis.set_title(f"dendritic attention, {branches} branches a head", fontsize=9)
        axis.legend(frameon=False, fontsize=8)
