/* How fast this processor multiplies and adds when nothing waits for memory: each function keeps 24 accumulators in registers (all
   loops over them are unrolled, or the compiler would keep them in memory), so that the next instruction never needs the result
   of the last ones, and returns a sum that depends on all of them. Compiled by benchmarks/limits.py where there is a compiler; each
   function is called only if the processor has its instructions (/proc/cpuinfo). Operations of a call: rounds x 24 x 2 x lanes. */
#include <immintrin.h>

#define MANY 24

__attribute__((target("avx512f"))) float fma_avx512(long rounds) {
    __m512 sum[MANY], a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(0.001f);
#pragma GCC unroll 24
    for (int i = 0; i < MANY; i++) sum[i] = _mm512_set1_ps((float)i);
    for (long r = 0; r < rounds; r++) {
#pragma GCC unroll 24
        for (int i = 0; i < MANY; i++) sum[i] = _mm512_fmadd_ps(sum[i], a, b);
    }
    float total = 0;
#pragma GCC unroll 24
    for (int i = 0; i < MANY; i++) total += _mm512_reduce_add_ps(sum[i]);
    return total;
}

__attribute__((target("avx2,fma"))) float fma_avx2(long rounds) {
    /* 16 registers in all: 12 accumulators, walked twice a round. */
    __m256 sum[12], a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(0.001f);
    float parts[8], total = 0;
    for (int i = 0; i < 12; i++) sum[i] = _mm256_set1_ps((float)i);
    for (long r = 0; r < 2 * rounds; r++) {
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) sum[i] = _mm256_fmadd_ps(sum[i], a, b);
    }
    for (int i = 1; i < 12; i++) sum[0] = _mm256_add_ps(sum[0], sum[i]);
    _mm256_storeu_ps(parts, sum[0]);
    for (int i = 0; i < 8; i++) total += parts[i];
    return total;
}

#ifdef WITH_BF16
__attribute__((target("avx512f,avx512bw,avx512bf16"))) float dot_bf16(long rounds) {
    __m512 sum[MANY];
    /* 0x3c00 is 2^-7 as bfloat16. */
    __m512i bits = _mm512_set1_epi16(0x3c00);
    __m512bh a = (__m512bh)bits, b = (__m512bh)bits;
#pragma GCC unroll 24
    for (int i = 0; i < MANY; i++) sum[i] = _mm512_set1_ps((float)i);
    for (long r = 0; r < rounds; r++) {
#pragma GCC unroll 24
        for (int i = 0; i < MANY; i++) sum[i] = _mm512_dpbf16_ps(sum[i], a, b);
    }
    float total = 0;
#pragma GCC unroll 24
    for (int i = 0; i < MANY; i++) total += _mm512_reduce_add_ps(sum[i]);
    return total;
}
#endif

#ifdef WITH_VNNI
__attribute__((target("avx512f,avx512vnni"))) float dot_int8(long rounds) {
    __m512i sum[MANY], a = _mm512_set1_epi32(0x01010101), b = _mm512_set1_epi32(0x01010101);
#pragma GCC unroll 24
    for (int i = 0; i < MANY; i++) sum[i] = _mm512_set1_epi32(i);
    for (long r = 0; r < rounds; r++) {
#pragma GCC unroll 24
        for (int i = 0; i < MANY; i++) sum[i] = _mm512_dpbusd_epi32(sum[i], a, b);
    }
    float total = 0;
#pragma GCC unroll 24
    for (int i = 0; i < MANY; i++) total += (float)_mm512_reduce_add_epi32(sum[i]);
    return total;
}
#endif
