// Products with packed weights, as tersor.kernels._products. tersor/kernels/products.py says what each of them is.
#include <algorithm>

#include "activations.h"
#include "bind.h"
#include "pool.h"
#include "clones.h"

namespace tersor {
namespace {

Isa best() {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("gfni"))
        return Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return Isa::avx2;
#endif
    return Isa::portable;
}

Isa most = Isa::avx512;

Isa named(const std::string& name) {
    if (name == "portable") return Isa::portable;
    if (name == "avx2") return Isa::avx2;
    require(name == "avx512", "instructions are portable, avx2 or avx512, not " + name);
    return Isa::avx512;
}

const char* name_of(Isa isa) { return isa == Isa::portable ? "portable" : isa == Isa::avx2 ? "avx2" : "avx512"; }

void apply(const Product& product, In<float, 2> x, Out<float, 2> y, int threads, bool int8) {
    require(static_cast<int64_t>(x.shape(1)) == product.columns,
            "inputs have " + std::to_string(x.shape(1)) + " columns, the weight " + std::to_string(product.columns));
    require(x.shape(0) == y.shape(0) && static_cast<int64_t>(y.shape(1)) == product.rows,
            "outputs do not have a row for every input and a column for each of the weight's " +
                std::to_string(product.rows) + " rows");
    nb::gil_scoped_release release;
    const Options options{threads, int8 ? Precision::int8 : Precision::int16};
    product.apply(x.data(), static_cast<int64_t>(x.shape(0)), y.data(), product.rows, options);
}

bool read_rows(const Product& product, In<int64_t, 1> rows, Out<float, 2> to) {
    require(rows.shape(0) == to.shape(0) && static_cast<int64_t>(to.shape(1)) == product.columns,
            "there is not a row of " + std::to_string(product.columns) + " columns for every row asked for");
    for (size_t i = 0; i < rows.shape(0); ++i)
        require(0 <= rows.data()[i] && rows.data()[i] < product.rows,
                "row " + std::to_string(rows.data()[i]) + " is not one of " + std::to_string(product.rows));
    nb::gil_scoped_release release;
    for (size_t i = 0; i < rows.shape(0); ++i)
        if (!product.read_row(rows.data()[i], to.data() + i * product.columns)) return false;
    return true;
}

// Reads all of a buffer, and gives a sum of it so that nothing can leave the reading out: what a product that did nothing
// but fetch its weight would take.
// Four stretches in turn, as products read four rows: more of them are under way at once than of a single one.
TERSOR_CLONES uint64_t read_part(const uint64_t* from, int64_t n) {
    constexpr int STREAMS = 4;
    uint64_t lanes[STREAMS][8] = {};  // many sums at once, as one would wait for itself
    const int64_t each = n / STREAMS / 8 * 8;
    for (int64_t i = 0; i < each; i += 8) {
        for (int s = 0; s < STREAMS; ++s) {
            const uint64_t* here = from + s * each + i;
#if defined(__GNUC__)
            __builtin_prefetch(here + 2048, 0, 2);
            __builtin_prefetch(here + 64, 0, 3);
#endif
            for (int j = 0; j < 8; ++j) lanes[s][j] += here[j];
        }
    }
    uint64_t sum = 0;
    for (int64_t i = STREAMS * each; i < n; ++i) sum += from[i];
    for (const auto& stream : lanes)
        for (const uint64_t lane : stream) sum += lane;
    return sum;
}

uint64_t read_all(In<uint64_t, 1> buffer, int threads) {
    nb::gil_scoped_release release;
    const int64_t words = static_cast<int64_t>(buffer.shape(0)), part = 1 << 18;
    const uint64_t* data = buffer.data();
    std::vector<uint64_t> sums((words + part - 1) / part);
    parallel(static_cast<int64_t>(sums.size()), threads,
             [&](int64_t i) { sums[i] = read_part(data + i * part, std::min(part, words - i * part)); });
    uint64_t sum = 0;
    for (const uint64_t s : sums) sum += s;
    return sum;
}

}  // namespace

Isa isa() {
    static const Isa found = best();
    return found < most ? found : most;
}

void limit_isa(Isa level) { most = level; }

}  // namespace tersor

NB_MODULE(_products, module) {
    using namespace tersor;
    module.doc() = "Products with packed weights; see tersor.kernels.products.";
    nb::class_<Product>(module, "Product")
        .def_ro("rows", &Product::rows)
        .def_ro("columns", &Product::columns)
        .def("apply", &apply, nb::arg("x"), nb::arg("y"), nb::arg("threads"), nb::arg("int8"))
        .def("read_rows", &read_rows, nb::arg("rows"), nb::arg("to"));
    module.def("isa", [] { return name_of(isa()); });
    module.def("limit_isa", [](const std::string& name) { limit_isa(named(name)); });
    module.def("read_all", &read_all, nb::arg("buffer"), nb::arg("threads"));
    bind_row_codes(module);
    bind_step(module);
    bind_dense(module);
    bind_compose(module);
    bind_trellis(module);
    bind_codebook(module);
    bind_gguf(module);
    bind_gguf_grids(module);
    bind_other_rows(module);
}
