"""Shakespeare letter by letter: nanoGPT's shakespeare_char, with the same ids and the same split.

    python data/shakespeare_char/prepare.py [--input=FILE]
"""
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, run_script
from data.dataset import SHAKESPEARE, expanded, report, text_file, write_text

VOCAB_SIZE = 65


@dataclass(frozen=True)
class ShakespeareChar:
    """Write Shakespeare as character tokens (1,003,854 for training and 111,540 for validation)."""
    input: str = ""                         # text file; empty: input.txt beside this script, else a download
    out_dir: str = ""                       # folder to write to; empty: the folder of this script


def main(argv=None):
    config, started, here = configure(ShakespeareChar, argv), time.time(), Path(__file__).resolve().parent
    folder = expanded(config.out_dir or here)
    meta = write_text(folder, text_file(config.input, here, **SHAKESPEARE), "char", 0.1)
    report(folder, meta, time.time() - started)


if __name__ == "__main__":
    run_script(main)
