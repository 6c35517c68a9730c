#include "step.h"

#include <algorithm>
#include <chrono>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "pool.h"
#include "together.h"

namespace tersor {
namespace {

using Rows = nb::ndarray<float, nb::ndim<2>, nb::device::cpu>;
using Values = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Stored = nb::ndarray<nb::ndim<4>, nb::c_contig, nb::device::cpu>;

// Element-wise work on fewer values than this is not worth another thread.
constexpr int64_t SHARED = 1 << 15;

template <typename F>
void each_token(const Step& step, int64_t width, const F& f) {
    parallel(step.tokens, step.tokens * width < SHARED ? 1 : step.options.threads, f);
}

// Products of the same inputs, each with outputs of its own.
struct Multiply : Operation {
    View x;
    std::vector<View> y;
    Together products;
    std::vector<const float*> biases;
    const Together* then = nullptr;  // what is multiplied next in the program

    Multiply(View x, std::vector<View> y, std::vector<ProductPtr> products, std::vector<const float*> biases)
        : x(x), y(std::move(y)), products(std::move(products)), biases(std::move(biases)) {
        for (const View& to : this->y) outputs_.push_back({to.data, to.stride});
    }
    void run(const Step& step) const override {
        products.apply(x.data, step.tokens, outputs_, step.options, step.tokens > 1 ? nullptr : then);
        for (size_t i = 0; i < y.size(); ++i)
            if (biases[i] != nullptr)
                for (int64_t t = 0; t < step.tokens; ++t) step.loops.add(biases[i], y[i].row(t), y[i].width);
    }

  private:
    std::vector<Output> outputs_;
};

// Over stretches of `width` values each: the whole row, or every head.
struct Normalize : Operation {
    View x, y;
    const float *weight, *bias;
    int64_t width;
    float eps;
    bool centred;

    Normalize(View x, View y, const float* weight, const float* bias, int64_t width, float eps, bool centred)
        : x(x), y(y), weight(weight), bias(bias), width(width), eps(eps), centred(centred) {}
    void run(const Step& step) const override {
        each_token(step, x.width, [&](int64_t t) {
            for (int64_t i = 0; i < x.width; i += width) {
                if (centred) step.loops.layer_norm(x.row(t) + i, y.row(t) + i, weight, bias, width, eps);
                else step.loops.rms_norm(x.row(t) + i, y.row(t) + i, weight, width, eps);
            }
        });
    }
};

struct Rotate : Operation {
    View x;
    const float *cosine, *sine;
    int64_t dim, rotary;
    bool neighbours;

    Rotate(View x, const float* cosine, const float* sine, int64_t dim, int64_t rotary, bool neighbours)
        : x(x), cosine(cosine), sine(sine), dim(dim), rotary(rotary), neighbours(neighbours) {}
    void run(const Step& step) const override {
        each_token(step, x.width, [&](int64_t t) {
            const int64_t at = (step.position + t) * rotary;
            for (int64_t i = 0; i < x.width; i += dim)
                step.loops.rope(x.row(t) + i, cosine + at, sine + at, rotary, neighbours);
        });
    }
};

struct Gate : Operation {
    View x, up, y;
    Activation activation;

    Gate(View x, View up, View y, Activation activation) : x(x), up(up), y(y), activation(activation) {}
    void run(const Step& step) const override {
        each_token(step, 4 * x.width, [&](int64_t t) {
            step.loops.gate(x.row(t), up.row(t), y.row(t), x.width, activation);
        });
    }
};

struct Add : Operation {
    View x, y;
    Add(View x, View y) : x(x), y(y) {}
    void run(const Step& step) const override {
        for (int64_t t = 0; t < step.tokens; ++t) step.loops.add(x.row(t), y.row(t), x.width);
    }
};

struct Scale : Operation {
    View x;
    float factor;
    Scale(View x, float factor) : x(x), factor(factor) {}
    void run(const Step& step) const override {
        for (int64_t t = 0; t < step.tokens; ++t) step.loops.scale(x.row(t), factor, x.width);
    }
};

struct Cap : Operation {
    View x;
    float cap;
    Cap(View x, float cap) : x(x), cap(cap) {}
    void run(const Step& step) const override {
        each_token(step, 4 * x.width, [&](int64_t t) { step.loops.soft_cap(x.row(t), cap, x.width); });
    }
};

struct Last : Operation {
    View x, y;
    Last(View x, View y) : x(x), y(y) {}
    void run(const Step& step) const override {
        std::copy_n(x.row(step.tokens - 1), x.width, y.row(0));
    }
};

class Program {
  public:
    Program(int64_t tokens, int64_t context) : tokens_(tokens), context_(context) {
        require(tokens > 0 && context > 0, "a program runs one token or more, in a context of one or more");
    }
    Program(const Program&) = delete;
    Program& operator=(const Program&) = delete;

    void products(Rows x, std::vector<Rows> y, std::vector<ProductPtr> products,
                  std::vector<std::optional<Values>> biases) {
        const View from = view(x, "inputs");
        require(!products.empty() && y.size() == products.size() && biases.size() == products.size(),
                "there is not a buffer and a bias, or none, for every product");
        std::vector<View> outputs;
        std::vector<const float*> added;
        for (size_t i = 0; i < products.size(); ++i) {
            const ProductPtr& product = products[i];
            require(product != nullptr, "a product is needed");
            require(from.width == product->columns && from.stride == from.width,
                    "inputs of a product are its " + std::to_string(product->columns) +
                        " columns, with nothing between");
            outputs.push_back(view(y[i], "outputs"));
            require(outputs[i].width == product->rows,
                    "outputs of a product are its " + std::to_string(product->rows) + " rows");
            const auto& bias = biases[i];
            require(!bias || static_cast<int64_t>(bias->shape(0)) == outputs[i].width,
                    "a bias has a value for every output");
            added.push_back(bias ? hold(*bias) : nullptr);
        }
        auto made = std::make_unique<Multiply>(from, std::move(outputs), std::move(products), std::move(added));
        if (last_ != nullptr) last_->then = &made->products;
        last_ = made.get();
        operations_.push_back({std::move(made), alone_});
    }

    void norm(Rows x, Rows y, Values weight, std::optional<Values> bias, float eps, bool centred) {
        const View from = view(x, "inputs"), to = view(y, "outputs");
        const int64_t width = static_cast<int64_t>(weight.shape(0));
        require(width > 0 && from.width % width == 0 && to.width == from.width,
                "a norm of " + std::to_string(width) + " values cannot work on " + std::to_string(from.width));
        require(!bias || (centred && bias->shape(0) == weight.shape(0)), "a norm has a bias where it is centred");
        add_operation<Normalize>(from, to, hold(weight), bias ? hold(*bias) : nullptr, width, eps, centred);
    }

    void rope(Rows x, nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu> cosine,
              nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu> sine, int64_t dim, bool neighbours) {
        const View at = view(x, "what is rotated");
        const int64_t rotary = static_cast<int64_t>(cosine.shape(1));
        require(dim > 0 && at.width % dim == 0 && rotary <= dim && rotary % 2 == 0,
                std::to_string(rotary) + " of a head's " + std::to_string(dim) + " dimensions cannot be rotated");
        require(cosine.shape(0) == sine.shape(0) && cosine.shape(1) == sine.shape(1) &&
                    static_cast<int64_t>(cosine.shape(0)) >= context_,
                "there are no angles for all " + std::to_string(context_) + " positions");
        add_operation<Rotate>(at, hold(cosine), hold(sine), dim, rotary, neighbours);
    }

    void attention(Rows q, Rows k, Rows v, Rows y, Stored keys, Stored values, float scale, int64_t window, float cap) {
        const bool half = keys.dtype() == nb::dlpack::dtype{static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
        require(half || keys.dtype() == nb::dtype<float>(), "a cache is of float32 or float16");
        require(keys.dtype() == values.dtype(), "keys and values are of one type");
        const Cache cache{keys.data(),
                          values.data(),
                          half,
                          static_cast<int64_t>(keys.shape(0)),
                          static_cast<int64_t>(keys.shape(1)),
                          static_cast<int64_t>(keys.shape(2)),
                          static_cast<int64_t>(values.shape(3))};
        require(keys.shape(3) == BLOCK && values.shape(0) == keys.shape(0) && values.shape(1) == keys.shape(1) &&
                    values.shape(2) == BLOCK,
                "keys are (heads, blocks, dimensions, 16) and values (heads, blocks, 16, padded dimensions)");
        require(cache.blocks * BLOCK >= context_, "the cache is shorter than the context");
        const AttentionSettings settings{view(q, "queries"), view(k, "keys"), view(v, "values"), view(y, "outputs"),
                                         scale,              cap,             window};
        operations_.push_back({make_attention(cache, settings), alone_});
        held_.emplace_back(keys);
        held_.emplace_back(values);
    }

    void gate(Rows x, Rows up, Rows y, const std::string& kind) {
        const View from = view(x, "gates"), by = view(up, "what is gated"), to = view(y, "outputs");
        require(from.width == by.width && by.width == to.width, "gates, what they gate and outputs are equally wide");
        const char* const names[] = {"silu", "gelu", "gelu_tanh", "relu"};
        const auto found = std::find(std::begin(names), std::end(names), kind);
        require(found != std::end(names), "an activation is silu, gelu, gelu_tanh or relu, not " + kind);
        add_operation<Gate>(from, by, to, static_cast<Activation>(found - std::begin(names)));
    }

    void add(Rows x, Rows y) {
        const View from = view(x, "what is added"), to = view(y, "sums");
        require(from.width == to.width, "what is added is as wide as what it is added to");
        add_operation<Add>(from, to);
    }

    void scale(Rows x, float factor) { add_operation<Scale>(view(x, "what is scaled"), factor); }

    void soft_cap(Rows x, float cap) {
        require(cap > 0, "a cap is above 0");
        add_operation<Cap>(view(x, "what is capped"), cap);
    }

    void take_last(Rows x, Rows y) {
        const View from = view(x, "inputs");
        alone_ = true;
        const View to = view(y, "outputs");
        require(from.width == to.width, "what is taken is as wide as where it goes");
        operations_.push_back({std::make_unique<Last>(from, to), false});
    }

    int64_t size() const { return static_cast<int64_t>(operations_.size()); }

    // Seconds of each operation, where asked for.
    std::vector<double> run(int64_t first, int64_t stop, int64_t tokens, int64_t position, int threads, bool int8,
                            bool timed) const {
        require(0 <= first && first <= stop && stop <= size(), "there are no such operations");
        require(0 < tokens && tokens <= tokens_,
                "a step takes 1 to " + std::to_string(tokens_) + " tokens, not " + std::to_string(tokens));
        require(0 <= position && position + tokens <= context_,
                "the context has room for " + std::to_string(context_) + " tokens");
        nb::gil_scoped_release release;
        const Options options{threads, int8 ? Precision::int8 : Precision::int16};
        const Step all{tokens, position, options, loops()}, one{1, position + tokens - 1, options, loops()};
        std::vector<double> seconds;
        if (timed) seconds.reserve(stop - first);
        for (int64_t i = first; i < stop; ++i) {
            const auto start = timed ? std::chrono::steady_clock::now() : std::chrono::steady_clock::time_point();
            operations_[i].operation->run(operations_[i].alone ? one : all);
            if (timed)
                seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
        }
        return seconds;
    }

  private:
    struct Entry {
        std::unique_ptr<Operation> operation;
        bool alone;  // after take_last: for one token
    };

    View view(const Rows& rows, const char* what) {
        const View made{rows.data(), static_cast<int64_t>(rows.shape(0)), static_cast<int64_t>(rows.shape(1)),
                        rows.stride(0)};
        require(made.rows >= (alone_ ? 1 : tokens_),
                std::string(what) + " have " + std::to_string(made.rows) + " rows, fewer than tokens of a step");
        require(made.width > 0 && (made.width == 1 || rows.stride(1) == 1) &&
                    (made.rows == 1 || made.stride >= made.width),
                std::string(what) + " must have their columns side by side");
        held_.emplace_back(rows);
        return made;
    }

    template <typename Array>
    const float* hold(const Array& values) {
        held_.emplace_back(values);
        return values.data();
    }

    template <typename T, typename... Arguments>
    void add_operation(Arguments&&... arguments) {
        operations_.push_back({std::make_unique<T>(std::forward<Arguments>(arguments)...), alone_});
    }

    const int64_t tokens_, context_;
    bool alone_ = false;
    std::vector<Entry> operations_;
    Multiply* last_ = nullptr;  // of the products so far
    std::vector<nb::ndarray<>> held_;  // keeps the buffers alive
};

}  // namespace

void bind_step(nb::module_& module) {
    using namespace nb::literals;
    nb::class_<Program>(module, "Program")
        .def(nb::init<int64_t, int64_t>(), "tokens"_a, "context"_a)
        .def("products", &Program::products, "x"_a, "y"_a, "products"_a, "biases"_a)
        .def("norm", &Program::norm, "x"_a, "y"_a, "weight"_a, "bias"_a.none(), "eps"_a, "centred"_a)
        .def("rope", &Program::rope, "x"_a, "cosine"_a, "sine"_a, "dim"_a, "neighbours"_a)
        .def("attention", &Program::attention, "q"_a, "k"_a, "v"_a, "y"_a, "keys"_a, "values"_a, "scale"_a, "window"_a,
             "cap"_a)
        .def("gate", &Program::gate, "x"_a, "up"_a, "y"_a, "kind"_a)
        .def("add", &Program::add, "x"_a, "y"_a)
        .def("scale", &Program::scale, "x"_a, "factor"_a)
        .def("soft_cap", &Program::soft_cap, "x"_a, "cap"_a)
        .def("take_last", &Program::take_last, "x"_a, "y"_a)
        .def_prop_ro("size", &Program::size)
        .def("run", &Program::run, "first"_a, "stop"_a, "tokens"_a, "position"_a, "threads"_a, "int8"_a, "timed"_a);
}

}  // namespace tersor
