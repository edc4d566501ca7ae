/* What `attention.c` computes of one row: of a query's scores the softmax and its gradients, of a head's numbers their turn by a position's angles.
 *
 * Not here: products, which rows and keys.
 */
#pragma once
#include "tiles.h"
#ifdef HAS_TILES
#include <math.h>

typedef struct {
    int64_t heads, groups, D, width, entries, shared; /* width: numbers of a head that turn; shared: tokens from the first on that are prefixes */
    const int64_t *entry;                             /* (entries, 4): first token of the prefix, its length, first token, length */
    const half *q, *k, *v, *cos, *sin;
    int64_t q_stride, k_stride, v_stride, T;
    float scale;
    half *out;        /* (T, heads D), read on the way back */
    float *sums;      /* (heads, T): log2 of each row's sum of 2^(scores log2 e) */
    const half *grad; /* (T, heads D) */
    half *dq, *dk, *dv;
    int64_t dq_stride, dk_stride, dv_stride;
} Attention;

enum { WIDEST = 256 }; /* numbers of a head at most */

/* log2 of 16 numbers above 0: the exponent, and of what is left, m in [3/4, 3/2), the series of 2 atanh((m - 1) / (m + 1)), to 5e-9. */
WITH_TILES static inline __m512 logarithm_of_two(__m512 x)
{
    const __m512 one = _mm512_set1_ps(1.0f), m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero);
    const __m512 z = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one)), square = _mm512_mul_ps(z, z);
    __m512 p = _mm512_set1_ps(1.0f / 9.0f);
    for (int i = 7; i > 0; i -= 2) p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(1.0f / (float)i));
    return _mm512_fmadd_ps(_mm512_mul_ps(p, z), _mm512_set1_ps(2.0f * LOG2E), _mm512_getexp_ps(_mm512_div_ps(x, m)));
}

/* The lanes of 16 numbers from `at` on that lie before `seen`. */
static inline __mmask16 before(int64_t at, int64_t seen) { return seen - at >= 16 ? 0xffff : seen <= at ? 0 : (__mmask16)((1u << (seen - at)) - 1); }

WITH_TILES static inline void store_halves(half *to, __m512 x) { _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(x)); }

WITH_TILES static inline void store_32(half *to, __m512 low, __m512 high) { _mm512_storeu_si512(to, halves(low, high)); }

/* 16 scores from `at` on; those that are not seen count as `instead`. */
WITH_TILES static inline __m512 scores_seen(const float *scores, int64_t at, int64_t seen, float instead)
{
    return _mm512_mask_loadu_ps(_mm512_set1_ps(instead), before(at, seen), scores + at);
}

/* scores (width, a multiple of 32) -> 2^(scores log2 e - top) for what is seen, 0 beyond; gives `top` and their sum. What tiles load is stored in
 * whole lines: a load waits for two stores that it needs halves of. */
WITH_TILES static inline float exponential_row(const float *scores, half *P, int64_t width, int64_t seen, float *top)
{
    const __m512 log2e = _mm512_set1_ps(LOG2E);
    const int64_t whole = seen / 32 * 32;
    __m512 highest[2], sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    highest[0] = highest[1] = _mm512_set1_ps(-INFINITY);
    for (int64_t i = 0; i < whole; i += 32)
        for (int j = 0; j < 2; j++) highest[j] = _mm512_max_ps(highest[j], _mm512_loadu_ps(scores + i + 16 * j));
    for (int j = 0; j < 2; j++) highest[j] = _mm512_max_ps(highest[j], scores_seen(scores, whole + 16 * j, seen, -INFINITY));
    *top = _mm512_reduce_max_ps(_mm512_max_ps(highest[0], highest[1])) * LOG2E;
    const __m512 down = _mm512_set1_ps(-*top);
    for (int64_t i = 0; i < whole; i += 32) {
        __m512 p[2];
        for (int j = 0; j < 2; j++) {
            p[j] = power_of_two(_mm512_fmadd_ps(_mm512_loadu_ps(scores + i + 16 * j), log2e, down));
            sum[j] = _mm512_add_ps(sum[j], p[j]);
        }
        store_32(P + i, p[0], p[1]);
    }
    if (whole < width) {
        __m512 p[2];
        for (int j = 0; j < 2; j++) {
            const __m512 x = scores_seen(scores, whole + 16 * j, seen, 0.0f);
            p[j] = _mm512_maskz_mov_ps(before(whole + 16 * j, seen), power_of_two(_mm512_fmadd_ps(x, log2e, down)));
            sum[j] = _mm512_add_ps(sum[j], p[j]);
        }
        store_32(P + whole, p[0], p[1]);
        for (int64_t i = whole + 32; i < width; i += 32) store_32(P + i, _mm512_setzero_ps(), _mm512_setzero_ps());
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
}

/* 32 of a query's scores and of its dP, of which `seen` are seen -> P and dS, 0 beyond. `along`: the sum of P dP over the whole row. */
WITH_TILES static inline void gradients_of_32(const float *scores, const float *dP, int64_t seen, float logarithm, float along, __m512i *P, __m512i *dS)
{
    const __m512 log2e = _mm512_set1_ps(LOG2E), down = _mm512_set1_ps(-logarithm), mean = _mm512_set1_ps(along);
    __m512 p[2], d[2];
    for (int j = 0; j < 2; j++) {
        const __mmask16 there = before(16 * j, seen);
        p[j] = _mm512_maskz_mov_ps(there, power_of_two(_mm512_fmadd_ps(_mm512_maskz_loadu_ps(there, scores + 16 * j), log2e, down)));
        d[j] = _mm512_maskz_mul_ps(there, p[j], _mm512_sub_ps(_mm512_loadu_ps(dP + 16 * j), mean));
    }
    *P = halves(p[0], p[1]);
    *dS = halves(d[0], d[1]);
}

/* The sum of P dP over a query's row is that of O G over the head's numbers. */
WITH_TILES static inline float product_of(const half *x, const half *y, int64_t D)
{
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < D; i += 32) sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(x + i), (__m512bh)_mm512_loadu_si512(y + i));
    return _mm512_reduce_add_ps(sum);
}

/* x (D) turned by its position's angles (Su et al. 2021, "RoFormer", equation 34, halves as in GPT-NeoX); `back` turns the other way. */
WITH_TILES static void rotate(float *x, const half *cos, const half *sin, int64_t width, int back)
{
    int64_t n = width / 2;
    for (int64_t i = 0; i < n; i++) {
        float a = x[i], b = x[i + n], c = number(cos, i, 0), d = number(cos, i + n, 0), s = number(sin, i, 0), t = number(sin, i + n, 0);
        x[i] = back ? a * c + b * t : a * c - b * s;
        x[i + n] = back ? b * d - a * s : b * d + a * t;
    }
}

/* A head's D numbers of a token, turned if there are angles, and scaled -> to (D). */
WITH_TILES static void take(const Attention *a, const half *from, int64_t token, int turned, float scale, half *to)
{
    float x[WIDEST];
    __m512 by = _mm512_set1_ps(scale);
    if (!turned) {
        for (int64_t i = 0; i < a->D; i += 16) store_halves(to + i, _mm512_mul_ps(load_halves(from + i), by));
        return;
    }
    if (a->width == a->D) { /* the whole head turns, as it mostly does: without a stop in memory */
        const half *cos = a->cos + token * a->D, *sin = a->sin + token * a->D;
        int64_t n = a->D / 2;
        for (int64_t i = 0; i < n; i += 16) {
            __m512 low = load_halves(from + i), high = load_halves(from + n + i);
            __m512 first = _mm512_fnmadd_ps(high, load_halves(sin + i), _mm512_mul_ps(low, load_halves(cos + i)));
            __m512 second = _mm512_fmadd_ps(low, load_halves(sin + n + i), _mm512_mul_ps(high, load_halves(cos + n + i)));
            store_halves(to + i, _mm512_mul_ps(first, by));
            store_halves(to + n + i, _mm512_mul_ps(second, by));
        }
        return;
    }
    for (int64_t i = 0; i < a->D; i++) x[i] = number(from, i, 0);
    rotate(x, a->cos + token * a->width, a->sin + token * a->width, a->width, 0);
    for (int64_t i = 0; i < a->D; i += 16) store_halves(to + i, _mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(scale)));
}

/* The gradient x (D) of a head's numbers, turned back and scaled -> to (D). */
WITH_TILES static void give(const Attention *a, float *x, int64_t token, int turned, float scale, half *to)
{
    if (turned && a->width == a->D) {
        const half *cos = a->cos + token * a->D, *sin = a->sin + token * a->D;
        const __m512 by = _mm512_set1_ps(scale);
        const int64_t n = a->D / 2;
        for (int64_t i = 0; i < n; i += 16) {
            __m512 low = _mm512_loadu_ps(x + i), high = _mm512_loadu_ps(x + n + i);
            __m512 first = _mm512_fmadd_ps(high, load_halves(sin + n + i), _mm512_mul_ps(low, load_halves(cos + i)));
            __m512 second = _mm512_fnmadd_ps(low, load_halves(sin + i), _mm512_mul_ps(high, load_halves(cos + n + i)));
            store_halves(to + i, _mm512_mul_ps(first, by));
            store_halves(to + n + i, _mm512_mul_ps(second, by));
        }
        return;
    }
    if (turned) rotate(x, a->cos + token * a->width, a->sin + token * a->width, a->width, 1);
    for (int64_t i = 0; i < a->D; i += 16) store_halves(to + i, _mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(scale)));
}
#endif
