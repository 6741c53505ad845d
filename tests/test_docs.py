"""Pages of docs/ promise: every arm has one, their links lead somewhere, their defaults are the code's."""
import ast
import re
from functools import cache

import pytest
from conftest import ROOT
from test_table import result  # noqa: F401  what a table finds, for the pages

from benchmarks import arms, broken, pages, readme, report
from benchmarks.record import TWIN

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


def test_the_short_table_keeps_the_twin_what_pays_and_the_worst_and_counts_the_rest(records):
    lines = pages.brief_table(pages.LANGUAGES[""], records).splitlines()
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines[2:] if line.startswith("|")]
    assert names[0] == TWIN and "[osc](docs/osc.md)" in names and "bad" in names and len(names) <= pages.MOST
    assert "leaky" not in names and "1 of 2 blocks" in " ".join(" ".join(lines).split())


@pytest.mark.parametrize("language", pages.LANGUAGES)
def test_what_integer_weights_gain_is_quoted_from_its_record(language):
    speed = {"bfloat16": 100.0, "int8": 150.0, "int8, 4-bit copy, 15%": 300.0, "llama.cpp q8_0": 60.0}
    record = {"model": {"parameters": 63e6}, "hardware": {"cpu": "x", "threads": 2},
              "points": {"int8": {"percent": 0.014}, "int8, 4-bit copy, 15%": {"percent": 0.25}},
              "measurements": {"decode": {"sides": {name: {"median": rate} for name, rate in speed.items()}}}}
    said = pages.lighter(pages.LANGUAGES[language], {pages.SCREEN: record})
    assert all(figure in said for figure in ("63", "1.5", "+0.01%", "2.5", "0.25%", "2.0", pages.SCREEN))
    assert pages.lighter(pages.LANGUAGES[language], {}) == ""
