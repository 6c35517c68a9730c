// Rows of an entropy-coded stream with AVX2: four vectors of eight lanes.
#include "rans.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <array>

#define TERSOR_TARGET __attribute__((target("avx2,popcnt")))
#define TERSOR_INLINE __attribute__((always_inline)) inline

namespace tersor_rans {
namespace {

// For each set of eight lanes the place of each lane's word among those that the set gets.
std::array<std::array<uint8_t, 8>, 256> places() {
    std::array<std::array<uint8_t, 8>, 256> found{};
    for (uint32_t set = 0; set < 256; ++set) {
        uint8_t next = 0;
        for (uint32_t l = 0; l < 8; ++l) found[set][l] = set >> l & 1 ? next++ : 0;
    }
    return found;
}

const std::array<std::array<uint8_t, 8>, 256> PLACES = places();

struct Row {
    const int* entries;
    const uint8_t *twice, *low, *path;
    uint8_t* next;
    __m256i h0, h1;
};

TERSOR_TARGET TERSOR_INLINE __m256i wide(const uint8_t* from) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}

TERSOR_TARGET TERSOR_INLINE __m128i four(const int* from, __m128i place) {
    const uint64_t low = static_cast<uint64_t>(_mm_cvtsi128_si64(place));
    const uint64_t high = static_cast<uint64_t>(_mm_extract_epi64(place, 1));
    const __m128i a = _mm_insert_epi32(_mm_cvtsi32_si128(from[static_cast<uint32_t>(low)]), from[low >> 32], 1);
    const __m128i b = _mm_insert_epi32(_mm_cvtsi32_si128(from[static_cast<uint32_t>(high)]), from[high >> 32], 1);
    return _mm_unpacklo_epi64(a, b);
}

// Eight look-ups one by one: quicker than the instruction that gathers.
TERSOR_TARGET TERSOR_INLINE __m256i looked_up(const int* from, __m256i place) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(four(from, _mm256_castsi256_si128(place))),
                                   four(from, _mm256_extracti128_si256(place, 1)), 1);
}

// Lanes of `mask` whose state is too small get the next words, in the order of lanes.
TERSOR_TARGET TERSOR_INLINE __m256i refilled(__m256i x, __m256i mask, const uint8_t*& at) {
    const __m256i small = _mm256_and_si256(mask, _mm256_cmpeq_epi32(_mm256_srli_epi32(x, 16), _mm256_setzero_si256()));
    const uint32_t set = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(small)));
    const __m256i ahead = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    const __m256i words = _mm256_permutevar8x32_epi32(ahead, wide(PLACES[set].data()));
    at += 2 * static_cast<unsigned>(_mm_popcnt_u32(set));
    return _mm256_blendv_epi8(x, _mm256_or_si256(_mm256_slli_epi32(x, 16), words), small);
}

struct Lanes {
    __m256i x, number, path, mask;
};

// The symbols of eight lanes; returns which of them are the escape.
TERSOR_TARGET TERSOR_INLINE uint32_t symbols(const Row& row, size_t first, Lanes& lanes, const uint8_t*& at) {
    const __m256i one = _mm256_set1_epi32(1), slots = _mm256_set1_epi32(TOTAL - 1);
    lanes.path = wide(row.path + first);
    const __m256i lowest = _mm256_and_si256(lanes.path, one);
    const __m256i table = _mm256_slli_epi32(_mm256_or_si256(wide(row.twice + first), lowest), TOTAL_BITS);
    const __m256i found = looked_up(row.entries, _mm256_or_si256(table, _mm256_and_si256(lanes.x, slots)));
    const __m256i frequency = _mm256_and_si256(_mm256_srli_epi32(found, TOTAL_BITS), _mm256_set1_epi32(0x1fff));
    const __m256i whole = _mm256_mullo_epi32(frequency, _mm256_srli_epi32(lanes.x, TOTAL_BITS));
    const __m256i next = _mm256_add_epi32(whole, _mm256_and_si256(found, slots));
    lanes.x = refilled(_mm256_blendv_epi8(lanes.x, next, lanes.mask), lanes.mask, at);
    const __m256i index = _mm256_srai_epi32(found, 25);
    lanes.number = _mm256_or_si256(_mm256_add_epi32(index, index), lowest);
    const __m256i out = _mm256_and_si256(lanes.mask, _mm256_cmpeq_epi32(index, _mm256_set1_epi32(ESCAPE)));
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(out)));
}

// Raw bits of lanes that have some and are not the escape.
TERSOR_TARGET TERSOR_INLINE void take(const Row& row, size_t first, Lanes& lanes, const uint8_t*& at) {
    const __m256i one = _mm256_set1_epi32(1), low = wide(row.low + first);
    // Numbers of escapes are below all that symbols stand for.
    __m256i more = _mm256_cmpgt_epi32(lanes.number, _mm256_set1_epi32(ESCAPE));
    more = _mm256_and_si256(_mm256_and_si256(more, lanes.mask), _mm256_cmpgt_epi32(low, _mm256_setzero_si256()));
    const __m256i slot = _mm256_and_si256(lanes.x, _mm256_set1_epi32(TOTAL - 1));
    const __m256i shift = _mm256_sub_epi32(_mm256_set1_epi32(TOTAL_BITS), low), value = _mm256_srlv_epi32(slot, shift);
    // (floor(x / 4096) - value) · 2^shift + slot: the slot without the bits that were taken
    const __m256i whole = _mm256_sub_epi32(_mm256_srli_epi32(lanes.x, TOTAL_BITS), value);
    const __m256i next = _mm256_add_epi32(_mm256_sllv_epi32(whole, shift), slot);
    lanes.x = refilled(_mm256_blendv_epi8(lanes.x, next, more), more, at);
    const __m256i twice = _mm256_sllv_epi32(_mm256_andnot_si256(one, lanes.number), low);
    const __m256i found = _mm256_or_si256(_mm256_add_epi32(twice, _mm256_add_epi32(value, value)),
                                          _mm256_and_si256(lanes.number, one));
    lanes.number = _mm256_blendv_epi8(lanes.number, found, more);
}

TERSOR_TARGET TERSOR_INLINE void keep(const Row& row, size_t first, const Lanes& lanes, int32_t* codes) {
    const __m256i zero = _mm256_setzero_si256(), one = _mm256_set1_epi32(1), two = _mm256_set1_epi32(2);
    const __m256i odd = _mm256_cmpgt_epi32(_mm256_and_si256(lanes.path, one), zero);
    const __m256i turned = _mm256_cmpgt_epi32(_mm256_and_si256(lanes.number, two), zero);
    const __m256i change = _mm256_xor_si256(_mm256_and_si256(odd, row.h0), _mm256_and_si256(turned, row.h1));
    const __m256i next = _mm256_xor_si256(_mm256_srli_epi32(lanes.path, 1), change);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(next), _mm256_extracti128_si256(next, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(row.next + first), _mm_packus_epi16(packed, packed));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + first), lanes.number);
}

// One group of which `count` lanes are there, in `vectors` vectors.
template <int vectors, bool raw>
TERSOR_TARGET TERSOR_INLINE void group(Reader& in, const Row& row, size_t first, size_t count, int32_t* codes) {
    const __m256i order = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const uint8_t* at = in.at;
    Lanes lanes[vectors];
    uint32_t escaped = 0;
    for (int v = 0; v < vectors; ++v) {
        lanes[v].mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count) - 8 * v), order);
        lanes[v].x = _mm256_load_si256(reinterpret_cast<const __m256i*>(in.x + 8 * v));
        escaped |= symbols(row, first + 8 * v, lanes[v], at) << (8 * v);
    }
    if (raw)
        for (int v = 0; v < vectors; ++v) take(row, first + 8 * v, lanes[v], at);
    for (int v = 0; v < vectors; ++v) {
        keep(row, first + 8 * v, lanes[v], codes);
        _mm256_store_si256(reinterpret_cast<__m256i*>(in.x + 8 * v), lanes[v].x);
    }
    in.at = at;
    if (__builtin_expect(escaped != 0, 0)) settle(in, first, escaped, codes);
}

template <bool raw>
TERSOR_TARGET void row_of_groups(Reader& in, const Row& row, size_t r, int32_t* codes) {
    for (size_t first = 0; first < in.columns; first += in.lanes) {
        const size_t count = std::min(in.lanes, in.columns - first);
        if (in.end - in.at < FAR)
            group_portable(in, r, first, count, codes);
        else if (count > 16)
            group<4, raw>(in, row, first, count, codes);
        else if (count > 8)
            group<2, raw>(in, row, first, count, codes);
        else
            group<1, raw>(in, row, first, count, codes);
    }
}

}  // namespace

TERSOR_TARGET void row_avx2(Reader& in, size_t r, int32_t* codes) {
    const Kinds& kinds = in.of_row(r);
    const Row row{reinterpret_cast<const int*>(in.entries), kinds.twice.data(), kinds.low.data(), in.path.data(),
                  in.next.data(), _mm256_set1_epi32(static_cast<int>(in.h0)), _mm256_set1_epi32(static_cast<int>(in.h1))};
    if (kinds.raw)
        row_of_groups<true>(in, row, r, codes);
    else
        row_of_groups<false>(in, row, r, codes);
}

}  // namespace tersor_rans

#else

namespace tersor_rans {
void row_avx2(Reader& in, size_t row, int32_t* codes) { row_portable(in, row, codes); }
}  // namespace tersor_rans

#endif
