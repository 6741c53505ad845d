"""The arena of weights: a model in it is the model that it was."""
import sys

import pytest
import torch
from arms import ARMS, build, tokens

from kernels.arena import HUGE, move_weights
from model import GPT, GPTConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux alone")


def big(arm):
    """An arm's model with a vocabulary of more than one huge page."""
    return build(arm, std=0.2, vocab_size=1 + HUGE // 64)


@pytest.mark.parametrize("name", ["gpt2", "relu2", "untied", "ngram", "rope", "two_of_four", "columns"])
def test_a_model_in_an_arena_has_its_shapes_strides_ties_and_logits(name):
    model, idx = big(ARMS[name]), tokens(2, 9)
    before = {key: (t.shape, t.stride(), t.clone()) for key, t in model.state_dict().items()}
    expected = model(idx)[0]
    said = move_weights(model)
    assert said.endswith("on huge pages") and "MB of weights in one arena" in said
    assert torch.equal(model(idx)[0], expected)
    for key, tensor in model.state_dict().items():
        shape, stride, values = before[key]
        assert (tensor.shape, tensor.stride()) == (shape, stride) and torch.equal(tensor, values)
    assert all(p.data_ptr() % 64 == 0 for p in model.parameters())
    assert (model.lm_head.weight is model.transformer.wte.weight) == model.config.tie_weights


def test_weights_in_an_arena_learn_and_move_and_outlive_what_made_it():
    model, idx = big({}), tokens(2, 9)
    move_weights(model)
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    before = model.lm_head.weight.clone()
    model(idx, idx)[1].backward()
    optimizer.step()
    assert not torch.equal(model.lm_head.weight, before)
    weight = model.bfloat16().lm_head.weight
    assert weight.dtype == torch.bfloat16 and weight.isfinite().all()
    tensor = big({}).lm_head.weight.data
    del model
    assert tensor.isfinite().all()


def test_a_small_model_stays_where_it_is():
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=8))
    place = model.lm_head.weight.data_ptr()
    assert move_weights(model) == "" and model.lm_head.weight.data_ptr() == place
