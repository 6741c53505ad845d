"""One token through one MLP whose weights no cache holds: every block beside dense F.linear."""
import copy
from dataclasses import dataclass
from functools import partial

import torch

import sparse_kernels
from benchmarks import Bench
from benchmarks.arms import BASE, twin_of
from benchmarks.decode import decoded_blocks
from benchmarks.record import DENSE, DENSE_FP32, TWIN
from benchmarks.timing import interleave, measurement, times_better
from configurator import require
from decode import engine
from decode.context import Choices, Context
from model import GPT, GPTConfig

NO_CONTEXT = Context(slice(0, 1), choices=Choices(predict=True))


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
    """Each side goes once through copies of its weights that no cache holds, with an input each: by the
    decode engine, by F.linear, and by the blocks' own forward."""
    said = sparse_kernels.path_taken(torch.device("cpu"))
    require(sparse_kernels.cpu_library()[0], f"mlp times the decode engine, which does not run here: {said}")
    print(said)
    measurements, work = {}, {}
    arms = sides_of(cfg)
    for width in map(int, cfg.widths.split(",")):
        sides, copies = {}, {}
        for dtype in (torch.bfloat16, torch.float32):
            ending = str(dtype).removeprefix("torch.")
            for arm, flags in arms.items():
                mlps, inputs = cold_mlps(width, flags, dtype, cfg.cold * 2**20)
                name = f"{arm}, {ending}"
                programs = [program_of(*of) for of in zip(mlps, inputs)]
                sides[name], copies[name] = partial(through_programs, programs), len(mlps)
                work[f"{name}, {width}"] = work_of(programs[0])
                if arm == TWIN:
                    name = f"F.linear, {ending}"
                    sides[name], copies[name] = partial(through_linears, mlps, inputs), len(mlps)
                elif dtype == torch.bfloat16:
                    sides[f"{name}, torch alone"] = partial(through, mlps, inputs)
                    copies[f"{name}, torch alone"] = len(mlps)
        us = {name: [1e6 * s / copies[name] for s in values]
              for name, values in interleave(sides, cfg.repeats).items()}
        measurements[f"width {width}"] = result = measurement("us", us)
        result["against"] = {base: times_better(result["sides"], base) for base in (DENSE, DENSE_FP32)}
        result["to_twin"] = to_twin(result["sides"], arms)
        print(f"one token, {width} to {4 * width} to {width}, us: median (min to max); times faster than "
              f"{DENSE} and than {DENSE_FP32}")
        for name, s in result["sides"].items():
            faster = "".join(f"{ratios[name]:8.2f}x" for ratios in result["against"].values())
            print(f"  {name:40}{s['median']:8.1f}  ({s['min']:.1f} to {s['max']:.1f}){faster}")
    kernels = sparse_kernels.path_taken(torch.device("cpu"))
    return {"measurements": measurements, "work": work, "kernels": kernels, "seeds": [0]}


def sides_of(cfg):
    """{arm: flags}: the blocks and, first, the dense twin of all of them."""
    blocks = {name: BASE | flags for name, flags in decoded_blocks(cfg.predict, cfg.active).items()}
    [twin] = {repr(twin_of(flags)): twin_of(flags) for flags in blocks.values()}.values()
    return {TWIN: twin} | blocks


def beside_twins(cfg):
    """(flags, flags of the dense model beside it) of every comparison."""
    sides = sides_of(cfg)
    return [(flags, sides[TWIN]) for name, flags in sides.items() if name != TWIN]


def to_twin(sides, arms):
    """{side: how many times its dense twin's speed, in the same dtype} of every arm's own kernels."""
    return {f"{arm}, {dtype}": sides[f"{TWIN}, {dtype}"]["median"] / sides[f"{arm}, {dtype}"]["median"]
            for arm in arms if arm != TWIN for dtype in ("bfloat16", "float32")}


def cold_mlps(width, flags, dtype, cold):
    """Copies of one MLP, together `cold` bytes, and an input (1, 1, width) for each."""
    config = GPTConfig(n_layer=1, n_head=1, n_embd=width, bias=False, vocab_size=1, block_size=1,
                       **flags)
    model = GPT(config, seed=0).eval().to(dtype).use_policy()
    copies = max(2, cold // (8 * width * width * dtype.itemsize))
    mlps = [copy.deepcopy(model.transformer.h[0].mlp) for _ in range(copies)]
    return mlps, torch.randn(copies, 1, 1, width, generator=torch.Generator().manual_seed(0)).to(dtype)


@torch.inference_mode()
def program_of(one, x):
    """An MLP as a decode program, added to a stream of zeros, for one token x (1, 1, C)."""
    zeros = torch.zeros_like(x[0])
    return engine.Alone(lambda p, x: one.emit(p, x, onto=p.embed(p.matrix(zeros))), x[0], x.size(-1),
                        Choices(predict=True))


def through_programs(programs):
    for program in programs:
        program()


@torch.inference_mode()
def through(mlps, inputs):
    """Their forward, which computes every unit."""
    for one, x in zip(mlps, inputs):
        one(x, NO_CONTEXT)


@torch.inference_mode()
def through_linears(mlps, inputs):
    """The dense MLP as PyTorch alone computes it."""
    linear, relu = torch.nn.functional.linear, torch.nn.functional.relu
    for one, x in zip(mlps, inputs):
        linear(relu(linear(x, one.c_fc.weight)).square(), one.c_proj.weight)


def work_of(program):
    """Multiply-adds of weights and bytes of weights of one call, as its program counts them."""
    return dict(zip(("macs", "bytes"), program.counted()))
