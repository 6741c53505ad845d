"""Weights of whole numbers: how they are made, what they stand for, and what their products are.

8 bits: a row of (N, K) is K whole numbers in -127..127 times one fp32 scale; 4 bits: groups of 32 in a row
are numbers in -8..7 times a bf16 scale. A decode step reads 1/2 or 9/32 of bf16's bytes. What meets them is
rounded, so that products are sums of whole numbers: to 15 bits and one scale a token in front of 8 bits, to
8 bits and a scale for each group in front of 4. In 8 bits and one scale a token the inputs of a Llama, a
few of which are far larger than all others, cost it a percent and more.

codes (N, stride) uint8: rows are padded by zeros to a multiple of 64 numbers. 8 bits: a byte each. 4 bits:
every 32 bytes hold 64 numbers plus 8, the first 32 in the low halves; behind them lie the row's scales, and
rows to a multiple of 64 bytes. scale (N, 2) int32: an 8-bit row's scale as bits, which no .to(dtype)
touches, and the sum of its numbers; (0, 2) for 4 bits. (0, 1): each group of 4 bits also has an offset,
which is added to its numbers times the scale (bf16, behind the row's scales): a file's own 4 bits.
"""
import torch
from torch.nn import functional as F

GROUP = 32
FINEST, DIGIT = 16319, 128                       # as in kernels/step.c: 127 * DIGIT + 63


def quantize(weight, bits, moments=None):
    """weight (N, K) -> codes, scale. 8 bits: the largest |w| of a row is 127. 4 bits: each group tries eleven
    grids, on which its largest |w| lies at -7 to -9, with the scale of least squares, and takes the nearest.
    moments (K,): the mean square of each input; what the products lose on average counts then. A row or
    group with a weight that is not finite becomes NaN."""
    parts = [quantize_rows(part.float(), bits, moments) for part in weight.split(256)]   # what caches hold
    codes, scale = (torch.cat(some) for some in zip(*parts))
    return codes, scale


def quantize_rows(wide, bits, moments=None):
    N, K = wide.shape
    if bits == 8:
        scale = wide.abs().amax(dim=1).clamp(min=1e-30) / 127
        q = whole(wide, scale[:, None], 127, 127)
        bits_of = torch.where(scale.isfinite(), scale, torch.nan).view(torch.int32)
        return (F.pad(q, (0, -K % 64)).view(torch.uint8),
                torch.stack((bits_of, q.sum(dim=1, dtype=torch.int32)), dim=1))
    groups = in_groups(wide, 64)
    q, scale = least_squares(groups, 2 ** (bits - 1) - 1, 1 if moments is None else in_groups(
        (moments.float() / moments.mean()).nan_to_num(1).clamp(1e-4, 1e4)[None], 64))
    codes = torch.cat((nibbles(q + 8), as_bytes(scale)), dim=1)
    return F.pad(codes, (0, -codes.size(1) % 64)), torch.empty(0, 2, dtype=torch.int32, device=wide.device)


OFF = 0.1                                        # of a step: what weights may lie beside a file's levels


def on_levels(weight):
    """weight (N, K) of which each group of 32 in a row lies on at most 16 levels one step apart, as a file of
    4 bits holds them (ggml's Q4_0, Q4_1, Q4_K) -> codes, scale, with an offset a group; None where it does
    not: where a weight is more than OFF of a step, and what bf16 rounds, away."""
    parts = []
    for part in weight.split(256):
        parts.append(rows_on_levels(in_groups(part.float(), 64)))
        if parts[-1] is None:
            return None
    codes = torch.cat(parts)
    return F.pad(codes, (0, -codes.size(1) % 64)), torch.empty(0, 1, dtype=torch.int32, device=weight.device)


def rows_on_levels(groups):
    """groups (N, G, 32) fp32 -> their codes, or None."""
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    near = torch.maximum(low.abs(), high.abs()) / 128                              # twice what bf16 rounds
    step, q = torch.zeros_like(low), torch.zeros_like(groups)
    left = (high > low).nonzero(as_tuple=True)[:2]
    for levels in range(15, 0, -1):              # between the lowest and the highest
        some, least = groups[left], low[left]
        one = (high[left] - least) / levels
        found = ((some - least) / one).round()
        fits = ((some - least - one * found).abs() <= (OFF * one + near[left]) / 2).all(dim=-1)
        here = tuple(places[fits] for places in left)
        step[here], q[here] = one[fits], found[fits]
        left = tuple(places[~fits] for places in left)
        if not len(left[0]):
            break
    scale = step.bfloat16().float()
    offset = (groups - scale * (q - 8)).mean(dim=-1, keepdim=True).bfloat16().float()
    if not ((groups - scale * (q - 8) - offset).abs() <= OFF * step + near).all():
        return None
    return torch.cat((nibbles(q), *(as_bytes(t[..., 0]) for t in (scale, offset))), dim=1)


def nibbles(q):
    """Numbers in 0..15 (N, G, 32), G even -> (N, 16 G) uint8: of each 64 the first 32 in the low halves."""
    low, high = q.to(torch.uint8).unflatten(1, (-1, 2)).unbind(2)
    return (low | high << 4).flatten(1)


def as_bytes(scale):
    """(N, G) -> (N, 2 G) uint8, of bf16."""
    return scale.bfloat16().contiguous().view(torch.uint8)


def whole(wide, scale, least, most):
    """wide / scale as int8 in -least..most; 0 where that is no number."""
    return (wide / scale).round().clamp(-least, most).nan_to_num(0).to(torch.int8)


def in_groups(rows, of):
    """(..., K) -> (..., G, 32), zeros behind each row up to a multiple of `of`."""
    return F.pad(rows, (0, -rows.size(-1) % of)).unflatten(-1, (-1, GROUP))


def least_squares(groups, most=7, by=1):
    """groups (N, G, 32) fp32 -> numbers in -most - 1..most (int8) and their scales (N, G) bf16. by: how much
    the square of each error counts, (1, G, 32)."""
    places = groups.abs().argmax(dim=-1, keepdim=True)
    largest = groups.gather(-1, places)                                              # with its sign
    kept = None
    for step in range(11):
        scale = -largest / (most + 0.2 * step)
        q = whole(groups, torch.where(scale == 0, 1, scale), most + 1, most).float()
        scale = (by * groups * q).sum(-1, keepdim=True) / (by * q * q).sum(-1, keepdim=True).clamp(min=1e-30)
        scale = scale.bfloat16().float()
        q = whole(groups, torch.where(scale == 0, 1, scale), most + 1, most)
        error = (by * (groups - scale * q).square()).sum(-1, keepdim=True)
        if kept is None:
            kept = q, scale, error
        better = error < kept[2]
        kept = tuple(torch.where(better, new, old) for new, old in zip((q, scale, error), kept))
    finite = groups.isfinite().all(dim=-1)
    return kept[0], torch.where(finite, kept[1][..., 0], torch.nan).bfloat16()


def q4_0(weight):
    """weight (N, K) -> what ggml's Q4_0 makes of it, fp32: blocks of 32 in a row (zeros behind the last one)
    are numbers in -8..7 times an fp16 scale, which puts the largest |w| at -8."""
    blocks = in_groups(weight.float(), GROUP)
    largest = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True))           # with its sign
    scale = largest / -8
    return from_blocks((blocks * reciprocal(scale) + 8.5).trunc().clamp(0, 15) - 8, scale, weight)


def q8_0(weight):
    """The same for ggml's Q8_0: numbers in -127..127, a half is rounded away from zero."""
    blocks = in_groups(weight.float(), GROUP)
    scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
    wide = blocks * reciprocal(scale)
    whole_part = wide.abs().floor()
    q = whole_part + (2 * (wide.abs() - whole_part)).floor()
    return from_blocks(wide.sign() * q, scale, weight)


def reciprocal(scale):
    return torch.where(scale == 0, 0, 1 / scale)


def from_blocks(q, scale, like):
    """Numbers (N, G, 32) times scales (N, G, 1) that are stored in fp16 -> (N, K) as `like`, in fp32."""
    kept = scale.half().float()
    return torch.where(kept == 0, 0, q * kept).flatten(1)[:, :like.size(1)]


def dequantize(codes, scale, K):
    """What `quantize` or `on_levels` has made of (N, K) weights, in fp32."""
    if len(scale):
        return codes.view(torch.int8)[:, :K] * scales_of(codes, scale, K)
    two = codes[:, :-(-K // 64) * 32].unflatten(1, (-1, 32))
    q = torch.stack((two & 15, two >> 4), dim=2).flatten(1, 2).float() - 8
    q = q * scales_of(codes, scale, K)[..., None]
    if has_offsets(scale):
        q = q + bf16_of(codes, 36 * -(-K // 64), K)[..., None]
    return q.flatten(1)[:, :K]


def has_offsets(scale):
    """Are they the weights of `on_levels`?"""
    return scale.shape == (0, 1)


def bf16_of(codes, at, K):
    """What 4-bit rows of K numbers hold of each group from byte `at` on -> (N, G) fp32."""
    return codes[:, at:at + 4 * -(-K // 64)].contiguous().view(torch.bfloat16).float()


def scales_of(codes, scale, K):
    """The scales of quantised weights (N, K), in fp32: (N, 1), or of groups (N, G)."""
    if len(scale):
        return scale[:, :1].contiguous().view(torch.float32)
    return bf16_of(codes, 32 * -(-K // 64), K)


def in_whole_numbers(x, largest):
    """x (..., K) -> whole numbers in -largest..largest (fp32), a scale (..., 1); NaN where not finite."""
    x = x.float()
    most = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
    finite = most.isfinite()
    by = torch.full_like(most, largest) / most  # largest / most would be a product: rounded twice
    return torch.where(finite, (x * by).round(), 0), torch.where(finite, most / largest, torch.nan)


def whole_product_reference(x, codes, scale):
    """x (..., K), rounded as above, times quantised weights (N, K) -> (..., N) fp32."""
    rows = dequantize(codes, scale, x.size(-1))
    if len(scale):
        q, by = in_whole_numbers(x, FINEST)
        return F.linear(q, rows) * by
    q, by = in_whole_numbers(in_groups(x.float(), GROUP), 127)
    return F.linear((q * by).flatten(-2)[..., :x.size(-1)], rows)


def whole_rows_sum_reference(a, codes, scale, C):
    """a (..., H), quantised weights (H, C), a row a unit -> (..., C) fp32: the rows' sum, times a."""
    return a.float() @ dequantize(codes, scale, C)
