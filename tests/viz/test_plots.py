"""plots.py: the figures hold what the log says, for one run and for twenty."""
import json
import shutil
import xml.etree.ElementTree as ET
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import Job, Trainer, one_sentence

import bio_modules
from configurator import ConfigError
from decode import counters
from model import build_model
from training import checkpoint
from viz import figures, plots

pytest.importorskip("matplotlib", reason="figures need matplotlib")

KINDS = {"osc": dict(act="osc", grow="1:0.5"), "topk": dict(mlp_topk=0.25, act="relu2"),
         "event": dict(event_gate=True, dendrites=4, dendrites_active=2),
         "columns": dict(columns=8, columns_active=2, exits="1")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    """{kind: folder} of four finished runs of two layers."""
    trainer = Trainer(tmp_path_factory.mktemp("runs"), data)
    for kind, flags in KINDS.items():
        trainer(out=kind, n_layer=2, **flags)
    return {kind: trainer.folder / kind for kind in KINDS}


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_of(folder, name="run", **keys):
    return plots.Run(name, folder, plots.Plots(**keys))


def draw(monkeypatch, out, *folders, argv=()):
    """The command in this process -> {file's name: what an image or a drawing is}."""
    monkeypatch.setattr("sys.excepthook", None)
    plots.main([*map(str, folders), f"--out={out}", *argv])
    return {path.name: picture(path) for path in sorted(out.iterdir())}


def picture(path):
    """A PNG that is not blank -> its shape; an SVG -> all text in it."""
    if path.suffix == ".svg":
        texts = [element for element in ET.parse(path).iter() if element.tag.endswith("}text")]
        return " ".join("".join(element.itertext()) for element in texts)
    from matplotlib.image import imread
    image = imread(path)
    assert image[..., :3].var() > 1e-3, f"{path} is blank"
    return image.shape


# -------------------------------------------------- the log ------------------------------------------------

def test_the_log_has_the_counters_of_every_layer(runs):
    row = rows_of(runs["topk"])[-1]
    assert all(len(values) == 2 for values in row["by_layer"].values())
    for key, values in row["by_layer"].items():
        assert row[key] == pytest.approx(sum(values) / (1 if key.startswith("dead") else 2))
    assert sum("by_layer" in row for row in rows_of(runs["topk"])) == 5


def test_layers_without_a_counter_and_values_that_are_not_finite_are_null():
    rows = {1: {"zeros": 0.5}, 2: {"zeros": float("nan"), "dead_units": 3}}
    assert counters.by_layer(rows, 4) == {"zeros": [None, 0.5, None, None],
                                             "dead_units": [None, None, 3, None]}


def test_the_printed_line_has_no_lists(train):
    said = train(mlp_topk=0.25, max_iters=2, eval_interval=1)
    assert "MLP 25% active" in said.out and "by_layer" not in said.out + said.err


# -------------------------------------------------- what is drawn ------------------------------------------

@pytest.mark.parametrize("axis", ["steps", "tokens", "seconds"])
def test_curves_are_the_rows_of_the_log(runs, axis):
    key, rows = plots.AXES[axis][0], rows_of(runs["topk"])
    curves = plots.losses(axis, run_of(runs["topk"]), plots.Plots())
    for loss, (x, y) in curves.items():
        assert list(zip(x.tolist(), y.tolist())) == [(row[key], row[loss]) for row in rows if loss in row]
    assert [len(x) for x, _ in curves.values()] == [16, 5]


def test_multiply_adds_are_those_of_the_layers_in_use(runs):
    loaded, path = checkpoint.read(runs["osc"])
    model, rows, spent = build_model(loaded, path), rows_of(runs["osc"]), [0.0]
    assert {row["layers"] for row in rows if "layers" in row} == {1, 2}
    for row, after in pairwise(rows):
        model.use_layers(row["layers"])
        spent.append(spent[-1] + model.flops_per_token() / 2 * (after["tokens"] - row["tokens"]))
    curves = run_of(runs["osc"]).found["loss_macs"]
    assert curves["loss"][0].tolist() == pytest.approx(spent[:-1])
    assert np.diff(curves["loss"][0])[-1] > np.diff(curves["loss"][0])[0]


def test_smoothing_is_the_mean_of_a_window_that_both_ends_cut():
    values = np.array([0.0, 3.0, 9.0, 3.0, 0.0, 6.0])
    assert plots.smoothed(values, 0.4).tolist() == [0, 4, 5, 4, 3, 3]
    assert plots.smoothed(values, 0.0).tolist() == values.tolist()


def test_sparsity_is_by_layer_as_logged(runs):
    rows = [row for row in rows_of(runs["topk"]) if "by_layer" in row]
    at, zeros = plots.sparsity(run_of(runs["topk"]), plots.Plots())["zeros"]
    assert at.tolist() == [0, 4, 8, 12, 16] and zeros.tolist() == [row["by_layer"]["zeros"] for row in rows]


def test_gates_are_those_of_the_checkpoint_and_its_data(runs):
    event = plots.gates(with_weights(runs["event"]), plots.Plots())
    saved = torch.load(runs["event"] / "ckpt.pt", weights_only=True)["model"]
    for layer, values in event[plots.THRESHOLDS].by_layer.items():
        log_theta = 10 * saved[f"transformer.h.{layer}.mlp.select.threshold"]
        assert np.allclose(values, log_theta.exp().numpy())
    branches = event[plots.OPENED[bio_modules.BranchGate]]
    assert branches.aim == 0.5 and all(0 < v.sum() <= 2 for v in branches.by_layer.values())
    both = plots.gates(with_weights(runs["columns"]), plots.Plots())
    columns = both[plots.OPENED[bio_modules.ColumnGate]]
    assert [float(v.sum()) for v in columns.by_layer.values()] == pytest.approx([2, 2])    # two of eight
    assert both[plots.PROBES].aim == 0.9 and list(both[plots.PROBES].by_layer) == [0]
    assert both[plots.PROBES].by_layer[0].shape == (1024,)


def with_weights(folder):
    run = run_of(folder)
    loaded, path = checkpoint.read(folder)
    run.model = build_model(loaded, path).eval()
    return run


def test_frequencies_are_the_checkpoints_own(runs):
    found = run_of(runs["osc"]).found["frequencies"]
    saved = torch.load(runs["osc"] / "ckpt.pt", weights_only=True)["model"]
    for name, layers in found.items():
        assert list(layers) == [0, 1]
        assert all(np.array_equal(values, saved[f"transformer.h.{layer}.mlp.act.{name}"].numpy())
                   for layer, values in layers.items())


# -------------------------------------------------- figures ------------------------------------------------

def test_one_run_has_its_figures_and_says_what_it_has_not(monkeypatch, capsys, tmp_path, runs):
    files = draw(monkeypatch, tmp_path / "new" / "p", runs["osc"])
    names = [f"loss_{axis}" for axis in plots.AXES] + ["frequencies"]
    assert set(files) == {f"{name}.{ending}" for name in names for ending in ("png", "svg")}
    for axis, (_, label) in plots.AXES.items():
        for part in (label, "training loss", "validation loss", "osc"):
            assert part in files[f"loss_{axis}.svg"]
    assert "frequency w" in files["frequencies.svg"] and "layer 1" in files["frequencies.svg"]
    said = capsys.readouterr().out
    assert "left out gates: osc: it has no gates" in said and "left out sparsity: osc: its log has no" in said
    assert f"wrote {tmp_path / 'new' / 'p' / 'loss_steps.png'}" in said


def test_one_run_with_gates_shows_layers_and_iterations(monkeypatch, tmp_path, runs):
    files = draw(monkeypatch, tmp_path, runs["columns"])
    assert "active" not in files["sparsity.svg"] and "columns or experts open" in files["sparsity.svg"]
    assert "layer" in files["sparsity.svg"] and "iteration" in files["sparsity.svg"]
    assert "columns: share of tokens" in files["gates.svg"] and "exit probes" in files["gates.svg"]


def test_twenty_runs_are_all_named_in_every_figure(monkeypatch, capsys, tmp_path, runs):
    folders = [tmp_path / "in" / f"{kind}-{i}" for i in range(5) for kind in KINDS]
    for folder in folders:
        shutil.copytree(runs[folder.name.split("-")[0]], folder)
    files = draw(monkeypatch, tmp_path / "out", *folders)
    assert len(files) == 2 * len(plots.FIGURES)
    for name, text in files.items():
        shown = [folder.name for folder in folders if name.endswith(".svg") and folder.name in text]
        has = {"gates.svg": 10, "sparsity.svg": 15, "frequencies.svg": 5}.get(name, 20)
        assert len(shown) == has * name.endswith(".svg"), (name, shown)
    looks = plots.colours([folder.name for folder in folders])
    assert len({tuple(look.values()) for look in looks.values()}) == 20
    assert "without osc-0, osc-1, osc-2, osc-3, osc-4: its log has no counters" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Glyph .* missing")       # in the PNG; an SVG's letters stay letters
def test_strange_names_are_drawn_as_they_are(monkeypatch, tmp_path, runs):
    folders = [tmp_path / name for name in ("_hidden", "$x$", "한국어", "x" * 60)]
    for folder in folders:
        shutil.copytree(runs["osc"], folder)
    text = draw(monkeypatch, tmp_path / "out", *folders)["loss_steps.svg"]
    assert all(name in text for name in ("_hidden", "$x$", "한국어", "..." + "x" * 42))


def test_equal_names_are_told_apart(tmp_path):
    assert plots.names_of(["a/out", "b/out"]) == ["a/out", "b/out"] and plots.names_of(["a/one"]) == ["one"]


def test_a_run_without_a_checkpoint_has_its_losses(monkeypatch, capsys, tmp_path, runs):
    (tmp_path / "bare").mkdir()
    shutil.copy(runs["osc"] / "metrics.jsonl", tmp_path / "bare")
    files = draw(monkeypatch, tmp_path / "out", tmp_path / "bare")
    assert set(files) == {f"loss_{axis}.{ending}" for axis in ("steps", "tokens", "seconds")
                          for ending in ("png", "svg")}
    assert "left out loss_macs: bare: it has no weights to look at" in capsys.readouterr().out


def test_a_torn_last_line_does_not_count(tmp_path, runs):
    shutil.copytree(runs["osc"], tmp_path / "torn")
    path = tmp_path / "torn" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    assert len(plots.read_rows(tmp_path / "torn")) == 16 == len(rows_of(runs["osc"])) - 1


# -------------------------------------------------- mistakes -----------------------------------------------

LOGS = {"nothing": (None, "holds no metrics.jsonl: name the out_dir"), "empty": (b"", "has 0 rows"),
        "single": (b'{"iter": 0, "tokens": 0, "loss": 1.0}\n', "has 1 row, and a curve needs two"),
        "middle": (b'{"iter": 0, "tokens": 0}\nxx\n{"iter": 2, "tokens": 9}\n', "row 2 is not one of"),
        "foreign": (b'[1]\n"a"\n\xff\n', "row 1 is not one of")}


@pytest.mark.parametrize("name", LOGS)
def test_a_log_that_cannot_be_drawn_says_why(monkeypatch, tmp_path, name):
    content, sentence = LOGS[name]
    (tmp_path / name).mkdir()
    if content is not None:
        (tmp_path / name / "metrics.jsonl").write_bytes(content)
    monkeypatch.setattr("sys.excepthook", None)
    with pytest.raises(ConfigError, match=f"{name}.*{sentence}"):
        plots.main([str(tmp_path / name), f"--out={tmp_path / 'plots'}"])
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize("argv, sentence", [
    ([], "no run's folder is named: type python bench.py plot out-pylib"),
    (["nowhere"], "'nowhere' is not a folder"),
    (["."], ". holds no metrics.jsonl"),
    (["--smooth=2", "nowhere"], "smooth=2.0 must be in [0, 1)"),
    (["--uot=x", "nowhere"], "unknown key 'uot', did you mean 'out'?"),
], ids=str)
def test_bad_command_lines_say_what_to_type(tmp_path, argv, sentence):
    one_sentence(Job("bench.py", ["plot", *argv], tmp_path).wait(), "bench.py", sentence)


def test_an_output_folder_that_cannot_be_made_and_a_missing_matplotlib_are_one_sentence(tmp_path, runs):
    (tmp_path / "file").write_text("")
    bad = Job("bench.py", ["plot", runs["osc"], f"--out={tmp_path / 'file'}"], tmp_path, name="a").wait()
    one_sentence(bad, "bench.py", "cannot be made")
    without = "import sys; sys.modules['matplotlib'] = None"
    one_sentence(Job("bench.py", ["plot", runs["osc"]], tmp_path, before=without, name="b").wait(),
                 "bench.py", "figures need matplotlib: pip install matplotlib")


# ------------------------------------------------ names beside points -------------------------------------

@pytest.mark.parametrize("points", [
    [("three layers", 1.0, 1.0), ("half as wide", 1.01, 1.0)],
    [("a very long name at the right edge", 10.0, 1.0), ("low", 1.0, 0.0), ("high", 5.0, 2.0)],
    [(f"model {n}", 5 + 0.05 * n, 1 + 0.01 * n) for n in range(8)],
    [("the same place", 2.0, 1.0), ("twice", 2.0, 1.0), ("$a_{b}^c$", 2.0, 1.0)],
], ids=["neighbours", "edges", "a crowd", "one place"])
def test_names_cover_neither_each_other_nor_the_edge_nor_the_legend(tmp_path, points):
    pytest.importorskip("matplotlib")
    from matplotlib.text import Text
    with figures.drawing(tmp_path / "p.png") as axis:
        axis.plot([0, 10], [0, 2], "-", label="a line")
        for _, x, y in points:
            axis.plot([x], [y], "o")
        axis.legend()
        figures.name_points(axis, points)
        axis.figure.canvas.draw()                # puts the texts where they belong
        names, boxes = [t.get_text() for t in axis.texts], [*map(Text.get_window_extent, axis.texts)]
        frame, legend = axis.get_window_extent().padded(1), axis.get_legend().get_window_extent()
    assert names == [name for name, _, _ in points]
    assert not [(n, m) for n in range(len(boxes)) for m in range(n) if boxes[n].overlaps(boxes[m])]
    assert not [n for n, box in enumerate(boxes) if box.overlaps(legend)]
    assert all(frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1) for box in boxes)


def test_a_name_that_is_far_from_its_point_has_a_line_to_it(tmp_path):
    pytest.importorskip("matplotlib")
    with figures.drawing(tmp_path / "p.png") as axis:
        axis.plot([0, 1], [0, 1], "-")
        axis.plot([0.5], [0.5], "o")
        figures.name_points(axis, [("alone", 0.5, 0.5)])
        figures.name_points(axis, [(f"number {n}", 0.5, 0.5) for n in range(6)])
        assert axis.texts[0].arrow_patch is None and any(t.arrow_patch for t in axis.texts[1:])
