"""Windows on a CUDA card by FlexAttention (2412.05496): one fused kernel that reads the blocks of keys that a
window sees, and no others, and keeps no scores. It is compiled at its first use, seconds for each shape.

The same values as layers.attend_blocks, which computes windows everywhere else and is the reference.
"""
import functools
import operator
from importlib.util import find_spec

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128                                      # tokens of a block of queries, and of keys
SHAPES = 6                                       # that a process compiles; torch keeps eight of a function
compiled_shapes = set()


class Masks:
    """BlockMasks by their names."""


masks = Masks()


def attend(q, k, v, window):
    """Queries, keys and values (B, H, T, D) of a card -> what each token's window attends to, (B, H, T, D);
    None where this card cannot, or where so many shapes are compiled that one more would not be kept."""
    if not able(q.device):
        return None
    T = q.size(2)
    if torch.compiler.is_compiling():            # a compiled model takes it in
        return flex_attention(q, k, v, block_mask=mask_of(T, window, q.device))
    if torch.is_inference_mode_enabled():        # prompts have many lengths: padded, they are few
        more = power_of_two(T) - T
        q, k, v = (F.pad(t, (0, 0, 0, more)) for t in (q, k, v)) if more else (q, k, v)
    if not admitted(shape_of(q, k, v, window)):
        return None
    return compiled()(q, k, v, block_mask=mask_of(q.size(2), window, q.device))[:, :, :T]


@torch.compiler.assume_constant_result
def able(device):
    """Can FlexAttention be compiled for this card?"""
    return (find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)
            and not torch._dynamo.config.disable)


def power_of_two(T):
    """The smallest that is no less."""
    return 1 << (T - 1).bit_length()


@functools.cache
def compiled():
    """FlexAttention as a kernel: without a compiler it would compute all scores. Shapes are constants."""
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def shape_of(q, k, v, window):
    """All that decides which kernel the compiler makes."""
    return (window, q.dtype, q.device, torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            *((t.shape, t.stride(), t.requires_grad) for t in (q, k, v)))


def admitted(shape):
    """Is this one of the first SHAPES shapes?"""
    if len(compiled_shapes) < SHAPES:
        compiled_shapes.add(shape)
    return shape in compiled_shapes


def mask_of(T, window, device):
    """make_mask, once for each T, window and device."""
    return getattr(masks, made(operator.index(T), window, device))   # a number, where a compiler has a symbol


@torch.compiler.assume_constant_result
def made(T, window, device):
    """The name in `masks` of a mask that is there from now on: a compiler asks for it while it traces, and
    finds an object that it can guard."""
    name = f"{T} tokens, window {window}, {device}"
    if not hasattr(masks, name):
        with torch.inference_mode(False):        # one that a prompt has made serves training too
            setattr(masks, name, make_mask(T, window, device))
    return name


def make_mask(T, window, device):
    """Which blocks of keys each block of T queries sees, in part or whole. From the blocks' numbers alone:
    create_block_mask looks at all T * T pairs."""
    blocks = torch.arange(-(-T // BLOCK), device=device)
    apart = BLOCK * (blocks[:, None] - blocks)
    youngest, oldest = apart - BLOCK + 1, apart + BLOCK - 1         # how far a key lies before a query
    seen, whole = (oldest >= 0) & (youngest < window), (youngest >= 0) & (oldest < window)
    whole &= BLOCK * (blocks[:, None] + 1) <= T                     # the last queries may be no whole block

    def sees(batch, head, query, key):
        return (query >= key) & (query - key < window)
    return BlockMask.from_kv_blocks(*in_order(seen & ~whole), *in_order(whole), BLOCK_SIZE=BLOCK,
                                    mask_mod=sees, seq_lengths=(T, T))


def in_order(blocks):
    """bool (n, n) -> how many of each row are True, (1, 1, n), and their numbers, (1, 1, n, n), those of the
    others behind them; int32."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]
