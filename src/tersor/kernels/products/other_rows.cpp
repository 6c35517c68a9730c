// Rows that become floats in other ways: codes on grids of any blocks, kept floats, a few weights of each group of
// columns, signs of low-rank magnitudes, and pyramids.
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "bind.h"
#include "float_rows.h"

#ifdef TERSOR_X86_ROWS
#include <immintrin.h>
#endif

namespace tersor {
namespace {

std::string sizes(int64_t rows, int64_t columns) {
    return "(" + std::to_string(rows) + ", " + std::to_string(columns) + ")";
}

template <typename T>
void require_sizes(const In<T, 2>& array, int64_t rows, int64_t columns, const char* what) {
    require(static_cast<int64_t>(array.shape(0)) == rows && static_cast<int64_t>(array.shape(1)) == columns,
            std::string(what) + " must be " + sizes(rows, columns) + ", not " +
                sizes(static_cast<int64_t>(array.shape(0)), static_cast<int64_t>(array.shape(1))));
}

template <typename T>
std::vector<T> copied(const In<T, 2>& from) {
    return std::vector<T>(from.data(), from.data() + from.shape(0) * from.shape(1));
}

// A stretch of a row of codes of `bits` bits (1 to 8), and what is made of them: (code - zero) * scale. Scales and zeros
// are those of groups of `width` columns, from the first of the row on.
struct Codes {
    const uint8_t *row, *end;
    int bits;
    int64_t first, count, width;
    const float *scale, *zero;
};

void unpack_plainly(const Codes& codes, float* to) {
    const uint64_t mask = (uint64_t{1} << codes.bits) - 1;
    for (int64_t c = 0; c < codes.count; ++c) {
        const int64_t bit = (codes.first + c) * codes.bits, group = (codes.first + c) / codes.width;
        const uint64_t code = word_at(codes.row + bit / 8, codes.end) >> bit % 8 & mask;
        to[c] = (static_cast<float>(static_cast<int32_t>(code)) - codes.zero[group]) * codes.scale[group];
    }
}

#ifdef TERSOR_X86_ROWS
// Four codes in each half of a vector, moved to the right by as much as each lies to the left.
TERSOR_ROWS_256 void unpack_256(const Codes& codes, float* to) {
    const int bits = codes.bits;
    const __m256i mask = _mm256_set1_epi32((1 << bits) - 1);
    const __m256i shift = _mm256_setr_epi32(0, bits, 2 * bits, 3 * bits, 0, bits, 2 * bits, 3 * bits);
    int64_t group = codes.first / codes.width, left = codes.width - codes.first % codes.width;
    for (int64_t c = 0; c < codes.count; left = codes.width, ++group) {
        const int64_t last = std::min(c + left, codes.count);
        const __m256 zero = _mm256_set1_ps(codes.zero[group]), scale = _mm256_set1_ps(codes.scale[group]);
        int64_t bit = (codes.first + c) * bits;
        for (; c < last; c += 8, bit += 8 * bits) {
            const uint64_t word = word_at(codes.row + bit / 8, codes.end) >> bit % 8;
            const __m128i low = _mm_set1_epi32(static_cast<int32_t>(word));
            const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(low),
                                                         _mm_set1_epi32(static_cast<int32_t>(word >> 4 * bits)), 1);
            const __m256 eight = _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srlv_epi32(both, shift), mask));
            _mm256_storeu_ps(to + c, _mm256_mul_ps(_mm256_sub_ps(eight, zero), scale));
        }
        c = last;
    }
}
#endif

// Writes up to 7 more than there are.
void unpack(const Codes& codes, float* to) {
#ifdef TERSOR_X86_ROWS
    if (isa() != Isa::portable) return unpack_256(codes, to);
#endif
    unpack_plainly(codes, to);
}

void require_codes(const In<uint8_t, 2>& codes, int bits, int64_t columns) {
    require(1 <= bits && bits <= 8, "codes have 1 to 8 bits, not " + std::to_string(bits));
    require(columns > 0, "rows have no columns");
    require_sizes(codes, static_cast<int64_t>(codes.shape(0)), (columns * bits + 7) / 8, "codes");
}

// (code - zero) * scale, with both of a block of `tile` rows and `width` columns.
class Grid final : public EveryLevel<Grid> {
  public:
    Grid(In<uint8_t, 2> codes, int bits, int64_t columns, int64_t tile, int64_t width, In<float, 2> scale,
         In<float, 2> zero)
        : EveryLevel(static_cast<int64_t>(codes.shape(0)), columns, 1, codes.data(),
                     static_cast<int64_t>(codes.shape(1))),
          codes_(std::move(codes)),
          bits_(bits),
          tile_(tile),
          width_(width),
          scale_(copied(scale)),
          zero_(copied(zero)) {}

    TERSOR_INLINE void one(int64_t row, int64_t first, int64_t count, float* to) const {
        const int64_t block = row / tile_ * (columns / width_);
        unpack({bytes + row * row_bytes, bytes + rows * row_bytes, bits_, first, count, width_, scale_.data() + block,
                zero_.data() + block},
               to);
    }

  private:
    In<uint8_t, 2> codes_;
    int bits_;
    int64_t tile_, width_;
    std::vector<float> scale_, zero_;  // (blocks of rows, blocks of columns)
};

ProductPtr grid(In<uint8_t, 2> codes, int bits, int64_t columns, int64_t tile, int64_t width, In<float, 2> scale,
                In<float, 2> zero) {
    require_codes(codes, bits, columns);
    require(tile > 0 && width > 0 && columns % width == 0,
            "blocks of " + std::to_string(width) + " columns do not divide " + std::to_string(columns));
    const int64_t tiles = (static_cast<int64_t>(codes.shape(0)) + tile - 1) / tile;
    require_sizes(scale, tiles, columns / width, "scales");
    require_sizes(zero, tiles, columns / width, "zeros");
    return float_rows(std::make_shared<Grid>(std::move(codes), bits, columns, tile, width, scale, zero));
}

// Floats of 16 bits, to be worked on together with others; by themselves they have a product of their own.
template <bool HALF>
class Kept final : public EveryLevel<Kept<HALF>> {
  public:
    explicit Kept(In<uint16_t, 2> weight)
        : EveryLevel<Kept>(static_cast<int64_t>(weight.shape(0)), static_cast<int64_t>(weight.shape(1)), 1,
                           reinterpret_cast<const uint8_t*>(weight.data()), 2 * static_cast<int64_t>(weight.shape(1))),
          weight_(std::move(weight)) {}

    TERSOR_INLINE void one(int64_t row, int64_t first, int64_t count, float* __restrict to) const {
        const uint16_t* from = weight_.data() + row * this->columns + first;
        for (int64_t i = 0; i < count; ++i)
            to[i] = HALF ? float_of_half(from[i]) : float_of_bits(static_cast<uint32_t>(from[i]) << 16);
    }

  private:
    In<uint16_t, 2> weight_;
};

ProductPtr kept(In<uint16_t, 2> weight, bool half) {
    require(weight.shape(1) > 0, "rows have no columns");
    if (half) return float_rows(std::make_shared<Kept<true>>(std::move(weight)));
    return float_rows(std::make_shared<Kept<false>>(std::move(weight)));
}

// Of every `group` columns the `kept` weights of an inner decoder, at the places that a pattern says.
class Spread final : public RowDecoder {
  public:
    // subsets (2^bits, kept): columns of a group, ascending
    Spread(In<uint8_t, 2> patterns, const In<uint8_t, 2>& subsets, int64_t group, int bits, DecoderPtr inner)
        : RowDecoder(inner->rows, inner->columns / static_cast<int64_t>(subsets.shape(1)) * group,
                     group * (inner->unit / std::gcd(inner->unit, static_cast<int64_t>(subsets.shape(1)))), inner->bytes,
                     inner->row_bytes),
          patterns_(std::move(patterns)),
          subsets_(copied(subsets)),
          kept_(static_cast<int64_t>(subsets.shape(1))),
          group_(group),
          bits_(bits),
          inner_(std::move(inner)) {
        for (size_t p = 0; p < subsets.shape(0); ++p) {
            uint16_t mask = 0;
            for (int64_t k = 0; k < kept_; ++k) mask |= uint16_t{1} << subsets_[p * kept_ + k];
            masks_.push_back(mask);
        }
        const int64_t each = 16 / group_, all = each * bits_;
        if (16 % group_ > 0 || all > 12) return;
        sixteen_.resize(size_t{1} << all);
        for (size_t word = 0; word < sixteen_.size(); ++word)
            for (int64_t i = 0; i < each; ++i)
                sixteen_[word] |= masks_[word >> (i * bits_) & (masks_.size() - 1)] << (i * group_);
    }

    float factor(int64_t row) const override { return inner_->factor(row); }

    void decode(Isa isa, int64_t row, int64_t count_rows, int64_t first, int64_t count, float* to) const override {
        alignas(64) float values[ROWS * ROOM];
        inner_->decode(isa, row, count_rows, first / group_ * kept_, count / group_ * kept_, values);
        for (int64_t i = 0; i < count_rows; ++i) {
#ifdef TERSOR_X86_ROWS
            if (isa == Isa::avx512 && 16 % group_ == 0 && count % 16 == 0) {
                by_masks(row + i, first, count, values + i * ROOM, to + i * ROOM);
                continue;
            }
#endif
            by_places(row + i, first, count, values + i * ROOM, to + i * ROOM);
        }
    }

  private:
    const uint8_t* stream(int64_t row) const { return patterns_.data() + row * patterns_.shape(1); }
    const uint8_t* end() const { return stream(static_cast<int64_t>(patterns_.shape(0))); }

    void by_places(int64_t row, int64_t first, int64_t count, const float* values, float* to) const {
        const int64_t kept = kept_, group = group_, bits = bits_;
        const uint8_t *from = stream(row), *last = end(), *subsets = subsets_.data();
        std::fill_n(to, count, 0.0f);
        int64_t bit = first / group * bits;
        for (int64_t c = 0; c < count; c += group, bit += bits, values += kept) {
            const uint64_t pattern = word_at(from + bit / 8, last) >> bit % 8 & ((1u << bits) - 1);
            for (int64_t k = 0; k < kept; ++k) to[c + subsets[pattern * kept + k]] = values[k];
        }
    }

#ifdef TERSOR_X86_ROWS
    TERSOR_ROWS_512 void by_masks(int64_t row, int64_t first, int64_t count, const float* values, float* to) const {
        const int64_t group = group_, each = 16 / group, step = each * bits_, more = each * kept_;
        const uint8_t *from = stream(row), *last = end();
        const uint16_t* masks = sixteen_.empty() ? masks_.data() : sixteen_.data();
        const int64_t at_once = sixteen_.empty() ? 1 : each, bits = bits_ * at_once;
        const bool few = more <= 8;
        const uint64_t low = (uint64_t{1} << bits) - 1;
        int64_t bit = first / group * bits_;
        for (int64_t c = 0; c < count; c += 16, bit += step, values += more) {
            uint64_t word = word_at(from + bit / 8, last) >> bit % 8;  // at most 8 patterns of a bit, 4 of 3, 2 of 7
            uint32_t mask = 0;
            for (int64_t i = 0; i < each; i += at_once, word >>= bits)
                mask |= uint32_t{masks[word & low]} << (i * group);
            _mm512_storeu_ps(to + c, _mm512_maskz_expand_ps(
                                           static_cast<__mmask16>(mask),
                                           few ? _mm512_castps256_ps512(_mm256_loadu_ps(values)) : _mm512_loadu_ps(values)));
        }
    }
#endif

    In<uint8_t, 2> patterns_;
    std::vector<uint8_t> subsets_;
    std::vector<uint16_t> masks_, sixteen_;  // by pattern; by all patterns of 16 columns, where they have up to 12 bits
    int64_t kept_, group_;
    int bits_;
    DecoderPtr inner_;
};

ProductPtr spread(In<uint8_t, 2> patterns, In<uint8_t, 2> subsets, int64_t group, ProductPtr inner) {
    const DecoderPtr decoder = inner == nullptr ? nullptr : decoder_of(*inner);
    require(decoder != nullptr && decoder->unit == decoder->real,
            "weights inside are not decoded to floats row by row");
    const int64_t kept = static_cast<int64_t>(subsets.shape(1));
    int bits = 0;
    while (bits < 14 && (size_t{1} << bits) < subsets.shape(0)) ++bits;
    require((size_t{1} << bits) == subsets.shape(0), "the number of patterns is a power of two up to 16384");
    require(0 < kept && kept < group && group <= 16, "of at most 16 columns, fewer are kept, and one at least");
    require(decoder->columns % kept == 0, "the kept weights of a row fill no groups");
    for (size_t i = 0; i < subsets.shape(0) * subsets.shape(1); ++i)
        require(subsets.data()[i] < group, "a pattern names a column outside of its group");
    require_sizes(patterns, decoder->rows, (decoder->columns / kept * bits + 7) / 8, "patterns");
    return float_rows(std::make_shared<Spread>(std::move(patterns), subsets, group, bits, decoder));
}

// Sums of +-|left right|, with the signs bits and the factors float16, kept as float32.
class Magnitudes final : public EveryLevel<Magnitudes> {
  public:
    struct Stage {
        In<uint8_t, 2> signs;
        std::vector<float> left, right;  // (rows, rank), (rank, padded columns)
    };
    static constexpr int64_t AT_ONCE = 32;

    Magnitudes(std::vector<Stage> stages, int64_t rows, int64_t columns, int64_t rank)
        : EveryLevel(rows, columns, AT_ONCE, stages[0].signs.data(), (columns + 7) / 8),
          stages_(std::move(stages)),
          rank_(rank) {}

    static int64_t padded(int64_t columns) { return (columns + AT_ONCE - 1) / AT_ONCE * AT_ONCE; }

    TERSOR_INLINE void one(int64_t row, int64_t first, int64_t count, float* __restrict to) const {
        const int64_t width = padded(columns), rank = rank_;
        for (size_t s = 0; s < stages_.size(); ++s) {
            const Stage& stage = stages_[s];
            const uint8_t *signs = stage.signs.data() + row * row_bytes, *end = stage.signs.data() + rows * row_bytes;
            const float* left = stage.left.data() + row * rank_;
            for (int64_t c = 0; c < count; c += AT_ONCE) {
                const float* right = stage.right.data() + first + c;
                float size[AT_ONCE];
                for (int i = 0; i < AT_ONCE; ++i) size[i] = left[0] * right[i];
                int64_t k = 1;
                for (; k + 3 <= rank; k += 3) {
                    const float *a = right + k * width, *b = a + width, *d = b + width;
                    const float u = left[k], v = left[k + 1], w = left[k + 2];
                    for (int i = 0; i < AT_ONCE; ++i) size[i] = ((size[i] + u * a[i]) + v * b[i]) + w * d[i];
                }
                for (; k < rank; ++k) {
                    const float* a = right + k * width;
                    for (int i = 0; i < AT_ONCE; ++i) size[i] += left[k] * a[i];
                }
                const uint32_t plus = static_cast<uint32_t>(word_at(signs + (first + c) / 8, end));
                uint32_t bits[AT_ONCE];
                std::memcpy(bits, size, sizeof size);
                for (int i = 0; i < AT_ONCE; ++i) bits[i] = (bits[i] & 0x7fffffffu) | (~plus >> i & 1u) << 31;
                std::memcpy(size, bits, sizeof size);
                for (int i = 0; i < AT_ONCE; ++i) to[c + i] = s == 0 ? size[i] : to[c + i] + size[i];
            }
        }
    }

  private:
    std::vector<Stage> stages_;
    int64_t rank_;
};

ProductPtr magnitudes(std::vector<In<uint8_t, 2>> signs, std::vector<In<float, 2>> left,
                      std::vector<In<float, 2>> right) {
    require(!signs.empty() && signs.size() == left.size() && signs.size() == right.size(),
            "each stage has signs, a left and a right factor");
    const int64_t rows = static_cast<int64_t>(left[0].shape(0)), rank = static_cast<int64_t>(left[0].shape(1)),
                  columns = static_cast<int64_t>(right[0].shape(1)), width = Magnitudes::padded(columns);
    require(rank > 0 && columns > 0, "factors have no entries");
    std::vector<Magnitudes::Stage> stages;
    for (size_t s = 0; s < signs.size(); ++s) {
        require_sizes(signs[s], rows, (columns + 7) / 8, "signs");
        require_sizes(left[s], rows, rank, "left factors");
        require_sizes(right[s], rank, columns, "right factors");
        Magnitudes::Stage stage{signs[s], copied(left[s]), std::vector<float>(rank * width)};
        for (int64_t k = 0; k < rank; ++k)
            std::copy_n(right[s].data() + k * columns, columns, stage.right.data() + k * width);
        stages.push_back(std::move(stage));
    }
    return float_rows(std::make_shared<Magnitudes>(std::move(stages), rows, columns, rank));
}

// Vectors of `dim` integers, code - middle, made as long as a gain says.
class Pyramid final : public EveryLevel<Pyramid> {
  public:
    static constexpr bool NARROW = true;

    Pyramid(In<uint8_t, 2> codes, int bits, In<uint8_t, 2> gains, In<uint16_t, 1> scale, int64_t dim, float middle)
        : EveryLevel(static_cast<int64_t>(codes.shape(0)), dim * static_cast<int64_t>(gains.shape(1)), dim,
                     codes.data(), static_cast<int64_t>(codes.shape(1))),
          codes_(std::move(codes)),
          gains_(std::move(gains)),
          scale_(std::move(scale)),
          bits_(bits),
          middle_(middle) {}

    float factor(int64_t row) const override { return float_of_half(scale_.data()[row]); }

    TERSOR_INLINE void one(int64_t row, int64_t first, int64_t count, float* to) const {
        const float one = 1.0f;
        unpack({bytes + row * row_bytes, bytes + rows * row_bytes, bits_, first, count, columns, &one, &middle_}, to);
        const uint8_t* gain = gains_.data() + row * gains_.shape(1) + first / unit;
        switch (unit) {
            case 8: return vectors<8>(gain, 8, count, to);
            case 12: return vectors<12>(gain, 12, count, to);
            case 16: return vectors<16>(gain, 16, count, to);
            case 24: return vectors<24>(gain, 24, count, to);
            case 28: return vectors<28>(gain, 28, count, to);
            default: return vectors<0>(gain, unit, count, to);
        }
    }

  private:
    template <int DIM>
    TERSOR_INLINE void vectors(const uint8_t* gain, int64_t unit, int64_t count, float* to) const {
        const int64_t dim = DIM > 0 ? DIM : unit;
        for (int64_t c = 0; c < count; c += dim, ++gain) {
            float* vector = to + c;
            // Whole numbers, so that sums are the same in any order.
            int32_t square = 0;
            for (int64_t i = 0; i < dim; ++i) {
                const int32_t whole = static_cast<int32_t>(vector[i]);
                square += whole * whole;
            }
            const float stretch = static_cast<float>(*gain) / std::sqrt(static_cast<float>(square));
            for (int64_t i = 0; i < dim; ++i) vector[i] *= stretch;
        }
    }

    In<uint8_t, 2> codes_, gains_;
    In<uint16_t, 1> scale_;
    int bits_;
    float middle_;
};

ProductPtr pyramid(In<uint8_t, 2> codes, int bits, In<uint8_t, 2> gains, In<uint16_t, 1> scale, int64_t dim,
                   float middle) {
    require(0 < dim && dim <= STRETCH, "vectors have 1 to 256 columns, not " + std::to_string(dim));
    const int64_t rows = static_cast<int64_t>(codes.shape(0)), vectors = static_cast<int64_t>(gains.shape(1));
    require_codes(codes, bits, dim * vectors);
    require_sizes(gains, rows, vectors, "gains");
    require(static_cast<int64_t>(scale.shape(0)) == rows, "there is not a scale for every row");
    return float_rows(std::make_shared<Pyramid>(std::move(codes), bits, std::move(gains), std::move(scale), dim, middle));
}

}  // namespace

void bind_other_rows(nb::module_& module) {
    module.def("grid", &grid, nb::arg("codes"), nb::arg("bits"), nb::arg("columns"), nb::arg("tile"), nb::arg("width"),
               nb::arg("scale"), nb::arg("zero"));
    module.def("kept", &kept, nb::arg("weight"), nb::arg("half"));
    module.def("spread", &spread, nb::arg("patterns"), nb::arg("subsets"), nb::arg("group"), nb::arg("inner"));
    module.def("magnitudes", &magnitudes, nb::arg("signs"), nb::arg("left"), nb::arg("right"));
    module.def("pyramid", &pyramid, nb::arg("codes"), nb::arg("bits"), nb::arg("gains"), nb::arg("scale"), nb::arg("dim"),
               nb::arg("middle"));
}

}  // namespace tersor
