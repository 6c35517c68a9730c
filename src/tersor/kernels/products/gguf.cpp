// Tensor types of llama.cpp with a code for each weight, block by block as they are stored; what the bytes mean is said
// in tersor/codecs/gguf_layout.py. Each weight is computed in that order of operations, so that it is the same to the bit.
#include <utility>

#include "bind.h"
#include "gguf_rows.h"

#ifdef TERSOR_X86_ROWS
#include <immintrin.h>
#endif

namespace tersor {
namespace {

constexpr float CURVED[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// N weights (code - ZERO) * scale, of bytes whose bits from SHIFT on are codes.
template <int N, int SHIFT, int MASK, int ZERO>
TERSOR_INLINE void multiples(const uint8_t* codes, float scale, float* __restrict to) {
    for (int i = 0; i < N; ++i) to[i] = static_cast<float>((codes[i] >> SHIFT & MASK) - ZERO) * scale;
}

// The same less an offset.
template <int N, int SHIFT, int MASK>
TERSOR_INLINE void lowered(const uint8_t* codes, float scale, float offset, float* __restrict to) {
    for (int i = 0; i < N; ++i) to[i] = static_cast<float>(codes[i] >> SHIFT & MASK) * scale - offset;
}

// N weights whose codes have a bit more, bit `plane` of other bytes, or of bits one after the other.
template <int N, int SHIFT, int MASK, int TOP, int ZERO>
TERSOR_INLINE void topped(const uint8_t* codes, const uint8_t* tops, int plane, float scale, float* __restrict to) {
    for (int i = 0; i < N; ++i)
        to[i] = static_cast<float>(((codes[i] >> SHIFT & MASK) | (tops[i] >> plane & 1) << TOP) - ZERO) * scale;
}

template <int N, int SHIFT, int MASK, int TOP>
TERSOR_INLINE void topped(const uint8_t* codes, const uint8_t* tops, int plane, float scale, float offset,
                          float* __restrict to) {
    for (int i = 0; i < N; ++i)
        to[i] = static_cast<float>((codes[i] >> SHIFT & MASK) | (tops[i] >> plane & 1) << TOP) * scale - offset;
}

TERSOR_INLINE uint32_t word_of(const uint8_t* from) {
    uint32_t word;
    std::memcpy(&word, from, 4);
    return word;
}

struct Q8_0 {
    static constexpr int BLOCK = 32, BYTES = 34;
    TERSOR_INLINE static void block(const uint8_t* b, float* __restrict to) {
        const float d = half_at(b);
        for (int i = 0; i < 32; ++i) to[i] = static_cast<float>(static_cast<int8_t>(b[2 + i])) * d;
    }
};

struct Q4_0 {
    static constexpr int BLOCK = 32, BYTES = 18;
    TERSOR_INLINE static void block(const uint8_t* b, float* to) {
        const float d = half_at(b);
        multiples<16, 0, 15, 8>(b + 2, d, to);
        multiples<16, 4, 15, 8>(b + 2, d, to + 16);
    }
};

struct Q4_1 {
    static constexpr int BLOCK = 32, BYTES = 20;
    TERSOR_INLINE static void block(const uint8_t* b, float* to) {
        const float d = half_at(b), offset = -half_at(b + 2);
        lowered<16, 0, 15>(b + 4, d, offset, to);
        lowered<16, 4, 15>(b + 4, d, offset, to + 16);
    }
};

// Bits of a word as the fifth bits of codes.
TERSOR_INLINE void fifths(uint32_t word, int32_t* __restrict to) {
    for (int i = 0; i < 32; ++i) to[i] = static_cast<int32_t>(word >> i & 1) << 4;
}

struct Q5_0 {
    static constexpr int BLOCK = 32, BYTES = 22;
    TERSOR_INLINE static void block(const uint8_t* b, float* __restrict to) {
        const float d = half_at(b);
        int32_t top[32];
        fifths(word_of(b + 2), top);
        for (int i = 0; i < 16; ++i) to[i] = static_cast<float>(((b[6 + i] & 15) | top[i]) - 16) * d;
        for (int i = 0; i < 16; ++i) to[16 + i] = static_cast<float>((b[6 + i] >> 4 | top[16 + i]) - 16) * d;
    }
};

struct Q5_1 {
    static constexpr int BLOCK = 32, BYTES = 24;
    TERSOR_INLINE static void block(const uint8_t* b, float* __restrict to) {
        const float d = half_at(b), offset = -half_at(b + 2);
        int32_t top[32];
        fifths(word_of(b + 4), top);
        for (int i = 0; i < 16; ++i) to[i] = static_cast<float>((b[8 + i] & 15) | top[i]) * d - offset;
        for (int i = 0; i < 16; ++i) to[16 + i] = static_cast<float>(b[8 + i] >> 4 | top[16 + i]) * d - offset;
    }
};

#ifdef TERSOR_X86_ROWS
TERSOR_ROWS_512 void curved_512(const uint8_t* codes, float scale, float* to) {
    const __m512 table = _mm512_mul_ps(_mm512_loadu_ps(CURVED), _mm512_set1_ps(scale));
    const __m512i both = _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    _mm512_storeu_ps(to, _mm512_maskz_permutexvar_ps(0xffff, both, table));  // of a number the last four bits count
    _mm512_storeu_ps(to + 16, _mm512_maskz_permutexvar_ps(0xffff, _mm512_maskz_srli_epi32(0xffff, both, 4), table));
}
#endif

// Sixteen bytes of two codes each that name entries of the curved table.
TERSOR_INLINE void curved(const uint8_t* codes, float scale, float* __restrict to) {
#ifdef TERSOR_X86_ROWS
    if (isa() == Isa::avx512) return curved_512(codes, scale, to);
#endif
    float table[16];
    for (int i = 0; i < 16; ++i) table[i] = CURVED[i] * scale;
    for (int i = 0; i < 16; ++i) {
        to[i] = table[codes[i] & 15];
        to[16 + i] = table[codes[i] >> 4];
    }
}

struct IQ4_NL {
    static constexpr int BLOCK = 32, BYTES = 18;
    TERSOR_INLINE static void block(const uint8_t* b, float* to) { curved(b + 2, half_at(b), to); }
};

struct IQ4_XS {
    static constexpr int BLOCK = 256, BYTES = 136;
    TERSOR_INLINE static void block(const uint8_t* b, float* to) {
        const float d = half_at(b);
        for (int g = 0; g < 8; ++g) {
            const int step = (b[4 + g / 2] >> (4 * (g % 2)) & 15) | (b[2 + g / 4] >> (2 * (g % 4)) & 3) << 4;
            curved(b + 8 + 16 * g, d * static_cast<float>(step - 32), to + 32 * g);
        }
    }
};

struct Q2_K {
    static constexpr int BLOCK = 256, BYTES = 84;
    TERSOR_INLINE static void block(const uint8_t* b, float* to) {
        const float d = half_at(b + 80), dmin = half_at(b + 82);
        float scale[16], offset[16];
        for (int g = 0; g < 16; ++g) {
            scale[g] = d * static_cast<float>(b[g] & 15);
            offset[g] = dmin * static_cast<float>(b[g] >> 4);
        }
        for (int run = 0; run < 2; ++run) {
            const uint8_t* codes = b + 16 + 32 * run;
            for (int half = 0; half < 2; ++half) {
                const int g = 8 * run + half;
                float* out = to + 128 * run + 16 * half;
                lowered<16, 0, 3>(codes + 16 * half, scale[g], offset[g], out);
                lowered<16, 2, 3>(codes + 16 * half, scale[g + 2], offset[g + 2], out + 32);
                lowered<16, 4, 3>(codes + 16 * half, scale[g + 4], offset[g + 4], out + 64);
                lowered<16, 6, 3>(codes + 16 * half, scale[g + 6], offset[g + 6], out + 96);
            }
        }
    }
};

struct Q3_K {
    static constexpr int BLOCK = 256, BYTES = 110;
    TERSOR_INLINE static void block(const uint8_t* b, float* to) {
        const float d = half_at(b + 108);
        float scale[16];
        for (int g = 0; g < 16; ++g) {
            const int step = (b[96 + g % 8] >> (4 * (g / 8)) & 15) | (b[104 + g % 4] >> (2 * (g / 4)) & 3) << 4;
            scale[g] = d * static_cast<float>(step - 32);
        }
        for (int run = 0; run < 2; ++run) {
            for (int half = 0; half < 2; ++half) {
                const uint8_t *codes = b + 32 + 32 * run + 16 * half, *tops = b + 16 * half;
                const int g = 8 * run + half, plane = 4 * run;
                float* out = to + 128 * run + 16 * half;
                topped<16, 0, 3, 2, 4>(codes, tops, plane, scale[g], out);
                topped<16, 2, 3, 2, 4>(codes, tops, plane + 1, scale[g + 2], out + 32);
                topped<16, 4, 3, 2, 4>(codes, tops, plane + 2, scale[g + 4], out + 64);
                topped<16, 6, 3, 2, 4>(codes, tops, plane + 3, scale[g + 6], out + 96);
            }
        }
    }
};

// Scales and offsets of eight groups, from steps and lows of 6 bits in 12 bytes, four bytes at a time.
TERSOR_INLINE void sixes(const uint8_t* b, float d, float dmin, float* __restrict scale, float* __restrict offset) {
    const uint64_t first = word_of(b), second = word_of(b + 4), third = word_of(b + 8);
    const uint64_t step = (first & 0x3f3f3f3fu) | ((third & 0x0f0f0f0fu) | (first >> 2 & 0x30303030u)) << 32;
    const uint64_t low = (second & 0x3f3f3f3fu) | ((third >> 4 & 0x0f0f0f0fu) | (second >> 2 & 0x30303030u)) << 32;
    uint8_t steps[8], lows[8];
    std::memcpy(steps, &step, 8);
    std::memcpy(lows, &low, 8);
    for (int g = 0; g < 8; ++g) scale[g] = d * static_cast<float>(steps[g]);
    for (int g = 0; g < 8; ++g) offset[g] = dmin * static_cast<float>(lows[g]);
}

struct Q4_K {
    static constexpr int BLOCK = 256, BYTES = 144;
    TERSOR_INLINE static void block(const uint8_t* b, float* to) {
        float scale[8], offset[8];
        sixes(b + 4, half_at(b), half_at(b + 2), scale, offset);
        for (int g = 0; g < 8; g += 2) {
            lowered<32, 0, 15>(b + 16 + 16 * g, scale[g], offset[g], to + 32 * g);
            lowered<32, 4, 15>(b + 16 + 16 * g, scale[g + 1], offset[g + 1], to + 32 * g + 32);
        }
    }
};

struct Q5_K {
    static constexpr int BLOCK = 256, BYTES = 176;
    TERSOR_INLINE static void block(const uint8_t* b, float* to) {
        float scale[8], offset[8];
        sixes(b + 4, half_at(b), half_at(b + 2), scale, offset);
        for (int g = 0; g < 8; g += 2) {
            topped<32, 0, 15, 4>(b + 48 + 16 * g, b + 16, g, scale[g], offset[g], to + 32 * g);
            topped<32, 4, 15, 4>(b + 48 + 16 * g, b + 16, g + 1, scale[g + 1], offset[g + 1], to + 32 * g + 32);
        }
    }
};

// N weights of a nibble and two bits above.
template <int N, int SHIFT, int ABOVE>
TERSOR_INLINE void six_bits(const uint8_t* codes, const uint8_t* above, float scale, float* __restrict to) {
    for (int i = 0; i < N; ++i)
        to[i] = static_cast<float>(((codes[i] >> SHIFT & 15) | (above[i] >> ABOVE & 3) << 4) - 32) * scale;
}

struct Q6_K {
    static constexpr int BLOCK = 256, BYTES = 210;
    TERSOR_INLINE static void block(const uint8_t* b, float* to) {
        const float d = half_at(b + 208);
        float scale[16];
        for (int g = 0; g < 16; ++g) scale[g] = d * static_cast<float>(static_cast<int8_t>(b[192 + g]));
        for (int run = 0; run < 2; ++run) {
            for (int half = 0; half < 2; ++half) {
                const uint8_t *codes = b + 64 * run + 16 * half, *above = b + 128 + 32 * run + 16 * half;
                const float* s = scale + 8 * run + half;
                float* out = to + 128 * run + 16 * half;
                six_bits<16, 0, 0>(codes, above, s[0], out);
                six_bits<16, 0, 2>(codes + 32, above, s[2], out + 32);
                six_bits<16, 4, 4>(codes, above, s[4], out + 64);
                six_bits<16, 4, 6>(codes + 32, above, s[6], out + 96);
            }
        }
    }
};

template <int N, int POWER>
TERSOR_INLINE void digits(const uint8_t* codes, float scale, float* __restrict to) {
    for (int i = 0; i < N; ++i)
        to[i] = static_cast<float>(((codes[i] * POWER & 255) * 3 >> 8) - 1) * scale;
}

struct TQ1_0 {
    static constexpr int BLOCK = 256, BYTES = 54;
    TERSOR_INLINE static void block(const uint8_t* b, float* to) {
        const float d = half_at(b + 52);
        digits<32, 1>(b, d, to);
        digits<32, 3>(b, d, to + 32);
        digits<32, 9>(b, d, to + 64);
        digits<32, 27>(b, d, to + 96);
        digits<32, 81>(b, d, to + 128);
        digits<16, 1>(b + 32, d, to + 160);
        digits<16, 3>(b + 32, d, to + 176);
        digits<16, 9>(b + 32, d, to + 192);
        digits<16, 27>(b + 32, d, to + 208);
        digits<16, 81>(b + 32, d, to + 224);
        digits<4, 1>(b + 48, d, to + 240);
        digits<4, 3>(b + 48, d, to + 244);
        digits<4, 9>(b + 48, d, to + 248);
        digits<4, 27>(b + 48, d, to + 252);
    }
};

struct TQ2_0 {
    static constexpr int BLOCK = 256, BYTES = 66;
    TERSOR_INLINE static void block(const uint8_t* b, float* to) {
        const float d = half_at(b + 64);
        for (int run = 0; run < 2; ++run) {
            multiples<32, 0, 3, 1>(b + 32 * run, d, to + 128 * run);
            multiples<32, 2, 3, 1>(b + 32 * run, d, to + 128 * run + 32);
            multiples<32, 4, 3, 1>(b + 32 * run, d, to + 128 * run + 64);
            multiples<32, 6, 3, 1>(b + 32 * run, d, to + 128 * run + 96);
        }
    }
};

ProductPtr gguf(In<uint8_t, 2> blocks, const std::string& type, int64_t columns) {
    const BlockBytes stored{std::move(blocks), columns, type};
    if (type == "q8_0") return stored.rows<Q8_0>();
    if (type == "q4_0") return stored.rows<Q4_0>();
    if (type == "q4_1") return stored.rows<Q4_1>();
    if (type == "q5_0") return stored.rows<Q5_0>();
    if (type == "q5_1") return stored.rows<Q5_1>();
    if (type == "iq4_nl") return stored.rows<IQ4_NL>();
    if (type == "iq4_xs") return stored.rows<IQ4_XS>();
    if (type == "q2_k") return stored.rows<Q2_K>();
    if (type == "q3_k") return stored.rows<Q3_K>();
    if (type == "q4_k") return stored.rows<Q4_K>();
    if (type == "q5_k") return stored.rows<Q5_K>();
    if (type == "q6_k") return stored.rows<Q6_K>();
    if (type == "tq1_0") return stored.rows<TQ1_0>();
    require(type == "tq2_0", "there is no product of the type " + type);
    return stored.rows<TQ2_0>();
}

}  // namespace

void bind_gguf(nb::module_& module) {
    module.def("gguf", &gguf, nb::arg("blocks"), nb::arg("type"), nb::arg("columns"));
}

}  // namespace tersor
