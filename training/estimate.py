"""What a training run needs, before it runs: memory, tokens, time; and what to type when memory ran out."""
import statistics

import torch
from tqdm import tqdm

from configurator import ConfigError

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")
WARM_UP, STEPS = 1, 3                            # steps of a dry run: thrown away, timed


def saved_bytes(model, *batch):
    """Bytes of the storages that one forward of a batch (B, T) saves for backward, weights left out. Storages
    are told apart by what they are and not by their address: fake tensors have none."""
    weights = {here(p).untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage         # held, so that none takes another's place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*batch)
    return sum(storage.nbytes() for storage in kept.values())


def here(tensor):
    """A tensor, or this process's part of a split one."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def bytes_of(tensors):
    """What they take on this process."""
    return sum(here(t).numel() * t.element_size() for t in tensors)


def moments_bytes(optimizer):
    """What the moments of an optimizer take once it has stepped: AdamW keeps two of each weight, Muon one."""
    return sum((2 if isinstance(part, torch.optim.AdamW) else 1) * bytes_of(group["params"])
               for part in getattr(optimizer, "parts", [optimizer]) for group in part.param_groups)


def kept_bytes(model, batch):
    """What a forward of a batch (B, T) keeps for backward, reckoned from two rows and three of it (one row
    needs fewer copies): at a GPT-2's shape that takes seconds, a batch a minute."""
    rows = len(batch[0])
    few = saved_bytes(model, *(ids[:2].clone() for ids in batch))
    if rows <= 2:
        return few
    return few + (rows - 2) * (saved_bytes(model, *(ids[:3].clone() for ids in batch)) - few)


def logits_bytes(config, tokens, each=4):
    """What there is at once of the logits of so many tokens, of `each` bytes a logit: all, or a chunk."""
    return each * -(-tokens // max(1, config.loss_chunks)) * config.vocab_size


def dry_run(cfg, model, optimizer, batch, step, tokens_per_iter, data_tokens, processes, quiet=False):
    """Say what a run needs: parameters and memory, then, behind a few real steps, tokens and time; nothing is
    written. Yields lines.

    step: a function that trains one step of so many micro-batches and returns its seconds. The model is
    changed by it. A step of many is reckoned from steps of one and of two. data_tokens: None where there are
    no data here. quiet: without a bar.
    """
    parameters = list(model.parameters())
    yield (f"parameters: {sum(p.numel() for p in parameters):,}, {model.get_num_params():,} without "
           "positions")
    weights, states = bytes_of(parameters), moments_bytes(optimizer)
    kept, logits = kept_bytes(model, batch), logits_bytes(model.config, batch[0].numel())
    yield (f"memory of a process: {mib(2 * weights + states + kept + logits)}: weights {mib(weights)}, "
           f"gradients {mib(weights)}, optimizer {mib(states)}, kept for backward {mib(kept)}, gradient of "
           f"the logits {mib(logits)}; counted from this run's tensors")
    tokens, data = cfg.max_iters * tokens_per_iter, ""
    if data_tokens:
        data = f", data {data_tokens:,}: {tokens / data_tokens:.2f} epochs"
    yield f"tokens: {tokens_per_iter:,} an iteration, {tokens:,} in all{data}"
    micro = cfg.gradient_accumulation_steps // processes
    counts = [count for count in (1, min(2, micro)) for _ in range(WARM_UP + STEPS)]
    took = [step(count) for count in tqdm(counts, "steps", disable=quiet, dynamic_ncols=True)]
    one, two = (statistics.median(part[WARM_UP:]) for part in (took[:len(took) // 2], took[len(took) // 2:]))
    seconds = one + (micro - 1) * max(0.0, two - one)
    if model.lm_head.weight.device.type == "cuda":
        yield f"peak that the device measured: {mib(torch.cuda.max_memory_allocated())}"
    yield (f"time: {1e3 * seconds:,.0f} ms an iteration (processes {processes}, medians of {STEPS}), "
           f"{tokens_per_iter / seconds:,.0f} tokens/s, {duration(seconds * cfg.max_iters)} in all "
           "without evaluations")


VAL_TOKENS = 16_384                              # or a few more, of a loss that is printed beside another


@torch.no_grad()
def validation_loss(model, stream, tokens=VAL_TOKENS):
    """A model in eval mode over a stream's first batches -> (mean loss in nats, of how many tokens): `tokens`
    or a few more."""
    device, total, count, index = next(model.parameters()).device, 0.0, 0, 0
    while count < tokens:
        x, y = (t.to(device) for t in stream.batch(index))
        total, count, index = total + model(x, y)[1].item() * x.numel(), count + x.numel(), index + 1
    return total / count, count


def beside(before, after, what, dataset):
    """The sentence of two results of validation_loss, of a model as it was and `what` was done to it."""
    (old, count), (new, _) = before, after
    return (f"validation loss {old:.4f} nats, {what} {new:.4f} ({new - old:+.4f}, "
            f"{(new - old) / old:+.2%}): {count:,} tokens of {dataset}")


def mib(count):
    return f"{count / 2**20:,.1f} MiB"


def duration(seconds):
    return (f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200
            else f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days")


def is_out_of_memory(error):
    """Did an allocation fail, on any device?"""
    said = str(error).lower()
    return (isinstance(error, torch.OutOfMemoryError | MemoryError)
            or (isinstance(error, RuntimeError) and any(words in said for words in OUT_OF_MEMORY)))


def smaller(cfg, device):
    """A failed allocation's answer: less memory with the same tokens a step -> ConfigError."""
    size, steps = cfg.batch_size, cfg.gradient_accumulation_steps
    chunks = ", or --loss_chunks=8" * (not (cfg.loss_chunks or cfg.exits or cfg.teacher))
    said = f"{device} ran out of memory at batch_size={size}, block_size={cfg.block_size}: type "
    if size == 1:
        return ConfigError(said + "--recompute=True, which keeps less for the backward pass, or "
                           * (not cfg.recompute) + "a smaller --block_size or model" + chunks)
    less = next(n for n in range(size // 2, 0, -1) if size % n == 0)
    return ConfigError(said + f"--batch_size={less} --gradient_accumulation_steps={steps * size // less}, "
                       f"which keeps {size * steps:,} sequences a step"
                       + ", or --recompute=True" * (not cfg.recompute) + chunks)
