"""The budget for what gates let through, and the meter of joules."""
import sys
from types import SimpleNamespace

import pytest
import torch
from arms import build, tokens

from configurator import ConfigError
from decode import counters
from model import GPTConfig
from training import energy

GATES = dict(act="gelu", event_gate=True, dendrites=4, dendrites_active=4)


def spent_by(model, idx):
    """-> (share of the gates' multiply-adds that a forward counts, the gates of its layers)."""
    seen, spent = [], []
    note = lambda gates: seen.append((gates != 0).float())
    for block in model.transformer.h:
        block.attn.gate.register_forward_hook(lambda module, args, gates: note(gates))
        block.mlp.c_proj.register_forward_pre_hook(lambda module, args: note(args[0]))
    model.over_budget = lambda ctx: spent.extend(ctx.executed) or ()
    model(idx, idx)
    return sum(opened for opened, _ in spent) / sum(possible for _, possible in spent), seen


def test_the_budget_counts_the_multiply_adds_that_open_gates_cost():
    model, idx = build(GATES | dict(energy_budget=0.5), std=0.3).train(), tokens(3, 12)
    share, seen = spent_by(model, idx)
    C, D = model.config.n_embd, model.config.dendrites
    price = [2 * C * C / D, C] * model.config.n_layer       # a branch's q and c_proj; a unit's row of W_down
    counted, possible = (sum(p * count(gate) for p, gate in zip(price, seen))
                         for count in (torch.sum, torch.numel))
    assert share.item() == pytest.approx(counted.item() / possible)
    assert 0 < share < 1


def trained(budget, steps=60):
    """A tiny model that learns one batch under a budget -> (its loss, multiply-adds of a decode step)."""
    model, idx = build(GATES | dict(energy_budget=budget)).train(), tokens(2, 17)
    optimizer = model.configure_optimizers(0.0, 2e-2, (0.9, 0.95), "cpu")
    for _ in range(steps):
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    loss = model.eval()(idx[:, :-1], idx[:, 1:])[1].item()
    rows = counters.counters(model, idx[:, :-1])
    return loss, sum(row["attn_macs"] + row["mlp_macs"] for row in rows.values())


def test_a_smaller_budget_executes_fewer_multiply_adds():
    macs = [trained(budget)[1] for budget in (0.9, 0.5, 0.1)]
    assert macs[0] > 1.1 * macs[1] > 1.2 * macs[2]


def test_with_a_budget_no_gate_has_an_aim_of_its_own():
    torch.manual_seed(0)
    idx = tokens(2, 9)
    model = build(GATES | dict(energy_budget=0.5, energy_cost=0.0), std=0.2)
    assert model.train()(idx, idx)[1] == model.eval()(idx, idx)[1]
    assert build(GATES, std=0.2).train()(idx, idx)[1] > build(GATES, std=0.2)(idx, idx)[1]


@pytest.mark.parametrize("flags, word", [
    (dict(energy_budget=0.5), "type --event_gate=True"),
    (dict(GATES, energy_budget=1.5), r"must be in \(0, 1\]"),
    (dict(GATES, energy_budget=0.5, event_rate=0.3), "both aim the gates"),
    (dict(GATES, energy_budget=0.5, dendrite_cost=0.3), "both aim the gates"),
    (dict(energy_cost=0.4), "no effect without energy_budget")])
def test_a_budget_that_cannot_be_says_why(flags, word):
    with pytest.raises(ConfigError, match=word):
        GPTConfig(**flags)


# -------------------------------------------------- joules --------------------------------------------------

def powercap(folder, *microjoules, wrap=10_000_000):
    """Counters as Linux shows them, one for each CPU package, and one below a package that must not count."""
    for number, value in enumerate([*microjoules, 77]):
        zone = folder / (f"intel-rapl:{number}" if number < len(microjoules) else "intel-rapl:0:0")
        zone.mkdir(exist_ok=True)
        (zone / "energy_uj").write_text(f"{value}\n")
        (zone / "max_energy_range_uj").write_text(f"{wrap}\n")


def test_joules_of_cpu_packages_are_added_also_where_a_counter_began_anew(tmp_path):
    powercap(tmp_path, 1_000_000, 9_500_000)
    meter = energy.Meter(torch.device("cpu"), tmp_path)
    powercap(tmp_path, 3_500_000, 500_000)
    assert meter.joules() == pytest.approx(2.5 + 1.0)
    assert str(meter) == "4 J (RAPL, CPU packages)"


def test_where_nothing_measures_there_is_no_number(tmp_path):
    meter = energy.Meter(torch.device("cpu"), tmp_path)
    assert meter.joules() is None and str(meter) == "no joules (no RAPL counter here)"
    powercap(tmp_path, 1)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("not to be read")
    assert energy.Meter(torch.device("cpu"), tmp_path).joules() is None


def test_joules_of_a_gpu_come_from_nvml(monkeypatch):
    readings = iter((5_000, 5_000, 9_000))
    nvml = SimpleNamespace(NVMLError=RuntimeError, nvmlInit=lambda: None,
                           nvmlDeviceGetHandleByIndex=lambda index: index,
                           nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(readings))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert energy.Meter(torch.device("cuda:0")).joules() == 4.0
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter = energy.Meter(torch.device("cuda:0"))
    assert meter.joules() is None and "pip install nvidia-ml-py" in meter.source
