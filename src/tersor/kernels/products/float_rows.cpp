// Sums are of floats, in one order: 16 lanes, each of every 16th column from left to right, added up at the end. So an
// output is the same bits whatever tokens and rows are worked on with it.
#include "float_rows.h"

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "together.h"

#ifdef TERSOR_X86_ROWS
#include <immintrin.h>
#endif

namespace tersor {
namespace {

constexpr int64_t TOKENS = 32;  // that a decoded stretch is multiplied with before the next one is decoded

// Adds to lanes (tokens, ROWS, LANES) the products of `count` columns, a multiple of 16, of rows in `weights` and
// `tokens` inputs, `stride` apart.
using Dots = void (*)(const float* weights, const float* x, int64_t stride, int64_t tokens, int64_t count, float* lanes);

void dots_portable(const float* weights, const float* x, int64_t stride, int64_t tokens, int64_t count, float* lanes) {
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t r = 0; r < ROWS; ++r, lanes += LANES) {
            const float *w = weights + r * ROOM, *in = x + t * stride;
            for (int64_t c = 0; c < count; c += LANES)
                for (int64_t i = 0; i < LANES; ++i) lanes[i] += w[c + i] * in[c + i];
        }
    }
}

#ifdef TERSOR_X86_ROWS
template <int T>
TERSOR_ROWS_512 void some_512(const float* weights, const float* x, int64_t stride, int64_t count, float* lanes) {
    __m512 sum[T][ROWS];
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < ROWS; ++r) sum[t][r] = _mm512_loadu_ps(lanes + (t * ROWS + r) * LANES);
    for (int64_t c = 0; c < count; c += LANES) {
        __m512 in[T];
        for (int t = 0; t < T; ++t) in[t] = _mm512_loadu_ps(x + t * stride + c);
        for (int r = 0; r < ROWS; ++r) {
            const __m512 w = _mm512_loadu_ps(weights + r * ROOM + c);
            for (int t = 0; t < T; ++t) sum[t][r] = _mm512_fmadd_ps(w, in[t], sum[t][r]);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < ROWS; ++r) _mm512_storeu_ps(lanes + (t * ROWS + r) * LANES, sum[t][r]);
}

TERSOR_ROWS_512 void dots_512(const float* weights, const float* x, int64_t stride, int64_t tokens, int64_t count,
                              float* lanes) {
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) some_512<4>(weights, x + t * stride, stride, count, lanes + t * ROWS * LANES);
    for (; t < tokens; ++t) some_512<1>(weights, x + t * stride, stride, count, lanes + t * ROWS * LANES);
}

TERSOR_ROWS_256 void dots_256(const float* weights, const float* x, int64_t stride, int64_t tokens, int64_t count,
                              float* lanes) {
    for (int64_t t = 0; t < tokens; ++t, lanes += ROWS * LANES) {
        __m256 low[ROWS], high[ROWS];
        for (int r = 0; r < ROWS; ++r) {
            low[r] = _mm256_loadu_ps(lanes + r * LANES);
            high[r] = _mm256_loadu_ps(lanes + r * LANES + 8);
        }
        for (int64_t c = 0; c < count; c += LANES) {
            const __m256 in = _mm256_loadu_ps(x + t * stride + c), more = _mm256_loadu_ps(x + t * stride + c + 8);
            for (int r = 0; r < ROWS; ++r) {
                low[r] = _mm256_fmadd_ps(_mm256_loadu_ps(weights + r * ROOM + c), in, low[r]);
                high[r] = _mm256_fmadd_ps(_mm256_loadu_ps(weights + r * ROOM + c + 8), more, high[r]);
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            _mm256_storeu_ps(lanes + r * LANES, low[r]);
            _mm256_storeu_ps(lanes + r * LANES + 8, high[r]);
        }
    }
}
#endif

Dots dots_for(Isa isa) {
#ifdef TERSOR_X86_ROWS
    if (isa == Isa::avx512) return dots_512;
    if (isa == Isa::avx2) return dots_256;
#endif
    (void)isa;
    return dots_portable;
}

float sum_of(const float* lanes) {
    float half[8], quarter[4];
    for (int i = 0; i < 8; ++i) half[i] = lanes[i] + lanes[i + 8];
    for (int i = 0; i < 4; ++i) quarter[i] = half[i] + half[i + 4];
    return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

// Inputs with zeros after each `real` columns, to `unit`, and after the last column, to a multiple of 16; where there are
// none to add, as they are.
struct PaddedInputs final : Ready {
    PaddedInputs(const float* from, int64_t tokens, const RowDecoder& decoder)
        : tokens(tokens), stride((decoder.columns + LANES - 1) / LANES * LANES), x(from) {
        const int64_t unit = decoder.unit, real = decoder.real, count = decoder.columns / unit * real;
        if (unit == real && stride == decoder.columns) return;
        padded.resize(tokens * stride);
        for (int64_t t = 0; t < tokens; ++t) {
            const float* token = from + t * (unit == real ? decoder.columns : count);
            float* to = padded.data() + t * stride;
            if (unit == real) {
                std::copy_n(token, decoder.columns, to);
                continue;
            }
            for (int64_t c = 0; c < count; c += real, to += unit)
                for (int64_t i = 0; i < real; ++i) to[i] = token[c + i];
        }
        x = padded.data();
    }

    const int64_t tokens, stride;
    std::vector<float> padded;
    const float* x;
};

class FloatRows final : public Product {
  public:
    explicit FloatRows(DecoderPtr decoder)
        : Product(decoder->rows, decoder->columns / decoder->unit * decoder->real + decoder->columns % decoder->unit),
          decoder_(std::move(decoder)) {
        const int64_t least = std::lcm(decoder_->unit, LANES);
        require(least <= STRETCH, "columns of " + std::to_string(decoder_->unit) + " at a time are decoded in stretches of " +
                                      std::to_string(least) + ", and " + std::to_string(STRETCH) + " are the most");
        stretch_ = STRETCH / least * least;
    }

    void apply(const float* x, int64_t tokens, float* y, int64_t stride, const Options& options) const override {
        apply_in_steps(*this, x, tokens, {y, stride}, options);
    }
    bool in_steps() const override { return true; }
    bool takes_ready_of(const Product& other) const override {
        const auto* rows = dynamic_cast<const FloatRows*>(&other);
        if (rows == nullptr) return false;
        const RowDecoder &own = *decoder_, &its = *rows->decoder_;
        return (own.unit == own.real && its.unit == its.real) || (own.unit == its.unit && own.real == its.real);
    }
    ReadyPtr ready(const float* x, int64_t tokens, const Options&) const override {
        return std::make_shared<PaddedInputs>(x, tokens, *decoder_);
    }
    std::unique_ptr<Job> begin(ReadyPtr inputs, float* y, int64_t stride, const Options&) const override {
        const int64_t each = std::clamp<int64_t>((1 << 17) / columns / ROWS * ROWS, 2 * ROWS, 16 * ROWS);
        return job_over_rows(rows, each, [this, inputs = std::move(inputs), y, stride](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; row += ROWS)
                multiply(row, std::min(ROWS, last - row), static_cast<const PaddedInputs&>(*inputs), y, stride);
        });
    }
    bool read_row(int64_t row, float* to) const override {
        const int64_t unit = decoder_->unit, real = decoder_->real;
        alignas(64) float weights[ROOM];
        for (int64_t first = 0; first < decoder_->columns; first += stretch_) {
            const int64_t wide = std::min(stretch_, decoder_->columns - first);
            decoder_->decode(isa(), row, 1, first, wide, weights);
            for (int64_t c = 0; c < wide; ++c)
                if (unit == real || c % unit < real) *to++ = weights[c] * decoder_->factor(row);
        }
        return true;
    }

    const DecoderPtr& decoder() const { return decoder_; }

  private:
    void multiply(int64_t row, int64_t count, const PaddedInputs& inputs, float* y, int64_t stride) const {
        const Isa level = isa();
        const Dots dots = dots_for(level);
        const int64_t columns = decoder_->columns;
        alignas(64) float weights[ROWS * ROOM];
        alignas(64) float lanes[TOKENS * ROWS * LANES];
        if (count < ROWS) std::fill_n(weights, ROWS * ROOM, 0.0f);  // what is made of rows that are not there is dropped
        if (inputs.tokens == 1 && count == ROWS && decoder_->lanes_of_one(level, row, inputs.x, lanes))
            return give(row, count, 1, lanes, y, stride);
        for (int64_t t = 0; t < inputs.tokens; t += TOKENS) {
            const int64_t tokens = std::min(TOKENS, inputs.tokens - t);
            std::fill_n(lanes, tokens * ROWS * LANES, 0.0f);
            for (int64_t first = 0; first < columns; first += stretch_) {
                const int64_t wide = std::min(stretch_, columns - first), padded = (wide + LANES - 1) / LANES * LANES;
                if (t == 0) fetch(row + count, first, wide);
                decoder_->decode(level, row, count, first, wide, weights);
                for (int64_t r = 0; r < ROWS && wide < padded; ++r)
                    std::fill_n(weights + r * ROOM + wide, padded - wide, 0.0f);
                dots(weights, inputs.x + t * inputs.stride + first, inputs.stride, tokens, padded, lanes);
            }
            give(row, count, tokens, lanes, y + t * stride, stride);
        }
    }

    void give(int64_t row, int64_t count, int64_t tokens, const float* lanes, float* y, int64_t stride) const {
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t r = 0; r < count; ++r)
                y[t * stride + row + r] = decoder_->factor(row + r) * sum_of(lanes + (t * ROWS + r) * LANES);
    }

    // The same stretch of the rows that come next.
    void fetch(int64_t row, int64_t first, int64_t count) const {
#if defined(__GNUC__)
        const int64_t width = decoder_->columns, from = first * decoder_->row_bytes / width;
        const int64_t to = (first + count) * decoder_->row_bytes / width;
        for (int64_t r = row; r < std::min(row + ROWS, rows); ++r)
            for (int64_t at = from; at < to; at += 64)
                __builtin_prefetch(decoder_->bytes + r * decoder_->row_bytes + at, 0, 3);
#endif
    }

    DecoderPtr decoder_;
    int64_t stretch_;
};

}  // namespace

ProductPtr float_rows(DecoderPtr decoder) { return std::make_shared<FloatRows>(std::move(decoder)); }

DecoderPtr decoder_of(const Product& product) {
    const auto* rows = dynamic_cast<const FloatRows*>(&product);
    return rows == nullptr ? nullptr : rows->decoder();
}

}  // namespace tersor
