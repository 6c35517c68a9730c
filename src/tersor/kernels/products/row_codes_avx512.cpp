// Row codes with 512-bit vectors: 64 codes are spread to bytes by a permutation and a multishift, whatever their width,
// and multiplied as they are by vpdpbusd.
#include "row_codes.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <algorithm>

#define TERSOR_512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni")))
#define TERSOR_512_INLINE TERSOR_512 inline __attribute__((always_inline))

namespace tersor {
namespace {

// How 64 codes of a width come out of their bytes: byte i of lane q is byte q * bits + i; code i of the lane begins at
// bit i * bits.
struct Spread {
    __m512i place, shift, mask;
    int64_t step;  // bytes for 64 codes
};

TERSOR_512_INLINE Spread spread_of(int bits) {
    alignas(64) uint8_t place[64], shift[64];
    for (int i = 0; i < 64; ++i) {
        place[i] = static_cast<uint8_t>(i / 8 * bits + i % 8) & 63;
        shift[i] = static_cast<uint8_t>(i % 8 * bits);
    }
    return {_mm512_load_si512(place), _mm512_load_si512(shift), _mm512_set1_epi8(static_cast<char>((1 << bits) - 1)),
            8 * bits};
}

TERSOR_512_INLINE __m512i codes_at(const uint8_t* from, int64_t left, const Spread& s) {
    const int64_t count = std::min(left, s.step);
    const __m512i bytes = _mm512_maskz_loadu_epi8(count >= 64 ? ~0ULL : (1ULL << count) - 1, from);
    const __m512i lanes = _mm512_permutexvar_epi8(s.place, bytes);
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(s.shift, lanes), s.mask);
}

// 64 or 256 entries of a table, one plane.
template <bool Wide>
struct Table {
    __m512i part[Wide ? 4 : 1];

    TERSOR_512_INLINE void load(const uint8_t* entries) {
        for (int i = 0; i < (Wide ? 4 : 1); ++i) part[i] = _mm512_loadu_si512(entries + 64 * i);
    }
    TERSOR_512_INLINE __m512i at(__m512i codes) const {
        if constexpr (Wide) {
            const __m512i first = _mm512_permutex2var_epi8(part[0], codes, part[1]);
            const __m512i second = _mm512_permutex2var_epi8(part[2], codes, part[3]);
            return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), first, second);
        } else {
            return _mm512_permutexvar_epi8(codes, part[0]);
        }
    }
};

// Integer sums of one token for 16 lanes of 4 columns, by the weight of their bytes (1, 256, 65536): how many there are.
constexpr int count_of(int planes, bool two) { return std::max(planes, 1) + two; }

template <int Planes, bool Two>
TERSOR_512_INLINE void add(__m512i (&sum)[count_of(Planes, Two)], __m512i low, __m512i high, const int8_t* x_high,
                           const int8_t* x_low) {
    const __m512i xh = _mm512_loadu_si512(x_high);
    if constexpr (Two) {
        const __m512i xl = _mm512_loadu_si512(x_low);
        sum[0] = _mm512_dpbusd_epi32(sum[0], low, xl);
        sum[1] = _mm512_dpbusd_epi32(sum[1], low, xh);
        if constexpr (Planes == 2) {
            sum[1] = _mm512_dpbusd_epi32(sum[1], high, xl);
            sum[2] = _mm512_dpbusd_epi32(sum[2], high, xh);
        }
    } else {
        sum[0] = _mm512_dpbusd_epi32(sum[0], low, xh);
        if constexpr (Planes == 2) sum[1] = _mm512_dpbusd_epi32(sum[1], high, xh);
    }
}

template <int Count>
TERSOR_512_INLINE __m512 total(const __m512i (&sum)[Count]) {
    __m512 all = _mm512_cvtepi32_ps(sum[0]);
    if constexpr (Count > 1) all = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[1]), _mm512_set1_ps(256.0f), all);
    if constexpr (Count > 2) all = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[2]), _mm512_set1_ps(65536.0f), all);
    return all;
}

// Few bits a code: a group's sums of both planes fit one integer.
template <int Count>
TERSOR_512_INLINE __m512 small_total(const __m512i (&sum)[Count]) {
    if constexpr (Count == 2)
        return _mm512_cvtepi32_ps(_mm512_add_epi32(sum[0], _mm512_slli_epi32(sum[1], 8)));
    else
        return total(sum);
}

// Which scale each lane of 4 columns takes in the step of 64 columns that begins at `column`, from the step's first.
TERSOR_512_INLINE __m512i lanes_of(int64_t column, int64_t group, int64_t first) {
    alignas(64) int32_t lane[16];
    for (int i = 0; i < 16; ++i) lane[i] = static_cast<int32_t>((column + 4 * i) / group - first) & 15;
    return _mm512_load_si512(lane);
}

template <int Planes, bool Wide, bool Two, int Tokens>
TERSOR_512 void loop(const RowLayout& layout, const RowInputs& inputs, int64_t first, int64_t last, int64_t token,
                     float* y, int64_t stride) {
    constexpr int COUNT = count_of(Planes, Two);
    const Spread spread = spread_of(layout.bits);
    const int64_t steps = (layout.columns + 63) / 64;
    const bool whole = layout.groups == 1, wide_groups = layout.group % 64 == 0;
    // Groups of a power of two columns have the same lanes in every step; others are looked up.
    const bool same_lanes = !whole && !wide_groups && 64 % layout.group == 0;
    std::vector<int32_t> lanes;
    if (!whole && !wide_groups) {
        const int64_t kept = same_lanes ? 1 : steps;
        lanes.resize(16 * kept);
        for (int64_t s = 0; s < kept; ++s) _mm512_storeu_si512(&lanes[16 * s], lanes_of(64 * s, layout.group, 64 * s / layout.group));
    }
    const Activations& x = inputs.rounded;
    const int8_t* x_high[Tokens];
    const int8_t* x_low[Tokens];
    for (int t = 0; t < Tokens; ++t) {
        x_high[t] = x.high_of(token + t);
        x_low[t] = Two ? x.low_of(token + t) : nullptr;
    }
    RowScales scales(layout);
    Table<Wide> low_table, high_table;
    if (Planes > 0) low_table.load(layout.low.data());
    if (Planes > 1) high_table.load(layout.high.data());
    for (int64_t r = first; r < last; ++r) {
        const uint8_t* codes = layout.codes + r * layout.row_bytes;
        if (layout.tables > 1) {
            if (Planes > 0) low_table.load(layout.low.data() + r * layout.table_width);
            if (Planes > 1) high_table.load(layout.high.data() + r * layout.table_width);
        }
        scales.expand(layout, r);
        __m512 result[Tokens];
        for (int t = 0; t < Tokens; ++t) result[t] = _mm512_setzero_ps();
        __m512i sum[Tokens][COUNT];
        const auto clear = [&]() __attribute__((always_inline)) TERSOR_512 {
            for (int t = 0; t < Tokens; ++t)
                for (int i = 0; i < COUNT; ++i) sum[t][i] = _mm512_setzero_si512();
        };
        const auto step = [&](int64_t s) __attribute__((always_inline)) TERSOR_512 {
            __m512i low = codes_at(codes + s * spread.step, layout.row_bytes - s * spread.step, spread), high = low;
            if constexpr (Planes == 2) high = high_table.at(low);
            if constexpr (Planes > 0) low = low_table.at(low);
            for (int t = 0; t < Tokens; ++t)
                add<Planes, Two>(sum[t], low, high, x_high[t] + 64 * s, Two ? x_low[t] + 64 * s : nullptr);
        };
        clear();
        if (whole) {
            for (int64_t s = 0; s < steps; ++s) step(s);
            for (int t = 0; t < Tokens; ++t) result[t] = _mm512_mul_ps(total(sum[t]), _mm512_set1_ps(scales.scale[0]));
        } else if (wide_groups) {
            const int64_t per_group = layout.group / 64;
            for (int64_t g = 0; g < layout.groups; ++g) {
                for (int64_t s = g * per_group; s < (g + 1) * per_group; ++s) step(s);
                const __m512 scale = _mm512_set1_ps(scales.scale[g]);
                for (int t = 0; t < Tokens; ++t) result[t] = _mm512_fmadd_ps(total(sum[t]), scale, result[t]);
                clear();
            }
        } else {
            for (int64_t s = 0; s < steps; ++s) {
                step(s);
                const __m512i lane = _mm512_loadu_si512(&lanes[same_lanes ? 0 : 16 * s]);
                const __m512 scale =
                    _mm512_permutexvar_ps(lane, _mm512_loadu_ps(&scales.scale[64 * s / layout.group]));
                for (int t = 0; t < Tokens; ++t) result[t] = _mm512_fmadd_ps(small_total(sum[t]), scale, result[t]);
                clear();
            }
        }
        const float factor = layout.factor.size() > 1 ? layout.factor[r] : layout.factor[0];
        for (int t = 0; t < Tokens; ++t) {
            const float* sums = inputs.group_sums.data() + (token + t) * layout.groups;
            __m512 shift = _mm512_setzero_ps();
            for (int64_t g = 0; g < layout.groups; g += 16) {
                const __mmask16 here = static_cast<__mmask16>(
                    layout.groups - g >= 16 ? 0xffff : (1u << (layout.groups - g)) - 1);
                shift = _mm512_fmadd_ps(_mm512_loadu_ps(&scales.shifted[g]), _mm512_maskz_loadu_ps(here, sums + g), shift);
            }
            y[(token + t) * stride + r] = factor * x.scale[token + t] * _mm512_reduce_add_ps(_mm512_sub_ps(result[t], shift));
        }
    }
}

template <int Planes, bool Wide, bool Two>
TERSOR_512 void tokens(const RowLayout& layout, const RowInputs& inputs, int64_t first, int64_t last, float* y,
                       int64_t stride) {
    int64_t t = 0;
    for (; t + 4 <= inputs.rounded.tokens; t += 4) loop<Planes, Wide, Two, 4>(layout, inputs, first, last, t, y, stride);
    for (; t < inputs.rounded.tokens; ++t) loop<Planes, Wide, Two, 1>(layout, inputs, first, last, t, y, stride);
}

template <bool Two>
TERSOR_512 void planes(const RowLayout& layout, const RowInputs& inputs, int64_t first, int64_t last, float* y,
                       int64_t stride) {
    const bool wide = layout.wide_table();
    if (layout.table_planes == 0) return tokens<0, false, Two>(layout, inputs, first, last, y, stride);
    if (layout.table_planes == 1 && !wide) return tokens<1, false, Two>(layout, inputs, first, last, y, stride);
    if (layout.table_planes == 1) return tokens<1, true, Two>(layout, inputs, first, last, y, stride);
    if (!wide) return tokens<2, false, Two>(layout, inputs, first, last, y, stride);
    return tokens<2, true, Two>(layout, inputs, first, last, y, stride);
}

}  // namespace

TERSOR_512 void rows_avx512(const RowLayout& layout, const RowInputs& inputs, int64_t first, int64_t last, float* y,
                            int64_t stride) {
    if (inputs.rounded.two_planes) return planes<true>(layout, inputs, first, last, y, stride);
    return planes<false>(layout, inputs, first, last, y, stride);
}

}  // namespace tersor

#else

namespace tersor {
void rows_avx512(const RowLayout& layout, const RowInputs& inputs, int64_t first, int64_t last, float* y, int64_t stride) {
    rows_portable(layout, inputs, first, last, y, stride);
}
}  // namespace tersor

#endif
