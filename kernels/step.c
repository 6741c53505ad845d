/* A decode step as a program: a flat list of ops, run for one token of each of up to ROWS rows of a batch by
   one call. decode/engine.py writes programs and says what each op computes. Included by cpu.c.

   Values are vectors of floats, (rows, n). A `shared` one exists once: the threads divide the work of the op
   that writes it. An `own` one exists once a thread: each computes all of it, because a small result costs
   less twice than a meeting of threads. Threads meet where an op says so.

   An op computes lanes: at first a token of each row, behind an op that chooses among them (lanes, below) fewer
   or others. Each thread knows the lanes by itself, and all of them choose the same. */
#include <pthread.h>
#include <sched.h>
#include <unistd.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#endif
#define INLINE static inline __attribute__((always_inline))
#define ONCE static __attribute__((noinline))    /* the same bits wherever it is called: compiled once */
#define ROWS 8                                   /* of a batch */
#define MANY 64                                  /* threads */

enum kind { IS_F32, IS_BF16, IS_KEPT_F32, IS_KEPT_BF16, IS_I8, IS_I4, IS_PICKED_F32, IS_PICKED_BF16, IS_PICKED_I8 };

struct matrix {                                  /* one row for each output, or each unit */
    int64_t kind, rows, width, stride;           /* stride: bytes from row to row */
    const char *data;
    const void *scale;                           /* what else the kind has: 2:4's places; of I8 see of_row */
    int64_t scale_stride;                        /* of I4: where in a row the offsets of its groups lie, 0: it has none */
    const float *bias, *across;                  /* across: what sums of rows are multiplied by, or none */
};

struct op {
    int64_t code, meets, act, all;               /* meets: threads wait for each other first; all: zeros too */
    int64_t in, out, onto, list, by;             /* values: 2 * offset + is it own; -1 where there is none */
    int64_t n[8];
    double f[4];
    const void *p[10];
    struct matrix w;
    int64_t read, used;                          /* rows of w that were read, all calls, where that varies; and
                                                    how often lanes used them: a row is read once for all lanes */
    int64_t ticks;                               /* nanoseconds of all calls, where the program is watched */
    int64_t runs, lanes;                         /* how often it ran, and on how many lanes together */
};

struct program {
    struct op *ops;
    int64_t count, rows, threads, rounds, watched;      /* rounds: to bf16, what a prompt would store */
    float *shared, *own;
    int64_t own_size;                            /* floats of a thread */
    char *scratch;
    int64_t scratch_size;                        /* bytes of a thread */
    int64_t *ids[ROWS];                          /* row by row: ids that were read, and are to be read */
    int64_t columns[ROWS];                       /* of the token to be read, row by row */
    int64_t best[ROWS];                          /* the chosen id; -1: the largest logit is not finite */
    double cost[2], spent;                       /* seconds of a step alone and together, see step */
    int64_t steps;                               /* that were run */
    int64_t far;                                 /* do all weights together come from memory? */
};

struct lanes {
    long rows;                                   /* how many there are */
    int64_t columns[ROWS];                       /* where each stands in the cache */
    long row[ROWS], outer[ROWS];                 /* its row of the batch; its lane among those around these */
};

/* program: as this thread sees it, `rows` and `columns` being those of its lanes; whole: that of all threads */
struct thread {
    struct program *program;
    long number, threads;
    float *own;
    char *scratch;
    struct program *whole;
    const struct op *next;                       /* what runs behind this op */
    struct lanes lanes[3];                       /* those in use are at `level`; below it those around them */
    long level, paying;
    int64_t owes[ROWS];                          /* lane by lane, the first column that owes a layer something */
    float left[ROWS];                            /* lane by lane, how much of 1 a token that ponders has left */
};

static inline float *at(const struct thread *me, int64_t value) {
    return (value & 1 ? me->own : me->program->shared) + (value >> 1);
}

/* the part of 0..n that is this thread's of an op that writes `out`, in units of `unit` */
static inline void part(const struct thread *me, int64_t out, long n, long unit, long *from, long *to) {
    long all = (n + unit - 1) / unit, t = out & 1 ? 0 : me->number, of = out & 1 ? 1 : me->threads;
    *from = all * t / of * unit;
    *to = all * (t + 1) / of * unit;
    *to = *to < n ? *to : n;
}

/* ------------------------------------------------ threads ------------------------------------------------
   Workers of one process, which spin for some microseconds for the next step and then sleep: on a machine with
   other work a step loses its share and no more. One step at a time has them; another, beside it, runs alone. */
#define SPINS 4000
#define TURN 128                                 /* more than MANY */

static struct pool {
    pthread_mutex_t lock;
    pthread_t worker[MANY];
    long started;                                /* workers */
    struct program *job;
    void (*run)(struct program *, long, long);
    uint32_t turn, gate, arrived, asleep;        /* turn: TURN a step, plus the threads that run it */
    uint32_t since[MANY];                        /* the turn that a worker began behind */
} pool = { .lock = PTHREAD_MUTEX_INITIALIZER };

static inline void idle(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

/* until *word is not `old` */
static void await(uint32_t *word, uint32_t old) {
    for (long i = 0; i < SPINS; i++) {
        if (__atomic_load_n(word, __ATOMIC_ACQUIRE) != old) return;
        idle();
    }
    __atomic_fetch_add(&pool.asleep, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(word, __ATOMIC_SEQ_CST) == old)
#ifdef __linux__
        syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, old, 0, 0, 0);
#else
        sched_yield();
#endif
    __atomic_fetch_sub(&pool.asleep, 1, __ATOMIC_SEQ_CST);
}

static void announce(uint32_t *word, uint32_t more) {
    __atomic_fetch_add(word, more, __ATOMIC_SEQ_CST);
#ifdef __linux__
    if (__atomic_load_n(&pool.asleep, __ATOMIC_SEQ_CST)) syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, MANY, 0, 0, 0);
#endif
}

static void meet(const struct thread *me) {
    if (me->threads == 1) return;
    uint32_t gate = __atomic_load_n(&pool.gate, __ATOMIC_ACQUIRE);
    if (__atomic_fetch_add(&pool.arrived, 1, __ATOMIC_ACQ_REL) == (uint32_t)me->threads - 1) {
        __atomic_store_n(&pool.arrived, 0, __ATOMIC_RELAXED);
        announce(&pool.gate, 1);
    } else await(&pool.gate, gate);
}

static void *work(void *number) {
    long t = (long)number;
    uint32_t turn = pool.since[t];
    for (;;) {
        await(&pool.turn, turn);
        turn = __atomic_load_n(&pool.turn, __ATOMIC_ACQUIRE);
        long threads = turn % TURN;              /* one that is not of this turn may come late: the next */
        if (t < threads) pool.run(pool.job, t, threads);        /* job is being written, which is not its own */
    }
    return 0;
}

/* A process that was forked has no workers yet, whatever its parent's were at. */
static void no_workers(void) { pool = (struct pool) { .lock = PTHREAD_MUTEX_INITIALIZER }; }
__attribute__((constructor)) static void mind_forks(void) { pthread_atfork(0, 0, no_workers); }

/* run(job, t, threads) on every thread t; alone where the workers are busy or cannot be started */
static void together(struct program *job, void (*run)(struct program *, long, long), long threads) {
    threads = threads < MANY ? threads : MANY;
    if (threads <= 1 || pthread_mutex_trylock(&pool.lock)) {
        run(job, 0, 1);
        return;
    }
    for (long t = pool.started + 1; t < threads; t++, pool.started++) {
        pool.since[t] = pool.turn;
        if (pthread_create(&pool.worker[t], 0, work, (void *)t)) break;
    }
    threads = threads < pool.started + 1 ? threads : pool.started + 1;
    pool.job = job;
    pool.run = run;
    announce(&pool.turn, TURN - pool.turn % TURN + threads);
    run(job, 0, threads);
    pthread_mutex_unlock(&pool.lock);
}

/* ------------------------------------------------ arithmetic ------------------------------------------- */

static inline float sigmoid(float x) { return 1 / (1 + exp_of(-x)); }

/* GELU by erf to 1.5e-7 (Abramowitz and Stegun, 7.1.26) */
static inline float gelu_of(float v) {
    float z = fabsf(v) * 0.70710678f, t = 1 / (1 + 0.3275911f * z);
    float tail = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f
                 + t * 1.061405429f)))) * exp_of(-z * z);
    return 0.5f * v * (v < 0 ? tail : 2 - tail);
}
static inline float gelu_tanh_of(float v) {
    return 0.5f * v * (1 + tanh_of(0.79788456f * (v + 0.044715f * v * v * v)));
}
static inline float rounded(float v) { return up_bf16(down_bf16(v)); }

static void round_all(const struct thread *me, float *restrict y, long n) {
    if (!me->program->rounds) return;
    #pragma omp simd
    for (long i = 0; i < n; i++) y[i] = rounded(y[i]);
}

/* acts are numbered as in decode/engine.py: relu2, gelu, none, gelu_tanh, osc, sigmoid, silu */
enum { RELU2, GELU, NONE, GELU_TANH, OSC, SIGMOID, SILU };

/* units from..to of y (n) through an activation; w, phi and b of osc are p[0..2] */
static void act_all(const struct op *o, float *restrict y, long from, long to) {
    const float *w = o->p[0], *phi = o->p[1], *b = o->p[2];
    switch (o->act) {
    case RELU2:
        #pragma omp simd
        for (long i = from; i < to; i++) y[i] = y[i] < 0 ? 0 : y[i] * y[i];
        break;
    case GELU:
        #pragma omp simd
        for (long i = from; i < to; i++) y[i] = gelu_of(y[i]);
        break;
    case GELU_TANH:
        #pragma omp simd
        for (long i = from; i < to; i++) y[i] = gelu_tanh_of(y[i]);
        break;
    case SIGMOID:
        #pragma omp simd
        for (long i = from; i < to; i++) y[i] = sigmoid(y[i]);
        break;
    case SILU:
        #pragma omp simd
        for (long i = from; i < to; i++) y[i] *= sigmoid(y[i]);
        break;
    case OSC:
        for (long i = from; i < to; i++) {
            float z = w[i] * y[i] + phi[i];
            y[i] = (fabsf(z) < FAR ? sine(z) : sinf(z)) * tanh_of(y[i]) + b[i];
        }
    }
}

/* ------------------------------------------------ rows of weights ---------------------------------------- */

#if defined(__AVX512BF16__)
#define BF16_AS_BF16 1                           /* vdpbf16ps takes both sides in bf16 */
#elif defined(__AVX2__) && defined(__FMA__)
#define BF16_AS_PAIRS 1                          /* x as floats, of every 16 the even ones first */
#include <immintrin.h>
#endif

/* Whole numbers. A row of I8: numbers of 8 bits, zeros behind them up to a multiple of 64; its scale, and the
   sum of its numbers, lie in w.scale. A row of I4: numbers of 4 bits in groups of 32, of which each has a scale:
   32 bytes hold 64 numbers plus 8, the first 32 in the low halves; behind them lie the scales in bf16, and where each
   group also has an offset, which is added to its numbers times the scale, those, in bf16 too. What is
   multiplied by them is rounded to whole numbers: 8 bits with one scale lose one percent of loss where a few
   inputs are far larger than all others. What meets I8 has 15 bits, -FINEST..FINEST, and one scale: in its room
   lie that scale (64 bytes for it), a digit of 8 bits of each number (/ DIGIT, rounded), and the digits of what
   that leaves (-64..63). What meets I4 has 8 bits and a scale for each 32: in its room lie, behind 64 bytes, the
   numbers, -8 times the sum of each 32 (int32, of 64 numbers 8 of them: see FIX), their scales, as the lanes of a
   register meet them, and the sum of what each 32 stand for (SUMS_AT bytes from the start on).
   Factors of rows that are added up are whole numbers of 16 bits with AVX2, one scale
   for TOGETHER of them, else floats. */
#define FINEST 16319                             /* 127 * DIGIT + 63; also in kernels/whole.py */
#define DIGIT 128
struct of_row { float scale; int32_t sum; };

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define WHOLE_VNNI 1                             /* vpdpbusd takes one side plus 128 */
#endif
#if defined(WHOLE_VNNI) && defined(PICKS)
#define AT_ONCE 4                                /* lanes: their sums of four rows fill half of the registers */
#define TWO 2                                    /* lanes whose inputs are two digits each */
#else
#define AT_ONCE 1
#define TWO 1
#endif
#if defined(__AVX2__) && defined(__FMA__)
#define WHOLE_AVX2 1
#include <immintrin.h>
#endif

/* where -8 times the sum of 32 numbers lies: lanes 0 and 2 of the 8 that stand for 64 of them, as quads_i4 has them */
#define FIX(group) ((group) / 2 * 8 + (group) % 2 * 2)
#define SUMS_AT(wide) (64 + (wide) / 2 * 3 + ((wide) + 127) / 128 * 128)

#ifdef WHOLE_AVX2
#define EXACT INLINE                             /* sums of whole numbers, and of floats in an order of their own */
#else
#define EXACT ONCE
#endif
#if defined(BF16_AS_BF16) || defined(BF16_AS_PAIRS)
#define EXACT_BF16 INLINE
#else
#define EXACT_BF16 ONCE
#endif

/* a * b + c, rounded once wherever that is an instruction: not here so and there otherwise, as a compiler sees fit */
static inline float fused(float a, float b, float c) {
#ifdef FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

static inline long padded(long K) { return (K + 63) / 64 * 64; }
/* the room of what is multiplied by a row of width K, whatever the kind */
static inline long room_of(long K) { return (K * 4 + 63) / 64 * 64 + 256; }

/* what x (n) is multiplied by to become whole numbers of 15 bits, and their scale; 0 and NaN where it is not finite */
static float to_whole(const float *x, long n, float *scale) {
    float most = 1e-30f, wrong = 0;
    #pragma omp simd reduction(max:most) reduction(+:wrong)
    for (long i = 0; i < n; i++) {
        float size = fabsf(x[i]);
        most = size > most ? size : most;
        wrong += x[i] * 0;
    }
    *scale = wrong != 0 ? NAN : most / FINEST;                  /* NaN is not 0 either */
    return wrong != 0 ? 0 : FINEST / most;
}
static void round_to_whole(const float *x, long n, float by, int16_t *q) {
    if (by == 0) memset(q, 0, n * sizeof *q);
    else {
        #pragma omp simd
        for (long i = 0; i < n; i++) q[i] = (int16_t)(int)rintf(x[i] * by);
    }
}

/* the digits of q (n) */
static inline void digits_of(const int16_t *q, long n, int8_t *high, int8_t *low) {
    #pragma omp simd
    for (long i = 0; i < n; i++) {
        int16_t digit = (q[i] + DIGIT / 2) >> 7;
        high[i] = (int8_t)digit;
        low[i] = (int8_t)(q[i] - digit * DIGIT);
    }
}

static void round_to_digits(const float *x, long n, char *to) {
    long wide = padded(n);
    int8_t *high = (int8_t *)to + 64, *low = high + wide;
    float by = to_whole(x, n, (float *)to);
#ifdef WHOLE_VNNI
    const __m512i half = _mm512_set1_epi32(DIGIT / 2), offset = _mm512_set1_epi32(128);
    for (long k = 0; k < wide; k += 16) {
        __mmask16 in = by == 0 || n <= k ? 0 : n >= k + 16 ? 0xffff : (1u << (n - k)) - 1;
        __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(in, x + k), _mm512_set1_ps(by)));
        __m512i digit = _mm512_srai_epi32(_mm512_add_epi32(q, half), 7);
        __m512i rest = _mm512_add_epi32(_mm512_sub_epi32(q, _mm512_slli_epi32(digit, 7)), offset);
        _mm_storeu_si128((__m128i *)(high + k), _mm512_cvtepi32_epi8(_mm512_add_epi32(digit, offset)));
        _mm_storeu_si128((__m128i *)(low + k), _mm512_cvtepi32_epi8(rest));
    }
#else
    for (long k = 0; k < wide; k += 64) {
        int16_t some[64] = {0};
        round_to_whole(x + k, n - k < 64 ? n - k : 64, by, some);
        digits_of(some, 64, high + k, low + k);
    }
#endif
}

/* q (32) = n of x rounded to 8 bits, zeros behind them; sum: of them -> their scale; NaN where one is not finite */
static float round_to_8_bits(const float *x, long n, int8_t *q, int32_t *sum) {
#ifdef WHOLE_VNNI
    const __m512 infinite = _mm512_set1_ps(INFINITY);
    __mmask16 in = n >= 16 ? 0xffff : n < 0 ? 0 : (1u << n) - 1;
    __mmask16 more = n >= 32 ? 0xffff : n < 16 ? 0 : (1u << (n - 16)) - 1;
    __m512 u = _mm512_maskz_loadu_ps(in, x), v = _mm512_maskz_loadu_ps(more, x + 16);
    __m512 most_of = _mm512_max_ps(_mm512_abs_ps(u), _mm512_abs_ps(v));
    __mmask16 wrong = _mm512_cmp_ps_mask(_mm512_abs_ps(u), infinite, _CMP_NLT_UQ)
                      | _mm512_cmp_ps_mask(_mm512_abs_ps(v), infinite, _CMP_NLT_UQ);
    float most = fmaxf(_mm512_reduce_max_ps(most_of), 1e-30f);
    __m512 by = _mm512_set1_ps(127 / most);
    __m512i first = _mm512_maskz_cvtps_epi32(wrong ? 0 : 0xffff, _mm512_mul_ps(u, by));
    __m512i second = _mm512_maskz_cvtps_epi32(wrong ? 0 : 0xffff, _mm512_mul_ps(v, by));
    _mm_storeu_si128((__m128i *)q, _mm512_cvtepi32_epi8(first));
    _mm_storeu_si128((__m128i *)(q + 16), _mm512_cvtepi32_epi8(second));
    *sum = _mm512_reduce_add_epi32(_mm512_add_epi32(first, second));
    return wrong ? NAN : most / 127;
#else
    float some[32] = {0}, most = 1e-30f, wrong = 0;
    int32_t all = 0;
    memcpy(some, x, (n < 0 ? 0 : n < 32 ? n : 32) * sizeof(float));
    #pragma omp simd reduction(max:most) reduction(+:wrong)
    for (int i = 0; i < 32; i++) {
        most = fabsf(some[i]) > most ? fabsf(some[i]) : most;
        wrong += some[i] * 0;
    }
    float by = 127 / most;
    if (wrong != 0) memset(q, 0, 32);                           /* NaN is not 0 either */
    else {
        #pragma omp simd
        for (int i = 0; i < 32; i++) q[i] = (int8_t)(int)rintf(some[i] * by);
    }
    #pragma omp simd reduction(+:all)
    for (int i = 0; i < 32; i++) all += q[i];
    *sum = all;
    return wrong != 0 ? NAN : most / 127;
#endif
}

static void round_in_groups(const float *x, long n, char *to) {
    long wide = padded(n);
    int8_t *q = (int8_t *)to + 64;
    int32_t *fix = (int32_t *)(q + wide);
    float *scale = (float *)(fix + wide / 8), *sums = (float *)(to + SUMS_AT(wide));
    memset(fix, 0, wide / 2);
#ifdef WHOLE_VNNI
    memset(scale, 0, (wide + 127) / 128 * 128);
#endif
    for (long k = 0; k < wide; k += 32) {
        long at = k, g = k / 32;
#ifdef WHOLE_VNNI                                /* of 128 numbers the second 32 lie third, as the halves of 64 bytes have them */
        if ((k | 64) < wide) at = k / 128 * 128 + (k / 32 % 2 * 2 + k / 64 % 2) * 32;
#endif
        int32_t sum;
        float one = round_to_8_bits(x + k, n - k, q + at, &sum);
        fix[FIX(g)] = -8 * sum;
        sums[g] = one * sum;
#ifdef WHOLE_VNNI
        _mm256_storeu_ps(scale + g / 4 * 32 + g % 2 * 16 + g / 2 % 2 * 8, _mm256_set1_ps(one));
#else
        for (int i = 0; i < 4; i++) scale[g / 2 * 8 + g % 2 * 2 + i / 2 * 4 + i % 2] = one;
#endif
    }
}

/* a number by the sums of products of its two digits, with AVX-512 plus 128 each: less what that adds, 128 times the
   sum of the row's numbers */
static inline float of_digits(int32_t high, int32_t low, int32_t sum) {
#ifdef WHOLE_VNNI
    high -= 128 * sum, low -= 128 * sum;
#else
    (void)sum;
#endif
    return (float)DIGIT * high + low;
}

#ifdef WHOLE_AVX2
/* the sums of a[0..3] */
static inline __m128i sums_of_ints(const __m256i *a) {
    __m256i t = _mm256_hadd_epi32(_mm256_hadd_epi32(a[0], a[1]), _mm256_hadd_epi32(a[2], a[3]));
    return _mm_add_epi32(_mm256_castsi256_si128(t), _mm256_extracti128_si256(t, 1));
}
static inline __m128 sums_of_floats(const __m256 *a) {
    __m256 t = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    return _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
}
static inline __m256i load_ints(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
#endif
#ifdef __AVX512F__
static inline __m128i sums_of_wide_ints(const __m512i *a) {
    __m512i t = _mm512_add_epi32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
    __m512i u = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
    t = _mm512_add_epi32(_mm512_unpacklo_epi64(t, u), _mm512_unpackhi_epi64(t, u));
    __m256i v = _mm256_add_epi32(_mm512_castsi512_si256(t), _mm512_extracti64x4_epi64(t, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}
static inline __m128 sums_of_wide_floats(const __m512 *a) {
    __m512d t = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1])));
    __m512d u = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3])));
    t = _mm512_castps_pd(_mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(t, u)), _mm512_castpd_ps(_mm512_unpackhi_pd(t, u))));
    __m256 v = _mm256_add_ps(_mm256_castpd_ps(_mm512_castpd512_pd256(t)), _mm256_castpd_ps(_mm512_extractf64x4_pd(t, 1)));
    return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}
#endif

static inline void sums_of_vec(const vec *a, float *s) {
#if defined(__AVX512F__)
    __m512 wide[4];
    memcpy(wide, a, sizeof wide);
    _mm_storeu_ps(s, sums_of_wide_floats(wide));
#elif defined(WHOLE_AVX2)
    __m256 half[8];
    memcpy(half, a, sizeof half);
    for (int l = 0; l < 4; l++) half[l] = _mm256_add_ps(half[2 * l], half[2 * l + 1]);
    _mm_storeu_ps(s, sums_of_floats(half));
#else
    for (int l = 0; l < 4; l++) s[l] = sum16(a[l]);
#endif
}

/* s (lanes, 4) = four rows . x of some lanes, which lie `apart` bytes from each other: one, or with AVX-512 up to
   AT_ONCE. A lane's sums are the same bit for bit however many there are. next: rows to be fetched meanwhile. */

EXACT void quads_i8(const struct of_row *of, const long *n, const char *const *row, const char *const *next,
                    const char *x, long apart, const int lanes, long K, float *s) {
    long wide = padded(K);
    int32_t high[4] = {0}, low[4] = {0};
#if defined(WHOLE_VNNI)
    __m512i a[8 * TWO], v[2 * TWO];
    for (int i = 0; i < 8 * lanes; i++) a[i] = _mm512_setzero_si512();
    for (long k = 0; k < wide; k += 64) {
        for (int r = 0; r < lanes; r++) {
            v[2 * r] = _mm512_loadu_si512(x + r * apart + 64 + k);
            v[2 * r + 1] = _mm512_loadu_si512(x + r * apart + 64 + wide + k);
        }
        for (int l = 0; l < 4; l++) {
            __m512i w = _mm512_loadu_si512(row[l] + k);
            if (next) FETCH(next[l] + k);
            for (int r = 0; r < lanes; r++) {
                a[8 * r + l] = _mm512_dpbusd_epi32(a[8 * r + l], v[2 * r], w);
                a[8 * r + 4 + l] = _mm512_dpbusd_epi32(a[8 * r + 4 + l], v[2 * r + 1], w);
            }
        }
    }
    for (int r = 0; r < lanes; r++) {
        _mm_storeu_si128((__m128i *)high, sums_of_wide_ints(a + 8 * r));
        _mm_storeu_si128((__m128i *)low, sums_of_wide_ints(a + 8 * r + 4));
        for (int l = 0; l < 4; l++)
            s[4 * r + l] = of_digits(high[l], low[l], of[n[l]].sum) * (*(const float *)(x + r * apart) * of[n[l]].scale);
    }
#else
    const char *X = x + 64, *Y = X + wide;
    (void)apart;
    (void)lanes;
#if defined(WHOLE_AVX2)
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i a[8];
    for (int l = 0; l < 8; l++) a[l] = _mm256_setzero_si256();
    for (long k = 0; k < wide; k += 32) {
        __m256i u = load_ints(X + k), v = load_ints(Y + k);
        for (int l = 0; l < 4; l++) {
            __m256i w = load_ints(row[l] + k), size = _mm256_abs_epi8(w);
            if (next) FETCH(next[l] + k);
            a[l] = _mm256_add_epi32(a[l], _mm256_madd_epi16(
                _mm256_maddubs_epi16(size, _mm256_sign_epi8(u, w)), ones));
            a[l + 4] = _mm256_add_epi32(a[l + 4], _mm256_madd_epi16(
                _mm256_maddubs_epi16(size, _mm256_sign_epi8(v, w)), ones));
        }
    }
    _mm_storeu_si128((__m128i *)high, sums_of_ints(a));
    _mm_storeu_si128((__m128i *)low, sums_of_ints(a + 4));
#else
    (void)next;
    for (int l = 0; l < 4; l++) {
        int32_t u = 0, v = 0;
        #pragma omp simd reduction(+:u, v)
        for (long k = 0; k < wide; k++) {
            u += (int32_t)(int8_t)row[l][k] * (int8_t)X[k];
            v += (int32_t)(int8_t)row[l][k] * (int8_t)Y[k];
        }
        high[l] = u, low[l] = v;
    }
#endif
    for (int l = 0; l < 4; l++) s[l] = of_digits(high[l], low[l], 0) * (*(const float *)x * of[n[l]].scale);
#endif
}

#if defined(WHOLE_VNNI)
/* a += 128 numbers from k on of four rows, or 64 in the lower half of registers (all: 0) */
INLINE void add_i4(const char *const *row, const char *const *next, const char *x, long apart, const int lanes,
                   long wide, long k, const int all, __m512 *a) {
    const __m512i half = _mm512_set1_epi8(15), first = _mm512_inserti64x4(
        _mm512_set1_epi32(0x0100ffff), _mm256_set1_epi32(0x0504ffff), 1);       /* scales of groups 0 and 2 */
    const __m512i second = _mm512_inserti64x4(_mm512_set1_epi32(0x0302ffff), _mm256_set1_epi32(0x0706ffff), 1);
    for (int l = 0; l < 4; l++) {
        __m512i w = all ? _mm512_loadu_si512(row[l] + k / 2) : _mm512_zextsi256_si512(load_ints(row[l] + k / 2));
        __m512i scales = _mm512_broadcastq_epi64(_mm_loadl_epi64((const __m128i *)(row[l] + wide / 2 + k / 16)));
        __m512 by = _mm512_castsi512_ps(_mm512_shuffle_epi8(scales, first));
        __m512 more = _mm512_castsi512_ps(_mm512_shuffle_epi8(scales, second));
        if (next) FETCH(next[l] + k / 2);
        __m512i u = _mm512_and_si512(w, half), v = _mm512_and_si512(_mm512_srli_epi16(w, 4), half);
        for (int r = 0; r < lanes; r++) {
            const char *X = x + r * apart + 64 + k;
            const int32_t *fix = (const int32_t *)(x + r * apart + 64 + wide) + k / 8;
            const float *scale = (const float *)(x + r * apart + 64 + wide + wide / 2) + k / 4;
            __m512i p = _mm512_maskz_loadu_epi32(all ? 0x0101 : 0x0001, fix);
            __m512i q = _mm512_maskz_loadu_epi32(all ? 0x0404 : 0x0004, fix);
            p = _mm512_dpbusd_epi32(p, u, _mm512_loadu_si512(X));
            q = _mm512_dpbusd_epi32(q, v, _mm512_loadu_si512(X + (all ? 64 : 32)));
            __m512 first_by = _mm512_mul_ps(by, _mm512_loadu_ps(scale));
            __m512 second_by = _mm512_mul_ps(more, _mm512_loadu_ps(scale + 16));
            a[4 * r + l] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(p), first_by, a[4 * r + l]);
            a[4 * r + l] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(q), second_by, a[4 * r + l]);
        }
    }
}
#endif

/* The numbers of a row lie plus 8: sums begin with what that adds to them */
EXACT void quads_i4(const char *const *row, const char *const *next, const char *x, long apart, const int lanes, long K,
                    float *s) {
    long wide = padded(K), k = 0;
#if defined(WHOLE_VNNI)
    __m512 a[4 * AT_ONCE];
    for (int i = 0; i < 4 * lanes; i++) a[i] = _mm512_setzero_ps();
    for (; k + 128 <= wide; k += 128) add_i4(row, next, x, apart, lanes, wide, k, 1, a);
    if (k < wide) add_i4(row, next, x, apart, lanes, wide, k, 0, a);
    for (int r = 0; r < lanes; r++) _mm_storeu_ps(s + 4 * r, sums_of_wide_floats(a + 4 * r));
#else
    const char *X = x + 64;
    const int32_t *fix = (const int32_t *)(X + wide);
    const float *own = (const float *)(fix + wide / 8);         /* scales of x */
    (void)apart;
    (void)lanes;
#if defined(WHOLE_AVX2)
    __m256 a[4] = { _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps() };
    /* of 64 numbers four lanes come to stand for the first group, lanes 0, 1, 4 and 5, and four for the second */
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const __m256i places = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 2, 3,
                                            -1, -1, 0, 1, -1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 2, 3);
    for (; k < wide; k += 64) {
        __m256i u = load_ints(X + k), v = load_ints(X + k + 32), less = load_ints(fix + k / 8);
        __m256 by = _mm256_loadu_ps(own + k / 8);
        for (int l = 0; l < 4; l++) {
            __m256i w = load_ints(row[l] + k / 2);
            const float *two = (const float *)(row[l] + wide / 2 + k / 16);         /* scales */
            if (next) FETCH(next[l] + k / 2);
            __m256i p = _mm256_maddubs_epi16(_mm256_and_si256(w, low), u);
            __m256i q = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(w, 4), low), v);
            __m256i sums = _mm256_add_epi16(_mm256_unpacklo_epi64(p, q), _mm256_unpackhi_epi64(p, q));
            __m256 both = _mm256_mul_ps(by, _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_castps_si256(
                _mm256_broadcast_ss(two)), places)));
            a[l] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(sums, ones), less)), both,
                                   a[l]);
        }
    }
    _mm_storeu_ps(s, sums_of_floats(a));
#else
    (void)next;
    for (int l = 0; l < 4; l++) {
        const uint16_t *scale = (const uint16_t *)(row[l] + wide / 2);
        s[l] = 0;
        for (k = 0; k < wide; k += 64) {
            const uint8_t *w = (const uint8_t *)row[l] + k / 2;
            int32_t u = fix[FIX(k / 32)], v = fix[FIX(k / 32 + 1)];
            #pragma omp simd reduction(+:u, v)
            for (long i = 0; i < 32; i++) {
                u += (w[i] & 15) * (int8_t)X[k + i];
                v += (w[i] >> 4) * (int8_t)X[k + 32 + i];
            }
            const float *by = own + k / 8;
            s[l] += u * (by[0] * up_bf16(scale[k / 32])) + v * (by[2] * up_bf16(scale[k / 32 + 1]));
        }
    }
#endif
#endif
}

#ifdef WHOLE_VNNI
/* scales of up to 16 groups, zeros behind the last */
static inline __m512 wide_scales(const uint16_t *p, long n) {
    __mmask16 in = n < 16 ? (1u << n) - 1 : 0xffff;
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(in, p)), 16));
}
#endif

/* s (4) += the offsets of the groups of four rows of I4, which lie `at` bytes from where a row begins, times `sums` */
ONCE void add_offsets(const char *const *row, long at, const float *sums, long groups, float *s) {
#ifdef WHOLE_VNNI
    __m512 a[4];
    for (int l = 0; l < 4; l++) a[l] = _mm512_setzero_ps();
    for (long g = 0; g < groups; g += 16) {
        __m512 by = _mm512_maskz_loadu_ps(groups - g < 16 ? (1u << (groups - g)) - 1 : 0xffff, sums + g);
        for (int l = 0; l < 4; l++)
            a[l] = _mm512_fmadd_ps(by, wide_scales((const uint16_t *)(row[l] + at) + g, groups - g), a[l]);
    }
    _mm_storeu_ps(s, _mm_add_ps(_mm_loadu_ps(s), sums_of_wide_floats(a)));
#else
    for (int l = 0; l < 4; l++) {
        const uint16_t *offsets = (const uint16_t *)(row[l] + at);
        float more = 0;
        #pragma omp simd reduction(+:more)
        for (long g = 0; g < groups; g++) more += up_bf16(offsets[g]) * sums[g];
        s[l] += more;
    }
#endif
}

/* element c of a row of whole numbers; of: the row's, of I8 */
static inline float whole(const struct matrix *w, long n, long c) {
    const char *row = w->data + n * w->stride;
    if (w->kind == IS_I8) return ((const struct of_row *)w->scale)[n].scale * (int8_t)row[c];
    uint8_t two = row[c / 64 * 32 + c % 32];
    float scale = up_bf16(((const uint16_t *)(row + padded(w->width) / 2))[c / 32]);
    float offset = w->scale_stride ? up_bf16(((const uint16_t *)(row + w->scale_stride))[c / 32]) : 0;
    return scale * ((c & 32 ? two >> 4 : two & 15) - 8) + offset;
}

/* x (n) in bf16, for vdpbf16ps, to which numbers below 2^-126 are zeros as well */
static void halves_of(const float *x, long n, uint16_t *to) {
    long i = 0;
#ifdef __AVX512BF16__
    for (; i + 16 <= n; i += 16)
        _mm256_storeu_si256((__m256i *)(to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
#endif
    for (; i < n; i++) to[i] = down_bf16(x[i]);
}

/* what rows of a kind are multiplied by, made of x (n) in `to` */
static void prepare(int64_t kind, const float *x, long n, char *to) {
    float *wide = (float *)to;
    if (kind == IS_I8 || kind == IS_PICKED_I8) round_to_digits(x, n, to);
    if (kind == IS_I4) round_in_groups(x, n, to);
    if (kind == IS_F32 || kind == IS_KEPT_F32 || kind == IS_PICKED_F32) memcpy(wide, x, n * sizeof(float));
    if (kind == IS_PICKED_BF16) for (long i = 0; i < n; i++) wide[i] = rounded(x[i]);
    if (kind == IS_KEPT_F32 || kind == IS_PICKED_F32 || kind == IS_PICKED_BF16)
        memset(wide + n, 0, (-n & 31) * sizeof(float));
    if (kind == IS_KEPT_BF16) halves_of(x, n, (uint16_t *)to);
    if (kind == IS_KEPT_BF16) memset((uint16_t *)to + n, 0, (-n & 63) * sizeof(uint16_t));
    if (kind != IS_BF16) return;
#ifdef BF16_AS_BF16
    halves_of(x, n, (uint16_t *)to);
#elif defined(BF16_AS_PAIRS)
    long k = 0;
    for (; k + 16 <= n; k += 16)
        for (long j = 0; j < 8; j++) {
            wide[k + j] = rounded(x[k + 2 * j]);
            wide[k + 8 + j] = rounded(x[k + 2 * j + 1]);
        }
    for (; k < n; k++) wide[k] = rounded(x[k]);
#else
    for (long i = 0; i < n; i++) wide[i] = rounded(x[i]);
#endif
}

INLINE void quads_f32(const char *const *row, const char *const *next, const char *x, long apart, const int lanes,
                      long K, float *s) {
    const float *w[4];
    for (int l = 0; l < 4; l++) w[l] = (const float *)row[l];
    vec a[4 * AT_ONCE];
    for (int i = 0; i < 4 * lanes; i++) a[i] = (vec){0};
    long k = 0;
    for (; k + 16 <= K; k += 16)
        for (int l = 0; l < 4; l++) {
            vec W = *(const vec *)(w[l] + k);
            if (next) FETCH(next[l] + 4 * k);
            for (int r = 0; r < lanes; r++) a[4 * r + l] += W * *(const vec *)((const float *)(x + r * apart) + k);
        }
    for (int r = 0; r < lanes; r++) {
        const float *X = (const float *)(x + r * apart);
        sums_of_vec(a + 4 * r, s + 4 * r);
        for (int l = 0; l < 4; l++)
            for (long i = k; i < K; i++) s[4 * r + l] = fused(w[l][i], X[i], s[4 * r + l]);
    }
}

#if defined(BF16_AS_BF16)
/* a += 32 products from k on of four rows, or the `in` first of them */
INLINE void add_bf16(const char *const *row, const char *const *next, const char *x, long apart, const int lanes,
                     long k, __mmask32 in, __m512 *a) {
    __m512bh v[AT_ONCE];
    for (int r = 0; r < lanes; r++) v[r] = (__m512bh)_mm512_maskz_loadu_epi16(in, x + r * apart + 2 * k);
    for (int l = 0; l < 4; l++) {
        __m512bh w = (__m512bh)_mm512_maskz_loadu_epi16(in, row[l] + 2 * k);
        if (next) FETCH(next[l] + 2 * k);
        for (int r = 0; r < lanes; r++) a[4 * r + l] = _mm512_dpbf16_ps(a[4 * r + l], w, v[r]);
    }
}
#endif

EXACT_BF16 void quads_bf16(const char *const *row, const char *const *next, const char *x, long apart, const int lanes,
                           long K, float *s) {
    long k = 0;
#if defined(BF16_AS_BF16)
    __m512 a[4 * AT_ONCE];
    for (int i = 0; i < 4 * lanes; i++) a[i] = _mm512_setzero_ps();
    for (; k + 32 <= K; k += 32) add_bf16(row, next, x, apart, lanes, k, (__mmask32)-1, a);
    if (k < K) add_bf16(row, next, x, apart, lanes, k, ((__mmask32)1 << (K - k)) - 1, a);
    for (int r = 0; r < lanes; r++) _mm_storeu_ps(s + 4 * r, sums_of_wide_floats(a + 4 * r));
#else
    const uint16_t *w[4];
    for (int l = 0; l < 4; l++) w[l] = (const uint16_t *)row[l];
    const float *X = (const float *)x;
    (void)apart;
    (void)lanes;
#if defined(BF16_AS_PAIRS)
    const __m256i high = _mm256_set1_epi32((int)0xffff0000);
    __m256 a[8];
    for (int l = 0; l < 8; l++) a[l] = _mm256_setzero_ps();
    for (; k + 16 <= K; k += 16) {
        __m256 even = _mm256_loadu_ps(X + k), odd = _mm256_loadu_ps(X + k + 8);
        for (int l = 0; l < 4; l++) {
            __m256i v = _mm256_loadu_si256((const __m256i *)(w[l] + k));
            if (next) FETCH(next[l] + 2 * k);
            a[l] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(v, 16)), even, a[l]);
            a[l + 4] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(v, high)), odd, a[l + 4]);
        }
    }
    for (int l = 0; l < 4; l++) a[l] = _mm256_add_ps(a[l], a[l + 4]);
    __m256 t = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    _mm_storeu_ps(s, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
    for (; k < K; k++) for (int l = 0; l < 4; l++) s[l] = fused(up_bf16(w[l][k]), X[k], s[l]);
#else
    (void)next;
    for (int l = 0; l < 4; l++) {
        float sum = 0;
        #pragma omp simd reduction(+:sum)
        for (long i = k; i < K; i++) sum += up_bf16(w[l][i]) * X[i];
        s[l] = sum;
    }
#endif
#endif
}

#ifdef PICKS
/* 2:4 rows as pack_24 gives them: instead of spreading values over zeros, the x that they meet are picked by their
   places, 64 inputs at once; zeros stand behind x. */
/* a += what n inputs from k on make, 32 at most */
INLINE void add_kept_f32(const char *const *row, const char *const *places, const char *const *next, const char *x,
                         long apart, const int lanes, long k, long n, __m512 *a) {
    const __m512i three = _mm512_set1_epi32(3);
    const __m512i shift = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i base = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    for (int l = 0; l < 4; l++) {
        __m512i codes = _mm512_set1_epi32(*(const int32_t *)(places[l] + k / 8));
        __m512i at = low_bits_or(_mm512_srlv_epi32(codes, shift), three, base);
        __m512 w = n == 32 ? _mm512_loadu_ps(row[l] + 2 * k) : _mm512_maskz_loadu_ps((1u << n / 2) - 1, row[l] + 2 * k);
        if (next) FETCH(next[l] + 2 * k);
        for (int r = 0; r < lanes; r++) {
            const float *X = (const float *)(x + r * apart) + k;
            __m512 v = _mm512_permutex2var_ps(_mm512_loadu_ps(X), at, _mm512_loadu_ps(X + 16));
            a[4 * r + l] = _mm512_fmadd_ps(w, v, a[4 * r + l]);
        }
    }
}

INLINE void quads_kept_f32(const char *const *row, const char *const *places, const char *const *next, const char *x,
                           long apart, const int lanes, long K, float *s) {
    __m512 a[4 * AT_ONCE];
    long k = 0;
    for (int i = 0; i < 4 * lanes; i++) a[i] = _mm512_setzero_ps();
    for (; k + 32 <= K; k += 32) add_kept_f32(row, places, next, x, apart, lanes, k, 32, a);
    if (k < K) add_kept_f32(row, places, next, x, apart, lanes, k, K - k, a);
    for (int r = 0; r < lanes; r++) _mm_storeu_ps(s + 4 * r, sums_of_wide_floats(a + 4 * r));
}

/* a += what n inputs from k on make, 64 at most */
INLINE void add_kept_bf16(const char *const *row, const char *const *places, const char *const *next, const char *x,
                          long apart, const int lanes, long k, long n, __m512 *a) {
    const __m512i shift = steps(0x0606040402020000, 0x0808080808080808);    /* 2 j bits, for value j */
    const __m512i base = steps(0x0004000400000000, 0x0008000800080008);     /* four j / 2 of x */
    const __m512i three = _mm512_set1_epi16(3);
    for (int l = 0; l < 4; l++) {
        __m512i codes = n > 32 ? _mm512_broadcastq_epi64(_mm_loadl_epi64((const __m128i *)(places[l] + k / 8)))
                               : _mm512_set1_epi64(*(const uint32_t *)(places[l] + k / 8));
        __m512i w = n == 64 ? _mm512_loadu_si512(row[l] + k)
                            : _mm512_maskz_loadu_epi16(((__mmask32)1 << n / 2) - 1, row[l] + k);
        if (next) FETCH(next[l] + k);
        __m512i at = low_bits_or(_mm512_multishift_epi64_epi8(shift, codes), three, base);
        for (int r = 0; r < lanes; r++) {
            const char *X = x + r * apart + 2 * k;
            __m512i v = _mm512_permutex2var_epi16(_mm512_loadu_si512(X), at, _mm512_loadu_si512(X + 64));
            a[4 * r + l] = _mm512_dpbf16_ps(a[4 * r + l], (__m512bh)w, (__m512bh)v);
        }
    }
}

INLINE void quads_kept_bf16(const char *const *row, const char *const *places, const char *const *next, const char *x,
                            long apart, const int lanes, long K, float *s) {
    __m512 a[4 * AT_ONCE];
    long k = 0;
    for (int i = 0; i < 4 * lanes; i++) a[i] = _mm512_setzero_ps();
    for (; k + 64 <= K; k += 64) add_kept_bf16(row, places, next, x, apart, lanes, k, 64, a);
    if (k < K) add_kept_bf16(row, places, next, x, apart, lanes, k, K - k, a);
    for (int r = 0; r < lanes; r++) _mm_storeu_ps(s + 4 * r, sums_of_wide_floats(a + 4 * r));
}
#endif

#ifdef WHOLE_AVX2
/* 2:4 rows as kernels/picked.py lays them: of 256 inputs the places first, two bits each, then the weights. A
   register of places is shifted from one 32 bytes of weights to the next. s[l] = row[l] . x of four rows. */
#define EACH_GROUP for (long k = 0, b = 0, end; (end = k + 256 < K ? k + 256 : K), k < K;)
#define PICK(X, Y, m) _mm256_blend_ps(_mm256_permutevar_ps(X, m), _mm256_permutevar_ps(Y, m), 0xcc)

#ifndef PICKS                                    /* there 2:4 floats are KEPT */
static inline void places_of(const char *const *row, const char *const *next, long byte, __m256i *m) {
    for (int l = 0; l < 4; l++) {
        m[l] = load_ints(row[l] + byte);
        if (next) FETCH(next[l] + byte);
    }
}

INLINE void quad_picked_f32(const char *const *row, const char *const *next, const float *x, long K, float *s) {
    __m256 a[4] = { _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps() };
    __m256i m[4];
    EACH_GROUP {
        places_of(row, next, b, m);
        for (b += 32; k < end; k += 16, b += 32) {
            __m256 X = _mm256_loadu_ps(x + k), Y = _mm256_loadu_ps(x + k + 8);
            for (int l = 0; l < 4; l++) {
                if (next) FETCH(next[l] + b);
                a[l] = _mm256_fmadd_ps(_mm256_loadu_ps((const float *)(row[l] + b)), PICK(X, Y, m[l]), a[l]);
                m[l] = _mm256_srli_epi32(m[l], 2);
            }
        }
    }
    _mm_storeu_ps(s, sums_of_floats(a));
}

INLINE void quad_picked_bf16(const char *const *row, const char *const *next, const float *x, long K, float *s) {
    const __m256i high = _mm256_set1_epi32((int)0xffff0000);
    __m256 a[4] = { _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps() };
    __m256i m[4];
    EACH_GROUP {
        places_of(row, next, b, m);
        for (b += 32; k < end; k += 32, b += 32) {
            __m256 X[4];
            for (int i = 0; i < 4; i++) X[i] = _mm256_loadu_ps(x + k + 8 * i);
            for (int l = 0; l < 4; l++) {
                __m256i v = load_ints(row[l] + b);
                if (next) FETCH(next[l] + b);
                a[l] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(v, 16)), PICK(X[0], X[1], m[l]), a[l]);
                m[l] = _mm256_srli_epi32(m[l], 2);
                a[l] = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(v, high)), PICK(X[2], X[3], m[l]), a[l]);
                m[l] = _mm256_srli_epi32(m[l], 2);
            }
        }
    }
    _mm_storeu_ps(s, sums_of_floats(a));
}

#endif

#ifdef WHOLE_VNNI
/* a += what 128 inputs from k on make of weights at byte b, or 64 in the lower half of registers (all: 0); m: their
   places, which are shifted on */
INLINE void add_picked_i8(const char *const *row, const char *const *next, const char *x, long apart, const int lanes,
                          long wide, long k, long b, const int all, __m512i *m, __m512i *a) {
    const __m512i three = _mm512_set1_epi8(3), base = _mm512_set1_epi64(0x0c0c080804040000);
    __m512i X[2 * TWO], Y[2 * TWO];
    for (int r = 0; r < 2 * lanes; r++) {                       /* of each lane two digits */
        const char *v = x + r / 2 * apart + r % 2 * wide + 64 + k;
        X[r] = _mm512_inserti64x4(_mm512_castsi256_si512(load_ints(v)), load_ints(v + 64), 1);
        Y[r] = _mm512_inserti64x4(_mm512_castsi256_si512(load_ints(v + 32)), load_ints(v + 96), 1);
    }
    for (int l = 0; l < 4; l++) {
        __m512i w = all ? _mm512_loadu_si512(row[l] + b) : _mm512_zextsi256_si512(load_ints(row[l] + b));
        __m512i to = low_bits_or(m[l], three, base);
        if (next) FETCH(next[l] + b);
        m[l] = _mm512_srli_epi64(m[l], 4);
        for (int r = 0; r < 2 * lanes; r++) {
            __m512i v = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(X[r], to), 0xff00ff00ff00ff00, Y[r], to);
            a[4 * r + l] = _mm512_dpbusd_epi32(a[4 * r + l], v, w);
        }
    }
}
#endif

INLINE void quads_picked_i8(const struct of_row *of, const long *n, const char *const *row, const char *const *next,
                            const char *x, long apart, const int lanes, long K, float *s) {
    long wide = padded(K);
    int32_t high[4], low[4];
#ifdef WHOLE_VNNI
    const __m512i turns = _mm512_setr_epi64(0, 0, 0, 0, 2, 2, 2, 2);        /* the second 32 bytes are one shift on */
    __m512i a[8 * TWO], m[4];
    for (int i = 0; i < 8 * lanes; i++) a[i] = _mm512_setzero_si512();
    EACH_GROUP {
        for (int l = 0; l < 4; l++) {
            m[l] = _mm512_srlv_epi64(_mm512_broadcast_i64x4(load_ints(row[l] + b)), turns);
            if (next) FETCH(next[l] + b);
        }
        for (b += 32; k + 64 < end; k += 128, b += 64) add_picked_i8(row, next, x, apart, lanes, wide, k, b, 1, m, a);
        if (k < end) add_picked_i8(row, next, x, apart, lanes, wide, k, b, 0, m, a);
        k = end;
    }
    for (int r = 0; r < lanes; r++) {
        _mm_storeu_si128((__m128i *)high, sums_of_wide_ints(a + 8 * r));
        _mm_storeu_si128((__m128i *)low, sums_of_wide_ints(a + 8 * r + 4));
        for (int l = 0; l < 4; l++)
            s[4 * r + l] = of_digits(high[l], low[l], of[n[l]].sum) * (*(const float *)(x + r * apart) * of[n[l]].scale);
    }
#else
    const __m256i three = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
    const __m256i base = _mm256_set1_epi64x(0x0c0c080804040000);
    __m256i a[8], m[4];
    for (int l = 0; l < 8; l++) a[l] = _mm256_setzero_si256();
    (void)apart;
    (void)lanes;
    EACH_GROUP {
        places_of(row, next, b, m);
        for (b += 32; k < end; k += 64, b += 32) {
            __m256i X[2], Y[2];
            for (int d = 0; d < 2; d++) X[d] = load_ints(x + 64 + d * wide + k), Y[d] = load_ints(x + 96 + d * wide + k);
            for (int l = 0; l < 4; l++) {
                __m256i w = load_ints(row[l] + b), to = _mm256_or_si256(_mm256_and_si256(m[l], three), base);
                if (next) FETCH(next[l] + b);
                m[l] = _mm256_srli_epi16(m[l], 2);
                for (int d = 0; d < 2; d++) {
                    __m256i v = _mm256_blend_epi32(_mm256_shuffle_epi8(X[d], to), _mm256_shuffle_epi8(Y[d], to), 0xcc);
                    a[4 * d + l] = _mm256_add_epi32(a[4 * d + l], _mm256_madd_epi16(
                        _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(v, w)), ones));
                }
            }
        }
    }
    _mm_storeu_si128((__m128i *)high, sums_of_ints(a));
    _mm_storeu_si128((__m128i *)low, sums_of_ints(a + 4));
    for (int l = 0; l < 4; l++) s[l] = of_digits(high[l], low[l], 0) * (*(const float *)x * of[n[l]].scale);
#endif
}
#endif

/* s (lanes, 4) = rows n[0..3] of w . x, prepared; next: see quads_i8, or none. kind: w's, where it is known when this
   is compiled; lanes: 1, 2 or 4. */
INLINE void some_lanes(int64_t kind, const struct matrix *w, const long *n, const char *const *row,
                       const char *const *next, const char *x, long apart, const int lanes, float *s) {
    const char *places[4];                       /* of KEPT rows */
    for (int l = 0; l < 4; l++) places[l] = (const char *)w->scale + n[l] * w->scale_stride;
    switch (kind) {
    case IS_F32: quads_f32(row, next, x, apart, lanes, w->width, s); break;
    case IS_BF16: quads_bf16(row, next, x, apart, lanes, w->width, s); break;
    case IS_I8:
        for (int r = 0; r < lanes; r += TWO)
            quads_i8(w->scale, n, row, next, x + r * apart, apart, lanes < TWO ? lanes : TWO, w->width, s + 4 * r);
        break;
    case IS_I4:
        quads_i4(row, next, x, apart, lanes, w->width, s);
        for (int r = 0; r < lanes && w->scale_stride; r++)
            add_offsets(row, w->scale_stride, (const float *)(x + r * apart + SUMS_AT(padded(w->width))),
                        padded(w->width) / 32, s + 4 * r);
        break;
#ifdef WHOLE_AVX2
    case IS_PICKED_I8:
        for (int r = 0; r < lanes; r += TWO)
            quads_picked_i8(w->scale, n, row, next, x + r * apart, apart, lanes < TWO ? lanes : TWO, w->width, s + 4 * r);
        break;
#endif
#if defined(WHOLE_AVX2) && !defined(PICKS)
    case IS_PICKED_F32:
        for (int r = 0; r < lanes; r++)
            quad_picked_f32(row, next, (const float *)(x + r * apart), w->width, s + 4 * r);
        break;
    case IS_PICKED_BF16:
        for (int r = 0; r < lanes; r++)
            quad_picked_bf16(row, next, (const float *)(x + r * apart), w->width, s + 4 * r);
        break;
#endif
#ifdef PICKS
    case IS_KEPT_F32: quads_kept_f32(row, places, next, x, apart, lanes, w->width, s); break;
    case IS_KEPT_BF16: quads_kept_bf16(row, places, next, x, apart, lanes, w->width, s);
#else
    default:                                     /* IS_KEPT_F32, IS_KEPT_BF16 */
        for (int l = 0; l < 4; l++)
            s[l] = kind == IS_KEPT_F32
                ? dot24_f32((const float *)row[l], (const uint32_t *)places[l], (const float *)x, w->width)
                : dot24_bf16((const uint16_t *)row[l], (const uint32_t *)places[l], (const uint16_t *)x, w->width);
#endif
    }
}

/* The same of any number of lanes. soon: rows that will be wanted soon, or none. ahead: rows come from memory, one
   behind the other, and are fetched so many bytes ahead; 0: not. */
INLINE void quads_of(int64_t kind, const struct matrix *w, const long *n, const long *soon, long ahead, const char *x,
                     long apart, long lanes, float *s) {
    const char *row[4], *next[4];
    int fetches = soon || ahead;
    for (int l = 0; l < 4; l++) {
        row[l] = w->data + n[l] * w->stride;
        if (fetches) next[l] = soon ? w->data + soon[l] * w->stride : row[l] + ahead;
    }
#if AT_ONCE == 4
    for (; lanes >= 4; lanes -= 4, x += 4 * apart, s += 16)
        some_lanes(kind, w, n, row, fetches ? next : 0, x, apart, 4, s);
    if (lanes >= 2) {
        some_lanes(kind, w, n, row, fetches ? next : 0, x, apart, 2, s);
        lanes -= 2, x += 2 * apart, s += 8;
    }
#endif
    for (; lanes > 0; lanes--, x += apart, s += 4) some_lanes(kind, w, n, row, fetches ? next : 0, x, apart, 1, s);
}

static void quad(const struct matrix *w, const long *n, const long *soon, const char *x, float *s) {
    if (w->kind == IS_I8 && soon) quads_of(IS_I8, w, n, soon, 0, x, 0, 1, s);
    else if (w->kind == IS_I8) quads_of(IS_I8, w, n, 0, 0, x, 0, 1, s);
    else if (w->kind == IS_I4 && soon) quads_of(IS_I4, w, n, soon, 0, x, 0, 1, s);
    else if (w->kind == IS_I4) quads_of(IS_I4, w, n, 0, 0, x, 0, 1, s);
    else quads_of(w->kind, w, n, soon, 0, x, 0, 1, s);
}

#define AHEAD 1024                               /* bytes */

/* y[n] = row n of w . x, prepared, for rows from..to; of every lane, in x `apart` bytes and in y `across` floats from
   each other. far: they come from memory. Four rows at a time: there a quarter of the part apart, so that each of the
   four goes on and on; twice as fast as four neighbours on 1,536 bytes a row. The last few repeat. */
INLINE void stream_of(int64_t kind, const struct matrix *w, const char *x, long apart, long lanes, long far, float *y,
                      long across, long from, long to) {
    long quarter = (to - from) / 4, steps = quarter + (to - from) % 4;
    for (long i = 0; i < steps; i++) {
        long row[4];
        float s[4 * ROWS];
        for (int l = 0; l < 4; l++) {
            row[l] = i >= quarter ? to - (steps - i) : far ? from + l * quarter + i : from + 4 * i + l;
        }
        if (lanes > 1) quads_of(kind, w, row, 0, AHEAD, x, apart, lanes, s);
        else if (far) quads_of(kind, w, row, 0, AHEAD, x, 0, 1, s);
        else quads_of(kind, w, row, 0, 0, x, 0, 1, s);
        for (long r = 0; r < lanes; r++)
            for (int l = 0; l < 4; l++) y[r * across + row[l]] = s[4 * r + l];
    }
}
static void stream_rows(const struct matrix *w, const char *x, long apart, long lanes, long far, float *y, long across,
                        long from, long to) {
    switch (w->kind) {
    case IS_F32: stream_of(IS_F32, w, x, apart, lanes, far, y, across, from, to); break;
    case IS_BF16: stream_of(IS_BF16, w, x, apart, lanes, far, y, across, from, to); break;
    case IS_I8: stream_of(IS_I8, w, x, apart, lanes, far, y, across, from, to); break;
    case IS_I4: stream_of(IS_I4, w, x, apart, lanes, far, y, across, from, to); break;
    case IS_KEPT_F32: stream_of(IS_KEPT_F32, w, x, apart, lanes, far, y, across, from, to); break;
    case IS_KEPT_BF16: stream_of(IS_KEPT_BF16, w, x, apart, lanes, far, y, across, from, to); break;
#ifndef PICKS
    case IS_PICKED_F32: stream_of(IS_PICKED_F32, w, x, apart, lanes, far, y, across, from, to); break;
    case IS_PICKED_BF16: stream_of(IS_PICKED_BF16, w, x, apart, lanes, far, y, across, from, to); break;
#endif
    case IS_PICKED_I8: stream_of(IS_PICKED_I8, w, x, apart, lanes, far, y, across, from, to);
    }
}

/* row n of w as floats, times `by`, added to sums (width): elements from..to */
static void add_row(const struct matrix *w, long n, float by, float *restrict sums, long from, long to) {
    const char *row = w->data + n * w->stride;
    if (w->kind == IS_F32) {
        const float *v = (const float *)row;
        #pragma omp simd
        for (long c = from; c < to; c++) sums[c] += by * v[c];
    } else if (w->kind == IS_I8) {
        by *= ((const struct of_row *)w->scale)[n].scale;
        #pragma omp simd
        for (long c = from; c < to; c++) sums[c] += by * (int8_t)row[c];
    } else if (w->kind == IS_I4) {
        long c = from, blocks = to / 64 * 64;
        for (; c < to && c % 64; c++) sums[c] += by * whole(w, n, c);
        for (; c < blocks; c += 64) {
            const uint8_t *two = (const uint8_t *)row + c / 2;
            const uint16_t *scale = (const uint16_t *)(row + padded(w->width) / 2) + c / 32;
            float f = by * up_bf16(scale[0]), g = by * up_bf16(scale[1]), u = 0, v = 0, *y = sums + c;
            if (w->scale_stride) {
                const uint16_t *offset = (const uint16_t *)(row + w->scale_stride) + c / 32;
                u = by * up_bf16(offset[0]), v = by * up_bf16(offset[1]);
            }
            #pragma omp simd
            for (long e = 0; e < 32; e++) y[e] += f * ((two[e] & 15) - 8) + u;
            #pragma omp simd
            for (long e = 0; e < 32; e++) y[e + 32] += g * ((two[e] >> 4) - 8) + v;
        }
        for (; c < to; c++) sums[c] += by * whole(w, n, c);
    } else {
        const uint16_t *v = (const uint16_t *)row;
        #pragma omp simd
        for (long c = from; c < to; c++) sums[c] += by * up_bf16(v[c]);
    }
}

#ifdef WHOLE_AVX2
#define TOGETHER 8                               /* rows whose factors are rounded to 16 bits with one scale */
#define FACTOR 32639                             /* the largest: its two bytes have signs, 127 * 256 + 127 */
#else
#define TOGETHER 4
#endif

#ifdef WHOLE_VNNI
/* Sums of TOGETHER rows of whole numbers: bytes of four rows lie beside each other and meet the two bytes of their
   factors, which are signed; what those of the upper bytes make counts 256 times. The columns of sums are in another
   order meanwhile, which add_turned ends. */

/* of m[0..3], whole numbers of 16 bits, the lower bytes beside each other */
static inline __m512i low_bytes(const __m512i *m) {
    const __m512i one = _mm512_set1_epi32(0xff), two = _mm512_set1_epi32(0xffff);
    __m512i x = _mm512_ternarylogic_epi32(one, m[0], _mm512_slli_epi32(m[1], 8), 0xca);     /* one ? m[0] : .. */
    __m512i y = _mm512_ternarylogic_epi32(one, m[2], _mm512_slli_epi32(m[3], 8), 0xca);
    return _mm512_ternarylogic_epi32(two, x, _mm512_slli_epi32(y, 16), 0xca);
}
/* and the upper ones, of numbers whose lower byte has a sign */
static inline __m512i high_bytes(const __m512i *m) {
    const __m512i one = _mm512_set1_epi32(0xff), two = _mm512_set1_epi32(0xffff), up = _mm512_set1_epi32(128);
    __m512i n[4];
    for (int l = 0; l < 4; l++) n[l] = _mm512_add_epi32(m[l], up);
    __m512i x = _mm512_ternarylogic_epi32(one, _mm512_srli_epi32(n[0], 8), n[1], 0xca);
    __m512i y = _mm512_ternarylogic_epi32(one, _mm512_srli_epi32(n[2], 8), n[3], 0xca);
    return _mm512_ternarylogic_epi32(two, x, _mm512_slli_epi32(y, 16), 0xca);
}

/* Factors of TOGETHER rows, b[l] times the row's scale (of a group: I4), as whole numbers -> their scale; 0: they are
   all 0; NaN: one is not finite. factors (4, stride): of rows 0 to 3 the lower bytes and the upper ones, of rows 4 to 7
   too. less (stride): what the offset of the bytes adds, the same in each column. */
static float factors_of(const struct matrix *w, const float *b, const char *const *row, const long *number,
                        int32_t *factors, long stride, int32_t *less) {
    const struct of_row *of = w->scale;
    long wide = padded(w->width), groups = w->kind == IS_I8 ? 1 : wide / 32;
    __m512 most = _mm512_setzero_ps(), wrong = most;
    __m512i m[TOGETHER];
    float own[TOGETHER];
    for (int l = 0; l < TOGETHER && w->kind == IS_I8; l++) own[l] = of[number[l]].scale;
    #define SCALES(l, g) (w->kind == IS_I8 ? _mm512_set1_ps(own[l]) \
                          : wide_scales((const uint16_t *)(row[l] + wide / 2) + (g), groups - (g)))
    for (long g = 0; g < groups; g += 16)
        for (int l = 0; l < TOGETHER; l++) {
            __m512 v = _mm512_mul_ps(SCALES(l, g), _mm512_set1_ps(b[l]));
            most = _mm512_max_ps(most, _mm512_abs_ps(v));
            wrong = _mm512_fmadd_ps(v, _mm512_setzero_ps(), wrong);
        }
    float largest = _mm512_reduce_max_ps(most);
    if (_mm512_cmp_ps_mask(wrong, _mm512_setzero_ps(), _CMP_NEQ_UQ)) return NAN;
    if (largest < 1e-30f) return 0;                             /* FACTOR / largest shall be finite */
    float by = FACTOR / largest;
    for (long g = 0; g < groups; g += 16) {
        __m512i sum = _mm512_setzero_si512();
        for (int l = 0; l < TOGETHER; l++) {
            m[l] = _mm512_cvtps_epi32(_mm512_mul_ps(SCALES(l, g), _mm512_set1_ps(b[l] * by)));
            sum = _mm512_add_epi32(sum, m[l]);
        }
        __mmask16 in = groups - g < 16 ? (1u << (groups - g)) - 1 : 0xffff;
        for (int i = 0; i < 2; i++) {
            _mm512_mask_storeu_epi32(factors + 2 * i * stride + g, in, low_bytes(m + 4 * i));
            _mm512_mask_storeu_epi32(factors + (2 * i + 1) * stride + g, in, high_bytes(m + 4 * i));
        }
        _mm512_mask_storeu_epi32(less + g, in, _mm512_slli_epi32(sum, w->kind == IS_I8 ? 7 : 3));
    }
    return largest / FACTOR;
}

/* to[0..3]: 64 bytes of four rows beside each other, or 32 (all: 0): of 16 columns the first four, and so on */
static inline void beside(const char *const *row, long more, const int all, __m512i *to) {
    __m512i v[4];
    for (int l = 0; l < 4; l++)
        v[l] = all ? _mm512_loadu_si512(row[l] + more) : _mm512_zextsi256_si512(load_ints(row[l] + more));
    __m512i a = _mm512_unpacklo_epi8(v[0], v[1]), b = _mm512_unpackhi_epi8(v[0], v[1]);
    __m512i c = _mm512_unpacklo_epi8(v[2], v[3]), d = _mm512_unpackhi_epi8(v[2], v[3]);
    to[0] = _mm512_unpacklo_epi16(a, c);
    to[1] = _mm512_unpackhi_epi16(a, c);
    to[2] = _mm512_unpacklo_epi16(b, d);
    to[3] = _mm512_unpackhi_epi16(b, d);
}

/* y (64) += (low + 256 high) times scale */
static inline void add_bytes(const __m512i *low, const __m512i *high, __m512 scale, float *y) {
    for (int i = 0; i < 4; i++) {
        __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(low[i], _mm512_slli_epi32(high[i], 8)));
        _mm512_storeu_ps(y + 16 * i, _mm512_fmadd_ps(sum, scale, _mm512_loadu_ps(y + 16 * i)));
    }
}

/* y (64) += bytes `more` on of TOGETHER rows of I8, times their factors */
static inline void add_64_i8(const char *const *row, long more, const int32_t *factors, int32_t less, float scale,
                             float *y) {
    const __m512i offset = _mm512_set1_epi8((char)0x80);
    __m512i low[4], high[4], v[4];
    for (int i = 0; i < 4; i++) low[i] = _mm512_set1_epi32(-less), high[i] = _mm512_setzero_si512();
    for (int l = 0; l < TOGETHER; l += 4) {
        beside(row + l, more, 1, v);
        for (int i = 0; i < 4; i++) {
            __m512i u = _mm512_xor_si512(v[i], offset);
            low[i] = _mm512_dpbusd_epi32(low[i], u, _mm512_set1_epi32(factors[l / 2]));
            high[i] = _mm512_dpbusd_epi32(high[i], u, _mm512_set1_epi32(factors[l / 2 + 1]));
        }
    }
    add_bytes(low, high, _mm512_set1_ps(scale), y);
}

/* y (128) += 128 columns of TOGETHER rows of I4 times their factors, the lower halves of bytes first; or 64 (all: 0).
   Upper halves stay where they are and count 16 times. factors and less: from the columns' first group on. */
static inline void add_128_i4(const char *const *row, long more, const int32_t *factors, long stride,
                              const int32_t *less, float scale, const int all, float *y) {
    const __m512i lower = _mm512_set1_epi8(15), upper = _mm512_set1_epi8((char)0xf0);
    const __m512i first = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(1));
    #define GROUPS(which, from) \
        _mm512_permutexvar_epi32(which, _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(from))))
    __m512i low[8], high[8], v[4];
    for (int i = 0; i < 4; i++) {
        low[i] = _mm512_sub_epi32(_mm512_setzero_si512(), GROUPS(first, less));
        low[i + 4] = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(GROUPS(second, less), 4));
        high[i] = high[i + 4] = _mm512_setzero_si512();
    }
    for (int l = 0; l < TOGETHER; l += 4) {
        const int32_t *f = factors + l / 2 * stride;
        beside(row + l, more, all, v);
        for (int i = 0; i < 4; i++) {
            __m512i p = _mm512_and_si512(v[i], lower), q = _mm512_and_si512(v[i], upper);
            low[i] = _mm512_dpbusd_epi32(low[i], p, GROUPS(first, f));
            high[i] = _mm512_dpbusd_epi32(high[i], p, GROUPS(first, f + stride));
            low[i + 4] = _mm512_dpbusd_epi32(low[i + 4], q, GROUPS(second, f));
            high[i + 4] = _mm512_dpbusd_epi32(high[i + 4], q, GROUPS(second, f + stride));
        }
    }
    add_bytes(low, high, _mm512_set1_ps(scale), y);
    add_bytes(low + 4, high + 4, _mm512_set1_ps(scale / 16), y + 64);
}

/* sums (width) += y (padded, to whole registers) whose columns lie as add_64_i8 and add_128_i4 leave them */
static void add_turned(int64_t kind, const float *y, float *sums, long width) {
    const long far = kind == IS_I8 ? 64 : 128;
    for (long c = 0; c < width; c += far) {
        float some[128];
        for (long h = 0; h < far; h += 64) {
            __m512 q[4], t[4];
            for (int i = 0; i < 4; i++) q[i] = _mm512_loadu_ps(y + c + h + 16 * i);
            t[0] = _mm512_shuffle_f32x4(q[0], q[1], 0x44);
            t[1] = _mm512_shuffle_f32x4(q[2], q[3], 0x44);
            t[2] = _mm512_shuffle_f32x4(q[0], q[1], 0xee);
            t[3] = _mm512_shuffle_f32x4(q[2], q[3], 0xee);
            long to = kind == IS_I8 ? 0 : h / 2, next = kind == IS_I8 ? 32 : 64;
            _mm512_storeu_ps(some + to, _mm512_shuffle_f32x4(t[0], t[1], 0x88));
            _mm512_storeu_ps(some + to + 16, _mm512_shuffle_f32x4(t[0], t[1], 0xdd));
            _mm512_storeu_ps(some + to + next, _mm512_shuffle_f32x4(t[2], t[3], 0x88));
            _mm512_storeu_ps(some + to + next + 16, _mm512_shuffle_f32x4(t[2], t[3], 0xdd));
        }
        for (long i = 0; i < far && c + i < width; i++) sums[c + i] += some[i];
    }
}

#elif defined(WHOLE_AVX2)
/* a[0..3] += 32 pairs of bytes (m: of one row, n: of the next) times the pair of factors: of columns 0 to 3 and
   16 to 19, then 4 to 7 and 20 to 23, and so on */
static inline void add_pair(__m256i m, __m256i n, __m256i factors, __m256i *a) {
    const __m256i zero = _mm256_setzero_si256();
    __m256i low = _mm256_unpacklo_epi8(m, n), high = _mm256_unpackhi_epi8(m, n);
    a[0] = _mm256_add_epi32(a[0], _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), factors));
    a[1] = _mm256_add_epi32(a[1], _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), factors));
    a[2] = _mm256_add_epi32(a[2], _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), factors));
    a[3] = _mm256_add_epi32(a[3], _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), factors));
}

/* y (32) += a as add_pair has left it, times scale */
static inline void add_sums(const __m256i *a, __m256 scale, float *y) {
    for (int i = 0; i < 4; i++) {
        __m256i of = i < 2 ? _mm256_permute2x128_si256(a[2 * i], a[2 * i + 1], 0x20)
                           : _mm256_permute2x128_si256(a[2 * i - 4], a[2 * i - 3], 0x31);
        _mm256_storeu_ps(y + 8 * i, _mm256_fmadd_ps(_mm256_cvtepi32_ps(of), scale, _mm256_loadu_ps(y + 8 * i)));
    }
}

/* scales of up to 8 groups, zeros behind the last */
static inline __m256 eight_scales(const uint16_t *p, long n) {
    uint16_t few[8] = {0};
    if (n < 8) memcpy(few, p, n * sizeof *p);
    __m256i v = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(n < 8 ? few : p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
}

/* Factors of TOGETHER rows, b[l] times the row's scale (of a group: I4), as whole numbers of 16 bits: pairs of
   them in factors (4, stride) -> their scale; 0: they are all 0; NaN: one is not finite. less (groups): what
   the offset of the bytes has added, the same in each column. */
static float factors_of(const struct matrix *w, const float *b, const char *const *row, const long *number,
                        int32_t *factors, long stride, int32_t *less) {
    const struct of_row *of = w->scale;
    long wide = padded(w->width), groups = wide / 32;
    const uint16_t *scales[TOGETHER];
    float most = 0, wrong = 0, each[TOGETHER];
    for (int l = 0; l < TOGETHER; l++) {
        scales[l] = (const uint16_t *)(row[l] + wide / 2);
        each[l] = w->kind == IS_I8 ? b[l] * of[number[l]].scale : b[l];
        wrong += each[l] * 0;
        float size = fabsf(each[l]);
        if (w->kind == IS_I8) most = size > most ? size : most;
    }
    if (w->kind == IS_I4) {
        __m256 largest = _mm256_setzero_ps(), nothing = largest, zero = largest;
        for (long g = 0; g < groups; g += 8)
            for (int l = 0; l < TOGETHER; l++) {
                __m256 v = _mm256_mul_ps(eight_scales(scales[l] + g, groups - g), _mm256_set1_ps(each[l]));
                largest = _mm256_max_ps(largest, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v));
                nothing = _mm256_fmadd_ps(v, zero, nothing);
            }
        float some[8], none[8];
        _mm256_storeu_ps(some, largest);
        _mm256_storeu_ps(none, nothing);
        for (int i = 0; i < 8; i++) {
            most = some[i] > most ? some[i] : most;
            wrong += none[i];
        }
    }
    if (wrong != 0) return NAN;
    if (most < 1e-30f) return 0;                                /* FACTOR / most shall be finite */
    float by = FACTOR / most;
    for (int l = 0; l < TOGETHER; l++) each[l] *= by;
    if (w->kind == IS_I8) {
        less[0] = 0;
        for (int l = 0; l < TOGETHER; l += 2) {
            int32_t m = (int32_t)rintf(each[l]), n = (int32_t)rintf(each[l + 1]);
            factors[l / 2 * stride] = (int32_t)((uint32_t)m & 0xffff) | (int32_t)((uint32_t)n << 16);
            less[0] += 128 * (m + n);
        }
        return most / FACTOR;
    }
    for (long g = 0; g < groups; g += 8) {
        __m256i sum = _mm256_setzero_si256(), lower = _mm256_set1_epi32(0xffff);
        for (int l = 0; l < TOGETHER; l += 2) {
            __m256i m = _mm256_cvtps_epi32(_mm256_mul_ps(eight_scales(scales[l] + g, groups - g),
                                                         _mm256_set1_ps(each[l])));
            __m256i n = _mm256_cvtps_epi32(_mm256_mul_ps(eight_scales(scales[l + 1] + g, groups - g),
                                                         _mm256_set1_ps(each[l + 1])));
            sum = _mm256_add_epi32(sum, _mm256_add_epi32(m, n));
            _mm256_storeu_si256((__m256i *)(factors + l / 2 * stride + g),
                                _mm256_or_si256(_mm256_and_si256(m, lower), _mm256_slli_epi32(n, 16)));
        }
        _mm256_storeu_si256((__m256i *)(less + g), _mm256_slli_epi32(sum, 3));
    }
    return most / FACTOR;
}

/* y (32) += 32 columns of TOGETHER rows, times their factors (4, stride); more: the bytes of a row ahead of theirs;
   high: they are the high halves of those bytes */
INLINE void add_32_columns(int64_t kind, int high, const char *const *row, long more, const int32_t *factors,
                           long stride, int32_t less, float scale, float *y) {
    const __m256i offset = _mm256_set1_epi8((char)0x80), low = _mm256_set1_epi8(15);
    __m256i a[4];
    for (int i = 0; i < 4; i++) a[i] = _mm256_set1_epi32(-less);
    for (int l = 0; l < TOGETHER; l += 2) {
        __m256i m = load_ints(row[l] + more), n = load_ints(row[l + 1] + more);
        if (high) m = _mm256_srli_epi16(m, 4), n = _mm256_srli_epi16(n, 4);
        m = kind == IS_I8 ? _mm256_xor_si256(m, offset) : _mm256_and_si256(m, low);
        n = kind == IS_I8 ? _mm256_xor_si256(n, offset) : _mm256_and_si256(n, low);
        add_pair(m, n, _mm256_set1_epi32(factors[l / 2 * stride]), a);
    }
    add_sums(a, _mm256_set1_ps(scale), y);
}
#endif

/* sums (width) += by[live[i]] * row rows[live[i]] of w for each of n live units. TOGETHER rows at a time, and
   the next ones are fetched. room: 5 * (padded(width) / 32 + 7) + padded(width) + 80 whole numbers. */
static void add_whole_rows(const struct matrix *w, const float *by, const long *rows, const int *live, long n,
                           float *restrict sums, int32_t *room) {
#ifdef WHOLE_AVX2
    long wide = padded(w->width), stride = w->kind == IS_I4 ? (wide / 32 + 7) / 8 * 8 : 1;
    int32_t *less = room + TOGETHER / 2 * stride;
#endif
#ifdef WHOLE_VNNI
    float *turned = (float *)(less + stride);
    memset(turned, 0, (wide + 64) * sizeof(float));
#endif
    for (long i = 0; i < n; i += TOGETHER) {
        const char *row[TOGETHER], *next[TOGETHER];
        float b[TOGETHER];
        long number[TOGETHER];
        for (long l = 0; l < TOGETHER; l++) {
            long j = live[i + l < n ? i + l : n - 1], k = live[i + l + TOGETHER < n ? i + l + TOGETHER : n - 1];
            number[l] = rows ? rows[j] : j;
            row[l] = w->data + number[l] * w->stride;
            next[l] = w->data + (rows ? rows[k] : k) * w->stride;
            b[l] = i + l < n ? by[j] : 0;                        /* behind the last one: it once more, times 0 */
        }
#ifdef WHOLE_AVX2
        float scale = factors_of(w, b, row, number, room, stride, less);
        if (scale == 0) continue;
#endif
#if defined(WHOLE_VNNI)
        if (scale == scale && w->kind == IS_I8) {
            for (long c = 0; c < wide; c += 64) {
                for (int l = 0; l < TOGETHER; l++) FETCH(next[l] + c);
                add_64_i8(row, c, room, *less, scale, turned + c);
            }
            continue;
        }
        if (scale == scale) {
            for (long c = 0; c < wide; c += 128) {
                for (long l = TOGETHER * c / wide; l < TOGETHER * (c + 128) / wide && l < TOGETHER; l++)
                    fetch(next[l], w->stride);          /* row by row: short ones come sooner than line by line */
                if (c + 128 <= wide) add_128_i4(row, c / 2, room + c / 32, stride, less + c / 32, scale, 1, turned + c);
                else add_128_i4(row, c / 2, room + c / 32, stride, less + c / 32, scale, 0, turned + c);
            }
            continue;
        }
#elif defined(WHOLE_AVX2)
        if (scale == scale) {
            for (long c = 0; c < w->width; c += 64) {
                float some[64], *y = c + 64 <= w->width ? sums + c : some;
                for (int l = 0; l < TOGETHER; l++) FETCH(next[l] + (w->kind == IS_I8 ? c : c / 2));
                if (y == some) memcpy(some, sums + c, (w->width - c) * sizeof(float));
                if (w->kind == IS_I8) {
                    add_32_columns(IS_I8, 0, row, c, room, 1, *less, scale, y);
                    add_32_columns(IS_I8, 0, row, c + 32, room, 1, *less, scale, y + 32);
                } else {
                    long g = c / 32;
                    add_32_columns(IS_I4, 0, row, c / 2, room + g, stride, less[g], scale, y);
                    add_32_columns(IS_I4, 1, row, c / 2, room + g + 1, stride, less[g + 1], scale, y + 32);
                }
                if (y == some) memcpy(sums + c, some, (w->width - c) * sizeof(float));
            }
            continue;
        }
#else
        (void)row;
        (void)next;
        (void)room;
#endif
        for (long l = 0; l < TOGETHER; l++) if (i + l < n) add_row(w, number[l], b[l], sums, 0, w->width);
    }
#ifdef WHOLE_VNNI
    add_turned(w->kind, turned, sums, w->width);
#endif
}

#ifdef __AVX512F__
/* to: `first` plus the places of the bits of `kept`, 16 numbers in all, of which those behind mean nothing
   -> how many mean something */
static inline long put_places(int32_t *to, long first, __mmask16 kept) {
    const __m512i places = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(kept, _mm512_add_epi32(places, _mm512_set1_epi32(first))));
    return __builtin_popcount(kept);
}
#endif

/* ------------------------------------------------ ops ---------------------------------------------------- */

/* x = table[id] (+ positions[column]) (+ rows of hashed n-grams), rounded. w: the token table; p[0], p[1]:
   floats of positions and n-grams, or bf16 (n[0]); n[1]: buckets, n[2]: order. out is shared. */
static inline float element(const void *table, int64_t half, long i) {
    return half ? up_bf16(((const uint16_t *)table)[i]) : ((const float *)table)[i];
}
static void op_embed(const struct op *o, struct thread *me) {
    const struct program *p = me->program;
    long C = o->w.width, from, to;
    part(me, o->out, C, 16, &from, &to);
    for (long r = 0; r < p->rows; r++) {
        const int64_t *ids = p->ids[r];
        long column = p->columns[r];
        float *y = at(me, o->out) + r * C;
        for (long c = from; c < to; c++) y[c] = 0;
        add_row(&o->w, ids[column], 1, y, from, to);
        round_all(me, y + from, to - from);                     /* whole numbers times their scale */
        if (o->n[1]) {
            uint64_t key = (uint64_t)(ids[column] + 1) * 1000003;
            float *sums = (float *)me->scratch;
            for (long c = from; c < to; c++) sums[c] = 0;
            for (long n = 0; n + 1 < o->n[2]; n++) {
                int64_t before = column - n - 1 < 0 ? -1 : ids[column - n - 1];
                key = key * 31 + (uint64_t)(before + 1) * 10007 + n;
                int64_t row = (int64_t)key % o->n[1];
                row += row < 0 ? o->n[1] : 0;
                for (long c = from; c < to; c++) sums[c] += element(o->p[1], o->n[0], row * C + c);
            }
            if (o->n[0]) for (long c = from; c < to; c++) sums[c] = rounded(sums[c]);
            for (long c = from; c < to; c++) y[c] += sums[c];
            if (o->n[0]) for (long c = from; c < to; c++) y[c] = rounded(y[c]);
        }
        if (o->p[0]) for (long c = from; c < to; c++) y[c] += element(o->p[0], o->n[0], column * C + c);
        round_all(me, y + from, to - from);
    }
}

/* out = in normalised: by mean and deviation, times p[0], plus p[1] (n[1]: 0), or by root mean square, times
   p[0] (n[1]: 1). n[0] elements, f[0] epsilon. */
static void op_norm(const struct op *o, struct thread *me) {
    long n = o->n[0], from, to;
    const float *gain = o->p[0], *bias = o->p[1];
    part(me, o->out, me->program->rows, 1, &from, &to);
    for (long r = from; r < to; r++) {
        const float *restrict x = at(me, o->in) + r * n;
        float *restrict y = at(me, o->out) + r * n, sum = 0, square = 0;
        if (!o->n[1]) {
            #pragma omp simd reduction(+:sum)
            for (long i = 0; i < n; i++) sum += x[i];
        }
        float mean = sum / n;
        #pragma omp simd reduction(+:square)
        for (long i = 0; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
        float by = 1 / sqrtf(square / n + (float)o->f[0]);
        if (bias) {
            #pragma omp simd
            for (long i = 0; i < n; i++) y[i] = (x[i] - mean) * by * gain[i] + bias[i];
        } else if (gain) {
            #pragma omp simd
            for (long i = 0; i < n; i++) y[i] = (x[i] - mean) * by * gain[i];
        } else {
            #pragma omp simd
            for (long i = 0; i < n; i++) y[i] = (x[i] - mean) * by;
        }
        round_all(me, y, n);
    }
}

/* A list names rows of a matrix: int32, how many and which; `by` holds a factor for each. */
static inline const int32_t *list_of(const struct op *o, const struct thread *me, long r, long n) {
    return (const int32_t *)(at(me, o->list) + r * (n + 1));
}

/* a product with its bias; n[3]: a prompt stores the product before the bias is added */
static inline float epilogue(const struct op *o, const struct thread *me, float v, long unit) {
    v = o->n[3] && me->program->rounds ? rounded(v) : v;
    return v + (o->w.bias ? o->w.bias[unit] : 0);
}

/* The units that lanes' lists (rising) name together, each once -> how many; place: where each stands in the
   list of every lane, or -1 */
static long unite(const struct op *o, const struct thread *me, long most, int32_t *units, int32_t (*place)[ROWS]) {
    long rows = me->program->rows, count = 0, at[ROWS] = { 0 };
    for (;; count++) {
        int32_t least = INT32_MAX;
        for (long r = 0; r < rows; r++) {
            const int32_t *list = list_of(o, me, r, most);
            if (at[r] < list[0] && list[1 + at[r]] < least) least = list[1 + at[r]];
        }
        if (least == INT32_MAX) return count;
        units[count] = least;
        for (long r = 0; r < rows; r++) {
            const int32_t *list = list_of(o, me, r, most);
            place[count][r] = at[r] < list[0] && list[1 + at[r]] == least ? at[r]++ : -1;
        }
    }
}

/* how many units of lane r's list (n) stand before number i of the `count` units of all lanes */
static long ahead(const int32_t (*place)[ROWS], long i, long count, long r, long n) {
    while (i < count && place[i][r] < 0) i++;
    return i < count ? place[i][r] : n;
}

/* y = act(w . x + bias) (* by) (+ onto): all rows of w, or those of a list. n[0]: the most that a list holds;
   n[1], n[2]: rows of w in blocks of n[1] read a part of x each, n[2] wide (0: all of x). A row of w that
   several lanes want is read for all of them. */
static void op_linear(struct op *o, struct thread *me) {
    const struct program *p = me->program;
    const struct matrix *w = &o->w;
    long K = w->width, wide = o->n[2] ? o->n[2] : K, size = room_of(K), most = o->list < 0 ? w->rows : o->n[0];
    long parts = o->n[1] ? wide / K : 1, n = w->rows, from, to;
    float *room = (float *)(me->scratch + p->rows * parts * size);      /* onto is where the sum goes */
    int32_t (*place)[ROWS] = 0, *list = 0;
    for (long r = 0; r < p->rows; r++)
        for (long b = 0; b < parts; b++)
            prepare(w->kind, at(me, o->in) + r * wide + b * K, K, me->scratch + (r * parts + b) * size);
    if (o->list >= 0 && p->rows == 1) {
        list = (int32_t *)list_of(o, me, 0, most);
        n = *list++;
    } else if (o->list >= 0) {
        place = (int32_t (*)[ROWS])(room + p->rows * most);
        list = (int32_t *)(place + (p->rows * most < w->rows ? p->rows * most : w->rows));
        n = unite(o, me, most, list, place);
    }
    part(me, o->out, n, 4, &from, &to);
    int plain = !list && !o->n[1];
    if (plain) {
        float *y = o->onto < 0 ? at(me, o->out) : room;
        stream_rows(w, me->scratch, size, p->rows, p->far, y, most, from, to);
        for (long r = 0; r < p->rows; r++)
            for (long n = from; n < to; n++) y[r * most + n] = epilogue(o, me, y[r * most + n], n);
    }
    /* four rows at a time, as in stream_of */
    long quarter = (to - from) / 4, steps = plain ? 0 : quarter + (to - from) % 4;
    if (o->n[1]) steps = (to - from + 3) / 4;                   /* neighbours, which meet the same part of x */
    for (long i = 0; i < steps; i++) {
        long unit[4], row[4], soon[4];
        for (int l = 0; l < 4; l++) {
            unit[l] = i < quarter ? from + l * quarter + i : to - (steps - i);
            if (o->n[1]) unit[l] = from + 4 * i + l < to ? from + 4 * i + l : to - 1;
            row[l] = list ? list[unit[l]] : unit[l];
            if (list) soon[l] = list[unit[l] + 2 < n ? unit[l] + 2 : n - 1];
        }
        const char *x = me->scratch;
        for (long r = 0; r < p->rows; r++) {
            float s[4], *y = (o->onto < 0 ? at(me, o->out) : room) + r * most;
            if (place && place[unit[0]][r] < 0 && place[unit[1]][r] < 0 && place[unit[2]][r] < 0
                && place[unit[3]][r] < 0) continue;
            if (!o->n[1]) quad(w, row, list ? soon : 0, x + r * size, s);
            else if (row[0] / o->n[1] == row[3] / o->n[1])
                quad(w, row, 0, x + (r * parts + row[0] / o->n[1]) * size, s);
            else for (int l = 0; l < 4; l++) {
                long one[4] = { row[l], row[l], row[l], row[l] };
                float t[4];
                quad(w, one, 0, x + (r * parts + row[l] / o->n[1]) * size, t);
                s[l] = t[0];
            }
            for (int l = 0; l < 4; l++) {
                long to = place ? place[unit[l]][r] : unit[l];
                if (to >= 0) y[to] = epilogue(o, me, s[l], row[l]);
            }
        }
    }
    if (list && me->number == 0) o->read += n;
    for (long r = 0, first = from, last = to; r < p->rows; r++) {
        float *y = (o->onto < 0 ? at(me, o->out) : room) + r * most;
        const int32_t *mine = o->list < 0 ? 0 : list_of(o, me, r, most) + 1;
        if (mine && me->number == 0) o->used += mine[-1];
        if (place) {
            from = ahead((const int32_t (*)[ROWS])place, first, n, r, mine[-1]);
            to = ahead((const int32_t (*)[ROWS])place, last, n, r, mine[-1]);
        }
        if (o->act == OSC && mine) {
            const float *W = o->p[0], *phi = o->p[1], *b = o->p[2];
            round_all(me, y + from, to - from);
            for (long i = from; i < to; i++) {
                float z = W[mine[i]] * y[i] + phi[mine[i]];
                y[i] = (fabsf(z) < FAR ? sine(z) : sinf(z)) * tanh_of(y[i]) + b[mine[i]];
            }
        } else if (o->act != NONE) {
            round_all(me, y + from, to - from);
            act_all(o, y, from, to);
        }
        round_all(me, y + from, to - from);
        if (o->by >= 0) {
            const float *by = at(me, o->by) + r * o->n[0];
            for (long i = from; i < to; i++) y[i] = by[i] == 0 ? 0 : y[i] * by[i];
            round_all(me, y + from, to - from);
        }
        if (o->onto >= 0) {
            const float *onto = at(me, o->onto) + r * most;
            float *sum = at(me, o->out) + r * most;
            for (long i = from; i < to; i++) sum[i] = y[i] + onto[i];
            round_all(me, sum + from, to - from);
        }
    }
}

/* y = sum of the rows of w of units whose x is not zero, times x, plus bias, plus onto. x is the units of a
   list (n[0]: the most it holds) or all of them. Whole rows are summed in up to SUMS parts, each into its
   place of `by`, whatever the threads are, so that a result does not depend on them; then they meet, and each
   adds up some columns of all parts. Four rows at a time, a quarter of the part apart, as in op_linear.
   n[1]: so many units of a list in turn are a product of their own, which a prompt stores before it adds them
   up and then adds the bias; 0: all are one. n[2]: the most parts. Lanes take the same part one behind the
   other: a row that several want comes from memory once, and each lane adds in the order of its own units. */
#define SUMS 16
/* is it not 0? Without a branch, which units would make the processor guess wrong at every other time. */
static inline long some(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return bits << 1 != 0;
}
/* to: which of n x are not 0, rising; it has room for `room` places, all of which may be written */
static long not_zero(const float *x, long n, long room, int32_t *to) {
    long count = 0, i = 0;
#ifdef __AVX512F__
    for (; i + 16 <= n && count + 16 <= room; i += 16)
        count += put_places(to + count, i, _mm512_test_epi32_mask(_mm512_loadu_si512(x + i),
                                                                  _mm512_set1_epi32(0x7fffffff)));
#endif
    (void)room;
    for (; i < n; i++) {
        to[count] = i;
        count += some(x[i]);
    }
    return count;
}
static inline long sums_of(long rows) { return rows < 16 * SUMS ? (rows + 15) / 16 : SUMS; }
static void add_rows(const struct matrix *w, float *sums, const float *by, const long *rows, const int *live,
                     long n, int32_t *room) {
    if (w->kind == IS_F32)
        add_rows_f32(sums, by, (const float *)w->data, rows, live, n, w->stride / 4, 0, w->width);
    else if (w->kind == IS_I8 || w->kind == IS_I4) add_whole_rows(w, by, rows, live, n, sums, room);
    else
        add_rows_bf16(sums, by, (const uint16_t *)w->data, rows, live, n, w->stride / 2, 0, w->width);
}
static void op_rows_sum(struct op *o, struct thread *me) {
    const struct program *p = me->program;
    const struct matrix *w = &o->w;
    long C = w->width, from, to, most = o->list < 0 ? w->rows : o->n[0];
    long apart = o->n[1] && p->rounds, room = (most + 7) / 8 * 8, last = 0, q = INT32_MAX, all = o->all != 0;
    long lives[ROWS], counts[ROWS], begin[ROWS], end[ROWS];
    long *rows = (long *)me->scratch;                           /* of each lane; then its live units */
    int *live = (int *)(rows + p->rows * room), *order = live + p->rows * room;
    for (long r = 0; r < p->rows; r++) {
        const int32_t *list = o->list < 0 ? 0 : list_of(o, me, r, most);
        long n = list ? *list++ : w->rows, count = 0;
        const float *x = at(me, o->in) + r * most;
        if (all) for (; count < n; count++) live[r * room + count] = count;
        else count = not_zero(x, n, room, live + r * room);
        if (list) for (long i = 0; i < n; i++) rows[r * room + i] = list[i];
        lives[r] = count;
        counts[r] = apart ? n / o->n[1] : sums_of(count);
        part(me, o->out, counts[r], 1, &begin[r], &end[r]);
        q = begin[r] < q ? begin[r] : q;
        last = end[r] > last ? end[r] : last;
    }
    for (; q < last; q++)
        for (long r = 0; r < p->rows; r++) {
            if (q < begin[r] || q >= end[r]) continue;
            const int *mine = live + r * room;
            long count = lives[r], start = count * q / counts[r], n = count * (q + 1) / counts[r] - start;
            if (apart) {
                for (start = 0; start < count && mine[start] < q * o->n[1];) start++;
                for (n = 0; start + n < count && mine[start + n] < (q + 1) * o->n[1];) n++;
            }
            long quarter = n / 4;
            float *sums = at(me, o->by) + (r * o->n[2] + q) * C;
            for (long i = 0; i < quarter; i++)
                for (long l = 0; l < 4; l++) order[4 * i + l] = mine[start + l * quarter + i];
            for (long i = 4 * quarter; i < n; i++) order[i] = mine[start + i];
            memset(sums, 0, C * sizeof(float));
            add_rows(w, sums, at(me, o->in) + r * most, o->list < 0 ? 0 : rows + r * room, order, n,
                     order + room);
            for (long c = 0; c < C && apart && w->across; c++) sums[c] *= w->across[c];
            if (apart) round_all(me, sums, C);
        }
    if (me->number == 0) {
        char *seen = (char *)(order + room);
        if (p->rows > 1) memset(seen, 0, w->rows);
        for (long r = 0; r < p->rows; r++) {
            o->used += lives[r];
            if (p->rows == 1) o->read += lives[r];
            else for (long i = 0; i < lives[r]; i++) {
                long j = live[r * room + i], unit = o->list < 0 ? j : rows[r * room + j];
                o->read += !seen[unit];
                seen[unit] = 1;
            }
        }
    }
    meet(me);
    part(me, o->out, C, 16, &from, &to);
    for (long r = 0; r < p->rows; r++) {
        float *y = at(me, o->out) + r * C, *sums = (float *)me->scratch;
        const float *onto = o->onto < 0 ? 0 : at(me, o->onto) + r * C;
        for (long c = from; c < to; c++) sums[c] = w->bias && !apart && !w->across ? w->bias[c] : 0;
        for (long q = 0; q < counts[r]; q++) {
            const float *some = at(me, o->by) + (r * o->n[2] + q) * C;
            for (long c = from; c < to; c++) sums[c] += some[c];
        }
        if (w->across && !apart)
            for (long c = from; c < to; c++) sums[c] = sums[c] * w->across[c] + (w->bias ? w->bias[c] : 0);
        if (apart) {
            round_all(me, sums + from, to - from);
            for (long c = from; c < to && w->bias; c++) sums[c] += w->bias[c];
        }
        round_all(me, sums + from, to - from);
        for (long c = from; c < to; c++) y[c] = onto ? sums[c] + onto[c] : sums[c];
        round_all(me, y + from, to - from);
    }
}

/* out = in with all but the n[1] largest |x| of n[0] at zero */
static void op_largest(const struct op *o, struct thread *me) {
    long n = o->n[0], from, to;
    part(me, o->out, me->program->rows, 1, &from, &to);
    for (long r = from; r < to; r++) {
        const float *x = at(me, o->in) + r * n;
        float *y = at(me, o->out) + r * n;
        uint32_t *size = (uint32_t *)me->scratch;
        for (long i = 0; i < n; i++) size[i] = order(fabsf(y[i] = x[i]));
        keep_floats(y, size, n, o->n[1]);
    }
}

/* out = in with all but the n[2] largest |x| of every n[1] neighbours at zero */
static void op_group_winners(const struct op *o, struct thread *me) {
    long n = o->n[0], g = o->n[1], from, to;
    part(me, o->out, me->program->rows * (n / g), 1, &from, &to);
    for (long j = from; j < to; j++) {
        const float *x = at(me, o->in) + j * g;
        float *y = at(me, o->out) + j * g;
        for (long i = 0; i < g; i++) {
            uint32_t mine = order(fabsf(x[i]));
            long before = 0;
            for (long k = 0; k < g; k++) {
                uint32_t other = order(fabsf(x[k]));
                before += other > mine || (other == mine && k < i);
            }
            y[i] = before < o->n[2] ? x[i] : 0;
        }
    }
}

/* out = in where |x| exceeds its unit's threshold p[0], else 0: x * 0, so that NaN and infinity show. The
   units of a list, or all n[0] of them. */
static void op_event(const struct op *o, struct thread *me) {
    long most = o->n[0], from, to;
    const float *edge = o->p[0];
    for (long r = 0; r < me->program->rows; r++) {
        const int32_t *list = o->list < 0 ? 0 : list_of(o, me, r, most);
        long n = list ? *list++ : most;
        const float *x = at(me, o->in) + r * most;
        float *y = at(me, o->out) + r * most;
        part(me, o->out, n, 16, &from, &to);
        for (long i = from; i < to; i++) y[i] = x[i] * (fabsf(x[i]) > edge[list ? list[i] : i] ? 1.0f : 0.0f);
    }
}

/* out (n[0]) = silu(gate) * up of in (2 n[0]) */
static void op_swiglu(const struct op *o, struct thread *me) {
    long n = o->n[0], from, to;
    part(me, o->out, n, 16, &from, &to);
    for (long r = 0; r < me->program->rows; r++) {
        const float *restrict gate = at(me, o->in) + r * 2 * n, *restrict up = gate + n;
        float *restrict y = at(me, o->out) + r * n;
        if (me->program->rounds) {
            #pragma omp simd
            for (long i = from; i < to; i++) y[i] = rounded(rounded(gate[i] * sigmoid(gate[i])) * up[i]);
        } else {
            #pragma omp simd
            for (long i = from; i < to; i++) y[i] = gate[i] * sigmoid(gate[i]) * up[i];
        }
    }
}

/* out = in + onto, n[0] elements */
static void op_add(const struct op *o, struct thread *me) {
    long n = me->program->rows * o->n[0], from, to;
    part(me, o->out, n, 16, &from, &to);
    const float *x = at(me, o->in), *onto = at(me, o->onto);
    float *y = at(me, o->out);
    for (long i = from; i < to; i++) y[i] = x[i] + onto[i];
    round_all(me, y + from, to - from);
}

/* x (D) as attention sees it: by its root mean square where eps >= 0, turned by cos and sin, times gain */
static void turned(const struct thread *me, const float *x, float *y, long D, float eps, const float *cos,
                   const float *sin, float gain) {
    float square = 0, *t = (float *)me->scratch;
    for (long d = 0; d < D; d++) square += x[d] * x[d];
    float by = eps < 0 ? 1 : 1 / sqrtf(square / D + eps);
    for (long d = 0; d < D; d++) t[d] = x[d] * by;
    round_all(me, t, D);
    if (cos && me->program->rounds)
        for (long d = 0; d < D; d++)
            y[d] = rounded(rounded(t[d] * cos[d]) + t[d < D / 2 ? d + D / 2 : d - D / 2] * sin[d]);
    else if (cos)
        for (long d = 0; d < D; d++) y[d] = t[d] * cos[d] + t[d < D / 2 ? d + D / 2 : d - D / 2] * sin[d];
    else memcpy(y, t, D * sizeof(float));
    for (long d = 0; d < D; d++) y[d] *= gain;
    round_all(me, y, D);
}

#ifdef WHOLE_AVX2
#define MOST_PAIRS 256                           /* elements of a head */

static inline __m256 evens(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
static inline __m256 odds(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000)));
}

/* y (16 * blocks) = the sum of columns v (S, D) times score, of those elements; divided by total */
INLINE void add_columns(const uint16_t *v, const float *score, float total, float *y, long S, long D, const int blocks) {
    __m256 a[8];
    for (int b = 0; b < 2 * blocks; b++) a[b] = _mm256_setzero_ps();
    for (long j = 0; j < S; j++, v += D) {
        __m256 by = _mm256_broadcast_ss(score + j);
        for (int b = 0; b < blocks; b++) {
            __m256i pairs = load_ints(v + 16 * b);
            a[2 * b] = _mm256_fmadd_ps(by, evens(pairs), a[2 * b]);
            a[2 * b + 1] = _mm256_fmadd_ps(by, odds(pairs), a[2 * b + 1]);
        }
    }
    __m256 all = _mm256_set1_ps(total);
    for (int b = 0; b < blocks; b++) {
        __m256 low = _mm256_unpacklo_ps(a[2 * b], a[2 * b + 1]), high = _mm256_unpackhi_ps(a[2 * b], a[2 * b + 1]);
        _mm256_storeu_ps(y + 16 * b, _mm256_div_ps(_mm256_permute2f128_ps(low, high, 0x20), all));
        _mm256_storeu_ps(y + 16 * b + 8, _mm256_div_ps(_mm256_permute2f128_ps(low, high, 0x31), all));
    }
}

/* As look_bf16, of heads whose elements fill registers */
static void look_pairs(const float *q, const uint16_t *K, const uint16_t *V, float *y, float *score, long S, long D) {
    float scale = 1.0f / sqrtf((float)D), top = -INFINITY, total = 0, pairs[MOST_PAIRS];
    for (long d = 0; d < D; d += 16)
        for (long i = 0; i < 8; i++) {
            pairs[d + i] = scale * q[d + 2 * i];
            pairs[d + 8 + i] = scale * q[d + 2 * i + 1];
        }
    /* four columns a quarter of all apart, as in op_linear; the last few repeat. Values are fetched meanwhile. */
    long quarter = S / 4, steps = quarter + S % 4;
    for (long i = 0; i < steps; i++) {
        const uint16_t *k[4];
        long column[4];
        __m256 a[4];
        float s[4];
        for (long l = 0; l < 4; l++) {
            column[l] = i < quarter ? l * quarter + i : S - (steps - i);
            k[l] = K + column[l] * D;
            a[l] = _mm256_setzero_ps();
            fetch(k[l] + LOOK / 2 * D, 2 * D);
            fetch(V + column[l] * D, 2 * D);
        }
        for (long d = 0; d < D; d += 16) {
            __m256 even = _mm256_loadu_ps(pairs + d), odd = _mm256_loadu_ps(pairs + d + 8);
            for (long l = 0; l < 4; l++) {
                __m256i some = load_ints(k[l] + d);
                a[l] = _mm256_fmadd_ps(even, evens(some), a[l]);
                a[l] = _mm256_fmadd_ps(odd, odds(some), a[l]);
            }
        }
        _mm_storeu_ps(s, sums_of_floats(a));
        for (long l = 0; l < 4; l++) score[column[l]] = s[l];
    }
    #pragma omp simd reduction(max:top)
    for (long j = 0; j < S; j++) top = score[j] > top ? score[j] : top;
    #pragma omp simd reduction(+:total)
    for (long j = 0; j < S; j++) total += score[j] = exp_of(score[j] - top);
    for (long d = 0; d < D; d += 64) {
        if (D - d >= 64) add_columns(V + d, score, total, y + d, S, D, 4);
        else if (D - d == 48) add_columns(V + d, score, total, y + d, S, D, 3);
        else if (D - d == 32) add_columns(V + d, score, total, y + d, S, D, 2);
        else add_columns(V + d, score, total, y + d, S, D, 1);
    }
}
#endif

/* A key and a value (D) into column `place` of a cache's head, floats or bf16. */
static void keep_kv(const float *key, const float *value, char *keys, char *values, long place, long D, long bf16) {
    if (bf16) for (long d = 0; d < D; d++) {
        ((uint16_t *)keys)[place * D + d] = down_bf16(key[d]);
        ((uint16_t *)values)[place * D + d] = down_bf16(value[d]);
    } else {
        memcpy((float *)keys + place * D, key, D * sizeof(float));
        memcpy((float *)values + place * D, value, D * sizeof(float));
    }
}

/* where head g of lane r has its keys in p[0] of op_attend, and its values behind them by what is returned in `apart` */
static char *keys_of(const struct op *o, const struct thread *me, long r, long g, long *apart) {
    long G = o->n[7], D = o->n[1], size = o->n[2], width = o->n[4] ? 2 : 4;
    *apart = me->whole->rows * G * size * D * width;
    return (char *)o->p[0] + (me->lanes[me->level].row[r] * G + g) * size * D * width;
}

/* the key and value of head g of lane r, of kv (2, G, D), into the cache */
static void write_kv(const struct op *o, const struct thread *me, const float *kv, long r, long g) {
    long G = o->n[7], D = o->n[1], column = me->program->columns[r], apart;
    const float *cos = o->p[1], *sin = o->p[2];
    float *key = (float *)me->scratch + D;
    char *keys = keys_of(o, me, r, g, &apart);
    turned(me, kv + g * D, key, D, (float)o->f[0], cos ? cos + column * D : 0, sin ? sin + column * D : 0, 1);
    keep_kv(key, kv + (G + g) * D, keys, keys + apart, column % o->n[2], D, o->n[4]);
}

/* Attention of one token: in is queries (H, D), keys and values (2, G, D), out (H, D). Keys and values are written
   to p[0] (2, rows, G, size, D), floats or bf16 (n[4]), a ring of `size` columns. n: H, D, size; n[7]: G, each for
   H / G queries in turn. n[3]: in is keys and values alone, and there is nothing else to do. f[0]: epsilon of the norm of queries and keys, or -1. p[1], p[2]: cosines and sines
   (columns, D); p[3]: gains (H). */
static void op_attend(const struct op *o, struct thread *me) {
    const struct program *p = me->program;
    long G = o->n[7], D = o->n[1], size = o->n[2], alone = o->n[3], from, to, apart;
    long H = alone ? G : o->n[0], group = H / G, wide = ((alone ? 0 : H) + 2 * G) * D;
    const float *cos = o->p[1], *sin = o->p[2], *gain = o->p[3], *in = at(me, o->in);
    float *q = (float *)me->scratch + D, *score = q + (D + 31) / 16 * 16 + 16;
    /* a thread has all queries of a key where that divides them evenly; else some read what another one has written */
    long whole = group == 1 || p->rows * G % me->threads == 0;
    if (!whole) {
        part(me, 0, p->rows * G, 1, &from, &to);
        for (long j = from; j < to; j++) write_kv(o, me, in + j / G * wide + H * D, j / G, j % G);
        meet(me);
    }
    part(me, alone ? 0 : o->out, p->rows * H, whole ? group : 1, &from, &to);
    for (long j = from; j < to; j++) {
        long r = j / H, h = j % H, column = p->columns[r], seen = column + 1 < size ? column + 1 : size;
        const float *x = in + r * wide;
        if (whole && h % group == 0) write_kv(o, me, x + (alone ? 0 : H) * D, r, h / group);
        if (alone) continue;
        const char *keys = keys_of(o, me, r, h / group, &apart), *values = keys + apart;
        turned(me, x + h * D, q, D, (float)o->f[0], cos ? cos + column * D : 0, sin ? sin + column * D : 0,
               gain ? gain[h] : 1);
        float *y = at(me, o->out) + j * D;
#ifdef WHOLE_AVX2
        if (o->n[4] && D % 16 == 0 && D <= MOST_PAIRS)
            look_pairs(q, (const uint16_t *)keys, (const uint16_t *)values, y, score, seen, D);
        else
#endif
        if (o->n[4]) look_bf16(q, (const uint16_t *)keys, (const uint16_t *)values, y, score, seen, D);
        else look_f32(q, (const float *)keys, (const float *)values, y, score, seen, D);
        round_all(me, y, D);
    }
}

/* ------------------------------------------------ lanes --------------------------------------------------
   Ops that choose which tokens the ops behind them compute. Every thread decides from values of its own, or
   from such that were written before threads met, so that all of them decide the same. Where no lane is left an
   op goes on further down, at an op that is named in n. Streams are divided among threads by their elements:
   what a thread has written of a stream here, it may read again here without a meeting. */

static void use_lanes(struct thread *me) {
    const struct lanes *here = me->lanes + me->level;
    me->program->rows = here->rows;
    memcpy(me->program->columns, here->columns, sizeof here->columns);
}

/* a lane for each row of the batch */
static void all_rows(struct thread *me) {
    struct lanes *here = me->lanes;
    here->rows = me->whole->rows;
    memcpy(here->columns, me->whole->columns, sizeof here->columns);
    for (long r = 0; r < ROWS; r++) here->row[r] = here->outer[r] = r;
}

static void open_lanes(struct thread *me, const struct lanes *inner) {
    me->lanes[++me->level] = *inner;
    use_lanes(me);
}

static void close_lanes(struct thread *me) {
    me->level--;
    use_lanes(me);
}

/* Lanes that stay move to the front, and their parts of x (C) with them. Without any: go on at op `past`. */
static void keep_lanes(struct thread *me, const int *stays, float *x, long C, int64_t past) {
    struct lanes *here = me->lanes + me->level;
    long kept = 0, from, to;
    for (long i = 0; i < here->rows; i++) kept += stays[i];
    if (kept == here->rows) return;
    if (!kept) me->next = me->whole->ops + past;
    else meet(me);                               /* others may still read x */
    part(me, 0, C, 16, &from, &to);
    for (long i = 0, j = 0; i < here->rows; i++) {
        if (!stays[i]) continue;
        memmove(x + j * C + from, x + i * C + from, (to - from) * sizeof(float));
        here->columns[j] = here->columns[i];
        here->row[j] = here->row[i];
        here->outer[j++] = here->outer[i];
    }
    here->rows = kept;
    if (kept) meet(me);
    use_lanes(me);
}

/* a probability, as torch computes it: what follows from it is a yes or no */
static inline float chance(float v) { return 1 / (1 + expf(-v)); }

/* Open lanes in which all go on that are in use; *p[0] counts them. out (n[0]), if there is one: zeros. */
static void op_enter(const struct op *o, struct thread *me) {
    struct lanes inner = me->lanes[me->level];
    long C = o->n[0], from, to;
    part(me, 0, C, 16, &from, &to);
    for (long i = 0; i < inner.rows; i++) {
        inner.outer[i] = i;
        me->left[i] = 1;
        if (o->out >= 0) memset(at(me, o->out) + i * C + from, 0, (to - from) * sizeof(float));
    }
    if (!me->number) *(int64_t *)o->p[0] += inner.rows;
    open_lanes(me, &inner);
}

/* Lane i has passed n[3] of n[4] layers, which it owes nothing any more: p[0] (rows, layers) says up to which
   column. *p[1] counts layers. */
static void passed(const struct op *o, struct thread *me, long i) {
    const struct lanes *here = me->lanes + me->level;
    if (me->number || !o->p[0]) return;
    for (long l = 0; l < o->n[3]; l++) ((int64_t *)o->p[0])[here->row[i] * o->n[4] + l] = here->columns[i] + 1;
    *(int64_t *)o->p[1] += o->n[3];
}

/* Lanes leave whose probe `by` (a number each) is sure by f[0]: their states in (n[0]) are written to out, in
   the places that they had when lanes were opened, and to p[2] (rows, n[2] columns, n[0]) for the layers that
   they have not passed. Without any left: on at n[1]. n[3], n[4], p[0], p[1]: see passed. */
static void op_leave(const struct op *o, struct thread *me) {
    const struct lanes *here = me->lanes + me->level;
    long C = o->n[0], from, to;
    float *x = at(me, o->in), *y = at(me, o->out), *states = (float *)o->p[2];
    const float *probe = at(me, o->by);
    int stays[ROWS];
    part(me, 0, C, 16, &from, &to);
    for (long i = 0; i < here->rows; i++) {
        stays[i] = !(chance(probe[i]) > (float)o->f[0]);
        if (stays[i]) continue;
        size_t size = (to - from) * sizeof(float);
        memcpy(y + here->outer[i] * C + from, x + i * C + from, size);
        memcpy(states + (here->row[i] * o->n[2] + here->columns[i]) * C + from, x + i * C + from, size);
        passed(o, me, i);
    }
    keep_lanes(me, stays, x, C, o->n[1]);
}

/* What tokens before those of the lanes owe layer n[3], as far as its n[5] columns still hold them: lanes are
   opened for up to ROWS of them, out being the states (n[0]) that they left with. An op further down comes
   back here, until nothing is owed: then on at n[1]. p[0], p[2], n[2], n[4]: as in leave. */
static void op_owe(const struct op *o, struct thread *me) {
    const struct lanes *here = me->lanes + me->level;
    struct lanes owed = { 0 };
    long C = o->n[0];
    for (long i = 0; i < here->rows; i++) {
        int64_t paid = ((const int64_t *)o->p[0])[here->row[i] * o->n[4] + o->n[3]];
        int64_t seen = here->columns[i] - o->n[5] + 1;
        if (!me->paying) me->owes[i] = paid > seen ? paid : seen;
        for (; me->owes[i] < here->columns[i] && owed.rows < ROWS; me->owes[i]++) {
            const float *states = (const float *)o->p[2];
            memcpy(at(me, o->out) + owed.rows * C, states + (here->row[i] * o->n[2] + me->owes[i]) * C, C * sizeof(float));
            owed.columns[owed.rows] = me->owes[i];
            owed.row[owed.rows++] = here->row[i];
        }
    }
    if (me->paying && owed.rows) meet(me);       /* others may still read what is written anew */
    me->paying = owed.rows > 0;
    if (owed.rows) open_lanes(me, &owed);
    else me->next = me->whole->ops + o->n[1];
}

/* A run of a block has made in (n[0]) of every lane, and `by` says how likely it halts. It halts where no more
   than f[0] would be left of 1, or always (n[6]). out, where lanes were opened, gets in times that chance, or
   times all that is left. Lanes that halt leave the keys and values of this run (p[0], as in attend: n[1] heads
   of n[2] bytes, n[3] columns) to n[4] later ones, at p[1] and every n[5] bytes behind it. Without any lane: on
   at n[7]. *p[2] counts runs. */
static void op_halt(const struct op *o, struct thread *me) {
    const struct lanes *here = me->lanes + me->level;
    long C = o->n[0], H = o->n[1], bytes = o->n[2], size = o->n[3], from, to, first, last;
    float *y = at(me, o->in);
    const float *probe = at(me, o->by);
    int stays[ROWS];
    part(me, 0, C, 16, &from, &to);
    part(me, 0, 2 * H, 1, &first, &last);
    if (!me->number) *(int64_t *)o->p[2] += here->rows;
    for (long i = 0; i < here->rows; i++) {
        float *left = me->left + here->outer[i], p = chance(probe[i]);
        stays[i] = !(*left - p <= (float)o->f[0]) && !o->n[6];
        float weight = stays[i] ? p : *left, *total = at(me, o->out) + here->outer[i] * C;
        *left -= weight;
        weight = me->program->rounds ? rounded(weight) : weight;
        for (long c = from; c < to; c++) {
            float more = weight * y[i * C + c];
            total[c] += me->program->rounds ? rounded(more) : more;
        }
        round_all(me, total + from, to - from);
        for (long j = first; j < last && !stays[i]; j++) {
            long where = (((j / H * me->whole->rows + here->row[i]) * H + j % H) * size + here->columns[i] % size) * bytes;
            for (long run = 0; run < o->n[4]; run++)
                memcpy((char *)o->p[1] + run * o->n[5] + where, (const char *)o->p[0] + where, bytes);
        }
    }
    keep_lanes(me, stays, y, C, o->n[7]);
}

/* Keep in (n[0]) of every lane in p[0] (rows, n[2], n[0]), the tokens of the groups that are under way. Lanes
   are opened for groups that are complete: out and onto are the sums of their tokens, times p[1] (n[2], n[0])
   element by element. Without any: on at n[1]. */
static void op_group(const struct op *o, struct thread *me) {
    const struct lanes *here = me->lanes + me->level;
    struct lanes inner = { 0 };
    long C = o->n[0], s = o->n[2], from, to;
    const float *pool = o->p[1];
    part(me, 0, C, 16, &from, &to);
    for (long i = 0; i < here->rows; i++) {
        float *group = (float *)o->p[0] + here->row[i] * s * C;
        memcpy(group + here->columns[i] % s * C + from, at(me, o->in) + i * C + from, (to - from) * sizeof(float));
        if ((here->columns[i] + 1) % s) continue;
        float *sum = at(me, o->out) + inner.rows * C;
        for (long c = from; c < to; c++) {
            sum[c] = 0;
            for (long t = 0; t < s; t++) {
                float more = group[t * C + c] * pool[t * C + c];
                sum[c] += me->program->rounds ? rounded(more) : more;
            }
        }
        round_all(me, sum + from, to - from);
        memcpy(at(me, o->onto) + inner.rows * C + from, sum + from, (to - from) * sizeof(float));
        inner.columns[inner.rows] = (here->columns[i] + 1) / s - 1;
        inner.row[inner.rows] = here->row[i];
        inner.outer[inner.rows++] = i;
    }
    if (!inner.rows) me->next = me->whole->ops + o->n[1];
    open_lanes(me, &inner);
}

/* What the middle layers have added to groups, in - by (n[0] a lane), is kept in p[0] (rows, n[0]); lanes of
   tokens are opened again, and each adds what its row's last group was given, times p[1] (n[2], n[0]) of its
   phase, to out. */
static void op_spread(const struct op *o, struct thread *me) {
    const struct lanes *here = me->lanes + me->level;
    long C = o->n[0], s = o->n[2], from, to;
    const float *x = at(me, o->in), *before = at(me, o->by);
    part(me, 0, C, 16, &from, &to);
    for (long i = 0; i < here->rows; i++) {
        float *told = (float *)o->p[0] + here->row[i] * C;
        for (long c = from; c < to; c++) told[c] = x[i * C + c] - before[i * C + c];
        round_all(me, told + from, to - from);
    }
    close_lanes(me);
    here = me->lanes + me->level;
    for (long i = 0; i < here->rows; i++) {
        const float *told = (const float *)o->p[0] + here->row[i] * C;
        const float *by = (const float *)o->p[1] + (here->columns[i] + 1) % s * C;
        float *y = at(me, o->out) + i * C;
        for (long c = from; c < to; c++) {
            float more = told[c] * by[c];
            y[c] += me->program->rounds ? rounded(more) : more;
        }
        round_all(me, y + from, to - from);
    }
}

/* Use the lanes again that are around these, which write in (n[0]), if there is one, to out in their places
   there. n[1]: on at that op; -1: at the next. n[3], n[4], p[0], p[1]: see passed. */
static void op_join(const struct op *o, struct thread *me) {
    const struct lanes *here = me->lanes + me->level;
    long C = o->n[0], from, to;
    part(me, 0, C, 16, &from, &to);
    for (long i = 0; i < here->rows && o->in >= 0; i++) {
        memcpy(at(me, o->out) + here->outer[i] * C + from, at(me, o->in) + i * C + from, (to - from) * sizeof(float));
        passed(o, me, i);
    }
    close_lanes(me);
    if (o->n[1] >= 0) me->next = me->whole->ops + o->n[1];
}

/* Which of n[0] groups answer: in their scores s; t_c = s_c - sum_d p[0][c, d] relu(s_d); the n[1] largest of
   t + p[1], of equal ones the first. list: their units, n[2] each; by: sigmoid(t) for each unit. */
static void op_columns(const struct op *o, struct thread *me) {
    long N = o->n[0], k = o->n[1], width = o->n[2], most = k * width;
    const float *inhibits = o->p[0], *balance = o->p[1];
    float *t = (float *)me->scratch;
    uint32_t *key = (uint32_t *)(t + N);
    for (long r = 0; r < me->program->rows; r++) {
        const float *s = at(me, o->in) + r * N;
        int32_t *list = (int32_t *)(at(me, o->list) + r * (most + 1));
        float *by = at(me, o->by) + r * most;
        long put = 0;
        for (long c = 0; c < N; c++) {
            float inhibited = 0;
            for (long d = 0; d < N; d++) inhibited += inhibits[c * N + d] * (s[d] < 0 ? 0 : s[d]);
            key[c] = order((t[c] = s[c] - inhibited) + balance[c]);
        }
        for (long c = 0; c < N && put < most; c++) {
            long before = 0;
            for (long d = 0; d < N; d++) before += key[d] > key[c] || (key[d] == key[c] && d < c);
            float gate = sigmoid(t[c]);
            gate = me->program->rounds ? rounded(gate) : gate;
            for (long i = 0; i < width && before < k; i++, put++) {
                list[put + 1] = c * width + i;
                by[put] = gate;
            }
        }
        list[0] = put;
    }
}

/* list: the n[1] of n[0] units whose score is largest, of equal ones the first */
static void op_choose(const struct op *o, struct thread *me) {
    long H = o->n[0], k = o->n[1];
    int32_t *rank = (int32_t *)me->scratch;
    for (long r = 0; r < me->program->rows; r++) {
        const float *x = at(me, o->in) + r * H;
        int32_t *list = (int32_t *)(at(me, o->list) + r * (k + 1));
        long put = 0, ties, i = 0;
        #pragma omp simd
        for (long j = 0; j < H; j++) rank[j] = rank_of(x[j]);
        int32_t edge = edge_of(rank, H, k, &ties);
#ifdef __AVX512F__
        for (; !ties && i + 16 <= H && put + 16 <= k; i += 16)
            put += put_places(list + 1 + put, i, _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(rank + i),
                                                                         _mm512_set1_epi32(edge)));
#endif
        for (; i < H && put < k; i++)
            if (rank[i] > edge || (rank[i] == edge && ties-- > 0)) list[++put] = i;
        list[0] = put;
    }
}

/* list: the units of n[0] whose score is above f[0], or not a number */
static void op_above(const struct op *o, struct thread *me) {
    long n = o->n[0];
    float edge = o->f[0];
    for (long r = 0; r < me->program->rows; r++) {
        const float *x = at(me, o->in) + r * n;
        int32_t *list = (int32_t *)(at(me, o->list) + r * (n + 1)), put = 1;
        long i = 0;
#ifdef __AVX512F__
        for (; i + 16 <= n && put + 15 <= n; i += 16)
            put += put_places(list + put, i, _mm512_cmp_ps_mask(_mm512_loadu_ps(x + i), _mm512_set1_ps(edge),
                                                                _CMP_NLE_UQ));
#endif
        for (; i < n; i++) {
            list[put] = i;                                      /* room for one more than n: the last may lie */
            put += put <= n && !(x[i] <= edge);
        }
        list[0] = put - 1;
    }
}

/* list: the units of n[0] whose in is not zero; by: what theirs is */
static void op_firing(const struct op *o, struct thread *me) {
    long n = o->n[0];
    for (long r = 0; r < me->program->rows; r++) {
        const float *x = at(me, o->in) + r * n;
        float *by = at(me, o->by) + r * n;
        int32_t *list = (int32_t *)(at(me, o->list) + r * (n + 1)), count = not_zero(x, n, n, list + 1);
        for (long i = 0; i < count; i++) by[i] = x[list[1 + i]];
        list[0] = count;
    }
}

/* out = act(p[3] in): in and out (K, U), K = n[1], K U = n[0]; p[3]: a K x K mix of in's rows, times each column.
   w, phi and b of an osc are p[0..2]. */
static void op_mix(const struct op *o, struct thread *me) {
    long n = o->n[0], K = o->n[1], U = n / K, from, to;
    const float *by = o->p[3];
    part(me, o->out, n, 16, &from, &to);
    for (long r = 0; r < me->program->rows; r++) {
        const float *restrict x = at(me, o->in) + r * n;
        float *restrict y = at(me, o->out) + r * n;
        for (long i = from, end; i < to; i = end) {
            long j = i / U;
            end = (j + 1) * U < to ? (j + 1) * U : to;
            for (long u = i; u < end; u++) y[u] = 0;
            for (long k = 0; k < K; k++) {
                const float *restrict row = x + (k - j) * U, m = by[j * K + k];
                #pragma omp simd
                for (long u = i; u < end; u++) y[u] += m * row[u];
            }
        }
        round_all(me, y + from, to - from);
        act_all(o, y, from, to);
        round_all(me, y + from, to - from);
    }
}

/* Which of n[0] experts answer: the n[1] with the largest softmax of in, of equal ones the first. list: their
   units, n[2] each; by: their shares of the sum of these, for each unit. */
static void op_experts(const struct op *o, struct thread *me) {
    long N = o->n[0], k = o->n[1], width = o->n[2], most = k * width;
    float *share = (float *)me->scratch;
    uint32_t *key = (uint32_t *)(share + N);
    for (long r = 0; r < me->program->rows; r++) {
        const float *s = at(me, o->in) + r * N;
        int32_t *list = (int32_t *)(at(me, o->list) + r * (most + 1));
        float *by = at(me, o->by) + r * most, top = -INFINITY, total = 0, kept = 0;
        long put = 0;
        for (long e = 0; e < N; e++) top = s[e] > top ? s[e] : top;
        for (long e = 0; e < N; e++) total += share[e] = expf(s[e] - top);
        for (long e = 0; e < N; e++) key[e] = order(share[e] /= total);
        for (long e = 0; e < N && put < most; e++) {
            long before = 0;
            for (long d = 0; d < N; d++) before += key[d] > key[e] || (key[d] == key[e] && d < e);
            if (before >= k) continue;
            kept += share[e];
            for (long i = 0; i < width; i++, put++) {
                list[put + 1] = e * width + i;
                by[put] = share[e];
            }
        }
        for (long i = 0; i < put; i++) by[i] /= kept;
        round_all(me, by, put);
        list[0] = put;
    }
}

/* Which of n[0] branches a token opens: g = sigmoid(in); of the n[1] largest, of equal ones the first, those that
   are a half or more, the largest always. list: their units, n[2] each; by: g for each unit. Where a score is not
   finite the token is not, and all branches are open, by a gate that is not a number: forward shows them too. */
static void op_branches(const struct op *o, struct thread *me) {
    long N = o->n[0], k = o->n[1], width = o->n[2], most = N * width;
    float *g = (float *)me->scratch;
    for (long r = 0; r < me->program->rows; r++) {
        const float *s = at(me, o->in) + r * N;
        int32_t *list = (int32_t *)(at(me, o->list) + r * (most + 1));
        float *by = at(me, o->by) + r * most, edge = -INFINITY, gate;
        long put = 0;
        float lost = 0;
        for (long d = 0; d < N; d++) lost += 0 * s[d];
        for (long d = 0; d < N; d++) g[d] = 1 / (1 + expf(-s[d])) + lost;
        for (long d = 0; d < N; d++) edge = g[d] > edge || g[d] != g[d] ? g[d] : edge;
        edge = edge > 0.5f ? 0.5f : edge;
        for (long d = 0; d < N; d++) {
            long before = 0;
            for (long e = 0; e < N; e++) before += order(g[e]) > order(g[d]) || (order(g[e]) == order(g[d]) && e < d);
            gate = g[d] * (before < k && g[d] >= edge ? 1.0f : 0.0f);
            round_all(me, &gate, 1);
            for (long i = 0; i < width && gate != 0; i++, put++) {
                list[put + 1] = d * width + i;
                by[put] = gate;
            }
        }
        list[0] = put;
    }
}

/* Attention of one token by the open branches alone: `in` holds the queries of the list's units, `onto` keys and
   values (2, G, D) of all heads, which are written as op_attend writes them. A list holds whole branches of n[5]
   units, n[6] units at most. out: gelu of what a listed unit's head attends to, times `by`. n, f and p else:
   those of op_attend. Threads take heads in turn, because the open ones lie together. */
static void op_attend_open(const struct op *o, struct thread *me) {
    const struct program *p = me->program;
    long H = o->n[0], D = o->n[1], size = o->n[2], branch = o->n[5], most = o->n[6], G = o->n[7], apart;
    const float *cos = o->p[1], *sin = o->p[2], *gain = o->p[3];
    float *q = (float *)me->scratch + D, *score = q + (D + 31) / 16 * 16 + 16;
    for (long j = me->number; j < p->rows * G; j += me->threads)
        write_kv(o, me, at(me, o->onto) + j / G * 2 * G * D, j / G, j % G);
    if (G < H) meet(me);                                        /* else each reads what it has written */
    for (long j = me->number; j < p->rows * H; j += me->threads) {
        long r = j / H, h = j % H, column = p->columns[r], found = 0, seen = column + 1 < size ? column + 1 : size;
        const char *keys = keys_of(o, me, r, h / (H / G), &apart), *values = keys + apart;
        const int32_t *list = list_of(o, me, r, most);
        long first = h * D / branch * branch;                   /* of its branch's units */
        while (found < list[0] && list[1 + found] != first) found += branch;
        if (found >= list[0]) continue;
        found += h * D - first;
        const float *by = at(me, o->by) + r * most + found;
        float *y = at(me, o->out) + r * most + found;
        turned(me, at(me, o->in) + r * most + found, q, D, (float)o->f[0], cos ? cos + column * D : 0,
               sin ? sin + column * D : 0, gain ? gain[h] : 1);
#ifdef WHOLE_AVX2
        if (o->n[4] && D % 16 == 0 && D <= MOST_PAIRS)
            look_pairs(q, (const uint16_t *)keys, (const uint16_t *)values, y, score, seen, D);
        else
#endif
        if (o->n[4]) look_bf16(q, (const uint16_t *)keys, (const uint16_t *)values, y, score, seen, D);
        else look_f32(q, (const float *)keys, (const float *)values, y, score, seen, D);
        round_all(me, y, D);
        for (long d = 0; d < D; d++) y[d] = gelu_of(y[d]);
        round_all(me, y, D);
        for (long d = 0; d < D; d++) y[d] *= by[d];
        round_all(me, y, D);
    }
}

/* list: for a lane of row r of the batch the n[0] rows of a matrix from p[0][r] on */
static void op_rows_of(const struct op *o, struct thread *me) {
    const int64_t *first = o->p[0];
    for (long r = 0; r < me->program->rows; r++) {
        int32_t *list = (int32_t *)(at(me, o->list) + r * (o->n[0] + 1));
        list[0] = o->n[0];
        for (long i = 0; i < o->n[0]; i++) list[i + 1] = first[me->lanes[me->level].row[r]] + i;
    }
}

/* logits: out = f[0] tanh(out / f[0]), n[0] of each row */
static void op_softcap(const struct op *o, struct thread *me) {
    long n = me->program->rows * o->n[0], from, to;
    float cap = o->f[0], *y = at(me, o->out);
    part(me, o->out, n, 16, &from, &to);
    for (long i = from; i < to; i++) y[i] = cap * tanh_of(y[i] / cap);
}

/* The largest of n[0] of each row -> program.best, computed by the first thread */
static void op_best(const struct op *o, struct thread *me) {
    struct program *p = me->whole;
    for (long r = me->number; r < p->rows; r += me->threads) {
        const float *x = at(me, o->in) + r * o->n[0];
        float most = -INFINITY, wrong = 0;
        #pragma omp simd reduction(max:most) reduction(+:wrong)
        for (long i = 0; i < o->n[0]; i++) {
            most = x[i] > most ? x[i] : most;
            wrong += x[i] != x[i];
        }
        long i = 0;
        while (i + 1 < o->n[0] && x[i] != most) i++;
        p->best[r] = wrong || !(fabsf(most) < INFINITY) ? -1 : i;
    }
}

/* ---- choosing the next id: Sampler of decode/sampling.py, drawn by a counter (decode/draws.py) ---- */

struct draws {
    double temperature, top_p, min_p, penalty;   /* temperature 0: the largest */
    int64_t top_k;
    uint64_t key;
    uint8_t *seen;                               /* (rows, seen_stride): ids that are in the row; or none */
    int64_t seen_stride;
    int64_t firsts[ROWS];                        /* the column of its history that a row's window begins at */
};

/* a number in [0, 1) of (key, column, row): 53 bits of Philox 4x32-10 (Salmon et al. 2011) */
static double number_of(uint64_t key, uint64_t column, uint64_t row) {
    uint32_t c[4] = { (uint32_t)column, (uint32_t)(column >> 32), (uint32_t)row, (uint32_t)(row >> 32) };
    uint32_t k[2] = { (uint32_t)key, (uint32_t)(key >> 32) };
    for (int i = 0; i < 10; i++) {
        uint64_t a = (uint64_t)0xD2511F53 * c[0], b = (uint64_t)0xCD9E8D57 * c[2];
        c[0] = (uint32_t)(b >> 32) ^ c[1] ^ k[0];
        c[2] = (uint32_t)(a >> 32) ^ c[3] ^ k[1];
        c[1] = (uint32_t)b;
        c[3] = (uint32_t)a;
        k[0] += 0x9E3779B9;
        k[1] += 0xBB67AE85;
    }
    return (double)((uint64_t)c[0] << 21 | c[1] >> 11) * 0x1p-53;
}

double uniform(uint64_t key, uint64_t column, uint64_t row) { return number_of(key, column, row); }

/* Which of m masses e, in falling order of their keys, of equal ones the first, make up `wanted`: those whose
   predecessors do not reach it. -> the key of the last, and how many of that key. A sort of a digit at a time,
   of which only the digit's bin that reaches it is looked into further. */
static uint32_t reach(const uint32_t *key, const float *e, long m, double wanted, long *ties) {
    double before = 0, mass[4096];
    uint32_t count[4096], found = 0;
    const int shifts[3] = { 20, 10, 0 }, bits[3] = { 12, 10, 10 };
    for (int level = 0; level < 3; level++) {
        int shift = shifts[level], bins = 1 << bits[level];
        memset(mass, 0, bins * sizeof(double));
        memset(count, 0, bins * sizeof(uint32_t));
        for (long j = 0; j < m; j++) {
            if (level && key[j] >> shifts[level - 1] != found) continue;
            mass[key[j] >> shift & (bins - 1)] += e[j];
            count[key[j] >> shift & (bins - 1)]++;
        }
        long last = -1, b = bins - 1;                           /* sums round: the last bin may not reach it */
        double above = before;
        for (; b >= 0; b--) {
            if (!count[b]) continue;
            last = b;
            above = before;
            before += mass[b];
            if (before >= wanted) break;
        }
        before = above;
        found = found << bits[level] | (uint32_t)last;
        *ties = count[last];
    }
    for (long j = 0; j < m; j++) {
        if (key[j] != found) continue;
        long all = *ties;
        for (*ties = 0; *ties < all && before < wanted; ++*ties) before += e[j];
        break;
    }
    return found;
}

#define CHUNK 64                                 /* logits or masses that are looked at together first */

/* the sum of m masses, and of each CHUNK of them */
static double sum_of(const float *e, long m, double *chunk) {
    double all = 0;
    for (long j = 0; j < m; j += CHUNK) {
        long end = j + CHUNK < m ? j + CHUNK : m;
        float sum = 0;
        #pragma omp simd reduction(+:sum)
        for (long i = j; i < end; i++) sum += e[i];
        all += chunk[j / CHUNK] = sum;
    }
    return all;
}

/* The next id of a row of n logits x, by `u` in [0, 1); -1: its largest logit is not finite. With top_k only
   those CHUNKs are looked into whose largest is among the k largest of such: no other can hold one. */
static int64_t choose_id(const struct draws *d, const float *x, long n, const uint8_t *seen, double u, char *room) {
    float *t = (float *)room, *e = t + n, most = -INFINITY, wrong = 0, r = d->penalty, bound = -INFINITY;
    uint32_t *key = (uint32_t *)(e + n);
    int32_t *id = (int32_t *)(key + n);
    double *chunk = (double *)(room + (n * 16 + 63) / 64 * 64);
    int greedy = d->temperature == 0 || d->top_k == 1;
    float cold = greedy ? 1 : d->temperature;
    long m = 0, k = d->top_k > 0 && d->top_k < n ? d->top_k : 0, chunks = (n + CHUNK - 1) / CHUNK;
    if (seen && d->penalty != 1) {
        for (long i = 0; i < n; i++) t[i] = seen[i] ? x[i] > 0 ? x[i] / r : x[i] * r : x[i];
        x = t;
    }
    for (long c = 0; c < chunks; c++) {
        long end = (c + 1) * CHUNK < n ? (c + 1) * CHUNK : n;
        float high = -INFINITY;
        #pragma omp simd reduction(max:high) reduction(+:wrong)
        for (long i = c * CHUNK; i < end; i++) {
            high = x[i] > high ? x[i] : high;
            wrong += x[i] != x[i];
        }
        e[c] = high;
        most = high > most ? high : most;
    }
    if (wrong != 0 || !(fabsf(most / cold) < INFINITY)) return -1;
    if (greedy) {
        long i = 0;
        while (x[i] != most) i++;
        return i;
    }
    most /= cold;
    if (k && k < chunks) {
        for (long c = 0; c < chunks; c++) key[c] = order(e[c]);
        union { uint32_t u; float f; } v = { kth(key, chunks, k) };
        v.u = v.u >> 31 ? v.u ^ 0x80000000u : ~v.u;
        bound = v.f / cold;
    }
    if (bound == -INFINITY) {
        for (long i = 0; i < n; i++) id[i] = i;
        for (long i = 0; i < n; i++) t[i] = x[i] / cold;
        m = n;
    } else for (long c = 0; c < chunks; c++) {
        long end = (c + 1) * CHUNK < n ? (c + 1) * CHUNK : n;
        if (e[c] / cold < bound) continue;
        for (long i = c * CHUNK; i < end; i++) {
            float v = x[i] / cold;
            t[m] = v;
            id[m] = i;
            m += v >= bound;
        }
    }
    if (k && k < m) {
        for (long j = 0; j < m; j++) key[j] = order(t[j]);
        memcpy(e, key, m * sizeof(uint32_t));
        uint32_t edge = kth((uint32_t *)e, m, k);
        long kept = 0;
        for (long j = 0; j < m; j++) {                          /* ties of the k-th stay */
            t[kept] = t[j];
            id[kept] = id[j];
            kept += key[j] >= edge;
        }
        m = kept;
    }
    #pragma omp simd
    for (long j = 0; j < m; j++) e[j] = t[j] - most < -87 ? 0 : exp_of(t[j] - most);
    if (d->top_p < 1) {
        for (long j = 0; j < m; j++) key[j] = order(t[j]);
        long ties, kept = 0;
        uint32_t edge = reach(key, e, m, d->top_p * sum_of(e, m, chunk), &ties);
        for (long j = 0; j < m; j++) {
            int stays = key[j] > edge || (key[j] == edge && ties-- > 0);
            e[kept] = e[j];
            id[kept] = id[j];
            kept += stays;
        }
        m = kept;
    }
    float least = d->min_p;                                     /* the largest is 1 */
    #pragma omp simd
    for (long j = 0; j < m; j++) e[j] = e[j] < least ? 0 : e[j];
    double want = u * sum_of(e, m, chunk), sum = 0;
    long j = 0;
    for (; j + CHUNK < m && sum + chunk[j / CHUNK] <= want; j += CHUNK) sum += chunk[j / CHUNK];
    int64_t last = -1;
    for (; j < m && sum <= want; j++) {
        if (e[j] > 0) last = id[j];
        sum += e[j];
    }
    for (long i = m - 1; last < 0 && i >= 0; i--) if (e[i] > 0) last = id[i];          /* sums that rounded */
    return last;
}

/* Next ids of `rows` rows of n logits, `stride` floats apart, which go to columns[r] -> ids, 1; 0 where one's
   largest logit is not finite. For what a program has not computed. */
int draw(const struct draws *d, const float *x, int64_t stride, int64_t rows, int64_t n, const int64_t *columns,
         int64_t *ids) {
    char *room = heap(n * 17 + 1024);
    int fine = 1;
    for (long r = 0; r < rows; r++) {
        const uint8_t *seen = d->seen ? d->seen + r * d->seen_stride : 0;
        ids[r] = choose_id(d, x + r * stride, n, seen, number_of(d->key, columns[r], r), room);
        fine &= ids[r] >= 0;
    }
    free(room);
    return fine;
}

/* p[0]: draws. The next id of each row's n[0] logits -> program.best; noted in `seen`. */
static void op_draw(const struct op *o, struct thread *me) {
    struct program *p = me->whole;
    struct draws *d = (struct draws *)o->p[0];
    for (long r = me->number; r < p->rows; r += me->threads) {
        uint8_t *seen = d->seen ? d->seen + r * d->seen_stride : 0;
        double u = number_of(d->key, d->firsts[r] + p->columns[r] + 1, r);
        p->best[r] = choose_id(d, at(me, o->in) + r * o->n[0], o->n[0], seen, u, me->scratch);
        if (seen && p->best[r] >= 0) seen[p->best[r]] = 1;
    }
}

/* A head of which the n[0] largest outputs are wanted: p[0] (rows, width) int8 copy of w, p[1] its scales,
   p[2] its errors (see screened). in: x. The first op: by = low and high bounds of each row (2, rows). The
   second (n[1]): out = w . x where it can be among them, else -inf. */
static inline void bound(float *low, long N, long n, float about, float off, float round) {
    off += round * (fabsf(about) + off);
    low[n] = about - off;
    low[N + n] = about + off;
}

/* x rounded to whole numbers in `to` -> how far it is from x, at most */
static float round_and_see(const float *x, long K, char *to) {
    const int8_t *high = (const int8_t *)to + 64, *low = high + padded(K);
    round_to_digits(x, K, to);
    float by = *(const float *)to, off = 0;
    #pragma omp simd reduction(+:off)
    for (long k = 0; k < K; k++) {
#ifdef WHOLE_VNNI
        float wrong = x[k] - by * (DIGIT * (int8_t)(high[k] ^ 0x80) + (int8_t)(low[k] ^ 0x80));
#else
        float wrong = x[k] - by * (DIGIT * high[k] + low[k]);
#endif
        off += wrong * wrong;
    }
    return 1.001f * sqrtf(off) + 1e-16f;
}

static void op_bounds(const struct op *o, struct thread *me) {
    long K = o->w.width, N = o->w.rows, from, to;
    const int8_t *q = o->p[0];
    const float *scale = o->p[1], *error = o->p[2], *sizes = o->p[3], round = o->f[0];
    part(me, o->by, N, 16, &from, &to);
    float size[ROWS], lost[ROWS];
    long rows = me->program->rows, room = room_of(K);
    for (long r = 0; r < rows; r++) {
        const float *x = at(me, o->in) + r * K;
        float square = 0;
        #pragma omp simd reduction(+:square)
        for (long k = 0; k < K; k++) square += x[k] * x[k];
        size[r] = sqrtf(square);
        if (o->p[3]) lost[r] = round_and_see(x, K, me->scratch + r * room);
    }
    if (o->p[3]) {                                              /* four rows at a time, as in op_linear */
        struct matrix copy = { .kind = IS_I8, .rows = N, .width = K, .stride = K, .data = o->p[0], .scale = o->p[1] };
        long quarter = (to - from) / 4, steps = quarter + (to - from) % 4;
        for (long i = 0; i < steps; i++) {
            long row[4];
            float about[4 * ROWS];
            for (long l = 0; l < 4; l++) row[l] = i < quarter ? from + l * quarter + i : to - (steps - i);
            quads_of(IS_I8, &copy, row, 0, 0, me->scratch, room, rows, about);
            for (long r = 0; r < rows; r++)
                for (long l = 0; l < 4; l++) {
                    float off = error[row[l]] * size[r] + sizes[row[l]] * lost[r];
                    bound(at(me, o->by) + r * 2 * N, N, row[l], about[4 * r + l], off, round);
                }
        }
        return;
    }
    for (long n = from; n < to; n++)
        for (long r = 0; r < rows; r++) {
            float about = scale[n] * dot_i8(q + n * K, at(me, o->in) + r * K, K);
            bound(at(me, o->by) + r * 2 * N, N, n, about, error[n] * size[r], round);
        }
}
static void op_screened(struct op *o, struct thread *me) {
    long K = o->w.width, N = o->w.rows, k = o->n[0], from, to, size = room_of(K), rows = me->program->rows;
    long read = 0, used = 0;
    uint32_t edge[ROWS] = { 0 }, *keys = (uint32_t *)(me->scratch + rows * size);
    part(me, o->out, N, 16, &from, &to);
    for (long r = 0; r < rows; r++) {
        const float *low = at(me, o->by) + r * 2 * N;
        if (k == 1) for (long n = 0; n < N; n++) edge[r] = order(low[n]) > edge[r] ? order(low[n]) : edge[r];
        else {
            for (long n = 0; n < N; n++) keys[n] = order(low[n]);
            edge[r] = kth(keys, N, k < N ? k : N);
        }
        prepare(o->w.kind, at(me, o->in) + r * K, K, me->scratch + r * size);
    }
    for (long n = from; n < to; n++) {
        long one[4] = { n, n, n, n }, wanted = 0;
        for (long r = 0; r < rows; r++) {
            float s[4] = { -INFINITY }, high = at(me, o->by)[(r * 2 + 1) * N + n];
            if (order(high) >= edge[r]) {                       /* NaN is read too */
                quad(&o->w, one, 0, me->scratch + r * size, s);
                s[0] = me->program->rounds ? rounded(s[0]) : s[0];
                wanted++;
            }
            at(me, o->out)[r * N + n] = s[0];
        }
        read += wanted > 0;
        used += wanted;
    }
    __atomic_fetch_add(&o->read, read, __ATOMIC_RELAXED);
    __atomic_fetch_add(&o->used, used, __ATOMIC_RELAXED);
}

enum { EMBED, NORM, LINEAR, ROWS_SUM, LARGEST, GROUP_WINNERS, EVENT, SWIGLU, ADD, ATTEND, COLUMNS, CHOOSE,
       SOFTCAP, BEST, BOUNDS, SCREENED, ABOVE, MIX,
       EXPERTS, BRANCHES, ATTEND_OPEN, ROWS_OF, DRAW, ENTER, LEAVE,
       OWE, HALT, GROUP, SPREAD, JOIN, FIRING };

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void run_program(struct program *p, long number, long threads) {
    struct program seen = *p;
    struct thread me = { &seen, number, threads, p->own + number * p->own_size, p->scratch + number * p->scratch_size,
                         .whole = p };
    all_rows(&me);
    for (struct op *o = p->ops, *end = o + p->count; o < end; o = (struct op *)me.next) {
        int64_t began = p->watched && !number ? now() : 0;
        me.next = o + 1;
        if (!number) {
            o->runs++;
            o->lanes += seen.rows;
        }
        if (o->meets) meet(&me);
        switch (o->code) {
        case EMBED: op_embed(o, &me); break;
        case NORM: op_norm(o, &me); break;
        case LINEAR: op_linear(o, &me); break;
        case ROWS_SUM: op_rows_sum(o, &me); break;
        case LARGEST: op_largest(o, &me); break;
        case GROUP_WINNERS: op_group_winners(o, &me); break;
        case EVENT: op_event(o, &me); break;
        case SWIGLU: op_swiglu(o, &me); break;
        case ADD: op_add(o, &me); break;
        case ATTEND: op_attend(o, &me); break;
        case COLUMNS: op_columns(o, &me); break;
        case CHOOSE: op_choose(o, &me); break;
        case SOFTCAP: op_softcap(o, &me); break;
        case BEST: op_best(o, &me); break;
        case BOUNDS: op_bounds(o, &me); break;
        case SCREENED: op_screened(o, &me); break;
        case ABOVE: op_above(o, &me); break;
        case MIX: op_mix(o, &me); break;
        case EXPERTS: op_experts(o, &me); break;
        case BRANCHES: op_branches(o, &me); break;
        case ATTEND_OPEN: op_attend_open(o, &me); break;
        case ROWS_OF: op_rows_of(o, &me); break;
        case DRAW: op_draw(o, &me); break;
        case ENTER: op_enter(o, &me); break;
        case LEAVE: op_leave(o, &me); break;
        case OWE: op_owe(o, &me); break;
        case HALT: op_halt(o, &me); break;
        case GROUP: op_group(o, &me); break;
        case SPREAD: op_spread(o, &me); break;
        case JOIN: op_join(o, &me); break;
        case FIRING: op_firing(o, &me); break;
        }
        if (began) o->ticks += now() - began;
    }
    meet(&me);
}

/* One token of every row: ids[r][columns[r]] is read, its logits and chosen ids are left in the program, and
   the next columns will be read. By all threads or by one alone, whichever has been faster of late: where
   other work holds a processor, each meeting waits for a thread that does not run. The other way is tried
   again whenever it would cost no more than a part in TRIED. What is exported is not called here: another
   library, as the C library itself, may have a `step` too, and the loader would take that one. */
#define TRIED 32
static void one_step(struct program *p) {
    int many = p->threads > 1 && p->cost[1] <= p->cost[0];
    if (p->threads > 1 && p->spent >= TRIED * p->cost[!many]) {
        many = !many;
        p->spent = 0;
    }
    int64_t began = now();
    together(p, run_program, many ? p->threads : 1);
    double took = 1e-9 * (now() - began), *cost = &p->cost[many];
    double more = took < 8 * *cost ? took - *cost : 7 * *cost;  /* one long wait is not yet a rule */
    *cost = *cost == 0 ? took : *cost + more / (more < 0 ? 4 : 8);
    p->spent += took;
    for (long r = 0; r < p->rows; r++) p->columns[r]++;
    p->steps++;
}
void step(struct program *p) { one_step(p); }

/* Write the chosen ids where the next step reads them -> 1, or 0 where a row's largest logit is not finite */
static int write_ids(struct program *p) {
    for (long r = 0; r < p->rows; r++) {
        if (p->best[r] < 0) return 0;
        p->ids[r][p->columns[r]] = p->best[r];
    }
    return 1;
}
int follow(struct program *p) { return write_ids(p); }

/* Both in one call */
int step_and_follow(struct program *p) {
    one_step(p);
    return write_ids(p);
}

#ifdef WHOLE_AVX2
#define KEEP(u, v) __asm__("" : "+x"(u), "+x"(v))     /* in registers: they are not loaded again for each row */
#define BLOCK 64                                 /* tokens whose numbers stay in the second-level cache */

/* rows n.. n + 3 of w as numbers of 16 bits (4, wide); those behind the last repeat it */
static void widen_rows(const struct matrix *w, long n, int16_t *to) {
    long wide = padded(w->width);
    for (long l = 0; l < 4; l++, to += wide) {
        const char *row = w->data + (n + l < w->rows ? n + l : w->rows - 1) * w->stride;
        if (w->kind == IS_I8) {
            #pragma omp simd
            for (long k = 0; k < wide; k++) to[k] = (int8_t)row[k];
        } else for (long k = 0; k < wide; k += 64) {
            const uint8_t *two = (const uint8_t *)row + k / 2;
            #pragma omp simd
            for (long i = 0; i < 32; i++) to[k + i] = (int16_t)((two[i] & 15) - 8);
            #pragma omp simd
            for (long i = 0; i < 32; i++) to[k + 32 + i] = (int16_t)((two[i] >> 4) - 8);
        }
    }
}

/* sums (2, 4 registers) += the products of two tokens and four rows of I8: at most 8,192 numbers in turn, which 32
   bits hold */
static inline void eight_products(const int16_t *w, const int16_t *x, const int16_t *z, long wide, long from, long to,
                                  __m256 *sums) {
    __m256i a[8];
    for (int i = 0; i < 8; i++) a[i] = _mm256_setzero_si256();
    for (long k = from; k < to; k += 32) {
        __m256i u = load_ints(x + k), v = load_ints(z + k), u2 = load_ints(x + k + 16), v2 = load_ints(z + k + 16);
        KEEP(u, v);
        KEEP(u2, v2);
        for (long l = 0; l < 4; l++) {
            __m256i row = load_ints(w + l * wide + k), row2 = load_ints(w + l * wide + k + 16);
            a[l] = _mm256_add_epi32(a[l], _mm256_add_epi32(_mm256_madd_epi16(row, u), _mm256_madd_epi16(row2, u2)));
            a[l + 4] = _mm256_add_epi32(a[l + 4], _mm256_add_epi32(_mm256_madd_epi16(row, v),
                                                                   _mm256_madd_epi16(row2, v2)));
        }
    }
    for (int i = 0; i < 8; i++) sums[i] = _mm256_add_ps(sums[i], _mm256_cvtepi32_ps(a[i]));
}

/* s (2, 4): the same of I4; scales: of the rows' groups (4, wide / 32), and of each token's */
static inline void eight_products_i4(const int16_t *w, const float *scales, const int16_t *x, const int16_t *z,
                                     const float *of_x, const float *of_z, long wide, float *s) {
    __m256 a[8];
    for (int i = 0; i < 8; i++) a[i] = _mm256_setzero_ps();
    for (long k = 0; k < wide; k += 32) {
        __m256i u = load_ints(x + k), v = load_ints(z + k), u2 = load_ints(x + k + 16), v2 = load_ints(z + k + 16);
        KEEP(u, v);
        KEEP(u2, v2);
        __m256 first = _mm256_broadcast_ss(of_x + k / 32), second = _mm256_broadcast_ss(of_z + k / 32);
        for (long l = 0; l < 4; l++) {
            __m256i row = load_ints(w + l * wide + k), row2 = load_ints(w + l * wide + k + 16);
            __m256 scale = _mm256_broadcast_ss(scales + l * (wide / 32) + k / 32);
            a[l] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(
                _mm256_madd_epi16(row, u), _mm256_madd_epi16(row2, u2))), _mm256_mul_ps(scale, first), a[l]);
            a[l + 4] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(
                _mm256_madd_epi16(row, v), _mm256_madd_epi16(row2, v2))), _mm256_mul_ps(scale, second), a[l + 4]);
        }
    }
    _mm_storeu_ps(s, sums_of_floats(a));
    _mm_storeu_ps(s + 4, sums_of_floats(a + 4));
}

static void many_products(const struct matrix *w, const float *x, float *y, long count, int threads) {
    long K = w->width, wide = padded(K), groups = wide / 32, N = w->rows;
    int16_t *numbers = heap(count * wide * sizeof(int16_t));
    long each = w->kind == IS_I4 ? groups : 1;                  /* scales of a token */
    float *by = heap(count * each * sizeof(float));
    float *group_sums = heap(count * each * sizeof(float));     /* of what each 32 numbers of I4 stand for */
    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for schedule(static)
        for (long t = 0; t < count; t++) {
            int16_t *own = numbers + t * wide;
            if (w->kind == IS_I8) {
                round_to_whole(x + t * K, K, to_whole(x + t * K, K, by + t), own);
                memset(own + K, 0, (wide - K) * sizeof(int16_t));
            } else for (long g = 0; g < groups; g++) {
                int8_t q[32];
                int32_t sum;
                by[t * groups + g] = round_to_8_bits(x + t * K + 32 * g, K - 32 * g, q, &sum);
                group_sums[t * groups + g] = by[t * groups + g] * sum;
                for (int i = 0; i < 32; i++) own[32 * g + i] = q[i];
            }
        }
        int16_t *rows = heap(4 * wide * sizeof(int16_t));
        float *scales = heap(4 * groups * sizeof(float)), *offsets = heap(4 * groups * sizeof(float));
        for (long first = 0; first < count; first += BLOCK) {
            long last = first + BLOCK < count ? first + BLOCK : count;
            #pragma omp for schedule(static)
            for (long n = 0; n < N; n += 4) {
                widen_rows(w, n, rows);
                if (w->kind == IS_I4) for (long l = 0; l < 4; l++) {
                    long row = n + l < N ? n + l : N - 1;
                    const uint16_t *of = (const uint16_t *)(w->data + row * w->stride + wide / 2);
                    const uint16_t *more = (const uint16_t *)(w->data + row * w->stride + w->scale_stride);
                    for (long g = 0; g < groups; g++) scales[l * groups + g] = up_bf16(of[g]);
                    for (long g = 0; g < groups && w->scale_stride; g++) offsets[l * groups + g] = up_bf16(more[g]);
                }
                for (long t = first; t < last; t += 2) {
                    long pair = t + 1 < last ? t + 1 : t;
                    __m256 sums[8];
                    float s[8];
                    for (int i = 0; i < 8; i++) sums[i] = _mm256_setzero_ps();
                    for (long k = 0; k < wide && w->kind == IS_I8; k += 8192)
                        eight_products(rows, numbers + t * wide, numbers + pair * wide, wide, k,
                                       k + 8192 < wide ? k + 8192 : wide, sums);
                    if (w->kind == IS_I8) {
                        _mm_storeu_ps(s, sums_of_floats(sums));
                        _mm_storeu_ps(s + 4, sums_of_floats(sums + 4));
                    } else eight_products_i4(rows, scales, numbers + t * wide, numbers + pair * wide, by + t * groups,
                                             by + pair * groups, wide, s);
                    for (long i = 0; i < 8; i++) {
                        long row = n + i % 4, token = i < 4 ? t : pair;
                        if (row >= N) continue;
                        if (w->kind == IS_I4 && w->scale_stride) {
                            const float *own = offsets + i % 4 * groups, *sums_of = group_sums + token * groups;
                            float more = 0;
                            #pragma omp simd reduction(+:more)
                            for (long g = 0; g < groups; g++) more += own[g] * sums_of[g];
                            s[i] += more;
                        }
                        y[token * N + row] = w->kind == IS_I4 ? s[i]
                            : s[i] * (by[token] * ((const struct of_row *)w->scale)[row].scale);
                    }
                }
            }
        }
        free(rows);
        free(scales);
        free(offsets);
    }
    free(numbers);
    free(by);
    free(group_sums);
}
#endif

/* are products of many tokens faster by whole_products than as floats? */
int many_whole_products(void) {
#ifdef WHOLE_AVX2
    return 1;
#else
    return 0;
#endif
}

/* y (count, rows of w) = w . x of floats (count, width), and y (count, width) = the sums of rows of w times a
   (count, rows of w): a step's arithmetic by itself, for whole numbers and 2:4 rows outside of a program */
void whole_products(const struct matrix *w, const float *x, float *y, long count, int threads) {
#ifdef WHOLE_AVX2
    if (count > ROWS && (w->kind == IS_I8 || w->kind == IS_I4)) {
        many_products(w, x, y, count, threads);
        return;
    }
#endif
    long room = room_of(w->width);
    char *ready = heap(count * room);
    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for schedule(static)
        for (long m = 0; m < count; m++) prepare(w->kind, x + m * w->width, w->width, ready + m * room);
        #pragma omp for schedule(static)
        for (long i = 0; i < w->rows; i += 64)                  /* they stay in a cache for all lanes */
            for (long m = 0; m < count; m += ROWS)
                stream_rows(w, ready + m * room, room, count - m < ROWS ? count - m : ROWS, 0, y + m * w->rows, w->rows,
                            i, i + 64 < w->rows ? i + 64 : w->rows);
    }
    free(ready);
}
/* high (M, N), the sums of the products of numbers' digits, and `low`, become floats in `high`: what both make,
   times a scale of each row and one of each column */
void scale_sums(int32_t *high, const int32_t *low, const float *by, const struct of_row *of, long M, long N,
                int threads) {
    typedef float __attribute__((may_alias)) number;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long m = 0; m < M; m++) {
        int32_t *row = high + m * N;
        #pragma omp simd
        for (long n = 0; n < N; n++)
            ((number *)row)[n] = ((float)DIGIT * row[n] + low[m * N + n]) * (by[m] * of[n].scale);
    }
}
/* high and low (M, K): the digits of the rows of x as whole numbers; by (M): their scales, NaN where not finite */
void in_digits(const float *x, int8_t *high, int8_t *low, float *by, long M, long K, int threads) {
    #pragma omp parallel num_threads(threads)
    {
        int16_t *q = heap(K * sizeof *q);
        #pragma omp for schedule(static)
        for (long m = 0; m < M; m++) {
            round_to_whole(x + m * K, K, to_whole(x + m * K, K, by + m), q);
            digits_of(q, K, high + m * K, low + m * K);
        }
        free(q);
    }
}
/* out (rows, width) bf16 = what whole numbers stand for, rounded once */
void whole_to_bf16(const struct matrix *w, uint16_t *out, int threads) {
    long K = w->width, wide = padded(K);
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < w->rows; n++) {
        const int8_t *codes = (const int8_t *)w->data + n * w->stride;
        uint16_t *to = out + n * K;
        if (w->kind == IS_I8) {
            float scale = ((const struct of_row *)w->scale)[n].scale;
            #pragma omp simd
            for (long k = 0; k < K; k++) to[k] = down_bf16(codes[k] * scale);
        } else
            for (long k = 0; k < K; k += 32) {                  /* a group: the low or the high half of 32 bytes */
                const uint8_t *bytes = (const uint8_t *)codes + k / 64 * 32;
                float scale = up_bf16(((const uint16_t *)(codes + wide / 2))[k / 32]);
                float offset = w->scale_stride ? up_bf16(((const uint16_t *)(codes + w->scale_stride))[k / 32]) : 0;
                int high = k / 32 % 2 * 4;
                uint16_t group[32];
                #pragma omp simd
                for (int i = 0; i < 32; i++) group[i] = down_bf16(((bytes[i] >> high & 15) - 8) * scale + offset);
                memcpy(to + k, group, (K - k < 32 ? K - k : 32) * sizeof(uint16_t));
            }
    }
}
/* What quads_i8 and op_bounds want of a copy in 8 bits (N, K): scale and sum of each row, and its size */
void rows_of_copy(const int8_t *q, const float *scale, struct of_row *of, float *size, long N, long K, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < N; n++) {
        int64_t sum = 0, square = 0;
        #pragma omp simd reduction(+:sum, square)
        for (long k = 0; k < K; k++) {
            sum += q[n * K + k];
            square += q[n * K + k] * q[n * K + k];
        }
        of[n] = (struct of_row) { scale[n], (int32_t)sum };
        size[n] = 1.001f * scale[n] * sqrtf(square);
    }
}

void whole_rows_sum(const struct matrix *w, const float *a, float *y, long count, int all) {
    BUFFER(int, live, w->rows);
    BUFFER(int32_t, room, 2 * w->width + 512);
    for (long m = 0; m < count; m++, a += w->rows, y += w->width) {
        long n = 0;
        for (long i = 0; i < w->rows; i++) {
            live[n] = i;
            n += a[i] != 0 || all;
        }
        memset(y, 0, w->width * sizeof(float));
        add_whole_rows(w, a, 0, live, n, y, room);
    }
    RELEASE(room);
    RELEASE(live);
}
