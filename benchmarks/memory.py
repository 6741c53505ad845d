"""Memory of a training run, from what a forward saves."""
import itertools
from dataclasses import dataclass
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sparse_kernels
from benchmarks import Bench
from benchmarks.decode import SHAPES
from configurator import require
from model import GPT, GPTConfig
from training.estimate import logits_bytes, saved_bytes


@dataclass(frozen=True)
class Memory(Bench):
    """GPU memory of a training run, computed: weights, gradients, optimizer, what backward keeps."""
    shape: str = "gpt2"  # gpt2 (12 layers, 768 wide, block 1024) or baby (6 layers, 384 wide, block 256)
    cards: str = "8,12,24"  # GiB of the cards, by commas
    loss_chunks: int = 8  # parts of the loss, in the rows that have it in parts

    def __post_init__(self):
        super().__post_init__()
        require(self.shape in SHAPES, f"shape='{self.shape}' must be {' or '.join(SHAPES)}")
        require(all(card.isdigit() for card in self.cards.split(",")),
                f"cards='{self.cards}' must be whole GiB by commas: type --cards=8,12,24")
        require(self.loss_chunks >= 1, f"loss_chunks={self.loss_chunks} must be 1 or more")


def kept_by(config):
    """-> (parameters, bytes that a bf16 forward of one whole sequence saves) of a model that is not there:
    fake tensors have shapes alone, and nothing is computed. As on a card, in no copies of fp32."""
    with mock.patch.object(sparse_kernels, "NATIVE_BF16", True), FakeTensorMode():
        model = GPT(config, seed=0).train()
        model.compute_dtype = torch.bfloat16
        idx = torch.zeros(1, config.block_size, dtype=torch.int64)
        return sum(p.numel() for p in model.parameters()), saved_bytes(model, idx, idx)


def memory(cfg):
    """Bytes that autograd keeps for one sequence, summed over what a bf16 forward saves, with or without
    recompute, loss_chunks; the largest batch in a card less 1 GiB for the rest."""
    found, T = {}, SHAPES[cfg.shape]["block_size"]
    for chunks, recompute in itertools.product((0, cfg.loss_chunks), (False, True)):
        config = GPTConfig(**SHAPES[cfg.shape], recompute=recompute, loss_chunks=chunks)
        parameters, saved = kept_by(config)
        head = 4 * config.vocab_size * config.n_embd * bool(chunks)     # its gradient, kept until backward
        fixed, sequence = 16 * parameters + head, saved - head + logits_bytes(config, T, each=6)  # gradients
        fits = {card: max(0, int((int(card) - 1) * 2**30 - fixed) // sequence)
                for card in cfg.cards.split(",")}
        name = f"recompute={recompute}" + f", loss_chunks={chunks}" * bool(chunks)
        found[name] = dict(fixed=fixed, sequence=sequence, batch_size=fits)
        print(f"{cfg.shape}, {name}: {fixed / 2**30:.2f} GiB of weights, gradients and AdamW, "
              f"{sequence / 2**20:.0f} MiB a sequence of {T}; largest batch_size: "
              + ", ".join(f"{batch} in {card} GiB ({(fixed + batch * sequence) / 2**30:.1f} used)"
                          for card, batch in fits.items()))
    return {"measurements": {}, "memory": found, "seeds": [0]}
