// Rows of blocks of bytes, as llama.cpp's tensor types have them.
#pragma once

#include <string>
#include <utility>

#include "bind.h"
#include "float_rows.h"

namespace tersor {

TERSOR_INLINE float half_at(const uint8_t* from) {
    uint16_t half;
    std::memcpy(&half, from, 2);
    return float_of_half(half);
}

// `T`: the type: `BLOCK` weights in `BYTES` bytes, and `block(bytes, to)`, which writes their values.
template <typename T>
class BlockRows final : public EveryLevel<BlockRows<T>> {
  public:
    BlockRows(In<uint8_t, 2> blocks, int64_t columns, T type)
        : EveryLevel<BlockRows<T>>(static_cast<int64_t>(blocks.shape(0)), columns, T::BLOCK, blocks.data(),
                                   static_cast<int64_t>(blocks.shape(1))),
          blocks_(std::move(blocks)),
          type_(std::move(type)) {}

    TERSOR_INLINE void one(int64_t row, int64_t first, int64_t count, float* to) const {
        const uint8_t* from = this->bytes + row * this->row_bytes + first / T::BLOCK * T::BYTES;
        for (int64_t c = 0; c < count; c += T::BLOCK, from += T::BYTES) {
#if defined(__GNUC__)
            // Vectors are made of the weights of a block. Without this, GCC also makes them of one weight of many blocks.
            __asm__ volatile("");
#endif
            type_.block(from, to + c);
        }
    }

  private:
    In<uint8_t, 2> blocks_;
    T type_;
};

// What is stored of a weight: blocks (rows, bytes of a row).
struct BlockBytes {
    In<uint8_t, 2> blocks;
    int64_t columns;
    std::string type;

    template <typename T>
    ProductPtr rows(T of = {}) const {
        require(columns > 0 && columns % T::BLOCK == 0,
                "blocks of " + std::to_string(T::BLOCK) + " do not divide " + std::to_string(columns) + " columns");
        const int64_t wanted = columns / T::BLOCK * T::BYTES;
        require(static_cast<int64_t>(blocks.shape(1)) == wanted,
                "rows of " + type + " have " + std::to_string(blocks.shape(1)) + " bytes, and " +
                    std::to_string(columns) + " columns take " + std::to_string(wanted));
        return float_rows(std::make_shared<BlockRows<T>>(blocks, columns, std::move(of)));
    }
};

}  // namespace tersor
