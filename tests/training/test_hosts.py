"""Two hosts: network namespaces joined by a cable (veth), each with a name and an address of its own;
torchrun on each and gloo between them. They share the disk, as the hosts of a run must."""
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import LIMIT, ONE_THREAD, ROOT, TINY, one_sentence, words

WHY_NOT = ("network namespaces are Linux's" if sys.platform != "linux" else
           "network namespaces need root" if os.geteuid() else
           "no ip command (iproute2)" if not shutil.which("ip") else "")
HOSTS = "127.0.0.1 localhost\n10.77.0.1 host-1\n10.77.0.2 host-2\n"
BECOME = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


class TwoHosts:
    """Namespaces host-1 (10.77.0.1) and host-2 (10.77.0.2)."""

    def __init__(self, folder):
        self.folder, self.started = folder, []
        self.spaces = [f"nano{os.getpid()}-{number}" for number in (1, 2)]
        (folder / "hosts").write_text(HOSTS)

    def ip(self, *words):
        return subprocess.run(["ip", *map(str, words)], check=True, capture_output=True, text=True).stdout

    def __enter__(self):
        for space in self.spaces:
            self.ip("netns", "add", space)
        one, two = self.spaces
        self.ip("link", "add", "cable", "netns", one, "type", "veth", "peer", "name", "cable", "netns", two)
        for number, space in enumerate(self.spaces, 1):
            self.ip("-n", space, "addr", "add", f"10.77.0.{number}/24", "dev", "cable")
            for device in ("lo", "cable"):
                self.ip("-n", space, "link", "set", device, "up")
        return self

    def __exit__(self, *error):
        for number, space in enumerate(self.spaces, 1):
            self.kill(number)
            self.ip("netns", "del", space)
        for process in self.started:
            process.wait()

    def kill(self, number):
        """The host is gone: every process on it."""
        for pid in self.ip("netns", "pids", self.spaces[number - 1]).split():
            os.kill(int(pid), signal.SIGKILL)

    def torchrun(self, number, *argv, ranks=1, restarts=3, **env):
        """Type the line of docs/scaling.md on one host -> Popen; its output is in host-N.txt."""
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc_per_node={ranks}",
                   "--rdzv_backend=c10d", "--rdzv_endpoint=host-1:29500", "--rdzv_id=run1",
                   f"--max-restarts={restarts}", "--monitor-interval=0.1", str(ROOT / "train.py"),
                   *map(str, argv)]
        inside = ["ip", "netns", "exec", self.spaces[number - 1], "unshare", "--uts", "--mount", "sh", "-c",
                  BECOME, "sh", str(self.folder / "hosts"), f"host-{number}"]
        process = subprocess.Popen([*inside, *command], cwd=self.folder, stdin=subprocess.DEVNULL,
                                   env={**os.environ, **ONE_THREAD, STORE: "1", **env},
                                   stdout=open(self.folder / f"host-{number}.txt", "ab"),
                                   stderr=subprocess.STDOUT)
        self.started.append(process)
        return process

    def said(self, number):
        return (self.folder / f"host-{number}.txt").read_text(errors="replace")


@pytest.fixture
def hosts(tmp_path):
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    with TwoHosts(tmp_path) as both:
        yield both


def run(train, out, **keys):
    """Words of a run that any number of processes compute alike."""
    keys = TINY | dict(dropout=0.0, gradient_accumulation_steps=4, max_iters=120, lr_decay_iters=120,
                       eval_interval=10) | keys
    return words(**keys, dataset=train.data, out_dir=train.folder / out)


def one_curve(train, out, **keys):
    """The run in `out` is that of one process, step for step."""
    train(out="single", dropout=0.0, gradient_accumulation_steps=4, max_iters=120, lr_decay_iters=120,
          eval_interval=10, **keys)
    single, found = train.losses("single"), train.losses(out)
    assert list(found) == list(single) and len(found) == 120
    assert list(found.values()) == pytest.approx(list(single.values()), rel=1e-5)


def finish(hosts, *processes):
    for process in processes:
        try:
            assert process.wait(2 * LIMIT) == 0, hosts.said(1)[-2000:] + hosts.said(2)[-3000:]
        except subprocess.TimeoutExpired:
            pytest.fail("a host hangs:\n" + hosts.said(1)[-2000:] + hosts.said(2)[-3000:])


@pytest.mark.slow
@pytest.mark.parametrize("fsdp, ranks", [(False, 1), (False, 2), (True, 1)])
def test_two_hosts_train_the_curve_of_one_process(hosts, train, fsdp, ranks):
    argv = run(train, "two", fsdp=fsdp)
    finish(hosts, *[hosts.torchrun(number, *argv, ranks=ranks) for number in (1, 2)])
    one_curve(train, "two")


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_a_host_that_is_killed_and_comes_back_resumes(hosts, train, fsdp):
    argv, log = run(train, "killed", fsdp=fsdp), train.folder / "killed" / "metrics.jsonl"
    first, second = (hosts.torchrun(number, *argv) for number in (1, 2))
    until = time.monotonic() + LIMIT
    while not log.is_file() or len(log.read_text().splitlines()) < 45:
        assert time.monotonic() < until and first.poll() is None, hosts.said(1)[-3000:]
        time.sleep(0.02)
    hosts.kill(2)
    assert second.wait(LIMIT) != 0
    finish(hosts, first, hosts.torchrun(2, *argv))
    assert hosts.said(1).count("processes 2") == 2                        # it did start again
    one_curve(train, "killed")


@pytest.mark.slow
def test_hosts_that_do_not_share_the_folder_of_a_run_are_refused(hosts, train):
    train(out="run")
    here, there = ([f"--out_dir={train.folder / out}", "--init_from=auto", f"--dataset={train.data}",
                    *words(**TINY | dict(max_iters=20))] for out in ("run", "elsewhere"))
    both = [hosts.torchrun(number, *argv, restarts=0) for number, argv in ((1, here), (2, there))]
    assert all(process.wait(LIMIT) for process in both)
    sentences = [f"rank 0 starts at iteration {a}, rank 1 starts at iteration {b}: all hosts must see the "
                 "same out_dir" for a, b in ((16, 0), (0, 16))]
    assert any(sentence in hosts.said(1) for sentence in sentences), hosts.said(1)
    assert train.checkpoint("run")["iter_num"] == 16


def test_restarts_on_several_hosts_want_a_store_of_their_own(train):
    """torchrun's agents share one store, where a host that comes back waits for what will not be written."""
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1",
           "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3",
           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    one_sentence(train(env=env, status=2), "train.py", "--max-restarts", f"{STORE}=1 torchrun")
