"""The arms that are trained beside their dense twin: the table of blocks by their flags, and what the dense
twin of any of them is."""
import ast
import dataclasses
import shutil
import statistics
import sys
from functools import cache
from pathlib import Path

from benchmarks import ROOT
from benchmarks.broken import BREAK
from benchmarks.record import TWIN
from benchmarks.runs import trained_with
from benchmarks.timing import spread
from configurator import parse, require
from model import GPTConfig

BASE = dict(act="relu2")                         # of every arm without an activation of its own, and its twin
WINDOW = dict(window=64, window_pattern="SSSL")
ARMS = {                                         # a file in config/, keys, or both
    TWIN: {}, "3 layers": dict(n_layer=3), "2 layers": dict(n_layer=2), "1 layer": dict(n_layer=1),
    "96 wide": dict(n_embd=96, n_head=3), "64 wide": dict(n_embd=64, n_head=2),
    "dense/4": dict(mlp_units=128), "dense/2": dict(mlp_units=256), "gelu": dict(act="gelu"),
    "osc": "bio_osc", "topk": "bio_topk", "predict": "bio_predict", "winners": "bio_winners",
    "event": "bio_event",
    "columns": "bio_columns", "columns*2": ("bio_columns", dict(mlp_units=960)),
    "columns*4": ("bio_columns", dict(mlp_units=1920)),
    "compartments": "bio_compartments", "experts": "bio_experts", "window": "bio_window",
    "dendrites": "bio_dendrites", "dendrites1": ("bio_dendrites", dict(dendrites_active=1)),
    "dendrites4": ("bio_dendrites", dict(dendrites_active=4)), "hierarchy": "bio_hierarchy",
    "exits": dict(exits="2", layer_dropout=0.1), "ponder": "bio_ponder", "2:4": dict(weights="2:4"),
    "attn_topk": dict(attn_topk=0.5),
    # combinations
    "predict+window": ("bio_predict", WINDOW),
    "columns+window+2:4": ("bio_columns", dict(weights="2:4") | WINDOW),
    "hierarchy+predict": ("bio_predict", dict(hierarchy=4)), "osc+window": ("bio_osc", WINDOW),
    "efficient": "efficient", "lossless": "lossless", "quality": "quality",
    # broken on purpose, see broken.py
    "leaky": {}, "slow": "bio_topk"}

# plain models, the rivals of every other arm
DENSE = TWIN, "3 layers", "2 layers", "1 layer", "96 wide", "64 wide", "dense/4", "dense/2", "gelu"
# what the table leaves out unless it is named
OTHERS = "columns*2", "columns*4", "dendrites1", "dendrites4", *BREAK

# the presets and their parts, behind BASE, at GPT-2's shape, where a decode step is bytes and not calls
SHAPED = {
    "2:4": dict(weights="2:4"),
    "screened head": dict(screen=True),
    "efficient": dict(mlp_screen=4, mlp_live=0.1, window=128, screen=True),
    "screened + 2:4 + window 128": dict(mlp_screen=4, mlp_live=0.1, weights="2:4", window=128, screen=True),
    "columns + 2:4 + window 128": dict(columns=32, columns_active=3, weights="2:4", window=128, screen=True),
    "efficient + hierarchy 4": dict(mlp_screen=4, mlp_live=0.1, window=128, hierarchy=4, screen=True),
    "columns + 2:4 + hierarchy 4": dict(columns=32, columns_active=3, weights="2:4", hierarchy=4,
                                        screen=True),
    "columns + a quarter of attention": dict(columns=32, columns_active=3, attn_topk=0.25, screen=True)}


def check_arms(cfg):
    """The key `arms`, by commas."""
    unknown = [name for name in cfg.arms.split(",") if name and name not in (*ARMS, "broken")]
    require(not unknown, f"arms='{cfg.arms}': {unknown[:1]} must be among broken, {', '.join(ARMS)}")


def chosen_arms(cfg):
    """The arms that `arms` names, without it all but OTHERS; `broken` names those that are. An arm that is
    the model of one before it is left out: same_models tells which."""
    named = named_arms(cfg)
    same = same_models(cfg.config, named)
    for arm, first in same.items():
        print(f"{arm} is the same model as {first}: measured once", file=sys.stderr)
    return [arm for arm in named if arm not in same]


def named_arms(cfg):
    named = [name for name in cfg.arms.split(",") if name]
    named = [arm for name in named for arm in (BREAK if name == "broken" else [name])]
    return list(dict.fromkeys(named or [arm for arm in ARMS if arm not in OTHERS]))


def same_models(recipe, arms):
    """{arm: the arm before it that is the same model, found by their flags}."""
    first, same = {}, {}
    for arm in arms:
        key = repr((sorted(settings(recipe, arm).items()), arm * (arm in BREAK)))
        if first.setdefault(key, arm) != arm:
            same[arm] = first[key]
    return same


# -------------------------------------------------- settings and dense twins --------------------------------

# flags of GPTConfig that both sides of a comparison share, shape and switches; the others are a mechanism's
SHARED = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "norm", "pos",
          "n_kv_head", "rope_theta", "rope_factor", "rope_low", "rope_high", "rope_original", "norm_eps",
          "qk_norm", "qk_gain", "act", "softcap", "zero_init", "tie_weights", "ngram_buckets", "ngram_order",
          "recompute", "loss_chunks", "mlp_units"}
# {mechanism's flag: what its arm sizes too, so that it holds about as many weights as the twin}
SIZED = {"columns": "mlp_units", "mlp_predict": "mlp_units", "dendrites": "n_head"}
# train.py's keys that belong to a mechanism
TRAINED = {"anneal", "grow", "tasks", "ewc", "ewc_samples", "replay", "replay_blocks", "freeze"}
# its keys that decide no number of a run; iterations and seed are told apart, data by their content
APART = {"out_dir", "dataset", "eval_interval", "eval_iters", "log_interval", "always_save_checkpoint",
         "keep_checkpoints", "wandb_log", "wandb_project", "wandb_run_name", "max_iters", "lr_decay_iters",
         "seed", "device"}


def owned(flags):
    """Which keys of `flags` are a mechanism's: its flags, what it sizes, an activation that is one."""
    found = {key for key in flags if key in TRAINED | (model_defaults().keys() - SHARED)}
    found |= {SIZED[key] for key in found & SIZED.keys()}
    return found | ({"act"} if flags.get("act") == "osc" else set())


def twin_of(flags, shape=None):
    """The flags of a model's dense twin: `flags` without the mechanism's. What the mechanism sizes is as in
    `shape` (or GPTConfig's default), and an activation that is a mechanism becomes BASE's."""
    own, shape = owned(flags), (shape or {})
    kept = {key: value for key, value in flags.items() if key not in own}
    return {key: shape[key] for key in own & shape.keys() & SHARED} | kept | (BASE if "act" in own else {})


def unfair(flags, twin):
    """The keys in which a model and the dense model beside it differ although no mechanism owns them."""
    other = {key for key in flags.keys() | twin.keys() if flags.get(key, twin_default(key))
             != twin.get(key, twin_default(key))}
    return other - owned(flags)


def twin_default(key):
    return key_defaults().get(key)


@cache
def model_defaults():
    return {field.name: field.default for field in dataclasses.fields(GPTConfig)}


@cache
def key_defaults():
    """{key: default} of train.py, which is a script and cannot be imported: its class is read."""
    tree = ast.parse((ROOT / "train.py").read_text(encoding="utf-8"))
    [keys] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainConfig"]
    return model_defaults() | {node.target.id: ast.literal_eval(node.value) for node in keys.body
                               if isinstance(node, ast.AnnAssign)}


@cache
def key_class():
    return dataclasses.make_dataclass("Keys", [(key, bool | int | float | str, default)
                                               for key, default in key_defaults().items()])


def keys_of(*words):
    """{key: value} that config files and --key=value set; read once as long as the files stay as they are."""
    files = [Path(word) for word in words if not word.startswith("--")]
    return parsed(words, tuple(file.read_text(encoding="utf-8") for file in files if file.is_file()))


@cache
def parsed(words, texts):
    return parse(key_class(), words, files=True)


def settings(recipe, arm):
    """What a run of an arm is trained with: the keys that are not train.py's defaults -> {key: value}.

    recipe: config files by commas. Without APART, so that two arms with equal settings are one model.
    """
    files, flags = parts(arm)
    words = [str(ROOT / file) for file in [*recipe.split(","), *files]]
    given = keys_of(*words, *(f"--{key}={value}" for key, value in flags.items()))
    given = {key: kind(value) if (kind := type(key_defaults()[key])) in (float, str) else value
             for key, value in given.items() if key not in APART}
    return {key: value for key, value in sorted(given.items()) if value != key_defaults()[key]}


def beside_twins(cfg):
    """(flags, flags of the dense model beside it) of every arm that a table, quality or steps compares."""
    return [(settings(cfg.config, arm), settings(cfg.config, TWIN)) for arm in ARMS
            if arm not in (*DENSE, *BREAK)]


def steps_alone(cfg, data, work, arms, iters=60):
    """Milliseconds of a training step of every arm, in short runs one after the other, in turns."""
    ms = {arm: [] for arm in arms}
    for _ in range(cfg.repeats):
        for arm in arms:
            rows = trained(cfg, data, work / "alone", arm, 0, iters)
            ms[arm].append(statistics.median(row["ms"] for row in rows[10:] if "ms" in row))
            shutil.rmtree(work / "alone")
    return {arm: spread(values) for arm, values in ms.items()}


def parts(arm):
    """An arm's config files, and its keys. Its activation is BASE's, whatever the recipe's is, unless it has
    one of its own: so is the twin's."""
    flags = ARMS[arm]
    if not isinstance(flags, tuple):
        flags = (flags, {}) if isinstance(flags, str) else ("", flags)
    files = [f"config/{flags[0]}.py"] * bool(flags[0])
    own = keys_of(*(str(ROOT / file) for file in files)) | flags[1]
    return files, (flags[1] if "act" in own else BASE | flags[1])


def trained(cfg, data, out_dir, arm, seed, iters, **more):
    """Train one arm with one seed in a process of its own -> the rows of its metrics."""
    files, flags = parts(arm)
    more |= dict(eval_interval=50, eval_iters=1) if arm.startswith("dendrites") else {}     # for the plot
    return trained_with(cfg, data, out_dir, files, flags, seed, iters or cfg.iters,
                        broken=arm if arm in BREAK else None, **more)


def described(model, rows):
    """What a run's record says of its model: sizes, flags, and what its blocks did at the end."""
    return {"iters": rows[-1]["iter"], "parameters": model.get_num_params(),
            "model_args": model.config.model_args(),
            "counters": {k: v for k, v in rows[-1].items() if k.startswith(COUNTED)}}


COUNTED = ("dead", "active", "open", "zeros", "recall", "mlp", "attn", "layers", "ponder")
