#include "together.h"

#include <algorithm>
#include <utility>

#include "pool.h"

namespace tersor {
namespace {

struct AllReady final : Ready {
    std::vector<ReadyPtr> each;
};

class AllJobs final : public Job {
  public:
    explicit AllJobs(std::vector<std::unique_ptr<Job>> jobs) : Job(count(jobs)), jobs_(std::move(jobs)) {}

    void run(int64_t part) const override {
        size_t i = 0;
        for (; part >= jobs_[i]->parts; ++i) part -= jobs_[i]->parts;
        jobs_[i]->run(part);
    }
    Beginning beginning(int64_t part) const override {
        size_t i = 0;
        for (; part >= jobs_[i]->parts; ++i) part -= jobs_[i]->parts;
        return jobs_[i]->beginning(part);
    }
    void end() const override {
        for (const auto& job : jobs_) job->end();
    }

  private:
    static int64_t count(const std::vector<std::unique_ptr<Job>>& jobs) {
        int64_t parts = 0;
        for (const auto& job : jobs) parts += job->parts;
        return parts;
    }

    std::vector<std::unique_ptr<Job>> jobs_;
};

// Threads that are equally fast take parts in turn, which is what they are told to expect.
void finish(const Job& job, const Options& options, const Together* then) {
    parallel(job.parts, options.threads, [&](int64_t part) {
        const int64_t next = part + std::max(options.threads, 1);
        ahead.next = next < job.parts  ? job.beginning(next)
                     : then != nullptr ? then->beginning(next - job.parts, options)
                                       : Beginning{};
        job.run(part);
    });
    job.end();
}

}  // namespace

Together::Together(std::vector<ProductPtr> all) : all_(std::move(all)), from_(all_.size()) {
    for (size_t i = 0; i < all_.size(); ++i) {
        from_[i] = i;
        in_steps_ = in_steps_ && all_[i]->in_steps();
        for (size_t j = 0; j < i && from_[i] == i; ++j)
            if (all_[i]->in_steps() && all_[j]->in_steps() && all_[i]->takes_ready_of(*all_[j])) from_[i] = from_[j];
    }
}

bool Together::takes_ready_of(const Together& other) const {
    if (!in_steps_ || !other.in_steps_ || all_.size() != other.all_.size()) return false;
    for (size_t i = 0; i < all_.size(); ++i)
        if (!all_[i]->takes_ready_of(*other.all_[i])) return false;
    return true;
}

ReadyPtr Together::ready(const float* x, int64_t tokens, const Options& options) const {
    auto made = std::make_shared<AllReady>();
    for (size_t i = 0; i < all_.size(); ++i)
        // Nothing for a product without steps, which is run as a whole.
        made->each.push_back(from_[i] < i               ? made->each[from_[i]]
                             : all_[i]->in_steps() ? all_[i]->ready(x, tokens, options)
                                                   : nullptr);
    return made;
}

std::unique_ptr<Job> Together::begin(ReadyPtr inputs, const std::vector<Output>& outputs, const Options& options) const {
    const auto& each = static_cast<const AllReady&>(*inputs).each;
    std::vector<std::unique_ptr<Job>> jobs;
    for (size_t i = 0; i < all_.size(); ++i)
        if (each[i] != nullptr) jobs.push_back(all_[i]->begin(each[i], outputs[i].y, outputs[i].stride, options));
    return std::make_unique<AllJobs>(std::move(jobs));
}

void Together::apply(const float* x, int64_t tokens, const std::vector<Output>& outputs, const Options& options,
                     const Together* then) const {
    finish(*begin(ready(x, tokens, options), outputs, options), options, then);
    if (in_steps_) return;
    for (size_t i = 0; i < all_.size(); ++i)
        if (!all_[i]->in_steps()) all_[i]->apply(x, tokens, outputs[i].y, outputs[i].stride, options);
}

void apply_in_steps(const Product& product, const float* x, int64_t tokens, const Output& output, const Options& options) {
    finish(*product.begin(product.ready(x, tokens, options), output.y, output.stride, options), options, nullptr);
}

}  // namespace tersor
