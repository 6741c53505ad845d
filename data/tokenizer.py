"""Text to token ids and back: bytes, the characters of one text, GPT-2's byte pairs, or ones of our own.

Every tokenizer has encode(str, allow_special) -> list of ids, decode(ids) -> str, token_bytes(id) -> bytes,
vocab_size, end_of_text (the id that ends a document, or None), and meta() -> the JSON-able dict from which
from_meta() rebuilds it. Data sets and checkpoints carry that dict, so text is always read and written with
the vocabulary it was trained with. vocabulary.py learns new ones.
"""
import codecs
import functools
import hashlib
import importlib
import itertools
import json
import os
import pickle
import re
import threading
import unicodedata
from concurrent.futures import Future
from pathlib import Path

from configurator import ConfigError, close_match, require

BPE_FOLDER = Path(__file__).resolve().parent / "gpt2_bpe"
BPE_SHA256 = {"vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
              "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"}
# how GPT-2 cuts text into words before merging bytes (Radford et al. 2019)
BPE_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END_OF_TEXT = "<|endoftext|>"
SPACES = 50_000             # in a row, which tiktoken surely cuts into words; near a million it fails
DOWNLOAD_SECONDS = 60       # a vocabulary of 1.5 MB that takes longer has not been reached
DESCRIPTION = ("tokenizer", "chars", "tokenizer_sha256", "bpe", "hf")     # what of a meta says how to encode


class ByteTokenizer:
    """A token is one byte of UTF-8: any text, no vocabulary file, 256 ids. A 0 byte ends a document."""
    vocab_size = 256
    end_of_text = 0

    def encode(self, text, allow_special=False):
        return list(utf8(text))

    def decode(self, ids):
        return bytes(known(ids, self.vocab_size)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id):
        return bytes(known([token_id], self.vocab_size))

    def meta(self):
        return {"tokenizer": "byte"}


class CharTokenizer:
    """A token is one character: chars[i] has id i. New vocabularies are sorted. A NUL among them ends a
    document."""

    def __init__(self, chars):
        singles = isinstance(chars, list) and chars and all(isinstance(c, str) and len(c) == 1 for c in chars)
        require(singles, f"a character vocabulary is a list of single characters, found {str(chars)[:60]!r}")
        require(len(set(chars)) == len(chars), "a character vocabulary has no character twice, found one")
        self.chars = list(chars)
        self.ids = {char: i for i, char in enumerate(chars)}
        self.vocab_size = len(chars)
        self.end_of_text = self.ids.get("\0")

    def encode(self, text, allow_special=False):
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


class BytePairs:
    """What tokenizers of byte pairs share: `bpe`, a tiktoken encoding, and `specials`, {text: id}."""
    specials = {END_OF_TEXT: 50256}

    @property
    def end_of_text(self):
        return self.specials[END_OF_TEXT]

    def encode(self, text, allow_special=False):
        """The ids; '<|endoftext|>' is plain text unless allow_special makes it the one token."""
        utf8(text)
        allowed = set(self.specials) if allow_special else set()
        if has_many_spaces(text):
            return self.encode_words(text, allowed)
        return self.bpe.encode(text, allowed_special=allowed, disallowed_special=())

    def encode_many(self, texts):
        """[encode(text)] on all processors."""
        texts = list(texts)
        if any(map(has_many_spaces, texts)):
            return [self.encode(text) for text in texts]
        return self.bpe.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1)

    @functools.cached_property
    def whole(self):
        """The same byte pairs for a text that is one word."""
        return need("tiktoken").Encoding("whole", pat_str=r"(?s:.+)", special_tokens={},
                                         mergeable_ranks=self.bpe._mergeable_ranks)

    def encode_words(self, text, specials=()):
        """encode(text), cut into words by a library whose stack does not grow with them."""
        regex, ids = need("regex"), []
        cut = f"({'|'.join(map(regex.escape, specials))})" if specials else r"(?!)"
        for part in regex.split(cut, text):
            words = [] if part in specials else regex.findall(BPE_WORDS, part)
            ids += [self.specials[part]] if part in specials else []
            ids += [i for word in words for i in self.whole.encode_ordinary(word)]
        return ids

    def decode(self, ids):
        ids = known(ids, self.vocab_size)
        return self.bpe.decode(ids, errors="replace")

    def token_bytes(self, token_id):
        [token_id] = known([token_id], self.vocab_size)
        return self.bpe.decode_single_token_bytes(token_id)


def has_many_spaces(text):
    """Whether so many spaces follow each other that the stack of tiktoken's regular expressions may end."""
    return len(text) > SPACES and re.search(rf"(?<!\s)\s{{{SPACES}}}", text) is not None


class GPT2Tokenizer(BytePairs):
    """GPT-2's 50,257 byte pairs by tiktoken, loaded at the first use: training needs only vocab_size.

    Offline, the files encoder.json and vocab.bpe are read from the folder that the environment variable
    NANOCORTEX_GPT2_BPE names, or from data/gpt2_bpe. ranks: {bytes: id}, where they have been read already.
    """
    vocab_size = 50257

    def __init__(self, ranks=None):
        self.ranks = ranks

    @functools.cached_property
    def bpe(self):
        return load_bpe() if self.ranks is None else gpt2_encoding(need("tiktoken"), self.ranks)

    def meta(self):
        return {"tokenizer": "gpt2"}


class TrainedTokenizer(BytePairs):
    """Byte pairs that vocabulary.py has learned, written down as tokenizer.json in the data's folder.

    vocabulary: {"tokens": [the bytes of each id as Latin-1 text], "specials": {text: id}, "extends": n,
    "base": name}. Where n is not 0 the first n ids are those of the tokenizer `base`, see name_of.
    """

    def __init__(self, vocabulary):
        fits = isinstance(vocabulary, dict) and isinstance(vocabulary.get("tokens"), list)
        require(fits, f"a vocabulary of byte pairs has a list of tokens, found {str(vocabulary)[:60]!r}")
        self.vocabulary, self.specials = vocabulary, vocabulary.get("specials")
        self.vocab_size, self.extends = len(vocabulary["tokens"]), vocabulary.get("extends", 0)
        special = isinstance(self.specials, dict) and END_OF_TEXT in self.specials
        require(special and set(self.specials.values()) <= set(range(self.vocab_size)),
                f"a vocabulary of byte pairs gives {END_OF_TEXT} an id, found {str(self.specials)[:60]!r}")
        require(type(self.extends) is int and 0 <= self.extends <= self.vocab_size,
                f"extends is {str(self.extends)[:40]!r}, expected a number of ids")

    @functools.cached_property
    def tokens(self):
        """The bytes of each id."""
        try:
            return [token.encode("latin-1") for token in self.vocabulary["tokens"]]
        except (AttributeError, UnicodeEncodeError) as error:
            raise ConfigError("a token of this vocabulary is not the bytes of a Latin-1 text") from error

    def ranks(self, count=None):
        """{bytes: id} of the tokens below `count` (None: all) that are no specials."""
        named = set(self.specials.values())
        return {token: i for i, token in enumerate(self.tokens[:count]) if i not in named}

    @functools.cached_property
    def bpe(self):
        ranks = self.ranks()
        lacks = next((b for b in range(256) if bytes([b]) not in ranks), None)
        require(lacks is None, f"byte {lacks} is no token of this vocabulary: some text has no encoding")
        require(len(ranks) + len(self.specials) == self.vocab_size, "a vocabulary has no token twice, "
                                                                    "found one")
        return need("tiktoken").Encoding(f"bpe{self.vocab_size}", pat_str=BPE_WORDS, mergeable_ranks=ranks,
                                         special_tokens=self.specials)

    def pieces(self):
        """How the vocabulary that this one extends spells each new token: lists of old ids."""
        old = self.ranks(self.extends)
        return [merge(token, old) for token in self.tokens[self.extends:]]

    def meta(self):
        return {"tokenizer": "bpe", "tokenizer_sha256": hashlib.sha256(self.file()).hexdigest(),
                "bpe": self.vocabulary}

    def file(self):
        """The bytes of tokenizer.json."""
        return json.dumps(self.vocabulary, indent=0).encode()


def merge(word, ranks):
    """The ids of the bytes `word`: of all neighbours the pair of lowest rank becomes one, over and over."""
    parts = [word[i:i + 1] for i in range(len(word))]
    while True:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        best = min(pairs, default=len(ranks))
        if best >= len(ranks):
            return [ranks[part] for part in parts]
        at = pairs.index(best)
        parts[at:at + 2] = [parts[at] + parts[at + 1]]


TOKENIZERS = {"byte": ByteTokenizer, "char": CharTokenizer, "gpt2": GPT2Tokenizer, "bpe": TrainedTokenizer}
VOCABULARY = {"char": ["chars"], "bpe": ["bpe"], "hf": ["hf"]}    # fields of a meta that one is made from


def from_meta(meta):
    """The tokenizer that wrote `meta` (a dict with "tokenizer", for characters "chars", for byte pairs of our
    own "bpe", for those of a pretrained model "hf")."""
    kind = meta.get("tokenizer")
    kinds = TOKENIZERS | {"hf": FolderTokenizer.described_by}
    require(isinstance(kind, str) and kind in kinds,
            f"unknown tokenizer {kind!r}{close_match(str(kind), TOKENIZERS)}; "
            f"expected one of {', '.join(TOKENIZERS)}")
    return kinds[kind](*[meta.get(field) for field in VOCABULARY.get(kind, ())])


def described(meta):
    """What of a data set's meta says how its text was encoded: a checkpoint keeps it."""
    return {key: meta[key] for key in DESCRIPTION if key in meta} if "tokenizer" in meta else {}


def name_of(meta):
    """A tokenizer in a few words, different ones in different words."""
    kind, size = meta["tokenizer"], len(meta.get("chars") or meta.get("bpe", {}).get("tokens", ()))
    size = meta["hf"]["ids"] if "hf" in meta else size
    sha = meta.get("tokenizer_sha256") or hashlib.sha256(json.dumps(meta.get("chars")).encode()).hexdigest()
    named = "a model's tokenizer.json" if kind == "hf" else f"'{kind}'"
    return f"{named} of {size:,} ids, sha256 {sha[:8]}" if kind in VOCABULARY else f"'{kind}'"


def require_same(ours, theirs, where, what_to_do):
    """ConfigError that names both unless two descriptions, known ones, are of one tokenizer."""
    same = not ours or not theirs or name_of(ours) == name_of(theirs)
    require(same, f"{where} were made with different tokenizers, "
                  f"{' and '.join(name_of(meta) for meta in (ours, theirs) if meta)}: {what_to_do}")


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
            meta = typed(read(path), path)
            kind = meta.get("tokenizer")
            return meta | ({kind: read_vocabulary(path, meta)} if kind in ("bpe", "hf") else {})
    return {}


def read_vocabulary(meta_path, meta):
    """tokenizer.json beside a meta.json -> its dict; it must be the file whose hash meta has."""
    path = meta_path.with_name("tokenizer.json")
    vocabulary = read_json(path)
    found, expected = hashlib.sha256(path.read_bytes()).hexdigest(), meta.get("tokenizer_sha256", "")
    require(found == expected, f"{path} is not the tokenizer that the data was made with: its sha256 starts "
                               f"{found[:12]}, meta.json says {expected[:12]}: prepare the data set again")
    return vocabulary


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
    kinds = {"vocab_size": int, "tokenizer": str, "chars": list, "dtype": str, "tokens": dict, "sha256": dict,
             "tokenizer_sha256": str}
    for key, kind in kinds.items():
        value = meta.get(key, kind())
        require(type(value) is kind, f"{path}: {key} is {str(value)[:40]!r}, expected {kind.__name__}: "
                                     "prepare the data set again")
    size, version = meta.get("vocab_size", 1), meta.get("format", 1)
    require(size > 0, f"{path}: vocab_size is {size}, expected 1 or more: prepare the data set again")
    require(version == 1, f"{path} has format {version!r}, expected 1: prepare the data set again")
    return meta


def begun(tokenizer, text, allow_special=False):
    """The ids of a text that begins here: behind those that a pretrained model wants in front of any."""
    ids, begin = tokenizer.encode(text, allow_special), getattr(tokenizer, "begin", [])
    return ids if ids[:len(begin)] == begin else [*begin, *ids]


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


def need(package, why="byte pairs"):
    """An optional package, or the sentence that says how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(f"{why} need {package}: type pip install {package}") from error


def load_bpe():
    """tiktoken's GPT-2 encoding, from local files if there are any, else by its download and cache."""
    tiktoken = need("tiktoken", "GPT-2's byte pairs")
    folder = Path(os.environ.get("NANOCORTEX_GPT2_BPE") or BPE_FOLDER)
    if "NANOCORTEX_GPT2_BPE" in os.environ or folder.is_dir():
        return local_bpe(tiktoken, folder)
    try:
        return within(DOWNLOAD_SECONDS, lambda: tiktoken.get_encoding("gpt2"))
    except Exception as error:                  # requests, proxies, TLS, full disks: each raises its own type
        raise ConfigError(f"GPT-2's vocabulary could not be downloaded ({type(error).__name__}): offline, "
                          f"put its encoder.json and vocab.bpe in {BPE_FOLDER}, or in a folder named by the "
                          "environment variable NANOCORTEX_GPT2_BPE, or use data made with --tokenizer=byte"
                          ) from error


def within(seconds, function):
    """function(), or TimeoutError after so long: a network that swallows packets, and a library that sets no
    limit of its own, would hang for good. The thread left behind ends with the process."""
    answer = Future()

    def work():
        try:
            answer.set_result(function())
        except Exception as error:
            answer.set_exception(error)
    threading.Thread(target=work, daemon=True).start()
    return answer.result(timeout=seconds)


def local_bpe(tiktoken, folder):
    """The encoding from encoder.json and vocab.bpe in `folder`; the hashes rule out any other vocabulary."""
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    try:
        ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"),
                                                BPE_SHA256["vocab.bpe"], BPE_SHA256["encoder.json"])
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} does not hold GPT-2's encoder.json and vocab.bpe: {error}") from error
    return gpt2_encoding(tiktoken, ranks)


def gpt2_encoding(tiktoken, ranks):
    return tiktoken.Encoding("gpt2", pat_str=BPE_WORDS, mergeable_ranks=ranks,
                             special_tokens={END_OF_TEXT: 50256})


# -------------------------------------------------- Hugging Face folders ------------------------------------

class FolderTokenizer:
    """The byte pairs of a Hugging Face folder, by the tokenizers package as transformers takes them. Added
    tokens are plain text in a prompt unless allow_special. text: what tokenizer.json holds, or would hold;
    end: the id that ends a document; begin: the ids that a model wants in front of any text, [] or [BOS];
    None: those that tokenizer.json says."""

    def __init__(self, path, text, end=None, begin=None):
        self.path, self.tokens, self.text = path, None, text
        try:
            self.tokens = need("tokenizers", f"the tokens of {path}").Tokenizer.from_str(text)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"{path} is no tokenizer ({str(error)[:120]})") from error
        self.tokens.no_truncation()
        self.tokens.no_padding()
        decoder = json.loads(text).get("decoder") or {}
        parts = [part.get("type") for part in decoder.get("decoders", [decoder])]
        self.by_bytes = "ByteLevel" in parts
        require(self.by_bytes or "ByteFallback" in parts, f"{path} is a tokenizer whose decoder is "
                f"{decoder.get('type')}, expected GPT-2's ByteLevel or Llama's ByteFallback: use "
                "transformers for this model")
        vocabulary = self.tokens.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.added = {i: token.content for i, token in self.tokens.get_added_tokens_decoder().items()}
        ends = [i for i in (end if isinstance(end, list) else [end]) if type(i) is int]
        self.end_of_text = ends[0] if ends else vocabulary.get(END_OF_TEXT)
        self.begin = self.put_in_front() if begin is None else begin

    @classmethod
    def described_by(cls, said):
        """Of what `meta` says under "hf"."""
        fits = isinstance(said, dict) and isinstance(said.get("file"), dict)
        require(fits and isinstance(said.get("begin"), list), "the description of a pretrained model's "
                f"tokenizer is damaged: {str(said)[:60]!r}")
        return cls("the tokenizer", json.dumps(said["file"]), said.get("end"), said["begin"])

    def put_in_front(self):
        """The ids that tokenizer.json puts before a text."""
        plain, full = (self.tokens.encode("a", add_special_tokens=on).ids for on in (False, True))
        return full[:full.index(plain[0])] if plain and plain[0] in full else []

    def encode(self, text, allow_special=False):
        utf8(text)
        self.tokens.encode_special_tokens = not allow_special
        return self.tokens.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id):
        [token_id] = known([token_id], self.vocab_size)
        if token_id in self.added:
            return self.added[token_id].encode()
        token = self.tokens.id_to_token(token_id) or ""
        if self.by_bytes:
            return spelled(token, self.path)
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()

    def meta(self):
        said = json.loads(self.file())
        return {"tokenizer": "hf", "tokenizer_sha256": hashlib.sha256(self.file()).hexdigest(), "hf": said}

    def file(self):
        """The bytes of tokenizer.json in a data folder: theirs, and what else a model wants."""
        return json.dumps({"ids": self.vocab_size, "begin": self.begin, "end": self.end_of_text,
                           "file": json.loads(self.text)}).encode()


@functools.cache
def bytes_of_characters():
    """{the printable character that GPT-2's files write for a byte: that byte}"""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def spelled(token, path):
    """A token of vocab.json as bytes."""
    table = bytes_of_characters()
    require(all(char in table for char in token), f"{path}: token {token[:40]!r} is not spelled in "
                                                  "GPT-2's bytes")
    return bytes(table[char] for char in token)


def is_model(place):
    """Is a path a GGUF file, or a Hugging Face folder, of a model that has a tokenizer of its own?"""
    data = any((place / name).exists() for name in ("meta.json", "meta.pkl"))
    in_file = place.suffix.lower() == ".gguf" and place.is_file()
    return in_file or ((place / "config.json").is_file() and not data)


def in_folder(folder, end=None):
    """The tokenizer of a Hugging Face folder: tokenizer.json, or vocab.json with merges.txt; None without any
    of the three. end: the id that ends a document there, if known."""
    there = [name for name in ("tokenizer.json", "vocab.json", "merges.txt") if (folder / name).is_file()]
    if not there:
        return None
    try:
        said = {name: (folder / name).read_text(encoding="utf-8") for name in there}
        found = {name: json.loads(text) for name, text in said.items() if name.endswith(".json")}
    except (ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"{folder}: {' or '.join(there)} is damaged ({error})") from error
    full, vocab = found.get("tokenizer.json"), found.get("vocab.json")
    if full is None:
        require("merges.txt" in there and vocab is not None,
                f"{folder} has {there[0]} alone, expected vocab.json and merges.txt, or tokenizer.json: "
                "copy the "
                "other file there too")
        full = as_tokenizer_json(folder, vocab, said["merges.txt"])
    require(isinstance(full, dict) and isinstance(full.get("model"), dict) and vocab in (None,
            full["model"].get("vocab")), f"{folder}: its tokenizer.json is damaged, or has not the tokens "
                                         "of its "
            "vocab.json: delete one of them")
    if is_gpt2s(full):
        named = full["model"]["vocab"].items()
        return GPT2Tokenizer({spelled(token, folder): i for token, i in named if token != END_OF_TEXT})
    return FolderTokenizer(folder / there[0], json.dumps(full), end)


def as_tokenizer_json(folder, vocab, merges):
    """What tokenizer.json says where a folder has vocab.json and merges.txt, and perhaps other files of added
    tokens."""
    def other(name):
        try:
            text = (folder / name).read_text(encoding="utf-8") if (folder / name).is_file() else "{}"
            found = json.loads(text)
        except (ValueError, RecursionError, OSError) as error:
            raise ConfigError(f"{folder / name} is damaged ({error})") from error
        require(isinstance(found, dict), f"{folder / name} holds a {type(found).__name__}, expected an "
                                         "object")
        return found
    ids = isinstance(vocab, dict) and all(type(i) is int for i in vocab.values())
    require(ids, f"{folder / 'vocab.json'} is damaged: expected an id for each token")
    lines = [line for line in merges.split("\n") if line and not line.startswith("#version")]
    pairs = all(len(line.split(" ")) == 2 and "".join(line.split(" ")) in vocab for line in lines)
    require(pairs, f"{folder / 'merges.txt'} is damaged, or does not belong to vocab.json beside it")
    config = other("tokenizer_config.json")
    added = {content: i for content, i in other("added_tokens.json").items()}
    listed = config.get("added_tokens_decoder", {})
    try:
        added |= {token["content"]: int(i) for i, token in listed.items()}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ConfigError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder is damaged") from error
    if END_OF_TEXT in vocab:
        added.setdefault(END_OF_TEXT, vocab[END_OF_TEXT])
    space = config.get("add_prefix_space", False)
    rules = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    level = {"type": "ByteLevel", "add_prefix_space": space, "trim_offsets": True, "use_regex": True}
    return {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": level,
            "post_processor": None, "decoder": level,
            "added_tokens": [dict(id=i, content=content) | rules for content, i in
                             sorted(added.items(), key=lambda item: item[1])],
            "model": {"type": "BPE", "vocab": vocab, "merges": lines}}


def is_gpt2s(full):
    """Is a tokenizer.json OpenAI's vocabulary, cut into words as OpenAI does?"""
    model, words = full["model"], full.get("pre_tokenizer") or {}
    try:
        vocab = json.dumps(dict(sorted(model["vocab"].items(), key=lambda item: item[1])))
        lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        added = [token["content"] for token in full.get("added_tokens") or ()]
    except (KeyError, TypeError, AttributeError):
        return False
    merges = "#version: 0.2\n" + "".join(line + "\n" for line in lines)
    return (hashlib.sha256(vocab.encode()).hexdigest() == BPE_SHA256["encoder.json"]
            and hashlib.sha256(merges.encode()).hexdigest() == BPE_SHA256["vocab.bpe"]
            and added in ([], [END_OF_TEXT]) and full.get("normalizer") is None
            and words.get("type") == "ByteLevel" and not words.get("add_prefix_space"))


def utf8(text):
    """`text` as UTF-8 bytes; half a surrogate pair (from undecodable bytes on a command line) is an error."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"character {error.start} of the text is {text[error.start]!a}, half of a pair "
                          "and not valid Unicode: check the encoding of the input") from error


def is_decomposed(text):
    """Whether letters are spelled in parts that Unicode has whole (NFD), as macOS writes file names: a Hangul
    syllable is two or three characters then, and other tokens."""
    normal = text.isascii() or unicodedata.is_normalized("NFC", text)
    return not normal and len(unicodedata.normalize("NFC", text)) < len(text)


def known(ids, vocab_size):
    """`ids` (a sequence, an array or a tensor) as a list of int, all in the vocabulary, or a ConfigError."""
    ids = [int(i) for i in ids]
    outside = next((i for i in ids if not 0 <= i < vocab_size), None)
    require(outside is None, f"token {outside} is outside this tokenizer's vocabulary of {vocab_size}: the "
                             "model and the tokenizer do not belong together")
    return ids
