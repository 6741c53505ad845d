"""What the layers of a model did: silent units, open groups, and the work that a decode step executes."""
import functools
import math
from contextlib import nullcontext
from functools import partial

import torch
from torch.nn import functional as F

import sparse_kernels as kernels
from decode import calibrate, engine, sampling
from decode.context import Cache, CachedContext
from layers import NeuronMajor


@torch.no_grad()
def counters(model, idx):
    """What gated and sparse layers of a model did on token ids (B, T) -> one dict a layer; {} where no unit
    can be silent.

    zeros: share of exact zeros in the tensor that enters W_down; dead_units: units that are zero for all
    tokens; active_groups, dead_groups: of columns or experts; recall: the share of activation energy a**2
    that the predictor's units hold; open_branches, dead_branches: of dendrites; mlp_macs, mlp_bytes,
    attn_macs, attn_bytes: multiply-adds of weights and bytes of weights that this part of one decode step has
    executed behind idx (policy and all), counted as they run (decode/engine.py).
    """
    rows, hooks, training = {}, [], model.training
    for layer, block in enumerate(model.transformer.h):
        row = {}
        hooks += watch_branches(block.attn, row) + watch(block.mlp, row)
        if hooks:
            rows[layer] = row
    if rows:
        model.eval()(idx, idx)
    for hook in hooks:
        hook.remove()
    if rows:
        count_step(model, idx[:1], rows)
        model.train(training)
    return rows


@torch.no_grad()
def depth_used(model, idx):
    """Of token ids (B, T): layers_per_token that early exits would take, ponder_steps that halting took."""
    training, found, before = model.training, {}, model.choices
    halting = [block.halting for block in model.blocks if hasattr(block, "halting")]
    if model.config.exits and before.leave_at is None:
        model.choose(leave_at=model.config.exit_threshold)
    for module in [model.depth_policy] * bool(model.config.exits) + halting:
        module.layers_run = module.steps_run = module.tokens_run = 0
        model.eval()(idx)
        found |= ({"ponder_steps": module.steps_run / module.tokens_run} if module in halting
                  else {"layers_per_token": module.layers_run / module.tokens_run})
    model.train(training).choices = before
    return found


@torch.inference_mode()
def count_step(model, idx, rows):
    """Run the last of the tokens (1, T) as a cached decode step and write each layer's work into its row: as
    the decode engine counts it, or what the modules' forward executes where that decodes."""
    T, hooks = idx.size(1), []
    cache = Cache(model, 1, T)
    model.trunk(idx[:, :-1], CachedContext(cache, 0, T - 1, idx))
    program = engine.program_of(model, cache, model.config.vocab_size, 1, idx.device)
    if program:
        program.begin(idx, [0], [T])
        work = program.counted()
        for layer, row in rows.items():
            for part, name in (("attn", "attention"), ("mlp", "MLP")):
                row[f"{part}_macs"], row[f"{part}_bytes"] = work.get(f"layer {layer} {name}", (0, 0))
        return
    with kernels.counting() as tally:
        for layer, row in rows.items():
            for part in ("attn", "mlp"):
                row |= {f"{part}_macs": 0, f"{part}_bytes": 0}
                module = getattr(model.transformer.h[layer], part)
                hooks.append(module.register_forward_pre_hook(partial(count, tally, row, part, -1)))
                hooks.append(module.register_forward_hook(partial(count, tally, row, part, 1)))
        with kernels.step_of_card() if sampling.gathers(model, 1, idx.device) else nullcontext():
            model.trunk(idx[:, -1:], CachedContext(cache, T - 1, 1, idx))
    for hook in hooks:
        hook.remove()


STEPS = 8                                        # whose multiply-adds are counted


@torch.inference_mode()
def step_macs(model, idx):
    """Multiply-adds of weights of a decode step as the model's choices say, head included, counted as the
    last tokens of idx (1, T) run -> (their mean, and whole_macs of its config)."""
    training, T = model.training, idx.size(1)
    cache, first = Cache(model.eval(), 1, T, model.chosen(1)._replace(watch=None)), max(0, T - STEPS)
    if first:
        model.trunk(idx[:, :first], CachedContext(cache, 0, first, idx))
    program = engine.program_of(model, cache, model.config.vocab_size, 1, idx.device)
    with kernels.counting() as tally:
        if program:
            calibrate.read(program, F.pad(idx, (0, 1)), first, T - first)
        else:
            for at in range(first, T):
                model.logits_of(model.trunk(idx[:, at:at + 1], CachedContext(cache, at, 1, idx)))
    model.train(training)
    return tally.macs / (T - first), whole_macs(type(model), model.config)


def trained_step_macs(model, idx):
    """The same with all shortcuts that the model was trained for."""
    before = model.choices
    found = step_macs(model.use_policy(not calibrate.needs_thresholds(model)), idx)
    model.choices = before
    return found


@functools.cache
def whole_macs(kind, config):
    """Multiply-adds of a token that meets every weight of every layer once, and of the head; what predicts
    which units fire is no part of that. kind: the model's class."""
    with torch.device("meta"):
        model = kind(config, init=False)
    return model.lm_head.weight.numel() + sum(
        p.numel() for name, p in model.transformer.h.named_parameters()
        if p.dim() > 1 and not {"guess", "sense"} & set(name.split(".")))


def count(tally, row, part, sign, *_):
    """Less the work before a part, plus the work behind it."""
    row[f"{part}_macs"] += sign * tally.macs
    row[f"{part}_bytes"] += sign * tally.bytes


@torch.no_grad()
def count_training(model, idx):
    """-> multiply-adds of weights and of attention in a training forward of ids (B, T), and those of the
    block that ponders among them. Each token counts as seeing its whole window, or all T (2204.02311, B)."""
    row = {"block_macs": 0, "block_bytes": 0}
    with kernels.counting() as tally:
        for block in model.blocks:
            block.attn.register_forward_hook(partial(count_attention, tally))
            if hasattr(block, "halting"):
                block.register_forward_pre_hook(partial(count, tally, row, "block", -1))
                block.register_forward_hook(partial(count, tally, row, "block", 1))
        model.train()(idx, idx)
    return tally.macs, row["block_macs"]


def count_attention(tally, attn, args, y):
    T = y.size(1)
    tally.macs += 2 * y.numel() * min(T, attn.window or T)


def watch_branches(attn, row):
    """Hooks that write what dendritic branches do into row."""
    def see_gates(module, args, gates):
        opened = gates.flatten(0, -2) > 0
        row["open_branches"] = opened.float().sum(-1).mean().item()
        row["dead_branches"] = int((~opened.any(dim=0)).sum())

    return [attn.gate.register_forward_hook(see_gates)] if hasattr(attn, "gate") else []


def watch(mlp, row):
    """Hooks that write the counters of an MLP whose units can be silent into row."""
    if not isinstance(getattr(mlp, "c_proj", None), NeuronMajor):
        return []

    def see_hidden(module, args):
        a = args[0].flatten(0, -2)
        row["zeros"] = (a == 0).float().mean().item()
        row["dead_units"] = int((a == 0).all(dim=0).sum())

    def see_gates(module, args, gates):
        opened = gates.flatten(0, -2) > 0
        row["active_groups"] = opened.float().sum(-1).mean().item()
        row["dead_groups"] = int((~opened.any(dim=0)).sum())

    def see_input(module, args):
        energy = module.act(module.c_fc(args[0])).float().square()
        chosen = module.chosen(module.guess(module.sense(args[0])))
        row["recall"] = ((energy * chosen).sum() / energy.sum()).item()

    hooks = [mlp.c_proj.register_forward_pre_hook(see_hidden)]
    if hasattr(mlp, "gate"):
        hooks.append(mlp.gate.register_forward_hook(see_gates))
    if hasattr(mlp, "guess"):
        hooks.append(mlp.register_forward_pre_hook(see_input))
    return hooks


def summary(rows):
    """The layers' counters as one row for the log: means of shares, sums of the dead."""
    keys = {key for row in rows.values() for key in row}
    values = {key: [row[key] for row in rows.values() if key in row] for key in sorted(keys)}
    return {key: sum(v) if key.startswith("dead") else sum(v) / len(v) for key, v in values.items()}


def by_layer(rows, layers):
    """The layers' counters as {counter: [its value in each of so many layers]}, None where a layer has none,
    or none that is finite: JSON has no NaN."""
    keys = sorted({key for row in rows.values() for key in row})
    values = {key: [rows.get(layer, {}).get(key, math.nan) for layer in range(layers)] for key in keys}
    return {key: [v if math.isfinite(v) else None for v in column] for key, column in values.items()}
