"""Pages of docs/ promise: every arm has one, their links lead somewhere, their defaults are the code's."""
import ast
import importlib
import json
import re
import shutil
from dataclasses import fields, is_dataclass
from functools import cache

import pytest
from commands import FENCE, commands_of, split_command
from conftest import ROOT, train_config
from test_table import result  # noqa: F401  what a table finds, for the pages

import bench
from benchmarks import arms, broken, pages, readme, report
from benchmarks.record import TWIN
from configurator import ConfigError, parse, require
from model import GPTConfig
from sample import SampleConfig
from training.words import Words
from viz import plots

PAGES = sorted((ROOT / "docs").glob("*.md"))
TOLD = [ROOT / "README.md", ROOT / "README.ko.md", ROOT / "CONTRIBUTING.md", *PAGES]
every_page = pytest.mark.parametrize("path", TOLD, ids=lambda path: path.name)


@cache
def defaults():
    """{key: default} of the config classes of model.py, train.py and sample.py, read without running them."""
    found = {}
    for script in ("sample.py", "model.py", "train.py"):
        for node in ast.walk(ast.parse((ROOT / script).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                found |= {part.target.id: ast.literal_eval(part.value) for part in node.body
                          if isinstance(part, ast.AnnAssign) and part.value}
    return found


def test_every_mechanism_has_a_page_with_its_rows():
    for name in pages.MECHANISMS:
        text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert readme.BEGIN.format(name) in text, name
        assert f"]({name}.md)" in (ROOT / "docs" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", pages.MECHANISMS)
def test_a_mechanisms_page_opens_with_a_verdict_and_what_to_type(name):
    """The verdict of an arm of the main table is that of its record: benchmarks.pages.verdict_line."""
    lines = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").splitlines()
    record = json.loads((ROOT / "results" / pages.TABLE).read_text(encoding="utf-8"))
    said = pages.verdict_line(pages.MECHANISMS[name], record)
    assert "```" in lines[:14]
    if name != "presets":
        assert lines[2].startswith("**Verdict:** ") and lines[3] == "" and lines[2] == (said or lines[2])


@pytest.mark.parametrize("name", ["compare", "data", "looking", "nanogpt", "retrofit", "scaling", "switches"])
def test_a_page_on_use_shows_what_to_type_before_it_explains(name):
    assert "```" in (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").splitlines()[:10]


def test_every_arm_of_the_table_that_is_no_rival_has_a_page():
    assert set(arms.ARMS) - set(arms.DENSE) - set(broken.BREAK) == set(pages.PAGE_OF)


def test_every_config_of_a_block_is_told_of():
    told = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    configs = [path.name for kind in ("bio", "continual") for path in (ROOT / "config").glob(f"{kind}_*.py")]
    assert len(configs) > 20 and [name for name in configs if name not in told] == []


def test_defaults_on_the_pages_are_those_of_the_code():
    rows = [(path.name, *row) for path in PAGES
            for row in re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", path.read_text(encoding="utf-8"), re.M)]
    assert len(rows) > 40
    assert [row for row in rows if repr(defaults()[row[1]]) != row[2]] == []


@every_page
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8"))
    lost = [link for link in links if not link.startswith("http") and not (path.parent / link).exists()]
    assert [link for link in lost if not link.endswith(".png")] == []


@every_page
def test_config_files_that_are_named_exist(path):
    named = set(re.findall(r"config/\w+\.py", path.read_text(encoding="utf-8")))
    own = set(re.findall(r"^# (config/\w+\.py)", path.read_text(encoding="utf-8"), re.M))  # CONTRIBUTING's
    assert [name for name in named - own if not (ROOT / name).is_file()] == []


def test_both_readmes_have_the_same_sections_commands_and_blocks():
    english, korean = (path.read_text(encoding="utf-8") for path in TOLD[:2])
    blocks = re.compile(r"^```\n(.*?)^```", re.M | re.S)
    assert blocks.findall(english) == blocks.findall(korean)
    assert english.count("\n## ") == korean.count("\n## ") and english.count("\n- ") == korean.count("\n- ")
    assert re.findall(r"<!-- rows: (\w+)", english) == re.findall(r"<!-- rows: (\w+)", korean)
    assert max(len(text.splitlines()) for text in (english, korean)) <= 130


# ------------------------------------------------ the commands -------------------------------

OURS = ("train.py", "sample.py", "bench.py", "data/prepare.py", "training/export.py", "data/compress.py")


def check_command(script, words):
    """ConfigError where a script of ours does not take these words; values are not looked at."""
    require((ROOT / script).is_file(), f"{script} does not exist")
    if script == "train.py":
        files = [word for word in words if word.endswith(".py") and not (ROOT / word).is_file()]
        require(files == [] or files == ["config/bio_divisive.py"], f"{files} do not exist")
        Words([str(ROOT / word) if word.endswith(".py") else word for word in words
               if word not in files and word != "--help"], train_config(), GPTConfig)
    elif script == "bench.py" and words[:1] != ["--help"]:
        name, *rest = words
        require(name in bench.COMMANDS or name == bench.PLOT, f"bench.py has no {name}")
        keys = plots.Plots if name == bench.PLOT else bench.load(name)[0]
        parse(keys, [word for word in rest if word.startswith("-")])
    elif script != "bench.py":
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        keys = next(kind for kind in reversed(list(vars(module).values())) if is_dataclass(kind)
                    and isinstance(kind, type) and kind.__module__ == module.__name__)
        parse(keys, [word for word in words if word.startswith("-")])


@every_page
def test_every_command_of_a_page_exists(path):
    found = [split_command(words) for words in commands_of(path)]
    for script, words in found:
        if script.startswith("tests/"):
            assert (ROOT / script).is_file(), script
        elif script:
            check_command(script, words)
    assert found or path.name not in ("README.md", "README.ko.md", "data.md", "compare.md", "nanogpt.md")


@pytest.mark.parametrize("line", [
    "python trian.py", "python train.py --n_hed=4", "python train.py config/none.py", "python bench.py decod",
    "python bench.py decode --shpe=x", "python sample.py --sparse=1", "python -m data.compres c FILE",
    "torchrun --nproc_per_node=2 train.py --fspd", "python train.py --block=none",
    "python data/prepare.py --nme=x", "python bench.py plot x --oot=y"])
def test_a_command_that_does_not_exist_is_noticed(tmp_path, line):
    page = tmp_path / "page.md"
    for text in (f"```\n{line}\n```\n", f"Type `{line}`.\n", f"```\npython train.py && {line}\n```\n"):
        page.write_text(text)
        with pytest.raises(ConfigError):
            for words in commands_of(page):
                check_command(*split_command(words))


KNOWN = {"help", "val", "standalone", "nproc_per_node", "max", "nnodes", "rdzv_backend", "rdzv_endpoint",
         "rdzv_id", "suite", "score", "key"}                         # of torchrun, pytest, or any key


@every_page
def test_every_flag_that_a_page_names_is_a_key_of_some_script(path):
    kinds = train_config(), SampleConfig, plots.Plots, *(bench.load(name)[0] for name in bench.COMMANDS)
    keys = {f.name for kind in kinds for f in fields(kind)} | KNOWN | {"block"}
    for script in ("data/prepare.py", "training/export.py", "data/compress.py", "data/bilingual/prepare.py",
                   "data/pylib/prepare.py", "data/fineweb_edu/prepare.py", "data/corpus.py"):
        source = (ROOT / script).read_text(encoding="utf-8")
        keys |= set(re.findall(r"^    (\w+): \w+ = ", source, re.M))
    spans = re.findall(r"`([^`\n]*--[^`\n]*)`", path.read_text(encoding="utf-8"))
    named = {flag for span in spans for flag in re.findall(r"(?<![\w-])--(\w+)", span)}
    assert sorted(named - keys) == []


def python_of(path):
    """The Python snippets of a page; CONTRIBUTING.md's are applied by tests/test_contributing.py."""
    blocks = FENCE.findall(path.read_text(encoding="utf-8"))
    return [body for language, body in blocks if language == "python"]


SNIPPETS = [(path, number) for path in TOLD if path.name != "CONTRIBUTING.md"
            for number in range(len(python_of(path)))]


@pytest.mark.parametrize("path, number", SNIPPETS, ids=lambda value: getattr(value, "name", value))
def test_a_snippet_of_a_page_runs(path, number, finished, monkeypatch):
    """Beside a run called out-pylib."""
    place = finished.folder / "pages"
    place.mkdir(exist_ok=True)
    shutil.copytree(finished.folder / "out", place / "out-pylib", dirs_exist_ok=True)
    monkeypatch.chdir(place)
    exec(compile(python_of(path)[number], f"{path.name}, snippet {number}", "exec"), {})


def test_there_are_snippets_to_run():
    assert len(SNIPPETS) >= 2


# ------------------------------------------------ the main table -----------------------------

@pytest.fixture
def records(result):  # noqa: F811
    """A table's record in which `good` is called osc."""
    result["rows"]["osc"] = result["rows"].pop("good") | {"arm": "osc"}
    for axis in result["axes"].values():
        axis["to_frontier"]["osc"] = axis["to_frontier"].pop("good")
    return {pages.TABLE: result | {"hardware": {"cpu": "x", "gpu": None, "torch": "2"}}}


def test_the_main_table_links_its_arms_and_hides_no_loser(records):
    lines = pages.main_table(pages.LANGUAGES[""], records).splitlines()
    rows = [line.removeprefix("| ").split(" | ") for line in lines[2:] if line.startswith("|")]
    rows = {row[0]: row for row in rows}
    assert [name for name in rows if name.startswith("[")] == ["[osc](docs/osc.md)"]
    osc, twin = rows["[osc](docs/osc.md)"], rows[TWIN]
    assert osc[1] == "2.0500" and osc[2].startswith("+0.0500 (p ") and osc[3:6] == ["2.00x", "2.00x", "1.00"]
    assert osc[6].startswith("decode time, decode bytes") and twin[6] == "rival |"
    assert rows["bad"][6] == "no |" and rows["leaky"][6].startswith("no: it sees the future")
    assert not any("tokens" in name for name in rows)                # the twin's longer runs have no speed


def test_a_page_shows_its_arms_below_the_dense_twin_and_what_is_missing(records):
    page = pages.Page(("osc", "ponder"))
    lines = pages.own_rows(page, records)
    assert [line.split(" | ")[0] for line in lines[2:4]] == [f"| {TWIN}", "| osc"]
    assert "Not in that record: `ponder`." in lines
    assert "not measured yet" in pages.own_rows(page, {})[0] and pages.own_rows(pages.Page(), {}) == []


def test_longer_runs_stand_beside_the_dense_model_of_the_same_seeds(tmp_path):
    """Runs of other lengths, and of seeds that the dense model has not, are left out."""
    for n, (arm, seed, loss, iters) in enumerate([
            (TWIN, 1, 2.0, pages.LONGER), (TWIN, 2, 1.0, pages.LONGER), ("osc", 1, 1.5, pages.LONGER),
            ("osc", 3, 9.0, pages.LONGER), ("osc", 2, 9.0, 350), ("gone", 3, 9.0, pages.LONGER),
            ("topk", 3, 9.0, pages.LONGER)]):
        copies = {"copying": 0.1 * seed} if arm == TWIN else {"copying": None} if seed == 1 else {}
        (tmp_path / f"{n}.json").write_text(json.dumps(dict(arm=arm, seed=seed, val_loss=loss, iters=iters)
                                                       | copies))
    (tmp_path / "plan.json").write_text(json.dumps(dict(iters=pages.LONGER)))
    lines = pages.longer_table({}, tmp_path).splitlines()
    assert lines[2:4] == [f"| {TWIN} | 1.5000 | 2 |  | 0.10, 0.20 |  |",
                          "| [osc](docs/osc.md) | 1.5000 | 1 | -0.5000 |  |  |"] and not lines[4]


def test_training_steps_have_a_column_for_each_shape_and_machine():
    def record(cpu, case, **shares):
        return {"hardware": {"cpu": cpu}, "measurements": {f"training step, {case}": {"sides": {
            arm: {"to_twin": share} for arm, share in ({TWIN: 1.0} | shares).items()}}}}
    found = dict(zip(pages.STEPS, (
        record("Intel(R) Xeon(R) Processor", "small, 1 threads", osc=1.25, topk=2.0),
        record("AMD EPYC", "small, 2 threads", osc=0.8))))
    assert pages.step_table(found).splitlines()[:4] == [
        "| arm | small, 1 thread, Intel Xeon | small, 2 threads, AMD EPYC |", "|---|---|---|",
        "| [osc](docs/osc.md) | 0.80x | 1.25x |", "| [topk](docs/mlp_topk.md) | 0.50x |  |"]


def test_a_page_takes_the_rows_of_other_records_that_fit_it():
    row = {"layers": 2.0, "val_loss": 1.5, "tokens_per_second": 100.0}
    record = {"subcommand": "ponder", "points": {"dense, 2 layers": row, "ponder, cost 0.1": row},
              "hardware": {}}
    said = readme.mechanism(pages.Page((), {"p.json": "ponder.*"}), {"p.json": record})
    assert said.count("\n") == 2 and "| ponder, cost 0.1 | 2.00 | 1.5000 | 100 |" in said


@pytest.mark.parametrize("language", pages.LANGUAGES)
def test_the_opening_quotes_the_records(language, records):
    words = pages.LANGUAGES[language]
    named = {pages.GPT2: ("decode", {"ours": 12.34, "ours float32": 5.67, "columns": 23.45}),
             pages.RACE: ("time", {"ours": 7.89})}
    records |= {name: {"measurements": {of: {"ratio": ratio}}, "hardware": {"cpu": "x", "threads": 2}}
                for name, (of, ratio) in named.items()}
    said = pages.opening(words, records)
    said = " ".join(said.split())
    assert all(figure in said for figure in ("12", "6", "23", "8", "columns"))
    tests = len(report.corrected(records[pages.TABLE])[1])
    assert words.verdict.format(arms=2, paying=1, losing=1, tests=tests, sure=1) in said and tests == 6


@pytest.mark.parametrize("language", pages.LANGUAGES)
def test_the_short_table_says_what_each_block_in_a_trained_model_costs_and_saves(language):
    """As it decodes; of more blocks than rows those that lose least, and the one that loses most."""
    names = [f"block {n}" for n in range(9)]
    runs = {TWIN: [dict(val_loss=2.0)], f"{TWIN}, taught": [dict(val_loss=1.75)],
            "dense/2": [dict(val_loss=2.5)], "predict": [dict(val_loss=2.0, decoding=2.125)]}
    runs |= {name: [dict(val_loss=3.0 + n), dict(val_loss=4.0 + n)] for n, name in enumerate(names)}
    rates = {TWIN: 1000.0, "dense, int8": 1500.0, "predict": 1250.0}
    decode = {TWIN: dict(loss=2.0, weight_bytes=4e6), "dense, int8": dict(loss=2.01, weight_bytes=2e6)}
    record = {"runs": runs, "decode": decode, "tokens": 1280,
              "dense": {"iters": 3200, "model_args": dict(n_layer=4, n_embd=128)}, "seeds": [1, 2],
              "config": dict(more=320), "hardware": dict(cpu="x", threads=1),
              "measurements": {"decode": {"sides": {side: {"median": rate} for side, rate in rates.items()}}}}
    lines = pages.brief_table(pages.LANGUAGES[language], {pages.RETROFITS: record}).splitlines()
    rows = [line for line in lines[2:] if line.startswith("|")]
    assert rows[:3] == ["| dense | 2.000 |  | -0.250 | 4.00 | 1,000 (1.00x) | 1,500 (1.50x) |",
                        "| dense/2 | 2.500 | +0.500 |  |  |  |  |",
                        "| [predict](docs/mlp_predict.md) | 2.125 | +0.125 |  |  | 1,250 (1.25x) |  |"]
    assert [row.split(" | ")[0] for row in rows[3:]] == [f"| block {n}" for n in (0, 1, 2, 3, 4, 5, 8)]
    said = " ".join(" ".join(lines).split())
    assert all(figure in said for figure in ("4,096,000", "409,600", "128", "0.50%", pages.RETROFITS))
    assert "bench.py retrofit" in pages.brief_table(pages.LANGUAGES[language], {})


@pytest.mark.parametrize("language", pages.LANGUAGES)
def test_what_integer_weights_gain_is_quoted_from_its_record(language):
    screened, whole = "bfloat16, 4-bit copy, 15%", "int8, 4-bit copy, 15%"
    speed = {"bfloat16, all rows": 100.0, "bfloat16": 111.0, screened: 122.0, "int8": 150.0, whole: 300.0,
             "q4_all": 444.0, "llama.cpp q8_0": 60.0, "llama.cpp q4_0": 70.0}
    lost = {screened: 0.06, "int8": 0.014, whole: 0.25, "q4_all": 1.73}
    record = {"model": {"parameters": 63e6}, "hardware": {"cpu": "x", "threads": 2},
              "points": {name: {"percent": percent} for name, percent in lost.items()},
              "measurements": {"decode": {"sides": {name: {"median": rate} for name, rate in speed.items()}}}}
    said = pages.lighter(pages.LANGUAGES[language], {pages.SCREEN: record})
    figures = ("63", "1.11", "1.22", "+0.06%", "1.50", "+0.01%", "3.00", "+0.25%", "4.44", "+1.73%", "0.60",
               "0.70")
    assert all(figure in said for figure in (*figures, pages.SCREEN))
    assert pages.lighter(pages.LANGUAGES[language], {}) == ""


@pytest.mark.parametrize("language", pages.LANGUAGES)
def test_what_the_first_command_prints_is_quoted_from_its_record(language):
    runs = {"out-dense": {"loss": 1.25, "weight_bytes": 5e6},
            "out-dense@int8": {"loss": 1.3, "weight_bytes": 2.5e6}}
    sides = {"out-dense": {"median": 4000.0}, "out-dense@int8": {"median": 6000.0}}
    record = {"runs": runs, "measurements": {"decode": {"sides": sides}}}
    lines = pages.first_minute(pages.LANGUAGES[language], {pages.FIRST: record}).splitlines()
    assert lines[1] == "|---|---|---|---|---|---|" and len(lines) == 4
    assert lines[2] == "| `out-dense` | 1.250 |  | 5.00 | 4,000 | 1.00x |"
    assert lines[3] == "| `out-dense@int8` | 1.300 | +4.00% | 2.50 | 6,000 | 1.50x |"
    assert pages.first_minute(pages.LANGUAGES[language], {}) == ""
