"""What bench.py measures of data: fertility of tokenizers, memory of a preparation, compression.

    python bench.py fertility --korean=FILE --english=FILE --gpt2=FOLDER --texts=FILE,FILE
    python bench.py corpus --gigabytes=1
    python bench.py compress --files=FILE,FILE --out_dir=out-compress
"""
import gzip
import hashlib
import json
import lzma
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import compress as compressor
import dataset
import tokenizer as tokenizers
import vocabulary
from configurator import require

ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Measured:
    """Keys of all subcommands of data."""
    nanogpt = ""                # nothing here is compared with it
    threads: int = 0  # CPU threads; 0: torch's default
    out: str = ""  # also write the JSON record to this file, and a plot beside it

    def __post_init__(self):
        require(self.threads >= 0, f"threads={self.threads} must be 1 or more, or 0 for torch's default")
        folder = Path(self.out).parent
        require(folder.is_dir(), f"out='{self.out}': the folder {folder} does not exist: make it")


def plot(cfg, draw):
    """Call draw(pyplot's axes) and save the figure beside the record, where there is one."""
    if cfg.out:
        pyplot = tokenizers.need("matplotlib.pyplot", "plots")
        figure, axes = pyplot.subplots(figsize=(6, 4))
        draw(axes)
        figure.tight_layout()
        figure.savefig(Path(cfg.out).with_suffix(".png"), dpi=110)
        pyplot.close(figure)


# ------------------------------------------------------------------------------------------------------------
# fertility

@dataclass(frozen=True)
class Fertility(Measured):
    """Tokens per character of new and extended vocabularies, and what more training text would give."""
    korean: str = ""  # text to learn from
    english: str = ""  # text to learn from
    gpt2: str = ""  # folder with GPT-2's encoder.json and vocab.bpe
    texts: str = ""  # files to measure on, by commas
    vocab_size: int = 32768  # of new vocabularies
    extended_size: int = 65536  # of extended ones
    goal: float = 0.6  # tokens per character: how much Korean text would reach it?

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
    plot(cfg, lambda axes: draw_curve(axes, cfg, curve))
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


# ------------------------------------------------------------------------------------------------------------
# memory of a preparation

@dataclass(frozen=True)
class Corpus(Measured):
    """Memory while a generated corpus is prepared: in one go, and killed half-way and begun again."""
    gigabytes: float = 1.0  # size of the generated text
    tokenizer: str = "gpt2"  # the one that data/prepare.py is to use
    every: float = 0.5  # seconds between looks at the memory

    def __post_init__(self):
        super().__post_init__()
        require(self.gigabytes > 0, f"gigabytes={self.gigabytes} must be above 0")


def corpus(cfg):
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "generated.jsonl"
        generate(path, cfg.gigabytes * 1e9)
        whole = watched(cfg, Path(work), path, "whole")
        killed = watched(cfg, Path(work), path, "resumed", kill_at=whole["seconds"] / 2)
        resumed = watched(cfg, Path(work), path, "resumed")
        same = whole["sha256"] == resumed["sha256"]
        size = path.stat().st_size
    print(f"peak {whole['peak_mb']:,.0f} MB over {size / 1e9:.2f} GB; after a kill the same files: {same}")
    require(same, "a preparation that was killed and begun again gave other files")
    plot(cfg, lambda axes: draw_memory(axes, whole, killed, resumed))
    return {"bytes": size, "runs": {"whole": whole, "killed": killed, "resumed": resumed}, "same_files": same}


def generate(path, size):
    """JSON lines of random Korean and English words, as many bytes as asked for, always the same."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(20000)]
    syllables = [chr(code) for code in range(0xAC00, 0xD7A4)]
    words += ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(9000)]
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < size:
            rows = ({"text": " ".join(draw.choices(words, k=300))} for _ in range(500))
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def watched(cfg, work, path, name, kill_at=None):
    """Run data/prepare.py as a process of its own, look at its memory, kill it where asked to."""
    psutil = tokenizers.need("psutil", "measurements of memory")
    code = (f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); import dataset, pathlib; "
            f"dataset.DATA = pathlib.Path({str(work)!r}); "
            f"runpy.run_path({str(ROOT / 'data' / 'prepare.py')!r}, run_name='__main__')")
    words = [f"--input={path}", f"--name={name}", f"--tokenizer={cfg.tokenizer}", "--val_fraction=0.01"]
    clock, curve = time.perf_counter(), []
    child = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL)
    while child.poll() is None:
        try:
            curve.append([time.perf_counter() - clock, psutil.Process(child.pid).memory_info().rss / 1e6])
        except psutil.NoSuchProcess:
            break
        if kill_at and curve[-1][0] > kill_at:
            child.kill()
        time.sleep(cfg.every)
    seconds, status = time.perf_counter() - clock, child.wait()
    require(status == 0 or kill_at, f"data/prepare.py ended with status {status}")
    sha = {} if kill_at else {f.name: hashlib.sha256(f.read_bytes()).hexdigest()
                              for f in sorted((work / name).glob("*.bin"))}
    print(f"{name}: {seconds:.0f} s, peak {max(mb for _, mb in curve):,.0f} MB, status {status}", flush=True)
    thinned = curve[::max(1, len(curve) // 200)]
    return {"seconds": seconds, "peak_mb": max(mb for _, mb in curve), "curve": thinned, "status": status,
            "sha256": sha}


def draw_memory(axes, whole, killed, resumed):
    for label, run in {"in one go": whole, "killed": killed, "begun again": resumed}.items():
        axes.plot(*zip(*run["curve"]), label=label)
    axes.set(xlabel="seconds", ylabel="resident memory, MB", ylim=(0, None))
    axes.legend()


# ------------------------------------------------------------------------------------------------------------
# compression

@dataclass(frozen=True)
class Compression(Measured):
    """Bits per byte of compress.py, gzip, xz and zstd on files, each file restored and compared."""
    files: str = ""  # files to compress, by commas
    out_dir: str = "out-compress"  # run whose ckpt.pt is the model

    def __post_init__(self):
        super().__post_init__()
        require(self.files, "type --files=FILE,FILE")


def compression(cfg):
    model, sha = compressor.load_model(cfg.out_dir)
    found = {Path(path).name: compressed(model, Path(path)) for path in cfg.files.split(",")}
    size = sum(p.numel() for p in model.parameters())
    return {"files": found, "model": {"sha256": sha, "parameters": size}}


def compressed(model, path):
    content = path.read_bytes()
    zstd = tokenizers.need("zstandard", "comparisons with zstd").ZstdCompressor(level=19)
    sizes = {"gzip -9": len(gzip.compress(content, 9)), "zstd -19": len(zstd.compress(content)),
             "xz -9e": len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))}
    clock = time.perf_counter()
    payload = compressor.compress(model, content)
    middle = time.perf_counter()
    require(compressor.decompress(model, payload, len(content)) == content, f"{path} was not restored")
    sizes["compress.py"] = len(payload) + 400                   # and the archive's header and hash
    bits = {name: 8 * size / len(content) for name, size in sizes.items()}
    print(path.name, {name: round(value, 3) for name, value in bits.items()}, flush=True)
    return {"bytes": len(content), "sizes": sizes, "bits_per_byte": bits, "restored": True,
            "seconds": {"compress": middle - clock, "decompress": time.perf_counter() - middle}}


# ------------------------------------------------------------------------------------------------------------
# rows of the README

def fertility_rows(record, path):
    for text, sides in record["fertility"].items():
        for name, s in sides.items():
            change = s["tokens"] / sides["GPT-2"]["tokens"] - 1
            yield (f"| {text} | {name}, {record['vocab_sizes'][name]:,} ids | {s['tokens_per_char']:.4f} "
                   f"| {s['bits_per_byte']:.3f} | {change:+.1%} | [{path.name}](results/{path.name}) |")


def compression_rows(record, path):
    for text, one in record["files"].items():
        bits = one["bits_per_byte"]
        yield (f"| {text} | {one['bytes']:,} | " + " | ".join(f"{bits[name]:.3f}" for name in ARCHIVERS)
               + f" | {one['seconds']['compress']:.0f} and {one['seconds']['decompress']:.0f} "
               f"| [{path.name}](results/{path.name}) |")


ARCHIVERS = ("gzip -9", "zstd -19", "xz -9e", "compress.py")
COMMANDS = {"fertility": (Fertility, fertility), "corpus": (Corpus, corpus),
            "compress": (Compression, compression)}
TABLES = {"fertility": ("text | vocabulary | tokens per character | bits per byte, flat | tokens, to GPT-2's "
                        "| record", fertility_rows),
          "compress": (f"bits per byte | bytes | {' | '.join(ARCHIVERS)} | s, there and back | record",
                       compression_rows)}
