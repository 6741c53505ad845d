"""The decode engine: a step as one call over a list of ops gives what the full forward gives."""
import gc
import multiprocessing
import threading
from functools import partial

import pytest
import torch
from arms import ARMS, PAIRS, build, tokens
from needed import needed
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparse_kernels as kernels
from decode import engine, sampling
from decode.context import Cache
from decode.quantized import quantize
from kernels import picked
from kernels.build import cpu_library
from layers import settle
from training import continual

pytestmark = pytest.mark.skipif(cpu_library()[0] is None, reason=cpu_library()[1])

WRITTEN = {name: arm for name, arm in (ARMS | PAIRS).items()
           if not any(flag in arm for flag in engine.WAITING)}
ONE_BY_ONE = {name: arm for name, arm in WRITTEN.items() if name in ARMS}
every_program = pytest.mark.parametrize("arm", WRITTEN.values(), ids=WRITTEN.keys())
every_single = pytest.mark.parametrize("arm", ONE_BY_ONE.values(), ids=ONE_BY_ONE.keys())


class Spy(sampling.Sampler):
    """A greedy sampler that keeps the logits it was shown, (steps, rows, ids)."""

    def __init__(self):
        super().__init__(temperature=0)
        self.logits = []

    def __call__(self, logits, seen):
        self.logits.append(logits.clone())
        return super().__call__(logits, seen)


class Program(engine.Program):
    """A Program that counts its steps; `workers` of them run it, torch's own threads stay as they are."""
    steps, workers = 0, 1

    def __init__(self, model, cache, ids, wants, threads=None, draws=None):
        super().__init__(model, cache, ids, wants, threads or Program.workers, draws)

    def step(self):
        Program.steps += 1
        return super().step()

    def advance(self):
        Program.steps += 1
        return super().advance()


@pytest.fixture(autouse=True)
def stepped(monkeypatch):
    """How many steps programs have run so far: a function."""
    monkeypatch.setattr(engine, "Program", Program)
    Program.steps = 0
    return lambda: Program.steps


def decoded(model, idx, count, lengths=None, overflow="exact"):
    """-> greedy ids (rows, count) and the logits behind them (count, rows, ids), in fp32."""
    spy = Spy()
    new = torch.cat(list(sampling.stream(model, idx, count, spy, lengths, overflow)), dim=1)
    return new, torch.stack(spy.logits).float()


@torch.no_grad()
def forward(model, idx, new, lengths=None, overflow="exact"):
    """The logits (count, rows, ids) of the full forward without a cache for the texts that decoding made: of
    each token behind its window. No position sees the future, so a call gives those of a window and of what
    follows."""
    block, count, on = model.config.block_size, new.size(1), model.choices.adapters
    windows, at, adapters = [], [], []
    for row, n in enumerate(lengths or [idx.size(1)] * len(idx)):
        text, first, begun = torch.cat((idx[row, :n], new[row])), 0, None
        for end in range(n, n + count):
            if end - first > block:
                first = end - (block if overflow == "exact" else block // 2)
            if first != begun:
                window = text[first:first + block]
                windows.append(torch.nn.functional.pad(window, (0, block - len(window))))
                adapters.append(on[row] if len(on) > 1 else on[0])
            at.append((len(windows) - 1, end - 1 - first))
            begun = first
    model.choose(adapters=tuple(adapters) if len(on) > 1 else on)
    windows = torch.stack(windows)
    logits = model(windows, windows)[0].float()
    model.choose(adapters=on)
    return torch.stack([logits[place] for place in at]).unflatten(0, (-1, count)).transpose(0, 1)


def assert_decodes_as_forward(model, idx, count, lengths=None, overflow="exact", atol=1e-5):
    new, logits = decoded(model, idx, count, lengths, overflow)
    expected = forward(model, idx, new, lengths, overflow)
    assert torch.equal(new, expected.argmax(-1).t())
    logits = torch.where(logits.isneginf(), expected, logits)    # a screened head leaves losers out
    torch.testing.assert_close(logits, expected, atol=atol, rtol=0)


def some_lengths(rows, longest):
    return [1 + (longest - 1) * (3 * row % rows) // max(1, rows - 1) for row in range(rows)]


@every_single
def test_a_variant_without_a_waiting_flag_has_a_program(arm):
    model = build(arm)
    for policy in (False, True):
        for rows in (1, 8):
            cache = Cache(model.use_policy(policy), rows, 16)
            assert engine.program_of(model, cache, 31, None, torch.device("cpu"))


def test_what_waits_for_ops_is_decoded_by_forward():
    for name, arm in ARMS.items():
        model = build(arm)
        program = engine.program_of(model, Cache(model, 1, 16), 31, None, torch.device("cpu"))
        assert bool(program) == (name in WRITTEN)


@pytest.fixture
def threads():
    """Set how many threads run a program, for one test."""
    yield lambda count: setattr(Program, "workers", count)
    Program.workers = 1


@every_single
@pytest.mark.parametrize("count", [1, 2])
def test_steps_give_the_ids_and_logits_of_the_full_forward(arm, count, stepped, threads):
    """With the policy and without, one row and several at columns of their own, to the end of the block and
    past it."""
    threads(count)
    for rows, policy in ((1, False), (3, True), (8, False)):
        model, before = build(arm, std=0.2).use_policy(policy), stepped()
        assert_decodes_as_forward(model, tokens(rows, 7, seed=count), 12, some_lengths(rows, 7))
        assert stepped() > before


CHOOSING = {"experts", "dendrites", "compartments", "adapters", "columns"}
BOTH = [pytest.param(arm, id=name, marks=() if len(CHOOSING & {*name.split("+")}) == 2 or "window" in name
                     else pytest.mark.slow) for name, arm in WRITTEN.items() if name in PAIRS]


@pytest.mark.parametrize("arm", BOTH)
def test_two_flags_at_once_give_the_ids_and_logits_of_the_full_forward(arm, stepped):
    assert_decodes_as_forward(build(arm, std=0.2).use_policy(), tokens(3, 7), 12, some_lengths(3, 7))
    assert stepped()


PER_ROW = {name: arm | dict(adapters="one,two,three", adapter_width=4)
           for name, arm in WRITTEN.items() if name in ("gpt2", "no_bias", "window", "experts", "dendrites")}


@pytest.mark.parametrize("arm", PER_ROW.values(), ids=PER_ROW.keys())
@pytest.mark.parametrize("on", [(2,), (2, 0, 2), (0, 1, 2)], ids=str)
def test_each_row_has_the_adapter_that_is_switched_on_for_it(arm, on, stepped):
    model = build(arm, std=0.2)
    continual.use_adapters(model, on)
    assert_decodes_as_forward(model, tokens(3, 7), 12, [7, 1, 4])
    continual.use_adapters(model, [1])
    assert_decodes_as_forward(model, tokens(1, 7), 3)
    assert stepped() > 2


@every_single
def test_a_window_that_slides_is_read_by_steps(arm, stepped):
    assert_decodes_as_forward(build(arm, std=0.2), tokens(3, 11), 30, [11, 2, 6], overflow="slide")
    assert stepped()


ROUNDED = {name: arm for name, arm in WRITTEN.items() if name in ARMS or "bias" in name or "energy" in name}


@pytest.mark.parametrize("arm", ROUNDED.values(), ids=ROUNDED.keys())
def test_bf16_steps_round_where_forward_rounds(arm, stepped):
    """Sums in another order may end one bit apart and bring two of equal logits, or two units at an edge,
    into another order; nothing is further off in most steps."""
    model = build(arm, std=0.2).use_policy().to(torch.bfloat16)
    apart = []
    for seed in range(3):
        idx, lengths = tokens(3, 7, seed), [7, 1, 4]
        new, logits = decoded(model, idx, 9, lengths)
        expected = forward(model, idx, new, lengths)
        off = torch.where(logits.isneginf(), 0, logits - expected).abs().amax(-1)
        best = expected.amax(-1) - expected.gather(-1, new.t()[..., None])[..., 0]
        assert (best <= 2 * off).all()
        apart.append(off.flatten())
    apart = torch.cat(apart)
    assert apart.median() <= 2 ** -6 and apart.max() <= 0.2 and stepped()


@pytest.mark.parametrize("size", [16, 24, 32, 48, 64, 80, 112, 128, 256, 272])
def test_heads_of_any_size_attend_in_bf16_as_in_fp32(size, stepped):
    """Some are sums in registers; of bf16 the logits are as far off as bf16 is, and no further."""
    flags = dict(n_embd=2 * size, n_head=2, n_layer=1, pos="rope", qk_norm=True)
    wide = build(flags, std=0.2).to(torch.bfloat16).float()
    model = build(flags, std=0.2).to(torch.bfloat16)
    for length in (1, 2, 3, 6):
        idx = tokens(2, length, length)
        new, logits = decoded(model, idx, 8)
        expected = forward(wide, idx, new)
        assert (logits - expected).abs().max() <= 0.03 * expected.abs().max() and stepped()


def test_two_programs_of_one_process_share_nothing():
    """Streams of two models, a token of each in turn, some of them longer, ended in another order."""
    kinds = [build(ARMS[name], std=0.2) for name in ("experts", "dendrites", "columns", "compartments")]
    right = [torch.cat(list(sampling.stream(m, tokens(2, 5), 9, sampling.Sampler(0))), 1) for m in kinds]
    streams = [sampling.stream(m, tokens(2, 5), 9, sampling.Sampler(0)) for m in kinds for _ in range(2)]
    found = [[] for _ in streams]
    for _ in range(9):
        for said, one in zip(found, streams):
            said.append(next(one))
    assert all(torch.equal(torch.cat(said, 1), right[i // 2]) for i, said in enumerate(found))


@every_single
def test_a_model_that_learns_between_two_streams_is_read_anew(arm, stepped):
    model, idx = build(arm, std=0.2), tokens(3, 7)
    assert_decodes_as_forward(model, idx, 3)
    model.train()(idx[:, :-1], idx[:, 1:])[1].backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    assert_decodes_as_forward(model.eval(), idx, 3)
    assert stepped()


@every_single
def test_a_stream_outlives_the_name_of_its_model(arm):
    right = decoded(build(arm, std=0.2), tokens(2, 5), 9)[0]
    stream = sampling.stream(build(arm, std=0.2), tokens(2, 5), 9, sampling.Sampler(0))
    ids = [next(stream), next(stream)]
    gc.collect()
    assert torch.equal(torch.cat([*ids, *stream], 1), right)


def in_a_fork(model, pipe):
    pipe.send(decoded(model, tokens(3, 7), 9)[0].tolist())


@pytest.mark.parametrize("name", ["gpt2", "dendrites", "experts"])
def test_a_process_that_was_forked_behind_a_step_decodes_too(name, threads):
    """Its parent's workers are not there, and the parent goes on with them."""
    threads(2)
    model = build(ARMS[name], std=0.2)
    right = decoded(model, tokens(3, 7), 9)[0]
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=in_a_fork, args=(model, theirs))
    child.start()
    try:
        assert ours.poll(60) and ours.recv() == right.tolist()
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()
    assert torch.equal(decoded(model, tokens(3, 7), 9)[0], right)


def steps_at_once(counts, tries):
    """Programs of so many threads each, stepped from Python threads of their own at once: rounds that differ
    from what one thread alone computes, or that do not end."""
    model, idx = build({}, std=0.2), tokens(1, 12)
    programs = [engine.Program(model, Cache(model, 1, 12), 31, None, threads=count) for count in (1, *counts)]

    @torch.inference_mode()
    def run(program):
        program.begin(idx, [0], [1])
        found = []
        for _ in range(12):
            program.c.cost[0], program.c.cost[1], program.c.spent = 1, 0, 0     # never alone
            found.append(program.step().clone())
        return torch.stack(found)

    expected, wrong, start = run(programs[0]), list(range(len(counts))), threading.Barrier(len(counts))

    def work(number):
        start.wait(30)
        if all(torch.equal(run(programs[1 + number]), expected) for _ in range(tries)):
            wrong.remove(number)

    workers = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(len(counts))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    return wrong


def test_programs_of_several_numbers_of_threads_step_at_once():
    """A worker that a step leaves out may wake up when the next step, of more threads, is being written."""
    assert not steps_at_once([4, 2, 3, 1], 12) and not steps_at_once([4, 2], 12)


def at_once_in_a_fork(pipe):
    pipe.send(steps_at_once([2, 3], 2))


def test_threads_of_a_forked_process_take_their_first_step_at_once():
    """While the parent steps too: whatever its workers were at, the child has none and starts its own."""
    stop, parent = threading.Event(), []

    def keep_stepping():
        while not stop.is_set():
            parent.extend(steps_at_once([2], 1))

    stepping = threading.Thread(target=keep_stepping, daemon=True)
    stepping.start()
    try:
        for _ in range(4):
            ours, theirs = multiprocessing.Pipe()
            child = multiprocessing.get_context("fork").Process(target=at_once_in_a_fork, args=(theirs,))
            child.start()
            try:
                assert ours.poll(60) and ours.recv() == []
                child.join(60)
                assert child.exitcode == 0
            finally:
                child.kill()
    finally:
        stop.set()
        stepping.join(60)
    assert not parent and not stepping.is_alive()


def test_python_threads_decode_at_once(threads):
    """One step has the workers; others beside it run alone."""
    threads(2)
    jobs = [(build(ARMS[name], std=0.2), tokens(rows, 5)) for name, rows in
            (("dendrites", 3), ("experts", 1), ("gpt2", 8), ("compartments", 2))]
    right = [model.generate(idx, 9, temperature=0) for model, idx in jobs]
    wrong, start = [], threading.Barrier(len(jobs))

    def work(job, expected):
        start.wait(30)
        for _ in range(6):
            if not torch.equal(job[0].generate(job[1], 9, temperature=0), expected):
                wrong.append(job)

    workers = [threading.Thread(target=work, args=pair, daemon=True) for pair in zip(jobs, right)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(80)
    assert not wrong and not any(worker.is_alive() for worker in workers)


def empty_cache(model, rows, length):
    cache = Cache(model, rows, length)
    cache.states.update(group=torch.zeros(()), said=torch.zeros(1, 1, 1))      # of a hierarchy
    return cache


@torch.inference_mode()
def by_steps_alone(model, idx):
    """Logits (rows, T, ids) of a program that reads idx from its first token on; None without a program."""
    program = engine.program_of(model, empty_cache(model, *idx.shape), 31, None, idx.device)
    if not program:
        return None
    program.begin(idx, [0] * len(idx), [1] * len(idx))
    return torch.stack([program.step().clone() for _ in range(idx.size(1))], dim=1)


@torch.no_grad()
def in_plain_torch(model, idx):
    """The same by forwards of the text up to each token."""
    with sdpa_kernel(SDPBackend.MATH):                           # the fused one answers NaN queries with 0
        return torch.cat([model(idx[:, :t + 1])[0] for t in range(idx.size(1))], dim=1)


SELECTIVE = {name: WRITTEN[name] for name in (
    "relu2", "topk", "winners", "event_gate", "columns", "experts", "predict", "compartments", "dendrites",
    "attn_topk", "two_of_four", "topk+columns", "relu2+experts", "event_gate+columns",
    "event_gate+compartments", "event_gate+dendrites", "topk+compartments")}


@pytest.mark.parametrize("policy", [False, True])
@pytest.mark.parametrize("arm", SELECTIVE.values(), ids=SELECTIVE.keys())
def test_no_step_hides_a_damaged_weight_that_forward_shows(arm, policy):
    """NaN in one weight of each parameter in turn: NaN at the same tokens, or no program at all."""
    model, idx, programs = build(arm, std=0.2).use_policy(policy), tokens(2, 4), 0
    for number, p in enumerate(model.parameters()):
        place = torch.unravel_index(torch.tensor((number + 1) * 7919 % p.numel()), p.shape)
        with torch.no_grad():
            whole = p[place].clone()
            p[place] = torch.nan
            found, plain = by_steps_alone(model, idx), in_plain_torch(model, idx)
            p[place] = whole
        if found is not None:
            programs += 1
            assert torch.equal(plain.isnan().any(-1), found.isnan().any(-1)), (number, p.shape, place)
    assert programs > number / 2 and by_steps_alone(model, idx).isfinite().all()


def test_a_token_that_is_not_finite_shows_though_all_its_branches_are_shut():
    model = build(ARMS["dendrites"], std=0.2)
    with torch.no_grad():
        model.transformer.h[0].attn.gate.router.weight.abs_().neg_()
        model.transformer.h[0].ln_1.bias[3] = torch.inf
        assert in_plain_torch(model, tokens(1, 4)).isnan().all()
    assert by_steps_alone(model, tokens(1, 4)).isnan().all()


@pytest.mark.parametrize("arm", [WRITTEN[name] for name in ("two_of_four", "swiglu+two_of_four",
                                                            "relu2+two_of_four", "topk+two_of_four")])
def test_packed_weights_decode_as_dense_ones(arm, stepped):
    model = settle(build(arm, std=0.2))
    assert_decodes_as_forward(model, tokens(3, 7), 9, [7, 1, 4])
    assert stepped()


WIDE = (12, 36, 68, 132, 256, 268, 516)          # of rows of 2:4 weights: parts of 16, 32, 64, 256 inputs


@pytest.mark.parametrize("width", WIDE)
def test_packed_rows_of_any_width_decode_as_dense_ones(width, stepped):
    model = settle(build(dict(weights="2:4", act="gelu", n_embd=width, mlp_units=3 * width), std=0.1))
    assert_decodes_as_forward(model, tokens(2, 3), 5, [3, 1], atol=3e-5)
    assert stepped()


@pytest.mark.parametrize("kind, atol", [(None, 2e-2), ("int8", 0)], ids=["bf16", "int8"])
@pytest.mark.parametrize("width", WIDE)
def test_packed_rows_in_bf16_and_8_bits_decode_as_dense_ones(width, kind, atol, monkeypatch):
    """bf16: to the rounding of its sums. Whole numbers: bit for bit."""
    found = []
    for pack in (False, True):
        if not pack:
            monkeypatch.setattr(picked, "wanted", lambda device, whole=False: False)
        model = build(dict(weights="2:4", n_embd=width, mlp_units=3 * width), std=0.05).bfloat16()
        model = settle(model, pack)
        found.append(by_steps_alone(quantize(model, kind) if kind else model, tokens(2, 5)))
        monkeypatch.undo()
    torch.testing.assert_close(*found, atol=atol, rtol=0)


@pytest.mark.skipif(not picked.wanted(torch.device("cpu"), whole=True), reason="no AVX2 here")
@pytest.mark.parametrize("kind, size", [(None, 2), ("int8", 1)], ids=["bf16", "int8"])
def test_a_packed_model_reads_its_packed_bytes(kind, size):
    """Of 64 inputs 32 weights and 8 bytes of places, or, in bf16, 64 bytes of weights and 8 of places."""
    model = settle(build(dict(weights="2:4", n_embd=256, mlp_units=512, act="relu2")).bfloat16())
    model = quantize(model, kind) if kind else model
    program = engine.program_of(model, empty_cache(model, 1, 4), 31, None, torch.device("cpu"))
    up = [op.w for op in program.table
          if (op.code, op.w.rows, op.w.width) == (engine.CODES["linear"], 512, 256)]
    assert len(up) == 2 and {w.stride + w.scale_stride for w in up} == {32 + 128 * size}
    assert {engine.KIND_NAMES[w.kind] for w in up} == {"2:4 " + ("int8" if kind else "bfloat16")}


@pytest.mark.parametrize("kind", [None, "int8"])
def test_what_is_laid_for_one_processor_is_not_handed_to_another(kind, monkeypatch):
    """As when a model that was made here moves to a card: its rows are read as they are stored."""
    model = settle(build(dict(weights="2:4"), std=0.2))
    model = quantize(model, kind) if kind else model
    here = by_steps_alone(model, tokens(1, 4))
    monkeypatch.setattr(picked, "wanted", lambda device, whole=False: False)
    program = engine.program_of(model, empty_cache(model, 1, 4), 31, None, torch.device("cpu"))
    assert not {op.w.kind for op in program.table} & set(engine.PICKED.values())
    torch.testing.assert_close(by_steps_alone(model, tokens(1, 4)), here, atol=1e-5, rtol=0)


def test_what_is_laid_for_a_step_follows_weights_that_are_loaded():
    """Other weights into a model that has decoded: packed ones and quantised ones."""
    for kind in (None, "int8"):
        first, second = (settle(build(dict(weights="2:4"), std=std)) for std in (0.2, 0.1))
        first, second = ((quantize(m, kind) if kind else m) for m in (first, second))
        by_steps_alone(first, tokens(1, 4))
        first.load_state_dict(second.state_dict())
        assert torch.equal(by_steps_alone(first, tokens(1, 4)), by_steps_alone(second, tokens(1, 4)))


COUNTED = {name: WRITTEN[name] for name in (
    *ONE_BY_ONE, "osc+columns", "winners+columns", "event_gate+columns", "event_gate+compartments",
    "experts+dendrites", "compartments+dendrites", "columns+adapters", "experts+adapters", "topk+columns",
    "winners+experts", "window+dendrites", "relu2+attn_topk", "compartments+two_of_four",
    "rope+dendrites")                            # but those whose forward computes all of it
    if name not in ("mlp_screen", "screened_gates", "screen")}


@pytest.mark.parametrize("policy", [False, True])
@pytest.mark.parametrize("arm", COUNTED.values(), ids=COUNTED.keys())
def test_a_program_counts_what_a_step_by_modules_needs(arm, policy, monkeypatch):
    """Multiply-adds and bytes of one row. Of several rows the multiply-adds of each; rows of weights that two
    of them need are read once."""
    model = build(arm, std=0.2).use_policy(policy)

    def counted(rows, counting):
        stream, found = sampling.stream(model, tokens(rows, 5), 6, sampling.Sampler(0)), []
        next(stream)
        for _ in range(5):
            with counting() as tally:
                next(stream)
            found.append((tally.macs, tally.bytes))
        return found

    ours, many = counted(1, kernels.counting), counted(3, kernels.counting)
    monkeypatch.setattr(engine, "program_of", lambda *_: None)
    one, three = (counted(rows, partial(needed, model)) for rows in (1, 3))
    assert min(macs for macs, _ in ours) > 0
    if "exits" in arm and policy:                # a program puts off keys and values, perhaps for ever
        assert all(a <= b for a, b in zip(ours, one))
    else:
        assert ours == one
        if "hierarchy" not in arm:               # whose forward runs all rows where one completes a group
            assert [macs for macs, _ in many] == [macs for macs, _ in three]
    assert all(a <= b and c <= d for (a, c), (b, d) in zip(many, three))


def counts_of_steps(model, idx):
    """(multiply-adds, bytes) of every step of a program that reads idx from its first token on."""
    program, found = engine.program_of(model, empty_cache(model, *idx.shape), 31, 1, idx.device), []
    program.begin(idx, [0] * len(idx), [1] * len(idx))
    for _ in range(idx.size(1)):
        with kernels.counting() as tally:
            program.step()
        found.append((tally.macs, tally.bytes))
    return found


@torch.inference_mode()
@pytest.mark.parametrize("policy", [False, True])
@pytest.mark.parametrize("arm", ONE_BY_ONE.values(), ids=ONE_BY_ONE.keys())
def test_a_batch_reads_a_row_of_weights_once(arm, policy):
    """Equal rows: the bytes of one, the multiply-adds of all. Others: as many as the most of one, or more."""
    if "screen" in arm:
        pytest.skip("a batch reads the whole head")
    model = build(arm, std=0.2).use_policy(policy)
    one, many = tokens(1, 6), tokens(4, 6, seed=1)
    alone = counts_of_steps(model, one)
    together = counts_of_steps(model, one.expand(4, -1).contiguous())
    assert together == [(4 * macs, size) for macs, size in alone]
    each = list(zip(*(counts_of_steps(model, row[None]) for row in many)))
    for (macs, size), single in zip(counts_of_steps(model, many), each):
        assert macs == sum(count for count, _ in single)
        assert max(count for _, count in single) <= size <= sum(count for _, count in single)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_single
def test_a_row_of_a_batch_is_bit_by_bit_what_it_is_alone(arm, dtype, threads):
    """Whatever its neighbours want, and which of them have dropped out."""
    threads(2)
    model, idx = build(arm, std=0.2).use_policy().to(dtype), tokens(5, 9)
    alone = [by_steps_alone(model, row[None]) for row in idx]
    assert torch.equal(by_steps_alone(model, idx), torch.cat(alone))
    assert torch.equal(by_steps_alone(model, idx[[3, 3, 0]]), torch.cat([alone[3], alone[3], alone[0]]))


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("edge", [-9.0, 0.0, 1.0, 9.0])
@pytest.mark.parametrize("H,C", [(50, 12), (7, 33), (300, 64)])
def test_listed_units_of_several_rows_are_read_together(H, C, edge, rows, threads):
    """All units, about half, few, none: what is read is the union, what is computed is each row's own."""
    class Listed(torch.nn.Module):
        def emit(self, p):
            x = p.embed(p.matrix(table))
            units = p.above(p.linear(x, p.matrix(scores), own=True), H, edge)
            a = p.linear(x, p.matrix(up), "relu2", units=units)
            p.answer = p.rows_sum(a, p.matrix(down), units=units)

    generator = torch.Generator().manual_seed(H)
    table, scores, up, down = (torch.randn(*size, generator=generator) / size[1] ** 0.5
                               for size in ((9, C), (H, C), (H, C), (H, C)))
    history = torch.arange(2 * rows).view(rows, 2) % 9
    x = table[history[:, 0]]
    wanted = x @ scores.t() > edge
    a = (x @ up.t()).relu() ** 2 * wanted
    for count in (1, 2):
        program = engine.Program(Listed(), Cache(build({}), rows, 2), C, None, threads=count)
        program.begin(history, [0] * rows, [1] * rows)
        torch.testing.assert_close(program.step(), a @ down, atol=1e-5, rtol=1e-5)
        linear, sums = (next(op for op in program.table[2:] if op.code == engine.CODES[code])
                        for code in ("linear", "rows_sum"))
        assert (linear.used, linear.read) == (wanted.sum(), wanted.any(0).sum())
        assert (sums.used, sums.read) == ((a != 0).sum(), (a != 0).any(0).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("C,K,U", [(12, 4, 1), (12, 4, 3), (20, 4, 7), (33, 3, 16), (64, 1, 9), (128, 8, 5)])
def test_a_block_diagonal_product_meets_each_part_of_its_input(C, K, U, dtype, threads):
    """Rows of the matrix, U of them in turn, by the part of x that is theirs; blocks of any height."""
    class Blocks(torch.nn.Module):
        def emit(self, p):
            p.answer = p.linear(p.embed(p.matrix(table)), p.matrix(weight, bias), blocks=U, stored=True)

    generator = torch.Generator().manual_seed(C)
    table, weight, bias = (torch.randn(*size, generator=generator).to(dtype)
                           for size in ((9, C), (K * U, C // K), (K * U,)))
    history = torch.tensor([[3, 0], [8, 0], [5, 0]])
    cache = Cache(build({}).to(dtype), 3, 2)
    for count in (1, 2):
        program = engine.Program(Blocks(), cache, K * U, None, threads=count)
        program.begin(history, [0] * 3, [1] * 3)
        x = table[history[:, 0]].float().unflatten(-1, (K, -1))
        expected = torch.einsum("rkc,kuc->rku", x, weight.float().unflatten(0, (K, -1))).flatten(1)
        expected = (expected.to(dtype) + bias).float()
        tolerance = 1e-5 if dtype == torch.float32 else 0.04
        torch.testing.assert_close(program.step(), expected, atol=tolerance, rtol=tolerance)


def test_in_bf16_a_step_by_modules_rounds_units_as_forward_does(monkeypatch):
    """Where ops are not written: what is kept of the winners is what a prompt would store."""
    monkeypatch.setattr(engine, "program_of", lambda *_: None)
    for seed in range(6):
        model = build(ARMS["predict"], std=0.2).to(torch.bfloat16)
        new, _ = decoded(model, tokens(1, 5, seed), 9)
        assert torch.equal(new, forward(model, tokens(1, 5, seed), new).argmax(-1).t()), seed
