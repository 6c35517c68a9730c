// Compiled twin of tersor/kernels/reference_trellis.py: Viterbi search for tail-biting bit-shift trellises, one tile of
// one column after another. Free of threads; the interpreter lock is released meanwhile. Clones and contraction as in
// scalar.cpp: every clone and the torch version give the same bits.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

namespace nb = nanobind;
using nb::ndarray;

#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__)
#define TERSOR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define TERSOR_CLONES
#endif
#if defined(__GNUC__)
#define TERSOR_INLINE inline __attribute__((always_inline))
#define TERSOR_RESTRICT __restrict__
#else
#define TERSOR_INLINE inline
#define TERSOR_RESTRICT
#endif

using MatF = ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using VecF = ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutF = ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutI = ndarray<int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

namespace {

void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

struct Trellis {
    const float* values;  // (1 << window): the value of each state
    int bits, window;
    size_t states, groups;  // a group: the states that share all but their oldest, or all but their newest, bits
};

#if defined(__GNUC__) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector) && __has_builtin(__builtin_convertvector)
#define TERSOR_VECTORS
#endif
#endif

#if defined(TERSOR_VECTORS)
// Eight lanes: on AVX-512 as fast as sixteen, which AVX2 splits badly.
typedef float Floats __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(8), aligned(1), may_alias));
constexpr size_t LANES = 8;

// Successors `Block * 8 ...` of the 8 groups whose least costs are `low`: each group has K of them.
template <int K, int Block, int... Lane>
TERSOR_INLINE void spread(const float* values, float* cost, Floats low, float x, float scale,
                          std::integer_sequence<int, Lane...>) {
    const Floats repeated = __builtin_shufflevector(low, low, (Block * 8 + Lane) / K...);
    const Floats error = x - scale * *reinterpret_cast<const Floats*>(values + Block * 8);
    *reinterpret_cast<Floats*>(cost + Block * 8) = repeated + error * error;
}

template <int K, int... Block>
TERSOR_INLINE void spread_all(const float* values, float* cost, Floats low, float x, float scale,
                              std::integer_sequence<int, Block...>) {
    (spread<K, Block>(values, cost, low, x, scale, std::make_integer_sequence<int, 8>{}), ...);
}
#endif

// One row: `cost` becomes the least cost of reaching each state, `back` the oldest bits of the best predecessor of each
// group of successors. Ties go to the lowest predecessor.
template <int K>
TERSOR_INLINE void advance(const float* TERSOR_RESTRICT values, float* TERSOR_RESTRICT cost,
                           float* TERSOR_RESTRICT least, uint8_t* TERSOR_RESTRICT back, size_t groups, float x,
                           float scale) {
    size_t g = 0;
#if defined(TERSOR_VECTORS)
    for (; g + LANES <= groups; g += LANES) {
        Floats low = *reinterpret_cast<const Floats*>(cost + g);
        Ints from = {};
        for (int q = 1; q < K; ++q) {
            const Floats other = *reinterpret_cast<const Floats*>(cost + q * groups + g);
            from = other < low ? Ints{} + q : from;
            low = other < low ? other : low;
        }
        *reinterpret_cast<Floats*>(least + g) = low;
        *reinterpret_cast<Bytes*>(back + g) = __builtin_convertvector(from, Bytes);
    }
#endif
    for (; g < groups; ++g) {
        float low = cost[g];
        int from = 0;
        for (int q = 1; q < K; ++q) {
            const float other = cost[q * groups + g];
            from = other < low ? q : from;
            low = other < low ? other : low;
        }
        least[g] = low;
        back[g] = static_cast<uint8_t>(from);
    }
    g = 0;
#if defined(TERSOR_VECTORS)
    for (; g + LANES <= groups; g += LANES)
        spread_all<K>(values + g * K, cost + g * K, *reinterpret_cast<const Floats*>(least + g), x, scale,
                      std::make_integer_sequence<int, K>{});
#endif
    for (; g < groups; ++g)
        for (int u = 0; u < K; ++u) {
            const float error = x - scale * values[g * K + u];
            cost[g * K + u] = least[g] + error * error;
        }
}

// `count` rows from `cost` on. `back` gets `groups` bytes for each row from row `skip` on.
TERSOR_CLONES
void run(const Trellis& t, const float* x, const float* scale, size_t count, size_t skip, float* cost, float* least,
         uint8_t* back) {
    for (size_t i = 0; i < count; ++i) {
        // Rows before `skip` need no way back: their bytes are overwritten.
        uint8_t* row = back + (i < skip ? 0 : i - skip) * t.groups;
        switch (t.bits) {
            case 1: advance<2>(t.values, cost, least, row, t.groups, x[i], scale[i]); break;
            case 2: advance<4>(t.values, cost, least, row, t.groups, x[i], scale[i]); break;
            case 3: advance<8>(t.values, cost, least, row, t.groups, x[i], scale[i]); break;
            default: advance<16>(t.values, cost, least, row, t.groups, x[i], scale[i]); break;
        }
    }
}

// Memory that begins at a cache line, so that no vector crosses one.
template <typename T>
class Lines {
   public:
    explicit Lines(size_t count) : store_(count * sizeof(T) + 64) {}
    T* data() {
        const auto at = reinterpret_cast<uintptr_t>(store_.data());
        return reinterpret_cast<T*>(store_.data() + (64 - at % 64) % 64);
    }

   private:
    std::vector<unsigned char> store_;
};

struct Work {
    Lines<float> cost, least, values;
    Lines<uint8_t> back;
    std::vector<float> x, scale;
};

inline size_t previous(const Trellis& t, size_t state, const uint8_t* back) {
    const size_t group = state >> t.bits;
    return (static_cast<size_t>(back[group]) << (t.window - t.bits)) | group;
}

// The best path around a ring of `rows` rows that is in `state` before row `from`; `stride` is between rows.
void ring(const Trellis& t, const float* target, const float* scale, size_t rows, size_t stride, size_t from,
          size_t state, Work& w, int32_t* path) {
    for (size_t i = 0; i < rows; ++i) {
        const size_t row = (from + i) % rows;
        w.x[i] = target[row * stride];
        w.scale[i] = scale[row];
    }
    float* cost = w.cost.data();
    std::fill(cost, cost + t.states, std::numeric_limits<float>::infinity());
    cost[state] = 0.0f;
    run(t, w.x.data(), w.scale.data(), rows, 0, cost, w.least.data(), w.back.data());
    for (size_t i = rows; i-- > 0;) {
        path[(from + i) % rows * stride] = static_cast<int32_t>(state);
        state = previous(t, state, w.back.data() + i * t.groups);
    }
}

// The states along the path found for one column of a tile of `rows` rows; `stride` is between rows.
void one_path(const Trellis& t, const float* target, const float* scale, size_t rows, size_t stride, size_t context,
              int turns, Work& w, int32_t* path) {
    // First the state at the seam, from a free search over the rows around it.
    for (size_t i = 0; i < 2 * context; ++i) {
        const size_t row = (i + rows - context % rows) % rows;
        w.x[i] = target[row * stride];
        w.scale[i] = scale[row];
    }
    float* cost = w.cost.data();
    std::fill(cost, cost + t.states, 0.0f);
    run(t, w.x.data(), w.scale.data(), 2 * context, context, cost, w.least.data(), w.back.data());
    size_t state = static_cast<size_t>(std::min_element(cost, cost + t.states) - cost);
    for (size_t i = context; i-- > 0;) state = previous(t, state, w.back.data() + i * t.groups);
    // Then the best path that begins and ends there; and from where that is on the far side of the ring, and so on.
    ring(t, target, scale, rows, stride, 0, state, w, path);
    for (int turn = 1; turn < turns; ++turn) {
        const size_t from = turn % 2 ? rows / 2 : 0;
        ring(t, target, scale, rows, stride, from, static_cast<size_t>(path[(from + rows - 1) % rows * stride]), w,
             path);
    }
}

// What both entry points check and set up for tiles of `rows` rows.
class Search {
   public:
    Search(VecF scale, VecF values, int bits, int window, size_t rows, size_t tile, size_t context, int turns)
        : states_(size_t{1} << window),
          longest_(std::min(tile, rows)),
          w_{Lines<float>(states_), Lines<float>(states_ >> bits), Lines<float>(states_),
             Lines<uint8_t>(std::max(longest_, context) * (states_ >> bits)),
             std::vector<float>(std::max(longest_, 2 * context)), std::vector<float>(std::max(longest_, 2 * context))},
          t_{w_.values.data(), bits, window, states_, states_ >> bits},
          scale_(scale.data()),
          context_(context),
          turns_(turns) {
        std::copy(values.data(), values.data() + states_, w_.values.data());
    }

    // Column `column` of the `rows` rows from `first` on.
    void operator()(const float* target, size_t first, size_t rows, size_t column, size_t columns, int32_t* path) {
        const size_t at = first * columns + column;
        one_path(t_, target + at, scale_ + first, rows, columns, context_, turns_, w_, path + at);
    }

    const float* values() { return w_.values.data(); }

   private:
    size_t states_, longest_;
    Work w_;
    Trellis t_;
    const float* scale_;
    size_t context_;
    int turns_;
};

void check(size_t rows, size_t scales, size_t values, int bits, int window, size_t tile, size_t context, int turns) {
    require(bits >= 1 && bits <= 4 && window >= 2 * bits && window <= 16, "bits must be 1 to 4, window 2 bits to 16");
    require(values == size_t{1} << window, "values must have one entry a state");
    require(scales == rows, "scale must have one entry a row of target");
    require(tile >= 1 && context >= 1 && turns >= 1, "tile, context and turns must be at least 1");
    const size_t last = rows % tile ? rows % tile : tile;
    require(rows == 0 || std::min(last, rows) * static_cast<size_t>(bits) >= static_cast<size_t>(window),
            "a tile must hold a whole window");
}

void trellis_search(MatF target, VecF scale, VecF values, int bits, int window, size_t tile, size_t context,
                    int turns, OutI path) {
    const size_t rows = target.shape(0), columns = target.shape(1);
    check(rows, scale.shape(0), values.shape(0), bits, window, tile, context, turns);
    require(path.shape(0) == rows && path.shape(1) == columns, "path must have the shape of target");
    nb::gil_scoped_release release;
    Search search(scale, values, bits, window, rows, tile, context, turns);
    for (size_t first = 0; first < rows; first += tile)
        for (size_t column = 0; column < columns; ++column)
            search(target.data(), first, std::min(tile, rows - first), column, columns, path.data());
}

// What a column's rounding changes, onto the columns after it.
TERSOR_CLONES
void push(float change, const float* TERSOR_RESTRICT mixing, float* TERSOR_RESTRICT moved, size_t count) {
    for (size_t k = 0; k < count; ++k) moved[k] += change * mixing[k];
}

void trellis_in_order(OutF moved, MatF reference, MatF mixing, VecF scale, VecF values, int bits, int window,
                      size_t tile, size_t context, int turns, OutI path, OutF decoded) {
    const size_t rows = moved.shape(0), columns = moved.shape(1);
    check(rows, scale.shape(0), values.shape(0), bits, window, tile, context, turns);
    require(path.shape(0) == rows && path.shape(1) == columns, "path must have the shape of moved");
    require(decoded.shape(0) == rows && decoded.shape(1) == columns, "decoded must have the shape of moved");
    require(reference.shape(0) == rows && reference.shape(1) == columns, "reference must have the shape of moved");
    require(mixing.shape(0) == columns && mixing.shape(1) == columns, "mixing must be columns x columns");
    nb::gil_scoped_release release;
    Search search(scale, values, bits, window, rows, tile, context, turns);
    for (size_t first = 0; first < rows; first += tile) {
        const size_t count = std::min(tile, rows - first);
        for (size_t j = 0; j < columns; ++j) {
            search(moved.data(), first, count, j, columns, path.data());
            for (size_t row = first; row < first + count; ++row) {
                const size_t at = row * columns + j;
                const float value = search.values()[path.data()[at]] * scale.data()[row];
                decoded.data()[at] = value;
                push(value - reference.data()[at], mixing.data() + j * columns + j + 1, moved.data() + at + 1,
                     columns - j - 1);
            }
        }
    }
}

}  // namespace

NB_MODULE(_trellis, module) {
    module.doc() = "Compiled trellis search; see tersor.kernels.reference_trellis for what it computes.";
    module.def("trellis_search", &trellis_search, nb::arg("target"), nb::arg("scale"), nb::arg("values"),
               nb::arg("bits"), nb::arg("window"), nb::arg("tile"), nb::arg("context"), nb::arg("turns"),
               nb::arg("path"));
    module.def("trellis_in_order", &trellis_in_order, nb::arg("moved"), nb::arg("reference"), nb::arg("mixing"),
               nb::arg("scale"), nb::arg("values"), nb::arg("bits"), nb::arg("window"), nb::arg("tile"),
               nb::arg("context"), nb::arg("turns"), nb::arg("path"), nb::arg("decoded"));
}
