// What rows_avx512 takes of a layout and of inputs: where codes lie, which lane takes which scale, inputs slice by slice.
#include "row_codes.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include "row_codes_avx512.h"

namespace tersor {
namespace {

// Bytes at even and at odd places of 128.
struct Halves {
    __m512i even, odd;
};

TERSOR_512_INLINE Halves parted(__m512i a, __m512i b) {
    alignas(64) uint8_t even[64], odd[64];
    for (int i = 0; i < 64; ++i) {
        even[i] = static_cast<uint8_t>(2 * i);
        odd[i] = static_cast<uint8_t>(2 * i + 1);
    }
    return {_mm512_permutex2var_epi8(a, _mm512_load_si512(even), b),
            _mm512_permutex2var_epi8(a, _mm512_load_si512(odd), b)};
}

// Slice k of a step takes columns k, k + Slices, ...: places of a step are parted into even and odd ones, log2(Slices)
// times.
template <int Slices>
TERSOR_512 void lay_out(const int8_t* from, int64_t columns, int64_t width, int8_t* to) {
    for (int64_t begin = 0; begin < width; begin += 64 * Slices) {
        __m512i here[Slices];
        for (int i = 0; i < Slices; ++i) {
            const int64_t left = columns - begin - 64 * i;
            here[i] = left <= 0 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi8(first_bytes(left), from + begin + 64 * i);
        }
        // After each round, `here` is `parts` lists in turn, list j with the columns that are j modulo parts.
        for (int parts = 1; parts < Slices; parts *= 2) {
            __m512i next[Slices];
            const int length = Slices / parts;
            for (int j = 0; j < parts; ++j)
                for (int i = 0; i < length / 2; ++i) {
                    const Halves halves = parted(here[j * length + 2 * i], here[j * length + 2 * i + 1]);
                    next[j * length / 2 + i] = halves.even;
                    next[(j + parts) * length / 2 + i] = halves.odd;
                }
            for (int i = 0; i < Slices; ++i) here[i] = next[i];
        }
        for (int k = 0; k < Slices; ++k) _mm512_storeu_si512(to + begin + 64 * k, here[k]);
    }
}

TERSOR_512 void lay_out(int slices, const int8_t* from, int64_t columns, int64_t width, int8_t* to) {
    if (slices == 2) return lay_out<2>(from, columns, width, to);
    if (slices == 4) return lay_out<4>(from, columns, width, to);
    lay_out<8>(from, columns, width, to);
}

// Sums of four inputs each: `width / 4` of them.
TERSOR_512 void sum_fours(const Activations& rounded, int64_t token, int32_t* sums) {
    const __m512i ones = _mm512_set1_epi8(1);
    for (int64_t c = 0; c < rounded.width; c += 64) {
        __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, _mm512_loadu_si512(rounded.high_of(token) + c));
        if (rounded.two_planes)
            sum = _mm512_dpbusd_epi32(_mm512_slli_epi32(sum, 8), ones, _mm512_loadu_si512(rounded.low_of(token) + c));
        _mm512_storeu_si512(sums + c / 4, sum);
    }
}

}  // namespace

void plan_avx512(RowLayout& layout) {
    // Slices work where every lane of 4 bytes lies within one group. Slice k of a step has codes k, k + slices, ... of it.
    // Codes of 3 bits are spread two to a byte and then cut, as 16 of them fit a lane of 8 bytes.
    const int64_t slices = 8 % layout.bits == 0 ? 8 / layout.bits : layout.bits == 3 ? 2 : 1;
    const bool sliced = layout.groups == 1 || layout.group % (4 * slices) == 0;
    layout.slices = sliced ? static_cast<int>(slices) : 1;
    layout.spread = 8 % layout.bits != 0 || !sliced;
    for (int i = 0; i < 64; ++i) {
        layout.zero_place[i] = static_cast<uint8_t>(i / 8 * layout.bits + i % 8) & 63;
        layout.zero_shift[i] = static_cast<uint8_t>(i % 8 * layout.bits);
        layout.place[i] = static_cast<uint8_t>(i / 8 * layout.bits * layout.slices + i % 8) & 63;
        layout.shift[i] = static_cast<uint8_t>(i % 8 * layout.bits * layout.slices);
    }
    const int64_t columns = 64 * layout.slices, steps = (layout.columns + columns - 1) / columns;
    if (layout.groups == 1 || layout.group % columns == 0) return;
    // Where groups divide a step, one fetch of 16 scales lasts for whole steps, and all fetches are alike. (A fetch that
    // lasts for one step is told from those by that, and so all its steps are listed.)
    const bool alike = columns % layout.group == 0 && 16 * layout.group > columns;
    layout.per_fetch = alike ? 16 * layout.group / columns : 1;
    layout.lanes.resize(16 * (alike ? layout.per_fetch : steps));
    for (int64_t i = 0; i < static_cast<int64_t>(layout.lanes.size()); ++i) {
        const int64_t step = i / 16, first = alike ? 0 : columns * step / layout.group;
        layout.lanes[i] = static_cast<int32_t>((columns * step + columns / 16 * (i % 16)) / layout.group - first) & 15;
    }
}

TERSOR_512 void inputs_avx512(const RowLayout& layout, RowInputs& inputs) {
    const Activations& rounded = inputs.rounded;
    std::vector<int32_t> fours(rounded.width / 4);
    if (layout.slices > 1) {
        inputs.high.resize(rounded.tokens * inputs.width);
        if (rounded.two_planes) inputs.low.resize(rounded.tokens * inputs.width);
    }
    for (int64_t t = 0; t < rounded.tokens; ++t) {
        sum_fours(rounded, t, fours.data());
        const int64_t each = layout.groups == 1 ? rounded.width / 4 : layout.group / 4;
        for (int64_t g = 0; g < layout.groups; ++g) {
            int64_t sum = 0;
            for (int64_t i = 0; i < each; ++i) sum += fours[g * each + i];
            inputs.group_sums[t * inputs.padded_groups + g] = static_cast<float>(sum);
        }
        if (layout.slices <= 1) continue;
        const int64_t to = t * inputs.width;
        lay_out(layout.slices, rounded.high_of(t), rounded.columns, inputs.width, inputs.high.data() + to);
        if (rounded.two_planes)
            lay_out(layout.slices, rounded.low_of(t), rounded.columns, inputs.width, inputs.low.data() + to);
    }
}

void rows_avx512(const RowLayout& layout, const RowInputs& inputs, int64_t first, int64_t last, float* y, int64_t stride) {
    (inputs.rounded.two_planes ? rows_avx512_int16 : rows_avx512_int8)(layout, inputs, first, last, y, stride);
}

}  // namespace tersor

#else

namespace tersor {
void plan_avx512(RowLayout&) {}
void inputs_avx512(const RowLayout&, RowInputs&) {}
void rows_avx512(const RowLayout& layout, const RowInputs& inputs, int64_t first, int64_t last, float* y, int64_t stride) {
    rows_portable(layout, inputs, first, last, y, stride);
}
}  // namespace tersor

#endif
