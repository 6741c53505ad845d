"""Runs side by side: loss on the same held-out text, what a decode step reads, tokens/s; one verdict."""
import copy
import os
import re
import statistics
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import torch

import sparse_kernels
from benchmarks import ROOT, Timed, foreign, settings
from benchmarks.decode import require_installed, rest
from benchmarks.peers import LlamaCpp
from benchmarks.record import (
    LLAMA,
    busy,
    card_load,
    commit_of,
    hardware,
    load_average,
    versions,
    write_atomically,
)
from benchmarks.report import document
from benchmarks.screen import STORED, data_of
from benchmarks.settings import PLAIN
from benchmarks.texts import judge, text_of
from benchmarks.timing import interleave, measurement
from benchmarks.verdict import HEAD, PICTURE, about_of, cells, drawn, text_table, verdict
from configurator import ConfigError, close_match, require
from data import dataset as datasets
from data import tokenizer as tokenizers
from decode import calibrate, engine, sampling
from decode.counters import whole_macs
from decode.quantized import check_quantize, forms_of, is_quantized, kinds_in, quantize
from decode.way import choose_way
from kernels.arena import move_weights
from layers import Packed, TwoOfFour, settle
from model import GPT, build_model, config_of
from training import checkpoint, continual, pretrained, retrofit, runtime
from training.pretrained import is_gguf
from viz.figures import pyplot
from viz.plots import is_number, names_of, read_rows

QUICK = dict(tokens=4096, repeats=5)
SECONDS, QUICK_SECONDS, FEWEST = 15, 3, 3        # of timing for all sides together; rounds at the least
WARM = 4                                         # tokens ahead of those that are timed: prompt, recording
FOLDERS = r"(?<![\w.~-])/(?:[^/\s']+/)+"           # of absolute paths: a record names none
USAGE = "type python bench.py compare out-pylib out-pylib@int8, for example"


@dataclass(frozen=True)
class Compare(Timed):
    """Any runs, its words: loss, bytes a token and tokens/s of each beside the first, and one verdict."""
    runs: tuple = ()  # the words: runs, checkpoints, exports, or RUN@int8+mlp_screen=4, as sample.py decodes
    dataset: str = ""  # data folder, or file of text, that every loss is of; empty: each run's own data
    tokens: int = 16384  # of held-out text that a loss is of, or all there is if that is less
    quantize: str = ""  # also every run in whole numbers: int8, int4, q4_all, mlp=4,attn=8; several by commas
    llamacpp: bool = False  # also llama.cpp with the first run's weights: its file, bf16, q8_0, q4_0; greedy
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
        if self.llamacpp:
            require_installed("llamacpp")
            require(self.temperature == 0 and self.threads, "llamacpp stands beside what takes the largest "
                    f"logit on as many threads, these are temperature={self.temperature} and threads="
                    f"{self.threads}: type --temperature=0 --threads=2")
        sampling.check_sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty,
                                self.draws)
        for kind in kinds_in(self.quantize):
            check_quantize(kind, smaller=True)
        for key in ("html", "plot"):
            file, folder = getattr(self, key), Path(getattr(self, key)).parent
            require(os.path.isdir(folder), f"{key}='{file}': the folder {folder} does not exist: make it")
            require(not file or (os.access(folder, os.W_OK) and not os.path.isdir(file)),
                    f"{key}='{file}' cannot be written there: name another file")


def compare(cfg):
    place = runtime.choose(cfg.device, cfg.dtype, False, decodes=True)
    card = place.device if place.device.type == "cuda" else None
    warning = busy(load_average(), card, card_load(card))
    if cfg.plot:
        pyplot()                                 # better missed now than behind the measurements
    require(not cfg.llamacpp or place.device.type == "cpu", "--llamacpp would run on the CPU and ours on "
            f"{place}: type --device=cpu")
    print(f"{place}, {sparse_kernels.path_taken(place.device)}")
    sides, notes = sides_of(cfg, place)
    sides += llama_sides(cfg, sides[0]) if cfg.llamacpp else []
    notes += judge(cfg, sides, place.device)
    prompt, new = lengths(cfg, sides)
    timed = time_sides(cfg, sides, place.device, prompt, new)
    for side in sides:
        side.found["decode"] = timed["sides"][side.name]
    picture, why = drawn(cfg, sides)
    said, notes = verdict(sides), notes + [why] * bool(why)
    sentences = [about_of(sides, prompt + WARM - 1, new), *notes]
    rows = [cells(side, sides[0]) for side in sides]
    try:                                         # in this order: a closed pipe would end it before the page
        if cfg.html:
            write_page(cfg.html, place, said, [*sentences, warning], rows, picture)
    finally:
        print("\n".join((*text_table(HEAD, rows), *sentences, said)))
    return {"measurements": {"decode": timed}, "runs": {side.name: side.found for side in sides},
            "verdict": said, "notes": [re.sub(FOLDERS, "", note) for note in notes], "prompt": prompt,
            "new": new, "place": str(place), "kernels": sparse_kernels.path_taken(place.device),
            "seeds": [cfg.seed]}


def write_page(path, place, said, sentences, rows, picture):
    """One HTML file that opens without a network: the verdict, the table, the picture, the machine."""
    where = hardware() | {"versions": versions(), "commit": commit_of(ROOT), "decoding": str(place)}
    part = "Beside the first", sentences, HEAD, rows
    pictures = {PICTURE: picture} if picture else {}
    write_atomically(path, document("runs side by side", where, [part], pictures, said))


# -------------------------------------------------- models ------------------------------------------------

class Side:
    """One model as it decodes. about: its checkpoint without weights; data: the folder of its held-out text,
    None where it is not here; tokenizer: None where it is not known; found: what the record keeps of it;
    text: what sides share whose losses are of the same windows; how: the Setting that its word has."""

    def __init__(self, name, model, about, data, tokenizer, found, how=PLAIN):
        self.name, self.model, self.about, self.data, self.how = name, model, about, data, how
        self.tokenizer, self.found, self.text = tokenizer, found, data and text_of(data)

    def config(self):
        return self.model.config


def sides_of(cfg, place):
    """Every run, and each of them in every kind of whole numbers, ready to decode -> (sides, sentences)."""
    given = [settings.of_word(word) for word in cfg.runs]
    read = [load(run, how) for run, how in given]    # all of them first: a damaged one costs no measurement
    require(not cfg.exit_threshold or any(model.config.exits for model, _ in read), "exit_threshold="
            f"{cfg.exit_threshold} needs a model with early exits, and none of these has them: leave it out")
    if cfg.dataset and not foreign.is_text(cfg.dataset):
        data_of(cfg.dataset, {})                 # typed: what is wrong with it is a mistake, not a note
    sides, notes, seen = [], [], set()
    for name, (run, how), (model, about) in zip(names(cfg.runs), given, read):
        data, why = data_or_not(cfg, about)
        notes += [f"{name}: no loss: {why}"] if why else []
        side = Side(name, model, about, data, tokenizer_of(about, data, model.config.vocab_size), {
            "parameters": parameters_of(model.config), "block_size": model.config.block_size,
            "training_tokens_per_second": training_speed(run, about)})
        if how.text:
            apply(side, how, notes, again=run in seen)
        seen.add(run)
        whole = is_quantized(side.model)
        if cfg.quantize and whole:
            notes.append(f"{name} holds whole numbers already: it is compared as it is")
        kinds = kinds_in(cfg.quantize) if not whole else ()
        more = [quantised(side, kind, notes) for kind in kinds]
        for each in (side, *more):
            make_ready(each, cfg, place, notes)
        sides += [side, *more]
    return sides, notes


def llama_sides(cfg, first):
    """llama.cpp with the weights of the first run: its file as it is, if it has one, and one of each type."""
    run, _ = settings.of_word(cfg.runs[0])
    ours, _ = load(run)
    torch.set_num_threads(cfg.threads)
    found = {"parameters": parameters_of(ours.config), "block_size": ours.config.block_size, "way": LLAMA,
             "training_tokens_per_second": None, "threads": cfg.threads, "macs": whole_macs(GPT, ours.config)}
    files = [("its own file", run)] * is_gguf(run) + [(stored, None) for stored in STORED]
    models = {f"{LLAMA} {stored}": LlamaCpp(ours, stored, path) for stored, path in files}
    return [Side(name, model, first.about, first.data, first.tokenizer, found | {"weight_bytes": model.read})
            for name, model in models.items()]


def load(run, how=PLAIN):
    """What a word names, as sample.py reads it -> (GPT in eval mode, its checkpoint without weights)."""
    folder = Path(run)
    near = [str(path) for path in (folder.parent.glob("*") if os.path.isdir(folder.parent) else ())]
    require(os.path.exists(run) or run in pretrained.GPT2_SIZES, f"'{run}' is neither a run's folder nor a "
            f"checkpoint{close_match(run, near)}: {USAGE}")
    if pretrained.is_gpt2(run) and not any(folder.glob("ckpt*.pt")):
        model = GPT.from_pretrained(run)
        settings.check(how, model.config, run)
        model = pretrained.rebuilt(model, replace(model.config, **dict(how.flags)))
        model.crop_block_size(min(model.config.block_size, foreign.CONTEXT))
        about = {"config": pretrained.carried(run).get("config"), "foreign": True,
                 "tokenizer": pretrained.description_of(run, model.config.vocab_size)}
        return model.eval(), about
    loaded, path = checkpoint.read(run)
    packed = any(key.endswith(".meta") for key in loaded["model"])
    settings.check(how, config_of(loaded, path), run, "packed" if packed else
                   "quantised" if loaded.get("quantize") else "")
    model = build_model(loaded, path, **dict(how.flags)).eval()
    return model, {key: value for key, value in loaded.items() if key not in ("model", "optimizer")}


def names(words):
    """The shortest ends of paths that tell them apart, each with how it decodes; the same again has a number
    behind it."""
    places = [(place_of(run), how.text) for run, how in map(settings.of_word, words)]
    distinct = [*dict.fromkeys(place for place, _ in places)]
    short = {place: named(place, name) for place, name in zip(distinct, names_of(distinct))}
    counts = [places[:n + 1].count(place) for n, place in enumerate(places)]
    return [short[place] + f"@{text}" * bool(text) + (f" ({count})" if count > 1 else "")
            for (place, text), count in zip(places, counts)]


def named(place, name):
    """A name that says of which run: a checkpoint's own file is called as every run's."""
    own = fnmatch(name, "ckpt*.pt") or name in pretrained.FILES
    return f"{Path(place).parent.name}/{name}" if own else name


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


def apply(side, how, notes, again):
    """Make a side decode as its word says, as sample.py does. again: its run has a row already."""
    if dict(how.flags).get("weights") == "2:4":
        retrofit.choose_pruned(side.model, calibration_text(side))
    if how.quantize:
        side.model = whole_numbers(side, how.quantize, notes)
    side.how, side.found = how, side.found | {"decodes_with": how.text} | (
        {"training_tokens_per_second": None} if again else {})


def quantised(side, kind, notes):
    """The same run in whole numbers too -> Side."""
    found = side.found | {"quantize": kind, "training_tokens_per_second": None}
    return Side(f"{side.name}, {kind}", whole_numbers(side, kind, notes), side.about, side.data,
                side.tokenizer, found, side.how)


def whole_numbers(side, kind, notes):
    """A copy of a side's model in whole numbers, as sample.py --quantize makes them."""
    model, moments = copy.deepcopy(side.model), None
    if 4 in forms_of(kind):
        ids = training_text(side, calibrate.TOKENS)
        moments = None if ids is None else calibrate.input_moments(model, ids)
        notes += [f"{side.name}, {kind}: scales by plain least squares, its training data are not here"] * (
            ids is None)
    return quantize(model, kind, moments=moments)


def training_text(side, count):
    """About `count` ids (B, T) of a run's training data; None where they are not here."""
    c = side.config()
    try:
        folder = side.data and str(side.data)
        return datasets.training_text(None, folder, count, c.block_size, c.vocab_size)[0]
    except ConfigError:
        return None


def calibration_text(side):
    """Ids (B, T) that a model is calibrated on: of its training data, or else what it writes itself."""
    ids = training_text(side, calibrate.AT_LOAD)
    return calibrate.own_text(side.model) if ids is None else ids


def make_ready(side, cfg, place, notes):
    """Turn a side's model into what sample.py decodes with: device, dtype, shortcuts, packing, threads."""
    model = side.model.to(device=place.device, dtype=place.dtype).use_policy(
        cfg.sparse_decode or side.how.sparse_decode)
    continual.switch_on(model, "")
    screens = cfg.sparse_decode or side.how.sparse_decode or "mlp_screen" in dict(side.how.flags)
    if screens and calibrate.screened(model):
        model.choose(predict=True)
        if calibrate.needs_thresholds(model):
            calibrate.calibrate(model, calibration_text(side).to(place.device), model.config.mlp_live)
    if cfg.exit_threshold and model.config.exits:
        model.choose(leave_at=cfg.exit_threshold)
    if any(isinstance(module, TwoOfFour | Packed) for module in model.modules()):
        settle(model, pack=sparse_kernels.packing_pays(place.device)[0])
    if place.device.type == "cpu":
        move_weights(model)
    side.found["way"], side.found["threads"], _ = choose_way(model, place.device, cfg.threads)
    if side.found["way"].startswith("forward"):
        notes.append(f"{side.name}: {side.found['way']}")


# -------------------------------------------------- decoding ----------------------------------------------

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


class LlamaDecoder:
    """The same for llama.cpp, whose steps are not counted: a dense model's are known."""

    def __init__(self, side, prompt, new):
        self.model, self.prompt, self.new = side.model, prompt[0].tolist(), new

    def restart(self):
        self.model.lib.llama_memory_clear(self.model.memory, False)
        self.last = self.model.next_id(self.prompt)
        self.make(WARM - 1)                      # which the prompt's last token has begun

    def __call__(self):
        self.make(self.new)

    def make(self, count):
        for _ in range(count):
            self.last = self.model.next_id([self.last])

    def count(self):
        return {}


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
    decoders = {}
    for side in sides:
        text = prompt_of(side, prompt).to(device)
        decoders[side.name] = (LlamaDecoder(side, text, new) if isinstance(side.model, LlamaCpp) else
                               Decoder(side, cfg, text, new))
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
