// 16-bit floats, where no instruction is sure to be there.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__)
#define TERSOR_INLINE __attribute__((always_inline)) inline
#else
#define TERSOR_INLINE inline
#endif

namespace tersor {

TERSOR_INLINE float float_of_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Moving the exponent's bias is a multiplication, which also sets subnormals right. Infinities become 65536.
TERSOR_INLINE float float_of_half(uint16_t half) {
    return float_of_bits((half & 0x8000u) << 16 | (half & 0x7fffu) << 13) * float_of_bits(0x77800000u);  // 2^112
}

}  // namespace tersor
