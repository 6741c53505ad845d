"""Faults: signals, kills, full disks, losses that are not a number: a good checkpoint stays."""
import builtins
import errno
import itertools
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch
from conftest import LIMIT, ONE_THREAD, ROOT, TINY, Job, in_parallel, one_sentence, run_real, same, words
from test_configurator import STREAMS

import sparse_kernels
from configurator import ConfigError
from kernels import build
from model import GPT, GPTConfig
from training import checkpoint, estimate, rundir

posix = pytest.mark.skipif(os.name != "posix", reason="signals and forks of POSIX")
TIMES = ("seconds", "config", "run")  # what two equal runs may differ in
LONG = TINY | dict(eval_interval=7, max_iters=1_000_000)
PATCH_LOSS = """
import math, torch, model
forward, calls = model.GPT.forward, [0]
def poisoned(self, idx, targets=None):
    logits, loss = forward(self, idx, targets)
    calls[0] += self.training
    return logits, loss * math.nan if self.training and calls[0] in {bad} else loss
model.GPT.forward = poisoned
"""
SAVER = """
import sys, torch; from training import checkpoint
path, n = sys.argv[1], int(sys.argv[2])
while True:
    n += 1
    checkpoint.save({"model": {"w": torch.full((500_000,), float(n))}, "model_args": {}, "iter_num": n}, path,
                    keep=3)
    print(n, flush=True)
"""


# -------------------------------------------------- stopping ------------------------------------------------

def stop_at(train, number, row):
    """Start a long run in a real process, send it the signal after some rows -> (Popen, stdout, stderr)."""
    process = run_real("train.py", words(**LONG, dataset=train.data, out_dir=train.folder / "out"),
                       train.folder)
    rows = train.folder / "out" / "metrics.jsonl"
    deadline = time.time() + LIMIT
    while not rows.is_file() or rows.read_bytes().count(b"\n") < row:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.002)
    time.sleep(random.random() * 0.01)
    process.send_signal(number)
    return (process, *process.communicate(timeout=LIMIT))


SIGNALS = [(signal.SIGTERM, 143, 0), (signal.SIGINT, 130, 30)]
SIGNALS += [(signal.SIGHUP, 129, 12)] if hasattr(signal, "SIGHUP") else []
MANY = [pytest.param(number, status, random.Random(n).randrange(200), marks=pytest.mark.slow)
        for n in range(10) for number, status, _ in SIGNALS]


@posix
@pytest.mark.parametrize("number, status, row", SIGNALS + MANY)
def test_a_signal_ends_a_run_at_a_step_and_resuming_goes_on_bit_for_bit(train, number, status, row):
    process, out, err = stop_at(train, number, row)
    assert process.returncode == status, err
    assert "Traceback" not in err
    assert "--init_from=resume" in out
    stopped = train.checkpoint()["iter_num"]
    assert [r["iter"] for r in train.metrics()] == list(range(stopped))
    train.resume(max_iters=stopped + 5)
    train(**LONG | dict(max_iters=stopped + 5), out="whole")
    same(train.checkpoint(), train.checkpoint("whole"), skip=(*TIMES, "fused"))
    assert train.losses() == train.losses("whole")


@posix
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("again", [0, *[pytest.param(n, marks=pytest.mark.slow) for n in range(1, 10)]])
def test_a_second_signal_ends_a_run_at_once(train, number, status, again):
    job = train.start(gradient_accumulation_steps=100_000_000, eval_interval=1)  # no step ever ends
    deadline = time.time() + LIMIT
    while "step 0/" not in job.out.read_text() and time.time() < deadline:
        time.sleep(0.01)
    for _ in range(2):
        time.sleep(0.2)
        os.kill(job.pid, number)
    sent = time.time()
    result = job.wait()
    assert result.status == status
    assert time.time() - sent < 2
    assert "Traceback" not in result.err
    assert not (train.folder / "out" / "ckpt.pt").exists()


@posix
def test_a_signal_keeps_the_best_checkpoint_and_resume_prefers_the_last(train):
    """With always_save_checkpoint=False ckpt.pt holds the best weights; a stop writes ckpt_last.pt."""
    keys = dict(always_save_checkpoint=False, learning_rate=0.05, decay_lr=False, eval_interval=2,
                max_iters=12)
    best_then_worse = """
import os, signal, model
evaluate = model.GPT.forward
def forward(self, idx, targets=None):
    logits, loss = evaluate(self, idx, targets)
    forward.evals += not self.training
    forward.steps += self.training
    if forward.steps == 14:
        os.kill(os.getpid(), signal.SIGINT)
    return logits, loss if self.training else loss + (forward.evals if forward.evals > 4 else 100)
forward.evals = forward.steps = 0
model.GPT.forward = forward
"""
    train(**keys, before=best_then_worse, status=130)
    best, last = train.checkpoint(), train.checkpoint(name="ckpt_last.pt")
    assert (best["iter_num"], last["iter_num"]) == (2, 7)
    train.resume(max_iters=12)  # its evaluations are far better
    assert [row["iter"] for row in train.metrics()] == list(range(13))
    assert train.checkpoint()["iter_num"] >= 8             # the weights of the stop make room for the end's
    assert train.checkpoint()["iter_num"] == 12 or train.checkpoint(name="ckpt_last.pt")["iter_num"] == 12
    train(**keys, out="whole")
    assert train.losses() == train.losses("whole")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="terminals of POSIX")
def test_a_signal_ends_a_run_whose_terminal_has_gone_behind_a_save(train):
    """A closed terminal: writing there is an error from then on, and the run still saves and exits 129."""
    ours, theirs = os.openpty()
    command = [sys.executable, str(ROOT / "train.py"), *words(**LONG | dict(eval_interval=1),
               dataset=train.data, out_dir=train.folder / "out")]
    leader = "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(1, termios.TIOCSCTTY, 0); " \
             "os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", leader, *command], stdin=theirs, stdout=theirs,
                               stderr=theirs, cwd=train.folder, env={**os.environ, **ONE_THREAD})
    os.close(theirs)
    deadline, said = time.time() + LIMIT, b""
    while said.count(b"step ") < 4 and time.time() < deadline:
        said += os.read(ours, 4096)                             # a full terminal would stop the run
    os.close(ours)
    assert process.wait(LIMIT) == 129, said.decode(errors="replace")
    assert train.checkpoint()["iter_num"] == train.metrics()[-1]["iter"] + 1 >= 3
    assert not (train.folder / "out" / "run.lock").exists()


@posix
def test_a_run_under_nohup_goes_on_without_its_terminal(train):
    ignore = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    send = "import os, signal, model; forward = model.GPT.forward\n" \
           "model.GPT.forward = lambda *words: (os.kill(os.getpid(), signal.SIGHUP), forward(*words))[1]\n"
    train(before=ignore + send)
    assert train.checkpoint()["iter_num"] == 16
    train(before=send, out="stopped", status=129)


def test_a_run_that_has_saved_nothing_says_so(train):
    said = train(max_iters=0).out.splitlines()[-1]
    assert "no iteration was trained" in said and "holds no checkpoint" in said and "sample" not in said
    assert not list((train.folder / "out").glob("*.pt"))
    train(max_iters=4)
    said = train(max_iters=0).out.splitlines()[-1]              # the other run is no longer this folder's
    assert "holds no checkpoint" in said and "sample" not in said


WORSE = """
import model
forward, evals = model.GPT.forward, [0]
def worse(self, idx, targets=None):
    logits, loss = forward(self, idx, targets)
    evals[0] += not self.training
    return logits, loss if self.training else loss * 0 + {loss}
model.GPT.forward = worse
"""


@pytest.mark.parametrize("loss, always, best", [("abs(evals[0] - 7)", False, 4), ("evals[0]", False, None),
                                                ("float('nan')", True, None), ("float('inf')", True, None)])
def test_the_last_weights_are_saved_where_they_are_not_the_best(train, loss, always, best):
    """An evaluation that does not improve, or is no number: the end's weights are in ckpt_last.pt."""
    out = train(always_save_checkpoint=always, before=WORSE.format(loss=loss), max_iters=9).out
    said = out.splitlines()[-1]
    assert "ckpt_last.pt" in said and "sample with" in said and ("holds the best" in said) == bool(best)
    assert train.checkpoint(name="ckpt_last.pt")["iter_num"] == 9
    if best:
        assert train.checkpoint()["iter_num"] == best
    train.resume(max_iters=12)
    train(out="whole", max_iters=12)
    assert train.losses() == train.losses("whole")


def test_eval_only_evaluates_and_writes_nothing(train):
    result = train(eval_only=True)
    assert "step 0/" in result.out
    assert not (train.folder / "out").exists()
    train(max_iters=4)
    (train.folder / "out" / "ckpt.pt.tmp").write_bytes(b"of a run beside this one")
    before = {path.name: path.read_bytes() for path in (train.folder / "out").iterdir()}
    assert "step 4/" in train.resume(eval_only=True).out
    assert {path.name: path.read_bytes() for path in (train.folder / "out").iterdir()} == before


# -------------------------------------------------- not a number --------------------------------------------

def test_one_bad_batch_is_skipped_and_training_goes_on(train, finished):
    train(before=PATCH_LOSS.format(bad={7}))  # 2 micro-batches a step: step 3
    rows = {row["iter"]: row for row in train.metrics()}
    assert "nan" in rows[3]["skipped"] and "loss" not in rows[3]
    assert len(train.losses()) == 15
    assert {i: finished.losses()[i] for i in range(3)} == {i: train.losses()[i] for i in range(3)}
    assert train.checkpoint()["iter_num"] == 16


def test_skipped_steps_change_neither_weights_nor_optimizer(train):
    train(max_iters=4, eval_interval=4)
    before = train.checkpoint()
    result = train.resume(before=PATCH_LOSS.format(bad=range(1, 99)), max_iters=7, eval_interval=1)
    after = train.checkpoint()
    assert (before["iter_num"], after["iter_num"]) == (4, 7), result.err
    same(before["model"], after["model"])
    same(before["optimizer"]["state"], after["optimizer"]["state"])


def test_too_many_skipped_steps_in_a_row_end_the_run_with_a_sentence(train):
    train(max_iters=4)
    good = train.checkpoint()
    result = train.resume(before=PATCH_LOSS.format(bad=range(5, 9999)), max_iters=100, max_skipped_steps=5,
                          eval_interval=50, status=1)
    sentence = result.err.strip().splitlines()[-1]
    assert "5 steps in a row" in sentence and "loss nan" in sentence and "Traceback" not in result.err
    assert train.metrics()[-1]["iter"] == 10
    same(train.checkpoint(), good)


def test_a_learning_rate_out_of_this_world_ends_with_status_1_and_a_finite_checkpoint(train):
    result = train(learning_rate=1e5, decay_lr=False, eval_interval=1, max_iters=200, grad_clip=0.0, status=1)
    assert "type a lower --learning_rate" in result.err.strip().splitlines()[-1]
    assert "Traceback" not in result.err
    assert all(torch.isfinite(p).all() for p in train.checkpoint()["model"].values())
    iterations = [row["iter"] for row in train.metrics()]
    assert iterations == sorted(set(iterations))


def test_weights_that_are_not_finite_never_replace_a_checkpoint(train):
    train(max_iters=4)
    good = (train.folder / "out" / "ckpt.pt").read_bytes()
    poison = """
import signal, os, model
forward = model.GPT.forward
def poisoned(self, idx, targets=None):
    self.transformer.h[0].mlp.c_fc.weight.data[3, 5] = float("inf")
    if {stop} and self.training:
        os.kill(os.getpid(), signal.SIGTERM)
    return forward(self, idx, targets)
model.GPT.forward = poisoned
"""
    train.resume(before=poison.format(stop=False), max_iters=6, eval_interval=1)
    assert (train.folder / "out" / "ckpt.pt").read_bytes() == good
    result = train.resume(before=poison.format(stop=True), max_iters=6, eval_interval=1,
                          gradient_accumulation_steps=1, status=143)
    assert "weights are not finite" in result.err
    assert (train.folder / "out" / "ckpt.pt").read_bytes() == good


def test_a_validation_loss_that_is_not_finite_does_not_erase_the_best_one(train):
    """nan, then a worse loss: the best checkpoint of always_save_checkpoint=False stays."""
    losses = "import model; forward, evals = model.GPT.forward, iter({losses})\n" \
             "def scripted(self, idx, targets=None):\n" \
             "    logits, loss = forward(self, idx, targets)\n" \
             "    return logits, loss if self.training else loss * 0 + next(evals)\n" \
             "model.GPT.forward = scripted\n"
    evals = [value for val in (9.0, 5.0, float("nan"), 8.0, 7.0) for value in (1.0, val)]
    train(always_save_checkpoint=False, eval_iters=1, eval_interval=2, max_iters=8,
          before="nan = float('nan')\n" + losses.format(losses=evals))
    assert train.checkpoint()["iter_num"] == 2
    assert train.checkpoint()["best_val_loss"] == 5.0


BAD_GRADIENT = """
import torch, model
forward, steps = model.GPT.forward, [0]
def poisoned(self, idx, targets=None):
    steps[0] += self.training
    if self.training and steps[0] == 7:                         # 2 micro-batches a step: step 3
        bad = lambda gradient: gradient.clone().index_fill_(0, torch.tensor([1]), float("{value}"))
        handle = self.transformer.h[0].mlp.c_fc.weight.register_hook(lambda g: (handle.remove(), bad(g))[1])
    return forward(self, idx, targets)
model.GPT.forward = poisoned
"""


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_bad_number_in_one_place_of_one_gradient_skips_the_step(train, finished, value):
    train(before=BAD_GRADIENT.format(value=value), eval_interval=1, keep_checkpoints=99)
    rows = {row["iter"]: row for row in train.metrics()}
    assert "gradient norm" in rows[3]["skipped"] and len(train.losses()) == 15
    assert {i: finished.losses()[i] for i in range(3)} == {i: train.losses()[i] for i in range(3)}
    before, after = (train.checkpoint(name=f"ckpt-{n:06d}.pt") for n in (3, 4))
    same(before["model"], after["model"])
    same(before["optimizer"]["state"], after["optimizer"]["state"])


def test_a_finite_spike_is_clipped_and_training_goes_on(train, finished):
    spike = PATCH_LOSS.replace("loss * math.nan", "loss * 1e12")
    train(before=spike.format(bad={7}), eval_interval=1, keep_checkpoints=99)
    rows = {row["iter"]: row for row in train.metrics()}
    assert rows[3]["grad_norm"] > 1e9 and "skipped" not in rows[3] and len(train.losses()) == 16
    before, after = (train.checkpoint(name=f"ckpt-{n:06d}.pt")["model"] for n in (3, 4))
    assert all((before[key] - after[key]).abs().max() < 0.1 for key in before)      # one step of AdamW
    assert rows[15]["loss"] < rows[0]["loss"]


# -------------------------------------------------- too little memory ---------------------------------------

@pytest.mark.parametrize("error", ["torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')",
                                   "RuntimeError('MPS backend out of memory (MPS allocated: 8 GB)')",
                                   "MemoryError()"])
@pytest.mark.parametrize("keys, expected", [
    (dict(batch_size=12, gradient_accumulation_steps=5), "--batch_size=6 --gradient_accumulation_steps=10"),
    (dict(batch_size=9, gradient_accumulation_steps=2), "--batch_size=3 --gradient_accumulation_steps=6"),
    (dict(batch_size=7, gradient_accumulation_steps=2), "--batch_size=1 --gradient_accumulation_steps=14"),
    (dict(batch_size=1), "type --recompute=True"),
    (dict(batch_size=1, recompute=True), "type a smaller --block_size")])
def test_a_lack_of_memory_is_answered_with_what_keeps_the_tokens_of_a_step(train, error, keys, expected):
    before = f"""
import torch, model
def forward(self, idx, targets=None):
    raise {error}
model.GPT.forward = forward
"""
    result = train(before=before, status=2, **keys)
    sentence = result.err.strip().splitlines()[-1]
    assert sentence.startswith("train.py: cpu ran out of memory at batch_size=") and expected in sentence
    assert "Traceback" not in result.err


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS and /proc")
def test_a_real_lack_of_memory_is_the_same_sentence(train):
    limit = ("import resource; pages = int(open('/proc/self/statm').read().split()[0]); "
             "most = pages * resource.getpagesize() + 2**30; "
             "resource.setrlimit(resource.RLIMIT_AS, (most, most))")
    result = train(before=limit, status=2, batch_size=2**16, eval_iters=1, block_size=64)
    assert "cpu ran out of memory at batch_size=65536" in result.err and "Traceback" not in result.err


def test_a_dry_run_says_what_a_run_needs_and_writes_nothing(train):
    result = train(dry_run=True, max_iters=1000)
    assert not (train.folder / "out").exists()
    said = result.out.splitlines()
    parameters = next(line for line in said if line.startswith("parameters: "))
    train(max_iters=1)
    weights = train.checkpoint()["model"]
    count = sum(p.numel() for name, p in weights.items() if name != "lm_head.weight")
    assert f"parameters: {count:,}," in parameters
    assert any(f"weights {4 * count / 2**20:,.1f} MiB" in line for line in said)
    assert any(line.startswith("tokens: 32 an iteration, 32,000 in all") for line in said)
    assert any(line.startswith("time: ") and "tokens/s" in line for line in said)


@pytest.mark.parametrize("flags", [{}, dict(optimizer="muon"), dict(act="relu2", mlp_topk=0.25),
                                   dict(exits="1", n_layer=2)], ids=str)
def test_what_a_dry_run_says_before_its_first_step_is_what_a_step_takes(train, flags):
    """The moments are those that a checkpoint holds; what a batch keeps is reckoned from a few rows."""
    said = train(dry_run=True, batch_size=5, **flags).out
    train(max_iters=1, **flags)
    optimizer = train.checkpoint()["optimizer"]
    states = [state for part in optimizer.get("parts", [optimizer]) for state in part["state"].values()]
    moments = sum(t.nbytes for state in states for key, t in state.items() if key != "step")
    assert f"optimizer {moments / 2**20:,.1f} MiB" in said
    model = GPT(GPTConfig(**train.checkpoint()["model_args"]))
    ids = torch.randint(256, (5, model.config.block_size))
    exact = estimate.saved_bytes(model.train(), ids, ids)
    assert estimate.kept_bytes(model, (ids, ids)) == pytest.approx(exact, rel=0.02)


def test_a_dry_run_needs_no_data(train):
    (train.folder / "data" / "here").mkdir(parents=True)
    (train.folder / "data" / "here" / "prepare.py").write_text("VOCAB_SIZE = 77\nraise SystemExit('it ran')")
    for dataset, vocabulary in (("here", 77), ("nowhere", 50304)):
        said = train(dry_run=True, dataset=dataset, max_iters=1000).out
        assert f"{dataset} is not here, vocabulary {vocabulary}" in said and "epochs" not in said
        assert "32,000 in all" in said and "time: " in said
    assert [*train.folder.rglob("*.bin")] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_dry_run_says_parameters_and_memory_at_once_and_ends_at_the_first_signal(train, number):
    keys = dict(n_layer=4, n_head=4, n_embd=256, block_size=256, batch_size=64, dry_run=True, device="cpu",
                dtype="float32", out_dir=train.folder / "out", dataset=train.data)
    job = run_real("train.py", words(**keys), train.folder)
    for line in job.stdout:
        if line.startswith("tokens: "):
            break
        first = line
    assert first.startswith("memory of a process: ") and job.poll() is None
    began = time.time()
    job.send_signal(number)
    status = job.wait(60)
    assert status == -number and time.time() - began < 20
    assert "Traceback" not in job.stderr.read()


# -------------------------------------------------- killed ranks --------------------------------------------

def test_auto_starts_and_then_resumes(train):
    train(init_from="auto", max_iters=6)
    assert [row["iter"] for row in train.metrics()] == list(range(7))
    train(init_from="auto", max_iters=16)
    train(out="whole")
    same(train.checkpoint(), train.checkpoint("whole"), skip=TIMES)
    assert train.losses() == train.losses("whole")


KILL_ONCE = """
import os, signal, model
forward, calls = model.GPT.forward, [0]
def fatal(self, idx, targets=None):
    calls[0] += self.training
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and calls[0] == {at} and os.environ["RANK"] == "{rank}":
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, idx, targets)
model.GPT.forward = fatal
"""


@pytest.mark.skipif(os.name == "nt", reason="torchrun needs libuv there")
@pytest.mark.parametrize("rank, at, old", [
    (1, 11, False), *(pytest.param(*which, marks=pytest.mark.slow) for which in (
        (0, 11, False), (1, 2, False), (0, 30, False), (1, 16, False), (0, 2, True), (0, 11, True)))])
def test_a_killed_rank_is_started_again_and_the_run_is_the_one_without_it(train, rank, at, old):
    """One rank of two dies in the middle of a step; torchrun starts both again, they resume alone, and
    the master takes its predecessor's lock. old: another run was there before, and is put away once."""
    if old:
        train(out="killed", max_iters=12, seed=7)
    runner = train.folder / "killed.py"
    runner.write_text(f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                      + KILL_ONCE.format(rank=rank, at=at)
                      + f"sys.argv[0] = {str(ROOT / 'train.py')!r}\n"
                      "runpy.run_path(sys.argv[0], run_name='__main__')\n")
    keys = dict(dropout=0.1, gradient_accumulation_steps=4)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--max-restarts=1", "--monitor-interval=0.1", str(runner),
               *words(**TINY | keys, dataset=train.data, out_dir=train.folder / "killed")]
    done = subprocess.run(command, cwd=train.folder, env={**os.environ, **ONE_THREAD}, capture_output=True,
                          text=True, timeout=2 * LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    in_parallel(train, 2, **keys, out="whole")
    assert train.losses("killed") == train.losses("whole") and len(train.losses("whole")) == 16
    killed = train.checkpoint("killed")
    assert killed.pop("launch")
    assert [path.name for path in (train.folder / "killed").glob("previous-*")] == ["previous-1"] * old
    assert not old or train.checkpoint("killed", "previous-1/ckpt.pt")["iter_num"] == 12
    assert "held another run" in done.stderr or not old
    assert not (train.folder / "killed" / "run.lock").exists()
    assert {row["run"] for row in train.metrics("killed")} == {killed["run"]}
    same(killed, train.checkpoint("whole"), skip=TIMES)


# -------------------------------------------------- two runs, one folder ------------------------------------

def contents(folder):
    """{name: bytes} of a folder's files, those below it too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def training(train):
    """A run that trains in train.folder/out until it is told to stop -> its Job."""
    job = train.start(eval_interval=1, max_iters=1_000_000)
    deadline = time.time() + LIMIT
    while not (train.folder / "out" / "ckpt.pt").exists() and time.time() < deadline:
        time.sleep(0.01)
    yield job
    try:
        os.kill(job.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


@posix
def test_a_second_run_in_a_folder_is_refused_and_looking_is_not(train, training, case):
    for keys in (dict(), dict(init_from="auto"), dict(init_from="resume")):
        one_sentence(train(status=2, **keys), "train.py", f"process {training.pid}", "--out_dir=")
        case()
    for keys in (dict(eval_only=True), dict(dry_run=True)):
        train.resume(**keys)
        case()
    sampled = Job("sample.py", words(out_dir=train.folder / "out", device="cpu", num_samples=1,
                                     max_new_tokens=2), train.folder).wait()
    assert sampled.status == 0, sampled.err
    os.kill(training.pid, signal.SIGTERM)
    assert training.wait().status == 143
    assert not (train.folder / "out" / "run.lock").exists()
    rows = [row["iter"] for row in train.metrics()]
    assert rows == list(range(len(rows))) and len({row["run"] for row in train.metrics()}) == 1
    assert not list((train.folder / "out").glob("previous-*"))


@posix
def test_a_second_run_of_several_processes_ends_on_all_of_them(train, training, case):
    """The master alone looks at the lock; a rank that waited for it would hang for ten minutes."""
    began = time.time()
    with pytest.raises(AssertionError, match=r"assert \[2, 2\] == \[0, 0\]"):
        in_parallel(train, 2)
    assert time.time() - began < LIMIT
    case()


@posix
@pytest.mark.parametrize("again", ["scratch", "resume", "auto"])
def test_a_lock_of_a_killed_run_is_told_and_taken(train, training, case, again):
    os.kill(training.pid, signal.SIGKILL)
    training.wait()
    assert (train.folder / "out" / "run.lock").exists()
    at = train.checkpoint()["iter_num"]
    result = train(init_from=again, max_iters=at + 3)
    assert f"process {training.pid}" in result.err and "is gone" in result.err
    assert not (train.folder / "out" / "run.lock").exists()
    assert [row["iter"] for row in train.metrics()] == list(range(at + 4))
    assert (train.folder / "out" / "previous-1").exists() == (again == "scratch")


def test_a_lock_of_another_host_is_named_and_stays(train, case):
    train(max_iters=2)
    lock, before = train.folder / "out" / "run.lock", contents(train.folder / "out")
    said = json.loads(rundir.Lock(lock).text) | {"host": "elsewhere", "boot": "another", "machine": "x"}
    lock.write_text(json.dumps(said))
    for keys in (dict(), dict(init_from="auto"), dict(env={"TORCHELASTIC_RUN_ID": "none"})):
        one_sentence(train(status=2, **keys), "train.py", "elsewhere", str(lock), "delete that file")
        case()
    assert contents(train.folder / "out") == before | {"run.lock": lock.read_bytes()}
    lock.write_text(json.dumps(said | {"launch": "job 7"}))     # a restart of torchrun's on this host
    assert "elsewhere" not in train(env={"TORCHELASTIC_RUN_ID": "job 7"}).err
    case()


def lock_text(**changes):
    return json.dumps(json.loads(rundir.Lock("x").text) | changes)


GONE = 2**22 + 1                                                # above the highest pid
@posix
@pytest.mark.parametrize("text, verdict", [
    (lambda: lock_text(), "trains there"),
    (lambda: lock_text(born=""), "trains there"),
    (lambda: lock_text(born="1"), None),                        # the pid was given to another process
    (lambda: lock_text(pid=GONE), None),
    (lambda: lock_text(boot="before"), None if rundir.machine()["machine"] else "cannot be checked"),
    (lambda: lock_text(boot="before", host="b"), "cannot be checked"),
    (lambda: lock_text(space="pid:[1]"), "cannot be checked"),  # a container's own pids
    (lambda: lock_text(space="pid:[1]", pid=GONE), "cannot be checked"),
    (lambda: "", None),                                         # killed between its making and its first word
    (lambda: "{", "cannot be checked"), (lambda: "[1]", "cannot be checked"),
    (lambda: "\0", "cannot be checked"), (lambda: lock_text(pid=-1), "cannot be checked"),
    (lambda: lock_text(pid="7"), "cannot be checked"),
    (lambda: lock_text(pid=2**70), None)])
def test_locks_are_taken_where_their_process_is_gone_and_nowhere_else(tmp_path, capsys, case, text, verdict):
    path, text = tmp_path / "run.lock", text()
    path.write_text(text)
    if verdict:
        with pytest.raises(ConfigError, match=verdict) as caught:
            rundir.take(tmp_path)
        assert path.read_text() == text and str(tmp_path) in str(caught.value)
    else:
        lock = rundir.take(tmp_path)
        assert path.read_text() == lock.text and "is gone" in capsys.readouterr().err
        lock.check()
        lock.release()
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"] * bool(verdict)
    case()


@posix
def test_a_lock_waits_for_the_process_before_a_restart_and_no_longer(tmp_path, monkeypatch, case):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setattr(rundir, "PATIENCE", 0.5)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (tmp_path / "run.lock").write_text(lock_text(pid=child.pid, born=rundir.born(child.pid)))
    with pytest.raises(ConfigError, match="trains there"):
        rundir.take(tmp_path)
    case()
    child.kill()                                                # from here on a zombie: nobody has waited
    rundir.take(tmp_path).release()
    case()
    child.communicate()


def test_a_lock_is_no_lock_of_a_process_with_a_pid_given_again(case):
    assert rundir.born(os.getpid()) == rundir.born(os.getpid()) and rundir.born(os.getpid())
    assert rundir.born(GONE) is None and rundir.born(2**70) is None
    case()


TAKER = """
import sys, time; from training import rundir
from configurator import ConfigError
while time.time() < float(sys.argv[2]):
    pass
try:
    lock = rundir.take(sys.argv[1])
    print("taken", flush=True)
    time.sleep(2)
    lock.check()
except ConfigError as error:
    print(error, file=sys.stderr)
"""


@posix
@pytest.mark.parametrize("rounds", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_of_many_that_find_a_stale_lock_one_takes_it(tmp_path, case, rounds):
    script = tmp_path / "taker.py"
    script.write_text(TAKER)
    for number in range(rounds):
        folder = tmp_path / str(number)
        folder.mkdir()
        if number % 3:
            (folder / "run.lock").write_text(lock_text(pid=GONE))
        start = time.time() + 1
        jobs = [Job(script, [folder, start], tmp_path, name=f"{number}-{n}") for n in range(6)]
        results = [job.wait() for job in jobs]
        assert [result.out for result in results].count("taken\n") == 1, results
        assert sum("trains there" in result.err for result in results) == 5, results
        case()


def test_a_run_whose_folder_was_taken_stops_before_it_saves(tmp_path, case):
    lock = rundir.take(tmp_path)
    lock.path.unlink()                                          # by hand: nobody has it, so it is made again
    lock.check()
    assert lock.path.read_text() == lock.text
    lock.path.write_text(lock_text(host="elsewhere"))
    with pytest.raises(ConfigError, match=r"taken over by process .* of elsewhere"):
        lock.check()
    lock.release()
    assert "elsewhere" in lock.path.read_text()
    case()


def test_a_new_run_moves_the_one_before_aside_and_says_so(train, case):
    train(max_iters=12, seed=1)
    out = train.folder / "out"
    (out / "ckpt-20.pt").write_bytes(b"mine")
    (out / "notes.txt").write_bytes(b"mine")
    first = contents(out)
    ours = ("ckpt.pt", "ckpt-000008.pt", "metrics.jsonl", "manifest.json")
    said = train(max_iters=8, seed=2)
    assert "out held another run (its last save of iteration 12)" in said.err and "previous-1" in said.err
    assert contents(out / "previous-1") == {name: first[name] for name in ours}
    assert train.checkpoint()["iter_num"] == 8 and len(train.metrics()) == 9
    assert "ckpt-20.pt" in said.err and (out / "ckpt-20.pt").read_bytes() == b"mine"
    case()
    second = contents(out)
    said = train(max_iters=4, seed=3)                           # one run before is kept
    assert "removed: previous-1" in said.err
    assert sorted(path.name for path in out.glob("previous-*")) == ["previous-2"]
    assert contents(out / "previous-2") == {name: second[name] for name in ("ckpt.pt", "ckpt-000004.pt",
                                                                            "metrics.jsonl", "manifest.json")}
    assert (out / "ckpt-20.pt").read_bytes() == (out / "notes.txt").read_bytes() == b"mine"
    assert train.resume(out="out/previous-2", max_iters=9)      # and is a run like any other
    case()


def test_a_new_run_never_removes_what_is_not_its_own(train, case):
    """previous-N with other files in it, one in which a run trains, and one that the user made."""
    out = train.folder / "out"
    train(max_iters=2)
    train(max_iters=2)
    (out / "previous-1" / "mine.txt").write_bytes(b"mine")
    before = contents(out / "previous-1")
    train(max_iters=2)
    assert contents(out / "previous-1") == before
    case()
    (out / "previous-2" / "run.lock").write_bytes(b"{}")
    (out / "previous-7").mkdir()
    (out / "previous-7" / "ckpt.pt").write_bytes(b"mine")
    said = train(max_iters=2)
    assert sorted(path.name for path in out.glob("previous-*")) == ["previous-1", "previous-2", "previous-7",
                                                                    "previous-8"]
    assert "removed" not in said.err and contents(out / "previous-7") == {"ckpt.pt": b"mine"}
    case()
    train(max_iters=2, init_from=out / "previous-8")            # what it starts from is not removed
    assert (out / "previous-8" / "ckpt.pt").exists() and (out / "previous-9" / "ckpt.pt").exists()
    case()


def test_a_new_run_may_start_from_the_one_that_it_replaces(train, case):
    train(max_iters=4)
    before = train.checkpoint()
    train(init_from=train.folder / "out" / "ckpt.pt", max_iters=1, learning_rate=0, min_lr=0)
    same(train.checkpoint()["model"], before["model"])
    same(train.checkpoint(name="previous-1/ckpt.pt"), before)
    case()


KILLED_AT = """
import os, signal, model
forward, calls = model.GPT.forward, [0]
def fatal(self, idx, targets=None):
    calls[0] += self.training
    if calls[0] == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, idx, targets)
model.GPT.forward = fatal
"""


@posix
def test_a_new_run_that_was_killed_never_goes_on_as_the_one_before(train, case):
    """Before its first save: resuming says that there is nothing, auto starts anew, the old run stays."""
    train(max_iters=8, seed=1)
    shutil.copy(train.folder / "out" / "ckpt.pt", train.folder / "out" / "ckpt-8.pt")   # by hand
    old = train.checkpoint()
    train(seed=2, before=KILLED_AT, status=-9)
    assert len(train.metrics()) == 3
    one_sentence(train.resume(status=2), "train.py", "ckpt-8.pt is of another run")
    case()
    said = train(init_from="auto", seed=2)
    assert [row["iter"] for row in train.metrics()] == list(range(17)) and "without a checkpoint" in said.err
    train(seed=2, out="whole")
    assert train.losses() == train.losses("whole")
    for name in ("ckpt-8.pt", "previous-1/ckpt.pt"):            # a log alone does not push weights out
        same(train.checkpoint(name=name), old)
    case()


def test_a_damaged_checkpoint_of_a_new_run_is_not_replaced_by_the_one_before(train, case):
    train(max_iters=16, seed=1)
    shutil.copy(train.folder / "out" / "ckpt.pt", train.folder / "out" / "ckpt-16.pt")
    train(max_iters=4, seed=2)
    path = train.folder / "out" / "ckpt.pt"
    path.write_bytes(path.read_bytes()[:-9])
    for script, keys in (("train.py", dict(init_from="resume", max_iters=20)), ("sample.py", {})):
        result = Job(script, words(out_dir=path.parent, device="cpu", **keys), train.folder).wait()
        one_sentence(result, script, "ckpt.pt is damaged", "ckpt-16.pt is of another run")
        case()


class Killed(BaseException):
    """Stands for a SIGKILL."""


def test_a_kill_while_the_run_before_is_put_away_mixes_nothing(tmp_path, monkeypatch, case):
    """Killed at any step: every checkpoint is still there once, and none is read as the new run's."""
    def steps(folder, at=None):
        for n, state in enumerate(STATES[:3]):
            checkpoint.save(state | {"run": "old", "iter_num": n + 1}, folder / "ckpt.pt", keep=2)
        (folder / "metrics.jsonl").write_text('{"iter": 0, "run": "old"}\n')
        (folder / "previous-1").mkdir()
        checkpoint.write_manifest(folder / "previous-1", [])
        count, whole = [0], {name: data for name, data in contents(folder).items() if name.endswith(".pt")}

        def watched(does):
            def step(*words, **more):
                count[0] += 1
                if count[0] == at:
                    raise Killed
                return does(*words, **more)
            return step
        with monkeypatch.context() as patched:
            for name in ("replace", "mkdir", "fsync", "rmdir", "unlink"):
                patched.setattr(os, name, watched(getattr(os, name)))
            try:
                rundir.begin(folder, "new")
            except Killed:
                pass
        return count[0], whole
    total, _ = steps(tmp_path)
    assert total > 8
    for at in range(1, total + 1):
        folder = tmp_path / f"at{at}"
        folder.mkdir()
        _, whole = steps(folder, at)
        checkpoint.VERIFIED.clear()
        assert sorted(data for name, data in contents(folder).items() if name.endswith(".pt")) == sorted(
            whole.values())
        mine = checkpoint.manifest(folder)[1]["run"]
        if mine == "new":
            with pytest.raises(ConfigError, match=r"holds no ckpt\.pt|of another run"):
                checkpoint.read(folder)
            assert checkpoint.start_of("auto", folder) == "scratch"
        else:
            assert checkpoint.read(folder)[0]["iter_num"] == 3
        rundir.begin(folder, "newer")                           # and the next one begins as ever
        assert sorted(data for name, data in contents(folder).items() if name.endswith(".pt")) == sorted(
            whole.values())
        assert checkpoint.manifest(folder) == ([], {"run": "newer"})
        case()


def test_one_id_is_in_the_checkpoints_the_manifest_and_the_log(train, case):
    train(max_iters=6)
    run = train.checkpoint()["run"]
    train.resume(max_iters=12)
    assert {row["run"] for row in train.metrics()} == {run} and len(train.metrics()) == 13
    assert train.checkpoint()["run"] == train.checkpoint(name="ckpt-000008.pt")["run"] == run
    assert checkpoint.manifest(train.folder / "out")[1] == {"run": run}
    train(max_iters=2)
    assert train.checkpoint()["run"] == train.metrics()[0]["run"] != run
    case()


def test_one_id_is_given_to_runs_from_before_there_were_any(train, case):
    """nanoGPT's checkpoint, and a folder of ours whose manifest and log know none."""
    train(max_iters=8)
    out = train.folder / "out"
    for path in out.glob("*.pt"):
        torch.save({k: v for k, v in torch.load(path, weights_only=True).items() if k != "run"}, path)
    listed = [{"file": path.name, "iter_num": 8, "bytes": path.stat().st_size,
               "sha256": checkpoint.sha_of(path)} for path in sorted(out.glob("*.pt"), reverse=True)]
    log = "".join(json.dumps({k: v for k, v in row.items() if k != "run"}) + "\n" for row in train.metrics())
    (out / "metrics.jsonl").write_text(log)
    shutil.copytree(out, train.folder / "theirs")
    checkpoint.write_manifest(out, listed)
    (train.folder / "theirs" / "manifest.json").unlink()
    (train.folder / "theirs" / "ckpt-000004.pt").unlink()
    for name in ("out", "theirs"):
        train.resume(out=name, max_iters=12)
        rows = train.metrics(name)
        assert [row["iter"] for row in rows] == list(range(13))
        assert ["run" in row for row in rows] == [False] * 8 + [True] * 5
        assert rows[-1]["run"] == train.checkpoint(name)["run"]
        train.resume(out=name, max_iters=14)
        assert [row["iter"] for row in train.metrics(name)] == list(range(15))
        case()


def test_one_id_a_log_that_has_another_stays_beside(train, case):
    """A checkpoint copied by hand into another run's folder, its manifest deleted as it was told to."""
    train(max_iters=4, seed=1, out="a")
    train(max_iters=6, seed=2, out="b")
    shutil.copy(train.folder / "a" / "ckpt.pt", train.folder / "b" / "ckpt.pt")
    log = (train.folder / "b" / "metrics.jsonl").read_bytes()
    (train.folder / "b" / "manifest.json").unlink()
    result = train.resume(out="b", max_iters=8)
    assert (train.folder / "b" / "metrics-of-another-run-1.jsonl").read_bytes() == log
    assert "metrics-of-another-run-1.jsonl" in result.err
    assert [row["iter"] for row in train.metrics("b")] == [4, 5, 6, 7, 8]
    case()


@pytest.mark.parametrize("left", ["listed", "no manifest", "copied", "copied, the rest lost"])
def test_auto_knows_what_resume_knows(train, case, left):
    """A folder with nothing but an older checkpoint: auto goes on, and does not start at 0 and remove it."""
    train(max_iters=8)
    out = train.folder / "out"
    if left.startswith("copied"):
        (out / "ckpt.pt").rename(out / "ckpt-20.pt")
        (out / "ckpt-000004.pt").unlink()
    else:
        (out / "ckpt.pt").unlink()
    if left in ("no manifest", "copied, the rest lost"):
        (out / "manifest.json").unlink()
    name, at = ("ckpt-20.pt", 8) if left.startswith("copied") else ("ckpt-000004.pt", 4)
    old = (out / name).read_bytes()
    assert checkpoint.start_of("auto", out) == "resume"
    train(init_from="auto", max_iters=12)
    train(out="whole", max_iters=12)
    same(train.checkpoint(), train.checkpoint("whole"), skip=TIMES)
    assert [row["iter"] for row in train.metrics()] == list(range(13))
    assert left == "listed" or (out / name).read_bytes() == old         # a listed one makes room for the next
    assert train.losses() == train.losses("whole") and at < 12
    case()


# -------------------------------------------------- killed, or out of space ---------------------------------

def kill_saves(folder, kills, rng, case):
    """Kill a process that saves without pause, again and again, check what is left -> stray files seen."""
    script, path, strays, newest = folder / "saver.py", folder / "ckpt.pt", 0, 0
    script.write_text(SAVER)
    for kill in range(kills):
        job = Job(script, [path, newest], folder)
        while (kill % 3 or not newest) and not job.out.read_text().endswith("\n"):  # else hit the first
            time.sleep(0.001)
        time.sleep(rng.random() * 0.03)
        os.kill(job.pid, signal.SIGKILL)
        completed = int((job.wait().out.splitlines() or [newest])[-1])
        checkpoint.VERIFIED.clear()
        loaded, used = checkpoint.read(folder)
        assert used == path and loaded["iter_num"] >= completed >= newest
        assert (loaded["model"]["w"] == loaded["iter_num"]).all()
        strays += (folder / "ckpt.pt.tmp").exists()
        checkpoint.sweep(folder)
        assert [p.name for p in folder.glob("*.tmp")] == []
        newest = loaded["iter_num"]
        older = [entry["iter_num"] for entry in checkpoint.entries(folder) if entry["file"] != "ckpt.pt"]
        assert older == sorted(set(older), reverse=True)
        assert len(older) <= 4                   # two saves killed in a row have not yet removed one each
        case()
    return strays


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("kills", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_a_kill_during_a_save_leaves_a_complete_checkpoint_not_older_than_the_last(tmp_path, kills, case):
    assert kill_saves(tmp_path, kills, random.Random(0), case) > 0               # or no kill ever hit a save


def test_a_run_removes_what_a_killed_save_left_behind(train):
    (train.folder / "out").mkdir()
    (train.folder / "out" / "ckpt.pt.tmp").write_bytes(b"half a checkp")
    (train.folder / "out" / "notes.tmp").write_bytes(b"not ours")
    train(max_iters=1)
    assert sorted(p.name for p in (train.folder / "out").iterdir()) == ["ckpt.pt", "manifest.json",
                                                                        "metrics.jsonl", "notes.tmp"]


class Disk:
    """Stands between checkpoint.py and the disk: counts what it does there, fails at one of these steps."""

    def __init__(self, patched, fails_at=None, code=0):
        self.steps, self.fails_at, self.code = [], fails_at, code
        patched.setattr(checkpoint, "open", self.open, raising=False)
        for name in ("fsync", "replace", "link"):
            patched.setattr(checkpoint.os, name, self.watched(name, getattr(os, name)))

    def step(self, name):
        self.steps.append(name)
        if len(self.steps) - 1 == self.fails_at:
            raise OSError(self.code, os.strerror(self.code))

    def watched(self, name, does):
        return lambda *words, **more: (self.step(name), does(*words, **more))[1]

    def open(self, path, mode):
        self.step(f"open {mode}")
        file = builtins.open(path, mode)
        return WatchedFile(file, self) if "w" in mode else file


class WatchedFile:
    def __init__(self, file, disk):
        self.file, self.disk, self.fileno, self.flush = file, disk, file.fileno, file.flush

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, block):
        self.disk.step("write")
        return self.file.write(block)


STATES = [{"model": {"w": torch.full((3_000,), float(n))}, "model_args": {}, "iter_num": n} for n in range(4)]


def saved_twice(folder):
    """A folder with two saves in it -> its ckpt.pt."""
    for state in STATES[:2]:
        checkpoint.save(state, folder / "ckpt.pt", keep=2)
    return folder / "ckpt.pt"


def test_a_disk_that_fails_at_any_step_of_a_save_leaves_what_was_there(tmp_path, monkeypatch, case):
    """Either the save says that it failed and the old file's bytes are the same, or the new one is whole."""
    path = saved_twice(tmp_path)
    with monkeypatch.context() as patched:
        disk = Disk(patched)
        checkpoint.save(STATES[2], path, keep=2)
        names = disk.steps
    counts = {name: names.count(name) for name in ("open wb", "write", "fsync", "replace", "link")}
    assert all(counts.values()) and len(names) > 20, counts
    for at, code in itertools.product(range(len(names)), (errno.ENOSPC, errno.EIO, errno.EPERM)):
        folder = tmp_path / f"{at}-{code}"
        folder.mkdir()
        path = saved_twice(folder)
        old = path.read_bytes()
        with monkeypatch.context() as patched:
            Disk(patched, at, code)
            try:
                checkpoint.save(STATES[2], path, keep=2)
                expected = 2
            except ConfigError as error:
                assert all(part in str(error) for part in (str(path), "MiB free", os.strerror(code)))
                assert path.read_bytes() == old
                expected = 1
        checkpoint.VERIFIED.clear()
        loaded, used = checkpoint.read(folder)
        assert (loaded["iter_num"], used) == (expected, path)
        assert not list(folder.glob("*.tmp"))
        checkpoint.save(STATES[3], path, keep=2)
        assert checkpoint.read(folder)[0]["iter_num"] == 3
        case()


def test_a_folder_that_cannot_be_synced_is_no_reason_to_fail(tmp_path, monkeypatch):
    """Some network file systems refuse to fsync a folder; the file itself is already whole."""
    fsync, refused = os.fsync, []

    def refuse_folders(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            refused.append(handle)
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(checkpoint.os, "fsync", refuse_folders)
    checkpoint.save({"model": {}, "model_args": {}}, tmp_path / "ckpt.pt")
    assert checkpoint.load(tmp_path / "ckpt.pt")["model"] == {} and (refused or os.name == "nt")


@pytest.mark.skipif(os.name != "posix", reason="RLIMIT_FSIZE")
def test_a_run_whose_disk_fills_up_ends_with_one_sentence_and_keeps_its_checkpoint(train):
    train(max_iters=4)
    old = train.checkpoint()
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"  # bytes a file
    result = train.resume(before=limit, max_iters=12, status=2)
    assert result.err.strip().splitlines()[-1].startswith("train.py: ") and "Traceback" not in result.err
    assert "ckpt.pt could not be written" in result.err and "MiB free" in result.err
    same(train.checkpoint(), old)
    assert not list((train.folder / "out").glob("*.tmp"))


def test_a_metrics_file_that_cannot_be_written_is_one_sentence(train):
    (train.folder / "out" / "metrics.jsonl").mkdir(parents=True)
    one_sentence(train(status=2), "train.py", "metrics.jsonl cannot be written")


def test_the_file_is_flushed_to_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    order, replace = [], os.replace
    monkeypatch.setattr(checkpoint.os, "fsync", lambda handle: order.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(checkpoint.os, "replace", lambda *paths: (order.append(str(paths[1])),
                                                                  replace(*paths)))
    path = tmp_path / "ckpt.pt"
    checkpoint.save({"model": {}, "model_args": {}}, path)
    manifest = path.with_name("manifest.json")
    assert order.index(path.stat().st_ino) < order.index(str(manifest)) < order.index(str(path))


# -------------------------------------------------- streams and folders of every script --------------------

HERE = "import pathlib; from data import dataset; dataset.DATA = pathlib.Path('data'); "
TYPED = ("import os, sys; os.dup2(os.open('text.txt', os.O_RDONLY), 0); "
         "sys.stdin = open(0, encoding='utf-8', closefd=False); ")
CPU = dict(device="cpu", dtype="float32")
WORK = {                                         # name: (script, words; {out} is a finished run, code before)
    "train": ("train.py", words(**TINY | dict(max_iters=4), dataset="{data}", out_dir="new"), ""),
    "sample": ("sample.py", words(out_dir="{out}", **CPU, max_new_tokens=3, num_samples=2), ""),
    "chat": ("sample.py", ["--chat", *words(out_dir="{out}", **CPU, max_new_tokens=3)], TYPED),
    "export": ("training/export.py", words(out_dir="{out}", to="safetensors", export_dir="new"), ""),
    "compress": ("data/compress.py", ["c", "text.txt", *words(out_dir="{out}", output="new")], ""),
    "plots": ("bench.py", ["plot", "{out}", "--out=new"], ""),
    "text": ("data/prepare.py", ["--input=text.txt", "--name=new"], HERE),
    "shakespeare": ("data/shakespeare_char/prepare.py", ["--input=text.txt", "--out_dir=new"], ""),
}
ALL_WORK = [pytest.param(name, marks=pytest.mark.slow) if name == "plots" else name for name in WORK]
NEW_TMPDIR = "import tempfile; tempfile.tempdir = None\n"        # Python keeps what it once found
NO_HOME = {
    "no folder can be made at home": ("", {"HOME": "/dev/null/home", "XDG_CACHE_HOME": ""}),
    "there is no home": ("import os, pwd; os.environ.pop('HOME', None); os.environ['XDG_CACHE_HOME'] = ''\n"
                         "def nobody(number): raise KeyError(number)\npwd.getpwuid = nobody", {}),
    "the cache is a file": ("", {"XDG_CACHE_HOME": "text.txt"}),
}


def at_work(finished, tmp_path, work, before="", env=None, name="job"):
    """Start one of WORK in a new folder -> (Job, the folder)."""
    script, argv, patch = WORK[work]
    folder = tmp_path / name
    folder.mkdir()
    (folder / "data").mkdir()
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 2)
    argv = [word.format(out=finished.folder / "out", data=finished.data) for word in argv]
    return Job(script, argv, folder, env, patch + before, name), folder


@posix
@pytest.mark.parametrize("work", ALL_WORK)
def test_real_work_ends_as_it_should_whatever_its_streams_are(finished, tmp_path, work, case):
    """A stream that cannot be used ends a script by the rule, and otherwise its work is done."""
    jobs = {name: at_work(finished, tmp_path, work, before, name=str(number))
            for number, (name, (before, _, _)) in enumerate(STREAMS.items())}
    for name, (_, status, sentence) in STREAMS.items():
        job, folder = jobs[name]
        result = job.wait()
        assert result.status == status, f"{name}: status {result.status}\n{result.err}"
        assert "Traceback" not in result.err and "Exception ignored" not in result.err, name
        assert sentence in result.err
        assert status or work in ("sample", "chat") or list(folder.glob("**/new"))
        case()


def quick_compiler(folder):
    """A C compiler whose every product is the library that this process has built."""
    library = sparse_kernels.cpu_library()[0]
    if library is None:
        pytest.skip("no C kernels here")
    compiler = folder / "cc"
    compiler.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\ncp {library._name} "$2"\n')
    compiler.chmod(0o755)
    return compiler


@posix
@pytest.mark.parametrize("work", ALL_WORK)
def test_real_work_ends_as_it_should_without_a_home_or_a_cache(finished, tmp_path, work, case):
    env = {"CC": str(quick_compiler(tmp_path)), "TMPDIR": str(tmp_path)}
    jobs = {name: at_work(finished, tmp_path, work, NEW_TMPDIR + before, env | more, name=str(number))
            for number, (name, (before, more)) in enumerate(NO_HOME.items())}
    for name, (job, _) in jobs.items():
        result = job.wait()
        assert result.status == 0, f"{name}: status {result.status}\n{result.err}"
        assert "Traceback" not in result.err and "no C kernels" not in result.err + result.out, name
        assert WORK[work][0] != "sample.py" or "C kernels for decode steps, kept in" in result.err, name
        case()


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "foreign"])
def test_a_cache_folder_with_a_damaged_library_gets_a_new_one(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = str(quick_compiler(tmp_path))
    _, said = build.compiled(compiler)
    [path] = (tmp_path / "nanocortex").iterdir()
    whole = path.read_bytes()
    path.unlink()                                                 # this process may have mapped its pages
    path.write_bytes({"cut": whole[:4096], "flipped": whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
                      "emptied": b"", "foreign": b"#!/bin/sh\n"}[damage])
    assert not build.intact(path)
    library, again = build.compiled(compiler)
    assert library.picks and (said, again) == ("", "") and path.read_bytes() == whole
    assert [p.name for p in (tmp_path / "nanocortex").iterdir()] == [path.name]


PATH_TAKEN = """
import sparse_kernels
library, said = sparse_kernels.cpu_library()
print(library is None, said)
"""


@posix
def test_a_cache_folder_that_many_processes_fill_at_once_ends_with_one_library(tmp_path, case):
    (tmp_path / "taken.py").write_text(PATH_TAKEN)
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CC": str(quick_compiler(tmp_path))}
    jobs = [Job(tmp_path / "taken.py", [], tmp_path, env, name=f"job{i}") for i in range(8)]
    for job in jobs:
        assert job.wait().out == "False C kernels for decode steps\n"
        case()
    [path] = (tmp_path / "cache" / "nanocortex").iterdir()
    assert build.intact(path)


@posix
@pytest.mark.parametrize("theirs", ["open to all", "a link", "a file"])
def test_a_cache_folder_that_others_can_write_to_is_not_used(tmp_path, theirs):
    (tmp_path / "taken.py").write_text(PATH_TAKEN)
    folder = tmp_path / f"nanocortex-{os.getuid()}"
    (tmp_path / "other").mkdir(mode=0o700)
    if theirs == "a link":
        folder.symlink_to(tmp_path / "other")
    elif theirs == "a file":
        folder.write_bytes(b"")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    env = {"XDG_CACHE_HOME": "/dev/null/x", "CC": str(quick_compiler(tmp_path)), "TMPDIR": str(tmp_path)}
    said = Job(tmp_path / "taken.py", [], tmp_path, env, NEW_TMPDIR).wait().out
    assert said.startswith("True no C kernels: they could not be built or loaded (") and str(folder) in said
    assert not list((tmp_path / "other").iterdir())


# -------------------------------------------------- real pipes ---------------------------------------------

SHELL = {                                        # a line of bash behind PY=python SCRIPT -> status, stderr
    # 0 where all had been written before head went
    "$PY --help | head -1; exit $(( ${PIPESTATUS[0]} == 0 ? 141 : ${PIPESTATUS[0]} ))": (141, ""),
    "PYTHONUNBUFFERED=1 $PY --help | true; exit ${PIPESTATUS[0]}": (141, ""),
    "$PY --help > /dev/full": (1, "export.py: standard output cannot be written (No space left on device)\n"),
    "$PY --help <&- >&-": (0, ""),
    "$PY <&- >&- 2>&-": (2, ""),
    "$PY > /dev/full 2> /dev/full": (2, ""),
    "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 PYTHONIOENCODING= $PY --out_dir=뇌": (2, "export.py: "),
}


@pytest.mark.parametrize("command", ["training/export.py", "data/compress.py", "data/prepare.py",
                                     pytest.param("-m training.export", marks=pytest.mark.slow),
                                     pytest.param("-m data.compress", marks=pytest.mark.slow)])
def test_a_script_of_a_wing_finds_the_checkout_from_anywhere(tmp_path, command):
    """As a file from any folder, as a module from the checkout."""
    words_ = command.split() if command.startswith("-m") else [str(ROOT / command)]
    done = subprocess.run([sys.executable, *words_, "--help"], cwd=ROOT if "-m" in words_ else tmp_path,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}, capture_output=True,
                          text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0 and "--key=value" in done.stdout, done.stderr


@posix
@pytest.mark.parametrize("line", [line if i == 0 else pytest.param(line, marks=pytest.mark.slow)
                                  for i, line in enumerate(SHELL)])
def test_a_real_pipeline_ends_as_the_forks_do(tmp_path, line):
    status, err = SHELL[line]
    line = line.replace("$PY", f"{sys.executable} {ROOT / 'training' / 'export.py'}")
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith(err) and bool(done.stderr) == bool(err) and "Traceback" not in done.stderr


# -------------------------------------------------- advice that works --------------------------------------

WANDB = """
import sys, types
def init(**keys): {init}
sys.modules["wandb"] = types.SimpleNamespace(init=init, log=lambda *words, **keys: {log})
"""


@pytest.mark.parametrize("code, said", [
    (WANDB.format(init="raise RuntimeError('api_key not configured (no-tty)')", log="None"),
     "wandb does not start (RuntimeError: api_key not configured (no-tty)): type wandb login"),
    (WANDB.format(init="raise EOFError", log="None"), "wandb does not start (EOFError"),
    ("import sys, types; sys.modules['wandb'] = types.ModuleType('wandb')", "wandb does not start"),
    ("import sys; sys.modules['wandb'] = None", "needs wandb: pip install wandb")])
def test_every_script_that_logs_to_wandb_says_why_it_cannot(train, code, said):
    """Without a key, without an answer to its question, with a folder of that name in its place."""
    one_sentence(train(wandb_log=True, before=code, status=2), "train.py", said, "--wandb_log=False")


@pytest.fixture(scope="module")
def odd_types(finished, tmp_path_factory):
    """{what is wrong: out_dir} of checkpoints whose settings are of other types."""
    made, kept = {}, finished.checkpoint()
    odd = {"a str": {"batch_size": "many"}, "a float": {"seed": 1.5}, "None": {"out_dir": None},
           "a list": {"dataset": ["a"]}, "a number": {"dataset": 3}}
    for name, changes in odd.items():
        made[name] = tmp_path_factory.mktemp("odd") / "out"
        made[name].mkdir()
        torch.save(kept | {"config": kept["config"] | changes}, made[name] / "ckpt.pt")
    return made


@pytest.mark.parametrize("name, key, typed", [("a str", "batch_size", 2), ("a float", "seed", 7),
                                              ("a list", "dataset", None), ("a number", "dataset", None)])
def test_every_script_that_resumes_takes_what_is_typed_for_a_setting_of_another_type(
        train, odd_types, name, key, typed):
    shutil.copytree(odd_types[name], train.folder / "out")
    said = one_sentence(train.resume(status=2), "train.py", "ckpt.pt", f"{key}=", f"type --{key}=")
    assert said.count("type --") == 1
    train.resume(**{key: typed or train.data}, max_iters=17)
    assert train.checkpoint()["iter_num"] == 17


@pytest.mark.parametrize("name", ["a str", "a list", "a number", "None"])
def test_every_script_that_reads_a_model_ignores_settings_that_it_has_no_use_for(odd_types, tmp_path, name):
    for number, (script, keys) in enumerate({"sample.py": dict(num_samples=1, max_new_tokens=2, **CPU),
                                             "training/export.py": dict(to="safetensors")}.items()):
        argv = words(out_dir=odd_types[name], **keys)
        result = Job(script, argv, tmp_path, name=str(number)).wait()
        assert result.status == 0, result.err


NO_TOKENIZER = [({"dataset": ["a"]}, "dataset=['a']"), ({"dataset": 3}, "dataset=3"),
                ("text", "type --tokenizer="), ({"dataset": ""}, "type --tokenizer=")]


@pytest.mark.parametrize("config, said", NO_TOKENIZER, ids=str)
def test_every_script_that_samples_names_a_tokenizer_that_it_cannot_find(finished, tmp_path, config, said):
    kept = {key: value for key, value in finished.checkpoint().items() if key != "tokenizer"}
    torch.save(kept | {"config": config}, tmp_path / "ckpt.pt")
    argv = words(out_dir=tmp_path, num_samples=1, max_new_tokens=2, **CPU)
    one_sentence(Job("sample.py", argv, tmp_path).wait(), "sample.py", said)
    typed = Job("sample.py", [*argv, f"--tokenizer={finished.data}"], tmp_path, name="typed").wait()
    assert typed.status == 0


OFFLINE = """
import urllib.request
def urlopen(*words, **keys): raise OSError("no network")
urllib.request.urlopen = urlopen
"""


def test_every_script_that_downloads_says_which_one_takes_input(tmp_path):
    """train.py runs the data set's prepare.py, whose advice must be right for the reader of train.py too."""
    folder = tmp_path / "data" / "shakespeare_char"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "data" / "shakespeare_char" / "prepare.py", folder)
    said = one_sentence(Job(folder / "prepare.py", [], tmp_path, before=OFFLINE).wait(), "prepare.py")
    assert said.endswith(f"type python {folder / 'prepare.py'} --input=FILE")


@pytest.mark.parametrize("to", ["safetensors", "hf", "packed"])
def test_every_script_that_exports_to_a_full_disk_ends_with_a_sentence(finished, train, to):
    out = finished.folder / "out"
    if to == "packed":
        train(weights="2:4", n_embd=32, max_iters=1)
        out = train.folder / "out"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, 3_000))"
    job = Job("training/export.py", words(out_dir=out, to=to, export_dir="new"), train.folder, before=limit)
    said = one_sentence(job.wait(), "export.py", "could not be written", "another folder")
    assert "--out_dir" not in said and not list((train.folder / "new").iterdir())


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp949"])
@pytest.mark.parametrize("work", ["train", "export", "compress", "sample"])
def test_every_script_that_prints_a_name_can_whatever_the_encoding(finished, tmp_path, work, encoding):
    script, argv, _ = WORK[work]
    new, text = tmp_path / "뇌é", tmp_path / "뇌é.txt"
    text.write_text("text")
    argv = [word.format(out=finished.folder / "out", data=finished.data) for word in argv]
    argv = [f"{word.split('=')[0]}={new}" if word.endswith("=new") else word for word in argv]
    argv = [str(text) if word == "text.txt" else word for word in argv]
    before = f"import sys; sys.stdout = open(1, 'w', encoding={encoding!r}, closefd=False)"
    job = Job(script, argv, tmp_path, before=before)
    assert job.wait().status == 0, job.err.read_text()
    said = job.out.read_bytes().decode("utf-8" if work == "sample" else encoding)
    assert work == "sample" or "\\ub1cc" in said or "뇌" in said


INTERRUPTED = """
import os, signal, model
model.GPT.trunk = lambda self, *words: os.kill(os.getpid(), signal.SIGINT)
"""


@posix
def test_every_script_that_is_interrupted_ends_with_130_and_a_word(finished, tmp_path):
    argv = words(out_dir=finished.folder / "out", num_samples=1, **CPU)
    result = Job("sample.py", argv, tmp_path, before=INTERRUPTED).wait()
    assert result.status == 130 and result.err.endswith("sample.py: stopped\n")
    assert "Traceback" not in result.err
