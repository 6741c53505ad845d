"""Early exits: what a token that leaves early costs, and that it changes nobody else."""
import math
from functools import partial

import pytest
import torch
from arms import ARMS, PAIRS, TINY, build, tokens
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_kernels as kernels
from bio_modules import ExpertGate, Halting
from configurator import ConfigError
from decode.context import Cache, CachedContext, Context
from decode.sampling import Sampler, Speculation, stream
from kernels import passes
from model import GPT, GPTConfig
from training import continual, energy

EXITS = {name: arm for name, arm in (ARMS | PAIRS).items() if "exits" in arm}
every_exit = pytest.mark.parametrize("arm", EXITS.values(), ids=EXITS.keys())
DEEP = dict(exits="1,2,4", n_layer=5, pos="rope", exit_threshold=0.65)


def leaving(arm=None, std=0.2):
    """A model whose tokens leave at every exit, some at none."""
    model = build(DEEP | (arm or {}), std=std).use_policy()
    for probe, bias in zip(model.transformer.exits.probes, (-1.0, -1.0, 5.0)):
        probe.weight.data.mul_(3)
        probe.bias.data.fill_(bias)
    return model


def step_by_step(model, idx, prompt):
    """Logits (B, T - prompt + 1, V) after a prompt and each later token, with a cache."""
    cache = Cache(model, len(idx), idx.size(1))
    states = [model.trunk(idx[:, :prompt], CachedContext(cache, 0, prompt, idx))[:, -1:]]
    states += [model.trunk(idx[:, t:t + 1], CachedContext(cache, t, 1, idx))
               for t in range(prompt, idx.size(1))]
    return model.head(torch.cat(states, dim=1))


@every_exit
def test_decoding_with_early_exits_is_the_full_forward_with_them(arm):
    model, idx = build(arm | dict(exit_threshold=0.5), std=0.2).use_policy(), tokens(3, 16)
    with torch.no_grad():
        whole = model.head(model.trunk(idx, context(model, idx)))
        torch.testing.assert_close(step_by_step(model, idx, 5), whole[:, 4:], atol=1e-5, rtol=1e-4)


def context(model, idx):
    return CachedContext(Cache(model, len(idx), idx.size(1)), 0, idx.size(1), idx)


@every_exit
@pytest.mark.parametrize("rows", [1, 3])
def test_early_exits_behind_a_prompt_of_one_token_are_the_full_forward(arm, rows):
    for seed in range(2):
        model, idx = leaving_anywhere(arm, seed), tokens(rows, 16, seed)
        with torch.no_grad():
            whole = model.head(model.trunk(idx, context(model, idx)))
            for prompt in (1, 2):
                torch.testing.assert_close(step_by_step(model, idx, prompt), whole[:, prompt - 1:], atol=1e-5,
                                           rtol=1e-4)


def leaving_anywhere(arm, seed):
    """A model whose weights are drawn from a seed, with a threshold that half of its tokens pass."""
    model = build(arm | dict(exit_threshold=0.5))
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model.use_policy()


def in_chunks(model, idx, sizes):
    """Logits of all tokens (B, T), read in calls of so many tokens each over one cache."""
    cache, states, start = Cache(model, len(idx), idx.size(1)), [], 0
    for size in sizes:
        ctx = CachedContext(cache, start, size, idx)
        states.append(model.trunk(idx[:, start:start + size], ctx))
        start += size
    return model.head(torch.cat(states, dim=1))


@every_exit
def test_what_leavers_owe_is_paid_in_calls_of_any_size(arm):
    model, idx = leaving_anywhere(arm, 1), tokens(1, 16)
    with torch.no_grad():
        whole = in_chunks(model, idx, [16])
        for sizes in ([1, 1, 5, 1, 8], [1] * 10 + [6], [4, 1, 1, 1, 9], [2, 1, 1, 2, 1, 1, 8]):
            torch.testing.assert_close(in_chunks(model, idx, sizes), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("again", [0, 1, 4])
def test_columns_that_are_read_anew_owe_nothing_of_what_they_held(again):
    model = leaving_anywhere(DEEP, 0)
    old, new = tokens(1, 9), torch.cat((tokens(1, 9)[:, :again], tokens(1, 16, seed=5)), dim=1)[:, :16]
    cache, states = Cache(model, 1, 16), []
    with torch.no_grad():
        for ids, begin in ((old, 0), (new, again)):
            for t in range(begin, ids.size(1)):
                states.append(model.trunk(ids[:, t:t + 1], CachedContext(cache, t, 1, ids)))
        whole = model.trunk(new, context(model, new))
    torch.testing.assert_close(torch.cat(states[-16 + again:], dim=1), whole[:, again:], atol=1e-5, rtol=1e-4)


def test_making_a_call_does_not_change_the_cache():
    model, idx = leaving_anywhere(DEEP, 0), tokens(1, 16)
    with torch.no_grad():
        whole = step_by_step(model, idx, 1)
        cache, states = Cache(model, 1, 16), []
        for t in range(16):
            CachedContext(cache, 0, 1, idx), CachedContext(cache, 0, 3, idx).of_rows(torch.tensor([0]))
            states.append(model.trunk(idx[:, t:t + 1], CachedContext(cache, t, 1, idx)))
    assert torch.equal(model.head(torch.cat(states, dim=1)), whole)


def test_tokens_leave_at_every_exit_and_at_none_and_are_counted():
    model, idx = leaving(), tokens(4, 16)
    ran = {layer: 0 for layer in range(5)}
    for layer, block in enumerate(model.transformer.h):
        block.mlp.register_forward_hook(lambda m, i, o, layer=layer: ran.update({layer: ran[layer] + len(o)}))
    with torch.no_grad():
        step_by_step(model, idx, 1)
    exits = model.transformer.exits
    assert ran[0] == exits.tokens_run == 64
    assert 64 > ran[1] > ran[2] == ran[3] > ran[4] > 0, ran
    assert sum(ran.values()) == exits.layers_run


def test_a_token_that_leaves_owes_its_neighbours_nothing():
    model, idx = leaving(), tokens(4, 16)
    with torch.no_grad():
        together = step_by_step(model, idx, 3)
        for row in range(4):
            torch.testing.assert_close(together[[row]], step_by_step(model, idx[[row]], 3), atol=1e-5,
                                       rtol=1e-4)


@pytest.mark.parametrize("arm", ["gpt2", "window"])
def test_prompts_of_different_lengths_leave_as_they_do_alone(arm):
    model, idx = leaving(ARMS[arm]), tokens(3, 6)
    lengths = [6, 2, 4]
    together = model.generate(idx, 8, temperature=0, lengths=lengths)
    for row, length in enumerate(lengths):
        alone = model.generate(idx[[row], :length], 8, temperature=0)
        assert together[row, :length + 8].tolist() == alone[0].tolist()


@pytest.mark.parametrize("threshold, layers", [(0.0, 1), (1.0, 5)])
def test_the_threshold_goes_from_the_first_exit_to_full_depth(threshold, layers):
    model, idx = leaving(dict(exit_threshold=threshold)), tokens(2, 12)
    with torch.no_grad():
        early = step_by_step(model, idx, 4)
        exits = model.transformer.exits
        assert exits.layers_run == layers * exits.tokens_run
        whole = step_by_step(model.use_policy(False), idx, 4)
    assert torch.equal(early, whole) == (layers == 5)


def test_without_the_policy_exits_do_not_change_the_output():
    model, plain, idx = build(DEEP), build(dict(n_layer=5, pos="rope")), tokens(2, 12)
    assert torch.equal(model(idx)[0], plain(idx)[0])


def test_the_loss_is_the_sum_of_the_exits_rising_with_depth():
    model, idx = build(DEEP, std=0.2), tokens(2, 12)
    targets = tokens(2, 12, seed=1)
    plain = model(idx, targets)[1]
    exits = model.train().transformer.exits
    assert exits.shares == pytest.approx([0.5 / 7, 1.0 / 7, 2.0 / 7])
    early = []
    for depth in (1, 2, 4):
        shallow = build(dict(n_layer=depth, pos="rope"))
        shallow.load_state_dict(model.state_dict(), strict=False)
        early.append(shallow(idx, targets)[1])
    expected = plain + sum(share * loss for share, loss in zip(exits.shares, early))
    ce = [loss for loss in exits_losses(model, idx, targets)]
    assert float(plain + sum(ce[::2])) == pytest.approx(float(expected), rel=1e-5)
    assert float(model(idx, targets)[1]) == pytest.approx(float(plain + sum(ce)), rel=1e-5)


def exits_losses(model, idx, targets):
    """Cross-entropy and probe loss of each exit in turn."""
    ctx = Context(model.positions(idx.size(1)), training=True)
    logits = model.head(model.trunk(idx, ctx))
    return list(model.exit_losses(ctx, logits, targets))


def test_probes_learn_beside_the_model():
    model, idx = build(DEEP, std=0.2).train(), tokens(2, 12)
    model(idx, idx)[1].backward()
    with_probes = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for probe in model.transformer.exits.probes:
        probe.weight.data.mul_(-3)
    model(idx, idx)[1].backward()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, with_probes[name]) == ("probes" not in name), name


def test_layer_dropout_skips_late_layers_for_whole_sequences():
    model = build(DEEP | dict(exits="1", layer_dropout=0.9), std=0.2).train()
    exits, x = model.transformer.exits, torch.zeros(4000, 1, 16)
    assert exits.drops == pytest.approx([0.9 * (2 ** (i / 4) - 1) for i in range(5)])
    for block in model.transformer.h:
        block.forward = lambda x, ctx: x + 1
    torch.manual_seed(0)
    passed = exits.whole(model.transformer.h, x, Context(slice(0, 1), training=True))
    assert passed.mean() == pytest.approx(5 - sum(exits.drops), abs=0.05)
    model.eval()
    assert torch.equal(exits.whole(model.transformer.h, x, Context(slice(0, 1))), x + 5)


@pytest.mark.parametrize("bad, word", [(dict(exits="2"), "1..1"), (dict(exits="0"), "1..1"),
                                       (dict(exits="a"), "rising numbers"),
                                       (dict(exits="2,1", n_layer=4), "rising"),
                                       (dict(exits="1", exit_threshold=2.0), "exit_threshold"),
                                       (dict(exits="1", layer_dropout=1.0), "layer_dropout"),
                                       (dict(exit_cost=0.1), "exits"),
                                       (dict(exits="1", hierarchy=2, n_layer=3), "hierarchy")])
def test_exits_that_cannot_be_are_named(bad, word):
    with pytest.raises(ConfigError, match=word):
        GPTConfig(**TINY | bad)


def test_a_sequence_of_exits_keeps_its_parameters():
    assert GPT(GPTConfig(**TINY | DEEP)).get_num_params() == build(
        dict(n_layer=5, pos="rope")).get_num_params() + 3 * 17


def greedy(model, idx, new, drafts, **filters):
    """(tokens of a Speculation, tokens of all layers one by one, the Speculation)."""
    speculation, sampler = Speculation(model, drafts), Sampler(temperature=0, **filters)
    drafted = torch.cat(list(speculation.stream(idx, new, sampler)), dim=1)
    return drafted, torch.cat(list(stream(model, idx, new, sampler)), dim=1), speculation


@every_exit
def test_speculation_is_greedy_decoding_token_for_token(arm):
    model = build(arm, std=0.2)
    for drafts, prompt, new in ((1, 1, 9), (3, 5, 11), (5, 3, 20)):              # 20: past block_size
        drafted, plain, _ = greedy(model, tokens(1, prompt), new, drafts)
        assert drafted.tolist() == plain.tolist()


@every_exit
def test_speculation_asks_all_layers_whatever_the_models_policy(arm):
    for seed in range(2):
        model, sampler = leaving_anywhere(arm, seed), Sampler(temperature=0)
        for prompt, new in ((1, 6), (7, 11)):                                    # 11: past block_size
            idx, all_layers = tokens(1, prompt), model.choices._replace(leave_at=None)
            early = model.generate(idx, new, temperature=0)
            plain = torch.cat(list(stream(model, idx, new, sampler, choices=all_layers)), dim=1)
            drafted = torch.cat(list(Speculation(model, 3).stream(idx, new, sampler)), dim=1)
            assert drafted.tolist() == plain.tolist()
            assert torch.equal(model.generate(idx, new, temperature=0), early)


def test_a_stream_goes_on_as_it_began_whatever_is_switched_meanwhile():
    model, idx = leaving_anywhere(DEEP | dict(adapters="a,b", adapter_width=4), 0), tokens(1, 3)
    ways, alone = ((False, 0), (True, 0), (True, 1)), []
    for policy, adapter in ways:
        continual.use_adapters(model.use_policy(policy), [adapter])
        alone.append(model.generate(idx, 20, temperature=0)[0, 3:].tolist())
    assert len({tuple(found) for found in alone}) == 3
    streams, found = [], [[], [], []]
    for policy, adapter in ways:
        continual.use_adapters(model.use_policy(policy), [adapter])
        streams.append(stream(model, idx, 20, Sampler(temperature=0)))
        found[len(streams) - 1].append(int(next(streams[-1])))
    for _ in range(19):
        for one, drawn in zip(streams, found):
            drawn.append(int(next(one)))
    assert found == alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_speculation_is_greedy_decoding_on_the_kernels_of_any_dtype(dtype):
    model = build(dict(exits="1", n_layer=3, block_size=128, n_embd=32), std=0.2)
    drafted, plain, speculation = greedy(model.to(dtype), tokens(1, 7), 100, 4, repetition_penalty=1.3)
    assert drafted.tolist() == plain.tolist()
    assert 0 < speculation.accepted < speculation.proposed


def test_drafts_of_a_model_whose_late_layers_say_nothing_all_stand():
    model = build(dict(exits="2", n_layer=4), std=0.2)
    for block in model.transformer.h[2:]:
        for out in (block.attn.c_proj, block.mlp.c_proj):
            out.weight.data.zero_()
            out.bias.data.zero_()
    for temperature in (0, 1.0):
        speculation = Speculation(model, 3)
        assert len(list(speculation.stream(tokens(1, 4), 9, Sampler(temperature)))) == 9
        assert speculation.accepted == speculation.proposed == 9


@pytest.mark.slow
def test_speculation_draws_from_the_full_models_distribution():
    model, idx = build(dict(exits="1", n_layer=4, vocab_size=5, tie_weights=False), std=0.4), tokens(1, 3) % 5
    torch.manual_seed(0)
    sampler, drawn = Sampler(temperature=0.7, top_k=4), torch.zeros(5, 5)
    speculation = Speculation(model, 2)
    for _ in range(4000):
        a, b = (int(t) for t in speculation.stream(idx, 2, sampler))
        drawn[a, b] += 1
    ids = [torch.cat((idx, torch.tensor([[a]])), dim=1) for a in range(5)]
    with torch.no_grad():
        first, *second = [sampler.probabilities(model(i)[0][:, -1], torch.zeros(1, 5, dtype=torch.bool))[0]
                          for i in (idx, *ids)]
    torch.testing.assert_close(drawn / 4000, first[:, None] * torch.stack(second), atol=0.03, rtol=0)
    assert 0.2 < speculation.accepted / speculation.proposed < 0.95


def test_speculation_needs_exits_and_one_row():
    with pytest.raises(ConfigError, match="--exits=1"):
        Speculation(build({}), 3)
    with pytest.raises(ConfigError, match="one row"):
        list(Speculation(build(DEEP), 3).stream(tokens(2, 3), 2, Sampler()))
    with pytest.raises(ConfigError, match="speculate=0"):
        Speculation(build(DEEP), 0)


# ------------------------------------------------ pondering ---------------------------------------------

USED = ("hierarchy", "exits", "ponder", "experts")     # what decides how often a weight is used
COUNTED = [pytest.param(arm, id=name, marks=() if name in ARMS or arm.keys() & {*USED} else pytest.mark.slow)
           for name, arm in (ARMS | PAIRS).items()]
PONDER = {name: arm for name, arm in (ARMS | PAIRS).items() if "ponder" in arm}


def pondering(arm=None, bias=1.0, **changes):
    """A model whose tokens halt after one, two, three and four runs."""
    model = build(dict(ponder=4, n_layer=3) | (arm or {}), std=0.2, **changes)
    halt = model.transformer.h[1].halting.halt
    halt.weight.data.mul_(6)
    halt.bias.data.fill_(bias)
    return model


def weighed(model):
    """Collect (step, weights, which halt) of every run."""
    halting, runs = model.transformer.h[1].halting, []
    plain = halting.weigh

    def weigh(y, left, step):
        found = plain(y, left, step)
        runs.append((step, *found))
        return found
    halting.weigh = weigh
    return runs


@torch.no_grad()
def test_halting_weights_sum_to_one_and_tokens_halt_after_different_runs():
    model, idx = pondering(), tokens(2, 16)
    runs = weighed(model)
    ones = []
    for row in range(2):
        for t in range(16):
            runs.clear()
            cache = Cache(model, 1, 16)
            if t:
                model.trunk(idx[[row], :t], CachedContext(cache, 0, t, idx[[row]]))
            runs.clear()
            model.trunk(idx[[row], t:t + 1], CachedContext(cache, t, 1, idx[[row]]))
            ones.append((len(runs), float(sum(w.sum() for _, w, _ in runs))))
    assert {n for n, _ in ones} >= {2, 3, 4}
    assert all(total == pytest.approx(1, abs=1e-6) for _, total in ones)


@pytest.mark.parametrize("arm", PONDER.values(), ids=PONDER.keys())
def test_decoding_of_pondering_tokens_is_the_full_forward(arm):
    model, idx = build(arm, std=0.2), tokens(3, 16)
    with torch.no_grad():
        whole = model.head(model.trunk(idx, context(model, idx)))
        torch.testing.assert_close(step_by_step(model, idx, 5), whole[:, 4:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("arm", ["gpt2", "window", "hierarchy"])
def test_prompts_of_different_lengths_ponder_as_they_do_alone(arm):
    model, idx = pondering(ARMS[arm] | dict(pos="rope")), tokens(3, 6)
    together = model.generate(idx, 8, temperature=0, lengths=[6, 2, 4])
    for row, length in enumerate([6, 2, 4]):
        alone = model.generate(idx[[row], :length], 8, temperature=0)
        assert together[row, :length + 8].tolist() == alone[0].tolist()


def test_halted_tokens_are_not_computed():
    model, idx, ran = pondering(), tokens(3, 16), []
    block = model.transformer.h[1]
    block.mlp.register_forward_hook(lambda module, args, out: ran.append(out[..., 0].numel()))
    model(idx, idx)
    assert len(ran) == 4
    assert ran == sorted(ran, reverse=True) and ran[0] == 48 > ran[3] > 0, ran
    assert block.halting.tokens_run == 48
    assert 48 < block.halting.steps_run <= sum(ran)


@pytest.mark.parametrize("arm", PONDER.values(), ids=PONDER.keys())
def test_leaving_halted_tokens_out_changes_nothing(monkeypatch, arm):
    model, idx = pondering(arm | dict(dropout=0.0, ponder=4, n_layer=3)).train(), tokens(3, 16)
    found = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        model.zero_grad()
        loss = model(idx, idx)[1]
        loss.backward()
        found.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("arm", [{}, dict(window=5, window_pattern="S"), dict(pos="rope")], ids=str)
def test_a_compiler_leaves_all_tokens_in_their_places_and_compiles_one_graph(arm):
    """Sorting by who is still thinking saves nothing where all are computed, and costs a scatter backward."""
    torch.compiler.reset()
    model, idx, graphs, found = pondering(arm | dict(ponder=4, n_layer=3)).train(), tokens(3, 16), [], []
    moves = "sort.stable", "gather.default", "scatter.src", "scatter.value", "scatter_add.default"

    def compiler(graph, inputs):
        graphs.append([move for node in graph.graph.nodes for move in moves
                       if str(node.target) == f"aten.{move}"])
        return make_boxed_func(graph.forward)
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    for run in (torch.compile(model, backend=backend, fullgraph=True), model):
        model.zero_grad()
        loss = run(idx, idx)[1]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert graphs == [[], []]                    # forward and backward
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_the_ponder_cost_is_the_runs_and_what_was_left_and_makes_tokens_halt():
    model, idx = pondering(dict(ponder_cost=0.5)), tokens(3, 16)
    plain = model(idx, idx)[1]
    runs = weighed(model.train())
    loss = model(idx, idx)[1]
    halting = model.transformer.h[1].halting
    halting.steps_run = halting.tokens_run = 0
    model.eval()(idx)
    left = float(loss - plain) / 0.5 - halting.steps_run / halting.tokens_run
    assert 0 < left <= 1
    assert [step for step, _, _ in runs[:4]] == [0, 1, 2, 3]
    before = halting.steps_run
    optimizer = torch.optim.SGD(halting.parameters(), lr=1.0)
    for _ in range(20):
        optimizer.zero_grad()
        model.train()(idx, idx)[1].backward()
        optimizer.step()
    halting.steps_run = 0
    model.eval()(idx)
    assert halting.steps_run < before


AIMS = {"event_gate": dict(event_gate=True), "columns": ARMS["columns"], "experts": ARMS["experts"],
        "gated_experts": ARMS["experts"] | dict(event_gate=True), "predict": ARMS["predict"],
        "dendrites": ARMS["dendrites"], "both_gates": ARMS["dendrites"] | dict(event_gate=True)}


def halting_after(model, idx, runs):
    """The context of a training call in which all tokens of row i halt after runs[i] runs."""
    halting, ctx = model.transformer.h[1].halting, Context(model.positions(idx.size(1)), training=True)
    ends, plain = torch.tensor(runs)[:, None].expand(-1, idx.size(1)), Halting.weigh
    halting.weigh = lambda y, left, step: (plain(halting, y, left, step)[0], ends[:, :y.size(1)] == step + 1)
    model.train().trunk(idx, ctx)
    return ctx


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("arm", AIMS.values(), ids=AIMS.keys())
def test_a_mechanisms_loss_is_of_the_tokens_that_think_in_all_runs_together(monkeypatch, arm, compiling):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(energy, "off_target", lambda share, target: share)      # linear: means can be weighed
    monkeypatch.setattr(ExpertGate, "BALANCE", 0.0)
    model, idx, runs = pondering(arm), tokens(3, 16), [1, 4, 2]
    together, *alone = (torch.stack(halting_after(model, idx[i:j], runs[i:j]).losses).detach()
                        for i, j in ((0, 3), (0, 1), (1, 2), (2, 3)))
    each = (len(together) - 1) // 3                            # of a block; the ponder cost behind the second
    evenly, by_runs = torch.full((3,), 1 / 3), torch.tensor(runs) / sum(runs)
    weights = torch.stack([evenly] * each + [by_runs] * each + [evenly] * (each + 1), dim=1)
    assert each > 0 and len(together) == 3 * each + 1
    torch.testing.assert_close(together, (weights * torch.stack(alone)).sum(0))


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("arm", ["dendrites", "experts"])
def test_a_budget_counts_the_tokens_that_think(monkeypatch, arm, compiling):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    model = pondering(ARMS[arm] | dict(event_gate=True, energy_budget=0.3))
    idx, runs = tokens(3, 16), [1, 4, 2]
    together, *alone = ([float(sum(side)) for side in
                         zip(*halting_after(model, idx[i:j], runs[i:j]).executed)]
                        for i, j in ((0, 3), (0, 1), (1, 2), (2, 3)))
    assert together == pytest.approx([sum(side) for side in zip(*alone)], rel=1e-5)


@pytest.mark.parametrize("bad, word", [(dict(ponder=1), "at least 2"), (dict(ponder_cost=0.5), "ponder"),
                                       (dict(ponder=2, exits="1"), "both decide"),
                                       (dict(ponder=2, ponder_cost=-1.0), "ponder_cost")])
def test_pondering_that_cannot_be_is_named(bad, word):
    with pytest.raises(ConfigError, match=word):
        GPTConfig(**TINY | bad)


# ------------------------------------------------ growing up --------------------------------------------

def test_blocks_that_wait_enter_as_the_identity_and_get_no_gradients():
    for arm in ("gpt2", "columns", "dendrites", "experts", "swiglu"):
        model, idx = build(ARMS[arm], n_layer=3), tokens(2, 9)
        model.begin_with_layers(1)
        logits = []
        for count in (1, 2, 3):
            model.use_layers(count)
            logits.append(model(idx, idx)[0])
        torch.testing.assert_close(logits[0], logits[1], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(logits[0], logits[2], atol=1e-6, rtol=1e-6)
        model.use_layers(1)
        model.train()(idx, idx)[1].backward()
        assert all(p.grad is None for block in model.transformer.h[1:] for p in block.parameters())
        assert all(p.grad is not None for p in model.transformer.h[0].parameters())


def without_c(monkeypatch):
    """No C kernels: no dispatcher sees their products."""
    for module in kernels, passes:
        monkeypatch.setattr(module, "cpu_library", lambda: (None, "off"))


class Products(TorchDispatchMode):
    """Counts the multiply-adds of every matrix product."""

    def __init__(self):
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        y, name = func(*args, **kwargs or {}), func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm", "_grouped_mm", "mv", "addmv", "linear", "matmul"):
            left = args[1] if name in ("addmm", "baddbmm", "addmv") else args[0]
            self.macs += y.numel() * left.size(-1)
        if name == "einsum":
            sides, out = args[0].split("->")[0].split(","), args[0].split("->")[1]
            size = {letter: n for side, t in zip(sides, args[1]) if "." not in side
                    for letter, n in zip(side, t.shape)}
            self.macs += y.numel() * math.prod(n for letter, n in size.items() if letter not in out)
        return y


@torch.no_grad()
def executed(model, idx):
    """Multiply-adds of a training forward: those of weights as they are dispatched, those of attention by its
    queries and the columns that each of them may see at the end of its block."""
    seen = []

    def attend(attn, q, k, v, mask, dropout):
        seen.append(2 * q.numel() * min(k.size(2), attn.window or k.size(2)))
        return q
    for block in model.transformer.h:
        block.attn.attention = partial(attend, block.attn)
    with Products() as products:
        model.train()(idx, idx)
    return products.macs + sum(seen)


@pytest.mark.parametrize("arm", COUNTED)
def test_flops_are_six_times_the_multiply_adds_that_a_forward_executes(monkeypatch, arm):
    without_c(monkeypatch)
    model, idx = build(arm, std=0.2), tokens(1, 16)
    state = torch.get_rng_state()
    before = model.flops_per_token()
    assert torch.equal(torch.get_rng_state(), state)             # counting draws nothing
    macs = executed(model, idx)
    assert model.flops_per_token() == round(6 * macs / 16) > 0
    assert before == model.flops_per_token() or ("ponder" in arm and before >= model.flops_per_token())


@pytest.mark.parametrize("arm", COUNTED)
def test_a_decode_step_by_forward_counts_what_it_executes(monkeypatch, arm):
    without_c(monkeypatch)
    for policy in (False, True):
        model, idx = build(arm, std=0.2).use_policy(policy), tokens(1, 9)
        for block in model.transformer.h:
            block.attn.attention = lambda q, k, v, mask, dropout: q
        cache = Cache(model, 1, 9)
        with torch.inference_mode():
            model.trunk(idx[:, :8], CachedContext(cache, 0, 8, idx))
            with kernels.counting() as counted, Products() as products:
                model.trunk(idx[:, 8:], CachedContext(cache, 8, 1, idx))
        assert counted.macs == products.macs > 0


def test_flops_follow_the_runs_that_tokens_take():
    model, idx, found = build(dict(ponder=4, n_layer=3), std=0.2), tokens(1, 16), []
    all_runs = model.flops_per_token()
    halting = model.transformer.h[1].halting
    for bias in (-20.0, 0.0, 20.0):
        halting.halt.bias.data.fill_(bias)
        halting.steps_run = halting.tokens_run = 0
        model(idx)
        found.append(model.flops_per_token())
    once = build(dict(n_layer=3)).flops_per_token() + 6 * 16                     # one run, and who halts
    assert all_runs == found[0] > found[1] > found[2] == once


def test_waiting_layers_cost_no_flops():
    model, small = build(dict(n_layer=3)), build(dict(n_layer=1))
    model.use_layers(1)
    assert model.flops_per_token() == small.flops_per_token()
