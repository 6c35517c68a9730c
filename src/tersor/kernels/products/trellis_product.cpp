// Products with trellis codes: how tiles are shared out, and what a weight must be. tersor/kernels/products_trellis.py
// says what is computed.
#include "trellis_product.h"

#include <algorithm>
#include <memory>
#include <string>

#include "bind.h"
#include "pool.h"

namespace tersor::trellis {
namespace {

struct Stored {
    const uint8_t* codes;  // (tiles, columns, stride)
    int64_t tile, tiles, stride;
    std::vector<uint8_t> laid_out;  // the same, interleaved; may be empty
    std::vector<float> scale;       // (rows,)
    double unit;                    // what the integers of the table are multiples of
};

// Bytes of a tile of `rows` rows, interleaved.
int64_t laid_out_size(int64_t columns, int64_t rows, int bits) {
    const auto units = static_cast<int>(rows / unit_rows(bits));
    return (columns + 3) / 4 * unit_bytes(bits) * plane_of(units);
}

// All tiles of whole units, one after the other; what is read with the last one's end comes after it.
std::vector<uint8_t> all_laid_out(const Stored& stored, int64_t rows, int64_t columns, int bits) {
    const int64_t size = laid_out_size(columns, stored.tile, bits);
    std::vector<uint8_t> result(stored.tiles * size + 64);
    for (int64_t tile = 0; tile < stored.tiles; ++tile) {
        const int64_t units = std::min(stored.tile, rows - tile * stored.tile) / unit_rows(bits);
        lay_out(stored.codes + tile * columns * stored.stride, stored.stride, columns, unit_bytes(bits),
                static_cast<int>(units), result.data() + tile * size);
    }
    return result;
}

class TrellisProduct final : public Product {
  public:
    TrellisProduct(int64_t rows, int64_t columns, Stored stored, std::unique_ptr<const Code> code)
        : Product(rows, columns), stored_(std::move(stored)), code_(std::move(code)) {}

    void apply(const float* x, int64_t tokens, float* y, int64_t stride, const Options& options) const override {
        const Activations planes(x, tokens, columns, options);
        const Isa level = isa();
        Loop loop = level == Isa::avx512 ? avx512(code_->bits, code_->window)
                    : level == Isa::avx2 ? avx2(code_->bits, code_->window)
                                         : nullptr;
        std::vector<int16_t> joined;
        const bool all_whole = whole(rows_of(stored_.tiles - 1)) && (stored_.tiles == 1 || whole(stored_.tile));
        if (level != Isa::avx512 || loop == nullptr || !all_whole) {
            joined.resize(tokens * planes.width);
            for (int64_t t = 0; t < tokens; ++t)
                for (int64_t c = 0; c < columns; ++c)
                    joined[t * planes.width + c] = static_cast<int16_t>(planes.at(t, c));
        }
        const Job job{planes, joined.empty() ? nullptr : joined.data(), loop, y, stride};
        const int64_t span = columns_of_part(options.threads);
        const int64_t spans = (columns + span - 1) / span;
        if (spans == 1) {
            parallel(stored_.tiles, options.threads, [&](int64_t tile) {
                in_passes(job, tile, 0, columns, [&](int64_t first, int count, const int64_t* sums, const int* places) {
                    for (int t = 0; t < count; ++t)
                        for (int64_t row = 0; row < rows_of(tile); ++row)
                            finish(job, first + t, tile * stored_.tile + row, sums[t * TILE + places[row]]);
                });
            });
            return;
        }
        // Few tiles: their columns are shared out too, and the exact sums added up.
        std::vector<int64_t> totals(spans * tokens * rows);
        parallel(stored_.tiles * spans, options.threads, [&](int64_t part) {
            const int64_t tile = part / spans, s = part % spans;
            in_passes(job, tile, s * span, std::min(columns, (s + 1) * span),
                      [&](int64_t first, int count, const int64_t* sums, const int* places) {
                          for (int t = 0; t < count; ++t) {
                              int64_t* to = totals.data() + (s * tokens + first + t) * rows + tile * stored_.tile;
                              for (int64_t row = 0; row < rows_of(tile); ++row) to[row] = sums[t * TILE + places[row]];
                          }
                      });
        });
        for (int64_t t = 0; t < tokens; ++t) {
            for (int64_t row = 0; row < rows; ++row) {
                int64_t total = 0;
                for (int64_t s = 0; s < spans; ++s) total += totals[(s * tokens + t) * rows + row];
                finish(job, t, row, total);
            }
        }
    }

  private:
    struct Job {
        const Activations& planes;
        const int16_t* joined;
        Loop loop;
        float* y;
        int64_t stride;
    };

    int64_t rows_of(int64_t tile) const { return std::min(stored_.tile, rows - tile * stored_.tile); }
    bool whole(int64_t tile_rows) const { return tile_rows % unit_rows(code_->bits) == 0; }

    // How many columns one part takes: all, or fewer where there are too few tiles for the threads.
    int64_t columns_of_part(int threads) const {
        constexpr int64_t LEAST = 1024;
        int64_t spans = 1;
        if (threads > 1 && stored_.tiles < 4 * threads) spans = (4 * threads + stored_.tiles - 1) / stored_.tiles;
        const int64_t span = std::max((columns + spans - 1) / spans, LEAST);
        return std::min<int64_t>((span + 127) / 128 * 128, SPAN);
    }

    // The sums of one tile with columns [first, last), for a few tokens at a time.
    template <typename F>
    void in_passes(const Job& job, int64_t number, int64_t first, int64_t last, const F& done) const {
        const int64_t size = columns * stored_.stride;
        const int64_t begin = number * laid_out_size(columns, stored_.tile, code_->bits);
        const Tile tile{stored_.codes + number * size, stored_.codes + stored_.tiles * size, stored_.stride,
                        static_cast<int>(rows_of(number)),
                        stored_.laid_out.empty() ? nullptr : stored_.laid_out.data() + begin};
        const bool fast = job.loop != nullptr && whole(tile.rows);
        int places[TILE];
        for (int row = 0; row < tile.rows; ++row) places[row] = fast ? place_of(code_->bits, row) : row;
        for (int64_t token = 0; token < job.planes.tokens; token += TOKENS) {
            alignas(64) int64_t sums[TOKENS * TILE];
            const int count = static_cast<int>(std::min<int64_t>(TOKENS, job.planes.tokens - token));
            std::fill_n(sums, count * TILE, 0);
            const Inputs inputs{&job.planes, job.joined, token, count};
            (fast ? job.loop : portable)(*code_, tile, first, last, inputs, sums);
            done(token, count, sums, places);
        }
    }

    void finish(const Job& job, int64_t token, int64_t row, int64_t total) const {
        const double factor = double{job.planes.scale[token]} * stored_.unit * double{stored_.scale[row]};
        job.y[token * job.stride + row] = static_cast<float>(static_cast<double>(total) * factor);
    }

    const Stored stored_;
    const std::unique_ptr<const Code> code_;
};

ProductPtr make(In<uint8_t, 3> codes, In<float, 1> scale, int64_t tile, int bits, int window, In<int32_t, 1> masks,
                In<int8_t, 1> integers, double unit, bool laid_out) {
    require(bits >= 1 && bits <= 4, "trellises have 1 to 4 bits, not " + std::to_string(bits));
    require(window >= 8 && window <= 16, "windows have 8 to 16 bits, not " + std::to_string(window));
    const auto index_bits = static_cast<int>(masks.shape(0));
    const int most = bits < 3 ? 6 : bits == 3 ? 7 : 8;
    require(index_bits >= 1 && index_bits <= most && integers.shape(0) == size_t{1} << index_bits,
            "a trellis of " + std::to_string(bits) + " bits has at most " + std::to_string(1 << most) +
                " values, one for each sum of its masks");
    for (int i = 0; i < index_bits; ++i)
        require(masks.data()[i] >= 0 && masks.data()[i] < 1 << window, "a mask goes beyond the window");
    require(tile >= 1 && tile <= TILE, "tiles have 1 to 256 rows, not " + std::to_string(tile));
    const auto rows = static_cast<int64_t>(scale.shape(0)), columns = static_cast<int64_t>(codes.shape(1));
    const int64_t tiles = (rows + tile - 1) / tile, stride = (tile * bits + 7) / 8;
    require(rows >= 1 && columns >= 1, "a weight has rows and columns");
    require(static_cast<int64_t>(codes.shape(0)) == tiles && static_cast<int64_t>(codes.shape(2)) == stride,
            "codes of " + std::to_string(rows) + " rows are " + std::to_string(tiles) + " tiles of " +
                std::to_string(stride) + " bytes a column, not " + std::to_string(codes.shape(0)) + " of " +
                std::to_string(codes.shape(2)));
    auto code = std::make_unique<const Code>(bits, window, masks.data(), index_bits, integers.data());
    Stored stored{codes.data(), tile, tiles, stride, {}, {scale.data(), scale.data() + rows}, unit};
    if (laid_out && isa() == Isa::avx512 && avx512(bits, window) != nullptr)
        stored.laid_out = all_laid_out(stored, rows, columns, bits);
    return std::make_shared<TrellisProduct>(rows, columns, std::move(stored), std::move(code));
}

}  // namespace
}  // namespace tersor::trellis

namespace tersor {

void bind_trellis(nb::module_& module) {
    // The codes are used where they are: their array lives as long as the product.
    module.def("trellis", &trellis::make, nb::arg("codes"), nb::arg("scale"), nb::arg("tile"), nb::arg("bits"),
               nb::arg("window"), nb::arg("masks"), nb::arg("integers"), nb::arg("unit"), nb::arg("laid_out"),
               nb::keep_alive<0, 1>());
}

}  // namespace tersor
