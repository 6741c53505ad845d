"""bench.py compare: one text for all losses, the engine's own count, one verdict; what is refused."""
import base64
import json
import math
import re
import shutil
import statistics
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TEXT, Job, Trainer, one_sentence, record_of, run_real, words

import bench
from benchmarks import compare as comparing
from benchmarks import texts, verdict
from benchmarks.stats import mean_interval
from configurator import ConfigError, configure
from data import dataset
from data.tokenizer import ByteTokenizer, CharTokenizer
from decode import engine
from kernels.build import cpu_library
from model import build_model
from sample import SampleConfig
from training import checkpoint, runtime

KINDS = {"dense": dict(act="relu2"), "predict": dict(act="relu2", mlp_topk=0.25, mlp_predict=4,
                                                     mlp_active=0.25),
         "longer": dict(act="relu2", block_size=16)}
FAST = ("--quick", "--device=cpu", "--dtype=float32", "--threads=1", "--repeats=3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    """A folder of finished runs, of one of them also a checkpoint without its data, and of other tokens."""
    trainer = Trainer(tmp_path_factory.mktemp("compared"), data)
    for kind, flags in KINDS.items():
        trainer(out=kind, **flags)
    chars = CharTokenizer(sorted(set(TEXT)))
    ids = chars.encode(TEXT)
    dataset.write_dataset(trainer.folder / "chars", {"train": [ids[300:]], "val": [ids[:300]]}, chars, "test")
    dataset.write_dataset(trainer.folder / "other", {"train": [list(b"other text, " * 50)],
                                                     "val": [list(b"held out of it, " * 20)]},
                          ByteTokenizer(), "test")
    for name in ("chars", "other"):
        trainer(out=f"on-{name}", dataset=trainer.folder / name, act="relu2")
    torch.save(checkpoint.read(trainer.folder / "dense")[0] | {"config": {"dataset": "moved-away"}},
               trainer.folder / "no-data.pt")
    return trainer.folder


def command(folder, *argv):
    return Job("bench.py", ["compare", *argv], folder).wait()


def compared(folder, *names, **keys):
    """The command in this process -> its record's own fields."""
    keys = dict(quick=True, device="cpu", dtype="float32", threads=1, repeats=3) | keys
    cfg = configure(comparing.Compare, words(**keys), base={"runs": tuple(str(folder / n) for n in names)})
    return comparing.compare(cfg)


def table_of(out, first="dense"):
    """{run: its row} of the printed table, by the widths of its head."""
    lines = out.splitlines()
    [at] = [n for n, line in enumerate(lines) if line.startswith("run ")]
    head, rows = re.split(r"\s{2,}", lines[at]), {}
    for line in lines[at + 1:]:
        if line.startswith("Losses are of") or line.startswith("Decoding:"):
            return head, rows
        rows[re.split(r"\s{2,}", line)[0]] = line
    raise AssertionError(out)


# ------------------------------------------------ what is measured ---------------------------------------

def test_two_runs_give_a_table_a_verdict_a_page_a_picture_and_a_record(runs):
    result = command(runs, "dense", "predict", *FAST, "--html=page.html", "--plot=p.png", "--out=r.json")
    record = record_of(result)
    head, rows = table_of(result.out)
    assert head[0] == "run" and "bits/byte" in head and "training tokens/s" in head
    assert [*rows] == ["dense", "predict"] == [*record["runs"]]
    assert record == json.loads((runs / "r.json").read_text()) and record["subcommand"] == "compare"
    assert record["hardware"]["cores"] and record["verdict"] in result.out.splitlines()
    assert re.match(r"predict decodes ([\d.]+x )?as fast as dense at .* loss.*, reading \d+% of its bytes\.$",
                    record["verdict"]), record["verdict"]
    for found in record["runs"].values():
        assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))
        assert found["decode"]["median"] > 0 and found["decode"]["repeats"] == 3
        assert found["training_tokens_per_second"] > 0
    page = (runs / "page.html").read_text(encoding="utf-8")
    assert record["verdict"] in page and "http" not in page and page.count("<tr>") == 3
    [image] = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(image) == (runs / "p.png").read_bytes()


def test_losses_are_of_the_same_held_out_windows_and_differences_are_paired(runs, data):
    found = compared(runs, "dense", "predict")["runs"]
    stream = dataset.TokenStream(data, "val", 8, 1, 0, sampling="epoch")
    x, y = stream.rows(0, stream.samples)
    assert len({*stream.begins(0, stream.samples).tolist()}) == len(x) > 20        # all there are, each once
    each = {}
    for name in ("dense", "predict"):
        model = build_model(*checkpoint.read(runs / name)).eval()
        with torch.no_grad():
            each[name] = [F.cross_entropy(model(a[None], b[None])[0][0], b).item() for a, b in zip(x, y)]
        assert found[name]["loss"] == pytest.approx(statistics.fmean(each[name]), abs=1e-5)
        assert found[name]["held_out_tokens"] == y.numel()
    paired = mean_interval([a - b for a, b in zip(each["predict"], each["dense"])])
    assert found["predict"]["to_first"]["mean"] == pytest.approx(paired["mean"], abs=1e-5)
    assert found["predict"]["to_first"]["interval"] == pytest.approx(paired["interval"], abs=1e-5)
    assert paired["mean"] != 0


@pytest.mark.skipif(cpu_library()[0] is None, reason="no C kernels here")
@torch.inference_mode()
@pytest.mark.parametrize("kind", ["dense", "predict"])
def test_bytes_and_multiply_adds_are_those_that_the_decode_engine_watched(runs, kind):
    cfg = comparing.Compare(runs=(str(runs / kind),), threads=1, sparse_decode=True)
    [side], _ = comparing.sides_of(cfg, runtime.choose("cpu", "float32", False))
    totals = {}
    for new in (0, 3):                           # the same draws: what 3 tokens more add is what they cost
        decoder, watch = comparing.Decoder(side, cfg, torch.tensor([[70, 71]]), new), engine.Watch()
        side.model.choose(watch=watch)
        decoder.restart()
        decoder()
        rows = list(watch.rows())
        assert watch.steps == comparing.WARM - 1 + new
        totals[new] = [watch.steps * sum(row[column] for row in rows) for column in (7, 6)]
    side.model.choose(watch=None)
    found = comparing.Decoder(side, cfg, torch.tensor([[70, 71]]), 3).count()
    assert side.found["way"] == "decode engine" and found["weight_bytes"] > 4000
    assert found["macs"] == pytest.approx((totals[3][0] - totals[0][0]) / 3, abs=40)     # ops are rounded
    assert found["weight_bytes"] == pytest.approx((totals[3][1] - totals[0][1]) / 3, abs=40)


def test_shortcuts_that_models_were_trained_for_are_used_where_they_are_asked_for(runs):
    exact = compared(runs, "dense", "predict", temperature=0)["runs"]
    short = compared(runs, "dense", "predict", temperature=0, sparse_decode=True)["runs"]
    assert short["dense"]["loss"] == exact["dense"]["loss"]
    assert short["dense"]["weight_bytes"] == exact["dense"]["weight_bytes"]
    assert short["predict"]["loss"] != exact["predict"]["loss"]
    assert short["predict"]["weight_bytes"] < exact["predict"]["weight_bytes"]


def test_an_exit_threshold_is_of_the_runs_that_have_exits(train):
    train(out="plain", n_layer=2)
    train(out="exits", n_layer=2, exits="1")
    exact = compared(train.folder, "plain", "exits")["runs"]
    early = compared(train.folder, "plain", "exits", exit_threshold=1e-6)["runs"]
    assert early["plain"]["weight_bytes"] == exact["plain"]["weight_bytes"]
    assert early["exits"]["weight_bytes"] < 0.9 * exact["exits"]["weight_bytes"]
    assert early["exits"]["loss"] != exact["exits"]["loss"]


def test_sampling_choices_have_the_names_and_the_defaults_of_sample_py():
    ours, theirs = comparing.Compare.__dataclass_fields__, SampleConfig.__dataclass_fields__
    shared = ours.keys() & theirs.keys() - {"quantize"}
    assert shared >= {"sparse_decode", "exit_threshold", "temperature", "top_k", "top_p", "min_p", "draws",
                      "repetition_penalty", "overflow", "seed", "device", "dtype", "threads"}
    assert [key for key in shared if ours[key].default != theirs[key].default] == []


# ------------------------------------------------ which runs ----------------------------------------------

def test_one_run_has_a_row_and_is_told_what_to_type(runs):
    result = command(runs, "dense", *FAST)
    assert "name another run, or add --quantize=int8" in record_of(result)["verdict"]
    head, rows = table_of(result.out)
    assert [*rows] == ["dense"] and "to the first (95%, paired)" not in head


def test_the_same_run_twice_differs_by_nothing_but_the_noise_of_timing(runs):
    found = compared(runs, "dense", "dense")
    again = found["runs"]["dense (2)"]
    assert again["to_first"]["mean"] == 0 and again["to_first"]["interval"] == [0, 0]
    assert again["weight_bytes"] == found["runs"]["dense"]["weight_bytes"]
    assert "at the same loss, reading 100% of its bytes" in found["verdict"]


def test_names_of_runs_are_shown_as_they_are(runs, tmp_path, capsys):
    strange = "a$_$<b>&{x}, 100%"
    shutil.copytree(runs / "dense", tmp_path / strange)
    found = compared(tmp_path, strange, strange, html=tmp_path / "page.html")
    assert [*found["runs"]] == [strange, f"{strange} (2)"] and strange in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "a$_$&lt;b&gt;&amp;{x}, 100%" in page and "<b>" not in page and "<img" in page


def test_folders_of_the_same_name_and_single_checkpoints_are_told_apart(runs, tmp_path):
    (tmp_path / "a").mkdir()
    shutil.copytree(runs / "dense", tmp_path / "a" / "run")
    shutil.copytree(runs / "predict", tmp_path / "run")
    given = [tmp_path / "a" / "run", tmp_path / "run", tmp_path / "run" / "ckpt.pt", tmp_path / "a" / "run"]
    named = comparing.names([str(path) for path in given])
    assert len(set(named)) == 4 and named[0] == "a/run" and named[2:] == ["run/ckpt.pt", "a/run (2)"]


def test_every_run_is_compared_in_every_kind_of_whole_numbers_too(runs, train):
    train(out="wide", act="relu2", n_embd=64)    # narrow rows are padded in whole numbers
    shutil.copytree(runs / "longer", train.folder / "longer")
    found = compared(train.folder, "wide", "longer", quantize="int8,mlp=4,attn=8,head=8")
    kinds = "", ", int8", ", mlp=4,attn=8,head=8"
    assert [*found["runs"]] == [name + kind for name in ("wide", "longer") for kind in kinds]
    plain, *whole = (found["runs"]["wide" + kind] for kind in kinds)
    assert plain["weight_bytes"] > 3 * whole[0]["weight_bytes"] > 3 * whole[1]["weight_bytes"]
    for one in whole:
        assert one["parameters"] == plain["parameters"] and one["training_tokens_per_second"] is None
        assert one["loss"] == pytest.approx(plain["loss"], abs=0.05) and one["loss"] != plain["loss"]
    [blocks] = [note for note in found["notes"] if "blocks of" in note]
    assert blocks.startswith("wide, longer have blocks of 8, 16: ")


def test_exports_of_every_form_are_runs_and_whole_numbers_are_not_quantised_again(runs, tmp_path):
    def export(name, out, *more):
        argv = [f"--out_dir={runs / name}", f"--export_dir={tmp_path / out}", "--dtype=float32", *more]
        assert Job("training/export.py", argv, tmp_path).wait().status == 0
    export("dense", "int8", "--to=packed", "--quantize=int8")
    export("dense", "tensors", "--to=safetensors")
    shutil.copytree(runs / "dense", tmp_path / "dense")
    found = compared(tmp_path, "dense", "tensors", "int8", quantize="int8")
    assert [*found["runs"]] == ["dense", "dense, int8", "tensors", "tensors, int8", "int8"]
    assert found["runs"]["tensors"]["to_first"]["mean"] == 0
    assert found["runs"]["int8"]["loss"] == pytest.approx(found["runs"]["dense, int8"]["loss"], abs=1e-6)
    assert found["runs"]["int8"]["parameters"] == found["runs"]["dense"]["parameters"]
    assert "int8 holds whole numbers already: it is compared as it is" in found["notes"]


def test_weights_for_transformers_and_packed_ones_are_runs(train, data):
    train(out="gelu", bias=True)
    train(out="pruned", weights="2:4", act="relu2")
    for name, form in (("gelu", "hf"), ("pruned", "packed")):
        argv = [f"--out_dir={train.folder / name}", f"--to={form}", "--dtype=float32"]
        assert Job("training/export.py", argv, train.folder).wait().status == 0
    found = compared(train.folder, "gelu", "gelu-hf", "pruned", "pruned-packed")["runs"]
    assert found["gelu-hf"]["to_first"]["mean"] == pytest.approx(0, abs=1e-5)
    assert found["pruned-packed"]["loss"] == pytest.approx(found["pruned"]["loss"], abs=1e-5)
    assert found["pruned-packed"]["parameters"] == found["pruned"]["parameters"]
    assert found["pruned-packed"]["macs"] < found["gelu"]["macs"]


def test_ten_runs_are_all_in_the_table_the_page_and_the_record(runs, tmp_path, capsys):
    names = [f"run-{n}" for n in range(10)]
    for n, name in enumerate(names):
        shutil.copytree(runs / [*KINDS][n % 2], tmp_path / name)
    found = compared(tmp_path, *names, html=tmp_path / "page.html")
    assert [*found["runs"]] == names and found["verdict"].startswith("Of 10, ")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert [*table_of(capsys.readouterr().out)[1]] == names
    assert all(f"<td>{name}</td>" in page for name in names)


# ------------------------------------------------ how a run decodes ---------------------------------------

def test_a_run_stands_beside_itself_under_settings_of_sample_py(runs):
    given = "dense", "dense@int8", "dense@mlp_screen=4", "dense@mlp_screen=4+int8", "predict@sparse_decode"
    record = compared(runs, *given)
    assert [*record["runs"]] == [*given] and record["verdict"].startswith("Of 5, ")
    found, exact = record["runs"], compared(runs, "predict")["runs"]["predict"]
    assert "decodes_with" not in found["dense"] and found["dense"]["training_tokens_per_second"] > 0
    assert [found[name].get("decodes_with") for name in given[1:]] == [name.partition("@")[2]
                                                                      for name in given[1:]]
    assert [found[name]["training_tokens_per_second"] for name in given[1:4]] == [None] * 3
    assert found["predict@sparse_decode"]["training_tokens_per_second"] > 0      # its run has no other row
    assert found["predict@sparse_decode"]["loss"] != exact["loss"]
    assert found["predict@sparse_decode"]["weight_bytes"] < exact["weight_bytes"]
    assert found["dense@int8"]["weight_bytes"] != found["dense"]["weight_bytes"]     # narrow rows are padded
    assert len({found[name]["loss"] for name in given}) == 5


def test_a_setting_is_the_model_that_sample_py_decodes(runs):
    """Loss: that of --val=True; whole numbers: those of compare's own --quantize."""
    said = Job("sample.py", [f"--out_dir={runs / 'dense'}", "--mlp_topk=0.25", "--val=True", "--device=cpu",
                             "--dtype=float32", "--num_samples=1", "--max_new_tokens=1"], runs).wait().err
    given = "dense", "dense@mlp_topk=0.25", "dense@int4"
    found = compared(runs, *given, quantize="int4", tokens=10**6)["runs"]
    losses = re.search(r"validation loss ([\d.]+) nats, untrained .*? ([\d.]+) \(", said)
    own, under = map(float, losses.groups())
    assert found["dense"]["loss"] == pytest.approx(own, abs=1e-3) and own != under
    assert found["dense@mlp_topk=0.25"]["loss"] == pytest.approx(under, abs=1e-3)
    assert found["dense@int4"]["loss"] == found["dense, int4"]["loss"]
    assert found["dense@int4"]["weight_bytes"] == found["dense, int4"]["weight_bytes"]


def test_whole_numbers_of_every_run_go_on_top_of_its_setting(runs):
    found = compared(runs, "dense", "dense@mlp_screen=4", "dense@int8", quantize="int8")
    assert [*found["runs"]] == ["dense", "dense, int8", "dense@mlp_screen=4", "dense@mlp_screen=4, int8",
                                "dense@int8"]
    assert "dense@int8 holds whole numbers already: it is compared as it is" in found["notes"]
    both = compared(runs, "dense@mlp_screen=4+int8")["runs"]["dense@mlp_screen=4+int8"]
    assert found["runs"]["dense@mlp_screen=4, int8"]["loss"] == both["loss"]
    assert found["runs"]["dense@mlp_screen=4, int8"]["weight_bytes"] == both["weight_bytes"]


def test_two_of_four_weights_and_windows_are_settings_too(train):
    train(out="wide", act="relu2", n_embd=64, block_size=32, n_layer=2)
    given = "wide", "wide@weights=2:4", "wide@window=8", "wide@window=8+window_pattern=SL"
    found = compared(train.folder, *given)["runs"]
    assert len({found[name]["loss"] for name in given}) == 4
    assert found["wide@weights=2:4"]["macs"] < found["wide"]["macs"]


def test_a_folder_with_an_at_sign_is_a_run(runs, tmp_path):
    shutil.copytree(runs / "dense", tmp_path / "me@int8")
    found = compared(tmp_path, "me@int8", "me@int8@int8", "me@int8@int8")["runs"]
    assert [*found] == ["me@int8", "me@int8@int8", "me@int8@int8 (2)"]
    assert "decodes_with" not in found["me@int8"] and found["me@int8@int8"]["decodes_with"] == "int8"


def test_settings_are_in_the_table_the_page_and_a_record_without_folders(runs, tmp_path):
    given = [str(runs / "dense"), f"{runs / 'dense'}@int8"]
    result = command(tmp_path, *given, *FAST, "--html=page.html", "--out=r.json")
    record = record_of(result)
    assert [*table_of(result.out)[1]] == ["dense", "dense@int8"] == record["config"]["runs"]
    assert record["verdict"].startswith("dense@int8 decodes ")
    assert "<td>dense@int8</td>" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert str(runs) not in json.dumps(record)


@pytest.mark.parametrize("setting, parts", [
    ("int9", ["dense@int9'", "did you mean 'int8'?", "RUN@int8"]),
    ("mpl_screen=4", ["did you mean 'mlp_screen'?"]),
    ("mlp_screen", ["dense@mlp_screen'", "needs a value"]),
    ("mlp_screen=x", ["mlp_screen='x' is str, expected int"]),
    ("mlp_screen=5", ["mlp_screen=5 must be 2, 3, 4 or 8"]),
    ("mlp_live=0.1", ["mlp_live has no effect without mlp_screen"]),
    ("int8+int4", ["two kinds of whole numbers, int8 and int4"]),
    ("window=4+window=2", ["names window twice"]),
    ("mlp=5", ["quantize='mlp=5'"]),
    ("q8_0", ["save nothing: type int8"]),
    ("sparse_decode", ["trained for no shortcut"]),
    ("", ["dense@'", "behind it"]),
    ("int8+", ["'' is no setting"]),
])
def test_settings_that_no_run_takes_are_one_sentence(runs, setting, parts, capsys):
    with pytest.raises(ConfigError) as error:
        compared(runs, f"dense@{setting}")
    assert all(part in str(error.value) for part in parts), error.value
    assert "\n" not in str(error.value) and "round" not in capsys.readouterr().err


def test_a_run_of_another_activation_or_of_whole_numbers_refuses_what_it_cannot_do(runs, train, tmp_path):
    train(out="gelu")
    with pytest.raises(ConfigError, match=r"gelu@mlp_screen=4.*act='relu2' or.*this run has act='gelu'"):
        compared(train.folder, "gelu@mlp_screen=4")
    argv = [f"--out_dir={runs / 'dense'}", f"--export_dir={tmp_path / 'q'}", "--to=packed", "--quantize=int8"]
    assert Job("training/export.py", argv, tmp_path).wait().status == 0
    for setting in ("int8", "attn_topk=0.5"):
        with pytest.raises(ConfigError, match="holds quantised weights"):
            compared(tmp_path, f"q@{setting}")
    with pytest.raises(ConfigError, match="gon' is neither a run's folder"):
        compared(tmp_path, "gon@int8")


# ------------------------------------------------ texts that do not compare -------------------------------

def test_runs_of_other_blocks_are_judged_on_windows_of_the_shortest(runs):
    found = compared(runs, "longer", "dense")
    assert [one["block"] for one in found["runs"].values()] == [8, 8]
    [said] = [note for note in found["notes"] if "blocks of 8, 16" in note]
    assert "windows of the shortest, 8" in said
    assert "to_first" in found["runs"]["dense"] and found["prompt"] + found["new"] <= 8
    assert compared(runs, "longer")["runs"]["longer"]["block"] == 16


def test_a_run_without_its_data_has_no_loss_and_is_timed(runs):
    found = compared(runs, "dense", "no-data.pt")
    other = found["runs"]["no-data.pt"]
    assert "loss" not in other and other["decode"]["median"] > 0 and other["weight_bytes"] > 0
    assert "(their losses do not compare)" in found["verdict"]
    [said] = found["notes"]
    assert said.startswith("no-data.pt: no loss: ") and "--dataset=FOLDER" in said


def test_data_that_have_moved_are_named(runs, data):
    found = compared(runs, "dense", "no-data.pt", dataset=data)
    assert found["runs"]["no-data.pt"]["to_first"]["mean"] == 0 and found["notes"] == []


def test_where_no_run_has_data_all_are_timed_and_no_picture_is_drawn(runs, tmp_path):
    found = compared(runs, "no-data.pt", "no-data.pt", html=tmp_path / "page.html")
    assert "no picture: it needs losses that compare" in found["notes"]
    assert "<img" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_losses_of_other_data_do_not_compare_and_one_sentence_says_so(runs):
    found = compared(runs, "dense", "on-other")
    assert found["runs"]["on-other"]["loss"] > 0 and "to_first" not in found["runs"]["on-other"]
    [said] = found["notes"]
    assert "neither losses nor bits a byte compare" in said and "on-other" in said
    assert "do not compare" in found["verdict"] and "bits_to_first" not in found["runs"]["on-other"]


def test_the_same_text_in_other_tokens_compares_in_bits_a_byte_alone(runs):
    found = compared(runs, "dense", "on-chars")
    other, first = found["runs"]["on-chars"], found["runs"]["dense"]
    assert "to_first" not in other
    apart = other["bits_to_first"]
    assert apart["mean"] == pytest.approx(other["bits_per_byte"] - first["bits_per_byte"])
    assert apart["interval"][0] < apart["mean"] < apart["interval"][1]
    [said] = found["notes"]
    assert "the same held-out text" in said and "bits a byte do" in said
    assert "bits a byte" in found["verdict"]


def test_bits_are_of_the_bytes_that_tokens_stand_for(tmp_path):
    chars = CharTokenizer(sorted("a\u00e9\uac00"))
    dataset.write_dataset(tmp_path, {"train": [[0]], "val": [[0, 1, 2]]}, chars, "test")
    assert texts.bytes_of(torch.tensor([chars.encode("a\u00e9\uac00a")]), tmp_path) == 1 + 2 + 3 + 1
    (tmp_path / "meta.json").write_text('{"vocab_size": 3}')
    assert texts.bytes_of(torch.tensor([[0, 1]]), tmp_path) is None


def test_one_text_for_all_is_refused_to_runs_of_another_tokenizer(runs, data):
    found = compared(runs, "dense", "on-chars", dataset=data)
    [said] = found["notes"]
    assert said.startswith("on-chars: no loss: ") and "different tokenizers" in said
    assert "loss" in found["runs"]["dense"] and "loss" not in found["runs"]["on-chars"]


# ------------------------------------------------ what is refused ------------------------------------------

@pytest.mark.parametrize("argv, parts", [
    ([], ["no run is named", "bench.py compare out-pylib"]),
    (["dens"], ["'dens'", "did you mean 'dense'?"]),
    (["dense", "gone/away"], ["'gone/away'", "neither a run's folder nor a checkpoint"]),
    (["dense", "empty"], ["empty holds no ckpt.pt"]),
    (["dense", "--quantize=int3"], ["quantize='int3'"]),
    (["dense", "--html=no/page.html"], ["html='no/page.html'", "does not exist"]),
    (["dense", "--html=empty"], ["html='empty'", "name another file"]),
    (["dense", "--plot=empty"], ["plot='empty'", "name another file"]),
    (["dense", "--exit_threshold=0.5"], ["exit_threshold=0.5", "none of these"]),
    (["dense", "--temperature=-1"], ["temperature=-1"]),
    (["dense", "--overflow=wrap"], ["overflow='wrap'"]),
    (["dense", "--tokens=1"], ["tokens=1"]),
    (["dense", "--dataset=gone"], ["data set 'gone'"]),
    (["dense", "--dataset=empty/"], ["empty", "no train.bin and no val.bin"]),
    (["dense", "--nanogpt=ours"], ["nanogpt='ours'"]),
    (["dense", "--new=-1"], ["new=-1"]),
    (["dense", "--sparse=True"], ["'sparse'", "--help"]),
])
def test_mistakes_are_one_sentence(runs, argv, parts):
    (runs / "empty").mkdir(exist_ok=True)
    one_sentence(command(runs, *argv, "--device=cpu"), "bench.py", *parts)


def test_a_damaged_run_is_named_before_anything_is_measured(runs, tmp_path):
    shutil.copytree(runs / "dense", tmp_path / "torn")
    for path in (tmp_path / "torn").glob("ckpt*.pt"):
        path.write_bytes(path.read_bytes()[:-500])
    result = command(tmp_path, str(runs / "dense"), "torn", *FAST, "--html=page.html")
    one_sentence(result, "bench.py", "torn", "damaged")
    assert not (tmp_path / "page.html").exists() and "round" not in result.err


def test_a_run_whose_weights_are_not_numbers_is_named(runs, tmp_path):
    loaded = checkpoint.read(runs / "dense")[0]
    loaded["model"]["transformer.ln_f.weight"] = loaded["model"]["transformer.ln_f.weight"] * math.nan
    torch.save(loaded, tmp_path / "nan.pt")
    with pytest.raises(ConfigError, match=r"^nan\.pt: the model's logits are not finite"):
        compared(tmp_path, "nan.pt")


@pytest.mark.parametrize("last", ["", "device "])
def test_a_closed_pipe_ends_it_in_silence_before_or_behind_the_page(runs, tmp_path, last):
    page = tmp_path / "page.html"
    job = run_real("bench.py", ["compare", runs / "dense", *FAST, f"--html={page}"], tmp_path)
    while last and not job.stdout.readline().startswith(last):
        pass                                     # what is printed ahead of the measurements
    job.stdout.close()
    said = job.stderr.read()
    assert job.wait(100) == 141, said
    assert "Traceback" not in said and "Broken" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"] * bool(last)
    assert not last or "decodes" in page.read_text(encoding="utf-8")


def test_the_record_names_no_folder_of_the_machine(runs, tmp_path):
    given = [str(runs / "dense"), str(runs / "no-data.pt")]
    record = record_of(command(tmp_path, *given, *FAST, f"--out={tmp_path / 'r.json'}"))
    assert record["config"]["runs"] == ["dense", "no-data.pt"]
    for folder in (runs, tmp_path, ROOT):
        assert str(folder) not in json.dumps(record)


# ------------------------------------------------ the verdict ----------------------------------------------

def side(name, speed, loss=2.0, interval=None, size=100, **found):
    first = {"to_first": {"mean": loss - 2, "interval": interval or [loss - 2.001, loss - 1.999]}}
    return SimpleNamespace(name=name, found={
        "decode": {"median": speed, "quartiles": [speed - 1, speed + 1]}, "weight_bytes": size, "loss": loss,
        "percent": 50 * (loss - 2), **first, **found})


@pytest.mark.parametrize("others, said", [
    ([side("B", 140, 2.016, size=45)],
     "B decodes 1.40x as fast as A at +0.8% loss, reading 45% of its bytes."),
    ([side("B", 101, 1.9)], "B decodes as fast as A at -5.0% loss, reading 100% of its bytes."),
    ([side("B", 50, 2.001, [-1, 1])],
     "B decodes 0.50x as fast as A at +0.05% loss (its 95% interval includes no change), reading 100% of its "
     "bytes."),
    ([side("B", 200, 2.2, size=20), side("C", 80, 1.9)],
     "Of 3, B decodes 2.00x as fast as A at +10.0% loss, reading 20% of its bytes; C has the lowest loss: it "
     "decodes 0.80x as fast as A at -5.0% loss, reading 100% of its bytes."),
    ([side("B", 200, 2.2), side("C", 201, 2.1)],
     "Of 3, C decodes 2.01x as fast as A at +5.0% loss, reading 100% of its bytes; no other loss is below "
     "A's."),
    ([side("B", 50, 2.2), side("C", 60, 2.1)],
     "Of 3, none decodes surely faster than A; no other loss is below A's."),
    ([side("B", 200, 2.1, size=730)], "B decodes 2.00x as fast as A at +5.0% loss, reading 7.3x its bytes."),
    ([side("B", 200, 2.00001)], "B decodes 2.00x as fast as A at the same loss, reading 100% of its bytes."),
])
def test_the_verdict_is_one_plain_sentence(others, said):
    assert verdict.verdict([side("A", 100), *others]) == said


# ------------------------------------------------ the page --------------------------------------------------

def test_the_example_of_the_page_has_the_shape_of_what_is_printed(runs):
    text = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
    [shown] = re.findall(r"^```\n(run .*?)^```", text, re.M | re.S)
    result = command(runs, "dense", "predict", "--sparse_decode=True", *FAST)
    head, _ = table_of(result.out)
    lines = result.out.splitlines()
    [at] = [n for n, line in enumerate(lines) if line.startswith("run ")]

    def shape(line):
        for name, here in (("B", "out-pylib-predict|predict"), ("A", "out-pylib|dense"),
                           ("D", "pylib|data0")):
            line = re.sub(rf"\b({here})\b", name, line)
        line = re.sub(r"^B decodes .*", "B decodes", line)      # its words depend on the figures: see above
        return re.sub(r"\s+", " ", re.sub(r"[+-]?\d[\d,.]*", "0", line))
    assert re.split(r"\s{2,}", shown.splitlines()[0]) == head
    assert [*map(shape, lines[at:-1])] == [*map(shape, shown.strip().splitlines())]
    assert re.search(r"^out-pylib-predict decodes .*as fast as out-pylib at \+[\d.]+% loss, reading \d+% of",
                     shown, re.M)


def test_the_page_and_the_readmes_name_the_command():
    for path in ("docs/compare.md", "README.md", "README.ko.md", "docs/tour.md"):
        assert "bench.py compare" in (ROOT / path).read_text(encoding="utf-8"), path
    assert "compare" in bench.menu()
