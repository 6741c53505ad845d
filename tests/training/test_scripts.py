"""Every script where its streams, folders, pipes, packages or disks are not what it expects."""
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import LIMIT, ROOT, TINY, Job, one_sentence, words
from test_configurator import STREAMS

import sparse_kernels
from kernels import build

posix = pytest.mark.skipif(os.name != "posix", reason="signals and forks of POSIX")
TIMES = ("seconds", "config", "run")  # what two equal runs may differ in


# -------------------------------------------------- streams and folders of every script --------------------

HERE = "import pathlib; from data import dataset; dataset.DATA = pathlib.Path('data'); "
TYPED = ("import os, sys; os.dup2(os.open('text.txt', os.O_RDONLY), 0); "
         "sys.stdin = open(0, encoding='utf-8', closefd=False); ")
CPU = dict(device="cpu", dtype="float32")
WORK = {                                         # name: (script, words; {out} is a finished run, code before)
    "train": ("train.py", words(**TINY | dict(max_iters=4), dataset="{data}", out_dir="new"), ""),
    "sample": ("sample.py", words(out_dir="{out}", **CPU, max_new_tokens=3, num_samples=2), ""),
    "chat": ("sample.py", ["--chat", *words(out_dir="{out}", **CPU, max_new_tokens=3)], TYPED),
    "export": ("training/export.py", words(out_dir="{out}", to="safetensors", export_dir="new"), ""),
    "compress": ("data/compress.py", ["c", "text.txt", *words(out_dir="{out}", output="new")], ""),
    "plots": ("bench.py", ["plot", "{out}", "--out=new"], ""),
    "text": ("data/prepare.py", ["--input=text.txt", "--name=new"], HERE),
    "shakespeare": ("data/shakespeare_char/prepare.py", ["--input=text.txt", "--out_dir=new"], ""),
}
ALL_WORK = [pytest.param(name, marks=pytest.mark.slow) if name == "plots" else name for name in WORK]
NEW_TMPDIR = "import tempfile; tempfile.tempdir = None\n"        # Python keeps what it once found
NO_HOME = {
    "no folder can be made at home": ("", {"HOME": "/dev/null/home", "XDG_CACHE_HOME": ""}),
    "there is no home": ("import os, pwd; os.environ.pop('HOME', None); os.environ['XDG_CACHE_HOME'] = ''\n"
                         "def nobody(number): raise KeyError(number)\npwd.getpwuid = nobody", {}),
    "the cache is a file": ("", {"XDG_CACHE_HOME": "text.txt"}),
}


def at_work(finished, tmp_path, work, before="", env=None, name="job"):
    """Start one of WORK in a new folder -> (Job, the folder)."""
    script, argv, patch = WORK[work]
    folder = tmp_path / name
    folder.mkdir()
    (folder / "data").mkdir()
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 2)
    argv = [word.format(out=finished.folder / "out", data=finished.data) for word in argv]
    return Job(script, argv, folder, env, patch + before, name), folder


@posix
@pytest.mark.parametrize("work", ALL_WORK)
def test_real_work_ends_as_it_should_whatever_its_streams_are(finished, tmp_path, work, case):
    """A stream that cannot be used ends a script by the rule, and otherwise its work is done."""
    jobs = {name: at_work(finished, tmp_path, work, before, name=str(number))
            for number, (name, (before, _, _)) in enumerate(STREAMS.items())}
    for name, (_, status, sentence) in STREAMS.items():
        job, folder = jobs[name]
        result = job.wait()
        assert result.status == status, f"{name}: status {result.status}\n{result.err}"
        assert "Traceback" not in result.err and "Exception ignored" not in result.err, name
        assert sentence in result.err
        assert status or work in ("sample", "chat") or list(folder.glob("**/new"))
        case()


def quick_compiler(folder):
    """A C compiler whose every product is the library that this process has built."""
    library = sparse_kernels.cpu_library()[0]
    if library is None:
        pytest.skip("no C kernels here")
    compiler = folder / "cc"
    compiler.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\ncp {library._name} "$2"\n')
    compiler.chmod(0o755)
    return compiler


@posix
@pytest.mark.parametrize("work", ALL_WORK)
def test_real_work_ends_as_it_should_without_a_home_or_a_cache(finished, tmp_path, work, case):
    env = {"CC": str(quick_compiler(tmp_path)), "TMPDIR": str(tmp_path)}
    jobs = {name: at_work(finished, tmp_path, work, NEW_TMPDIR + before, env | more, name=str(number))
            for number, (name, (before, more)) in enumerate(NO_HOME.items())}
    for name, (job, _) in jobs.items():
        result = job.wait()
        assert result.status == 0, f"{name}: status {result.status}\n{result.err}"
        assert "Traceback" not in result.err and "no C kernels" not in result.err + result.out, name
        assert WORK[work][0] != "sample.py" or "C kernels for decode steps, kept in" in result.err, name
        case()


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "foreign"])
def test_a_cache_folder_with_a_damaged_library_gets_a_new_one(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = str(quick_compiler(tmp_path))
    _, said = build.compiled(compiler)
    [path] = (tmp_path / "nanocortex").iterdir()
    whole = path.read_bytes()
    path.unlink()                                                 # this process may have mapped its pages
    path.write_bytes({"cut": whole[:4096], "flipped": whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
                      "emptied": b"", "foreign": b"#!/bin/sh\n"}[damage])
    assert not build.intact(path)
    library, again = build.compiled(compiler)
    assert library.picks and (said, again) == ("", "") and path.read_bytes() == whole
    assert [p.name for p in (tmp_path / "nanocortex").iterdir()] == [path.name]


PATH_TAKEN = """
import sparse_kernels
library, said = sparse_kernels.cpu_library()
print(library is None, said)
"""


@posix
def test_a_cache_folder_that_many_processes_fill_at_once_ends_with_one_library(tmp_path, case):
    (tmp_path / "taken.py").write_text(PATH_TAKEN)
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CC": str(quick_compiler(tmp_path))}
    jobs = [Job(tmp_path / "taken.py", [], tmp_path, env, name=f"job{i}") for i in range(8)]
    for job in jobs:
        assert job.wait().out == "False C kernels for decode steps\n"
        case()
    [path] = (tmp_path / "cache" / "nanocortex").iterdir()
    assert build.intact(path)


@posix
@pytest.mark.parametrize("theirs", ["open to all", "a link", "a file"])
def test_a_cache_folder_that_others_can_write_to_is_not_used(tmp_path, theirs):
    (tmp_path / "taken.py").write_text(PATH_TAKEN)
    folder = tmp_path / f"nanocortex-{os.getuid()}"
    (tmp_path / "other").mkdir(mode=0o700)
    if theirs == "a link":
        folder.symlink_to(tmp_path / "other")
    elif theirs == "a file":
        folder.write_bytes(b"")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    env = {"XDG_CACHE_HOME": "/dev/null/x", "CC": str(quick_compiler(tmp_path)), "TMPDIR": str(tmp_path)}
    said = Job(tmp_path / "taken.py", [], tmp_path, env, NEW_TMPDIR).wait().out
    assert said.startswith("True no C kernels: they could not be built or loaded (") and str(folder) in said
    assert not list((tmp_path / "other").iterdir())


# -------------------------------------------------- real pipes ---------------------------------------------

SHELL = {                                        # a line of bash behind PY=python SCRIPT -> status, stderr
    # 0 where all had been written before head went
    "$PY --help | head -1; exit $(( ${PIPESTATUS[0]} == 0 ? 141 : ${PIPESTATUS[0]} ))": (141, ""),
    "PYTHONUNBUFFERED=1 $PY --help | true; exit ${PIPESTATUS[0]}": (141, ""),
    "$PY --help > /dev/full": (1, "export.py: standard output cannot be written (No space left on device)\n"),
    "$PY --help <&- >&-": (0, ""),
    "$PY <&- >&- 2>&-": (2, ""),
    "$PY > /dev/full 2> /dev/full": (2, ""),
    "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 PYTHONIOENCODING= $PY --out_dir=뇌": (2, "export.py: "),
}


@pytest.mark.parametrize("command", ["training/export.py", "data/compress.py", "data/prepare.py",
                                     pytest.param("-m training.export", marks=pytest.mark.slow),
                                     pytest.param("-m data.compress", marks=pytest.mark.slow)])
def test_a_script_of_a_wing_finds_the_checkout_from_anywhere(tmp_path, command):
    """As a file from any folder, as a module from the checkout."""
    words_ = command.split() if command.startswith("-m") else [str(ROOT / command)]
    done = subprocess.run([sys.executable, *words_, "--help"], cwd=ROOT if "-m" in words_ else tmp_path,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}, capture_output=True,
                          text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0 and "--key=value" in done.stdout, done.stderr


@posix
@pytest.mark.parametrize("line", [line if i == 0 else pytest.param(line, marks=pytest.mark.slow)
                                  for i, line in enumerate(SHELL)])
def test_a_real_pipeline_ends_as_the_forks_do(tmp_path, line):
    status, err = SHELL[line]
    line = line.replace("$PY", f"{sys.executable} {ROOT / 'training' / 'export.py'}")
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith(err) and bool(done.stderr) == bool(err) and "Traceback" not in done.stderr


# -------------------------------------------------- advice that works --------------------------------------

WANDB = """
import sys, types
def init(**keys): {init}
sys.modules["wandb"] = types.SimpleNamespace(init=init, log=lambda *words, **keys: {log})
"""


@pytest.mark.parametrize("code, said", [
    (WANDB.format(init="raise RuntimeError('api_key not configured (no-tty)')", log="None"),
     "wandb does not start (RuntimeError: api_key not configured (no-tty)): type wandb login"),
    (WANDB.format(init="raise EOFError", log="None"), "wandb does not start (EOFError"),
    ("import sys, types; sys.modules['wandb'] = types.ModuleType('wandb')", "wandb does not start"),
    ("import sys; sys.modules['wandb'] = None", "needs wandb: pip install wandb")])
def test_every_script_that_logs_to_wandb_says_why_it_cannot(train, code, said):
    """Without a key, without an answer to its question, with a folder of that name in its place."""
    one_sentence(train(wandb_log=True, before=code, status=2), "train.py", said, "--wandb_log=False")


@pytest.fixture(scope="module")
def odd_types(finished, tmp_path_factory):
    """{what is wrong: out_dir} of checkpoints whose settings are of other types."""
    made, kept = {}, finished.checkpoint()
    odd = {"a str": {"batch_size": "many"}, "a float": {"seed": 1.5}, "None": {"out_dir": None},
           "a list": {"dataset": ["a"]}, "a number": {"dataset": 3}}
    for name, changes in odd.items():
        made[name] = tmp_path_factory.mktemp("odd") / "out"
        made[name].mkdir()
        torch.save(kept | {"config": kept["config"] | changes}, made[name] / "ckpt.pt")
    return made


@pytest.mark.parametrize("name, key, typed", [("a str", "batch_size", 2), ("a float", "seed", 7),
                                              ("a list", "dataset", None), ("a number", "dataset", None)])
def test_every_script_that_resumes_takes_what_is_typed_for_a_setting_of_another_type(
        train, odd_types, name, key, typed):
    shutil.copytree(odd_types[name], train.folder / "out")
    said = one_sentence(train.resume(status=2), "train.py", "ckpt.pt", f"{key}=", f"type --{key}=")
    assert said.count("type --") == 1
    train.resume(**{key: typed or train.data}, max_iters=17)
    assert train.checkpoint()["iter_num"] == 17


@pytest.mark.parametrize("name", ["a str", "a list", "a number", "None"])
def test_every_script_that_reads_a_model_ignores_settings_that_it_has_no_use_for(odd_types, tmp_path, name):
    for number, (script, keys) in enumerate({"sample.py": dict(num_samples=1, max_new_tokens=2, **CPU),
                                             "training/export.py": dict(to="safetensors")}.items()):
        argv = words(out_dir=odd_types[name], **keys)
        result = Job(script, argv, tmp_path, name=str(number)).wait()
        assert result.status == 0, result.err


NO_TOKENIZER = [({"dataset": ["a"]}, "dataset=['a']"), ({"dataset": 3}, "dataset=3"),
                ("text", "type --tokenizer="), ({"dataset": ""}, "type --tokenizer=")]


@pytest.mark.parametrize("config, said", NO_TOKENIZER, ids=str)
def test_every_script_that_samples_names_a_tokenizer_that_it_cannot_find(finished, tmp_path, config, said):
    kept = {key: value for key, value in finished.checkpoint().items() if key != "tokenizer"}
    torch.save(kept | {"config": config}, tmp_path / "ckpt.pt")
    argv = words(out_dir=tmp_path, num_samples=1, max_new_tokens=2, **CPU)
    one_sentence(Job("sample.py", argv, tmp_path).wait(), "sample.py", said)
    typed = Job("sample.py", [*argv, f"--tokenizer={finished.data}"], tmp_path, name="typed").wait()
    assert typed.status == 0


OFFLINE = """
import urllib.request
def urlopen(*words, **keys): raise OSError("no network")
urllib.request.urlopen = urlopen
"""


def test_every_script_that_downloads_says_which_one_takes_input(tmp_path):
    """train.py runs the data set's prepare.py, whose advice must be right for the reader of train.py too."""
    folder = tmp_path / "data" / "shakespeare_char"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "data" / "shakespeare_char" / "prepare.py", folder)
    said = one_sentence(Job(folder / "prepare.py", [], tmp_path, before=OFFLINE).wait(), "prepare.py")
    assert said.endswith(f"type python {folder / 'prepare.py'} --input=FILE")


@pytest.mark.parametrize("to", ["safetensors", "hf", "packed"])
def test_every_script_that_exports_to_a_full_disk_ends_with_a_sentence(finished, train, to):
    out = finished.folder / "out"
    if to == "packed":
        train(weights="2:4", n_embd=32, max_iters=1)
        out = train.folder / "out"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, 3_000))"
    job = Job("training/export.py", words(out_dir=out, to=to, export_dir="new"), train.folder, before=limit)
    said = one_sentence(job.wait(), "export.py", "could not be written", "another folder")
    assert "--out_dir" not in said and not list((train.folder / "new").iterdir())


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp949"])
@pytest.mark.parametrize("work", ["train", "export", "compress", "sample"])
def test_every_script_that_prints_a_name_can_whatever_the_encoding(finished, tmp_path, work, encoding):
    script, argv, _ = WORK[work]
    new, text = tmp_path / "뇌é", tmp_path / "뇌é.txt"
    text.write_text("text")
    argv = [word.format(out=finished.folder / "out", data=finished.data) for word in argv]
    argv = [f"{word.split('=')[0]}={new}" if word.endswith("=new") else word for word in argv]
    argv = [str(text) if word == "text.txt" else word for word in argv]
    before = f"import sys; sys.stdout = open(1, 'w', encoding={encoding!r}, closefd=False)"
    job = Job(script, argv, tmp_path, before=before)
    assert job.wait().status == 0, job.err.read_text()
    said = job.out.read_bytes().decode("utf-8" if work == "sample" else encoding)
    assert work == "sample" or "\\ub1cc" in said or "뇌" in said


INTERRUPTED = """
import os, signal, model
model.GPT.trunk = lambda self, *words: os.kill(os.getpid(), signal.SIGINT)
"""


@posix
def test_every_script_that_is_interrupted_ends_with_130_and_a_word(finished, tmp_path):
    argv = words(out_dir=finished.folder / "out", num_samples=1, **CPU)
    result = Job("sample.py", argv, tmp_path, before=INTERRUPTED).wait()
    assert result.status == 130 and result.err.endswith("sample.py: stopped\n")
    assert "Traceback" not in result.err
