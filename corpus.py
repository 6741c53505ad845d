"""Corpora: documents that stream from parquet and JSON-lines files, here or on the Hub, into token files.

    python data/openwebtext/prepare.py                          from the Hub
    python data/openwebtext/prepare.py --input=FOLDER           from files of it that you have

The documents go into train.part.bin and val.part.bin; every PART_TOKENS tokens these are flushed to the disk
and progress.json says how far they are valid. Whatever kills a preparation, the same command goes on from
there, and the result is the same to the byte. Memory does not grow with the corpus.
"""
import hashlib
import json
import logging
import os
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import tokenizer as tokenizers
import vocabulary
from configurator import ConfigError, configure, require
from dataset import AGAIN, DTYPES, as_bytes, dtype_for, new_meta, report, text_files

PART_TOKENS = 1 << 24           # tokens between two notes of the progress
BATCH_CHARS = 1 << 20           # characters of text that are encoded at a time
WHOLE_TEXT = 256 << 20          # bytes of the largest text file that may be one document among many
REACH_SECONDS = 120             # without an answer from the Hub for so long there is no network
KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}


@dataclass(frozen=True)
class Corpus:
    """The keys of a corpus's prepare.py."""
    input: str = ""                 # files of it that you have: a .parquet, .jsonl or folder; empty: the Hub
    out_dir: str = ""               # folder to write to; empty: the folder of this script
    tokenizer: str = "gpt2"         # byte, gpt2, or a data folder with a tokenizer of its own
    val_fraction: float = 0.0005    # the part held out for validation, whole documents chosen by their text
    documents: int = 0              # stop after so many documents; 0: all

    def __post_init__(self):
        require(0 < self.val_fraction < 1, f"val_fraction={self.val_fraction} must lie between 0 and 1")
        require(self.documents >= 0, f"documents={self.documents} must be 0 (all) or more")


def prepare(config_class, here, hub, text, argv=None):
    """The main() of a corpus's prepare.py.

    hub: config -> keys of datasets.load_dataset; text: a row (dict) -> a document, or None for no document.
    """
    config, started = configure(config_class, argv), time.time()
    rows = local_rows(config.input) if config.input else hub_rows(hub(config))
    documents = Documents(rows, text, config.documents)
    tokenizer = vocabulary.chosen(config.tokenizer, documents.pieces)
    folder = Path(config.out_dir or Path(here).resolve().parent)
    source = source_of(config.input, hub(config))
    meta = write_corpus(folder, documents, tokenizer, config.val_fraction, source)
    report(folder, meta, time.time() - started)


# ------------------------------------------------------------------------------------------------------------
# where documents come from

def hub_rows(keys):
    """A data set of the Hub as a stream of rows."""
    load = library("corpora of the Hub").load_dataset
    try:
        return tokenizers.within(REACH_SECONDS, lambda: load(**keys, split="train", streaming=True))
    except Exception as error:                  # the Hub's client raises dozens of types
        raise ConfigError(f"'{keys['path']}' could not be reached on the Hub ({first_line(error)}): without "
                          f"a network, type python {sys.argv[0]} --input=FOLDER with its parquet or jsonl "
                          "files, or use the "
                          "built-in data: python train.py --dataset=pylib") from error


def local_rows(path):
    """Files of one kind (.parquet, .jsonl, .txt) as a stream of rows; a text file is one row of "text"."""
    files = files_of(path)
    kinds = sorted({KINDS[file.suffix] for file in files})
    require(len(kinds) == 1, f"{path} mixes {' and '.join(kinds)} files, expected one kind: take one of them")
    long = [file for file in files if kinds == ["text"] and file.stat().st_size > WHOLE_TEXT]
    require(not long, f"{long and long[0]} is too long to be one document among many: prepare it by itself, "
                      "python data/prepare.py --input=FILE")
    require(any(file.stat().st_size for file in files), f"{path} is empty: expected documents")
    load = library("parquet and jsonl files").load_dataset
    options = {"sample_by": "document"} if kinds == ["text"] else {}
    try:
        return load(kinds[0], data_files=[str(file) for file in files], split="train", streaming=True,
                    **options)
    except Exception as error:
        raise ConfigError(f"{path} cannot be read ({first_line(error)})") from error


def library(why):
    """The package datasets, asked not to tell errors twice and not to import torch, 700 MB that text has no
    use for."""
    datasets = tokenizers.need("datasets", why)
    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    datasets.config.TORCH_AVAILABLE = False
    return datasets


def files_of(path):
    """The files that a path names, itself or all below it, in the order of their names."""
    path = Path(path)
    require(path.exists(), f"input {path} does not exist: type --input=FILE or --input=FOLDER")
    found = sorted(file for file in path.rglob("*") if file.suffix in KINDS) if path.is_dir() else [path]
    require(found and found[0].suffix in KINDS,
            f"input {path} holds none of {', '.join(KINDS)}: convert it to one of these")
    return found


def source_of(path, hub):
    """In words where the documents come from; other files give other words."""
    if not path:
        return " ".join([hub["path"], hub.get("name", ""), *map(str, hub.get("data_files", ()))]).strip()
    sizes = [f"{file.name} {file.stat().st_size}" for file in files_of(path)]
    sha = hashlib.sha256(repr(sizes).encode()).hexdigest()
    return f"{len(sizes)} files, {sizes[0]} to {sizes[-1]} bytes, {sha[:12]}"


def column(name):
    """row -> its column `name`, for rows that have one document each."""
    other = "type python data/prepare.py --input=... --name=... --column=ANOTHER"     # any corpus's files

    def text(row):
        require(name in row, f"the rows have no column '{name}' but {', '.join(row)}: {other}")
        require(isinstance(row[name], str | None), f"column '{name}' holds {str(row[name])[:40]!r}, no text: "
                                                   f"{other}")
        return row[name]
    return text


class Documents:
    """The documents of a stream of rows; state() and go_to(state) are the position in it.

    passed_over counts what is no document: empty text, text that is no valid Unicode, text with a NUL, which
    ends documents in bytes and characters, and repetitions of the document before.
    """

    def __init__(self, rows, text, most=0):
        self.rows, self.text, self.most = rows, text, most
        self.count = self.passed_over = 0
        self.last = ""                  # the hash of the last document

    def __iter__(self):
        try:
            for row in self.rows:
                text = self.text(row)
                if not text or "\0" in text or not is_utf8(text) or mark(text) == self.last:
                    self.passed_over += 1
                    continue
                self.count, self.last = self.count + 1, mark(text)
                yield text
                if self.count == self.most:
                    return
        except (ConfigError, OSError):
            raise
        except Exception as error:              # a network or a file that fails on the way
            raise ConfigError(f"the documents end after {self.count:,} ({first_line(error)}): mend that "
                              "and type the same command again to go on") from error

    def state(self):
        return {"rows": self.rows.state_dict(), "count": self.count, "passed_over": self.passed_over,
                "last": self.last}

    def go_to(self, state):
        self.rows.load_state_dict(state["rows"])
        self.count, self.passed_over, self.last = state["count"], state["passed_over"], state["last"]

    def pieces(self):
        """The text alone, from its first document on, for a vocabulary that is learned from it."""
        yield from Documents(self.rows, self.text, self.most)


def mark(text):
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def is_utf8(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def first_line(error):
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"


# ------------------------------------------------------------------------------------------------------------
# writing

def write_corpus(folder, documents, tokenizer, val_fraction, source):
    """Encode every document, each followed by the end-of-text token, into train.bin and val.bin -> meta."""
    require(tokenizer.end_of_text is not None, "a vocabulary of characters has no token that ends a "
                                               "document: type --tokenizer=byte")
    folder = Path(folder)
    meta = new_meta(tokenizer, source) | {"val_fraction": val_fraction}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        parts = Parts(folder, meta, documents)
        for texts in batches(documents):
            for split, ids in encoded(texts, tokenizer, val_fraction):
                parts.write(split, ids)
            parts.note_progress(PART_TOKENS)
        return parts.finish()
    except OSError as error:
        raise ConfigError(f"{error.filename or folder} could not be read or written ({error.strerror}): type "
                          "the same command again to go on from the last note of the progress") from error


def batches(documents):
    """Lists of documents of about BATCH_CHARS characters; none is read before it belongs to a list."""
    texts, size = [], 0
    for text in documents:
        texts.append(text)
        size += len(text)
        if size >= BATCH_CHARS:
            yield texts
            texts, size = [], 0
    yield texts


def encoded(texts, tokenizer, val_fraction):
    """(split, ids) of each text. The same text is always on the same side, in every run and every corpus."""
    encode_many = getattr(tokenizer, "encode_many", lambda texts: map(tokenizer.encode, texts))
    for text, ids in zip(texts, encode_many(texts)):
        held_out = zlib.crc32(text.encode()) < val_fraction * 2**32
        yield "val" if held_out else "train", np.append(ids, tokenizer.end_of_text)


class Parts:
    """The token files while they grow, and the note of how far they are valid."""

    def __init__(self, folder, meta, documents):
        self.folder, self.meta, self.documents = folder, meta, documents
        self.dtype = DTYPES[dtype_for(meta["vocab_size"])]
        self.note = folder / "progress.json"
        self.files = {split: folder / f"{split}.part.bin" for split in ("train", "val")}
        self.shas = {split: hashlib.sha256() for split in self.files}
        self.sizes = dict.fromkeys(self.files, 0)
        self.noted = 0
        old = self.old_note()
        if old:
            self.go_on(old)
        self.open = {split: open(path, "r+b" if old else "wb") for split, path in self.files.items()}
        for split, file in self.open.items():
            file.truncate(self.sizes[split])
            file.seek(self.sizes[split])

    def old_note(self):
        """The note of an interrupted preparation of the same documents with the same tokenizer, or None."""
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        wanted = json.loads(json.dumps(self.identity()))
        return note if isinstance(note, dict) and note.get("identity") == wanted else None

    def identity(self):
        return {"tokenizer": tokenizers.name_of(self.meta), "most": self.documents.most,
                **{key: self.meta[key] for key in ("source", "val_fraction", "vocab_size")}}

    def go_on(self, note):
        """Check what the note vouches for, and put the documents where it says."""
        for split, path in self.files.items():
            self.sizes[split] = note["bytes"][split]
            read_into(self.shas[split], path, self.sizes[split])
            require(self.shas[split].hexdigest() == note["sha256"][split],
                    f"{path} is not what {self.note.name} says: remove both to start again")
        self.noted = sum(self.sizes.values()) // self.dtype.itemsize
        self.documents.go_to(note["documents"])
        print(f"{self.folder}: going on after {self.documents.count:,} documents, {self.noted:,} tokens",
              flush=True)

    def write(self, split, ids):
        [block] = as_bytes([ids], self.meta["vocab_size"], self.dtype)
        self.open[split].write(block)
        self.shas[split].update(block)
        self.sizes[split] += len(block)

    def note_progress(self, every=0):
        """Flush and note the progress once `every` tokens have come since the last note."""
        tokens = sum(self.sizes.values()) // self.dtype.itemsize
        if tokens - self.noted < every:
            return
        for file in self.open.values():
            file.flush()
            os.fsync(file.fileno())
        note = {"identity": self.identity(), "documents": self.documents.state(), "bytes": self.sizes,
                "sha256": {split: sha.hexdigest() for split, sha in self.shas.items()}}
        write_durably(self.note, json.dumps(note).encode())
        self.noted = tokens
        print(f"{self.documents.count:,} documents, {tokens:,} tokens", flush=True)

    def finish(self):
        """Put the files in place, the meta first, so that a crash between them is noticed -> meta."""
        self.note_progress()
        for file in self.open.values():
            file.close()
        meta = self.meta | {"documents": self.documents.count, "passed_over": self.documents.passed_over}
        for split, path in self.files.items():
            require(self.sizes[split], f"no document came to {split}.bin: there are {self.documents.count}, "
                    f"and val_fraction is {meta['val_fraction']}; type another --val_fraction")
            require(path.stat().st_size == self.sizes[split], f"{path} has not the size written: {AGAIN}")
            meta["tokens"][split] = self.sizes[split] // self.dtype.itemsize
            meta["sha256"][split] = self.shas[split].hexdigest()
        for name, content in text_files(meta).items():
            write_durably(self.folder / name, content)
        for split, path in self.files.items():
            os.replace(path, self.folder / f"{split}.bin")
        self.note.unlink()
        return meta


def read_into(sha, path, size):
    """Update a hash with the first `size` bytes of a file."""
    with open(path, "rb") as file:
        while size > 0 and (block := file.read(min(size, 1 << 20))):
            sha.update(block)
            size -= len(block)


def write_durably(path, content):
    """`path` is the old file or the new one, on the disk."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
