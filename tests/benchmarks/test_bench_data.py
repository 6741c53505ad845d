"""What bench.py measures of data: the records hold what they say, on tiny inputs."""
import json
from pathlib import Path

import pytest
from conftest import Trainer

from benchmarks import compress, corpus, fertility, readme
from configurator import ConfigError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
KOREAN = "모든 국민은 법 앞에 평등하다. 대한민국의 주권은 국민에게 있다.\n"
ENGLISH = "All citizens are equal before the law.\n"


def test_fertility_compares_four_vocabularies_and_extrapolates_openly(tmp_path, monkeypatch, capsys):
    if not (SHARED / "gpt2_bpe").is_dir():
        pytest.skip(f"GPT-2's vocabulary is not in {SHARED}/gpt2_bpe")
    monkeypatch.chdir(tmp_path)
    Path("korean").write_text(KOREAN * 200, encoding="utf-8")
    Path("english").write_text(ENGLISH * 200, encoding="utf-8")
    monkeypatch.setenv("NANOCORTEX_GPT2_BPE", "")
    cfg = fertility.Fertility(korean="korean", english="english", gpt2=str(SHARED / "gpt2_bpe"),
                               texts="korean,english", vocab_size=400, extended_size=50300, plot="record.png")
    record = json.loads(json.dumps(fertility.fertility(cfg)))
    assert set(record["vocab_sizes"]) == {"GPT-2", "ordinary", "new", "extended"}
    english, korean = record["fertility"]["english"], record["fertility"]["korean"]
    assert english["extended"]["tokens"] == english["GPT-2"]["tokens"]
    assert record["encoded_as_by_gpt2"] == {"korean": False, "english": True}
    assert korean["extended"]["tokens_per_char"] < 0.5 < korean["GPT-2"]["tokens_per_char"]
    assert len(record["curve"]["points"]) == 6 and (tmp_path / "record.png").stat().st_size > 5000
    rows = list(readme.fertility_rows(record))
    assert len(rows) == 8 and all(row.count("|") == 4 for row in rows)


def test_compression_is_restored_and_beside_the_archivers(tmp_path, data, capsys):
    pytest.importorskip("constriction")
    pytest.importorskip("zstandard")
    trainer = Trainer(tmp_path, data)
    trainer()
    (tmp_path / "file").write_text(ENGLISH * 9)
    cfg = compress.Compression(files=str(tmp_path / "file"), out_dir=str(tmp_path / "out"))
    record = compress.compress(cfg)
    one = record["files"]["file"]
    assert one["restored"] and one["bytes"] == len(ENGLISH) * 9 and one["sizes"]["gzip -9"] < one["bytes"]
    assert all(one["bits_per_byte"][name] > 0 for name in readme.ARCHIVERS)
    [row] = readme.compression_rows(record)
    assert row.count("|") == 6


def test_a_generated_corpus_is_the_same_again_and_of_the_size_asked_for(tmp_path):
    for name in ("a", "b"):
        corpus.generate(tmp_path / name, 1e6)
    first = (tmp_path / "a").read_bytes()
    assert first == (tmp_path / "b").read_bytes() and 1e6 <= len(first) < 3e6
    assert all(json.loads(line)["text"] for line in first.decode().splitlines())


@pytest.mark.slow
def test_memory_of_a_preparation_that_is_killed_and_begun_again(tmp_path, capsys):
    pytest.importorskip("psutil")
    pytest.importorskip("datasets")
    cfg = corpus.Corpus(gigabytes=0.02, tokenizer="byte", every=0.1, plot=str(tmp_path / "record.png"))
    record = corpus.corpus(cfg)
    assert record["same_files"] and record["runs"]["whole"]["peak_mb"] < 1000
    assert (tmp_path / "record.png").stat().st_size > 5000


@pytest.mark.parametrize("make, expected", [
    (lambda: fertility.Fertility(), "--korean=FILE"), (lambda: corpus.Corpus(gigabytes=0), "gigabytes"),
    (lambda: compress.Compression(), "--files=FILE"), (lambda: corpus.Corpus(threads=-1), "threads=-1"),
    (lambda: corpus.Corpus(out="no/such/place.json"), "does not exist")])
def test_bad_keys_say_what_to_type(make, expected):
    with pytest.raises(ConfigError, match=expected):
        make()
