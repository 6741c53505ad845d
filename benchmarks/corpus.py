"""Memory while a corpus is prepared, in one go and killed half-way."""
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ROOT, Bench
from configurator import require
from data import tokenizer as tokenizers
from viz.figures import drawing


@dataclass(frozen=True)
class Corpus(Bench):
    """Memory while a generated corpus is prepared: in one go, and killed half-way and begun again."""
    gigabytes: float = 1.0  # size of the generated text
    tokenizer: str = "gpt2"  # the one that data/prepare.py is to use
    every: float = 0.5  # seconds between looks at the memory
    plot: str = ""  # also draw memory against time into this PNG (needs matplotlib)

    def __post_init__(self):
        super().__post_init__()
        require(self.gigabytes > 0, f"gigabytes={self.gigabytes} must be above 0")


def corpus(cfg):
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "generated.jsonl"
        generate(path, cfg.gigabytes * 1e9)
        whole = watched(cfg, Path(work), path, "whole")
        killed = watched(cfg, Path(work), path, "resumed", kill_at=whole["seconds"] / 2)
        resumed = watched(cfg, Path(work), path, "resumed")
        same = whole["sha256"] == resumed["sha256"]
        size = path.stat().st_size
    print(f"peak {whole['peak_mb']:,.0f} MB over {size / 1e9:.2f} GB; after a kill the same files: {same}")
    require(same, "a preparation that was killed and begun again gave other files")
    if cfg.plot:
        with drawing(cfg.plot, 1, (6, 4)) as axes:
            draw_memory(axes, whole, killed, resumed)
    return {"bytes": size, "runs": {"whole": whole, "killed": killed, "resumed": resumed}, "same_files": same}


def generate(path, size):
    """JSON lines of random Korean and English words, as many bytes as asked for, always the same."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(20000)]
    syllables = [chr(code) for code in range(0xAC00, 0xD7A4)]
    words += ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(9000)]
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < size:
            rows = ({"text": " ".join(draw.choices(words, k=300))} for _ in range(500))
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def watched(cfg, work, path, name, kill_at=None):
    """Run data/prepare.py as a process of its own, look at its memory, kill it where asked to."""
    psutil = tokenizers.need("psutil", "measurements of memory")
    code = (f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); import pathlib; "
            "from data import dataset; "
            f"dataset.DATA = pathlib.Path({str(work)!r}); "
            f"runpy.run_path({str(ROOT / 'data' / 'prepare.py')!r}, run_name='__main__')")
    words = [f"--input={path}", f"--name={name}", f"--tokenizer={cfg.tokenizer}", "--val_fraction=0.01"]
    clock, curve = time.perf_counter(), []
    child = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL)
    while child.poll() is None:
        try:
            curve.append([time.perf_counter() - clock, psutil.Process(child.pid).memory_info().rss / 1e6])
        except psutil.NoSuchProcess:
            break
        if kill_at and curve[-1][0] > kill_at:
            child.kill()
        time.sleep(cfg.every)
    seconds, status = time.perf_counter() - clock, child.wait()
    require(status == 0 or kill_at, f"data/prepare.py ended with status {status}")
    sha = {} if kill_at else {f.name: hashlib.sha256(f.read_bytes()).hexdigest()
                              for f in sorted((work / name).glob("*.bin"))}
    print(f"{name}: {seconds:.0f} s, peak {max(mb for _, mb in curve):,.0f} MB, status {status}", flush=True)
    thinned = curve[::max(1, len(curve) // 200)]
    return {"seconds": seconds, "peak_mb": max(mb for _, mb in curve), "curve": thinned, "status": status,
            "sha256": sha}


def draw_memory(axes, whole, killed, resumed):
    for label, run in {"in one go": whole, "killed": killed, "begun again": resumed}.items():
        axes.plot(*zip(*run["curve"]), label=label)
    axes.set(xlabel="seconds", ylabel="resident memory, MB", ylim=(0, None))
    axes.legend()
