/* What a decoder layer does between its matrix products, on CPUs: normalization, the gated activation, rotary positions, the rows that
 * attention gathers and scatters, and its softmax.
 *
 * torch has each of these as several operators that walk over memory one after the other, and converts bfloat16 in software. Here a row is
 * read once into floats, worked on in the nearest cache, and written once. Matrix products stay torch's (oneDNN's).
 *
 * Plain C over pointers: no Python, no torch headers, so it is built in a second and loaded by ctypes (kernels.py, where each function's
 * shapes and its reference are named). Threads are those of torch: the OpenMP calls are left to be resolved by the library that torch has
 * loaded. Not here: dtypes other than bfloat16 and float32, strides other than between rows, checks (kernels.py makes them).
 */
#include "numbers.h"
#include <math.h>

enum { WIDEST = 8192 }; /* numbers of a row worked on at a time; kernels.py refuses wider normalizations and heads */
static const int64_t GRAIN = 1 << 14; /* numbers that are worth a thread */

/* ---- root-mean-square normalization: y = round(x / rms) w, of a sum x = a + b if there is a b ---- */

/* No row of results is one of those read. `wide` is a constant wherever this is put, so that each case has loops of its own. */
PUT_INSIDE void normalize(const void *restrict a, const void *restrict b, const void *restrict weight, void *restrict sum, void *restrict y, float *inverse, int64_t h,
                          float eps, int wide)
{
    float v[WIDEST], squares = 0.0f;
    if (b)
        for (int64_t i = 0; i < h; i++) v[i] = put(sum, i, number(a, i, wide) + number(b, i, wide), wide);
    else
        for (int64_t i = 0; i < h; i++) v[i] = number(a, i, wide);
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < h; i++) squares += v[i] * v[i];
    const float scale = 1.0f / sqrtf(squares / (float)h + eps);
    for (int64_t i = 0; i < h; i++) put(y, i, once_stored(v[i] * scale, wide) * number(weight, i, wide), wide);
    *inverse = scale;
}

PUT_INSIDE void normalize_back(const void *restrict grad, const void *restrict x, const void *restrict weight, float scale, const void *restrict also, void *restrict dx,
                               int64_t h, int wide)
{
    float g[WIDEST], v[WIDEST], along = 0.0f;
    for (int64_t i = 0; i < h; i++) {
        g[i] = number(grad, i, wide) * number(weight, i, wide);
        v[i] = number(x, i, wide) * scale;
    }
#pragma omp simd reduction(+ : along)
    for (int64_t i = 0; i < h; i++) along += g[i] * v[i];
    along /= (float)h;
    if (also)
        for (int64_t i = 0; i < h; i++) put(dx, i, (g[i] - v[i] * along) * scale + number(also, i, wide), wide);
    else
        for (int64_t i = 0; i < h; i++) put(dx, i, (g[i] - v[i] * along) * scale, wide);
}

#define ROW(of, type) (of ? (const type *)of + row * h : 0)
#define ROW_OF_RESULTS(of, type) (of ? (type *)of + row * h : 0)

FOR_EVERY_PROCESSOR
static void norm_row(const void *a, const void *b, const void *weight, void *sum, void *y, float *inverse, int64_t row, int64_t h, float eps, int wide)
{
    if (wide) normalize(ROW(a, float), ROW(b, float), weight, ROW_OF_RESULTS(sum, float), ROW_OF_RESULTS(y, float), inverse + row, h, eps, 1);
    else normalize(ROW(a, uint16_t), ROW(b, uint16_t), weight, ROW_OF_RESULTS(sum, uint16_t), ROW_OF_RESULTS(y, uint16_t), inverse + row, h, eps, 0);
}

void rms_norm(const void *a, const void *b, const void *weight, void *sum, void *y, float *inverse, int64_t rows, int64_t h, float eps, int wide)
{
#pragma omp parallel for schedule(static) if (rows * h > GRAIN)
    for (int64_t row = 0; row < rows; row++) norm_row(a, b, weight, sum, y, inverse, row, h, eps, wide);
}

/* `also`, if it is there: a gradient that x gets from elsewhere. */
FOR_EVERY_PROCESSOR
static void norm_row_backward(const void *grad, const void *x, const void *weight, const float *inverse, const void *also, void *dx, int64_t row, int64_t h, int wide)
{
    if (wide) normalize_back(ROW(grad, float), ROW(x, float), weight, inverse[row], ROW(also, float), ROW_OF_RESULTS(dx, float), h, 1);
    else normalize_back(ROW(grad, uint16_t), ROW(x, uint16_t), weight, inverse[row], ROW(also, uint16_t), ROW_OF_RESULTS(dx, uint16_t), h, 0);
}

void rms_norm_backward(const void *grad, const void *x, const void *weight, const float *inverse, const void *also, void *dx, int64_t rows, int64_t h, int wide)
{
#pragma omp parallel for schedule(static) if (rows * h > GRAIN)
    for (int64_t row = 0; row < rows; row++) norm_row_backward(grad, x, weight, inverse, also, dx, row, h, wide);
}

/* ---- gated activation: y = round(silu(gate)) up ---- */

enum { PIECE = 512 };

FOR_EVERY_PROCESSOR
static void gated_piece(const void *gate, int64_t gate_at, const void *up, int64_t up_at, void *y, int64_t at, int64_t n, int wide)
{
    float a[PIECE], b[PIECE], s[PIECE];
    load(a, gate, gate_at, n, wide);
    load(b, up, up_at, n, wide);
    for (int64_t i = 0; i < n; i++) s[i] = -a[i];
    exponentials(s, n);
    for (int64_t i = 0; i < n; i++) a[i] /= 1.0f + s[i];
    as_stored(a, n, wide);
    for (int64_t i = 0; i < n; i++) a[i] *= b[i];
    store(y, at, a, n, wide);
}

void silu_gate(const void *gate, int64_t gate_stride, const void *up, int64_t up_stride, void *y, int64_t rows, int64_t h, int wide)
{
#pragma omp parallel for schedule(static) if (rows * h > GRAIN)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < h; i += PIECE)
            gated_piece(gate, row * gate_stride + i, up, row * up_stride + i, y, row * h + i, h - i < PIECE ? h - i : PIECE, wide);
}

FOR_EVERY_PROCESSOR
static void gated_piece_backward(const void *grad, int64_t at, const void *gate, int64_t gate_at, const void *up, int64_t up_at, void *dgate, int64_t dgate_at, void *dup,
                                 int64_t dup_at, int64_t n, int wide)
{
    float g[PIECE], a[PIECE], b[PIECE], s[PIECE];
    load(g, grad, at, n, wide);
    load(a, gate, gate_at, n, wide);
    load(b, up, up_at, n, wide);
    for (int64_t i = 0; i < n; i++) s[i] = -a[i];
    exponentials(s, n);
    for (int64_t i = 0; i < n; i++) s[i] = 1.0f / (1.0f + s[i]);
    for (int64_t i = 0; i < n; i++) b[i] *= g[i] * s[i] * (1.0f + a[i] * (1.0f - s[i]));
    for (int64_t i = 0; i < n; i++) a[i] *= s[i] * g[i];
    store(dgate, dgate_at, b, n, wide);
    store(dup, dup_at, a, n, wide);
}

void silu_gate_backward(const void *grad, const void *gate, int64_t gate_stride, const void *up, int64_t up_stride, void *dgate, void *dup, int64_t stride, int64_t rows,
                        int64_t h, int wide)
{
#pragma omp parallel for schedule(static) if (rows * h > GRAIN)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < h; i += PIECE)
            gated_piece_backward(grad, row * h + i, gate, row * gate_stride + i, up, row * up_stride + i, dgate, row * stride + i, dup, row * stride + i,
                                 h - i < PIECE ? h - i : PIECE, wide);
}

/* ---- rows of attention ---- */

/* x (D) turned by its position's angles (Su et al. 2021, "RoFormer", equation 34, halves as in GPT-NeoX); `back` turns the other way. */
static inline void rotate(float *x, const void *cos, const void *sin, int64_t at, int64_t width, int back, int wide)
{
    float c[WIDEST], s[WIDEST];
    int64_t half = width / 2;
    load(c, cos, at, width, wide);
    load(s, sin, at, width, wide);
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = back ? a * c[i] + b * s[i + half] : a * c[i] - b * s[i];
        x[i + half] = back ? b * c[i + half] - a * s[i] : b * c[i + half] + a * s[i + half];
    }
}

FOR_EVERY_PROCESSOR
static void gather_row(const void *from, int64_t stride, const void *cos, const void *sin, int64_t width, int64_t token, void *to, int64_t at, int64_t step, int64_t heads,
                       int64_t D, float scale, int wide)
{
    float x[WIDEST];
    for (int64_t h = 0; h < heads; h++) {
        if (token < 0) memset(x, 0, (size_t)D * sizeof(float));
        else {
            load(x, from, token * stride + h * D, D, wide);
            if (cos) rotate(x, cos, sin, token * width, width, 0, wide);
            for (int64_t i = 0; i < D; i++) x[i] *= scale;
        }
        store(to, at + h * step, x, D, wide);
    }
}

/* from (T, heads, D) -> to (n, heads, S, D): the tokens index (n, S); a negative one is padding. */
void gather_heads(const void *from, int64_t stride, const void *cos, const void *sin, int64_t width, const int64_t *index, void *to, int64_t n, int64_t S, int64_t heads,
                  int64_t D, float scale, int wide)
{
#pragma omp parallel for schedule(static) if (n * S * heads * D > GRAIN)
    for (int64_t row = 0; row < n * S; row++)
        gather_row(from, stride, cos, sin, width, index[row], to, ((row / S) * heads * S + row % S) * D, S * D, heads, D, scale, wide);
}

FOR_EVERY_PROCESSOR
static void scatter_row(const void *from, const int64_t *places, int64_t count, const void *cos, const void *sin, int64_t width, int64_t token, void *to, int64_t stride,
                        int64_t heads, int64_t D, float scale, int wide)
{
    float sum[WIDEST], x[WIDEST];
    for (int64_t h = 0; h < heads; h++) {
        memset(sum, 0, (size_t)D * sizeof(float));
        for (int64_t p = 0; p < count; p++) {
            const int64_t *place = places + 3 * p; /* rows of groups and entries before this one, S, row in it */
            load(x, from, (place[0] * heads + h * place[1] + place[2]) * D, D, wide);
            for (int64_t i = 0; i < D; i++) sum[i] += x[i];
        }
        if (cos) rotate(sum, cos, sin, token * width, width, 1, wide);
        for (int64_t i = 0; i < D; i++) sum[i] *= scale;
        store(to, token * stride + h * D, sum, D, wide);
    }
}

/* The reverse: from, groups of (n, heads, S, D) one after another -> to (T, heads, D), each token the sum over its places (T + 1 starts). */
void scatter_heads(const void *from, const int64_t *starts, const int64_t *places, const void *cos, const void *sin, int64_t width, void *to, int64_t stride, int64_t T,
                   int64_t heads, int64_t D, float scale, int wide)
{
#pragma omp parallel for schedule(static) if (T * heads * D > GRAIN)
    for (int64_t token = 0; token < T; token++)
        scatter_row(from, places + 3 * starts[token], starts[token + 1] - starts[token], cos, sin, width, token, to, stride, heads, D, scale, wide);
}

/* ---- softmax over the keys that a query sees ---- */

FOR_EVERY_PROCESSOR
static void softmax_row(void *scores, int64_t at, int64_t width, int64_t seen, float *x, int wide)
{
    load(x, scores, at, width, wide);
    for (int64_t i = seen; i < width; i++) x[i] = -INFINITY;
    float highest = x[0], sum = 0.0f;
#pragma omp simd reduction(max : highest)
    for (int64_t i = 0; i < width; i++) highest = x[i] > highest ? x[i] : highest;
    for (int64_t i = 0; i < width; i++) x[i] -= highest;
    exponentials(x, width);
    for (int64_t i = seen; i < width; i++) x[i] = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; i++) sum += x[i];
    sum = 1.0f / sum;
    for (int64_t i = 0; i < width; i++) x[i] *= sum;
    store(scores, at, x, width, wide);
}

/* scores (rows, width), in place: of each run of `block` rows the first sees `first` keys, the next one more, and so on; 0 elsewhere. */
void causal_softmax(void *scores, int64_t rows, int64_t block, int64_t first, int64_t width, int wide)
{
#pragma omp parallel if (rows * width > GRAIN)
    {
        float x[width];
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) softmax_row(scores, row * width, width, first + row % block, x, wide);
    }
}

FOR_EVERY_PROCESSOR
static void softmax_row_backward(const void *P, void *dP, int64_t at, int64_t width, float *p, float *d, int wide)
{
    float along = 0.0f;
    load(p, P, at, width, wide);
    load(d, dP, at, width, wide);
#pragma omp simd reduction(+ : along)
    for (int64_t i = 0; i < width; i++) along += p[i] * d[i];
    for (int64_t i = 0; i < width; i++) d[i] = p[i] * (d[i] - along);
    store(dP, at, d, width, wide);
}

/* dP (rows, width) becomes dS = P (dP - sum of P dP); where P is 0, nothing is seen and dS is 0. */
void softmax_backward(const void *P, void *dP, int64_t rows, int64_t width, int wide)
{
#pragma omp parallel if (rows * width > GRAIN)
    {
        float p[width], d[width];
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) softmax_row_backward(P, dP, row * width, width, p, d, wide);
    }
}
