"""Corpora: documents that stream from files (inputs.py says which) or from the Hub into token files.

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

from configurator import ConfigError, configure, require
from data import inputs, vocabulary
from data import tokenizer as tokenizers
from data.dataset import (
    AGAIN,
    DTYPES,
    as_bytes,
    dropped,
    dtype_for,
    expanded,
    locked,
    new_meta,
    report,
    tell_decomposed,
    text_files,
    tokenizer_place,
)
from data.inputs import BadRow, first_line

PART_TOKENS = 1 << 24           # tokens between two notes of the progress
BATCH_CHARS = 1 << 20           # characters of text that are encoded at a time
REACH_SECONDS = 120             # without an answer from the Hub for so long there is no network
BAD_ROWS = 1000                 # rows of a file that may be unusable before the first good one
NAMED = 20                      # files and documents of a kind that are named; the others are counted
READER = 2                      # what a position among rows means


@dataclass(frozen=True)
class Corpus:
    """The keys of a corpus's prepare.py."""
    input: str = ""                 # files of it that you have: a file or a folder of rows; empty: the Hub
    out_dir: str = ""               # folder to write to; empty: the folder of this script
    tokenizer: str = "gpt2"         # byte, gpt2, or a data folder with a tokenizer of its own
    val_fraction: float = 0.0005    # the part held out for validation, whole documents chosen by their text
    documents: int = 0              # stop after so many documents; 0: all

    def __post_init__(self):
        require(0 < self.val_fraction < 1, f"val_fraction={self.val_fraction} must lie between 0 and 1")
        require(self.documents >= 0, f"documents={self.documents} must be 0 (all) or more")


def prepare(config_class, here, hub, text, argv=None):
    """The main() of a corpus's prepare.py.

    hub: config -> keys of datasets.load_dataset; text: a row (dict) -> a document, or None for no document;
    its attribute columns names those that it reads.
    """
    config, started = configure(config_class, argv), time.time()
    columns = getattr(text, "columns", None)
    rows = local_rows(config.input, columns) if config.input else hub_rows(hub(config))
    documents = Documents(rows, text, config.documents)
    tokenizer = vocabulary.chosen(tokenizer_place(config.tokenizer), documents.pieces)
    folder = expanded(config.out_dir or Path(here).resolve().parent)
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


def local_rows(path, columns=None):
    """The rows of a file or a folder as inputs.LocalRows; a text file is one row of "text"."""
    files, left_out = inputs.files_of(path)
    texts = [file for file in files if inputs.kind_of(file) == "text"]
    kinds = sorted({inputs.kind_of(file) for file in files})
    require(len(texts) in (0, len(files)), f"{path} mixes {' and '.join(kinds)} files, rows and whole texts: "
                                           f"take one of them (the first text is {texts and texts[0]})")
    rows = inputs.LocalRows(files, ["text"] if texts else columns, left_out)
    tell_left_out(rows.left_out)
    return rows


def tell_left_out(left_out):
    for name, reason in list(left_out.items())[:NAMED]:
        print(f"left out: {name} ({reason})", flush=True)
    if len(left_out) > NAMED:
        print(f"left out: {len(left_out) - NAMED:,} more, which meta.json will name", flush=True)


def library(why):
    """The package datasets, asked not to tell errors twice and not to import torch, 700 MB that text has no
    use for."""
    datasets = tokenizers.need("datasets", why)
    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    datasets.config.TORCH_AVAILABLE = False
    return datasets


def source_of(path, hub):
    """In words where the documents come from; other files give other words."""
    if not path:
        return " ".join([hub["path"], hub.get("name", ""), *map(str, hub.get("data_files", ()))]).strip()
    sizes = [f"{file.name} {file.stat().st_size}" for file in inputs.files_of(path)[0]]
    sha = hashlib.sha256(repr(sizes).encode()).hexdigest()
    return f"{len(sizes)} files, {sizes[0]} to {sizes[-1]} bytes, {sha[:12]}"


def column(name):
    """row -> its column `name`, for rows that have one document each."""
    def text(row):
        return None if name in row and row[name] is None else value(row, name)
    return reads(name)(text)


def reads(*columns):
    """Names the columns that a function of rows reads, so that no others are."""
    def named(function):
        function.columns = list(columns)
        return function
    return named


def value(row, name):
    """The text in a column of a row, or BadRow."""
    if name not in row:
        raise BadRow("without the column", inputs.no_column("has", name, row))
    if not isinstance(row[name], str):
        raise BadRow("no text", f"has {str(row[name])[:40]!r} in column '{name}', no text: "
                                + inputs.OTHER_COLUMN)
    return row[name]


class Documents:
    """The documents of a stream of rows; state() and go_to(state) are the position in it.

    passed_over counts what is no document: empty text, text that is no valid Unicode, text with a NUL, which
    ends documents in bytes and characters, repetitions of the document before, and rows that cannot be used.
    dropped has the numbers and names the first ones. A file of which no row can be used is a ConfigError.
    """

    def __init__(self, rows, text, most=0):
        self.rows, self.text, self.most = rows, text, most
        self.count = self.passed_over = self.seen = self.decomposed = 0
        self.dropped = {}               # {reason: {"count": n, "first": [where]}}
        self.last = ""                  # the hash of the last document
        self.file, self.good, self.bad, self.first_bad = "", 0, 0, ""   # the file that is read, and its rows

    def __iter__(self):
        try:
            for row in self.rows:
                self.seen += 1
                text = self.document(row)
                if text is None:
                    continue
                self.count, self.last = self.count + 1, mark(text)
                self.decomposed += tokenizers.is_decomposed(text)
                yield text
                if self.count == self.most:
                    return
            self.file_ends("")
        except (ConfigError, OSError):
            raise
        except Exception as error:              # a network that fails on the way
            raise ConfigError(f"the documents end after {self.count:,} ({first_line(error)}): mend that "
                              "and type the same command again to go on") from error

    def document(self, row):
        """The text of a row, or None once the reason why there is none is counted."""
        if getattr(self.rows, "file", "") != self.file:
            self.file_ends(self.rows.file)
        try:
            if isinstance(row, BadRow):
                raise row
            text = self.text(row)
        except BadRow as error:
            self.bad += 1
            where = f"{self.place()} {error}"
            self.first_bad = where if self.bad == 1 else self.first_bad
            require(self.good or self.bad < BAD_ROWS, f"{self.first_bad}; no other of its first {BAD_ROWS:,} "
                                                      "rows can be used either")
            return self.drop(error.kind, where)
        self.good += 1
        reason = no_document(text) or (mark(text) == self.last and "the same as the one before")
        return self.drop(reason, self.place()) if reason else text

    def file_ends(self, following):
        """A file is over: refuse it if all its rows were unusable."""
        require(self.good or not self.bad, f"{self.first_bad}; no other row of it can be used either")
        self.file, self.good, self.bad = following, 0, 0

    def place(self):
        return getattr(self.rows, "place", f"row {self.seen:,}")

    def drop(self, reason, where):
        self.passed_over += 1
        entry = self.dropped.setdefault(reason, {"count": 0, "first": []})
        entry["count"] += 1
        entry["first"] += [where] * (len(entry["first"]) < NAMED)

    STATE = ("count", "passed_over", "seen", "decomposed", "dropped", "last", "file", "good", "bad",
             "first_bad")

    def state(self):
        return {"rows": self.rows.state_dict()} | {name: getattr(self, name) for name in self.STATE}

    def go_to(self, state):
        self.rows.load_state_dict(state["rows"])
        for name in self.STATE:
            setattr(self, name, state[name])

    def about(self):
        """What meta.json has of the documents."""
        files = getattr(self.rows, "files", None)
        of_files = {} if files is None else {"files": len(files), "left_out": self.rows.left_out}
        return {"documents": self.count, "passed_over": self.passed_over, "dropped": self.dropped, **of_files}

    def pieces(self):
        """The text alone, from its first document on, for a vocabulary that is learned from it."""
        yield from Documents(self.rows, self.text, self.most)


def no_document(text):
    """Why a text is no document, or ''."""
    if not text:
        return "empty"
    return "with a NUL character" if "\0" in text else "" if is_utf8(text) else "no valid Unicode"


def mark(text):
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def is_utf8(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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
        with locked(folder):
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
        if not self.note.exists():
            return None
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return self.anew(f"{self.note} cannot be read")
        wanted = json.loads(json.dumps(self.identity()))
        complete = isinstance(note, dict) and {"bytes", "sha256", "documents"} <= note.keys()
        if not complete or note.get("identity") != wanted:
            return self.anew(f"{self.note} is about other files, another tokenizer or other keys")
        for split, path in self.files.items():
            if not path.exists() and not self.take_back(split, note):
                return self.anew(f"{path} is missing")
        return note

    def anew(self, why):
        print(f"{why}: beginning at the first document", flush=True)

    def take_back(self, split, note):
        """Whether train.bin or val.bin is the part that is missing, put in place just before a crash."""
        done, sha = self.folder / f"{split}.bin", hashlib.sha256()
        if not done.is_file() or done.stat().st_size != note["bytes"][split]:
            return False
        read_into(sha, done, note["bytes"][split])
        same = sha.hexdigest() == note["sha256"][split]
        if same:
            os.replace(done, self.files[split])
        return same

    def identity(self):
        return {"tokenizer": tokenizers.name_of(self.meta), "most": self.documents.most, "reader": READER,
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
        meta = self.meta | self.documents.about()
        for split, path in self.files.items():
            require(self.sizes[split], f"no document came to {split}.bin: {self.documents.count} are kept"
                    f"{dropped(meta)}; val_fraction is {meta['val_fraction']}: type another --val_fraction")
            require(path.stat().st_size == self.sizes[split], f"{path} has not the size written: {AGAIN}")
            meta["tokens"][split] = self.sizes[split] // self.dtype.itemsize
            meta["sha256"][split] = self.shas[split].hexdigest()
        for name, content in text_files(meta).items():
            write_durably(self.folder / name, content)
        for split, path in self.files.items():
            os.replace(path, self.folder / f"{split}.bin")
        self.note.unlink()
        if self.documents.decomposed:
            tell_decomposed(f"{self.documents.decomposed:,} documents have")
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
