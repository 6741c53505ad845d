"""Hugging Face folders: the model that transformers reads there, or one sentence; never another one."""
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from arms import build, tokens
from conftest import Job, one_sentence, words

import sample
from configurator import ConfigError
from data.tokenizer import ByteTokenizer, CharTokenizer, GPT2Tokenizer, TrainedTokenizer
from decode import sampling
from model import GPT, build_model
from training import checkpoint, export, pretrained
from viz.chat import Chat

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
SMALL = dict(vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
BPE = Path(os.environ.get("NANOCORTEX_GPT2_BPE") or SHARED / "gpt2_bpe")


def made(folder, kind="GPT2LMHeadModel", save=None, **fields):
    """A folder that transformers writes: a tiny random GPT-2 with those fields -> the folder."""
    torch.manual_seed(1)
    peer = getattr(transformers, kind)(transformers.GPT2Config(**SMALL | fields))
    with torch.no_grad():
        for p in peer.parameters():
            p.normal_(std=0.3)
    peer.save_pretrained(folder, **save or {})
    return folder


def logits_of(folder, idx):
    """What transformers computes there."""
    peer = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32,
                                                        attn_implementation="eager").eval()
    with torch.no_grad():
        return peer(idx).logits


def same_as_transformers(place, folder=None):
    idx = tokens(3, 12)
    ours, theirs = GPT.from_pretrained(str(place)).eval()(idx, idx)[0], logits_of(folder or place, idx)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def refused(place, *parts):
    with pytest.raises(ConfigError) as error:
        GPT.from_pretrained(str(place))
    sentence = str(error.value)
    assert "\n" not in sentence and len(sentence) < 600
    for part in parts:
        assert part in sentence, f"{part!r} is missing in: {sentence}"


def with_fields(folder, drop=(), **fields):
    """Fields of config.json changed where it lies."""
    path = folder / "config.json"
    said = {**json.loads(path.read_text(encoding="utf-8")), **fields}
    path.write_text(json.dumps({key: value for key, value in said.items() if key not in drop}))
    return folder


def weights_of(folder):
    return safetensors_torch.load_file(folder / "model.safetensors")


def with_weights(folder, weights):
    safetensors_torch.save_file({name: t.contiguous() for name, t in weights.items()},
                                folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return made(tmp_path_factory.mktemp("hf") / "plain")


@pytest.fixture
def plain(kept, tmp_path):
    """A copy of a plain folder, to be changed."""
    return shutil.copytree(kept, tmp_path / "plain")


# ------------------------------------------------------------------------------------------------------------
# the model

MODELS = {
    "as GPT-2": {}, "exact gelu": dict(activation_function="gelu"),
    "another tanh": dict(activation_function="gelu_pytorch_tanh"),
    "a fast tanh": dict(activation_function="gelu_fast"),
    "narrow MLP": dict(n_inner=24), "wide MLP": dict(n_inner=80), "one head": dict(n_head=1),
    "many heads": dict(n_head=8), "three layers": dict(n_layer=3), "long": dict(n_positions=40),
    "untied": dict(tie_word_embeddings=False), "unscaled": dict(scale_attn_weights=False),
    "scaled by layer": dict(scale_attn_by_inverse_layer_idx=True),
    "scaled by layer alone": dict(scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False, n_layer=3),
    "upcast": dict(reorder_and_upcast_attn=True),
    "all at once": dict(n_inner=24, tie_word_embeddings=False, scale_attn_weights=False,
                        activation_function="gelu", reorder_and_upcast_attn=True),
    "no dropout": dict(resid_pdrop=0.0, embd_pdrop=0, attn_pdrop=0.0),
    "other ids": dict(bos_token_id=3, eos_token_id=4, pad_token_id=5),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_hugging_face_model_is_computed_as_it_was_made(tmp_path, name, case):
    same_as_transformers(made(tmp_path / "hf", **MODELS[name]))
    case()


def test_a_hugging_face_folder_is_read_in_any_of_its_layouts(tmp_path, case):
    sharded = made(tmp_path / "sharded", save=dict(max_shard_size="8KB"), tie_word_embeddings=False)
    assert not (sharded / "model.safetensors").exists()
    headless = made(tmp_path / "headless", "GPT2Model")
    assert "wte.weight" in weights_of(headless)
    pickled = made(tmp_path / "pickled")
    torch.save(weights_of(pickled), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    shards = made(tmp_path / "shards")
    every = weights_of(shards)
    names = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(every)}
    for file in set(names.values()):
        torch.save({name: every[name] for name in every if names[name] == file}, shards / file)
    (shards / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names, "metadata": {}}))
    (shards / "model.safetensors").unlink()
    half = made(tmp_path / "half")
    with_weights(half, {name: t.bfloat16() for name, t in weights_of(half).items()})
    masks = made(tmp_path / "masks")
    with_weights(masks, weights_of(masks) | {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.bool).tril(),
        "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)})
    head = made(tmp_path / "head")
    weights = weights_of(head)
    with_weights(head, weights | {"lm_head.weight": weights["transformer.wte.weight"].clone()})
    for folder in (sharded, headless, pickled, shards, half, masks, head):
        same_as_transformers(folder)
        case()


def test_a_path_means_that_file(plain, case):
    other = {name: t + 0.1 * torch.randn(t.shape) for name, t in weights_of(plain).items()}
    apart = shutil.copytree(plain, plain.parent / "apart")
    with_weights(apart, other)
    shutil.copy(apart / "model.safetensors", plain / "other.safetensors")
    same_as_transformers(plain / "other.safetensors", apart)
    torch.save(other, plain / "other.bin")
    same_as_transformers(plain / "other.bin", apart)
    same_as_transformers(plain / "model.safetensors", plain)
    case(), case(), case()


def test_a_safetensors_path_of_ours_means_that_file(tmp_path):
    for number, std in enumerate((0.1, 0.3)):
        (tmp_path / str(number)).mkdir()
        model = build({}, std=std)
        checkpoint.save({"model": model.state_dict(), "model_args": model.config.model_args()},
                        tmp_path / str(number) / "ckpt.pt")
        export.main(export.ExportConfig(out_dir=str(tmp_path / str(number)), to="safetensors",
                                        dtype="float32"))
    folder = tmp_path / "0-safetensors"
    shutil.copy(tmp_path / "1-safetensors" / "model.safetensors", folder / "second.safetensors")
    loaded, path = checkpoint.read(folder / "second.safetensors")
    assert path == folder / "second.safetensors"
    assert torch.equal(loaded["model"]["lm_head.weight"], model.state_dict()["lm_head.weight"])
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json"):
        checkpoint.read(folder / "second.safetensors")


# ------------------------------------------------------------------------------------------------------------
# config.json

# fields with other values over the same weights: None is equal to transformers, else words of the refusal
FIELDS = [
    (dict(activation_function="relu"), "'relu'"), (dict(activation_function="silu"), "'silu'"),
    (dict(activation_function=None), "activation_function"), (dict(activation_function=["gelu"]), "gelu"),
    (dict(activation_function="gelu_10"), "gelu_10"), (dict(activation_function="gelu"), None),
    (dict(activation_function="gelu_python"), None),
    (dict(layer_norm_epsilon=1e-3), None), (dict(layer_norm_epsilon=0.0), "layer_norm_epsilon"),
    (dict(layer_norm_epsilon=float("nan")), "epsilon"),
    (dict(layer_norm_epsilon="1e-5"), "layer_norm_epsilon"),
    (dict(add_cross_attention=True), "add_cross_attention"), (dict(add_cross_attention=1), "cross"),
    (dict(scale_attn_weights=False), None), (dict(scale_attn_weights="no"), "scale_attn_weights"),
    (dict(scale_attn_by_inverse_layer_idx=True), None),
    (dict(scale_attn_by_inverse_layer_idx=None), "scale_attn_by_inverse_layer_idx"),
    (dict(reorder_and_upcast_attn=True), None), (dict(reorder_and_upcast_attn=2), "reorder_and_upcast_attn"),
    (dict(tie_word_embeddings=False), "lm_head.weight"), (dict(tie_word_embeddings="False"), "tie_word"),
    (dict(n_inner=64), None), (dict(n_inner=63), "c_fc"), (dict(n_inner=0), "n_inner"),
    (dict(n_inner="64"), "n_inner"), (dict(n_inner=10**12), "c_fc"),
    (dict(n_layer=1), "n_layer"), (dict(n_layer=3), "n_layer"), (dict(n_layer=10**9), "n_layer"),
    (dict(n_layer=2.0), "n_layer"), (dict(n_layer=True), "n_layer"), (dict(n_layer=None), "n_layer"),
    (dict(n_head=4), None), (dict(n_head=3), "n_head"), (dict(n_head=0), "n_head"),
    (dict(n_head="2"), "n_head"), (dict(n_head=-2), "n_head"),
    (dict(n_embd=32), "wte"), (dict(n_embd=10**12), "wte"), (dict(n_embd=[16]), "n_embd"),
    (dict(vocab_size=30), "wte"), (dict(vocab_size=32), "wte"), (dict(vocab_size={}), "vocab_size"),
    (dict(n_positions=17), "wpe"), (dict(n_positions=15), "wpe"), (dict(n_positions=-1), "n_positions"),
    (dict(n_ctx=16), None), (dict(n_ctx=8), "n_ctx"),
    (dict(hidden_size=16), None), (dict(hidden_size=32), "hidden_size"),
    (dict(num_attention_heads=4), "num_attention_heads"), (dict(num_hidden_layers=2), None),
    (dict(max_position_embeddings=32), "max_position_embeddings"),
    (dict(architectures=["GPT2Model"]), None), (dict(architectures=None), None),
    (dict(architectures=["GPT2ForSequenceClassification"]), "GPT2ForSequenceClassification"),
    (dict(architectures="GPT2LMHeadModel"), "architectures"),
    (dict(resid_pdrop=0.5, embd_pdrop=0.3, attn_pdrop=0.2), None), (dict(initializer_range=1.0), None),
    (dict(summary_type="mean", summary_use_proj=False, summary_first_dropout=0.5), None),
    (dict(use_cache=False, transformers_version="9.9.9", bos_token_id=7, eos_token_id=[3]), None),
    (dict(task_specific_params={"text-generation": {"do_sample": True}}, id2label={"0": "a"}), None),
    (dict(rope_theta=1e4), "rope_theta"), (dict(quantization_config={"bits": 4}), "quantization_config"),
    (dict(auto_map={"AutoModel": "mine.Mine"}), "auto_map"), (dict(is_encoder_decoder=True), "encoder"),
    (dict(pruned_heads={"0": [1]}), "pruned_heads"), (dict(pruned_heads={}), None),
    (dict(model_type="gpt_neo"), "gpt_neo"), (dict(model_type=None), "None"),
    (dict(model_type=["gpt2"]), "gpt2"),
]


@pytest.mark.parametrize("fields, words_", FIELDS, ids=[json.dumps(fields)[1:60] for fields, _ in FIELDS])
def test_every_field_of_a_hugging_face_config_(plain, fields, words_, case):
    with_fields(plain, **fields)
    if words_ is None:
        same_as_transformers(plain)
    else:
        refused(plain, "config.json" if "model_type" not in fields else str(plain), words_)
    case()


def test_fields_that_a_hugging_face_config_leaves_out_are_those_of_transformers(tmp_path, case):
    folder = with_fields(made(tmp_path / "hf"), drop=("activation_function", "layer_norm_epsilon", "n_inner",
                                                      "tie_word_embeddings", "scale_attn_weights"))
    same_as_transformers(folder)
    renamed = with_fields(folder, drop=("n_embd", "n_layer", "n_head", "n_positions"), hidden_size=16,
                          num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16)
    same_as_transformers(renamed)
    refused(with_fields(folder, drop=("num_hidden_layers",)), "n_layer", "12")
    case(), case(), case()


# ------------------------------------------------------------------------------------------------------------
# files and keys

def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])


FILES = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "cut config": (lambda f: cut(f / "config.json"), "config.json"),
    "empty config": (lambda f: (f / "config.json").write_text(""), "config.json"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "config is deep": (lambda f: (f / "config.json").write_text("[" * 99999), "config.json"),
    "config is not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "renamed weights": (lambda f: (f / "model.safetensors").rename(f / "g.safetensors"), "model.safetensors"),
    "cut weights": (lambda f: cut(f / "model.safetensors"), "model.safetensors"),
    "cut header": (lambda f: cut(f / "model.safetensors", 0.01), "model.safetensors"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "a pointer": (lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec"),
                  "model.safetensors"),
    "a run beside": (lambda f: (f / "ckpt.pt").write_bytes(b""), "ckpt.pt"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hugging_face_folder_with_damaged_files_(plain, name, case):
    damage, words_ = FILES[name]
    damage(plain)
    refused(plain, str(plain), words_)
    case()


def test_a_hugging_face_index_that_lies_(tmp_path, case):
    good = made(tmp_path / "good", save=dict(max_shard_size="8KB"))
    index = json.loads((good / "model.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"]))

    def lies(**names):
        folder = shutil.copytree(good, tmp_path / f"lies{len(list(tmp_path.iterdir()))}")
        said = {name: file for name, file in (index["weight_map"] | names).items() if file}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": said, "metadata": {}}))
        return folder

    same_as_transformers(lies())
    refused(lies(**{first: "elsewhere.safetensors"}), "elsewhere.safetensors")
    refused(lies(**{first: "../good/" + index["weight_map"][first]}), "index.json", "../good")
    refused(lies(**{first: None}), "index.json", first)
    refused(lies(more=index["weight_map"][first]), "index.json", "more")
    refused(lies(**{first: 3}), "index.json")
    missing = lies()
    (missing / index["weight_map"][first]).unlink()
    refused(missing, index["weight_map"][first])
    short = lies()
    cut(short / index["weight_map"][first])
    refused(short, index["weight_map"][first])
    empty = lies()
    (empty / "model.safetensors.index.json").write_text('{"weight_map": []}')
    refused(empty, "index.json")
    [case() for _ in range(8)]


KEYS = {
    "a missing key": (lambda w: w.pop("transformer.h.1.mlp.c_fc.bias"), "transformer.h.1.mlp.c_fc.bias"),
    "no position table": (lambda w: w.pop("transformer.wpe.weight"), "transformer.wpe.weight"),
    "no embedding": (lambda w: w.pop("transformer.wte.weight"), "transformer.wte.weight"),
    "no last norm": (lambda w: w.pop("transformer.ln_f.weight"), "transformer.ln_f.weight"),
    "a head and no embedding": (lambda w: w.update({"lm_head.weight": w.pop("transformer.wte.weight")[:9]}),
                                "wte"),
    "one key more": (lambda w: w.update(score=torch.ones(2, 16)), "score"),
    "a cross attention": (lambda w: w.update({"transformer.h.0.crossattention.c_attn.weight": torch.ones(2)}),
                          "crossattention"),
    "another head": (lambda w: w.update({"lm_head.weight": torch.randn(31, 16)}), "tie_word_embeddings"),
    "a transposed matrix": (lambda w: w.update({"transformer.h.0.mlp.c_fc.weight": torch.randn(64, 16)}),
                            "transformer.h.0.mlp.c_fc.weight"),
    "integers": (lambda w: w.update({"transformer.ln_f.weight": torch.ones(16, dtype=torch.int8)}), "int8"),
    "both names": (lambda w: w.update({"wte.weight": torch.randn(31, 16)}), "transformer.wte.weight"),
    "other names": (lambda w: [w.update({"gpt" + name: w.pop(name)}) for name in list(w)], "gpttransformer"),
    "no keys": (lambda w: [w.pop(name) for name in list(w)[1:]], "config.json"),
}


@pytest.mark.parametrize("name", KEYS)
def test_hugging_face_weights_with_other_keys_(plain, name, case):
    weights = weights_of(plain)
    KEYS[name][0](weights)
    refused(with_weights(plain, weights), str(plain), KEYS[name][1])
    case()


def test_a_pickle_of_hugging_face_runs_no_code(plain, case):
    class Payload:
        def __reduce__(self):
            return (open, (str(plain / "ran"), "w"))
    (plain / "model.safetensors").unlink()
    for bad in ({"transformer.wte.weight": Payload()}, [torch.ones(2)], {"transformer.wte.weight": 3},
                {"model": {"wte.weight": torch.ones(2)}}):
        torch.save(bad, plain / "pytorch_model.bin")
        refused(plain, "pytorch_model.bin")
        case()
    assert not (plain / "ran").exists()
    torch.save(weights_of(made(plain.parent / "more")), plain / "pytorch_model.bin")
    cut(plain / "pytorch_model.bin")
    refused(plain, "pytorch_model.bin")
    case()


PREFIXES = ["_orig_mod.", "module.", "_fsdp_wrapped_module.", "module._orig_mod.", "_orig_mod.module.",
            "_fsdp_wrapped_module._orig_mod.module.", "module.module.", "module._fsdp_wrapped_module."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrapped_models_are_stripped(tmp_path, plain, prefix, case):
    """Of Hugging Face's weights and of nanoGPT's checkpoints, compiled, in DDP and in FSDP, in any order."""
    before = plain.parent / "before"
    shutil.copytree(plain, before)
    with_weights(plain, {prefix + name: t for name, t in weights_of(plain).items()})
    same_as_transformers(plain, before)
    model, args = build({}, std=0.2), dict(n_layer=2, n_head=2, n_embd=16, block_size=16, bias=True,
                                           vocab_size=31, dropout=0.0)
    inside = {prefix + name.replace("h.1.", "h.1._fsdp_wrapped_module."): t
              for name, t in model.state_dict().items()}
    torch.save({"model": inside, "model_args": args}, tmp_path / "ckpt.pt")
    again = build_model(*checkpoint.read(tmp_path / "ckpt.pt")).eval()
    assert torch.equal(again(tokens(2, 9))[0], model(tokens(2, 9))[0])
    case(), case()


def test_two_prefixes_of_one_name_are_refused(tmp_path, plain, case):
    weights = weights_of(plain)
    twice = weights | {"module." + name: t + 1 for name, t in weights.items()}
    refused(with_weights(plain, twice), "twice")
    model = build({}, std=0.2)
    state = model.state_dict() | {"_orig_mod." + name: t + 1 for name, t in model.state_dict().items()}
    torch.save({"model": state, "model_args": model.config.model_args()}, tmp_path / "ckpt.pt")
    with pytest.raises(ConfigError, match="twice"):
        checkpoint.read(tmp_path / "ckpt.pt")
    case(), case()


def test_an_adapter_may_be_called_module():
    model = build(dict(adapters="module,one", adapter_width=4))
    assert pretrained.plain_names(model.state_dict(), "here").keys() == model.state_dict().keys()


def test_a_checkpoint_of_a_tied_model_with_another_head_is_refused(tmp_path):
    model = build({}, std=0.2)
    state = model.state_dict() | {"lm_head.weight": torch.randn(31, 16)}
    torch.save({"model": state, "model_args": model.config.model_args()}, tmp_path / "ckpt.pt")
    with pytest.raises(ConfigError, match="tie_weights"):
        build_model(*checkpoint.read(tmp_path / "ckpt.pt"))


@pytest.mark.parametrize("arm", [dict(mlp_topk=0.25), dict(experts=4, experts_active=2),
                                 dict(columns=8, columns_active=2), dict(weights="2:4"), {}])
def test_the_tanh_gelu_decodes_as_it_computes(arm):
    model, idx = build(arm | dict(act="gelu_tanh"), std=0.2), tokens(1, 9)
    told = model.generate(idx[:, :4], 5, temperature=0)
    full = idx[:, :4]
    for _ in range(5):
        full = torch.cat((full, model(full)[0][:, -1:].argmax(-1)), dim=1)
    assert torch.equal(told, full)


def test_a_tanh_gelu_model_is_exported_and_read_again(tmp_path):
    folder = run_of(tmp_path, ByteTokenizer().meta(), act="gelu_tanh", tie_weights=False, mlp_units=40)
    same_as_transformers(folder)
    assert json.loads((folder / "config.json").read_text())["activation_function"] == "gelu_new"


# ------------------------------------------------------------------------------------------------------------
# the vocabulary

TEXT = "The quick brown fox\n jumps over 12 lazy dogs' <|endoftext|> 한국 déjà"


def run_of(tmp_path, tokenizer, **changes):
    """A run with that description of a tokenizer, exported as a user does -> the folder."""
    model = build({}, std=0.2, vocab_size=600, **changes)
    about = {"tokenizer": tokenizer} if tokenizer else {}
    checkpoint.save({"model": model.state_dict(), "model_args": model.config.model_args(), **about,
                     "config": {"dataset": "some"}}, tmp_path / "ckpt.pt")
    export.main(export.ExportConfig(out_dir=str(tmp_path), to="hf", dtype="float32",
                                    export_dir=str(tmp_path / "hf")))
    return tmp_path / "hf"


def sampled(folder, tmp_path, *argv, **keys):
    keys = dict(num_samples=1, max_new_tokens=8, device="cpu", top_k=0, dtype="float32", start="ab") | keys
    return Job("sample.py", [*words(init_from=folder, **keys), *argv], tmp_path).wait()


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_an_exported_model_samples_with_its_own_tokenizer(tmp_path, kind, case):
    made_of = {"byte": ByteTokenizer(), "char": CharTokenizer(list("abcdefgh한\n")),
               "bpe": TrainedTokenizer({"tokens": [chr(i) for i in range(256)] + ["ab", "<|endoftext|>"],
                                        "specials": {"<|endoftext|>": 257}})}[kind]
    folder = run_of(tmp_path, made_of.meta())
    there = [sampled(folder, tmp_path), sampled(tmp_path / "ckpt.pt", tmp_path),
             sampled("resume", tmp_path, out_dir=folder)]
    assert [job.status for job in there] == [0, 0, 0], there[0].err
    assert there[0].out == there[1].out == there[2].out and len(there[0].out) > 4
    assert "note:" not in there[0].err
    again = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    again.save_pretrained(tmp_path / "again")            # transformers keeps what it does not know
    assert sampled(tmp_path / "again", tmp_path).out == there[0].out
    case(), case()


def test_an_export_without_a_tokenizer_says_what_to_type(tmp_path, case):
    folder = run_of(tmp_path, ByteTokenizer().meta())
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in said.items() if k != "nanocortex"}))
    one_sentence(sampled(folder, tmp_path), "sample.py", "no tokenizer", "--tokenizer=")
    data = tmp_path / "data"
    data.mkdir()
    (data / "meta.json").write_text('{"tokenizer": "byte", "vocab_size": 256}')
    assert sampled(folder, tmp_path, tokenizer=data).status == 0
    for bad in (3, {"tokenizer": "byte"}, {"tokenizer": {"tokenizer": "bite"}}):
        (folder / "config.json").write_text(json.dumps(said | {"nanocortex": bad}))
        one_sentence(sampled(folder, tmp_path), "sample.py")
        case()
    large = {"tokenizer": {"tokenizer": "char", "chars": [chr(1000 + i) for i in range(700)]}}
    (folder / "config.json").write_text(json.dumps(said | {"nanocortex": large}))
    one_sentence(sampled(folder, tmp_path), "sample.py", "700 ids")
    case(), case()


def theirs(folder, texts, size=300, legacy=False, **more):
    """A vocabulary that the tokenizers package learns and transformers writes into a folder."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    learned = tokenizers.ByteLevelBPETokenizer(**more)
    learned.train_from_iterator(texts, vocab_size=size, special_tokens=["<pad>", "<|endoftext|>"],
                                show_progress=False)
    if legacy:
        learned.save_model(str(folder))
        (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 0}))
    else:
        transformers.PreTrainedTokenizerFast(tokenizer_object=learned).save_pretrained(folder)
    return learned


@pytest.mark.parametrize("legacy", [False, True])
def test_the_vocabulary_is_that_of_the_folders_own_files(tmp_path, plain, no_network, legacy, case):
    plain = made(tmp_path / "own", vocab_size=300)
    learned = theirs(plain, [TEXT * 3, "quick lazy dogs jump " * 9], legacy=legacy)
    model, own = sample.load(str(plain), "out")
    text = TEXT.replace("<|endoftext|>", "and")
    assert own.encode(text) == learned.encode(text).ids and own.decode(own.encode(text)) == text
    assert own.decode(own.encode(TEXT)) == TEXT and len(own.encode("<|endoftext|>")) > 1
    assert own.encode("<|endoftext|>", allow_special=True) == [1] and own.vocab_size <= 300
    assert b"".join(map(own.token_bytes, own.encode(text))).decode() == text
    assert own.encode(text) == transformers.AutoTokenizer.from_pretrained(plain)(text).input_ids
    case(), case()


def cut_tokenizer(folder):
    cut(folder / "tokenizer.json")


@pytest.mark.parametrize("name, content, words_", [
    ("tokenizer.json", "{", "tokenizer.json"), ("tokenizer.json", "[]", "tokenizer.json"),
    ("tokenizer.json", '{"model": {}}', "tokenizer.json"),
    ("tokenizer.json", '{"model": 3}', "tokenizer.json"),
    ("tokenizer.json", '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}', "ByteLevel"),
    ("vocab.json", "{}", "merges.txt"), ("merges.txt", "a b", "vocab.json")])
def test_a_damaged_vocabulary_of_a_folder_is_one_sentence(tmp_path, plain, name, content, words_, case):
    (plain / name).write_text(content)
    with pytest.raises(ConfigError, match=words_) as error:
        sample.load(str(plain), "out")
    assert "\n" not in str(error.value)
    case()


def test_files_of_two_vocabularies_are_refused(tmp_path, case):
    folder = made(tmp_path / "two", vocab_size=300)
    theirs(folder, [TEXT], size=280, legacy=True)
    merges = (folder / "merges.txt").read_text(encoding="utf-8")
    theirs(folder, ["another text " * 9], size=290)
    with pytest.raises(ConfigError, match=r"vocab\.json"):
        sample.load(str(folder), "out")
    (folder / "tokenizer.json").unlink()
    (folder / "merges.txt").write_text(merges + "qq zz\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"merges\.txt"):
        sample.load(str(folder), "out")
    case(), case()


@pytest.fixture
def bpe():
    if not BPE.is_dir():
        pytest.skip(f"GPT-2's vocabulary is not in {BPE}")
    return BPE


def test_gpt2s_vocabulary_is_recognised_in_every_form(tmp_path, bpe, no_network, monkeypatch, case):
    monkeypatch.setenv("NANOCORTEX_GPT2_BPE", str(tmp_path / "none"))
    folder = made(tmp_path / "gpt2", n_layer=1, n_embd=4, vocab_size=50257)
    shutil.copy(bpe / "encoder.json", folder / "vocab.json")
    shutil.copy(bpe / "vocab.bpe", folder / "merges.txt")
    one = sample.load(str(folder), "out")[1]
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    other = sample.load(str(folder), "out")[1]
    for found in (one, other):
        assert isinstance(found, GPT2Tokenizer) and found.encode("Hello world") == [15496, 995]
        assert found.decode(found.encode(TEXT)) == TEXT and found.end_of_text == 50256
        case()
    assert pretrained.description_of(str(folder), 50257) == {"tokenizer": "gpt2"}


def test_training_on_with_another_vocabulary_names_both(train, tmp_path, case):
    """50257 ids alone do not make a vocabulary GPT-2's; what an export carries is compared too."""
    folder = made(tmp_path / "spanish", n_layer=1, n_embd=4, vocab_size=50257)
    theirs(folder, [TEXT])
    shape = dict(n_layer=1, n_head=2, n_embd=4)
    one_sentence(train(init_from=folder, status=2, **shape), "train.py", "tokenizer.json", "'byte'")
    chars = tmp_path / "chars"
    chars.mkdir()
    folder = run_of(chars, CharTokenizer(list("abc")).meta())
    one_sentence(train(init_from=folder, status=2, n_layer=2, n_embd=16), "train.py", "'char'", "'byte'")
    own = tmp_path / "bytes"
    own.mkdir()
    folder = run_of(own, ByteTokenizer().meta(), act="gelu_tanh", tie_weights=False)
    train(init_from=folder, n_layer=2, n_embd=16, max_iters=1, out="more")
    args = train.checkpoint("more")["model_args"]
    assert args["act"] == "gelu_tanh" and args["tie_weights"] is False and args["vocab_size"] == 600
    train.resume(out="more", max_iters=2)
    case(), case(), case()


def test_a_name_that_would_download_says_what_to_do_without_a_network(tmp_path, case):
    offline = dict(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    result = Job("sample.py", words(init_from="gpt2", device="cpu"), tmp_path, env=offline).wait()
    one_sentence(result, "sample.py", "'gpt2' could not be downloaded", "config.json")
    case()


def test_a_run_reads_no_hugging_face_folder_as_its_own(tmp_path, plain):
    with pytest.raises(ConfigError, match="Hugging Face"):
        checkpoint.read(plain)


def test_gpt2_by_name_is_nanogpts_and_says_so(monkeypatch, capsys, case):
    """nanoGPT computes OpenAI's weights with the exact GELU; read from a folder they have the tanh form."""
    monkeypatch.setitem(pretrained.GPT2_SIZES, "gpt2", dict(n_layer=1, n_head=2, n_embd=4))
    peer = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=2, n_embd=4))
    monkeypatch.setattr(transformers.GPT2LMHeadModel, "from_pretrained", lambda name: peer)
    monkeypatch.chdir("/")
    model = GPT.from_pretrained("gpt2", dict(dropout=0.1))
    assert (model.config.act, model.config.dropout, model.config.block_size) == ("gelu", 0.1, 1024)
    told = capsys.readouterr().err
    assert told.startswith("note: gpt2 is computed with the exact GELU") and told.count("note:") == 1
    peer.config.activation_function = "gelu"
    peer.transformer.h[0].mlp.act = torch.nn.GELU()
    idx = tokens(2, 9)
    torch.testing.assert_close(model.eval()(idx, idx)[0], peer.eval()(idx).logits, atol=1e-5, rtol=1e-5)
    case()


@pytest.mark.parametrize("field, value", [("bias", "no"), ("n_head", True), ("n_layer", 2.0),
                                          ("dropout", None), ("tie_weights", 0), ("act", ["gelu"]),
                                          ("vocab_size", "31")])
def test_model_args_of_another_type_are_one_sentence(tmp_path, field, value):
    model = build({}, std=0.2)
    torch.save({"model": model.state_dict(), "model_args": model.config.model_args() | {field: value}},
               tmp_path / "ckpt.pt")
    with pytest.raises(ConfigError, match=rf"do not fit.*{field}="):
        build_model(*checkpoint.read(tmp_path / "ckpt.pt"))


def test_a_head_of_another_dtype_than_the_embedding_is_compared_by_value(plain):
    weights = weights_of(plain)
    wte = weights["transformer.wte.weight"].bfloat16()
    with_weights(plain, weights | {"transformer.wte.weight": wte, "lm_head.weight": wte.double()})
    same_as_transformers(plain)
    with_weights(plain, weights | {"transformer.wte.weight": wte, "lm_head.weight": wte[:-1].clone()})
    refused(plain, "tie_word_embeddings")


def test_a_folders_own_vocabulary_talks(tmp_path, case):
    folder = made(tmp_path / "own", vocab_size=300, eos_token_id=1)
    theirs(folder, [TEXT * 3])
    model, own = sample.load(str(folder), "out")
    talk = Chat(lambda prompt: (token[0] for token in sampling.stream(model, prompt, 4, sampling.Sampler(0))),
                own, "cpu", 1)
    assert own.end_of_text == talk.end == 1 and "".join(talk.answer("fox")) == talk.text[4:]
    traced = sampled(folder, tmp_path, trace="trace.html")
    assert traced.status == 0 and (tmp_path / "trace.html").is_file(), traced.err
    again = sampled(folder / "model.safetensors", tmp_path)
    assert again.out == sampled(folder, tmp_path).out and again.status == 0
    case(), case(), case()
