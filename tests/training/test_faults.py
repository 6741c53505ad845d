"""Faults: signals, kills, full disks, losses that are not a number: a good checkpoint stays."""
import builtins
import errno
import itertools
import os
import random
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch
from conftest import LIMIT, ONE_THREAD, ROOT, TINY, Job, in_parallel, one_sentence, run_real, same, words

from configurator import ConfigError
from model import GPT, GPTConfig
from training import checkpoint, estimate

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
