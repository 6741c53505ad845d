"""What each choice of the race's config is worth."""
import statistics
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import ROOT
from benchmarks.race import Shakespeare, race_data, race_ours, race_runs, validation_of
from benchmarks.record import OURS, mean_of
from benchmarks.runs import losses_of, seeds

CHANGES = {                                      # to the race's config, one at a time
    "no n-gram table": dict(ngram_buckets=0), "n-grams up to 3": dict(ngram_order=3),
    "AdamW for all": dict(optimizer="adamw"), "5 Newton-Schulz steps": dict(muon_steps=5),
    "cosine decay": dict(lr_schedule="cosine"), "learned positions": dict(pos="learned"),
    "no qk_norm": dict(qk_norm=False), "GELU": dict(act="gelu"), "tied head": dict(tie_weights=True),
    "RMSNorm": dict(norm="rmsnorm"), "zero_init": dict(zero_init=True),
}


@dataclass(frozen=True)
class Ablate(Shakespeare):
    """The race's config with each of its choices changed, one at a time: what every switch is worth."""


def ablate(cfg):
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        data = race_data(cfg, work)
        changes = {OURS: {}} | CHANGES
        runs = race_runs(cfg, {name: partial(race_changed, cfg, data, work, change)
                               for name, change in changes.items()})
    losses = losses_of(runs)
    for name, s in losses["sides"].items():
        s["to_ours"] = s["mean"] - losses["sides"][OURS]["mean"]
        print(f"{name:24}{mean_of(s)}  {s['to_ours']:+.4f}  "
              f"{statistics.median(run['seconds'] for run in runs[name]):.1f} s")
    return {"measurements": {"val loss": losses}, "seeds": seeds(cfg), "runs": runs,
            "validation": validation_of("cpu")}


def beside_twins(cfg):
    """(the one key that is changed, none) of every change: here each choice counts as a mechanism."""
    return [(change, {}) for change in CHANGES.values()]


def race_changed(cfg, data, work, change, seed):
    return race_ours(cfg, data, work, seed, ROOT / cfg.config, **change)
