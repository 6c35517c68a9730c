// Weights whose rows become floats a stretch at a time, in the first-level cache, and are multiplied there: for codes that
// no product of integers takes. Stored bytes are used as they are, and a decoder says what they mean.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>

#include "half.h"
#include "product.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define TERSOR_X86_ROWS 1
#define TERSOR_ROWS_512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi,bmi2")))
#define TERSOR_ROWS_256 __attribute__((target("avx2,fma,f16c,bmi,bmi2")))
#endif

namespace tersor {

// Rows are decoded `ROWS` at a time, `STRETCH` columns of each or fewer. What is decoded of a row lies `ROOM` floats after
// what is of the row before it; up to that much may be written.
constexpr int64_t ROWS = 4, STRETCH = 256, ROOM = STRETCH + 32, LANES = 16;

class RowDecoder {
  public:
    // `unit`: columns that are decoded together; stretches begin at multiples of it. `bytes`, `row_bytes`: where most of
    // what is stored lies, row by row, to be fetched early. `real`: of the columns of a unit the first ones that there are
    // inputs for; the others, which make it a power of two, are multiplied by zeros.
    RowDecoder(int64_t rows, int64_t columns, int64_t unit, const uint8_t* bytes, int64_t row_bytes, int64_t real = 0)
        : rows(rows), columns(columns), unit(unit), real(real > 0 ? real : unit), bytes(bytes), row_bytes(row_bytes) {}
    virtual ~RowDecoder() = default;

    // Columns `first` to `first + count - 1` of `count_rows` rows from `row` on. `first` and `count` are multiples of
    // the unit, but for the end of a row.
    virtual void decode(Isa isa, int64_t row, int64_t count_rows, int64_t first, int64_t count, float* to) const = 0;

    // What all weights of a row are to be multiplied by.
    virtual float factor(int64_t) const { return 1.0f; }

    // For one token, what `decode` and sums of its floats would give, if there is a shorter way to the same bits: for
    // each of `ROWS` rows `LANES` sums, of every 16th column each, from left to right. `x` ends with zeros to a multiple
    // of 16 columns.
    virtual bool lanes_of_one(Isa, int64_t, const float*, float*) const { return false; }

    const int64_t rows, columns, unit, real;
    const uint8_t* const bytes;
    const int64_t row_bytes;
};
using DecoderPtr = std::shared_ptr<const RowDecoder>;

// A decoder whose `one(row, first, count, to)`, which must be inlined into what calls it, is compiled for every level.
template <typename D>
class EveryLevel : public RowDecoder {
  public:
    using RowDecoder::RowDecoder;
    static constexpr bool NARROW = false;  // whether vectors of 512 bits would be loaded from two stores of 256
    void decode(Isa isa, int64_t row, int64_t count_rows, int64_t first, int64_t count, float* to) const final {
        const D& decoder = static_cast<const D&>(*this);
#ifdef TERSOR_X86_ROWS
        if (isa == Isa::avx512 && !D::NARROW) return decode_512(decoder, row, count_rows, first, count, to);
        if (isa != Isa::portable) return decode_256(decoder, row, count_rows, first, count, to);
#endif
        (void)isa;
        for (int64_t i = 0; i < count_rows; ++i) decoder.one(row + i, first, count, to + i * ROOM);
    }

  private:
#ifdef TERSOR_X86_ROWS
    TERSOR_ROWS_512 static void decode_512(const D& decoder, int64_t row, int64_t count_rows, int64_t first,
                                           int64_t count, float* to) {
        for (int64_t i = 0; i < count_rows; ++i) decoder.one(row + i, first, count, to + i * ROOM);
    }
    TERSOR_ROWS_256 static void decode_256(const D& decoder, int64_t row, int64_t count_rows, int64_t first,
                                           int64_t count, float* to) {
        for (int64_t i = 0; i < count_rows; ++i) decoder.one(row + i, first, count, to + i * ROOM);
    }
#endif
};

// The product of what `decoder` decodes. Inputs are not rounded; sums are of floats, and all products of this kind take
// the same of the same inputs. Throws std::invalid_argument for a unit with no stretch of at most 256 columns.
ProductPtr float_rows(DecoderPtr decoder);

// The decoder of a product of this kind; null for others.
DecoderPtr decoder_of(const Product& product);

// Of a little-endian stream, eight bytes from `at` on; zeros where it ends.
TERSOR_INLINE uint64_t word_at(const uint8_t* at, const uint8_t* end) {
    uint64_t word = 0;
    if (end - at >= 8) {
        std::memcpy(&word, at, 8);
    } else {
        for (int i = 0; at + i < end; ++i) word |= static_cast<uint64_t>(at[i]) << (8 * i);
    }
    return word;
}

}  // namespace tersor
