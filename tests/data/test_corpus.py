"""Corpora: streamed from files that the tests make, killed and begun again, without any network."""
import csv
import gzip
import io
import json
import os
import signal
import socket
import sys
import time
import unicodedata
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import Job, one_sentence, words
from test_data import script

from configurator import ConfigError
from data import corpus, dataset
from data.tokenizer import ByteTokenizer, load
from training import processes

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


SMALL_PARTS = ("import pathlib; from data import corpus, dataset; "
               "corpus.PART_TOKENS, corpus.BATCH_CHARS = 20000, 2000; "
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
    ('{"text": "a"}\n{"text": ', "is no JSON"), ('{"other": "a"}\n', "--column=ANOTHER"),
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


# ------------------------------------------------------------------------------------------------------------
# F27: every document is used, or named as left out with the reason

T = texts(30)


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def rows_of(some, **more):
    return [{"text": text} | more for text in some]


def table(rows, **types):
    """The bytes of a parquet file."""
    out = pyarrow.BufferOutputStream()
    made = pyarrow.Table.from_pylist(rows)
    for name, kind in types.items():
        made = made.set_column(made.schema.get_field_index(name), name, made[name].cast(kind))
    parquet.write_table(made, out, row_group_size=7)
    return out.getvalue().to_pybytes()


def csv_of(rows, delimiter=","):
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows(rows)
    return out.getvalue().encode()


def zst(content):
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def link(target):
    return lambda path: path.symlink_to(target, target_is_directory=True)


A, B = T[:15], T[15:]
JSON_A, JSON_B = jsonl(rows_of(A)), jsonl(rows_of(B))
BOTH = {"a.jsonl": JSON_A + JSON_B}
TEXTS = {f"{i:02}.txt": text.encode() for i, text in enumerate(T)}


def within(line):
    """One line among good ones, the 16th."""
    return {"a.jsonl": JSON_A + line + b"\n" + JSON_B}


def cells(some):
    return csv_of([[text] for text in some])


BOM = b"\xef\xbb\xbf"
USED = {                                        # what is in a folder: all documents are used, without a word
    "a suffix in capitals": {"a.jsonl": JSON_A, "B.JSONL": JSON_B},
    "ndjson": {"a.jsonl": JSON_A, "b.ndjson": JSON_B},
    "gz": {"a.jsonl.gz": gzip.compress(JSON_A), "b.JSONL.GZ": gzip.compress(JSON_B)},
    "gz in two members": {"a.jsonl.gz": gzip.compress(JSON_A) + gzip.compress(JSON_B)},
    "zst": {"a.jsonl.zst": zst(JSON_A), "b.jsonl": JSON_B},
    "zst in two frames": {"a.jsonl.zst": zst(JSON_A) + zst(JSON_B)},
    "texts in gz": {f"{i:02}.txt.gz": gzip.compress(text.encode()) for i, text in enumerate(T)},
    "Markdown and text": {f"{i:02}.{'md' if i % 2 else 'TXT'}": text.encode() for i, text in enumerate(T)},
    "a list in JSON": {"a.json": json.dumps(rows_of(A), indent=1).encode(),
                       "b.json.gz": gzip.compress(JSON_B)},
    "one object a file": {f"{i:02}.json": json.dumps({"text": text}, indent=1).encode()
                          for i, text in enumerate(T)},
    "csv and tsv": {"a.csv": csv_of([["id", "text"], *enumerate(A)]),
                    "b.tsv": csv_of([["text", "id"], *((text, "1, 2") for text in B)], "\t")},
    "csv in gz with a mark": {"a.csv.gz": gzip.compress(BOM + cells(["text", *T]))},
    "kinds of tables side by side": {"a.jsonl": JSON_A, "b.parquet": table(rows_of(B[:9])),
                                     "c.csv": cells(["text", *B[9:]])},
    "a linked folder": {"a.jsonl": JSON_A, "../other/b.jsonl": JSON_B, "sub": link("../other")},
    "a byte order mark in texts": {f"{i:02}.txt": BOM + text.encode() for i, text in enumerate(T)},
    "a byte order mark in JSON lines": {"a.jsonl": BOM + JSON_A, "b.json": BOM + JSON_B},
    "another column that changes its type": {"a.jsonl": jsonl(rows_of(A, n=1)),
                                             "b.jsonl": jsonl(rows_of(B, n={"x": []}))},
    "a column that two files have of two types": {"a.parquet": table(rows_of(A, n=1)),
                                                  "b.parquet": table(rows_of(B, n=[{"x": "y"}], more=2.0))},
    "strings as parquet has them": {
        "a.parquet": table(rows_of(A), text=pyarrow.large_string()),
        "b.parquet": table(rows_of(B), text=pyarrow.dictionary(pyarrow.int32(), pyarrow.string()))},
    "lines that are empty": {
        "a.jsonl": b"\n" + JSON_A.replace(b"}\n", b"}\r\n\r\n") + b"  \n" + JSON_B.rstrip()},
    "names of any sort": {"[a]*.jsonl": JSON_A, "한글 ?.jsonl": JSON_B},
}
LEFT_OUT = {                                    # ... all of T, and these words on what is left out and why
    "a README beside data": ({"a.jsonl": JSON_A, "b.jsonl": JSON_B, "README.md": b"# me"},
                             "README.md (a description"),
    "a hidden file": ({**BOTH, ".b.jsonl": JSON_B}, ".b.jsonl (hidden)"),
    "a file of the Finder's": ({"a.txt": b"A", **TEXTS,
                                "._a.txt": b"\0\5\x16\7"}, "._a.txt (hidden)"),
    "a hidden folder": ({**BOTH, ".old/b.jsonl": JSON_B}, ".old/ (hidden)"),
    "a link in a circle": ({**BOTH, "sub/around": link("..")}, "sub/around/ (a link to"),
    "a link to a sister": ({"a.jsonl": JSON_A, "sub/b.jsonl": JSON_B, "again": link("sub")},
                           "again/ (a link to"),
    "one folder linked twice": ({"a.jsonl": JSON_A, "../other/b.jsonl": JSON_B, "x": link("../other"),
                                 "y": link("../other")}, "y/ (a link to"),
    "a link to a file": ({"b.jsonl": JSON_A + JSON_B, "a.jsonl": link("b.jsonl")},
                         "a.jsonl (the same file as"),
    "a link to nothing": ({**BOTH, "b.jsonl": link("gone.jsonl")}, "b.jsonl (a link to nothing)"),
    "what is no file": ({**BOTH, "b.jsonl": getattr(os, "mkfifo", link("gone"))},
                        "b.jsonl (" + ("no plain file" if hasattr(os, "mkfifo") else "a link")),
    "an empty file": ({**BOTH, "b.jsonl": b""}, "b.jsonl (empty)"),
    "an empty file in gz": ({**BOTH, "b.jsonl.gz": gzip.compress(b"")}, "b.jsonl.gz (empty)"),
    "a parquet file without rows": ({"a.parquet": table(rows_of(T)), "b.parquet": b"",
                                     "c.parquet": "no rows"}, "c.parquet (a table without rows)"),
    "kinds that are not read": ({**BOTH, "b.pdf": b"%PDF", "LICENSE": b"words"},
                                "b.pdf (kind '.pdf' is not read)"),
    "a packing that is not read": ({**BOTH, "b.jsonl.xz": b"\xfd7zXZ"},
                                   "kind '.xz' is not read"),
    "parquet in gz": ({**BOTH, "b.parquet.gz": gzip.compress(table(rows_of(A)))},
                      "b.parquet.gz (parquet packed as .gz: unpack it)"),
    "a line that is broken": (within(b'{"text": "half'), "1 broken (",
                             "a.jsonl, line 16 is no JSON"),
    "a line that is no UTF-8": (within(b'{"text": "\xff"}'), "a.jsonl, line 16 is no JSON"),
    "a line that is no object": (within(b'["text"]'), "line 16 holds \"['text']\""),
    "a row without the column": (within(b'{"other": 1}'), "1 without the column (",
                                 "line 16 has no column 'text' but other"),
    "a row whose text is a number": (within(b'{"text": 3}'), "line 16 has '3' in column"),
    "a row of null": (within(b'{"text": null}\n{"text": ""}'), "2 empty (", "line 16; "),
    "a NUL": ({"a.parquet": table(rows_of([*A, "a\0b", *B]))}, "1 with a NUL character (", "row 16)"),
    "half a surrogate": (within(b'{"text": "\\ud800"}'), "1 no valid Unicode (", "line 16)"),
    "the same twice": (within(jsonl(rows_of(A[-1:])).rstrip()), "1 the same as the one before (", "line 16)"),
    "a text that is no UTF-8": ({"x.txt": b"caf\xe9", **TEXTS},
                                "x.txt holds byte 0xe9"),
    "a row of a table with too many values": ({"a.csv": cells(["text", *A]) + b"x,1,2\r\n" + cells(B)},
                                              "row 16 has 3 values, the first line names 1"),
    "a broken quote": ({"a.csv": cells(["text", *A]) + b'"a"b\r\n' + cells(B)},
                       "row 16 is no row of a table"),
    "a cell that is no UTF-8": ({"a.csv": cells(["text", *A]) + b"caf\xe9\r\n" + cells(B)},
                                "1 no valid Unicode (", "row 16)"),
}
REFUSED = {                                     # ... what the sentence says, of which file
    "a parquet file cut short": ({"a.parquet": table(rows_of(A)), "b.parquet": table(rows_of(B))[:-9]},
                                 "b.parquet cannot be read"),
    "a gz cut short": ({"a.jsonl": JSON_A, "b.jsonl.gz": gzip.compress(JSON_B)[:-20]},
                       "b.jsonl.gz cannot be read"),
    "a zst cut short": ({"a.jsonl": JSON_A, "b.jsonl.zst": zst(JSON_B)[:-20]},
                        "b.jsonl.zst cannot be read"),
    "a gz that is none": ({"a.jsonl": JSON_A, "b.jsonl.gz": JSON_B}, "b.jsonl.gz cannot be read"),
    "parquet without the column": ({"a.parquet": table(rows_of(A)), "b.parquet": table([{"x": "y"}])},
                                   "b.parquet has no column 'text' but x: type python data/prepare.py"),
    "csv without the column": ({"a.csv": cells(["text", *A]), "b.csv": b"x;text\n1;2\n"},
                               "b.csv has no column 'text' but x;text"),
    "a quote that never ends": ({"a.csv": cells(["text", *A]) + b'"open\r\nx\r\n'},
                                "a.csv ends inside a quoted value"),
    "lines of which none is JSON": ({"a.jsonl": JSON_A, "b.jsonl": b"plain text\n" * 9},
                                    "b.jsonl, line 1 is no JSON"),
    "a file of another column": ({"a.jsonl": JSON_A, "b.jsonl": b'{"body": "x"}\n' * 9},
                                 "b.jsonl, line 1 has no column 'text' but body: type python data/"),
    "rows and whole texts": ({"a.jsonl": JSON_A, "b.txt": b"text"}, "mixes json and text"),
    "nothing but what is hidden": ({".a.jsonl": JSON_A}, "holds none of"),
}


def lay(folder, files):
    """The files of a case below folder/in."""
    for name, content in files.items():
        path = folder / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content == "no rows":
            parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
        elif callable(content):
            content(path)
        else:
            path.write_bytes(content)
    return folder / "in"


@pytest.mark.parametrize("name", USED)
def test_every_document_is_used_whatever_its_file_is_like(own, tmp_path, capsys, case, name):
    assert documents_of(own(lay(tmp_path, USED[name])))[0] == sorted(T)
    assert "none dropped" in (printed := capsys.readouterr().out) and "left out: " not in printed
    case()


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_document_that_is_not_used_is_named_with_the_reason(own, tmp_path, capsys, case, name):
    files, *expected = LEFT_OUT[name]
    folder = own(lay(tmp_path, files))
    assert set(T) <= set(found := documents_of(folder)[0]) and len(found) <= len(T) + 1
    printed = capsys.readouterr().out
    assert [part for part in expected if part not in printed] == [], printed
    meta = json.loads((folder / "meta.json").read_text())
    assert len(meta["left_out"]) == printed.count("left out: ")
    assert meta["left_out"] or meta["dropped"]
    case()


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_used_is_refused_by_its_name(own, tmp_path, case, name):
    files, expected = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        own(lay(tmp_path, files))
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "data" / "mine" / "preparing.lock").exists()
    case()


def test_a_wrong_column_is_noticed_before_the_end_of_a_long_file(own, tmp_path):
    with pytest.raises(ConfigError, match=r"line 1 has '7' in column 'text'.*first 1,000 rows"):
        own(lay(tmp_path, {"a.jsonl": b'{"text": 7}\n' * 1000 + JSON_A}))


def test_one_file_of_any_suffix_is_read_as_what_it_is(own, tmp_path, capsys):
    text = "".join(T)
    plain = text.encode()
    for name, content in {"book.TXT": plain, "book.txt.gz": gzip.compress(BOM + plain),
                          "book.md.zst": zst(plain), "book.log": plain, "book": plain}.items():
        (tmp_path / name).write_bytes(content)
        folder = own(tmp_path / name)
        ids = [np.fromfile(folder / f"{split}.bin", np.uint16) for split in ("train", "val")]
        assert "".join(map(load(folder).decode, ids)) == text, name
        assert ("read as one text" in capsys.readouterr().out) == (name in ("book.log", "book"))
    for name, content in {"a.JSONL": JSON_A + JSON_B, "a.csv": cells(["text", *T])}.items():
        (tmp_path / name).write_bytes(content)
        assert documents_of(own(tmp_path / name))[0] == sorted(T)


# ------------------------------------------------------------------------------------------------------------
# F27: going on works

ANY_KIND = {"a list": "a list in JSON", "csv": "csv and tsv", "gz": "gz", "texts": "texts in gz",
            "tables": "kinds of tables side by side", "parquet": "strings as parquet has them"}


@pytest.mark.parametrize("name", ANY_KIND.values(), ids=list(ANY_KIND))
def test_going_on_in_any_kind_of_file_gives_the_same_files(tmp_path, monkeypatch, case, name):
    monkeypatch.setattr(corpus, "PART_TOKENS", 500)
    monkeypatch.setattr(corpus, "BATCH_CHARS", 100)
    place = lay(tmp_path, USED[name])

    def write(folder, stop_after=None):
        def text(row):
            nonlocal seen
            seen += 1
            if seen == stop_after:
                raise KeyboardInterrupt
            return row["text"]
        seen = 0
        documents = corpus.Documents(corpus.local_rows(place, ["text"]), text)
        return corpus.write_corpus(folder, documents, ByteTokenizer(), 0.3, "files"), seen
    whole, _ = write(tmp_path / "whole")
    for stop in (8, 15, 16, 17, 29):
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "stopped", stop)
        meta, rows = write(tmp_path / "stopped")
        assert meta == whole and bins(tmp_path / "stopped") == bins(tmp_path / "whole") and rows < 30
    case()


def test_going_on_with_rows_of_the_hub_gives_the_same_files(tmp_path, monkeypatch, case):
    """They stream through the package datasets, whose position is its own."""
    monkeypatch.setattr(corpus, "PART_TOKENS", 500)
    monkeypatch.setattr(corpus, "BATCH_CHARS", 100)
    path = write_parquet(tmp_path / "in.parquet", rows_of([*A, "", *B], n=1))
    keys = {"path": "parquet", "data_files": [str(path)]}

    def write(folder, stop_after=None):
        def text(row):
            nonlocal seen
            seen += 1
            if seen == stop_after:
                raise KeyboardInterrupt
            return row["text"]
        seen = 0
        documents = corpus.Documents(corpus.hub_rows(keys), text)
        return corpus.write_corpus(folder, documents, ByteTokenizer(), 0.3, "the Hub"), seen
    whole, _ = write(tmp_path / "whole")
    assert whole["dropped"] == {"empty": {"count": 1, "first": ["row 16"]}} and "files" not in whole
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "stopped", 25)
    meta, rows = write(tmp_path / "stopped")
    assert meta == whole and bins(tmp_path / "stopped") == bins(tmp_path / "whole") and rows < 31
    case()


def interrupted(stream, folder, monkeypatch, replaced=None):
    """A preparation that is stopped after 250 rows, or in its end after so many files are in place."""
    if replaced is None:
        with pytest.raises(KeyboardInterrupt):
            stream(folder, 250)
        return
    done = []

    def crash(source, target):
        if str(target).endswith(("train.bin", "val.bin", "meta.json")):
            if len(done) == replaced:
                raise KeyboardInterrupt
            done.append(target)
        os.rename(source, target)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(corpus.os, "replace", crash)
        stream(folder)


@pytest.mark.parametrize("lost", ["train.part.bin", "val.part.bin"])
def test_going_on_without_a_part_begins_at_the_first_document(stream, tmp_path, monkeypatch, capsys, case,
                                                              lost):
    whole, _ = stream(tmp_path / "whole")
    interrupted(stream, tmp_path / "out", monkeypatch)
    (tmp_path / "out" / lost).unlink()
    meta, rows = stream(tmp_path / "out")
    assert meta == whole and rows == 304 and bins(tmp_path / "out") == bins(tmp_path / "whole")
    assert f"{lost} is missing: beginning at the first document" in capsys.readouterr().out
    case()


@pytest.mark.parametrize("replaced", range(3))
def test_going_on_after_a_crash_between_the_finished_files_takes_them(stream, tmp_path, monkeypatch, case,
                                                                      replaced):
    whole, _ = stream(tmp_path / "whole")
    interrupted(stream, tmp_path / "out", monkeypatch, replaced)
    meta, rows = stream(tmp_path / "out")
    assert meta == whole and bins(tmp_path / "out") == bins(tmp_path / "whole") and rows == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["meta.json", "train.bin", "val.bin"]
    case()


@pytest.mark.parametrize("note, expected", [("{", "cannot be read"), ("{}", "is about other files"),
                                            ("[]", "is about other files")])
def test_going_on_from_a_note_that_is_none_begins_at_the_first_document(stream, tmp_path, monkeypatch, capsys,
                                                                        case, note, expected):
    interrupted(stream, tmp_path / "out", monkeypatch)
    (tmp_path / "out" / "progress.json").write_text(note)
    assert stream(tmp_path / "out")[1] == 304
    assert expected in capsys.readouterr().out
    case()


def test_two_preparations_of_one_data_set_do_not_disturb_each_other(tmp_path, case):
    write_jsonl(tmp_path / "in.jsonl", rows_of(texts(600)))
    argv, before = words(input=tmp_path / "in.jsonl", name="mine"), SMALL_PARTS.format(str(tmp_path))
    first = Job("data/prepare.py", argv, tmp_path, before=before + SLOWLY, name="first")
    limit = time.time() + 60
    lock = tmp_path / "mine" / "preparing.lock"
    while not (lock.exists() and lock.read_text()) and time.time() < limit:
        time.sleep(0.01)
    second = Job("data/prepare.py", argv, tmp_path, before=before, name="second").wait()
    one_sentence(second, "prepare.py", f"is being prepared by process {first.pid}", "preparing.lock")
    assert first.wait().status == 0 and not lock.exists()
    assert documents_of(tmp_path / "mine")[0] == sorted(texts(600))
    case()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system has no /proc")
@pytest.mark.parametrize("owner, expected", [
    (lambda: {"pid": 2**22 + 7}, "has ended: removed"),
    (lambda: {"pid": os.getpid(), "born": "1"}, "has ended: removed"),
    (lambda: {"pid": os.getppid(), "born": "1"}, "has ended: removed"), (dict, "has ended: removed"),
    (lambda: {"pid": os.getppid(), "born": processes.born(os.getppid())}, "is being prepared by process"),
    (lambda: {"pid": 2**22 + 7, "host": "another", "boot": "other", "machine": ""},
     "is being prepared by process 4194311 on another"),
    (lambda: {"pid": 2**22 + 7, "boot": "before"},
     "has ended: removed" if processes.machine()["machine"] else "is being prepared by process")],
    ids=["gone", "own number", "number given again", "empty", "alive", "another host", "started again"])
def test_two_preparations_are_told_apart_from_one_that_was_killed(tmp_path, capsys, case, owner, expected):
    owner = owner()
    owner = {**processes.machine(), "born": "", **owner} if owner else {}
    (tmp_path / "preparing.lock").write_text(json.dumps(owner) if owner else "")
    refused = "is being" in expected
    splits = {"train": [[1] * 50], "val": [[2] * 50]}
    if refused:
        with pytest.raises(ConfigError, match=expected):
            dataset.write_dataset(tmp_path, splits, ByteTokenizer(), "here")
        assert [path.name for path in tmp_path.iterdir()] == ["preparing.lock"]
    else:
        dataset.write_dataset(tmp_path, splits, ByteTokenizer(), "here")
        assert expected in capsys.readouterr().out
        assert sorted(p.name for p in tmp_path.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    case()


def test_decomposed_letters_are_named_and_encoded_as_they_are(own, tmp_path, capsys):
    some = [unicodedata.normalize("NFD", text) for text in T]
    assert documents_of(own(lay(tmp_path, {"a.jsonl": jsonl(rows_of(some))})))[0] == sorted(some)
    assert "note: 30 documents have letters that are spelled in parts (NFD" in capsys.readouterr().out
    own(lay(tmp_path, {"b.txt": "".join(some).encode()}) / "b.txt")
    assert "b.txt has letters that are spelled in parts (NFD" in capsys.readouterr().out
    own(lay(tmp_path, {"c.txt": "".join(T).encode()}) / "c.txt")
    assert "NFD" not in capsys.readouterr().out
