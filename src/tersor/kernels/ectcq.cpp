// The search for the cheapest path through the trellis of entropy-coded trellis-coded quantization. Compiled twin of
// tersor/kernels/reference_ectcq.py, which says what is computed; the same bits come out.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <vector>

namespace nb = nanobind;

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define TERSOR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TERSOR_CLONES
#endif

using MatF = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using CubeF = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using VecF = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using VecI = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutI = nb::ndarray<int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutF = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

constexpr int SYMBOLS = 32, REACH = 15, SHRINKS = 5, RENORM = 256;

static inline int floor_div2(int k) { return k >> 1; }

namespace {  // types of this file alone

struct Model {
    const float* price;   // (2, SYMBOLS): bits of a symbol, raw bits included
    const float* shrink;  // (SHRINKS): how much nearer to zero than k a value is, by |k|
    int low;              // raw low bits of an index
};

static inline float branch(const Model& m, float x, int k, float lambda) {
    const int top = floor_div2(k) >> m.low;
    const int symbol = top < -REACH || top > REACH ? SYMBOLS - 1 : top + REACH;
    const int size = k < 0 ? -k : k;
    const float pull = m.shrink[size < SHRINKS ? size : SHRINKS - 1];
    const float value = static_cast<float>(k) - (k > 0 ? pull : -pull);
    const float e = x - value;
    return e * e + lambda * m.price[(k & 1) * SYMBOLS + symbol];
}

// Predecessors of state n by the trellis's input bit; both are in the same union, the top bit of n.
struct Trellis {
    int states, bits;
    std::vector<int> before0, before1;
    Trellis(int states, int h0, int h1) : states(states), bits(0), before0(states), before1(states) {
        while ((1 << bits) < states) ++bits;
        for (int n = 0; n < states; ++n) {
            const int z0 = bits ? n >> (bits - 1) : 0;
            const int a = n ^ (z0 ? h0 >> 1 : 0);
            before0[n] = bits ? (a << 1) | z0 : 0;
            before1[n] = bits ? ((a ^ (h1 >> 1)) << 1) | z0 : 0;
        }
    }
};

}  // namespace

TERSOR_CLONES
static void column(const float* x, size_t rows, const float* lambda, float weight, const int32_t* level, int own, int shift,
                   const std::vector<Model>& models, const Trellis& trellis, float* cost, float* next, uint8_t* choice,
                   int32_t* best, int32_t* out) {
    const int states = trellis.states, half = states > 1 ? states / 2 : 1;
    const int* before0 = trellis.before0.data();
    const int* before1 = trellis.before1.data();
    const int last = static_cast<int>(models.size()) - 1;
    for (int s = 0; s < states; ++s) cost[s] = s == 0 ? 0.0f : 1e30f;
    for (size_t t = 0; t < rows; ++t) {
        float d[4];
        const float price = lambda[t] * weight;
        const Model& model = models[std::clamp((level[t] + own) >> shift, 0, last)];
        for (int z = 0; z < 4; ++z) {
            const int low = static_cast<int>(std::floor((x[t] - static_cast<float>(z)) * 0.25f)) * 4 + z;
            const float a = branch(model, x[t], low, price), b = branch(model, x[t], low + 4, price);
            d[z] = b < a ? b : a;
            best[t * 4 + z] = b < a ? low + 4 : low;
        }
        uint8_t* chose = choice + t * states;
        for (int n = 0; n < half; ++n) {
            const float a = cost[before0[n]] + d[0], b = cost[before1[n]] + d[2];
            next[n] = b < a ? b : a;
            chose[n] = b < a;
        }
        for (int n = half; n < states; ++n) {
            const float a = cost[before0[n]] + d[1], b = cost[before1[n]] + d[3];
            next[n] = b < a ? b : a;
            chose[n] = b < a;
        }
        std::swap(cost, next);
        if (t % RENORM == RENORM - 1) {
            const float least = *std::min_element(cost, cost + states);
            for (int s = 0; s < states; ++s) cost[s] -= least;
        }
    }
    int state = static_cast<int>(std::min_element(cost, cost + states) - cost);
    for (size_t t = rows; t-- > 0;) {
        const int bit = choice[t * states + state];
        const int z0 = trellis.bits ? state >> (trellis.bits - 1) : 0;
        out[t] = best[t * 4 + z0 + 2 * bit];
        state = bit ? before1[state] : before0[state];
    }
}

namespace {

// What a search needs for columns of `rows` rows, checked: prices of contexts, the trellis, and room to work in.
class Search {
  public:
    Search(size_t rows, size_t columns, VecF lambda, VecF weight, VecI row, VecI level, int shift, CubeF price, MatF shrink,
           VecI low, int states, int h0, int h1)
        : rows_(rows), lambda_(lambda.data()), weight_(weight.data()), row_(row.data()), level_(level.data()), shift_(shift),
          trellis_((check(rows, columns, lambda, weight, row, level, shift, price, shrink, low, states), states), h0, h1),
          cost_(states), next_(states), choice_(rows * states), best_(rows * 4) {
        for (size_t c = 0; c < price.shape(0); ++c)
            models_.push_back({price.data() + c * 2 * SYMBOLS, shrink.data() + c * SHRINKS, low.data()[c]});
    }

    // Grid numbers of column `j`, whose targets in units of its step are `x`.
    void operator()(const float* x, size_t j, int32_t* out) {
        column(x, rows_, lambda_, weight_[j], row_, level_[j], shift_, models_, trellis_, cost_.data(), next_.data(),
               choice_.data(), best_.data(), out);
    }

    // The value, in units of the step, of a number in some row of column `j`.
    float value(int32_t k, size_t row, size_t j) const {
        const Model& model = models_[std::clamp((row_[row] + level_[j]) >> shift_, 0, static_cast<int>(models_.size()) - 1)];
        const float pull = model.shrink[std::min(std::abs(k), SHRINKS - 1)];
        return static_cast<float>(k) - (k > 0 ? pull : k < 0 ? -pull : 0.0f);
    }

  private:
    static void check(size_t rows, size_t columns, const VecF& lambda, const VecF& weight, const VecI& row, const VecI& level,
                      int shift, const CubeF& price, const MatF& shrink, const VecI& low, int states) {
        const size_t count = price.shape(0);
        const bool ok = lambda.shape(0) == rows && weight.shape(0) == columns && row.shape(0) == rows &&
                        level.shape(0) == columns && count > 0 && price.shape(1) == 2 && price.shape(2) == SYMBOLS &&
                        shrink.shape(0) == count && shrink.shape(1) == SHRINKS && low.shape(0) == count && states >= 1 &&
                        states <= 4096 && (states & (states - 1)) == 0 && shift >= 0 && shift < 16;
        if (!ok) throw std::invalid_argument("arguments of a trellis path must have matching shapes");
        const auto bad = [](int32_t v) { return v < -65536 || v > 65535; };
        if (std::any_of(row.data(), row.data() + rows, bad) || std::any_of(level.data(), level.data() + columns, bad))
            throw std::invalid_argument("a level out of range");
    }

    size_t rows_;
    const float *lambda_, *weight_;
    const int32_t *row_, *level_;
    int shift_;
    Trellis trellis_;
    std::vector<float> cost_, next_;
    std::vector<uint8_t> choice_;
    std::vector<int32_t> best_;
    std::vector<Model> models_;
};

void path(MatF target, VecF lambda, VecF weight, VecI row, VecI level, int shift, CubeF price, MatF shrink, VecI low,
          int states, int h0, int h1, OutI codes) {
    const size_t columns = target.shape(0), rows = target.shape(1);
    if (codes.shape(0) != columns || codes.shape(1) != rows) throw std::invalid_argument("codes must have the shape of target");
    nb::gil_scoped_release release;
    Search search(rows, columns, lambda, weight, row, level, shift, price, shrink, low, states, h0, h1);
    for (size_t j = 0; j < columns; ++j) search(target.data() + j * rows, j, codes.data() + j * rows);
}

// Column j in units of its step; what is no number is 0.
void in_steps(const float* moved, size_t rows, size_t columns, size_t j, float step, float most, float* x) {
    for (size_t t = 0; t < rows; ++t) {
        const float wanted = moved[t * columns + j] / step;
        x[t] = std::isnan(wanted) ? 0.0f : std::clamp(wanted, -most, most);
    }
}

// What a column's rounding changes, onto the columns after it.
TERSOR_CLONES
void push(float change, const float* mixing, float* moved, size_t count) {
    for (size_t k = 0; k < count; ++k) moved[k] += change * mixing[k];
}

void path_in_order(OutF moved, MatF reference, MatF mixing, VecF step, float most, VecF lambda, VecF weight, VecI row, VecI level,
                   int shift, CubeF price, MatF shrink, VecI low, int states, int h0, int h1, OutI codes, OutF decoded) {
    const size_t rows = moved.shape(0), columns = moved.shape(1);
    const auto like = [&](const auto& one) { return one.shape(0) == rows && one.shape(1) == columns; };
    if (!like(reference) || !like(codes) || !like(decoded) || step.shape(0) != columns || mixing.shape(0) != columns ||
        mixing.shape(1) != columns)
        throw std::invalid_argument("arguments of a trellis path in order must have matching shapes");
    nb::gil_scoped_release release;
    Search search(rows, columns, lambda, weight, row, level, shift, price, shrink, low, states, h0, h1);
    std::vector<float> x(rows);
    std::vector<int32_t> found(rows);
    for (size_t j = 0; j < columns; ++j) {
        in_steps(moved.data(), rows, columns, j, step.data()[j], most, x.data());
        search(x.data(), j, found.data());
        for (size_t t = 0; t < rows; ++t) {
            const size_t at = t * columns + j;
            const float value = step.data()[j] * search.value(found[t], t, j);
            codes.data()[at] = found[t];
            decoded.data()[at] = value;
            push(value - reference.data()[at], mixing.data() + j * columns + j + 1, moved.data() + at + 1, columns - j - 1);
        }
    }
}

// Even grids with no trellis, whose numbers are chosen by their price and, where that costs less, are 0.
struct Grid {
    const float *scale, *shift, *middle, *price_row;  // (rows, groups); `shift`: the zero less the middle
    size_t groups;
    float most;           // of a code
    const float* prices;  // (classes, 2 reach + 1): bits of an index
    int reach;

    // The code for `target`, its group `at`, under `model` and the price `bit` of a bit; `of`: the prices of its class.
    float code(float target, size_t at, const Model& model, const float* of, float bit) const {
        const float low = -2.0f * middle[at], high = 2.0f * (most - middle[at]);
        float x = 2.0f * (target / scale[at] + shift[at]);
        x = std::isnan(x) ? 0.0f : std::clamp(x, low, high);
        float least = INFINITY;
        int found = 0;
        for (int z = 0; z < 4; z += 2) {
            const int under = static_cast<int>(std::floor((x - static_cast<float>(z)) * 0.25f)) * 4 + z;
            const float a = branch(model, x, under, bit), b = branch(model, x, under + 4, bit);
            const float cost = b < a ? b : a;
            if (cost < least) {
                least = cost;
                found = b < a ? under + 4 : under;
            }
        }
        const float off = x - static_cast<float>(found);
        const float saved = of[std::clamp(found >> 1, -reach, reach) + reach] - of[reach];
        if (x * x - off * off < bit * saved) found = 0;
        return std::floor(std::clamp(static_cast<float>(found), low, high) * 0.5f) + middle[at];
    }
};

void priced_in_order(OutF moved, MatF reference, MatF mixing, VecI group, MatF scale, MatF shift, MatF middle, MatF zero,
                     float most, MatF price_row, VecF price_column, VecI kind, CubeF symbol, VecI low, MatF prices, OutI codes,
                     OutF decoded) {
    const size_t rows = moved.shape(0), columns = moved.shape(1), groups = scale.shape(1), classes = symbol.shape(0);
    const auto like = [&](const auto& one) { return one.shape(0) == rows && one.shape(1) == columns; };
    const auto grouped = [&](const MatF& one) { return one.shape(0) == rows && one.shape(1) == groups; };
    const auto inside = [](const VecI& one, size_t size, size_t below) {
        return one.shape(0) == size && std::all_of(one.data(), one.data() + size, [&](int32_t v) {
                   return v >= 0 && static_cast<size_t>(v) < below;
               });
    };
    const bool ok = like(reference) && like(codes) && like(decoded) && mixing.shape(0) == columns &&
                    mixing.shape(1) == columns && grouped(scale) && grouped(shift) && grouped(middle) && grouped(zero) &&
                    grouped(price_row) && price_column.shape(0) == columns && inside(group, columns, groups) &&
                    inside(kind, rows, classes) && symbol.shape(1) == 2 && symbol.shape(2) == SYMBOLS &&
                    low.shape(0) == classes && prices.shape(0) == classes && prices.shape(1) % 2 == 1;
    if (!ok) throw std::invalid_argument("arguments of priced rounding in order must have matching shapes");
    nb::gil_scoped_release release;
    const float none[SHRINKS] = {};
    std::vector<Model> models;
    for (size_t c = 0; c < classes; ++c) models.push_back({symbol.data() + c * 2 * SYMBOLS, none, low.data()[c]});
    const Grid grid{scale.data(), shift.data(), middle.data(), price_row.data(), groups, most, prices.data(),
                    static_cast<int>(prices.shape(1) / 2)};
    for (size_t j = 0; j < columns; ++j)
        for (size_t t = 0; t < rows; ++t) {
            const size_t at = t * columns + j, own = t * groups + static_cast<size_t>(group.data()[j]);
            const size_t which = static_cast<size_t>(kind.data()[t]);
            const float bit = grid.price_row[own] * price_column.data()[j];
            const float code = grid.code(moved.data()[at], own, models[which], grid.prices + which * prices.shape(1), bit);
            const float value = (code - zero.data()[own]) * grid.scale[own];
            codes.data()[at] = static_cast<int32_t>(code);
            decoded.data()[at] = value;
            push(value - reference.data()[at], mixing.data() + j * columns + j + 1, moved.data() + at + 1, columns - j - 1);
        }
}

}  // namespace

void bind_ectcq(nb::module_& module) {
    module.def("path", &path, nb::arg("target"), nb::arg("price_of_row"), nb::arg("price_of_column"), nb::arg("row"), nb::arg("level"),
               nb::arg("shift"), nb::arg("price"), nb::arg("shrink"), nb::arg("low"), nb::arg("states"),
               nb::arg("h0"), nb::arg("h1"), nb::arg("codes"));
    module.def("path_in_order", &path_in_order, nb::arg("moved"), nb::arg("reference"), nb::arg("mixing"), nb::arg("step"),
               nb::arg("most"), nb::arg("price_of_row"), nb::arg("price_of_column"), nb::arg("row"), nb::arg("level"),
               nb::arg("shift"), nb::arg("price"), nb::arg("shrink"), nb::arg("low"), nb::arg("states"), nb::arg("h0"),
               nb::arg("h1"), nb::arg("codes"), nb::arg("decoded"));
    module.def("priced_in_order", &priced_in_order, nb::arg("moved"), nb::arg("reference"), nb::arg("mixing"), nb::arg("group"),
               nb::arg("scale"), nb::arg("shift"), nb::arg("middle"), nb::arg("zero"), nb::arg("most"),
               nb::arg("price_row"), nb::arg("price_column"), nb::arg("kind"), nb::arg("symbol"), nb::arg("low"),
               nb::arg("prices"), nb::arg("codes"), nb::arg("decoded"));
}
