"""Models of others in bench.py: text in their own tokens, their loss, and llama.cpp beside them."""
import json

import pytest
import torch
from conftest import TEXT, Job, one_sentence, record_of, words

from benchmarks import compare, foreign
from configurator import ConfigError, configure
from data import dataset as datasets
from data import tokenizer as tokenizers
from model import GPT, GPTConfig
from training import pretrained

SHAPE = dict(block_size=64, vocab_size=300, n_layer=2, n_head=2, n_embd=64, mlp_units=96, norm="rmsnorm",
             pos="rope", act="swiglu", bias=False, n_kv_head=1)
QUICK = dict(quick=True, device="cpu", threads=1, repeats=3, temperature=0.0)


@pytest.fixture(scope="module")
def gguf_tokenizer():
    from test_llama import gguf_tokenizer
    return gguf_tokenizer()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory, gguf_tokenizer):
    """A folder with a tiny random Llama in a GGUF file that has a tokenizer, and a text."""
    for package in ("gguf", "tokenizers"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    from benchmarks import peers
    folder = tmp_path_factory.mktemp("theirs")
    model = GPT(GPTConfig(**SHAPE | dict(vocab_size=len(gguf_tokenizer["ggml.tokens"]))), seed=3).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() == 2 else 1)
    peers.write_gguf(model, "f32", folder / "tiny.gguf", gguf_tokenizer)
    (folder / "some.txt").write_text(4 * TEXT, encoding="utf-8")
    return folder


@pytest.fixture
def there(theirs, monkeypatch):
    monkeypatch.chdir(theirs)
    return theirs


def compared(*runs, **keys):
    cfg = configure(compare.Compare, words(**QUICK | keys), base={"runs": runs})
    return compare.compare(cfg)


def test_a_text_is_encoded_once_in_the_tokens_of_the_model(there, capsys):
    about = {"tokenizer": pretrained.description_of("tiny.gguf", 0), "foreign": True}
    folder = foreign.data_of("some.txt", about)
    assert "some.txt" in capsys.readouterr().out
    meta, tokenizer = datasets.meta_of(folder), tokenizers.load(folder)
    whole = (there / "some.txt").read_text(encoding="utf-8")
    parts = [tokenizer.decode(torch.from_file(str(folder / f"{split}.bin"), dtype=torch.int16,
                                              size=meta["tokens"][split]).tolist())
             for split in datasets.SPLITS]
    assert "".join(parts) == whole and len(parts[1]) == len(whole) - int(0.9 * len(whole))
    assert foreign.data_of("some.txt", about) == folder and not capsys.readouterr().out
    (there / "some.txt").write_text("another\n" * 99)
    other = foreign.data_of("some.txt", about)
    (there / "some.txt").write_text(whole, encoding="utf-8")
    assert other != folder and foreign.data_of("some.txt", about) == folder
    with pytest.raises(ConfigError, match=r"tokenizer is not known.*--dataset=FOLDER"):
        foreign.data_of("some.txt", {"foreign": True})


def test_the_built_in_text_stands_in_where_nothing_is_named(there, monkeypatch):
    files = ["def f():\n    return 1\n" * 20, "# é\n" * 30, "x = 2\n"]
    ids = [list((text + "\0").encode()) for text in files]
    splits = {"train": ids, "val": ids[1:]}
    datasets.write_dataset(there / "pylib", splits, tokenizers.ByteTokenizer(), "here")
    monkeypatch.setattr(datasets, "prepare_if_missing", lambda name: there / name)
    about = {"tokenizer": pretrained.description_of("tiny.gguf", 0), "foreign": True}
    folder = compare.data_of("", about)
    tokenizer, count = tokenizers.load(folder), datasets.meta_of(folder)["tokens"]["val"]
    found = torch.from_file(str(folder / "val.bin"), dtype=torch.int16, size=count).tolist()
    assert tokenizer.decode(found) == "".join(files[1:])
    monkeypatch.setattr(foreign, "LIBRARY", 450)
    shorter = datasets.meta_of(foreign.data_of("", about))["tokens"]
    assert 0 < shorter["train"] < datasets.meta_of(folder)["tokens"]["train"]


def test_a_gguf_file_is_a_run_with_a_loss_in_bits_a_byte_beside_llama_cpp(there):
    pytest.importorskip("llama_cpp", reason="llama_cpp is not installed")
    found = compared("tiny.gguf", "tiny.gguf@int8", "tiny.gguf@mlp_topk=0.5+gate_first=True",
                     "tiny.gguf@mlp_screen=4+mlp_live=0.5", dataset="some.txt", dtype="float32",
                     llamacpp=True)
    sides, names = found["runs"], [*found["runs"]]
    assert names[:4] == ["tiny.gguf", "tiny.gguf@int8", "tiny.gguf@mlp_topk=0.5+gate_first=True",
                         "tiny.gguf@mlp_screen=4+mlp_live=0.5"]
    assert names[4:] == [f"llama.cpp {kind}" for kind in ("its own file", "bf16", "q8_0", "q4_0")]
    own = sides["tiny.gguf"]
    for name, side in sides.items():
        assert side["bits_per_byte"] > 1 and side["decode"]["median"] > 0 and side["held_out_tokens"] > 99
        assert side["to_first"]["interval"][0] <= side["loss"] - own["loss"] + 1e-4, name
    assert sides["llama.cpp its own file"]["loss"] == pytest.approx(own["loss"], abs=1e-3)
    assert len({side["loss"] for side in sides.values()}) >= 7
    sparse, whole = sides["tiny.gguf@mlp_topk=0.5+gate_first=True"], own["weight_bytes"]
    mlp = 2 * 3 * 96 * 64 * 4
    assert sparse["weight_bytes"] == pytest.approx(whole - mlp / 3, abs=2)
    assert sides["llama.cpp its own file"]["weight_bytes"] == pytest.approx(whole, abs=2)
    assert sides["llama.cpp q4_0"]["macs"] == pytest.approx(own["macs"], abs=2)


@pytest.mark.parametrize("keys", [dict(temperature=0.8), dict(threads=0)], ids=str)
def test_llama_cpp_stands_beside_greedy_sides_on_as_many_threads(there, keys):
    pytest.importorskip("llama_cpp", reason="llama_cpp is not installed")
    with pytest.raises(ConfigError, match="--temperature=0 --threads=2"):
        compared("tiny.gguf", llamacpp=True, **keys)


def test_a_longer_context_is_cropped_and_the_text_of_a_normal_run_may_be_a_file(there, monkeypatch):
    monkeypatch.setattr(foreign, "CONTEXT", 16)
    model, about = compare.load("tiny.gguf")
    assert model.config.block_size == 16 and about["foreign"] and about["tokenizer"]["tokenizer"] == "hf"


@pytest.mark.slow
def test_a_gguf_file_is_made_sparse(theirs):
    job = Job("bench.py", ["sparsify", "tiny.gguf", *words(
        threads=1, dtype="float32", tokens=512, minutes=0, loss_only=True, dataset="some.txt", max_loss=0.5,
        only="units", trials="kept")], theirs).wait()
    assert job.status == 0, job.err
    record = record_of(job)
    assert {"mlp_topk=0.7, gate_first=True", "mlp_topk=0.7", "mlp_screen=16, mlp_live=0.8"} <= record[
        "points"].keys()
    assert any("--init_from=tiny.gguf" in line for lines in record["commands"].values() for line in lines)
    json.dumps(record)


def test_bad_words_are_one_sentence(theirs):
    for argv, parts in ((["compare", "none.gguf"], ["none.gguf"]),
                        (["sparsify", "none.gguf"], ["none.gguf", "neither a run's folder"])):
        one_sentence(Job("bench.py", argv, theirs).wait(), "bench.py", *parts)
