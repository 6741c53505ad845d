"""Llama's family: the model that its folder or its GGUF file holds, or one sentence; and back."""
import json
import math
import shutil

import pytest
import torch
from arms import tokens
from torch.nn import functional as F

from configurator import ConfigError
from model import GPT, GPTConfig
from training import checkpoint, export, llama, pretrained

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


def equation(folder, idx):
    """Llama's logits, written down here once more from their papers (2302.13971, 2305.13245, 2104.09864):
    queries and keys turn as complex numbers, each key is copied for the queries that share it."""
    said = json.loads((folder / "config.json").read_text())
    w = safetensors_torch.load_file(folder / "model.safetensors")
    heads, D = said["num_attention_heads"], said["hidden_size"] // said["num_attention_heads"]
    turn = torch.outer(torch.arange(idx.size(1)), said["rope_theta"] ** (-torch.arange(0, D, 2) / D))
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
    (dict(rope_scaling=dict(type="linear", factor=2.0)), "rope_scaling"),
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

@pytest.mark.parametrize("name", ["grouped", "tied", "biases", "a key each", "another base", "qwen2"])
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
    for flags, words in ((dict(mlp_topk=0.5), "mlp_topk"), (dict(window=4), "window"),
                         (dict(qk_norm=True), "qk_norm")):
        model = GPT(GPTConfig(block_size=16, vocab_size=31, n_layer=1, n_head=2, n_embd=16, norm="rmsnorm",
                              pos="rope", act="swiglu", **flags))
        with pytest.raises(ConfigError, match=f"{words}=.*Llama.*to=safetensors"):
            pretrained.to_hf(model)
