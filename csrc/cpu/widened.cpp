// Products of bfloat16 matrices in float32, for processors without products of bfloat16: a part of the large operand is widened into
// memory that stays in a core's cache and multiplied there by the library, each thread for itself.
//
// Waiting for all threads between the copy and the product of every part cost a fifth of small problems (docs/decisions).
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

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

using at::BFloat16;
using at::Tensor;

constexpr int64_t kStep = 16;  // columns or elements of a hidden state that a thread takes at the least

// c = a b, or c + a b, by the library with one thread: the caller's threads are busy with other parts.
void multiply(Tensor c, const Tensor& a, const Tensor& b, bool accumulate) {
  if (accumulate) {
    at::addmm_out(c, c, a, b);
  } else {
    at::mm_out(c, a, b);
  }
}

const uint16_t* words(const Tensor& t) { return reinterpret_cast<const uint16_t*>(t.const_data_ptr<BFloat16>()); }

// The buffer [columns, depth], shared out: each of `threads` has room for `share` rows of it.
struct Shares {
  float* memory;
  int64_t depth, share, threads;

  Shares(const Tensor& buffer, int64_t depth) : memory(buffer.data_ptr<float>()), depth(depth) {
    check_operand("buffer", buffer, at::kFloat, buffer.size(0), depth);
    TORCH_CHECK(buffer.is_contiguous() && buffer.size(0) >= 1, "buffer: expected a contiguous tensor with a row, got ",
                buffer.sizes());
    threads = std::clamp<int64_t>(buffer.size(0) / kStep, 1, at::get_num_threads());
    share = buffer.size(0) / threads;
    if (share > kStep) share -= share % kStep;
  }
  // Runs f(first row, rows, memory) for parts of at most a share, by as many threads as have one.
  template <class F>
  void over(int64_t rows, const F& f) const {
    at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      const at::AutoDispatchBelowADInplaceOrView guard;  // a thread's own: nothing here is recorded
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t row = t * share; row < rows; row += threads * share) {
          f(row, std::min(share, rows - row), memory + t * share * depth);
        }
      }
    });
  }
};

// out [R, V] = hidden [R, H] weight [V, H]^T. Threads share the vocabulary.
void gemm_widened_logits_(const Tensor& hidden, const Tensor& weight, Tensor& out, Tensor& buffer) {
  const int64_t rows = hidden.size(0), depth = hidden.size(1), columns = weight.size(0);
  check_operand("hidden", hidden, at::kFloat, rows, depth);
  check_operand("weight", weight, at::kBFloat16, columns, depth);
  check_operand("out", out, at::kFloat, rows, columns);
  const Shares shares(buffer, depth);
  if (rows == 0) return;
  const uint16_t* w = words(weight);
  float* c = out.data_ptr<float>();
  const int64_t w_stride = weight.stride(0), c_stride = out.stride(0);
  const Kernels& k = kernels();
  shares.over(columns, [&](int64_t v, int64_t count, float* wide) {
    for (int64_t i = 0; i < count; ++i) k.widen(w + (v + i) * w_stride, depth, wide + i * depth);
    multiply(view(c + v, rows, count, c_stride), hidden, view(wide, count, depth, depth).t(), false);
  });
}

// out [R, H] = gradient [R, V] weight [V, H]. Threads share H, so that each sums over the vocabulary in one order.
void gemm_widened_hidden_gradient_(const Tensor& gradient, const Tensor& weight, Tensor& out, Tensor& buffer) {
  const int64_t rows = gradient.size(0), depth = gradient.size(1), columns = weight.size(1);
  check_operand("gradient", gradient, at::kFloat, rows, depth);
  check_operand("weight", weight, at::kBFloat16, depth, columns);
  check_operand("out", out, at::kFloat, rows, columns);
  check_operand("buffer", buffer, at::kFloat, buffer.size(0), columns);
  TORCH_CHECK(buffer.size(0) >= 1, "buffer: expected a row, got ", buffer.sizes());
  if (rows == 0) return;
  const float* g = gradient.const_data_ptr<float>();
  const uint16_t* w = words(weight);
  float* c = out.data_ptr<float>();
  float* memory = buffer.data_ptr<float>();
  const int64_t g_stride = gradient.stride(0), w_stride = weight.stride(0), c_stride = out.stride(0);
  const int64_t part = buffer.size(0);
  const int64_t threads = std::clamp<int64_t>(columns / kStep, 1, at::get_num_threads());
  const Kernels& k = kernels();
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t left = t * columns / threads, width = (t + 1) * columns / threads - left;
      float* wide = memory + left * part;
      for (int64_t v = 0; v < depth; v += part) {
        const int64_t count = std::min(part, depth - v);
        for (int64_t i = 0; i < count; ++i) k.widen(w + (v + i) * w_stride + left, width, wide + i * width);
        multiply(view(c + left, rows, width, c_stride), view(g + v, rows, count, g_stride), view(wide, count, width, width),
                 v > 0);
      }
    }
  });
}

// out [V, H] bfloat16 = gradient [R, V]^T hidden [R, H] (+ add [V, H] float32). Threads share the vocabulary; each element is
// rounded once.
void gemm_widened_weight_gradient_(const Tensor& gradient, const Tensor& hidden, const std::optional<Tensor>& add, Tensor& out,
                                   Tensor& buffer) {
  const int64_t depth = gradient.size(0), rows = gradient.size(1), columns = hidden.size(1);
  check_operand("gradient", gradient, at::kFloat, depth, rows);
  check_operand("hidden", hidden, at::kFloat, depth, columns);
  check_operand("out", out, at::kBFloat16, rows, columns);
  if (add) check_operand("add", *add, at::kFloat, rows, columns);
  const Shares shares(buffer, columns);
  const float* g = gradient.const_data_ptr<float>();
  const float* before = add ? add->const_data_ptr<float>() : nullptr;
  uint16_t* to = reinterpret_cast<uint16_t*>(out.data_ptr<BFloat16>());
  const int64_t g_stride = gradient.stride(0), out_stride = out.stride(0);
  const int64_t add_stride = add ? add->stride(0) : 0;
  const Kernels& k = kernels();
  shares.over(rows, [&](int64_t v, int64_t count, float* made) {
    for (int64_t i = 0; i < count; ++i) {
      float* row = made + i * columns;
      if (before) {
        std::copy(before + (v + i) * add_stride, before + (v + i) * add_stride + columns, row);
      } else if (depth == 0) {
        std::fill(row, row + columns, 0.0f);
      }
    }
    if (depth > 0) {
      multiply(view(made, count, columns, columns), view(g + v, depth, count, g_stride).t(), hidden, before != nullptr);
    }
    for (int64_t i = 0; i < count; ++i) k.narrow(made + i * columns, columns, to + (v + i) * out_stride);
  });
}

}  // namespace
}  // namespace selfdistill

SELFDISTILL_LIBRARY_IMPL(CPU, m) {
  m.impl("gemm_widened_logits_", selfdistill::gemm_widened_logits_);
  m.impl("gemm_widened_hidden_gradient_", selfdistill::gemm_widened_hidden_gradient_);
  m.impl("gemm_widened_weight_gradient_", selfdistill::gemm_widened_weight_gradient_);
}
