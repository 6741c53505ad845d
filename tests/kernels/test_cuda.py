"""On a CUDA card: every variant trains and decodes there as it does on a CPU, at odd widths too."""
import pytest
import torch
from arms import ARMS, TINY, build, tokens

from configurator import ConfigError
from decode import sampling
from decode.context import Cache
from decode.quantized import quantize
from model import GPT, GPTConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")
every_arm = pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS.keys())
WIDTHS = dict(n_embd=100, n_head=4), dict(n_embd=20, n_head=2), dict(n_embd=60, n_head=3)
DTYPES = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def exact():
    """fp32 products in fp32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@every_arm
def test_a_card_gives_the_logits_the_gradients_and_the_tokens_of_a_cpu(arm):
    here, there, idx = build(arm, std=0.2), build(arm, std=0.2).cuda(), tokens(2, 13)
    logits = [here(idx)[0], there(idx.cuda())[0].cpu()]
    torch.testing.assert_close(*logits, atol=2e-4, rtol=0)
    losses = [here(idx, idx.roll(-1, 1))[1], there(idx.cuda(), idx.roll(-1, 1).cuda())[1]]
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(here.named_parameters(), there.parameters()):
        if p.grad is not None and p.grad.abs().max() > 1e-6:
            assert (p.grad - q.grad.cpu()).norm() <= 1e-2 * p.grad.norm() + 1e-5, name
    for policy in (False, True):
        expected = here.use_policy(policy).generate(idx[:1], 20, temperature=0)
        found = there.use_policy(policy).generate(idx[:1].cuda(), 20, temperature=0)
        assert torch.equal(found.cpu(), expected)


@every_arm
def test_odd_widths_train_and_decode_on_a_card(arm):
    done = 0
    for width in WIDTHS:
        for dtype in DTYPES:
            try:
                model = GPT(GPTConfig(**TINY | dict(block_size=80, n_layer=3) | width | arm), seed=1).cuda()
            except ConfigError:                                 # in one sentence
                continue
            model.compute_dtype = dtype
            idx = tokens(2, 76).cuda()
            loss = model.train()(idx, idx)[1]
            loss.backward()
            assert torch.isfinite(loss)
            model.eval()
            model.compute_dtype = None
            model.to(dtype)
            for rows, length in ((1, 3), (2, 70), (1, 77)):
                model.generate(tokens(rows, length).cuda(), 8, temperature=0)
            done += 1
    assert done or arm.keys() & {"columns", "dendrites", "compartments", "experts", "weights"}


@every_arm
def test_decoding_on_a_card_follows_a_step_of_a_fused_optimizer(arm):
    model, prompt = build(arm, std=0.2).cuda(), tokens(1, 5).cuda()
    model.generate(prompt, 20, temperature=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    idx = tokens(2, 16).cuda()
    model(idx, idx)[1].backward()
    optimizer.step()
    anew = build(arm).cuda()
    anew.load_state_dict(model.state_dict())
    assert torch.equal(model.generate(prompt, 20, temperature=0), anew.generate(prompt, 20, temperature=0))


STEPS = {"gpt2": {}, "modern": dict(norm="rmsnorm", bias=False, pos="rope", act="relu2", qk_norm=True,
                                    qk_gain=2.0, window=5, window_pattern="SL"),
         "swiglu": dict(act="swiglu", softcap=15.0), "tanh": dict(act="gelu_tanh", mlp_units=72),
         "gate": dict(event_gate=True, act="relu2")}


@pytest.mark.parametrize("width", [dict(n_embd=64, n_head=2), dict(n_embd=100, n_head=2),
                                   dict(n_embd=768, n_head=12)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arm", STEPS)
def test_a_replayed_step_of_five_kernels_a_layer_gives_the_logits_of_forward(arm, dtype, width):
    """Rows at columns of their own; the recorded step gives the same bits as the one that was launched."""
    model = build(STEPS[arm], std=0.05, block_size=200, **width).cuda().to(dtype)
    loose = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    for rows in (1, 3, 8):
        history, ends = tokens(rows, 200).cuda(), [150, 3, 70, 2, 99, 64, 65, 128][:rows]
        with torch.inference_mode():
            mine, other = Cache(model, rows, 200), Cache(model, rows, 200)
            for cache in (mine, other):
                sampling.read(model, cache, history, [0] * rows, [end - 1 for end in ends], False)
            step, forward = (sampling.Step(model, cache, history, 31) for cache in (mine, other))
            assert step.card
            for more in range(8):
                found = step([end + more for end in ends]).clone()
                again = step.card.step()
                assert torch.equal(found, again)
                forward.start.copy_(step.start)
                right = model.head(forward.states())[:, :31]
                assert (found - right).abs().max() <= loose * max(1, right.abs().max())
        assert len(step.card.launches) <= 5 * model.config.n_layer + 5


CHOICES = {"screen": dict(act="relu2", mlp_screen=4, mlp_live=0.25), "topk": dict(mlp_topk=0.1),
           "winners": dict(mlp_topk=0.5, mlp_topk_group=4), "columns": dict(columns=8, columns_active=2),
           "experts": dict(experts=4, experts_active=2), "predict": dict(mlp_topk=0.1, mlp_predict=16)}


@pytest.mark.parametrize("arm", CHOICES)
def test_a_replayed_step_of_chosen_units_gives_the_logits_of_forward(arm):
    """In fp32; a score that lies at an edge may fall on its other side, so a row here and there is further
    away. The recorded step gives the same bits as the one that was launched."""
    model = build(CHOICES[arm], std=0.05, block_size=64, n_embd=128, n_head=2).cuda().use_policy()
    for rows in (1, 3, 8):
        history, ends, apart = tokens(rows, 64).cuda(), [50, 3, 40, 2, 33, 16, 17, 31][:rows], []
        with torch.inference_mode():
            mine, other = Cache(model, rows, 64), Cache(model, rows, 64)
            for cache in (mine, other):
                sampling.read(model, cache, history, [0] * rows, [end - 1 for end in ends], False)
            step, forward = (sampling.Step(model, cache, history, 31) for cache in (mine, other))
            assert step.card
            for more in range(8):
                found = step([end + more for end in ends]).clone()
                assert torch.equal(found, step.card.step())
                forward.start.copy_(step.start)
                right = model.head(forward.states())[:, :31]
                apart.append((found - right).abs().amax(dim=1) / right.abs().max())
        apart = torch.cat(apart)
        assert apart.quantile(0.5) <= 1e-3 and apart.max() <= 0.1
        assert len(step.card.launches) <= (5 + (arm == "predict")) * model.config.n_layer + 5


@pytest.mark.parametrize("how", [dict(temperature=0), dict(top_k=5), dict(top_p=0.8, temperature=0.7),
                                 dict(min_p=0.1, repetition_penalty=1.3)], ids=str)
def test_a_card_draws_the_ids_that_the_decode_engine_draws(how):
    """Sums of another order may decide otherwise once in many thousands of draws: the seed is fixed."""
    model, prompt, found = build({}, std=0.3), tokens(3, 5), []
    for place in ("cpu", "cuda"):
        torch.manual_seed(4)
        found.append(model.to(place).generate(prompt.to(place), 11, draws="engine", **how).cpu())
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["int8", "q4_all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arm", STEPS)
def test_a_replayed_step_in_whole_numbers_gives_the_logits_of_forward(arm, dtype, kind):
    """An input near a half may be rounded to its other neighbour."""
    model = quantize(build(STEPS[arm], std=0.05, block_size=64, n_embd=128, n_head=2), kind).cuda().to(dtype)
    for rows in (1, 3, 8):
        history, ends = tokens(rows, 64).cuda(), [50, 3, 40, 2, 33, 16, 17, 31][:rows]
        with torch.inference_mode():
            mine, other = Cache(model, rows, 64), Cache(model, rows, 64)
            for cache in (mine, other):
                sampling.read(model, cache, history, [0] * rows, [end - 1 for end in ends], False)
            step, forward = (sampling.Step(model, cache, history, 31) for cache in (mine, other))
            assert step.card
            for more in range(8):
                found = step([end + more for end in ends]).clone()
                forward.start.copy_(step.start)
                right = model.head(forward.states())[:, :31]
                assert (found - right).abs().max() <= 0.1 * right.abs().max()
        assert len(step.card.launches) <= 5 * model.config.n_layer + 5


PARTED = {"exits": dict(exits="1,2", n_layer=4), "ponder": dict(ponder=3),
          "hierarchy": dict(hierarchy=3, n_layer=3),
          "dendrites": dict(dendrites=2, dendrites_active=1), "attn_topk": dict(attn_topk=0.5),
          "compartments": dict(compartments=2)}


@pytest.mark.parametrize("arm", [*STEPS, *PARTED])
def test_generation_on_a_card_gives_the_ids_of_the_step_that_it_replaces(arm):
    """Where tokens part ways too, without the host."""
    shape = dict(n_embd=64, n_head=2) if arm in PARTED else {}
    model = build((STEPS | PARTED)[arm], std=0.2, block_size=64, **shape).cuda().use_policy()
    model.choose(leave_at=0.5 if arm == "exits" else None)
    for rows in (1, 8):
        new = [model.choose(forward=why).generate(tokens(rows, 7).cuda(), 50, temperature=0)
               for why in ("", "it is compared")]
        assert torch.equal(*new)
    model.choose(forward="")
    lengths = [2, 5, 7]
    uneven = model.generate(tokens(3, 7).cuda(), 20, temperature=0, lengths=lengths)
    model.choose(forward="it is compared")
    assert torch.equal(uneven, model.generate(tokens(3, 7).cuda(), 20, temperature=0, lengths=lengths))
