// Products of the same inputs, run as one: what they take of the inputs is made once where they agree on it, and all their
// parts are handed to the threads together.
#pragma once

#include <cstdint>
#include <vector>

#include "product.h"

namespace tersor {

struct Output {
    float* y;
    int64_t stride;
};

class Together {
  public:
    // Products of one number of columns each.
    explicit Together(std::vector<ProductPtr> all);

    // What all of them give for inputs x (tokens, columns): outputs[i] is of the product of that number.
    void apply(const float* x, int64_t tokens, const std::vector<Output>& outputs, const Options& options) const;

    // Steps, as of a product. None where one of the products has none.
    bool in_steps() const { return in_steps_; }
    bool takes_ready_of(const Together& other) const;
    ReadyPtr ready(const float* x, int64_t tokens, const Options& options) const;
    std::unique_ptr<Job> begin(ReadyPtr inputs, const std::vector<Output>& outputs, const Options& options) const;

    const std::vector<ProductPtr>& all() const { return all_; }

  private:
    std::vector<ProductPtr> all_;
    std::vector<size_t> from_;  // the product whose ready inputs each takes: its own, or an earlier one's
    bool in_steps_ = true;
};

// `product.apply`, for a product that has steps.
void apply_in_steps(const Product& product, const float* x, int64_t tokens, const Output& output, const Options& options);

}  // namespace tersor
