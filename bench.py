"""Time this repository beside nanoGPT: both sides measured in one command, on the same machine, in turns.

    git clone https://github.com/karpathy/nanoGPT
    python bench.py decode --nanogpt=nanoGPT
    python bench.py train --nanogpt=nanoGPT --out=results/train.json

Lines for people come first; the last line of stdout is the same result as one JSON object. Without --nanogpt
ours alone is measured and no ratio is printed. Absolute times mean little on another machine: quote ratios.
"""
import contextlib
import copy
import importlib.util
import json
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, pairwise
from operator import eq
from pathlib import Path
from unittest import mock

import torch

import bio_modules
import checkpoint
import dataset as datasets
import decoding
import layers
import runtime
import sparse_kernels
import tokenizer as tokenizers
from configurator import ConfigError, close_match, configure, require, say_and_exit
from context import Cache, CachedContext, Context
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent
SCHEMA = 1                                      # of the JSON record; rises when a field changes its meaning
QUIET = 0.5                                     # load average above which other work disturbs the timings
PEER, OURS, OURS_FP32 = "nanoGPT", "ours", "ours float32"
NO_CONTEXT = Context(slice(0, 1))
CLONE = "type git clone https://github.com/karpathy/nanoGPT and --nanogpt=nanoGPT"


@dataclass(frozen=True)
class Bench:
    """What every subcommand understands."""
    nanogpt: str = ""  # folder of a nanoGPT checkout; without it ours alone is measured, no ratio
    repeats: int = 5  # measurements of each side, in turns A B A B; told as median, min, max
    threads: int = 0  # CPU threads of both sides; 0: torch's default; 1 where the machine is shared
    out: str = ""  # also write the JSON record to this file

    def __post_init__(self):
        require(self.repeats >= 1, f"repeats={self.repeats} must be at least 1: type --repeats=5")
        require(self.threads >= 0, f"threads={self.threads} must be 1 or more, or 0 for torch's default")
        lacks = [name for name in ("model.py", "train.py")
                 if not os.path.isfile(Path(self.nanogpt) / name)]
        require(not self.nanogpt or not lacks, f"nanogpt='{self.nanogpt}' is no nanoGPT checkout, it has no "
                                               f"{' and no '.join(lacks)}: {CLONE}")
        folder = Path(self.out).parent
        require(os.path.isdir(folder), f"out='{self.out}': the folder {folder} does not exist: make it")


# ------------------------------------------------ timing ------------------------------------------------

def interleave(sides, repeats, warm_up=True):
    """Call the sides in turns, A B A B -> {name: seconds of each call}.

    sides: {name: function without arguments}. Turns spread a machine's moods over all sides alike. warm_up:
    call each side once beforehand, untimed. A GPU is waited for on both ends of a call.
    """
    seconds = {name: [] for name in sides}
    for number in range(-warm_up, repeats):
        for name, run in sides.items():
            synchronise()
            clock = time.perf_counter()
            run()
            synchronise()
            if number >= 0:
                seconds[name].append(time.perf_counter() - clock)
        print(f"round {number + 1} of {repeats}" if number >= 0 else "warmed up", file=sys.stderr, flush=True)
    return seconds


def synchronise():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def spread(values):
    median = statistics.median(values)
    return {"median": median, "min": min(values), "max": max(values), "repeats": len(values)}


def measurement(unit, sides, higher_is_better=False):
    """{side: values} -> what the record keeps: unit, spread of each side, ratio of medians to nanoGPT's.

    A ratio above 1 means that ours is better. Where nanoGPT was not measured there is no ratio: {}.
    """
    spreads = {name: spread(values) for name, values in sides.items() if values}
    peer, ratio = spreads.get(PEER), {}
    for name in spreads.keys() - {PEER} if peer else ():
        quotient = spreads[name]["median"] / peer["median"]
        ratio[name] = quotient if higher_is_better else 1 / quotient
    return {"unit": unit, "sides": spreads, "ratio": {name: ratio[name] for name in sides if name in ratio}}


def show(title, result):
    """Print one measurement for people."""
    print(f"{title}, {result['unit']}: median (min to max)")
    for name, s in result["sides"].items():
        ratio = f"  ratio {result['ratio'][name]:.2f}x" if name in result["ratio"] else ""
        print(f"  {name:14}{s['median']:10.2f}  ({s['min']:.2f} to {s['max']:.2f}, n={s['repeats']}){ratio}")
    if not result["ratio"]:
        print(f"  no ratio: {PEER} was not measured; {CLONE}")


# ------------------------------------------------ where it ran ------------------------------------------

def hardware():
    """The machine and the versions that a number belongs to."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu,
            "torch": torch.__version__, "python": platform.python_version(), "platform": platform.platform()}


def cpu_name():
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def load_average():
    """Load of the last 1, 5 and 15 minutes, or None on a system that does not tell."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def commit_of(folder):
    """The commit of a checkout, with '+changes' where tracked files differ from it; None without git."""
    git = ["git", "-C", str(folder)]
    try:
        top, head = subprocess.check_output([*git, "rev-parse", "--show-toplevel", "HEAD"], text=True,
                                            stderr=subprocess.DEVNULL).splitlines()
        changes = subprocess.check_output([*git, "status", "--porcelain", "-uno"])
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None
    return head[:12] + "+changes" * bool(changes) if Path(top) == Path(folder).resolve() else None


def header(cfg):
    """Print where this runs -> the fields of the record that say so."""
    where = {"hardware": hardware(), "commit": {OURS: commit_of(ROOT)},
             "load_average": {"before": load_average()}}
    if cfg.nanogpt:
        where["commit"][PEER] = commit_of(cfg.nanogpt)
    h, load = where["hardware"], where["load_average"]["before"]
    print(f"{h['gpu'] or h['cpu']}, {h['cores']} cores, {h['threads']} threads, torch {h['torch']}, "
          f"Python {h['python']}, {h['platform']}")
    print("commit " + ", ".join(f"{name} {commit or 'unknown'}" for name, commit in where["commit"].items()))
    if load and load[0] > QUIET:
        print(f"warning: the machine is busy (load average {load[0]:.2f} before the start): timings are off")
    return where


def write_atomically(path, text):
    """`path` is the old file or the new one, never a part of it."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"out='{path}' could not be written ({error.strerror}): the record is the last "
                          "line of stdout, save it from there") from error
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------ decode ------------------------------------------------

SHAPES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304, bias=False),
    "baby": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65, bias=False),
}


@dataclass(frozen=True)
class Decode(Bench):
    """Tokens per second of generation at batch 1: ours against nanoGPT's, same weights, one process."""
    shape: str = "gpt2"  # gpt2 (12 layers, 768 wide, block 1024) or baby (6 layers, 384 wide, block 256)
    prompt: int = 128  # tokens of context before the first new one
    new: int = 128  # tokens that every side generates
    device: str = "auto"  # auto, cpu, cuda, cuda:0, mps
    dtype: str = "auto"  # of ours; nanoGPT runs as in its sample.py: fp32 on a CPU, autocast on CUDA
    blocks: bool = False  # also models of this shape with bio blocks, random weights, beside their dense twin

    def __post_init__(self):
        super().__post_init__()
        require(self.shape in SHAPES, f"shape='{self.shape}' must be {' or '.join(SHAPES)}")
        block = SHAPES[self.shape]["block_size"]
        require(2 <= self.prompt <= block,
                f"prompt={self.prompt} must be in 2..{block}, the block of --shape={self.shape}")
        require(self.new >= 1, f"new={self.new} must be at least 1")


def decode(cfg):
    place = runtime.choose(cfg.device, cfg.dtype, False)
    print(f"ours: {place}, {sparse_kernels.path_taken(place.device)}")
    models, contexts = decoders(cfg, place)
    parameters = sum(p.numel() for p in models[OURS].parameters())
    vocab_size = SHAPES[cfg.shape]["vocab_size"]
    prompt = torch.randint(vocab_size, (1, cfg.prompt), generator=torch.Generator().manual_seed(1337))
    prompt = prompt.to(place.device)
    agreement = agree(models, prompt, cfg.new)
    for name, flags in (decoded_blocks(64, 0.2) | OTHER_BLOCKS if cfg.blocks else {}).items():
        config = GPTConfig(**SHAPES[cfg.shape], act="relu2", **flags)
        models[name] = GPT(config, seed=1337).eval().to(place.device, place.dtype).use_policy()
        contexts[name] = contextlib.nullcontext()
    seconds = interleave({name: partial(generate, model, prompt, cfg.new, contexts[name])
                          for name, model in models.items()}, cfg.repeats)
    rates = {name: [cfg.new / s for s in values] for name, values in seconds.items()}
    steps = {name: partial(whole_context, model, prompt, contexts[name]) if name == PEER
             else cached_step(model, prompt) for name, model in models.items()}
    ms = {name: [1e3 * s for s in values] for name, values in interleave(steps, 4 * cfg.repeats).items()}
    results = {"decode": measurement("tokens/s", rates, higher_is_better=True), "step": measurement("ms", ms)}
    results["decode"]["to_twin"] = {name: statistics.median(rates[name]) / statistics.median(rates[OURS])
                                    for name in rates if name not in (PEER, OURS, OURS_FP32)}
    print(f"{cfg.shape}, {parameters:,} parameters, the same weights on every side of them; "
          f"{PEER} runs {'under autocast' if place.device.type == 'cuda' else 'in fp32'}")
    show(f"decode, {cfg.new} new tokens after {cfg.prompt}, batch 1", results["decode"])
    for name, ratio in results["decode"]["to_twin"].items():
        count = sum(p.numel() for p in models[name].parameters())
        print(f"  {name}: {ratio:.2f}x its dense twin's tokens/s, {count:,} parameters, random weights")
    show(f"one token at a context of exactly {cfg.prompt}", results["step"])
    tell_agreement(agreement)
    return {"measurements": results, "agreement": agreement, "parameters": parameters, "place": str(place),
            "kernels": sparse_kernels.path_taken(place.device)}


# blocks whose decode saves outside the MLP
OTHER_BLOCKS = {"window 128": dict(window=128, window_pattern="S"), "hierarchy 4": dict(hierarchy=4),
                "1 of 4 dendrites": dict(dendrites=4, dendrites_active=1)}


def decoded_blocks(rank, active):
    """{name: flags} of the blocks whose decode reads a share of the MLP that no weight decides."""
    return {"top 10%": dict(mlp_topk=0.1), "columns 3 of 32": dict(columns=32, columns_active=3),
            f"predicted {active:.0%}": dict(mlp_topk=0.1, mlp_predict=rank, mlp_active=active)}


def decoders(cfg, place):
    """-> ({side: model in eval mode on the device}, {side: the context it runs in}); same weights in all."""
    ours = GPT(GPTConfig(**SHAPES[cfg.shape]), seed=1337).eval()
    models, contexts = {}, {}
    if cfg.nanogpt:
        models[PEER] = peer_model(cfg.nanogpt, SHAPES[cfg.shape]).eval()
        ours.load_state_dict(models[PEER].state_dict())
    with torch.no_grad():           # at their init greedy ids repeat one token, and then any two models agree
        for model in (ours, *models.values()):
            model.transformer.wpe.weight.mul_(30)
    models[OURS] = copy.deepcopy(ours).to(place.dtype)
    if place.dtype != torch.float32:
        models[OURS_FP32] = ours
    if place.device.type == "cuda":
        contexts[PEER] = torch.amp.autocast("cuda", dtype=runtime.choose_dtype("auto", place.device)[0])
    models = {name: model.to(place.device) for name, model in models.items()}
    return models, {name: contexts.get(name, contextlib.nullcontext()) for name in models}


def peer_model(folder, shape):
    """nanoGPT's own GPT of this shape, from its model.py; what it prints goes to stderr."""
    module = load_module("nanogpt_model", Path(folder) / "model.py")
    torch.manual_seed(1337)
    with contextlib.redirect_stdout(sys.stderr):
        return module.GPT(module.GPTConfig(**shape, dropout=0.0))


def load_module(name, path):
    """Import a file under another name, so that two files called model.py live side by side."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)     # where its dataclasses look
    spec.loader.exec_module(module)
    return module


def generate(model, prompt, new, context):
    """The same call on every side."""
    with context:
        model.generate(prompt, new, top_k=1)


@torch.no_grad()
def whole_context(model, prompt, context):
    """What nanoGPT computes for one token: a forward over all of them."""
    with context:
        model(prompt)


@torch.inference_mode()
def cached_step(model, prompt):
    """What ours computes for one token, over a cache of those before it -> a function that does it."""
    past = prompt.size(1) - 1
    cache = Cache(model, 1, prompt.size(1))
    model.trunk(prompt[:, :past], CachedContext(cache, 0, past, prompt))

    @torch.inference_mode()                     # as generation does
    def run():
        model.head(model.trunk(prompt[:, past:], CachedContext(cache, past, 1, prompt)))
    return run


def agree(models, prompt, new):
    """Greedy ids of every side against nanoGPT's in fp32 (without it: against our own in fp32), TF32 off.

    -> {"of": that side, "distinct": different ids in it, "sides": {side: result of compare(), and its dtype}}
    """
    of = PEER if PEER in models else OURS_FP32 if OURS_FP32 in models else OURS
    greedy = {name: dict(top_k=1) if name == PEER else dict(temperature=0) for name in models}
    tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    ids = {name: model.generate(prompt, new, **greedy[name])[0, -new:] for name, model in models.items()}
    torch.backends.cuda.matmul.allow_tf32 = tf32
    dtypes = {name: str(model.lm_head.weight.dtype).removeprefix("torch.") for name, model in models.items()}
    return {"of": of, "distinct": len(ids[of].unique()),
            "sides": {name: compare(ids[of], found) | {"dtype": dtypes[name]}
                      for name, found in ids.items() if name != of}}


def compare(expected, found):
    """Share of equal ids; index of the first that differs (the contexts differ after it) or None."""
    same = (expected == found).tolist()
    return {"equal": sum(same) / len(same), "first_difference": None if all(same) else same.index(False)}


def tell_agreement(agreement):
    """Print the shares; an fp32 side must agree in every token."""
    for name, found in agreement["sides"].items():
        first = found["first_difference"]
        print(f"greedy ids, {name} ({found['dtype']}) against {agreement['of']}: {found['equal']:.4f} equal"
              + f", first difference at new token {first}" * (first is not None)
              + f", {agreement['distinct']} different ids")
        if found["dtype"] == "float32" and first is not None:
            print(f"!!! GREEDY IDS DIFFER: {name} is fp32 and must give {agreement['of']}'s; quote nothing")


# ------------------------------------------------ train -------------------------------------------------

TRAINED = dict(n_layer=4, n_head=4, n_embd=128, block_size=64, bias=False, dropout=0.0)  # nanoGPT's CPU run
RECIPE = dict(batch_size=12, gradient_accumulation_steps=1, learning_rate=1e-3, min_lr=1e-4, warmup_iters=100,
              lr_decay_iters=2000, weight_decay=0.1, beta1=0.9, beta2=0.99, grad_clip=1.0,
              eval_interval=10**9, eval_iters=1, log_interval=1, always_save_checkpoint=False)
TAIL = 20                                       # iterations whose mean is called the final loss


@dataclass(frozen=True)
class Train(Bench):
    """Milliseconds per training iteration: our train.py against nanoGPT's, same shape, data, AdamW."""
    repeats: int = 3  # processes of each side, in turns A B A B
    iters: int = 200  # iterations of each process
    drop: int = 20  # first iterations of each process, left out of its median
    input: str = ""  # train on the characters of this text file; empty: the built-in data (bytes)
    device: str = "cpu"  # of both sides
    dtype: str = "auto"  # of ours; nanoGPT keeps its own default
    compile: bool | str = "auto"  # of ours: auto, True, False; its seconds are told as the first iteration's
    peer_compile: bool = False  # of nanoGPT; its documented CPU command says False

    def __post_init__(self):
        super().__post_init__()
        require(1 <= self.drop < self.iters, f"drop={self.drop} must be in 1..{self.iters - 1}, below iters")
        runtime.check_compile(self.compile)


@dataclass(frozen=True)
class Run:
    """One training process: ms and loss of each iteration, its line on device, dtype and compile."""
    ms: list
    losses: list
    place: str


def train(cfg):
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        data = training_data(cfg, work)
        vocab_size = tokenizers.meta_of(data)["vocab_size"]
        launchers = {OURS: lambda: train_ours(cfg, data, work)}
        if cfg.nanogpt:
            copy_peer(cfg.nanogpt, work / "peer", data, vocab_size)
            launchers = {PEER: lambda: train_peer(cfg, work / "peer"), **launchers}
        runs = {name: [] for name in launchers}
        sides = {name: lambda name=name: runs[name].append(launchers[name]()) for name in launchers}
        wall = interleave(sides, cfg.repeats, warm_up=False)       # a process's first iterations warm it up
    return train_report(cfg, runs, wall, GPT(GPTConfig(**TRAINED, vocab_size=vocab_size), init=False))


def train_report(cfg, runs, wall, model):
    """Print and return what the processes of both sides measured."""
    ms = {name: [statistics.median(run.ms[cfg.drop:]) for run in done] for name, done in runs.items()}
    tokens = RECIPE["batch_size"] * TRAINED["block_size"]
    rates = {name: [1e3 * tokens / value for value in values] for name, values in ms.items()}
    results = {"iteration": measurement("ms", ms), "process": measurement("s", wall),
               "rate": measurement("tokens/s", rates, higher_is_better=True)}
    place, first = runs[OURS][0].place, spread([run.ms[0] / 1e3 for run in runs[OURS]])
    losses = {name: [finite(statistics.fmean(run.losses[-TAIL:])) for run in done]
              for name, done in runs.items()}
    print(f"ours: {place}")
    print(f"{model.get_num_params():,} parameters without positions, the same shape and AdamW on both sides")
    show(f"one iteration, median of iterations {cfg.drop} to {cfg.iters - 1}", results["iteration"])
    show("training", results["rate"])
    show(f"whole process, {cfg.iters} iterations; ours evaluates and saves at its end", results["process"])
    print(f"first iteration of ours, compiling included: {first['median']:.2f} s "
          f"({first['min']:.2f} to {first['max']:.2f})")
    for name, values in losses.items():
        print(f"training loss of {name}, mean of the last {min(TAIL, cfg.iters)} iterations: "
              + ", ".join("not finite" if value is None else f"{value:.4f}" for value in values))
    return {"measurements": results, "first_iteration_seconds": first, "final_losses": losses, "place": place,
            "parameters": model.get_num_params(), "train_flops_per_token": model.flops_per_token()}


def finite(value):
    return value if math.isfinite(value) else None


def training_data(cfg, work):
    """The folder of token files that both sides read."""
    if not cfg.input:
        return datasets.prepare_if_missing("pylib").resolve()
    datasets.write_text(work / "text", cfg.input, "char", 0.1)
    return work / "text"


def copy_peer(checkout, folder, data, vocab_size):
    """nanoGPT's scripts beside a data/bench with our token files and its meta.pkl, in a folder apart."""
    bench = folder / "data" / "bench"
    bench.mkdir(parents=True)
    for script in Path(checkout).glob("*.py"):
        shutil.copy(script, folder)
    for split in datasets.SPLITS:
        shutil.copy(data / f"{split}.bin", bench)
    (bench / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))


def train_ours(cfg, data, work):
    """One process of our train.py. An iteration lasts from the end of the one before it to its own end, as
    nanoGPT's does; the first is its step alone, which holds the compile time."""
    keys = dict(max_iters=cfg.iters, dataset=data, out_dir=work / "ours")
    keys |= dict(dtype=cfg.dtype, compile=cfg.compile)
    said = run_script(ROOT / "train.py", keys, work, cfg)
    lines = (work / "ours" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "ms" in row]
    require(len(rows) == cfg.iters, f"train.py logged {len(rows)} iterations, expected {cfg.iters}")
    ms = [1e3 * (after["seconds"] - before["seconds"]) for before, after in pairwise(rows)]
    place = next((line for line in said.splitlines() if line.startswith("device ")), "unknown")
    return Run([rows[0]["ms"], *ms], [row.get("loss", math.nan) for row in rows], place)


def train_peer(cfg, folder):
    """One process of nanoGPT's train.py; it counts its iterations from 0 to max_iters, both included."""
    keys = dict(max_iters=cfg.iters - 1, dataset="bench", out_dir="out", compile=cfg.peer_compile)
    rows = peer_iterations(run_script(folder / "train.py", keys, folder, cfg))
    require(len(rows) == cfg.iters, f"nanoGPT's train.py printed {len(rows)} iterations, expected "
                                    f"{cfg.iters}: take an unchanged checkout of nanoGPT")
    return Run([ms for ms, _ in rows], [loss for _, loss in rows], "")


def peer_iterations(said):
    """nanoGPT's lines 'iter 7: loss 3.2, time 12.5ms, mfu ...' -> [(ms, loss)]."""
    found = re.findall(r"^iter \d+: loss (\S+), time (\S+)ms", said, re.MULTILINE)
    return [(float(ms), float(loss)) for loss, ms in found]


def run_script(script, keys, cwd, cfg):
    """Run a train.py with the shape, recipe, device and threads that both sides share -> its stdout."""
    return timed_script(script, [], TRAINED | RECIPE | dict(device=cfg.device) | keys, cwd, cfg)[0]


# ------------------------------------------------ race --------------------------------------------------

# nanoGPT's documented CPU command for characters of Shakespeare
DOCUMENTED = dict(device="cpu", compile=False, eval_iters=20, log_interval=1, block_size=64, batch_size=12,
                  n_layer=4, n_head=4, n_embd=128, max_iters=2000, lr_decay_iters=2000, dropout=0.0)
VALIDATION = dict(batches=200, batch_size=12, block_size=64)     # the fixed batches that judge both sides
FAIR = "nanoGPT's model and AdamW in our train.py"
CHANGES = {                                      # to the race's config, one at a time
    "no n-gram table": dict(ngram_buckets=0), "n-grams up to 3": dict(ngram_order=3),
    "AdamW for all": dict(optimizer="adamw"), "5 Newton-Schulz steps": dict(muon_steps=5),
    "cosine decay": dict(lr_schedule="cosine"), "learned positions": dict(pos="learned"),
    "no qk_norm": dict(qk_norm=False), "GELU": dict(act="gelu"), "tied head": dict(tie_weights=True),
    "RMSNorm": dict(norm="rmsnorm"), "zero_init": dict(zero_init=True),
}


@dataclass(frozen=True)
class Race(Bench):
    """Seconds and tokens to nanoGPT's own final loss, its documented CPU run on characters of Shakespeare."""
    repeats: int = 3  # seeds of each side
    threads: int = 2  # CPU threads of both sides
    input: str = ""  # the text; empty: data/shakespeare_char, prepared if missing
    config: str = "config/race_shakespeare_cpu.py"  # config file of our side
    plot: str = ""  # also draw training loss against seconds and tokens into this PNG (needs matplotlib)

    def __post_init__(self):
        super().__post_init__()
        require(self.nanogpt, f"a race needs both sides: {CLONE}")
        require(os.path.isfile(ROOT / self.config), f"config='{self.config}' does not exist")


def race(cfg):
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        data = race_data(cfg, work)
        fair = ROOT / "config" / "train_shakespeare_char_cpu.py"
        sides = {PEER: lambda seed: race_peer(cfg, data, work, seed),
                 OURS: lambda seed: race_ours(cfg, data, work, seed, ROOT / cfg.config),
                 FAIR: lambda seed: race_ours(cfg, data, work, seed, fair)}
        return race_report(cfg, race_runs(cfg, sides))


def race_data(cfg, work):
    """The characters of cfg.input, or of data/shakespeare_char, as token files."""
    if cfg.input:
        datasets.write_text(work / "text", cfg.input, "char", 0.1)
    return work / "text" if cfg.input else datasets.prepare_if_missing("shakespeare_char").resolve()


def race_runs(cfg, sides):
    """Every side with every seed, in turns -> {side: what judged() says of each seed}."""
    runs = {name: [] for name in sides}
    for seed in range(cfg.repeats):
        for name, run in sides.items():
            runs[name].append(run(seed))
            print(f"seed {seed}, {name}: {tell(runs[name][-1])}", file=sys.stderr, flush=True)
    return runs


@dataclass(frozen=True)
class Ablate(Bench):
    """The race's config with each of its choices changed, one at a time: what every switch is worth."""
    repeats: int = 3  # seeds of each change
    threads: int = 2  # CPU threads of a run
    input: str = ""  # the text; empty: data/shakespeare_char, prepared if missing
    config: str = "config/race_shakespeare_cpu.py"  # config file that is changed

    def __post_init__(self):
        super().__post_init__()
        require(os.path.isfile(ROOT / self.config), f"config='{self.config}' does not exist")


def ablate(cfg):
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        data = race_data(cfg, work)
        changes = {OURS: {}} | CHANGES
        runs = race_runs(cfg, {name: partial(race_changed, cfg, data, work, change)
                               for name, change in changes.items()})
    losses = measurement("nats", {name: [run["val_loss"] for run in done] for name, done in runs.items()})
    base = [run["val_loss"] for run in runs[OURS]]
    for name, done in runs.items():
        losses["sides"][name]["mean"] = mean = statistics.fmean(run["val_loss"] for run in done)
        losses["sides"][name]["to_ours"] = delta = mean - statistics.fmean(base)
        found = losses["sides"][name]
        print(f"{name:24}{mean:.4f} ({found['min']:.4f} to {found['max']:.4f})  {delta:+.4f}  "
              f"{statistics.median(run['seconds'] for run in done):.1f} s")
    return {"measurements": {"val loss": losses}, "validation": VALIDATION, "runs": runs}


def race_changed(cfg, data, work, change, seed):
    return race_ours(cfg, data, work, seed, ROOT / cfg.config, **change)


def tell(run):
    return f"val loss {run['val_loss']:.4f}, {run['seconds']:.2f} s, {run['tokens']:,} tokens"


def race_peer(cfg, data, work, seed):
    """nanoGPT's documented command as a process of its own; its seed is a constant in its train.py."""
    folder = work / "peer"
    shutil.rmtree(folder, ignore_errors=True)
    copy_peer(cfg.nanogpt, folder, data, tokenizers.meta_of(data)["vocab_size"])
    script = folder / "train.py"
    text = script.read_text(encoding="utf-8")
    require("manual_seed(1337" in text, f"{cfg.nanogpt}/train.py has no seed 1337: take an unchanged one")
    script.write_text(text.replace("manual_seed(1337", f"manual_seed({1337 + seed}"), encoding="utf-8")
    config = Path(cfg.nanogpt).resolve() / "config" / "train_shakespeare_char.py"
    keys = DOCUMENTED | dict(dataset="bench", out_dir="out")
    said, seconds = timed_script(script, [str(config)], keys, folder, cfg)
    rows = peer_iterations(said)
    tokens = DOCUMENTED["batch_size"] * DOCUMENTED["block_size"]
    curve = [[n * tokens, sum(ms for ms, _ in rows[:n]) / 1e3, loss] for n, (_, loss) in enumerate(rows, 1)]
    return judged(folder / "out", data, seconds, DOCUMENTED["max_iters"] * tokens, thinned(curve))


def race_ours(cfg, data, work, seed, config, **changes):
    """One process of our train.py with a config file."""
    out_dir = work / "ours"
    shutil.rmtree(out_dir, ignore_errors=True)
    keys = dict(dataset=data, out_dir=out_dir, seed=1337 + seed, device="cpu") | changes
    _, seconds = timed_script(ROOT / "train.py", [str(config)], keys, work, cfg)
    lines = (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    curve = [[row["tokens"], row["seconds"], row["loss"]] for row in rows if "loss" in row]
    return judged(out_dir, data, seconds, rows[-1]["tokens"], thinned(curve))


def thinned(curve, width=10, most=200):
    """[[tokens, seconds, loss]] with losses averaged over `width` neighbours and at most `most` points."""
    step = -(-len(curve) // most) or 1
    return [[t, s, statistics.fmean(loss for *_, loss in curve[max(0, i - width):i + 1])]
            for i, (t, s, _) in enumerate(curve) if i % step == 0]


def timed_script(script, words, keys, cwd, cfg):
    """Run a script -> (its stdout, wall seconds from its start to its end)."""
    env = os.environ | {"OMP_NUM_THREADS": str(cfg.threads)} if cfg.threads else os.environ
    command = [sys.executable, str(script), *words, *(f"--{key}={value}" for key, value in keys.items())]
    clock = time.perf_counter()
    done = subprocess.run(command, cwd=cwd, env=env, check=False, capture_output=True, text=True,
                          encoding="utf-8", errors="replace")
    seconds = time.perf_counter() - clock
    last = (done.stderr.strip().splitlines() or ["without a message"])[-1]
    require(done.returncode == 0, f"{script} ended with status {done.returncode}: {last}")
    return done.stdout, seconds


def judged(out_dir, data, seconds, tokens, curve):
    """What a run cost, and its checkpoint's loss on the fixed validation batches, in fp32."""
    path = checkpoint.find(out_dir)
    model = checkpoint.build_model(checkpoint.load(path), path).eval()
    held, c = model.get_num_params(), model.config
    touched = held - max(0, c.ngram_buckets - (c.ngram_order - 1)) * c.n_embd * (c.ngram_buckets > 0)
    return {"val_loss": fixed_loss(model, data, VALIDATION), "seconds": seconds, "tokens": tokens,
            "parameters": held, "parameters_touched_per_token": touched, "curve": curve}


def race_report(cfg, runs):
    """Print the race and return its record. The line to pass is nanoGPT's mean final loss."""
    line = statistics.fmean(run["val_loss"] for run in runs[PEER])
    results = {"time": measurement("s", {k: [run["seconds"] for run in v] for k, v in runs.items()}),
               "tokens": measurement("tokens", {k: [run["tokens"] for run in v] for k, v in runs.items()}),
               "val loss": measurement("nats", {k: [run["val_loss"] for run in v] for k, v in runs.items()})}
    results["val loss"]["ratio"] = {}
    print(f"nanoGPT's final loss, mean of {cfg.repeats} seeds: {line:.4f}")
    for name, done in runs.items():
        losses = [run["val_loss"] for run in done]
        print(f"{name}: val loss {statistics.fmean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f}), "
              f"{sum(loss <= line for loss in losses)} of {len(losses)} pass; median "
              f"{results['time']['sides'][name]['median']:.2f} s, {done[0]['tokens']:,} tokens, "
              f"{done[0]['parameters']:,} parameters held, "
              f"{done[0]['parameters_touched_per_token']:,} touched per token")
    print(f"ours against nanoGPT: {results['time']['ratio'][OURS]:.2f}x less time, start, evaluation and "
          f"saving included; {results['tokens']['ratio'][OURS]:.2f}x fewer tokens")
    passed = {name: sum(run["val_loss"] <= line for run in done) for name, done in runs.items()}
    if cfg.plot:
        draw_race(cfg.plot, runs, line)
    return {"measurements": results, "line": line, "passed": passed, "validation": VALIDATION, "runs": runs}


def pyplot():
    """matplotlib's, drawing into files."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from error
    return plt


def draw_race(path, runs, line):
    """Training loss against seconds in the loop and against tokens, one curve a seed; the line to pass."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for color, name in zip(("tab:gray", "tab:red", "tab:blue"), (PEER, OURS, FAIR)):
        for number, run in enumerate(runs[name]):
            for axis, column in zip(axes, (1, 0)):
                axis.plot([p[column] for p in run["curve"]], [p[2] for p in run["curve"]], color=color, lw=1,
                          label=None if number else name)
    for axis, label in zip(axes, ("seconds in the training loop", "tokens")):
        axis.axhline(line, color="black", lw=0.8, ls="--", label="nanoGPT's final validation loss")
        axis.set(xscale="log", xlabel=label)
    axes[0].set(ylabel="training loss, nats", ylim=(1.5, 3.5))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncol=2, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.88))
    figure.savefig(path, dpi=120)


# ------------------------------------------------ reach -------------------------------------------------

@dataclass(frozen=True)
class Reach(Bench):
    """Tokens until a config's validation loss passes nanoGPT's longer line, characters of Shakespeare."""
    repeats: int = 1  # seeds, one run each
    threads: int = 2  # CPU threads of a run
    input: str = ""  # the text; empty: data/shakespeare_char, prepared if missing
    config: str = "config/long_shakespeare.py"  # config file of the run
    line: float = 1.4697  # best val loss of nanoGPT's GPU run, as its README says
    line_tokens: int = 81_920_000  # what that run reads: 5000 iterations of 64 sequences of 256
    device: str = "auto"  # auto, cpu, cuda, cuda:0, mps

    def __post_init__(self):
        super().__post_init__()
        require(os.path.isfile(ROOT / self.config), f"config='{self.config}' does not exist")


def reach(cfg):
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        data = race_data(cfg, work)
        runs = [reaching(cfg, data, work, seed) for seed in range(cfg.repeats)]
    for run in runs:
        print(f"best val loss {run['best']:.4f} at {run['best_tokens']:,} tokens, "
              + (f"{cfg.line} passed at {run['passed_tokens']:,} tokens, {run['passed_seconds']:.0f} s, "
                 f"{cfg.line_tokens / run['passed_tokens']:.1f}x fewer tokens" if run["passed_tokens"] else
                 f"{cfg.line} not passed in {run['tokens']:,} tokens")
              + f"; {run['parameters']:,} parameters")
    return {"measurements": {}, "line": cfg.line, "line_tokens": cfg.line_tokens, "runs": runs}


def reaching(cfg, data, work, seed):
    """One run of the config with a seed -> its validation curve, and where that passes the line."""
    out_dir = work / "reach"
    shutil.rmtree(out_dir, ignore_errors=True)
    keys = dict(dataset=data, out_dir=out_dir, seed=1337 + seed, device=cfg.device)
    timed_script(ROOT / "train.py", [str(ROOT / cfg.config)], keys, work, cfg)
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = [[row["tokens"], row["seconds"], row["val_loss"]] for row in rows if row.get("val_loss")]
    curve = curve[1:]                            # not the untrained model
    best = min(curve, key=lambda point: point[2])
    passed = next((point for point in curve if point[2] <= cfg.line), (None, None))
    model = checkpoint.build_model(checkpoint.load(checkpoint.find(out_dir)), checkpoint.find(out_dir))
    return {"best": best[2], "best_tokens": best[0], "passed_tokens": passed[0], "passed_seconds": passed[1],
            "tokens": curve[-1][0], "parameters": model.get_num_params(), "curve": curve}


# ------------------------------------------------ mlp ---------------------------------------------------

DENSE, DENSE_FP32 = "F.linear, bfloat16", "F.linear, float32"


@dataclass(frozen=True)
class Mlp(Bench):
    """One token through one MLP: what reading the live rows alone saves beside dense F.linear."""
    threads: int = 1  # CPU threads; more than one collapse where the machine is shared
    widths: str = "768"  # widths of the stream, by commas; the MLP has four times as many units
    predict: int = 64  # rank of the predictor
    active: float = 0.2  # share of the units that the predictor picks
    cold: int = 128  # MiB of weight copies that a side reads in a round: more than caches hold

    def __post_init__(self):
        super().__post_init__()
        require(self.cold >= 1, f"cold={self.cold} must be at least 1 (MiB)")
        require(all(w.isdigit() and int(w) >= 32 and int(w) % 32 == 0 for w in self.widths.split(",")),
                f"widths='{self.widths}' must be multiples of 32, by commas: type --widths=384,768")
        require(self.predict >= 1 and 0 < self.active <= 1,
                f"predict={self.predict} must be 1 or more and active={self.active} in (0, 1]")


def mlp(cfg):
    """Each side goes once through copies of its weights that no cache holds, with an input each."""
    print(sparse_kernels.path_taken(torch.device("cpu")))
    measurements, work = {}, {}
    arms = {"dense": dict(act="gelu")} | decoded_blocks(cfg.predict, cfg.active)
    for width in map(int, cfg.widths.split(",")):
        sides, copies = {}, {}
        for dtype in (torch.bfloat16, torch.float32):
            ending = str(dtype).removeprefix("torch.")
            for arm, flags in arms.items():
                mlps, inputs = cold_mlps(width, flags, dtype, cfg.cold * 2**20)
                name = f"{arm}, {ending}"
                sides[name], copies[name] = partial(through, mlps, inputs), len(mlps)
                work[f"{name}, {width}"] = work_of(mlps[0], inputs[0])
                if arm == "dense":
                    name = f"F.linear, {ending}"
                    sides[name], copies[name] = partial(through_linears, mlps, inputs), len(mlps)
                elif dtype == torch.bfloat16:
                    sides[f"{name}, torch alone"] = partial(without_kernels, sides[name])
                    copies[f"{name}, torch alone"] = len(mlps)
        us = {name: [1e6 * s / copies[name] for s in values]
              for name, values in interleave(sides, cfg.repeats).items()}
        measurements[f"width {width}"] = result = measurement("us", us)
        result["against"] = {base: {name: statistics.median(us[base]) / statistics.median(values)
                                    for name, values in us.items()} for base in (DENSE, DENSE_FP32)}
        print(f"one token, {width} to {4 * width} to {width}, us: median (min to max); times faster than "
              f"{DENSE} and than {DENSE_FP32}")
        for name, s in result["sides"].items():
            faster = "".join(f"{ratios[name]:8.2f}x" for ratios in result["against"].values())
            print(f"  {name:40}{s['median']:8.1f}  ({s['min']:.1f} to {s['max']:.1f}){faster}")
    kernels = sparse_kernels.path_taken(torch.device("cpu"))
    return {"measurements": measurements, "work": work, "kernels": kernels}


def cold_mlps(width, flags, dtype, cold):
    """Copies of one MLP, together `cold` bytes, and an input (1, 1, width) for each."""
    config = GPTConfig(n_layer=1, n_head=1, n_embd=width, bias=False, vocab_size=1, block_size=1,
                       **dict(act="relu2") | flags)
    model = GPT(config, seed=0).eval().to(dtype).use_policy()
    copies = max(2, cold // (8 * width * width * dtype.itemsize))
    mlps = [copy.deepcopy(model.transformer.h[0].mlp) for _ in range(copies)]
    return mlps, torch.randn(copies, 1, 1, width, generator=torch.Generator().manual_seed(0)).to(dtype)


@torch.inference_mode()
def through(mlps, inputs):
    for one, x in zip(mlps, inputs):
        one(x, NO_CONTEXT)


@torch.inference_mode()
def through_linears(mlps, inputs):
    """The dense MLP as PyTorch alone computes it."""
    linear, relu = torch.nn.functional.linear, torch.nn.functional.relu
    for one, x in zip(mlps, inputs):
        linear(relu(linear(x, one.c_fc.weight)).square(), one.c_proj.weight)


def without_kernels(run):
    with mock.patch.object(sparse_kernels, "cpu_library", lambda: (None, "off")):
        run()


def work_of(one, x):
    """Multiply-adds of weights and bytes of weights of one call, counted as they are executed."""
    with torch.inference_mode(), sparse_kernels.counting() as work:
        one(x, NO_CONTEXT)
    return {"macs": work.macs, "bytes": work.bytes}


# ------------------------------------------------ window ------------------------------------------------

CAUSAL, MASKED, LOCAL = "causal SDPA", "SDPA with the window as a mask", "window"
LAYERS = dict(n_layer=4, n_head=12, n_embd=768, vocab_size=256, bias=False, pos="rope")  # decoded by window


@dataclass(frozen=True)
class Window(Bench):
    """Local attention beside full: forward and backward, and a decoded token's time and memory by context."""
    threads: int = 1  # CPU threads; more than one collapse where the machine is shared
    tokens: int = 2048  # tokens of the forward and backward pass
    window: int = 128  # tokens that each of them sees
    heads: int = 12  # attention heads, 64 wide each
    contexts: str = "1024,2048,4096,8192,16384"  # tokens before the decoded one, by commas
    device: str = "cpu"  # cpu, cuda, mps
    plot: str = ""  # also draw time and memory against the context into this PNG (needs matplotlib)

    def __post_init__(self):
        super().__post_init__()
        require(self.window >= 1 and self.tokens >= 1 and self.heads >= 1,
                f"tokens={self.tokens}, window={self.window} and heads={self.heads} must be at least 1")
        require(all(n.isdigit() and int(n) >= 1 for n in self.contexts.split(",")),
                f"contexts='{self.contexts}' must be numbers by commas: type --contexts=1024,4096")


def window(cfg):
    sides = {}
    for dtype in (torch.float32, torch.bfloat16):
        parts = torch.randn(4, 1, cfg.heads, cfg.tokens, 64, device=cfg.device).to(dtype).unbind(0)
        for name, attend in attentions(cfg).items():
            ending = str(dtype).removeprefix("torch.")
            sides[f"{name}, {ending}"] = partial(there_and_back, attend, *parts)
    ms = {name: [1e3 * s for s in values] for name, values in interleave(sides, cfg.repeats).items()}
    layer = measurement("ms", ms)
    layer["against"] = {name: statistics.median(ms[name.replace(LOCAL, CAUSAL)]) / statistics.median(values)
                        for name, values in ms.items() if name.startswith(LOCAL)}
    print(f"attention over {cfg.tokens} tokens, {cfg.heads} heads of 64, window {cfg.window}, forward and "
          "backward, ms: median (min to max)")
    for name, s in layer["sides"].items():
        faster = f"  {layer['against'][name]:.2f}x {CAUSAL}" if name in layer["against"] else ""
        print(f"  {name:42}{s['median']:8.2f}  ({s['min']:.2f} to {s['max']:.2f}){faster}")
    contexts = [int(n) for n in cfg.contexts.split(",")]
    steps, cached = {}, {}
    for side, size in (("window", cfg.window), ("full", 0)):
        local = dict(window=size, window_pattern="S") if size else {}
        model = GPT(GPTConfig(block_size=max(contexts), **LAYERS | local), seed=0).eval()
        model.to(cfg.device, torch.bfloat16)
        for context in contexts:
            name = f"{side}, {context}"
            cache = Cache(model, 1, context)
            steps[name], cached[name] = partial(step_at, model, cache, context), cache.nbytes()
    found = measurement("ms", {name: [1e3 * s for s in values]
                               for name, values in interleave(steps, 4 * cfg.repeats).items()})
    print(f"one token of {LAYERS['n_layer']} layers, {LAYERS['n_embd']} wide, bf16, behind so many: ms "
          "(min to max), MiB of cache")
    for name, s in found["sides"].items():
        mib = cached[name] / 2**20
        print(f"  {name:16}{s['median']:8.2f}  ({s['min']:.2f} to {s['max']:.2f}){mib:10.2f}")
    if cfg.plot:
        draw_contexts(cfg.plot, contexts, found["sides"], cached)
    return {"measurements": {"layer": layer, "decoded token": found}, "cache_bytes": cached,
            "kernels": sparse_kernels.path_taken(torch.device(cfg.device))}


def attentions(cfg):
    """{side: function of q, k, v}."""
    tokens = torch.arange(cfg.tokens, device=cfg.device)
    age = tokens[:, None] - tokens
    seen = (age >= 0) & (age < cfg.window)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return {CAUSAL: partial(sdpa, is_causal=True), MASKED: partial(sdpa, attn_mask=seen),
            LOCAL: lambda q, k, v: layers.attend_window(cfg.window, q, k, v, None, 0.0)}


def there_and_back(attend, q, k, v, weights):
    """Attention and its gradients."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    attend(q, k, v).backward(weights)


@torch.inference_mode()
def step_at(model, cache, context):
    """One cached decode step behind context - 1 tokens; what the cache holds does not change its work."""
    idx = torch.zeros(1, context, dtype=torch.int64, device=cache.layers[0].device)
    model.head(model.trunk(idx[:, -1:], CachedContext(cache, context - 1, 1, idx)))


def draw_contexts(path, contexts, sides, cached):
    """Time and cache of a decoded token against the context, with and without the window."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for side, color in (("full", "black"), ("window", "tab:red")):
        names = [f"{side}, {context}" for context in contexts]
        axes[0].plot(contexts, [sides[name]["median"] for name in names], "o-", color=color, label=side)
        axes[1].plot(contexts, [cached[name] / 2**20 for name in names], "o-", color=color, label=side)
    for axis, label in zip(axes, ("ms a decoded token", "MiB of keys and values")):
        axis.set(xscale="log", xlabel="tokens before it", ylabel=label, ylim=(0, None))
        axis.set_xticks(contexts, [f"{n / 1024:g}k" for n in contexts], minor=False)
        axis.minorticks_off()
        axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# ------------------------------------------------ quality -----------------------------------------------

TWIN = "dense"
ARMS = {                                         # a file in config/, keys, or both
    TWIN: {}, "dense/4": dict(mlp_units=128), "dense/2": dict(mlp_units=256), "gelu": dict(act="gelu"),
    "osc": "bio_osc", "predict": "bio_predict", "winners": "bio_winners", "event": "bio_event",
    "columns": "bio_columns", "columns*2": ("bio_columns", dict(mlp_units=960)),
    "columns*4": ("bio_columns", dict(mlp_units=1920)),
    "dendrites": "bio_dendrites", "experts": "bio_experts", "window": "bio_window",
    "branches": "bio_branches", "branches1": ("bio_branches", dict(dendrites_active=1)),
    "branches4": ("bio_branches", dict(dendrites_active=4)), "hierarchy": "bio_hierarchy"}
COUNTED = ("dead", "active", "open", "zeros", "recall", "mlp", "attn")
SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)


@dataclass(frozen=True)
class Quality(Bench):
    """Validation loss of every block beside its dense twin: the same data, seeds, recipe and iterations."""
    repeats: int = 3  # seeds of each arm
    threads: int = 1  # CPU threads of a run
    jobs: int = 1  # runs at a time
    config: str = "config/compare_pylib.py"  # config files of the recipe they share, by commas
    arms: str = ""  # some of the arms, by commas; empty: all
    keep: str = ""  # an earlier record of this recipe: its runs of arms that are not trained now stay
    equal_time: str = ""  # arms, by commas, also trained for their dense twin's time; steps are timed first
    iters: int = 0  # iterations; 0: the recipe's
    plot: str = ""  # also draw loss against the share of units read into this PNG (needs matplotlib)

    def __post_init__(self):
        super().__post_init__()
        require(self.jobs >= 1, f"jobs={self.jobs} must be at least 1")
        require(not self.keep or os.path.isfile(self.keep), f"keep='{self.keep}' does not exist")
        check_arms(self)


def quality(cfg):
    data = datasets.prepare_if_missing("pylib").resolve()
    wanted = chosen_arms(cfg)
    todo = [(arm, seed, 0) for seed in range(cfg.repeats) for arm in wanted]
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(cfg.jobs) as pool:
        also = [name for name in cfg.equal_time.split(",") if name]
        step = steps_alone(cfg, data, Path(work), [TWIN, *also]) if also else {}
        done = list(pool.map(lambda job: quality_run(cfg, data, Path(work), *job), todo))
        longer = [(arm, seed, round(done[0]["iters"] * step[TWIN]["median"] / step[arm]["median"]))
                  for arm, seed, _ in todo if arm in also]
        more = list(pool.map(lambda job: quality_run(cfg, data, Path(work), *job), longer))
    runs = {}
    for (arm, _, iters), run in zip(todo + longer, done + more):
        runs.setdefault(arm + ", equal time" * bool(iters), []).append(run)
    if cfg.keep:
        earlier = json.loads(Path(cfg.keep).read_text(encoding="utf-8"))["runs"]
        runs = {arm: runs.get(arm) or earlier[arm] for arm in ARMS if arm in runs | earlier}
    losses = measurement("nats", {arm: [run["val_loss"] for run in found] for arm, found in runs.items()})
    print(f"val loss, mean of {cfg.repeats} seeds (least to most); mean difference to the dense twin; "
          "parameters; shares of zeros")
    for arm, found in runs.items():
        values = [run["val_loss"] for run in found]
        paired = [a - b["val_loss"] for a, b in zip(values, runs.get(TWIN, ()))]
        losses["sides"][arm] |= {"mean": statistics.fmean(values), "to_twin": paired}
        print(f"  {arm:32}{statistics.fmean(values):.4f} ({min(values):.4f} to {max(values):.4f})"
              + (f"  {statistics.fmean(paired):+.4f}" if paired else "")
              + f"  {found[0]['parameters']:,}  {tell_counters(found[0])}")
        for share in found[0]["policy"]:
            print(f"    {float(share):5.0%} of the units read: "
                  f"{statistics.fmean(run['policy'][share] for run in found):.4f}")
    if cfg.plot and "branches" in runs:
        draw_branches(cfg.plot, runs["branches"])
    elif cfg.plot:
        draw_quality(cfg.plot, runs)
    for arm, s in step.items():
        print(f"  {arm:32}{s['median']:8.2f} ms a step ({s['min']:.2f} to {s['max']:.2f})")
    return {"measurements": {"val loss": losses}, "validation": QUALITY_VALIDATION, "ms": step,
            "trained_now": wanted, "runs": runs}


QUALITY_VALIDATION = dict(batches=160, tokens=1280)


@dataclass(frozen=True)
class Steps(Bench):
    """Milliseconds of a training step of every block beside its dense twin, alone on the machine."""
    repeats: int = 3  # processes of each arm, in turns
    threads: int = 2  # CPU threads of a run
    config: str = "config/compare_pylib.py"  # config files of the recipe they share, by commas
    arms: str = ""  # some of the arms, by commas; empty: all
    iters: int = 60  # iterations of a process, the first ten left out

    def __post_init__(self):
        super().__post_init__()
        require(self.iters > 10, f"iters={self.iters} must be above 10, so many are left out")
        check_arms(self)


def check_arms(cfg):
    """The keys `config` and `arms`, both lists by commas."""
    for file in cfg.config.split(","):
        require(os.path.isfile(ROOT / file), f"config='{file}' does not exist")
    unknown = [name for name in cfg.arms.split(",") if name and name not in ARMS]
    require(not unknown, f"arms='{cfg.arms}': {unknown[:1]} must be among {', '.join(ARMS)}")


def steps(cfg):
    data = datasets.prepare_if_missing("pylib").resolve()
    with tempfile.TemporaryDirectory() as work:
        ms = steps_alone(cfg, data, Path(work), chosen_arms(cfg), cfg.iters)
    print(f"a training step of {cfg.config}, {cfg.threads} threads, ms: median (least to most)")
    twin = ms.get(TWIN, {}).get("median")
    for arm, s in ms.items():
        s["to_twin"] = s["median"] / twin if twin else None
        print(f"  {arm:20}{s['median']:8.2f} ({s['min']:.2f} to {s['max']:.2f})"
              + (f"  {s['to_twin']:.2f} times its dense twin's" if twin else ""))
    return {"measurements": {"training step": {"unit": "ms", "sides": ms}}}


def chosen_arms(cfg):
    return [name for name in cfg.arms.split(",") if name] or list(ARMS)


def steps_alone(cfg, data, work, arms, iters=60):
    """Milliseconds of a training step of every arm, in short runs one after the other, in turns."""
    ms = {arm: [] for arm in arms}
    for _ in range(cfg.repeats):
        for arm in arms:
            rows = trained(cfg, data, work / "alone", arm, 0, iters)
            ms[arm].append(statistics.median(row["ms"] for row in rows[10:] if "ms" in row))
            shutil.rmtree(work / "alone")
    return {arm: spread(values) for arm, values in ms.items()}


def trained(cfg, data, out_dir, arm, seed, iters):
    """Train one arm with one seed in a process of its own -> the rows of its metrics."""
    flags = ARMS[arm]
    if not isinstance(flags, tuple):
        flags = (flags, {}) if isinstance(flags, str) else ("", flags)
    file, flags = flags
    more = dict(eval_interval=50, eval_iters=1) if arm.startswith("branches") else {}      # for the plot
    return trained_with(cfg, data, out_dir, [f"config/{file}.py"] * bool(file), flags, seed,
                        iters or cfg.iters, **more)


def trained_with(cfg, data, out_dir, files, flags, seed, iters, **more):
    """The recipe, config files behind it and flags -> the rows of the run's metrics."""
    keys = dict(dataset=data, out_dir=out_dir, seed=1337 + seed, device="cpu") | flags
    keys |= dict.fromkeys(("max_iters", "lr_decay_iters", "eval_interval"), iters) if iters else {}
    files = [str(ROOT / file) for file in [*cfg.config.split(","), *files]]
    timed_script(ROOT / "train.py", files, keys | more, out_dir.parent, cfg)
    lines = (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def quality_run(cfg, data, work, arm, seed, iters):
    """Train one arm with one seed -> its losses and counters."""
    out_dir, clock = work / f"{list(ARMS).index(arm)}_{seed}", time.perf_counter()
    rows = trained(cfg, data, out_dir, arm, seed, iters)
    seconds = time.perf_counter() - clock
    model = trained_model(out_dir)
    validation = validation_of(model)
    found = {"val_loss": fixed_loss(model, data, validation), "policy": {}, "seconds": seconds,
             "iters": rows[-1]["iter"],
             "open_branches": [[row["iter"], row["open_branches"]] for row in rows if "open_branches" in row],
             "parameters": model.get_num_params(), "model_args": model.config.model_args(),
             "counters": {k: v for k, v in rows[-1].items() if k.startswith(COUNTED)}}
    for share in SHARES if model.config.mlp_predict else ():
        for block in model.use_policy().transformer.h:
            block.mlp.active = max(1, round(share * model.config.units()))
        found["policy"][str(share)] = fixed_loss(model, data, validation)
    shutil.rmtree(out_dir)
    print(f"seed {seed}, {arm}: val loss {found['val_loss']:.4f}, {seconds:.0f} s", file=sys.stderr,
          flush=True)
    return found


def trained_model(out_dir):
    """The model of a finished run, in eval mode."""
    path = checkpoint.find(out_dir)
    return checkpoint.build_model(checkpoint.load(path), path).eval()


def validation_of(model):
    """Keys of the fixed validation batches for a model's block size."""
    block = model.config.block_size
    return dict(batches=QUALITY_VALIDATION["batches"], block_size=block,
                batch_size=QUALITY_VALIDATION["tokens"] // block)


def fixed_loss(model, data, validation):
    """Mean loss on fixed validation batches, in fp32."""
    stream = datasets.TokenStream(data, "val", validation["block_size"], validation["batch_size"], seed=0)
    with torch.no_grad():
        return statistics.fmean(model(*stream.batch(k))[1].item() for k in range(validation["batches"]))


def tell_counters(run):
    return ", ".join(f"{key} {value:.4g}" for key, value in run["counters"].items())


def draw_quality(path, runs):
    """Loss against the share of the dense twin's MLP units that a token reads, and the dense frontier."""
    plt = pyplot()
    mean = {arm: statistics.fmean(run["val_loss"] for run in found) for arm, found in runs.items()}
    figure, axis = plt.subplots(figsize=(7, 4.5))
    dense = {0.25: "dense/4", 0.5: "dense/2", 1.0: TWIN}
    dense = {share: mean[arm] for share, arm in dense.items() if arm in mean}
    axis.plot(dense.keys(), dense.values(), "o-", color="black", label="dense models of that width")
    for found in (runs.get("predict") or [])[:1]:
        units = [GPTConfig(**runs[arm][0]["model_args"]).units() for arm in ("predict", TWIN)]
        curve = {float(s) * units[0] / units[1]: statistics.fmean(r["policy"][s] for r in runs["predict"])
                 for s in found["policy"]}
        axis.plot(curve.keys(), curve.values(), "o-", color="tab:red", label="predicted units of top 10%")
        axis.axhline(mean["predict"], color="tab:red", lw=0.8, ls=":", label="exact top 10%, W_up read whole")
    for arm, share in (("columns", 0.25), ("columns*2", 0.5), ("columns*4", 1.0), ("experts", 0.25)):
        if arm in mean:
            axis.plot([share], [mean[arm]], "s", label=arm)
    axis.set(xlabel="share of the dense twin's units whose weights a token reads", xscale="log",
             ylabel="validation loss, nats")
    axis.set_xticks([0.05, 0.1, 0.2, 0.5, 1.0], ["5%", "10%", "20%", "50%", "100%"])
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def draw_branches(path, found):
    """Share of closed dendritic branches over training, one line a seed."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6, 3.6))
    branches = GPTConfig(**found[0]["model_args"]).dendrites
    for run in found:
        axis.plot(*zip(*[(i, 1 - opened / branches) for i, opened in run["open_branches"]]), lw=1)
    axis.set(xlabel="iterations", ylabel="share of branches closed, mean of layers", ylim=(0, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# ------------------------------------------------ depth -------------------------------------------------

FULL = "all layers"                              # of the model with exits, one token after the other


@dataclass(frozen=True)
class Depth(Bench):
    """Early exits and drafts of a trained model beside dense models of every shallower depth."""
    threads: int = 1  # CPU threads, of a training run too
    jobs: int = 1  # models trained at a time
    config: str = "config/compare_pylib.py,config/longer_context.py"  # config files of the recipe, by commas
    layers: int = 6  # layers of the model with exits
    exits: str = "1,2,3,4,5"  # its exits, by commas
    layer_dropout: float = 0.1  # of the model with exits
    thresholds: str = "0.3,0.5,0.6,0.7,0.8,0.9,0.95"  # exit thresholds of the curve, by commas
    drafts: str = "2,3,4,6"  # tokens drafted at a time, by commas
    prompts: int = 20  # prompts from the validation text
    new: int = 50  # greedy tokens behind each of them
    iters: int = 0  # iterations; 0: the recipe's
    plot: str = ""  # also draw loss against layers and against tokens/s into this PNG (needs matplotlib)

    def __post_init__(self):
        super().__post_init__()
        require(self.jobs >= 1 and self.prompts >= 1 and self.new >= 1,
                f"jobs={self.jobs}, prompts={self.prompts} and new={self.new} must be at least 1")
        for file in self.config.split(","):
            require(os.path.isfile(ROOT / file), f"config='{file}' does not exist")


def depth(cfg):
    data = datasets.prepare_if_missing("pylib").resolve()
    depths = [int(n) for n in cfg.exits.split(",")] + [cfg.layers]
    flags = {f"dense, {n} layers": dict(n_layer=n) for n in depths}
    flags["exits"] = dict(n_layer=cfg.layers, exits=cfg.exits, layer_dropout=cfg.layer_dropout)
    models = trained_models(cfg, data, flags)
    model, validation = models["exits"], validation_of(models["exits"])
    points = {name: {"layers": n, "val_loss": fixed_loss(models[name], data, validation)}
              for name, n in zip(flags, depths)}
    points[FULL] = {"layers": cfg.layers, "val_loss": fixed_loss(model, data, validation)}
    for threshold in cfg.thresholds.split(","):
        leave_at(model, float(threshold))
        loss = fixed_loss(model, data, validation)
        points[f"threshold {threshold}"] = {"layers": layers_per_token(model), "val_loss": loss}
    prompts = validation_prompts(data, cfg, model.config.block_size)
    rates = measurement("tokens/s", depth_rates(cfg, models, points, prompts), higher_is_better=True)
    for name, s in rates["sides"].items():
        points[name]["tokens_per_second"] = s["median"]
    drafted = {f"{n} from exit {at}": drafts_of(cfg, models, prompts, n, at)
               for at in depths[:-1][:3] for n in map(int, cfg.drafts.split(","))}
    tell_depth(points, drafted)
    if cfg.plot:
        draw_depth(cfg.plot, points)
    return {"measurements": {"decode": rates}, "validation": QUALITY_VALIDATION, "points": points,
            "drafted": drafted, "parameters": {name: m.get_num_params() for name, m in models.items()},
            "probe_bytes": 4 * model.config.n_embd, "head_bytes": 4 * model.lm_head.weight.numel()}


def leave_at(model, threshold):
    """Early exits at this threshold, None: never; the counts begin anew."""
    exits = model.transformer.exits
    exits.policy, exits.threshold = threshold is not None, threshold
    exits.layers_run = exits.tokens_run = 0


def layers_per_token(model):
    return model.transformer.exits.layers_run / model.transformer.exits.tokens_run


def validation_prompts(data, cfg, block):
    """cfg.prompts rows (1, n) of the validation text, so long that cfg.new tokens fit behind them."""
    length = block - cfg.new
    require(length >= 1, f"new={cfg.new} must be below the block of {block}")
    stream = datasets.TokenStream(data, "val", block, cfg.prompts, seed=0)
    return list(stream.batch(0)[0][:, :min(length, block // 2)].split(1))


def depth_rates(cfg, models, points, prompts):
    """{name: tokens/s of each round} of the dense models and of every threshold."""
    def run(name):
        dense = models.get(name)
        if dense is None:
            leave_at(models["exits"], float(name.split()[-1]) if name != FULL else None)
        for prompt in prompts[:4]:
            (dense or models["exits"]).generate(prompt, cfg.new, temperature=0)
    seconds = interleave({name: partial(run, name) for name in points}, cfg.repeats)
    return {name: [4 * cfg.new / s for s in values] for name, values in seconds.items()}


def drafts_of(cfg, models, prompts, drafts, at):
    """Greedy self-speculation on all prompts beside the same model's and its dense twin's greedy decoding."""
    model, twin = models["exits"], models[f"dense, {cfg.layers} layers"]
    leave_at(model, None)
    speculation, sampler = decoding.Speculation(model, drafts, at), decoding.Sampler(temperature=0)
    found = {}

    def run(name, stream):
        found[name] = [list(map(int, stream(prompt, cfg.new, sampler))) for prompt in prompts]
    sides = {"drafts": partial(run, "drafts", speculation.stream),
             FULL: partial(run, FULL, partial(decoding.stream, model)),
             "dense twin": partial(run, "dense twin", partial(decoding.stream, twin))}
    seconds = interleave(sides, cfg.repeats)
    tokens = cfg.new * len(prompts)
    rates = {name: spread([tokens / s for s in values]) for name, values in seconds.items()}
    layer, head = (sum(p.numel() for p in part.parameters())
                   for part in (model.transformer.h[0], model.lm_head))
    count, L = cfg.repeats + 1, cfg.layers
    rounds, proposed = speculation.rounds / count / tokens, speculation.proposed / count / tokens
    weights = proposed * (at * layer + head) + rounds * ((L - at) * layer + head)
    return {"equal": sum(map(eq, chain(*found["drafts"]), chain(*found[FULL]))), "tokens": tokens,
            "accepted": speculation.accepted / speculation.proposed, "tokens_per_round": 1 / rounds,
            "ceiling": (L * layer + head) / weights, "rates": rates,
            "to_twin": rates["drafts"]["median"] / rates["dense twin"]["median"],
            "to_full": rates["drafts"]["median"] / rates[FULL]["median"]}


def tell_depth(points, drafted):
    print("layers per token, val loss, tokens/s (median)")
    for name, p in points.items():
        print(f"  {name:20}{p['layers']:6.2f}{p['val_loss']:9.4f}{p['tokens_per_second']:10,.0f}")
    print("self-speculation, greedy: tokens equal to all layers'; share of drafts accepted; tokens/s against "
          "all layers and the dense twin; ceiling, by weights read")
    for name, d in drafted.items():
        print(f"  {name:20}{d['equal']} of {d['tokens']}, {d['accepted']:.0%}, {d['to_full']:.2f}x, "
              f"{d['to_twin']:.2f}x, {d['ceiling']:.2f}x")


def draw_depth(path, points):
    """Loss against layers per token, and against tokens/s."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    for axis, key, label in ((axes[0], "layers", "mean layers per token"),
                             (axes[1], "tokens_per_second", "tokens/s, greedy, batch 1")):
        for prefix, style in (("dense", "o-k"), ("threshold", "o-r")):
            shown = [p for name, p in points.items() if name.startswith(prefix)]
            shown += [points[FULL]] * (prefix == "threshold")
            title = "dense models of that depth" if prefix == "dense" else "one model, exits by threshold"
            axis.plot([p[key] for p in shown], [p["val_loss"] for p in shown], style, label=title)
        axis.set(xlabel=label)
    axes[0].set(ylabel="validation loss, nats")
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# ------------------------------------------------ ponder ------------------------------------------------

@dataclass(frozen=True)
class Ponder(Bench):
    """Adaptive computation: loss and time against mean runs, beside dense models of as much compute."""
    threads: int = 1  # CPU threads, of a training run too
    jobs: int = 1  # models trained at a time
    config: str = "config/compare_pylib.py,config/longer_context.py"  # config files of the recipe, by commas
    layers: int = 4  # layers of the model that ponders
    most: int = 4  # most runs of its middle block
    costs: str = "0.003,0.01,0.03,0.1"  # ponder costs, a model each, by commas
    iters: int = 0  # iterations; 0: the recipe's

    def __post_init__(self):
        super().__post_init__()
        for file in self.config.split(","):
            require(os.path.isfile(ROOT / file), f"config='{file}' does not exist")


def ponder(cfg):
    data = datasets.prepare_if_missing("pylib").resolve()
    flags = {f"ponder, cost {cost}": dict(n_layer=cfg.layers, ponder=cfg.most, ponder_cost=float(cost))
             for cost in cfg.costs.split(",")}
    flags |= {f"dense, {n} layers": dict(n_layer=n) for n in range(cfg.layers, cfg.layers + cfg.most)}
    models = trained_models(cfg, data, flags)
    batch = datasets.TokenStream(data, "val", models[f"dense, {cfg.layers} layers"].config.block_size, 5,
                                 seed=0).batch(0)
    points = {name: {"val_loss": fixed_loss(model, data, validation_of(model)),
                     "layers": layers_run(model, batch[0])} for name, model in models.items()}
    sides = models | shifted_biases(models[next(iter(models))])
    steps = interleave({name: partial(train_once, model, batch) for name, model in sides.items()},
                       cfg.repeats)
    tokens = interleave({name: partial(decode_row, model, batch[0][:1]) for name, model in sides.items()},
                        cfg.repeats)
    for name, model in sides.items():
        point = points.setdefault(name, {"layers": layers_run(model, batch[0])})
        point |= {"step_ms": spread([1e3 * t for t in steps[name]]),
                  "token_ms": spread([1e3 * t / decoded_by(model) for t in tokens[name]])}
    print("mean layers a token, val loss, ms of a training step, ms of a decoded token (medians)")
    for name, p in sorted(points.items(), key=lambda item: item[1]["layers"]):
        loss = f"{p['val_loss']:.4f}" if "val_loss" in p else "      "
        print(f"  {name:24}{p['layers']:6.2f}  {loss}{p['step_ms']['median']:9.1f}"
              f"{p['token_ms']['median']:8.3f}")
    return {"measurements": {}, "validation": QUALITY_VALIDATION, "points": points,
            "parameters": {name: model.get_num_params() for name, model in models.items()}}


def decoded_by(model):
    """Tokens of a timed continuation."""
    return min(64, model.config.block_size // 2)


def trained_models(cfg, data, flags):
    """{name: flags} -> {name: model trained on the recipe}, cfg.jobs at a time."""
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(cfg.jobs) as pool:
        folders = {name: Path(work) / str(i) for i, name in enumerate(flags)}
        list(pool.map(lambda name: trained_with(cfg, data, folders[name], [], flags[name], 0, cfg.iters),
                      flags))
        return {name: trained_model(folder) for name, folder in folders.items()}


def layers_run(model, idx):
    """Blocks that a token passes, in the mean."""
    runs = bio_modules.depth_used(model, idx).get("ponder_steps", 1)
    return model.config.n_layer - 1 + runs


def shifted_biases(model):
    """Copies of a model that ponders, halting sooner or later: {name: model}."""
    found = {}
    for shift in (-4, -2, 2, 4):
        found[f"halting bias {shift:+d}"] = other = copy.deepcopy(model)
        other.transformer.h[model.config.pondering_layer()].halting.halt.bias.data += shift
    return found


def train_once(model, batch):
    """Forward and backward of one batch."""
    model.train()(*batch)[1].backward()
    model.zero_grad()


def decode_row(model, prompt):
    new = decoded_by(model)
    model.eval().generate(prompt[:, :model.config.block_size - new], new, temperature=0)


# ------------------------------------------------ grow --------------------------------------------------

@dataclass(frozen=True)
class Grow(Bench):
    """A model that grows up beside one of full depth from the start: loss against time and against FLOPs."""
    repeats: int = 3  # seeds of each
    threads: int = 2  # CPU threads of a run
    config: str = "config/compare_pylib.py"  # config files of the recipe, by commas
    layers: int = 6  # layers in the end
    grow: str = "2:0.25,4:0.25"  # stages of the one that grows, LAYERS:SHARE by commas
    iters: int = 0  # iterations; 0: the recipe's
    plot: str = ""  # also draw loss against seconds and against FLOPs into this PNG (needs matplotlib)

    def __post_init__(self):
        super().__post_init__()
        for file in self.config.split(","):
            require(os.path.isfile(ROOT / file), f"config='{file}' does not exist")


FROM_THE_START, GROWN, GROWN_LONGER = "full depth", "grown", "grown, equal time"


def grow(cfg):
    data = datasets.prepare_if_missing("pylib").resolve()
    runs = {FROM_THE_START: [], GROWN: [], GROWN_LONGER: []}
    with tempfile.TemporaryDirectory() as work:
        for seed in range(cfg.repeats):
            full = grown_run(cfg, data, Path(work) / f"{seed}a", {}, seed, cfg.iters)
            grown = grown_run(cfg, data, Path(work) / f"{seed}b", dict(grow=cfg.grow), seed, cfg.iters)
            iters = round(grown["iters"] * full["step_seconds"] / grown["step_seconds"])
            longer = grown_run(cfg, data, Path(work) / f"{seed}c", dict(grow=cfg.grow), seed, iters)
            for name, run in zip(runs, (full, grown, longer)):
                runs[name].append(run)
    losses = measurement("nats", {name: [run["val_loss"] for run in found] for name, found in runs.items()})
    print("val loss, mean of seeds (least to most); seconds of training steps; TFLOP; iterations")
    for name, found in runs.items():
        values = [run["val_loss"] for run in found]
        losses["sides"][name]["mean"] = statistics.fmean(values)
        print(f"  {name:20}{statistics.fmean(values):.4f} ({min(values):.4f} to {max(values):.4f})  "
              f"{statistics.median(run['step_seconds'] for run in found):6.1f} s  "
              f"{found[0]['curve'][-1][2] / 1e15:.3f}  {found[0]['iters']}")
    if cfg.plot:
        draw_growth(cfg.plot, runs)
    return {"measurements": {"val loss": losses}, "validation": QUALITY_VALIDATION, "runs": runs}


def grown_run(cfg, data, out_dir, flags, seed, iters):
    """-> val loss on fixed batches, seconds of all training steps, curve of [seconds, val loss, FLOPs]."""
    rows = trained_with(cfg, data, out_dir, [], dict(n_layer=cfg.layers) | flags, seed, iters,
                        eval_interval=100)
    model, seconds, flops, curve = trained_model(out_dir), 0.0, 0.0, []
    for row, after in pairwise(rows):
        model.use_layers(row.get("layers", cfg.layers))
        if row.get("val_loss") and row["iter"]:
            curve.append([seconds, row["val_loss"], flops])
        seconds += row["ms"] / 1e3
        flops += model.flops_per_token() * (after["tokens"] - row["tokens"])
    curve.append([seconds, rows[-1]["val_loss"], flops])
    model.use_layers(cfg.layers)
    shutil.rmtree(out_dir)
    found = {"val_loss": fixed_loss(model, data, validation_of(model)), "step_seconds": seconds,
             "iters": rows[-1]["iter"], "curve": curve}
    print(f"seed {seed}, {flags}: val loss {found['val_loss']:.4f}, {seconds:.0f} s", file=sys.stderr)
    return found


def draw_growth(path, runs):
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    for name, colour in zip(runs, ("black", "tab:red", "tab:orange")):
        for run in runs[name]:
            seconds, losses, flops = zip(*run["curve"])
            axes[0].plot(seconds, losses, color=colour, lw=1, label=name * (run is runs[name][0]))
            axes[1].plot([f / 1e12 for f in flops], losses, color=colour, lw=1)
    axes[0].set(xlabel="seconds of training steps", ylabel="validation loss, nats", ylim=(None, 2.2))
    axes[1].set(xlabel="TFLOP")
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


# ------------------------------------------------ memory ------------------------------------------------

@dataclass(frozen=True)
class Memory(Bench):
    """GPU memory of a training run, computed: weights, gradients, optimizer, what backward keeps."""
    shape: str = "gpt2"  # gpt2 (12 layers, 768 wide, block 1024) or baby (6 layers, 384 wide, block 256)
    cards: str = "8,12,24"  # GiB of the cards, by commas

    def __post_init__(self):
        super().__post_init__()
        require(self.shape in SHAPES, f"shape='{self.shape}' must be {' or '.join(SHAPES)}")
        require(all(card.isdigit() for card in self.cards.split(",")),
                f"cards='{self.cards}' must be whole GiB by commas: type --cards=8,12,24")


def memory(cfg):
    """Bytes that autograd keeps for one sequence, summed over what a real bf16 forward saves on
    a CPU, with and without recompute; the largest batch that fits a card less 1 GiB for all else."""
    found, T = {}, SHAPES[cfg.shape]["block_size"]
    for recompute in (False, True):
        model = GPT(GPTConfig(**SHAPES[cfg.shape], recompute=recompute), seed=0).train()
        model.compute_dtype = torch.bfloat16
        parameters, V = sum(p.numel() for p in model.parameters()), model.config.vocab_size
        fixed, sequence = 16 * parameters, saved_bytes(model, T) + 6 * V * T    # 6 V: the logits' gradients
        fits = {card: max(0, int((int(card) - 1) * 2**30 - fixed) // sequence)
                for card in cfg.cards.split(",")}
        found[f"recompute={recompute}"] = dict(fixed=fixed, sequence=sequence, batch_size=fits)
        print(f"{cfg.shape}, recompute={recompute}: {fixed / 2**30:.2f} GiB of weights, gradients and AdamW, "
              f"{sequence / 2**20:.0f} MiB a sequence of {T}; largest batch_size: "
              + ", ".join(f"{batch} in {card} GiB ({(fixed + batch * sequence) / 2**30:.1f} used)"
                          for card, batch in fits.items()))
    return {"measurements": {}, "memory": found}


def saved_bytes(model, T):
    """Bytes of the storages that one forward of T tokens saves for backward, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage     # held, so that no address is counted twice
        return tensor

    idx = torch.zeros(1, T, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(idx, idx)
    return sum(storage.nbytes() for storage in kept.values())


# ------------------------------------------------ readme ------------------------------------------------

MARKS = "<!-- results: written by `python bench.py readme` from results/*.json -->", "<!-- end of results -->"


@dataclass(frozen=True)
class Readme:
    """Write the README's table of measurements from results/*.json."""
    check: bool = False  # change nothing: exit with status 2 if the README is not up to date


def readme(cfg):
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = with_table(old, results_table(ROOT / "results"))
    require(not cfg.check or new == old,
            "README.md is not what results/*.json say: type python bench.py readme")
    if new != old:
        write_atomically(path, new)
    print("README.md is up to date" if new == old else "README.md is written anew")


def with_table(text, table):
    """`text` with `table` between the two marks."""
    head, _, rest = text.partition(MARKS[0])
    _, mark, tail = rest.partition(MARKS[1])
    require(mark, f"README.md has lost its marks: put '{MARKS[0]}' and '{MARKS[1]}' where the table belongs")
    return f"{head}{MARKS[0]}\n{table}\n{MARKS[1]}{tail}"


def results_table(folder):
    """Every record of `folder` as rows of a markdown table: a measurement, both sides and their ratio."""
    lines, blocks, mlps, changes, windows, times, depths, grown, tasks, budgets, places = (
        [] for _ in range(11))
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        for name, result in record.get("measurements", {}).items():
            lines += table_rows(record, name, result, path)
        blocks += quality_rows(record, path) if record["subcommand"] == "quality" else []
        changes += change_rows(record, path) if record["subcommand"] == "ablate" else []
        mlps += mlp_rows(record, path) if record["subcommand"] == "mlp" else []
        times += step_rows(record, path) if record["subcommand"] == "steps" else []
        windows += window_rows(record, path) if record["subcommand"] == "window" else []
        depths += depth_rows(record, path) if record["subcommand"] in ("depth", "ponder") else []
        grown += growth_rows(record, path) if record["subcommand"] == "grow" else []
        tasks += continual.rows(record, path) if record["subcommand"] == "continual" else []
        budgets += energy.rows(record, path) if record["subcommand"] == "energy" else []
        h = record["hardware"]
        places.append(f"{h['gpu'] or h['cpu']}, {h['threads']} threads, torch {h['torch']}")
    lines = table("measured | ours | nanoGPT | ratio | record", lines)
    lines += table("block | val loss | seeds | to its dense twin | parameters | zeros into W_down | record",
                   blocks)
    lines += table("a training step with the block | ms | its dense twin's time | record", times)
    lines += table(f"one token through an MLP | us | times {DENSE} | times {DENSE_FP32} | weights read "
                   "| record", mlps)
    lines += table(f"attention, forward and backward; a decoded token | ms | times {CAUSAL} | cache | record",
                   windows)
    lines += table("depth | layers per token | val loss | tokens/s, greedy | a training step, ms | record",
                   depths)
    lines += table("growth | val loss | seeds | training steps, s | TFLOP | iterations | record", grown)
    lines += table(continual.HEAD, tasks) + table(energy.HEAD, budgets)
    lines += table("the race's config with | val loss | seeds | to ours | record", changes)
    return "\n".join([*lines, "Medians; " + "; ".join(dict.fromkeys(places))
                      + ". Each record holds its command, commit, spread and load average."])


def table(head, rows):
    """Lines of a markdown table with an empty one behind it; none without rows."""
    return [f"| {head} |", "|" + "---|" * (head.count("|") + 1), *rows, ""] if rows else []


def quality_rows(record, path):
    link = f"[{path.name}](results/{path.name})"
    for arm, s in record["measurements"]["val loss"]["sides"].items():
        first = record["runs"][arm][0]
        zeros = first["counters"].get("zeros")
        delta = f"{statistics.fmean(s['to_twin']):+.4f}" if s["to_twin"] and arm != TWIN else ""
        shown = f"{zeros:.0%}" if zeros is not None else ""
        yield (f"| {arm} | {s['mean']:.4f} ({s['min']:.4f} to {s['max']:.4f}) | {s['repeats']} | {delta} "
               f"| {first['parameters']:,} | {shown} | {link} |")
        for share in first["policy"]:
            losses = [run["policy"][share] for run in record["runs"][arm]]
            twin = [run["val_loss"] for run in record["runs"].get(TWIN, ())]
            delta = f"{statistics.fmean(losses) - statistics.fmean(twin):+.4f}" if twin else ""
            yield (f"| {arm}, {float(share):.0%} of the units read | {statistics.fmean(losses):.4f} "
                   f"({min(losses):.4f} to {max(losses):.4f}) | {s['repeats']} | {delta} | | | {link} |")


def change_rows(record, path):
    for name, s in record["measurements"]["val loss"]["sides"].items():
        yield (f"| {name} | {s['mean']:.4f} ({s['min']:.4f} to {s['max']:.4f}) | {s['repeats']} "
               f"| {s['to_ours']:+.4f} | [{path.name}](results/{path.name}) |")


def mlp_rows(record, path):
    """All sides at one width; of the other widths what gates before the up projection, in bf16."""
    whole = "width 768" if "width 768" in record["measurements"] else next(iter(record["measurements"]))
    for width, result in record["measurements"].items():
        for side, s in result["sides"].items():
            if width != whole and not re.fullmatch(r"(columns|predicted) .*, bfloat16", side):
                continue
            work = record["work"].get(f"{side}, {width.removeprefix('width ')}", {})
            read = f"{work['bytes'] / 2**20:.2f} MiB" if work else ""
            yield (f"| {width}: {side} | {figure(s)} | {result['against'][DENSE][side]:.2f}x "
                   f"| {result['against'][DENSE_FP32][side]:.2f}x | {read} "
                   f"| [{path.name}](results/{path.name}) |")


def step_rows(record, path):
    for arm, s in record["measurements"]["training step"]["sides"].items():
        yield (f"| {arm} | {figure(s)} ({s['min']:.4g} to {s['max']:.4g}) | {s['to_twin']:.2f}x "
               f"| [{path.name}](results/{path.name}) |")


def window_rows(record, path):
    for title, result in record["measurements"].items():
        for side, s in result["sides"].items():
            faster = f"{result['against'][side]:.2f}x" if side in result.get("against", {}) else ""
            cache = record["cache_bytes"].get(side)
            yield (f"| {title}: {side} | {figure(s)} | {faster} | "
                   f"{f'{cache / 2**20:.1f} MiB' if cache else ''} | [{path.name}](results/{path.name}) |")


def depth_rows(record, path):
    """Models and policies by the layers that a token passes."""
    for name, p in record["points"].items():
        rate = p.get("tokens_per_second") or 1e3 / p["token_ms"]["median"]
        step = figure(p["step_ms"]) if "step_ms" in p else ""
        loss = f"{p['val_loss']:.4f}" if "val_loss" in p else ""
        yield (f"| {name} | {p['layers']:.2f} | {loss} | {rate:,.0f} | {step} "
               f"| [{path.name}](results/{path.name}) |")


def growth_rows(record, path):
    for name, s in record["measurements"]["val loss"]["sides"].items():
        seconds = statistics.median(run["step_seconds"] for run in record["runs"][name])
        first = record["runs"][name][0]
        yield (f"| {name} | {s['mean']:.4f} ({s['min']:.4f} to {s['max']:.4f}) | {s['repeats']} "
               f"| {seconds:.0f} | {first['curve'][-1][2] / 1e12:.2f} | {first['iters']} "
               f"| [{path.name}](results/{path.name}) |")


def table_rows(record, name, result, path):
    peer = result["sides"].get(PEER)
    config = record["config"]
    what = f"{record['subcommand']} {config.get('shape', '')}".strip() + f": {name}, {result['unit']}"
    for side, s in result["sides"].items() if peer else ():
        if side != PEER:
            ratio = f"{result['ratio'][side]:.2f}x" if side in result["ratio"] else ""
            twin = result.get("to_twin", {}).get(side)
            label = what if side == OURS else f"{what} ({side.removeprefix('ours').strip()})"
            label += f", {twin:.2f}x its dense twin" if twin else ""
            yield f"| {label} | {figure(s)} | {figure(peer)} | {ratio} | [{path.name}](results/{path.name}) |"


def figure(s):
    """A median in four digits, thousands apart."""
    return f"{s['median']:,.0f}" if s["median"] >= 1000 else f"{s['median']:.4g}"

# ------------------------------------------------ the menu ----------------------------------------------

sys.modules.setdefault("bench", sys.modules[__name__])         # what benchmarks/ imports, run as a script too
from benchmarks import continual, energy  # noqa: E402

COMMANDS = {
    "train": (Train, train),
    "decode": (Decode, decode),
    "race": (Race, race),
    "ablate": (Ablate, ablate),
    "reach": (Reach, reach),
    "mlp": (Mlp, mlp),
    "window": (Window, window),
    "quality": (Quality, quality),
    "steps": (Steps, steps),
    "depth": (Depth, depth),
    "ponder": (Ponder, ponder),
    "grow": (Grow, grow),
    "continual": (continual.Continual, continual.run),
    "energy": (energy.Energy, energy.run),
    "memory": (Memory, memory),
    "readme": (Readme, readme),
}


def menu():
    lines = [f"  {name:10}{kind.__doc__.splitlines()[0]}" for name, (kind, _) in COMMANDS.items()]
    return "\n".join(["python bench.py SUBCOMMAND [--key=value ...]", "", *lines, "",
                      "python bench.py SUBCOMMAND --help lists its keys."])


def without_folders(word):
    """A word of the command line with absolute paths cut to their last part: a record names no machine."""
    return re.sub(r"(^|=)/(?:[^/]*/)*([^/]+)/?$", r"\1\2", word)


def main(words):
    """Run the subcommand that the words name; the JSON record is the last line of stdout."""
    sys.excepthook = say_and_exit
    if words[:1] in (["--help"], ["-h"]):
        return print(menu())
    choice = f"type python bench.py {' or '.join(COMMANDS)}; --help says what they measure"
    require(words, f"a subcommand is missing: {choice}")
    name = words[0]
    require(name in COMMANDS, f"unknown subcommand '{name}'{close_match(name, COMMANDS)}; {choice}")
    kind, function = COMMANDS[name]
    sys.argv[0] += f" {name}"                   # so that help and errors name the command that was typed
    cfg = configure(kind, words[1:])
    if kind is Readme:
        return readme(cfg)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    where = header(cfg)
    result = function(cfg)
    where["load_average"]["after"] = load_average()
    command = shlex.join(["python", "bench.py", *map(without_folders, words)])
    keys = {key: without_folders(value) if isinstance(value, str) else value
            for key, value in asdict(cfg).items()}
    record = json.dumps({"schema": SCHEMA, "subcommand": name, "command": command, "config": keys,
                         **where, **result}, allow_nan=False)
    print(record, flush=True)
    if cfg.out:
        write_atomically(cfg.out, record + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
