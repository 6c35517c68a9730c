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

// Columns whose changes are held until all of them are known, and then added to each later column at one time; in the
// same order as one by one, so with the same bits.
constexpr size_t HELD = 8;

#if defined(__GNUC__)
// A column of a strip, wherever it lies. Compilers make it of as many vectors as the processor needs.
typedef float Column __attribute__((vector_size(STRIP * sizeof(float)), aligned(alignof(float)), may_alias));
#else
struct Column {
    float lanes[STRIP];
    Column& operator+=(const Column& other) {
        for (size_t r = 0; r < STRIP; ++r) lanes[r] += other.lanes[r];
        return *this;
    }
    Column operator*(float by) const {
        Column result;
        for (size_t r = 0; r < STRIP; ++r) result.lanes[r] = lanes[r] * by;
        return result;
    }
};
#endif

struct Grid {
    const float* scale;   // (rows, groups)
    const float* zero;    // (rows, groups) or null
    const float* offset;  // (rows, groups) or null
    const float* table;   // (rows or 1, levels or groups * levels) or null
    size_t groups, levels;
    size_t table_row, table_group;  // entries from one row's, or group's, table to the next; 0 where they share one
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
    float held[HELD][STRIP], scale[STRIP], zero[STRIP], offset[STRIP], value[STRIP], code[STRIP];
    for (size_t j = 0; j < n; ++j) {
        float* change = held[j % HELD];
        float* t = strip + j * STRIP;
        const size_t g = static_cast<size_t>(group_of[j]);
        for (size_t r = 0; r < STRIP && (j == 0 || group_of[j] != group_of[j - 1]); ++r) {
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
                const size_t row = row0 + (r < rows ? r : 0);
                const float* table = grid.table + row * grid.table_row + g * grid.table_group;
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
        Column* columns = reinterpret_cast<Column*>(strip);
        const Column* changes = reinterpret_cast<const Column*>(held[0]);
        const size_t stop = std::min((j / HELD + 1) * HELD, n);
        for (size_t k = j + 1; k < stop; ++k) columns[k] += changes[j % HELD] * mixing[j * n + k];
        if (j + 1 < stop || stop == n) continue;
        const float* mix = mixing + (stop - HELD) * n;
        const Column c0 = changes[0], c1 = changes[1], c2 = changes[2], c3 = changes[3];
        const Column c4 = changes[4], c5 = changes[5], c6 = changes[6], c7 = changes[7];
        for (size_t k = stop; k < n; ++k) {
            Column sum = columns[k];
            sum += c0 * mix[k];
            sum += c1 * mix[n + k];
            sum += c2 * mix[2 * n + k];
            sum += c3 * mix[3 * n + k];
            sum += c4 * mix[4 * n + k];
            sum += c5 * mix[5 * n + k];
            sum += c6 * mix[6 * n + k];
            sum += c7 * mix[7 * n + k];
            columns[k] = sum;
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
              table ? table->data() : nullptr, groups, static_cast<size_t>(levels), 0, 0};
    if (table) {
        const size_t width = table->shape(1);
        require(width == grid.levels || width == groups * grid.levels,
                "table must have `levels` columns, or as many for each group");
        require(table->shape(0) == 1 || table->shape(0) == rows, "table must have one row, or one a row of target");
        grid.table_row = table->shape(0) == 1 ? 0 : width;
        grid.table_group = width == grid.levels ? 0 : grid.levels;
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

// Of a group's codes on a grid and on its mirror image: overlap with the weights and energy, each times importance. Sums
// in a fixed order of 16 lanes, as above.
struct SignedSums {
    float overlap[2], energy[2];
};

TERSOR_CLONES
static SignedSums signed_sums(const float* w, const float* importance, size_t n, float step, float half) {
    float straight[16] = {0}, mirrored[16] = {0}, energy[16] = {0}, mirrored_energy[16] = {0};
    const float low = -half, inner_low = 1.0f - half, inner_high = half - 1.0f;
    float last[16] = {0}, last_importance[16] = {0};
    for (size_t i = 0; i < n; i += 16) {
        const float *x = w + i, *weight = importance + i;
        if (n - i < 16) {
            std::copy(x, w + n, last);
            std::copy(weight, importance + n, last_importance);
            x = last;
            weight = last_importance;
        }
        for (size_t l = 0; l < 16; ++l) {
            const float number = std::nearbyint(x[l] / step), weighted = weight[l] * x[l];
            float code = number < low ? low : number, other = number > half ? half : number;
            code = code > inner_high ? inner_high : code;
            other = other < inner_low ? inner_low : other;
            straight[l] += weighted * code;
            mirrored[l] += weighted * other;
            energy[l] += weight[l] * (code * code);
            mirrored_energy[l] += weight[l] * (other * other);
        }
    }
    SignedSums sums{{0.0f, 0.0f}, {0.0f, 0.0f}};
    for (size_t l = 0; l < 16; ++l) {
        sums.overlap[0] += straight[l];
        sums.overlap[1] += mirrored[l];
        sums.energy[0] += energy[l];
        sums.energy[1] += mirrored_energy[l];
    }
    return sums;
}

static void fit_signed(MatF weight, MatF importance, int bits, VecF reaches, OutV scales) {
    const size_t rows = weight.shape(0), n = weight.shape(1);
    require(importance.shape(1) == n && (importance.shape(0) == 1 || importance.shape(0) == rows),
            "importance must be (1, group) or (rows, group)");
    require(scales.shape(0) == rows, "scales must have one entry a row");
    require(bits >= 2 && bits <= 8, "bits must be from 2 to 8");
    const size_t stride = importance.shape(0) == 1 ? 0 : n;
    const float half = std::ldexp(1.0f, bits - 1), tiny = std::ldexp(1.0f, -24);
    nb::gil_scoped_release release;
    for (size_t r = 0; r < rows; ++r) {
        const float* w = weight.data() + r * n;
        float high = 0.0f;
        for (size_t i = 0; i < n; ++i) high = std::max(high, std::fabs(w[i]));
        const float step = std::max(high / half, tiny);
        float best = -1.0f, scale = step;
        for (size_t s = 0; s < reaches.shape(0); ++s) {
            const SignedSums sums = signed_sums(w, importance.data() + r * stride, n, step * reaches.data()[s], half);
            for (int side = 0; side < 2; ++side) {
                const float least_squares = sums.overlap[side] / std::max(sums.energy[side], tiny);
                const float gain = sums.overlap[side] * least_squares;
                if (gain > best) {
                    best = gain;
                    scale = side == 0 ? least_squares : -least_squares;
                }
            }
        }
        scales.data()[r] = std::fabs(scale) < tiny ? tiny : scale;
    }
}

void bind_codebook(nb::module_& module);
void bind_lattice(nb::module_& module);  // lattice.cpp
void bind_moment(nb::module_& module);   // moment.cpp

NB_MODULE(_cpu, module) {
    module.doc() = "Compiled inner loops; see tersor.kernels.reference for what they compute.";
    module.def("sequential_round", &sequential_round, nb::arg("target"), nb::arg("reference"), nb::arg("mixing"),
               nb::arg("group_of"), nb::arg("scale"), nb::arg("zero").none(), nb::arg("table").none(),
               nb::arg("levels"), nb::arg("codes"), nb::arg("values"), nb::arg("moved"),
               nb::arg("offset").none() = nb::none());
    module.def("fit_uniform", &fit_uniform, nb::arg("weight"), nb::arg("importance"), nb::arg("levels"),
               nb::arg("asymmetric"), nb::arg("shrinks"), nb::arg("scales"), nb::arg("zeros"));
    module.def("fit_signed", &fit_signed, nb::arg("weight"), nb::arg("importance"), nb::arg("bits"), nb::arg("reaches"),
               nb::arg("scales"));
    bind_codebook(module);
    bind_lattice(module);
    bind_moment(module);
}
