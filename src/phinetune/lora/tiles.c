/* The products of LoRA layers that share their input, in one call forward and one backward.
 *
 *     Y_i = X W_i' + s D_i B_i'       D_i = X A_i'                                             (' is the transpose)
 *     U_i = s G_i B_i                 dX = sum of G_i W_i + U_i A_i        dA_i = U_i' X        dB_i = s G_i' D_i
 *
 * As separate products the factors' are too slim: each costs its call and a pass over rows, and Y and dX are written and read again. Here
 * a block of 32 x 32 results stays in registers (tiles.h) while it goes along W and the factors both, and is rounded once.
 *
 * Tiles load fastest from memory without gaps, so the left operands (X, G) are copied into blocks of 32 rows by 32 columns first, the last
 * rows filled up with zeros, unless they come so: an MLP's activation is computed on gate and up, and its gradients on the gradient of what
 * comes out, on their way to memory, and they lie blocked. W is brought into the tiles' layout a panel of 32 columns at a time, on the way,
 * unless it is there already (lora_pack): two more copies, one for each direction.
 *
 * Plain C over pointers, called by tiles.py, which makes the checks: X (M, K), G_i and Y_i (M, N_i), W_i (N_i, K) bfloat16, rows contiguous;
 * A_i (r_i, K), B_i (N_i, r_i) and their gradients float32 or bfloat16; K and N_i multiples of 32. D and U are blocked as X is, M and each
 * rank filled up to a multiple of 32 with zeros, R the sum of these ranks. Sums are float32. Not here: bias, dropout, quantized weights,
 * other processors.
 */
#include "../model/tiles.h"
#ifdef HAS_TILES
#include "activation.h"
#include <omp.h>

enum { MOST = 8 };          /* layers at most */
enum { CACHED = 600000 };   /* numbers of a left operand that stay in the second cache while strip after strip is multiplied with them */
enum { DEEPEST = 1536 };    /* numbers that a block of results goes along before its sums are put down */
enum { PAST = 1 << 15 };    /* bytes of a result from which it goes past the caches: it lies in memory that has not been used for long, which a
                             * store into a cache would have to read first */
enum { PART = 192 };        /* columns of A that a thread packs at a time */

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

/* ---- forward ---- */

/* The layer that 32 columns of D belong to, number c of them, and how many of these are ranks of it. */
static int64_t layer_of(const Layers *l, int64_t c)
{
    int64_t i = 0;
    while (i + 1 < l->n && l->at[i + 1] <= 32 * c) i++;
    return i;
}

static int64_t ranks_of(const Layers *l, int64_t c)
{
    const int64_t i = layer_of(l, c);
    return l->r[i] + l->at[i] - 32 * c;
}

/* X is blocked, unless it comes so, and D = X A' made. */
WITH_TILES static void down(const Layers *l, half *X, half *panels, half *rows)
{
    int64_t steps = l->K / 32, parts = (l->K + PART - 1) / PART;
#pragma omp for schedule(static)
    for (int64_t at = 0; at < l->R / 32 * parts; at++) { /* A as panels, a part of one at a time: there are few */
        int64_t c = at / parts, i = layer_of(l, c), k = at % parts * PART, width = l->K - k < PART ? l->K - k : PART;
        part_of(l->A[i], l->r[i], l->K, 32 * c - l->at[i], k, width, 1.0f, l->wide, rows);
        pack_rows(rows, width, panels + (c * steps + k / 32) * 2 * TILE);
    }
#pragma omp for schedule(dynamic)
    for (int64_t m = 0; m < l->M; m += 32) {
        if (!(l->blocked & X_BLOCKED)) block_rows(l->X, l->M, l->K, m, X + m * l->K);
        for (int64_t c = 0; c < l->R / 32; c++) {
            clear();
            multiply_columns(X + m * l->K, panels + c * steps * 2 * TILE, steps, l->M - m > 16, ranks_of(l, c));
            if (l->M - m <= 16) memset(l->D + m * l->R + 1024 * c + 512, 0, 1024);
            put(l->D + m * l->R + 1024 * c, 32, l->M - m > 16 ? 32 : 16);
        }
    }
}

WITH_TILES static int forward(const Layers *l)
{
    int failed = 0;
    int64_t next = 0;
    half *panels = room(l->R * l->K), *X = l->blocked & X_BLOCKED ? (half *)l->X : l->room;
#pragma omp parallel
    {
        half *panel = room(2 * (cut(l, 0).deep + l->R) * 32), *rows = room(32 * PART + 1024);
        if (!panels || !panel || !rows) note(&failed);
#pragma omp barrier
        if (!failed) {
            shape_tiles();
            down(l, X, panels, rows);
            products(l, 0, X, l->D, panel, rows, &next);
            release_tiles();
        }
        free(panel);
        free(rows);
    }
    free(panels);
    return failed;
}

/* ---- backward ---- */

WITH_TILES static void gradient_of_D(const Layers *l, half *G, half *panels, half *U, half *columns)
{
    const int64_t width = total(l);
    for (int64_t i = 0, start = 0; i < l->n; start += l->N[i++]) {
        int64_t steps = l->N[i] / 32, parts = filled(l->r[i]) / 32;
#pragma omp for schedule(static)
        for (int64_t k = 0; k < steps; k++)
            for (int64_t c = 0; c < parts; c++) {
                part_of(l->B[i], l->N[i], l->r[i], 32 * k, 32 * c, 32, l->s, l->wide, columns);
                interleave(columns, 32, panels + (c * steps + k) * 2 * TILE, 32);
            }
#pragma omp for schedule(dynamic)
        for (int64_t m = 0; m < l->M; m += 32) {
            half *rows = G + m * width + 32 * start;
            if (!(l->blocked & G_BLOCKED)) block_rows(l->G[i], l->M, l->N[i], m, rows);
            for (int64_t c = 0; c < parts; c++) {
                clear();
                multiply_columns(rows, panels + c * steps * 2 * TILE, steps, 1, l->r[i] - 32 * c);
                put(U + m * l->R + 32 * l->at[i] + 1024 * c, 32, 32);
            }
        }
    }
}

/* Blocked rows of D or U, (M filled up, R) -> (R, M filled up). */
WITH_TILES static void turn(const Layers *l, const half *from, half *to)
{
    const int64_t width = filled(l->M);
    half pairs[2 * TILE] __attribute__((aligned(64))), turned[2 * TILE] __attribute__((aligned(64)));
#pragma omp for schedule(static)
    for (int64_t m = 0; m < l->M; m += 32)
        for (int64_t c = 0; c < l->R; c += 32) {
            interleave(from + m * l->R + 32 * c, 32, pairs, 32);
            transpose_square(pairs, 32, turned);
            for (int64_t i = 0; i < 32; i++) _mm512_storeu_si512(to + (c + i) * width + m, _mm512_load_si512(turned + 32 * i));
        }
}

/* The first `count` of 16 numbers, at most 16, from `at` on. */
WITH_TILES static inline void set(void *to, int64_t at, __m512 x, int64_t count, int wide)
{
    const __mmask16 there = count >= 16 ? 0xffff : (__mmask16)((1 << count) - 1);
    if (wide) _mm512_mask_storeu_ps((float *)to + at, there, x);
    else _mm256_mask_storeu_epi16((half *)to + at, there, (__m256i)_mm512_cvtneps_pbh(x));
}

/* left (r, M filled up) times a panel of 32 columns from n on -> to (r, width), or (width, r) if `across`, scaled. */
WITH_TILES static void over_rows(const half *left, int64_t r, int64_t deep, const half *panel, int64_t n, int64_t width, void *to, int across, float s, int wide)
{
    float block[1024] __attribute__((aligned(64))), square[256] __attribute__((aligned(64)));
    const __m512 scale = _mm512_set1_ps(s);
    for (int64_t c = 0; c < r; c += 32) {
        const int64_t there = r - c < 32 ? r - c : 32;
        product(left + c * deep, deep, 32, panel, deep / 32, block, 32, there > 16);
        for (int64_t j = 0; j < 32; j += 16) {
            for (int64_t i = 0; i < there && !across; i++) set(to, (c + i) * width + n + j, _mm512_mul_ps(scale, _mm512_load_ps(block + 32 * i + j)), 16, wide);
            for (int64_t i = 0; i < there && across; i += 16) {
                transpose_pairs((const half *)(block + 32 * i + j), 64, (half *)square);
                for (int64_t k = 0; k < 16; k++) set(to, (n + j + k) * r + c + i, _mm512_mul_ps(scale, _mm512_load_ps(square + 16 * k)), there - i, wide);
            }
        }
    }
}

WITH_TILES static void gradients_of_factors(const Layers *l, const half *G, const half *turned_U, const half *turned_D, half *panel)
{
    const int64_t deep = filled(l->M), width = total(l);
#pragma omp for schedule(dynamic) nowait
    for (int64_t n = 0; n < l->K; n += 32) {
        for (int64_t m = 0; m < l->M; m += 32) {
            if (l->blocked & X_BLOCKED) interleave(l->X + m * l->K + 32 * n, 32, panel + m * 32, 32);
            else interleave(l->X + m * l->K + n, l->K, panel + m * 32, l->M - m);
        }
        for (int64_t i = 0; i < l->n; i++) over_rows(turned_U + l->at[i] * deep, l->r[i], deep, panel, n, l->K, l->dA[i], 0, 1.0f, l->wide);
    }
    for (int64_t i = 0, start = 0; i < l->n; start += l->N[i++]) {
#pragma omp for schedule(dynamic) nowait
        for (int64_t n = 0; n < l->N[i]; n += 32) {
            for (int64_t m = 0; m < l->M; m += 32) interleave(G + m * width + 32 * (start + n), 32, panel + m * 32, 32);
            over_rows(turned_D + l->at[i] * deep, l->r[i], deep, panel, n, l->N[i], l->dB[i], 1, l->s, l->wide);
        }
    }
}

WITH_TILES static int backward(const Layers *l)
{
    int failed = 0;
    int64_t next = 0, widest = 0, high = filled(l->M), own = 2 * (cut(l, 1).deep + l->R);
    for (int64_t i = 0; i < l->n; i++) widest = filled(l->r[i]) * l->N[i] > widest ? filled(l->r[i]) * l->N[i] : widest;
    half *panels = room(widest), *U = room(high * l->R), *turned = room(2 * l->R * high);
#pragma omp parallel
    {
        half *panel = room((own > high ? own : high) * 32), *columns = room(1024);
        if (!panels || !U || !turned || !panel || !columns) note(&failed);
#pragma omp barrier
        if (!failed) {
            shape_tiles();
            gradient_of_D(l, l->room, panels, U, columns);
            if (l->dX || l->both) products(l, 1, l->room, U, panel, columns, &next);
            turn(l, U, turned);
            turn(l, l->D, turned + l->R * high);
            gradients_of_factors(l, l->room, turned, turned + l->R * high, panel);
            release_tiles();
        }
        free(panel);
        free(columns);
    }
    free(panels);
    free(U);
    free(turned);
    return failed;
}

/* W (N, K) in the tiles' layout, square after square, a panel of 32 columns of the product after the other: for X W', and for G W. */
WITH_TILES static void pack_weights(const half *W, int64_t N, int64_t K, half *forward, half *back)
{
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < N; n += 32)
        for (int64_t k = 0; k < K; k += 32) {
            const half *from = W + n * K + k;
            transpose_square(from, K, forward + (n * K + k * 32));
            interleave(from, K, back + (k * N + n * 32), 32);
        }
}

int tiles_usable(void) { return may_multiply(); }
int tiles_use(int how) { return use(how); }
void lora_pack(const half *W, int64_t N, int64_t K, half *forward_to, half *back_to) { pack_weights(W, N, K, forward_to, back_to); }
int lora_forward(const Layers *layers) { return forward(layers); }
int lora_backward(const Layers *layers) { return backward(layers); }
int64_t lora_room(const Layers *layers, int back) { return numbers_of_room(layers, back); }

#else
int tiles_usable(void) { return 0; }
int tiles_use(int how) { return (void)how, 0; }
void lora_pack(const void *W, long long N, long long K, void *forward_to, void *back_to) { (void)W, (void)N, (void)K, (void)forward_to, (void)back_to; }
int lora_forward(const void *layers) { return layers != 0; }
int lora_backward(const void *layers) { return layers != 0; }
long long lora_room(const void *layers, int back) { return layers != 0 && back; }
#endif
