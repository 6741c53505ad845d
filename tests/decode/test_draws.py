"""Draws by a counter: the ids that Sampler's distribution wants, whoever computes them and on however many
threads."""
import itertools
import math

import pytest
import torch
from arms import ARMS, build, tokens

from configurator import ConfigError
from decode import draws, engine, sampling
from kernels.build import cpu_library

COMPILED = cpu_library()[0] is not None
FILTERS = [dict(), dict(temperature=0.7), dict(top_k=5), dict(top_k=1), dict(top_p=0.6), dict(min_p=0.2),
           dict(repetition_penalty=1.7), dict(temperature=0, repetition_penalty=1.3),
           dict(temperature=1.3, top_k=7, top_p=0.8, min_p=0.05, repetition_penalty=0.8),
           dict(top_k=3, top_p=1e-45), dict(min_p=1.0), dict(top_k=10**6, top_p=0.999999),
           dict(temperature=1e-6), dict(temperature=1e6)]


def sampler_of(how, **more):
    return sampling.Sampler(**how, draws="engine", **more)


def drawn(sampler, logits, seen, key, count, by=draws.draw):
    """Ids (rows, count) for the columns 0 .. count - 1."""
    columns = ([column] * len(logits) for column in range(count))
    return torch.cat([by(sampler, key, each, logits, seen) for each in columns], dim=1)


def some_logits(seed, rows=2, V=40, kind="normal"):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, V, generator=generator)
    if kind == "ties":
        logits = logits.mul(2).round().div(2)
    if kind == "losers":
        logits[torch.rand(rows, V, generator=generator) < 0.5] = -torch.inf
        logits[:, 0] = 0.3
    return logits, torch.rand(rows, V, generator=generator) < 0.3


def test_the_generator_is_philox():
    """The answers that its authors publish, and the same number from C."""
    assert draws.philox([0] * 4, [0] * 2) == [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]
    assert draws.philox([2**32 - 1] * 4, [2**32 - 1] * 2) == [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]
    numbers = [draws.uniform(key, column, row) for key in (0, 1, 2**63 - 2) for column in (0, 1, 2**33)
               for row in range(3)]
    assert len(set(numbers)) == 27 and all(0 <= number < 1 for number in numbers)
    if COMPILED:
        assert numbers == [cpu_library()[0].uniform(key, column, row) for key in (0, 1, 2**63 - 2)
                           for column in (0, 1, 2**33) for row in range(3)]


@pytest.mark.parametrize("kind", ["normal", "ties", "losers"])
@pytest.mark.parametrize("how", FILTERS, ids=str)
def test_the_kernel_draws_what_the_reference_draws(how, kind):
    """Sums of other order and width may decide a draw at an edge between two ids in another way: seldom."""
    different = count = 0
    for seed, V in enumerate((1, 2, 3, 17, 64, 65, 129, 1000)):
        logits, seen = some_logits(seed, 3, V, kind)
        for sampler in (sampler_of(how), sampler_of(how, vocab_size=max(1, V - 3))):
            found = drawn(sampler, logits, seen, seed, 40)
            wanted = drawn(sampler, logits, seen, seed, 40, draws.draw_reference)
            different, count = different + int((found != wanted).sum()), count + found.numel()
            kept = sampler.probabilities(logits, seen) > 0
            assert found.max() < kept.size(1) and kept.gather(1, found).all()
    assert different <= count / 1000


def chi_square(counts, chances):
    """How many standard deviations counts lie from what the chances make likely."""
    expected = chances * counts.sum()
    often = expected >= 5
    assert (counts[chances == 0] == 0).all()
    found = ((counts - expected)[often] ** 2 / expected[often]).sum()
    rest, of_rest = counts[~often].sum(), expected[~often].sum()
    if of_rest >= 5:
        found += (rest - of_rest) ** 2 / of_rest
    freedom = max(1, int(often.sum()) + int(of_rest >= 5) - 1)
    return float((found - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("seed", range(12))
def test_draws_are_distributed_as_the_samplers_probabilities(seed):
    """Filters at random, with all of them off and on; chi-square over 20,000 draws."""
    pick = torch.Generator().manual_seed(seed)
    number = lambda low, high: low + (high - low) * torch.rand((), generator=pick).item()
    how = dict(temperature=number(0.4, 1.5))
    on = [seed & bit for bit in (1, 2, 4, 8)]
    how |= dict(top_k=int(number(2, 30))) if on[0] else {}
    how |= dict(top_p=number(0.3, 0.99)) if on[1] else {}
    how |= dict(min_p=number(0.0, 0.1)) if on[2] else {}
    how |= dict(repetition_penalty=number(0.7, 2)) if on[3] else {}
    sampler, (logits, seen) = sampler_of(how), some_logits(seed, 2, 50, ("normal", "ties")[seed % 2])
    ids, chances = drawn(sampler, logits, seen, seed, 20_000), sampler.probabilities(logits, seen).double()
    for row in range(2):
        deviations = chi_square(ids[row].bincount(minlength=50).double(), chances[row])
        assert deviations < 4.5, (how, deviations)
    wrong = sampler_of(how | dict(temperature=how["temperature"] * 1.3)).probabilities(logits, seen).double()
    alike = [chi_square(ids[row].bincount(minlength=50).double(), wrong[row] + 1e-12) for row in range(2)]
    assert max(alike) > 4.5 or chances.gt(0).sum(-1).max() < 5           # the test can fail


def test_draws_of_a_large_vocabulary_keep_no_more_than_the_filters_say():
    """50,304 logits, many of them equal as those of a bf16 model are."""
    logits, seen = some_logits(3, 1, 50_304)
    for values in (logits, logits.bfloat16().float(), torch.zeros_like(logits)):
        for how in (dict(top_k=200), dict(top_p=0.9), dict(top_p=0.5, top_k=1000), dict(min_p=0.1), dict()):
            sampler = sampler_of(how)
            found, key = drawn(sampler, values, seen, 7, 60)[0], 7
            chances = sampler.probabilities(values, seen)[0].double()
            sums = chances.cumsum(0)
            numbers = torch.tensor([draws.uniform(key, column, 0) for column in range(60)])
            assert (sums[found] > numbers - 1e-3).all()
            assert (sums[found] - chances[found] < numbers + 1e-3).all()
            assert (chances[found] > 0).double().mean() > 0.95, how     # fp32 sums shift the edge of top_p


def sampled(model, idx, count, sampler, **more):
    torch.manual_seed(5)
    return torch.cat(list(sampling.stream(model, idx, count, sampler, **more)), dim=1)


CHECKED = ["gpt2", "columns", "two_of_four", "window", "screen", "softcap", "hierarchy", "experts"]


@pytest.mark.skipif(not COMPILED, reason="no C kernels here")
@pytest.mark.parametrize("name", CHECKED)
def test_the_decode_engine_draws_what_forward_draws(name, monkeypatch):
    model = build(ARMS[name], std=0.2)
    plain, programs = engine.program_of, []

    def watched(*words):
        programs.append(plain(*words))
        return programs[-1]

    for how, overflow in itertools.product((FILTERS[0], FILTERS[2], FILTERS[6], FILTERS[7], FILTERS[8]),
                                           ("exact", "slide")):
        for rows, lengths in ((1, None), (3, [2, 6, 4])):
            found = []
            for use in (watched, lambda *words: None):
                monkeypatch.setattr(engine, "program_of", use)
                found.append(sampled(model, tokens(rows, 6), 25, sampler_of(how), lengths=lengths,
                                     overflow=overflow))
            assert torch.equal(*found), (how, overflow, rows)
    waits = any(flag in ARMS[name] for flag in engine.WAITING)
    assert all(bool(program) != waits for program in programs)


@pytest.mark.parametrize("how", [dict(top_k=5), dict(repetition_penalty=1.5), dict(top_p=0.8)], ids=str)
def test_a_seed_makes_one_text_whatever_the_threads(how):
    model, idx, texts = build({}, std=0.2), tokens(5, 3), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            texts.append(sampled(model, idx, 30, sampler_of(how), overflow="slide"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(texts[0], text) for text in texts)


def test_streams_differ_by_what_torch_draws_and_rows_by_their_number():
    model, sampler = build({}, std=0.2), sampler_of({})
    idx = tokens(1, 3).expand(3, 3)
    torch.manual_seed(1)
    first, second = (torch.cat(list(sampling.stream(model, idx, 12, sampler)), 1) for _ in range(2))
    torch.manual_seed(1)
    again = model.generate(idx, 12, draws="engine")[:, 3:]
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert len({tuple(row.tolist()) for row in first}) == 3


@pytest.mark.parametrize("name", ["gpt2", "experts"])
def test_two_streams_of_one_sampler_at_once_do_not_disturb_each_other(name):
    model, sampler = build(ARMS[name], std=0.2), sampler_of(dict(repetition_penalty=1.2))
    alone = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        alone.append([int(token) for token in sampling.stream(model, tokens(1, 3 + seed), 20, sampler)])
    streams = [sampling.stream(model, tokens(1, 3 + seed), 20, sampler) for seed in (1, 2)]
    together = [[], []]
    for seed, stream, text in zip((1, 2), streams, together):
        torch.manual_seed(seed)
        text.append(int(next(stream)))
    for _ in range(19):
        for stream, text in zip(streams, together):
            torch.rand(3)                                        # whoever else draws
            text.append(int(next(stream)))
    assert together == alone


@pytest.mark.parametrize("how", FILTERS, ids=str)
def test_logits_that_are_not_finite_are_one_sentence(how):
    sampler, seen = sampler_of(how), torch.zeros(3, 5, dtype=torch.bool)
    for bad, (row, place) in itertools.product((torch.nan, torch.inf), ((0, 0), (1, 3), (2, 4))):
        logits = torch.zeros(3, 5)
        logits[row, place] = bad
        sampler.columns = [1, 2, 3]
        with pytest.raises(ConfigError, match="not finite"):
            sampler(logits, seen)
    with pytest.raises(ConfigError, match="not finite"):
        sampler(torch.full((3, 5), -torch.inf), seen)
    model = build({}, std=0.2)
    stream = sampling.stream(model, tokens(2, 4), 9, sampler)
    for _ in range(3):
        assert next(stream).lt(31).all()
    with torch.no_grad():
        model.transformer.wte.weight[:, 3] = torch.nan          # between two steps of the decode engine
    with pytest.raises(ConfigError, match="not finite"):
        list(stream)


def test_how_ids_are_drawn_is_engine_or_torch():
    with pytest.raises(ConfigError, match="draws='dice' must be engine or torch"):
        build({}).generate(tokens(1, 4), 2, draws="dice")
