// Tensor types of llama.cpp with a code for 4 or 8 weights: a point of a grid, and signs. What the bytes mean is said in
// tersor/codecs/gguf_grids.py; weights are the same to the bit.
#include <memory>
#include <utility>
#include <vector>

#include "gguf_rows.h"

namespace tersor {
namespace {

// Points as floats, and signs of eight weights as bits to turn: the eighth where it is not stored.
struct Grid {
    std::vector<float> points;
    alignas(32) uint32_t all[256][8], even[128][8];

    explicit Grid(const In<float, 2>& from) : points(from.data(), from.data() + from.shape(0) * from.shape(1)) {
        for (uint32_t s = 0; s < 256; ++s) {
            uint32_t odd = 0;
            for (uint32_t i = 0; i < 8; ++i) {
                all[s][i] = (s >> i & 1) << 31;
                odd ^= i < 7 ? s >> i & 1 : 0;
                if (s < 128) even[s][i] = (i < 7 ? s >> i & 1 : odd) << 31;
            }
        }
    }
};

// N weights: a point, turned, times a scale.
template <int N>
TERSOR_INLINE void turned(const float* point, const uint32_t* signs, float scale, float* __restrict to) {
    uint32_t bits[N];
    std::memcpy(bits, point, sizeof bits);
    for (int i = 0; i < N; ++i) bits[i] ^= signs[i];
    float values[N];
    std::memcpy(values, bits, sizeof bits);
    for (int i = 0; i < N; ++i) to[i] = values[i] * scale;
}

TERSOR_INLINE uint32_t word_of(const uint8_t* from) {
    uint32_t word;
    std::memcpy(&word, from, 4);
    return word;
}

struct WithGrid {
    std::shared_ptr<const Grid> grid;
};

struct IQ2_XXS : WithGrid {
    static constexpr int BLOCK = 256, BYTES = 66, LEVELS = 256, DIMS = 8;
    TERSOR_INLINE void block(const uint8_t* b, float* to) const {
        const Grid& known = *grid;
        const float d = half_at(b);
        for (int g = 0; g < 8; ++g, to += 32) {
            const uint8_t* pair = b + 2 + 8 * g;
            const uint32_t word = word_of(pair + 4);
            const float scale = d * ((static_cast<float>(word >> 28) + 0.5f) * 0.25f);
            for (int i = 0; i < 4; ++i)
                turned<8>(known.points.data() + 8 * pair[i], known.even[word >> 7 * i & 127], scale, to + 8 * i);
        }
    }
};

struct IQ2_XS : WithGrid {
    static constexpr int BLOCK = 256, BYTES = 74, LEVELS = 512, DIMS = 8;
    TERSOR_INLINE void block(const uint8_t* b, float* to) const {
        const Grid& known = *grid;
        const float d = half_at(b);
        for (int g = 0; g < 16; ++g) {
            const int step = b[66 + g / 2] >> (4 * (g % 2)) & 15;
            const float scale = d * ((static_cast<float>(step) + 0.5f) * 0.25f);
            for (int i = 2 * g; i < 2 * g + 2; ++i) {
                const uint32_t code = b[2 + 2 * i] | b[3 + 2 * i] << 8;
                turned<8>(known.points.data() + 8 * (code & 511), known.even[code >> 9], scale, to + 8 * i);
            }
        }
    }
};

struct IQ2_S : WithGrid {
    static constexpr int BLOCK = 256, BYTES = 82, LEVELS = 1024, DIMS = 8;
    TERSOR_INLINE void block(const uint8_t* b, float* to) const {
        const Grid& known = *grid;
        const float d = half_at(b);
        for (int g = 0; g < 16; ++g) {
            const int step = b[74 + g / 2] >> (4 * (g % 2)) & 15;
            const float scale = d * ((static_cast<float>(step) + 0.5f) * 0.25f);
            for (int i = 2 * g; i < 2 * g + 2; ++i) {
                const uint32_t point = b[2 + i] | (b[66 + i / 4] >> (2 * (i % 4)) & 3) << 8;
                turned<8>(known.points.data() + 8 * point, known.all[b[34 + i]], scale, to + 8 * i);
            }
        }
    }
};

struct IQ3_XXS : WithGrid {
    static constexpr int BLOCK = 256, BYTES = 98, LEVELS = 256, DIMS = 4;
    TERSOR_INLINE void block(const uint8_t* b, float* to) const {
        const Grid& known = *grid;
        const float d = half_at(b);
        for (int g = 0; g < 8; ++g, to += 32) {
            const uint8_t* points = b + 2 + 8 * g;
            const uint32_t word = word_of(b + 66 + 4 * g);
            const float scale = d * ((static_cast<float>(word >> 28) + 0.5f) * 0.5f);
            for (int i = 0; i < 4; ++i) {
                const uint32_t* signs = known.even[word >> 7 * i & 127];
                turned<4>(known.points.data() + 4 * points[2 * i], signs, scale, to + 8 * i);
                turned<4>(known.points.data() + 4 * points[2 * i + 1], signs + 4, scale, to + 8 * i + 4);
            }
        }
    }
};

struct IQ3_S : WithGrid {
    static constexpr int BLOCK = 256, BYTES = 110, LEVELS = 512, DIMS = 4;
    TERSOR_INLINE void block(const uint8_t* b, float* to) const {
        const Grid& known = *grid;
        const float d = half_at(b);
        for (int g = 0; g < 8; ++g) {
            const int step = b[106 + g / 2] >> (4 * (g % 2)) & 15;
            const float scale = d * ((static_cast<float>(step) + 0.5f) * 2.0f);
            for (int i = 4 * g; i < 4 * g + 4; ++i) {
                const uint32_t *signs = known.all[b[74 + i]], tops = b[66 + i / 4] >> (2 * (i % 4));
                const uint32_t first = b[2 + 2 * i] | (tops & 1) << 8, second = b[3 + 2 * i] | (tops >> 1 & 1) << 8;
                turned<4>(known.points.data() + 4 * first, signs, scale, to + 8 * i);
                turned<4>(known.points.data() + 4 * second, signs + 4, scale, to + 8 * i + 4);
            }
        }
    }
};

template <typename T>
ProductPtr made(const BlockBytes& stored, const In<float, 2>& points) {
    require(points.shape(0) == T::LEVELS && points.shape(1) == T::DIMS,
            stored.type + " has " + std::to_string(T::LEVELS) + " points of " + std::to_string(T::DIMS) + " weights");
    return stored.rows<T>(T{{std::make_shared<const Grid>(points)}});
}

ProductPtr gguf_grid(In<uint8_t, 2> blocks, const std::string& type, In<float, 2> points, int64_t columns) {
    const BlockBytes stored{std::move(blocks), columns, type};
    if (type == "iq2_xxs") return made<IQ2_XXS>(stored, points);
    if (type == "iq2_xs") return made<IQ2_XS>(stored, points);
    if (type == "iq2_s") return made<IQ2_S>(stored, points);
    if (type == "iq3_xxs") return made<IQ3_XXS>(stored, points);
    require(type == "iq3_s", "there is no product of the type " + type);
    return made<IQ3_S>(stored, points);
}

}  // namespace

void bind_gguf_grids(nb::module_& module) {
    module.def("gguf_grid", &gguf_grid, nb::arg("blocks"), nb::arg("type"), nb::arg("points"), nb::arg("columns"));
}

}  // namespace tersor
