"""Generation beside busy loops: a machine with other work must cost ours its share and no more."""
import contextlib
import os
import signal
import subprocess
import sys
from functools import partial

import torch

from benchmarks.record import OURS
from benchmarks.timing import interleave, measurement

# it ends with the process that began it
LOOP = "import os\nwhile os.getppid() == {}: sum(range(100_000))"


class BusyLoops(contextlib.AbstractContextManager):
    """So many processes that take as much of a processor as they get, while they are not paused."""

    def __init__(self, count):
        command = [sys.executable, "-c", LOOP.format(os.getpid())]
        self.processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(count)]

    def go(self, on):
        for process in self.processes:
            process.send_signal(signal.SIGCONT if on else signal.SIGSTOP)

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()


def beside_load(run, tokens, loops, repeats):
    """Tokens/s of a function that generates so many, alone and beside busy loops, in turns -> what the record
    keeps. share: of what it has alone, what a fair machine leaves to its threads."""
    beside, name = partial(run), f"{OURS}, {loops} busy loops beside it"
    with BusyLoops(loops) as busy:
        seconds = interleave({OURS: run, name: beside}, repeats, before=lambda side: busy.go(side is beside))
    result = measurement("tokens/s", {side: [tokens / s for s in values] for side, values in seconds.items()},
                         higher_is_better=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    alone, left = (result["sides"][side]["median"] for side in (OURS, name))
    threads = torch.get_num_threads()
    result |= {"kept": left / alone, "share": min(1.0, cores / (threads + loops)), "cores": cores}
    print(f"{name}: {left:.1f} tokens/s of {alone:.1f} alone, {left / alone:.0%}; the share of its {threads} "
          f"threads in {cores} processors is {result['share']:.0%}")
    return result
