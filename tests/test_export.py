"""Export: what is written for others gives the same logits when it is read back."""
import json

import pytest
import torch
from arms import ARMS, build, tokens
from conftest import Job, one_sentence, words

import checkpoint
import export
from pretrained import GPT2_SIZES

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
    again = checkpoint.build_model(loaded, path).eval()
    assert again.config == model.config
    assert torch.equal(again(idx, idx)[0], model(idx, idx)[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_hugging_face_reads_a_dense_model_with_equal_logits(tmp_path, bias, tie_weights):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, idx = run_of(tmp_path, dict(bias=bias, tie_weights=tie_weights)), tokens(3, 16)
    folder = exported(tmp_path, "hf")
    peer = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    torch.testing.assert_close(peer(idx).logits, model(idx, idx)[0], atol=1e-5, rtol=1e-5)
    greedy = peer.generate(idx[:, :4], max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(greedy, model.generate(idx[:, :4], 8, temperature=0))
    if bias and tie_weights:
        ours = type(model).from_pretrained(str(folder)).eval()
        assert torch.equal(ours(idx, idx)[0], model(idx, idx)[0])


@pytest.mark.parametrize("name", [name for name in ARMS if name not in
                                  ("gpt2", "no_bias", "recompute", "untied", "screen", "units", "zero_init")])
def test_what_gpt2_has_no_name_for_is_one_sentence(tmp_path, name):
    run_of(tmp_path, ARMS[name])
    result = Job("export.py", words(out_dir=tmp_path, to="hf"), tmp_path).wait()
    one_sentence(result, "export.py", "has no counterpart in GPT-2", "--to=safetensors")
    assert not tmp_path.with_name(tmp_path.name + "-hf").exists()


def test_an_exported_run_samples_and_trains_on(train):
    train(max_iters=4, columns=8, columns_active=2)
    out, folder = train.folder / "out", train.folder / "st"
    done = Job("export.py", words(out_dir=out, to="safetensors", export_dir=folder, dtype="float32"),
               train.folder).wait()
    assert done.status == 0 and "sample.py" in done.out, done.err
    said = [Job("sample.py", words(out_dir=place, num_samples=1, max_new_tokens=9, device="cpu", top_k=0),
                train.folder).wait().out for place in (out, folder)]
    assert said[0] == said[1] and len(said[0]) > 9
    train(init_from=folder, out="more", max_iters=1, learning_rate=0, min_lr=0)
    before, after = train.checkpoint()["model"], train.checkpoint("more")["model"]
    assert all(torch.equal(before[key], after[key]) for key in before)


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
