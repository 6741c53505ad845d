"""Llama's family (2302.13971) as Hugging Face lays it out, model_type llama, mistral or qwen2: what of a
config.json decides the logits, and which of our tensors theirs become."""
import torch

from configurator import require

# what transformers takes for a field that config.json leaves out
LLAMA = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=None, head_dim=None, hidden_act="silu",
             max_position_embeddings=2048, rms_norm_eps=1e-6, rope_theta=10000.0, tie_word_embeddings=False,
             attention_bias=False, mlp_bias=False, sliding_window=None)
DEFAULTS = {"llama": LLAMA,
            "mistral": LLAMA | dict(intermediate_size=14336, num_key_value_heads=8, sliding_window=4096,
                                    max_position_embeddings=131072),
            "qwen2": LLAMA | dict(vocab_size=151936, intermediate_size=22016, num_key_value_heads=32,
                                  max_position_embeddings=32768)}
FREE = "num_key_value_heads", "head_dim", "sliding_window"              # these may be null
# what this family is not, so anything else here is another model
NEVER = {"is_encoder_decoder": [False], "add_cross_attention": [False], "rope_interleaved": [False],
         "use_sliding_window": [False], "partial_rotary_factor": [1.0, None], "pruned_heads": [{}, None],
         "cross_attention_hidden_size": [None]}
# what a rotation that is scaled as Llama 3.1's has, and our flags of it
LLAMA_3 = {"factor": "rope_factor", "low_freq_factor": "rope_low", "high_freq_factor": "rope_high",
           "original_max_position_embeddings": "rope_original"}
# fields that say nothing of the logits, beside those of GPT-2
NO_PART = frozenset("""
    attention_dropout pretraining_tp max_window_layers is_llama_config transformers.js_config rope_scaling
    rope_parameters layer_types""".split())
ENDINGS = "ForCausalLM", "Model"
LONGEST = 2**22                                  # positions: each has a row of angles
BUFFERS = ".rotary_emb.inv_freq"                 # old folders hold what follows from rope_theta

# of a layer: our tensor, and those of theirs that lie in it one below the other
OF_LAYER = {"ln_1": ("input_layernorm",),
            "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "attn.c_proj": ("self_attn.o_proj",),
            "ln_2": ("post_attention_layernorm",),
            "mlp.c_fc": ("mlp.gate_proj", "mlp.up_proj"),
            "mlp.c_proj": ("mlp.down_proj",)}
OUTSIDE = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"}
TURNED = "self_attn.q_proj", "self_attn.k_proj"
QKV = *TURNED, "self_attn.v_proj"
MLP = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"


# -------------------------------------------------- config.json ---------------------------------------------

def fields_of(said, path, no_part):
    """The fields of a config.json that decide the logits, each one checked -> dict like LLAMA, with `biased`,
    the matrices of a layer that have biases, and `scaled`, the values of LLAMA_3 or {}. What is computed
    otherwise here, or not known, is a ConfigError. no_part: names of others that decide none."""
    kind = said["model_type"]
    fields = DEFAULTS[kind] | {name: said[name] for name in LLAMA if name in said}
    for name, value in said.items():
        require(name in {"model_type", *LLAMA, *NEVER, *NO_PART, *no_part}, f"{path} has "
                f"{name}={str(value)[:40]}, which is not computed here for a '{kind}' model: use "
                "transformers, or delete the field if nothing depends on it")
        require(any(value == fits and isinstance(value, type(fits)) for fits in NEVER.get(name, [value])),
                f"{path}: {name}={str(value)[:40]!r}, but only {NEVER.get(name, ['?'])[0]} is computed here: "
                "use transformers for this model")
    fields["rope_theta"], scaled = rotation_of(said, fields["rope_theta"], path)
    types = said.get("layer_types") or ["full_attention"]
    require(types == ["full_attention"] * len(types), f"{path}: layer_types={str(types)[:60]}, but only "
            "full_attention is computed here: use transformers for this model")
    check_types(fields, DEFAULTS[kind], path)
    check_values(said, fields, path)
    require(kind != "llama" or fields["sliding_window"] is None, f"{path}: "
            f"sliding_window={fields['sliding_window']}, but a 'llama' model has none: use transformers")
    if kind == "qwen2":                          # one that uses it has been refused
        fields["sliding_window"] = None
    qkv = QKV if kind == "qwen2" or fields["attention_bias"] else ()
    out = ("self_attn.o_proj",) if fields["attention_bias"] else ()
    return fields | {"biased": (*qkv, *out, *(MLP if fields["mlp_bias"] else ())), "scaled": scaled}


def rotation_of(said, theta, path):
    """-> (the base of the rotation, the values of LLAMA_3 or {}), wherever a version of transformers writes
    them. Rotations that are scaled otherwise are refused."""
    scaled = {}
    for name in ("rope_parameters", "rope_scaling"):
        rope = said.get(name) or {}
        require(isinstance(rope, dict), f"{path}: {name}={str(rope)[:40]!r}, expected an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        others = {key: value for key, value in rope.items() if key not in ("rope_type", "type", "rope_theta")}
        require(kind in ("default", "llama3"), f"{path}: {name} scales the rotation by rope_type="
                f"{str(kind)[:40]!r}, but only llama3's is computed here: use transformers for this model")
        wanted = LLAMA_3 if kind == "llama3" else {}
        require(others.keys() == {*wanted}, f"{path}: {name} of rope_type='{kind}' has the fields "
                f"{', '.join(map(str, others)) or 'none'}, expected {', '.join(wanted) or 'none'}")
        require(not (scaled and others) or scaled == others, f"{path}: rope_parameters and rope_scaling "
                "scale the rotation by different numbers: leave one of them out")
        theta = rope.get("rope_theta", theta)
        scaled = others or scaled
    check_scaled(scaled, path)
    return theta, scaled


def check_scaled(scaled, path):
    """A ConfigError where values of LLAMA_3 are no rotation."""
    for name, value in scaled.items():
        kinds = (int,) if name.startswith("original") else (int, float)
        require(type(value) in kinds and 0 < value < float("inf"), f"{path}: {name}={str(value)[:40]!r}, "
                f"expected a {'whole ' * (kinds == (int,))}number above 0")
    require(not scaled or (scaled["factor"] >= 1 and scaled["low_freq_factor"] < scaled["high_freq_factor"]),
            f"{path}: factor={scaled.get('factor')} must be at least 1, and low_freq_factor="
            f"{scaled.get('low_freq_factor')} below high_freq_factor={scaled.get('high_freq_factor')}")


def check_types(fields, defaults, path):
    """A ConfigError where a field is of another type than transformers' own value."""
    words = {bool: "true or false", str: "a name", float: "a number above 0", int: "a whole number from 1 on"}
    for name, value in fields.items():
        kind = int if name in FREE else type(defaults[name])
        fits = type(value) in ((int, float) if kind is float else (kind,))
        fits = fits and (kind in (bool, str) or 0 < value < float("inf"))
        require(fits or (value is None and name in FREE),
                f"{path}: {name}={str(value)[:40]!r}, expected {words[kind]}")


def check_values(said, fields, path):
    """A ConfigError where fields contradict each other, or our equation."""
    heads, groups = fields["num_attention_heads"], fields["num_key_value_heads"]
    width = fields["hidden_size"] // heads
    require(fields["hidden_act"] == "silu", f"{path}: hidden_act='{fields['hidden_act']}', but only silu is "
            "computed here: use transformers for this model")
    require(fields["hidden_size"] % heads == 0 and width % 2 == 0 and fields["head_dim"] in (None, width),
            f"{path}: head_dim={fields['head_dim']}, num_attention_heads={heads} and "
            f"hidden_size={fields['hidden_size']}, but a head here is hidden_size / num_attention_heads "
            "wide, an even number: use transformers for this model")
    most = fields["max_position_embeddings"]
    require(most <= LONGEST, f"{path}: max_position_embeddings={most}, but {LONGEST:,} is the most here: set "
            "it to what you need")
    require(heads % (groups or heads) == 0,
            f"{path}: num_key_value_heads={groups} does not divide num_attention_heads={heads}")
    made = said.get("architectures") or []
    fits = isinstance(made, list) and all(str(name).endswith(ENDINGS) for name in made)
    require(fits, f"{path}: architectures={made!r}, expected a ForCausalLM: what other models predict is not "
            "the next token")


def arguments(c):
    """Fields of fields_of -> keyword arguments of a GPTConfig."""
    heads, groups = c["num_attention_heads"], c["num_key_value_heads"]
    window = c["sliding_window"] or 0
    local = dict(window=window, window_pattern="S") if 0 < window < c["max_position_embeddings"] else {}
    scaled = {LLAMA_3[name]: value if name.startswith("original") else float(value)
              for name, value in c["scaled"].items()}
    return dict(n_layer=c["num_hidden_layers"], n_head=heads, n_embd=c["hidden_size"],
                n_kv_head=0 if groups in (None, heads) else groups, vocab_size=c["vocab_size"],
                block_size=c["max_position_embeddings"], bias=bool(c["biased"]),
                norm="rmsnorm", norm_eps=float(c["rms_norm_eps"]), pos="rope",
                rope_theta=float(c["rope_theta"]), act="swiglu", mlp_units=c["intermediate_size"],
                tie_weights=c["tie_word_embeddings"], **local, **scaled)


# -------------------------------------------------- weights -------------------------------------------------

def shapes_of(c):
    """{name of theirs: shape} of a model with these fields."""
    C, units, heads = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"]
    kv = (c["num_key_value_heads"] or heads) * (C // heads)
    sizes = {"self_attn.q_proj": (C, C), "self_attn.k_proj": (kv, C), "self_attn.v_proj": (kv, C),
             "self_attn.o_proj": (C, C), "mlp.gate_proj": (units, C), "mlp.up_proj": (units, C),
             "mlp.down_proj": (C, units), "input_layernorm": (C,), "post_attention_layernorm": (C,)}
    shapes = {f"{name}.weight": (c["vocab_size"], C) for name in ("model.embed_tokens", "lm_head")}
    shapes["model.norm.weight"] = (C,)
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}{name}.weight": shape for name, shape in sizes.items()}
        shapes |= {f"{at}{name}.bias": sizes[name][:1] for name in c["biased"]}
    return shapes


def whole(weights, c, place):
    """Their state dict with every name of shapes_of, in those shapes and no other; else a ConfigError."""
    weights = {name if name.startswith(("model.", "lm_head.")) else f"model.{name}": t
               for name, t in weights.items() if not str(name).endswith(BUFFERS)}
    if c["tie_word_embeddings"] and "model.embed_tokens.weight" in weights:
        head = weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
        require(torch.equal(head, weights["model.embed_tokens.weight"]), f"{place} holds an lm_head.weight "
                "that is not the embedding, but its config ties them: set tie_word_embeddings to false there")
    layers = {name.split(".")[2] for name in weights if name.startswith("model.layers.")}
    require(len(layers) == c["num_hidden_layers"], f"{place}: num_hidden_layers={c['num_hidden_layers']}, "
            f"but the weights are of {len(layers)} layers: the two do not belong together")
    shapes = shapes_of(c)
    lacks = next((name for name in shapes if name not in weights), None)
    more = next((name for name in weights if name not in shapes), None)
    require(lacks is None and more is None, f"{place} does not hold the weights of its config: they " + (
            f"lack {lacks}" if lacks else f"have {more}, which it does not"))
    for name, shape in shapes.items():
        found = tuple(weights[name].shape)
        require(found == shape, f"{place}: {name} is {found}, its config makes it {shape}: the two do not "
                                "belong together")
        require(weights[name].is_floating_point(), f"{place}: {name} is "
                f"{str(weights[name].dtype).removeprefix('torch.')}, expected floating point")
    return weights


def swapped(rows, width):
    """Rows of queries or keys with the halves of each head exchanged: rotate turns (a, b) to where they turn
    (b, a), so this leads from theirs to ours and back."""
    return rows.unflatten(0, (-1, 2, width // 2)).flip(1).flatten(0, 2)


def to_ours(weights, c, place):
    """Their state dict -> ours. Biases that one of our matrices has and theirs lacks are zeros."""
    weights, shapes = whole(weights, c, place), shapes_of(c)
    width = c["hidden_size"] // c["num_attention_heads"]
    out = {f"{ours}.weight": weights[f"{theirs}.weight"] for ours, theirs in OUTSIDE.items()}

    def part(name, kind):
        rows = weights.pop(f"{name}.{kind}", None)   # so that one layer at a time is held twice
        rows = torch.zeros(shapes[f"{name}.weight"][0]) if rows is None else rows
        return swapped(rows, width) if name.endswith(TURNED) else rows

    for layer in range(c["num_hidden_layers"]):
        for ours, theirs in OF_LAYER.items():
            kinds = ("weight", "bias") if c["biased"] and "ln_" not in ours else ("weight",)
            for kind in kinds:
                parts = [part(f"model.layers.{layer}.{name}", kind) for name in theirs]
                out[f"transformer.h.{layer}.{ours}.{kind}"] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return out


# -------------------------------------------------- the other way -------------------------------------------

# flags that may have any value in a model that is one of Llama's; pos, norm and act say that it is one
SAME = ("block_size", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "dropout", "bias", "norm",
        "norm_eps", "pos", "rope_theta", *LLAMA_3.values(), "act", "mlp_units", "tie_weights", "recompute",
        "screen", "zero_init", "sr_ste", "loss_chunks")


def is_llama(config):
    """Is a GPTConfig's equation, but for mechanisms that are on, Llama's?"""
    return (config.norm, config.pos, config.act) == ("rmsnorm", "rope", "swiglu")


def to_hf(model):
    """A model of is_llama without a mechanism -> (state dict, config) of transformers' LlamaForCausalLM with
    the same logits."""
    c, ours = model.config, model.state_dict()
    width, kv = c.heads()[1], c.kv_heads() * c.heads()[1]
    sizes = {"attn.c_attn": (c.n_embd, kv, kv), "mlp.c_fc": (c.units(), c.units())}
    weights = {f"{theirs}.weight": ours[f"{name}.weight"] for name, theirs in OUTSIDE.items()}
    if c.tie_weights:
        weights.pop("lm_head.weight")
    for layer in range(c.n_layer):
        for name, theirs in OF_LAYER.items():
            for kind in ("weight", "bias"):
                tensor = ours.get(f"transformer.h.{layer}.{name}.{kind}")
                parts = () if tensor is None else tensor.split(sizes.get(name, len(tensor)))
                for one, rows in zip(theirs, parts):
                    weights[f"model.layers.{layer}.{one}.{kind}"] = (
                        swapped(rows, width) if one in TURNED else rows)
    scaled = {theirs: getattr(c, name) for theirs, name in LLAMA_3.items()} if c.rope_factor else {}
    return weights, {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": c.vocab_size,
                     "hidden_size": c.n_embd, "intermediate_size": c.units(), "num_hidden_layers": c.n_layer,
                     "num_attention_heads": c.n_head, "num_key_value_heads": c.kv_heads(), "head_dim": width,
                     "hidden_act": "silu", "max_position_embeddings": c.block_size,
                     "rms_norm_eps": c.norm_eps or 1e-6, "rope_theta": c.rope_theta,
                     "rope_scaling": {"rope_type": "llama3"} | scaled if scaled else None,
                     "tie_word_embeddings": c.tie_weights, "attention_bias": c.bias, "mlp_bias": c.bias,
                     "bos_token_id": None, "eos_token_id": None}
