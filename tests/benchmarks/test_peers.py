"""bench.py decode beside Hugging Face, llama.cpp and ctranslate2: the same weights, the same ids."""
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import Job, one_sentence
from test_bench import SHORT, record_of, run

from benchmarks import decode, peers, readme
from benchmarks.record import HF, OURS
from configurator import ConfigError
from model import GPT, GPTConfig


def test_decode_beside_hugging_face_gives_the_same_greedy_ids(tmp_path):
    pytest.importorskip("transformers")
    result = run(tmp_path, *SHORT, "--hf", "--dtype=float32")
    found = record_of(result)
    sides = found["agreement"]["sides"]
    assert found["agreement"]["of"] == OURS and found["agreement"]["distinct"] > 1
    assert sides == {HF: {"equal": 1.0, "first_difference": None, "dtype": "float32"}}
    for measured in found["measurements"].values():
        assert measured["against"][HF].keys() == {OURS, HF} and measured["ratio"] == {}
    assert found["measurements"]["decode"]["to_twin"] == {} and "against Hugging Face" in result.out


def test_hugging_faces_cached_step_is_its_whole_context_for_one_token_again_and_again():
    pytest.importorskip("transformers")
    ours = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=32), seed=1).eval()
    rival, seen = peers.HuggingFace(ours), []
    rival.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output[:, -1]))
    prompt = torch.arange(7)[None]
    step = rival.cached_step(prompt)
    seen.clear()
    step(), step()
    for logits in seen:
        torch.testing.assert_close(logits, ours(prompt)[0][:, -1])
    assert len(seen) == 2


# ------------------------------------------------ llama.cpp and ctranslate2 --------------------

PEER_SHAPE = dict(n_layer=2, n_head=2, n_embd=64, block_size=32, vocab_size=65)


def rival_of(kind, stored, ours):
    """That engine with the weights of ours; skips where a package of it is absent."""
    for package in decode.NEEDS[kind]:
        pytest.importorskip(package, reason=f"{package} is not installed")
    return {"llamacpp": peers.LlamaCpp, "ctranslate2": peers.CTranslate2, "hf": peers.HuggingFace}[kind](
        ours, *([stored] if stored else []))


def lively(**flags):
    """A tiny model whose greedy ids change from token to token."""
    model = GPT(GPTConfig(**PEER_SHAPE | flags), seed=3).eval()
    with torch.no_grad():
        for number, (name, p) in enumerate(model.named_parameters()):
            drawn = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
            if p.dim() == 2:
                p.mul_(30 if "wpe" in name else 6)
            else:                                       # biases and gains too, or a lost one goes unseen
                p.add_(0.1 * drawn)
    return model


PROMPT = torch.randint(65, (1, 9), generator=torch.Generator().manual_seed(2))
EXACT = ("llamacpp", "f32"), ("ctranslate2", "float32"), ("hf", "")


def test_a_ctranslate2_that_has_ended_is_one_sentence():
    rival = rival_of("ctranslate2", "float32", lively())
    rival.process.kill()
    rival.process.wait()
    with pytest.raises(ConfigError, match="ctranslate2 with float32 weights has ended"):
        rival.generate(PROMPT, 3)


@pytest.mark.parametrize("kind, stored", EXACT)
@pytest.mark.parametrize("flags", [dict(bias=True), dict(bias=False), dict(tie_weights=False),
                                   dict(n_head=1)], ids=str)
def test_a_peers_greedy_ids_in_fp32_are_ours(kind, stored, flags):
    ours = lively(act="gelu_tanh" if kind == "llamacpp" else "gelu", **flags)
    rival = rival_of(kind, stored, ours)
    for prompt, new in ((PROMPT, 20), (PROMPT[:, :1], 31), (PROMPT.repeat(1, 3)[:, 1:], 6), (PROMPT, 1)):
        expected = ours.generate(prompt, new, temperature=0)
        assert rival.generate(prompt, new).tolist() == expected.tolist()
        assert new < 20 or len(expected.unique()) > 5, "ids that never change agree for any two models"


LLAMA = dict(norm="rmsnorm", pos="rope", act="swiglu", bias=False, mlp_units=96, n_head=4)
LLAMAS = {"grouped": dict(n_kv_head=2), "untied": dict(tie_weights=False),
          "scaled": dict(rope_factor=8.0, rope_original=16, rope_theta=100.0)}


@pytest.mark.parametrize("flags", LLAMAS.values(), ids=LLAMAS.keys())
def test_llamacpp_computes_our_llamas(flags):
    """Each logit of a text, and a step behind another; the rotation too where it is scaled."""
    ours = lively(**LLAMA | flags)
    rival = rival_of("llamacpp", "f32", ours)
    text = PROMPT.repeat(2, 3)
    logits, loss = rival(text)
    torch.testing.assert_close(logits, ours(text, text)[0], atol=2e-2, rtol=1e-3)
    assert loss is None and rival.generate(PROMPT, 20).tolist() == ours.generate(PROMPT, 20,
                                                                              temperature=0).tolist()
    plain = lively(**LLAMA | flags | dict(rope_factor=0.0, rope_original=8192))
    apart = (plain(text, text)[0] - logits).abs().max()
    assert (apart > 0.5) == ("rope_factor" in flags)


@pytest.mark.parametrize("tied", [True, False])
def test_llamacpp_reads_the_bytes_of_its_matrices(tied):
    ours = lively(**LLAMA | dict(n_kv_head=2, tie_weights=tied))
    matrices = 2 * (64 * 64 * 2 + 2 * 32 * 64 + 3 * 96 * 64) + 65 * 64
    for stored, bits in (("bf16", 16), ("q8_0", 8.5), ("q4_0", 4.5)):
        assert rival_of("llamacpp", stored, ours).read == matrices * bits / 8


@pytest.mark.parametrize("stored, near", [("f32", 1e-3), ("bf16", 6e-3), ("q8_0", 0.02), ("q4_0", 0.03)])
def test_a_gguf_file_holds_our_weights_rounded_as_it_says(tmp_path, stored, near):
    ours = lively(act="gelu_tanh")
    rival, gguf = rival_of("llamacpp", stored, ours), pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[stored.upper()]
    peers.write_gguf(ours, stored, tmp_path / "model.gguf")
    kinds = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors
             if len(tensor.shape) == 2}
    assert kinds.pop("position_embd.weight") == gguf.GGMLQuantizationType.F32
    assert set(kinds.values()) == {kind} and len(kinds) == 1 + 2 * 4
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if p.dim() == 2 and "wpe" not in name:
                p.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(p.numpy(), kind), kind)))
        expected = ours(PROMPT)[0][0, -1]
    rival.generate(PROMPT, 1)
    found = torch.tensor(rival.logits()[:65])
    assert (found - expected).norm() < near * expected.norm()


def test_llamacpps_cached_step_is_its_whole_context_for_one_token_again_and_again():
    ours = lively(act="gelu_tanh")
    rival = rival_of("llamacpp", "f32", ours)
    step, expected = rival.cached_step(PROMPT), ours(PROMPT)[0][0, -1]
    for _ in range(3):
        assert step() == int(expected.argmax())
        torch.testing.assert_close(torch.tensor(rival.logits()[:65]), expected, rtol=0, atol=2e-2)


def test_llamacpp_refuses_what_would_end_its_process():
    rival = rival_of("llamacpp", "f32", lively(act="gelu_tanh"))
    with pytest.raises(ConfigError, match=r"9 tokens and 24 new ones.*block_size=32"):
        rival.generate(PROMPT, 24)
    assert rival.generate(PROMPT, 23).shape == (1, 32)


def test_a_llamacpp_that_dies_is_told_and_the_measurement_lives(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "ONE_PROMPT", "import os; os.kill(os.getpid(), 11)")
    with pytest.raises(ConfigError, match=r"dies of signal 11 .*q8_0.*CMAKE_ARGS"):
        peers.survives(tmp_path / "model.gguf", "q8_0")
    monkeypatch.setattr(peers, "ONE_PROMPT", "raise SystemExit(3)")     # what follows tells it
    peers.survives(tmp_path / "model.gguf", "q8_0")


def test_two_rivals_in_one_process_keep_their_own_caches():
    one, other = lively(act="gelu_tanh"), lively(act="gelu_tanh", n_head=4, n_layer=1)
    first, second = rival_of("llamacpp", "f32", one), rival_of("llamacpp", "f32", other)
    step = first.cached_step(PROMPT)
    assert second.generate(PROMPT, 12).tolist() == other.generate(PROMPT, 12, temperature=0).tolist()
    assert step() == one.generate(PROMPT, 1, temperature=0)[0, -1]


@pytest.mark.parametrize("kind, stored", EXACT)
def test_a_model_that_is_not_gpt2_is_refused_by_every_peer(kind, stored):
    with pytest.raises(ConfigError, match="GPT-2"):
        rival_of(kind, stored, lively(columns=4, columns_active=2))


@pytest.mark.parametrize("kind, stored", EXACT)
def test_a_peer_computes_gelu_where_ours_has_squared_relu_and_the_record_says_so(kind, stored):
    ours, twin = lively(act="relu2"), lively(act="gelu")
    rival = rival_of(kind, stored, ours)
    found = rival.generate(PROMPT, 20).tolist()
    assert found == twin.generate(PROMPT, 20, temperature=0).tolist()
    assert found != ours.generate(PROMPT, 20, temperature=0).tolist()
    acts = decode.activations({OURS: ours, "theirs": rival})
    assert acts[OURS] == "relu2" and acts["theirs"].startswith("gelu")


@pytest.mark.parametrize("flag, lost, parts", [
    ("hf", "transformers", ["--hf needs transformers", "pip install transformers"]),
    ("llamacpp", "llama_cpp", ["--llamacpp needs llama_cpp", "pip install llama-cpp-python"]),
    ("ctranslate2", "ctranslate2", ["--ctranslate2 needs ctranslate2", "pip install ctranslate2"])])
def test_a_peer_whose_package_is_absent_says_what_to_install(tmp_path, flag, lost, parts):
    before = "import sys; " + "; ".join(f"sys.modules['{name}'] = None" for name in [lost])
    one_sentence(Job("bench.py", [*SHORT, f"--{flag}"], tmp_path, before=before).wait(), "bench.py", *parts)


def test_an_engine_that_is_installed_and_does_not_load_is_one_sentence(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").write_text("raise RuntimeError('no libgomp.so.1\\nhere')\n")
    before = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    job = Job("bench.py", [*SHORT, "--llamacpp"], tmp_path, before=before)
    one_sentence(job.wait(), "bench.py", "llama_cpp does not load (no libgomp.so.1)", "llama-cpp-python")


def test_engines_of_a_cpu_are_not_measured_beside_ours_on_a_card():
    with pytest.raises(ConfigError, match=r"llamacpp.*CPU.*--device=cpu"):
        decode.check_place(SimpleNamespace(llamacpp=True, ctranslate2=False, load=0),
                           SimpleNamespace(device=torch.device("cuda")))


@pytest.mark.parametrize("flag, exact, others", [
    ("llamacpp", "llama.cpp f32", ["llama.cpp bf16", "llama.cpp q8_0", "llama.cpp q4_0"]),
    ("ctranslate2", "ctranslate2 float32", ["ctranslate2 int8"])])
def test_decode_beside_another_engine_tells_all_its_sides_and_what_they_are(tmp_path, flag, exact, others):
    for package in decode.NEEDS[flag]:
        pytest.importorskip(package, reason=f"{package} is not installed")
    result = run(tmp_path, *SHORT, f"--{flag}", "--dtype=float32")
    found, sides = record_of(result), [exact, *others]
    decoded = found["measurements"]["decode"]
    assert list(decoded["sides"]) == [OURS, *sides] and decoded["against"].keys() == set(sides)
    assert all({"median", "quartiles"} <= side.keys() for side in decoded["sides"].values())
    assert list(found["measurements"]["step"]["sides"]) == [OURS, *(sides if flag == "llamacpp" else [])]
    agreement = found["agreement"]
    assert agreement["of"] == OURS and agreement["sides"].keys() == set(sides) and agreement["distinct"] > 1
    assert agreement["sides"][exact]["equal"] == 1.0
    assert found["peers"].keys() == set(sides) == found["activations"].keys() - {OURS}
    assert found["activations"][OURS] == "gelu" and "prompt" in found["timed"]["decode"]
    for about in found["peers"].values():
        assert about["threads"] == 1 and about["weights"] and str(tmp_path) not in json.dumps(about)
    assert not list(tmp_path.glob("*.gguf")) and f"against {exact}" in result.out
    assert "load" not in result.err, "engines that log what they load hide what is said here"
    table = readme.tables({"r.json": found}, {"r.json": ".*"})
    cells = [line.split(" | ")[2] for line in table if line.startswith("| baby: decode, tokens/s (ours) |")]
    assert cells == sides and not any("nanoGPT" in line for line in table)
