"""Checkpoints: nanoGPT's ckpt.pt, written so that a crash at any moment leaves the previous one whole.

Keys: nanoGPT's model, optimizer, model_args, iter_num, best_val_loss, config; ours beside them: tokenizer
(its meta), scaler, seconds. Files are read with weights_only=True: nothing in them executes.

manifest.json holds the SHA-256 of every checkpoint of its folder; a file that is not what was written is not
used: `read` says so and takes the one before it. nanoGPT's folders have no manifest and are read without.
"""
import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from pathlib import Path

import torch

from configurator import ConfigError, require
from layers import settle
from model import GPT, GPTConfig
from pretrained import is_tied, plain_names, read_ours

WEIGHTS = {"model": dict, "model_args": dict}                       # what every checkpoint holds
RUN = {"optimizer": dict, "iter_num": int,                          # what going on needs as well
       "best_val_loss": (int, float, torch.Tensor), "config": dict}


class Hashed:
    """A file open for writing that knows the SHA-256 and the size of what went through it."""

    def __init__(self, file):
        self.file, self.flush, self.sha, self.bytes = file, file.flush, hashlib.sha256(), 0

    def write(self, block):
        self.sha.update(block)
        self.bytes += len(block)
        return self.file.write(block)


def save(checkpoint, path, keep=1):
    """Write a temporary file, flush it to the disk, rename: `path` is the old file or the new, never a part.

    keep: how many saves of this path stay; the older ones are ckpt-ITERATION.pt. The manifest lists the new
    hash before the rename and forgets the old one behind it, so it fits whatever a crash leaves. A full or
    failing disk is a ConfigError that names the path and the free space; the old file stays.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            hashed = Hashed(file)
            torch.save(checkpoint, hashed)
            file.flush()
            os.fsync(file.fileno())
        known = entries(path.parent) or []
        older = keep_older(path, known, keep, checkpoint.get("iter_num"))
        new = {"file": path.name, "iter_num": checkpoint.get("iter_num"), "bytes": hashed.bytes,
               "sha256": hashed.sha.hexdigest()}
        write_manifest(path.parent, [new, *older, *known])
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        remove_quietly(temporary)
        raise ConfigError(f"{path} could not be written ({reason(error)}); {free_space(path.parent)} free "
                          "there, the previous checkpoint is unchanged: make room or name "
                          "another folder") from error
    VERIFIED[path.resolve()] = new["sha256"]
    forget(path.parent, [new, *older, *(entry for entry in known if entry["file"] != path.name
                                        and not entry["file"].startswith("ckpt-"))])


# -------------------------------------------------- the manifest --------------------------------------------

MANIFEST = "manifest.json"
NAMES = re.compile(r"ckpt(_last|-\d+)?\.pt")        # what a manifest may speak of, and a save may remove
VERIFIED = {}                                     # {path: SHA-256 of what this process wrote or read there}


def entries(folder):
    """The manifest's entries, newest first; None without a manifest that can be believed."""
    try:
        said = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
        found = said["checkpoints"]
        if said["sha256"] != digest(found):
            return None
        return [entry for entry in found if NAMES.fullmatch(entry["file"])]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def digest(found):
    """Of the entries themselves: a damaged manifest is not believed."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def write_manifest(folder, found):
    """Replace the manifest; OSError where that fails."""
    found = list({(entry["file"], entry["sha256"]): entry for entry in found}.values())
    temporary = folder / (MANIFEST + ".tmp")
    try:
        with open(temporary, "wb") as file:
            said = json.dumps({"checkpoints": found, "sha256": digest(found)}, indent=1)
            file.write((said + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / MANIFEST)
    except OSError:
        remove_quietly(temporary)
        raise


def keep_older(path, known, keep, iteration):
    """Give the file at `path` a second name, that of its iteration -> entries of the older files that stay.

    It stays only if it is what was written there, and not a save of the same iteration.
    """
    older = [entry for entry in known if entry["file"].startswith("ckpt-")]
    last = next((entry for entry in known if entry["file"] == path.name
                 and entry["sha256"] == (VERIFIED.get(path.resolve()) or sha_of(path))), None)
    if path.name == "ckpt.pt" and keep > 1 and last and last["iter_num"] not in (None, iteration):
        name = f"ckpt-{last['iter_num']:06d}.pt"
        if not (path.parent / name).exists():
            second_name(path, path.with_name(name))
        older = [last | {"file": name}, *(entry for entry in older if entry["file"] != name)]
    return older[:max(0, keep - 1)]


def second_name(path, other):
    """The same file under another name, or a copy where the file system has no links."""
    try:
        os.link(path, other)
    except OSError:
        temporary = other.with_name(other.name + ".tmp")
        shutil.copyfile(path, temporary)
        os.replace(temporary, other)


def forget(folder, stay):
    """Remove the older checkpoints that are not in `stay`, and what the manifest says of them. What fails
    here leaves a file too many and a manifest that is true of all of them."""
    names = {entry["file"] for entry in stay}
    try:
        write_manifest(folder, stay)
    except OSError:
        return
    for path in folder.glob("ckpt-*.pt"):
        if NAMES.fullmatch(path.name) and path.name not in names:
            remove_quietly(path)


def sha_of(path):
    """SHA-256 of a file, or None where there is none to read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def why_not(path, sha, found):
    """None if the SHA-256 of a file is what the manifest says of it, else what is wrong."""
    if sha in [entry["sha256"] for entry in found if entry["file"] == path.name]:
        VERIFIED[path.resolve()] = sha
        return None
    other = next((entry["file"] for entry in found if entry["sha256"] == sha), None)
    return (f"{path} holds what {other} should hold: they were exchanged" if other else
            f"{path} is damaged, its SHA-256 is not that of {path.parent / MANIFEST}; if you put it there "
            "yourself, delete the manifest")


# -------------------------------------------------- files and folders ---------------------------------------

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


def reason(error):
    """The disk's own error, where torch has answered it with one of its own."""
    while error.__context__ is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


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
    for pattern in ("*.pt.tmp", MANIFEST + ".tmp"):
        for stray in Path(out_dir).glob(pattern):
            remove_quietly(stray)


# -------------------------------------------------- reading -------------------------------------------------

def find(out_dir, resume=False):
    """The checkpoints of a run, best first; last, what export.py wrote as safetensors.

    ckpt_last.pt is written on Ctrl-C where ckpt.pt keeps the best weights, and removed by the next save of
    ckpt.pt: resuming prefers it, sampling takes it only without a ckpt.pt. Behind them come the older ones.
    """
    folder, names = Path(out_dir), ["ckpt_last.pt", "ckpt.pt"] if resume else ["ckpt.pt", "ckpt_last.pt"]
    older = sorted((p.name for p in folder.glob("ckpt-*.pt") if NAMES.fullmatch(p.name)),
                   key=lambda name: int(name[5:-3]), reverse=True)
    paths = [folder / name for name in (*names, *older, "model.safetensors") if os.path.isfile(folder / name)]
    require(paths, f"{out_dir} holds no ckpt.pt: train first (python train.py --out_dir={out_dir}) "
                   "or name another folder")
    return paths


def read(place, device="cpu", resume=False):
    """The best intact checkpoint of a run's folder, or the one file that is named -> (dict, its path).

    What is damaged is told on stderr and left out; without an intact one a ConfigError says why.
    """
    paths = find(place, resume) if resume or not os.path.isfile(place) else [Path(place)]
    found, wrong, hashes = entries(paths[0].parent), [], {}
    for path in paths:
        try:
            if found is not None and NAMES.fullmatch(path.name):
                hashes[path] = sha_of(path)
                bad = why_not(path, hashes[path], found)
                require(bad is None, bad)
            return told(load(path, device, resume), path, wrong, found)
        except ConfigError as error:
            wrong.append(str(error))
    exchanged = [(entry["iter_num"] or 0, path) for entry in found or () for path in hashes
                 if hashes[path] == entry["sha256"]]
    require(exchanged, "; ".join(wrong))
    path = max(exchanged)[1]
    return told(load(path, device, resume), path, wrong, found)


def start_of(init_from, out_dir, restarted=False):
    """What init_from comes to: auto resumes where out_dir has a checkpoint; processes of a launch that
    torchrun has restarted (on any host, see World.restarted) resume where this launch has saved one."""
    there = any(os.path.isfile(Path(out_dir) / name) for name in ("ckpt.pt", "ckpt_last.pt"))
    if init_from == "auto":
        return "resume" if there else "scratch"
    if not (restarted and there) or init_from == "resume":
        return init_from
    return "resume" if read(out_dir, resume=True)[0].get("launch") == launch() else init_from


def launch():
    """torchrun's name of this launch, the same in all its restarts; None without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def told(loaded, path, wrong, found):
    """-> (loaded, path), and on stderr what was wrong on the way there."""
    if wrong:
        note(f"{'; '.join(wrong)}. Going on with {path}, iteration {loaded.get('iter_num')}")
    if found is None and "keep_checkpoints" in (loaded.get("config") or ()):
        note(f"{path} is read unverified: {path.parent / MANIFEST} is missing or damaged")
    return loaded, path


def note(sentence):
    """On stderr, once, whatever the number of processes."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {sentence}", file=sys.stderr, flush=True)


def load(path, device="cpu", resume=False):
    """Read a checkpoint of ours or nanoGPT's, or exported safetensors -> dict; a damaged or foreign file is a
    ConfigError.

    resume: it must hold what a run needs to go on, not the weights alone.
    """
    path = Path(path)
    require(os.path.isfile(path), f"{path} does not exist: name an existing checkpoint")
    try:
        checkpoint = (read_ours(path) if path.suffix == ".safetensors" else
                      torch.load(path, map_location=device, weights_only=True))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{path} cannot be read as a checkpoint: damaged, or it holds more than tensors "
                          f"and plain values ({type(error).__name__}: "
                          f"{str(error).splitlines()[0][:120] if str(error) else ''})") from error
    require(isinstance(checkpoint, dict), f"{path} is not a checkpoint but a {type(checkpoint).__name__}")
    wanted = WEIGHTS | RUN if resume else WEIGHTS
    wrong = [key for key, kind in wanted.items() if not isinstance(checkpoint.get(key), kind)]
    require(not wrong, f"{path} is not a checkpoint{' to go on from' * resume}: {', '.join(wrong)} missing "
                       f"or damaged{f', type --init_from={path} to start from its weights' * resume}")
    checkpoint["model"] = {key: value for key, value in plain_names(checkpoint["model"], path).items()
                           if not key.endswith(".attn.bias")}   # nanoGPT's mask without flash attention
    return checkpoint


def build_model(checkpoint, path, learns=False, **overrides):
    """A checkpoint's model; overrides replace model arguments that do not change shapes (dropout). learns:
    it is to be trained, so packed weights will not do."""
    for field in dataclasses.fields(GPTConfig):
        value, kind = checkpoint["model_args"].get(field.name, field.default), type(field.default)
        require(type(value) is kind or (kind is float and type(value) is int),
                f"{path}: model_args and weights do not fit this version ({field.name}={str(value)[:40]!r}, "
                f"expected {kind.__name__})")
    packed = any(key.endswith(".meta") for key in checkpoint["model"])
    require(not (packed and learns), f"{path} holds packed 2:4 weights, which cannot learn: name the "
                                     "checkpoint that was packed")
    try:
        model = GPT(GPTConfig(**{**checkpoint["model_args"], **overrides}), init=packed)
        model = settle(model) if packed else model
        model.load_state_dict(checkpoint["model"])
        require(not model.config.tie_weights or is_tied(checkpoint["model"]),
                "tie_weights=True, but its head is not its embedding")
    except (TypeError, RuntimeError, ConfigError) as error:
        raise ConfigError(f"{path}: model_args and weights do not fit this version "
                          f"({str(error).splitlines()[-1].strip()})") from error
    return model


def lay_out(state, key, parameter):
    """Give a moment the memory layout of its parameter: torch's fused kernels walk both as one."""
    if state[key].stride() != parameter.stride() and not hasattr(parameter, "full_tensor"):
        state[key] = torch.empty_like(parameter).copy_(state[key])


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
                lay_out(part.state[parameter], key, parameter)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"{path}: its optimizer state does not fit this optimizer ({error}): "
                          f"start anew from its weights with --init_from={path}") from error
