"""The faster of several forms is timed once a card and kept; a step's form on a card follows it."""
import json

import pytest
import torch
from arms import ARMS, build

from decode import card, sampling, way
from kernels import faster

CPU = torch.device("cpu")


class Clock:
    """A clock that moves when a form runs: at its first calls, which warm it up, by a hundred times more."""

    def __init__(self, seconds):
        self.now, self.calls, self.seconds = 0.0, [], seconds

    def __call__(self):
        return self.now

    def forms(self):
        return {name: lambda name=name: self.run(name) for name in self.seconds}

    def run(self, name):
        self.calls.append(name)
        self.now += self.seconds[name] * (100 if self.calls.count(name) <= faster.WARM else 1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "nanocortex" / "times.json"


def test_the_faster_form_is_chosen_once_for_a_card_and_its_versions(cache, monkeypatch):
    clock = Clock({"sparse": 3.0, "dense": 2.0})
    form, took = faster.fastest("a product", clock.forms(), CPU, clock)
    assert form == "dense" and took == pytest.approx({"sparse": 3, "dense": 2})
    assert len(clock.calls) == 2 * (faster.WARM + faster.TIMED)
    again = Clock({"sparse": 1.0, "dense": 2.0})
    assert faster.fastest("a product", again.forms(), CPU, again) == (form, took) and not again.calls
    assert faster.fastest("another", again.forms(), CPU, again)[0] == "sparse" and again.calls
    monkeypatch.setattr(faster, "card_of", lambda device: "another card, torch 3, triton 4")
    other = Clock({"sparse": 1.0, "dense": 2.0})
    assert faster.fastest("a product", other.forms(), CPU, other)[0] == "sparse" and other.calls
    assert {len(known) for known in json.loads(cache.read_text()).values()} == {1, 2}


def test_forms_that_take_as_long_leave_the_first_and_new_forms_are_timed_anew():
    clock = Clock({"kernels": 2.0, "forward": 2.0})
    assert faster.fastest("a step", clock.forms(), CPU, clock)[0] == "kernels"
    clock.seconds["third"] = 1.0
    assert faster.fastest("a step", clock.forms(), CPU, clock)[0] == "third"


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"x": 1}'])
def test_a_file_of_times_that_says_nothing_is_written_anew(cache, text):
    cache.parent.mkdir()
    cache.write_text(text)
    clock = Clock({"a": 2.0, "b": 1.0})
    assert faster.fastest("x", clock.forms(), CPU, clock)[0] == "b"
    assert json.loads(cache.read_text())[faster.card_of(CPU)]["x"] == pytest.approx({"a": 2, "b": 1})


def test_where_nothing_can_be_kept_forms_are_timed_each_time(cache):
    cache.parent.write_text("a file where the folder should be")
    for _ in range(2):
        clock = Clock({"a": 2.0, "b": 1.0})
        assert faster.fastest("x", clock.forms(), CPU, clock)[0] == "b" and clock.calls


class Kernels:
    """In a card's step's place."""
    launches = [("product_kernel", "head")] * 8
    counters = ()

    def __init__(self, model, cache, history, start, ids):
        self.fails = cache.choices.forward

    def begin(self):
        pass

    def step(self):
        return torch.zeros(1, 31)


def made(*arguments):
    kernels = Kernels(*arguments)
    return card.NotWritten(kernels.fails) if kernels.fails else kernels


@pytest.mark.parametrize("arm", ["gpt2", "experts"])
@pytest.mark.parametrize("slow", ["kernels", "forward"])
def test_a_model_on_a_card_decodes_by_what_is_faster_there_and_says_so(arm, slow, monkeypatch):
    """Where the host decides what forward runs, it is no rival."""
    monkeypatch.setattr(card, "card_of", made)
    took = {"kernels": 2e-4, "forward": 2e-4} | {slow: 9e-4}
    monkeypatch.setattr(way, "fastest", lambda what, forms, device: (
        [run() for run in forms.values()], (min(took, key=took.get), took))[1])
    model = build(ARMS[arm])
    said = way.choose_on_card(model, CPU)
    if arm == "experts":
        assert said == "8 kernels a token" and not model.choices.forward
    elif slow == "kernels":
        assert said == "forward decodes (200 us a step on this card, 900 us by 8 kernels a token)"
        assert sampling.Step(model, sampling.Cache(model, 1, 8), torch.zeros(1, 8).long(), 31).card.args
    else:
        assert said == "8 kernels a token, 200 us a step on this card, 900 us by forward"
        assert not model.choices.forward


def test_what_is_timed_differs_by_shape_flags_weights_and_policy():
    models = [build({}), build({}, n_embd=32), build(ARMS["rope"]), build({}).bfloat16(),
              build(ARMS["mlp_screen"]), build(ARMS["mlp_screen"]).use_policy()]
    assert len({way.described(model) for model in models}) == len(models)
