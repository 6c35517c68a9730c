// Weights kept as floats, and a few weights among zeros. Sums are of floats: one running vector for each output, taken
// from left to right, so that an output is the same bits whatever tokens and rows are worked on with it.
#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "bind.h"
#include "half.h"
#include "pool.h"
#include "together.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define TERSOR_X86 1
#include <immintrin.h>
#define TARGET_512 __attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma,f16c")))
#define TARGET_256 __attribute__((target("avx2,fma,f16c")))
#endif

namespace tersor {
namespace {

enum class Kind { bf16, fp16, fp32 };

template <Kind kind>
float value(const uint8_t* row, int64_t c) {
    if (kind == Kind::fp32) return reinterpret_cast<const float*>(row)[c];
    const uint16_t bits = reinterpret_cast<const uint16_t*>(row)[c];
    return kind == Kind::bf16 ? float_of_bits(static_cast<uint32_t>(bits) << 16) : float_of_half(bits);
}

// A stretch of rows and all tokens: y[t * stride + r] for the weight's rows `rows[0]` to `rows[count - 1]`.
struct Span {
    const uint8_t* weight;
    int64_t row_bytes, columns, count;
    const float* x;
    int64_t tokens;
    float* y;
    int64_t stride;
};

template <Kind kind>
void span_portable(const Span& span) {
    constexpr int LANES = 16;
    for (int64_t r = 0; r < span.count; ++r) {
        const uint8_t* row = span.weight + r * span.row_bytes;
        for (int64_t t = 0; t < span.tokens; ++t) {
            const float* x = span.x + t * span.columns;
            float lane[LANES] = {};
            int64_t c = 0;
            for (; c + LANES <= span.columns; c += LANES)
                for (int i = 0; i < LANES; ++i) lane[i] += value<kind>(row, c + i) * x[c + i];
            for (int i = 0; c < span.columns; ++c, ++i) lane[i] += value<kind>(row, c) * x[c];
            for (int half = LANES / 2; half > 0; half /= 2)
                for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
            span.y[t * span.stride + r] = lane[0];
        }
    }
}

#ifdef TERSOR_X86
// Machines with vectors W of a number of lanes: loads of weights as floats, and their sums.
struct Wide {
    using V = __m512;
    static constexpr int LANES = 16;
    template <Kind kind>
    TARGET_512 static V weights(const uint8_t* row, int64_t c) {
        if (kind == Kind::fp32) return _mm512_loadu_ps(row + 4 * c);
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 2 * c));
        return kind == Kind::fp16 ? _mm512_cvtph_ps(bits)
                                  : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
};

struct Narrow {
    using V = __m256;
    static constexpr int LANES = 8;
    template <Kind kind>
    TARGET_256 static V weights(const uint8_t* row, int64_t c) {
        if (kind == Kind::fp32) return _mm256_loadu_ps(reinterpret_cast<const float*>(row + 4 * c));
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 2 * c));
        return kind == Kind::fp16 ? _mm256_cvtph_ps(bits)
                                  : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
};

TARGET_256 inline float sum_of(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
TARGET_512 inline float sum_of(__m512 v) {
    alignas(64) float lane[16];
    _mm512_store_ps(lane, v);
    return sum_of(_mm256_add_ps(_mm256_load_ps(lane), _mm256_load_ps(lane + 8)));
}

// `R` rows from `r` on times `T` tokens from `t` on. The two bodies differ in their vectors alone; a template over those
// cannot be compiled for either machine.
#define TERSOR_DENSE_BLOCK(NAME, TARGET, W, ZERO, LOAD, FMA)                                              \
    template <Kind kind, int R, int T>                                                                    \
    TARGET void NAME(const Span& span, int64_t r, int64_t t) {                                            \
        W::V sum[R][T];                                                                                   \
        const uint8_t* row[R];                                                                            \
        for (int i = 0; i < R; ++i) {                                                                     \
            row[i] = span.weight + (r + i) * span.row_bytes;                                              \
            for (int j = 0; j < T; ++j) sum[i][j] = ZERO();                                               \
        }                                                                                                 \
        const float* x = span.x + t * span.columns;                                                       \
        int64_t c = 0;                                                                                    \
        for (; c + W::LANES <= span.columns; c += W::LANES) {                                             \
            W::V in[T];                                                                                   \
            for (int j = 0; j < T; ++j) in[j] = LOAD(x + j * span.columns + c);                           \
            for (int i = 0; i < R; ++i) {                                                                 \
                const W::V w = W::template weights<kind>(row[i], c);                                      \
                for (int j = 0; j < T; ++j) sum[i][j] = FMA(w, in[j], sum[i][j]);                         \
            }                                                                                             \
        }                                                                                                 \
        for (int i = 0; i < R; ++i) {                                                                     \
            for (int j = 0; j < T; ++j) {                                                                 \
                float total = sum_of(sum[i][j]);                                                          \
                for (int64_t k = c; k < span.columns; ++k)                                                \
                    total += value<kind>(row[i], k) * x[j * span.columns + k];                            \
                span.y[(t + j) * span.stride + r + i] = total;                                            \
            }                                                                                             \
        }                                                                                                 \
    }                                                                                                     \
    template <Kind kind>                                                                                  \
    TARGET void NAME##_span(const Span& span) {                                                           \
        int64_t t = 0;                                                                                    \
        for (; t + 4 <= span.tokens; t += 4) {                                                            \
            int64_t r = 0;                                                                                \
            for (; r + 2 <= span.count; r += 2) NAME<kind, 2, 4>(span, r, t);                             \
            for (; r < span.count; ++r) NAME<kind, 1, 4>(span, r, t);                                     \
        }                                                                                                 \
        for (; t < span.tokens; ++t) {                                                                    \
            int64_t r = 0;                                                                                \
            for (; r + 8 <= span.count; r += 8) NAME<kind, 8, 1>(span, r, t);                             \
            for (; r < span.count; ++r) NAME<kind, 1, 1>(span, r, t);                                     \
        }                                                                                                 \
    }

TERSOR_DENSE_BLOCK(block_512, TARGET_512, Wide, _mm512_setzero_ps, _mm512_loadu_ps, _mm512_fmadd_ps)
TERSOR_DENSE_BLOCK(block_256, TARGET_256, Narrow, _mm256_setzero_ps, _mm256_loadu_ps, _mm256_fmadd_ps)
#endif

template <Kind kind>
void one_span(const Span& span) {
#ifdef TERSOR_X86
    if (isa() == Isa::avx512) return block_512_span<kind>(span);
    if (isa() == Isa::avx2) return block_256_span<kind>(span);
#endif
    span_portable<kind>(span);
}

using Array = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

// Inputs as they are.
struct PlainInputs final : Ready {
    PlainInputs(const float* x, int64_t tokens) : x(x), tokens(tokens) {}

    const float* x;
    int64_t tokens;
};

class Dense final : public Product {
  public:
    Dense(Array weight, Kind kind)
        : Product(static_cast<int64_t>(weight.shape(0)), static_cast<int64_t>(weight.shape(1))),
          weight_(std::move(weight)),
          kind_(kind) {}

    void apply(const float* x, int64_t tokens, float* y, int64_t stride, const Options& options) const override {
        apply_in_steps(*this, x, tokens, {y, stride}, options);
    }
    bool in_steps() const override { return true; }
    bool takes_ready_of(const Product& other) const override { return dynamic_cast<const Dense*>(&other) != nullptr; }
    ReadyPtr ready(const float* x, int64_t tokens, const Options&) const override {
        return std::make_shared<PlainInputs>(x, tokens);
    }
    std::unique_ptr<Job> begin(ReadyPtr inputs, float* y, int64_t stride, const Options&) const override {
        // Few rows at a time where there are many tokens: they are read again for every four of those.
        const int64_t each = std::clamp<int64_t>((1 << 17) / std::max<int64_t>(row_bytes(), 1) / 8 * 8, 8, 64);
        return job_over_rows(rows, each, [this, inputs = std::move(inputs), y, stride](int64_t first, int64_t last) {
            multiply(first, last, static_cast<const PlainInputs&>(*inputs), y, stride);
        });
    }
    bool read_row(int64_t row, float* to) const override {
        const uint8_t* from = static_cast<const uint8_t*>(weight_.data()) + row * row_bytes();
        for (int64_t c = 0; c < columns; ++c) {
            if (kind_ == Kind::bf16) to[c] = value<Kind::bf16>(from, c);
            if (kind_ == Kind::fp16) to[c] = value<Kind::fp16>(from, c);
            if (kind_ == Kind::fp32) to[c] = value<Kind::fp32>(from, c);
        }
        return true;
    }

  private:
    void multiply(int64_t first, int64_t last, const PlainInputs& inputs, float* y, int64_t stride) const {
        const Span span{static_cast<const uint8_t*>(weight_.data()) + first * row_bytes(), row_bytes(), columns,
                        last - first, inputs.x, inputs.tokens, y + first, stride};
        if (kind_ == Kind::bf16) one_span<Kind::bf16>(span);
        if (kind_ == Kind::fp16) one_span<Kind::fp16>(span);
        if (kind_ == Kind::fp32) one_span<Kind::fp32>(span);
    }

    int64_t row_bytes() const { return columns * (kind_ == Kind::fp32 ? 4 : 2); }

    Array weight_;  // (rows, columns)
    Kind kind_;
};

ProductPtr dense(Array weight, const std::string& name) {
    require(name == "bf16" || name == "fp16" || name == "fp32", "weights are bf16, fp16 or fp32, not " + name);
    const Kind kind = name == "bf16" ? Kind::bf16 : name == "fp16" ? Kind::fp16 : Kind::fp32;
    require(weight.ndim() == 2 && weight.itemsize() == (kind == Kind::fp32 ? 4u : 2u),
            "a weight of " + name + " has rows and columns of numbers of that size");
    return std::make_shared<Dense>(std::move(weight), kind);
}

// Entries [starts[r], starts[r + 1]) are those of row r: float16 values, and their columns.
struct Entries {
    const uint16_t* values;
    const uint16_t* columns;
    const int32_t* starts;
};

float row_portable(const Entries& entries, int64_t r, const float* x) {
    float lane[8] = {};
    int64_t i = entries.starts[r];
    const int64_t end = entries.starts[r + 1];
    for (; i + 8 <= end; i += 8)
        for (int l = 0; l < 8; ++l) lane[l] += float_of_half(entries.values[i + l]) * x[entries.columns[i + l]];
    for (int l = 0; i < end; ++i, ++l) lane[l] += float_of_half(entries.values[i]) * x[entries.columns[i]];
    for (int half = 4; half > 0; half /= 2)
        for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
    return lane[0];
}

#ifdef TERSOR_X86
TARGET_256 float row_by_gathers(const Entries& entries, int64_t r, const float* x) {
    __m256 sum = _mm256_setzero_ps();
    int64_t i = entries.starts[r];
    const int64_t end = entries.starts[r + 1];
    for (; i + 8 <= end; i += 8) {
        const __m128i at = _mm_loadu_si128(reinterpret_cast<const __m128i*>(entries.columns + i));
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(entries.values + i));
        sum = _mm256_fmadd_ps(_mm256_cvtph_ps(bits), _mm256_i32gather_ps(x, _mm256_cvtepu16_epi32(at), 4), sum);
    }
    float total = sum_of(sum);
    for (; i < end; ++i) total += _cvtsh_ss(entries.values[i]) * x[entries.columns[i]];
    return total;
}
#endif

class Sparse final : public Product {
  public:
    Sparse(In<uint16_t, 1> values, In<uint16_t, 1> places, In<int32_t, 1> starts, int64_t columns)
        : Product(static_cast<int64_t>(starts.shape(0)) - 1, columns),
          values_(std::move(values)),
          places_(std::move(places)),
          starts_(std::move(starts)) {}

    void apply(const float* x, int64_t tokens, float* y, int64_t stride, const Options& options) const override {
        const Entries entries{values_.data(), places_.data(), starts_.data()};
        auto one = row_portable;
#ifdef TERSOR_X86
        if (isa() != Isa::portable) one = row_by_gathers;
#endif
        constexpr int64_t PART = 128;
        parallel((rows + PART - 1) / PART, options.threads, [&](int64_t i) {
            for (int64_t r = i * PART; r < std::min(rows, (i + 1) * PART); ++r)
                for (int64_t t = 0; t < tokens; ++t) y[t * stride + r] = one(entries, r, x + t * columns);
        });
    }

  private:
    In<uint16_t, 1> values_, places_;
    In<int32_t, 1> starts_;
};

ProductPtr sparse(In<uint16_t, 1> values, In<uint16_t, 1> places, In<int32_t, 1> starts, int64_t columns) {
    const int64_t count = static_cast<int64_t>(values.shape(0));
    require(static_cast<int64_t>(places.shape(0)) == count, "there is not a column for every value");
    require(starts.shape(0) >= 1 && starts.data()[0] >= 0, "rows have no starts, or begin before the first value");
    for (size_t r = 1; r < starts.shape(0); ++r)
        require(starts.data()[r - 1] <= starts.data()[r] && starts.data()[r] <= count,
                "row " + std::to_string(r - 1) + " does not end after its start and within " + std::to_string(count) +
                    " values");
    for (int64_t i = 0; i < count; ++i)
        require(places.data()[i] < columns, "value " + std::to_string(i) + " is in column " +
                                                std::to_string(places.data()[i]) + " of " + std::to_string(columns));
    return std::make_shared<Sparse>(std::move(values), std::move(places), std::move(starts), columns);
}

bool multiplies_bfloat16() {
#ifdef TERSOR_X86
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

}  // namespace

void bind_dense(nb::module_& module) {
    module.def("dense", &dense, nb::arg("weight"), nb::arg("kind"));
    module.def("multiplies_bfloat16", &multiplies_bfloat16);
    module.def("sparse", &sparse, nb::arg("values"), nb::arg("places"), nb::arg("starts"), nb::arg("columns"));
}

}  // namespace tersor
