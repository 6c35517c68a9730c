// The search for the cheapest path through the trellis of entropy-coded trellis-coded quantization. Compiled twin of
// tersor/kernels/reference_ectcq.py, which says what is computed; the same bits come out.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
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

static void path(MatF target, VecF lambda, VecF weight, VecI row, VecI level, int shift, CubeF price, MatF shrink, VecI low,
                 int states, int h0, int h1, OutI codes) {
    const size_t columns = target.shape(0), rows = target.shape(1), count = price.shape(0);
    const bool ok = lambda.shape(0) == rows && weight.shape(0) == columns && row.shape(0) == rows && level.shape(0) == columns && count > 0 &&
                    price.shape(1) == 2 && price.shape(2) == SYMBOLS && shrink.shape(0) == count &&
                    shrink.shape(1) == SHRINKS && low.shape(0) == count && codes.shape(0) == columns &&
                    codes.shape(1) == rows && states >= 1 && states <= 4096 && (states & (states - 1)) == 0 &&
                    shift >= 0 && shift < 16;
    if (!ok) throw std::invalid_argument("arguments of a trellis path must have matching shapes");
    const auto bad = [](int32_t v) { return v < -65536 || v > 65535; };
    if (std::any_of(row.data(), row.data() + rows, bad) || std::any_of(level.data(), level.data() + columns, bad))
        throw std::invalid_argument("a level out of range");
    nb::gil_scoped_release release;
    const Trellis trellis(states, h0, h1);
    std::vector<Model> models;
    for (size_t c = 0; c < count; ++c)
        models.push_back({price.data() + c * 2 * SYMBOLS, shrink.data() + c * SHRINKS, low.data()[c]});
    std::vector<float> cost(states), next(states);
    std::vector<uint8_t> choice(rows * states);
    std::vector<int32_t> best(rows * 4);
    for (size_t j = 0; j < columns; ++j)
        column(target.data() + j * rows, rows, lambda.data(), weight.data()[j], row.data(), level.data()[j], shift, models, trellis,
               cost.data(), next.data(), choice.data(), best.data(), codes.data() + j * rows);
}

void bind_ectcq(nb::module_& module) {
    module.def("path", &path, nb::arg("target"), nb::arg("price_of_row"), nb::arg("price_of_column"), nb::arg("row"), nb::arg("level"),
               nb::arg("shift"), nb::arg("price"), nb::arg("shrink"), nb::arg("low"), nb::arg("states"),
               nb::arg("h0"), nb::arg("h1"), nb::arg("codes"));
}
