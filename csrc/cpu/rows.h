// What the row kernels take and do, without torch: the boundary between csrc/cpu/ops.cpp and the code that is compiled
// once per instruction set. Every function handles the rows [begin, end).
#pragma once

#include "../divergence.h"

namespace selfdistill {

// Raw GEMM outputs, one row a token. Without data: the model is absent.
struct Tile {
  float* data = nullptr;
  int64_t stride = 0;
  const float* bias = nullptr;  // [columns] of this tile, or nullptr
};

struct Problem {
  Tile student, teacher;
  const int64_t* targets = nullptr;  // over the whole vocabulary, or nullptr
  int64_t columns = 0;
  int64_t column_offset = 0;  // the first column's place in the vocabulary
  double logit_scale = 1.0, softcap = 0.0, temperature = 1.0;
  Divergence divergence = Divergence::kNone;
  double alpha = 0.5;
  bool gradient_in_bfloat16 = false;
};

struct VisitTerms {
  const float* loss_weight = nullptr;  // [rows], or nullptr: statistics only
  double policy_gradient = 0.0, cross_entropy = 0.0, entropy = 0.0;
  int64_t gate_sign = -2;
  double gate_threshold = 0.0;
  float* statistics = nullptr;  // [rows, kStatistics]
  bool* active = nullptr;       // [rows]
};

struct Kernels {
  void (*visit)(const Problem&, const VisitTerms&, int64_t begin, int64_t end);
  void (*statistics)(const Problem&, bool first, double* state, int64_t begin, int64_t end);
  void (*mixture)(const Problem&, double* state, int64_t begin, int64_t end);
  void (*gradient)(const Problem&, const float* statistics, const float* term_weights, int64_t begin, int64_t end);
};

namespace isa_default {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace isa_avx2 {
extern const Kernels kernels;
}
namespace isa_avx512 {
extern const Kernels kernels;
}
#endif

}  // namespace selfdistill
