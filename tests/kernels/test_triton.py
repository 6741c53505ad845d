"""Every Triton kernel equals its reference - on a GPU, or in Triton's interpreter - and its machine code for
every GPU is what it was designed to be."""
import functools
import itertools
import random
import sys

import pytest
import torch
from triton_here import (
    DEVICE,
    TOLERANCE,
    check,
    check_architectures,
    compiled_for,
    cubins,
    gpu,
    interpreted,
    normal,
)
from warps import run as run_warps

import sparse_kernels as kernels

ACTS = list(kernels.ACTS)


def exact(reference, *arguments):
    """The reference in fp32: the interpreter's arithmetic in bf16 is wrong."""
    return reference(*(t.float() if torch.is_tensor(t) and t.is_floating_point() else t for t in arguments))


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_packed_product_equals_its_reference_over_56_shapes(dtype):
    for seed, (N, K, M) in enumerate(itertools.product((1, 3, 17, 40), (4, 36, 100, 256), (1, 2, 17, 33))):
        if M == 33 and seed % 3:
            continue
        weight = kernels.prune_24(normal(N, K, seed=seed, dtype=torch.float32) / K ** 0.5).to(dtype)
        values, meta = kernels.pack_24(weight)
        x = normal(K, M, seed=seed + 1, dtype=dtype).t() if seed % 2 else normal(M, K, seed=seed, dtype=dtype)
        bias, onto = normal(N, seed=seed + 2, dtype=dtype), normal(M, N, seed=seed + 3, dtype=dtype)
        rest = (bias if seed % 3 else None, onto if seed % 4 else None, ACTS[seed % 3])
        found = gpu.linear_24(x, values, meta, *rest)
        assert found.dtype == dtype
        right = exact(kernels.linear_24_reference, x, values, meta, *rest)
        check(found.float(), right, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gathered_units_equal_their_references_over_38_shapes(dtype):
    """Units one by one and in groups, none of them, all of them; zeros in `a` are rows that are not read."""
    shapes = itertools.product((1, 3), (5, 64, 300), ((1, 40), (4, 6), (16, 3)), (0, 1, "all"))
    for seed, (B, C, (width, count), k) in enumerate(shapes):
        if seed % 3 == 2 and k:
            continue
        k, units, tight = count if k == "all" else k, width * count, TOLERANCE[dtype] * 2
        random.seed(seed)
        chosen = torch.tensor([random.sample(range(count), k) for _ in range(B)], dtype=torch.long,
                              device=DEVICE).view(B, k)
        x = normal(C, B, seed=seed, dtype=dtype).t() if seed % 2 else normal(B, C, seed=seed, dtype=dtype)
        up, down = normal(units, C, seed=1, dtype=dtype) / C ** 0.5, normal(units, C, seed=2, dtype=dtype)
        bias, out_bias = (normal(n, seed=3, dtype=dtype) if seed % 2 else None for n in (units, C))
        scale = normal(B, k, seed=4, dtype=dtype) if seed % 4 else None
        arguments = (x, up, bias, chosen, scale, width, ACTS[seed % 3])
        a = gpu.gathered_up(*arguments)
        assert a.dtype == dtype and a.shape == (B, k * width)
        check(a.float(), exact(kernels.gathered_up_reference, *arguments), atol=tight, rtol=tight)
        some = normal(B, units, seed=5, dtype=dtype) * (normal(B, units, seed=6, dtype=torch.float32) > 0.5)
        poisoned = down.clone()
        poisoned[~some.any(dim=0)] = torch.nan   # a row that no token's unit writes must not be read
        for given, groups in ((a, chosen), (some.to(dtype), None)):
            found = gpu.gathered_down(given, down, out_bias, groups, width)
            right = exact(kernels.gathered_down_reference, given, down, out_bias, groups, width)
            check(found.float(), right, atol=tight * 4, rtol=tight)
        assert gpu.gathered_down(some.to(dtype), poisoned, None, None, 1).isfinite().all()


@interpreted
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nan_and_infinity_come_out_as_of_the_reference(monkeypatch, bad):
    """At one place of each input of each kernel: the same NaN, inf and -inf, whatever the activation. Torch's
    GELU of inf is inf, but NaN where it computes several at once with AVX-512."""
    gelu = kernels.ACTS["gelu"]
    monkeypatch.setitem(kernels.ACTS, "gelu", lambda v: torch.stack([gelu(e) for e in v.view(-1)]).view_as(v))
    n = functools.partial(normal, dtype=torch.float32)
    half = functools.partial(normal, dtype=torch.bfloat16)
    groups = torch.tensor([[0, 2], [3, 1]], device=DEVICE)
    values, meta = kernels.pack_24(kernels.prune_24(half(7, 36, seed=1)))
    for act in ACTS:
        same_as(*(lambda x, *w, up=up, act=act: up(x, *w[:2], groups, w[2], 2, act)
                  for up in (gpu.gathered_up, kernels.gathered_up_reference)),
                (n(2, 5, seed=0), n(8, 5, seed=1), n(8, seed=2), n(2, 2, seed=3)), bad)
        same_as(*(lambda a, w, b, down=down: down(a, w, b, groups, 2)
                  for down in (gpu.gathered_down, kernels.gathered_down_reference)),
                (n(2, 4, seed=0), n(8, 5, seed=9), n(5, seed=8)), bad)
        for M in (1, 3):
            inputs = (half(M, 36, seed=2), values, half(7, seed=3), half(M, 7, seed=4))
            same_as(lambda x, v, b, o, act=act: gpu.linear_24(x, v, meta, b, o, act),
                    lambda x, v, b, o, act=act: kernels.linear_24_reference(
                        x.float(), v.float(), meta, b.float(), o.float(), act), inputs, bad)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_largest_are_those_of_the_reference_ties_and_nan_too(dtype):
    """Zeros of both signs, equal ones, NaN and infinities; a copy of bits, so bf16 is exact too."""
    for seed, (rows, n) in enumerate(itertools.product((1, 3), (2, 5, 64, 300))):
        for k in {1, n // 2, n - 1} - {0}:
            a = (normal(rows, n, seed=seed, dtype=torch.float32) * 2).round().to(dtype)
            a[0, 0], a[-1, n // 2] = -0.0, torch.nan
            a[0, -1] = -torch.inf
            kept = gpu.largest(a, k, keep=True)
            right = kernels.keep_largest_reference(a, k)
            torch.testing.assert_close(kept, right, equal_nan=True, atol=0, rtol=0)
            found = gpu.largest(a, k, keep=False)
            assert torch.equal(found, kernels.first_largest(a, k).sort(dim=-1).values)


def same_as(run, reference, inputs, bad):
    """run(*inputs) has NaN and infinities where the reference has, with `bad` at a place of each input."""
    for spoilt, tensor in enumerate(inputs):
        given = [t.clone() for t in inputs]
        given[spoilt].view(-1)[tensor.numel() // 3] = bad
        found, right = run(*given).float(), reference(*given).float()
        for where in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(where(found), where(right)), (spoilt, found, right)


def by_sparse_units(x, values, meta, bias, onto, act, warps_of_one=4):
    """mma_24 on a CPU, see warps.py; elsewhere on the card."""
    (M, K), (N, words) = x.shape, meta.shape
    if DEVICE == "cuda":
        return gpu.linear_24(x, values, meta, bias, onto, act, "mma_24")
    out = x.new_full((M, N), 9.0)
    run_warps(gpu.mma_24, (-(-M // 8), -(-N // 16)), x.view(torch.int32), values.view(torch.int32), meta,
              bias, onto, out, M, N, K, words, KIND=gpu.KINDS[x.dtype], ACT=act, BIAS=bias is not None,
              ONTO=onto is not None, WARPS=warps_of_one)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sparse_units_multiply_what_was_packed(dtype):
    """Any height and width, more rows than one program has, fewer inputs than warps. Where a row of x is not
    finite it is NaN, as the dense product has it of the rows that prune what meets it."""
    shapes = (16, 64, 1), (48, 128, 8), (40, 320, 5), (17, 100, 11), (24, 96, 16), (3, 36, 2), (1, 4, 9)
    for seed, (N, K, M) in enumerate(shapes):
        weight = kernels.prune_24(normal(N, K, seed=seed, dtype=torch.float32) / K ** 0.5).to(dtype)
        values, meta = kernels.pack_24(weight)
        x, bias, onto = (normal(*shape, seed=seed + 1, dtype=dtype) for shape in ((M, K), (N,), (M, N)))
        rest = (bias if seed % 2 else None, onto if seed % 3 else None, ACTS[seed % 3])
        right = exact(kernels.linear_24_reference, x, values, meta, *rest)
        found = by_sparse_units(x, values, meta, *rest, warps_of_one=4 << seed % 3)
        check(found.float(), right, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        x[0, -1], x[-1, K // 2] = torch.inf, torch.nan
        spoilt = by_sparse_units(x, values, meta, *rest)
        assert spoilt[[0, -1]].isnan().all()
        assert torch.equal(spoilt[1:-1], by_sparse_units(x[1:-1], values, meta, rest[0], onto[1:-1] if rest[1]
                                                         is not None else None, rest[2])) or M < 3


def test_a_few_rows_take_the_form_that_is_right_and_fastest_on_a_card(monkeypatch, capsys):
    """Timed once a card and shape; never inside a CUDA graph."""
    seconds, wrong, timed = {"mma_24": 1.0, "gemm_24": 2.0, "gemv_24": 3.0}, [], []

    def form(name):
        def run(x, values, meta, bias, onto, out, *rest, **flags):
            out.fill_(2.0 if name in wrong else 1.0)
        return run

    def fastest(what, forms, device):
        timed.append(what)
        return min(forms, key=seconds.get), seconds
    monkeypatch.setattr(gpu, "FORMS_24", {name: form(name) for name in seconds})
    monkeypatch.setattr(gpu, "fastest", fastest)
    given = 32, 48, torch.bfloat16, torch.device("cpu")
    assert gpu.form_24(5, *given) == "gemm_24" and not timed                     # no card, no mma.sp
    monkeypatch.setattr(gpu, "multiplies_sparse", lambda device: True)
    gpu.timed_form_24.cache_clear()
    assert gpu.form_24(5, *given) == gpu.form_24(8, *given) == "mma_24" and len(timed) == 1
    seconds["gemv_24"] = 0.5
    assert gpu.form_24(2, *given) == "gemv_24" and gpu.form_24(64, *given) == "mma_24" and len(timed) == 3
    wrong += ["gemv_24", "mma_24"]
    assert gpu.form_24(3, *given) == "gemm_24"
    assert "mma_24 differs from gemm_24 by 1.0e+00 on this card and is not used" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert [gpu.form_24(M, *given) for M in (2, 16, 17, 64)] == ["mma_24", "mma_24", "gemm_24", "gemm_24"]
    gpu.timed_form_24.cache_clear()
    assert len(timed) == 4


@pytest.mark.parametrize(("rows", "N", "warps"), [(2, 768, 16), (16, 768, 16), (8, 4096, 16), (16, 4096, 8),
                                                  (8, 50304, 4)])
def test_few_outputs_are_shared_by_more_warps(rows, N, warps):
    assert gpu.mma_tile(rows, N, 132)["WARPS"] == warps


@pytest.mark.skipif(DEVICE != "cuda", reason="no GPU: the interpreter runs the launchers above")
def test_the_ops_run_on_a_gpu_and_in_a_cuda_graph():
    weight = kernels.prune_24(normal(256, 256, seed=0, dtype=torch.bfloat16))
    values, meta = kernels.pack_24(weight)
    x, groups = normal(2, 256, seed=1, dtype=torch.bfloat16), torch.tensor([[0, 2], [3, 1]], device=DEVICE)

    def step():
        y = kernels.linear_24_op(x, values, meta, None, None, "relu2")
        a = kernels.gathered_up(y, weight, None, groups, None, 64, "relu2")
        return kernels.gathered_down(a, weight, None, groups, 64)

    with torch.inference_mode():
        plain = step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        graph.replay()
    check(captured, plain)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's NVIDIA compiler comes with Linux wheels")
@compiled_for
def test_every_kernel_compiles_for_every_gpu_without_spills(tmp_path, architectures):
    found = cubins(tmp_path, *architectures)
    check_architectures(found, architectures)
    assert {row["kernel"] for row in found} == {"gemv_24", "gemm_24", "mma_24", "up_kernel", "down_kernel",
                                                "largest_kernel"}
    for row in found:
        assert row["stack"] == row["local"] == row["spills"] == 0, row
        streams = row["kernel"] != "largest_kernel"              # that one reads a few KB of any width
        assert row["reg"] <= 128 and row["wide_loads"] >= streams and row["products"] >= 1, row
        assert row["shared"] <= (232448 if row["architecture"] == 90 else 101376), row
    sparse = [row for row in found if row["kernel"] == "mma_24"]
    assert max(row["reg"] for row in sparse) <= 64 and min(row["wide_loads"] for row in sparse) >= 6
