"""Shakespeare in GPT-2's byte pairs: nanoGPT's shakespeare, with the same ids and the same split.

    python data/shakespeare/prepare.py [--input=FILE]
"""
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, run_script
from data.dataset import SHAKESPEARE, expanded, report, text_file, write_text


@dataclass(frozen=True)
class Shakespeare:
    """Write Shakespeare as GPT-2 tokens (301,966 for training and 36,059 for validation)."""
    input: str = ""                         # text file; empty: input.txt beside this script, else a download
    out_dir: str = ""                       # folder to write to; empty: the folder of this script


def main(argv=None):
    config, started, here = configure(Shakespeare, argv), time.time(), Path(__file__).resolve().parent
    folder = expanded(config.out_dir or here)
    meta = write_text(folder, text_file(config.input, here, **SHAKESPEARE), "gpt2", 0.1)
    report(folder, meta, time.time() - started)


if __name__ == "__main__":
    run_script(main)
