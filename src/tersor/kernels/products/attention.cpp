#include <algorithm>
#include <cmath>
#include <vector>

#include "pool.h"
#include "step.h"

namespace tersor {
namespace {

// Less than this many multiplications are done sooner by one thread than shared out.
constexpr int64_t SHARED = 1 << 14;
// Positions that are worked on at a time, or a multiple of it in long texts; see stretch_of.
constexpr int64_t STRETCH = 64, MOST = 16;

// Positions are cut into stretches, each with its own greatest score, and what they give is put together at the end (as
// flash decoding does): so threads share a head, and keys are read once for all queries that share them. Where a stretch
// ends depends on the token's own position alone, and so do all sums.
class Attention : public Operation {
  public:
    Attention(const Cache& cache, const AttentionSettings& settings)
        : cache_(cache),
          set_(settings),
          group_(settings.q.width / cache.dim / cache.heads),
          slices_((group_ + QUERIES - 1) / QUERIES) {}

    void run(const Step& step) const override {
        for (int64_t t = 0; t < step.tokens; ++t) store(t, step.position + t);
        int64_t stretches = 1;
        for (int64_t t = 0; t < step.tokens; ++t) stretches = std::max(stretches, seen(step.position + t).stretches);
        const int64_t work = step.tokens * (step.position + step.tokens) * set_.q.width;
        const int threads = work < SHARED ? 1 : step.options.threads;
        const int64_t each = cache_.heads * slices_;
        std::vector<float> partial(stretches > 1 ? step.tokens * each * stretches * partial_size() : 0);
        parallel(step.tokens * each * stretches, threads, [&](int64_t part) {
            const int64_t stretch = part % stretches, one = part / stretches;
            attend(step, one / each, one % each, stretch, partial.data() + part * (stretches > 1 ? partial_size() : 0));
        });
        if (stretches == 1) return;
        parallel(step.tokens * each, step.tokens > 1 ? threads : 1, [&](int64_t one) {
            gather(step, one / each, one % each, partial.data() + one * stretches * partial_size());
        });
    }

  private:
    void store(int64_t t, int64_t position) const {
        const int64_t dim = cache_.dim;
        for (int64_t head = 0; head < cache_.heads; ++head) {
            const float* k = set_.k.row(t) + head * dim;
            const float* v = set_.v.row(t) + head * dim;
            const int64_t key = ((head * cache_.blocks + position / BLOCK) * dim) * BLOCK + position % BLOCK;
            const int64_t value = (head * cache_.blocks * BLOCK + position) * cache_.padded;
            if (cache_.half) {
                uint16_t *keys = static_cast<uint16_t*>(cache_.keys), *values = static_cast<uint16_t*>(cache_.values);
                for (int64_t d = 0; d < dim; ++d) keys[key + d * BLOCK] = to_half(k[d]);
                for (int64_t d = 0; d < dim; ++d) values[value + d] = to_half(v[d]);
            } else {
                float *keys = static_cast<float*>(cache_.keys), *values = static_cast<float*>(cache_.values);
                for (int64_t d = 0; d < dim; ++d) keys[key + d * BLOCK] = k[d];
                std::copy(v, v + dim, values + value);
            }
        }
    }

    // What a token sees: positions [from, position], in stretches of `width` from `base` on, which begins a block.
    struct Seen {
        int64_t from, base, width, stretches;
    };

    Seen seen(int64_t position) const {
        const int64_t from = set_.window > 0 ? std::max<int64_t>(0, position - set_.window + 1) : 0;
        const int64_t base = from / BLOCK * BLOCK, count = position + 1 - base;
        const int64_t width = STRETCH * ((count + STRETCH * MOST - 1) / (STRETCH * MOST));
        return {from, base, width, (count + width - 1) / width};
    }

    // Of each query of a slice: the outputs (padded), the greatest score, and the sum of weights.
    int64_t partial_size() const { return QUERIES * (cache_.padded + 2); }
    int count_of(int64_t slice) const { return static_cast<int>(std::min<int64_t>(QUERIES, group_ - slice * QUERIES)); }

    // One stretch of positions for one slice of the queries that share a head of keys: to the outputs where there is no
    // other, else to `partial`.
    void attend(const Step& step, int64_t t, int64_t one, int64_t stretch, float* partial) const {
        const int64_t head = one / slices_, slice = one % slices_, dim = cache_.dim, position = step.position + t;
        const Seen all = seen(position);
        if (stretch >= all.stretches) return;
        const int count = count_of(slice);
        const int64_t start = all.base + stretch * all.width, stop = std::min(position + 1, start + all.width);
        const int64_t block = start / BLOCK, blocks = (stop - 1) / BLOCK - block + 1, n = blocks * BLOCK;
        const int64_t first = std::max(all.from, start) - start, last = stop - start;
        const int64_t size = cache_.half ? 2 : 4;
        const char* keys = static_cast<const char*>(cache_.keys) + (head * cache_.blocks + block) * dim * BLOCK * size;
        const char* values =
            static_cast<const char*>(cache_.values) + (head * cache_.blocks + block) * BLOCK * cache_.padded * size;
        static thread_local std::vector<float> scores;
        if (static_cast<int64_t>(scores.size()) < n * QUERIES) scores.resize(n * QUERIES);
        const int64_t at = (head * group_ + slice * QUERIES) * dim;
        step.loops.score(keys, cache_.half, blocks, dim, set_.q.row(t) + at, dim, count, scores.data());
        float factors[QUERIES];
        for (int q = 0; q < count; ++q) {
            float greatest;
            const float sum = step.loops.soft_max(scores.data() + q * n, n, first, last, set_.scale, set_.cap, &greatest);
            factors[q] = all.stretches == 1 ? 1.0f / sum : 1.0f;
            if (all.stretches == 1) continue;
            partial[QUERIES * cache_.padded + 2 * q] = greatest;
            partial[QUERIES * cache_.padded + 2 * q + 1] = sum;
        }
        float* out = all.stretches == 1 ? set_.y.row(t) + at : partial;
        const int64_t apart = all.stretches == 1 ? dim : cache_.padded;
        step.loops.weigh(values, cache_.half, n, first, last, cache_.padded, scores.data(), count, factors, out, apart,
                         dim);
    }

    // The stretches of one slice of queries, put together.
    void gather(const Step& step, int64_t t, int64_t one, const float* partial) const {
        const int64_t stretches = seen(step.position + t).stretches, dim = cache_.dim;
        if (stretches == 1) return;
        const int64_t head = one / slices_, slice = one % slices_, numbers = QUERIES * cache_.padded;
        for (int q = 0; q < count_of(slice); ++q) {
            const float* stats = partial + numbers + 2 * q;
            float greatest = stats[0], weights[MOST], sum = 0.0f;
            for (int64_t s = 1; s < stretches; ++s) greatest = std::max(greatest, stats[s * partial_size()]);
            for (int64_t s = 0; s < stretches; ++s) {
                weights[s] = std::exp(stats[s * partial_size()] - greatest);
                sum += weights[s] * stats[s * partial_size() + 1];
            }
            float* y = set_.y.row(t) + (head * group_ + slice * QUERIES + q) * dim;
            std::fill_n(y, dim, 0.0f);
            for (int64_t s = 0; s < stretches; ++s) {
                const float* from = partial + s * partial_size() + q * cache_.padded;
                const float weight = weights[s] / sum;
                for (int64_t d = 0; d < dim; ++d) y[d] += weight * from[d];
            }
        }
    }

    const Cache cache_;
    const AttentionSettings set_;
    const int64_t group_, slices_;
};

}  // namespace

std::unique_ptr<Operation> make_attention(const Cache& cache, const AttentionSettings& settings) {
    require(cache.heads > 0 && cache.dim > 0 && cache.blocks > 0, "a cache has heads, dimensions and blocks");
    require(cache.padded >= cache.dim && cache.padded % BLOCK == 0,
            "cached values are padded to a multiple of " + std::to_string(BLOCK) + " dimensions");
    require(settings.q.width % (cache.heads * cache.dim) == 0 && settings.q.width > 0,
            "queries of width " + std::to_string(settings.q.width) + " are not shared evenly by " +
                std::to_string(cache.heads) + " heads of " + std::to_string(cache.dim));
    require(settings.k.width == cache.heads * cache.dim && settings.v.width == settings.k.width,
            "keys and values must have the cache's " + std::to_string(cache.heads * cache.dim) + " columns");
    require(settings.y.width == settings.q.width, "attention gives as many columns as there are in queries");
    require(settings.window >= 0, "a window cannot be negative");
    return std::make_unique<Attention>(cache, settings);
}

}  // namespace tersor
