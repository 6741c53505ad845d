"""Data sets are found, prepared once, made from a text of the user's own, downloaded and checked."""
import ast
import os
import subprocess
import sys
import time
import unicodedata
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import BLOCK, ROOT, byte_data, same_excepthook, script  # noqa: F401

import configurator
from configurator import ConfigError
from data import dataset
from data.dataset import check, find, prepare_if_missing, write_dataset
from data.tokenizer import CharTokenizer, GPT2Tokenizer, load

torch.set_num_threads(1)
SHARED = ROOT.parent / "shared" / "data"


# ------------------------------------------------------------------------------------------------------------
# finding and preparing

@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """An empty data/ in place of the repository's, and no ./data."""
    monkeypatch.setattr(dataset, "DATA", tmp_path / "repo" / "data")
    dataset.DATA.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return dataset.DATA


def test_a_data_set_is_found_by_name_below_either_data_folder_or_by_path(data_folder, tmp_path):
    for folder in (data_folder / "one", tmp_path / "data" / "two", tmp_path / "elsewhere" / "three"):
        folder.mkdir(parents=True)
    assert find("one") == data_folder / "one" and find("two") == Path("data/two")
    assert find("elsewhere/three") == Path("elsewhere/three")
    assert find(str(tmp_path / "elsewhere")) == tmp_path / "elsewhere"


@pytest.mark.parametrize("name", ["pylob", "", "no/such/place"])
def test_an_unknown_data_set_says_what_to_type(data_folder, name):
    (data_folder / "pylib").mkdir()
    with pytest.raises(ConfigError, match=r"python data/prepare.py --input=FILE.txt --name=") as caught:
        find(name)
    assert ("did you mean 'pylib'" in str(caught.value)) == (name == "pylob")


def with_script(folder, text):
    folder.mkdir()
    (folder / "prepare.py").write_text(text)


def test_missing_data_is_prepared_once(data_folder, capfd):
    with_script(data_folder / "mine", "from pathlib import Path\nprint('at work')\n"
                "for n in ('train', 'val'): Path(__file__).with_name(n + '.bin').write_bytes(b'xx')\n")
    assert prepare_if_missing("mine") == data_folder / "mine"
    assert "running" in (said := capfd.readouterr().out) and "at work" in said
    prepare_if_missing("mine")
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("text, expected", [
    ("import sys; print('noise', file=sys.stderr); sys.exit('prepare.py: no such text')", "no such text"),
    ("raise ValueError('bad luck')", "ValueError: bad luck"), ("raise SystemExit(3)", "status 3"),
    ("pass", "has no train.bin and no val.bin still")])
def test_a_failing_preparation_is_told_by_its_last_line(data_folder, text, expected):
    with_script(data_folder / "mine", text)
    with pytest.raises(ConfigError) as caught:
        prepare_if_missing("mine")
    sentence = str(caught.value)
    assert expected in sentence and "\n" not in sentence and "noise" not in sentence


def test_a_folder_without_data_or_script_says_what_to_type(data_folder):
    (data_folder / "mine").mkdir()
    with pytest.raises(ConfigError, match=r"train_pylib.py.*--name=mine"):
        prepare_if_missing("mine")


# ------------------------------------------------------------------------------------------------------------
# a text of the user's own

@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="ab'! \n\t\x1f한", max_size=60), size=st.integers(1, 7))
def test_cut_text_gives_gpt2_the_ids_of_the_whole(gpt2, text, size):
    pieces = list(dataset.whole_words(text[i:i + size] for i in range(0, len(text), size)))
    assert [i for piece in pieces for i in gpt2.encode(piece)] == gpt2.encode(text)
    assert max(map(len, dataset.whole_words(["word "] * 20))) < 20, "a piece must not grow with the text"


@pytest.fixture(scope="module")
def gpt2():
    if not (SHARED / "gpt2_bpe").is_dir():
        pytest.skip(f"GPT-2's vocabulary is not in {SHARED}/gpt2_bpe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCORTEX_GPT2_BPE", str(SHARED / "gpt2_bpe"))
        yield GPT2Tokenizer()


@pytest.mark.parametrize("kind", ["byte", "char"])
def test_a_text_of_ones_own_becomes_a_data_set(data_folder, tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setattr(dataset, "TEXT_CHUNK", 64)
    text = "한글 text,\nwith two lines. " * 40
    (tmp_path / "own.txt").write_text(text, encoding="utf-8")
    words = [f"--input={tmp_path}/own.txt", "--name=mine", f"--tokenizer={kind}", "--val_fraction=0.25"]
    script("prepare.py").main(words)
    assert "mine" in capsys.readouterr().out
    folder, made = find("mine"), load(find("mine"))
    counts = check(folder, BLOCK, made.vocab_size)
    both = [made.decode(np.fromfile(folder / f"{s}.bin", np.uint16)) for s in ("train", "val")]
    assert "".join(both) == text and len(both[1]) == len(text) // 4
    assert counts["train"] == len(made.encode(both[0]))


@pytest.mark.parametrize("name", ["", "..", ".", "../x", "a/b", "a\\b", "/tmp/x", ".hidden", "a b", "x\n"])
def test_a_name_that_is_no_plain_folder_name_is_refused(data_folder, tmp_path, name):
    (tmp_path / "own.txt").write_text("some text " * 100)
    with pytest.raises(ConfigError, match="plain folder name"):
        script("prepare.py").main([f"--input={tmp_path}/own.txt", f"--name={name}"])
    assert list(data_folder.iterdir()) == []


def test_a_built_in_data_set_is_not_overwritten(data_folder, tmp_path):
    with_script(data_folder / "pylib", "")
    (tmp_path / "own.txt").write_text("some text " * 100)
    with pytest.raises(ConfigError, match="choose another --name"):
        script("prepare.py").main([f"--input={tmp_path}/own.txt", "--name=pylib"])


@pytest.mark.parametrize("content, expected", [
    (None, "does not exist"), (b"", "empty"), (b"\x89PNG\r\n\x1a\n\0\0", "0x89"), (b"a\0b" * 99, "NUL"),
    ("text".encode("utf-16") * 99, "0xff"), (b"x", "too short")])
@pytest.mark.parametrize("path", ["prepare.py", "shakespeare_char/prepare.py"])
def test_an_input_that_is_no_text_is_one_sentence(data_folder, tmp_path, content, expected, path):
    if content is not None:
        (tmp_path / "own.txt").write_bytes(content)
    target = "--name=mine" if path == "prepare.py" else f"--out_dir={tmp_path}/out"
    with pytest.raises(ConfigError, match=expected) as caught:
        script(path).main([f"--input={tmp_path}/own.txt", target])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.tmp"))


# ------------------------------------------------------------------------------------------------------------
# the prepared data sets

def test_the_default_data_is_the_same_in_every_run_and_holds_no_tests(tmp_path, monkeypatch, capsys):
    library = tmp_path / "lib"
    for i in range(60):
        (library / f"package{i % 3}").mkdir(parents=True, exist_ok=True)
        (library / f"package{i % 3}" / f"module{i}.py").write_text(f"number_of_this_module = {i}  # ü\n")
    for excluded in ("tests/a.py", "test/b.py", "site-packages/c.py", "dist-packages/d.py",
                     "lib-dynload/e.py",
                     "package0/test_f.py", "__pycache__/g.py", "idlelib/idle_test/h.py", "notes.txt"):
        (library / excluded).parent.mkdir(parents=True, exist_ok=True)
        (library / excluded).write_text("EXCLUDED")
    (library / "latin.py").write_bytes(b"EXCLUDED = '\xff'")
    module = script("pylib/prepare.py")
    monkeypatch.setattr(module, "roots", lambda site_packages: [str(library)])
    for out in ("one", "two"):
        module.main([f"--out_dir={tmp_path / out}"])
    texts = {}
    for name in ("train.bin", "val.bin"):
        one, two = ((tmp_path / out / name).read_bytes() for out in ("one", "two"))
        assert one == two
        texts[name] = load(tmp_path / "one").decode(np.frombuffer(one, np.uint16))
    files = [text for name in texts for text in texts[name].split("\0")]
    assert sorted(filter(None, files)) == sorted(f"number_of_this_module = {i}  # ü\n" for i in range(60))
    assert all(text.endswith("\0") for text in texts.values())
    check(tmp_path / "one", BLOCK, 256)


def test_the_files_held_out_are_chosen_by_name_alone():
    module = script("pylib/prepare.py")
    held = [name for name in (f"package/module{i}.py" for i in range(2000)) if module.held_out(name)]
    assert 60 < len(held) < 140 and held[:2] == HELD_OUT


HELD_OUT = ["package/module7.py", "package/module12.py"]


def test_the_standard_library_is_there_to_be_read():
    module = script("pylib/prepare.py")
    names = [name for name, _ in module.sources(module.roots(False)[0])]
    assert {"json/decoder.py", "os.py"} <= set(names) and len(names) > 300
    assert names == sorted(names), "the order must not depend on the file system"
    assert not [n for n in names if {"tests", "test", "site-packages"} & set(n.split("/"))]
    assert any(module.held_out(n) for n in names)


def shakespeare(tmp_path):
    if not (SHARED / "tinyshakespeare.txt").is_file():
        pytest.skip(f"Shakespeare is not in {SHARED}/tinyshakespeare.txt")
    text = (SHARED / "tinyshakespeare.txt").read_text(encoding="utf-8").rstrip("\n") + "\n"
    (tmp_path / "input.txt").write_text(text, encoding="utf-8")     # the copy may lack the last line end
    return text


def test_shakespeare_by_character_has_nanogpts_counts_and_ids(tmp_path, capsys):
    text = shakespeare(tmp_path)
    script("shakespeare_char/prepare.py").main([f"--input={tmp_path}/input.txt", f"--out_dir={tmp_path}"])
    assert check(tmp_path, 256, 65) == {"train": 1_003_854, "val": 111_540}
    stoi = {char: i for i, char in enumerate(sorted(set(text)))}
    assert np.fromfile(tmp_path / "val.bin", np.uint16).tolist() == [stoi[c] for c in text[1_003_854:]]


def test_shakespeare_by_gpt2_has_nanogpts_counts(tmp_path, capsys, gpt2):
    shakespeare(tmp_path)
    script("shakespeare/prepare.py").main([f"--input={tmp_path}/input.txt", f"--out_dir={tmp_path}"])
    assert check(tmp_path, 256, 50257) == {"train": 301_966, "val": 36_059}


OFFLINE = """
import runpy, socket, sys
def refuse(*args, **kwargs):
    raise OSError("network is unreachable")
socket.socket.connect = socket.getaddrinfo = refuse
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", ["shakespeare_char", "shakespeare"])
def test_a_download_without_network_is_one_sentence_and_status_2(tmp_path, name):
    (tmp_path / "data" / name).mkdir(parents=True)
    path = tmp_path / "data" / name / "prepare.py"
    path.write_bytes((ROOT / "data" / name / "prepare.py").read_bytes())
    child = subprocess.run([sys.executable, "-c", OFFLINE, str(path)], capture_output=True, text=True,
                           timeout=60, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert child.returncode == 2 and "--input=FILE" in child.stderr and "Traceback" not in child.stderr
    assert len(child.stderr.strip().splitlines()) == 1
    assert [p.name for p in path.parent.iterdir()] == ["prepare.py"]


class Answer:
    """What urlopen gives: the bytes of a web page."""
    def __init__(self, body):
        self.read = lambda: body

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


def test_a_download_of_something_else_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    page = b"<!doctype html><title>Log in</title>"
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Answer(page))
    with pytest.raises(ConfigError, match=r"doctype html.*--input=FILE"):
        dataset.text_file("", tmp_path, **dataset.SHAKESPEARE)
    assert list(tmp_path.iterdir()) == []


def test_the_real_text_passes_the_check_of_the_download(tmp_path, monkeypatch):
    text = shakespeare(tmp_path).encode()
    (tmp_path / "input.txt").unlink()
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Answer(text))
    assert dataset.text_file("", tmp_path, **dataset.SHAKESPEARE).read_bytes() == text
    assert [p.name for p in tmp_path.iterdir()] == ["input.txt"]


@pytest.mark.parametrize("path", ["prepare.py", "pylib/prepare.py", "shakespeare/prepare.py",
                                  "shakespeare_char/prepare.py"])
def test_every_key_of_a_script_has_a_meaning(path):
    module = script(path)
    config = next(v for k, v in vars(module).items() if hasattr(v, "__dataclass_fields__"))
    meanings = configurator.meanings(config)
    assert set(config.__dataclass_fields__) == set(meanings)
    assert "run_script(main)" in ast.unparse(ast.parse(Path(module.__file__).read_text()).body[-1])


# ------------------------------------------------------------------------------------------------------------
# paths and names

def folder_of(path, prepared=True, prepare_py=False):
    path.mkdir(parents=True)
    if prepared:
        byte_data(path)
    if prepare_py:
        (path / "prepare.py").write_text("raise SystemExit('it must not run')")
    return path


@pytest.mark.parametrize("typed", ["./a1", "../here/a1", "a1/", "{}/a1", "~/a1", "./b/../a1"])
def test_a_path_that_says_that_it_is_one_is_never_a_name(data_folder, tmp_path, monkeypatch, typed):
    folder_of(data_folder / "a1")
    folder_of(tmp_path / "here" / "data" / "a1")
    own = folder_of(tmp_path / "here" / "a1", prepared=False)
    (own.parent / "b").mkdir()
    monkeypatch.setenv("HOME", str(own.parent))
    monkeypatch.setenv("USERPROFILE", str(own.parent))
    monkeypatch.chdir(own.parent)
    assert find(typed.format(own.parent)).samefile(own) and find("a1") == data_folder / "a1"
    own.rename(own.parent / "gone")
    with pytest.raises(ConfigError, match="is no folder, did you mean 'a1'"):
        find(typed.format(own.parent))


def test_data_that_is_prepared_goes_before_a_folder_that_is_not(data_folder, tmp_path, capfd):
    folder_of(data_folder / "own", prepared=False, prepare_py=True)
    folder_of(tmp_path / "data" / "own", prepared=False)
    assert find("own") == data_folder / "own", "without data anywhere it is the one that can make it"
    byte_data(tmp_path / "data" / "own")
    assert prepare_if_missing("own") == Path("data/own")
    folder_of(data_folder / "two", prepared=False, prepare_py=True)
    assert prepare_if_missing(str(folder_of(tmp_path / "two"))) == tmp_path / "two"
    assert find("two") == Path("two") and capfd.readouterr() == ("", "")


def test_of_two_prepared_folders_of_one_name_the_other_one_is_named_once(data_folder, tmp_path, capsys):
    folder_of(data_folder / "twice")
    folder_of(tmp_path / "data" / "twice")
    assert find("twice") == find("twice") == data_folder / "twice"
    error = capsys.readouterr().err
    other = os.path.join(".", "data", "twice")
    assert error.count("note: ") == 1 and f"type --dataset={other} for the other one" in error
    assert find(other).samefile(tmp_path / "data" / "twice")


def test_everything_that_takes_a_data_set_takes_a_path(data_folder, tmp_path, monkeypatch):
    import sample
    from viz import plots
    folder_of(data_folder / "a1")
    own = folder_of(tmp_path / "a1", prepared=False)
    write_dataset(own, {split: [[1, 0] * 50] for split in ("train", "val")}, CharTokenizer(["a", "b"]), "own")
    assert dataset.prepare_sources("./a1:2,a1") == [(Path("a1"), 2.0), (data_folder / "a1", 1.0)]
    given = sample.tokenizer_of({"config": {"dataset": "./a1"}}, "", 256)
    assert given.vocab_size == 2 and sample.tokenizer_of({}, "./a1", 256).vocab_size == 2
    assert sample.tokenizer_of({}, "a1", 256).vocab_size == 256
    assert dataset.tokenizer_place("./a1") == str(own) and dataset.tokenizer_place("byte") == "byte"
    assert plots.datasets is dataset
    assert dataset.tokenizer_place(str(folder_of(tmp_path / "byte"))) == str(tmp_path / "byte")
    assert dataset.tokenizer_place("./byte") == str(tmp_path / "byte"), "a path is no kind"


def test_a_name_that_unicode_spells_in_two_ways_is_one_name(data_folder, tmp_path, capsys):
    composed, parts = "한글 é".replace(" ", "_"), unicodedata.normalize("NFD", "한글_é")
    assert composed != parts
    (tmp_path / "own.txt").write_text("some text " * 100)
    script("prepare.py").main([f"--input={tmp_path}/own.txt", f"--name={parts}"])
    assert [path.name for path in data_folder.iterdir()] == [composed]
    assert find(parts) == find(composed) == data_folder / composed
    folder_of(data_folder / unicodedata.normalize("NFD", "맥"))
    assert find("맥").is_dir() and find(str(data_folder / "맥")).is_dir()
    script("prepare.py").main([f"--input={tmp_path}/own.txt", "--name=맥"])
    assert len(list(data_folder.iterdir())) == 2, "it is the folder that is there"


def test_the_home_folder_is_put_in_full(data_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "own.txt").write_text("some text " * 100)
    script("prepare.py").main(["--input=~/own.txt", "--name=mine"])
    script("shakespeare_char/prepare.py").main(["--input=~/own.txt", "--out_dir=~/out"])
    assert load(tmp_path / "home" / "out").vocab_size == 7 and find("mine").is_dir()
    script("prepare.py").main(["--input=~/own.txt", "--name=again", "--tokenizer=~/out"])
    assert load(find("again")).vocab_size == 7 and not Path("~").exists()


def test_what_another_process_prepares_is_waited_for(data_folder, capfd):
    """Two trainings that begin at once, of which one has begun to prepare the data that both lack."""
    slowly = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
              "from data import dataset, tokenizer\n"
              "from pathlib import Path\n"
              "def pieces():\n    time.sleep(1)\n    yield [1] * 100\n"
              "sys.excepthook = __import__('configurator').say_and_exit\n"
              "dataset.write_dataset(Path(__file__).parent, {'train': pieces(), 'val': [[2] * 100]},\n"
              "                      tokenizer.ByteTokenizer(), 'here')\n")
    with_script(data_folder / "mine", slowly)
    first = subprocess.Popen([sys.executable, str(data_folder / "mine" / "prepare.py")])
    limit = time.time() + 60
    while not (data_folder / "mine" / dataset.LOCK).exists() and time.time() < limit:
        time.sleep(0.01)
    assert prepare_if_missing("mine") == data_folder / "mine" and first.wait() == 0
    printed = capfd.readouterr().out
    assert f"is being prepared by process {first.pid}" in printed and "running" not in printed
    assert check(data_folder / "mine", BLOCK, 256) == {"train": 100, "val": 100}


@pytest.mark.parametrize("make", [os.mkdir, getattr(os, "mkfifo", os.mkdir)])
def test_an_input_that_is_no_plain_file_is_one_sentence(data_folder, tmp_path, make):
    make(tmp_path / "own")
    with pytest.raises(ConfigError, match=r"is no plain file|holds none of"):
        script("prepare.py").main([f"--input={tmp_path}/own", "--name=mine"])


def test_a_text_without_a_space_is_put_together_once(monkeypatch):
    """Its pieces were joined anew at every piece, which takes the square of its length."""
    searched, search = [], dataset.re.search
    monkeypatch.setattr(dataset.re, "search", lambda *words: searched.append(len(words[1])) or search(*words))
    text = "ACGT" * 5000
    assert "".join(dataset.whole_words(text[i:i + 100] for i in range(0, len(text), 100))) == text
    assert len(searched) == 200 and sum(searched) < 1.1 * len(text)


PROMPT = ("import runpy, sys; sys.path.insert(0, {root!r}); import sample; "
          "sys.stdout.reconfigure(encoding='utf-8'); print(ascii(sample.prompt_of(sys.argv[1])))")


@pytest.mark.parametrize("content, expected, note", [
    (b"\xef\xbb\xbfdef main(\r\n", "def main(\n", False),
    ("\u1112\u1161\u11ab".encode(), "\u1112\u1161\u11ab", True),
    ("한".encode(), "한", False)], ids=["mark", "in parts", "whole"])
def test_a_prompt_comes_from_a_file_or_a_pipe(tmp_path, monkeypatch, capsys, content, expected, note):
    import sample
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "prompt.txt").write_bytes(content)
    for start in (f"FILE:{tmp_path}/prompt.txt", "FILE:~/prompt.txt"):
        assert sample.prompt_of(start) == expected
        assert ("note: start has letters that are spelled in parts" in capsys.readouterr().err) == note
    if os.path.exists("/dev/stdin"):
        child = subprocess.run([sys.executable, "-c", PROMPT.format(root=str(ROOT)), "FILE:/dev/stdin"],
                               input=content, capture_output=True, timeout=90, check=True)
        assert ast.literal_eval(child.stdout.decode().strip()) == expected
    with pytest.raises(ConfigError, match="does not exist"):
        sample.prompt_of(f"FILE:{tmp_path}")
