"""KLUE's Korean news and encyclopedia passages (the contexts of its reading comprehension, 2105.09680).

    python data/klue/prepare.py [--tokenizer=FOLDER_WITH_A_TOKENIZER] [--input=FOLDER_OF_PARQUET_FILES]
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import run_script
from data.corpus import Corpus, prepare, reads, value


@dataclass(frozen=True)
class Klue(Corpus):
    """Write KLUE's passages with their titles; one that several questions in a row share counts once."""
    val_fraction: float = 0.05              # the part held out for validation, whole passages


def hub(config):
    return {"path": "klue/klue", "name": "mrc"}


@reads("title", "context")
def text(row):
    return f"{value(row, 'title')}\n{value(row, 'context')}\n"


def main(argv=None):
    prepare(Klue, __file__, hub, text, argv)


if __name__ == "__main__":
    run_script(main)
