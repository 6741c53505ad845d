"""Windows by FlexAttention: which it takes, what a mask lists, the values of the blocks. On a CPU torch
computes it without a kernel, and its refusal of gradients there is lifted; on a card it runs as it is."""
import importlib

import pytest
import torch
from arms import tokens

import layers
from layers import attend_blocks, attend_window
from model import GPT, GPTConfig

flex = importlib.import_module("kernels.flex")
attention = importlib.import_module("torch.nn.attention.flex_attention")
cards = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")
WINDOWS = [(1024, 128), (1024, 1), (1100, 100), (1280, 129), (1024, 1000), (1027, 300), (2048, 512)]
CUDA, BF16 = torch.device("cuda"), torch.bfloat16


@pytest.fixture
def here(monkeypatch):
    """A CPU that counts as a card, and a compiler that makes no kernels."""
    torch.compiler.reset()
    monkeypatch.setattr(flex, "able", torch.compiler.assume_constant_result(lambda device: True))
    monkeypatch.setattr(layers, "fused", lambda device, dtype, T, width, dropout: T >= 1024 and not dropout)
    monkeypatch.setattr(attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "compiled_shapes", set())
    monkeypatch.setattr(flex, "masks", flex.Masks())
    monkeypatch.setattr(flex, "compiled", lambda: torch.compile(
        flex.flex_attention, backend="aot_eager", dynamic=False, fullgraph=True))


@pytest.mark.parametrize("changed, taken", [
    ({}, True), (dict(dtype=torch.float16), True), (dict(tokens=8192), True), (dict(tokens=1023), False),
    (dict(dropout=0.1), False), (dict(dtype=torch.float32), False), (dict(device=torch.device("cpu")), False),
    (dict(device=torch.device("meta")), False), (dict(width=48), False), (dict(width=8), False),
    *((dict(width=width), True) for width in (16, 32, 64, 128, 256))], ids=str)
def test_flexattention_takes_long_windows_of_a_card_in_16_bits_without_dropout(changed, taken):
    keys = dict(device=CUDA, dtype=BF16, tokens=1024, width=64, dropout=0.0) | changed
    assert layers.fused(**keys) == taken


def test_a_card_without_a_compiler_or_too_old_has_the_blocks(monkeypatch):
    for triton, capability, off, expected in (("there", (8, 6), False, True), (None, (8, 6), False, False),
                                              ("there", (7, 5), False, False),
                                              ("there", (9, 0), True, False)):
        monkeypatch.setattr(flex, "find_spec", lambda name, found=triton: found)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        with torch._dynamo.config.patch(disable=off):
            assert flex.able(CUDA) == expected
            said = layers.window_path(GPTConfig(window=128), CUDA, BF16)
        assert said == "windows: " + ("FlexAttention" if expected else "plain products of blocks")
    assert "blocks" in layers.window_path(GPTConfig(window=128, dropout=0.1), CUDA, BF16)
    monkeypatch.setattr(flex, "able", lambda device: False)
    assert flex.attend(*torch.randn(3, 1, 1, 1024, 16), 8) is None


@pytest.mark.parametrize("T, window", WINDOWS)
def test_a_mask_lists_the_blocks_that_torch_finds_by_looking_at_all_pairs(T, window):
    mine = flex.make_mask(T, window, torch.device("cpu"))
    exact = attention.create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < window), None, None, T, T,
                                        device="cpu")
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, others = (getattr(mask, f"{kind}_num_blocks")[0, 0] for mask in (mine, exact))
        assert torch.equal(counts, others) and counts.dtype == torch.int32
        for row, (found, expected) in enumerate(zip(*(getattr(mask, f"{kind}_indices")[0, 0]
                                                      for mask in (mine, exact)))):
            assert torch.equal(found[:counts[row]], expected[:counts[row]])
    assert mine.shape == exact.shape and mine.BLOCK_SIZE == exact.BLOCK_SIZE


@pytest.mark.parametrize("whole", [False, True], ids=["alone", "in a compiled model"])
@pytest.mark.parametrize("T, window", [(1100, 100), (1024, 1000), (1029, 1)])
def test_it_gives_the_values_and_the_gradients_of_the_blocks(here, T, window, whole):
    parts = torch.randn(3, 1, 2, T, 32, dtype=torch.float64)
    found, exact = parts.clone().requires_grad_(), parts.clone().requires_grad_()
    run = lambda t: attend_window(window, *t.unbind(0), None, 0.0)
    y = (torch.compile(run, backend="aot_eager", fullgraph=True) if whole else run)(found)
    expected = attend_blocks(*exact.unbind(0), window, 0.0)
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(y)
    y.backward(weights)
    expected.backward(weights)
    torch.testing.assert_close(found.grad, exact.grad)
    assert [*vars(flex.masks)] == [f"{T} tokens, window {window}, cpu"]
    assert len(flex.compiled_shapes) == 1 - whole


def test_prompts_of_many_lengths_are_padded_to_few_and_more_shapes_run_as_blocks(here):
    with torch.inference_mode():
        for T in (1024, 1025, 1500, 2048, 2047):
            q, k, v = torch.randn(3, 1, 2, T, 16)
            torch.testing.assert_close(attend_window(64, q, k, v, None, 0.0), attend_blocks(q, k, v, 64, 0.0))
        assert {name.partition(" ")[0] for name in vars(flex.masks)} == {"1024", "2048"}
        for window in range(65, 80):
            torch.testing.assert_close(attend_window(window, q, k, v, None, 0.0),
                                       attend_blocks(q, k, v, window, 0.0))
    assert len(flex.compiled_shapes) == flex.SHAPES
    with torch.no_grad():                                          # an evaluation has the length of training
        flex.compiled_shapes.clear()
        attend_window(64, *torch.randn(3, 1, 2, 1500, 16), None, 0.0)
    assert "1500 tokens, window 64, cpu" in vars(flex.masks)
    mask = next(iter(vars(flex.masks).values()))
    assert not mask.kv_indices.is_inference(), "training may use it too"


@pytest.mark.parametrize("flags", [{}, dict(recompute=True), dict(hierarchy=2, n_layer=3, block_size=2200),
                                   dict(n_kv_head=1, window_pattern="SL")], ids=str)
def test_a_compiled_model_takes_it_into_its_one_graph(here, monkeypatch, flags):
    keys = dict(block_size=1100, vocab_size=31, n_layer=2, n_head=2, n_embd=32, window=100,
                window_pattern="S") | flags
    model, idx, found = GPT(GPTConfig(**keys), seed=1).train(), tokens(1, keys["block_size"]), []
    for run in (torch.compile(model, backend="aot_eager", fullgraph=True), model):
        model.zero_grad()
        loss = run(idx, idx)[1]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
        monkeypatch.setattr(layers, "fused", lambda *words: False)
    assert len(vars(flex.masks)) == 1 + ("hierarchy" in flags)
    for compiled, exact in zip(*found):
        assert (compiled - exact).norm() <= 1e-5 * exact.norm()


@cards
@pytest.mark.parametrize("width", [16, 32, 64, 128, 256])
def test_a_card_gives_the_values_and_the_gradients_of_the_blocks(width):
    for T, window in ((1024, 128), (1100, 100)):
        parts = torch.randn(3, 2, 2, T, width, device="cuda")
        found, exact = parts.bfloat16().requires_grad_(), parts.bfloat16().float().requires_grad_()
        y, expected = attend_window(window, *found.unbind(0), None, 0.0), attend_blocks(*exact.unbind(0),
                                                                                      window, 0.0)
        weights = torch.randn_like(expected)
        y.backward(weights.bfloat16())
        expected.backward(weights)
        for mine, theirs in ((y, expected), (found.grad, exact.grad)):
            assert (mine.float() - theirs).norm() <= 2e-2 * theirs.norm()
