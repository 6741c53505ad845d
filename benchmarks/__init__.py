"""What `python bench.py SUBCOMMAND` measures: one module a subcommand, and the parts that they share.

timing.py is the only timer, record.py the JSON record, ../figures.py draws, peers.py nanoGPT and other
engines, runs.py training runs, arms.py the blocks that are trained. A new subcommand `name` is a module
name.py with

    @dataclass(frozen=True)
    class Name(Bench):
        \"\"\"One line, which `python bench.py --help` shows too.\"\"\"
        key: int = 1  # what --help says of it

    def name(cfg):
        ...
        return {"measurements": {...}, "seeds": [...]}      # more fields as it likes

a line "name": "Name" in bench.py's COMMANDS and, for docs/results.md, one in readme.py's TABLES. Which rows
stand on which page of docs/ is in pages.py.
"""
import os
from dataclasses import dataclass
from pathlib import Path

from configurator import require

ROOT = Path(__file__).resolve().parents[1]
CLONE = "type git clone https://github.com/karpathy/nanoGPT and --nanogpt=nanoGPT"


@dataclass(frozen=True)
class Bench:
    """What every subcommand understands."""
    nanogpt: str = ""  # folder of a nanoGPT checkout; without it ours alone is measured, no ratio
    repeats: int = 5  # measurements of each side, in turns A B A B; told as median, quartiles, min, max
    threads: int = 0  # CPU threads of both sides; 0: torch's default; 1 where the machine is shared
    out: str = ""  # file of the JSON record; empty: out-bench/SUBCOMMAND.json

    def __post_init__(self):
        require(self.repeats >= 1, f"repeats={self.repeats} must be at least 1: type --repeats=5")
        require(self.threads >= 0, f"threads={self.threads} must be 1 or more, or 0 for torch's default")
        lacks = [name for name in ("model.py", "train.py")
                 if not os.path.isfile(Path(self.nanogpt) / name)]
        require(not self.nanogpt or not lacks, f"nanogpt='{self.nanogpt}' is no nanoGPT checkout, it has no "
                                               f"{' and no '.join(lacks)}: {CLONE}")
        folder = Path(self.out).parent
        require(os.path.isdir(folder), f"out='{self.out}': the folder {folder} does not exist: make it")


@dataclass(frozen=True)
class Timed(Bench):
    """What subcommands understand too that time calls in this process."""
    cold: int = 0  # MiB read and written before every timed call, so that caches are cold; 0: warm

    def __post_init__(self):
        super().__post_init__()
        require(self.cold >= 0, f"cold={self.cold} must be MiB, more than caches hold, or 0 for warm caches")


@dataclass(frozen=True)
class Recipe(Bench):
    """What subcommands understand too that train models by a recipe in config/."""
    config: str = "config/compare_pylib.py"  # config files of the recipe they share, by commas
    iters: int = 0  # iterations; 0: the recipe's

    def __post_init__(self):
        super().__post_init__()
        check_files(self.config)


@dataclass(frozen=True)
class Models(Recipe):
    """What subcommands understand too that compare several models, one seed of each."""
    threads: int = 1  # CPU threads, of a training run too
    jobs: int = 1  # models trained at a time
    config: str = "config/compare_pylib.py,config/longer_context.py"

    def __post_init__(self):
        super().__post_init__()
        require(self.jobs >= 1, f"jobs={self.jobs} must be at least 1")


def check_files(config):
    """The key `config`: files of this repository, by commas."""
    for file in config.split(","):
        require(os.path.isfile(ROOT / file), f"config='{file}' does not exist")
