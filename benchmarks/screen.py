"""Screened units of a trained run: what the policy loses, what a step reads, how fast it decodes. Beside it
the same model dense, in whole numbers, and llama.cpp at its shape."""
import copy
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import sparse_kernels
from benchmarks import Timed, foreign
from benchmarks.decode import require_installed, rest
from benchmarks.peers import LlamaCpp
from benchmarks.record import LLAMA, read
from benchmarks.stats import mean_interval
from benchmarks.timing import interleave, measurement
from configurator import ConfigError, require
from data import dataset as datasets
from decode import calibrate, engine
from decode.context import Cache
from decode.quantized import check_quantize, forms_of, kinds_in, quantize
from kernels.arena import move_weights
from layers import Linear
from model import GPT, GPTConfig, build_model
from training import checkpoint as ckpt
from training.runtime import DTYPES
from viz.figures import drawing, name_points

STORED = "bf16", "q8_0", "q4_0"                  # files of llama.cpp
QUICK = dict(shares="15", bits="4", quantize="int8", windows=8, repeats=3)
ALL_ROWS = ", all rows"                          # of W_down: as an engine reads them that skips none
COUNTED = 16                                     # steps whose bytes are counted


@dataclass(frozen=True)
class Screen(Timed):
    """Screened units of a trained run: loss, bytes, tokens/s, beside dense, whole numbers, llama.cpp."""
    out_dir: str = "out"  # the run; a folder behind the word screen is the same
    dataset: str = ""  # data folder: thresholds from its training text, losses on the other; empty: the run's
    shares: str = "5,10,15,20,30"  # mean shares of the units that are read, in percent, by commas
    bits: str = "2,3,4,8"  # of the copy, by commas; 2 and 3 are stored, and so timed, as 4
    quantize: str = "int8,int4,q4_all"  # whole numbers, dense and under a screen, by commas; empty: none
    windows: int = 32  # windows of held-out text, each as long as the block, for the loss
    prompt: int = 128  # tokens before the first one that is timed
    new: int = 128  # tokens that every side reads in a round, the same held-out text
    threads: int = 2  # CPU threads of both sides
    dtype: str = "bfloat16"  # of the weights and the cache that decode: bfloat16 or float32
    llamacpp: bool = False  # also llama.cpp, random weights of this shape, as bf16, q8_0 and q4_0 files
    loss_only: bool = False  # losses and bytes, no times: for a machine that is busy
    time_only: bool = False  # bytes and times, no losses
    losses: str = ""  # an earlier record of this run: losses and thresholds that it has are not found again
    quick: bool = False  # 15% by 4 bits, beside bf16 and int8, on 8 windows, in 3 rounds
    plot: str = ""  # also draw the loss against tokens/s (or bytes a token) into this PNG (needs matplotlib)

    def __post_init__(self):
        super().__post_init__()
        for key in QUICK if self.quick else ():
            if getattr(self, key) == getattr(type(self), key):
                object.__setattr__(self, key, QUICK[key])
        require(all(w.isdigit() and 1 <= int(w) <= 100 for w in self.shares.split(",")),
                f"shares='{self.shares}' must be whole percents by commas: type --shares=10,15,20")
        require(set(self.bits.split(",")) <= set("2348"),
                f"bits='{self.bits}' must be 2, 3, 4 or 8, by commas: type --bits=4")
        for kind in kinds_in(self.quantize):
            check_quantize(kind)
        require(self.windows >= 2, f"windows={self.windows} must be 2 or more: an interval needs them")
        require(self.prompt >= 1 and self.new >= COUNTED,
                f"prompt={self.prompt} must be at least 1 and new={self.new} at least {COUNTED}")
        require(self.dtype in ("bfloat16", "float32"), f"dtype='{self.dtype}' must be bfloat16 or float32")
        require(not (self.loss_only and self.time_only), "loss_only measures no times and time_only nothing "
                "else: type one of them")
        require(not self.losses or Path(self.losses).is_file(), f"losses='{self.losses}' does not exist: "
                "type the file that --loss_only --out=FILE has written")
        if self.llamacpp:
            require_installed("llamacpp")


def screen(cfg):
    library, why = sparse_kernels.cpu_library()
    require(library, f"screened units are measured by the decode engine: {why}")
    run = Run(cfg)
    print(f"{run.parameters:,} parameters, {cfg.dtype}, {sparse_kernels.path_taken(torch.device('cpu'))}")
    points, readers = measure_all(cfg, run)
    without = [name for name, p in points.items() if "loss" not in p]
    require(not (cfg.plot and without), f"plot: the loss of '{''.join(without[:1])}' is not measured: "
            "leave time_only out, or type --losses=FILE of a record that has it")
    measurements = {} if cfg.loss_only else {"decode": timed(cfg, run, points, readers)}
    tell(cfg, run, points, measurements)
    if cfg.plot:
        draw(cfg.plot, points, measurements)
    return {"measurements": measurements, "points": points, "model": run.about, "seeds": [0],
            "kernels": sparse_kernels.path_taken(torch.device("cpu"))}


class Run:
    """A checkpoint and its texts: training text for thresholds, held-out windows (x, y) for losses."""

    def __init__(self, cfg):
        self.loaded, self.path = ckpt.read(cfg.out_dir)
        args = self.loaded["model_args"]
        require(args.get("act", "gelu") in ("relu2", "swiglu"), f"{self.path} has act='"
                f"{args.get('act', 'gelu')}': units are screened in models with act='relu2' or 'swiglu'")
        require(not self.loaded.get("quantize"), f"{self.path} holds whole numbers already: name the "
                "checkpoint that was quantised")
        self.dtype, block, vocab = DTYPES[cfg.dtype], args["block_size"], args["vocab_size"]
        require(cfg.prompt + cfg.new <= block, f"prompt={cfg.prompt} and new={cfg.new} must fit in the run's "
                f"block_size={block}: type --prompt={block // 2} --new={block // 2}")
        folder = data_of(cfg.dataset, self.loaded)
        rows = max(1, calibrate.TOKENS // block)
        self.text, _ = datasets.TokenStream(folder, "train", block, rows, 0, vocab).batch(0)
        held_out = datasets.TokenStream(folder, "val", block, cfg.windows, 0, vocab, sampling="epoch")
        require(cfg.windows <= held_out.samples, f"windows={cfg.windows}: {folder} has {held_out.samples} of "
                f"{block} tokens: type --windows={held_out.samples}")
        self.x, self.y = held_out.batch(0)
        self.moments = None                      # the mean squares of inputs, where 4 bits want them
        plain = build_model(self.loaded, self.path)
        self.config, self.parameters = plain.config, sum(p.numel() for p in plain.parameters())
        self.about = {"sha256": ckpt.sha_of(self.path), "parameters": self.parameters, "args": args,
                      "dtype": cfg.dtype, "data": folder.name, "held_out_tokens": self.x.numel(),
                      "calibrated_on_tokens": self.text.numel()}

    def models(self, kind, bits, all_rows=False):
        """-> a model whose weights are as they decode and whose sums are fp32, and the one that decodes.
        all_rows: it reads all rows of W_down, also those of silent units."""
        some = dict(mlp_screen=bits, mlp_live=0.5)                   # shares are set one by one
        model = build_model(self.loaded, self.path, **some).eval()
        for block in model.transformer.h if all_rows else ():
            block.mlp.c_proj = by_output(block.mlp.c_proj)
        if kind:
            if 4 in forms_of(kind) and not self.moments:
                self.moments = calibrate.input_moments(model.use_policy(False), self.text)
            quantize(model, kind, moments=self.moments)
        decodes = copy.deepcopy(model.to(self.dtype))
        move_weights(decodes)
        return model.float(), decodes


def by_output(linear):
    """A NeuronMajor as a Linear, whose memory does not lie by unit: a step reads all of it."""
    found = Linear(linear.in_features, linear.out_features, linear.bias is not None)
    found.weight, found.bias = torch.nn.Parameter(linear.weight.detach().contiguous()), linear.bias
    return found


def data_of(dataset, loaded):
    """The folder of the run's token files, or of those that --dataset names, of the same tokenizer. A file of
    text, and what is built in for a model of others, are encoded first."""
    settings, again = loaded.get("config"), "type --dataset=FOLDER of data with the run's tokenizer"
    name = dataset or (isinstance(settings, dict) and settings.get("dataset"))
    if foreign.is_text(dataset) or (not name and loaded.get("foreign")):
        return foreign.data_of(dataset, loaded)
    require(isinstance(name, str) and name, f"the checkpoint names no data: {again}")
    try:
        folder = datasets.find(datasets.named(name)[0][0])
    except ConfigError as error:
        require(dataset, f"the checkpoint's data, dataset='{name}', are not here: {again}")
        raise error
    lacks = datasets.missing_files(folder)
    require(not lacks, f"{folder} has no {' and no '.join(lacks)}: prepare it first, or {again}")
    if isinstance(loaded.get("tokenizer"), dict):
        datasets.require_same(loaded["tokenizer"], datasets.described(datasets.meta_of(folder)),
                              f"the checkpoint and {folder}", again)
    return folder


def measure_all(cfg, run):
    """-> {name: what is known of a point}, {name: its Reader}; with loss_only also points of the earlier
    record that are not asked for, so that one grows by several commands."""
    earlier = earlier_points(cfg, run)
    base, points, readers = str(run.dtype).removeprefix("torch."), {}, {}
    bits, shares = ([int(n) for n in words.split(",")] for words in (cfg.bits, cfg.shares))
    four = 4 if 4 in bits else bits[0]
    families = [("", some) for some in bits] + [(kind, four) for kind in kinds_in(cfg.quantize)]
    whole = run.config.act == "relu2"            # has silent units, whose rows a step leaves unread
    count = len(families) * (1 + len(shares)) - len(bits) + 1 + whole * (len(families) - len(bits) + 1)
    progress = tqdm(total=count * cfg.windows, unit="window", disable=cfg.time_only)
    ways = [(*family, all_rows) for family in families for all_rows in sorted({whole, False}, reverse=True)]
    for kind, some, all_rows in ways:
        if all_rows and (kind or base) + ALL_ROWS in points:
            continue
        exact, decodes = run.models(kind, some, all_rows)
        own, seen = calibrate.screened(exact)[0].own_copy(), None
        for share in (0,) if all_rows else (0, *shares):
            copied = f", {'its own' if own else f'{some}-bit'} copy, {share}%" * bool(share)
            name = (kind or base) + copied + ALL_ROWS * all_rows
            if name in points:
                continue
            point = points[name] = {"weights": kind or base, "bits": some * bool(share), "own_copy": own,
                                    "share": share / 100} | earlier.get(name, {})
            if share and "edges" not in point:
                seen = seen or calibrate.survey(exact, run.text)
                calibrate.set_thresholds(seen, share / 100)
                point["edges"] = [float(mlp.edge) if mlp.edge.isfinite() else None for mlp in seen]
            for model in (exact, decodes):
                set_edges(model.use_policy(bool(share)), point.get("edges", ()))
            if "loss" not in point and not cfg.time_only:
                point |= loss_of(exact, run, progress)
            else:
                progress.update(cfg.windows)
            readers[name] = Reader(decodes, run.x[:1], cfg)
            point["bytes"] = readers[name].count()
    progress.close()
    compare(points, base)
    return (earlier | points, {}) if cfg.loss_only else (points, readers)


def earlier_points(cfg, run):
    """The points of the record --losses, which must be of this checkpoint, on as many windows."""
    if not cfg.losses:
        return {}
    record = read(cfg.losses)
    require(record["subcommand"] == "screen" and record["model"] == run.about,
            f"losses='{cfg.losses}' is of another checkpoint than {run.path}, or of other tokens: name a "
            f"record of this one with --windows={cfg.windows}")
    return record["points"]


def set_edges(model, edges):
    """Set thresholds as a record has them; it knows no infinity."""
    for mlp, edge in zip(calibrate.screened(model), edges):
        mlp.edge.fill_(-math.inf if edge is None else edge)


@torch.no_grad()
def loss_of(model, run, progress):
    """The model's mean loss on the held-out windows in nats, that of each of them, and each layer's share of
    units that are not zero."""
    found, live = [], {}
    hooks = [block.mlp.c_proj.register_forward_pre_hook(
        lambda _, args, layer=layer: live.setdefault(layer, []).append((args[0] != 0).float().mean().item()))
        for layer, block in enumerate(model.transformer.h)]
    for x, y in zip(run.x.split(2), run.y.split(2)):
        logits, _ = model(x, y)
        found += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)
        progress.update(len(x))
    for hook in hooks:
        hook.remove()
    losses = [round(float(loss), 5) for loss in found]
    return {"loss": statistics.fmean(losses), "of_windows": losses,
            "live": [round(statistics.fmean(live[layer]), 4) for layer in sorted(live)]}


def compare(points, base):
    """Add to every point its loss less the dense one's, window by window, with a 95% interval."""
    dense = points[base]
    for point in points.values() if "loss" in dense else ():
        if "loss" not in point:                  # timed alone, and not in the earlier record
            continue
        point["nats"] = mean_interval([a - b for a, b in zip(point["of_windows"], dense["of_windows"])])
        point["percent"] = 100 * (point["loss"] / dense["loss"] - 1)


class Reader:
    """One row of held-out text that a model's decode program reads token by token. It chooses ids greedily
    and none is used: every side reads the same text."""

    def __init__(self, model, text, cfg):
        self.text, self.first, self.new = text.clone(), cfg.prompt, cfg.new
        choices = model.chosen(1)._replace(threads=torch.get_num_threads())
        cache = Cache(model, 1, cfg.prompt + cfg.new, choices)
        self.program = engine.program_of(model, cache, model.config.vocab_size, 1, text.device)
        require(self.program, f"the decode engine does not take this model ({self.program})")
        self.read(0, cfg.prompt)

    def read(self, first, count):
        self.program.begin(self.text, [0], [first + 1])
        for _ in range(count):
            self.program.step()

    def rewind(self):
        """The next call begins where this one began: what is behind is written over."""

    def __call__(self):
        self.read(self.first, self.new)

    def count(self):
        """Bytes of weights of a step, the mean of COUNTED ones."""
        with sparse_kernels.counting() as tally:
            self.read(self.first, COUNTED)
        return round(tally.bytes / COUNTED)


class LlamaReader:
    """The same for llama.cpp, which holds random weights of the run's shape."""

    def __init__(self, model, stored, text, cfg):
        self.model, self.first = LlamaCpp(model, stored), cfg.prompt
        self.ids = text[0].tolist()[:cfg.prompt + cfg.new]
        self.model.next_id(self.ids[:cfg.prompt])

    def rewind(self):
        self.model.lib.llama_memory_seq_rm(self.model.memory, -1, self.first, -1)

    def __call__(self):
        for number in self.ids[self.first:]:
            self.model.next_id([number])


def timed(cfg, run, points, readers):
    """Tokens/s of every point, and of llama.cpp, in turns -> the measurement; points get their own."""
    sides = dict(readers)
    if cfg.llamacpp:
        c = run.config
        shape = GPTConfig(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, vocab_size=c.vocab_size,
                          block_size=c.block_size, mlp_units=c.mlp_units, bias=False)
        random_ = GPT(shape, seed=0).eval()
        sides |= {f"{LLAMA} {stored}": LlamaReader(random_, stored, run.x[:1], cfg) for stored in STORED}
    seconds = interleave(sides, cfg.repeats, cold=cfg.cold, before=rewind)
    found = measurement("tokens/s", {name: [cfg.new / s for s in took] for name, took in seconds.items()},
                        higher_is_better=True)
    for name, point in points.items():
        point["tokens_per_second"] = found["sides"][name]["median"]
    return found


def rewind(run):
    """Where a side stands before it is timed; the threads of the one before are asleep by then."""
    run.rewind()
    rest(run)


def tell(cfg, run, points, measurements):
    """One table: what is known of every point."""
    sides = measurements.get("decode", {}).get("sides", {})
    first = str(run.dtype).removeprefix("torch.")
    print(f"held-out loss ({run.about['held_out_tokens']:,} tokens), to {first} (95%, paired by window); "
          "units that are not zero, by layer; MB of weights a token; tokens/s: median (quartiles)")
    for name in (*points, *(side for side in sides if side not in points)):
        p, s = points.get(name, {}), sides.get(name)
        loss = f"{p['loss']:8.4f}{said_nats(p):>30}{p['percent']:+7.2f}%" if "loss" in p else ""
        live = " ".join(f"{share:3.0%}" for share in p.get("live", ())) if p else "random weights"
        size = f"{p['bytes'] / 1e6:7.1f}" if p else ""
        rate = f"{s['median']:7.0f} ({s['quartiles'][0]:.0f}, {s['quartiles'][1]:.0f})" if s else ""
        times = f"{s['median'] / sides[first]['median']:6.2f}x" if s else ""
        print(f"  {name:24}{loss:46}  {live:33}{size:7}{rate}{times}".rstrip())


def said_nats(point):
    low, high = point["nats"]["interval"]
    return f"{point['nats']['mean']:+.4f} ({low:+.4f}, {high:+.4f})"


def draw(path, points, measurements):
    """The loss against tokens/s, or where no times are known against bytes a token."""
    key, label = (("tokens_per_second", "tokens/s, greedy, batch 1") if measurements
                  else ("bytes", "MB of weights a token"))
    with drawing(path, 1, (7, 4.5)) as axis:
        lines, names = {}, []
        for name, p in points.items():
            lines.setdefault(name.rpartition(", ")[0] if p["share"] else "dense", []).append((name, p))
        for title, found in lines.items():
            at = [(p[key] / (1 if measurements else 1e6), p["loss"]) for _, p in found]
            axis.plot(*zip(*at), "ks" if title == "dense" else "o-", markersize=4, label=title)
            names += [(f"{p['share']:.0%}" if p["share"] else name, *place)
                      for (name, p), place in zip(found, at)]
        for name, s in measurements.get("decode", {}).get("sides", {}).items():
            if name not in points:
                axis.axvline(s["median"], color="grey", linestyle=":", linewidth=1)
                axis.annotate(f"{name}, random weights", (s["median"], 0.98), fontsize=6, rotation=90,
                              va="top", xycoords=("data", "axes fraction"))
        axis.set(xlabel=label, ylabel="held-out loss, nats")
        axis.legend(frameon=False, fontsize=8)
        name_points(axis, names, 7)
