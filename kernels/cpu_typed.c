/* Included by cpu.c for each TYPE of weight; OF(name) is the name of that type's function. */
/* a thread's share of C outputs, whole lines of 32 */
static inline long OF(share)(long C, int threads) { return ((C + threads - 1) / threads + 31) / 32 * 32; }

/* the largest |x| of n that is not NaN */
static float OF(widest)(const TYPE *x, long n) {
    float most = 0;
    #pragma omp simd reduction(max:most)
    for (long i = 0; i < n; i++) most = fabsf(OF(up)(x[i])) > most ? fabsf(OF(up)(x[i])) : most;
    return most;
}

/* y = sin(w x + phi) tanh(x) + b: x, y (M, N), the others (N). Angles beyond FAR go to libm. */
void OF(osc)(const TYPE *restrict x, const float *restrict w, const float *restrict phi,
              const float *restrict b, TYPE *restrict y, long M, long N, int threads) {
    float most = widest_f32(w, N), more = widest_f32(phi, N);
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long m = 0; m < M; m++) {
        int far = most * OF(widest)(x + m * N, N) + more >= FAR;
        #pragma omp simd
        for (long n = 0; n < N; n++) {
            float v = OF(up)(x[m * N + n]), z = w[n] * v + phi[n];
            y[m * N + n] = OF(down)(sine(z) * tanh_of(v) + b[n]);
        }
        for (long n = 0; far && n < N; n++) {
            float v = OF(up)(x[m * N + n]), z = w[n] * v + phi[n];
            if (!(fabsf(z) < FAR)) y[m * N + n] = OF(down)(sinf(z) * tanh_of(v) + b[n]);
        }
    }
}

static inline void OF(osc_slopes)(const TYPE *x, const TYPE *g, TYPE *dx, float w, float phi, float *dw,
                                   float *dphi, float *db, int far) {
    float v = OF(up)(*x), up = OF(up)(*g), z = w * v + phi, t = tanh_of(v), s = far ? sinf(z) : sine(z);
    float slope = up * (far ? cosf(z) : cosine(z)) * t;
    *dx = OF(down)(slope * w + up * s * (1 - t * t));
    *dw += slope * v;
    *dphi += slope;
    *db += up;
}

/* Its gradients from g (M, N): dx (M, N); dw, dphi and db (N), which begin at zero */
void OF(osc_back)(const TYPE *restrict x, const float *restrict w, const float *restrict phi,
                   const TYPE *restrict g, TYPE *restrict dx, float *restrict dw, float *restrict dphi,
                   float *restrict db, long M, long N, int threads) {
    long chunk = OF(share)(N, threads);
    float most = widest_f32(w, N), more = widest_f32(phi, N);
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long from = 0; from < N; from += chunk) {
        long to = N - from < chunk ? N : from + chunk;
        for (long m = 0; m < M; m++) {
            const TYPE *X = x + m * N, *G = g + m * N;
            TYPE *D = dx + m * N;
            if (most * OF(widest)(X + from, to - from) + more >= FAR)
                for (long n = from; n < to; n++)
                    OF(osc_slopes)(X + n, G + n, D + n, w[n], phi[n], dw + n, dphi + n, db + n, 1);
            else
                #pragma omp simd
                for (long n = from; n < to; n++)
                    OF(osc_slopes)(X + n, G + n, D + n, w[n], phi[n], dw + n, dphi + n, db + n, 0);
        }
    }
}

/* 2:4 rows, v and meta, as dense ones of K weights */
void OF(unpack24)(const TYPE *v, const uint32_t *meta, TYPE *dense, long N, long K, long words,
                   int threads) {
    #pragma omp parallel num_threads(threads)
    {
        BUFFER(uint32_t, kept, words);
        #pragma omp for schedule(static)
        for (long n = 0; n < N; n++) {
            const uint32_t *places = meta + n * words;
            #pragma omp simd
            for (long k = 0; k < words; k++) kept[k] = kept_of(places[k]);
            for (long k = 0; k < K; k += 32)
                OF(expand)(v + n * words * 16 + k / 2, places[k / 32], kept[k / 32], dense + n * K + k,
                           K - k < 32 ? K - k : 32);
        }
        RELEASE(kept);
    }
}

/* w (N, K) in 8 bits: q = w / scale[n] to nearest, scale[n] = max |w[n]| / 127, error[n] = the length of
   w[n] - scale[n] q[n], and what sums in fp32 may add. A row with NaN has a NaN for its error. */
void OF(copy8)(const TYPE *w, int8_t *q, float *scale, float *error, long N, long K, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < N; n++) {
        const TYPE *row = w + n * K;
        float most = 1e-30f, off = 0, size = 0;
        #pragma omp simd reduction(max:most)
        for (long k = 0; k < K; k++) {
            float a = fabsf(OF(up)(row[k]));
            most = a > most ? a : most;
        }
        float by = scale[n] = most / 127, times = 127 / most;
        #pragma omp simd reduction(+:off, size)
        for (long k = 0; k < K; k++) {
            float v = OF(up)(row[k]), whole = rintf(v * times);
            whole = whole > -127 ? whole < 127 ? whole : 127 : -127;     /* NaN: -127 */
            q[n * K + k] = (int8_t)(int)whole;
            off += (v - by * whole) * (v - by * whole);
            size += v * v;
        }
        error[n] = 1.001f * sqrtf(off) + 2e-7f * K * sqrtf(size) + 1e-16f;    /* squares may underflow */
    }
}

/* y = softmax(q . K / sqrt(D)) V of one query of floats over S keys and values, (S, D) each; score: S floats */
static void OF(look)(const float *restrict q, const TYPE *restrict K, const TYPE *restrict V,
                      float *restrict y, float *restrict score, long S, long D) {
    float scale = 1.0f / sqrtf((float)D), top = -INFINITY, total = 0;
    long j = 0, four = 4 * D * sizeof(TYPE);
    for (; j + 4 <= S; j += 4) {
        const TYPE *k = K + j * D;
        float a = 0, b = 0, c = 0, e = 0;
        fetch(k + LOOK * D, four);
        #pragma omp simd reduction(+:a, b, c, e)
        for (long d = 0; d < D; d++) {
            a += q[d] * OF(up)(k[d]);
            b += q[d] * OF(up)(k[d + D]);
            c += q[d] * OF(up)(k[d + 2 * D]);
            e += q[d] * OF(up)(k[d + 3 * D]);
        }
        score[j] = scale * a;
        score[j + 1] = scale * b;
        score[j + 2] = scale * c;
        score[j + 3] = scale * e;
    }
    for (; j < S; j++) {
        float a = 0;
        #pragma omp simd reduction(+:a)
        for (long d = 0; d < D; d++) a += q[d] * OF(up)(K[j * D + d]);
        score[j] = scale * a;
    }
    fetch(V, LOOK * D * sizeof(TYPE));
    #pragma omp simd reduction(max:top)
    for (j = 0; j < S; j++) top = score[j] > top ? score[j] : top;
    #pragma omp simd reduction(+:total)
    for (j = 0; j < S; j++) total += score[j] = exp_of(score[j] - top);
    for (long d = 0; d < D; d++) y[d] = 0;
    for (j = 0; j + 4 <= S; j += 4) {
        const TYPE *v = V + j * D;
        fetch(v + LOOK * D, four);
        #pragma omp simd
        for (long d = 0; d < D; d++)
            y[d] += score[j] * OF(up)(v[d]) + score[j + 1] * OF(up)(v[d + D])
                  + score[j + 2] * OF(up)(v[d + 2 * D]) + score[j + 3] * OF(up)(v[d + 3 * D]);
    }
    for (; j < S; j++) for (long d = 0; d < D; d++) y[d] += score[j] * OF(up)(V[j * D + d]);
    for (long d = 0; d < D; d++) y[d] /= total;
}

/* sums[c] += sum over live i of by[i] w[rows ? rows[i] : i][from + c], c < width: other rows are not read */
static void OF(add_rows)(float *sums, const float *by, const TYPE *w, const long *rows, const int *live,
                          long n, long C, long from, long width) {
    long i = 0;
    for (; i + 4 <= n; i += 4) {
        const TYPE *row[4], *next[4];
        float b[4];
        for (int l = 0; l < 4; l++) {
            long j = live[i + l], k = i + l + 4 < n ? live[i + l + 4] : live[n - 1];
            b[l] = by[j];
            row[l] = w + (rows ? rows[j] : j) * C + from;
            next[l] = w + (rows ? rows[k] : k) * C + from;
        }
        long c = 0;
        for (; c + 32 <= width; c += 32) {
            for (int l = 0; l < 4; l++) {
                FETCH(next[l] + c);
                if (sizeof(TYPE) == 4) FETCH(next[l] + c + 16);
            }
            for (long e = c; e < c + 32; e++)
                sums[e] += b[0] * OF(up)(row[0][e]) + b[1] * OF(up)(row[1][e])
                         + b[2] * OF(up)(row[2][e]) + b[3] * OF(up)(row[3][e]);
        }
        for (; c < width; c++)
            for (int l = 0; l < 4; l++) sums[c] += b[l] * OF(up)(row[l][c]);
    }
    for (; i < n; i++) {
        const TYPE *row = w + (rows ? rows[live[i]] : live[i]) * C + from;
        for (long c = 0; c < width; c++) sums[c] += by[live[i]] * OF(up)(row[c]);
    }
}
