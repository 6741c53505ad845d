"""Models of Llama's family in a GGUF file, as llama.cpp reads them: weights that are dequantised to fp32, and
the tokenizer. By the package gguf."""
import functools
import json
import math

import numpy as np
import torch

from configurator import ConfigError, require
from data import tokenizer as tokenizers
from layers import slowed
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
FACTORS = "rope_freqs.weight"                    # by which Llama 3.1's frequencies are divided


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
    require(stamp[1], f"{path} is empty: copy it again")
    reader = reader_of(tokenizers.need("gguf", f"{path}: files of this kind"))
    try:
        found = reader(path)
        return found, {key: field.contents() for key, field in found.fields.items()}
    except EOFError as error:
        raise ConfigError(f"{path} is shorter than its header says: {error}; copy it again") from error
    except Exception as error:                   # each damage raises a type of its own
        raise ConfigError(f"{path} cannot be read as GGUF ({str(error)[:120] or type(error).__name__}): "
                          "damaged, or another kind of file") from error


def reader_of(gguf):
    """The package's reader, which for a file that ends too early raises an EOFError on how many bytes there
    are of how many, where it would raise what numpy says."""
    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            self.reaches(offset + int(count) * np.dtype(dtype).itemsize, "at least ")
            return super()._get(offset, dtype, count, override_order)

        def _build_tensors(self, start_offs, fields):
            ends = [0]
            for *_, dims, kind, offset in (field.parts for field in fields):
                block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind[0])]
                ends.append(start_offs + int(offset[0]) + math.prod(dims.tolist()) * size // block)
            self.reaches(max(ends))
            super()._build_tensors(start_offs, fields)

        def reaches(self, end, how=""):
            if end > len(self.data):
                raise EOFError(f"{len(self.data):,} of {how}{end:,} bytes")
    return Reader


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


def scaled_of(path, c):
    """The values of llama.LLAMA_3 by which the file's rotation is scaled, {} where it is not. The file holds
    what each frequency is divided by, so any values serve that make the same factors; whole numbers are
    taken for what is near them. Factors that no values make are a ConfigError. c: see llama.fields_of."""
    tensor = next((tensor for tensor in opened(path)[0].tensors if tensor.name == FACTORS), None)
    if tensor is None:
        return {}
    width = c["hidden_size"] // c["num_attention_heads"]
    plain = c["rope_theta"] ** (-torch.arange(0, width, 2) / width).double()
    factors = torch.from_numpy(tensor.data.copy()).double()
    odd = (f"{path}: {FACTORS} does not slow the rotation as Llama 3.1's rule does: use llama.cpp for this "
           "model")
    require(factors.shape == plain.shape and (factors >= 1 - 1e-6).all() and factors.isfinite().all(), odd)
    factor = near_whole(factors.max().item())
    if factor == 1:
        return {}
    low, high = ends_of(plain, (1 / factors - 1 / factor) / (1 - 1 / factor))
    original = max(1, round(2 * math.pi / low))
    low, high = (near_whole(original * end / (2 * math.pi)) for end in (low, high))
    found = dict(factor=factor, low_freq_factor=low, high_freq_factor=high,
                 original_max_position_embeddings=original)
    again = plain / slowed(plain, factor, low, high, original)
    require((again / factors - 1).abs().max() < 1e-4, odd)
    return found


def factors_of(config):
    """What the file of a GPTConfig with rope_factor holds of it, (D / 2,) fp32."""
    width = config.heads()[1]
    plain = config.rope_theta ** (-torch.arange(0, width, 2) / width)
    return plain / slowed(plain, config.rope_factor, config.rope_low, config.rope_high, config.rope_original)


def ends_of(frequencies, stays):
    """Frequencies (n,), falling, and how much of each stays, from 1 to 0 -> the frequency at which nothing
    stays, and the one from which on all does, of a straight line between them."""
    none, all_of_it = stays <= 1e-5, stays >= 1 - 1e-5
    below = max(frequencies[none].tolist(), default=0.0)
    above = min(frequencies[all_of_it].tolist(), default=math.inf)
    f, s = (t[~(none | all_of_it)].tolist() or [end] for t, end in ((frequencies, below), (stays, 0.0)))
    if len(f) > 1 and s[0] > s[-1]:
        width = (f[0] - f[-1]) / (s[0] - s[-1])
    else:                                        # Llama's own, from 1 to 4 times f, if there is room
        width = min(3 * f[0] / (1 + 3 * s[0]), (above - f[0]) / (1 - s[0]), (f[0] - below) / s[0]
                    if s[0] else math.inf)
    return f[0] - s[0] * width, f[0] + (1 - s[0]) * width


def near_whole(value):
    """The whole number that value is, but for what 32 bits round, or value."""
    return float(round(value)) if abs(value - round(value)) <= 1e-5 * value else value


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
        if paired and tensor.name == FACTORS:    # see scaled_of
            continue
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
