"""The one timer: sides called in turns after a warm-up, and the summary of what they took."""
import statistics
import sys
import time
from functools import partial

import torch

from benchmarks import CLONE
from benchmarks.record import PEER


def interleave(sides, repeats, warm_up=True, device=None, cold=0, before=None):
    """Call the sides in turns, A B A B -> {name: seconds of each call}.

    sides: {name: function without arguments}. Turns spread a machine's moods over all sides alike. warm_up:
    call each side once beforehand, untimed. device: the torch.device that they compute on, waited for on both
    ends of a call; a CUDA device tells the time by its own events; None: the CPU, or other processes. cold:
    MiB read and written before every call, untimed, so that caches hold nothing of the call before. before:
    called with the side's function, untimed, ahead of that.
    """
    clock, sweep = by_events if device and device.type == "cuda" else by_clock, sweeper(device, cold)
    seconds = {name: [] for name in sides}
    for number in range(-warm_up, repeats):
        for name, run in sides.items():
            if before:
                before(run)
            sweep()
            took = clock(run, device)
            if number >= 0:
                seconds[name].append(took)
        print(f"round {number + 1} of {repeats}" if number >= 0 else "warmed up", file=sys.stderr, flush=True)
    return seconds


def milliseconds(seconds):
    """{side: seconds of each call} in ms."""
    return {name: [1e3 * s for s in values] for name, values in seconds.items()}


def by_clock(run, device):
    """Seconds of a call on the wall's clock."""
    synchronise(device)
    clock = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - clock


def by_events(run, device):
    """Seconds between two events of a CUDA device, one before the call's work and one behind it."""
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def synchronise(device):
    """Wait for what the device still computes."""
    if device and device.type != "cpu":
        torch.accelerator.synchronize()


def sweeper(device, cold):
    """-> a function that reads and writes `cold` MiB of the device's memory, so that no cache keeps more."""
    swept = torch.zeros(cold * 2**20, dtype=torch.uint8, device=device)
    return partial(swept.add_, 1)


def spread(values):
    """What a record keeps of a side's values."""
    cuts = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values),
            "quartiles": [cuts[0], cuts[2]], "repeats": len(values)}


def measurement(unit, sides, higher_is_better=False):
    """{side: values} -> what the record keeps: unit, spread of each side, ratio of medians to nanoGPT's.

    A ratio above 1 means that ours is better. Where nanoGPT was not measured there is no ratio: {}.
    """
    spreads = {name: spread(values) for name, values in sides.items() if values}
    ratio = times_better(spreads, PEER, higher_is_better) if PEER in spreads else {}
    ratio.pop(PEER, None)
    return {"unit": unit, "sides": spreads, "ratio": ratio}


def times_better(spreads, base, higher_is_better=False):
    """{side: ratio of its median to that of the side `base`}, above 1 where the side is better."""
    median = {name: s["median"] for name, s in spreads.items()}
    return {name: median[name] / median[base] if higher_is_better else median[base] / median[name]
            for name in spreads}


def show(title, result):
    """Print one measurement for people."""
    print(f"{title}, {result['unit']}: median (quartiles; min to max)")
    wide = max(14, *(1 + len(name) for name in result["sides"]))
    for name, s in result["sides"].items():
        ratio = f"  ratio {result['ratio'][name]:.2f}x" if name in result["ratio"] else ""
        low, high = s["quartiles"]
        print(f"  {name:{wide}}{s['median']:10.2f}  ({low:.2f}, {high:.2f}; {s['min']:.2f} to "
              f"{s['max']:.2f}, n={s['repeats']}){ratio}")
    for base, ratios in result.get("against", {}).items():
        print("  " + ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items() if name != base)
              + f" against {base}")
    if not result["ratio"]:
        print(f"  no ratio: {PEER} was not measured; {CLONE}")
