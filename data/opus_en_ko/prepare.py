"""A million sentences in Korean and English side by side (OPUS-100, 2004.11867).

    python data/opus_en_ko/prepare.py [--tokenizer=FOLDER_WITH_A_TOKENIZER] [--input=FOLDER_OF_PARQUET_FILES]
"""
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import run_script
from data.corpus import Corpus, prepare, reads, value


@dataclass(frozen=True)
class OpusEnKo(Corpus):
    """Write pairs of sentences, a line each; half of them English first, chosen by their text."""
    val_fraction: float = 0.005             # the part held out for validation, whole pairs


def hub(config):
    return {"path": "Helsinki-NLP/opus-100", "name": "en-ko"}


@reads("translation")
def text(row):
    both = row.get("translation") or {}
    pair = [value(both, "en"), value(both, "ko")]
    return "\n".join(pair[::-1 if zlib.crc32(pair[0].encode(errors="replace")) % 2 else 1]) + "\n"


def main(argv=None):
    prepare(OpusEnKo, __file__, hub, text, argv)


if __name__ == "__main__":
    run_script(main)
