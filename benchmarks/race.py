"""The race to nanoGPT's final loss, and the runs that `ablate` and `reach` share with it."""
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks import CLONE, ROOT, Bench
from benchmarks.peers import copy_peer, peer_iterations
from benchmarks.record import OURS, PEER, mean_of
from benchmarks.runs import fixed_loss, losses_of, metrics, seeds, timed_script, trained_model
from benchmarks.timing import measurement
from configurator import require
from data import dataset as datasets
from data import tokenizer as tokenizers
from viz.figures import drawing

# nanoGPT's documented runs on characters of Shakespeare: on a CPU, and on a GPU its config file as it is
DOCUMENTED = {
    "cpu": dict(device="cpu", compile=False, eval_iters=20, log_interval=1, block_size=64, batch_size=12,
                n_layer=4, n_head=4, n_embd=128, max_iters=2000, lr_decay_iters=2000, dropout=0.0),
    "cuda": dict(device="cuda", log_interval=1, block_size=256, batch_size=64, max_iters=5000)}
OWN = {"cpu": "config/race_shakespeare_cpu.py", "cuda": "config/race_shakespeare_gpu.py"}
SAME = {"cpu": "config/train_shakespeare_char_cpu.py", "cuda": "config/train_shakespeare_char.py"}
FAIR = "nanoGPT's model and AdamW in our train.py"


@dataclass(frozen=True)
class Shakespeare(Bench):
    """What race, ablate and reach understand too: runs of a config file on characters."""
    repeats: int = 3  # seeds, one run of each side with each
    threads: int = 2  # CPU threads of a run
    input: str = ""  # the text; empty: data/shakespeare_char, prepared if missing
    config: str = OWN["cpu"]  # config file of our runs

    def __post_init__(self):
        super().__post_init__()
        require(os.path.isfile(ROOT / self.config), f"config='{self.config}' does not exist")


@dataclass(frozen=True)
class Race(Shakespeare):
    """Seconds and tokens to nanoGPT's own final loss, its documented runs on characters of Shakespeare."""
    device: str = "cpu"  # cpu, cuda: of all sides, and which of the documented runs
    config: str = ""  # config file of our runs; empty: config/race_shakespeare_cpu.py, or _gpu.py on cuda
    plot: str = ""  # also draw training loss against seconds and tokens into this PNG (needs matplotlib)

    def __post_init__(self):
        require(self.device in DOCUMENTED, f"device='{self.device}' must be {' or '.join(DOCUMENTED)}: "
                                           "nanoGPT documents a run on each")
        object.__setattr__(self, "config", self.config or OWN[self.device])
        super().__post_init__()
        require(self.nanogpt, f"a race needs both sides: {CLONE}")


def race(cfg):
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        data = race_data(cfg, work)
        sides = {PEER: lambda seed: race_peer(cfg, data, work, seed),
                 OURS: lambda seed: race_ours(cfg, data, work, seed, ROOT / cfg.config, device=cfg.device),
                 FAIR: lambda seed: race_ours(cfg, data, work, seed, ROOT / SAME[cfg.device],
                                              device=cfg.device)}
        return race_report(cfg, race_runs(cfg, sides))


def race_data(cfg, work):
    """The characters of cfg.input, or of data/shakespeare_char, as token files."""
    if cfg.input:
        datasets.write_text(work / "text", cfg.input, "char", 0.1)
    return work / "text" if cfg.input else datasets.prepare_if_missing("shakespeare_char").resolve()


def race_runs(cfg, sides):
    """Every side with every seed, in turns -> {side: what judged() says of each seed}."""
    runs = {name: [] for name in sides}
    for seed in range(cfg.repeats):
        for name, run in sides.items():
            runs[name].append(run(seed))
            print(f"seed {seed}, {name}: {tell(runs[name][-1])}", file=sys.stderr, flush=True)
    return runs


def tell(run):
    return f"val loss {run['val_loss']:.4f}, {run['seconds']:.2f} s, {run['tokens']:,} tokens"


def race_peer(cfg, data, work, seed):
    """nanoGPT's documented command as a process of its own; its seed is a constant in its train.py."""
    folder = work / "peer"
    shutil.rmtree(folder, ignore_errors=True)
    copy_peer(cfg.nanogpt, folder, data, tokenizers.meta_of(data)["vocab_size"])
    script = folder / "train.py"
    text = script.read_text(encoding="utf-8")
    require("manual_seed(1337" in text, f"{cfg.nanogpt}/train.py has no seed 1337: take an unchanged one")
    script.write_text(text.replace("manual_seed(1337", f"manual_seed({1337 + seed}"), encoding="utf-8")
    config = Path(cfg.nanogpt).resolve() / "config" / "train_shakespeare_char.py"
    documented = DOCUMENTED[cfg.device]
    keys = documented | dict(dataset="bench", out_dir="out")
    said, seconds = timed_script(script, [str(config)], keys, folder, cfg)
    rows = peer_iterations(said)
    tokens = documented["batch_size"] * documented["block_size"]
    curve = [[n * tokens, sum(ms for ms, _ in rows[:n]) / 1e3, loss] for n, (_, loss) in enumerate(rows, 1)]
    return judged(folder / "out", data, seconds, documented["max_iters"] * tokens, thinned(curve), cfg.device)


def race_ours(cfg, data, work, seed, config, **changes):
    """One process of our train.py with a config file."""
    out_dir = work / "ours"
    shutil.rmtree(out_dir, ignore_errors=True)
    keys = dict(dataset=data, out_dir=out_dir, seed=1337 + seed, device="cpu") | changes
    _, seconds = timed_script(ROOT / "train.py", [str(config)], keys, work, cfg)
    rows = metrics(out_dir)
    curve = [[row["tokens"], row["seconds"], row["loss"]] for row in rows if "loss" in row]
    return judged(out_dir, data, seconds, rows[-1]["tokens"], thinned(curve), keys["device"])


def thinned(curve, width=10, most=200):
    """[[tokens, seconds, loss]] with losses averaged over `width` neighbours and at most `most` points."""
    step = -(-len(curve) // most) or 1
    return [[t, s, statistics.fmean(loss for *_, loss in curve[max(0, i - width):i + 1])]
            for i, (t, s, _) in enumerate(curve) if i % step == 0]


def validation_of(device):
    """The fixed batches that judge all sides of a race there."""
    return dict(batches=200, batch_size=12, block_size=DOCUMENTED[device]["block_size"])


def judged(out_dir, data, seconds, tokens, curve, device):
    """What a run cost, and its checkpoint's loss on the fixed validation batches, in fp32."""
    model = trained_model(out_dir)
    held, c = model.get_num_params(), model.config
    touched = held - max(0, c.ngram_buckets - (c.ngram_order - 1)) * c.n_embd * (c.ngram_buckets > 0)
    return {"val_loss": fixed_loss(model, data, validation_of(device)), "seconds": seconds, "tokens": tokens,
            "parameters": held, "parameters_touched_per_token": touched, "curve": curve}


def race_report(cfg, runs):
    """Print the race and return its record. The line to pass is nanoGPT's mean final loss."""
    losses = losses_of(runs)
    line = losses["sides"][PEER]["mean"]
    results = {"time": measurement("s", {k: [run["seconds"] for run in v] for k, v in runs.items()}),
               "tokens": measurement("tokens", {k: [run["tokens"] for run in v] for k, v in runs.items()}),
               "val loss": losses}
    print(f"nanoGPT's final loss, mean of {cfg.repeats} seeds: {line:.4f}")
    passed = {name: sum(run["val_loss"] <= line for run in done) for name, done in runs.items()}
    for name, done in runs.items():
        print(f"{name}: val loss {mean_of(losses['sides'][name])}, "
              f"{passed[name]} of {len(done)} pass; median "
              f"{results['time']['sides'][name]['median']:.2f} s, {done[0]['tokens']:,} tokens, "
              f"{done[0]['parameters']:,} parameters held, "
              f"{done[0]['parameters_touched_per_token']:,} touched per token")
    print(f"ours against nanoGPT: {results['time']['ratio'][OURS]:.2f}x less time, start, evaluation and "
          f"saving included; {results['tokens']['ratio'][OURS]:.2f}x fewer tokens")
    if cfg.plot:
        draw_race(cfg.plot, runs, line)
    return {"measurements": results, "line": line, "passed": passed,
            "validation": validation_of(cfg.device), "seeds": seeds(cfg), "runs": runs}


def draw_race(path, runs, line):
    """Training loss against seconds in the loop and against tokens, one curve a seed; the line to pass."""
    with drawing(path, columns=2, size=(10, 4), top=0.88, sharey=True) as axes:
        for color, name in zip(("tab:gray", "tab:red", "tab:blue"), (PEER, OURS, FAIR)):
            for number, run in enumerate(runs[name]):
                for axis, column in zip(axes, (1, 0)):
                    axis.plot([p[column] for p in run["curve"]], [p[2] for p in run["curve"]], color=color,
                              lw=1, label=None if number else name)
        for axis, label in zip(axes, ("seconds in the training loop", "tokens")):
            axis.axhline(line, color="black", lw=0.8, ls="--", label="nanoGPT's final validation loss")
            axis.set(xscale="log", xlabel=label)
        axes[0].set(ylabel="training loss, nats", ylim=(line - 0.4, 3.5))
        axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncol=2, frameon=False)
