"""Any text of your own as a data set.

    python data/prepare.py --input=FILE.txt --name=mydata [--tokenizer=byte|char|gpt2|bpe|FOLDER]
    python data/prepare.py --input=FILE.jsonl|.parquet|.csv|FOLDER --name=mydata [--column=text]
    python train.py --dataset=mydata

A text file is one text and its end is held out. Tables (.parquet, .jsonl, .ndjson, .json, .csv, .tsv) and
folders hold many documents: each is followed by the end-of-text token, and some are held out whole. A .gz or
.zst is unpacked.
"""
import re
import sys
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import close_match, configure, require, run_script
from data import corpus, dataset, inputs, vocabulary
from data.tokenizer import TOKENIZERS, is_model


@dataclass(frozen=True)
class Prepare:
    """Write data/NAME from text of your own."""
    input: str = ""                         # a text, a .jsonl, .json, .parquet, .csv or .tsv, or a folder
    name: str = ""                          # name of the new folder in data/
    tokenizer: str = "byte"                 # byte, char, gpt2, bpe (learned), a folder that has one, or .gguf
    vocab_size: int = 0                     # of --tokenizer=bpe: 500 or 1000 suit tiny models
    column: str = "text"                    # what holds the text in tables
    val_fraction: float = 0.1               # the part held out for validation

    def __post_init__(self):
        require(self.input, "no input file: type --input=FILE.txt")
        require(re.fullmatch(r"\w[\w.-]{0,99}", composed(self.name)),
                f"name={self.name!r} must be a plain folder name (letters, digits, '_', '-', '.'): "
                "type --name=mydata")
        place = self.tokenizer
        require(place in TOKENIZERS or is_model(dataset.expanded(place)) or dataset.is_there(place),
                f"unknown tokenizer '{self.tokenizer}'{close_match(self.tokenizer, TOKENIZERS)}; expected "
                f"one of {', '.join(TOKENIZERS)}, a data folder, or a pretrained model's folder or GGUF file")
        require(self.tokenizer != "bpe" or self.vocab_size,
                "tokenizer='bpe' is learned from the text: type --vocab_size=1000, for example")
        require(self.tokenizer == "bpe" or not self.vocab_size,
                f"vocab_size={self.vocab_size} and tokenizer='{self.tokenizer}': its size is given; type "
                "--tokenizer=bpe or leave --vocab_size out")
        require(0 < self.val_fraction < 1, f"val_fraction={self.val_fraction} must lie between 0 and 1")


def main(argv=None):
    config, started = configure(Prepare, argv), time.time()
    folder = dataset.on_disk(dataset.DATA / composed(config.name))
    require(not (folder / "prepare.py").exists(), f"'{config.name}' is a data set with its own prepare.py: "
                                                  "choose another --name")
    path = dataset.expanded(config.input)
    kind = inputs.kind_of(path)
    if kind is None and path.is_file():
        print(f"{path}: a kind of file that has no rows here, read as one text", flush=True)
    many = path.is_dir() or kind not in (None, "text")
    meta = (write_many if many else write_one)(config, folder)
    dataset.report(folder, meta, time.time() - started)


def composed(name):
    """A name with its letters whole (NFC), however the keyboard or macOS spells them."""
    return unicodedata.normalize("NFC", name)


def write_one(config, folder):
    return dataset.write_text(folder, config.input, dataset.tokenizer_place(config.tokenizer),
                              config.val_fraction, config.vocab_size)


def write_many(config, folder):
    text = corpus.column(config.column)
    documents = corpus.Documents(corpus.local_rows(config.input, text.columns), text)
    place = dataset.tokenizer_place(config.tokenizer)
    tokenizer = vocabulary.chosen(place, documents.pieces, config.vocab_size)
    return corpus.write_corpus(folder, documents, tokenizer, config.val_fraction,
                               f"{corpus.source_of(config.input, {})} {config.column}")


if __name__ == "__main__":
    run_script(main)
