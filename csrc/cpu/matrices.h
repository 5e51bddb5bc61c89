// Operands of the products in csrc/cpu: checks, and parts of float32 matrices for the library.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>

namespace selfdistill {

inline void check_operand(const char* name, const at::Tensor& t, at::ScalarType dtype, int64_t rows, int64_t columns) {
  TORCH_CHECK(t.device().is_cpu() && t.scalar_type() == dtype && t.dim() == 2 && t.size(0) == rows &&
                  t.size(1) == columns && (columns == 1 || t.stride(1) == 1) && (rows <= 1 || t.stride(0) >= columns),
              name, ": expected a ", dtype, " CPU tensor [", rows, ", ", columns, "] with contiguous rows, got ",
              t.scalar_type(), " ", t.sizes(), " with strides ", t.strides(), " on ", t.device());
}

// A part of a float32 matrix.
inline at::Tensor view(const float* data, int64_t rows, int64_t columns, int64_t stride) {
  return at::from_blob(const_cast<float*>(data), {rows, columns}, {stride, 1}, at::TensorOptions().dtype(at::kFloat));
}

}  // namespace selfdistill
