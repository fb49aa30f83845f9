/* What a decoding step does between its matrix products, each in one pass over memory. Compiled when first used (ops.py), once for
 * float32 and once for bfloat16 (-DBF16); arithmetic is float32 in both. D is a head's width, a multiple of 16. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef BF16
typedef uint16_t T;
static inline float load(T x) { uint32_t u = (uint32_t)x << 16; float f; memcpy(&f, &u, 4); return f; }
static inline T store(float f) { /* to nearest, ties to even; NaN stays NaN */
    uint32_t u;
    memcpy(&u, &f, 4);
    return f != f ? 0x7fc0 : (T)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
#else
typedef float T;
static inline float load(T x) { return x; }
static inline T store(float f) { return f; }
#endif

/* e^x for x <= 0 within 2 ulp, without branches, so that loops over it become vector code */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f), r = fmaf(n, -0.693359375f, x);
    r = fmaf(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = fmaf(p, r, 1.3981999507e-3f);
    p = fmaf(p, r, 8.3334519073e-3f);
    p = fmaf(p, r, 4.1665795894e-2f);
    p = fmaf(p, r, 1.6666665459e-1f);
    p = fmaf(p, r, 5.0000001201e-1f);
    p = fmaf(p, r * r, r) + 1.0f;
    int32_t bits;
    memcpy(&bits, &p, 4);
    bits += (int32_t)n << 23;
    memcpy(&p, &bits, 4);
    return p;
}

/* 1 / (1 + e^-x) */
static inline float sigmoid(float x) {
    float e = exponential(-fabsf(x));
    return (x >= 0 ? 1.0f : e) / (1.0f + e);
}

/* out [d] = x [d] / sqrt(mean(x^2) + eps) * (weight [d] + offset); out may be x */
static inline void norm(const T *x, const T *restrict weight, T *out, int64_t d, float eps, float offset) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < d; i++) { float v = load(x[i]); sum += v * v; }
    float scale = 1.0f / sqrtf(sum / d + eps);
    if (offset) /* Gemma rounds once, Llama twice */
#pragma omp simd
        for (int64_t i = 0; i < d; i++) out[i] = store(load(x[i]) * scale * (load(weight[i]) + offset));
    else
#pragma omp simd
        for (int64_t i = 0; i < d; i++) out[i] = store(load(store(load(x[i]) * scale)) * load(weight[i]));
}

/* x [rows, d] += multiplier * y [rows, d] (y may be null), y normalised by the weights `after` if they are not null, and overwritten then;
 * out [rows, d] = x normalised by the weights `before`, if they are not null */
void add_norm(
    T *restrict x, T *restrict y, const T *restrict after, const T *restrict before, T *restrict out, int64_t rows, int64_t d, float eps,
    float offset, float multiplier) {
#pragma omp parallel for if (rows * d > 8192)
    for (int64_t r = 0; r < rows; r++) {
        T *a = x + r * d;
        if (y) {
            T *b = y + r * d;
            if (after) norm(b, after, b, d, eps, offset);
#pragma omp simd
            for (int64_t i = 0; i < d; i++) a[i] = store(load(a[i]) + multiplier * load(b[i]));
        }
        if (before) norm(a, before, out + r * d, d, eps, offset);
    }
}

/* qkv [rows, columns]: from column `begin` on, each of `parts` stretches of d columns is normalised by weight [d] */
void norm_heads(
    T *restrict qkv, const T *restrict weight, int64_t rows, int64_t columns, int64_t begin, int64_t parts, int64_t d, float eps, float offset) {
#pragma omp parallel for if (rows * parts * d > 8192)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t p = 0; p < parts; p++) {
            T *x = qkv + r * columns + begin + p * d;
            norm(x, weight, x, d, eps, offset);
        }
}

/* silu(x) = x sigmoid(x), and tanh's approximation of gelu(x) = x sigmoid(x (linear + cubic x^2)) */
static inline float linear(int64_t gelu) { return gelu ? 2 * 0.7978845608f : 1.0f; }
static inline float cubic(int64_t gelu) { return gelu ? 2 * 0.7978845608f * 0.044715f : 0.0f; }

/* out [rows, d] = silu(gate) * up, or gelu(gate) * up, for gate_up [rows, 2 d] */
void gate(const T *restrict gate_up, T *restrict out, int64_t rows, int64_t d, int64_t gelu) {
    float a = linear(gelu), b = cubic(gelu);
#pragma omp parallel for if (rows * d > 8192)
    for (int64_t r = 0; r < rows; r++) {
        const T *g = gate_up + 2 * r * d, *u = g + d;
        T *o = out + r * d;
#pragma omp simd
        for (int64_t i = 0; i < d; i++) {
            float x = load(g[i]);
            o[i] = store(load(store(x * sigmoid(x * (a + b * x * x)))) * load(u[i]));
        }
    }
}

/* the same of gate and up [n] apart, rounded once */
void gated(const T *restrict gate, const T *restrict up, T *restrict out, int64_t n, int64_t gelu) {
    float a = linear(gelu), b = cubic(gelu);
#pragma omp parallel for simd if (n > 8192)
    for (int64_t i = 0; i < n; i++) {
        float x = load(gate[i]);
        out[i] = store(x * sigmoid(x * (a + b * x * x)) * load(up[i]));
    }
}

/* the gradients of gate and up [n] from that of `gated`; of_up may be the latter */
void gated_backward(const T *gate, const T *up, const T *gradient, T *of_gate, T *of_up, int64_t n, int64_t gelu) {
    float a = linear(gelu), b = cubic(gelu);
#pragma omp parallel for simd if (n > 8192)
    for (int64_t i = 0; i < n; i++) {
        float x = load(gate[i]), g = load(gradient[i]), s = sigmoid(x * (a + b * x * x));
        of_gate[i] = store(g * load(up[i]) * s * (1.0f + x * (1.0f - s) * (a + 3 * b * x * x)));
        of_up[i] = store(g * x * s);
    }
}

/* logits [rows, d] become the derivative of the targets' log-probabilities, which are written to out [rows], under softmax(logits * by) */
void target_logprobs(T *restrict logits, const int64_t *restrict targets, float *restrict out, int64_t rows, int64_t d, float by) {
#pragma omp parallel for
    for (int64_t r = 0; r < rows; r++) {
        T *x = logits + r * d;
        float top = -INFINITY, sum = 0, hit = load(x[targets[r]]);
#pragma omp simd reduction(max : top)
        for (int64_t i = 0; i < d; i++) { float v = load(x[i]); top = v > top ? v : top; }
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < d; i++) sum += exponential((load(x[i]) - top) * by);
        out[r] = (hit - top) * by - logf(sum);
        float weight = by / sum, own = exponential((hit - top) * by);
#pragma omp simd
        for (int64_t i = 0; i < d; i++) x[i] = store(-weight * exponential((load(x[i]) - top) * by));
        x[targets[r]] = store(by - weight * own);
    }
}

/* the first 2 * pairs of D numbers are rotated, the others copied */
static inline void rotate(const T *x, const T *cos, const T *sin, float *out, int D, int pairs) {
#pragma omp simd
    for (int i = 0; i < pairs; i++) {
        float a = load(x[i]), b = load(x[i + pairs]), c = load(cos[i]), s = load(sin[i]);
        out[i] = a * c - b * s;
        out[i + pairs] = b * c + a * s;
    }
    for (int i = 2 * pairs; i < D; i++) out[i] = load(x[i]);
}

/* One row and one key head: rotate, write K and V at position n, attend to positions first .. n. */
static inline __attribute__((always_inline)) void attend_one(
    const T *q, const T *k, const T *v, const T *cos, const T *sin, T *keys, T *values, T *out, float *scores, int64_t first, int64_t n,
    int group, int D, int pairs, float scale, float cap) {
    float query[group * D], key[D], sum[group * D];
    for (int g = 0; g < group; g++) rotate(q + g * D, cos, sin, query + g * D, D, pairs);
    for (int i = 0; i < group * D; i++) query[i] = load(store(query[i])) * scale;
    rotate(k, cos, sin, key, D, pairs);
    for (int i = 0; i < D; i++) keys[n * D + i] = store(key[i]);
    memcpy(values + n * D, v, D * sizeof(T));
    for (int64_t p = first; p <= n; p++) {
        const T *row = keys + p * D;
        for (int i = 0; i < D; i++) key[i] = load(row[i]);
        for (int g = 0; g < group; g++) {
            const float *qg = query + g * D;
            float s = 0;
#pragma omp simd reduction(+ : s)
            for (int i = 0; i < D; i++) s += qg[i] * key[i];
            scores[g * (n + 1) + p] = s;
        }
    }
    for (int g = 0; g < group; g++) {
        float *s = scores + g * (n + 1), top = -INFINITY, total = 0;
        if (cap)
#pragma omp simd
            for (int64_t p = first; p <= n; p++) {
                float e = exponential(-2 * fabsf(s[p] / cap)), tanh = (1.0f - e) / (1.0f + e);
                s[p] = cap * (s[p] < 0 ? -tanh : tanh);
            }
#pragma omp simd reduction(max : top)
        for (int64_t p = first; p <= n; p++) top = s[p] > top ? s[p] : top;
#pragma omp simd reduction(+ : total)
        for (int64_t p = first; p <= n; p++) { s[p] = exponential(s[p] - top); total += s[p]; }
        float inverse = 1.0f / total;
#pragma omp simd
        for (int64_t p = first; p <= n; p++) s[p] *= inverse;
    }
    for (int i = 0; i < group * D; i++) sum[i] = 0;
    for (int64_t p = first; p <= n; p++) {
        const T *row = values + p * D;
        for (int i = 0; i < D; i++) key[i] = load(row[i]);
        for (int g = 0; g < group; g++) {
            float w = scores[g * (n + 1) + p];
            for (int i = 0; i < D; i++) sum[g * D + i] += w * key[i];
        }
    }
    for (int i = 0; i < group * D; i++) out[i] = store(sum[i]);
}

/* Decoding attention. qkv [rows, (heads + 2 kv_heads) D]; cos, sin [positions, pairs]; keys, values [.., kv_heads, width, D] of this layer;
 * row r has at[r] cached positions and its token is written there; a token sees `window` positions. scores: room for rows * heads * longest
 * floats, softly capped unless cap is 0. out [rows, heads D]. */
void attend(
    const T *qkv, const T *cos, const T *sin, T *keys, T *values, const int64_t *at, float *scores, T *out, int64_t rows, int64_t heads,
    int64_t kv_heads, int64_t D, int64_t width, int64_t longest, int64_t pairs, int64_t window, float scale, float cap) {
    int64_t group = heads / kv_heads;
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < rows * kv_heads; i++) {
        int64_t r = i / kv_heads, h = i % kv_heads;
        const T *x = qkv + r * (heads + 2 * kv_heads) * D, *c = cos + at[r] * pairs, *s = sin + at[r] * pairs;
        const T *q = x + h * group * D, *k = x + (heads + h) * D, *v = x + (heads + kv_heads + h) * D;
        T *K = keys + i * width * D, *V = values + i * width * D, *o = out + (r * heads + h * group) * D;
        float *room = scores + i * group * longest;
        int64_t n = at[r], first = n < window ? 0 : n - window + 1;
        if (D == 64 && group == 3) attend_one(q, k, v, c, s, K, V, o, room, first, n, 3, 64, pairs, scale, cap);
        else if (D == 64) attend_one(q, k, v, c, s, K, V, o, room, first, n, group, 64, pairs, scale, cap);
        else if (D == 128) attend_one(q, k, v, c, s, K, V, o, room, first, n, group, 128, pairs, scale, cap);
        else attend_one(q, k, v, c, s, K, V, o, room, first, n, group, D, pairs, scale, cap);
    }
}

/* out [n] = x [n] rounded up or down to bfloat16, by the low 16 bits of x against a number that a hash of (key, i) draws */
void publish(const float *restrict x, uint16_t *restrict out, int64_t n, uint32_t key) {
#pragma omp parallel for simd if (n > 8192)
    for (int64_t i = 0; i < n; i++) {
        uint32_t h = (uint32_t)i + key, bits;
        h = (h ^ (h >> 16)) * 0x7feb352du;
        h = (h ^ (h >> 15)) * 0x846ca68bu;
        memcpy(&bits, x + i, 4);
        out[i] = (uint16_t)((bits + (h >> 16)) >> 16);
    }
}
