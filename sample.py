"""Sample from a checkpoint of ours or nanoGPT's, or from GPT-2, with nanoGPT's keys.

    python sample.py --out_dir=out-pylib --start="def main(" --num_samples=2
    python sample.py --out_dir=out-pylib-predict --sparse_decode=True --quantize=int8
    python sample.py --out_dir=out-pylib --chat
"""
import dataclasses
import itertools
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import sparse_kernels
from configurator import ConfigError, configure, require, run_script
from data import dataset as datasets
from data import tokenizer as tokenizers
from decode import calibrate, engine, sampling
from decode.counters import step_macs
from decode.quantized import check_quantize
from decode.way import choose_way
from kernels.arena import move_weights
from layers import Packed, TwoOfFour, settle
from model import GPT, build_model, config_of
from training import checkpoint as ckpt
from training import continual, estimate, export, pretrained, retrofit, runtime
from training.pretrained import is_gpt2
from viz import tracing
from viz.chat import FRAMES, Chat, converse, frame_of, show


@dataclass(frozen=True)
class SampleConfig:
    """Every key of sample.py."""
    # --- run ---
    init_from: str = "resume"  # resume (out_dir), gpt2[-medium|-large|-xl], checkpoint, .gguf, HF folder
    out_dir: str = "out"  # run to sample from when init_from is resume
    tokenizer: str = ""  # data folder of the model, if its checkpoint names none or it has moved
    adapter: str = ""  # of a model with adapters, the name of the one that is on; empty: the first
    # --- text ---
    start: str = "\n"  # the prompt, or FILE:prompt.txt
    special: bool = True  # <|endoftext|> in a text is the one token, if the model has it; False: plain text
    num_samples: int = 10  # samples to draw
    max_new_tokens: int = 500  # tokens in each sample
    seed: int = 1337  # decides what is drawn
    chat: bool = False  # answer lines as they are typed; the text so far begins with start
    template: str = "auto"  # with chat, marks of who speaks: chatml, llama3, none; start: the system's text
    stop: str = ""  # with chat, a text that ends an answer, such as "\n"; empty: none
    enter: str = "\n"  # with chat, what is added to a typed line; empty: the model goes on in the same line
    # --- sampling ---
    temperature: float = 0.8  # below 1 less random, above 1 more; 0 is greedy
    top_k: int = 200  # keep only the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the smallest set of tokens whose probability reaches top_p
    min_p: float = 0.0  # keep tokens of at least min_p times the most likely one's probability
    repetition_penalty: float = 1.0  # CTRL's: above 1 makes tokens that already occurred less likely
    draws: str = "engine"  # what chooses ids: the decode engine's generator, or torch's, as nanoGPT does
    overflow: str = "slide"  # past block_size: slide (keep half), or exact (recomputed per token: nanoGPT's)
    # --- faster, as the model was trained for ---
    sparse_decode: bool = False  # the shortcuts that a model was trained for: predicted units, early exits
    exit_threshold: float = 0.0  # leave where a probe is so sure; 0: the model's own, with sparse_decode
    speculate: int = 0  # tokens that the layers below the first exit draft at a time; 0: off
    screen: bool = False  # look at 8 bits of the head first, then at rows that can win: same tokens
    # --- faster, any model ---
    quantize: str = ""  # int8, int4, q4_all, own (a GGUF's 4 bits), or mlp=4,attn=8,head=8; empty: none
    mlp_screen: int = 0  # bits of a copy that picks the units read: 4; of swiglu also 16, no copy; 0: off
    mlp_live: float = 0.15  # with mlp_screen, the mean share of units read; 0: all that fire by themselves
    measure: bool = True  # with screened units, first measure and print what they save; False: begin at once
    mlp_topk: float = 1.0  # untrained: share of the MLP's units that fire, the largest; 1: as the model has
    gate_first: bool = False  # with mlp_topk, of swiglu: the largest gates, chosen before the up projection
    gate_first: bool = False  # with mlp_topk, of swiglu: the largest gates, chosen before the up projection
    attn_topk: float = 1.0  # untrained: share of its inputs that attention reads, the largest; 1: as it has
    window: int = 0  # untrained: tokens that local layers see; 0: as the model has it
    window_pattern: str = "SSSL"  # with window, layers in turn: S sees the window, L everything
    weights: str = ""  # untrained: 2:4 keeps two of every four weights, chosen on training text; empty: all
    val: bool | str = False  # print the validation loss without and with these and quantize; or of a FOLDER
    # --- machine ---
    device: str = "auto"  # auto, cpu, cuda, cuda:0, mps
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    compile: bool | str = False  # torch.compile
    threads: int = 0  # of a CPU's decode steps; 0: as many as decode this model fastest, timed at the start
    # --- looking ---
    trace: str = ""  # also write what each token cost into this HTML page (on a CPU)
    show_program: bool = False  # afterwards list the ops of a decode step, what they read, what they took

    def __post_init__(self):
        require(self.num_samples >= 1, f"num_samples={self.num_samples} must be at least 1")
        require(self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens} must be at least 1")
        runtime.check_compile(self.compile)
        require(0 <= self.seed < 2**63, f"seed={self.seed} must be in 0..2**63-1")
        require(0 <= self.exit_threshold <= 1, f"exit_threshold={self.exit_threshold} must be in [0, 1]")
        require(self.speculate >= 0, f"speculate={self.speculate} must be 0 (off) or more")
        require(not self.speculate or not self.exit_threshold,
                f"speculate={self.speculate} and exit_threshold={self.exit_threshold} both cut depth: choose "
                "one")
        require(not (self.trace and (self.speculate or self.chat or self.compile is True)),
                f"trace={self.trace} watches one token at a time as it is decoded: leave --speculate, --chat "
                "and --compile out")
        require(self.mlp_screen or self.mlp_live == type(self).mlp_live,
                f"mlp_live={self.mlp_live} has no effect without mlp_screen: type --mlp_screen=4 too")
        require(self.measure or self.mlp_screen or self.sparse_decode, "measure=False has no effect without "
                "screened units: type --mlp_screen=4 too, or leave measure out")
        if self.quantize:
            check_quantize(self.quantize)
        require(self.quantize or self.sparse_flags() or self.val is False, f"val={self.val} has no effect "
                "without quantize or a flag that makes the model sparse: type --quantize=int8 or "
                "--mlp_screen=4 too, or leave val out")
        require(0 <= self.threads <= engine.MANY,
                f"threads={self.threads} must be in 0..{engine.MANY}; 0 times how many pay")
        require(not (self.show_program and (self.trace or self.speculate)), "show_program lists the ops of "
                "one program that decodes all tokens: leave --trace and --speculate out")
        require(self.overflow in ("exact", "slide"), f"overflow='{self.overflow}' must be exact or slide")
        sampling.check_sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty,
                                self.draws)
        require(self.template in ("auto", "none", *FRAMES),
                f"template='{self.template}' must be auto, none, {' or '.join(FRAMES)}")
        require(self.template not in FRAMES or (self.special and not self.stop and self.enter == "\n"),
                f"template='{self.template}' has a stop and an enter of its own, and needs special=True: "
                "leave --stop, --enter and --special out, or type --template=none")
        for key in ("stop", "enter", "template"):
            require(self.chat or getattr(self, key) == getattr(type(self), key),
                    f"{key}={getattr(self, key)!r} has no effect without chat: type --chat too")
        require(not self.chat or self.num_samples == type(self).num_samples,
                f"num_samples={self.num_samples} and chat: an answer is one sample; leave num_samples out")

    def sparse_flags(self):
        """What is typed of a GPTConfig to decode otherwise than the model was trained -> {flag: value}."""
        keys = ("mlp_topk", "gate_first", "attn_topk", "window", "window_pattern", "weights", "screen",
                "mlp_screen", "mlp_live")
        found = {key: getattr(self, key) for key in keys if getattr(self, key) != getattr(type(self), key)}
        return found | ({"mlp_live": self.mlp_live} if self.mlp_screen else {})


def load(init_from, out_dir, folder=""):
    """What init_from names -> (GPT in eval mode on the CPU, its tokenizer); folder: see tokenizer_of."""
    return load_run(init_from, out_dir, folder)[:2]


def load_run(init_from, out_dir, folder="", **flags):
    """The same, and the checkpoint's dict without weights: {} for GPT-2. flags: fields of GPTConfig that
    say how it decodes."""
    place = Path(out_dir)                        # a Hugging Face folder may be named like a run
    no_run = os.path.isdir(place) and not any(place.glob("ckpt*.pt"))
    if init_from == "resume" and no_run and is_gpt2(out_dir):
        init_from = out_dir
    if is_gpt2(init_from):
        model = GPT.from_pretrained(init_from)
        check_flags(model.config, flags, init_from)
        model = pretrained.rebuilt(model, dataclasses.replace(model.config, **flags)).eval()
        return model, pretrained_tokenizer(init_from, folder, model.config.vocab_size), {}
    loaded, path = ckpt.read(out_dir if init_from == "resume" else init_from)
    if flags:
        check_flags(config_of(loaded, path), flags, path, kind_of(loaded))
    model = build_model(loaded, path, **flags).eval()
    about = {key: value for key, value in loaded.items() if key not in ("model", "optimizer")}
    return model, tokenizer_of(loaded, folder, model.config.vocab_size), about


def check_flags(config, flags, path, kind=""):
    """Can a model of `config` decode with other flags? kind: what its weights are stored as, else empty."""
    require(not flags.get("mlp_screen") or config.act in ("relu2", "swiglu"), f"mlp_screen="
            f"{flags.get('mlp_screen')} picks among units that are zero, or whose gate is small: it needs a "
            f"model with act='relu2' or 'swiglu', this one has act='{config.act}'; leave mlp_screen out")
    others = [key for key in ("weights", "attn_topk", "mlp_topk", "gate_first") if key in flags]
    require(not others or not kind, f"{path} holds {kind} weights, which {others and others[0]} cannot lay "
            "out anew: name the checkpoint that they were made from")
    dataclasses.replace(config, **flags)


def kind_of(loaded):
    """What a checkpoint's weights are stored as, where that is not their numbers."""
    packed = any(key.endswith(".meta") for key in loaded["model"])
    return "packed" if packed else "quantised" if loaded.get("quantize") else ""


def pretrained_tokenizer(name, folder, vocab_size):
    """The tokenizer of a Hugging Face folder or of GPT-2: what the export carries, what its files say, or
    that of the data `folder`."""
    carried = pretrained.carried(name)
    if carried:
        return tokenizer_of(carried, folder, vocab_size)
    own = pretrained.tokenizer_of(name, vocab_size)
    if own is None or folder:
        require(folder, f"{name} has no tokenizer (tokenizer.json, or vocab.json and merges.txt): copy it "
                        "there, or "
                        "type --tokenizer=FOLDER of the data that the model was trained on")
        return tokenizer_of({"tokenizer": own and own.meta()}, folder, vocab_size)
    return fitting(own, vocab_size)


def tokenizer_of(loaded, folder, vocab_size):
    """A checkpoint's tokenizer; for one of nanoGPT's, that of `folder` or of the dataset that it names
    (GPT-2's if unknown). A folder with another tokenizer than the checkpoint's is an error naming both."""
    own = loaded.get("tokenizer")
    if folder or not isinstance(own, dict):
        place = datasets.find(folder) if folder else trained_on(loaded.get("config"))
        given = tokenizers.load(place)
        tokenizers.require_same(own, given.meta(), f"the checkpoint and {place}", "leave --tokenizer out")
    else:
        given = tokenizers.from_meta(own)
    return fitting(given, vocab_size)


def fitting(given, vocab_size):
    """A tokenizer -> itself, if the model has a row for each of its ids."""
    require(given.vocab_size <= vocab_size, f"the tokenizer has {given.vocab_size} ids, the model "
            f"{vocab_size}: they do not belong together; type --tokenizer=FOLDER of the model's data")
    return given


def trained_on(settings):
    """The data folder of a checkpoint that has no tokenizer, by the `config` that it holds."""
    name = settings.get("dataset", "openwebtext") if isinstance(settings, dict) else "openwebtext"
    try:
        require(isinstance(name, str), "no name")
        return datasets.find(datasets.named(name)[0][0])
    except ConfigError as error:
        raise ConfigError(f"the checkpoint has no tokenizer, and its data, dataset={name!r}, is "
                          "not here: type --tokenizer=FOLDER of that data") from error


def prompt_of(start):
    """The text of --start, read from a file or a pipe (/dev/stdin) after FILE:, without a byte order mark."""
    if not start.startswith("FILE:"):
        return checked_spelling(start)
    path = datasets.expanded(start.removeprefix("FILE:"))
    require(os.path.exists(path) and not os.path.isdir(path), f"start='{start}': {path} does not exist")
    try:
        return checked_spelling(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        require(False, f"start='{start}': {path} cannot be read ({error.strerror})")
    except UnicodeDecodeError as error:
        require(False, f"start='{start}': {path} is not UTF-8 text (byte {error.start})")


def checked_spelling(text):
    """The text as it is; a line says so where its letters are spelled in parts, which data seldom has."""
    if tokenizers.is_decomposed(text):
        print("note: start has letters that are spelled in parts (NFD, as macOS writes names); they are "
              "encoded as they are, and composed text (NFC) has other tokens", file=sys.stderr)
    return text


def main(cfg):
    place = runtime.choose(cfg.device, cfg.dtype, cfg.compile, decodes=True)
    model, tokenizer, about = load_run(cfg.init_from, cfg.out_dir, cfg.tokenizer, **cfg.sparse_flags())
    on = continual.switch_on(model, cfg.adapter)
    sampler = sampling.Sampler(cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p, cfg.repetition_penalty,
                               tokenizer.vocab_size, cfg.draws)
    said, data = [], (cfg.val is True and cfg.tokenizer) or cfg.val
    screens = make_ready(model, cfg, place, about, data, said)
    stream = streaming(model, cfg)
    way = sparse_kernels.path_taken(place.device) + on, decoding(model, cfg, place.device)
    if screens and cfg.measure:
        said.append(saved(model, about, data, cfg.tokenizer, cfg.threads))
    print("\n".join(filter(None, (f"{place}, {', '.join(way)}", *said))), file=sys.stderr)
    model.choose(watch=engine.Watch() if cfg.show_program else None)
    if place.compile:
        model.trunk = torch.compile(model.trunk, dynamic=True)
    if cfg.chat:
        continued = partial(stream, max_new_tokens=cfg.max_new_tokens, sampler=sampler, overflow=cfg.overflow)
        frame, start = framed(cfg, prompt_of(cfg.start))
        converse(Chat(continued, tokenizer, place.device, cfg.seed, start, cfg.stop, cfg.enter, cfg.special,
                      frame))
        return show_program(model)
    write_samples(model, cfg, place, tokenizer, stream, sampler)


def make_ready(model, cfg, place, about, data, said):
    """Turn what was loaded into what decodes: blocks that need no training, whole numbers, device, dtype,
    shortcuts, packing -> does a screen pick units? What there is to print of it joins `said`."""
    flags = cfg.sparse_flags()
    more = {key: value for key, value in flags.items() if key not in ("mlp_screen", "mlp_live")}
    if flags.get("weights") == "2:4":
        said.append(prune(model.to(device=place.device), about, cfg.tokenizer))
    if cfg.quantize:
        said.append(export.quantized(model.to(device=place.device), cfg.quantize, data if not more else False,
                                     about, cfg.tokenizer))
    model.to(device=place.device, dtype=place.dtype).use_policy(cfg.sparse_decode)
    screens = calibrate.screened(model) and (cfg.mlp_screen or cfg.sparse_decode)
    if screens:
        said.append(with_thresholds(model.choose(predict=True), about, cfg.tokenizer))
    if more:
        said.append(untrained(model, cfg, flags, about, data))
    if any(isinstance(module, TwoOfFour | Packed) for module in model.modules()):
        pays, why = sparse_kernels.packing_pays(place.device)
        came_packed = any(isinstance(module, Packed) for module in model.modules())
        settle(model, pack=pays)
        said.append("2:4 weights packed, as the checkpoint has them" if came_packed else why)
    if place.device.type == "cpu":
        said.append(move_weights(model))
    return bool(screens)


def write_samples(model, cfg, place, tokenizer, stream, sampler):
    """Continue the prompt num_samples times, token by token, and say how fast that was."""
    recorder = tracing.Recorder(model, sampler) if cfg.trace else None
    ids = tokenizers.begun(tokenizer, prompt_of(cfg.start), cfg.special)
    require(ids, "start='' has no tokens: type --start=SOMETHING, for example a newline")
    prompt = torch.tensor([ids], device=place.device)
    torch.manual_seed(cfg.seed)
    clock, count = time.perf_counter(), 0
    for _ in range(cfg.num_samples):
        made = list(ids)
        text = tokenizers.StreamDecoder(tokenizer)
        spoken = "".join(text.feed(token) for token in ids)
        show(spoken)
        pieces = (recorder.stream(stream, prompt, cfg.max_new_tokens, spoken, text, overflow=cfg.overflow)
                  if recorder else (text.feed(made.append(int(token)) or made[-1]) for token in
                                    stream(prompt, cfg.max_new_tokens, sampler, overflow=cfg.overflow)))
        for piece in pieces:
            show(piece)
            count += 1
        show(text.flush() + "\n---------------\n")
    seconds = time.perf_counter() - clock
    print(f"{count} tokens in {seconds:.2f} s, {count / seconds:,.0f} tokens/s"
          f"{'' if place.compile else share_of_dense(model, stream, made)}{depth_used(model, stream)}",
          file=sys.stderr)
    show_program(model)
    if recorder:
        about = {"run": cfg.out_dir, "dtype": place.dtype, "policy": cfg.sparse_decode,
                 "overflow": cfg.overflow}
        tracing.write(cfg.trace, recorder, about)
        print(f"what each token cost: {cfg.trace}", file=sys.stderr)


def with_thresholds(model, about, folder=""):
    """Find the thresholds of a model's screened units, where it has none, in the text that it was trained on
    (the data `folder`, or what its checkpoint names), or else in what it writes itself -> what to print."""
    c, source = model.config, "as the checkpoint has them"
    if calibrate.needs_thresholds(model):
        ids, source = some_text(model, about, folder)
        calibrate.calibrate(model, ids, c.mlp_live)
    share = f"{c.mlp_live:.0%} of the MLP's units" if c.mlp_live else "the units that fire"
    what = f"a copy in {c.mlp_screen} bits picks" if c.mlp_screen < 16 else "gates pick"
    return f"screened units: {what} {share}; thresholds {source}"


def some_text(model, about, folder=""):
    """What a model is calibrated on: of the text that it was trained on (the data `folder`, or what its
    checkpoint names), or else of what it writes itself -> (ids (B, T) on its device, in words)."""
    c = model.config
    try:
        ids, place = datasets.training_text(about.get("config"), folder, calibrate.AT_LOAD, c.block_size,
                                            c.vocab_size)
        source = f"from {ids.numel():,} tokens of {place}"
    except ConfigError:                          # no data, or no longer the ones of the checkpoint
        ids = calibrate.own_text(model)
        source = (f"from {ids.numel():,} tokens that the model writes: its training data are not here "
                  "(--tokenizer=FOLDER names them)")
    return ids.to(model.lm_head.weight.device), source


AT_ONCE = 10**11                                 # FLOPs of a loss that is measured unasked: about a second
WORTH = 2048                                     # tokens: fewer say little


def saved(model, about, val, folder, threads):
    """What screened units save and lose, measured beside the same weights without them -> what to print.

    val: True or a data set: the loss on estimate.VAL_TOKENS tokens of it; False: on as many of the model's
    own data as AT_ONCE allows, if these are worth it. folder: its own data, if its checkpoint names none.
    """
    c, settings = model.config, about.get("config")
    try:
        stream = datasets.held_out(val or folder or True, settings if isinstance(settings, dict) else {},
                                   about.get("tokenizer"), c.block_size, c.vocab_size)
    except ConfigError:
        if val:
            raise
        stream = None
    device = model.lm_head.weight.device
    text = stream.batch(0)[0][:1] if stream else calibrate.own_text(model, 64)
    threads = threads or model.choices.threads or torch.get_num_threads()
    beside = calibrate.beside_dense(model, text.to(device), threads)
    parts = ([f"reads {beside['bytes']:.0%} of the dense model's bytes",
              f"{beside['speed']:.1f}x its tokens/s"] if beside
             else [f"nothing is saved: forward decodes ({beside})"])
    afford = AT_ONCE // (4 * sum(t.numel() for t in (*model.parameters(), *model.buffers())))
    tokens = estimate.VAL_TOKENS if val else min(estimate.VAL_TOKENS, afford)
    if stream is None:
        parts.append("loss not measured: there is no held-out text here (--tokenizer=FOLDER names it)")
    elif tokens < WORTH:
        parts.append("loss not measured: it takes a while for this model, --val=True does it")
    else:
        (with_, count), (without, _) = (estimate.validation_loss(model.choose(predict=on), stream, tokens)
                                        for on in (True, False))
        model.choose(predict=True)
        parts.append(f"loss {with_ - without:+.4f} on {count:,} held-out tokens")
    return "screened units: " + "; ".join(parts)


def prune(model, about, folder):
    """Choose which weights 2:4 keeps of a dense model's -> what to print."""
    ids, source = some_text(model, about, folder)
    retrofit.choose_pruned(model, ids)
    return f"2:4 keeps weights by their size and that of their inputs, {source}"


def untrained(model, cfg, flags, about, val):
    """Of a model that decodes with flags that it was not trained with -> what to print: with its validation
    loss beside the model's own, where `val` asks for that: True, or a data set."""
    typed = flags | ({"quantize": cfg.quantize} if cfg.quantize else {})
    what = "untrained with " + ", ".join(f"{key}={value}" for key, value in typed.items())
    if not val:
        return f"{what}: --val=True prints what that costs"
    settings, c = about.get("config") if isinstance(about.get("config"), dict) else {}, model.config
    stream = datasets.held_out(val, settings, about.get("tokenizer"), c.block_size, c.vocab_size)
    own, weight = load_run(cfg.init_from, cfg.out_dir, cfg.tokenizer)[0], next(model.parameters())
    before = estimate.validation_loss(own.to(device=weight.device, dtype=weight.dtype), stream)
    return estimate.beside(before, estimate.validation_loss(model, stream), what,
                           settings.get("dataset") if val is True else val)


def framed(cfg, start):
    """What stands around the lines of a conversation -> (a chat.Frame or None, what it begins with): by
    default what a pretrained model has learnt, with the system's text that its template has."""
    place = cfg.out_dir if cfg.init_from == "resume" else cfg.init_from
    others = is_gpt2(place) and cfg.special and not cfg.stop and cfg.enter == type(cfg).enter
    template = pretrained.chat_template_of(place) if others else None
    own, system = frame_of(template if isinstance(template, str) else None)
    name = own if cfg.template == "auto" else cfg.template
    if template and cfg.template == "auto" and name is None:
        pretrained.note(f"{place} has a template for conversations that is not {' or '.join(FRAMES)}: lines "
                        "stand as they are; --enter and --stop say what stands between them")
    if name not in FRAMES:
        return None, start
    return FRAMES[name], start if start != type(cfg).start else system if name == own else ""


def streaming(model, cfg):
    """What continues a prompt: every token through the model, or drafts that it verifies. Early exits go as
    far as cfg.exit_threshold says."""
    if cfg.exit_threshold:
        require(model.config.exits, f"exit_threshold={cfg.exit_threshold} needs a model with early exits: "
                f"train one with --exits={max(1, model.config.n_layer // 2)}, for example")
        model.choose(leave_at=cfg.exit_threshold)
    if not cfg.speculate:
        return Told(partial(sampling.stream, model), model.config.block_size)
    return Told(sampling.Speculation(model, cfg.speculate).stream, model.config.block_size)


class Told:
    """A stream that says once, on stderr, when a text has grown past block_size and the window slides."""

    def __init__(self, stream, block_size):
        self.stream, self.block_size, self.told = stream, block_size, False

    def __call__(self, prompt, max_new_tokens, sampler, overflow):
        tokens = self.stream(prompt, max_new_tokens, sampler, overflow=overflow)
        if overflow != "slide":
            return tokens
        before = min(max_new_tokens, max(0, self.block_size + 1 - prompt.size(1)))
        return itertools.chain(itertools.islice(tokens, before), self.slide(tokens, before < max_new_tokens))

    def slide(self, tokens, slides):
        if slides and not self.told:
            self.told = True
            print(f"\nnote: the text has passed block_size={self.block_size}, so each token sees the last "
                  f"{max(1, self.block_size // 2)} to {self.block_size}; --overflow=exact shows all of them "
                  "the last window anew, as nanoGPT does", file=sys.stderr)
        yield from tokens


def decoding(model, cfg, device):
    """What decodes and on how many threads, in the words of the first line; chooses these."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.speculate:
        return "forward decodes (--speculate drafts and verifies with the layers themselves, draws by torch)"
    way, threads, took = choose_way(model, device, cfg.threads)
    if way != "decode engine":
        return way
    timed = f" ({', '.join(f'{n}: {seconds * 1e6:,.0f}' for n, seconds in took.items())} us a step)"
    return f"{way}, {threads} thread{'s' * (threads != 1)}{timed * bool(took)}"


def show_program(model):
    """Where it was asked for, the table of ops."""
    if model.choices.watch is not None:
        print(model.choices.watch, file=sys.stderr)


def share_of_dense(model, stream, ids):
    """What the last line adds of a model whose decode steps leave weights out, counted on the end of a text;
    drafts cost otherwise."""
    if hasattr(stream.stream, "__self__"):
        return ""
    text = torch.tensor([ids[-min(64, model.config.block_size):]], device=model.lm_head.weight.device)
    macs, whole = step_macs(model, text)
    return f", {macs / whole:.0%} of the dense multiply-adds" if macs < 0.995 * whole else ""


def depth_used(model, stream):
    """What the last line adds of a run that did not take every token through every layer by itself."""
    speculation = getattr(stream.stream, "__self__", None)
    if speculation:
        return (f", {speculation.accepted / max(1, speculation.proposed):.0%} of "
                f"{speculation.proposed} drafted tokens accepted")
    if model.config.exits and model.choices.leave_at is not None:
        exits = model.transformer.exits
        return (f", {exits.layers_run / exits.tokens_run:.2f} of {model.config.n_layer} layers per token, "
                "the prompt's included")
    return ""


if __name__ == "__main__":
    run_script(lambda: main(configure(SampleConfig, files=True)), encoding="utf-8")
