"""Write a run's model in another form.

    python export.py --out_dir=out --to=packed --export_dir=out-packed
"""
from dataclasses import dataclass
from pathlib import Path

import checkpoint as ckpt
from configurator import configure, require
from layers import settle
from runtime import DTYPES


@dataclass(frozen=True)
class ExportConfig:
    """Every key of export.py."""
    out_dir: str = "out"  # the run whose checkpoint is read
    export_dir: str = ""  # the folder that is written; default: out_dir and the form's name
    to: str = "packed"  # packed: 2:4 weights as values and 2-bit places, for sample.py
    dtype: str = "bfloat16"  # of the weights that are written: float32, bfloat16, float16

    def __post_init__(self):
        require(self.to in FORMS, f"to='{self.to}' must be {' or '.join(FORMS)}")
        require(self.dtype in DTYPES, f"dtype='{self.dtype}' must be {', '.join(DTYPES)}")


def packed(cfg):
    """A checkpoint without optimizer whose 2:4 weights are packed."""
    path = ckpt.find(cfg.out_dir)
    loaded = ckpt.load(path)
    require(loaded["model_args"].get("weights") == "2:4",
            f"{path} has dense weights, to=packed is for 2:4: train one with --weights=2:4")
    model = settle(ckpt.build_model(loaded, path).to(DTYPES[cfg.dtype]))
    kept = {key: loaded[key] for key in ("model_args", "config", "tokenizer") if key in loaded}
    return {"model": model.state_dict(), **kept}


FORMS = {"packed": packed}


def main(cfg):
    folder = Path(cfg.export_dir or f"{cfg.out_dir.rstrip('/')}-{cfg.to}")
    require(folder.resolve() != Path(cfg.out_dir).resolve(), f"export_dir={cfg.export_dir} is the "
            "run itself, whose checkpoint would be lost: name another folder")
    written, path = FORMS[cfg.to](cfg), folder / "ckpt.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        require(False, f"export_dir={folder} cannot be made ({error.strerror}): name another folder")
    ckpt.save(written, path)
    print(f"{path}: {path.stat().st_size / 2**20:.2f} MiB; sample with: python sample.py --out_dir={folder}")


if __name__ == "__main__":
    main(configure(ExportConfig))
