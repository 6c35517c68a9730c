// Trellis codes with 512-bit vectors: 64 weights, 16 rows of 4 columns, take one or two vgf2p8affineqb, a permutation as
// the table, and a vpdpbusd for each plane of the inputs. The first and the last run on the same units, the bound.
#include "trellis_product.h"
#include "vnni.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#define TERSOR_512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni,gfni")))
#define TERSOR_512_INLINE TERSOR_512 inline __attribute__((always_inline))

namespace tersor::trellis {
namespace {

// Sums of 32 bits: [token][plane][place].
constexpr int SUMS = 2 * TILE;

template <int Bits>
constexpr int VECTORS = Bits < 3 ? 1 : Bits == 3 ? 2 : 4;  // of the table

TERSOR_512_INLINE int32_t load_word(const void* from) {
    int32_t word;
    std::memcpy(&word, from, 4);
    return word;
}

// The block of four columns: whether it is the first one of its rings, whose units before the first are the last ones.
struct Streams {
    const uint8_t* from;  // the words of its first 16 units
    int64_t step;         // from one group of columns to the next
    int64_t plane;        // from one byte of units to the next
    int64_t last;         // of the first block: to the words of its rings' last 16 units
};

// Bytes `first` and up of 16 units, of four columns.
template <int Bits, int Window>
struct Bytes {
    static constexpr int first = first_byte(Bits, Window, 0), count = unit_bytes(Bits) - first;
    __m512i at[count];

    template <bool First>
    TERSOR_512_INLINE void load(const Streams& s) {
#pragma GCC unroll 5
        for (int k = 0; k < count; ++k) {
            const int unit = floor_div(first + k, unit_bytes(Bits)), j = first + k - unit * unit_bytes(Bits);
            const uint8_t* words = s.from + j * s.plane;
            if (!First || unit == 0) {
                at[k] = _mm512_loadu_si512(words + 4 * unit);
            } else {
                const __m512i here = _mm512_loadu_si512(words), last = _mm512_loadu_si512(words + s.last);
                at[k] = unit == -1 ? _mm512_alignr_epi32(here, last, 15) : _mm512_alignr_epi32(here, last, 14);
            }
        }
    }
};

// The values of 64 indices, plus 128.
template <int Bits>
struct Table {
    __m512i part[VECTORS<Bits>];

    TERSOR_512_INLINE explicit Table(const Code& code) {
        for (int i = 0; i < VECTORS<Bits>; ++i) part[i] = _mm512_load_si512(code.raised + 64 * i);
    }
    TERSOR_512_INLINE __m512i at(__m512i index) const {
        if constexpr (VECTORS<Bits> == 1) {
            return _mm512_permutexvar_epi8(index, part[0]);
        } else if constexpr (VECTORS<Bits> == 2) {
            return _mm512_permutex2var_epi8(part[0], index, part[1]);
        } else {
            const __m512i low = _mm512_permutex2var_epi8(part[0], index, part[1]);
            const __m512i high = _mm512_permutex2var_epi8(part[2], index, part[3]);
            // A shuffle instead of a mask: the unit that makes masks is the one that maps and multiplies.
            const __m512i is_low = _mm512_shuffle_epi8(_mm512_set1_epi8(-1), index);
            return _mm512_ternarylogic_epi64(is_low, low, high, 0xca);
        }
    }
};

TERSOR_512_INLINE __m512i mapped(__m512i bytes, uint64_t matrix) {
    return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64(static_cast<int64_t>(matrix)), 0);
}

// Values of row I of 16 units, of four columns. The maps are read from memory each time: in registers there would be no
// room for sums.
template <int Bits, int Window, int I>
TERSOR_512_INLINE __m512i decode(const Bytes<Bits, Window>& bytes, const uint64_t (*matrix)[TERMS],
                                 const Table<Bits>& table) {
    constexpr int first = first_byte(Bits, Window, I), last = last_byte(Bits, I), oldest = first - bytes.first;
    __m512i outer = bytes.at[oldest];
    if constexpr (joined(Bits, Window, I)) {
        const __m512i newest = _mm512_set1_epi8(static_cast<char>((2 << last_bit(Bits, I) % 8) - 1));
        outer = _mm512_ternarylogic_epi64(newest, bytes.at[last - bytes.first], outer, 0xca);
    }
    const __m512i share = mapped(outer, matrix[I][0]);
    static_assert(terms(Bits, Window, I) <= TERMS, "a window has more terms than there are maps");
    if constexpr (terms(Bits, Window, I) == 1) return table.at(share);
    return table.at(_mm512_xor_si512(share, mapped(bytes.at[oldest + 1], matrix[I][1])));
}

template <int Rows, int Planes, int Tokens>
struct Sums {
    __m512i at[Tokens][Planes][Rows];

    TERSOR_512_INLINE explicit Sums(const int32_t* from) {
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
            for (int p = 0; p < Planes; ++p)
#pragma GCC unroll 8
                for (int i = 0; i < Rows; ++i) at[t][p][i] = _mm512_load_si512(from + t * SUMS + p * TILE + i * BLOCK);
    }
    TERSOR_512_INLINE void store(int32_t* to) const {
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
            for (int p = 0; p < Planes; ++p)
#pragma GCC unroll 8
                for (int i = 0; i < Rows; ++i) _mm512_store_si512(to + t * SUMS + p * TILE + i * BLOCK, at[t][p][i]);
    }
    TERSOR_512_INLINE void add(int i, __m512i values, const int8_t* const (*x)[2], int64_t column) {
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
            for (int p = 0; p < Planes; ++p)
                at[t][p][i] = plus_products(at[t][p][i], values, _mm512_set1_epi32(load_word(x[t][p] + column)));
    }
};

// Three lines a group are more than the first cache can wait for at a time.
template <int Bits>
TERSOR_512_INLINE void prefetch(const uint8_t* from) {
    _mm_prefetch(reinterpret_cast<const char*>(from), unit_bytes(Bits) == 1 ? _MM_HINT_T0 : _MM_HINT_T1);
}

// A block of `groups` groups of four columns, and what will be needed next: 64 bytes a group for each byte of a unit.
struct Block {
    Streams streams;
    int groups;
    const uint8_t* ahead;

    template <int Bits>
    TERSOR_512_INLINE void fetch() {
        for (int j = 0; j < unit_bytes(Bits); ++j, ahead += 64) prefetch<Bits>(ahead);
    }
};

// A block times `Tokens` tokens.
template <int Bits, int Window, int Planes, int Tokens, bool First>
TERSOR_512 void fused(Block block, const Code& code, const int8_t* const (*inputs)[2], int32_t* sums) {
    constexpr int R = unit_rows(Bits);
    const Table<Bits> table(code);
    const uint64_t(*matrix)[TERMS] = code.matrix;
    const int8_t* x[Tokens][2];
    for (int t = 0; t < Tokens; ++t)
        for (int p = 0; p < Planes; ++p) x[t][p] = inputs[t][p];
    Sums<R, Planes, Tokens> all(sums);
    Bytes<Bits, Window> bytes;
    for (int g = 0; g < block.groups; ++g, block.streams.from += block.streams.step) {
        block.fetch<Bits>();
        asm("" : "+r"(matrix));
        bytes.template load<First>(block.streams);
        all.add(0, decode<Bits, Window, 0>(bytes, matrix, table), x, 4 * g);
        all.add(1, decode<Bits, Window, 1>(bytes, matrix, table), x, 4 * g);
        if constexpr (R > 2) {
            all.add(2, decode<Bits, Window, 2>(bytes, matrix, table), x, 4 * g);
            all.add(3, decode<Bits, Window, 3>(bytes, matrix, table), x, 4 * g);
        }
        if constexpr (R > 4) {
            all.add(4, decode<Bits, Window, 4>(bytes, matrix, table), x, 4 * g);
            all.add(5, decode<Bits, Window, 5>(bytes, matrix, table), x, 4 * g);
            all.add(6, decode<Bits, Window, 6>(bytes, matrix, table), x, 4 * g);
            all.add(7, decode<Bits, Window, 7>(bytes, matrix, table), x, 4 * g);
        }
    }
    all.store(sums);
}

// For more tokens: values are decoded once, to (groups, rows of a unit, 64).
template <int Bits, int Window, bool First>
TERSOR_512 void decode_block(Block block, const Code& code, uint8_t* to) {
    constexpr int R = unit_rows(Bits);
    const Table<Bits> table(code);
    const uint64_t(*matrix)[TERMS] = code.matrix;
    Bytes<Bits, Window> bytes;
    for (int g = 0; g < block.groups; ++g, block.streams.from += block.streams.step, to += 64 * R) {
        block.fetch<Bits>();
        asm("" : "+r"(matrix));
        bytes.template load<First>(block.streams);
        _mm512_store_si512(to, decode<Bits, Window, 0>(bytes, matrix, table));
        _mm512_store_si512(to + 64, decode<Bits, Window, 1>(bytes, matrix, table));
        if constexpr (R > 2) {
            _mm512_store_si512(to + 128, decode<Bits, Window, 2>(bytes, matrix, table));
            _mm512_store_si512(to + 192, decode<Bits, Window, 3>(bytes, matrix, table));
        }
        if constexpr (R > 4) {
            _mm512_store_si512(to + 256, decode<Bits, Window, 4>(bytes, matrix, table));
            _mm512_store_si512(to + 320, decode<Bits, Window, 5>(bytes, matrix, table));
            _mm512_store_si512(to + 384, decode<Bits, Window, 6>(bytes, matrix, table));
            _mm512_store_si512(to + 448, decode<Bits, Window, 7>(bytes, matrix, table));
        }
    }
}

template <int Bits, int Planes, int Tokens>
TERSOR_512 void multiply(const uint8_t* values, int groups, const int8_t* const (*inputs)[2], int32_t* sums) {
    constexpr int R = unit_rows(Bits), ROWS = R < 4 ? R : 4;
    const int8_t* x[Tokens][2];
    for (int t = 0; t < Tokens; ++t)
        for (int p = 0; p < Planes; ++p) x[t][p] = inputs[t][p];
    for (int i = 0; i < R; i += ROWS) {
        Sums<ROWS, Planes, Tokens> all(sums + i * BLOCK);
        const uint8_t* from = values + 64 * i;
        for (int g = 0; g < groups; ++g, from += 64 * R) {
#pragma GCC unroll 4
            for (int k = 0; k < ROWS; ++k) all.add(k, _mm512_load_si512(from + 64 * k), x, 4 * g);
        }
        all.store(sums + i * BLOCK);
    }
}

template <int Bits, int Window, int Planes, bool First>
TERSOR_512 void times(const Block& block, const Code& code, const int8_t* const (*x)[2], int tokens, int32_t* sums) {
    if (tokens == 1) return fused<Bits, Window, Planes, 1, First>(block, code, x, sums);
    if constexpr (unit_rows(Bits) <= 4) {
        if (tokens == 2) return fused<Bits, Window, Planes, 2, First>(block, code, x, sums);
    }
    alignas(64) uint8_t values[CHUNK / 4 * unit_rows(Bits) * 64];
    decode_block<Bits, Window, First>(block, code, values);
    int t = 0;
    if constexpr (unit_rows(Bits) == 2) {
        for (; t + 4 <= tokens; t += 4) multiply<Bits, Planes, 4>(values, block.groups, x + t, sums + t * SUMS);
    }
    for (; t + 2 <= tokens; t += 2) multiply<Bits, Planes, 2>(values, block.groups, x + t, sums + t * SUMS);
    for (; t < tokens; ++t) multiply<Bits, Planes, 1>(values, block.groups, x + t, sums + t * SUMS);
}

// 128 times the sum of the integers that stand for columns [first, last): what the table is too high by.
int64_t excess(const Inputs& inputs, int64_t token, int64_t first, int64_t last) {
    const int8_t* high = inputs.planes->high_of(token);
    int32_t sum = 0, low_sum = 0;
    for (int64_t c = first; c < last; ++c) sum += high[c];
    if (!inputs.planes->two_planes) return 128 * int64_t{sum};
    const int8_t* low = inputs.planes->low_of(token);
    for (int64_t c = first; c < last; ++c) low_sum += low[c];
    return 128 * (256 * int64_t{sum} + low_sum);
}

// All blocks of some groups of columns, from column `c` on. `block`: the first. `ring`: whether it has to go round to its
// rings' ends.
template <int Bits, int Window, int Planes>
TERSOR_512 void all_blocks(const Code& code, Block block, int units, bool ring, const Inputs& inputs, int64_t c,
                           int32_t* sums) {
    constexpr int R = unit_rows(Bits), J = unit_bytes(Bits);
    const int8_t* x[TOKENS][2];
    for (int t = 0; t < inputs.tokens; ++t) {
        x[t][0] = inputs.planes->high_of(inputs.first + t) + c;
        if constexpr (Planes == 2) x[t][1] = inputs.planes->low_of(inputs.first + t) + c;
    }
    for (int u = 0; u < units; u += BLOCK, sums += R * BLOCK) {
        if (ring && u == 0) {
            times<Bits, Window, Planes, true>(block, code, x, inputs.tokens, sums);
        } else {
            times<Bits, Window, Planes, false>(block, code, x, inputs.tokens, sums);
        }
        block.streams.from += 4 * BLOCK;
        block.ahead += 64 * J * block.groups;
    }
}

template <int Bits, int Window, int Planes>
TERSOR_512 void add_products(const Code& code, const Tile& tile, int64_t first, int64_t last, const Inputs& inputs,
                             int64_t* sums) {
    constexpr int R = unit_rows(Bits), J = unit_bytes(Bits);
    alignas(64) int32_t parts[TOKENS * SUMS];
    alignas(64) uint8_t spare[J * SPARE];
    std::memset(parts, 0, sizeof(int32_t) * SUMS * inputs.tokens);
    const int units = tile.rows / R, blocks = (units + BLOCK - 1) / BLOCK;
    // Whole vectors are read, beyond the end of a ring and, at its beginning, from its last 16 units on.
    const int64_t beyond = (J - 1) * tile.plane + 64 * blocks;
    const int64_t readable = units < BLOCK || tile.end - tile.codes < beyond
                                 ? 0
                                 : (tile.end - tile.codes - beyond) / tile.step + 1;
    for (int64_t c = first; c < last; c += CHUNK) {
        const int groups = static_cast<int>((std::min<int64_t>(CHUNK, last - c) + 3) / 4);
        const int plain = static_cast<int>(std::clamp<int64_t>(readable - c / 4, 0, groups));
        const uint8_t* from = tile.codes + c / 4 * tile.step;
        if (plain > 0) {
            const uint8_t* further = from + plain * tile.step;
            if (c + CHUNK >= last && ahead.next.codes != nullptr) further = ahead.next.codes;
            const Block block{{from, tile.step, tile.plane, 4 * int64_t{units} - 64}, plain, further};
            all_blocks<Bits, Window, Planes>(code, block, units, true, inputs, c, parts);
        }
        for (int g = plain; g < groups; ++g) {
            const uint8_t* copied = copy_rings(from + g * tile.step, tile.plane, J, units, spare);
            const Block block{{copied, 0, SPARE, 0}, 1, copied};
            all_blocks<Bits, Window, Planes>(code, block, units, false, inputs, c + 4 * g, parts);
        }
    }
    for (int t = 0; t < inputs.tokens; ++t) {
        const int64_t over = excess(inputs, inputs.first + t, first, last);
        for (int i = 0; i < blocks * R * BLOCK; ++i) {
            const int64_t high = parts[t * SUMS + i];
            sums[t * TILE + i] += (Planes == 2 ? 256 * high + parts[t * SUMS + TILE + i] : high) - over;
        }
    }
}

template <int Bits, int Window>
void loop(const Code& code, const Tile& tile, int64_t first, int64_t last, const Inputs& inputs, int64_t* sums) {
    if (inputs.planes->two_planes) {
        add_products<Bits, Window, 2>(code, tile, first, last, inputs, sums);
    } else {
        add_products<Bits, Window, 1>(code, tile, first, last, inputs, sums);
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

Loop avx512(int bits, int window) {
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
Loop avx512(int, int) { return nullptr; }
}  // namespace tersor::trellis

#endif
