"""The Triton kernels by which the tokens of a decode step part ways on a card (decode/card.py), one program a
row: it leaves early, it has pondered enough, its group of tokens is complete. What they decide stands in
`live` (rows,), which the kernels of triton_step.py between them look at: the host never asks.

Numbers are rounded as bio_modules.py's forward stores them.
"""
import triton
import triton.language as tl

from kernels.triton_step import input_of, numbers, rounded, statistics

WIDE = 1024                                      # numbers of a row at a time


@triton.jit
def chance(x, weight, bias, b, C, eps, BC: tl.constexpr):
    """sigmoid(weight . rms(x[b]) + bias) of x (R, C), where the norm and the product are rounded."""
    row, one = x + b * C, tl.zeros((1, 1, 1), tl.int32)
    mean, by = statistics(row, one, 1, C, C, eps, False, 1, BC)
    sums = tl.zeros((1, 1, BC), tl.float32)
    for first in range(0, C, BC):
        k = first + tl.arange(0, BC)[None, None, :]
        y = input_of(row, None, None, None, mean, by, x, one, k, 1, C, 1, "rmsnorm", 1)
        sums += numbers(weight, None, one, k, k < C, C, C, 16) * y
    y = tl.sum(tl.sum(tl.sum(sums, axis=2), axis=1), axis=0)
    if bias is not None:
        y += tl.load(bias).to(tl.float32)
    return 1.0 / (1.0 + tl.exp(-rounded(y, x)))


@triton.jit
def leave_kernel(x, weight, bias, live, tokens, layers, C, eps, threshold, depth, most, FIRST: tl.constexpr,
                 BC: tl.constexpr):
    """Rows whose probe says more than `threshold` behind `depth` layers of `most` are live no longer. tokens,
    layers (R,): how many have come by, and what they have run. FIRST: all rows come by."""
    b = tl.program_id(0)
    if FIRST:
        tl.store(tokens + b, tl.load(tokens + b) + 1)
        run = tl.load(layers + b) + most
    else:
        if tl.load(live + b) == 0:
            return
        run = tl.load(layers + b)
    stays = ~(chance(x, weight, bias, b, C, eps, BC) > threshold)
    tl.store(live + b, stays.to(tl.int32))
    tl.store(layers + b, run - tl.where(stays, 0, most - depth))


@triton.jit
def halt_kernel(x, weight, bias, total, left, outer, live, tokens, runs, kept, later, start, R, C, eps,
                epsilon, cells, size, D, count, FIRST: tl.constexpr, LAST: tl.constexpr, BC: tl.constexpr,
                BD: tl.constexpr):
    """Behind a run of a block: rows halt where no more than epsilon is left of 1, or all (LAST); total (R, C)
    gets x times the chance of it, or times all that is left (R,). Rows that halt give the keys and values of
    this run, kept (2, R, cells / 2, size, D), to `count` later runs, whose caches follow `later`. tokens,
    runs (R,): how many have come and what they have run. FIRST: all rows begin, or those that are live in
    `outer`."""
    b = tl.program_id(0)
    if FIRST:
        if outer is not None:
            if tl.load(outer + b) == 0:
                tl.store(live + b, 0)
                return
        tl.store(tokens + b, tl.load(tokens + b) + 1)
        rest = 1.0
    else:
        if tl.load(live + b) == 0:
            return
        rest = tl.load(left + b)
    p = chance(x, weight, bias, b, C, eps, BC)
    halts = rest - p <= epsilon
    if LAST:
        halts = p == p
    weigh = rounded(tl.where(halts, rest, p), x)
    tl.store(left + b, rest - tl.where(halts, rest, p))
    tl.store(live + b, (~halts).to(tl.int32))
    tl.store(runs + b, tl.load(runs + b) + 1)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        more = rounded(weigh * tl.load(x + b * C + c, mask=c < C, other=0.0).to(tl.float32), x)
        if not FIRST:
            more += tl.load(total + b * C + c, mask=c < C, other=0.0).to(tl.float32)
        tl.store(total + b * C + c, more.to(total.dtype.element_ty), mask=c < C)
    if not LAST:
        if halts:
            d, half = tl.arange(0, BD), cells // 2
            place = (tl.load(start + b) % size).to(tl.int32)
            for cell in range(cells):
                at = ((cell // half * R + b) * half + cell % half).to(tl.int64) * size + place
                y = tl.load(kept + at * D + d, mask=d < D, other=0.0)
                for _ in range(count):
                    tl.store(later + at * D + d, y, mask=d < D)
                    at += R * cells * size


@triton.jit
def group_kernel(x, states, pool, start, groups, before, live, ends, C, EVERY: tl.constexpr,
                 BC: tl.constexpr):
    """x (R, C) of tokens at columns `start` goes to its place in its group, states (R, EVERY, C). A row whose
    group is complete is live: its tokens times pool (EVERY, C) are summed to groups and to before (R, C), and
    `ends` (R,) is the number of the group."""
    b = tl.program_id(0)
    column = tl.load(start + b)
    phase, complete = column % EVERY, (column + 1) % EVERY == 0
    tl.store(live + b, complete.to(tl.int32))
    tl.store(ends + b, column // EVERY)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        y = tl.load(x + b * C + c, mask=c < C, other=0.0)
        tl.store(states + (b * EVERY + phase) * C + c, y, mask=c < C)
        if complete:
            sums = tl.zeros((BC,), tl.float32)
            for t in tl.static_range(EVERY - 1):
                old = tl.load(states + (b * EVERY + t) * C + c, mask=c < C, other=0.0).to(tl.float32)
                sums += rounded(old * tl.load(pool + t * C + c, mask=c < C, other=0.0).to(tl.float32), x)
            by = tl.load(pool + (EVERY - 1) * C + c, mask=c < C, other=0.0).to(tl.float32)
            sums = (sums + rounded(y.to(tl.float32) * by, x)).to(x.dtype.element_ty)
            tl.store(groups + b * C + c, sums, mask=c < C)
            tl.store(before + b * C + c, sums, mask=c < C)


@triton.jit
def spread_kernel(groups, before, x, told, factors, start, live, C, EVERY: tl.constexpr, BC: tl.constexpr):
    """What the middle layers have added to a live row's group, groups - before, is kept in told (R, C); x
    gets what is told times the factors (EVERY, C) of the token's phase."""
    b = tl.program_id(0)
    phase, complete = (tl.load(start + b) + 1) % EVERY, tl.load(live + b) != 0
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        at, here = b * C + c, c < C
        said = tl.load(told + at, mask=here, other=0.0).to(tl.float32)
        if complete:
            new = tl.load(groups + at, mask=here, other=0.0).to(tl.float32)
            said = rounded(new - tl.load(before + at, mask=here, other=0.0).to(tl.float32), x)
            tl.store(told + at, said.to(told.dtype.element_ty), mask=here)
        y = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        y += rounded(said * tl.load(factors + phase * C + c, mask=here, other=0.0).to(tl.float32), x)
        tl.store(x + at, y.to(x.dtype.element_ty), mask=here)
