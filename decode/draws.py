"""Draws by a counter: the next id of a row is decided by its logits and one number in [0, 1), which is a
function of (key, column, row). The same key gives the same text however many threads there are, and whatever
else draws meanwhile.

The number is the first 53 bits of Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3") with the stream's key and the counter (column, row), 64 bits each. The id is the first one at which
the sum of the probabilities, in the order of ids, exceeds it.
kernels/step.c computes both, in the decode engine's program or for logits on a CPU, and on a card
kernels/triton_step.py in its step; here is the reference.
"""
import ctypes

import torch

from kernels.build import cpu_library

ROWS = 8                                         # of a program, as in step.c
LONG, FLOAT, POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
WORD = 2**32 - 1


class DrawsC(ctypes.Structure):
    _fields_ = [("temperature", FLOAT), ("top_p", FLOAT), ("min_p", FLOAT), ("penalty", FLOAT),
                ("top_k", LONG), ("key", ctypes.c_uint64), ("seen", POINTER), ("seen_stride", LONG),
                ("firsts", LONG * ROWS)]


def new_key():
    """A stream's key, drawn from torch's generator: torch.manual_seed decides it."""
    return int(torch.randint(2**63 - 1, ()))


def settings(sampler, key, seen):
    """A Sampler's filters as step.c reads them. seen: (B, ...) bool on a CPU, kept by the caller."""
    temperature = 0.0 if sampler.greedy else sampler.temperature
    penalty = sampler.repetition_penalty
    return DrawsC(temperature=temperature, top_p=sampler.top_p, min_p=sampler.min_p, penalty=penalty,
                  top_k=sampler.top_k or 0, key=key, seen=seen.data_ptr() if penalty != 1 else None,
                  seen_stride=seen.stride(0))


def philox(counter, key):
    """Philox 4x32-10 of four and two words -> four words."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & WORD, a >> 32 ^ c[3] ^ k[1], a & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return c


def uniform(key, column, row):
    """The number in [0, 1) that decides what a row draws for a column."""
    words = philox((column & WORD, column >> 32, row & WORD, row >> 32), (key & WORD, key >> 32))
    return (words[0] << 21 | words[1] >> 11) * 2.0**-53


def draw_reference(sampler, key, columns, logits, seen):
    """logits (B, V), seen (B, V) -> ids (B, 1), those of row b for column columns[b]."""
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    sums = sampler.probabilities(logits, seen).to(wide).cumsum(-1)
    numbers = [min(uniform(key, column, row), 1 - 2.0**-24) for row, column in enumerate(columns)]
    numbers = torch.tensor(numbers, dtype=wide).to(logits.device)[:, None]
    return torch.searchsorted(sums, numbers * sums[:, -1:], right=True)


def draw(sampler, key, columns, logits, seen):
    """As the reference; None where a row's largest logit is not finite."""
    library = cpu_library()[0]
    if logits.device.type != "cpu" or library is None:
        return draw_reference(sampler, key, columns, logits, seen)
    B, V = len(logits), min(logits.size(1), sampler.vocab_size or logits.size(1))
    logits = logits.float() if logits.stride(1) == 1 else logits.float().contiguous()
    columns, ids = torch.tensor(columns), torch.empty(B, 1, dtype=torch.long)
    how = settings(sampler, key, seen)
    fine = library.draw(ctypes.byref(how), logits.data_ptr(), logits.stride(0), B, V, columns.data_ptr(),
                        ids.data_ptr())
    return ids if fine else None
