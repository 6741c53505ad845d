"""The Triton kernels by which a card draws the next ids of a decode step (decode/card.py), as the decode
engine's `draw` does: one program a row."""
import triton
import triton.language as tl

from kernels.triton_step import keys, kth


@triton.jit
def mass(x, at, n, most):
    """exp(x - most) of the numbers `at` of n, as step.c has it: what is 87 or more below is 0."""
    y = tl.load(x + at, mask=at < n, other=-float("inf")) - most
    return tl.where(y < -87.0, 0.0, tl.exp(y))


@triton.jit
def mass_from(x, n, most, edge, BLOCK: tl.constexpr):
    """The mass of those of n numbers x whose order is `edge` or more."""
    total = 0.0
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        reaches = keys(x, at, n, False) >= edge
        total += tl.sum(tl.where(reaches, mass(x, at, n, most), 0.0), axis=0)
    return total


@triton.jit
def take(history, start, seen, b, last, V, length, seen_stride):
    """Row b goes on with the id `last`."""
    column = tl.load(start + b) + 1
    last = tl.minimum(last, V - 1)
    tl.store(history + b * length + column, last.to(tl.int64))
    tl.store(start + b, column)
    if seen is not None:
        tl.store(seen + b * seen_stride + last, 1)


@triton.jit
def sift_kernel(logits, history, start, seen, fine, room, some, ids, tops, most_of, about, V, length,
                seen_stride, temperature, top_k, penalty, GREEDY: tl.constexpr, TOP_K: tl.constexpr,
                BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Logits (R, V) of a program's row, penalised where they are `seen` (R, seen_stride): GREEDY: the first
    of the largest is taken, and no draw_kernel follows. Else they are put to `room` by temperature, their
    largest to most_of (R,); with TOP_K those that may be among the k largest to `some`, and their ids:
    no smaller than the k-th of the largest of each CHUNK (tops). about (R, 2): how many, and the order of the
    smallest that stays. fine: 0 once a row's largest logit was not finite."""
    b = tl.program_id(0)
    t, most, wrong = room + b * V, tl.full((), -float("inf"), tl.float32), 0
    for first in range(0, V, BLOCK):
        at = first + tl.arange(0, BLOCK)
        y = tl.load(logits + b * V + at, mask=at < V, other=-float("inf"))
        wrong += tl.sum((y != y).to(tl.int32), axis=0)
        if seen is not None:
            old = tl.load(seen + b * seen_stride + at, mask=at < V, other=0) != 0
            y = tl.where(old, tl.where(y > 0.0, y / penalty, y * penalty), y)
        if not GREEDY:
            y = y / temperature
        tl.store(t + at, y, mask=at < V)
        high = tl.max(tl.reshape(y, (BLOCK // CHUNK, CHUNK)), axis=1)
        most = tl.maximum(most, tl.max(high, axis=0))
        if TOP_K:
            chunk = first // CHUNK + tl.arange(0, BLOCK // CHUNK)
            tl.store(tops + b * tl.cdiv(V, CHUNK) + chunk, high, mask=chunk * CHUNK < V)
    if (wrong > 0) | (most != most) | (tl.abs(most) == float("inf")):
        tl.store(fine, 0)
    tl.debug_barrier()
    if GREEDY:
        last = V
        for first in range(0, V, BLOCK):
            at = first + tl.arange(0, BLOCK)
            y = tl.load(t + at, mask=at < V, other=-float("inf"))
            last = tl.minimum(last, tl.min(tl.where((y == most) & (at < V), at, V), axis=0))
        take(history, start, seen, b, last, V, length, seen_stride)
    else:
        n, edge = V, tl.zeros((), tl.uint32)
        if TOP_K:
            bound = kth(tops + b * tl.cdiv(V, CHUNK), tl.cdiv(V, CHUNK), top_k, False, BLOCK // CHUNK)
            n = 0
            for first in range(0, V, BLOCK):
                at = first + tl.arange(0, BLOCK)
                stays = (keys(t, at, V, False) >= bound) & (at < V)
                place = b * V + n + tl.cumsum(stays.to(tl.int32), axis=0) - 1
                tl.store(some + place, tl.load(t + at, mask=stays), mask=stays)
                tl.store(ids + place, at, mask=stays)
                n += tl.sum(stays.to(tl.int32), axis=0)
            tl.debug_barrier()
            edge = kth(some + b * V, n, top_k, False, BLOCK)     # ties of the k-th stay
        tl.store(most_of + b, most)
        tl.store(about + 2 * b, n)
        tl.store(about + 2 * b + 1, edge.to(tl.int32, bitcast=True))


@triton.jit
def draw_kernel(history, start, seen, some, ids, most_of, about, key, V, length, seen_stride, top_p, min_p,
                TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr):
    """The id behind the token at column start[b] of row b, as choose_id of step.c draws it by the stream's
    key from what sift_kernel has left: written to history and noted in `seen`, and start moves on."""
    b = tl.program_id(0)
    t, most, n = some + b * V, tl.load(most_of + b), tl.load(about + 2 * b)
    edge, ties = tl.load(about + 2 * b + 1).to(tl.uint32, bitcast=True), V
    if TOP_P:
        wanted = top_p * mass_from(t, n, most, edge, BLOCK)
        low, edge, bit = edge, tl.zeros((), tl.uint32), tl.full((), 2147483648, tl.uint32)
        for _ in range(32):
            reach = mass_from(t, n, most, tl.maximum(edge | bit, low), BLOCK)
            edge = tl.where(reach >= wanted, edge | bit, edge)
            bit = bit >> 1
        edge = tl.maximum(edge, low)
        bits = tl.where(edge >= 2147483648, edge ^ 2147483648, edge ^ 4294967295)
        each = tl.exp(bits.to(tl.float32, bitcast=True) - most)           # of the equals at the edge
        above = mass_from(t, n, most, edge + 1, BLOCK)
        ties = tl.maximum(1, tl.ceil((wanted - above) / each).to(tl.int32))
    total = tl.zeros((), tl.float64)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        rising, e = keys(t, at, n, False), mass(t, at, n, most)
        equal = (rising == edge).to(tl.int32)
        stays = (rising > edge) | ((equal > 0) & (tl.cumsum(equal, axis=0) <= ties))
        ties -= tl.sum(equal, axis=0)
        e = tl.where(stays & (e >= min_p), e, 0.0)
        total += tl.sum(e, axis=0).to(tl.float64)
        tl.store(t + at, e, mask=at < n)
    tl.debug_barrier()
    column = tl.load(start + b) + 1
    high, low_word, _, _ = tl.philox(tl.load(key), column.to(tl.uint32), (column >> 32).to(tl.uint32),
                                     b.to(tl.uint32), 0)
    u = (high.to(tl.uint64) << 21 | (low_word >> 11).to(tl.uint64)).to(tl.float64) * 2.0 ** -53
    want, before, last, end = u * total, tl.zeros((), tl.float64), V, 0
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        e = tl.load(t + at, mask=at < n, other=0.0)
        reached = (before + tl.cumsum(e, axis=0).to(tl.float64) > want) & (e > 0.0)
        last = tl.minimum(last, tl.min(tl.where(reached, at, V), axis=0))
        end = tl.maximum(end, tl.max(tl.where(e > 0.0, at, 0), axis=0))
        before += tl.sum(e, axis=0).to(tl.float64)
    last = tl.minimum(last, end)                                 # sums that rounded
    if TOP_K:
        last = tl.load(ids + b * V + last)
    take(history, start, seen, b, last, V, length, seen_stride)


def draw_tiles(V):
    """Tiles of sift_kernel and of draw_kernel over V ids."""
    BLOCK = min(4096, max(64, triton.next_power_of_2(V)))
    return (dict(BLOCK=BLOCK, CHUNK=min(64, BLOCK // 16), num_warps=16 if BLOCK > 1024 else 4),
            dict(BLOCK=min(2048, BLOCK), num_warps=8 if BLOCK > 1024 else 4))
