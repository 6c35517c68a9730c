// Row codes with 512-bit vectors, times inputs of 16 bits.
#include "row_codes.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include "row_loops_avx512.h"

namespace tersor {

TERSOR_512 void rows_avx512_int16(const RowLayout& layout, const RowInputs& inputs, int64_t first, int64_t last, float* y,
                                  int64_t stride) {
    slices<true>(layout, inputs, first, last, y, stride);
}

}  // namespace tersor

#endif
