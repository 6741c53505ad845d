"""Korean and English in one data set, with a tokenizer that is fair to both.

    python data/bilingual/prepare.py --korean=FILE --english=FILE --vocab_size=32768 --out_dir=DIR
    python data/bilingual/prepare.py ... --vocab_size=65536 --extend=FOLDER

The first line learns a vocabulary from both texts. The second extends the one in FOLDER - GPT-2's
encoder.json and vocab.bpe, or a data folder - by ids for Korean alone: every old id and every English
encoding stays as it is, and train.py --init_from=gpt2 grows the embedding to it.
"""
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import configure, require, run_script
from data import dataset, vocabulary
from data import tokenizer as tokenizers

TAGS = {"korean": "<|korean|>", "english": "<|english|>"}
BLOCK_CHARS = 4000                          # whole lines of one language that follow each other


@dataclass(frozen=True)
class Bilingual:
    """Write train.bin, val.bin, meta.json and tokenizer.json from a Korean and an English text file."""
    korean: str = ""                        # UTF-8 text file
    english: str = ""                       # UTF-8 text file
    vocab_size: int = 32768                 # ids, old ones included; a small text may give fewer
    extend: str = ""                        # folder of the vocabulary to extend; empty: a new one
    korean_share: float = 0.0               # of what a new vocabulary is learned from; 0: as the files are
    language_tags: bool = False             # a <|korean|> or <|english|> token before each block of text
    report: str = ""                        # more text files to tell the fertility on, by commas
    val_fraction: float = 0.1               # the end of each file, held out for validation
    out_dir: str = ""                       # folder to write to; empty: the folder of this script

    def __post_init__(self):
        require(self.korean and self.english, "two texts are needed: type --korean=FILE --english=FILE")
        require(0 <= self.korean_share < 1, f"korean_share={self.korean_share} must be in [0, 1)")
        require(0 < self.val_fraction < 1, f"val_fraction={self.val_fraction} must lie between 0 and 1")
        require(not (self.extend and self.korean_share), f"extend='{self.extend}' and korean_share="
                f"{self.korean_share}: an extension learns from the Korean text alone; leave one of them out")


def main(argv=None):
    config, started = configure(Bilingual, argv), time.time()
    files = {"korean": config.korean, "english": config.english}
    chars = {language: dataset.survey(path)[0] for language, path in files.items()}
    cuts = {language: int(count * (1 - config.val_fraction)) for language, count in chars.items()}

    def texts(split):
        """{language: (characters, pieces of the text)} of a split."""
        ends = {"train": lambda language: (0, cuts[language]),
                "val": lambda language: (cuts[language], chars[language])}[split]
        return {language: (ends(language)[1] - ends(language)[0], dataset.between(path, *ends(language)))
                for language, path in files.items()}
    made = learned(config, texts("train"))
    tags = {language: made.specials[tag] if config.language_tags else None for language, tag in TAGS.items()}
    splits = {split: blocks(texts(split), made, tags) for split in ("train", "val")}
    folder = dataset.expanded(config.out_dir or Path(__file__).resolve().parent)
    meta = dataset.write_dataset(folder, splits, made, f"{Path(config.korean).name}, "
                                                       f"{Path(config.english).name}")
    dataset.report(folder, meta, time.time() - started)
    held_out = {f"{language}, held out": pieces for language, (_, pieces) in texts("val").items()}
    others = {Path(path).name: dataset.text_pieces(path) for path in config.report.split(",") if path}
    texts = {name: dataset.whole_words(pieces) for name, pieces in (held_out | others).items()}
    vocabulary.tell_fertility(made, texts)


def learned(config, texts):
    """The tokenizer that the keys ask for, learned from {language: (characters, pieces)}."""
    (korean_chars, korean), (english_chars, english) = texts["korean"], texts["english"]
    tags = list(TAGS.values()) * config.language_tags
    letters = vocabulary.korean_letters()
    if config.extend:
        words = vocabulary.count_words(dataset.whole_words(korean))
        return vocabulary.extend(old_tokenizer(config.extend), words, config.vocab_size, tags, letters)
    share = config.korean_share or korean_chars / (korean_chars + english_chars)
    times = share / (1 - share) * english_chars / korean_chars      # the rarer one is counted more than once
    words = vocabulary.count_words(dataset.whole_words(korean), max(1.0, times))
    words += vocabulary.count_words(dataset.whole_words(english), max(1.0, 1 / times))
    return vocabulary.learn(words, config.vocab_size, tags, letters + vocabulary.korean_symbols())


def old_tokenizer(folder):
    """The tokenizer of a folder with GPT-2's two files, or of a data folder with byte pairs."""
    folder = dataset.expanded(folder)
    if (Path(folder) / "vocab.bpe").is_file():
        os.environ["NANOCORTEX_GPT2_BPE"] = str(folder)
        return tokenizers.GPT2Tokenizer()
    require(os.path.isdir(folder), f"extend='{folder}' is no folder: type --extend=FOLDER, with encoder.json "
                                   "and vocab.bpe, or a data folder")
    made = tokenizers.load(folder)
    require(isinstance(made, tokenizers.BytePairs), f"extend='{folder}' has no byte pairs to extend")
    return made


def blocks(texts, tokenizer, tags):
    """Ids of blocks of whole lines, each after its language's tag and before the end of text; the languages
    take turns so that both last to the end."""
    lines = {language: blocks_of_lines(pieces) for language, (_, pieces) in texts.items()}
    done = dict.fromkeys(texts, 0)
    while lines:
        language = min(lines, key=lambda name: done[name] / texts[name][0])
        block = next(lines[language], None)
        if block is None:
            del lines[language]
            continue
        done[language] += len(block)
        tag = [] if tags[language] is None else [tags[language]]
        yield [*tag, *tokenizer.encode(block), tokenizer.end_of_text]


def blocks_of_lines(pieces):
    rest = ""
    for piece in pieces:
        rest += piece
        while (end := rest.find("\n", BLOCK_CHARS)) >= 0:
            yield rest[:end + 1]
            rest = rest[end + 1:]
    if rest:
        yield rest


if __name__ == "__main__":
    run_script(main)
