"""A dense model that exists gets blocks: what is taken, where blocks begin, what the run says and keeps."""
import dataclasses
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from arms import ARMS, TINY, build, tokens
from conftest import ROOT, Job, Trainer, in_parallel, one_sentence, run_real, same, words
from conftest import TINY as RUN
from torch.nn import functional as F

from benchmarks.arms import key_defaults, keys_of
from benchmarks.retrofit import Retrofit
from benchmarks.trials import Lab
from configurator import ConfigError
from data import dataset as datasets
from data.dataset import write_dataset
from data.tokenizer import CharTokenizer
from model import GPT, GPTConfig, build_model
from training import checkpoint, estimate, retrofit

REFUSED = {"rope": "pos", "rope_theta": "pos", "rope_factor": "pos", "grouped": "n_kv_head", "swiglu": "act",
           "zero_init": "zero_init", "compartments": "compartments", "dendrites": "dendrites",
           "energy": "dendrites"}
PARENT = {"mlp_screen": dict(act="relu2"), "qk_gain": dict(qk_norm=True),   # what an arm needs, beside depth
          "gate_first": dict(act="swiglu"), "screened_gates": dict(act="swiglu")}
# the function is the dense model's, bit for bit; or within so many of a loss of 3.4 nats
EXACT = ("gpt2", "untied", "ngram", "recompute", "loss_chunks", "mlp_screen", "screened_gates",
         "exits", "screen", "adapters")
NEARLY = {"ponder": 1e-3}
FITTING = [arm for arm in ARMS if arm not in REFUSED]
IDS = tokens(32, 16, seed=5)


def parent_of(arm, **changes):
    """The dense model that an arm is switched on in, and the arm's config."""
    shape = {key: value for key, value in ARMS[arm].items() if key == "n_layer"} | PARENT.get(arm, {})
    return build(shape, std=0.2, **changes), GPTConfig(**TINY | shape | ARMS[arm] | changes)


def retrofitted(dense, **flags):
    return retrofit.retrofit(dense, dataclasses.replace(dense.config, **flags), IDS, 1)


@torch.no_grad()
def logits_of(model, rows=8):
    idx = tokens(rows, 16, seed=9)
    return model.eval()(idx, tokens(rows, 16, seed=10))


@pytest.mark.parametrize("arm", FITTING)
def test_every_tensor_is_named_once_and_what_is_taken_is_the_dense_models(arm):
    dense, config = parent_of(arm)
    before = {name: t.clone() for name, t in dense.state_dict().items()}
    retrofit.check(dense.config, config, "X")
    model, account = retrofit.retrofit(dense, config, IDS, 1)
    assert model.config == config
    ours = model.state_dict()
    assert sorted(account.taken + account.new) == sorted(ours)
    assert sorted(account.taken + account.dropped) == sorted(before)
    moved = ("columns", "experts", "two_of_four", "units")          # units in another order, weights chosen
    for name in account.taken:
        if arm not in moved or (not retrofit.OF_UNITS.search(name) and arm != "two_of_four"):
            assert torch.equal(ours[name], before[name]), name
    same(dense.state_dict(), before)                                   # a constructor leaves what it is given


@pytest.mark.parametrize("arm", FITTING)
def test_where_the_mechanism_admits_it_the_function_is_the_dense_models(arm):
    dense, config = parent_of(arm)
    model, _ = retrofit.retrofit(dense, config, IDS, 1)
    (theirs, before), (ours, after) = logits_of(dense), logits_of(model)
    if arm in EXACT:
        assert torch.equal(ours, theirs)
    else:
        assert after - before < NEARLY.get(arm, 0.05) and torch.isfinite(after)


@pytest.mark.parametrize("arm", FITTING)
def test_a_retrofit_trains_and_what_is_new_learns(arm):
    dense, config = parent_of(arm)
    model, account = retrofit.retrofit(dense, config, IDS, 1)
    optimizer = torch.optim.Adam(model.train().parameters(), 1e-3)
    begun = {name: p.detach().clone() for name, p in model.named_parameters() if name in account.new}
    for step in range(3):
        torch.manual_seed(step)
        model(IDS, IDS)[1].backward()
        model.regularise()
        optimizer.step()
        optimizer.zero_grad()
    still = [name for name, p in model.named_parameters() if name in begun and torch.equal(p, begun[name])]
    assert not still


@pytest.mark.parametrize("arm", REFUSED)
def test_flags_that_would_change_what_a_tensor_means_are_one_sentence(arm):
    dense, config = parent_of(arm)
    flag = REFUSED[arm]
    with pytest.raises(ConfigError, match=f"^{flag}=.*leave --{flag} out, or start anew") as caught:
        retrofit.check(dense.config, config, "X")
    assert "--init_from=X" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("arm, key", [("columns", "columns_active"), ("experts", "experts_active")])
def test_where_all_groups_answer_the_function_is_the_dense_models(arm, key):
    dense, config = parent_of(arm, act="relu2")
    model, _ = retrofit.retrofit(dense, dataclasses.replace(config, **{key: getattr(config, arm)}), IDS, 1)
    torch.testing.assert_close(logits_of(model)[0], logits_of(dense)[0], atol=1e-5, rtol=1e-5)


def grouped(model, groups=4):
    """Rewrite a dense MLP so that four blocks of units fire for one quarter of the inputs each, and shuffle
    the units -> which block each unit is of."""
    mlp, C = model.transformer.h[0].mlp, model.config.n_embd
    units = mlp.c_proj.in_features
    place = torch.randperm(units, generator=torch.Generator().manual_seed(7)) % groups
    with torch.no_grad():
        mlp.c_fc.weight.zero_()
        mlp.c_fc.bias.fill_(-0.5)
        mlp.c_fc.weight[torch.arange(units), place] = 3.0
        mlp.c_fc.weight[:, groups:].normal_(0, 0.02, generator=torch.Generator().manual_seed(8))
    return place, C


@torch.no_grad()
def test_units_that_fire_together_become_a_group_and_the_router_finds_it():
    dense = build(dict(act="relu2", n_layer=1), std=0.2)
    place, C = grouped(dense)
    x = 0.1 * torch.randn(512, C, generator=torch.Generator().manual_seed(9))
    x[torch.arange(512), torch.arange(512) % 4] += 1.0
    model = GPT(dataclasses.replace(dense.config, columns=4, columns_active=1), seed=1).eval()
    mlp, theirs = model.transformer.h[0].mlp, dense.transformer.h[0].mlp
    mlp.start_from_dense(theirs, x)
    units = mlp.c_fc.weight[:, :4].argmax(1).unflatten(0, (4, -1))     # of each group, the block of its units
    assert all(len(set(group.tolist())) == 1 for group in units) and len(set(units[:, 0].tolist())) == 4
    winners, gates = mlp.gate.winners(x)
    assert (units[winners[:, 0], 0] == torch.arange(512) % 4).float().mean() > 0.99
    assert ((gates - 0.5).abs() < 0.2).all()
    ctx = retrofit_context()
    off = (mlp(x[None], ctx) - theirs(x[None], ctx)).norm() / theirs(x[None], ctx).norm()
    assert off < 0.25


def retrofit_context():
    from decode.context import Context
    return Context(None)


@torch.no_grad()
@pytest.mark.parametrize("units, exact", [(48, False), (80, True), (64, True)])
def test_fewer_units_are_those_that_write_most_and_more_of_them_begin_by_writing_nothing(units, exact):
    dense = build(dict(act="relu2"), std=0.2)
    model, account = retrofitted(dense, mlp_units=units)
    assert not account.new and not account.dropped
    if exact:
        torch.testing.assert_close(logits_of(model)[0], logits_of(dense)[0], atol=1e-6, rtol=1e-5)
    other = GPT(model.config, seed=1).eval()                            # the first units, whatever they write
    state = {name: t[tuple(slice(0, n) for n in other.state_dict()[name].shape)]
             for name, t in dense.state_dict().items()}
    if units < 64:
        other.load_state_dict(state)
        off = [(logits_of(m)[0] - logits_of(dense)[0]).norm() for m in (model, other)]
        assert off[0] < 0.9 * off[1]


@torch.no_grad()
def test_event_gates_begin_with_the_share_open_that_they_aim_at_and_keep_the_largest():
    dense = build({}, std=0.5)
    x = torch.randn(4096, 16, generator=torch.Generator().manual_seed(1))
    model = GPT(dataclasses.replace(dense.config, event_gate=True, event_rate=0.25), seed=1).eval()
    mlp = model.transformer.h[0].mlp
    mlp.load_state_dict(dense.transformer.h[0].mlp.state_dict(), strict=False)
    mlp.start_from_dense(dense.transformer.h[0].mlp, x)
    a = mlp.activations(x)
    kept = mlp.select(a, retrofit_context()) != 0
    assert kept.float().mean().item() == pytest.approx(0.25, abs=0.005)
    assert a[kept].abs().min() >= a[~kept].abs().max()


@torch.no_grad()
def test_event_gates_of_units_that_fire_less_than_they_aim_at_leave_all_that_fires():
    dense = build(dict(act="relu2"), std=0.5)
    for block in dense.transformer.h:
        block.mlp.c_fc.bias.fill_(-2.0)
    model, _ = retrofitted(dense, event_gate=True, event_rate=0.9)
    torch.testing.assert_close(logits_of(model)[1], logits_of(dense)[1], atol=2e-3, rtol=0)


@torch.no_grad()
def test_a_predictor_of_full_rank_begins_by_finding_most_winners():
    dense = build(dict(act="relu2"), std=0.5)
    model, _ = retrofitted(dense, mlp_topk=0.25, mlp_predict=16, mlp_active=0.25)
    mlp = model.transformer.h[0].mlp
    x = retrofit.inputs_of(model, ["transformer.h.0.mlp"], tokens(8, 16, seed=77))["transformer.h.0.mlp"]
    a = mlp.select(mlp.activations(x), retrofit_context())
    found = torch.where(mlp.chosen(mlp.guess(mlp.sense(x))) > 0, a, 0)
    assert found.square().sum() / a.square().sum() > 0.8                # a chance pick would find a quarter
    wider, _ = retrofitted(dense, mlp_topk=0.25, mlp_predict=40)        # a rank above the stream's width
    assert torch.isfinite(logits_of(wider.use_policy())[0]).all()


@torch.no_grad()
def test_two_of_four_keeps_what_matters_for_the_inputs_and_training_can_still_change_it():
    dense = build({}, std=0.2)
    model = GPT(dataclasses.replace(dense.config, weights="2:4"), seed=1)
    linear = model.transformer.h[0].mlp.c_fc
    before = linear.weight.clone()
    x = torch.ones(64, 16)
    x[:, ::4] = 1e6
    linear.start_from_inputs(x)
    assert (linear.matrix()[:, ::4] == before[:, ::4]).all()
    assert ((linear.matrix() != 0).unflatten(-1, (-1, 4)).sum(-1) == 2).all()
    kept = linear.matrix() != 0
    assert torch.equal(linear.weight[kept], before[kept]) and (linear.weight[~kept] != 0).any()


def test_adapters_that_follow_leave_the_first_one_and_other_names_are_new():
    dense = build(dict(adapters="one", adapter_width=4), std=0.2)
    _, account = retrofitted(dense, adapters="one,two")
    assert {name.split(".")[-2] for name in account.new} == {"1"} and not account.dropped
    _, account = retrofitted(dense, adapters="two")
    assert len(account.new) == len(account.dropped) == 4


def test_probes_of_other_exits_are_new_and_what_is_switched_off_is_dropped():
    dense = build(dict(exits="1,2", n_layer=3), std=0.2)
    assert len(retrofitted(dense, exits="2")[1].new) == 2
    _, account = retrofitted(dense, exits="")
    assert not account.new and len(account.dropped) == 4


@pytest.mark.parametrize("arm", ["columns", "experts", "compartments", "dendrites", "swiglu"])
def test_a_sparse_parent_keeps_its_kind_of_units_and_takes_other_flags(arm):
    dense = build(ARMS[arm], std=0.2)
    model, account = retrofitted(dense, window=3, window_pattern="S", adapters="a", adapter_width=4)
    assert all("adapt" in name for name in account.new)
    first = slice(0, 3)                                                 # within the window nothing differs
    idx = tokens(4, 16)
    torch.testing.assert_close(model(idx, idx)[0][:, first], dense(idx, idx)[0][:, first])
    if arm == "dendrites":
        return                                                          # its MLP is a dense one
    with pytest.raises(ConfigError, match="leave --"):
        retrofit.check(dense.config, dataclasses.replace(dense.config, mlp_units=128), "X")


def test_an_account_says_layers_once_and_how_many_tensors_they_stand_for():
    _, account = retrofitted(build({}, std=0.2), event_gate=True)
    assert account.lines() == ["tensors: 29 taken, 2 new, 0 dropped",
                               "  new: h.*.mlp.select.threshold (2)"]


# -------------------------------------------------- a teacher -----------------------------------------------

def test_a_distilled_loss_is_cross_entropy_and_divergence_by_their_shares():
    logits, theirs = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    y = torch.randint(7, (2, 5))
    y[0, 3:] = -1
    ce = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)
    p = theirs.softmax(-1)
    kl = (p * (p.log() - logits.log_softmax(-1))).sum(-1)[y != -1].mean()
    aux = 0.125
    found = retrofit.distilled(0.25, ce + aux, logits, theirs, y)
    torch.testing.assert_close(found, 0.75 * ce + 0.25 * kl + aux)
    assert retrofit.divergence(theirs, theirs, y).abs() < 1e-6


# -------------------------------------------------- runs ----------------------------------------------------

KEYS = dict(n_layer=3, block_size=8, n_embd=16, act="relu2")
OFF = {"n_layer", "n_head", "n_embd", "block_size"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory, data):
    trainer = Trainer(tmp_path_factory.mktemp("dense"), data)
    trainer(out="dense", **KEYS)
    return trainer


def fit(dense, *argv, out="out", status=0, **keys):
    """train.py from the dense run, with no key of a model's shape but those typed."""
    keys = {**{k: v for k, v in RUN.items() if k not in OFF}, "max_iters": 4, "eval_interval": 2,
            "dataset": dense.data, "out_dir": dense.folder / out, "init_from": dense.folder / "dense",
            "dropout": 0.0, **keys}
    result = Job("train.py", [*words(**keys), *argv], dense.folder).wait()
    assert result.status == status, result.err
    return result


def test_a_run_with_new_flags_says_what_it_took_and_keeps_where_it_comes_from(dense):
    said = fit(dense, mlp_topk=0.25, mlp_predict=4, out="predict").out
    assert "from dense: tensors: 22 taken, 9 new, 0 dropped" in said
    assert "h.*.mlp.guess.weight (3)" in said
    assert "with mlp_topk=0.25, mlp_predict=4 and nothing trained" in said
    kept = dense.checkpoint("predict")
    parent, was = kept["parent"], dense.checkpoint("dense")
    assert parent["name"] == "dense" and parent["iter_num"] == was["iter_num"]
    assert len(parent["sha256"]) == 64 and parent["untouched"] >= 0
    assert kept["model_args"] == was["model_args"] | dict(mlp_topk=0.25, mlp_predict=4, dropout=0.0)
    rows = dense.metrics("predict")
    assert rows[0]["val_loss"] == pytest.approx(parent["untouched"], abs=1e-6)      # the loop begins there
    assert rows[0]["iter"] == 0 and f"{parent['val_loss']:.4f} dense" in said


def test_a_retrofit_resumes_bit_for_bit_with_teacher_and_frozen_weights(dense):
    keys = dict(event_gate=True, teacher=dense.folder / "dense", distill=0.75, train_only="new", dropout=0.1)
    fit(dense, out="whole", max_iters=6, lr_decay_iters=6, **keys)
    fit(dense, out="parts", max_iters=4, lr_decay_iters=6, **keys)
    dense.resume(out="parts", max_iters=6)
    one, other = dense.checkpoint("whole"), dense.checkpoint("parts")
    for key in ("model", "optimizer", "parent"):
        same(one[key], other[key])
    was = dense.checkpoint("dense")["model"]
    for name, tensor in one["model"].items():
        assert (name in was) == torch.equal(tensor, was.get(name, tensor + 1)), name
    assert dense.losses("whole")[5] == dense.losses("parts")[5]


def test_a_teacher_changes_what_is_learnt_and_a_copy_of_the_model_as_teacher_teaches_the_data_alone(dense):
    start = dict(window=4, window_pattern="S", max_iters=2, eval_interval=2)
    fit(dense, out="alone", **start)
    fit(dense, out="taught", teacher=dense.folder / "dense", **start)
    one, other = (dense.losses(out) for out in ("alone", "taught"))
    assert other[0] < 0.7 * one[0]                                      # half of it is a divergence near 0
    assert not torch.equal(*(dense.checkpoint(out)["model"]["lm_head.weight"] for out in ("alone", "taught")))
    assert dense.checkpoint("taught")["config"]["distill"] == 0.5


@pytest.mark.parametrize("arm", [
    pytest.param(arm, marks=[] if arm in ("columns", "two_of_four", "mlp_screen") else pytest.mark.slow)
    for arm in FITTING])
def test_any_variant_can_be_switched_on_goes_on_and_writes(dense, arm):
    flags = {key: value for key, value in ARMS[arm].items() if key != "n_layer"}
    fit(dense, out=arm, max_iters=2, **flags)
    dense.resume(out=arm, max_iters=4)
    result = Job("sample.py", words(out_dir=dense.folder / arm, device="cpu", dtype="float32", num_samples=1,
                                    max_new_tokens=12, threads=1), dense.folder).wait()
    assert result.status == 0 and "---------------" in result.out, result.err
    folder = dense.folder / f"{arm}-safetensors"
    Job("training/export.py", words(out_dir=dense.folder / arm, to="safetensors", dtype="float32"),
        dense.folder).wait()
    assert (folder / "model.safetensors").is_file()
    assert dense.checkpoint(arm)["parent"]["name"] == "dense"


def test_a_plain_start_is_not_a_retrofit_but_says_where_it_comes_from(dense):
    said = fit(dense, out="plain", learning_rate=0, min_lr=0, max_iters=1).out
    assert "tensors:" not in said
    kept = dense.checkpoint("plain")
    same(kept["model"], dense.checkpoint("dense")["model"])
    assert kept["parent"]["name"] == "dense" and kept["parent"]["new"] == []


def test_a_shorter_block_is_cropped_and_the_flags_still_fit(dense):
    fit(dense, out="short", block_size=4, mlp_topk=0.5)
    kept = dense.checkpoint("short")
    assert kept["model_args"]["block_size"] == 4 == len(kept["model"]["transformer.wpe.weight"])


def test_mistakes_are_one_sentence_and_leave_folders_as_they_are(dense, tmp_path):
    place = dense.folder / "dense"
    before = {path: path.read_bytes() for path in place.iterdir()}
    other = tmp_path / "char"
    write_dataset(other, {"train": [list(range(20)) * 40], "val": [list(range(20)) * 9]},
                  CharTokenizer([chr(97 + i) for i in range(20)]), "test")
    fit(dense, out="chars", init_from="scratch", dataset=other, n_layer=2, n_head=2, n_embd=16, block_size=8)
    cases = [
        (dict(n_embd=32), "n_embd=32", "n_embd=16", "leave --n_embd out"),
        (dict(n_layer=4), "n_layer=4", "n_layer=3"),
        (dict(size="small"), "n_layer=6", "n_layer=3"),
        (dict(vocab_size=999), "vocab_size=999", "leave --vocab_size out"),
        (dict(block_size=64), "block_size=64", "leave --block_size out"),
        (dict(dataset=other), "'byte'", "'char'"),
        (dict(out="dense", window=4), "out_dir=", "--out_dir=ANOTHER_FOLDER"),
        (dict(out="dense", teacher=place, window=4), "teacher=", "--out_dir=ANOTHER_FOLDER"),
        (dict(init_from=dense.folder / "nowhere", window=4), "nowhere", "must be scratch"),
        (dict(init_from=tmp_path, window=4), "holds no ckpt.pt"),
        (dict(teacher=dense.folder / "nowhere"), "teacher=", "nowhere", "must be gpt2"),
        (dict(teacher=dense.folder / "chars"), "teacher=", "vocab_size"),
        (dict(distill=0.2), "distill=0.2", "type --teacher=RUN"),
        (dict(teacher=place, distill=2), "distill=2.0", "(0, 1]"),
        (dict(train_only="all"), "train_only='all'"),
        (dict(train_only="new"), "train_only=new", "leave train_only out"),
        (dict(train_only="new", window=4), "train_only=new", "leave train_only out"),
        (dict(train_only="new", init_from="scratch", n_layer=1, n_head=2, n_embd=16), "--init_from=RUN"),
        (dict(dendrites=4, dendrites_active=2), "dendrites=4", "leave --dendrites out"),
        (dict(mlp_topk=0.5, event_gate=True), "mlp_topk", "event_gate"),
    ]
    for keys, *parts in cases:
        one_sentence(fit(dense, status=2, **{"out": "wrong", **keys}), "train.py", *parts)
    assert {path: path.read_bytes() for path in place.iterdir()} == before


def test_packed_and_quantised_parents_say_which_checkpoint_to_name(dense):
    fit(dense, out="two", weights="2:4", max_iters=1)
    for out, keys in (("two", {}), ("dense", dict(quantize="int8"))):
        written = dense.folder / f"{out}-packed"
        job = Job("training/export.py", words(out_dir=dense.folder / out, to="packed", **keys), dense.folder)
        assert job.wait().status == 0
        one_sentence(fit(dense, status=2, init_from=written, window=4, out="wrong"), "train.py",
                     "cannot learn")


def test_resuming_with_other_flags_names_the_way_to_switch_them_on(dense):
    fit(dense, out="again", max_iters=1)
    line = one_sentence(dense.resume(out="again", window=4, status=2), "train.py", "window=4")
    assert f"--init_from={dense.folder / 'again'} --out_dir=ANOTHER_FOLDER" in line
    line = one_sentence(dense.resume(out="again", n_embd=32, status=2), "train.py", "n_embd=32")
    assert "ANOTHER_FOLDER" not in line


def test_a_hugging_face_folder_and_an_export_take_flags_too(dense):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, n_positions=8, vocab_size=256))
    theirs.save_pretrained(dense.folder / "hf")
    said = fit(dense, init_from=dense.folder / "hf", window=4, weights="2:4", teacher=dense.folder / "hf",
               out="of-hf").out
    assert "from hf: tensors: 29 taken, 0 new, 0 dropped" in said and "window=4, weights=2:4" in said.replace(
        "weights=2:4, window=4", "window=4, weights=2:4")
    assert len(dense.checkpoint("of-hf")["parent"]["sha256"]) == 64
    Job("training/export.py", words(out_dir=dense.folder / "dense", to="safetensors", dtype="float32",
                                    export_dir=dense.folder / "exported"), dense.folder).wait()
    fit(dense, init_from=dense.folder / "exported", mlp_screen=4, out="of-export")
    assert dense.checkpoint("of-export")["parent"]["name"] == "exported"


def gpt2_folder(folder, **shape):
    """A Hugging Face folder of GPT-2's shape, but for what is named, with random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("flags", [
    dict(event_gate=True, event_rate=0.3), dict(exits="1", train_only="new"),
    dict(mlp_topk=0.25, mlp_predict=4),
    pytest.param(dict(columns=8, columns_active=4, window=4), marks=pytest.mark.slow),
    pytest.param(dict(experts=4, experts_active=2), marks=pytest.mark.slow),
    pytest.param(dict(mlp_topk=0.5, mlp_topk_group=4, attn_topk=0.5), marks=pytest.mark.slow),
    pytest.param(dict(weights="2:4", ponder=3), marks=pytest.mark.slow)], ids=str)
def test_gpt2s_shape_in_a_local_folder_takes_flags_and_trains(dense, flags):
    folder = gpt2_folder(dense.folder / "gpt2-tiny", n_layer=2, n_head=2, n_embd=16, n_positions=16,
                         vocab_size=256)
    fit(dense, init_from=folder, out="of-tiny", max_iters=12, learning_rate=0.03, lr_decay_iters=12,
        eval_interval=12, warmup_iters=0, **flags)
    losses = dense.losses("of-tiny")
    assert losses[11] < losses[0] - 0.05 * ("train_only" not in flags)
    kept = dense.checkpoint("of-tiny")
    assert kept["model_args"]["act"] == "gelu_tanh" and kept["model_args"]["bias"]
    assert kept["parent"]["name"] == "gpt2-tiny" and all(
        kept["model_args"][key] == value for key, value in flags.items() if key != "train_only")


@pytest.mark.slow
def test_gpt2s_real_shape_takes_flags_and_trains(dense):
    """124 million random weights: one iteration with four blocks at once, in a process of its own."""
    folder, data = gpt2_folder(dense.folder / "gpt2-small"), dense.folder / "of-gpt2s-ids"
    data.mkdir()
    for split in ("train", "val"):               # as nanoGPT writes them
        np.random.default_rng(1).integers(0, 50257, 5000).astype(np.uint16).tofile(data / f"{split}.bin")
    keys = dict(init_from=folder, dataset=data, out_dir=dense.folder / "of-gpt2", block_size=64,
                batch_size=1, gradient_accumulation_steps=1, max_iters=1, eval_iters=1, eval_interval=1,
                device="cpu", dtype="float32", compile=False, window=16, mlp_topk=0.2, weights="2:4",
                exits="6")
    run = run_real("train.py", words(**keys), dense.folder)
    out, err = run.communicate(timeout=900)
    assert run.returncode == 0, err
    assert "from gpt2-small: tensors: 149 taken, 2 new, 0 dropped" in out and "exits=6" in out
    kept = dense.checkpoint("of-gpt2")
    assert kept["iter_num"] == 1 and kept["model_args"]["n_embd"] == 768
    assert kept["model_args"]["exits"] == "6"


def test_gpt2_by_name_with_flags_is_one_sentence_without_a_network(dense, tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    keys = dict(init_from="gpt2", window=256, weights="2:4", dataset=dense.data, out_dir=tmp_path / "out",
                device="cpu", dtype="float32")
    result = Job("train.py", words(**keys), tmp_path, env=offline).wait()
    one_sentence(result, "train.py", "'gpt2' could not be downloaded", "a local Hugging Face GPT-2 folder")
    assert not (tmp_path / "out").exists()


def test_a_quantised_or_packed_teacher_teaches(dense):
    written = dense.folder / "whole-numbers"
    Job("training/export.py", words(out_dir=dense.folder / "dense", to="packed", quantize="int8",
                                    dtype="float32", export_dir=written), dense.folder).wait()
    fit(dense, mlp_topk=0.5, teacher=written, out="by-int8", max_iters=2)


@pytest.mark.slow
def test_the_pages_example_prints_what_stands_there(tmp_path):
    text = (ROOT / "docs" / "retrofit.md").read_text(encoding="utf-8")
    block = text.split("```console\n")[1].split("```")[0].replace("\\\n", " ")
    numbers = re.compile(r"[-+]?\d+\.\d+")
    for part in block.split("$ python ")[1:]:
        command, *expected = part.strip().splitlines()
        script, *rest = command.split()
        rest = [str(ROOT / word) if word.startswith("config/") else word for word in rest]
        done = Job(script, rest, tmp_path).wait()
        assert done.status == 0, done.err
        printed = (done.out + done.err).splitlines()
        for line in expected:
            found = [other for other in printed if numbers.sub("", other) == numbers.sub("", line)]
            assert found, f"{line}\nis not among\n{printed}"
            assert [float(n) for n in numbers.findall(found[0])] == pytest.approx(
                [float(n) for n in numbers.findall(line)], abs=0.03)


# -------------------------------------------------- sparse without training ---------------------------------

def sampled(dense, *argv, **keys):
    keys = dict(out_dir=dense.folder / "dense", device="cpu", dtype="float32", num_samples=1, threads=1,
                max_new_tokens=20, **keys)
    return Job("sample.py", [*words(**keys), *argv], dense.folder).wait()


@pytest.mark.parametrize("flags", [dict(window=3, window_pattern="S"), dict(attn_topk=0.5),
                                   dict(mlp_topk=0.1), dict(weights="2:4"), dict(screen=True),
                                   pytest.param(dict(mlp_topk=0.5, window=4, quantize="int8"),
                                                marks=pytest.mark.slow)], ids=str)
def test_a_dense_run_decodes_sparse_and_says_what_that_costs(dense, flags):
    said = sampled(dense, val=True, **flags)
    assert said.status == 0, said.err
    before, after = (float(said.err.split(word)[1].split()[0]) for word in
                     ("validation loss ", f"{[*flags][-1]}={[*flags.values()][-1]} "))
    loaded, path = checkpoint.read(dense.folder / "dense")
    model = build_model(loaded, path).eval()
    stream = datasets.held_out(True, loaded["config"], loaded["tokenizer"], 8, 256)
    own = estimate.validation_loss(model, stream)[0]
    assert before == pytest.approx(own, abs=1e-4)
    if flags.keys() & {"window", "attn_topk", "mlp_topk"} and "quantize" not in flags:
        model = build_model(loaded, path, **flags).eval()
        found = estimate.validation_loss(model, stream)[0]
        assert after == pytest.approx(found, abs=1e-4) and found != own
    if "screen" in flags:                        # nothing is left out
        assert after == pytest.approx(before, abs=2e-3) and said.out == sampled(dense).out
    assert f"tokens of {dense.data}" in said.err


def test_two_of_four_at_sampling_chooses_by_inputs_from_training_text(dense):
    said = sampled(dense, weights="2:4")
    assert "2:4 keeps weights by their size and that of their inputs, from 2,048 tokens of" in said.err
    assert "--val=True prints what that costs" in said.err


def test_sparse_decoding_that_cannot_be_is_one_sentence(dense):
    fit(dense, out="experts", experts=4, experts_active=2, max_iters=1)
    fit(dense, out="gelu", act="gelu", max_iters=1)
    Job("training/export.py", words(out_dir=dense.folder / "dense", quantize="int8",
                                    export_dir=dense.folder / "ints"), dense.folder).wait()
    cases = [(dict(val=True), "val=True has no effect", "--quantize=int8", "--mlp_screen=4"),
             (dict(window_pattern="S"), "window_pattern=S", "window"),
             (dict(window=-1), "window=-1 must not be negative"),
             (dict(mlp_topk=2), "mlp_topk=2.0 must be in (0, 1]"),
             (dict(weights="1:4"), "weights='1:4' must be dense or 2:4"),
             (dict(out_dir=dense.folder / "experts", mlp_topk=0.5), "experts=4 and mlp_topk=0.5"),
             (dict(out_dir=dense.folder / "gelu", mlp_screen=4), "act='relu2'", "act='gelu'"),
             (dict(out_dir=dense.folder / "ints", weights="2:4"), "quantised weights", "weights"),
             (dict(window=4, val="nowhere/"), "nowhere/")]
    for keys, *parts in cases:
        keys = {"out_dir": dense.folder / "dense", **keys}
        one_sentence(Job("sample.py", words(device="cpu", **keys), dense.folder).wait(), "sample.py", *parts)
    assert sampled(dense, "--window=4", init_from=dense.folder / "ints").status == 0


def test_a_hugging_face_folder_decodes_with_a_window_too(dense):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=256)
    transformers.GPT2LMHeadModel(config).save_pretrained(dense.folder / "theirs")
    said = sampled(dense, init_from=dense.folder / "theirs", window=3, window_pattern="S",
                   tokenizer=dense.data, val=dense.data)
    assert said.status == 0 and "untrained with window=3, window_pattern=S" in said.err, said.err


@pytest.mark.slow
def test_two_processes_retrofit_one_model_with_a_teacher(dense):
    keys = dict(init_from=dense.folder / "dense", columns=8, columns_active=2, n_layer=3, act="relu2",
                teacher=dense.folder / "dense", max_iters=3, eval_interval=3, dropout=0.0)
    dense(out="one-process", **keys)
    in_parallel(dense, 2, out="two-processes", **keys)
    one, two = (dense.losses(out) for out in ("one-process", "two-processes"))
    assert one.keys() == two.keys() and all(abs(one[i] - two[i]) < 1e-3 for i in one)
    assert dense.checkpoint("two-processes")["parent"]["name"] == "dense"


def test_screened_units_beside_another_flag_are_part_of_what_it_costs(dense):
    said = sampled(dense, val=True, mlp_screen=4, mlp_live=1.0)
    assert re.search(r"screened units: .*loss \+0\.0000 on [\d,]+ held-out tokens", said.err)
    assert said.out == sampled(dense).out
    both = sampled(dense, val=True, mlp_screen=4, mlp_live=1.0, window=3, window_pattern="S")
    assert "untrained with window=3, window_pattern=S, mlp_screen=4, mlp_live=1.0" in both.err
    assert "screened units: " in both.err


def test_no_iterations_write_what_the_flags_make_of_the_dense_model(dense):
    said = fit(dense, event_gate=True, event_rate=0.3, max_iters=0, out="untouched").out
    model = build_model(*checkpoint.read(dense.folder / "untouched")).eval()
    parent = build_model(*checkpoint.read(dense.folder / "dense")).eval()
    for name, tensor in parent.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert dense.checkpoint("untouched")["iter_num"] == 0 and "no iteration was trained" not in said
    result = Job("sample.py", words(out_dir=dense.folder / "untouched", device="cpu", dtype="float32",
                                    num_samples=1, max_new_tokens=4), dense.folder).wait()
    assert result.status == 0, result.err
    dense.resume(out="untouched", max_iters=2)
    assert dense.checkpoint("untouched")["iter_num"] == 2


def test_a_teacher_and_a_loss_in_chunks_are_one_sentence(train):
    result = train(teacher="gpt2", loss_chunks=4, status=2)
    assert "teacher=gpt2 and loss_chunks=4" in result.err and "leave --loss_chunks out" in result.err
    assert "Traceback" not in result.err


def test_a_retrofits_rates_are_one_share_of_a_new_models_everywhere():
    old, new = (keys_of(str(ROOT / "config" / f"{name}.py")) for name in ("train_pylib", "retrofit"))
    for key in ("learning_rate", "muon_learning_rate"):
        assert new[key] == pytest.approx(retrofit.RATE * (key_defaults() | old)[key])
    assert Retrofit().rate == retrofit.RATE
    lab = SimpleNamespace(settings=dict(learning_rate=1e-3, muon_learning_rate=0.02), rows_of_old=lambda: 8,
                          plan=dict(iters=20, rows=8), dense=SimpleNamespace(config=GPTConfig()),
                          data=lambda: "pylib", cfg=SimpleNamespace(seed=1))
    found = Lab.recipe(lab)
    assert found["learning_rate"] == pytest.approx(retrofit.RATE * 1e-3)
    assert found["muon_learning_rate"] == pytest.approx(retrofit.RATE * 0.02)
