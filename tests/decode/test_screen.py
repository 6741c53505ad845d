"""Screened units: what a copy in a few bits picks, what decodes by it, and where thresholds come from."""
import copy
import math
import re

import pytest
import torch
from arms import ARMS, build, tokens
from conftest import Job, one_sentence, words

import sample
from configurator import ConfigError
from decode import calibrate, engine, sampling
from decode.context import Cache
from decode.quantized import quantize
from decode.way import choose_way
from kernels.build import cpu_library
from model import GPT
from sample import SampleConfig, with_thresholds
from training import checkpoint

ARM, GATES = ARMS["mlp_screen"], ARMS["screened_gates"]
both = pytest.mark.parametrize("arm", [ARM, GATES, GATES | dict(mlp_screen=16)],
                               ids=["relu2", "swiglu", "swiglu without a copy"])
built = pytest.mark.skipif(cpu_library()[0] is None, reason="no C kernels here")


def shares(model, idx):
    """The share of units that each layer's copy picks of tokens idx."""
    found = []
    hooks = [mlp.register_forward_hook(lambda mlp, args, _: found.append(
        (mlp.scores(*args) > mlp.edge).float().mean().item())) for mlp in calibrate.screened(model)]
    model.use_policy()(idx)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_layers_pick_the_mean_share_that_is_asked_for_in_proportion_to_what_fires(bits):
    idx = tokens(32, 16, seed=5)
    model = build(ARM, std=0.2, mlp_screen=bits)
    natural = calibrate.calibrate(model, idx, 0.25)
    found = shares(model, idx)
    assert sum(found) / len(found) == pytest.approx(0.25, abs=0.02)
    for share, fires in zip(found, natural):
        assert share == pytest.approx(0.25 * fires / (sum(natural) / len(natural)), abs=0.03)


@both
@torch.inference_mode()
def test_all_units_picked_are_the_exact_model_and_none_picked_is_no_mlp(arm):
    model, idx = build(arm, std=0.2), tokens(3, 9)
    exact = model.use_policy(False)(idx)[0]
    calibrate.calibrate(model, idx, 1.0)
    assert all(mlp.edge == -math.inf for mlp in calibrate.screened(model))
    torch.testing.assert_close(model.use_policy()(idx)[0], exact, atol=1e-6, rtol=0)
    for mlp in calibrate.screened(model):
        mlp.edge.fill_(math.inf)
        mlp.c_proj.bias.zero_()
    nothing = model(idx)[0]
    for mlp in calibrate.screened(model):
        mlp.c_proj.weight.zero_()
    torch.testing.assert_close(model.use_policy(False)(idx)[0], nothing, atol=1e-6, rtol=0)
    new = torch.cat(list(sampling.stream(model.use_policy(), idx, 3, sampling.Sampler(0))), dim=1)
    assert new.shape == (3, 3)


@torch.inference_mode()
def test_all_that_fires_is_nearly_the_exact_model():
    model, idx = build(ARM, std=0.2), tokens(8, 16, seed=3)
    exact = model.use_policy(False)(idx)[0]
    calibrate.calibrate(model, idx, 0)
    off = (model.use_policy()(idx)[0] - exact).abs().max()
    calibrate.calibrate(model, idx, 0.1)
    assert off < 0.05 < (model.use_policy()(idx)[0] - exact).abs().max()


def test_one_token_of_text_is_enough_for_a_number_and_wrong_models_get_a_sentence():
    model = build(ARM)
    calibrate.calibrate(model, tokens(1, 1), 0.25)
    assert not calibrate.needs_thresholds(model)
    with pytest.raises(ConfigError, match="mlp_screen=4"):
        calibrate.calibrate(build({}), tokens(1, 4), 0.25)
    with pytest.raises(ConfigError, match="act='gelu'"):
        build(dict(mlp_screen=4))
    with pytest.raises(ConfigError, match="mlp_screen=5"):
        build(dict(mlp_screen=5, act="relu2"))


@both
def test_a_training_step_clears_thresholds_and_decoding_then_says_what_is_missing(arm):
    model, idx = build(arm, std=0.2), tokens(2, 8)
    model.train()
    model(idx, idx)[1].backward()
    model.regularise()
    model.eval().use_policy()
    assert calibrate.needs_thresholds(model)
    with pytest.raises(ConfigError, match="calibrate"):
        model(idx)
    model.use_policy(False)(idx)


@both
def test_thresholds_travel_with_the_checkpoint_and_a_plain_one_has_none(arm):
    model, plain = build(arm, std=0.2), build(dict(act=arm["act"]), std=0.2)
    again = build(arm)
    again.load_state_dict(model.state_dict())
    for ours, theirs in zip(calibrate.screened(again), calibrate.screened(model)):
        assert all(map(torch.equal, ours.buffers(), theirs.buffers()))
    again.load_state_dict(plain.state_dict())
    assert calibrate.needs_thresholds(again)
    kept = [t for mlp in calibrate.screened(again.bfloat16()) for t in mlp.buffers()]
    assert all(t.dtype == torch.float32 for t in kept) and len(kept) == (2 if arm is ARM else 4)


def test_thresholds_without_data_come_from_what_the_model_writes():
    model = build(ARM, std=0.2)
    for mlp in calibrate.screened(model):
        mlp.edge.fill_(math.nan)
    said = with_thresholds(model, {"config": {"dataset": "./no/such/data"}})
    assert "training data are not here" in said and not calibrate.needs_thresholds(model)
    assert "as the checkpoint has them" in with_thresholds(model, {})


@built
@torch.inference_mode()
@both
@pytest.mark.parametrize("kind", ["int8", "int4", "q4_all"])
def test_whole_numbers_under_a_screen_decode_what_forward_computes(kind, arm):
    model, idx = quantize(build(arm, std=0.2), kind), tokens(3, 5)
    calibrate.calibrate(model, tokens(8, 16, seed=3), 0.25)
    model.use_policy()
    program = engine.program_of(model, Cache(model, 3, 5), 31, None, idx.device)
    program.begin(idx, [0] * 3, [1] * 3)
    for column in range(5):
        found = program.step()
        torch.testing.assert_close(found, model(idx[:, :column + 1])[0][:, 0], atol=2e-2, rtol=0)


@built
@torch.inference_mode()
def test_a_decode_step_reads_the_copy_and_the_rows_that_it_picks():
    from sparse_kernels import counting
    model, idx = build(ARM, std=0.2), tokens(1, 5)
    work = {}
    for policy in (False, True):
        program = engine.program_of(model.use_policy(policy), Cache(model, 1, 16), 31, None, idx.device)
        program.begin(idx, [0], [1])
        with counting() as tally:
            program.step()
        work[policy] = tally.bytes, sum(op.read for op, name in zip(program.table, program.names)
                                        if name.startswith("linear") and op.read)
    picked = work[True][1]
    assert 0 < picked < 2 * 64
    copies = sum(mlp.copy_of(program.cache)[0].nbytes for mlp in calibrate.screened(model))
    assert work[True][0] < work[False][0] + copies


@torch.inference_mode()
def test_screened_gates_pick_in_every_layer_the_share_that_is_asked_for():
    """Of those units whose gate times their reach is largest: the reach is that of the text."""
    model, idx = build(GATES, std=0.2), tokens(32, 16, seed=5)
    for live in (0.3, 0.6):
        assert calibrate.calibrate(model, idx, live) == [1.0, 1.0]
        hooks, found = [], []
        for mlp in calibrate.screened(model):
            hooks.append(mlp.c_proj.register_forward_pre_hook(
                lambda _, args: found.append((args[0] != 0).float().mean().item())))
        model.use_policy()(idx)
        for hook in hooks:
            hook.remove()
        assert found == [pytest.approx(live, abs=0.03)] * 2
    mlp, inputs = calibrate.screened(model)[0], []
    hook = mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model.use_policy(False)(idx)
    hook.remove()
    up = mlp.c_fc(inputs[0])[..., -mlp.c_proj.in_features:]
    reach = up.square().mean((0, 1)).sqrt() * mlp.c_proj.weight.norm(dim=0)
    torch.testing.assert_close(mlp.reach / mlp.reach.mean(), reach / reach.mean())
    scores = torch.nn.functional.silu(mlp.estimate(inputs[0], None)).abs() * reach
    kept = scores > scores.flatten().quantile(0.4)
    assert (kept == (mlp.scores(inputs[0], None) > mlp.edge)).float().mean() > 0.97


@torch.inference_mode()
@pytest.mark.parametrize("lost", ["edge", "reach"])
def test_gates_that_lost_a_part_of_their_thresholds_leave_no_unit_out_unsaid(lost):
    """A file may hold one and not the other: as if there were none, decoding and in a whole forward."""
    model, idx = build(GATES, std=0.2), tokens(8, 16, seed=5)
    calibrate.calibrate(model, idx, 0.5)
    assert not calibrate.needs_thresholds(model)
    getattr(calibrate.screened(model)[0], lost).fill_(math.nan)
    assert calibrate.needs_thresholds(model)
    with pytest.raises(ConfigError, match="has no thresholds"):
        model.use_policy()(idx)
    assert "thresholds that are not found" in str(engine.trial(model, idx.device, 1))


@built
@torch.inference_mode()
@pytest.mark.parametrize("kind, bits", [("", 4), ("int4", 4), ("", 16), ("int8", 16)])
def test_a_decode_step_reads_the_gates_or_their_copy_and_rows_of_the_units_that_it_picks(kind, bits):
    from sparse_kernels import counting
    model, idx = build(GATES, std=0.2, n_embd=64, n_head=2, mlp_screen=bits), tokens(1, 5)
    own = bool(kind) or bits == 16
    model = quantize(model, kind) if kind else model
    calibrate.calibrate(model, tokens(8, 16, seed=3), 0.3)
    program = engine.program_of(model.use_policy(), Cache(model, 1, 16), 31, None, idx.device)
    program.begin(idx, [0], [1])
    with counting() as tally:
        program.step()
    listed = [op.read for op, name in zip(program.table, program.names) if op.read and "MLP" in name]
    counts, units = listed[::3 - own], calibrate.screened(model)[0].c_proj.in_features
    assert len(counts) == 2 and all(0 < n < 0.6 * units for n in counts)
    assert listed == [n for n in counts for _ in range(3 - own)]
    dense = engine.program_of(model.use_policy(False), Cache(model, 1, 16), 31, None, idx.device)
    dense.begin(idx, [0], [1])
    with counting() as whole:
        dense.step()
    assert tally.bytes < (0.9 if kind else 0.85) * whole.bytes


def test_the_copy_is_made_once_and_again_when_a_weight_changes(monkeypatch):
    import sparse_kernels
    made, really = [], sparse_kernels.quantize
    monkeypatch.setattr(sparse_kernels, "quantize", lambda *args: made.append(1) or really(*args))
    model, idx = build(ARM, std=0.2), tokens(1, 4)
    layers = len(calibrate.screened(model))
    model.use_policy()
    for _ in range(2):
        list(sampling.stream(model, idx, 3, sampling.Sampler(0)))
        with torch.no_grad():
            model(idx)
    assert len(made) == layers
    first = calibrate.screened(model)[0]
    before = first.copy_of(None)[0].clone()
    with torch.no_grad():
        first.c_fc.weight.mul_(-1)
    assert not torch.equal(first.copy_of(None)[0], before) and len(made) == layers + 1
    again = copy.deepcopy(model)
    with torch.no_grad():
        calibrate.screened(again)[0].c_fc.weight.zero_()
    assert not torch.equal(calibrate.screened(again)[0].copy_of(None)[0], first.copy_of(None)[0])


@torch.inference_mode()
@pytest.mark.parametrize("live", [0, 0.25, 1])
def test_a_layer_none_of_whose_units_fires_reads_none_and_the_others_keep_their_share(live):
    model, idx = build(ARM, std=0.2), tokens(32, 16, seed=5)
    silent, *others = calibrate.screened(model)
    silent.c_fc.weight.zero_()
    silent.c_fc.bias.fill_(-1)
    exact = model.use_policy(False)(idx)[0]
    natural = calibrate.calibrate(model, idx, live)
    assert natural[0] == 0 < min(natural[1:])
    found = shares(model, idx)
    assert found[0] == (live == 1) and all(0 < share <= 1 for share in found[1:])
    if live != 0.25:
        assert (model.use_policy()(idx)[0] - exact).abs().max() < 0.05
    new = torch.cat(list(sampling.stream(model.use_policy(), idx[:1], 3, sampling.Sampler(0))), dim=1)
    assert new.shape == (1, 3)


@torch.inference_mode()
def test_a_model_no_unit_of_which_fires_is_calibrated_and_decodes():
    model, idx = build(ARM, std=0.2), tokens(2, 8)
    for mlp in calibrate.screened(model):
        mlp.c_fc.weight.zero_()
        mlp.c_fc.bias.fill_(-1)
    for live in (0, 0.25, 1):
        assert set(calibrate.calibrate(model, idx, live)) == {0.0} and not calibrate.needs_thresholds(model)
        exact = model.use_policy(False)(idx)[0]
        torch.testing.assert_close(model.use_policy()(idx)[0], exact, atol=1e-6, rtol=0)
        assert len(list(sampling.stream(model, idx[:1], 3, sampling.Sampler(0)))) == 3


@built
@torch.inference_mode()
@pytest.mark.parametrize("kind", ["", "int8", "int4"])
@pytest.mark.parametrize("shape", [dict(n_embd=36, n_head=3, mlp_units=77),
                                   dict(n_embd=20, n_head=1, mlp_units=1)])
@both
def test_odd_widths_decode_what_forward_computes(shape, kind, arm):
    model, idx = build(arm | shape, std=0.2), tokens(2, 6)
    model = quantize(model, kind) if kind else model
    calibrate.calibrate(model, tokens(8, 16, seed=3), 0.4)
    program = engine.program_of(model.use_policy(), Cache(model, 2, 6), 31, None, idx.device)
    program.begin(idx, [0] * 2, [1] * 2)
    for column in range(6):
        found = program.step()
        torch.testing.assert_close(found, model(idx[:, :column + 1])[0][:, 0], atol=2e-2, rtol=0)


@built
@pytest.mark.parametrize("rows", [1, 70])
def test_what_is_saved_is_measured_beside_the_same_model_without(rows, monkeypatch):
    monkeypatch.setattr(calibrate, "TRIAL", 0.01)
    model = build(ARM, std=0.2).use_policy()
    text, before = tokens(1, rows), model.choices
    half = calibrate.beside_dense(model, text, 1)
    for mlp in calibrate.screened(model):
        mlp.edge.fill_(-math.inf)
    whole = calibrate.beside_dense(model, text, 1)
    assert 0 < half["bytes"] < whole["bytes"] and whole["bytes"] > 1 and half["speed"] > 0
    assert model.choices == before
    assert not calibrate.beside_dense(model.choose(forward="a reason"), text, 1)


@built
def test_sampling_says_first_what_is_saved_and_lost(train, data):
    train(max_iters=4, act="relu2", block_size=32)
    out = train.folder / "out"

    def sampled(**keys):
        keys = dict(out_dir=out, mlp_screen=4, num_samples=1, max_new_tokens=5, threads=1) | keys
        done = Job("sample.py", words(**keys), train.folder).wait()
        assert done.status == 0, done.err
        return done.err
    said = sampled()
    assert re.search(r"screened units: reads \d+% of the dense model's bytes; [\d.]+x its tokens/s; "
                     r"loss [+-]0\.\d{4} on [\d,]+ held-out tokens", said), said
    assert "held-out" not in sampled(measure=False)
    alone = Job("sample.py", words(out_dir=out, measure=False), train.folder).wait()
    one_sentence(alone, "sample.py", "measure=False", "--mlp_screen=4")
    whole = sampled(quantize="int8", val=True)
    assert "quantised to int8" in whole and "on 16,384 held-out tokens" in whole
    loaded = torch.load(out / "ckpt.pt", weights_only=True)
    loaded["config"]["dataset"] = "gone/"
    (train.folder / "moved").mkdir()
    checkpoint.save(loaded, train.folder / "moved" / "ckpt.pt")
    lost = sampled(out_dir=train.folder / "moved")
    assert "that the model writes" in lost and "no held-out text here" in lost
    found = sampled(out_dir=train.folder / "moved", tokenizer=data)
    assert f"tokens of {data}" in found and "held-out tokens" in found


def test_a_typed_flag_builds_the_model_once(tmp_path, monkeypatch):
    model, made = build({"act": "relu2", "vocab_size": 256}, std=0.2), []
    checkpoint.save({"model": model.state_dict(), "model_args": model.config.model_args(),
                     "tokenizer": {"tokenizer": "byte"}}, tmp_path / "ckpt.pt")
    start = GPT.__init__
    monkeypatch.setattr(GPT, "__init__", lambda self, *words, **keys: made.append(1) or start(self, *words,
                                                                                             **keys))
    loaded = sample.load_run("resume", str(tmp_path), mlp_screen=4, mlp_live=0.5)[0]
    assert len(made) == 1 and loaded.config.mlp_screen == 4


@pytest.mark.parametrize("arm", ["topk", "exits", "ponder", "experts"])
@pytest.mark.parametrize("threads", [0, 1])
def test_a_sample_and_a_comparison_decode_alike_by_the_same_words(arm, threads):
    device, first = torch.device("cpu"), build(ARMS[arm], std=0.2)
    said = sample.decoding(first, SampleConfig(threads=threads), device)
    way, count, took = choose_way(second := build(ARMS[arm], std=0.2), device, threads)
    assert said.startswith(way) and bool(took) == (way == "decode engine" and not threads)
    assert way != "decode engine" or (first.choices.threads and second.choices.threads == count)
