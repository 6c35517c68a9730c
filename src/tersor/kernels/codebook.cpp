// The search for the nearest sums of codebook vectors. Compiled twin of tersor/kernels/reference_codebook.py, which says
// what is computed; the same codes come out.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace nb = nanobind;

#if defined(__GNUC__)  // others have no vectors of this kind, and do without

#if defined(__x86_64__) && defined(__linux__)
#define TERSOR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TERSOR_CLONES
#endif

namespace {

using MatF = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using CubeF = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using OutI = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr size_t WIDE = 64, LANES = 16, TOGETHER = 4, MOST_DIM = 16, MOST_WIDTH = 16;

// LANES numbers that are worked on at once, of whatever width the processor has.
typedef float Floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(LANES * 4), aligned(4)));

// Half the square of each entry less its product with `x`, and `more`: how far it is, but for what all entries share.
// `entries (dim, count)`, `count` a multiple of WIDE.
TERSOR_CLONES
void scores(const float* x, size_t dim, const float* half, const float* entries, size_t count, float more, float* out) {
    for (size_t first = 0; first < count; first += WIDE) {
        Floats sum[WIDE / LANES];
#pragma GCC unroll 4
        for (size_t u = 0; u < WIDE / LANES; ++u) sum[u] = *reinterpret_cast<const Floats*>(half + first + u * LANES);
        for (size_t c = 0; c < dim; ++c) {
            const float* row = entries + c * count + first;
#pragma GCC unroll 4
            for (size_t u = 0; u < WIDE / LANES; ++u) sum[u] -= x[c] * *reinterpret_cast<const Floats*>(row + u * LANES);
        }
#pragma GCC unroll 4
        for (size_t u = 0; u < WIDE / LANES; ++u) *reinterpret_cast<Floats*>(out + first + u * LANES) = sum[u] + more;
    }
}

// Which of `count` values are below `limit`, in order; returns how many.
TERSOR_CLONES
size_t below(const float* values, size_t count, float limit, int32_t* found) {
    size_t held = 0;
    for (size_t first = 0; first < count; first += WIDE) {
        Ints less{};
#pragma GCC unroll 4
        for (size_t u = 0; u < WIDE; u += LANES)
            less |= *reinterpret_cast<const Floats*>(values + first + u) < Floats{} + limit;
        uint64_t words[sizeof less / 8], any = 0;
        std::memcpy(words, &less, sizeof less);
        for (const uint64_t word : words) any |= word;
        if (any)
            for (size_t u = first; u < first + WIDE; ++u) {
                found[held] = static_cast<int32_t>(u);
                held += values[u] < limit;
            }
    }
    return held;
}

// No less than the `width` least values, and not much more: that many of LANES columns have their least below it.
TERSOR_CLONES
float enough(const float* values, size_t count, size_t width) {
    Floats least = *reinterpret_cast<const Floats*>(values);
    for (size_t first = LANES; first < count; first += LANES) {
        const Floats here = *reinterpret_cast<const Floats*>(values + first);
        least = here < least ? here : least;
    }
    float columns[LANES];
    std::memcpy(columns, &least, sizeof least);
    for (float& one : columns) one = one < INFINITY ? one : INFINITY;  // also what is no number
    std::nth_element(columns, columns + width - 1, columns + LANES);
    return std::nextafter(columns[width - 1], INFINITY);
}

// The first of the nearest entries for TOGETHER targets `x (TOGETHER, dim)`, each entry read once for all of them.
TERSOR_CLONES
void nearest(const float* x, size_t dim, const float* half, const float* entries, size_t count, int32_t* out) {
    Floats best[TOGETHER];
    Ints where[TOGETHER];
#pragma GCC unroll 4
    for (size_t v = 0; v < TOGETHER; ++v) best[v] = Floats{} + INFINITY, where[v] = Ints{};
    for (size_t first = 0; first < count; first += LANES) {
        const Floats start = *reinterpret_cast<const Floats*>(half + first);
        Floats sum[TOGETHER] = {start, start, start, start};
        for (size_t c = 0; c < dim; ++c) {
            const Floats row = *reinterpret_cast<const Floats*>(entries + c * count + first);
#pragma GCC unroll 4
            for (size_t v = 0; v < TOGETHER; ++v) sum[v] -= x[v * dim + c] * row;
        }
        const Ints here = Ints{} + static_cast<int32_t>(first);
#pragma GCC unroll 4
        for (size_t v = 0; v < TOGETHER; ++v) {
            const Ints less = sum[v] < best[v];
            best[v] = less ? sum[v] : best[v];
            where[v] = less ? here : where[v];
        }
    }
    for (size_t v = 0; v < TOGETHER; ++v) {
        size_t lane = 0;
        for (size_t u = 1; u < LANES; ++u) {
            const bool before = where[v][u] + static_cast<int32_t>(u) < where[v][lane] + static_cast<int32_t>(lane);
            if (best[v][u] < best[v][lane] || (best[v][u] == best[v][lane] && before)) lane = u;
        }
        out[v] = best[v][lane] < INFINITY ? where[v][lane] + static_cast<int32_t>(lane) : 0;
    }
}

// The best few of what is offered, least first; of equals the earlier.
struct Few {
    size_t width, held = 0;
    float score[MOST_WIDTH];
    int64_t at[MOST_WIDTH];

    float limit() const { return held < width ? INFINITY : score[width - 1]; }

    void offer(float value, int64_t where) {
        size_t place = held < width ? held++ : width - 1;
        for (; place > 0 && value < score[place - 1]; --place) {
            score[place] = score[place - 1];
            at[place] = at[place - 1];
        }
        score[place] = value;
        at[place] = where;
    }
};

struct Beam {
    float sum[MOST_DIM] = {};
    int32_t code = 0;
};

class Search {
  public:
    Search(MatF half, CubeF entries, int bits, size_t width)
        : half_(half.data()), entries_(entries.data()), stages_(entries.shape(0)), dim_(entries.shape(1)),
          count_(entries.shape(2)), size_(size_t{1} << bits), bits_(bits), width_(width), score_(entries.shape(2)), near_(entries.shape(2) + 1) {}

    // Codes of `n` targets.
    void operator()(const float* targets, size_t n, int32_t* codes) {
        size_t i = 0;
        if (stages_ > 1)
            for (; i < n; ++i) codes[i] = one(targets + i * dim_);
        for (; i + TOGETHER <= n; i += TOGETHER)
            nearest(targets + i * dim_, dim_, half_, entries_, count_, codes + i);
        if (i < n) {
            float last[TOGETHER * MOST_DIM] = {};
            int32_t found[TOGETHER];
            std::copy(targets + i * dim_, targets + n * dim_, last);
            nearest(last, dim_, half_, entries_, count_, found);
            std::copy_n(found, n - i, codes + i);
        }
    }

  private:
    int32_t one(const float* target) {
        beams_.assign(1, Beam{});
        for (size_t stage = 0; stage < stages_; ++stage) step(target, stage, stage + 1 < stages_ ? width_ : 1);
        return beams_[0].code;
    }

    void step(const float* target, size_t stage, size_t width) {
        Few few{width};
        for (size_t p = 0; p < beams_.size(); ++p) {
            float left[MOST_DIM], own = 0.0f;
            for (size_t c = 0; c < dim_; ++c) left[c] = stage ? target[c] - beams_[p].sum[c] : target[c];
            for (size_t c = 0; stage && c < dim_; ++c) own = c ? own + left[c] * left[c] : left[c] * left[c];
            scores(left, dim_, half_ + stage * count_, entries_ + stage * dim_ * count_, count_, own * 0.5f, score_.data());
            const float limit = stage ? few.limit() : enough(score_.data(), count_, width);
            const size_t some = below(score_.data(), count_, limit, near_.data());
            for (size_t i = 0; i < some; ++i)
                if (const float value = score_[static_cast<size_t>(near_[i])]; value < few.limit())
                    few.offer(value, static_cast<int64_t>(p * size_) + near_[i]);
        }
        if (!few.held) few.offer(0.0f, 0);  // nothing is a number
        next_.resize(few.held);
        for (size_t i = 0; i < few.held; ++i) {
            const Beam& parent = beams_[static_cast<size_t>(few.at[i]) / size_];
            const size_t entry = static_cast<size_t>(few.at[i]) % size_;
            next_[i].code = parent.code + (static_cast<int32_t>(entry) << (stage * static_cast<size_t>(bits_)));
            for (size_t c = 0; c < dim_; ++c) {
                const float value = entries_[(stage * dim_ + c) * count_ + entry];
                next_[i].sum[c] = stage ? parent.sum[c] + value : value;
            }
        }
        beams_.swap(next_);
    }

    const float *half_, *entries_;
    size_t stages_, dim_, count_, size_;
    int bits_;
    size_t width_;
    std::vector<float> score_;
    std::vector<int32_t> near_;
    std::vector<Beam> beams_, next_;
};

// `vectors (n, dim)`; `half (stages, count)`, `entries (stages, dim, count)`: beyond 2^bits, infinity and zeros.
void nearest_sums(MatF vectors, MatF half, CubeF entries, int bits, size_t width, OutI codes) {
    const size_t stages = entries.shape(0), dim = entries.shape(1), count = entries.shape(2);
    const bool ok = stages >= 1 && dim >= 1 && dim <= MOST_DIM && count % WIDE == 0 && bits >= 0 && bits <= 20 &&
                    (size_t{1} << bits) <= count && stages * static_cast<size_t>(bits) <= 31 && width >= 1 &&
                    width <= MOST_WIDTH && half.shape(0) == stages && half.shape(1) == count &&
                    vectors.shape(1) == dim && codes.shape(0) == vectors.shape(0);
    if (!ok) throw std::invalid_argument("arguments of a codebook search must have matching shapes");
    nb::gil_scoped_release release;
    Search search(half, entries, bits, width);
    search(vectors.data(), vectors.shape(0), codes.data());
}

}  // namespace

#endif

void bind_codebook([[maybe_unused]] nb::module_& module) {
#if defined(__GNUC__)
    module.def("nearest_sums", &nearest_sums, nb::arg("vectors"), nb::arg("half"), nb::arg("entries"), nb::arg("bits"),
               nb::arg("width"), nb::arg("codes"));
#endif
}
