"""What a model spends: a budget for the multiply-adds that its gates let through, and joules where a machine
measures them.
"""
from functools import partial
from pathlib import Path

from configurator import require
from layers import belong

POWERCAP = Path("/sys/class/powercap")

# ------------------------------------------------------------------------------------------------------------
# the budget


def target(config, share, cost, macs):
    """What draws a gate towards fewer open parts: a share of its own, or with energy_budget what the whole
    model executes -> a function (ctx, soft, hard) of its gates, as they learn and as they are.

    macs: multiply-adds of a token behind each gate. Where gates are shares of `each` gates, as many times
    that."""
    return partial(count, macs) if config.energy_budget else partial(own_target, share, cost)


def own_target(target, cost, ctx, soft, hard, each=1):
    ctx.add_loss(lambda: [ctx.total(soft)], lambda share: cost * off_target(share, target))


def count(macs, ctx, soft, hard, each=1):
    """Counts what is open and learns as if it were the soft gates."""
    def of_tokens():
        opened, possible = ctx.total(hard.detach() + soft - soft.detach())
        return macs * each * opened, macs * each * possible
    ctx.add_executed(of_tokens)


def off_target(share, target):
    """0 at the target, 1 where nothing is open, with a slope that stays finite on both sides."""
    return ((share - target) / (share + target)).square()


def budget(config):
    """What a model adds to its training loss for the multiply-adds that the gates of a call let through."""
    if not config.energy_budget:
        return nothing
    return partial(over_budget, config.energy_budget, config.energy_cost)


def nothing(ctx):
    return ()


def over_budget(target, cost, ctx):
    """One aim for all gates together: which layer spends how much is learnt (expected cost as a penalty:
    1712.01312). Twice the budget costs as much as half of it, and a small budget pulls harder than a large
    one: off_target's slope would vanish with the target."""
    if ctx.executed:
        opened, possible = map(sum, zip(*ctx.executed))
        yield cost * ((opened / possible + 1e-3) / target).log().square()


def check(c):
    """The flags `energy_budget` and `energy_cost` of a GPTConfig."""
    belong(c, "energy_budget", "energy_cost")
    require(0 <= c.energy_budget <= 1 and c.energy_cost >= 0,
            f"energy_budget={c.energy_budget} must be in (0, 1], a share of what the gates can close (0: "
            f"off), and energy_cost={c.energy_cost} not negative")
    require(not c.energy_budget or c.event_gate or c.dendrites,
            f"energy_budget={c.energy_budget} needs gates that learn to close: type --event_gate=True, or "
            "--dendrites=4 --dendrites_active=2")
    for key, default in (("event_rate", 0.1), ("event_cost", 0.1), ("dendrite_cost", 0.1)):
        require(not c.energy_budget or getattr(c, key) == default, f"energy_budget={c.energy_budget} and "
                f"{key}={getattr(c, key)} both aim the gates: choose one of them")


# ------------------------------------------------------------------------------------------------------------
# joules


class Meter:
    """Joules since it was made, of the counters that this machine lets us read: the GPU's (NVML) where the
    run is on one, the CPU packages' (RAPL) else. A counter is the whole machine's, not one process's."""

    def __init__(self, device, powercap=POWERCAP):
        self.read, self.source = gpu_joules(device) if device.type == "cuda" else cpu_joules(powercap)
        self.begin = self.read and self.read()

    def joules(self):
        """None where nothing measures."""
        return self.read and sum((now - before) % wrap for (now, wrap), (before, _)
                                 in zip(self.read(), self.begin))

    def __str__(self):
        return f"{self.joules():,.0f} J ({self.source})" if self.read else f"no joules ({self.source})"


def cpu_joules(powercap):
    """-> (a function that reads [(joules, where the counter starts anew)], what it reads), or (None, why)."""
    zones = [zone for zone in sorted(Path(powercap).glob("*-rapl:*")) if zone.name.count(":") == 1]
    read = lambda: [tuple(int((zone / name).read_text()) / 1e6
                          for name in ("energy_uj", "max_energy_range_uj")) for zone in zones]
    try:
        return (read, "RAPL, CPU packages") if read() else (None, "no RAPL counter here")
    except (OSError, ValueError) as error:
        return None, f"RAPL cannot be read ({type(error).__name__})"


def gpu_joules(device):
    try:
        import pynvml
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(device.index or 0)
        read = lambda: [(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, float("inf"))]
        return read, f"NVML, {read() and 'the whole GPU'}"
    except ImportError:
        return None, "NVML needs pip install nvidia-ml-py"
    except pynvml.NVMLError as error:
        return None, f"NVML: {error}"
