"""The C kernels build without a warning, and hold on every instruction set and under the sanitizers."""
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from kernels import build

built = pytest.mark.skipif(build.cpu_library()[0] is None, reason=build.cpu_library()[1])
COMPILER = shutil.which(os.environ.get("CC", "cc")) or "cc"
SETS = {"AVX-512": "-march=x86-64-v4 -mavx512bf16", "AVX2": "-march=x86-64-v3", "plain": "-march=x86-64"}
CHECK = ["-m", "pytest", "-p", "no:cacheprovider", "tests/kernels/test_kernels.py"]


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


def kernels_hold(tmp_path, **env):
    """The tests of the kernels, in a process of its own that builds them with other flags."""
    env = {**os.environ, "OMP_NUM_THREADS": "2", "XDG_CACHE_HOME": str(tmp_path), **env}
    done = subprocess.run([sys.executable, *CHECK], cwd=ROOT, env=env, capture_output=True, text=True,
                          timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout and list((tmp_path / "nanocortex").glob("cpu_*.so"))
    return done


@built
@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_the_kernels_hold_on_every_instruction_set(tmp_path, name):
    flags = flags_of(name)
    if name == "AVX-512" and "avx512_bf16" not in open("/proc/cpuinfo").read():
        pytest.skip("no AVX-512 here: compiled only")
    kernels_hold(tmp_path, NANOCORTEX_CFLAGS=" ".join(flags))


@built
@pytest.mark.slow
def test_the_kernels_hold_under_the_sanitizers(tmp_path):
    """Address and undefined behaviour; leaks are Python's own."""
    found = [subprocess.run([COMPILER, f"-print-file-name=lib{name}.so"], capture_output=True, text=True,
                            check=True).stdout.strip() for name in ("asan", "ubsan")]
    if not all(map(os.path.isabs, found)):
        pytest.skip(f"{COMPILER} has no sanitizers here")
    done = kernels_hold(tmp_path, NANOCORTEX_CFLAGS="-O1 -g -fsanitize=address,undefined",
                        LD_PRELOAD=" ".join(found), ASAN_OPTIONS="detect_leaks=0")
    assert "runtime error" not in done.stdout + done.stderr
