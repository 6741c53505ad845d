"""The Triton kernels of a decode step on a card (decode/card.py): at most five a layer, for 1 to 8 rows.

Every sum is in fp32, in an order that the shapes alone decide: a step gives the same bits each time. What a
prompt would store in the stream's dtype is rounded to it here too. ROWS is the number of rows, rounded up to
a power of 2. Tensors that a kernel does not use are None, and no code is made for them. live (rows,): for
rows at 0 nothing is stored, and where all are, nothing is read (kernels/triton_depth.py).
"""
import triton
import triton.language as tl


@triton.jit
def rounded(y, like):
    """fp32 as it would come back from memory of the type that `like` points to."""
    return y.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def activate(y, like, ACT: tl.constexpr):
    """none, relu2, gelu, gelu_tanh or silu of fp32. NaN stays NaN."""
    if ACT == "relu2":
        y = tl.where(y < 0.0, 0.0, y)
        y = y * y
    if ACT == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    if ACT == "gelu_tanh":
        z = 1.5957691216057308 * (y + 0.044715 * y * y * y)
        y = y * (1.0 - 1.0 / (1.0 + tl.exp(z)))
    if ACT == "silu":
        y = y / (1.0 + tl.exp(-y))
    return rounded(y, like)


@triton.jit
def sine(z):
    """To 1e-6 where |z| < 1e4: z less the nearest multiple of pi, by Taylor. tl.sin has a path for larger z
    that wants memory of its own."""
    n = whole(z, 0.3183098861837907)
    r = z - n * 3.140625 - n * 9.67653589793e-4
    s = r * r
    y = 1.0 + s * (-1.0 / 6 + s * (1.0 / 120 + s * (-1.0 / 5040 + s * (1.0 / 362880 - s * (1.0 / 39916800)))))
    return tl.where(n - 2.0 * tl.floor(n * 0.5) == 0.0, r * y, -r * y)


@triton.jit
def oscillate(y, waves, n, N, like):
    """sin(w y + phi) tanh(y) + b of fp32, w, phi and b in waves (3, N) by units n."""
    w = tl.load(waves + n, mask=n < N, other=0.0).to(tl.float32)
    phi = tl.load(waves + N + n, mask=n < N, other=0.0).to(tl.float32)
    b = tl.load(waves + 2 * N + n, mask=n < N, other=0.0).to(tl.float32)
    return rounded(sine(w * y + phi) * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * y))) + b, like)


@triton.jit
def of_bf16(bits):
    """What the bits of a bf16, as int16, stand for."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def numbers(weight, scale, row, k, here, K, stride, BITS: tl.constexpr):
    """Numbers k of the rows `row` of weights (N, K), `stride` apart, in fp32; of 8 bits without the row's
    scale. 4 bits lie as kernels.quantize lays them: 32 bytes hold two groups of 32, and behind them are the
    groups' scales in bf16, which `scale` points to as int16; 5: behind these their offsets too."""
    at = weight + row.to(tl.int64) * stride
    if BITS == 4 or BITS == 5:
        w = tl.load(at + k // 64 * 32 + k % 32, mask=here, other=8, eviction_policy="evict_first")
        q = ((w.to(tl.int32) >> (k // 32 % 2 * 4)) & 15) - 8
        group = scale + row.to(tl.int64) * (stride // 2) + tl.cdiv(K, 64) * 16 + k // 32
        y = q.to(tl.float32) * of_bf16(tl.load(group, mask=here, other=0))
        if BITS == 5:
            y += of_bf16(tl.load(group + tl.cdiv(K, 64) * 2, mask=here, other=0))
        return y
    return tl.load(at + k, mask=here, other=0, eviction_policy="evict_first").to(tl.float32)


# ------------------------------------------------ the token -----------------------------------------------


@triton.jit
def embed_kernel(history, start, table, scale, positions, ngrams, x, length, C, stride, buckets,
                 BITS: tl.constexpr, ORDER: tl.constexpr, BC: tl.constexpr):
    """x[b] = table[the id at column start[b] of row b] + positions[start[b]]. Moves 3 C numbers a row, and C
    more for each of the n-grams, 2 to ORDER ids long, whose rows of `ngrams` (buckets, C) are added too."""
    b = tl.program_id(0)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    column = tl.load(start + b)
    token = tl.load(history + b * length + column)
    y = numbers(table, scale, token, c, c < C, C, stride, BITS)
    if BITS == 8:
        y *= tl.load(scale + 2 * token)
    y = rounded(y, x)
    if ngrams is not None:
        key, sums = (token + 1) * 1000003, tl.zeros((BC,), tl.float32)
        for n in tl.static_range(ORDER - 1):
            before = tl.load(history + b * length + column - n - 1, mask=column > n, other=-1)
            key = key * 31 + (before + 1) * 10007 + n
            row = key % buckets
            row = tl.where(row < 0, row + buckets, row)
            sums += tl.load(ngrams + row * C + c, mask=c < C, other=0.0).to(tl.float32)
        y = rounded(y + rounded(sums, x), x)
    if positions is not None:
        y += tl.load(positions + column * C + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(x + b * C + c, y.to(x.dtype.element_ty), mask=c < C)


# ------------------------------------------------ products ------------------------------------------------


@triton.jit
def part(x, r, k, R, K):
    """Numbers k (1, 1, BK) of the rows r (ROWS, 1, 1) in fp32, zeros outside."""
    return tl.load(x + r * K + k, mask=(r < R) & (k < K), other=0.0).to(tl.float32)


@triton.jit
def statistics(x, r, R, K, end, eps, CENTRED: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr):
    """Mean (0 unless CENTRED) and 1 / deviation of each row, (ROWS, 1, 1). end: K; 0: nobody will ask."""
    mean = tl.zeros((ROWS, 1, 1), tl.float32)
    if CENTRED:
        sums = tl.zeros((ROWS, 1, BK), tl.float32)
        for first in range(0, end, BK):
            sums += part(x, r, first + tl.arange(0, BK)[None, None, :], R, K)
        mean = tl.sum(sums, axis=2)[:, :, None] / K
    squares = tl.zeros((ROWS, 1, BK), tl.float32)
    for first in range(0, end, BK):
        k = first + tl.arange(0, BK)[None, None, :]
        y = tl.where(k < K, part(x, r, k, R, K) - mean, 0.0)
        squares += y * y
    return mean, 1.0 / tl.sqrt(tl.sum(squares, axis=2)[:, :, None] / K + eps)


@triton.jit
def joined(x, marks, r, k, R, K, splits, D: tl.constexpr):
    """Numbers k of what attend_kernel has left in parts (splits, R, K), marks (2, splits, R, heads)."""
    here, heads = (r < R) & (k < K), K // D
    mark = marks + r * heads + k // D
    high = tl.load(mark, mask=here, other=0.0)
    for s in range(1, splits):
        high = tl.maximum(high, tl.load(mark + s * R * heads, mask=here, other=0.0))
    total, y = tl.zeros_like(high), tl.zeros_like(high)
    for s in range(splits):
        by = tl.exp(tl.load(mark + s * R * heads, mask=here, other=0.0) - high)
        total += by * tl.load(mark + (splits + s) * R * heads, mask=here, other=1.0)
        y += by * tl.load(x + (s * R + r) * K + k, mask=here, other=0.0)
    return y / total


@triton.jit
def input_of(x, marks, gain, shift, mean, by, like, r, k, R, K, splits, INPUT: tl.constexpr, D: tl.constexpr):
    """Numbers k of what a product multiplies, rounded as memory would hold it."""
    if INPUT == "join":
        return rounded(joined(x, marks, r, k, R, K, splits, D), like)
    y = part(x, r, k, R, K)
    if INPUT == "layernorm" or INPUT == "rmsnorm":
        y = (y - mean) * by
        if gain is not None:
            y *= tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)
        if shift is not None:
            y += tl.load(shift + k, mask=k < K, other=0.0).to(tl.float32)
        y = rounded(y, like)
    return y


@triton.jit
def arrives_last(arrived, programs):
    """Has each other of so many programs stored all that it stores? Then the counter is zero again."""
    tl.debug_barrier()
    last = tl.atomic_add(arrived, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(arrived, 0)
    return last


@triton.jit
def order(y):
    """Whole numbers that rise with y from 1 on, NaN above everything; -0 is 0."""
    y = tl.where(y == 0.0, 0.0, y)
    bits = y.to(tl.uint32, bitcast=True)
    rising = tl.where(y < 0.0, bits ^ 4294967295, bits | 2147483648)
    return tl.where(y != y, 4294967295, rising)


@triton.jit
def keys(x, at, n, ABS: tl.constexpr):
    """order of the numbers `at` of x, or of their sizes; 0 behind the n-th."""
    y = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
    if ABS:
        y = tl.abs(y)
    return tl.where(at < n, order(y), 0)


@triton.jit
def kth(x, n, k, ABS: tl.constexpr, BLOCK: tl.constexpr):
    """order of the k-th largest of n numbers x or of their sizes, found bit by bit; 0 where k exceeds n."""
    edge, bit = tl.zeros((), tl.uint32), tl.full((), 2147483648, tl.uint32)
    for _ in range(32):
        reach = 0
        for first in range(0, n, BLOCK):
            at = first + tl.arange(0, BLOCK)
            reach += tl.sum((keys(x, at, n, ABS) >= (edge | bit)).to(tl.int32), axis=0)
        edge = tl.where(reach >= k, edge | bit, edge)
        bit = bit >> 1
    return edge


@triton.jit
def keep_largest(x, picked, n, k, ABS: tl.constexpr, BLOCK: tl.constexpr):
    """Of n numbers x the k largest, of equal ones the first: picked = 1 for them, else 0. ABS: all but the k
    largest |x| become zero where they lie."""
    edge, spare = kth(x, n, k, ABS, BLOCK), k
    for first in range(0, n, BLOCK):
        spare -= tl.sum((keys(x, first + tl.arange(0, BLOCK), n, ABS) > edge).to(tl.int32), axis=0)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        key = keys(x, at, n, ABS)
        equal = (key == edge).to(tl.int32)
        chosen = (key > edge) | ((equal > 0) & (tl.cumsum(equal, axis=0) <= spare))
        spare -= tl.sum(equal, axis=0)
        if ABS:
            tl.store(x + at, tl.zeros((BLOCK,), x.dtype.element_ty), mask=(at < n) & ~chosen)
        else:
            tl.store(picked + at, chosen.to(tl.float32), mask=at < n)


@triton.jit
def open_groups(scores, picked, inhibits, balance, like, M, k, CHOICE: tl.constexpr, BLOCK: tl.constexpr,
                SOME: tl.constexpr):
    """The gates of M groups (BLOCK or fewer), zero but for k of them, of equal ones the first. columns: those
    whose score less what the others inhibit it by, plus balance, is largest open by the sigmoid of the
    former. experts: those with the largest shares by softmax, made to sum to 1. branches: those with the
    largest sigmoids, of which but the first must be a half or more. Groups meet SOME others at a time, which
    lie in scores and then in picked."""
    m = tl.arange(0, BLOCK)
    s = tl.load(scores + m, mask=m < M, other=-float("inf")).to(tl.float32)
    if CHOICE == "columns":
        for first in range(0, M, SOME):
            other = first + tl.arange(0, SOME)
            active = tl.load(scores + other, mask=other < M, other=0.0).to(tl.float32)
            by = tl.load(inhibits + m[:, None] * M + other[None, :],
                         mask=(m < M)[:, None] & (other < M)[None, :], other=0.0)
            s -= tl.sum(by * tl.where(active < 0.0, 0.0, active)[None, :], axis=1)
        rank = s + tl.load(balance + m, mask=m < M, other=0.0).to(tl.float32)
        gate = 1.0 / (1.0 + tl.exp(-s))
    elif CHOICE == "branches":
        gate = 1.0 / (1.0 + tl.exp(-s))
        rank = gate
    else:
        gate = tl.exp(s - tl.max(s, axis=0))
        gate = gate / tl.sum(gate, axis=0)
        rank = gate
    tl.store(picked + m, rank, mask=m < M)
    tl.debug_barrier()
    key, ahead = order(rank), tl.zeros((BLOCK,), tl.int32)
    for first in range(0, M, SOME):
        other = first + tl.arange(0, SOME)
        theirs = keys(picked, other, M, False)[None, :]
        before = (theirs > key[:, None]) | ((theirs == key[:, None]) & (other[None, :] < m[:, None]))
        ahead += tl.sum(before.to(tl.int32), axis=1)
    chosen = (ahead < k) & (m < M)
    if CHOICE == "branches":
        chosen = chosen & ((gate >= 0.5) | (ahead == 0))
    if CHOICE == "experts":
        gate = gate / tl.sum(tl.where(chosen, gate, 0.0), axis=0)
    tl.debug_barrier()
    tl.store(picked + m, tl.where(chosen, rounded(gate, like), 0.0), mask=m < M)


@triton.jit
def route(x, gain, shift, router, scores, R, K, M, eps, NORM: tl.constexpr, ROWS: tl.constexpr,
          BM: tl.constexpr, BT: tl.constexpr):
    """scores[r] = router (M, K) times the norm of x[r], by one program."""
    r = tl.arange(0, ROWS)[:, None, None]
    mean, by = statistics(x, r, R, K, K, eps, NORM == "layernorm", ROWS, BT)
    for begin in range(0, M, BM):
        m, sums = begin + tl.arange(0, BM)[None, :, None], tl.zeros((ROWS, BM, BT), tl.float32)
        for first in range(0, K, BT):
            k = first + tl.arange(0, BT)[None, None, :]
            y = input_of(x, None, gain, shift, mean, by, x, r, k, R, K, 1, NORM, 1)
            sums += numbers(router, None, tl.minimum(m, M - 1), k, k < K, K, K, 16) * y
        row, m = tl.arange(0, ROWS)[:, None], begin + tl.arange(0, BM)[None, :]
        y = tl.sum(sums, axis=2)
        tl.store(scores + row * M + m, y.to(scores.dtype.element_ty), mask=(row < R) & (m < M))
    tl.debug_barrier()


@triton.jit
def whole(y, to_whole):
    """y rounded to whole numbers, ties to even: 1.5 * 2^23 and y have a sum without a fraction."""
    return y * to_whole + 12582912.0 - 12582912.0


@triton.jit
def in_groups(y, ROWS: tl.constexpr, BK: tl.constexpr):
    """y (ROWS, 1, BK) as groups of 32 in 8 bits hold it; NaN where a group is not finite."""
    groups = tl.reshape(y, (ROWS, BK // 32, 32))
    sizes = tl.where(groups == groups, tl.abs(groups), float("inf"))
    tops = tl.maximum(tl.max(sizes, axis=2), 1e-30)[:, :, None]
    by = tl.div_rn(tl.full((ROWS, 1, 1), 127.0, tl.float32), tops)
    return tl.reshape(whole(groups, by) * (tops / 127.0), (ROWS, 1, BK))


@triton.jit
def picked_sums(weight, places, row, first, here, stride, y, ROWS: tl.constexpr, BK: tl.constexpr):
    """The products of y (ROWS, 1, BK), numbers from `first` on of an input, with 2:4 rows as pack_24 lays
    them, of 8 bits without the row's scale: (ROWS, BN, BK / 4), a sum for each four. NaN where the input is
    not finite, as the dense product has it of the rows that prune what meets it."""
    four = first // 4 + tl.arange(0, BK // 4)[None, None, :]
    both = row.to(tl.int64)[:, :, :, None] * stride + 2 * four[:, :, :, None] + tl.arange(0, 2)[
        None, None, None, :]
    inside = here & (2 * four < stride)
    kept = tl.load(weight + both, mask=inside[:, :, :, None], other=0, eviction_policy="evict_first")
    low, high = tl.split(kept.to(tl.float32))
    code = tl.load(places + row.to(tl.int64) * (stride // 16) + four // 8, mask=inside, other=0,
                   eviction_policy="evict_first") >> (four % 8 * 4)
    one, two = code & 3, (code >> 2) & 3
    even, odd = tl.split(tl.reshape(y, (ROWS, 1, BK // 4, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    sums = low * tl.where(one == 0, x0, tl.where(one == 1, x1, x2))
    sums += high * tl.where(two == 1, x1, tl.where(two == 2, x2, x3))
    return sums + (x0 * 0.0 + x1 * 0.0 + x2 * 0.0 + x3 * 0.0)


@triton.jit
def product_kernel(x, marks, gain, shift, weight, scale, places, bias, onto, out, gates, copy, copy_scale,
                   arrived, router, scores, picked, inhibits, balance, waves, edges, R, N, K, stride, splits,
                   eps, cap, width, copy_stride, edge, M, best, live, always, fold, length,
                   INPUT: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, D: tl.constexpr,
                   BITS: tl.constexpr, COPY: tl.constexpr, ROUTE: tl.constexpr, CHOICE: tl.constexpr,
                   ALIKE: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                   BM: tl.constexpr, BT: tl.constexpr, BLOCK: tl.constexpr):
    """out[r, BN outputs] = act(W f(x[r]) + bias) + onto, W (N, K) read once for all rows. f by INPUT: plain;
    layernorm or rmsnorm with gain and shift, by every program for itself; join, the splits of attention.
    GATED: W has 2 N rows, and out = act(the first N) * the others. waves (3, N): w, phi and b of an osc,
    which is then the activation. edges (N,): out is zero unless its size exceeds its own. cap: bounds the
    result, where it is not None. BITS: of whole numbers, which meet f(x) as whole_product_reference rounds
    it, 5: of 4 bits with offsets; 16: floats. places: of floats or 8 bits two of four are there
    (picked_sums).

    Rows of W that no row of x wants are not read, and out is zero there. gates (R, N / width): out is
    multiplied by the gate of its group, zero: not wanted; ALIKE: no more than that. COPY: a copy of W in so
    many bits says, plus bias, by a score above `edge`, or one that is not a number, which outputs are wanted.
    Outputs from `always` on are stored for rows that are not live too. fold: so many outputs in turn meet K
    of the `length` numbers of x, the next so many the K behind these (INPUT plain).

    The program that arrives last goes on with what takes all outputs. ROUTE: the norm of out, by this name,
    with gain and shift, times a router (M, N), to scores. CHOICE: keep the `best` largest outputs, or open
    the `best` of M groups or units by their scores, in `picked`."""
    r = tl.arange(0, ROWS)[:, None, None]
    n = tl.program_id(0) * BN + tl.arange(0, BN)[None, :, None]
    r2, n2 = tl.arange(0, ROWS)[:, None], tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
    at, here = r2 * N + n2, (r2 < R) & (n2 < N)
    if live is not None:
        alive = tl.load(live + r2, mask=r2 < R, other=0) != 0
        if (tl.max(alive.to(tl.int32)) == 0) & ((tl.program_id(0) + 1) * BN <= always):
            return
        here = here & (alive | (n2 >= always))
    like = x                                     # of the stream's dtype
    if INPUT == "join":
        like = out
    if fold is not None:
        x = x + tl.program_id(0) * BN // fold * K + r * (length - K)
    row, end = tl.minimum(n, N - 1), K
    wanted, gate = n < N, tl.full((ROWS, BN), 1.0, tl.float32)
    if gates is not None:
        gate = tl.load(gates + r2 * (N // width) + n2 // width, mask=here, other=0.0).to(tl.float32)
        wanted = tl.max((gate != 0.0).to(tl.int32), axis=0)[None, :, None] > 0
        end = tl.max(wanted.to(tl.int32)) * K
    mean, by = 0.0, 1.0
    if INPUT == "layernorm" or INPUT == "rmsnorm":
        mean, by = statistics(x, r, R, K, end, eps, INPUT == "layernorm", ROWS, BK)
    if BITS == 8 or COPY == 8:
        tops = tl.full((ROWS, 1, BK), 1e-30, tl.float32)
        for first in range(0, end, BK):
            k = first + tl.arange(0, BK)[None, None, :]
            y = input_of(x, marks, gain, shift, mean, by, like, r, k, R, K, splits, INPUT, D)
            tops = tl.where(y == y, tl.maximum(tops, tl.abs(y)), float("inf"))
        to_whole = tl.div_rn(tl.full((ROWS, 1, 1), 16319.0, tl.float32), tl.max(tops, axis=2)[:, :, None])
    if COPY > 0:
        copied = tl.zeros((ROWS, BN, BK), tl.float32)
        for first in range(0, K, BK):
            k = first + tl.arange(0, BK)[None, None, :]
            y = input_of(x, marks, gain, shift, mean, by, like, r, k, R, K, splits, INPUT, D)
            y = whole(y, to_whole) if COPY == 8 else in_groups(y, ROWS, BK)
            copied += numbers(copy, copy_scale, row, k, k < K, K, copy_stride, COPY) * y
        if COPY == 8:
            copied = copied / to_whole
        score = tl.sum(copied, axis=2)
        if COPY == 8:
            score *= tl.load(copy_scale + 2 * n2, mask=n2 < N, other=0.0)
        if bias is not None:
            score += tl.load(bias + n2, mask=n2 < N, other=0.0).to(tl.float32)
        gate = tl.where(here & ~(rounded(score, like) <= edge), 1.0, 0.0)
        wanted = tl.max((gate != 0.0).to(tl.int32), axis=0)[None, :, None] > 0
        end = tl.max(wanted.to(tl.int32)) * K
    SUMS: tl.constexpr = BK // 4 if places is not None else BK
    sums, others = tl.zeros((ROWS, BN, SUMS), tl.float32), tl.zeros((ROWS, BN, SUMS), tl.float32)
    for first in range(0, end, BK):
        k = first + tl.arange(0, BK)[None, None, :]
        inside = k < K
        if COPY > 0 or gates is not None:
            inside = inside & wanted
        if places is None:
            w = numbers(weight, scale, row, k, inside, K, stride, BITS)
        y = input_of(x, marks, gain, shift, mean, by, like, r, k, R, K, splits, INPUT, D)
        if BITS == 8:
            y = whole(y, to_whole)
        if BITS == 4 or BITS == 5:
            y = in_groups(y, ROWS, BK)
        if places is not None:
            sums += picked_sums(weight, places, row, first, wanted, stride, y, ROWS, BK)
            if GATED:
                others += picked_sums(weight, places, row + N, first, n < N, stride, y, ROWS, BK)
        else:
            sums += w * y
            if GATED:
                others += numbers(weight, scale, row + N, k, k < K, K, stride, BITS) * y
    if BITS == 8:
        sums, others = sums / to_whole, others / to_whole        # NaN where a number is not finite
    r, n = r2, n2
    y = tl.sum(sums, axis=2)
    if BITS == 8:
        y *= tl.load(scale + 2 * n, mask=n < N, other=0.0)
    if bias is not None:
        y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    y = activate(rounded(y, like), like, ACT)
    if waves is not None:
        y = oscillate(y, waves, n, N, like)
    if GATED:
        z = tl.sum(others, axis=2)
        if BITS == 8:
            z *= tl.load(scale + 2 * (N + n), mask=n < N, other=0.0)
        if bias is not None:
            z += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)
        y *= rounded(z, like)
    if edges is not None:                         # NaN stays NaN
        y = tl.where(tl.abs(y) > tl.load(edges + n, mask=n < N, other=0.0), y, y * 0.0)
    if COPY > 0 or ALIKE:
        y = tl.where(gate != 0.0, y, 0.0)
    elif gates is not None:
        y = tl.where(gate != 0.0, rounded(y * gate, like), 0.0)
    if cap is not None:
        y = cap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * y / cap)))
    if onto is not None:
        y += tl.load(onto + at, mask=here, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=here)
    if ROUTE != "" or CHOICE != "":
        if arrives_last(arrived, tl.num_programs(0)):
            if ROUTE != "":
                route(out, gain, shift, router, scores, R, N, M, eps, ROUTE, ROWS, BM, BT)
            if CHOICE == "largest":
                for b in range(R):
                    keep_largest(out + b * N, picked, N, best, True, BLOCK)
            if CHOICE == "choose":
                for b in range(R):
                    keep_largest(scores + b * M, picked + b * M, M, best, False, BLOCK)
            if CHOICE == "columns" or CHOICE == "experts" or CHOICE == "branches":
                for b in range(R):
                    open_groups(scores + b * M, picked + b * M, inhibits, balance, like, M, best, CHOICE,
                                BLOCK, min(BLOCK, 8))


# ------------------------------------------------ attention -----------------------------------------------


@triton.jit
def head_of(at, cos, sin, column, eps, like, D: tl.constexpr, BD: tl.constexpr, NORM: tl.constexpr):
    """The D numbers from `at` on: normalised by their root mean square if NORM, and turned by the angles of
    a column if there are any."""
    d = tl.arange(0, BD)
    y = tl.load(at + d, mask=d < D, other=0.0).to(tl.float32)
    by = 1.0
    if NORM:
        by = 1.0 / tl.sqrt(tl.sum(y * y, axis=0) / D + eps)
        y = rounded(y * by, like)
    if cos is not None:
        z = tl.load(at + (d + D // 2) % D, mask=d < D, other=0.0).to(tl.float32)
        if NORM:
            z = rounded(z * by, like)
        c = tl.load(cos + column * D + d, mask=d < D, other=0.0).to(tl.float32)
        y = rounded(y * c, like) + z * tl.load(sin + column * D + d, mask=d < D, other=0.0).to(tl.float32)
    return rounded(y, like)


@triton.jit
def attend_kernel(queries, kv, cos, sin, gain, kept, start, parts, marks, gates, R, H, G, size, stride,
                  kv_stride, branch, eps, scale, live, NORM: tl.constexpr, LEFT: tl.constexpr,
                  D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr):
    """One query of each row and head over a share of the columns that its cache (2, R, G, size, D) holds,
    column c in place c % size; H / G neighbours share a head of keys and values, and of those the first one's
    program whose share the new column is in writes it. Leaves sums of values in parts (splits, R, H, D), the
    largest score and the sum of weights in marks (2, splits, R, H). LEFT: rows that are not live have left:
    their keys and values are written all the same, and those of heads whose group of `branch` numbers has a
    gate at zero, gates (R, H D / branch). queries, kv: rows `stride` and kv_stride apart."""
    b, h, s, splits = tl.program_id(0) // H, tl.program_id(0) % H, tl.program_id(1), tl.num_programs(1)
    alive = True
    if live is not None:
        alive = tl.load(live + b) != 0
        if not LEFT:
            if not alive:
                return
    if gates is not None:
        alive = alive & (tl.load(gates + b * (H * D // branch) + h * D // branch) != 0)
    d, inner, g = tl.arange(0, BD), tl.arange(0, BD) < D, h // (H // G)
    column = tl.load(start + b).to(tl.int32)
    place, seen = column % size, tl.minimum(column + 1, size)
    own = kv + b * kv_stride + g * D
    q = head_of(queries + b * stride + h * D, cos, sin, column, eps, kept, D, BD, NORM)
    k = head_of(own, cos, sin, column, eps, kept, D, BD, NORM)
    v = tl.load(own + G * D + d, mask=inner, other=0.0).to(tl.float32)
    if gain is not None:
        q = rounded(q * tl.load(gain + h).to(tl.float32), kept)
    keys = kept + (b * G + g).to(tl.int64) * size * D
    values = kept + (R * G + b * G + g).to(tl.int64) * size * D
    share = tl.cdiv(tl.cdiv(seen, splits), BS) * BS
    begin = s * share
    end = tl.minimum(begin + share, seen)
    high, total = -float("inf"), 0.0
    y = tl.zeros((BD,), tl.float32)
    for first in range(begin, tl.where(alive, end, begin), BS):
        at = first + tl.arange(0, BS)
        new = (at == place)[:, None]
        known = ((at < end) & (at != place))[:, None] & inner[None, :]
        key = tl.load(keys + at[:, None] * D + d[None, :], mask=known, other=0.0).to(tl.float32)
        value = tl.load(values + at[:, None] * D + d[None, :], mask=known, other=0.0)
        key = tl.where(new, k[None, :], key)
        value = tl.where(new, v[None, :], value.to(tl.float32))
        score = tl.where(at < end, tl.sum(key * q[None, :], axis=1) * scale, -float("inf"))
        top = tl.maximum(high, tl.max(score, axis=0))
        old, by = tl.exp(high - top), tl.exp(score - top)
        total = total * old + tl.sum(by, axis=0)
        y = y * old + tl.sum(value * by[:, None], axis=0)
        high = top
    places = place + tl.zeros((BD,), tl.int32)
    mine = inner & (places >= begin) & (places < end) & (h % (H // G) == 0)
    tl.store(keys + place * D + d, k.to(kept.dtype.element_ty), mask=mine)
    tl.store(values + place * D + d, v.to(kept.dtype.element_ty), mask=mine)
    mark = (s * R + b) * H + h
    tl.store(parts + mark * D + d, y, mask=inner)
    tl.store(marks + mark, high)
    tl.store(marks + splits * R * H + mark, total)


@triton.jit
def mix_kernel(x, by, waves, y, N, EACH: tl.constexpr, ACT: tl.constexpr, BC: tl.constexpr):
    """y[b] = act(by x[b]): x and y (R, N) as (EACH, N / EACH), by (EACH, EACH). waves (3, N): see
    product_kernel."""
    b, size = tl.program_id(0), N // EACH
    u = tl.program_id(1) * BC + tl.arange(0, BC)
    for j in tl.static_range(EACH):
        sums = tl.zeros((BC,), tl.float32)
        for k in tl.static_range(EACH):
            part_of = tl.load(x + b * N + k * size + u, mask=u < size, other=0.0).to(tl.float32)
            sums += tl.load(by + j * EACH + k).to(tl.float32) * part_of
        v = activate(rounded(sums, x), x, ACT)
        if waves is not None:
            v = oscillate(v, waves, j * size + u, N, x)
        tl.store(y + b * N + j * size + u, v.to(y.dtype.element_ty), mask=u < size)


@triton.jit
def input_kernel(x, marks, gain, shift, gates, y, R, K, splits, eps, branch, best, INPUT: tl.constexpr,
                 ACT: tl.constexpr, KEEP: tl.constexpr, D: tl.constexpr, BC: tl.constexpr,
                 BLOCK: tl.constexpr):
    """y (R, K) is what a product with this INPUT would multiply; after ACT; times the gate of its group of
    `branch` numbers, gates (R, K / branch), where that is not zero; KEEP: its `best` largest alone."""
    b = tl.program_id(0)
    r = b + tl.zeros((1, 1, 1), tl.int32)
    mean, by = 0.0, 1.0
    if INPUT == "layernorm" or INPUT == "rmsnorm":
        mean, by = statistics(x, r, R, K, K, eps, INPUT == "layernorm", 1, BC)
    for first in range(0, K, BC):
        k = first + tl.arange(0, BC)[None, None, :]
        v = activate(input_of(x, marks, gain, shift, mean, by, y, r, k, R, K, splits, INPUT, D), y, ACT)
        if gates is not None:
            gate = tl.load(gates + b * (K // branch) + k // branch, mask=k < K, other=0.0).to(tl.float32)
            v = tl.where(gate != 0.0, rounded(v * gate, y), 0.0)
        tl.store(y + b * K + k, v.to(y.dtype.element_ty), mask=k < K)
    if KEEP:
        tl.debug_barrier()
        keep_largest(y + b * K, None, K, best, True, BLOCK)


# ------------------------------------------------ rows of units -------------------------------------------


@triton.jit
def down_kernel(a, edges, weight, scale, bias, across, onto, out, parts, arrived, R, N, C, stride, share,
                winners, live, always, ALL: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
                ROWS: tl.constexpr, BU: tl.constexpr, BC: tl.constexpr):
    """out[r] = the sum of a[r, n] weight[n] over the N units, times across, plus bias and onto. edges: a
    counts as zero unless |a| exceeds its unit's. GROUP: of so many neighbours only the `winners` largest |a|
    count, of equal ones the first. A program adds a share of the units; rows of units that are zero in every
    row of a are not read, unless ALL. The program of a column that arrives last adds the shares up, in their
    order: whoever it is, the bits are the same. Outputs from `always` on are stored for all rows, live or
    not."""
    s, shares = tl.program_id(1), tl.num_programs(1)
    r = tl.arange(0, ROWS)[:, None, None]
    c = tl.program_id(0) * BC + tl.arange(0, BC)[None, None, :]
    alive = r < R
    if live is not None:
        every = (tl.program_id(0) + 1) * BC > always
        alive = alive & ((tl.load(live + r, mask=r < R, other=0) != 0) | every)
        if tl.max(alive.to(tl.int32)) == 0:
            return
    sums = tl.zeros((ROWS, BU, BC), tl.float32)
    for first in range(s * share, (s + 1) * share, BU):
        n = first + tl.arange(0, BU)[None, :, None]
        by = tl.load(a + r * N + n, mask=alive & (n < N), other=0.0).to(tl.float32)
        if edges is not None:                    # NaN stays NaN
            by = tl.where(tl.abs(by) > tl.load(edges + n, mask=n < N, other=0.0), by, by * 0.0)
        if GROUP > 0:
            at = r * N + n
            mine, ahead = keys(a, at, R * N, True), tl.zeros((ROWS, BU, 1), tl.int32)
            for j in range(GROUP):
                other = keys(a, at - n % GROUP + j, R * N, True)
                ahead += ((other > mine) | ((other == mine) & (j < n % GROUP))).to(tl.int32)
            by = tl.where(ahead < winners, by, 0.0)
        wanted = n < N
        if not ALL:
            wanted = wanted & (tl.max((by != 0.0).to(tl.int32), axis=0)[None, :, :] > 0)
        if BITS == 8:
            by *= tl.load(scale + 2 * n, mask=wanted, other=0.0)
        sums += by * numbers(weight, scale, n, c, wanted & (c < C), C, stride, BITS)
    r, c = tl.arange(0, ROWS)[:, None], tl.program_id(0) * BC + tl.arange(0, BC)[None, :]
    at, here = r * C + c, (r < R) & (c < C)
    tl.store(parts + s * R * C + at, tl.sum(sums, axis=1), mask=here)
    if arrives_last(arrived + tl.program_id(0), shares):
        y = tl.zeros((ROWS, BC), tl.float32)
        for i in range(shares):
            y += tl.load(parts + i * R * C + at, mask=here, other=0.0, cache_modifier=".cg")
        if across is not None:
            y *= tl.load(across + c, mask=c < C, other=0.0).to(tl.float32)
        if bias is not None:
            y += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
        y = rounded(y, out)
        if onto is not None:
            y += tl.load(onto + at, mask=here, other=0.0).to(tl.float32)
        if live is not None:
            here = here & ((tl.load(live + r, mask=r < R, other=0) != 0) | (c >= always))
        tl.store(out + at, y.to(out.dtype.element_ty), mask=here)


# ------------------------------------------------ shapes --------------------------------------------------

MOST_GROUPS = 64                                 # of which open_groups chooses
MOST_ROUTED = 1 << 16                            # multiply-adds that one program does sooner than a launch
# by ROWS: (most BN, BK) of a product: 4,096 sums in 128 threads; see product_tile
PRODUCTS = {1: (4, 1024), 2: (4, 512), 4: (2, 512), 8: (2, 256)}
DOWNS = {1: dict(BU=32, BC=64), 2: dict(BU=16, BC=64), 4: dict(BU=16, BC=64), 8: dict(BU=8, BC=64)}
SPLIT = 64                                       # columns of the cache that are worth a program of their own
MOST_SPLITS = 16


def product_tile(rows, N, K, fewer, halved, processors):
    """Tile of product_kernel: as many outputs a program as leave two programs for every multiprocessor.
    fewer: half as many, because it is gated or keeps the largest. halved: of its inputs half as many at a
    time, because it joins splits, or units are chosen."""
    most, BK = PRODUCTS[rows]
    BK = min(BK // (2 if halved else 1), max(32, triton.next_power_of_2(K)))
    BN = most // 2 if fewer else most
    while BN > 1 and N < 2 * processors * BN:
        BN //= 2
    return dict(ROWS=rows, BN=BN, BK=BK, num_warps=4)


def choice_tile(rows, K, count):
    """What product_kernel's tile has besides where a program goes on: `route` of K inputs, then `choose`
    among `count`, if that is not 0."""
    most, BT = PRODUCTS[rows]
    return dict(BM=most, BT=min(BT, max(32, triton.next_power_of_2(K))),
                BLOCK=min(2048, triton.next_power_of_2(max(1, count))))


def down_tile(rows, N, C, processors):
    """Tile of down_kernel, its columns and shares, and units of a share."""
    tile = DOWNS[rows]
    columns = triton.cdiv(C, tile["BC"])
    shares = max(1, min(triton.cdiv(N, tile["BU"]), 4 * processors // columns, 32))
    share = triton.cdiv(triton.cdiv(N, shares), tile["BU"]) * tile["BU"]
    return dict(ROWS=rows, **tile, num_warps=4), columns, triton.cdiv(N, share), share


def input_tile(K):
    """Tile of input_kernel."""
    return dict(BC=min(1024, max(32, triton.next_power_of_2(K))), num_warps=4,
                BLOCK=min(2048, max(32, triton.next_power_of_2(K))))


def attend_tile(D):
    """Tile of attend_kernel."""
    BD = max(16, triton.next_power_of_2(D))
    return dict(D=D, BD=BD, BS=max(8, 2048 // BD), num_warps=4)
