"""What an energy budget buys: multiply-adds that a decode step executes, against validation loss."""
import shutil
import statistics
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import Bench
from benchmarks.arms import twin_of
from benchmarks.runs import fixed_loss, trained_model, trained_with, validation_of
from benchmarks.timing import measurement
from configurator import require
from data import dataset as datasets
from decode import counters
from training import energy as spending
from viz.figures import drawing, name_points

GATES = dict(block_size=64, batch_size=16, act="gelu", event_gate=True, dendrites=4, dendrites_active=4,
             n_head=1)
CONTEXTS = 64                                    # whose next token is decoded to count its multiply-adds


@dataclass(frozen=True)
class Energy(Bench):
    """Multiply-adds of a decode step against loss for models trained with energy budgets."""
    repeats: int = 1  # seeds of each budget
    threads: int = 1  # CPU threads of a run
    config: str = "config/train_pylib.py"  # config files of the recipe, by commas
    budgets: str = "0.8,0.4,0.2,0.1"  # shares of what the gates can close, by commas
    iters: int = 250  # iterations of each run
    tokens: int = 200  # decoded tokens whose joules are measured, where this machine measures any
    plot: str = ""  # also draw loss against multiply-adds into this PNG (needs matplotlib)

    def __post_init__(self):
        super().__post_init__()
        shares(self)


def shares(cfg):
    try:
        found = [float(share) for share in cfg.budgets.split(",")]
    except ValueError:
        found = [0.0]
    require(all(0 < share <= 1 for share in found), f"budgets='{cfg.budgets}' must be shares in (0, 1] by "
            "commas: type --budgets=0.5,0.1")
    return found


def energy(cfg):
    data, points = datasets.prepare_if_missing("pylib").resolve(), defaultdict(list)
    sides = sides_of(cfg)
    with tempfile.TemporaryDirectory() as work:
        for seed in range(cfg.repeats):
            for name, flags in sides.items():
                points[name].append(measured(cfg, data, Path(work) / "run", flags, seed))
                print(f"seed {seed}, {name}: {points[name][-1]}", file=sys.stderr, flush=True)
    dense = statistics.fmean(p["macs"] for p in points["no gates"])
    print("budget: multiply-adds of the blocks in a decode step, share of those without gates, val loss, "
          "joules a token")
    for name, found in points.items():
        macs, loss = (statistics.fmean(p[key] for p in found) for key in ("macs", "val_loss"))
        print(f"  {name:12}{macs:12,.0f}  {macs / dense:6.1%}  {loss:.4f}  {found[0]['joules_per_token']}")
    if cfg.plot:
        draw(cfg.plot, points)
    losses, macs = ({name: [p[key] for p in found] for name, found in points.items()}
                    for key in ("val_loss", "macs"))
    return {"measurements": {"val loss": measurement("nats", losses),
                             "decode step": measurement("multiply-adds", macs)}, "points": points}


def sides_of(cfg):
    """{side: flags behind the recipe}: what no gate closes, then a model for each budget."""
    gated = {f"budget {share:g}": GATES | dict(energy_budget=share) for share in shares(cfg)}
    return {"no gates": twin_of(GATES)} | gated


def beside_twins(cfg):
    """(flags, flags of the dense model beside it) of every budget."""
    sides = sides_of(cfg)
    return [(flags, sides["no gates"]) for name, flags in sides.items() if name != "no gates"]


def measured(cfg, data, out_dir, flags, seed):
    """Train one model -> its loss, and what a decode step of it executes."""
    trained_with(cfg, data, out_dir, [], flags, seed, cfg.iters)
    model = trained_model(out_dir)
    shutil.rmtree(out_dir)
    joules, source = joules_per_token(model, data, cfg.tokens)
    return {"val_loss": fixed_loss(model, data, validation_of(model)),
            **executed(model, data), "joules_per_token": joules, "joules_source": source}


def contexts(model, data):
    """(CONTEXTS, block_size) token ids from the validation data, always the same."""
    return datasets.TokenStream(data, "val", model.config.block_size, CONTEXTS, seed=0).batch(0)[0]


def executed(model, data):
    """Multiply-adds of weights per token of all attentions and all MLPs, counted as decode steps run them,
    and those of the head beside them."""
    total = defaultdict(float)
    for idx in contexts(model, data).split(1):
        rows = {layer: {} for layer in range(model.config.n_layer)}
        counters.count_step(model, idx, rows)
        for row in rows.values():
            for part in ("attn_macs", "mlp_macs"):
                total[part] += row[part] / CONTEXTS
    return {"macs": sum(total.values()), **total, "head_macs": model.lm_head.weight.numel()}


def joules_per_token(model, data, tokens):
    """-> (joules per decoded token or "n/a", what measured them or why nothing did)."""
    meter = spending.Meter(torch.device("cpu"))
    with torch.inference_mode():
        model.generate(contexts(model, data)[:1, :8], tokens, top_k=1, overflow="slide")
    joules = meter.joules()
    return "n/a" if joules is None else joules / tokens, meter.source


def draw(path, points):
    mean = {name: [statistics.fmean(p[key] for p in found) for key in ("macs", "val_loss")]
            for name, found in points.items()}
    curve = [at for name, at in mean.items() if name != "no gates"]
    with drawing(path, 1, (6.5, 4.2)) as axis:
        axis.plot(*zip(*curve), "-", color="tab:red", lw=1)
        for name, found in points.items():
            colour = "black" if name == "no gates" else "tab:red"
            axis.plot([p["macs"] for p in found], [p["val_loss"] for p in found], "o", color=colour)
        axis.set(xlabel="multiply-adds of the blocks' weights that a decode step executes",
                 ylabel="validation loss, nats")
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.margins(x=0.1)
        name_points(axis, [(name, *at) for name, at in mean.items()])
