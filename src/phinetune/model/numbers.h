/* Rows of numbers in bfloat16, or in float32 (`wide`), as floats to work on, and back; and the exponential of a row.
 *
 * Everything is static: each file that includes this is a library of its own. Not here: tiles' numbers (`tiles.h`), which their processors round.
 */
#pragma once
#include "processors.h"
#include <stdint.h>
#include <string.h>

static inline void load(float *to, const void *from, int64_t at, int64_t n, int wide)
{
    if (wide) {
        memcpy(to, (const float *)from + at, (size_t)n * sizeof(float));
        return;
    }
    const uint16_t *source = (const uint16_t *)from + at;
    uint32_t *bits = (uint32_t *)to;
    for (int64_t i = 0; i < n; i++) bits[i] = (uint32_t)source[i] << 16;
}

static inline uint32_t rounded(uint32_t bits) /* to bfloat16, to nearest, ties to even; what is no number stays none */
{
    uint32_t up = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : up;
}

static inline void store(void *to, int64_t at, const float *from, int64_t n, int wide)
{
    if (wide) {
        memcpy((float *)to + at, from, (size_t)n * sizeof(float));
        return;
    }
    uint16_t *target = (uint16_t *)to + at;
    const uint32_t *bits = (const uint32_t *)from;
    for (int64_t i = 0; i < n; i++) target[i] = (uint16_t)rounded(bits[i]);
}

static inline void as_stored(float *x, int64_t n, int wide) /* what storing and loading again would leave */
{
    uint32_t *bits = (uint32_t *)x;
    if (!wide)
        for (int64_t i = 0; i < n; i++) bits[i] = rounded(bits[i]) << 16;
}

/* x (n) becomes e^x to float32's last digit or two, in loops that compilers turn into vector instructions (Cody & Waite 1980, chapter 6). */
static inline void exponentials(float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) x[i] = x[i] < -87.0f ? -87.0f : x[i];
    for (int64_t i = 0; i < n; i++) x[i] = x[i] > 88.0f ? 88.0f : x[i];
    for (int64_t i = 0; i < n; i++) {
        float k = (x[i] * 1.442695041f + 12582912.0f) - 12582912.0f; /* to the nearest whole number, by the last bit of 1.5 * 2^23 */
        float r = x[i] - k * 0.693145752f - k * 1.42860677e-6f; /* ln 2 in two parts */
        float p = 1.0f + r * (1.0f + r * (0.5f + r * (1.6666667e-1f + r * (4.1666668e-2f + r * (8.3333333e-3f + r * 1.3888889e-3f)))));
        union { int32_t i; float f; } power = { ((int32_t)k + 127) << 23 };
        x[i] = p * power.f;
    }
}

/* Number i of a row; where `wide` is a constant, a loop over them becomes vector instructions. */
PUT_INSIDE float number(const void *from, int64_t i, int wide)
{
    union { uint32_t bits; float value; } n;
    if (wide) return ((const float *)from)[i];
    n.bits = (uint32_t)((const uint16_t *)from)[i] << 16;
    return n.value;
}

PUT_INSIDE float put(void *to, int64_t i, float x, int wide) /* as number i of a row -> what is read there again */
{
    union { uint32_t bits; float value; } n = { .value = x };
    if (wide) return ((float *)to)[i] = x;
    n.bits = rounded(n.bits);
    ((uint16_t *)to)[i] = (uint16_t)n.bits;
    n.bits <<= 16;
    return n.value;
}

PUT_INSIDE float once_stored(float x, int wide)
{
    uint16_t half;
    return wide ? x : put(&half, 0, x, wide);
}
