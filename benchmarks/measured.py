"""What the table measures of trained models, alone on the machine: work, memory, speed, joules."""
import sys
import time
from functools import partial
from types import SimpleNamespace

import torch

from benchmarks.record import TWIN, load_average
from benchmarks.timing import interleave, measurement
from benchmarks.work import held_bytes, ready, work
from data import dataset as datasets
from training import checkpoint, energy, optimizers, runtime

FEWEST = 3                                       # timed rounds, however little time is left
PROMPT, NEW = 32, 64                             # tokens, when decoding is timed
BATCHES = 1, 8


def measured(store, first, iters, deadline):
    """The models of the runs `first` {arm: run}, in turns until the deadline (time.perf_counter's seconds)
    -> tokens/s of decoding and of training steps, what was counted of each, tokens of the twin's step."""
    load = load_average()
    print(f"training is done; load average {load[0]:.2f}" if load else "training is done", file=sys.stderr)
    place = runtime.choose("cpu", "auto", False)
    models = {arm: ready(store.model(run, iters), place) for arm, run in first.items()}
    steps = {arm: training_step(store.model(run, iters), store.checkpoint(run, iters), store.data)
             for arm, run in first.items()}
    prompt = datasets.TokenStream(store.data, "val", PROMPT, max(BATCHES), seed=0).batch(0)[0]
    counter = energy.Meter(place.device).source
    counted = {arm: counts(model, prompt[:1], place.device) for arm, model in models.items()}
    sides = {f"decode, batch {batch}": {arm: SimpleNamespace(tokens=batch * NEW, run=partial(
        model.generate, prompt[:batch], NEW, temperature=0)) for arm, model in models.items()}
             for batch in BATCHES} | {"training step": steps}
    rates = {name: rates_of(of, share, deadline, store.cfg.repeats)
             for (name, of), share in zip(sides.items(), (1 / 3, 1 / 2, 0.9))}
    return {"measurements": {name: with_rounds(measurement("tokens/s", of, higher_is_better=True), of)
                             for name, of in rates.items()},
            "counted": counted, "energy": counter, "place": str(place), "tokens": steps[TWIN].tokens,
            "load_before_timing": load}


def with_rounds(result, rates):
    """A measurement that keeps what each round gave: round i of all sides was timed together."""
    for name, side in result["sides"].items():
        side["rounds"] = [float(f"{rate:.5g}") for rate in rates[name]]
    return result


def counts(model, prompt, device):
    """What is counted of a model: its work a decoded token, what it holds, joules where the machine tells."""
    meter = energy.Meter(device)
    model.generate(prompt, NEW, temperature=0)
    joules = meter.joules()
    return work(model, prompt, 16) | {"held": held_bytes(model, model.config.block_size),
                                      "joules": None if joules is None else joules / NEW}


def rates_of(sides, share, deadline, most):
    """{side: tokens/s of each round}: all sides in turns, in so large a share of the time that is left."""
    clock = time.perf_counter()
    for side in sides.values():
        side.run()
    now = time.perf_counter()
    rounds = int(share * (deadline - now) / (now - clock))
    seconds = interleave({name: side.run for name, side in sides.items()},
                         min(most, max(FEWEST, rounds)), warm_up=False)
    return {name: [sides[name].tokens / s for s in values] for name, values in seconds.items()}


def training_step(model, folder, data):
    """train.py's step on a trained model, in this process -> .run, a function, and .tokens that it takes."""
    kept = checkpoint.read(folder)[0]
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
