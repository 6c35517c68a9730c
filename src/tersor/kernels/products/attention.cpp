#include <algorithm>
#include <vector>

#include "pool.h"
#include "step.h"

namespace tersor {
namespace {

// Less than this many multiplications are done sooner by one thread than shared out.
constexpr int64_t SHARED = 1 << 17;

class Attention : public Operation {
  public:
    Attention(const Cache& cache, const AttentionSettings& settings)
        : cache_(cache), set_(settings), group_(settings.q.width / cache.dim / cache.heads) {}

    void run(const Step& step) const override {
        for (int64_t t = 0; t < step.tokens; ++t) store(t, step.position + t);
        // All queries of a head of keys together where that leaves work for all threads, else one at a time: either
        // way, the sums of a query are made in the same order.
        const int64_t work = step.tokens * (step.position + step.tokens) * set_.q.width;
        const int threads = work < SHARED ? 1 : step.options.threads;
        const int64_t together = step.tokens * cache_.heads >= 4 * threads || threads == 1
                                     ? std::min<int64_t>(group_, QUERIES)
                                     : 1;
        const int64_t slices = (group_ + together - 1) / together;
        parallel(step.tokens * cache_.heads * slices, threads, [&](int64_t part) {
            const int64_t slice = part % slices, head = part / slices % cache_.heads, t = part / slices / cache_.heads;
            const int64_t first = slice * together;
            attend(step, t, head, first, static_cast<int>(std::min(together, group_ - first)));
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

    void attend(const Step& step, int64_t t, int64_t head, int64_t first, int count) const {
        const int64_t dim = cache_.dim, position = step.position + t;
        const int64_t from = set_.window > 0 ? std::max<int64_t>(0, position - set_.window + 1) : 0;
        const int64_t block = from / BLOCK, blocks = position / BLOCK - block + 1, n = blocks * BLOCK;
        const int64_t size = cache_.half ? 2 : 4;
        const char* keys = static_cast<const char*>(cache_.keys) + (head * cache_.blocks + block) * dim * BLOCK * size;
        const char* values =
            static_cast<const char*>(cache_.values) + (head * cache_.blocks + block) * BLOCK * cache_.padded * size;
        static thread_local std::vector<float> scores;
        if (static_cast<int64_t>(scores.size()) < n * QUERIES) scores.resize(n * QUERIES);
        const int64_t at = (head * group_ + first) * dim;
        step.loops.score(keys, cache_.half, blocks, dim, set_.q.row(t) + at, dim, count, scores.data());
        float factors[QUERIES];
        for (int q = 0; q < count; ++q)
            factors[q] = 1.0f / step.loops.soft_max(scores.data() + q * n, n, from - block * BLOCK,
                                                    position + 1 - block * BLOCK, set_.scale, set_.cap);
        step.loops.weigh(values, cache_.half, n, from - block * BLOCK, position + 1 - block * BLOCK, cache_.padded,
                         scores.data(), count, factors, set_.y.row(t) + at, dim, dim);
    }

    const Cache cache_;
    const AttentionSettings set_;
    const int64_t group_;
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
