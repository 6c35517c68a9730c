// Products of the same inputs, run as one: what they take of the inputs is made once where they agree on it, and all their
// parts are handed to the threads together.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "product.h"

namespace tersor {

// A job that calls f(first, last) for rows [0, rows), `each` at a time; at(part) is where a part begins.
template <typename F, typename At>
class RowsJob final : public Job {
  public:
    RowsJob(int64_t rows, int64_t each, F f, At at)
        : Job((rows + each - 1) / each), rows_(rows), each_(each), f_(std::move(f)), at_(std::move(at)) {}
    void run(int64_t part) const override { f_(part * each_, std::min(rows_, (part + 1) * each_)); }
    Beginning beginning(int64_t part) const override { return at_(part); }

  private:
    const int64_t rows_, each_;
    const F f_;
    const At at_;
};
template <typename F, typename At>
std::unique_ptr<Job> job_over_rows(int64_t rows, int64_t each, F f, At at) {
    return std::make_unique<RowsJob<F, At>>(rows, each, std::move(f), std::move(at));
}
template <typename F>
std::unique_ptr<Job> job_over_rows(int64_t rows, int64_t each, F f) {
    return job_over_rows(rows, each, std::move(f), [](int64_t) { return Beginning{}; });
}

struct Output {
    float* y;
    int64_t stride;
};

class Together {
  public:
    // Products of one number of columns each.
    explicit Together(std::vector<ProductPtr> all);

    // What all of them give for inputs x (tokens, columns): outputs[i] is of the product of that number. `then`: what is
    // multiplied after this, or null.
    void apply(const float* x, int64_t tokens, const std::vector<Output>& outputs, const Options& options,
               const Together* then) const;

    // Steps, as of a product. None where one of the products has none.
    bool in_steps() const { return in_steps_; }
    bool takes_ready_of(const Together& other) const;
    ReadyPtr ready(const float* x, int64_t tokens, const Options& options) const;
    std::unique_ptr<Job> begin(ReadyPtr inputs, const std::vector<Output>& outputs, const Options& options) const;
    Beginning beginning(int64_t part, const Options& options) const { return all_.front()->beginning(part, options); }

    const std::vector<ProductPtr>& all() const { return all_; }

  private:
    std::vector<ProductPtr> all_;
    std::vector<size_t> from_;  // the product whose ready inputs each takes: its own, or an earlier one's
    bool in_steps_ = true;
};

// `product.apply`, for a product that has steps.
void apply_in_steps(const Product& product, const float* x, int64_t tokens, const Output& output, const Options& options);

}  // namespace tersor
