"""Training beside nanoGPT's: the same shape, data and AdamW, each side by its own train.py."""
import math
import statistics
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks import ROOT, Bench
from benchmarks.peers import copy_peer, peer_iterations
from benchmarks.record import OURS, PEER
from benchmarks.runs import metrics, timed_script
from benchmarks.timing import interleave, measurement, show, spread
from configurator import require
from data import dataset as datasets
from data import tokenizer as tokenizers
from model import GPT, GPTConfig
from training import runtime

# nanoGPT's CPU run; its GPU run of the same text in batches that a CPU can wait for
SHAPES = {"small": dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12),
          "baby": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=8)}
PLAIN = dict(bias=False, dropout=0.0)
RECIPE = dict(gradient_accumulation_steps=1, learning_rate=1e-3, min_lr=1e-4, warmup_iters=100,
              lr_decay_iters=2000, weight_decay=0.1, beta1=0.9, beta2=0.99, grad_clip=1.0,
              eval_interval=10**9, eval_iters=1, log_interval=1, always_save_checkpoint=False)
TAIL = 20                                       # iterations whose mean is called the final loss


@dataclass(frozen=True)
class Train(Bench):
    """Milliseconds per training iteration: our train.py against nanoGPT's, same shape, data, AdamW."""
    repeats: int = 3  # processes of each side, in turns A B A B
    iters: int = 200  # iterations of each process
    drop: int = 20  # first iterations of each process, left out of its median
    shape: str = "small"  # small: 4 layers of 128, 12 x 64 tokens; baby: 6 layers of 384, 8 x 256 tokens
    input: str = ""  # train on the characters of this text file; empty: the built-in data (bytes)
    device: str = "cpu"  # of both sides
    dtype: str = "auto"  # of ours; nanoGPT keeps its own default
    compile: bool | str = "auto"  # of ours: auto, True, False; its seconds are told as the first iteration's
    peer_compile: bool = False  # of nanoGPT; its documented CPU command says False

    def __post_init__(self):
        super().__post_init__()
        require(1 <= self.drop < self.iters, f"drop={self.drop} must be in 1..{self.iters - 1}, below iters")
        require(self.shape in SHAPES,
                f"shape='{self.shape}' must be {' or '.join(SHAPES)}: type --shape=baby")
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
    return train_report(cfg, runs, wall, model_of(cfg.shape, vocab_size))


def model_of(shape, vocab_size):
    """The model of both sides, without values."""
    keys = {key: value for key, value in SHAPES[shape].items() if key != "batch_size"}
    return GPT(GPTConfig(**keys, **PLAIN, vocab_size=vocab_size), init=False)


def train_report(cfg, runs, wall, model):
    """Print and return what the processes of both sides measured."""
    ms = {name: [statistics.median(run.ms[cfg.drop:]) for run in done] for name, done in runs.items()}
    tokens = SHAPES[cfg.shape]["batch_size"] * SHAPES[cfg.shape]["block_size"]
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
            "seeds": [1337], "parameters": model.get_num_params(),
            "train_flops_per_token": model.flops_per_token()}


def finite(value):
    return value if math.isfinite(value) else None


def training_data(cfg, work):
    """The folder of token files that both sides read."""
    if not cfg.input:
        return datasets.prepare_if_missing("pylib").resolve()
    datasets.write_text(work / "text", cfg.input, "char", 0.1)
    return work / "text"


def train_ours(cfg, data, work):
    """One process of our train.py. An iteration lasts from the end of the one before it to its own end, as
    nanoGPT's does; the first is its step alone, which holds the compile time."""
    keys = dict(max_iters=cfg.iters, dataset=data, out_dir=work / "ours")
    keys |= dict(dtype=cfg.dtype, compile=cfg.compile)
    said = run_script(ROOT / "train.py", keys, work, cfg)
    rows = [row for row in metrics(work / "ours") if "ms" in row]
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


def run_script(script, keys, cwd, cfg):
    """Run a train.py with the shape, recipe, device and threads that both sides share -> its stdout."""
    keys = SHAPES[cfg.shape] | PLAIN | RECIPE | dict(device=cfg.device) | keys
    return timed_script(script, [], keys, cwd, cfg)[0]
