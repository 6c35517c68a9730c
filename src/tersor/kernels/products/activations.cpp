#include "activations.h"
#include "clones.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace tersor {
namespace {

// Magnitudes of floats are ordered as their bits are, and what is not a number is above all.
TERSOR_CLONES float greatest(const float* x, int64_t n) {
    uint32_t most = 0;
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        most = std::max(most, bits & 0x7fffffffu);
    }
    float value;
    std::memcpy(&value, &most, 4);
    return value;
}

// Adding and taking away 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
constexpr float ROUND = 12582912.0f;

TERSOR_CLONES void round_one(const float* x, int64_t n, float inverse, int8_t* high) {
    for (int64_t i = 0; i < n; ++i) {
        const float v = x[i] * inverse + ROUND;
        high[i] = static_cast<int8_t>(static_cast<int32_t>(v - ROUND));
    }
}

TERSOR_CLONES void round_two(const float* x, int64_t n, float inverse, int8_t* high, int8_t* low) {
    for (int64_t i = 0; i < n; ++i) {
        const float v = x[i] * inverse + ROUND;
        const int32_t q = static_cast<int32_t>(v - ROUND);
        const int32_t l = static_cast<int8_t>(q & 0xff);
        low[i] = static_cast<int8_t>(l);
        high[i] = static_cast<int8_t>((q - l) >> 8);
    }
}

}  // namespace

Activations::Activations(const float* x, int64_t tokens, int64_t columns, const Options& options)
    : tokens(tokens),
      columns(columns),
      width((columns + 63) / 64 * 64),
      two_planes(options.precision == Precision::int16),
      scale(tokens),
      high(tokens * width + 64, 0),
      low(two_planes ? tokens * width + 64 : 0, 0) {
    // With two planes the greatest is 127 * 256 - 128: rounding the low plane up never takes the high one beyond 127.
    const float top = two_planes ? 32384.0f : 127.0f;
    for (int64_t t = 0; t < tokens; ++t) {
        const float* row = x + t * columns;
        const float most = greatest(row, columns);
        // A token of zeros, and one that is not finite: the products are then 0 and not a number, as they should be.
        if (most == 0.0f) {
            scale[t] = 0.0f;
            continue;
        }
        if (!std::isfinite(most)) {
            scale[t] = std::nanf("");
            continue;
        }
        scale[t] = most / top;
        const float inverse = top / most;
        if (!std::isfinite(inverse)) {  // so small that it has no inverse
            scale[t] = 0.0f;
            continue;
        }
        if (two_planes) {
            round_two(row, columns, inverse, high.data() + t * width, low.data() + t * width);
        } else {
            round_one(row, columns, inverse, high.data() + t * width);
        }
    }
}

}  // namespace tersor
