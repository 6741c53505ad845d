"""Draws by a counter: the ids that Sampler's distribution wants, whoever computes them and on however many
threads."""
import itertools
import math
import re

import pytest
import torch
from arms import ARMS, build, tokens
from conftest import Job, Trainer, one_sentence, words

from configurator import ConfigError
from decode import draws, engine, sampling
from kernels.build import cpu_library
from model import build_model

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
            found = drawn(sampler, logits, seen, seed, 12)
            wanted = drawn(sampler, logits, seen, seed, 12, draws.draw_reference)
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
        for rows, lengths in ((1, None), (3, [2, 6, 4]))[:1 + (overflow == "slide")]:
            found = []
            for use in (watched, lambda *words: None):
                monkeypatch.setattr(engine, "program_of", use)
                found.append(sampled(model, tokens(rows, 6), 25, sampler_of(how), lengths=lengths,
                                     overflow=overflow))
            assert torch.equal(*found), (how, overflow, rows)
    waits = any(flag in ARMS[name] for flag in engine.WAITING)
    assert all(bool(program) != waits for program in programs)


class Behind(sampling.Sampler):
    """A Sampler that draws from the engine's logits when they are there, as subclasses may."""


@pytest.mark.parametrize("how", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_op_of_the_program_draws_what_a_call_behind_it_draws(how, dtype):
    """To the id, whatever logits the engine computes."""
    model = build(dict(vocab_size=300, screen="top_k" in how), std=0.2).to(dtype)
    for rows, lengths, vocab_size in ((1, None, None), (3, [2, 6, 4], 290)):
        found = [sampled(model, tokens(rows, 6), 30, kind(**how, draws="engine", vocab_size=vocab_size),
                         lengths=lengths, overflow="slide") for kind in (sampling.Sampler, Behind)]
        assert torch.equal(*found), rows


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
        sampler.at = 5, [1, 2, 3]
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


def test_a_sampler_outside_of_a_stream_draws_anew_each_time():
    sampler, logits, seen = sampler_of({}), torch.zeros(9, 1000), torch.zeros(9, 1000, dtype=torch.bool)
    torch.manual_seed(2)
    first, second = sampler(logits, seen), sampler(logits, seen)
    assert len({*first.flatten().tolist()}) > 5 and not torch.equal(first, second)
    torch.manual_seed(2)
    assert torch.equal(sampler(logits, seen), first)
    list(sampling.stream(build({}), tokens(2, 3), 4, sampler))
    assert sampler(logits, seen).shape == (9, 1)                 # nothing of the stream's is left


@pytest.mark.parametrize("rows", [8, 9])
def test_as_many_rows_as_you_like_are_drawn_each_by_itself(rows):
    """Nine rows have no program; a row's draws do not depend on how many there are."""
    model, idx, sampler = build({}, std=0.2), tokens(9, 4), sampler_of(dict(top_p=0.9))
    assert torch.equal(sampled(model, idx[:rows], 20, sampler)[:2], sampled(model, idx[:2], 20, sampler))


def test_how_ids_are_drawn_is_engine_or_torch():
    with pytest.raises(ConfigError, match="draws='dice' must be engine or torch"):
        build({}).generate(tokens(1, 4), 2, draws="dice")


# -------------------------------------------------- through sample.py --------------------------------------

@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """A finished run of few steps."""
    trainer = Trainer(tmp_path_factory.mktemp("drawn"), data)
    trainer(max_iters=2)
    return trainer


def sample(run, *argv, status=0, env=None, **keys):
    keys = dict(out_dir=run.folder / "out", device="cpu", dtype="float32", num_samples=2, max_new_tokens=20,
                start="def ") | keys
    done = Job("sample.py", [*words(**keys), *argv], run.folder, env, name="sample").wait()
    assert done.status == status, done.err
    return done


def test_the_first_line_says_what_decodes_and_threads_change_no_text(run):
    first = sample(run)
    assert re.search(r"decode engine, \d+ threads? \(1: [\d,]+.* us a step\)", first.err.splitlines()[0])
    found = [sample(run, threads=threads) for threads in (1, 2)]
    assert [re.search(r"decode engine, \d threads?\n", done.err)[0] for done in found] == [
        "decode engine, 1 thread\n", "decode engine, 2 threads\n"]
    assert first.out == found[0].out == found[1].out
    assert len({*first.out.split("\n---------------\n")}) == 3                 # two samples, and nothing
    off = sample(run, env={"NANOCORTEX_KERNELS": "off"})
    assert "forward decodes (C kernels off (NANOCORTEX_KERNELS=off))" in off.err.splitlines()[0]
    assert off.out == first.out


def test_a_seed_decides_the_text_of_either_generator(run):
    texts = {(draws, seed): sample(run, draws=draws, seed=seed).out for draws in ("engine", "torch")
             for seed in (1, 2)}
    assert len({*texts.values()}) == 4
    assert all(sample(run, draws=draws, seed=1).out == texts[draws, 1] for draws in ("engine", "torch"))


def test_draws_by_torch_are_what_generate_draws(run):
    said = sample(run, num_samples=1, draws="torch", overflow="exact", max_new_tokens=40, top_k=5, seed=4).out
    model = build_model(run.checkpoint(), "ckpt.pt").eval()
    torch.manual_seed(4)
    ids = model.generate(torch.tensor([list(b"def ")]), 40, temperature=0.8, top_k=5)
    assert said == bytes(ids[0].tolist()).decode(errors="replace") + "\n---------------\n"


def test_a_window_slides_past_block_size_and_it_is_said_once(run):
    block = run.checkpoint()["model_args"]["block_size"]
    long = dict(max_new_tokens=block + 9, temperature=0)
    assert "block_size" not in sample(run, max_new_tokens=block - 3).err     # behind four bytes of prompt
    slid, exact = sample(run, **long), sample(run, overflow="exact", **long)
    assert slid.err.count(f"note: the text has passed block_size={block}") == 1
    assert "note" not in exact.err and slid.out[:block] == exact.out[:block]
    assert sample(run, overflow="slide", **long).out == slid.out
    typed = run.folder / "typed.txt"
    typed.write_text("def\n" * 3)
    before = f"import os, sys; os.dup2(os.open({str(typed)!r}, os.O_RDONLY), 0); sys.stdin = open(0)"
    argv = words(out_dir=run.folder / "out", device="cpu", max_new_tokens=block)
    chat = Job("sample.py", [*argv, "--chat"], run.folder, before=before, name="chat").wait()
    assert chat.status == 0 and chat.err.count("note: the text has passed") == 1, chat.err


def test_show_program_lists_the_ops_of_a_decode_step(run):
    plain, shown = (sample(run, max_new_tokens=4, show_program=show) for show in (False, True))
    assert plain.out == shown.out
    table = shown.err.split("rows x width")[1].splitlines()[1:]
    ops = [line.split() for line in table if re.match(r" *\d+  ", line)]
    assert [int(op[0]) for op in ops] == list(range(len(ops)))
    assert ops[0][1] == "embed" and ops[-1][1] == "draw" and "attend" in {op[1] for op in ops}
    args = run.checkpoint()["model_args"]
    assert f"{args['vocab_size']} x {args['n_embd']}" in shown.err and "GB/s of weights" in shown.err
    total = next(line for line in table if line.split()[:1] == ["all"])
    counted = next(re.finditer(r"all +([\d,]+) +([\d,]+)", total))
    C, layers = args["n_embd"], args["n_layer"]
    macs = layers * 8 * C * C + args["vocab_size"] * C                 # and rows of what units fire
    assert macs <= int(counted[2].replace(",", "")) <= macs + layers * 4 * C * C
    assert f"{2 * (4 - 1)} steps" in shown.err                         # the prompt makes the first token
    off = sample(run, show_program=True, env={"NANOCORTEX_KERNELS": "off"})
    assert "no decode program ran a step" in off.err


@pytest.mark.parametrize("bad, part", [(dict(draws="dice"), "draws='dice' must be engine or torch"),
                                       (dict(threads=-1), "threads=-1 must be in 0..64"),
                                       (dict(overflow="wrap"), "overflow='wrap' must be exact or slide"),
                                       (dict(show_program=True, speculate=2), "show_program")], ids=str)
def test_bad_keys_are_one_sentence(run, bad, part):
    one_sentence(sample(run, status=2, **bad), "sample.py", part)


def test_a_trace_reads_the_engine_and_writes_the_same_text(run):
    plain, traced = sample(run), sample(run, trace=run.folder / "trace.html")
    assert "decode engine, 1 thread" in traced.err.splitlines()[0]
    assert plain.out == traced.out and (run.folder / "trace.html").exists()
    off = sample(run, status=2, trace=run.folder / "none.html", env={"NANOCORTEX_KERNELS": "off"})
    one_sentence(off, "sample.py", "trace reads what the decode engine counts", "C kernels off")
