"""bench.py launches: what a card's step launches, for every variant, and the arithmetic on it."""
from importlib.util import find_spec

import pytest
import torch
from arms import ARMS, TINY

from benchmarks import launches
from configurator import ConfigError
from decode import sampling
from model import GPTConfig

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="no Triton on this system")


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS.keys())
def test_a_step_on_a_card_is_five_launches_a_layer_and_five_outside_or_says_what_it_lacks(arm):
    """Six a layer where units are predicted, gates come first or tokens leave, and a run of one that ponders;
    seven with a copy of gates, an adapter or the largest inputs of attention; eight with dendrites; seven and
    what chooses units with compartments.
    Forward takes twice as many and more, or the host decides what it runs."""
    found = launches.counted(arm, **{key: value for key, value in TINY.items() if key != "n_layer"})
    waits = arm.keys() & {*sampling.HOST_DECIDES}
    assert ("host decides" in found.get("before", "")) == bool(waits)
    if "after" in found:
        assert found["after"]
        return
    more = bool(arm.keys() & {"mlp_predict", "gate_first"})
    more += 2 * ("adapters" in arm or (arm.get("act") == "swiglu" and "mlp_screen" in arm))
    more += ("exits" in arm) + 2 * ("attn_topk" in arm) + 3 * ("dendrites" in arm)
    more += 2 * ("compartments" in arm)
    runs, outside = arm.get("ponder", 1), 3 + 2 * ("hierarchy" in arm)
    assert found["after_layer"] == (5 + more + ("ponder" in arm)) * runs
    assert found["after_outside"] == outside
    assert waits or found["before_layer"] >= 2 * found["after_layer"]
    assert waits or found["before_outside"] >= 2.5 * found["after_outside"]


def test_ops_are_counted_where_they_write_or_make_what_is_no_view():
    x = torch.zeros(4, 4)
    with torch.inference_mode(), launches.Launched() as launched:
        y = x.view(2, 8).t()[1]                              # views
        z = torch.empty_like(y)
        z.copy_(y).add_(1)
        torch.stack((y, z), out=torch.empty(2, 2))
        torch.nn.functional.linear(x, x, x[0]).to(torch.float32)      # .to: nothing to do
    assert +launched.ops == {"copy_": 1, "add_": 1, "stack": 1, "linear": 1}


def test_weights_are_packed_as_a_card_reads_them_whatever_this_cpu_would_do():
    shape = dict(n_embd=64, n_head=2, vocab_size=512, block_size=64)
    assert launches.card_launches(GPTConfig(**TINY | shape | dict(weights="2:4"))) == (5, 3)


def test_times_on_paper_are_bytes_where_launches_cost_nothing():
    free, paid = (dict((what, value) for _, what, value, _ in launches.predictions(us)) for us in (0, 3))
    assert free["124M dense step beside its bytes alone"] == pytest.approx(1)
    assert paid["124M dense step: 63 launches, 266 MB"] == pytest.approx(
        free["124M dense step: 63 launches, 266 MB"] + 63 * 0.003)
    assert free["2:4 product of 67 MB, one launch each"] == pytest.approx(16 / 9)
    with pytest.raises(ConfigError, match="rows=9"):
        launches.Launches(rows=9)
