"""Blocks switched on in a dense model that exists, beside that model trained on as long."""
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ROOT, Recipe
from benchmarks.arms import ARMS, key_defaults, keys_of, parts, settings
from benchmarks.record import TWIN
from benchmarks.runs import QUALITY_VALIDATION, fixed_loss, losses_of, seeds, trained_with, validation_of
from configurator import require
from data import dataset as datasets
from decode import calibrate
from model import build_model
from training import checkpoint
from training import retrofit as retrofitting

SCREENED = "screened units"
CHOSEN = ("topk", "predict", SCREENED, "winners", "event", "window", "exits", "ponder", "columns", "experts",
          "2:4", "attn_topk", "osc", "hierarchy")
TAUGHT = ", taught"                              # of a side that learns from the dense model as well
EVALUATED = 80                                   # batches of the losses before the first step


@dataclass(frozen=True)
class Retrofit(Recipe):
    """Blocks switched on in one dense model: its loss untouched and after some iterations, with a teacher."""
    repeats: int = 3  # seeds of each retrofit; the dense model is the same for all
    threads: int = 1  # CPU threads of a run
    jobs: int = 1  # runs at a time
    parent: str = ""  # the dense run that all begin from; empty: one is trained by the recipe
    dataset: str = "pylib"  # the data of all of them
    more: int = 250  # iterations of each retrofit, and of the dense model beside them
    rate: float = retrofitting.RATE  # their highest learning rates, as a share of the recipe's
    arms: str = ""  # some of the blocks, by commas; empty: all that keep the dense model's weights
    teacher: bool = True  # train each of them also with the dense model as its teacher

    def __post_init__(self):
        super().__post_init__()
        unknown = [arm for arm in self.arms.split(",") if arm and arm not in (*ARMS, SCREENED)]
        require(not unknown, f"arms='{self.arms}': {unknown[:1]} must be among {', '.join(CHOSEN)}")
        for key in ("more", "jobs"):
            require(getattr(self, key) >= 1, f"{key}={getattr(self, key)} must be at least 1")
        require(self.rate > 0, f"rate={self.rate} must be above 0: a share of the recipe's learning rates")


def retrofit(cfg):
    data = datasets.prepare_if_missing(cfg.dataset).resolve()
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(cfg.jobs) as pool:
        work = Path(work)
        parent = Path(cfg.parent).resolve() if cfg.parent else work / "dense"
        if not cfg.parent:
            trained_with(cfg, data, parent, [], {}, 0, cfg.iters)
        sides = [TWIN] + [arm + taught for arm in chosen(cfg) for taught in ("", TAUGHT)[:1 + cfg.teacher]]
        todo = [(side, seed) for seed in range(cfg.repeats) for side in sides]
        done = list(pool.map(lambda job: retrofit_run(cfg, data, work, parent, *job), todo))
        dense = judged(parent, data)
    runs = {side: [run for (other, _), run in zip(todo, done) if other == side] for side in sides}
    losses = losses_of(runs)
    show(cfg, dense, runs)
    return {"measurements": {"val loss": losses}, "dense": dense, "validation": QUALITY_VALIDATION,
            "seeds": seeds(cfg), "runs": runs}


def chosen(cfg):
    return list(dict.fromkeys(arm for arm in cfg.arms.split(",") if arm)) or list(CHOSEN)


def recipe_of(cfg):
    """All keys of train.py as the recipe sets them."""
    return key_defaults() | keys_of(*(str(ROOT / file) for file in cfg.config.split(",")))


def words_of(arm):
    """An arm's config files and its keys."""
    return ([], {}) if arm == TWIN else ([], dict(mlp_screen=4)) if arm == SCREENED else parts(arm)


def beside_twins(cfg):
    """(flags, flags of the dense model beside it) of every block."""
    twin = settings(cfg.config, TWIN)
    return [(twin | dict(mlp_screen=4) if arm == SCREENED else settings(cfg.config, arm), twin)
            for arm in CHOSEN]


def retrofit_run(cfg, data, work, parent, side, seed):
    """Train one block on from the dense model -> its losses."""
    arm, recipe = side.removesuffix(TAUGHT), recipe_of(cfg)
    files, flags = words_of(arm)
    slower = {key: cfg.rate * recipe[key] for key in ("learning_rate", "muon_learning_rate", "min_lr")}
    taught = {"teacher": parent} if side != arm else {}
    out_dir = work / f"{side}-{seed}".replace(":", "-")
    trained_with(cfg, data, out_dir, files, flags | slower | taught, seed, cfg.more, init_from=parent,
                 eval_iters=EVALUATED)
    found = judged(out_dir, data)
    print(f"seed {seed}, {side}: val loss {found['val_loss']:.4f}", file=sys.stderr, flush=True)
    return found


def judged(out_dir, data):
    """A run's validation loss, with its decoding shortcuts as well, and those of before its first step."""
    loaded, path = checkpoint.read(out_dir)
    model = build_model(loaded, path).eval()
    validation = validation_of(model)
    found = {"iters": loaded["iter_num"], "val_loss": fixed_loss(model, data, validation),
             "parameters": model.get_num_params(), "model_args": model.config.model_args()}
    began = loaded.get("parent") or {}
    if "untouched" in began:
        found["untouched"] = began["untouched"] - began["val_loss"]
    if model.config.mlp_predict or model.config.mlp_screen or model.config.exits:
        if calibrate.screened(model):
            rows = max(1, retrofitting.TOKENS // validation["block_size"])
            ids, _ = datasets.TokenStream(data, "train", validation["block_size"], rows, seed=0).batch(0)
            calibrate.calibrate(model, ids, model.config.mlp_live)
        found["decoding"] = fixed_loss(model.use_policy(), data, validation)
    return found


def show(cfg, dense, runs):
    """The table, for people."""
    on = statistics.fmean(run["val_loss"] for run in runs[TWIN])
    print(f"the dense model: val loss {dense['val_loss']:.4f} after {dense['iters']} iterations, {on:.4f} "
          f"after {cfg.more} more (" + (f"means of {cfg.repeats} seeds)" if cfg.repeats > 1 else "one seed)"))
    print(f"{'block':16}{'untouched':>11}{'after ' + str(cfg.more):>14}{'to dense':>10}{'with a teacher':>16}"
          f"{'as it decodes':>15}")
    for side, found in runs.items():
        if side == TWIN or side.endswith(TAUGHT):
            continue
        mean = statistics.fmean(run["val_loss"] for run in found)
        taught = [run["val_loss"] for run in runs.get(side + TAUGHT, ())]
        began = f"{found[0]['untouched']:+.4f}" if "untouched" in found[0] else "as it was"
        decoded = [run["decoding"] for run in found if "decoding" in run]
        print(f"{side:16}{began:>11}{mean:>14.4f}{mean - on:>+10.4f}"
              f"{f'{statistics.fmean(taught) - on:+.4f}' if taught else '':>16}"
              f"{f'{statistics.fmean(decoded):.4f}' if decoded else '':>15}".rstrip())
