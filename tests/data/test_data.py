"""Data sets: what is written is read back, bad files are refused before step 0, a batch needs no past."""
import ast
import gc
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import time
import unicodedata
import urllib.request
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import configurator
from configurator import ConfigError
from data import dataset
from data.dataset import TokenStream, check, find, prepare_if_missing, write_dataset
from data.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, load

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
BLOCK = 16


def script(path):
    """The module of a script below data/, freshly loaded."""
    spec = importlib.util.spec_from_file_location("script_under_test", ROOT / "data" / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["script_under_test"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def same_excepthook(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def numbers(count, vocab_size=256, seed=0):
    return np.random.default_rng(seed).integers(1, vocab_size, count)


def byte_data(folder, train=1000, val=300):
    splits = {"train": [numbers(train)], "val": [numbers(val, seed=1)]}
    write_dataset(folder, splits, ByteTokenizer(), "numbers")
    return folder


def nanogpt_data(folder, ids, stoi=None, dtype=np.uint16):
    folder.mkdir(exist_ok=True)
    for split in ("train", "val"):
        np.asarray(ids, dtype).tofile(folder / f"{split}.bin")
    if stoi:
        meta = {"vocab_size": len(stoi), "stoi": stoi, "itos": {i: c for c, i in stoi.items()}}
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return folder


def refused(folder, *expected, block_size=BLOCK, vocab_size=256):
    """check() fails with one sentence that holds every expected word."""
    with pytest.raises(ConfigError) as caught:
        check(folder, block_size, vocab_size)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 500
    for word in map(str, expected):
        assert word in sentence, f"{word!r} is not in: {sentence}"


# ------------------------------------------------------------------------------------------------------------
# writing

def test_what_is_written_is_read_back(tmp_path):
    splits = {"train": [[1, 2], [], np.arange(30, dtype=np.uint8)], "val": [list(range(20))]}
    meta = write_dataset(tmp_path, splits, ByteTokenizer(), "here")
    assert np.fromfile(tmp_path / "train.bin", np.uint16).tolist() == [1, 2, *range(30)]
    assert meta == json.loads((tmp_path / "meta.json").read_text())
    assert meta["tokens"] == {"train": 32, "val": 20}
    assert meta["dtype"] == "uint16" and meta["vocab_size"] == 256
    assert check(tmp_path, BLOCK, 256) == meta["tokens"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path):
    chars = [chr(i) for i in (*range(0xD800), *range(0xE000, 0x12000))]
    last = len(chars) - 1
    assert last > 65536
    write_dataset(tmp_path, {"train": [[0, last] * 20], "val": [[last] * 20]}, CharTokenizer(chars), "here")
    assert np.fromfile(tmp_path / "train.bin", np.uint32)[:2].tolist() == [0, last]
    assert check(tmp_path, BLOCK, len(chars)) == {"train": 40, "val": 20}
    assert TokenStream(tmp_path, "val", BLOCK, 1, 0).batch(0)[0].tolist() == [[last] * BLOCK]


@pytest.mark.parametrize("bad", [[[256]], [[-1]], []], ids=["too large", "negative", "nothing"])
def test_a_failed_write_leaves_the_old_data_as_it_was(tmp_path, bad):
    byte_data(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ConfigError):
        write_dataset(tmp_path, {"train": [[1] * 50], "val": bad}, ByteTokenizer(), "bad")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("step", range(3))
def test_a_crash_between_the_files_is_noticed(tmp_path, monkeypatch, step):
    byte_data(tmp_path / "old")
    replaced = []

    def crash(source, target):
        if len(replaced) == step:
            raise KeyboardInterrupt
        replaced.append(os.rename(source, target))
    for folder in (tmp_path / "old", tmp_path / "new"):
        replaced.clear()
        monkeypatch.setattr(dataset.os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            write_dataset(folder, {"train": [[1] * 500], "val": [[2] * 100]}, ByteTokenizer(), "new")
        monkeypatch.undo()
        complete = folder.name == "old" and step == 0
        if not complete:
            refused(folder, folder)
    assert dataset.missing_files(tmp_path / "new")


def test_writing_holds_one_piece_at_a_time(tmp_path):
    alive, most = weakref.WeakSet(), []

    def pieces(count):
        for _ in range(count):
            most.append(len(alive))
            piece = Watched([7] * 10)
            alive.add(piece)
            yield piece
    write_dataset(tmp_path, {"train": pieces(50), "val": pieces(5)}, ByteTokenizer(), "pieces")
    assert max(most) == 1


class Watched(list):
    __hash__ = object.__hash__


# ------------------------------------------------------------------------------------------------------------
# F7: data that must be refused before step 0

def test_good_data_passes_with_its_counts(tmp_path):
    assert check(byte_data(tmp_path), BLOCK, 256) == {"train": 1000, "val": 300}
    assert check(tmp_path, BLOCK, 50304) == {"train": 1000, "val": 300}, "a padded vocabulary is no error"


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_id_outside_the_vocabulary_is_named_with_its_position(tmp_path, split):
    ids = np.fromfile(byte_data(tmp_path) / f"{split}.bin", np.uint16)
    ids[[123, 200]] = 999
    ids.tofile(tmp_path / f"{split}.bin")
    refused(tmp_path, f"{split}.bin", "token 999", "position 123", "0 to 255")


def test_a_file_of_odd_size_is_refused(tmp_path):
    with open(byte_data(tmp_path) / "train.bin", "ab") as file:
        file.write(b"\0")
    refused(tmp_path, "train.bin", "2001 bytes", "multiple of 2", "token 1000")


def test_a_truncated_file_is_refused(tmp_path):
    os.truncate(byte_data(tmp_path) / "val.bin", 400)
    refused(tmp_path, "val.bin", "200 uint16 tokens", "300")


def test_an_empty_file_is_refused(tmp_path):
    (byte_data(tmp_path) / "val.bin").write_bytes(b"")
    refused(tmp_path, "val.bin", "empty", BLOCK + 1)


def test_a_file_shorter_than_a_block_is_refused(tmp_path):
    byte_data(tmp_path, val=17)
    assert check(tmp_path, 16, 256)["val"] == 17
    refused(tmp_path, "val.bin", "17 tokens", "18", "--block_size=16", block_size=17)


@pytest.mark.parametrize("name", ["uint32", "int8"])
def test_a_wrong_dtype_in_meta_is_refused(tmp_path, name):
    meta = json.loads((byte_data(tmp_path) / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"dtype": name}))
    refused(tmp_path, name)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.int64, np.float32])
def test_a_folder_without_meta_and_of_wrong_dtype_is_refused(tmp_path, dtype):
    refused(nanogpt_data(tmp_path, numbers(1000), dtype=dtype), "train.bin", "position")


def test_data_of_a_larger_vocabulary_than_the_models_is_refused(tmp_path):
    refused(byte_data(tmp_path), 256, 65, vocab_size=65)


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    byte_data(tmp_path / "a")
    byte_data(tmp_path / "b")
    numbers(1000, seed=5).astype(np.uint16).tofile(tmp_path / "a" / "train.bin")
    refused(tmp_path / "a", "train.bin", "sha256")
    meta = json.loads((tmp_path / "b" / "meta.json").read_text())
    (tmp_path / "b" / "meta.json").write_text(json.dumps(meta | {"tokenizer": "gpt2"}))
    refused(tmp_path / "b", "gpt2", 50257, 256)


def test_one_flipped_bit_is_noticed(tmp_path):
    content = bytearray((byte_data(tmp_path) / "val.bin").read_bytes())
    content[100] ^= 1
    (tmp_path / "val.bin").write_bytes(content)
    refused(tmp_path, "val.bin", "sha256")


def test_a_bad_meta_json_is_refused(tmp_path):
    (byte_data(tmp_path) / "meta.json").write_text('{"vocab_size": 256, ')
    refused(tmp_path, "meta.json", "JSON")


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_a_missing_file_is_refused(tmp_path, name):
    (byte_data(tmp_path) / name).unlink()
    refused(tmp_path, name, "missing", "data/prepare.py")


def test_a_huge_file_is_scanned_from_its_first_to_its_last_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SCAN_CHUNK", 100)
    monkeypatch.setattr(dataset, "SCAN_BYTES", 800)
    for position, seen in ((0, True), (950, True), (150, False)):
        ids = numbers(1000)
        ids[position] = 999
        nanogpt_data(tmp_path, ids)
        if seen:
            refused(tmp_path, f"position {position}")
        else:
            check(tmp_path, BLOCK, 256)


# ------------------------------------------------------------------------------------------------------------
# nanoGPT's own folders

def test_a_nanogpt_folder_with_meta_pkl_is_accepted(tmp_path):
    nanogpt_data(tmp_path, [0, 1, 2] * 20, stoi={"c": 0, "a": 1, "b": 2})
    assert check(tmp_path, BLOCK, 3) == {"train": 60, "val": 60}
    x, _ = TokenStream(tmp_path, "train", BLOCK, 2, 0).batch(0)
    assert set(load(tmp_path).decode(x[0])) == set("abc")
    refused(tmp_path, 3, 2, vocab_size=2)


def test_a_nanogpt_folder_without_meta_is_gpt2(tmp_path):
    nanogpt_data(tmp_path, numbers(1000, 50257))
    assert check(tmp_path, BLOCK, 50304) == {"train": 1000, "val": 1000}
    assert isinstance(load(tmp_path), GPT2Tokenizer)


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
# batches

@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """train and val are 0, 1, 2, ... so that a token is its own position."""
    return nanogpt_data(tmp_path_factory.mktemp("counted"), np.arange(5000))


def test_targets_are_the_next_tokens(counted):
    x, y = TokenStream(counted, "train", BLOCK, 8, seed=1).batch(3)
    assert x.shape == y.shape == (8, BLOCK) and x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1) and torch.equal(x, x[:, :1] + torch.arange(BLOCK))
    assert x.is_contiguous() and y.is_contiguous()


def test_a_batch_is_fixed_by_its_seed_split_and_index(counted):
    def draw(split="train", seed=1, index=7):
        return TokenStream(counted, split, BLOCK, 8, seed).batch(index)[0]
    first = draw()
    stream = TokenStream(counted, "train", BLOCK, 8, seed=1)
    for index in (9, 0, 7):
        last = stream.batch(index)[0]
    assert torch.equal(first, last), "what was drawn before must not matter"
    for other in (draw(split="val"), draw(seed=2), draw(seed=-1), draw(index=8), draw(index=2**40)):
        assert not torch.equal(first, other)


def test_the_draw_is_the_same_on_every_machine(counted):
    assert TokenStream(counted, "train", BLOCK, 4, seed=1337).offsets(5).tolist() == OFFSETS_OF_SEED_1337


OFFSETS_OF_SEED_1337 = [4207, 1738, 1713, 2205]


def test_successive_batches_share_no_offsets_by_construction(counted):
    stream = TokenStream(counted, "train", 1, 64, seed=0)
    stream.tokens = 2**40
    drawn = np.concatenate([stream.offsets(i) for i in range(50)])
    assert len(np.unique(drawn)) == len(drawn)


def test_every_window_is_drawn_and_about_equally_often(tmp_path):
    nanogpt_data(tmp_path, np.arange(BLOCK + 10))
    stream = TokenStream(tmp_path, "train", BLOCK, 1000, seed=0)
    x, y = stream.batch(0)
    assert np.bincount(x[:, 0], minlength=10).min() > 60 and x[:, 0].max() == 9
    assert y.max() == BLOCK + 9, "the last token of the file is a target"


def test_the_shortest_file_has_one_window(tmp_path):
    x, y = TokenStream(nanogpt_data(tmp_path, np.arange(BLOCK + 1)), "val", BLOCK, 3, seed=0).batch(0)
    assert x[:, 0].tolist() == [0, 0, 0] and y[:, -1].tolist() == [BLOCK] * 3
    with pytest.raises(ConfigError, match=r"val.bin holds 17 tokens"):
        TokenStream(tmp_path, "val", BLOCK + 1, 3, seed=0)


def test_a_bad_id_in_a_batch_is_named_with_its_position(counted):
    TokenStream(counted, "train", BLOCK, 64, 0, vocab_size=5000).batch(0)
    with pytest.raises(ConfigError, match=r"token (\d+) at position \1 .*0 to 99"):
        TokenStream(counted, "train", BLOCK, 64, 0, vocab_size=100).batch(0)


def test_batches_keep_memory_and_file_descriptors_constant(tmp_path):
    proc = Path("/proc/self")
    if not proc.is_dir():
        pytest.skip("this system has no /proc to read memory and file descriptors from")
    nanogpt_data(tmp_path, numbers(40_000_000))

    def used():
        gc.collect()
        pages = int((proc / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(proc / "fd"))
    stream = TokenStream(tmp_path, "train", 256, 16, seed=0)
    for index in range(50):
        stream.batch(index)
    memory, descriptors = used()
    for index in range(2000):
        stream.batch(index)
    after, descriptors_after = used()
    assert after - memory < 20 and descriptors_after == descriptors


# ------------------------------------------------------------------------------------------------------------
# without replacement, by document, by weight

@pytest.mark.parametrize("batch_size", [1, 8, 13])
def test_an_epoch_deals_every_window_once(counted, batch_size):
    stream = TokenStream(counted, "train", BLOCK, batch_size, seed=3, sampling="epoch")
    count = (5000 - 1) // BLOCK
    assert stream.samples == count
    starts = np.concatenate([stream.offsets(i) for i in range(3 * count // batch_size + 1)])
    epochs = [starts[e * count:(e + 1) * count] for e in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == count and set(np.diff(np.sort(epoch))) == {BLOCK}
        assert epoch.max() + BLOCK < 5000
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[0], np.sort(epochs[0]))
    assert len({epoch.min() for epoch in epochs}) > 1, "the left-over tokens must shift the windows"


def test_an_epochs_order_needs_no_past_and_differs_by_seed(counted):
    def draw(index=7, seed=3):
        return TokenStream(counted, "train", BLOCK, 8, seed, sampling="epoch").batch(index)[0]
    first = draw()
    stream = TokenStream(counted, "train", BLOCK, 8, 3, sampling="epoch")
    for index in (100, 0, 7):
        last = stream.batch(index)[0]
    assert torch.equal(first, last)
    assert not torch.equal(first, draw(seed=4)) and not torch.equal(first, draw(index=8))


def test_ranks_share_no_window_within_an_epoch(counted):
    stream = TokenStream(counted, "train", BLOCK, 4, seed=3, sampling="epoch")
    whole = stream.samples // 16 * 16 // 4                  # ranks 0 to 3 take every fourth batch
    ranks = [np.concatenate([stream.offsets(i) for i in range(rank, whole, 4)]) for rank in range(4)]
    for rank in range(4):
        for other in range(rank):
            assert not set(ranks[rank]) & set(ranks[other])
    assert stream.epochs(stream.samples) == {counted.name: 1.0}


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 5000), seed=st.integers(0, 2**64 - 1))
def test_shuffled_is_a_permutation(count, seed):
    keys = dataset.random_bits(np.array([seed, 0], np.uint64), 1, 4)
    places = dataset.shuffled(np.arange(count), count, keys)
    assert sorted(places.tolist()) == list(range(count))


def test_the_order_of_an_epoch_is_the_same_on_every_machine(counted):
    stream = TokenStream(counted, "train", BLOCK, 4, seed=1337, sampling="epoch")
    assert stream.offsets(100).tolist() == OFFSETS_OF_EPOCHS


OFFSETS_OF_EPOCHS = [563, 4115, 2979, 2899]


LENGTHS = [1, 40, 0, 16, 17, 5, 0, 33, 2, 15]


def many_documents(folder, lengths, made=None):
    """Documents of these lengths; all tokens of document i are i + 1, its end is 0."""
    ids = np.concatenate([[i + 1] * length + [0] for i, length in enumerate(lengths)])
    write_dataset(folder, {"train": [ids], "val": [ids]}, made or ByteTokenizer(), "documents")
    return folder


@pytest.mark.parametrize("sampling", dataset.SAMPLINGS)
def test_no_sample_crosses_a_document(tmp_path, sampling):
    folder = many_documents(tmp_path, LENGTHS)
    stream = TokenStream(folder, "train", BLOCK, 8, 0, sampling=sampling, documents=True)
    for index in range(30):
        x, y = stream.batch(index)
        for inputs, targets in zip(x.tolist(), y.tolist()):
            document = inputs[0]
            length = sum(t != -1 for t in targets)
            assert length and document and set(inputs[:length]) == {document}
            assert set(targets[:length]) <= {document, 0} and set(targets[length:]) <= {-1}
            assert set(inputs[length:]) <= {0}


def test_an_epoch_of_documents_predicts_every_token_but_the_first_of_each_once(tmp_path):
    folder = many_documents(tmp_path, LENGTHS)
    stream = TokenStream(folder, "train", BLOCK, 1, 0, sampling="epoch", documents=True)
    seen = np.zeros(len(LENGTHS) + 1, int)
    for index in range(stream.samples):
        targets = stream.batch(index)[1]
        np.add.at(seen, targets[targets >= 0].numpy(), 1)
    assert seen[1:].tolist() == [max(0, length - 1) for length in LENGTHS]
    assert seen[0] == sum(length > 0 for length in LENGTHS)


def test_a_last_document_without_its_end_and_scans_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SCAN_CHUNK", 7)
    ids = [5] * 20 + [0] + [6] * 19
    write_dataset(tmp_path, {"train": [ids], "val": [ids]}, ByteTokenizer(), "documents")
    stream = TokenStream(tmp_path, "train", BLOCK, 4, 0, sampling="epoch", documents=True)
    x, y = stream.batch(0)
    assert sorted(stream.offsets(0).tolist()) == [0, 16, 21, 37]
    assert (y == 6).sum() == 18 and (y == 5).sum() == 19 and (y == 0).sum() == 1 and y.max() < 7


def test_documents_of_data_that_marks_none_are_one_sentence(tmp_path):
    write_dataset(tmp_path, {"train": [[0] * 99], "val": [[0] * 99]}, CharTokenizer(["a"]), "here")
    with pytest.raises(ConfigError, match=r"documents=True.*no token that ends a document"):
        TokenStream(tmp_path, "train", BLOCK, 1, 0, documents=True)


def test_a_mixture_keeps_its_weights_and_each_part_its_epochs(tmp_path):
    for name, token in (("a", 1), ("b", 2), ("c", 3)):
        write_dataset(tmp_path / name, {s: [[token] * 999] for s in ("train", "val")}, ByteTokenizer(), name)
    words = [f"{tmp_path / name}:{weight}" for name, weight in (("a", 3), ("b", 1), ("c", 0.5))]
    sources = dataset.prepare_sources(",".join(words))
    stream = dataset.open_stream(sources, "train", BLOCK, 9, seed=0, sampling="epoch")
    rows = np.concatenate([stream.batch(i)[0][:, 0].numpy() for i in range(100)])
    assert np.bincount(rows)[1:].tolist() == pytest.approx([600, 200, 100], abs=1)
    for index in range(100):
        shares = np.bincount(stream.batch(index)[0][:, 0].numpy(), minlength=4)[1:]
        assert abs(shares - [6, 2, 1]).max() <= 1, "every batch is mixed"
    assert stream.epochs(900)["a"] == pytest.approx(600 / 62, abs=0.02)
    part = TokenStream(tmp_path / "a", "train", BLOCK, 9, seed=0, sampling="epoch")
    assert np.array_equal(stream.streams[0].begins(0, 50), part.begins(0, 50))


@settings(max_examples=200, deadline=None)
@given(weights=st.lists(st.floats(0.01, 10), min_size=2, max_size=5), rows=st.integers(0, 10**12))
def test_a_mixture_gives_each_row_to_one_data_set(weights, rows):
    streams = [type("Stream", (), {"batch_size": 1})] * len(weights)
    mixture = dataset.Mixture(streams, weights)
    before, after = mixture.taken(rows), mixture.taken(rows + 1)
    assert sum(before) == rows and sorted(np.subtract(after, before)) == [0] * (len(weights) - 1) + [1]
    for taken, weight in zip(before, weights):
        assert abs(taken - rows * weight / sum(weights)) <= len(weights) + rows * 1e-5


@pytest.mark.parametrize("dataset_key, expected", [
    ("{a},{b}", r"made with different tokenizers, 'byte' and 'char' of 2 ids"),
    ("{a},{a}", "names a data set twice"), ("{a}:0,{b}:1", "must be above 0")])
def test_a_mixture_that_is_none_is_one_sentence(tmp_path, dataset_key, expected):
    byte_data(tmp_path / "a")
    ids = [0, 1] * 99
    write_dataset(tmp_path / "b", {"train": [ids], "val": [ids]}, CharTokenizer(["a", "b"]), "b")
    with pytest.raises(ConfigError, match=expected):
        dataset.common_meta(dataset.prepare_sources(dataset_key.format(a=tmp_path / "a", b=tmp_path / "b")))


def test_an_unknown_sampling_is_one_sentence(counted):
    with pytest.raises(ConfigError, match="did you mean 'epoch'"):
        TokenStream(counted, "train", BLOCK, 1, 0, sampling="epochs")


@pytest.mark.slow
def test_a_gigabyte_is_prepared_in_less_than_one_of_memory(tmp_path):
    """As bench.py corpus does: in one go, killed half-way, begun again."""
    pytest.importorskip("psutil", reason="psutil is not installed")
    out = tmp_path / "corpus.json"
    done = subprocess.run([sys.executable, str(ROOT / "bench.py"), "corpus", "--gigabytes=1.0",
                           "--tokenizer=byte", f"--out={out}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    runs = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert max(run["peak_mb"] for run in runs.values()) < 1000


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, {"sampling": "epoch"}, {"sampling": "epoch", "documents": True}],
                         ids=str)
def test_ten_thousand_batches_keep_memory_constant(tmp_path, keys):
    proc = Path("/proc/self")
    if not proc.is_dir():
        pytest.skip("this system has no /proc to read memory from")
    ids = np.random.default_rng(0).integers(0, 256, 20_000_000)
    write_dataset(tmp_path, {"train": [ids], "val": [ids[:999]]}, ByteTokenizer(), "numbers")
    stream = TokenStream(tmp_path, "train", 256, 16, seed=0, **keys)

    def used():
        gc.collect()
        return int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    for index in range(100):
        stream.batch(index)
    memory = used()
    for index in range(10_000):
        stream.batch(index)
    assert used() - memory < 20


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
