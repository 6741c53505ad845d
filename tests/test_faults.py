"""Faults: signals, kills, full disks, losses that are not a number: a good checkpoint stays."""
import errno
import io
import os
import random
import signal
import time

import pytest
import torch
from conftest import LIMIT, TINY, Job, one_sentence, run_real, same, words

import checkpoint
from configurator import ConfigError

posix = pytest.mark.skipif(os.name != "posix", reason="signals and forks of POSIX")
TIMES = ("seconds", "config")  # what two equal runs may differ in
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
import sys, torch, checkpoint
path, n = sys.argv[1], int(sys.argv[2])
while True:
    n += 1
    checkpoint.save({"model": {"w": torch.full((500_000,), float(n))}, "model_args": {}, "iter_num": n}, path)
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
def test_a_second_signal_ends_a_run_at_once(train, number, status):
    job = train.start(gradient_accumulation_steps=100_000_000, eval_interval=1)  # no step ever ends
    deadline = time.time() + LIMIT
    while "step 0:" not in job.out.read_text() and time.time() < deadline:
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
    assert train.checkpoint()["iter_num"] >= 8 and not (train.folder / "out" / "ckpt_last.pt").exists()
    train(**keys, out="whole")
    assert train.losses() == train.losses("whole")


def test_eval_only_evaluates_and_writes_nothing(train):
    result = train(eval_only=True)
    assert "step 0: train loss" in result.out
    assert not (train.folder / "out").exists()
    train(max_iters=4)
    (train.folder / "out" / "ckpt.pt.tmp").write_bytes(b"of a run beside this one")
    before = {path.name: path.read_bytes() for path in (train.folder / "out").iterdir()}
    assert "step 4: train loss" in train.resume(eval_only=True).out
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


# -------------------------------------------------- killed, or out of space ---------------------------------

def kill_saves(folder, kills, rng):
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
        loaded = checkpoint.load(path)
        assert loaded["iter_num"] >= completed >= newest
        assert (loaded["model"]["w"] == loaded["iter_num"]).all()
        strays += (folder / "ckpt.pt.tmp").exists()
        checkpoint.sweep(folder)
        assert [p.name for p in folder.glob("*.tmp")] == []
        newest = loaded["iter_num"]
    return strays


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("kills", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_a_kill_during_a_save_leaves_a_complete_checkpoint_not_older_than_the_last(tmp_path, kills):
    assert kill_saves(tmp_path, kills, random.Random(0)) > 0                     # or no kill ever hit a save


def test_a_run_removes_what_a_killed_save_left_behind(train):
    (train.folder / "out").mkdir()
    (train.folder / "out" / "ckpt.pt.tmp").write_bytes(b"half a checkp")
    (train.folder / "out" / "notes.tmp").write_bytes(b"not ours")
    train(max_iters=1)
    assert sorted(p.name for p in (train.folder / "out").iterdir()) == ["ckpt.pt", "metrics.jsonl",
                                                                        "notes.tmp"]


class FailingFile(io.FileIO):
    """A file that fails after some bytes, as on a full disk."""

    def __init__(self, path, mode, room, code):
        super().__init__(path, mode)
        self.room, self.code = room, code

    def write(self, block):
        self.room -= len(block)
        if self.room < 0:
            raise OSError(self.code, os.strerror(self.code))
        return super().write(block)


def fail_at(monkeypatch, place, code):
    """Make one step of checkpoint.save fail with this errno."""
    def fail(*words, **more):
        raise OSError(code, os.strerror(code))

    if place == "open":
        monkeypatch.setattr(checkpoint, "open", fail, raising=False)
    elif place.startswith("write"):
        room = int(place.removeprefix("write after "))
        monkeypatch.setattr(checkpoint, "open", lambda path, mode: FailingFile(path, mode, room, code),
                            raising=False)
    else:
        monkeypatch.setattr(checkpoint.os, place, fail)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EPERM], ids=errno.errorcode.get)
@pytest.mark.parametrize("place", ["open", "write after 0", "write after 3000", "write after 70000",
                                   "write after 200000", "fsync", "replace"])
def test_a_failing_disk_leaves_the_old_checkpoint_and_says_where_and_how_much_room(tmp_path, monkeypatch,
                                                                                   place, code):
    path, state = tmp_path / "ckpt.pt", {"model": {"w": torch.ones(50_000)}, "model_args": {}}
    checkpoint.save(state, path)
    old = path.read_bytes()
    with monkeypatch.context() as patched:
        fail_at(patched, place, code)
        with pytest.raises(ConfigError) as error:
            checkpoint.save({**state, "iter_num": 2}, path)
    assert str(path) in str(error.value) and "MiB free" in str(error.value)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]
    checkpoint.save({**state, "iter_num": 2}, path)
    assert checkpoint.load(path)["iter_num"] == 2


def test_a_folder_that_cannot_be_synced_is_no_reason_to_fail(tmp_path, monkeypatch):
    """Some network file systems refuse to fsync a folder; the file itself is already whole."""
    fsync, calls = os.fsync, []

    def refuse_folders(handle):
        calls.append(handle)
        if len(calls) > 1:
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(checkpoint.os, "fsync", refuse_folders)
    checkpoint.save({"model": {}, "model_args": {}}, tmp_path / "ckpt.pt")
    assert checkpoint.load(tmp_path / "ckpt.pt")["model"] == {}


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
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(checkpoint.os, "fsync", lambda handle: (order.append("fsync"), fsync(handle)))
    monkeypatch.setattr(checkpoint.os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    checkpoint.save({"model": {}, "model_args": {}}, tmp_path / "ckpt.pt")
    assert order[:2] == ["fsync", "replace"]
