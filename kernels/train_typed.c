/* What training does between two products of an MLP, forward and backward in one pass each: included by cpu.c
   for each TYPE, as cpu_typed.c is. Tokens are rows; sums over them run in one order for any number of
   threads. act: 0 squared ReLU of what is given, 2 none. Values are rounded where torch would store them. */

static inline float OF(rounded)(float f) { return OF(up)(OF(down)(f)); }
static inline float OF(relu)(float v) { return v <= 0 ? 0 : v; }
static inline float OF(act2)(float v) { return v <= 0 ? 0 : OF(rounded)(v * v); }

/* a = act(v), n of them, and what they are compared by */
static void OF(sizes)(const TYPE *restrict v, TYPE *restrict a, int32_t *restrict rank, long n, int act) {
    if (act == 2) {
        #pragma omp simd
        for (long i = 0; i < n; i++) { a[i] = v[i]; rank[i] = OF(rank)(fabsf(OF(up)(v[i]))); }
    } else {
        #pragma omp simd
        for (long i = 0; i < n; i++) {
            float s = OF(act2)(OF(up)(v[i]));
            a[i] = OF(down)(s);
            rank[i] = OF(rank)(s);
        }
    }
}

/* all of a but those of the k largest ranks become zero; of equal ones the first stay. won: 1 for these */
static void OF(leave)(TYPE *restrict a, uint8_t *restrict won, const int32_t *restrict rank, long n, long k) {
    largest(won, rank, n, k);
    #pragma omp simd
    for (long i = 0; i < n; i++) a[i] = OF(only)(a[i], won[i]);
}

/* the same of every four, of which two stay */
static void OF(leave_two)(TYPE *restrict a, uint8_t *restrict won, const int32_t *restrict rank, long n) {
    for (long i = 0; i < n; i += 4) {
        int32_t p = rank[i], q = rank[i + 1], r = rank[i + 2], s = rank[i + 3];
        int pq = p >= q, pr = p >= r, ps = p >= s, qr = q >= r, qs = q >= s, rs = r >= s;
        int w = pq + pr + ps >= 2, x = !pq + qr + qs >= 2, y = !pr + !qr + rs >= 2, z = !ps + !qs + !rs >= 2;
        won[i] = w; won[i + 1] = x; won[i + 2] = y; won[i + 3] = z;
        a[i] = w ? a[i] : 0;
        a[i + 1] = x ? a[i + 1] : 0;
        a[i + 2] = y ? a[i + 2] : 0;
        a[i + 3] = z ? a[i + 3] : 0;
    }
}

/* kept = act(v) with all but the k largest |act(v)| of every `group` neighbours of a token at zero; won: 1 at
   the places of those, 0 elsewhere. v (M, n) */
void OF(fire)(const TYPE *v, TYPE *kept, uint8_t *won, long M, long n, long group, long k, int act,
               int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long m = 0; m < M; m++) {
        BUFFER(int32_t, rank, n);
        OF(sizes)(v + m * n, kept + m * n, rank, n, act);
        if (group == 4 && k == 2) OF(leave_two)(kept + m * n, won + m * n, rank, n);
        else
            for (long i = m * n; i < (m + 1) * n; i += group)
                OF(leave)(kept + i, won + i, rank + i - m * n, group, k);
        RELEASE(rank);
    }
}

/* won: 1 at the places of the k largest of each row of scores s (M, n), 0 elsewhere */
void OF(winners)(const TYPE *restrict s, uint8_t *restrict won, long M, long n, long k, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long m = 0; m < M; m++) {
        BUFFER(int32_t, rank, n);
        #pragma omp simd
        for (long i = 0; i < n; i++) rank[i] = OF(rank)(OF(up)(s[m * n + i]));
        largest(won + m * n, rank, n, k);
        RELEASE(rank);
    }
}

/* Its gradient from g: that of the places that won, behind act's */
void OF(fire_back)(const TYPE *restrict g, const TYPE *restrict v, const uint8_t *restrict won,
                    TYPE *restrict dv, long M, long n, int act, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long m = 0; m < M; m++) {
        const TYPE *G = g + m * n, *V = v + m * n;
        const uint8_t *W = won + m * n;
        TYPE *D = dv + m * n;
        if (act == 2) {
            #pragma omp simd
            for (long i = 0; i < n; i++) D[i] = OF(only)(G[i], W[i]);
        } else {
            #pragma omp simd
            for (long i = 0; i < n; i++) {
                float x = OF(up)(V[i]), up = OF(up)(OF(only)(G[i], W[i]));
                D[i] = OF(only)(OF(down)(up * (2 * x)), !(x <= 0));
            }
        }
    }
}

/* kept = a * gate, gate 1 where |a| > theta (n), a = act(v), v (M, n); open (M): how many gates are */
void OF(event)(const TYPE *restrict v, const float *restrict theta, TYPE *restrict kept, float *restrict open,
                long M, long n, int act, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long m = 0; m < M; m++) {
        int count = 0;
        #pragma omp simd reduction(+:count)
        for (long i = 0; i < n; i++) {
            float x = OF(up)(v[m * n + i]), a = act == 2 ? x : OF(act2)(x);
            int gate = fabsf(a) > theta[i];
            kept[m * n + i] = OF(down)(a * (float)gate);
            count += gate;
        }
        open[m] = count;
    }
}

/* Its gradients from g (M, n), or 0, and of open (M): dv (M, n), and dlog (n) for log theta, by a step that
   counts as a sigmoid of log |a| - log theta, whose slope is |a| theta / (|a| + theta)^2 */
void OF(event_back)(const TYPE *restrict g, const float *restrict of_open, const TYPE *restrict v,
                     const float *restrict theta, TYPE *restrict dv, float *restrict dlog, long M, long n,
                     int act, int threads) {
    long chunk = OF(share)(n, threads);
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long from = 0; from < n; from += chunk) {
        long to = n - from < chunk ? n : from + chunk;
        for (long i = from; i < to; i++) dlog[i] = 0;
        for (long m = 0; m < M; m++) {
            const TYPE *G = g + m * n, *V = v + m * n;
            TYPE *D = dv + m * n;
            float more = of_open[m];
            if (act == 2) {
                #pragma omp simd
                for (long i = from; i < to; i++) {
                    float x = OF(up)(V[i]), up = OF(up)(G[i]);
                    dlog[i] -= (OF(rounded)(up * x) + more) * step_slope(fabsf(x), theta[i]);
                    D[i] = OF(down)(up * (float)(fabsf(x) > theta[i]));
                }
            } else {
                #pragma omp simd
                for (long i = from; i < to; i++) {
                    float x = OF(up)(V[i]), up = OF(up)(G[i]), a = OF(act2)(x);
                    dlog[i] -= (OF(rounded)(up * a) + more) * step_slope(a, theta[i]);
                    float da = OF(rounded)(up * (float)(a > theta[i])) * (2 * x);
                    D[i] = OF(down)(x <= 0 ? 0 : da);
                }
            }
        }
    }
}

static inline TYPE OF(times)(TYPE v, float gate, const int act) {
    return OF(down)((act == 2 ? OF(up)(v) : OF(act2)(OF(up)(v))) * gate);
}

/* y = act(v) times a gate, width of them. Eight at a time, for columns are narrow; called with a constant. */
static inline __attribute__((always_inline)) void OF(one_scaled)(const TYPE *restrict v, TYPE *restrict y, float gate,
                                                                 long width, const int act) {
    long i = 0;
    for (; i + 8 <= width; i += 8)
        #pragma omp simd
        for (int j = 0; j < 8; j++) y[i + j] = OF(times)(v[i + j], gate, act);
    for (; i < width; i++) y[i] = OF(times)(v[i], gate, act);
}

/* y = act(v) times its column's gate, and 0 where that is 0: v (M, N, width), gates (M, N) */
void OF(scale)(const TYPE *restrict v, const TYPE *restrict gates, TYPE *restrict y, long M, long N,
                long width, int act, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long m = 0; m < M; m++)
        for (long c = m * N; c < (m + 1) * N; c++) {
            float gate = OF(up)(gates[c]);
            const TYPE *V = v + c * width;
            TYPE *Y = y + c * width;
            if (gate == 0) memset(Y, 0, width * sizeof(TYPE));
            else if (act == 2) OF(one_scaled)(V, Y, gate, width, 2);
            else OF(one_scaled)(V, Y, gate, width, 0);
        }
}

/* The gradients of one unit: dv -> what it adds to dgate */
static inline float OF(unit_back)(TYPE g, TYPE v, TYPE *dv, float gate, const int act) {
    float x = OF(up)(v), up = gate == 0 ? 0 : OF(up)(g), da = OF(rounded)(up * gate), slope = x <= 0 ? 0 : da * (2 * x);
    *dv = OF(down)(act == 2 ? da : slope);
    return OF(rounded)(up * (act == 2 ? x : OF(act2)(x)));
}

/* Those of one gate: dv (width) -> dgate. Eight units at a time, for columns are narrow; called with a constant. */
static inline __attribute__((always_inline)) float OF(one_back)(const TYPE *restrict g, const TYPE *restrict v,
                                                                TYPE *restrict dv, float gate, long width,
                                                                const int act) {
    float sums[8] = {0}, sum = 0;
    long i = 0;
    for (; i + 8 <= width; i += 8)
        #pragma omp simd
        for (int j = 0; j < 8; j++) sums[j] += OF(unit_back)(g[i + j], v[i + j], dv + i + j, gate, act);
    for (int j = 0; j < 8; j++) sum += sums[j];
    for (; i < width; i++) sum += OF(unit_back)(g[i], v[i], dv + i, gate, act);
    return sum;
}

/* Is one of n infinite or NaN? */
static inline int OF(odd)(const TYPE *restrict v, long n) {
    int odd = 0;
    #pragma omp simd reduction(|:odd)
    for (long i = 0; i < n; i++) odd |= !(fabsf(OF(up)(v[i])) <= FLT_MAX);
    return odd;
}

/* Its gradients from g: dv (M, N, width), dgates (M, N). Behind a gate that is 0 they are 0 times v: zeros. */
void OF(scale_back)(const TYPE *restrict g, const TYPE *restrict v, const TYPE *restrict gates,
                     TYPE *restrict dv, TYPE *restrict dgates, long M, long N, long width, int act,
                     int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long m = 0; m < M; m++) {
        memset(dv + m * N * width, 0, N * width * sizeof(TYPE));
        memset(dgates + m * N, 0, N * sizeof(TYPE));
        int odd = OF(odd)(v + m * N * width, N * width);
        for (long c = m * N; c < (m + 1) * N; c++) {
            float gate = OF(up)(gates[c]);
            const TYPE *G = g + c * width, *V = v + c * width;
            TYPE *D = dv + c * width;
            if (gate != 0 || odd)
                dgates[c] = OF(down)(act == 2 ? OF(one_back)(G, V, D, gate, width, 2)
                                     : OF(one_back)(G, V, D, gate, width, 0));
        }
    }
}

/* The cross-entropy of guesses z (M, n) that a unit of a (M, n) is not zero, summed: loss (M), and its slope in z */
void OF(miss)(const TYPE *restrict z, const TYPE *restrict a, float *restrict loss, TYPE *restrict slope, long M,
               long n, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long m = 0; m < M; m++) {
        float sum = 0;
        #pragma omp simd reduction(+:sum)
        for (long i = m * n; i < (m + 1) * n; i++) {
            float x = OF(up)(z[i]), lost = OF(up)(a[i]) == 0, e = exp_of(-fabsf(x)), one = x < 0 ? e : 1;
            sum += lost * x + ((x < 0 ? -x : 0) + log1p_of(e));
            slope[i] = OF(down)(one / (1 + e) - (1 - lost));
        }
        loss[m] = sum;
    }
}

/* Its gradient for z from that of the losses, g (M) */
void OF(miss_back)(const float *restrict g, const TYPE *restrict slope, TYPE *restrict dz, long M, long n,
                    int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long m = 0; m < M; m++)
        #pragma omp simd
        for (long i = m * n; i < (m + 1) * n; i++) dz[i] = OF(down)(g[m] * OF(up)(slope[i]));
}

/* y = squared ReLU of v, n of them, and its gradient from g */
void OF(relu2)(const TYPE *restrict v, TYPE *restrict y, long n, int threads) {
    #pragma omp parallel for simd num_threads(threads) schedule(static)
    for (long i = 0; i < n; i++) y[i] = OF(down)(OF(act2)(OF(up)(v[i])));
}
void OF(relu2_back)(const TYPE *restrict g, const TYPE *restrict v, TYPE *restrict dv, long n, int threads) {
    #pragma omp parallel for simd num_threads(threads) schedule(static)
    for (long i = 0; i < n; i++) {
        float x = OF(up)(v[i]);
        dv[i] = OF(only)(OF(down)(OF(up)(g[i]) * (2 * x)), !(x <= 0));
    }
}

/* y = x over its root mean square, times the gain w (n) if there is one; by (M, H): one over that root. Rows of
   x, H times n each, lie `stride` apart; those of y and dx without gaps. Rounded as F.rms_norm does. */
void OF(norm)(const TYPE *restrict x, const TYPE *restrict w, TYPE *restrict y, float *restrict by, long M,
               long H, long n, long stride, float eps, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long m = 0; m < M; m++)
        for (long h = 0; h < H; h++) {
            const TYPE *X = x + m * stride + h * n;
            TYPE *Y = y + (m * H + h) * n;
            float sum = 0, r;
            #pragma omp simd reduction(+:sum)
            for (long i = 0; i < n; i++) sum += OF(up)(X[i]) * OF(up)(X[i]);
            by[m * H + h] = r = 1 / sqrtf(sum / n + eps);
            if (w)
                #pragma omp simd
                for (long i = 0; i < n; i++) Y[i] = OF(down)(OF(up)(X[i]) * r * OF(up)(w[i]));
            else
                #pragma omp simd
                for (long i = 0; i < n; i++) Y[i] = OF(down)(OF(up)(X[i]) * r);
        }
}

/* Its gradients from g (M, H, n): dx, and with a gain dw (n), for which H is 1 */
void OF(norm_back)(const TYPE *restrict g, const TYPE *restrict x, const TYPE *restrict w,
                    const float *restrict by, TYPE *restrict dx, float *restrict dw, long M, long H, long n, long stride, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long m = 0; m < M; m++)
        for (long h = 0; h < H; h++) {
            const TYPE *X = x + m * stride + h * n, *G = g + (m * H + h) * n;
            TYPE *D = dx + (m * H + h) * n;
            float r = by[m * H + h], sum = 0;
            if (w) {
                #pragma omp simd reduction(+:sum)
                for (long i = 0; i < n; i++) sum += OF(up)(G[i]) * OF(up)(w[i]) * OF(up)(X[i]);
                sum *= r * r / n;
                #pragma omp simd
                for (long i = 0; i < n; i++)
                    D[i] = OF(down)(r * (OF(up)(G[i]) * OF(up)(w[i]) - OF(up)(X[i]) * sum));
            } else {
                #pragma omp simd reduction(+:sum)
                for (long i = 0; i < n; i++) sum += OF(up)(G[i]) * OF(up)(X[i]);
                sum *= r * r / n;
                #pragma omp simd
                for (long i = 0; i < n; i++) D[i] = OF(down)(r * (OF(up)(G[i]) - OF(up)(X[i]) * sum));
            }
        }
    if (!w) return;
    long chunk = OF(share)(n, threads);
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long from = 0; from < n; from += chunk) {
        long to = n - from < chunk ? n : from + chunk;
        for (long i = from; i < to; i++) dw[i] = 0;
        for (long m = 0; m < M; m++) {
            const TYPE *X = x + m * stride, *G = g + m * n;
            float r = by[m];
            #pragma omp simd
            for (long i = from; i < to; i++) dw[i] += OF(up)(G[i]) * OF(up)(X[i]) * r;
        }
    }
}

/* y (B, T, H, n) = x turned by its token's angles: the halves (a, z) to (a cos + z sin, z cos + a sin), of the
   tables' (T, n) halves. Tokens of x lie `of_b`, `of_t` and `of_h` apart. back: the turn's gradient. */
void OF(rotate)(const TYPE *restrict x, const TYPE *restrict cos, const TYPE *restrict sin, TYPE *restrict y,
                long B, long T, long H, long n, long of_b, long of_t, long of_h, int back, int threads) {
    long half = n / 2, first = back ? half : 0, second = half - first;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long m = 0; m < B * T; m++) {
        const TYPE *C = cos + m % T * n, *S = sin + m % T * n;
        for (long h = 0; h < H; h++) {
            const TYPE *X = x + m / T * of_b + m % T * of_t + h * of_h;
            TYPE *Y = y + (m * H + h) * n;
            #pragma omp simd
            for (long i = 0; i < half; i++) {
                float a = OF(up)(X[i]), z = OF(up)(X[i + half]);
                Y[i] = OF(down)(OF(rounded)(a * OF(up)(C[i])) + z * OF(up)(S[i + first]));
                Y[i + half] = OF(down)(OF(rounded)(z * OF(up)(C[i + half])) + a * OF(up)(S[i + second]));
            }
        }
    }
}

/* Which of N columns answer a token, and how much. Scores s (M, N) less what the others' activity inhibits,
   z_c = s_c - sum over d of relu(s_d) from[d][c]; of z + balance the k largest win, of equal ones the first.
   gates = sigmoid(z) of winners, else 0; slope: its derivative there. */
void OF(gates)(const float *restrict s, const float *restrict from, const float *restrict balance,
                TYPE *restrict gates, float *restrict slope, long M, long N, long k, int threads) {
    int odd = odd_f32(from, N * N);                             /* 0 times infinity is NaN, and is to show */
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long m = 0; m < M; m++) {
        const float *row = s + m * N;
        float *z = slope + m * N;
        TYPE *gate = gates + m * N;
        long ties;
        BUFFER(int32_t, rank, N);
        memcpy(z, row, N * sizeof(float));
        BUFFER(int32_t, active, N);
        int32_t count = 0, i = 0;
        for (long d = 0; d < N; d++) { active[count] = d; count += odd | !(row[d] <= 0); }
        for (; i + 4 <= count; i += 4) {
            const int32_t *d = active + i;
            const float *p = from + d[0] * N, *q = from + d[1] * N, *r = from + d[2] * N, *t = from + d[3] * N;
            float a = OF(relu)(row[d[0]]), b = OF(relu)(row[d[1]]), e = OF(relu)(row[d[2]]), f = OF(relu)(row[d[3]]);
            #pragma omp simd
            for (long c = 0; c < N; c++) z[c] -= (a * p[c] + b * q[c]) + (e * r[c] + f * t[c]);
        }
        for (; i < count; i++) {
            const float *p = from + active[i] * N;
            float a = OF(relu)(row[active[i]]);
            #pragma omp simd
            for (long c = 0; c < N; c++) z[c] -= a * p[c];
        }
        RELEASE(active);
        #pragma omp simd
        for (long c = 0; c < N; c++) rank[c] = rank_of(z[c] + balance[c]);
        int32_t edge = edge_of(rank, N, k, &ties);
        if (ties) {                                             /* of equal ones the later fall below */
            for (long c = 0; c < N; c++)
                if (rank[c] == edge && ties-- <= 0) rank[c] = INT32_MIN;
            edge--;
        }
        #pragma omp simd
        for (long c = 0; c < N; c++) {
            float open = 1 / (1 + exp_of(-z[c]));
            gate[c] = OF(down)(rank[c] > edge ? open : 0);
            z[c] = rank[c] > edge ? open * (1 - open) : 0;
        }
        RELEASE(rank);
    }
}

/* Its gradients from g (M, N): ds, and of what column d inhibits column c by, dto[c][d]; to: the same, from
   the other side */
void OF(gates_back)(const TYPE *restrict g, const float *restrict slope, const float *restrict s,
                     const float *restrict to, float *restrict ds, float *restrict dto, long M, long N,
                     int threads) {
    int odd = odd_f32(to, N * N);
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long m = 0; m < M; m++) {
        float *D = ds + m * N;
        BUFFER(float, sum, N);
        BUFFER(int32_t, winner, N);
        int32_t count = 0;
        for (long c = 0; c < N; c++) {
            sum[c] = 0;
            D[c] = OF(up)(g[m * N + c]) * slope[m * N + c];
            winner[count] = c;
            count += odd | (D[c] != 0);
        }
        for (int32_t i = 0; i < count; i++) {
            long c = winner[i];
            float dz = D[c];
            #pragma omp simd
            for (long d = 0; d < N; d++) sum[d] += dz * to[c * N + d];
        }
        RELEASE(winner);
        #pragma omp simd
        for (long d = 0; d < N; d++) D[d] -= s[m * N + d] > 0 ? sum[d] : 0;
        RELEASE(sum);
    }
    long chunk = (N + threads - 1) / threads;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long first = 0; first < N; first += chunk) {
        long end = N - first < chunk ? N : first + chunk;
        BUFFER(int32_t, winner, N);
        BUFFER(float, active, N);
        for (long i = first * N; i < end * N; i++) dto[i] = 0;
        for (long m = 0; m < M; m++) {
            int32_t count = 0;
            for (long c = first; c < end; c++) { winner[count] = c; count += slope[m * N + c] != 0; }
            #pragma omp simd
            for (long d = 0; d < N; d++) active[d] = s[m * N + d] > 0 ? s[m * N + d] : 0;
            for (int32_t i = 0; i < count; i++) {
                long c = winner[i];
                float dz = OF(up)(g[m * N + c]) * slope[m * N + c];
                #pragma omp simd
                for (long d = 0; d < N; d++) dto[c * N + d] -= dz * active[d];
            }
        }
        RELEASE(active);
        RELEASE(winner);
    }
}
