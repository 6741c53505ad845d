"""Where a run computes and in which precision: chosen once, printed once, the same for every script."""
import ctypes
import math
import os
import platform
import shutil
import stat
import sys
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec

import torch
import torch.distributed as dist

from configurator import ConfigError, require
from kernels.build import cpu_library
from sparse_kernels import NATIVE_BF16

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# dense bf16 peak (fp16 before Ampere), fp32 accumulation, FLOP/s, from the vendor's data sheets;
# the first name that fits wins
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
    "L40": 181e12, "L4": 121e12, "A10G": 70e12, "V100": 112e12, "T4": 65e12,
    "RTX 5090": 209e12, "RTX 5080": 113e12, "RTX 5070 Ti": 88e12, "RTX 5070": 62e12,
    "RTX 4090": 165e12, "RTX 4080": 97e12, "RTX 4070 Ti": 80e12, "RTX 4070": 58e12, "RTX 4060": 30e12,
    "RTX 3090": 71e12, "RTX 3080": 60e12, "RTX 3070": 41e12, "RTX 3060": 25e12,
}


@dataclass(frozen=True)
class Runtime:
    """Device, dtype of the matmuls, compile or not, and why."""
    device: torch.device
    dtype: torch.dtype
    compile: bool
    reasons: str

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        return f"device {self.device}, {dtype}" + ", compiled" * self.compile


def choose(device="auto", dtype="auto", compile="auto", decodes=False):
    """Resolve 'auto' to what this machine does best; a choice that cannot work here is a ConfigError.
    decodes: token after token, where a CPU reads weights in bf16 twice as fast as in fp32."""
    device, why_device = choose_device(device)
    dtype, why_dtype = choose_dtype(dtype, device, decodes)
    compile, why_compile = choose_compile(compile, device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return Runtime(device, dtype, compile, "; ".join((why_device, why_dtype, why_compile)))


def choose_device(name):
    if name == "auto":
        found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(found), f"{found} is the fastest device found"
    try:
        device = torch.device(name)
    except RuntimeError:
        require(False, f"device='{name}' is not a device: type --device=cpu, cuda, cuda:0 or mps")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    require(there.get(device.type, False),
            f"device='{name}' is not on this machine: type --device=auto or --device=cpu")
    require(device.type != "cuda" or (device.index or 0) < torch.cuda.device_count(),
            f"device='{name}': this machine has {torch.cuda.device_count()} CUDA device(s), "
            "counted from cuda:0")
    return device, "device as asked"


def native_bf16(device):
    """Does the hardware multiply bf16 itself? Emulated bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and NATIVE_BF16


def choose_dtype(name, device, decodes=False):
    if name == "auto":
        if native_bf16(device):
            return torch.bfloat16, "bf16 is native here"
        if decodes and device.type == "cpu" and cpu_library()[0] is not None:
            return torch.bfloat16, "bf16 is half the bytes to read"
        return ((torch.float16, "no native bf16, so fp16") if device.type == "cuda"
                else (torch.float32, "no native bf16"))
    require(name in DTYPES, f"dtype='{name}' must be auto, {', '.join(DTYPES)}")
    require(name != "float16" or device.type == "cuda",
            f"dtype='float16' needs a CUDA device, this run is on {device.type}: "
            "type --dtype=float32 or --dtype=auto")
    tf32 = ", its matmuls in TF32" if name == "float32" and device.type == "cuda" else ""
    return DTYPES[name], "dtype as asked" + tf32


# mallopt(3): what is freed at the heap's end stays, the heap grows by 64 MiB, nothing is mapped apart
KEEP = {-1: -1, -2: 64 << 20, -4: 0}


def keep_freed_memory():
    """Ask glibc to keep the memory that a step of training on a CPU frees: it gives large pieces back, and
    for the next step the kernel clears them page by page. True where that was done; elsewhere nothing is."""
    try:
        mallopt = ctypes.CDLL(None).mallopt      # Windows and macOS have none, musl's libc has none either
    except (AttributeError, OSError, TypeError):
        return False
    return all([mallopt(key, value) for key, value in KEEP.items()])


def peak_flops(device):
    """The device's peak FLOP/s in bf16 (fp16 before Ampere), or None where it is not in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)


def check_compile(wanted):
    """The values that every script's compile key takes."""
    require(wanted in (True, False, "auto"),
            f"compile='{wanted}' must be auto, True or False: type --compile=auto")


def choose_compile(wanted, device):
    if wanted != "auto":
        require(not wanted or device.type != "cpu" or compiler_hint() is None, compiler_hint())
        return wanted, "compile as asked"
    if device.type != "cuda":
        return False, f"eager: on {device.type} compiling costs more than a short run gets back"
    if find_spec("triton") is None:
        return False, f"eager: no triton on this {platform.system()}"
    return True, "triton is here"


@dataclass(frozen=True)
class World:
    """The processes of one run; a single process is a world of one. Start several with torchrun."""
    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def master(self):
        """The rank that prints and writes."""
        return self.rank == 0

    def sum(self, values):
        """Element-wise sum over the ranks of a list of floats."""
        if self.size == 1:
            return values
        backend_device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor(values, dtype=torch.float64, device=backend_device)
        dist.all_reduce(total)
        return total.tolist()

    def add_up(self, tensors):
        """Replace each tensor by its sum over the ranks."""
        for tensor in tensors if self.size > 1 else ():
            dist.all_reduce(tensor)

    def restarted(self):
        """Has torchrun started any process of this launch again? A host that has come back counts from zero,
        so one rank's own count does not say."""
        return self.sum([float(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))])[0] > 0

    def require_same(self, value, sentence, what):
        """A ConfigError on every rank unless all have the same value; sentence has a {} for it, what names
        the folders that the hosts must share."""
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        other = next((rank for rank in range(self.size) if found[rank] != found[0]), 0)
        first, second = (sentence.format(found[rank]) for rank in (0, other))
        require(not other, f"rank 0 {first}, rank {other} {second}: all hosts must see the same {what}")

    def by_master(self, work, *words):
        """Let the master do what one process does for all -> its result, None on the others. Where that is a
        ConfigError all of them end with it: none waits for a master that has gone."""
        found, mistake = None, None
        if self.master:
            try:
                found = work(*words)
            except ConfigError as error:
                mistake = error
        if self.sum([float(mistake is not None)])[0]:
            if self.master:
                raise mistake
            leave(self, 2)
        return found

    def barrier(self):
        if self.size > 1:
            dist.barrier()

    def close(self):
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def join_world(backend, device):
    """Join the process group that torchrun describes in the environment -> (World, this rank's device)."""
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys():
        return World(), device
    world = World(*(int(os.environ[key]) for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if cuda:
        device = f"cuda:{world.local_rank}"
        choose_device(device)
        torch.cuda.set_device(device)
    if not cuda and world.size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", world.size))))
    limit, hook = timedelta(minutes=10), sys.excepthook
    dist.init_process_group(backend if cuda else "gloo", timeout=limit, **meeting_place(world, limit))
    sys.excepthook = hook                           # torch's own swallows what ours says before it exits
    return world, device


def meeting_place(world, limit):
    """Keywords of init_process_group: nothing without torchrun's own store; with it, a part of the store for
    this attempt alone. The agent keeps one store over all restarts, and processes that start again would wait
    there for the addresses of dead ones (torch 2.15: past any timeout)."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    if world.size > int(os.environ.get("LOCAL_WORLD_SIZE", world.size)):        # several hosts, one store
        require(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0",
                "several hosts and --max-restarts: torchrun's shared store keeps a host that comes back "
                "waiting; type TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun ... on every host")
        return {}
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world.size,
                          is_master=False, timeout=limit)
    attempt = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    return dict(store=attempt, rank=world.rank, world_size=world.size)


def leave_lost_terminals():
    """Behind a SIGHUP: what would go to a terminal that has hung up goes nowhere. Writing there is an error,
    and a run that ends has more to do than to print."""
    for number in (1, 2):
        try:
            lost = stat.S_ISCHR(os.fstat(number).st_mode) and not os.isatty(number)
        except OSError:
            continue
        if lost:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


def leave(world, status):
    """End this process of a run."""
    world.close()
    if not world.master:                            # nothing to flush, and gloo's threads abort Python's own
        os._exit(status)                            # shutdown now and then (3 of 57 runs, torch 2.15, CPU)
    sys.stdout.flush()
    sys.exit(status)


# -------------------------------------------------- sharded weights -----------------------------------------

def check_sharding(cfg, world, dtype):
    """fsdp=True with what needs whole weights, or runs blocks a number of times that the data decides, is a
    ConfigError."""
    if not cfg.fsdp:
        return
    require(world.size > 1, "fsdp=True splits a model among processes, and this run is one: start it with "
                            "torchrun --standalone --nproc_per_node=N train.py ...")
    require(dtype != torch.float16, f"fsdp=True and dtype={cfg.dtype}, here float16: its gradient scaler "
                                    "wants whole gradients; type --dtype=float32, or leave --fsdp out")
    for key in (key for key in ("tasks", "grow", "ponder") if getattr(cfg, key)):
        require(False, f"fsdp=True and {key}={getattr(cfg, key)}: it needs whole weights or the same blocks "
                       f"on every process; leave --{key} out, or --fsdp")


def shard(model, device):
    """Split every block, and the rest of the model, among the processes: FSDP2 (torch's fully_shard). A block
    is moved to the device as it is split, so no device ever holds the whole model -> the model."""
    from torch.distributed.fsdp import fully_shard
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for p in model.parameters():
        p.data = p.data.contiguous()                # those stored by unit: FSDP2 takes no other layout
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model.to(device)                         # buffers


def is_split(tensor):
    return hasattr(tensor, "full_tensor")


def whole(tree):
    """Lists, tuples and dicts of tensors with every split one put together; all processes must call it."""
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(whole(value) for value in tree)
    return tree.full_tensor() if is_split(tree) else tree


def local(tensors):
    """Of split tensors this process's rows, which share their memory; of others all."""
    return [t.to_local() if is_split(t) else t for t in tensors]


def by_owners(change, matrices, shards):
    """Change whole matrices that are split: each by the process that owns it -> this process's rows of all.

    matrices: split parameters (rows, columns). shards: this process's rows of what is to be changed, shaped
    as they are. change: list of whole matrices -> list of the new ones, of the same dtype. The processes take
    the matrices in turns, the large ones first and those of one shape behind each other, so that all of them
    have about the same work. A matrix crosses the network twice: one all-to-all to the owners, one back.
    """
    mesh = matrices[0].device_mesh
    processes, turns = mesh.size(), sorted(range(len(matrices)), key=lambda i: (-matrices[i].numel(),
                                                                               matrices[i].shape))
    owned = [turns[rank::processes] for rank in range(processes)]
    mine = owned[mesh.get_local_rank()]
    rows = [rows_by_process(len(matrices[i]), processes) for i in mine]
    shapes = [[(rows_of[rank], matrices[i].size(1)) for i, rows_of in zip(mine, rows)]
              for rank in range(processes)]
    sent = exchange([[shards[i] for i in of] for of in owned], shapes, shards[0], mesh.get_group())
    changed = change([torch.cat(parts) for parts in zip(*sent)])
    parts = [matrix.split(rows_of) for matrix, rows_of in zip(changed, rows)]
    back = exchange([[part[rank] for part in parts] for rank in range(processes)],
                    [[shards[i].shape for i in of] for of in owned], shards[0], mesh.get_group())
    found = {i: shard for of, those in zip(owned, back) for i, shard in zip(of, those)}
    return [found[i] for i in range(len(matrices))]


def rows_by_process(rows, processes):
    """How many of a split tensor's rows each process has, as torch.chunk splits: the last may have none."""
    most = -(-rows // processes)
    return [min(most, max(0, rows - rank * most)) for rank in range(processes)]


def exchange(tensors, shapes, like, group):
    """tensors[r] go to process r; those of shapes[r] come from it; of `like`'s dtype, on its device."""
    sizes = [[math.prod(shape) for shape in of] for of in shapes]
    sent = torch.cat([like.new_empty(0), *(t.flatten() for to in tensors for t in to)])
    received = like.new_empty(sum(map(sum, sizes)))
    dist.all_to_all_single(received, sent, list(map(sum, sizes)),
                           [sum(t.numel() for t in to) for to in tensors], group=group)
    pieces = iter(received.split([size for of in sizes for size in of]))
    return [[next(pieces).view(shape) for shape in of] for of in shapes]


def split_state(optimizer):
    """Split a loaded optimizer's moments as their parameters are split."""
    for part in getattr(optimizer, "parts", [optimizer]):
        for p, state in part.state.items():
            for key, value in state.items() if is_split(p) else ():
                if isinstance(value, torch.Tensor) and value.shape == p.shape and not is_split(value):
                    from torch.distributed.tensor import distribute_tensor
                    state[key] = distribute_tensor(value, p.device_mesh, p.placements)


def compiler_hint():
    """None if torch.compile can work on this machine's CPU, else the sentence that says what is missing."""
    if any(shutil.which(name) for name in ("g++", "clang++", "cl", os.environ.get("CXX", ""))):
        return None
    return f"--compile=True needs a C++ compiler on {sys.platform}: install one or type --compile=False"
