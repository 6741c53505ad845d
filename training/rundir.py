"""One folder, one run: the lock of a run's folder, the run's id, and where the run before it goes.

run.lock is made with O_EXCL and says which process trains in its folder: pid, when that process began, host,
the launch of torchrun. A killed run leaves its lock behind; the next one looks whether the process lives,
says that it is gone, and takes the folder. Nothing here waits longer than PATIENCE seconds.
"""
import atexit
import itertools
import json
import math
import os
import re
import secrets
import time
from pathlib import Path

from configurator import ConfigError, require
from training import checkpoint as ckpt
from training.processes import born, fate, machine, text_of

LOCK = "run.lock"
LOG = "metrics.jsonl"
PATIENCE = 10.0                                 # seconds that a restart waits for its predecessor to end
PREVIOUS = re.compile(r"previous-(\d+)")


# -------------------------------------------------- the lock -----------------------------------------------

def launch():
    """torchrun's name of this launch, None without one of its own: all that are given none are "none"."""
    return ckpt.launch() if ckpt.launch() != "none" else None


class Lock:
    """run.lock of a folder, held by this process from `take` to `release` or its end."""

    def __init__(self, path):
        self.path, self.pid = Path(path), os.getpid()
        said = {"pid": self.pid, "born": born(self.pid) or "", **machine(), "launch": launch(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self.text = json.dumps(said)

    def check(self):
        """Is the folder still this run's? Asked before every save: a lock may be deleted by hand, or taken by
        another host. A ConfigError where another run has it."""
        found = text_of(self.path)
        if not found and not self.path.exists():
            try:
                return create(self.path, self.text)
            except OSError:
                found = text_of(self.path)
        require(found in ("", self.text), f"{self.path.parent} was taken over by {name_of(parsed(found))}: "
                "this run stops here and leaves what is there as it is")

    def release(self):
        if os.getpid() == self.pid and text_of(self.path) == self.text:         # not in a fork's end
            ckpt.remove_quietly(self.path)


def create(path, text):
    """Make a file that must not be there; FileExistsError where it is."""
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        ckpt.remove_quietly(path)
        raise


def parsed(text):
    """What a lock says; {} where it says nothing that can be used."""
    try:
        said = json.loads(text)
        kinds = {"pid": int} | dict.fromkeys(("born", "host", "boot", "space", "machine", "since"), str)
        return said if all(type(said[key]) is kind for key, kind in kinds.items()) and said["pid"] > 0 else {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def name_of(said):
    return f"process {said['pid']} of {said['host']}, since {said['since']}" if said else "another run"


def take(folder, key="out_dir"):
    """Make `folder` this process's -> its Lock; a ConfigError where another run has it. key: what names it.

    A lock whose process is gone is taken with a note. Restarts of one launch of torchrun take their
    predecessor's: from another host at once, on this one as soon as it has ended.
    """
    folder = Path(folder)
    lock, began, displaced = Lock(folder / LOCK), time.monotonic(), False
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{key}={folder} cannot be made ({error.strerror}): type "
                          f"--{key}=ANOTHER_FOLDER") from error
    while True:
        try:
            create(lock.path, lock.text)
            time.sleep(0.05 * displaced)                        # two may have taken one stale lock: see it
            if not displaced or text_of(lock.path) == lock.text:
                atexit.register(lock.release)
                return lock
        except FileExistsError:
            pass
        except OSError as error:
            raise ConfigError(f"{lock.path} cannot be written ({error.strerror}): type "
                              f"--{key}=ANOTHER_FOLDER") from error
        displaced |= answer_to(lock.path, text_of(lock.path), time.monotonic() - began, key)


def answer_to(path, text, waited, key):
    """To a lock that is there: displace it -> True, wait a little for what may change -> False, or raise."""
    said = parsed(text)
    state = fate(said) if said else "unknown" if text else "gone"       # empty: killed before its first word
    ours = bool(said and launch() and said.get("launch") == launch())
    if not said and waited < 1:                                 # it is being written
        time.sleep(0.05)
        return False
    if (state == "gone" or (ours and state == "unknown")) and displace(path, text):
        if not ours:
            ckpt.note(f"{path} was left by {name_of(said)}, which is gone: this run takes the folder")
        return True
    require(waited < PATIENCE and (ours or state == "gone"), {
        "alive": f"{key}={path.parent}: {name_of(said)}, trains there: stop it first, or type "
                 f"--{key}=ANOTHER_FOLDER",
        "gone": f"{path} is of a run that is gone but cannot be removed: delete it",
        "unknown": f"{key}={path.parent}: {path} is of {name_of(said)}, which cannot be checked from here: "
                   f"if no run trains there, delete that file; else type --{key}=ANOTHER_FOLDER"}[state])
    time.sleep(0.05)
    return False


def displace(path, text):
    """Remove a lock that says `text`, and no other -> whether this process did. A rename is one step, so of
    several processes that found the lock stale one alone gets it."""
    aside = path.with_name(f"{LOCK}.{secrets.token_hex(4)}.tmp")
    try:
        if text_of(path) != text:
            return False
        os.replace(path, aside)
    except OSError:
        return False
    ours = text_of(aside) == text
    if not ours and not path.exists():                          # somebody was faster: this is the new one
        try:
            os.replace(aside, path)
        except OSError:
            pass
    ckpt.remove_quietly(aside)
    return ours


# -------------------------------------------------- the run before -----------------------------------------

def new_id():
    """A run's id: in its checkpoints, its manifest and every row of its log."""
    return secrets.token_hex(6)


def id_of(folder, resumed):
    """The id of the run that a folder is to hold: its checkpoint's, where it resumes; that of the attempt
    before, where torchrun starts processes again before their first save; else a new one."""
    about = ckpt.manifest(folder)[1]
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if not resumed and restarted and about.get("launch") == ckpt.launch():
        return about.get("run") or new_id()
    said = (resumed or {}).get("run")
    return said if isinstance(said, str) else new_id()


def kept_as_another(path, run):
    """Before a run goes on with a log that has rows of another run, as after copying by hand: the log gets
    another name -> whether it did."""
    ids = {str(said.get("run", run)) for line in path.read_bytes().splitlines() if (said := row_of(line))}
    if ids - {run}:
        other = next(other for n in itertools.count(1)
                     if not (other := path.with_name(f"metrics-of-another-run-{n}.jsonl")).exists())
        os.replace(path, other)
        ckpt.note(f"{path} was of another run than the checkpoint: it is kept as {other}")
    return bool(ids - {run})


def rows_before(path, iteration):
    """The rows of a log that come before an iteration, as text; a row that a crash has torn is none."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return "".join(line for line in lines if line.endswith("\n") and iteration_of(line) < iteration)


def iteration_of(line):
    try:
        return json.loads(line)["iter"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def row_of(line):
    """A row of a log as a dict; {} where it is none."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def begin(folder, run, source=""):
    """Make a folder the new run's: what another run has left there goes to folder/previous-N, which is said.

    Files that no manifest lists stay, but for those whose names the new run needs. One run before is kept,
    and the last one with a checkpoint; source, what the new run starts from, is never removed.
    """
    folder = Path(folder)
    known, about = ckpt.manifest(folder)
    if known is not None and about.get("run") == run:           # a restart before its first save
        return
    listed = [entry["file"] for entry in known or ()]
    names = [name for name in dict.fromkeys(["ckpt.pt", "ckpt_last.pt", *listed])
             if (folder / name).is_file()]
    rows = os.path.isfile(folder / LOG) and os.path.getsize(folder / LOG) > 0
    try:
        if names or rows:
            put_away(folder, names, run, source)
        else:
            ckpt.write_manifest(folder, [], about_run(run))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made ready for another run ({error.strerror}): type "
                          "--out_dir=ANOTHER_FOLDER") from error
    strays = [path.name for path in folder.glob("ckpt-*.pt") if ckpt.NAMES.fullmatch(path.name)]
    if strays:
        ckpt.note(f"{', '.join(sorted(strays))} in {folder} is not of this run and stays as it is")


def about_run(run):
    """What a manifest says of its run."""
    return {"run": run} | ({"launch": ckpt.launch()} if ckpt.launch() else {})


def put_away(folder, names, run, source):
    """Move a run's files to the next previous-N. The manifest goes first: from then on, whenever this is
    killed, nothing that is still in the folder can be taken for the new run's."""
    numbers = previous(folder)
    place = folder / f"previous-{max(numbers, default=0) + 1}"
    place.mkdir()
    known, about = ckpt.manifest(folder)
    last = next((entry["iter_num"] for entry in known or () if entry["file"] in names), None)
    ckpt.write_manifest(place, known or [], about)
    ckpt.write_manifest(folder, [], about_run(run))
    for name in [*names, *[LOG] * os.path.isfile(folder / LOG)]:
        os.replace(folder / name, place / name)
    ckpt.sync_folder(place)
    older = [folder / f"previous-{number}" for number in sorted(numbers, reverse=True)]
    if not names:                                               # a log alone does not push weights out
        weights = next((path for path in older if (path / "ckpt.pt").exists()
                        or (path / "ckpt_last.pt").exists()), None)
        older = [path for path in older if path != weights]
    gone = [path.name for path in older if not within(source, path) and remove(path)]
    what = f"its last save of iteration {last}" if last is not None else (
        "with a checkpoint" if names else "its log alone, without a checkpoint")
    ckpt.note(f"{folder} held another run ({what}): it is in {place} now"
              + f"; removed: {', '.join(gone)}" * bool(gone))


def previous(folder):
    """The numbers of a folder's previous-N."""
    return [int(match[1]) for path in folder.iterdir() if (match := PREVIOUS.fullmatch(path.name))]


def within(source, folder):
    """Is the path `source` the folder, or inside it?"""
    source = Path(source).resolve()
    return Path(folder).resolve() in (source, *source.parents)


def remove(place):
    """Remove a previous run -> whether it is gone. A folder that holds anything but checkpoints that its
    manifest lists, the manifest and a log stays as it is: it is the user's, or a run trains there."""
    known, _ = ckpt.manifest(place)
    listed = {(entry["file"], entry["sha256"]) for entry in known or ()}
    paths = [*place.iterdir()] if place.is_dir() else []
    if known is None or any(path.name not in (LOG, ckpt.MANIFEST) and (path.name, ckpt.sha_of(path))
                            not in listed for path in paths):
        return False
    for path in paths:
        ckpt.remove_quietly(path)
    try:
        place.rmdir()
    except OSError:
        return False
    return True
