"""bench.py: what it refuses, what its record holds, and, beside a real nanoGPT, that both are one model.

NANOGPT=/path/to/nanoGPT python -m pytest tests/benchmarks runs the comparisons, else they are skipped.
"""
import contextlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from arms import ARMS as VARIANTS
from arms import TINY, tokens
from conftest import ROOT, TEXT, Job, one_sentence, record_of, run_real
from conftest import words as words_of

import bench
import sparse_kernels
from benchmarks import CLONE, arms, decode, memory, peers, quality, race, readme, timing, train, work
from benchmarks import record as records
from benchmarks.arms import SHAPED
from benchmarks.load import BusyLoops
from benchmarks.record import OURS, OURS_FP32, PEER, TWIN
from configurator import ConfigError, configure
from decode import quantized
from kernels import passes
from kernels.build import cpu_library
from model import GPT, GPTConfig
from training import estimate

NANOGPT = os.environ.get("NANOGPT", "")
beside_nanogpt = pytest.mark.skipif(not NANOGPT, reason="NANOGPT names no nanoGPT checkout")
SHORT = ["decode", "--shape=baby", "--prompt=8", "--new=6", "--repeats=2", "--device=cpu", "--threads=1"]


def run(folder, *words):
    return Job("bench.py", words, folder).wait()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """`decode` without a nanoGPT -> (its run, its record, the file that --out named)."""
    folder = tmp_path_factory.mktemp("alone")
    result = run(folder, *SHORT, "--out=record.json")
    return result, record_of(result), folder / "record.json"


# ------------------------------------------------ the command line ----------------------------

@pytest.mark.parametrize("words, parts", [
    ([], ["subcommand is missing", "python bench.py table or train or decode"]),
    (["decod"], ["'decod'", "did you mean 'decode'?", "python bench.py"]),
    (["--repeats=3"], ["'--repeats=3'", "python bench.py"]),
    (["decode", "--nanogtp=x"], ["'nanogtp'", "did you mean 'nanogpt'?"]),
    (["decode", "--shape=gpt3"], ["shape='gpt3'", "gpt2-xl or baby"]),
    (["decode", "--prompt=1025"], ["prompt=1025", "1024"]),
    (["decode", "--quantize=int8,int3"], ["quantize='int3'", "int8, int4, q4_all"]),
    (["decode", "--quantize=mlp=4,attn=5,int8"], ["quantize='mlp=4,attn=5'", "mlp=4,attn=8,head=8"]),
    (["decode", "--quantize=int8,q4_0"], ["quantize='q4_0'", "--val=True"]),
    (["decode", "--repeats=0"], ["repeats=0", "--repeats=5"]),
    (["decode", "--out=no/such/file.json"], ["no/such", "does not exist"]),
    *((["decode", "--shape=baby", "--prompt=200", flag],
       [f"{flag}: ", "prompt=200 and new=128", "256", "--new=56"])
      for flag in ("--hf", "--llamacpp", "--ctranslate2")),
    (["decode", "--shape=baby", "--prompt=256", "--hf"], ["prompt=256 and new=128", "--prompt=128"]),
    (["window", "--cold=-1"], ["cold=-1", "MiB"]),
    (["quality", "--config=config/no.py"], ["config/no.py", "does not exist"]),
    (["train", "--iters=20"], ["drop=20", "1..19"]),
    (["train", "--shape=large"], ["shape='large'", "small or baby"]),
    (["steps", "--cases=small"], ["cases='small'", "small or baby", "--cases=small:1,baby:2"]),
    (["steps", "--cases=small:0"], ["cases='small:0'"]),
    (["steps", "--threads=2"], ["threads=2", "--cases="]),
    (["train", "--compile=maybe"], ["compile='maybe'", "--compile=auto"]),
])
def test_bad_command_lines_say_what_to_type(tmp_path, words, parts):
    one_sentence(run(tmp_path, *words), "bench.py", *parts)


PEERED = [name for name in bench.COMMANDS if "nanogpt" in bench.load(name)[0].__dataclass_fields__]


@pytest.mark.parametrize("command", PEERED)
def test_a_folder_that_is_no_nanogpt_checkout_is_refused_with_the_clone_command(tmp_path, command):
    (tmp_path / "model.py").touch()
    result = run(tmp_path, command, f"--nanogpt={tmp_path}")
    one_sentence(result, "bench.py", str(tmp_path), "no train.py", CLONE)
    assert "git clone https://github.com/karpathy/nanoGPT" in result.err
    one_sentence(run(tmp_path, command, "--nanogpt=nowhere"), "bench.py", "no model.py and no train.py")


def test_help_lists_every_subcommand_with_one_line(tmp_path):
    result = run(tmp_path, "--help")
    lines = [line.split(maxsplit=1) for line in result.out.splitlines() if re.match(r"  \w", line)]
    assert result.status == 0 and [name for name, _ in lines] == [*bench.COMMANDS, bench.PLOT]
    assert all(line.endswith(".") for _, line in lines)


@pytest.mark.parametrize("name", bench.COMMANDS)
def test_a_key_that_was_not_typed_has_its_default(name):
    kind, _ = bench.load(name)
    try:
        default = kind()
    except ConfigError as missing:               # it needs a word
        with pytest.raises(ConfigError, match=re.escape(str(missing)[:40])):
            bench.keys_of(kind, [])
    else:
        assert bench.keys_of(kind, []) == default


def test_words_that_are_no_keys_are_runs_where_a_subcommand_takes_runs(tmp_path):
    table, compared, screened = (bench.load(name)[0] for name in ("table", "compare", "screen"))
    assert bench.keys_of(table, ["--runs=there"]).runs == "there"
    assert bench.keys_of(compared, ["a", "--tokens=64", "b"]).runs == ("a", "b")
    assert bench.keys_of(screened, [str(tmp_path)]).out_dir == str(tmp_path)


def test_the_menu_and_the_readme_need_no_torch(tmp_path):
    code = "import bench, sys; bench.menu(); bench.load('readme'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=bench.__file__.rpartition(os.sep)[0], check=True)


@pytest.mark.parametrize("command", bench.COMMANDS)
def test_help_of_a_subcommand_tells_the_meaning_of_each_key(tmp_path, command):
    out = run(tmp_path, command, "--help").out
    keys = {line.split("=")[0].strip(): line for line in out.splitlines() if line.startswith("  --")}
    assert keys.keys() == {f"--{key}" for key in bench.load(command)[0].__dataclass_fields__}
    assert all(len(line[42:].strip()) > 10 for line in keys.values()), out


@pytest.mark.parametrize("word, kept", [
    ("--out=/a/b/c.json", "--out=c.json"), ("--nanogpt=/a/nanoGPT/", "--nanogpt=nanoGPT"), ("/a/b", "b"),
    ("config/x.py", "config/x.py"), ("--shape=gpt2", "--shape=gpt2")])
def test_records_name_no_folder_of_the_machine(word, kept):
    assert records.without_folders(word) == kept


# ------------------------------------------------ the record ----------------------------------

def test_out_holds_the_record_alone_and_the_last_line_says_where(alone):
    result, record, path = alone
    assert result.out.splitlines()[-1] == "record: record.json"
    assert not any(line.startswith("{") for line in result.out.splitlines())
    assert record["schema"] == records.SCHEMA and record["subcommand"] == "decode"
    assert record["command"] == "python bench.py " + " ".join([*SHORT, "--out=record.json"])
    assert json.loads(path.read_text()) == record and not (path.parent / "out-bench").exists()
    assert [entry.name for entry in path.parent.glob("record.json*")] == ["record.json"]


def test_decoding_in_whole_numbers_is_measured_beside_the_same_model(tmp_path):
    words = *SHORT, "--new=2", "--repeats=1", "--dtype=float32", "--quantize=int8,mlp=4,attn=8,q4_all"
    record = record_of(run(tmp_path, *words))
    found, work = record["measurements"], record["work"]
    sides = {f"{OURS}, int8", f"{OURS}, mlp=4,attn=8", f"{OURS}, q4_all"}
    assert found["decode"]["sides"].keys() == found["step"]["sides"].keys() == {OURS, *sides}
    assert found["decode"]["twins"] == dict.fromkeys(sides, OURS)
    if cpu_library()[0]:
        ratios = [work[OURS]["weight_bytes"] / work[f"{OURS}, {kind}"]["weight_bytes"]
                  for kind in ("int8", "q4_all")]
        assert 3.5 < ratios[0] <= 4 < 6 < ratios[1] <= 32 / 4.5
        assert len({of["macs"] for of in work.values()}) == 1


def test_the_record_says_where_it_ran(alone):
    _, record, _ = alone
    assert record["hardware"].keys() == {"cpu", "cores", "threads", "gpu", "torch", "python", "platform"}
    assert record["hardware"]["threads"] == 1 and record["hardware"]["torch"] == torch.__version__
    assert record["load_average"].keys() == {"before", "after"}
    assert record["config"]["new"] == 6 and record["parameters"] == 10_745_088
    assert record["versions"]["numpy"] == numpy.__version__ and record["seeds"] == [1337]


def test_a_record_of_a_later_schema_is_refused_and_one_without_is_the_first(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"schema": records.SCHEMA + 1}))
    with pytest.raises(ConfigError, match=rf"schema {records.SCHEMA + 1}.*newer bench.py"):
        records.read(path)
    path.write_text("{}")
    assert records.read(path) == {}


def test_without_nanogpt_there_is_no_ratio(alone):
    result, record, _ = alone
    for found in record["measurements"].values():
        assert PEER not in found["sides"] and found["sides"][OURS]["median"] > 0
        assert found["ratio"] == {}
    people = result.out
    assert people.count("ratio") == people.count("no ratio: nanoGPT was not measured") == 2


def test_nothing_is_left_beside_a_record_that_cannot_be_written(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match=r"taken could not be written"):
        records.write_atomically(tmp_path / "taken", "{}")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


def test_a_record_that_cannot_be_written_is_not_lost(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "out-bench").write_text("a file")
    for path in ("taken", records.FOLDER / "decode.json"):
        with pytest.raises(ConfigError, match=r"could not be written.*last line of stdout"):
            records.keep(path, '{"a": 1}\n')
        assert capsys.readouterr().out == '{"a": 1}\n'


def test_a_record_that_nobody_named_goes_where_git_looks_away(tmp_path):
    record = record_of(run(tmp_path, "memory"))
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.json")] == [
        "out-bench/memory.json"] and record["subcommand"] == "memory"
    defaults = {name: bench.load(name)[0] for name in bench.COMMANDS}
    named = [(name, key, field.default) for name, kind in defaults.items()
             for key, field in kind.__dataclass_fields__.items()
             if key in ("out", "plot", "html", "runs", "cache") and name != "compare" and field.default]
    assert named == [("table", "runs", "out-bench/runs"), ("table", "cache", "out-table"),
                     ("retrofit", "runs", "out-retrofits")]
    ignored = subprocess.run(["git", "check-ignore", "out-bench/x.json", "out-plots/x.png"], cwd=ROOT,
                             capture_output=True, text=True)
    assert ignored.returncode == 128 or len(ignored.stdout.split()) == 2, ignored       # 128: no checkout


def test_a_busy_machine_is_named(monkeypatch, capsys):
    for load, warned in ((0.4, False), (0.6, True)):
        monkeypatch.setattr(records, "load_average", lambda load=load: [load, 0, 0])
        assert "card_load" not in records.header(SimpleNamespace(nanogpt=""))
        assert ("the machine is busy" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("used, pids, said", [
    ("3", "", "card 3% used, other processes on it 0"), ("37", "", "the card is busy (37% of its time, "),
    ("0", "12\n13\nOWN", "other processes on it 2, before the start): timings are off"),
    ("[N/A]", "", "nvidia-smi does not tell"), (None, "", "nvidia-smi does not tell")])
def test_where_a_card_is_timed_its_own_load_is_said_and_recorded(monkeypatch, tmp_path, capsys, used, pids,
                                                                 said):
    """By an nvidia-smi that answers `used` and `pids`, or is not there."""
    if used is not None:
        (tmp_path / "nvidia-smi").write_text(
            f"#!/bin/sh\n[ $1 = --id=GPU-a1-b2 ] || exit 1\ncase $2 in\n--query-gpu=utilization.gpu) echo "
            f"'{used}';;\n--query-compute-apps=pid) printf '{pids}';;\nesac\n".replace(
                "OWN", str(os.getpid())))
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="a1-b2"))
    monkeypatch.setattr(records, "load_average", lambda: [9.0, 0, 0])
    for device in ("cuda", "auto"):
        found = records.header(SimpleNamespace(nanogpt="", device=device))["card_load"]["before"]
        printed = capsys.readouterr().out
        assert said in printed and "the machine is busy" not in printed
        known = used is not None and used.isdigit()
        assert found == ({"utilisation": int(used), "others": 2 * bool(pids)} if known else None)
    assert "card_load" not in records.header(SimpleNamespace(nanogpt="", device="cpu"))
    assert "the machine is busy" in capsys.readouterr().out


def test_a_commit_is_that_of_the_folder_itself_and_tells_changes(tmp_path):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True,
                       capture_output=True)
    (tmp_path / "inner").mkdir()
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    clean = records.commit_of(tmp_path)
    (tmp_path / "file").write_text("two")
    assert re.fullmatch("[0-9a-f]{12}", clean) and records.commit_of(tmp_path) == clean + "+changes"
    assert records.commit_of(tmp_path / "inner").startswith("no git, files sha256:")


def test_without_git_a_hash_of_the_sources_stands_for_the_commit(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "docs").mkdir()
    seen = set()
    for name, text in (("model.py", "1"), ("kernels/cpu.c", "1"), ("kernels/cpu.c", "2"), ("notes.txt", "1"),
                       ("docs/x.md", "1"), ("kernels/x.pyc", "1")):
        (tmp_path / name).write_text(text)
        said = records.commit_of(tmp_path)
        assert re.fullmatch("no git, files sha256:[0-9a-f]{12}", said)
        assert (said in seen) == (Path(name).suffix not in (".py", ".c")), name
        seen.add(said)
    files = (path.relative_to(ROOT) for wing in records.WINGS for path in (ROOT / wing).rglob("*.*"))
    for path in [path.relative_to(ROOT) for path in ROOT.glob("*.py")] + [*files]:
        if path.suffix in (".py", ".c", ".sh"):
            (tmp_path / "copy" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "copy" / path).write_bytes((ROOT / path).read_bytes())
    assert records.commit_of(tmp_path / "copy") == records.files_of(ROOT), "a copy has the checkout's hash"


# ------------------------------------------------ timing and its summary ----------------------

def test_sides_are_called_in_turns_after_one_untimed_round(monkeypatch):
    calls, now = [], [0.0]
    cost = {"a": 1.0, "b": 2.0}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def side(name):
        calls.append(name)
        now[0] += cost[name] + 100 * (len(calls) <= 2)  # the slow first round must not count
    sides = {"a": lambda: side("a"), "b": lambda: side("b")}
    assert timing.interleave(sides, 3) == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert "".join(calls) == "abababab"
    calls.clear()
    assert timing.interleave(sides, 2, warm_up=False) == {"a": [101.0, 1.0], "b": [102.0, 2.0]}


def test_caches_are_swept_before_every_call_and_outside_its_time(monkeypatch):
    calls, now = [], [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def spend(name, seconds):
        calls.append(name)
        now[0] += seconds
    monkeypatch.setattr(timing, "sweeper", lambda device, cold: lambda: spend(f"sweep {cold}", 100.0))
    assert timing.interleave({"a": lambda: spend("a", 1.0)}, 2, cold=3) == {"a": [1.0, 1.0]}
    assert calls == ["sweep 3", "a"] * 3


def test_a_cuda_device_tells_the_time_by_its_events_around_the_call(monkeypatch):
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")

        def synchronize(self):
            calls.append("wait")

        def elapsed_time(self, end):
            return 1500.0
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("idle"))
    monkeypatch.setattr(timing, "sweeper", lambda device, cold: lambda: None)
    sides = {"a": lambda: calls.append("call")}
    assert timing.interleave(sides, 1, warm_up=False, device=torch.device("cuda")) == {"a": [1.5]}
    assert calls == ["idle", "record", "call", "record", "wait"]


def test_a_sweep_touches_every_byte_that_it_is_asked_for():
    sweep = timing.sweeper(None, 2)
    assert sweep().eq(1).all() and sweep().eq(2).all() and sweep().nbytes == 2 * 2**20
    assert timing.sweeper(None, 0)().numel() == 0


def test_a_ratio_is_that_of_medians_and_above_one_where_ours_is_better():
    times = {PEER: [8.0, 100.0, 9.0], OURS: [3.0, 1.0, 2.0], OURS_FP32: [18.0]}
    found = timing.measurement("ms", times)
    assert found["sides"][PEER] == {"median": 9.0, "min": 8.0, "max": 100.0, "quartiles": [8.5, 54.5],
                                    "repeats": 3}
    assert found["ratio"] == {OURS: 4.5, OURS_FP32: 0.5}
    rates = timing.measurement("tokens/s", times, higher_is_better=True)
    assert rates["ratio"] == {OURS: 2 / 9, OURS_FP32: 2.0}
    for lonely in ({OURS: [1.0]}, {PEER: [1.0]}, {PEER: [], OURS: [1.0]}):
        assert timing.measurement("ms", lonely)["ratio"] == {}


def test_nanogpts_lines_give_ms_and_loss_of_each_iteration():
    said = ("step 0: train loss 4.2, val loss 4.3\niter 0: loss 4.2651, time 812.50ms, mfu -100.00%\n"
            "iter 1: loss nan, time 20.25ms, mfu 0.01%\n")
    (first, second) = peers.peer_iterations(said)
    assert first == (812.5, 4.2651) and second[0] == 20.25 and math.isnan(second[1])


def test_iterations_dropped_at_the_start_do_not_count(capsys):
    def runs(ms):
        return [train.Run([1000.0] * 5 + [ms] * 3, [9.0] * 8, "device cpu")]
    cfg, wall = train.Train(iters=8, drop=5), {PEER: [4.0], OURS: [2.0]}
    model = train.model_of("small", 65)
    found = train.train_report(cfg, {PEER: runs(30.0), OURS: runs(10.0)}, wall, model)
    assert found["measurements"]["iteration"]["ratio"] == {OURS: 3.0}
    assert found["measurements"]["rate"]["sides"][OURS]["median"] == pytest.approx(12 * 64 / 0.010)
    assert found["measurements"]["process"]["ratio"] == {OURS: 2.0}
    assert found["first_iteration_seconds"]["median"] == 1.0 and found["final_losses"][OURS] == [9.0]


def test_fp32_ids_that_differ_are_said_loudly_and_bf16_ones_told(capsys):
    expected, other = torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 9, 4])
    found = decode.compare(expected, other)
    assert found == {"equal": 0.75, "first_difference": 2}
    assert decode.compare(expected, expected) == {"equal": 1.0, "first_difference": None}
    for dtype, loud in (("float32", True), ("bfloat16", False)):
        sides = {OURS: found | {"dtype": dtype}}
        decode.tell_agreement({"of": PEER, "distinct": 4, "sides": sides})
        said = capsys.readouterr().out
        assert "0.7500 equal" in said and ("!!! GREEDY IDS DIFFER" in said) == loud


@pytest.mark.parametrize("flags", [{}, dict(act="relu2"), dict(hierarchy=3, n_layer=3)], ids=str)
def test_cached_step_is_the_whole_context_for_one_token_again_and_again(flags):
    shape = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=32)
    model = GPT(GPTConfig(**shape | flags), seed=1).eval()
    prompt = torch.arange(7)[None]
    step = decode.cached_step(model, prompt)
    for _ in range(3):
        torch.testing.assert_close(step(), model(prompt)[0][:, -1])


def test_the_step_that_is_timed_is_the_step_of_generate():
    """Where generation runs the decode engine's program, the timed step does too and multiplies as much."""
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=32), seed=1).eval()
    prompt, programs = torch.arange(7)[None], cpu_library()[0] is not None
    step = decode.cached_step(model, prompt)
    with sparse_kernels.counting() as one:
        step()
    assert one.macs == work.work(model, prompt[:, :6], 1)["macs"]
    called = []
    model.transformer.h[0].register_forward_hook(lambda *_: called.append(1))
    step()
    assert bool(called) != programs, "a program asks no module"


# ------------------------------------------------ beside a real nanoGPT -----------------------

@beside_nanogpt
def test_decode_beside_nanogpt_has_both_sides_and_the_same_greedy_ids(tmp_path):
    record = record_of(run(tmp_path, *SHORT, f"--nanogpt={NANOGPT}", "--dtype=bfloat16"))
    for found in record["measurements"].values():
        assert list(found["sides"]) == [PEER, OURS, OURS_FP32]
        assert found["ratio"].keys() == {OURS, OURS_FP32}
    agreement = record["agreement"]
    assert agreement["of"] == PEER and agreement["sides"][OURS_FP32]["equal"] == 1.0
    assert agreement["distinct"] > 1, "ids that never change agree for any two models"


@beside_nanogpt
def test_train_beside_nanogpt_measures_every_iteration_of_both(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 4)
    words = ["--iters=6", "--drop=2", "--repeats=1", "--threads=1", "--dtype=float32", "--input=text.txt"]
    record = record_of(run(tmp_path, "train", f"--nanogpt={Path(NANOGPT).resolve()}", *words))
    for key in ("iteration", "rate", "process"):
        assert record["measurements"][key]["ratio"][OURS] > 0
    ours, theirs = record["final_losses"][OURS][0], record["final_losses"][PEER][0]
    assert abs(ours - theirs) < 0.2, f"the same model on the same data starts alike: {ours} and {theirs}"


# ------------------------------------------------ blocks ---------------------------------------

def test_mlp_times_every_side_and_counts_the_weights_it_reads(tmp_path):
    record = record_of(run(tmp_path, "mlp", "--widths=32,64", "--repeats=1", "--predict=4", "--cold=1"))
    assert record["measurements"].keys() == {"width 32", "width 64"}
    sides = record["measurements"]["width 64"]
    assert {"F.linear, bfloat16", "dense, float32", "columns 3 of 32, bfloat16, torch alone",
            "predicted 20%, bfloat16"} <= sides["sides"].keys()
    assert all(ratio > 0 for ratios in sides["against"].values() for ratio in ratios.values())
    read = {name: work["bytes"] for name, work in record["work"].items()}
    dense = 2 * 4 * 64 * 64 * 2
    for dtype, size in (("bfloat16", 1), ("float32", 2)):        # squared ReLU: of W_down only live units
        assert size * dense / 2 < read[f"dense, {dtype}, 64"] < size * dense
    assert sides["to_twin"].keys() == {f"{arm}, {dtype}" for dtype in ("bfloat16", "float32") for arm in
                                       ("top 10%", "columns 3 of 32", "predicted 20%")}
    up, gate = dense * 3 // 64, 32 * 64 * 2 + 32 * 32 * 4        # of W_down only the units above 0
    assert gate + up < read["columns 3 of 32, bfloat16, 64"] < gate + 2 * up
    up, predictor = 2 * 51 * 64, 2 * 4 * (64 + 256)
    assert predictor + up < read["predicted 20%, bfloat16, 64"] < predictor + 2 * up
    one_sentence(run(tmp_path, "mlp", "--widths=33"), "bench.py", "widths='33'", "--widths=384,768")


def test_decode_times_blocks_beside_their_dense_twin(tmp_path):
    record = record_of(run(tmp_path, *SHORT, "--blocks=True"))
    ratios = record["measurements"]["decode"]["to_twin"]
    assert ratios.keys() == {"top 10%", "columns 3 of 32", "predicted 20%", *decode.OTHER_BLOCKS,
                             *SHAPED}
    assert min(ratios.values()) > 0
    twin, found = "dense, act=relu2", record["measurements"]["decode"]
    assert set(found["twins"].values()) == {twin} and found["twins"].keys() == ratios.keys()
    for name, ratio in ratios.items():
        assert ratio == found["sides"][name]["median"] / found["sides"][twin]["median"]
    read = {name: work["weight_bytes"] for name, work in record["work"].items()}
    assert read["window 128"] == pytest.approx(read[twin], rel=0.03) and read[twin] < 0.95 * read[OURS]
    assert record["work"]["window 128"]["ceiling"] == read[twin] / read["window 128"]
    step = record["measurements"]["step"]
    assert step["plain_read"]["median"] > 0 and -1 <= step["rank_correlation"] <= 1


@pytest.mark.parametrize("ranks, expected", [([1, 2, 3, 4], 1), ([40, 30, 20, 10], -1), ([1, 2, 4, 3], 0.8)])
def test_a_rank_correlation_is_spearmans(ranks, expected):
    assert decode.rank_correlation([0.1, 0.2, 5.0, 100.0], ranks) == pytest.approx(expected)


def test_decode_is_timed_alone_and_beside_busy_loops_which_end_with_it(tmp_path):
    words = "decode", "--shape=small", "--prompt=4", "--new=3", "--repeats=2", "--threads=1", "--device=cpu"
    result = run(tmp_path, *words, "--load=2")
    found = record_of(result)["measurements"]["load"]
    name = f"{OURS}, 2 busy loops beside it"
    assert found["sides"].keys() == {OURS, name} and found["sides"][name]["repeats"] == 2
    assert found["kept"] == found["sides"][name]["median"] / found["sides"][OURS]["median"] > 0
    assert found["share"] == min(1, found["cores"] / 3) and f"{name}: " in result.out
    one_sentence(run(tmp_path, *words, "--load=-1"), "bench.py", "load=-1", "0 for none")


def test_busy_loops_run_while_they_shall_and_not_beyond_the_block():
    def ticks(process):
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])                 # of user and system

    with BusyLoops(1) as busy:
        (process,) = busy.processes
        busy.go(True)
        while ticks(process) < 20:
            time.sleep(0.01)
        busy.go(False)
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.01)
        stopped = ticks(process)
        time.sleep(0.1)
        assert ticks(process) == stopped and process.poll() is None
    assert process.returncode == -signal.SIGKILL


def test_a_batch_decodes_as_many_tokens_as_it_has_rows(tmp_path):
    words = "decode", "--shape=small", "--prompt=4", "--new=3", "--repeats=1", "--dtype=float32"
    one, three = (record_of(run(tmp_path, *words, *more)) for more in ((), ("--batch=3",)))
    macs = [record["work"][OURS]["macs"] for record in (one, three)]
    assert macs[1] == 3 * macs[0] and three["measurements"]["decode"]["sides"][OURS]["median"] > 0
    one_sentence(run(tmp_path, *words, "--batch=0"), "bench.py", "batch=0", "leave --batch out")


@pytest.mark.parametrize("loss_chunks", [0, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_that_is_not_there_keeps_what_a_real_one_keeps(recompute, loss_chunks, monkeypatch):
    config = GPTConfig(block_size=64, vocab_size=65, n_layer=2, n_head=2, n_embd=32, recompute=recompute,
                       loss_chunks=loss_chunks)
    monkeypatch.setattr(sparse_kernels, "NATIVE_BF16", True)
    model, idx = GPT(config, seed=0).train(), torch.zeros(1, 64, dtype=torch.int64)
    model.compute_dtype = torch.bfloat16
    real = estimate.saved_bytes(model, idx, idx)
    assert real and memory.kept_by(config) == (sum(p.numel() for p in model.parameters()), real)


@pytest.mark.parametrize("arm", VARIANTS)
def test_a_dry_runs_estimate_of_a_variant_is_that_of_a_model_that_is_not_there(arm, monkeypatch):
    """A card's: a CPU's C passes keep less. Tokens that have halted are not computed."""
    config = GPTConfig(**TINY | VARIANTS[arm])
    parameters, kept = memory.kept_by(config, rows=5)
    monkeypatch.setattr(sparse_kernels, "NATIVE_BF16", True)
    monkeypatch.setattr(passes, "cpu_library", lambda: (None, "off"))
    monkeypatch.setattr(sparse_kernels, "filled_up", lambda a, ends: (a, None, ends))       # a card adds none
    model, idx = GPT(config, seed=0).train(), tokens(5, 16)
    model.compute_dtype = torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) == parameters
    least, most = {"ponder": (0.8, 1.2)}.get(arm, (1.0, 1.03))
    assert least * kept <= estimate.kept_bytes(model, (idx, idx)) <= most * kept


def test_memory_of_the_variants_is_what_their_dry_runs_print(tmp_path, data):
    table = run(tmp_path, "memory", "--variants=True")
    found = record_of(table)["variants"]
    assert found.keys() == set(arms.named_arms(SimpleNamespace(arms="")))
    assert sum(re.search(r"MiB: weights and gradients ", line) is not None
               for line in table.out.splitlines()) == len(found)
    files, keys = arms.parts("topk")
    recipe = [str(ROOT / file) for file in ("config/compare_pylib.py", "config/longer_context.py", *files)]
    keys |= dict(dataset=data, device="cpu", dtype="bfloat16", compile=False, dry_run=True)
    as_a_card = "import sparse_kernels; sparse_kernels.NATIVE_BF16 = True"       # keeps no copies in fp32
    said = Job("train.py", [*recipe, *words_of(**keys)], tmp_path, dict(NANOCORTEX_KERNELS="off"),
               before=as_a_card).wait().out
    of = {name: float(value.replace(",", "")) * 2**20 for name, value in re.findall(
        r"(weights|optimizer|kept for backward|gradient of the logits) ([\d,.]+) MiB", said)}
    names = dict(weights="weights", optimizer="optimizer", kept="kept for backward",
                 logits="gradient of the logits")
    for part, name in names.items():
        assert of[name] == pytest.approx(found["topk"][part], rel=0.02, abs=0.06 * 2**20), part


def test_memory_says_what_recomputing_leaves(tmp_path):
    found = record_of(run(tmp_path, "memory", "--shape=baby", "--cards=8"))["memory"]
    plain, recomputed = found["recompute=False"], found["recompute=True"]
    assert plain["fixed"] == recomputed["fixed"] > 16 * 10e6
    assert recomputed["sequence"] < 0.4 * plain["sequence"]
    assert recomputed["batch_size"]["8"] > 2 * plain["batch_size"]["8"]
    chunks, both = found["recompute=False, loss_chunks=8"], found["recompute=True, loss_chunks=8"]
    weights, logits = 4 * 65 * 384, 256 * 65       # 4 bytes of each are kept no more, 6 make room for 6 / 8
    assert chunks["fixed"] == both["fixed"] == plain["fixed"] + weights
    for before, after in ((plain, chunks), (recomputed, both)):
        saved = (before["sequence"] - after["sequence"]) / (logits * (4 + 6 - 6 / 8))
        assert 0.9 < saved < 4                      # and what autograd keeps of the states


def test_window_times_local_attention_beside_full_and_a_token_at_every_context(tmp_path):
    words = ["window", "--tokens=40", "--window=8", "--heads=2", "--contexts=16,64", "--repeats=1"]
    record = record_of(run(tmp_path, *words, "--plot=p.png"))
    layer, token = record["measurements"]["layer"], record["measurements"]["decoded token"]
    assert len(layer["sides"]) == 6 and layer["against"].keys() == {"window, float32", "window, bfloat16"}
    assert record["difference"]["float32"] == 0 < record["difference"]["bfloat16"] < 2e-2
    assert token["sides"].keys() == {"window, 16", "window, 64", "full, 16", "full, 64"}
    cached = record["cache_bytes"]
    assert cached["window, 64"] == cached["window, 16"] == cached["full, 64"] / 8
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_reach_says_where_the_line_is_passed_or_that_it_is_not(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "tiny.py").write_text("n_layer = n_head = 1\nn_embd = block_size = 16\nbatch_size = 4\n"
                                      "gradient_accumulation_steps = 1\nmax_iters = 20\nwarmup_iters = 0\n"
                                      "eval_interval = 5\neval_iters = 2\nlearning_rate = 1e-2\n")
    for line, passed in ((99.0, 5 * 64), (0.1, None)):
        record = record_of(run(tmp_path, "reach", f"--line={line}", f"--config={tmp_path / 'tiny.py'}",
                               f"--input={tmp_path / 'text.txt'}"))
        found = record["runs"][0]
        assert found["passed_tokens"] == passed and found["tokens"] == 20 * 64 and len(found["curve"]) == 4
        assert found["best"] == min(loss for *_, loss in found["curve"])


@pytest.mark.parametrize("changed, parts", [
    ({"iters": 7}, ["iters=7", "iters=3", "--iters=7"]), ({"config": "config/x.py"}, ["config/x.py"]),
    ({"repeats": 2}, ["repeats=2", "--repeats=2"]), ({"torch": "1.0"}, ["torch 1.0", "leave --keep out"])])
def test_runs_of_an_earlier_record_that_was_trained_otherwise_are_not_kept(tmp_path, changed, parts):
    config = {"iters": 3, "config": "config/compare_pylib.py", "repeats": 1} | changed
    (tmp_path / "old.json").write_text(json.dumps({"runs": {}, "config": config, "hardware": {
        "torch": changed.get("torch", torch.__version__)}}))
    one_sentence(run(tmp_path, "quality", "--iters=3", "--repeats=1", "--arms=gelu", "--keep=old.json"),
                 "bench.py", *parts)


def test_steps_of_all_that_computes_its_twins_products_are_timed_beside_it(tmp_path):
    (tmp_path / "tiny.py").write_text("n_layer = 4\nblock_size = 16\nbatch_size = 2\n")
    words = ["steps", f"--config=config/compare_pylib.py,{tmp_path / 'tiny.py'}", "--repeats=2"]
    found = record_of(run(tmp_path, *words, "--cases=small:1"))["measurements"]
    sides = found["training step, small, 1 threads"]["sides"]
    assert len(found) == 1 and sides["dense"]["to_twin"] == 1
    assert {"osc", "topk", "predict", "winners", "event", "columns"} <= sides.keys()
    assert not {"gelu", "3 layers", "hierarchy", "experts", "compartments"} & sides.keys()
    assert sides["topk"]["products_to_twin"] == 1 != sides["columns"]["products_to_twin"]
    for s in sides.values():
        assert s["tokens_per_s"] == pytest.approx(32 / (1e-3 * s["median"])) and s["to_twin"] > 0
    rows = list(readme.step_rows({"measurements": found}))
    assert rows[0].startswith("dense, small, 1 threads | ") and rows[0].endswith(" | 1.00x")


@pytest.mark.slow
def test_quality_gives_an_arm_its_twins_time_and_draws_closed_branches(tmp_path):
    words = ["quality", "--iters=60", "--repeats=1", "--arms=dense,dendrites", "--plot=p.png",
             "--equal_time=dendrites", "--config=config/compare_pylib.py,config/longer_context.py"]
    record = record_of(run(tmp_path, *words))
    assert list(record["runs"]) == ["dense", "dendrites", "dendrites, equal time"]
    run_, longer = (record["runs"][arm][0] for arm in ("dendrites", "dendrites, equal time"))
    assert run_["iters"] == 60 and longer["iters"] != 60 and len(run_["open_branches"]) == 3
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.slow
def test_quality_trains_every_arm_and_reads_the_predictors_curve(tmp_path):
    words = ["quality", "--iters=3", "--repeats=1", "--arms=dense,predict,experts", "--plot=p.png"]
    record = record_of(run(tmp_path, *words))
    assert list(record["runs"]) == ["dense", "predict", "experts"]
    assert record["runs"]["predict"][0]["policy"].keys() == {str(share) for share in quality.SHARES}
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.slow
def test_depth_draws_exits_beside_dense_models_and_drafts_the_same_tokens(tmp_path):
    words = ["depth", "--iters=20", "--layers=3", "--exits=1,2", "--repeats=1", "--prompts=2", "--new=10",
             "--thresholds=0.5,0.9", "--drafts=2", "--plot=p.png"]
    record = record_of(run(tmp_path, *words))
    assert [p["layers"] for p in record["points"].values()][:4] == [1, 2, 3, 3]
    assert all(1 <= p["layers"] <= 3 and p["tokens_per_second"] > 0 for p in record["points"].values())
    assert all(d["equal"] == d["tokens"] == 20 for d in record["drafted"].values())
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.slow
def test_pondering_and_growth_are_measured_beside_dense_models(tmp_path):
    words = ["ponder", "--iters=10", "--layers=3", "--most=2", "--costs=0.1", "--repeats=1",
             "--config=config/compare_pylib.py"]
    points = record_of(run(tmp_path, *words))["points"]
    assert points["halting bias +4"]["layers"] < points["halting bias -4"]["layers"] == 4
    words = ["grow", "--iters=12", "--layers=3", "--grow=1:0.5", "--repeats=1", "--plot=p.png"]
    runs = record_of(run(tmp_path, *words))["runs"]
    assert runs["grown"][0]["curve"][-1][2] < runs["full depth"][0]["curve"][-1][2]
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.slow
def test_forgetting_is_measured_with_every_way_to_hold_a_task(tmp_path):
    (tmp_path / "other.txt").write_text(TEXT * 2)
    words = ["continual", "--iters=4", "--steps=2", "--repeats=2", "--input=other.txt", "--plot=p.png"]
    record = record_of(run(tmp_path, *words))
    assert record["runs"].keys() == record["summary"].keys() == record["arms"].keys()
    plain, frozen = (record["runs"][name] for name in ("fine-tuning", "adapters"))
    assert [run_["forgetting"] for run_ in frozen] == [0.0, 0.0]
    for run_ in plain:
        assert run_["forgetting"] == run_["matrix"][1]["pylib"] - run_["matrix"][0]["pylib"]
    starts = {name: [run_["matrix"][0]["pylib"] for run_ in seeds] for name, seeds in record["runs"].items()}
    assert starts["EWC"] == starts["replay"] == starts["fine-tuning"] != starts["adapters"]
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_budget_is_drawn_against_executed_multiply_adds(tmp_path):
    words = ["energy", "--iters=4", "--budgets=0.9,0.1", "--tokens=3", "--plot=p.png"]
    points = record_of(run(tmp_path, *words))["points"]
    assert points["no gates"][0]["macs"] == 4 * 12 * 128 ** 2
    assert all(p["joules_per_token"] == "n/a" or p["joules_per_token"] > 0 for p in points["budget 0.1"])
    assert (tmp_path / "p.png").stat().st_size > 1000


# ------------------------------------------------ race and readme ------------------------------

def test_a_race_without_a_rival_is_refused(tmp_path):
    one_sentence(run(tmp_path, "race"), "bench.py", "both sides", CLONE)
    one_sentence(run(tmp_path, "race", "--device=mps"), "bench.py", "device='mps'", "cpu or cuda")


def a_checkout(folder):
    """A nanoGPT whose train.py names its seed and does nothing."""
    (folder / "config").mkdir(parents=True)
    (folder / "model.py").touch()
    (folder / "config" / "train_shakespeare_char.py").touch()
    (folder / "train.py").write_text("torch.manual_seed(1337 + 0)")
    return folder


@pytest.mark.parametrize("device, own, same, peer, tokens", [
    ("cpu", "race_shakespeare_cpu", "train_shakespeare_char_cpu", dict(n_layer=4, block_size=64), 2000 * 768),
    ("cuda", "race_shakespeare_gpu", "train_shakespeare_char", dict(batch_size=64), 5000 * 64 * 256)])
def test_a_race_runs_nanogpts_run_of_a_device_beside_ours_for_it(monkeypatch, tmp_path, device, own, same,
                                                                 peer, tokens):
    runs, judged = [], []
    monkeypatch.setattr(race, "race_data", lambda cfg, work: work)
    monkeypatch.setattr(race, "copy_peer", lambda *words: shutil.copytree(words[0], words[1]))
    monkeypatch.setattr(race.tokenizers, "meta_of", lambda data: {"vocab_size": 65})
    monkeypatch.setattr(race, "timed_script", lambda script, words, keys, cwd, cfg: (
        runs.append((Path(words[0]).stem, keys)), ("", 2.0))[1])
    monkeypatch.setattr(race, "peer_iterations", lambda said: [(1.0, 2.0)])
    monkeypatch.setattr(race, "metrics", lambda folder: [{"tokens": 7, "seconds": 1.0, "loss": 2.0}])
    monkeypatch.setattr(race, "judged", lambda out, data, seconds, tokens, curve, on: judged.append(
        (tokens, on)))
    monkeypatch.setattr(race, "race_runs", lambda cfg, sides: [side(0) for side in sides.values()])
    monkeypatch.setattr(race, "race_report", lambda cfg, runs: {})
    race.race(race.Race(nanogpt=str(a_checkout(tmp_path / "peer")), device=device))
    assert [name for name, _ in runs] == ["train_shakespeare_char", own, same]
    assert all(keys["device"] == device for _, keys in runs) and peer.items() <= runs[0][1].items()
    assert judged == [(tokens, device), (7, device), (7, device)]
    assert race.validation_of(device)["block_size"] == race.DOCUMENTED[device]["block_size"]


def test_the_race_on_a_gpu_keeps_the_shape_of_its_sibling_and_trains(tmp_path, data):
    own, sibling = (arms.keys_of(str(ROOT / file)) for file in (race.OWN["cuda"], race.SAME["cuda"]))
    shape = "n_layer", "n_head", "n_embd", "block_size", "batch_size", "dropout", "dataset"
    assert [own[key] for key in shape] == [sibling[key] for key in shape]
    assert own["max_iters"] == own["lr_decay_iters"] <= sibling["max_iters"] / 8
    keys = dict(dataset=data, device="cpu", dtype="float32")
    small = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, batch_size=4, ngram_buckets=64)
    dry = Job("train.py", [str(ROOT / race.OWN["cuda"]), *words_of(**keys, **small, dry_run=True)],
              tmp_path, name="dry").wait()
    assert dry.status == 0 and "38,400 in all" in dry.out, dry.err
    done = Job("train.py", [str(ROOT / race.OWN["cuda"]), *words_of(
        **keys, **small, out_dir="out", max_iters=12, lr_decay_iters=12, eval_iters=2)], tmp_path).wait()
    assert done.status == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 12 and losses[-1] < losses[0]


def test_curves_are_thinned_and_smoothed():
    curve = [[10 * i, i / 2, float(i)] for i in range(1000)]
    thin = race.thinned(curve)
    assert len(thin) == 200 and thin[0] == [0, 0.0, 0.0]
    assert thin[100] == [5000, 250.0, 495.0]                        # the mean of 490 .. 500


def test_the_readme_and_the_pages_say_what_the_records_say():
    readme.readme(readme.Readme(check=True))


def test_the_tables_are_made_from_records_with_both_sides(tmp_path):
    spread = {"median": 2.0, "min": 1.0, "max": 3.0, "repeats": 5}
    record = {"subcommand": "decode", "config": {"shape": "baby"},
              "hardware": {"cpu": "x", "gpu": None, "threads": 2, "torch": "2"},
              "measurements": {"step": {"unit": "ms",
                                        "sides": {"nanoGPT": spread | {"median": 5000.0}, "ours": spread},
                                        "ratio": {"ours": 2500.0}},
                               "alone": {"unit": "ms", "sides": {"ours": spread}, "ratio": {}}}}
    (tmp_path / "a.json").write_text(json.dumps(record))
    table = readme.results_table(readme.records_of(tmp_path))
    assert "| decode baby: step, ms | 2 | 5,000 | 2500.00x | [a.json](results/a.json) |" in table
    assert "alone" not in table


@pytest.mark.parametrize("text, sentence", [
    ("<!-- rows: all -->\nno end", "lost a mark"), ("no begin <!-- end of rows -->", "lost a mark"),
    ("<!-- rows: all -->\n<!-- rows: osc -->\n<!-- end of rows -->", "lost a mark"),
    ("<!-- rows: oscs -->\n<!-- end of rows -->", "rows of 'oscs', did you mean 'osc'")])
def test_a_page_that_cannot_be_filled_says_why(text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        readme.filled(text, "docs/x.md", {})


def test_a_stale_page_is_named_and_written(tmp_path, monkeypatch, capsys):
    text = "a {}<!-- rows: osc -->{}\n<!-- end of rows --> b"
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "README.ko.md"):
        (tmp_path / name).write_text("nothing to fill")
    (tmp_path / "docs" / "osc.md").write_text(text.format("", "\nold"))
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    with pytest.raises(ConfigError, match=r"^docs/osc.md: not what"):
        readme.readme(readme.Readme(check=True))
    readme.readme(readme.Readme())
    assert "docs/osc.md" in capsys.readouterr().out
    written = (tmp_path / "docs" / "osc.md").read_text()
    assert "not measured yet" in written and "old" not in written
    assert written.startswith("a ") and written.endswith(" b")
    readme.readme(readme.Readme(check=True))


# ------------------------------------------------ screened units -----------------------------------------

@pytest.mark.skipif(cpu_library()[0] is None, reason="no C kernels here")
def test_a_run_is_screened_in_parts_that_go_together(train, data):
    train(max_iters=8, act="relu2", block_size=32)
    small = (f"--dataset={data}", "--shares=15,100", "--bits=4", "--quantize=int8,int4", "--windows=4",
             "--prompt=4", "--new=16", "--threads=1", "--dtype=float32")
    words = ("screen", str(train.folder / "out"), *small)
    part = record_of(run(train.folder, *words, "--loss_only", "--out=losses.json"))
    points = part["points"]
    assert points.keys() == {"float32", "int8", "int4", *(
        f"{kind}, all rows" for kind in ("float32", "int8", "int4")), *(
        f"{first} copy, {share}%" for first in ("float32, 4-bit", "int8, 4-bit", "int4, its own")
        for share in (15, 100))}
    assert not part["measurements"] and all("loss" in p and p["bytes"] > 0 for p in points.values())
    for kind, place in (("float32", 1e-6), ("int8", 1e-2)):      # as if no unit were known to be silent
        assert points[f"{kind}, all rows"]["loss"] == pytest.approx(points[kind]["loss"], abs=place)
    assert points["float32, all rows"]["bytes"] > points["float32"]["bytes"]
    assert points["float32, 4-bit copy, 100%"]["percent"] == pytest.approx(0, abs=1e-3)
    assert points["float32, 4-bit copy, 100%"]["edges"] == [None] * len(points["float32"]["live"])
    assert points["float32, 4-bit copy, 15%"]["bytes"] < points["float32, 4-bit copy, 100%"]["bytes"]
    assert max(points["float32, 4-bit copy, 15%"]["live"]) < min(points["float32"]["live"])
    assert points["float32"]["nats"]["mean"] == 0 and points["int8"]["nats"]["n"] == 4
    whole = record_of(run(train.folder, *words, "--losses=losses.json", "--repeats=2"))
    sides = whole["measurements"]["decode"]["sides"]
    assert sides.keys() == whole["points"].keys() == points.keys()
    for name, p in points.items():
        again = whole["points"][name]
        assert again["tokens_per_second"] == sides[name]["median"] > 0
        assert [again.get(key) for key in ("loss", "edges", "bytes", "nats")] == [
            p.get(key) for key in ("loss", "edges", "bytes", "nats")]
    timed = "--losses=losses.json", "--time_only", "--shares=30", "--repeats=1"
    points = record_of(run(train.folder, *words, *timed))["points"]
    assert "loss" not in points["int8, 4-bit copy, 30%"] and points["int8"]["nats"]["n"] == 4
    one_sentence(run(train.folder, *words, *timed, "--plot=p.png"), "bench.py", "float32, 4-bit copy, 30%")
    other = run(train.folder, *words, "--losses=losses.json", "--windows=3")
    one_sentence(other, "bench.py", "losses='losses.json'", "--windows=3")
    one_sentence(run(train.folder, *words, "--dataset=gone/"), "bench.py", "gone/")
    one_sentence(run(train.folder, *words, "--prompt=40"), "bench.py", "prompt=40", "block_size")


@pytest.mark.skipif(cpu_library()[0] is None, reason="no C kernels here")
@torch.inference_mode()
def test_the_loss_of_a_point_is_that_of_the_tokens_that_its_program_reads(train, data):
    from benchmarks import screen
    train(max_iters=8, act="relu2", block_size=32)
    cfg = screen.Screen(out_dir=str(train.folder / "out"), dataset=str(data), shares="15", bits="4",
                        quantize="", windows=2, prompt=4, new=16, threads=1, dtype="float32", loss_only=True)
    point_run = screen.Run(cfg)
    points, _ = screen.measure_all(cfg, point_run)
    _, decodes = point_run.models("", 4)
    screen.set_edges(decodes.use_policy(), points["float32, 4-bit copy, 15%"]["edges"])
    block, losses = point_run.x.size(1), []
    for x, y in zip(point_run.x.split(1), point_run.y.split(1)):
        cache = decode.Cache(decodes, 1, block)
        program = decode.engine.program_of(decodes, cache, decodes.config.vocab_size, None, x.device)
        program.begin(x, [0], [1])
        logits = torch.cat([program.step().clone() for _ in range(block)])
        losses.append(torch.nn.functional.cross_entropy(logits, y[0]).item())
    assert sum(losses) / 2 == pytest.approx(points["float32, 4-bit copy, 15%"]["loss"], abs=2e-4)


@pytest.mark.parametrize("text, found", [
    ("", []), ("int8", ["int8"]), ("int8,int4,q4_all", ["int8", "int4", "q4_all"]),
    ("int8,mlp=4,attn=8,head=8,int4", ["int8", "mlp=4,attn=8,head=8", "int4"]),
    ("mlp=4,attn=8,mlp=3", ["mlp=4,attn=8", "mlp=3"])])
def test_kinds_of_whole_numbers_are_listed_by_commas_though_their_parts_have_commas_too(text, found):
    assert quantized.kinds_in(text) == found


@pytest.mark.parametrize("words, parts", [
    (["--shares=0.15"], ["shares='0.15'", "--shares=10,15,20"]), (["--bits=5"], ["bits='5'", "--bits=4"]),
    (["--quantize=int3"], ["quantize='int3'"]), (["--loss_only", "--time_only"], ["loss_only", "time_only"]),
    (["--losses=gone.json"], ["losses='gone.json'", "--out=FILE"]), (["--windows=1"], ["windows=1"])])
def test_bad_keys_of_screen_say_what_to_type(tmp_path, words, parts):
    one_sentence(run(tmp_path, "screen", *words), "bench.py", *parts)


@pytest.mark.slow
def test_retrofits_are_measured_beside_the_dense_model_trained_on_as_long(tmp_path):
    (tmp_path / "recipe.py").write_text("n_layer, n_head, n_embd, block_size, act = 3, 2, 16, 16, 'relu2'\n"
                                        "batch_size, gradient_accumulation_steps, eval_iters = 8, 1, 2\n"
                                        "learning_rate, min_lr, warmup_iters = 1e-2, 0.0, 0\n"
                                        "max_iters = lr_decay_iters = eval_interval = 8\n")
    words = ["retrofit", f"--config={tmp_path / 'recipe.py'}", "--repeats=1", "--more=2",
             "--arms=screened units,exits"]
    process = run_real("bench.py", [*words, "--plot=losses.png"], tmp_path)   # seven new processes' runs
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    record = json.loads((tmp_path / out.splitlines()[-1].removeprefix("record: ")).read_text())
    assert list(record["measurements"]["decode"]["sides"]) == [
        side + kind for side in (TWIN, "screened units", "exits") for kind in ("", ", int8")]
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert record["decode"]["exits"]["weight_bytes"] > 0 and str(tmp_path) not in json.dumps(record)
    _, err = run_real("bench.py", [*words, "--decode=False"], tmp_path).communicate(timeout=900)
    assert err.count(", kept\n") == 6                  # and none is trained again
    sides = [arm + taught for arm in (TWIN, "screened units", "exits") for taught in ("", ", taught")]
    assert list(record["runs"]) == sides
    table = [line.split() for line in out.splitlines() if line.startswith(("screened", "exits"))]
    assert [len(cells) for cells in table[:2]] == [7, 6] and "with itself as its teacher (one seed)" in out
    assert all(run["decoding"] > 0 for run in record["runs"]["exits"])
    assert record["runs"]["screened units"][0]["untouched"] == 0 and record["dense"]["iters"] == 8
    assert "untouched" not in record["runs"][TWIN][0] and "decoding" in record["runs"]["screened units"][0]


def test_a_retrofit_that_has_ended_is_kept_and_one_that_was_killed_is_trained_again(tmp_path, monkeypatch):
    from benchmarks import retrofit
    begun = []

    def train(cfg, data, folder, files, flags, seed, iters, **more):
        folder.mkdir(parents=True)               # which what is left of the killed one would be
        (folder / "ckpt.pt").write_text(f"{sorted(flags)} {seed}")
        begun.append(folder.parent.name)
        if len(begun) == 1:
            raise KeyboardInterrupt

    def runs_of(parent="parent", **keys):
        (tmp_path / parent).mkdir(exist_ok=True)
        (tmp_path / parent / "ckpt.pt").write_text(parent)
        keys |= dict(parent=str(tmp_path / parent), runs=str(tmp_path / "runs"))
        return retrofit.Runs(retrofit.Retrofit(**keys), tmp_path)
    monkeypatch.setattr(retrofit, "trained_with", train)
    monkeypatch.setattr(retrofit, "judged", lambda folder, data: {"val_loss": float(len(begun))})
    monkeypatch.setattr(retrofit, "hash_of_data", lambda data: "data")
    monkeypatch.setattr(retrofit.checkpoint, "read", lambda folder: ({}, str(folder / "ckpt.pt")))
    runs = runs_of()
    with pytest.raises(KeyboardInterrupt):
        runs.found("topk", 0)
    assert not runs.folder("topk", 0).exists()
    assert [runs.found("topk", 0)["val_loss"] for _ in range(2)] == [2, 2] and len(begun) == 2
    taught, other = "topk, taught", runs_of(more=9)
    assert [runs.found(*job)["val_loss"] for job in (("topk", 1), (taught, 0), ("topk", 0))] == [3, 4, 2]
    others = other, runs_of("elsewhere"), runs_of()
    assert [some.found("topk", 0)["val_loss"] for some in others] == [5, 6, 2]
    kept = [(folder / "ckpt.pt").exists() for folder in map(runs.folder, ("topk", "topk", taught), (0, 1, 0))]
    assert kept == [True, False, False] and not [*runs.place.glob("*.tmp")]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="name another folder"):
        retrofit.Runs(retrofit.Retrofit(runs=str(tmp_path / "file" / "runs")), tmp_path)


def test_a_table_of_retrofits_says_what_each_block_costs_untouched_and_trained(capsys):
    from benchmarks import retrofit
    runs = {TWIN: [dict(val_loss=1.0), dict(val_loss=1.2)],
            "topk": [dict(val_loss=1.15, untouched=0.02), dict(val_loss=1.17, untouched=0.02)],
            "topk, taught": [dict(val_loss=1.11), dict(val_loss=1.13)],
            "predict": [dict(val_loss=1.3, untouched=0.5, decoding=1.4)] * 2}
    retrofit.show(retrofit.Retrofit(repeats=2, more=7), dict(val_loss=1.5, iters=9), runs)
    first, head, topk, predict = capsys.readouterr().out.splitlines()
    assert "1.5000 after 9 iterations, 1.1000 after 7 more (means of 2 seeds)" in first
    assert topk.split() == ["topk", "+0.0200", "1.1600", "+0.0600", "+0.0200"] and "after 7" in head
    assert predict.split() == ["predict", "+0.5000", "1.3000", "+0.2000", "1.4000"]
    speeds = {TWIN: 2000.0, "topk": 3000.0, "dense, int8": 4000.0, "topk, int8": 5000.0}
    rates = {"decode": {"sides": {side: {"median": speed} for side, speed in speeds.items()}}}
    record = {"runs": runs, "measurements": rates, "decode": {"topk": {"weight_bytes": 2e6}}}
    dense, topk, predict = readme.retrofit_rows(record)
    assert dense == "dense |  | 1.1000 |  |  |  |  | 2,000, 1.00x | 4,000, 1.00x | 2"
    assert topk == ("topk | +0.0200 | 1.1600 | +0.0600 (-0.0300 to +0.1500) | +0.0200 |  | 2.00 | 3,000, "
                    "1.50x | 5,000, 1.25x | 2")
    assert predict == "predict | +0.5000 | 1.3000 | +0.2000 (+0.1000 to +0.3000) |  | +0.1000 |  |  |  | 2"


SCRIPT = Path(bench.__file__).parent / "benchmarks" / "gpu.sh"


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_the_script_for_a_card_types_commands_that_exist_and_stays_under_five_minutes(tmp_path):
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    env = {**os.environ, "PYTHON": "python"}
    said = subprocess.run([SCRIPT, "--print", tmp_path], env=env, capture_output=True, text=True, check=True)
    commands = [shlex.split(line) for line in said.stdout.splitlines()]
    assert len(commands) == 6 and all(words[0] == "python" for words in commands)
    names = []
    for words in commands:
        if words[1] == "bench.py":
            kind, _ = bench.load(words[2])
            configure(kind, words[3:], files=True)            # raises where a key or a value is wrong
            names.append(words[2])
    assert names == ["kernels", "decode", "decode", "window", "train"]
    assert {"--compile=True", "--peer_compile=True"} <= {*commands[-1]}       # nanoGPT's default on a card
    limits = re.findall(r"^(?:stage|bench) \w+ (\d+)", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(limits) == 6 and sum(map(int, limits)) <= 300


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_the_script_for_a_card_goes_on_where_it_was_cut_off_and_ends_with_a_table(tmp_path):
    """Records that are there are not measured again; a stage that fails is told, and its status is not 0."""
    side = {"sides": {"ours": {"median": 1.5}}, "unit": "ms"}
    for name in ("kernels", "decode_gpt2", "decode_xl", "window", "train"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"measurements": {"step": side}}), encoding="utf-8")
    for command, status in (("exit 3", 1), ("echo 5 passed", 0)):
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\n[ "$1" = - ] && exec {sys.executable} "$@"\n{command}\n')
        python.chmod(0o755)
        done = subprocess.run([SCRIPT, tmp_path], env={**os.environ, "PYTHON": str(python)},
                              capture_output=True, text=True, timeout=60)
        assert done.returncode == status and ("tests failed" in done.stdout) == bool(status), done
        lines = done.stdout.splitlines()
        assert sum("there already" in line for line in lines) == 5
        assert lines[-1].split() == ["window", "step", "ours", "1.5", "ms"], lines
        assert any("5 passed" in line for line in lines) == (not status)
