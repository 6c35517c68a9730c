// Decoding of the streams that rans.cpp writes: to grid numbers, to weights, or to codes for products with integers.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include "rans.h"

namespace nb = nanobind;

namespace tersor_rans {

namespace {

enum class Isa { portable, avx2, avx512 };

Isa best() {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("gfni"))
        return Isa::avx512;
    if (__builtin_cpu_supports("avx2")) return Isa::avx2;
#endif
    return Isa::portable;
}

Isa most = Isa::avx512;

Isa isa() {
    static const Isa found = best();
    return std::min(found, most);
}

void limit_isa(const std::string& name) {
    require(name == "portable" || name == "avx2" || name == "avx512", "instructions are portable, avx2 or avx512");
    most = name == "portable" ? Isa::portable : name == "avx2" ? Isa::avx2 : Isa::avx512;
}

using VecI = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using CubeI = nb::ndarray<const int32_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using VecF = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using VecB = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MatB = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using VecH = nb::ndarray<const uint16_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MatH = nb::ndarray<const uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T, int dimensions>
using Out = nb::ndarray<T, nb::ndim<dimensions>, nb::c_contig, nb::device::cpu>;

constexpr size_t VECTOR_CONTEXTS = 64;

// A stream that can be decoded any number of times. The arrays that it points to are kept alive.
class Stream {
  public:
    Stream(VecB stream, size_t rows, VecI row, VecI level, int shift, CubeI frequency, VecI low, size_t lanes, int states,
           int h0, int h1)
        : stream_(stream), row_(row), rows_(rows), columns_(level.shape(0)), lanes_(lanes),
          contexts_(contexts_of(row, level, shift, rows, columns_, frequency.shape(0))),
          h0_(static_cast<uint32_t>(h0) >> 1), h1_(static_cast<uint32_t>(h1) >> 1) {
        require(lanes <= LANES && lanes >= (columns_ ? 1 : 0), "there are 1 to 32 lanes");
        require(states >= 1 && states <= 256 && (states & (states - 1)) == 0 && h0_ < 256 && h1_ < 256,
                "states must be a power of two, at most 256");
        require(stream.shape(0) >= 4 * lanes, "the stream is shorter than its lanes' states");
        if (states == 1) h0_ = h1_ = 0;
        fill(frequency, low, states > 1 ? 2 : 1);
    }

    void decode(Out<int32_t, 2> codes) const {
        fits(codes, "grid numbers");
        nb::gil_scoped_release release;
        each_row([&](size_t r, const int32_t* found) {
            int32_t* to = codes.data() + r * columns_;
            if (found != to) std::copy_n(found, columns_, to);
        }, codes.data());
    }

    // Weights: `shrink (contexts, 4)` in 256ths of a step, `step (columns,)`.
    void values(MatB shrink, VecF step, Out<float, 2> weights) const {
        fits(weights, "weights");
        require(step.shape(0) == columns_, "there is not a step for every column");
        const Shrink table = shrinkages(shrink);
        nb::gil_scoped_release release;
        each_fine(table, [&](size_t r, const int32_t* fine) {
            scale(fine, step.data(), columns_, weights.data() + r * columns_);
        });
    }

    // Numbers in 256ths of a step that occur, how often each does, and a name for each weight, its place among these.
    // Nothing where a number is beyond 4096 steps, or where there are more than 65535 different ones.
    std::pair<std::vector<int32_t>, std::vector<int64_t>> names(MatB shrink, Out<uint16_t, 2> names) const;

  private:
    void fill(const CubeI& frequency, const VecI& low, int unions);
    Shrink shrinkages(const MatB& shrink) const;
    template <class Array>
    void fits(const Array& array, const char*) const {
        require(array.shape(0) == rows_ && array.shape(1) == columns_, "results must be (rows, columns)");
    }
    TERSOR_CLONES static void scale(const int32_t* fine, const float* step, size_t columns, float* weights) {
        for (size_t c = 0; c < columns; ++c) weights[c] = step[c] * (static_cast<float>(fine[c]) * (1.0f / 256));
    }

    TERSOR_CLONES static bool within(const int32_t* fine, size_t columns, int32_t farthest) {
        int32_t least = 0, most = 0;
        for (size_t c = 0; c < columns; ++c) {
            least = std::min(least, fine[c]);
            most = std::max(most, fine[c]);
        }
        return least >= -farthest && most <= farthest;
    }

    bool narrow() const { return static_cast<size_t>(contexts_.last) < VECTOR_CONTEXTS; }

    // Rows are decoded where they belong in `whole (rows, columns)`, if there is one, as what a row leaves in the next one
    // is overwritten; but not the last ones.
    template <class Sink>
    void each_row(Sink sink, int32_t* whole = nullptr) const {
        const Isa level = narrow() ? isa() : Isa::portable;
        const auto row = level == Isa::avx512 ? row_avx512 : level == Isa::avx2 ? row_avx2 : row_portable;
        const uint8_t* from = stream_.data();
        Reader in{entries_.data(), low_.data(), raw_, contexts_, lanes_, columns_, h0_, h1_, from + 4 * lanes_,
                  from + stream_.shape(0), false, {}, std::vector<uint8_t>(columns_ + BEYOND),
                  std::vector<uint8_t>(columns_ + BEYOND)};
        for (size_t l = 0; l < lanes_; ++l)
            for (int i = 0; i < 4; ++i) in.x[l] |= static_cast<uint32_t>(from[4 * l + i]) << (8 * i);
        std::vector<int32_t> codes(columns_ + BEYOND);
        for (size_t r = 0; r < rows_ && columns_; ++r) {
            const bool room = whole && (r + 1) * columns_ + BEYOND <= rows_ * columns_;
            int32_t* to = room ? whole + r * columns_ : codes.data();
            row(in, r, to);
            std::swap(in.path, in.next);
            require(!in.ended, "the stream ends before its last symbol");
            sink(r, to);
        }
    }

    template <class Sink>
    void each_fine(const Shrink& shrink, Sink sink) const {
        const auto inward = narrow() && isa() == Isa::avx512 ? inward_avx512 : inward_portable;
        std::vector<int32_t> fine(columns_ + BEYOND);
        each_row([&](size_t r, const int32_t* codes) {
            std::copy_n(codes, columns_, fine.data());
            inward(contexts_, shrink, r, columns_, fine.data());
            sink(r, fine.data());
        });
    }

    VecB stream_;
    VecI row_;
    size_t rows_, columns_, lanes_;
    Contexts contexts_;
    uint32_t h0_, h1_;
    std::vector<uint32_t> entries_;
    std::vector<uint8_t> low_;
    bool raw_ = false;
};

void Stream::fill(const CubeI& frequency, const VecI& low, int unions) {
    const size_t count = frequency.shape(0);
    require(frequency.shape(1) == 2 && frequency.shape(2) == SYMBOLS && low.shape(0) == count,
            "frequencies must be (classes, 2, 32), and low bits (classes,)");
    entries_.resize(count * 2 * TOTAL);
    low_.resize(std::max(count, VECTOR_CONTEXTS));
    for (size_t c = 0; c < count; ++c) {
        require(low.data()[c] >= 0 && low.data()[c] <= 12, "low bits must be 0 to 12");
        low_[c] = static_cast<uint8_t>(low.data()[c]);
        raw_ |= low_[c] > 0;
        for (int u = 0; u < unions; ++u) {
            const int32_t* of = frequency.data() + (c * 2 + u) * SYMBOLS;
            uint32_t* to = entries_.data() + (c * 2 + u) * TOTAL;
            int32_t sum = 0;
            for (int s = 0; s < SYMBOLS; ++s) {
                require(of[s] >= 0 && of[s] <= TOTAL - sum, "frequencies must add up to 4096");
                for (int32_t i = 0; i < of[s]; ++i)
                    to[sum + i] = entry(s, static_cast<uint32_t>(of[s]), static_cast<uint32_t>(i));
                sum += of[s];
            }
            require(sum == TOTAL, "frequencies must add up to 4096");
        }
    }
}

Shrink Stream::shrinkages(const MatB& shrink) const {
    const size_t count = static_cast<size_t>(contexts_.last) + 1;
    require(shrink.shape(0) == count && shrink.shape(1) == 4, "shrinkages must be (classes, 4)");
    require(narrow(), "there are at most 64 contexts with shrinkages");
    Shrink table;
    for (size_t c = 0; c < count; ++c)
        for (size_t s = 0; s < 4; ++s) table.wide[s + 1][c] = table.narrow[s][c] = shrink.data()[c * 4 + s];
    return table;
}

std::pair<std::vector<int32_t>, std::vector<int64_t>> Stream::names(MatB shrink, Out<uint16_t, 2> names) const {
    fits(names, "names");
    const Shrink table = shrinkages(shrink);
    constexpr int32_t FARTHEST = 4096 * 256;
    std::vector<int32_t> numbers;
    std::vector<int64_t> counts;
    {
        nb::gil_scoped_release release;
        // One more than the name; 0: has none yet. Most of it is never looked at, so nothing clears it but the system.
        const std::unique_ptr<uint16_t, void (*)(void*)> room(
            static_cast<uint16_t*>(std::calloc(2 * FARTHEST + 1, sizeof(uint16_t))), std::free);
        if (!room) throw std::bad_alloc();
        bool bad = false;
        // Four counters for each name: adding to the one that was just added to would wait for that.
        std::vector<uint32_t> count;
        each_fine(table, [&](size_t r, const int32_t* fine) {
            bad = bad || !within(fine, columns_, FARTHEST);
            if (bad) return;
            uint16_t *to = names.data() + r * columns_, *of = room.get() + FARTHEST;
            for (size_t c = 0; c < columns_; ++c) {
                if (of[fine[c]] == 0) {
                    if (numbers.size() == 65535) {
                        bad = true;
                        return;
                    }
                    numbers.push_back(fine[c]);
                    count.resize(4 * numbers.size());
                    of[fine[c]] = static_cast<uint16_t>(numbers.size());
                }
                to[c] = static_cast<uint16_t>(of[fine[c]] - 1);
            }
            uint32_t* counter = count.data();
            for (size_t c = 0; c < columns_; ++c) ++counter[4 * to[c] + (c & 3)];
        });
        if (bad) numbers.clear();
        for (size_t i = 0; i < numbers.size(); ++i) {
            const uint32_t* four = count.data() + 4 * i;
            counts.push_back(int64_t{four[0]} + four[1] + four[2] + four[3]);
        }
    }
    return {numbers, counts};
}

// Codes of `bits` bits for names: `code_of (n,)`, with 32768 added for names that have no code of their own. Returns the
// places of weights of such, row after row.
std::vector<int64_t> pack_names(MatH names, VecH code_of, int bits, Out<uint8_t, 2> packed) {
    const size_t rows = names.shape(0), columns = names.shape(1), width = (columns * static_cast<size_t>(bits) + 7) / 8;
    require(bits >= 1 && bits <= 8, "codes have 1 to 8 bits");
    require(packed.shape(0) == rows && packed.shape(1) == width, "packed codes must be (rows, whole bytes of a row)");
    for (size_t i = 0; i < code_of.shape(0); ++i)
        require((code_of.data()[i] & 0x7fff) < 1 << bits, "a code has too many bits");
    std::vector<int64_t> rare;
    bool known = true;
    {
        nb::gil_scoped_release release;
        for (size_t r = 0; r < rows; ++r) {
            const uint16_t* from = names.data() + r * columns;
            uint8_t* to = packed.data() + r * width;
            uint64_t word = 0;
            int filled = 0;
            for (size_t c = 0; c < columns; ++c) {
                known &= from[c] < code_of.shape(0);
                if (!known) break;
                const uint16_t code = code_of.data()[from[c]];
                if (code >> 15) rare.push_back(static_cast<int64_t>(r * columns + c));
                word |= static_cast<uint64_t>(code & 0x7fff) << filled;
                filled += bits;
                for (; filled >= 8; filled -= 8, word >>= 8) *to++ = static_cast<uint8_t>(word);
            }
            if (filled && known) *to = static_cast<uint8_t>(word);
        }
    }
    require(known, "a name that there is not");
    return rare;
}

}  // namespace
}  // namespace tersor_rans

void bind_decode(nb::module_& module) {
    using namespace tersor_rans;
    nb::class_<Stream>(module, "Stream")
        .def(nb::init<VecB, size_t, VecI, VecI, int, CubeI, VecI, size_t, int, int, int>(), nb::arg("stream"),
             nb::arg("rows"), nb::arg("row"), nb::arg("level"), nb::arg("shift"), nb::arg("frequency"), nb::arg("low"),
             nb::arg("lanes"), nb::arg("states"), nb::arg("h0"), nb::arg("h1"))
        .def("decode", &Stream::decode, nb::arg("codes"))
        .def("values", &Stream::values, nb::arg("shrink"), nb::arg("step"), nb::arg("weights"))
        .def("names", &Stream::names, nb::arg("shrink"), nb::arg("names"));
    module.def("pack_names", &pack_names, nb::arg("names"), nb::arg("code_of"), nb::arg("bits"), nb::arg("packed"));
    module.def("limit_isa", &limit_isa);
}
