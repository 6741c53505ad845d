"""Learning byte pairs: a vocabulary of one's own from any text, or more ids for one that exists.

The merges are counted by Hugging Face's tokenizers, the result is a tokenizer.TrainedTokenizer. Text is cut
into words as GPT-2 cuts it, whatever the language, so that files can be counted and encoded in pieces.
"""
import functools
import json
from collections import Counter
from math import log2
from pathlib import Path

from configurator import ConfigError, close_match, require
from data.tokenizer import (
    BPE_WORDS,
    END_OF_TEXT,
    TOKENIZERS,
    GPT2Tokenizer,
    TrainedTokenizer,
    from_meta,
    is_model,
    load,
    meta_of,
    name_of,
    need,
)
from training import pretrained

LEARN_CHARS = 100_000_000       # read of a text: more changes little, and the table of words grows
LONGEST = 1000                  # characters of a word that is learned from: counting takes their square
SEEN = 2                        # a pair seen once is no pattern
GAP = "\ue000"                  # stands between words that are handed to the trainer
FIRST = 0x10000                 # a token id is handed over as the character FIRST + id
# Every character of U+A000 to U+DFFF, all Hangul syllables among them, begins with one of these bytes in
# UTF-8, and no other character holds one: a token with such a byte needs a text with such a character.
HANGUL_LEADS = frozenset(range(0xEA, 0xEE))


# ------------------------------------------------------------------------------------------------------------
# learning

def learn(words, vocab_size, specials=(), seeds=()):
    """A new vocabulary -> TrainedTokenizer: 256 bytes, seeds, learned merges, <|endoftext|> and specials.

    words: Counter of words, see count_words; seeds: texts that become one token each, if they take at most
    three quarters of the new ids. Text that holds few repeated pairs gives fewer ids than vocab_size.
    """
    specials = [END_OF_TEXT, *specials]
    require(vocab_size >= 256 + len(specials), f"vocab_size={vocab_size} must hold 256 bytes and "
            f"{len(specials)} specials: type --vocab_size={256 + len(specials)} or more")
    tokens = grown([bytes([b]) for b in range(256)], words, vocab_size - len(specials), seeds)
    return with_specials(tokens, specials, {}, extends=0)


def extend(old, words, vocab_size, specials=(), seeds=()):
    """More ids for the tokenizer `old` -> TrainedTokenizer whose first ids are those of `old`.

    Every new token holds a byte of HANGUL_LEADS, therefore text without a character of U+A000 to U+DFFF,
    English above all, is encoded exactly as before.
    """
    tokens = [old.token_bytes(i) for i in range(old.vocab_size)]
    require(vocab_size >= len(tokens) + len(specials), f"vocab_size={vocab_size} must be more than the "
            f"{len(tokens)} ids that are extended: type --vocab_size={len(tokens) + 15000}, for example")
    korean = Counter({word: count for word, count in words.items() if is_korean(word.encode())})
    reserved = frozenset(old.specials.values())
    grow = functools.partial(grown, seeds=seeds, wanted=is_korean, reserved=reserved)
    return with_specials(grow(tokens, korean, vocab_size - len(specials)), specials, old.specials,
                         extends=len(tokens), base=name_of(old.meta()))


def is_korean(token):
    return not HANGUL_LEADS.isdisjoint(token)


def with_specials(tokens, names, specials, **origin):
    """Tokens (list of bytes), and behind them the specials `names` -> TrainedTokenizer."""
    specials = specials | {name: len(tokens) + i for i, name in enumerate(names)}
    texts = [token.decode("latin-1") for token in [*tokens, *(name.encode() for name in names)]]
    return TrainedTokenizer({"tokens": texts, "specials": specials, **origin})


def grown(tokens, words, size, seeds=(), wanted=lambda token: True, reserved=frozenset()):
    """Up to `size` tokens: the given ones, the seeds (all or none), and the merges that `words` suggest.

    wanted: which tokens may be added; reserved: ids that no text is encoded with.
    """
    ranks = {token: i for i, token in enumerate(tokens) if i not in reserved}
    seeded = {token: None for token in stems(seeds) if token not in ranks and wanted(token)}
    tokens = list(tokens) + list(seeded) * (4 * len(seeded) <= 3 * (size - len(tokens)))
    ranks = {token: i for i, token in enumerate(tokens) if i not in reserved}
    for merged in merges(words, tokens, ranks):
        if len(tokens) == size:
            break
        if merged not in ranks and wanted(merged):
            ranks[merged] = len(tokens)
            tokens.append(merged)
    return tokens


def stems(texts):
    """The bytes of each text, each after the beginnings that lead there: pairs are built from the left."""
    for text in texts:
        word = text.encode()
        yield from (word[:end] for end in range(2, len(word) + 1))


def merges(words, tokens, ranks):
    """The bytes of each merge, best first, that the words suggest once they are spelled with `tokens`.

    A token is a character of the text that the trainer sees, so it goes on from any vocabulary.
    """
    need_tokenizers = need("tokenizers", "new vocabularies")
    spell = need("tiktoken").Encoding("old", pat_str=r"(?s:.+)", mergeable_ranks=ranks, special_tokens={})
    model = need_tokenizers.Tokenizer(need_tokenizers.models.BPE())
    model.pre_tokenizer = need_tokenizers.pre_tokenizers.Split(GAP, "removed")
    trainer = need_tokenizers.trainers.BpeTrainer(vocab_size=10**6, min_frequency=SEEN, show_progress=False)

    def spelled():
        for word, count in words.items():
            ids = spell.encode_ordinary(word)
            if len(ids) > 1:
                yield ("".join(chr(FIRST + i) for i in ids) + GAP) * count
    model.train_from_iterator(spelled(), trainer)
    for pair in json.loads(model.to_str())["model"]["merges"]:
        yield b"".join(tokens[ord(char) - FIRST] for char in "".join(pair))


# ------------------------------------------------------------------------------------------------------------
# words and letters

def count_words(pieces, times=1.0):
    """Counter of the words in pieces of text, cut as GPT-2 cuts them; each counts `times` (rounded, at least
    once). Reads LEARN_CHARS characters at most. A word of more than LONGEST characters counts as the parts
    that it is cut into, and a line says so; encoding cuts no word."""
    words, left = Counter(), LEARN_CHARS
    cut = need("regex").compile(BPE_WORDS)
    for piece in pieces:
        words.update(cut.findall(piece[:left]))
        left -= len(piece)
        if left <= 0:
            break
    long = {word: words.pop(word) for word in [word for word in words if len(word) > LONGEST]}
    for word, count in long.items():
        for start in range(0, len(word), LONGEST):
            words[word[start:start + LONGEST]] += count
    if long:
        print(f"{sum(long.values()):,} words of up to {max(map(len, long)):,} characters, as in DNA or "
              f"base64, are learned from in parts of {LONGEST:,}", flush=True)
    return Counter({word: max(1, round(count * times)) for word, count in words.items()})


def korean_letters():
    """The 2,350 Hangul syllables of KS X 1001, with and without a space before them: most of written Korean,
    whatever a text to learn from happens to lack."""
    syllables = [chr(c) for c in range(0xAC00, 0xD7A4) if chr(c).encode("euc_kr", "ignore")[2:] == b""
                 and chr(c).encode("euc_kr", "ignore")]
    return syllables + [" " + syllable for syllable in syllables]


def korean_symbols():
    """The signs of KS X 1001, rows 1 to 12: its punctuation, circled numbers, brackets, units."""
    cells = (bytes([row, column]) for row in range(0xA1, 0xAD) for column in range(0xA1, 0xFF))
    return [sign for cell in cells if (sign := cell.decode("euc_kr", "ignore"))]


# ------------------------------------------------------------------------------------------------------------
# fertility

def fertility(tokenizers, pieces):
    """What each of {name: tokenizer} makes of a text in pieces -> {name: {"tokens", "chars", "bytes",
    "tokens_per_char", "bits_per_byte"}}; bits as if all ids were equally likely, log2(vocab_size) each."""
    tokens, chars, size = Counter(), 0, 0
    for piece in pieces:
        chars, size = chars + len(piece), size + len(piece.encode())
        for name, tokenizer in tokenizers.items():
            tokens[name] += len(tokenizer.encode(piece))
    return {name: {"tokens": tokens[name], "chars": chars, "bytes": size,
                   "tokens_per_char": tokens[name] / max(1, chars),
                   "bits_per_byte": tokens[name] * log2(tokenizer.vocab_size) / max(1, size)}
            for name, tokenizer in tokenizers.items()}


def tell_fertility(made, texts):
    """Print the fertility on {name: pieces of text} beside that of GPT-2's byte pairs, where these are."""
    gpt2, reason = gpt2_or_reason()
    sides = {"ours": made} | ({"GPT-2": gpt2} if gpt2 else {})
    print(f"{'':32}" + "".join(f"{f'{name}: tokens/char, bits/byte':>33}" for name in sides))
    for name, pieces in texts.items():
        found = [(s["tokens_per_char"], s["bits_per_byte"]) for s in fertility(sides, pieces).values()]
        print(f"{name:32}" + "".join(f"{tokens:22.4f}{bits:11.3f}" for tokens, bits in found))
    if not gpt2:
        print(f"no comparison with GPT-2: {reason}")


def gpt2_or_reason():
    """GPT-2's tokenizer, ready, or None and the sentence that says why not."""
    tokenizer = GPT2Tokenizer()
    try:
        tokenizer.encode("")
    except ConfigError as error:
        return None, str(error)
    return tokenizer, ""


# ------------------------------------------------------------------------------------------------------------
# choosing

def chosen(name, pieces, vocab_size=0):
    """The tokenizer that a prepare script's --tokenizer names: a kind, or a folder that has one.

    pieces: function -> pieces of the text to encode, read where the kind is learned from it (char, bpe).
    """
    if name == "bpe":
        require(vocab_size, "tokenizer='bpe' is learned from a text: type python data/prepare.py --name=NAME "
                            "--input=FILE --tokenizer=bpe --vocab_size=1000, then --tokenizer=data/NAME")
        return learn(count_words(pieces()), vocab_size)
    if name == "char":
        return from_meta({"tokenizer": name, "chars": sorted(set().union(*pieces()))})
    if name in TOKENIZERS:
        return from_meta({"tokenizer": name})
    if is_model(Path(name)):
        found = pretrained.tokenizer_of(name, 0)
        require(found, f"tokenizer='{name}' is a model without a tokenizer (tokenizer.json): copy it there")
        return found
    require(meta_of(name), f"tokenizer='{name}' is neither a folder with a tokenizer nor one of "
                           f"{', '.join(TOKENIZERS)}{close_match(name, TOKENIZERS)}")
    return load(name)
