"""Checkpoints: nanoGPT's ckpt.pt, written so that a crash at any moment leaves the previous one whole.

Keys: nanoGPT's model, optimizer, model_args, iter_num, best_val_loss, config; ours beside them: tokenizer
(its meta), scaler, seconds, run (its id). Files are read with weights_only=True: nothing in them executes.

manifest.json holds the SHA-256 of every checkpoint of its folder and the run's id; a file that is not what
was written is not used: `read` says so and takes the one before it. What the manifest does not list is the
user's: never removed, and read only if it is of the same run. nanoGPT's folders are read without one.
"""
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
from training.pretrained import plain_names, read_ours

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

    keep: how many saves of this path stay; the older ones are ckpt-ITERATION.pt. The manifest lists a file
    before it is there and until it is gone, so it fits whatever a crash leaves. A full or failing disk is a
    ConfigError that names the path and the free space; the old file stays.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            hashed = Hashed(file)
            torch.save(checkpoint, hashed)
            file.flush()
            os.fsync(file.fileno())
        known, about = manifest(path.parent)
        known, about = known or [], {key: checkpoint[key] for key in ABOUT if key in checkpoint} or about
        older = older_of(path, known, keep, checkpoint.get("iter_num"))
        new = {"file": path.name, "iter_num": checkpoint.get("iter_num"), "bytes": hashed.bytes,
               "sha256": hashed.sha.hexdigest()}
        write_manifest(path.parent, [new, *older, *known], about)
        for entry in older[:1]:                                 # the others have their names
            if not (path.parent / entry["file"]).exists():
                second_name(path, path.parent / entry["file"])
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        remove_quietly(temporary)
        raise ConfigError(f"{path} could not be written ({reason(error)}); {free_space(path.parent)} free "
                          "there, the previous checkpoint is unchanged: make room or name "
                          "another folder") from error
    VERIFIED[path.resolve()] = new["sha256"]
    forget(path.parent, [new, *older, *(entry for entry in known if entry["file"] != path.name
                                        and not entry["file"].startswith("ckpt-"))], known, about)


# -------------------------------------------------- the manifest --------------------------------------------

MANIFEST = "manifest.json"
NAMES = re.compile(r"ckpt(_last|-\d+)?\.pt")        # what a manifest may list, and a save may remove
ABOUT = ("run", "launch")                         # what a manifest takes over from its checkpoints
VERIFIED = {}                                     # {path: SHA-256 of what this process wrote or read there}


def manifest(folder):
    """What a folder's manifest says -> (its entries, newest first, {"run": id, ...}); (None, {}) without one
    that can be believed."""
    try:
        said = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
        found, about = said["checkpoints"], {key: said[key] for key in ABOUT if key in said}
        if said["sha256"] != digest(found, about):
            return None, {}
        return [entry for entry in found if NAMES.fullmatch(entry["file"])], about
    except (OSError, ValueError, KeyError, TypeError):
        return None, {}


def entries(folder):
    """The manifest's entries, newest first; None without a manifest that can be believed."""
    return manifest(folder)[0]


def digest(found, about):
    """Of the entries themselves: a damaged manifest is not believed."""
    return hashlib.sha256(json.dumps([found, about] if about else found, sort_keys=True).encode()).hexdigest()


def write_manifest(folder, found, about=()):
    """Replace the manifest; OSError where that fails."""
    found, about = list({(entry["file"], entry["sha256"]): entry for entry in found}.values()), dict(about)
    temporary = folder / (MANIFEST + ".tmp")
    try:
        with open(temporary, "wb") as file:
            said = json.dumps({**about, "checkpoints": found, "sha256": digest(found, about)}, indent=1)
            file.write((said + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / MANIFEST)
    except OSError:
        remove_quietly(temporary)
        raise


def older_of(path, known, keep, iteration):
    """Entries of the older files that stay behind a save; the first is that of the file at `path`, under the
    name of its iteration that it is to get.

    It stays only if it is what was written there, and not a save of the same iteration. A name that a file of
    the user's has gets another zero.
    """
    listed = {entry["file"] for entry in known}
    older = [entry for entry in known if entry["file"].startswith("ckpt-")
             and (path.parent / entry["file"]).exists()]
    last = next((entry for entry in known if entry["file"] == path.name
                 and entry["sha256"] == (VERIFIED.get(path.resolve()) or sha_of(path))), None)
    if path.name == "ckpt.pt" and keep > 1 and last and last["iter_num"] not in (None, iteration):
        names = (f"ckpt-{last['iter_num']:0{digits}d}.pt" for digits in itertools.count(6))
        name = next(name for name in names if name in listed or not (path.parent / name).exists())
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


def forget(folder, stay, known, about):
    """Remove the older checkpoints that the manifest listed and that are not in `stay`, then what it says of
    them. A file of another size is not what it lists: the user's. What fails here leaves a file too many and
    a manifest that is true of all of them."""
    names, left = {entry["file"] for entry in stay}, []
    for entry in known:
        path = folder / entry["file"]
        if entry["file"] not in names and entry["file"].startswith("ckpt-") and is_of(path, entry):
            remove_quietly(path)
            left += [entry] * path.exists()
    try:
        write_manifest(folder, [*stay, *left], about)
    except OSError:
        return


def discard(path):
    """Remove a checkpoint that the manifest lists, and no other."""
    if any(entry["file"] == path.name and is_of(path, entry) for entry in entries(path.parent) or ()):
        remove_quietly(path)


def is_of(path, entry):
    """Has the file the size that the manifest says?"""
    try:
        return path.stat().st_size == entry["bytes"]
    except OSError:
        return False


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


def is_listed(path, found):
    """Is the file one that the manifest lists? Without a manifest, or of another kind, all are."""
    return found is None or not NAMES.fullmatch(path.name) or path.name in [entry["file"] for entry in found]


def of_the_same_run(loaded, path, about):
    """Is a checkpoint that the manifest does not list, a copy by hand, of the folder's run? -> loaded"""
    require(loaded.get("run") == about.get("run"), f"{path} is of another run than {path.parent / MANIFEST}: "
            f"type --init_from={path} to start from its weights")
    return loaded


# -------------------------------------------------- files and folders ---------------------------------------

def stamps(folder):
    """Tells whether a folder's checkpoints were written again: {name: what changes then}."""
    found = {path.name: path.stat() for path in Path(folder).glob("ckpt*.pt")}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def set_aside(folder, used):
    """What stands where the next saves go, is not what was written there and is not what is used: damaged, or
    put there by hand. It gets another name instead of being overwritten."""
    found = entries(folder)
    for path in [Path(folder) / name for name in ("ckpt.pt", "ckpt_last.pt")]:
        if found is None or path == used or not path.is_file():
            continue
        if sha_of(path) not in [entry["sha256"] for entry in found]:
            other = next(other for n in itertools.count(1)
                         if not (other := path.with_name(f"{path.name}.aside-{n}")).exists())
            try:
                os.replace(path, other)
            except OSError as error:
                raise ConfigError(f"{path} is not what was written there and cannot be renamed "
                                  f"({error.strerror}): rename it yourself") from error
            note(f"{path} is kept as {other}")


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
    for stray in Path(out_dir).glob("*.tmp"):
        name = stray.name.removesuffix(".tmp")
        if NAMES.fullmatch(name) or name == MANIFEST or name.startswith("run.lock."):
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


def read(place, device="cpu", resume=False, tries=20):
    """The best intact checkpoint of a run's folder, or the one file that is named -> (dict, its path).

    What is damaged or of another run is named on stderr and left out; without any other a ConfigError says
    why. Copies by hand, which no manifest lists, come last; the one file that is named may be one. Where
    another process saves meanwhile, it is looked at again.
    """
    named = os.path.isfile(place) and not resume
    paths = [Path(place)] if named else find(place, resume)
    (found, about), wrong, hashes = manifest(paths[0].parent), [], {}
    for path in sorted(paths, key=lambda path: not is_listed(path, found)):
        try:
            if found is not None and NAMES.fullmatch(path.name):
                hashes[path] = sha_of(path)
            if not is_listed(path, found):
                copied = hashes[path] in [entry["sha256"] for entry in found]
                loaded = load(path, device, resume)
                loaded = loaded if named or copied else of_the_same_run(loaded, path, about)
                return with_notes(loaded, path, wrong, found if copied else None)
            bad = why_not(path, hashes[path], found) if path in hashes else None
            require(bad is None, bad)
            return with_notes(load(path, device, resume), path, wrong, found)
        except ConfigError as error:
            if tries and manifest(path.parent) != (found, about):
                return read(place, device, resume, tries - 1)
            wrong.append(str(error))
    exchanged = [(entry["iter_num"] or 0, path) for entry in found or () for path in hashes
                 if hashes[path] == entry["sha256"]]
    require(exchanged, "; ".join(wrong))
    path = max(exchanged)[1]
    return with_notes(load(path, device, resume), path, wrong, found)


def to_go_on_from(out_dir):
    """Does a folder hold what init_from=resume would take, or complain of? What its manifest does not list
    counts if it is of the same run."""
    try:
        paths = [path for path in find(out_dir, resume=True) if NAMES.fullmatch(path.name)]
    except ConfigError:
        return False
    found, about = manifest(out_dir)

    def counts(path):
        try:
            return is_listed(path, found) or bool(of_the_same_run(load(path), path, about))
        except ConfigError:
            return False
    return any(map(counts, paths))


def start_of(init_from, out_dir, restarted=False):
    """What init_from comes to: auto resumes where out_dir has a checkpoint; processes of a launch that
    torchrun has restarted (on any host, see World.restarted) resume where this launch has saved one."""
    if init_from == "auto":
        return "resume" if to_go_on_from(out_dir) else "scratch"
    if not restarted or init_from == "resume" or not to_go_on_from(out_dir):
        return init_from
    return "resume" if read(out_dir, resume=True)[0].get("launch") == launch() else init_from


def launch():
    """torchrun's name of this launch, the same in all its restarts; None without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def with_notes(loaded, path, wrong, found):
    """-> (loaded, path), and on stderr what was wrong on the way there."""
    if wrong:
        note(f"{'; '.join(wrong)}. Going on with {path}, iteration {loaded.get('iter_num')}")
    if found is None and "keep_checkpoints" in (loaded.get("config") or ()):
        note(f"{path} is read unverified: {path.parent / MANIFEST} "
             + ("is missing or damaged" if entries(path.parent) is None else "does not list it"))
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
    checkpoint["model"] = names_of_today(plain_names(checkpoint["model"], path))
    return checkpoint


RENAMED = {"transformer.hourglass.": "transformer.hierarchy.", ".attn.sharpen.": ".attn.query_gain."}


def names_of_today(weights):
    """A state dict as earlier versions and nanoGPT wrote it: names that have changed since, without nanoGPT's
    masks and the second entries of the depth module, which was registered twice."""
    found = {}
    for key, value in weights.items():
        for old, new in RENAMED.items():
            key = key.replace(old, new)
        if not key.startswith("through.") and not key.endswith(".attn.bias"):
            found[key] = value
    return found


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
