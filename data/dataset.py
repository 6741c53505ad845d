"""Token files: writing them, checking them before step 0, and drawing batches from them.

A data set is a folder with train.bin and val.bin, flat arrays of token ids exactly as nanoGPT writes them
(uint16; uint32 for vocabularies above 65,536), and meta.json with the tokenizer, the counts and the hashes.
Folders made by nanoGPT, with meta.pkl or no meta file at all, work as they are.
"""
import atexit
import contextlib
import functools
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unicodedata
import urllib.request
import zlib
from pathlib import Path

import numpy as np

from configurator import ConfigError, close_match, require
from data import inputs, vocabulary
from data.tokenizer import (
    TOKENIZERS,
    described,
    from_meta,
    is_decomposed,
    is_model,
    meta_of,
    require_same,
)
from training.processes import born, fate, machine

DATA = Path(__file__).resolve().parent
SPLITS = ("train", "val")
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
SCAN_BYTES = 512 << 20      # a file up to this size is checked in full, a larger one in evenly spaced places
SCAN_CHUNK = 1 << 20        # tokens in memory at a time while checking
TEXT_CHUNK = 1 << 20        # characters in memory at a time while encoding
AGAIN = "prepare the data set again"
SHAKESPEARE = {"url": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
                      "input.txt",
               "sha256": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"}


# ------------------------------------------------------------------------------------------------------------
# finding and preparing

def find(dataset):
    """The folder of a data set: a path to it, or a name below data/ (this repository's, else ./data).

    What has a separator, a drive or ~ is a path and nothing else. Of the folders that a name may mean, one
    with train.bin and val.bin goes before one without.
    """
    names = [dataset] if is_path(dataset) else [DATA / dataset, Path("data") / dataset, dataset]
    places = [place for place in map(on_disk, names) if dataset and os.path.isdir(place)]
    ready = [place for place in places if not missing_files(place)]
    near = close_match(Path(dataset).name, [entry.name for entry in DATA.glob("*") if entry.is_dir()])
    require(places, f"data set '{dataset}' " + ("is no folder" if is_path(dataset) else
            f"is neither a folder in {DATA} nor a path") + f"{near}; {how_to_make(Path(dataset).stem)}")
    for other in ready[1:]:
        if not os.path.samefile(other, ready[0]):
            tell_other(dataset, ready[0], os.path.join(".", other))
    return (ready or places)[0]


@functools.cache
def tell_other(dataset, chosen, other):
    """Once: there are two data sets of this name."""
    print(f"note: data set '{dataset}' is {chosen}; type --dataset={other} for the other one",
          file=sys.stderr)


def is_path(name):
    """Whether a data set's name is a path: it begins with ~ or a drive, has a separator, or is . or .. ."""
    drive, separators = os.path.splitdrive(name)[0], {os.sep, os.altsep or os.sep}
    return bool(drive) or name.startswith("~") or name in (".", "..") or not separators.isdisjoint(name)


def expanded(path):
    """A path as it was typed, ~ put in full."""
    return Path(os.path.expanduser(path))


def on_disk(path):
    """The path itself, or where there is none the entry of its folder that Unicode takes for the same name:
    archives from macOS have Hangul decomposed (NFD), and a keyboard gives it composed."""
    path = expanded(path)
    if os.path.exists(path) or not os.path.isdir(path.parent) or str(path).isascii():
        return path
    name = unicodedata.normalize("NFC", path.name)
    return next((entry for entry in sorted(path.parent.iterdir())
                 if unicodedata.normalize("NFC", entry.name) == name), path)


def is_there(name):
    """Whether find(name) finds a folder."""
    try:
        return bool(find(name))
    except ConfigError:
        return False


def tokenizer_place(name):
    """What --tokenizer names, for vocabulary.chosen: a kind as it is, a data set or a pretrained model as its
    path."""
    if name in TOKENIZERS:
        return name
    return os.path.abspath(expanded(name) if is_model(expanded(name)) else find(name))


def how_to_make(name):
    return ("type `python train.py config/train_pylib.py` for the built-in data, or "
            f"`python data/prepare.py --input=FILE.txt --name={name or 'NAME'}` for a text of your own")


def prepare_if_missing(dataset, download=False):
    """find(dataset), once the folder's own prepare.py has made train.bin and val.bin if either is missing.
    One that says DOWNLOAD = "24 GB", more than 100 MB, does so only where `download` allows it."""
    folder = find(dataset)
    lacks = f"{folder} has no {' and no '.join(missing_files(folder))}"
    if not missing_files(folder):
        return folder
    script = folder / "prepare.py"
    require(script.is_file(), f"{lacks} and no prepare.py to make it; {how_to_make(folder.name)}")
    if wait_for_other(folder) and not missing_files(folder):
        return folder
    size = re.search(r'^DOWNLOAD = "(.+)"', script.read_text(encoding="utf-8", errors="replace"), re.M)
    require(download or not size, f"{lacks}, and its text is a download of {size and size[1]}: type "
            f"python {os.path.relpath(script)}, or --download=True; the built-in data takes none: python "
            "train.py")
    print(f"{lacks}: running {script}", flush=True)
    child = subprocess.run([sys.executable, str(script)], check=False, stderr=subprocess.PIPE,
                           text=True, errors="replace")
    last = (child.stderr.strip().splitlines() or [f"status {child.returncode} and no message"])[-1]
    if child.returncode and BUSY in last:       # another process was faster by a moment
        wait_for_other(folder)
        return prepare_if_missing(dataset, download)
    require(child.returncode == 0, f"{script} failed: {last}")
    require(not missing_files(folder), f"{script} ended and {lacks} still")
    return folder


def prepare_sources(dataset, download=False):
    """What --dataset names -> [(folder, weight)]: one data set, or several as NAME:WEIGHT,NAME:WEIGHT."""
    sources = [(prepare_if_missing(name, download), weight) for name, weight in named(dataset)]
    folders = [folder for folder, _ in sources]
    require(len(set(folders)) == len(folders), f"dataset='{dataset}' names a data set twice: "
                                               "give it one weight")
    return sources


def sources_or_random(dataset, vocab_size, block_size, lacking):
    """As prepare_sources, but nothing is prepared: where a data set is not here, random tokens of a temporary
    folder stand for it, and its name goes into the list `lacking`. vocab_size: theirs; 0: what its prepare.py
    says in a line VOCAB_SIZE = N, else GPT-2's."""
    sources = []
    for name, weight in named(dataset):
        folder = find(name) if is_there(name) else Path(name)
        if not os.path.isdir(folder) or missing_files(folder):
            lacking.append(name)
            folder = random_tokens(vocab_size or said_size(folder) or 50304, block_size)
        sources.append((folder, weight))
    return sources


def said_size(folder):
    """The vocabulary that a folder's prepare.py makes, 0 where it does not say."""
    try:
        said = (folder / "prepare.py").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    found = re.search(r"^VOCAB_SIZE = (\d+)", said, re.M)
    return int(found[1]) if found else 0


def random_tokens(vocab_size, block_size):
    """A temporary folder with a few windows of random ids, until this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="random-tokens-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    dtype = DTYPES[dtype_for(vocab_size)]
    ids = np.random.default_rng(0).integers(vocab_size, size=4 * block_size + 4).astype(dtype)
    for split in SPLITS:
        ids.tofile(folder / f"{split}.bin")
    (folder / "meta.json").write_text(json.dumps({"vocab_size": vocab_size, "dtype": dtype_for(vocab_size)}))
    return folder


def named(dataset):
    """[(name or path, weight)] of what --dataset names; a weight that is not given is 1."""
    found = []
    for word in dataset.split(","):
        name, _, weight = word.rpartition(":")
        name, weight = (name, float(weight)) if re.fullmatch(r"\d+(\.\d+)?", weight) and name else (word, 1.0)
        require(weight > 0, f"dataset='{dataset}': the weight of '{name}' must be above 0")
        found.append((name, weight))
    return found


def common_meta(sources):
    """The meta of [(folder, weight)], whose tokenizers must be the same; its vocab_size is the largest."""
    first, *others = metas = [meta_of(folder) for folder, _ in sources]
    for (folder, _), meta in zip(sources[1:], others):
        require_same(described(first), described(meta), f"{sources[0][0]} and {folder}",
                     "prepare one of them with the other's tokenizer, --tokenizer=FOLDER")
    sizes = [meta["vocab_size"] for meta in metas if "vocab_size" in meta]
    return first | ({"vocab_size": max(sizes)} if sizes else {})


def missing_files(folder):
    return [f"{split}.bin" for split in SPLITS if not (folder / f"{split}.bin").is_file()]


# ------------------------------------------------------------------------------------------------------------
# one preparation of a folder at a time

LOCK = "preparing.lock"         # which process prepares the folder
SAYS = {"pid", "born", "host", "boot", "space", "machine"}
BUSY = "is being prepared by process"
HELD = set()                    # the locks of this process


@contextlib.contextmanager
def locked(folder):
    """Inside, no other process prepares the folder; where one does already, that is a ConfigError.

    The lock of a process that was killed is taken over, and a line says so.
    """
    path = Path(folder).resolve() / LOCK
    while True:
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            break
        except FileExistsError:
            owner = read_lock(path)
            if owner is not None:
                require(not runs(owner, path), f"{folder} {busy(owner, path)}")
                print(f"{path} is from process {owner.get('pid', '?')}, which has ended: removed", flush=True)
                remove_lock(path, owner)
    HELD.add(path)
    try:
        with os.fdopen(file, "w", encoding="utf-8") as stream:
            json.dump({"pid": os.getpid(), "born": born(os.getpid()) or "", **machine()}, stream)
        yield
    finally:
        HELD.discard(path)
        path.unlink(missing_ok=True)


def busy(owner, path):
    return (f"{BUSY} {owner.get('pid')} on {owner.get('host')}: wait for it, or remove {path} if that "
            "process is no more")


def read_lock(path):
    """What a lock says; {} if that cannot be read, None if it is gone. One still empty gets a moment."""
    for _ in range(10):
        try:
            owner = json.loads(path.read_text(encoding="utf-8"))
            return owner if isinstance(owner, dict) else {}
        except FileNotFoundError:
            return None
        except (ValueError, OSError):
            time.sleep(0.05)
    return {}


def remove_lock(path, owner):
    """Remove the lock of `owner`, unless another process was faster and has put its own in place."""
    aside = path.with_name(f"{LOCK}.{os.getpid()}.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        if read_lock(aside) != owner:
            with contextlib.suppress(OSError):
                os.link(aside, path)
        aside.unlink()


def runs(owner, path):
    """Whether the process that a lock names may still prepare; of another machine's that cannot be known."""
    if not SAYS <= owner.keys() or type(owner["pid"]) is not int:
        return bool(owner)
    if owner["pid"] == os.getpid() and fate(owner) == "alive":
        return path in HELD
    return fate(owner) != "gone"


def wait_for_other(folder):
    """Wait while another process prepares the folder -> whether one did."""
    path, waited = Path(folder).resolve() / LOCK, False
    while (owner := read_lock(path)) is not None and runs(owner, path):
        if not waited:
            print(f"{folder} {busy(owner, path)}; waiting", flush=True)
        waited = True
        time.sleep(0.2)
    return waited


# ------------------------------------------------------------------------------------------------------------
# writing

def write_dataset(folder, splits, tokenizer, source):
    """Write train.bin, val.bin and meta.json -> the meta dict.

    splits: {"train": pieces, "val": pieces}, each an iterable of sequences of token ids, of which one is in
    memory at a time; source: free text on where the data comes from. Nothing in `folder` changes before every
    token is safely on disk. meta.json goes in place before the token files: without it they would be taken
    for GPT-2's, whereas check() and prepare_if_missing() notice a new meta.json beside old or no token files.
    """
    folder, dtype = Path(folder), DTYPES[dtype_for(tokenizer.vocab_size)]
    texts = text_files(new_meta(tokenizer, source))
    names = [*texts, *(f"{split}.bin" for split in splits)]
    staged = {name: folder / f"{name}.{os.getpid()}.tmp" for name in names}
    meta = new_meta(tokenizer, source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            for split, pieces in splits.items():
                block = as_bytes(pieces, tokenizer.vocab_size, dtype)
                size, sha256 = write_blocks(staged[f"{split}.bin"], block)
                require(size, f"no tokens for {split}.bin from {source}: the text is too short to be split")
                meta["tokens"][split], meta["sha256"][split] = size // dtype.itemsize, sha256
            for name, content in text_files(meta).items():
                write_blocks(staged[name], [content])
            for name, temporary in staged.items():
                os.replace(temporary, folder / name)
    except OSError as error:
        where = error.filename or folder
        raise ConfigError(f"{where} could not be read or written: {error.strerror}") from error
    finally:
        for temporary in staged.values():
            if temporary.exists():
                temporary.unlink()
    return meta


def new_meta(tokenizer, source):
    """The dict of a meta.json whose counts and hashes are still to come."""
    return {"format": 1, **tokenizer.meta(), "vocab_size": tokenizer.vocab_size,
            "dtype": dtype_for(tokenizer.vocab_size), "tokens": {}, "sha256": {}, "source": source}


def text_files(meta):
    """What a meta dict becomes on disk -> {file name: bytes}; a vocabulary of byte pairs is a file of its
    own."""
    own = meta.keys() & {"bpe", "hf"}
    files = {"meta.json": json.dumps({k: v for k, v in meta.items() if k not in own}, indent=1).encode()}
    return files | ({"tokenizer.json": from_meta(meta).file()} if own else {})


def dtype_for(vocab_size):
    """The name of the type that stores ids of this vocabulary."""
    return "uint16" if vocab_size <= 65536 else "uint32"


def as_bytes(pieces, vocab_size, dtype):
    """Each sequence of ids as the bytes on disk; an id that the type could only store wrapped is an error."""
    for ids in map(np.asarray, pieces):
        if ids.size:
            require(0 <= ids.min() and ids.max() < vocab_size,
                    f"the tokenizer gave ids {ids.min()} to {ids.max()}, its vocabulary has {vocab_size}")
            yield ids.astype(dtype).tobytes()


def write_blocks(path, blocks):
    """Write blocks of bytes and wait until they are on disk -> (number of bytes, sha256)."""
    sha, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for block in blocks:
            file.write(block)
            sha.update(block)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    return size, sha.hexdigest()


# ------------------------------------------------------------------------------------------------------------
# a text file as a data set

def write_text(folder, path, kind, val_fraction, vocab_size=0):
    """Encode the text file `path` with a tokenizer of this kind, or of this folder -> the meta dict.

    The last val_fraction of the characters is for validation and each part is encoded by itself, as in
    nanoGPT. The file is read three times, so that memory does not grow with it.
    """
    length, chars = survey(path)
    cut = int(length * (1 - val_fraction))
    learned_from = (lambda: [chars]) if kind == "char" else lambda: whole_words(between(path, 0, cut))
    return write_encoded(folder, path, vocabulary.chosen(kind, learned_from, vocab_size), length, cut)


def write_encoded(folder, path, tokenizer, length, cut):
    """Encode a text file of so many characters with a tokenizer; those from `cut` on are for validation
    -> the meta dict."""
    splits = {split: map(tokenizer.encode, whole_words(between(path, start, stop)))
              for split, start, stop in (("train", 0, cut), ("val", cut, length))}
    return write_dataset(folder, splits, tokenizer, text_source(path))


def text_source(path):
    """What the meta.json of a text says of where it comes from: the file's name and bytes."""
    path, sha = expanded(path), hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                sha.update(block)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    return f"text file {path.name}, sha256 {sha.hexdigest()}"


def report(folder, meta, seconds):
    """Print one line on what was written, and before it, of documents, which were kept and which were not."""
    train, val = meta["tokens"]["train"], meta["tokens"]["val"]
    megabytes = (train + val) * DTYPES[meta["dtype"]].itemsize / 1e6
    if "documents" in meta:
        files = "files" in meta and f"{meta['files']:,} files read, {len(meta['left_out']):,} left out; "
        print(f"{files or ''}{meta['documents']:,} documents kept{dropped(meta)}")
    print(f"{folder}: train {train:,} tokens, val {val:,}, vocabulary {meta['vocab_size']:,} "
          f"({meta['tokenizer']}), {megabytes:.1f} MB, {seconds:.1f} s")


def dropped(meta):
    """In words which documents were dropped and why, the first of each kind by its place."""
    kinds = [f"{entry['count']:,} {reason} ({'; '.join(entry['first'][:3])})"
             for reason, entry in meta["dropped"].items()]
    return f", {meta['passed_over']:,} dropped: {', '.join(kinds)}" if kinds else ", none dropped"


def tell_decomposed(what):
    print(f"note: {what} letters that are spelled in parts (NFD, as macOS writes names); they are encoded as "
          "they are, and composed text (NFC) has other tokens", flush=True)


def survey(path):
    """(number of characters, set of the characters) of a text file."""
    length, chars, decomposed = 0, set(), False
    for piece in text_pieces(path):
        length += len(piece)
        chars.update(piece)
        decomposed = decomposed or is_decomposed(piece)
    if decomposed:
        tell_decomposed(f"{path} has")
    require(length, f"{path} is empty: expected a text")
    require("\0" not in chars, f"{path} holds NUL bytes and looks binary: expected a text in UTF-8; "
            f"{inputs.converted(path, inputs.likely_encoding(path))}")
    return length, chars


def text_pieces(path):
    """The text of a UTF-8 file, unpacked if it is a .gz or .zst, in pieces; every line end becomes a newline,
    a byte order mark is dropped."""
    path = expanded(path)
    require(os.path.exists(path), f"input file {path} does not exist")
    require(os.path.isfile(path), f"{path} is no plain file, and a text is read several times: save it")
    try:
        with io.TextIOWrapper(inputs.opened(path), encoding="utf-8-sig") as file:
            while piece := file.read(TEXT_CHUNK):
                yield piece
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8: it {inputs.not_utf8(path, error)}") from error
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or inputs.first_line(error)
        raise ConfigError(f"{path} cannot be read: {why}") from error


def between(path, start, stop):
    """Characters start to stop - 1 of a text file, in pieces."""
    at = 0
    for piece in text_pieces(path):
        yield piece[max(0, start - at):max(0, stop - at)]
        at += len(piece)


def whole_words(pieces):
    """The same text, cut only before a single space or line end that has other characters on both sides.

    GPT-2 splits there in any case, so encoding the pieces gives the ids of the whole text.
    """
    parts, end = [], ""                         # a word that never ends is put together once
    for piece in pieces:
        parts.append(piece)
        seen, end = end + piece, (end + piece)[-2:]
        if re.search(r"\S[ \n]\S", seen):
            text = "".join(parts)
            cut = re.match(r"(?s).*\S(?=[ \n]\S)", text).end()
            yield text[:cut]
            parts = [text[cut:]]
    yield "".join(parts)


def text_file(given, folder, url, sha256):
    """The text to prepare: the file the user gave, else input.txt in `folder`, downloaded if missing."""
    path = expanded(given or Path(folder) / "input.txt")
    if not given and not path.is_file():
        download(url, path, sha256)
    return path


def download(url, path, sha256, timeout=10):
    """Fetch a file that fits memory and whose hash is known; ConfigError when offline or when something else
    comes back. timeout: seconds without a byte."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    instead = f"get the text another way and type python {sys.argv[0]} --input=FILE"    # train.py says it too
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            body = answer.read()
        found = hashlib.sha256(body).hexdigest()
        require(found == sha256, f"{url} gave other content than expected, starting {body[:20]!r}: {instead}")
        write_blocks(temporary, [body])
        os.replace(temporary, path)
    except (OSError, http.client.HTTPException) as error:
        raise ConfigError(f"{url} could not be downloaded to {path} ({error}): {instead}") from error


# ------------------------------------------------------------------------------------------------------------
# checking

def check(folder, block_size, vocab_size):
    """Refuse data that would fail or mislead later -> {"train": number of tokens, "val": number of tokens}.

    block_size: tokens of context; vocab_size: rows of the model's embedding, at least the data's vocabulary.
    Raises ConfigError with the file, the position, what was found and what was expected. Reads SCAN_BYTES
    of a file for the ids and, unless the file is larger, for the hash.
    """
    folder, meta = Path(folder), meta_of(folder)
    dtype = stored_dtype(folder, meta, vocab_size)
    check_vocabulary(folder, meta, vocab_size)
    return {s: check_split(folder / f"{s}.bin", meta, dtype, block_size, vocab_size) for s in SPLITS}


def stored_dtype(folder, meta, vocab_size):
    """The numpy type of the token files: as meta says, else as nanoGPT would have chosen."""
    name = meta.get("dtype", dtype_for(meta.get("vocab_size", vocab_size)))
    require(name in DTYPES, f"{folder}/meta.json: dtype is {name!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def check_vocabulary(folder, meta, vocab_size):
    """The tokenizer, the vocabulary that meta names and the model's must fit each other."""
    size = meta.get("vocab_size", vocab_size)
    require(size <= vocab_size, f"the model's vocabulary is {vocab_size}, expected {size} or more for the "
                                f"data in {folder}: take the data that the model was made for")
    if "tokenizer" in meta:
        own = from_meta(meta).vocab_size
        require(own == size, f"the meta file in {folder}: tokenizer '{meta['tokenizer']}' has {own} ids, "
                             f"vocab_size is {size}, expected the same: {AGAIN}")


def check_split(path, meta, dtype, block_size, vocab_size):
    """check() for one file -> its number of tokens."""
    tokens = count_tokens(path, dtype, block_size)
    expected = meta.get("tokens", {}).get(path.stem, tokens)
    require(tokens == expected, f"{path} holds {tokens} {dtype} tokens, meta.json says {expected}: {AGAIN}")
    try:
        check_ids(path, dtype, tokens, vocab_size)
        check_hash(path, meta.get("sha256", {}).get(path.stem))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    return tokens


def count_tokens(path, dtype, block_size):
    """The number of tokens in a file; ConfigError unless it is there, is whole and holds one window."""
    require(path.is_file(), f"{path} is missing: {how_to_make(path.parent.name)}")
    size, item = path.stat().st_size, dtype.itemsize
    require(size, f"{path} is empty, expected at least {block_size + 1} tokens: {AGAIN}")
    require(size % item == 0, f"{path} has {size} bytes, expected a multiple of {item} ({dtype}): it ends "
                              f"inside token {size // item}; {AGAIN}")
    tokens = size // item
    longest = min(file.stat().st_size // item for file in path.parent.glob("*.bin")) - 1     # of any split
    shorter = f"type --block_size={longest} or " * (longest > 0)
    require(tokens > block_size, f"{path} holds {tokens} token{'s' * (tokens != 1)}, expected block_size + 1 "
                                 f"= {block_size + 1} or more: {shorter}prepare a longer text")
    return tokens


def check_ids(path, dtype, tokens, vocab_size):
    """Every id (in a huge file: in evenly spaced chunks) is in the vocabulary and none is half a number."""
    starts = np.arange(0, tokens, SCAN_CHUNK)
    count = min(len(starts), max(1, SCAN_BYTES // (SCAN_CHUNK * dtype.itemsize)))
    for start in starts[np.linspace(0, len(starts) - 1, count).astype(int)]:
        ids = np.fromfile(path, dtype, SCAN_CHUNK, offset=int(start) * dtype.itemsize)
        check_range(ids, start, path, vocab_size)
        halves = len(ids) >= 32 and ids[::2].any() and not ids[1::2].any()
        require(not halves, f"{path}: every second token from position {start + 1} is 0, as in a file of "
                            f"wider numbers, expected {dtype}: {AGAIN}")


def check_range(ids, start, path, vocab_size):
    """ConfigError at the first of `ids`, read from position `start` of the file, outside the vocabulary."""
    if ids.max() >= vocab_size:
        bad = int(np.argmax(ids >= vocab_size))
        raise ConfigError(f"{path}: token {ids[bad]} at position {start + bad} is outside the vocabulary, "
                          f"expected 0 to {vocab_size - 1}: the file is damaged or ill-matched; {AGAIN}")


def check_hash(path, expected):
    """The content is what was written, if meta.json has its hash and the file is not too large to read."""
    if expected is None or path.stat().st_size > SCAN_BYTES:
        return
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    found = sha.hexdigest()
    require(found == expected, f"{path} has changed since it was written: its sha256 starts {found[:12]}, "
                               f"meta.json says {str(expected)[:12]}: {AGAIN}")


# ------------------------------------------------------------------------------------------------------------
# batches

class TokenStream:
    """Batches of one split without a position to save: batch number `index` is always the same one.

    Rows are numbered through the run, row b of batch i is number i * batch_size + b, and the number alone
    decides which sample it is. So a resumed run, each rank (ranks take different batches) and an evaluation
    see the same data whatever happened before, and a checkpoint needs no position but its iteration.

    sampling="random": drawn uniformly with replacement over every window of the file, as in nanoGPT, by a
    generator whose key is (seed, split) and whose counter is the batch. "epoch": without replacement; the
    file is cut into windows side by side, and each epoch deals all of them in an order of its own.
    documents: a sample stays in one document, of which the windows are cut from its beginning; what follows
    the document's end is neither read nor predicted (target -1). Costs 8 bytes of memory a window, and the
    rest of a window behind a short document.
    """

    def __init__(self, folder, split, block_size, batch_size, seed, vocab_size=None, sampling="random",
                 documents=False):
        """vocab_size: a batch with an id that is not below it raises ConfigError (None: no check)."""
        require(sampling in SAMPLINGS, f"sampling='{sampling}'{close_match(sampling, SAMPLINGS)}; expected "
                                       f"one of {', '.join(SAMPLINGS)}")
        meta = meta_of(folder)
        self.path, self.dtype = Path(folder) / f"{split}.bin", stored_dtype(folder, meta, vocab_size or 0)
        self.tokens = count_tokens(self.path, self.dtype, block_size)
        self.key = np.array([seed % 2**64, SPLITS.index(split)], np.uint64)
        self.batch_size, self.window = batch_size, np.arange(block_size + 1)
        self.vocab_size = vocab_size or 2**32
        self.end = end_of_document(meta, folder) if documents else None
        self.starts = document_windows(self.path, self.dtype, self.end, block_size) if documents else None
        self.numbers = {"random": self.drawn, "epoch": self.dealt}[sampling]
        self.stride = 1 if sampling == "random" or documents else block_size

    @property
    def samples(self):
        """How many there are to choose from."""
        if self.starts is not None:
            return len(self.starts)
        return (self.tokens - len(self.window)) // self.stride + 1

    def offsets(self, index):
        """Where the rows of a batch start: (batch_size,) integers in [0, tokens - block_size)."""
        return self.begins(index * self.batch_size, self.batch_size)

    def begins(self, first, count):
        """Where the windows of the rows first .. first + count - 1 start: (count,) integers."""
        return self.numbers(first, count) if self.starts is None else self.starts[self.numbers(first, count)]

    def drawn(self, first, count):
        """Samples of rows, drawn with replacement."""
        # Philox's raw bits, unlike Generator.integers, are promised to stay the same in every numpy. The
        # batch is the counter's top word, so no two batches share bits. The modulo's
        # bias is below samples / 2**64.
        batch, skipped = divmod(first, self.batch_size)
        batches = range(batch, (first + count - 1) // self.batch_size + 1)
        bits = np.concatenate([random_bits(self.key, index, self.batch_size) for index in batches])
        return bits[skipped:skipped + count] % np.uint64(self.samples)

    def dealt(self, first, count):
        """Samples of rows, without replacement; every epoch has another order, and windows that are cut
        elsewhere by the tokens that are left over."""
        epochs, places = np.divmod(np.arange(first, first + count), self.samples)
        out = np.empty(count, np.uint64)
        for epoch in np.unique(epochs):
            rows, bits = epochs == epoch, random_bits(self.key, epoch, 5)
            slack = self.tokens - (self.samples - 1) * self.stride - len(self.window) + 1
            shift = 0 if self.starts is not None else bits[4] % np.uint64(slack)
            out[rows] = shuffled(places[rows], self.samples, bits[:4]) * np.uint64(self.stride) + shift
        return out

    def batch(self, index):
        """(x, y), each (batch_size, block_size) int64; y is x one token later, -1 behind a document's end."""
        return self.rows(index * self.batch_size, self.batch_size)

    def rows(self, first, count):
        """(x, y) of the rows first .. first + count - 1."""
        import torch  # here, because preparing data needs no torch

        # mapped anew for each batch: the pages that a map has touched count as our memory until it closes
        file = np.memmap(self.path, self.dtype, "r", shape=(self.tokens,))
        starts = self.begins(first, count).astype(np.int64)
        places = starts[:, None] + self.window
        ids = file[np.minimum(places, self.tokens - 1)]
        if ids.max() >= self.vocab_size:
            row = int(np.argmax(ids.max(axis=1) >= self.vocab_size))
            check_range(ids[row], int(starts[row]), self.path, self.vocab_size)
        x, y = ids[:, :-1].astype(np.int64), ids[:, 1:].astype(np.int64)
        if self.starts is not None:
            ended = np.cumsum(x == self.end, axis=1) > 0
            x[ended], y[ended | (places[:, 1:] >= self.tokens)] = self.end, -1
        return torch.from_numpy(x), torch.from_numpy(y)

    def epochs(self, rows):
        """{data set: passes over it} after so many rows."""
        return {self.path.parent.name: rows / self.samples}


SAMPLINGS = ("random", "epoch")


class Mixture:
    """Batches of several data sets by weight. Row r of the run belongs to the data sets in such turns that
    after any number of rows each has its share of them, give or take one: nothing is drawn, nothing saved."""

    def __init__(self, streams, weights):
        self.streams, self.batch_size = streams, streams[0].batch_size
        self.weights = [round(weight / sum(weights) * 2**20) for weight in weights]

    @property
    def tokens(self):
        return sum(stream.tokens for stream in self.streams)

    def taken(self, rows):
        """How many of the first `rows` rows each data set gives."""
        counts, left, weight = [], rows, sum(self.weights)
        for own in self.weights[:-1]:
            counts.append(left * own // weight if weight else 0)
            left, weight = left - counts[-1], weight - own
        return [*counts, left]

    def batch(self, index):
        """(x, y) as TokenStream.batch gives them."""
        import torch

        before, after = (self.taken(rows * self.batch_size) for rows in (index, index + 1))
        parts = [stream.rows(first, end - first) for stream, first, end in zip(self.streams, before, after)
                 if end > first]
        return tuple(torch.cat(side) for side in zip(*parts))

    def epochs(self, rows):
        return {name: passes for stream, own in zip(self.streams, self.taken(rows))
                for name, passes in stream.epochs(own).items()}


def open_stream(sources, *args, **keys):
    """The TokenStream of [(folder, weight)], or the Mixture of several."""
    streams = [TokenStream(folder, *args, **keys) for folder, _ in sources]
    return Mixture(streams, [weight for _, weight in sources]) if len(streams) > 1 else streams[0]


def held_out(val, settings, tokenizer, block_size, vocab_size):
    """The validation stream of what --val says: True, the data that a run's `settings` name; or a data set.
    It is prepared already. tokenizer: the run's, as a checkpoint describes it, or None. A ConfigError where
    the data are not here, or another's."""
    name = settings.get("dataset") if val is True else val
    again = "type --val=FOLDER of the data that it was trained on"
    require(isinstance(name, str) and name, f"val=True: the checkpoint names no data; {again}")
    try:
        sources = [(find(one), weight) for one, weight in named(name)]
    except ConfigError as error:
        require(val is not True, f"val=True: the checkpoint's data, dataset='{name}', are not here; {again}")
        raise error
    for folder, _ in sources:
        require(not missing_files(folder), f"val: {folder} has no {' and no '.join(missing_files(folder))}; "
                                           "prepare it first, or name another folder")
        if isinstance(tokenizer, dict):
            require_same(tokenizer, described(meta_of(folder)), f"the checkpoint and {folder}", again)
    return open_stream(sources, "val", block_size, 8, seed=0, vocab_size=vocab_size)


def training_text(settings, folder, count, block_size, vocab_size):
    """Rows of ids (B, block_size) of the training data that `folder` or else a run's `settings` name, about
    `count` ids, and where they are. A ConfigError where the data are not here, or another model's."""
    name = settings.get("dataset") if isinstance(settings, dict) else None
    require(folder or (isinstance(name, str) and name), "the checkpoint names no data")
    place = find(folder or named(name)[0][0])
    stream = TokenStream(place, "train", block_size, max(1, count // block_size), 0, vocab_size)
    return stream.batch(0)[0], place


def random_bits(key, index, count):
    """(count,) uint64 that (key, index) decide; no two indices share any."""
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, index], np.uint64)).random_raw(count)


def shuffled(places, count, keys):
    """Where a permutation of range(count) that the keys (four uint64) choose sends each place.

    A Feistel network on the even number of bits that holds count; what falls outside goes through again
    (Black and Rogaway 2002). So an epoch's order costs no memory, and no place needs the ones before.
    """
    half = np.uint64(max(1, (int(count - 1).bit_length() + 1) // 2))
    mask, out = (np.uint64(1) << half) - np.uint64(1), places.astype(np.uint64)
    outside = np.ones(len(out), bool)
    while outside.any():
        left, right = out[outside] >> half, out[outside] & mask
        for key in keys:
            left, right = right, left ^ (mixed(right + key) & mask)
        out[outside] = left << half | right
        outside = out >= count
    return out


def mixed(x):
    """uint64 whose bits all depend on all bits of x (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def end_of_document(meta, folder):
    """The id that ends a document in this data."""
    end = from_meta(meta if "tokenizer" in meta else {"tokenizer": "gpt2"}).end_of_text
    require(end is not None, f"documents=True, but the data in {folder} has no token that ends a document: "
                             "prepare it from .jsonl, .parquet or a folder, or leave --documents out")
    return end


def document_windows(path, dtype, end, block_size):
    """Where the windows of every document start: (windows,) int64; none crosses a document's end."""
    size, ends = path.stat().st_size // dtype.itemsize, []
    for start in range(0, size, SCAN_CHUNK):
        ids = np.fromfile(path, dtype, SCAN_CHUNK, offset=start * dtype.itemsize)
        ends.append(np.flatnonzero(ids == end) + start)
    ends = np.concatenate([*ends, [size - 1]])              # the last document may lack its end
    begins = np.concatenate(([0], ends[:-1] + 1))
    counts = np.maximum(0, -(-(ends - begins) // block_size))
    before = np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(begins, counts) + block_size * (np.arange(counts.sum()) - before)
    require(len(starts), f"{path} has no document of two tokens or more: {AGAIN}")
    return starts
