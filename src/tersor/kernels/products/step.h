// A step of a decoder: operations on buffers that stay where they are, run in order for one token or a few.
#pragma once

#include <cstdint>
#include <memory>

#include "product.h"
#include "step_loops.h"

namespace tersor {

// Rows of a buffer, one a token; row t begins at data + t * stride.
struct View {
    float* data;
    int64_t rows, width, stride;

    float* row(int64_t t) const { return data + t * stride; }
};

// What is run: `tokens` tokens, of which the first is at `position` in the text.
struct Step {
    int64_t tokens, position;
    Options options;
    const Loops& loops;
};

class Operation {
  public:
    virtual ~Operation() = default;
    virtual void run(const Step& step) const = 0;
};

// Keys and values of all positions so far, and the attention of new ones to them; see step_loops.h for the layout.
struct Cache {
    void *keys, *values;  // (heads, blocks, dim, 16) and (heads, blocks * 16, padded)
    bool half;
    int64_t heads, blocks, dim, padded;
};

// Writes new keys and values (tokens, cache.heads * dim) into the cache, then y = softmax(scale * q Kᵀ) V for queries
// (tokens, heads * dim), each of which sees positions up to its own, the last `window` of them where window > 0. A cap
// > 0 is put on the scaled scores by cap * tanh(score / cap). Queries h * heads / cache.heads ... share keys head h.
struct AttentionSettings {
    View q, k, v, y;
    float scale, cap;
    int64_t window;
};
std::unique_ptr<Operation> make_attention(const Cache& cache, const AttentionSettings& settings);

}  // namespace tersor
