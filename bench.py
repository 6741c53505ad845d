"""Time this repository beside nanoGPT: both sides measured in one command, on the same machine, in turns.

    git clone https://github.com/karpathy/nanoGPT
    python bench.py decode --nanogpt=nanoGPT
    python bench.py train --nanogpt=nanoGPT --out=train.json
    python bench.py compare out-pylib out-pylib-predict --sparse_decode=True

What it prints is for people; the same result is one JSON object in --out, or out-bench/SUBCOMMAND.json.
Without --nanogpt ours alone is measured and no ratio is printed. Absolute times mean little on another
machine: quote ratios.
"""
import ast
import importlib
import os
import sys
from pathlib import Path

from benchmarks import Bench, children, record
from configurator import close_match, configure, require, run_script

# subcommand: class of its keys in the module benchmarks/subcommand.py, whose function subcommand() measures
COMMANDS = {
    "table": "Table",
    "train": "Train",
    "decode": "Decode",
    "race": "Race",
    "ablate": "Ablate",
    "reach": "Reach",
    "mlp": "Mlp",
    "screen": "Screen",
    "compare": "Compare",
    "sparsify": "Sparsify",
    "window": "Window",
    "quality": "Quality",
    "steps": "Steps",
    "depth": "Depth",
    "ponder": "Ponder",
    "grow": "Grow",
    "retrofit": "Retrofit",
    "memory": "Memory",
    "scaling": "Scaling",
    "launches": "Launches",
    "kernels": "Kernels",
    "continual": "Continual",
    "energy": "Energy",
    "fertility": "Fertility",
    "corpus": "Corpus",
    "compress": "Compression",
    "readme": "Readme",
}
PLOT = "plot"                                    # viz/plots.py


def load(name):
    """The class of a subcommand's keys and its function; imports its module, and torch where that does."""
    module = importlib.import_module(f"benchmarks.{name}")
    return getattr(module, COMMANDS[name]), getattr(module, name)


def purpose(name):
    """First line of the docstring of a subcommand's class, read without importing its module."""
    path = Path(__file__).resolve().parent / "benchmarks" / f"{name}.py"
    classes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body
               if isinstance(node, ast.ClassDef) and node.name == COMMANDS[name]]
    return ast.get_docstring(classes[0]).splitlines()[0]


def menu():
    lines = [f"  {name:10}{purpose(name)}" for name in COMMANDS]
    lines += [f"  {PLOT:10}What runs have logged and learnt, drawn; its words are their folders."]
    return "\n".join(["python bench.py SUBCOMMAND [--key=value ...]", "", *examples(), "", *lines, "",
                      "python bench.py SUBCOMMAND --help lists its keys."])


def keys_of(kind, words):
    """The keys of a subcommand, from its words. Words that are no keys: folders of runs where `runs` lists
    them; a folder is the `out_dir` of a subcommand that has one; all others are config files."""
    fields = kind.__dataclass_fields__
    runs = {}
    if "runs" in fields and fields["runs"].type is tuple:
        runs = {"runs": tuple(word for word in words if not word.startswith("-"))}
        words = [word for word in words if word.startswith("-")]
    elif "out_dir" in fields:
        words = [f"--out_dir={word}" if os.path.isdir(word) or word.endswith(".gguf") else word for word in
                 words]
    return configure(kind, words, base=runs, files=True)


def examples():
    """The commands of this file's docstring."""
    return [line for line in __doc__.splitlines() if line.startswith("    python ")]


def main(words):
    """Run the subcommand that the words name; the last line of stdout says where its record is."""
    if words[:1] in (["--help"], ["-h"]):
        return print(menu())
    choice = f"type python bench.py {' or '.join([*COMMANDS, PLOT])}; --help says what they measure"
    require(words, f"a subcommand is missing: {choice}")
    name = words[0]
    require(name in COMMANDS or name == PLOT,
            f"unknown subcommand '{name}'{close_match(name, [*COMMANDS, PLOT])}; {choice}")
    sys.argv[0] += f" {name}"                   # so that help and errors name the command that was typed
    if name == PLOT:                            # its words are folders of runs
        from viz import plots
        return plots.main(words[1:])
    kind, function = load(name)
    cfg = keys_of(kind, words[1:])
    if not issubclass(kind, Bench):             # it reads records and makes none
        return function(cfg)
    children.end_together()
    record.measure(function, cfg, words)


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]), encoding="utf-8" if sys.argv[1:2] == [PLOT] else None)
