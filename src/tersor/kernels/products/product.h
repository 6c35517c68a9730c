// What all products have in common: y = W x for a packed weight W, whatever it is packed as.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "ahead.h"

namespace tersor {

// Instructions that the loops of a product may use. `isa()` is the best that the machine has, or less where `limit_isa`
// said so (tests run every level).
enum class Isa { portable, avx2, avx512 };
Isa isa();
void limit_isa(Isa most);

// How the inputs of a token are rounded before integer products: to 8 bits, or to 16 bits as two planes of 8. Each
// token has one scale. All sums of products are exact; see Activations.
enum class Precision { int8, int16 };

struct Options {
    int threads = 1;
    Precision precision = Precision::int16;
};

// Inputs as a product takes them: rotated, rounded to integers, added up in groups. Nothing of its weight is in them, so
// products of the same inputs can often share them.
class Ready {
  public:
    virtual ~Ready() = default;
};
using ReadyPtr = std::shared_ptr<const Ready>;

// A product under way: parts that run in any order on any threads, and `end` after the last of them.
class Job {
  public:
    explicit Job(int64_t parts) : parts(parts) {}
    virtual ~Job() = default;
    virtual void run(int64_t part) const = 0;
    virtual void end() const {}
    virtual Beginning beginning(int64_t) const { return {}; }

    const int64_t parts;
};

// A packed weight (rows, columns) that multiplies. Immutable; any number of callers at once. Stored tensors that it
// points to are kept alive by whoever made it.
class Product {
  public:
    Product(int64_t rows, int64_t columns) : rows(rows), columns(columns) {}
    virtual ~Product() = default;
    Product(const Product&) = delete;
    Product& operator=(const Product&) = delete;

    // For token t < tokens and r < rows: y[t * stride + r] = sum over c of W[r, c] * x[t * columns + c].
    // What comes out is the same bits for any number of threads, and for a token whatever other tokens are with it.
    virtual void apply(const float* x, int64_t tokens, float* y, int64_t stride, const Options& options) const = 0;

    // The same in steps, for products that can be put together (see together.h): `begin` takes what `ready` gave, of
    // this product or of one that it `takes_ready_of`. Inputs and outputs stay where they are until the job has ended.
    virtual bool in_steps() const { return false; }
    virtual bool takes_ready_of(const Product&) const { return false; }
    virtual ReadyPtr ready(const float*, int64_t, const Options&) const { return nullptr; }
    virtual std::unique_ptr<Job> begin(ReadyPtr, float*, int64_t, const Options&) const { return nullptr; }

    // Where part `part` of a job for one token begins, for products that tell.
    virtual Beginning beginning(int64_t, const Options&) const { return {}; }

    // Writes row `row` of the weight (columns,), as embeddings need it. False, and nothing written, where a product has
    // no short way to it.
    virtual bool read_row(int64_t, float*) const { return false; }

    const int64_t rows, columns;
};

using ProductPtr = std::shared_ptr<const Product>;

inline void require(bool ok, const std::string& what) {
    if (!ok) throw std::invalid_argument(what);
}

}  // namespace tersor
