// Weights stored as codes of 1 to 8 bits, row by row, with a scale for every group of columns: integers, small floats,
// lookup tables, ternary and binary planes. Worked on as they are stored.
#pragma once

#include <cstdint>
#include <vector>

#include "activations.h"
#include "product.h"

namespace tersor {

enum class ScaleKind { fp16, bf16, s8 };

// W[r, c] = factor[r] * scale[r, c / group] * (u - zero[r, c / group]), where u is the code of bits `bits` at bit
// c * bits of row r, little-endian, or an entry of a table at that place.
struct RowLayout {
    int64_t rows, columns, row_bytes, group, groups;
    int bits;
    const uint8_t* codes;  // (rows, row_bytes)

    ScaleKind kind;
    const void* scale;             // (rows, groups): 16 bits, or 8 bits with `super`; null: all ones
    const uint16_t* super;         // (rows,) float16: what the scales of s8 are multiplied by
    const uint8_t* zero;           // (rows, zero_bytes): codes of `bits` bits, one a group; null: `middle`
    int64_t zero_bytes;

    // Tables, of 2^bits entries of 8 or 16 bits: their high and low bytes. Repeated to 64 or 256 entries.
    int table_planes;  // 0: no table, u is the code itself; 1: `low` alone; 2: 256 * high + low
    int64_t tables, table_width;
    std::vector<uint8_t> high, low;     // (tables, table_width)
    std::vector<float> values;          // (tables, table_width): u as a float
    std::vector<float> factor, middle;  // (tables,), or one of each

    // For rows_avx512, made once: into how many slices of 64 codes a step is cut, whether codes have to be spread to bytes,
    // and which of 16 fetched scales each lane takes in each step of a fetch; see there.
    int slices = 1;
    bool spread = false;
    int64_t per_fetch = 1;
    std::vector<int32_t> lanes;
    uint8_t place[64], shift[64];            // of a step's codes that are spread: a byte's, and the first slice's
    uint8_t zero_place[64], zero_shift[64];  // the same of zeros, of which 64 are spread at a time

    int64_t scale_bytes() const { return groups * (kind == ScaleKind::s8 ? 1 : 2); }  // of a row
    bool wide_table() const { return table_width > 64; }
};

// A token's inputs as the loops take them.
struct RowInputs {
    explicit RowInputs(const Activations& rounded, const RowLayout& layout);

    const Activations& rounded;
    // Sums of the integers that stand for the inputs, (tokens, groups), and zeros to the next 16 after each token's.
    const float* sums_of(int64_t token) const { return group_sums.data() + token * padded_groups; }
    int64_t padded_groups;
    std::vector<float> group_sums;
    // For rows_avx512: both planes laid out slice by slice, `width` columns a token. Where there is one slice, the width is
    // 0 and the planes are as they are in `rounded`.
    const int8_t* high_of(int64_t token) const { return width > 0 ? high.data() + token * width : rounded.high_of(token); }
    const int8_t* low_of(int64_t token) const { return width > 0 ? low.data() + token * width : rounded.low_of(token); }
    int64_t width = 0;
    Plane high, low;

    // Those integers (tokens, width) for the loops that want them whole: in floats, or in 16 bits.
    std::vector<float> values;
    std::vector<int16_t> sixteen;
};

// Whether the inputs of one layout are those of the other.
bool same_inputs(const RowLayout& one, const RowLayout& other);

// Scales, and scales times zeros, of one row as floats; with room for whole vectors after the end.
struct RowScales {
    explicit RowScales(const RowLayout& layout) : scale(layout.groups + 32), shifted(layout.groups + 32) {}
    void expand(const RowLayout& layout, int64_t row);
    std::vector<float> scale, shifted;
};

// Rows [first, last) for all tokens: y[t * stride + r].
using RowLoop = void (*)(const RowLayout&, const RowInputs&, int64_t first, int64_t last, float* y, int64_t stride);
void rows_portable(const RowLayout&, const RowInputs&, int64_t first, int64_t last, float* y, int64_t stride);
void rows_avx2(const RowLayout&, const RowInputs&, int64_t first, int64_t last, float* y, int64_t stride);
void rows_avx2_floats(const RowLayout&, const RowInputs&, int64_t first, int64_t last, float* y, int64_t stride);
void rows_avx512(const RowLayout&, const RowInputs&, int64_t first, int64_t last, float* y, int64_t stride);

// Fills what rows_avx512 takes of `layout`, when all else of it is there.
void plan_avx512(RowLayout& layout);

// Fills what rows_avx512 takes of `inputs`: the sums of groups, and the planes as slices.
void inputs_avx512(const RowLayout& layout, RowInputs& inputs);

// Whether rows_avx2 has integer products for a layout.
bool fits_avx2(const RowLayout& layout);

}  // namespace tersor
