"""Tokens per character of vocabularies: ordinary, new, extended, GPT-2's."""
import math
import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks import Bench
from configurator import require
from data import dataset, vocabulary
from data import tokenizer as tokenizers
from viz.figures import drawing


@dataclass(frozen=True)
class Fertility(Bench):
    """Tokens per character of new and extended vocabularies, and what more training text would give."""
    korean: str = ""  # text to learn from
    english: str = ""  # text to learn from
    gpt2: str = ""  # folder with GPT-2's encoder.json and vocab.bpe
    texts: str = ""  # files to measure on, by commas
    vocab_size: int = 32768  # of new vocabularies
    extended_size: int = 65536  # of extended ones
    goal: float = 0.6  # tokens per character: how much Korean text would reach it?
    plot: str = ""  # also draw fertility against the text learned from into this PNG (needs matplotlib)

    def __post_init__(self):
        super().__post_init__()
        require(self.korean and self.english and self.gpt2 and self.texts,
                "type --korean=FILE --english=FILE --gpt2=FOLDER --texts=FILE,FILE")


def fertility(cfg):
    os.environ["NANOCORTEX_GPT2_BPE"] = cfg.gpt2
    korean, english = words_of(cfg.korean), words_of(cfg.english)
    letters, signs = vocabulary.korean_letters(), vocabulary.korean_symbols()
    gpt2 = tokenizers.GPT2Tokenizer()
    sides = {"GPT-2": gpt2, "ordinary": vocabulary.learn(korean + english, cfg.vocab_size),
             "new": vocabulary.learn(korean + english, cfg.vocab_size, seeds=letters + signs),
             "extended": vocabulary.extend(gpt2, korean, cfg.extended_size, seeds=letters)}
    found = {}
    for path in [*cfg.texts.split(","), cfg.korean, cfg.english]:
        found[Path(path).name] = one = vocabulary.fertility(sides, pieces_of(path))
        print(Path(path).name, {name: round(s["tokens_per_char"], 4) for name, s in one.items()}, flush=True)
    same = {Path(path).name: unchanged(gpt2, sides["extended"], path) for path in cfg.texts.split(",")}
    curve = learning_curve(cfg, english, letters + signs)
    if cfg.plot:
        with drawing(cfg.plot, 1, (6, 4)) as axes:
            draw_curve(axes, cfg, curve)
    return {"fertility": found, "vocab_sizes": {name: side.vocab_size for name, side in sides.items()},
            "encoded_as_by_gpt2": same, "curve": curve}


def pieces_of(path):
    return dataset.whole_words(dataset.text_pieces(path))


def words_of(path, share=1.0):
    """Counter of the words in the first part of a text."""
    end = int(dataset.survey(path)[0] * share)
    return vocabulary.count_words(dataset.whole_words(dataset.between(path, 0, end)))


def unchanged(old, new, path):
    """Whether the extension encodes a text as the old vocabulary does."""
    return all(old.encode(piece) == new.encode(piece) for piece in pieces_of(path))


def learning_curve(cfg, english, letters):
    """Fertility on the first text by how much Korean a new vocabulary of vocab_size was learned from, and the
    straight line over the logarithm through it, drawn on to the goal: an extrapolation, not a measurement."""
    total, first = dataset.survey(cfg.korean)[0], cfg.texts.split(",")[0]
    points = {}
    for share in (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1):
        side = {"new": vocabulary.learn(words_of(cfg.korean, share) + english, cfg.vocab_size, seeds=letters)}
        points[int(total * share)] = vocabulary.fertility(side, pieces_of(first))["new"]["tokens_per_char"]
    xs, ys = [math.log2(chars) for chars in points], list(points.values())
    last = len(xs) // 2                                         # the later half: the curve bends
    slope = (ys[-1] - ys[last]) / (xs[-1] - xs[last])
    needed = 2 ** (xs[-1] + (cfg.goal - ys[-1]) / slope) if slope < 0 and ys[-1] > cfg.goal else None
    print(f"{first}: {points}; extrapolated to {cfg.goal}: {needed and f'{needed:,.0f}'} characters")
    return {"text": Path(first).name, "points": points, "slope_per_doubling": slope, "goal": cfg.goal,
            "extrapolated_chars": needed}


def draw_curve(axes, cfg, curve):
    xs, ys = list(curve["points"]), list(curve["points"].values())
    axes.semilogx(xs, ys, "o-", label=f"measured, {cfg.vocab_size:,} ids")
    if curve["extrapolated_chars"]:
        axes.semilogx([xs[-1], curve["extrapolated_chars"]], [ys[-1], curve["goal"]], "--",
                      label="extrapolated")
    axes.set(xlabel="characters of Korean learned from", ylabel=f"tokens per character, {curve['text']}")
    axes.legend()
