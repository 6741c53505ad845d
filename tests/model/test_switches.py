"""The architecture switches and optimizers, one property each beyond those that every arm has."""
import math
from types import SimpleNamespace

import pytest
import torch
from arms import TINY, build, tokens
from torch import nn

import layers
import sparse_kernels
from bio_modules import Oscillating
from configurator import ConfigError
from decode.context import Cache, Context
from layers import cross_entropy, loss_in_chunks, rotate
from model import GPT, SIZES, GPTConfig, SwiGLU
from training import optimizers
from training.estimate import saved_bytes


def at(model, idx, start):
    """States of idx when its first token stands at position `start`."""
    with torch.no_grad():
        return model.trunk(idx, Context(slice(start, start + idx.size(1))))


def test_rope_sees_distances_not_positions():
    model, idx = build(dict(pos="rope"), std=0.2), tokens(2, 8)
    torch.testing.assert_close(at(model, idx, 5), at(model, idx, 0), atol=1e-5, rtol=0)
    learned = build({}, std=0.2)
    assert (at(learned, idx, 5) - at(learned, idx, 0)).abs().max() > 0.1


@pytest.mark.parametrize("pos, notices", [("rope", True), ("none", False)])
def test_rope_lets_one_layer_notice_the_order_of_the_prefix(pos, notices):
    """Without positions one layer's last state is invariant to the order before it; with rope it is not."""
    model, idx = build(dict(pos="rope", n_layer=1), std=0.2), tokens(1, 9)
    if pos == "none":
        model.transformer.wpe.cos.fill_(1.0)
        model.transformer.wpe.sin.fill_(0.0)
    permuted = torch.cat((idx[:, :8].flip(1), idx[:, 8:]), 1)
    assert not torch.equal(idx, permuted)
    assert torch.allclose(model(idx)[0], model(permuted)[0], atol=1e-5) is not notices


def test_rope_turns_by_token_position_along_the_right_axis():
    ctx = Context(slice(0, 4))
    model = build(dict(pos="rope"))
    model.transformer.wpe(torch.zeros(1), ctx)
    x = torch.randn(2, 4, 2, 8)
    turned = rotate(x, ctx)
    assert torch.equal(turned[:, 0], x[:, 0])                           # position 0 turns by nothing
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))     # a rotation keeps lengths
    angle = torch.atan2(turned[..., 4], turned[..., 0]) - torch.atan2(x[..., 4], x[..., 0])
    expected = -torch.arange(4.0)[:, None].expand(2, 4, 2)              # the first pair: 1 radian a token
    torch.testing.assert_close(torch.cos(angle), torch.cos(expected), atol=1e-5, rtol=0)


def test_qk_norm_makes_attention_blind_to_the_scale_of_queries_and_keys():
    model, idx = build(dict(qk_norm=True, bias=False), std=0.2), tokens(2, 16)
    before = model(idx, idx)[0]
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:2 * TINY["n_embd"]] *= 3
    torch.testing.assert_close(model(idx, idx)[0], before, atol=1e-4, rtol=0)


def test_a_gain_of_one_is_none_and_a_larger_one_sharpens_attention():
    plain, one, two = (build(dict(qk_norm=True) | gain, std=0.2)
                       for gain in ({}, dict(qk_gain=1.0), dict(qk_gain=2.0)))
    idx = tokens(2, 16)
    for other, gain in ((one, 1.0), (two, 2.0)):
        other.load_state_dict(plain.state_dict(), strict=False)
        for block in other.transformer.h:
            block.attn.query_gain.weight.data.fill_(gain)
    assert torch.equal(plain(idx)[0], one(idx)[0])
    assert not torch.allclose(plain(idx)[0], two(idx)[0], atol=1e-3)


def test_softcap_bounds_logits_and_barely_moves_small_ones():
    model, idx = build(dict(softcap=0.5), std=0.2), tokens(2, 16)
    plain = build({}, std=0.2)(idx, idx)[0]
    capped = model(idx, idx)[0]
    assert plain.abs().max() > 0.5 > capped.abs().max()
    torch.testing.assert_close(capped, 0.5 * torch.tanh(plain / 0.5))


def test_zero_init_starts_every_block_as_the_identity():
    model, idx = build(dict(zero_init=True)), tokens(2, 16)
    x = torch.randn(2, 16, TINY["n_embd"])
    for block in model.transformer.h:
        assert torch.equal(block(x, Context(slice(0, 16))), x)
    untied = build(dict(zero_init=True, tie_weights=False))
    assert torch.equal(untied(idx, idx)[0], torch.zeros(2, 16, TINY["vocab_size"]))


def test_swiglu_has_the_parameters_of_a_dense_mlp():
    for width in (384, 768, 1024):
        config = GPTConfig(act="swiglu", n_embd=width, n_head=2, bias=False)
        count = sum(p.numel() for p in SwiGLU(config, 0).parameters())
        assert abs(count / (8 * width ** 2) - 1) < 0.05


@pytest.mark.parametrize("order", [2, 3, 5])
def test_ngram_rows_are_chosen_by_the_last_tokens_alone(order):
    model = build(dict(ngram_buckets=4096, ngram_order=order), std=0.2)
    idx = tokens(1, 8)
    ctx = Context(slice(0, 8))
    before = model.transformer.wte(idx, ctx)
    changed = idx.clone()
    changed[0, 3] = (changed[0, 3] + 1) % TINY["vocab_size"]
    moved = (model.transformer.wte(changed, ctx) - before).abs().sum(-1)[0] > 0
    assert moved.tolist() == [3 <= t < 3 + order for t in range(8)]


def test_recompute_gives_the_same_gradients_and_keeps_less():
    kept = {}
    idx, grads = tokens(4, 16), {}
    for recompute in (False, True):
        model, sizes = build(dict(recompute=recompute, dropout=0.1), std=0.2).train(), []
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1],
                                                      lambda t: t):
            loss = model(idx, idx)[1]
        loss.backward()
        kept[recompute] = sum(sizes)
        grads[recompute] = [p.grad for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(grads[False], grads[True]))
    assert kept[True] < 0.5 * kept[False]


WHOLE_LOSSES = {"tied": {}, "untied": dict(tie_weights=False), "softcap": dict(softcap=2.0),
                "rope": dict(pos="rope", tie_weights=False, norm="rmsnorm"), "ngram": dict(ngram_buckets=64),
                "gates": dict(dendrites=4, dendrites_active=2, energy_budget=0.3), "ponder": dict(ponder=3),
                "recompute": dict(recompute=True), "odd": dict(vocab_size=33, n_embd=20)}


def loss_and_gradients(arm, targets, dtype=torch.float32, chunks=0, scale=1.0, **changes):
    """Of a batch in training mode, and the gradient of what enters the first block."""
    model, found = build(arm, std=0.2, loss_chunks=chunks, **changes).train(), []
    model.compute_dtype = dtype
    model.transformer.drop.register_forward_hook(lambda module, args, x: found.append(x) or x.retain_grad())
    logits, loss = model(tokens(3, 9), targets)
    assert (logits is None) == bool(chunks)
    (loss * scale).backward()
    named = {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), named | {"the stream": found[0].grad.float() / scale}


def some_ignored(seed=5):
    targets = tokens(3, 9, seed=seed)
    targets[0, 2:7] = targets[2, 8] = -1
    return targets


@pytest.mark.parametrize("chunks", [1, 4, 27, 100])
@pytest.mark.parametrize("arm", WHOLE_LOSSES.values(), ids=WHOLE_LOSSES.keys())
def test_a_loss_in_chunks_is_the_whole_loss_and_its_gradients(arm, chunks):
    """27 tokens, of which six do not count: in even and uneven chunks, one of ignored tokens alone."""
    for targets in (tokens(3, 9, seed=5), some_ignored()):
        (whole, wanted), (loss, found) = (loss_and_gradients(arm, targets, chunks=n) for n in (0, chunks))
        torch.testing.assert_close(loss, whole, rtol=1e-6, atol=1e-6)
        assert wanted.keys() == found.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype, scale", [(torch.bfloat16, 1.0), (torch.float16, 2.0 ** 16)], ids=str)
def test_a_loss_in_chunks_of_half_precision_is_as_near_the_exact_one_as_the_whole(dtype, scale):
    """fp16 with the scale of a gradient scaler; against fp32. A vocabulary of small probabilities."""
    for arm in ({}, dict(softcap=2.0, tie_weights=False)):
        of = lambda **how: loss_and_gradients(arm, some_ignored(), vocab_size=5003, **how)
        exact, whole, found = of(), of(dtype=dtype, scale=scale), of(dtype=dtype, scale=scale, chunks=4)
        assert abs(found[0] - exact[0]) <= 1.2 * abs(whole[0] - exact[0]) + 1e-3
        far, near = ({name: (of[1][name] - gradient).norm() for name, gradient in exact[1].items()}
                     for of in (whole, found))
        assert sum(near.values()) <= 1.5 * sum(far.values())           # states' gradients are rounded twice
        assert all(near[name] <= 2.5 * far[name] for name in far)


def test_a_loss_in_chunks_of_fp16_holds_small_and_large_parts():
    """A mean over 4,096 tokens, most of them of one target: parts below fp16's smallest number add up, sums
    above its largest are no infinity."""
    n, width, ids = 4096, 8, 64
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(size, width, generator=generator) for size in (n, ids))
    x[:, 0], targets = 60.0, torch.zeros(1, n, dtype=torch.long)
    weight[0, 0] = -1.0
    found = []
    for dtype in (torch.float64, torch.float16):
        states = x.to(dtype)[None].requires_grad_()
        head = weight.to(dtype if dtype == torch.float64 else torch.float32).requires_grad_()
        loss = (cross_entropy(states @ head.T, targets) if dtype == torch.float64 else
                loss_in_chunks(states, head, targets, 2, 0.0))
        (1024 * loss).backward()
        found.append((loss.double(), states.grad.double(), head.grad.double()))
    for ours, exact in zip(found[1], found[0]):
        assert (ours - exact).norm() <= 3e-3 * exact.norm()


def test_a_loss_in_chunks_under_autocast_is_the_whole_loss():
    found = []
    for chunks in (0, 4):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(loss_and_gradients({}, some_ignored(), chunks=chunks))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=1e-3)
    for name, gradient in found[0][1].items():
        assert (found[1][1][name] - gradient).norm() <= 2e-2 * gradient.norm() + 1e-7, name


def test_a_loss_in_chunks_follows_the_gradient_that_comes_in():
    """Twice, for a graph that is kept, and for weights or states that do not learn."""
    x, weight = torch.randn(2, 7, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    targets = tokens(2, 7) % 11
    loss = loss_in_chunks(x, weight, targets, 3, 0.0)
    once = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, (x, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (x, weight))
    for a, b, c in zip(once, thrice, again):
        torch.testing.assert_close(3 * a, b)
        assert torch.equal(a, c)
    for frozen in (x, weight):
        frozen.requires_grad_(False)
        x.grad = weight.grad = None
        loss_in_chunks(x, weight, targets, 3, 0.0).backward()
        assert frozen.grad is None
        frozen.requires_grad_()
        other = weight if frozen is x else x
        torch.testing.assert_close(other.grad, once[other is weight])
    with torch.no_grad():
        assert torch.equal(loss_in_chunks(x, weight, targets, 3, 0.0), loss.detach())


def test_a_loss_in_chunks_of_no_target_or_a_wrong_one_is_what_the_whole_loss_is():
    x, weight = torch.randn(2, 7, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    none = torch.full((2, 7), -1)
    assert loss_in_chunks(x, weight, none, 3, 0.0).isnan() and cross_entropy(x @ weight.T, none).isnan()
    for wrong in (11, -2):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            cross_entropy(x @ weight.T, torch.full((2, 7), wrong))
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            loss_in_chunks(x, weight, torch.full((2, 7), wrong), 3, 0.0)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most numbers of one tensor that an op made."""
    numbers = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        for t in torch.utils._pytree.tree_leaves(out):
            self.numbers = max(self.numbers, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


def test_with_a_loss_in_chunks_no_tensor_has_the_logits_of_all_tokens():
    ids, most, kept = tokens(4, 16), {}, {}
    for chunks in (0, 8):
        model = build({}, loss_chunks=chunks, vocab_size=1000).train()
        with Largest() as seen:
            model(ids, ids)[1].backward()
        most[chunks], kept[chunks] = seen.numbers, saved_bytes(model, ids, ids)
    assert most[0] == 64 * 1000 and most[8] == 16 * 1000       # that of the matrix: a chunk has 8 * 1000
    assert kept[8] < kept[0] - 4 * 64 * 1000 + 4 * 1000 * 16 + 4 * 64 * 16 + 100


@pytest.mark.parametrize("arm", [{}, dict(softcap=2.0, tie_weights=False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_loss_in_chunks_is_one_graph_with_the_same_gradients(arm, dtype):
    torch.compiler.reset()
    model, found = build(arm, std=0.2, loss_chunks=4).train(), []
    model.compute_dtype = dtype
    for run in (torch.compile(model, fullgraph=True, backend="aot_eager"), model):
        model.zero_grad()
        loss = run(tokens(3, 9), some_ignored())[1]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for compiled, eager in zip(*found):
        assert (compiled - eager).norm() <= {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype] * eager.norm()


def test_evaluations_of_a_loss_in_chunks_have_logits_unless_they_are_not_wanted():
    model, ids = build(dict(loss_chunks=4), std=0.2), tokens(2, 9)
    logits, loss = model(ids, ids)
    alone, same = model.choose(loss_alone=True)(ids, ids)
    assert logits.shape == (2, 9, 31) and alone is None
    torch.testing.assert_close(loss, same)


def learns_xor(activation, seeds=20):
    """Can one neuron with this activation, by gradient descent, put XOR on two sides of a threshold?"""
    x = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    y = torch.tensor([-1.0, 1, 1, -1])
    for seed in range(seeds):
        torch.manual_seed(seed)
        act = activation()
        if hasattr(act, "init_weights"):
            with torch.no_grad():
                act.init_weights(lambda p, std: nn.init.normal_(p, 0, std))
        weight, shift, gain, cut = (nn.Parameter(torch.randn(n)) for n in (2, 1, 1, 1))
        optimizer = torch.optim.Adam([weight, shift, gain, cut, *act.parameters()], lr=0.1)
        for _ in range(200):
            out = gain * act(x @ weight + shift) + cut
            optimizer.zero_grad()
            nn.functional.softplus(-y * out).mean().backward()
            optimizer.step()
        if (out * y > 0).all():
            return True
    return False


def test_one_oscillating_unit_solves_xor_and_so_does_one_gelu_but_no_relu():
    assert learns_xor(lambda: Oscillating(1))
    assert learns_xor(nn.GELU)
    assert not learns_xor(nn.ReLU)


def test_oscillating_starts_as_defined():
    act = Oscillating(20_000)
    with torch.no_grad():
        act.init_weights(lambda p, std: nn.init.normal_(p, 0, std))
    assert abs(act.w.mean() - 1) < 0.01 and abs(act.w.std() - 0.1) < 0.01
    assert abs(act.phi.mean()) < 0.01 and abs(act.phi.std() - 0.1) < 0.01 and not act.b.any()
    model = build(dict(act="osc"))
    first = model.transformer.h[0].mlp.act
    assert not torch.equal(first.w - 1, first.phi), "w and phi are drawn from different generators"


def muon_config(**changes):
    keys = dict(optimizer="muon", learning_rate=1e-3, muon_learning_rate=0.02, muon_momentum=0.95,
                weight_decay=0.0, beta1=0.9, beta2=0.95, muon_steps=5)
    return SimpleNamespace(**keys | changes)


def test_muon_updates_are_orthogonal_matrices_at_steps_1_10_and_100():
    model = GPT(GPTConfig(block_size=16, vocab_size=31, n_layer=1, n_head=2, n_embd=64), seed=0)
    cfg = muon_config()
    optimizer = optimizers.build(model, cfg, "cpu")
    matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    for step in range(1, 101):
        idx = tokens(4, 17, seed=step)
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        before = [p.detach().clone() for p in matrices]
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, 10, 100):
            for old, p in zip(before, matrices):
                scale = cfg.muon_learning_rate * math.sqrt(max(1, p.size(0) / p.size(1)))
                largest = torch.linalg.matrix_norm((old - p) / scale, ord=2)
                assert 0.7 <= largest <= 1.3, (step, tuple(p.shape), largest.item())


def test_every_parameter_is_in_one_group_and_muon_takes_the_hidden_matrices():
    for arm in ({}, dict(act="osc", pos="rope", tie_weights=False, ngram_buckets=8)):
        model = build(arm)
        muon, plain = optimizers.build(model, muon_config(), "cpu").parts
        names = {id(p): n for n, p in model.named_parameters()}
        taken = {names[id(p)] for g in muon.param_groups for p in g["params"]}
        assert taken == {n for n, p in model.named_parameters() if ".h." in n and p.dim() == 2}
        with pytest.raises(AssertionError, match="no optimizer group"):
            optimizers.assert_partition(model, plain)


def test_together_saves_and_restores_both_optimizers():
    model, idx = build({}), tokens(4, 17)
    optimizer = optimizers.build(model, muon_config(), "cpu")
    for _ in range(3):
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step()
    other = optimizers.build(model, muon_config(), "cpu")
    other.load_state_dict(optimizer.state_dict())
    for a, b in zip(optimizer.parts, other.parts):
        saved, loaded = a.state_dict()["state"], b.state_dict()["state"]
        assert saved.keys() == loaded.keys() and len(saved)
        for key in saved:
            assert all(torch.equal(torch.as_tensor(saved[key][n]), torch.as_tensor(loaded[key][n]))
                       for n in saved[key])
    with pytest.raises(ValueError, match="holds 0 optimizers"):
        other.load_state_dict({"state": {}, "param_groups": []})


def schedule(name, iteration, **changes):
    keys = dict(decay_lr=True, learning_rate=1.0, min_lr=0.1, warmup_iters=10, lr_decay_iters=110,
                lr_schedule=name, lr_decay_share=0.5)
    return optimizers.learning_rate(SimpleNamespace(**keys | changes), iteration)


def test_schedules_hit_their_corners():
    for name in optimizers.SCHEDULES:
        assert schedule(name, 0) == 1 / 11 and schedule(name, 10) == 1.0
    assert schedule("cosine", 60) == pytest.approx(0.55) and schedule("linear", 60) == pytest.approx(0.55)
    assert schedule("cosine", 35) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule("wsd", 59) == 1.0 and schedule("wsd", 85) == pytest.approx(0.55)
    assert [schedule(name, 110) for name in ("cosine", "linear", "wsd", "constant")] == [0.1, 0.1, 0.1, 1.0]
    assert schedule("cosine", 0, decay_lr=False) == 1.0


@pytest.mark.parametrize("size, count", [("small", 45), ("medium", 203), ("large", 757), ("xlarge", 2520),
                                         ("gpt2-xl", 1556)])
def test_named_sizes_have_the_parameters_they_say(size, count):
    with torch.device("meta"):
        model = GPT(GPTConfig(**SIZES[size]), init=False)
    assert round(model.get_num_params() / 1e6) == count


def test_a_choice_that_does_not_exist_is_named():
    for bad, word in ((dict(norm="batchnorm"), "layernorm or rmsnorm"), (dict(act="mish"), "gelu or relu2"),
                      (dict(pos="alibi"), "learned or rope"), (dict(softcap=-1.0), "softcap"),
                      (dict(qk_norm=True, qk_gain=-1.0), "qk_gain"), (dict(qk_gain=2.0), "qk_norm"),
                      (dict(pos="rope", n_embd=18, n_head=6), "even")):
        with pytest.raises(ConfigError, match=word):
            GPTConfig(**TINY | bad)


def test_flops_count_matrices_not_tables():
    plain, tables, untied = build({}), build(dict(ngram_buckets=1000)), build(dict(tie_weights=False))
    assert plain.flops_per_token() == tables.flops_per_token() == untied.flops_per_token()
    matrices = sum(p.numel() for name, p in plain.named_parameters() if p.dim() == 2 and "wpe" not in name)
    assert plain.flops_per_token() == 6 * matrices + 12 * 2 * 16 * 16
    large = GPTConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304)
    with torch.device("meta"):
        gpt2 = GPT(large, init=False)
    nanogpt = 6 * gpt2.get_num_params() + 12 * 12 * 768 * 1024
    assert 0.999 < gpt2.flops_per_token() / nanogpt < 1


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_lean_optimizers_make_torchs_update(name, monkeypatch):
    monkeypatch.setattr(sparse_kernels, "NATIVE_BF16", True)      # torch's products, both
    results = []
    for optimizer_class in (getattr(optimizers, name), getattr(torch.optim, name)):
        weights = [nn.Parameter(torch.linspace(-1, 1, 256 * n).view(-1, 32).clone()) for n in (8, 4, 1, 8, 1)]
        optimizer = optimizer_class(weights, lr=0.1, weight_decay=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            sum(w.mul(n + 1).sin().sum() for n, w in enumerate(weights)).backward()
            optimizer.step()
        results.append(weights)
    for ours, theirs in zip(*results):
        assert torch.allclose(ours, theirs, atol=2e-3), "bf16 products, batched or not"


def test_bf16_products_of_many_rows_are_those_of_fp32_rounded_once(monkeypatch):
    x, weight, bias = (torch.randn(*size).bfloat16() for size in ((33, 40), (24, 40), (24,)))
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double()).bfloat16()
    for native in (False, True):
        monkeypatch.setattr(sparse_kernels, "NATIVE_BF16", native)
        found = layers.project(x, weight, bias)
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=2 ** -7, atol=2 ** -7)
    monkeypatch.setattr(sparse_kernels, "NATIVE_BF16", False)
    x.requires_grad_()
    layers.project(x, weight, None).float().square().sum().backward()
    assert x.grad.dtype == torch.bfloat16 and x.grad.isfinite().all() and x.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", [(3, 24, 40), (1, 64, 16)])
def test_newton_schulz_through_fp32_is_no_further_from_exact_than_torchs_bf16(shape, monkeypatch):
    a, b, c = 3.4445, -4.775, 2.0315
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    exact = matrices.mT.double() if shape[1] > shape[2] else matrices.double()
    exact = exact / exact.norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        gram = exact @ exact.mT
        exact = a * exact + (b * gram + c * gram @ gram) @ exact
    exact, errors = exact.mT if shape[1] > shape[2] else exact, []
    for native in (False, True):
        monkeypatch.setattr(sparse_kernels, "NATIVE_BF16", native)
        errors.append((optimizers.orthogonal(matrices, (a, b, c), 5, 1e-7) - exact).abs().mean())
    assert errors[0] <= 1.25 * errors[1] and errors[0] < 0.02


@pytest.mark.parametrize("native", [True, False])
def test_a_bf16_model_is_one_graph_whatever_multiplies_it(native, monkeypatch):
    monkeypatch.setattr(sparse_kernels, "NATIVE_BF16", native)
    model = build(dict(window=4, window_pattern="SL", n_layer=2)).to(torch.bfloat16)
    idx = tokens(2, 8)
    loss = torch.compile(model, fullgraph=True, backend="eager")(idx, idx)[1]
    torch.testing.assert_close(loss, model(idx, idx)[1])


# ------------------------------------------------ queries that share keys and values ---------------------

SHARING = {"one": dict(n_kv_head=1), "two": dict(n_kv_head=2), "rope": dict(n_kv_head=2, pos="rope"),
           "window": dict(n_kv_head=2, window=3, window_pattern="SL"), "dendrites": dict(
               n_kv_head=2, dendrites=2, dendrites_active=1), "gain": dict(
               n_kv_head=2, qk_norm=True, qk_gain=2.0), "ponder": dict(n_kv_head=1, ponder=3)}


def with_keys_for_each(model, arm):
    """The same function as a model in which each query has a key and a value: copies of those it shares."""
    c, full = model.config, build(SHARING[arm] | dict(n_head=4, n_kv_head=0))
    weights = model.state_dict()
    for name, t in weights.items():
        if ".c_attn." in name:
            q, kv = t[:c.n_embd], t[c.n_embd:].unflatten(0, (2, -1, c.heads()[1]))
            kv = kv.repeat_interleave(4 // c.n_kv_head, 1)
            weights[name] = torch.cat((q, kv.flatten(0, 2)))
    full.load_state_dict(weights)
    return full


@pytest.mark.parametrize("arm", SHARING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_queries_that_share_a_key_see_what_copies_of_it_would_show_them(arm, dtype, threads):
    """In a forward, in its gradients, and in steps of one row and of several behind a prompt."""
    model = build(SHARING[arm] | dict(n_head=4), std=0.3)
    full, idx = with_keys_for_each(model, arm), tokens(3, 16)
    torch.testing.assert_close(model(idx, idx)[0], full(idx, idx)[0])
    for twin in (model, full):
        twin(idx, idx)[1].backward()
    torch.testing.assert_close(model.transformer.wte.weight.grad, full.transformer.wte.weight.grad)
    model, full = (twin.to(dtype).choose(threads=threads) for twin in (model, full))
    for rows, lengths in ((1, None), (3, torch.tensor([5, 1, 3]))):
        for choices in ("", "by modules"):
            ids = [twin.choose(forward=choices).generate(idx[:rows, :5], 9, 0.0, lengths=lengths)
                   for twin in (model, full)]
            assert torch.equal(*ids)


def test_the_cache_of_shared_keys_is_so_much_smaller():
    sizes = [Cache(build(dict(n_head=8, n_kv_head=n)), 1, 16).nbytes() for n in (0, 8, 4, 1)]
    assert sizes == [sizes[0], sizes[0], sizes[0] // 2, sizes[0] // 8]
    assert build(dict(n_kv_head=2)).state_dict().keys() == build({}).state_dict().keys()


@pytest.mark.parametrize("arm, parts", [
    (dict(n_head=4, n_kv_head=3), ["n_kv_head=3", "n_head=4"]),
    (dict(n_kv_head=4), ["n_kv_head=4", "n_head=2"]), (dict(n_kv_head=-1), ["n_kv_head=-1"]),
    (dict(rope_theta=5e5), ["rope_theta=500000.0", "pos='rope'"]),
    (dict(rope_factor=8.0), ["rope_factor=8.0", "pos='rope'"]),
    (dict(pos="rope", rope_low=2.0), ["rope_low=2.0 has no effect without rope_factor"]),
    (dict(pos="rope", rope_factor=0.5), ["rope_factor=0.5 must be at least 1"]),
    (dict(pos="rope", rope_factor=8.0, rope_low=4.0), ["rope_low=4.0", "rope_high=4.0"]),
    (dict(pos="rope", rope_factor=8.0, rope_original=0), ["rope_original=0 must be at least 1"]),
    (dict(rope_theta=0.0, pos="rope"), ["rope_theta=0.0"]), (dict(norm_eps=-1e-5), ["norm_eps=-1e-05"]),
], ids=str)
def test_what_the_switches_do_not_mean_is_refused(arm, parts):
    with pytest.raises(ConfigError) as error:
        build(arm)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


def test_rope_theta_is_the_base_of_the_wavelengths():
    """The last pair of 8 dimensions turns by theta ** (-3/4) a token."""
    for theta in (10000.0, 100.0):
        positions = build(dict(pos="rope", rope_theta=theta)).transformer.wpe
        assert positions.cos[5, 0, 3] == pytest.approx(math.cos(5 * theta ** -0.75))
        again = positions.to(torch.bfloat16).to(torch.float32)
        assert again.cos[5, 0, 3] == pytest.approx(math.cos(5 * theta ** -0.75))


def test_slow_frequencies_of_llamas_rotation_turn_slower_and_fast_ones_as_before():
    """Of wavelengths 6.3, 20, 63 and 199 tokens one turns more than 4 times in 32, one between 1 and 4."""
    arm = dict(pos="rope", rope_theta=100.0)
    plain, scaled = (build(arm | more).transformer.wpe for more in ({}, dict(rope_factor=4.0,
                                                                            rope_original=32)))
    stays = (32 * 100 ** -0.25 / (2 * math.pi) - 1) / 3
    slower = torch.tensor([1, stays + (1 - stays) / 4, 1 / 4, 1 / 4])
    turned = torch.atan2(plain.sin, plain.cos)[1, 0, :4] * slower
    torch.testing.assert_close(scaled.cos[3, 0, :4], (3 * turned).cos())
    torch.testing.assert_close(scaled.sin[3, 0, 4:], -(3 * turned).sin())
    assert torch.equal(scaled.to(torch.bfloat16).to(torch.float32).cos, scaled.cos)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_norm_eps_is_added_to_the_mean_square(norm):
    x = 1e-3 * torch.randn(3, 16)
    for eps, own in ((0.0, {"layernorm": 1e-5, "rmsnorm": 1e-6}[norm]), (1e-3, 1e-3)):
        found = build(dict(norm=norm, norm_eps=eps)).transformer.ln_f(x)
        y = x - x.mean(-1, keepdim=True) * (norm == "layernorm")
        torch.testing.assert_close(found, y * (y.square().mean(-1, keepdim=True) + own).rsqrt())
