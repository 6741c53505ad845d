"""2:4 weights in the order in which loops of AVX2 read them (quad_picked_* in step.c).

A row is cut into groups of 256 inputs: 32 bytes of places, then the kept weights, 32 bytes at a time, of 16
(fp32), 32 (bf16) or 64 inputs (whole numbers of 8 bits). A processor without AVX-512 picks 4 bytes by their
places inside 16 bytes of inputs, so of every four neighbouring parts (a four of floats, four fours of bytes)
the second and the third change places: a register picks from the first two and then from the last two.
"""
import torch
from torch.nn import functional as F

from kernels.build import cpu_library

GROUP = 256                                      # inputs
INPUTS = {4: 16, 2: 32, 1: 64}                   # of 32 bytes of kept weights, by the bytes of one


def wanted(device, whole=False):
    """Does this processor read 2:4 weights so? With AVX-512 VBMI and BF16 it reads floats as pack_24 gives
    them, and whole numbers alone so."""
    library = cpu_library()[0]
    return device.type == "cpu" and library is not None and library.picks() in (1, 1 + whole)


def lay(values, meta, K):
    """values (N, P/2) in fp32, bf16 or int8 and meta (N, P/32) as pack_24 gives them, of rows of K inputs
    -> (N, bytes of a row) uint8: of a bf16 row of 256 inputs 288, of its dense form 512."""
    size, N = values.element_size(), len(values)
    at = meta[..., None] >> torch.arange(0, 32, 2, dtype=torch.int32, device=meta.device) & 3
    n = 32 if size == 1 else 8                   # kept weights that are picked at once, each by 2 bits
    kept, at = (in_parts(t, n) for t in (values, at.flatten(1)))
    shifts = 2 * torch.arange(at.size(2), dtype=torch.int32, device=at.device)
    places = (at.long() << shifts[:, None]).sum(2)              # (N, groups, n)
    if size == 2:                                # of two times 8 weights the second in the high halves
        kept = kept.unflatten(2, (-1, 2)).transpose(-1, -2).contiguous()
    places = places.to(torch.uint8) if size == 1 else (places - (places >> 31 << 32)).int()
    rows = torch.cat([t.contiguous().view(torch.uint8).reshape(N, places.size(1), -1)
                      for t in (places, kept)], dim=2).flatten(1)
    return rows[:, :-(-K // GROUP) * 32 + -(-K // INPUTS[size]) * 32].contiguous()


def in_parts(t, n):
    """(N, P/2) -> (N, groups, 128/n, n), parts in the order of registers; zeros behind the last."""
    groups = F.pad(t, (0, -t.size(1) % (GROUP // 2))).view(len(t), -1, GROUP // 2 // n, 4, n // 4)
    return groups[..., [0, 2, 1, 3], :].flatten(-2)
