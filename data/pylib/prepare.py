"""The default data: the source code of the running Python's own standard library, byte by byte.

    python data/pylib/prepare.py [--site_packages]

Every machine has it. Each file ends with one 0 byte, which no Python source contains. About one file in
twenty, chosen by the hash of its name, is held out whole for validation; test suites are left out.
"""
import os
import platform
import sys
import sysconfig
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, run_script
from data.dataset import expanded, report, write_dataset
from data.tokenizer import ByteTokenizer

EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload"}

VOCAB_SIZE = 256


@dataclass(frozen=True)
class PyLib:
    """Write the source of Python's standard library as byte tokens."""
    site_packages: bool = False             # also the source of every installed package
    out_dir: str = ""                       # folder to write to; empty: the folder of this script


def main(argv=None):
    config, started = configure(PyLib, argv), time.time()
    folder = expanded(config.out_dir or Path(__file__).resolve().parent)
    files = {False: [], True: []}
    for root in roots(config.site_packages):
        for name, path in sources(root):
            files[held_out(name)].append(path)
    kind = "standard library and installed packages" if config.site_packages else "standard library"
    splits = {"train": documents(files[False]), "val": documents(files[True])}
    meta = write_dataset(folder, splits, ByteTokenizer(), f"Python {platform.python_version()} {kind}")
    print(f"{len(files[False]):,} files for training, {len(files[True]):,} held out")
    report(folder, meta, time.time() - started)


def roots(site_packages):
    """Folders to read: the standard library and, if wanted, where packages are installed."""
    packages = [p for p in dict.fromkeys(sys.path) if Path(p).name in ("site-packages", "dist-packages")]
    return [sysconfig.get_paths()["stdlib"], *(packages if site_packages else [])]


def sources(root):
    """[(relative name with /, path)] of the Python files below root that are no tests, sorted by name."""
    found = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in EXCLUDED]
        chosen = [Path(folder, n) for n in names if n.endswith(".py") and not n.startswith("test_")]
        found += [(path.relative_to(root).as_posix(), path) for path in chosen]
    return sorted(found)


def held_out(name):
    """Whether the file is for validation: a choice by name, the same on every machine and in every run."""
    return zlib.crc32(os.fsencode(name)) % 20 == 0


def documents(paths):
    """The bytes of each file and a closing 0; files that are not UTF-8, or hold a 0, are passed over."""
    for path in paths:
        text = path.read_bytes()
        if is_utf8(text) and 0 not in text:
            yield np.frombuffer(text + b"\0", np.uint8)


def is_utf8(text):
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


if __name__ == "__main__":
    run_script(main)
