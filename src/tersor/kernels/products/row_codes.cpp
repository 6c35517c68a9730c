// See row_codes.h: what is made once, the loops without integer products, and the way in from Python.
#include "row_codes.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "bind.h"
#include "pool.h"
#include "clones.h"
#include "half.h"
#include "together.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace tersor {
namespace {

TERSOR_CLONES void expand_half(const uint16_t* from, int64_t n, float* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = float_of_half(from[i]);
}

TERSOR_CLONES void expand_brain(const uint16_t* from, int64_t n, float* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = float_of_bits(static_cast<uint32_t>(from[i]) << 16);
}

TERSOR_CLONES void expand_bytes(const uint8_t* from, int64_t n, float factor, float* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i] * factor;
}

TERSOR_CLONES int64_t sum_of(const int8_t* from, int64_t n) {
    int32_t sum = 0;  // at most 500000 numbers of 8 bits
    for (int64_t i = 0; i < n; ++i) sum += from[i];
    return sum;
}

// Eight codes from the `bits` bytes that they fill. Reads no byte at or after `end`.
uint64_t eight_bytes(const uint8_t* from, const uint8_t* end, int bits) {
    uint64_t word = 0;
    const int64_t count = std::min<int64_t>(bits, end - from);
    for (int64_t i = 0; i < count; ++i) word |= static_cast<uint64_t>(from[i]) << (8 * i);
    return word;
}

void unpack_zeros(const RowLayout& layout, int64_t row, float* to) {
    const uint8_t* from = layout.zero + row * layout.zero_bytes;
    const uint8_t* end = from + layout.zero_bytes;
    const uint32_t mask = (1u << layout.bits) - 1;
    for (int64_t g = 0; g < layout.groups; g += 8) {
        const uint64_t word = eight_bytes(from + g / 8 * layout.bits, end, layout.bits);
        for (int64_t i = 0; i < std::min<int64_t>(8, layout.groups - g); ++i)
            to[g + i] = static_cast<float>(word >> (i * layout.bits) & mask);
    }
}

}  // namespace

void RowScales::expand(const RowLayout& layout, int64_t row) {
    const int64_t n = layout.groups;
    if (layout.scale == nullptr) {
        std::fill_n(scale.begin(), n, 1.0f);
    } else if (layout.kind == ScaleKind::s8) {
        expand_bytes(static_cast<const uint8_t*>(layout.scale) + row * n, n, float_of_half(layout.super[row]), scale.data());
    } else {
        const uint16_t* from = static_cast<const uint16_t*>(layout.scale) + row * n;
        layout.kind == ScaleKind::fp16 ? expand_half(from, n, scale.data()) : expand_brain(from, n, scale.data());
    }
    if (layout.zero == nullptr) {
        const float middle = layout.middle.size() > 1 ? layout.middle[row] : layout.middle[0];
        for (int64_t g = 0; g < n; ++g) shifted[g] = scale[g] * middle;
        return;
    }
    unpack_zeros(layout, row, shifted.data());
    for (int64_t g = 0; g < n; ++g) shifted[g] *= scale[g];
}

bool same_inputs(const RowLayout& one, const RowLayout& other) {
    return one.columns == other.columns && one.group == other.group && one.slices == other.slices &&
           fits_avx2(one) == fits_avx2(other);
}

RowInputs::RowInputs(const Activations& rounded, const RowLayout& layout)
    : rounded(rounded), padded_groups((layout.groups + 15) / 16 * 16), group_sums(rounded.tokens * padded_groups) {
    if (isa() == Isa::avx512) {
        const int64_t step = 64 * layout.slices;
        if (layout.slices > 1) width = (rounded.columns + step - 1) / step * step;
        inputs_avx512(layout, *this);
        return;
    }
    const bool narrow = isa() == Isa::avx2 && fits_avx2(layout);
    if (narrow) sixteen.resize(rounded.tokens * rounded.width);
    else values.resize(rounded.tokens * rounded.width);
    for (int64_t t = 0; t < rounded.tokens; ++t) {
        for (int64_t g = 0; g < layout.groups; ++g) {
            const int64_t at = g * layout.group;
            int64_t sum = sum_of(rounded.high_of(t) + at, layout.group);
            if (rounded.two_planes) sum = 256 * sum + sum_of(rounded.low_of(t) + at, layout.group);
            group_sums[t * padded_groups + g] = static_cast<float>(sum);
        }
        for (int64_t c = 0; c < rounded.columns; ++c) {
            const int32_t integer = rounded.at(t, c);
            if (narrow) sixteen[t * rounded.width + c] = static_cast<int16_t>(integer);
            else values[t * rounded.width + c] = static_cast<float>(integer);
        }
    }
}

// The loops in floats: codes to floats, eight at a time, times the integers that stand for the inputs. Written once, and
// compiled for AVX2, where eight codes are one pdep, and for any machine.
#define TERSOR_ROWS_IN_FLOATS(NAME, ATTRIBUTES, EIGHT)                                                                \
    ATTRIBUTES void NAME(const RowLayout& layout, const RowInputs& inputs, int64_t first, int64_t last, float* y,     \
                         int64_t stride) {                                                                            \
        const int64_t width = (layout.columns + 7) / 8 * 8, eights = width / 8;                                       \
        std::vector<float> weight(width);                                                                             \
        RowScales scales(layout);                                                                                     \
        for (int64_t r = first; r < last; ++r) {                                                                      \
            const uint8_t* codes = layout.codes + r * layout.row_bytes;                                               \
            const uint8_t* end = codes + layout.row_bytes;                                                            \
            const float* table = layout.values.data() + (layout.tables > 1 ? r * layout.table_width : 0);             \
            for (int64_t e = 0; e < eights; ++e) {                                                                    \
                alignas(8) uint8_t eight[8];                                                                          \
                EIGHT(codes + e * layout.bits, end, layout.bits, eight);                                              \
                if (layout.table_planes > 0)                                                                          \
                    for (int i = 0; i < 8; ++i) weight[8 * e + i] = table[eight[i]];                                  \
                else                                                                                                  \
                    for (int i = 0; i < 8; ++i) weight[8 * e + i] = eight[i];                                         \
            }                                                                                                         \
            scales.expand(layout, r);                                                                                 \
            const float factor = layout.factor.size() > 1 ? layout.factor[r] : layout.factor[0];                      \
            for (int64_t t = 0; t < inputs.rounded.tokens; ++t) {                                                     \
                const float* x = inputs.values.data() + t * inputs.rounded.width;                                     \
                const float* sums = inputs.sums_of(t);                                                                \
                float result = 0.0f;                                                                                  \
                for (int64_t g = 0; g < layout.groups; ++g) {                                                         \
                    const int64_t begin = g * layout.group;                                                           \
                    float lane[16] = {};                                                                              \
                    int64_t c = 0;                                                                                    \
                    for (; c + 16 <= layout.group; c += 16)                                                           \
                        for (int i = 0; i < 16; ++i) lane[i] += weight[begin + c + i] * x[begin + c + i];             \
                    for (int i = 0; c < layout.group; ++c, ++i) lane[i] += weight[begin + c] * x[begin + c];          \
                    for (int half = 8; half > 0; half /= 2)                                                           \
                        for (int i = 0; i < half; ++i) lane[i] += lane[i + half];                                     \
                    result += scales.scale[g] * lane[0] - scales.shifted[g] * sums[g];                                \
                }                                                                                                     \
                y[t * stride + r] = factor * inputs.rounded.scale[t] * result;                                        \
            }                                                                                                         \
        }                                                                                                             \
    }

namespace {

inline void eight_portable(const uint8_t* from, const uint8_t* end, int bits, uint8_t* to) {
    const uint64_t word = eight_bytes(from, end, bits);
    const uint64_t mask = (1u << bits) - 1;
    for (int i = 0; i < 8; ++i) to[i] = static_cast<uint8_t>(word >> (i * bits) & mask);
}

}  // namespace

TERSOR_ROWS_IN_FLOATS(rows_portable, , eight_portable)

#if defined(__x86_64__) && defined(__GNUC__)
namespace {

__attribute__((target("avx2,fma,bmi2"))) inline void eight_by_deposit(const uint8_t* from, const uint8_t* end, int bits,
                                                                      uint8_t* to) {
    uint64_t word;
    if (end - from >= 8)
        std::memcpy(&word, from, 8);
    else
        word = eight_bytes(from, end, bits);
    const uint64_t spread = _pdep_u64(word, 0x0101010101010101ULL * ((1u << bits) - 1));
    std::memcpy(to, &spread, 8);
}

}  // namespace

TERSOR_ROWS_IN_FLOATS(rows_avx2_floats, __attribute__((target("avx2,fma,bmi2"))), eight_by_deposit)
#endif

namespace {

// Entries as integers of one byte where they lie on a grid of at most 256 steps, else of two. `entries` of them, sorted
// or not; they are repeated to the table's width, so that bits above a code's may be anything.
void fit_table(const float* table, int64_t entries, int64_t width, int planes, uint8_t* high, uint8_t* low, float* values,
               float* factor, float* middle) {
    const auto [least, most] = std::minmax_element(table, table + entries);
    const float base = *least, range = *most - *least;
    float step = range / 65535.0f;
    if (planes == 1) {
        step = range;
        for (int64_t i = 0; i < entries; ++i)
            for (int64_t j = 0; j < entries; ++j)
                if (table[i] > table[j]) step = std::min(step, table[i] - table[j]);
    }
    if (!(step > 0.0f)) step = 1.0f;
    for (int64_t i = 0; i < width; ++i) {
        const float u = std::nearbyint((table[i % entries] - base) / step);
        const int32_t whole = static_cast<int32_t>(u);
        low[i] = static_cast<uint8_t>(whole & 0xff);
        if (planes == 2) high[i] = static_cast<uint8_t>(whole >> 8);
        values[i] = u;
    }
    *factor = step;
    *middle = -base / step;
}

bool on_a_byte(const float* table, int64_t entries) {
    const auto [least, most] = std::minmax_element(table, table + entries);
    float step = *most - *least;
    for (int64_t i = 0; i < entries; ++i)
        for (int64_t j = 0; j < entries; ++j)
            if (table[i] > table[j]) step = std::min(step, table[i] - table[j]);
    if (!(step > 0.0f)) return true;
    for (int64_t i = 0; i < entries; ++i) {
        const float u = (table[i] - *least) / step;
        if (u != std::nearbyint(u) || u > 255.0f) return false;
    }
    return true;
}

using Array = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

// The stored tensors stay alive for as long as the product.
struct Stored {
    In<uint8_t, 2> codes;
    std::optional<Array> scale;
    std::optional<In<uint16_t, 2>> super;
    std::optional<In<uint8_t, 2>> zero;
};

struct RowReady final : Ready {
    RowReady(const float* x, int64_t tokens, const RowLayout& layout, const Options& options)
        : rounded(x, tokens, layout.columns, options), inputs(rounded, layout) {}

    const Activations rounded;
    const RowInputs inputs;
};

// Several parts for each thread, as threads are not equally fast, but none too small for its own beginning; whole blocks
// of rows; and for many tokens no more codes than stay near while all tokens take their turn.
int64_t rows_of_part(const RowLayout& layout, int64_t tokens, const Options& options) {
    const int64_t kept = tokens > 4 ? std::max<int64_t>((1 << 18) / layout.row_bytes, 8) : layout.rows;
    const int64_t least = std::max<int64_t>((1 << 14) / layout.row_bytes, 8);
    const int64_t share = options.threads > 1 ? layout.rows / (4 * options.threads) : layout.rows;
    return std::max<int64_t>((std::min(std::max(share, least), kept) + 7) / 8 * 8, 8);
}

class RowCodes final : public Product {
  public:
    RowCodes(RowLayout layout, Stored stored)
        : Product(layout.rows, layout.columns), layout_(std::move(layout)), stored_(std::move(stored)) {}

    void apply(const float* x, int64_t tokens, float* y, int64_t stride, const Options& options) const override {
        apply_in_steps(*this, x, tokens, {y, stride}, options);
    }
    bool in_steps() const override { return true; }
    bool takes_ready_of(const Product& other) const override {
        const auto* codes = dynamic_cast<const RowCodes*>(&other);
        return codes != nullptr && same_inputs(layout_, codes->layout_);
    }
    ReadyPtr ready(const float* x, int64_t tokens, const Options& options) const override {
        return std::make_shared<RowReady>(x, tokens, layout_, options);
    }
    std::unique_ptr<Job> begin(ReadyPtr ready, float* y, int64_t stride, const Options& options) const override {
        const RowLoop loop = isa() == Isa::avx512 ? rows_avx512 : isa() == Isa::avx2 ? rows_avx2 : rows_portable;
        const auto& inputs = static_cast<const RowReady&>(*ready).inputs;
        const int64_t each = rows_of_part(layout_, inputs.rounded.tokens, options);
        const auto rows_from = [this, loop, ready = std::move(ready), &inputs, y, stride](int64_t first, int64_t last) {
            loop(layout_, inputs, first, last, y, stride);
        };
        if (inputs.rounded.tokens > 1) return job_over_rows(rows, each, rows_from);  // codes are read once for each of them
        return job_over_rows(rows, each, rows_from, [this, each](int64_t part) { return at_row(part * each); });
    }
    Beginning beginning(int64_t part, const Options& options) const override {
        return at_row(part * rows_of_part(layout_, 1, options));
    }
    bool read_row(int64_t row, float* to) const override {
        if (layout_.table_planes == 2) return false;  // such tables are rounded for products
        const uint8_t* codes = layout_.codes + row * layout_.row_bytes;
        const uint64_t mask = (1u << layout_.bits) - 1;
        const float* table = layout_.values.data() + (layout_.tables > 1 ? row * layout_.table_width : 0);
        const float factor = layout_.factor.size() > 1 ? layout_.factor[row] : layout_.factor[0];
        RowScales scales(layout_);
        scales.expand(layout_, row);
        for (int64_t c = 0; c < columns; c += 8) {
            const uint64_t word = eight_bytes(codes + c / 8 * layout_.bits, codes + layout_.row_bytes, layout_.bits);
            for (int64_t i = 0; i < std::min<int64_t>(8, columns - c); ++i) {
                const auto code = static_cast<int64_t>(word >> (i * layout_.bits) & mask);
                const int64_t group = (c + i) / layout_.group;
                const float value = layout_.table_planes > 0 ? table[code] : static_cast<float>(code);
                to[c + i] = factor * (scales.scale[group] * value - scales.shifted[group]);
            }
        }
        return true;
    }

  private:
    Beginning at_row(int64_t row) const {
        if (row >= rows) return {};
        const auto* scales = static_cast<const uint8_t*>(layout_.scale);
        return {layout_.codes + row * layout_.row_bytes, scales == nullptr ? nullptr : scales + row * layout_.scale_bytes()};
    }

    RowLayout layout_;
    Stored stored_;
};

void fill_table(RowLayout& layout, const In<float, 2>& table) {
    const int64_t entries = int64_t{1} << layout.bits;
    layout.tables = static_cast<int64_t>(table.shape(0));
    require(layout.tables == 1 || layout.tables == layout.rows,
            "there are " + std::to_string(layout.tables) + " tables for " + std::to_string(layout.rows) + " rows");
    require(static_cast<int64_t>(table.shape(1)) == entries,
            "a table has " + std::to_string(table.shape(1)) + " entries, and codes of " + std::to_string(layout.bits) +
                " bits need " + std::to_string(entries));
    layout.table_planes = 1;
    for (int64_t t = 0; t < layout.tables && layout.table_planes == 1; ++t)
        if (!on_a_byte(table.data() + t * entries, entries)) layout.table_planes = 2;
    layout.table_width = entries <= 64 ? 64 : 256;
    const int64_t all = layout.tables * layout.table_width;
    layout.low.resize(all);
    layout.high.resize(layout.table_planes == 2 ? all : 0);
    layout.values.resize(all);
    layout.factor.resize(layout.tables);
    layout.middle.resize(layout.tables);
    for (int64_t t = 0; t < layout.tables; ++t)
        fit_table(table.data() + t * entries, entries, layout.table_width, layout.table_planes,
                  layout.table_planes == 2 ? layout.high.data() + t * layout.table_width : nullptr,
                  layout.low.data() + t * layout.table_width, layout.values.data() + t * layout.table_width,
                  &layout.factor[t], &layout.middle[t]);
}

ScaleKind kind_of(const std::string& name) {
    if (name == "fp16") return ScaleKind::fp16;
    if (name == "bf16") return ScaleKind::bf16;
    require(name == "s8", "scales are fp16, bf16 or s8, not " + name);
    return ScaleKind::s8;
}

void take_scales(RowLayout& layout, const Stored& stored, const std::string& kind) {
    layout.kind = kind_of(kind);
    layout.scale = nullptr;
    layout.super = nullptr;
    if (!stored.scale) return;
    const Array& scale = *stored.scale;
    const size_t width = layout.kind == ScaleKind::s8 ? 1 : 2;
    require(scale.ndim() == 2 && static_cast<int64_t>(scale.shape(0)) == layout.rows &&
                static_cast<int64_t>(scale.shape(1)) == layout.groups && scale.itemsize() == width,
            "scales of " + kind + " must be (" + std::to_string(layout.rows) + ", " + std::to_string(layout.groups) +
                ") numbers of " + std::to_string(8 * width) + " bits");
    layout.scale = scale.data();
    if (layout.kind != ScaleKind::s8) return;
    require(stored.super && static_cast<int64_t>(stored.super->shape(0)) == layout.rows && stored.super->shape(1) == 1,
            "scales of s8 need a second-level scale for each of the " + std::to_string(layout.rows) + " rows");
    layout.super = stored.super->data();
}

ProductPtr row_codes(In<uint8_t, 2> codes, int bits, int64_t columns, int64_t group, std::optional<Array> scale,
                     const std::string& kind, std::optional<In<uint16_t, 2>> super, std::optional<In<uint8_t, 2>> zero,
                     float middle, std::optional<In<float, 2>> table) {
    require(1 <= bits && bits <= 8, "codes have 1 to 8 bits, not " + std::to_string(bits));
    require(0 < columns && columns <= 500000, "rows have 1 to 500000 columns, not " + std::to_string(columns));
    group = group == 0 ? columns : group;
    require(group > 0 && columns % group == 0 && (group == columns || group % 4 == 0),
            "a group of " + std::to_string(group) + " does not divide " + std::to_string(columns) +
                " columns, or is no multiple of 4");
    Stored stored{codes, std::move(scale), std::move(super), std::move(zero)};
    RowLayout layout{};
    layout.rows = static_cast<int64_t>(codes.shape(0));
    layout.columns = columns;
    layout.row_bytes = static_cast<int64_t>(codes.shape(1));
    require(layout.row_bytes == (columns * bits + 7) / 8,
            "rows have " + std::to_string(layout.row_bytes) + " bytes, and " + std::to_string(columns) + " codes of " +
                std::to_string(bits) + " bits take " + std::to_string((columns * bits + 7) / 8));
    layout.group = group;
    layout.groups = columns / group;
    layout.bits = bits;
    layout.codes = codes.data();
    take_scales(layout, stored, kind);
    layout.factor = {1.0f};
    layout.middle = {middle};
    layout.tables = 0;
    if (table) fill_table(layout, *table);
    if (stored.zero) {
        layout.zero_bytes = (layout.groups * bits + 7) / 8;
        require(!table && static_cast<int64_t>(stored.zero->shape(0)) == layout.rows &&
                    static_cast<int64_t>(stored.zero->shape(1)) == layout.zero_bytes,
                "zeros must be (" + std::to_string(layout.rows) + ", " + std::to_string(layout.zero_bytes) +
                    ") bytes, and there can be no table beside them");
        layout.zero = stored.zero->data();
    }
    plan_avx512(layout);
    return std::make_shared<RowCodes>(std::move(layout), std::move(stored));
}

}  // namespace

void bind_row_codes(nb::module_& module) {
    module.def("row_codes", &row_codes, nb::arg("codes"), nb::arg("bits"), nb::arg("columns"), nb::arg("group"),
               nb::arg("scale").none(), nb::arg("scale_kind"), nb::arg("super").none(), nb::arg("zero").none(),
               nb::arg("middle"), nb::arg("table").none());
}

}  // namespace tersor
