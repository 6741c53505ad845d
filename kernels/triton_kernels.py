"""The Triton kernels of sparse_kernels.py, which documents each op and holds its reference. They lie apart
because importing triton takes 0.3 s, which a run on a CPU does not pay.

Every product is summed in fp32 from operands raised to fp32 first (tensor cores excepted), so that the
kernels are exact under Triton's interpreter too, where arithmetic in bf16 is wrong.
"""
import functools

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

SHARED_MEMORY = 101376                           # bytes of a program on sm_86, sm_89 and sm_120

# ------------------------------------------------ epilogues ------------------------------------------------


@triton.jit
def activate(y, ACT: tl.constexpr):
    """none, relu2 or gelu (exact) of fp32. relu2 is not a maximum, which would drop NaN."""
    if ACT == "relu2":
        y = tl.where(y < 0.0, 0.0, y)
        y = y * y
    if ACT == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    return y


@triton.jit
def finish(y, bias, onto, out, n, at, here, ACT: tl.constexpr, BIAS: tl.constexpr, ONTO: tl.constexpr):
    """Store act(y + bias[n]) + onto[at] where `here`."""
    if BIAS:
        y += tl.load(bias + n, mask=n >= 0, other=0.0).to(tl.float32)
    y = activate(y, ACT)
    if ONTO:
        y += tl.load(onto + at, mask=here, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=here)


# ------------------------------------------------ 2:4 weights ----------------------------------------------


@triton.jit
def halves(pair, HALF: tl.constexpr):
    """int32 that hold two 16-bit floats -> the lower and the upper one in fp32."""
    if HALF == tl.bfloat16:
        low = (pair << 16).to(tl.float32, bitcast=True)
        high = (pair & -65536).to(tl.float32, bitcast=True)
    else:
        low = (pair & 65535).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def kept(values, meta, row, word, words, HALF: tl.constexpr):
    """Some words (BW,) of rows that begin at row (BN, 1) -> of each of their eight fours, (BN, BW, 8), the
    places of the first and the second kept weight, and these weights in fp32. Each is read once."""
    at, four, here = row + word[None, :], tl.arange(0, 8), word < words
    code = tl.load(meta + at, mask=here[None, :], other=0, eviction_policy="evict_first")
    pair = tl.load(values + at[:, :, None] * 8 + four[None, None, :], mask=here[None, :, None], other=0,
                   eviction_policy="evict_first")
    code = code[:, :, None] >> four[None, None, :] * 4
    low, high = halves(pair, HALF)
    return code & 3, (code >> 2) & 3, low, high


@triton.jit
def spread(one, two, low, high):
    """Kept weights and their places -> the weights 0..3 of each four."""
    return (tl.where(one == 0, low, 0.0),
            tl.where(one == 1, low, 0.0) + tl.where(two == 1, high, 0.0),
            tl.where(one == 2, low, 0.0) + tl.where(two == 2, high, 0.0),
            tl.where(two == 3, high, 0.0))


@triton.jit
def quads(x, k, K, HALF: tl.constexpr):
    """The k-th fours of a row of x in fp32."""
    quad = tl.load(x + k, mask=k < K // 4, other=0)[None]
    x0, x1 = halves(quad.to(tl.int32), HALF)
    x2, x3 = halves((quad >> 32).to(tl.int32), HALF)
    return x0, x1, x2, x3


@triton.jit
def gemv_24(x, values, meta, bias, onto, out, M, N, K, words, HALF: tl.constexpr, ACT: tl.constexpr,
            BIAS: tl.constexpr, ONTO: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    """y[m, BN outputs] = act(W x[m] + bias) + onto; x holds four elements in an int64. A thread owns the last
    axis: 8 fours, one word of places and 32 bytes of values, which arrive in two 16-byte loads. Where x is
    not finite the products of pruned weights count too: they are NaN."""
    m = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    word, four = tl.arange(0, BW), tl.arange(0, 8)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None] * words
    sums, nothing = tl.zeros((BN, BW, 8), tl.float32), tl.zeros((1, BW, 8), tl.float32)
    for first in range(0, words, BW):
        at = first + word
        one, two, low, high = kept(values, meta, row, at, words, HALF)
        x0, x1, x2, x3 = quads(x + m * (K // 4), at[:, None] * 8 + four[None, :], K, HALF)
        nothing += (x0 + x1 + x2 + x3) * 0.0
        sums += low * tl.where(one == 0, x0, tl.where(one == 1, x1, x2))
        sums += high * tl.where(two == 1, x1, tl.where(two == 2, x2, x3))
    if tl.sum(tl.sum(tl.sum(nothing, axis=2), axis=1), axis=0) != 0.0:
        sums = tl.zeros((BN, BW, 8), tl.float32)
        for first in range(0, words, BW):
            at = first + word
            one, two, low, high = kept(values, meta, row, at, words, HALF)
            w0, w1, w2, w3 = spread(one, two, low, high)
            x0, x1, x2, x3 = quads(x + m * (K // 4), at[:, None] * 8 + four[None, :], K, HALF)
            sums += w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
    y = tl.sum(tl.sum(sums, axis=2), axis=1)
    finish(y, bias, onto, out, tl.minimum(n, N - 1), m * N + n, n < N, ACT, BIAS, ONTO)


@triton.jit
def gemm_24(x, values, meta, bias, onto, out, M, N, K, words, HALF: tl.constexpr, ACT: tl.constexpr,
            BIAS: tl.constexpr, ONTO: tl.constexpr, EXACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
            BW: tl.constexpr):
    """The same for up to 64 rows of x: W is expanded in registers and multiplied by tensor cores. EXACT
    multiplies in fp32, for the interpreter."""
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    word = tl.arange(0, BW)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None] * words
    sums = tl.zeros((BN, BM), tl.float32)
    for first in range(0, words, BW):
        at = first + word
        one, two, low, high = kept(values, meta, row, at, words, HALF)
        w0, w1, w2, w3 = spread(one, two, low, high)
        w = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BN, BW * 32)      # in the order 0, 1, 2, 3
        k = first * 32 + tl.arange(0, BW * 32)
        part = tl.load(x + m[None, :] * K + k[:, None], mask=(m[None, :] < M) & (k[:, None] < K), other=0.0)
        if EXACT:
            sums += tl.dot(w, part.to(tl.float32), input_precision="ieee")
        else:
            sums += tl.dot(w.to(HALF), part)
    at = m[None, :] * N + n[:, None]
    finish(sums, bias, onto, out, tl.minimum(n, N - 1)[:, None], at, (m[None, :] < M) & (n[:, None] < N), ACT,
           BIAS, ONTO)


@gluon.jit
def mma_24(x, fragments, places, out, M, N, K, KIND: gl.constexpr, WARPS: gl.constexpr):
    """y (M, N) fp32 = x W for up to 8 rows of x by sparse tensor cores: a program makes 16 outputs, its warps
    share K. x holds two elements in an int32; fragments, places: sparse_kernels.fragments_24."""
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    wide: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    apart: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
    tile, blocks = gl.program_id(0), K // 64
    thread = gl.arange(0, 32 * WARPS, layout=flat)
    row = gl.arange(0, 32 * WARPS, layout=gl.SliceLayout(1, wide))
    register = gl.arange(0, 4, layout=gl.SliceLayout(0, wide))
    lane = thread % 32
    token, place = lane // 4, lane % 4
    c0 = gl.zeros([32 * WARPS], gl.float32, layout=flat)
    c1 = gl.zeros([32 * WARPS], gl.float32, layout=flat)
    c2 = gl.zeros([32 * WARPS], gl.float32, layout=flat)
    c3 = gl.zeros([32 * WARPS], gl.float32, layout=flat)
    for first in range(0, blocks, WARPS):
        block, own = first + thread // 32, first + row // 32
        e = gl.load(places + (tile * blocks + block) * 32 + lane, mask=block < blocks, other=0x44444444)
        for half in gl.static_range(2):
            at = (((tile * blocks + own) * 2 + half) * 32 + row % 32) * 4
            a = gl.load(fragments + at[:, None] + register[None, :], mask=(own < blocks)[:, None], other=0)
            even, odd = gl.split(a.reshape([32 * WARPS, 2, 2]))
            a0, a2 = gl.split(even)
            a1, a3 = gl.split(odd)
            a0 = gl.convert_layout(a0, flat, assert_trivial=True)
            a1 = gl.convert_layout(a1, flat, assert_trivial=True)
            a2 = gl.convert_layout(a2, flat, assert_trivial=True)
            a3 = gl.convert_layout(a3, flat, assert_trivial=True)
            b = x + token * (K // 2) + block * 32 + half * 16 + place
            known = (block < blocks) & (token < M)
            b0 = gl.load(b, mask=known, other=0)
            b1 = gl.load(b + 4, mask=known, other=0)
            b2 = gl.load(b + 8, mask=known, other=0)
            b3 = gl.load(b + 12, mask=known, other=0)
            c0, c1, c2, c3 = gl.inline_asm_elementwise(
                "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." + KIND + "." + KIND + ".f32 "
                "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$12,$13,$14,$15}, $16, "
                + ("0x1;" if half else "0x0;"), "=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r",
                [a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, e], is_pure=True, pack=1,
                dtype=(gl.float32, gl.float32, gl.float32, gl.float32))
    lanes = gl.arange(0, 32, layout=gl.SliceLayout(0, apart))
    n, m = tile * 16 + lanes // 4, lanes % 4 * 2
    y0 = gl.sum(gl.convert_layout(c0.reshape([WARPS, 32]), apart), axis=0)
    y1 = gl.sum(gl.convert_layout(c1.reshape([WARPS, 32]), apart), axis=0)
    y2 = gl.sum(gl.convert_layout(c2.reshape([WARPS, 32]), apart), axis=0)
    y3 = gl.sum(gl.convert_layout(c3.reshape([WARPS, 32]), apart), axis=0)
    gl.store(out + m * N + n, y0, mask=(m < M) & (n < N))
    gl.store(out + (m + 1) * N + n, y1, mask=(m + 1 < M) & (n < N))
    gl.store(out + m * N + n + 8, y2, mask=(m < M) & (n + 8 < N))
    gl.store(out + (m + 1) * N + n + 8, y3, mask=(m + 1 < M) & (n + 8 < N))


MMA_TILES = [dict(WARPS=warps, num_warps=warps) for warps in (4, 8)]
KINDS = {torch.float16: "f16", torch.bfloat16: "bf16"}


def linear_24_mma(x, fragments, places, N):
    """x (M, K), M <= 8, 64 dividing K, and fragments_24 of W (N, K) -> W x, (M, N), sums in fp32, no
    epilogue. Not chosen by linear_24: the order of the places in a warp has only met an emulator so far."""
    (M, K), tile = x.shape, MMA_TILES[x.size(1) >= 8192]
    out = torch.empty(M, N, dtype=torch.float32, device=x.device)
    mma_24[(triton.cdiv(N, 16),)](x.contiguous().view(torch.int32), fragments, places, out, M, N, K,
                                  KIND=KINDS[x.dtype], **tile)
    return out.to(x.dtype)


HALVES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
FLOATS = (*HALVES, torch.float32)
GEMV_ROWS = 1                                    # rows of x up to which gemv_24 reads W again for each
MOST_ROWS = 64
GEMV_TILES = [dict(BN=BN, BW=BW, num_warps=warps) for BN, BW, warps in ((2, 16, 1), (4, 32, 4), (8, 32, 4))]
GEMM_TILES = [dict(BM=BM, BN=32, BW=2, num_warps=4, num_stages=3) for BM in (16, 32, 64)]


def gemv_tile(N, processors):
    """The tallest tile that still gives every multiprocessor four programs."""
    fits = [tile for tile in GEMV_TILES if N >= 4 * processors * tile["BN"]]
    return (fits or GEMV_TILES[:1])[-1]


def linear_24(x, values, meta, bias, onto, act):
    """See sparse_kernels.linear_24_reference; up to MOST_ROWS rows x of HALVES."""
    (N, words), K = meta.shape, x.size(-1)
    x = x.contiguous()
    M = x.numel() // K
    out = x.new_empty(*x.shape[:-1], N)
    onto = onto if onto is None else onto.contiguous()
    arguments = (values.view(torch.int32), meta, bias, onto, out, M, N, K, words)
    flags = dict(HALF=HALVES[x.dtype], ACT=act, BIAS=bias is not None, ONTO=onto is not None)
    if M <= GEMV_ROWS:
        tile = gemv_tile(N, processors(x.device))
        fours = (x if x.data_ptr() % 16 == 0 else x.clone()).view(torch.int64)
        gemv_24[(triton.cdiv(N, tile["BN"]), M)](fours, *arguments, **flags, **tile)
    else:
        tile = next(tile for tile in GEMM_TILES if tile["BM"] >= min(M, MOST_ROWS))
        grid = (triton.cdiv(N, tile["BN"]), triton.cdiv(M, tile["BM"]))
        gemm_24[grid](x, *arguments, **flags, EXACT=x.device.type == "cpu", **tile)
    return out


@functools.cache
def processors(device):
    """Multiprocessors of a GPU; the interpreter has one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# ------------------------------------------------ rows of units --------------------------------------------


@triton.jit
def unit_of(groups, b, i, here, chosen, WIDTH: tl.constexpr, GROUPED: tl.constexpr):
    """The units that stand i-th in token b's list of `chosen` groups of WIDTH units; i itself without one."""
    unit = i
    if GROUPED:
        group = tl.load(groups + b * chosen + i // WIDTH, mask=here, other=0)
        unit = group.to(tl.int32) * WIDTH + i % WIDTH
    return unit


@triton.jit
def up_kernel(x, up, bias, groups, scale, out, C, n, chosen, WIDTH: tl.constexpr, GROUPED: tl.constexpr,
              ACT: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """out[b, i] = act(up[r] x[b] + bias[r]) * scale[b, i // WIDTH] for BR of the n units r of token b."""
    b = tl.program_id(1)
    i = tl.program_id(0) * BR + tl.arange(0, BR)
    here = i < n
    unit = unit_of(groups, b, i, here, chosen, WIDTH, GROUPED)
    sums = tl.zeros((BR, BC), tl.float32)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        w = tl.load(up + unit.to(tl.int64)[:, None] * C + c[None, :], mask=here[:, None] & (c < C)[None, :],
                    other=0.0).to(tl.float32)
        sums += w * tl.load(x + b * C + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    a = tl.sum(sums, axis=1)
    if BIAS:
        a += tl.load(bias + unit, mask=here, other=0.0).to(tl.float32)
    a = activate(a, ACT)
    if SCALE:
        a *= tl.load(scale + b * chosen + i // WIDTH, mask=here, other=0.0).to(tl.float32)
    tl.store(out + b * n + i, a.to(out.dtype.element_ty), mask=here)


@triton.jit
def down_kernel(a, down, groups, parts, C, n, chosen, share, WIDTH: tl.constexpr, GROUPED: tl.constexpr,
                BR: tl.constexpr, BC: tl.constexpr):
    """parts[s, b] = the sum of a[b, i] down[r] over the s-th share of token b's n units r. Where a is zero
    the row is masked out, and none of its bytes are read."""
    s, b = tl.program_id(1), tl.program_id(2)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    sums = tl.zeros((BR, BC), tl.float32)
    for first in range(s * share, (s + 1) * share, BR):
        i = first + tl.arange(0, BR)
        here = (i < n) & (i < (s + 1) * share)
        by = tl.load(a + b * n + i, mask=here, other=0.0).to(tl.float32)
        live = here & (by != 0)
        unit = unit_of(groups, b, i, live, chosen, WIDTH, GROUPED)
        w = tl.load(down + unit.to(tl.int64)[:, None] * C + c[None, :], mask=live[:, None] & (c < C)[None, :],
                    other=0.0)
        sums += by[:, None] * w.to(tl.float32)
    y = tl.sum(sums, axis=0)
    tl.store(parts + (s * tl.num_programs(2) + b) * C + c, y, mask=c < C)


UP_TILES = [dict(BR=4, BC=256, num_warps=4), dict(BR=8, BC=512, num_warps=4)]
DOWN_TILES = [dict(BR=16, BC=64, num_warps=4), dict(BR=16, BC=128, num_warps=4)]


def gathered_up(x, up, bias, groups, scale, width, act):
    """See sparse_kernels.gathered_up_reference."""
    (B, C), chosen = x.shape, groups.size(1)
    n, out, x = chosen * width, x.new_empty(B, chosen * width), x.contiguous()
    if n == 0:
        return out
    tile = UP_TILES[n * B >= 16 * processors(x.device)]
    up_kernel[(triton.cdiv(n, tile["BR"]), B)](
        x, up, bias, groups, scale, out, C, n, chosen, WIDTH=width, GROUPED=True, ACT=act,
        BIAS=bias is not None, SCALE=scale is not None, **tile)
    return out


def gathered_down(a, down, bias, groups, width):
    """See sparse_kernels.gathered_down_reference. The shares' sums are added in a fixed order: no atomics."""
    (B, n), C, a = a.shape, down.size(1), a.contiguous()
    tile = DOWN_TILES[C >= 2048]
    columns = triton.cdiv(C, tile["BC"])
    shares = max(1, min(triton.cdiv(n, tile["BR"]), 4 * processors(a.device) // (columns * B)))
    share = triton.cdiv(max(1, triton.cdiv(n, shares)), tile["BR"]) * tile["BR"]
    shares = max(1, triton.cdiv(n, share))
    parts = torch.empty(shares, B, C, dtype=torch.float32, device=a.device)
    down_kernel[(columns, shares, B)](a, down, groups, parts, C, n, 0 if groups is None else groups.size(1),
                                        share, WIDTH=width, GROUPED=groups is not None, **tile)
    y = parts.sum(0)
    return (y if bias is None else y + bias).to(a.dtype)


# ------------------------------------------------ the largest ---------------------------------------------


@triton.jit
def largest_kernel(a, out, n, k, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    """Of row a[r] (n,) the k largest, the first of equal ones, NaN above everything: KEEP writes the row with
    all but the k largest |a| at zero, else their places, rising. The k-th is found bit by bit."""
    r = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    here = at < n
    value = tl.load(a + r * n + at, mask=here, other=0.0)
    wide = value.to(tl.float32)
    if KEEP:
        wide = tl.abs(wide)
    wide = tl.where(wide == 0.0, 0.0, wide)                     # -0 is 0
    bits = wide.to(tl.uint32, bitcast=True)
    order = tl.where(wide < 0, bits ^ 4294967295, bits | 2147483648)   # rises with the number
    order = tl.where(wide != wide, 4294967295, order)
    order = tl.where(here, order, 0)                            # what is not there is below -inf
    edge = tl.zeros((), tl.uint32)
    for step in tl.static_range(32):
        trial = edge | (1 << (31 - step))
        edge = tl.where(tl.sum((order >= trial).to(tl.int32), axis=0) >= k, trial, edge)
    above = (order > edge).to(tl.int32)
    equal = (order == edge).to(tl.int32)
    spare = k - tl.sum(above, axis=0)
    chosen = above + equal * (tl.cumsum(equal, axis=0) <= spare).to(tl.int32)
    if KEEP:
        tl.store(out + r * n + at, tl.where(chosen > 0, value, 0.0), mask=here)
    else:
        place = tl.cumsum(chosen, axis=0) - 1
        tl.store(out + r * k + place, at.to(tl.int64), mask=chosen > 0)


MOST_UNITS = 16384                               # of a row, which one program holds


def largest(a, k, keep):
    """a (..., n) of FLOATS with 0 < k < n <= MOST_UNITS -> the same with all but the k largest |a| at zero,
    or the places (..., k) of the k largest."""
    n, a = a.size(-1), a.contiguous()
    out = torch.empty_like(a) if keep else a.new_empty(*a.shape[:-1], k, dtype=torch.int64)
    largest_kernel[(a.numel() // n,)](a, out, n, k, KEEP=keep, BLOCK=triton.next_power_of_2(n), num_warps=8)
    return out
