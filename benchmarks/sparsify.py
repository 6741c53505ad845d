"""The search that makes a trained dense model sparse: what needs no training first, then combinations, then
within a budget of minutes what does; last the front of loss against decode time, and a command for each of
its points."""
import copy
import json
import math
import os
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import sparse_kernels
from benchmarks import Timed
from benchmarks.compare import FOLDERS
from benchmarks.record import without_folders, write_atomically
from benchmarks.screen import Reader, rewind
from benchmarks.timing import interleave, measurement
from benchmarks.trials import WHOLE, Lab, Trial, cost_of, digest, losses_of
from configurator import ConfigError, require
from decode.quantized import OWN
from viz.figures import drawing, name_points, pyplot

TIMED = 8                                        # points whose decode steps are timed, at most
NOTABLE = 0.99                                   # of the bytes, that a point may read at most
NEAR = 1.1                                       # times the bytes of a better point: it may still be faster
IN_8_BITS = Trial(bits=(8, 8, 8))
STEPS, FEWEST = 60, 20                           # iterations of a retrofit that are wanted, at the least
BESIDE, BEGIN = 1.5, 10                          # of a step: times a forward and backward; of a run: seconds


@dataclass(frozen=True)
class Sparsify(Timed):
    """A trained model made sparse: what loses little, combined, trained on; the front, and its commands."""
    out_dir: str = "out"  # the run; a folder behind the word sparsify is the same
    dataset: str = ""  # data, or a text: calibration by its training part, losses on the other; or the run's
    max_loss: float = 0.01  # loss above the dense model's, as a share of it, that a point may have
    minutes: float = 10.0  # of training all retrofits and the dense model beside them; 0: nothing is trained
    retrofits: int = 3  # what is trained on, at most: the most promising ones
    only: str = ""  # of what is tried, by commas: bits, head, units, attention, window, 2:4; empty: all
    tokens: int = 8192  # of held-out text that a trial's loss is of at most; as many others confirm the front
    new: int = 128  # tokens that every point of the front decodes in a round
    threads: int = 2  # CPU threads, of training runs too
    dtype: str = "bfloat16"  # of the weights and the cache that decode: bfloat16 or float32
    trials: str = "out-sparsify"  # folder where finished trials are kept, and found again
    loss_only: bool = False  # losses and counted bytes, no times: for a machine that is busy
    dry_run: bool = False  # say what would be done and how long it takes, and stop
    seed: int = 1337  # decides what is drawn, and the data that retrofits train on
    plot: str = ""  # also draw the loss against decode time (or bytes) into this PNG (needs matplotlib)

    def __post_init__(self):
        super().__post_init__()
        require(not self.nanogpt, "sparsify reads nanoGPT's checkpoints as they are: name its out_dir as the "
                "run and leave --nanogpt out")
        require(0 <= self.max_loss < 1, f"max_loss={self.max_loss} must be in [0, 1), a share of the dense "
                "model's loss: type --max_loss=0.01 for one percent")
        for key in ("minutes", "retrofits"):
            require(getattr(self, key) >= 0, f"{key}={getattr(self, key)} must be 0 (trains nothing) or more")
        unknown = [word for word in self.only.split(",") if word and word not in AXES]
        require(not unknown, f"only='{self.only}': {unknown[:1]} must be among {', '.join(AXES)}")
        require(self.tokens >= 2, f"tokens={self.tokens} must be at least 2: type --tokens=8192")
        require(self.new >= 1, f"new={self.new} must be at least 1: type --new=128")
        require(self.dtype in ("bfloat16", "float32"), f"dtype='{self.dtype}' must be bfloat16 or float32")
        require(0 <= self.seed < 2**63, f"seed={self.seed} must be in 0..2**63-1")
        require(not os.path.isfile(self.trials), f"trials='{self.trials}' is a file: name a folder")
        folder = Path(self.plot).parent
        require(os.path.isdir(folder), f"plot='{self.plot}': the folder {folder} does not exist: make it")


def sparsify(cfg):
    library, why = sparse_kernels.cpu_library()
    require(library, f"what a step reads is counted by the decode engine: {why}")
    if cfg.plot:
        pyplot()                                 # better missed now than behind the search
    search = Search(cfg)
    print(search.announced(), flush=True)
    if cfg.dry_run:
        return search.record({}, False)
    search.lab.make_folder()
    stopped, timed = False, {}
    try:
        search.run()
        timed = search.finish()
    except KeyboardInterrupt:
        stopped = True
    finally:
        search.bar.close()
    search.tell(timed, stopped)
    if cfg.plot:
        search.draw(timed)
    return search.record(timed, stopped)


# -------------------------------------------------- what is tried -------------------------------------------

AXES = "bits", "head", "units", "attention", "window", "2:4", "depth"    # of each a model has one at most


def ladders(c):
    """What needs no training -> [(axis, trials from mild to strong)]; a stronger one is tried where the
    milder one has passed. c: the dense model's GPTConfig."""
    def flags(axis, *settings):
        return axis, [Trial(flags=tuple(some.items())) for some in settings]

    shares = (0.3, 0.2, 0.1)
    bits, some = dict(relu2=(4, (0.2, 0.15, 0.1)), swiglu=(16, (0.8, 0.65, 0.5))).get(c.act, (0, ()))
    live = [dict(mlp_screen=bits, mlp_live=share) for share in some]
    wide = [dict(mlp_topk=share) for share in (0.7, 0.5, 0.3)]
    return [
        *(("bits", [Trial(bits=bits)]) for bits in ((8, 8, 8), (OWN,) * 3, (8, 4, 8), (4, 8, 8), (8, 8, 4))),
        *[flags("units", *live)] * bool(live),
        flags("head", dict(screen=True)),
        *([flags("units", *wide), flags("units", *(one | dict(gate_first=True) for one in wide))]
          if c.act == "swiglu" else [flags("units", *(dict(mlp_topk=share) for share in shares))]),
        flags("units", dict(mlp_topk=0.5, mlp_topk_group=4)),
        flags("units", *(dict(event_gate=True, event_rate=rate) for rate in shares)),
        flags("attention", *(dict(attn_topk=share) for share in (0.9, 0.7, 0.5))),
        flags("window", *(dict(window=c.block_size // part) for part in (2, 4) if c.block_size >= 2 * part)),
        flags("2:4", dict(weights="2:4"))]


def in_training(c):
    """What needs training -> [(axis, Trial)] of flags, beside those of the ladders that have not passed."""
    groups = next((n for n in (32, 16, 8) if c.units() % n == 0 and c.units() // n >= 8), 0)
    some = [("units", dict(mlp_topk=0.05)), ("units", dict(event_gate=True, event_rate=0.05)),
            ("window", dict(window=max(1, c.block_size // 8)))]
    if groups:
        some += [("units", dict(columns=groups, columns_active=groups // 2)),
                 ("units", dict(columns=groups, columns_active=groups // 4)),
                 ("units", dict(experts=8, experts_active=3))]
    if c.act != "relu2" and c.n_embd >= 64:
        some.append(("units", dict(mlp_topk=0.1, mlp_predict=c.n_embd // 4, mlp_active=0.2)))
    if c.n_layer >= 2:
        some.append(("depth", dict(exits=str(max(1, 3 * c.n_layer // 4)))))
    return [(axis, Trial(flags=tuple(flags.items()))) for axis, flags in some]


class Search:
    """What has been tried, in order, and what has passed: a loss at most cfg.max_loss above the dense one."""

    def __init__(self, cfg):
        self.cfg, self.lab, self.notes = cfg, Lab(cfg), []
        self.tried, self.passed, self.axis_of, self.best = [], [], {}, Trial()
        chosen = [axis for axis in cfg.only.split(",") if axis]
        self.ladders = [(axis, [t for t in trials if self.fits(t)]) for axis, trials in
                        ladders(self.lab.dense.config) if axis in (chosen or AXES)]
        self.trained = [(axis, t) for axis, t in in_training(self.lab.dense.config)
                        if axis in (chosen or AXES) and self.fits(t)]
        self.bar = tqdm(total=1 + sum(len(trials) for _, trials in self.ladders), unit="trial", disable=True)

    def fits(self, trial):
        """Can the dense model be made into this? Why not is no news: a model has no such part, or has it."""
        try:
            return self.lab.check(trial) is None
        except ConfigError:
            return False

    # ---------------------------------------------- before it begins ------------------------------------

    def announced(self):
        """What will be done and how long it takes, of which the seconds of a forward pass are measured."""
        cfg, lab = self.cfg, self.lab
        some = [t[:2] for t in lab.search]
        losses_of(lab.dense, *some)
        clock = time.perf_counter()
        losses_of(lab.dense, *some)
        self.pace = (time.perf_counter() - clock) / some[0].numel()      # seconds a token
        trials = sum(len(trials) for _, trials in self.ladders)
        windows, block = lab.count, lab.dense.config.block_size
        calibration = 1.5 * lab.text[max(lab.text)].numel()
        all_of_it = self.pace * (calibration + (1 + trials) * windows * block)
        kept = len([*lab.place.glob("*.json")]) if lab.place.is_dir() else 0
        lines = [
            f"{cfg.out_dir}: {sum(p.numel() for p in lab.dense.parameters()):,} parameters; a point may lose "
            f"{cfg.max_loss:.2%} of the dense model's loss (validation loss of {lab.folder.name}).",
            f"1. {trials} trials without training, each on up to {windows} windows of {block} held-out "
            f"tokens, fewer where few decide: at most {minutes(all_of_it)}; then combinations.",
            f"2. {cfg.minutes:g} minutes of training the {cfg.retrofits} most promising, beside the dense "
            "model trained on as long."
            if cfg.minutes and cfg.retrofits else "2. Nothing is trained.",
            f"3. The front on {windows} other windows" + (", then its decode steps timed in turns." * (
                not cfg.loss_only) or ", without times."),
            f"Finished trials are kept in {lab.place}" + (f", where {kept} files are" if kept else "")
            + "; Ctrl-C ends it with the front so far, and the same command goes on."]
        return "\n".join(lines)

    # ---------------------------------------------- the search ------------------------------------------

    def run(self):
        self.bar = tqdm(total=self.bar.total, unit="trial", dynamic_ncols=True,
                        mininterval=0.2 if sys.stderr.isatty() else 20)
        self.look(Trial(), "", math.inf)
        for axis, trials in self.ladders:
            for place, trial in enumerate(trials):
                self.look(trial, axis)
                if self.lab.beside(trial).share > self.cfg.max_loss:
                    self.bar.update(len(trials) - place - 1)
                    break
        alone = [*self.passed]
        self.combined(Trial(), sorted(alone, key=lambda trial: -self.promise(self.axis_of[trial], trial)))
        self.best = self.combined(Trial(), sorted(alone, key=lambda trial: cost_of(self.lab.known(trial))))
        if self.cfg.minutes and self.cfg.retrofits:
            self.train_on()

    def look(self, trial, axis, limit=None, below=math.inf):
        """Measure a trial -> does it pass: lose little enough, read less than `below` and the dense one?"""
        limit = self.cfg.max_loss if limit is None else limit
        self.bar.set_postfix_str(str(trial), refresh=sys.stderr.isatty())
        record, again = self.lab.measure(trial, limit, below), trial in self.axis_of
        if not again:
            self.axis_of[trial] = axis
            self.tried.append(trial)
        found, dense = self.lab.beside(trial), self.lab.known(Trial())
        passes = found.share <= self.cfg.max_loss and cost_of(record) < min(below, NOTABLE * cost_of(dense))
        if passes and trial not in self.passed:
            self.passed.append(trial)
        self.bar.update()
        if not again:
            tqdm.write(f"{trial!s:58} {said(found):>25} {cost_of(record) / cost_of(dense):5.0%} of the bytes"
                       + "  passes" * passes)
        return passes

    def combined(self, start, parts):
        """Greedily add to a trial what has passed alone, in the order of `parts` -> the combination."""
        best, axes = start, {self.axis_of.get(start)} - {"", None, "bits"}
        self.bar.total += len(parts)
        for part in parts:
            axis, trial = self.axis_of[part], best.with_(part.flags, part.bits)
            if axis in axes or trial == best or not self.fits(trial):
                self.bar.update()
                continue
            if trial == part or self.look(trial, "combined", below=cost_of(self.lab.known(best))):
                best = trial
                axes |= {axis} - {"bits"}
        return best

    # ---------------------------------------------- training --------------------------------------------

    def train_on(self):
        """Retrofits of the most promising, beside the dense model trained on as long, within the budget."""
        chosen = self.promising()
        if not chosen:
            return self.notes.append("nothing promised enough to be trained")
        budget, lab = 60 * self.cfg.minutes, self.lab
        lab.plan = self.planned(len(chosen))
        chosen = chosen[:lab.plan["count"]]
        control, done = Trial(trained=()), []
        self.bar.total += 1 + len(chosen)
        for axis, trial in [("", control), *((axis, Trial(trained=trial.flags)) for axis, trial in chosen)]:
            if len(done) > 1 and sum(done) + max(done) > budget:     # one beside the dense model at least
                self.notes.append(f"{trial}: not trained, the {self.cfg.minutes:g} minutes are over")
                continue
            self.bar.set_postfix_str(f"training {trial}", refresh=sys.stderr.isatty())
            try:
                done.append(lab.train(trial))
            except ConfigError as error:         # of a run of its own; what is known stays
                self.notes.append(f"{trial}: not trained: {error}")
                if trial == control:
                    break
                continue
            if trial == control:
                self.look(trial, axis, math.inf)
                if lab.beside(trial).share < 0:
                    lab.control = trial
            elif self.look(trial, axis):
                self.combined(trial, self.parts())

    def parts(self):
        """What may be added to a trained model: bits, and of the best combination what sample.py switches on.
        """
        flags = dict(self.best.flags).items()
        return [trial for trial in self.passed if trial.trained is None and self.axis_of[trial] in AXES
                and self.lab.at_sampling(trial) and (trial.bits != WHOLE or set(trial.flags) <= flags)]

    def promising(self):
        """What has not passed and reads least for what it loses untrained, one of each kind
        -> [(axis, Trial)]."""
        pool = [(self.axis_of[trial], trial) for trial in self.tried
                if trial.flags and trial not in self.passed and self.axis_of[trial] in AXES]
        pool += [(axis, trial) for axis, trial in self.trained if trial not in self.tried]
        untried = [(axis, trial) for axis, trial in pool if trial not in self.tried]
        self.bar.total += len(untried)
        for axis, trial in untried:
            self.look(trial, axis)
        pool = [(axis, trial) for axis, trial in pool if trial not in self.passed]
        pool.sort(key=lambda one: -self.promise(*one))
        kinds = {}
        for axis, trial in pool:
            if self.promise(axis, trial) > 0:
                kinds.setdefault(tuple(key for key, _ in trial.flags), (axis, trial))
        return [*kinds.values()][:self.cfg.retrofits]

    def promise(self, axis, trial):
        """Logarithm of the bytes saved over the loss that is to be won back. How many tokens leave early
        shows when probes have learnt: half of them are reckoned with, at the limit's loss."""
        dense, record, c = self.lab.known(Trial()), self.lab.known(trial), self.lab.dense.config
        cost, share = cost_of(record), self.lab.beside(trial).share
        if axis == "depth":
            cost = cost_of(dense) * (1 + int(dict(trial.flags)["exits"]) / c.n_layer) / 2
            share = self.cfg.max_loss
        return math.log(cost_of(dense) / cost) / max(share, self.cfg.max_loss / 10, 1e-4)

    def planned(self, count):
        """How many are trained, for how many iterations of how many rows; a budget's first plan stays."""
        lab, c = self.lab, self.lab.dense.config
        path = lab.place / f"plan-{digest([self.cfg.minutes, self.cfg.retrofits, self.cfg.only])}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        pace = self.training_pace()
        for some in range(count, 0, -1):
            share = 60 * self.cfg.minutes / (some + 1)
            tokens = max(share / 4, share - BEGIN) / pace
            rows = int(min(lab.rows_of_old(), max(1, tokens // (STEPS * c.block_size))))
            iters = max(1, int(tokens // (rows * c.block_size)))
            if iters >= FEWEST:
                break
        plan = {"iters": min(iters, 5000), "rows": rows, "count": some}
        lab.make_folder()
        write_atomically(path, json.dumps(plan) + "\n")
        return plan

    def training_pace(self):
        """Seconds of a training step for a token: a forward and backward are timed, others are reckoned."""
        model, some = copy.deepcopy(self.lab.dense).train(), [t[:2] for t in self.lab.search]
        for _ in range(2):                       # the second counts
            clock = time.perf_counter()
            model(*some)[1].backward()
            seconds = time.perf_counter() - clock
        return BESIDE * seconds / some[0].numel()

    # ---------------------------------------------- the front -------------------------------------------

    def front(self):
        """Points that none beats in loss with NEAR times fewer bytes, behind the dense one, from many to few.
        """
        points = [(cost_of(self.lab.known(t)), self.best_known(t).share, t) for t in self.passed]
        best = [t for cost, share, t in points if share <= self.cfg.max_loss and not any(
            NEAR * c <= cost and s <= share for c, s, _ in points)]
        best.sort(key=lambda trial: -cost_of(self.lab.known(trial)))
        rival = [trial for trial in best if trial == IN_8_BITS]          # stays, as the dense model does
        some = [trial for trial in best if trial not in rival][-TIMED + 1 + len(rival):]
        return [Trial(), *(trial for trial in best if trial in rival + some)]

    def best_known(self, trial):
        """A trial's loss beside the dense model's: on other windows, where that is known -> Found."""
        key = "fresh" if "fresh" in self.lab.known(trial) else "of_windows"
        return self.lab.beside(trial, key=key)

    def confirm(self):
        """Measure the front on windows that chose nothing. What loses more there makes room for others."""
        if self.lab.control is not None:
            self.lab.confirm(self.lab.control)
        while waiting := [trial for trial in self.front() if "fresh" not in self.lab.known(trial)]:
            self.bar.total += len(waiting)
            for trial in waiting:
                self.bar.set_postfix_str(f"other windows: {trial}", refresh=sys.stderr.isatty())
                self.lab.confirm(trial)
                self.bar.update()

    def not_confirmed(self):
        """Sentences on what has passed and loses more on windows that chose nothing."""
        for trial in self.passed:
            found = self.best_known(trial)
            if found.share > self.cfg.max_loss:
                yield f"left out, {trial}: {said(found)} on windows that chose nothing"

    def finish(self):
        """Losses of the front on windows that chose nothing, and its tokens/s in turns -> the measurement."""
        self.confirm()
        self.bar.close()
        front = self.front()
        if self.cfg.loss_only:
            return {}
        c, lab = self.lab.dense.config, self.lab
        new = min(self.cfg.new, c.block_size - lab.prompt)
        lengths = SimpleNamespace(prompt=lab.prompt, new=new)
        sides = {str(trial): Reader(lab.models(trial)[1], lab.search[0][:1], lengths) for trial in front}
        seconds = interleave(sides, self.cfg.repeats, cold=self.cfg.cold, before=rewind)
        rates = {name: [new / s for s in took] for name, took in seconds.items()}
        return measurement("tokens/s", rates, higher_is_better=True)

    def row(self, trial, timed):
        """What the table says of a point."""
        record, dense = self.lab.known(trial), self.lab.known(Trial())
        fresh, found = "fresh" in record, self.best_known(trial)
        side, base = (timed.get("sides", {}).get(name) for name in (str(trial), str(Trial())))
        if fresh:
            loss = statistics.fmean(record["fresh"])
        else:                                    # of the windows that it has seen, as if it had seen all
            loss = statistics.fmean(self.lab.beside_whom(trial)["of_windows"]) * (1 + found.share)
        return SimpleNamespace(name=str(trial), loss=loss, found=found, fresh=fresh, mb=cost_of(record) / 1e6,
                               share=cost_of(record) / cost_of(dense), macs=record["macs"] / 1e6,
                               rate=side and side["median"],
                               times=side and side["median"] / base["median"])

    def tell(self, timed, stopped):
        """The table, the commands, the verdict."""
        if not self.lab.known(Trial()).get("of_windows"):
            return print("stopped before the dense model's loss was known: type the same command to go on")
        if stopped:
            print("stopped; the front so far, by the search's windows, without times. The same command goes "
                  "on.")
        front = self.front()
        rows = {trial: self.row(trial, timed) for trial in front}
        print(f"loss above the dense model's (95%), of {self.lab.count} windows"
              + " that chose nothing" * all(r.fresh for r in rows.values())
              + "; MB that a decode step reads (weights, keys, values); million multiply-adds"
              + "; tokens/s (greedy, batch 1)" * bool(timed))
        wide = max(len(r.name) for r in rows.values())
        for r in rows.values():
            rate = f"{r.rate:9.0f}{r.times:7.2f}x" if r.rate else ""
            print(f"  {r.name:{wide}}{r.loss:9.4f}{said(r.found):>28}{r.mb:9.4g}{r.share:5.0%}{r.macs:9.4g}"
                  f"{rate}")
        if self.lab.control is not None:
            print("  trained ones stand beside the dense model trained on as long, whose loss is "
                  f"{said(self.best_known(self.lab.control))} to the dense model's")
        for note in (*self.not_confirmed(), *self.notes):
            print(note)
        for trial in front[1:]:
            print(f"{trial}:", *self.lab.commands(trial), sep="\n    ")
        print(self.verdict(rows))

    def verdict(self, rows):
        """The last sentence: the fastest point within the limit, or without times what reads least."""
        inside = [(trial, r) for trial, r in rows.items() if trial != Trial()]
        if not inside:
            return f"Nothing was found that reads less and loses at most {self.cfg.max_loss:.2%}."
        if inside[0][1].rate:
            trial, r = max(inside, key=lambda one: one[1].rate)
            what = f"{r.times:.2f} times the dense model's tokens/s"
            if r.times <= 1:
                return (f"Nothing within {self.cfg.max_loss:.2%} decodes faster than the dense model here; "
                        f"{r.name} reads {r.share:.0%} of its bytes at {r.found.share:+.2%} loss.")
        else:
            trial, r = min(inside, key=lambda one: one[1].mb)
            what = f"{r.share:.0%} of the dense model's bytes a step"
        return f"{r.name}: {what} at {r.found.share:+.2%} loss: {self.lab.commands(trial)[-1]}"

    def draw(self, timed):
        """The loss against ms a token, or where no times are known against bytes a token."""
        if not self.lab.known(Trial()).get("of_windows"):
            return
        rows = [self.row(trial, timed) for trial in self.front()]
        with drawing(self.cfg.plot, 1, (7, 4.5)) as axis:
            for r in rows:
                x = 1e3 / r.rate if timed else r.mb
                axis.plot([x], [r.loss], "ks" if r.name == "dense" else "o", markersize=4)
            axis.axhline(rows[0].loss * (1 + self.cfg.max_loss), color="grey", linestyle=":", linewidth=1)
            axis.set(xlabel="ms a decoded token, batch 1" if timed else "MB that a decode step reads",
                     ylabel="held-out loss, nats")
            axis.margins(0.2)
            name_points(axis, [(r.name, 1e3 / r.rate if timed else r.mb, r.loss) for r in rows], 7)

    def record(self, timed, stopped):
        """What the JSON record keeps."""
        lab, front = self.lab, [] if self.cfg.dry_run else self.front()
        points = {}
        for trial in self.tried:
            known, found = lab.known(trial), lab.beside(trial)
            if "bytes" in known:
                points[str(trial)] = {key: value for key, value in known.items() if key != "name"} | {
                    "flags": dict(trial.flags), "bits": trial.bits, "axis": self.axis_of[trial],
                    "trained": None if trial.trained is None else dict(trial.trained),
                    "share": found.share if math.isfinite(found.share) else None, "interval": found.interval,
                    "passes": trial in self.passed}
        commands = {str(trial): [cut(text) for text in lab.commands(trial)] for trial in front[1:]}
        return {"measurements": {"decode": timed} if timed else {}, "points": points,
                "front": [str(trial) for trial in front], "commands": commands,
                "notes": [re.sub(FOLDERS, "", note) for note in (*self.not_confirmed(), *self.notes)],
                "training": lab.plan, "stopped": stopped, "seeds": [self.cfg.seed],
                "model": {"sha256": lab.key[1], "args": lab.dense.config.model_args(),
                          "data": lab.folder.name},
                "kernels": sparse_kernels.path_taken(torch.device("cpu"))}


def said(found):
    """A share and its 95% interval for people."""
    if not math.isfinite(found.share):
        return "reads no less" if math.isnan(found.share) else "not a number"
    if found.interval == [0, 0]:
        return "+0.00%"
    between = "({:+.2%}, {:+.2%})".format(*found.interval) if found.interval else ""
    return f"{found.share:+.2%} {between}".rstrip()


def cut(command):
    """A command as a record keeps it: without folders of the machine."""
    return " ".join(without_folders(word) for word in command.split(" "))


def minutes(seconds):
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
