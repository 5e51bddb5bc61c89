// bfloat16 x bfloat16 -> float32 products for the three GEMMs of the loss, around torch's brgemm (oneDNN; AMX tiles or
// AVX512-BF16).
//
// torch.mm rounds its result to bfloat16; a brgemm hands out its float32 accumulators. The large operand is packed a block
// at a time into a buffer of the L2 cache that belongs to the thread, and read from memory once. Every element is summed
// in an order that depends on the shapes only, so any number of threads gives the same bits.
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "../library.h"
#include "matrices.h"
#include "pack.h"

namespace selfdistill {
namespace {

using at::BFloat16;
using at::Tensor;

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

#if defined(__x86_64__)

// Whether oneDNN may use AVX512-BF16. Below that, its brgemm takes bfloat16 as well, and emulates it.
bool onednn_may_use_avx512_bf16() {
  const char* limit = std::getenv("ONEDNN_MAX_CPU_ISA");
  if (!limit) limit = std::getenv("DNNL_MAX_CPU_ISA");
  if (!limit || !*limit) return true;
  std::string name(limit);
  std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::toupper(c); });
  for (const char* enough : {"ALL", "DEFAULT", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10"}) {
    if (name.rfind(enough, 0) == 0) return true;
  }
  return false;
}

// A product of ones: whether this torch's brgemm takes bfloat16 here at all.
bool brgemm_multiplies() {
  constexpr int64_t kSize = 32;
  const std::vector<BFloat16> ones(kSize * kSize, BFloat16(1.0f));
  std::vector<float> product(kSize * kSize, 0.0f);
  try {
    at::native::cpublas::brgemm(kSize, kSize, kSize, kSize, kSize, kSize, false, ones.data(), ones.data(), product.data());
    at::native::cpublas::brgemm_release();
  } catch (const std::exception&) {  // c10's or oneDNN's
    return false;
  }
  return std::all_of(product.begin(), product.end(), [](float x) { return x == kSize; });
}

#endif

bool gemm_bf16_available() {
#if defined(__x86_64__)
  if (at::native::cpublas::could_pack(at::kBFloat16)) return true;  // AMX, and neither oneDNN nor its AMX is switched off
  if (!at::globalContext().userEnabledMkldnn()) return false;
  static const bool avx512 = __builtin_cpu_supports("avx512bf16") && onednn_may_use_avx512_bf16() && brgemm_multiplies();
  return avx512;
#else
  return false;
#endif
}

void check_available() {
  TORCH_CHECK(gemm_bf16_available(), "gemm_bf16: this processor (or torch's oneDNN settings) has no bfloat16 products");
}

#if defined(__x86_64__)

const uint16_t* words(const BFloat16* p) { return reinterpret_cast<const uint16_t*>(p); }
uint16_t* words(BFloat16* p) { return reinterpret_cast<uint16_t*>(p); }

// Uninitialised, aligned as the caches want it.
Tensor buffer(int64_t elements) { return at::empty({elements}, at::TensorOptions().dtype(at::kBFloat16)); }

// C [rows, columns] (+)= A [rows, depth] B, B as pairs [depth, width].
void multiply(int64_t rows, int64_t columns, int64_t depth, const BFloat16* a, int64_t a_stride, const BFloat16* pairs,
              int64_t width, float* c, int64_t c_stride, bool accumulate) {
  at::native::cpublas::brgemm(rows, columns, depth, a_stride, width, c_stride, accumulate, a, pairs, c);
}

// The operand A with its depth padded by zeros to whole steps: `from` itself where nothing is missing.
struct Padded {
  Tensor copy;
  const BFloat16* data;
  int64_t stride, depth;

  Padded(const BFloat16* from, int64_t from_stride, int64_t rows, int64_t columns)
      : data(from), stride(from_stride), depth(round_up(columns, kDepthStep)) {
    if (depth == columns) return;
    copy = buffer(rows * depth);
    BFloat16* to = copy.data_ptr<BFloat16>();
    for (int64_t r = 0; r < rows; ++r) {
      std::copy(from + r * from_stride, from + r * from_stride + columns, to + r * depth);
      std::fill(to + r * depth + columns, to + (r + 1) * depth, BFloat16(0.0f));
    }
    data = to;
    stride = depth;
  }
};

constexpr int64_t kPanel = 64;  // columns of B that are packed together

#endif

// out [R, V] = hidden [R, H] weight [V, H]^T. Threads share the vocabulary.
void gemm_bf16_logits_(const Tensor& hidden, const Tensor& weight, Tensor& out) {
  const int64_t rows = hidden.size(0), depth = hidden.size(1), columns = weight.size(0);
  check_operand("hidden", hidden, at::kBFloat16, rows, depth);
  check_operand("weight", weight, at::kBFloat16, columns, depth);
  check_operand("out", out, at::kFloat, rows, columns);
  check_available();
#if defined(__x86_64__)
  if (rows == 0) return;
  const Padded a(hidden.const_data_ptr<BFloat16>(), hidden.stride(0), rows, depth);
  const BFloat16* w = weight.const_data_ptr<BFloat16>();
  const int64_t w_stride = weight.stride(0), c_stride = out.stride(0);
  float* c = out.data_ptr<float>();
  at::parallel_for(0, (columns + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
    const Tensor memory = buffer(a.depth * kPanel);
    BFloat16* panel = memory.data_ptr<BFloat16>();
    for (int64_t n = begin * kPanel; n < std::min(end * kPanel, columns); n += kPanel) {
      const int64_t width = std::min(kPanel, columns - n);
      pack_pairs_transposed(words(w + n * w_stride), w_stride, width, depth, a.depth, kPanel, words(panel));
      multiply(rows, width, a.depth, a.data, a.stride, panel, kPanel, c + n, c_stride, false);
    }
    at::native::cpublas::brgemm_release();
  });
#endif
}

// out [R, H] (+)= gradient [R, V] weight [V, H]. Threads share H, and the rows where H is too narrow for all of them.
void gemm_bf16_hidden_gradient_(const Tensor& gradient, const Tensor& weight, bool accumulate, Tensor& out) {
  const int64_t rows = gradient.size(0), depth = gradient.size(1), columns = weight.size(1);
  check_operand("gradient", gradient, at::kBFloat16, rows, depth);
  check_operand("weight", weight, at::kBFloat16, depth, columns);
  check_operand("out", out, at::kFloat, rows, columns);
  check_available();
#if defined(__x86_64__)
  if (rows == 0) return;
  constexpr int64_t kSlab = 512;  // of the vocabulary: the accumulators visit memory once per slab
  const BFloat16* g = gradient.const_data_ptr<BFloat16>();
  const BFloat16* w = weight.const_data_ptr<BFloat16>();
  const int64_t g_stride = gradient.stride(0), w_stride = weight.stride(0), c_stride = out.stride(0);
  float* c = out.data_ptr<float>();
  const int64_t tail_begin = depth / kSlab * kSlab;
  const Padded tail(g + tail_begin, g_stride, rows, depth - tail_begin);

  const int64_t threads = at::get_num_threads();
  const int64_t steps = (columns + 31) / 32;  // a thread's share of H is whole steps of 32
  const int64_t across = std::min(threads, steps), down = std::min((threads + across - 1) / across, (rows + 31) / 32);
  at::parallel_for(0, across * down, 1, [&](int64_t begin, int64_t end) {
    Tensor memory;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t i = unit % across, j = unit / across;
      const int64_t left = i * steps / across * 32, right = std::min((i + 1) * steps / across * 32, columns);
      const int64_t top = j * rows / down, bottom = (j + 1) * rows / down;
      // Even panels of at most 256: each one reads the gradient again.
      const int64_t panels = (right - left + 255) / 256, width = round_up((right - left + panels - 1) / panels, 32);
      memory = buffer(kSlab * panels * width);
      BFloat16* packed = memory.data_ptr<BFloat16>();
      for (int64_t k = 0; k < depth; k += kSlab) {
        const bool whole = k < tail_begin;
        const BFloat16* a = whole ? g + k : tail.data;
        const int64_t a_stride = whole ? g_stride : tail.stride, a_depth = whole ? kSlab : tail.depth;
        pack_pairs(words(w + k * w_stride + left), w_stride, std::min(kSlab, depth - k), right - left, a_depth, width,
                   words(packed));
        for (int64_t n = 0; n < right - left; n += width) {
          multiply(bottom - top, std::min(width, right - left - n), a_depth, a + top * a_stride, a_stride,
                   packed + n * a_depth, width, c + top * c_stride + left + n, c_stride, accumulate || k > 0);
        }
      }
    }
    at::native::cpublas::brgemm_release();
  });
#endif
}

// out [V, H] float32 or bfloat16 = gradient [R, V]^T hidden [R, H] (+ add [V, H] float32, which may be out itself). Threads
// share the vocabulary. A bfloat16 result is rounded once, from sums that never leave the cache.
void gemm_bf16_weight_gradient_(const Tensor& gradient, const Tensor& hidden, const std::optional<Tensor>& add, Tensor& out) {
  const int64_t depth = gradient.size(0), rows = gradient.size(1), columns = hidden.size(1);
  check_operand("gradient", gradient, at::kBFloat16, depth, rows);
  check_operand("hidden", hidden, at::kBFloat16, depth, columns);
  const bool narrow = out.scalar_type() == at::kBFloat16;
  check_operand("out", out, narrow ? at::kBFloat16 : at::kFloat, rows, columns);
  if (add) check_operand("add", *add, at::kFloat, rows, columns);
  check_available();
#if defined(__x86_64__)
  if (depth == 0) {
    if (add) {
      out.copy_(*add);
    } else {
      out.zero_();
    }
    return;
  }
  constexpr int64_t kRows = 64;  // of the vocabulary, transposed together
  const BFloat16* g = gradient.const_data_ptr<BFloat16>();
  const BFloat16* h = hidden.const_data_ptr<BFloat16>();
  const float* before = add ? add->const_data_ptr<float>() : nullptr;
  const int64_t g_stride = gradient.stride(0), h_stride = hidden.stride(0), add_stride = add ? add->stride(0) : 0;
  const int64_t out_stride = out.stride(0);
  const int64_t padded = round_up(depth, kDepthStep), panels = (columns + kPanel - 1) / kPanel;
  const Tensor packed = buffer(panels * kPanel * padded);
  BFloat16* b = packed.data_ptr<BFloat16>();
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      pack_pairs(words(h + p * kPanel), h_stride, depth, std::min(kPanel, columns - p * kPanel), padded, kPanel,
                 words(b + p * kPanel * padded));
    }
  });
  at::parallel_for(0, (rows + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
    const Tensor memory = buffer(kRows * padded);
    BFloat16* a = memory.data_ptr<BFloat16>();
    const Tensor sums = narrow ? at::empty({kRows, columns}, at::TensorOptions().dtype(at::kFloat)) : out;
    for (int64_t v = begin * kRows; v < std::min(end * kRows, rows); v += kRows) {
      const int64_t height = std::min(kRows, rows - v);
      transpose(words(g + v), g_stride, depth, height, padded, words(a));
      float* c = sums.data_ptr<float>() + (narrow ? 0 : v * out_stride);
      const int64_t c_stride = narrow ? columns : out_stride;
      for (int64_t r = 0; before && r < height; ++r) {
        const float* from = before + (v + r) * add_stride;
        if (from != c + r * c_stride) std::copy(from, from + columns, c + r * c_stride);
      }
      for (int64_t p = 0; p < panels; ++p) {
        multiply(height, std::min(kPanel, columns - p * kPanel), padded, a, padded, b + p * kPanel * padded, kPanel,
                 c + p * kPanel, c_stride, before != nullptr);
      }
      for (int64_t r = 0; narrow && r < height; ++r) {
        round_to_bfloat16(c + r * columns, columns, words(out.data_ptr<BFloat16>() + (v + r) * out_stride));
      }
    }
    at::native::cpublas::brgemm_release();
  });
#endif
}

}  // namespace
}  // namespace selfdistill

SELFDISTILL_LIBRARY_IMPL(CPU, m) {
  m.impl("gemm_bf16_logits_", selfdistill::gemm_bf16_logits_);
  m.impl("gemm_bf16_hidden_gradient_", selfdistill::gemm_bf16_hidden_gradient_);
  m.impl("gemm_bf16_weight_gradient_", selfdistill::gemm_bf16_weight_gradient_);
}

SELFDISTILL_LIBRARY_IMPL(CompositeExplicitAutograd, m) {
  m.impl("gemm_bf16_available", selfdistill::gemm_bf16_available);
}
