"""Processes that a benchmark starts and waits for."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import children

WAITS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from benchmarks import children
children.end_together()
code = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(100)"
with ThreadPoolExecutor(2) as pool:
    list(pool.map(lambda name: children.run_child([sys.executable, "-c", code, name]), ("one", "two")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
def test_a_benchmark_that_is_terminated_ends_what_it_has_started(tmp_path):
    """In threads of a pool too. They would train on, and take the cores of whatever is timed next."""
    bench = subprocess.Popen([sys.executable, "-c", WAITS], cwd=tmp_path,
                             env={**os.environ, "PYTHONPATH": str(ROOT)})
    files = [tmp_path / "one", tmp_path / "two"]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    bench.terminate()
    assert bench.wait(30) == -signal.SIGTERM
    wait_for(lambda: not any(lives(int(file.read_text())) for file in files))


def wait_for(happens):
    for _ in range(1000):
        if happens():
            return
        time.sleep(0.03)
    raise AssertionError("it never happened")


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def test_a_child_gives_what_subprocess_gives_and_is_forgotten():
    done = children.run_child([sys.executable, "-c", "import sys; print(1); sys.exit('no')"])
    assert (done.returncode, done.stdout, done.stderr) == (1, "1\n", "no\n") and not children.RUNNING
