"""Every command that a page shows is run, shrunk: fewer and narrower layers, two iterations, a few tokens.

The words are the page's. The folder they are typed in holds the built-in data in small, a text, and the runs
that a command names, each trained by its block when it is first asked for.
"""
import re
import shutil

import pytest
from commands import commands_of, split_command
from conftest import ROOT, TEXT, Job

from data import dataset
from data.tokenizer import ByteTokenizer, CharTokenizer
from model import GPT, GPTConfig

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
SHAPE = dict(n_layer=6, n_head=4, n_embd=32, block_size=32)
ITERATIONS = dict(batch_size=2, gradient_accumulation_steps=1, max_iters=2, lr_decay_iters=2, warmup_iters=0,
                  eval_interval=2, eval_iters=1, compile=False, device="cpu")
TIMES = dict(repeats=1, threads=1)
RECIPE = dict(iters=2, config="config/compare_pylib.py,HERE/narrow.py")
SHORT = {
    "sample.py": dict(max_new_tokens=4, device="cpu"),
    "data/bilingual/prepare.py": dict(vocab_size=280),
    "compare": TIMES | dict(repeats=3, tokens=64, prompt=4, new=4, device="cpu"),
    "decode": TIMES | dict(shape="small", prompt=4, new=4),
    "table": RECIPE | dict(arms="osc", seeds=1, train_only=True, runs="KEPT/runs", cache="KEPT/cache"),
    "quality": TIMES | RECIPE | dict(arms="topk"),
    "retrofit": TIMES | RECIPE | dict(more=2, arms="window", teacher=False),
    "steps": dict(repeats=1, cases="small:1", arms="osc", config=RECIPE["config"]),
    "screen": TIMES | dict(quick=True, windows=2, prompt=4, new=16),
    "sparsify": TIMES | dict(tokens=64, new=4, minutes=0, only="head"),
    "mlp": TIMES | dict(widths="32", cold=1),
    "train": TIMES | dict(iters=3, drop=1),
    "plot": dict(tokens=32),
}
# Where the words stand for something of yours.
YOURS = {"RUN": "out-pylib", "out-a": "out-pylib", "out-b": "out-pylib-topk", "out-c": "out-pylib-window",
         "TEXT.txt": "book.txt", "FILE.txt": "book.txt", "FILE": "small.txt", "DIR": "letters",
         "FILE.ncx": "packed.ncx", "...": "out-pylib-two_of_four", "FILE.gguf": "tiny.gguf",
         "$FILE": "tiny.gguf"}
# Configs of runs that are named after no block; a run that is not here is a dense one on the built-in data.
RUNS = {"out-shakespeare-char": ["config/train_shakespeare_char.py"],
        "out-compress": ["config/train_pylib.py", "config/compress_pylib.py"],
        "out-continual-best": ["config/continual_best.py"],
        "out-efficient": ["config/train_pylib.py", "config/efficient.py"],
        "out-lossless": ["config/train_pylib.py", "config/lossless.py"]}
# Flags of peers, whose packages few have; tests/benchmarks/test_peers.py runs those that are installed.
PEERS = ("nanogpt", "hf", "llamacpp", "ctranslate2")
# What no test can run as it stands there, and why.
NOT_RUN = {
    "python train.py --init_from=gpt2": "downloads GPT-2's weights",
    "python data/openwebtext/prepare.py": "downloads 54 GB",
    "python bench.py race --device=cuda": "needs a card, and trains for minutes",
    "python train.py config/race_shakespeare_gpu.py": "needs a card: its dtype and compiling are a card's",
    "python bench.py ablate": "trains 5,000 iterations whatever its keys are",
    "python bench.py readme": "rewrites these pages; test_docs.py holds them to what it would write",
    "python bench.py quality --arms=dense,divisive": "test_contributing.py runs it in a copy",
    "python train.py config/train_pylib.py config/bio_divisive.py": "test_contributing.py runs it in a copy",
    "python tests/test_golden.py": "makes the golden curves again",
    "python sample.py --out_dir=python-63m": "the model of 63 M weights is not part of the repository",
}


def all_commands():
    """{command: words} of all pages but what installs something or is pytest's or torchrun's own."""
    found = {}
    for path in PAGES:
        for words in commands_of(path):
            if split_command(words)[0]:
                found.setdefault(" ".join(words), words)
    return found


COMMANDS = all_commands()


def why_not(command):
    """Why a command is not run; None where it is."""
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), None)


def with_keys(words, keys):
    """Words with these keys in place of their own."""
    return [word for word in words if word.split("=")[0].removeprefix("--") not in keys] + [
        f"--{key}={value}" for key, value in keys.items()]


def shrunk(script, words):
    """A command's words with less to do."""
    words = [word for word in words if word.split("=")[0].removeprefix("--") not in PEERS]
    if script == "train.py":
        begun = re.search("--init_from=(?!auto|resume)", " ".join(words))
        return with_keys(words, ITERATIONS if begun else SHAPE | ITERATIONS)
    if "--help" in words:
        return words
    return with_keys(words, SHORT.get(words[0] if script == "bench.py" else script, {}))


class Reader:
    """Somebody at a terminal, in a folder with what the pages speak of; runs are kept for other folders."""

    def __init__(self, kept):
        self.kept, self.folder = kept, None

    def sits_in(self, folder):
        """Another folder, in which nothing has been typed yet -> the reader."""
        self.folder = folder
        write_data(folder)
        (folder / "config").symlink_to(ROOT / "config")
        (folder / "results").mkdir()
        for name, times in ("book.txt", 40), ("small.txt", 2):
            (folder / name).write_text(times * TEXT, encoding="utf-8")
        (folder / "narrow.py").write_text("".join(f"{key} = {value}\n" for key, value in SHAPE.items()))
        return self

    def types(self, script, words):
        """Run one command to its end, which must be a good one."""
        before = "import data.dataset as d; from pathlib import Path; d.DATA = Path('data').resolve()"
        words = [word.replace("HERE", str(self.folder)).replace("KEPT", str(self.kept)) for word in words]
        result = Job(script, words, self.folder, before=before).wait()
        assert result.status == 0, f"{script} {' '.join(words)}\n{result.out[-2000:]}\n{result.err[-2000:]}"

    def has(self, name):
        """Make sure of a run, out-DATA-BLOCK, out-CONFIG or a dense one; of a compressed or a GGUF file."""
        if not (self.kept / name).exists():
            self.makes(name)
            shutil.move(self.folder / name, self.kept / name)
        elif (self.folder / name).exists():
            return
        copy = shutil.copytree if (self.kept / name).is_dir() else shutil.copy
        copy(self.kept / name, self.folder / name)

    def of_theirs(self):
        """Data in the tokens of a model of others -> the words that train it on."""
        self.has("tiny.gguf")
        self.types("data/prepare.py", ["--input=book.txt", "--name=mine", "--tokenizer=tiny.gguf"])
        return ["--init_from=tiny.gguf", "--dataset=mine"]

    def makes(self, name):
        block = re.sub("^out-(pylib|compare)-", "", name)
        if name == "out-mine":
            self.types("train.py", shrunk("train.py", self.of_theirs() + ["--out_dir=out-mine"]))
        elif name == "packed.ncx":
            self.has("out-compress")
            self.types("data/compress.py", ["c", "small.txt", f"--output={name}"])
        elif name == "tiny.gguf":
            tiny_llama(self.folder / name)
        else:
            words = [f"--block={block}"] * (ROOT / "config" / f"bio_{block}.py").is_file()
            self.types("train.py", shrunk("train.py", [*RUNS.get(name, words), f"--out_dir={name}"]))


def write_data(folder):
    """The data sets that the pages' configs name, each of a few kilobytes."""
    text = 12 * TEXT + "ROMEO:"
    for name in ("pylib", "shakespeare_bytes", "openwebtext", "letters", "shakespeare_char"):
        tokenizer = (CharTokenizer(sorted(set(text))) if name in ("letters", "shakespeare_char")
                     else ByteTokenizer())
        ids = list(tokenizer.encode(text))
        dataset.write_dataset(folder / "data" / name, {"train": [ids], "val": [ids[:900]]}, tokenizer, "test")


def tiny_llama(path):
    """A GGUF file of 4 bits of a random Llama with a tokenizer of its own."""
    for package in ("gguf", "tokenizers"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    from test_llama import gguf_tokenizer

    from benchmarks import peers
    tokens = gguf_tokenizer()
    shape = dict(n_layer=2, n_head=2, n_embd=64, mlp_units=96, n_kv_head=1, block_size=1024, bias=False,
                 norm="rmsnorm", pos="rope", act="swiglu", vocab_size=len(tokens["ggml.tokens"]))
    peers.write_gguf(GPT(GPTConfig(**shape), seed=3), "q4_1", path, tokens)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return Reader(tmp_path_factory.mktemp("kept"))


@pytest.fixture
def reader(kept, tmp_path):
    return kept.sits_in(tmp_path)


NAMES = re.compile("|".join(rf"(?<![\w$.]){re.escape(name)}(?![\w.])" for name in YOURS))
THINGS = re.compile(r"\bout(?:-[\w-]+)?(?=[@\s]|$)|packed\.ncx|tiny\.gguf")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_pages_runs(command, reader):
    if why_not(command):
        pytest.skip(why_not(command))
    script, words = split_command(COMMANDS[command])
    words = [NAMES.sub(lambda found: YOURS[found[0]], word) for word in words]
    for name in things(script, words):
        reader.has(name)
    if "--dataset=mine" in words:
        reader.of_theirs()
    reader.types(script, shrunk(script, words))


def things(script, words):
    """Runs and files that a command needs: those that it names, but not the run that train.py makes."""
    named = [word for word in words if not (script == "train.py" and word.startswith("--out_dir="))]
    if script == "sample.py" and not any(word.startswith(("--out_dir=", "--init_from=")) for word in words):
        named.append("out")
    if script == "train.py" and "--init_from=resume" in words:
        named.append("out-shakespeare-char")
    if words == ["screen"]:
        named.append("out")
    if script == "data/compress.py":
        named.append("out-compress")
    return sorted(set(THINGS.findall(" ".join(named))))


def test_what_is_not_run_is_on_some_page():
    for start in NOT_RUN:
        assert any(command.startswith(start) for command in COMMANDS), start
