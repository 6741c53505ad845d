"""The Triton kernels of sparse_kernels.py, which documents each op and holds its reference. They lie apart
because importing triton takes 0.3 s, which a run on a CPU does not pay.

Every product is summed in fp32 from operands raised to fp32 first (tensor cores excepted), so that the
kernels are exact under Triton's interpreter too, where arithmetic in bf16 is wrong.
"""
import functools
import sys

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.faster import fastest

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
def own_four(base, row, first, here, most, other, wide: gl.constexpr, flat: gl.constexpr):
    """Each thread's four words from base + row + first on, those before base + row + most -> one by one."""
    register = gl.arange(0, 4, layout=gl.SliceLayout(0, wide))
    inner = first[:, None] + register[None, :]
    a = gl.load(base + (row[:, None] + inner), mask=here[:, None] & (inner < most), other=other)
    even, odd = gl.split(a.reshape([a.shape[0], 2, 2]))
    a0, a2 = gl.split(even)
    a1, a3 = gl.split(odd)
    a0 = gl.convert_layout(a0, flat, assert_trivial=True)
    a1 = gl.convert_layout(a1, flat, assert_trivial=True)
    a2 = gl.convert_layout(a2, flat, assert_trivial=True)
    a3 = gl.convert_layout(a3, flat, assert_trivial=True)
    return a0, a1, a2, a3


@gluon.jit
def sparse_mma(a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, e, HALF: gl.constexpr, KIND: gl.constexpr):
    """mma.sp of a warp: 16 outputs, 32 inputs (16 are there), 8 tokens. HALF of the lanes say which."""
    return gl.inline_asm_elementwise(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." + KIND + "." + KIND + ".f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$12,$13,$14,$15}, $16, "
        + ("0x1;" if HALF else "0x0;"), "=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r",
        [a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, e], is_pure=True, pack=1,
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32))


@gluon.jit
def times_nothing(x, onto, KIND: gl.constexpr):
    """onto + 0 x of both halves of a word: NaN where x is not finite."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 zero; mov.b32 zero, 0; fma.rn." + KIND + "x2 $0, $1, zero, $2; }", "=r,r,r",
        [x, onto], is_pure=True, pack=1, dtype=gl.int32)


@gluon.jit
def places_of(first, second, lane):
    """Two words of places, 64 inputs of a row: the fours lane, lane + 4, lane + 8, lane + 12 in 16 bits."""
    low, high = (first >> lane * 4) & 0x000f000f, (second >> lane * 4) & 0x000f000f
    return ((low | (low >> 12)) & 255) | (((high | (high >> 12)) & 255) << 8)


@gluon.jit
def finish_warps(parts, bias, onto, out, n, m, M, N, ACT: gl.constexpr, BIAS: gl.constexpr,
                 ONTO: gl.constexpr, apart: gl.constexpr):
    """As finish, of a number for every thread, added up over the warps (parts: warps x 32)."""
    y = gl.sum(gl.convert_layout(parts, apart), axis=0)
    here, at = (m < M) & (n < N), m * N + n
    if BIAS:
        y += gl.load(bias + n, mask=here, other=0.0).to(gl.float32)
    if ACT == "relu2":
        y = gl.where(y < 0.0, 0.0, y)
        y = y * y
    if ACT == "gelu":
        y = 0.5 * y * (1.0 + gl.erf(y * 0.7071067811865476))
    if ONTO:
        y += gl.load(onto + at, mask=here, other=0.0).to(gl.float32)
    gl.store(out + at, y.to(out.dtype.element_ty), mask=here)


@gluon.jit
def mma_24(x, values, meta, bias, onto, out, M, N, K, words, KIND: gl.constexpr, ACT: gl.constexpr,
           BIAS: gl.constexpr, ONTO: gl.constexpr, WARPS: gl.constexpr):
    """The same for a few rows of x, as sparse tensor cores multiply them: a program makes 16 outputs of 8
    rows, its warps share K, 64 inputs at a time. x and values hold two elements in an int32. The instruction
    may meet the fours of K in any order: lane 0..3 of a row reads four neighbouring ones at once. Where a row
    of x is not finite, all of its outputs are NaN."""
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    wide: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    apart: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
    thread = gl.arange(0, 32 * WARPS, layout=flat)
    lane, warp = thread % 4, thread // 32
    top = gl.minimum(gl.program_id(1) * 16 + thread % 32 // 4, N - 1).to(gl.int64) * words
    low = gl.minimum(gl.program_id(1) * 16 + thread % 32 // 4 + 8, N - 1).to(gl.int64) * words
    own = gl.arange(0, 32 * WARPS, layout=gl.SliceLayout(1, wide))
    own_top = gl.minimum(gl.program_id(1) * 16 + own % 32 // 4, N - 1).to(gl.int64) * words * 8
    own_low = gl.minimum(gl.program_id(1) * 16 + own % 32 // 4 + 8, N - 1).to(gl.int64) * words * 8
    token = gl.program_id(0) * 8 + own % 32 // 4
    nothing = gl.zeros([32 * WARPS], gl.int32, layout=flat)
    spoilt = nothing
    c0 = gl.zeros([32 * WARPS], gl.float32, layout=flat)
    c1, c2, c3 = c0, c0, c0
    for first in range(0, (words + 1) // 2, WARPS):
        block = first + warp
        here, more = 2 * block < words, 2 * block + 1 < words
        e = (places_of(gl.load(meta + top + 2 * block, mask=here, other=0x44444444),
                       gl.load(meta + top + 2 * block + 1, mask=more, other=0x44444444), lane)
             | (places_of(gl.load(meta + low + 2 * block, mask=here, other=0x44444444),
                          gl.load(meta + low + 2 * block + 1, mask=more, other=0x44444444), lane) << 16))
        at = (first + own // 32) * 16 + own % 4 * 4
        t0, t1, t2, t3 = own_four(values, own_top, at, own_top >= 0, words * 8, 0, wide, flat)
        l0, l1, l2, l3 = own_four(values, own_low, at, own_low >= 0, words * 8, 0, wide, flat)
        for half in gl.static_range(2):
            at = (first + own // 32) * 32 + own % 4 // 2 * 8 + 4 * half
            x0, x1, x2, x3 = own_four(x, token * (K // 2), at, token < M, K // 2, 0, wide, flat)
            x4, x5, x6, x7 = own_four(x, token * (K // 2), at + 16, token < M, K // 2, 0, wide, flat)
            b0, b2 = gl.where(lane % 2 == 0, x0, x1), gl.where(lane % 2 == 0, x2, x3)
            b1, b3 = gl.where(lane % 2 == 0, x4, x5), gl.where(lane % 2 == 0, x6, x7)
            spoilt = times_nothing(b0, times_nothing(b1, spoilt, KIND), KIND)
            spoilt = times_nothing(b2, times_nothing(b3, spoilt, KIND), KIND)
            if half == 0:
                c0, c1, c2, c3 = sparse_mma(t0, l0, t1, l1, b0, b1, b2, b3, c0, c1, c2, c3, e, 0, KIND)
            else:
                c0, c1, c2, c3 = sparse_mma(t2, l2, t3, l3, b0, b1, b2, b3, c0, c1, c2, c3, e, 1, KIND)
    # zeros that meet what has become NaN: at even lanes places 0 and 1 of a four, at odd ones 2 and 3
    for odd in gl.static_range(2):
        e = gl.full([32 * WARPS], -0x11111112 if odd else 0x44444444, gl.int32, layout=flat)
        c0, c1, c2, c3 = sparse_mma(nothing, nothing, nothing, nothing, spoilt, nothing, nothing, nothing,
                                    c0, c1, c2, c3, e, 0, KIND)
    lanes = gl.arange(0, 32, layout=gl.SliceLayout(0, apart))
    n, m = gl.program_id(1) * 16 + lanes // 4, gl.program_id(0) * 8 + lanes % 4 * 2
    finish_warps(c0.reshape([WARPS, 32]), bias, onto, out, n, m, M, N, ACT, BIAS, ONTO, apart)
    finish_warps(c1.reshape([WARPS, 32]), bias, onto, out, n, m + 1, M, N, ACT, BIAS, ONTO, apart)
    finish_warps(c2.reshape([WARPS, 32]), bias, onto, out, n + 8, m, M, N, ACT, BIAS, ONTO, apart)
    finish_warps(c3.reshape([WARPS, 32]), bias, onto, out, n + 8, m + 1, M, N, ACT, BIAS, ONTO, apart)


MMA_TILES = [dict(WARPS=warps, num_warps=warps) for warps in (4, 8, 16)]
KINDS = {torch.float16: "f16", torch.bfloat16: "bf16"}
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


def mma_tile(M, N, processors):
    """The fewest warps that share K of which every multiprocessor still gets 24."""
    programs = triton.cdiv(M, 8) * triton.cdiv(N, 16)
    fits = [tile for tile in MMA_TILES if programs * tile["WARPS"] >= 24 * processors]
    return (fits or MMA_TILES[-1:])[0]


def linear_24(x, values, meta, bias, onto, act, form=None):
    """See sparse_kernels.linear_24_reference; up to MOST_ROWS rows x of HALVES. form: one of FORMS_24."""
    (N, words), K = meta.shape, x.size(-1)
    x = x.contiguous()
    x = x if x.data_ptr() % 16 == 0 else x.clone()
    M = x.numel() // K
    out = x.new_empty(*x.shape[:-1], N)
    onto = onto if onto is None else onto.contiguous()
    flags = dict(ACT=act, BIAS=bias is not None, ONTO=onto is not None)
    form = form or ("gemv_24" if M <= GEMV_ROWS else form_24(M, N, K, x.dtype, x.device))
    FORMS_24[form](x, values.view(torch.int32), meta, bias, onto, out, M, N, K, words, **flags)
    return out


def rows_one_by_one(x, values, *rest, **flags):
    out, M, N = rest[3:6]
    tile = gemv_tile(N, processors(x.device))
    gemv_24[(triton.cdiv(N, tile["BN"]), M)](x.view(torch.int64), values, *rest, HALF=HALVES[out.dtype],
                                             **flags, **tile)


def rows_expanded(x, values, *rest, **flags):
    out, M, N = rest[3:6]
    tile = next(tile for tile in GEMM_TILES if tile["BM"] >= min(M, MOST_ROWS))
    gemm_24[(triton.cdiv(N, tile["BN"]), triton.cdiv(M, tile["BM"]))](
        x, values, *rest, HALF=HALVES[out.dtype], EXACT=x.device.type == "cpu", **flags, **tile)


def rows_by_sparse_units(x, values, *rest, **flags):
    out, M, N = rest[3:6]
    mma_24[(triton.cdiv(M, 8), triton.cdiv(N, 16))](x.view(torch.int32), values, *rest, KIND=KINDS[out.dtype],
                                                    **flags, **mma_tile(M, N, processors(x.device)))


FORMS_24 = {"mma_24": rows_by_sparse_units, "gemm_24": rows_expanded, "gemv_24": rows_one_by_one}


def form_24(M, N, K, dtype, device):
    """Which of FORMS_24 multiplies 2 to MOST_ROWS rows fastest on this device: timed at first use, see
    faster.py. While a CUDA graph is recorded nothing can be timed: a rule decides then."""
    if not multiplies_sparse(device):
        return "gemm_24"
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "mma_24" if M <= 16 else "gemm_24"
    return timed_form_24(max(2, triton.next_power_of_2(M)), N, K, dtype, device)


@functools.cache
def timed_form_24(M, N, K, dtype, device):
    """The fastest of those forms whose result is gemm_24's; another one is left out, and a line says so."""
    drawn = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device,
                              dtype=dtype)
    x, values = drawn(M, K), drawn(N, triton.cdiv(K, 32) * 16)
    meta = torch.full((N, triton.cdiv(K, 32)), 0x44444444, dtype=torch.int32, device=device)
    values[:, triton.cdiv(K, 2):] = 0
    outs = {form: torch.empty(M, N, dtype=dtype, device=device) for form in FORMS_24}
    runs = {form: functools.partial(run, x, values.view(torch.int32), meta, None, None, outs[form], M, N, K,
                                    meta.size(1), ACT="none", BIAS=False, ONTO=False)
            for form, run in FORMS_24.items() if form != "gemv_24" or M <= 8}
    for run in runs.values():
        run()
    right = outs["gemm_24"].float()
    for form in [*runs]:
        error = ((outs[form].float() - right).norm() / right.norm()).item()
        if not error < 0.02:
            print(f"note: {form} differs from gemm_24 by {error:.1e} on this card and is not used: please "
                  "report it", file=sys.stderr)
            del runs[form]
    return fastest(f"2:4 product, {M} rows, {N}x{K}, {dtype}", runs, device)[0]


def multiplies_sparse(device):
    """Does this card have mma.sp?"""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


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
