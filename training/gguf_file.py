"""Models of Llama's family in a GGUF file, as llama.cpp reads them: weights that are dequantised to fp32, and
the tokenizer. By the package gguf."""
import functools
import json

import torch

from configurator import ConfigError, require
from data import tokenizer as tokenizers
from training import llama

ARCHITECTURES = "llama", "qwen2"
# keys behind the architecture's name, and what config.json calls them
FIELDS = {"block_count": "num_hidden_layers", "context_length": "max_position_embeddings",
          "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
          "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
          "attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta",
          "vocab_size": "vocab_size", "attention.key_length": "head_dim",
          "attention.value_length": "head_dim", "rope.dimension_count": "head_dim"}
NEVER = {"rope.scaling.type": "none", "attention.causal": True}
NO_PART = "general.", "tokenizer.", "GGUF.", "quantize."       # keys that begin so say nothing of the logits
WORDS = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def is_gguf(place):
    """Is it the path of a file of that kind?"""
    return str(place).lower().endswith(".gguf")


def opened(path):
    """The file -> (gguf.GGUFReader, {key: value})."""
    require(path.is_file(), f"{path} does not exist")
    stamp = path.stat()
    return read(path, (stamp.st_mtime_ns, stamp.st_size))


@functools.lru_cache(1)
def read(path, stamp):
    """The same; a model is read in several calls."""
    reader = tokenizers.need("gguf", f"{path}: files of this kind").GGUFReader
    try:
        found = reader(path)
        return found, {key: field.contents() for key, field in found.fields.items()}
    except Exception as error:                   # each damage raises a type of its own
        raise ConfigError(f"{path} cannot be read as GGUF ({str(error)[:120] or type(error).__name__}): "
                          "damaged, or another kind of file") from error


# -------------------------------------------------- the model ----------------------------------------------

def config_of(path):
    """What a config.json would say of the model in it -> dict; what is not computed here is a ConfigError."""
    reader, said = opened(path)
    require(reader.byte_order == "I", f"{path} is of the other byte order than this machine, which the "
            "package gguf dequantises wrongly: turn it by its gguf-convert-endian")
    kind = said.get("general.architecture")
    require(kind in ARCHITECTURES, f"{path} holds a '{kind}' model, expected {' or '.join(ARCHITECTURES)}")
    require("split.count" not in said or said["split.count"] == 1,
            f"{path} is one of {said.get('split.count')} parts: join them by llama.cpp's llama-gguf-split")
    out = {"model_type": kind, "vocab_size": len(said.get("tokenizer.ggml.tokens", ()))}
    for key, value in said.items():
        name = key.removeprefix(f"{kind}.")
        if key.startswith(NO_PART) or key in ("split.count", "split.no", "split.tensors.count"):
            continue
        require(name in FIELDS or NEVER.get(name) == value, f"{path}: {key}={str(value)[:40]!r}, which is "
                "not computed here: use llama.cpp for this model")
        value = float(f"{value:.7g}") if isinstance(value, float) else value          # it was a 32-bit one
        field = FIELDS.get(name)
        require(field != "head_dim" or out.get(field, value) == value, f"{path}: {key}={value} contradicts "
                f"another width of a head, {out.get(field)}: use llama.cpp for this model")
        out |= {field: value} if field else {}
    names = {tensor.name for tensor in reader.tensors}
    out |= {"tie_word_embeddings": "output.weight" not in names, "mlp_bias": "blk.0.ffn_up.bias" in names}
    return out | {"attention_bias": "blk.0.attn_output.bias" in names}


def named(name):
    """llama.cpp's name of a tensor -> Hugging Face's, itself where there is none."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in WORDS:
        return f"model.layers.{parts[1]}.{WORDS[parts[2]]}.{parts[3]}"
    return f"{OUTSIDE[parts[0]]}.{parts[1]}" if len(parts) == 2 and parts[0] in OUTSIDE else name


def weights_of(path, c):
    """-> its tensors in fp32 under Hugging Face's names. Llama's queries and keys lie there with the pairs of
    a rotation beside each other, and come back as halves. c: see llama.fields_of."""
    quants = tokenizers.need("gguf.quants", f"{path}: files of this kind")
    out, paired = {}, config_of(path)["model_type"] == "llama"
    for tensor in opened(path)[0].tensors:
        try:
            values = quants.dequantize(tensor.data, tensor.tensor_type)
        except Exception as error:               # a kind that the package does not know, a shape that lies
            raise ConfigError(f"{path}: {tensor.name} cannot be dequantised ({str(error)[:80]})") from error
        rows, name = torch.from_numpy(values.copy()), named(tensor.name)
        if paired and name.rpartition(".")[0].endswith(llama.TURNED):
            width = c["hidden_size"] // c["num_attention_heads"]
            require(len(rows) % width == 0, f"{path}: {tensor.name} is of {len(rows)} rows, which heads of "
                    f"{width} do not divide")
            rows = rows.unflatten(0, (-1, width // 2, 2)).transpose(1, 2).flatten(0, 2)
        out[name] = rows
    return out


# -------------------------------------------------- its tokenizer ------------------------------------------

LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def words_by(pattern):
    """Text cut into the words of a regular expression, then written in GPT-2's bytes."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, LEVEL | {"use_regex": False}]}


LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")
# tokenizer.ggml.pre: how a text is cut into words, as the tokenizers package says it
CUTS = {"gpt-2": LEVEL | {"use_regex": True}, "llama-bpe": words_by(LLAMA_3),
        "smollm": {"type": "Sequence", "pretokenizers": [DIGITS, LEVEL | {"use_regex": True}]},
        "qwen2": words_by(LLAMA_3.replace("{1,3}", ""))}
CONTROL, OF_USERS = 3, 4                         # kinds of tokens


def tokenizer_of(path):
    """Its tokenizer -> a FolderTokenizer. One that is no byte pairs is a ConfigError."""
    _, said = opened(path)
    about = {key.removeprefix("tokenizer.ggml."): value for key, value in said.items()}
    kind, cut = about.get("model"), about.get("pre", "gpt-2")
    require(kind == "gpt2" and cut in CUTS, f"{path} has a tokenizer of the kind '{kind}' "
            f"({cut}), which is not read from here, only gpt2 ({', '.join(CUTS)}): type --init_from=FOLDER "
            "of the same model by Hugging Face")
    tokens, types = about["tokens"], about.get("token_type", [])
    added = [dict(id=i, content=tokens[i], single_word=False, lstrip=False, rstrip=False, normalized=False,
                  special=of == CONTROL) for i, of in enumerate(types) if of in (CONTROL, OF_USERS)]
    full = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": {"type": "NFC"} if cut == "qwen2" else None, "pre_tokenizer": CUTS[cut],
            "post_processor": None, "decoder": LEVEL | {"use_regex": True},
            "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)},
                      "merges": about.get("merges", []), "ignore_merges": cut == "llama-bpe"}}
    begin = [about["bos_token_id"]] if about.get("add_bos_token") and "bos_token_id" in about else None
    return tokenizers.FolderTokenizer(path, json.dumps(full), about.get("eos_token_id"), begin)


def chat_template_of(path):
    """The text of its template for conversations, or None."""
    return opened(path)[1].get("tokenizer.chat_template")
