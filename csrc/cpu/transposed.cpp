// Float32 logits by the other form of their product: weight hidden^T, block by block, each turned round into its place.
//
// A library packs its second operand for every product. In hidden weight^T that is the head, read across its rows; here it
// is a few hidden states, which stay in the cache. Which form is faster depends on processor and library, so
// selfdistill_kernels/backends/native/product_form.py asks the machine.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>

#include "../library.h"
#include "matrices.h"

namespace selfdistill {
namespace {

using at::Tensor;

// A block of logits [kColumns, kTokens] takes 256 KiB of a thread's own cache; smaller ones made the products slower.
constexpr int64_t kColumns = 256;
constexpr int64_t kTokens = 256;
constexpr int64_t kStep = 16;  // columns that a thread takes at the least: a cache line of the result
// The library sums a few rows or columns in other orders, so that a block takes what would be left behind it.
constexpr int64_t kFew = 16;
constexpr int64_t kTile = 16;  // of a block, turned round together: whole cache lines on both sides

// to [columns, rows] = from [rows, columns]^T
void turn_round(const float* from, int64_t rows, int64_t columns, float* to, int64_t to_stride) {
  for (int64_t c = 0; c < columns; c += kTile) {
    for (int64_t r = 0; r < rows; r += kTile) {
      for (int64_t j = c; j < std::min(c + kTile, columns); ++j) {
        for (int64_t i = r; i < std::min(r + kTile, rows); ++i) to[j * to_stride + i] = from[i * columns + j];
      }
    }
  }
}

// How many blocks `size` is cut into: of `width`, the last one with fewer or up to kFew more.
int64_t blocks(int64_t size, int64_t width) {
  return std::max<int64_t>(size / width + (size % width >= kFew ? 1 : 0), 1);
}

// out [R, V] = hidden [R, H] weight [V, H]^T. Threads share the vocabulary.
void gemm_transposed_logits_(const Tensor& hidden, const Tensor& weight, Tensor& out) {
  const int64_t tokens = hidden.size(0), depth = hidden.size(1), vocabulary = weight.size(0);
  check_operand("hidden", hidden, at::kFloat, tokens, depth);
  check_operand("weight", weight, at::kFloat, vocabulary, depth);
  check_operand("out", out, at::kFloat, tokens, vocabulary);
  const float* h = hidden.const_data_ptr<float>();
  const float* w = weight.const_data_ptr<float>();
  float* logits = out.data_ptr<float>();
  const int64_t h_stride = hidden.stride(0), w_stride = weight.stride(0), out_stride = out.stride(0);
  // Narrower panels where there are few columns for many threads.
  const int64_t fair = (vocabulary + at::get_num_threads() - 1) / at::get_num_threads();
  const int64_t width = std::min((fair + kStep - 1) / kStep * kStep, kColumns);
  if (tokens == 0 || vocabulary == 0) return;
  const int64_t panels = blocks(vocabulary, width), parts = blocks(tokens, kTokens);
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView guard;  // a thread's own: nothing here is recorded
    const Tensor memory = at::empty({(width + kFew) * std::min(tokens, kTokens + kFew)}, at::TensorOptions().dtype(at::kFloat));
    float* block = memory.data_ptr<float>();
    for (int64_t p = begin; p < end; ++p) {
      const int64_t v = p * width, columns = p + 1 < panels ? width : vocabulary - v;
      const Tensor panel = view(w + v * w_stride, columns, depth, w_stride);
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = part * kTokens, rows = part + 1 < parts ? kTokens : tokens - first;
        Tensor product = view(block, columns, rows, rows);
        at::mm_out(product, panel, view(h + first * h_stride, rows, depth, h_stride).t());
        turn_round(block, columns, rows, logits + first * out_stride + v, out_stride);
      }
    }
  });
}

}  // namespace
}  // namespace selfdistill

SELFDISTILL_LIBRARY_IMPL(CPU, m) { m.impl("gemm_transposed_logits_", selfdistill::gemm_transposed_logits_); }
