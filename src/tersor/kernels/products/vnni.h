// Products of bytes, four at a time.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

namespace tersor {

// The sums plus products of unsigned and signed bytes. Not the intrinsic: of that GCC 12 makes moves in loops with many
// sums.
__attribute__((target("avx512f,avx512vnni"), always_inline)) inline __m512i plus_products(__m512i sums, __m512i bytes,
                                                                                        __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(bytes), "v"(x));
    return sums;
}

}  // namespace tersor
#endif
