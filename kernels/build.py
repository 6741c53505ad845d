"""The C kernels: compiled by the machine's own compiler at first use and kept in the user's cache folder.

NANOCORTEX_KERNELS=off leaves them out. NANOCORTEX_CFLAGS adds flags for the compiler behind ours, such as
-march=x86-64-v3 (AVX2) or -fsanitize=address,undefined; libraries of other flags are kept apart.
"""
import ctypes
import errno
import functools
import hashlib
import importlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

SOURCES = [Path(__file__).with_name(name)
           for name in ("cpu.c", "cpu_typed.c", "train_typed.c", "step.c")]
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


@functools.cache
def cpu_library():
    """-> (the compiled kernels or None, the sentence that says which path is taken). Built once a machine."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if os.environ.get("NANOCORTEX_KERNELS") == "off":
        return None, "C kernels off (NANOCORTEX_KERNELS=off)"
    if sys.platform != "linux" or compiler is None:
        missing = "no C compiler" if sys.platform == "linux" else f"not on {platform.system()} yet"
        return None, f"no C kernels: {missing}"
    try:
        library, anew = compiled(compiler)
    except subprocess.SubprocessError as error:
        return None, f"no C kernels: {compiler} did not build them ({type(error).__name__})"
    except OSError as error:
        return None, f"no C kernels: they could not be built or loaded ({error})"
    for call in (library.step, library.follow, library.step_and_follow):
        call.argtypes = [ctypes.c_void_p]
    for call in (library.whole_products, library.whole_rows_sum):
        call.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long, ctypes.c_int]
    library.whole_to_bf16.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int]
    for call in (library.scale_sums, library.in_digits):
        call.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 2 + [ctypes.c_int]
    library.rows_of_copy.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 2 + [ctypes.c_int]
    library.draw.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 2
    library.uniform.argtypes, library.uniform.restype = [ctypes.c_uint64] * 3, ctypes.c_double
    for name in NAMES.values():
        pointer, number = ctypes.c_void_p, ctypes.c_long
        getattr(library, f"osc_{name}").argtypes = [pointer] * 5 + [number] * 2 + [ctypes.c_int]
        getattr(library, f"osc_back_{name}").argtypes = [pointer] * 8 + [number] * 2 + [ctypes.c_int]
        getattr(library, f"unpack24_{name}").argtypes = [pointer] * 3 + [number] * 3 + [ctypes.c_int]
        getattr(library, f"copy8_{name}").argtypes = [pointer] * 4 + [number] * 2 + [ctypes.c_int]
        getattr(library, f"norm_{name}").argtypes = ([pointer] * 4 + [number] * 4
                                                     + [ctypes.c_float, ctypes.c_int])
        for kernel, pointers, numbers, flags in (
                ("fire", 3, 4, 2), ("fire_back", 4, 2, 2), ("winners", 2, 3, 1), ("event", 4, 2, 2),
                ("event_back", 6, 2, 2),
                ("scale", 3, 3, 2), ("scale_back", 5, 3, 2), ("miss", 4, 2, 1), ("miss_back", 3, 2, 1),
                ("relu2", 2, 1, 1), ("relu2_back", 3, 1, 1), ("norm_back", 6, 4, 1),
                ("gates", 5, 3, 1), ("gates_back", 6, 2, 1), ("rotate", 4, 7, 2)):
            getattr(library, f"{kernel}_{name}").argtypes = ([pointer] * pointers + [number] * numbers
                                                             + [ctypes.c_int] * flags)
    return library, "C kernels for decode steps" + anew


def compiled(compiler):
    """-> (the library in the user's cache, keyed by source, compiler and processor; ""). Where that folder
    cannot be used: (the one in a temporary folder, the words that say so)."""
    # no-trapping-math: nobody reads the flags of exceptions, and a choice between two sums becomes a vector
    flags = ["-O3", "-march=native", "-fPIC", "-std=gnu11", "-ffp-contract=fast", "-fno-trapping-math",
             "-Wall", "-Wextra", *shlex.split(os.environ.get("NANOCORTEX_CFLAGS", ""))]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        processor = platform.machine()
    text = [path.read_text(encoding="utf-8") for path in SOURCES]
    key = hashlib.sha256("\n".join((*text, compiler, *flags, processor)).encode()).hexdigest()[:16]
    failures = []
    for folder in (users_cache, users_temporary):
        try:
            path = folder() / f"cpu_{key}.so"
            if not intact(path):
                build(compiler, flags, path)
            library = ctypes.CDLL(str(path))
            return library, "".join(f", kept in {path.parent} (the user's cache folder: {reason(error)})"
                                    for error in failures)
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:    # RuntimeError: no home
            failures.append(error)
    raise failures[-1]


def users_cache():
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanocortex"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def users_temporary():
    """A folder that no other user can have put a library into."""
    folder = Path(tempfile.gettempdir(), f"nanocortex-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if (found.st_uid, found.st_mode & 0o077) != (os.getuid(), 0):              # a link's mode is 0o777
        raise PermissionError(errno.EPERM, "not this user's alone", str(folder))
    return folder


def reason(error):
    return getattr(error, "strerror", None) or type(error).__name__


def build(compiler, flags, path):
    """Write the library, and behind it the hash that `intact` looks for. Processes may do so at once."""
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        unit, library = (Path(work) / name for name in ("kernels.o", "kernels.so"))
        run = functools.partial(subprocess.run, check=True, capture_output=True, timeout=600)
        run([compiler, *flags, "-fopenmp", "-c", str(SOURCES[0]), "-o", str(unit)])
        libraries = "-lm", "-lpthread"                                           # OpenMP: PyTorch's
        run([compiler, *flags, "-shared", str(unit), "-o", str(library), *libraries])
        content = library.read_bytes()
        library.write_bytes(content + hashlib.sha256(content).digest())
        os.replace(library, path)


def intact(path):
    """Is this a library that `build` has finished? A cut one would end the process when it is called."""
    content = path.read_bytes() if path.exists() else b""
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


@functools.cache
def triton_kernels():
    """The module of that name, or None where there is no Triton (Windows, MPS)."""
    return importlib.import_module("kernels.triton_kernels") if find_spec("triton") else None
