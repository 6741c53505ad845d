"""Windows, dendrites, the hourglass: what they see, what they compute, what they keep, what they refuse."""
import math

import pytest
import torch
from arms import ARMS, TINY, build, tokens
from torch.nn import functional as F

import bio_modules as bio
import sparse_kernels as kernels
from configurator import ConfigError
from decode import engine
from decode.context import Cache, CachedContext, Context
from layers import attend_blocks, attend_short, attend_window
from model import GPTConfig


def masked(q, k, v, window):
    """The reference: scores of all pairs, those outside (i - window, i] at -inf."""
    T = q.size(2)
    age = torch.arange(T)[:, None] - torch.arange(T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(age >= 0) & (age < window))


# ------------------------------------------------ windows ------------------------------------------------

@pytest.mark.parametrize("window", [1, 2, 3, 8, 15, 16, 40])
@pytest.mark.parametrize("T", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("of", ["blocks", "a mask"])
def test_a_window_is_the_masked_reference_forward_and_backward(of, T, window):
    parts = torch.randn(3, 2, 3, T, 8, dtype=torch.float64)
    found, exact = parts.clone().requires_grad_(), parts.clone().requires_grad_()
    q, k, v = found.unbind(0)
    y = attend_window(window, q, k, v, None, 0.0) if of == "blocks" else attend_short(q, k, v, 0.0, window)
    expected = masked(*exact.unbind(0), window)
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(found.grad, exact.grad)


@pytest.mark.parametrize("attend", [attend_blocks, attend_short])
def test_a_window_drops_and_rounds_as_plain_attention_does(attend):
    q, k, v = torch.randn(3, 2, 3, 40, 8).bfloat16()
    exact = masked(q.float(), k.float(), v.float(), 8)
    torch.testing.assert_close(attend(q, k, v, window=8, dropout=0.0).float(), exact, atol=2e-2, rtol=2e-2)
    torch.manual_seed(0)
    many = torch.stack([attend(q, k, v, window=8, dropout=0.5) for _ in range(400)]).float().mean(0)
    assert (many - exact).abs().mean() < 0.05 * exact.abs().mean() + 0.05


def test_layers_follow_the_pattern():
    model = build(dict(window=3, window_pattern="SSL", n_layer=7))
    assert [block.attn.window for block in model.transformer.h] == [3, 3, 0, 3, 3, 0, 3]
    one, two = tokens(1, 16), tokens(1, 16)
    two[0, 0] = (one[0, 0] + 1) % 31
    for pattern, sees in (("S", False), ("L", True)):
        model = build(dict(window=3, window_pattern=pattern, n_layer=2), std=0.2)
        same = torch.equal(model(one, one)[0][0, 5], model(two, two)[0][0, 5])  # two layers: 4 tokens back
        assert same != sees


def test_the_cache_of_a_window_stops_growing_and_so_does_the_work():
    shape = dict(window=8, window_pattern="S", block_size=4096, pos="rope")
    model = build(shape)
    sizes = [Cache(model, 1, length).nbytes() for length in (8, 64, 4096)]
    assert sizes[0] == sizes[1] == sizes[2]
    cache = Cache(model, 1, 4096)
    kept = [cache.layers[0][0, :, :, :3].clone()]
    with torch.inference_mode():
        for start in range(40):
            ctx = CachedContext(cache, start, 1, tokens(1, 41))
            model.trunk(tokens(1, 41)[:, start:start + 1], ctx)
            kept.append(ctx.extend(0, *torch.zeros(2, 1, 2, 1, 8))[0].size(2))
    assert kept[1:] == [min(start + 1, 8) for start in range(40)]


# ------------------------------------------------ dendrites ----------------------------------------------

DENDRITES = dict(dendrites=4, dendrites_active=2)


def test_open_branches_are_the_largest_gates_above_a_half_and_the_largest_always():
    gate = bio.BranchGate(GPTConfig(**TINY, **DENDRITES))
    with torch.no_grad():
        gate.router.weight.zero_()
        for bias, opened in (([1.0, 3, 2, -1], [0, 1, 1, 0]), ([-1.0, -3, 2, -1], [0, 0, 1, 0]),
                             ([-4.0, -3, -2, -5], [0, 0, 1, 0])):
            gate.router.bias.copy_(torch.tensor(bias))
            g = gate(torch.randn(1, 1, 16), Context(None))[0, 0]
            torch.testing.assert_close(g, torch.tensor(bias).sigmoid() * torch.tensor(opened))


def test_every_gate_has_a_gradient_and_closed_ones_the_one_of_an_open_one():
    gate = bio.BranchGate(GPTConfig(**TINY, dendrites=4, dendrites_active=1)).train()
    with torch.no_grad():
        gate.router.weight.normal_()
        gate.router.bias.fill_(1.0)
    x = torch.randn(3, 5, 16)
    g, weights = gate(x, Context(None)), torch.randn(3, 5, 4)
    (g * weights).sum().backward()
    soft = gate.router(x).detach().sigmoid()
    torch.testing.assert_close(gate.router.bias.grad, (weights * soft * (1 - soft)).sum((0, 1)))
    assert ((g == 0).sum(-1) == 3).all()


def test_gates_learn_to_close_to_their_budget():
    gate = bio.BranchGate(GPTConfig(**TINY, dendrites=8, dendrites_active=6, dendrite_cost=1.0)).train()
    with torch.no_grad():
        gate.init_weights(lambda p, std: p.normal_(0, std))
        gate.router.bias.fill_(4.0)
    optimizer = torch.optim.Adam(gate.parameters(), lr=1e-2)
    x, means = torch.randn(64, 16), []
    for _ in range(300):
        ctx = Context(None, training=True)
        gate(x, ctx)
        means.append(gate.router(x).sigmoid().mean().item())
        optimizer.zero_grad()
        sum(ctx.losses).backward()
        optimizer.step()
    assert means[0] > 0.95 and means[-1] == pytest.approx(0.75, abs=0.02)


def test_dendrites_cost_at_most_one_percent_of_attentions_parameters():
    for C, H, D in ((128, 4, 2), (768, 12, 4), (768, 12, 8)):
        plain = build({}, n_embd=C, n_head=H).transformer.h[0].attn
        branched = build(dict(dendrites=D, dendrites_active=1), n_embd=C, n_head=H).transformer.h[0].attn
        counts = [sum(p.numel() for p in module.parameters()) for module in (plain, branched)]
        assert counts[0] < counts[1] <= 1.01 * counts[0]


@pytest.mark.skipif(kernels.cpu_library()[0] is None, reason="the decode engine counts it")
@pytest.mark.parametrize("active", [1, 2, 3])
def test_a_decode_step_computes_the_open_branches_alone(active):
    arm = dict(dendrites=4, dendrites_active=active, n_layer=1, bias=False)
    model, idx = build(arm, std=0.2), tokens(1, 9)
    with torch.no_grad():
        model.transformer.h[0].attn.gate.router.bias.fill_(50.0)       # so that all of them want to be open
    cache = Cache(model, 1, 9)
    program = engine.program_of(model, cache, 31, 1, idx.device)
    program.begin(idx, [0], [9])
    macs, size = program.counted()["layer 0 attention"]
    kv, gate, rows = 2 * 16 * 16, 4 * 16, 16 * active // 4
    assert macs == kv + gate + 2 * rows * 16 and size == 4 * macs


def test_branches_of_few_tokens_equal_the_dense_forward():
    for rows in (1, 3):
        model, idx = build(ARMS["dendrites"] | dict(pos="rope", qk_norm=True), std=0.3), tokens(rows, 16)
        whole = model(idx, idx)[0].argmax(-1)
        out = model.generate(idx[:, :4], 8, temperature=0)
        assert torch.equal(model(out, out)[0].argmax(-1)[:, 3:-1], out[:, 4:])
        assert whole.shape == (rows, 16)


# ------------------------------------------------ the hourglass ------------------------------------------

def test_groups_pass_the_middle_layers_and_reach_the_tokens_from_their_last_one_on():
    model = build(dict(hierarchy=4, n_layer=6), std=0.2)
    assert model.transformer.hierarchy.outer == 1
    lengths = []
    for block in model.transformer.h:
        block.register_forward_pre_hook(lambda _, args: lengths.append(args[0].size(1)))
    model(tokens(2, 15), tokens(2, 15))
    assert lengths == [15, 3, 3, 3, 3, 15]
    glass = model.transformer.hierarchy
    heard = glass.spread_groups(torch.ones(1, 3, 16), 15)[0].ne(0).any(-1).tolist()
    assert heard == [False] * 3 + [True] * 12
    said = torch.arange(3.0)[None, :, None].expand(1, 3, 16)
    with torch.no_grad():
        glass.spread.fill_(1.0)
    assert glass.spread_groups(said, 15)[0, :, 0].tolist() == [0, 0, 0] + [0] * 4 + [1] * 4 + [2] * 4


def test_between_two_groups_a_decode_step_computes_nothing_of_the_middle():
    model = build(dict(hierarchy=4, n_layer=4, bias=False), std=0.2)
    idx, calls = tokens(1, 16), []
    model.transformer.h[1].register_forward_pre_hook(lambda *_: calls.append(len(macs)))
    cache, macs = Cache(model, 1, 16), []
    with torch.inference_mode():
        model.trunk(idx[:, :2], CachedContext(cache, 0, 2, idx))
        for start in range(2, 16):
            with kernels.counting() as work:
                model.trunk(idx[:, start:start + 1], CachedContext(cache, start, 1, idx))
            macs.append(work.macs)
    assert calls == [1, 5, 9, 13]                               # tokens 3, 7, 11, 15 complete a group
    assert macs[0] * 2 == macs[1] and set(macs) == {macs[0], macs[1]}


def test_flops_count_windows_and_groups():
    plain, T, C = build(dict(n_layer=4)), 16, 16
    base = plain.flops_per_token()
    local = build(dict(n_layer=4, window=4, window_pattern="SL")).flops_per_token()
    assert base - local == 12 * C * 2 * (T - 4)
    coarse = build(dict(n_layer=4, hierarchy=4))
    middle = sum(p.numel() for p in coarse.transformer.h[1].parameters() if p.dim() == 2)
    saved = 2 * (6 * middle * 3 / 4 + 12 * C * (T - T / 16))
    assert base - coarse.flops_per_token() == pytest.approx(saved)


@pytest.mark.parametrize("bad, word", [
    (dict(window=-1), "window=-1"), (dict(window=4, window_pattern="SX"), "SX"),
    (dict(window=4, window_pattern=""), "letters S"), (dict(window_pattern="S"), "no effect without window"),
    (dict(dendrites=3, dendrites_active=1), "dendrites=3 must divide the 8"),
    (dict(dendrites=2), "dendrites_active"), (dict(dendrites_active=1), "no effect without dendrites"),
    (dict(dendrites=8, dendrites_active=1, pos="rope"), "must be even"),
    (dict(dendrites=2, dendrites_active=1, dendrite_cost=-1.0), "dendrite_cost"),
    (dict(hierarchy=1), "at least 2"), (dict(hierarchy=4), "n_layer=2"),
    (dict(hierarchy=17, n_layer=3), "hierarchy=17.*block_size=16.*--hierarchy=16")])
def test_attention_flags_that_cannot_work_say_why(bad, word):
    with pytest.raises(ConfigError, match=word):
        GPTConfig(**TINY | bad)


def test_neutral_settings_are_the_plain_model():
    idx, plain = tokens(2, 16), build({}, std=0.2)
    wide = build(dict(window=16, window_pattern="S"), std=0.2)
    assert torch.equal(plain(idx, idx)[0], wide(idx, idx)[0])
    assert math.isclose(plain.flops_per_token(), wide.flops_per_token())
