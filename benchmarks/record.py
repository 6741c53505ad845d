"""The JSON record: where a measurement ran, by which command, what it found. Reading one needs no torch."""
import contextlib
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
PACKAGES = ("numpy", "triton", "transformers", "llama-cpp-python", "gguf",      # hardware() tells torch and
            "ctranslate2")                                                     # Python
# sides by the names that records give them
PEER, OURS, OURS_FP32, TWIN = "nanoGPT", "ours", "ours float32", "dense"
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
    where = {"hardware": hardware(), "versions": versions(), "commit": {OURS: commit_of(ROOT)},
             "load_average": {"before": load_average()}}
    if cfg.nanogpt:
        where["commit"][PEER] = commit_of(cfg.nanogpt)
    h, load = where["hardware"], where["load_average"]["before"]
    print(f"{h['gpu'] or h['cpu']}, {h['cores']} cores, {h['threads']} threads, torch {h['torch']}, "
          f"Python {h['python']}, {h['platform']}")
    print("commit " + ", ".join(f"{name} {commit or 'unknown'}" for name, commit in where["commit"].items())
          + f"; load average {f'{load[0]:.2f}' if load else 'unknown'}")
    if load and load[0] > QUIET:
        print(f"warning: the machine is busy (load average {load[0]:.2f} before the start): timings are off")
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


def commit_of(folder):
    """The commit of a checkout, with '+changes' where tracked files differ from it; None without git."""
    git = ["git", "-C", str(folder)]
    try:
        top, head = subprocess.check_output([*git, "rev-parse", "--show-toplevel", "HEAD"], text=True,
                                            stderr=subprocess.DEVNULL).splitlines()
        changes = subprocess.check_output([*git, "status", "--porcelain", "-uno"])
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None
    return head[:12] + "+changes" * bool(changes) if Path(top) == Path(folder).resolve() else None


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
