"""Write a run's model in another form.

    python export.py --out_dir=out --to=packed            2:4 weights, packed, for sample.py
    python export.py --out_dir=out --to=safetensors       any model, for sample.py, train.py and other tools
    python export.py --out_dir=out --to=hf                a dense model, for transformers
"""
from dataclasses import dataclass
from pathlib import Path

import checkpoint as ckpt
import pretrained
from configurator import configure, require, run_script
from layers import settle
from runtime import DTYPES


@dataclass(frozen=True)
class ExportConfig:
    """Every key of export.py."""
    out_dir: str = "out"  # the run whose checkpoint is read
    export_dir: str = ""  # the folder that is written; default: out_dir and the form's name
    to: str = "packed"  # packed (2:4 weights), safetensors (any model), hf (dense, in transformers' layout)
    dtype: str = "bfloat16"  # of the weights that are written: float32, bfloat16, float16

    def __post_init__(self):
        require(self.to in FORMS, f"to='{self.to}' must be {', '.join(FORMS)}")
        require(self.dtype in DTYPES, f"dtype='{self.dtype}' must be {', '.join(DTYPES)}")


def packed(cfg, loaded, path):
    """-> a function that writes a checkpoint without optimizer whose 2:4 weights are packed."""
    require(loaded["model_args"].get("weights") == "2:4",
            f"{path} has dense weights, to=packed is for 2:4: train one with --weights=2:4")
    model = settle(ckpt.build_model(loaded, path).to(DTYPES[cfg.dtype]))
    kept = {key: loaded[key] for key in ("model_args", "config", "tokenizer") if key in loaded}
    return lambda folder: ckpt.save({"model": model.state_dict(), **kept}, folder / "ckpt.pt")


def safetensors(cfg, loaded, path):
    """-> a function that writes model.safetensors and config.json, which ckpt.read takes for a checkpoint."""
    model = ckpt.build_model(loaded, path).to(DTYPES[cfg.dtype])
    about = {"model_type": pretrained.OURS, "model_args": model.config.model_args(),
             "config": loaded.get("config", {}), "tokenizer": loaded.get("tokenizer")}
    return lambda folder: pretrained.write_folder(folder, model.state_dict(), about)


def hf(cfg, loaded, path):
    """-> a function that writes a dense model in the layout of transformers' GPT2LMHeadModel."""
    model = ckpt.build_model(loaded, path).to(DTYPES[cfg.dtype])
    weights, about = pretrained.to_hf(model)
    dataset = (loaded.get("config") or {}).get("dataset")
    needed = {"tokenizer": loaded.get("tokenizer"), "config": dataset and {"dataset": dataset}}
    about |= {"torch_dtype": cfg.dtype, pretrained.OURS: {key: said for key, said in needed.items() if said}}
    return lambda folder: pretrained.write_folder(folder, weights, about)


FORMS = {"packed": packed, "safetensors": safetensors, "hf": hf}


def main(cfg):
    folder = Path(cfg.export_dir or f"{cfg.out_dir.rstrip('/')}-{cfg.to}")
    require(folder.resolve() != Path(cfg.out_dir).resolve(), f"export_dir={cfg.export_dir} is the "
            "run itself, whose checkpoint would be lost: name another folder")
    write = FORMS[cfg.to](cfg, *ckpt.read(cfg.out_dir))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        require(False, f"export_dir={folder} cannot be made ({error.strerror}): name another folder")
    write(folder)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    print(f"{folder}: {size / 2**20:.2f} MiB; " + (
        f"read it with transformers.GPT2LMHeadModel.from_pretrained('{folder}'), sample with: "
        f"python sample.py --init_from={folder}" if cfg.to == "hf" else
        f"sample with: python sample.py --out_dir={folder}"))


if __name__ == "__main__":
    run_script(lambda: main(configure(ExportConfig)))
