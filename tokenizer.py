"""Text to token ids and back: bytes, the characters of one text, or GPT-2's byte pairs.

Every tokenizer has encode(str) -> list of ids, decode(ids) -> str, token_bytes(id) -> bytes, vocab_size, and
meta() -> the JSON-able dict from which from_meta() rebuilds it. Data sets and checkpoints carry that dict, so
text is always read and written with the vocabulary it was trained with.
"""
import codecs
import functools
import json
import os
import pickle
from pathlib import Path

from configurator import ConfigError, close_match, require

BPE_FOLDER = Path(__file__).resolve().parent / "data" / "gpt2_bpe"
BPE_SHA256 = {"vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
              "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"}
# how GPT-2 cuts text into words before merging bytes (Radford et al. 2019)
BPE_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END_OF_TEXT = "<|endoftext|>"


class ByteTokenizer:
    """A token is one byte of UTF-8: any text, no vocabulary file, 256 ids."""
    vocab_size = 256

    def encode(self, text):
        return list(utf8(text))

    def decode(self, ids):
        return bytes(known(ids, self.vocab_size)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id):
        return bytes(known([token_id], self.vocab_size))

    def meta(self):
        return {"tokenizer": "byte"}


class CharTokenizer:
    """A token is one character: chars[i] has id i. New vocabularies are sorted."""

    def __init__(self, chars):
        singles = isinstance(chars, list) and chars and all(isinstance(c, str) and len(c) == 1 for c in chars)
        require(singles, f"a character vocabulary is a list of single characters, found {str(chars)[:60]!r}")
        require(len(set(chars)) == len(chars), "a character vocabulary has no character twice, found one")
        self.chars = list(chars)
        self.ids = {char: i for i, char in enumerate(chars)}
        self.vocab_size = len(chars)

    def encode(self, text):
        try:
            return [self.ids[char] for char in text]
        except KeyError as missing:
            raise ConfigError(f"character {missing} (U+{ord(missing.args[0]):04X}) is not among the "
                              f"{self.vocab_size} characters of this vocabulary: leave it out, or use data "
                              "made with --tokenizer=byte") from None

    def decode(self, ids):
        return "".join(self.chars[i] for i in known(ids, self.vocab_size))

    def token_bytes(self, token_id):
        return utf8(self.decode([token_id]))

    def meta(self):
        return {"tokenizer": "char", "chars": self.chars}


class GPT2Tokenizer:
    """GPT-2's 50,257 byte pairs by tiktoken, loaded at the first use: training needs only vocab_size.

    Offline, the files encoder.json and vocab.bpe are read from the folder that the environment variable
    NANOCORTEX_GPT2_BPE names, or from data/gpt2_bpe.
    """
    vocab_size = 50257

    @functools.cached_property
    def bpe(self):
        return load_bpe()

    def encode(self, text, allow_special=False):
        """The ids; '<|endoftext|>' is plain text unless allow_special makes it the one token 50256."""
        utf8(text)
        allowed = {END_OF_TEXT} if allow_special else set()
        return self.bpe.encode(text, allowed_special=allowed, disallowed_special=())

    def decode(self, ids):
        ids = known(ids, self.vocab_size)
        return self.bpe.decode(ids, errors="replace")

    def token_bytes(self, token_id):
        [token_id] = known([token_id], self.vocab_size)
        return self.bpe.decode_single_token_bytes(token_id)

    def meta(self):
        return {"tokenizer": "gpt2"}


TOKENIZERS = {"byte": ByteTokenizer, "char": CharTokenizer, "gpt2": GPT2Tokenizer}


def from_meta(meta):
    """The tokenizer that wrote `meta` (a dict with "tokenizer" and, for characters, "chars")."""
    kind = meta.get("tokenizer")
    require(isinstance(kind, str) and kind in TOKENIZERS,
            f"unknown tokenizer {kind!r}{close_match(str(kind), TOKENIZERS)}; "
            f"expected one of {', '.join(TOKENIZERS)}")
    return TOKENIZERS[kind](meta.get("chars")) if kind == "char" else TOKENIZERS[kind]()


def load(folder):
    """The tokenizer of a data folder: as its meta.json or meta.pkl says, GPT-2's where there is neither."""
    meta = meta_of(folder) or {"tokenizer": "gpt2"}
    require("tokenizer" in meta, f"the meta file in {folder} names no tokenizer: expected \"tokenizer\" in "
                                 "meta.json, or stoi and itos in meta.pkl")
    return from_meta(meta)


def meta_of(folder):
    """What is known of the data in `folder`: meta.json's dict, nanoGPT's meta.pkl in the same form, or {}.

    Raises ConfigError where the file cannot be read, has a field of the wrong type, or wants to run code.
    """
    for name, read in (("meta.json", read_json), ("meta.pkl", read_pickle)):
        path = Path(folder) / name
        if path.is_file():
            return typed(read(path), path)
    return {}


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"{path} is not readable JSON ({error}): prepare the data set again") from error


def read_pickle(path):
    """nanoGPT's meta.pkl ({'vocab_size', 'stoi', 'itos'}) as the dict of a meta.json."""
    try:
        with open(path, "rb") as file:
            old = DataUnpickler(file).load()
    except ConfigError as error:
        raise ConfigError(f"{path} {error}") from None
    except Exception as error:                  # damaged pickles raise almost any type
        raise ConfigError(f"{path} is not a readable pickle ({type(error).__name__}): "
                          "prepare the data set again") from error
    require(isinstance(old, dict), f"{path} holds a {type(old).__name__}, expected a dict")
    meta = {"vocab_size": old["vocab_size"]} if "vocab_size" in old else {}
    return meta | (character_meta(old, path) if "stoi" in old else {})


class DataUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists and dicts. A pickle that names a function or class is refused."""

    def find_class(self, module, name):
        raise ConfigError(f"wants to import {module}.{name}, and a vocabulary needs no code: it is refused; "
                          "prepare the data set again and trust no file from there")


def character_meta(old, path):
    """The characters of nanoGPT's stoi/itos in the order of their ids, whatever that order is."""
    stoi = old["stoi"]
    require(isinstance(stoi, dict) and sorted(stoi.values(), key=str) == sorted(range(len(stoi)), key=str),
            f"{path}: the ids in stoi must be 0 to n-1, each one once")
    chars = sorted(stoi, key=stoi.get)
    itos = dict(enumerate(chars))
    require(old.get("itos", itos) == itos, f"{path}: stoi and itos contradict each other")
    return CharTokenizer(chars).meta()


def typed(meta, path):
    """`meta` with the type of every field that others rely on checked."""
    require(isinstance(meta, dict), f"{path} holds a {type(meta).__name__}, expected named fields")
    kinds = {"vocab_size": int, "tokenizer": str, "chars": list, "dtype": str, "tokens": dict, "sha256": dict}
    for key, kind in kinds.items():
        value = meta.get(key, kind())
        require(type(value) is kind, f"{path}: {key} is {str(value)[:40]!r}, expected {kind.__name__}: "
                                     "prepare the data set again")
    size, version = meta.get("vocab_size", 1), meta.get("format", 1)
    require(size > 0, f"{path}: vocab_size is {size}, expected 1 or more: prepare the data set again")
    require(version == 1, f"{path} has format {version!r}, expected 1: prepare the data set again")
    return meta


class StreamDecoder:
    """Turns tokens into text as they come; a character that spans several tokens appears once it is whole."""

    def __init__(self, tokenizer):
        self.token_bytes = tokenizer.token_bytes
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id):
        """The text that this token completes, possibly ''."""
        return self.utf8.decode(self.token_bytes(token_id))

    def flush(self):
        """What is left at the end: '' or one U+FFFD for a character that was never completed."""
        return self.utf8.decode(b"", final=True)


def load_bpe():
    """tiktoken's GPT-2 encoding, from local files if there are any, else by its download and cache."""
    try:
        import tiktoken
    except ImportError as error:
        raise ConfigError("GPT-2's byte pairs need tiktoken: type pip install tiktoken") from error
    folder = Path(os.environ.get("NANOCORTEX_GPT2_BPE") or BPE_FOLDER)
    if "NANOCORTEX_GPT2_BPE" in os.environ or folder.is_dir():
        return local_bpe(tiktoken, folder)
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:                  # requests, proxies, TLS, full disks: each raises its own type
        raise ConfigError(f"GPT-2's vocabulary could not be downloaded ({type(error).__name__}): offline, "
                          f"put its encoder.json and vocab.bpe in {BPE_FOLDER}, or in a folder named by the "
                          "environment variable NANOCORTEX_GPT2_BPE, or use data made with --tokenizer=byte"
                          ) from error


def local_bpe(tiktoken, folder):
    """The encoding from encoder.json and vocab.bpe in `folder`; the hashes rule out any other vocabulary."""
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    try:
        ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"),
                                                BPE_SHA256["vocab.bpe"], BPE_SHA256["encoder.json"])
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} does not hold GPT-2's encoder.json and vocab.bpe: {error}") from error
    return tiktoken.Encoding("gpt2", pat_str=BPE_WORDS, mergeable_ranks=ranks,
                             special_tokens={END_OF_TEXT: 50256})


def utf8(text):
    """`text` as UTF-8 bytes; half a surrogate pair (from undecodable bytes on a command line) is an error."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"character {error.start} of the text is {text[error.start]!a}, half of a pair "
                          "and not valid Unicode: check the encoding of the input") from error


def known(ids, vocab_size):
    """`ids` (a sequence, an array or a tensor) as a list of int, all in the vocabulary, or a ConfigError."""
    ids = [int(i) for i in ids]
    outside = next((i for i in ids if not 0 <= i < vocab_size), None)
    require(outside is None, f"token {outside} is outside this tokenizer's vocabulary of {vocab_size}: the "
                             "model and the tokenizer do not belong together")
    return ids
