"""The smoke part: what must hold on every PyTorch that is claimed, in under two minutes. CI runs it a second
time on another version: python -m pytest -m smoke."""
import pytest
import torch
from arms import ARMS, build, tokens
from conftest import Job, same, words

from decode import sampling

pytestmark = pytest.mark.smoke
every_arm = pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS.keys())


@every_arm
def test_a_variant_runs_forward_backward_and_cached(arm):
    model, idx = build(arm, std=0.2), tokens(2, 9)
    model.train()(idx, idx.roll(-1, 1))[1].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.eval()
    expected = idx
    with torch.no_grad():
        for _ in range(12):                                     # past block_size
            last = model(expected[:, -model.config.block_size:])[0][:, -1]
            expected = torch.cat((expected, last.argmax(-1, keepdim=True)), dim=1)
    new = torch.cat(list(sampling.stream(model, idx, 12, sampling.Sampler(temperature=0))), dim=1)
    assert torch.equal(torch.cat((idx, new), dim=1), expected)


@every_arm
def test_a_variant_decodes_in_bf16_as_in_fp32_but_for_rounding(arm):
    model, idx = build(arm, std=0.1), tokens(1, 9)
    with torch.no_grad():
        wide = model(idx)[0]
        narrow = model.to(torch.bfloat16)(idx)[0].float()
    assert torch.isfinite(narrow).all()
    assert torch.nn.functional.cosine_similarity(wide, narrow, dim=-1).min() > 0.9


def test_a_run_trains_stops_resumes_and_samples(train):
    train(max_iters=16, out="whole")
    train(max_iters=8)
    train.resume(max_iters=16)
    assert train.losses() == train.losses("whole")
    same(train.checkpoint()["model"], train.checkpoint("whole")["model"])
    sampled = Job("sample.py", words(out_dir=train.folder / "out", device="cpu", num_samples=2,
                                     max_new_tokens=20, temperature=0), train.folder).wait()
    assert sampled.status == 0 and sampled.out.count("---------------") == 2, sampled.err
