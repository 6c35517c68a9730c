// Second moments of bfloat16 inputs, sums of x xᵀ over tokens, in float32. A product of two bfloat16 numbers is exact in
// float32, so instructions that multiply pairs of them give what float32 products would, in half the time; and as the
// result is symmetric, half of it is computed.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace nb = nanobind;

#if defined(__x86_64__) && defined(__GNUC__)
#define TERSOR_X86
#include <immintrin.h>
#define TERSOR_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#endif

using Inputs = nb::ndarray<const uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Moment = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

namespace {

bool supported() {
#ifdef TERSOR_X86
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

#ifdef TERSOR_X86
// Columns in one panel, three vectors; rows of the result that are summed together, 24 vectors of sums; and pairs of
// tokens after which sums are put down: a panel of so many stays in the first cache.
constexpr int64_t WIDE = 48, TALL = 8, DEEP = 128;
constexpr int VECTORS = WIDE / 16;

__mmask16 first_lanes(int64_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// Inputs (tokens, columns) as pairs of tokens side by side, in panels (pairs, WIDE) of columns; zeros where there are none.
TERSOR_TARGET void lay_out(const uint16_t* inputs, int64_t tokens, int64_t columns, uint32_t* panels) {
    const int64_t pairs = (tokens + 1) / 2;
    for (int64_t column = 0; column < columns; column += WIDE)
        for (int64_t pair = 0; pair < pairs; ++pair)
            for (int v = 0; v < VECTORS; ++v, panels += 16) {
                const __mmask16 here = first_lanes(columns - column - 16 * v);
                const uint16_t* from = inputs + 2 * pair * columns + column + 16 * v;
                __m512i both = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, from));
                if (2 * pair + 1 < tokens) {
                    const __m512i second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, from + columns));
                    both = _mm512_or_si512(both, _mm512_slli_epi32(second, 16));
                }
                _mm512_storeu_si512(panels, both);
            }
}

// Adds the products of TALL columns, which `left` points at in their panel, and of the panel `right` to `sums`, whose rows
// lie `stride` apart; of these `rows` rows and `columns` columns are there. `fresh`: to zero instead.
TERSOR_TARGET void add_tile(const uint32_t* left, const uint32_t* right, int64_t pairs, float* sums, int64_t stride,
                            int64_t rows, int64_t columns, bool fresh) {
    __mmask16 here[VECTORS];
    __m512 sum[TALL][VECTORS];
    for (int v = 0; v < VECTORS; ++v) here[v] = first_lanes(columns - 16 * v);
    for (int64_t r = 0; r < TALL; ++r)
        for (int v = 0; v < VECTORS; ++v)
            sum[r][v] = r < rows && !fresh ? _mm512_maskz_loadu_ps(here[v], sums + r * stride + 16 * v) : _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; ++pair, left += WIDE, right += WIDE) {
        __m512bh of_right[VECTORS];
        for (int v = 0; v < VECTORS; ++v) of_right[v] = (__m512bh)_mm512_loadu_si512(right + 16 * v);
        for (int64_t r = 0; r < TALL; ++r) {
            const __m512bh of_left = (__m512bh)_mm512_set1_epi32(static_cast<int>(left[r]));
            for (int v = 0; v < VECTORS; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], of_left, of_right[v]);
        }
    }
    for (int64_t r = 0; r < std::min(rows, TALL); ++r)
        for (int v = 0; v < VECTORS; ++v) _mm512_mask_storeu_ps(sums + r * stride + 16 * v, here[v], sum[r][v]);
}

void add_all(const uint16_t* inputs, int64_t tokens, int64_t columns, float* sums) {
    const int64_t panels = (columns + WIDE - 1) / WIDE;
    std::vector<uint32_t> held(static_cast<size_t>(panels * WIDE * DEEP) + 16);
    // Vectors that cross no line of the cache.
    uint32_t* laid = held.data() + (64 - reinterpret_cast<uintptr_t>(held.data()) % 64) % 64 / 4;
    for (int64_t token = 0; token < tokens; token += 2 * DEEP) {
        const int64_t count = std::min(tokens - token, 2 * DEEP), pairs = (count + 1) / 2;
        lay_out(inputs + token * columns, count, columns, laid);
        for (int64_t panel = 0; panel < panels; ++panel)
            for (int64_t row = 0; row < std::min((panel + 1) * WIDE, columns); row += TALL)
                add_tile(laid + row / WIDE * pairs * WIDE + row % WIDE, laid + panel * pairs * WIDE, pairs,
                         sums + row * columns + panel * WIDE, columns, columns - row, columns - panel * WIDE, token == 0);
    }
}

// What is below the diagonal, from what is above it, in squares that stay in the first cache.
void mirror(float* sums, int64_t columns) {
    constexpr int64_t side = 16;
    for (int64_t top = 0; top < columns; top += side)
        for (int64_t left = 0; left <= top; left += side)
            for (int64_t i = top; i < std::min(top + side, columns); ++i)
                for (int64_t j = left; j < std::min(left + side, i); ++j) sums[i * columns + j] = sums[j * columns + i];
}
#endif

// `inputs (tokens, columns)`: bits of bfloat16 numbers. Fills `moment (columns, columns)`.
void bfloat16_moment(Inputs inputs, Moment moment) {
    if (!supported()) throw std::invalid_argument("this processor has no products of bfloat16 numbers");
    const size_t columns = inputs.shape(1);
    if (moment.shape(0) != columns || moment.shape(1) != columns)
        throw std::invalid_argument("moment must have one row and one column a column of inputs");
#ifdef TERSOR_X86
    nb::gil_scoped_release release;
    if (inputs.shape(0) == 0) std::fill_n(moment.data(), columns * columns, 0.0f);
    add_all(inputs.data(), static_cast<int64_t>(inputs.shape(0)), static_cast<int64_t>(columns), moment.data());
    mirror(moment.data(), static_cast<int64_t>(columns));
#endif
}

}  // namespace

void bind_moment(nb::module_& module) {
    module.def("multiplies_bfloat16", &supported);
    module.def("bfloat16_moment", &bfloat16_moment, nb::arg("inputs"), nb::arg("moment"));
}
