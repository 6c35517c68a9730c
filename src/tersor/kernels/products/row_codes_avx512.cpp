// Row codes with 512-bit vectors: 64 codes are spread to bytes by a permutation and a multishift, whatever their width,
// and multiplied as they are by vpdpbusd.
#include "row_codes.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <algorithm>

#define TERSOR_512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni,f16c,fma")))
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

// The first `count` of the bytes of 64 codes.
TERSOR_512_INLINE __mmask64 first_bytes(int64_t count) { return count >= 64 ? ~0ULL : (1ULL << count) - 1; }

TERSOR_512_INLINE __m512i codes_at(const uint8_t* from, __mmask64 here, const Spread& s) {
    const __m512i bytes = _mm512_maskz_loadu_epi8(here, from);
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

// The same for few columns, where the sums of both planes fit one integer.
template <int Count>
TERSOR_512_INLINE __m512 small_total(const __m512i (&sum)[Count]) {
    if constexpr (Count == 2)
        return _mm512_cvtepi32_ps(_mm512_add_epi32(sum[0], _mm512_slli_epi32(sum[1], 8)));
    else
        return total(sum);
}

// Which of the scales from the group `first` on each lane of 4 columns takes, from `column` on.
TERSOR_512_INLINE __m512i lanes_of(int64_t column, int64_t group, int64_t first) {
    alignas(64) int32_t lane[16];
    for (int i = 0; i < 16; ++i) lane[i] = static_cast<int32_t>((column + 4 * i) / group - first) & 15;
    return _mm512_load_si512(lane);
}

// Stored scales from entry `at` on, 16 of them, or as many as there are before `end`; without the second-level scale.
TERSOR_512_INLINE __m512 scales_at(const RowLayout& layout, int64_t at, int64_t end) {
    const __mmask16 here = end - at >= 16 ? 0xffff : static_cast<__mmask16>((1u << (end - at)) - 1);
    if (layout.scale == nullptr) return _mm512_set1_ps(1.0f);
    if (layout.kind == ScaleKind::s8) {
        const __m128i bytes = _mm_maskz_loadu_epi8(here, static_cast<const uint8_t*>(layout.scale) + at);
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
    }
    const __m256i halves = _mm256_maskz_loadu_epi16(here, static_cast<const uint16_t*>(layout.scale) + at);
    if (layout.kind == ScaleKind::fp16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// What all rows of one call have in common.
template <int Tokens>
struct Call {
    const RowLayout& layout;
    const int8_t* high[Tokens];
    const int8_t* low[Tokens];
    const float* group_sums[Tokens];
    Spread spread;
    int64_t steps;
    __mmask64 whole, tail;       // bytes of a step, and of a row's last one
    const int32_t* lanes;   // of small groups: 16 for every step of a fetch (of all steps, where a fetch is one step)
    int64_t per_fetch;
};

// Sums over groups of scale * zero * (sum of the group's inputs), in lanes.
template <int Tokens>
TERSOR_512_INLINE void shifts(const Call<Tokens>& call, int64_t row, __m512 (&shift)[Tokens]) {
    const RowLayout& layout = call.layout;
    const int64_t n = layout.groups, base = row * n;
    const __m512 middle = _mm512_set1_ps(layout.middle.size() > 1 ? layout.middle[row] : layout.middle[0]);
    for (int t = 0; t < Tokens; ++t) shift[t] = _mm512_setzero_ps();
    alignas(64) uint8_t zeros[64];
    for (int64_t g = 0; g < n; g += 16) {
        __m512 weight = scales_at(layout, base + g, base + n);
        if (layout.zero != nullptr) {
            const int64_t byte = g / 64 * call.spread.step;
            if (g % 64 == 0)
                _mm512_store_si512(zeros, codes_at(layout.zero + row * layout.zero_bytes + byte,
                                                   first_bytes(std::min(layout.zero_bytes - byte, call.spread.step)),
                                                   call.spread));
            const __m128i here = _mm_load_si128(reinterpret_cast<const __m128i*>(zeros + g % 64));
            weight = _mm512_mul_ps(weight, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(here)));
        } else {
            weight = _mm512_mul_ps(weight, middle);
        }
        const __mmask16 here = n - g >= 16 ? 0xffff : static_cast<__mmask16>((1u << (n - g)) - 1);
        for (int t = 0; t < Tokens; ++t)
            shift[t] = _mm512_fmadd_ps(weight, _mm512_maskz_loadu_ps(here, call.group_sums[t] + g), shift[t]);
    }
}

// Integer sums of step `s` of 64 columns added to those before.
template <int Planes, bool Wide, bool Two, int Tokens>
TERSOR_512_INLINE void step(const Call<Tokens>& call, const uint8_t* codes, __mmask64 here,
                            const Table<Wide>& low_table, const Table<Wide>& high_table, int64_t s,
                            __m512i (&sum)[Tokens][count_of(Planes, Two)]) {
    __m512i low = codes_at(codes, here, call.spread), high = low;
    if constexpr (Planes == 2) high = high_table.at(low);
    if constexpr (Planes > 0) low = low_table.at(low);
    for (int t = 0; t < Tokens; ++t)
        add<Planes, Two>(sum[t], low, high, call.high[t] + 64 * s, Two ? call.low[t] + 64 * s : nullptr);
}

template <int Tokens, int Count>
TERSOR_512_INLINE void clear(__m512i (&sum)[Tokens][Count]) {
    for (int t = 0; t < Tokens; ++t)
        for (int i = 0; i < Count; ++i) sum[t][i] = _mm512_setzero_si512();
}

// One row whose groups are whole steps: lanes of sums of scale * code * input. `PerGroup`: steps of a group, 0 for any.
template <int Planes, bool Wide, bool Two, int Tokens, int PerGroup>
TERSOR_512_INLINE void whole_steps(const Call<Tokens>& call, int64_t row, const Table<Wide>& low_table,
                                   const Table<Wide>& high_table, __m512 (&result)[Tokens]) {
    const RowLayout& layout = call.layout;
    const uint8_t* codes = layout.codes + row * layout.row_bytes;
    const int64_t n = layout.groups, base = row * n, stride = call.spread.step;
    const int64_t per_group = PerGroup > 0 ? PerGroup : layout.group / 64;
    const bool small = PerGroup > 0 || layout.group <= 2048;
    alignas(64) float scales[16];
    __m512i sum[Tokens][count_of(Planes, Two)];
    int64_t s = 0;
    for (int64_t block = 0; block < n; block += 16) {
        _mm512_store_ps(scales, scales_at(layout, base + block, base + n));
        const int64_t here = std::min<int64_t>(16, n - block);
        for (int64_t g = 0; g < here; ++g) {
            clear(sum);
            for (int64_t i = 0; i < per_group; ++i, ++s, codes += stride)
                step<Planes, Wide, Two, Tokens>(call, codes, call.whole, low_table, high_table, s, sum);
            const __m512 scale = _mm512_set1_ps(scales[g]);
            for (int t = 0; t < Tokens; ++t)
                result[t] = _mm512_fmadd_ps(small ? small_total(sum[t]) : total(sum[t]), scale, result[t]);
        }
    }
}

// The same for one group to a row.
template <int Planes, bool Wide, bool Two, int Tokens>
TERSOR_512_INLINE void one_group(const Call<Tokens>& call, int64_t row, const Table<Wide>& low_table,
                                 const Table<Wide>& high_table, __m512 (&result)[Tokens]) {
    const uint8_t* codes = call.layout.codes + row * call.layout.row_bytes;
    __m512i sum[Tokens][count_of(Planes, Two)];
    clear(sum);
    int64_t s = 0;
    for (; s + 1 < call.steps; ++s, codes += call.spread.step)
        step<Planes, Wide, Two, Tokens>(call, codes, call.whole, low_table, high_table, s, sum);
    step<Planes, Wide, Two, Tokens>(call, codes, call.tail, low_table, high_table, s, sum);
    const __m512 scale = _mm512_broadcastss_ps(_mm512_castps512_ps128(scales_at(call.layout, row, row + 1)));
    for (int t = 0; t < Tokens; ++t) result[t] = _mm512_mul_ps(total(sum[t]), scale);
}

// The same for several groups to a step, or groups that end within one. Scales are fetched 16 at a time, which last for
// `call.per_fetch` steps.
template <int Planes, bool Wide, bool Two, int Tokens>
TERSOR_512_INLINE void small_groups(const Call<Tokens>& call, int64_t row, const Table<Wide>& low_table,
                                    const Table<Wide>& high_table, __m512 (&result)[Tokens]) {
    const RowLayout& layout = call.layout;
    const uint8_t* codes = layout.codes + row * layout.row_bytes;
    const int64_t base = row * layout.groups, end = base + layout.groups;
    __m512i sum[Tokens][count_of(Planes, Two)];
    for (int64_t fetch = 0; fetch < call.steps; fetch += call.per_fetch) {
        const __m512 scales = scales_at(layout, base + 64 * fetch / layout.group, end);
        const int32_t* lanes = call.lanes + (call.per_fetch == 1 ? 16 * fetch : 0);
        const int64_t last = std::min(call.steps, fetch + call.per_fetch);
        for (int64_t s = fetch; s < last; ++s, codes += call.spread.step, lanes += 16) {
            clear(sum);
            const __mmask64 here = s + 1 < call.steps ? call.whole : call.tail;
            step<Planes, Wide, Two, Tokens>(call, codes, here, low_table, high_table, s, sum);
            const __m512 scale = _mm512_permutexvar_ps(_mm512_loadu_si512(lanes), scales);
            for (int t = 0; t < Tokens; ++t) result[t] = _mm512_fmadd_ps(small_total(sum[t]), scale, result[t]);
        }
    }
}

template <int Planes, bool Wide, bool Two, int Tokens>
TERSOR_512_INLINE void one_row(const Call<Tokens>& call, int64_t row, const Table<Wide>& low_table,
                               const Table<Wide>& high_table, __m512 (&result)[Tokens]) {
    for (int t = 0; t < Tokens; ++t) result[t] = _mm512_setzero_ps();
    const RowLayout& layout = call.layout;
    if (layout.groups == 1) return one_group<Planes, Wide, Two, Tokens>(call, row, low_table, high_table, result);
    if (layout.group % 64 != 0) return small_groups<Planes, Wide, Two, Tokens>(call, row, low_table, high_table, result);
    if (layout.group == 64) return whole_steps<Planes, Wide, Two, Tokens, 1>(call, row, low_table, high_table, result);
    if (layout.group == 128) return whole_steps<Planes, Wide, Two, Tokens, 2>(call, row, low_table, high_table, result);
    whole_steps<Planes, Wide, Two, Tokens, 0>(call, row, low_table, high_table, result);
}

template <int Planes, bool Wide, bool Two, int Tokens>
TERSOR_512 void loop(const RowLayout& layout, const RowInputs& inputs, int64_t first, int64_t last, int64_t token,
                     float* y, int64_t stride) {
    const int64_t steps = (layout.columns + 63) / 64;
    std::vector<int32_t> lanes;
    // Where groups divide 64 columns, one fetch of 16 scales lasts for whole steps, and all fetches are alike.
    const bool alike = 64 % layout.group == 0;
    const int64_t per_fetch = alike ? layout.group / 4 : 1;  // 16 groups are 16 * group columns
    if (layout.groups > 1 && layout.group % 64 != 0) {
        lanes.resize(16 * (alike ? per_fetch : steps));
        for (int64_t s = 0; 16 * s < static_cast<int64_t>(lanes.size()); ++s)
            _mm512_storeu_si512(&lanes[16 * s], lanes_of(64 * s, layout.group, alike ? 0 : 64 * s / layout.group));
    }
    const Spread spread = spread_of(layout.bits);
    const __mmask64 whole = first_bytes(spread.step), tail = first_bytes(layout.row_bytes - (steps - 1) * spread.step);
    Call<Tokens> call{layout, {}, {}, {}, spread, steps, whole, tail, lanes.data(), per_fetch};
    for (int t = 0; t < Tokens; ++t) {
        call.high[t] = inputs.rounded.high_of(token + t);
        call.low[t] = Two ? inputs.rounded.low_of(token + t) : nullptr;
        call.group_sums[t] = inputs.group_sums.data() + (token + t) * layout.groups;
    }
    Table<Wide> low_table, high_table;
    if (Planes > 0) low_table.load(layout.low.data());
    if (Planes > 1) high_table.load(layout.high.data());
    for (int64_t r = first; r < last; ++r) {
        if (layout.tables > 1) {
            if (Planes > 0) low_table.load(layout.low.data() + r * layout.table_width);
            if (Planes > 1) high_table.load(layout.high.data() + r * layout.table_width);
        }
        __m512 result[Tokens], shift[Tokens];
        one_row<Planes, Wide, Two, Tokens>(call, r, low_table, high_table, result);
        shifts<Tokens>(call, r, shift);
        float factor = layout.factor.size() > 1 ? layout.factor[r] : layout.factor[0];
        if (layout.super != nullptr) factor *= _cvtsh_ss(layout.super[r]);
        for (int t = 0; t < Tokens; ++t) {
            const float sum = _mm512_reduce_add_ps(_mm512_sub_ps(result[t], shift[t]));
            y[(token + t) * stride + r] = factor * inputs.rounded.scale[token + t] * sum;
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
