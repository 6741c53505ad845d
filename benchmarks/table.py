"""The table that the project exists for: every arm beside its dense twin and the dense frontier."""
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

import checkpoint
import dataset as datasets
import optimizers
import runtime
import tokenizer
from benchmarks import Recipe, energy, plots, report
from benchmarks.arms import DENSE, check_arms, chosen_arms
from benchmarks.broken import BREAK
from benchmarks.frontier import beyond
from benchmarks.record import TWIN, hardware, load_average
from benchmarks.stats import mean_interval, paired
from benchmarks.store import JUDGED, Run, open_store, plan, train_all
from benchmarks.timing import interleave, measurement
from benchmarks.work import held_bytes, ready, work
from configurator import require

LONGER = 0.7, 1.6                                # of the tokens, that the dense twin is trained with too
SCHEMA = 1                                       # of `rows` and `axes` in the record
FEWEST = 3                                       # timed rounds, however little time is left
PROMPT, NEW = 32, 64                             # tokens, when decoding is timed


@dataclass(frozen=True)
class Table(Recipe):
    """Every arm beside its dense twin and the dense frontier: loss, speed, memory, work, over seeds."""
    repeats: int = 25  # rounds of each timing, fewer where the budget ends; three at least
    seeds: int = 3  # training runs of each arm
    threads: int = 1  # CPU threads of a run, and of what is timed
    jobs: int = 2  # training runs at a time; timings are taken alone
    budget: float = 55.0  # minutes for everything; the iterations follow from it
    arms: str = ""  # some of the arms, by commas; empty: all; broken: two that must look bad
    corpus: str = "pylib"  # folder below data/, or a path to one
    config: str = "config/compare_pylib.py,config/longer_context.py"
    runs: str = "results/runs"  # folder of the records of finished training runs
    cache: str = "out-table"  # folder of their checkpoints

    def __post_init__(self):
        super().__post_init__()
        require(self.jobs >= 1, f"jobs={self.jobs} must be at least 1")
        require(self.seeds >= 1, f"seeds={self.seeds} must be 1 or more: type --seeds=3")
        require(self.budget > 0, f"budget={self.budget} must be minutes above 0: type --budget=55")
        require(not self.out or self.out.endswith(".json"), f"out='{self.out}' must end with .json: the "
                "report and the plots take its name with endings of their own")
        check_arms(self)


def table(cfg):
    started = time.perf_counter()
    if cfg.out:
        plots.pyplot()                           # better missed now than in an hour
    data = datasets.prepare_if_missing(cfg.corpus).resolve()
    store, runs = open_store(cfg, data), runs_of(cfg)
    seconds = 60 * cfg.budget
    timing = min(480.0, 0.3 * seconds)
    iters, costs = plan(store, runs, seconds - timing)
    tell_plan(cfg, runs, iters, costs, seconds, timing)
    found, missing = train_all(store, runs, iters, costs, started + seconds - timing)
    for run, why in missing.items():
        print(f"!!! seed {run.seed}, {run.name} is missing: {why}")
    first = {run.arm: run for run in found if run.seed == 0 and run.share == 1}
    require(TWIN in first, f"the dense twin was not trained: {list(missing.values())[:1]}")
    timed = measured(store, first, iters, started + seconds)
    rows = rows_of(found, timed, iters, bytes_per_token(data))
    axes = axes_of(rows)
    result = {"table_schema": SCHEMA, "rows": rows, "axes": axes, "iterations": iters,
              "tokens": iters * timed["tokens"], "validation": {"batches": JUDGED, "tokens": 1280},
              "measurements": timed["measurements"], "energy": timed["energy"], "place": timed["place"],
              "missing": {f"{run.name}, seed {1337 + run.seed}": why for run, why in missing.items()},
              "minutes": (time.perf_counter() - started) / 60,
              "seeds": [1337 + seed for seed in range(cfg.seeds)]}
    print(report.markdown(result))
    if cfg.out:
        report.write(Path(cfg.out), result, hardware())
    return result


def runs_of(cfg):
    """All training runs, one seed of every arm after the other, so that what is there first is a table."""
    arms = [TWIN, *(arm for arm in chosen_arms(cfg) if arm != TWIN)]
    return [run for seed in range(cfg.seeds)
            for run in (*[Run(arm, seed) for arm in arms], *[Run(TWIN, seed, share) for share in LONGER])]


def tell_plan(cfg, runs, iters, costs, seconds, timing):
    total = sum(costs[run.arm][1] + costs[run.arm][0] * iters * run.share for run in runs) / cfg.jobs
    print(f"plan: {len(runs)} runs of {iters} iterations, {cfg.jobs} at a time, about {total / 60:.1f} "
          f"minutes if none is kept; then {timing / 60:.1f} minutes of timing; {seconds / 60:.3g} minutes in "
          "all", flush=True)


# -------------------------------------------------- what is timed, alone on the machine ---------------------

def measured(store, first, iters, deadline):
    """Work, memory, training and decoding speed, joules of the first seed's models, all arms in turns."""
    load = load_average()
    if load:
        print(f"training is done; load average {load[0]:.2f}", file=sys.stderr)
    place = runtime.choose("cpu", "auto", False)
    folders = {arm: store.cache / store.place(run, iters) for arm, run in first.items()}
    steps = {arm: training_step(store.model(first[arm], iters), folder, store.data)
             for arm, folder in folders.items()}
    tokens = {arm: step.tokens for arm, step in steps.items()}
    models = {arm: ready(store.model(run, iters), place) for arm, run in first.items()}
    stream = datasets.TokenStream(store.data, "val", PROMPT, 8, seed=0)
    prompts = {batch: stream.batch(0)[0][:batch].to(place.device) for batch in (1, 8)}
    sides = {batch: {arm: partial(model.generate, prompt, NEW, temperature=0)
                     for arm, model in models.items()} for batch, prompt in prompts.items()}
    repeats, (read, counter) = store.cfg.repeats, energy.meter(place.device)
    joules = {arm: energy.joules_of(read, run) for arm, run in sides[1].items()} if read else {}
    counted = {arm: work(model, prompts[1], 16) | {"held": held_bytes(model, model.config.block_size)}
               | {"joules": joules[arm] / NEW if joules.get(arm) else None} for arm, model in models.items()}
    seconds = {f"decode, batch {batch}": in_time(of, share_of(deadline, share), repeats)
               for (batch, of), share in zip(sides.items(), (0.4, 0.5))}
    seconds["training step"] = in_time({arm: step.run for arm, step in steps.items()},
                                       share_of(deadline, 0.8), repeats)
    rates = {name: {arm: [tokens_of(name, tokens[arm]) / s for s in values] for arm, values in of.items()}
             for name, of in seconds.items()}
    return {"measurements": {name: measurement("tokens/s", of, higher_is_better=True)
                             for name, of in rates.items()},
            "counted": counted, "energy": counter, "place": str(place), "tokens": tokens[TWIN],
            "load_before_timing": load}


def share_of(deadline, share):
    """So much of the seconds that are left."""
    return share * max(0.0, deadline - time.perf_counter())


def tokens_of(name, of_a_step):
    return of_a_step if name == "training step" else NEW * int(name.split()[-1])


def in_time(sides, seconds, most):
    """interleave with as many rounds as fit into so many seconds."""
    clock = time.perf_counter()
    for run in sides.values():
        run()
    rounds = int(seconds / (time.perf_counter() - clock))
    return interleave(sides, min(most, max(FEWEST, rounds)), warm_up=False)


def training_step(model, folder, data):
    """train.py's step on a trained model, in this process -> .run, a function, and .tokens that it takes."""
    kept = checkpoint.load(checkpoint.find(folder))
    cfg, model = SimpleNamespace(**kept["config"]), model.use_policy(False).train()
    model.compute_dtype = runtime.choose("cpu", cfg.dtype, False).dtype
    optimizer, clipped = optimizers.build(model, cfg, "cpu"), optimizers.by_clipping(model)
    stream = datasets.TokenStream(data, "train", cfg.block_size, cfg.batch_size, seed=0)

    def run():
        model(*stream.batch(0))[1].backward()
        for part in clipped:
            torch.nn.utils.clip_grad_norm_(part, cfg.grad_clip).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return SimpleNamespace(run=run, tokens=cfg.batch_size * cfg.block_size)


def bytes_per_token(data):
    """Bytes of the text that a token of the data stands for, or None where the data does not say."""
    meta = datasets.meta_of(data)
    if meta.get("tokenizer") == "byte":
        return 1.0
    text = tokenizer.load(data)
    ids = datasets.TokenStream(data, "val", 4096, 1, seed=0).batch(0)[0][0].tolist()
    return len(text.decode(ids).encode()) / len(ids)


# -------------------------------------------------- the rows ------------------------------------------------

def rows_of(found, timed, iters, per_token):
    """{run: record} and what was timed -> {name: what the table says of it}."""
    runs, rows = {}, {}
    for run, record in found.items():
        runs.setdefault(run.name, {})[run.seed] = (run, record)
    losses = {name: {seed: record["val_loss"] for seed, (_, record) in of.items()}
              for name, of in runs.items()}
    for name, of in runs.items():
        run, record = next(iter(of.values()))
        rows[name] = {"arm": run.arm, "share": run.share, "kind": kind_of(run), "losses": losses[name],
                      "val_loss": mean_interval(list(losses[name].values())),
                      "val_loss_exact": mean_interval([r["val_loss_exact"] for _, r in of.values()]),
                      "to_twin": paired(losses[name], losses[TWIN]) if name != TWIN else None,
                      "sees_the_future": any(r["sees_the_future"] for _, r in of.values()),
                      "parameters": record["parameters"], "counters": record["counters"],
                      "curve": record["curve"]} | timed["counted"].get(run.arm, {})
        rows[name]["bits_per_byte"] = rows[name]["val_loss"]["mean"] / LN2 / per_token
        speeds = {key: m["sides"].get(run.arm) for key, m in timed["measurements"].items()}
        rows[name]["speed"] = speeds
        rows[name]["train_seconds"] = (run.share * iters * timed["tokens"] / speeds["training step"]["median"]
                                       if speeds["training step"] else None)
    return rows


LN2 = 0.6931471805599453


def kind_of(run):
    """A dense rival, an arm, or one that is broken on purpose."""
    return "dense" if run.arm in DENSE else "broken" if run.arm in BREAK else "arm"


AXES = {"decode time": lambda row: 1 / row["speed"]["decode, batch 1"]["median"],
        "decode bytes": lambda row: row["weight_bytes"],
        "training time": lambda row: row["train_seconds"]}


def axes_of(rows):
    """{axis: {"costs": {name: cost}, "to_frontier": {arm: see frontier.beyond}}}, and the equal-time view.

    At equal training time the rivals are the dense twin's own runs, shorter and longer, and smaller models;
    on the other axes all models are trained with the same tokens.
    """
    axes = {}
    for axis, cost_of in AXES.items():
        here = {name: row for name, row in rows.items()
                if row["speed"]["training step"] and (row["share"] == 1 or axis == "training time")}
        costs = {name: cost_of(row) for name, row in here.items()}
        axes[axis] = {"costs": costs, "to_frontier": compared(here, costs, dense_of(here))}
        if axis == "training time":
            twins = [name for name, row in here.items() if row["arm"] == TWIN]
            axes["equal time"] = {"costs": costs, "to_frontier": compared(here, costs, twins)}
    return axes


def dense_of(rows):
    return [name for name, row in rows.items() if row["kind"] == "dense"]


def compared(rows, costs, rivals):
    losses = {name: row["losses"] for name, row in rows.items()}
    found = {name: beyond(costs, losses, name, rivals) for name, row in rows.items()
             if row["kind"] != "dense"}
    for name, result in found.items():           # what sees the future has no loss to compare
        result["pays"] &= not rows[name]["sees_the_future"]
    return found
