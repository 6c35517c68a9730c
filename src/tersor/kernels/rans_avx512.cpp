// Rows of an entropy-coded stream with AVX-512: 32 lanes in two vectors, a gather a symbol, refills by expansion. What is
// known of a column in a few bits is worked on as bytes, all 32 at once.
#include "rans.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define TERSOR_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512cd,avx512dq,gfni,popcnt")))
#define TERSOR_INLINE __attribute__((always_inline)) inline

namespace tersor_rans {
namespace {

// 32 lanes: sixteen and sixteen.
struct Pair {
    __m512i a, b;
};

// What stays the same for a row.
struct Row {
    const int* entries;
    const uint8_t *twice, *low, *path;
    uint8_t* next;
    __m256i step, turn;
};

// Where the next words of the stream go: to the upper halves of 32 bits.
alignas(64) const uint16_t UPPER[32] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                        0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
// The highest and the lowest byte of each lane of a pair.
alignas(64) const uint8_t HIGHEST[64] = {3,  7,  11, 15, 19, 23, 27, 31, 35, 39,  43,  47,  51,  55,  59,  63,
                                         67, 71, 75, 79, 83, 87, 91, 95, 99, 103, 107, 111, 115, 119, 123, 127};
alignas(64) const uint8_t LOWEST[64] = {0,  4,  8,  12, 16, 20, 24, 28, 32, 36,  40,  44,  48,  52,  56,  60,
                                        64, 68, 72, 76, 80, 84, 88, 92, 96, 100, 104, 108, 112, 116, 120, 124};

// The matrix of vgf2p8affineqb for which bit `i` of the result is the parity of `rows[i]` and the byte.
uint64_t matrix(const uint8_t* rows) {
    uint64_t found = 0;
    for (int i = 0; i < 8; ++i) found |= static_cast<uint64_t>(rows[i]) << (8 * (7 - i));
    return found;
}

TERSOR_TARGET Row row_of(Reader& in, const Kinds& kinds) {
    uint8_t step[8], turn[8];
    for (int i = 0; i < 8; ++i) {
        step[i] = static_cast<uint8_t>((i < 7 ? 2 << i : 0) | (in.h0 >> i & 1));
        turn[i] = static_cast<uint8_t>((in.h1 >> i & 1) << 1);
    }
    return {reinterpret_cast<const int*>(in.entries), kinds.twice.data(), kinds.low.data(), in.path.data(), in.next.data(),
            _mm256_set1_epi64x(static_cast<long long>(matrix(step))),
            _mm256_set1_epi64x(static_cast<long long>(matrix(turn)))};
}

TERSOR_TARGET TERSOR_INLINE __m512i wide(__m256i bytes, bool second) {
    return _mm512_cvtepu8_epi32(second ? _mm256_extracti128_si256(bytes, 1) : _mm256_castsi256_si128(bytes));
}

// Sixteen look-ups one by one: quicker than the instruction that gathers (8.5 ns instead of 10.8 for 32 of them on Zen 4,
// and others of the loop's instructions run between them).
TERSOR_TARGET TERSOR_INLINE __m128i four(const int* from, __m128i place) {
    const uint64_t low = static_cast<uint64_t>(_mm_cvtsi128_si64(place));
    const uint64_t high = static_cast<uint64_t>(_mm_extract_epi64(place, 1));
    const __m128i a = _mm_insert_epi32(_mm_cvtsi32_si128(from[static_cast<uint32_t>(low)]), from[low >> 32], 1);
    const __m128i b = _mm_insert_epi32(_mm_cvtsi32_si128(from[static_cast<uint32_t>(high)]), from[high >> 32], 1);
    return _mm_unpacklo_epi64(a, b);
}

TERSOR_TARGET TERSOR_INLINE __m512i looked_up(const int* from, __m512i place) {
    const __m128i a = four(from, _mm512_castsi512_si128(place)), b = four(from, _mm512_extracti32x4_epi32(place, 1));
    const __m128i c = four(from, _mm512_extracti32x4_epi32(place, 2)), d = four(from, _mm512_extracti32x4_epi32(place, 3));
    const __m256i first = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
    const __m256i second = _mm256_inserti128_si256(_mm256_castsi128_si256(c), d, 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

TERSOR_TARGET TERSOR_INLINE __m512i symbol(const Row& row, __m512i table, __m512i x) {
    const __m512i place = _mm512_slli_epi32(table, TOTAL_BITS), slots = _mm512_set1_epi32(TOTAL - 1);
    return looked_up(row.entries, _mm512_ternarylogic_epi32(place, x, slots, 0xf8));
}

TERSOR_TARGET TERSOR_INLINE __m512i advanced(__m512i x, __m512i entry, __mmask16 mask) {
    const __m512i frequency = _mm512_and_si512(_mm512_srli_epi32(entry, TOTAL_BITS), _mm512_set1_epi32(0x1fff));
    const __m512i offset = _mm512_and_si512(entry, _mm512_set1_epi32(TOTAL - 1));
    return _mm512_mask_add_epi32(x, mask, _mm512_mullo_epi32(frequency, _mm512_srli_epi32(x, TOTAL_BITS)), offset);
}

// As many of the next words of the stream as `mask` has lanes, each in the upper half of its lane.
TERSOR_TARGET TERSOR_INLINE __m512i words(__mmask16 mask, const uint8_t*& at) {
    const __m512i ahead = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    at += 2 * static_cast<unsigned>(_mm_popcnt_u32(mask));
    return _mm512_maskz_expand_epi32(mask, _mm512_permutexvar_epi16(_mm512_load_si512(UPPER), ahead));
}

TERSOR_TARGET TERSOR_INLINE void refill(__m512i& x, __mmask16 mask, __m512i words) {
    x = _mm512_mask_shldi_epi32(x, mask, x, words, 16);
}

// Lanes of `mask` whose states `x` are too small: at once, and once more after `low` raw bits were taken of what the first
// word makes of them. A state of which these are taken is too small below 2^(16 + low), and one that has got a word is
// below that where it was below 2^low before.
struct Small {
    __mmask16 first, second;
};

TERSOR_TARGET TERSOR_INLINE Small small(__m512i x, __mmask16 mask, __mmask16 more, __m512i low) {
    const __mmask16 first = _mm512_mask_cmplt_epu32_mask(mask, x, _mm512_set1_epi32(LEAST));
    const __m512i zeros = _mm512_add_epi32(_mm512_lzcnt_epi32(x), low);
    const __mmask16 without = _mm512_mask_cmpge_epi32_mask(more, zeros, _mm512_set1_epi32(16));
    const __mmask16 with = _mm512_mask_cmpge_epi32_mask(more, zeros, _mm512_set1_epi32(32));
    return {first, _kor_mask16(_kandn_mask16(first, without), with)};
}

// `low` raw bits, which may be none.
TERSOR_TARGET TERSOR_INLINE void take(__m512i& x, __m512i& number, __m512i low, __mmask16 mask) {
    const __m512i slots = _mm512_set1_epi32(TOTAL - 1), rest = _mm512_srlv_epi32(slots, low);
    const __m512i value = _mm512_srlv_epi32(_mm512_and_si512(x, slots), _mm512_sub_epi32(_mm512_set1_epi32(TOTAL_BITS), low));
    // Of x without these bits: `rest` as it is, above it what is `low` bits higher.
    x = _mm512_mask_mov_epi32(x, mask, _mm512_ternarylogic_epi32(rest, x, _mm512_srlv_epi32(x, low), 0xca));
    // The lowest bit of the number stays, and the others are two times the index.
    const __m512i one = _mm512_set1_epi32(1), twice = _mm512_sllv_epi32(_mm512_andnot_si512(one, number), low);
    const __m512i found = _mm512_add_epi32(twice, _mm512_add_epi32(value, value));
    number = _mm512_mask_mov_epi32(number, mask, _mm512_ternarylogic_epi32(found, number, one, 0xf8));
}

TERSOR_TARGET __attribute__((noinline)) void escape(Reader& in, size_t first, uint32_t which, Pair* x, const uint8_t** at,
                                                    int32_t* codes) {
    _mm512_store_si512(in.x, x->a);
    _mm512_store_si512(in.x + 16, x->b);
    in.at = *at;
    settle(in, first, which, codes);
    *at = in.at;
    *x = {_mm512_load_si512(in.x), _mm512_load_si512(in.x + 16)};
}

// One group. `whole`: of 32 lanes, else of those of `mask`.
template <bool whole, bool raw>
TERSOR_TARGET TERSOR_INLINE void group(Reader& in, const Row& row, size_t first, __mmask32 mask, Pair& x,
                                       const uint8_t*& at, int32_t* codes) {
    if (whole) mask = ~__mmask32{0};
    const __mmask16 ma = static_cast<__mmask16>(mask), mb = static_cast<__mmask16>(mask >> 16);
    const __m256i one = _mm256_set1_epi8(1);
    const __m256i before = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row.path + first));
    const __m256i twice = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row.twice + first));
    const __m256i table = _mm256_ternarylogic_epi32(twice, before, one, 0xf8);  // twice | (before & one)
    const Pair entry{symbol(row, wide(table, false), x.a), symbol(row, wide(table, true), x.b)};
    x = {advanced(x.a, entry.a, ma), advanced(x.b, entry.b, mb)};
    const __m512i top = _mm512_permutex2var_epi8(entry.a, _mm512_load_si512(HIGHEST), entry.b);
    // Of the lowest bit, that of the path.
    __m256i number = _mm256_ternarylogic_epi32(_mm512_castsi512_si256(top), before, one, 0xd8);
    // At once from the entries, as raw bits wait for this.
    const __m512i out = _mm512_set1_epi32((ESCAPE + 1) * (1 << 25));
    const __mmask16 oa = _mm512_mask_cmplt_epi32_mask(ma, entry.a, out);
    const __mmask16 ob = _mm512_mask_cmplt_epi32_mask(mb, entry.b, out);
    const __mmask32 escaped = _mm512_kunpackw(ob, oa);
    const __m256i low = raw ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row.low + first)) : one;
    const Pair bits{wide(low, false), wide(low, true)};
    const __mmask32 some = _mm256_mask_test_epi8_mask(mask, low, low);
    const __mmask16 ra = static_cast<__mmask16>(some & ~oa), rb = static_cast<__mmask16>((some >> 16) & ~ob);
    const Small sa = small(x.a, ma, ra, bits.a), sb = small(x.b, mb, rb, bits.b);
    refill(x.a, sa.first, words(sa.first, at));
    refill(x.b, sb.first, words(sb.first, at));
    Pair all{_mm512_cvtepi8_epi32(_mm256_castsi256_si128(number)),
             _mm512_cvtepi8_epi32(_mm256_extracti128_si256(number, 1))};
    if (raw) {
        take(x.a, all.a, bits.a, ra);
        take(x.b, all.b, bits.b, rb);
        refill(x.a, sa.second, words(sa.second, at));
        refill(x.b, sb.second, words(sb.second, at));
        number = _mm512_castsi512_si256(_mm512_permutex2var_epi8(all.a, _mm512_load_si512(LOWEST), all.b));
    }
    const __m256i next = _mm256_xor_si256(_mm256_gf2p8affine_epi64_epi8(before, row.step, 0),
                                          _mm256_gf2p8affine_epi64_epi8(number, row.turn, 0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row.next + first), next);
    _mm512_storeu_si512(codes + first, all.a);
    _mm512_storeu_si512(codes + first + 16, all.b);
    if (__builtin_expect(escaped != 0, 0)) {
        Pair kept = x;
        const uint8_t* from = at;
        escape(in, first, escaped, &kept, &from, codes);
        x = kept;
        at = from;
    }
}

template <bool raw>
TERSOR_TARGET void row_of_groups(Reader& in, const Row& row, size_t r, int32_t* codes) {
    Pair x{_mm512_load_si512(in.x), _mm512_load_si512(in.x + 16)};
    const uint8_t *at = in.at, *const end = in.end;
    const size_t columns = in.columns, lanes = in.lanes;
    for (size_t first = 0; first < columns; first += lanes) {
        const size_t count = std::min(lanes, columns - first);
        if (__builtin_expect(end - at < FAR, 0)) {
            _mm512_store_si512(in.x, x.a);
            _mm512_store_si512(in.x + 16, x.b);
            in.at = at;
            group_portable(in, r, first, count, codes);
            at = in.at;
            x = {_mm512_load_si512(in.x), _mm512_load_si512(in.x + 16)};
        } else if (count == LANES) {
            group<true, raw>(in, row, first, 0, x, at, codes);
        } else {
            group<false, raw>(in, row, first, (__mmask32{1} << count) - 1, x, at, codes);
        }
    }
    _mm512_store_si512(in.x, x.a);
    _mm512_store_si512(in.x + 16, x.b);
    in.at = at;
}

}  // namespace

TERSOR_TARGET void row_avx512(Reader& in, size_t r, int32_t* codes) {
    const Kinds& kinds = in.of_row(r);
    const Row row = row_of(in, kinds);
    if (kinds.raw)
        row_of_groups<true>(in, row, r, codes);
    else
        row_of_groups<false>(in, row, r, codes);
}

TERSOR_TARGET void inward_avx512(const Contexts& contexts, const Shrink& shrink, size_t r, size_t columns,
                                 int32_t* codes) {
    const __m512i own = _mm512_set1_epi32(contexts.row[r]), last = _mm512_set1_epi32(contexts.last);
    const __m128i shift = _mm_cvtsi32_si128(contexts.shift);
    const __m512i table[4] = {_mm512_loadu_si512(shrink.narrow[0]), _mm512_loadu_si512(shrink.narrow[1]),
                              _mm512_loadu_si512(shrink.narrow[2]), _mm512_loadu_si512(shrink.narrow[3])};
    const __mmask64 lowest = 0x1111111111111111u;
    for (size_t c = 0; c < columns; c += 16) {
        const __m512i k = _mm512_loadu_si512(codes + c), size = _mm512_min_epi32(_mm512_abs_epi32(k), _mm512_set1_epi32(4));
        const __m512i sum = _mm512_add_epi32(own, _mm512_loadu_si512(contexts.level.data() + c));
        const __m512i kind = _mm512_min_epi32(_mm512_max_epi32(_mm512_sra_epi32(sum, shift), _mm512_setzero_si512()), last);
        // Context in the lowest 6 bits; size - 1 in the two above, of which the permutations look at the first.
        const __m512i place = _mm512_or_si512(
            kind, _mm512_slli_epi32(_mm512_sub_epi32(size, _mm512_set1_epi32(1)), 6));
        const __m512i small = _mm512_maskz_permutex2var_epi8(lowest, table[0], place, table[1]);
        const __m512i large = _mm512_maskz_permutex2var_epi8(lowest, table[2], place, table[3]);
        const __m512i by = _mm512_mask_mov_epi32(small, _mm512_test_epi32_mask(place, _mm512_set1_epi32(128)), large);
        const __m512i fine = _mm512_slli_epi32(k, 8), zero = _mm512_setzero_si512();
        const __m512i up = _mm512_mask_add_epi32(fine, _mm512_cmplt_epi32_mask(k, zero), fine, by);
        _mm512_storeu_si512(codes + c, _mm512_mask_sub_epi32(up, _mm512_cmpgt_epi32_mask(k, zero), fine, by));
    }
}

}  // namespace tersor_rans

#else

namespace tersor_rans {
void row_avx512(Reader& in, size_t row, int32_t* codes) { row_portable(in, row, codes); }
void inward_avx512(const Contexts& contexts, const Shrink& shrink, size_t row, size_t columns, int32_t* codes) {
    inward_portable(contexts, shrink, row, columns, codes);
}
}  // namespace tersor_rans

#endif
