"""Which of several forms of a computation is fastest on this card: timed at first use and kept in the user's
cache folder, by the card's name and the versions of torch and Triton."""
import importlib.metadata
import json
import time

import torch

from kernels.build import users_cache

WARM, TIMED = 4, 20                              # calls before the timed ones: a graph is recorded in them


def card_of(device):
    """The card and what compiles for it."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, torch {torch.__version__}, triton {triton}"


def seconds_of(run, device, clock):
    """The least of TIMED calls, each waited for."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    took = []
    for _ in range(WARM + TIMED):
        wait()
        began = clock()
        run()
        wait()
        took.append(clock() - began)
    return min(took[WARM:])


def fastest(what, forms, device, clock=time.perf_counter):
    """forms: {name: run()}, all with the same result, the first wins a tie -> (the name of the fastest,
    {name: seconds of a call}). what: names the computation, such as a model's shape. A file of times that
    cannot be read is written anew; where none can be written, nothing is kept."""
    times, path = {}, None
    try:
        path = users_cache() / "times.json"
        times = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        pass
    times = times if isinstance(times, dict) else {}
    known = times.setdefault(card_of(device), {})
    took = known.get(what)
    if not isinstance(took, dict) or took.keys() != forms.keys():
        known[what] = took = {name: seconds_of(run, device, clock) for name, run in forms.items()}
        try:
            path.write_text(json.dumps(times, indent=1), encoding="utf-8")
        except (OSError, AttributeError):
            pass
    return min(forms, key=took.get), took
