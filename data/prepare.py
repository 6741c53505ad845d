"""Any text of your own as a data set.

    python data/prepare.py --input=FILE.txt --name=mydata [--tokenizer=byte|char|gpt2] [--val_fraction=0.1]
    python train.py --dataset=mydata
"""
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dataset
from configurator import close_match, configure, require
from tokenizer import TOKENIZERS


@dataclass(frozen=True)
class Prepare:
    """Write data/NAME from a UTF-8 text file; its end is held out for validation."""
    input: str = ""                         # the text file
    name: str = ""                          # name of the new folder in data/
    tokenizer: str = "byte"                 # byte, char or gpt2
    val_fraction: float = 0.1               # the part held out for validation

    def __post_init__(self):
        require(self.input, "no input file: type --input=FILE.txt")
        require(re.fullmatch(r"\w[\w.-]{0,99}", self.name),
                f"name={self.name!r} must be a plain folder name (letters, digits, '_', '-', '.'): "
                "type --name=mydata")
        require(self.tokenizer in TOKENIZERS, f"unknown tokenizer '{self.tokenizer}'"
                f"{close_match(self.tokenizer, TOKENIZERS)}; expected one of {', '.join(TOKENIZERS)}")
        require(0 < self.val_fraction < 1, f"val_fraction={self.val_fraction} must lie between 0 and 1")


def main(argv=None):
    config, started = configure(Prepare, argv), time.time()
    folder = dataset.DATA / config.name
    require(not (folder / "prepare.py").exists(), f"'{config.name}' is a data set with its own prepare.py: "
                                                  "choose another --name")
    meta = dataset.write_text(folder, config.input, config.tokenizer, config.val_fraction)
    dataset.report(folder, meta, time.time() - started)


if __name__ == "__main__":
    main()
