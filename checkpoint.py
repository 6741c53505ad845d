"""Checkpoints: nanoGPT's ckpt.pt, written so that a crash at any moment leaves the previous one whole.

Keys: nanoGPT's model, optimizer, model_args, iter_num, best_val_loss, config; ours beside them: tokenizer
(its meta), scaler, seconds. Files are read with weights_only=True: nothing in them executes.
"""
import itertools
import os
import shutil
from pathlib import Path

import torch

from configurator import ConfigError, require
from layers import settle
from model import GPT, GPTConfig

WEIGHTS = {"model": dict, "model_args": dict}                       # what every checkpoint holds
RUN = {"optimizer": dict, "iter_num": int,                          # what going on needs as well
       "best_val_loss": (int, float, torch.Tensor), "config": dict}


def save(checkpoint, path):
    """Write a temporary file, flush it to the disk, rename: `path` is the old file or the new, never a part.

    A full or failing disk is a ConfigError that names the path and the free space; the old file stays.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        remove_quietly(temporary)
        raise ConfigError(f"{path} could not be written ({error}); {free_space(path.parent)} free there, "
                          "the previous checkpoint is unchanged: make room or type "
                          "--out_dir=ANOTHER_FOLDER") from error


def sync_folder(folder):
    """Make a rename durable where possible: Windows has no handle on a folder, some network disks refuse."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def remove_quietly(path):
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass


def free_space(folder):
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB"
    except OSError:
        return "an unknown amount"


def sweep(out_dir):
    """Remove what an interrupted save left behind."""
    for stray in Path(out_dir).glob("*.pt.tmp"):
        remove_quietly(stray)


def find(out_dir, resume=False):
    """The checkpoint of a run. ckpt_last.pt is written on Ctrl-C where ckpt.pt keeps the best weights, and
    removed by the next save of ckpt.pt: resuming prefers it, sampling takes it only without a ckpt.pt."""
    best, last = Path(out_dir) / "ckpt.pt", Path(out_dir) / "ckpt_last.pt"
    order = (last, best) if resume else (best, last)
    path = next((path for path in order if os.path.isfile(path)), None)
    require(path, f"{out_dir} holds no ckpt.pt: train first (python train.py --out_dir={out_dir}) "
                  "or name another --out_dir")
    return path


def load(path, device="cpu", resume=False):
    """Read a checkpoint of ours or nanoGPT's -> dict; a damaged or foreign file is a ConfigError.

    resume: it must hold what a run needs to go on, not the weights alone.
    """
    path = Path(path)
    require(os.path.isfile(path), f"{path} does not exist: name an existing checkpoint")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise ConfigError(f"{path} cannot be read as a checkpoint: damaged, or it holds more than tensors "
                          f"and plain values ({type(error).__name__}: "
                          f"{str(error).splitlines()[0][:120] if str(error) else ''})") from error
    require(isinstance(checkpoint, dict), f"{path} is not a checkpoint but a {type(checkpoint).__name__}")
    wanted = WEIGHTS | RUN if resume else WEIGHTS
    wrong = [key for key, kind in wanted.items() if not isinstance(checkpoint.get(key), kind)]
    require(not wrong, f"{path} is not a checkpoint{' to go on from' * resume}: {', '.join(wrong)} missing "
                       f"or damaged{f', type --init_from={path} to start from its weights' * resume}")
    checkpoint["model"] = {str(key).removeprefix("_orig_mod."): value
                           for key, value in checkpoint["model"].items()
                           if not str(key).endswith(".attn.bias")}   # nanoGPT's mask without flash attention
    return checkpoint


def build_model(checkpoint, path, learns=False, **overrides):
    """A checkpoint's model; overrides replace model arguments that do not change shapes (dropout). learns:
    it is to be trained, so packed weights will not do."""
    packed = any(key.endswith(".meta") for key in checkpoint["model"])
    require(not (packed and learns), f"{path} holds packed 2:4 weights, which cannot learn: name the "
                                     "checkpoint that was packed")
    try:
        model = GPT(GPTConfig(**{**checkpoint["model_args"], **overrides}), init=packed)
        model = settle(model) if packed else model
        model.load_state_dict(checkpoint["model"])
    except (TypeError, RuntimeError, ConfigError) as error:
        raise ConfigError(f"{path}: model_args and weights do not fit this version "
                          f"({str(error).splitlines()[-1].strip()})") from error
    return model


def load_optimizer(optimizer, state, path):
    """Load an optimizer's state; settings (decay, betas, fused or not) stay those that this run chose."""
    try:
        settings = [{k: v for k, v in group.items() if k not in ("params", "lr")}
                    for group in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, ours in zip(optimizer.param_groups, settings):
            group.update(ours)
        for part in getattr(optimizer, "parts", [optimizer]):
            moments = (("momentum_buffer",) if isinstance(part, torch.optim.Muon)
                       else ("exp_avg", "exp_avg_sq"))
            for parameter, key in itertools.product(part.state, moments):
                shape, expected = tuple(part.state[parameter][key].shape), tuple(parameter.shape)
                if shape != expected:                           # torch would notice at the first step only
                    raise ValueError(f"{key} of shape {shape}, expected {expected}")
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"{path}: its optimizer state does not fit this optimizer ({error}): "
                          f"start anew from its weights with --init_from={path}") from error
