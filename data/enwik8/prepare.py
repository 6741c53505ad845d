"""enwik8: the first 100,000,000 bytes of the English Wikipedia of 2006, byte by byte.

    python data/enwik8/prepare.py [--input=enwik8 or enwik8.zip]

The split is the customary one: 90 million bytes for training, five for validation; the last five, for a final
test, are left out.
"""
import hashlib
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, require, run_script
from data.dataset import download, expanded, report, write_dataset
from data.tokenizer import ByteTokenizer

ZIP = {"url": "http://mattmahoney.net/dc/enwik8.zip",
       "sha256": "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"}
SIZE, MD5 = 100_000_000, "a1fa5ffddb56f4953e226637dabbb36a"
SPLITS = {"train": (0, 90_000_000), "val": (90_000_000, 95_000_000)}
CHUNK = 1 << 20

VOCAB_SIZE = 256


@dataclass(frozen=True)
class Enwik8:
    """Write enwik8 as byte tokens."""
    input: str = ""                         # enwik8 or enwik8.zip; empty: enwik8.zip beside this script
    out_dir: str = ""                       # folder to write to; empty: the folder of this script


def main(argv=None):
    config, started, here = configure(Enwik8, argv), time.time(), Path(__file__).resolve().parent
    path = expanded(config.input or here / "enwik8.zip")
    if not config.input and not path.is_file():
        download(ZIP["url"], path, ZIP["sha256"], timeout=60)
    check(path)
    splits = {split: pieces(path, *ends) for split, ends in SPLITS.items()}
    folder = expanded(config.out_dir or here)
    report(folder, write_dataset(folder, splits, ByteTokenizer(), "enwik8"), time.time() - started)


def opened(path):
    require(path.is_file(), f"input {path} does not exist: type --input=FILE")
    return zipfile.ZipFile(path).open("enwik8") if zipfile.is_zipfile(path) else open(path, "rb")


def check(path):
    """ConfigError unless the file is enwik8: its size and the hash that its author publishes."""
    md5, size = hashlib.md5(usedforsecurity=False), 0
    with opened(path) as file:
        while block := file.read(CHUNK):
            md5.update(block)
            size += len(block)
    require((size, md5.hexdigest()) == (SIZE, MD5), f"{path} is not enwik8: {size:,} bytes, md5 "
            f"{md5.hexdigest()}, expected {SIZE:,} bytes, {MD5}")


def pieces(path, start, stop):
    """Bytes start to stop - 1 of the file."""
    with opened(path) as file:
        file.seek(start)
        for left in range(stop - start, 0, -CHUNK):
            yield np.frombuffer(file.read(min(left, CHUNK)), np.uint8)


if __name__ == "__main__":
    run_script(main)
