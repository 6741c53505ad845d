# ruff: noqa: I001, conftest makes the modules importable
"""The loss curves of every arm, as they were recorded: a change of the arithmetic shows here first.

    python tests/test_golden.py          records them anew, where a change is meant
"""
import json
import sys

import pytest
import torch
from conftest import ROOT
from arms import ARMS, build
from test_model import train_on

FILE = ROOT / "tests" / "golden.json"
STEPS = 20


def curve(arm):
    """Losses of 20 AdamW steps of an arm's tiny model on one batch, in fp32 on one thread."""
    model = build(arm).train()
    return train_on(model, model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu"), range(STEPS))


def here():
    """What must be the same for the same last bits."""
    return {"torch": torch.__version__.split("+")[0], "cpu": torch.backends.cpu.get_cpu_capability(),
            "mkldnn": torch.backends.mkldnn.is_available()}


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_follows_its_golden_curve(name):
    """Exact where torch and the CPU are those of the record, else within 1e-4 of the loss."""
    record = json.loads(FILE.read_text(encoding="utf-8"))
    found, golden = curve(ARMS[name]), record["curves"][name]
    assert len(golden) == STEPS
    if record["here"] == here():
        assert found == golden
    else:
        assert found == pytest.approx(golden, rel=1e-4)


if __name__ == "__main__":
    FILE.write_text(json.dumps({"here": here(), "curves": {name: curve(arm) for name, arm in ARMS.items()}},
                               indent=1) + "\n", encoding="utf-8")
    sys.exit(print(f"{FILE}: {len(ARMS)} curves"))
