"""What a decode step needs, told by hooks on the modules whose forward runs it: the account that the decode
engine's own counts are held against."""
import contextlib
from types import SimpleNamespace

import bio_modules as bio
from layers import LargestInputs, Linear, NeuronMajor
from training.continual import Adapters


@contextlib.contextmanager
def needed(model):
    """-> macs and bytes that the tokens of every forward inside the block need, as they need them one by one:
    rows of units that are zero, that no gate has opened, or that no predictor picks, are needed by none."""
    found, hooks = SimpleNamespace(macs=0, bytes=0), []

    def add(macs, size=None):
        found.macs += int(macs)
        found.bytes += 4 * int(macs if size is None else size)

    def on(module, count, before=False):
        register = module.register_forward_pre_hook if before else module.register_forward_hook
        hooks.append(register(lambda _, args, *out: count(args[0], *out)))

    apart = set()                                # matrices of which a mechanism needs less than forward reads
    for block in model.transformer.h:
        apart |= {*mlp(block.mlp, add, on, model.choices.predict)} | {*attention(block.attn, add, on)}
        if isinstance(block.adapt, Adapters):
            on(block.adapt, lambda x, y, part=block.adapt.up[0].weight: add(2 * rows(x) * part.numel()))
            apart |= {*block.adapt.up, *block.adapt.down}
    for module in model.modules():
        if isinstance(module, LargestInputs):
            on(module, lambda x, module=module: add(rows(x) * module.k * module.out_features), before=True)
        elif isinstance(module, NeuronMajor) and module not in apart:
            on(module, lambda a, module=module: add(a.count_nonzero() * module.out_features), before=True)
        elif isinstance(module, Linear) and module not in apart:
            on(module, lambda x, module=module: add(rows(x) * module.weight.numel(), module.weight.numel()),
               before=True)
    kept = write_kv_of(model, add)
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        for attn in kept:
            del attn.write_kv


def rows(x):
    return x.numel() // x.size(-1)


def mlp(module, add, on, predict):
    """Count what the MLPs that choose their units need -> their matrices that are counted here."""
    C = module.c_proj.out_features
    if hasattr(module, "gate"):                  # columns and experts
        up = module.width * C
        on(module.gate, lambda x, gates: add((gates > 0).sum() * up))
        if isinstance(module, bio.Columns):
            N = module.groups
            on(module.gate, lambda x, gates: add(rows(x) * N * N, N * N))
        else:                                    # whose forward calls neither matrix
            fired = module.select if hasattr(module.select, "register_forward_hook") else module.act
            on(fired, lambda v, a: add(a.count_nonzero() * C))
        yield module.c_fc
    elif isinstance(module, bio.Dendritic):
        K, up = len(module.mix), module.c_fc.weight.numel()
        units = module.c_proj.in_features
        on(module, lambda x, y: add(rows(x) * up, up))
        on(module, lambda x, y: add(rows(x) * K * units, K * K))
    elif isinstance(module, bio.GateFirst):      # all gates, and the up projection of those that are left
        half = module.c_fc.weight.numel() // 2
        on(module.c_fc, lambda x, y: add(rows(x) * half, half))
        on(module.select, lambda gates, kept: add(kept.count_nonzero() * C))
        yield module.c_fc
    elif isinstance(module, bio.Predictive) and predict:
        on(module.c_fc, lambda x, y: add(rows(x) * module.active * C))
        yield module.c_fc
    elif isinstance(module, bio.Predictive):
        yield from (module.sense, module.guess)


def attention(module, add, on):
    """The same of dendritic attention: keys and values of all branches, queries of open ones."""
    if hasattr(module, "gate"):
        C = module.c_attn.in_features
        on(module.gate, lambda x, gates: add((gates > 0).sum() * module.part * C + rows(x) * 2 * C * C))
        yield module.c_attn


def write_kv_of(model, add):
    """Count keys and values of tokens that have left -> the attentions, whose method is exchanged."""
    for attn in (block.attn for block in model.transformer.h):
        def counted(x, ctx, plain=attn.write_kv, attn=attn):
            of = attn.c_attn
            add(rows(x) * (of.k if isinstance(of, LargestInputs) else of.in_features) * 2 * x.size(-1))
            return plain(x, ctx)
        attn.write_kv = counted
    return [block.attn for block in model.transformer.h]
