/* What a decoder layer does between its matrix products, on CPUs: normalization, the gated activation, rotary positions, the rows that
 * attention gathers and scatters, and its softmax. And folding LoRA's factors into a weight, once per merge.
 *
 * torch has each of these as several operators that walk over memory one after the other, and converts bfloat16 in software. Here a row is
 * read once into floats, worked on in the nearest cache, and written once. Matrix products stay torch's (oneDNN's).
 *
 * Plain C over pointers: no Python, no torch headers, so it is built in a second and loaded by ctypes (kernels.py, where each function's
 * shapes and its reference are named). Threads are those of torch: the OpenMP calls are left to be resolved by the library that torch has
 * loaded. Not here: dtypes other than bfloat16 and float32, strides other than between rows, checks (kernels.py makes them).
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__linux__) && defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif

enum { WIDEST = 8192 }; /* numbers of a row worked on at a time; kernels.py refuses wider normalizations and heads */
static const int64_t GRAIN = 1 << 14; /* numbers that are worth a thread */

static inline void load(float *to, const void *from, int64_t at, int64_t n, int wide)
{
    if (wide) {
        memcpy(to, (const float *)from + at, (size_t)n * sizeof(float));
        return;
    }
    const uint16_t *source = (const uint16_t *)from + at;
    uint32_t *bits = (uint32_t *)to;
    for (int64_t i = 0; i < n; i++) bits[i] = (uint32_t)source[i] << 16;
}

static inline uint32_t rounded(uint32_t bits) /* to bfloat16, to nearest, ties to even; what is no number stays none */
{
    uint32_t up = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : up;
}

static inline void store(void *to, int64_t at, const float *from, int64_t n, int wide)
{
    if (wide) {
        memcpy((float *)to + at, from, (size_t)n * sizeof(float));
        return;
    }
    uint16_t *target = (uint16_t *)to + at;
    const uint32_t *bits = (const uint32_t *)from;
    for (int64_t i = 0; i < n; i++) target[i] = (uint16_t)rounded(bits[i]);
}

static inline void as_stored(float *x, int64_t n, int wide) /* what storing and loading again would leave */
{
    uint32_t *bits = (uint32_t *)x;
    if (!wide)
        for (int64_t i = 0; i < n; i++) bits[i] = rounded(bits[i]) << 16;
}

/* x (n) becomes e^x to float32's last digit or two, in loops that compilers turn into vector instructions (Cody & Waite 1980, chapter 6). */
static inline void exponentials(float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) x[i] = x[i] < -87.0f ? -87.0f : x[i];
    for (int64_t i = 0; i < n; i++) x[i] = x[i] > 88.0f ? 88.0f : x[i];
    for (int64_t i = 0; i < n; i++) {
        float k = (x[i] * 1.442695041f + 12582912.0f) - 12582912.0f; /* to the nearest whole number, by the last bit of 1.5 * 2^23 */
        float r = x[i] - k * 0.693145752f - k * 1.42860677e-6f; /* ln 2 in two parts */
        float p = 1.0f + r * (1.0f + r * (0.5f + r * (1.6666667e-1f + r * (4.1666668e-2f + r * (8.3333333e-3f + r * 1.3888889e-3f)))));
        union { int32_t i; float f; } power = { ((int32_t)k + 127) << 23 };
        x[i] = p * power.f;
    }
}

/* ---- root-mean-square normalization: y = round(x / rms) w ---- */

FOR_EVERY_PROCESSOR
static void norm_row(const void *x, const float *weight, void *y, float *inverse, int64_t row, int64_t h, float eps, int wide)
{
    float v[WIDEST], sum = 0.0f;
    load(v, x, row * h, h, wide);
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < h; i++) sum += v[i] * v[i];
    float scale = 1.0f / sqrtf(sum / (float)h + eps);
    for (int64_t i = 0; i < h; i++) v[i] *= scale;
    as_stored(v, h, wide);
    for (int64_t i = 0; i < h; i++) v[i] *= weight[i];
    store(y, row * h, v, h, wide);
    inverse[row] = scale;
}

void rms_norm(const void *x, const float *weight, void *y, float *inverse, int64_t rows, int64_t h, float eps, int wide)
{
#pragma omp parallel for schedule(static) if (rows * h > GRAIN)
    for (int64_t row = 0; row < rows; row++) norm_row(x, weight, y, inverse, row, h, eps, wide);
}

FOR_EVERY_PROCESSOR
static void norm_row_backward(const void *grad, const void *x, const float *weight, const float *inverse, void *dx, int64_t row, int64_t h, int wide)
{
    float g[WIDEST], v[WIDEST], along = 0.0f, scale = inverse[row];
    load(g, grad, row * h, h, wide);
    load(v, x, row * h, h, wide);
    for (int64_t i = 0; i < h; i++) g[i] *= weight[i];
    for (int64_t i = 0; i < h; i++) v[i] *= scale;
#pragma omp simd reduction(+ : along)
    for (int64_t i = 0; i < h; i++) along += g[i] * v[i];
    along /= (float)h;
    for (int64_t i = 0; i < h; i++) g[i] = (g[i] - v[i] * along) * scale;
    store(dx, row * h, g, h, wide);
}

void rms_norm_backward(const void *grad, const void *x, const float *weight, const float *inverse, void *dx, int64_t rows, int64_t h, int wide)
{
#pragma omp parallel for schedule(static) if (rows * h > GRAIN)
    for (int64_t row = 0; row < rows; row++) norm_row_backward(grad, x, weight, inverse, dx, row, h, wide);
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

/* ---- merging: W + s B A ---- */

enum { TOGETHER = 4 }; /* rows that share what is loaded of A */

static inline float of_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* d (4, n) += b (4, 4) a (4, n) */
static inline void add_products(float (*d)[PIECE], const float (*b)[4], const float *a, int64_t n)
{
    const float *a0 = a, *a1 = a + n, *a2 = a1 + n, *a3 = a2 + n;
    float *d0 = d[0], *d1 = d[1], *d2 = d[2], *d3 = d[3];
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        d0[i] += b[0][0] * a0[i] + b[0][1] * a1[i] + b[0][2] * a2[i] + b[0][3] * a3[i];
        d1[i] += b[1][0] * a0[i] + b[1][1] * a1[i] + b[1][2] * a2[i] + b[1][3] * a3[i];
        d2[i] += b[2][0] * a0[i] + b[2][1] * a1[i] + b[2][2] * a2[i] + b[2][3] * a3[i];
        d3[i] += b[3][0] * a0[i] + b[3][1] * a1[i] + b[3][2] * a2[i] + b[3][3] * a3[i];
    }
}

/* w (n) += d (n), as stored. Adds <w's change, d> and <d, d> to `moved`; gives the bits of the largest sum, sign off. */
static inline uint32_t add_row(void *W, int64_t at, const float *d, double *moved, int64_t n, int wide)
{
    uint16_t *half = (uint16_t *)W + at;
    float *full = (float *)W + at, along = 0.0f, size = 0.0f;
    uint32_t largest = 0;
    if (wide) {
#pragma omp simd reduction(+ : along, size) reduction(max : largest)
        for (int64_t i = 0; i < n; i++) {
            float before = full[i], after = before + d[i];
            uint32_t magnitude = bits_of(after) & 0x7fffffffu;
            largest = magnitude > largest ? magnitude : largest;
            full[i] = after;
            along += (after - before) * d[i];
            size += d[i] * d[i];
        }
    } else {
#pragma omp simd reduction(+ : along, size) reduction(max : largest)
        for (int64_t i = 0; i < n; i++) {
            float before = of_bits((uint32_t)half[i] << 16), sum = before + d[i];
            uint32_t magnitude = bits_of(sum) & 0x7fffffffu, bits = rounded(bits_of(sum));
            largest = magnitude > largest ? magnitude : largest;
            half[i] = (uint16_t)bits;
            along += (of_bits(bits << 16) - before) * d[i];
            size += d[i] * d[i];
        }
    }
    moved[0] += along;
    moved[1] += size;
    return largest;
}

/* n numbers of `rows` rows, at most TOGETHER, for A (r filled up to a multiple of 4, n) packed. `counted`: bits of the rows whose change is
 * added to `moved`. */
FOR_EVERY_PROCESSOR
static uint32_t fold_piece(void *W, int64_t at, int64_t columns, const float *A, const float *B, int64_t rows, int64_t r, float scaling, int counted, double *moved, int64_t n, int wide)
{
    float d[TOGETHER][PIECE];
    uint32_t largest = 0;
    for (int j = 0; j < TOGETHER; j++) memset(d[j], 0, (size_t)n * sizeof(float));
    for (int64_t k = 0; k < r; k += 4) {
        float b[TOGETHER][4];
        for (int j = 0; j < TOGETHER; j++)
            for (int64_t m = 0; m < 4; m++) b[j][m] = j < rows && k + m < r ? scaling * B[j * r + k + m] : 0.0f;
        add_products(d, b, A + k * n, n);
    }
    for (int64_t j = 0; j < rows; j++) {
        double nothing[2] = {0.0, 0.0};
        uint32_t found = add_row(W, at + j * columns, d[j], counted >> j & 1 ? moved : nothing, n, wide);
        largest = found > largest ? found : largest;
    }
    return largest;
}

/* The two rows of B (rows, r) with the largest entries, whose change says most; the same one twice where there is one only. */
static void largest_rows(const float *B, int64_t rows, int64_t r, int64_t *found)
{
    float highest[2] = {-1.0f, -1.0f};
    found[0] = found[1] = 0;
    for (int64_t row = 0; row < rows; row++) {
        float high = 0.0f;
        for (int64_t k = 0; k < r; k++) high = fabsf(B[row * r + k]) > high ? fabsf(B[row * r + k]) : high;
        if (high > highest[0]) {
            highest[1] = highest[0], found[1] = found[0];
            highest[0] = high, found[0] = row;
        } else if (high > highest[1]) highest[1] = high, found[1] = row;
    }
}

/* W (rows, columns) += scaling B A, in place, for B (rows, r) and A (r, columns), r at most WIDEST / 4. A piece of A's columns is packed
 * into the nearest cache, then it goes down W's rows. `moved` (2) becomes <W's change, scaling B A> and <scaling B A, scaling B A>, over
 * the two rows that change most. Gives 1 if every sum is a number within the limit. */
int fold_rows(void *W, const float *A, const float *B, int64_t rows, int64_t columns, int64_t r, float scaling, float limit, double *moved, int wide)
{
    uint32_t largest = 0;
    double along = 0.0, size = 0.0;
    int64_t most[2];
    largest_rows(B, rows, r, most);
    const int64_t lot = 128, lots = (rows + lot - 1) / lot, deep = (r + 3) / 4 * 4, fit = WIDEST / (deep > 16 ? deep : 16), pieces = (columns + fit - 1) / fit;
#pragma omp parallel for collapse(2) schedule(static) reduction(max : largest) reduction(+ : along, size) if (rows * columns > GRAIN)
    for (int64_t piece = 0; piece < pieces; piece++)
        for (int64_t l = 0; l < lots; l++) {
            _Alignas(64) float packed[WIDEST];
            int64_t first = piece * fit, n = columns - first < fit ? columns - first : fit;
            double sums[2] = {0.0, 0.0};
            for (int64_t k = 0; k < r; k++) memcpy(packed + k * n, A + k * columns + first, (size_t)n * sizeof(float));
            memset(packed + r * n, 0, (size_t)((deep - r) * n) * sizeof(float));
            for (int64_t row = l * lot; row < rows && row < (l + 1) * lot; row += TOGETHER) {
                int64_t some = rows - row < TOGETHER ? rows - row : TOGETHER;
                int counted = 0;
                for (int j = 0; j < 2; j++)
                    if (most[j] >= row && most[j] < row + some) counted |= 1 << (most[j] - row);
                uint32_t found = fold_piece(W, row * columns + first, columns, packed, B + row * r, some, r, scaling, counted, sums, n, wide);
                largest = found > largest ? found : largest;
            }
            along += sums[0];
            size += sums[1];
        }
    moved[0] = along;
    moved[1] = size;
    return largest <= bits_of(limit);
}
