// Row codes with 256-bit vectors: 32 codes to bytes, to 16-bit integers, and times 16-bit inputs by vpmaddwd. For groups of
// whole steps of 32 columns and tables that vpshufb can hold; the rest goes by floats (see row_codes.cpp).
#include "row_codes.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#define TERSOR_256 __attribute__((target("avx2,fma,bmi2,f16c")))
#define TERSOR_256_INLINE TERSOR_256 inline __attribute__((always_inline))

namespace tersor {
namespace {

// A lane sums two products a step, each below 255 * 32384 (with tables of two planes 2^30, and one step at a time): this
// many columns keep it within 31 bits.
constexpr int64_t EXACT = 1024;

// 32 codes as bytes. `from` has 32 bytes that may be read.
template <int Bits>
TERSOR_256_INLINE __m256i codes_at(const uint8_t* from) {
    if constexpr (Bits == 8) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    if constexpr (Bits == 4) {
        const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        return _mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)), _mm256_set1_epi8(15));
    }
    if constexpr (Bits == 2) {
        const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
        const __m256i half = _mm256_or_si256(wide, _mm256_slli_epi32(wide, 12));
        return _mm256_and_si256(_mm256_or_si256(half, _mm256_slli_epi32(half, 6)), _mm256_set1_epi8(3));
    }
    constexpr uint64_t fields = 0x0101010101010101ULL * ((1u << Bits) - 1);
    uint64_t lane[4];
    for (int i = 0; i < 4; ++i) {
        std::memcpy(&lane[i], from + i * Bits, 8);
        lane[i] = _pdep_u64(lane[i], fields);
    }
    return _mm256_set_epi64x(static_cast<int64_t>(lane[3]), static_cast<int64_t>(lane[2]), static_cast<int64_t>(lane[1]),
                             static_cast<int64_t>(lane[0]));
}

struct Sixteens {
    __m256i first, second;  // columns 0 to 15 and 16 to 31 of a step
};

// Codes, or the entries that they name, as 16-bit integers; entries of two planes less 32768.
template <int Planes>
TERSOR_256_INLINE Sixteens entries(__m256i codes, __m256i low, __m256i high) {
    if constexpr (Planes == 2) {
        const __m256i l = _mm256_shuffle_epi8(low, codes), h = _mm256_shuffle_epi8(high, codes);
        const __m256i near = _mm256_unpacklo_epi8(l, h), far = _mm256_unpackhi_epi8(l, h);
        const __m256i offset = _mm256_set1_epi16(-32768);
        return {_mm256_xor_si256(_mm256_permute2x128_si256(near, far, 0x20), offset),
                _mm256_xor_si256(_mm256_permute2x128_si256(near, far, 0x31), offset)};
    }
    if constexpr (Planes == 1) codes = _mm256_shuffle_epi8(low, codes);
    return {_mm256_cvtepu8_epi16(_mm256_castsi256_si128(codes)), _mm256_cvtepu8_epi16(_mm256_extracti128_si256(codes, 1))};
}

TERSOR_256_INLINE __m256i times(__m256i weight, const int16_t* x) {
    return _mm256_madd_epi16(weight, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

TERSOR_256_INLINE float total(__m256 lanes) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

template <int Bits, int Planes, int Tokens>
TERSOR_256 void loop(const RowLayout& layout, const RowInputs& inputs, int64_t first, int64_t last, int64_t token,
                     float* y, int64_t stride) {
    const int64_t steps = (layout.columns + 31) / 32, per_group = layout.groups == 1 ? steps : layout.group / 32;
    const int16_t* x[Tokens];
    for (int t = 0; t < Tokens; ++t) x[t] = inputs.sixteen.data() + (token + t) * inputs.rounded.width;
    RowScales scales(layout);
    __m256i low = _mm256_setzero_si256(), high = low;
    // The end of a row is copied, so that nothing is read beyond it.
    uint8_t end[64] = {};
    const int64_t copied = std::max<int64_t>(0, (layout.row_bytes - 32) / (4 * Bits));
    for (int64_t r = first; r < last; ++r) {
        const uint8_t* codes = layout.codes + r * layout.row_bytes;
        if (Planes > 0 && (r == first || layout.tables > 1)) {
            const int64_t at = layout.tables > 1 ? r * layout.table_width : 0;
            low = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(layout.low.data() + at)));
            if (Planes == 2)
                high = _mm256_broadcastsi128_si256(
                    _mm_loadu_si128(reinterpret_cast<const __m128i*>(layout.high.data() + at)));
        }
        scales.expand(layout, r);
        __m256 result[Tokens];
        for (int t = 0; t < Tokens; ++t) result[t] = _mm256_setzero_ps();
        int64_t s = 0;
        for (int64_t g = 0; g < layout.groups; ++g) {
            const __m256 scale = _mm256_set1_ps(scales.scale[g]);
            for (const int64_t group_end = (g + 1) * per_group; s < group_end;) {
                __m256i sum[Tokens];
                for (int t = 0; t < Tokens; ++t) sum[t] = _mm256_setzero_si256();
                const int64_t stop = Planes == 2 ? s + 1 : std::min(group_end, s + EXACT / 32);
                __m256 wide[Tokens];
                for (; s < stop; ++s) {
                    const uint8_t* from = codes + s * 4 * Bits;
                    if (s >= copied) {
                        const int64_t left = std::min<int64_t>(layout.row_bytes - s * 4 * Bits, 4 * Bits);
                        std::memcpy(end, from, static_cast<size_t>(left));
                        from = end;
                    }
                    const Sixteens weight = entries<Planes>(codes_at<Bits>(from), low, high);
                    for (int t = 0; t < Tokens; ++t) {
                        const __m256i one = times(weight.first, x[t] + 32 * s), two = times(weight.second, x[t] + 32 * s + 16);
                        if constexpr (Planes == 2)
                            wide[t] = _mm256_add_ps(_mm256_cvtepi32_ps(one), _mm256_cvtepi32_ps(two));
                        else
                            sum[t] = _mm256_add_epi32(sum[t], _mm256_add_epi32(one, two));
                    }
                }
                for (int t = 0; t < Tokens; ++t) {
                    const __m256 part = Planes == 2 ? wide[t] : _mm256_cvtepi32_ps(sum[t]);
                    result[t] = _mm256_fmadd_ps(part, scale, result[t]);
                }
            }
        }
        const float factor = layout.factor.size() > 1 ? layout.factor[r] : layout.factor[0];
        for (int t = 0; t < Tokens; ++t) {
            const float* sums = inputs.sums_of(token + t);
            float shift = 0.0f;
            for (int64_t g = 0; g < layout.groups; ++g) {
                const float extra = Planes == 2 ? 32768.0f * scales.scale[g] : 0.0f;
                shift += (scales.shifted[g] - extra) * sums[g];
            }
            y[(token + t) * stride + r] = factor * inputs.rounded.scale[token + t] * (total(result[t]) - shift);
        }
    }
}

template <int Bits, int Planes>
TERSOR_256 void tokens(const RowLayout& layout, const RowInputs& inputs, int64_t first, int64_t last, float* y,
                       int64_t stride) {
    int64_t t = 0;
    for (; t + 4 <= inputs.rounded.tokens; t += 4) loop<Bits, Planes, 4>(layout, inputs, first, last, t, y, stride);
    for (; t < inputs.rounded.tokens; ++t) loop<Bits, Planes, 1>(layout, inputs, first, last, t, y, stride);
}

template <int Bits>
TERSOR_256 void planes(const RowLayout& layout, const RowInputs& inputs, int64_t first, int64_t last, float* y,
                       int64_t stride) {
    if (layout.table_planes == 0) return tokens<Bits, 0>(layout, inputs, first, last, y, stride);
    if constexpr (Bits <= 4) {
        if (layout.table_planes == 1) return tokens<Bits, 1>(layout, inputs, first, last, y, stride);
        tokens<Bits, 2>(layout, inputs, first, last, y, stride);
    }
}

}  // namespace

bool fits_avx2(const RowLayout& layout) {
    return (layout.groups == 1 || layout.group % 32 == 0) && (layout.table_planes == 0 || layout.bits <= 4);
}

TERSOR_256 void rows_avx2(const RowLayout& layout, const RowInputs& inputs, int64_t first, int64_t last, float* y,
                          int64_t stride) {
    if (!fits_avx2(layout)) return rows_avx2_floats(layout, inputs, first, last, y, stride);
    switch (layout.bits) {
        case 1: return planes<1>(layout, inputs, first, last, y, stride);
        case 2: return planes<2>(layout, inputs, first, last, y, stride);
        case 3: return planes<3>(layout, inputs, first, last, y, stride);
        case 4: return planes<4>(layout, inputs, first, last, y, stride);
        case 5: return planes<5>(layout, inputs, first, last, y, stride);
        case 6: return planes<6>(layout, inputs, first, last, y, stride);
        case 7: return planes<7>(layout, inputs, first, last, y, stride);
        default: return planes<8>(layout, inputs, first, last, y, stride);
    }
}

}  // namespace tersor

#else

namespace tersor {
bool fits_avx2(const RowLayout&) { return false; }
void rows_avx2(const RowLayout& layout, const RowInputs& inputs, int64_t first, int64_t last, float* y, int64_t stride) {
    rows_portable(layout, inputs, first, last, y, stride);
}
}  // namespace tersor

#endif
