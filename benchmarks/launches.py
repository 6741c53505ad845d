"""How many kernels a decode step launches on a CUDA card, counted without one, and what that would cost."""
from collections import Counter
from dataclasses import dataclass
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_kernels as kernels
from benchmarks import Bench
from benchmarks.scaling import SHAPES, VARIANTS, VOCABULARY, costs, parameters
from configurator import require
from decode import calibrate, card, draws, sampling
from decode.context import Cache
from decode.engine import NotWritten
from layers import settle
from model import GPT, GPTConfig

BLOCKS = {
    "dense, GELU": {}, "dense, squared ReLU": dict(act="relu2"), "dense, SwiGLU": dict(act="swiglu"),
    "RMSNorm, rope, QK norm, squared ReLU": dict(norm="rmsnorm", pos="rope", qk_norm=True, act="relu2"),
    "window 128": dict(window=128), "screened units": dict(act="relu2", mlp_screen=4),
    "columns 3 of 32": dict(columns=32, columns_active=3),
    "experts 2 of 8": dict(experts=8, experts_active=2), "top 10%": dict(mlp_topk=0.1),
    "winners 2 of 4": dict(mlp_topk=0.5, mlp_topk_group=4), "event gates": dict(event_gate=True),
    "gates first": dict(act="swiglu", gate_first=True, mlp_topk=0.5),
    "screened gates": dict(act="swiglu", mlp_screen=4, mlp_live=0.65),
    "predicted 20%": dict(mlp_topk=0.1, mlp_predict=64), "osc": dict(act="osc"),
    "compartments": dict(compartments=4), "grouped queries": dict(n_kv_head=4),
    "larger inputs of attention": dict(attn_topk=0.5), "dendrites": dict(dendrites=4, dendrites_active=2),
    "2:4, packed": dict(weights="2:4"), "n-grams": dict(ngram_buckets=1024), "adapters": dict(adapters="one"),
    "hierarchy 4": dict(hierarchy=4), "exits": dict(exits="2"), "ponder": dict(ponder=3)}
RATE = 4.0                                       # TB/s of an H200's copy, measured
NO_LAUNCH = "empty", "new_empty"                 # ops that make a tensor without a kernel


@dataclass(frozen=True)
class Launches(Bench):
    """Kernels that a decode step on a CUDA card launches, by block, and times that follow: arithmetic."""
    rows: int = 1  # of the batch, up to 8
    launch: float = 3.0  # microseconds of a launch, as an H200 took

    def __post_init__(self):
        super().__post_init__()
        require(1 <= self.rows <= 8, f"rows={self.rows} must be in 1..8")
        require(self.launch >= 0, f"launch={self.launch} must not be negative")


class Launched(TorchDispatchMode):
    """Counts ops that launch a kernel: those that write a tensor or make one that is not a view."""

    def __init__(self):
        super().__init__()
        self.ops = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made, name = func(*args, **kwargs or {}), func.overloadpacket.__name__
        first = made[0] if isinstance(made, (tuple, list)) and made else made
        if torch.is_tensor(first) and not name.startswith(NO_LAUNCH):
            given = {storage_of(t) for t in args if torch.is_tensor(t)}
            writes = name.endswith("_") or "out" in (kwargs or {})
            self.ops[name] += writes or storage_of(first) not in given
        return made


def storage_of(tensor):
    return tensor.untyped_storage()._cdata


class OneOp:
    """In the Triton kernels' place: its ops are one each."""
    MOST_UNITS = 16384

    @staticmethod
    def largest(a, k, keep):
        return a.clone() if keep else a.new_zeros(*a.shape[:-1], k, dtype=torch.int64)


def forward_ops(config, rows=1):
    """Ops of the model's forward in a decode step that a GPU would record, as its dispatcher sees them; a
    Triton op is one, though some are several kernels. NotWritten where the host decides what is run."""
    waits = [flag for flag in sampling.HOST_DECIDES if getattr(config, flag)]
    if waits:
        raise NotWritten(f"{waits[0]}: the host decides")
    with FakeTensorMode(), torch.device("cuda"), torch.inference_mode(), \
            mock.patch.object(sampling, "gathers", lambda *_: True), \
            mock.patch.object(kernels, "triton_for", lambda *_: OneOp), \
            mock.patch.object(card, "card_of", lambda *_: NotWritten("forward is counted")):
        model = GPT(config, init=False).eval().use_policy()
        history = torch.zeros(rows, 16, dtype=torch.long)
        step = sampling.Step(model, Cache(model, rows, 16), history, config.vocab_size)
        for mlp in calibrate.screened(model):    # a threshold cannot be looked at here
            mlp.ways = {True: type(mlp).ways[False]}
        with Launched() as launched:
            model.head(step.states())
    return launched.ops.total()


def card_launches(config, rows=1):
    """Launches of a card's step, which draws greedily -> (of the layer that has most, outside of layers).
    NotWritten where it lacks a part."""
    model = GPT(config, init=False).eval().use_policy()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    for mlp in calibrate.screened(model):
        mlp.edge.zero_()
    history, seen = torch.zeros(rows, 16, dtype=torch.long), torch.zeros(rows, config.vocab_size + 1).bool()
    greedy = draws.settings(sampling.Sampler(temperature=0), 0, seen)
    with mock.patch("kernels.picked.wanted", lambda *_, **__: False):      # as a card packs 2:4 weights
        step = card.Card(settle(model), Cache(model, rows, 16), history, history[:, 0] * 0, config.vocab_size,
                         greedy, seen)
    parts = Counter(" ".join(part.split()[:2]) if part.startswith("layer") else "outside"
                    for _, part in step.launches)
    outside = parts.pop("outside")
    return max(parts.values()), outside


def counted(flags, rows=1, **shape):
    """A block's launches before and after -> dict; a reason where there are none."""
    shape = dict(n_embd=768, n_head=12, vocab_size=512, block_size=1024) | shape
    found = {}
    try:
        four, eight = (forward_ops(GPTConfig(**shape | flags | dict(n_layer=n)), rows) for n in (4, 8))
        found |= {"before_layer": (eight - four) / 4, "before_outside": 2 * four - eight}
    except NotWritten as reason:
        found["before"] = str(reason)
    try:
        layer, outside = card_launches(GPTConfig(**shape | flags | dict(n_layer=4)), rows)
        found |= {"after_layer": layer, "after_outside": outside}
    except NotWritten as reason:
        found["after"] = str(reason)
    return found


def predictions(launch):
    """The targets of the card's step, as bytes by RATE and launches of so many microseconds would have it:
    [(what, from what, predicted, unit)]."""
    rows, best = [], {}
    cfg = type("Assumed", (), dict(live=0.18, share=0.15, context=512))
    for shape in ("124M", "1.5B"):
        layers, C = SHAPES[shape]
        for v in VARIANTS:
            if v.hierarchy > 1:
                continue
            found = costs(v, layers, C, cfg)
            size = found["weight_bytes"] + found["kv_bytes"]
            calls = layers * (7 if v.mlp == "predict" else 5) + 3
            best[shape, v.name] = size / RATE / 1e9 + calls * launch / 1e3, size, calls
    for shape, name in (("124M", "G1"), ("1.5B", "G1b")):
        ms, size, calls = best[shape, "dense, GELU, bf16"]
        bytes_alone = size / RATE / 1e9
        rows.append((name, f"{shape} dense step: {calls} launches, {size / 1e6:,.0f} MB", ms, "ms"))
        rows.append((name, f"{shape} dense step beside its bytes alone", ms / bytes_alone, "x"))
    ms, *_ = best["124M", "dense, GELU, bf16"]
    rows.append(("G1", "124M step against nanoGPT's, measured 4.89 ms", 4.89 / ms, "x"))
    dense = 2 * 8192 * 4096 / RATE / 1e6 + launch
    rows.append(("G2", "2:4 product of 67 MB, one launch each", dense / (9 / 16 * (dense - launch) + launch),
                 "x"))
    units, C = 4 * 4096, 4096
    whole, copy = 4 * units * C / RATE / 1e6 + 2 * launch, units * C * 9 / 16 / RATE / 1e6
    some = 0.1 * 4 * units * C / RATE / 1e6 + 2 * launch
    rows += [("G3", "MLP of 4096 with gates, 10% of its units, two launches", whole / some, "x"),
             ("G3", "the same screened by a 4-bit copy", whole / (some + copy), "x")]
    base = best["1.5B", "dense, squared ReLU, bf16"][0]
    for name in ("screened units, bf16", "dense, squared ReLU, int4", "screened units, int8", "2:4, bf16",
                 "efficient, bf16"):
        rows.append(("G4", f"1.5B {name} against dense bf16", base / best["1.5B", name][0], "x"))
    worst = min((best[shape, "dense, squared ReLU, bf16"][0] / best[shape, v.name][0], f"{shape} {v.name}")
                for shape in ("124M", "1.5B") for v in VARIANTS
                if v.hierarchy == 1 and v.name.endswith("bf16"))
    rows.append(("G4b", f"the slowest against dense, {worst[1]}", worst[0], "x"))
    tokens = 65536
    head = 3 * 4 * tokens * VOCABULARY / RATE / 1e9              # written once, read twice in fp32
    rows.append(("G6", "124M training step of 131.4 ms without fp32 logits in memory", 131.4 / (131.4 - head),
                 "x"))
    rows.append(("G6b", f"no prediction: iterations, not bytes; {parameters(6, 384) / 1e6:.0f} M parameters",
                 None, ""))
    pairs, blocks = 8192 / 2, 512 + 128 / 2
    rows.append(("G8", "window 512 of 8,192: pairs of causal attention by pairs of blocks of 128",
                 pairs / blocks, "x"))
    return rows


def launches(cfg):
    print("launches of a decode step, counted on paper: no card ran. before: ops of forward in a CUDA graph,"
          " the sampler's left out; after: kernels of decode/card.py, which draw the next id too")
    points = {}
    for name, flags in BLOCKS.items():
        points[name] = found = counted(flags, cfg.rows)
        before, after = (found.get(side) or f"{found[f'{side}_layer']:g} a layer + "
                         f"{found[f'{side}_outside']:g}" for side in ("before", "after"))
        print(f"{name:38}{before:32}{after}")
    print(f"\narithmetic: bytes at {RATE:g} TB/s and launches of {cfg.launch:g} us, nothing overlapped")
    told = predictions(cfg.launch)
    for target, what, value, unit in told:
        print(f"{target:5}{what:78}" + (f"{value:8.2f} {unit}" if unit else ""))
    return {"measurements": {}, "points": points, "predictions": told}
