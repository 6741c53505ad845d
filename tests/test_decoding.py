"""Generation with the cache equals generation without it, for every arm; filters do what their papers say."""
import pytest
import torch
from arms import ARMS, PAIRS, TINY, build, tokens
from torch.utils._python_dispatch import TorchDispatchMode

import decoding
import sparse_kernels as kernels
from configurator import ConfigError
from context import Cache, CachedContext

every_arm = pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS.keys())
every_arm_and_pair = pytest.mark.parametrize("arm", (ARMS | PAIRS).values(), ids=(ARMS | PAIRS).keys())


def without_cache(model, idx, count):
    """Greedy ids and logits, the cropped window recomputed for every token."""
    seen = []
    for _ in range(count):
        logits = model(idx[:, -model.config.block_size:])[0][:, -1]
        seen.append(logits)
        idx = torch.cat((idx, logits.argmax(-1, keepdim=True)), dim=1)
    return idx, torch.stack(seen)


class Spy(decoding.Sampler):
    """A greedy sampler that keeps the logits it was shown."""

    def __init__(self):
        super().__init__(temperature=0)
        self.logits = []

    def __call__(self, logits, seen):
        self.logits.append(logits)
        return super().__call__(logits, seen)


@every_arm_and_pair
@pytest.mark.parametrize("length", [5, 21])
def test_cached_decode_equals_full_forward_past_block_size(arm, length):
    model, idx, spy = build(arm, std=0.2), tokens(3, length), Spy()
    expected, logits = without_cache(model, idx, 25)
    new = torch.cat(list(decoding.stream(model, idx, 25, spy)), dim=1)
    assert torch.equal(torch.cat((idx, new), 1), expected)
    torch.testing.assert_close(torch.stack(spy.logits), logits, atol=1e-5, rtol=0)


DEPTH = ("hierarchy", "exits", "ponder")         # what decides which layers a token passes
DEEP = {name for name, arm in PAIRS.items() if arm.keys() & {*DEPTH}}
BEHIND_ONE = [pytest.param(arm, id=name, marks=() if name in {*ARMS, *DEEP} else pytest.mark.slow)
              for name, arm in (ARMS | PAIRS).items()]


@pytest.mark.parametrize("arm", BEHIND_ONE)
def test_decoding_behind_one_token_equals_the_full_forward_with_the_policy_too(arm):
    model = build(arm, std=0.2).use_policy()
    for rows in (1, 3):
        idx, spy = tokens(rows, 1), Spy()
        expected, logits = without_cache(model, idx, 9)
        new = torch.cat(list(decoding.stream(model, idx, 9, spy)), dim=1)
        assert torch.equal(torch.cat((idx, new), 1), expected)
        found = torch.stack(spy.logits)                        # a screened head leaves losers at -inf
        torch.testing.assert_close(found, logits.masked_fill(found.isinf(), -torch.inf), atol=1e-5, rtol=0)


class NoHost(TorchDispatchMode):
    """Fails where a number leaves the device, or a shape depends on one: a CUDA graph could not hold it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"), name
        return func(*args, **kwargs or {})


REPLAYED = {name: arm for name, arm in (ARMS | PAIRS).items() if not arm.keys() & {*decoding.HOST_DECIDES}
            and (name in ARMS or "columns" in name or "predict" in name)}


@pytest.mark.parametrize("arm", REPLAYED.values(), ids=REPLAYED.keys())
def test_a_step_that_a_gpu_would_replay_asks_the_host_nothing(arm, monkeypatch):
    """The way of a GPU, with the references in the kernels' place: the same tokens, no host in the step."""
    model, idx = build(arm, std=0.2), tokens(2, 5)
    expected = [model.use_policy(policy).generate(idx, 20, temperature=0) for policy in (False, True)]
    plain = decoding.Step.states

    def watched(step):
        with NoHost():
            return plain(step)

    monkeypatch.setattr(decoding.Step, "states", watched)
    monkeypatch.setattr(decoding, "replays", lambda model, device: True)
    monkeypatch.setattr(kernels, "takes_units", lambda x: x.dim() == 3 and x.size(1) == 1)
    monkeypatch.setattr(kernels, "takes_rows", lambda x: False)
    for policy, right in zip((False, True), expected):
        assert torch.equal(model.use_policy(policy).generate(idx, 20, temperature=0), right)


def test_a_screened_head_draws_the_same_tokens():
    plain, screened = (build(dict(screen=screen, vocab_size=300), std=0.2) for screen in (False, True))
    for how in (dict(temperature=0), dict(top_k=5), dict(top_k=3, top_p=0.8), dict(repetition_penalty=1.3),
                dict(min_p=0.1)):
        said = []
        for model in (plain, screened):
            torch.manual_seed(3)
            said.append(model.generate(tokens(1, 4), 30, **how))
        assert torch.equal(*said), how


@every_arm
def test_prompts_of_different_lengths_share_a_batch(arm):
    model, idx, lengths = build(arm, std=0.2), tokens(4, 12), [3, 12, 1, 7]
    together = model.generate(idx, 20, temperature=0, lengths=lengths)
    for row, n in enumerate(lengths):
        alone, _ = without_cache(model, idx[row:row + 1, :n], 20)
        assert torch.equal(together[row, :n + 20], alone[0]), f"row of length {n}"
        assert (together[row, n + 20:] == 0).all()


def test_slide_is_exact_until_the_block_is_full_and_goes_on_after():
    model, idx = build({}, std=0.2), tokens(2, 4)
    exact = model.generate(idx, 60, temperature=0)
    slide = model.generate(idx, 60, temperature=0, overflow="slide")
    assert torch.equal(exact[:, :17], slide[:, :17]) and exact.shape == slide.shape
    calls = []
    trunk = model.trunk
    model.trunk = lambda idx, ctx: (calls.append(idx.size(1)), trunk(idx, ctx))[1]
    model.generate(idx, 60, temperature=0, overflow="slide")
    assert sum(n > 1 for n in calls) == 1 + 6      # the prompt, then one recomputation every 8 tokens past 16
    calls.clear()
    model.generate(idx, 60, temperature=0)
    assert sum(n == 16 for n in calls) == 60 - 13


def test_the_cache_is_one_tensor_with_the_columns_that_each_layer_needs():
    plain = Cache(build({}), 3, 10)
    assert [layer.shape for layer in plain.layers] == [(2, 3, 2, 10, 8)] * 2
    assert len({layer.untyped_storage().data_ptr() for layer in plain.layers}) == 1
    local = build(dict(window=3, window_pattern="SL", hierarchy=2, n_layer=4))
    assert [layer.size(3) for layer in Cache(local, 1, 10).layers] == [3, 5, 3, 10]
    assert Cache(local, 1, 10).nbytes() == 2 * 16 * 21 * 4


def test_generate_draws_what_an_uncached_loop_draws():
    model, idx = build({}, std=0.2), tokens(2, 5)
    torch.manual_seed(0)
    expected = idx
    for _ in range(30):
        logits = model(expected[:, -16:])[0][:, -1] / 0.7
        top = logits.topk(5).values[:, [-1]]
        probabilities = logits.masked_fill(logits < top, -torch.inf).softmax(-1)
        expected = torch.cat((expected, torch.multinomial(probabilities, 1)), 1)
    torch.manual_seed(0)
    assert torch.equal(model.generate(idx, 30, temperature=0.7, top_k=5), expected)


def kept(logits, **settings):
    sampler = decoding.Sampler(**settings)
    return torch.isfinite(sampler.filtered(torch.tensor([logits]).log())).tolist()[0]


def test_top_k_top_p_and_min_p_keep_what_they_should():
    p = [0.1, 0.5, 0.25, 0.15]
    assert kept(p, top_k=2) == [False, True, True, False]
    assert kept(p, top_k=9) == [True] * 4
    assert kept(p, top_p=0.6) == [False, True, True, False]
    assert kept(p, top_p=0.49) == [False, True, False, False]
    assert kept(p, top_p=1.0) == [True] * 4
    assert kept(p, min_p=0.4) == [False, True, True, False]
    assert kept(p, top_k=3, top_p=0.55, min_p=0.6) == [False, True, False, False]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    sampler = decoding.Sampler(temperature=0, repetition_penalty=2.0)
    seen = torch.tensor([[True, False, False]])
    assert sampler(torch.tensor([[3.0, 2.0, 0.0]]), seen).item() == 1
    assert sampler(torch.tensor([[-1.0, -1.5, -1.9]]), seen).item() == 1
    assert sampler(torch.tensor([[3.0, 1.0, 0.0]]), seen).item() == 0


def test_repetition_penalty_ignores_the_padding_before_short_prompts():
    model = build({}, std=0.2)
    idx = tokens(2, 6) % 30 + 1                          # id 0 never occurs, but a pad must not count as id 0
    together = model.generate(idx, 10, temperature=0, lengths=[2, 6], repetition_penalty=3.0)
    alone = model.generate(idx[:1, :2], 10, temperature=0, repetition_penalty=3.0)
    assert torch.equal(together[0, :12], alone[0])


@every_arm
def test_prefill_can_continue_a_cache(arm):
    model, idx = build(arm, std=0.2), tokens(2, 12)
    cache = Cache(model, 2, 16)
    with torch.no_grad():
        first = model.trunk(idx[:, :5], CachedContext(cache, 0, 5, idx))
        rest = model.trunk(idx[:, 5:], CachedContext(cache, 5, 7, idx))
        whole = model.trunk(idx, CachedContext(Cache(model, 2, 16), 0, 12, idx))
    torch.testing.assert_close(torch.cat((first, rest), 1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bad", [dict(temperature=-1), dict(top_p=0.0), dict(min_p=2.0),
                                 dict(repetition_penalty=0.0)])
def test_bad_sampling_settings_are_named(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        decoding.Sampler(**bad)


def test_bad_prompts_are_named():
    model = build({})
    for arguments, word in [(dict(idx=tokens(1, 0)), "empty"),
                            (dict(idx=tokens(2, 4), lengths=[5, 1]), "lengths"),
                            (dict(idx=tokens(1, 4), overflow="wrap"), "overflow")]:
        with pytest.raises(ConfigError, match=word):
            model.generate(max_new_tokens=2, **arguments)
    assert torch.equal(model.generate(tokens(1, 4), 0), tokens(1, 4))


def test_tiny_matches_its_vocabulary():
    assert tokens(1, 5).max() < TINY["vocab_size"]
