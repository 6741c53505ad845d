"""Memory of a training run, from what a forward saves."""
import contextlib
import itertools
from dataclasses import dataclass, fields
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sparse_kernels
from benchmarks import Bench, check_files
from benchmarks.arms import key_defaults, named_arms, settings
from benchmarks.decode import SHAPES
from configurator import require
from model import GPT, GPTConfig
from training import optimizers
from training.estimate import logits_bytes, mib, moments_bytes, saved_bytes

BYTES = 256                                      # ids of the table's data


@dataclass(frozen=True)
class Memory(Bench):
    """GPU memory of a training run, computed: weights, gradients, optimizer, what backward keeps."""
    shape: str = "gpt2"  # gpt2 (12 layers, 768 wide, block 1024) or baby (6 layers, 384 wide, block 256)
    cards: str = "8,12,24"  # GiB of the cards, by commas
    loss_chunks: int = 8  # parts of the loss, in the rows that have it in parts
    variants: bool = False  # instead a line for every variant of the table, trained by the recipe `config`
    config: str = "config/compare_pylib.py,config/longer_context.py"  # config files of that recipe, by commas

    def __post_init__(self):
        super().__post_init__()
        require(self.shape in SHAPES, f"shape='{self.shape}' must be {' or '.join(SHAPES)}")
        require(all(card.isdigit() for card in self.cards.split(",")),
                f"cards='{self.cards}' must be whole GiB by commas: type --cards=8,12,24")
        require(self.loss_chunks >= 1, f"loss_chunks={self.loss_chunks} must be 1 or more")
        check_files(self.config)


def without_memory(config):
    """A model of which nothing is there: fake tensors have shapes alone, and nothing is computed. To be used
    within `nothing()`."""
    model = GPT(config, seed=0).train()
    model.compute_dtype = torch.bfloat16
    return model


@contextlib.contextmanager
def nothing():
    """Fake tensors; bf16 as on a card, in no copies of fp32; values decide nothing, as under a compiler."""
    with (mock.patch.object(sparse_kernels, "NATIVE_BF16", True),
          mock.patch.object(torch.compiler, "is_compiling", lambda: True), FakeTensorMode()):
        yield


def kept_by(config, rows=1):
    """-> (parameters, bytes that a bf16 forward of so many whole sequences saves) of a model that is not
    there."""
    with nothing():
        model, idx = without_memory(config), torch.zeros(rows, config.block_size, dtype=torch.int64)
        return sum(p.numel() for p in model.parameters()), saved_bytes(model, idx, idx)


def memory(cfg):
    """Bytes that autograd keeps for one sequence, summed over what a bf16 forward saves, with or without
    recompute, loss_chunks; the largest batch in a card less 1 GiB for the rest."""
    if cfg.variants:
        return {"measurements": {}, "variants": variants(cfg), "seeds": [0]}
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


def variants(cfg):
    """{arm: bytes of what a step of its training takes}, the parts that a dry run prints
    (training/estimate.py), of models that are not there. A token that ponders counts with all its runs."""
    found, of_model = {}, {field.name for field in fields(GPTConfig)}
    for arm in named_arms(SimpleNamespace(arms="")):
        keys = SimpleNamespace(**key_defaults() | settings(cfg.config, arm))
        config = GPTConfig(**{"vocab_size": BYTES} | {key: value for key, value in settings(
            cfg.config, arm).items() if key in of_model})
        parameters, kept = kept_by(config, keys.batch_size)
        with nothing():
            states = moments_bytes(optimizers.build(without_memory(config), keys, "cpu"))
        logits = logits_bytes(config, keys.batch_size * config.block_size)
        found[arm] = dict(weights=4 * parameters, optimizer=states, kept=kept, logits=logits,
                          total=8 * parameters + states + kept + logits)
        print(f"{arm:28}{mib(found[arm]['total']):>12}: weights and gradients {mib(8 * parameters)}, "
              f"optimizer {mib(states)}, kept for backward {mib(kept)}, gradient of the logits {mib(logits)}")
    return found
