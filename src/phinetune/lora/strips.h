/* Layers that share their input, as tiles.py tells of them, and the large products of `tiles.c`, along weights and factors both:
 *
 *     Y_i = X W_i' + s D_i B_i'        dX = sum of G_i W_i + U_i A_i
 *
 * A product is cut into strips of 64 columns of its results, and into pieces of the left operand's rows and depth that stay in the second cache
 * while they go along all strips. Threads take cells, 32 rows of a strip, as they come: the same bits for any number of them. Results wait a
 * moment before they are rounded, added to, put through the activation and stored.
 *
 * Not here: the slim products D and U, gradients of factors.
 */
#pragma once
#include "../model/tiles.h"
#ifdef HAS_TILES
#include "activation.h"
#include <omp.h>

enum { MOST = 8 };          /* layers at most */
enum { CACHED = 600000 };   /* numbers of a left operand that stay in the second cache while strip after strip is multiplied with them */
enum { DEEPEST = 1536 };    /* numbers that a block of results goes along before its sums are put down */
enum { PAST = 1 << 15 };    /* bytes of a result from which it goes past the caches: it lies in memory that has not been used for long, which a
                             * store into a cache would have to read first */

typedef struct {
    int64_t K, n, R; /* first what stays the same from call to call (tiles.py has it packed) */
    const half *W[MOST];
    const half *packed[MOST]; /* W in the tiles' layout already, as lora_pack leaves it for this direction; null for all layers if it is not */
    const void *A[MOST];
    const void *B[MOST];
    int64_t N[MOST], r[MOST], at[MOST]; /* at: the first column in D and U */
    float s;
    int wide; /* factors are float32 */
    int64_t M;
    const half *X;
    const half *G[MOST];
    half *Y[MOST];
    void *dA[MOST];
    void *dB[MOST];
    half *D, *dX, *room; /* room: as much as lora_room says */
    const half *also;    /* forward, of one layer: (M, N), added to its results */
    half *inner;         /* forward, of gate and up, two layers or one of both: silu(gate) up goes there as well, blocked, (M filled up, width of gate) */
    const half *gate, *up; /* backward: dX would be the gradient of their `inner`; instead those of gate and up go to `both`, blocked, side by side */
    half *both;
    int64_t stride, blocked; /* from one row of gate and up to the next; whether X and G are blocked, G in `room` */
} Layers;

enum { X_BLOCKED = 1, G_BLOCKED = 2 };

/* ---- results on their way out ---- */

/* Results of 32 rows and one or two panels that wait to be rounded and stored: with tiles a row at each step of the next ones, as their own
 * stores take their time to arrive; the others all at once (`finish`). Whole rows of 128 bytes go to memory faster than two halves at two times. */
typedef struct {
    const float *from;
    half *to[2], *inner, *of_up[2]; /* of_up: `to` is where gradients of gate go, blocked; these of up */
    const half *also[2], *gate[2], *up[2];
    int64_t stride, rows, width, next;
    int past;
} Waiting;

WITH_TILES static inline void store(half *to, __m512i x, int past)
{
    if (past) _mm512_stream_si512((void *)to, x);
    else _mm512_storeu_si512(to, x);
}

WITH_TILES static inline void store_row(const Waiting *w, int64_t i)
{
    __m512i found[2];
    for (int64_t c = 0; c < w->width; c += 32) {
        const float *row = w->from + 32 * c + 32 * i;
        found[c / 32] = halves(_mm512_load_ps(row), _mm512_load_ps(row + 16));
    }
    for (int64_t j = 0; j < w->width / 32; j++) {
        if (w->of_up[0]) {
            const __m512i gate = _mm512_loadu_si512(w->gate[j] + i * w->stride), up = _mm512_loadu_si512(w->up[j] + i * w->stride);
            __m512 g[2] = {lower_numbers(gate), upper_numbers(gate)}, u[2] = {lower_numbers(up), upper_numbers(up)};
            gradients_of_gated(lower_numbers(found[j]), g, u);
            gradients_of_gated(upper_numbers(found[j]), g + 1, u + 1);
            _mm512_store_si512(w->to[j] + 32 * i, halves(g[0], g[1]));
            _mm512_store_si512(w->of_up[j] + 32 * i, halves(u[0], u[1]));
            continue;
        }
        if (w->also[0]) {
            const __m512i more = _mm512_loadu_si512(w->also[j] + i * w->stride);
            found[j] = halves(_mm512_add_ps(lower_numbers(found[j]), lower_numbers(more)), _mm512_add_ps(upper_numbers(found[j]), upper_numbers(more)));
        }
        store(w->to[j] + i * w->stride, found[j], w->past);
    }
    if (w->inner) _mm512_store_si512(w->inner + 32 * i, gated(found[0], found[1]));
}

WITH_TILES static void finish(Waiting *w)
{
    for (; w->next < w->rows; w->next++) store_row(w, w->next);
}

/* Blocked rows times a panel, as `multiply`, with tiles storing what waits on the way: in vectors sums would leave their registers for that. */
WITH_TILES static __attribute__((noinline)) void along(const half *left, const half *panel, int64_t steps, int lower, Waiting *w)
{
    const int64_t waits = w->rows - w->next < steps ? w->rows - w->next : steps, spare = products_in == TILES ? waits : 0;
    for (int64_t k = 0; k < spare; k++, left += 1024, panel += 1024) {
        multiply(left, 32, 1024, panel, 1, lower);
        store_row(w, w->next++);
    }
    multiply(left, 32, 1024, panel, steps - spare, lower);
}

/* 16 numbers of a factor, of which `there` are there; the others are zero. */
WITH_TILES static inline __m512 sixteen(const void *from, int64_t at, int64_t there, int wide)
{
    const __mmask16 known = there >= 16 ? 0xffff : there > 0 ? (__mmask16)((1 << there) - 1) : 0;
    if (wide) return _mm512_maskz_loadu_ps(known, (const float *)from + at);
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(known, (const half *)from + at)), 16);
}

/* 32 rows from `row` on and `count` columns (a multiple of 32) from `column` on of a factor (rows, width), scaled -> (32, count); 0 beyond its ends. */
WITH_TILES static void part_of(const void *from, int64_t rows, int64_t width, int64_t row, int64_t column, int64_t count, float s, int wide, half *to)
{
    const __m512 scale = _mm512_set1_ps(s);
    for (int64_t i = 0; i < 32; i++)
        for (int64_t k = 0; k < count; k += 32, to += 32) {
            int64_t there = row + i < rows ? width - column - k : 0, at = (row + i) * width + column + k;
            __m512 low = sixteen(from, at, there, wide), high = sixteen(from, at + 16, there - 16, wide);
            _mm512_storeu_si512(to, halves(_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale)));
        }
}

static half *room(int64_t numbers) { return aligned_alloc(64, (size_t)((numbers + 31) / 32 * 32) * sizeof(half)); }

/* n cut into even shares of at most `most`, in multiples of 32. */
static int64_t share(int64_t n, int64_t most)
{
    int64_t parts = (n + most - 1) / most;
    return filled((n + parts - 1) / parts);
}

static int64_t total(const Layers *l)
{
    int64_t sum = 0;
    for (int64_t i = 0; i < l->n; i++) sum += l->N[i];
    return sum;
}

/* ---- the large products: Y = X W' + D B', and, `back`, dX = G W + U A ---- */

/* 64 columns of a layer's results, or of dX, the last ones 32; with `inner` 32 of gate and the same ones of up. */
typedef struct { int64_t layer[2], column[2], width; } Strip;

static int64_t strips_of(int64_t columns) { return (columns + 63) / 64; }

static int64_t strips(const Layers *l, int back)
{
    int64_t count = 0;
    if (l->inner && !back) return total(l) / 64;
    for (int64_t i = 0; i < l->n && !back; i++) count += strips_of(l->N[i]);
    return back ? strips_of(l->K) : count;
}

static Strip strip(const Layers *l, int back, int64_t at)
{
    int64_t i = 0;
    if (l->inner && !back) return (Strip){{0, l->n - 1}, {32 * at, 32 * at + (l->n == 1 ? l->N[0] / 2 : 0)}, 64};
    while (!back && at >= strips_of(l->N[i])) at -= strips_of(l->N[i++]);
    int64_t width = (back ? l->K : l->N[i]) - 64 * at;
    return (Strip){{i, i}, {64 * at, 64 * at + 32}, width < 64 ? width : 64};
}

/* The 32 x 32 numbers of the weights, rows K apart, that panel j of a strip has at depth k. */
static const half *square(const Layers *l, int back, Strip s, int64_t j, int64_t k)
{
    if (!back) return l->W[s.layer[j]] + s.column[j] * l->K + k;
    int64_t i = 0;
    while (k >= l->N[i]) k -= l->N[i++];
    return l->W[i] + k * l->K + s.column[j];
}

WITH_TILES static void pack(const Layers *l, int back, Strip s, int64_t j, int64_t k, int64_t steps, half *tiles)
{
    for (; steps; steps--, k += 32, tiles += 2 * TILE) {
        const half *from = square(l, back, s, j, k);
        if (back) interleave(from, l->K, tiles, 32);
        else transpose_square(from, l->K, tiles);
    }
}

/* The same 32 x 32 numbers in the tiles' layout, where they are packed already; a panel's next ones of the same layer follow. */
static const half *packed_square(const Layers *l, int back, Strip s, int64_t j, int64_t k)
{
    if (!back) return l->packed[s.layer[j]] + (s.column[j] / 32 * l->K + k) * 32;
    int64_t i = 0;
    while (k >= l->N[i]) k -= l->N[i++];
    return l->packed[i] + (s.column[j] / 32 * l->N[i] + k) * 32;
}

/* Steps from depth k on, of `steps`, that are of one layer. */
static int64_t of_one_layer(const Layers *l, int back, int64_t k, int64_t steps)
{
    int64_t i = 0;
    if (!back) return steps;
    while (k >= l->N[i]) k -= l->N[i++];
    return (l->N[i] - k) / 32 < steps ? (l->N[i] - k) / 32 : steps;
}

/* The factors' part of a panel: A of all layers, or B of the strip's. */
WITH_TILES static void pack_factors(const Layers *l, int back, Strip s, int64_t j, half *tiles, half *columns)
{
    for (int64_t i = back ? 0 : s.layer[j]; i < (back ? l->n : s.layer[j] + 1); i++)
        for (int64_t k = 0; k < l->r[i]; k += 32, tiles += 2 * TILE)
            if (back) {
                part_of(l->A[i], l->r[i], l->K, k, s.column[j], 32, 1.0f, l->wide, columns);
                interleave(columns, 32, tiles, 32);
            } else {
                part_of(l->B[i], l->N[i], l->r[i], s.column[j], k, 32, l->s, l->wide, columns);
                transpose_square(columns, 32, tiles);
            }
}

/* How a product is cut: the left operand's rows and depth, so that a piece of it stays in the second cache while it goes along all strips. */
typedef struct { int64_t depth, deep, rows, strips; } Cut;

static Cut cut(const Layers *l, int back)
{
    int64_t depth = back ? total(l) : l->K, deep = share(depth, DEEPEST);
    return (Cut){depth, deep, share(l->M, CACHED / deep), strips(l, back)};
}

/* Numbers of `room`: X, or all G, blocked, and sums of results whose depth is cut. */
static int64_t numbers_of_room(const Layers *l, int back)
{
    const Cut cuts = cut(l, back);
    return filled(l->M) * cuts.depth + (cuts.deep < cuts.depth ? 2 * cuts.strips * cuts.rows * 64 : 0);
}

/* Takes some of the cells up to `end`, from `*next` on, of strips of `blocks` each -> how many, the first one in *at. Whole strips, as each is
 * packed by everybody who takes part of it; fewer and fewer, so that no thread waits long for one that its processor has slowed down. */
static int64_t take(int64_t *next, int64_t end, int64_t blocks, int64_t all, int64_t *at)
{
    const int64_t threads = omp_get_num_threads();
    int64_t least = all / (4 * threads), count;
    least = least > blocks ? blocks : least < 1 ? 1 : least;
    *at = __atomic_load_n(next, __ATOMIC_RELAXED);
    do {
        const int64_t left = end - *at, fair = left / (2 * threads);
        if (left <= 0) return 0;
        count = fair >= blocks ? fair / blocks * blocks : left > threads * least ? least : (least + 1) / 2;
        if (count > left) count = left;
    } while (!__atomic_compare_exchange_n(next, at, *at + count, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return count;
}

/* One product, and the part of it that is under way: rows from `from` on, depths from k on. A cell is 32 rows of a strip. */
typedef struct {
    const Layers *l;
    const half *left, *slim; /* X, or all G side by side; D, or U; blocked */
    float *sums;             /* of results whose depth is cut */
    Cut cuts;
    int64_t from, k, steps, blocks;
    int back, last;
} Part;

/* What a thread has for itself. */
typedef struct {
    float results[2][2048] __attribute__((aligned(64)));
    Waiting waiting;
    half *panels, *columns;
    int turn;
} Own;

WITH_TILES static void fetch_share(const Part *p, Strip s, int64_t b) /* of the next strip's weights, while block b is multiplied */
{
    for (int64_t j = p->steps * b / p->blocks; j < p->steps * (b + 1) / p->blocks; j++)
        for (int64_t c = 0; c < s.width / 32; c++) {
            if (p->l->packed[0]) fetch_soon(packed_square(p->l, p->back, s, c, p->k + 32 * j), 32);
            else fetch_soon(square(p->l, p->back, s, c, p->k + 32 * j), p->l->K);
        }
}

/* 32 rows of the left operand times 32 columns of the weights, as deep as the part is; `panel` holds them unless they are packed already. */
WITH_TILES static void along_weights(const Part *p, Own *own, Strip s, int64_t j, const half *left, const half *panel, int lower)
{
    if (!p->l->packed[0]) {
        along(left, panel, p->steps, lower, &own->waiting);
        return;
    }
    for (int64_t done = 0, run; done < p->steps; done += run, left += 1024 * run) {
        run = of_one_layer(p->l, p->back, p->k + 32 * done, p->steps - done);
        along(left, packed_square(p->l, p->back, s, j, p->k + 32 * done), run, lower, &own->waiting);
    }
}

/* 32 rows of D or U times the factors' part of a panel. */
WITH_TILES static void along_factors(const Part *p, Strip s, int64_t j, const half *slim, const half *panel, int lower)
{
    const Layers *l = p->l;
    const int64_t first = p->back ? 0 : s.layer[j], last = p->back ? l->n : s.layer[j] + 1;
    for (int64_t i = first; i < last; i++)
        for (int64_t k = 0; k < l->r[i]; k += 32, panel += 2 * TILE) multiply_step(slim + 32 * (l->at[i] + k), panel, lower, l->r[i] - k);
}

/* What becomes of 32 rows of a strip, from m on, that lie in `results`. */
WITH_TILES static Waiting waiting(const Part *p, Strip s, int64_t m, const float *results)
{
    const Layers *l = p->l;
    const int64_t there = l->M - m < 32 ? l->M - m : 32, stride = p->back ? l->K : l->N[s.layer[0]];
    Waiting w = {.from = results, .stride = stride, .rows = there, .width = s.width, .past = l->M * stride * 2 > PAST};
    for (int64_t j = 0; j < s.width / 32; j++) {
        const int64_t at = m * stride + s.column[j];
        if (p->back && l->both) {
            w.to[j] = l->both + 2 * m * l->K + 32 * s.column[j];
            w.of_up[j] = w.to[j] + 32 * l->K;
            w.gate[j] = l->gate + m * l->stride + s.column[j];
            w.up[j] = l->up + m * l->stride + s.column[j];
            memset(w.to[j] + 32 * there, 0, (size_t)(32 - there) * 64);
            memset(w.of_up[j] + 32 * there, 0, (size_t)(32 - there) * 64);
            w.stride = l->stride;
        } else {
            w.to[j] = (p->back ? l->dX : l->Y[s.layer[j]]) + at;
            w.past = w.past && (uintptr_t)w.to[j] % 64 == 0;
            if (!p->back && l->also) w.also[j] = l->also + at;
        }
    }
    if (!p->back && l->inner) {
        w.inner = l->inner + m * total(l) / 2 + 32 * s.column[0];
        memset(w.inner + 32 * there, 0, (size_t)(32 - there) * 64);
    }
    return w;
}

WITH_TILES static void multiply_cell(const Part *p, Own *own, Strip s, int64_t cell)
{
    const Layers *l = p->l;
    const int64_t m = p->from + 32 * (cell % p->blocks), lower = l->M - m > 16;
    for (int64_t j = 0; j < s.width / 32; j++) {
        const half *panel = own->panels + 32 * j * (p->cuts.deep + l->R);
        float *kept = p->sums + cell * 2048 + 1024 * j;
        if (p->k) resume(kept, lower);
        else clear();
        along_weights(p, own, s, j, p->left + m * p->cuts.depth + 32 * p->k, panel, lower);
        if (!p->last) {
            keep(kept, lower);
            continue;
        }
        along_factors(p, s, j, p->slim + m * l->R, panel + p->steps * 2 * TILE, lower);
        fetch(own->results[own->turn] + 1024 * j, 32, lower);
    }
    if (!p->last) return;
    finish(&own->waiting);
    own->waiting = waiting(p, s, m, own->results[own->turn]);
    own->turn = !own->turn;
}

WITH_TILES static void multiply_cells(const Part *p, Own *own, int64_t cell, int64_t count)
{
    const int64_t stop = cell + count;
    while (cell < stop) {
        const int64_t at = cell / p->blocks, end = (at + 1) * p->blocks < stop ? (at + 1) * p->blocks : stop;
        const Strip s = strip(p->l, p->back, at);
        for (int64_t j = 0; j < s.width / 32; j++) {
            half *panel = own->panels + 32 * j * (p->cuts.deep + p->l->R);
            if (!p->l->packed[0]) pack(p->l, p->back, s, j, p->k, p->steps, panel);
            if (p->last) pack_factors(p->l, p->back, s, j, panel + p->steps * 2 * TILE, own->columns);
        }
        for (; cell < end; cell++) {
            if (end < stop) fetch_share(p, strip(p->l, p->back, at + 1), cell % p->blocks);
            multiply_cell(p, own, s, cell);
        }
    }
}

/* next: 0, the threads' common one. */
WITH_TILES static void products(const Layers *l, int back, const half *left, const half *slim, half *panels, half *columns, int64_t *next)
{
    Own own = {.panels = panels, .columns = columns};
    Part p = {.l = l, .left = left, .slim = slim, .back = back, .cuts = cut(l, back)};
    p.sums = (float *)(l->room + filled(l->M) * p.cuts.depth);
    int64_t begun = 0;
    for (p.from = 0; p.from < l->M; p.from += p.cuts.rows)
        for (p.k = 0; p.k < p.cuts.depth; p.k += p.cuts.deep) {
            p.steps = (p.cuts.depth - p.k < p.cuts.deep ? p.cuts.depth - p.k : p.cuts.deep) / 32;
            p.last = p.k + p.cuts.deep >= p.cuts.depth;
            p.blocks = filled(l->M - p.from < p.cuts.rows ? l->M - p.from : p.cuts.rows) / 32;
            const int64_t all = p.cuts.strips * p.blocks;
            int64_t cell, count;
            while ((count = take(next, begun + all, p.blocks, all, &cell)) > 0) multiply_cells(&p, &own, cell - begun, count);
            begun += all;
            if (p.cuts.deep < p.cuts.depth) {
#pragma omp barrier
            }
        }
    finish(&own.waiting);
    _mm_sfence(); /* what went past the caches is there before other threads go on */
}
#endif
