"""2:4 weights: pruning, packing, training, the packed product; and the custom ops of sparse_kernels.py."""
import functools
import itertools

import pytest
import torch
from arms import ARMS, PAIRS, TINY, build, tokens
from conftest import Job, one_sentence
from torch.nn import functional as F

import sparse_kernels as kernels
from layers import Linear, NeuronMajor, Packed, TwoOfFour, settle

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
WIDTHS = (4, 8, 28, 32, 36, 64, 68, 100, 128, 260)
kinds = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(N, K, seed=1, dtype=torch.float32):
    weight = kernels.prune_24(normal(N, K, seed=seed)).to(dtype) / K ** 0.5
    return weight, *kernels.pack_24(weight)


# ------------------------------------------- pruning and packing -----------------------------------------

def test_the_two_largest_of_every_four_are_kept():
    kept = kernels.prune_24(torch.tensor([[1.0, -3, 2, 0, 5, 5, 5, 5], [0, 0, 0, 7, -1, 1, -1, 1]]))
    assert kept.tolist() == [[0, -3, 2, 0, 5, 5, 0, 0], [0, 0, 0, 7, -1, 1, 0, 0]]
    for seed in range(20):
        weight = normal(7, 64, seed=seed)
        fours = weight.unflatten(-1, (-1, 4)).abs()
        third = fours.sort(dim=-1).values[..., [1]]
        assert torch.equal(kernels.two_of_four(weight.abs()), (fours > third).flatten(-2))


@kinds
def test_what_is_packed_comes_back_in_nine_sixteenths_of_the_bytes(dtype):
    for N, K in itertools.product((1, 3, 16), WIDTHS):
        weight, values, meta = packed(N, K, dtype=dtype)
        assert torch.equal(kernels.unpack_24(values, meta, K), weight)
        whole = N * -(-K // 32) * 32 * weight.element_size()
        assert values.nbytes + meta.nbytes == whole // 2 + whole // weight.element_size() // 8
    assert (values.nbytes + meta.nbytes) / whole == 0.5 + 1 / (8 * weight.element_size())


def test_packed_are_the_two_that_a_sort_puts_first_whatever_is_equal_or_no_number():
    """NaN above all, of equal ones the first: ties, zeros of both signs, infinities."""
    pool = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, torch.inf, -torch.inf, torch.nan])
    weight = pool[torch.cartesian_prod(*[torch.arange(8)] * 4)].view(64, -1)
    sizes = weight.abs().unflatten(-1, (-1, 4))
    order = sizes.nan_to_num(torch.inf, posinf=1e30).sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(sizes, dtype=torch.bool).scatter(-1, order[..., :2], True)
    assert torch.equal(kernels.two_of_four(weight.abs()), kept.flatten(-2))
    values, meta = kernels.pack_24(kernels.prune_24(weight))
    at = order[..., :2].sort(dim=-1).values
    right = weight.unflatten(-1, (-1, 4)).gather(-1, at).flatten(-2)
    assert torch.equal(values.nan_to_num(7.0), right.nan_to_num(7.0))
    code = (at[..., 0] | at[..., 1] << 2).unflatten(-1, (-1, 8)) << torch.arange(0, 32, 4)
    assert torch.equal(meta.long() & 0xffffffff, code.sum(-1))


@pytest.mark.parametrize("dtype", kernels.SHORT, ids=str)
def test_a_prompt_of_any_length_meets_the_same_packed_weights(dtype):
    """Short ones the packed rows, others and what is not finite dense ones: zero times infinity shows."""
    weight, values, meta = packed(37, 100, dtype=dtype)
    for tokens_ in (1, 8, 9, 16, 17, 63, 64, 65, 130):
        x = normal(tokens_, 100, seed=tokens_, dtype=dtype)
        with torch.inference_mode():
            found = kernels.linear_24(x, values, meta)
            torch.testing.assert_close(found.float(), F.linear(x.float(), weight.float()),
                                       atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
            for wrong in (torch.inf, torch.nan):
                broken = x.clone()
                broken[tokens_ // 2, 41] = wrong
                found = kernels.linear_24(broken, values, meta)
                assert torch.equal(found.isnan(), F.linear(broken.float(), weight.float()).isnan())
                assert found[tokens_ // 2].isfinite().logical_not().all()
    assert kernels.linear_24(normal(0, 100, dtype=dtype), values, meta).shape == (0, 37)


def test_what_cannot_be_packed_says_so():
    with pytest.raises(ValueError, match="30 is not a multiple of 4"):
        kernels.pack_24(normal(2, 30))
    with pytest.raises(ValueError, match="prune_24 first"):
        kernels.pack_24(normal(2, 32))


# ------------------------------------------- the product -------------------------------------------------

@kinds
def test_the_packed_product_equals_its_reference(dtype):
    """In the C kernel, where this machine has it; fp16 goes the reference's way."""
    for seed, (N, K, M) in enumerate(itertools.product((1, 5, 33), WIDTHS, (1, 3, 8, 9))):
        weight, values, meta = packed(N, K, seed, dtype)
        x, bias, onto = (normal(*shape, seed=seed, dtype=dtype) for shape in ((1, M, K), (N,), (1, M, N)))
        act = list(kernels.ACTS)[seed % 3]
        for b, o in ((bias, onto), (None, None)):
            with torch.inference_mode():
                found = kernels.linear_24(x, values, meta, b, o, act)
            exact = kernels.ACTS[act](F.linear(x.float(), weight.float(), b if b is None else b.float()))
            exact = exact if o is None else exact + o.float()
            torch.testing.assert_close(found.float(), exact, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def ops(dtype=torch.float32):
    """Every custom op: (op, reference, arguments) with and without what may be left out."""
    _, values, meta = packed(8, 64, dtype=dtype)
    grad = functools.partial(normal, dtype=dtype)
    x, bias, onto = grad(3, 64), grad(8, seed=1), grad(3, 8, seed=2)
    groups = torch.tensor([[0, 3], [4, 1], [2, 3]])
    up, down, a, scale = grad(10, 16), grad(10, 16, seed=1), grad(3, 4), grad(3, 2).abs()
    out_bias, unit_bias = grad(16), grad(10, seed=3)
    for act in kernels.ACTS:
        yield kernels.linear_24_op, kernels.linear_24_reference, (x, values, meta, bias, onto, act)
        yield kernels.linear_24_op, kernels.linear_24_reference, (x, values, meta, None, None, act)
        for rest in ((unit_bias, groups, scale), (None, groups, None)):
            yield kernels.gathered_up, kernels.gathered_up_reference, (x[:, :16].clone(), up, *rest, 2, act)
    yield kernels.winners_product, kernels.winners_product_reference, (x, grad(5, 64))
    for some, b, of in ((a, out_bias, groups), (grad(3, 10), None, None)):
        yield kernels.gathered_down, kernels.gathered_down_reference, (some, down, b, of, 2)
    ends = torch.tensor([1, 1, 3], dtype=torch.int32)                   # the second of three groups is empty
    for K, N in ((8, 12), (7, 5)):
        rows, weights = grad(3, K), grad(3, K, N)
        yield kernels.grouped_product_op, kernels.grouped_product_reference, (rows, weights, ends)
        yield kernels.grouped_product_op, kernels.grouped_product_reference, (rows, grad(3, N, K).mT, ends)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_groups_in_16_bits_on_a_cpu_are_filled_up_to_few_numbers_of_rows(dtype):
    """oneDNN compiles a product for every number of rows it meets: there are to be few."""
    ends = torch.tensor([5, 5, 21, 38], dtype=torch.int32)
    a, weights, toward = (normal(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(
        ((38, 8), (4, 8, 16), (38, 16))))
    rows, places, behind = kernels.filled_up(a, ends)
    assert behind.tolist() == [16, 16, 32, 64] and len(rows) == 64 and torch.equal(rows[places], a)
    assert rows.count_nonzero() == a.count_nonzero()
    found, right = ((a.clone().requires_grad_(), weights.clone().requires_grad_()) for _ in range(2))
    y = kernels.grouped_product(*found, ends)
    exact = kernels.grouped_product_reference(*right, ends)
    slopes, of = torch.autograd.grad(y, found, toward), torch.autograd.grad(exact, right, toward)
    for some, others in zip((y, *slopes), (exact, *of)):
        torch.testing.assert_close(some, others, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert kernels.filled_up(a.float(), ends)[1] is None


FREE = (1, 2)                                     # values and meta of linear_24: packed weights do not learn


def learning(op, arguments):
    """The same arguments as leaves that ask for gradients."""
    fixed = FREE if op is kernels.linear_24_op else ()
    return [t.clone().requires_grad_() if torch.is_tensor(t) and t.is_floating_point() and i not in fixed
            else t for i, t in enumerate(arguments)]


@pytest.mark.parametrize("op, reference, arguments", list(ops()))
def test_every_op_is_a_good_citizen(op, reference, arguments):
    """Schema, fake kernel, autograd and tracing; values, gradients and whole-graph compilation."""
    torch.library.opcheck(op, tuple(learning(op, arguments)))
    plain = learning(op, arguments)
    torch.compiler.reset()
    compiled = torch.compile(lambda *words: op(*words), fullgraph=True, backend="aot_eager")
    y = reference(*plain)
    toward = normal(*y.shape, seed=9)
    y.backward(toward)
    for run in (op, compiled):
        ours = learning(op, arguments)
        found = run(*ours)
        torch.testing.assert_close(found, y, atol=1e-5, rtol=1e-5)
        found.backward(toward)
        for mine, right in zip(ours, plain):
            if torch.is_tensor(mine) and mine.requires_grad:
                torch.testing.assert_close(mine.grad, right.grad, atol=1e-5, rtol=1e-5)


# ------------------------------------------- in a model --------------------------------------------------

MODELS = {name: arm for name, arm in (ARMS | PAIRS).items() if arm.get("weights") == "2:4"}


@pytest.mark.parametrize("arm", MODELS)
def test_no_four_inputs_of_a_pruned_matrix_hold_more_than_two(arm):
    model = build(MODELS[arm], std=0.2)
    sparse = [m for m in model.modules() if isinstance(m, TwoOfFour)]
    assert sparse
    for module in sparse:
        assert (module.matrix().unflatten(-1, (-1, 4)) != 0).sum(-1).max() <= 2
        assert torch.equal(module.matrix() != 0, kernels.two_of_four(module.weight.abs()))


def test_training_pulls_what_is_pruned_towards_zero():
    module = TwoOfFour(8, 3, bias=False, pull=0.1)
    module.init_weights(lambda p, std: p.data.copy_(normal(3, 8)))
    module.regularise()                                                  # a matrix without a gradient rests
    assert module.weight.grad is None
    x, toward = normal(5, 8, seed=1), normal(5, 3, seed=2)
    module(x).backward(toward)
    torch.testing.assert_close(module.weight.grad, toward.t() @ x)
    weight, pruned = module.weight.detach(), ~kernels.two_of_four(module.weight.detach().abs())
    module.regularise()
    torch.testing.assert_close(module.weight.grad, toward.t() @ x + 0.1 * weight * pruned)


@pytest.mark.parametrize("arm", MODELS)
def test_a_step_pulls_once_however_often_a_block_runs(arm):
    """The pull is the same whether a block is run once or several times, recomputed or not."""
    idx, grads = tokens(2, 9), []
    for strength in (0.0, 0.5):
        model = build(MODELS[arm], std=0.2, sr_ste=strength).train()
        torch.manual_seed(0)
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        model.regularise()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, module in model.named_modules():
        if isinstance(module, TwoOfFour):
            without, with_pull = (part[f"{name}.weight"] for part in grads)
            pruned = module.weight.detach() * ~kernels.two_of_four(module.weight.detach().abs())
            torch.testing.assert_close(with_pull - without, 0.5 * pruned, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("arm", MODELS)
@pytest.mark.parametrize("pack", [True, False], ids=["packed", "pruned"])
def test_a_settled_model_says_the_same(arm, pack):
    model, idx = build(MODELS[arm], std=0.2), tokens(2, 12)
    expected = model(idx, idx)[0]
    said = model.generate(tokens(1, 4), 20, temperature=0)
    settle(model, pack)
    assert not any(isinstance(m, TwoOfFour) for m in model.modules())
    torch.testing.assert_close(model(idx, idx)[0], expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.generate(tokens(1, 4), 20, temperature=0), said)


def test_a_packed_model_keeps_what_it_reads_by_unit():
    model = settle(build(dict(weights="2:4", act="relu2"), std=0.2))
    block = model.transformer.h[0]
    assert isinstance(block.attn.c_attn, Packed) and isinstance(block.mlp.c_fc, Packed)
    assert isinstance(block.mlp.c_proj, NeuronMajor) and block.mlp.c_fc.act == "relu2"
    gated = settle(build(dict(weights="2:4", columns=8, columns_active=2)))
    assert type(gated.transformer.h[0].mlp.c_fc) is Linear


def test_packed_products_are_counted_as_executed():
    model = settle(build(dict(weights="2:4")))
    C, layers = TINY["n_embd"], TINY["n_layer"]
    with torch.inference_mode(), kernels.counting() as work:
        model(tokens(1, 1))
    assert work.macs == layers * 12 * C * C // 2 + TINY["vocab_size"] * C
    held = sum(m.values.nbytes + m.meta.nbytes for m in model.modules() if isinstance(m, Packed))
    assert work.bytes == held + TINY["vocab_size"] * C * 4


def test_a_packed_checkpoint_samples_and_does_not_learn(train):
    train(weights="2:4", max_iters=4, n_embd=32)
    written = Job("training/export.py", ["--out_dir=out", "--dtype=float32"], train.folder, name="e").wait()
    assert written.status == 0, written.err
    assert "out-packed" in written.out
    said = {}
    for out in ("out", "out-packed"):
        words = [f"--out_dir={out}", "--device=cpu", "--dtype=float32", "--num_samples=1",
                 "--max_new_tokens=20", "--temperature=0"]
        run = Job("sample.py", words, train.folder, name="sample" + out).wait()
        assert run.status == 0 and "2:4 weights p" in run.err, run.err
        said[out] = run.out
    assert said["out"] == said["out-packed"]
    one_sentence(train("--init_from=out-packed", status=2, out="more"), "train.py", "packed", "cannot learn")
    dense = train(out="dense", max_iters=1)
    assert dense.status == 0
    before = (train.folder / "out" / "ckpt.pt").read_bytes()
    same = Job("training/export.py", ["--out_dir=out", "--export_dir=out"], train.folder, name="same").wait()
    one_sentence(same, "export.py", "export_dir=out", "would be lost")
    assert (train.folder / "out" / "ckpt.pt").read_bytes() == before
    missing = Job("training/export.py", ["--out_dir=none"], train.folder, name="missing").wait()
    one_sentence(missing, "export.py", "none holds no ckpt.pt")
    assert not (train.folder / "none-packed").exists()
    refused = Job("training/export.py", ["--out_dir=dense"], train.folder, name="refused").wait()
    one_sentence(refused, "export.py", "dense weights", "--weights=2:4")
