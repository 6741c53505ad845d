"""Optimizers: which parameter is updated by which rule, and a learning-rate schedule for all of them.

AdamW in nanoGPT's two groups is the default. Muon takes the matrices inside the blocks; embeddings, head,
gains and biases stay with AdamW. Every parameter is in exactly one group, asserted.
"""
import inspect
import math
from functools import partial

import torch

from configurator import require
from layers import Linear
from sparse_kernels import in_fp32
from training import runtime

SCHEDULES = ("cosine", "linear", "wsd", "constant")


def lean(optimizer_class):
    """The class without torch's wrappers around its methods: they serve torch.compile and differentiable
    optimizers, and import the whole compiler (3.5 s) at the first step of a run that compiles nothing. The
    update itself is torch's."""
    for method in vars(torch.optim.Optimizer).values():
        plain = getattr(method, "__wrapped__", None)
        if (plain is not None and inspect.isfunction(method)
                and method.__code__.co_filename.endswith("_compile.py")):
            plain.__dict__.setdefault("__dynamo_disable", plain)  # where that wrapper looks before it imports
    step = torch.no_grad()(inspect.unwrap(optimizer_class.step))
    return type(optimizer_class.__name__, (optimizer_class,), {"step": step})


AdamW = lean(torch.optim.AdamW)


class Muon(lean(torch.optim.Muon)):
    """torch's Muon; the matrices of one shape go through Newton-Schulz together, as one batched product. A
    split matrix goes through it whole, on the process that owns it."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            keys = {k: v for k, v in group.items() if k not in ("params", "lr_scale")}
            params = [p for p in group["params"] if p.grad is not None]
            split = any(map(runtime.is_split, params))
            for together in [params] if split else by_shape(params):
                self.update(together, split, **keys)

    def update(self, params, split, lr, weight_decay, momentum, nesterov, ns_coefficients, ns_steps, eps,
               adjust_lr_fn):
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
        weights, grads, means = map(runtime.local, (params, [p.grad for p in params],
                                                    [self.state[p]["momentum_buffer"] for p in params]))
        torch._foreach_lerp_(means, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, means, momentum) if nesterov else means
        change = partial(orthogonal_by_shape, coefficients=ns_coefficients, steps=ns_steps, eps=eps)
        if split:                               # in bf16 as Newton-Schulz reads and writes: half the bytes
            halves = runtime.by_owners(change, params, [u.bfloat16() for u in updates])
            updates = [half.to(u.dtype) for half, u in zip(halves, updates)]
        else:
            updates = change(updates)
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
        moves = dict(zip(params, zip(weights, updates)))
        for shape, alike in ((alike[0].shape, alike) for alike in by_shape(params)):
            torch._foreach_add_(*map(list, zip(*(moves[p] for p in alike))),
                                alpha=-lr * max(1, shape[0] / shape[1]) ** 0.5)


def by_shape(tensors):
    """Lists of those of one shape, in their order."""
    alike = {}
    for tensor in tensors:
        alike.setdefault(tensor.shape, []).append(tensor)
    return list(alike.values())


def orthogonal_by_shape(matrices, **keys):
    """`orthogonal` of matrices of any shapes, those of one shape together, in the dtype that they have."""
    found = {}
    for alike in by_shape(matrices):
        results = orthogonal(torch.stack(alike), **keys).to(alike[0].dtype).unbind()
        found |= zip(map(id, alike), results)
    return [found[id(matrix)] for matrix in matrices]


def orthogonal(matrices, coefficients, steps, eps):
    """(n, rows, columns) -> the nearest matrices with singular values about 1, in bf16: Newton-Schulz's
    quintic iteration on whichever side is shorter."""
    a, b, c = coefficients
    tall = matrices.size(1) > matrices.size(2)
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = in_fp32(torch.bmm, x, x.mT)
        gram = in_fp32(partial(torch.baddbmm, beta=b, alpha=c), gram, gram, gram)
        x = in_fp32(partial(torch.baddbmm, beta=a), x, gram, x)
    return x.mT if tall else x


class Together:
    """Several optimizers that step as one, with the interface of one."""

    def __init__(self, *parts):
        self.parts = parts

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self):
        return {"parts": [part.state_dict() for part in self.parts], "param_groups": []}

    def load_state_dict(self, state):
        if len(state.get("parts", ())) != len(self.parts):
            raise ValueError(f"it holds {len(state.get('parts', ()))} optimizers, expected {len(self.parts)}")
        for part, saved in zip(self.parts, state["parts"]):
            part.load_state_dict(saved)


def adamw(params, weight_decay, learning_rate, betas, device_type):
    """AdamW (1711.05101) in nanoGPT's two groups: tensors of 2+ dimensions decay, gains and biases do not."""
    groups = [{"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]
    return AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas,
                 fused=device_type in ("cuda", "cpu"))


def muon(model, weight_decay, learning_rate, betas, device_type, muon_learning_rate, momentum, steps):
    """Muon (https://kellerjordan.github.io/posts/muon) for the blocks' matrices: momentum, then Newton-Schulz
    to an update whose singular values are near 1; AdamW for all other parameters. Update length follows
    muon_learning_rate."""
    hidden = [m.weight for m in model.transformer.h.modules() if isinstance(m, Linear) and m.hidden]
    others = [p for p in model.parameters() if not any(p is q for q in hidden)]
    parts = Together(Muon(hidden, lr=muon_learning_rate, weight_decay=weight_decay, momentum=momentum,
                          ns_steps=steps),
                     adamw(others, weight_decay, learning_rate, betas, device_type))
    for group in parts.parts[0].param_groups:
        group["lr_scale"] = muon_learning_rate / learning_rate
    assert_partition(model, parts)
    return parts


def assert_partition(model, optimizer):
    """Every parameter of the model is in exactly one group."""
    grouped = sorted(id(p) for group in optimizer.param_groups for p in group["params"])
    assert grouped == sorted(id(p) for p in model.parameters()), \
        "a parameter is in no optimizer group or in several"


def build(model, cfg, device_type):
    """The optimizer that cfg.optimizer names."""
    betas = (cfg.beta1, cfg.beta2)
    if cfg.optimizer == "adamw":
        return model.configure_optimizers(cfg.weight_decay, cfg.learning_rate, betas, device_type)
    return muon(model, cfg.weight_decay, cfg.learning_rate, betas, device_type,
                cfg.muon_learning_rate, cfg.muon_momentum, cfg.muon_steps)


def by_clipping(model):
    """Parameters in lists whose gradients are clipped apart: the model's, and those that learn aside."""
    aside = {id(p) for m in model.modules() if getattr(m, "aside", False) for p in m.parameters()}
    parts = ([p for p in model.parameters() if p.requires_grad and (id(p) in aside) == side]
             for side in (False, True))
    return [part for part in parts if part]


def learning_rate(cfg, iteration):
    """Learning rate of an iteration: linear warm-up, then cfg.lr_schedule down to min_lr at lr_decay_iters.

    cosine: nanoGPT's. linear: a straight line. wsd: constant, then a straight line over the last
    lr_decay_share of the way (2404.06395). constant, or decay_lr=False: no decay (and, as in nanoGPT,
    decay_lr=False has no warm-up either).
    """
    if not cfg.decay_lr:
        return cfg.learning_rate
    if iteration < cfg.warmup_iters:
        return cfg.learning_rate * (iteration + 1) / (cfg.warmup_iters + 1)
    if cfg.lr_schedule == "constant":
        return cfg.learning_rate
    if iteration >= cfg.lr_decay_iters:
        return cfg.min_lr
    done = (iteration - cfg.warmup_iters) / (cfg.lr_decay_iters - cfg.warmup_iters)
    left = {"cosine": 0.5 * (1.0 + math.cos(math.pi * done)), "linear": 1 - done,
            "wsd": min(1.0, (1 - done) / cfg.lr_decay_share)}[cfg.lr_schedule]
    return cfg.min_lr + left * (cfg.learning_rate - cfg.min_lr)


def standstill(cfg):
    """-> (a line about iterations whose learning rate is 0,), or () where there are none."""
    ends = max(cfg.lr_decay_iters, cfg.warmup_iters)
    still = (cfg.decay_lr and cfg.lr_schedule != "constant" and not cfg.tasks
             and cfg.min_lr == 0 and ends < cfg.max_iters)
    return (f"note: the learning rate is 0 from iteration {ends:,} of {cfg.max_iters:,} on: type "
            f"--lr_decay_iters={cfg.max_iters} as well",) * still


def check(cfg):
    """The optimizer's keys of a training config."""
    require(cfg.optimizer in ("adamw", "muon"), f"optimizer='{cfg.optimizer}' must be adamw or muon")
    require(cfg.optimizer != "muon" or cfg.learning_rate > 0,
            f"optimizer='muon' scales its rate by learning_rate={cfg.learning_rate}, which must be above 0")
    require(1 <= cfg.muon_steps < 100, f"muon_steps={cfg.muon_steps} must be in 1..99: type --muon_steps=5")
    require(cfg.lr_schedule in SCHEDULES, f"lr_schedule='{cfg.lr_schedule}' must be {', '.join(SCHEDULES)}")
    require(0 < cfg.lr_decay_share <= 1, f"lr_decay_share={cfg.lr_decay_share} must be in (0, 1]")
