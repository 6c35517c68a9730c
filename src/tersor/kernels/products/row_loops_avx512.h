// The loops over row codes with 512-bit vectors. Codes of 1, 2, 4 and 8 bits are cut out of 64 bytes by shifts, a slice of
// every byte at a time, and inputs are laid out to match (RowInputs::high_of); other widths are spread to bytes by a
// permutation and multishifts. Codes, or the table entries that they name, are multiplied by vpdpbusd. Included where the
// instructions exist alone, by one file for each precision of inputs, as compilers take long for all of them.
#pragma once

#include "half.h"
#include "row_codes_avx512.h"

namespace tersor {
namespace {

TERSOR_512_INLINE __mmask16 first_lanes(int64_t count) {
    return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
}

TERSOR_512_INLINE void fetch_bytes(const uint8_t* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T1);
}

// Stored scales from entry `at` on, 16 of them, or the `count` that are left; without the second-level scale.
TERSOR_512_INLINE __m512 scales_at(const RowLayout& layout, int64_t at, int64_t count) {
    const __mmask16 here = first_lanes(count);
    if (layout.scale == nullptr) return _mm512_set1_ps(1.0f);
    if (layout.kind == ScaleKind::s8) {
        const __m128i bytes = _mm_maskz_loadu_epi8(here, static_cast<const uint8_t*>(layout.scale) + at);
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
    }
    const uint16_t* from = static_cast<const uint16_t*>(layout.scale) + at;
    _mm_prefetch(reinterpret_cast<const char*>(from + SCALES_AHEAD * layout.groups), _MM_HINT_T1);
    // Masked fetches are several times as slow, and there are most often other rows' scales to fetch with these.
    const __m256i halves = at + 16 <= layout.rows * layout.groups
                               ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                               : _mm256_maskz_loadu_epi16(here, from);
    if (layout.kind == ScaleKind::fp16) return _mm512_maskz_cvtph_ps(here, halves);
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(here, _mm512_cvtepu16_epi32(halves), 16));
}

// One of them: a masked fetch of one would take several times as long.
TERSOR_512_INLINE float scale_at(const RowLayout& layout, int64_t at) {
    if (layout.scale == nullptr) return 1.0f;
    if (layout.kind == ScaleKind::s8) return static_cast<const uint8_t*>(layout.scale)[at];
    const uint16_t half = static_cast<const uint16_t*>(layout.scale)[at];
    return layout.kind == ScaleKind::fp16 ? _cvtsh_ss(half) : float_of_bits(static_cast<uint32_t>(half) << 16);
}

// The zeros of up to 16 groups from `group` on, as floats. `zeros`: room for those of 64, filled when `group` begins them.
template <class K>
TERSOR_512_INLINE __m512 zeros_at(const Call<K>& call, int64_t row, int64_t group, uint8_t (&zeros)[64]) {
    const RowLayout& layout = call.layout;
    if (group % 64 == 0) {
        const int64_t byte = group / 64 * 8 * layout.bits;
        const __mmask64 here = first_bytes(std::min<int64_t>(layout.zero_bytes - byte, 8 * layout.bits));
        const uint8_t* from = layout.zero + row * layout.zero_bytes + byte;
        const __m512i lanes =
            _mm512_permutexvar_epi8(_mm512_loadu_si512(layout.zero_place), _mm512_maskz_loadu_epi8(here, from));
        const __m512i codes = _mm512_multishift_epi64_epi8(_mm512_loadu_si512(layout.zero_shift), lanes);
        _mm512_store_si512(zeros, _mm512_and_si512(codes, call.cut.mask));
    }
    const __m128i here = _mm_load_si128(reinterpret_cast<const __m128i*>(zeros + group % 64));
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(here));
}

// Lanes of sums over groups of scale * zero * (sum of the group's inputs), where they were not weighed on the way.
template <class K>
TERSOR_512_INLINE void shifts(const Call<K>& call, int64_t row, __m512 (&shift)[K::Tokens]) {
    const RowLayout& layout = call.layout;
    const int64_t n = layout.groups, base = row * n;
    const __m512 middle = _mm512_set1_ps(layout.middle.size() > 1 ? layout.middle[row] : layout.middle[0]);
    for (int t = 0; t < K::Tokens; ++t) shift[t] = _mm512_setzero_ps();
    alignas(64) uint8_t zeros[64];
    for (int64_t g = 0; g < n; g += 16) {
        const __m512 zero = layout.zero == nullptr ? middle : zeros_at<K>(call, row, g, zeros);
        const __m512 weight = _mm512_mul_ps(scales_at(layout, base + g, n - g), zero);
        for (int t = 0; t < K::Tokens; ++t)
            shift[t] = _mm512_fmadd_ps(weight, _mm512_loadu_ps(call.group_sums[t] + g), shift[t]);
    }
}

// Scales of up to 16 groups from `group` on, and these times the sums of the groups' inputs, added to those before.
template <class K>
TERSOR_512_INLINE void fetch(const Call<K>& call, int64_t row, int64_t group, bool weigh, __m512 (&scales)[K::Rows],
                             typename K::Floats& weighed) {
    const int64_t n = call.layout.groups, left = n - group;
    for (int r = 0; r < K::Rows; ++r) scales[r] = scales_at(call.layout, (row + r) * n + group, left);
    if (!weigh) return;
    for (int t = 0; t < K::Tokens; ++t) {
        const __m512 sums = _mm512_loadu_ps(call.group_sums[t] + group);
        for (int r = 0; r < K::Rows; ++r) weighed[r][t] = _mm512_fmadd_ps(scales[r], sums, weighed[r][t]);
    }
}

// Rows of one group: lanes of sums of scale * code * input, and (`weighed`) of scale * input.
template <class K>
TERSOR_512_INLINE void one_group(const Call<K>& call, int64_t row, const typename K::Tables& table,
                                 typename K::Floats& result, typename K::Floats& weighed) {
    const uint8_t* codes = call.layout.codes + row * call.layout.row_bytes;
    typename K::Integers sum;
    clear<K>(sum);
    if constexpr (K::Spread) {
        // A step ahead, as spreading takes long.
        __m512i bytes[K::Rows], next[K::Rows];
        fetch_codes<K>(call, codes, 0, next);
        for (int64_t s = 0; s < call.steps; ++s) {
            for (int r = 0; r < K::Rows; ++r) bytes[r] = next[r];
            if (s + 1 < call.steps) codes += call.cut.bytes;
            fetch_codes<K>(call, codes, std::min(s + 1, call.steps - 1), next);
            slice<K, 0>(call, bytes, table, K::Columns * s, sum);
        }
    } else {
        for (int64_t s = 0; s < call.steps; ++s, codes += call.cut.bytes) step<K>(call, codes, table, s, sum);
    }
    for (int r = 0; r < K::Rows; ++r) {
        const __m512 scale = _mm512_set1_ps(scale_at(call.layout, row + r));
        for (int t = 0; t < K::Tokens; ++t) {
            result[r][t] = _mm512_mul_ps(total<K>(sum[r][t]), scale);
            weighed[r][t] = _mm512_maskz_mul_ps(1, scale, _mm512_set1_ps(*call.group_sums[t]));
        }
    }
}

// The same where groups are whole steps, `PerGroup` of them or (0) any number.
template <class K, int PerGroup>
TERSOR_512_INLINE void whole_steps(const Call<K>& call, int64_t row, const typename K::Tables& table,
                                   typename K::Floats& result, typename K::Floats& weighed) {
    const RowLayout& layout = call.layout;
    const uint8_t* codes = layout.codes + row * layout.row_bytes;
    const int64_t n = layout.groups;
    const int64_t per_group = PerGroup > 0 ? PerGroup : layout.group / K::Columns;
    const bool small = PerGroup > 0 || layout.group <= 2048;
    alignas(64) float scales[K::Rows][16];
    __m512 fetched[K::Rows];
    typename K::Integers sum;
    int64_t s = 0;
    for (int64_t block = 0; block < n; block += 16) {
        fetch<K>(call, row, block, true, fetched, weighed);
        for (int r = 0; r < K::Rows; ++r) _mm512_store_ps(scales[r], fetched[r]);
        const int64_t here = std::min<int64_t>(16, n - block);
        for (int64_t g = 0; g < here; ++g) {
            clear<K>(sum);
            for (int64_t i = 0; i < per_group; ++i, ++s, codes += call.cut.bytes) step<K>(call, codes, table, s, sum);
            for (int r = 0; r < K::Rows; ++r) {
                const __m512 scale = _mm512_set1_ps(scales[r][g]);
                for (int t = 0; t < K::Tokens; ++t) {
                    const __m512 part = small ? small_total<K>(sum[r][t]) : total<K>(sum[r][t]);
                    result[r][t] = _mm512_fmadd_ps(part, scale, result[r][t]);
                }
            }
        }
    }
}

// The same for several groups to a step, or groups that end within one. Scales are fetched 16 at a time, which last for
// `call.per_fetch` steps.
template <class K>
TERSOR_512_INLINE void small_groups(const Call<K>& call, int64_t row, const typename K::Tables& table,
                                    typename K::Floats& result, typename K::Floats& weighed) {
    const RowLayout& layout = call.layout;
    const uint8_t* codes = layout.codes + row * layout.row_bytes;
    typename K::Integers sum;
    __m512 scales[K::Rows];
    // A fetch that lasts for more than one step lasts for 16 whole groups.
    for (int64_t first = 0, group = 0; first < call.steps; first += call.per_fetch, group += 16) {
        if (call.per_fetch == 1) group = K::Columns * first / layout.group;
        fetch<K>(call, row, group, call.fetched_once, scales, weighed);
        const int32_t* lanes = call.lanes + (call.per_fetch == 1 ? 16 * first : 0);
        const int64_t last = std::min(call.steps, first + call.per_fetch);
        for (int64_t s = first; s < last; ++s, codes += call.cut.bytes, lanes += 16) {
            clear<K>(sum);
            step<K>(call, codes, table, s, sum);
            const __m512i lane = _mm512_loadu_si512(lanes);
            for (int r = 0; r < K::Rows; ++r) {
                const __m512 scale = _mm512_permutexvar_ps(lane, scales[r]);
                for (int t = 0; t < K::Tokens; ++t)
                    result[r][t] = _mm512_fmadd_ps(small_total<K>(sum[r][t]), scale, result[r][t]);
            }
        }
    }
}

// The sum of the lanes of each of 16 vectors, always in the same order.
TERSOR_512_INLINE __m512 lane_sums(const float (&lanes)[16][16]) {
    __m512 four[4];  // of rows 4 i to 4 i + 3: sums of four lanes, for each quarter of the vectors
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512 a = _mm512_load_ps(lanes[4 * i]), b = _mm512_load_ps(lanes[4 * i + 1]);
        const __m512 c = _mm512_load_ps(lanes[4 * i + 2]), d = _mm512_load_ps(lanes[4 * i + 3]);
        const __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
        const __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    }
    const __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x44), _mm512_shuffle_f32x4(four[0], four[1], 0xee));
    const __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(four[2], four[3], 0x44), _mm512_shuffle_f32x4(four[2], four[3], 0xee));
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// What up to 16 rows give, from `first` on: the sums of their lanes times their factors.
template <class K>
TERSOR_512_INLINE void write_rows(const Call<K>& call, const float (&lanes)[K::Tokens][16][16], const float* scales,
                                  int64_t first, int64_t count, float* y, int64_t stride) {
    const RowLayout& layout = call.layout;
    const __mmask16 here = first_lanes(count);
    __m512 factor = layout.factor.size() > 1 ? _mm512_maskz_loadu_ps(here, layout.factor.data() + first)
                                             : _mm512_set1_ps(layout.factor[0]);
    if (layout.super != nullptr)
        factor = _mm512_mul_ps(factor, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(here, layout.super + first)));
    for (int t = 0; t < K::Tokens; ++t) {
        const __m512 sums = lane_sums(lanes[t]);
        _mm512_mask_storeu_ps(y + t * stride + first, here,
                              _mm512_mul_ps(_mm512_mul_ps(factor, _mm512_set1_ps(scales[t])), sums));
    }
}

// How groups lie in steps: all columns are one, they are no whole steps, or they are one step or several.
enum class Groups { one, small, step, steps };

template <class K, Groups Kind>
TERSOR_512 void rows_of(Call<K>& call, const RowInputs& inputs, int64_t first, int64_t last, int64_t token,
                        float* y, int64_t stride) {
    const RowLayout& layout = call.layout;
    const int64_t bytes = (last - first) * layout.row_bytes;
    const uint8_t* begin = layout.codes + first * layout.row_bytes;
    if (ahead.fetched != begin) fetch_bytes(begin, std::min(bytes, AHEAD));
    const Beginning next = ahead.next;
    // From the last codes of this part to the first of the next: added to what AHEAD is added to before.
    const int64_t onwards = next.codes == nullptr ? 0 : AHEAD + (next.codes - (begin + bytes));
    ahead.fetched = next.codes;
    typename K::Tables table;
    alignas(64) float lanes[K::Tokens][16][16] = {};
    for (int64_t row = first; row < last; row += K::Rows) {
        call.ahead = (row - first) * layout.row_bytes + AHEAD < bytes ? AHEAD : onwards;
        call.plain = row + K::Rows <= call.free_rows ? call.steps : call.plain_at_end;
        if (K::Planes > 0 && (row == first || layout.tables > 1)) {
            for (int r = 0; r < K::Rows; ++r) {
                const int64_t at = layout.tables > 1 ? (row + r) * layout.table_width : 0;
                table[0][r].load(layout.low.data() + at);
                if (K::Planes == 2) table[1][r].load(layout.high.data() + at);
            }
        }
        typename K::Floats result, weighed;
        for (int r = 0; r < K::Rows; ++r)
            for (int t = 0; t < K::Tokens; ++t) result[r][t] = weighed[r][t] = _mm512_setzero_ps();
        if constexpr (Kind == Groups::one) one_group<K>(call, row, table, result, weighed);
        if constexpr (Kind == Groups::small) small_groups<K>(call, row, table, result, weighed);
        if constexpr (Kind == Groups::step) whole_steps<K, 1>(call, row, table, result, weighed);
        if constexpr (Kind == Groups::steps) whole_steps<K, 0>(call, row, table, result, weighed);
        const int64_t held = (row - first) % 16;
#pragma GCC unroll 4
        for (int r = 0; r < K::Rows; ++r) {
            if (call.fetched_once) {
                const __m512 middle = _mm512_set1_ps(layout.middle.size() > 1 ? layout.middle[row + r] : layout.middle[0]);
                for (int t = 0; t < K::Tokens; ++t)
                    _mm512_store_ps(lanes[t][held + r], _mm512_fnmadd_ps(weighed[r][t], middle, result[r][t]));
                continue;
            }
            __m512 shift[K::Tokens];
            shifts<K>(call, row + r, shift);
            for (int t = 0; t < K::Tokens; ++t)
                _mm512_store_ps(lanes[t][held + r], _mm512_sub_ps(result[r][t], shift[t]));
        }
        // Not row by row: that is a long way from one instruction to the next, as long as a short row takes.
        const int64_t end = row + K::Rows;
        if (held + K::Rows == 16 || end == last)
            write_rows<K>(call, lanes, inputs.rounded.scale.data() + token, row - held, end - (row - held),
                          y + token * stride, stride);
    }
    if (next.scales != nullptr) fetch_bytes(next.scales, SCALES_AHEAD * layout.scale_bytes());
}

template <class K>
TERSOR_512_INLINE void rows_for(Call<K>& call, const RowInputs& inputs, int64_t first, int64_t last, int64_t token,
                                float* y, int64_t stride) {
    const RowLayout& layout = call.layout;
    if (layout.groups == 1) return rows_of<K, Groups::one>(call, inputs, first, last, token, y, stride);
    if (layout.group % K::Columns != 0) return rows_of<K, Groups::small>(call, inputs, first, last, token, y, stride);
    if (layout.group == K::Columns) return rows_of<K, Groups::step>(call, inputs, first, last, token, y, stride);
    rows_of<K, Groups::steps>(call, inputs, first, last, token, y, stride);
}

// Rows for tokens [token, token + K::Tokens).
template <class K>
TERSOR_512 void loop(const RowLayout& layout, const RowInputs& inputs, int64_t first, int64_t last, int64_t token,
                     float* y, int64_t stride) {
    const int64_t steps = (layout.columns + K::Columns - 1) / K::Columns;
    const bool fetched_once =
        layout.zero == nullptr && (layout.groups == 1 || layout.group % K::Columns == 0 || layout.per_fetch > 1);
    const Cut cut = cut_of(layout);
    const __mmask64 whole = first_bytes(cut.bytes), tail = first_bytes(layout.row_bytes - (steps - 1) * cut.bytes);
    const int64_t plain = layout.row_bytes < 64 ? 0 : (layout.row_bytes - 64) / cut.bytes + 1;
    // What a step fetches beyond its row belongs to the rows after it, and is multiplied by inputs of zero.
    const int64_t beyond = std::max<int64_t>((steps - 1) * cut.bytes + 64 - layout.row_bytes, 0);
    const int64_t free_rows = layout.rows - (beyond + layout.row_bytes - 1) / layout.row_bytes;
    Call<K> call{layout, {}, {}, {}, cut, steps, 0, plain, free_rows, whole, tail, layout.lanes.data(), layout.per_fetch, AHEAD,
                 fetched_once};
    for (int t = 0; t < K::Tokens; ++t) {
        call.high[t] = inputs.high_of(token + t);
        call.low[t] = K::Two ? inputs.low_of(token + t) : nullptr;
        call.group_sums[t] = inputs.sums_of(token + t);
    }
    const int64_t most = first + (last - first) / K::Rows * K::Rows;
    rows_for<K>(call, inputs, first, most, token, y, stride);
    if (most == last) return;
    using One = Kind<K::Slices, K::Spread, K::Planes, K::Wide, K::Two, 1, K::Tokens>;
    Call<One> one{layout, {}, {}, {}, cut, steps, 0, plain, free_rows, whole, tail, layout.lanes.data(), layout.per_fetch, AHEAD,
                  fetched_once};
    std::copy_n(call.high, K::Tokens, one.high);
    std::copy_n(call.low, K::Tokens, one.low);
    std::copy_n(call.group_sums, K::Tokens, one.group_sums);
    rows_for<One>(one, inputs, most, last, token, y, stride);
}

template <int Slices, bool Spread, int Planes, bool Wide, bool Two>
TERSOR_512 void tokens(const RowLayout& layout, const RowInputs& inputs, int64_t first, int64_t last, float* y,
                       int64_t stride) {
    // Several rows at a time, so that what is fetched of the inputs serves all of them; as many as registers hold. Codes of
    // 4 bits wait for memory, which gives two rows at a time faster than four.
    constexpr bool BOUND_BY_MEMORY = Slices == 2 && !Spread && Planes == 0;
    constexpr int ROWS = Wide ? 1 : BOUND_BY_MEMORY || (Spread && Slices == 2 && Planes == 2) ? 2 : 4;
    int64_t t = 0;
    for (; t + 4 <= inputs.rounded.tokens; t += 4)
        loop<Kind<Slices, Spread, Planes, Wide, Two, 1, 4>>(layout, inputs, first, last, t, y, stride);
    for (; t < inputs.rounded.tokens; ++t)
        loop<Kind<Slices, Spread, Planes, Wide, Two, ROWS, 1>>(layout, inputs, first, last, t, y, stride);
}

template <int Slices, bool Spread, bool Two>
TERSOR_512 void planes(const RowLayout& layout, const RowInputs& inputs, int64_t first, int64_t last, float* y,
                       int64_t stride) {
    if (layout.table_planes == 0) return tokens<Slices, Spread, 0, false, Two>(layout, inputs, first, last, y, stride);
    if (!layout.wide_table()) {
        if (layout.table_planes == 1) return tokens<Slices, Spread, 1, false, Two>(layout, inputs, first, last, y, stride);
        return tokens<Slices, Spread, 2, false, Two>(layout, inputs, first, last, y, stride);
    }
    if constexpr (Slices == 1) {  // only codes of 7 and 8 bits have such tables
        if (layout.table_planes == 1) return tokens<Slices, Spread, 1, true, Two>(layout, inputs, first, last, y, stride);
        tokens<Slices, Spread, 2, true, Two>(layout, inputs, first, last, y, stride);
    }
}

template <bool Two>
TERSOR_512 void slices(const RowLayout& layout, const RowInputs& inputs, int64_t first, int64_t last, float* y,
                       int64_t stride) {
    if (layout.spread && layout.slices == 2) return planes<2, true, Two>(layout, inputs, first, last, y, stride);
    if (layout.spread) return planes<1, true, Two>(layout, inputs, first, last, y, stride);
    switch (layout.slices) {
        case 1: return planes<1, false, Two>(layout, inputs, first, last, y, stride);
        case 2: return planes<2, false, Two>(layout, inputs, first, last, y, stride);
        case 4: return planes<4, false, Two>(layout, inputs, first, last, y, stride);
        default: return planes<8, false, Two>(layout, inputs, first, last, y, stride);
    }
}

}  // namespace
}  // namespace tersor
