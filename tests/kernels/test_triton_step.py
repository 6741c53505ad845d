"""The Triton kernels of a decode step (decode/card.py) equal the model's forward, alone and together - on a
GPU, or in Triton's interpreter - and compile for every GPU."""
import functools
import itertools
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from arms import ARMS, build, from_a_file, tokens
from torch.nn import functional as F
from triton_here import (
    DEVICE,
    TOLERANCE,
    check,
    check_architectures,
    compiled_for,
    cubins,
    depth,
    ids_of,
    interpreted,
    normal,
    steps,
)

import sparse_kernels as kernels
from decode import card, draws, sampling
from decode.context import Cache
from decode.engine import NotWritten
from decode.quantized import quantize
from layers import Packed, settle

PLAIN = dict(COPY=0, ROUTE="", CHOICE="", ALIKE=False, BM=1, BT=1, BLOCK=1)


def product(x, weight, bias=None, onto=None, kind="plain", gain=None, shift=None, act="none", gated=False,
            cap=None, tile=None, scale=None, bits=16, **given):
    """given: arguments of products of chosen units, or that choose; None else."""
    (R, K), N = x.shape, len(weight) // (1 + gated)
    rows = 1 << (R - 1).bit_length()
    tile = tile or steps.product_tile(rows, N, K, gated, False, 1)
    out = torch.empty(R, N, dtype=torch.float32 if cap else x.dtype, device=DEVICE)
    known = dict(x=x, gain=gain, shift=shift, weight=weight, scale=scale, bias=bias, onto=onto, out=out, R=R,
                 N=N, K=K, stride=weight.stride(0), splits=1, eps=1e-5, cap=cap, INPUT=kind, ACT=act,
                 GATED=gated, D=1, BITS=bits) | PLAIN | tile | given
    others = dict.fromkeys(name for name in steps.product_kernel.arg_names if name not in known)
    steps.product_kernel[(-(-N // tile["BN"]),)](**others, **known)
    return out


STEP_ACTS = {"none": lambda y: y, "relu2": lambda y: F.relu(y).square(), "gelu": F.gelu, "silu": F.silu,
             "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_products_of_a_step_equal_norm_matrix_activation_and_residual(dtype):
    """Rows, odd sizes, norms, activations, gates, caps and residuals in turn, none of them always with the
    same other one."""
    shapes = itertools.product((1, 3, 8), ((5, 7), (9, 300), (6, 33)))
    for seed, ((R, (N, K)), act) in enumerate(zip(shapes, itertools.cycle(STEP_ACTS))):
        gated, kind = act == "silu", ("layernorm", "rmsnorm", "plain", "layernorm")[seed % 4]
        x = normal(R, K, seed=seed, dtype=dtype) + 3
        weight = normal(N * (1 + gated), K, seed=1, dtype=dtype) / K ** 0.5
        bias = normal(len(weight), seed=2, dtype=dtype) if seed % 2 else None
        onto = normal(R, N, seed=3, dtype=dtype) if seed % 3 else None
        gain, shift = normal(K, seed=4, dtype=dtype), normal(K, seed=5, dtype=dtype) if seed % 5 else None
        found = product(x, weight, bias, onto, kind, gain, shift, act, gated)
        y = {"plain": lambda x: x, "layernorm": lambda x: F.layer_norm(
                x, (K,), gain.float(), None if shift is None else shift.float(), 1e-5),
             "rmsnorm": lambda x: F.rms_norm(x, (K,), gain.float(), 1e-5) + (0 if shift is None else shift)
             }[kind](x.float())
        y = F.linear(y, weight.float(), None if bias is None else bias.float())
        first, *second = y.chunk(1 + gated, dim=-1)
        y = STEP_ACTS[act](first) * (second[0] if gated else 1) + (0 if onto is None else onto)
        assert found.dtype == dtype
        check(found.float(), y, atol=4 * TOLERANCE[dtype], rtol=4 * TOLERANCE[dtype])
    x, weight = normal(3, 17, seed=1, dtype=dtype) * 9, normal(5, 17, seed=2, dtype=dtype)
    check(product(x, weight, cap=15.0), 15 * torch.tanh((x.float() @ weight.float().t()) / 15), atol=2e-2,
          rtol=1e-2)


def as_read(codes, scale):
    """What quantize has made, as kernels of a step take it: weight, scale and bits."""
    whole = card.Card.whole(SimpleNamespace(vector=lambda bias: bias), codes, scale, 0, None)
    return dict(weight=whole.weight, scale=whole.scale, bits=whole.bits)


@interpreted
@pytest.mark.parametrize("bits", [8, 4])
def test_products_of_whole_numbers_equal_their_reference(bits):
    """Rows of several magnitudes and one of zeros, odd widths, halves of two; inputs as they lie, so that
    they are rounded to the same whole numbers, ties too."""
    for seed, (R, N, K) in enumerate(((1, 5, 7), (3, 3, 300), (8, 3, 64), (8, 2, 130), (1, 2, 96))):
        x = normal(R, K, seed=seed, dtype=torch.float32) * 10.0 ** -torch.arange(R, device=DEVICE)[:, None]
        x[0, :3] = torch.tensor((127.0, 0.5, 1.5))                # the largest is 127: halves go to even
        x[0, 3:] = x[0, 3:].clamp(-9, 9)
        x[R // 2 + 1:R // 2 + 2] = 0
        weight, bias = (normal(2 * N, *width, seed=1, dtype=torch.float32) for width in ((K,), ()))
        codes, scale = kernels.quantize(weight, bits)
        for gated in (False, True):
            onto = normal(R, N * (2 - gated), seed=3, dtype=torch.float32)
            y = kernels.whole_product_reference(x, codes, scale) + bias
            first, *second = y.chunk(1 + gated, dim=-1)
            found = product(x, bias=bias, onto=onto, act="silu" if gated else "none", gated=gated,
                            **as_read(codes, scale))
            check(found, (F.silu(first) * second[0] if gated else first) + onto, atol=1e-4, rtol=1e-4)
        for bad in (torch.nan, torch.inf):
            spoilt = x.clone()
            spoilt[0, K // 2] = bad
            found = product(spoilt, **as_read(codes, scale))
            assert found[0].isnan().all() and torch.equal(found[1:], product(x, **as_read(codes, scale))[1:])


@interpreted
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_whole_numbers_meet_a_norm_as_memory_would_hold_it(kind):
    """An input near a half may be rounded to its other neighbour: no more than that is allowed."""
    x, K = normal(3, 100, seed=0, dtype=torch.float32) + 2, 100
    gain, shift = normal(K, seed=1, dtype=torch.float32), normal(K, seed=2, dtype=torch.float32)
    y = F.rms_norm(x, (K,), gain, 1e-5) if kind == "rmsnorm" else F.layer_norm(x, (K,), gain, shift, 1e-5)
    codes, scale = kernels.quantize(normal(40, K, seed=3, dtype=torch.float32), 8)
    shift = None if kind == "rmsnorm" else shift
    found = product(x, kind=kind, gain=gain, shift=shift, **as_read(codes, scale))
    right = kernels.whole_product_reference(y, codes, scale)
    one = y.abs().amax(1, keepdim=True) / 127 * kernels.dequantize(codes, scale, K).abs().amax(1)
    assert ((found - right).abs() <= 1.01 * one).all()
    assert (found - right).abs().mean() < 0.2 * (right - F.linear(y, kernels.dequantize(codes, scale, K))
                                                 ).abs().mean()


@interpreted
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_product_of_open_groups_reads_their_rows_alone(rows):
    """One gate of a group, zeros and a NaN among them; rows of weights that nobody wants are poisoned. Groups
    that are as wide as several programs, or a part of one."""
    for N, K, width in ((12, 7, 4), (35, 70, 7), (9, 33, 1)):
        x, bias = normal(rows, K, seed=0, dtype=torch.float32), normal(N, seed=1, dtype=torch.float32)
        weight = normal(N, K, seed=2, dtype=torch.float32)
        gates = normal(rows, N // width, seed=3, dtype=torch.float32).sigmoid()
        gates *= normal(rows, N // width, seed=4, dtype=torch.float32) > 0.3
        gates[:, 0] = 0
        each = gates.repeat_interleave(width, dim=1)
        poisoned = torch.where((each != 0).any(dim=0)[:, None], weight, torch.nan)
        assert 0 < (each != 0).sum() < each.numel()
        found = product(x, poisoned, bias, act="relu2", gates=gates, width=width)
        check(found, F.linear(x, weight, bias).relu().square() * each, atol=1e-4, rtol=1e-4)
        gates[-1, -1] = torch.nan
        found = product(x, weight, bias, act="relu2", gates=gates, width=width)
        assert torch.equal(found.isnan(), gates.repeat_interleave(width, dim=1).isnan())


@interpreted
@pytest.mark.parametrize(("rows", "bits"), [(1, 4), (3, 4), (8, 4), (3, 8)])
def test_a_screened_product_computes_the_units_that_its_copy_scores_above_the_edge(rows, bits):
    """No score lies at the edge itself; rows of weights of no token's units are poisoned; a score that is no
    number keeps its unit, and a layer may keep none."""
    for N, K in ((9, 7), (21, 130)):
        x, bias = normal(rows, K, seed=0, dtype=torch.float32), normal(N, seed=1, dtype=torch.float32)
        weight = normal(N, K, seed=2, dtype=torch.float32)
        codes, scale = kernels.quantize(weight, bits)
        copy = as_read(codes, scale)
        scores = kernels.whole_product_reference(x, codes, scale) + bias
        ordered = scores.flatten().sort().values
        edge = ordered[3 * len(ordered) // 4:][:2].mean().item()
        tile = steps.product_tile(1 << (rows - 1).bit_length(), N, K, False, True, 1)
        run = functools.partial(product, bias=bias, act="relu2", tile=tile, copy=copy["weight"],
                                copy_scale=copy["scale"], copy_stride=codes.stride(0), COPY=bits)
        kept = scores > edge
        poisoned = torch.where(kept.any(dim=0)[:, None], weight, torch.nan)
        expected = F.linear(x, weight, bias).relu().square() * kept
        check(run(x, poisoned, edge=edge), expected, atol=1e-3, rtol=1e-4)
        assert poisoned.isnan().any() and (expected != 0).any()
        assert torch.equal(run(x, weight * torch.nan, edge=1e9), torch.zeros(rows, N, device=DEVICE))
        spoilt = x.clone()
        spoilt[-1, K // 2] = torch.nan
        assert torch.equal(run(spoilt, weight, edge=edge).isnan().all(dim=1).cpu(),
                           torch.arange(rows) == rows - 1)


@interpreted
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_last_program_of_a_product_keeps_its_largest_outputs_or_tells_which_they_are(rows):
    """Ties, zeros of both signs, NaN and infinities; blocks that divide the outputs and such that do not."""
    N = 37
    outputs = (normal(N, rows, seed=0, dtype=torch.float32) * 2).round()
    outputs[0], outputs[3, 0], outputs[9, -1] = -0.0, torch.inf, -torch.inf
    arrived = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    every = itertools.product((1, 5, 36), (8, 64)) if rows == 1 else ((1, 8), (5, 64), (36, 8))
    for k, block in every:                       # the interpreter takes 8 s for one at eight rows
        for bad in (0.0, torch.nan):
            w = outputs.clone()
            w[20, 0] += bad
            y = w.t().contiguous()
            run = functools.partial(product, torch.zeros(rows, 3, device=DEVICE),
                                    torch.zeros(N, 3, device=DEVICE), onto=y, arrived=arrived, best=k,
                                    BLOCK=block)
            found = run(CHOICE="largest")
            right = kernels.keep_largest_reference(y, k)
            torch.testing.assert_close(found, right, equal_nan=True, atol=0, rtol=0)
            picked = torch.full((rows, N), 7.0, device=DEVICE)
            run(CHOICE="choose", picked=picked, scores=y, M=N)
            assert torch.equal(picked, kernels.among_largest(y, k).float())
            assert not arrived.any()


@interpreted
@pytest.mark.parametrize(("rows", "M", "k"), [(1, 5, 2), (3, 8, 8), (8, 13, 1)])
def test_the_last_program_opens_the_groups_that_the_modules_open(rows, M, k):
    """Equal scores among them: the first wins; a row of NaN. The modules' own choice is the reference."""
    scores = (normal(rows, M, seed=0, dtype=torch.float32) * 2).round() / 2
    scores[-1, M // 2] = torch.nan
    columns = build(dict(columns=M, columns_active=k, n_embd=2 * M, n_head=1, mlp_units=4 * M)
                    ).transformer.h[0].mlp.gate.to(DEVICE)
    experts = build(dict(experts=M, experts_active=k, n_embd=2 * M, n_head=1, mlp_units=4 * M)
                    ).transformer.h[0].mlp.gate.to(DEVICE)
    columns.balance.data = normal(M, seed=1, dtype=torch.float32).round()
    columns.inhibition.data = normal(M * M, seed=2, dtype=torch.float32) - 2
    columns.router = experts.router = torch.nn.Identity()
    arrived = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    with torch.inference_mode():
        for name, (groups, gates) in (("columns", columns.winners(scores)),
                                      ("experts", experts.chosen(scores[:, None]))):
            picked = torch.full((rows, M), 7.0, device=DEVICE)
            product(scores, torch.zeros(1, M, device=DEVICE), arrived=arrived, picked=picked, scores=scores,
                    inhibits=columns.inhibits(), balance=columns.balance, M=M, best=k, CHOICE=name, BLOCK=16)
            right = torch.zeros_like(picked).scatter(1, groups, gates)
            torch.testing.assert_close(picked[:-1], right[:-1], atol=1e-6, rtol=1e-5)
            assert picked[-1].isnan().sum() == k


@interpreted
@pytest.mark.parametrize(("rows", "heads", "groups", "D", "size", "splits"), [
    (1, 2, 2, 6, 5, 1), (3, 1, 1, 10, 300, 3), (8, 1, 1, 4, 9, 2), (2, 6, 2, 4, 9, 2), (1, 4, 1, 6, 33, 2)])
def test_attention_of_a_step_equals_torch_at_columns_of_its_own_in_a_ring_and_joined(rows, heads, groups, D,
                                                                                    size, splits):
    """Norm, gain, rotation, the key and the value written, queries that share them, and the splits joined by
    the next product."""
    eps, C = 1e-6, heads * D
    qkv = normal(rows, C + 2 * groups * D, seed=0, dtype=torch.float32)
    gain = normal(heads, seed=1, dtype=torch.float32)
    kept = normal(2, rows, groups, size, D, seed=2, dtype=torch.float32)
    start = torch.tensor([0, size + 2, size - 1, 1, 2, 3, 2 * size, 4][8 - rows:] if rows > 1 else [size + 1])
    cos, sin = normal(2, 3 * size, 1, D, seed=3, dtype=torch.float32)
    parts = torch.empty(splits, rows, C, device=DEVICE)
    marks = torch.empty(2, splits, rows, heads, device=DEVICE)
    right, start = kept.clone(), start.to(DEVICE)
    tile = steps.attend_tile(D) | dict(BS=16)
    wide = (heads + 2 * groups) * D
    steps.attend_kernel[(rows * heads, splits)](
        qkv, qkv[:, heads * D:], cos, sin, gain, kept, start, parts, marks, None, rows, heads, groups, size,
        wide, wide, None, eps, D ** -0.5, None, NORM=True, LEFT=False, **tile)
    made = []
    for b, column in enumerate(start.tolist()):
        q, k, v = qkv[b].view(-1, D).split([heads, groups, groups])
        q, k = (F.rms_norm(t, (D,), eps=eps) * cos[column] + F.rms_norm(t, (D,), eps=eps).roll(D // 2, -1)
                * sin[column] for t in (q, k))
        right[:, b, :, column % size] = torch.stack((k, v))
        seen = min(column + 1, size)
        keys, values = right[:, b, :, :seen].repeat_interleave(heads // groups, dim=1)
        made.append(F.scaled_dot_product_attention((q * gain[:, None])[:, None], keys, values))
    check(kept, right, atol=1e-5, rtol=1e-5)
    weight, out = torch.eye(C, device=DEVICE), torch.empty(rows, C, device=DEVICE)
    tile = steps.product_tile(1 << (rows - 1).bit_length(), C, C, False, True, 1)
    steps.product_kernel[(-(-C // tile["BN"]),)](
        parts, marks, None, None, weight, *[None] * 4, out, *[None] * 11, rows, C, C, C, splits, 0.0,
        None, *[None] * 9, INPUT="join", ACT="none", GATED=False, D=D, BITS=16, **PLAIN, **tile)
    check(out, torch.stack(made).view(rows, C), atol=1e-5, rtol=1e-5)


@interpreted
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_rows_of_live_units_are_added_up_and_dead_ones_are_not_read(rows):
    for N, C, shares in ((5, 7, 1), (70, 65, 3)):
        a = normal(rows, N, seed=0, dtype=torch.float32) * (normal(N, seed=1, dtype=torch.float32) > 0)
        weight, bias = normal(N, C, seed=2, dtype=torch.float32), normal(C, seed=3, dtype=torch.float32)
        onto = normal(rows, C, seed=4, dtype=torch.float32)
        expected = a @ weight + bias + onto
        tile, columns, _, _ = steps.down_tile(1 << (rows - 1).bit_length(), N, C, 1)
        share = -(-N // shares // tile["BU"]) * tile["BU"]
        shares = -(-N // share)
        parts, out = torch.empty(shares, rows, C, device=DEVICE), torch.empty(rows, C, device=DEVICE)
        arrived = torch.zeros(columns, dtype=torch.int32, device=DEVICE)
        for dead, everything in ((0.0, True), (torch.nan, False)):
            poisoned = torch.where((a != 0).any(dim=0)[:, None], weight, weight * 0 + dead)
            steps.down_kernel[(columns, shares)](
                a, None, poisoned, None, bias, None, onto, out, parts, arrived, rows, N, C, C, share, 0,
                None, C, ALL=everything, BITS=16, GROUP=0, **tile)
            check(out, expected, atol=1e-4, rtol=1e-4)
            assert not arrived.any()                      # ready for the next step


@interpreted
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_units_in_whole_numbers_are_added_up(bits):
    """Inputs are not rounded; a scale that is not finite shows where all rows are read, and only there."""
    for rows, N, C in ((1, 5, 7), (3, 70, 65)):
        a = normal(rows, N, seed=0, dtype=torch.float32) * (normal(N, seed=1, dtype=torch.float32) > 0)
        weight = normal(N, C, seed=2, dtype=torch.float32)
        weight[(~(a != 0).any(dim=0)).nonzero()[0]] = torch.nan
        bias, across = normal(C, seed=3, dtype=torch.float32), 2.0 ** (torch.arange(C, device=DEVICE) % 5 - 2)
        codes, scale = kernels.quantize(weight, bits)
        tile, columns, shares, share = steps.down_tile(1 << (rows - 1).bit_length(), N, C, 1)
        parts, out = torch.empty(shares, rows, C, device=DEVICE), torch.empty(rows, C, device=DEVICE)
        arrived, read = torch.zeros(columns, dtype=torch.int32, device=DEVICE), as_read(codes, scale)
        for everything in (True, False):
            steps.down_kernel[(columns, shares)](
                a, None, read["weight"], read["scale"], bias, across, None, out, parts, arrived, rows, N, C,
                codes.stride(0), share, 0, None, C, ALL=everything, BITS=bits, GROUP=0, **tile)
            assert out.isnan().all() == everything
        expected = a @ kernels.dequantize(codes, scale, C).nan_to_num(0)
        check(out, expected * across + bias, atol=1e-4, rtol=1e-4)


@interpreted
def test_rows_of_units_whose_gate_is_shut_are_not_read_and_nan_passes_a_gate():
    a, edges = normal(3, 40, seed=0, dtype=torch.float32), normal(40, seed=1, dtype=torch.float32).exp()
    a[1, 7], edges[7] = edges[7], edges[7].clone()            # no larger than its edge: shut
    open_ = a.abs() > edges
    assert 10 < open_.sum() < 110 and not open_[1, 7]
    weight = normal(40, 9, seed=2, dtype=torch.float32)
    expected = (a * open_) @ weight
    poisoned = torch.where(open_.any(dim=0)[:, None], weight, torch.nan)
    assert poisoned.isnan().any()
    tile, columns, shares, share = steps.down_tile(4, 40, 9, 1)
    parts, out = torch.empty(shares, 3, 9, device=DEVICE), torch.empty(3, 9, device=DEVICE)
    arrived = torch.zeros(columns, dtype=torch.int32, device=DEVICE)

    def run(a, weight):
        steps.down_kernel[(columns, shares)](a, edges, weight, None, None, None, None, out, parts, arrived, 3,
                                             40, 9, 9, share, 0, None, 9, ALL=False, BITS=16, GROUP=0, **tile)
        return out

    check(run(a, poisoned), expected, atol=1e-4, rtol=1e-4)
    a[2, 3] = torch.nan
    assert torch.equal(run(a, weight).isnan().all(dim=1).cpu(), torch.tensor([False, False, True]))


@interpreted
def test_for_rows_that_do_not_go_on_nothing_is_stored_and_where_none_does_nothing_is_read():
    x, weight = normal(3, 40, seed=1, dtype=torch.float32), normal(9, 40, seed=2, dtype=torch.float32)
    tile = steps.product_tile(4, 9, 40, False, False, 100)
    assert tile["BN"] == 1
    for going, always in itertools.product(([0, 0, 0], [0, 1, 0], [1, 1, 1]), (9, 6)):
        live = torch.tensor(going, dtype=torch.int32, device=DEVICE)
        unread = weight.clone()
        unread[:always] = torch.nan if not any(going) else weight[:always]
        out = torch.full((3, 9), 7.0, device=DEVICE)
        product(x, unread, out=out, live=live, always=always, tile=tile)
        stored = live[:, None].bool() | (torch.arange(9, device=DEVICE) >= always)
        right = torch.where(stored, x @ weight.t(), 7)
        check(out, right, atol=1e-5, rtol=1e-5)
        tile_down, columns, shares, share = steps.down_tile(4, 40, 9, 1)
        parts, out = torch.empty(shares, 3, 9, device=DEVICE), torch.full((3, 9), 7.0, device=DEVICE)
        down = weight.t().contiguous() * (1 if any(going) or always < 9 else torch.nan)
        steps.down_kernel[(columns, shares)](
            x, None, down, None, None, None, None, out, parts, torch.zeros(columns, dtype=torch.int32,
            device=DEVICE), 3, 40, 9, 9, share, 0, live, always, ALL=True, BITS=16, GROUP=0, **tile_down)
        check(out, right, atol=1e-5, rtol=1e-5)


STEP_ARMS = {"gpt2": {}, "modern": dict(norm="rmsnorm", bias=False, pos="rope", act="relu2", qk_norm=True,
                                        qk_gain=2.0, window=3, window_pattern="S"),
             "swiglu": dict(act="swiglu", softcap=15.0, tie_weights=False),
             "tanh": dict(act="gelu_tanh", mlp_units=24, pos="rope"),
             "gate": dict(event_gate=True, act="relu2"), "gated": dict(event_gate=True, act="swiglu"),
             "topk": dict(mlp_topk=0.25), "winners": dict(mlp_topk=0.5, mlp_topk_group=4, act="swiglu"),
             "screen": dict(act="relu2", mlp_screen=4, mlp_live=0.25),
             "screen in 8": dict(act="relu2", mlp_screen=8, mlp_live=0.25, norm="rmsnorm"),
             "columns": dict(columns=8, columns_active=2, act="relu2"),
             "columns_topk": dict(columns=5, columns_active=2, mlp_units=80, mlp_topk=0.25, norm="rmsnorm"),
             "experts": dict(experts=4, experts_active=2),
             "experts_group": dict(experts=3, experts_active=1, mlp_units=48, mlp_topk=0.5, mlp_topk_group=4),
             "predict": dict(mlp_topk=0.25, mlp_predict=4),
             "llama": dict(act="swiglu", norm="rmsnorm", bias=False, pos="rope", n_head=4, n_kv_head=2),
             "osc": dict(act="osc", norm="rmsnorm"),
             "osc columns": dict(act="osc", columns=4, columns_active=2),
             "ngram": dict(ngram_buckets=50, ngram_order=3),
             "adapters": dict(adapters="a,b", adapter_width=4),
             "gate first": dict(act="swiglu", gate_first=True, mlp_topk=0.25),
             "gate first, events": dict(act="swiglu", gate_first=True, event_gate=True),
             "screened gates": dict(act="swiglu", mlp_screen=4, mlp_live=0.5),
             "gates' screen": dict(act="swiglu", mlp_screen=16, mlp_live=0.5),
             "dendrites": dict(dendrites=4, dendrites_active=2, act="relu2"),
             "dendrites, rope": dict(dendrites=2, dendrites_active=1, pos="rope", qk_norm=True, window=3),
             "attn_topk": dict(attn_topk=0.5, norm="rmsnorm"),
             "compartments": dict(compartments=4, act="relu2", mlp_topk=0.5),
             "compartments, osc": dict(compartments=2, act="osc", bias=False)}
LAUNCHES = {"predict": 6, "adapters": 7, "gate first": 6, "gate first, events": 6, "screened gates": 7,
            "gates' screen": 6, "dendrites": 8, "dendrites, rope": 8, "attn_topk": 7,
            "compartments": 8, "compartments, osc": 7}                       # of a layer; 5 of all others
DEPTH_ARMS = {"exits": dict(exits="1,2", n_layer=3), "exits, windows": dict(
                  exits="1", n_layer=2, window=3, pos="rope", qk_norm=True, act="relu2", adapters="a"),
              "exits, columns": dict(exits="1", n_layer=2, columns=4, columns_active=1, act="relu2"),
              "exits, screen": dict(exits="1,2", n_layer=3, act="relu2", mlp_screen=4, mlp_live=0.25),
              "exits, dendrites": dict(exits="1", n_layer=2, dendrites=4, dendrites_active=2),
              "exits, attn_topk": dict(exits="1,2", n_layer=3, attn_topk=0.5, norm="rmsnorm", pos="rope"),
              "ponder": dict(ponder=3, n_layer=1),
              "ponder, windows": dict(ponder=2, n_layer=2, window=3, norm="rmsnorm"),
              "ponder, units": dict(ponder=3, n_layer=1, act="swiglu", mlp_topk=0.5, n_head=4, n_kv_head=2),
              "hierarchy": dict(hierarchy=3, n_layer=3),
              "hierarchy, ponder": dict(hierarchy=2, ponder=2, n_layer=3, norm="rmsnorm", pos="rope")}


def compared(model, rows, monkeypatch, launches=5):
    """Two steps on a card and by forward, each row at a column of its own, some past their window: (logits of
    the one, of the other), caches. The launches are those that it counts, so many a layer."""
    monkeypatch.setattr(steps, "PRODUCTS", dict.fromkeys((1, 2, 4, 8), (64, 64)))    # interpreted sooner
    launched, pairs = Counter(), []
    for home, names in ((steps, ("embed", "product", "attend", "input", "mix", "down")),
                        (depth, ("leave", "halt", "group", "spread"))):
        for name in names:
            kernel = getattr(home, f"{name}_kernel")
            monkeypatch.setattr(home, f"{name}_kernel", Counted(kernel, launched))
    history, ends = tokens(rows, 16).to(DEVICE), [5, 3, 7, 2, 8, 4, 6, 9][:rows]
    with torch.inference_mode():
        mine, other = Cache(model, rows, 16), Cache(model, rows, 16)
        for cache in (mine, other):
            sampling.read(model, cache, history, [0] * rows, [end - 1 for end in ends], False)
        forward = sampling.Step(model, other, history, 29)
        step = card.Card(model, mine, history, forward.start, 29)
        step.begin()
        for more in range(2):
            forward.start.copy_(torch.tensor(ends) - 1 + more)
            before = counted(model)
            pairs.append((step.step().clone(), model.head(forward.states())[:, :29]))
            of_forward = counted(model) - before
            step.tell()
            of_both = counted(model) - before    # forward runs all rows where one's group is complete
            assert of_both == of_forward + of_forward or model.config.hierarchy
    layers = Counter(" ".join(part.split()[:2]) for _, part in step.launches)
    if launches:
        assert layers.pop("layer 0") == launches and sum(layers.values()) <= 5
    assert launched == step.ran and launched.total() == 2 * len(step.launches)
    return pairs, zip(mine.layers, other.layers)


def counted(model):
    """What a model's modules count of what tokens run."""
    names = "layers_run", "tokens_run", "steps_run"
    return Counter({name: getattr(module, name) for module in model.modules() for name in names
                    if hasattr(module, name)})


@interpreted
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("arm", DEPTH_ARMS)
def test_tokens_part_ways_on_a_card_as_in_forward(arm, rows, monkeypatch):
    """Some rows leave or halt where others go on, each at a column of its own; what a step counts; the keys
    and values of those that have left."""
    model = build(DEPTH_ARMS[arm], std=0.2).to(DEVICE).use_policy().choose(leave_at=0.5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "probes" in name or "halt" in name:       # sure, of some rows this, of others that
                p.mul_(0 if name.endswith("bias") else 40 if "windows" in arm else 10)
    pairs, caches = compared(model, rows, monkeypatch, None)
    runs, c = counted(model), model.config
    if rows == 8 and not c.hierarchy:            # some, and not all
        per_token = (runs["layers_run"] + runs["steps_run"]) / runs["tokens_run"]
        assert (c.exit_layers()[0] if c.exits else 1) < per_token < (c.n_layer if c.exits else c.ponder)
    for found, right in pairs:
        check(found, right, atol=1e-4, rtol=0)
        assert torch.equal(found.argmax(-1), right.argmax(-1))
    for kept, written in caches:
        if not model.config.hierarchy or kept.size(3) == 16:
            check(kept, written, atol=1e-5, rtol=1e-5)


@interpreted
@pytest.mark.parametrize(("arm", "rows"), [
    *zip(STEP_ARMS, (3, 8, 1, 2, 2, 1, 3, 2, 1, 3, 2, 3, 1, 8, 3, 3, 2, 1, 3, 2, 1, 3, 2, 1, 3, 8, 2, 3, 1),
         strict=True), ("screen", 8), ("dendrites", 1), ("attn_topk", 1),
    ("columns", 1), ("experts", 8), ("predict", 1), ("gates' screen", 3), ("gate first, events", 8)])
def test_a_step_on_a_card_gives_the_logits_of_forward_in_few_launches_a_layer(arm, rows, monkeypatch):
    """With the policy, where a model has one."""
    model = build(STEP_ARMS[arm], std=0.2, n_layer=1).to(DEVICE).use_policy()
    pairs, caches = compared(model, rows, monkeypatch, LAUNCHES.get(arm, 5))
    for found, right in pairs:
        check(found, right, atol=1e-4, rtol=0)
        assert torch.equal(found.argmax(-1), right.argmax(-1))
    for kept, written in caches:
        check(kept, written, atol=1e-5, rtol=1e-5)


@interpreted
@pytest.mark.parametrize(("arm", "kind", "rows"), [
    ("gpt2", "int8", 3), ("gpt2", "q4_all", 1), ("modern", "int4", 8), ("swiglu", "q4_all", 2),
    ("swiglu", "int8", 1), ("gate", "int4", 3), ("tanh", "mlp=4,head=8", 2), ("screen", "int8", 3),
    ("screen", "int4", 2), ("columns", "int8", 3), ("predict", "int4", 1), ("topk", "int4", 3),
    ("llama", "int8", 2), ("osc", "int4", 1), ("ngram", "q4_all", 3), ("gate first", "int8", 2),
    ("screened gates", "int8", 1), ("screened gates", "int4", 3), ("llama", "own", 1), ("gpt2", "own", 3)])
def test_a_step_on_a_card_in_whole_numbers_gives_the_logits_of_forward(arm, kind, rows, monkeypatch):
    """Inputs are rounded behind norms and joined splits, a tied embedding reads whole numbers too. One near a
    half may go to its other neighbour: a row here and there is further away."""
    if kind == "own":
        model = from_a_file(STEP_ARMS[arm], n_layer=1, n_embd=64)
    else:
        model = build(STEP_ARMS[arm], std=0.2, n_layer=1)
    model = quantize(model, kind).to(DEVICE).use_policy()
    own_copy = (arm, kind) == ("screened gates", "int4")
    pairs, caches = compared(model, rows, monkeypatch, LAUNCHES.get(arm, 5) - own_copy)
    found, right = map(torch.cat, zip(*pairs))
    apart = (found - right).abs().amax(dim=1)
    assert apart.quantile(0.5) <= 1e-4 and apart.max() <= 2e-2, apart
    for kept, written in caches:
        check(kept, written, atol=2e-2, rtol=0)


@interpreted
@pytest.mark.parametrize(("arm", "rows"), [
    ("gpt2", 3), ("swiglu", 1), ("llama", 8), ("topk", 2), ("columns", 1)])
def test_a_step_on_a_card_reads_packed_weights(arm, rows, monkeypatch):
    """Two of four, as pack_24 lays them, in every product that has them."""
    monkeypatch.setattr("kernels.picked.wanted", lambda device, whole=False: False)
    shape = dict(n_embd=40, mlp_units=96) if arm == "columns" else dict(n_embd=40, n_head=4)
    model = settle(build(STEP_ARMS[arm] | dict(weights="2:4"), std=0.2, n_layer=1, **shape))
    assert sum(isinstance(module, Packed) for module in model.modules()) >= 2
    pairs, caches = compared(model.to(DEVICE).use_policy(), rows, monkeypatch)
    for found, right in pairs:
        check(found, right, atol=2e-4, rtol=0)
        assert torch.equal(found.argmax(-1), right.argmax(-1))
    for kept, written in caches:
        check(kept, written, atol=1e-5, rtol=1e-5)


@interpreted
@pytest.mark.parametrize("gated", [False, True])
def test_a_packed_product_in_8_bits_is_the_one_of_all_its_whole_numbers(gated):
    """Those that are not kept are zeros: the same sums, of odd widths and of inputs that are not finite."""
    codes, scale = kernels.quantize(kernels.prune_24(normal(6, 52, seed=1, dtype=torch.float32)), 8)
    values, meta = kernels.pack_24(codes[:, :52].cpu().view(torch.int8))
    x = normal(3, 52, seed=3, dtype=torch.float32)
    x[1, 7] = torch.inf
    by = scale.view(torch.float32).to(DEVICE)
    found = product(x, values.to(DEVICE), scale=by, places=meta.to(DEVICE), bits=8, gated=gated)
    right = product(x, codes.view(torch.int8).to(DEVICE), scale=by, bits=8, gated=gated)
    assert values.dtype == torch.int8 and values.size(1) < 52
    check(found[::2], right[::2], atol=1e-5, rtol=1e-5)
    assert found[1].isnan().all() and right[1].isnan().all()


@interpreted
@pytest.mark.parametrize(("arm", "rows"), [("gpt2", 2), ("swiglu", 1), ("llama", 8)])
def test_a_step_on_a_card_reads_packed_weights_of_8_bits(arm, rows, monkeypatch):
    places = steps.product_kernel.arg_names.index("places")
    model = build(STEP_ARMS[arm] | dict(weights="2:4"), std=0.2, n_layer=1, n_embd=40, n_head=4)
    model = quantize(settle(model), "int8").to(DEVICE).use_policy()
    pairs, caches = compared(model, rows, monkeypatch)
    for found, right in pairs:
        check(found, right, atol=2e-4, rtol=0)
    for kept, written in caches:
        check(kept, written, atol=1e-4, rtol=1e-4)
    history = tokens(rows, 8).to(DEVICE)
    step = card.Card(model, Cache(model, rows, 8), history, history[:, 0] * 0, 31)
    packed = [options["BITS"] for kernel, _, arguments, options in step.calls
              if kernel.fn.__name__ == "product_kernel" and arguments[places] is not None]
    assert len(packed) >= 2 and set(packed) == {8}


@interpreted
def test_a_product_of_a_step_ends_with_an_osc_of_any_size():
    """sin(w y + phi) tanh(y) + b, where the sine's argument goes through hundreds of turns too."""
    weight, x = normal(7, 20, seed=1, dtype=torch.float32) * 30, normal(3, 20, seed=2, dtype=torch.float32)
    waves = normal(3, 7, seed=3, dtype=torch.float32) * 5
    x[2, 0], y = torch.nan, x @ weight.t()
    right = torch.sin((waves[0] * y).double() + waves[1]) * torch.tanh(y) + waves[2]
    out = product(x, weight, waves=waves)
    check(out[:2], right[:2].float(), atol=5e-4, rtol=0)                 # by the rounding of w y
    assert (waves[0] * y)[:2].abs().max() > 500 and out[2].isnan().all()


@interpreted
@pytest.mark.parametrize("gated", [False, True])
def test_a_packed_product_of_a_step_equals_the_dense_one_of_what_it_unpacks_to(gated):
    """Of odd widths; where an input is not finite, neither is what comes out."""
    weight = kernels.prune_24(normal(6, 52, seed=1, dtype=torch.float32))
    values, meta = kernels.pack_24(weight.cpu())
    x = normal(2, 52, seed=3, dtype=torch.float32)
    x[1, 7] = torch.inf
    out = product(x, values.to(DEVICE), places=meta.to(DEVICE), gated=gated)
    right = x @ weight.t()
    check(out[0], (right[0, :3] * right[0, 3:]) if gated else right[0], atol=1e-5, rtol=1e-5)
    assert not out[1].isfinite().any()


class Counted:
    """A kernel whose launches are counted."""

    def __init__(self, kernel, launched):
        self.kernel, self.launched, self.fn = kernel, launched, kernel.fn

    def __getitem__(self, grid):
        self.launched[self.fn.__name__] += 1
        return self.kernel[grid]


def refusal(model, rows=1):
    """Why a model has no step of these kernels; empty where it has one."""
    model, history = model.to(DEVICE), tokens(rows, 8).to(DEVICE)
    try:
        card.Card(model, Cache(model, rows, 8), history, history[:, 0] * 0, 31)
        return ""
    except NotWritten as reason:
        assert reason.args[0]
        return reason.args[0]


def test_a_model_that_the_card_does_not_cover_says_why_in_a_sentence():
    covered = {name for name, arm in ARMS.items() if not refusal(build(arm))}
    assert covered >= {"gpt2", "no_bias", "rmsnorm", "rope", "rope_theta", "rope_factor", "norm_eps",
                       "qk_norm", "qk_gain", "relu2", "swiglu", "softcap", "zero_init", "untied", "units",
                       "window", "window_pattern", "screen", "event_gate", "topk", "winners", "columns",
                       "experts", "predict", "osc", "ngram", "adapters", "grouped", "gate_first"}
    assert covered >= {"exits", "hierarchy", "ponder", "dendrites", "attn_topk", "compartments"}
    assert not refusal(build(ARMS["exits"]).use_policy())
    assert not refusal(build(dict(exits="1", n_layer=2, attn_topk=0.5)).use_policy())
    assert "65 groups" in refusal(build(dict(columns=65, columns_active=2, mlp_units=130)))
    model = build({})
    assert "9 rows" in refusal(model, 9)
    model.compute_dtype = torch.bfloat16
    assert "float32" in refusal(model)
    history = tokens(1, 8)
    assert "CUDA card" in str(card.card_of(build({}), Cache(model, 1, 8), history, history[:, 0] * 0, 31))


HOWS = {"greedy": dict(temperature=0), "penalty": dict(temperature=0, repetition_penalty=2.0), "plain": {},
        "cold": dict(temperature=0.7, min_p=0.1), "top_k": dict(top_k=5), "many": dict(top_k=99),
        "both": dict(top_k=3, top_p=0.8), "top_p": dict(top_p=0.6, repetition_penalty=1.3),
        "all": dict(top_k=40, top_p=0.9, min_p=0.02, temperature=1.5, repetition_penalty=1.1)}


def drawn(sampler, key, logits, columns, seen):
    """What a card draws of logits (R, V) for columns -> ids (R, 1), are they fine?, where rows stand then."""
    history = torch.full((len(logits), 99), -1, device=DEVICE)
    start = torch.tensor(columns, device=DEVICE) - 1
    made = card.Card.__new__(card.Card)
    made.__dict__ = dict(draws=draws.settings(sampler, key, seen), seen=seen, history=history, start=start,
                         answer=logits, ids_of=ids_of, calls=[], launches=[], module="", last=None)
    made.draw()
    for kernel, grid, arguments, options in made.calls:
        kernel[grid](*arguments, **options)
    ids = history.gather(1, torch.tensor(columns, device=DEVICE)[:, None])
    assert (history != -1).sum() == len(logits)
    return ids, made.fine.item(), start.tolist()


@interpreted
@pytest.mark.parametrize("how", HOWS)
def test_a_card_draws_what_the_decode_engine_draws(how):
    """Vocabularies of one block and of several, distinct logits and equal ones, keys of 64 bits; ids that are
    seen; the same columns of other rows give other ids."""
    torch.manual_seed(0)
    sampler, columns = sampling.Sampler(**HOWS[how], draws="engine"), [4, 9, 2]
    for V, halves in ((5, 2), (31, 1), (300, 4), (4500, 1)):
        logits = (torch.randn(3, V) * 3 * halves).round() / halves
        seen, key = torch.rand(3, V + 1) < 0.3, int(torch.randint(2 ** 62, ())) + V
        expected = draws.draw(sampler, key, columns, logits, seen)
        noted = seen.clone().to(DEVICE)
        ids, fine, places = drawn(sampler, key, logits.to(DEVICE), columns, noted)
        assert torch.equal(ids.cpu(), expected) and fine and places == columns
        if sampler.repetition_penalty != 1:
            assert torch.equal(noted.cpu(), seen.scatter(1, expected, True))
    for bad in (torch.nan, torch.inf):
        logits[1, 7] = bad
        assert not drawn(sampler, key, logits.to(DEVICE), columns, seen.to(DEVICE))[1]


@interpreted
@pytest.mark.parametrize(("how", "arm"), [
    ("greedy", {}), ("all", {}), *(("greedy", DEPTH_ARMS[name]) for name in (
        "exits, columns", "ponder, units", "hierarchy, ponder"))], ids=str)
def test_a_stream_on_a_card_gives_the_ids_of_the_decode_engine_a_few_at_a_time(how, arm, monkeypatch):
    """Prompts of two lengths, to the window's end and past it; the first column that is not drawn by a step
    is the sampler's. What tokens run is counted alike."""
    model, prompt = build(dict(n_layer=1) | arm, std=0.3).to(DEVICE).use_policy(), tokens(2, 6).to(DEVICE)
    model.choose(leave_at=0.5)
    monkeypatch.setattr(steps, "PRODUCTS", dict.fromkeys((1, 2, 4, 8), (64, 64)))    # interpreted sooner

    def streamed(choices):
        torch.manual_seed(1)
        sampler, before = sampling.Sampler(**HOWS[how], draws="engine", vocab_size=29), counted(model)
        ids = torch.cat([*sampling.stream(model, prompt, 13, sampler, [6, 3], "slide", choices)], 1)
        return ids.tolist(), counted(model) - before if "hierarchy" not in arm else None

    expected, waits = streamed(model.chosen(2)), []
    monkeypatch.setattr(card, "card_of", lambda *arguments: card.Card(*arguments))
    monkeypatch.setattr(sampling, "recorded_step", sampling.Step)
    advance = sampling.Step.advance
    monkeypatch.setattr(sampling.Step, "advance",
                        lambda step, ends, count: (waits.append(count), advance(step, ends, count))[1])
    assert streamed(model.chosen(2)._replace(forward="a card's step")) == expected
    assert waits == [8, 2]


@interpreted
def test_a_stream_on_a_card_stops_where_logits_are_not_finite(monkeypatch):
    model, prompt = build({}, std=0.3, n_layer=1).to(DEVICE), tokens(1, 3).to(DEVICE)
    monkeypatch.setattr(card, "card_of", lambda *arguments: card.Card(*arguments))
    monkeypatch.setattr(sampling, "recorded_step", sampling.Step)
    choices = model.chosen(1)._replace(forward="a card's step")
    stream = sampling.stream(model, prompt, 9, sampling.Sampler(temperature=0), choices=choices)
    next(stream)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(torch.nan)
    with pytest.raises(sampling.Damaged):
        next(stream)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's NVIDIA compiler comes with Linux wheels")
@compiled_for
def test_the_kernels_of_a_step_compile_for_every_gpu_without_spills(tmp_path, architectures):
    found = cubins(tmp_path, "step", *([] if architectures else ["every"]), *architectures)
    check_architectures(found, architectures)
    assert {row["kernel"] for row in found} == {
        f"step {name}_kernel" for name in ("embed", "product", "attend", "input", "mix", "down", "sift",
                                           "draw", "leave", "halt", "group", "spread")}
    products = [row for row in found if row["kernel"] == "step product_kernel"]
    assert {row["bits"] for row in products} == {16, 8, 5, 4}
    assert {row["bits"] for row in products if row["packed"]} == {16, 8}
    assert sum(row["chooses"] for row in products) >= 7 * len(architectures or range(5))
    for row in found:
        assert row["stack"] == row["local"] == row["spills"] == 0, row
        assert row["reg"] <= 128 and row["products"] >= 1 and row["shared"] <= 101376, row
        eight_bytes = row["chooses"] and (row["bits"] or 16) < 16     # a lane's share of half the inputs
        if row["kernel"][5:] not in ("embed_kernel", "draw_kernel", "mix_kernel") and not eight_bytes:
            assert row["wide_loads"] >= 1, row
