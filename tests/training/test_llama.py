"""Llama's family: the model that its folder or its GGUF file holds, or one sentence; and back."""
import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from arms import tokens
from conftest import TEXT, Job, one_sentence, words
from torch.nn import functional as F

import sample
from configurator import ConfigError
from data import dataset
from data import tokenizer as tokenizers
from data.tokenizer import bytes_of_characters
from decode.quantized import kept_levels, whole_parts
from model import GPT, GPTConfig, build_model
from training import checkpoint, export, gguf_file, llama, pretrained
from viz.chat import Chat

safetensors_torch = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
SMALL = dict(model_type="llama", vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16, rms_norm_eps=1e-3,
             rope_theta=100.0, tie_word_embeddings=False)


def written(folder, **fields):
    """A folder that nobody's package has written: random weights by name and a config.json -> the folder."""
    said = SMALL | fields
    generator, c = torch.Generator().manual_seed(1), llama.fields_of(said, folder / "config.json", ())
    weights = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in
               llama.shapes_of(c).items() if not (name.startswith("lm_head") and c["tie_word_embeddings"])}
    return with_weights(with_config(folder, said), weights)


def with_config(folder, said):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def with_weights(folder, weights):
    safetensors_torch.save_file({name: t.contiguous() for name, t in weights.items()},
                                folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def frequencies(said):
    """What a position turns by, scaled as transformers' modeling_rope_utils does for rope_type llama3."""
    D = said["hidden_size"] // said["num_attention_heads"]
    plain, s = said["rope_theta"] ** (-torch.arange(0, D, 2) / D), said.get("rope_scaling")
    if not s:
        return plain
    low, high, L = s["low_freq_factor"], s["high_freq_factor"], s["original_max_position_embeddings"]
    length = 2 * math.pi / plain
    smooth = (L / length - low) / (high - low)
    between = (1 - smooth) * plain / s["factor"] + smooth * plain
    return torch.where(length > L / low, plain / s["factor"], torch.where(length < L / high, plain, between))


def equation(folder, idx):
    """Llama's logits, written down here once more from their papers (2302.13971, 2305.13245, 2104.09864):
    queries and keys turn as complex numbers, each key is copied for the queries that share it."""
    said = json.loads((folder / "config.json").read_text())
    w = safetensors_torch.load_file(folder / "model.safetensors")
    heads, D = said["num_attention_heads"], said["hidden_size"] // said["num_attention_heads"]
    turn = torch.outer(torch.arange(idx.size(1)), frequencies(said))
    window = said.get("sliding_window") if said["model_type"] == "mistral" else None
    window = window or idx.size(1)
    age = torch.arange(idx.size(1))[:, None] - torch.arange(idx.size(1))

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + said["rms_norm_eps"]).sqrt() * w[name + ".weight"]

    def linear(x, name):
        return x @ w[name + ".weight"].t() + w.get(name + ".bias", 0)

    def turned(x):
        x = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(turn), turn)[:, None]
        return torch.cat((x.real, x.imag), dim=-1)

    x = w["model.embed_tokens.weight"][idx]
    for layer in range(said["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        h = norm(x, at + "input_layernorm")
        q, k, v = (linear(h, f"{at}self_attn.{name}_proj").unflatten(-1, (-1, D)) for name in "qkv")
        k, v = (t.repeat_interleave(heads // t.size(2), dim=2) for t in (turned(k), v))
        scores = torch.einsum("bihd,bjhd->bhij", turned(q), k) / math.sqrt(D)
        scores = scores.masked_fill((age < 0) | (age >= window), -math.inf).softmax(-1)
        x = x + linear(torch.einsum("bhij,bjhd->bihd", scores, v).flatten(2), at + "self_attn.o_proj")
        h = norm(x, at + "post_attention_layernorm")
        h = F.silu(linear(h, at + "mlp.gate_proj")) * linear(h, at + "mlp.up_proj")
        x = x + linear(h, at + "mlp.down_proj")
    return norm(x, "model.norm") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).t()


def same(place, folder=None, idx=None):
    idx = tokens(3, 12) if idx is None else idx
    model = GPT.from_pretrained(str(place)).eval()
    torch.testing.assert_close(model(idx, idx)[0], equation(folder or place, idx), atol=1e-5, rtol=1e-5)
    return model


def refused(place, *parts):
    with pytest.raises(ConfigError) as error:
        GPT.from_pretrained(str(place))
    sentence = str(error.value)
    assert "\n" not in sentence and len(sentence) < 600
    for part in parts:
        assert part in sentence, f"{part!r} is missing in: {sentence}"


def scaled(heads, factor=8.0, low=1.0, high=4.0, original=32):
    """Fields of a model whose rotation is scaled as Llama 3.1's."""
    rope = dict(rope_type="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high,
                original_max_position_embeddings=original)
    return dict(num_attention_heads=heads, num_key_value_heads=2, max_position_embeddings=64,
                rope_scaling=rope)


MODELS = {
    "grouped": {}, "one key": dict(num_key_value_heads=1), "a key each": dict(num_key_value_heads=4),
    "no groups": dict(num_key_value_heads=None), "tied": dict(tie_word_embeddings=True),
    "three layers": dict(num_hidden_layers=3), "wide": dict(intermediate_size=80),
    "biases": dict(attention_bias=True, mlp_bias=True), "biases of the MLP": dict(mlp_bias=True),
    "qwen2": dict(model_type="qwen2", use_sliding_window=False, sliding_window=8, max_window_layers=28),
    "mistral": dict(model_type="mistral", sliding_window=5),
    "mistral without a window": dict(model_type="mistral", sliding_window=None),
    "mistral, a long window": dict(model_type="mistral", sliding_window=16),
    "head_dim": dict(head_dim=4), "another base": dict(rope_theta=1e6),
    "scaled": scaled(4), "scaled, two between": scaled(2, original=20, high=16.0, low=2),
    "scaled, none between": scaled(2, original=19, high=3.0),
    "scaled, one between, near an end": scaled(2, original=20, high=3.0),
    "scaled, all": scaled(4, original=4),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_of_llamas_family_is_computed_as_its_equation_says(tmp_path, name):
    model = same(written(tmp_path / "hf", **MODELS[name]))
    idx = tokens(3, 5)
    for rows, lengths in ((1, None), (3, torch.tensor([5, 2, 4]))):
        new = model.generate(idx[:rows], 9, temperature=0, lengths=lengths)
        for row, length in enumerate([5] if lengths is None else lengths.tolist()):
            text = new[row:row + 1, :length + 9]
            logits = equation(tmp_path / "hf", text)[0, length - 1:-1]
            best = logits.max(-1).values - logits.gather(-1, text[0, length:, None])[:, 0]
            assert best.max() < 1e-4


def test_a_window_of_mistral_is_seen():
    assert GPTConfig(**llama.arguments(llama.fields_of(SMALL | MODELS["mistral"], "", ()))).window_of(1) == 5


# what transformers computes for the same folder

@pytest.mark.parametrize("name", MODELS)
def test_a_folder_that_transformers_has_written_is_computed_as_it_computes_it(tmp_path, name):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    said = SMALL | MODELS[name]
    kind = {"llama": "Llama", "qwen2": "Qwen2", "mistral": "Mistral"}[said["model_type"]]
    torch.manual_seed(1)
    config = getattr(transformers, kind + "Config")(**{k: v for k, v in said.items() if k != "model_type"})
    peer = getattr(transformers, kind + "ForCausalLM")(config)
    with torch.no_grad():
        for p in peer.parameters():
            p.normal_(std=0.3)
    peer.save_pretrained(tmp_path / "hf", max_shard_size="8KB" if name == "wide" else "1GB")
    assert (tmp_path / "hf" / "model.safetensors").exists() == (name != "wide")
    peer = type(peer).from_pretrained(tmp_path / "hf", dtype=torch.float32,
                                      attn_implementation="eager").eval()
    idx = tokens(3, 12)
    ours = GPT.from_pretrained(str(tmp_path / "hf")).eval()(idx, idx)[0]
    torch.testing.assert_close(ours, peer(idx).logits, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# what is not computed is refused

FIELDS = [
    (dict(hidden_act="gelu"), "hidden_act='gelu'"),
    (dict(rope_scaling=dict(type="linear", factor=2.0)), "rope_type='linear', but only llama3's"),
    (dict(rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=8)), "'yarn'"),
    (dict(rope_scaling=dict(rope_type="dynamic", factor=4.0)), "'dynamic'"),
    (dict(rope_scaling=scaled(4)["rope_scaling"] | dict(factor="8")), "factor='8'"),
    (dict(rope_scaling=scaled(4)["rope_scaling"] | dict(factor=0.5)), "factor=0.5 must be at least 1"),
    (dict(rope_scaling=scaled(4, low=4)["rope_scaling"]), "low_freq_factor=4"),
    (dict(rope_scaling=scaled(4)["rope_scaling"] | dict(attention_factor=1.0)), "attention_factor"),
    (dict(rope_scaling=scaled(4, original=8.5)["rope_scaling"]), "embeddings='8.5', expected a whole"),
    (dict(rope_scaling=scaled(4)["rope_scaling"], rope_parameters=scaled(4, 2.0)["rope_scaling"]),
     "different numbers"),
    (dict(rope_parameters=dict(rope_type="llama3", rope_theta=5e5)), "rope_parameters"),
    (dict(rope_parameters=dict(rope_type="default", factor=8.0)), "rope_parameters"),
    (dict(rope_scaling="linear"), "rope_scaling"), (dict(head_dim=8), "head_dim=8"),
    (dict(num_attention_heads=3), "num_attention_heads=3"),
    (dict(num_key_value_heads=3), "num_key_value_heads=3"),
    (dict(num_attention_heads=16, num_key_value_heads=16), "even"), (dict(hidden_size=32), "embed_tokens"),
    (dict(vocab_size=32), "embed_tokens"), (dict(num_hidden_layers=3), "num_hidden_layers=3"),
    (dict(num_hidden_layers=1), "num_hidden_layers=1"), (dict(num_hidden_layers=10**9), "num_hidden_layers"),
    (dict(max_position_embeddings=10**12), "max_position_embeddings"),
    (dict(vocab_size=10**12), "embed_tokens"),
    (dict(intermediate_size=23), "gate_proj"),
    (dict(num_key_value_heads=1), "k_proj"), (dict(attention_bias=True), "q_proj.bias"),
    (dict(tie_word_embeddings=True), "lm_head.weight"), (dict(tie_word_embeddings="no"), "true or false"),
    (dict(rms_norm_eps="1e-5"), "rms_norm_eps"), (dict(rms_norm_eps=0), "rms_norm_eps"),
    (dict(rms_norm_eps=float("nan")), "rms_norm_eps"), (dict(max_position_embeddings=0), "max_position"),
    (dict(num_attention_heads=True), "num_attention_heads"),
    (dict(num_key_value_heads=2.0), "num_key_value_heads"),
    (dict(sliding_window=4), "sliding_window=4"),
    (dict(model_type="qwen2", use_sliding_window=True), "use_sliding"),
    (dict(model_type="qwen3"), "qwen3"),
    (dict(model_type="gemma"), "gemma"),
    (dict(model_type=["llama"]), "llama"),
    (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    (dict(layer_types="all"), "layer_types"),
    (dict(quantization_config={"bits": 4}), "quantization_config"), (dict(logit_scale=2.0), "logit_scale"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    (dict(rope_interleaved=True), "rope_interleaved"),
    (dict(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
    (dict(architectures="LlamaForCausalLM"), "architectures"),
    (dict(num_local_experts=8), "num_local_experts"),
]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return written(tmp_path_factory.mktemp("hf") / "plain")


@pytest.fixture
def plain(kept, tmp_path):
    return shutil.copytree(kept, tmp_path / "plain")


@pytest.mark.parametrize("fields, words", FIELDS, ids=[json.dumps(fields)[1:60] for fields, _ in FIELDS])
def test_a_config_that_means_another_model_is_refused_in_a_sentence(plain, fields, words):
    refused(with_config(plain, SMALL | fields), str(plain), words)


@pytest.mark.parametrize("fields", [
    dict(rope_scaling=None, pretraining_tp=2, attention_dropout=0.1, bos_token_id=1, eos_token_id=[2, 3]),
    dict(rope_parameters=dict(rope_type="default", rope_theta=100.0), rope_theta=5.0), dict(head_dim=None),
    dict(architectures=["LlamaForCausalLM"], torch_dtype="bfloat16", use_cache=True, rope_theta=100),
    dict(rope_interleaved=False, is_llama_config=True, layer_types=["full_attention"] * 2)], ids=str)
def test_fields_that_change_no_logit_are_read_past(plain, fields):
    with_config(plain, SMALL | fields)
    idx = tokens(2, 9)
    ours = GPT.from_pretrained(str(plain)).eval()(idx, idx)[0]
    with_config(plain, SMALL)
    torch.testing.assert_close(ours, equation(plain, idx), atol=1e-5, rtol=1e-5)


KEYS = {
    "a missing key": (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight"),
    "no embedding": (lambda w: w.pop("model.embed_tokens.weight"), "embed_tokens"),
    "no head": (lambda w: w.pop("lm_head.weight"), "lm_head.weight"),
    "one key more": (lambda w: w.update(score=torch.ones(2, 16)), "score"),
    "a bias more": (lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}),
                    "q_proj.bias"),
    "a norm of queries": (lambda w: w.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(4)}),
                          "q_norm"),
    "a transposed matrix": (lambda w: w.update({"model.layers.0.mlp.down_proj.weight": torch.ones(24, 16)}),
                            "down_proj"),
    "integers": (lambda w: w.update({"model.norm.weight": torch.ones(16, dtype=torch.int8)}), "int8"),
}


@pytest.mark.parametrize("name", KEYS)
def test_weights_with_other_keys_are_refused_in_a_sentence(plain, name):
    weights = safetensors_torch.load_file(plain / "model.safetensors")
    KEYS[name][0](weights)
    refused(with_weights(plain, weights), str(plain), KEYS[name][1])


def test_a_folder_in_shards_without_prefix_or_with_old_buffers_is_the_same_model(plain, tmp_path):
    weights = safetensors_torch.load_file(plain / "model.safetensors")
    same(with_weights(shutil.copytree(plain, tmp_path / "old"), weights | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}), plain)
    half = with_weights(shutil.copytree(plain, tmp_path / "half"),
                        {n: t.bfloat16() for n, t in weights.items()})
    rounded = with_weights(shutil.copytree(plain, tmp_path / "rounded"),
                           {n: t.bfloat16().float() for n, t in weights.items()})
    same(half, rounded)
    base = with_config(tmp_path / "base", SMALL | dict(tie_word_embeddings=True))
    headless = {n: t for n, t in weights.items() if "lm_head" not in n}
    same(with_weights(base, {n.removeprefix("model."): t for n, t in headless.items()}),
         with_weights(shutil.copytree(base, tmp_path / "tied"), headless))
    shards = with_config(tmp_path / "shards", SMALL)
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(names.values()):
        safetensors_torch.save_file({n: weights[n] for n in names if names[n] == file}, shards / file)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    same(shards, plain)


# ------------------------------------------------------------------------------------------------------------
# back to their layout

@pytest.mark.parametrize("name", ["grouped", "tied", "biases", "a key each", "another base", "qwen2",
                                  "scaled", "scaled, two between"])
def test_what_export_writes_is_read_by_us_and_by_transformers_as_the_same_model(tmp_path, name):
    model = GPT.from_pretrained(str(written(tmp_path / "hf", **MODELS[name]))).eval()
    (tmp_path / "run").mkdir()
    checkpoint.save({"model": model.state_dict(), "model_args": model.config.model_args()},
                    tmp_path / "run" / "ckpt.pt")
    export.main(export.ExportConfig(out_dir=str(tmp_path / "run"), to="hf", dtype="float32"))
    folder, idx = tmp_path / "run-hf", tokens(3, 12)
    again, logits = same(folder), model(idx, idx)[0]
    assert torch.equal(again(idx, idx)[0], logits) and again.config == model.config
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(peer).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(peer(idx).logits, logits, atol=1e-5, rtol=1e-5)


def test_a_mechanism_has_no_counterpart_in_llama(tmp_path):
    for flags, name in ((dict(mlp_topk=0.5), "mlp_topk"), (dict(window=4), "window"),
                        (dict(qk_norm=True), "qk_norm")):
        model = GPT(GPTConfig(block_size=16, vocab_size=31, n_layer=1, n_head=2, n_embd=16, norm="rmsnorm",
                              pos="rope", act="swiglu", **flags))
        with pytest.raises(ConfigError, match=f"{name}=.*Llama.*to=safetensors"):
            pretrained.to_hf(model)


# ------------------------------------------------------------------------------------------------------------
# GGUF files

def as_gguf(folder, path, arch="llama", kind="F32", keys=(), tokenizer=(), drop=()):
    """The model of a folder as llama.cpp's converter lays it out -> the path. keys: more fields, or others.
    """
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    said, weights = (json.loads((folder / "config.json").read_text()),
                     safetensors_torch.load_file(folder / "model.safetensors"))
    heads, writer = said["num_attention_heads"], gguf.GGUFWriter(path, arch)
    fields = {"block_count": said["num_hidden_layers"], "context_length": said["max_position_embeddings"],
              "embedding_length": said["hidden_size"], "feed_forward_length": said["intermediate_size"],
              "attention.head_count": heads, "attention.head_count_kv": said["num_key_value_heads"] or heads,
              "attention.layer_norm_rms_epsilon": said["rms_norm_eps"], "vocab_size": said["vocab_size"],
              "rope.freq_base": said["rope_theta"], "rope.dimension_count": said["hidden_size"] // heads}
    for name, value in (fields | dict(keys)).items():
        write = (writer.add_bool if isinstance(value, bool) else
                 writer.add_float32 if isinstance(value, float) else
                 writer.add_string if isinstance(value, str) else writer.add_uint32)
        if name not in drop:
            write(f"{arch}.{name}", value)
    for name, value in dict(tokenizer).items():
        write = (writer.add_array if isinstance(value, list) else writer.add_bool if isinstance(value, bool)
                 else writer.add_string if isinstance(value, str) else writer.add_uint32)
        write(f"tokenizer.{name}", value)
    short = {theirs: ours for ours, theirs in (gguf_file.WORDS | gguf_file.OUTSIDE).items()}
    if said.get("rope_scaling"):
        plain = frequencies(said | dict(rope_scaling=None))
        writer.add_tensor("rope_freqs.weight", (plain / frequencies(said)).float().numpy())
    for name, t in weights.items():
        parts = name.rsplit(".", 1)[0].removeprefix("model.layers.").split(".", 1)
        if name.startswith("model.layers."):
            at = f"blk.{parts[0]}.{short[parts[1]]}.{name.rpartition('.')[2]}"
        else:
            at = f"{short[name.removesuffix('.weight')]}.weight"
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            t = t.unflatten(0, (-1, 2, said["hidden_size"] // heads // 2)).transpose(1, 2).flatten(0, 2)
        of = getattr(gguf.GGMLQuantizationType, kind if t.dim() == 2 else "F32")
        writer.add_tensor(at, gguf.quants.quantize(t.contiguous().numpy(), of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["grouped", "one key", "a key each", "tied", "biases", "another base",
                                  *(name for name in MODELS if name.startswith("scaled"))])
def test_a_gguf_file_holds_the_model_that_it_was_made_from(tmp_path, name):
    folder = written(tmp_path / "hf", **MODELS[name])
    same(as_gguf(folder, tmp_path / "model.gguf"), folder)


LLAMA_31 = dict(hidden_size=128, num_attention_heads=1, num_key_value_heads=1, rope_theta=5e5)


@pytest.mark.parametrize("factor, original", [(8.0, 8192), (32.0, 8192), (4.0, 1000)])
def test_a_gguf_files_factors_are_the_numbers_that_made_them(tmp_path, factor, original):
    """At the widths of Llama's heads several frequencies lie between, and its own numbers come back."""
    folder = written(tmp_path / "hf", **LLAMA_31 | dict(rope_scaling=scaled(1, factor, original=original)[
        "rope_scaling"]))
    config = same(as_gguf(folder, tmp_path / "model.gguf"), folder).config
    assert (config.rope_factor, config.rope_low, config.rope_high) == (factor, 1, 4)
    assert config.rope_original == original


@pytest.mark.parametrize("factors", [[1.0, 2.0, 2.0, 9.0], [0.5, 1.0, 1.0, 1.0], [1.0, 1.0],
                                     [8.0, 1.0, 8.0, 1.0], [1.0, 1.0, math.nan, 1.0]], ids=str)
def test_factors_of_a_gguf_file_that_no_numbers_make_are_refused(tmp_path, monkeypatch, factors):
    folder = written(tmp_path / "hf", **scaled(2))
    path = as_gguf(folder, tmp_path / "model.gguf")
    *_, found = [tensor for tensor in gguf_file.opened(path)[0].tensors if "rope" in tensor.name]
    monkeypatch.setattr(gguf_file.opened(path)[0], "tensors", [
        found._replace(data=torch.tensor(factors).numpy()) if tensor is found else tensor
        for tensor in gguf_file.opened(path)[0].tensors])
    refused(path, "rope_freqs.weight", "llama.cpp")


def test_a_gguf_file_of_qwen2_has_its_pairs_apart(tmp_path):
    folder = written(tmp_path / "hf", **MODELS["qwen2"] | dict(sliding_window=None))
    same(as_gguf(folder, tmp_path / "model.gguf", "qwen2"), folder)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_a_quantised_gguf_file_is_what_its_numbers_stand_for(tmp_path, kind):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    folder = written(tmp_path / "hf", hidden_size=64, intermediate_size=96)
    of, weights = (getattr(gguf.GGMLQuantizationType, kind),
                   safetensors_torch.load_file(folder / "model.safetensors"))
    rounded = shutil.copytree(folder, tmp_path / "rounded")
    with_weights(rounded, {n: t if t.dim() == 1 else torch.from_numpy(gguf.quants.dequantize(
        gguf.quants.quantize(t.numpy(), of), of).copy()) for n, t in weights.items()})
    path = as_gguf(folder, tmp_path / "model.gguf", kind=kind)
    same(path, rounded)
    assert path.stat().st_size < 0.6 * sum(t.nbytes for t in weights.values()) + 9999


@pytest.mark.parametrize("kind, kept", [("Q4_0", True), ("Q4_1", True), ("Q8_0", False), ("F16", False)])
def test_a_gguf_files_own_4_bits_are_kept_and_exported(tmp_path, kind, kept):
    """What decodes is the file's weights, but for bf16 scales; of other files a sentence says that there are
    none."""
    folder = written(tmp_path / "hf", hidden_size=64, intermediate_size=96)
    plain = GPT.from_pretrained(str(as_gguf(folder, tmp_path / "model.gguf", kind=kind))).eval()
    about = {"model": plain.state_dict(), "model_args": plain.config.model_args()}
    checkpoint.save(about, tmp_path / "ckpt.pt")
    to = export.ExportConfig(out_dir=str(tmp_path), quantize="own", export_dir=str(tmp_path / "own"),
                             dtype="float32")
    if not kept:
        with pytest.raises(ConfigError, match="no matrix here lies on 16 levels"):
            export.main(to)
        return
    export.main(to)
    own = build_model(*checkpoint.read(tmp_path / "own")).eval()
    assert kept_levels(own) and all(kept_levels(own))
    for theirs, ours in zip(whole_parts(plain), whole_parts(own)):
        weight, stands_for = (getattr(module, name).weight for _, module, name, _ in (theirs, ours))
        assert (weight - stands_for).abs().max() <= 0.02 * weight.abs().max()
    idx = torch.arange(12)[None] % plain.config.vocab_size
    with torch.no_grad():
        off, logits = own(idx, idx)[0] - plain(idx, idx)[0], plain(idx, idx)[0]
    assert off.norm() <= 0.05 * logits.norm()
    damaged = checkpoint.read(tmp_path / "own")[0]
    name = next(key for key in damaged["model"] if key.endswith("c_fc.codes"))
    for shape in ((3, 64), (0, 64), (192, 128)):
        damaged["model"][name] = torch.zeros(shape, dtype=torch.uint8)
        with pytest.raises(ConfigError):
            build_model(damaged, tmp_path)


def cut(path, share):
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])


GGUFS = {
    "another architecture": (dict(arch="gemma"), "'gemma'"),
    "scaled rotations": (dict(keys={"rope.scaling.type": "linear"}), "rope.scaling.type"),
    "a factor of rotations": (dict(keys={"rope.scaling.factor": 8.0}), "rope.scaling.factor"),
    "a part of a head turns": (dict(keys={"rope.dimension_count": 2}), "head_dim=2"),
    "two widths": (dict(keys={"attention.key_length": 8}), "width of a head"),
    "wide heads": (dict(keys={"attention.key_length": 8}), "head_dim=8"),
    "experts": (dict(keys={"expert_count": 8}), "expert_count"),
    "one layer more": (dict(keys={"block_count": 3}), "num_hidden_layers=3"),
    "no layers": (dict(drop=("block_count",)), "num_hidden_layers"),
    "other heads": (dict(keys={"attention.head_count": 8}), "k_proj"),
    "other ids": (dict(keys={"vocab_size": 32}), "embed_tokens"),
}


@pytest.mark.parametrize("name", GGUFS)
def test_a_gguf_file_of_another_model_is_refused_in_a_sentence(plain, tmp_path, name):
    options, said = GGUFS[name]
    options = dict(keys={}) | options
    if name in ("wide heads", "other heads"):
        options["drop"] = ("rope.dimension_count",)
    refused(as_gguf(plain, tmp_path / "model.gguf", **options), "model.gguf", said)


def test_a_gguf_file_that_is_damaged_is_refused_in_a_sentence(plain, tmp_path):
    refused(tmp_path / "none.gguf", "none.gguf", "does not exist")
    for share in (0.0, 0.001, 0.1, 0.5, 0.95):
        path = as_gguf(plain, tmp_path / "model.gguf")
        cut(path, share)
        refused(path, "model.gguf")
    path.write_text("not a model")
    refused(path, "model.gguf", "damaged")


def test_a_file_that_was_cut_says_how_much_of_it_is_there(plain, tmp_path):
    whole = as_gguf(plain, tmp_path / "model.gguf").stat().st_size
    for share, said in ((0.9, f"of {whole:,} bytes"), (0.3, f"of {whole:,} bytes"), (0.005, "of at least"),
                        (0.0, "is empty")):
        path = as_gguf(plain, tmp_path / "model.gguf")
        cut(path, share)
        refused(path, "model.gguf", said, "copy it again", f"{path.stat().st_size:,} of" * (share > 0))
    path = plain / "model.safetensors"
    content, of = path.read_bytes(), f"of {path.stat().st_size:,} bytes; copy it again"
    header = 8 + int.from_bytes(content[:8], "little")
    for size in (len(content) - 1, header + 5, header):
        path.write_bytes(content[:size])
        refused(plain, str(path), f"is shorter than its header says: {size:,} {of}")
    for size in (header - 1, 8, 3, 0):
        path.write_bytes(content[:size])
        refused(plain, str(path), f"is shorter than its header says: {size:,} of ")
    for damaged in (content[:8] + b"x" * (len(content) - 8), b"not a model, but some text"):
        path.write_bytes(damaged)
        refused(plain, str(path), "cannot be read as safetensors")


def test_without_the_package_a_gguf_file_says_what_to_install(plain, tmp_path, monkeypatch):
    path = as_gguf(plain, tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    gguf_file.read.cache_clear()
    refused(path, "model.gguf", "pip install gguf")


# ------------------------------------------------------------------------------------------------------------
# their tokenizers

def vocabulary(*added):
    """Tokens of byte pairs in GPT-2's spelling, some words among them, and added tokens in front."""
    letters = sorted(bytes_of_characters(), key=bytes_of_characters().get)
    merges = ["t h", "th e", "Ġ the", "1 9", "Ġ a"]
    return [*added, *letters, *(pair.replace(" ", "") for pair in merges)], merges


def gguf_tokenizer(pre="smollm", **more):
    tokens, merges = vocabulary("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return {"ggml.model": "gpt2", "ggml.pre": pre, "ggml.tokens": tokens, "ggml.merges": merges,
            "ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3), "ggml.eos_token_id": 2} | more


def talking(tmp_path, **more):
    """A GGUF file of a model with a tokenizer -> (its path, how many ids)."""
    tokenizer = gguf_tokenizer(**more)
    ids = len(tokenizer["ggml.tokens"])
    folder = written(tmp_path / "hf", vocab_size=ids, max_position_embeddings=64, tie_word_embeddings=True)
    return as_gguf(folder, tmp_path / "model.gguf", tokenizer=tokenizer), ids


def test_a_gguf_files_tokenizer_is_the_one_of_its_own_lists(tmp_path):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    path, size = talking(tmp_path)
    own = pretrained.tokenizer_of(str(path), size)
    assert own.vocab_size == size and own.end_of_text == 2 and own.begin == []
    text = "the 1984 <|im_end|>, é\n\x00"
    plain, special = own.encode(text), own.encode(text, True)
    assert own.decode(plain) == own.decode(special) == text and special.count(2) == 1 and 2 not in plain
    digits = [own.encode(c)[0] for c in "1984"]
    assert digits == [i for i in plain if i in digits]            # smollm cuts numbers into digits: no "19"
    other = pretrained.tokenizer_of(str(talking(tmp_path, pre="llama-bpe")[0]), size)
    assert own.encode("1984") != other.encode("1984") and other.decode(other.encode(text)) == text
    begun = pretrained.tokenizer_of(str(talking(tmp_path, **{
        "ggml.add_bos_token": True, "ggml.bos_token_id": 1})[0]), size)
    assert begun.begin == [1] and tokenizers.begun(begun, "a") == [1, *begun.encode("a")]
    assert tokenizers.begun(begun, "<|im_start|>a", True) == begun.encode("<|im_start|>a", True)
    for pre, model in (("odd", "gpt2"), ("smollm", "llama")):
        with pytest.raises(ConfigError, match="init_from=FOLDER"):
            pretrained.tokenizer_of(str(talking(tmp_path, pre=pre, **{"ggml.model": model})[0]), size)


def test_a_description_of_a_tokenizer_rebuilds_it(tmp_path):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    path, size = talking(tmp_path, **{"ggml.add_bos_token": True, "ggml.bos_token_id": 1})
    own = pretrained.tokenizer_of(str(path), size)
    again = tokenizers.from_meta(json.loads(json.dumps(own.meta())))
    assert again.meta() == own.meta() and again.encode("the 19", True) == own.encode("the 19", True)
    assert (again.begin, again.end_of_text, again.vocab_size) == ([1], 2, size)
    for damage in (None, {}, {"file": 3, "begin": []}, {"file": {}, "begin": []}):
        with pytest.raises(ConfigError):
            tokenizers.from_meta({"tokenizer": "hf", "hf": damage})


def byte_fallback(folder):
    """tokenizer.json as Llama 2's: spaces are underlines, unknown letters are bytes, <s> begins a text."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)),
              "\u2581", "a", "b", "\u2581a", "ab"]
    rules = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    said = {"version": "1.0", "truncation": None, "padding": None, "pre_tokenizer": None,
            "added_tokens": [dict(id=i, content=tokens[i]) | rules for i in range(3)],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
            "post_processor": {"type": "TemplateProcessing",
                               "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                               "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                                          {"Sequence": {"id": "A", "type_id": 0}}],
                               "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True,
                      "byte_fallback": True, "vocab": {token: i for i, token in enumerate(tokens)},
                      "merges": ["\u2581 a", "a b"]}}
    (folder / "tokenizer.json").write_text(json.dumps(said))
    return len(tokens)


def test_a_tokenizer_that_falls_back_to_bytes_is_read_from_a_folder(tmp_path):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    folder = written(tmp_path / "hf", vocab_size=264)
    with_config(folder, SMALL | dict(vocab_size=264, eos_token_id=[2, 1]))
    assert byte_fallback(folder) == 264
    own = pretrained.tokenizer_of(str(folder), 264)
    assert own.begin == [1] and own.end_of_text == 2 and own.vocab_size == 264
    for text in ("ab a", "é\n", "a  b"):
        assert own.decode(own.encode(text)).removeprefix(" ") == text
    assert b"".join(map(own.token_bytes, own.encode("é"))).decode() == " é"


# ------------------------------------------------------------------------------------------------------------
# the commands

def test_a_run_goes_on_from_a_gguf_file_and_speaks_with_its_tokenizer(train, tmp_path):
    """Data with the model's tokenizer, training, a flag switched on, sampling from the file and the run."""
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    path, size = talking(tmp_path)
    text = tmp_path / "text"
    text.write_text(TEXT)
    data = tmp_path / "data"
    meta = dataset.write_text(data, text, dataset.tokenizer_place(str(path)), 0.1)
    assert meta["tokenizer"] == "hf" and meta["vocab_size"] == size and dataset.check(data, 8, size)
    shape = dict(n_layer=2, n_head=4, n_embd=16, dataset=data, dtype="float32")
    run = train(init_from=path, max_iters=2, out="on", **shape)
    args = train.checkpoint("on")["model_args"]
    assert args["n_kv_head"] == 2 and args["norm_eps"] == pytest.approx(1e-3) and args["block_size"] == 8
    assert train.checkpoint("on")["tokenizer"]["tokenizer"] == "hf" and "val loss" in run.out
    train.resume(out="on", max_iters=3, **shape)
    train(init_from=path, max_iters=1, out="window", window=4, **shape)
    assert train.checkpoint("window")["model_args"]["window"] == 4
    one_sentence(train(init_from=path, status=2, out="no", n_layer=2, n_head=4, n_embd=16), "train.py",
                 "tokenizer.json of", "'byte'", "--tokenizer=")
    for place in (dict(init_from=path), dict(out_dir=train.folder / "on")):
        said = Job("sample.py", words(num_samples=1, max_new_tokens=5, start="the", device="cpu", **place),
                   tmp_path).wait()
        assert said.status == 0 and said.out.startswith("the")


TEMPLATE = ("{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nBe "
            "kind.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + "
            "'<|im_end|>'}}")


def test_a_conversation_has_the_marks_that_the_model_has_learnt(tmp_path):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    path, size = talking(tmp_path, chat_template=TEMPLATE)
    tokenizer, asked = pretrained.tokenizer_of(str(path), size), []

    def stream(prompt):
        asked.append(tokenizer.decode(prompt[0].tolist()))
        yield from ([*tokenizer.encode("a b"), 2] if len(asked) == 1 else
                    tokenizer.encode("c<|im_end|>d", True))

    cfg = sample.SampleConfig(init_from=str(path), chat=True)
    frame, start = sample.framed(cfg, sample.prompt_of(cfg.start))
    assert start == "Be kind."
    chat = Chat(stream, tokenizer, "cpu", 1, start, frame=frame)
    assert ["".join(chat.answer(line)) for line in ("Hi", "And?")] == ["a b", "c"]
    system = "<|im_start|>system\nBe kind.<|im_end|>\n"
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert asked[0] == system + turn.format("Hi")
    assert asked[1] == asked[0] + "a b<|im_end|>\n" + turn.format("And?")
    assert chat.text == asked[1] + "c<|im_end|>\n"
    chat.reset()
    assert chat.text == system
    for keys, expected in ((dict(start="Rhyme."), (frame, "Rhyme.")), (dict(template="none"), (None, "\n")),
                           (dict(stop="x"), (None, "\n")), (dict(special=False), (None, "\n"))):
        cfg = sample.SampleConfig(init_from=str(path), chat=True, **keys)
        assert sample.framed(cfg, cfg.start) == expected
    for keys, words_ in ((dict(template="odd"), "template='odd'"),
                         (dict(template="chatml", chat=False), "--chat"),
                         (dict(template="chatml", stop="x"), "--template=none")):
        with pytest.raises(ConfigError, match=words_):
            sample.SampleConfig(**dict(chat=True) | keys)


def test_a_run_that_went_on_is_exported_with_its_tokenizer(train, tmp_path):
    """Both sample.py and transformers read what they need there."""
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    path, size = talking(tmp_path, **{"ggml.add_bos_token": True, "ggml.bos_token_id": 1})
    (tmp_path / "text").write_text(TEXT)
    dataset.write_text(tmp_path / "data", tmp_path / "text", dataset.tokenizer_place(str(path)), 0.1)
    train(init_from=path, max_iters=1, n_layer=2, n_head=4, n_embd=16, dataset=tmp_path / "data")
    export.main(export.ExportConfig(out_dir=str(tmp_path / "out"), to="hf", dtype="float32"))
    folder, own = tmp_path / "out-hf", pretrained.tokenizer_of(str(path), size)
    model, tokenizer = sample.load(str(folder), "")
    assert model.config.n_kv_head == 2 and tokenizer.begin == [1]
    text = "the <|im_end|> 1984"
    assert tokenizer.encode(text, True) == own.encode(text, True) == pretrained.tokenizer_of(
        str(folder), size).encode(text, True)


REAL = os.environ.get("NANOCORTEX_GGUF", "")


@pytest.mark.slow
@pytest.mark.skipif(not Path(REAL).is_file(), reason="NANOCORTEX_GGUF names no GGUF file of a real model")
def test_a_real_model_goes_on_as_llama_cpp_does(tmp_path):
    """The greedy continuation of the same weights in fp32 is llama.cpp's; of the file itself, whose products
    round their inputs there, nearly all of the chosen tokens are."""
    gguf, llama_cpp = map(pytest.importorskip, ("gguf", "llama_cpp"))
    reader, path = gguf.GGUFReader(REAL), tmp_path / "fp32.gguf"
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], of)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    model = GPT.from_pretrained(REAL).eval()
    tokenizer = pretrained.tokenizer_of(REAL, model.config.vocab_size)
    text = "Once upon a time, in 1984, there were 3 mice"
    ids = tokenizers.begun(tokenizer, text)
    ours = model.generate(torch.tensor([ids]), 100, temperature=0)[0]
    for place, share in ((path, 1.0), (REAL, 0.95)):
        peer = llama_cpp.Llama(str(place), n_ctx=256, verbose=False, logits_all=True)
        assert peer.tokenize(text.encode(), add_bos=True, special=True) == ids
        peer.eval(ours[:-1].tolist())
        best = torch.from_numpy(peer.scores[:len(ours) - 1].copy()).argmax(-1)
        assert (best == ours[1:])[len(ids) - 1:].float().mean() >= share
        peer.close()


def test_a_gguf_file_of_the_other_byte_order_is_refused_in_one_sentence(tmp_path):
    """The package reads its keys, and dequantises its numbers without turning them."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="of the other byte order"):
        gguf_file.config_of(path)
