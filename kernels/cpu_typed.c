/* Included by cpu.c for each TYPE of weight; OF(name) is the name of that type's function. */
#define AHEAD (4096 / (long)sizeof(TYPE))   /* weights that stream from memory are fetched 4 KB ahead */

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

/* M vectors x (M, K), each summed as it would be alone; a row of w is read from memory once for all */
void OF(matvec)(const TYPE *w, const TYPE *x, const TYPE *bias, TYPE *y, long M, long N, long K,
                 int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < N; n++) {
        const TYPE *row = w + n * K;
        float b = bias ? OF(up)(bias[n]) : 0.0f;
        y[n] = OF(down)(OF(dot)(row, x, K, row + AHEAD) + b);
        for (long m = 1; m < M; m++) y[m * N + n] = OF(down)(OF(dot)(row, x + m * K, K, row) + b);
    }
}

/* A 2:4 row . x with the products of its zeros, which are NaN where x is not finite */
static float OF(all24)(const TYPE *v, const uint32_t *meta, const TYPE *x, long K) {
    float s = 0;
    for (long k = 0; k < K; k++) {
        uint32_t pair = meta[k / 32] >> k % 32 / 4 * 4;
        float w = (pair & 3) == k % 4 ? OF(up)(v[k / 4 * 2]) : 0;
        w = (pair >> 2 & 3) == k % 4 ? OF(up)(v[k / 4 * 2 + 1]) : w;
        s += w * OF(up)(x[k]);
    }
    return s;
}

/* The same with 2:4 rows, v (N, K/2 and padding) and meta; y = act(w . x + bias) + onto. act: 2 none,
   0 squared ReLU, 1 GELU. */
void OF(matvec24)(const TYPE *v, const uint32_t *meta, const TYPE *x, const TYPE *bias, const TYPE *onto,
                   TYPE *y, long M, long N, long K, long words, int act, int threads) {
    float nothing = 0;                                          /* NaN where some x is not finite */
    #pragma omp simd reduction(+:nothing)
    for (long i = 0; i < M * K; i++) nothing += 0 * OF(up)(x[i]);
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < N; n++)
        for (long m = 0; m < M; m++) {
            const TYPE *row = v + n * words * 16;
            const uint32_t *places = meta + n * words;
            float s = nothing == 0 ? OF(dot24)(row, places, x + m * K, K)
                                   : OF(all24)(row, places, x + m * K, K);
            s = activate(s + (bias ? OF(up)(bias[n]) : 0.0f), act);
            y[m * N + n] = OF(down)(s + (onto ? OF(up)(onto[m * N + n]) : 0.0f));
        }
}

/* 2:4 rows, v and meta, as dense ones of K weights */
void OF(unpack24)(const TYPE *v, const uint32_t *meta, TYPE *dense, long N, long K, long words,
                   int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < N; n++) {
        const TYPE *kept = v + n * words * 16;
        TYPE *row = dense + n * K;
        memset(row, 0, K * sizeof(TYPE));
        for (long k = 0; k < K; k += 4) {
            uint32_t pair = meta[n * words + k / 32] >> k % 32;
            row[k + (pair & 3)] = kept[k / 2];
            row[k + (pair >> 2 & 3)] = kept[k / 2 + 1];
        }
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

/* y = w x where the result can be among the k largest of the N rows, -inf elsewhere; those rows alone are
   read. scale[n] q[n] is w[n] in 8 bits, and |w[n] . x - scale[n] q[n] . x| <= error[n] |x|. Rounding to
   TYPE moves a result by `round` of itself. Returns how many rows were read. */
long OF(screened)(const int8_t *q, const float *scale, const float *error, const TYPE *w, const TYPE *x,
                   TYPE *y, uint32_t *low, float *high, float round, long N, long K, long k, int threads) {
    BUFFER(float, wide, K);
    float size = 0;
    long count = 0;
    for (long i = 0; i < K; i++) {
        wide[i] = OF(up)(x[i]);
        size += wide[i] * wide[i];
    }
    size = sqrtf(size);
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < N; n++) {
        float about = scale[n] * dot_i8(q + n * K, wide, K), off = error[n] * size;
        off += round * (fabsf(about) + off);
        low[n] = order(about - off);
        high[n] = about + off;
    }
    uint32_t edge = kth(low, N, k < N ? k : N);
    #pragma omp parallel for num_threads(threads) schedule(static) reduction(+:count)
    for (long n = 0; n < N; n++) {
        int can = order(high[n]) >= edge;                       /* NaN is read too */
        y[n] = can ? OF(down)(OF(dot)(w + n * K, x, K, w + n * K)) : OF(down)(-INFINITY);
        count += can;
    }
    RELEASE(wide);
    return count;
}

/* softmax(scale Q . K) V of one query over S keys and values, whose rows lie `ks` and `vs` apart */
static void OF(query)(const TYPE *Q, const TYPE *K, const TYPE *V, TYPE *y, long S, long D, long ks,
                       long vs) {
    float scale = 1.0f / sqrtf((float)D), top = -INFINITY, total = 0;
    BUFFER(float, score, S);
    BUFFER(float, sums, D);
    for (long j = 0; j < S; j++) {
        score[j] = scale * OF(dot)(K + j * ks, Q, D, K + j * ks + AHEAD);
        top = score[j] > top ? score[j] : top;
    }
    for (long d = 0; d < D; d++) sums[d] = 0;
    for (long j = 0; j < S; j++) {
        float p = expf(score[j] - top);
        const TYPE *row = V + j * vs;
        total += p;
        for (long d = 0; d < D; d++) sums[d] += p * OF(up)(row[d]);
    }
    for (long d = 0; d < D; d++) y[d] = OF(down)(sums[d] / total);
    RELEASE(score);
    RELEASE(sums);
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

/* one query per head: q, y (B, H, D), k, v (B, H, S, D), last axis dense */
void OF(attend)(const TYPE *q, const TYPE *k, const TYPE *v, TYPE *y, long B, long H, long S, long D,
                 const long *qs, const long *ks, const long *vs, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long bh = 0; bh < B * H; bh++) {
        long b = bh / H, h = bh % H;
        OF(query)(q + b * qs[0] + h * qs[1], k + b * ks[0] + h * ks[1], v + b * vs[0] + h * vs[1],
                   y + bh * D, S, D, ks[2], vs[2]);
    }
}

static inline const TYPE *OF(row)(const TYPE *w, const long *rows, long i, long n, long K) {
    i = i < n ? i : n - 1;
    return w + (rows ? rows[i] : i) * K;
}

/* y[m, i] = w[rows[i]] . x[m] + bias[rows[i]]: each row of w in `rows` is read once */
void OF(rows_dot)(const TYPE *w, const TYPE *x, const TYPE *bias, const long *rows, TYPE *y,
                   long M, long n, long K, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < n; i++) {
        const TYPE *row = w + rows[i] * K, *ahead = OF(row)(w, rows, i + SOON, n, K);
        float start = bias ? OF(up)(bias[rows[i]]) : 0.0f;
        for (long m = 0; m < M; m++) y[m * n + i] = OF(down)(start + OF(dot)(row, x + m * K, K, ahead));
    }
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

/* y[m] = sum_i a[m, i] w[rows ? rows[i] : i] + bias: rows of zeros in a are never read */
void OF(rows_sum)(const TYPE *a, const TYPE *w, const TYPE *bias, const long *rows, TYPE *y,
                   long M, long n, long C, int threads) {
    long chunk = OF(share)(C, threads);
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long from = 0; from < C; from += chunk) {
        long width = C - from < chunk ? C - from : chunk;
        BUFFER(float, sums, width);
        BUFFER(float, by, n);
        BUFFER(int, live, n);
        for (long m = 0; m < M; m++) {
            long count = 0;
            for (long c = 0; c < width; c++) sums[c] = bias ? OF(up)(bias[from + c]) : 0.0f;
            for (long i = 0; i < n; i++) {
                by[i] = OF(up)(a[m * n + i]);
                live[count] = i;
                count += by[i] != 0;
            }
            OF(add_rows)(sums, by, w, rows, live, count, C, from, width);
            for (long c = 0; c < width; c++) y[m * C + from + c] = OF(down)(sums[c]);
        }
        RELEASE(sums);
        RELEASE(by);
        RELEASE(live);
    }
}

/* kept = a with all but the k largest |a| of each token at zero; of equal ones the first are kept. won, where
   it is given: 1 at the places of those, 0 elsewhere */
void OF(keep_largest)(const TYPE *a, TYPE *kept, uint8_t *won, long M, long n, long k, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long m = 0; m < M; m++) {
        const TYPE *row = a + m * n;
        BUFFER(uint32_t, size, n);
        BUFFER(uint32_t, part, n);
        for (long i = 0; i < n; i++) part[i] = size[i] = order(fabsf(OF(up)(row[i])));
        uint32_t edge = k < n ? kth(part, n, k) : 0;
        long ties = k;
        for (long i = 0; i < n; i++) ties -= size[i] > edge;
        for (long i = 0; i < n; i++) {
            int wins = size[i] > edge || (size[i] == edge && ties-- > 0);
            kept[m * n + i] = wins ? row[i] : 0;
            if (won) won[m * n + i] = wins;
        }
        RELEASE(size);
        RELEASE(part);
    }
}
#undef AHEAD
