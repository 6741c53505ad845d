"""Data sets: what is written is read back, bad files are refused before step 0, a batch needs no past."""
import gc
import gzip
import importlib.util
import json
import os
import pickle
import shlex
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import ConfigError
from data import dataset
from data.dataset import TokenStream, check, write_dataset
from data.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, load

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
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


KOREAN = "\ud55c\uad6d\uc5b4 \ud14d\uc2a4\ud2b8, \uc624\ub298 \ub0a0\uc528\uac00 \uc88b\ub124\uc694.\n"


@pytest.mark.parametrize("name, raw, encoding", [
    ("korean.txt", KOREAN.encode("cp949"), "CP949"),
    ("mostly english.txt", ("hello world, " + KOREAN).encode("cp949"), "CP949"),
    ("notepad.txt", KOREAN.encode("utf-16"), "UTF-16"),
    ("marked.txt", KOREAN.encode("utf-32"), "UTF-32"),
    ("little.txt", ("hello " + KOREAN).encode("utf-16-le"), "UTF-16LE"),
    ("big.txt", ("hello " + KOREAN).encode("utf-16-be"), "UTF-16BE"),
    ("ascii in two bytes.txt", b"h\0e\0l\0l\0o\0\n\0", "UTF-16LE"),
    ("latin.txt", "caf\u00e9 d\u00e9j\u00e0 vu\n".encode("latin-1"), ""),
    ("japanese.txt", "\u3053\u3093\u306b\u3061\u306f\n".encode("euc-jp"), ""),
    ("program.txt", bytes(range(256)), ""),
])
def test_a_text_that_is_not_utf8_is_refused_with_a_command_that_mends_it(tmp_path, name, raw, encoding):
    path = tmp_path / name
    path.write_bytes(raw * 500)
    with pytest.raises(ConfigError) as error:
        dataset.write_text(tmp_path / "out", path, "byte", 0.1)
    said = str(error.value)
    assert name in said and "\n" not in said and not (tmp_path / "out").exists()
    assert f"type iconv -f {encoding or 'ENCODING'} -t UTF-8 " in said
    if encoding:                                 # what is typed is understood, and gives a text that is taken
        command = shlex.split(said.partition("type ")[2].rpartition(", and take")[0])
        assert command[:5] == ["iconv", "-f", encoding, "-t", "UTF-8"] and command[5] == str(path)
        assert command[6] == ">" and command[7].endswith(".utf8.txt")
        Path(command[7]).write_text((raw * 500).decode(encoding), encoding="utf-8")
        assert dataset.write_text(tmp_path / "out", Path(command[7]), "byte", 0.1)["tokens"]["train"] > 100


def test_a_packed_text_that_is_not_utf8_says_its_encoding(tmp_path):
    path = tmp_path / "book.txt.gz"
    path.write_bytes(gzip.compress(KOREAN.encode("cp949") * 500))
    with pytest.raises(ConfigError, match="it looks like CP949: type iconv -f CP949 -t UTF-8 FILE > NEW"):
        dataset.write_text(tmp_path / "out", path, "byte", 0.1)


def test_the_block_size_that_is_advised_for_a_short_text_fits_both_of_its_splits(tmp_path):
    def write(train, val):
        ids = {"train": [[1] * train], "val": [[1] * val]}
        return write_dataset(tmp_path / f"{train}", ids, ByteTokenizer(), "short")
    write(90, 10)
    refused(tmp_path / "90", "train.bin", "90 tokens", "type --block_size=9 or prepare", block_size=128)
    assert check(tmp_path / "90", 9, 256)
    write(9, 1)
    for block_size in (128, 8, 1):
        with pytest.raises(ConfigError) as error:
            check(tmp_path / "9", block_size, 256)
        assert "--block_size" not in str(error.value) and "prepare a longer text" in str(error.value)


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
