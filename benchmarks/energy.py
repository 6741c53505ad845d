"""Joules, where the machine counts them: NVML for an NVIDIA GPU, RAPL for a CPU."""
import contextlib
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


def meter(device, powercap=POWERCAP):
    """-> (a function that tells joules spent so far, the counter's name), or (None, why there is none)."""
    return nvml(device) if device.type == "cuda" else rapl(powercap)


def rapl(powercap):
    """The CPU packages' counters, in microjoules from a start of their own; they wrap around."""
    files = [path for path in sorted(powercap.glob("intel-rapl:*/energy_uj"))
             if path.parent.name.count(":") == 1]                          # a package, not a part of one
    try:
        [path.read_text() for path in files]
    except OSError as error:
        return None, f"RAPL cannot be read ({error.strerror})"
    if not files:
        return None, "no RAPL counter on this machine"
    return lambda: sum(int(path.read_text()) for path in files) / 1e6, "RAPL, CPU packages"


def nvml(device):
    """The card's own counter, in millijoules since the driver was loaded."""
    try:
        import pynvml
    except ImportError:
        return None, "no pynvml (pip install nvidia-ml-py)"
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        card = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(card)
        return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1e3, "NVML"
    return None, "the card has no energy counter"


def joules_of(read, run):
    """Joules that a call spends, the whole package's or card's; None where the counter wrapped around."""
    before = read()
    run()
    spent = read() - before
    return spent if spent >= 0 else None
