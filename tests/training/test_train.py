"""train.py as a whole: a run that is stopped and resumed is the run that was not, whatever stopped it."""
import functools
import os
import pickle
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from arms import ARMS
from conftest import (
    LIMIT,
    ONE_THREAD,
    ROOT,
    TEXT,
    TINY,
    Job,
    Trainer,
    in_parallel,
    one_sentence,
    run_real,
    same,
    words,
)

from data import dataset
from data.tokenizer import ByteTokenizer
from model import build_model
from training import runtime

NANOGPT = os.environ.get("NANOGPT")
needs_nanogpt = pytest.mark.skipif(not NANOGPT, reason="set NANOGPT to a checkout of nanoGPT")
TIMES = ("seconds", "config", "run")  # what two equal runs may differ in: clocks, words typed, ids


# -------------------------------------------------- resuming ------------------------------------------------

@pytest.fixture(scope="module")
def finished_by(tmp_path_factory, data):
    """The 16-step run of an optimizer, made once."""
    @functools.cache
    def run(optimizer):
        trainer = Trainer(tmp_path_factory.mktemp(optimizer), data)
        trainer(optimizer=optimizer)
        return trainer
    return run


@pytest.mark.parametrize("k", range(1, 17))
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_stopped_at_any_step_and_resumed_is_the_run_that_was_not(train, finished_by, optimizer, k):
    whole = finished_by(optimizer)
    train(max_iters=k, optimizer=optimizer)
    train.resume(max_iters=16)
    same(train.checkpoint(), whole.checkpoint(), skip=TIMES)
    assert train.losses() == whole.losses()
    assert len(train.losses()) == 16


@pytest.mark.slow
@pytest.mark.parametrize("name", ARMS)
def test_every_arm_stopped_at_any_step_and_resumed_is_the_run_that_was_not(train, name, case):
    keys = {key: value for key, value in ARMS[name].items() if key not in TINY}
    keys |= dict(n_layer=ARMS[name].get("n_layer", 1), dropout=ARMS[name].get("dropout", 0.1), block_size=16)
    train(out="whole", **keys)
    for k in range(1, 16):
        train(out=f"k{k}", **keys | dict(max_iters=k))
        train.resume(out=f"k{k}", max_iters=16)
        same(train.checkpoint(f"k{k}"), train.checkpoint("whole"), skip=TIMES)
        assert train.losses(f"k{k}") == train.losses("whole")
        case()


@pytest.mark.parametrize("file", sorted((ROOT / "config").glob("bio_*.py")), ids=lambda path: path.stem)
def test_every_block_trains_stops_resumes_and_samples(train, file):
    def keys(name, **more):
        layers = {"bio_hierarchy": 3, "bio_exits": 5, "bio_ponder": 3, "bio_growth": 3}.get(file.stem, 1)
        more = dict(max_iters=8, n_embd=32, n_layer=layers, optimizer="muon") | more
        return [str(file), *words(out_dir=train.folder / name, **more)]
    train(*keys("whole"))
    train(*keys("parts", max_iters=4))
    train.resume(out="parts", max_iters=8)
    same(train.checkpoint("parts"), train.checkpoint("whole"), skip=TIMES)
    assert train.losses("parts") == train.losses("whole") and len(train.losses("whole")) == 8
    counted = {"zeros", "dead_units", "active_groups", "open_branches"} & train.metrics("whole")[-1].keys()
    assert counted or file.stem in ("bio_osc", "bio_window", "bio_hierarchy", "bio_exits", "bio_ponder",
                                    "bio_growth", "bio_two_of_four", "bio_inputs")
    sampling = words(out_dir=train.folder / "whole", num_samples=1, max_new_tokens=12, device="cpu", seed=3)
    texts = [Job("sample.py", [*sampling, *words(sparse_decode=on)], train.folder, name=f"sample{on}").wait()
             for on in (False, True)]
    assert all(text.status == 0 for text in texts), texts[0].err + texts[1].err
    assert (texts[0].out == texts[1].out) or file.stem in ("bio_predict", "bio_exits")


def test_a_sample_may_leave_early_or_be_drafted(train):
    train(n_layer=3, exits="1,2", max_iters=4)
    keys = dict(out_dir=train.folder / "out", num_samples=1, max_new_tokens=20, device="cpu", temperature=0)
    whole, drafted, early = (Job("sample.py", words(**keys, **more), train.folder, name=str(more)[2:6]).wait()
                             for more in ({}, dict(speculate=3), dict(exit_threshold=0.01)))
    assert whole.status == drafted.status == early.status == 0, whole.err + drafted.err + early.err
    assert drafted.out == whole.out
    assert "drafted tokens accepted" in drafted.err
    assert "1.00 of 3 layers per token" in early.err


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_growing_run_resumes_in_any_stage(train, optimizer):
    keys = dict(grow="1:0.25,2:0.5", n_layer=3, lr_decay_iters=16, max_iters=16, optimizer=optimizer)
    train(out="whole", **keys)
    assert [row["layers"] for row in train.metrics("whole") if "layers" in row] == [1] * 4 + [2] * 8 + [3] * 4
    for k in (3, 4, 9, 14):
        train(out=f"parts{k}", **keys | dict(max_iters=k))
        train.resume(out=f"parts{k}", max_iters=16)
        same(train.checkpoint(f"parts{k}"), train.checkpoint("whole"), skip=TIMES)
        assert train.losses(f"parts{k}") == train.losses("whole")


@pytest.mark.parametrize("grow", ["3:0.2", "2:0.2,1:0.2", "1:0", "1:0.5,2:0.5", "1", "a:b", "0:0.2"])
def test_growth_that_cannot_be_is_one_sentence(train, grow):
    result = Job("train.py", words(out_dir=train.folder / "out", n_layer=3, grow=grow), train.folder).wait()
    one_sentence(result, "train.py", f"grow='{grow}' must be LAYERS:SHARE")


def test_an_annealed_top_k_resumes_where_it_was(train):
    keys = dict(mlp_topk=0.25, anneal=0.625)
    train(out="whole", **keys)
    train(out="parts", max_iters=7, **keys)
    train.resume(out="parts", max_iters=16)
    assert train.losses("parts") == train.losses("whole")
    train(out="none", mlp_topk=0.25)
    assert train.losses("none") != train.losses("whole")


def test_rows_of_metrics_rise_without_duplicates_after_two_resumes(train, finished):
    train(max_iters=5)
    rows = train.folder / "out" / "metrics.jsonl"
    later = '{"iter": 5, "loss": 1.0}\n{"iter": 9, "loss": 1.0}\nnot json\n{"iter": 3, "lo'  # torn by a crash
    rows.write_text(rows.read_text() + later)
    train.resume(max_iters=11)
    shutil.copy(train.folder / "out" / "ckpt.pt", train.folder / "at11.pt")
    train.resume(max_iters=14)
    shutil.copy(train.folder / "at11.pt", train.folder / "out" / "ckpt.pt")  # back to an older checkpoint
    train.resume(max_iters=16)
    iterations = [row["iter"] for row in train.metrics()]
    assert iterations == sorted(set(iterations)) == list(range(17))
    assert train.losses() == finished.losses()


@pytest.mark.parametrize("keys", [dict(eval_interval=1), dict(eval_interval=100), dict(eval_iters=7),
                                  dict(log_interval=5),
                                  dict(always_save_checkpoint=False, eval_interval=3)], ids=str)
def test_looking_at_a_run_does_not_change_it(train, finished, keys):
    train(**keys)
    losses = train.losses()
    assert losses == {i: finished.losses()[i] for i in losses}
    assert len(losses) >= 4
    if "always_save_checkpoint" not in keys:
        same(train.checkpoint()["model"], finished.checkpoint()["model"])


@pytest.mark.parametrize("hours", [-30, 30])
def test_metrics_rise_whatever_the_clock_says(train, hours):
    """A clock that jumps between two parts of a run: iterations and seconds still rise, none twice."""
    train(max_iters=5)
    skew = f"import time; now = time.time; time.time = lambda: now() + {hours} * 3600"
    for last in (9, 16):
        train.resume(before=skew, max_iters=last)
    rows = train.metrics()
    assert [row["iter"] for row in rows] == list(range(17))
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


def test_another_seed_is_another_run(train, finished):
    train(seed=99_999_999_999)  # beyond torch's 64 bits when scaled
    assert all(loss != finished.losses()[i] for i, loss in train.losses().items())


def test_resume_takes_the_checkpoints_settings_and_explicit_keys_win(train):
    train(max_iters=4, weight_decay=0.2, beta2=0.9, always_save_checkpoint=False, batch_size=3)
    first = train.checkpoint()
    train.resume(max_iters=8, weight_decay=0.5, batch_size=1, n_embd=16)
    second = train.checkpoint()
    assert second["iter_num"] == 8
    expected = first["config"] | dict(max_iters=8, weight_decay=0.5, batch_size=1, init_from="resume")
    assert second["config"] == expected
    assert [group["weight_decay"] for group in second["optimizer"]["param_groups"]] == [0.5, 0.0]
    assert [group["betas"] for group in second["optimizer"]["param_groups"]] == [(0.9, 0.9)] * 2
    assert train.metrics()[-1]["tokens"] == 8 * 2 * 1 * 8


def test_resume_changes_dropout_only_when_told_to(train):
    train(max_iters=2)
    train.resume(max_iters=3)
    assert train.checkpoint()["model_args"]["dropout"] == 0.1
    train.resume(max_iters=4, dropout=0.3)
    assert train.checkpoint()["model_args"]["dropout"] == 0.3


def test_init_from_a_path_starts_anew_from_its_weights(train, finished):
    train(init_from=finished.folder / "out" / "ckpt.pt", max_iters=2, learning_rate=0, min_lr=0)
    same(train.checkpoint()["model"], finished.checkpoint()["model"])
    assert [row["iter"] for row in train.metrics()] == [0, 1, 2]


# -------------------------------------------------- several processes ---------------------------------------

@pytest.mark.parametrize("ranks, optimizer, tolerance, arm", [
    (2, "adamw", 1e-6, dict(weights="2:4", sr_ste=0.5)),
    (2, "muon", 1e-3, {}),                                 # Newton-Schulz is in bf16: it magnifies a last bit
    pytest.param(4, "adamw", 1e-6, {}, marks=pytest.mark.slow)])
def test_processes_share_one_batch_and_loss_curve(train, ranks, optimizer, tolerance, arm):
    keys = dict(dropout=0.0, gradient_accumulation_steps=4, out="parallel", optimizer=optimizer, **arm)
    results = in_parallel(train, ranks, max_iters=9, **keys)
    assert "step 0/" in results[0].out and not any(result.out for result in results[1:])  # the master speaks
    in_parallel(train, ranks, resume=True, max_iters=16, **keys)
    train(**keys | dict(out="single"))
    single, parallel = train.losses("single"), train.losses("parallel")
    assert single.keys() == parallel.keys() == set(range(16))
    assert all(abs(single[i] - parallel[i]) <= tolerance * single[i] for i in single)
    files = {p.name for p in (train.folder / "parallel").iterdir()}
    assert files == {"ckpt.pt", "ckpt-000012.pt", "manifest.json", "metrics.jsonl"}
    one, many = ([row["val_loss"] for row in train.metrics(out) if "val_loss" in row] for out in ("single",
                                                                                                  "parallel"))
    assert one == pytest.approx(many, rel=tolerance)


@pytest.mark.parametrize("arm", [{}, dict(tie_weights=False, norm="rmsnorm", pos="rope", act="relu2",
                                          weights="2:4", sr_ste=0.5),
                                 dict(loss_chunks=3),
                                 dict(columns=8, columns_active=2), dict(recompute=True, dendrites=4,
                                                                         dendrites_active=2)], ids=str)
def test_sharded_weights_give_the_curve_of_one_process(train, arm):
    """FSDP2 on two ranks; its checkpoint is everybody's: one process goes on from it, and the other way."""
    keys = dict(dropout=0.0, gradient_accumulation_steps=4, n_layer=2, out="sharded", **arm)
    in_parallel(train, 2, max_iters=6, fsdp=True, **keys)
    shutil.copytree(train.folder / "sharded", train.folder / "alone")
    in_parallel(train, 2, resume=True, max_iters=16, fsdp=True, **keys)
    train.resume(out="alone", max_iters=16)
    train(**keys | dict(out="single"))
    for out in ("sharded", "alone"):
        single, found = train.losses("single"), train.losses(out)
        assert single.keys() == found.keys() == set(range(16))
        assert all(abs(single[i] - found[i]) <= 1e-6 * single[i] for i in single), out
        assert train.checkpoint(out)["model"].keys() == train.checkpoint("single")["model"].keys()
    in_parallel(train, 2, resume=True, max_iters=17, fsdp=True, **keys | dict(out="single"))
    assert list(train.losses("single")) == list(range(17))


@pytest.mark.parametrize("ranks, batches", [(2, 1), (2, 3), (3, 4)])
def test_sharded_ranks_evaluate_a_number_of_batches_that_is_no_multiple_of_theirs(train, ranks, batches):
    """All gather split weights for every batch: a rank that has one fewer would leave the others waiting."""
    keys = dict(dropout=0.0, gradient_accumulation_steps=6, eval_iters=batches, max_iters=5)
    in_parallel(train, ranks, fsdp=True, out="sharded", **keys)
    train(out="single", **keys)
    for key in ("train_loss", "val_loss"):
        one, many = ([row[key] for row in train.metrics(out) if key in row] for out in ("single", "sharded"))
        assert one == pytest.approx(many, rel=1e-6) and len(one) == 3


# a Muon beside the split one: whole matrices, the same gradients
BESIDE_WHOLE = """
import torch
from training import optimizers, runtime
step, twins = optimizers.Muon.step, []
def checked(muon):
    [group] = muon.param_groups
    params = group["params"]
    if not twins:
        wholes = [torch.nn.Parameter(runtime.whole(p.detach()).clone()) for p in params]
        keys = {k: v for k, v in group.items() if k not in ("params", "lr_scale")}
        twins.append(optimizers.Muon(wholes, **keys))
        for p, w in zip(params, wholes):
            twins[0].state[w] = {k: v.clone() for k, v in runtime.whole(dict(muon.state[p])).items()}
    [theirs] = twins[0].param_groups
    theirs["lr"], before = group["lr"], [w.detach().clone() for w in theirs["params"]]
    for p, w in zip(params, theirs["params"]):
        assert runtime.is_split(p) and runtime.is_split(p.grad)
        w.grad = runtime.whole(p.grad)
    step(twins[0])
    step(muon)
    for p, w, old in zip(params, theirs["params"], before):
        assert runtime.is_split(muon.state[p]["momentum_buffer"])
        assert (w - old).abs().max() > 1e-5
        torch.testing.assert_close(runtime.whole(p.detach()), w, rtol=1e-6, atol=1e-7)
    checked.steps = getattr(checked, "steps", 0) + 1
    print("whole and split are equal:", checked.steps, flush=True)
optimizers.Muon.step = checked
"""


@pytest.mark.parametrize("ranks, shape", [(2, dict(n_embd=15, n_head=3)), (3, dict(n_embd=20)),
                                          (3, dict(n_embd=4, n_layer=2))], ids=str)   # a rank without rows
def test_sharded_muon_moves_each_matrix_as_the_whole_one_is_moved(train, ranks, shape):
    keys = dict(optimizer="muon", gradient_accumulation_steps=6, fsdp=True, before=BESIDE_WHOLE, **shape)
    results = in_parallel(train, ranks, max_iters=12, **keys)
    results += in_parallel(train, ranks, resume=True, max_iters=20, **keys)
    steps = [result.out.count("whole and split are equal") for result in results]
    assert steps == [12] * ranks + [8] * ranks


def test_sharded_muon_gives_the_curve_of_one_process(train):
    """Two ranks of one micro-batch each add up what one process does of two, in the same order: no last bit
    differs that bf16 could magnify. With torch 2.11, and with AVX-512, one does after some steps: losses
    alone are compared there. Its checkpoint is everybody's."""
    wide = "AVX512" in torch.backends.cpu.get_cpu_capability()
    exact = not (wide or torch.__version__.startswith("2.11."))
    keys = dict(optimizer="muon", dropout=0.0, grad_clip=0.0, n_embd=15, n_head=3, lr_decay_iters=20)
    train(**keys | dict(out="single", max_iters=20))
    in_parallel(train, 2, max_iters=7, fsdp=True, out="sharded", **keys)
    shutil.copytree(train.folder / "sharded", train.folder / "alone")
    in_parallel(train, 2, resume=True, max_iters=20, fsdp=True, out="sharded", **keys)
    train.resume(out="alone", max_iters=20)
    single = train.losses("single")
    for out in ("sharded", "alone"):
        found = train.losses(out)
        assert single.keys() == found.keys() == set(range(20))
        assert all(abs(single[i] - found[i]) <= (1e-6 if exact else 1e-4) * single[i] for i in single), out
        for part in ("model", "optimizer") if exact else ():
            torch.testing.assert_close(*(train.checkpoint(o)[part] for o in (out, "single")), rtol=1e-5,
                                       atol=1e-6)


def test_sharded_muon_goes_on_with_another_number_of_processes(train):
    keys = dict(optimizer="muon", dropout=0.0, gradient_accumulation_steps=6, n_embd=20, out="sharded")
    train(**keys | dict(out="single"))
    in_parallel(train, 3, max_iters=6, fsdp=True, **keys)
    in_parallel(train, 2, resume=True, max_iters=11, fsdp=True, **keys)
    train.resume(out="sharded", max_iters=13)
    in_parallel(train, 3, resume=True, max_iters=16, fsdp=True, **keys)
    single, found = train.losses("single"), train.losses("sharded")
    assert single.keys() == found.keys() == set(range(16))
    assert all(abs(single[i] - found[i]) <= 1e-3 * single[i] for i in single)   # bf16 magnifies a last bit


# the first of several processes, without the others
OF_SEVERAL = ("from training import runtime; "
              "runtime.join_world = lambda backend, device: (runtime.World(0, 0, {}), device); "
              "runtime.World.sum = lambda self, values: values; "
              "runtime.World.require_same = lambda *words: None; "
              "runtime.World.barrier = lambda self: None")


@pytest.mark.parametrize("keys, expected", [
    ({}, "torchrun"), (dict(grow="1:0.5", n_layer=3), "grow=1:0.5"), (dict(ponder=3, n_layer=3), "ponder=3")])
def test_what_cannot_be_sharded_is_one_sentence(train, keys, expected):
    fake = OF_SEVERAL.format(2)
    one_sentence(train(fsdp=True, before=fake * bool(keys), status=2, **keys), "train.py", expected)


def test_one_rank_with_nan_is_skipped_by_all(train):
    """The last number of a rank's loss decides for every rank: weights stay the same on both."""
    poison = """
import math, os, model
forward, calls = model.GPT.forward, [0]
def poisoned(self, idx, targets=None):
    logits, loss = forward(self, idx, targets)
    calls[0] += self.training
    return logits, loss * math.nan if self.training and os.environ["RANK"] == "1" and calls[0] == 7 else loss
model.GPT.forward = poisoned
"""
    keys = dict(dropout=0.0, gradient_accumulation_steps=4, out="parallel", before=poison)
    in_parallel(train, 2, max_iters=9, **keys)
    rows = {row["iter"]: row for row in train.metrics("parallel")}
    assert "nan" in rows[3]["skipped"] and len(train.losses("parallel")) == 8
    assert all(torch.isfinite(p).all() for p in train.checkpoint("parallel")["model"].values())


@pytest.mark.skipif(os.name == "nt", reason="torchrun needs libuv there")
def test_torchrun_trains_on_two_processes(train):
    keys = words(**TINY | dict(max_iters=3, dropout=0.0), dataset=train.data, out_dir=train.folder / "out")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "train.py"), *keys]
    done = subprocess.run(command, cwd=train.folder, env={**os.environ, **ONE_THREAD}, capture_output=True,
                          text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 0/") == 1
    train(max_iters=3, dropout=0.0, out="single")
    assert list(train.losses().values()) == pytest.approx(list(train.losses("single").values()), rel=1e-6)


def test_a_mistake_is_told_by_processes_that_have_joined_too(train):
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    one_sentence(train(env=env, status=2, block_size=10**6), "train.py", "block_size")


def test_accumulation_that_does_not_split_among_the_processes_is_refused(train):
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    fake = OF_SEVERAL.format(3)
    result = train(env=env, before=fake, status=2)
    assert "gradient_accumulation_steps=2 must be a multiple of the 3 processes" in result.err


# -------------------------------------------------- nanoGPT and back ----------------------------------------

def test_our_checkpoint_has_nanogpts_keys(finished):
    saved = finished.checkpoint()
    assert set(saved["model_args"]) == {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size",
                                        "dropout"}
    assert {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"} <= set(saved)
    assert [len(group["params"]) for group in saved["optimizer"]["param_groups"]] == [6, 3]
    assert saved["model"]["transformer.h.0.attn.c_attn.weight"].shape == (48, 16)
    assert saved["model"]["lm_head.weight"].shape == (256, 16)


@pytest.fixture
def char_data(tmp_path):
    """A data set as nanoGPT writes it, in tmp_path/data/chars: uint16 and meta.pkl."""
    folder = tmp_path / "data" / "chars"
    folder.mkdir(parents=True)
    chars = sorted(set(TEXT))
    stoi = {c: i for i, c in enumerate(chars)}
    ids = torch.tensor([stoi[c] for c in TEXT]).to(torch.uint16).numpy()
    ids[300:].tofile(folder / "train.bin")
    ids[:300].tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(chars), "itos": dict(enumerate(chars)),
                                                    "stoi": stoi}))
    return folder


def nanogpt(script, cwd, *argv):
    """Run one of nanoGPT's scripts -> stdout. It imports tiktoken, which may be missing, without using it."""
    (cwd / "stubs").mkdir(exist_ok=True)
    (cwd / "stubs" / "tiktoken.py").write_text("")
    (cwd / "configurator.py").write_text(Path(NANOGPT, "configurator.py").read_text())
    done = subprocess.run([sys.executable, str(Path(NANOGPT, script)), *argv], cwd=cwd, capture_output=True,
                          text=True, timeout=LIMIT,
                          env={**os.environ, **ONE_THREAD, "PYTHONPATH": str(cwd / "stubs")})
    assert done.returncode == 0, done.stderr
    return done.stdout


SMALL = words(n_layer=2, n_head=2, n_embd=16, block_size=8, batch_size=4, gradient_accumulation_steps=1,
              device="cpu", dtype="float32",
              compile=False, eval_iters=2, eval_interval=5, max_iters=10, learning_rate=1e-2, beta2=0.99,
              weight_decay=0.3)


@needs_nanogpt
def test_nanogpt_samples_from_our_checkpoint(tmp_path, char_data):
    ours = Trainer(tmp_path, "chars")
    ours(*SMALL)
    text = nanogpt("sample.py", tmp_path, *words(out_dir="out", device="cpu", dtype="float32", num_samples=1,
                                                 max_new_tokens=20, top_k=1,
                                                 start="The "))
    assert "\n" + greedy(ours.checkpoint(), char_data, "The ", 20) + "\n" in text


@needs_nanogpt
def test_we_resume_and_sample_what_nanogpt_trained(tmp_path, char_data):
    nanogpt("train.py", tmp_path, *SMALL, *words(dataset="chars", out_dir="out"))
    train = Trainer(tmp_path, "chars")
    theirs = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    theirs_text = nanogpt("sample.py", tmp_path, *words(out_dir="out", device="cpu", dtype="float32",
                                                        num_samples=1, max_new_tokens=30,
                                                        top_k=1, start="The "))
    assert "\n" + greedy(theirs, char_data, "The ", 30) + "\n" in theirs_text
    train.resume(max_iters=10)  # no step: what we read is what we write
    read = train.checkpoint()
    same(read["model"], theirs["model"])
    same(read["optimizer"]["state"], theirs["optimizer"]["state"])
    assert read["iter_num"] == theirs["iter_num"] == 10
    assert [g["betas"] for g in read["optimizer"]["param_groups"]] == [(0.9, 0.99)] * 2
    train.resume(max_iters=12)
    assert train.checkpoint()["iter_num"] == 12
    step = [int(saved["optimizer"]["state"][0]["step"]) for saved in (theirs, train.checkpoint())]
    assert step[1] == step[0] + 2


def greedy(loaded, folder, start, count):
    """Our model's greedy text."""
    from data import tokenizer as tokenizers
    tokenizer = tokenizers.load(folder)
    model = build_model(loaded, "test").eval()
    return tokenizer.decode(model.generate(torch.tensor([tokenizer.encode(start)]), count,
                                           temperature=0)[0].tolist())


def test_data_that_names_only_its_vocabulary_trains(train, tmp_path, data):
    folder = tmp_path / "no_tokenizer"
    shutil.copytree(data, folder)
    (folder / "meta.json").unlink()
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 256}))
    train(dataset=folder, max_iters=2)
    assert train.checkpoint()["model_args"]["vocab_size"] == 256 and "tokenizer" not in train.checkpoint()


def test_sampling_needs_the_checkpoint_alone(train, tmp_path):
    from conftest import Job
    gone = tmp_path / "gone"
    shutil.copytree(train.data, gone)
    train(dataset=gone, max_iters=4)
    shutil.rmtree(gone)
    assert not dataset.DATA.joinpath(gone).exists()
    result = Job("sample.py", words(out_dir=train.folder / "out", device="cpu", start="The", num_samples=2,
                                    max_new_tokens=5), tmp_path).wait()
    assert result.status == 0, result.err
    assert result.out.count("The") == 2 and result.out.count("---------------") == 2


# -------------------------------------------------- ways of sampling ---------------------------------------

@pytest.fixture(scope="module")
def two_data_sets(tmp_path_factory):
    """NAME:WEIGHT,NAME:WEIGHT of two folders of short documents in bytes, three epochs and more for a run."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("a", "b"):
        ids = [token for i in range(12) for token in [*(f"document {i} of {name}\n" * 2).encode(), 0]]
        dataset.write_dataset(folder / name, {"train": [ids[:250]], "val": [ids]}, ByteTokenizer(), name)
    return f"{folder / 'a'}:2,{folder / 'b'}:1"


@pytest.mark.parametrize("keys", [{"sampling": "epoch"}, {"sampling": "epoch", "documents": True}], ids=str)
def test_resume_is_exact_across_epochs_documents_and_mixtures(train, two_data_sets, keys):
    keys = {"dataset": two_data_sets, **keys}
    train(out="whole", **keys)
    train(out="parts", **keys, max_iters=7)
    train.resume(out="parts", max_iters=16)
    assert train.losses("parts") == train.losses("whole") and len(train.losses("whole")) == 16
    same(train.checkpoint("parts")["model"], train.checkpoint("whole")["model"])
    epochs = [row["epochs"] for row in train.metrics("whole")]
    assert epochs[0] == {"a": 0.0, "b": 0.0} and epochs[-1]["a"] > epochs[1]["a"] > 0
    assert epochs == [row["epochs"] for row in train.metrics("parts") if row["iter"] != 7 or "loss" in row]


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("built", [False, True])
def test_what_decodes_on_a_cpu_reads_bf16_where_the_engine_is_built(monkeypatch, native, built):
    monkeypatch.setattr(runtime, "NATIVE_BF16", native)
    monkeypatch.setattr(runtime, "cpu_library", lambda: (object() if built else None, ""))
    assert runtime.choose("cpu").dtype == (torch.bfloat16 if native else torch.float32)
    half = torch.bfloat16 if native or built else torch.float32
    assert runtime.choose("cpu", decodes=True).dtype == half
    assert runtime.choose("cpu", "float32", decodes=True).dtype == torch.float32


def test_a_run_that_compiles_nothing_does_not_import_the_compiler(train):
    """It takes seconds, and an arange or eye of tensors without memory is enough."""
    keys = TINY | dict(norm="rmsnorm", pos="rope", qk_norm=True, act="relu2", columns=4, columns_active=1,
                       optimizer="muon", max_iters=1, dataset=train.data, out_dir=train.folder / "out")
    job = run_real("train.py", words(**keys), train.folder, PYTHONPROFILEIMPORTTIME="1")
    imported = re.findall(r"^import time:.*\| +(\S+)$", job.communicate(timeout=LIMIT)[1], re.M)
    assert job.returncode == 0 and "torch.nn" in imported and "torch._dynamo" not in imported


TOUCHED = """
import resource, sys, torch
from training import runtime
kept = len(sys.argv) > 1 and runtime.keep_freed_memory()
def faults():
    began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(40 << 20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - began
print(kept, [faults() for _ in range(8)][-1])    # the heap has grown by then
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc's malloc")
def test_memory_that_is_freed_is_not_cleared_again_by_the_kernel():
    """Training keeps it: 40 MiB, more than glibc ever keeps by itself, are touched anew each time without."""
    said = [subprocess.run([sys.executable, "-c", TOUCHED, *words], cwd=ROOT, capture_output=True, text=True,
                           check=True).stdout.split() for words in ([], ["keep"])]
    (without, anew), (asked, again) = said
    assert (without, asked) == ("False", "True") and int(again) < int(anew) / 10, said


def test_where_there_is_no_such_call_freed_memory_is_the_systems_business(monkeypatch):
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda name: object())
    assert not runtime.keep_freed_memory()
