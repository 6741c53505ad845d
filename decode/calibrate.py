"""What a few thousand tokens of training text tell a model that decodes with shortcuts: the thresholds of
screened units."""
import torch

from configurator import require
from decode import sampling

TOKENS, KEPT = 8192, 1024                        # that are read, and whose scores are kept, a layer


def screened(model):
    """The MLPs of a model that screen their units (bio_modules.ScreenedUnits)."""
    return [module for module in model.modules() if hasattr(module, "own_copy")]


def needs_thresholds(model):
    return any(bool(mlp.edge.isnan()) for mlp in screened(model))


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
    mlps, seen, before = screened(model), {}, model.choices
    require(mlps, "calibrate: no layer of this model screens its units: build it with mlp_screen=4")
    every = max(1, ids.numel() // KEPT)
    counted = [(module, name, getattr(module, name)) for module in model.modules()
               for name in ("layers_run", "steps_run", "tokens_run") if hasattr(module, name)]
    handles = [mlp.register_forward_pre_hook(lambda mlp, args: look(mlp, *args, every, seen)) for mlp in mlps]
    try:
        model.choose(predict=False)
        for row in ids.split(8):
            model(row)
    finally:
        model.choices = before
        for handle in handles:
            handle.remove()
        for counter in counted:                  # what the model's own tokens have cost
            setattr(*counter)
    return {mlp: seen[mlp] for mlp in mlps}


def set_thresholds(seen, live):
    """Set those of the MLPs of a survey -> the share of units that fire, layer by layer."""
    natural = [sum(fired) / len(fired) for fired, _, _ in seen.values()]
    mean = sum(natural) / len(natural)
    for (mlp, (_, scores, firing)), share in zip(seen.items(), natural):
        if live:
            keep = min(1.0, live * share / mean) if mean and live < 1 else live
            mlp.edge.fill_(quantile(torch.cat(scores), 1 - keep))
        else:
            mlp.edge.fill_(quantile(torch.cat(firing), 0.001))
    return natural


def look(mlp, x, ctx, every, seen):
    """Note what a layer's units do with tokens x (B, T, C): the share that fires, and of one token in `every`
    the copy's scores of all units, and of those that fire."""
    fired, scores, firing = seen.setdefault(mlp, ([], [], []))
    v = mlp.c_fc(x)
    fired.append((v > 0).float().mean().item())
    some = x.flatten(0, 1)[::every]
    own = v.flatten(0, 1)[::every].float()
    found = own if mlp.own_copy() else mlp.scores(some, ctx).float()
    scores.append(found.flatten())
    firing.append(found[own > 0])


def quantile(values, share):
    """The value below which a share of values (n,) lies; -inf for none, and of no values."""
    count = round(share * len(values))
    return -torch.inf if count < 1 else values.kthvalue(min(count, len(values))).values.item()


def own_text(model, seed=0):
    """TOKENS tokens that the model itself writes, for models whose training text is not here."""
    c = model.config
    rows = max(1, TOKENS // c.block_size)
    ids = torch.randint(c.vocab_size, (rows, 1), generator=torch.Generator().manual_seed(seed))
    sampler = sampling.Sampler(temperature=1.0)
    before, _ = model.choices, torch.manual_seed(seed)
    try:
        model.choose(predict=False, leave_at=None)
        new = [torch.cat(list(sampling.stream(model, some, c.block_size - 1, sampler)), dim=1)
               for some in ids.split(8)]
    finally:
        model.choices = before
    return torch.cat((ids, torch.cat(new)), dim=1)
