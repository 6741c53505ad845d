"""What a training step costs with every block."""
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks import Recipe
from benchmarks.arms import check_arms, chosen_arms, steps_alone
from benchmarks.record import TWIN
from configurator import require
from data import dataset as datasets


@dataclass(frozen=True)
class Steps(Recipe):
    """Milliseconds of a training step of every block beside its dense twin, alone on the machine."""
    repeats: int = 3  # processes of each arm, in turns
    threads: int = 2  # CPU threads of a run
    arms: str = ""  # some of the arms, by commas; empty: all
    iters: int = 60  # iterations of a process, the first ten left out

    def __post_init__(self):
        super().__post_init__()
        require(self.iters > 10, f"iters={self.iters} must be above 10, so many are left out")
        check_arms(self)


def steps(cfg):
    data = datasets.prepare_if_missing("pylib").resolve()
    with tempfile.TemporaryDirectory() as work:
        ms = steps_alone(cfg, data, Path(work), chosen_arms(cfg), cfg.iters)
    print(f"a training step of {cfg.config}, {cfg.threads} threads, ms: median (least to most)")
    twin = ms.get(TWIN, {}).get("median")
    for arm, s in ms.items():
        s["to_twin"] = s["median"] / twin if twin else None
        print(f"  {arm:20}{s['median']:8.2f} ({s['min']:.2f} to {s['max']:.2f})"
              + (f"  {s['to_twin']:.2f} times its dense twin's" if twin else ""))
    return {"measurements": {"training step": {"unit": "ms", "sides": ms}}, "seeds": [1337]}
