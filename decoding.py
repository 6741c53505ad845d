"""Generation: one static KV cache, prompts of different lengths in one batch, the sampling filters.

Prompts are aligned to the right, so every row writes the same cache column and a step is one slice; the
columns before a shorter prompt are masked, and its positions start at its own first token: a row's output
does not depend on its neighbours.
"""
import torch
from torch.nn import functional as F

from configurator import require


class CachedContext:
    """model.Context with a cache behind it: T new columns that begin at column `start` of the cache.

    cache: (n_layer, 2, B, H, S, D).
    pads: None, or the number of empty columns before each row's first token, (B,) int64.
    ids: the cache's token ids with those of this call at their end, (B, start + T), -1 in empty columns.
    """

    def __init__(self, cache, start, ids, pads=None):
        T = ids.size(1) - start
        self.cache, self.start, self.end, self.ids = cache, start, start + T, ids
        self.positions, self.mask = slice(start, self.end), None
        if pads is not None:
            columns = torch.arange(self.end, device=cache.device)
            self.positions = (columns[start:] - pads[:, None]).clamp_(min=0)
            self.mask = visible(columns[start:], columns, pads)
        elif start > 0 and T > 1:
            columns = torch.arange(self.end, device=cache.device)
            self.mask = columns <= columns[start:, None]

    def extend(self, layer, k, v):
        """Write the new keys and values behind the old ones -> views of all of them, (B, H, end, D)."""
        keys, values = (half.narrow(2, 0, self.end) for half in self.cache[layer].unbind(0))
        keys.narrow(2, self.start, self.end - self.start).copy_(k)
        values.narrow(2, self.start, self.end - self.start).copy_(v)
        return keys, values

    def add_loss(self, make):
        """Decoding wants no loss."""

    def with_past(self, idx, count):
        """(B, count + T) ids that end with this call's; -1 where there is no earlier token."""
        return F.pad(self.ids, (count, 0), value=-1)[:, self.start:]


def visible(queries, keys, pads):
    """(B, 1, T, S) bool: causal, no empty columns; an empty column sees itself, or its softmax is 0/0."""
    causal = keys <= queries[:, None]
    filled = keys >= pads[:, None]
    return (causal & filled[:, None] | (keys == queries[:, None]))[:, None]


def new_cache(model, batch_size, length):
    """The one tensor that holds every layer's keys and values, (n_layer, 2, B, H, length, D)."""
    c, weight = model.config, model.lm_head.weight
    shape = (c.n_layer, 2, batch_size, c.n_head, length, c.n_embd // c.n_head)
    return torch.empty(shape, dtype=model.compute_dtype or weight.dtype, device=weight.device)


class Sampler:
    """Chooses the next token of every row. Filters apply in this order:

    repetition_penalty: logits of tokens already in the row are divided by it where positive, multiplied where
    negative (CTRL, 1909.05858), before temperature; temperature: 0 is greedy; top_k: the k largest; top_p:
    the smallest set whose probability reaches top_p (1904.09751); min_p: at least min_p times the largest
    probability (2407.01082).
    vocab_size: ids from there on are never chosen (a padded vocabulary has rows that mean nothing).
    """

    def __init__(self, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
                 vocab_size=None):
        require(temperature >= 0, f"temperature={temperature} must be 0 (greedy) or more")
        require(0 < top_p <= 1, f"top_p={top_p} must be in (0, 1]")
        require(0 <= min_p <= 1, f"min_p={min_p} must be in [0, 1]")
        require(repetition_penalty > 0,
                f"repetition_penalty={repetition_penalty} must be above 0; 1.0 is off")
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.repetition_penalty, self.vocab_size = repetition_penalty, vocab_size

    def __call__(self, logits, seen):
        """logits (B, V) fp32, seen (B, V) bool: ids already in the row -> next ids (B, 1)."""
        logits, seen = logits[:, :self.vocab_size], seen[:, :self.vocab_size]
        if self.repetition_penalty != 1.0:
            r = self.repetition_penalty
            logits = torch.where(seen, torch.where(logits > 0, logits / r, logits * r), logits)
        if self.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        return torch.multinomial(self.filtered(logits / self.temperature).softmax(-1), num_samples=1)

    def filtered(self, logits):
        """Logits with what top_k, top_p and min_p exclude at -inf."""
        if self.top_k:
            kth = logits.topk(min(self.top_k, logits.size(-1))).values[:, [-1]]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if self.top_p < 1:
            ordered, order = logits.softmax(-1).sort(descending=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p          # the token that reaches top_p stays
            logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
        if self.min_p > 0:
            probabilities = logits.softmax(-1)
            logits = logits.masked_fill(probabilities < self.min_p * probabilities.amax(-1, keepdim=True),
                                        -torch.inf)
        return logits


@torch.inference_mode()
def stream(model, idx, max_new_tokens, sampler, lengths=None, overflow="exact"):
    """Yield the next token ids (B, 1), max_new_tokens times.

    overflow decides what happens past block_size. "exact": nanoGPT's meaning, every token sees the last
    block_size tokens at positions 0..block_size-1, so the window is recomputed for each one. "slide": keep
    the last half of the window and go on with the cache, one recomputation every block_size/2 tokens: cheap,
    not identical.
    """
    block = model.config.block_size
    keep = {"exact": block, "slide": max(1, block // 2)}.get(overflow)
    require(keep is not None, f"overflow='{overflow}' must be exact or slide")
    require(idx.size(1) > 0, "the prompt is empty: give at least one token, for example a newline")
    T, V = idx.size(1), model.config.vocab_size
    history, pads = align_right(idx, lengths, T + max_new_tokens)
    seen = torch.zeros(len(idx), V + 1, dtype=torch.bool, device=idx.device)
    seen.scatter_(1, history[:, :T] % (V + 1), True)       # -1, an empty column, is counted in the last place
    cache = new_cache(model, len(idx), min(block, T + max_new_tokens))
    base = cached = 0                                      # the cache holds columns base .. base + cached
    for n in range(T, T + max_new_tokens):
        if n - base > block:
            base, cached = n - keep, 0
        ctx = CachedContext(cache, cached, history[:, base:n], shifted(pads, base, idx.device))
        states = model.trunk(history[:, base + cached:n].clamp(min=0), ctx)
        cached = n - base
        token = sampler(model.head(states[:, -1]), seen[:, :V])
        history[:, n:n + 1] = token
        seen.scatter_(1, token, True)
        yield token


def align_right(idx, lengths, width):
    """Prompts at the left of (B, T) -> (history (B, width) with prompts ending at column T, empty columns
    before each); an empty column holds -1."""
    B, T = idx.shape
    lengths = [T] * B if lengths is None else [int(n) for n in lengths]
    require(len(lengths) == B and all(1 <= n <= T for n in lengths),
            f"lengths={lengths} must be {B} numbers in 1..{T}")
    history = torch.full((B, width), -1, device=idx.device)
    for row, n in enumerate(lengths):
        history[row, T - n:T] = idx[row, :n]
    return history, [T - n for n in lengths]


def shifted(pads, base, device):
    """Empty columns that remain in a window that begins at column `base`; None when every row is full."""
    left = [max(0, pad - base) for pad in pads]
    return torch.tensor(left, device=device) if any(left) else None


def join(idx, new, lengths):
    """Prompts (B, T), their new tokens (B, N) -> (B, T + N), new tokens right behind each row's prompt."""
    if lengths is None:
        return torch.cat((idx, new), dim=1)
    out = torch.zeros(len(idx), idx.size(1) + new.size(1), dtype=idx.dtype, device=idx.device)
    for row, n in enumerate(int(n) for n in lengths):
        out[row, :n + new.size(1)] = torch.cat((idx[row, :n], new[row]))
    return out
