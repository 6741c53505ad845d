"""The command line and the config files: every value comes back, every mistake is a sentence."""
import dataclasses
import os
import re
import runpy
import string
import sys
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT, TINY, Job, one_sentence, words
from hypothesis import given, settings
from hypothesis import strategies as st

import configurator
from configurator import ConfigError, help_text, render

parse, configure = partial(configurator.parse, files=True), partial(configurator.configure, files=True)
NANOGPT = os.environ.get("NANOGPT")
posix = pytest.mark.skipif(os.name != "posix", reason="file descriptors and /dev/full of POSIX")
needs_nanogpt = pytest.mark.skipif(not NANOGPT, reason="set NANOGPT to a checkout of nanoGPT")


@dataclass(frozen=True)
class Config:
    """A few keys."""
    count: int = 3  # how many
    rate: float = 0.5  # how fast
    on: bool = False  # whether # or not
    name: str = "x"  # what it is called
    mode: bool | str = "auto"  # auto, True or False


@dataclass(frozen=True)
class Wider(Config):
    """More keys."""
    count: int = 4  # how many, in the wider one
    more: int = 1  # another one


@pytest.fixture
def classes():
    """The dataclasses inside train.py and sample.py, which are scripts and not modules."""
    return {name: class_of(f"{name}.py", cls) for name, cls in (("train", "TrainConfig"),
                                                                ("sample", "SampleConfig"))}


def class_of(script, cls):
    """The dataclass of a script, whose run ends before it does anything."""
    def stop(found, argv=None, base=None, files=False):
        raise Found(found)

    class Found(Exception):
        pass

    hooks = {name: getattr(configurator, name) for name in ("configure", "typed_words", "begin_script")}
    saved = sys.argv
    try:
        sys.argv = [str(ROOT / script)]
        for name in hooks:
            setattr(configurator, name, stop)
        configurator.begin_script = lambda encoding=None: None    # the streams here are pytest's
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except Found as found:
        return found.args[0]
    finally:
        sys.argv = saved
        for name, function in hooks.items():
            setattr(configurator, name, function)


# -------------------------------------------------- values --------------------------------------------------

strange = st.one_of(st.text(), st.text(string.punctuation + "0123456789eTrue Flsn"), st.sampled_from(
    ["", "True", "true", "None", "1", "1e5", "'", '"', "'a'", "a=b", "--x=1", "=", "[]", "{[]: 1}", "\\",
     "\n", "한국어", "\udc80", "nan"]))


@given(st.builds(Config, count=st.integers(), rate=st.floats(allow_nan=False, allow_infinity=False),
                 on=st.booleans(), name=strange,
                 mode=st.one_of(st.booleans(), strange)))
@settings(max_examples=400, deadline=None)
def test_every_config_comes_back_from_its_own_words(config):
    assert parse(Config, render(config)) == dataclasses.asdict(config)
    assert Config(**parse(Config, render(config))) == config


@given(strange.filter(lambda text: not text.startswith(("'", '"')) and "'" not in text and '"' not in text
                      and "~/" not in text))
@settings(max_examples=300, deadline=None)
def test_text_without_quotes_needs_none(text):
    assert parse(Config, [f"--name={text}"]) == {"name": text}


@given(st.lists(strange, max_size=4))
@settings(max_examples=300, deadline=None)
def test_no_command_line_ends_in_anything_but_values_or_a_sentence(argv):
    for line in (argv, [f"--{word}" for word in argv], [f"--rate={word}" for word in argv],
                 [f"--mode={word}" for word in argv]):
        try:
            given = parse(Config, [word for word in line if not os.path.exists(word)])
        except ConfigError as error:
            assert str(error)
        else:
            assert all(type(given[key]) is type(getattr(Config, key)) for key in given if key != "mode")


@pytest.mark.parametrize("word, value", [
    ("--rate=3", 3.0), ("--rate=-1e-3", -0.001), ("--count=-7", -7), ("--on", True), ("--on=True", True),
    ("--on=false", False),
    ("--mode=True", True), ("--mode=False", False), ("--mode=false", False), ("--mode", True),
    ("--mode=auto", "auto"),
    ("--mode='True'", "True"), ("--mode=1", "1"), ("--name=1", "1"), ("--name=", ""),
    ("--name=a=b=c", "a=b=c"), ("--name='1'", "1"),
    ("--name=None", "None"), ("--name=True", "True"), ("--name=한국어 🧠", "한국어 🧠"),
    ("--name={[]: 1}", "{[]: 1}")])
def test_a_word_becomes_its_keys_type(word, value):
    (found,) = parse(Config, [word]).values()
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("word, sentence", [
    ("--cuont=3", "unknown key 'cuont', did you mean 'count'?"),
    ("--zzz=3", "unknown key 'zzz'; --help lists all keys"),
    ("--count=3.5", "count=3.5 is float, expected int: type --count=3"),
    ("--count=many", "count='many' is str, expected int"),
    ("--count=True", "count=True is bool, expected int"),
    ("--count=", "count='' is str, expected int"),
    ("--rate=fast", "rate='fast' is str, expected float"),
    ("--rate=nan", "rate='nan' is str, expected float"),
    ("--rate=1" + "0" * 400, "is int, expected float"),
    ("--on=1", "on=1 is int, expected bool"),
    ("--on=yes", "on='yes' is str, expected bool"),
    ("--count", "--count needs a value: type --count="),
    ("--name", "--name needs a value"),
    ("--=1", "unknown key ''"),
    ("--", "unknown key ''"),
    ("count=3", "type --count=3"),
    ("-count=3", "type --count=3"),
    ("-x", "type --x"),
    ("a=b=c", "type --a=b=c"),
    ("missing.py", "config file missing.py does not exist"),
    (".", "config file . does not exist"),
    ("", "config file  does not exist"),
])
def test_a_bad_word_says_what_to_type(word, sentence):
    with pytest.raises(ConfigError) as error:
        parse(Config, [word])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


HOME_WORDS = [("--name=~/x", "/home/me/x"), ("--name=~/a:3,~/b", "/home/me/a:3,/home/me/b"),
              ("--name=FILE:~/x", "FILE:/home/me/x"), ("--name='~/x'", "~/x"), ("--name=~", "~"),
              ("--name=~x", "~x"), ("--name=a~/b", "a~/b"), ("--name=~ /x", "~ /x"),
              ("--mode=~/x", "/home/me/x")]


@pytest.mark.parametrize("word, value", HOME_WORDS)
def test_every_script_knows_the_home_folder_behind_an_equals_sign(monkeypatch, word, value):
    """A shell leaves it there as it is, and a folder named ~ would be made. Quotes keep it."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    assert list(parse(Config, [word]).values()) == [value]


def test_every_script_that_is_given_text_keeps_it_as_it_is(classes, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    argv = ["--start=~/x", "--chat", "--stop=~/", "--enter=~/e", "--out_dir=~/o"]
    made = configure(classes["sample"], argv)
    assert (made.start, made.stop, made.enter) == ("~/x", "~/", "~/e")
    assert made.out_dir == f"{tmp_path}/o"
    made = configure(classes["sample"], ["--start=FILE:~/x"])
    assert made.start == f"FILE:{tmp_path}/x"


def test_every_script_without_a_home_says_so(monkeypatch):
    monkeypatch.setattr(configurator.os.path, "expanduser", lambda path: path)
    with pytest.raises(ConfigError, match="name='~/x': the home folder is not known"):
        parse(Config, ["--name=~/x"])


def test_the_last_word_wins(tmp_path):
    (tmp_path / "a.py").write_text("count = 10\nrate = 2\n")
    assert configure(Config, ["--count=1", str(tmp_path / "a.py"), "--rate=3"],
                     base={"on": True, "count": 7}) == Config(10, 3.0, True)
    assert configure(Config, [str(tmp_path / "a.py"), "--count=1", "--count=2"]).count == 2
    assert configure(Config, [], base={"count": 7}) == Config(7)


# -------------------------------------------------- config files --------------------------------------------

def test_a_config_file_is_plain_python_with_imports_expressions_and_comments(tmp_path):
    (tmp_path / "run.py").write_text("""# a comment
import time
from math import sqrt

count = 5 * 8  # steps
rate=1e-1
_mine = 4
if count > 30:
    rate = rate / _mine
name = 'run-' + str(int(time.time()) * 0)
count += 1
on = not on
def helper(x):
    y = x
    return y
""", encoding="utf-8")
    assert parse(Config, [str(tmp_path / "run.py")]) == dict(count=41, rate=0.025, name="run-0", on=True)


def test_a_config_file_reads_what_was_typed_before_it(tmp_path):
    (tmp_path / "run.py").write_text("rate = count / 2\n")
    assert parse(Config, ["--count=9", str(tmp_path / "run.py")])["rate"] == 4.5


@pytest.mark.parametrize("text, sentence", [
    ("count = = 3", "does not run: SyntaxError"),
    ("count = 1 / 0", "does not run: ZeroDivisionError: division by zero"),
    ("import no_such_module_at_all", "ModuleNotFoundError"),
    ("count = undefined", "NameError"),
    ("raise SystemExit", "does not run: SystemExit"),
    ("cuont = 3", "unknown key 'cuont', did you mean 'count'?"),
    ("other = 3", "names of your own start with '_'"),
    ("count = 'many'", "count='many' is str, expected int"),
    ("name = 3", "name=3 is int, expected str"),
    ("rate = None", "rate=None is NoneType, expected float"),
    ("mode = 3", "mode=3 is int, expected bool or str"),
    ("count = 3\n  rate = 1", "does not run: IndentationError"),
])
def test_a_bad_config_file_says_what_is_wrong_and_where(tmp_path, text, sentence):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(ConfigError) as error:
        parse(Config, [str(tmp_path / "bad.py")])
    assert sentence in str(error.value) and str(tmp_path / "bad.py") in str(error.value)


def test_a_config_file_that_is_not_text_says_so(tmp_path):
    (tmp_path / "bad.py").write_bytes(b"count = '\xff\xfe'")
    with pytest.raises(ConfigError, match="UnicodeDecodeError"):
        parse(Config, [str(tmp_path / "bad.py")])


def test_a_misspelt_config_file_is_guessed(tmp_path):
    (tmp_path / "train_small.py").write_text("")
    with pytest.raises(ConfigError, match=r"did you mean '.*train_small\.py'"):
        parse(Config, [str(tmp_path / "train_smal.py")])


@pytest.mark.parametrize("file", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.name)
def test_our_config_files_hold_valid_keys(classes, file):
    assert configure(classes["train"], [str(file)])


@needs_nanogpt
@pytest.mark.parametrize("file, expected", [
    ("train_shakespeare_char.py", dict(out_dir="out-shakespeare-char", dataset="shakespeare_char",
                                       batch_size=64, block_size=256, n_layer=6,
                                       n_embd=384, dropout=0.2, learning_rate=1e-3, max_iters=5000,
                                       min_lr=1e-4, beta2=0.99,
                                       warmup_iters=100, gradient_accumulation_steps=1,
                                       always_save_checkpoint=False)),
    ("finetune_shakespeare.py", dict(init_from="gpt2-xl", dataset="shakespeare", eval_interval=5,
                                     eval_iters=40, batch_size=1,
                                     gradient_accumulation_steps=32, max_iters=20, learning_rate=3e-5,
                                     decay_lr=False)),
    ("train_gpt2.py", dict(wandb_log=True, wandb_run_name="gpt2-124M", batch_size=12, block_size=1024,
                           gradient_accumulation_steps=40,
                           max_iters=600000, lr_decay_iters=600000, eval_interval=1000, log_interval=10,
                           weight_decay=0.1)),
    ("eval_gpt2.py", dict(batch_size=8, eval_iters=500, eval_only=True, wandb_log=False, init_from="gpt2")),
    ("eval_gpt2_xl.py", dict(init_from="gpt2-xl", eval_only=True)),
])
def test_nanogpts_config_files_run_unmodified(classes, file, expected):
    config = configure(classes["train"], [str(Path(NANOGPT, "config", file))])
    assert {key: getattr(config, key) for key in expected} == expected
    if file == "finetune_shakespeare.py":
        assert config.wandb_run_name.startswith("ft-")


@needs_nanogpt
@pytest.mark.parametrize("script, cls", [("train.py", "train"), ("sample.py", "sample")])
def test_every_key_of_nanogpts_scripts_exists_here(classes, script, cls):
    text = Path(NANOGPT, script).read_text(encoding="utf-8").split("exec(open", 1)[0]
    theirs = set(re.findall(r"^([a-z]\w*) = ", text, re.MULTILINE)) - {"config_keys"}
    ours = {field.name for field in dataclasses.fields(classes[cls])}
    assert theirs and theirs <= ours


# -------------------------------------------------- help ----------------------------------------------------

def test_help_names_every_key_with_its_default_and_meaning():
    text = help_text(Wider)
    for line in ("--count=4", "--rate=0.5", "--on=False", "--name='x'", "--mode='auto'", "--more=1"):
        assert f"  {line} " in text
    assert "how many, in the wider one" in text and "how fast" in text and "More keys." in text


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_gives_every_key_a_meaning_and_writes_nothing(tmp_path, classes, script, word):
    result = Job(script, ["--n_layer=3", word], tmp_path).wait()
    assert (result.status, result.err) == (0, "")
    meaning = dict(re.findall(r"^  --(\w+)=(?:'(?:[^'\\]|\\.)*'|\S+) +(\S.*)$", result.out, re.MULTILINE))
    kind = classes[script.removesuffix(".py")]
    assert sorted(meaning) == sorted(field.name for field in dataclasses.fields(kind))
    assert "--out_dir='out'" in result.out and "--seed=1337" in result.out
    assert {path.suffix for path in tmp_path.iterdir()} == {".stdout", ".stderr"}


HEADINGS = {"train.py": ["run:", "data:", "optimizer:", "model: shape:", "block: cortical columns:"],
            "sample.py": ["run:", "text:", "sampling:"]}


@pytest.mark.parametrize("script", HEADINGS)
def test_help_is_in_groups_behind_three_examples(tmp_path, script):
    lines = Job(script, ["--help"], tmp_path).wait().out.splitlines()
    at = [lines.index(heading) for heading in HEADINGS[script]]
    first = next(n for n, line in enumerate(lines) if line.startswith("  --"))
    assert at == sorted(at)
    assert sum(line.startswith("    python ") for line in lines[:first]) >= 3
    under = {line.split("=")[0]: next(h for h in reversed(lines[:n]) if h.endswith(":") and h[0] != " ")
             for n, line in enumerate(lines) if line.startswith("  --")}
    assert all(heading in lines for heading in set(under.values()))
    if script == "train.py":
        assert under["  --learning_rate"] == "optimizer:" and under["  --n_layer"] == "model: shape:"
        assert under["  --columns_active"] == under["  --columns"] == "block: cortical columns:"
        assert under["  --bias"] == "model: shape:"                # it has another default here


def test_help_of_training_names_every_block(tmp_path):
    from training.words import blocks
    said = Job("train.py", ["--help"], tmp_path).wait().out.partition("run:")[0]
    assert [name for name in blocks() if not re.search(rf"\b{name}\b", said)] == []


def test_the_menu_of_benchmarks_has_three_examples_that_name_subcommands(tmp_path):
    from bench import COMMANDS
    said = Job("bench.py", ["--help"], tmp_path).wait().out
    named = re.findall(r"^    python bench.py (\w+)", said, re.M)
    assert len(named) >= 3 and set(named) <= set(COMMANDS)


# -------------------------------------------------- bad command lines ---------------------------------------

BAD_TRAINING = [
    (["--n_hed=4"], "unknown key 'n_hed', did you mean 'n_head'?"),
    (["--n_layer=two"], "n_layer='two' is str, expected int"),
    (["--learning_rate=fast"], "learning_rate='fast' is str, expected float"),
    (["--learning_rate=nan"], "learning_rate='nan' is str"),
    (["--eval_only=1"], "eval_only=1 is int, expected bool"),
    (["--compile=maybe"], "compile='maybe' must be auto, True or False"),
    (["--n_layer"], "--n_layer needs a value"),
    (["n_layer=3"], "type --n_layer=3"),
    (["a=b=c"], "type --a=b=c"),
    (["--한국=어"], "unknown key '한국'"),
    (["--dataset=데이터"], "data set '데이터'"),
    (["--dataset="], "data set ''"),
    (["--dataset=shakespear_char"], "did you mean 'shakespeare_char'?"),
    (["no/such/config.py"], "config file no/such/config.py does not exist"),
    (["broken.py"], "broken.py does not run: SyntaxError"),
    (["raising.py"], "raising.py does not run: ValueError: mine"),
    (["strange.py"], "unknown key 'n_leyer', did you mean 'n_layer'?"),
    (["--n_embd=30", "--n_head=4"], "n_embd=30 is not divisible by n_head=4: type --n_embd="),
    (["--n_layer=0"], "n_layer=0 must be at least 1"),
    (["--block_size=-1"], "block_size=-1 must be at least 1"),
    (["--block_size=5000"], "5001"),
    (["--batch_size=0"], "batch_size=0 must be at least 1"),
    (["--gradient_accumulation_steps=0"], "gradient_accumulation_steps=0 must be at least 1"),
    (["--eval_interval=0"], "eval_interval=0 must be at least 1"),
    (["--dropout=1.0"], "dropout=1.0 must be in [0, 1)"),
    (["--beta2=1.5"], "beta2=1.5 must be in [0, 1)"),
    (["--learning_rate=-1"], "learning_rate=-1.0 must not be negative"),
    (["--max_iters=-1"], "max_iters=-1 must not be negative"),
    (["--vocab_size=100"], "vocabulary"),
    (["--device=gpu"], "device='gpu' is not a device"),
    (["--device=cuda:99"], "device='cuda:99'"),
    (["--device="], "device='' is not a device"),
    (["--device=뇌"], "device='뇌' is not a device"),
    (["--dtype=float64"], "dtype='float64' must be auto, float32"),
    (["--dtype=float16"], "dtype='float16' needs a CUDA device"),
    (["--init_from=scrach"], "init_from='scrach' must be scratch, resume"),
    (["--init_from="], "train first"),
    (["--init_from=resume"], "holds no ckpt.pt: train first"),
    (["--init_from=resume", "--out_dir=a_file"], "holds no ckpt.pt"),
    (["--out_dir=a_file"], "out_dir=a_file cannot be made"),
    (["--out_dir=a_file/below"], "out_dir=a_file/below cannot be made"),
    (["--wandb_log=True"], "pip install wandb"),
]
BAD_SAMPLING = [
    (["--temprature=1"], "unknown key 'temprature', did you mean 'temperature'?"),
    (["--temperature=-1"], "temperature=-1.0 must be 0 (greedy) or a number from 1e-06 on"),
    (["--top_k=-2"], "top_k=-2 must be a whole number, 0 (off) or more"),
    (["--top_p=0"], "top_p=0.0 must be in (0, 1]"),
    (["--min_p=2"], "min_p=2.0 must be in [0, 1]"),
    (["--policy=True"], "'policy' is called 'sparse_decode' now: type --sparse_decode"),
    (["--repetition_penalty=0"], "repetition_penalty=0.0 must be in 0.001..1000"),
    (["--num_samples=0"], "num_samples=0 must be at least 1"),
    (["--max_new_tokens=0"], "max_new_tokens=0 must be at least 1"),
    (["--compile=maybe"], "compile='maybe' must be auto, True or False"),
    (["--overflow=wrap"], "overflow='wrap' must be exact or slide"),
    (["--start="], "start='' has no tokens"),
    (["--start=FILE:gone.txt"], "gone.txt does not exist"),
    (["--start=FILE:binary"], "binary is not UTF-8 text"),
    (["--out_dir=nowhere"], "nowhere holds no ckpt.pt: train first"),
    (["--init_from=nowhere.pt"], "nowhere.pt"),
    (["--device=gpu"], "device='gpu' is not a device"),
    (["--dtype=int8"], "dtype='int8' must be auto"),
    (["--seed=x"], "seed='x' is str, expected int"),
    (["sample"], "config file sample does not exist"),
]


@pytest.fixture
def place(tmp_path):
    """A working folder with files to trip over."""
    for name, text in {"broken.py": "n_layer = = 3", "raising.py": "raise ValueError('mine')",
                       "strange.py": "n_leyer = 3", "a_file": ""}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    return tmp_path


@pytest.mark.parametrize("argv, sentence", BAD_TRAINING,
                         ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_command_lines_of_training_say_what_to_type(place, data, argv, sentence):
    if argv == ["--wandb_log=True"] and find_spec("wandb"):
        pytest.skip("wandb is installed")
    result = Job("train.py", [*words(**TINY, dataset=data), *argv], place).wait()
    one_sentence(result, "train.py", sentence)


@pytest.mark.parametrize("argv, sentence", BAD_SAMPLING,
                         ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_command_lines_of_sampling_say_what_to_type(place, finished, argv, sentence):
    result = Job("sample.py", [*words(out_dir=finished.folder / "out", device="cpu", dtype="float32",
                                      max_new_tokens=2), *argv], place).wait()
    one_sentence(result, "sample.py", sentence)
    assert result.out.strip() == ""


@pytest.mark.parametrize("key, value", [("n_layer", 2), ("n_embd", 32), ("n_head", 1), ("bias", True),
                                        ("qk_norm", True), ("softcap", 15.0), ("size", "small"),
                                        ("vocab_size", 300), ("block_size", 16)])
def test_resuming_with_another_shape_is_one_sentence(finished, key, value):
    argv = words(init_from="resume", out_dir=finished.folder / "out", device="cpu", **{key: value})
    one_sentence(Job("train.py", argv, finished.folder).wait(), "train.py", f"{key}={value}")
    assert finished.checkpoint()["iter_num"] == 16


def test_a_key_repeated_as_it_was_is_welcome_when_resuming(finished, train):
    train(max_iters=2)
    train.resume(max_iters=3, n_layer=1, n_head=2, n_embd=16, block_size=8, bias=False)
    assert train.checkpoint()["iter_num"] == 3


def test_any_other_error_keeps_its_traceback(tmp_path, data):
    bug = "import model; model.GPT.__init__ = lambda self, *a, **k: 1 / 0"
    result = Job("train.py", words(**TINY, dataset=data), tmp_path, before=bug).wait()
    assert result.status == 1 and "Traceback" in result.err and "ZeroDivisionError" in result.err


@pytest.mark.skipif(os.name != "posix", reason="SIGINT")
def test_ctrl_c_before_the_first_step_ends_without_a_traceback(tmp_path, data):
    early = ("import model, os, signal\n"
             "model.GPT.__init__ = lambda self, *a, **k: os.kill(os.getpid(), signal.SIGINT)")
    result = Job("train.py", words(**TINY, dataset=data), tmp_path, before=early).wait()
    assert (result.status, result.err) == (130, "train.py: stopped\n")


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 5000 + "/a.py", "nul\0.py", "[a"])
def test_a_name_that_no_file_can_have_is_a_missing_config_file(name):
    with pytest.raises(ConfigError, match="does not exist"):
        parse(Config, [name])


# -------------------------------------------------- every script --------------------------------------------

def is_script(path):
    text = path.read_text(encoding="utf-8")
    return "\nif __name__ == \"__main__\":" in text or path == ROOT / "train.py"


WINGS = "benchmarks", "kernels", "decode", "training", "data", "viz"
PLACES = "*.py", "data/**/prepare.py", *(f"{wing}/*.py" for wing in WINGS)
FILES = sorted({path for pattern in PLACES for path in ROOT.glob(pattern)})
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in FILES if is_script(path))
CONFIG_READERS = {"train.py", "sample.py", "bench.py", "benchmarks/broken.py"}     # broken.py is train.py
OWN_WORDS = {"data/compress.py": ["c", "FILE"], "benchmarks/broken.py": ["leaky"],
             "bench.py": ["decode"]}
EXECUTED = "from pathlib import Path\nPath('executed').touch()\n"

# what a job does to its streams before it is the script: (code, exit status of --help, what stderr says)
UNREAD = ("import os, sys; r, w = os.pipe(); os.dup2(w, {0}); os.close(r); os.close(w); "
          "sys.std{1} = open({0}, 'w', encoding='utf-8', closefd=False)")
STREAMS = {
    "stdin is closed": ("import os, sys; os.close(0); sys.stdin = None", 0, ""),
    "stdout is closed": ("import os, sys; os.close(1); sys.stdout = None", 0, ""),
    "stderr is closed": ("import os, sys; os.close(2); sys.stderr = None", 0, ""),
    "all are closed": ("import os, sys; os.closerange(0, 3); sys.stdin = sys.stdout = sys.stderr = None",
                       0, ""),
    "stdout is full": ("import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)", 1,
                       "standard output cannot be written (No space left on device)"),
    "stderr is full": ("import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 2)", 0, ""),
    "stdout is read no more": (UNREAD.format(1, "out"), 141, ""),
    "stdout is read no more, unbuffered": (
        UNREAD.format(1, "out") + "; import io; "
        "sys.stdout = io.TextIOWrapper(open(1, 'wb', 0, closefd=False), 'utf-8', write_through=True)",
        141, ""),
    "stderr is read no more": (UNREAD.format(2, "err"), 0, ""),
    "stdout is ascii": ("import sys; sys.stdout = open(1, 'w', encoding='ascii', closefd=False)", 0, ""),
    "stdout is cp1252": ("import sys; sys.stdout = open(1, 'w', encoding='cp1252', closefd=False)", 0, ""),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_takes_its_own_words_and_executes_no_other(tmp_path, script, case):
    """A file that is typed as a word runs only where config files are read."""
    (tmp_path / "other.py").write_text(EXECUTED)
    own = OWN_WORDS.get(script, [])
    lines = {"behind": [*own, "other.py"], "before": ["other.py", *own], "key": [*own, "--", "other.py"],
             "folder": [*own, "."], "missing": [*own, "gone.py"], "empty": [*own, ""]}
    if script in CONFIG_READERS:
        del lines["behind"]
    if script in ("train.py", "sample.py"):
        del lines["before"]
    jobs = {name: Job(script, argv, tmp_path, name=name) for name, argv in lines.items()}
    for name, job in jobs.items():
        said = one_sentence(job.wait(), Path(script).name)
        assert not (tmp_path / "executed").exists(), name
        assert "config file" not in said or script in CONFIG_READERS
        case()


@posix
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_ends_quietly_whatever_its_streams_are(tmp_path, script, case):
    jobs = {name: Job(script, ["--help"], tmp_path, before=before, name=f"job{number}")
            for number, (name, (before, _, _)) in enumerate(STREAMS.items())}
    for name, (_, status, sentence) in STREAMS.items():
        result = jobs[name].wait()
        assert result.status == status, f"{name}: status {result.status}\n{result.err}"
        assert result.err == (f"{Path(script).name}: {sentence}\n" if sentence else ""), name
        case()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_runs_in_the_one_handler(script):
    text = (ROOT / script).read_text(encoding="utf-8")
    assert ("\n    run_script(" in text) != ("\nbegin_script()" in text)
    assert "sys.stdout.reconfigure" not in text and "say_and_exit)" not in text
