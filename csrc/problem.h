// A tile of logits and the loss upon it, without torch: what the CPU and the CUDA driver take.
#pragma once

#include "divergence.h"

namespace selfdistill {

// Raw GEMM outputs or a caller's own logits, one row a token. Without data: the model is absent.
struct Tile {
  void* data = nullptr;  // Problem::element
  int64_t stride = 0;
  const float* bias = nullptr;  // [columns] of this tile, or nullptr
};

// Of both tiles. A gradient takes the place of its row: in bfloat16 if asked for, else in the tile's own type.
enum class Element : int { kFloat32, kBFloat16, kFloat16 };  // the CPU takes the first only

struct Problem {
  Tile student, teacher;
  Element element = Element::kFloat32;
  const int64_t* targets = nullptr;  // over the whole vocabulary, or nullptr
  int64_t columns = 0;
  int64_t column_offset = 0;  // the first column's place in the vocabulary
  double logit_scale = 1.0, softcap = 0.0, temperature = 1.0;
  Divergence divergence = Divergence::kNone;
  double beta = 0.5;
  double entry_clip = 0.0;  // 0: none
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

// The target's column within this tile, or -1.
SELFDISTILL_FN int64_t target_column(const Problem& p, int64_t row) {
  if (!p.targets) return -1;
  const int64_t column = p.targets[row] - p.column_offset;
  return column >= 0 && column < p.columns ? column : -1;
}

// A NaN advantage passes: an error must be seen.
SELFDISTILL_FN bool passes_gate(const VisitTerms& v, float advantage) {
  const float threshold = (float)v.gate_threshold;
  switch (v.gate_sign) {
    case 0:
      return !(fabsf(advantage) <= threshold);
    case 1:
      return !(advantage <= threshold);
    case -1:
      return !(advantage >= -threshold);
    default:
      return true;
  }
}

}  // namespace selfdistill
