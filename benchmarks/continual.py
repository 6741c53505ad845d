"""What a model forgets of a first task while it learns a second, and what holding it costs."""
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks import Bench
from benchmarks.runs import trained_with
from benchmarks.timing import interleave, measurement, spread
from configurator import require
from data import dataset as datasets
from model import build_model
from training import checkpoint, optimizers, runtime
from training import continual as learning
from viz.figures import drawing

PLAIN = "fine-tuning"
FIRST, SECOND = "pylib", "shakespeare"
SHAPE = dict(block_size=64, batch_size=16, eval_iters=24)
TWO = dict(adapters="python,english")


@dataclass(frozen=True)
class Continual(Bench):
    """Forgetting of a first task after a second: fine-tuning, EWC, replay, adapters, and together."""
    repeats: int = 3  # seeds of each way
    threads: int = 1  # CPU threads of a run
    input: str = ""  # text of the second task, read as bytes; empty: data/shakespeare_bytes
    config: str = "config/train_pylib.py"  # config files of the recipe, by commas
    iters: int = 300  # iterations of each task
    ewc: float = 3.0  # weight of EWC alone
    replay: float = 0.1  # share of replayed rows, alone
    both: str = "0.5,0.1"  # the two where they go together
    steps: int = 60  # timed training steps of each, in turns
    plot: str = ""  # also draw losses and forgetting into this PNG (needs matplotlib)

    def __post_init__(self):
        super().__post_init__()
        require(self.iters >= 1 and self.steps >= 1,
                f"iters={self.iters} and steps={self.steps} must be at least 1")
        arms(self)


def arms(cfg):
    """{name: keys of train.py}."""
    try:
        ewc, replay = map(float, cfg.both.split(","))
    except ValueError:
        require(False, f"both='{cfg.both}' must be the weight of EWC and the share of replay: type "
                "--both=0.5,0.1")
    together = dict(ewc=ewc, replay=replay)
    return {PLAIN: {}, "EWC": dict(ewc=cfg.ewc), "replay": dict(replay=cfg.replay), "EWC + replay": together,
            "adapters": TWO | dict(freeze=True), "adapters + replay": TWO | dict(replay=cfg.replay),
            "EWC + replay + adapters": TWO | together}


def beside_twins(cfg):
    """(keys, keys of fine-tuning) of every way to hold a task."""
    return [(keys, arms(cfg)[PLAIN]) for name, keys in arms(cfg).items() if name != PLAIN]


def continual(cfg):
    runs = {}
    with tempfile.TemporaryDirectory() as work:
        data = [datasets.prepare_if_missing(FIRST).resolve(), second_task(cfg, Path(work))]
        for seed in range(cfg.repeats):
            for name, flags in arms(cfg).items():
                runs.setdefault(name, []).append(learnt(cfg, data, Path(work), seed, name, flags))
            clear_but_last(cfg, Path(work), seed)
        timed, seconds = step_times(cfg, Path(work))
    results = {"loss on the second task": measurement("nats", lists(runs, "second")),
               "forgetting": measurement("nats", lists(runs, "forgetting")), "training step": timed}
    found = summary(runs, timed)
    print(f"{FIRST}, then {SECOND}, {cfg.iters} iterations each, {cfg.repeats} seeds: loss on {FIRST} after "
          f"both, forgetting, how much of it is cut; loss on {SECOND}, to {PLAIN}'s; a step's time to its")
    for name, s in found.items():
        print(f"  {name:24} {s['first']:.4f}  {s['forgetting']:.4f}  {s['cut']:7.1%}  {s['second']:.4f}  "
              f"{s['second_to_plain']:+.2%}  {s['step_to_plain']:.3f}")
    print(f"Fisher information of {FIRST}, once: {seconds:.1f} s")
    if cfg.plot:
        draw(cfg.plot, runs, found)
    return {"measurements": results, "arms": arms(cfg), "summary": found, "fisher_seconds": seconds,
            "runs": runs}


def second_task(cfg, work):
    """The folder of the second task's bytes."""
    if not cfg.input:
        return datasets.prepare_if_missing("shakespeare_bytes").resolve()
    datasets.write_text(work / SECOND, cfg.input, "byte", 0.1)
    return work / SECOND


def learnt(cfg, data, work, seed, name, flags):
    """Train both tasks -> the matrix of losses and what it says. Arms of one seed that do not differ before
    the first task ends share it: they go on from copies of its last checkpoint."""
    begun, out_dir = work / f"{seed}{flags.get('adapters', '')}", work / f"{seed} {name}"
    shared = dict(tasks=",".join(map(str, data)), lr_decay_iters=cfg.iters) | SHAPE
    shared |= {key: flags[key] for key in ("adapters",) if key in flags}
    if not begun.is_dir():
        trained_with(cfg, data[0], begun, [], shared, seed, cfg.iters)
    shutil.copytree(begun, out_dir)
    clock = time.perf_counter()
    rows = trained_with(cfg, data[0], out_dir, [], shared | flags, seed, cfg.iters, init_from="resume",
                        max_iters=2 * cfg.iters, lr_decay_iters=cfg.iters)
    ends = [row for row in rows if "after_task" in row]
    matrix = [{task: row[f"val_loss of {folder}"] for task, folder in zip((FIRST, SECOND), data)}
              for row in ends]
    found = {"matrix": matrix, "first": matrix[1][FIRST], "second": matrix[1][SECOND],
             "seconds": time.perf_counter() - clock, **learning.judged(matrix),
             "curve": [[row["iter"], row["loss"]] for row in rows if "loss" in row][::10]}
    print(f"seed {seed}, {name}: {found['first']:.4f}, {found['second']:.4f}", file=sys.stderr, flush=True)
    return found


def clear_but_last(cfg, work, seed):
    """The last seed's runs are timed; the others' weights may go."""
    for folder in work.glob(f"{seed}*") if seed < cfg.repeats - 1 else ():
        shutil.rmtree(folder)


def step_times(cfg, work):
    """-> ({side: milliseconds of training steps, in turns}, with ratios of the pairs to plain fine-tuning's,
    and the seconds of a Fisher information)."""
    sides, tasks = {}, {}
    for name in arms(cfg):
        tasks[name], sides[name] = student(work / f"{cfg.repeats - 1} {name}")
    seconds = interleave(sides, cfg.steps)
    timed = measurement("ms", {name: [1e3 * s for s in values] for name, values in seconds.items()})
    timed["pairs_to_plain"] = {name: spread([a / b for a, b in zip(values, seconds[PLAIN])])
                               for name, values in seconds.items()}
    clock = time.perf_counter()
    tasks["EWC"].fisher(0)
    return timed, time.perf_counter() - clock


def student(out_dir):
    """A finished run, taken up again -> (its Tasks, a function that makes its next training step, as train.py
    does: batch, forward, backward, what holds earlier tasks, clipping, update)."""
    loaded, path = checkpoint.read(out_dir, resume=True)
    cfg = SimpleNamespace(**loaded["config"])
    cfg.task_names = lambda: cfg.tasks.split(",")
    model = build_model(loaded, path).train()
    model.compute_dtype = runtime.choose("cpu").dtype
    optimizer = optimizers.build(model, cfg, "cpu")
    checkpoint.load_optimizer(optimizer, loaded["optimizer"], path)
    streams = [datasets.TokenStream(name, "train", cfg.block_size, cfg.batch_size, cfg.seed)
               for name in cfg.task_names()]
    tasks = learning.Tasks(cfg, model, streams, runtime.World(), loaded["tasks"], loaded["iter_num"])
    tasks.begin(loaded["iter_num"])
    return tasks, partial(train_step, model, optimizer, tasks, iter(range(loaded["iter_num"], 10**9)))


def train_step(model, optimizer, tasks, numbers):
    number = next(numbers)
    tasks.listen(number)
    model(*tasks.lessons.batch(number))[1].backward()
    tasks.pull()
    for part in optimizers.by_clipping(model):
        torch.nn.utils.clip_grad_norm_(part, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def lists(runs, key):
    return {name: [found[key] for found in seeds] for name, seeds in runs.items()}


def summary(runs, timed):
    """Means over the seeds; differences and ratios to plain fine-tuning of the same seed."""
    found = {}
    for name, seeds in runs.items():
        pairs = list(zip(seeds, runs[PLAIN]))
        mean = lambda values: statistics.fmean(values)
        found[name] = {key: mean(run[key] for run in seeds) for key in ("first", "forgetting", "second")} | {
            "cut": mean(1 - run["forgetting"] / plain["forgetting"] for run, plain in pairs),
            "cut_least": min(1 - run["forgetting"] / plain["forgetting"] for run, plain in pairs),
            "second_to_plain": mean(run["second"] / plain["second"] - 1 for run, plain in pairs),
            "second_to_plain_most": max(run["second"] / plain["second"] - 1 for run, plain in pairs),
            "step_to_plain": timed["pairs_to_plain"][name]["median"]}
    return found


def draw(path, runs, found):
    """Loss on the first task before and after the second; forgetting against the loss on the second."""
    with drawing(path, 2, (11, 4.2), width_ratios=(1.1, 1)) as (left, right):
        draw_losses(left, runs, found)
        draw_forgetting(right, runs)
        for axis in (left, right):
            axis.legend(frameon=False, fontsize=8)


def draw_losses(axis, runs, found):
    for place, seeds in enumerate(runs.values()):
        before, after = ([run["matrix"][task][FIRST] for run in seeds] for task in (0, 1))
        axis.barh(place, statistics.fmean(after), color="tab:red", height=0.6,
                  label="after the second task" if not place else None)
        axis.barh(place, statistics.fmean(before), color="tab:gray", height=0.6,
                  label="before it" if not place else None)
    axis.set_yticks(range(len(runs)), [f"{name}\n{found[name]['cut']:.0%} less" for name in runs], fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel=f"validation loss on {FIRST}, nats", xlim=(0, None))


def draw_forgetting(axis, runs):
    for name, seeds in runs.items():
        axis.plot(lists(runs, "second")[name], [run["forgetting"] for run in seeds], "o", label=name)
    limit = statistics.fmean(run["second"] for run in runs[PLAIN]) * 1.02
    axis.axvline(limit, color="black", lw=0.8, ls=":", label=f"2% above {PLAIN}")
    axis.set(xlabel=f"validation loss on {SECOND}, nats", ylabel=f"forgetting of {FIRST}, nats")
