"""OpenWebText in GPT-2's byte pairs: 8,013,769 documents, about 9 billion tokens, 18 GB.

    python data/openwebtext/prepare.py [--input=FOLDER_OF_PARQUET_FILES]
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import run_script
from data.corpus import Corpus, column, prepare

DOWNLOAD = "24 GB"  # of parquet files; train.py asks before it takes as much


@dataclass(frozen=True)
class OpenWebText(Corpus):
    """Write OpenWebText; val_fraction is nanoGPT's, the documents held out are others (chosen by content)."""


def hub(config):
    """The Hub's own parquet files: the data set's main branch needs a loading script, which datasets 4 runs
    no more (nanoGPT's issue 633)."""
    return {"path": "Skylion007/openwebtext", "revision": "refs/convert/parquet"}


def main(argv=None):
    prepare(OpenWebText, __file__, hub, column("text"), argv)


if __name__ == "__main__":
    run_script(main)
