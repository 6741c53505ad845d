"""The C kernels build without a warning, and hold on every instruction set and under the sanitizers."""
import os
import shutil
import subprocess
import sys

import arms
import pytest
import torch
from conftest import ROOT

from decode import engine
from decode.context import Cache
from kernels import build

built = pytest.mark.skipif(build.cpu_library()[0] is None, reason=build.cpu_library()[1])
COMPILER = shutil.which(os.environ.get("CC", "cc")) or "cc"
SETS = {"AVX-512": "-march=x86-64-v4 -mavx512bf16 -mavx512vnni -mavx512vbmi", "AVX2": "-march=x86-64-v3",
        "plain": "-march=x86-64"}
PYTEST = ["-m", "pytest", "-p", "no:cacheprovider"]
CHECK = [*PYTEST, "tests/kernels/test_kernels.py"]
PROGRAMS = [*PYTEST, "tests/kernels/test_build.py", "-k", "programs_run_for_sanitizers"]


def flags_of(name):
    if not os.uname().machine == "x86_64":
        pytest.skip("instruction sets of x86-64")
    return SETS[name].split()


@built
@pytest.mark.parametrize("name", SETS)
def test_the_kernels_compile_without_a_warning(tmp_path, name):
    command = [COMPILER, "-O1", "-std=gnu11", "-fopenmp", "-Wall", "-Wextra", "-Werror", "-c",
               str(build.SOURCES[0]), "-o", str(tmp_path / "cpu.o"), *flags_of(name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


def kernels_hold(tmp_path, check=CHECK, **env):
    """The tests of the kernels, in a process of its own that builds them with other flags."""
    env = {**os.environ, "OMP_NUM_THREADS": "2", "XDG_CACHE_HOME": str(tmp_path), **env}
    done = subprocess.run([sys.executable, *check], cwd=ROOT, env=env, capture_output=True, text=True,
                          timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout and list((tmp_path / "nanocortex").glob("cpu_*.so"))
    return done


@built
@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_the_kernels_hold_on_every_instruction_set(tmp_path, name):
    flags, here = flags_of(name), open("/proc/cpuinfo").read()
    if name == "AVX-512" and not all(part in here for part in ("avx512_bf16", "avx512_vnni", "avx512_vbmi")):
        if not os.environ.get("SIMDE"):
            pytest.skip("no AVX-512 here: compiled only; SIMDE=PATH of SIMD Everywhere emulates it")
        shim = ROOT / "tests/kernels/avx512.h"
        flags = ["-march=haswell", f"-I{os.environ['SIMDE']}", "-include", str(shim), "-w"]
    for check in (CHECK, PROGRAMS):
        kernels_hold(tmp_path, check, NANOCORTEX_CFLAGS=" ".join(flags))


def sanitizers(*names):
    """The libraries of sanitizers, to be loaded first."""
    found = [subprocess.run([COMPILER, f"-print-file-name=lib{name}.so"], capture_output=True, text=True,
                            check=True).stdout.strip() for name in names]
    if not all(map(os.path.isabs, found)):
        pytest.skip(f"{COMPILER} has no sanitizers here")
    return " ".join(found)


SPREAD = ("gpt2", "relu2", "topk", "columns", "experts", "dendrites", "compartments", "predict", "event_gate",
          "two_of_four", "adapters", "osc", "swiglu", "window", "hierarchy", "ponder", "mlp_screen", "screen",
          "grouped", "grouped+dendrites", "gate_first", "screened_gates", "rope_factor")


@built
@pytest.mark.parametrize("name", SPREAD)
def test_programs_run_for_sanitizers(name):
    """What the tests below repeat under sanitizers: a spread of variants, 1 and 5 rows, 1 and 2 threads."""
    for rows in (1, 5):
        for threads in (1, 2):
            model, idx = arms.build((arms.ARMS | arms.PAIRS)[name], std=0.2), arms.tokens(rows, 9)
            cache = Cache(model, rows, 9)
            cache.states.update(group=torch.zeros(()), said=torch.zeros(1, 1, 1))      # of a hierarchy
            program = engine.program_of(model, cache, 31, 1, idx.device)
            program = engine.Program(model, cache, 31, 1, threads=threads) if program else program
            program.begin(idx, [0] * rows, [1] * rows)
            for _ in range(9):
                program.c.cost[0], program.c.cost[1], program.c.spent = 1, 0, 0        # never alone
                assert program.step().isnan().logical_not().all()
            assert program.c.steps == 9


@built
@pytest.mark.slow
def test_the_kernels_hold_under_the_sanitizers(tmp_path):
    """Address and undefined behaviour; leaks are Python's own."""
    done = kernels_hold(tmp_path, NANOCORTEX_CFLAGS="-O1 -g -fsanitize=address,undefined",
                        LD_PRELOAD=sanitizers("asan", "ubsan"), ASAN_OPTIONS="detect_leaks=0")
    assert "runtime error" not in done.stdout + done.stderr


@built
@pytest.mark.slow
@pytest.mark.parametrize("flags,names", [("address,undefined", ("asan", "ubsan")), ("thread", ("tsan",))])
def test_programs_hold_under_the_sanitizers(tmp_path, flags, names):
    done = kernels_hold(tmp_path, PROGRAMS, NANOCORTEX_CFLAGS=f"-O1 -g -fsanitize={flags}",
                        OMP_NUM_THREADS="1", LD_PRELOAD=sanitizers(*names), ASAN_OPTIONS="detect_leaks=0",
                        TSAN_OPTIONS="exitcode=66 halt_on_error=1")
    assert "runtime error" not in done.stdout + done.stderr
