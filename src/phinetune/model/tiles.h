/* Products of bfloat16 numbers with sums in float32, 32 x 32 results at a time: what `lora/tiles.c`, `model/attention.c` and `training/head.c`
 * have in common. In matrix tiles (AMX) where the processor has them, else in vectors (AVX-512 with bfloat16).
 *
 * A left operand is 32 rows of 32 numbers a step, as they lie; a right one is brought into the tiles' layout, pairs of rows side by side, in
 * panels of 32 columns. A block of 32 x 32 results stays in four tile registers while it goes along both; without tiles it is memory of the
 * thread, of which 8 rows at a time stay in vector registers.
 *
 * Everything is static: each of the three files is a library of its own. Only for gcc on x86-64 Linux (`HAS_TILES`).
 */
#pragma once
#if defined(__linux__) && defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define HAS_TILES 1
#include <cpuid.h>
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define WITH_TILES __attribute__((target("arch=x86-64-v4,avx512bf16,amx-tile,amx-bf16")))

typedef uint16_t half;            /* bfloat16 */
enum { TILE = 512 };              /* numbers of a tile of 16 rows of 32 (or of 16 pairs of rows of 16) */

enum { NEITHER, VECTORS, TILES };
static int allowed = -1, products_in = NEITHER; /* what this process may multiply with, and does: of these */

/* What this process may multiply with; asked before anything else is called. For tiles the system is asked for leave (arch_prctl,
 * ARCH_REQ_XCOMP_PERM of tile data). */
static inline int may_multiply(void)
{
    unsigned a, b, c, d = 0;
    if (allowed >= 0) return allowed;
    __builtin_cpu_init();
    __get_cpuid_count(7, 0, &a, &b, &c, &d); /* bits 22 and 24: products of bfloat16 tiles, tiles */
    const int tiles = d >> 22 & 1 && d >> 24 & 1, vectors = __builtin_cpu_supports("avx512bf16");
    return products_in = allowed = !vectors ? NEITHER : tiles && syscall(SYS_arch_prctl, 0x1023, 18) == 0 ? TILES : VECTORS;
}

/* What is multiplied with from now on, for tests of both: VECTORS, or TILES where `may_multiply` found them; anything else changes nothing ->
 * what was until now. */
static inline int use(int how)
{
    const int before = products_in;
    if (how >= VECTORS && how <= allowed) products_in = how;
    return before;
}

static inline int64_t filled(int64_t n) { return (n + 31) / 32 * 32; }

struct shape { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; };

/* Tiles 0 to 3 are results, 4 and 5 upper and lower rows of the left operand, 6 and 7 of the right one: 16 rows of 64 bytes each. */
WITH_TILES static void shape_tiles(void)
{
    struct shape shape;
    if (products_in != TILES) return;
    memset(&shape, 0, sizeof shape);
    shape.palette = 1;
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
    __asm__ volatile("ldtilecfg %0" : : "m"(shape)); /* gcc's own function lets it leave out what it believes nobody reads */
}

WITH_TILES static void release_tiles(void)
{
    if (products_in == TILES) _tile_release();
}

/* The 32 x 32 results of a thread that multiplies in vectors. */
static _Thread_local float results[1024] __attribute__((aligned(64)));

/* The cache lines of 32 rows of 32 numbers, into the second cache, for later. */
WITH_TILES static inline void fetch_soon(const half *from, int64_t stride)
{
#pragma GCC unroll 32
    for (int i = 0; i < 32; i++) _mm_prefetch((const char *)(from + i * stride), _MM_HINT_T1);
}

WITH_TILES static inline void clear(void)
{
    if (products_in != TILES) {
        memset(results, 0, sizeof results);
        return;
    }
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* 8 rows of the left operand along a panel, in vectors: 16 sums in registers, or 8 without the `right` half of the panel's columns, more than a
 * processor has products under way. `sums` lie `width` numbers apart; `fresh`: they are written, not added to. A step is `pairs` pairs deep. */
typedef struct { const half *left; int64_t stride, advance; const half *panel; int64_t steps; float *sums; int64_t width; } Along;

WITH_TILES static inline __attribute__((always_inline)) void along_8_rows(const Along *along, int64_t stride, int64_t width, int pairs, int right, int fresh)
{
    const half *left = along->left, *panel = along->panel;
    float *sums = along->sums;
    __m512 c[8][2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        for (int j = 0; j <= right; j++) c[i][j] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + width * i + 16 * j);
    for (int64_t steps = along->steps; steps; steps--, left += along->advance - 2 * pairs, panel += 2 * TILE - 32 * pairs)
        for (int four = 0; four < pairs; four += 4, left += 8, panel += 128)
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++) {
                __m512bh columns[2];
                for (int j = 0; j <= right; j++) columns[j] = (__m512bh)_mm512_loadu_si512(panel + TILE * j + 32 * p);
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) {
                    int pair;
                    memcpy(&pair, left + i * stride + 2 * p, sizeof pair);
                    for (int j = 0; j <= right; j++) c[i][j] = _mm512_dpbf16_ps(c[i][j], (__m512bh)_mm512_set1_epi32(pair), columns[j]);
                }
            }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        for (int j = 0; j <= right; j++) _mm512_storeu_ps(sums + width * i + 16 * j, c[i][j]);
}

/* Strides of blocked rows and of the thread's results, 32 numbers, are given as constants: 3 % of their products' time. */
WITH_TILES static __attribute__((noinline)) void add_8_rows(const Along *a) { along_8_rows(a, a->stride, a->width, 16, 1, 0); }
WITH_TILES static __attribute__((noinline)) void make_8_rows(const Along *a) { along_8_rows(a, a->stride, a->width, 16, 1, 1); }
WITH_TILES static __attribute__((noinline)) void add_8_rows_blocked(const Along *a) { along_8_rows(a, 32, 32, 16, 1, 0); }
WITH_TILES static __attribute__((noinline)) void add_8_rows_of_half_a_panel(const Along *a) { along_8_rows(a, 32, 32, 16, 0, 0); }
WITH_TILES static __attribute__((noinline)) void add_8_rows_of_half_a_step(const Along *a) { along_8_rows(a, 32, 32, 8, 1, 0); }

/* 32 rows in vectors, or the upper 16, by one of these. */
WITH_TILES static inline void in_vectors(void (*rows)(const Along *), Along a, int lower)
{
    for (int64_t i = 0; i < (lower ? 4 : 2); i++, a.left += 8 * a.stride, a.sums += 8 * a.width) rows(&a);
}

/* Adds 32 rows times a panel (32 columns, two tiles a step), 32 `steps` deep, to the results; without `lower` the upper 16 rows. The left operand
 * moves on by `advance` numbers a step. */
WITH_TILES static inline void multiply(const half *left, int64_t stride, int64_t advance, const half *panel, int64_t steps, int lower)
{
    if (products_in != TILES) {
        in_vectors(stride == 32 ? add_8_rows_blocked : add_8_rows, (Along){left, stride, advance, panel, steps, results, 32}, lower);
        return;
    }
    __asm__ volatile("" : : : "memory"); /* what was packed is there before tiles load it, of which gcc's functions do not tell it */
    if (lower)
        for (int64_t k = 0; k < steps; k++, left += advance, panel += 2 * TILE) {
            _tile_loadd(4, left, stride * 2);
            _tile_stream_loadd(6, panel, 64);
            _tile_stream_loadd(7, panel + TILE, 64);
            _tile_loadd(5, left + 16 * stride, stride * 2);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    else
        for (int64_t k = 0; k < steps; k++, left += advance, panel += 2 * TILE) {
            _tile_loadd(4, left, stride * 2);
            _tile_stream_loadd(6, panel, 64);
            _tile_stream_loadd(7, panel + TILE, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
}

/* As `multiply` of blocked rows, where of the panel's columns `there` hold anything but zeros: the others' results are left as they are, after `clear`. */
WITH_TILES static inline void multiply_columns(const half *left, const half *panel, int64_t steps, int lower, int64_t there)
{
    if (products_in != TILES && there <= 16) in_vectors(add_8_rows_of_half_a_panel, (Along){left, 32, 1024, panel, steps, results, 32}, lower);
    else multiply(left, 32, 1024, panel, steps, lower);
}

/* As `multiply` of blocked rows, a step, where of its depth `there` numbers are anything but zeros. */
WITH_TILES static inline void multiply_step(const half *left, const half *panel, int lower, int64_t there)
{
    if (products_in != TILES && there <= 16) in_vectors(add_8_rows_of_half_a_step, (Along){left, 32, 0, panel, 1, results, 32}, lower);
    else multiply(left, 32, 0, panel, 1, lower);
}

/* Rows of 32 numbers, some way apart, upper and lower halves of rows some other way: both ways of laying out results are of this kind. */
WITH_TILES static inline void copy_rows(float *to, int64_t stride, int64_t right, const float *from, int64_t from_stride, int64_t from_right, int64_t rows)
{
    for (int64_t i = 0; i < rows; i++) {
        _mm512_storeu_ps(to + i * stride, _mm512_loadu_ps(from + i * from_stride));
        _mm512_storeu_ps(to + i * stride + right, _mm512_loadu_ps(from + i * from_stride + from_right));
    }
}

/* The results -> memory, tile by tile (rows of 16), and back. */
WITH_TILES static inline void keep(float *to, int lower)
{
    if (products_in != TILES) {
        for (int64_t upper_or_lower = 0; upper_or_lower < 1 + (lower != 0); upper_or_lower++) copy_rows(to + 512 * upper_or_lower, 16, 256, results + 512 * upper_or_lower, 32, 16, 16);
        return;
    }
    _tile_stored(0, to, 64);
    _tile_stored(1, to + 256, 64);
    if (lower) {
        _tile_stored(2, to + 512, 64);
        _tile_stored(3, to + 768, 64);
    }
}

WITH_TILES static inline void resume(const float *from, int lower)
{
    if (products_in != TILES) {
        for (int64_t upper_or_lower = 0; upper_or_lower < 1 + (lower != 0); upper_or_lower++) copy_rows(results + 512 * upper_or_lower, 32, 16, from + 512 * upper_or_lower, 16, 256, 16);
        return;
    }
    __asm__ volatile("" : : : "memory"); /* as in `multiply` */
    _tile_loadd(0, from, 64);
    _tile_loadd(1, from + 256, 64);
    if (lower) {
        _tile_loadd(2, from + 512, 64);
        _tile_loadd(3, from + 768, 64);
    }
}

/* The results -> 32 rows of 32 numbers, `stride` numbers apart; without `lower` the upper 16 rows. */
WITH_TILES static inline void fetch(float *to, int64_t stride, int lower)
{
    if (products_in != TILES) {
        copy_rows(to, stride, 16, results, 32, 16, lower ? 32 : 16);
        return;
    }
    _tile_stored(0, to, stride * 4);
    _tile_stored(1, to + 16, stride * 4);
    if (lower) {
        _tile_stored(2, to + 16 * stride, stride * 4);
        _tile_stored(3, to + 16 * stride + 16, stride * 4);
    }
    __asm__ volatile("" : : : "memory"); /* of stores gcc is not told either */
}

/* A whole product: 32 rows times a panel -> 32 rows of 32 numbers, `width` numbers apart; without `lower` the upper 16. */
WITH_TILES static inline void product(const half *left, int64_t stride, int64_t advance, const half *panel, int64_t steps, float *to, int64_t width, int lower)
{
    if (products_in != TILES) {
        in_vectors(make_8_rows, (Along){left, stride, advance, panel, steps, to, width}, lower);
        return;
    }
    clear();
    multiply(left, stride, advance, panel, steps, lower);
    fetch(to, width, lower);
}

/* The same, added to what is there, all 32 rows. */
WITH_TILES static inline void add_product(const half *left, int64_t stride, int64_t advance, const half *panel, int64_t steps, float *to, int64_t width)
{
    if (products_in != TILES) {
        in_vectors(add_8_rows, (Along){left, stride, advance, panel, steps, to, width}, 1);
        return;
    }
    __asm__ volatile("" : : : "memory"); /* as in `multiply` */
    _tile_loadd(0, to, width * 4);
    _tile_loadd(1, to + 16, width * 4);
    _tile_loadd(2, to + 16 * width, width * 4);
    _tile_loadd(3, to + 16 * width + 16, width * 4);
    multiply(left, stride, advance, panel, steps, 1);
    fetch(to, width, 1);
}

/* 32 numbers, rounded to bfloat16. */
WITH_TILES static inline __m512i halves(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

/* 16 numbers. */
WITH_TILES static inline __m512 load_halves(const half *from) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16); }

/* The results -> the first `rows` rows of 32 in bfloat16. */
WITH_TILES static inline void put(half *to, int64_t stride, int64_t rows)
{
    float block[1024] __attribute__((aligned(64)));
    fetch(block, 32, rows > 16);
    for (int64_t i = 0; i < rows; i++) _mm512_storeu_si512(to + i * stride, halves(_mm512_load_ps(block + 32 * i), _mm512_load_ps(block + 32 * i + 16)));
}

/* Rows m to m + 32 of from (M, width) -> blocks of 32 x 32, one for each 32 columns; rows beyond the last are zero. */
WITH_TILES static void block_rows(const half *from, int64_t M, int64_t width, int64_t m, half *to)
{
    int64_t there = M - m < 32 ? M - m : 32;
    for (int64_t i = 0; i < 32; i++)
        for (int64_t k = 0; k < width; k += 32)
            _mm512_store_si512(to + 32 * k + 32 * i, i < there ? _mm512_loadu_si512(from + (m + i) * width + k) : _mm512_setzero_si512());
}

/* ---- softmax ---- */

static const float LOG2E = 1.44269504f;

/* 2^x for x <= 0 or so, to bfloat16's precision and better: the fraction by a polynomial (relative error 2.6e-6, the least for its degree), the
 * whole part as an exponent. */
WITH_TILES static inline __m512 power_of_two(__m512 x)
{
    __m512 whole = _mm512_roundscale_ps(x, 0), f = _mm512_sub_ps(x, whole), p = _mm512_set1_ps(9.57010179e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.59178603e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.40247448e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.93121815e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.99999261e-1f));
    return _mm512_scalef_ps(p, whole);
}

/* ---- operands in the tiles' layout: tile row p, column n holds the pair (2p, n), (2p + 1, n) of the right operand ---- */

static inline float number(const void *from, int64_t at, int wide)
{
    uint32_t bits;
    float value;
    if (wide) return ((const float *)from)[at];
    bits = (uint32_t)((const half *)from)[at] << 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline half rounded(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
    return (half)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* 16 rows of 16 pairs -> 16 rows of pairs the other way round (a transpose of 32-bit numbers). Quarters of rows are put side by side as they are
 * loaded, which leaves half of the shuffles, of which a processor has one a cycle. */
WITH_TILES static inline void transpose_pairs(const half *from, int64_t stride, half *to)
{
#define QUARTER(i) _mm_loadu_si128((const __m128i *)(from + (i) * stride + 8 * q))
#define FOUR_ROWS(i) _mm512_mask_broadcast_i32x4(_mm512_mask_broadcast_i32x4(_mm512_mask_broadcast_i32x4(_mm512_castsi128_si512(QUARTER(i)), 0x00f0, QUARTER(i + 4)), 0x0f00, QUARTER(i + 8)), 0xf000, QUARTER(i + 12))
#pragma GCC unroll 4
    for (int64_t q = 0; q < 4; q++, to += 128) {
        __m512i a = FOUR_ROWS(0), b = FOUR_ROWS(1), c = FOUR_ROWS(2), d = FOUR_ROWS(3);
        __m512i first = _mm512_unpacklo_epi32(a, b), second = _mm512_unpackhi_epi32(a, b);
        __m512i third = _mm512_unpacklo_epi32(c, d), fourth = _mm512_unpackhi_epi32(c, d);
        _mm512_storeu_si512(to, _mm512_unpacklo_epi64(first, third));
        _mm512_storeu_si512(to + 32, _mm512_unpackhi_epi64(first, third));
        _mm512_storeu_si512(to + 64, _mm512_unpacklo_epi64(second, fourth));
        _mm512_storeu_si512(to + 96, _mm512_unpackhi_epi64(second, fourth));
    }
#undef FOUR_ROWS
#undef QUARTER
}

/* A row of 32 numbers and the next one -> their pairs: a row in each of two tiles. */
WITH_TILES static inline void put_pairs(__m512i one, __m512i other, half *to)
{
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(one, first, other));
    _mm512_storeu_si512(to + TILE, _mm512_permutex2var_epi16(one, second, other));
}

/* 32 rows of 32 numbers, of which `rows` are there -> two tiles of pairs of rows; the others count as zero. */
WITH_TILES static inline void interleave(const half *from, int64_t stride, half *to, int64_t rows)
{
    for (int64_t p = 0; p < 16; p++) {
        __m512i one = 2 * p < rows ? _mm512_loadu_si512(from + 2 * p * stride) : _mm512_setzero_si512();
        __m512i other = 2 * p + 1 < rows ? _mm512_loadu_si512(from + (2 * p + 1) * stride) : _mm512_setzero_si512();
        put_pairs(one, other, to + 32 * p);
    }
}

/* 32 rows of 32 numbers, transposed -> two tiles. */
WITH_TILES static inline void transpose_square(const half *from, int64_t stride, half *to)
{
    transpose_pairs(from, stride, to);
    transpose_pairs(from + 16 * stride, stride, to + TILE);
}

/* Columns n to n + 32 of X W' need rows n to n + 32 of W (N, K): 2 tiles for each 32 of K. */
WITH_TILES static void pack_rows(const half *W, int64_t K, half *to)
{
    for (int64_t k = 0; k < K; k += 32, to += 2 * TILE) transpose_square(W + k, K, to);
}

static void note(int *failed) /* all threads go on, or none */
{
#pragma omp atomic write
    *failed = 1;
}
#endif
