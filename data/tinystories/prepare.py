"""TinyStories: two million short stories in simple words (Eldan and Li, 2305.07759).

    python data/tinystories/prepare.py [--tokenizer=gpt2] [--input=FOLDER_OF_PARQUET_FILES]
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import run_script
from data.corpus import Corpus, column, prepare

DOWNLOAD = "1 GB"  # of parquet files; train.py asks before it takes as much


@dataclass(frozen=True)
class TinyStories(Corpus):
    """Write TinyStories."""
    val_fraction: float = 0.01              # the part held out for validation, whole stories


def hub(config):
    return {"path": "roneneldan/TinyStories"}


def main(argv=None):
    prepare(TinyStories, __file__, hub, column("text"), argv)


if __name__ == "__main__":
    run_script(main)
