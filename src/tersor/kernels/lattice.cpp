// Compiled twin of tersor/kernels/reference_lattice.py: the words of E8P nearest to vectors of eight. The same sums in
// the same order, so the same words to the bit; free of threads, and the interpreter lock is released.
//
// As many vectors at a time as a register of the processor has lanes, in the compiler's own vector types. Loops over
// lanes stay loops of branches (GCC 12), and of types wider than a register choices are taken apart; hence no clones but
// a function a width.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace nb = nanobind;

#if defined(__x86_64__) && defined(__GNUC__)
#define TERSOR_X86
#endif
#if defined(__GNUC__)
#define TERSOR_INLINE inline __attribute__((always_inline))
#define TERSOR_UNROLL _Pragma("GCC unroll 32")
#else
#define TERSOR_INLINE inline
#define TERSOR_UNROLL
#endif

using Targets = nb::ndarray<const float, nb::shape<-1, 8>, nb::c_contig, nb::device::cpu>;
using Words = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

namespace {

constexpr int SPAN = 8, CLASSES = 7, OUTER = 29, POWERS = 6561;
// Magnitudes above, and what is no number, count as this much.
constexpr float MOST = 1e18f;
// Of a class, how many magnitudes have digit 2, and how many 1 or 2.
constexpr int TWOS[CLASSES] = {0, 0, 0, 0, 0, 1, 1}, RAISED[CLASSES] = {0, 1, 2, 3, 4, 1, 2};
// Of an outer pattern, which of columns 0–3 and 4–7 have digit 1. Bit 3 is the first of four: they go up as patterns do.
constexpr int LEFT[OUTER] = {1, 2, 3, 3, 3, 3, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 8, 9, 9, 9, 9, 10, 10, 10};
constexpr int RIGHT[OUTER] = {15, 15, 7, 11, 13, 14, 15, 7, 11, 13, 14, 7, 11, 13, 14,
                              3,  5,  6, 9,  10, 12, 15, 7, 11, 13, 14, 7, 11, 13};

// What a choice stands for, a class or an outer pattern. Bit c of `ones` is column c.
struct Choice {
    int32_t twos, raised, ones;
};

struct Tables {
    std::array<Choice, CLASSES + OUTER> choices{};
    std::array<int16_t, POWERS> number{};  // of a pattern, by its digits in base 3, column 0 lowest

    Tables() {
        for (int k = 0; k < CLASSES; ++k) choices[k] = {TWOS[k], RAISED[k], 0};
        int16_t inner = 0;
        for (int word = 0; word < POWERS; ++word) {  // as patterns are numbered: column 0 highest
            int reversed = 0, count[3] = {0, 0, 0};
            for (int column = 0, rest = word; column < SPAN; ++column, rest /= 3) {
                reversed = 3 * reversed + rest % 3;
                ++count[rest % 3];
            }
            if (count[2] == 0 ? count[1] <= 4 : count[2] == 1 && count[1] <= 1) number[reversed] = inner++;
        }
        for (int k = 0; k < OUTER; ++k) {
            int32_t ones = 0, digits = 0;
            for (int column = SPAN - 1; column >= 0; --column) {
                const int32_t one = (LEFT[k] << 4 | RIGHT[k]) >> (SPAN - 1 - column) & 1;
                ones |= one << column;
                digits = 3 * digits + one;
            }
            choices[CLASSES + k] = {0, 0, ones};
            number[digits] = static_cast<int16_t>(256 - OUTER + k);
        }
    }
};

// One number a lane. One lane is plain numbers: comparisons are then bool, so they are only chosen by.
template <int LANES>
struct Lanes {
#if defined(__GNUC__)
    typedef float Reals __attribute__((vector_size(LANES * sizeof(float))));
    typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(int32_t))));
#endif
};

template <>
struct Lanes<1> {
    using Reals = float;
    using Ints = int32_t;
};

template <int LANES>
struct Search {
    using Reals = typename Lanes<LANES>::Reals;
    using Ints = typename Lanes<LANES>::Ints;

    // The eight columns of each lane after a shift, and its nearest word before it.
    struct Found {
        Reals magnitude[SPAN], distance, gain;  // gain: half of what the choice has over magnitudes of ½
        Ints negative, odd, choice;             // negative: bit c for column c; odd: whether these are, 0 or 1
    };

    // Sums of the magnitudes of some of four columns, and the least cost of a changed sign among the four: a magnitude,
    // three times as much where the digit is 1.
    struct Half {
        Reals sum, turning;
    };

    // `b` also where `a` is no number.
    static TERSOR_INLINE void lower(Reals& a, const Reals& b) { a = a < b ? a : b; }

    static TERSOR_INLINE void consider(Found& found, const Reals& gain, int32_t choice) {
        const auto better = gain > found.gain;
        found.gain = better ? gain : found.gain;
        found.choice = better ? Ints{} + choice : found.choice;
    }

    static TERSOR_INLINE void consider_inner(Found& found) {
        constexpr int network[19][2] = {{0, 2}, {1, 3}, {4, 6}, {5, 7}, {0, 4}, {1, 5}, {2, 6}, {3, 7}, {0, 1}, {2, 3},
                                        {4, 5}, {6, 7}, {2, 4}, {3, 5}, {1, 4}, {3, 6}, {1, 2}, {3, 4}, {5, 6}};
        Reals size[SPAN], first[5];
        TERSOR_UNROLL for (int c = 0; c < SPAN; ++c) size[c] = found.magnitude[c];
        TERSOR_UNROLL for (int i = 0; i < 19; ++i) {
            const Reals a = size[network[i][0]], b = size[network[i][1]];
            size[network[i][0]] = a > b ? a : b;
            size[network[i][1]] = a > b ? b : a;
        }
        first[0] = Reals{};
        TERSOR_UNROLL for (int c = 0; c < 4; ++c) first[c + 1] = first[c] + size[c];
        const Reals if_odd = found.odd != 0 ? size[SPAN - 1] : Reals{};
        const Reals if_even = found.odd != 0 ? Reals{} : size[SPAN - 1];
        TERSOR_UNROLL for (int k = 0; k < CLASSES; ++k) {
            const int ones = RAISED[k] - TWOS[k];
            const Reals sum = first[RAISED[k]] + first[TWOS[k]] - static_cast<float>(ones + 3 * TWOS[k]);
            consider(found, sum - (ones & 1 ? if_even : if_odd), k);
        }
    }

    static TERSOR_INLINE void fill(const Reals* magnitude, const Reals* cost, int columns, Half& half) {
        half.sum = Reals{};
        TERSOR_UNROLL for (int c = 0; c < 4; ++c) {
            const bool one = columns >> (3 - c) & 1;
            const Reals here = one ? 3.0f * cost[c] : cost[c];
            if (one) half.sum += magnitude[c];
            if (c == 0) half.turning = here;
            lower(half.turning, here);
        }
    }

    static TERSOR_INLINE void consider_outer(Found& found) {
        Reals cost[SPAN];
        TERSOR_UNROLL for (int c = 0; c < SPAN; ++c) cost[c] = found.odd != 0 ? Reals{} : found.magnitude[c];
        Half left[11], right[16];
        TERSOR_UNROLL for (int columns = 1; columns < 11; ++columns)
            fill(found.magnitude, cost, columns, left[columns]);
        TERSOR_UNROLL for (int columns = 3; columns < 16; ++columns)
            fill(found.magnitude + 4, cost + 4, columns, right[columns]);
        TERSOR_UNROLL for (int k = 0; k < OUTER; ++k) {
            const Half &a = left[LEFT[k]], &b = right[RIGHT[k]];
            Reals turning = a.turning;
            lower(turning, b.turning);
            consider(found, a.sum + b.sum - 5.0f - turning, CLASSES + k);
        }
    }

    static TERSOR_INLINE void search(const Reals* target, float shift, Found& found) {
        found.negative = found.odd = found.choice = Ints{};
        found.distance = Reals{};
        found.gain = Reals{} - INFINITY;
        TERSOR_UNROLL for (int c = 0; c < SPAN; ++c) {
            const Reals x = target[c] + shift;
            Reals magnitude = x < 0.0f ? -x : x;
            lower(magnitude, Reals{} + MOST);
            const Ints negative = x < 0.0f ? Ints{} + 1 : Ints{};
            found.magnitude[c] = magnitude;
            found.negative |= negative << c;
            found.odd ^= negative;
            found.distance += (magnitude - 0.5f) * (magnitude - 0.5f);
        }
        consider_inner(found);
        consider_outer(found);
        found.distance -= 2.0f * found.gain;
    }

    // How many magnitudes are larger, or as large and of an earlier column.
    static TERSOR_INLINE void fill_ranks(const Reals* magnitude, Ints* rank) {
        TERSOR_UNROLL for (int c = 0; c < SPAN; ++c) rank[c] = Ints{} + (SPAN - 1 - c);
        TERSOR_UNROLL for (int c = 0; c < SPAN; ++c)
            TERSOR_UNROLL for (int d = c + 1; d < SPAN; ++d) {
                const Ints ahead = magnitude[c] >= magnitude[d] ? Ints{} + 1 : Ints{};
                rank[c] -= ahead;
                rank[d] += ahead;
            }
    }

    // `columns (SPAN, LANES)`: the words of LANES targets.
    static TERSOR_INLINE void words(const Tables& tables, const float* columns, int32_t* out) {
        Reals target[SPAN], magnitude[SPAN];
        std::memcpy(target, columns, sizeof(target));
        Found up, down;
        search(target, -0.25f, up);
        search(target, 0.25f, down);
        const auto below = down.distance < up.distance;
        const Ints negative = below ? down.negative : up.negative, choice = below ? down.choice : up.choice;
        int32_t chosen[LANES], parts[3][LANES], numbers[LANES];
        std::memcpy(chosen, &choice, sizeof(choice));
        for (int l = 0; l < LANES; ++l) {
            const Choice& found = tables.choices[static_cast<size_t>(chosen[l])];
            parts[0][l] = found.twos;
            parts[1][l] = found.raised;
            parts[2][l] = found.ones;
        }
        Ints twos, raised, ones, rank[SPAN];
        std::memcpy(&twos, parts[0], sizeof(twos));
        std::memcpy(&raised, parts[1], sizeof(raised));
        std::memcpy(&ones, parts[2], sizeof(ones));
        TERSOR_UNROLL for (int c = 0; c < SPAN; ++c) magnitude[c] = below ? down.magnitude[c] : up.magnitude[c];
        fill_ranks(magnitude, rank);
        const Ints zero{}, one = zero + 1;
        Ints pattern{}, odd{}, last{}, turned{};
        Reals least = Reals{} + INFINITY;
        int32_t power = 1;
        TERSOR_UNROLL for (int c = 0; c < SPAN; ++c, power *= 3) {
            const Ints outer = ones >> c & 1, twice = rank[c] < twos ? one : zero;
            const Ints digit = (rank[c] < raised ? one : zero) + twice + outer;
            pattern += digit * power;
            odd ^= (digit ^ negative >> c) & 1;
            last = rank[c] == SPAN - 1 ? zero + (1 << c) : last;
            // Only outer patterns ask for this, and their digits are 0 and 1.
            const Reals cost = outer != 0 ? 3.0f * magnitude[c] : magnitude[c];
            turned = cost < least ? zero + (1 << c) : turned;
            lower(least, cost);
        }
        const Ints change = choice < CLASSES ? last : turned, signs = negative ^ (odd != 0 ? change : zero);
        const Ints beside = ((signs & 127) << 8) + (below ? zero + (1 << 15) : zero);
        std::memcpy(numbers, &pattern, sizeof(pattern));
        for (int l = 0; l < LANES; ++l) numbers[l] = tables.number[static_cast<size_t>(numbers[l])];
        std::memcpy(&pattern, numbers, sizeof(pattern));
        pattern += beside;
        std::memcpy(out, &pattern, sizeof(pattern));
    }

    static TERSOR_INLINE void all(const Tables& tables, const float* targets, size_t count, int32_t* out) {
        float columns[SPAN * LANES] = {};
        int32_t found[LANES];
        for (size_t start = 0; start < count; start += LANES) {
            const size_t here = std::min<size_t>(LANES, count - start);
            const float* from = targets + start * SPAN;
            for (size_t l = 0; l < here; ++l)
                for (size_t c = 0; c < SPAN; ++c) columns[c * LANES + l] = from[l * SPAN + c];
            words(tables, columns, found);
            std::copy(found, found + here, out + start);
        }
    }
};

void search_one(const Tables& tables, const float* targets, size_t count, int32_t* out) {
    Search<1>::all(tables, targets, count, out);
}

#if defined(__GNUC__)
void search_any(const Tables& tables, const float* targets, size_t count, int32_t* out) {
    Search<4>::all(tables, targets, count, out);
}
#endif

#ifdef TERSOR_X86
#define TERSOR_256 __attribute__((target("avx2")))
#define TERSOR_512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))

TERSOR_256 void search_avx2(const Tables& tables, const float* targets, size_t count, int32_t* out) {
    Search<8>::all(tables, targets, count, out);
}

TERSOR_512 void search_avx512(const Tables& tables, const float* targets, size_t count, int32_t* out) {
    Search<16>::all(tables, targets, count, out);
}

// Lanes of the widest registers that are known here.
int lanes() {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return 16;
    return __builtin_cpu_supports("avx2") ? 8 : 4;
}
#endif

// `targets (n, 8)`: fills `words (n,)`. `most`: lanes that are made use of at most, for tests.
void nearest_words(Targets targets, Words words, [[maybe_unused]] int most) {
    const size_t count = targets.shape(0);
    if (words.shape(0) != count) throw std::invalid_argument("words must have one entry a row of targets");
    static const Tables tables;
    auto* search = &search_one;
#if defined(__GNUC__)
    if (most >= 4) search = &search_any;
#endif
#ifdef TERSOR_X86
    static const int widest = lanes();
    if (widest >= 8 && most >= 8) search = &search_avx2;
    if (widest >= 16 && most >= 16) search = &search_avx512;
#endif
    nb::gil_scoped_release release;
    search(tables, targets.data(), count, words.data());
}

}  // namespace

void bind_lattice(nb::module_& module) {
    module.def("nearest_words", &nearest_words, nb::arg("targets"), nb::arg("words"), nb::arg("most") = 16);
}
