/* The products of LoRA layers that share their input, in one call forward and one backward, on processors with AMX.
 *
 *     Y_i = X W_i' + s D_i B_i'       D_i = X A_i'                                             (' is the transpose)
 *     U_i = s G_i B_i                 dX = sum of G_i W_i + U_i A_i        dA_i = U_i' X        dB_i = s G_i' D_i
 *
 * As separate products the factors' are too slim: each costs its call and a pass over rows, and Y and dX are written and read again. Here
 * a block of 32 x 32 results stays in tile registers while it goes along W and the factors both, and is rounded once.
 *
 * Tiles load fastest from memory without gaps, so the left operands (X, G) are copied into blocks of 32 rows by 32 columns first, the last
 * rows filled up with zeros, and W is brought into the tiles' layout a panel of 32 columns at a time, on the way: nothing stays packed.
 *
 * Plain C over pointers, called by tiles.py, which makes the checks: X (M, K), G_i and Y_i (M, N_i), W_i (N_i, K) bfloat16, rows contiguous;
 * A_i (r_i, K), B_i (N_i, r_i) and their gradients float32 or bfloat16; K and N_i multiples of 32. D and U are blocked as X is, M and each
 * rank filled up to a multiple of 32 with zeros, R the sum of these ranks. Sums are float32. Not here: bias, dropout, quantized weights,
 * other processors.
 */
#include "../model/tiles.h"
#ifdef HAS_TILES

enum { MOST = 8 };         /* layers at most */
enum { CACHED = 1 << 19 };        /* numbers of a left operand that stay in the second cache while panel after panel is multiplied with them */

typedef struct {
    int64_t M, K, n, R;
    const half *X;
    const half *W[MOST];
    const half *G[MOST];
    half *Y[MOST];
    const void *A[MOST];
    const void *B[MOST];
    void *dA[MOST];
    void *dB[MOST];
    int64_t N[MOST], r[MOST], at[MOST]; /* at: the first column in D and U */
    half *D, *dX;
    float s;
    int wide; /* factors are float32 */
} Layers;

/* Blocked rows times a panel. The rows come from the second cache; a panel stays in the first one while it goes down the rows, unless it is deep. */
WITH_TILES static __attribute__((noinline)) void along(const half *left, const half *panel, int64_t steps, int lower)
{
    if (steps > 20) multiply(left, 32, 1024, panel, steps, lower, 2);
    else multiply(left, 32, 1024, panel, steps, lower, 1);
}

/* 32 rows from `row` on and `count` columns from `column` on of a factor (rows, width), scaled -> (32, count); 0 beyond its ends. */
static void part_of(const void *from, int64_t rows, int64_t width, int64_t row, int64_t column, int64_t count, float s, int wide, half *to)
{
    int64_t there = width - column < count ? width - column : count;
    for (int64_t i = 0; i < 32; i++, to += count) {
        int64_t known = row + i < rows ? there : 0;
        for (int64_t k = 0; k < known; k++) to[k] = rounded(s * number(from, (row + i) * width + column + k, wide));
        memset(to + known, 0, (size_t)(count - known) * sizeof(half));
    }
}

/* Rows m to m + 32 of from (M, width) -> blocks of 32 x 32, one for each 32 columns; rows beyond the last are zero. */
WITH_TILES static void block_rows(const half *from, int64_t M, int64_t width, int64_t m, half *to)
{
    int64_t there = M - m < 32 ? M - m : 32;
    for (int64_t i = 0; i < 32; i++)
        for (int64_t k = 0; k < width; k += 32)
            _mm512_store_si512(to + 32 * k + 32 * i, i < there ? _mm512_loadu_si512(from + (m + i) * width + k) : _mm512_setzero_si512());
}

static half *room(int64_t numbers) { return aligned_alloc(64, (size_t)((numbers + 31) / 32 * 32) * sizeof(half)); }

/* Rows of a left operand of this depth that are worked on at a time: even shares of M, at least 128 and at most 512. */
static int64_t chunk(int64_t M, int64_t depth)
{
    int64_t fit = CACHED / depth < 128 ? 128 : CACHED / depth > 512 ? 512 : CACHED / depth, parts = (M + fit - 1) / fit;
    return filled((M + parts - 1) / parts);
}

/* ---- forward ---- */

WITH_TILES static void down(const Layers *l, half *X, half *panels, half *rows)
{
    int64_t steps = l->K / 32;
#pragma omp for schedule(static)
    for (int64_t c = 0; c < l->R / 32; c++) { /* A as panels */
        int64_t i = 0;
        while (i + 1 < l->n && l->at[i + 1] <= 32 * c) i++;
        part_of(l->A[i], l->r[i], l->K, 32 * c - l->at[i], 0, l->K, 1.0f, l->wide, rows);
        pack_rows(rows, l->K, panels + c * steps * 2 * TILE);
    }
#pragma omp for schedule(static)
    for (int64_t m = 0; m < l->M; m += 32) {
        block_rows(l->X, l->M, l->K, m, X + m * l->K);
        for (int64_t c = 0; c < l->R / 32; c++) {
            clear();
            along(X + m * l->K, panels + c * steps * 2 * TILE, steps, l->M - m > 16);
            if (l->M - m <= 16) memset(l->D + m * l->R + 1024 * c + 512, 0, 1024);
            put(l->D + m * l->R + 1024 * c, 32, l->M - m > 16 ? 32 : 16);
        }
    }
}

WITH_TILES static void up(const Layers *l, const half *X, half *panel, half *columns)
{
    int64_t blocks = 0, steps = l->K / 32;
    for (int64_t i = 0; i < l->n; i++) blocks += l->N[i] / 32;
    const int64_t rows = chunk(l->M, l->K);
    for (int64_t from = 0; from < l->M; from += rows) {
#pragma omp for schedule(static) nowait
        for (int64_t block = 0; block < blocks; block++) {
            int64_t i = 0, n = block;
            while (n >= l->N[i] / 32) n -= l->N[i++] / 32;
            int64_t deep = filled(l->r[i]);
            pack_rows(l->W[i] + 32 * n * l->K, l->K, panel);
            for (int64_t k = 0; k < deep; k += 32) {
                half *tiles = panel + (steps + k / 32) * 2 * TILE;
                part_of(l->B[i], l->N[i], l->r[i], 32 * n, k, 32, l->s, l->wide, columns);
                transpose_pairs(columns, 32, tiles);
                transpose_pairs(columns + 512, 32, tiles + TILE);
            }
            for (int64_t m = from; m < l->M && m < from + rows; m += 32) {
                int64_t there = l->M - m < 32 ? l->M - m : 32;
                clear();
                along(X + m * l->K, panel, steps, there > 16);
                along(l->D + m * l->R + 32 * l->at[i], panel + steps * 2 * TILE, deep / 32, there > 16);
                put(l->Y[i] + m * l->N[i] + 32 * n, l->N[i], there);
            }
        }
    }
}

WITH_TILES static int forward(const Layers *l)
{
    int failed = 0;
    half *panels = room(l->R * l->K), *X = room(filled(l->M) * l->K);
#pragma omp parallel
    {
        int64_t deepest = 0;
        for (int64_t i = 0; i < l->n; i++) deepest = filled(l->r[i]) > deepest ? filled(l->r[i]) : deepest;
        half *panel = room((l->K + deepest) * 32), *rows = room(32 * l->K + 1024);
        if (!panels || !X || !panel || !rows) note(&failed);
#pragma omp barrier
        if (!failed) {
            shape_tiles();
            down(l, X, panels, rows);
            up(l, X, panel, rows);
            _tile_release();
        }
        free(panel);
        free(rows);
    }
    free(panels);
    free(X);
    return failed;
}

/* ---- backward ---- */

WITH_TILES static void gradient_of_D(const Layers *l, half *const *G, half *panels, half *U, half *columns)
{
    for (int64_t i = 0; i < l->n; i++) {
        int64_t steps = l->N[i] / 32, parts = filled(l->r[i]) / 32;
#pragma omp for schedule(static)
        for (int64_t k = 0; k < steps; k++)
            for (int64_t c = 0; c < parts; c++) {
                part_of(l->B[i], l->N[i], l->r[i], 32 * k, 32 * c, 32, l->s, l->wide, columns);
                interleave(columns, 32, panels + (c * steps + k) * 2 * TILE, 32);
            }
#pragma omp for schedule(static)
        for (int64_t m = 0; m < l->M; m += 32) {
            block_rows(l->G[i], l->M, l->N[i], m, G[i] + m * l->N[i]);
            for (int64_t c = 0; c < parts; c++) {
                clear();
                along(G[i] + m * l->N[i], panels + c * steps * 2 * TILE, steps, 1);
                put(U + m * l->R + 32 * l->at[i] + 1024 * c, 32, 32);
            }
        }
    }
}

WITH_TILES static void gradient_of_X(const Layers *l, half *const *G, const half *U, half *panel, half *columns)
{
    int64_t depth = 0;
    for (int64_t i = 0; i < l->n; i++) depth += l->N[i];
    const int64_t rows = chunk(l->M, depth);
    for (int64_t from = 0; from < l->M; from += rows) {
#pragma omp for schedule(static) nowait
        for (int64_t n = 0; n < l->K; n += 32) {
            half *tiles = panel;
            for (int64_t i = 0; i < l->n; i++)
                for (int64_t k = 0; k < l->N[i]; k += 32, tiles += 2 * TILE) interleave(l->W[i] + k * l->K + n, l->K, tiles, 32);
            for (int64_t i = 0; i < l->n; i++)
                for (int64_t k = 0; k < l->r[i]; k += 32, tiles += 2 * TILE) {
                    part_of(l->A[i], l->r[i], l->K, k, n, 32, 1.0f, l->wide, columns);
                    interleave(columns, 32, tiles, 32);
                }
            for (int64_t m = from; m < l->M && m < from + rows; m += 32) {
                int64_t there = l->M - m < 32 ? l->M - m : 32;
                tiles = panel;
                clear();
                for (int64_t i = 0; i < l->n; tiles += l->N[i++] / 32 * 2 * TILE)
                    along(G[i] + m * l->N[i], tiles, l->N[i] / 32, there > 16);
                along(U + m * l->R, tiles, l->R / 32, there > 16);
                put(l->dX + m * l->K + n, l->K, there);
            }
        }
    }
}

/* Blocked rows of D or U, (M filled up, R) -> (R, M filled up); what fills a rank up is left out. */
static void turn(const Layers *l, const half *from, half *to)
{
    int64_t width = filled(l->M);
#pragma omp for schedule(static)
    for (int64_t m = 0; m < l->M; m += 32)
        for (int64_t i = 0; i < l->n; i++)
            for (int64_t c = l->at[i]; c < l->at[i] + l->r[i]; c++)
                for (int64_t j = 0; j < 32; j++) to[c * width + m + j] = from[m * l->R + c / 32 * 1024 + 32 * j + c % 32];
}

static inline void set(void *to, int64_t at, float value, int wide)
{
    if (wide) ((float *)to)[at] = value;
    else ((half *)to)[at] = rounded(value);
}

/* left (r, M filled up) times a panel of 32 columns from n on -> to (r, width), or (width, r) if `across`, scaled. */
WITH_TILES static void over_rows(const half *left, int64_t r, int64_t deep, const half *panel, int64_t n, int64_t width, void *to, int across, float s, int wide)
{
    float block[1024] __attribute__((aligned(64)));
    for (int64_t c = 0; c < r; c += 32) {
        int64_t there = r - c < 32 ? r - c : 32;
        clear();
        multiply(left + c * deep, deep, 32, panel, deep / 32, there > 16, 0);
        fetch(block, 32, there > 16);
        for (int64_t i = 0; i < there; i++)
            for (int64_t j = 0; j < 32; j++) set(to, across ? (n + j) * r + c + i : (c + i) * width + n + j, s * block[32 * i + j], wide);
    }
}

WITH_TILES static void gradients_of_factors(const Layers *l, const half *turned_U, const half *turned_D, half *panel)
{
    int64_t deep = filled(l->M);
#pragma omp for schedule(static) nowait
    for (int64_t n = 0; n < l->K; n += 32) {
        for (int64_t m = 0; m < l->M; m += 32) interleave(l->X + m * l->K + n, l->K, panel + m * 32, l->M - m);
        for (int64_t i = 0; i < l->n; i++) over_rows(turned_U + l->at[i] * deep, l->r[i], deep, panel, n, l->K, l->dA[i], 0, 1.0f, l->wide);
    }
    for (int64_t i = 0; i < l->n; i++) {
#pragma omp for schedule(static) nowait
        for (int64_t n = 0; n < l->N[i]; n += 32) {
            for (int64_t m = 0; m < l->M; m += 32) interleave(l->G[i] + m * l->N[i] + n, l->N[i], panel + m * 32, l->M - m);
            over_rows(turned_D + l->at[i] * deep, l->r[i], deep, panel, n, l->N[i], l->dB[i], 1, l->s, l->wide);
        }
    }
}

WITH_TILES static int backward(const Layers *l)
{
    int failed = 0;
    int64_t widest = 0, total = 0, deep = filled(l->M);
    half *G[MOST];
    for (int64_t i = 0; i < l->n; i++) {
        widest = filled(l->r[i]) * l->N[i] > widest ? filled(l->r[i]) * l->N[i] : widest;
        total += l->N[i];
    }
    half *panels = room(widest), *U = room(deep * l->R), *turned = room(2 * l->R * deep), *blocked = room(deep * total);
    for (int64_t i = 0, at = 0; i < l->n; at += deep * l->N[i++]) G[i] = blocked ? blocked + at : 0;
#pragma omp parallel
    {
        half *panel = room((total + l->R > deep ? total + l->R : deep) * 32), *columns = room(1024);
        if (!panels || !U || !turned || !blocked || !panel || !columns) note(&failed);
#pragma omp barrier
        if (!failed) {
            shape_tiles();
            gradient_of_D(l, G, panels, U, columns);
            if (l->dX) gradient_of_X(l, G, U, panel, columns);
            turn(l, U, turned);
            turn(l, l->D, turned + l->R * deep);
            gradients_of_factors(l, turned, turned + l->R * deep, panel);
            _tile_release();
        }
        free(panel);
        free(columns);
    }
    free(panels);
    free(U);
    free(turned);
    free(blocked);
    return failed;
}

int tiles_usable(void) { return may_use_tiles(); }
int lora_forward(const Layers *layers) { return forward(layers); }
int lora_backward(const Layers *layers) { return backward(layers); }

#else
int tiles_usable(void) { return 0; }
int lora_forward(const void *layers) { return layers != 0; }
int lora_backward(const void *layers) { return layers != 0; }
#endif
