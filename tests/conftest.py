"""Runs of the scripts for the tests: cheap ones fork from a process that has torch, real ones are new."""
import atexit
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings
from score import (  # noqa: F401
    case,
    pytest_addoption,
    pytest_runtest_call,
    pytest_runtest_logreport,
    pytest_terminal_summary,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# The same examples in every run; --hypothesis-profile=default draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

if "PYTEST_XDIST_WORKER" in os.environ:          # one of several workers: each has one core
    torch.set_num_threads(1)

# nohup and a script's `&` leave these ignored, and all that the tests start would ignore them too: a handler
# is not handed on through exec. A suite under nohup still outlives its terminal.
for name, handler in ("SIGHUP", lambda *_: None), ("SIGINT", signal.default_int_handler):
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, name), handler)

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "dropout": 0.1, "device": "cpu", "dtype": "float32", "eval_iters": 2, "eval_interval": 4,
        "max_iters": 16,
        "learning_rate": 1e-2, "min_lr": 1e-3, "warmup_iters": 3, "lr_decay_iters": 16}
TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 40
LIMIT = 100                                                     # seconds until a run counts as hanging
ONE_THREAD = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
RUNNER = ("import runpy, sys; sys.argv = sys.argv[2:]; exec(sys.argv.pop()); "
          "runpy.run_path(sys.argv[0], run_name='__main__')")


def words(**keys):
    """Keys as command-line words."""
    return [f"--{key}={value}" for key, value in keys.items()]


# -------------------------------------------------- forks ---------------------------------------------------

def serve(pipe):
    """The nursery's loop: ("start", job) -> pid, ("wait", pid) -> exit status, negative for a signal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    request = pipe.recv()  # imports wait for the first job: not every session has one
    torch.set_num_threads(1)
    for name in ("torch._dynamo", "torch.nn.parallel", "training.checkpoint", "data.dataset",
                 "training.runtime", "decode.sampling"):
        importlib.import_module(name)  # torch._dynamo: the first optimizer would import it
    while True:
        kind, argument = request
        if kind == "wait":
            pipe.send(os.waitstatus_to_exitcode(os.waitpid(argument, 0)[1]))
        else:
            pid = os.fork()
            if pid == 0:
                pipe.close()
                run_here(**argument)
            pipe.send(pid)
        request = pipe.recv()


def run_here(script, argv, cwd, env, before, out, err):
    """Become `python script argv...`: its streams, folder, environment, exception hook and exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.alarm(LIMIT)
    torch.set_num_threads(1)     # the first call makes a pool anew behind a fork; two threads at once lose it
    for number, path in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    os.chdir(cwd)
    os.environ.update(env)
    atexit._clear()                                             # what the nursery's imports have registered
    sys.argv, sys.excepthook, status = [str(script), *argv], sys.__excepthook__, 0
    try:
        try:
            exec(before, {})
            runpy.run_path(str(script), run_name="__main__")
        except Exception as error:
            status = 1
            sys.excepthook(type(error), error, error.__traceback__)
        except KeyboardInterrupt as error:
            status = -signal.SIGINT
            sys.excepthook(type(error), error, error.__traceback__)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        atexit._run_exitfuncs()
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()
            except OSError:
                status = 120                                       # as Python's own end
        os._exit(status)


class Nursery:
    """A process forked before any test has run, in which torch is imported; every job is a fork of it."""

    def __init__(self):
        self.pipe, theirs = multiprocessing.Pipe()
        if os.fork() == 0:
            self.pipe.close()
            try:
                serve(theirs)
            except EOFError:
                os._exit(0)
            except BaseException:
                traceback.print_exc(file=sys.__stderr__)
                os._exit(1)
        theirs.close()

    def ask(self, *request):
        self.pipe.send(request)
        assert self.pipe.poll(LIMIT + 20), f"no answer to {request}"
        return self.pipe.recv()


nursery = Nursery() if hasattr(os, "fork") else None
import interpreted  # noqa: E402, F401  (behind the fork: scripts import Triton as it is)


class Job:
    """A script that runs: .pid, .wait() -> SimpleNamespace(status, out, err, folder)."""

    def __init__(self, script, argv, cwd, env=None, before="", name="job"):
        self.out, self.err = Path(cwd) / f"{name}.stdout", Path(cwd) / f"{name}.stderr"
        script, argv, env = Path(ROOT, script), [str(word) for word in argv], env or {}
        self.child, self.folder = None, Path(cwd)
        for path in (self.out, self.err):                       # it may be killed before it has made them
            path.write_bytes(b"")
        if nursery:
            self.pid = nursery.ask("start", dict(script=script, argv=argv, cwd=cwd, env=env, before=before,
                                                 out=self.out, err=self.err))
        else:
            self.child = subprocess.Popen([sys.executable, "-c", RUNNER, "-", str(script), *argv, before],
                                          cwd=cwd,
                                          env={**os.environ, **ONE_THREAD, **env}, stdin=subprocess.DEVNULL,
                                          stdout=open(self.out, "wb"), stderr=open(self.err, "wb"))
            self.pid = self.child.pid

    def wait(self):
        status = self.child.wait(LIMIT) if self.child else nursery.ask("wait", self.pid)
        return SimpleNamespace(status=status, folder=self.folder,
                               out=self.out.read_text(encoding="utf-8", errors="replace"),
                               err=self.err.read_text(encoding="utf-8", errors="replace"))


def run_real(script, argv, cwd, **env):
    """Start a script in a new process of its own -> Popen with text pipes."""
    return subprocess.Popen([sys.executable, str(Path(ROOT, script)), *map(str, argv)], cwd=cwd, text=True,
                            encoding="utf-8",
                            env={**os.environ, **ONE_THREAD, **env}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


# -------------------------------------------------- what tests ask for --------------------------------------

@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with train.bin and val.bin of bytes."""
    from data import dataset
    from data.tokenizer import ByteTokenizer
    folder, ids = tmp_path_factory.mktemp("data"), list(TEXT.encode())
    dataset.write_dataset(folder, {"train": [ids[300:]], "val": [ids[:300]]}, ByteTokenizer(), "conftest.py")
    return folder


class Trainer:
    """train.py with tiny settings on the test data, in one temporary folder."""

    def __init__(self, folder, data):
        self.folder, self.data, self.count = folder, data, 0

    def start(self, *argv, out="out", before="", env=None, **keys):
        """Words first, then TINY changed by keys -> Job."""
        self.count += 1
        keys = {**TINY, "dataset": self.data, "out_dir": self.folder / out, **keys}
        return Job("train.py", [*words(**keys), *argv], self.folder, env, before, f"job{self.count}")

    def __call__(self, *argv, status=0, **keys):
        """Run to the end; the exit status must be `status`."""
        result = self.start(*argv, **keys).wait()
        assert result.status == status, f"exit status {result.status}, expected {status}\n{result.err}"
        return result

    def resume(self, *argv, out="out", status=0, before="", env=None, **keys):
        """Go on with nothing but the keys that are never taken from a checkpoint."""
        self.count += 1
        keys = {"init_from": "resume", "out_dir": self.folder / out, "device": "cpu", "dtype": "float32",
                **keys}
        result = Job("train.py", [*words(**keys), *argv], self.folder, env, before, f"job{self.count}").wait()
        assert result.status == status, f"exit status {result.status}, expected {status}\n{result.err}"
        return result

    def checkpoint(self, out="out", name="ckpt.pt"):
        return torch.load(self.folder / out / name, weights_only=True)

    def metrics(self, out="out"):
        """Rows of metrics.jsonl."""
        text = (self.folder / out / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def losses(self, out="out"):
        """{iteration: training loss}, exactly as logged."""
        return {row["iter"]: row["loss"] for row in self.metrics(out) if "loss" in row}


def in_parallel(trainer, ranks, resume=False, **keys):
    """Ranks of one run as forks that join over gloo, with torchrun's one thread each: sums over other numbers
    of threads end in other last bits, and without it a rank takes its share of the cores -> their results."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if resume:
        keys = dict(init_from="resume", **keys)
    jobs = [trainer.start(**keys, env={"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(ranks),
                                       "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1",
                                       "MASTER_ADDR": "127.0.0.1",
                                       "MASTER_PORT": str(port)}) for r in range(ranks)]
    results = [job.wait() for job in jobs]
    assert [result.status for result in results] == [0] * ranks, results[0].err + results[-1].err
    return results


@pytest.fixture
def train(tmp_path, data):
    return Trainer(tmp_path, data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """A finished 16-step run, shared by a module's tests: they copy what they want to change."""
    trainer = Trainer(tmp_path_factory.mktemp("finished"), data)
    trainer()
    return trainer


@pytest.fixture
def no_network(monkeypatch):
    """Any socket of this process is an error, and so is looking up a name."""
    def refuse(*args, **kwargs):
        raise OSError("network is unreachable")
    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)


def same(a, b, where="", skip=()):
    """Assert that two nested structures are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), f"{where} differs by {(a - b).abs().max():.3g}"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), f"{where}: keys {a.keys() ^ b.keys()}"
        for key in a.keys() - set(skip):
            same(a[key], b[key], f"{where}/{key}", skip)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (one, other) in enumerate(zip(a, b)):
            same(one, other, f"{where}/{i}", skip)
    else:
        assert a == b, f"{where}: {a!r} and {b!r}"


def train_config():
    """train.py's TrainConfig, whose script cannot be imported, from its source."""
    from dataclasses import dataclass

    from model import GPTConfig
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    lines = source[source.index("class TrainConfig"):source.index("    def __post_init__")].splitlines()
    scope = {"GPTConfig": GPTConfig, "dataclass": dataclass}
    exec("\n".join(["@dataclass(frozen=True)", *lines]), scope)
    return scope["TrainConfig"]


def record_of(result, status=0):
    """The record of a run of bench.py: its last line says where it is."""
    assert result.status == status, result.err
    last = result.out.splitlines()[-1]
    assert last.startswith("record: "), last
    return json.loads((result.folder / last.removeprefix("record: ")).read_text(encoding="utf-8"))


def one_sentence(result, script, *parts):
    """Assert that a run ended as a mistake of the user's: status 2 and one line on stderr, with all `parts`
    -> that line.

    sample.py first says on stderr where it computes; that line does not count.
    """
    assert result.status == 2, f"exit status {result.status}\n{result.err}"
    lines = [line for line in result.err.strip().splitlines() if not line.startswith(("device ", "note: "))]
    assert len(lines) == 1 and lines[0].startswith(f"{script}: "), result.err
    assert "Traceback" not in result.out
    for part in parts:
        assert part in lines[0], f"{part!r} is missing in: {lines[0]}"
    return lines[0]
