/* Cross-entropy of rows of logits, and its gradients in their place, on CPUs.
 *
 *     l = -sum_v q_v log p_v        dl/dz = p - q        p = softmax(z)        q = (1 - s) onehot(t) + s / n
 *
 * torch has the logarithm of p as a tensor of its own, in float32, twice as large as the logits, and goes over it five times. Here a row is
 * read three times, a piece in the nearest cache, the row in the second: for its highest number, for the sum of exponentials, for the
 * gradients. Exponentials are formed twice, which is cheaper than keeping them.
 *
 * Plain C over pointers, loaded by ctypes (cross_entropy.py, which makes the checks and names the reference). Sums over a row are float32 in a
 * piece and float64 over pieces. Not here: the products before and after, other dtypes.
 */
#include "../model/numbers.h"
#include <math.h>

enum { PIECE = 512, MASKED = -100 };
static const int64_t GRAIN = 1 << 14; /* numbers that are worth a thread */

static inline int64_t piece(int64_t at, int64_t n) { return n - at < PIECE ? n - at : PIECE; }

/* x (n) -> e^(x - less), their sum */
static inline float exponentials_less(float *x, int64_t n, float less)
{
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i++) x[i] -= less;
    exponentials(x, n);
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += x[i];
    return sum;
}

FOR_EVERY_PROCESSOR
static float row_loss(void *logits, int64_t row, int64_t target, int64_t n, float smoothing, int gradient, int wide)
{
    float x[PIECE], highest = -INFINITY, wanted = 0.0f;
    double sum = 0.0, all = 0.0;
    const int64_t from = row * n;
    for (int64_t at = 0; at < n; at += PIECE) {
        const int64_t count = piece(at, n);
        float most = -INFINITY, some = 0.0f;
        load(x, logits, from + at, count, wide);
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < count; i++) most = x[i] > most ? x[i] : most;
        highest = most > highest ? most : highest;
        if (smoothing == 0.0f) continue;
#pragma omp simd reduction(+ : some)
        for (int64_t i = 0; i < count; i++) some += x[i];
        all += some;
    }
    for (int64_t at = 0; at < n; at += PIECE) {
        load(x, logits, from + at, piece(at, n), wide);
        if (target / PIECE == at / PIECE) wanted = x[target - at];
        sum += exponentials_less(x, piece(at, n), highest);
    }
    const float whole = highest + logf((float)sum), share = smoothing / (float)n; /* log of the sum of all e^z */
    for (int64_t at = 0; at < n && gradient; at += PIECE) {
        const int64_t count = piece(at, n);
        load(x, logits, from + at, count, wide);
        exponentials_less(x, count, whole);
        for (int64_t i = 0; i < count; i++) x[i] -= share;
        if (target / PIECE == at / PIECE) x[target - at] += smoothing - 1.0f;
        store(logits, from + at, x, count, wide);
    }
    const float loss = whole - wanted;
    return smoothing == 0.0f ? loss : (1.0f - smoothing) * loss + smoothing * (whole - (float)(all / (double)n));
}

/* logits (rows, n) -> losses (rows), and, if `gradient`, the logits' gradients in their place; 0 for rows whose target is MASKED. 1, and nothing
 * done, if another target is not one of 0 to n - 1. */
int cross_entropy(void *logits, const int64_t *targets, float *losses, int64_t rows, int64_t n, float smoothing, int gradient, int wide)
{
    for (int64_t row = 0; row < rows; row++)
        if (targets[row] != MASKED && (targets[row] < 0 || targets[row] >= n)) return 1;
#pragma omp parallel for schedule(dynamic) if (rows * n > GRAIN)
    for (int64_t row = 0; row < rows; row++) {
        const size_t size = wide ? sizeof(float) : sizeof(uint16_t);
        if (targets[row] != MASKED) losses[row] = row_loss(logits, row, targets[row], n, smoothing, gradient, wide);
        else {
            losses[row] = 0.0f;
            if (gradient) memset((char *)logits + (size_t)(row * n) * size, 0, (size_t)n * size);
        }
    }
    return 0;
}
