"""Blocks switched on in a dense model that exists, beside that model trained on as long."""
import contextlib
import json
import os
import shutil
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from benchmarks import ROOT, Recipe
from benchmarks.arms import APART, ARMS, DENSE, key_defaults, keys_of, parts, settings
from benchmarks.compare import Compare, compare
from benchmarks.record import TAUGHT, TWIN, write_atomically
from benchmarks.runs import QUALITY_VALIDATION, fixed_loss, losses_of, seeds, trained_with, validation_of
from benchmarks.store import digest, golden_of, hash_of_data
from configurator import ConfigError, require
from data import dataset as datasets
from decode import calibrate
from decode.quantized import check_quantize, kinds_in
from model import build_model
from training import checkpoint, rundir, runtime
from training import retrofit as retrofitting
from viz.figures import drawing, name_points, pyplot

SCREENED = "screened units"
CHOSEN = ("dense/2", "dense/4", "topk", "predict", SCREENED, "winners", "event", "window", "exits",
          "ponder", "columns", "experts", "2:4", "attn_topk", "osc", "hierarchy")
EVALUATED = 80                                   # batches of the losses before the first step
FOUND = "found.json"                             # in the folder of a run that has ended, what it has found


@dataclass(frozen=True)
class Retrofit(Recipe):
    """Blocks switched on in a dense model: loss untouched, trained on, with a teacher; decode speed."""
    repeats: int = 3  # seeds of each retrofit; the dense model is the same for all
    threads: int = 1  # CPU threads of a run, and of what is timed
    jobs: int = 1  # runs at a time; decode steps are timed alone
    parent: str = ""  # the dense run that all begin from; empty: one is trained by the recipe
    dataset: str = "pylib"  # the data of all of them
    more: int = 250  # iterations of each retrofit, and of the dense model beside them
    rate: float = retrofitting.RATE  # their highest learning rates, as a share of the recipe's
    arms: str = ""  # some of the blocks, by commas; empty: all that keep the dense model's weights
    teacher: bool = True  # train each of them, the dense one too, also with the dense model as its teacher
    decode: bool = True  # then time how the first seed's models decode, in turns: bench.py compare
    quantize: str = "int8"  # these times also with weights in whole numbers, as bench.py compare; empty: not
    dtype: str = "auto"  # of the weights that are timed: auto, float32, bfloat16, float16
    plot: str = ""  # also draw the losses against these times into this PNG (needs matplotlib)
    runs: str = "out-retrofits"  # folder where finished runs are kept, and found again

    def __post_init__(self):
        super().__post_init__()
        unknown = [arm for arm in self.arms.split(",") if arm and arm not in (*ARMS, SCREENED)]
        require(not unknown, f"arms='{self.arms}': {unknown[:1]} must be among {', '.join(CHOSEN)}")
        for key in ("more", "jobs"):
            require(getattr(self, key) >= 1, f"{key}={getattr(self, key)} must be at least 1")
        for kind in kinds_in(self.quantize):
            check_quantize(kind, smaller=True)
            require("own" not in kind, f"quantize='{kind}' keeps the bits of a file, and these models are "
                    "trained: take --quantize=int8, or int4")
        require(not self.plot or (self.decode and os.path.isdir(Path(self.plot).parent)), f"plot="
                f"'{self.plot}' needs a folder that exists, and times: leave --decode=False out")
        require(self.decode or (self.quantize, self.dtype) == (type(self).quantize, type(self).dtype),
                f"quantize='{self.quantize}' and dtype='{self.dtype}' are of what is timed, which "
                "--decode=False leaves out: leave one of them out")
        require(self.rate > 0, f"rate={self.rate} must be above 0: a share of the recipe's learning rates")


def retrofit(cfg):
    if cfg.decode:
        runtime.choose("cpu", cfg.dtype, False, decodes=True)          # what is wrong is better said now
    if cfg.plot:
        pyplot()                                 # better missed now than in an hour
    runs = Runs(cfg, datasets.prepare_if_missing(cfg.dataset).resolve())
    print(f"finished runs are kept in {runs.place}: the same command goes on", file=sys.stderr, flush=True)
    dense = runs.dense()
    sides = [arm + taught for arm in (TWIN, *chosen(cfg)) for taught in ("", TAUGHT)[:1 + cfg.teacher]]
    todo = [(side, seed) for seed in range(cfg.repeats) for side in sides]
    with ThreadPoolExecutor(cfg.jobs) as pool:
        done = list(pool.map(lambda job: runs.found(*job), todo))
    found = {side: [run for (other, _), run in zip(todo, done) if other == side] for side in sides}
    losses = losses_of(found)
    show(cfg, dense, found)
    decode = decoded(cfg, runs, [side for side in sides if not side.endswith(TAUGHT)]) if cfg.decode else {}
    if cfg.plot:
        draw(cfg, found, decode)
    recipe = recipe_of(cfg)
    tokens = recipe["batch_size"] * recipe["block_size"] * recipe["gradient_accumulation_steps"]
    return {"measurements": {"val loss": losses} | decode.get("measurements", {}), "dense": dense,
            "validation": QUALITY_VALIDATION, "seeds": seeds(cfg), "runs": found, "tokens": tokens,
            "decode": decode.get("runs", {}), "place": decode.get("place")}


def decoded(cfg, runs, sides):
    """How the first seed's models decode, as sample.py does with their shortcuts -> compare's record, its
    sides called as here, "dense, int8" for the dense model in 8 bits."""
    kinds = ("", *(f", {kind}" for kind in kinds_in(cfg.quantize)))
    folders = {runs.folder(side, 0).name + kind: side + kind for side in sides for kind in kinds}
    words = tuple(str(runs.place / runs.folder(side, 0).name) for side in sides)
    found = compare(Compare(runs=words, dataset=str(runs.data), threads=cfg.threads, quantize=cfg.quantize,
                            temperature=0.0, sparse_decode=True, device="cpu", dtype=cfg.dtype))
    timed = found["measurements"]["decode"]
    timed = timed | {key: {folders[name]: value for name, value in timed[key].items()}
                     for key in ("sides", "ratio") if key in timed}
    return found | {"measurements": {"decode": timed},
                    "runs": {folders[name]: said for name, said in found["runs"].items()}}


def draw(cfg, found, decode):
    """Every model's loss as it decodes, taught where that was trained, against the time of a token: seeds'
    range; a line leads to the same model in whole numbers, whose change of loss is the first seed's."""
    timed, kinds, points = decode["measurements"]["decode"]["sides"], kinds_in(cfg.quantize), []
    ms = {side: 1e3 / s["median"] for side, s in timed.items()}
    with drawing(cfg.plot, size=(8, 5)) as axis:
        for arm in (TWIN, *chosen(cfg)):
            losses = [run.get("decoding", run["val_loss"]) for run in found.get(arm + TAUGHT, found[arm])]
            loss = statistics.fmean(losses)
            bars = axis.errorbar([ms[arm]], [loss], [[loss - min(losses)], [max(losses) - loss]], fmt="o",
                                 markersize=5, capsize=2, elinewidth=0.8)
            points.append((arm, ms[arm], loss))
            for whole in (f"{arm}, {kind}" for kind in kinds):
                change = decode["runs"][whole]["loss"] - decode["runs"][arm]["loss"]
                axis.plot([ms[arm], ms[whole]], [loss, loss + change], "-s", color=bars[0].get_color(),
                          lw=0.5, markersize=4, mfc="none", markevery=[1])
        axis.set(xlabel="ms a decoded token, batch 1", ylabel="validation loss as it decodes, nats")
        axis.set_title(f"filled: {decode['place']}; hollow: {', '.join(kinds)}" if kinds else "", fontsize=8)
        axis.margins(0.1)
        name_points(axis, points)


def chosen(cfg):
    return list(dict.fromkeys(arm for arm in cfg.arms.split(",") if arm)) or list(CHOSEN)


def recipe_of(cfg):
    """All keys of train.py as the recipe sets them."""
    return key_defaults() | keys_of(*(str(ROOT / file) for file in cfg.config.split(",")))


def words_of(arm):
    """An arm's config files and its keys."""
    return ([], {}) if arm == TWIN else ([], dict(mlp_screen=4)) if arm == SCREENED else parts(arm)


def settings_of(cfg, arm):
    """What a run of an arm is trained with beside train.py's defaults -> {key: value}."""
    return (settings(cfg.config, TWIN) | dict(mlp_screen=4) if arm == SCREENED else settings(cfg.config, arm))


def beside_twins(cfg):
    """(flags, flags of the dense model beside it) of every block."""
    return [(settings_of(cfg, arm), settings(cfg.config, TWIN)) for arm in CHOSEN if arm not in DENSE]


class Runs:
    """The dense model and the runs that go on from it, each in a folder whose name ends with a hash of what
    decides its numbers: settings, iterations, seed, data, torch, the parent, and the golden curves of its
    parts. A folder that is there is whole; of other seeds than the first the weights are not kept."""

    def __init__(self, cfg, data):
        self.cfg, self.data, self.place = cfg, data, Path(cfg.runs).resolve()
        try:
            self.place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"runs={cfg.runs} cannot be made ({error.strerror}): name another folder"
                              ) from error
        self.common = [hash_of_data(data), torch.__version__.partition("+")[0], QUALITY_VALIDATION, EVALUATED]

    @cached_property
    def parent(self):
        """The folder of the dense model, which is trained where none is named."""
        if self.cfg.parent:
            return Path(self.cfg.parent).resolve()
        key = digest([*self.common, settings(self.cfg.config, TWIN), self.iters])
        place = self.place / f"parent-1337-{key}"
        self.keep(place, lambda folder: trained_with(self.cfg, self.data, folder, [], {}, 0, self.cfg.iters))
        return place

    @property
    def iters(self):
        return self.cfg.iters or recipe_of(self.cfg)["max_iters"]

    def dense(self):
        """What is found of the dense model."""
        return judged(self.parent, self.data)

    @cached_property
    def sha_of_parent(self):
        return retrofitting.sha_of(checkpoint.read(self.parent)[1])

    def keys(self, side):
        """Keys of train.py that a run has beside its recipe's."""
        arm, recipe = side.removesuffix(TAUGHT), recipe_of(self.cfg)
        rates = "learning_rate", "muon_learning_rate", "min_lr"
        slower = {key: self.cfg.rate * recipe[key] for key in rates}
        return words_of(arm)[1] | slower | ({"teacher": self.parent} if side != arm else {})

    def folder(self, side, seed):
        arm = side.removesuffix(TAUGHT)
        keys = {key: value for key, value in self.keys(side).items() if key != "teacher"}
        said = {key: value for key, value in (settings_of(self.cfg, arm) | keys).items() if key not in APART}
        key = digest([*self.common, said, golden_of(said), side != arm, self.sha_of_parent, seed,
                      self.cfg.more])
        name = "".join(c if c.isalnum() else "-" for c in side)
        return self.place / f"{name}-{1337 + seed}-{key}"

    def found(self, side, seed):
        """What is found of one block trained on from the dense model; it is trained where that is missing."""
        place, again = self.folder(side, seed), True
        if not (place / FOUND).is_file():
            self.keep(place, lambda folder: self.train(folder, side, seed))
            again = False
        found = json.loads((place / FOUND).read_text(encoding="utf-8"))
        print(f"seed {seed}, {side}: val loss {found['val_loss']:.4f}" + ", kept" * again, file=sys.stderr,
              flush=True)
        return found

    def train(self, folder, side, seed):
        files, _ = words_of(side.removesuffix(TAUGHT))
        trained_with(self.cfg, self.data, folder, files, self.keys(side), seed, self.cfg.more,
                     init_from=self.parent, eval_iters=EVALUATED)
        write_atomically(folder / FOUND, json.dumps(judged(folder, self.data)) + "\n")
        for path in folder.glob("ckpt*.pt") if seed or side.endswith(TAUGHT) else ():
            path.unlink()

    def keep(self, place, make):
        """Let `make` fill a folder that then becomes `place`, for one process at a time."""
        work = place.with_name(place.name + ".tmp")
        lock = rundir.take(work, "runs")
        try:
            if not place.is_dir():               # of a process that held it just now
                shutil.rmtree(work / "run", ignore_errors=True)      # of one that was killed
                make(work / "run")
                os.replace(work / "run", place)
        finally:
            lock.release()
        with contextlib.suppress(OSError):       # another process may hold it by now
            work.rmdir()


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
    on, itself = mean_loss(runs[TWIN]), runs.get(TWIN + TAUGHT)
    taught = f", {mean_loss(itself):.4f} with itself as its teacher" if itself else ""
    of = f"means of {cfg.repeats} seeds" if cfg.repeats > 1 else "one seed"
    print(f"the dense model: val loss {dense['val_loss']:.4f} after {dense['iters']} iterations, {on:.4f} "
          f"after {cfg.more} more{taught} ({of})")
    print(f"{'block':16}{'untouched':>11}{'after ' + str(cfg.more):>14}{'to dense':>10}{'with a teacher':>16}"
          f"{'as it decodes':>15}")
    for side, found in runs.items():
        if side.removesuffix(TAUGHT) == TWIN or side.endswith(TAUGHT):
            continue
        mean, taught = mean_loss(found), runs.get(side + TAUGHT)
        began = f"{found[0]['untouched']:+.4f}" if "untouched" in found[0] else "as it was"
        decoded = [run["decoding"] for run in found if "decoding" in run]
        print(f"{side:16}{began:>11}{mean:>14.4f}{mean - on:>+10.4f}"
              f"{f'{mean_loss(taught) - on:+.4f}' if taught else '':>16}"
              f"{f'{statistics.fmean(decoded):.4f}' if decoded else '':>15}".rstrip())


def mean_loss(runs):
    return statistics.fmean(run["val_loss"] for run in runs)
