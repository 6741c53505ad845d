"""How many tokens a longer run needs to pass nanoGPT's best validation loss."""
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ROOT
from benchmarks.race import Shakespeare, race_data
from benchmarks.runs import metrics, seeds, timed_script, trained_model


@dataclass(frozen=True)
class Reach(Shakespeare):
    """Tokens until a config's validation loss passes nanoGPT's longer line, characters of Shakespeare."""
    repeats: int = 1  # seeds, one run each
    config: str = "config/long_shakespeare.py"  # config file of the run
    line: float = 1.4697  # best val loss of nanoGPT's GPU run, as its README says
    line_tokens: int = 81_920_000  # what that run reads: 5000 iterations of 64 sequences of 256
    device: str = "auto"  # auto, cpu, cuda, cuda:0, mps


def reach(cfg):
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        data = race_data(cfg, work)
        runs = [reaching(cfg, data, work, seed) for seed in range(cfg.repeats)]
    for run in runs:
        print(f"best val loss {run['best']:.4f} at {run['best_tokens']:,} tokens, "
              + (f"{cfg.line} passed at {run['passed_tokens']:,} tokens, {run['passed_seconds']:.0f} s, "
                 f"{cfg.line_tokens / run['passed_tokens']:.1f}x fewer tokens" if run["passed_tokens"] else
                 f"{cfg.line} not passed in {run['tokens']:,} tokens")
              + f"; {run['parameters']:,} parameters")
    return {"measurements": {}, "line": cfg.line, "line_tokens": cfg.line_tokens, "seeds": seeds(cfg),
            "runs": runs}


def reaching(cfg, data, work, seed):
    """One run of the config with a seed -> its validation curve, and where that passes the line."""
    out_dir = work / "reach"
    shutil.rmtree(out_dir, ignore_errors=True)
    keys = dict(dataset=data, out_dir=out_dir, seed=1337 + seed, device=cfg.device)
    timed_script(ROOT / "train.py", [str(ROOT / cfg.config)], keys, work, cfg)
    rows = metrics(out_dir)
    curve = [[row["tokens"], row["seconds"], row["val_loss"]] for row in rows if row.get("val_loss")]
    curve = curve[1:]                            # not the untrained model
    best = min(curve, key=lambda point: point[2])
    passed = next((point for point in curve if point[2] <= cfg.line), (None, None))
    return {"best": best[2], "best_tokens": best[0], "passed_tokens": passed[0], "passed_seconds": passed[1],
            "tokens": curve[-1][0], "parameters": trained_model(out_dir).get_num_params(), "curve": curve}
