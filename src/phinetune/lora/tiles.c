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
#include "strips.h"
#ifdef HAS_TILES

enum { PART = 192 }; /* columns of A that a thread packs at a time */

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
