"""Compile every Triton kernel in every tile for every GPU it is meant for, on a machine without one, and
print what the machine code uses: a JSON line for each.

    python tests/cubins.py [step [every]] [ARCHITECTURE...]

step: the kernels of a decode step in a few forms of theirs, and with `every` in every form. Without
architectures: all, 80 86 89 90 120.
"""
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
kernels = importlib.import_module("kernels.triton_kernels")
steps = importlib.import_module("kernels.triton_step")
depth = importlib.import_module("kernels.triton_depth")
ids_of = importlib.import_module("kernels.triton_draw")
warnings.filterwarnings("ignore", category=UserWarning, module="triton")

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 86, 89, 90, 120)
TWICE = (86, 90)                                 # also in fp16, and with units chosen one by one
OPTIONS = ("num_warps", "num_stages")
ALIGNED = ("N", "K", "C", "stride", "copy_stride", "V")    # sizes that a model's are multiples of 16 in
# What must be in the machine code of each kernel: 16-byte loads from memory (LDG, or LDGSTS into shared
# memory), and what multiplies.
EXPECTED = {"gemv_24": "FFMA", "gemm_24": "HMMA|HGMMA", "mma_24": r"HMMA\.SP", "up_kernel": "FFMA",
            "down_kernel": "FFMA", "largest_kernel": "SETP", "step product_kernel": "FFMA",
            "step attend_kernel": "FFMA", "step down_kernel": "FFMA",
            "step embed_kernel": "FADD|FFMA|HADD|HFMA", "step draw_kernel": "SETP",
            "step sift_kernel": "SETP", "step leave_kernel": "FFMA", "step halt_kernel": "FFMA",
            "step input_kernel": "FMUL|FFMA", "step mix_kernel": "FFMA",
            "step group_kernel": "FADD|FFMA|HADD|HFMA", "step spread_kernel": "FADD|FFMA|HADD|HFMA"}
WIDE = r"LDG\.E[.A-Z0-9]*\.128|LDGSTS\.E[.A-Z0-9]*\.128"


def jobs(architectures):
    """(kernel's name, architecture, 16-bit type, constants, options) of every tile."""
    for arch in architectures:
        for half in ("bf16", "fp16")[:1 + (arch in TWICE)]:
            packed = dict(ACT="relu2", BIAS=True, ONTO=True)
            for tile in kernels.GEMV_TILES:
                yield "gemv_24", arch, half, packed, tile
            for tile in kernels.GEMM_TILES:
                yield "gemm_24", arch, half, packed | dict(EXACT=False), tile
            for tile in kernels.MMA_TILES:
                yield "mma_24", arch, half, packed | dict(KIND={"bf16": "bf16", "fp16": "f16"}[half]), tile
        for width in (96, 1)[:1 + (arch in TWICE)]:
            gathered = dict(WIDTH=width, GROUPED=True)
            for tile in kernels.UP_TILES:
                yield "up_kernel", arch, "bf16", gathered | dict(ACT="gelu", BIAS=True, SCALE=True), tile
            for tile in kernels.DOWN_TILES:
                yield "down_kernel", arch, "bf16", gathered, tile
        for keep, width in ((True, 4096), (False, 4096), (False, 64)):
            yield "largest_kernel", arch, "bf16", dict(KEEP=keep, BLOCK=width), dict(num_warps=8)


# products of chosen units, and products whose last program chooses
CHOOSING = {
    "gates": dict(INPUT="layernorm", gates="*fp32", width="i32"),
    "screen": dict(INPUT="layernorm", COPY=4, copy="*u8", copy_scale="*i16", copy_stride="i32", edge="fp32"),
    "screen in 8": dict(INPUT="layernorm", COPY=8, copy="*i8", copy_scale="*fp32", copy_stride="i32",
                        edge="fp32"),
    "largest": dict(INPUT="layernorm", CHOICE="largest", arrived="*i32", best="i32"),
    "choose": dict(INPUT="plain", CHOICE="choose", gain=None, shift=None, arrived="*i32", best="i32",
                   picked="*fp32", scores="*bf16", M="i32"),
    "columns": dict(INPUT="join", CHOICE="columns", ROUTE="layernorm", arrived="*i32", best="i32",
                    picked="*fp32", router="*bf16", scores="*bf16", inhibits="*fp32", balance="*bf16",
                    M="i32"),
    "experts": dict(INPUT="join", CHOICE="experts", ROUTE="rmsnorm", arrived="*i32", best="i32",
                    picked="*fp32", router="*bf16", scores="*bf16", M="i32"),
    "branches": dict(INPUT="layernorm", CHOICE="branches", arrived="*i32", best="i32", picked="*fp32",
                     scores="*bf16", M="i32"),
    "alike": dict(INPUT="rmsnorm", gates="*bf16", width=1, ALIKE=True),
    "events": dict(INPUT="rmsnorm", edges="*fp32"), "osc": dict(INPUT="layernorm", waves="*bf16")}


GROUPS = "columns", "experts", "branches"


def some_choosing():
    """(bits, rows, (name, form)) of CHOOSING, some of all."""
    return [(bits, rows, (name, CHOOSING[name])) for bits, rows, name in (
        (16, 1, "screen"), (8, 8, "screen"), (16, 8, "screen in 8"), (16, 1, "gates"), (16, 8, "columns"),
        (16, 1, "experts"), (16, 8, "largest"), (4, 8, "choose"), (16, 1, "alike"), (16, 8, "events"),
        (16, 1, "osc"), (16, 1, "branches"))]


def of_choice(rows, absent):
    """Constants of a product that chooses nothing, or of `rows` rows: a size of 1 is a constant to Triton."""
    nothing = ("places", "gates", "copy", "copy_scale", "arrived", "router", "scores", "picked", "inhibits",
               "balance", "waves", "edges", "width", "copy_stride", "edge", "M", "best", "live", "always",
               "fold", "length")
    return dict.fromkeys((*nothing, *absent)) | dict(
        COPY=0, ROUTE="", CHOICE="", ALIKE=False, BM=1, BT=1, BLOCK=1) | (dict(R=1) if rows == 1 else {})


def jobs_of_a_step(architectures, every=False):
    """The same of the kernels of a decode step."""
    some = {("layernorm", "gelu", 1), ("rmsnorm", "silu", 2), ("join", "none", 8)}
    whole = {16: some, 8: {("join", "none", 8)}, 4: {("layernorm", "gelu", 8)}, 5: {("rmsnorm", "silu", 1)},
             -16: {("layernorm", "gelu", 1)}, -8: {("join", "none", 8)}}                # below 0: 2:4
    forms = {(kind, act, rows) for kind in ("layernorm", "rmsnorm") for rows in (1, 2, 4, 8)
             for act in ("none", "gelu", "gelu_tanh", "relu2", "silu")}
    forms |= {(kind, "none", rows) for kind in ("plain", "join") for rows in (1, 2, 4, 8)}
    for arch in architectures:
        for half in ("bf16", "fp16", "fp32") if every else ("bf16",):
            for bits, kind, act, rows in sorted((each, *form) for each in whole
                                                for form in (forms if every else whole[each])):
                gated, joins = act == "silu", kind == "join"
                tile = steps.product_tile(rows, 10 ** 6, 4096, gated, joins, 1)
                absent = (() if joins else ("marks",)) + ("cap",) + (
                    ("gain", "shift") if kind in ("plain", "join") else ())
                form = dict(INPUT=kind, ACT=act, GATED=gated, D=64, BITS=abs(bits)) | of_choice(rows, absent)
                form |= dict(places="*i32") if bits < 0 else {}
                yield "step product_kernel", arch, half, form, tile
            for bits, rows, (name, form) in itertools.product(
                    (16, 8, 4), (1, 2, 4, 8), CHOOSING.items()) if every else some_choosing():
                kind = form["INPUT"]
                tile = steps.product_tile(rows, 10 ** 6, 4096, name == "largest", True, 1)
                act = "relu2" if kind == "layernorm" else "none"
                form = dict(ACT=act, GATED=False, D=64, BITS=bits) | form
                choice = steps.choice_tile(rows, 768, 64 if name in GROUPS else 4096)
                absent = ("cap",) if kind == "join" else ("cap", "marks")
                yield "step product_kernel", arch, half, of_choice(rows, absent) | choice | form, tile
            for rows, bits in itertools.product((1, 2, 4, 8), (16, 8, 4)) if every else (
                    (1, 16), (8, 16), (8, 8), (1, 4)):
                for everything, group in ((False, 0), (True, 0), (False, 4))[:1 + 2 * every]:
                    form = dict(ALL=everything, BITS=bits, GROUP=group) | (
                        dict(R=1, edges=None) if rows == 1 else {}) | ({} if bits < 16 else dict(across=None))
                    form |= dict(live=None) if bits < 16 else {}
                    yield "step down_kernel", arch, half, form, steps.down_tile(rows, 3072, 768, 132)[0]
            for width in (64, 32, 128) if every else (64,):
                for one in ({}, dict(R=1, H=1, G=1))[:1 + every]:
                    for live in (dict(LEFT=False, live=None, gates=None, branch=None),
                                 dict(LEFT=True, gates="*fp32"))[:1 if one else 2]:
                        yield ("step attend_kernel", arch, half, dict(NORM=True) | one | live,
                               steps.attend_tile(width))
            for vocabulary, many in ((50304, True), (31, True), (50304, False))[:1 + 2 * every] if (
                    half == "bf16") else ():
                tile, tile_of_draw = ids_of.draw_tiles(vocabulary)
                for form in (dict(GREEDY=False, TOP_K=many), dict(GREEDY=True, TOP_K=False, seen=None)):
                    yield "step sift_kernel", arch, half, form, tile
                for top_p in (True, False)[:1 + every]:
                    form = dict(TOP_K=many, TOP_P=top_p) | (dict(seen=None) if many else {})
                    yield "step draw_kernel", arch, half, form, tile_of_draw
            yield from jobs_of_depth(arch, half, every)
            for bits in (16, 8, 4) if every else (16,):
                for form in (dict(ORDER=0, ngrams=None, buckets=1), dict(ORDER=3)):
                    yield "step embed_kernel", arch, half, dict(BC=1024, BITS=bits) | form, dict(num_warps=4)


def jobs_of_depth(arch, half, every):
    """Kernels by which tokens part ways, and a product between them."""
    for kind, act, rows in (("layernorm", "gelu", 1), ("join", "none", 8)):
        form = dict(INPUT=kind, ACT=act, GATED=False, D=64, BITS=16) | of_choice(rows, (
            "cap", *(("gain", "shift") if kind == "join" else ("marks",))))
        form = {key: value for key, value in form.items() if key not in ("live", "always")}
        yield "step product_kernel", arch, half, form, steps.product_tile(rows, 10 ** 6, 4096, False,
                                                                          kind == "join", 1)
    for kind, act, absent in (("join", "gelu", ()), ("rmsnorm", "none", ("gates", "branch", "shift"))):
        form = dict(INPUT=kind, ACT=act, KEEP=kind != "join", D=64, best="i32") | dict.fromkeys(absent)
        form |= dict.fromkeys(("gain", "shift")) | dict(gates="*fp32") if kind == "join" else dict(marks=None)
        yield "step input_kernel", arch, half, form, steps.input_tile(768)
    form = dict(INPUT="plain", ACT="gelu", GATED=False, D=64, BITS=16, fold="i32", length="i32")
    yield ("step product_kernel", arch, half, of_choice(2, ("cap", "marks", "gain", "shift")) | form,
           steps.product_tile(2, 10 ** 6, 768, False, False, 1))
    for form in (dict(ACT="relu2", waves=None), dict(ACT="none"))[:1 + every]:
        yield "step mix_kernel", arch, half, dict(EACH=4, BC=1024) | form, dict(num_warps=4)
    tile = dict(num_warps=4)
    for first in (True, False):
        yield "step leave_kernel", arch, half, dict(FIRST=first, BC=1024), tile
        for last in (False, True)[:1 + every]:
            form = dict(FIRST=first, LAST=last, BC=1024, BD=64) | dict(outer=None)
            yield "step halt_kernel", arch, half, form, tile
    yield "step halt_kernel", arch, half, dict(FIRST=True, LAST=False, BC=1024, BD=32), tile
    for each in (2, 4, 16)[:1 + 2 * every]:
        for name in ("group", "spread"):
            yield f"step {name}_kernel", arch, half, dict(EVERY=each, BC=1024), tile


SIZES = ("M", "N", "K", "C", "n", "k", "words", "chosen", "share", "R", "H", "G", "buckets", "size", "splits",
         "length", "stride", "winners", "V", "seen_stride", "top_k", "always", "depth", "most", "cells", "D",
         "count", "branch", "kv_stride")
POINTERS = dict(values="*i32", meta="*i32", fragments="*i32", places="*i32", groups="*i64", parts="*fp32")
STEP = dict(history="*i64", start="*i64", arrived="*i32", marks="*fp32", edges="*fp32", across="*fp32",
            eps="fp32", scale="fp32", logits="*fp32", seen="*u8", fine="*i32", room="*fp32", some="*fp32",
            ids="*i32", tops="*fp32", most_of="*fp32", about="*i32", key="*i64", temperature="fp32",
            top_p="fp32", min_p="fp32", penalty="fp32", live="*i32", outer="*i32", tokens="*i64",
            layers="*i64", runs="*i64", left="*fp32", ends="*i64", threshold="fp32", epsilon="fp32")
TYPES = "*fp32", "*bf16", "*u8", "*i8", "*i16", "*i32", "i32", "fp32"
WHOLE = {8: ("*i8", "*fp32"), 4: ("*u8", "*i16"), 5: ("*u8", "*i16")}     # weights and scales of so many bits
INPUTS = {"gemv_24": dict(x="*i64"), "mma_24": dict(x="*i32")}


def kernel_of(name):
    homes = (steps, depth, ids_of) if name.startswith("step ") else (kernels,)
    return next(getattr(home, name.split()[-1]) for home in homes if hasattr(home, name.split()[-1]))


def types_of(name, half):
    """The type of every argument, in Triton's words."""
    known = POINTERS | INPUTS.get(name, {}) | dict.fromkeys(SIZES, "i32")
    known |= STEP if name.startswith("step ") else {}
    return {key: known.get(key, f"*{half}") for key in kernel_of(name).arg_names}


def build(job):
    name, arch, half, constants, tile = job
    kernel = kernel_of(name)
    constants = constants | {key: value for key, value in tile.items() if key not in OPTIONS}
    if "HALF" in kernel.arg_names:
        constants["HALF"] = {"bf16": tl.bfloat16, "fp16": tl.float16}[half]
    if constants.get("BITS") == 16:
        constants["scale"] = None
    given = {key: kind for key, kind in constants.items() if kind in TYPES}       # of arguments, not values
    constants = {key: value for key, value in constants.items() if key not in given}
    types = {key: kind for key, kind in types_of(name, half).items() if key not in constants} | {
        key: kind.replace("bf16", half) for key, kind in given.items()}
    if constants.get("BITS") in WHOLE:
        types["table" if "table" in types else "weight"], types["scale"] = WHOLE[constants["BITS"]]
    if constants.get("INPUT") == "join":
        types["x"] = "*fp32"                     # parts of sums
    aligned = [i for i, key in enumerate(kernel.arg_names)
               if types.get(key, "").startswith("*") or (key in ALIGNED and key in types)]
    language = GluonASTSource if name == "mma_24" else ASTSource
    source = language(fn=kernel, constexprs=constants,
                      signature={key: types.get(key, "constexpr") for key in kernel.arg_names},
                      attrs={(i,): [["tt.divisibility", 16]] for i in aligned})
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32),
                          options={key: tile[key] for key in OPTIONS if key in tile})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(done.asm["cubin"])
        used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", tool("cuobjdump", "-res-usage", path)))
        code = tool("nvdisasm", "-c", path)
    return {"kernel": name, "architecture": arch, "type": half, "bits": constants.get("BITS"), "tile": tile,
            "packed": "places" in given,
            "chooses": bool(constants.get("COPY") or constants.get("CHOICE") or "gates" in types),
            **{key.lower(): int(value) for key, value in used.items()}, "shared": done.metadata.shared,
            "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)), "wide_loads": len(re.findall(WIDE, code)),
            "expected": EXPECTED[name], "products": len(re.findall(EXPECTED[name], code))}


def tool(name, *words):
    return subprocess.run([TOOLS / name, *words], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    words = sys.argv[1:]
    named = [int(word) for word in words if word not in ("step", "every")] or ARCHITECTURES
    wanted = jobs_of_a_step(named, "every" in words) if "step" in words else jobs(named)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(build, wanted, chunksize=8):
            print(json.dumps(found), flush=True)
