/* The attention of a decoder layer between its projections, in one call forward and one backward: rotary positions,
 * causal rows and trees, grouped keys, and the gradients of all of it.
 *
 *     P = softmax(s Q K')      O = P V      dV = P' G      dP = G V'      dS = P * (dP - rowsum(P * dP))      dQ = s dS K      dK = s dS' Q
 *
 * An entry is a run of tokens, each of which sees itself, those before it in the run, and the entry's prefix, a run of tokens before it. Work
 * is divided by entries and groups of heads that share keys. Within one, 32 queries at a time meet all keys that the last of them sees: a
 * whole row of scores lies in the cache, so its softmax needs no second look (Dao et al. 2022, "FlashAttention", has none to spare). Nothing of
 * P is kept for the way back but the logarithm of each row's sum (the same, section 3.1); P is formed again, a part of a row at a time, as
 * rowsum(P * dP) = rowsum(O * G) is known beforehand.
 *
 * dK and dV are summed over 128 queries in registers, over heads and queries in float32, and over entries that have a prefix in common in float32
 * as well, one sum for each thread; so the result depends on the number of threads, in float32's last digits, and on nothing else.
 *
 * Plain C over pointers, called by attention_tiles.py, which makes the checks and names the reference. bfloat16; heads of a multiple of 32
 * numbers. Not here: dropout, other masks, other processors.
 */
#include "attention_rows.h"
#ifdef HAS_TILES

enum { QUERIES = 128, BLOCKS = QUERIES / 32, PART = 128 }; /* queries whose dK and dV are summed in registers; keys whose scores stay in the
                                                             * nearest cache on the way back */

/* ---- an entry's keys, values and queries ---- */

typedef struct {
    int64_t prefix, before, first, own, keys; /* `before` tokens from `prefix` on, `own` from `first` on; keys: both, filled up */
} Run;

static Run run_of(const Attention *a, int64_t entry)
{
    const int64_t *e = a->entry + 4 * entry;
    Run run = {e[0], e[1], e[2], e[3], filled(e[1] + e[3])};
    return run;
}

static inline int64_t token_of(const Run *run, int64_t key) { return key < run->before ? run->prefix + key : run->first + key - run->before; }

/* A group's keys or values of all tokens of a run -> to (keys, D), zeros where none is. */
WITH_TILES static void take_all(const Attention *a, const Run *run, const half *from, int64_t stride, int turned, half *to)
{
    int64_t there = run->before + run->own;
    for (int64_t key = 0; key < there; key++) take(a, from + token_of(run, key) * stride, token_of(run, key), turned, 1.0f, to + key * a->D);
    memset(to + there * a->D, 0, (size_t)((run->keys - there) * a->D) * sizeof(half));
}

/* 32 queries of a head, or their gradients, from the run's token `at` on -> to (32, D). */
WITH_TILES static void take_block(const Attention *a, const Run *run, const half *from, int64_t stride, int64_t at, int turned, half *to)
{
    int64_t rows = run->own - at < 32 ? run->own - at : 32, next = run->own - at - 32 < 32 ? run->own - at - 32 : 32;
    for (int64_t i = 0; i < next; i++) /* the next block's, before anything waits for them */
        for (int64_t d = 0; d < a->D; d += 32) _mm_prefetch((const char *)(from + (run->first + at + 32 + i) * stride + d), _MM_HINT_T1);
    for (int64_t i = 0; i < rows; i++)
        take(a, from + (run->first + at + i) * stride, run->first + at + i, turned, turned ? a->scale : 1.0f, to + i * a->D);
    memset(to + rows * a->D, 0, (size_t)((32 - rows) * a->D) * sizeof(half));
}

/* x (keys, D) -> panels of x', one for each 32 keys. */
WITH_TILES static void pack_across(const half *x, int64_t keys, int64_t D, half *to)
{
    for (int64_t n = 0; n < keys; n += 32) pack_rows(x + n * D, D, to + n * D);
}

/* x (keys, D) -> panels of x, one for each 32 of D. */
WITH_TILES static void pack_along(const half *x, int64_t keys, int64_t D, half *to)
{
    for (int64_t d = 0; d < D; d += 32)
        for (int64_t n = 0; n < keys; n += 32) interleave(x + n * D + d, D, to + d * keys + n * 32, 32);
}

/* left (32, D) times the panels of `across`, up to `width` -> scores (32, width), rows `stride` apart. */
WITH_TILES static void score(const half *left, const half *across, int64_t D, int64_t width, float *scores, int64_t stride, int lower)
{
    for (int64_t n = 0; n < width; n += 32) product(left, D, 32, across + n * D, D / 32, scores + n, stride, lower);
}

/* left (32, width), rows `stride` apart, times the panels of `along`, of which each is `keys` deep -> to (32, D). */
WITH_TILES static void combine(const half *left, int64_t stride, int64_t width, const half *along, int64_t keys, int64_t D, float *to, int lower)
{
    for (int64_t d = 0; d < D; d += 32) product(left, stride, 32, along + d * keys, width / 32, to + d, D, lower);
}

/* ---- memory of a thread ---- */

typedef struct {
    half *K, *V, *packed[3], *P, *dS, *wide[2], *turned[2], *q, *g;
    float *scores, *dP, *rows, *sums[2];
    void *all;
} Room;

static void *part(char **at, int64_t bytes)
{
    void *found = *at;
    *at += (bytes + 63) / 64 * 64;
    return found;
}

/* What a thread needs for runs of up to `keys` keys. With `at` 0 its size is counted only. */
static int64_t lay_out(Room *room, char *at, int64_t keys, int64_t D, int backward)
{
    char *start = at;
    int64_t flat = keys * D * (int64_t)sizeof(half);
    room->K = part(&at, flat), room->V = part(&at, flat);
    for (int i = 0; i < 2 + backward; i++) room->packed[i] = part(&at, flat);
    int64_t row = backward ? PART : keys;
    room->P = part(&at, backward ? 0 : 32 * row * 2), room->scores = part(&at, 32 * row * 4);
    room->q = part(&at, 32 * D * 2), room->rows = part(&at, 32 * D * 4);
    if (backward) {
        room->dS = part(&at, 32 * keys * 2), room->dP = part(&at, 32 * PART * 4), room->g = part(&at, 32 * D * 2);
        for (int i = 0; i < 2; i++) {
            room->wide[i] = part(&at, QUERIES * keys * 2);
            room->turned[i] = part(&at, QUERIES * D * 2);
            room->sums[i] = part(&at, keys * D * 4);
        }
    }
    return at - start;
}

static int make_room(Room *room, const Attention *a, int backward)
{
    int64_t keys = 0;
    for (int64_t e = 0; e < a->entries; e++) keys = run_of(a, e).keys > keys ? run_of(a, e).keys : keys;
    int64_t size = lay_out(room, 0, keys, a->D, backward);
    room->all = aligned_alloc(64, (size_t)size);
    if (room->all) lay_out(room, room->all, keys, a->D, backward);
    return room->all != 0;
}

/* ---- forward ---- */

WITH_TILES static void forward_run(const Attention *a, const Run *run, int64_t group, const Room *room)
{
    int64_t D = a->D, each = a->heads / a->groups;
    take_all(a, run, a->k + group * D, a->k_stride, 1, room->K);
    take_all(a, run, a->v + group * D, a->v_stride, 0, room->V);
    pack_across(room->K, run->keys, D, room->packed[0]);
    pack_along(room->V, run->keys, D, room->packed[1]);
    for (int64_t head = group * each; head < (group + 1) * each; head++)
        for (int64_t at = 0; at < run->own; at += 32) {
            int64_t rows = run->own - at < 32 ? run->own - at : 32, width = filled(run->before + at + rows);
            float totals[32], tops[32], *sums = a->sums + head * a->T + run->first + at;
            take_block(a, run, a->q + head * D, a->q_stride, at, 1, room->q);
            score(room->q, room->packed[0], D, width, room->scores, width, rows > 16);
            for (int64_t i = 0; i < rows; i++)
                totals[i] = exponential_row(room->scores + i * width, room->P + i * width, width, run->before + at + i + 1, tops + i);
            for (int64_t i = 0; i < rows; i += 16) {
                const __mmask16 there = before(i, rows);
                const __m512 total = _mm512_mask_loadu_ps(_mm512_set1_ps(1.0f), there, totals + i);
                _mm512_mask_storeu_ps(sums + i, there, _mm512_add_ps(_mm512_maskz_loadu_ps(there, tops + i), logarithm_of_two(total)));
                _mm512_mask_storeu_ps(totals + i, there, _mm512_div_ps(_mm512_set1_ps(1.0f), total));
            }
            if (rows < 32) memset(room->P + rows * width, 0, (size_t)((32 - rows) * width) * sizeof(half));
            combine(room->P, width, width, room->packed[1], run->keys, D, room->rows, rows > 16);
            for (int64_t i = 0; i < rows; i++)
                give(a, room->rows + i * D, 0, 0, totals[i], a->out + (run->first + at + i) * a->heads * D + head * D);
        }
}

WITH_TILES static int forward(const Attention *a)
{
    int failed = 0;
#pragma omp parallel
    {
        Room room;
        if (!make_room(&room, a, 0)) note(&failed);
#pragma omp barrier
        if (!failed) {
            shape_tiles();
#pragma omp for schedule(dynamic)
            for (int64_t unit = 0; unit < a->entries * a->groups; unit++) {
                Run run = run_of(a, unit / a->groups);
                forward_run(a, &run, unit % a->groups, &room);
            }
            release_tiles();
        }
        free(room.all);
    }
    return failed;
}

/* ---- backward ---- */

/* x (32, D) -> its transpose in blocks of 32 x 32, QUERIES / 32 of them side by side for each 32 of D; this is number `block`. */
WITH_TILES static void turn(const half *x, int64_t D, int64_t block, half *to)
{
    half pairs[2 * TILE] __attribute__((aligned(64)));
    for (int64_t d = 0; d < D; d += 32) {
        half *here = to + (d / 32 * BLOCKS + block) * 2 * TILE;
        interleave(x + d, D, pairs, 32);
        transpose_square(pairs, 32, here);
    }
}

/* sums (D, keys) += left (D, queries) times right (queries, keys): `turned` blocks and interleaved ones, from block `from[key / 32]` on. */
WITH_TILES static void add_over_queries(const half *turned, const half *wide, const int64_t *widths, int64_t blocks, int64_t D, int64_t keys, float *sums)
{
    for (int64_t n = 0, from = 0; n < widths[blocks - 1]; n += 32) {
        while (widths[from] <= n) from++; /* earlier queries do not see these keys */
        for (int64_t d = 0; d < D; d += 32)
            add_product(turned + (d / 32 * BLOCKS + from) * 2 * TILE, 32, 2 * TILE, wide + (n / 32 * BLOCKS + from) * 2 * TILE, blocks - from, sums + d * keys + n, keys);
    }
}

/* 32 queries: dQ is written, P and dS (32, width) are left interleaved as block number `block`. */
WITH_TILES static void backward_block(const Attention *a, const Run *run, int64_t head, int64_t at, int64_t width, int64_t block, const Room *room)
{
    int64_t D = a->D, rows = run->own - at < 32 ? run->own - at : 32;
    take_block(a, run, a->q + head * D, a->q_stride, at, 1, room->q);
    take_block(a, run, a->grad + head * D, a->heads * D, at, 0, room->g);
    const float *logarithms = a->sums + head * a->T + run->first + at;
    float along[32];
    for (int64_t i = 0; i < rows; i++) along[i] = product_of(a->out + (run->first + at + i) * a->heads * D + head * D, room->g + i * D, D);
    for (int64_t n = 0; n < width; n += PART) {
        int64_t some = width - n < PART ? width - n : PART, seen = run->before + at + 1 - n;
        score(room->q, room->packed[0] + n * D, D, some, room->scores, PART, rows > 16);
        score(room->g, room->packed[2] + n * D, D, some, room->dP, PART, rows > 16);
        for (int64_t i = 0; i < 32; i += 2)
            for (int64_t k = 0; k < some; k += 32) {
                const int64_t to = ((n + k) / 32 * BLOCKS + block) * 2 * TILE + 16 * i;
                __m512i P[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()}, dS[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
                for (int64_t j = i; j < i + 2 && j < rows; j++) {
                    gradients_of_32(room->scores + j * PART + k, room->dP + j * PART + k, seen + j - k, logarithms[j], along[j], P + j - i, dS + j - i);
                    _mm512_store_si512(room->dS + j * width + n + k, dS[j - i]);
                }
                put_pairs(P[0], P[1], room->wide[0] + to);
                put_pairs(dS[0], dS[1], room->wide[1] + to);
            }
    }
    if (rows < 32) memset(room->dS + rows * width, 0, (size_t)((32 - rows) * width) * sizeof(half));
    combine(room->dS, width, width, room->packed[1], run->keys, D, room->rows, rows > 16);
    for (int64_t i = 0; i < rows; i++)
        give(a, room->rows + i * D, run->first + at + i, 1, a->scale, a->dq + (run->first + at + i) * a->dq_stride + head * D);
    turn(room->g, D, block, room->turned[0]);
    turn(room->q, D, block, room->turned[1]);
}

/* sums (D, keys) of a run -> where they belong: into the threads' sums of what is a prefix, or turned back to its token. */
WITH_TILES static void give_keys(const Attention *a, const Run *run, const float *sums, int turned, float *shared, half *to, int64_t stride)
{
    float x[16 * WIDEST] __attribute__((aligned(64)));
    int64_t there = run->before + run->own;
    for (int64_t key = 0; key < there; key += 16) {
        for (int64_t d = 0; d < a->D; d += 16) {
            float square[256] __attribute__((aligned(64)));
            transpose_pairs((const half *)(sums + d * run->keys + key), 2 * run->keys, (half *)square);
            for (int64_t i = 0; i < 16; i++) memcpy(x + i * a->D + d, square + 16 * i, 64);
        }
        for (int64_t i = 0; i < 16 && key + i < there; i++) {
            int64_t token = token_of(run, key + i);
            float *row = x + i * a->D;
            if (token < a->shared)
                for (int64_t d = 0; d < a->D; d++) shared[token * a->D + d] += row[d];
            else give(a, row, token, turned, 1.0f, to + token * stride);
        }
    }
}

WITH_TILES static void backward_unit(const Attention *a, int64_t unit, const Room *room, float *shared)
{
    const Run own = run_of(a, unit / a->groups), *run = &own;
    int64_t group = unit % a->groups, D = a->D, each = a->heads / a->groups, widths[BLOCKS], common = a->shared * D;
    take_all(a, run, a->k + group * D, a->k_stride, 1, room->K);
    take_all(a, run, a->v + group * D, a->v_stride, 0, room->V);
    pack_across(room->K, run->keys, D, room->packed[0]);
    pack_along(room->K, run->keys, D, room->packed[1]);
    pack_across(room->V, run->keys, D, room->packed[2]);
    for (int i = 0; i < 2; i++) memset(room->sums[i], 0, (size_t)(run->keys * D) * sizeof(float));
    for (int64_t head = group * each; head < (group + 1) * each; head++)
        for (int64_t start = 0; start < run->own; start += QUERIES) {
            int64_t blocks = 0;
            for (int64_t at = start; at < run->own && at < start + QUERIES; at += 32, blocks++) {
                widths[blocks] = filled(run->before + (at + 32 < run->own ? at + 32 : run->own));
                backward_block(a, run, head, at, widths[blocks], blocks, room);
            }
            for (int i = 0; i < 2; i++) add_over_queries(room->turned[i], room->wide[i], widths, blocks, D, run->keys, room->sums[i]);
        }
    give_keys(a, run, room->sums[1], 1, shared + 2 * group * common, a->dk + group * D, a->dk_stride);
    give_keys(a, run, room->sums[0], 0, shared + (2 * group + 1) * common, a->dv + group * D, a->dv_stride);
}

/* The threads' sums of a prefix's token -> its gradients. */
WITH_TILES static void give_shared(const Attention *a, int64_t token, const float *shared, int64_t threads)
{
    int64_t common = a->shared * a->D;
    for (int64_t group = 0; group < a->groups; group++)
        for (int64_t part = 0; part < 2; part++) {
            float sum[WIDEST];
            memset(sum, 0, sizeof sum);
            for (int64_t t = 0; t < threads; t++)
                for (int64_t d = 0; d < a->D; d++) sum[d] += shared[((t * a->groups + group) * 2 + part) * common + token * a->D + d];
            if (part) give(a, sum, token, 0, 1.0f, a->dv + token * a->dv_stride + group * a->D);
            else give(a, sum, token, 1, 1.0f, a->dk + token * a->dk_stride + group * a->D);
        }
}

int omp_get_thread_num(void);
int omp_get_num_threads(void);
int omp_get_max_threads(void);

WITH_TILES static int backward(const Attention *a)
{
    int failed = 0;
    int64_t each = 2 * a->groups * a->shared * a->D, units = a->entries * a->groups;
    float *shared = calloc((size_t)(omp_get_max_threads() * each + 1), sizeof(float));
#pragma omp parallel
    {
        Room room;
        if (!make_room(&room, a, 1) || !shared) note(&failed);
#pragma omp barrier
        if (!failed) {
            shape_tiles();
            if (a->shared) { /* each thread always sums up the same entries */
#pragma omp for schedule(static, 1)
                for (int64_t unit = 0; unit < units; unit++) backward_unit(a, unit, &room, shared + omp_get_thread_num() * each);
            } else {
#pragma omp for schedule(dynamic)
                for (int64_t unit = 0; unit < units; unit++) backward_unit(a, unit, &room, shared);
            }
            release_tiles();
#pragma omp for schedule(static)
            for (int64_t token = 0; token < a->shared; token++) give_shared(a, token, shared, omp_get_num_threads());
        }
        free(room.all);
    }
    free(shared);
    return failed;
}

int tiles_usable(void) { return may_multiply(); }
int tiles_use(int how) { return use(how); }
int attention_forward(const Attention *a) { return forward(a); }
int attention_backward(const Attention *a) { return backward(a); }

#else
int tiles_usable(void) { return 0; }
int tiles_use(int how) { return (void)how, 0; }
int attention_forward(const void *a) { return a != 0; }
int attention_backward(const void *a) { return a != 0; }
#endif
