"""Memory of a training run, from what a real forward saves."""
from dataclasses import dataclass

import torch

from benchmarks import Bench
from benchmarks.decode import SHAPES
from configurator import require
from model import GPT, GPTConfig
from training.estimate import saved_bytes


@dataclass(frozen=True)
class Memory(Bench):
    """GPU memory of a training run, computed: weights, gradients, optimizer, what backward keeps."""
    shape: str = "gpt2"  # gpt2 (12 layers, 768 wide, block 1024) or baby (6 layers, 384 wide, block 256)
    cards: str = "8,12,24"  # GiB of the cards, by commas

    def __post_init__(self):
        super().__post_init__()
        require(self.shape in SHAPES, f"shape='{self.shape}' must be {' or '.join(SHAPES)}")
        require(all(card.isdigit() for card in self.cards.split(",")),
                f"cards='{self.cards}' must be whole GiB by commas: type --cards=8,12,24")


def memory(cfg):
    """Bytes that autograd keeps for one sequence, summed over what a real bf16 forward saves on
    a CPU, with and without recompute; the largest batch that fits a card less 1 GiB for all else."""
    found, T = {}, SHAPES[cfg.shape]["block_size"]
    for recompute in (False, True):
        model = GPT(GPTConfig(**SHAPES[cfg.shape], recompute=recompute), seed=0).train()
        model.compute_dtype = torch.bfloat16
        parameters, V = sum(p.numel() for p in model.parameters()), model.config.vocab_size
        idx = torch.zeros(1, T, dtype=torch.int64)
        fixed, sequence = 16 * parameters, saved_bytes(model, idx, idx) + 6 * V * T  # 6 V: logits' gradients
        fits = {card: max(0, int((int(card) - 1) * 2**30 - fixed) // sequence)
                for card in cfg.cards.split(",")}
        found[f"recompute={recompute}"] = dict(fixed=fixed, sequence=sequence, batch_size=fits)
        print(f"{cfg.shape}, recompute={recompute}: {fixed / 2**30:.2f} GiB of weights, gradients and AdamW, "
              f"{sequence / 2**20:.0f} MiB a sequence of {T}; largest batch_size: "
              + ", ".join(f"{batch} in {card} GiB ({(fixed + batch * sequence) / 2**30:.1f} used)"
                          for card, batch in fits.items()))
    return {"measurements": {}, "memory": found, "seeds": [0]}
