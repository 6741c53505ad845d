"""What a few thousand tokens of training text tell a model that decodes with shortcuts: the thresholds of
screened units and what these save, and how large the inputs of matrices are whose weights are quantised."""
import statistics
import time

import torch

import sparse_kernels as kernels
from configurator import require
from decode import engine, sampling
from decode.quantized import whole_parts

TOKENS, KEPT = 8192, 1024                        # that are read, and whose scores are kept, a layer
AT_LOAD = 2048                                   # that are read, or written, where somebody waits for them
COUNTED, TRIAL = 16, 0.3                         # steps whose bytes are counted; seconds for two programs


def screened(model):
    """The MLPs of a model that screen their units (bio_modules.ScreenedUnits)."""
    return [module for module in model.modules() if hasattr(module, "own_copy")]


def needs_thresholds(model):
    return not all(mlp.is_calibrated() for mlp in screened(model))


def calibrate(model, ids, live):
    """Set the thresholds of a model in eval mode, from text -> the share of units that fire, layer by layer.

    ids: (B, T) int64 of training text; live: the mean share of the units that decoding is to read, 0: all
    that fire, 1: all. A layer's share is in proportion to that of its units that fire by themselves: layers
    differ by a factor of two and more, and equal shares cost several times the loss. The threshold is the
    quantile of the copy's scores that leaves the share; with live=0 the score that one in a thousand firing
    units is below.
    """
    seen = survey(model, ids)
    return set_thresholds(seen, live)


@torch.no_grad()
def survey(model, ids):
    """Run text through a model -> {MLP: what `look` notes}, from which thresholds of any share follow."""
    mlps, seen = screened(model), {}
    require(mlps, "calibrate: no layer of this model screens its units: build it with mlp_screen=4")
    find_reach(model, [mlp for mlp in mlps if hasattr(mlp, "reach")], ids)
    every = max(1, ids.numel() // KEPT)
    handles = [mlp.register_forward_pre_hook(lambda mlp, args: look(mlp, *args, every, seen)) for mlp in mlps]
    run_with(model, ids.split(8), handles)
    return {mlp: seen[mlp] for mlp in mlps}


def find_reach(model, mlps, ids):
    """Set how far the units of screened gates reach: the root mean square of what each multiplies its gate by
    on text ids (B, T), times the length of what it writes; a factor for all of them does not matter."""
    sums = dict.fromkeys(mlps, 0)

    def add(mlp, args):
        sums[mlp] = sums[mlp] + mlp.up(args[0]).float().square().flatten(0, -2).sum(0)
    run_with(model, ids.split(8) if mlps else (), [mlp.register_forward_pre_hook(add) for mlp in mlps])
    for mlp, squares in sums.items():
        mlp.reach.copy_(squares.sqrt() * mlp.c_proj.weight.float().norm(dim=0))


def set_thresholds(seen, live):
    """Set those of the MLPs of a survey -> the share of units that fire, layer by layer."""
    natural = [sum(fired) / len(fired) for fired, _, _ in seen.values()]
    mean = sum(natural) / len(natural)
    for (mlp, (_, scores, firing)), share in zip(seen.items(), natural):
        if live:
            keep = min(1.0, live * share / mean) if mean and live < 1 else live
            mlp.edge.fill_(quantile(torch.cat(scores), 1 - keep))
        else:
            some = torch.cat(firing)
            mlp.edge.fill_(quantile(some, 0.001) if len(some) else torch.inf)      # none fires, none is read
    return natural


def look(mlp, x, ctx, every, seen):
    """Note what a layer's units do with tokens x (B, T, C): the share that fires, and of one token in `every`
    the copy's scores of all units, and of those that fire."""
    fired, scores, firing = seen.setdefault(mlp, ([], [], []))
    fires, found = mlp.fires(x), mlp.scores(x.flatten(0, 1)[::every], ctx).float()
    fired.append(fires.float().mean().item())
    scores.append(found.flatten())
    firing.append(found[fires.flatten(0, 1)[::every]])


def run_with(model, batches, handles, head=False):
    """Run a model over batches (B, T) of ids with all its units, with the head over all tokens or their last,
    and take its hooks off again."""
    before = model.choices
    counted = [(module, name, getattr(module, name)) for module in model.modules()
               for name in ("layers_run", "steps_run", "tokens_run") if hasattr(module, name)]
    try:
        model.choose(predict=False)
        for row in batches:
            model(row, row if head else None)
    finally:
        model.choices = before
        for handle in handles:
            handle.remove()
        for counter in counted:                  # what the model's own tokens have cost
            setattr(*counter)


@torch.no_grad()
def input_moments(model, ids):
    """The mean square of each input of the matrices that quantize takes, over text ids (B, T) int64,
    for a model in eval mode -> {name of the matrix: (n_in,) fp32}. A matrix that its module reads by code of
    its own is left out."""
    sums, counts = {}, {}

    def add(name, x):
        rows = x.detach().float().flatten(0, -2)
        sums[name] = sums.get(name, 0) + rows.square().sum(dim=0)
        counts[name] = counts.get(name, 0) + len(rows)
    handles = [getattr(module, name).register_forward_pre_hook(lambda _, args, path=path: add(path, args[0]))
               for _, module, name, path in whole_parts(model)]
    run_with(model, ids.split(1), handles, head=True)     # a row at a time: all its logits are large
    return {name: sums[name] / counts[name] for name in sums}


def quantile(values, share):
    """The value below which a share of values (n,) lies; -inf for none, and of no values."""
    count = round(share * len(values))
    return -torch.inf if count < 1 else values.kthvalue(min(count, len(values))).values.item()


def own_text(model, count=AT_LOAD, seed=0):
    """About `count` tokens that the model itself writes, in rows of a block (512 at most), for models whose
    training text is not here."""
    c, length = model.config, min(model.config.block_size, 512, count)
    ids = torch.randint(c.vocab_size, (max(1, count // length), 1),
                        generator=torch.Generator().manual_seed(seed))
    sampler = sampling.Sampler(temperature=1.0)
    before, _ = model.choices, torch.manual_seed(seed)
    try:
        model.choose(predict=False, leave_at=None)
        new = [torch.cat(list(sampling.stream(model, some, length - 1, sampler)) or [some[:, :0]], dim=1)
               for some in ids.split(8)]
    finally:
        model.choices = before
    return torch.cat((ids, torch.cat(new)), dim=1)


def beside_dense(model, text, threads):
    """Decode steps with screened units beside the same model's without, both by the engine, over the first of
    the ids text (1, T), in turns -> {"bytes": of weights a step, with over without, "speed": times as fast};
    or the NotWritten that says why `forward` decodes."""
    before, programs = model.choices, []
    for on in (True, False):
        programs.append(engine.trial(model.choose(predict=on), text.device, threads))
    model.choices = before
    if not all(programs):
        return programs[0]
    room = programs[0].cache.length
    text = text.repeat(1, -(-(room + 1) // text.size(1)))
    steps, sizes, took = min(COUNTED, room), [], ([], [])
    for program in programs:
        with kernels.counting() as tally:
            read(program, text, 0, steps)
        sizes.append(tally.bytes)
    began, first = time.perf_counter(), 0
    while time.perf_counter() - began < TRIAL:
        for program, seconds in zip(programs, took):
            seconds += read(program, text, first, steps)
        first = (first + steps) % (room - steps + 1)
    fast, slow = map(statistics.median, took)
    return {"bytes": sizes[0] / sizes[1], "speed": slow / fast}


def read(program, text, first, steps):
    """Read so many ids of text (1, T) from column `first` on -> seconds of each step."""
    program.begin(text, [0], [first + 1])
    took = []
    for _ in range(steps):
        at = time.perf_counter()
        program.step()
        took.append(time.perf_counter() - at)
    return took
