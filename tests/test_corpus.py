"""Corpora: streamed from files that the tests make, killed and begun again, without any network."""
import json
import os
import signal
import socket
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import Job, one_sentence, words
from test_data import script

import corpus
import dataset
from configurator import ConfigError
from tokenizer import ByteTokenizer, load

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(autouse=True)
def same_excepthook(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def texts(count, seed=0):
    draw = np.random.default_rng(seed)
    return [f"문서 {i}: " + "word " * int(draw.integers(1, 60)) + f"끝 {i}\n" for i in range(count)]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    return path


def documents_of(folder):
    """The documents in both splits, and how many are in each."""
    made = load(folder)
    ids = [np.fromfile(folder / f"{split}.bin", np.uint16) for split in ("train", "val")]
    found = [made.decode(split).split("\0") for split in ids]
    assert all(split[-1] == "" for split in found), "every document must end"
    return sorted(found[0][:-1] + found[1][:-1]), [len(split) - 1 for split in found]


def bins(folder):
    return {split: (folder / f"{split}.bin").read_bytes() for split in ("train", "val")}


# ------------------------------------------------------------------------------------------------------------
# the scripts of the corpora, on files with the columns of the Hub's

def question(text):
    return {"title": "제목", "context": text, "question": "?", "answers": {"text": ["1"]}}


def pair(text):
    return {"translation": {"en": text.strip(), "ko": text.strip()}}


SCRIPTS = {
    "openwebtext": lambda text: ({"text": text}, text),
    "fineweb_edu": lambda text: ({"text": text, "score": 3.5}, text),
    "tinystories": lambda text: ({"text": text}, text),
    "klue": lambda text: (question(text), f"제목\n{text}\n"),
    "korquad": lambda text: (question(text), f"제목\n{text}\n"),
    "opus_en_ko": lambda text: (pair(text), (text.strip() + "\n") * 2),
}


@pytest.mark.parametrize("write, ending", [(write_parquet, ".parquet"), (write_jsonl, ".jsonl")])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_corpus_is_prepared_from_files_that_one_has(tmp_path, capsys, name, write, ending):
    pairs = [SCRIPTS[name](text) for text in texts(80)]
    for i in range(2):
        write(tmp_path / "in" / f"part{i}{ending}", [row for row, _ in pairs[i * 40:i * 40 + 40]])
    argv = [f"--input={tmp_path / 'in'}", f"--out_dir={tmp_path / 'out'}"]
    script(f"{name}/prepare.py").main([*argv, "--tokenizer=byte", "--val_fraction=0.2"])
    found, counts = documents_of(tmp_path / "out")
    assert found == sorted(text for _, text in pairs) and 0 < counts[1] < 40
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["documents"] == 80 and meta["passed_over"] == 0
    assert dataset.check(tmp_path / "out", 16, 256) == meta["tokens"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["meta.json", "train.bin", "val.bin"]


@pytest.mark.parametrize("name", [*SCRIPTS, "enwik8", "bilingual"])
def test_a_script_is_short_and_every_key_has_a_meaning(name):
    import configurator
    module = script(f"{name}/prepare.py")
    assert len(Path(module.__file__).read_text().splitlines()) <= (80 if name != "bilingual" else 140)
    configs = [v for v in vars(module).values() if hasattr(v, "__dataclass_fields__")]
    for config in configs:
        assert set(config.__dataclass_fields__) == set(configurator.meanings(config))


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_a_network_a_corpus_is_one_sentence(tmp_path, monkeypatch, name):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: socket.create_connection(("hub", 443)))
    with pytest.raises(ConfigError, match=r"could not be reached.*--input=FOLDER") as caught:
        script(f"{name}/prepare.py").main([f"--out_dir={tmp_path}"])
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_the_hubs_own_client_without_a_network_is_one_sentence(tmp_path):
    before = ("import socket, time\n"
              "time.sleep = lambda seconds: None       # the client waits between its tries\n"
              "def refuse(*a, **k): raise OSError('network is unreachable')\n"
              "socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse")
    result = Job("data/tinystories/prepare.py", words(out_dir=tmp_path / "out"), tmp_path,
                 {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}, before).wait()
    one_sentence(result, "prepare.py", "could not be reached", "--input=FOLDER")


def test_enwik8_is_checked_and_split_where_everyone_does(tmp_path, monkeypatch, capsys):
    import hashlib
    import zipfile
    content = bytes(range(1, 256)) * 40
    module = script("enwik8/prepare.py")
    argv = [f"--input={tmp_path / 'enwik8.zip'}", f"--out_dir={tmp_path / 'out'}"]
    with zipfile.ZipFile(tmp_path / "enwik8.zip", "w") as archive:
        archive.writestr("enwik8", content)
    with pytest.raises(ConfigError, match=r"is not enwik8: 10,200 bytes"):
        module.main(argv)
    monkeypatch.setattr(module, "SIZE", len(content))
    monkeypatch.setattr(module, "MD5", hashlib.md5(content).hexdigest())
    monkeypatch.setattr(module, "SPLITS", {"train": (0, 9000), "val": (9000, 9500)})
    monkeypatch.setattr(module, "CHUNK", 999)
    module.main(argv)
    got = {split: np.fromfile(tmp_path / "out" / f"{split}.bin", np.uint16).astype(np.uint8).tobytes()
           for split in ("train", "val")}
    assert got == {"train": content[:9000], "val": content[9000:9500]}


# ------------------------------------------------------------------------------------------------------------
# killed and begun again

@pytest.fixture
def stream(tmp_path, monkeypatch):
    """write(folder, stop_after) -> meta; stop_after: documents until it is interrupted."""
    rows = [{"text": text} for text in texts(300)] + [{"text": None}, {"text": ""}, {"text": "a\0b"}]
    rows.insert(150, rows[149])                                     # the same again
    for i in range(3):
        write_parquet(tmp_path / "in" / f"{i}.parquet", rows[i * 100:i * 100 + 100 + 10 * (i == 2)])
    monkeypatch.setattr(corpus, "PART_TOKENS", 3000)
    monkeypatch.setattr(corpus, "BATCH_CHARS", 500)

    def write(folder, stop_after=None):
        def text(row):
            nonlocal seen
            seen += 1
            if stop_after and seen > stop_after:
                raise KeyboardInterrupt
            return row["text"]
        seen = 0
        documents = corpus.Documents(corpus.local_rows(tmp_path / "in"), text)
        return corpus.write_corpus(folder, documents, ByteTokenizer(), 0.1, "files"), seen
    return write


def test_an_interrupted_preparation_goes_on_and_ends_with_the_same_files(stream, tmp_path):
    whole, rows = stream(tmp_path / "whole")
    assert whole["documents"] == 300 and whole["passed_over"] == 4 and rows == 304
    for stops in ([80], [149], [151], [250], [40, 100, 60, 90], [303]):
        folder = tmp_path / f"stopped{stops}"
        for stop in stops:
            with pytest.raises(KeyboardInterrupt):
                stream(folder, stop)
        meta, again = stream(folder)
        assert meta == whole and bins(folder) == bins(tmp_path / "whole")
        assert again < 304 or stops == [40], "it must not begin at the beginning"
        assert not (folder / "progress.json").exists()


def test_a_damaged_part_is_noticed(stream, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        stream(tmp_path / "out", 250)
    path = tmp_path / "out" / "train.part.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"train.part.bin is not what progress.json says: remove both"):
        stream(tmp_path / "out")


def test_what_was_begun_from_other_files_or_tokenizers_is_begun_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PART_TOKENS", 100)
    monkeypatch.setattr(corpus, "BATCH_CHARS", 100)
    write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts(50)])

    def write(source, stop):
        def text(row):
            nonlocal seen
            seen += 1
            if stop and seen > stop:
                raise KeyboardInterrupt
            return row["text"]
        seen = 0
        documents = corpus.Documents(corpus.local_rows(tmp_path / "in.jsonl"), text)
        corpus.write_corpus(tmp_path / "out", documents, ByteTokenizer(), 0.1, source)
        return seen
    with pytest.raises(KeyboardInterrupt):
        write("one source", 30)
    assert write("another", None) == 50


SMALL_PARTS = ("import corpus, dataset, pathlib; corpus.PART_TOKENS, corpus.BATCH_CHARS = 20000, 2000; "
               "dataset.DATA = pathlib.Path({!r})")
SLOWLY = ("; import time; write = corpus.Parts.write; "
          "corpus.Parts.write = lambda *args: (time.sleep(0.005), write(*args))")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_killed_process_leaves_what_the_next_one_goes_on_from(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts(600)])

    def start(name, slowly=""):
        argv, before = words(input=tmp_path / "in.jsonl", name=name), SMALL_PARTS.format(str(tmp_path))
        return Job("data/prepare.py", argv, tmp_path, before=before + slowly, name=name)
    rows = corpus.Documents(corpus.local_rows(tmp_path / "in.jsonl"), corpus.column("text"))
    corpus.write_corpus(tmp_path / "whole", rows, ByteTokenizer(), 0.1, "in one go")
    child, limit = start("killed", SLOWLY), time.time() + 60
    while not (tmp_path / "killed" / "progress.json").exists() and time.time() < limit:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait().status == -signal.SIGKILL and not (tmp_path / "killed" / "train.bin").exists()
    again = start("killed").wait()
    assert again.status == 0 and "going on after" in again.out, again.err
    assert bins(tmp_path / "killed") == bins(tmp_path / "whole")


# ------------------------------------------------------------------------------------------------------------
# text of one's own

@pytest.fixture
def own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dataset, "DATA", tmp_path / "data")

    def prepare(path, *argv):
        script("prepare.py").main([f"--input={path}", "--name=mine", "--val_fraction=0.3", *argv])
        return tmp_path / "data" / "mine"
    return prepare


def test_a_folder_of_texts_is_a_document_each(own, tmp_path):
    for i, text in enumerate(texts(30)):
        (tmp_path / "in" / f"{i % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / f"{i % 3}" / f"{i}.txt").write_text(text, encoding="utf-8")
    assert documents_of(own(tmp_path / "in"))[0] == sorted(texts(30))


def test_another_column_and_a_learned_vocabulary(own, tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", [{"body": text} for text in texts(40)])
    folder = own(path, "--column=body", "--tokenizer=bpe", "--vocab_size=300")
    made = load(folder)
    text = made.decode(np.fromfile(folder / "train.bin", np.uint16))
    assert made.vocab_size == 300 and set(text.split("<|endoftext|>")) <= {*texts(40), ""}
    again = own(path, "--column=body", f"--tokenizer={folder}")
    assert load(again).vocabulary == made.vocabulary


@pytest.mark.parametrize("content, expected", [
    ('{"text": "a"}\n{"text": ', "JSON parse error"), ('{"other": "a"}\n', "--column=ANOTHER"),
    ('{"text": 3}\n', "no text"), ("", "is empty")])
def test_a_bad_jsonl_is_one_sentence(own, tmp_path, content, expected):
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(ConfigError) as caught:
        own(tmp_path / "in.jsonl")
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("names, expected", [
    (["a.txt", "b.jsonl"], "mixes json and text"), (["a.pdf"], "holds none of"), ([], "holds none of")])
def test_a_folder_that_is_no_corpus_is_one_sentence(own, tmp_path, names, expected):
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / name).write_text("text")
    with pytest.raises(ConfigError, match=expected):
        own(tmp_path / "in")


@pytest.mark.parametrize("argv, expected", [
    (["--tokenizer=bpe"], "--vocab_size=1000"), (["--vocab_size=500"], "type --tokenizer=bpe"),
    (["--tokenizer=bite"], "did you mean 'byte'")])
def test_a_bad_choice_of_tokenizer_says_what_to_type(own, tmp_path, argv, expected):
    with pytest.raises(ConfigError, match=expected):
        own(tmp_path / "in.txt", *argv)


def test_a_text_file_with_a_small_vocabulary_of_its_own(own, tmp_path):
    (tmp_path / "in.txt").write_text("".join(texts(200)), encoding="utf-8")
    folder = own(tmp_path / "in.txt", "--tokenizer=bpe", "--vocab_size=500")
    made = load(folder)
    both = [made.decode(np.fromfile(folder / f"{s}.bin", np.uint16)) for s in ("train", "val")]
    assert "".join(both) == "".join(texts(200)) and made.vocab_size <= 500


def test_characters_end_documents_with_a_nul_only_where_they_have_one(own, tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts(5)])
    with pytest.raises(ConfigError, match="--tokenizer=byte"):
        own(path, "--tokenizer=char")


def test_the_same_text_is_on_the_same_side_in_every_corpus():
    sides = [[split for split, _ in corpus.encoded(some, ByteTokenizer(), 0.3)]
             for some in (texts(50), texts(50)[::-1])]
    assert sides[0] == sides[1][::-1] and 5 < sides[0].count("val") < 25


def test_documents_are_read_in_batches_and_no_further():
    class Rows(list):
        def __iter__(self):
            for row in list.__iter__(self):
                read.append(row)
                yield row
    read = []
    sizes = []
    for batch in corpus.batches(Rows(["x" * (corpus.BATCH_CHARS // 4)] * 10)):
        sizes.append(len(batch))
        assert len(read) == sum(sizes)
    assert sizes == [4, 4, 2] and all(a >= b for a, b in pairwise(sizes))
