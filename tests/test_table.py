"""bench.py table: its statistics, its plan, what it keeps, its frontier, and that broken arms look broken."""
import json
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from arms import ARMS as FLAGS
from arms import build, tokens
from conftest import ROOT, Job, one_sentence

from benchmarks import arms, broken, frontier, judge, measured, report, stats, store, table, work
from benchmarks.record import TWIN
from benchmarks.store import Run
from configurator import ConfigError
from context import Cache

# ------------------------------------------------ statistics ----------------------------------


@pytest.mark.parametrize("freedom, level, t", [          # printed tables of Student's t
    (1, 0.95, 12.7062), (2, 0.95, 4.30265), (4, 0.99, 4.60409), (30, 0.95, 2.04227)])
def test_quantiles_of_students_t_are_those_of_the_tables(freedom, level, t):
    assert stats.quantile(freedom, level) == pytest.approx(t, rel=1e-5)
    assert stats.two_sided(t, freedom) == pytest.approx(1 - level, rel=1e-4)


def test_differences_are_paired_by_seed():
    ours, theirs = {0: 1.1, 1: 2.2, 2: 3.1, 3: 9.0}, {0: 1.0, 1: 2.0, 2: 3.0}
    found = stats.paired(ours, theirs)
    assert found["n"] == 3 and found["mean"] == pytest.approx(0.4 / 3)
    low, high = found["interval"]
    assert low == pytest.approx(0.4 / 3 - 4.30265 * 0.057735 / 3 ** 0.5, rel=1e-4)
    assert found["p"] == pytest.approx(0.0572, abs=1e-4)         # t = 4 with two degrees of freedom
    assert (low > 0) == (found["p"] < 0.05)


def test_one_seed_has_neither_interval_nor_p():
    assert stats.paired({0: 1.0}, {0: 2.0}) == {"mean": -1.0, "interval": None, "n": 1, "p": None}
    assert stats.paired({0: 1.0}, {1: 2.0}) is None
    assert stats.p_of_zero([0.0, 0.0]) == 1.0 and stats.p_of_zero([0.5, 0.5]) == 0.0


# ------------------------------------------------ the frontier --------------------------------

def test_the_frontier_holds_what_no_cheaper_model_beats():
    points = [(4, 1.0), (1, 3.0), (2, 3.5), (2, 2.0), (8, 1.0)]
    assert frontier.frontier(points) == [(1, 3.0), (2, 2.0), (4, 1.0)]


def test_between_two_models_the_frontier_is_straight_over_the_log_of_the_cost():
    edge = [(1.0, 3.0), (4.0, 2.0)]
    assert frontier.loss_at(edge, 2.0) == pytest.approx(2.5)
    assert frontier.cost_at(edge, 2.5) == pytest.approx(2.0)
    assert frontier.loss_at(edge, 100.0) == 2.0 and frontier.loss_at(edge, 0.5) is None
    assert frontier.cost_at(edge, 1.9) is None and frontier.cost_at(edge, 3.5) == 1.0


def losses(*values):
    return dict(enumerate(values))


@pytest.mark.parametrize("arm, cost, pays", [
    (losses(2.2, 2.21, 2.19), 2.0, True),        # the frontier's 2.5, three times over
    (losses(2.45, 2.6, 2.2), 2.0, False),        # better in the mean, not surely
    (losses(2.6, 2.6, 2.61), 2.0, False),
    (losses(2.2, 2.21, 2.19), 0.5, False)])      # no rival is so cheap: there is nothing to compare
def test_an_arm_pays_where_its_whole_interval_lies_beyond_the_frontier(arm, cost, pays):
    found = frontier.beyond({"small": 1.0, "dense": 4.0, "arm": cost},
                            {"small": losses(3.0, 3.01, 2.99), "dense": losses(2.0, 2.01, 1.99), "arm": arm},
                            "arm", ["small", "dense"])
    assert found["pays"] == pays and (found["gain"] is None) == (cost < 1)


def test_cheaper_at_equal_loss_is_a_lower_bound_where_no_dense_model_is_as_good():
    costs, of = {"small": 1.0, "dense": 4.0, "arm": 1.0}, {"small": losses(3.0), "dense": losses(2.0)}
    found = frontier.beyond(costs, of | {"arm": losses(2.5)}, "arm", ["small", "dense"])
    assert found["cheaper"] == pytest.approx(2.0) and not found["at_least"]
    found = frontier.beyond(costs, of | {"arm": losses(1.5)}, "arm", ["small", "dense"])
    assert found["cheaper"] == pytest.approx(4.0) and found["at_least"]


# ------------------------------------------------ the plan ------------------------------------

RUNS = [Run("a", 0), Run("b", 0), Run("a", 0, 1.5)]
COSTS = {"a": (0.1, 5.0), "b": (0.2, 5.0)}


def test_iterations_are_the_most_that_fit_the_time():
    count = store.iterations(100.0, RUNS, COSTS, jobs=2)
    total = sum(store.estimate(run, count, COSTS) for run in RUNS)
    assert count % 10 == 0 and total <= 200 < sum(store.estimate(run, count + 10, COSTS) for run in RUNS)


def test_a_budget_that_holds_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"0.2 minutes.*larger --budget"):
        store.iterations(12.0, RUNS, COSTS, jobs=1)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A store whose runs are not trained but written, and the list of those that were."""
    cfg = SimpleNamespace(config="config/compare_pylib.py", runs=tmp_path / "runs", cache=tmp_path / "cache",
                          jobs=1, budget=1, iters=0)
    monkeypatch.setattr(store, "hash_of_data", lambda data: "data")
    done, found = [], store.open_store(cfg, tmp_path)

    def train(self, run, iters):
        if run.seed == 7:
            raise ConfigError("it broke")
        done.append(run)
        place = self.place(run, iters)
        (self.cache / place).mkdir()
        (self.cache / place / "ckpt.pt").touch()
        (self.records / f"{place}.json").write_text('{"val_loss": 1.0, "seconds": 1.0}')
        return self.read(run, iters)
    monkeypatch.setattr(store.Store, "train", train)
    return found, done


TWO = {TWIN: (0.1, 1.0), "gelu": (0.1, 1.0)}


def test_what_was_trained_is_kept_and_what_is_missing_is_trained_next_time(kept):
    held, done = kept
    runs = [Run(TWIN, 0), Run("gelu", 0), Run(TWIN, 1)]
    soon = time.perf_counter() + 2.0
    found, missing = store.train_all(held, runs, 100, TWO, deadline=soon)
    assert not found and len(missing) == 3 and "type the same command again" in missing[runs[0]]
    found, missing = store.train_all(held, runs[:2], 100, TWO, deadline=soon + 100)
    found, missing = store.train_all(held, runs, 100, TWO, deadline=soon + 100)
    assert list(found) == runs and not missing and done == runs


def test_estimates_follow_what_runs_have_really_taken():
    runs, now = [Run(TWIN, seed) for seed in range(3)], time.perf_counter()
    clock = store.Clock(runs, 100, TWO, deadline=now + 30, jobs=2)         # each is thought to take 11 s
    assert clock.allows(runs[0]) and clock.pace() == 1
    assert clock.end(runs[0], 44.0) == pytest.approx(2 * 44 / 2 / 60)
    assert clock.pace() == 4 and not clock.allows(runs[1])


def test_a_first_seed_without_its_checkpoint_is_trained_again(kept):
    held, done = kept
    for _ in range(2):
        store.train_all(held, [Run(TWIN, 0), Run(TWIN, 1)], 100, TWO, deadline=time.perf_counter() + 1e3)
        (held.cache / held.place(Run(TWIN, 0), 100) / "ckpt.pt").unlink()
        (held.cache / held.place(Run(TWIN, 0), 100)).rmdir()
    assert done == [Run(TWIN, 0), Run(TWIN, 1), Run(TWIN, 0)]


def test_an_arm_that_fails_does_not_take_the_others_with_it(kept):
    held, done = kept
    runs = [Run("gelu", 7), Run(TWIN, 0)]
    found, missing = store.train_all(held, runs, 100, TWO, time.perf_counter() + 1e3)
    assert missing == {Run("gelu", 7): "it broke"} and list(found) == [Run(TWIN, 0)]


def test_a_run_is_found_again_by_all_that_it_was_trained_with(kept, monkeypatch):
    held, _ = kept
    places = {held.place(Run(arm, seed, share), iters) for arm in (TWIN, "gelu", "topk", "slow")
              for seed in (0, 1) for share in (1, 1.5) for iters in (10, 20)}
    assert len(places) == 32 and held.place(Run(TWIN, 0), 10) in places
    for changed in ({"CODE": ("model.py",)}, {"hash_of_data": lambda data: "other"}):
        with monkeypatch.context() as patch:
            for name, value in changed.items():
                patch.setattr(store, name, value)
            assert store.open_store(held.cfg, held.data).place(Run(TWIN, 0), 10) not in places
    assert store.open_store(held.cfg, held.data).place(Run(TWIN, 0), 10) in places


def test_the_plan_of_a_command_is_made_once(kept, monkeypatch):
    held, _ = kept
    asked = []
    monkeypatch.setattr(store, "measure_costs", lambda store, arms, jobs: asked.append(arms) or TWO)
    runs = [Run(TWIN, 0), Run("gelu", 0), Run(TWIN, 0, 1.5)]
    first = store.plan(held, runs, 100.0)
    assert store.plan(held, runs, 100.0) == first == (store.iterations(90, runs, TWO, 1), TWO)
    assert asked == [[TWIN, "gelu"]]


def test_every_seed_of_all_arms_comes_before_the_next_and_the_twin_is_never_left_out():
    runs = table.runs_of(table.Table(arms="gelu,broken", seeds=2))
    assert [run.name for run in runs[:4]] == [TWIN, "gelu", "leaky", "slow"]
    assert [run.share for run in runs[4:6]] == list(table.LONGER)
    assert [run.seed for run in runs] == [0] * 6 + [1] * 6
    chosen = {run.arm for run in table.runs_of(table.Table())}
    assert chosen == set(arms.ARMS) - set(arms.OTHERS) and len(set(arms.DENSE) & chosen) >= 5


# ------------------------------------------------ what is counted -----------------------------

@pytest.mark.parametrize("name", ["gpt2", "predict", "hierarchy", "window", "exits", "ponder", "two_of_four"])
def test_a_sound_model_does_not_see_the_future(name):
    model = build(FLAGS[name], std=0.2).use_policy()
    assert not judge.sees_the_future(model, tokens(1, 16))


def test_the_leaky_arm_sees_the_future():
    assert judge.sees_the_future(broken.leak(build({}, std=0.2)), tokens(1, 16))


def test_the_slow_arm_says_the_same_and_reads_all_weights():
    flags, prompt = dict(act="relu2", mlp_topk=0.25, n_embd=32), tokens(1, 4)
    sparse, slow = build(flags, std=0.2), broken.mask(build(flags, std=0.2))
    torch.testing.assert_close(sparse(prompt)[0], slow(prompt)[0])
    dense = work.work(build(dict(act="gelu", n_embd=32), std=0.2), prompt, 4)
    assert work.work(slow, prompt, 4) == dense
    assert work.work(sparse, prompt, 4)["weight_bytes"] < dense["weight_bytes"]


def test_work_is_that_of_a_token_and_held_bytes_are_weights_once_and_the_cache():
    model = build({})
    matrices = sum(p.numel() for name, p in model.named_parameters()
                   if p.dim() == 2 and "wpe" not in name)                  # the token table is the head
    assert work.work(model, tokens(1, 4), 4) == {"macs": matrices, "weight_bytes": 4 * matrices}
    held = work.held_bytes(model, 16)
    assert held == {"weights": 4 * model.get_num_params(False), "cache": Cache(model, 1, 16).nbytes()}


@pytest.mark.parametrize("left, rounds", [(-5.0, measured.FEWEST), (80.0, 10), (1e6, 25)])
def test_timed_rounds_fill_their_share_of_the_time_that_is_left(monkeypatch, left, rounds):
    now = [100.0]
    monkeypatch.setattr(measured.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(measured, "interleave", lambda sides, n, warm_up: {name: [2.0] * n for name in sides})

    def wait():
        now[0] += 2.0
    sides = {name: SimpleNamespace(run=wait, tokens=8) for name in "ab"}
    found = measured.rates_of(sides, 0.5, 104.0 + left, most=25)
    assert found == {"a": [4.0] * rounds, "b": [4.0] * rounds}


# ------------------------------------------------ the report ----------------------------------

def row(arm, values, step, kind="arm", share=1.0, leaks=False, byte=4e6):
    of = losses(*values)
    speed = {"median": 1 / step, "quartiles": [0.99 / step, 1.01 / step], "min": 1, "max": 1, "repeats": 3}
    keys = ("training step", "decode, batch 1", "decode, batch 8")
    return {"arm": arm, "share": share, "kind": kind, "losses": of, "val_loss": stats.mean_interval(values),
            "to_twin": None, "sees_the_future": leaks, "parameters": 10, "counters": {"zeros": 0.5},
            "bits_per_byte": 2.0, "speed": dict.fromkeys(keys, speed), "train_seconds": 100 * step * share,
            "macs": 1e6, "weight_bytes": byte, "held": {"weights": 1, "cache": 1}, "joules": None}


@pytest.fixture
def result():
    """What `table` would have found of two dense models, a good arm, a bad one and the broken ones."""
    rows = {TWIN: row(TWIN, (2.0, 2.01, 1.99), 4.0, "dense"),
            "small": row("small", (3.0, 3.01, 2.99), 1.0, "dense", byte=1e6),
            "dense, 1.6x the tokens": row(TWIN, (1.9, 1.91, 1.89), 4.0, "dense", 1.6),
            "good": row("good", (2.05, 2.06, 2.04), 2.0, byte=2e6), "bad": row("bad", (2.9, 2.91, 2.89), 3.0),
            "leaky": row("leaky", (0.1, 0.1, 0.1), 4.0, "broken", leaks=True),
            "slow": row("slow", (2.0, 2.01, 1.99), 5.0, "broken")}
    for name, found in rows.items():
        found["to_twin"] = stats.paired(found["losses"], rows[TWIN]["losses"]) if name != TWIN else None
    return {"rows": rows, "axes": table.axes_of(rows), "iterations": 10, "tokens": 12800, "seeds": [1, 2, 3],
            "place": "cpu", "energy": "none", "missing": {"x, seed 1": "no time was left"}}


def test_the_table_says_which_arms_pay_and_hides_no_loser(result):
    said = {cells[0]: cells for cells in report.main_rows(result)}
    assert list(said) == list(result["rows"])
    assert said["good"][-1].startswith("decode time +0.4500 (") and "decode bytes" in said["good"][-1]
    assert said["bad"][-1] == "no" and "rival" in said[TWIN][-1]
    assert "Missing: x, seed 1: no time was left" in report.markdown(result)


def test_broken_arms_are_shown_as_such(result):
    said = {cells[0]: cells for cells in report.main_rows(result)}
    assert said["leaky"][-2] == "yes" and said["leaky"][-1].startswith("no: it sees the future")
    assert said["slow"][-2] == "no" and said["slow"][-1] == "no; decodes slower than dense"
    assert "leaky" not in {cells[0] for cells in report.frontier_rows(result)}


def test_the_aim_is_answered_with_the_best_arm_and_the_factor(result):
    assert "good with 1.87x in decode time" in report.aim(result)


def test_at_equal_time_the_rival_is_the_twin_trained_as_long(result):
    equal = result["axes"]["equal time"]["to_frontier"]
    assert equal["good"]["gain"] is None                           # no run of the twin is so short
    assert equal["slow"]["gain"]["mean"] < -0.01                   # the twin learns more in that time


def test_the_report_is_one_file_that_needs_no_network(result, tmp_path):
    report.write(tmp_path / "t.json", result, {"cpu": "<x>"})
    page = (tmp_path / "t.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)', page)
    assert len(sources) == 4 and all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert not re.search(r"https?://|@import|<script", page) and "&lt;x&gt;" in page
    assert all(f"<td>{name}</td>" in page for name in result["rows"])
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".html", ".png"}


def test_gpt2s_shape_is_told_apart_from_the_trained_scale(tmp_path):
    side = {"median": 50.0}
    record = {"measurements": {"decode": {"sides": {"nanoGPT": {"median": 2.0}, "ours": side,
                                                    "efficient": {"median": 75.0}}}},
              "work": {"efficient": {"ceiling": 1.8}}}
    (tmp_path / "r.json").write_text(json.dumps(record))
    assert report.shape_rows(tmp_path / "r.json")[2] == ["efficient", "75.0", "1.50x", "1.80x", "37.5x"]
    assert report.shape_rows(tmp_path / "none.json") == []


# ------------------------------------------------ the command ---------------------------------

@pytest.mark.parametrize("words, parts", [
    (["--budget=0"], ["budget=0", "--budget=55"]), (["--seeds=0"], ["seeds=0", "--seeds=3"]),
    (["--arms=dense,no"], ["'no'", "broken"]), (["--out=t.txt"], ["t.txt", ".json"]),
    (["--jobs=0"], ["jobs=0"])])
def test_bad_keys_say_what_to_type(tmp_path, words, parts):
    one_sentence(Job("bench.py", ["table", *words], tmp_path).wait(), "bench.py", *parts)


TINY = """n_layer = 2
n_head = 2
n_embd = 32
block_size = 64
batch_size = 4
gradient_accumulation_steps = 1
warmup_iters = 0
learning_rate = 1e-2
decay_lr = False
"""


@pytest.mark.slow
def test_a_whole_table_is_made_and_made_again_from_what_is_kept(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)
    words = [sys.executable, str(ROOT / "bench.py"), "table", "--iters=60", "--seeds=2", "--budget=30",
             "--arms=dense,topk,broken", "--out=t.json", "--repeats=3", f"--config={tmp_path / 'tiny.py'}"]

    def made():
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "t.json").read_text()), done.stdout
    record, said = made()
    leaky, twin = record["rows"]["leaky"], record["rows"][TWIN]
    assert leaky["sees_the_future"] and not record["rows"]["topk"]["sees_the_future"]
    assert record["rows"]["slow"]["macs"] == twin["macs"] > record["rows"]["topk"]["macs"]
    assert "no: it sees the future" in said and not record["missing"] and (tmp_path / "t.html").is_file()
    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "results" / "runs").iterdir()}
    assert len(runs) == 1 + 2 * (4 + len(table.LONGER))                    # the plan, and the runs
    again, _ = made()
    assert runs == {path: path.stat().st_mtime_ns for path in runs}
    assert [row["losses"] for row in again["rows"].values()] == [row["losses"]
                                                                 for row in record["rows"].values()]
