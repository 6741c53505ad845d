/* The kernels of decode steps on a CPU. sparse_kernels.py says what each computes and holds its reference;
   build.py compiles this file, which includes cpu_typed.c once for every type of weight. */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#define FETCH(p) __builtin_prefetch(p, 0, 2)     /* into the second-level cache, where more misses can wait */
#define LOOK 16                                  /* keys and values are fetched so many columns ahead */
static inline void fetch(const void *p, long bytes) {
    for (long i = 0; i < bytes; i += 64) FETCH((const char *)p + i);
}
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef __AVX512BF16__
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
/* rises with f, as torch sorts: -0 is 0, NaN of either sign is above everything */
static inline uint32_t order(float f) {
    uint32_t u;
    f += 0.0f;
    memcpy(&u, &f, 4);
    u = u >> 31 ? ~u : u | 0x80000000u;
    return f != f ? 0xffffffffu : u;
}
static inline float up_f32(float v) { return v; }
static inline float down_f32(float v) { return v; }
/* v where `here` is 1, 0 where it is 0. By `and`, or gcc reads v there alone, for which AVX2 has no load of 16 bits. */
static inline float only_f32(float v, int here) { return here ? v : 0; }
static inline uint16_t only_bf16(uint16_t v, int here) { return v & -here; }

/* A buffer of `count` elements: a short one on the stack, whose size no width of a model can change, a long
   one on the heap. RELEASE gives it back. */
#define SHORT 512
#define BUFFER(type, name, count) \
    type name##_short[SHORT], *name = (count) <= SHORT ? name##_short : heap((count) * sizeof(type))
#define RELEASE(name) do { if (name != name##_short) free(name); } while (0)
static void *heap(size_t bytes) {
    void *memory = malloc(bytes);
    if (!memory) {
        fprintf(stderr, "out of memory: a kernel asked for %zu bytes\n", bytes);
        abort();
    }
    return memory;
}

/* the k-th largest of n, which are reordered: bins by the leading 12 bits, then Hoare's select in one bin */
static uint32_t kth(uint32_t *part, long n, long k) {
    uint32_t count[4096] = {0};
    for (long i = 0; i < n; i++) count[part[i] >> 20]++;
    uint32_t b = 4095;
    while (k > count[b]) k -= count[b--];
    long m = 0;
    for (long i = 0; i < n; i++) if (part[i] >> 20 == b) part[m++] = part[i];
    for (long low = 0, high = m - 1, want = k - 1; low < high;) {
        uint32_t pivot = part[(low + high) / 2];
        long i = low, j = high;
        while (i <= j) {
            while (part[i] > pivot) i++;
            while (part[j] < pivot) j--;
            if (i <= j) { uint32_t t = part[i]; part[i++] = part[j]; part[j--] = t; }
        }
        if (want <= j) high = j; else if (want >= i) low = i; else break;
    }
    return part[k - 1];
}

/* rises with f as a signed number: -0 is 0, NaN of either sign is above everything */
static inline int32_t rank_of(float f) {
    union { float f; int32_t i; } c = { f + 0.0f };
    return f != f ? INT32_MAX : c.i ^ (c.i >> 31 & INT32_MAX);
}
/* the same of what a dtype can hold: of a bf16 the upper half says it all, and a search ends in half the passes */
static inline int32_t rank_f32(float f) { return rank_of(f); }
static inline int32_t rank_bf16(float f) { return rank_of(f) >> 16; }

/* Without jump threading: gcc 12 copies the body of a loop for each outcome of a choice in it and blends the
   copies, which made event_back five times as slow. A decode step is the faster for it. */
#pragma GCC push_options
#pragma GCC optimize("no-thread-jumps", "unroll-loops")
/* How the k largest of n ranks are told: those above what is returned, and the first `ties` that equal it.
   By halves: a pass counts as many numbers as a register holds at once, and some ten passes find a gap. */
static int32_t edge_of(const int32_t *rank, long n, long k, long *ties) {
    int32_t least = INT32_MAX, most = INT32_MIN;
    long below = 0;
    #pragma omp simd reduction(min:least) reduction(max:most)
    for (long i = 0; i < n; i++) {
        least = rank[i] < least ? rank[i] : least;
        most = rank[i] > most ? rank[i] : most;
    }
    *ties = 0;
    if (k >= n) return INT32_MIN;                               /* no rank is that low */
    if (k <= 0) return most;
    int64_t low = (int64_t)least - 1, high = most;              /* more than k are above low, fewer above high */
    while (high - low > 1) {
        int32_t mid = (int32_t)((low + high) >> 1), above = 0;
        #pragma omp simd reduction(+:above)
        for (long i = 0; i < n; i++) above += rank[i] > mid;
        if (above == k) return mid;
        if (above > k) low = mid;
        else { high = mid; below = above; }
    }
    *ties = k - below;
    return (int32_t)high;
}

/* won: 1 at the places of the k largest of n ranks, of equal ones the first, 0 elsewhere */
static inline void largest(uint8_t *restrict won, const int32_t *restrict rank, int32_t n, long k) {
    long ties;
    int32_t edge = edge_of(rank, n, k, &ties), behind = 0;      /* from there on those equal to edge lose */
    for (; behind < n && ties > 0; behind++) ties -= rank[behind] == edge;
    #pragma omp simd
    for (int32_t i = 0; i < n; i++) won[i] = (rank[i] > edge) | ((rank[i] == edge) & (i < behind));
}
#pragma GCC pop_options

/* all of a but those of the k largest sizes become zero; of equal ones the first stay */
static void keep_floats(float *a, const uint32_t *size, long n, long k) {
    if (k >= n) return;
    BUFFER(uint32_t, part, n);
    memcpy(part, size, n * sizeof(uint32_t));
    uint32_t edge = kth(part, n, k);
    long ties = k;
    for (long i = 0; i < n; i++) ties -= size[i] > edge;
    for (long i = 0; i < n; i++)
        if (!(size[i] > edge || (size[i] == edge && ties-- > 0))) a[i] = 0;
    RELEASE(part);
}

/* sine, cosine and tanh without a branch, so that a compiler makes vectors of them; errors below 1e-6 where
   |z| < FAR. sin: z less whole half turns, then Taylor; cosine: a quarter turn on. */
#define FAR 1e4f
static inline float half_turn(float z) {
    union { float f; uint32_t u; } t = { z * 0.318309886f + 12582912.0f }, s;   /* half turns, in its bits */
    float turns = t.f - 12582912.0f, r = (z - turns * 3.140625f) - turns * 9.67653589793e-4f, q = r * r;
    s.f = r * (1 + q * (-1.66666667e-1f + q * (8.33333333e-3f + q * (-1.98412698e-4f
          + q * (2.75573192e-6f - q * 2.50521084e-8f)))));
    s.u ^= t.u << 31;                                           /* an odd number of them turns the sign */
    return s.f;
}
static inline float sine(float z) { return half_turn(z); }
static inline float cosine(float z) { return half_turn(z + 1.57079633f); }
static inline float tanh_of(float x) {                          /* 1 - 2 / (e^2|x| + 1); Taylor near 0 */
    float a = fabsf(x), y = 2 * (a < 20 ? a : 20), k = rintf(y * 1.44269504f);
    float r = (y - k * 0.693145752f) - k * 1.42860677e-6f;
    float e = 1 + r * (1 + r * (0.5f + r * (1.6666667e-1f + r * (4.1666668e-2f + r * (8.3333333e-3f
              + r * 1.3888889e-3f)))));
    union { uint32_t u; float f; } two = { (uint32_t)((int)k + 127) << 23 };
    float far = 1 - 2 / (e * two.f + 1), q = a * a;
    float near = a * (1 + q * (-3.3333333e-1f + q * (1.3333333e-1f - q * 5.3968254e-2f)));
    float t = a < 0.1f ? near : far;
    return x != x ? x : x < 0 ? -t : t;
}

/* e^x to 2e-7 where |x| < 87, without a branch; NaN stays NaN */
static inline float exp_of(float x) {
    float y = x < -87 ? -87 : x > 87 ? 87 : x;
    union { float f; uint32_t u; } t = { y * 1.44269504f + 12582912.0f }, two;
    float k = t.f - 12582912.0f, r = (y - k * 0.693145752f) - k * 1.42860677e-6f;
    float e = 1 + r * (1 + r * (0.5f + r * (1.6666667e-1f + r * (4.1666668e-2f + r * (8.3333333e-3f
              + r * 1.3888889e-3f)))));
    two.u = (t.u + 127) << 23;
    return e * two.f;
}

/* log(1 + e) for e in 0..1, by twice the series of atanh(e / (2 + e)) */
static inline float log1p_of(float e) {
    float u = e / (2 + e), q = u * u;
    return 2 * u * (1 + q * (3.33333333e-1f + q * (2.0e-1f + q * (1.42857143e-1f + q * (1.11111111e-1f
           + q * (9.09090909e-2f + q * 7.69230769e-2f))))));
}

static inline float sum16(vec v) { float s = 0; for (int i = 0; i < 16; i++) s += v[i]; return s; }

/* A 2:4 row . x: kept values, two of every four, and their places of 2 bits each (see pack_24) */
#define FOUR(NAME) (up_##NAME(v[k / 2]) * up_##NAME(x[k + (meta[k / 32] >> k % 32 & 3)]) \
                    + up_##NAME(v[k / 2 + 1]) * up_##NAME(x[k + (meta[k / 32] >> (k % 32 + 2) & 3)]))
#if defined(__AVX512VBMI__) && defined(__AVX512BF16__)
#define PICKS 1
#endif
#ifdef __AVX512F__
static inline __m512i low_bits_or(__m512i codes, __m512i mask, __m512i base) {
    return _mm512_ternarylogic_epi32(codes, mask, base, 0xea);              /* (codes & mask) | base */
}
static inline __m512i steps(long long from, long long by) {
    return _mm512_setr_epi64(from, from + by, from + 2 * by, from + 3 * by, from + 4 * by, from + 5 * by,
                             from + 6 * by, from + 7 * by);
}
#endif

#ifndef PICKS
static inline float dot24_f32(const float *v, const uint32_t *meta, const float *x, long K) {
    float s = 0;
    for (long k = 0; k < K; k += 4) s += FOUR(f32);
    return s;
}

static inline float dot24_bf16(const uint16_t *v, const uint32_t *meta, const uint16_t *x, long K) {
    float s = 0;
    for (long k = 0; k < K; k += 4) s += FOUR(bf16);
    return s;
}
#endif

/* which of 32 inputs are kept, a bit each, of the places of eight fours */
static inline uint32_t kept_of(uint32_t places) {
    const uint32_t ones = 0x11111111;
    uint32_t a = places & ones, b = places >> 1 & ones, c = places >> 2 & ones, d = places >> 3 & ones;
    return (~((a | b) & (c | d)) & ones) | ((a & ~b) | (c & ~d)) << 1 | ((b & ~a) | (d & ~c)) << 2
         | ((a & b) | (c & d)) << 3;                            /* a, b: the first place's lower bit and upper one */
}
#define EXPAND \
    (void)kept; \
    for (long k = 0; k < n; k++) row[k] = 0; \
    for (long k = 0; k < n; k += 4) { \
        row[k + (places >> k & 3)] = v[k / 2]; \
        row[k + (places >> (k + 2) & 3)] = v[k / 2 + 1]; \
    }
/* the first n of 32 inputs of a 2:4 row, zeros where none is kept; kept: see kept_of */
static inline void expand_bf16(const uint16_t *v, uint32_t places, uint32_t kept, uint16_t *row, long n) {
#ifdef __AVX512VBMI2__
    (void)places;
    __m512i wide = _mm512_maskz_expand_epi16(kept, _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)v)));
    if (n == 32) _mm512_storeu_si512(row, wide);
    else _mm512_mask_storeu_epi16(row, ((__mmask32)1 << n) - 1, wide);
#else
    EXPAND
#endif
}
static inline void expand_f32(const float *v, uint32_t places, uint32_t kept, float *row, long n) {
#ifdef __AVX512F__
    (void)places;
    uint32_t in = n < 32 ? ((uint32_t)1 << n) - 1 : (uint32_t)-1;
    for (long k = 0; k < 2; k++) {
        __m512 wide = _mm512_maskz_expand_ps(kept >> 16 * k, _mm512_castps256_ps512(_mm256_loadu_ps(v + 8 * k)));
        _mm512_mask_storeu_ps(row + 16 * k, in >> 16 * k, wide);
    }
#else
    EXPAND
#endif
}

/* whole numbers of 8 bits . x */
static inline float dot_i8(const int8_t *q, const float *x, long K) {
    vec a = {0}, b = {0};
    long k = 0;
#ifdef __AVX512F__
    for (; k + 32 <= K; k += 32) {
        FETCH(q + k + 4096);
        a += (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(q + k))))
           * *(const vec *)(x + k);
        b += (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(q + k + 16))))
           * *(const vec *)(x + k + 16);
    }
#endif
    float s = sum16(a + b);
    #pragma omp simd reduction(+:s)
    for (long i = k; i < K; i++) s += q[i] * x[i];
    return s;
}

/* how this processor picks by places in registers: 2 from packed rows of floats as they are and from whole numbers as
   picked.py lays them, 1 from rows of picked.py alone, 0 not at all: packed rows are slower than dense ones then */
int picks(void) {
#if defined(PICKS)
    return 2;
#elif defined(__AVX2__) && defined(__FMA__)
    return 1;
#else
    return 0;
#endif
}

/* The slope of a sigmoid of log size - log theta: size theta / (size + theta)^2 */
static inline float step_slope(float size, float theta) {
    float s = size > FLT_MAX ? FLT_MAX : size;
    float edge = theta > FLT_MAX ? FLT_MAX : theta < FLT_MIN ? FLT_MIN : theta, by = 1 / (0.5f * s + 0.5f * edge);
    return 0.5f * s * by * (size > FLT_MAX ? 0 : 0.5f * edge * by);
}

/* OF(up) is up_f32 in the first pass through cpu_typed.c, up_bf16 in the second */
#define JOINED(name, type) name##_##type
#define JOIN(name, type) JOINED(name, type)
#define OF(name) JOIN(name, NAME)

#define TYPE float
#define NAME f32
#include "cpu_typed.c"
#pragma GCC push_options
#pragma GCC optimize("no-thread-jumps")
#include "train_typed.c"
#pragma GCC pop_options
#undef TYPE
#undef NAME
#define TYPE uint16_t                            /* the bits of a bf16 */
#define NAME bf16
#include "cpu_typed.c"
#pragma GCC push_options
#pragma GCC optimize("no-thread-jumps")
#include "train_typed.c"
#pragma GCC pop_options
#include "step.c"
