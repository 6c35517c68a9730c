// Trellis codes down the columns (tersor/codecs/trellis.py), worked on as they are stored: four columns side by side.
//
// The window of a row is a few neighbouring bits of its column's stream, and the index a GF(2)-linear map of it. So the
// index is an exclusive or of maps of whole bytes, and which maps depends on the row's place among the rows that begin
// in one byte (or three, at 3 bits) alone. A vector of bytes, every one from another place of the stream, gives that
// many indices with one or two 8 x 8 bit products: no window is ever cut out of the stream.
#pragma once

#include <cstdint>
#include <vector>

#include "activations.h"
#include "product.h"

namespace tersor::trellis {

constexpr int TILE = 256;    // the most rows of a tile
constexpr int TOKENS = 8;    // the most tokens of a pass
constexpr int SPAN = 32768;  // the most columns whose products are summed up in 32 bits: 255 * 128 each
constexpr int CHUNK = 128;   // columns that are multiplied block after block: they, and those after, fit a first cache
constexpr int BLOCK = 16;    // units of a vector
constexpr int TERMS = 2;     // the most maps of a window

// A unit is the least number of whole bytes that holds whole rows.
constexpr int unit_bytes(int bits) { return bits == 3 ? 3 : 1; }
constexpr int unit_rows(int bits) { return 8 * unit_bytes(bits) / bits; }
constexpr int max_units(int bits) { return TILE / unit_rows(bits); }

constexpr int floor_div(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
// The codes that the window of row `i` of a unit reaches into lie from byte `first_byte` to byte `last_byte`, counted
// from the unit's first. (Of the oldest code it may take the low bits alone, which come first in the stream.)
constexpr int first_bit(int bits, int window, int i) { return bits * (i - (window - 1) / bits); }
constexpr int last_bit(int bits, int i) { return bits * (i + 1) - 1; }
constexpr int first_byte(int bits, int window, int i) { return floor_div(first_bit(bits, window, i), 8); }
constexpr int last_byte(int bits, int i) { return last_bit(bits, i) / 8; }
// Whether the oldest byte of a window and the newest make one: no place of a byte has bits of both in the window.
constexpr bool joined(int bits, int window, int i) {
    const int between = last_byte(bits, i) - first_byte(bits, window, i) - 1;
    return between >= 0 && last_bit(bits, i) - first_bit(bits, window, i) + 1 <= 8 * (between + 1);
}
// Bytes that are mapped to the index of row `i`: the oldest, or what it makes with the newest, and the one after it.
constexpr int terms(int bits, int window, int i) {
    return last_byte(bits, i) - first_byte(bits, window, i) + 1 - joined(bits, window, i);
}
// The same in nibbles.
constexpr int first_nibble(int bits, int window, int i) { return floor_div(first_bit(bits, window, i), 4); }
constexpr int last_nibble(int bits, int i) { return last_bit(bits, i) / 4; }

// Where the sum of row `row` of a tile is: rows of one place in their unit are together, 16 units at a time.
constexpr int place_of(int bits, int row) {
    const int unit = row / unit_rows(bits), i = row % unit_rows(bits);
    return (unit / BLOCK * unit_rows(bits) + i) * BLOCK + unit % BLOCK;
}

// The code, in every form that loops use.
struct Code {
    Code(int bits, int window, const int32_t* masks, int index_bits, const int8_t* integers);

    int bits, window;
    std::vector<int8_t> states;                   // value of each state
    alignas(64) uint8_t raised[256];              // value of each index, plus 128; repeated to fill the table
    alignas(64) int8_t steps[256];                // value of each index, xor the one 16 before it in its half
    alignas(64) uint64_t matrix[8][TERMS];        // row of a unit, term: bits to index, as gf2p8affineqb takes it
    alignas(16) uint8_t nibbles[8][6][16];        // row of a unit, nibble: its share of the index
    int entries;                                  // of the table
};

// One tile's streams, four columns side by side: byte j of unit u of column c is
// `codes[c / 4 * step + j * plane + 4 * u + c % 4]`.
struct Tile {
    const uint8_t* codes;
    const uint8_t* end;  // of all that may be read
    int64_t step, plane;
    int rows;
};

// The stream of one column.
struct Column {
    const uint8_t* codes;  // its first byte
    int64_t plane;
    int unit_bytes;

    uint32_t operator[](int byte) const { return codes[byte % unit_bytes * plane + 4 * (byte / unit_bytes)]; }
};
inline Column column_of(const Tile& tile, int bits, int64_t c) {
    return {tile.codes + c / 4 * tile.step + c % 4, tile.plane, unit_bytes(bits)};
}

// The value of one row of a column whose stream has `rows` of them, before scales.
int8_t value_at(const Code&, const Column&, int rows, int row);

// What the weight is multiplied by.
struct Inputs {
    const Activations* planes;
    const int16_t* joined;  // (tokens, width): both planes in one; null if the loops do not take it
    int64_t first;          // token
    int tokens;             // at most TOKENS
};

// Adds to sums[t * TILE + place] the products with columns [first, last) of a tile; `first` is a multiple of 4. The
// place is `place_of` the row, and the row itself with `portable`.
using Loop = void (*)(const Code&, const Tile&, int64_t first, int64_t last, const Inputs&, int64_t* sums);
void portable(const Code&, const Tile&, int64_t first, int64_t last, const Inputs&, int64_t* sums);
// Loops for tiles of whole units, or null where the compiler has no such instructions.
Loop avx2(int bits, int window);
Loop avx512(int bits, int window);

// Copies the rings of four columns, of `units` units, with what comes before and after them: byte j of unit u begins at
// the place returned plus j * SPARE + 4 * u, and units -16 to -1 repeat the last ones.
constexpr int SPARE = 64 + 2 * TILE + 64;
const uint8_t* copy_rings(const uint8_t* from, int64_t plane, int unit_bytes, int units, uint8_t* spare);

}  // namespace tersor::trellis
