"""Export: what is written for others gives the same logits when it is read back."""
import itertools
import json

import pytest
import torch
from arms import ARMS, build, tokens
from conftest import Job, one_sentence, words

from configurator import ConfigError
from data.tokenizer import ByteTokenizer
from decode.quantized import BITS, quantize
from layers import TwoOfFour
from model import build_model
from training import checkpoint, export
from training.pretrained import GPT2_SIZES

safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")


def run_of(folder, arm, **changes):
    """A folder with the checkpoint of an arm's tiny model -> the model."""
    model = build(arm, std=0.2, **changes)
    checkpoint.save({"model": model.state_dict(), "model_args": model.config.model_args(), "iter_num": 7,
                     "config": {"dataset": "shakespeare_char"}}, folder / "ckpt.pt")
    return model


def exported(folder, to, **keys):
    """Export as a user does -> the folder that was written."""
    export.main(export.ExportConfig(out_dir=str(folder), to=to, dtype="float32",
                                    export_dir=str(folder / to), **keys))
    return folder / to


@pytest.mark.parametrize("name", ARMS)
def test_safetensors_come_back_with_equal_logits(tmp_path, name):
    model = run_of(tmp_path, ARMS[name])
    folder, idx = exported(tmp_path, "safetensors"), tokens(2, 16)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded, path = checkpoint.read(folder)
    again = build_model(loaded, path).eval()
    assert again.config == model.config
    assert torch.equal(again(idx, idx)[0], model(idx, idx)[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_hugging_face_reads_a_dense_model_with_equal_logits(tmp_path, bias, tie_weights):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    eps = 0.0 if bias else 0.01
    model, idx = run_of(tmp_path, dict(bias=bias, tie_weights=tie_weights, norm_eps=eps)), tokens(3, 16)
    folder = exported(tmp_path, "hf")
    peer = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    torch.testing.assert_close(peer(idx).logits, model(idx, idx)[0], atol=1e-5, rtol=1e-5)
    greedy = peer.generate(idx[:, :4], max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(greedy, model.generate(idx[:, :4], 8, temperature=0))
    if bias and tie_weights:
        ours = type(model).from_pretrained(str(folder)).eval()
        assert torch.equal(ours(idx, idx)[0], model(idx, idx)[0])


@pytest.mark.parametrize("name", [name for name in ARMS if name not in
                                  ("gpt2", "no_bias", "recompute", "untied", "screen", "units", "zero_init",
                                   "loss_chunks", "norm_eps", "gelu_tanh")])
def test_what_gpt2_has_no_name_for_is_one_sentence(tmp_path, name):
    run_of(tmp_path, ARMS[name])
    result = Job("training/export.py", words(out_dir=tmp_path, to="hf"), tmp_path).wait()
    one_sentence(result, "export.py", "has no counterpart in GPT-2", "--to=safetensors")
    assert not tmp_path.with_name(tmp_path.name + "-hf").exists()


def test_an_exported_run_samples_and_trains_on(train):
    train(max_iters=4, columns=8, columns_active=2)
    out, folder = train.folder / "out", train.folder / "st"
    done = Job("training/export.py", words(out_dir=out, to="safetensors", export_dir=folder, dtype="float32"),
               train.folder).wait()
    assert done.status == 0 and "sample.py" in done.out, done.err
    said = [Job("sample.py", words(out_dir=place, num_samples=1, max_new_tokens=9, device="cpu", top_k=0),
                train.folder).wait().out for place in (out, folder)]
    assert said[0] == said[1] and len(said[0]) > 9
    train(init_from=folder, out="more", max_iters=1, learning_rate=0, min_lr=0)
    before, after = train.checkpoint()["model"], train.checkpoint("more")["model"]
    assert all(torch.equal(before[key], after[key]) for key in before)


def held(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("to", ["packed", "safetensors", "hf"])
@pytest.mark.parametrize("kind", ["run", "nanoGPT's", "log", "live", "copy", "stopped", "swapped"])
def test_an_export_into_a_folder_with_a_run_is_refused(tmp_path, case, to, kind):
    """Another run's folder, whole or a part of it: one sentence, and its bytes stay."""
    run_of(tmp_path, ARMS["two_of_four"] if to == "packed" else {})
    other = tmp_path / "other"
    other.mkdir()
    if kind in ("run", "swapped"):
        run_of(other, ARMS["columns"])
    if kind == "swapped":                                       # an export's manifest over a run's checkpoint
        checkpoint.save({"model": {}, "model_args": {}}, other / "ckpt.pt")
        (other / "ckpt.pt").write_bytes((tmp_path / "ckpt.pt").read_bytes())
    name = {"nanoGPT's": "ckpt.pt", "log": "metrics.jsonl", "live": "run.lock", "copy": "ckpt-20.pt",
            "stopped": "ckpt_last.pt"}.get(kind)
    if name:
        (other / name).write_bytes(b"{}")
    before = held(other)
    for _ in range(2):
        result = Job("training/export.py", words(out_dir=tmp_path, to=to, export_dir=other), tmp_path).wait()
        one_sentence(result, "export.py", str(other), "holds a run", "name another folder")
        assert held(other) == before
        case()


def test_an_export_may_be_written_again_but_not_over_another(tmp_path, case):
    run_of(tmp_path, ARMS["two_of_four"])
    for to in ("packed", "safetensors"):
        exported(tmp_path, to)
        first = held(exported(tmp_path, to))
        for form in ("packed", "safetensors"):
            if form != to:
                with pytest.raises(ConfigError, match="an export of another form"):
                    export.main(export.ExportConfig(out_dir=str(tmp_path), to=form,
                                                    export_dir=str(tmp_path / to)))
        assert held(tmp_path / to) == first
        case()


def test_an_export_leaves_a_model_of_somebody_else_alone(tmp_path, case):
    run_of(tmp_path, {})
    exported(tmp_path, "hf")
    exported(tmp_path, "hf")                                    # its own is written again
    theirs = tmp_path / "gpt2"
    theirs.mkdir()
    for names in (["config.json", "model.safetensors"], ["pytorch_model.bin"], ["model.safetensors"]):
        for name in names:
            (theirs / name).write_text('{"model_type": "gpt2"}')
        for to in ("hf", "safetensors"):
            with pytest.raises(ConfigError, match=r"a model that export\.py did not write"):
                export.main(export.ExportConfig(out_dir=str(tmp_path), to=to, export_dir=str(theirs)))
        assert held(theirs) == dict.fromkeys(names, b'{"model_type": "gpt2"}')
        for name in names:
            (theirs / name).unlink()
        case()


@pytest.mark.parametrize("typed", [".", "./", "../run", "../run/", "", "./.", "sub/.."])
def test_an_export_of_the_folder_one_is_in_lands_beside_it(tmp_path, case, typed):
    run = tmp_path / "run"
    (run / "sub").mkdir(parents=True)
    run_of(run, {})
    before = held(run)
    done = Job("training/export.py", words(out_dir=typed, to="safetensors"), run).wait()
    assert done.status == 0, done.err
    for path in run.glob("job.*"):
        path.unlink()
    assert held(run) == before and sorted(path.name for path in tmp_path.iterdir()) == ["run",
                                                                                        "run-safetensors"]
    assert sorted(held(tmp_path / "run-safetensors")) == ["config.json", "model.safetensors"]
    case()


def test_an_export_whose_folder_has_no_name_is_one_sentence(tmp_path):
    refused = Job("training/export.py", words(out_dir="/", to="hf"), tmp_path).wait()
    one_sentence(refused, "export.py", "--export_dir=")


@pytest.mark.parametrize("name, content, words_", [
    ("config.json", "{", "config.json"), ("config.json", "[1]", "config.json"),
    ("config.json", '{"model_args": {"n_lair": 2}}', "do not fit"),
    ("model.safetensors", "no header", "cannot be read")])
def test_a_damaged_export_is_one_sentence(tmp_path, name, content, words_):
    run_of(tmp_path, {})
    folder = exported(tmp_path, "safetensors")
    (folder / name).write_text(content)
    one_sentence(Job("sample.py", words(out_dir=folder, device="cpu"), tmp_path).wait(), "sample.py", words_)


def test_the_config_says_what_the_model_is(tmp_path):
    run_of(tmp_path, ARMS["columns"])
    said = json.loads((exported(tmp_path, "safetensors") / "config.json").read_text(encoding="utf-8"))
    assert said["model_type"] == "nanocortex" and said["model_args"]["columns"] == 8
    assert said["model_type"] not in GPT2_SIZES


# ------------------------------------------------ whole numbers


@pytest.mark.parametrize("name", ARMS)
def test_whole_numbers_come_back_with_equal_logits(tmp_path, name):
    model, idx = run_of(tmp_path, ARMS[name]), tokens(2, 16)
    for kind in BITS:
        folder = exported(tmp_path, "packed", quantize=kind)
        loaded, path = checkpoint.read(folder)
        again = build_model(loaded, path).eval()
        expected = quantize(build_model(*checkpoint.read(tmp_path)).eval(), kind)
        assert not any(key.endswith(("c_fc.weight", "lm_head.weight")) for key in loaded["model"])
        with torch.no_grad():
            assert torch.equal(again(idx, idx)[0], expected(idx, idx)[0])
            assert not torch.equal(again(idx, idx)[0], model(idx, idx)[0])
        with pytest.raises(ConfigError, match="holds quantised weights, which cannot learn"):
            build_model(loaded, path, learns=True)
        for to in ("packed", "safetensors", "hf"):
            with pytest.raises(ConfigError, match="holds quantised weights: name the checkpoint"):
                export.main(export.ExportConfig(out_dir=str(folder), to=to, export_dir=str(tmp_path / "x")))


@pytest.mark.parametrize("name", ["gpt2", "untied", "relu2", "columns", "mlp_screen", "two_of_four", "swiglu",
                                  "attn_topk", "screen"])
def test_bits_by_part_come_back_with_equal_logits(tmp_path, name):
    """From weights as they were trained and, where they are 2:4, from packed ones."""
    run_of(tmp_path, ARMS[name], n_embd=36)
    runs = [tmp_path, exported(tmp_path, "packed")] if name == "two_of_four" else [tmp_path]
    idx = tokens(2, 16)
    for run, kind in itertools.product(runs, ("mlp=4", "attn=8,head=4", "head=8", "mlp=8,attn=4")):
        folder = tmp_path / "whole"
        export.main(export.ExportConfig(out_dir=str(run), dtype="float32", quantize=kind,
                                        export_dir=str(folder)))
        loaded, path = checkpoint.read(folder)
        again, expected = build_model(loaded, path).eval(), quantize(build_model(*checkpoint.read(run)), kind)
        assert loaded["quantize"] == kind
        assert name != "two_of_four" or not any(isinstance(part, TwoOfFour) for part in again.modules())
        with torch.no_grad():
            torch.testing.assert_close(again(idx, idx)[0], expected.eval()(idx, idx)[0], atol=1e-5, rtol=0)
        with pytest.raises(ConfigError, match="whole numbers already"):
            quantize(again, "int8")


def test_scales_are_weighted_where_the_training_text_is_here(tmp_path, data, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = build({}, std=0.2, vocab_size=256)
    for dataset, said in ((str(data), f"weighted by the inputs of 8,192 tokens of {data}"),
                          ("gone/", "the training data are not here")):
        run = tmp_path / dataset.strip("/").replace("/", "-")
        run.mkdir()
        checkpoint.save({"model": model.state_dict(), "model_args": model.config.model_args(), "iter_num": 7,
                         "config": {"dataset": dataset}}, run / "ckpt.pt")
        states = [checkpoint.read(exported(run, "packed", quantize=kind))[0]["model"]
                  for kind in ("mlp=4", "int8")]
        printed = capsys.readouterr().out.splitlines()
        assert sum(said in line for line in printed) == 1 and "least squares" not in printed[-2]
        plain = quantize(build({}, std=0.2, vocab_size=256), "mlp=4").state_dict()
        same = [torch.equal(states[0][key], plain[key]) for key in plain if key.endswith("mlp.c_fc.codes")]
        assert same == [dataset == "gone/"] * 2


def test_a_damaged_file_of_whole_numbers_is_one_sentence(tmp_path):
    run_of(tmp_path, {})
    loaded, path = checkpoint.read(exported(tmp_path, "packed", quantize="int4"))
    key = "transformer.h.0.mlp.c_fc.codes"
    kinds = "int3", "mlp=5", "attn=4", ["mlp=4"], "q4_0"
    for change in (*({"quantize": kind} for kind in kinds), {"quantize": 8}, {"quantize": "int8"},
                   {"model": loaded["model"] | {key: loaded["model"][key][:-1]}}):
        with pytest.raises(ConfigError, match="model_args and weights do not fit this version"):
            build_model(loaded | change, path)


def test_a_quantised_run_samples_and_says_its_losses(train, data):
    train(max_iters=2)
    out, folder = train.folder / "out", train.folder / "whole"
    draw = dict(num_samples=1, max_new_tokens=9, device="cpu", dtype="float32", top_k=0)
    done = Job("training/export.py", words(out_dir=out, quantize="int8", export_dir=folder, dtype="float32",
                                           val=True), train.folder).wait()
    loss = f"tokens of {data}"
    assert done.status == 0 and loss in done.out and "quantised to int8" in done.out, done.err
    made, loaded = (Job("sample.py", words(**draw, **keys), train.folder).wait() for keys in
                    (dict(out_dir=out, quantize="int8", val=data), dict(out_dir=folder)))
    assert made.out == loaded.out and len(made.out) > 9 and loss in made.err and loss not in loaded.err
    before, after = (float(made.err.split(word)[1].split()[0]) for word in ("loss ", "quantised to int8 "))
    assert "quantised to int8" in done.out and 0 < abs(after - before) < 0.05
    off = Job("sample.py", words(**draw, out_dir=folder), train.folder, {"NANOCORTEX_KERNELS": "off"}).wait()
    assert off.status == 0 and off.out == loaded.out, off.err
    off = Job("sample.py", words(**draw, out_dir=out, quantize="int8"), train.folder,
              {"NANOCORTEX_KERNELS": "off"}).wait()
    assert off.out == loaded.out and "without C kernels" in off.err
    parts, ggml = (Job("sample.py", words(**draw, out_dir=out, quantize=kind, val=True), train.folder).wait()
                   for kind in ("mlp=4,attn=8", "q4_0"))
    assert "quantised to mlp=4,attn=8: " in parts.err and f"inputs of 8,192 tokens of {data}" in parts.err
    assert "ggml's blocks" in ggml.err and "decode engine" in ggml.err and len(ggml.out) > 9
    for kind, said in (("mlp=5", "mlp=4,attn=8,head=8"), ("mlp=16", "leaves all weights")):
        bad = Job("sample.py", words(out_dir=out, quantize=kind), train.folder).wait()
        one_sentence(bad, "sample.py", f"quantize='{kind}'", said)
    again = Job("sample.py", words(out_dir=folder, quantize="int8"), train.folder).wait()
    one_sentence(again, "sample.py", "whole numbers already", "leave quantize out")
    learns = Job("train.py", words(init_from=folder, dataset=data, out_dir=train.folder / "x"),
                 train.folder).wait()
    one_sentence(learns, "train.py", "cannot learn")


@pytest.mark.parametrize("script", ["sample.py", "training/export.py"])
@pytest.mark.parametrize("keys, parts", [
    (dict(quantize="int3"), ["quantize='int3' must be int8, int4, q4_all"]),
    (dict(quantize="mlp=4,atn=8"), ["quantize='mlp=4,atn=8' must be int8", "attn, mlp, head"]),
    (dict(val=True), ["val=True has no effect without quantize"]),
    (dict(quantize="int8", val=True), ["dataset='gone/', are not here", "type --val=FOLDER"]),
    (dict(quantize="int8", val="gone/"), ["data set 'gone/' is no folder"]),
    (dict(quantize="int8", val="empty/"), ["has no train.bin and no val.bin"]),
])
def test_bad_words_about_whole_numbers_say_what_to_type(tmp_path, script, keys, parts):
    model = build({}, vocab_size=256)
    checkpoint.save({"model": model.state_dict(), "model_args": model.config.model_args(), "iter_num": 7,
                     "tokenizer": ByteTokenizer().meta(), "config": {"dataset": "gone/"}},
                    tmp_path / "ckpt.pt")
    (tmp_path / "empty").mkdir()
    result = Job(script, words(out_dir=tmp_path, **keys), tmp_path).wait()
    one_sentence(result, script.split("/")[-1], *parts)


def test_whole_numbers_in_another_form_are_refused():
    with pytest.raises(ConfigError, match="quantize=int8 and to=hf"):
        export.ExportConfig(to="hf", quantize="int8")
    for kind in ("q4_0", "q8_0", "attn=8,mlp=q4_0"):
        with pytest.raises(ConfigError, match=f"quantize='{kind}': .*sample.py --quantize={kind} --val=True"):
            export.ExportConfig(quantize=kind)
