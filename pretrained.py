"""OpenAI's GPT-2 weights in Hugging Face's layout: from a local folder, or downloaded by transformers; and
what a pretrained model needs for a vocabulary that has grown."""
import dataclasses
import json
import os
from pathlib import Path

import torch

import tokenizer as tokenizers
from configurator import require

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
    c = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    require(c.get("model_type") == "gpt2", f"{folder} holds a '{c.get('model_type')}' model, expected 'gpt2'")
    if (folder / "model.safetensors").is_file():
        try:
            from safetensors.torch import load_file
        except ImportError:
            require(False, f"{folder}/model.safetensors needs the safetensors package: "
                           "pip install safetensors")
        weights = load_file(folder / "model.safetensors")
    else:
        require((folder / "pytorch_model.bin").is_file(),
                f"{folder} has neither model.safetensors nor pytorch_model.bin")
        weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    return dict(n_layer=c["n_layer"], n_head=c["n_head"], n_embd=c["n_embd"], vocab_size=c["vocab_size"],
                block_size=c["n_positions"]), weights


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
