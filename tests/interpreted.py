"""Triton's interpreter where there is no card. Triton reads the switch when it is imported, and much imports
it (FlexAttention, torch's counter of FLOPs), so conftest.py imports this first."""
import contextlib
import importlib
import os
from importlib.util import find_spec

import torch


@contextlib.contextmanager
def by_default():
    """Kernels that are made here run in the interpreter, where there is no card."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TRITON_INTERPRET", None)


if find_spec("triton"):
    with by_default():
        for name in ("step", "depth", "draw"):
            importlib.import_module(f"kernels.triton_{name}")
        with contextlib.suppress(ImportError):   # torch imports it late, and it refuses functions made here
            importlib.import_module("triton.experimental.gluon.language")
