"""CONTRIBUTING.md's worked example, executed: its blocks go into a copy of the repository, where its commands
run."""
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import LIMIT, ONE_THREAD, ROOT, words

FENCED = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
PLACE = re.compile(r"# (\S+)(?:, (above|inside) `(.+)`)?\n")
SHORT = words(max_iters=3, eval_interval=3, eval_iters=1, lr_decay_iters=3, device="cpu", dtype="float32",
              n_layer=2, n_head=2, n_embd=32, block_size=16, batch_size=2)
CHECKS = """
from benchmarks.arms import parts
from configurator import ConfigError
from model import GPT, GPTConfig
keys = dict(n_layer=1, n_head=1, n_embd=16, vocab_size=8)
print([name for name in GPT(GPTConfig(**keys)).state_dict() if "sigma" in name])
print(parts("divisive"))
for more in (dict(columns=8, columns_active=2), dict(mlp_units=30)):
    try:
        GPT(GPTConfig(**keys, divisive=4, **more))
    except ConfigError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def blocks():
    """{language: its fenced blocks}."""
    found = {}
    for language, body in FENCED.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        found.setdefault(language, []).append(body)
    return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory, blocks):
    """A copy of the repository with the example's code in it."""
    folder = tmp_path_factory.mktemp("contributing") / "copy"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(
        ".git", "*.bin", "results", "out*", "docs", "__pycache__", ".*_cache", ".hypothesis"))
    for block in blocks["python"]:
        put(folder, block)
    return folder


def put(folder, block):
    """Write a block where its first line says: a new file, above the line that begins so, in a bracket."""
    place = PLACE.match(block)
    path, body = folder / place[1], block[place.end():]
    if not place[2]:
        return path.write_text(body, encoding="utf-8")
    text = path.read_text(encoding="utf-8")
    [line] = re.finditer(rf"^ *{re.escape(place[3])}", text, re.M)
    at, body = {"above": (line.start(), body + "\n\n" * body.startswith("class")),
                "inside": (line.end(), f"\n    {body.rstrip()}")}[place[2]]
    path.write_text(text[:at] + body + text[at:], encoding="utf-8")


def run(folder, command, *more):
    line = [sys.executable if word == "python" else word for word in shlex.split(command)]
    done = subprocess.run([*line, *more], cwd=folder, capture_output=True, text=True, encoding="utf-8",
                          timeout=LIMIT, env={**os.environ, **ONE_THREAD, "PYTHONPATH": str(folder)})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_worked_example_passes_the_property_tests(copy, blocks):
    command = "".join(blocks["bash"]).splitlines()[0]
    slow = "--deselect=tests/model/test_model.py::test_forward_traces_in_one_graph"     # 4 s for one compiler
    said = run(copy, command, slow, "-vv", "-p", "no:cacheprovider")
    for word in ("sees_the_future", "neighbours", "gradient", "resume_in_their_middle", "cached_decode"):
        assert re.search(rf"{word}\S*divisive\] PASSED", said), word


def test_the_worked_example_trains(copy, blocks, data):
    command = "".join(blocks["bash"]).splitlines()[1]
    said = run(copy, command, *SHORT, f"--dataset={data}", "--out_dir=out")
    saved = torch.load(copy / "out" / "ckpt.pt", weights_only=True)
    assert "step 3/" in said and saved["iter_num"] == 3 and saved["model_args"]["divisive"] == 8
    assert all((saved["model"][f"transformer.h.{i}.mlp.log_sigma"] != 0).any() for i in range(2))


def test_the_worked_example_is_off_by_default_an_arm_and_no_two_mlps(copy):
    none, arm, both, units = run(copy, "python", "-c", CHECKS).splitlines()
    assert none == "[]" and arm == "(['config/bio_divisive.py'], {'act': 'relu2'})"
    assert "divisive=4" in both and "columns=8" in both and "30 units" in units
