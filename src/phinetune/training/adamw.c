/* The norm of all gradients and AdamW's step over all trained tensors, one call each, on CPUs.
 *
 * An adapter is hundreds of small tensors. torch calls its kernels once for each, and clipping reads and writes every gradient once more:
 * on short batches that is a tenth of a step. Here each number is read and written once, clipped on the way.
 *
 *     g = clip grad    m = b1 m + (1 - b1) g    v = b2 v + (1 - b2) g^2    p = (1 - lr decay) p - lr / c1 * m / (sqrt(v) / sqrt(c2) + eps)
 *
 * with ci = 1 - bi^t (Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2). Tensors are cut into pieces that
 * threads take as they come; a piece's sum is the same whoever adds it up, and sums are added in order: the same bits for any number of threads.
 *
 * Plain C over pointers, loaded by ctypes (adamw.py, which makes the checks and names the reference). OpenMP calls are left to be resolved
 * by the library that torch has loaded. Not here: dtypes other than float32, amsgrad, other optimizers.
 */
#include "../model/processors.h"
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

enum { PIECE = 1 << 13, LANES = 64 };

typedef struct { float *p, *g, *m, *v; int64_t n; } Trained; /* a tensor; p, m and v are not read for the norm */
typedef struct { float clip, decay, fresh, b2, fresh_square, root, eps, size; } Step;
/* decay: 1 - lr * weight decay; fresh: 1 - b1; fresh_square: 1 - b2, which float32's b2 would give to five digits only; root: 1 / sqrt(c2); size: lr / c1 */

static int64_t pieces_of(int64_t n) { return (n + PIECE - 1) / PIECE; }

static int64_t pieces(const Trained *all, int64_t count)
{
    int64_t sum = 0;
    for (int64_t i = 0; i < count; i++) sum += pieces_of(all[i].n);
    return sum;
}

/* The tensor of a piece, and where it begins in it; pieces are asked for in rising order, from tensor *i on, whose first is *first. */
static int64_t find(const Trained *all, int64_t piece, int64_t *i, int64_t *first)
{
    for (; piece - *first >= pieces_of(all[*i].n); ++*i) *first += pieces_of(all[*i].n);
    return (piece - *first) * PIECE;
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

FOR_EVERY_PROCESSOR
static double squares(const float *g, int64_t n)
{
    float sums[LANES] = {0};
    double sum = 0.0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int64_t j = 0; j < LANES; j++) sums[j] += g[i + j] * g[i + j];
    for (; i < n; i++) sum += (double)g[i] * g[i];
    for (int64_t j = 0; j < LANES; j++) sum += sums[j];
    return sum;
}

FOR_EVERY_PROCESSOR
static void update(float *restrict p, const float *restrict g, float *restrict m, float *restrict v, int64_t n, Step s)
{
    for (int64_t i = 0; i < n; i++) {
        const float grad = s.clip * g[i];
        m[i] += s.fresh * (grad - m[i]);
        v[i] = s.b2 * v[i] + s.fresh_square * grad * grad;
        p[i] = s.decay * p[i] - s.size * (m[i] / (sqrtf(v[i]) * s.root + s.eps));
    }
}

/* Of all g together; -1 without memory. */
double sum_of_squares(const Trained *all, int64_t count)
{
    const int64_t parts = pieces(all, count);
    double *sums = malloc((size_t)(parts ? parts : 1) * sizeof(double)), sum = 0.0;
    if (!sums) return -1.0;
#pragma omp parallel
    {
        int64_t i = 0, first = 0;
#pragma omp for schedule(dynamic, 4)
        for (int64_t k = 0; k < parts; k++) {
            const int64_t at = find(all, k, &i, &first);
            sums[k] = squares(all[i].g + at, least(all[i].n - at, PIECE));
        }
    }
    for (int64_t k = 0; k < parts; k++) sum += sums[k];
    free(sums);
    return sum;
}

void adamw(const Trained *all, int64_t count, float clip, float decay, float fresh, float b2, float fresh_square, float root, float eps,
           float size)
{
    const Step step = {clip, decay, fresh, b2, fresh_square, root, eps, size};
    const int64_t parts = pieces(all, count);
#pragma omp parallel
    {
        int64_t i = 0, first = 0;
#pragma omp for schedule(dynamic, 4)
        for (int64_t k = 0; k < parts; k++) {
            const int64_t at = find(all, k, &i, &first);
            const Trained *t = all + i;
            update(t->p + at, t->g + at, t->m + at, t->v + at, least(t->n - at, PIECE), step);
        }
    }
}
