"""The arms that are trained beside their dense twin: the table of blocks by their flags."""
import shutil
import statistics

from benchmarks.record import TWIN
from benchmarks.runs import trained_with
from benchmarks.timing import spread
from configurator import require

ARMS = {                                         # a file in config/, keys, or both
    TWIN: {}, "dense/4": dict(mlp_units=128), "dense/2": dict(mlp_units=256), "gelu": dict(act="gelu"),
    "osc": "bio_osc", "predict": "bio_predict", "winners": "bio_winners", "event": "bio_event",
    "columns": "bio_columns", "columns*2": ("bio_columns", dict(mlp_units=960)),
    "columns*4": ("bio_columns", dict(mlp_units=1920)),
    "dendrites": "bio_dendrites", "experts": "bio_experts", "window": "bio_window",
    "branches": "bio_branches", "branches1": ("bio_branches", dict(dendrites_active=1)),
    "branches4": ("bio_branches", dict(dendrites_active=4)), "hierarchy": "bio_hierarchy"}


def check_arms(cfg):
    """The key `arms`, by commas."""
    unknown = [name for name in cfg.arms.split(",") if name and name not in ARMS]
    require(not unknown, f"arms='{cfg.arms}': {unknown[:1]} must be among {', '.join(ARMS)}")


def chosen_arms(cfg):
    return [name for name in cfg.arms.split(",") if name] or list(ARMS)


def steps_alone(cfg, data, work, arms, iters=60):
    """Milliseconds of a training step of every arm, in short runs one after the other, in turns."""
    ms = {arm: [] for arm in arms}
    for _ in range(cfg.repeats):
        for arm in arms:
            rows = trained(cfg, data, work / "alone", arm, 0, iters)
            ms[arm].append(statistics.median(row["ms"] for row in rows[10:] if "ms" in row))
            shutil.rmtree(work / "alone")
    return {arm: spread(values) for arm, values in ms.items()}


def trained(cfg, data, out_dir, arm, seed, iters):
    """Train one arm with one seed in a process of its own -> the rows of its metrics."""
    flags = ARMS[arm]
    if not isinstance(flags, tuple):
        flags = (flags, {}) if isinstance(flags, str) else ("", flags)
    file, flags = flags
    more = dict(eval_interval=50, eval_iters=1) if arm.startswith("branches") else {}      # for the plot
    return trained_with(cfg, data, out_dir, [f"config/{file}.py"] * bool(file), flags, seed,
                        iters or cfg.iters, **more)
