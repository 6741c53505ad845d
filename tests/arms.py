"""The table of arms: a row for every flag that changes the model; every property test runs over all rows.

An arm is the keyword arguments that turn it on, over TINY.
"""
import itertools

import torch

from decode import calibrate
from decode.quantized import PARTS, whole_parts
from model import GPT, GPTConfig

torch.set_num_threads(1)                        # tiny tensors: a second thread only waits

TINY = dict(block_size=16, vocab_size=31, n_layer=2, n_head=2, n_embd=16)

ARMS = {
    "gpt2": {},
    "no_bias": dict(bias=False),
    "rmsnorm": dict(norm="rmsnorm"),
    "rope": dict(pos="rope"),
    "rope_theta": dict(pos="rope", rope_theta=100.0),
    "rope_factor": dict(pos="rope", rope_theta=100.0, rope_factor=4.0, rope_original=32),
    "norm_eps": dict(norm_eps=0.01),
    "grouped": dict(n_kv_head=1),
    "qk_norm": dict(qk_norm=True),
    "qk_gain": dict(qk_norm=True, qk_gain=2.0),
    "relu2": dict(act="relu2"),
    "swiglu": dict(act="swiglu"),
    "osc": dict(act="osc"),
    "gelu_tanh": dict(act="gelu_tanh"),
    "softcap": dict(softcap=15.0),
    "zero_init": dict(zero_init=True),
    "untied": dict(tie_weights=False),
    "ngram": dict(ngram_buckets=64, ngram_order=4),
    "recompute": dict(recompute=True),
    "loss_chunks": dict(loss_chunks=3),
    "units": dict(mlp_units=48),
    "topk": dict(mlp_topk=0.25),
    "gate_first": dict(act="swiglu", mlp_topk=0.25, gate_first=True),
    "winners": dict(mlp_topk=0.5, mlp_topk_group=4),
    "event_gate": dict(event_gate=True),
    "columns": dict(columns=8, columns_active=2),
    "compartments": dict(compartments=4),
    "experts": dict(experts=4, experts_active=2),
    "predict": dict(mlp_topk=0.25, mlp_predict=4),
    "mlp_screen": dict(act="relu2", mlp_screen=4, mlp_live=0.25),
    "screened_gates": dict(act="swiglu", mlp_screen=4, mlp_live=0.5),
    "window": dict(window=3, window_pattern="S"),
    "window_pattern": dict(window=5, window_pattern="SL"),
    "dendrites": dict(dendrites=4, dendrites_active=2),
    "hierarchy": dict(hierarchy=3, n_layer=3),
    "exits": dict(exits="1,2", n_layer=3, layer_dropout=0.3),
    "ponder": dict(ponder=3),
    "two_of_four": dict(weights="2:4"),
    "attn_topk": dict(attn_topk=0.5),
    "screen": dict(screen=True),
    "adapters": dict(adapters="one", adapter_width=4),
    "energy": dict(dendrites=4, dendrites_active=2, energy_budget=0.3),
}

# different MLPs, or two rules for which units fire: construction names both flags
KINDS = ("swiglu", "gate_first", "columns", "compartments", "experts", "predict", "mlp_screen",
         "screened_gates")
RULES = (*((rule, screen) for screen in ("mlp_screen", "screened_gates")
           for rule in ("topk", "winners", "event_gate")),
         ("topk", "event_gate"), ("winners", "event_gate"), ("topk", "experts"), ("event_gate", "predict"),
         ("winners", "predict"), ("gate_first", "event_gate"))
CONFLICTS = {*itertools.combinations(KINDS, 2), *RULES} - {
    ("swiglu", "gate_first"), ("swiglu", "mlp_screen"), ("swiglu", "screened_gates"),
    ("mlp_screen", "screened_gates"), ("gate_first", "mlp_screen")} | {
             ("hierarchy", "exits"), ("exits", "ponder"), ("loss_chunks", "exits"),
             ("dendrites", "attn_topk"), ("softcap", "screen")}
SAME_FLAG = {("window", "window_pattern"), ("rope", "rope_theta"), ("rope", "rope_factor"),
             ("rope_theta", "rope_factor"), ("qk_norm", "qk_gain"), ("dendrites", "energy"),
             ("attn_topk", "energy"),
             ("swiglu", "gate_first"), ("topk", "gate_first"),
             ("mlp_screen", "screened_gates"), ("gate_first", "mlp_screen"),
             *itertools.product(("relu2", "osc", "gelu_tanh"),
                                ("gate_first", "mlp_screen", "screened_gates")),
             *itertools.product(("swiglu",), ("mlp_screen", "screened_gates"))}
PAIRS = {f"{a}+{b}": ARMS[a] | ARMS[b] for a, b in itertools.combinations(ARMS, 2) 
         if (a, b) not in CONFLICTS | SAME_FLAG}


def build(arm, std=None, **changes):
    """The tiny model of an arm in eval mode; std redraws every weight, because a tiny init hides leaks."""
    model = GPT(GPTConfig(**TINY | arm | changes), seed=1).eval()
    if std:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * std)
    if calibrate.screened(model):
        calibrate.calibrate(model, tokens(8, 16, seed=3), model.config.mlp_live)
    return model


def from_a_file(flags, parts=("attn", "mlp", "head"), seed=0, **changes):
    """A model whose matrices of these parts lie on levels, as those of a GGUF file of 4 bits."""
    model, generator = build(flags, std=0.2, **changes), torch.Generator().manual_seed(seed)
    for place, module, name, _ in whole_parts(model):
        weight = getattr(module, name).weight
        if PARTS[place] in parts and weight.size(1) % 32 == 0:
            q = torch.randint(16, (len(weight), weight.size(1) // 32, 32), generator=generator)
            step = torch.rand(*q.shape[:2], 1, generator=generator).half().float() / 16
            low = (-step * (4 + 8 * torch.rand(*q.shape[:2], 1, generator=generator))).half().float()
            with torch.no_grad():
                weight.copy_((q * step + low).flatten(1))
    return model


def tokens(rows, length, seed=0):
    return torch.randint(TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))
