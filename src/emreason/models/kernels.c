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

/* x [rows, d] += y [rows, d] (y may be null); out = x / sqrt(mean(x^2) + eps) * weight [d] */
void add_norm(T *restrict x, const T *restrict y, const T *restrict weight, T *restrict out, int64_t rows, int64_t d, float eps) {
#pragma omp parallel for if (rows * d > 8192)
    for (int64_t r = 0; r < rows; r++) {
        T *a = x + r * d, *o = out + r * d;
        float sum = 0;
        if (y) {
            const T *b = y + r * d;
#pragma omp simd
            for (int64_t i = 0; i < d; i++) a[i] = store(load(a[i]) + load(b[i]));
        }
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < d; i++) { float v = load(a[i]); sum += v * v; }
        float scale = 1.0f / sqrtf(sum / d + eps);
#pragma omp simd
        for (int64_t i = 0; i < d; i++) o[i] = store(load(store(load(a[i]) * scale)) * load(weight[i]));
    }
}

/* out [rows, d] = silu(gate) * up, for gate_up [rows, 2 d] */
void silu_mul(const T *restrict gate_up, T *restrict out, int64_t rows, int64_t d) {
#pragma omp parallel for if (rows * d > 8192)
    for (int64_t r = 0; r < rows; r++) {
        const T *g = gate_up + 2 * r * d, *u = g + d;
        T *o = out + r * d;
#pragma omp simd
        for (int64_t i = 0; i < d; i++) {
            float x = load(g[i]);
            o[i] = store(load(store(x * sigmoid(x))) * load(u[i]));
        }
    }
}

/* out [n] = silu(gate) * up */
void gate(const T *restrict gate, const T *restrict up, T *restrict out, int64_t n) {
#pragma omp parallel for simd if (n > 8192)
    for (int64_t i = 0; i < n; i++) {
        float x = load(gate[i]);
        out[i] = store(x * sigmoid(x) * load(up[i]));
    }
}

/* the gradients of gate and up [n], from that of silu(gate) * up */
void gate_backward(
    const T *restrict gate, const T *restrict up, const T *restrict gradient, T *restrict of_gate, T *restrict of_up, int64_t n) {
#pragma omp parallel for simd if (n > 8192)
    for (int64_t i = 0; i < n; i++) {
        float x = load(gate[i]), g = load(gradient[i]), s = sigmoid(x);
        of_up[i] = store(g * x * s);
        of_gate[i] = store(g * load(up[i]) * s * (1.0f + x * (1.0f - s)));
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

static inline void rotate(const T *x, const T *cos, const T *sin, float *out, int D) {
    int half = D / 2;
#pragma omp simd
    for (int i = 0; i < half; i++) {
        float a = load(x[i]), b = load(x[i + half]), c = load(cos[i]), s = load(sin[i]);
        out[i] = a * c - b * s;
        out[i + half] = b * c + a * s;
    }
}

/* One row and one key head: rotate, write K and V at position n, attend to positions 0 .. n. */
static inline __attribute__((always_inline)) void attend_one(
    const T *q, const T *k, const T *v, const T *cos, const T *sin, T *keys, T *values, T *out, float *scores, int64_t n, int group, int D,
    float scale) {
    float query[group * D], key[D], sum[group * D];
    for (int g = 0; g < group; g++) rotate(q + g * D, cos, sin, query + g * D, D);
    for (int i = 0; i < group * D; i++) query[i] = load(store(query[i])) * scale;
    rotate(k, cos, sin, key, D);
    for (int i = 0; i < D; i++) keys[n * D + i] = store(key[i]);
    memcpy(values + n * D, v, D * sizeof(T));
    for (int64_t p = 0; p <= n; p++) {
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
        float *s = scores + g * (n + 1), top = s[0], total = 0;
#pragma omp simd reduction(max : top)
        for (int64_t p = 0; p <= n; p++) top = s[p] > top ? s[p] : top;
#pragma omp simd reduction(+ : total)
        for (int64_t p = 0; p <= n; p++) { s[p] = exponential(s[p] - top); total += s[p]; }
        float inverse = 1.0f / total;
#pragma omp simd
        for (int64_t p = 0; p <= n; p++) s[p] *= inverse;
    }
    for (int i = 0; i < group * D; i++) sum[i] = 0;
    for (int64_t p = 0; p <= n; p++) {
        const T *row = values + p * D;
        for (int i = 0; i < D; i++) key[i] = load(row[i]);
        for (int g = 0; g < group; g++) {
            float w = scores[g * (n + 1) + p];
            for (int i = 0; i < D; i++) sum[g * D + i] += w * key[i];
        }
    }
    for (int i = 0; i < group * D; i++) out[i] = store(sum[i]);
}

/* Decoding attention. qkv [rows, (heads + 2 kv_heads) D]; cos, sin [positions, D / 2]; keys, values [.., kv_heads, width, D] of this layer;
 * row r has at[r] cached positions and its token is written there. scores: room for rows * heads * longest floats. out [rows, heads D]. */
void attend(
    const T *qkv, const T *cos, const T *sin, T *keys, T *values, const int64_t *at, float *scores, T *out, int64_t rows, int64_t heads,
    int64_t kv_heads, int64_t D, int64_t width, int64_t longest, float scale) {
    int64_t group = heads / kv_heads;
#pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < rows * kv_heads; i++) {
        int64_t r = i / kv_heads, h = i % kv_heads;
        const T *x = qkv + r * (heads + 2 * kv_heads) * D, *c = cos + at[r] * (D / 2), *s = sin + at[r] * (D / 2);
        const T *q = x + h * group * D, *k = x + (heads + h) * D, *v = x + (heads + kv_heads + h) * D;
        T *K = keys + i * width * D, *V = values + i * width * D, *o = out + (r * heads + h * group) * D;
        float *room = scores + i * group * longest;
        if (D == 64 && group == 3) attend_one(q, k, v, c, s, K, V, o, room, at[r], 3, 64, scale);
        else if (D == 64) attend_one(q, k, v, c, s, K, V, o, room, at[r], group, 64, scale);
        else if (D == 128) attend_one(q, k, v, c, s, K, V, o, room, at[r], group, 128, scale);
        else attend_one(q, k, v, c, s, K, V, o, room, at[r], group, D, scale);
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
