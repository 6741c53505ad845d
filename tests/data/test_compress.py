"""Archives: every file comes back to the bit, anything else is one sentence and touches no file."""
import json
import sys

import pytest
import torch
from conftest import Job, Trainer, one_sentence, words
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import ConfigError
from data import compress

pytest.importorskip("constriction")
pytestmark = pytest.mark.usefixtures("no_network")
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """A tiny model of bytes; .folder/out and, trained with another seed, .folder/other."""
    trainer = Trainer(tmp_path_factory.mktemp("compress"), data)
    trainer()
    trainer(out="other", seed=2)
    return trainer


@pytest.fixture(scope="module")
def model(run):
    return compress.load_model(run.folder / "out")[0]


@pytest.fixture
def here(run, tmp_path, monkeypatch):
    """main(*argv) in an empty folder, with the tiny model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    return lambda *argv: compress.main([*map(str, argv), f"--out_dir={run.folder / 'out'}"])


@settings(max_examples=60, deadline=None)
@given(content=st.one_of(st.binary(min_size=1, max_size=40), st.text(min_size=1).map(str.encode)),
       rows=st.integers(1, 9))
def test_any_bytes_come_back(model, content, rows):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress, "shape_of", lambda size: (rows, -(-size // rows)))
        assert compress.decompress(model, compress.compress(model, content), len(content)) == content


def test_the_payload_is_as_long_as_the_models_loss_says(model):
    content = b"The quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 40
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress, "shape_of", lambda size: (len(content) // 8, 8))     # block_size is 8
        payload = compress.compress(model, content)
    ids = torch.tensor(list(content)).view(-1, 8)
    before = torch.cat((torch.zeros(len(ids), 1, dtype=torch.int64), ids[:, :-1]), dim=1)
    bits = model(before, ids)[1].item() / 0.6931471805599453 * len(content)
    assert abs(8 * len(payload) - bits) < 0.01 * bits + 64


@pytest.mark.parametrize("content", [b"x", b"\0" * 99, bytes(range(256)) * 5], ids=["x", "zeros", "all"])
def test_a_file_there_and_back(here, tmp_path, capsys, content):
    (tmp_path / "file").write_bytes(content)
    here("c", "file")
    assert "bits a byte" in capsys.readouterr().out
    (tmp_path / "file").unlink()
    here("d", "file.ncx")
    assert (tmp_path / "file").read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "file.ncx"]


@pytest.fixture
def archive(here, tmp_path):
    (tmp_path / "file").write_bytes(b"some text to keep, " * 20)
    here("c", "file")
    return tmp_path / "file.ncx"


def refused(here, tmp_path, *argv, match):
    """One sentence, and every file stays as it was."""
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=match) as caught:
        here(*argv)
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_nothing_is_overwritten(here, archive, tmp_path):
    refused(here, tmp_path, "c", "file", match=r"file.ncx exists and is not overwritten")
    refused(here, tmp_path, "d", "file.ncx", match=r"file exists .*--output=ANOTHER_FILE")
    here("d", "file.ncx", "--output=again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:40], lambda b: b + b"x", lambda b: b[:13],
                                    lambda b: b[:-50] + bytes([b[-50] ^ 1]) + b[-49:],
                                    lambda b: b[:20] + bytes([b[20] ^ 64]) + b[21:]])
def test_a_damaged_archive_is_one_sentence(here, archive, tmp_path, damage):
    archive.write_bytes(damage(archive.read_bytes()))
    refused(here, tmp_path, "d", "file.ncx", "--output=new", match="is damaged or cut short")


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b\x08 gzip", b"nanoCortex 2\n"])
def test_a_foreign_file_is_one_sentence(here, tmp_path, content):
    (tmp_path / "file.ncx").write_bytes(content)
    refused(here, tmp_path, "d", "file.ncx", match="is no archive of compress.py")


def test_another_model_is_one_sentence_that_names_both(run, archive, tmp_path):
    made = compress.load_model(run.folder / "out")[1], compress.load_model(run.folder / "other")[1]
    with pytest.raises(ConfigError, match=f"{made[0][:12]}.*{made[1][:12]}"):
        compress.main(["d", str(archive), "--output=new", f"--out_dir={run.folder / 'other'}"])


def test_other_floating_point_numbers_are_noticed(here, archive, tmp_path, monkeypatch):
    chances = compress.chances
    monkeypatch.setattr(compress, "chances", lambda logits: chances(logits * 1.01))
    refused(here, tmp_path, "d", "file.ncx", "--output=new", match=r"does not come out right: it was made")


def test_the_archive_says_how_many_threads_to_take(here, archive, monkeypatch):
    header, _ = compress.unpack(archive.read_bytes(), archive)
    assert header["threads"] == torch.get_num_threads() and header["torch"] == torch.__version__
    changed = compress.pack(header | {"threads": 2}, compress.unpack(archive.read_bytes(), archive)[1])
    archive.write_bytes(changed)
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    here("d", "file.ncx", "--output=new")
    assert asked == [2]


def test_a_model_of_characters_is_refused(run, tmp_path):
    checkpoint = run.checkpoint()
    checkpoint["tokenizer"] = {"tokenizer": "char", "chars": ["a"]}
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(ConfigError, match=r"a model of 'char' tokens, expected bytes"):
        compress.load_model(tmp_path)


@pytest.mark.parametrize("argv, expected", [
    (["c", "no_such_file"], "cannot be read"), (["x", "file"], "data.compress c FILE"), (["c"], "c FILE"),
    ([], "d FILE.ncx"), (["c", "file", "--threads=-1"], "threads=-1"),
    (["c", "empty"], "nothing to compress")])
def test_bad_command_lines_say_what_to_type(run, tmp_path, argv, expected):
    (tmp_path / "empty").write_bytes(b"")
    argv = [*argv, *words(out_dir=run.folder / "out")] if len(argv) > 1 else argv
    job = Job("data/compress.py", argv, tmp_path)
    one_sentence(job.wait(), "compress.py", expected)


def test_the_header_is_json_without_a_path(archive, tmp_path):
    header, payload = compress.unpack(archive.read_bytes(), archive)
    assert str(tmp_path) not in json.dumps(header) and len(payload) % 4 == 0


def test_both_ways_show_how_far_they_are(run, tmp_path):
    content = b"def f(x):\n    return x\n" * 40
    (tmp_path / "text").write_bytes(content)
    for number, (words_, new) in enumerate([(["c", "text"], "text.ncx"), (["d", "text.ncx"], "back")]):
        keys = words(out_dir=run.folder / "out", **({"output": "back"} if number else {"threads": 1}))
        done = Job("data/compress.py", [*words_, *keys], tmp_path, name=f"job{number}").wait()
        assert done.status == 0, done.err
        assert "100%" in done.err and f"/{len(content)}" in done.err and done.out.startswith(new)
    assert (tmp_path / "back").read_bytes() == content
