"""Two runs and one folder: locks, runs put aside, the id that says whose a file is."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import LIMIT, Job, in_parallel, one_sentence, same, words
from test_faults import STATES

from configurator import ConfigError
from training import checkpoint, rundir

posix = pytest.mark.skipif(os.name != "posix", reason="signals and forks of POSIX")
TIMES = ("seconds", "config", "run")  # what two equal runs may differ in


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
