"""Models in Hugging Face's layout, config.json beside model.safetensors: OpenAI's GPT-2 weights, read from a
folder or downloaded; ours, written and read; and what a pretrained model needs for a vocabulary that has
grown."""
import dataclasses
import json
import os
from pathlib import Path

import torch

import tokenizer as tokenizers
from configurator import ConfigError, require

GPT2_SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}

def read(name):
    """A local Hugging Face GPT-2 folder or one of GPT2_SIZES -> (GPTConfig arguments, our state dict)."""
    args, weights = read_folder(Path(name)) if os.path.isdir(name) else download(name)
    return args, from_hf_names(weights)


def download(model_type):
    """GPT-2's config arguments and state dict through transformers."""
    require(model_type in GPT2_SIZES,
            f"'{model_type}' is neither a folder nor one of {', '.join(GPT2_SIZES)}")
    try:
        from transformers import GPT2LMHeadModel
    except ImportError as error:
        require(False, f"'{model_type}' needs the transformers package ({error}): pip install transformers, "
                       "or name a local Hugging Face GPT-2 folder")
    try:
        weights = GPT2LMHeadModel.from_pretrained(model_type).state_dict()
    except OSError as error:
        require(False, f"'{model_type}' could not be downloaded ({str(error).splitlines()[0]}): without a "
                       "network, name a local Hugging Face GPT-2 folder (config.json, model.safetensors)")
    return dict(GPT2_SIZES[model_type], vocab_size=50257, block_size=1024), weights


def read_folder(folder):
    """A Hugging Face folder (config.json, model.safetensors or pytorch_model.bin) -> args, state dict."""
    require((folder / "config.json").is_file(),
            f"{folder} has no config.json: not a Hugging Face GPT-2 folder")
    c = config_of(folder / "config.json")
    require(c.get("model_type") == "gpt2", f"{folder} holds a '{c.get('model_type')}' model, expected 'gpt2'")
    if (folder / "model.safetensors").is_file():
        weights = read_safetensors(folder / "model.safetensors")
    else:
        require((folder / "pytorch_model.bin").is_file(),
                f"{folder} has neither model.safetensors nor pytorch_model.bin")
        weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    return dict(n_layer=c["n_layer"], n_head=c["n_head"], n_embd=c["n_embd"], vocab_size=c["vocab_size"],
                block_size=c["n_positions"]), weights


def package(path):
    """The safetensors package."""
    try:
        import safetensors.torch
    except ImportError:
        require(False, f"{path} needs the safetensors package: pip install safetensors")
    return safetensors


def read_safetensors(path):
    """The tensors of a file, by name; what is no such file is a ConfigError."""
    safetensors = package(path)
    try:
        return safetensors.torch.load_file(path)
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read as safetensors ({error})") from error


OURS = "nanocortex"                              # model_type in the config.json of a model of ours


def is_gpt2(name):
    """Is it one of GPT2_SIZES, or a folder with a config.json that is not of a model of ours?"""
    path = Path(name) / "config.json"
    return name in GPT2_SIZES or (os.path.isfile(path) and config_of(path).get("model_type") != OURS)


def config_of(path):
    """A config.json as a dict; {} without the file."""
    if not os.path.isfile(path):
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error})") from error
    require(isinstance(said, dict), f"{path} holds a {type(said).__name__}, expected an object")
    return said


def read_ours(folder):
    """A folder of write_folder -> what a checkpoint of the model alone holds."""
    about, weights = config_of(folder / "config.json"), read_safetensors(folder / "model.safetensors")
    weights |= {other: weights[name] for other, name in about.get("shared", {}).items() if name in weights}
    return {"model": weights} | {key: about[key] for key in ("model_args", "config", "tokenizer")
                                 if about.get(key) is not None}


def write_folder(folder, weights, about):
    """model.safetensors and config.json. A tensor of several names is stored once: `shared` says which. A
    failing disk is a ConfigError."""
    safetensors = package(folder / "model.safetensors")
    first, shared = {}, {}
    for name, tensor in weights.items():
        one = first.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), name)
        shared |= {name: one} if one != name else {}
    kept = {name: tensor.detach().contiguous() for name, tensor in weights.items() if name not in shared}
    said = json.dumps(about | {"shared": shared}, indent=1) + "\n"
    writers = {"model.safetensors": lambda path: safetensors.torch.save_file(kept, path, {"format": "pt"}),
               "config.json": lambda path: path.write_text(said, encoding="utf-8")}
    for name, write in writers.items():
        temporary = folder / (name + ".tmp")
        try:
            write(temporary)
            os.replace(temporary, folder / name)
        except (OSError, safetensors.SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise ConfigError(f"{folder / name} could not be written ({error}): make room or name another "
                              "folder, --export_dir") from error


SAME_IN_GPT2 = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "recompute",
                "tie_weights", "screen", "mlp_units", "zero_init", "sr_ste")


def to_hf(model):
    """A dense model -> (state dict, config) of transformers' GPT2LMHeadModel with the same logits; biases
    that it lacks are zeros. A flag that GPT-2 has no name for is a ConfigError."""
    c = model.config
    for field in dataclasses.fields(c):
        require(field.name in SAME_IN_GPT2 or getattr(c, field.name) == field.default,
                f"{field.name}={getattr(c, field.name)} has no counterpart in GPT-2, to=hf is for dense "
                "models: type --to=safetensors")
    weights = {}
    for name, tensor in model.state_dict().items():
        conv1d = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        weights[name] = tensor.t() if conv1d else tensor
        partner = name.removesuffix("weight") + "bias"
        if (conv1d or ".ln_" in name) and name.endswith("weight") and partner not in model.state_dict():
            weights[partner] = tensor.new_zeros(len(tensor))
    return weights, {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": c.n_layer,
                     "n_head": c.n_head, "n_embd": c.n_embd, "n_positions": c.block_size,
                     "vocab_size": c.vocab_size, "n_inner": c.units(), "activation_function": "gelu",
                     "layer_norm_epsilon": 1e-5, "tie_word_embeddings": c.tie_weights,
                     "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout,
                     "bos_token_id": None, "eos_token_id": None}


def from_hf_names(weights):
    """Hugging Face's state dict -> ours: Conv1D matrices transposed, mask buffers dropped, head tied."""
    out = {}
    for name, tensor in weights.items():
        name = "transformer." + name.removeprefix("transformer.") if not name.startswith("lm_head") else name
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        conv1d = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        out[name] = tensor.t() if conv1d else tensor
    out["lm_head.weight"] = out["transformer.wte.weight"]
    return out


def fit_vocabulary(model, old, meta):
    """A loaded model for the data of `meta` -> the model, grown where the data's tokenizer extends its own.

    old: the description of the tokenizer it was trained with, or None. Another tokenizer than that is a
    ConfigError that names both.
    """
    new = tokenizers.described(meta)
    base = new.get("bpe", {}).get("base")
    if base and old and base == tokenizers.name_of(old):
        made = tokenizers.from_meta(new)
        return grow_vocabulary(model, made.extends, made.pieces())
    tokenizers.require_same(old, new, "the model of --init_from and the data", "take data that is encoded as "
                            "the model's was, or start with --init_from=scratch")
    return model


@torch.no_grad()
def grow_vocabulary(model, old_size, pieces):
    """A model whose embedding and head have a row more for each of `pieces`, behind those of old_size ids.

    pieces: lists of old ids, how the old vocabulary spells each new token; a new row is the mean of theirs,
    so that a new token begins as what the model knew of its parts (2310.05773 calls it a strong baseline).
    """
    weights = model.state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        rows = weights[name]
        new = torch.stack([rows[ids].mean(dim=0) for ids in pieces])
        weights[name] = torch.cat((rows[:old_size], new))
    config = dataclasses.replace(model.config, vocab_size=old_size + len(pieces))
    grown = type(model)(config, init=False)
    grown.load_state_dict(weights)
    return grown
