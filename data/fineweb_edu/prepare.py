"""FineWeb-Edu, shuffled, in shards of about 250 million characters: the first N of 1,823.

    python data/fineweb_edu/prepare.py --shards=8 [--tokenizer=gpt2] [--input=FOLDER_OF_PARQUET_FILES]
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import require, run_script
from data.corpus import Corpus, column, prepare

DOWNLOAD = "0.7 GB"  # of eight shards; train.py asks before it takes as much

SHARDS = 1823


@dataclass(frozen=True)
class FineWebEdu(Corpus):
    """Write the first shards of FineWeb-Edu."""
    shards: int = 8                         # shards of the Hub's, about 90 MB and 55 million tokens each

    def __post_init__(self):
        super().__post_init__()
        require(1 <= self.shards <= SHARDS, f"shards={self.shards} must be in 1..{SHARDS}")


def hub(config):
    return {"path": "karpathy/fineweb-edu-100b-shuffle",
            "data_files": [f"shard_{i:05d}.parquet" for i in range(config.shards)]}


def main(argv=None):
    prepare(FineWebEdu, __file__, hub, column("text"), argv)


if __name__ == "__main__":
    run_script(main)
