"""Runs side by side: loss on the same held-out text, what a decode step reads, tokens/s; one verdict."""
import copy
import hashlib
import importlib.util
import io
import math
import os
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import sparse_kernels
from benchmarks import ROOT, Timed
from benchmarks.decode import rest
from benchmarks.record import QUIET, commit_of, hardware, load_average, versions, write_atomically
from benchmarks.report import document
from benchmarks.screen import data_of
from benchmarks.stats import mean_interval
from benchmarks.timing import interleave, measurement
from configurator import ConfigError, close_match, require
from data import dataset as datasets
from data import tokenizer as tokenizers
from decode import calibrate, card, engine, sampling
from kernels.arena import move_weights
from layers import Packed, TwoOfFour, check_quantize, forms_of, is_quantized, kinds_in, quantize, settle
from model import GPT, build_model
from training import checkpoint, continual, pretrained, runtime
from viz.figures import drawing, pyplot
from viz.plots import is_number, names_of, read_rows

QUICK = dict(tokens=4096, repeats=5)
SECONDS, QUICK_SECONDS, FEWEST = 15, 3, 3        # of timing for all sides together; rounds at the least
WARM = 4                                         # tokens ahead of those that are timed: prompt, recording
AT_ONCE = 2048                                   # tokens of a forward pass that finds a loss
READABLE = 2**24                                # held-out tokens that are decoded to see if two texts are one
USAGE = "type python bench.py compare out-pylib out-bio-predict, for example"


@dataclass(frozen=True)
class Compare(Timed):
    """Any runs, its words: loss, bytes a token and tokens/s of each beside the first, and one verdict."""
    runs: tuple = ()  # the words: folders of runs, checkpoints, exports; others stand beside the first
    dataset: str = ""  # data folder whose held-out text every loss is of; empty: each run's own data
    tokens: int = 16384  # of held-out text that a loss is of, or all there is if that is less
    quantize: str = ""  # also every run in whole numbers: int8, int4, q4_all, mlp=4,attn=8; several by commas
    sparse_decode: bool = False  # the shortcuts that a model was trained for: predicted units, early exits
    exit_threshold: float = 0.0  # leave where a probe is so sure; 0: the model's own, with sparse_decode
    temperature: float = 0.8  # below 1 less random, above 1 more; 0 is greedy
    top_k: int = 200  # keep only the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the smallest set of tokens whose probability reaches top_p
    min_p: float = 0.0  # keep tokens of at least min_p times the most likely one's probability
    repetition_penalty: float = 1.0  # CTRL's: above 1 makes tokens that already occurred less likely
    draws: str = "engine"  # what chooses ids: the decode engine's generator, or torch's, as nanoGPT does
    overflow: str = "slide"  # past block_size: slide (keep half), or exact (recomputed per token: nanoGPT's)
    prompt: int = 0  # tokens of context before the first new one; 0: 32, or a quarter of the shortest block
    new: int = 0  # tokens of a timed call; 0: 96, or what the shortest block has room for
    repeats: int = 25  # rounds of timing at most, in turns; fewer, but 3, where these would take long
    threads: int = 0  # CPU threads; 0: for each model as many as decode it fastest, as sample.py does
    quick: bool = False  # a loss of 4,096 tokens and 5 rounds: a first look
    seed: int = 1337  # decides what is drawn
    device: str = "auto"  # auto, cpu, cuda, cuda:0, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    html: str = ""  # also write one self-contained page with the picture into this file
    plot: str = ""  # also draw the loss against decode time into this PNG (needs matplotlib)

    def __post_init__(self):
        super().__post_init__()
        for key in QUICK if self.quick else ():
            if getattr(self, key) == getattr(type(self), key):
                object.__setattr__(self, key, QUICK[key])
        require(self.runs, f"no run is named: {USAGE}")
        require(not self.nanogpt, "compare reads nanoGPT's checkpoints as they are: name its out_dir as "
                "a run and leave --nanogpt out")
        require(self.tokens >= 2, f"tokens={self.tokens} must be at least 2: type --tokens=16384")
        require(self.prompt >= 0 and self.new >= 0, f"prompt={self.prompt} and new={self.new} must be 0 "
                "(chosen by the shortest block) or more")
        require(0 <= self.exit_threshold <= 1, f"exit_threshold={self.exit_threshold} must be in [0, 1]")
        require(0 <= self.seed < 2**63, f"seed={self.seed} must be in 0..2**63-1")
        require(self.overflow in ("exact", "slide"), f"overflow='{self.overflow}' must be exact or slide")
        require(self.threads <= engine.MANY, f"threads={self.threads} must be in 0..{engine.MANY}")
        sampling.check_sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty,
                                self.draws)
        for kind in kinds_in(self.quantize):
            check_quantize(kind, smaller=True)
        for key in ("html", "plot"):
            folder = Path(getattr(self, key)).parent
            require(os.path.isdir(folder), f"{key}='{getattr(self, key)}': the folder {folder} does not "
                    "exist: make it")


def compare(cfg):
    load = load_average()
    place = runtime.choose(cfg.device, cfg.dtype, False)
    if cfg.plot:
        pyplot()                                 # better missed now than behind the measurements
    print(f"{place}, {sparse_kernels.path_taken(place.device)}")
    sides, notes = sides_of(cfg, place)
    notes += judge(cfg, sides, place.device)
    prompt, new = lengths(cfg, sides)
    timed = time_sides(cfg, sides, place.device, prompt, new)
    for side in sides:
        side.found["decode"] = timed["sides"][side.name]
    said = verdict(sides)
    about = about_of(sides, prompt, new)
    picture, why = drawn(cfg, sides)
    notes += [why] if why else []
    print("\n".join(text_table(HEAD, [cells(side, sides[0]) for side in sides])))
    print("\n".join((about, *notes, said)))
    if cfg.html:
        busy = (f"The machine was busy (load average {load[0]:.2f} before the start): timings are off."
                if load and load[0] > QUIET else "")
        where = hardware() | {"versions": versions(), "commit": commit_of(ROOT), "place": str(place)}
        part = ("The table", [said, about, *notes, busy], HEAD, [cells(side, sides[0]) for side in sides])
        title = " and ".join(side.name for side in sides[:2]) + " and others" * (len(sides) > 2)
        pictures = {PICTURE: picture} if picture else {}
        write_atomically(cfg.html, document(title, where, [part], pictures))
    return {"measurements": {"decode": timed}, "runs": {side.name: side.found for side in sides},
            "verdict": said, "notes": notes, "prompt": prompt, "new": new, "place": str(place),
            "kernels": sparse_kernels.path_taken(place.device), "seeds": [cfg.seed]}


# -------------------------------------------------- models -------------------------------------------------

class Side:
    """One model as it decodes. about: its checkpoint without weights; data: the folder of its held-out text,
    None where it is not here; tokenizer: None where it is not known; found: what the record keeps of it."""

    def __init__(self, name, model, about, data, tokenizer, found):
        self.name, self.model, self.about, self.data = name, model, about, data
        self.tokenizer, self.found = tokenizer, found

    def config(self):
        return self.model.config


def sides_of(cfg, place):
    """Every run, and each of them in every kind of whole numbers, ready to decode -> (sides, sentences)."""
    read = [load(run) for run in cfg.runs]       # all of them first: a damaged one costs no measurement
    require(not cfg.exit_threshold or any(model.config.exits for model, _ in read), "exit_threshold="
            f"{cfg.exit_threshold} needs a model with early exits, and none of these has them: leave it out")
    sides, notes = [], []
    for name, run, (model, about) in zip(names(cfg.runs), cfg.runs, read):
        data, why = data_or_not(cfg, about)
        notes += [f"{name}: no loss: {why}"] if why else []
        side = Side(name, model, about, data, tokenizer_of(about, data, model.config.vocab_size), {
            "parameters": parameters_of(model.config), "block_size": model.config.block_size,
            "training_tokens_per_second": training_speed(run, about)})
        whole = is_quantized(model)
        if cfg.quantize and whole:
            notes.append(f"{name} holds whole numbers already: it is compared as it is")
        kinds = kinds_in(cfg.quantize) if not whole else ()
        more = [quantised(side, kind, notes) for kind in kinds]
        for each in (side, *more):
            make_ready(each, cfg, place, notes)
        sides += [side, *more]
    return sides, notes


def load(run):
    """What a word names, as sample.py reads it -> (GPT in eval mode, its checkpoint without weights)."""
    folder = Path(run)
    near = [str(path) for path in (folder.parent.glob("*") if os.path.isdir(folder.parent) else ())]
    require(os.path.exists(run) or run in pretrained.GPT2_SIZES, f"'{run}' is neither a run's folder nor a "
            f"checkpoint{close_match(run, near)}: {USAGE}")
    if pretrained.is_gpt2(run) and not any(folder.glob("ckpt*.pt")):
        model = GPT.from_pretrained(run)
        about = {"config": pretrained.carried(run).get("config"),
                 "tokenizer": pretrained.description_of(run, model.config.vocab_size)}
        return model.eval(), about
    loaded, path = checkpoint.read(run)
    model = build_model(loaded, path).eval()
    return model, {key: value for key, value in loaded.items() if key not in ("model", "optimizer")}


def names(runs):
    """The shortest ends of paths that tell them apart; the same run again has a number behind it."""
    places = [place_of(run) for run in runs]
    distinct = [*dict.fromkeys(places)]
    short = dict(zip(distinct, names_of(distinct)))
    counts = [places[:n + 1].count(place) for n, place in enumerate(places)]
    return [short[place] + (f" ({count})" if count > 1 else "") for place, count in zip(places, counts)]


def place_of(run):
    return run if run in pretrained.GPT2_SIZES else str(Path(run).resolve())


def data_or_not(cfg, about):
    """-> (the folder of a run's held-out text, ""), or (None, why there is none)."""
    try:
        return data_of(cfg.dataset, about), ""
    except ConfigError as error:
        return None, str(error)


def tokenizer_of(about, data, vocab_size):
    """A run's tokenizer, by its checkpoint or else its data; None where neither says."""
    try:
        own = about.get("tokenizer")
        found = (tokenizers.from_meta(own) if isinstance(own, dict) and own else
                 tokenizers.load(data) if data else None)
    except ConfigError:
        return None
    return found if found and found.vocab_size <= vocab_size else None


def parameters_of(config):
    """Of the model as it learns, whatever its weights are stored as."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config, init=False).parameters())


def training_speed(run, about):
    """Median tokens/s of a run's training steps, from its metrics.jsonl; None where it has none."""
    folder = Path(run) if os.path.isdir(run) else Path(run).parent
    try:
        rows = read_rows(folder)
    except ConfigError:
        return None
    own = about.get("run")
    rates = [row["tokens_per_s"] for row in rows if is_number(row.get("tokens_per_s"))
             and (own is None or row.get("run", own) == own)]
    return statistics.median(rates) if rates else None


def quantised(side, kind, notes):
    """The same run in whole numbers, as sample.py --quantize makes them -> Side."""
    model, moments = copy.deepcopy(side.model), None
    if 4 in forms_of(kind):
        ids = training_text(side, calibrate.TOKENS)
        moments = None if ids is None else calibrate.input_moments(model, ids)
        notes += [f"{side.name}, {kind}: scales by plain least squares, its training data are not here"] * (
            ids is None)
    found = side.found | {"quantize": kind, "training_tokens_per_second": None}
    return Side(f"{side.name}, {kind}", quantize(model, kind, moments=moments), side.about, side.data,
                side.tokenizer, found)


def training_text(side, count):
    """About `count` ids (B, T) of a run's training data; None where they are not here."""
    c = side.config()
    try:
        folder = side.data and str(side.data)
        return datasets.training_text(None, folder, count, c.block_size, c.vocab_size)[0]
    except ConfigError:
        return None


def make_ready(side, cfg, place, notes):
    """Turn a side's model into what sample.py decodes with: device, dtype, shortcuts, packing, threads."""
    model = side.model.to(device=place.device, dtype=place.dtype).use_policy(cfg.sparse_decode)
    continual.switch_on(model, "")
    if cfg.sparse_decode and calibrate.screened(model) and calibrate.needs_thresholds(model):
        ids = training_text(side, calibrate.AT_LOAD)
        ids = calibrate.own_text(model) if ids is None else ids.to(place.device)
        calibrate.calibrate(model, ids, model.config.mlp_live)
    if cfg.exit_threshold and model.config.exits:
        model.choose(leave_at=cfg.exit_threshold)
    if any(isinstance(module, TwoOfFour | Packed) for module in model.modules()):
        settle(model, pack=sparse_kernels.packing_pays(place.device)[0])
    if place.device.type == "cpu":
        move_weights(model)
    side.found["way"], side.found["threads"] = way_of(model, cfg, place.device)
    if side.found["way"].startswith("forward"):
        notes.append(f"{side.name}: {side.found['way']}")


def way_of(model, cfg, device):
    """Choose the threads of a model's decode steps -> (what decodes, how many threads)."""
    program = engine.trial(model, device, torch.get_num_threads())
    if device.type == "cuda":
        made = card.trial(model, device)
        return (f"{len(made.launches)} kernels a token" if made else
                f"forward decodes ({made.args[0]})"), None
    if not program:
        return f"forward decodes ({program})", torch.get_num_threads()
    threads = cfg.threads or engine.fewest(engine.time_threads(program))
    model.choose(threads=threads)
    return "decode engine", threads


# -------------------------------------------------- losses -------------------------------------------------

def judge(cfg, sides, device):
    """Find the loss of every side that has held-out text, those of one text on the same windows
    -> sentences."""
    texts, notes = {}, []
    for side in sides:
        if side.data:
            texts.setdefault(text_of(side.data), []).append(side)
    for of in texts.values():
        try:
            x, y = windows(cfg, of)
        except ConfigError as error:
            notes.append(f"{listed(of)}: no loss: {error}")
            continue
        block, blocks = x.size(1), {side.config().block_size for side in of}
        if len(blocks) > 1:
            notes.append(f"{listed(of)} have blocks of {', '.join(map(str, sorted(blocks)))}: losses are of "
                         f"windows of the shortest, {block}, which is less context than the longer ones know")
        size = bytes_of(y, of[0].data)
        for side in of:
            found = window_losses(side.model, x, y, device)
            if not all(map(math.isfinite, found)):
                notes.append(f"{side.name}: its loss is not a number: its weights are damaged, or its "
                             "training has diverged")
                continue
            loss = statistics.fmean(found)
            side.found |= {"loss": loss, "of_windows": found, "held_out_tokens": y.numel(), "block": block,
                           "data": side.data.name, "text": text_of(side.data),
                           "bits_per_byte": loss * y.numel() / math.log(2) / size if size else None}
            if not size:
                notes.append(f"{side.name}: no bits a byte: its data do not say what bytes its tokens are")
    return notes + stand_beside(sides)


def text_of(data):
    """What two folders of the same held-out tokens share."""
    return datasets.meta_of(data).get("sha256", {}).get("val") or str(Path(data).resolve())


def windows(cfg, sides):
    """Held-out text in windows of the sides' shortest block, none twice -> x, y (n, block) int64."""
    block = min(side.config().block_size for side in sides)
    vocab = min(side.config().vocab_size for side in sides)
    stream = datasets.TokenStream(sides[0].data, "val", block, 1, 0, vocab, sampling="epoch")
    return stream.rows(0, min(stream.samples, max(2, -(-cfg.tokens // block))))


@torch.inference_mode()
def window_losses(model, x, y, device):
    """The mean loss of each window (n, block), in nats: of the model as it decodes."""
    found, rows = [], max(1, AT_ONCE // x.size(1))
    for ids, targets in zip(x.split(rows), y.split(rows)):
        targets = targets.to(device)
        logits, _ = model(ids.to(device), targets)
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        found += losses.view(targets.shape).mean(dim=1).tolist()
    return found


def bytes_of(ids, data):
    """The bytes of text that token ids of a data set stand for; None where it does not say."""
    try:
        tokenizer = tokenizers.load(data)
        found, counts = ids.unique(return_counts=True)
        return sum(len(tokenizer.token_bytes(i)) * n for i, n in zip(found.tolist(), counts.tolist()))
    except ConfigError:
        return None


def text_sha(data):
    """SHA-256 of the bytes of a data set's held-out text; None where it is too long or not known."""
    try:
        tokenizer = tokenizers.load(data)
        path = Path(data) / "val.bin"
        dtype = datasets.stored_dtype(data, datasets.meta_of(data), tokenizer.vocab_size)
        if path.stat().st_size // dtype.itemsize > READABLE:
            return None
        ids = datasets.np.fromfile(path, dtype)
        table = {i: tokenizer.token_bytes(i) for i in datasets.np.unique(ids).tolist()}
        return hashlib.sha256(b"".join(map(table.__getitem__, ids.tolist()))).hexdigest()
    except ConfigError:
        return None


def stand_beside(sides):
    """Add to every side of the first one's text the difference of its loss, and to those of the same text in
    other tokens that of bits a byte -> sentences on the others."""
    first, others = sides[0], {}
    if "loss" not in first.found:
        return ["Losses have nothing to stand beside: the first run has none."] * any(
            "loss" in side.found for side in sides)
    for side in sides:
        if side.found.get("text") == first.found["text"]:
            pairs = zip(side.found["of_windows"], first.found["of_windows"])
            side.found["to_first"] = mean_interval([a - b for a, b in pairs])
            side.found["percent"] = 100 * (side.found["loss"] / first.found["loss"] - 1)
        elif "loss" in side.found:
            others.setdefault(side.data, []).append(side)
    return [other_text(first, data, of) for data, of in others.items()]


def other_text(first, data, sides):
    """The sentence on sides whose losses are of another text, or of other tokens, than the first one's."""
    one, other = text_sha(first.data), text_sha(data)
    if one and one == other and first.found["bits_per_byte"]:
        for side in sides:
            ratio = side.found["bits_per_byte"] / first.found["bits_per_byte"]
            side.found["bits_percent"] = 100 * (ratio - 1)
        return (f"{listed(sides)}: the same held-out text as {first.name}'s in other tokens, so losses do "
                "not compare and bits a byte do.")
    return (f"{listed(sides)}: other data than {first.name}'s ({data.name}, not {first.data.name}), so "
            "neither losses nor bits a byte compare; --dataset=FOLDER measures runs of one tokenizer on one "
            "text.")


def listed(sides):
    return ", ".join(side.name for side in sides)


# -------------------------------------------------- decoding ------------------------------------------------

def lengths(cfg, sides):
    """Tokens of the prompt, and those that are timed behind it: all sides decode in the same contexts."""
    block = min(side.config().block_size for side in sides)
    prompt = cfg.prompt or min(32, max(1, block // 4))
    return prompt, cfg.new or min(96, max(1, block - prompt - WARM))


class Decoder:
    """A side that continues its prompt as sample.py does: `restart` reads it, a call makes the tokens."""

    def __init__(self, side, cfg, prompt, new):
        ids = side.tokenizer.vocab_size if side.tokenizer else None
        self.side, self.prompt, self.new = side, prompt, new
        self.sampler = sampling.Sampler(cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p,
                                        cfg.repetition_penalty, ids, cfg.draws)
        self.overflow, self.seed = cfg.overflow, cfg.seed

    def restart(self):
        torch.manual_seed(self.seed)
        self.tokens = sampling.stream(self.side.model, self.prompt, WARM + self.new, self.sampler,
                                      overflow=self.overflow)
        self.make(WARM)

    def __call__(self):
        self.make(self.new)

    def make(self, count):
        try:
            for _ in range(count):
                next(self.tokens)
        except sampling.Damaged as error:
            raise ConfigError(f"{self.side.name}: {error}") from error

    def count(self):
        """Multiply-adds and bytes of weights of one of the tokens that are timed, counted as they run."""
        self.restart()
        with sparse_kernels.counting() as tally:
            self()
        return {"macs": tally.macs / self.new, "weight_bytes": tally.bytes / self.new}


def prompt_of(side, length):
    """The beginning of a side's held-out text (1, length); without one, of what the model writes."""
    c = side.config()
    try:
        require(side.data, "no data")
        stream = datasets.TokenStream(side.data, "val", length, 1, 0, c.vocab_size, sampling="epoch")
        return stream.batch(0)[0]
    except ConfigError:
        ids = calibrate.own_text(side.model, length)
        return ids.repeat(1, -(-length // ids.size(1)))[:1, :length]


def time_sides(cfg, sides, device, prompt, new):
    """Count what a token costs every side, then time all of them in turns -> the measurement, tokens/s."""
    decoders = {side.name: Decoder(side, cfg, prompt_of(side, prompt).to(device), new) for side in sides}
    for side in sides:
        side.found |= decoders[side.name].count()
    seconds = partial(interleave, decoders, device=device, cold=cfg.cold, before=restart)
    first = seconds(1)                           # behind a warm-up: it says how many rounds there is time for
    spent = sum(took[0] for took in first.values()) + 0.06 * len(sides)
    rounds = min(cfg.repeats, max(FEWEST, int((QUICK_SECONDS if cfg.quick else SECONDS) / spent)))
    rates = {name: [new / s for s in took] for name, took in seconds(rounds, warm_up=False).items()}
    return measurement("tokens/s", rates, higher_is_better=True)


def restart(run):
    """Put a side where it is timed from; the threads of the one before are asleep by then."""
    run.restart()
    rest(run)


# -------------------------------------------------- what is said --------------------------------------------

HEAD = ("run", "loss, nats", "to the first (95%, paired)", "%", "bits/byte", "parameters", "MB a token",
        "M multiply-adds", "decode tokens/s (quartiles)", "x the first", "training tokens/s")


def cells(side, first):
    """A row of the table."""
    f, beside = side.found, side is not first
    s, difference = f["decode"], f.get("to_first")
    low, high = s["quartiles"]
    return [side.name, f"{f['loss']:.4f}" if "loss" in f else "",
            signed(difference) if difference and beside else "",
            f"{f['percent']:+.2f}" if difference and beside else "",
            f"{f['bits_per_byte']:.4f}" if f.get("bits_per_byte") else "", f"{f['parameters']:,}",
            f"{f['weight_bytes'] / 1e6:.3g}", f"{f['macs'] / 1e6:.3g}",
            f"{s['median']:,.0f} ({low:,.0f}, {high:,.0f})",
            f"{s['median'] / first.found['decode']['median']:.2f}" if beside else "",
            f"{f['training_tokens_per_second']:,.0f}" if f["training_tokens_per_second"] else ""]


def signed(s):
    return f"{s['mean']:+.4f}" + (" ({:+.4f}, {:+.4f})".format(*s["interval"]) if s["interval"] else "")


def text_table(head, rows):
    """Lines of a table for a terminal; columns that no row has are left out."""
    kept = [n for n in range(len(head)) if any(row[n] for row in rows)]
    lines = [[row[n] for n in kept] for row in (head, *rows)]
    wide = [max(len(row[n]) for row in lines) for n in range(len(kept))]
    return ["  ".join(cell.rjust(width) if n else cell.ljust(width)
                      for n, (cell, width) in enumerate(zip(row, wide))).rstrip() for row in lines]


def about_of(sides, prompt, new):
    """The sentence on what the numbers are of."""
    told = [side.found for side in sides if "loss" in side.found][:1]
    text = (f"Losses are of {told[0]['held_out_tokens']:,} held-out tokens of {told[0]['data']} in windows "
            f"of {told[0]['block']}, of each model as it decodes. " if told else "")
    repeats = sides[0].found["decode"]["repeats"]
    return (f"{text}Decoding: {new} tokens behind {prompt + WARM - 1}, batch 1, {repeats} rounds in turns, "
            "medians; MB and multiply-adds are of weights, counted in these steps.")


def verdict(sides):
    """One sentence: what the other run does beside the first; of several, the fastest and the best."""
    first, others = sides[0], sides[1:]
    if not others:
        return (f"{first.name} has nothing to stand beside: name another run, or add --quantize=int8.")
    if len(others) == 1:
        return beside(first, others[0]) + "."
    fastest = max(sides, key=lambda side: side.found["decode"]["median"])
    fast = f"{first.name} decodes fastest" if fastest is first else beside(first, fastest)
    said = [f"Of {len(sides)}, {fast}"]
    judged = [side for side in sides if "to_first" in side.found]
    best = min(judged, key=lambda side: side.found["loss"]) if len(judged) > 1 else fastest
    if best is first:
        said.append(f"no other loss is below {first.name}'s")
    elif best is not fastest:
        said.append(f"{best.name} has the lowest loss: it {beside(first, best).removeprefix(best.name)[1:]}")
    return "; ".join(said) + "."


def beside(first, side):
    """"B decodes 1.4x as fast as A at +0.8% loss, reading 45% of its bytes"."""
    one, other = first.found, side.found
    a, b = one["decode"], other["decode"]
    ratio, share = b["median"] / a["median"], other["weight_bytes"] / one["weight_bytes"]
    alike = a["quartiles"][0] <= b["quartiles"][1] and b["quartiles"][0] <= a["quartiles"][1]
    speed = f"as fast as {first.name}" if alike else f"{ratio:.2g}x as fast as {first.name}"
    return f"{side.name} decodes {speed} {loss_words(other)}, reading {share:.0%} of its bytes"


def loss_words(found):
    difference = found.get("to_first")
    if difference is None:
        return (f"at {percent(found['bits_percent'])} bits a byte" if "bits_percent" in found
                else "(losses do not compare)")
    low, high = difference["interval"] or (-math.inf, math.inf)
    if difference["mean"] == 0:
        return "at the same loss"
    unsure = " (its 95% interval holds no change)" * (low <= 0 <= high)
    return f"at {percent(found['percent'])} loss{unsure}"


def percent(value):
    return f"{value:+.1f}%" if abs(value) >= 0.1 else f"{value:+.2f}%"


# -------------------------------------------------- the picture ---------------------------------------------

PICTURE = "Loss against decode time"


def drawn(cfg, sides):
    """The picture as PNG, also in the file that cfg.plot names -> (its bytes or None, why there is none)."""
    if not cfg.plot and not cfg.html:
        return None, ""
    shown = [side for side in sides if "to_first" in side.found]
    if not shown:
        return None, "no picture: it needs losses that compare"
    if importlib.util.find_spec("matplotlib") is None:
        return None, "no picture: figures need matplotlib: pip install matplotlib"
    png = io.BytesIO()
    with drawing([png, *[cfg.plot] * bool(cfg.plot)], size=(7, 4.5)) as axis:
        for side in shown:
            draw_point(axis, side)
        axis.set(xlabel="ms a decoded token, batch 1; bars: quartiles",
                 ylabel="held-out loss, nats; bars: 95% of the difference to the first")
        axis.margins(0.15)
    return png.getvalue(), ""


def draw_point(axis, side):
    f, (low, high) = side.found, side.found["decode"]["quartiles"]
    x, y, interval = 1e3 / f["decode"]["median"], f["loss"], f["to_first"]["interval"]
    half = (interval[1] - interval[0]) / 2 if interval else 0
    axis.errorbar([x], [y], yerr=half, xerr=[[x - 1e3 / high], [1e3 / low - x]], fmt="o", markersize=5,
                  capsize=2, elinewidth=0.8)
    axis.annotate(side.name, (x, y), fontsize=8, xytext=(5, 5), textcoords="offset points")
