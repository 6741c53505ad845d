"""Without a network: from a fresh copy to a trained model, a sample, a measurement and a test."""
import os
import shutil
import subprocess
import sys

from conftest import LIMIT, ONE_THREAD, ROOT, words

NO_SOCKETS = """
import socket
def refuse(*words, **more):
    raise OSError("network is unreachable")
class Refused(socket.socket):                   # pipes between processes of one machine may pass
    def __init__(self, family=-1, *words, **more):
        if family != getattr(socket, "AF_UNIX", None):
            refuse()
        super().__init__(family, *words, **more)
socket.socket, socket.create_connection, socket.getaddrinfo = Refused, refuse, refuse
"""
SMALL = words(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=2, max_iters=2, eval_iters=1,
              device="cpu")
STEPS = {
    "import": ["-c", "import model, sparse_kernels, bench; from data import tokenizer"],
    "prepare and train": ["train.py", "config/train_pylib.py", *SMALL, "--out_dir=out"],
    "resume": ["train.py", "--init_from=resume", "--out_dir=out", "--max_iters=3"],
    "sample": ["sample.py", "--out_dir=out", "--num_samples=1", "--max_new_tokens=3", "--device=cpu"],
    "export": ["training/export.py", "--out_dir=out", "--to=safetensors"],
    "bench": ["bench.py", "mlp", "--repeats=1", "--widths=64", "--cold=1"],
    "test": ["-m", "pytest", "-q", "tests/test_configurator.py", "-k", "a_word_becomes"],
}


def test_the_whole_way_without_a_network(tmp_path, case):
    """Every socket of every process, those that the scripts start included, is refused: in sitecustomize,
    which Python runs first."""
    copy = tmp_path / "copy"
    left_out = shutil.ignore_patterns(".git", "*.bin", "results", "out*", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=left_out)
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text(NO_SOCKETS)
    env = {**os.environ, **ONE_THREAD, "PYTHONPATH": f"{blocked}{os.pathsep}{copy}"}
    probe = subprocess.run([sys.executable, "-c", "import socket; socket.socket()"], env=env,
                           capture_output=True)
    assert b"network is unreachable" in probe.stderr
    for name, command in STEPS.items():
        done = subprocess.run([sys.executable, *command], cwd=copy, env=env, capture_output=True, text=True,
                              timeout=LIMIT)
        assert done.returncode == 0, f"{name}: {done.stderr[-2000:]}"
        case()
    assert (copy / "data" / "pylib" / "train.bin").is_file()
