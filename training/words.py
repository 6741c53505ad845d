"""What the words of train.py's command line stand for: a text, a block, and the recipe where none is named.

    python train.py book.txt --block=predict --max_iters=200
"""
import ast
import os
import re
from dataclasses import fields
from pathlib import Path

import configurator
from configurator import close_match, require
from data import texts
from training.pretrained import is_gpt2

CONFIGS = Path(__file__).resolve().parents[1] / "config"
BASE = CONFIGS / "train_pylib.py"
ONWARDS = CONFIGS / "retrofit.py"                # on top of it where a trained model goes on
OLD = ("scratch", "resume", "auto")              # values of init_from that are no model


def blocks():
    """{name: its config file} of what --block takes."""
    return {path.stem.removeprefix("bio_"): path for path in sorted(CONFIGS.glob("bio_*.py"))}


def files_of(names):
    """--block's value, several by commas -> their config files."""
    known = blocks()
    for name in (found := names.split(",")):
        require(name in known, f"block='{name}' must be one of {', '.join(known)}{close_match(name, known)}")
    return [str(known[name]) for name in found]


def is_text(word):
    """Is a word that is no --key a text, rather than a config file?"""
    return not word.startswith("-") and Path(word).suffix.lower() not in ("", ".py") and (
        "=" not in word or os.path.isfile(word))


def assigned(path):
    """The names that a config file assigns, read without running it; nothing of one that cannot be read."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return set()
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


class Words:
    """The words of a command line, as keys of the dataclass `cls`.

    given: {key: value} of everything, the base's below what the user's words say; named: the keys of the
    latter; text: the path of a text to train on, else ""; blocks: names for the run's folder; based: is
    BASE below them? It is where no config and no word names data. A config of the user's that sets max_iters
    is a recipe, and its data set nanoGPT's default.
    """

    def __init__(self, argv, cls, model):
        self.cls, self.model_keys = cls, {f.name for f in fields(model)}
        words, files, found = [], [], []
        for word in argv:
            if word == "--block" or word.startswith("--block="):
                names = word.partition("=")[2]
                require(names, f"--block needs a name: type --block=predict; there are {', '.join(blocks())}")
                words += files_of(names)
            elif is_text(word):
                found.append(word)
            else:
                words.append(word)
        files = [word for word in words if not word.startswith("-")]
        self.typed = {word[2:].partition("=")[0]: word.partition("=")[2] for word in words
                      if word.startswith("--")}
        in_files = set().union(*map(assigned, files))
        self.named = set(self.typed) | in_files
        self.blocks = [Path(file).stem.removeprefix("bio_") for file in files if
                       re.fullmatch(r"bio_\w+\.py", Path(file).name) and "out_dir" not in assigned(file)]
        self.text = self.one_text(found, in_files)
        self.based = not self.named & {"dataset"} and "init_from" not in in_files and (
            "max_iters" not in in_files or "tasks" in self.named)
        self.given = configurator.typed_words(cls, [str(BASE)] * self.based + words, files=True)
        if "tasks" in self.named and self.based:
            self.given.pop("dataset")

    def one_text(self, found, in_files):
        require(len(found) < 2, f"{' and '.join(found)}: a run trains on one text; several are a data set: "
                "type python data/prepare.py --input=FOLDER --name=mydata, and --dataset=mydata")
        for key in ("dataset", "tasks"):
            require(not found or key not in (self.typed if key == "dataset" else self.named),
                    f"{found and found[0]} and --{key} both name what is trained on: leave one of them out")
        return found[0] if found else ""

    def prepare_text(self, looks_only=False):
        """Make the text a data set below data/ -> what to print. looks_only: nothing is written."""
        name, said = texts.data_of(self.text, looks_only)
        if looks_only:
            self.given.setdefault("vocab_size", texts.BYTES)
        self.given["dataset"] = name
        self.named.add("dataset")
        return said

    def out_dir(self):
        """The run's folder: as typed, else named after the data and the blocks."""
        start, default = self.given.get("init_from", "scratch"), self.cls.out_dir
        stem = self.given.get("out_dir", default)
        if "out_dir" in self.typed:
            return stem
        if start == "resume" and not self.blocks and "out_dir" not in self.named:
            stem = default                                     # nanoGPT's
        if start not in OLD and "out_dir" not in self.named:
            place = Path(start).parent if os.path.isfile(start) else Path(start)
            stem = plain(place.name) if self.blocks else default
        if self.text or ("dataset" in self.typed and self.blocks):
            stem = plain(self.given["dataset"])
        return "-".join([stem, *self.blocks])

    def keys(self, start):
        """The keys of a run that begins from `start`: of the base, a model that exists takes none, and one of
        ours what is no key of the model and not the data, with the rates of ONWARDS."""
        if not self.based or start == "scratch":
            return dict(self.given)
        found = {key: self.given[key] for key in self.given if key in self.named}
        if start in OLD or is_gpt2(start):
            return found
        left = self.model_keys | {"dataset", "out_dir"}
        base = {key: value for key, value in self.given.items() if key not in left}
        return base | configurator.parse(self.cls, [str(ONWARDS)], files=True) | found

    def about_base(self, start):
        """The line that says that the base was taken; None where it was not."""
        if not self.based or start == "resume" or (start not in OLD and is_gpt2(start)):
            return None
        onwards = f" and config/{ONWARDS.name} (fewer iterations at lower rates)" * (start not in OLD)
        return (f"base: config/{BASE.name}{onwards}, as no config names data"
                + "; --dataset=NAME or a text, python train.py book.txt, takes other data" * (not self.text))


def plain(name):
    """A data set, its path or a run as the name of a folder: out-NAME."""
    name = re.sub(r"[^\w.-]+", "-", Path(name).name).strip("-.")
    return name if name.startswith("out") else f"out-{name}"
