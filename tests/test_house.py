"""The plan of the house: who may import whom. Arrows run down only, from floor to floor."""
import ast

import pytest
from conftest import ROOT

# from the top down; names beside each other may import each other
FLOORS = (
    {"train", "sample", "bench", "training.export", "data.compress", "data.prepare"},       # commands
    {"benchmarks", "viz"},
    {"model"},
    {"bio_modules"},
    {"training", "data"},
    {"layers", "decode"},
    {"sparse_kernels"},
    {"kernels"},
    {"configurator"},
)
TOP = {"model", "layers", "bio_modules", "sparse_kernels", "configurator", "train", "sample", "bench"}


def floor_of(name):
    """The floor of a module: its own, or its folder's; None for what is not ours."""
    for number, rooms in enumerate(FLOORS):
        if name in rooms:
            return number
    return next((number for number, rooms in enumerate(FLOORS) if name.partition(".")[0] in rooms), None)


def imported(path):
    """The modules of ours that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


WINGS = "benchmarks", "viz", "training", "data", "decode", "kernels"
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
           for pattern in ("*.py", *(f"{wing}/*.py" for wing in WINGS))
           for path in sorted(ROOT.glob(pattern)) if path.name != "__init__.py"}


@pytest.mark.parametrize("name", MODULES)
def test_no_file_imports_one_of_a_higher_floor(name):
    here = floor_of(name)
    climbs = [found for found in imported(MODULES[name]) if (floor_of(found) or here) < here]
    assert here is not None and not climbs, f"{name} imports {climbs}"


def test_eight_files_stand_on_the_top_floor():
    assert {path.stem for path in ROOT.glob("*.py")} == TOP
