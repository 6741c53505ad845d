"""The table that the project exists for: every arm beside its dense twin and the dense frontier."""
import os
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import Recipe, report
from benchmarks.arms import DENSE, check_arms, chosen_arms, named_arms, same_models, settings
from benchmarks.broken import BREAK
from benchmarks.frontier import beyond, middle
from benchmarks.judge import JUDGED
from benchmarks.measured import measured
from benchmarks.record import TWIN, hardware
from benchmarks.stats import mean_interval, paired
from benchmarks.store import Run, enough, open_store, plan, timing_of, train_all
from configurator import require
from data import dataset as datasets
from data import tokenizer
from viz.figures import pyplot

LONGER = 0.6, 1.6                                # of the tokens, that the dense twin is trained with too
SCHEMA = 1                                       # of `rows` and `axes` in the record


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
    runs: str = "out-bench/runs"  # folder of the records of finished runs; those in results/runs are read too
    cache: str = "out-table"  # folder of their checkpoints
    train_only: bool = False  # train what is missing and make no table; type the same without it for that

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
        pyplot()                           # better missed now than in an hour
    data = datasets.prepare_if_missing(cfg.corpus).resolve()
    store, runs = open_store(cfg, data), runs_of(cfg)
    seconds = 60 * cfg.budget
    timing = timing_of(seconds, cfg.train_only)
    print(hint_of_niceness(), end="", flush=True)
    iters, costs = plan(store, runs, seconds - timing)
    tell_plan(cfg, runs, iters, costs, seconds, timing)
    found, missing = train_all(store, runs, iters, costs, started + seconds - timing)
    for run, why in missing.items():
        print(f"!!! seed {run.seed}, {run.name} is missing: {why}")
    if cfg.train_only:
        print(f"{len(found)} of {len(runs)} runs are trained")
        return {"measurements": {}, "iterations": iters, "trained": len(found), "wanted": len(runs)}
    first = {run.arm: run for run in found if run.seed == 0 and run.share == 1}
    require(TWIN in first, f"the dense twin was not trained: {list(missing.values())[:1]}")
    timed = measured(store, first, iters, started + seconds)
    whole = {run: record for run, record in found.items() if run.arm in first}     # the others have no speed
    rows = rows_of(whole, timed, iters, bytes_per_token(data))
    axes = axes_of(rows)
    for row in rows.values():
        row["settings"] = settings(cfg.config, row["arm"])
    result = {"table_schema": SCHEMA, "rows": rows, "axes": axes, "iterations": iters,
              "same_as": same_models(cfg.config, named_arms(cfg)),
              "tokens": iters * timed["tokens"], "validation": {"batches": JUDGED, "tokens": 1280},
              "measurements": timed["measurements"], "energy": timed["energy"], "place": timed["place"],
              "load_before_timing": timed["load_before_timing"],
              "missing": {f"{run.name}, seed {1337 + run.seed}": why for run, why in missing.items()},
              "minutes": (time.perf_counter() - started) / 60,
              "seeds": [1337 + seed for seed in range(cfg.seeds)]}
    print(report.markdown(result))
    if cfg.out:
        report.write(Path(cfg.out), result, hardware())
    return result


AUTOGROUP = Path("/proc/self/autogroup")         # "/autogroup-523 nice 0", where Linux groups by session


def hint_of_niceness():
    """A line for who has typed `nice` where that counts inside a session alone; else empty."""
    nice = os.nice(0) if hasattr(os, "nice") else 0
    told = AUTOGROUP.read_text() if nice > 0 and AUTOGROUP.exists() else ""
    if not told.strip().endswith(" nice 0"):
        return ""
    return (f"note: here Linux shares the machine among sessions, and nice {nice} counts inside one; to "
            f"yield to others, type echo {nice} > /proc/{os.getpid()}/autogroup\n")


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
    if total > seconds - timing:                                # --iters asks for more
        print(f"plan: that does not fit --budget={cfg.budget:g}; if none is kept it takes "
              f"--budget={enough(iters, runs, costs, cfg.jobs)}", flush=True)


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
        trained = run.share * iters * timed["tokens"]
        rows[name]["train_seconds"] = (trained / speeds["training step"]["median"]
                                       if speeds["training step"] else None)
        rows[name]["trained_tokens"] = trained
    return rows


LN2 = 0.6931471805599453


def kind_of(run):
    """A dense rival, an arm, or one that is broken on purpose."""
    return "dense" if run.arm in DENSE else "broken" if run.arm in BREAK else "arm"


AXES = {"decode time": lambda row: seconds_of(row["speed"]["decode, batch 1"], 1),
        "decode bytes": lambda row: row["weight_bytes"],
        "training time": lambda row: (seconds_of(row["speed"]["training step"], row["trained_tokens"])
                                      if "trained_tokens" in row else row["train_seconds"])}


def seconds_of(speed, tokens):
    """What so many tokens take: of every round that the record keeps, else of the median."""
    return [tokens / rate for rate in speed["rounds"]] if "rounds" in speed else tokens / speed["median"]


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
        shown = {name: middle(cost) for name, cost in costs.items()}
        axes[axis] = {"costs": shown, "to_frontier": compared(here, costs, dense_of(here))}
        if axis == "training time":
            twins = [name for name, row in here.items() if row["arm"] == TWIN]
            axes["equal time"] = {"costs": shown, "to_frontier": compared(here, costs, twins)}
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
