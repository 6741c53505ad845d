"""bench.py sparsify: what is tried of a dense model, what is kept of it, what the front's commands make."""
import dataclasses
import json
import os
import re
import shlex
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TEXT, Job, Trainer, one_sentence, record_of, run_real, words

from benchmarks import readme, sparsify, trials
from benchmarks.trials import WHOLE, Lab, Trial, cost_of, digest
from configurator import ConfigError
from data.dataset import write_dataset
from data.tokenizer import ByteTokenizer
from kernels.build import cpu_library
from model import build_model
from training import checkpoint

pytestmark = pytest.mark.skipif(cpu_library()[0] is None, reason="no C kernels here")
SMALL = dict(threads=1, dtype="float32", tokens=512, minutes=0)
SHAPE = dict(n_layer=2, act="relu2", block_size=32, n_embd=32, max_iters=60, lr_decay_iters=60,
             eval_interval=60, dropout=0.0)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense run of some seconds, on data with 40 windows of held-out text."""
    folder, ids = tmp_path_factory.mktemp("dense"), list(TEXT.encode())
    write_dataset(folder / "data", {"train": [ids[1300:]], "val": [ids[:1300]]}, ByteTokenizer(), "here")
    trainer = Trainer(folder, folder / "data")
    trainer(out="run", **SHAPE)
    return trainer


def typed(dense, *argv, name="job", **keys):
    argv = ["sparsify", dense.folder / "run", *words(**{**SMALL, **keys}), *argv]
    return Job("bench.py", argv, dense.folder, name=name)


@pytest.fixture(scope="module")
def found(dense):
    """A search without training -> (its run, its record)."""
    result = typed(dense, loss_only=True, trials="kept", plot="front.png").wait()
    assert result.status == 0, result.err
    return result, record_of(result)


def lab_of(dense, **keys):
    keys["trials"] = str(dense.folder / keys.get("trials", "own"))
    cfg = sparsify.Sparsify(**{"out_dir": str(dense.folder / "run"), **SMALL, **keys})
    lab = Lab(cfg)
    lab.measure(Trial())
    return lab


# -------------------------------------------------- the search ---------------------------------------------

def test_a_search_says_first_what_it_will_do_and_ends_with_a_front_and_a_verdict(dense, found):
    result, record = found
    lines = result.out.splitlines()
    begin = next(n for n, text in enumerate(lines) if "parameters; a point may lose 1.00%" in text)
    assert "trials without training" in lines[begin + 1] and "Nothing is trained" in lines[begin + 2]
    assert "without times" in lines[begin + 3] and f"kept in {Path('kept')}" in lines[begin + 4]
    assert record["front"][0] == "dense" and len(record["front"]) > 2 and not record["stopped"]
    assert not record["measurements"] and str(dense.folder) not in json.dumps(record)
    assert any(text.startswith(record["front"][-1]) for text in lines[-8:])
    assert len([*readme.sparsify_rows(record)]) > 20                    # for docs/results.md
    assert (dense.folder / "front.png").stat().st_size > 1000
    assert "100%" in result.err or "trial" in result.err                # the bar


def test_the_front_falls_in_bytes_and_no_point_of_it_is_beaten_or_over_the_limit(found):
    points = found[1]["points"]
    front = [points[name] for name in found[1]["front"]]
    costs = [cost_of(point) for point in front]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == len(costs)
    dense = points["dense"]
    for point in front[1:]:
        own = sum(point["fresh"]) / sum(dense["fresh"]) - 1
        assert own <= 0.01 + 1e-6 and point["share"] <= 0.01 and point["passes"]
        assert len(point["fresh"]) == len(dense["fresh"])


def test_what_surely_loses_too_much_is_not_looked_at_to_the_end_and_no_stronger_one_is_tried(found):
    points = found[1]["points"]
    assert points["weights=2:4"]["share"] > 0.01
    assert len(points["weights=2:4"]["of_windows"]) < len(points["dense"]["of_windows"])
    for ladder in (("attn_topk=0.9", "attn_topk=0.7", "attn_topk=0.5"), ("mlp_topk=0.3", "mlp_topk=0.2")):
        share = [points[name]["share"] for name in ladder if name in points]
        assert all(one <= 0.01 for one in share[:-1]) and share


def test_combinations_read_less_than_their_parts_and_are_measured_themselves(found):
    points = found[1]["points"]
    combined = {name: p for name, p in points.items() if p["axis"] == "combined"}
    assert combined
    for name, point in combined.items():
        if point["passes"]:
            assert cost_of(point) < cost_of(points["quantize=int8"]) or "quantize" not in name
    assert max(len(p["flags"]) + (p["bits"] != [16, 16, 16]) for p in combined.values()) > 1


def test_a_files_own_4_bits_are_tried_where_the_weights_have_them(dense, found):
    """Of the dense model alone: what was trained on lies on no levels."""
    assert not any("own" in name for name in found[1]["points"])
    folder = dense.folder / "of-a-file"
    folder.mkdir()
    loaded = checkpoint.read(dense.folder / "run")[0]
    for name, weight in loaded["model"].items():
        if name.endswith(("c_attn.weight", "c_fc.weight")):
            low = weight.view(len(weight), -1, 32).amin(-1, keepdim=True)
            step = (weight.view(len(weight), -1, 32).amax(-1, keepdim=True) - low) / 15
            weight.copy_((low + step * ((weight.view(len(weight), -1, 32) - low) / step).round()).flatten(1))
    checkpoint.save(loaded, folder / "ckpt.pt")
    cfg = sparsify.Sparsify(**SMALL, out_dir=str(folder), trials=str(dense.folder / "own"), only="bits",
                            loss_only=True)
    search = sparsify.Search(cfg)
    own = Trial(bits=(5, 5, 5))
    assert str(own) == "quantize=own" and trials.kind_of((16, 5, 8)) == "mlp=own,head=8"
    assert ("bits", [own]) in search.ladders and not search.fits(own._replace(trained=()))
    search.run()
    points = search.record({}, False)["points"]
    assert points["quantize=own"]["passes"]
    assert points["quantize=own"]["bytes"] < points["quantize=int8"]["bytes"] < points["dense"]["bytes"]


def test_the_same_command_finds_all_of_it_again_and_another_limit_goes_on_from_there(dense, found):
    folder = dense.folder / "kept"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    again = typed(dense, loss_only=True, trials="kept").wait()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")} == before
    record = record_of(again)
    assert record["points"] == found[1]["points"] and record["front"] == found[1]["front"]
    assert f"where {len(before)} files are" in again.out
    wider = typed(dense, loss_only=True, trials="kept", max_loss=0.5, only="2:4").wait()
    more = record_of(wider)["points"]["weights=2:4"]["of_windows"]
    short = found[1]["points"]["weights=2:4"]["of_windows"]
    assert more[:len(short)] == short
    other = typed(dense, loss_only=True, trials="kept", only="2:4", seed=7).wait()
    assert other.status == 0 and len([*folder.iterdir()]) == 2          # another seed finds nothing


def test_a_search_that_is_stopped_shows_the_front_so_far_and_goes_on_from_there(dense):
    keys = dict(loss_only=True, trials="stopped", only="units,window")
    job, place, until = typed(dense, **keys), dense.folder / "stopped", time.monotonic() + 60
    while len([*place.rglob("*.json")]) < 4 and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(job.pid, signal.SIGINT)
    result = job.wait()
    assert "Traceback" not in result.err, result.err
    record = record_of(result, 130)
    assert record["stopped"] and "stopped; the front so far" in result.out and record["front"][0] == "dense"
    whole = typed(dense, **keys).wait()
    after = record_of(whole)
    assert record["points"].keys() < after["points"].keys() and not after["stopped"]
    for name, point in record["points"].items():
        assert after["points"][name]["of_windows"][:len(point["of_windows"])] == point["of_windows"]
    assert "files are; Ctrl-C" in whole.out


def test_a_torn_file_of_a_trial_is_measured_again(dense):
    lab = lab_of(dense)
    trial = Trial(flags=(("mlp_topk", 0.3),))
    record = lab.measure(trial)
    lab.file_of(trial).write_text('{"name": "mlp_to')
    assert lab_of(dense).measure(trial) == record


def test_the_units_of_a_gated_model_that_a_step_reads_are_counted_and_so_are_shared_keys(dense):
    trainer = Trainer(dense.folder, dense.folder / "data")
    trainer(out="gated", **SHAPE | dict(act="swiglu", n_head=4, n_kv_head=2, max_iters=2))
    lab = lab_of(dense, out_dir=str(dense.folder / "gated"))
    screens = [Trial(flags=(("mlp_screen", 16), ("mlp_live", live))) for live in (0.8, 0.5)]
    read = [lab.measure(trial)["bytes"] for trial in (Trial(), *screens)]
    c, whole = lab.dense.config, lab.known(Trial())
    rest = 2 * c.n_layer * c.units() * c.n_embd * lab.dtype.itemsize     # W_up and W_down
    spared = [(read[0] - some) / rest for some in read[1:]]
    assert 0.1 < spared[0] < 0.3 and 0.35 < spared[1] < 0.65             # of text that was not calibrated on
    assert whole["kv_bytes"] == 2 * c.n_layer * c.n_embd // 2 * lab.prompt * lab.dtype.itemsize


# -------------------------------------------------- what a trial is ----------------------------------------

@pytest.mark.parametrize("trial", [
    Trial(flags=(("mlp_topk", 0.3), ("window", 4))), Trial(flags=(("weights", "2:4"),)),
    Trial(flags=(("mlp_screen", 4), ("mlp_live", 0.2)), bits=(8, 8, 8)),
    pytest.param(Trial(flags=(("mlp_screen", 4), ("mlp_live", 0.2)), bits=(8, 4, 8)), marks=pytest.mark.slow),
    Trial(flags=(("event_gate", True), ("event_rate", 0.2)), bits=(8, 8, 16)),
    Trial(flags=(("mlp_topk", 0.5), ("mlp_topk_group", 4)))], ids=str)
def test_the_commands_of_a_trial_make_the_model_that_was_measured(dense, trial, monkeypatch):
    lab, losses = lab_of(dense), {}
    record = lab.measure(trial)
    kept = dense.folder / "losses.json"
    for n, text in enumerate(lab.commands(trial)):
        python, script, *argv = shlex.split(text)
        assert python == "python"
        before = ""
        if script == "sample.py":                # the loss of the model that sample.py decodes with
            lab_path = dense.folder / "windows.pt"
            torch.save({"x": lab.search[0], "y": lab.search[1]}, lab_path)
            before = LOSS.format(path=str(lab_path), out=str(kept))
            argv += words(device="cpu", dtype="float32", threads=1, num_samples=1, max_new_tokens=4)
        else:
            argv += words(device="cpu", dtype="float32")
        done = Job(script, argv, dense.folder, before=before, name=f"command{n}").wait()
        assert done.status == 0, done.err
    losses = json.loads(kept.read_text())
    kept.unlink()
    assert losses == pytest.approx(record["of_windows"], abs=3e-4)


LOSS = """
import json, torch
from decode import sampling
from benchmarks.trials import losses_of
def stream(model, *args, original=sampling.stream, **keys):
    some = torch.load({path!r}, weights_only=True)
    json.dump(losses_of(model, some["x"], some["y"]), open({out!r}, "w"))
    return original(model, *args, **keys)
sampling.stream = stream
"""


def test_bits_by_part_join_to_the_fewer_and_have_the_names_that_are_typed():
    some = Trial(bits=(8, 4, 8)).with_((("window", 4),), (4, 8, 8))
    assert some.bits == (4, 4, 8) and str(some) == "window=4, quantize=attn=4,mlp=4,head=8"
    assert [trials.kind_of(bits) for bits in ((8, 8, 8), (8, 4, 8), (4, 4, 4), (16, 4, 16))] == [
        "int8", "int4", "q4_all", "mlp=4"]
    assert str(Trial()) == "dense" and str(Trial(trained=())) == "dense, trained" and Trial().bits == WHOLE


def test_fewer_bytes_are_counted_where_less_is_read(dense):
    lab = lab_of(dense)
    plain = lab.measure(Trial())
    for trial in (Trial(bits=(8, 8, 8)), Trial(flags=(("mlp_topk", 0.1),)), Trial(flags=(("window", 2),)),
                  Trial(flags=(("event_gate", True), ("event_rate", 0.1)))):
        assert cost_of(lab.measure(trial)) < cost_of(plain), trial
    assert plain["macs"] > lab.measure(Trial(flags=(("mlp_topk", 0.1),)))["macs"]
    weights = sum(p.numel() for name, p in lab.dense.named_parameters() if "wpe" not in name)
    down = sum(block.mlp.c_proj.weight.numel() for block in lab.dense.transformer.h)      # by live units
    assert 4 * (weights - down) < plain["bytes"] < 4 * weights


def test_what_a_model_has_or_cannot_have_is_not_tried(dense):
    lab = lab_of(dense)
    config = dataclasses.replace(lab.dense.config, act="gelu")
    assert not any("mlp_screen" in str(trial) for _, ladder in sparsify.ladders(config) for trial in ladder)
    with pytest.raises(ConfigError):
        lab.check(Trial(flags=(("mlp_topk", 1.0),)))
    with pytest.raises(ConfigError):
        lab.check(Trial(flags=(("mlp_topk", 0.1), ("event_gate", True))))


# -------------------------------------------------- training ------------------------------------------------

def test_what_has_learnt_stands_beside_the_dense_model_that_has_learnt_as_long_if_that_is_better(dense):
    lab = lab_of(dense)
    before = lab.known(Trial())["of_windows"]
    taught, exits, control = (Trial(trained=flags) for flags in ((("window", 4),), (("exits", "1"),), ()))
    for trial, factor in ((control, 0.9), (taught, 0.95), (exits, 0.95)):
        lab.records[trial] = {"of_windows": [factor * loss for loss in before]}
    assert lab.beside(taught).share == pytest.approx(-0.05)
    lab.control = control
    assert lab.beside(taught).share == pytest.approx(0.95 / 0.9 - 1)
    assert lab.beside(exits).share == pytest.approx(-0.05)
    assert lab.beside(control).share == pytest.approx(-0.1) and lab.beside(Trial()).share == 0


TRAINED = dict(loss_only=True, trials="trained", minutes=0.05, retrofits=1, only="depth,attention")


def test_a_budget_trains_the_promising_ones_beside_the_dense_model_and_finds_them_again(dense):
    result = typed(dense, **TRAINED).wait()
    assert result.status == 0, result.err
    record = record_of(result)
    ours = [point for point in record["points"].values() if point["trained"] is not None]
    assert ours[0]["trained"] == {} and len(ours) >= 2 and ours[1]["trained"], result.out
    assert record["training"]["iters"] >= 1 and "trained on as long" in result.out
    again = typed(dense, **TRAINED).wait()
    assert record_of(again)["points"] == record["points"]


@pytest.mark.slow
def test_a_retrofit_that_does_not_run_is_told_of_and_the_front_stays(dense):
    keys = dict(TRAINED, trials="locked", only="attention")
    lab = lab_of(dense, trials="locked", minutes=keys["minutes"])
    first = typed(dense, **keys, dry_run=True).wait()
    place = dense.folder / re.search(r"kept in (\S+?)[,;]", first.out)[1]
    assert place.name == lab.place.name
    plan = {"iters": 1, "rows": 1, "count": 1}
    name = digest([keys["minutes"], keys["retrofits"], keys["only"]])
    place.mkdir(parents=True, exist_ok=True)
    (place / f"plan-{name}.json").write_text(json.dumps(plan))
    (place / "dense-taught-1x1").write_text("in the way")
    result = typed(dense, **keys).wait()
    record = record_of(result)
    assert result.status == 0 and "dense, trained: not trained: " in result.out, result.out
    assert "in the way" not in record["notes"][-1] and str(dense.folder) not in json.dumps(record)
    assert record["front"][0] == "dense"


@pytest.mark.slow
def test_the_commands_of_what_was_trained_make_the_same_model_again(dense):
    typed(dense, **TRAINED).wait()
    lab = lab_of(dense, trials="trained")
    lab.plan = json.loads(next(lab.place.glob("plan-*.json")).read_text())
    trial = next(t for t in (Trial(trained=tuple(some.flags)) for _, some in sparsify.in_training(
        lab.dense.config)) if (lab.folder_of(t) / "trained.json").is_file())
    loaded = build_model(*checkpoint.read(lab.folder_of(trial)))
    assert all(getattr(loaded.config, key) == value for key, value in trial.trained)
    first, second = lab.commands(trial)
    there = words(device="cpu", dtype="float32", out_dir=dense.folder / "once-more")
    done = Job("train.py", [*shlex.split(first)[2:], *there], dense.folder, name="again").wait()
    assert done.status == 0, done.err
    other = build_model(*checkpoint.read(dense.folder / "once-more"))
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), loaded.parameters()))
    done = Job("sample.py", [*shlex.split(second)[2:], *words(device="cpu", num_samples=1, max_new_tokens=4)],
               dense.folder, name="sampled").wait()
    assert done.status == 0, done.err


# -------------------------------------------------- the command --------------------------------------------

def test_decode_times_are_measured_in_turns_for_the_front_alone(dense):
    result = typed(dense, trials="kept", repeats=2, only="bits").wait()
    assert result.status == 0, result.err
    record = record_of(result)
    sides = record["measurements"]["decode"]["sides"]
    assert list(sides) == record["front"] and all(side["median"] > 0 for side in sides.values())
    assert "tokens/s (greedy, batch 1)" in result.out and "1.00x" in result.out


def test_a_dry_run_says_what_would_be_done_and_leaves_nothing(dense):
    result = typed(dense, dry_run=True, trials="nothing", minutes=3).wait()
    assert result.status == 0 and "3 minutes of training the 3 most promising" in result.out
    assert not (dense.folder / "nothing").exists()


@pytest.mark.parametrize("argv, parts", [
    (["--max_loss=1"], ["max_loss=1.0", "--max_loss=0.01"]), (["--minutes=-1"], ["minutes=-1.0"]),
    (["--only=heads"], ["only='heads'", "window"]), (["--dtype=float16"], ["dtype='float16'"]),
    (["--tokens=0"], ["tokens=0"]), (["--plot=gone/a.png"], ["plot='gone/a.png'"]),
    (["--dataset=gone/"], ["gone/"]), (["--trials=run/ckpt.pt"], ["trials='run/ckpt.pt'"]),
    (["--trials=run/ckpt.pt/below"], ["trials=run/ckpt.pt/below", "name another folder"]),
    (["--out_dir=gone"], ["gone"])])
def test_bad_keys_of_sparsify_say_what_to_type(dense, argv, parts):
    one_sentence(typed(dense, *argv).wait(), "bench.py", *parts)


def test_packed_and_quantised_models_say_which_checkpoint_to_name(dense):
    Job("training/export.py", words(out_dir=dense.folder / "run", to="packed", quantize="int8",
                                    export_dir=dense.folder / "ints"), dense.folder).wait()
    result = Job("bench.py", ["sparsify", dense.folder / "ints", *words(**SMALL)], dense.folder).wait()
    one_sentence(result, "bench.py", "quantised or packed", "name the checkpoint")


@pytest.mark.slow
def test_a_hugging_face_folder_is_made_sparse_too(dense):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    shape = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=16, vocab_size=256)
    transformers.GPT2LMHeadModel(shape).save_pretrained(dense.folder / "theirs")
    result = Job("bench.py", ["sparsify", dense.folder / "theirs", *words(
        **SMALL, loss_only=True, dataset=dense.data, only="window")], dense.folder).wait()
    assert result.status == 0, result.err
    record = record_of(result)
    assert "window=8" in record["points"]


def test_intervals_of_pairs_decide_early_and_only_where_they_are_sure(dense):
    lab, trial = lab_of(dense), Trial(flags=(("window", 3),))
    base = lab.known(Trial())["of_windows"]
    for more, decided in (([0.2, 0.21, 0.19, 0.2], True), ([-0.1, -0.11, -0.1, -0.1], True),
                          ([0.0, 0.1, 0.0, 0.0], False), ([0.2, 0.21], False)):
        lab.records[trial] = {"of_windows": [b + d for b, d in zip(base, more)]}
        assert lab.beside(trial, limit=0.01).decided == decided
    lab.records[trial] = {"of_windows": base[:3] + [None]}
    assert lab.beside(trial).share == float("inf")


@pytest.mark.slow
def test_the_pages_search_prints_what_stands_there(tmp_path):
    page = (ROOT / "docs" / "retrofit.md").read_text(encoding="utf-8")
    first, search = (block.split("```")[0].replace("\\\n", " ") for block in page.split("```console\n")[1:3])
    numbers = re.compile(r"[-+]?\d+(?:\.\d+)?%?")
    for part in (first.split("$ python ")[1], search.split("$ python ")[1]):
        command, *expected = part.strip().splitlines()
        script, *rest = shlex.split(command)
        run = run_real(script, [str(ROOT / word) if word.startswith("config/") else word for word in rest],
                       tmp_path)
        out, err = run.communicate(timeout=900)
        assert run.returncode == 0, err
    printed = out.splitlines()
    for text in expected:
        blank = re.sub(r" +", " ", numbers.sub("", text))
        near = [other for other in printed if re.sub(r" +", " ", numbers.sub("", other)) == blank]
        assert any(like(numbers.findall(text), numbers.findall(other)) for other in near), f"{text}\n{near}"


def like(ours, theirs):
    """Are numbers of two lines alike, a share of a loss as far as the interval behind it is wide and 0.3%,
    those of bytes to 1%, others to 3%? A processor of other vectors trains to other weights."""
    values = [(float(a.rstrip("%")), float(b.rstrip("%")), a.endswith("%") and "." in a) for a, b in zip(
        ours, theirs)]
    shares = [a for a, _, share in values if share]
    wide = max(shares) - min(shares) if len(shares) == 3 else 0
    return len(ours) == len(theirs) and all(
        abs(a - b) <= (0.3 + wide + 0.1 * abs(a) if share else max(1, 0.03 * abs(a)))
        for a, b, share in values)
