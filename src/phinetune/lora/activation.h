/* The MLP's activation and its gradients on numbers in registers, for `tiles.c`, which computes them on results on their way to memory.
 *
 *     y = round(silu(gate)) up        silu(x) = x / (1 + e^-x)
 *
 * Step by step what `silu_gate` and `silu_gate_backward` in model/kernels.c compute, so that both give the same bits. Not here: other activations.
 */
#include "../model/tiles.h"

WITH_TILES static inline __m512 lower_numbers(__m512i x) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(x)), 16); }
WITH_TILES static inline __m512 upper_numbers(__m512i x) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(x, 1)), 16); }

/* 1 + e^-x; the constants are explained there. */
WITH_TILES static inline __m512 one_and_exponential(__m512 x)
{
    const __m512 shift = _mm512_set1_ps(12582912.0f), one = _mm512_set1_ps(1.0f);
    x = _mm512_sub_ps(_mm512_setzero_ps(), x);
    x = _mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_max_ps(_mm512_set1_ps(-87.0f), x)); /* what is no number stays none */
    const __m512 k = _mm512_sub_ps(_mm512_fmadd_ps(x, _mm512_set1_ps(1.442695041f), shift), shift);
    const __m512 r = _mm512_fnmadd_ps(k, _mm512_set1_ps(1.42860677e-6f), _mm512_fnmadd_ps(k, _mm512_set1_ps(0.693145752f), x));
    __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(1.3888889e-3f), _mm512_set1_ps(8.3333333e-3f));
    p = _mm512_fmadd_ps(r, p, _mm512_set1_ps(4.1666668e-2f));
    p = _mm512_fmadd_ps(r, p, _mm512_set1_ps(1.6666667e-1f));
    p = _mm512_fmadd_ps(r, p, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(r, p, one);
    p = _mm512_fmadd_ps(r, p, one);
    const __m512i power = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvttps_epi32(k), _mm512_set1_epi32(127)), 23);
    return _mm512_add_ps(one, _mm512_mul_ps(p, (__m512)power));
}

/* 32 numbers of gate and up -> round(silu(gate)) up. */
WITH_TILES static inline __m512i gated(__m512i gate, __m512i up)
{
    const __m512 low = lower_numbers(gate), high = upper_numbers(gate);
    const __m512i s = halves(_mm512_div_ps(low, one_and_exponential(low)), _mm512_div_ps(high, one_and_exponential(high)));
    return halves(_mm512_mul_ps(lower_numbers(s), lower_numbers(up)), _mm512_mul_ps(upper_numbers(s), upper_numbers(up)));
}

/* The gradients of 16 numbers of gate (in its place) and up (in its place), for the gradient of silu(gate) up. */
WITH_TILES static inline void gradients_of_gated(__m512 grad, __m512 *gate, __m512 *up)
{
    const __m512 one = _mm512_set1_ps(1.0f), s = _mm512_div_ps(one, one_and_exponential(*gate)), along = _mm512_mul_ps(grad, s);
    const __m512 slope = _mm512_mul_ps(along, _mm512_fmadd_ps(*gate, _mm512_sub_ps(one, s), one));
    const __m512 of_up = _mm512_mul_ps(*gate, along);
    *gate = _mm512_mul_ps(*up, slope);
    *up = of_up;
}
