// The inner loops of a decoding step besides the products, for each level of instructions.
#pragma once

#include <cstdint>

namespace tersor {

enum class Activation { silu, gelu, gelu_tanh, relu };

// Keys of a head are stored in blocks of 16 positions, dimension by dimension: element (position, d) is at
// (position / 16 * dim + d) * 16 + position % 16. So the products of 16 positions need no sum across a vector. Values
// are stored position by position, `padded` (a multiple of 16) apart, zeros behind the head's dimension. T is float, or
// uint16_t for IEEE half precision.
constexpr int64_t BLOCK = 16;
// Queries that share a head of keys and are worked on together.
constexpr int QUERIES = 4;

struct Loops {
    // y = x / sqrt(mean(x²) + eps) * weight, over n values.
    void (*rms_norm)(const float* x, float* y, const float* weight, int64_t n, float eps);
    // y = (x - mean) / sqrt(variance + eps) * weight + bias; bias may be null.
    void (*layer_norm)(const float* x, float* y, const float* weight, const float* bias, int64_t n, float eps);
    // x, of a head, rotated by angles of which cosines and sines (rotary,) are given; what is behind stays. Element i
    // is paired with i + rotary / 2, or with its neighbour.
    void (*rope)(float* x, const float* cosine, const float* sine, int64_t rotary, bool neighbours);
    // y = activation(x) * up.
    void (*gate)(const float* x, const float* up, float* y, int64_t n, Activation activation);
    void (*add)(const float* x, float* y, int64_t n);  // y += x
    void (*scale)(float* x, float factor, int64_t n);
    void (*soft_cap)(float* x, float cap, int64_t n);  // x = cap * tanh(x / cap)
    // Dot products of `count` (at most QUERIES) queries (count, query_stride) with the keys of `blocks` blocks:
    // out (count, blocks * 16).
    void (*score)(const void* keys, bool half, int64_t blocks, int64_t dim, const float* queries, int64_t query_stride,
                  int count, float* out);
    // Scores to weights exp(scale * s - greatest), capped first where cap > 0, in [first, last); zeros elsewhere in
    // [0, n), whole blocks. Returns their sum, and the greatest scaled score.
    float (*soft_max)(float* scores, int64_t n, int64_t first, int64_t last, float scale, float cap, float* greatest);
    // out[q] = factors[q] * sum over positions in [first, last) of weights[q][position] * values[position], dim each; weights
    // have room for `positions`. Other values are not touched, as they may be left from another text and not be finite.
    void (*weigh)(const void* values, bool half, int64_t positions, int64_t first, int64_t last, int64_t padded, const float* weights, int count,
                  const float* factors, float* out, int64_t out_stride, int64_t dim);
};

const Loops& loops();

// To IEEE half precision, to nearest, ties to even.
uint16_t to_half(float value);
float from_half(uint16_t bits);

}  // namespace tersor
