"""The arms that are trained beside their dense twin: the table of blocks by their flags."""
import shutil
import statistics

from benchmarks.broken import BREAK
from benchmarks.record import TWIN
from benchmarks.runs import trained_with
from benchmarks.timing import spread
from configurator import require

WINDOW = dict(window=64, window_pattern="SSSL")
ARMS = {                                         # a file in config/, keys, or both
    TWIN: {}, "3 layers": dict(n_layer=3), "2 layers": dict(n_layer=2), "1 layer": dict(n_layer=1),
    "96 wide": dict(n_embd=96, n_head=3), "64 wide": dict(n_embd=64, n_head=2),
    "dense/4": dict(mlp_units=128), "dense/2": dict(mlp_units=256), "gelu": dict(act="gelu"),
    "osc": "bio_osc", "topk": "bio_topk", "predict": "bio_predict", "winners": "bio_winners",
    "event": "bio_event",
    "columns": "bio_columns", "columns*2": ("bio_columns", dict(mlp_units=960)),
    "columns*4": ("bio_columns", dict(mlp_units=1920)),
    "dendrites": "bio_dendrites", "experts": "bio_experts", "window": "bio_window",
    "branches": "bio_branches", "branches1": ("bio_branches", dict(dendrites_active=1)),
    "branches4": ("bio_branches", dict(dendrites_active=4)), "hierarchy": "bio_hierarchy",
    "exits": dict(exits="2", layer_dropout=0.1), "ponder": "bio_ponder", "2:4": dict(weights="2:4"),
    "attn_topk": dict(attn_topk=0.5),
    # combinations
    "predict+window": ("bio_predict", WINDOW),
    "columns+window+2:4": ("bio_columns", dict(weights="2:4") | WINDOW),
    "hierarchy+predict": ("bio_predict", dict(hierarchy=4)), "osc+window": ("bio_osc", WINDOW),
    "efficient": "efficient", "quality": "quality",
    # broken on purpose, see broken.py
    "leaky": {}, "slow": "bio_topk"}

# plain models, the rivals of every other arm
DENSE = TWIN, "3 layers", "2 layers", "1 layer", "96 wide", "64 wide", "dense/4", "dense/2", "gelu"
# what the table leaves out unless it is named
OTHERS = "columns*2", "columns*4", "branches1", "branches4", *BREAK

# the presets and their parts at GPT-2's shape, where a decode step is bytes and not calls
SHAPED = {
    "2:4": dict(weights="2:4"),
    "screened head": dict(screen=True),
    "efficient": dict(mlp_topk=0.1, mlp_predict=64, mlp_active=0.2, weights="2:4", window=128, screen=True),
    "columns + 2:4 + window 128": dict(columns=32, columns_active=3, weights="2:4", window=128, screen=True),
    "efficient + hierarchy 4": dict(mlp_topk=0.1, mlp_predict=64, mlp_active=0.2, weights="2:4", window=128,
                                    hierarchy=4, screen=True),
    "columns + 2:4 + hierarchy 4": dict(columns=32, columns_active=3, weights="2:4", hierarchy=4,
                                        screen=True),
    "columns + a quarter of attention": dict(columns=32, columns_active=3, attn_topk=0.25, screen=True)}


def check_arms(cfg):
    """The key `arms`, by commas."""
    unknown = [name for name in cfg.arms.split(",") if name and name not in (*ARMS, "broken")]
    require(not unknown, f"arms='{cfg.arms}': {unknown[:1]} must be among broken, {', '.join(ARMS)}")


def chosen_arms(cfg):
    """The arms that `arms` names, without it all but OTHERS; `broken` names those that are."""
    named = [name for name in cfg.arms.split(",") if name]
    named = [arm for name in named for arm in (BREAK if name == "broken" else [name])]
    return named or [arm for arm in ARMS if arm not in OTHERS]


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
    """An arm's config files, and its keys."""
    flags = ARMS[arm]
    if not isinstance(flags, tuple):
        flags = (flags, {}) if isinstance(flags, str) else ("", flags)
    return [f"config/{flags[0]}.py"] * bool(flags[0]), flags[1]


def trained(cfg, data, out_dir, arm, seed, iters, **more):
    """Train one arm with one seed in a process of its own -> the rows of its metrics."""
    files, flags = parts(arm)
    more |= dict(eval_interval=50, eval_iters=1) if arm.startswith("branches") else {}     # for the plot
    return trained_with(cfg, data, out_dir, files, flags, seed, iters or cfg.iters,
                        broken=arm if arm in BREAK else None, **more)


def described(model, rows):
    """What a run's record says of its model: sizes, flags, and what its blocks did at the end."""
    return {"iters": rows[-1]["iter"], "parameters": model.get_num_params(),
            "model_args": model.config.model_args(),
            "counters": {k: v for k, v in rows[-1].items() if k.startswith(COUNTED)}}


COUNTED = ("dead", "active", "open", "zeros", "recall", "mlp", "attn", "layers", "ponder")
