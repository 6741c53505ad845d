"""Training runs as processes of their own, and their models judged on fixed validation batches."""
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks import ROOT
from benchmarks.children import run_child
from benchmarks.timing import measurement
from configurator import require
from data import dataset as datasets
from model import build_model
from training import checkpoint

QUALITY_VALIDATION = dict(batches=160, tokens=1280)


def timed_script(script, words, keys, cwd, cfg):
    """Run a script -> (its stdout, wall seconds from its start to its end)."""
    env = os.environ | {"OMP_NUM_THREADS": str(cfg.threads)} if cfg.threads else os.environ
    command = [sys.executable, str(script), *words, *(f"--{key}={value}" for key, value in keys.items())]
    clock = time.perf_counter()
    done = run_child(command, cwd=cwd, env=env)
    seconds = time.perf_counter() - clock
    last = (done.stderr.strip().splitlines() or ["without a message"])[-1]
    require(done.returncode == 0, f"{script} ended with status {done.returncode}: {last}")
    return done.stdout, seconds


def trained_with(cfg, data, out_dir, files, flags, seed, iters, broken=None, **more):
    """The recipe, config files behind it and flags -> the rows of the run's metrics. broken: the name of a
    model of broken.py."""
    keys = dict(dataset=data, out_dir=out_dir, seed=1337 + seed, device="cpu") | flags
    keys |= dict.fromkeys(("max_iters", "lr_decay_iters", "eval_interval"), iters) if iters else {}
    files = [str(ROOT / file) for file in [*cfg.config.split(","), *files]]
    script = ROOT / ("benchmarks/broken.py" if broken else "train.py")
    timed_script(script, [broken] * bool(broken) + files, keys | more, out_dir.parent, cfg)
    return metrics(out_dir)


def trained_model(out_dir):
    """The model of a finished run, in eval mode."""
    return build_model(*checkpoint.read(out_dir)).eval()


def validation_of(model):
    """Keys of the fixed validation batches for a model's block size."""
    block = model.config.block_size
    return dict(batches=QUALITY_VALIDATION["batches"], block_size=block,
                batch_size=QUALITY_VALIDATION["tokens"] // block)


def fixed_loss(model, data, validation):
    """Mean loss on fixed validation batches, in fp32."""
    stream = datasets.TokenStream(data, "val", validation["block_size"], validation["batch_size"], seed=0)
    with torch.no_grad():
        return statistics.fmean(model(*stream.batch(k))[1].item() for k in range(validation["batches"]))


def trained_models(cfg, data, flags):
    """{name: flags} -> {name: model trained on the recipe}, cfg.jobs at a time."""
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(cfg.jobs) as pool:
        folders = {name: Path(work) / str(i) for i, name in enumerate(flags)}
        list(pool.map(lambda name: trained_with(cfg, data, folders[name], [], flags[name], 0, cfg.iters),
                      flags))
        return {name: trained_model(folder) for name, folder in folders.items()}


def metrics(out_dir):
    """The rows of a run's metrics."""
    lines = (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def seeds(cfg):
    """Of the runs of every side."""
    return [1337 + number for number in range(cfg.repeats)]


def losses_of(runs):
    """{side: runs} -> the measurement of their validation losses, with means; a loss has no ratio."""
    losses = measurement("nats", {name: [run["val_loss"] for run in found] for name, found in runs.items()})
    for name, found in runs.items():
        losses["sides"][name]["mean"] = statistics.fmean(run["val_loss"] for run in found)
    return losses | {"ratio": {}}
