// Vectors of a codebook, or sums of such; and the words of E8P. A code stands for some columns, in units of a scale
// that each row has.
#include <algorithm>
#include <utility>

#include "bind.h"
#include "float_rows.h"

#ifdef TERSOR_X86_ROWS
#include <immintrin.h>
#endif

namespace tersor {
namespace {

int64_t packed(int64_t codes, int64_t bits) { return (codes * bits + 7) / 8; }

// What both kinds have: codes of `bits` bits, each of `unit` columns, and float16 scales.
struct Vectors {
    In<uint8_t, 2> codes;
    In<uint16_t, 1> scale;
    int64_t columns, unit, bits;

    void check() const {
        require(columns > 0 && columns % unit == 0, "vectors of " + std::to_string(unit) + " columns do not divide " +
                                                        std::to_string(columns));
        require(static_cast<int64_t>(codes.shape(1)) == packed(columns / unit, bits),
                "rows have " + std::to_string(codes.shape(1)) + " bytes, and " + std::to_string(columns / unit) +
                    " codes of " + std::to_string(bits) + " bits take " + std::to_string(packed(columns / unit, bits)));
        require(scale.shape(0) == codes.shape(0), "there are " + std::to_string(scale.shape(0)) + " scales for " +
                                                      std::to_string(codes.shape(0)) + " rows");
    }
    const uint8_t* end() const { return codes.data() + codes.shape(0) * codes.shape(1); }
};

// `P`: columns of a code as they are decoded, a power of two.
template <typename D, int P>
class VectorRows : public EveryLevel<D> {
  public:
    explicit VectorRows(Vectors stored)
        : EveryLevel<D>(static_cast<int64_t>(stored.codes.shape(0)), stored.columns / stored.unit * P, P,
                        stored.codes.data(), static_cast<int64_t>(stored.codes.shape(1)), stored.unit),
          stored_(std::move(stored)) {}

    float factor(int64_t row) const override { return float_of_half(stored_.scale.data()[row]); }

  protected:
    Vectors stored_;
};

// Entries by code, and how codes lie: what loops over them need. `STAGES`: of a code, 0 where there are more than two.
struct Entries {
    const float* table;  // (stages, 2^index_bits, P)
    int bits, index_bits, stages;
};

#ifdef TERSOR_X86_ROWS
// Vectors of `WIDTH` floats of some codes, and their products with inputs.
struct Two {
    using V = __m128;
    static constexpr int P = 2, WIDTH = 4, CODES = 2;
    TERSOR_ROWS_256 static V load(const float* x) { return _mm_loadu_ps(x); }
    template <int STAGES>
    TERSOR_ROWS_256 static V at(const Entries& entries, uint64_t word) {
        const uint64_t mask = (uint64_t{1} << entries.bits) - 1;
        const __m128 low = half<STAGES>(entries, word & mask), high = half<STAGES>(entries, word >> entries.bits & mask);
        return _mm_movelh_ps(low, high);
    }
    template <int STAGES>
    TERSOR_ROWS_256 static V half(const Entries& entries, uint64_t code) {
        const uint64_t mask = (uint64_t{1} << entries.index_bits) - 1;
        V sum = pair(entries.table + (code & mask) * P);
        for (int s = 1; s < (STAGES > 0 ? STAGES : entries.stages); ++s)
            sum = _mm_add_ps(
                sum, pair(entries.table + ((code >> s * entries.index_bits & mask) | uint64_t(s) << entries.index_bits) * P));
        return sum;
    }
    TERSOR_ROWS_256 static V pair(const float* from) {
        return _mm_castpd_ps(_mm_load_sd(reinterpret_cast<const double*>(from)));
    }
    TERSOR_ROWS_256 static V fma(V a, V b, V c) { return _mm_fmadd_ps(a, b, c); }
    TERSOR_ROWS_256 static void store(float* to, V v) { _mm_storeu_ps(to, v); }
    TERSOR_ROWS_256 static V zero() { return _mm_setzero_ps(); }
};

#define TERSOR_ONE_CODE(NAME, VECTOR, SIZE, TARGET, PREFIX)                                                            \
    struct NAME {                                                                                                      \
        using V = VECTOR;                                                                                              \
        static constexpr int P = SIZE, WIDTH = SIZE, CODES = 1;                                                        \
        TARGET static V load(const float* x) { return PREFIX##_loadu_ps(x); }                                          \
        template <int STAGES>                                                                                          \
        TARGET static V at(const Entries& entries, uint64_t word) {                                                    \
            const uint64_t mask = (uint64_t{1} << entries.index_bits) - 1;                                             \
            V sum = load(entries.table + (word & mask) * P);                                                           \
            for (int s = 1; s < (STAGES > 0 ? STAGES : entries.stages); ++s)                                           \
                sum = PREFIX##_add_ps(sum, load(entries.table + ((word >> s * entries.index_bits & mask) |             \
                                                                 uint64_t(s) << entries.index_bits) * P));             \
            return sum;                                                                                                \
        }                                                                                                              \
        TARGET static V fma(V a, V b, V c) { return PREFIX##_fmadd_ps(a, b, c); }                                      \
        TARGET static void store(float* to, V v) { PREFIX##_storeu_ps(to, v); }                                        \
        TARGET static V zero() { return PREFIX##_setzero_ps(); }                                                       \
    };
TERSOR_ONE_CODE(Four, __m128, 4, TERSOR_ROWS_256, _mm)
TERSOR_ONE_CODE(Eight, __m256, 8, TERSOR_ROWS_256, _mm256)
TERSOR_ONE_CODE(Sixteen, __m512, 16, TERSOR_ROWS_512, _mm512)

// Sixteen lanes for each of R rows; entries are not decoded first but multiplied as they are loaded. `BITS`: of a code, 0
// where they are not known here. `ONCE`: a word of 57 bits has all codes of 16 columns. The two bodies differ in what they
// are compiled for.
#define TERSOR_VECTOR_LANES(NAME, TARGET)                                                                              \
    template <typename E, int R, int BITS, int STAGES, bool ONCE>                                                      \
    TARGET void NAME(const Entries& entries, const uint8_t* codes, int64_t row_bytes, const uint8_t* end, const float* x, \
                     int64_t columns, float* lanes) {                                                                  \
        constexpr int COUNT = 16 / E::WIDTH;                                                                           \
        const int each = (BITS > 0 ? BITS : entries.bits) * E::CODES;                                                  \
        typename E::V sum[R][COUNT];                                                                                   \
        _Pragma("GCC unroll 8")                                                                                        \
        for (int r = 0; r < R; ++r)                                                                                    \
            _Pragma("GCC unroll 8")                                                                                    \
            for (int v = 0; v < COUNT; ++v) sum[r][v] = E::zero();                                                     \
        int64_t bit = 0;                                                                                               \
        for (int64_t c = 0; c < columns; c += 16, bit += each * COUNT) {                                               \
            typename E::V in[COUNT];                                                                                   \
            _Pragma("GCC unroll 8")                                                                                    \
            for (int v = 0; v < COUNT; ++v) in[v] = E::load(x + c + v * E::WIDTH);                                     \
            _Pragma("GCC unroll 8")                                                                                    \
            for (int r = 0; r < R; ++r) {                                                                              \
                const uint8_t* row = codes + r * row_bytes;                                                            \
                uint64_t word = 0;                                                                                     \
                if (ONCE) word = word_at(row + bit / 8, end) >> bit % 8;                                               \
                _Pragma("GCC unroll 8")                                                                                \
                for (int v = 0; v < COUNT; ++v) {                                                                      \
                    if (!ONCE) word = word_at(row + (bit + v * each) / 8, end) >> (bit + v * each) % 8;                \
                    sum[r][v] = E::fma(E::template at<STAGES>(entries, word), in[v], sum[r][v]);                       \
                    if (ONCE) word >>= each;                                                                           \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        _Pragma("GCC unroll 8")                                                                                        \
        for (int r = 0; r < R; ++r)                                                                                    \
            _Pragma("GCC unroll 8")                                                                                    \
            for (int v = 0; v < COUNT; ++v) E::store(lanes + r * LANES + v * E::WIDTH, sum[r][v]);                     \
    }
TERSOR_VECTOR_LANES(lanes_512, TERSOR_ROWS_512)
TERSOR_VECTOR_LANES(lanes_256, TERSOR_ROWS_256)

template <int P>
struct EntryOf {
    using E = Four;
};
template <>
struct EntryOf<2> {
    using E = Two;
};
template <>
struct EntryOf<8> {
    using E = Eight;
};
template <>
struct EntryOf<16> {
    using E = Sixteen;
};
#endif

// `BITS`: of a code, 0 where they are not known when this is compiled. `STAGES`: 1, 2, or 0 for more.
template <int P, int BITS, int STAGES>
class Codebook final : public VectorRows<Codebook<P, BITS, STAGES>, P> {
    using Base = VectorRows<Codebook<P, BITS, STAGES>, P>;

  public:
    // book (stages, entries, unit)
    Codebook(Vectors stored, int index_bits, In<float, 3> book) : Base(std::move(stored)) {
        const int64_t entries = static_cast<int64_t>(book.shape(0) * book.shape(1)), real = this->real;
        table_.resize(entries * P);
        for (int64_t i = 0; i < entries; ++i) std::copy_n(book.data() + i * real, real, table_.data() + i * P);
        entries_ = {table_.data(), static_cast<int>(this->stored_.bits), index_bits, static_cast<int>(book.shape(0))};
    }

    TERSOR_INLINE void one(int64_t row, int64_t first, int64_t count, float* to) const {
        const int64_t bits = BITS > 0 ? BITS : entries_.bits, per_word = 57 / bits;
        const uint8_t *codes = this->bytes + row * this->row_bytes, *end = this->stored_.end();
        const uint64_t mask = (uint64_t{1} << bits) - 1;
        const float* table = table_.data();
        int64_t bit = first / P * bits;
        for (int64_t left = count / P; left > 0; left -= per_word, bit += per_word * bits) {
            uint64_t word = word_at(codes + bit / 8, end) >> bit % 8;
            const int64_t here = std::min(left, per_word);
            for (int64_t i = 0; i < here; ++i, word >>= bits, to += P) entry(table, word & mask, to);
        }
    }

    bool lanes_of_one(Isa isa, int64_t row, const float* x, float* lanes) const override {
#ifdef TERSOR_X86_ROWS
        using E = typename EntryOf<P>::E;
        const int64_t bits = entries_.bits;
        if (isa == Isa::portable || this->columns % 16 > 0 || bits * E::CODES > 57) return false;
        if (isa == Isa::avx2 && P == 16) return false;
        const bool once = 16 / P * bits <= 57;
        const uint8_t *codes = this->bytes + row * this->row_bytes, *end = this->stored_.end();
        const auto run = [&](auto&& of, int first) {
            of(entries_, codes + first * this->row_bytes, this->row_bytes, end, x, this->columns, lanes + first * LANES);
        };
        if (isa == Isa::avx512) {
            run(once ? lanes_512<E, ROWS, BITS, STAGES, true> : lanes_512<E, ROWS, BITS, STAGES, false>, 0);
        } else if constexpr (P < 16) {
            for (int first = 0; first < ROWS; first += 2)
                run(once ? lanes_256<E, 2, BITS, STAGES, true> : lanes_256<E, 2, BITS, STAGES, false>, first);
        }
        return true;
#else
        return false;
#endif
    }

  private:
    TERSOR_INLINE void entry(const float* table, uint64_t code, float* to) const {
        if (STAGES == 1) {
            std::memcpy(to, table + code * P, P * sizeof(float));
            return;
        }
        const uint64_t mask = (uint64_t{1} << entries_.index_bits) - 1;
        float sum[P];
        std::memcpy(sum, table + (code & mask) * P, sizeof sum);
        for (int stage = 1; stage < (STAGES > 0 ? STAGES : entries_.stages); ++stage) {
            const uint64_t at =
                (static_cast<uint64_t>(stage) << entries_.index_bits) | (code >> stage * entries_.index_bits & mask);
            const float* from = table + at * P;
            for (int i = 0; i < P; ++i) sum[i] += from[i];
        }
        std::memcpy(to, sum, sizeof sum);
    }

    std::vector<float> table_;  // (stages * entries, P)
    Entries entries_;
};

template <int P>
DecoderPtr codebook_of(Vectors stored, int index_bits, const In<float, 3>& book) {
    if (book.shape(0) == 2) return std::make_shared<Codebook<P, 0, 2>>(std::move(stored), index_bits, book);
    if (book.shape(0) > 2) return std::make_shared<Codebook<P, 0, 0>>(std::move(stored), index_bits, book);
    if (index_bits == 8) return std::make_shared<Codebook<P, 8, 1>>(std::move(stored), index_bits, book);
    if (index_bits == 12) return std::make_shared<Codebook<P, 12, 1>>(std::move(stored), index_bits, book);
    return std::make_shared<Codebook<P, 0, 1>>(std::move(stored), index_bits, book);
}

ProductPtr codebook(In<uint8_t, 2> codes, In<uint16_t, 1> scale, In<float, 3> book, int64_t columns) {
    const int64_t stages = static_cast<int64_t>(book.shape(0)), entries = static_cast<int64_t>(book.shape(1)),
                  unit = static_cast<int64_t>(book.shape(2));
    int bits = 0;
    while (bits < 14 && (int64_t{1} << bits) < entries) ++bits;
    require(bits >= 1 && (int64_t{1} << bits) == entries, "a codebook has 2 to 16384 entries, a power of two, not " +
                                                              std::to_string(entries));
    require(1 <= unit && unit <= 16, "entries have 1 to 16 columns, not " + std::to_string(unit));
    require(1 <= stages && stages * bits <= 30, "codes have 1 to 30 bits, not " + std::to_string(stages * bits));
    Vectors stored{std::move(codes), std::move(scale), columns, unit, stages * bits};
    stored.check();
    if (unit <= 2) return float_rows(codebook_of<2>(std::move(stored), bits, book));
    if (unit <= 4) return float_rows(codebook_of<4>(std::move(stored), bits, book));
    if (unit <= 8) return float_rows(codebook_of<8>(std::move(stored), bits, book));
    return float_rows(codebook_of<16>(std::move(stored), bits, book));
}

#ifdef TERSOR_X86_ROWS
// A word of E8P as eight floats: three tables and no arithmetic on bits.
struct Words {
    const uint32_t (*magnitudes)[8];
    const uint32_t (*signs)[8];
    const float (*moves)[8];
};
#define TERSOR_WORD_LANES(NAME, TARGET)                                                                                \
    template <int R>                                                                                                   \
    TARGET void NAME(const Words& words, const uint8_t* codes, int64_t row_bytes, const float* x, int64_t columns,     \
                     float* lanes) {                                                                                   \
        __m256 sum[R][2];                                                                                              \
        _Pragma("GCC unroll 8")                                                                                        \
        for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_ps();                                       \
        for (int64_t c = 0; c < columns; c += 16) {                                                                    \
            const __m256 in[2] = {_mm256_loadu_ps(x + c), _mm256_loadu_ps(x + c + 8)};                                 \
            _Pragma("GCC unroll 8")                                                                                    \
            for (int r = 0; r < R; ++r) {                                                                              \
                uint32_t word;                                                                                         \
                std::memcpy(&word, codes + r * row_bytes + c / 4, 4);                                                  \
                _Pragma("GCC unroll 8")                                                                                \
                for (int v = 0; v < 2; ++v, word >>= 16) {                                                             \
                    const __m256 size = _mm256_loadu_ps(reinterpret_cast<const float*>(words.magnitudes[word & 255])); \
                    const __m256 sign = _mm256_loadu_ps(reinterpret_cast<const float*>(words.signs[word >> 8 & 255])); \
                    const __m256 move = _mm256_loadu_ps(words.moves[word >> 15 & 1]);                                  \
                    sum[r][v] = _mm256_fmadd_ps(_mm256_add_ps(_mm256_xor_ps(size, sign), move), in[v], sum[r][v]);     \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        _Pragma("GCC unroll 8")                                                                                        \
        for (int r = 0; r < R; ++r)                                                                                    \
            _Pragma("GCC unroll 8")                                                                                    \
            for (int v = 0; v < 2; ++v) _mm256_storeu_ps(lanes + r * LANES + 8 * v, sum[r][v]);                        \
    }
TERSOR_WORD_LANES(words_512, TERSOR_ROWS_512)
TERSOR_WORD_LANES(words_256, TERSOR_ROWS_256)
#endif

// Words of 16 bits for 8 columns each: which of 256 patterns of magnitudes, seven signs, of which the eighth makes the sum
// of the halves even, and which way all are moved. In quarters.
class E8P final : public VectorRows<E8P, 8> {
  public:
    // patterns (256, 8): 0, 1 or 2 for magnitudes 1/2, 3/2 and 5/2
    E8P(Vectors stored, const In<uint8_t, 2>& patterns) : VectorRows(std::move(stored)) {
        for (int p = 0; p < 256; ++p) {
            int sum = 0, negative = 0;
            for (int i = 0; i < 7; ++i) negative += p >> i & 1;
            for (int i = 0; i < 8; ++i) {
                const uint8_t digit = patterns.data()[8 * p + i];
                require(digit <= 2, "patterns are of 0, 1 and 2");
                sum += digit;
                const float size = static_cast<float>(4 * digit + 2);
                std::memcpy(&magnitudes_[p][i], &size, 4);
                signs_[p][i] = static_cast<uint32_t>(i < 7 ? p >> i & 1 : negative & 1) << 31;
            }
            // The last sign is that of an even number of signs, turned where the digits' sum is odd.
            magnitudes_[p][7] |= static_cast<uint32_t>(sum & 1) << 31;
        }
    }

    float factor(int64_t row) const override { return 0.25f * VectorRows::factor(row); }

    TERSOR_INLINE void one(int64_t row, int64_t first, int64_t count, float* to) const {
        const uint8_t* codes = this->bytes + row * this->row_bytes + first / 4;
        for (int64_t c = 0; c < count; c += 8, codes += 2, to += 8) {
            uint32_t bits[8];
            for (int i = 0; i < 8; ++i) bits[i] = magnitudes_[codes[0]][i] ^ signs_[codes[1]][i];
            float each[8];
            std::memcpy(each, bits, sizeof each);
            const float* move = moves_[codes[1] >> 7];
            for (int i = 0; i < 8; ++i) to[i] = each[i] + move[i];
        }
    }

    bool lanes_of_one(Isa isa, int64_t row, const float* x, float* lanes) const override {
#ifdef TERSOR_X86_ROWS
        if (isa == Isa::portable || this->columns % 16 > 0) return false;
        const Words words{magnitudes_, signs_, moves_};
        const auto run = isa == Isa::avx512 ? words_512<ROWS> : words_256<ROWS>;
        run(words, this->bytes + row * this->row_bytes, this->row_bytes, x, this->columns, lanes);
        return true;
#else
        return false;
#endif
    }

  private:
    alignas(64) uint32_t magnitudes_[256][8];
    alignas(64) uint32_t signs_[256][8];
    alignas(64) float moves_[2][8] = {{1, 1, 1, 1, 1, 1, 1, 1}, {-1, -1, -1, -1, -1, -1, -1, -1}};
};

ProductPtr e8p(In<uint8_t, 2> codes, In<uint16_t, 1> scale, In<uint8_t, 2> patterns, int64_t columns) {
    require(patterns.shape(0) == 256 && patterns.shape(1) == 8, "there are 256 patterns of 8 columns");
    Vectors stored{std::move(codes), std::move(scale), columns, 8, 16};
    stored.check();
    return float_rows(std::make_shared<E8P>(std::move(stored), patterns));
}

}  // namespace

void bind_codebook(nb::module_& module) {
    module.def("codebook", &codebook, nb::arg("codes"), nb::arg("scale"), nb::arg("book"), nb::arg("columns"));
    module.def("e8p", &e8p, nb::arg("codes"), nb::arg("scale"), nb::arg("patterns"), nb::arg("columns"));
}

}  // namespace tersor
