/* `FOR_EVERY_PROCESSOR`: the function behind it is compiled for several generations of x86-64, and the loader takes the one for its processor.
 * Where compiler or system cannot do that, it is nothing, and the function is compiled once.
 *
 * `PUT_INSIDE`: the function becomes part of those that call it, and is compiled as they are, where the compiler can be told so. Not here: tiles (`tiles.h`), which ask for themselves.
 */
#pragma once
#if defined(__linux__) && defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif

#if defined(__GNUC__)
#define PUT_INSIDE static inline __attribute__((always_inline))
#else
#define PUT_INSIDE static inline
#endif
