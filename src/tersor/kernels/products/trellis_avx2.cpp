// Trellis codes with 256-bit vectors: the map of a byte is two tables of 16 entries, one a nibble, and so is the table
// of values, 16 entries at a time. Values are decoded once for all tokens of a pass and multiplied as 16-bit integers.
#include "trellis_product.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#define TERSOR_256 __attribute__((target("avx2")))
#define TERSOR_256_INLINE TERSOR_256 inline __attribute__((always_inline))

namespace tersor::trellis {
namespace {

// Four columns of a tile as the vectors take them, in a ring: byte j of unit u, of four columns, is the 32-bit word
// `word(j, u)`; words of units -1 and -2 repeat the last ones.
constexpr int plane_size(int bits) { return 64 + 4 * max_units(bits); }
constexpr int ring_size(int bits) { return unit_bytes(bits) * plane_size(bits); }
constexpr int word(int bits, int j, int unit) { return j * plane_size(bits) + 64 + 4 * unit; }
// Where byte `j` counted from a unit's first is, for the first block.
constexpr int byte_of_ring(int bits, int j) {
    const int unit = floor_div(j, unit_bytes(bits));
    return word(bits, j - unit * unit_bytes(bits), unit);
}

TERSOR_256_INLINE __m128i load_16(const uint8_t* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}

TERSOR_256_INLINE __m256i load_32(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

TERSOR_256_INLINE __m256i table_of(const void* from) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(static_cast<const __m128i*>(from)));
}

// The rings of four columns.
template <int Bits>
void copy_ring(const uint8_t* from, int64_t plane, int units, uint8_t* ring) {
    for (int j = 0; j < unit_bytes(Bits); ++j, from += plane) {
        std::memcpy(ring + word(Bits, j, 0), from, 4 * units);
        std::memcpy(ring + word(Bits, j, -1), from + 4 * (units - 1), 4);
        std::memcpy(ring + word(Bits, j, -2), from + 4 * (units > 1 ? units - 2 : 0), 4);
    }
}

// Values of 32 indices. Each step xors the entries 16 on onto those that an index has passed; indices that are still
// to be reached are negative, which the shuffle takes as none.
template <int Count>
TERSOR_256_INLINE __m256i look_up(__m256i index, const int8_t* steps) {
    __m256i value = _mm256_shuffle_epi8(table_of(steps), index);
#pragma GCC unroll 8
    for (int j = 1; j < Count; ++j) {
        index = _mm256_subs_epi8(index, _mm256_set1_epi8(16));
        value = _mm256_xor_si256(value, _mm256_shuffle_epi8(table_of(steps + 16 * j), index));
    }
    return value;
}

template <int Bits>
TERSOR_256_INLINE __m256i value_of(__m256i index, const Code& code) {
    if constexpr (Bits < 3) return look_up<4>(index, code.steps);
    if constexpr (Bits == 3) return look_up<8>(index, code.steps);
    return _mm256_xor_si256(look_up<8>(index, code.steps),
                            look_up<8>(_mm256_xor_si256(index, _mm256_set1_epi8(-128)), code.steps + 128));
}

// Values of row I of 8 units, of four columns.
template <int Bits, int Window, int I>
TERSOR_256_INLINE __m256i decode(const uint8_t* ring, const Code& code) {
    constexpr int first = first_nibble(Bits, Window, I), count = last_nibble(Bits, I) - first + 1;
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i index = _mm256_setzero_si256();
#pragma GCC unroll 6
    for (int k = 0; k < count; ++k) {
        __m256i bytes = load_32(ring + byte_of_ring(Bits, floor_div(first + k, 2)));
        if ((first + k) & 1) bytes = _mm256_srli_epi16(bytes, 4);
        const __m256i share = _mm256_shuffle_epi8(table_of(code.nibbles[I][k]), _mm256_and_si256(bytes, nibble));
        index = _mm256_xor_si256(index, share);
    }
    return value_of<Bits>(index, code);
}

// One block of `groups` rings to values: (groups, rows of a unit, 16 units, 4 columns).
template <int Bits, int Window, int I = 0>
TERSOR_256_INLINE void decode_rows(const uint8_t* ring, const Code& code, uint8_t* to) {
    if constexpr (I < unit_rows(Bits)) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + 64 * I), decode<Bits, Window, I>(ring, code));
        decode_rows<Bits, Window, I + 1>(ring, code, to);
    }
}

template <int Bits, int Window>
TERSOR_256 void decode_block(const uint8_t* rings, int groups, const Code& code, uint8_t* to) {
    for (int g = 0; g < groups; ++g, rings += ring_size(Bits), to += 64 * unit_rows(Bits)) {
        decode_rows<Bits, Window>(rings, code, to);
        decode_rows<Bits, Window>(rings + 32, code, to + 32);
    }
}

// Values of one row of 16 units, a group every `step` bytes, times `Tokens` tokens.
template <int Tokens>
TERSOR_256 void multiply(const uint8_t* values, int64_t step, int groups, const int16_t* const* x, int64_t* sums) {
    __m256i parts[Tokens][4];
#pragma GCC unroll 2
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) parts[t][q] = _mm256_setzero_si256();
    for (int g = 0; g < groups; ++g, values += step) {
        __m256i inputs[Tokens];
#pragma GCC unroll 2
        for (int t = 0; t < Tokens; ++t) {
            int64_t four;
            std::memcpy(&four, x[t] + 4 * g, 8);
            inputs[t] = _mm256_set1_epi64x(four);
        }
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) {
            const __m256i wide = _mm256_cvtepi8_epi16(load_16(values + 16 * q));
#pragma GCC unroll 2
            for (int t = 0; t < Tokens; ++t)
                parts[t][q] = _mm256_add_epi32(parts[t][q], _mm256_madd_epi16(wide, inputs[t]));
        }
    }
    for (int t = 0; t < Tokens; ++t) {
        int32_t pairs[32];
        for (int q = 0; q < 4; ++q) _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs + 8 * q), parts[t][q]);
        for (int u = 0; u < BLOCK; ++u) sums[t * TILE + u] += int64_t{pairs[2 * u]} + pairs[2 * u + 1];
    }
}

template <int Bits, int Window>
TERSOR_256 void loop(const Code& code, const Tile& tile, int64_t first, int64_t last, const Inputs& inputs,
                     int64_t* sums) {
    constexpr int R = unit_rows(Bits);
    alignas(64) uint8_t rings[CHUNK / 4 * ring_size(Bits)];
    alignas(64) uint8_t values[CHUNK / 4 * R * 64];
    const int units = tile.rows / R, blocks = (units + BLOCK - 1) / BLOCK;
    for (int64_t c = first; c < last; c += CHUNK) {
        const int groups = static_cast<int>((std::min<int64_t>(CHUNK, last - c) + 3) / 4);
        for (int g = 0; g < groups; ++g)
            copy_ring<Bits>(tile.codes + (c / 4 + g) * tile.step, tile.plane, units, rings + g * ring_size(Bits));
        const int16_t* x[TOKENS];
        for (int t = 0; t < inputs.tokens; ++t) x[t] = inputs.joined + (inputs.first + t) * inputs.planes->width + c;
        for (int b = 0; b < blocks; ++b) {
            decode_block<Bits, Window>(rings + b * 64, groups, code, values);
            for (int i = 0; i < R; ++i) {
                int64_t* to = sums + (b * R + i) * BLOCK;
                const uint8_t* from = values + 64 * i;
                int t = 0;
                for (; t + 2 <= inputs.tokens; t += 2) multiply<2>(from, 64 * R, groups, x + t, to + t * TILE);
                if (t < inputs.tokens) multiply<1>(from, 64 * R, groups, x + t, to + t * TILE);
            }
        }
    }
}

template <int Bits>
Loop of_window(int window) {
    switch (window) {
        case 8: return loop<Bits, 8>;
        case 10: return loop<Bits, 10>;
        case 12: return loop<Bits, 12>;
        case 14: return loop<Bits, 14>;
        case 16: return Bits < 3 ? loop<Bits, Bits < 3 ? 16 : 8> : nullptr;
        default: return nullptr;
    }
}

}  // namespace

Loop avx2(int bits, int window) {
    switch (bits) {
        case 1: return of_window<1>(window);
        case 2: return of_window<2>(window);
        case 3: return of_window<3>(window);
        case 4: return of_window<4>(window);
        default: return nullptr;
    }
}

}  // namespace tersor::trellis

#else

namespace tersor::trellis {
Loop avx2(int, int) { return nullptr; }
}  // namespace tersor::trellis

#endif
