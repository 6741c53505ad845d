"""What a training step costs with every block, beside its dense twin: in one process, in turns."""
import statistics
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import Recipe
from benchmarks.arms import (
    DENSE,
    TWIN,
    check_arms,
    chosen_arms,
    key_defaults,
    model_defaults,
    owned,
    settings,
)
from benchmarks.timing import interleave, spread
from configurator import require
from data import dataset as datasets
from model import GPT, GPTConfig
from training import optimizers, runtime

# keys behind the recipe's, how many times as wide its 128 become, training steps in a row
SHAPES = {"small": ({}, 1, 5), "baby": (dict(n_layer=6, n_head=6, block_size=256, batch_size=8), 3, 1)}
WIDENED = "n_embd", "mlp_units", "mlp_predict"
SAME = 0.05                                      # products may differ by this share and count as the same


@dataclass(frozen=True)
class Steps(Recipe):
    """Training tokens/s of every block that computes its dense twin's products, beside the twin."""
    repeats: int = 25  # rounds, each a few steps of every arm in turns
    cases: str = "small:1,small:2"  # SHAPE:THREADS by commas; shapes: small, the recipe's own; baby, 6 x 384
    arms: str = ""  # some of the arms, by commas; empty: all that compute their twin's products

    def __post_init__(self):
        super().__post_init__()
        pairs = [case.partition(":") for case in self.cases.split(",")]
        require(all(shape in SHAPES and threads.isdecimal() and int(threads) for shape, _, threads in pairs),
                f"cases='{self.cases}' must be SHAPE:THREADS by commas, shapes {' or '.join(SHAPES)}: type "
                "--cases=small:1,baby:2, for example")
        require(not self.threads and not self.iters, f"threads={self.threads} and iters={self.iters} have no "
                "effect here: type --cases=small:2 and --repeats=25, for example")
        check_arms(self)


def steps(cfg):
    data, before = datasets.prepare_if_missing("pylib").resolve(), torch.get_num_threads()
    found = {}
    runtime.keep_freed_memory()                  # as train.py does
    for case in cfg.cases.split(","):
        shape, _, threads = case.partition(":")
        torch.set_num_threads(int(threads))
        found[f"training step, {shape}, {threads} threads"] = {"unit": "ms", "sides": timed(cfg, data, shape)}
    torch.set_num_threads(before)
    return {"measurements": found, "seeds": [1337]}


def timed(cfg, data, shape):
    """{arm: ms of a step, tokens/s, its products and its time as shares of its twin's}, printed too."""
    rivals = () if cfg.arms else DENSE
    arms = [TWIN, *(arm for arm in chosen_arms(cfg) if arm not in (TWIN, *rivals))]
    sides = {arm: Steady(cfg, data, shape, arm) for arm in arms}
    products = {arm: side.products() / sides[TWIN].products() for arm, side in sides.items()}
    chosen = {arm: side for arm, side in sides.items() if cfg.arms or abs(products[arm] - 1) <= SAME}
    tokens, row = sides[TWIN].tokens, SHAPES[shape][2]
    seconds = {arm: [s / row for s in of] for arm, of in interleave(chosen, cfg.repeats).items()}
    print(f"a training step, {shape}, {torch.get_num_threads()} threads: ms, median (least to most); "
          "tokens/s", flush=True)
    found = {}
    for arm, of in seconds.items():
        shares = [own / twin for own, twin in zip(of, seconds[TWIN])]             # of one round each
        s = found[arm] = spread([1e3 * second for second in of]) | {
            "tokens_per_s": tokens / statistics.median(of), "products_to_twin": products[arm],
            "to_twin": statistics.median(shares), "to_twin_quartiles": spread(shares)["quartiles"]}
        print(f"  {arm:20}{s['median']:8.2f} ({s['min']:.2f} to {s['max']:.2f}){s['tokens_per_s']:10,.0f}, "
              f"{1 / s['to_twin']:.2f} times its dense twin's")
    return found


class Steady:
    """The training of one arm as train.py does it, when all that is annealed has come to its end; a call is
    a few steps."""

    def __init__(self, cfg, data, shape, arm):
        behind, wider, self.row = SHAPES[shape]
        said = settings(cfg.config, arm)         # what a mechanism sizes stays as it is: dendrites' heads
        keys = key_defaults() | said | {key: behind[key] for key in behind.keys() - owned(said)}
        keys |= {key: wider * keys[key] for key in WIDENED}
        keys |= {"vocab_size": datasets.meta_of(data)["vocab_size"]}
        self.keys = SimpleNamespace(**keys)
        self.model = GPT(GPTConfig(**{key: keys[key] for key in model_defaults()}), seed=1337)
        self.model.anneal(1.0)
        self.model.train().compute_dtype = runtime.choose("cpu").dtype
        self.optimizer = optimizers.build(self.model, self.keys, "cpu")
        self.clipped = optimizers.by_clipping(self.model)
        stream = datasets.TokenStream(data, "train", keys["block_size"], keys["batch_size"], seed=1337)
        self.batches = [stream.batch(k) for k in range(self.row)]
        self.tokens = keys["block_size"] * keys["batch_size"]

    def __call__(self):
        for batch in self.batches:
            self.learn(batch)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def learn(self, batch):
        """The gradients of a batch."""
        self.model(*batch)[1].backward()
        self.model.regularise()
        for part in self.clipped:
            torch.nn.utils.clip_grad_norm_(part, self.keys.grad_clip).item()

    def products(self):
        """Floating-point operations of the matrix products of a batch, forward and backward."""
        with FlopCounterMode(display=False) as counted:
            self.learn(self.batches[0])
        self.optimizer.zero_grad(set_to_none=True)
        return counted.get_total_flops()
