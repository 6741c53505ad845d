"""An arena: the weights of a model in one piece of memory on huge pages.

A processor that reads weights at the memory's speed looks up the address of every page; 4 KiB pages cost
it up to a third of that speed. PyTorch's own memory does not ask for others.
"""
import mmap
import sys
from pathlib import Path

import torch

HUGE, LINE = 2 << 20, 64                         # bytes of a huge page, and of a line of the cache


def move_weights(model):
    """Move the parameters and buffers of a model on the CPU into an arena, in place: they become views of
    it, with their shapes and strides -> the sentence that says how much of it lies on huge pages;
    empty where there is no more than one of them, or not Linux."""
    if not asks_for_huge_pages():
        return ""
    tensors = [t for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
               if t.is_cpu and t.numel()]
    size = sum(-(-t.nbytes // LINE) * LINE for t in tensors)
    if size < HUGE:
        return ""
    flat, place = room(size), 0
    with torch.no_grad():
        for tensor in tensors:
            view = like(flat[place:place + tensor.nbytes].view(tensor.dtype), tensor)
            view.copy_(tensor)
            tensor.data = view
            place += -(-tensor.nbytes // LINE) * LINE
    granted = min(1.0, granted_bytes(flat.data_ptr()) / size)
    return f"{size / 1e6:,.0f} MB of weights in one arena, {granted:.0%} of it on huge pages"


def zeros(count, device, dtype):
    """Zeros (count,): on the CPU on huge pages, where they fill one."""
    size = count * dtype.itemsize
    huge = device.type == "cpu" and size >= HUGE and asks_for_huge_pages()
    return room(size).view(dtype) if huge else torch.zeros(count, device=device, dtype=dtype)


def asks_for_huge_pages():
    return sys.platform == "linux" and hasattr(mmap, "MADV_HUGEPAGE")


def room(size):
    """So many bytes (size,) uint8 from the start of a huge page on; zeros. On Linux."""
    memory = mmap.mmap(-1, size + 2 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -flat.data_ptr() % HUGE
    return flat[begin:begin + size]


def like(flat, tensor):
    """Elements (n,) as a tensor of another one's shape and order in memory; one that has gaps or overlaps
    becomes contiguous."""
    order = sorted(range(tensor.dim()), key=lambda i: -tensor.stride(i))
    dense = flat.view([tensor.size(i) for i in order])
    view = dense.permute(*(order.index(i) for i in range(tensor.dim()))) if order else flat.view(())
    return view if view.stride() == tensor.stride() else flat.view(tensor.shape)


def granted_bytes(address):
    """Bytes on huge pages of the mapping that holds an address, as the kernel tells."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= address < end
        elif inside and first == "AnonHugePages:":
            return 1024 * int(line.split()[1])
    return 0
