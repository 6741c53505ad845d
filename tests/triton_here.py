"""What the tests of Triton kernels share: the kernels, on a GPU or in Triton's interpreter."""
import functools
import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import interpreted as in_interpreter
import pytest
import torch

import sparse_kernels as kernels


def counts(x, n):
    for _ in range(0, n):
        pass


if find_spec("triton") is None:
    pytest.skip("no Triton on this system", allow_module_level=True)
with in_interpreter.by_default():
    import triton
    gpu = kernels.triton_kernels()
    steps = importlib.import_module("kernels.triton_step")
    depth = importlib.import_module("kernels.triton_depth")
    ids_of = importlib.import_module("kernels.triton_draw")
    probe = triton.jit(counts)


def read_one_element():
    """Triton before 3.7 reads a loop's bounds by int() of arrays of one element, which NumPy 2.4 refuses:
    read them as Triton 3.7 does."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())
    interpreter._patch_lang_tensor = patched


if not torch.cuda.is_available() and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
    read_one_element()


def interpreter_fails():
    """The sentence of an interpreter that does not run loops here; "" where it does."""
    try:
        probe[(1,)](torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu"), 3)
    except Exception as error:
        return f"Triton {triton.__version__}'s interpreter does not run loops here: {error}"
    return ""


interpreted = pytest.mark.skipif(bool(interpreter_fails()), reason=interpreter_fails())

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
check = functools.partial(torch.testing.assert_close, equal_nan=False)


def normal(*shape, seed, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


# The architectures that a plain run of the tests compiles for: Ampere, Hopper and Blackwell at home; the slow
# tests compile for all five.
SOME = "86", "90", "120"
compiled_for = pytest.mark.parametrize("architectures", [SOME, pytest.param((), marks=pytest.mark.slow)],
                                       ids=["some", "all"])


def cubins(folder, *words):
    """What tests/cubins.py prints, one dict a kernel, tile and architecture; its cache lies in a folder."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, str(Path(__file__).parent / "cubins.py"), *words], env=env,
                         capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def check_architectures(found, wanted):
    assert {row["architecture"] for row in found} == set(map(int, wanted or (80, 86, 89, 90, 120)))
