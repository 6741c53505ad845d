"""Trials of bench.py sparsify: a trained dense model with flags and weight bits, its loss on the same windows
as the dense model's own, what a decode step reads; each is measured once and kept in a file."""
import copy
import dataclasses
import hashlib
import json
import math
import os
import shlex
import statistics
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import sparse_kernels
from benchmarks import ROOT, foreign
from benchmarks.compare import load
from benchmarks.record import write_atomically
from benchmarks.runs import timed_script
from benchmarks.screen import data_of
from benchmarks.settings import AT_SAMPLING
from benchmarks.stats import mean_interval
from configurator import require
from data import dataset as datasets
from decode import calibrate, engine
from decode.context import Cache
from decode.quantized import FORMS, KINDS, OWN, PARTS, has_levels, is_quantized, quantize
from kernels.arena import move_weights
from layers import Packed, TwoOfFour, settle
from model import build_model
from training import checkpoint, pretrained, retrofit
from training.runtime import DTYPES

VERSION = 3                                      # of what a trial's numbers mean; others do not count
COUNTED = 16                                     # steps whose bytes and multiply-adds are counted
LOOKS = 8                                        # times that a trial's loss is looked at, at most
SURE = 0.99                                      # of an interval that ends a trial before its last window
SAME_TENSORS = AT_SAMPLING - {"weights"} | {"mlp_topk_group"}        # and that need no start
RECIPE = ("optimizer", "weight_decay", "beta1", "beta2", "grad_clip", "muon_momentum", "muon_steps",
          "documents", "dropout")                # keys of the run's training that training on takes over
WHOLE = 16, 16, 16                               # bits of layers.PARTS that stay as they are


class Trial(NamedTuple):
    """What is tried: flags of GPTConfig ((key, value), ...) without training, bits of each of layers.PARTS,
    and flags that were switched on before and trained; None: nothing was; (): the dense model trained on."""
    flags: tuple = ()
    bits: tuple = WHOLE
    trained: tuple | None = None

    def __str__(self):
        words = [f"{key}={value}" for key, value in self.flags if value != 0]
        words += [f"quantize={kind_of(self.bits)}"] * (self.bits != WHOLE)
        if self.trained is not None:
            on = ", ".join(f"{key}={value}" for key, value in self.trained) or "dense"
            words.insert(0, f"{on}, trained")
        return ", ".join(words) or "dense"

    def with_(self, flags=(), bits=WHOLE):
        """The same and more; a flag that both set has the other's value."""
        both = dict(self.flags) | dict(flags)
        return self._replace(flags=tuple(both.items()), bits=tuple(map(min, self.bits, bits)))


def kind_of(bits):
    """Bits of each of layers.PARTS as --quantize says them; empty: all stay."""
    named, words = ({form: word for word, form in kinds.items()} for kinds in (KINDS, FORMS))
    return named.get(bits) or ",".join(f"{part}={words[bit]}" for part, bit in zip(PARTS, bits) if bit != 16)


class Found(NamedTuple):
    """Of a trial beside the dense model: the share that it loses, its 95% interval, is that decided?"""
    share: float
    interval: tuple
    decided: bool


class Lab:
    """A dense model, its texts, and the trials that are known of it."""

    def __init__(self, cfg):
        self.cfg, self.dtype = cfg, DTYPES[cfg.dtype]
        self.dense, self.about = load(cfg.out_dir)
        packed = any(isinstance(module, Packed) for module in self.dense.modules())
        require(not packed and not is_quantized(self.dense), f"{cfg.out_dir} holds quantised or packed "
                "weights: name the checkpoint that they were made of")
        c = self.dense.config
        self.folder = data_of(cfg.dataset, self.about)
        count = max(LOOKS, -(-cfg.tokens // c.block_size))
        held_out = datasets.TokenStream(self.folder, "val", c.block_size, 1, 0, c.vocab_size, "epoch")
        some = held_out.samples // 2
        require(some >= 2, f"{self.folder} has {held_out.samples} windows of {c.block_size} held-out tokens, "
                "and four are needed: name other data with --dataset=FOLDER")
        self.count = min(count, some)
        self.search, self.fresh = (held_out.rows(first, self.count) for first in (0, self.count))
        # what sample.py and train.py calibrate on
        self.text = {count: self.training_text(count, seed) for count, seed in (
            (calibrate.AT_LOAD, 0), (retrofit.TOKENS, cfg.seed), (calibrate.TOKENS, 0))}
        self.prompt = min(256, c.block_size // 2)
        where = retrofit.sha_of(checkpoint.read(cfg.out_dir)[1] if not pretrained.is_gpt2(cfg.out_dir)
                                else cfg.out_dir)
        data = datasets.meta_of(self.folder).get("sha256", {}).get("val") or str(self.folder)
        self.key = [VERSION, where, data, c.block_size, cfg.seed, cfg.dtype, self.prompt,
                    torch.__version__.split("+")[0], self.count]
        self.place = Path(cfg.trials) / f"{retrofit.name_of(cfg.out_dir)}-{digest(self.key)[:8]}"
        self.plan, self.records = {}, {}         # iterations and rows of what is trained; known trials
        self.control = None                      # the dense model trained on, once it is the better one

    def training_text(self, count, seed):
        block, vocab = self.dense.config.block_size, self.dense.config.vocab_size
        rows = max(1, count // block)
        return datasets.TokenStream(self.folder, "train", block, rows, seed, vocab).batch(0)[0]

    @property
    def settings(self):
        """Keys of the training that the model comes from; {} where it does not say."""
        found = self.about.get("config")
        return found if isinstance(found, dict) else {}

    def rows_of_old(self):
        """Rows of a batch of that training."""
        return self.settings.get("batch_size", 12) * self.settings.get("gradient_accumulation_steps", 40)

    @cached_property
    def moments(self):
        """Of the dense model's inputs, by which scales of 4 bits are chosen."""
        return calibrate.input_moments(self.dense, self.text[calibrate.TOKENS])

    # ---------------------------------------------- models ----------------------------------------------

    def models(self, trial):
        """-> a model whose weights are as they decode and whose sums are fp32, and the one that decodes."""
        dense, count = self.dense, calibrate.AT_LOAD
        if trial.trained is not None:
            dense = build_model(*checkpoint.read(self.folder_of(trial))).eval()
        elif not self.at_sampling(trial):
            count = retrofit.TOKENS              # as train.py calibrates
        model = copy.deepcopy(dense)
        if trial.flags:
            config = dataclasses.replace(dense.config, **dict(trial.flags))
            model = (pretrained.rebuilt(dense, config).eval() if {*dict(trial.flags)} <= SAME_TENSORS else
                     retrofit.retrofit(dense, config, self.text[count], self.cfg.seed)[0])
        if trial.bits != WHOLE:
            quantize(model, kind_of(trial.bits), moments=self.moments if 4 in trial.bits else None)
        model.to(self.dtype)
        decodes = copy.deepcopy(model)
        for each in (model.float(), decodes):
            each.use_policy().choose(threads=torch.get_num_threads())
        if calibrate.screened(model):
            self.set_thresholds(model, decodes)
        if any(isinstance(module, TwoOfFour) for module in decodes.modules()):
            settle(decodes, pack=sparse_kernels.packing_pays(torch.device("cpu"))[0])
        move_weights(decodes)
        return model, decodes

    def set_thresholds(self, model, decodes):
        calibrate.calibrate(model, self.text[calibrate.AT_LOAD], model.config.mlp_live)
        for ours, theirs in zip(calibrate.screened(model), calibrate.screened(decodes)):
            for name, values in ours.named_buffers(recurse=False):       # the threshold, and a gate's reach
                theirs.get_buffer(name).copy_(values)

    def at_sampling(self, trial):
        """Can sample.py switch these flags on by itself?"""
        return {key for key, _ in trial.flags} <= AT_SAMPLING

    def check(self, trial):
        """A ConfigError where the dense model does not take a trial's flags."""
        flags = dict(trial.flags) | dict(trial.trained or ())
        config = dataclasses.replace(self.dense.config, **flags)
        retrofit.check(self.dense.config, config, self.cfg.out_dir)
        require(not flags or retrofit.changes(self.dense.config, config), "the model has that already")
        for _, module in self.dense.named_modules() if 4 in trial.bits else ():
            require(getattr(module, "in_features", 0) % 2 == 0, "4 bits are stored in pairs")
        require(OWN not in trial.bits or (trial.trained is None and has_levels(self.dense, trial.bits)),
                "no weights from a file of 4 bits")

    # ---------------------------------------------- numbers ---------------------------------------------

    def known(self, trial):
        """What is known of a trial: its record in memory or in its file, or {}."""
        if trial not in self.records:
            path = self.file_of(trial)
            try:
                self.records[trial] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            except ValueError:                   # torn by a crash
                self.records[trial] = {}
        return self.records[trial]

    def keep(self, trial, record):
        self.records[trial] = record
        self.make_folder()
        write_atomically(self.file_of(trial), json.dumps(record) + "\n")

    def make_folder(self):
        try:
            self.place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            require(False, f"trials={self.cfg.trials} cannot be made ({error.strerror}): name another folder")
        require(os.access(self.place, os.W_OK), f"trials={self.cfg.trials}: {self.place} cannot be written: "
                "name another folder")

    def recipe_key(self, trial):
        return None if trial.trained is None else [*sorted(self.plan.items()), "taught"]

    def file_of(self, trial):
        flags = dict(trial.flags) | dict(trial.trained or ())
        packs = sparse_kernels.packing_pays(torch.device("cpu"))[0] if "weights" in flags else None
        return self.place / f"{digest([self.key, *trial, self.recipe_key(trial), packs])}.json"

    def is_decided(self, trial, limit):
        return "bytes" in self.known(trial) and self.beside(trial, limit).decided

    def measure(self, trial, limit=math.inf, below=math.inf):
        """Measure of a trial what is not known yet -> its record. A loss that is surely on one side of the
        limit is not looked at again, and that of a step that reads no fewer bytes than `below` never."""
        record = dict(self.known(trial)) or {"name": str(trial), "of_windows": []}
        if self.is_decided(trial, limit) or cost_of(record) >= below:
            return record
        model, decodes = self.models(trial)
        if "bytes" not in record:
            self.keep(trial, record := record | self.costs(decodes))
        step = max(2, -(-self.count // LOOKS))
        while not self.is_decided(trial, limit) and cost_of(record) < below:
            done = len(record["of_windows"])
            record["of_windows"] += losses_of(model, *(t[done:done + step] for t in self.search))
            self.keep(trial, record)
        return record

    def beside(self, trial, limit=math.inf, key="of_windows"):
        """A trial's loss beside the dense model's on the windows that are known of it -> Found."""
        losses = self.known(trial).get(key, [])
        baseline = self.beside_whom(trial).get(key) or losses
        if not losses or None in losses:         # not measured, or not a number
            return Found(math.inf if losses else math.nan, None, bool(losses))
        base = statistics.fmean(baseline[:len(losses)])
        each = [(a - b) / base for a, b in zip(losses, baseline)]
        found, sure = mean_interval(each), mean_interval(each, SURE)["interval"]
        early = limit < math.inf and len(each) >= 4 and (sure[0] > limit or sure[1] <= limit)
        return Found(found["mean"], found["interval"], early or len(losses) == self.count)

    def beside_whom(self, trial):
        """The record of the dense model that a trial stands beside: the one trained on, if that is better and
        the trial's weights have learnt too, which those under exits have not."""
        learnt = trial.trained and "exits" not in dict(trial.trained)
        return self.known(self.control if learnt and self.control is not None else Trial())

    def costs(self, decodes):
        """Bytes of weights and multiply-adds of a decode step, and bytes of keys and values that it reads."""
        ids, c = self.search[0][:1], decodes.config
        cache = Cache(decodes, 1, min(c.block_size, self.prompt + COUNTED), decodes.chosen(1))
        program = engine.program_of(decodes, cache, c.vocab_size, 1, ids.device)
        require(program, f"the decode engine does not take this model ({program})")
        steps = min(COUNTED, c.block_size - self.prompt)
        calibrate.read(program, ids.clone(), 0, self.prompt)
        with sparse_kernels.counting() as tally:
            calibrate.read(program, ids.clone(), self.prompt, steps)
        kept = sum(2 * c.kv_heads() * c.heads()[1] * min(c.window_of(layer) or self.prompt, self.prompt)
                   for layer in range(c.n_layer)) * self.dtype.itemsize
        return {"bytes": round(tally.bytes / steps), "macs": round(tally.macs / steps), "kv_bytes": kept}

    def confirm(self, trial):
        """The losses of the windows that chose nothing, into the record -> it."""
        record = self.known(trial)
        if "fresh" not in record:
            self.keep(trial, record := record | {"fresh": losses_of(self.models(trial)[0], *self.fresh)})
        return record

    # ---------------------------------------------- training --------------------------------------------

    def folder_of(self, trial):
        """The run that a trained trial's flags and weights are from."""
        words = [f"{key}-{value}" for key, value in trial.trained] or ["dense-taught"]
        name = "-".join(words).replace(":", "-").replace(",", "-")
        return self.place / f"{name}-{self.plan['iters']}x{self.plan['rows']}"

    def recipe(self):
        """The keys that all of them are trained with."""
        settings = self.settings
        iters, rows = self.plan["iters"], self.plan["rows"]
        share = retrofit.RATE * min(1.0, math.sqrt(rows / self.rows_of_old()))   # smaller batches and steps
        rates = {key: share * settings[key] for key in ("learning_rate", "muon_learning_rate")
                 if settings.get(key)} or {"learning_rate": 1e-4}
        own = {key: settings[key] for key in RECIPE if key in settings}
        fits = max(1, 4096 // self.dense.config.block_size)
        most = max(n for n in range(1, fits + 1) if rows % n == 0)
        return own | {key: float(f"{value:.3g}") for key, value in rates.items()} | dict(
            dataset=self.data(), block_size=self.dense.config.block_size, batch_size=most,
            gradient_accumulation_steps=rows // most, max_iters=iters, lr_decay_iters=iters,
            eval_interval=max(1, iters), eval_iters=4, warmup_iters=iters // 10, min_lr=0.0,
            lr_schedule="linear", keep_checkpoints=1, seed=self.cfg.seed)

    def recipe_file(self):
        """Write the recipe as a config file of train.py -> its path."""
        self.make_folder()
        path = self.place / f"recipe-{self.plan['iters']}x{self.plan['rows']}.py"
        head = f"# {self.plan['iters']} iterations of {self.plan['rows']} rows, by bench.py sparsify\n"
        write_atomically(path, head + "".join(f"{key} = {value!r}\n" for key, value in self.recipe().items()))
        return path

    def training_words(self, trial):
        """What train.py is called with to train a trial's flags. The dense model that all stand beside has
        itself as its teacher: what it gains by that is no block's."""
        keys = dict(trial.trained) | {"teacher": self.cfg.out_dir}
        keys |= {"train_only": "new"} if "exits" in keys else {}
        return [str(self.recipe_file())], {"init_from": self.cfg.out_dir} | keys | {
            "out_dir": str(self.folder_of(trial))}

    def train(self, trial):
        """Train a trial's flags on, unless that has been done -> seconds."""
        folder, done = self.folder_of(trial), self.folder_of(trial) / "trained.json"
        if done.is_file():
            return json.loads(done.read_text(encoding="utf-8"))["seconds"]
        files, keys = self.training_words(trial)
        _, seconds = timed_script(ROOT / "train.py", files, keys | {"device": "cpu"}, Path.cwd(), self.cfg)
        require((folder / "ckpt.pt").is_file(), f"{trial}: training has left no {folder / 'ckpt.pt'}")
        write_atomically(done, json.dumps({"seconds": seconds}) + "\n")
        return seconds

    # ---------------------------------------------- commands --------------------------------------------

    def commands(self, trial):
        """What to type for a trial's model to decode -> lines."""
        lines, keys, run = [], dict(trial.flags), self.cfg.out_dir
        if trial.trained is not None:
            files, typed = self.training_words(trial)
            lines.append(line("train.py", files, typed))
            run = str(self.folder_of(trial))
        elif not self.at_sampling(trial):
            run = str(self.place / "-".join(map(str, sum(trial.flags, ()))))
            settings = dict(init_from=self.cfg.out_dir, dataset=self.data(), seed=self.cfg.seed)
            lines.append(line("train.py", (), settings | keys | dict(
                max_iters=0, eval_iters=4, batch_size=8, gradient_accumulation_steps=1, out_dir=run)))
            keys = {}
        keys = ({"out_dir": run} if Path(run).is_dir() or lines else {"init_from": run}) | keys
        if trial.bits != WHOLE:
            keys["quantize"] = kind_of(trial.bits)
        if {"exits", "mlp_predict"} & {key for key, _ in (*trial.flags, *(trial.trained or ()))}:
            keys["sparse_decode"] = True
        if (self.cfg.dataset or self.about.get("foreign")) and not lines:
            keys["tokenizer"] = self.data()
        return [*lines, line("sample.py", (), keys)]

    def data(self):
        named = self.cfg.dataset or self.settings.get("dataset")
        return named if named and not foreign.is_text(named) else str(self.folder)


def cost_of(record):
    """Bytes that a decode step reads: weights, keys and values."""
    return record["bytes"] + record["kv_bytes"] if "bytes" in record else -math.inf


def line(script, files, keys):
    """A command as it is typed."""
    return shlex.join(["python", script, *files, *(f"--{key}={value}" for key, value in keys.items())])


def digest(parts):
    """A short name of what JSON can tell."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


@torch.inference_mode()
def losses_of(model, x, y):
    """The mean loss of each window (n, block) in nats; None where it is not a number."""
    found, rows = [], max(1, 2048 // x.size(1))
    for ids, targets in zip(x.split(rows), y.split(rows)):
        logits, _ = model(ids, targets)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        found += losses.view(targets.shape).mean(dim=1).tolist()
    return [round(loss, 6) if math.isfinite(loss) else None for loss in found]

