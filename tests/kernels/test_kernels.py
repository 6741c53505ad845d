"""Every kernel equals its reference over many shapes; whatever it does not take goes the library's way."""
import ctypes
import functools
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from arms import build, tokens
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import sparse_kernels as kernels
from decode import engine
from kernels import passes, picked
from layers import project

ROOT = Path(__file__).resolve().parents[2]
built = pytest.mark.skipif(kernels.cpu_library()[0] is None, reason=kernels.cpu_library()[1])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
ROWS, COLUMNS = (1, 2, 3, 5, 16, 31, 100), (1, 7, 16, 31, 32, 33, 63, 64, 65, 127, 129, 256, 384, 1000)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def product(x, w, b=None):
    """A decode program's product of x (rows, K) with w (N, K)."""
    return engine.Alone(lambda p, x: p.linear(x, p.matrix(w, b)), x, len(w))()


def rows_sum(a, w, b=None):
    """The same with rows of w (H, C), those of units that are not zero in a (rows, H)."""
    return engine.Alone(lambda p, a: p.rows_sum(a, p.matrix(w, b)), a, w.size(1))()


def attended(q, k, v):
    """A program's attention of q (B, H, 1, D) over k and v (B, H, S, D), the last of which it gets with q."""
    (B, H, S, D), kept = k.shape, torch.stack((k, v))
    qkv = torch.cat([t.flatten(1) for t in (q[:, :, 0], k[:, :, -1], v[:, :, -1])], dim=1)
    kept[:, :, :, -1] = 0
    found = engine.Alone(lambda p, x: p.attend(x, 0, H, D, None, None, None), qkv, H * D, kept=kept,
                         column=S - 1)()
    assert torch.equal(kept.nan_to_num(7.0), torch.stack((k, v)).nan_to_num(7.0))    # the cache has got it
    return found.view(B, H, 1, D)


def attended_reference(q, k, v):
    """Not by torch's operator, whose answer on a CPU to scores that are all NaN is 0."""
    return (q * q.size(-1) ** -0.5 @ k.mT).softmax(-1) @ v


def rows_sum_reference(a, w, b=None):
    """Rows that no token asks for are not read: what is not finite in them does not come out."""
    live = a.any(dim=0)
    y = a[:, live] @ w[live]
    return y if b is None else y + b


@built
@dtypes
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_of_a_program_equals_its_reference_over_98_shapes(dtype, bias, case):
    for N in ROWS:
        for K in COLUMNS:
            x, w = normal(5, K, dtype=dtype), normal(N, K, dtype=dtype, seed=1) / K ** 0.5
            b = normal(N, dtype=dtype, seed=2) if bias else None
            exact = F.linear(x.float(), w.float(), b if b is None else b.float())
            found = product(x, w, b).clone()
            torch.testing.assert_close(found, exact, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
            assert torch.equal(product(x[[4]], w, b), found[[4]])
            case()


FORMS = ("float32", "bfloat16", "int8", "int4", "2:4 float32", "2:4 bfloat16", "2:4 int8")


def matrix_of(p, form, weight):
    """A program's matrix of weights (N, K) in a form."""
    pruned = kernels.prune_24(weight) if form.startswith("2:4") else weight
    if form in ("int8", "int4"):
        return p.whole(*kernels.quantize(pruned, int(form[3:])), weight.size(1), None)
    if form in ("float32", "bfloat16"):
        return p.matrix(pruned)
    codes, scale = kernels.quantize(pruned, 8)
    kept = codes[:, :weight.size(1)].view(torch.int8) if form == "2:4 int8" else pruned.to(p.dtype)
    values, meta = kernels.pack_24(kept)
    if not picked.wanted(torch.device("cpu"), whole=form == "2:4 int8"):
        return p.packed(values, meta, None, weight.size(1))
    laid = picked.lay(values, meta, weight.size(1))
    return p.picked(laid, kept.dtype, weight.size(1), None, scale if form == "2:4 int8" else None)


def product_in(form, x, weight, far=0):
    dtype = torch.bfloat16 if "bf" in form else torch.float32
    run = engine.Alone(lambda p, x: p.linear(x, matrix_of(p, form, weight)), x.to(dtype), len(weight))
    run.program.c.far = far
    return run().clone()


@built
@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_batch_are_bit_for_bit_what_they_are_alone_in_every_form(form, case):
    """Of 1 to 8 rows together, read from memory and from a cache; one that is not finite spoils no other."""
    if form == "2:4 int8" and not picked.wanted(torch.device("cpu"), whole=True):
        pytest.skip("read dense here")
    for N, K in itertools.product((1, 3, 4, 6, 33), (4, 36, 64, 68, 96, 128, 132, 192, 260, 388, 772)):
        x, weight = normal(8, K, seed=K), normal(N, K, seed=N) / K ** 0.5
        together = product_in(form, x, weight)
        exact = x @ (kernels.prune_24(weight) if form.startswith("2:4") else weight).t()
        lost = {"float32": 1e-5, "int4": 0.4}.get(form.removeprefix("2:4 "), 0.05)
        torch.testing.assert_close(together, exact, atol=lost, rtol=lost)
        for rows in range(1, 8):
            far = rows % 2
            assert torch.equal(product_in(form, x[8 - rows:], weight, far), together[8 - rows:]), (N, K, rows)
        for wrong in (math.inf, math.nan):
            broken = x.clone()
            broken[2, K // 2 - 1] = wrong
            found = product_in(form, broken, weight)
            others = [r for r in range(8) if r != 2]
            assert torch.equal(found[others], together[others])
            if "int" in form:
                assert found[2].isnan().all()
        case()


@built
@dtypes
def test_attention_of_one_query_equals_its_reference_over_120_shapes(dtype, case):
    for B, H in ((1, 1), (2, 3), (3, 2)):
        for S in (1, 2, 7, 64, 300):
            for D in (1, 2, 5, 16, 64, 65, 80, 128):
                q, (k, v) = normal(B, H, 1, D, dtype=dtype), normal(2, B, H, S, D, dtype=dtype, seed=1)
                exact = attended_reference(*(t.float() for t in (q, k, v)))
                torch.testing.assert_close(attended(q, k, v), exact, atol=TOLERANCE[dtype],
                                           rtol=TOLERANCE[dtype])
                case()


@built
@dtypes
def test_gathered_rows_equal_their_references_over_120_shapes(dtype):
    shapes = itertools.product((1, 2, 8), (5, 64), (1, 31, 64, 100, 768), (0, 1, 3, 5))
    for seed, (tokens_, H, C, n) in enumerate(shapes):
        weight, bias = normal(H, C, dtype=dtype, seed=seed), normal(C, dtype=dtype)
        rows = torch.randperm(H, generator=torch.Generator().manual_seed(seed))[:n]
        a = normal(tokens_, n, dtype=dtype, seed=seed + 1) * (normal(tokens_, n, seed=seed) > -0.5)
        a = torch.zeros(tokens_, H, dtype=dtype).index_copy(-1, rows, a.to(dtype))
        for b in (bias, None):
            exact = rows_sum_reference(a.float(), weight.float(), b if b is None else b.float())
            torch.testing.assert_close(rows_sum(a, weight, b), exact, atol=TOLERANCE[dtype] * C ** 0.5,
                                       rtol=TOLERANCE[dtype])


@built
@dtypes
def test_the_largest_are_kept_and_all_others_zero(dtype):
    for seed, (rows, n) in enumerate(itertools.product((1, 2, 8), (1, 2, 7, 64, 3072))):
        a = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).float()[None, None] - n / 3
        a = (a + torch.arange(rows).view(-1, 1, 1) * 0.25).to(dtype)
        for k in {1, max(1, n // 10), n}:
            with torch.inference_mode():
                kept = kernels.keep_largest(a, k)
            assert ((kept != 0).sum(-1) <= k).all() and torch.equal(kept[kept != 0], a[kept != 0])
            sizes = [t.abs().sort(descending=True).values[..., :k] for t in (kept, a)]
            assert torch.equal(*sizes)
    with torch.inference_mode():
        assert kernels.keep_largest(torch.tensor([[-2.0, 2.0, 1.0, 2.0]]), 2).tolist() == [[-2.0, 2.0, 0, 0]]


@built
@dtypes
def test_a_head_that_looks_twice_gives_the_largest_exactly_and_reads_few_rows(dtype):
    for seed, (N, K, k) in enumerate(itertools.product((8, 500, 3000), (1, 33, 256), (1, 5))):
        weight, x = normal(N, K, dtype=dtype, seed=seed) * 0.02, normal(1, K, dtype=dtype, seed=seed + 1) * 3
        whole, looks = product(x, weight).clone(), twice(x, weight, k)
        read, found = looks.counted()[1], looks().clone()
        largest = whole >= whole.topk(k).values[..., -1:]                  # of equal ones all
        assert torch.equal(found[largest], whole[largest])
        kept = found > -torch.inf
        assert torch.equal(found[kept], whole[kept]) and kept.sum() >= k
        rows = (read - N * K) // (K * weight.element_size())
        assert rows == kept.sum() and (N < 3000 or K < 256 or rows < N / 4)
    weight[3, 5] = torch.nan
    assert twice(x, weight, 1)()[0].isnan().nonzero().flatten().tolist() == [3]


def twice(x, weight, k):
    """A program's head that looks at 8 bits first."""
    copy = kernels.copy_in_8_bits(weight)
    return engine.Alone(lambda p, x: p.logits(x, p.matrix(weight), 0, copy), x, len(weight), wants=k)


@dtypes
def test_a_copy_in_8_bits_says_how_far_it_is_off(dtype):
    """In the C kernel, where this machine has it, and in its reference."""
    for seed, (N, K, size) in enumerate(itertools.product((1, 7, 40), (1, 5, 33, 256), (1e-40, 1e-20, 1.0))):
        weight = normal(N, K, dtype=dtype, seed=seed) * size
        weight[N // 2] = 0
        copies = [make(weight) for make in (kernels.copy_in_8_bits, kernels.copy_in_8_bits_reference)]
        for q, scale, error in copies:
            off = (weight.double() - scale.double()[:, None] * q.double()).norm(dim=1)
            assert q.dtype == torch.int8 and (off <= error.double()).all()
        (_, scale, error), (_, right, bound) = copies
        torch.testing.assert_close(scale, right, rtol=1e-6, atol=0)
        slack = 1e-7 * weight.float().norm(dim=1)    # of one weight the error is what rounding makes of it
        assert ((error - bound).abs() <= 1e-2 * bound + slack).all()
    weight[0, 0] = torch.nan
    assert kernels.copy_in_8_bits(weight)[2].isnan().tolist() == [True] + [False] * (N - 1)


@built
def test_products_are_counted_from_the_shapes_that_run():
    weight, a = normal(64, 32), torch.zeros(2, 64)
    with torch.inference_mode(), kernels.counting() as work:
        project(normal(1, 1, 32), weight, None)
        kernels.note_rows(5, weight)
    assert work.macs == (64 + 5) * 32 and work.bytes == 4 * work.macs and kernels.tally is None
    a[0, :3], a[1, 2:4] = 1.0, 1.0
    sums = engine.Alone(lambda p, a: p.rows_sum(a, p.matrix(weight)), a, 32)
    assert sums.counted() == (5 * 32, 4 * 4 * 32)                 # 3 and 2 live units; 4 different rows


@built
def test_large_scores_do_not_overflow_and_nan_stays_nan():
    q, k, v = normal(1, 2, 1, 8) * 1e4, normal(1, 2, 9, 8, seed=1) * 1e4, normal(1, 2, 9, 8, seed=2)
    torch.testing.assert_close(attended(q, k, v), attended_reference(q, k, v))
    for dtype in TOLERANCE:
        x, w = normal(1, 64, dtype=dtype), normal(3, 64, dtype=dtype)
        w[1, 5] = torch.nan
        assert product(x, w).isnan().tolist() == [[False, True, False]]


GREEDY = """
import sys; sys.path[:0] = [{root!r}, {root!r} + '/tests']
from arms import build, tokens
from torch.nn import functional as F
import sparse_kernels
print(sparse_kernels.cpu_library()[1])
print(build({{}}, std=0.2).generate(tokens(1, 4), 40, temperature=0).tolist())
"""


def test_without_a_compiler_the_same_tokens_come_out(tmp_path):
    """The kernels can be switched off, and a machine without a compiler says so and carries on."""
    said = {}
    for name, change in (("on", {}), ("off", {"NANOCORTEX_KERNELS": "off"}),
                         ("none", {"CC": "no-such-cc", "PATH": str(tmp_path)})):
        run = subprocess.run([sys.executable, "-c", GREEDY.format(root=str(ROOT))], env=os.environ | change,
                             capture_output=True, text=True, check=True)
        said[name] = run.stdout.splitlines()
    assert said["on"][1] == said["off"][1] == said["none"][1]
    assert "off" in said["off"][0] and "no C" in said["none"][0]


def test_a_compiler_that_fails_is_named(tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
            "import sparse_kernels; print(sparse_kernels.cpu_library())")
    run = subprocess.run([sys.executable, "-c", code],
                         env=os.environ | {"CC": str(broken), "XDG_CACHE_HOME": str(tmp_path)},
                         capture_output=True, text=True, check=True)
    if sys.platform == "linux":
        assert "(None," in run.stdout and "did not build" in run.stdout and str(broken) in run.stdout


def doubles(*shape, seed):
    """Away from kinks and ties: 64 bits, and no two equal."""
    return normal(*shape, seed=seed).double().requires_grad_()


GROUPS = torch.tensor([[0, 2], [1, 2]])
REFERENCES = {
    "keep_largest": lambda x, w, b, a: kernels.keep_largest_reference(a, 2),
    "winners_product": lambda x, w, b, a: kernels.winners_product_reference(x, w),
    "gathered_up": lambda x, w, b, a: kernels.gathered_up_reference(x, w, b, GROUPS, a[:, :2], 2, "gelu"),
    "gathered_down": lambda x, w, b, a: kernels.gathered_down_reference(a[:, :4], w, None, GROUPS, 2),
}


@pytest.mark.parametrize("reference", REFERENCES.values(), ids=REFERENCES.keys())
def test_references_have_the_gradients_of_their_values(reference, case):
    """torch's gradcheck in fp64: finite differences of every input."""
    for seed in range(3):
        inputs = (doubles(2, 8, seed=seed), doubles(6, 8, seed=seed + 10), doubles(6, seed=seed + 20),
                  doubles(2, 6, seed=seed + 30))
        assert torch.autograd.gradcheck(reference, inputs, check_undefined_grad=False)
        case()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_oscillating_units_equal_their_reference_forward_and_backward(dtype, case):
    for shape in ((1, 1, 1), (2, 3, 7), (1, 40, 512), (5, 33)):
        for scale in (1e-3, 1.0, 30.0):
            x, w, phi, b = (normal(*size, seed=i, dtype=kind) for i, (size, kind) in enumerate(
                ((shape, dtype), *[(shape[-1:], torch.float32)] * 3)))
            toward, both = normal(*shape, seed=9, dtype=dtype), []
            for run, kind in ((kernels.osc, dtype), (kernels.osc_reference, torch.float32)):
                leaves = [(x * scale).to(kind), w, phi, b]
                leaves = [t.clone().requires_grad_() for t in leaves]
                y = run(*leaves)
                y.backward(toward.to(y.dtype))
                both.append([y, *(t.grad for t in leaves)])
            for found, exact in zip(*both):
                size = exact.abs().max().item()
                torch.testing.assert_close(found.float(), exact, atol=TOLERANCE[dtype] * max(1, size),
                                           rtol=TOLERANCE[dtype])
            case()


def test_sine_and_tanh_are_exact_to_a_millionth():
    x = torch.linspace(-300, 300, 200_001)
    one, zero = torch.ones_like(x[:1]), torch.zeros_like(x[:1])
    found = kernels.osc(x[:, None].contiguous(), one, zero, zero)[:, 0]
    exact = torch.sin(x.double()) * torch.tanh(x.double())
    assert (found - exact).abs().max() < (2e-5 if kernels.cpu_library()[0] is None else 2e-6)


# -------------------------------------------------- NaN, infinity, ties, width ------------------------------

def like(found, exact, tolerance, name=""):
    """NaN and infinities at the same places, the rest close."""
    found, exact = found.float(), exact.float()
    for where in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(where(found), where(exact)), (name, found, exact)
    torch.testing.assert_close(found, exact, atol=tolerance, rtol=tolerance, equal_nan=True)


def osc_and_its_gradients(run, *inputs):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = run(*leaves)
    y.backward(torch.ones_like(y))
    return torch.cat([y.detach().flatten().float(), *(t.grad.flatten().float() for t in leaves)])


def packed(weight):
    return kernels.pack_24(kernels.prune_24(weight))


def operations(dtype):
    """{op: (its arguments, kernel, reference)}: each of the arguments is spoilt in turn."""
    H, C = 9, 68
    n = functools.partial(normal, dtype=dtype)
    x, up, down = n(1, C), n(H, C, seed=1), n(H, C, seed=2)
    bias, out_bias = n(H, seed=3), n(C, seed=4)
    a = F.relu(n(1, H, seed=8))
    q, k, v = n(1, 2, 1, 8), n(1, 2, 6, 8, seed=1), n(1, 2, 6, 8, seed=2)
    values, meta = packed(n(H, C, seed=1))

    def both(name):
        return getattr(kernels, name), getattr(kernels, name + "_reference")

    def with_(function, *more):
        return tuple(lambda *given, run=run: run(*given, *more) for run in function)

    found = {
        "product": ((x, up, bias), product, F.linear),
        "rows_sum": ((a, down, out_bias), rows_sum, rows_sum_reference),
        "keep_largest": ((n(1, 1, C),), *with_(both("keep_largest"), 7)),
        "attention": ((q, k, v), attended, attended_reference),
        "osc": ((n(3, 5), normal(5), normal(5, seed=1), normal(5, seed=2)),
                *(functools.partial(osc_and_its_gradients, run) for run in both("osc"))),
    }
    for act in ("relu2", "gelu"):
        found[f"linear_24 {act}"] = ((n(2, C), values, bias, n(2, H, seed=1)), *(
            lambda x, values, bias, onto, run=run, act=act: run(x, values, meta, bias, onto, act)
            for run in (kernels.linear_24_cpu, kernels.linear_24_reference)))
    return found


@built
@dtypes
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf], ids=str)
def test_nan_and_infinity_come_out_of_every_kernel_as_of_its_reference(bad, dtype, case):
    """One bad number at three places of each input in turn; NaN, inf and -inf stand where torch has them."""
    for name, (inputs, kernel, reference) in operations(dtype).items():
        for spoilt, tensor in enumerate(inputs):
            for place in {0, tensor.numel() // 2, tensor.numel() - 1}:
                given = [t.clone() for t in inputs]
                given[spoilt].view(-1)[place] = bad
                wide = given if dtype == torch.float32 else [t.float() for t in given]
                if name.startswith("linear_24") and dtype == torch.bfloat16:
                    wide = given                 # packed values are read as what they are
                with torch.inference_mode(name != "osc"):
                    like(kernel(*given), reference(*wide), TOLERANCE[dtype] * 30, (name, spoilt, place, bad))
                case()


@built
def test_angles_that_the_fast_sine_cannot_turn_come_out_as_in_torch():
    x = torch.tensor([[1e3, 1e5, -3e7, 1e30, -3e38, 0.5]])
    ones, zeros = torch.ones(6), torch.zeros(6)
    for run in (lambda f, *given: f(*given), osc_and_its_gradients):
        found, exact = (run(f, x, ones, zeros, zeros) for f in (kernels.osc, kernels.osc_reference))
        torch.testing.assert_close(found, exact, atol=1e-4, rtol=1e-4)


def test_among_equal_ones_the_lowest_places_win_and_exactly_k():
    """The rule in words, against its two implementations: NaN above infinity, -0 equal to 0."""
    pool = torch.tensor([0.0, -0.0, 1.0, 1.0, -1.0, torch.nan, -torch.nan, torch.inf, -torch.inf, 0.5])
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for k in range(9):
            scores = pool[torch.randint(len(pool), (200, 8), generator=generator)].to(dtype)
            def rank(i, row):
                return (not math.isnan(row[i]), 0.0 if math.isnan(row[i]) else -row[i], i)
            right = torch.zeros(200, 8, dtype=torch.bool)
            for line, row in enumerate(scores.tolist()):
                right[line, sorted(range(8), key=lambda i, row=row: rank(i, row))[:k]] = True
            assert torch.equal(kernels.among_largest(scores, k), right)
            assert torch.equal(torch.zeros_like(right).scatter(-1, kernels.first_largest(scores, k), True),
                               right)


POOLS = {"bf16 steps": lambda g, n: torch.randn(n, generator=g).bfloat16().float(),
         "few values": lambda g, n: torch.randint(-2, 3, (n,), generator=g).float(),
         "all equal": lambda g, n: torch.full((n,), 0.5), "zeros": lambda g, n: torch.zeros(n),
         "signs": lambda g, n: torch.randint(0, 2, (n,), generator=g).float() * 2 - 1,
         "NaN": lambda g, n: torch.randint(0, 3, (n,), generator=g).float() / 0.0 * 0 + 1,
         "NaN and infinity": lambda g, n: torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])[
             torch.randint(4, (n,), generator=g)]}


@built
@dtypes
@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS.keys())
def test_ties_are_broken_alike_in_the_reference_in_c_and_in_the_gradient(pool, dtype):
    generator = torch.Generator().manual_seed(0)
    for n in (1, 4, 7, 64, 1000):
        for k in {1, max(1, n // 4), max(1, n - 1), n}:
            a = torch.stack([pool(generator, n) for _ in range(3)]).to(dtype)[:, None]
            right = kernels.keep_largest_reference(a, k)
            assert (right != 0).sum(-1).max() <= k
            with torch.inference_mode():
                found = kernels.keep_largest(a.clone(), k)
            assert torch.equal(found.nan_to_num(7.0), right.nan_to_num(7.0))
            found = engine.Alone(lambda p, x: p.largest(x, n, k), a[:, 0], n)()
            assert torch.equal(found.nan_to_num(7.0), right[:, 0].float().nan_to_num(7.0))
            leaf = a.clone().requires_grad_()
            kernels.keep_largest(leaf, k).backward(torch.ones_like(a))
            places = torch.zeros_like(a).scatter(-1, kernels.first_largest(a.abs(), k), 1.0)
            assert torch.equal(leaf.grad, places)


def test_the_prompt_in_bf16_keeps_the_units_that_a_decode_step_keeps():
    """Whose |a| differ in fp32 alone: rounded to bf16 they are equal, and the first stay in both."""
    x, H = torch.ones(1, 1, 4, dtype=torch.bfloat16), 8
    up = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(H, 1)
    up[:, 3] = torch.arange(H) / 1024            # 3 + i / 1024, all of which is 3 in bf16
    with torch.inference_mode():
        step = kernels.keep_largest(F.gelu(project(x, up.bfloat16(), None)), 2)
    a = kernels.keep_largest(F.gelu(F.linear(x, up.bfloat16())), 2)
    assert (a != 0).nonzero()[:, -1].tolist() == [0, 1] == (step != 0).nonzero()[:, -1].tolist()


WIDE = """
import sys; sys.path[:0] = [{root!r}, *({root!r} + '/tests' + folder for folder in ('', '/kernels'))]
import torch
from arms import build, tokens
import sparse_kernels as kernels
from test_kernels import attended, rows_sum, twice
WIDE, tiny = 1_200_000, dict(n_layer=1, n_embd=4, n_head=1, block_size=4, vocab_size=5)
for arm in (dict(act='relu2'), dict(act='relu2', mlp_topk=0.25), dict(mlp_topk=0.5, mlp_topk_group=4),
            dict(columns=2, columns_active=1), dict(mlp_topk=0.25, mlp_predict=2), dict(event_gate=True)):
    model = build(tiny | arm | dict(mlp_units=WIDE)).use_policy()
    model.generate(tokens(1, 2) % 5, 2, temperature=0)
with torch.inference_mode():
    x, one, n = torch.ones(1, WIDE), torch.ones(1, 1, WIDE), 2 * WIDE
    kept = kernels.keep_largest(one, WIDE - 1)
    assert kept.sum() == WIDE - 1 and kept[0, 0, -1] == 0
    assert attended(*(torch.ones(1, 1, s, WIDE) for s in (1, 2, 2))).eq(1).all()
    q, k, v = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, WIDE, 2), torch.ones(1, 1, WIDE, 2)
    assert (attended(q, k, v) - 1).abs().max() < 1e-2
    weight = torch.ones(3, WIDE)
    assert twice(x, weight, 1)().isfinite().any()
    assert rows_sum(torch.ones(1, 2), torch.ones(2, WIDE)).eq(2).all()
print('done')
"""


@built
def test_no_width_is_too_large_for_a_stack():
    """1,200,000 units, inputs, keys and dimensions of a head, one at a time."""
    run = subprocess.run([sys.executable, "-c", WIDE.format(root=str(ROOT))], capture_output=True, text=True,
                         timeout=300)
    assert run.returncode == 0 and run.stdout == "done\n", (run.returncode, run.stderr[-2000:])


# ------------------------------------------------ weights of whole numbers

WIDTHS = (1, 5, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 192, 300, 1000)
bits_4_and_8 = pytest.mark.parametrize("bits", [8, 4])
every_form = pytest.mark.parametrize("bits", [8, 4, "own"])


def of_a_file(N, K, seed=0, levels=16, dtype=torch.float32):
    """Weights as ggml's Q4_1 holds them: of 32 in a row each one of 16 levels. The last few lie on 0's."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-K // 32)
    step = (torch.rand(N, groups, 1, generator=generator) + 0.01).half().float()
    low = (step * (torch.rand(N, groups, 1, generator=generator) * 15 - 15)).half().float()
    if K % 32:
        low[:, -1] = -7 * step[:, -1]
    q = torch.randint(levels, (N, groups, 32), generator=generator)
    return (q * step + low).flatten(1)[:, :K].to(dtype)


def whole_numbers(weight, bits):
    """-> weights, codes, scale, in 8 bits, 4, or the 4 of a file like `weight`."""
    if bits == "own":
        weight = of_a_file(*weight.shape, seed=weight.numel())
        return weight, *kernels.on_levels(weight)
    return weight, *kernels.quantize(weight, bits)


def same_sums(found, expected, sizes, rounding=0):
    """Equal to fp32's sums of terms of these sizes, and to the rounding of their factors; NaN where NaN is
    expected."""
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert torch.equal(found.isnan(), expected.isnan())
    assert ((found - expected).abs() <= 2e-6 * sizes + rounding + 1e-30)[~expected.isnan()].all()


@built
@every_form
def test_products_of_whole_numbers_equal_their_reference_over_300_shapes(bits):
    """Of inputs of one sign: sums far from 0. More than 8 tokens are a prompt, in blocks of 64."""
    for N, K, tokens_ in itertools.product((1, 3, 4, 9), WIDTHS, (1, 2, 8, 9, 67)):
        seed = N * 10_000 + K * 10 + tokens_
        weight, x = normal(N, K, seed=seed), normal(tokens_, 1, K, seed=seed + 1).abs()
        weight, codes, scale = whole_numbers(weight, bits)
        expected = kernels.whole_product_reference(x, codes, scale)
        with torch.inference_mode():
            assert kernels.few_tokens(x) == (tokens_ <= 8)
            for dtype in (torch.float32, torch.bfloat16):
                exact = expected if dtype == torch.float32 else kernels.whole_product_reference(
                    x.to(dtype), codes, scale)
                found = kernels.whole_product(x.to(dtype), codes, scale)
                rounds = bits != 8 and kernels.multiplies_bf16(x.to(dtype)) and tokens_ > 8    # weights, sums
                rounding = (x.sum(-1).max() * weight.abs().max() + exact.abs().max()) / 100 if rounds else 0
                same_sums(found, exact, 2 * x.sum() * weight.abs().max(), rounding)
                one = kernels.whole_product(x[:1].to(dtype), codes, scale)
                exact = tokens_ <= 8 or (bits == 8 and kernels.prompts_in_whole_numbers())
                assert torch.equal(one, found[:1]) or not exact                        # sums in another order
                same_sums(one, found[:1], 2 * x.sum() * weight.abs().max(), rounding)
        lost = (expected - x @ weight.T).norm() / (x.norm() * weight.norm())
        assert lost < (0.15 if bits == 4 else 0.02)


@built
@bits_4_and_8
def test_sums_of_rows_of_whole_numbers_equal_their_reference_over_135_shapes(bits):
    """Up to the factors of eight rows, which are whole numbers of 16 bits with one scale."""
    for H, C, tokens_ in itertools.product((1, 6, 13), WIDTHS, (1, 2, 8)):
        a = normal(tokens_, 1, H, seed=H + C) * (normal(tokens_, 1, H, seed=C) > 0)
        codes, scale = kernels.quantize(normal(H, C, seed=C + tokens_), bits)
        rows = kernels.dequantize(codes, scale, C)
        with torch.inference_mode():
            for all_rows in (False, True):
                found = kernels.whole_rows_sum(a, codes, scale, C, all_rows)
                rounding = H * (a.abs() * rows.abs().amax(1)).amax(-1, keepdim=True) / 50_000
                same_sums(found, kernels.whole_rows_sum_reference(a, codes, scale, C), a.abs() @ rows.abs(),
                          rounding)


@built
@every_form
def test_whole_numbers_as_bf16_are_what_they_stand_for_rounded_once(bits):
    for N, K in itertools.product((1, 5), WIDTHS):
        weight = normal(N, K, seed=N + K)
        weight[0, 0] = math.nan if K % 2 and bits != "own" else 1.0
        weight, codes, scale = whole_numbers(weight, bits)
        found, expected = kernels.in_bf16(codes, scale, K), kernels.dequantize(codes, scale, K).bfloat16()
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@built
@bits_4_and_8
def test_sums_of_the_largest_numbers_do_not_overflow(bits):
    """All inputs and weights at their largest, of either sign, over more than the 8,192 that 32 bits hold."""
    K = 20_000
    weight, x = torch.ones(5, K), torch.ones(9, 1, K)
    weight[1], x[1] = -1, -1
    codes, scale = kernels.quantize(weight, bits)
    matrix, many = kernels.whole_matrix(codes, scale, K), torch.empty(9, 1, 5)
    kernels.cpu_library()[0].whole_products(ctypes.addressof(matrix), x.data_ptr(), many.data_ptr(), 9, 1)
    with torch.inference_mode():
        few, prompt = (kernels.whole_product(some, codes, scale) for some in (x[:2], x))
        for found in (few, prompt, many):
            torch.testing.assert_close(found, x[:len(found)] @ kernels.dequantize(codes, scale, K).t(),
                                       rtol=1e-4, atol=0)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tokens_become_digits_in_c_as_by_torch(dtype):
    x = normal(3, 7, 65).to(dtype)
    x[0, 0], x[0, 1, 3], x[1, 2, 0] = 0, math.nan, math.inf
    high, low, by = kernels.tokens_in_digits(x)
    expected, scale = kernels.in_whole_numbers(x, kernels.FINEST)
    assert high.dtype == low.dtype == torch.int8 and expected.abs().max() == kernels.FINEST
    assert torch.equal(kernels.DIGIT * high.float() + low, expected.flatten(0, 1))
    torch.testing.assert_close(by, scale.flatten(), atol=0, rtol=0, equal_nan=True)


def test_a_processor_whose_sums_of_whole_numbers_are_cut_off_is_found_out():
    """oneDNN without VNNI: sums of two products of 8 bits are cut off at 16."""
    say = "import sparse_kernels; print(sparse_kernels.multiplies_whole_numbers())"
    for isa in ("AVX2", "SSE41"):
        found = subprocess.run([sys.executable, "-c", say], env=os.environ | {"ONEDNN_MAX_CPU_ISA": isa},
                               cwd=ROOT, capture_output=True, text=True)
        assert found.stdout == "False\n", found.stderr


@built
@pytest.mark.parametrize(("times", "fast"), [(1, True), (60, False)])
def test_a_torch_that_multiplies_whole_numbers_one_by_one_is_found_out(monkeypatch, times, fast):
    """As on a processor with AVX2 alone, where a prompt in 8 bits took 30 times as long as in bf16."""
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.float() @ b.float()).int())
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: True)
    monkeypatch.setattr(kernels, "least_seconds", lambda op, *_: 1e-4 * (times if op is torch._int_mm else 1))
    assert kernels.multiplies_whole_numbers.__wrapped__() == fast


def test_what_is_timed_once_runs_on_one_thread():
    """Beside another job two threads take 14 ms for a product of 0.04 ms: they wait for each other."""
    before, seen = torch.get_num_threads(), []
    try:
        torch.set_num_threads(2)
        assert 0 < kernels.least_seconds(lambda: seen.append(torch.get_num_threads())) < 60
        assert seen == [1] * 5 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_levels_of_a_file_are_found(dtype):
    """However many of the 16 a group uses, and where the weights were rounded to bf16; never where there are
    none, or something is not finite."""
    for levels, K in itertools.product((1, 2, 3, 7, 11, 16), (32, 64, 96, 97, 320)):
        weight = of_a_file(300, K, seed=K + levels, levels=levels, dtype=dtype)
        codes, scale = kernels.on_levels(weight)
        assert codes.size(1) % 64 == 0 and kernels.has_offsets(scale)
        wide = weight.float()
        step = (wide.amax(1, keepdim=True) - wide.amin(1, keepdim=True)) / max(1, levels - 1)
        off = (kernels.dequantize(codes, scale, K) - wide).abs()
        assert (off <= step / 10 + wide.abs().amax(1, keepdim=True) / 128).all()
    for wrong in (math.nan, math.inf, 0.5):
        weight = of_a_file(300, 96)
        weight[299, 40] += wrong * (weight[299, 32:64].max() - weight[299, 32:64].min()) / 15
        assert kernels.on_levels(weight.to(dtype)) is None
    assert kernels.on_levels(normal(4, 64)) is None
    for constant in (0.0, 0.75):
        assert kernels.dequantize(*kernels.on_levels(torch.full((3, 64), constant)), 64).eq(constant).all()


@built
@bits_4_and_8
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("count", [3, 11])
def test_what_is_not_finite_beside_whole_numbers_comes_out(bits, wrong, count):
    """An input makes its token's results NaN and no other's; a weight its row's; a unit that is zero shows a
    damaged row where all are read."""
    K, place = 70, 65
    weight, x = normal(5, K), normal(count, 1, K, seed=1)
    codes, scale = kernels.quantize(weight, bits)
    others, broken = [i for i in range(count) if i != 1], x.clone()
    broken[1, 0, place] = wrong
    with torch.inference_mode():
        for product in (kernels.whole_product, kernels.whole_product_reference):
            found = product(broken, codes, scale)
            assert found[1].isnan().all() and torch.equal(found[others], product(x, codes, scale)[others])
        weight[3, place] = wrong
        codes, scale = kernels.quantize(weight, bits)
        assert not kernels.all_finite(kernels.scales_of(codes, scale, K))
        for product in (kernels.whole_product, kernels.whole_product_reference):
            assert product(x, codes, scale).isnan().all(dim=(0, 1)).tolist() == [False] * 3 + [True, False]
        a = torch.tensor([[[1.0, 1, 1, 0, 1]]])
        for found in (kernels.whole_rows_sum(a, codes, scale, K, True),
                      kernels.whole_rows_sum_reference(a, codes, scale, K)):
            assert found[..., place].isnan().all() and (bits == 4) == bool(found[..., 0].isfinite().all())
        assert kernels.whole_rows_sum(a, codes, scale, K).isfinite().all()


@built
@bits_4_and_8
def test_zeros_and_tiny_numbers_stay_zeros_in_whole_numbers(bits):
    with torch.inference_mode():
        for weight in (torch.zeros(4, 65), torch.full((4, 65), 1e-38), normal(4, 65)):
            codes, scale = kernels.quantize(weight, bits)
            for x in (torch.zeros(2, 1, 65), torch.full((2, 1, 65), 1e-40)):
                for product in (kernels.whole_product, kernels.whole_product_reference):
                    assert (product(x, codes, scale).abs() < 1e-25).all()
        codes, scale = kernels.quantize(torch.zeros(4, 65), bits)
        assert torch.equal(kernels.dequantize(codes, scale, 65), torch.zeros(4, 65))
        assert torch.equal(kernels.whole_product(normal(2, 1, 65), codes, scale), torch.zeros(2, 1, 4))


@bits_4_and_8
@dtypes
def test_whole_numbers_are_near_what_they_stand_for(bits, dtype):
    for N, K in itertools.product((1, 1030), WIDTHS[::3]):
        weight = normal(N, K, dtype=dtype, seed=K)
        codes, scale = kernels.quantize(weight, bits)
        assert codes.size(1) % 64 == 0 and codes.dtype == torch.uint8
        found, wide = kernels.dequantize(codes, scale, K), weight.float()
        assert found.shape == wide.shape
        if bits == 8:
            assert ((found - wide).abs() <= wide.abs().amax(1, keepdim=True) / 127 * 0.501).all()
            again = kernels.quantize(found, bits)
            assert torch.equal(again[0], codes)
        else:
            groups = F.pad(wide, (0, -K % 32)).unflatten(1, (-1, 32))
            largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
            step = (largest / -8).bfloat16().float()
            plain = (groups / torch.where(step == 0, 1, step)).round().clamp(-8, 7) * step    # one grid alone
            lost, before = (found - wide).square().sum(), (plain.flatten(1)[:, :K] - wide).square().sum()
            assert lost <= before + 1e-9
            assert K < 64 or lost < 0.95 * before


def test_scales_by_the_inputs_mean_squares_lose_less_of_the_products():
    for N, K in itertools.product((1, 40), (5, 32, 70, 300)):
        weight = normal(N, K, seed=N + K)
        moments = normal(K, seed=K).abs().double().pow(3).float() + 0.01
        found = [kernels.dequantize(*kernels.quantize(weight, 4, given), K) for given in (None, moments)]
        lost = [((wide - weight).square() * moments).sum() for wide in found]
        assert lost[1] <= lost[0] and (N * K < 1000 or lost[1] < 0.9 * lost[0])
        plain = kernels.quantize(weight, 4)[0]
        for same in (torch.full((K,), 3.0), torch.zeros(K), torch.full((K,), math.nan)):
            assert torch.equal(kernels.quantize(weight, 4, same)[0], plain)
        assert torch.equal(kernels.quantize(weight, 8, moments)[0], kernels.quantize(weight, 8)[0])
        one = torch.zeros(K)
        one[3] = math.inf                        # of an input that overflowed
        assert kernels.dequantize(*kernels.quantize(weight, 4, one), K).isfinite().all()


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0"])
def test_ggmls_blocks_are_bit_for_bit_those_of_its_own_package(name):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    kind, ours = gguf.GGMLQuantizationType[name], getattr(kernels, name.lower())
    wide = normal(50, 96)
    ties = torch.randint(-3, 4, (64, 64), generator=torch.Generator().manual_seed(1)) * 0.5
    for weight in (wide, wide.bfloat16().float(), ties, -ties, torch.zeros(3, 32), wide * 1e-7, wide * 1e-30,
                   torch.full((2, 64), 1e-40), wide * 1e5, normal(7, 70)):
        padded = F.pad(weight, (0, -weight.size(1) % 32))
        with numpy.errstate(all="ignore"):
            expected = torch.from_numpy(gguf.dequantize(gguf.quantize(padded.numpy(), kind), kind))
        assert torch.equal(ours(weight), expected[:, :weight.size(1)])
    assert (ours(wide) != wide).float().mean() > 0.9 and torch.equal(ours(ours(ties)), ours(ties))
    wide[3, 40] = math.nan
    assert ours(wide).isnan().any(1).tolist() == [row == 3 for row in range(50)]


def test_four_bits_lie_where_the_layout_says():
    """Every 32 bytes hold 64 numbers plus 8, the first 32 in the low halves; the scales behind them."""
    weight = torch.arange(-8.0, 8).repeat(8)[None, :100] * 0.5
    codes, scale = kernels.quantize(weight, 4)
    assert codes.shape == (1, 128) and len(scale) == 0
    first = codes[0, :32]
    numbers = torch.cat((first & 15, first >> 4)).int() - 8
    scales = codes[0, 64:72].view(torch.bfloat16).float()
    assert torch.equal(numbers * scales[:2].repeat_interleave(32), weight[0, :64])


# ------------------------------------------------ passes of training

def hard(*shape, dtype, seed=0):
    """Normal numbers with ties, zeros, NaN and infinities among them."""
    x = normal(*shape, seed=seed).mul(4).round().div(4)
    if x.numel() > 8:
        x.view(-1)[seed % 5::11] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])[seed % 4]
    return x.to(dtype)


def both_ways(function, reference, *inputs):
    """Outputs and gradients of a pass and of its reference, with one random gradient for both."""
    found = []
    for of in (function, reference):
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
        outputs = of(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grads = [normal(*y.shape, dtype=y.dtype, seed=7) for y in outputs]
        torch.autograd.backward(outputs, grads)
        found.append([*outputs, *(leaf.grad for leaf in leaves)])
    return zip(*found, strict=True)


WINNERS = ((1, 1, 1), (7, 7, 1), (7, 7, 7), (64, 64, 6), (513, 513, 51), (1030, 1030, 1029), (8, 4, 2),
           (36, 4, 2), (48, 8, 3), (20, 5, 1))


@built
@dtypes
@pytest.mark.parametrize("act", ["none", "relu2"])
@pytest.mark.parametrize("n, group, k", WINNERS)
def test_winners_and_their_gradient_are_the_references_bit_for_bit(n, group, k, act, dtype):
    for seed, tokens_ in enumerate((1, 3, 17)):
        plain = hard(tokens_, n, dtype=dtype, seed=seed)
        apart = torch.stack((plain, plain), dim=-1)[..., 0]                  # of stride 2
        for v in (plain, apart, plain.t().contiguous().t()):
            pairs = both_ways(lambda v: kernels.group_winners(v, group, k, act),
                              lambda v: kernels.group_winners_reference(kernels.ACTS[act](v), group, k), v)
            for found, right in pairs:
                assert found.dtype == dtype and torch.equal(found.nan_to_num(7.0), right.nan_to_num(7.0))


PASSES = {
    "event": (kernels.event, kernels.event_reference, lambda M, n: (n,)),
    "columns": (lambda v, g, act: kernels.scaled(v.unflatten(-1, (g.size(-1), -1)), g, act),
                lambda v, g, act: kernels.scaled_reference(
                    kernels.ACTS[act](v).unflatten(-1, (g.size(-1), -1)), g.unsqueeze(-1)),
                lambda M, n: (M, n // 4)),
}
# 4, 12, 16 and 12 units each: the kernel takes eight at a time
PASSES["wide columns"] = (*PASSES["columns"][:2], lambda M, n: (M, {64: 4, 516: 43}.get(n, 1)))


@built
@dtypes
@pytest.mark.parametrize("act", ["none", "relu2"])
@pytest.mark.parametrize("name", PASSES)
def test_gates_of_units_and_columns_equal_their_references(name, act, dtype):
    """Values exactly, and what sums over tokens or units as near as its dtype."""
    function, reference, of = PASSES[name]
    for seed, (M, n) in enumerate(((1, 4), (3, 12), (17, 64), (40, 516))):
        for bad in (False, True):
            v = (hard if bad else normal)(M, n, dtype=dtype, seed=seed)
            apart = torch.stack((v, v), dim=-1)[..., 0]
            gates = normal(*of(M, n), seed=seed + 1)
            gates = gates - 0.5 if name == "event" else F.relu(gates).to(dtype)
            for given in (v, apart):
                pairs = list(both_ways(lambda v, g: function(v, g, act), lambda v, g: reference(v, g, act),
                                       given, gates))
                for found, right in pairs[:-1]:
                    assert found.dtype == right.dtype
                    assert torch.equal(found.nan_to_num(7.0), right.nan_to_num(7.0)), (M, n)
                found, right = pairs[-1]
                torch.testing.assert_close(found, right, rtol=TOLERANCE[dtype], equal_nan=True,
                                           atol=TOLERANCE[dtype] * max(1, M if name == "event" else 1))


@built
@dtypes
def test_the_cross_entropy_of_guesses_equals_its_reference(dtype):
    for seed, (M, n) in enumerate(((1, 1), (3, 7), (17, 64), (5, 516))):
        z, a = normal(M, n, dtype=dtype, seed=seed) * 5, F.relu(normal(M, n, dtype=dtype, seed=seed + 1))
        z.view(-1)[:1], a.view(-1)[-1:] = 200.0, torch.nan
        for given in (z, torch.stack((z, z), dim=-1)[..., 0]):
            (found, right), (slope, exact) = both_ways(lambda z: kernels.missed(z, a),
                                                       lambda z: kernels.missed_reference(z, a), given)
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(slope, exact, rtol=TOLERANCE[dtype], atol=1e-6)
    z = torch.tensor([[torch.nan, 1.0], [torch.inf, 1.0], [torch.inf, 1.0]]).to(dtype)
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).to(dtype)
    torch.testing.assert_close(kernels.missed(z, a), kernels.missed_reference(z, a), equal_nan=True)


@built
@dtypes
def test_squared_relu_and_its_gradient_are_the_references_bit_for_bit(dtype):
    for v in (hard(3, 7, dtype=dtype), normal(40, 516, dtype=dtype), normal(516, 40, dtype=dtype).t()):
        (found, right), (slope, exact) = both_ways(passes.relu2, kernels.ACTS["relu2"], v)
        assert torch.equal(found.nan_to_num(7.0), right.nan_to_num(7.0)) and found.dtype == dtype
        assert torch.equal(slope.nan_to_num(7.0), exact.nan_to_num(7.0))


@built
@dtypes
@pytest.mark.parametrize("B, T, H, n", [(1, 1, 1, 2), (2, 5, 3, 8), (3, 17, 4, 32), (2, 9, 2, 70)])
def test_rotations_and_their_gradients_are_as_near_as_their_dtype(B, T, H, n, dtype):
    """Of heads that lie apart, behind one another or with gaps; and where each row has its own tables."""
    angles = normal(T, 1, n // 2)
    tables = [torch.cat(halves, -1).to(dtype) for halves in ((angles.cos(), angles.cos()),
                                                             (angles.sin(), -angles.sin()))]
    x = normal(B, T, 3 * H, n, dtype=dtype)
    for given in (x, x[:, :, H:], x[:, :, 0:H].transpose(1, 2).contiguous().transpose(1, 2),
                  torch.stack((x, x), dim=-1)[..., 0]):
        for found, right in both_ways(lambda x: passes.rotated(x, *tables).transpose(1, 2).contiguous(),
                                      lambda x: passes.rotated_reference(x, *tables).transpose(1, 2), given):
            torch.testing.assert_close(found, right, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    own = [table.expand(B, T, 1, n) for table in tables]
    assert torch.equal(passes.rotated(x, *own), passes.rotated_reference(x, *tables))
    assert passes.rotated(x.requires_grad_(), *tables).grad_fn.name() == "RotatedBackward"


@built
@dtypes
@pytest.mark.parametrize("shape, heads", [((1, 1), 0), ((3, 7), 0), ((2, 5, 64), 0), ((40, 516), 0),
                                          ((2, 9, 3 * 24), 3), ((2, 17, 6 * 32), 6)])
def test_rms_norms_and_their_gradients_are_as_near_as_their_dtype(shape, heads, dtype):
    """Also of the first two thirds of each token's heads, which lie apart."""
    def of(norm, x, *weight):
        x = x.unflatten(-1, (heads, -1))[..., :2 * heads // 3, :] if heads else x
        return norm(x, 1e-6, *(w.to(dtype) for w in weight))
    x, weight = normal(*shape, dtype=dtype) * 3, normal(shape[-1], seed=1) + 1
    for given in (x, torch.stack((x, x), dim=-1)[..., 0]):
        for weights in ((), (weight,)) if not heads else ((),):
            for found, right in both_ways(functools.partial(of, passes.rms_norm),
                                          functools.partial(of, passes.rms_norm_reference), given, *weights):
                assert found.dtype == right.dtype
                torch.testing.assert_close(found, right, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])
    assert passes.rms_norm(x.requires_grad_(), 1e-6).grad_fn.name() == "RMSBackward"


@built
@dtypes
@pytest.mark.parametrize("N, k", [(1, 1), (4, 1), (12, 12), (60, 15), (520, 31)])
def test_column_gates_and_their_gradients_are_the_references(N, k, dtype):
    """Scores and inhibition in quarters, whose sums are exact: equal ones choose the first, and NaN wins."""
    for seed in range(3):
        s = normal(3, 11, N, seed=seed).mul(4).round().div(4)
        inhibits = normal(N, N, seed=seed + 1).mul(2).round().div(4).relu() * (1 - torch.eye(N))
        balance = normal(N, seed=seed + 2).mul(2).round().div(4)
        pairs = list(both_ways(*(functools.partial(of, balance=balance, k=k, dtype=dtype) for of in (
            passes.column_gates, passes.column_gates_reference)), s, inhibits))
        found, right = pairs[0]
        assert found.dtype == dtype and torch.equal(found > 0, right > 0)
        for found, right in pairs:
            torch.testing.assert_close(found, right, rtol=TOLERANCE[dtype], atol=1e-4)
    s[0, 0, 0] = torch.nan                       # which inhibits all
    found, right = (of(s, inhibits, balance, k, dtype) for of in (passes.column_gates,
                                                                  passes.column_gates_reference))
    torch.testing.assert_close(found, right, rtol=TOLERANCE[dtype], atol=1e-4, equal_nan=True)
    assert found[0, 0].isnan().sum() == k


@built
def test_column_gates_of_a_model_in_bf16_read_its_balance_as_bf16():
    s, inhibits, balance = normal(11, 8), torch.zeros(8, 8), normal(8, seed=1).bfloat16()
    assert torch.equal(passes.column_gates(s, inhibits, balance, 2, torch.bfloat16),
                       passes.column_gates_reference(s, inhibits, balance, 2, torch.bfloat16))


@built
def test_passes_leave_tensors_without_memory_to_torch():
    with FakeTensorMode():
        for arm in dict(act="relu2", norm="rmsnorm", columns=4, columns_active=2), dict(act="osc"):
            assert build(arm)(tokens(2, 5), tokens(2, 5))[1].shape == ()


@built
def test_passes_take_no_tokens_and_any_number_of_threads():
    empty = torch.empty(0, 8, requires_grad=True)
    kernels.keep_largest(empty, 2, "relu2").sum().backward()
    assert empty.grad.shape == empty.shape
    threads, found = torch.get_num_threads(), []
    try:
        for count in range(3):
            torch.set_num_threads(count + 1)
            found.append([])
            v, edge, gates = normal(37, 100), normal(100, seed=1), F.relu(normal(37, 25, seed=2))
            for of, *inputs in ((lambda v: kernels.keep_largest(v, 9, "relu2"), v), (kernels.event, v, edge),
                                (PASSES["columns"][0], v, gates)):
                of = functools.partial(of, act="relu2") if len(inputs) > 1 else of
                found[count:] = [[*found[count], *(pair[0] for pair in both_ways(of, of, *inputs))]]
            gain, S = normal(100, seed=3), normal(25, 25, seed=4).abs() / 9
            norm = functools.partial(passes.rms_norm, eps=1e-6)
            gate = functools.partial(passes.column_gates, balance=edge[:25], k=6, dtype=torch.float32)
            for of, *inputs in ((passes.relu2, v), (norm, v.unflatten(-1, (4, 25))), (gate, v[:, :25], S),
                                (lambda v, w: norm(v, weight=w), v, gain)):
                found[count:] = [[*found[count], *(pair[0] for pair in both_ways(of, of, *inputs))]]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


@pytest.mark.parametrize("act", ["none", "relu2"])
def test_a_compiler_sees_the_passes_as_ops(act):
    v = normal(3, 8).requires_grad_()
    torch.library.opcheck(kernels.fire.op, (v, 4, 2, act))
    torch.library.opcheck(kernels.fire.op, (v.detach(), 8, 3, act))
    torch.library.opcheck(kernels.event_pass.op, (v, normal(8, seed=1).requires_grad_(), act))
    torch.library.opcheck(kernels.scaled_pass.op, (normal(3, 2, 4).requires_grad_(), normal(3, 2), act))
    torch.library.opcheck(kernels.missed_pass.op, (v, normal(3, 8, seed=1)))


def test_passes_without_a_compiler_are_their_references(monkeypatch):
    v = hard(5, 12, dtype=torch.float32)
    grad, right = normal(5, 12, seed=3), None
    for library in (kernels.cpu_library, lambda: (None, "off")):
        monkeypatch.setattr(passes, "cpu_library", library)
        kept, won = kernels.fire_forward(v, 4, 1, "none")
        found = [kept.nan_to_num(7.0), won, kernels.fire_back(grad, v, won, "none")]
        assert right is None or all(map(torch.equal, found, right))
        right = found


def test_a_gradient_without_memory_of_its_own_is_copied_and_the_copy_lives():
    z, a = normal(64, 4096).requires_grad_(), normal(64, 4096, seed=1).relu()
    w, phi, b = normal(4096, seed=2), normal(4096, seed=3), normal(4096, seed=4)
    for of, *inputs in (("missed", z, a), ("osc", z, w, phi, b)):
        found, expected = (torch.autograd.grad(product(*inputs).sum(), z)[0] for product in (
            getattr(kernels, of), getattr(kernels, f"{of}_reference")))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
