"""Write a run's model in another form.

    python -m training.export --out_dir=out --to=packed        2:4 weights, packed, for sample.py
    python -m training.export --out_dir=out --to=packed --quantize=int8     weights of whole numbers, the same
    python -m training.export --out_dir=out --to=safetensors   any model, for sample.py, train.py, other tools
    python -m training.export --out_dir=out --to=hf            a dense model, for transformers
"""
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:                          # typed as a file: the checkout is where modules are
    sys.path[0] = str(Path(__file__).resolve().parents[1])
from configurator import ConfigError, configure, require, run_script
from data import dataset as datasets
from decode import calibrate
from decode.quantized import GGML, OWN, check_quantize, forms_of, held_bytes, kept_levels, quantize
from kernels.build import cpu_library
from layers import settle
from model import build_model
from training import checkpoint as ckpt
from training import estimate, pretrained, rundir
from training.runtime import DTYPES


@dataclass(frozen=True)
class ExportConfig:
    """Every key of export.py."""
    out_dir: str = "out"  # the run whose checkpoint is read
    export_dir: str = ""  # the folder that is written; default: out_dir and the form's name
    to: str = "packed"  # packed (2:4, quantised), safetensors (any model), hf (dense, for transformers)
    dtype: str = "bfloat16"  # of the weights that are written: float32, bfloat16, float16
    quantize: str = ""  # packed: int8, int4, q4_all, own (a GGUF's 4 bits), mlp=4,attn=8,head=8; empty: none
    val: bool | str = False  # with quantize, print the validation loss before and behind it; or of a FOLDER

    def __post_init__(self):
        require(self.to in FORMS, f"to='{self.to}' must be {', '.join(FORMS)}")
        require(self.dtype in DTYPES, f"dtype='{self.dtype}' must be {', '.join(DTYPES)}")
        if self.quantize:
            check_quantize(self.quantize, smaller=True)
        require(not self.quantize or self.to == "packed",
                f"quantize={self.quantize} and to={self.to}: whole numbers are written by --to=packed")
        require(self.quantize or self.val is False, f"val={self.val} has no effect without quantize: type "
                "--quantize=int8 too, or leave val out")


def packed(cfg, loaded, path):
    """-> a function that writes a checkpoint without optimizer whose 2:4 weights are packed, or whose weights
    are whole numbers."""
    if cfg.quantize:
        return whole_numbers(cfg, loaded, path)
    require(loaded["model_args"].get("weights") == "2:4",
            f"{path} has dense weights, to=packed is for 2:4: train one with --weights=2:4")
    model = settle(build_model(loaded, path).to(DTYPES[cfg.dtype]))
    kept = {key: loaded[key] for key in ("model_args", "config", "tokenizer") if key in loaded}
    return lambda folder: ckpt.save({"model": model.state_dict(), **kept}, folder / "ckpt.pt")


def whole_numbers(cfg, loaded, path):
    """-> a function that writes a checkpoint without optimizer whose weights are whole numbers."""
    model = build_model(loaded, path).eval()
    print(quantized(model, cfg.quantize, cfg.val, loaded))
    settle(model).to(DTYPES[cfg.dtype])          # parts in 2:4 that keep their bits are packed
    kept = {key: loaded[key] for key in ("model_args", "config", "tokenizer") if key in loaded}
    whole = {"model": model.state_dict(), "quantize": cfg.quantize, **kept}
    return lambda folder: ckpt.save(whole, folder / "ckpt.pt")


def quantized(model, kind, val, about, folder=""):
    """Quantise a model in eval mode in place -> the sentence that says what it holds now and, where `val` is
    True or a folder of data, its validation losses. about: its checkpoint's `config` and `tokenizer`; folder:
    its own data, where the checkpoint names none."""
    stream, before = None, None
    if val:
        settings = about.get("config") if isinstance(about.get("config"), dict) else {}
        stream = datasets.held_out(val, settings, about.get("tokenizer"), model.config.block_size,
                                   model.config.vocab_size)
        before = estimate.validation_loss(model, stream)
    held, forms = held_bytes(model), forms_of(kind)
    moments, scales = moments_of(model, about, folder) if 4 in forms else (None, "")
    quantize(model, kind, moments=moments)
    said = f"weights quantised to {kind}: {held_bytes(model) / 2**20:.1f} MiB of {held / 2**20:.1f}{scales}"
    if OWN in forms:
        kept = kept_levels(model)
        said += f"; {sum(kept)} of {len(kept)} matrices keep the 4 bits of a file, the others have 8"
    if {*forms} & {*GGML}:
        said += "; ggml's blocks are stored as what they stand for, to tell their loss: a step saves nothing"
    if {*forms} & {4, 8, OWN} and next(model.buffers()).is_cpu and cpu_library()[0] is None:
        said += "; without C kernels they are multiplied as what they stand for"
    if stream:
        after = estimate.validation_loss(model, stream)
        said += "\n" + estimate.beside(before, after, f"quantised to {kind}",
                                       settings.get("dataset") if val is True else val)
    return said


def moments_of(model, about, folder=""):
    """The mean squares of a model's inputs, from the text that it was trained on -> (them, what to print);
    None where that text is not here."""
    try:
        ids, place = datasets.training_text(about.get("config"), folder, calibrate.TOKENS,
                                            model.config.block_size, model.config.vocab_size)
    except ConfigError:
        return None, "; scales by plain least squares: the training data are not here"
    moments = calibrate.input_moments(model, ids.to(next(model.parameters()).device))
    return moments, f"; scales weighted by the inputs of {ids.numel():,} tokens of {place}"


def safetensors(cfg, loaded, path):
    """-> a function that writes model.safetensors and config.json, which ckpt.read takes for a checkpoint."""
    model = build_model(loaded, path).to(DTYPES[cfg.dtype])
    about = {"model_type": pretrained.OURS, "model_args": model.config.model_args(),
             "config": loaded.get("config", {}), "tokenizer": loaded.get("tokenizer")}
    return lambda folder: pretrained.write_folder(folder, model.state_dict(), about)


def hf(cfg, loaded, path):
    """-> a function that writes a dense model in the layout of transformers' GPT2LMHeadModel, or of its
    LlamaForCausalLM."""
    model = build_model(loaded, path).to(DTYPES[cfg.dtype])
    weights, about = pretrained.to_hf(model)
    dataset = (loaded.get("config") or {}).get("dataset")
    needed = {"tokenizer": loaded.get("tokenizer"), "config": dataset and {"dataset": dataset}}
    about |= {"torch_dtype": cfg.dtype, "_name_or_path": MADE_HERE,
              pretrained.OURS: {key: said for key, said in needed.items() if said}}
    own = (loaded.get("tokenizer") or {}).get("hf")

    def write(folder):
        pretrained.write_folder(folder, weights, about)
        if own:                                  # for transformers; sample.py reads what config.json carries
            (folder / "tokenizer.json").write_text(json.dumps(own["file"]), encoding="utf-8")
    return write


FORMS = {"packed": packed, "safetensors": safetensors, "hf": hf}
MADE_HERE = "nanocortex-export"                # in the config.json of --to=hf: tells it from anybody's GPT-2


def folder_of(cfg):
    """The folder that is written: export_dir, or the run's name and the form's, beside the run."""
    if cfg.export_dir:
        return Path(cfg.export_dir)
    run = Path(cfg.out_dir)
    run = run if run.name not in ("", "..") else run.resolve()         # '.' and '..' have their names above
    require(run.name, f"out_dir={cfg.out_dir} has no name to make a folder's of: type --export_dir=FOLDER")
    return run.with_name(f"{run.name}-{cfg.to}")


def check_target(folder, to):
    """A ConfigError unless the folder is new, without a model, or an earlier export of the same form."""
    require(not os.path.lexists(folder) or folder.is_dir(), f"export_dir={folder} is a file: name a folder")
    name = next((name for name in holds_a_run(folder)), None)
    require(name is None, f"export_dir={folder} holds a run ({name}), which an export would overwrite: name "
            "another folder")
    about = pretrained.config_of(folder / "config.json")
    form = ("packed" if (folder / "ckpt.pt").exists() else
            "safetensors" if about.get("model_type") == pretrained.OURS else
            "hf" if about.get("_name_or_path") == MADE_HERE else
            "other" if about or [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*")] else to)
    require(form == to, f"export_dir={folder} holds " + ("a model that export.py did not write" if
            form == "other" else f"an export of another form ({form})") + ": name another folder")


def holds_a_run(folder):
    """The files by which a folder holds a run of train.py or nanoGPT's, or copies of its checkpoints; an
    export's own ckpt.pt, listed without an iteration, is none."""
    mine = {(entry["file"], entry["sha256"]) for entry in ckpt.entries(folder) or ()
            if entry["iter_num"] is None}
    for name in (rundir.LOCK, rundir.LOG, *sorted(path.name for path in folder.glob("ckpt*.pt"))):
        if os.path.lexists(folder / name) and (name, ckpt.sha_of(folder / name)) not in mine:
            yield name


def main(cfg):
    folder = folder_of(cfg)
    require(folder.resolve() != Path(cfg.out_dir).resolve(), f"export_dir={cfg.export_dir} is the "
            "run itself, whose checkpoint would be lost: name another folder")
    check_target(folder, cfg.to)
    loaded, path = ckpt.read(cfg.out_dir)
    require(not loaded.get("quantize"), f"{path} holds quantised weights: name the checkpoint that was "
                                        "quantised")
    write = FORMS[cfg.to](cfg, loaded, path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        require(False, f"export_dir={folder} cannot be made ({error.strerror}): name another folder")
    write(folder)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    print(f"{folder}: {size / 2**20:.2f} MiB; " + (
        f"read it with transformers.AutoModelForCausalLM.from_pretrained('{folder}'), sample with: "
        f"python sample.py --init_from={folder}" if cfg.to == "hf" else
        f"sample with: python sample.py --out_dir={folder}"))


if __name__ == "__main__":
    run_script(lambda: main(configure(ExportConfig)))
