"""Early exits and self-speculation beside the honest rival: dense models of every shallower depth."""
from dataclasses import dataclass
from functools import partial
from itertools import chain
from operator import eq

from benchmarks import Models
from benchmarks.runs import QUALITY_VALIDATION, fixed_loss, trained_models, validation_of
from benchmarks.timing import interleave, measurement, spread
from configurator import require
from data import dataset as datasets
from decode import sampling
from viz.figures import drawing

FULL = "all layers"                              # of the model with exits, one token after the other


@dataclass(frozen=True)
class Depth(Models):
    """Early exits and drafts of a trained model beside dense models of every shallower depth."""
    layers: int = 6  # layers of the model with exits
    exits: str = "1,2,3,4,5"  # its exits, by commas
    layer_dropout: float = 0.1  # of the model with exits
    thresholds: str = "0.3,0.5,0.6,0.7,0.8,0.9,0.95"  # exit thresholds of the curve, by commas
    drafts: str = "2,3,4,6"  # tokens drafted at a time, by commas
    prompts: int = 20  # prompts from the validation text
    new: int = 50  # greedy tokens behind each of them
    plot: str = ""  # also draw loss against layers and against tokens/s into this PNG (needs matplotlib)

    def __post_init__(self):
        super().__post_init__()
        require(self.prompts >= 1 and self.new >= 1,
                f"prompts={self.prompts} and new={self.new} must be at least 1")


def depth(cfg):
    data = datasets.prepare_if_missing("pylib").resolve()
    depths, flags = depths_of(cfg), sides_of(cfg)
    models = trained_models(cfg, data, flags)
    model, validation = models["exits"], validation_of(models["exits"])
    points = {name: {"layers": n, "val_loss": fixed_loss(models[name], data, validation)}
              for name, n in zip(flags, depths)}
    points[FULL] = {"layers": cfg.layers, "val_loss": fixed_loss(model, data, validation)}
    for threshold in cfg.thresholds.split(","):
        leave_at(model, float(threshold))
        loss = fixed_loss(model, data, validation)
        points[f"threshold {threshold}"] = {"layers": layers_per_token(model), "val_loss": loss}
    prompts = validation_prompts(data, cfg, model.config.block_size)
    rates = measurement("tokens/s", depth_rates(cfg, models, points, prompts), higher_is_better=True)
    for name, s in rates["sides"].items():
        points[name]["tokens_per_second"] = s["median"]
    drafted = {f"{n} from exit {at}": drafts_of(cfg, models, prompts, n, at)
               for at in depths[:-1][:3] for n in map(int, cfg.drafts.split(","))}
    tell_depth(points, drafted)
    if cfg.plot:
        draw_depth(cfg.plot, points)
    return {"measurements": {"decode": rates}, "validation": QUALITY_VALIDATION, "points": points,
            "drafted": drafted, "parameters": {name: m.get_num_params() for name, m in models.items()},
            "probe_bytes": 4 * model.config.n_embd, "head_bytes": 4 * model.lm_head.weight.numel(),
            "seeds": [1337]}


def depths_of(cfg):
    return [int(n) for n in cfg.exits.split(",")] + [cfg.layers]


def sides_of(cfg):
    """{model: its flags behind the recipe}: the dense ones, then the one with exits."""
    flags = {f"dense, {n} layers": dict(n_layer=n) for n in depths_of(cfg)}
    return flags | {"exits": dict(n_layer=cfg.layers, exits=cfg.exits, layer_dropout=cfg.layer_dropout)}


def beside_twins(cfg):
    """(flags, flags of the dense model of as many layers)."""
    return [(sides_of(cfg)["exits"], sides_of(cfg)[f"dense, {cfg.layers} layers"])]


def leave_at(model, threshold):
    """Early exits at this threshold, None: never; the counts begin anew."""
    exits = model.choose(leave_at=threshold).transformer.exits
    exits.layers_run = exits.tokens_run = 0


def layers_per_token(model):
    return model.transformer.exits.layers_run / model.transformer.exits.tokens_run


def validation_prompts(data, cfg, block):
    """cfg.prompts rows (1, n) of the validation text, so long that cfg.new tokens fit behind them."""
    length = block - cfg.new
    require(length >= 1, f"new={cfg.new} must be below the block of {block}")
    stream = datasets.TokenStream(data, "val", block, cfg.prompts, seed=0)
    return list(stream.batch(0)[0][:, :min(length, block // 2)].split(1))


def depth_rates(cfg, models, points, prompts):
    """{name: tokens/s of each round} of the dense models and of every threshold."""
    def run(name):
        dense = models.get(name)
        if dense is None:
            leave_at(models["exits"], float(name.split()[-1]) if name != FULL else None)
        for prompt in prompts[:4]:
            (dense or models["exits"]).generate(prompt, cfg.new, temperature=0)
    seconds = interleave({name: partial(run, name) for name in points}, cfg.repeats)
    return {name: [4 * cfg.new / s for s in values] for name, values in seconds.items()}


def drafts_of(cfg, models, prompts, drafts, at):
    """Greedy self-speculation on all prompts beside the same model's and its dense twin's greedy decoding."""
    model, twin = models["exits"], models[f"dense, {cfg.layers} layers"]
    leave_at(model, None)
    speculation, sampler = sampling.Speculation(model, drafts, at), sampling.Sampler(temperature=0)
    found = {}

    def run(name, stream):
        found[name] = [list(map(int, stream(prompt, cfg.new, sampler))) for prompt in prompts]
    sides = {"drafts": partial(run, "drafts", speculation.stream),
             FULL: partial(run, FULL, partial(sampling.stream, model)),
             "dense twin": partial(run, "dense twin", partial(sampling.stream, twin))}
    seconds = interleave(sides, cfg.repeats)
    tokens = cfg.new * len(prompts)
    rates = {name: spread([tokens / s for s in values]) for name, values in seconds.items()}
    layer, head = (sum(p.numel() for p in part.parameters())
                   for part in (model.transformer.h[0], model.lm_head))
    count, L = cfg.repeats + 1, cfg.layers
    rounds, proposed = speculation.rounds / count / tokens, speculation.proposed / count / tokens
    weights = proposed * (at * layer + head) + rounds * ((L - at) * layer + head)
    return {"equal": sum(map(eq, chain(*found["drafts"]), chain(*found[FULL]))), "tokens": tokens,
            "accepted": speculation.accepted / speculation.proposed, "tokens_per_round": 1 / rounds,
            "ceiling": (L * layer + head) / weights, "rates": rates,
            "to_twin": rates["drafts"]["median"] / rates["dense twin"]["median"],
            "to_full": rates["drafts"]["median"] / rates[FULL]["median"]}


def tell_depth(points, drafted):
    print("layers per token, val loss, tokens/s (median)")
    for name, p in points.items():
        print(f"  {name:20}{p['layers']:6.2f}{p['val_loss']:9.4f}{p['tokens_per_second']:10,.0f}")
    print("self-speculation, greedy: tokens equal to all layers'; share of drafts accepted; tokens/s against "
          "all layers and the dense twin; ceiling, by weights read")
    for name, d in drafted.items():
        print(f"  {name:20}{d['equal']} of {d['tokens']}, {d['accepted']:.0%}, {d['to_full']:.2f}x, "
              f"{d['to_twin']:.2f}x, {d['ceiling']:.2f}x")


def draw_depth(path, points):
    """Loss against layers per token, and against tokens/s."""
    with drawing(path, columns=2, size=(9, 4), sharey=True) as axes:
        for axis, key, label in ((axes[0], "layers", "mean layers per token"),
                                 (axes[1], "tokens_per_second", "tokens/s, greedy, batch 1")):
            for prefix, style in (("dense", "o-k"), ("threshold", "o-r")):
                shown = [p for name, p in points.items() if name.startswith(prefix)]
                shown += [points[FULL]] * (prefix == "threshold")
                title = "dense models of that depth" if prefix == "dense" else "one model, exits by threshold"
                axis.plot([p[key] for p in shown], [p["val_loss"] for p in shown], style, label=title)
            axis.set(xlabel=label)
        axes[0].set(ylabel="validation loss, nats")
        axes[0].legend(frameon=False, fontsize=8)
