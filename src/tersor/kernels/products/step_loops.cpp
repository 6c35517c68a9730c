#include "step_loops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "product.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define TERSOR_STEP_X86
#endif

namespace tersor {

uint16_t to_half(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to 65536 or more
    if (bits < 0x38800000) {                       // below the least normal number: a multiple of 2^-24
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 16777216.0f));
    }
    const uint32_t rounded = bits + 0xfff + (bits >> 13 & 1);
    return sign | static_cast<uint16_t>((rounded - 0x38000000) >> 13);
}

float from_half(uint16_t bits) {
    const uint32_t sign = uint32_t{bits & 0x8000u} << 16, rest = bits & 0x7fffu;
    if (rest < 0x400) {
        const float magnitude = static_cast<float>(rest) * (1.0f / 16777216.0f);
        return sign ? -magnitude : magnitude;
    }
    const uint32_t wide = sign | (rest >= 0x7c00 ? 0x7f800000 | (rest & 0x3ff) << 13 : (rest << 13) + 0x38000000);
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

namespace {

namespace portable {

struct Lanes {
    float v[16];

    static Lanes all(float x) {
        Lanes r;
        for (float& value : r.v) value = x;
        return r;
    }
    static Lanes load(const float* x) {
        Lanes r;
        std::memcpy(r.v, x, sizeof r.v);
        return r;
    }
    static Lanes load(const uint16_t* x) {
        Lanes r;
        for (int i = 0; i < 16; ++i) r.v[i] = from_half(x[i]);
        return r;
    }
    void store(float* x) const { std::memcpy(x, v, sizeof v); }
    template <typename F>
    static Lanes each(Lanes a, Lanes b, F f) {
        for (int i = 0; i < 16; ++i) a.v[i] = f(a.v[i], b.v[i]);
        return a;
    }
    friend Lanes operator+(Lanes a, Lanes b) { return each(a, b, [](float x, float y) { return x + y; }); }
    friend Lanes operator-(Lanes a, Lanes b) { return each(a, b, [](float x, float y) { return x - y; }); }
    friend Lanes operator*(Lanes a, Lanes b) { return each(a, b, [](float x, float y) { return x * y; }); }
    friend Lanes operator/(Lanes a, Lanes b) { return each(a, b, [](float x, float y) { return x / y; }); }
    static Lanes most(Lanes a, Lanes b) { return each(a, b, [](float x, float y) { return x > y ? x : y; }); }
    static Lanes least(Lanes a, Lanes b) { return each(a, b, [](float x, float y) { return x < y ? x : y; }); }
    static Lanes fma(Lanes a, Lanes b, Lanes c) { return a * b + c; }  // not fused: there may be no instruction for it
    // p * 2^n, where n is in the low bits of 1.5 * 2^23 + n.
    static Lanes times_power(Lanes p, Lanes shifted) {
        return each(p, shifted, [](float x, float y) {
            uint32_t a, b;
            std::memcpy(&a, &x, 4);
            std::memcpy(&b, &y, 4);
            a += b << 23;
            std::memcpy(&x, &a, 4);
            return x;
        });
    }
};

#define TERSOR_STEP
#include "step_loops.inc"
#undef TERSOR_STEP

}  // namespace portable

#if defined(TERSOR_STEP_X86)

#define TERSOR_STEP __attribute__((target("avx2,fma,f16c")))
#define TERSOR_LANE TERSOR_STEP static inline __attribute__((always_inline))
#define TERSOR_FRIEND TERSOR_STEP friend inline __attribute__((always_inline))

namespace avx2 {

struct Lanes {
    __m256 a, b;

    TERSOR_LANE Lanes all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    TERSOR_LANE Lanes load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
    TERSOR_LANE Lanes load(const uint16_t* x) {
        const __m128i* at = reinterpret_cast<const __m128i*>(x);
        return {_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at + 1))};
    }
    TERSOR_STEP inline __attribute__((always_inline)) void store(float* x) const {
        _mm256_storeu_ps(x, a);
        _mm256_storeu_ps(x + 8, b);
    }
    TERSOR_FRIEND Lanes operator+(Lanes x, Lanes y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
    TERSOR_FRIEND Lanes operator-(Lanes x, Lanes y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
    TERSOR_FRIEND Lanes operator*(Lanes x, Lanes y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
    TERSOR_FRIEND Lanes operator/(Lanes x, Lanes y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
    TERSOR_LANE Lanes most(Lanes x, Lanes y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
    TERSOR_LANE Lanes least(Lanes x, Lanes y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
    TERSOR_LANE Lanes fma(Lanes x, Lanes y, Lanes z) {
        return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
    }
    TERSOR_LANE __m256 raised(__m256 p, __m256 shifted) {
        return _mm256_castsi256_ps(
            _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
    }
    TERSOR_LANE Lanes times_power(Lanes p, Lanes shifted) { return {raised(p.a, shifted.a), raised(p.b, shifted.b)}; }
};

#include "step_loops.inc"

}  // namespace avx2

#undef TERSOR_STEP
#define TERSOR_STEP __attribute__((target("avx512f,avx512bw,avx512vl")))

// Some forms without a mask make GCC 12 warn of its own headers; with a constant one it makes the same instructions.
namespace avx512 {

struct Lanes {
    __m512 a;

    TERSOR_LANE Lanes all(float x) { return {_mm512_set1_ps(x)}; }
    TERSOR_LANE Lanes load(const float* x) { return {_mm512_loadu_ps(x)}; }
    TERSOR_LANE Lanes load(const uint16_t* x) {
        return {_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)))};
    }
    TERSOR_STEP inline __attribute__((always_inline)) void store(float* x) const { _mm512_storeu_ps(x, a); }
    TERSOR_FRIEND Lanes operator+(Lanes x, Lanes y) { return {_mm512_add_ps(x.a, y.a)}; }
    TERSOR_FRIEND Lanes operator-(Lanes x, Lanes y) { return {_mm512_sub_ps(x.a, y.a)}; }
    TERSOR_FRIEND Lanes operator*(Lanes x, Lanes y) { return {_mm512_mul_ps(x.a, y.a)}; }
    TERSOR_FRIEND Lanes operator/(Lanes x, Lanes y) { return {_mm512_div_ps(x.a, y.a)}; }
    TERSOR_LANE Lanes most(Lanes x, Lanes y) { return {_mm512_maskz_max_ps(0xffff, x.a, y.a)}; }
    TERSOR_LANE Lanes least(Lanes x, Lanes y) { return {_mm512_maskz_min_ps(0xffff, x.a, y.a)}; }
    TERSOR_LANE Lanes fma(Lanes x, Lanes y, Lanes z) { return {_mm512_fmadd_ps(x.a, y.a, z.a)}; }
    TERSOR_LANE Lanes times_power(Lanes p, Lanes shifted) {
        const __m512i power = _mm512_maskz_slli_epi32(0xffff, _mm512_castps_si512(shifted.a), 23);
        return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p.a), power))};
    }
};

#include "step_loops.inc"

}  // namespace avx512

#endif

}  // namespace

const Loops& loops() {
#if defined(TERSOR_STEP_X86)
    if (isa() == Isa::avx512) return avx512::LOOPS;
    if (isa() == Isa::avx2) return avx2::LOOPS;
#endif
    return portable::LOOPS;
}

}  // namespace tersor
