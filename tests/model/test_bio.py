"""The bio MLPs: what they keep, what they compute, what they count, and what they refuse."""
import itertools
import math
import re

import pytest
import torch
from arms import ARMS, CONFLICTS, TINY, build, tokens
from torch import nn

import bio_modules as bio
import sparse_kernels as kernels
from configurator import ConfigError
from decode import counters
from decode.context import Context
from layers import NeuronMajor
from model import GPT, GPTConfig
from training import optimizers

SPARSE = ["relu2", "topk", "winners", "event_gate", "columns", "experts", "predict"]
UNITS = 4 * TINY["n_embd"]


def hidden_of(model, idx):
    """What enters each W_down on idx, by a hook of its own."""
    seen = []
    hooks = [b.mlp.c_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
             for b in model.transformer.h]
    model(idx, idx)
    for hook in hooks:
        hook.remove()
    return seen


def step_work(model, idx):
    """Work of one cached decode step behind idx -> Tally."""
    with torch.inference_mode(), kernels.counting() as work:
        stepped = list(zip(range(2), steps(model, idx, work)))
    return stepped[1][1]


def steps(model, idx, work):
    from decode import sampling
    before = 0, 0
    for _ in sampling.stream(model, idx, 2, sampling.Sampler(temperature=0)):
        yield work.macs - before[0], work.bytes - before[1]
        before = work.macs, work.bytes


# ------------------------------------------------ selectors ----------------------------------------------

@pytest.mark.parametrize("share", [0.05, 0.1, 0.25, 0.9])
def test_topk_keeps_the_largest_units_of_each_token_unscaled(share):
    a = torch.randn(3, 5, 40)
    out = bio.TopK(GPTConfig(**TINY, mlp_topk=share), 40)(a, None)
    k = max(1, round(share * 40))
    assert ((out != 0).sum(-1) == k).all()
    smallest = torch.where(out == 0, math.inf, out.abs()).amin(-1)
    largest_loser = torch.where(out == 0, a.abs(), 0).amax(-1)
    assert (smallest >= largest_loser).all() and torch.equal(out[out != 0], a[out != 0])


@torch.no_grad()
def test_gates_that_come_first_choose_units_whatever_the_up_projection_says():
    mlp = build(ARMS["gate_first"], std=0.2).transformer.h[0].mlp
    x, units, seen = torch.randn(3, 5, TINY["n_embd"]), mlp.c_proj.in_features, []
    hook = mlp.c_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    y = mlp(x, Context(None))
    mlp.c_fc.weight[units:].mul_(-3)
    mlp.c_fc.bias[units:].mul_(-3)
    mlp(x, Context(None))
    hook.remove()
    gates = nn.functional.silu(nn.functional.linear(x, mlp.c_fc.weight[:units], mlp.c_fc.bias[:units]))
    edge = gates.abs().topk(round(0.25 * units)).values[..., -1:]
    up = nn.functional.linear(x, mlp.c_fc.weight[units:], mlp.c_fc.bias[units:]) / -3
    kept = torch.where(gates.abs() >= edge, gates * up, 0)
    torch.testing.assert_close(seen[0], kept)
    torch.testing.assert_close(seen[1], -3 * seen[0])
    torch.testing.assert_close(y, mlp.c_proj(kept))
    event = build(dict(act="swiglu", event_gate=True, event_rate=0.3, gate_first=True), std=0.2)
    mlp = event.transformer.h[0].mlp
    mlp.start_from_dense(mlp, x[0].repeat(50, 1))
    gates = nn.functional.silu(mlp.c_fc(x[0])[..., :units])
    assert (mlp.select(gates, Context(None)) != 0).float().mean() == pytest.approx(0.3, abs=0.02)


def test_topk_anneals_in_training_alone():
    topk = bio.TopK(GPTConfig(**TINY, mlp_topk=0.25), 64)
    for progress, kept in ((0, 64), (0.5, 45), (0.99, 26), (1.0, 16)):
        topk.anneal(progress)
        a = torch.randn(2, 64)
        assert (topk.train()(a, None) != 0).sum(-1).tolist() == [kept] * 2
        assert (topk.eval()(a, None) != 0).sum(-1).tolist() == [16] * 2


def test_two_of_four_winners_are_two_of_every_four_neighbours():
    out = bio.GroupWinners(GPTConfig(**TINY, mlp_topk=0.5, mlp_topk_group=4), 64)(torch.randn(7, 64), None)
    assert ((out.view(7, 16, 4) != 0).sum(-1) == 2).all()


def test_event_gates_learn_to_close_to_their_rate_and_open_again():
    gate = bio.EventGate(GPTConfig(**TINY, event_gate=True, event_rate=0.2, event_cost=1.0), 32).train()
    a = torch.randn(512, 32)
    for start in (-0.6, 0.2):                                    # almost all open, almost all closed
        nn.init.normal_(gate.threshold, start, 0.02)
        optimizer = torch.optim.Adam([gate.threshold], lr=5e-3)
        shares = []
        for _ in range(400):
            ctx = Context(None, training=True)
            out = gate(a, ctx)
            shares.append((out != 0).float().mean().item())
            optimizer.zero_grad()
            sum(ctx.losses).backward()
            optimizer.step()
        assert abs(shares[0] - 0.2) > 0.15 and shares[-1] == pytest.approx(0.2, abs=0.03)
    assert torch.equal(out[out != 0], a[out != 0])


def test_event_gate_slope_is_the_sigmoids_in_log_space():
    gate = bio.EventGate(GPTConfig(**TINY, event_gate=True), 3).train()
    nn.init.zeros_(gate.threshold)                              # theta = 1
    a = torch.tensor([[0.5, 0.7, 1.5], [-0.8, 3.0, -1.1]], requires_grad=True)
    gate(a, Context(None)).sum().backward()
    assert torch.equal(a.grad, torch.tensor([[0.0, 0, 1], [0, 1, 1]]))      # the gate itself
    size = a.detach().abs()                                     # sigmoid(log s) = s / (1 + s)
    torch.testing.assert_close(gate.threshold.grad, -gate.GAIN * (a.detach() * size / (1 + size) ** 2).sum(0))


# ------------------------------------------------ columns and experts ------------------------------------

def test_exactly_the_winners_answer_and_inhibition_can_change_who_wins():
    gate = bio.ColumnGate(GPTConfig(**TINY, columns=8, columns_active=2))
    with torch.no_grad():
        nn.init.normal_(gate.router.weight)
        nn.init.constant_(gate.inhibition, -20)
    x = torch.randn(5, 16)
    free = gate(x, Context(None))
    assert ((free > 0).sum(-1) == 2).all()
    scores = gate.router(x)
    assert torch.equal(free > 0, scores >= scores.topk(2).values[:, 1:])
    torch.testing.assert_close(free[free > 0], scores.sigmoid()[free > 0])
    with torch.no_grad():                                       # column 0's activity silences all others
        gate.router.weight[0], gate.inhibition.view(8, 8)[1:, 0] = 10 * x[0], 50.0
    inhibited = gate(x[:1], Context(None))
    assert inhibited[0, 0] > 0.99 and inhibited[0, 1:].max() < 1e-6


def test_one_token_through_columns_follows_every_change_of_the_weights():
    mlp = build(ARMS["columns"] | dict(act="relu2")).transformer.h[0].mlp.requires_grad_(False)
    for step in range(40):
        with torch.no_grad():
            for p in mlp.parameters():
                p.normal_(generator=torch.Generator().manual_seed(step))
        x = torch.randn(1, 1, 16, dtype=mlp.gate.balance.dtype)
        expected = mlp(x, Context(None))
        with torch.inference_mode():
            torch.testing.assert_close(mlp(x, Context(None)), expected, rtol=1e-4, atol=1e-3)
        if step == 20:
            mlp.double().float()


def test_an_idle_column_gains_until_it_wins():
    torch.manual_seed(1)
    gate = bio.ColumnGate(GPTConfig(**TINY, columns=4, columns_active=1)).train()
    with torch.no_grad():
        gate.init_weights(None)
        nn.init.normal_(gate.router.weight, std=0.1)
    x = torch.randn(256, 16)
    x[:, 0] = 1
    with torch.no_grad():
        gate.router.weight[:, 0] = torch.tensor([1.0, 0, 0, -1])            # one takes all, one is dead
    optimizer = torch.optim.Adam([gate.balance], lr=1e-2)
    loads = []
    for _ in range(400):
        ctx = Context(None, training=True)
        loads.append((gate(x, ctx) > 0).float().mean(0))
        optimizer.zero_grad()
        sum(ctx.losses).backward()
        optimizer.step()
    assert loads[0].max() > 0.9 and loads[0].min() == 0
    assert loads[-1].min() > 0.15, loads[-1]


def test_experts_equal_a_loop_over_tokens():
    model, idx = build(ARMS["experts"] | dict(act="osc"), std=0.2), tokens(2, 9)
    mlp, x = model.transformer.h[0].mlp, torch.randn(2, 9, 16)
    gates = mlp.gate(x, Context(None))
    torch.testing.assert_close(gates.sum(-1), torch.ones(2, 9))
    expected = torch.zeros_like(x)
    for b, t in itertools.product(range(2), range(9)):
        a = mlp.act(mlp.c_fc(x[b, t])) * gates[b, t].repeat_interleave(16)
        expected[b, t] = mlp.c_proj(a)
    torch.testing.assert_close(mlp(x, Context(None)), expected)
    assert idx.shape == (2, 9)


def test_the_balance_terms_are_least_when_the_load_is_even():
    even, skewed = torch.full((8, 4), 0.25), torch.tensor([[0.97, 0.01, 0.01, 0.01]]).repeat(8, 1)
    rotating = torch.eye(4).repeat(2, 1)
    assert bio.imbalance(rotating, even) == pytest.approx(1.0)
    assert bio.imbalance(torch.eye(4)[:1].repeat(8, 1), skewed) > 3.8


# ------------------------------------------------ dendrites ----------------------------------------------

def test_branches_see_their_part_of_the_stream_alone_until_the_mix():
    mlp = build(ARMS["compartments"], std=0.2).transformer.h[0].mlp
    with torch.no_grad():
        mlp.mix.copy_(torch.eye(4))
    x = torch.randn(1, 1, 16)
    changed = x.clone()
    changed[..., :4] += 1                                       # the first branch's inputs
    hidden = []
    hook = mlp.c_proj.register_forward_pre_hook(lambda _, args: hidden.append(args[0][0, 0]))
    mlp(x, Context(None)), mlp(changed, Context(None))
    hook.remove()
    moved = (hidden[0] != hidden[1]).view(4, 16).all(1)
    assert moved.tolist() == [True, False, False, False]


def test_no_two_linear_maps_follow_each_other():
    mlp = build(ARMS["compartments"], std=0.2).transformer.h[0].mlp
    x = torch.randn(1, 1, 16)
    with torch.no_grad():
        mlp.c_proj.bias.zero_()
        for part in (mlp.c_fc.bias,):
            part.zero_()
    one, two = mlp(x, Context(None)), mlp(2 * x, Context(None))
    assert not torch.allclose(2 * one, two, rtol=1e-2), "branch and soma are nonlinear"


def test_a_dendritic_mlp_has_fewer_parameters_and_every_arm_at_most_5_percent_more():
    dense = {act: build(dict(act=act), n_embd=128, n_head=4).get_num_params() for act in ("gelu", "relu2")}
    assert build(ARMS["compartments"], n_embd=128, n_head=4).get_num_params() < dense["gelu"]
    for arm in ("topk", "winners", "event_gate", "columns", "compartments", "experts"):
        assert build(ARMS[arm], n_embd=128, n_head=4).get_num_params() <= 1.05 * dense["gelu"], arm
    wide = build(dict(mlp_topk=0.1, mlp_predict=4), n_embd=128, n_head=4)
    assert wide.get_num_params() <= 1.05 * dense["gelu"]


# ------------------------------------------------ prediction ---------------------------------------------

def test_the_predictor_leaves_every_other_weight_s_training_alone():
    finals = []
    for arm in ("topk", "predict"):
        model = build(dict(ARMS["topk"]) | ARMS[arm]).train()
        optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
        for step in range(5):
            idx = tokens(4, 17, seed=step)
            model(idx[:, :-1], idx[:, 1:])[1].backward()
            for part in optimizers.by_clipping(model):
                torch.nn.utils.clip_grad_norm_(part, 0.1)
            optimizer.step()
            optimizer.zero_grad()
        finals.append(model.state_dict())
    topk, predict = finals
    assert all(torch.equal(topk[name], predict[name]) for name in topk)
    assert {n.split(".")[-2] for n in predict.keys() - topk.keys()} == {"sense", "guess"}


def test_the_predictor_learns_who_wins_and_the_policy_uses_it():
    model = build(dict(mlp_topk=0.25, mlp_predict=16, mlp_active=0.25, act="relu2")).train()
    optimizer = model.configure_optimizers(0.0, 1e-2, (0.9, 0.95), "cpu")
    idx = tokens(8, 17)
    at_start = counters.summary(counters.counters(model, idx[:, :-1]))["recall"]
    for _ in range(150):
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counters.summary(counters.counters(model, idx[:, :-1]))["recall"] > max(0.8, at_start + 0.1)
    model.eval()
    exact = model(idx, idx)[1] if idx.size(1) <= 16 else model(idx[:, :-1], idx[:, 1:])[1]
    predicted = model.use_policy()(idx[:, :-1], idx[:, 1:])[1]
    assert not torch.equal(exact, predicted) and predicted < exact + 0.5
    seen = hidden_of(model, idx[:, :-1])
    assert all(((a != 0).sum(-1) <= 16).all() for a in seen)


@pytest.mark.parametrize("policy", [False, True])
def test_predicted_decode_equals_its_own_full_forward(policy):
    model = build(ARMS["predict"] | dict(act="relu2", pos="rope"), std=0.2).use_policy(policy)
    for rows in (1, 3):
        idx = tokens(rows, 5)
        out = model.generate(idx, 8, temperature=0)
        for t in range(5, 13):
            assert torch.equal(model(out[:, :t])[0].argmax(-1)[:, 0], out[:, t])


# ------------------------------------------------ real savings -------------------------------------------

@pytest.mark.parametrize("arm", SPARSE)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_few_tokens_computed_by_rows_equal_the_dense_forward(arm, rows):
    mlp = build(ARMS[arm] | dict(act="relu2"), std=0.2).transformer.h[0].mlp
    x = torch.randn(rows, 1, 16)
    expected = mlp(x, Context(None)).detach()
    with torch.inference_mode():
        torch.testing.assert_close(mlp(x, Context(None)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arm, up, down", [
    ("relu2", 64, None), ("topk", 64, 16), ("winners", 64, 32), ("columns", 16, 16), ("experts", 32, 32)])
def test_a_decode_step_executes_only_the_live_rows(arm, up, down):
    model, idx = build(ARMS[arm] | dict(n_layer=1, bias=False)), tokens(1, 5)
    work = {}
    for name, m in (("arm", model), ("dense", build(dict(n_layer=1, bias=False)))):
        work[name] = step_work(m, idx)
    C, gate = 16, {"columns": 8 * 16 + 8 * 8, "experts": 4 * 16}.get(arm, 0)    # router, who inhibits whom
    if down is None:
        hidden = hidden_of(model, model.generate(idx, 1, temperature=0))[0][0, -1]
        down = int((hidden != 0).sum())
    saved = C * (UNITS - up) + C * (UNITS - down) - gate
    assert work["dense"][0] - work["arm"][0] == saved
    assert work["dense"][1] - work["arm"][1] == 4 * saved


@pytest.mark.parametrize("policy, macs", [(False, 64 * 16 + 16 * 16), (True, 16 * 4 + 4 * 64 + 2 * 13 * 16)])
def test_prediction_saves_both_projections(policy, macs):
    arm = ARMS["predict"] | dict(n_layer=1, bias=False, mlp_active=0.2)
    dense = step_work(build(dict(n_layer=1, bias=False)), tokens(1, 5))[0]
    assert dense - step_work(build(arm).use_policy(policy), tokens(1, 5))[0] == 2 * 64 * 16 - macs


@pytest.mark.parametrize("arm", [arm for arm in SPARSE if arm != "experts"])
def test_counters_are_the_tensors_own(arm):
    model, idx = build(ARMS[arm] | dict(act="relu2"), std=0.2).train(), tokens(4, 16)
    counted = counters.counters(model, idx)
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for layer, a in enumerate(hidden_of(model.eval(), idx)):
        a = a.flatten(0, -2)
        assert counted[layer]["zeros"] == pytest.approx((a == 0).sum().item() / a.numel())
        assert counted[layer]["dead_units"] == sum(bool((a[:, u] == 0).all()) for u in range(UNITS))
    for row in counted.values():
        up, gate = {"columns": (16, 8 * 16 + 8 * 8)}.get(arm, (UNITS, 0))
        assert gate + 16 * up <= row["mlp_macs"] <= gate + 2 * 16 * up
        assert row["mlp_bytes"] == 4 * row["mlp_macs"]
    groups = {"columns": 2}.get(arm)
    assert counted[0].get("active_groups") == groups


def test_a_dense_model_has_no_counters_and_sums_are_of_the_dead():
    assert counters.counters(build({}), tokens(2, 8)) == {} and counters.summary({}) == {}
    assert counters.summary({0: dict(zeros=0.5, dead_units=3), 1: dict(zeros=0.7, dead_units=4)}) == \
        dict(zeros=0.6, dead_units=7)


def test_neuron_major_is_a_linear_stored_by_input():
    plain, major = build({}), build(dict(mlp_topk=0.999))
    for a, b in zip(plain.transformer.h, major.transformer.h):
        assert isinstance(b.mlp.c_proj, NeuronMajor) and b.mlp.c_proj.weight.t().is_contiguous()
        assert torch.equal(a.mlp.c_proj.weight, b.mlp.c_proj.weight)
    major.load_state_dict(plain.state_dict())
    assert major.to(torch.bfloat16).transformer.h[0].mlp.c_proj.weight.t().is_contiguous()


# ------------------------------------------------ flags --------------------------------------------------

@pytest.mark.parametrize("a, b", sorted(CONFLICTS))
def test_flags_that_exclude_each_other_are_both_named(a, b):
    with pytest.raises(ConfigError) as error:
        GPTConfig(**TINY | ARMS[a] | ARMS[b])
    flag = {"topk": "mlp_topk", "winners": "mlp_topk", "predict": "mlp_predict",
            "screened_gates": "mlp_screen", "gate_first": "mlp_topk|swiglu"}
    assert all(re.search(flag.get(name, name), str(error.value)) for name in (a, b)), error.value


@pytest.mark.parametrize("bad, word", [
    (dict(mlp_topk=0.0), r"mlp_topk=0\.0"), (dict(mlp_topk=1.5), "mlp_topk"),
    (dict(gate_first=True, mlp_topk=0.5), "act='gelu'.*--act=swiglu"),
    (dict(gate_first=True, act="swiglu"), "--mlp_topk=0.5"),
    (dict(act="relu2", mlp_screen=16), "mlp_screen=16.*act='relu2'.*--mlp_screen=4"),
    (dict(act="swiglu", mlp_screen=4, mlp_live=0.0), "mlp_live=0.0.*--mlp_live=0.65"),
    (dict(act="swiglu", mlp_screen=4), "mlp_live=0.15.*--mlp_live=0.65"),
    (dict(mlp_topk_group=4), "below 1"),
    (dict(mlp_topk_group=5, mlp_topk=0.4), "divide"), (dict(mlp_topk_group=4, mlp_topk=0.3), "whole"),
    (dict(columns=8), "columns_active"), (dict(columns=7, columns_active=1), "divide"),
    (dict(mlp_units=-1), "mlp_units"), (dict(columns_active=2), "no effect without columns"),
    (dict(experts=4, experts_active=5), "1..4"),
    (dict(expert_width=8), "no effect without experts"), (dict(compartments=3), "n_embd=16.*compartments=3"),
    (dict(mlp_predict=4), "mlp_topk"), (dict(mlp_active=0.1), "no effect without mlp_predict"),
    (dict(event_rate=0.3), "no effect without event_gate"),
    (dict(event_gate=True, event_rate=1.5), "event_rate")])
def test_mlp_flags_that_cannot_work_say_why(bad, word):
    with pytest.raises(ConfigError, match=word):
        GPTConfig(**TINY | bad)


def test_turning_a_mechanism_on_leaves_every_shared_weight_as_it_is():
    plain = build({}).state_dict()
    for arm in ("topk", "winners", "event_gate", "columns", "experts", "predict"):
        weights = GPT(GPTConfig(**TINY | ARMS[arm]), seed=1).state_dict()
        assert all(torch.equal(plain[name], weights[name]) for name in plain), arm


def test_branches_of_the_stream_are_counted():
    C, units, K = 16, 64, 4
    macs, _ = step_work(build(dict(n_layer=1, bias=False, compartments=K, act="gelu")), tokens(1, 5))
    dense, _ = step_work(build(dict(n_layer=1, bias=False)), tokens(1, 5))
    mix = K * units                                              # K x K, for each of units / K
    assert dense - macs == C * units - C * units // K - mix
