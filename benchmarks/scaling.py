"""Arithmetic, not a measurement: how long a decode step would take at shapes that were not trained here, were
nothing but its bytes to count."""
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

import sparse_kernels as kernels
from benchmarks import ROOT, Bench
from benchmarks.record import OURS, read
from configurator import require
from kernels import picked

SHAPES = {"124M": (12, 768), "350M": (24, 1024), "1.5B": (48, 1600), "7B": (32, 4096)}    # layers, width
VOCABULARY = 50304
CARDS = {"RTX 3090": 936, "RTX 4090": 1008, "H100": 3350}      # GB/s, by their makers' data sheets
RECORD = ROOT / "results" / "decode_gpt2_cpu.json"             # whose plain read is this CPU's bandwidth
# Hoffmann et al. 2022 (2203.15556): a dense model of N parameters has a loss of E + A / N**ALPHA + ...
A, ALPHA = 406.4, 0.34


@dataclass(frozen=True)
class Scaling(Bench):
    """On paper: decode times of dense and sparse models at 124M to 7B, by bytes and bandwidth alone."""
    shapes: str = "124M,350M,1.5B,7B"  # by commas; GPT-2's widths and depths, 7B: 32 layers of 4096
    context: int = 512  # tokens whose keys and values a step reads, in 16 bits
    live: float = 0.18  # share of a trained squared-ReLU MLP's units that fire by themselves
    share: float = 0.15  # share of the units that a screen picks
    bandwidth: float = 0.0  # GB/s of this CPU's memory; 0: the fastest plain read of decode_gpt2_cpu.json
    launch: float = 3.0  # microseconds that a card takes for each op of a step, beside its bytes

    def __post_init__(self):
        super().__post_init__()
        unknown = [name for name in self.shapes.split(",") if name not in SHAPES]
        require(not unknown, f"shapes='{self.shapes}': {unknown[:1]} must be among {', '.join(SHAPES)}")
        for key in ("live", "share"):
            require(0 < getattr(self, key) <= 1, f"{key}={getattr(self, key)} must be in (0, 1]")
        require(self.context >= 1, f"context={self.context} must be at least 1 token")
        for key in ("bandwidth", "launch"):
            require(getattr(self, key) >= 0, f"{key}={getattr(self, key)} must be 0 or more")


class Variant(NamedTuple):
    """A model as it decodes. bits: of attention, MLP and head; mlp: a key of OPS."""
    name: str
    bits: tuple = (16, 16, 16)
    mlp: str = "relu2"
    two_of_four: bool = False                    # attention and W_up, packed where these have 16 or 8 bits
    hierarchy: int = 1                           # the middle layers run on every so many tokens
    screened_head: bool = False                  # 8 bits of it are looked at first, where it has 16
    window: int = 0                              # of three layers in four
    share: float = 0.0                           # of the units that a screen picks; 0: Scaling.share

    def form(self, part):
        """How a row of attention (0) or of W_up (1) is stored: see row_bytes."""
        return f"2:4 in {self.bits[part]}" if self.two_of_four and self.bits[part] > 4 else self.bits[part]


INT8, INT4 = (8, 8, 8), (8, 4, 8)
COMBINED = dict(mlp="columns", two_of_four=True, hierarchy=4, screened_head=True)
EFFICIENT = dict(mlp="screen", share=0.1, screened_head=True, window=128)
PREDICTING = dict(mlp="predict", two_of_four=True, screened_head=True, window=128)
VARIANTS = tuple(Variant(f"{name}, {kind}", bits, **flags) for name, flags in {
    "dense, GELU": dict(mlp="gelu"), "dense, squared ReLU": {}, "screened units": dict(mlp="screen"),
    "2:4": dict(two_of_four=True), "hierarchy 4": dict(hierarchy=4), "efficient": EFFICIENT,
    "predict + 2:4 + window 128": PREDICTING,
    "columns + 2:4 + hierarchy 4": COMBINED}.items()
    for kind, bits in {"bf16": (16, 16, 16), "int8": INT8, "int4": INT4}.items()
    if name != "2:4" or kind != "int4")          # 4 bits are stored dense
COLUMNS, ACTIVE = 32, 3                          # columns, and those that answer
RANK, PREDICTED, WINNERS = 12, 0.2, 0.1          # width by the predictor's rank; of the units: picked, firing
HALF = 0.5                                       # of the units of columns that answer, those that fire
OPS = {"gelu": 7, "relu2": 7, "screen": 9, "predict": 11, "columns": 9}        # of the engine, a layer
AROUND = 4                                       # ops of embedding, last norm, head and choice
MACHINES = "this CPU", *CARDS


# -------------------------------------------------- bytes --------------------------------------------------

@cache
def row_bytes(width, form):
    """Bytes of a row of weights as the engine reads it; form: 16, 8 or 4 bits, or 2:4 in 16 or 8 as AVX2
    reads it (of whole groups of 256 inputs 16 bits take as much elsewhere)."""
    row = torch.zeros(1, width)
    if form in ("2:4 in 16", "2:4 in 8"):
        values, meta = kernels.pack_24(row.bfloat16())
        laid = picked.lay(values if form == "2:4 in 16" else values.to(torch.int8), meta, width)
        return laid.size(1) + 8 * (form == "2:4 in 8")
    if form == 16:
        return 2 * width
    codes, scale = kernels.quantize(row, form)
    return codes.size(1) + 8 * bool(len(scale))


def rows_read(v, units, live, share):
    """Of an MLP of so many units, those whose rows of W_up, and of W_down, a token reads."""
    columns = units // COLUMNS * ACTIVE
    up, down = {"gelu": (units, units), "relu2": (units, live * units),
                "screen": (share * units, share * units), "predict": (PREDICTED * units, WINNERS * units),
                "columns": (columns, HALF * columns)}[v.mlp]
    return (units if own_copy(v) else round(up)), round(down)


def own_copy(v):
    """Is W_up, read whole, the copy of a screen?"""
    return v.mlp == "screen" and v.bits[1] == 4


def mlp_bytes(v, C, up, down):
    """Bytes of the MLP of a layer of width C, a token that reads so many rows of W_up and of W_down."""
    units, more = 4 * C, 0
    if v.mlp == "gelu":                          # whose W_down lies by output: none of its inputs are zero
        return up * row_bytes(C, v.bits[1]) + C * row_bytes(units, v.bits[1])
    if v.mlp == "screen" and not own_copy(v):
        more = units * row_bytes(C, 4)
    elif v.mlp == "predict":                     # which stays in 16 bits
        more = C // RANK * row_bytes(C, 16) + units * row_bytes(C // RANK, 16)
    elif v.mlp == "columns":                     # the router and who inhibits whom
        more = COLUMNS * row_bytes(C, 16) + 4 * COLUMNS**2
    gathers = v.mlp in ("predict", "columns")    # rows by themselves, which are not packed
    return more + up * row_bytes(C, v.bits[1] if gathers else v.form(1)) + down * row_bytes(C, v.bits[1])


def attention_bytes(v, C):
    return 4 * C * row_bytes(C, v.form(0))


def head_bytes(v, C, rows=VOCABULARY):
    """A screened head is read in 8 bits, and the few rows that can win are not counted."""
    return rows * (C if v.screened_head and v.bits[2] == 16 else row_bytes(C, v.bits[2]))


def outer_layers(v, layers):
    """How many layers run on every token; the others on each v.hierarchy-th."""
    return 2 * max(1, layers // 4) if v.hierarchy > 1 else layers


def kv_bytes(v, layers, C, context):
    """Bytes of keys and values that a step reads, in 16 bits."""
    tokens = sum(min(context, v.window) if v.window and n % 4 < 3 else context for n in range(layers))
    outer = outer_layers(v, layers) / layers
    return round(4 * C * tokens * (outer + (1 - outer) / v.hierarchy**2))     # fewer columns, fewer steps


def costs(v, layers, C, cfg):
    """Of a decode step, the mean of tokens: bytes of weights, of keys and values, and ops."""
    layer = attention_bytes(v, C) + mlp_bytes(v, C, *rows_read(v, 4 * C, cfg.live, v.share or cfg.share))
    outer = outer_layers(v, layers)
    ran = outer + (layers - outer) / v.hierarchy
    each = OPS[v.mlp] - own_copy(v)              # which has no list of units
    return {"weight_bytes": round(ran * layer + head_bytes(v, C)),
            "kv_bytes": kv_bytes(v, layers, C, cfg.context),
            "ops": ran * each + AROUND + (v.screened_head and v.bits[2] == 16) + 2 * (v.hierarchy > 1)}


# -------------------------------------------------- times, losses -------------------------------------------

def parameters(layers, C):
    """Of GPT-2 of that shape, its head tied, without positions."""
    return layers * 12 * C**2 + VOCABULARY * C


def may_lose(N, share):
    """The loss in nats above a dense model of N parameters of which a dense model, in the same bits, has so
    few that a token reads `share` of the bytes."""
    return A * ((share * N) ** -ALPHA - N**-ALPHA)


def bandwidths(cfg):
    """GB/s of each of MACHINES, and where this CPU's is from."""
    if cfg.bandwidth:
        return {"this CPU": cfg.bandwidth} | CARDS, "as typed"
    require(RECORD.is_file(), f"{RECORD.name} is not here: type --bandwidth=GB/s of this machine")
    record = read(RECORD)
    size, ms = record["work"][OURS]["weight_bytes"], record["measurements"]["step"]["plain_read"]["min"]
    return {"this CPU": size / ms / 1e6} | CARDS, (f"the fastest plain read of {size / 1e6:.0f} "
                                                   f"MB, {record['hardware']['cpu']}, {RECORD.name}")


def scaling(cfg):
    speeds, source = bandwidths(cfg)
    points = {}
    for shape in cfg.shapes.split(","):
        layers, C = SHAPES[shape]
        for v in VARIANTS:
            found = costs(v, layers, C, cfg)
            size = found["weight_bytes"] + found["kv_bytes"]
            found["seconds"] = {name: size / (1e9 * rate) + (name in CARDS) * 1e-6 * cfg.launch * found["ops"]
                                for name, rate in speeds.items()}
            points[f"{shape}: {v.name}"] = found
        for v in VARIANTS:
            found, dense = (points[f"{shape}: {name}"] for name in (v.name, rival_of(v)))
            share = found["weight_bytes"] / dense["weight_bytes"]
            found |= {"beside": rival_of(v), "share": share,
                      "may_lose": may_lose(parameters(layers, C), share) if share < 1 else 0.0}
    tell(cfg, points, speeds, source)
    return {"measurements": {}, "points": points, "bandwidths": speeds, "bandwidth_is": source,
            "assumed": {"live": cfg.live, "share": cfg.share, "context": cfg.context, "launch": cfg.launch}}


def rival_of(v):
    """The dense model that a variant stands beside: a block's differs from it in the block alone, whole
    numbers stand beside themselves in bf16, and squared ReLU there beside GELU."""
    name, _, kind = v.name.rpartition(", ")
    if not name.startswith("dense"):
        return f"dense, squared ReLU, {kind}"
    return f"{name if kind != 'bf16' else 'dense, GELU'}, bf16"


def flags_of(v, C):
    """The flags of GPTConfig that make a variant of width C."""
    mlp = {"gelu": dict(act="gelu"), "relu2": {}, "screen": dict(mlp_screen=4, mlp_live=v.share or 0.15),
           "predict": dict(mlp_topk=WINNERS, mlp_predict=C // RANK, mlp_active=PREDICTED),
           "columns": dict(columns=COLUMNS, columns_active=ACTIVE)}[v.mlp]
    more = dict(hierarchy=v.hierarchy if v.hierarchy > 1 else 0, screen=v.screened_head, window=v.window,
                weights="2:4" if v.two_of_four else "")
    return dict(act="relu2") | mlp | {key: value for key, value in more.items() if value}


def beside_twins(cfg):
    """(flags, flags of the dense model beside it) of every block that is compared."""
    flags = {v.name: flags_of(v, 768) for v in VARIANTS}
    return [(flags[v.name], flags[rival_of(v)]) for v in VARIANTS if not v.name.startswith("dense")]


def tell(cfg, points, speeds, source):
    print("arithmetic, not a measurement: a step takes its bytes by the bandwidth"
          f" (this CPU {speeds['this CPU']:.1f} GB/s, {source}; "
          + ", ".join(f"{name} {rate:,} GB/s" for name, rate in CARDS.items())
          + f"), and on a card {cfg.launch:g} us for each op")
    wide = max(map(len, points))
    print(f"{'':{wide}}  MB a token  " + "  ".join(f"{name:>10}" for name in MACHINES) + "  may lose, nats")
    for name, found in points.items():
        size = (found["weight_bytes"] + found["kv_bytes"]) / 1e6
        print(f"{name:{wide}}  {size:10,.1f}  "
              + "  ".join(f"{1 / found['seconds'][of]:10,.0f}" for of in MACHINES)
              + f"  {found['may_lose']:14.3f}")
    print("tokens/s, batch 1. may lose: what a dense model of as few bytes loses by the fit of Hoffmann et "
          "al. 2022; a variant that loses more is worth less than that smaller model.")
