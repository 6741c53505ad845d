"""The words of train.py: what is trained on where nothing says so, a text, a block, the folder of a run."""
import os

import pytest
from conftest import ROOT, Job, one_sentence, train_config, words

import configurator
from configurator import ConfigError
from data import dataset, texts
from model import GPTConfig
from training import optimizers
from training.words import Words, blocks

TEXT = "A text of somebody's own, and in it nothing that matters.\n" * 30
SMALL = words(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=2, max_iters=2, eval_iters=1,
              device="cpu", dtype="float32")
RECIPE = str(ROOT / "config" / "train_shakespeare_char.py")
GPT2 = str(ROOT / "config" / "train_gpt2.py")
EWC = str(ROOT / "config" / "continual_ewc.py")
OWN = "batch_size = 12\nmax_iters = 600000\nwandb_log = False\n"             # as nanoGPT's train_gpt2.py


@pytest.fixture(scope="module")
def config():
    return train_config()


@pytest.fixture
def read(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dataset, "DATA", tmp_path / "repo" / "data")
    dataset.DATA.mkdir(parents=True)
    return lambda *argv: Words([str(word) for word in argv], config, GPTConfig)


def run(*argv, folder, **more):
    """train.py in `folder`, with data/ of its own there."""
    (folder / "data").mkdir(exist_ok=True)
    place = str(folder / "data")
    before = f"from data import dataset; import pathlib; dataset.DATA = pathlib.Path({place!r})"
    return Job("train.py", [str(word) for word in argv], folder, before=before, **more).wait()


# -------------------------------------------------- the base ------------------------------------------------

@pytest.mark.parametrize("argv, based", [
    ([], True), (["--max_iters=20"], True), ([str(blocks()["predict"])], True), (["--block=predict"], True),
    ([str(ROOT / "config" / "efficient.py")], True), ([EWC], True), (["--init_from=auto"], True),
    (["--dataset=pylib"], False), ([RECIPE], False), ([GPT2], False), ([GPT2, "--block=window"], False),
    ([str(ROOT / "config" / "eval_gpt2.py")], False), (["own.py"], False)])
def test_the_built_in_run_is_the_base_where_nothing_names_data(read, tmp_path, argv, based):
    (tmp_path / "own.py").write_text(OWN)
    found = read(*argv)
    assert found.based == based and bool(found.about_base("scratch")) == based
    assert (found.keys("scratch").get("n_embd") == 128) == based


def test_what_is_typed_goes_before_the_base_and_a_block_reads_it(read):
    keys = read("--n_embd=64", EWC).keys("scratch")
    assert keys["n_embd"] == 64 and keys["max_iters"] == 2000 and "dataset" not in keys


def test_a_model_that_exists_takes_no_shape_from_the_base(read, tmp_path):
    (tmp_path / "run").mkdir()
    resumed = read("--init_from=resume", "--max_iters=9")
    assert resumed.keys("resume") == {"init_from": "resume", "max_iters": 9} and resumed.out_dir() == "out"
    for start, extra in (("run", "learning_rate"), ("gpt2", None)):
        keys = read(f"--init_from={start}", "--window=8").keys(start)
        assert "n_layer" not in keys and "dataset" not in keys and keys["window"] == 8
        assert ("learning_rate" in keys) == bool(extra)
    built_in, onwards = (configurator.parse(read().cls, [str(ROOT / "config" / name)], files=True)
                         for name in ("train_pylib.py", "retrofit.py"))
    keys = read("--init_from=run", "--learning_rate=1e-3").keys("run")
    assert keys["learning_rate"] == 1e-3 and keys["optimizer"] == built_in["optimizer"]
    for key in onwards.keys() - {"learning_rate"}:
        assert keys[key] == onwards[key] and onwards[key] <= built_in.get(key, 0.02)
    assert "config/retrofit.py" in read("--init_from=run").about_base("run")
    assert "retrofit" not in read().about_base("scratch")
    assert read("--init_from=auto").about_base("resume") is None


def test_the_first_words_that_somebody_types_train(tmp_path):
    result = run("--block=predict", *SMALL, "--mlp_units=32", folder=tmp_path)
    assert result.status == 2 and "data set 'pylib'" in result.err       # there is none here
    (tmp_path / "data" / "pylib").symlink_to(ROOT / "data" / "pylib")
    result = run(*SMALL, "--dry_run", folder=tmp_path)
    assert result.status == 0 and result.out.startswith("base: config/train_pylib.py"), result.err
    assert result.out.count("base:") == 1


@pytest.mark.parametrize("keys, from_iteration", [
    (dict(max_iters=5000, lr_decay_iters=1000, min_lr=0.0, warmup_iters=5), "1,000"),
    (dict(max_iters=1000, lr_decay_iters=1000, min_lr=0.0), None),
    (dict(max_iters=1000, lr_decay_iters=900, min_lr=0.0, warmup_iters=1000), None),
    (dict(max_iters=9, lr_decay_iters=2), None),
    (dict(max_iters=9, lr_decay_iters=2, min_lr=0.0, decay_lr=False), None),
    (dict(max_iters=4, lr_decay_iters=2, min_lr=0.0, tasks="a,b"), None)])
def test_iterations_at_a_learning_rate_of_zero_are_told(config, keys, from_iteration):
    cfg = config(vocab_size=256, **keys)
    told, = optimizers.standstill(cfg) or ("",)
    assert (f"0 from iteration {from_iteration} of" in told) == bool(from_iteration)
    if from_iteration:
        assert f"--lr_decay_iters={cfg.max_iters}" in told
        assert optimizers.learning_rate(cfg, 1000) == 0 < optimizers.learning_rate(cfg, 999)
    elif not cfg.tasks:
        assert optimizers.learning_rate(cfg, cfg.max_iters - 1) > 0


# -------------------------------------------------- blocks --------------------------------------------------

@pytest.mark.parametrize("name", blocks())
def test_a_block_by_its_name_is_its_config(read, name):
    assert read(f"--block={name}").given == read(blocks()[name]).given


def test_blocks_add_up_and_stand_where_they_are_typed(read):
    both = read("--block=predict,window", "--window=32")
    assert both.given["window"] == 32 and both.given["mlp_predict"]
    assert both.out_dir() == "out-pylib-predict-window"
    assert read("--window=32", "--block=window").given["window"] == 64


@pytest.mark.parametrize("word, parts", [
    ("--block=predikt", ("predikt", "did you mean 'predict'?", "columns", "winners")),
    ("--block=", ("--block=predict", "columns")), ("--block", ("--block=predict", "columns")),
    ("--block=window,", ("''", "columns"))])
def test_an_unknown_block_is_one_sentence_with_the_list(tmp_path, word, parts):
    one_sentence(run(word, folder=tmp_path), "train.py", *parts)


# -------------------------------------------------- the folder ----------------------------------------------

@pytest.mark.parametrize("argv, folder", [
    ([], "out-pylib"), (["--block=osc"], "out-pylib-osc"),
    ([RECIPE, "--block=osc"], "out-shakespeare-char-osc"),
    (["--init_from=gpt2", "--block=osc"], "out-gpt2-osc"),
    (["--block=osc", "--out_dir=x"], "x"), (["--dataset=book", "--block=osc"], "out-book-osc"),
    (["--dataset=/a/b/book", "--block=osc"], "out-book-osc"), (["--dataset=book"], "out"),
    (["--init_from=out-pylib", "--block=osc"], "out-pylib-osc"),
    (["--block=osc", "--init_from=resume"], "out-pylib-osc"), ([GPT2], "out-gpt2"),
    (["bio_mine.py"], "mine"), ([RECIPE, "bio_other.py"], "out-shakespeare-char-other")])
def test_a_run_is_named_after_data_and_block_where_no_folder_is_typed(read, tmp_path, argv, folder):
    (tmp_path / "bio_mine.py").write_text("window = 8\nout_dir = 'mine'\n")
    (tmp_path / "bio_other.py").write_text("window = 8\n")
    assert read(*argv).out_dir() == folder


# -------------------------------------------------- a text --------------------------------------------------

def test_a_text_is_trained_on_wherever_it_lies(tmp_path):
    place = tmp_path / "else where"
    place.mkdir()
    (place / "my book.txt").write_text(TEXT)
    result = run(place / "my book.txt", *SMALL, "--block=topk", folder=tmp_path)
    assert result.status == 0, result.err
    assert (tmp_path / "out-my-book-topk" / "ckpt.pt").is_file() and "is data/my-book now" in result.out
    written = (tmp_path / "data" / "my-book" / "train.bin").read_bytes()
    assert (tmp_path / "data" / "my-book").is_dir()
    again = run(place / "my book.txt", *SMALL, "--dry_run", folder=tmp_path)
    assert again.status == 0 and "is data/my-book\n" in again.out
    assert (tmp_path / "data" / "my-book" / "train.bin").read_bytes() == written
    sampled = Job("sample.py", words(out_dir=tmp_path / "out-my-book-topk", num_samples=1, max_new_tokens=3,
                                     device="cpu"), tmp_path).wait()
    assert sampled.status == 0, sampled.err


def test_a_dry_run_of_a_text_writes_nothing(tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    result = run("book.txt", *SMALL, "--dry_run", folder=tmp_path)
    assert result.status == 0 and "becomes data/book" in result.out, result.err
    assert "vocabulary 256" in result.out
    assert not [*(tmp_path / "data").iterdir()] and not (tmp_path / "out-book").exists()


def test_a_run_is_gone_on_from_with_a_block_on_its_own_data(tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    assert run("book.txt", *SMALL, folder=tmp_path).status == 0
    result = run("--init_from=out-book", "--block=window", "--max_iters=2", "--eval_iters=1", "--device=cpu",
                 "--dtype=float32", folder=tmp_path)
    assert result.status == 0 and "data " + str(tmp_path / "data" / "book") in result.out, result.err
    assert (tmp_path / "out-book-window" / "ckpt.pt").is_file()


def test_a_data_set_of_that_name_is_never_overwritten(read, tmp_path):
    first, second = tmp_path / "book.txt", tmp_path / "b" / "book.txt"
    second.parent.mkdir()
    first.write_text(TEXT), second.write_text(TEXT + "more")
    assert texts.data_of(first) == ("book", f"{first} is data/book now")
    before = (dataset.DATA / "book" / "train.bin").read_bytes()
    name, said = texts.data_of(second)
    assert name == "book-2" and "data/book is text file book.txt" in said
    assert texts.data_of(second)[0] == "book-2" and texts.data_of(first)[0] == "book"
    assert (dataset.DATA / "book" / "train.bin").read_bytes() == before
    (dataset.DATA / "mine").mkdir()
    (dataset.DATA / "mine" / "prepare.py").write_text("")
    os.rename(first, tmp_path / "mine.txt")
    assert texts.data_of(tmp_path / "mine.txt")[0] == "mine-2"
    assert [path.name for path in (dataset.DATA / "mine").iterdir()] == ["prepare.py"]


@pytest.mark.parametrize("name", ["a,b:2.txt", "..txt", ".txt.txt", "책.md", "A B  C.txt", "x" * 120 + ".txt",
                                  "train.tar.text"])
def test_any_name_of_a_text_is_that_of_a_data_set(read, tmp_path, name):
    (tmp_path / name).write_text(TEXT)
    found = read(tmp_path / name)
    assert "is data/" in found.prepare_text()
    [(source, weight)] = dataset.named(found.given["dataset"])
    assert dataset.find(source).parent == dataset.DATA and weight == 1
    assert found.out_dir() == f"out-{source}".replace("out-out", "out")


@pytest.mark.parametrize("argv, parts", [
    (["nobook.txt"], ("nobook.txt is no file", "did you mean", "book.txt")),
    (["book.txt", "other.txt"], ("book.txt and other.txt", "one text")),
    (["book.txt", "--dataset=pylib"], ("book.txt", "--dataset")),
    (["book.txt", "--tasks=a,b"], ("book.txt", "--tasks")),
    (["rows.jsonl"], ("rows.jsonl", "python data/prepare.py --input=")),
    (["empty.txt"], ("empty.txt is empty",)), (["bytes.txt"], ("UTF-8",))])
def test_a_text_that_cannot_be_trained_on_is_one_sentence(tmp_path, argv, parts):
    for name, content in (("book.txt", TEXT.encode()), ("other.txt", TEXT.encode()), ("empty.txt", b""),
                          ("bytes.txt", b"\xff\xfe\x00"), ("rows.jsonl", b'{"text": "a"}\n')):
        (tmp_path / name).write_bytes(content)
    one_sentence(run(*argv, folder=tmp_path), "train.py", *parts)
    assert not [*(tmp_path / "data").rglob("*.bin")]


# -------------------------------------------------- downloads -----------------------------------------------

def test_a_large_download_waits_for_a_yes(tmp_path):
    folder = tmp_path / "data" / "big"
    folder.mkdir(parents=True)
    (folder / "prepare.py").write_text('DOWNLOAD = "24 GB"  # of something\nraise SystemExit("it ran")\n')
    refused = run("--dataset=big", *SMALL, folder=tmp_path)
    one_sentence(refused, "train.py", "24 GB", "prepare.py", "--download=True")
    allowed = run("--dataset=big", "--download=True", *SMALL, folder=tmp_path)
    assert allowed.status == 2 and "it ran" in allowed.err


def test_every_large_data_set_says_its_size():
    sizes = {path.parent.name: "DOWNLOAD = " in path.read_text(encoding="utf-8")
             for path in (ROOT / "data").glob("*/prepare.py")}
    large = [name for name, has_size in sorted(sizes.items()) if has_size]
    assert large == ["fineweb_edu", "openwebtext", "tinystories"]
    refused = "openwebtext has no train.bin and no val.bin, and its text is a download of 24 GB"
    if not (ROOT / "data" / "openwebtext" / "train.bin").is_file():
        with pytest.raises(ConfigError, match=refused):
            dataset.prepare_if_missing(str(ROOT / "data" / "openwebtext"))
