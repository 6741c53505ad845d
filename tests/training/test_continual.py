"""One task after another: what is pulled back and replayed, whose adapter is on, what was forgotten."""
import numpy as np
import pytest
import torch
from arms import build, tokens
from conftest import ROOT, TINY, Job, Trainer, one_sentence, same, words
from test_train import TIMES, in_parallel
from torch.nn import functional as F

from configurator import ConfigError
from data import dataset
from data.tokenizer import ByteTokenizer, CharTokenizer
from model import GPTConfig
from training import continual

OTHER = "HAMLET: To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer.\n" * 30


# -------------------------------------------------- elastic weight consolidation ----------------------------

def test_fisher_is_the_mean_of_squared_gradients_of_single_rows_with_the_models_own_labels():
    model, rows = build({}, std=0.2), tokens(5, 7)
    found = continual.fisher_information(model, rows, range(5))
    by_hand = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row, seed in zip(rows, range(5)):
        logits = model(row[None], row[None])[0][0]
        labels = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(seed))[:, 0]
        model.zero_grad()
        (-logits.log_softmax(-1)[range(7), labels].sum()).backward()
        for name, p in model.named_parameters():
            by_hand[name] += p.grad.square() / (5 * 7)
    for name, value in by_hand.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-9), name


def exact_fisher(model, rows):
    """Expectation over every label of every token, of the head's weights and the last norm's gains."""
    kept = {"lm_head.weight": 0.0, "transformer.ln_f.weight": 0.0}
    named = dict(model.named_parameters(remove_duplicate=False))
    for row in rows:
        logs = model(row[None], row[None])[0][0].log_softmax(-1)
        for position in logs:
            for log in position:
                grads = torch.autograd.grad(log, [named[name] for name in kept], retain_graph=True)
                for name, grad in zip(kept, grads):
                    kept[name] = kept[name] + log.exp().detach() * grad.square() / (len(rows) * len(row))
    return kept


def test_fisher_tends_to_its_expectation_and_a_batchs_squared_mean_gradient_does_not():
    model, rows = build(dict(tie_weights=False, n_layer=1), std=0.3), tokens(2, 4)
    exact, many = exact_fisher(model, rows), 600
    found = continual.fisher_information(model, rows.repeat(many // 2, 1), range(many))
    model.zero_grad()
    F.cross_entropy(model(rows, rows)[0].flatten(0, 1), tokens(2, 4, seed=9).flatten()).backward()
    for name, value in exact.items():
        mean = dict(model.named_parameters())[name].grad.square()
        assert (found[name].sum() / value.sum() - 1).abs() < 0.1
        assert torch.corrcoef(torch.stack((found[name].flatten(), value.flatten())))[0, 1] > 0.95
        assert (mean.sum() / value.sum() - 1).abs() > 0.3


def consolidated(model, tasks=1):
    """EWC of a model after so many tasks, each with its own weights and Fisher information."""
    ewc, past = continual.Consolidation(model, 3.0), []
    for task in range(tasks):
        generator = torch.Generator().manual_seed(task)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator))
        fisher = {name: torch.randint(30, p.shape, generator=generator) / 32   # sums of them fit eight bits
                  for name, p in model.named_parameters()}
        past.append((fisher, {name: p.detach().clone() for name, p in model.named_parameters()}))
        ewc.remember(fisher)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator))
    return ewc, past


@pytest.mark.parametrize("arm", [{}, dict(act="relu2", tie_weights=False)], ids=["gpt2", "by_neuron"])
def test_the_pull_is_what_autograd_makes_of_the_penalty(arm):
    model, idx = build(arm, std=0.2).train(), tokens(2, 9)
    ewc, _ = consolidated(model)
    (model(idx, idx)[1] + ewc.penalty()).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(idx, idx)[1].backward()
    plain = model.lm_head.weight.grad.clone()
    ewc.pull()
    assert not torch.allclose(plain, model.lm_head.weight.grad)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, wanted[name], rtol=1e-5, atol=1e-6), name


def test_two_tensors_hold_any_number_of_tasks():
    model = build({})
    ewc, past = consolidated(model, tasks=3)
    named = dict(model.named_parameters())
    separate = sum(3.0 / 2 * (fisher[name] * (named[name] - then[name]).square()).sum()
                   for fisher, then in past for name in named)
    wanted = torch.autograd.grad(separate, named.values())
    for p in named.values():
        p.grad = torch.zeros_like(p)
    ewc.pull()
    for (name, p), grad in zip(named.items(), wanted):
        assert torch.allclose(p.grad, grad, rtol=1e-4, atol=1e-4), name


def test_weights_without_a_gradient_are_not_pulled_and_a_saved_state_pulls_the_same():
    model = build({}, std=0.2)
    ewc, _ = consolidated(model)
    ewc.pull()
    assert all(p.grad is None for p in model.parameters())
    again = continual.Consolidation(model, 3.0)
    again.load_state_dict(ewc.state_dict())
    same(again.fisher, ewc.fisher)
    assert again.penalty() == ewc.penalty() > 0
    bytes_saved = sum(t.nbytes for part in ("fisher", "anchor") for t in ewc.state_dict()[part].values())
    assert bytes_saved == 6 * sum(p.numel() for p in model.parameters())


# -------------------------------------------------- replay --------------------------------------------------

class Numbers:
    """A stream whose rows say the task, the number of the batch and the row."""
    batch_size = 6

    def __init__(self, task):
        self.task = task

    def batch(self, number):
        x = torch.tensor([[self.task, number, row] for row in range(self.batch_size)])
        return x, x + 100


def lessons(tasks=3, **keys):
    keys = dict(replay=0.25, kept=40, seed=5) | keys
    return continual.Lessons([Numbers(task) for task in range(tasks)], 20, **keys)


def test_replayed_rows_are_rows_that_earlier_tasks_have_drawn_at_exactly_the_ratio():
    drawn, old = lessons(), 0
    for number in range(60):
        x, y = drawn.batch(number)
        now = min(number // 20, 2)
        assert torch.equal(y, x + 100) and x[:, 0].tolist() == drawn.tasks(number)
        for row, (task, then, at) in enumerate(x.tolist()):
            assert (task == now and then == number and at == row) or (task < now and then // 20 == task)
        old += int((x[:, 0] < now).sum())
        assert number >= 20 or not old
    assert old == 0.25 * 40 * 6


def test_without_replay_and_in_the_first_task_batches_are_the_streams_own():
    for number in range(60):
        same(lessons(replay=0.0).batch(number), Numbers(min(number // 20, 2)).batch(number))
    same(lessons().batch(19), Numbers(0).batch(19))


def test_batches_depend_on_their_number_and_the_seed_alone():
    forwards, backwards = lessons(), lessons()
    batches = {number: forwards.batch(number) for number in range(20, 60)}
    same({number: backwards.batch(number) for number in reversed(range(20, 60))}, batches)
    other = lessons(seed=6)
    assert any(not torch.equal(other.batch(number)[0], batches[number][0]) for number in batches)


def test_a_reservoir_is_a_uniform_sample_without_repeats_that_only_loses_rows_it_had():
    counts = np.zeros(50)
    for seed in range(400):
        kept = continual.smallest(50, 10, seed)
        assert len(set(kept)) == 10
        counts[kept] += 1
        assert set(kept) & set(range(30)) <= set(continual.smallest(30, 10, seed))
    assert abs(counts - 80).max() < 4 * (400 * 0.2 * 0.8) ** 0.5
    assert continual.smallest(3, 10, 0).tolist() == [0, 1, 2]


def test_a_reservoir_is_the_same_in_pieces(monkeypatch):
    whole = continual.smallest(1000, 20, 7)
    monkeypatch.setattr(continual, "CHUNK", 77)
    assert continual.smallest(1000, 20, 7).tolist() == whole.tolist()


# -------------------------------------------------- adapters ------------------------------------------------

TWO = dict(adapters="python,english", adapter_width=4)


def test_a_new_adapter_is_the_identity():
    idx = tokens(2, 9)
    assert torch.equal(build(TWO)(idx, idx)[0], build({})(idx, idx)[0])


def test_each_row_passes_its_own_adapter():
    model, idx = build(TWO, std=0.2), tokens(5, 9)
    alone = []
    for number in (0, 1):
        continual.use_adapters(model, [number])
        alone.append(model(idx, idx)[0])
    assert (alone[0] - alone[1]).abs().max() > 0.1
    on = [1, 0, 0, 1, 0]
    continual.use_adapters(model, on)
    mixed = model(idx, idx)[0]
    for row, number in enumerate(on):
        assert torch.allclose(mixed[row], alone[number][row], atol=1e-5)


DROPPING = {"exits": dict(exits="1,2", n_layer=3, exit_threshold=0.5), "ponder": dict(ponder=3),
            "ponder_in_groups": dict(ponder=3, hierarchy=2, n_layer=3, pos="rope"),
            "experts": dict(experts=4, experts_active=2)}


@pytest.mark.parametrize("flags", DROPPING.values(), ids=DROPPING.keys())
def test_rows_that_drop_out_leave_the_others_their_adapters(flags):
    for seed in range(3):
        model, idx, on = build(TWO | flags, std=0.2).use_policy(), tokens(5, 6, seed), [1, 0, 0, 1, 0]
        alone = []
        for row, number in enumerate(on):
            continual.use_adapters(model, [number])
            alone.append(model.generate(idx[[row], :row + 2], 8, temperature=0)[0])
        continual.use_adapters(model, on)
        together = model.generate(idx, 8, temperature=0, lengths=[2, 3, 4, 5, 6])
        for row, found in enumerate(alone):
            assert together[row, :row + 10].tolist() == found.tolist()


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_adapters_of_other_rows_than_the_batch_has_are_refused(rows):
    model, idx = build(TWO), tokens(rows, 5)
    continual.use_adapters(model, [0, 1, 1])
    for call in (lambda: model(idx, idx), lambda: model(idx), lambda: model.generate(idx, 2)):
        with pytest.raises(ConfigError, match=f"adapters of 3 rows.*{rows}"):
            call()


@pytest.mark.parametrize("on", [[1], [1, 1], [0, 1]])
def test_only_adapters_that_are_on_learn(on):
    model, idx = build(TWO, std=0.2).train(), tokens(2, 9)
    continual.use_adapters(model, on)
    model(idx, idx)[1].backward()
    for number in (0, 1):
        for part in (model.transformer.h[1].adapt.down, model.transformer.h[1].adapt.up):
            assert (part[number].weight.grad is not None) == (number in on)


@pytest.mark.parametrize("names", ["a,,b", "a b", "a/b", ","])
def test_names_of_adapters_are_plain(names):
    with pytest.raises(ConfigError, match="must be a name"):
        GPTConfig(adapters=names)


def test_two_tasks_may_share_an_adapter():
    assert GPTConfig(adapters="code,english,code").adapter_names() == ["code", "english"]


# -------------------------------------------------- what was forgotten --------------------------------------

def test_the_matrix_says_average_transfer_and_forgetting():
    matrix = [dict(a=1.0, b=5.0, c=5.0), dict(a=0.8, b=2.0, c=4.0), dict(a=1.4, b=2.5, c=3.0)]
    found = continual.judged(matrix)
    assert found == pytest.approx(dict(average_loss=6.9 / 3, backward_transfer=-(0.4 + 0.5) / 2,
                                       forgetting=(0.6 + 0.5) / 2))
    assert continual.judged(matrix[:1]) == dict(average_loss=1.0)


# -------------------------------------------------- whole runs ----------------------------------------------

@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A second folder of bytes."""
    folder, ids = tmp_path_factory.mktemp("other"), list(OTHER.encode())
    dataset.write_dataset(folder, {"train": [ids[300:]], "val": [ids[:300]]}, ByteTokenizer(), "test")
    return folder


CLOCKS = ("ms", "seconds", "tokens_per_s", "joules", "run")
EVERYTHING = dict(ewc=5.0, ewc_samples=5, replay=0.3, replay_blocks=7, adapters="fox,hamlet", adapter_width=4,
                  lr_decay_iters=8, max_iters=16)
STOP = """
import os, signal; from training import continual
begin = continual.Tasks.begin
def stop_at(self, iteration):
    if iteration == {k} - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    begin(self, iteration)
continual.Tasks.begin = stop_at
"""


@pytest.fixture(scope="module")
def learnt(tmp_path_factory, data, other):
    """A finished run of two tasks with everything on."""
    trainer = Trainer(tmp_path_factory.mktemp("learnt"), data)
    trainer(tasks=f"{data},{other}", **EVERYTHING)
    return trainer


@pytest.mark.parametrize("k", [3, 8, 9, 13])
def test_a_run_stopped_in_any_task_and_resumed_is_the_run_that_was_not(train, data, other, learnt, k):
    train(tasks=f"{data},{other}", before=STOP.format(k=k), status=143, **EVERYTHING)
    assert train.checkpoint()["iter_num"] == k
    assert len(train.checkpoint()["tasks"]["matrix"]) == (k > 8)
    train.resume()
    same(train.checkpoint(), learnt.checkpoint(), skip=TIMES)
    for rows in zip(train.metrics(), learnt.metrics(), strict=True):
        one, two = ({key: row[key] for key in row if key not in CLOCKS}
                    for row in rows)
        assert one == two


def test_the_log_holds_the_matrix_and_what_it_says(learnt, data, other):
    rows = [row for row in learnt.metrics() if "after_task" in row]
    assert [(row["iter"], row["after_task"]) for row in rows] == [(8, str(data)), (16, str(other))]
    matrix = [{name: row[f"val_loss of {name}"] for name in (str(data), str(other))} for row in rows]
    found = continual.judged(matrix)
    assert {key: rows[-1][key] for key in found} == found
    assert found["forgetting"] == pytest.approx(-found["backward_transfer"])
    assert rows[1]["val_loss"] == matrix[1][str(other)]
    rates = {row["iter"]: row["lr"] for row in learnt.metrics() if "lr" in row}
    assert [rates[i] for i in range(8)] == [rates[i] for i in range(8, 16)]


@pytest.mark.parametrize("keys", [dict(ewc=0.0), dict(replay=0.0), dict(adapters="")], ids=str)
def test_each_of_them_changes_the_second_task_and_only_adapters_the_first(train, data, other, learnt, keys):
    train(tasks=f"{data},{other}", **{k: v for k, v in (EVERYTHING | keys).items()
                                      if keys != dict(adapters="") or k != "adapter_width"})
    ours, theirs = train.losses(), learnt.losses()
    assert (ours[7] == theirs[7]) == ("adapters" not in keys)
    assert ours[15] != theirs[15]


def test_freeze_trains_the_second_adapter_alone_and_forgets_nothing(train, data, other):
    keys = EVERYTHING | dict(ewc=0.0, replay=0.0, freeze=True, eval_interval=8)
    train(tasks=f"{data},{other}", before=STOP.format(k=8), status=143, **keys)
    before = train.checkpoint()["model"]
    train.resume()
    for name, after in train.checkpoint()["model"].items():
        assert torch.equal(after, before[name]) == (".1.weight" not in name or "adapt" not in name), name
    last = train.metrics()[-1]
    assert last["forgetting"] == last["backward_transfer"] == 0.0


@pytest.mark.parametrize("optimizer, tolerance", [("adamw", 1e-5), ("muon", 2e-3)])
def test_processes_share_tasks_and_what_holds_them(train, data, other, optimizer, tolerance):
    keys = EVERYTHING | dict(tasks=f"{data},{other}", gradient_accumulation_steps=4, dropout=0.0,
                             optimizer=optimizer)
    in_parallel(train, 2, out="parallel", **keys)
    train(out="single", **keys)
    single, parallel = train.losses("single"), train.losses("parallel")
    assert single.keys() == parallel.keys() == set(range(16))
    assert all(abs(single[i] - parallel[i]) <= tolerance * single[i] for i in single)
    one, two = (train.metrics(out)[-1]["forgetting"] for out in ("single", "parallel"))
    assert one == pytest.approx(two, abs=10 * tolerance)


def test_a_third_task_follows_on_two_that_are_over(train, data, other):
    train(tasks=f"{data},{other}", ewc=1.0, ewc_samples=3, lr_decay_iters=4, max_iters=8)
    text = train.folder / "third"
    dataset.write_dataset(text, {"train": [range(200)] * 2, "val": [range(200)]}, ByteTokenizer(), "test")
    train.resume(tasks=f"{data},{other},{text}", max_iters=12)
    assert train.metrics()[-1]["after_task"] == str(text)
    saved = train.checkpoint()["tasks"]
    assert len(saved["matrix"]) == saved["ewc"]["tasks"] == 2
    result = train.resume(tasks=f"{other},{data},{text}", max_iters=12, status=2)
    one_sentence(result, "train.py", "must begin with those of the checkpoint")


def test_a_sample_takes_the_adapter_that_is_named(learnt):
    saved = learnt.checkpoint()
    for name in saved["model"]:
        saved["model"][name] *= 1 + 99 * ("adapt.up" in name)           # a few steps have hardly moved them
    (learnt.folder / "loud").mkdir()
    torch.save(saved, learnt.folder / "loud" / "ckpt.pt")
    keys = dict(out_dir=learnt.folder / "loud", num_samples=1, max_new_tokens=60, device="cpu", start="T")
    runs = {name: Job("sample.py", words(**keys, **dict(adapter=name) if name else {}), learnt.folder,
                      name=f"sample{name}").wait() for name in ("", "fox", "hamlet", "hamlt")}
    assert runs[""].out == runs["fox"].out != runs["hamlet"].out
    assert "adapter 'hamlet' of fox, hamlet" in runs["hamlet"].err
    one_sentence(runs["hamlt"], "sample.py", "adapter='hamlt', did you mean 'hamlet'? must be fox or hamlet")


# -------------------------------------------------- mistakes ------------------------------------------------

BAD = [
    (dict(ewc=1.0), "ewc=1.0 has no effect without an earlier task"),
    (dict(replay=0.5), "type --tasks=ONE,ANOTHER"),
    (dict(tasks="A,A"), "must be different data sets"),
    (dict(tasks="A,"), "must be different data sets"),
    (dict(tasks="A,B", ewc=-1), "ewc=-1.0 must not be negative"),
    (dict(tasks="A,B", replay=1.0), "replay=1.0 must be in [0, 1)"),
    (dict(tasks="A,B", max_iters=15), "type --max_iters=32"),
    (dict(tasks="A,B", max_iters=32, always_save_checkpoint=False), "always_save_checkpoint=False"),
    (dict(tasks="A,B", max_iters=32, adapters="a,b,c"), "names 3, the run has 2 tasks"),
    (dict(tasks="A,B", max_iters=32, freeze=True), "type --adapters=task0,task1"),
    (dict(tasks="A,B", max_iters=32, adapters="a,b", freeze=True, replay=0.5), "replay=0.5 has nothing"),
    (dict(tasks="B,A", max_iters=32), "is not the first of tasks="),
    (dict(tasks="A,C", max_iters=32), "'byte' with 256 ids"),
    (dict(tasks="A,C", max_iters=32), "'char' with 3 ids"),
    (dict(tasks="A,nowhere", max_iters=32), "data set 'nowhere'"),
    (dict(adapter_width=3), "adapter_width=3 has no effect without adapters"),
]


@pytest.mark.parametrize("keys, sentence", BAD, ids=lambda value: str(value)[:50])
def test_tasks_that_cannot_be_are_one_sentence(train, data, other, keys, sentence):
    chars = train.folder / "chars"
    splits = {split: [[0, 1, 2] * 9] for split in dataset.SPLITS}
    dataset.write_dataset(chars, splits, CharTokenizer(list("abc")), "test")
    if "tasks" in keys:
        places = dict(A=str(data), B=str(other), C=str(chars))
        keys = keys | dict(tasks=",".join(places.get(name, name) for name in keys["tasks"].split(",")))
    one_sentence(train(status=2, **keys), "train.py", sentence)


@pytest.mark.parametrize("file", sorted((ROOT / "config").glob("continual_*.py")), ids=lambda path: path.stem)
def test_every_way_to_hold_a_task_trains_from_its_config(train, data, other, file):
    train(str(ROOT / "config" / "train_pylib.py"), str(file),
          *words(**TINY | dict(lr_decay_iters=3, max_iters=6, tasks=f"{data},{other}", dataset=data,
                               out_dir=train.folder / "out", n_embd=32)))
    last = train.metrics()[-1]
    assert last["after_task"] == str(other)
    assert (last["forgetting"] == 0) == (file.stem == "continual_adapters")
