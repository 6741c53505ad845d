"""Generation with the cache equals generation without it, for every arm; filters do what their papers say."""
import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from arms import ARMS, PAIRS, TINY, build, from_a_file, tokens
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_kernels as kernels
from configurator import ConfigError
from decode import calibrate, counters, engine, sampling
from decode.context import Cache, CachedContext
from decode.quantized import (
    BITS,
    PARTS,
    Quantized,
    QuantizedByUnit,
    kept_levels,
    kinds_in,
    quantize,
    whole_parts,
)
from layers import NeuronMajor, settle
from model import GPT
from training import optimizers

built = pytest.mark.skipif(kernels.cpu_library()[0] is None, reason=kernels.cpu_library()[1])
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


class Spy(sampling.Sampler):
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
    new = torch.cat(list(sampling.stream(model, idx, 25, spy)), dim=1)
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
        new = torch.cat(list(sampling.stream(model, idx, 9, spy)), dim=1)
        assert torch.equal(torch.cat((idx, new), 1), expected)
        found = torch.stack(spy.logits)                        # a screened head leaves losers at -inf
        torch.testing.assert_close(found, logits.masked_fill(found.isinf(), -torch.inf), atol=1e-5, rtol=0)


class NoHost(TorchDispatchMode):
    """Fails where a number leaves the device, or a shape depends on one: a CUDA graph could not hold it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"), name
        return func(*args, **kwargs or {})


REPLAYED = {name: arm for name, arm in (ARMS | PAIRS).items() if not arm.keys() & {*sampling.HOST_DECIDES}
            and (name in ARMS or "columns" in name or "predict" in name)}


@pytest.mark.parametrize("arm", REPLAYED.values(), ids=REPLAYED.keys())
def test_a_step_that_a_gpu_would_replay_asks_the_host_nothing(arm, monkeypatch):
    """The way of a GPU, with the references in the kernels' place: the same tokens, no host in the step."""
    model, idx = build(arm, std=0.2), tokens(2, 5)
    expected = [model.use_policy(policy).generate(idx, 20, temperature=0) for policy in (False, True)]
    plain = sampling.Step.states

    def watched(step):
        with NoHost():
            return plain(step)

    monkeypatch.setattr(sampling.Step, "states", watched)
    monkeypatch.setattr(sampling, "recorded_step", sampling.Step)
    monkeypatch.setattr(sampling, "gathers", lambda *_: True)
    for policy, right in zip((False, True), expected):
        assert torch.equal(model.use_policy(policy).generate(idx, 20, temperature=0), right)


def test_a_gpus_step_reads_chosen_rows_where_all_weights_are_finite_and_whole(monkeypatch):
    monkeypatch.setattr(kernels, "triton_kernels", lambda: object())
    model, card = build(ARMS["columns"], std=0.2), torch.device("cuda")
    assert sampling.gathers(model, 8, card) and not sampling.gathers(model, 9, card)
    assert not sampling.gathers(model, 1, torch.device("cpu"))
    assert not sampling.gathers(quantize(build(ARMS["columns"], std=0.2), "int8"), 1, card)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[3, 5] = torch.nan
    assert not sampling.gathers(model, 1, card)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width, outlier", [(36, 1), (64, 1), (64, 60), (128, 1), (192, 300)])
def test_a_screened_head_draws_the_same_tokens(width, outlier, dtype):
    """At widths whose inputs are rounded to 8 bits too (multiples of 64) and others; of one large input all
    others are few steps."""
    plain, screened = (build(dict(screen=screen, vocab_size=300, n_embd=width), std=0.2).to(dtype)
                       for screen in (False, True))
    whole = torch.randint(-126, 127, (300, width), generator=torch.Generator().manual_seed(1))
    whole[:, 0], whole[:, 5] = 127, whole[0, 5]         # a copy without error: what is lost is x's
    for model in (plain, screened):
        model.transformer.ln_f.weight.data[5] *= outlier
        model.lm_head.weight.data.copy_(whole / 128)
    for how in (dict(temperature=0), dict(top_k=5), dict(top_k=3, top_p=0.8), dict(repetition_penalty=1.3),
                dict(min_p=0.1)):
        said = []
        for model in (plain, screened):
            torch.manual_seed(3)
            said.append(model.generate(tokens(1, 4), 30, **how))
        assert torch.equal(*said), how


def redrawn(model):
    """Other weights under the names of a model's: its own in another order."""
    return {name: p.detach().flatten().flip(0).view(p.shape)
            for name, p in model.named_parameters(remove_duplicate=False)}


def decoded(model, idx, count):
    """The logits that a sampler sees."""
    spy = Spy()
    list(sampling.stream(model, idx, count, spy))
    return torch.stack(spy.logits)


def stepped(model, optimizer):
    idx = tokens(2, 9)
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    optimizer.step()
    return model


def written(model, into):
    for p, new in zip(model.parameters(), [redrawn(model)[name] for name, _ in model.named_parameters()]):
        into(p, new)
    return model


KEYS = dict(weight_decay=0.1, learning_rate=0.3, beta1=0.9, beta2=0.95, muon_learning_rate=0.3,
            muon_momentum=0.95, muon_steps=5)
CHANGES = {
    "fused AdamW": lambda m: stepped(m, torch.optim.AdamW(m.parameters(), lr=0.3, fused=True)),
    "foreach AdamW": lambda m: stepped(m, torch.optim.AdamW(m.parameters(), lr=0.3, foreach=True)),
    "our AdamW": lambda m: stepped(m, m.configure_optimizers(0.1, 0.3, (0.9, 0.95), "cpu")),
    "our Muon": lambda m: stepped(m, optimizers.build(m, SimpleNamespace(optimizer="muon", **KEYS), "cpu")),
    "train and eval": lambda m: stepped(m.train(), torch.optim.AdamW(m.parameters(), lr=0.3)).eval(),
    "in place": lambda m: written(m, torch.no_grad()(lambda p, new: p.copy_(new))),
    "behind autograd": lambda m: written(m, lambda p, new: p.data.copy_(new)),
    "other memory": lambda m: written(m, lambda p, new: setattr(p, "data", new)),
    "a state dict": lambda m: (m.load_state_dict(redrawn(m)), m)[1],
    "an assigned one": lambda m: (m.load_state_dict(redrawn(m), assign=True), m)[1],
    "a dtype and back": lambda m: m.to(torch.bfloat16).to(torch.float32),
    "a copy": lambda m: written(copy.deepcopy(m), lambda p, new: p.data.copy_(new)),
}


@every_arm
def test_decoding_follows_every_change_of_the_weights(arm):
    """Whatever is computed from weights for decoding: a change that torch does not note is none the less one,
    and a model that never leaves eval mode decodes as a new one with its weights does."""
    model = build(arm, std=0.2)
    model.generate(tokens(1, 4), 6, temperature=0)
    for name, change in CHANGES.items():
        before = model.lm_head.weight.detach().clone()
        model, fresh = change(model), GPT(model.config, init=False).eval()
        fresh.load_state_dict(model.state_dict())
        assert not torch.equal(model.lm_head.weight, before) and model.lm_head.weight.isfinite().all(), name
        said, right = (decoded(m, tokens(1, 4), 6) for m in (model, fresh))
        torch.testing.assert_close(said, right, atol=1e-5, rtol=1e-5, msg=lambda m: f"{name}: {m}")
    assert counters.counters(model, tokens(2, 8)) == counters.counters(fresh, tokens(2, 8))


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
    sampler = sampling.Sampler(**settings)
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
    sampler = sampling.Sampler(temperature=0, repetition_penalty=2.0)
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


@pytest.mark.parametrize("bad", [
    dict(temperature=-1), dict(temperature=1e-40), dict(temperature=float("nan")),
    dict(temperature=float("inf")), dict(top_p=0.0), dict(top_p=float("nan")), dict(top_p=-0.5),
    dict(min_p=2.0), dict(min_p=float("nan")), dict(top_k=-1), dict(top_k=2.5), dict(top_k=float("nan")),
    dict(repetition_penalty=0.0), dict(repetition_penalty=-1.0), dict(repetition_penalty=float("nan")),
    dict(repetition_penalty=float("inf")), dict(repetition_penalty=1e-40), dict(vocab_size=0)], ids=str)
def test_bad_sampling_settings_are_named(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        sampling.Sampler(**bad)
    if "vocab_size" not in bad:
        with pytest.raises(ConfigError, match=next(iter(bad))):
            build({}).generate(tokens(1, 4), 2, **bad)


@pytest.mark.parametrize("good", [dict(temperature=0), dict(temperature=1e-6), dict(top_k=0),
                                  dict(top_k=None), dict(top_k=1000), dict(min_p=1.0), dict(top_p=1e-45),
                                  dict(repetition_penalty=1000), dict(temperature=1e6)], ids=str)
def test_the_ends_of_what_sampling_settings_may_be_draw_ids(good):
    assert build({}, std=0.2).generate(tokens(2, 4), 5, **good).lt(31).all()


@pytest.mark.parametrize("how", [dict(temperature=0), dict(top_k=1), dict(), dict(top_k=3), dict(top_p=0.9),
                                 dict(min_p=0.1), dict(repetition_penalty=1.5)], ids=str)
def test_logits_that_are_not_finite_are_one_sentence(how):
    """In any row and at any id; what a screened head has not computed is -inf and fine."""
    sampler, seen = sampling.Sampler(**how), torch.zeros(3, 5, dtype=torch.bool)
    for bad in (torch.nan, torch.inf):
        for row, column in ((0, 0), (1, 3), (2, 4)):
            logits = torch.zeros(3, 5)
            logits[row, column] = bad
            for ask in (sampler, sampler.probabilities):
                with pytest.raises(ConfigError, match="not finite"):
                    ask(logits, seen)
    logits = torch.full((3, 5), -torch.inf)
    with pytest.raises(ConfigError, match="not finite"):
        sampler(logits, seen)
    logits[:, 2] = 1.0
    assert sampler(logits, seen).flatten().tolist() == [2, 2, 2]
    model = build({}, std=0.2)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[3, 3] = torch.nan
    with pytest.raises(ConfigError, match="not finite"):
        model.generate(tokens(2, 4), 3, **how)


def logits_both_ways(model, idx):
    """Logits (B, T, V) behind each token: of the text up to there in plain torch, and of decode steps of one
    token each by the kernels."""
    T, cache = idx.size(1), Cache(model, len(idx), idx.size(1))
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():        # the fused one answers NaN queries with 0
        plain = [model(idx[:, :t + 1])[0] for t in range(T)]
    with torch.inference_mode():
        steps = [model.head(model.trunk(idx[:, t:t + 1], CachedContext(cache, t, 1, idx))) for t in range(T)]
    return torch.cat(plain, dim=1), torch.cat(steps, dim=1)


DAMAGED = ARMS | {"predict, by policy": ARMS["predict"] | dict(policy=True),
                  "relu2+topk": ARMS["relu2"] | ARMS["topk"],
                  "relu2+columns": ARMS["relu2"] | ARMS["columns"],
                  "relu2+experts": ARMS["relu2"] | ARMS["experts"],
                  "columns+topk": ARMS["columns"] | ARMS["topk"],
                  "dendrites+relu2": ARMS["relu2"] | ARMS["dendrites"],
                  "packed": ARMS["two_of_four"] | dict(settled=True),
                  "packed+relu2": ARMS["two_of_four"] | ARMS["relu2"] | dict(settled=True)}


@pytest.mark.parametrize("arm", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_decode_step_hides_no_damaged_weight_that_plain_torch_shows(arm, case):
    """NaN in one weight of each parameter in turn: NaN logits at the same positions of the same rows."""
    model = build({k: v for k, v in arm.items() if k not in ("policy", "settled")}, std=0.2)
    model.use_policy("policy" in arm)
    if "settled" in arm:
        settle(model)
    idx = tokens(1, 7)
    spoilt = [*model.parameters(), *(b for name, b in model.named_buffers() if name.endswith("values"))]
    for number, p in enumerate(spoilt):
        place = torch.unravel_index(torch.tensor(number * 7919 % p.numel()), p.shape)
        with torch.no_grad():
            whole = p[place].clone()
            p[place] = torch.nan
        plain, steps = logits_both_ways(model, idx)
        assert torch.equal(plain.isnan().any(-1), steps.isnan().any(-1)), (number, p.shape, place)
        with torch.no_grad():
            p[place] = whole
        case()
    plain, steps = logits_both_ways(model, idx)
    assert plain.isfinite().all() and steps.isfinite().all()


CHOOSING = {"topk": {}, "winners": {}, "columns": {}, "experts": {}, "predict": dict(policy=True),
            "dendrites": {}, "attn_topk": {}, "relu2+topk": {}, "columns+topk": {}, "two_of_four": {}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CHOOSING)
def test_a_decode_step_breaks_ties_as_the_prompt_does(name, dtype):
    """Where all units, columns, experts, branches or inputs are equal, the same ones are chosen."""
    model = build((ARMS | DAMAGED)[name], std=0.2).use_policy("policy" in CHOOSING[name])
    with torch.no_grad():
        for key, p in model.named_parameters():
            if any(part in key for part in ("c_fc", "router", "guess", "balance", "inhibition")):
                p.fill_(0.5 if key.endswith("c_fc.bias") else 0.0)
            if name == "attn_topk" and ".ln_1." in key:
                p.fill_(0.5 if key.endswith("bias") else 0.0)
            if name == "two_of_four" and p.dim() == 2:
                p.copy_(p.sign() * 0.25)
    model.to(dtype)
    plain, steps = logits_both_ways(model, tokens(1, 11))
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(steps, plain, atol=tolerance, rtol=0)


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


def test_a_weight_that_a_fused_step_damages_is_noticed_by_the_next_stream():
    """Fused optimizers do not raise a weight's version, and nobody has to call train() in between."""
    model, prompt = build(ARMS["relu2"] | dict(n_embd=32)), tokens(1, 5)
    model.generate(prompt, 5, temperature=0)
    down = model.transformer.h[0].mlp.c_proj.weight
    optimizer = torch.optim.AdamW([down], lr=0.1, fused=True)
    down.grad = torch.full_like(down, torch.nan)
    optimizer.step()
    assert down.isnan().all()
    with pytest.raises(ConfigError, match="not finite"):
        model.generate(prompt, 5, temperature=0)


# ------------------------------------------------ weights of whole numbers


def has_no_ops(model):
    """Does a variant wait for its ops, or is its MLP of a class that brings none?"""
    try:
        engine.ops_of(model.transformer.h[0].mlp)
    except engine.NotWritten:
        return True
    return any(getattr(model.config, flag) for flag in engine.WAITING)


@built
@every_arm
def test_a_quantised_model_decodes_what_its_forward_computes(arm, monkeypatch):
    """By a program, where the variant has one, and by forward; logits that differ by more are those of an
    input that lies between two whole numbers, which another order of sums rounds the other way."""
    idx = tokens(3, 5)
    for kind in BITS:
        model = quantize(build(arm, std=0.2), kind)
        expected, logits = without_cache(model, idx, 9)
        with torch.inference_mode():
            program = engine.program_of(model, Cache(model, 3, 16), 31, 1, idx.device)
        assert (not program) == has_no_ops(model)
        for off in (False, True):
            with monkeypatch.context() as patch:
                if off:
                    patch.setattr(engine, "program_of", lambda *_: None)
                spy = Spy()
                new = torch.cat(list(sampling.stream(model, idx, 9, spy)), dim=1)
            assert torch.equal(torch.cat((idx, new), 1), expected)
            found = torch.stack(spy.logits)
            kept = found.isfinite()              # a screened head's may be -inf
            assert (found - logits)[kept].abs().max() < 0.05
            assert (found - logits)[kept].abs().median() < 1e-4


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_arm
def test_a_quantised_program_and_forward_draw_the_same_ids(arm, dtype, monkeypatch):
    """Rows of several lengths, past block_size, with and without the policy that a model was trained for. In
    bf16 as far as forward's two largest logits differ by more than what bf16 rounds away."""
    idx, lengths, edge = tokens(2, 6), [6, 3], 0.05 if dtype == torch.bfloat16 else 0
    for kind, policy in itertools.product(BITS, (False, True)):
        model = quantize(build(arm, std=0.2), kind).to(dtype).use_policy(policy)
        with torch.inference_mode():
            found = torch.cat(list(sampling.stream(model, idx, 12, sampling.Sampler(0), lengths)), dim=1)
        with monkeypatch.context() as patch:
            patch.setattr(engine, "program_of", lambda *_: None)
            spy = Spy()
            expected = torch.cat(list(sampling.stream(model, idx, 12, spy, lengths)), dim=1)
        for row, logits in enumerate(torch.stack(spy.logits, dim=1)):
            first = (found[row] != expected[row]).nonzero()[:1, 0].tolist()
            largest = logits[first].topk(2).values
            assert (largest[:, 0] - largest[:, 1] <= edge).all() and (not first or edge)


def test_quantising_takes_the_large_matrices_and_leaves_the_small_ones():
    model = quantize(build(dict(columns=8, columns_active=2, act="relu2")), "int4")
    block = model.transformer.h[0]
    assert [part.bits for part in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj,
                                   model.lm_head)] == [8, 8, 4, 4, 8]
    assert isinstance(block.mlp.c_proj, QuantizedByUnit) and isinstance(block.mlp.gate.router, nn.Linear)
    names = [name for name, _ in model.named_parameters()]
    assert "transformer.wte.weight" not in names and "transformer.wpe.weight" in names
    assert [name for name in model.state_dict() if name.endswith("wte.weight")] == []
    with torch.inference_mode():
        rows = model.transformer.wte(torch.arange(31)[None], None)[0]
    assert torch.equal(rows, model.lm_head.weight)
    twin = copy.deepcopy(model)
    assert twin.transformer.wte.tied[0] is twin.lm_head is not model.lm_head
    with pytest.raises(ConfigError, match="quantize='int3' must be int8, int4, q4_all"):
        quantize(build({}), "int3")


BY_PART = [",".join(f"{part}={bits}" for part, bits in zip(PARTS, each) if bits)
           for each in itertools.product(("", 4, 8), repeat=3) if any(each)]
ODD = {"gelu": dict(n_embd=34), "relu2": dict(act="relu2", n_embd=70, tie_weights=False),
       "columns": dict(ARMS["columns"], n_embd=70), "2:4": dict(weights="2:4", n_embd=36),
       "2:4 relu2": dict(weights="2:4", act="relu2", n_embd=36, tie_weights=False, mlp_units=100),
       "screened": dict(ARMS["mlp_screen"], n_embd=70)}


def by_part(arm, kind):
    """A model of ODD with random weights, its parts in whole numbers, its thresholds found."""
    model = settle(quantize(build(ODD[arm], std=0.2), kind))
    if calibrate.screened(model):
        calibrate.calibrate(model, tokens(8, 16, seed=3), 0.25)
    return model.use_policy()


@built
@pytest.mark.parametrize("arm", ODD)
@torch.inference_mode()
def test_every_combination_of_bits_by_part_decodes_what_forward_computes(arm):
    """Widths that are no multiples of 32, tied and untied heads. Where an input lies between two whole
    numbers another order of sums rounds it the other way: a few logits differ by more."""
    idx, seen = tokens(2, 4), []
    for kind in (*BY_PART, "mlp=4,attn=16,head=16"):
        model = by_part(arm, kind)
        program = engine.program_of(model, Cache(model, 2, 4), 31, None, idx.device)
        program.begin(idx, [0] * 2, [1] * 2)
        for column in range(4):
            found, expected = program.step().clone(), model(idx[:, :column + 1])[0][:, 0]
            torch.testing.assert_close(found, expected, atol=0.05, rtol=0)
            seen.append((found - expected).abs().median())
    assert len(seen) == 4 * 27 and torch.stack(seen).median() < 1e-5


def test_bits_by_part_take_those_parts_and_leave_the_others():
    plain = build(ODD["relu2"]).state_dict()
    for kind in (*BY_PART, "head=4,mlp=16"):
        said = dict(word.split("=") for word in kind.split(","))
        model = quantize(build(ODD["relu2"]), kind)
        block = model.transformer.h[1]
        for part, linear in (("attn", block.attn.c_proj), ("mlp", block.mlp.c_fc), ("mlp", block.mlp.c_proj),
                             ("head", model.lm_head)):
            bits = int(said.get(part, 16))
            assert getattr(linear, "bits", 16) == bits and isinstance(linear, Quantized) == (bits < 16)
            assert getattr(linear, "codes", torch.empty(0)).numel() > 0 or bits == 16
        state = model.state_dict()
        assert all(torch.equal(state[name], plain[name]) for name in plain.keys() & state.keys())
    tied = quantize(build({}), "mlp=4")
    assert tied.transformer.wte.weight is tied.lm_head.weight is not None


def test_names_are_short_for_bits_by_part():
    for name, bits in BITS.items():
        words_ = [f"{part}={each}" for part, each in zip(PARTS, bits)]
        for kind in (",".join(words_), ",".join(reversed(words_))):
            one, other = (quantize(build(ODD["gelu"], std=0.2), each).state_dict() for each in (name, kind))
            assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("kind", [
    "mlp", "mlp=", "mlp=5", "mlp=04", "=4", "ffn=4", "mlp=4,mlp=8", "mlp=4,", ",", "mlp=4 attn=8", "mlp==4",
    "mlp=4;attn=8", "int8,mlp=4", "MLP=4", "", 8, None, "mlp=q4", "mlp=-4", "mlp=4,attn=8,mlp=4", ["mlp=4"]])
def test_bits_by_part_that_mean_nothing_are_one_sentence(kind):
    says = r"must be int8, int4, q4_all, own, .*mlp=4,attn=8,head=8"
    with pytest.raises(ConfigError, match=says) as caught:
        quantize(build({}), kind)
    assert "\n" not in str(caught.value)


def test_bits_by_part_that_change_nothing_and_twice_are_one_sentence():
    for kind in ("mlp=16", "attn=16,mlp=16,head=16"):
        with pytest.raises(ConfigError, match="leaves all weights as they are"):
            quantize(build({}), kind)
    with pytest.raises(ConfigError, match="whole numbers already"):
        quantize(quantize(build({}), "mlp=4"), "attn=8")


# ------------------------------------------------ a file's own 4 bits


LLAMA = dict(norm="rmsnorm", pos="rope", act="swiglu", bias=False, n_embd=64, n_head=4, n_kv_head=2)
OWN_ARMS = {"llama": LLAMA, "llama of another width": LLAMA | dict(mlp_units=160), "gpt2": dict(n_embd=64),
            "relu2": dict(act="relu2", n_embd=96, n_head=2, tie_weights=False),
            "top half": LLAMA | dict(mlp_topk=0.5), "columns": dict(ARMS["columns"], n_embd=64)}


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arm", OWN_ARMS)
def test_a_files_own_4_bits_are_kept_and_decode_what_forward_computes(arm, dtype):
    """By unit they cannot be kept: 8 bits. A matrix stands for the weights that it had, but for bf16's
    rounding."""
    model = from_a_file(OWN_ARMS[arm])
    before = [getattr(module, name).weight.detach().clone() for _, module, name, _ in whole_parts(model)]
    model = quantize(model.to(dtype), "own").use_policy()
    now = [getattr(module, name) for _, module, name, _ in whole_parts(model)]
    by_unit = [isinstance(each, QuantizedByUnit) for each in now]
    assert kept_levels(model) == [not each for each in by_unit]
    for linear, weight, eight in zip(now, before, by_unit):
        off = (linear.weight.float() - weight).abs()
        assert (off <= 0.02 * weight.abs().amax(1, keepdim=True)).all() or eight
    for rows in (1, 3, 8):
        idx = tokens(rows, 6)
        with torch.inference_mode():
            program = engine.program_of(model, Cache(model, rows, 8), 31, None, idx.device)
            program.begin(idx, [0] * rows, [1] * rows)
            for column in range(6):
                found, expected = program.step().clone(), model(idx[:, :column + 1])[0][:, 0]
                assert (found - expected.float()).abs().median() < (1e-4 if dtype == torch.float32 else 0.05)
                assert (found - expected.float()).abs().max() < (0.1 if dtype == torch.float32 else 1.0)


def test_parts_keep_their_own_4_bits_beside_other_forms():
    model = quantize(from_a_file(LLAMA, parts=("mlp",)), "attn=own,mlp=own,head=8")
    assert [getattr(*each[1:3]).bits for each in whole_parts(model)] == [8, 8, 4, 4] * 2 + [8]
    model = quantize(from_a_file(LLAMA), "mlp=own")
    assert kept_levels(model) == [True] * 4 and isinstance(model.lm_head, nn.Linear)
    for kind in ("own", "mlp=own,attn=8"):
        says = f"quantize='{kind}' keeps the 4 bits of a file, .*take --quantize=int8"
        with pytest.raises(ConfigError, match=says):
            quantize(build(LLAMA, std=0.2), kind)


def test_a_list_of_kinds_is_cut_at_its_names():
    assert kinds_in("int8,mlp=4,attn=8,q4_all,head=8,") == ["int8", "mlp=4,attn=8", "q4_all", "head=8"]
    assert kinds_in("") == [] and kinds_in("int3") == ["int3"]


@built
@pytest.mark.parametrize("arm", ODD)
@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "mlp=q4_0,head=8"])
@torch.inference_mode()
def test_ggmls_rounding_takes_all_weights_along_their_inputs(arm, kind):
    model, before, idx = by_part(arm, kind), build(ODD[arm], std=0.2), tokens(1, 5)
    before = settle(before, pack=False)
    of, everywhere = (kernels.q8_0 if kind == "q8_0" else kernels.q4_0), kind[0] == "q"
    mine = settle(quantize(build(ODD[arm], std=0.2), kind), pack=False)
    for name, weight in before.state_dict().items():
        if name.endswith(("c_fc.weight", "c_proj.weight", "c_attn.weight")) and (everywhere or "mlp" in name):
            assert torch.equal(mine.state_dict()[name], of(weight)) and not torch.equal(of(weight), weight)
        elif name in mine.state_dict() and not name.endswith(("lm_head.weight", "wte.weight")):
            assert torch.equal(mine.state_dict()[name].nan_to_num(7), weight.nan_to_num(7))
    if everywhere:
        head = mine.lm_head.weight
        assert torch.equal(head, of(before.lm_head.weight))
        assert (mine.transformer.wte.weight is head) == mine.config.tie_weights
    program = engine.program_of(model, Cache(model, 1, 5), 31, None, idx.device)
    program.begin(idx, [0], [1])
    for column in range(5):
        found, expected = program.step().clone(), model(idx[:, :column + 1])[0][:, 0]
        torch.testing.assert_close(found, expected, atol=1e-4 if everywhere else 0.05, rtol=0)


@torch.no_grad()
def test_input_moments_are_the_mean_squares_of_what_matrices_read():
    idx, model = tokens(6, 16, seed=4), build(ODD["gelu"], std=0.2)
    found = calibrate.input_moments(model, idx)
    assert len(found) == 9 and model.choices == build({}).choices
    fc, seen = model.transformer.h[1].mlp.c_fc, []
    hook = fc.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    states = []
    other = model.lm_head.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    model(idx, idx)
    hook.remove(), other.remove()
    for name, x in (("transformer.h.1.mlp.c_fc", seen[0]), ("lm_head", states[0])):
        torch.testing.assert_close(found[name], x.square().mean((0, 1)))
    assert not any(module._forward_pre_hooks for module in model.modules())
    uniform = quantize(copy.deepcopy(model), "q4_all")
    weighted = quantize(copy.deepcopy(model), "q4_all", moments=found)
    lost = [sum((moments * (quantized.get_submodule(name).weight - model.get_submodule(name).weight).square())
                .sum() for name, moments in found.items()) for quantized in (uniform, weighted)]
    assert lost[1] < 0.97 * lost[0]


@every_arm
def test_every_arm_has_input_moments_and_takes_them(arm):
    """Their sizes are those of the matrices; counters are left alone, training mode and hooks as well."""
    model, idx = build(arm, std=0.2), tokens(2, 16, seed=4)
    before = {key: value for module in model.modules() for key, value in vars(module).items()
              if key in ("layers_run", "steps_run", "tokens_run")}
    found = calibrate.input_moments(model, idx)
    assert "lm_head" in found and not any(module._forward_pre_hooks for module in model.modules())
    for name, moments in found.items():
        assert moments.shape == (model.get_submodule(name).in_features,) and moments.isfinite().all()
    assert before == {key: value for module in model.modules() for key, value in vars(module).items()
                      if key in ("layers_run", "steps_run", "tokens_run")}
    quantize(model, "q4_all", moments=found)
    assert model(idx, idx)[1].isfinite()


def test_two_of_four_is_quantised_as_it_is_pruned_packed_or_not():
    idx = tokens(2, 9)
    for act in ("relu2", "gelu"):
        models = [build(dict(weights="2:4", act=act), std=0.2) for _ in range(3)]
        settle(models[1]), settle(models[2], pack=False)
        models = [quantize(model, "int8") for model in models]
        with torch.no_grad():
            logits = [model(idx, idx)[0] for model in models]
        assert (models[0].transformer.h[0].attn.c_attn.weight == 0).float().mean() >= 0.5
        assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@built
@pytest.mark.parametrize("part", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"])
@pytest.mark.parametrize("kind", ["int8", "q4_all"])
@pytest.mark.parametrize("arm", ["gpt2", "relu2", "topk", "columns", "attn_topk"])
def test_a_quantised_model_hides_no_damaged_weight(arm, kind, part):
    model = build(ARMS[arm], std=0.2)
    with torch.no_grad():
        model.get_submodule("transformer.h.1." + part).weight[:, 5] = float("nan")
    with pytest.raises(sampling.Damaged):
        list(sampling.stream(quantize(model, kind), tokens(1, 3), 6, sampling.Sampler(0)))


@built
def test_a_quantised_step_reads_fewer_bytes():
    with torch.inference_mode():
        found = {}
        for kind in ("dense", *BITS):
            model = build(dict(n_embd=64, act="relu2", vocab_size=512)).bfloat16()
            model = model if kind == "dense" else quantize(model, kind)
            cache = Cache(model, 1, 16)
            program = engine.program_of(model, cache, 512, 1, torch.device("cpu"))
            history = tokens(1, 16)
            program.begin(history, [0], [1])
            with kernels.counting() as tally:
                program.step()
            found[kind] = tally.bytes
    assert found["dense"] > 1.7 * found["int8"] > 1.7 * found["int4"] > 1.7 * found["q4_all"] > 0


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_output_of_large_weights_costs_the_others_no_precision(bits, dtype):
    """W_down by unit: a row holds a weight of each output, and its scale is that of the largest."""
    down = NeuronMajor(70, 40, True, std=0.1)
    torch.manual_seed(0)
    with torch.no_grad():
        down.weight.normal_()
        down.bias.normal_()
        down.weight[3] *= 1000.0
        down.weight[4] = 0.0
    whole = QuantizedByUnit(down, bits).to(dtype)
    most = 2 * down.weight.abs().amax(dim=1, keepdim=True) / (127 if bits == 8 else 7)
    assert ((whole.weight.float() - down.weight).abs() <= 0.6 * most).all()
    a = torch.randn(2, 1, 70).relu().to(dtype)
    with torch.inference_mode():
        rows = whole.weight.float().t()
        off = whole(a).float() - (a.float() @ rows + down.bias.to(dtype).float())
        share = 1e-3 if dtype == torch.float32 else 2e-2
        assert (off.abs() <= share * (a.float() @ rows.abs() + 1e-3)).all()


def test_units_rows_of_folders_from_before_their_outputs_had_a_share_load():
    down = NeuronMajor(70, 40, False, std=0.1)
    whole, again = QuantizedByUnit(down, 8), QuantizedByUnit(down, 8, empty=True)
    state = {key: value for key, value in whole.state_dict().items() if key != "across"}
    again.load_state_dict(state)
    assert torch.equal(again.sizes, torch.ones(40)) and torch.equal(again.codes, whole.codes)
