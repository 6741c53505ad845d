"""Adaptive computation time beside dense models of as much compute."""
import copy
from dataclasses import dataclass
from functools import partial

from benchmarks import Models
from benchmarks.runs import QUALITY_VALIDATION, fixed_loss, trained_models, validation_of
from benchmarks.timing import interleave, milliseconds, spread
from data import dataset as datasets
from decode import counters


@dataclass(frozen=True)
class Ponder(Models):
    """Adaptive computation: loss and time against mean runs, beside dense models of as much compute."""
    layers: int = 4  # layers of the model that ponders
    most: int = 4  # most runs of its middle block
    costs: str = "0.003,0.01,0.03,0.1"  # ponder costs, a model each, by commas


def ponder(cfg):
    data = datasets.prepare_if_missing("pylib").resolve()
    models = trained_models(cfg, data, sides_of(cfg))
    batch = datasets.TokenStream(data, "val", models[f"dense, {cfg.layers} layers"].config.block_size, 5,
                                 seed=0).batch(0)
    points = {name: {"val_loss": fixed_loss(model, data, validation_of(model)),
                     "layers": layers_run(model, batch[0])} for name, model in models.items()}
    sides = models | shifted_biases(models[next(iter(models))])
    steps = {name: partial(train_once, model, batch) for name, model in sides.items()}
    steps = milliseconds(interleave(steps, cfg.repeats))
    tokens = {name: partial(decode_row, model, batch[0][:1]) for name, model in sides.items()}
    tokens = milliseconds(interleave(tokens, cfg.repeats))
    for name, model in sides.items():
        point = points.setdefault(name, {"layers": layers_run(model, batch[0])})
        point |= {"step_ms": spread(steps[name]),
                  "token_ms": spread([t / decoded_by(model) for t in tokens[name]])}
    print("mean layers a token, val loss, ms of a training step, ms of a decoded token (medians)")
    for name, p in sorted(points.items(), key=lambda item: item[1]["layers"]):
        loss = f"{p['val_loss']:.4f}" if "val_loss" in p else "      "
        print(f"  {name:24}{p['layers']:6.2f}  {loss}{p['step_ms']['median']:9.1f}"
              f"{p['token_ms']['median']:8.3f}")
    return {"measurements": {}, "validation": QUALITY_VALIDATION, "points": points,
            "parameters": {name: model.get_num_params() for name, model in models.items()},
            "seeds": [1337]}


def sides_of(cfg):
    """{model: its flags behind the recipe}: those that ponder, then the dense ones."""
    flags = {f"ponder, cost {cost}": dict(n_layer=cfg.layers, ponder=cfg.most, ponder_cost=float(cost))
             for cost in cfg.costs.split(",")}
    return flags | {f"dense, {n} layers": dict(n_layer=n) for n in range(cfg.layers, cfg.layers + cfg.most)}


def beside_twins(cfg):
    """(flags, flags of the dense model of as many layers) of every model that ponders."""
    sides = sides_of(cfg)
    twin = sides[f"dense, {cfg.layers} layers"]
    return [(flags, twin) for name, flags in sides.items() if name.startswith("ponder")]


def decoded_by(model):
    """Tokens of a timed continuation."""
    return min(64, model.config.block_size // 2)


def layers_run(model, idx):
    """Blocks that a token passes, in the mean."""
    runs = counters.depth_used(model, idx).get("ponder_steps", 1)
    return model.config.n_layer - 1 + runs


def shifted_biases(model):
    """Copies of a model that ponders, halting sooner or later: {name: model}."""
    found = {}
    for shift in (-4, -2, 2, 4):
        found[f"halting bias {shift:+d}"] = other = copy.deepcopy(model)
        other.transformer.h[model.config.pondering_layer()].halting.halt.bias.data += shift
    return found


def train_once(model, batch):
    """Forward and backward of one batch."""
    model.train()(*batch)[1].backward()
    model.zero_grad()


def decode_row(model, prompt):
    new = decoded_by(model)
    model.eval().generate(prompt[:, :model.config.block_size - new], new, temperature=0)
