// A linear layer that reads few rows, with the adapter that peft has put on it, as one operator.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <optional>

#include "vector.h"
// (rows.h reads divergence.h, which is written in the functions of vector.h)
#include "rows.h"

#include "../library.h"
#include "matrices.h"

namespace selfdistill {

const Kernels& kernels();  // of the instruction set in use, csrc/cpu/ops.cpp

namespace {

using at::Tensor;

// Products of a thread's share at the least: fewer take less time than waking a thread.
constexpr int64_t kShare = 1 << 17;
constexpr int64_t kStep = 48;    // columns of a share: whole tiles of any instruction set
constexpr int64_t kWidest = 64;  // rows of a tile at the most, of any instruction set

// The rows and zeros behind them, as many as the tiles of few_rows.inl read, and not more: they fill the smallest cache.
int64_t width_of(int64_t rows) {
  if (rows > kWidest) return (rows + kWidest - 1) / kWidest * kWidest;
  int64_t width = 16;
  while (width < rows) width *= 2;
  return width;
}

void multiply(const FewRows& p) {
  const int64_t steps = (p.columns + kStep - 1) / kStep, work = kStep * p.rows * (p.depth + p.rank);
  at::parallel_for(0, steps, std::max<int64_t>(kShare / std::max<int64_t>(work, 1), 1), [&](int64_t begin, int64_t end) {
    kernels().few_rows(p, begin * kStep, std::min(end * kStep, p.columns));
  });
}

// A product of `rows` vectors that lie turned round, [depth, width].
FewRows product(const Tensor& turned, int64_t rows, const Tensor& weight) {
  FewRows p;
  p.x = turned.const_data_ptr<float>();
  p.rows = rows, p.depth = turned.size(0), p.width = turned.size(1);
  p.weight = weight.const_data_ptr<float>();
  p.columns = weight.size(0), p.weight_stride = weight.stride(0);
  return p;
}

// [rows, out] = x [rows, in] weight [out, in]^T + bias [out] + scaling * x down [rank, in]^T up [out, rank]^T
Tensor few_rows_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& down, const std::optional<Tensor>& up, double scaling) {
  const int64_t rows = x.size(0), depth = x.size(1), columns = weight.size(0);
  check_operand("x", x, at::kFloat, rows, depth);
  check_operand("weight", weight, at::kFloat, columns, depth);
  TORCH_CHECK(down.has_value() == up.has_value(), "down and up: expected both or neither");
  const auto options = at::TensorOptions().dtype(at::kFloat);
  const int64_t width = width_of(rows);
  Tensor turned = at::zeros({depth, width}, options), out = at::empty({rows, columns}, options), inner;
  turned.narrow(1, 0, rows).copy_(x.t());
  FewRows p = product(turned, rows, weight);
  p.out = out.data_ptr<float>();
  p.row_stride = columns, p.column_stride = 1;
  if (bias) {
    TORCH_CHECK(bias->scalar_type() == at::kFloat && bias->is_contiguous() && bias->dim() == 1 && bias->size(0) == columns,
                "bias: expected contiguous float32 [", columns, "], got ", bias->scalar_type(), " ", bias->sizes());
    p.bias = bias->const_data_ptr<float>();
  }
  if (up) {
    const int64_t rank = down->size(0);
    check_operand("down", *down, at::kFloat, rank, depth);
    check_operand("up", *up, at::kFloat, columns, rank);
    inner = at::zeros({rank, width}, options);
    FewRows first = product(turned, rows, *down);
    first.out = inner.data_ptr<float>();
    first.row_stride = 1, first.column_stride = width;
    first.scaling = (float)scaling;
    multiply(first);
    p.inner = inner.const_data_ptr<float>();
    p.up = up->const_data_ptr<float>();
    p.rank = rank, p.up_stride = up->stride(0);
  }
  multiply(p);
  return out;
}

}  // namespace
}  // namespace selfdistill

SELFDISTILL_LIBRARY_IMPL(CPU, m) { m.impl("few_rows_linear", selfdistill::few_rows_linear); }
