/* The loss of an output head and its gradient of what comes in, in one pass over the head's weights.
 *
 *     z = X W'        l_i = log sum_v e^z_iv - z_it        dX_i = sum_(v /= t) p_iv W_v - (1 - p_it) W_t        p = softmax(z)
 *
 * which is attention of rows X over a vocabulary of keys that are values as well: what a row has summed up is kept relative to a power of
 * two that goes up when its scores do (Milakov & Gimelshein 2018, "Online normalizer calculation for softmax", section 3). So neither logits
 * nor probabilities are ever in memory. As separate products the weights, of which there are most in a small model, are read and packed twice,
 * and the logits, twice as large as the weights for as many rows as they have columns, are written three times and read four.
 *
 * Of a row's target only its score is kept: 1 - p_t is what the others have summed up, exact to float32's digits also where p_t is nearly 1.
 *
 * The vocabulary is cut into parts that threads take as they come; sums of parts are added in order: the same bits for any number of threads.
 *
 * Plain C over pointers, called by head_tiles.py, which makes the checks and names the reference. X (M, K) and W (V, K) bfloat16, rows
 * contiguous, K and V multiples of 32. Sums are float32. Not here: a bias, label smoothing, gradients of W, other processors.
 */
#include "../model/tiles.h"
#ifdef HAS_TILES
#include <math.h>

enum { PARTS = 16, MASKED = -100 };
enum { MOST = 1 << 18, ROWS = 256 };          /* numbers that rows taken together have at most, so that their sums stay in the second cache; rows */
enum { PACKED = 200000, FEWEST = 64, MANY = 256 }; /* numbers of words taken together, likewise; words: a row's sums are read and written for so many */
static const float ROOM_ABOVE = 16.0f; /* scores may be so much higher than the power of two, as logarithms, before it goes up */
static const float NOTHING = -1e30f;   /* a score of which no power of two is left */

typedef struct {
    int64_t M, K, V;
    const half *X, *W;
    const int64_t *targets;
    float *losses;
    half *dX;    /* null: only the loss is wanted */
    float *room; /* as many as head_room says */
} Head;

static int64_t rows_together(int64_t M, int64_t K)
{
    int64_t most = MOST / K / 32 * 32, parts;
    most = most > ROWS ? ROWS : most < 32 ? 32 : most;
    parts = (filled(M) + most - 1) / most;
    return filled((M + parts - 1) / parts);
}

static int64_t words_together(int64_t K)
{
    const int64_t most = PACKED / K / 32 * 32;
    return most > MANY ? MANY : most < FEWEST ? FEWEST : most;
}

/* What a part of the vocabulary has summed up of some rows. */
typedef struct { float *tops, *sums, *wanted, *all; } Sums; /* (rows) each: the power of two, the sum of 2^(z log2 e - top) of all but the
                                                             * target, z of the target; then sum of 2^(..) W_v, (rows, K), each 32 x 32 as
                                                             * tiles are kept */

static int64_t numbers_of_sums(int64_t rows, int64_t K) { return rows * (K + 16); }

static Sums sums_of(const Head *h, int64_t rows, int64_t part)
{
    float *at = h->room + part * numbers_of_sums(rows, h->K);
    return (Sums){at, at + rows, at + 2 * rows, at + 16 * rows};
}

/* What a thread has for itself. */
typedef struct { half *X, *across, *along, *P; float *scores; int64_t words; } Own; /* words: together */

/* Row i of a block kept by tiles: 32 numbers, in two halves. */
static inline float *half_of_row(float *kept, int64_t i, int64_t which) { return kept + i / 16 * 512 + which * 256 + i % 16 * 16; }

WITH_TILES static void raise_row(float *all, int64_t K, int64_t i, float factor)
{
    const __m512 by = _mm512_set1_ps(factor);
    for (int64_t k = 0; k < K; k += 32)
        for (int64_t j = 0; j < 2; j++) {
            float *at = half_of_row(all + 32 * k, i, j);
            _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), by));
        }
}

/* Scores (words) of a row -> 2^(scores log2 e - top), rounded, and their sum added to the row's. */
WITH_TILES static void row_of_words(const Head *h, const Sums *s, int64_t row, const float *scores, int64_t words, half *P)
{
    const __m512 log2e = _mm512_set1_ps(LOG2E);
    __m512 highest = _mm512_loadu_ps(scores), sum = _mm512_setzero_ps();
    for (int64_t v = 16; v < words; v += 16) highest = _mm512_max_ps(highest, _mm512_loadu_ps(scores + v));
    const float top = _mm512_reduce_max_ps(highest) * LOG2E;
    if (!(top <= s->tops[row] + ROOM_ABOVE)) { /* the first words, too, and what is no number */
        const float factor = s->sums[row] == 0.0f ? 0.0f : exp2f(s->tops[row] - top);
        if (h->dX && s->sums[row] != 0.0f) raise_row(s->all + row / 32 * 32 * h->K, h->K, row % 32, factor);
        s->sums[row] *= factor;
        s->tops[row] = top;
    }
    const __m512 down = _mm512_set1_ps(-s->tops[row]);
    for (int64_t v = 0; v < words; v += 32) {
        __m512 p[2];
        for (int j = 0; j < 2; j++) {
            p[j] = power_of_two(_mm512_fmadd_ps(_mm512_loadu_ps(scores + v + 16 * j), log2e, down));
            sum = _mm512_add_ps(sum, p[j]);
        }
        _mm512_store_si512(P + v, halves(p[0], p[1]));
    }
    s->sums[row] += _mm512_reduce_add_ps(sum);
}

/* Words from `first` on, for the rows from `from` on, `rows` of them, filled up. */
WITH_TILES static void some_words(const Head *h, const Sums *s, const Own *own, int64_t from, int64_t rows, int64_t first, int64_t words)
{
    const int64_t K = h->K, left = h->M - from;
    for (int64_t v = 0; v < words; v += 32) {
        const half *W = h->W + (first + v) * K;
        pack_rows(W, K, own->across);
        for (int64_t k = 0; k < K && h->dX; k += 32) interleave(W + k, K, own->along + (k * words + v * 32), 32);
        for (int64_t m = 0; m < rows; m += 32) product(own->X + m * K, 32, 1024, own->across, K / 32, own->scores + m * own->words + v, own->words, left - m > 16);
    }
    for (int64_t m = 0; m < rows; m += 32) {
        for (int64_t i = m; i < m + 32 && i < left; i++) {
            float *scores = own->scores + i * own->words;
            const int64_t target = h->targets[from + i] - first;
            if (target >= 0 && target < words) {
                s->wanted[i] = scores[target];
                scores[target] = NOTHING;
            }
            row_of_words(h, s, i, scores, words, own->P + (i - m) * own->words);
        }
        for (int64_t k = 0; k < K && h->dX; k += 32) {
            float *kept = s->all + m * K + 32 * k;
            resume(kept, left - m > 16);
            multiply(own->P, own->words, 32, own->along + k * words, words / 32, left - m > 16);
            keep(kept, left - m > 16);
        }
    }
}

/* The parts' sums of a row -> its loss and gradient. */
WITH_TILES static void add_up(const Head *h, int64_t from, int64_t rows, int64_t row)
{
    const int64_t target = h->targets[from + row], K = h->K;
    float top = -INFINITY, others = 0.0f, wanted = 0.0f, factors[PARTS];
    half *to = h->dX ? h->dX + (from + row) * K : 0;
    if (target == MASKED) {
        h->losses[from + row] = 0.0f;
        if (to) memset(to, 0, (size_t)K * sizeof(half));
        return;
    }
    for (int64_t p = 0; p < PARTS; p++) {
        const Sums s = sums_of(h, rows, p);
        top = s.tops[row] > top ? s.tops[row] : top;
    }
    for (int64_t p = 0; p < PARTS; p++) {
        const Sums s = sums_of(h, rows, p);
        factors[p] = s.sums[row] == 0.0f ? 0.0f : exp2f(s.tops[row] - top);
        others += s.sums[row] * factors[p];
        wanted += s.wanted[row];
    }
    const float above = wanted * LOG2E - top, own = above > 0.0f ? 1.0f : exp2f(above), rest = above > 0.0f ? exp2f(-above) : 1.0f;
    others *= rest; /* of these two the larger one is about 1 */
    h->losses[from + row] = above > 0.0f ? log1pf(others) : logf(others + own) - above / LOG2E;
    const __m512 scale = _mm512_set1_ps(rest / (others + own)), left = _mm512_set1_ps(others / (others + own)); /* left: 1 - p of the target */
    for (int64_t k = 0; k < K && to; k += 32) {
        __m512 d[2];
        for (int64_t j = 0; j < 2; j++) {
            d[j] = _mm512_setzero_ps();
            for (int64_t p = 0; p < PARTS; p++) {
                float *all = sums_of(h, rows, p).all + 32 * (row / 32 * K + k);
                d[j] = _mm512_fmadd_ps(_mm512_load_ps(half_of_row(all, row % 32, j)), _mm512_set1_ps(factors[p]), d[j]);
            }
            d[j] = _mm512_fmsub_ps(d[j], scale, _mm512_mul_ps(left, load_halves(h->W + target * K + k + 16 * j)));
        }
        _mm512_storeu_si512(to + k, halves(d[0], d[1]));
    }
}

static void *numbers(int64_t count, size_t size) { return aligned_alloc(64, ((size_t)count * size + 63) / 64 * 64); }

static int targets_are_words(const Head *h)
{
    for (int64_t i = 0; i < h->M; i++)
        if (h->targets[i] != MASKED && (h->targets[i] < 0 || h->targets[i] >= h->V)) return 0;
    return 1;
}

/* 1: no memory. 2, and nothing done: a target is not one of 0 to V - 1. */
WITH_TILES static int head_loss_of(const Head *h)
{
    if (!targets_are_words(h)) return 2;
    const int64_t K = h->K, together = rows_together(h->M, K), words = words_together(K), times = (h->V + words - 1) / words;
    int failed = 0;
#pragma omp parallel
    {
        Own own = {numbers(together * K, 2), numbers(32 * K, 2), numbers(words * K, 2), numbers(32 * words, 2), numbers(together * words, 4), words};
        if (!own.X || !own.across || !own.along || !own.P || !own.scores) note(&failed);
#pragma omp barrier
        if (!failed) {
            shape_tiles();
            memset(own.P, 0, (size_t)(32 * words) * sizeof(half)); /* also those of rows that are not there */
            for (int64_t from = 0; from < h->M; from += together) {
                const int64_t rows = filled(h->M - from < together ? h->M - from : together);
                for (int64_t m = 0; m < rows; m += 32) block_rows(h->X + from * K, h->M - from, K, m, own.X + m * K);
#pragma omp for schedule(dynamic)
                for (int64_t part = 0; part < PARTS; part++) {
                    const Sums s = sums_of(h, rows, part);
                    memset(s.tops, 0, (size_t)numbers_of_sums(rows, K) * sizeof(float));
                    for (int64_t i = 0; i < rows; i++) s.tops[i] = -INFINITY;
                    for (int64_t t = times * part / PARTS; t < times * (part + 1) / PARTS; t++)
                        some_words(h, &s, &own, from, rows, words * t, h->V - words * t < words ? h->V - words * t : words);
                }
#pragma omp for schedule(static)
                for (int64_t row = 0; row < rows; row++)
                    if (from + row < h->M) add_up(h, from, rows, row);
            }
            release_tiles();
        }
        free(own.X), free(own.across), free(own.along), free(own.P), free(own.scores);
    }
    return failed;
}

int tiles_usable(void) { return may_multiply(); }
int tiles_use(int how) { return use(how); }
int64_t head_room(int64_t M, int64_t K) { return PARTS * numbers_of_sums(rows_together(M, K), K); }
int head_loss(const Head *head) { return head_loss_of(head); }

#else
int tiles_usable(void) { return 0; }
int tiles_use(int how) { return (void)how, 0; }
long long head_room(long long M, long long K) { return M + K; }
int head_loss(const void *head) { return head != 0; }
#endif
