// A linear layer that reads few rows, as when a model samples: what the kernel of few_rows.inl takes, without torch.
#pragma once

#include <stdint.h>

namespace selfdistill {

// out [rows, columns] = scaling * (x weight [columns, depth]^T + inner up [columns, rank]^T) + bias
struct FewRows {
  const float* x = nullptr;  // turned round, [depth, width]
  int64_t rows = 0, depth = 0;
  int64_t width = 0;  // rows and zeros, for whole tiles
  const float* weight = nullptr;
  int64_t columns = 0, weight_stride = 0;
  const float* bias = nullptr;  // [columns] or nullptr
  // Of an adapter; rank 0: none.
  const float* inner = nullptr;  // [rank, width]
  const float* up = nullptr;
  int64_t rank = 0, up_stride = 0;
  float scaling = 1.0f;
  // Element (r, c) lies at r * row_stride + c * column_stride.
  float* out = nullptr;
  int64_t row_stride = 0, column_stride = 0;
};

}  // namespace selfdistill
