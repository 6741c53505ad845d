"""Training runs that are kept: a small JSON each, found again by what it was trained with; and their plan.

A run's name ends with a hash of its flags, the recipe, the iterations, the seed, the data, torch and every
file that training reads, so what was trained by other code is never taken for this one's.
"""
import hashlib
import json
import math
import os
import shutil
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

import dataset as datasets
from benchmarks import ROOT
from benchmarks.arms import described, parts, trained
from benchmarks.broken import BREAK
from benchmarks.judge import as_trained, judge
from benchmarks.race import thinned
from benchmarks.record import write_atomically
from configurator import ConfigError, require

CODE = ("model.py", "bio_modules.py", "layers.py", "context.py", "sparse_kernels.py", "optimizers.py",
        "dataset.py", "tokenizer.py", "runtime.py", "checkpoint.py", "train.py", "benchmarks/broken.py",
        "benchmarks/runs.py", "benchmarks/judge.py")
TRIAL = 12                                       # iterations of the short runs that a plan is made from
LEAST = 20                                       # iterations below which a loss says nothing


@dataclass(frozen=True)
class Run:
    """One training run: an arm, its seed, and its share of the others' iterations."""
    arm: str
    seed: int
    share: float = 1.0

    @property
    def name(self):
        return self.arm + f", {self.share:g}x the tokens" * (self.share != 1)


@dataclass(frozen=True)
class Store:
    """Where runs lie: `records` holds their JSON, `cache` the checkpoints of the first seed."""
    cfg: object
    data: Path
    records: Path
    cache: Path

    @cached_property
    def common(self):
        """What all runs of this code, data and recipe share, as one hash."""
        files = [ROOT / name for name in (*CODE, *self.cfg.config.split(","))]
        said = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        return digest([*said, hash_of_data(self.data), torch.__version__])

    def place(self, run, iters):
        """The run's file name without its ending."""
        files, flags = parts(run.arm)
        said = [(ROOT / file).read_text(encoding="utf-8") for file in files]
        key = digest([self.common, said, flags, run.arm * (run.arm in BREAK), run.seed, iters,
                      float(run.share)])
        return "".join(c if c.isalnum() else "-" for c in run.name) + f"-{1337 + run.seed}-{key}"

    def model(self, run, iters):
        """The model of a run whose checkpoint is kept, in eval mode."""
        return as_trained(run.arm, self.cache / self.place(run, iters))

    def read(self, run, iters):
        """A finished run's record, or None: it, or the checkpoint that later measurements need, is missing.
        """
        path = self.records / (self.place(run, iters) + ".json")
        weights = run.seed or run.share != 1 or (self.cache / path.stem / "ckpt.pt").is_file()
        return json.loads(path.read_text(encoding="utf-8")) if weights and path.is_file() else None

    def train(self, run, iters):
        """Train a run and judge it -> its record. What is written is there whole or not at all."""
        place, count = self.place(run, iters), max(LEAST // 2, round(iters * run.share))
        work = self.cache / f"{place}.{os.getpid()}.tmp"
        shutil.rmtree(work, ignore_errors=True)
        clock = time.perf_counter()
        rows = trained(self.cfg, self.data, work, run.arm, run.seed, count, eval_iters=1)
        model = as_trained(run.arm, work)
        found = judge(model, self.data) | described(model, rows) | dict(
            arm=run.name, seed=1337 + run.seed, curve=curve_of(rows), seconds=time.perf_counter() - clock,
            step_ms=statistics.median(row["ms"] for row in rows[2:] if "ms" in row))
        require(math.isfinite(found["val_loss"]), "its validation loss is not finite")
        keep = self.cache / place
        shutil.rmtree(keep, ignore_errors=True)
        if run.seed or run.share != 1:
            shutil.rmtree(work)
        else:
            os.replace(work, keep)
        write_atomically(self.records / f"{place}.json", json.dumps(found, allow_nan=False) + "\n")
        return found


def open_store(cfg, data):
    """The store of a bench's config; its folders are made."""
    store = Store(cfg, data, Path(cfg.runs), Path(cfg.cache).resolve())
    for folder in (store.records, store.cache):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the folder {folder} cannot be made ({error.strerror}): type --runs=FOLDER "
                              "and --cache=FOLDER") from error
    return store


def digest(said):
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def hash_of_data(data):
    """Of the token files themselves."""
    return [hashlib.sha256((data / f"{split}.bin").read_bytes()).hexdigest() for split in datasets.SPLITS]


def curve_of(rows):
    """[[iteration, training loss]], smoothed and thinned."""
    curve = [[row["iter"], 0, row["loss"]] for row in rows if row.get("loss") is not None]
    return [[i, round(loss, 4)] for i, _, loss in thinned(curve, most=40)]


# -------------------------------------------------- the plan ------------------------------------------------

def iterations(seconds, runs, costs, jobs):
    """The most iterations, in tens, with which all runs end within so many seconds, `jobs` at a time.

    costs: {arm: (seconds of an iteration, seconds of all else in a run)}.
    """
    fixed = sum(costs[run.arm][1] for run in runs)
    each = sum(costs[run.arm][0] * run.share for run in runs)
    count = int((seconds * jobs - fixed) / each) // 10 * 10
    require(count >= LEAST, f"{seconds / 60:.3g} minutes of the budget are left for training and hold "
            f"{max(0, count)} iterations of {len(runs)} runs, fewer than {LEAST}: type a larger --budget, "
            "fewer --seeds or some --arms")
    return count


def estimate(run, iters, costs):
    """Seconds that a run takes."""
    step, rest = costs[run.arm]
    return rest + step * iters * run.share


def measure_costs(store, arms, jobs):
    """{arm: (seconds of an iteration, of all else)} from a short run of each, as many at a time as later."""
    def trial(arm):
        work = store.cache / f"trial-{os.getpid()}-{digest(arm)}"
        clock = time.perf_counter()
        try:
            rows = trained(store.cfg, store.data, work, arm, 0, TRIAL, eval_iters=1)
            judge(as_trained(arm, work), store.data)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        step = statistics.median(row["ms"] for row in rows[2:] if "ms" in row) / 1e3
        print(f"{arm}: {1e3 * step:.0f} ms an iteration", file=sys.stderr, flush=True)
        return step, time.perf_counter() - clock - TRIAL * step
    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(arms, pool.map(trial, arms)))


def plan(store, runs, seconds):
    """-> (iterations, costs), the same ones when a command is typed again: they are kept beside the runs.

    seconds: what training may take; the short runs that are timed first are a part of it.
    """
    cfg, clock = store.cfg, time.perf_counter()
    wanted = [store.common, cfg.budget, cfg.iters, cfg.jobs, [(run.name, run.seed) for run in runs],
              [parts(run.arm) for run in runs]]
    path = store.records / f"plan-{digest(wanted)}.json"
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        return kept["iters"], {arm: tuple(cost) for arm, cost in kept["costs"].items()}
    costs = measure_costs(store, list(dict.fromkeys(run.arm for run in runs)), cfg.jobs)
    left = seconds - (time.perf_counter() - clock)
    iters = cfg.iters or iterations(SAFE * left, runs, costs, cfg.jobs)
    write_atomically(path, json.dumps({"iters": iters, "costs": costs}) + "\n")
    return iters, costs


SAFE = 0.9                                       # of the time is planned: short runs tell it a little low


def train_all(store, runs, iters, costs, deadline):
    """Train what is missing, cfg.jobs at a time -> {run: record} and {run: why there is none}.

    No run is begun that would end behind the deadline (time.perf_counter's seconds).
    """
    found = {run: store.read(run, iters) for run in runs}
    clock = Clock([run for run, record in found.items() if record is None], iters, costs, deadline,
                  store.cfg.jobs)
    with ThreadPoolExecutor(store.cfg.jobs) as pool:
        done = dict(zip(clock.todo, pool.map(partial(train_one, store, iters, clock), list(clock.todo))))
    missing = {run: said for run, said in done.items() if isinstance(said, str)}
    return {run: record or done[run] for run, record in found.items() if run not in missing}, missing


class Clock:
    """Seconds that the runs `todo` still take, by their estimates and by how long those before have taken."""

    def __init__(self, todo, iters, costs, deadline, jobs):
        self.todo = {run: estimate(run, iters, costs) for run in todo}
        self.deadline, self.jobs, self.ended = deadline, jobs, []

    def pace(self):
        """Seconds taken of each estimated."""
        thought = sum(self.todo[run] for run, _ in self.ended)
        return sum(took for _, took in self.ended) / thought if thought else 1.0

    def allows(self, run):
        return time.perf_counter() + self.todo[run] * self.pace() <= self.deadline

    def end(self, run, seconds):
        """-> minutes until all are done."""
        self.ended.append((run, seconds))
        left = sum(self.todo.values()) - sum(self.todo[run] for run, _ in self.ended)
        return left * self.pace() / self.jobs / 60


def train_one(store, iters, clock, run):
    """-> the record of a run, or the sentence that says why there is none."""
    if not clock.allows(run):
        return "no time was left: type the same command again and it is trained"
    try:
        found = store.train(run, iters)
    except ConfigError as error:
        print(f"seed {run.seed}, {run.name} failed: {error}", file=sys.stderr, flush=True)
        return str(error)
    left = clock.end(run, found["seconds"])
    print(f"seed {run.seed}, {run.name}: val loss {found['val_loss']:.4f}, {found['seconds']:.0f} s; about "
          f"{left:.0f} minutes of training left", file=sys.stderr, flush=True)
    return found
