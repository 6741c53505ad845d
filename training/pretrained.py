"""Models in Hugging Face's layout, config.json beside model.safetensors: OpenAI's GPT-2 weights, read from a
folder or downloaded; Llama's family (llama.py), from a folder or a GGUF file; ours, written and read; and
what a pretrained model needs for a vocabulary that has grown."""
import contextlib
import dataclasses
import itertools
import json
import os
import re
import sys
from pathlib import Path

import torch

from configurator import ConfigError, require
from data import tokenizer as tokenizers
from training import gguf_file, llama
from training.gguf_file import is_gguf

GPT2_SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}


def read(name):
    """A Hugging Face folder, a file of weights in one, a GGUF file, or one of GPT2_SIZES -> (GPTConfig
    arguments, our state dict). What this package would compute otherwise than transformers, or llama.cpp, is
    a ConfigError."""
    if is_gguf(name):
        return read_gguf(Path(name))
    return read_folder(Path(name)) if os.path.exists(name) else download(name)


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
    except Exception as error:                  # hubs, proxies, TLS, full disks: each raises its own type
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"'{model_type}' could not be downloaded ({why}): without a network, name a local "
                          "Hugging Face GPT-2 folder (config.json, model.safetensors)") from error
    note(f"{model_type} is computed with the exact GELU, as nanoGPT does; OpenAI's is the tanh form, "
         "which its "
         "Hugging Face folder, named as a path, is computed with")
    args = dict(GPT2_SIZES[model_type], vocab_size=50257, block_size=1024)
    return args, from_hf_names(weights, GPT2_DEFAULTS | GPT2_SIZES[model_type], model_type)


def note(sentence):
    """On stderr, once, whatever the number of processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {sentence}", file=sys.stderr, flush=True)


# -------------------------------------------------- config.json ---------------------------------------------

# what transformers takes for a field that config.json leaves out
GPT2_DEFAULTS = dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50257, n_positions=1024, n_inner=None,
                     activation_function="gelu_new", layer_norm_epsilon=1e-5, tie_word_embeddings=True,
                     scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
                     reorder_and_upcast_attn=False, add_cross_attention=False)
SAME_FIELD = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
              "max_position_embeddings": "n_positions", "n_ctx": "n_positions"}
GELUS = {"gelu": "gelu", "gelu_python": "gelu"} | dict.fromkeys(
    ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python_tanh"), "gelu_tanh")
# what GPT-2 is not, so anything else here is another model
NEVER = {"add_cross_attention": [False], "is_encoder_decoder": [False],
         "pruned_heads": [{}, None], "cross_attention_hidden_size": [None]}
EXPECTED = {bool: "true or false", str: "a name", float: "a number", int: "a whole number from 1 on"}
HEADS = "GPT2LMHeadModel", "GPT2Model"
# fields that say nothing of the logits: of training, generation, summaries, files
NO_PART = frozenset("""
    _name_or_path name_or_path model_type architectures transformers_version torch_dtype dtype
    use_bfloat16 shared attn_pdrop embd_pdrop resid_pdrop initializer_range gradient_checkpointing
    problem_type finetuning_task summary_activation summary_first_dropout summary_proj_to_labels
    summary_type summary_use_proj id2label label2id num_labels use_cache return_dict
    return_dict_in_generate output_attentions output_hidden_states output_past output_scores torchscript
    tf_legacy_loss chunk_size_feed_forward is_decoder tie_encoder_decoder task_specific_params
    tokenizer_class prefix bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    forced_bos_token_id forced_eos_token_id min_length max_length do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    attn_implementation _attn_implementation _attn_implementation_autoset""".split())


def read_folder(place):
    """A Hugging Face folder, or a file of weights in one -> GPTConfig arguments, our state dict."""
    folder = place if os.path.isdir(place) else place.parent
    path = folder / "config.json"
    require(os.path.isfile(path), f"{folder} has no config.json: not a Hugging Face GPT-2 folder or one of "
            "Llama's family")
    require(folder != place or not (folder / "ckpt.pt").exists(), f"{folder} holds a run (ckpt.pt) and a "
                                                                  "Hugging "
            f"Face model: name the file, {folder / 'ckpt.pt'} or {folder / 'model.safetensors'}")
    if config_of(path).get("model_type") in [*llama.DEFAULTS]:
        return read_llama(place, folder, config_of(path))
    c = fields_of(config_of(path), path)
    weights = read_shards(folder) if folder == place else read_tensors(place)
    said = config_of(path).get("shared", {})
    if isinstance(said, dict):                   # a folder that export.py has written
        weights |= {other: weights[name] for other, name in said.items() if name in weights}
    layers = set(re.findall(r"(?:^|\.)h\.(\d+)\.", "\n".join(map(str, weights)), re.MULTILINE))
    require(len(layers) == c["n_layer"], f"{path}: n_layer={c['n_layer']}, but the weights of {place} are of "
            f"{len(layers)} layers: the two do not belong together")
    units = {"mlp_units": c["n_inner"]} if c["n_inner"] not in (None, 4 * c["n_embd"]) else {}
    units |= {"norm_eps": c["layer_norm_epsilon"]} if c["layer_norm_epsilon"] != 1e-5 else {}
    args = dict(n_layer=c["n_layer"], n_head=c["n_head"], n_embd=c["n_embd"], vocab_size=c["vocab_size"],
                block_size=c["n_positions"], act=GELUS[c["activation_function"]],
                tie_weights=c["tie_word_embeddings"])
    return args | units, from_hf_names(weights, c, place)


def read_llama(place, folder, said):
    """A folder of Llama's family -> GPTConfig arguments, our state dict."""
    c = llama.fields_of(said, folder / "config.json", NO_PART | {OURS})
    weights = read_shards(folder) if folder == place else read_tensors(place)
    return llama.arguments(c), llama.to_ours(plain_names(weights, place), c, place)


def read_gguf(path):
    """The same of a GGUF file."""
    c = llama.fields_of(gguf_file.config_of(path), path, ())
    c["scaled"] = gguf_file.scaled_of(path, c)
    return llama.arguments(c), llama.to_ours(gguf_file.weights_of(path, c), c, path)


def fields_of(said, path):
    """The fields of a GPT-2 config.json that decide the logits, each one checked -> dict like "
      "GPT2_DEFAULTS."""
    kind = said.get("model_type")
    require(kind == "gpt2", f"{path.parent} holds a '{kind}' model, expected gpt2, "
                            f"{' or '.join(llama.DEFAULTS)}")
    c = GPT2_DEFAULTS | {name: said[name] for name in GPT2_DEFAULTS if name in said}
    for other, name in SAME_FIELD.items():
        require(other not in said or name not in said or said[other] == said[name],
                f"{path}: {other}={said.get(other)} contradicts {name}={said.get(name)}: leave one of "
                "them out")
        c[name] = said.get(name, said.get(other, c[name])) if other in said else c[name]
    for name, value in said.items():
        require(name in {*GPT2_DEFAULTS, *SAME_FIELD, *NO_PART, *NEVER, OURS},
                f"{path} has {name}={str(value)[:40]}, which GPT-2 has no such field for: if the model "
                "does not "
                "depend on it, delete the field")
        require(any(value == fits and isinstance(value, type(fits)) for fits in NEVER.get(name, [value])),
                f"{path}: {name}={str(value)[:40]!r}, but this GPT-2 computes {NEVER.get(name, ['?'])[0]} "
                "alone: "
                "use transformers for this model")
    for name, value in c.items():
        kind = type(GPT2_DEFAULTS[name])
        fits = type(value) is kind or (name == "n_inner" and type(value) is int)
        require(fits and not (type(value) is int and value < 1),
                f"{path}: {name}={str(value)[:40]!r}, expected {EXPECTED.get(kind, EXPECTED[int])}")
    require(0 < c["layer_norm_epsilon"] < 1, f"{path}: layer_norm_epsilon={c['layer_norm_epsilon']} must lie "
            "between 0 and 1")
    require(c["activation_function"] in GELUS, f"{path}: activation_function='{c['activation_function']}' "
                                               "is not "
            f"computed here, only {', '.join(GELUS)}: use transformers for this model")
    heads = said.get("architectures") or [HEADS[0]]
    require(isinstance(heads, list) and set(map(str, heads)) <= set(HEADS),
            f"{path}: architectures={heads!r}, expected one of {', '.join(HEADS)}: what other models "
            "predict is "
            "not the next token")
    require(c["n_embd"] % c["n_head"] == 0,
            f"{path}: n_embd={c['n_embd']} is not divisible by n_head={c['n_head']}")
    return c


def folder_of(name):
    """The folder of what `read` reads from one; None for a name of GPT2_SIZES that is downloaded, and for a
    GGUF file, which has all in itself."""
    if is_gguf(name) or not os.path.exists(name):
        return None
    return Path(name) if os.path.isdir(name) else Path(name).parent


def carried(name):
    """What export.py has written into config.json for sampling again ("tokenizer", "config"); {} "
                                                                                           "elsewhere."""
    folder = folder_of(name)
    own = config_of(folder / "config.json").get(OURS, {}) if folder else {}
    parts = [own] + [own.get(key, {}) for key in ("tokenizer", "config") if isinstance(own, dict)]
    require(all(isinstance(part, dict) for part in parts), f"{name}: {OURS} in its config.json is damaged")
    return own


def tokenizer_of(name, vocab_size):
    """The tokenizer of what `read` reads: GPT-2's for its names, else that of the folder's own files; None
    where it has none."""
    folder = folder_of(name)
    if folder is None:
        return gguf_file.tokenizer_of(Path(name)) if is_gguf(name) else tokenizers.GPT2Tokenizer()
    found = tokenizers.in_folder(folder, config_of(folder / "config.json").get("eos_token_id"))
    if found is None and vocab_size == 50257:
        note(f"{folder} has no tokenizer files; of 50257 ids, so GPT-2's tokenizer is taken")
        return tokenizers.GPT2Tokenizer()
    return found


def chat_template_of(name):
    """The text of a model's template for conversations, where its file or folder has one; else None."""
    if is_gguf(name):
        return gguf_file.chat_template_of(Path(name))
    folder = folder_of(name)
    said = config_of(folder / "tokenizer_config.json").get("chat_template") if folder else None
    path = folder / "chat_template.jinja" if folder else None
    return path.read_text(encoding="utf-8", errors="replace") if path and path.is_file() else said


def description_of(name, vocab_size):
    """The description of that tokenizer, as a checkpoint has it; None where it is not known."""
    own = carried(name).get("tokenizer")
    found = own or tokenizer_of(name, vocab_size)
    return own or (found and found.meta())


# -------------------------------------------------- files of weights ----------------------------------------

FILES = ("model.safetensors", "model.safetensors.index.json",
         "pytorch_model.bin", "pytorch_model.bin.index.json")


def read_shards(folder):
    """The weights of a folder, in one file or in several that an index names, in transformers' order."""
    path = next((folder / name for name in FILES if os.path.isfile(folder / name)), None)
    require(path, f"{folder} has no weights: expected {', '.join(FILES[:-1])} or {FILES[-1]}")
    if path.suffix != ".json":
        return read_tensors(path)
    index = config_of(path).get("weight_map")
    fits = isinstance(index, dict) and index and all(isinstance(file, str) for file in index.values())
    require(fits, f"{path} has no weight_map from names to files: damaged")
    weights = {}
    for file in dict.fromkeys(index.values()):
        require(file == os.path.basename(file) and file not in ("", ".", ".."),
                f"{path} names '{file}', expected a file of this folder")
        part = read_tensors(folder / file)
        listed = {name for name, place in index.items() if place == file}
        require(part.keys() == listed, f"{path} does not fit {file}: "
                f"{min(part.keys() ^ listed, default='')} is in one of them only")
        weights |= part
    return weights


def read_tensors(path):
    """The tensors of a .safetensors file or of a pickle, which runs no code; what is neither is a "
      "ConfigError."""
    require(os.path.isfile(path), f"{path} does not exist")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(f"{path} cannot be read: damaged, or it holds more than tensors "
                          f"({type(error).__name__})") from error
    require(isinstance(weights, dict) and all(isinstance(t, torch.Tensor) for t in weights.values()),
            f"{path} is not the state dict of a model: expected tensors by name")
    return weights


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
        check_whole(path)
        return safetensors.torch.load_file(path)
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read as safetensors ({error})") from error


HEADER = 10**8                                   # bytes of a .safetensors file's header, at the most


def check_whole(path):
    """A ConfigError where a .safetensors file is shorter than its header says. Other damage is left to the
    package."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= HEADER else b""
    needs = 8 + length
    with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError, RecursionError):
        needs += max(about["data_offsets"][1] for name, about in json.loads(header).items()
                     if name != "__metadata__")
    require(length > HEADER or size >= needs, f"{path} is shorter than its header says: {size:,} of "
            f"{needs:,} bytes; copy it again")


OURS = "nanocortex"     # model_type in the config.json of a model of ours; in to=hf the field of what we add


def is_gpt2(name):
    """Is it a model of others: one of GPT2_SIZES, a GGUF file, or a folder (or a file of weights in one)
    whose config.json is not that of a model of ours?"""
    place = Path(name)
    if is_gguf(name):
        return True
    folder = place.parent if place.suffix in (".safetensors", ".bin") and os.path.isfile(place) else place
    path = folder / "config.json"
    return name in GPT2_SIZES or (os.path.isfile(path) and not is_ours(config_of(path)))


def is_ours(said):
    """Is a config.json that of a model of ours?"""
    return said.get("model_type") == OURS or "model_args" in said


def config_of(path):
    """A config.json as a dict; {} without the file."""
    if not os.path.isfile(path):
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"{path} is not readable JSON ({error})") from error
    require(isinstance(said, dict), f"{path} holds a {type(said).__name__}, expected an object")
    return said


def read_ours(path):
    """A .safetensors file beside a config.json of write_folder -> what a checkpoint of the model alone "
      "holds."""
    folder = path.parent
    require(os.path.isfile(folder / "config.json"), f"{folder} has no config.json, which says what "
                                                    f"{path.name} "
            "holds: copy it there too")
    about = config_of(folder / "config.json")
    require(is_ours(about), f"{path} is a '{about.get('model_type')}' model of Hugging "
                                             "Face: "
            f"type --init_from={folder} (sample.py and train.py)")
    require(isinstance(about.get("tokenizer") or {}, dict), f"{folder / 'config.json'}: tokenizer is damaged")
    weights = read_safetensors(path)
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
                "loss_chunks", "tie_weights", "act", "screen", "mlp_units", "norm_eps", "zero_init", "sr_ste")


def to_hf(model):
    """A dense model -> (state dict, config) of transformers' GPT2LMHeadModel with the same logits, where
    biases that it lacks are zeros, or of its LlamaForCausalLM. A flag that these have no name for is a
    ConfigError."""
    c = model.config
    same, kind = (llama.SAME, "Llama") if llama.is_llama(c) else (SAME_IN_GPT2, "GPT-2")
    for field in dataclasses.fields(c):
        require(field.name in same or getattr(c, field.name) == field.default,
                f"{field.name}={getattr(c, field.name)} has no counterpart in {kind}, to=hf is for dense "
                "models: type --to=safetensors")
    if kind == "Llama":
        return llama.to_hf(model)
    act = {"gelu": "gelu", "gelu_tanh": "gelu_new"}.get(c.act)
    require(act, f"act={c.act} has no counterpart in GPT-2, to=hf is for dense models: type --to=safetensors")
    weights = {}
    for name, tensor in model.state_dict().items():
        conv1d = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        weights[name] = tensor.t() if conv1d else tensor
        partner = name.removesuffix("weight") + "bias"
        if (conv1d or ".ln_" in name) and name.endswith("weight") and partner not in model.state_dict():
            weights[partner] = tensor.new_zeros(len(tensor))
    return weights, {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": c.n_layer,
                     "n_head": c.n_head, "n_embd": c.n_embd, "n_positions": c.block_size,
                     "vocab_size": c.vocab_size, "n_inner": c.units(), "activation_function": act,
                     "layer_norm_epsilon": c.norm_eps or 1e-5, "tie_word_embeddings": c.tie_weights,
                     "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout,
                     "bos_token_id": None, "eos_token_id": None}


WRAPPERS = "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"


def plain_names(weights, path):
    """A state dict without what torch.compile, DDP and FSDP put before names, in any order; DDP's `module` is
    at the front alone. Two names that become one are a ConfigError."""
    out = {}
    for name, tensor in weights.items():
        parts = [part for part in str(name).split(".") if part not in WRAPPERS]
        plain = ".".join(itertools.dropwhile(lambda part: part == "module", parts))
        require(plain not in out, f"{path} holds {plain} twice, with a prefix and without, or with two: "
                "keep one")
        out[plain] = tensor
    return out


def from_hf_names(weights, c, place):
    """Hugging Face's state dict -> ours: Conv1D matrices transposed, mask buffers dropped, a head that is not
    stored tied. c: like GPT2_DEFAULTS; scales of attention that differ from ours go into the queries."""
    out = {}
    for name, tensor in plain_names(weights, place).items():
        name = "transformer." + name.removeprefix("transformer.") if not name.startswith("lm_head") else name
        require(name not in out, f"{place} holds {name} twice, with and without 'transformer.': keep one")
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        require(tensor.is_floating_point(), f"{place}: {name} is {str(tensor.dtype).removeprefix('torch.')}, "
                "expected floating point: quantised weights are not read")
        conv1d = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        out[name] = tensor.t() if conv1d and tensor.dim() == 2 else tensor
    ends = "transformer.wte.weight", "lm_head.weight"
    for one, other in (ends, ends[::-1]) if c["tie_word_embeddings"] else ():
        out |= {other: out[one]} if one in out and other not in out else {}
    require(not c["tie_word_embeddings"] or is_tied(out), f"{place} holds an lm_head.weight that is not the "
            "embedding, but its config.json ties them: set tie_word_embeddings to false there")
    units = c["n_inner"] or 4 * c["n_embd"]
    for name, rows in (("wte", c["vocab_size"]), ("wpe", c["n_positions"]), ("h.0.mlp.c_fc", units)):
        check_shape(out, f"transformer.{name}.weight", (rows, c["n_embd"]), place)
    for layer in range(c["n_layer"]):
        scale = (c["n_embd"] // c["n_head"]) ** 0.5 if not c["scale_attn_weights"] else 1
        scale /= layer + 1 if c["scale_attn_by_inverse_layer_idx"] else 1
        for part in ("weight", "bias") if scale != 1 else ():
            name = f"transformer.h.{layer}.attn.c_attn.{part}"
            if name in out:
                queries, others = out[name].float().tensor_split([c["n_embd"]])
                out[name] = torch.cat((queries * scale, others))
    return out


def is_tied(weights):
    """Are the embedding and the head of a state dict one matrix, as far as both are there?"""
    one, other = weights.get("transformer.wte.weight"), weights.get("lm_head.weight")
    return one is None or other is None or (one.shape == other.shape and bool((one == other).all()))


def check_shapes(weights, expected, place):
    """ConfigError unless a state dict has the names and shapes of `expected`, {name: shape}."""
    lacks = [name for name in expected if name not in weights]
    more = [name for name in weights if name not in expected]
    wrong = [f"lack {name}" for name in lacks[:1]] + [f"have {name}, which it does not" for name in more[:1]]
    require(not wrong, f"{place} does not hold the weights of the model of its config.json: they "
                       f"{' and '.join(wrong)}")
    for name, shape in expected.items():
        check_shape(weights, name, shape, place)


def check_shape(weights, name, shape, place):
    found = tuple(weights[name].shape) if name in weights else shape
    require(found == tuple(shape), f"{place}: {name} is {found}, config.json makes it {tuple(shape)}: the "
                                   "two "
                                   "do not belong together")


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
                            "the model's was (data/prepare.py --tokenizer=THAT_MODEL), or start with "
                            "--init_from=scratch")
    return model


def rebuilt(model, config):
    """The same weights as a model of another config that has the same tensors."""
    new = type(model)(config, init=False)
    new.load_state_dict(model.state_dict())
    return new


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
    return grown.train(model.training)
