// Products made of others: of rotated, scaled or chosen inputs, by stretches of rows, in turn, and added up.
// tersor/kernels/products.py says what each of them is.
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "bind.h"
#include "pool.h"
#include "clones.h"
#include "together.h"

namespace tersor {
namespace {

using Buffer = std::vector<float>;

// Butterflies of neighbours 1, 2, 4 and 8 apart within every 16 of `n` floats, a multiple of 16.
#if defined(__GNUC__)
using Sixteen = float __attribute__((vector_size(64), aligned(4)));
using Order = int __attribute__((vector_size(64)));
#if defined(__clang__)
#define TERSOR_ORDERED(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define TERSOR_ORDERED(v, ...) __builtin_shuffle(v, Order{__VA_ARGS__})
#endif
TERSOR_CLONES void near_butterflies(float* x, int64_t n) {
    const Sixteen one = {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1};
    const Sixteen two = {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1};
    const Sixteen four = {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1};
    const Sixteen eight = {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1};
    for (int64_t i = 0; i < n; i += 16) {
        Sixteen v = *reinterpret_cast<const Sixteen*>(x + i);
        v = TERSOR_ORDERED(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14) + v * one;
        v = TERSOR_ORDERED(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13) + v * two;
        v = TERSOR_ORDERED(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11) + v * four;
        v = TERSOR_ORDERED(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7) + v * eight;
        *reinterpret_cast<Sixteen*>(x + i) = v;
    }
}
constexpr int64_t NEAR = 16;
#else
void near_butterflies(float*, int64_t) {}
constexpr int64_t NEAR = 1;
#endif

// The orthonormal Walsh-Hadamard transform of every `power` of `n` floats.
TERSOR_CLONES void butterflies(float* x, int64_t n, int64_t power) {
    int64_t half = 1;
    if (power >= NEAR) {
        near_butterflies(x, n);
        half = NEAR;
    }
    for (; half < power; half *= 2) {
        for (int64_t i = 0; i < n; i += 2 * half) {
            float* first = x + i;
            float* second = first + half;
            for (int64_t j = 0; j < half; ++j) {
                const float a = first[j], b = second[j];
                first[j] = a + b;
                second[j] = a - b;
            }
        }
    }
    const float unit = static_cast<float>(1.0 / std::sqrt(static_cast<double>(power)));
    for (int64_t i = 0; i < n; ++i) x[i] *= unit;
}

// to[i, k] = sum over j of table[i, j] * from[j, k]; table (odd, odd), the others (odd, power).
TERSOR_CLONES void mix(const float* table, const float* from, int64_t odd, int64_t power, float* to) {
    for (int64_t i = 0; i < odd; ++i) {
        float* out = to + i * power;
        const float first = table[i * odd];
        for (int64_t k = 0; k < power; ++k) out[k] = first * from[k];
        for (int64_t j = 1; j < odd; ++j) {
            const float factor = table[i * odd + j];
            const float* in = from + j * power;
            for (int64_t k = 0; k < power; ++k) out[k] += factor * in[k];
        }
    }
}

TERSOR_CLONES void multiply(const float* x, const float* factor, int64_t n, float* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = x[i] * factor[i];
}

Buffer copied(const In<float, 1>& from) { return Buffer(from.data(), from.data() + from.shape(0)); }

void require_width(const ProductPtr& inner, int64_t columns, const char* what) {
    require(inner != nullptr && inner->columns == columns,
            std::string(what) + " for " + std::to_string(columns) + " inputs do not go with a weight of " +
                std::to_string(inner ? inner->columns : 0) + " columns");
}

// What `inner` takes of changed inputs. These live as long as it does, as it may point to them.
ReadyPtr ready_from(const Product& inner, Buffer changed, int64_t tokens, const Options& options) {
    struct Both {
        Buffer inputs;
        ReadyPtr ready;
    };
    const auto both = std::make_shared<Both>(Both{std::move(changed), nullptr});
    both->ready = inner.ready(both->inputs.data(), tokens, options);
    return ReadyPtr(both, both->ready.get());
}

class Rotated final : public Product {
  public:
    Rotated(ProductPtr inner, Buffer signs, Buffer cosines, int64_t odd)
        : Product(inner->rows, inner->columns),
          inner_(std::move(inner)),
          signs_(std::move(signs)),
          cosines_(std::move(cosines)),
          odd_(odd) {}

    void apply(const float* x, int64_t tokens, float* y, int64_t stride, const Options& options) const override {
        inner_->apply(turn(x, tokens, options).data(), tokens, y, stride, options);
    }
    bool in_steps() const override { return inner_->in_steps(); }
    bool takes_ready_of(const Product& other) const override {
        const auto* rotated = dynamic_cast<const Rotated*>(&other);
        return rotated != nullptr && signs_ == rotated->signs_ && cosines_ == rotated->cosines_ &&
               inner_->takes_ready_of(*rotated->inner_);
    }
    ReadyPtr ready(const float* x, int64_t tokens, const Options& options) const override {
        return ready_from(*inner_, turn(x, tokens, options), tokens, options);
    }
    std::unique_ptr<Job> begin(ReadyPtr inputs, float* y, int64_t stride, const Options& options) const override {
        return inner_->begin(std::move(inputs), y, stride, options);
    }
    Beginning beginning(int64_t part, const Options& options) const override { return inner_->beginning(part, options); }

    bool read_row(int64_t row, float* to) const override {
        if (!inner_->read_row(row, to)) return false;
        // The rotation is (cosines x Hadamard) * signs, so its transpose takes the row back.
        const int64_t power = columns / odd_;
        Buffer back(to, to + columns);
        butterflies(back.data(), columns, power);
        if (odd_ > 1) {
            Buffer transposed(odd_ * odd_), mixed(columns);
            for (int64_t i = 0; i < odd_; ++i)
                for (int64_t j = 0; j < odd_; ++j) transposed[i * odd_ + j] = cosines_[j * odd_ + i];
            mix(transposed.data(), back.data(), odd_, power, mixed.data());
            back.swap(mixed);
        }
        multiply(back.data(), signs_.data(), columns, to);
        return true;
    }

  private:
    Buffer turn(const float* x, int64_t tokens, const Options& options) const {
        Buffer turned(tokens * columns), work(odd_ > 1 ? tokens * columns : 0);
        parallel(tokens, options.threads, [&](int64_t t) {
            float* to = turned.data() + t * columns;
            float* at = odd_ > 1 ? work.data() + t * columns : to;
            multiply(x + t * columns, signs_.data(), columns, at);
            butterflies(at, columns, columns / odd_);
            if (odd_ > 1) mix(cosines_.data(), at, odd_, columns / odd_, to);
        });
        return turned;
    }

    ProductPtr inner_;
    Buffer signs_, cosines_;
    int64_t odd_;
};

ProductPtr rotated(ProductPtr inner, In<float, 1> signs, In<float, 2> cosines) {
    const int64_t columns = static_cast<int64_t>(signs.shape(0)), odd = static_cast<int64_t>(cosines.shape(0));
    require_width(inner, columns, "signs");
    require(odd % 2 == 1 && static_cast<int64_t>(cosines.shape(1)) == odd && columns % odd == 0 &&
                ((columns / odd) & (columns / odd - 1)) == 0,
            "a rotation of " + std::to_string(columns) + " inputs has no cosine part of size " + std::to_string(odd));
    Buffer table(cosines.data(), cosines.data() + odd * odd);
    return std::make_shared<Rotated>(std::move(inner), copied(signs), std::move(table), odd);
}

// Plane rotations of neighbouring inputs, by stages; see tersor/kernels/givens.py.
class Turned final : public Product {
  public:
    Turned(ProductPtr inner, In<int8_t, 2> angles)
        : Product(inner->rows, inner->columns),
          inner_(std::move(inner)),
          angles_(std::move(angles)),
          blocks_(static_cast<int64_t>(angles_.shape(0))),
          count_(static_cast<int64_t>(angles_.shape(1))) {
        for (int k = -128; k < 128; ++k) {
            const double square = k * k, whole = square + 16384.0;
            cosine_[k + 128] = static_cast<float>((16384.0 - square) / whole);
            sine_[k + 128] = static_cast<float>(256.0 * k / whole);
        }
    }

    void apply(const float* x, int64_t tokens, float* y, int64_t stride, const Options& options) const override {
        Buffer turned(x, x + tokens * columns);
        constexpr int64_t PART = 16;
        const int64_t parts = (blocks_ + PART - 1) / PART, size = columns / blocks_;
        parallel(tokens * parts, options.threads, [&](int64_t i) {
            const int64_t first = i % parts * PART;
            for (int64_t block = first; block < std::min(first + PART, blocks_); ++block)
                turn(angles_.data() + block * count_, size, turned.data() + i / parts * columns + block * size);
        });
        inner_->apply(turned.data(), tokens, y, stride, options);
    }

  private:
    void turn(const int8_t* angle, int64_t size, float* x) const {
        for (int64_t stage = 0; stage < 2 * size - 3; ++stage) {
            const int64_t row = std::max<int64_t>(0, stage - size + 2), pairs = stage / 2 - row + 1;
            float* at = x + size - 2 - stage + 2 * row;
            for (int64_t i = 0; i < pairs; ++i, at += 2) {
                const float c = cosine_[*angle + 128], s = sine_[*angle + 128];
                const float near = at[0], far = at[1];
                ++angle;
                at[0] = near * c + far * s;
                at[1] = far * c - near * s;
            }
        }
    }

    ProductPtr inner_;
    In<int8_t, 2> angles_;
    int64_t blocks_, count_;
    float cosine_[256], sine_[256];
};

ProductPtr turned(ProductPtr inner, In<int8_t, 2> angles) {
    const int64_t blocks = static_cast<int64_t>(angles.shape(0)), count = static_cast<int64_t>(angles.shape(1));
    require(inner != nullptr && blocks > 0 && inner->columns % blocks == 0 && inner->columns / blocks >= 2,
            "rotations do not go with a weight of that many columns");
    const int64_t size = inner->columns / blocks;
    require(count == size * (size - 1) / 2, "blocks of " + std::to_string(size) + " inputs do not have " +
                                                std::to_string(count) + " rotations");
    return std::make_shared<Turned>(std::move(inner), std::move(angles));
}

class Scaled final : public Product {
  public:
    Scaled(ProductPtr inner, Buffer factors)
        : Product(inner->rows, inner->columns), inner_(std::move(inner)), factors_(std::move(factors)) {}

    void apply(const float* x, int64_t tokens, float* y, int64_t stride, const Options& options) const override {
        inner_->apply(scale(x, tokens).data(), tokens, y, stride, options);
    }
    bool in_steps() const override { return inner_->in_steps(); }
    bool takes_ready_of(const Product& other) const override {
        const auto* scaled = dynamic_cast<const Scaled*>(&other);
        return scaled != nullptr && factors_ == scaled->factors_ && inner_->takes_ready_of(*scaled->inner_);
    }
    ReadyPtr ready(const float* x, int64_t tokens, const Options& options) const override {
        return ready_from(*inner_, scale(x, tokens), tokens, options);
    }
    std::unique_ptr<Job> begin(ReadyPtr inputs, float* y, int64_t stride, const Options& options) const override {
        return inner_->begin(std::move(inputs), y, stride, options);
    }
    Beginning beginning(int64_t part, const Options& options) const override { return inner_->beginning(part, options); }

    bool read_row(int64_t row, float* to) const override {
        if (!inner_->read_row(row, to)) return false;
        for (int64_t c = 0; c < columns; ++c) to[c] *= factors_[c];
        return true;
    }

  private:
    Buffer scale(const float* x, int64_t tokens) const {
        Buffer scaled(tokens * columns);
        for (int64_t t = 0; t < tokens; ++t)
            multiply(x + t * columns, factors_.data(), columns, scaled.data() + t * columns);
        return scaled;
    }

    ProductPtr inner_;
    Buffer factors_;
};

ProductPtr scaled(ProductPtr inner, In<float, 1> factors) {
    require_width(inner, static_cast<int64_t>(factors.shape(0)), "factors");
    return std::make_shared<Scaled>(std::move(inner), copied(factors));
}

// All rows of products of the same inputs.
int64_t rows_of(const std::vector<ProductPtr>& all) {
    require(!all.empty(), "there are no products to put together");
    int64_t rows = 0;
    for (const ProductPtr& one : all) {
        require(one != nullptr && one->columns == all[0]->columns,
                "products of different numbers of columns cannot be put together");
        rows += one->rows;
    }
    return rows;
}

class Stacked final : public Product {
  public:
    Stacked(std::vector<ProductPtr> all, int64_t rows, int64_t columns) : Product(rows, columns), all_(std::move(all)) {}

    void apply(const float* x, int64_t tokens, float* y, int64_t stride, const Options& options) const override {
        all_.apply(x, tokens, outputs(y, stride), options, nullptr);
    }
    bool in_steps() const override { return all_.in_steps(); }
    bool takes_ready_of(const Product& other) const override {
        const auto* stacked = dynamic_cast<const Stacked*>(&other);
        return stacked != nullptr && all_.takes_ready_of(stacked->all_);
    }
    ReadyPtr ready(const float* x, int64_t tokens, const Options& options) const override {
        return all_.ready(x, tokens, options);
    }
    std::unique_ptr<Job> begin(ReadyPtr inputs, float* y, int64_t stride, const Options& options) const override {
        return all_.begin(std::move(inputs), outputs(y, stride), options);
    }

    bool read_row(int64_t row, float* to) const override {
        size_t i = 0;
        for (; row >= all_.all()[i]->rows; ++i) row -= all_.all()[i]->rows;
        return all_.all()[i]->read_row(row, to);
    }

  private:
    std::vector<Output> outputs(float* y, int64_t stride) const {
        std::vector<Output> found;
        for (const ProductPtr& one : all_.all()) {
            found.push_back({y, stride});
            y += one->rows;
        }
        return found;
    }

    Together all_;
};

ProductPtr stacked(std::vector<ProductPtr> all) {
    const int64_t rows = rows_of(all), columns = all[0]->columns;
    return std::make_shared<Stacked>(std::move(all), rows, columns);
}

// Adds `from (tokens, rows)` to y.
void add(const Buffer& from, int64_t tokens, int64_t rows, float* y, int64_t stride) {
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < rows; ++r) y[t * stride + r] += from[t * rows + r];
}

// Products of some of the inputs each, added up in order; no list of inputs: of all of them.
class Total final : public Product {
  public:
    Total(std::vector<ProductPtr> all, std::vector<std::vector<int32_t>> inputs, int64_t columns)
        : Product(all[0]->rows, columns), all_(std::move(all)), inputs_(std::move(inputs)) {}

    void apply(const float* x, int64_t tokens, float* y, int64_t stride, const Options& options) const override {
        Buffer chosen, more(tokens * rows);
        for (size_t i = 0; i < all_.size(); ++i) {
            const float* in = x;
            if (!inputs_.empty()) {
                const std::vector<int32_t>& from = inputs_[i];
                chosen.resize(tokens * from.size());
                for (int64_t t = 0; t < tokens; ++t)
                    for (size_t c = 0; c < from.size(); ++c) chosen[t * from.size() + c] = x[t * columns + from[c]];
                in = chosen.data();
            }
            if (i == 0) {
                all_[i]->apply(in, tokens, y, stride, options);
            } else {
                all_[i]->apply(in, tokens, more.data(), rows, options);
                add(more, tokens, rows, y, stride);
            }
        }
    }

  private:
    std::vector<ProductPtr> all_;
    std::vector<std::vector<int32_t>> inputs_;
};

void require_like(const std::vector<ProductPtr>& all) {
    require(!all.empty(), "there are no products to add");
    for (const ProductPtr& one : all)
        require(one != nullptr && one->rows == all[0]->rows, "products of different numbers of rows cannot be added");
}

ProductPtr total(std::vector<ProductPtr> all) {
    require_like(all);
    rows_of(all);
    const int64_t columns = all[0]->columns;
    return std::make_shared<Total>(std::move(all), std::vector<std::vector<int32_t>>{}, columns);
}

ProductPtr columns(std::vector<ProductPtr> all, std::vector<In<int32_t, 1>> inputs, int64_t width) {
    require_like(all);
    require(all.size() == inputs.size(), "there is not a list of inputs for every product");
    std::vector<std::vector<int32_t>> lists;
    for (size_t i = 0; i < all.size(); ++i) {
        require_width(all[i], static_cast<int64_t>(inputs[i].shape(0)), "inputs");
        lists.emplace_back(inputs[i].data(), inputs[i].data() + inputs[i].shape(0));
        for (const int32_t at : lists.back())
            require(0 <= at && at < width, "input " + std::to_string(at) + " is not one of " + std::to_string(width));
    }
    return std::make_shared<Total>(std::move(all), std::move(lists), width);
}

class Chain final : public Product {
  public:
    Chain(ProductPtr first, ProductPtr second)
        : Product(second->rows, first->columns), first_(std::move(first)), second_(std::move(second)) {}

    void apply(const float* x, int64_t tokens, float* y, int64_t stride, const Options& options) const override {
        Buffer between(tokens * first_->rows);
        first_->apply(x, tokens, between.data(), first_->rows, options);
        second_->apply(between.data(), tokens, y, stride, options);
    }

  private:
    ProductPtr first_, second_;
};

ProductPtr chain(ProductPtr first, ProductPtr second) {
    require(first != nullptr, "there is no first product");
    require_width(second, first->rows, "outputs");
    return std::make_shared<Chain>(std::move(first), std::move(second));
}

}  // namespace

void bind_compose(nb::module_& module) {
    module.def("rotated", &rotated, nb::arg("inner"), nb::arg("signs"), nb::arg("cosines"));
    module.def("turned", &turned, nb::arg("inner"), nb::arg("angles"));
    module.def("scaled", &scaled, nb::arg("inner"), nb::arg("factors"));
    module.def("stacked", &stacked, nb::arg("all"));
    module.def("total", &total, nb::arg("all"));
    module.def("columns", &columns, nb::arg("all"), nb::arg("inputs"), nb::arg("width"));
    module.def("chain", &chain, nb::arg("first"), nb::arg("second"));
}

}  // namespace tersor
