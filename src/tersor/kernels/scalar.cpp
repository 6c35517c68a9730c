// Compiled twins of tersor/kernels/reference.py, for scalar grids. Row-independent and free of threads: callers hand
// over chunks of rows and run several at once; the interpreter lock is released meanwhile.
//
// Run-time dispatch: the loops are cloned for AVX-512, AVX2 and the baseline, and the loader picks one (GCC and clang's
// target_clones). Contraction to fused multiply-add is off (see CMakeLists.txt), so that every clone and the torch
// version give the same bits.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <stdexcept>
#include <vector>

namespace nb = nanobind;
using nb::ndarray;

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define TERSOR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TERSOR_CLONES
#endif

using MatF = ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using VecF = ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using VecI = ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutF = ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutV = ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutI = ndarray<int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

static void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

// Rows are handled in strips of this many, transposed, so that one column of a strip is contiguous and vectorises.
constexpr size_t STRIP = 16;

struct Grid {
    const float* scale;   // (rows, groups)
    const float* zero;    // (rows, groups) or null
    const float* offset;  // (rows, groups) or null
    const float* table;   // (rows or 1, levels) or null
    size_t groups, levels, table_stride;
};

// Position of x among the middles of a sorted table: how many middles are < x (torch.searchsorted's left rule).
static inline int place(const float* table, size_t levels, float x) {
    size_t low = 0, size = levels - 1;
    while (size > 0) {
        size_t half = size / 2;
        float middle = (table[low + half] + table[low + half + 1]) * 0.5f;
        if (middle < x) {
            low += half + 1;
            size -= half + 1;
        } else {
            size = half;
        }
    }
    return static_cast<int>(low);
}

TERSOR_CLONES
static void sequential_strip(const float* target, const float* reference, const float* mixing, const int64_t* group_of,
                             const Grid& grid, size_t row0, size_t rows, size_t n, float* strip, int32_t* codes,
                             float* values, float* moved) {
    const float top = static_cast<float>(grid.levels - 1);
    for (size_t j = 0; j < n; ++j)
        for (size_t r = 0; r < STRIP; ++r) strip[j * STRIP + r] = r < rows ? target[(row0 + r) * n + j] : 0.0f;
    float change[STRIP], scale[STRIP], zero[STRIP], offset[STRIP], value[STRIP], code[STRIP];
    for (size_t j = 0; j < n; ++j) {
        float* t = strip + j * STRIP;
        const size_t g = static_cast<size_t>(group_of[j]);
        for (size_t r = 0; r < STRIP; ++r) {
            const size_t row = row0 + (r < rows ? r : 0);
            scale[r] = grid.scale[row * grid.groups + g];
            zero[r] = grid.zero ? grid.zero[row * grid.groups + g] : 0.0f;
            offset[r] = grid.offset ? grid.offset[row * grid.groups + g] : 0.0f;
        }
        if (grid.offset) {
            for (size_t r = 0; r < STRIP; ++r) {
                float c = std::nearbyint((t[r] + offset[r]) / scale[r] + zero[r]);
                c = c < 0.0f ? 0.0f : (c > top ? top : c);
                code[r] = c;
                value[r] = (c - zero[r]) * scale[r] - offset[r];
            }
        } else if (grid.zero) {
            for (size_t r = 0; r < STRIP; ++r) {
                float c = std::nearbyint(t[r] / scale[r] + zero[r]);
                c = c < 0.0f ? 0.0f : (c > top ? top : c);
                code[r] = c;
                value[r] = (c - zero[r]) * scale[r];
            }
        } else {
            for (size_t r = 0; r < STRIP; ++r) {
                const float* table = grid.table + (row0 + (r < rows ? r : 0)) * grid.table_stride;
                const int c = place(table, grid.levels, t[r] / scale[r]);
                code[r] = static_cast<float>(c);
                value[r] = table[c] * scale[r];
            }
        }
        for (size_t r = 0; r < rows; ++r) {
            const size_t at = (row0 + r) * n + j;
            codes[at] = static_cast<int32_t>(code[r]);
            values[at] = value[r];
            moved[at] = t[r];
        }
        for (size_t r = 0; r < STRIP; ++r) change[r] = r < rows ? value[r] - reference[(row0 + r) * n + j] : 0.0f;
        const float* mix = mixing + j * n;
        for (size_t k = j + 1; k < n; ++k) {
            float* later = strip + k * STRIP;
            const float m = mix[k];
            for (size_t r = 0; r < STRIP; ++r) later[r] += change[r] * m;
        }
    }
}

static void sequential_round(MatF target, MatF reference, MatF mixing, VecI group_of, MatF scale,
                             std::optional<MatF> zero, std::optional<MatF> table, int levels, OutI codes, OutF values,
                             OutF moved, std::optional<MatF> offset) {
    const size_t rows = target.shape(0), n = target.shape(1);
    require(reference.shape(0) == rows && reference.shape(1) == n, "reference must have the shape of target");
    require(mixing.shape(0) == n && mixing.shape(1) == n, "mixing must be (n, n)");
    require(group_of.shape(0) == n, "group_of must have one entry a column");
    require(scale.shape(0) == rows, "scale must have one row a row of target");
    require(zero.has_value() != table.has_value(), "give zero or table, not both or neither");
    require(levels >= 2, "levels must be at least 2");
    require(codes.shape(0) == rows && codes.shape(1) == n && values.shape(0) == rows && values.shape(1) == n &&
                moved.shape(0) == rows && moved.shape(1) == n,
            "outputs must have the shape of target");
    const size_t groups = scale.shape(1);
    for (size_t j = 0; j < n; ++j)
        require(group_of.data()[j] >= 0 && static_cast<size_t>(group_of.data()[j]) < groups, "group number out of range");
    if (zero) require(zero->shape(0) == rows && zero->shape(1) == groups, "zero must have the shape of scale");
    require(!offset || zero, "offset goes with zero");
    if (offset) require(offset->shape(0) == rows && offset->shape(1) == groups, "offset must have the shape of scale");
    Grid grid{scale.data(), zero ? zero->data() : nullptr, offset ? offset->data() : nullptr,
              table ? table->data() : nullptr, groups, static_cast<size_t>(levels), 0};
    if (table) {
        require(table->shape(1) == grid.levels, "table must have `levels` columns");
        require(table->shape(0) == 1 || table->shape(0) == rows, "table must have one row, or one a row of target");
        grid.table_stride = table->shape(0) == 1 ? 0 : grid.levels;
    }
    nb::gil_scoped_release release;
    std::vector<float> strip(n * STRIP);
    for (size_t row0 = 0; row0 < rows; row0 += STRIP)
        sequential_strip(target.data(), reference.data(), mixing.data(), group_of.data(), grid, row0,
                         std::min(STRIP, rows - row0), n, strip.data(), codes.data(), values.data(), moved.data());
}

// Sums in a fixed order of 16 lanes, whatever the vector width.
TERSOR_CLONES
static float uniform_loss(const float* w, const float* importance, size_t n, float scale, float zero, float top) {
    float lanes[16] = {0};
    size_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (size_t l = 0; l < 16; ++l) {
            float c = std::nearbyint(w[i + l] / scale + zero);
            c = c < 0.0f ? 0.0f : (c > top ? top : c);
            const float e = w[i + l] - (c - zero) * scale;
            lanes[l] += importance[i + l] * e * e;
        }
    for (size_t l = 0; i < n; ++i, ++l) {
        float c = std::nearbyint(w[i] / scale + zero);
        c = c < 0.0f ? 0.0f : (c > top ? top : c);
        const float e = w[i] - (c - zero) * scale;
        lanes[l] += importance[i] * e * e;
    }
    float sum = 0.0f;
    for (float lane : lanes) sum += lane;
    return sum;
}

static void fit_uniform(MatF weight, MatF importance, int levels, bool asymmetric, VecF shrinks, OutV scales,
                        OutV zeros) {
    const size_t rows = weight.shape(0), n = weight.shape(1);
    require(importance.shape(1) == n && (importance.shape(0) == 1 || importance.shape(0) == rows),
            "importance must be (1, group) or (rows, group)");
    require(scales.shape(0) == rows && zeros.shape(0) == rows, "outputs must have one entry a row");
    require(levels >= 2, "levels must be at least 2");
    const size_t stride = importance.shape(0) == 1 ? 0 : n;
    const float top = static_cast<float>(levels - 1), tiny = std::ldexp(1.0f, -24);
    nb::gil_scoped_release release;
    for (size_t r = 0; r < rows; ++r) {
        const float* w = weight.data() + r * n;
        float low = 0.0f, high = 0.0f;
        for (size_t i = 0; i < n; ++i) {
            low = std::min(low, w[i]);
            high = std::max(high, w[i]);
        }
        if (!asymmetric) {
            high = std::max(high, -low);
            low = -high;
        }
        float best = std::numeric_limits<float>::infinity(), best_scale = 0.0f, best_zero = 0.0f;
        for (size_t s = 0; s < shrinks.shape(0); ++s) {
            const float shrink = shrinks.data()[s];
            const float scale = std::max((high - low) * shrink / top, tiny);
            float zero = top / 2;
            if (asymmetric) zero = std::clamp(std::nearbyint(-(low * shrink) / scale), 0.0f, top);
            const float loss = uniform_loss(w, importance.data() + r * stride, n, scale, zero, top);
            if (loss < best) {
                best = loss;
                best_scale = scale;
                best_zero = zero;
            }
        }
        scales.data()[r] = best_scale;
        zeros.data()[r] = best_zero;
    }
}

NB_MODULE(_cpu, module) {
    module.doc() = "Compiled inner loops; see tersor.kernels.reference for what they compute.";
    module.def("sequential_round", &sequential_round, nb::arg("target"), nb::arg("reference"), nb::arg("mixing"),
               nb::arg("group_of"), nb::arg("scale"), nb::arg("zero").none(), nb::arg("table").none(),
               nb::arg("levels"), nb::arg("codes"), nb::arg("values"), nb::arg("moved"),
               nb::arg("offset").none() = nb::none());
    module.def("fit_uniform", &fit_uniform, nb::arg("weight"), nb::arg("importance"), nb::arg("levels"),
               nb::arg("asymmetric"), nb::arg("shrinks"), nb::arg("scales"), nb::arg("zeros"));
}
