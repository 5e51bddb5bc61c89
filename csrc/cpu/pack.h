// bfloat16 matrices into the two layouts that a brgemm reads and its sums back to bfloat16, without torch: compiled with the
// flags of AVX-512.
//
// "Pairs": the operand B [depth, width], its rows in pairs, (depth / 2) x width x 2. Whatever lies outside the source is 0.
#pragma once

#include <stdint.h>

namespace selfdistill {

// The products are cut along their depth into multiples of this, the depth of an AMX tile.
static constexpr int64_t kDepthStep = 32;

// from [depth, columns] -> one after the other, pairs [padded_depth, width] of each `width` columns (a multiple of 32)
void pack_pairs(const uint16_t* from, int64_t stride, int64_t depth, int64_t columns, int64_t padded_depth, int64_t width,
                uint16_t* to);
// from [columns, depth] -> pairs [padded_depth, width] of its transpose
void pack_pairs_transposed(const uint16_t* from, int64_t stride, int64_t columns, int64_t depth, int64_t padded_depth,
                           int64_t width, uint16_t* to);
// from [rows, columns] -> its transpose [columns, padded_rows], row-major
void transpose(const uint16_t* from, int64_t stride, int64_t rows, int64_t columns, int64_t padded_rows, uint16_t* to);
// to nearest even
void round_to_bfloat16(const float* from, int64_t count, uint16_t* to);

}  // namespace selfdistill
