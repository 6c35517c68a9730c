// What the loops over row codes with 512-bit vectors are made of: stored bytes to codes, codes to table entries, and their
// integer products with inputs. Included where the instructions exist alone.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "row_codes.h"
#include "vnni.h"

#define TERSOR_512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni,avx512dq,f16c,fma")))
#define TERSOR_512_INLINE TERSOR_512 inline __attribute__((always_inline))

namespace tersor {

// rows_avx512 for inputs of one plane, and of two.
void rows_avx512_int8(const RowLayout&, const RowInputs&, int64_t first, int64_t last, float* y, int64_t stride);
void rows_avx512_int16(const RowLayout&, const RowInputs&, int64_t first, int64_t last, float* y, int64_t stride);

namespace {

// Bytes between what is used and what is fetched from memory while there are so many.
constexpr int64_t AHEAD = 16384;
// The same for scales, in rows.
constexpr int64_t SCALES_AHEAD = 8;
// Bytes between what is used and what is fetched into the first-level cache.
constexpr int64_t SOON = 512;
// Bits of the codes that are spread two to a byte.
constexpr int PAIRED = 3;

// How codes of a width become bytes, `bytes` bytes of a row at a time: a step of `slices` times 64 codes.
struct Cut {
    __m512i place, shift, mask;  // see RowLayout; the bits of a code
    int64_t bytes;
};

TERSOR_512_INLINE Cut cut_of(const RowLayout& layout) {
    return {_mm512_loadu_si512(layout.place), _mm512_loadu_si512(layout.shift),
            _mm512_set1_epi8(static_cast<char>((1 << layout.bits) - 1)), 8 * layout.slices * layout.bits};
}

TERSOR_512_INLINE __mmask64 first_bytes(int64_t count) { return count >= 64 ? ~0ULL : (1ULL << count) - 1; }

// 64 or 256 entries of a table, one plane. `Pairs`: two codes to a byte, of which each slice takes its own entry.
template <bool Wide, bool Pairs>
struct Table {
    __m512i part[Wide ? 4 : Pairs ? 2 : 1];

    TERSOR_512_INLINE void load(const uint8_t* entries) {
        for (int i = 0; i < (Wide ? 4 : 1); ++i) part[i] = _mm512_loadu_si512(entries + 64 * i);
        if constexpr (Pairs) {
            alignas(64) uint8_t second[64];
            for (int i = 0; i < 64; ++i) second[i] = static_cast<uint8_t>(i >> PAIRED);
            part[1] = _mm512_permutexvar_epi8(_mm512_load_si512(second), part[0]);
        }
    }
    template <int Slice>
    TERSOR_512_INLINE __m512i at(__m512i codes) const {
        if constexpr (Wide) {
            const __m512i first = _mm512_permutex2var_epi8(part[0], codes, part[1]);
            const __m512i second = _mm512_permutex2var_epi8(part[2], codes, part[3]);
            return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), first, second);
        } else {
            return _mm512_permutexvar_epi8(codes, part[Pairs ? Slice : 0]);
        }
    }
};

// The kind of loop: slices of a step, of codes that are spread or not; planes of a table (0: none), a table of more than 64
// entries, two planes of inputs, rows and tokens at a time.
template <int Slices_, bool Spread_, int Planes_, bool Wide_, bool Two_, int Rows_, int Tokens_>
struct Kind {
    static constexpr int Slices = Slices_, Planes = Planes_, Rows = Rows_, Tokens = Tokens_;
    static constexpr bool Spread = Spread_, Wide = Wide_, Two = Two_;
    static constexpr int64_t Columns = 64 * Slices_;  // of a step
    // Integer sums of a row and token, by the weight of their bytes: 1, 256 and 65536.
    static constexpr int Sums = std::max(Planes_, 1) + Two_;
    static constexpr bool Pairs = Spread_ && Slices_ == 2 && Planes_ > 0;
    using Tables = Table<Wide_, Pairs>[2][Rows_];
    using Integers = __m512i[Rows_][Tokens_][std::max(Planes_, 1) + Two_];
    using Floats = __m512[Rows_][Tokens_];
};

// What all rows of one call have in common.
template <class K>
struct Call {
    const RowLayout& layout;
    const int8_t* high[K::Tokens];
    const int8_t* low[K::Tokens];
    const float* group_sums[K::Tokens];
    Cut cut;
    int64_t steps, plain;   // of a row; how many of them may fetch 64 bytes
    int64_t plain_at_end;   // as many as do not go beyond the row
    int64_t free_rows;      // the rows that may be gone beyond
    __mmask64 whole, tail;  // bytes of a step, and of a row's last one
    const int32_t* lanes;   // of small groups: 16 for every step of a fetch (of all steps, where a fetch is one step)
    int64_t per_fetch;
    int64_t ahead;          // bytes between what is used and what is fetched: AHEAD, or what leads to the next part
    bool fetched_once;      // every scale is fetched once on the way, and there is one zero for all groups of a row
};

template <class K>
TERSOR_512_INLINE void clear(typename K::Integers& sum) {
    for (int r = 0; r < K::Rows; ++r)
        for (int t = 0; t < K::Tokens; ++t)
            for (int i = 0; i < K::Sums; ++i) sum[r][t][i] = _mm512_setzero_si512();
}

template <class K>
TERSOR_512_INLINE __m512 total(const __m512i (&sum)[K::Sums]) {
    __m512 all = _mm512_cvtepi32_ps(sum[0]);
    if constexpr (K::Sums > 1) all = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[1]), _mm512_set1_ps(256.0f), all);
    if constexpr (K::Sums > 2) all = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[2]), _mm512_set1_ps(65536.0f), all);
    return all;
}

// The same for few columns, where the sums of both planes fit one integer.
template <class K>
TERSOR_512_INLINE __m512 small_total(const __m512i (&sum)[K::Sums]) {
    if constexpr (K::Sums == 2)
        return _mm512_cvtepi32_ps(_mm512_add_epi32(sum[0], _mm512_slli_epi32(sum[1], 8)));
    else
        return total<K>(sum);
}

// Slice `Slice` of a step's bytes. Where codes only name entries of a table, bits above them may be anything.
template <class K, int Slice>
TERSOR_512_INLINE __m512i codes_of(__m512i bytes, const Cut& cut) {
    if constexpr (Slice > 0 && !K::Pairs) bytes = _mm512_srli_epi16(bytes, Slice * (K::Spread ? PAIRED : 8 / K::Slices));
    if constexpr (K::Planes > 0 || (K::Slices == 1 && !K::Spread)) return bytes;
    return _mm512_and_si512(bytes, cut.mask);
}

// One slice of a step: the sums of each row and token grow by 64 products in 16 lanes.
template <class K, int Slice>
TERSOR_512_INLINE void slice(const Call<K>& call, const __m512i (&bytes)[K::Rows], const typename K::Tables& table,
                             int64_t x, typename K::Integers& sum) {
    for (int t = 0; t < K::Tokens; ++t) {
        const __m512i xh = _mm512_loadu_si512(call.high[t] + x);
        const __m512i xl = K::Two ? _mm512_loadu_si512(call.low[t] + x) : xh;
        for (int r = 0; r < K::Rows; ++r) {
            const __m512i codes = codes_of<K, Slice>(bytes[r], call.cut);
            const __m512i low = K::Planes > 0 ? table[0][r].template at<Slice>(codes) : codes;
            __m512i(&s)[K::Sums] = sum[r][t];
            s[0] = plus_products(s[0], low, xl);
            if constexpr (K::Two) s[1] = plus_products(s[1], low, xh);
            if constexpr (K::Planes == 2) {
                const __m512i high = table[1][r].template at<Slice>(codes);
                s[1] = plus_products(s[1], high, xl);
                if constexpr (K::Two) s[2] = plus_products(s[2], high, xh);
            }
        }
    }
    if constexpr (Slice + 1 < K::Slices) slice<K, Slice + 1>(call, bytes, table, x + 64, sum);
}

// The codes of a step, as they are stored or spread.
template <class K>
TERSOR_512_INLINE void fetch_codes(const Call<K>& call, const uint8_t* codes, int64_t s, __m512i (&bytes)[K::Rows]) {
    if (s < call.plain) {  // masked fetches are several times as slow
        for (int r = 0; r < K::Rows; ++r) bytes[r] = _mm512_loadu_si512(codes + r * call.layout.row_bytes);
    } else {
        const __mmask64 here = s + 1 < call.steps ? call.whole : call.tail;
        for (int r = 0; r < K::Rows; ++r) bytes[r] = _mm512_maskz_loadu_epi8(here, codes + r * call.layout.row_bytes);
    }
    for (int r = 0; r < K::Rows; ++r) {
        const uint8_t* from = codes + r * call.layout.row_bytes;
        // Codes of later rows, as the hardware does not look beyond a page; not yet into the first-level cache, where rows
        // of 2^k bytes would push each other out.
        _mm_prefetch(reinterpret_cast<const char*>(from + call.ahead), _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(from + SOON), _MM_HINT_T0);
        if constexpr (K::Spread) {
            const __m512i lanes = _mm512_permutexvar_epi8(call.cut.place, bytes[r]);
            bytes[r] = _mm512_multishift_epi64_epi8(call.cut.shift, lanes);
        }
    }
}

template <class K>
TERSOR_512_INLINE void step(const Call<K>& call, const uint8_t* codes, const typename K::Tables& table, int64_t s,
                            typename K::Integers& sum) {
    __m512i bytes[K::Rows];
    fetch_codes<K>(call, codes, s, bytes);
    slice<K, 0>(call, bytes, table, K::Columns * s, sum);
}

}  // namespace
}  // namespace tersor
