/* Folding LoRA's factors into a weight, W + s B A, on CPUs: what a merge does once, and int4-aware training every step.
 *
 * W is read once and written once. Between the two, a few rows of a few columns stay in registers while all of r goes by; the sums are
 * float32 and rounded once, to what W is stored as. The order in which the r products are added does not depend on where an entry lies
 * or on how the rows are divided, so a weight folded whole and one folded block by block are the same, bit for bit.
 *
 * Plain C with GCC's and clang's vectors, no Python, no torch headers; loaded by ctypes (fold.py, where the shapes and the
 * reference are named). OpenMP calls are left to be resolved by the library that torch has loaded. Elsewhere the file is empty, and torch's
 * operators serve. Not here: dtypes other than bfloat16 and float32, checks.
 */
#if defined(__GNUC__)
#include "../model/processors.h"
#include <math.h>
#include <stdint.h>
#include <string.h>

#define ALWAYS static inline __attribute__((always_inline))

enum {
    LANES = 16,        /* numbers in a vector */
    SPAN = 2 * LANES,  /* columns worked on at a time */
    TOGETHER = 4,      /* rows worked on at a time: they share what is loaded of A */
    NEAR = 8192,       /* numbers of A that are kept in the nearest cache */
    WIDEST = NEAR / 4, /* columns worked on at a time, at most */
    DEEPEST = 1024     /* r at most */
};
static const int64_t GRAIN = 1 << 14; /* numbers that are worth a thread */

typedef float floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(LANES * 4), aligned(2), may_alias));

/* A span of a bfloat16 row is one vector of words, each of which holds two numbers: float32's bits are a shift away. So a span's columns
 * are worked on in that order, the even ones first. A comes packed like that: (spans, r, SPAN), zeros where there is no column. */
ALWAYS int64_t place(int64_t i, int wide) /* of column i of a span */
{
    return wide ? i : i % 2 * LANES + i / 2;
}

/* `sum` becomes the bits of sum + stored. The highest bit of `beyond` is set where the magnitude is over `limit`, or is of no number: as bits,
 * magnitudes are whole numbers in the same order. */
ALWAYS void add_stored(floats *sum, words stored, uint32_t limit, words *beyond)
{
    *sum += (floats)stored;
    *beyond |= limit - ((words)*sum & 0x7fffffffu);
}

/* float32's bits become bfloat16's, in the upper half: to nearest, ties to even; what is no number stays none. The lower half is anything. */
ALWAYS void round_bits(words *bits)
{
    words nothing = (words)((*bits & 0x7fffffffu) > 0x7f800000u);
    *bits = (nothing & 0x7fc00000u) | (~nothing & (*bits + 0x7fffu + ((*bits >> 16) & 1u)));
}

/* TOGETHER rows of SPAN columns, `stride` bytes apart: W += b' a for b (r, TOGETHER) and a (r, SPAN), a
 * span packed. `d` receives b' a, its rows `apart` numbers apart, where it is given. */
ALWAYS void fold_span(char *W, int64_t stride, const float *a, const float *b, int64_t r, uint32_t limit, words *beyond, float *d, int64_t apart, int wide)
{
    floats low[TOGETHER], high[TOGETHER];
#pragma GCC unroll 4
    for (int j = 0; j < TOGETHER; j++) low[j] = high[j] = (floats){0};
    for (int64_t k = 0; k < r; k++) {
        floats l = *(const floats *)(a + k * SPAN), h = *(const floats *)(a + k * SPAN + LANES);
#pragma GCC unroll 4
        for (int j = 0; j < TOGETHER; j++) {
            low[j] += l * b[k * TOGETHER + j];
            high[j] += h * b[k * TOGETHER + j];
        }
    }
    for (int j = 0; d && j < TOGETHER; j++) {
        *(floats *)(d + j * apart) = low[j];
        *(floats *)(d + j * apart + LANES) = high[j];
    }
#pragma GCC unroll 4
    for (int j = 0; j < TOGETHER; j++) {
        const words *stored = (const words *)(W + j * stride);
        if (wide) {
            add_stored(low + j, stored[0], limit, beyond);
            add_stored(high + j, stored[1], limit, beyond);
        } else {
            add_stored(low + j, stored[0] << 16, limit, beyond);
            add_stored(high + j, stored[0] & 0xffff0000u, limit, beyond);
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < TOGETHER; j++) {
        words *stored = (words *)(W + j * stride), even = (words)low[j], odd = (words)high[j];
        if (wide) {
            stored[0] = even;
            stored[1] = odd;
        } else {
            round_bits(&even);
            round_bits(&odd);
            stored[0] = even >> 16 | (odd & 0xffff0000u);
        }
    }
}

ALWAYS float number(const void *row, int64_t i, int wide)
{
    uint32_t bits;
    if (wide) memcpy(&bits, (const char *)row + i * 4, 4);
    else bits = (uint32_t)((const uint16_t *)row)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* A span that is not whole, on copies: `rows` rows of `columns` columns. */
ALWAYS void fold_part(char *W, int64_t stride, int64_t rows, int64_t columns, const float *a, const float *b, int64_t r, uint32_t limit, words *beyond, float *d, int64_t apart, int wide)
{
    const int64_t bytes = wide ? 4 : 2;
    char whole[TOGETHER * SPAN * 4];
    memset(whole, 0, sizeof whole);
    for (int64_t j = 0; j < rows; j++) memcpy(whole + j * SPAN * bytes, W + j * stride, (size_t)(columns * bytes));
    fold_span(whole, SPAN * bytes, a, b, r, limit, beyond, d, apart, wide);
    for (int64_t j = 0; j < rows; j++) memcpy(W + j * stride, whole + j * SPAN * bytes, (size_t)(columns * bytes));
}

/* moved += <new - old, d>, <d, d> over n columns of a row; d as packed. */
ALWAYS void measure(const char *old, const char *new, const float *d, int64_t n, double *moved, int wide)
{
    for (int64_t c = 0; c < n; c += SPAN) {
        float along = 0.0f, size = 0.0f;
        for (int64_t i = 0; i < SPAN && c + i < n; i++) {
            float change = d[c + place(i, wide)];
            along += (number(new, c + i, wide) - number(old, c + i, wide)) * change;
            size += change * change;
        }
        moved[0] += along;
        moved[1] += size;
    }
}

/* At most TOGETHER rows of n columns, at most NEAR / 4; a: their spans, b (r, TOGETHER) scaled, zeros where there is no row. `counted`: bits of
 * the rows that are measured. Gives 1 if a sum is over the limit. */
ALWAYS int fold_strip(char *W, int64_t stride, int64_t rows, int64_t n, const float *a, const float *b, int64_t r, uint32_t limit, int counted, double *moved, int wide)
{
    const int64_t bytes = wide ? 4 : 2;
    float d[TOGETHER * WIDEST];
    char old[TOGETHER * WIDEST * 4];
    words beyond = {0};
    for (int64_t j = 0; counted && j < rows; j++) memcpy(old + j * WIDEST * bytes, W + j * stride, (size_t)(n * bytes));
    for (int64_t c = 0; c < n; c += SPAN) {
        float *changes = counted ? d + c : 0;
        if (n - c < SPAN || rows < TOGETHER)
            fold_part(W + c * bytes, stride, rows, n - c < SPAN ? n - c : SPAN, a + c * r, b, r, limit, &beyond, changes, WIDEST, wide);
        else
            fold_span(W + c * bytes, stride, a + c * r, b, r, limit, &beyond, changes, WIDEST, wide);
    }
    for (int64_t j = 0; j < rows; j++)
        if (counted >> j & 1) measure(old + j * WIDEST * bytes, W + j * stride, d + j * WIDEST, n, moved, wide);
    uint32_t found = 0;
    for (int i = 0; i < LANES; i++) found |= beyond[i];
    return found >> 31;
}

/* `rows` rows of n columns, in rows of `stride` bytes. `most`: which of them are measured. */
FOR_EVERY_PROCESSOR
static int fold_piece(char *W, int64_t stride, const float *a, const float *B, int64_t rows, int64_t n, int64_t r, float scaling, uint32_t limit, const int64_t *most, double *moved, int wide)
{
    float b[TOGETHER * DEEPEST];
    int beyond = 0;
    for (int64_t row = 0; row < rows; row += TOGETHER) {
        int64_t some = rows - row < TOGETHER ? rows - row : TOGETHER;
        int counted = 0;
        for (int j = 0; j < 2; j++)
            if (most[j] >= row && most[j] < row + some) counted |= 1 << (most[j] - row);
        for (int64_t j = 0; j < TOGETHER; j++)
            for (int64_t k = 0; k < r; k++) b[k * TOGETHER + j] = j < some ? scaling * B[(row + j) * r + k] : 0.0f;
        beyond |= wide ? fold_strip(W + row * stride, stride, some, n, a, b, r, limit, counted, moved, 1)
                       : fold_strip(W + row * stride, stride, some, n, a, b, r, limit, counted, moved, 0);
    }
    return beyond;
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

/* W (rows, columns) += scaling B A, in place, for B (rows, r) and A (r, columns) packed, r at most DEEPEST. `moved` (2) becomes
 * <W's change, scaling B A> and <scaling B A, scaling B A> over the two rows that change most. Gives 1 if every sum is a number
 * within the limit. */
int fold_rows(void *W, const float *A, const float *B, int64_t rows, int64_t columns, int64_t r, float scaling, float limit, double *moved, int wide)
{
    uint32_t highest;
    double along = 0.0, size = 0.0;
    int64_t most[2];
    memcpy(&highest, &limit, sizeof highest);
    largest_rows(B, rows, r, most);
    const int64_t deep = r < 4 ? 4 : r, fit = deep * SPAN < NEAR ? NEAR / (deep * SPAN) * SPAN : SPAN, pieces = (columns + fit - 1) / fit; /* columns whose A stays near */
    const int64_t lot = 128, lots = (rows + lot - 1) / lot, bytes = wide ? 4 : 2, stride = columns * bytes;
    int beyond = 0;
#pragma omp parallel for collapse(2) schedule(static) reduction(| : beyond) reduction(+ : along, size) if (rows * columns > GRAIN)
    for (int64_t l = 0; l < lots; l++)
        for (int64_t piece = 0; piece < pieces; piece++) {
            int64_t first = piece * fit, n = columns - first < fit ? columns - first : fit, row = l * lot;
            int64_t some = rows - row < lot ? rows - row : lot, at = row * stride + first * bytes;
            int64_t here[2] = {most[0] - row, most[1] - row};
            double sums[2] = {0.0, 0.0};
            beyond |= fold_piece((char *)W + at, stride, A + first * r, B + row * r, some, n, r, scaling, highest, here, sums, wide);
            along += sums[0];
            size += sums[1];
        }
    moved[0] = along;
    moved[1] = size;
    return !beyond;
}

#if defined(__unix__) || defined(__APPLE__)
#include <errno.h>
#include <unistd.h>

enum { READING = 1, WRITING, BEYOND }; /* fold.py knows them */
enum { ENDED = -1 };

static int read_whole(int file, char *to, int64_t size, int64_t at)
{
    while (size > 0) {
        ssize_t count = pread(file, to, (size_t)size, at);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return count < 0 ? errno : ENDED;
        to += count, at += count, size -= count;
    }
    return 0;
}

static int write_whole(int file, const char *from, int64_t size, int64_t at)
{
    while (size > 0) {
        ssize_t count = pwrite(file, from, (size_t)size, at);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return count < 0 ? errno : EIO;
        from += count, at += count, size -= count;
    }
    return 0;
}

/* `fold_rows` from byte `start` of an open file to byte `to` of another, `lot` rows at a time in `buffer`. `moved` is added up over the lots.
 * Gives 0 or what went wrong; then `failed` is errno, or ENDED. */
int fold_file(int source, int64_t start, int target, int64_t to, char *buffer, int64_t lot, const float *A, const float *B, int64_t rows, int64_t columns, int64_t r, float scaling, float limit, double *moved, int wide, int *failed)
{
    const int64_t stride = columns * (wide ? 4 : 2);
    moved[0] = moved[1] = 0.0;
    for (int64_t row = 0; row < rows; row += lot) {
        int64_t some = rows - row < lot ? rows - row : lot;
        double sums[2];
        if ((*failed = read_whole(source, buffer, some * stride, start + row * stride))) return READING;
        if (!fold_rows(buffer, A, B + row * r, some, columns, r, scaling, limit, sums, wide)) return BEYOND;
        if ((*failed = write_whole(target, buffer, some * stride, to + row * stride))) return WRITING;
        moved[0] += sums[0];
        moved[1] += sums[1];
    }
    return 0;
}
#endif
#endif
