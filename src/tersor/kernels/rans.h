// The entropy coder's stream as its loops see it; tersor/kernels/reference_rans.py says what it is.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define TERSOR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TERSOR_CLONES
#endif

namespace tersor_rans {

constexpr int SYMBOLS = 32, REACH = 15, ESCAPE = -64, TOTAL_BITS = 12, TOTAL = 1 << TOTAL_BITS;
constexpr size_t LANES = 32;
constexpr uint32_t LEAST = 1u << 16;
// Columns are worked on in whole vectors: what belongs to columns has room for so many more.
constexpr size_t BEYOND = LANES;
// A group reads at most three words a lane, and loops may look at as many bytes as one step of all lanes takes.
constexpr ptrdiff_t FAR = 4 * LANES * sizeof(uint16_t);

inline void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

// What a slot of a table stands for, in 32 bits: slot - start in the lowest 12, the symbol's frequency in 13 above, and
// symbol - 15 as a signed number in the highest 7. One look-up then decodes a symbol, and the highest byte without its
// lowest bit is twice the number.
inline uint32_t entry(int symbol, uint32_t frequency, uint32_t offset) {
    return offset | frequency << TOTAL_BITS | static_cast<uint32_t>(symbol == SYMBOLS - 1 ? ESCAPE : symbol - REACH) << 25;
}

// Which table each number is coded with: a row's level and a column's together say it.
struct Contexts {
    const int32_t* row;
    std::vector<int32_t> level;  // (columns + BEYOND,)
    int shift, last;
    int at(size_t r, size_t c) const { return std::clamp((row[r] + level[c]) >> shift, 0, last); }
};

// Of arrays `row (rows,)` and `level (columns,)`: anything with data() and shape(0). `row` must outlive the result.
template <class Array>
Contexts contexts_of(const Array& row, const Array& level, int shift, size_t rows, size_t columns, size_t count) {
    require(row.shape(0) == rows && level.shape(0) == columns && count > 0 && shift >= 0 && shift < 16,
            "levels must have one entry a row, and one a column");
    const auto bad = [](int32_t v) { return v < -65536 || v > 65535; };
    require(!std::any_of(row.data(), row.data() + rows, bad) && !std::any_of(level.data(), level.data() + columns, bad),
            "a level out of range");
    Contexts found{row.data(), std::vector<int32_t>(columns + BEYOND), shift, static_cast<int>(count) - 1};
    std::copy_n(level.data(), columns, found.level.begin());
    return found;
}

// The columns of rows of one level: twice the context of each, and its raw bits, `(columns + BEYOND,)`.
struct Kinds {
    std::vector<uint8_t> twice, low;
    bool raw = false;  // whether there are any
};

// A stream that is being read, row after row.
struct Reader {
    const uint32_t* entries;  // (contexts, 2, 4096)
    const uint8_t* low;       // (contexts,): raw bits
    bool raw;                 // whether any context has raw bits
    const Contexts& contexts;
    size_t lanes, columns;
    uint32_t h0, h1;  // halves of the trellis's polynomials

    const uint8_t* at;
    const uint8_t* end;
    bool ended;
    alignas(64) uint32_t x[LANES];
    std::vector<uint8_t> path, next;  // (columns + BEYOND,): of this row, and of the next, which groups write in order
    std::vector<Kinds> kinds{};   // of rows of levels 0 to 255, where they were needed, and of the last other one

    const Kinds& of_row(size_t row);  // at most 128 contexts

    void refill(uint32_t& state) {
        if (state >= LEAST) return;
        if (end - at < 2) {
            ended = true;
            return;
        }
        state = (state << 16) | at[0] | (static_cast<uint32_t>(at[1]) << 8);
        at += 2;
    }
    uint32_t take(uint32_t& state, int bits) {
        const uint32_t slot = state & (TOTAL - 1), shift = TOTAL_BITS - bits, value = slot >> shift;
        state = (state >> TOTAL_BITS << shift) + (slot & ((1u << shift) - 1));
        refill(state);
        return value;
    }
};

// The numbers of lanes whose symbol is the escape, `index (lanes,)`: 16 raw bits each.
inline void escapes(Reader& in, uint32_t which, int32_t* index) {
    for (size_t l = 0; l < LANES; ++l)
        if (which >> l & 1) index[l] = static_cast<int32_t>(in.take(in.x[l], 8)) << 8;
    for (size_t l = 0; l < LANES; ++l)
        if (which >> l & 1) index[l] = static_cast<int16_t>(index[l] | static_cast<int32_t>(in.take(in.x[l], 8)));
}

// As `escapes`, once everything else of a group is done: its numbers in place of what is there, and what follows from them.
inline void settle(Reader& in, size_t first, uint32_t which, int32_t* codes) {
    int32_t index[LANES];
    escapes(in, which, index);
    for (size_t l = 0; l < LANES; ++l)
        if (which >> l & 1) {
            codes[first + l] = 2 * index[l] + (codes[first + l] & 1);
            if (index[l] & 1) in.next[first + l] ^= static_cast<uint8_t>(in.h1);
        }
}

// The grid numbers of one row or one group of it, `codes (columns + BEYOND,)`; what is beyond the columns is worthless.
void group_portable(Reader& in, size_t row, size_t first, size_t count, int32_t* codes);
void row_portable(Reader& in, size_t row, int32_t* codes);
void row_avx2(Reader& in, size_t row, int32_t* codes);    // at most 64 contexts
void row_avx512(Reader& in, size_t row, int32_t* codes);  // at most 64 contexts

// How far numbers move towards zero, in 256ths of a step, by size and context: sizes 1, 2, 3, and 4 or more as bytes, and
// sizes from 0 on as wider ones.
struct Shrink {
    uint8_t narrow[4][64] = {};
    int32_t wide[5][64] = {};
};

// Grid numbers of a row to 256ths of a step, moved towards zero; at most 64 contexts.
void inward_portable(const Contexts& contexts, const Shrink& shrink, size_t row, size_t columns, int32_t* codes);
void inward_avx512(const Contexts& contexts, const Shrink& shrink, size_t row, size_t columns, int32_t* codes);

}  // namespace tersor_rans
