// The tables of a trellis code, and the loops that work anywhere: from state to state, row by row.
#include <algorithm>
#include <cstring>

#include "trellis_product.h"

namespace tersor::trellis {
namespace {

int parity(uint32_t bits) {
    int sum = 0;
    for (; bits != 0; bits &= bits - 1) sum ^= 1;
    return sum;
}

// Bits of the index that bit `bit` of a stream is added to, for the window of the row whose bits begin at `row * bits`.
int reached(const Code& code, const int32_t* masks, int index_bits, int row, int bit) {
    const int age = row - floor_div(bit, code.bits);
    const int of_state = age * code.bits + bit - floor_div(bit, code.bits) * code.bits;
    if (age < 0 || of_state >= code.window) return 0;
    int index = 0;
    for (int i = 0; i < index_bits; ++i) index = 2 * index + (masks[i] >> of_state & 1);
    return index;
}

}  // namespace

Code::Code(int bits, int window, const int32_t* masks, int index_bits, const int8_t* integers)
    : bits(bits), window(window), states(size_t{1} << window), matrix{}, nibbles{}, entries(1 << index_bits) {
    for (int state = 0; state < 1 << window; ++state) {
        int index = 0;
        for (int i = 0; i < index_bits; ++i) index = 2 * index + parity(static_cast<uint32_t>(masks[i] & state));
        states[state] = integers[index];
    }
    for (int i = 0; i < 256; ++i) {
        const int8_t value = integers[i % entries];
        raised[i] = static_cast<uint8_t>(value + 128);
        steps[i] = i % 128 < 16 ? value : static_cast<int8_t>(value ^ integers[(i - 16) % entries]);
    }
    for (int row = 0; row < unit_rows(bits); ++row) {
        const int first = first_byte(bits, window, row), last = last_byte(bits, row);
        for (int byte = first; byte <= last; ++byte) {
            const int term = byte == last && joined(bits, window, row) ? 0 : byte - first;
            for (int bit = 0; bit < 8 && term < TERMS; ++bit) {
                const int index = reached(*this, masks, index_bits, row, 8 * byte + bit);
                // Byte 7 - i of the matrix says which bits are added to bit i of the result.
                for (int i = 0; i < 8; ++i) matrix[row][term] |= uint64_t(index >> i & 1) << (8 * (7 - i) + bit);
            }
        }
        const int nibble = first_nibble(bits, window, row);
        for (int k = 0; k <= last_nibble(bits, row) - nibble && k < 6; ++k) {
            for (int bit = 0; bit < 4; ++bit) {
                const int index = reached(*this, masks, index_bits, row, 4 * (nibble + k) + bit);
                for (int i = 0; i < 16; ++i) nibbles[row][k][i] ^= static_cast<uint8_t>(i >> bit & 1 ? index : 0);
            }
        }
    }
}

const uint8_t* copy_rings(const uint8_t* from, int64_t plane, int unit_bytes, int units, uint8_t* spare) {
    std::memset(spare, 0, unit_bytes * SPARE);
    for (int j = 0; j < unit_bytes; ++j) {
        uint8_t* to = spare + j * SPARE + 64;
        std::memcpy(to, from + j * plane, 4 * units);
        for (int u = 1; u <= 16; ++u) std::memcpy(to - 4 * u, to + 4 * (units - 1 - (u - 1) % units), 4);
    }
    return spare + 64;
}

namespace {

uint32_t code_at(int bits, const Column& stream, int row) {
    const int bit = row * bits, shift = bit % 8;
    uint32_t found = stream[bit / 8] >> shift;
    if (shift + bits > 8) found |= stream[bit / 8 + 1] << (8 - shift);
    return found & ((1u << bits) - 1);
}

// Codes of the `count` rows before a row and its own, the newest in the lowest bits; the stream is a ring.
uint32_t state_of(const Code& code, const Column& stream, int rows, int row, int count) {
    uint32_t state = 0;
    for (int age = count; age >= 0; --age)
        state = state << code.bits | code_at(code.bits, stream, ((row - age) % rows + rows) % rows);
    return state & ((1u << code.window) - 1);
}

// The rows of one column, before scales.
void decode_column(const Code& code, const Column& stream, int rows, int8_t* values) {
    uint32_t state = state_of(code, stream, rows, 0, (code.window - 1) / code.bits);
    values[0] = code.states[state];
    for (int row = 1; row < rows; ++row) {
        state = (state << code.bits | code_at(code.bits, stream, row)) & ((1u << code.window) - 1);
        values[row] = code.states[state];
    }
}

}  // namespace

int8_t value_at(const Code& code, const Column& stream, int rows, int row) {
    return code.states[state_of(code, stream, rows, row, (code.window - 1) / code.bits)];
}

void portable(const Code& code, const Tile& tile, int64_t first, int64_t last, const Inputs& inputs, int64_t* sums) {
    constexpr int64_t COUNT = 64;  // columns at a time
    int8_t values[COUNT * TILE];
    for (int64_t c = first; c < last; c += COUNT) {
        const int64_t count = std::min(COUNT, last - c);
        for (int64_t k = 0; k < count; ++k)
            decode_column(code, column_of(tile, code.bits, c + k), tile.rows, values + k * TILE);
        for (int t = 0; t < inputs.tokens; ++t) {
            const int16_t* x = inputs.joined + (inputs.first + t) * inputs.planes->width + c;
            int32_t parts[TILE] = {};
            for (int64_t k = 0; k < count; ++k) {
                const int32_t factor = x[k];
                for (int row = 0; row < tile.rows; ++row) parts[row] += factor * values[k * TILE + row];
            }
            for (int row = 0; row < tile.rows; ++row) sums[t * TILE + row] += parts[row];
        }
    }
}

}  // namespace tersor::trellis
