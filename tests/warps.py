"""Runs a Gluon kernel that multiplies by mma.sp without a GPU, from its own text: a tensor holds a number
for every thread, and the two instructions are done as the PTX ISA defines them, warp by warp. Loads and
stores out of bounds are errors. A kernel that an H200 has run came out right here too."""
import re
import types

import torch


class Pointer:
    """A tensor's memory and, for every thread, a place in it."""
    def __init__(self, memory, at=0):
        self.memory, self.at = memory, at
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, at):
        return Pointer(self.memory, self.at + at)


def load(pointer, mask=None, other=0):
    at, mask = torch.broadcast_tensors(torch.as_tensor(pointer.at), torch.as_tensor(mask is None or mask))
    found = torch.full(at.shape, other, dtype=pointer.memory.dtype)
    inside = at[mask].long()
    assert not len(inside) or 0 <= inside.min() <= inside.max() < pointer.memory.numel()
    found[mask] = pointer.memory.view(-1)[inside]
    return found


def store(pointer, value, mask):
    at, mask, value = torch.broadcast_tensors(pointer.at, mask, value)
    at = at[mask].long()
    assert not len(at) or (0 <= at.min() <= at.max() < pointer.memory.numel() and len(at.unique()) == len(at))
    pointer.memory.view(-1)[at] = value[mask]


def assembly(text, constraints, args, dtype, is_pure, pack):
    kind = {"bf16": torch.bfloat16, "f16": torch.float16}[re.search(r"\.(b?f16)(?:x2)?[ .]", text)[1]]
    if "fma.rn." in text:                        # both halves of a word, times zero
        x, onto = (t.contiguous()[..., None].view(kind) for t in args)
        return (onto.float() + x.float() * 0).to(kind).view(torch.int32)[..., 0]
    half = int(re.search(r"0x([01]);", text)[1])
    warps = [t.reshape(-1, 32) for t in args]
    done = [multiply([t[w] for t in warps], half, kind) for w in range(len(warps[0]))]
    return tuple(torch.cat(part) for part in zip(*done))


def multiply(registers, half, kind):
    """mma.sp.m16n8k32 of a warp: a (16 x 32, of which two of four are there), b (32 x 8), c (16 x 8)."""
    a, b, c, (places,) = registers[:4], registers[4:8], registers[8:12], registers[12:]
    left, right = torch.zeros(16, 32), torch.empty(32, 8)
    there = torch.zeros(16, 32, dtype=torch.bool)
    for lane in range(32):
        group, own = lane // 4, lane % 4
        for register in range(4):
            row, first = group + register % 2 * 8, own * 4 + register // 2 * 16
            word = int(places[group * 4 + half * 2 + register // 2])
            code = word >> register % 2 * 16 + own * 4 & 15
            assert code & 3 < code >> 2          # "ordered metadata"
            kept = a[register][lane].reshape(1).view(kind).float()
            for i in range(2):
                left[row, first + (code >> 2 * i & 3)] = kept[i]
                there[row, first + (code >> 2 * i & 3)] = True
            right[own * 2 + register * 8:, group][:2] = b[register][lane].reshape(1).view(kind).float()
    assert there.view(16, 8, 4).sum(2).eq(2).all()
    sums = torch.where(there[:, :, None], left[:, :, None] * right[None], 0.0).sum(1)
    lane = torch.arange(32)
    return [c[i] + sums[lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2] for i in range(4)]


def layout(*_):
    return None


def run(kernel, grid, *args, **constants):
    """Every program of `grid`, one after the other; args: tensors, numbers or None, in the kernel's order."""
    for first in range(grid[0]):
        for second in range((*grid, 1)[1]):
            language = types.SimpleNamespace(
                program_id=lambda axis: (first, second)[axis], load=load, store=store,
                arange=lambda a, b, layout: torch.arange(a, b, dtype=torch.int32),
                zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
                full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
                split=lambda t: t.unbind(-1), sum=lambda t, axis: t.sum(axis), erf=torch.erf,
                where=torch.where, convert_layout=lambda t, *_, **__: t,
                minimum=lambda t, most: t.clamp(max=most),
                inline_asm_elementwise=assembly, static_range=range, BlockedLayout=layout, SliceLayout=layout,
                constexpr=None, float32=torch.float32, int32=torch.int32, int64=torch.int64)
            in_torch(kernel, language)(*(Pointer(t) if torch.is_tensor(t) else t for t in args), **constants)


def in_torch(kernel, language):
    """A kernel as a function that finds `language` where it says gl, and those it calls likewise."""
    code, known = kernel.fn.__code__, kernel.fn.__globals__
    names = {name: in_torch(known[name], language) if hasattr(known[name], "fn") else known[name]
             for name in code.co_names if name in known} | {"gl": language}
    return types.FunctionType(code, names, kernel.fn.__name__, kernel.fn.__defaults__)
