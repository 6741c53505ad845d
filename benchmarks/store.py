"""Training runs that are kept: a small JSON each, found again by what decides its numbers; and their plan.

A run's file name ends with a hash of its settings (the arm's flags and the recipe's), the iterations, the
seed, the data's content, torch's version, and the golden curves (tests/golden.json) of all that it is made
of. No source file is part of it: one that moves or is written anew keeps its runs, behaviour that changes
moves a golden curve and does not.
"""
import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path

import torch

from benchmarks import ROOT
from benchmarks.arms import described, key_defaults, model_defaults, settings, trained
from benchmarks.broken import BREAK
from benchmarks.judge import as_trained, judge
from benchmarks.peers import load_module
from benchmarks.race import thinned
from benchmarks.record import commit_of, cpu_name, write_atomically
from configurator import ConfigError, require
from data import dataset as datasets
from training import rundir

GOLDEN = ROOT / "tests" / "golden.json"
PUBLISHED = ROOT / "results" / "runs"            # only read, unless --runs names it
TRIAL = 12                                       # iterations of the short runs that a plan is made from
LEAST = 20                                       # iterations below which a loss says nothing
EVERY = 400                                      # iterations between the checkpoints of a run


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
        """What all runs share that is no key: data and torch."""
        return [hash_of_data(self.data), torch.__version__.partition("+")[0]]

    def key(self, run, iters):
        """The hash by which a run is found again."""
        said, broken = settings(self.cfg.config, run.arm), run.arm * (run.arm in BREAK)
        return digest([self.common, said, broken, golden_of(said, broken), run.seed, count_of(run, iters)])

    def place(self, run, iters):
        """The run's file name without its ending: the name is for people, the key finds it."""
        name = "".join(c if c.isalnum() else "-" for c in run.name)
        return f"{name}-{1337 + run.seed}-{self.key(run, iters)}"

    def kept(self, folder, run, iters, ending=""):
        """The path in a folder that has the run's key, whatever its arm was called; or where it would be."""
        found = sorted(folder.glob(f"*-{self.key(run, iters)}{ending}"))
        return found[0] if found else folder / (self.place(run, iters) + ending)

    def checkpoint(self, run, iters):
        """The folder of a run's checkpoint, kept or not."""
        return self.kept(self.cache, run, iters)

    def model(self, run, iters):
        """The model of a run whose checkpoint is kept, in eval mode."""
        return as_trained(run.arm, self.checkpoint(run, iters), self.data)

    def read(self, run, iters):
        """A finished run's record, or None: it, or the checkpoint that later measurements need, is missing.
        """
        path = self.kept(self.records, run, iters, ".json")
        path = path if path.is_file() else self.kept(PUBLISHED, run, iters, ".json")
        weights = run.seed or run.share != 1 or (self.checkpoint(run, iters) / "ckpt.pt").is_file()
        return json.loads(path.read_text(encoding="utf-8")) if weights and path.is_file() else None

    def train(self, run, iters):
        """Train a run and judge it -> its record. A run that was killed goes on from its last checkpoint.

        Its folder is named by its key and held by one process at a time. What is written is there whole or
        not at all; the record is there first, so a kill between the two costs no training.
        """
        work = self.kept(self.cache, run, iters, ".tmp")
        lock = rundir.take(work, "cache")
        try:
            found = self.read(run, iters)                       # of a process that held the folder just now
            if not found:
                found = self.trained_in(work / "run", run, iters)
                write_atomically(self.kept(self.records, run, iters, ".json"),
                                 json.dumps(found, allow_nan=False) + "\n")
                self.keep(work / "run", run, iters)
        finally:
            lock.release()
        with contextlib.suppress(OSError):                      # another process may hold it by now
            work.rmdir()
        return found

    def trained_in(self, folder, run, iters):
        """The record of a run that is trained, or goes on, in a folder."""
        rows = trained(self.cfg, self.data, folder, run.arm, run.seed, count_of(run, iters), eval_iters=1,
                       init_from="auto", eval_interval=EVERY, always_save_checkpoint=True, keep_checkpoints=1)
        clock = time.perf_counter()
        model = as_trained(run.arm, folder, self.data)
        found = judge(model, self.data) | described(model, rows) | dict(
            arm=run.name, seed=1337 + run.seed, curve=curve_of(rows),
            trained_on={"cpu": cpu_name(), "isa": torch.backends.cpu.get_cpu_capability(),
                        "commit": commit_of(ROOT)},
            seconds=rows[-1]["seconds"] + time.perf_counter() - clock,           # of all its parts
            step_ms=statistics.median(row["ms"] for row in rows[2:] if "ms" in row))
        require(math.isfinite(found["val_loss"]), "its validation loss is not finite")
        return found

    def keep(self, folder, run, iters):
        """The checkpoint that later measurements need goes to its place, another one away."""
        place = self.checkpoint(run, iters)
        shutil.rmtree(place, ignore_errors=True)
        if run.seed or run.share != 1:
            shutil.rmtree(folder)
        else:
            os.replace(folder, place)


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


def count_of(run, iters):
    """Iterations of a run."""
    return max(LEAST // 2, round(iters * run.share))


def hash_of_data(data):
    """Of the token files' content, read once a command in constant memory, and what their ids mean."""
    said, meta = [], datasets.meta_of(data)
    for split in datasets.SPLITS:
        with open(data / f"{split}.bin", "rb") as file:
            said.append(hashlib.file_digest(file, "sha256").hexdigest())
    return [*said, {key: meta.get(key) for key in ("vocab_size", "dtype")}]


# -------------------------------------------------- golden curves ------------------------------------------

# flags whose values are different parts: a curve of one says nothing of another
CHOICES = {"norm", "pos", "act", "weights"}
OFF = 0, 1, ""                                   # defaults that turn a flag off; others are but a size


def golden_of(said, broken=""):
    """{name: losses} of the golden curves of all that a run with these settings is made of: of every flag
    that is on, of a whole training run with Muon, and of what breaks the arm on purpose."""
    golden, default = json.loads(GOLDEN.read_text(encoding="utf-8")), model_defaults()
    effective = {key: said.get(key, key_defaults()[key]) for key in default}

    def on(key, value):
        return (effective[key] == value if key in CHOICES else
                effective[key] != default[key] or default[key] not in OFF)
    names = [name for name, flags in golden_arms().items() if all(on(*item) for item in flags.items())]
    curves = golden["curves"] | golden.get("runs", {})
    wanted = [*names, "training", *[broken] * bool(broken)]
    missing = [name for name in wanted if name not in curves]
    require(not missing, f"tests/golden.json has no curve of {missing[:1]}: type python tests/test_golden.py")
    return {name: curves[name] for name in sorted(wanted)}


@cache
def golden_arms():
    """{name: flags} of the arms that have golden curves."""
    threads = torch.get_num_threads()
    arms = load_module("golden_arms", ROOT / "tests" / "arms.py").ARMS
    torch.set_num_threads(threads)               # the tests' table asks for one
    return arms


def curve_of(rows):
    """[[iteration, training loss]], smoothed and thinned."""
    curve = [[row["iter"], 0, row["loss"]] for row in rows if row.get("loss") is not None]
    return [[i, round(loss, 4)] for i, _, loss in thinned(curve, most=40)]


# -------------------------------------------------- the plan ------------------------------------------------

def iterations(seconds, runs, costs, jobs, spent=0.0):
    """The most iterations, in tens, with which all runs end within so many seconds, `jobs` at a time.

    costs: {arm: (seconds of an iteration, seconds of all else in a run)}; spent: what finding them took.
    """
    fixed = sum(costs[run.arm][1] for run in runs)
    each = sum(costs[run.arm][0] * run.share for run in runs)
    count = int((seconds * jobs - fixed) / each) // 10 * 10
    require(count >= LEAST, f"{seconds / 60:.3g} minutes of the budget are left for training and hold "
            f"{max(0, count)} iterations of {len(runs)} runs, fewer than {LEAST}: type "
            f"--budget={enough(LEAST, runs, costs, jobs, spent)} or more, fewer --seeds or some --arms")
    return count


def enough(iters, runs, costs, jobs, spent=0.0):
    """The smallest whole --budget, in minutes, whose runs hold so many iterations, if the short runs that
    costs come from take `spent` seconds; see timing_of."""
    wanted = sum(estimate(run, iters, costs) for run in runs) / jobs / SAFE + spent
    return next(minutes for minutes in itertools.count(1) if 60 * minutes - timing_of(60 * minutes) >= wanted)


def timing_of(seconds, train_only=False):
    """What a budget of so many seconds keeps for timing."""
    return 0.0 if train_only else min(480.0, 0.3 * seconds)


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
            judge(as_trained(arm, work, store.data), store.data)
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
    wanted = [store.common, cfg.budget, cfg.iters, cfg.jobs,
              [(settings(cfg.config, run.arm), run.arm * (run.arm in BREAK), run.seed, float(run.share))
               for run in runs]]
    path = store.records / f"plan-{digest(wanted)}.json"
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        return kept["iters"], {arm: tuple(cost) for arm, cost in kept["costs"].items()}
    costs = measure_costs(store, list(dict.fromkeys(run.arm for run in runs)), cfg.jobs)
    spent = time.perf_counter() - clock
    iters = cfg.iters or iterations(SAFE * (seconds - spent), runs, costs, cfg.jobs, spent)
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
