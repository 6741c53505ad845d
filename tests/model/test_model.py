"""What every model holds to, whatever its flags; and that the defaults are GPT-2 as nanoGPT has it."""
import ast
import importlib.util
import math
import os
from pathlib import Path

import pytest
import torch
from arms import ARMS, PAIRS, TINY, build, tokens
from torch.nn import functional as F

from configurator import ConfigError
from layers import attend
from model import GPT, GPTConfig, build_model
from training import checkpoint

ROOT = Path(__file__).resolve().parents[2]
every_arm = pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS.keys())
every_arm_and_pair = pytest.mark.parametrize("arm", (ARMS | PAIRS).values(), ids=(ARMS | PAIRS).keys())


def gpt2_by_hand(state, idx, n_layer, n_head):
    """GPT-2's logits from a state dict with plain functional calls: the specification of the defaults."""
    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[name + ".weight"], state.get(name + ".bias"), 1e-5)

    def linear(x, name):
        return F.linear(x, state[name + ".weight"], state.get(name + ".bias"))

    B, T = idx.shape
    x = F.embedding(idx, state["transformer.wte.weight"]) + state["transformer.wpe.weight"][:T]
    for i in range(n_layer):
        h = f"transformer.h.{i}."
        q, k, v = (t.view(B, T, n_head, -1).transpose(1, 2)
                   for t in linear(norm(x, h + "ln_1"), h + "attn.c_attn").chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, -1)
        x = x + linear(y, h + "attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, h + "ln_2"), h + "mlp.c_fc")), h + "mlp.c_proj")
    return linear(norm(x, "transformer.ln_f"), "lm_head")


@pytest.mark.parametrize("bias", [True, False])
def test_the_defaults_are_gpt2_bit_for_bit(bias):
    model, idx = build(dict(bias=bias), std=0.2), tokens(3, 16)
    logits, loss = model(idx, idx)
    expected = gpt2_by_hand(model.state_dict(), idx, 2, 2)
    assert torch.equal(logits, expected)
    assert torch.equal(loss, F.cross_entropy(expected.view(-1, 31), idx.view(-1)))


def test_the_state_dict_has_gpt2_names_and_shapes():
    shapes = {name: tuple(tensor.shape) for name, tensor in build({}).state_dict().items()}
    block = {"ln_1.weight": (16,), "ln_1.bias": (16,),
             "attn.c_attn.weight": (48, 16), "attn.c_attn.bias": (48,),
             "attn.c_proj.weight": (16, 16), "attn.c_proj.bias": (16,),
             "ln_2.weight": (16,), "ln_2.bias": (16,),
             "mlp.c_fc.weight": (64, 16), "mlp.c_fc.bias": (64,),
             "mlp.c_proj.weight": (16, 64), "mlp.c_proj.bias": (16,)}
    expected = {"transformer.wte.weight": (31, 16), "transformer.wpe.weight": (16, 16)}
    expected |= {f"transformer.h.{i}.{name}": shape for i in range(2) for name, shape in block.items()}
    expected |= {"transformer.ln_f.weight": (16,), "transformer.ln_f.bias": (16,), "lm_head.weight": (31, 16)}
    assert shapes == expected and list(shapes) == list(expected)


@pytest.mark.skipif(not os.environ.get("NANOGPT"), reason="set NANOGPT to a nanoGPT checkout")
@pytest.mark.parametrize("bias", [True, False])
def test_off_is_bitwise_nanogpt(bias):
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(os.environ["NANOGPT"]) / "model.py")
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    ours = build(dict(bias=bias), std=0.2)
    theirs = peer.GPT(peer.GPTConfig(**TINY, dropout=0.0, bias=bias)).eval()
    theirs.load_state_dict(ours.state_dict())
    idx = tokens(3, 16)
    (logits, loss), (their_logits, their_loss) = ours(idx, idx), theirs(idx, idx)
    assert torch.equal(logits, their_logits) and torch.equal(loss, their_loss)
    assert torch.equal(ours.generate(idx[:, :5], 40, temperature=0), theirs.generate(idx[:, :5], 40, top_k=1))
    torch.manual_seed(3)
    sampled = ours.generate(idx[:, :5], 40, temperature=0.8, top_k=7)
    torch.manual_seed(3)
    assert torch.equal(sampled, theirs.generate(idx[:, :5], 40, temperature=0.8, top_k=7))


def test_hugging_face_gpt2_gives_the_same_logits(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    peer = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in peer.parameters():
            p.normal_(std=0.2)
    peer.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    peer.config._attn_implementation = "eager"
    idx = tokens(3, 16)
    tanh_gelu = torch.nn.GELU(approximate="tanh")          # what GPT-2 was trained with; nanoGPT's is exact
    for block in ours.transformer.h:
        block.mlp.act = tanh_gelu
    torch.testing.assert_close(ours(idx, idx)[0], peer(idx).logits, atol=1e-5, rtol=1e-5)


def test_from_pretrained_says_what_it_needs(tmp_path):
    with pytest.raises(ConfigError, match=r"gpt3.*gpt2-xl"):
        GPT.from_pretrained("gpt3")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        GPT.from_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match="only dropout"):
        GPT.from_pretrained("gpt2", dict(n_layer=3))


@every_arm_and_pair
def test_no_position_sees_the_future(arm):
    model = build(arm, std=0.2)
    idx = tokens(2, 16)
    changed = idx.clone()
    changed[:, 9:] = (changed[:, 9:] + 7) % TINY["vocab_size"]
    before, after = model(idx, idx)[0], model(changed, idx)[0]
    regrouped = 1e-5 if {"experts", "ponder"} & arm.keys() else 0       # products of other shapes
    torch.testing.assert_close(before[:, :9], after[:, :9], atol=regrouped, rtol=0)
    assert not torch.allclose(before[:, 9:], after[:, 9:])


@every_arm_and_pair
def test_a_row_does_not_depend_on_its_neighbours(arm):
    model, idx = build(arm, std=0.2), tokens(4, 16)
    other = tokens(4, 16, seed=9)
    other[2] = idx[2]
    torch.testing.assert_close(model(idx, idx)[0][2], model(other, idx)[0][2], atol=1e-6, rtol=0)


@every_arm
def test_every_parameter_gets_a_finite_nonzero_gradient(arm):
    model, idx = build(arm, std=0.2).train(), tokens(4, 17)
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, name


def gradients(model, idx, parts=1, scale=1.0):
    """Of a step of so many micro-batches, all of them idx, under a loss scale, as train.py takes it."""
    model.zero_grad()
    for _ in range(parts):
        torch.manual_seed(0)
        (model(idx[:, :-1], idx[:, 1:])[1] * scale / parts).backward()
    for p in model.parameters():
        p.grad /= scale
    model.regularise()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


RUN_AGAIN = ARMS | {name: arm for name, arm in PAIRS.items() if "ponder" in arm}


@pytest.mark.parametrize("arm", RUN_AGAIN.values(), ids=RUN_AGAIN.keys())
def test_the_gradient_of_a_step_knows_neither_micro_batches_nor_a_loss_scale(arm):
    model, idx = build(arm, std=0.2).train(), tokens(2, 9)
    one = gradients(model, idx)
    for how in (dict(parts=4), dict(scale=4096.0)):
        for name, grad in gradients(model, idx, **how).items():
            torch.testing.assert_close(grad, one[name], atol=1e-6, rtol=1e-5, msg=lambda m: f"{name}: {m}")


def train_on(model, optimizer, steps):
    """Losses of these steps on one batch."""
    idx, losses = tokens(4, 17), []
    for step in steps:
        torch.manual_seed(step)
        losses.append(model(idx[:, :-1], idx[:, 1:])[1])
        losses[-1].backward()
        model.regularise()
        optimizer.step()
        optimizer.zero_grad()
    return [loss.item() for loss in losses]


@every_arm_and_pair
def test_twenty_steps_lower_the_loss_and_resume_in_their_middle(arm, tmp_path):
    def with_optimizer(model):
        return model.train(), model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    model, optimizer = with_optimizer(build(arm))
    losses = train_on(model, optimizer, range(10))
    path = tmp_path / "ckpt.pt"
    checkpoint.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), iter_num=10,
                         model_args=model.config.model_args(), best_val_loss=1e9, config={}), path)
    losses += train_on(model, optimizer, range(10, 20))
    assert all(map(math.isfinite, losses)) and losses[-1] < 0.8 * losses[0]
    saved = checkpoint.load(path, resume=True)
    resumed, optimizer = with_optimizer(build_model(saved, path))
    checkpoint.load_optimizer(optimizer, saved["optimizer"], path)
    assert train_on(resumed, optimizer, range(10, 20)) == losses[10:]


@every_arm
def test_forward_traces_in_one_graph(arm):
    model, idx = build(arm).train(), tokens(2, 16)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    losses = []
    for run in (compiled, model):
        torch.manual_seed(0)
        losses.append(run(idx, idx)[1])
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)      # eager oscillating units have a kernel


ODD = dict(n_embd=20, n_head=2, vocab_size=33)       # in bf16 no row is a multiple of 16 bytes
ODD_ARMS = {name: ODD | arm for name, arm in ARMS.items()}
ODD_ARMS["columns"] |= dict(columns=4)
for name in ("dendrites", "energy"):
    ODD_ARMS[name] |= dict(dendrites=2, dendrites_active=1)
ODD_ARMS["experts"] |= dict(experts=16, experts_active=3)                 # 5 units each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("arm", ODD_ARMS.values(), ids=ODD_ARMS.keys())
def test_odd_widths_train_and_decode(arm, dtype):
    """Whatever shapes a library's kernels refuse; 13 tokens are more than a decode step reads by rows."""
    model, idx = build(arm).train(), tokens(2, 14) % 31
    model.compute_dtype = dtype
    loss = model(idx[:, :-1], idx[:, 1:])[1]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for rows, length in ((1, 1), (2, 13)):
        said = model.eval().generate(tokens(rows, length), 5, temperature=0)
        assert said.shape == (rows, length + 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_experts_of_odd_widths_compile_with_their_backward(dtype):
    model, idx = build(ODD_ARMS["experts"], std=0.2).train(), tokens(2, 14)
    model.compute_dtype, found = dtype, []
    torch.compiler.reset()
    for run in (torch.compile(model, fullgraph=True, backend="aot_eager"), model):
        model.zero_grad()
        run(idx[:, :-1], idx[:, 1:])[1].backward()
        found.append([p.grad.clone() for p in model.parameters()])
    limit = 1e-5 if dtype == torch.float32 else 0.05
    for compiled, eager in zip(*found):
        assert (compiled - eager).norm() <= limit * eager.norm()


def test_weights_depend_on_their_name_and_the_seed_alone():
    small, wide = build({}), build(dict(n_layer=3, vocab_size=40, bias=False))
    other = GPT(GPTConfig(**TINY), seed=2)
    drawn = {n: t for n, t in small.state_dict().items() if "c_attn.weight" in n or "c_fc.weight" in n}
    assert len(drawn) == 4
    for name, tensor in drawn.items():
        assert torch.equal(tensor, wide.state_dict()[name])
        assert not torch.equal(tensor, other.state_dict()[name])
    assert len({t.flatten()[0].item() for t in drawn.values()}) == 4
    torch.manual_seed(1)
    assert torch.equal(GPT(GPTConfig(**TINY)).lm_head.weight, small.lm_head.weight)


def test_residual_projections_start_smaller():
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=8, n_head=2, n_embd=128), seed=0)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            expected = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert abs(p.std().item() / expected - 1) < 0.1, name


def test_optimizer_groups_decay_matrices_only():
    model = build({})
    decay, plain = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu").param_groups
    assert decay["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert {p.dim() for p in decay["params"]} == {2} and {p.dim() for p in plain["params"]} == {1}
    assert len(decay["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_crop_block_size_keeps_the_first_positions():
    model, idx = build({}, std=0.2), tokens(2, 8)
    expected = model(idx)[0]
    model.crop_block_size(8)
    assert model.config.block_size == 8 and torch.equal(model(idx)[0], expected)
    with pytest.raises(ValueError, match="9 tokens does not fit block_size=8"):
        model(tokens(2, 9))
    with pytest.raises(ConfigError, match="longer than the model's 8"):
        model.crop_block_size(9)


@pytest.mark.parametrize("bad, word", [(dict(n_embd=15), "n_head"), (dict(n_layer=0), "n_layer"),
                                       (dict(dropout=1.0), "dropout")])
def test_a_config_that_cannot_work_says_why(bad, word):
    with pytest.raises(ConfigError, match=word):
        GPTConfig(**TINY | bad)


def test_model_args_hold_nanogpts_keys_alone_by_default():
    assert GPTConfig(**TINY).model_args() == TINY | dict(dropout=0.0, bias=True)


def test_parameter_count_and_unknown_peak():
    model = GPT(GPTConfig(bias=False), init=False)
    assert model.get_num_params() == 123_587_328 and model.get_num_params(non_embedding=False) == 124_373_760
    assert model.estimate_mfu(1, 1.0) is None


def test_bf16_stream_stays_close_to_fp32():
    model, idx = build({}, std=0.1), tokens(4, 16)
    exact = model(idx, idx)[0]
    model.compute_dtype = torch.bfloat16
    rounded = model(idx, idx)[0]
    assert rounded.dtype == torch.float32 and 0 < (rounded - exact).abs().max() < 0.1


def test_short_attention_equals_the_fused_one():
    q, k, v = torch.randn(3, 2, 3, 16, 8, dtype=torch.float64).bfloat16()
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    torch.testing.assert_close(attend(q, k, v, None, 0.0).float(), exact, atol=2e-2, rtol=2e-2)


def test_ignored_targets_do_not_count():
    model, idx = build({}, std=0.2), tokens(2, 16)
    masked = idx.clone()
    masked[:, 3:] = -1
    first = F.cross_entropy(model(idx, idx)[0][:, :3].reshape(-1, 31), idx[:, :3].reshape(-1))
    assert torch.allclose(model(idx, masked)[1], first)


def test_forwards_hold_no_config_reads_and_few_ifs():
    lines, ifs = 0, 0
    for file in ("model.py", "bio_modules.py"):
        source = ROOT / file
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))) if source.exists() else ():
            if isinstance(node, ast.FunctionDef) and node.name == "forward":
                lines += node.end_lineno - node.lineno + 1
                ifs += sum(isinstance(n, ast.If | ast.IfExp) for n in ast.walk(node))
                reads = [n.attr for n in ast.walk(node)
                         if isinstance(n, ast.Attribute) and n.attr in ("cfg", "config", "item")]
                assert not reads, f"{file}:{node.lineno} reads {reads}"
    assert lines and ifs * 100 <= 3 * lines
