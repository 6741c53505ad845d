"""What a run says while it trains, and what a sample says at its end."""
import re

import pytest
import torch
from arms import ARMS, build, tokens
from conftest import Job

from decode import counters
from model import GPT
from training import console, runtime

# arm: what its evaluations say of it, and nothing else
SAID = {"dense": r"([\d.]+ of )?[\d.]+ [kM]MACs a token", "topk": r"MLP \d+% active, \d+ of \d+ units dead",
        "columns": r"of \d+ columns", "experts": r"of \d+ experts", "exits": r"[\d.]+ of \d layers a token",
        "ponder": r"[\d.]+ of \d runs a token", "dendrites": r"of \d+ branches open",
        "predict": r"the predictor finds \d+%"}
LINE = (r"step (\d+)/(\d+)  train (\d\.\d{4})  val (\d\.\d{4})( \| .*)* \| ([\d.]+ of )?[\d.,]+ "
        r"[kM]MACs a token")


def said_of(model):
    """The parts of an evaluation's line."""
    idx = tokens(2, 9)
    row = counters.summary(counters.counters(model, idx)) | counters.depth_used(model, idx)
    return console.work_lines(model, row, counters.trained_step_macs(model, idx[:1]))


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS.keys())
def test_an_evaluation_says_what_the_model_has_and_nothing_else(arm):
    model = build(arm, std=0.2)
    before = model.training, model.choices
    said = " | ".join(said_of(model))
    assert (model.training, model.choices) == before
    has = {"columns": model.config.columns, "experts": model.config.experts, "exits": model.config.exits,
           "ponder": model.config.ponder, "dendrites": model.config.dendrites,
           "predict": model.config.mlp_predict}
    for name, there in has.items():
        assert bool(re.search(SAID[name], said)) == bool(there), said
    assert re.search(SAID["dense"], said) and not re.search("nan|n/a|None", said)
    assert all(int(dead) <= int(units) for dead, units in re.findall(r"(\d+) of (\d+) units dead", said))


def test_a_dense_model_is_said_to_do_all_of_its_work():
    model = build({}, std=0.2)
    shapes = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "wpe" not in name)
    assert said_of(model) == [console.macs_text(shapes, shapes)]
    assert counters.trained_step_macs(model, tokens(1, 9)) == (shapes, shapes)


@pytest.mark.parametrize("arm", ["predict", "columns", "experts"])
def test_a_sparse_model_is_said_to_do_less(arm):
    macs, whole = counters.trained_step_macs(build(ARMS[arm], std=0.2), tokens(1, 9))
    assert 0 < macs < whole


def test_an_integer_model_counts_as_the_one_that_it_was_made_of():
    from decode.quantized import quantize
    model = build({}, std=0.2)
    whole = counters.whole_macs(GPT, model.config)
    assert counters.step_macs(quantize(model, "int8"), tokens(1, 9))[1] == whole


def test_the_bar_shows_the_cross_entropy_and_what_is_added_apart():
    assert console.bar_text(2.5, 0.0, 1234.5) == "loss 2.5000, 1,234 tokens/s"
    assert console.bar_text(2.5, 0.25, 10) == "loss 2.2500 +0.2500 aux, 10 tokens/s"


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS.keys())
def test_a_training_loss_is_the_cross_entropy_and_what_the_model_says_it_added(arm):
    model, idx = build(arm, std=0.2), tokens(2, 9)
    torch.manual_seed(0)
    logits, loss = model.train()(idx, idx.roll(-1, 1))
    extra = model.auxiliary
    logits = model.eval()(idx, idx)[0] if logits is None else logits
    own = torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx.roll(-1, 1).flatten())
    torch.testing.assert_close(own + extra, loss.detach(), rtol=1e-4, atol=1e-5)
    model.eval()(idx, idx)
    assert type(model.auxiliary) is int and model.auxiliary == 0


def test_a_run_says_where_it_computes_what_it_found_and_what_to_type(train):
    result = train(event_gate=True, eval_interval=8)
    lines = result.out.splitlines()
    assert "device cpu, float32, 1 thread" in lines
    found = [match for line in lines if (match := re.fullmatch(LINE, line))]
    rows = [row for row in train.metrics() if "val_loss" in row]
    assert [(int(m[1]), int(m[2])) for m in found] == [(row["iter"], 16) for row in rows] == [
        (0, 16), (8, 16), (16, 16)]
    assert [m[4] for m in found] == [f"{row['val_loss']:.4f}" for row in rows]
    assert "zeros" in rows[0] and "by_layer" in rows[0]               # the log keeps its keys
    folder = train.folder / "out"
    assert re.fullmatch(rf"done in \d+ s: {folder}/ckpt.pt, best val loss [\d.]+; sample with: "
                        rf"python sample.py --out_dir={folder}", lines[-1])
    assert "aux, " in result.err and not re.search("n/a|nan", result.out + result.err)


def test_the_last_line_has_the_loss_of_what_is_saved_where_an_evaluation_before_it_was_better(train):
    """A retrofit at a rate that destroys it: iteration 0 is the best and is not what ckpt.pt holds."""
    train(out="dense", max_iters=40, learning_rate=1e-2)
    said = train(out="worse", init_from=train.folder / "dense", window=4, max_iters=4, eval_interval=4,
                 learning_rate=0.5, warmup_iters=0).out.splitlines()[-1]
    first, last = [row["val_loss"] for row in train.metrics("worse") if "val_loss" in row]
    assert last > first and f"ckpt.pt, val loss {last:.4f} (the best was {first:.4f}); sample with: " in said


def test_the_bar_agrees_with_the_evaluation_where_a_mechanism_adds_to_the_loss(train):
    """The last bar's cross-entropy is below the loss that the log has, by what is added."""
    result = train(event_gate=True, event_cost=5.0)
    shown, extra = re.findall(r"loss ([\d.]+) \+([\d.]+) aux", result.err)[-1]
    assert float(extra) > 0.01
    logged = [row["loss"] for row in train.metrics() if "loss" in row][-1]
    assert float(shown) + float(extra) == pytest.approx(logged, abs=2e-4)


def test_reasons_are_behind_verbose(train):
    assert "no native bf16" not in train(max_iters=0).out and "eager" not in train(max_iters=0, out="b").out
    assert "dtype as asked; eager" in train(max_iters=0, verbose=True, out="c").out
    assert str(runtime.choose("cpu", "float32", False)) == "device cpu, float32"


@pytest.mark.parametrize("flags, typed", [
    (dict(act="relu2", mlp_topk=0.25, mlp_predict=4), " --sparse_decode=True"), ({}, ""),
    (dict(n_layer=2, exits="1"), " --sparse_decode=True")])
def test_the_command_that_a_run_ends_with_samples_sparsely_and_says_what_that_costs(train, flags, typed):
    said = train(max_iters=4, **flags, out="my run").out.splitlines()[-1]
    command = said.partition("sample with: ")[2]
    assert command == f"python sample.py --out_dir='{train.folder / 'my run'}'{typed}"
    done = Job("sample.py", [f"--out_dir={train.folder / 'my run'}", *typed.split(), "--num_samples=1",
                             "--max_new_tokens=12", "--device=cpu"], train.folder).wait()
    assert done.status == 0, done.err
    last = done.err.splitlines()[-1]
    assert re.match(r"12 tokens in [\d.]+ s, [\d,]+ tokens/s", last) and "n/a" not in last
    assert ("of the dense multiply-adds" in last) == ("mlp_predict" in flags)   # no token leaves this one
    assert ("layers per token" in last) == ("exits" in flags)
