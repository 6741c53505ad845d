"""Kernels: each op with the bytes it moves, its reference, its fast path, and what is said without it.

CPU kernels are C, compiled by the machine's own compiler at first use (a quarter of a second, kept in the
user's cache folder) and called through ctypes: a call costs 2 us, where a library's matrix product costs 20.
They share PyTorch's OpenMP threads.
"""
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F

# ------------------------------------------------ building ------------------------------------------------

SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>
#define FETCH(p) __builtin_prefetch(p, 0, 2)     /* into the second-level cache, where more misses can wait */
#define SOON 16                                  /* a gathered row is fetched so many rows before its turn */
#ifdef __AVX512BF16__
#include <immintrin.h>
static inline __m512bh load(const uint16_t *p) { return (__m512bh)_mm512_loadu_si512(p); }
#endif
typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));

static inline float up_bf16(uint16_t v) {
    union { uint32_t u; float f; } c = { (uint32_t)v << 16 };
    return c.f;
}
static inline uint16_t down_bf16(float f) {                     /* to nearest, ties to even; NaN stays NaN */
    union { float f; uint32_t u; } c = { f };
    return f != f ? 0x7fc0 : (c.u + 0x7fff + ((c.u >> 16) & 1)) >> 16;
}
static inline uint32_t bin(float f) {                           /* rises with f; NaN counts as largest */
    uint32_t u;
    memcpy(&u, &f, 4);
    return (u >> 31 ? ~u : u | 0x80000000u) >> 20;
}
static inline float up_f32(float v) { return v; }
static inline float down_f32(float v) { return v; }

/* the k-th largest of n, which are reordered: bins by the leading 12 bits, then Hoare's select in one bin */
static float kth(float *part, long n, long k) {
    uint32_t count[4096] = {0};
    for (long i = 0; i < n; i++) count[bin(part[i])]++;
    uint32_t b = 4095;
    while (k > count[b]) k -= count[b--];
    long m = 0;
    for (long i = 0; i < n; i++) if (bin(part[i]) == b) part[m++] = part[i];
    for (long low = 0, high = m - 1, want = k - 1; low < high;) {
        float pivot = part[(low + high) / 2];
        long i = low, j = high;
        while (i <= j) {
            while (part[i] > pivot) i++;
            while (part[j] < pivot) j--;
            if (i <= j) { float t = part[i]; part[i++] = part[j]; part[j--] = t; }
        }
        if (want <= j) high = j; else if (want >= i) low = i; else break;
    }
    return part[k - 1];
}

/* all but the k largest |a| become zero; of equal ones the first stay */
static void keep_floats(float *a, long n, long k) {
    float part[n];
    for (long i = 0; i < n; i++) part[i] = fabsf(a[i]);
    float edge = kth(part, n, k);
    long ties = k;
    for (long i = 0; i < n; i++) ties -= fabsf(a[i]) > edge;
    for (long i = 0; i < n; i++) {
        float size = fabsf(a[i]);
        if (!(size > edge || (size == edge && ties-- > 0))) a[i] = 0;
    }
}

static inline float sum16(vec v) { float s = 0; for (int i = 0; i < 16; i++) s += v[i]; return s; }

/* w . x over K; `ahead` is where the weights lie that are needed soon: they are fetched meanwhile */
static inline float dot_f32(const float *w, const float *x, long K, const float *ahead) {
    vec a = {0}, b = {0};
    long k = 0;
    for (; k + 32 <= K; k += 32) {
        FETCH(ahead + k);
        FETCH(ahead + k + 16);
        a += *(const vec *)(w + k) * *(const vec *)(x + k);
        b += *(const vec *)(w + k + 16) * *(const vec *)(x + k + 16);
    }
    float s = sum16(a + b);
    for (; k < K; k++) s += w[k] * x[k];
    return s;
}

static inline float dot_bf16(const uint16_t *w, const uint16_t *x, long K, const uint16_t *ahead) {
    float s = 0;
    long k = 0;
#ifdef __AVX512BF16__
    __m512 a = _mm512_setzero_ps(), b = a;
    for (; k + 64 <= K; k += 64) {
        FETCH(ahead + k);
        FETCH(ahead + k + 32);
        a = _mm512_dpbf16_ps(a, load(w + k), load(x + k));
        b = _mm512_dpbf16_ps(b, load(w + k + 32), load(x + k + 32));
    }
    for (; k + 32 <= K; k += 32) a = _mm512_dpbf16_ps(a, load(w + k), load(x + k));
    s = _mm512_reduce_add_ps(_mm512_add_ps(a, b));
#else
    #pragma omp simd reduction(+:s)
    for (long i = 0; i < K / 64 * 64; i++) s += up_bf16(w[i]) * up_bf16(x[i]);
    k = K / 64 * 64;
#endif
    for (; k < K; k++) s += up_bf16(w[k]) * up_bf16(x[k]);
    return s;
}
"""

# Made for fp32 and for bf16
EACH_TYPE = r"""
#define AHEAD_NAME (4096 / (long)sizeof(TYPE))   /* weights that stream from memory are fetched 4 KB ahead */

/* M vectors x (M, K), each summed as it would be alone; a row of w is read from memory once for all */
void matvec_NAME(const TYPE *w, const TYPE *x, const TYPE *bias, TYPE *y, long M, long N, long K,
                 int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < N; n++) {
        const TYPE *row = w + n * K;
        float b = bias ? up_NAME(bias[n]) : 0.0f;
        y[n] = down_NAME(dot_NAME(row, x, K, row + AHEAD_NAME) + b);
        for (long m = 1; m < M; m++) y[m * N + n] = down_NAME(dot_NAME(row, x + m * K, K, row) + b);
    }
}

/* one query per head: q, y (B, H, D), k, v (B, H or more, S, D), last axis dense; query h looks at the keys
   of head heads[h], or h */
void attend_NAME(const TYPE *q, const TYPE *k, const TYPE *v, TYPE *y, const long *heads, long B, long H,
                 long S, long D, const long *qs, const long *ks, const long *vs, int threads) {
    float scale = 1.0f / sqrtf((float)D);
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long bh = 0; bh < B * H; bh++) {
        long b = bh / H, h = bh % H, kh = heads ? heads[h] : h;
        const TYPE *Q = q + b * qs[0] + h * qs[1];
        const TYPE *K = k + b * ks[0] + kh * ks[1], *V = v + b * vs[0] + kh * vs[1];
        float score[S], sums[D], top = -INFINITY, total = 0;
        for (long j = 0; j < S; j++) {
            score[j] = scale * dot_NAME(K + j * ks[2], Q, D, K + j * ks[2] + AHEAD_NAME);
            top = score[j] > top ? score[j] : top;
        }
        for (long d = 0; d < D; d++) sums[d] = 0;
        for (long j = 0; j < S; j++) {
            float p = expf(score[j] - top);
            const TYPE *row = V + j * vs[2];
            total += p;
            for (long d = 0; d < D; d++) sums[d] += p * up_NAME(row[d]);
        }
        for (long d = 0; d < D; d++) y[bh * D + d] = down_NAME(sums[d] / total);
    }
}

static inline const TYPE *row_NAME(const TYPE *w, const long *rows, long i, long n, long K) {
    i = i < n ? i : n - 1;
    return w + (rows ? rows[i] : i) * K;
}

/* y[m, i] = w[rows[i]] . x[m] + bias[rows[i]]: each row of w in `rows` is read once */
void rows_dot_NAME(const TYPE *w, const TYPE *x, const TYPE *bias, const long *rows, TYPE *y,
                   long M, long n, long K, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < n; i++) {
        const TYPE *row = w + rows[i] * K, *ahead = row_NAME(w, rows, i + SOON, n, K);
        float start = bias ? up_NAME(bias[rows[i]]) : 0.0f;
        for (long m = 0; m < M; m++) y[m * n + i] = down_NAME(start + dot_NAME(row, x + m * K, K, ahead));
    }
}

/* sums[c] += sum over live i of by[i] w[rows ? rows[i] : i][from + c], c < width: other rows are not read */
static void add_rows_NAME(float *sums, const float *by, const TYPE *w, const long *rows, const int *live,
                          long n, long C, long from, long width) {
    for (long i = 0; i < n; i += 4) {
        const TYPE *row[4], *next[4];
        float b[4];
        for (int l = 0; l < 4; l++) {
            long j = i + l < n ? live[i + l] : 0, k = i + l + 4 < n ? live[i + l + 4] : live[n - 1];
            b[l] = i + l < n ? by[j] : 0;
            row[l] = i + l < n ? w + (rows ? rows[j] : j) * C + from : row[0];
            next[l] = w + (rows ? rows[k] : k) * C + from;
        }
        long c = 0;
        for (; c + 32 <= width; c += 32) {
            for (int l = 0; l < 4; l++) {
                FETCH(next[l] + c);
                if (sizeof(TYPE) == 4) FETCH(next[l] + c + 16);
            }
            for (long e = c; e < c + 32; e++)
                sums[e] += b[0] * up_NAME(row[0][e]) + b[1] * up_NAME(row[1][e])
                         + b[2] * up_NAME(row[2][e]) + b[3] * up_NAME(row[3][e]);
        }
        for (; c < width; c++)
            for (int l = 0; l < 4; l++) sums[c] += b[l] * up_NAME(row[l][c]);
    }
}

/* a thread's share of C outputs, whole lines of 32 */
static inline long share_NAME(long C, int threads) { return ((C + threads - 1) / threads + 31) / 32 * 32; }

/* y[m] = sum_i a[m, i] w[rows ? rows[i] : i] + bias: rows of zeros in a are never read */
void rows_sum_NAME(const TYPE *a, const TYPE *w, const TYPE *bias, const long *rows, TYPE *y,
                   long M, long n, long C, int threads) {
    long chunk = share_NAME(C, threads);
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long from = 0; from < C; from += chunk) {
        long width = C - from < chunk ? C - from : chunk;
        for (long m = 0; m < M; m++) {
            float sums[width], by[n];
            int live[n];
            long count = 0;
            for (long c = 0; c < width; c++) sums[c] = bias ? up_NAME(bias[from + c]) : 0.0f;
            for (long i = 0; i < n; i++) {
                by[i] = up_NAME(a[m * n + i]);
                live[count] = i;
                count += by[i] != 0;
            }
            add_rows_NAME(sums, by, w, rows, live, count, C, from, width);
            for (long c = 0; c < width; c++) y[m * C + from + c] = down_NAME(sums[c]);
        }
    }
}

/* A whole MLP for one token: of n units, rows[i] or all of them in order, a = act(up . x + up_bias) * scale;
   where keep < n all but the keep largest |a| are zero; y = sum of the live units' rows of down + down_bias.
   Returns how many units were live. act: 0 squared ReLU, 1 GELU. */
long mlp_one_NAME(const TYPE *x, const TYPE *up, const TYPE *up_bias, const TYPE *down, const TYPE *down_bias,
                  const long *rows, const TYPE *scale, TYPE *y, long n, long C, long keep, int act,
                  int threads) {
    float a[n];
    int live[n];
    long count = 0, chunk = share_NAME(C, threads);
    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for schedule(static)
        for (long i = 0; i < n; i++) {
            long r = rows ? rows[i] : i;
            const TYPE *row = up + r * C, *soon = row + AHEAD_NAME;
            float v = dot_NAME(row, x, C, rows ? row_NAME(up, rows, i + SOON, n, C) : soon)
                    + (up_bias ? up_NAME(up_bias[r]) : 0.0f);
            v = act ? 0.5f * v * (1 + erff(v * 0.70710678f)) : v > 0 ? v * v : 0;
            a[i] = v * (scale ? up_NAME(scale[i]) : 1.0f);
        }
        #pragma omp single
        {
            if (keep < n) keep_floats(a, n, keep);
            for (long i = 0; i < n; i++) { live[count] = i; count += a[i] != 0; }
        }
        #pragma omp for schedule(static)
        for (long from = 0; from < C; from += chunk) {
            long width = C - from < chunk ? C - from : chunk;
            float sums[width];
            for (long c = 0; c < width; c++) sums[c] = down_bias ? up_NAME(down_bias[from + c]) : 0.0f;
            add_rows_NAME(sums, a, down, rows, live, count, C, from, width);
            for (long c = 0; c < width; c++) y[from + c] = down_NAME(sums[c]);
        }
    }
    return count;
}

/* kept = a with all but the k largest |a| of each token at zero; of equal ones the first are kept */
void keep_largest_NAME(const TYPE *a, TYPE *kept, long M, long n, long k) {
    for (long m = 0; m < M; m++, a += n, kept += n) {
        float size[n];
        for (long i = 0; i < n; i++) size[i] = up_NAME(a[i]);
        keep_floats(size, n, k);
        for (long i = 0; i < n; i++) kept[i] = size[i] != 0 ? a[i] : 0;
    }
}

/* The same through k winning columns of `width` units, of N under lateral inhibition: s = router . x, t_c
   = s_c - sum_d by[c, d] relu(s_d); the k largest of t + balance win, and sigmoid(t) scales their units. */
long columns_one_NAME(const TYPE *x, const TYPE *router, const float *by, const float *balance,
                      const TYPE *up, const TYPE *up_bias, const TYPE *down, const TYPE *down_bias, TYPE *y,
                      long N, long C, long k, long width, long keep, int act, int threads) {
    float s[N], t[N], key[N];
    long rows[k * width], put = 0;
    TYPE gates[k * width];
    for (long c = 0; c < N; c++)
        s[c] = up_NAME(down_NAME(dot_NAME(router + c * C, x, C, router + c * C + AHEAD_NAME)));
    for (long c = 0; c < N; c++) {
        float inhibited = 0;
        for (long d = 0; d < N; d++) inhibited += by[c * N + d] * (s[d] > 0 ? s[d] : 0);
        t[c] = s[c] - inhibited;
        key[c] = t[c] + balance[c];
    }
    for (long c = 0; c < N && put < k * width; c++) {
        long before = 0;
        for (long d = 0; d < N; d++) before += key[d] > key[c] || (key[d] == key[c] && d < c);
        TYPE gate = down_NAME(1 / (1 + expf(-t[c])));
        for (long i = 0; i < width && before < k; i++, put++) {
            rows[put] = c * width + i;
            gates[put] = gate;
        }
    }
    return mlp_one_NAME(x, up, up_bias, down, down_bias, rows, gates, y, put, C, keep, act, threads);
}

/* The same through the k of H units where guess . (sense . x) + bias is largest; of equal ones the first. */
long predicted_one_NAME(const TYPE *x, const TYPE *sense, const TYPE *guess, const TYPE *bias,
                        const TYPE *up, const TYPE *up_bias, const TYPE *down, const TYPE *down_bias, TYPE *y,
                        long H, long R, long C, long k, long keep, int act, int threads) {
    TYPE felt[R];
    float score[H], part[H];
    long rows[k], put = 0, ties = k;
    for (long r = 0; r < R; r++)
        felt[r] = down_NAME(dot_NAME(sense + r * C, x, C, sense + r * C + AHEAD_NAME));
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < H; i++) {
        float v = dot_NAME(guess + i * R, felt, R, guess + i * R + AHEAD_NAME) + up_NAME(bias[i]);
        part[i] = score[i] = up_NAME(down_NAME(v));
    }
    float edge = kth(part, H, k);
    for (long i = 0; i < H; i++) ties -= score[i] > edge;
    for (long i = 0; i < H && put < k; i++)
        if (score[i] > edge || (score[i] == edge && ties-- > 0)) rows[put++] = i;
    return mlp_one_NAME(x, up, up_bias, down, down_bias, rows, 0, y, put, C, keep, act, threads);
}
"""
for kind, name in (("float", "f32"), ("uint16_t", "bf16")):
    SOURCE += EACH_TYPE.replace("TYPE", kind).replace("NAME", name)
NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
LONGEST = 65536                                  # keys whose scores fit a thread's stack


@functools.cache
def cpu_library():
    """-> (the compiled kernels or None, the sentence that says which path is taken). Built once a machine."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if os.environ.get("NANOCORTEX_KERNELS") == "off":
        return None, "C kernels off (NANOCORTEX_KERNELS=off)"
    if sys.platform != "linux" or compiler is None:
        missing = "no C compiler" if sys.platform == "linux" else f"not on {platform.system()} yet"
        return None, f"no C kernels: {missing}"
    try:
        library = ctypes.CDLL(str(compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"no C kernels: {compiler} did not build them ({type(error).__name__})"
    for name in NAMES.values():
        pointer, number = ctypes.c_void_p, ctypes.c_long
        getattr(library, f"matvec_{name}").argtypes = [pointer] * 4 + [number] * 3 + [ctypes.c_int]
        getattr(library, f"attend_{name}").argtypes = ([pointer] * 5 + [number] * 4 + [pointer] * 3
                                                       + [ctypes.c_int])
        for kernel in ("rows_dot", "rows_sum"):
            getattr(library, f"{kernel}_{name}").argtypes = [pointer] * 5 + [number] * 3 + [ctypes.c_int]
        getattr(library, f"keep_largest_{name}").argtypes = [pointer] * 2 + [number] * 3
        for kernel, pointers, numbers in (("mlp", 8, 3), ("columns", 9, 5), ("predicted", 9, 5)):
            one = getattr(library, f"{kernel}_one_{name}")
            one.argtypes, one.restype = [pointer] * pointers + [number] * numbers + [ctypes.c_int] * 2, number
    return library, "C kernels for decode steps"


def compiled(compiler):
    """The shared library in the user's cache, keyed by source, compiler and processor."""
    flags = ["-O3", "-march=native", "-fPIC", "-std=gnu11", "-ffp-contract=fast"]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        processor = platform.machine()
    key = hashlib.sha256("\n".join((SOURCE, compiler, *flags, processor)).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanocortex"
    path = folder / f"cpu_{key}.so"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            source, unit, library = (Path(work) / name for name in ("kernels.c", "kernels.o", "kernels.so"))
            source.write_text(SOURCE, encoding="utf-8")
            run = functools.partial(subprocess.run, check=True, capture_output=True, timeout=120)
            run([compiler, *flags, "-fopenmp", "-c", str(source), "-o", str(unit)])
            run([compiler, "-shared", str(unit), "-o", str(library), "-lm"])   # OpenMP: PyTorch's
            os.replace(library, path)
    return path


def path_taken(device):
    """The sentence that a script prints at its start: which kernels a decode step on this device runs on."""
    return cpu_library()[1] if device.type == "cpu" else "PyTorch's kernels"


# ------------------------------------------------ matrix times vector ------------------------------------

FEW = 8                                          # tokens of a decode step that reads weights row by row

def matvec_reference(x, weight, bias):
    """x (..., K) with a few rows, weight (N, K), bias (N) or None -> (..., N)."""
    return F.linear(x, weight, bias)


def matvec(x, weight, bias):
    """As the reference, reading each weight once: N*K elements, the roofline of one-token decode. fp32 sums;
    a row's result does not depend on how many there are.

    CPU tensors of fp32 or bf16, weight and x contiguous and of one dtype; the caller has checked `takes`.
    """
    library, _ = cpu_library()
    N, K = weight.shape
    y = x.new_empty(*x.shape[:-1], N)
    kernel = getattr(library, "matvec_" + NAMES[x.dtype])
    kernel(weight.data_ptr(), x.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr(),
           x.numel() // K, N, K, torch.get_num_threads())
    return y


def inferring():
    """No gradient can be asked for, and no compiler is tracing."""
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


def takes_matvec(x, weight):
    """Is this a product that `matvec` computes: few rows, on a CPU, in inference mode, kernels built?"""
    return (inferring() and 0 < x.numel() <= FEW * weight.size(1) and x.device.type == "cpu"
            and x.dtype == weight.dtype and x.dtype in NAMES and weight.is_contiguous() and x.is_contiguous()
            and cpu_library()[0] is not None)


# ------------------------------------------------ rows of a matrix ---------------------------------------

tally = None                                     # a Tally while `counting`


class Tally:
    """Work that the products of a decode step have really executed, from the shapes that they ran on."""

    def __init__(self):
        self.macs = self.bytes = 0

    def add(self, tokens, rows, width, weight):
        self.macs += tokens * rows * width
        self.bytes += rows * width * weight.element_size()


@contextlib.contextmanager
def counting():
    """Count what products of weights execute inside the block -> a Tally."""
    global tally
    tally = Tally()
    try:
        yield tally
    finally:
        tally = None


def takes_rows(x):
    """May a layer gather the rows of its live units for these tokens (..., K)? A few tokens on a CPU, in
    inference mode; a GPU needs a kernel that chooses rows without the host, and many tokens use all rows."""
    return x.is_cpu and x.numel() <= FEW * x.size(-1) and inferring()


def has_kernel(*tensors):
    """Are the C kernels built, and are these contiguous and of one dtype that they take?"""
    dtype = tensors[0].dtype
    return (cpu_library()[0] is not None and dtype in NAMES
            and all(t.is_contiguous() and t.dtype == dtype for t in tensors))


def stamp(*tensors):
    """Changes whenever one of the tensors does: what was computed from them can be kept until then."""
    return [(t.data_ptr(), t.dtype, None if t.is_inference() else t._version) for t in tensors]


def pointer(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def rows_dot_reference(x, weight, bias, rows):
    """x (..., K), weight (H, K), bias (H,) or None, rows (n,) int64 -> (..., n): products of those rows."""
    return F.linear(x, weight[rows], None if bias is None else bias[rows])


def rows_dot(x, weight, bias, rows):
    """As the reference, reading n*K weights and copying none. CPU, x contiguous, of `takes_rows`."""
    if tally is not None:
        tally.add(x.numel() // x.size(-1), len(rows), x.size(-1), weight)
    if not has_kernel(x, weight):
        return rows_dot_reference(x, weight, bias, rows)
    K, n = x.size(-1), len(rows)
    y = x.new_empty(*x.shape[:-1], n)
    kernel = getattr(cpu_library()[0], "rows_dot_" + NAMES[x.dtype])
    kernel(weight.data_ptr(), x.data_ptr(), pointer(bias), rows.data_ptr(), y.data_ptr(), x.numel() // K, n,
           K, torch.get_num_threads())
    return y


def rows_sum_reference(a, weight, bias, rows=None):
    """a (..., n), weight (H, C) with one row per unit, bias (C,) or None, rows (n,) or None for all (n = H)
    -> (..., C), the sum of the rows weighted by a. Rows where a is zero for every token are not read."""
    live = a.flatten(0, -2).any(dim=0).nonzero()[:, 0]
    y = a[..., live] @ weight[live if rows is None else rows[live]]
    return y if bias is None else y + bias


def rows_sum(a, weight, bias, rows=None):
    """As the reference; sums in fp32, no row copied. CPU, a contiguous, of `takes_rows`."""
    if tally is not None:
        live = a.flatten(0, -2) != 0
        tally.macs += int(live.sum()) * weight.size(1)
        tally.bytes += int(live.any(dim=0).sum()) * weight.size(1) * weight.element_size()
    if not has_kernel(a, weight):
        return rows_sum_reference(a, weight, bias, rows)
    n, C = a.size(-1), weight.size(1)
    y = a.new_empty(*a.shape[:-1], C)
    kernel = getattr(cpu_library()[0], "rows_sum_" + NAMES[a.dtype])
    kernel(a.data_ptr(), weight.data_ptr(), pointer(bias), pointer(rows), y.data_ptr(), y.numel() // C, n, C,
           torch.get_num_threads())
    return y


def keep_largest_reference(a, k):
    """a (..., n) -> the same with all but the k largest |a| of each token at zero."""
    winners = a.abs().topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(a).scatter(-1, winners, a.gather(-1, winners))


def keep_largest(a, k):
    """As the reference; for a few tokens in a decode step on a CPU in one pass, of equal ones the first."""
    if not (takes_rows(a) and has_kernel(a) and a.size(-1) <= LONGEST):
        return keep_largest_reference(a, k)
    kept, n = torch.empty_like(a), a.size(-1)
    kernel = getattr(cpu_library()[0], "keep_largest_" + NAMES[a.dtype])
    kernel(a.data_ptr(), kept.data_ptr(), a.numel() // n, n, k)
    return kept


# ------------------------------------------------ a token through an MLP --------------------------------

ACTS = {"relu2": lambda v: F.relu(v).square(), "gelu": F.gelu}      # in the order of the kernel's numbers


def takes_mlp(x, up, down):
    """Is this, of `takes_rows`, one token through an MLP's up, down (H, C) that the kernels below read: one
    dtype, all contiguous, C kernels built?"""
    return (x.numel() == x.size(-1) and x.dtype == up.dtype == down.dtype and x.dtype in NAMES
            and x.is_contiguous() and up.is_contiguous() and down.is_contiguous() and len(up) <= LONGEST
            and cpu_library()[0] is not None)


def mlp_one_reference(x, up, up_bias, down, down_bias, act, keep=None, rows=None, scale=None):
    """One token x (..., C) through an MLP whose up, down (H, C) are stored by unit -> (..., C).

    a = act(up x + up_bias), of the units `rows` (n,) alone and times scale (n,) where they are given; all but
    the `keep` largest |a| at zero; a's rows of down, summed, + down_bias. act: one of ACTS.
    """
    rows = torch.arange(len(up)) if rows is None else rows
    a = ACTS[act](rows_dot_reference(x, up, up_bias, rows)) * (1 if scale is None else scale)
    a = a if keep is None else keep_largest_reference(a, min(keep, len(rows)))
    return rows_sum_reference(a, down, down_bias, rows)


def mlp_one(x, up, up_bias, down, down_bias, act, keep=None, rows=None, scale=None):
    """As the reference, in one call: of down only the live units' rows are read; fp32 between the two."""
    n = len(up) if rows is None else len(rows)
    return run_mlp("mlp", x, (up, up_bias, down, down_bias), (rows, scale), n, (n, x.size(-1)), act, keep)


def columns_one_reference(x, router, by, balance, up, up_bias, down, down_bias, act, k, keep=None):
    """One token x (..., C) through an MLP of N columns of units: router (N, C), by (N, N) fp32 (what column
    d's activity takes from c), balance (N,) fp32. The units of the k winners, scaled by their gates."""
    s = F.linear(x.flatten(), router).float()
    s = s - by @ F.relu(s)
    columns = (s + balance).topk(k, sorted=False).indices.sort().values
    width = len(up) // len(router)
    rows = (columns[:, None] * width + torch.arange(width)).flatten()
    scale = s[columns].sigmoid().to(x.dtype).repeat_interleave(width)
    return mlp_one_reference(x, up, up_bias, down, down_bias, act, keep, rows, scale)


def columns_one(x, router, by, balance, up, up_bias, down, down_bias, act, k, keep=None):
    """As the reference, in one call: only the winners' rows of up and down are read."""
    N, C = router.shape
    width = len(up) // N
    if tally is not None:
        tally.add(1, N, C, router)
    return run_mlp("columns", x, (router, by, balance, up, up_bias, down, down_bias), (), k * width,
                   (N, C, k, width), act, keep)


def predicted_one_reference(x, sense, guess, bias, up, up_bias, down, down_bias, act, k, keep=None):
    """One token x (..., C) through the k units of an MLP where guess (sense x) + bias, (H,), is largest;
    sense (R, C), guess (H, R)."""
    scores = F.linear(F.linear(x.flatten(), sense), guess, bias)
    rows = scores.topk(k, sorted=False).indices.sort().values
    return mlp_one_reference(x, up, up_bias, down, down_bias, act, keep, rows)


def predicted_one(x, sense, guess, bias, up, up_bias, down, down_bias, act, k, keep=None):
    """As the reference, in one call; of equal scores the first win."""
    if tally is not None:
        tally.add(1, *sense.shape, sense)
        tally.add(1, *guess.shape, guess)
    return run_mlp("predicted", x, (sense, guess, bias, up, up_bias, down, down_bias), (), k,
                   (len(guess), *sense.shape, k), act, keep)


@functools.cache
def mlp_kernel(kernel, dtype):
    return getattr(cpu_library()[0], f"{kernel}_one_{NAMES[dtype]}")


def run_mlp(kernel, x, weights, units, n, sizes, act, keep):
    """Call the C kernel `kernel`_one on `n` units of an MLP and count its work -> (..., C)."""
    y = torch.empty_like(x)
    live = mlp_kernel(kernel, x.dtype)(
        x.data_ptr(), *map(pointer, weights), *map(pointer, units), y.data_ptr(), *sizes,
        n if keep is None else min(keep, n), act == "gelu", torch.get_num_threads())
    if tally is not None:
        tally.add(1, n + live, x.size(-1), x)
    return y


# ------------------------------------------------ attention of one query ----------------------------------

def attend_one_reference(q, k, v, heads=None):
    """q (B, H, 1, D), k, v (B, H or more, S, D) -> (B, H, 1, D), softmax(q k / sqrt(D)) v; query h looks at
    keys and values of head heads[h], (H,) int64, or h."""
    k, v = (t if heads is None else t[:, heads] for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


def attend_one(q, k, v, heads=None):
    """As the reference, reading each key and value once: 2*B*H*S*D elements. Scores and sums are in fp32.

    CPU tensors of fp32 or bf16, any strides but a dense last axis; the caller has checked `takes_attend_one`.
    """
    library, _ = cpu_library()
    (B, H, _, D), S = q.shape, k.size(2)
    y = q.new_empty(B, 1, H, D)
    strides = [(ctypes.c_long * 3)(*t.stride()[:3]) for t in (q, k, v)]
    kernel = getattr(library, "attend_" + NAMES[q.dtype])
    pointers = (t.data_ptr() for t in (q, k, v, y))
    kernel(*pointers, pointer(heads), B, H, S, D, *strides, torch.get_num_threads())
    return y.transpose(1, 2)


def takes_attend_one(q, k, v, mask):
    """Is this attention that `attend_one` computes: one query per head, no mask, a CPU, inference mode?"""
    return (inferring() and q.size(2) == 1 and mask is None and q.device.type == "cpu"
            and q.dtype == k.dtype and q.dtype in NAMES and q.stride(3) == k.stride(3) == v.stride(3) == 1
            and k.size(2) <= LONGEST and cpu_library()[0] is not None)
