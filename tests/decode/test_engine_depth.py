"""Depth in the decode engine: a program's groups, early exits and runs are those of `forward`."""
import itertools

import pytest
import torch
from arms import ARMS, PAIRS, build, tokens
from needed import needed

import sparse_kernels as kernels
from decode import engine, sampling
from kernels.build import cpu_library
from layers import settle

DEPTH = ("hierarchy", "exits", "ponder")
pytestmark = pytest.mark.skipif(cpu_library()[0] is None, reason="the engine is written in C")


class Dictated(sampling.Sampler):
    """Draws ids that were set before, whatever the logits are, and keeps those."""

    def __init__(self, ids):
        super().__init__()
        self.ids, self.logits = ids, []

    def __call__(self, logits, seen):
        self.logits.append(logits.clone())
        return self.ids[:, len(self.logits) - 1:][:, :1]


def varied(arm, seed=0, scale=3.0, bias=0.0, **changes):
    """A model whose tokens differ in how deep they go."""
    model = build(arm, std=0.2, tie_weights=False, **changes)
    generator = torch.Generator().manual_seed(seed)
    deciders = [*getattr(model.depth_policy, "probes", ()),
                *(block.halting.halt for block in model.transformer.h if hasattr(block, "halting"))]
    with torch.no_grad():
        for probe in deciders:
            probe.weight.copy_(torch.randn(probe.weight.shape, generator=generator) * scale / 4)
            probe.bias.fill_(bias)
        for name, p in model.named_parameters():
            if name.endswith((".spread", ".pool", "wte.weight")):
                p.copy_(torch.randn(p.shape, generator=generator))
    return model


def counts(model):
    """The counters of every module, which begin anew."""
    found = []
    for module in model.modules():
        for name in ("layers_run", "steps_run", "tokens_run"):
            if hasattr(module, name):
                found.append(getattr(module, name))
                setattr(module, name, 0)
    return found


def decoded(model, idx, new, monkeypatch=None, lengths=None, overflow="exact", seed=7):
    """Logits (new, B, V) of a stream whose ids are dictated, and the counters; monkeypatch: by forward."""
    sampler = Dictated(tokens(len(idx), new, seed))
    counts(model)
    if monkeypatch:
        monkeypatch.setattr(engine, "program_of", lambda *args: None)
    list(sampling.stream(model, idx, new, sampler, lengths, overflow))
    if monkeypatch:
        monkeypatch.undo()
    return torch.stack(sampler.logits), counts(model)


@pytest.fixture
def steps(monkeypatch):
    """How many steps programs have run, in a list."""
    run, plain = [], engine.Program.step
    monkeypatch.setattr(engine.Program, "step", lambda program: (run.append(program), plain(program))[1])
    return run


def agree(model, idx, new, lengths=None, overflow="exact", loose=0.0):
    """Do a program and forward agree? -> their counters."""
    with pytest.MonkeyPatch.context() as patch:
        expected, by_forward = decoded(model, idx, new, patch, lengths, overflow)
    found, by_program = decoded(model, idx, new, None, lengths, overflow)
    torch.testing.assert_close(found, expected, atol=loose or 1e-5, rtol=0)
    return by_program, by_forward


ALONE = {name: ARMS[name] for name in DEPTH}
SOME = {name: arm for name, arm in PAIRS.items()
        if arm.keys() & {*DEPTH} and not arm.keys() & {*engine.WAITING}}


@pytest.mark.parametrize("arm", (ALONE | SOME).values(), ids=(ALONE | SOME).keys())
def test_a_program_is_what_forward_is_whatever_the_policy(arm, steps):
    for policy in (False, True):
        model = varied(arm).use_policy(policy)
        model.choose(leave_at=0.5 if policy and model.config.exits else None)
        for rows, length in ((1, 1), (3, 4)):
            agree(model, tokens(rows, length), 11)
    assert len(steps) == 2 * (10 + 10)


DEEPER = {"hierarchy": dict(hierarchy=3, n_layer=5), "exits": dict(exits="1,2,4", n_layer=5),
          "ponder": dict(ponder=4, n_layer=3), "both": dict(hierarchy=3, ponder=4, n_layer=5)}
WITH = {"": {}, "rope": dict(pos="rope", qk_norm=True, qk_gain=2.0),
        "windows": dict(window=3, window_pattern="SL")}
DEEPEST = {f"{name} {more}".strip(): arm | WITH[more] for name, arm in DEEPER.items() for more in WITH}
every_depth = pytest.mark.parametrize("arm", DEEPEST.values(), ids=DEEPEST.keys())


def thresholds(arm):
    """What the policy may be."""
    return (None, 0.0, 0.5, 0.9, 1.0) if "exits" in arm else (None,)


@every_depth
@pytest.mark.parametrize("rows, length", [(1, 1), (1, 7), (5, 2)])
def test_a_program_goes_as_deep_as_forward_does(arm, rows, length):
    model, ran = varied(arm), []
    for leave_at in thresholds(arm):
        for overflow, new in (("exact", 17 - length), ("slide", 22)):
            by_program, by_forward = agree(model.choose(leave_at=leave_at), tokens(rows, length), new,
                                           overflow=overflow)
            assert by_program == by_forward
        ran.append(by_program)
    if "exits" in arm:
        layers = [run / max(1, read) for run, read in ran]
        assert layers[0] == 0 and 1 == layers[1] < layers[2] < layers[3] < layers[4] == 5
    if "ponder" in arm:
        assert ran[0][1] < ran[0][0] < 4 * ran[0][1]


@every_depth
def test_rows_at_columns_of_their_own_go_as_deep_as_they_do_alone(arm):
    model = varied(arm).choose(leave_at=0.5 if "exits" in arm else None)
    for rows, overflow in ((2, "exact"), (8, "slide")):
        idx, lengths = tokens(rows, 7, rows), [1 + 3 * row % 7 for row in range(rows)]
        together, by_program = decoded(model, idx, 9, None, lengths, overflow)
        by_row = []
        for row, length in enumerate(lengths):
            sampler = Dictated(tokens(rows, 9, 7)[[row]])
            list(sampling.stream(model, idx[[row], :length], 9, sampler, None, overflow))
            by_row.append(torch.cat(sampler.logits))
        torch.testing.assert_close(together, torch.stack(by_row, dim=1), atol=1e-5, rtol=0)
        by_program, by_forward = agree(model, idx, 9, lengths, overflow)
        # hierarchy: forward runs rows that it does not use
        assert by_program == by_forward or "hierarchy" in arm


@every_depth
def test_a_program_goes_as_deep_in_bf16(arm):
    model = varied(arm).to(torch.bfloat16)
    for leave_at in thresholds(arm):
        by_program, by_forward = agree(model.choose(leave_at=leave_at), tokens(1, 3), 21, overflow="slide",
                                       loose=1e-2)
        assert by_program == by_forward
    agree(model.choose(leave_at=None), tokens(3, 3), 12, [3, 1, 2], loose=5e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_depth
def test_any_number_of_threads_computes_the_same(arm, dtype):
    """Of the engine; torch's products of the prompt may depend on theirs."""
    model, found = varied(arm).to(dtype).choose(leave_at=0.5 if "exits" in arm else None), []
    for threads in (1, 2, 3):
        found.append(decoded(model.choose(threads=threads), tokens(3, 3), 6, None, [3, 1, 2]))
    assert all(torch.equal(logits, found[0][0]) and ran == found[0][1] for logits, ran in found)


def by_token(arm, **changes):
    """A model with exits whose tokens 28, 29 and 30 pass all layers, and the others leave at the first."""
    model = varied(arm, **changes).choose(leave_at=0.5)
    with torch.no_grad():
        for parameters in (model.transformer.wte.weight, *(probe.weight
                           for probe in model.transformer.exits.probes)):
            parameters[..., 0] = 100.0
        model.transformer.wte.weight[28:, 0] *= -1
        for probe in model.transformer.exits.probes:
            probe.bias.zero_()
    return model


@pytest.mark.parametrize("more", WITH.values(), ids=["plain", "rope", "windows"])
@pytest.mark.parametrize("rows", [1, 3])
def test_what_many_tokens_owe_is_paid_when_one_gets_there(rows, more):
    model = by_token(dict(exits="1,3", n_layer=5, block_size=64) | more)
    ids = torch.randint(28, (rows, 60), generator=torch.Generator().manual_seed(rows))
    for row in range(rows):
        ids[row, [3 + row, 4, 21 + 2 * row, 50]] = 28 + row
    for length in (1, 5):
        both = []
        for program in (True, False):
            sampler = Dictated(ids)
            counts(model)
            with pytest.MonkeyPatch.context() as patch:
                if not program:
                    patch.setattr(engine, "program_of", lambda *args: None)
                list(sampling.stream(model, ids[:, :length] % 28, 60, sampler))
            both.append((torch.stack(sampler.logits), counts(model)))
        torch.testing.assert_close(both[0][0], both[1][0], atol=1e-5, rtol=0)
        assert both[0][1] == both[1][1]
        deep = sum(int((row[:59] >= 28).sum()) for row in ids)
        read = rows * (length + 59)
        assert both[0][1] == [read + 4 * deep, read]


def counted(model, idx, new, by_forward):
    """What a stream executes behind its first token: as programs count it, or as modules need it."""
    with pytest.MonkeyPatch.context() as patch:
        if by_forward:
            patch.setattr(engine, "program_of", lambda *args: None)
        stream = sampling.stream(model, idx, new, Dictated(tokens(len(idx), new, 7)))
        next(stream)
        with needed(model) if by_forward else kernels.counting() as tally:
            list(stream)
    return tally


@pytest.mark.parametrize("arm", DEEPER.values(), ids=DEEPER.keys())
@pytest.mark.parametrize("rows", [1, 3])
def test_a_program_counts_what_its_tokens_reach(arm, rows):
    model, idx = varied(arm, block_size=32), tokens(rows, 2)
    for leave_at in thresholds(arm):
        model.choose(leave_at=leave_at)
        found, expected = (counted(model, idx, 25, by_forward) for by_forward in (False, True))
        if leave_at is None and (rows == 1 or arm.keys() != {"hierarchy", "ponder", "n_layer"}):
            assert found.macs == expected.macs               # rows at the first group are padded in forward;
        # what leaves early puts off its keys and values
        assert 0 < found.macs <= expected.macs
        assert 0 < found.bytes <= expected.bytes


def test_what_a_window_has_passed_is_not_paid():
    model = by_token(dict(exits="1", n_layer=3, block_size=64, window=4, window_pattern="S"))
    ids = torch.randint(28, (1, 40), generator=torch.Generator().manual_seed(0))
    ids[0, 37] = 30
    tallies = []
    for by_forward in (False, True):
        with pytest.MonkeyPatch.context() as patch, kernels.counting() as tally:
            if by_forward:
                patch.setattr(engine, "program_of", lambda *args: None)
            list(sampling.stream(model, ids[:, :1], 40, Dictated(ids)))
        tallies.append(tally.macs)
    C = model.config.n_embd
    assert tallies[1] - tallies[0] == (38 - 3) * 2 * 2 * C * C    # of two layers, keys and values of C each


@pytest.mark.parametrize("arm", DEEPER.values(), ids=DEEPER.keys())
def test_two_streams_at_once_do_not_meet(arm):
    models = [varied(arm, seed).choose(leave_at=0.5 if "exits" in arm else None) for seed in (0, 0, 1)]
    models[1] = models[0]
    prompts = tokens(1, 3), tokens(1, 8, 1), tokens(2, 1, 2)
    alone = [decoded(model, idx, 12)[0] for model, idx in zip(models, prompts)]
    samplers = [Dictated(tokens(len(idx), 12, 7)) for idx in prompts]
    streams = [sampling.stream(*about, 12, sampler) for *about, sampler in zip(models, prompts, samplers)]
    for _ in range(12):
        for one in streams:
            next(one)
    for sampler, expected in zip(samplers, alone):
        assert torch.equal(torch.stack(sampler.logits), expected)


@pytest.mark.parametrize("arm", [DEEPER["exits"], DEEPER["ponder"]], ids=["exits", "ponder"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_layers_that_wait_are_no_part_of_a_program(arm, count):
    model = varied(arm)
    model.use_layers(min(count, len(model.blocks)))
    for leave_at in thresholds(arm):
        agree(model.choose(leave_at=leave_at), tokens(3, 3), 20, [3, 1, 2])


@pytest.mark.parametrize("arm", [ARMS["two_of_four"], ARMS["attn_topk"], ARMS["no_bias"]],
                         ids=["packed", "attn_topk", "no_bias"])
def test_keys_and_values_alone_come_from_weights_of_any_kind(arm):
    for dtype, rows in itertools.product((torch.float32, torch.bfloat16), (1, 3)):
        model = by_token(dict(exits="1", n_layer=3, block_size=64) | arm)
        model = settle(model).to(dtype)
        ids = tokens(rows, 40, 5)
        agree(model, ids[:, :3], 40, loose=1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("arm", [dict(hierarchy=2, n_layer=3, block_size=2), dict(hierarchy=16, n_layer=3),
                                 dict(hierarchy=5, n_layer=7, block_size=9), dict(ponder=12, block_size=5),
                                 dict(exits="1", block_size=1), dict(exits="1", block_size=3),
                                 dict(ponder=2, n_layer=1, block_size=2)], ids=str)
def test_odd_sizes_decode_as_forward_does(arm):
    model = varied(arm, n_embd=34, n_head=1, vocab_size=31).choose(leave_at=0.4 if "exits" in arm else None)
    for rows, length, new in ((1, 1, 1), (1, 3, 2), (3, 4, 20), (7, 1, 11)):
        for overflow in ("exact", "slide"):
            agree(model, tokens(rows, length), new, [1 + row % length for row in range(rows)], overflow)


@pytest.mark.parametrize("name", DEPTH)
def test_a_damaged_decider_takes_every_layer_as_forward_does(name):
    model = varied(DEEPER[name]).choose(leave_at=0.5 if name == "exits" else None)
    decider = {"exits": lambda: model.transformer.exits.probes[0].weight,
               "ponder": lambda: model.transformer.h[1].halting.halt.weight,
               "hierarchy": lambda: model.transformer.hierarchy.spread}[name]()
    decider.data.flatten()[1] = float("nan")
    with pytest.MonkeyPatch.context() as patch:
        expected, by_forward = decoded(model, tokens(2, 3), 9, patch)
    found, by_program = decoded(model, tokens(2, 3), 9)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0, equal_nan=True)
    assert by_program == by_forward


@every_depth
def test_threads_are_timed_over_a_cache_that_has_read_nothing(arm):
    program = engine.trial(varied(arm), torch.device("cpu"), 2)
    assert program and engine.time_threads(program).keys() == {1, 2}
