"""The JSON record: where a measurement ran, by which command, what it found. Reading one needs no torch."""
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
from dataclasses import asdict
from pathlib import Path

from benchmarks import ROOT
from configurator import ConfigError, require

SCHEMA = 2                                      # of new records; 1 had no quartiles, versions, seeds
QUIET = 0.5                                     # load average above which other work disturbs the timings
CARD_QUIET = 10                                 # and per cent of a card's time
PACKAGES = ("numpy", "triton", "transformers", "llama-cpp-python", "gguf",      # hardware() tells torch and
            "ctranslate2")                                                     # Python
# sides by the names that records give them
PEER, OURS, OURS_FP32, TWIN = "nanoGPT", "ours", "ours float32", "dense"
TAUGHT = ", taught"                              # of a retrofit that learns from the dense model as well
HF, LLAMA, CT2 = "Hugging Face", "llama.cpp", "ctranslate2"
DENSE, DENSE_FP32 = "F.linear, bfloat16", "F.linear, float32"
CAUSAL = "causal SDPA"


FOLDER = Path("out-bench")                      # of records that nobody has named a file for; git ignores it


def measure(function, cfg, words):
    """Run a subcommand: function(cfg) -> the record's own fields. The record is written to the file cfg.out,
    else into FOLDER; the last line of stdout says where. words: the command line behind bench.py."""
    import torch  # here, so that reading records needs none
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    where = header(cfg)
    result = function(cfg)
    where["load_average"]["after"] = load_average()
    command = shlex.join(["python", "bench.py", *map(without_folders, words)])
    keys = {key: without_folders(value) if isinstance(value, str) else
            [*map(without_folders, value)] if isinstance(value, tuple) else value
            for key, value in asdict(cfg).items()}
    record = json.dumps({"schema": SCHEMA, "subcommand": words[0], "command": command, "config": keys,
                         **where, **result}, allow_nan=False)
    keep(cfg.out or FOLDER / f"{words[0]}.json", record + "\n")
    if result.get("stopped"):                    # the record says so; the script ends as others do on Ctrl-C
        raise KeyboardInterrupt


def keep(path, text):
    """Write a record and say where it is; where it cannot be written it goes to stdout, so it is not lost."""
    try:
        if Path(path).parent == FOLDER:
            FOLDER.mkdir(exist_ok=True)
        write_atomically(path, text)
    except (ConfigError, OSError) as error:
        print(text, end="", flush=True)
        raise ConfigError(f"out='{path}' could not be written ({getattr(error, 'strerror', None) or error}): "
                          "the record is the last line of stdout, save it from there") from error
    print(f"record: {path}", flush=True)


def read(path):
    """A record of this schema or an older one."""
    record = json.loads(Path(path).read_text(encoding="utf-8"))
    schema = record.get("schema", 1)
    require(schema <= SCHEMA, f"{path} has schema {schema}, read are up to {SCHEMA}: take a newer bench.py")
    return record


def without_folders(word):
    """A word of the command line with absolute paths cut to their last part: a record names no machine."""
    return re.sub(r"(^|=)/(?:[^/]*/)*([^/]+)/?$", r"\1\2", word)


def header(cfg):
    """Print where this runs -> the fields of the record that say so."""
    card, load = card_of(cfg), load_average()
    used = card_load(card)                      # before this process itself uses it
    where = {"hardware": hardware(), "versions": versions(), "commit": {OURS: commit_of(ROOT)},
             "load_average": {"before": load}} | ({"card_load": {"before": used}} if card else {})
    if cfg.nanogpt:
        where["commit"][PEER] = commit_of(cfg.nanogpt)
    h, warning = where["hardware"], busy(load, card, used)
    print(f"{h['gpu'] or h['cpu']}, {h['cores']} cores, {h['threads']} threads, torch {h['torch']}, "
          f"Python {h['python']}, {h['platform']}")
    print("commit " + ", ".join(f"{name} {commit}" for name, commit in where["commit"].items())
          + f"; load average {f'{load[0]:.2f}' if load else 'unknown'}"
          + (f"; card {used['utilisation']}% used, other processes on it {used['others']}" if used else
             "; nvidia-smi does not tell the card's load" if card else ""))
    if warning:
        print(f"warning: {warning}")
    return where


def hardware():
    """The machine and the versions that a number belongs to."""
    import torch
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu,
            "torch": torch.__version__, "python": platform.python_version(), "platform": platform.platform()}


def versions():
    """Of the packages that change what a number says, where they are installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def cpu_name():
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def load_average():
    """Load of the last 1, 5 and 15 minutes, or None on a system that does not tell."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def card_of(cfg):
    """The CUDA device that a subcommand times; None where that is the CPU."""
    from training.runtime import choose_device
    device, _ = choose_device(getattr(cfg, "device", "cpu"))
    return device if device.type == "cuda" else None


def card_load(card):
    """What nvidia-smi tells of a CUDA device -> {"utilisation": per cent of its time, "others": processes
    that compute there and are not this one}; None where it does not tell, or where there is no card."""
    if card is None:
        return None
    import torch
    card = f"--id=GPU-{torch.cuda.get_device_properties(card).uuid}"
    try:
        used, pids = (subprocess.run(["nvidia-smi", card, query, "--format=csv,noheader,nounits"], check=True,
                                     capture_output=True, text=True, timeout=20).stdout.split()
                      for query in ("--query-gpu=utilization.gpu", "--query-compute-apps=pid"))
        return {"utilisation": int(used[0]), "others": len({*pids} - {str(os.getpid())})}
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def busy(load, card=None, used=None):
    """What disturbs timings of a CUDA device `card`, or of the CPU where there is none, in a sentence; ""
    where nothing does. load, used: as load_average and card_load give them."""
    if card is None:
        return (f"the machine is busy (load average {load[0]:.2f} before the start): timings are off"
                if load and load[0] > QUIET else "")
    return (f"the card is busy ({used['utilisation']}% of its time, other processes on it {used['others']}, "
            "before the start): timings are off"
            if used and (used["utilisation"] > CARD_QUIET or used["others"]) else "")


WINGS = "benchmarks", "config", "data", "decode", "kernels", "training", "viz"


def files_of(folder):
    """What stands for the commit of a folder without git: a hash of the names and bytes of its sources."""
    folder, found = Path(folder), hashlib.sha256()
    of_wings = (path for wing in WINGS for path in (folder / wing).rglob("*"))
    for path in sorted({*folder.glob("*.py"), *(path for path in of_wings
                                                if path.suffix in (".py", ".c", ".sh"))}):
        found.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
        found.update(path.read_bytes())
    return f"no git, files sha256:{found.hexdigest()[:12]}"


def commit_of(folder):
    """The commit of a checkout, with '+changes' where tracked files differ from it; without git `files_of`.
    """
    git = ["git", "-C", str(folder)]
    try:
        top, head = subprocess.check_output([*git, "rev-parse", "--show-toplevel", "HEAD"], text=True,
                                            stderr=subprocess.DEVNULL).splitlines()
        changes = subprocess.check_output([*git, "status", "--porcelain", "-uno"])
    except (OSError, subprocess.CalledProcessError, ValueError):
        return files_of(folder)
    mine = Path(top) == Path(folder).resolve()
    return head[:12] + "+changes" * bool(changes) if mine else files_of(folder)


def write_atomically(path, text):
    """`path` is the old file or the new one, never a part of it."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"{path} could not be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)


def mean_of(s):
    """A side's mean and range, for people."""
    return f"{s['mean']:.4f} ({s['min']:.4f} to {s['max']:.4f})"
