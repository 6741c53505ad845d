"""bench.py table: its statistics, its plan, what it keeps, its frontier, and that broken arms look broken."""
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from arms import ARMS as FLAGS
from arms import build, tokens
from conftest import ONE_THREAD, ROOT, TEXT, Job, one_sentence

import bench
from benchmarks import arms, broken, frontier, judge, measured, report, stats, store, table, work
from benchmarks.record import TWIN
from benchmarks.store import Run
from configurator import ConfigError
from data.dataset import write_text
from decode import calibrate
from decode.context import Cache
from training.checkpoint import entries

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


def test_holms_correction_multiplies_the_smallest_p_by_all_tests_and_never_falls():
    found = stats.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.9})
    assert found == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.9})
    assert stats.holm({"a": 0.6, "b": 0.6}) == {"a": 1.0, "b": 1.0} and stats.holm({}) == {}


def test_a_p_is_read_back_from_its_interval():
    values = [0.1, 0.2, 0.05, 0.3]
    assert stats.p_of(stats.mean_interval(values)) == pytest.approx(stats.p_of_zero(values), rel=1e-6)
    assert stats.p_of(stats.mean_interval([0.1])) is None and stats.p_of(None) is None


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


def beyond_with(noise, seeds=1.0, rounds=25):
    """The gain of an arm whose costs scatter by the factor exp(+-noise) from round to round."""
    def timed(cost, turn):
        return [cost * math.exp(noise * ((7 * i + turn) % 5 - 2)) for i in range(rounds)]
    of = {"small": losses(3.0, 3 + 0.01 * seeds, 3 - 0.01 * seeds), "dense": losses(2.0, 2.0, 2.0),
          "arm": losses(2.45, 2.45 + 0.02 * seeds, 2.45 - 0.02 * seeds)}
    costs = {"small": timed(1.0, 0), "dense": timed(4.0, 1), "arm": timed(2.0, 3)}
    return frontier.beyond(costs, of, "arm", ["small", "dense"])


def width(found):
    low, high = found["gain"]["interval"]
    return high - low


def test_intervals_of_a_timed_cost_hold_the_timings_noise_too():
    still, shaken = beyond_with(0.0), beyond_with(0.3)
    plain = frontier.beyond({"small": 1.0, "dense": 4.0, "arm": 2.0},
                            {"small": losses(3.0, 3.01, 2.99), "dense": losses(2.0, 2.0, 2.0),
                             "arm": losses(2.45, 2.47, 2.43)}, "arm", ["small", "dense"])
    assert width(still) == pytest.approx(width(plain), rel=0.1), "without noise it is Student's interval"
    assert width(shaken) > 1.5 * width(still) and shaken["gain"]["rounds"] == 25
    assert still["pays"] and not shaken["pays"] and shaken["gain"]["p"] > 0.05 > still["gain"]["p"]


def test_equal_seeds_leave_the_timings_noise_and_it_is_the_same_every_time():
    assert width(beyond_with(0.3, seeds=0.0)) > 0.01 and width(beyond_with(0.0, seeds=0.0)) < 1e-9
    assert beyond_with(0.3) == beyond_with(0.3)


@pytest.mark.parametrize("rounds", [1, 2])
def test_few_rounds_still_give_an_interval(rounds):
    assert beyond_with(0.3, rounds=rounds)["gain"]["rounds"] == rounds


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
    with pytest.raises(ConfigError, match=r"0.2 minutes.*--budget=\d+ or more"):
        store.iterations(12.0, RUNS, COSTS, jobs=1)


@pytest.mark.parametrize("spent", [0.0, 90.0])
@pytest.mark.parametrize("costs", [COSTS, {"a": (9.0, 500.0), "b": (20.0, 5.0)}])
def test_the_budget_that_a_refused_plan_names_is_the_least_that_is_taken(costs, spent):
    def left(minutes):
        return store.SAFE * (60 * minutes - store.timing_of(60 * minutes) - spent)
    with pytest.raises(ConfigError) as refused:
        store.iterations(left(0.1), RUNS, costs, 2, spent)
    named = int(re.search(r"--budget=(\d+)", str(refused.value))[1])
    assert store.iterations(left(named), RUNS, costs, 2, spent) >= store.LEAST
    if named > 1:
        with pytest.raises(ConfigError):
            store.iterations(left(named - 1), RUNS, costs, 2, spent)


def test_iterations_that_do_not_fit_name_the_budget_that_would(capsys):
    cfg = SimpleNamespace(jobs=1, budget=1.0)
    for iters, fits in ((10, True), (1000, False)):
        table.tell_plan(cfg, RUNS, iters, COSTS, 60.0, store.timing_of(60.0))
        said = capsys.readouterr().out
        assert ("does not fit --budget=1" in said) == (not fits)
    total = sum(store.estimate(run, 1000, COSTS) for run in RUNS)
    minutes = int(re.search(r"it takes --budget=(\d+)", said)[1])
    assert 60 * minutes - store.timing_of(60 * minutes) >= total


def test_published_runs_are_read_and_never_written(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "PUBLISHED", tmp_path / "published")
    found, done = kept
    (tmp_path / "published").mkdir()
    run = Run("dense", 1)
    name = found.place(run, 40) + ".json"
    (tmp_path / "published" / name).write_text('{"val_loss": 1.5}')
    assert found.read(run, 40) == {"val_loss": 1.5} and not (tmp_path / "runs" / name).exists()


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

QUEUE = """
import sys
from pathlib import Path
from types import SimpleNamespace
from benchmarks import store
store.EVERY = 20
cfg = SimpleNamespace(config=sys.argv[1], threads=1, runs=sys.argv[2], cache=sys.argv[3])
held = store.open_store(cfg, Path(sys.argv[4]))
print(held.train(store.Run("topk", 0), 400)["seconds"])
"""
TINY_RUNS = "n_layer = 1\nn_head = 2\nn_embd = 32\nblock_size = 16\nbatch_size = 4\ndropout = 0.1\n"


@pytest.fixture
def queue(tmp_path):
    """-> a function that starts the queue of one tiny run of 400 iterations, saved every 20, in a folder."""
    recipe, data = tmp_path / "tiny.py", tmp_path / "data"
    recipe.write_text(TINY_RUNS)
    (tmp_path / "text").write_text(TEXT)
    write_text(data, tmp_path / "text", "byte", 0.1)
    config = f"config/compare_pylib.py,{recipe}"
    (tmp_path / "train_one.py").write_text(QUEUE)

    def start(folder):
        words = config, tmp_path / folder / "runs", tmp_path / folder / "cache", data
        return subprocess.Popen([sys.executable, tmp_path / "train_one.py", *words], text=True,
                                env=os.environ | ONE_THREAD, start_new_session=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return start


def saved_iteration(folder):
    """The last iteration that the run of a queue's folder has saved, 0 before."""
    saved = [entries(path) for path in folder.glob("cache/*.tmp/run")]
    return max((entry["iter_num"] for found in saved for entry in found or ()), default=0)


def finished(folder):
    """What a queue has left of its run: the record without its times and place, and the weights."""
    [path], [weights] = folder.glob("runs/*.json"), folder.glob("cache/*/ckpt.pt")
    record = json.loads(path.read_text())
    assert record.pop("seconds") > 0 and record.pop("step_ms") > 0
    assert record.pop("trained_on").keys() == {"cpu", "isa", "commit"}
    return record, torch.load(weights, weights_only=True)


@pytest.mark.skipif(os.name == "nt", reason="needs killpg")
def test_a_queue_that_was_killed_inside_a_run_goes_on_there_to_the_same_bits(queue, tmp_path):
    whole, killed = queue("whole"), queue("killed")
    while not saved_iteration(tmp_path / "killed"):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGSTOP)
    at, second = saved_iteration(tmp_path / "killed"), queue("killed").communicate()
    assert 20 <= at < 400
    assert "trains there: stop it first, or type --cache=ANOTHER_FOLDER" in second[1]
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert whole.communicate()[1] == "" and whole.returncode == 0
    again = queue("killed")
    assert again.communicate()[1].count("\n") <= 1 and again.returncode == 0     # the lock's note alone
    (one, weights), (other, same) = (finished(tmp_path / name) for name in ("whole", "killed"))
    assert one == other and one["iters"] == 400
    assert weights["model"].keys() == same["model"].keys()
    assert all(torch.equal(weights["model"][name], same["model"][name]) for name in same["model"])
    log = next((tmp_path / "killed").glob("cache/*/metrics.jsonl")).read_text().splitlines()
    assert [json.loads(line)["iter"] for line in log] == list(range(401))
    assert not list((tmp_path / "killed" / "cache").glob("*.tmp"))


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


def test_a_run_is_found_again_by_all_that_it_was_trained_with(kept):
    held, _ = kept
    keys = {held.key(Run(arm, seed, share), iters) for arm in (TWIN, "gelu", "topk", "slow")
            for seed in (0, 1) for share in (1, 1.7) for iters in (30, 40)}
    assert len(keys) == 32 and held.key(Run(TWIN, 0), 30) in keys
    assert store.open_store(held.cfg, held.data).key(Run(TWIN, 0), 30) in keys


@pytest.fixture
def trained_once(kept):
    """-> a function that says which arms' runs are found again, all of them, by a store made now."""
    held, done = kept
    runs = [Run(arm, seed) for arm in EVERY for seed in (0, 1)]
    store.train_all(held, runs, 100, dict.fromkeys(EVERY, (0.01, 0.01)), time.perf_counter() + 1e3)
    assert len(done) == len(runs)

    def found(iters=100, **changes):
        now = store.open_store(SimpleNamespace(**vars(held.cfg) | changes), held.data)
        kept_ = [run for run in runs if now.read(run, iters)]
        return {run.arm for run in kept_ if {run, Run(run.arm, 1 - run.seed)} <= {*kept_}}
    return found


EVERY = {TWIN: 1, "topk": 1, "osc": 1, "osc+window": 1}.keys()


def test_a_source_file_that_moves_or_is_written_anew_keeps_the_runs(trained_once, tmp_path, monkeypatch):
    work = tmp_path / "checkout"
    for name in ("config", "tests", "benchmarks", "training"):
        shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, work)
    (work / "wing").mkdir()
    for name in ("bio_modules.py", "layers.py", "training/energy.py", "training/continual.py"):
        (work / name).rename(work / "wing" / Path(name).name)
    (work / "model.py").write_text("# another comment\n" + (work / "model.py").read_text())
    (work / "config" / "bio_topk.py").rename(work / "config" / "topk.py")
    monkeypatch.setitem(arms.ARMS, "topk", "topk")
    for module in (arms, store):
        monkeypatch.setattr(module, "ROOT", work)
    monkeypatch.setattr(store, "GOLDEN", work / "tests" / "golden.json")
    assert trained_once() == EVERY


def test_another_name_and_a_key_that_decides_nothing_keep_the_runs(trained_once, kept, monkeypatch):
    held, _ = kept
    renamed = dict(mlp_topk=0.1, out_dir="elsewhere", eval_interval=7)
    monkeypatch.setitem(arms.ARMS, "ten percent", renamed)
    assert held.read(Run("ten percent", 0), 100) and held.read(Run("ten percent", 1), 100)
    assert held.checkpoint(Run("ten percent", 0), 100).name.startswith("topk-")


def test_what_changes_a_runs_numbers_does_not_find_it(trained_once, kept, tmp_path, monkeypatch):
    held, _ = kept
    other = tmp_path / "other.py"
    other.write_text((ROOT / "config/compare_pylib.py").read_text() + "muon_learning_rate = 0.03\n")
    assert trained_once() == EVERY
    assert trained_once(iters=101) == set() and trained_once(config=str(other)) == set()
    assert held.read(Run(TWIN, 2), 100) is None
    for module, name, value, found in (
            (store.torch, "__version__", "9.9.9", set()),
            (store, "hash_of_data", lambda data: "other", set()),
            (store.torch, "__version__", torch.__version__.partition("+")[0] + "+other.build", EVERY)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert trained_once() == found
    monkeypatch.setitem(arms.ARMS, "topk", ("bio_topk", dict(mlp_topk=0.2)))
    assert trained_once() == EVERY - {"topk"}


@pytest.mark.parametrize("curve, lost", [
    ("osc", {"osc", "osc+window"}), ("topk", {"topk"}), ("window", {"osc+window"}), ("relu2", {TWIN, "topk"}),
    ("gpt2", EVERY), ("training", EVERY), ("swiglu", set()), ("leaky", set()), ("hierarchy", set())])
def test_a_golden_curve_that_moves_loses_the_runs_that_are_made_of_it(trained_once, tmp_path, monkeypatch,
                                                                      curve, lost):
    golden = json.loads(store.GOLDEN.read_text())
    part = next(part for part in ("curves", "runs") if curve in golden[part])
    golden[part][curve][-1] += 1e-6
    (tmp_path / "golden.json").write_text(json.dumps(golden))
    monkeypatch.setattr(store, "GOLDEN", tmp_path / "golden.json")
    assert trained_once() == EVERY - lost


def test_an_arm_without_a_golden_curve_is_refused(trained_once, tmp_path, monkeypatch):
    golden = json.loads(store.GOLDEN.read_text())
    del golden["curves"]["topk"]
    (tmp_path / "golden.json").write_text(json.dumps(golden))
    monkeypatch.setattr(store, "GOLDEN", tmp_path / "golden.json")
    with pytest.raises(ConfigError, match=r"golden.json has no curve of .*topk.*test_golden.py"):
        trained_once()


def test_data_are_known_by_their_content_wherever_they_lie(tmp_path):
    def folder(name, content, vocabulary=256):
        (tmp_path / name).mkdir()
        meta = {"vocab_size": vocabulary, "tokenizer": "byte", "dtype": "uint16"}
        (tmp_path / name / "meta.json").write_text(json.dumps(meta))
        for split in ("train", "val"):
            (tmp_path / name / f"{split}.bin").write_bytes(content)
        return store.hash_of_data(tmp_path / name)
    first = folder("a", b"1234")
    assert first == folder("b", b"1234") and first != folder("c", b"1235")
    assert first != folder("d", b"1234", vocabulary=300)


def test_reading_the_golden_arms_leaves_the_threads_as_they_are():
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        store.golden_arms.cache_clear()
        assert store.golden_arms().keys() == FLAGS.keys() and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------ dense twins ---------------------------------

# one model with and without; runs that somebody has trained
ALONE = {"train", "race", "reach", "memory", "kernels", "fertility", "corpus", "compress", "readme",
         "screen", "compare", "sparsify", "launches"}
OF_ARMS = {"table", "quality", "steps"}
RECIPES = ("config/compare_pylib.py", "config/compare_pylib.py,config/longer_context.py",
           "config/train_pylib.py", "config/train_shakespeare_char.py", "config/race_shakespeare_cpu.py")


def compared(command):
    """All comparisons of a subcommand with a dense model, as (flags, the dense model's flags)."""
    keys, _ = bench.load(command)
    if command not in OF_ARMS:
        return importlib.import_module(f"benchmarks.{command}").beside_twins(keys())
    return [pair for recipe in RECIPES for pair in arms.beside_twins(keys(config=recipe))]


@pytest.mark.parametrize("command", sorted(bench.COMMANDS.keys() - ALONE))
def test_what_stands_beside_a_dense_model_differs_from_it_in_its_mechanism_alone(command):
    pairs = compared(command)
    assert pairs and all(flags != twin for flags, twin in pairs)
    if command == "ablate":                      # every choice counts as a mechanism there
        assert {(len(flags), len(twin)) for flags, twin in pairs} == {(1, 0)}
    else:
        assert [(flags, keys) for flags, twin in pairs if (keys := arms.unfair(flags, twin))] == []
    assert [twin for _, twin in pairs if arms.owned(twin)] == [], "a dense twin has no mechanism"


@pytest.mark.parametrize("flags, twin, unequal", [
    (dict(act="relu2", window=8), dict(act="gelu"), {"act"}), (dict(act="relu2", window=8), {}, {"act"}),
    (dict(columns=4, mlp_units=64), {}, set()), (dict(window=8, mlp_units=64), {}, {"mlp_units"}),
    (dict(dendrites=4, n_head=1), dict(n_head=4), set()), (dict(window=8, n_head=1), {}, {"n_head"}),
    (dict(act="osc"), dict(act="relu2"), set()), (dict(exits="2", layer_dropout=0.1), {}, set()),
    (dict(window=8, learning_rate=1.0), {}, {"learning_rate"}),
    (dict(window=8), dict(screen=True), {"screen"})])
def test_an_unfair_comparison_is_seen(flags, twin, unequal):
    assert arms.unfair(flags, twin) == unequal


def test_a_twin_keeps_shape_and_switches_and_loses_the_mechanism():
    flags = dict(act="relu2", n_layer=3, columns=32, mlp_units=480, weights="2:4", anneal=0.5)
    assert arms.twin_of(flags) == dict(act="relu2", n_layer=3)
    assert arms.twin_of(flags, dict(mlp_units=96)) == dict(act="relu2", n_layer=3, mlp_units=96)
    assert arms.twin_of(dict(act="osc", window=4)) == arms.BASE and arms.twin_of({}) == {}
    assert arms.twin_of(dict(act="gelu", mlp_topk=0.1)) == dict(act="gelu")


SWITCHES = {"gpt2", "no_bias", "rmsnorm", "rope", "rope_theta", "rope_factor", "norm_eps", "grouped",
            "qk_norm", "qk_gain", "gelu_tanh", "relu2", "swiglu", "softcap",
            "zero_init", "untied", "ngram", "recompute", "loss_chunks", "units"}


def test_every_arm_of_the_tests_is_a_mechanism_or_a_switch_and_lists_of_keys_name_keys():
    keys = arms.key_defaults()
    assert arms.SHARED <= arms.model_defaults().keys() and arms.SIZED.keys() <= keys.keys()
    assert arms.TRAINED | arms.APART <= keys.keys() and not arms.APART & arms.model_defaults().keys()
    assert {name for name, flags in FLAGS.items() if not arms.owned(flags)} == SWITCHES


def test_settings_are_as_train_py_reads_them_wherever_they_are_written(tmp_path, monkeypatch):
    (tmp_path / "typed.py").write_text("exits = '2'\nlearning_rate = 1\nn_layer = 4\n")
    monkeypatch.setitem(arms.ARMS, "typed", dict(exits="2", learning_rate=1, n_layer=4))
    monkeypatch.setitem(arms.ARMS, "plain", {})
    recipe = "config/compare_pylib.py"
    found = arms.settings(recipe, "typed")
    assert found == arms.settings(f"{recipe},{tmp_path / 'typed.py'}", "plain")
    assert (found["exits"], found["learning_rate"]) == ("2", 1.0) and type(found["learning_rate"]) is float
    assert found["act"] == "relu2" and not found.keys() & {"out_dir", "dataset", "max_iters", "qk_gain"}


def test_arms_that_are_one_model_by_their_flags_are_trained_and_counted_once():
    assert arms.same_models("config/compare_pylib.py", arms.ARMS) == {"quality": "window"}
    chosen = arms.chosen_arms(table.Table())
    assert "window" in chosen and "quality" not in chosen
    assert arms.chosen_arms(table.Table(arms="quality")) == ["quality"]
    assert arms.chosen_arms(table.Table(arms="quality,window,quality")) == ["quality"]
    assert arms.chosen_arms(table.Table(arms="dense,leaky,topk,slow")) == ["dense", "leaky", "topk", "slow"]


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
    assert chosen == set(arms.ARMS) - set(arms.OTHERS) - {"quality"} and len(set(arms.DENSE) & chosen) >= 5


# ------------------------------------------------ what is counted -----------------------------

@pytest.mark.parametrize("name", ["gpt2", "predict", "hierarchy", "window", "exits", "ponder", "two_of_four"])
def test_a_sound_model_does_not_see_the_future(name):
    model = build(FLAGS[name], std=0.2).use_policy()
    assert not judge.sees_the_future(model, tokens(1, 16))


@pytest.mark.parametrize("name, shortcuts", [("relu2", False), ("predict", True), ("mlp_screen", True),
                                             ("exits", True)])
def test_a_run_is_judged_as_it_decodes_and_without_its_shortcuts(name, shortcuts, tmp_path, monkeypatch):
    """Also where thresholds are still to be found, which are the same each time."""
    for split, seed in ("train", 1), ("val", 2):
        tokens(1, 20000, seed)[0].numpy().astype("uint16").tofile(tmp_path / f"{split}.bin")
    model = build(FLAGS[name], std=0.2, **{"exit_threshold": 0.01} if name == "exits" else {})
    for mlp in calibrate.screened(model):
        mlp.edge.fill_(torch.nan)
    monkeypatch.setattr(judge, "trained_model", lambda folder: model)
    first, second = (judge.judge(judge.as_trained(name, None, tmp_path), tmp_path) for _ in range(2))
    assert first == second and not first["sees_the_future"]
    assert (first["val_loss"] != first["val_loss_exact"]) == shortcuts
    assert first["val_loss_exact"] == judge.judge(model.use_policy(False), tmp_path)["val_loss"]


def test_copying_is_what_a_text_costs_less_where_it_comes_again(tmp_path):
    """A model that bets on what stood behind the last token's first place, and one that does not."""
    tokens(1, 20000, 2)[0].numpy().astype("uint16").tofile(tmp_path / "val.bin")

    def model(idx, targets):
        logits = torch.zeros(*idx.shape, 64)
        if copies:
            logits[:, half:].scatter_(2, idx[:, 1:half + 1, None], 5.0)
        return logits, None

    half, model.config = 64, SimpleNamespace(block_size=128, vocab_size=64)
    copies = False
    assert judge.copying(model, tmp_path) == 0
    copies = True
    assert 2.4 < judge.copying(model, tmp_path) < 5
    model.config.block_size = 62
    assert judge.copying(model, tmp_path) is None


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


def test_p_values_are_told_with_their_number_and_holms_correction(result):
    of_losses, gains = report.corrected(result)
    assert of_losses.keys() == {"good", "bad"}, "rivals and broken arms are no claims"
    raw = {name: result["rows"][name]["to_twin"]["p"] for name in of_losses}
    assert of_losses == stats.holm(raw) != raw
    assert {axis for _, axis in gains} == set(report.SHOWN) and min(gains.values()) >= 0
    said = report.markdown(result)
    assert "Holm's correction for the 2 arms" in said and f"corrected for all {len(gains)} tests" in said
    assert "keeps no rounds of timing" in said


def test_an_arm_that_is_another_ones_model_has_no_row_and_is_no_test(result):
    before = report.corrected(result)
    result["rows"]["twice"] = row("twice", (2.05, 2.06, 2.04), 2.1, byte=2e6)
    result["rows"]["twice"]["to_twin"] = result["rows"]["good"]["to_twin"]
    result["axes"], result["same_as"] = table.axes_of(result["rows"]), {"twice": "good"}
    assert report.corrected(result) == before
    assert "twice" not in {cells[0] for cells in [*report.main_rows(result), *report.frontier_rows(result)]}
    assert "twice is the same model as good" in report.markdown(result)
    assert "5% apart" in report.markdown(result)


def test_rounds_of_timing_reach_the_intervals_of_the_table(result):
    for number, found in enumerate(result["rows"].values()):
        speed = dict(found["speed"]["decode, batch 1"])
        rounds = [speed["median"] * (1 + 0.1 * ((3 * i + number) % 5 - 2)) for i in range(9)]
        found["speed"] = dict.fromkeys(found["speed"], speed | {"rounds": rounds, "median": rounds[0]})
    axes = table.axes_of(result["rows"])
    gain = axes["decode time"]["to_frontier"]["good"]["gain"]
    old = result["axes"]["decode time"]["to_frontier"]["good"]["gain"]
    assert gain["rounds"] == 9 and "rounds" not in old
    assert gain["interval"][1] - gain["interval"][0] > old["interval"][1] - old["interval"][0]
    assert "9 rounds of timing" in report.markdown(result | {"axes": axes})
    assert "rounds" not in axes["decode bytes"]["to_frontier"]["good"]["gain"], "bytes are counted"
    assert all(isinstance(cost, float) for cost in axes["decode time"]["costs"].values())


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
    assert not re.search(r"https?://|@import|<script [^>]", page) and "Measured on &lt;x&gt;." in page
    assert all(f"<td>{name}</td>" in page for name in result["rows"])
    assert page.index("<img") < page.index("<table")               # the figures come first
    first = page[page.index("<table"):page.index("</table>")]
    assert first.count("<th>") == len(report.BRIEF) == 7
    rows = re.findall(r"<tr><td>([^<]*)</td>.*?</tr>", first)
    broken = [name for name, row in result["rows"].items() if row["kind"] == "broken"]
    assert sorted(rows) == sorted(result["rows"]) and broken and rows[-len(broken):] == broken
    verdicts = {name: mark for name, mark in re.findall(
        r"<tr><td>([^<]*)</td>.*?<td(?: class=(yes|no))?>[^<]*</td></tr>", first)}
    assert verdicts["good"] == "yes" and verdicts["bad"] == verdicts["leaky"] == "no" and verdicts[TWIN] == ""
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".html", ".png"}


def test_a_report_is_written_anew_from_its_record(result, tmp_path):
    hardware = {"cpu": "x", "cores": 2, "threads": 1, "versions": {"numpy": "2"}}
    report.write(tmp_path / "t.json", result, hardware)
    pages = {end: (tmp_path / f"t.{end}").read_text() for end in ("html", "md")}
    assert "Measured on x, 2 cores, 1 thread; numpy 2." in pages["html"]
    assert '<meta name="viewport"' in pages["html"]
    (tmp_path / "t.json").write_text(json.dumps(result | {"hardware": hardware}))
    for end in pages:
        (tmp_path / f"t.{end}").unlink()
    report.main([str(tmp_path / "t.json")])
    assert pages == {end: (tmp_path / f"t.{end}").read_text() for end in pages}
    (tmp_path / "other.json").write_text('{"schema": 2}')
    for words in ([], ["t.html"], [str(tmp_path / "other.json")]):
        with pytest.raises(ConfigError, match=r"results/table_cpu\.json"):
            report.main(words)


@pytest.mark.skipif(not shutil.which("node"), reason="no node on the PATH")
def test_a_click_on_a_head_sorts_the_rows_by_number_and_keeps_empty_cells_below(tmp_path):
    """The page's own script, on a table that stands for the browser's."""
    stand_in = """
const rows = [["a", "1,200 (0.5x)"], ["b", ""], ["c", "-3.5"], ["d", "90"]].map(cells => ({
  children: cells.map(textContent => ({textContent}))}));
const body = {rows, append(...sorted) { this.rows = sorted; }};
const heads = ["arm", "speed"].map(() => ({dataset: {}, closest: () => ({tBodies: [body]})}));
for (const head of heads) head.parentNode = {children: heads};
const document = {querySelectorAll: () => heads};
"""
    asks = """
const order = () => body.rows.map(row => row.children[0].textContent).join("");
const said = [];
for (const n of [1, 1, 0, 0]) { heads[n].onclick(); said.push(order()); }
console.log(said.join(" "));
"""
    (tmp_path / "sort.js").write_text(stand_in + report.SORT + asks)
    done = subprocess.run(["node", tmp_path / "sort.js"], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["cdab", "adcb", "abcd", "dcba"], done.stderr


def test_gpt2s_shape_is_told_apart_from_the_trained_scale(tmp_path):
    side = {"median": 50.0}
    twin = "dense, act=relu2"
    record = {"measurements": {"decode": {"sides": {"nanoGPT": {"median": 2.0}, "ours": side,
                                                    twin: {"median": 60.0}, "efficient": {"median": 75.0}},
                                          "twins": {"efficient": twin}}},
              "work": {"efficient": {"ceiling": 1.8}}}
    path = tmp_path / "r.json"
    path.write_text(json.dumps(record))
    assert report.shape_rows(path)[3] == ["efficient", "75.0", "1.25x", "1.80x", "37.5x"]
    assert "Superseded" not in report.shape_said(path)
    del record["measurements"]["decode"]["twins"]                # a record from before dense twins
    path.write_text(json.dumps(record))
    assert report.shape_rows(path)[3] == ["efficient", "75.0", "", "", "37.5x"]
    assert "Superseded" in report.shape_said(path)
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
    assert record["rows"]["slow"]["macs"] > max(twin["macs"], record["rows"]["topk"]["macs"])
    assert "no: it sees the future" in said and not record["missing"] and (tmp_path / "t.html").is_file()
    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "out-bench" / "runs").iterdir()}
    assert len(runs) == 1 + 2 * (4 + len(table.LONGER))                    # the plan, and the runs
    again, _ = made()
    assert runs == {path: path.stat().st_mtime_ns for path in runs}
    assert [row["losses"] for row in again["rows"].values()] == [row["losses"]
                                                                 for row in record["rows"].values()]


@pytest.mark.slow
def test_a_queue_trains_and_makes_no_table(tmp_path):
    (tmp_path / "tiny.py").write_text(TINY)
    words = [sys.executable, str(ROOT / "bench.py"), "table", "--iters=20", "--seeds=1", "--budget=30",
             "--arms=dense", "--train_only=True", f"--config={tmp_path / 'tiny.py'}", "--out=t.json"]
    for _ in range(2):
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        record = json.loads((tmp_path / "t.json").read_text())
        assert record["trained"] == record["wanted"] == 3 and "rows" not in record
        assert "3 of 3 runs are trained" in done.stdout and not (tmp_path / "t.html").is_file()
    assert len([*(tmp_path / "out-bench" / "runs").glob("dense*")]) == 3


def test_a_queue_that_yields_to_nobody_says_how(tmp_path, monkeypatch):
    told = tmp_path / "autogroup"
    monkeypatch.setattr(table, "AUTOGROUP", told)
    monkeypatch.setattr(table.os, "nice", lambda more: 19, raising=False)
    assert table.hint_of_niceness() == ""                       # no such file: nice counts for all
    told.write_text("/autogroup-5 nice 0\n")
    assert "type echo 19 > " in table.hint_of_niceness()
    told.write_text("/autogroup-5 nice 19\n")
    assert table.hint_of_niceness() == ""
    told.write_text("/autogroup-5 nice 0\n")
    monkeypatch.setattr(table.os, "nice", lambda more: 0, raising=False)
    assert table.hint_of_niceness() == ""
