// Inputs rounded to integers, one scale a token, as integer products take them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include "product.h"

namespace tersor {

// Vectors that begin where a cache line does: a fetch of 64 bytes that crosses two of them takes twice as long.
template <typename T>
struct OnLines {
    using value_type = T;
    static constexpr std::align_val_t LINE{64};
    OnLines() = default;
    template <typename U>
    OnLines(const OnLines<U>&) {}
    T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), LINE)); }
    void deallocate(T* from, size_t) { ::operator delete(from, LINE); }
    template <typename U>
    bool operator==(const OnLines<U>&) const { return true; }
    template <typename U>
    bool operator!=(const OnLines<U>&) const { return false; }
};
using Plane = std::vector<int8_t, OnLines<int8_t>>;

// x[t, c] ~ scale[t] * (256 * high[t, c] + low[t, c]), or scale[t] * high[t, c] with one plane. Values are in
// [-127, 127] (high) and [-128, 127] (low); columns from `columns` up to `width`, a multiple of 64, are 0.
// scale[t] is the token's greatest magnitude over 127 (one plane) or 32384 (two planes).
struct Activations {
    Activations(const float* x, int64_t tokens, int64_t columns, const Options& options);

    const int8_t* high_of(int64_t token) const { return high.data() + token * width; }
    const int8_t* low_of(int64_t token) const { return low.data() + token * width; }  // two planes only
    // The integer that stands for x[t, c].
    int32_t at(int64_t token, int64_t column) const {
        const int64_t i = token * width + column;
        return two_planes ? 256 * int32_t{high[i]} + low[i] : high[i];
    }

    int64_t tokens, columns, width;
    bool two_planes;
    std::vector<float> scale;  // (tokens,)
    Plane high, low;           // (tokens, width), 64 bytes of room after the end
};

}  // namespace tersor
