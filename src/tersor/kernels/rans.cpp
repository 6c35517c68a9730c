// Interleaved range coding (rANS, arXiv:1311.2540) of grid numbers, with the trellis that says which table comes next.
// Compiled twin of tersor/kernels/reference_rans.py, which describes the stream; the same bytes come out.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "rans.h"

namespace nb = nanobind;

using MatI = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using VecI = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using CubeI = nb::ndarray<const int32_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using OutB = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

using namespace tersor_rans;

namespace {  // types of this file alone

struct Table {
    int32_t frequency[2][SYMBOLS], before[2][SYMBOLS];
    int low;
};

static std::vector<Table> tables(const CubeI& frequency, const VecI& low) {
    require(frequency.shape(1) == 2 && frequency.shape(2) == SYMBOLS && low.shape(0) == frequency.shape(0),
            "frequencies must be (classes, 2, 32), and low bits (classes,)");
    std::vector<Table> result(frequency.shape(0));
    for (size_t c = 0; c < result.size(); ++c) {
        Table& table = result[c];
        table.low = low.data()[c];
        require(table.low >= 0 && table.low <= 12, "low bits must be 0 to 12");
        for (int u = 0; u < 2; ++u) {
            int32_t sum = 0;
            for (int s = 0; s < SYMBOLS; ++s) {
                const int32_t f = frequency.data()[(c * 2 + u) * SYMBOLS + s];
                require(f >= 0 && f <= TOTAL - sum, "frequencies must add up to 4096");
                table.frequency[u][s] = f;
                table.before[u][s] = sum;
                sum += f;
            }
            require(sum == TOTAL, "frequencies must add up to 4096");
        }
    }
    return result;
}

struct Writer {
    std::vector<uint16_t> words;  // last word of the stream first
    void put(uint32_t& state, uint32_t frequency, uint32_t before) {
        uint64_t x = state;
        if (x >= static_cast<uint64_t>(frequency) << 20) {
            words.push_back(static_cast<uint16_t>(x));
            x >>= 16;
        }
        state = static_cast<uint32_t>(((x / frequency) << TOTAL_BITS) + x % frequency + before);
    }
    void raw(uint32_t& state, uint32_t value, int bits) {
        put(state, 1u << (TOTAL_BITS - bits), value << (TOTAL_BITS - bits));
    }
};

}  // namespace

// Returns the bytes that the stream takes; writes it only when it fits.
static size_t encode(MatI codes, VecI row, VecI level, int shift, CubeI frequency, VecI low, size_t lanes,
                     OutB stream) {
    const size_t rows = codes.shape(0), columns = codes.shape(1);
    const std::vector<Table> table = tables(frequency, low);
    const Contexts contexts = contexts_of(row, level, shift, rows, columns, table.size());
    require(lanes >= (columns ? 1 : 0) && lanes <= LANES, "there are 1 to 32 lanes");
    nb::gil_scoped_release release;
    std::vector<uint32_t> state(lanes, static_cast<uint32_t>(LEAST));
    Writer out;
    const size_t groups = columns ? (columns + lanes - 1) / lanes : 0;
    for (size_t r = rows; r-- > 0;)
        for (size_t g = groups; g-- > 0;) {
            const size_t first = g * lanes, count = std::min(lanes, columns - first);
            const int32_t* k = codes.data() + r * columns + first;
            for (int stage = 3; stage >= 0; --stage)
                for (size_t l = count; l-- > 0;) {
                    const Table& t = table[contexts.at(r, first + l)];
                    const int32_t index = k[l] >> 1, top = index >> t.low;
                    const int u = k[l] & 1;
                    const bool escape = top < -REACH || top > REACH || t.frequency[u][top + REACH] == 0;
                    const int symbol = escape ? SYMBOLS - 1 : top + REACH;
                    if (stage == 3 && escape) out.raw(state[l], static_cast<uint32_t>(index) & 255u, 8);
                    if (stage == 2 && escape) out.raw(state[l], (static_cast<uint32_t>(index) >> 8) & 255u, 8);
                    if (stage == 1 && !escape && t.low)
                        out.raw(state[l], static_cast<uint32_t>(index) & ((1u << t.low) - 1), t.low);
                    if (stage == 0) {
                        require(t.frequency[u][symbol] > 0 && index >= -32768 && index < 32768,
                                "a grid number has no code");
                        out.put(state[l], t.frequency[u][symbol], t.before[u][symbol]);
                    }
                }
        }
    const size_t used = 4 * lanes + 2 * out.words.size();
    if (used > stream.shape(0)) return used;
    uint8_t* at = stream.data();
    for (uint32_t x : state)
        for (int i = 0; i < 4; ++i) *at++ = static_cast<uint8_t>(x >> (8 * i));
    for (size_t i = out.words.size(); i-- > 0;) {
        *at++ = static_cast<uint8_t>(out.words[i]);
        *at++ = static_cast<uint8_t>(out.words[i] >> 8);
    }
    std::fill(at, stream.data() + stream.shape(0), static_cast<uint8_t>(0));
    return used;
}

void bind_ectcq(nb::module_& module);
void bind_decode(nb::module_& module);

NB_MODULE(_coded, module) {
    module.doc() = "Entropy coding and trellis search; see tersor.kernels.reference_rans and reference_ectcq.";
    bind_ectcq(module);
    bind_decode(module);
    module.def("encode", &encode, nb::arg("codes"), nb::arg("row"), nb::arg("level"), nb::arg("shift"),
               nb::arg("frequency"), nb::arg("low"), nb::arg("lanes"), nb::arg("stream"));
}
