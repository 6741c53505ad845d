"""The sparse products alone: bytes and roofline computed from shapes; the kernels timed on weights that no
cache holds, beside dense F.linear and torch.sparse."""
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F

import sparse_kernels
from benchmarks import Bench
from benchmarks.timing import interleave, measurement, times_better
from configurator import require
from decode import engine
from training import runtime

# GB/s of memory, from the vendors' data sheets
CARDS = {"RTX 3070": 448, "RTX 3090": 936, "RTX 4090": 1008, "RTX 5090": 1792, "A100": 2039, "H100": 3350,
         "H200": 4800}
DENSE = "F.linear"


@dataclass(frozen=True)
class Kernels(Bench):
    """Sparse products alone: bytes and ceilings by shape; GB/s and ratios to F.linear and torch.sparse."""
    sizes: str = "768x768,3072x768,768x3072,4096x4096,8192x8192"  # matrices OUTPUTSxINPUTS, by commas
    mlps: str = "768,4096"  # widths of a gated MLP of four times as many units, by commas
    batches: str = "1,4,8"  # tokens at a time, by commas
    share: float = 0.1  # of the units that a token opens in the gated MLP, in groups of 32
    device: str = "auto"  # auto, cpu, cuda, cuda:0
    dtype: str = "auto"  # auto, float32, bfloat16, float16
    threads: int = 1  # CPU threads; more than one collapse where the machine is shared

    def __post_init__(self):
        super().__post_init__()
        for key in ("mlps", "batches"):
            require(all(n.isdigit() and int(n) > 0 for n in getattr(self, key).split(",")),
                    f"{key}='{getattr(self, key)}' must be numbers above 0, by commas")
        shapes = [size.split("x") for size in self.sizes.split(",")]
        require(all(len(shape) == 2 and all(n.isdigit() and int(n) > 0 for n in shape)
                    and int(shape[1]) % 4 == 0 for shape in shapes),
                f"sizes='{self.sizes}' must be OUTPUTSxINPUTS by commas, inputs multiples of 4: type "
                "--sizes=768x768")
        require(0 < self.share <= 1, f"share={self.share} must be in (0, 1]")


def kernels(cfg):
    place = runtime.choose(cfg.device, cfg.dtype, False)
    print(f"{place}, {sparse_kernels.path_taken(place.device)}")
    shapes = [tuple(map(int, size.split("x"))) for size in cfg.sizes.split(",")]
    widths, batches = ([int(n) for n in text.split(",")] for text in (cfg.mlps, cfg.batches))
    computed = [*map(partial(linear_row, place.dtype), shapes),
                *(gated_row(place.dtype, width, batch, cfg.share) for width in widths for batch in batches)]
    tell_computed(computed)
    copied, results = bandwidth(cfg, place), {}
    print(f"copy of 512 MiB, measured: {copied:.1f} GB/s, read and written")
    for N, K in shapes:
        for batch in batches:
            title, sides = f"2:4 {N}x{K}, batch {batch}", linear_sides(place, N, K, batch)
            results[title] = timed(cfg, place, title, sides, linear_row(place.dtype, (N, K)), copied)
    for width in widths if place.device.type == "cuda" else ():
        for batch in batches:
            title, sides = f"gated MLP {width}, batch {batch}", gated_sides(place, width, batch, cfg.share)
            row = gated_row(place.dtype, width, batch, cfg.share)
            results[title] = timed(cfg, place, title, sides, row, copied)
    return {"computed": computed, "copy_GB_per_s": copied, "measurements": results, "place": str(place),
            "kernels": sparse_kernels.path_taken(place.device), "seeds": [0]}


# ------------------------------------------------ computed --------------------------------------------------

def linear_row(dtype, shape):
    """Bytes of one product of a dense matrix and of the packed one, and the ratio: the roofline of decode."""
    N, K = shape
    dense, words = N * K * dtype.itemsize, -(-K // 32)
    packed = N * words * (16 * dtype.itemsize + 4)
    return row_of("2:4", f"{N}x{K}", dense, packed)


def gated_row(dtype, width, batch, share):
    """The same of an MLP of 4 * width units of which each of `batch` tokens opens a share on its own: the
    rows that any of them opens are read, 1 - (1 - share)^batch of all."""
    dense = 8 * width * width * dtype.itemsize
    return row_of("gated", f"{width}/{4 * width}, batch {batch}", dense,
                  round(dense * (1 - (1 - share) ** batch)))


def row_of(op, size, dense, sparse):
    us = {card: sparse / speed / 1e3 for card, speed in CARDS.items()}
    return {"op": op, "size": size, "dense_bytes": dense, "bytes": sparse, "ceiling": dense / sparse,
            "us_at_data_sheet_bandwidth": us}


def tell_computed(rows):
    print("computed from shapes, not measured: bytes of weights, the most that fewer bytes can gain, us at "
          "each card's data-sheet bandwidth")
    for row in rows:
        us = ", ".join(f"{card} {t:.1f}" for card, t in row["us_at_data_sheet_bandwidth"].items())
        print(f"  {row['op']:6}{row['size']:20}{row['dense_bytes'] / 2**20:9.2f} -> "
              f"{row['bytes'] / 2**20:8.2f} MiB  {row['ceiling']:5.2f}x  {us}")


# ------------------------------------------------ measured --------------------------------------------------

def beyond_cache(device):
    """Bytes of weight copies that one round goes through: four times the last cache."""
    if device.type == "cuda":
        return 4 * torch.cuda.get_device_properties(device).L2_cache_size
    return 256 * 2**20


def bandwidth(cfg, place):
    """GB/s, read and written, of a large copy."""
    source = torch.empty(2**28, dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    seconds = interleave({"copy": lambda: target.copy_(source)}, cfg.repeats, device=place.device)["copy"]
    return 2 * source.nbytes / sorted(seconds)[len(seconds) // 2] / 1e9


def linear_sides(place, N, K, batch):
    """{side: one function a copy of the weights} of a product of `batch` tokens."""
    copies = max(2, -(-beyond_cache(place.device) // (N * K * place.dtype.itemsize // 2)))
    make = torch.Generator().manual_seed(0)
    x = torch.randn(1, batch, K, generator=make).to(place.device, place.dtype)
    base = sparse_kernels.prune_24(torch.randn(N, K, generator=make)).to(place.device, place.dtype)
    dense = [base.clone() for _ in range(copies)]
    first = sparse_kernels.pack_24(base)
    packed = [tuple(part.clone() for part in first) for _ in range(copies)]
    sides = {DENSE: [partial(F.linear, x, w) for w in dense],
             "2:4": [partial(sparse_kernels.linear_24, x, *pair) for pair in packed]}
    if (place.device.type == "cpu" and batch <= engine.ROWS and place.dtype in engine.KINDS
            and sparse_kernels.cpu_library()[0]):
        sides["dense, C"] = [product(x, lambda p, w=w: p.matrix(w)) for w in dense]
        sides["2:4"] = [product(x, lambda p, pair=pair: p.packed(*pair, None, K)) for pair in packed]
    if sparse_kernels.has_sparse_products(x, N):
        sides["torch.sparse"] = [partial(F.linear, x[0], torch.sparse.to_sparse_semi_structured(w))
                                 for w in dense]
    gpu = sparse_kernels.triton_kernels() if place.device.type == "cuda" else None
    if (gpu and gpu.multiplies_sparse(place.device) and place.dtype in gpu.HALVES
            and 1 < batch <= gpu.MOST_ROWS):
        for form in ("mma_24", "gemm_24"):
            sides[form] = [partial(gpu.linear_24, x, *pair, None, None, "none", form) for pair in packed]
    return sides


def product(x, matrix):
    """A decode program that multiplies the tokens x (1, batch, K); matrix(program) -> the weights as it reads
    them."""
    return engine.Alone(lambda p, x: p.linear(x, matrix(p)), x[0], 1)


def gated_sides(place, width, batch, share):
    """The same of a whole MLP, dense or with groups of 32 units that each token chooses."""
    copies, units = max(2, -(-beyond_cache(place.device) // (width * width))), 4 * width
    make = torch.Generator().manual_seed(0)
    x = torch.randn(batch, width, generator=make).to(place.device, place.dtype)
    count = max(1, round(share * units / 32))
    groups = torch.stack([torch.randperm(units // 32, generator=make)[:count] for _ in range(batch)])
    groups = groups.to(place.device)
    weights = [[torch.randn(units, width, device=place.device, dtype=place.dtype) / width ** 0.5
                for _ in range(2)] for _ in range(copies)]
    return {DENSE: [partial(dense_mlp, x, *pair) for pair in weights],
            "gated": [partial(gated_mlp, x, *pair, groups) for pair in weights]}


def dense_mlp(x, up, down):
    return F.linear(F.relu(F.linear(x, up)).square(), down.t())


def gated_mlp(x, up, down, groups):
    a = sparse_kernels.gathered_up(x, up, None, groups, None, 32, "relu2")
    return sparse_kernels.gathered_down(a, down, None, groups, 32)


def timed(cfg, place, title, sides, row, copied):
    """Each side goes once through all its copies, on CUDA as one graph -> the record's measurement."""
    runs = {name: through(place.device, calls) for name, calls in sides.items()}
    seconds = interleave(runs, cfg.repeats, device=place.device)
    result = measurement("us", {name: [1e6 * s / len(sides[name]) for s in values]
                                for name, values in seconds.items()})
    result["against"] = {base: times_better(result["sides"], base)
                         for base in (DENSE, "torch.sparse") if base in result["sides"]}
    print(f"{title}, us: median (min to max); times {DENSE}; GB/s of weights, share of the copy's")
    for name, s in result["sides"].items():
        bytes_read = row["bytes"] if name in ("2:4", "mma_24", "gemm_24", "gated") else row["dense_bytes"]
        s["GB_per_s"] = bytes_read / s["median"] / 1e3
        print(f"  {name:14}{s['median']:9.1f} ({s['min']:.1f} to {s['max']:.1f})"
              f"{result['against'][DENSE][name]:7.2f}x{s['GB_per_s']:9.1f}  {s['GB_per_s'] / copied:.0%}")
    return result


def through(device, calls):
    """-> a function that makes all calls; on CUDA a recorded graph, so that launches cost what they must."""
    @torch.inference_mode()
    def run():
        for call in calls:
            call()

    if device.type != "cuda":
        return run
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
