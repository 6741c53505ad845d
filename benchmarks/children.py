"""Processes that a benchmark waits for, which do not outlive it."""
import os
import signal
import subprocess

RUNNING = set()                                  # Popen objects of those that have not ended


def run_child(command, **options):
    """As subprocess.run(command, capture_output=True, text=True, ...), and ended with this process where
    end_together was called."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          encoding="utf-8", errors="replace", **options) as child:
        RUNNING.add(child)
        try:
            out, err = child.communicate()
        except BaseException:
            child.kill()
            raise
        finally:
            RUNNING.discard(child)
    return subprocess.CompletedProcess(command, child.returncode, out, err)


def end_together():
    """From here on a SIGTERM ends the children too, which else would train on unseen; they save first. Ctrl-C
    and a closed terminal reach them anyway. Call it in the main thread."""
    def pass_on(number, frame):
        for child in list(RUNNING):
            child.send_signal(number)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, pass_on)
