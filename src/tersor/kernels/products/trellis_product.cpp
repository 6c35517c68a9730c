// Products with trellis codes: how tiles are shared out, and what a weight must be. tersor/kernels/products_trellis.py
// says what is computed.
#include "trellis_product.h"

#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "bind.h"
#include "together.h"

namespace tersor::trellis {
namespace {

struct Stored {
    const uint8_t* codes;  // (tiles, groups, unit bytes * units, 4)
    int64_t tile, tiles, groups, units;
    std::vector<float> scale;  // (rows,)
    double unit;               // what the integers of the table are multiples of
};

// Rounded inputs, and both planes in one where loops take that.
struct TrellisReady final : Ready {
    TrellisReady(const float* x, int64_t tokens, int64_t columns, bool join, const Options& options)
        : planes(x, tokens, columns, options), joined(join ? tokens * planes.width : 0) {
        if (!join) return;
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t c = 0; c < columns; ++c)
                joined[t * planes.width + c] = static_cast<int16_t>(planes.at(t, c));
    }

    const Activations planes;
    std::vector<int16_t> joined;
};

class TrellisJob;

class TrellisProduct final : public Product {
  public:
    TrellisProduct(int64_t rows, int64_t columns, Stored stored, std::unique_ptr<const Code> code)
        : Product(rows, columns), stored_(std::move(stored)), code_(std::move(code)) {}

    void apply(const float* x, int64_t tokens, float* y, int64_t stride, const Options& options) const override {
        apply_in_steps(*this, x, tokens, {y, stride}, options);
    }
    bool in_steps() const override { return true; }
    bool takes_ready_of(const Product& other) const override {
        const auto* trellis = dynamic_cast<const TrellisProduct*>(&other);
        return trellis != nullptr && columns == trellis->columns && quick() == trellis->quick();
    }
    ReadyPtr ready(const float* x, int64_t tokens, const Options& options) const override {
        return std::make_shared<TrellisReady>(x, tokens, columns, joins(), options);
    }
    std::unique_ptr<Job> begin(ReadyPtr inputs, float* y, int64_t stride, const Options& options) const override;
    Beginning beginning(int64_t part, const Options& options) const override {
        const int64_t span = columns_of_part(options.threads), spans = (columns + span - 1) / span;
        return at(part / spans, part % spans * span);
    }
    bool read_row(int64_t row, float* to) const override {
        const Tile tile = tile_of(row / stored_.tile);
        const auto here = static_cast<int>(row % stored_.tile);
        const float scale = static_cast<float>(stored_.unit * double{stored_.scale[row]});
        for (int64_t c = 0; c < columns; ++c)
            to[c] = scale * value_at(*code_, column_of(tile, code_->bits, c), tile.rows, here);
        return true;
    }

  private:
    friend TrellisJob;

    int64_t rows_of(int64_t tile) const { return std::min(stored_.tile, rows - tile * stored_.tile); }
    Tile tile_of(int64_t number) const {
        const int64_t plane = 4 * stored_.units, step = unit_bytes(code_->bits) * plane, size = stored_.groups * step;
        return {stored_.codes + number * size, stored_.codes + stored_.tiles * size, step, plane,
                static_cast<int>(rows_of(number))};
    }
    Beginning at(int64_t tile, int64_t column) const {
        if (tile >= stored_.tiles) return {};
        const Tile there = tile_of(tile);
        return {there.codes + column / 4 * there.step, nullptr};
    }
    bool whole(int64_t tile_rows) const { return tile_rows % unit_rows(code_->bits) == 0; }

    Loop loop() const {
        const Isa level = isa();
        return level == Isa::avx512 ? avx512(code_->bits, code_->window)
               : level == Isa::avx2 ? avx2(code_->bits, code_->window)
                                    : nullptr;
    }

    // Whether there are loops with wide vectors for all of its tiles: these take both planes apart.
    bool quick() const {
        const bool all_whole = whole(rows_of(stored_.tiles - 1)) && (stored_.tiles == 1 || whole(stored_.tile));
        return all_whole && avx512(code_->bits, code_->window) != nullptr;
    }
    bool joins() const { return isa() != Isa::avx512 || !quick(); }

    // How many columns one part takes: all, or fewer where there are too few tiles for the threads.
    int64_t columns_of_part(int threads) const {
        constexpr int64_t LEAST = 1024;
        int64_t spans = 1;
        if (threads > 1 && stored_.tiles < 4 * threads) spans = (4 * threads + stored_.tiles - 1) / stored_.tiles;
        const int64_t span = std::max((columns + spans - 1) / spans, LEAST);
        return std::min<int64_t>((span + 127) / 128 * 128, SPAN);
    }

    const Stored stored_;
    const std::unique_ptr<const Code> code_;
};

// A part is a tile, or some columns of one: then the exact sums of all of them are added up at the end.
class TrellisJob final : public Job {
  public:
    TrellisJob(const TrellisProduct& product, ReadyPtr ready, float* y, int64_t stride, int64_t span)
        : Job(product.stored_.tiles * ((product.columns + span - 1) / span)),
          product_(product),
          ready_(std::move(ready)),
          loop_(product.loop()),
          y_(y),
          stride_(stride),
          span_(span),
          spans_((product.columns + span - 1) / span),
          totals_(spans_ > 1 ? spans_ * inputs().planes.tokens * product.rows : 0) {}

    void run(int64_t part) const override {
        const int64_t tile = part / spans_, s = part % spans_, height = product_.stored_.tile;
        const int64_t tokens = inputs().planes.tokens, tile_rows = product_.rows_of(tile);
        in_passes(tile, s * span_, [&](int64_t first, int count, const int64_t* sums, const int* places) {
            for (int t = 0; t < count; ++t) {
                if (spans_ == 1) {
                    for (int64_t row = 0; row < tile_rows; ++row)
                        finish(first + t, tile * height + row, sums[t * TILE + places[row]]);
                } else {
                    int64_t* to = totals_.data() + (s * tokens + first + t) * product_.rows + tile * height;
                    for (int64_t row = 0; row < tile_rows; ++row) to[row] = sums[t * TILE + places[row]];
                }
            }
        });
    }

    Beginning beginning(int64_t part) const override {
        return product_.at(part / spans_, part % spans_ * span_);
    }
    void end() const override {
        if (spans_ == 1) return;
        const int64_t tokens = inputs().planes.tokens, rows = product_.rows;
        for (int64_t t = 0; t < tokens; ++t) {
            for (int64_t row = 0; row < rows; ++row) {
                int64_t total = 0;
                for (int64_t s = 0; s < spans_; ++s) total += totals_[(s * tokens + t) * rows + row];
                finish(t, row, total);
            }
        }
    }

  private:
    const TrellisReady& inputs() const { return static_cast<const TrellisReady&>(*ready_); }

    // The sums of one tile with the columns from `first` on that make a part, for a few tokens at a time.
    template <typename F>
    void in_passes(int64_t number, int64_t first, const F& done) const {
        const Code& code = *product_.code_;
        const int64_t last = std::min(product_.columns, first + span_);
        const Tile tile = product_.tile_of(number);
        const bool fast = loop_ != nullptr && product_.whole(tile.rows);
        int places[TILE];
        for (int row = 0; row < tile.rows; ++row) places[row] = fast ? place_of(code.bits, row) : row;
        const TrellisReady& ready = inputs();
        for (int64_t token = 0; token < ready.planes.tokens; token += TOKENS) {
            alignas(64) int64_t sums[TOKENS * TILE];
            const int count = static_cast<int>(std::min<int64_t>(TOKENS, ready.planes.tokens - token));
            std::fill_n(sums, count * TILE, 0);
            const Inputs some{&ready.planes, ready.joined.empty() ? nullptr : ready.joined.data(), token, count};
            (fast ? loop_ : portable)(code, tile, first, last, some, sums);
            done(token, count, sums, places);
        }
    }

    void finish(int64_t token, int64_t row, int64_t total) const {
        const Stored& stored = product_.stored_;
        const double factor = double{inputs().planes.scale[token]} * stored.unit * double{stored.scale[row]};
        y_[token * stride_ + row] = static_cast<float>(static_cast<double>(total) * factor);
    }

    const TrellisProduct& product_;
    const ReadyPtr ready_;
    const Loop loop_;
    float* const y_;
    const int64_t stride_, span_, spans_;
    mutable std::vector<int64_t> totals_;  // (spans, tokens, rows); every part writes its own
};

std::unique_ptr<Job> TrellisProduct::begin(ReadyPtr inputs, float* y, int64_t stride, const Options& options) const {
    return std::make_unique<TrellisJob>(*this, std::move(inputs), y, stride, columns_of_part(options.threads));
}

ProductPtr make(In<uint8_t, 4> codes, In<float, 1> scale, int64_t tile, int64_t columns, int bits, int window,
                In<int32_t, 1> masks, In<int8_t, 1> integers, double unit) {
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
    const auto rows = static_cast<int64_t>(scale.shape(0));
    require(rows >= 1 && columns >= 1, "a weight has rows and columns");
    const int64_t tiles = (rows + tile - 1) / tile, groups = (columns + 3) / 4;
    const int64_t units = (tile + unit_rows(bits) - 1) / unit_rows(bits), width = unit_bytes(bits) * units;
    const auto size = [&](int i) { return static_cast<int64_t>(codes.shape(i)); };
    require(size(0) == tiles && size(1) == groups && size(2) == width && size(3) == 4,
            "codes of " + std::to_string(rows) + " rows and " + std::to_string(columns) + " columns are " +
                std::to_string(tiles) + " tiles of " + std::to_string(groups) + " groups of " + std::to_string(width) +
                " by 4 bytes, not " + std::to_string(size(0)) + " of " + std::to_string(size(1)) + " of " +
                std::to_string(size(2)) + " by " + std::to_string(size(3)));
    auto code = std::make_unique<const Code>(bits, window, masks.data(), index_bits, integers.data());
    Stored stored{codes.data(), tile, tiles, groups, units, {scale.data(), scale.data() + rows}, unit};
    return std::make_shared<TrellisProduct>(rows, columns, std::move(stored), std::move(code));
}

}  // namespace
}  // namespace tersor::trellis

namespace tersor {

void bind_trellis(nb::module_& module) {
    // The codes are used where they are: their array lives as long as the product.
    module.def("trellis", &trellis::make, nb::arg("codes"), nb::arg("scale"), nb::arg("tile"), nb::arg("columns"),
               nb::arg("bits"), nb::arg("window"), nb::arg("masks"), nb::arg("integers"), nb::arg("unit"),
               nb::keep_alive<0, 1>());
}

}  // namespace tersor
