// From the operators' tensors to csrc/problem.h, with every check; the same for the CPU and for CUDA.
// (A driver includes divergence.h in its own functions first.)
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "problem.h"

namespace selfdistill {

using OptionalTensor = std::optional<at::Tensor>;

inline void check_vector(const char* name, const at::Tensor& t, at::Device device, at::ScalarType dtype, int64_t size) {
  TORCH_CHECK(t.device() == device && t.scalar_type() == dtype && t.dim() == 1 && t.size(0) == size && t.is_contiguous(),
              name, ": expected a contiguous ", dtype, " tensor [", size, "] on ", device, ", got ", t.scalar_type(), " ",
              t.sizes(), " on ", t.device());
}

inline void check_matrix(const char* name, const at::Tensor& t, at::Device device, at::ScalarType dtype, int64_t rows,
                         int64_t columns) {
  TORCH_CHECK(t.device() == device && t.scalar_type() == dtype && t.dim() == 2 && t.size(0) == rows &&
                  t.size(1) == columns && t.is_contiguous(),
              name, ": expected a contiguous ", dtype, " tensor [", rows, ", ", columns, "] on ", device, ", got ",
              t.scalar_type(), " ", t.sizes(), " on ", t.device());
}

inline bool has_plain_rows(const at::Tensor& t) {
  return t.dim() == 2 && (t.size(1) <= 1 || t.stride(1) == 1) && (t.size(0) <= 1 || t.stride(0) >= t.size(1));
}

inline Tile make_tile(const char* name, const at::Tensor& t, at::Device device, at::ScalarType dtype,
                      const char* bias_name, const OptionalTensor& bias) {
  TORCH_CHECK(t.device() == device && t.scalar_type() == dtype && has_plain_rows(t) && t.size(1) >= 1, name,
              ": expected a ", dtype == at::kFloat ? "float32" : c10::toString(dtype), " tensor [rows, columns] on ",
              device, " with contiguous, non-overlapping rows, got ", t.scalar_type(), " ", t.sizes(), " with strides ",
              t.strides(), " on ", t.device());
  Tile tile;
  tile.data = t.data_ptr();
  tile.stride = t.stride(0);
  if (bias) {
    check_vector(bias_name, *bias, device, at::kFloat, t.size(1));
    tile.bias = bias->const_data_ptr<float>();
  }
  return tile;
}

// `any_element`: the driver takes 16-bit tiles too.
inline Problem make_problem(const at::Tensor& student, const OptionalTensor& teacher, const OptionalTensor& student_bias,
                            const OptionalTensor& teacher_bias, const OptionalTensor& targets, double logit_scale,
                            double softcap, double temperature, int64_t divergence, double beta, int64_t column_offset,
                            bool any_element = false) {
  TORCH_CHECK(temperature > 0, "temperature: got ", temperature, ", expected more than 0");
  TORCH_CHECK(softcap >= 0, "softcap: got ", softcap, ", expected 0 (none) or more");
  TORCH_CHECK(divergence >= 0 && divergence <= 5, "divergence: got ", divergence, ", expected 0 to 5");
  Problem p;
  const at::Device device = student.device();
  at::ScalarType dtype = at::kFloat;
  if (any_element && student.scalar_type() == at::kBFloat16) {
    dtype = at::kBFloat16;
    p.element = Element::kBFloat16;
  } else if (any_element && student.scalar_type() == at::kHalf) {
    dtype = at::kHalf;
    p.element = Element::kFloat16;
  }
  p.student = make_tile("student", student, device, dtype, "student_bias", student_bias);
  p.columns = student.size(1);
  if (teacher) {
    p.teacher = make_tile("teacher", *teacher, device, dtype, "teacher_bias", teacher_bias);
    TORCH_CHECK(teacher->sizes() == student.sizes(), "teacher: got ", teacher->sizes(), ", expected the student's ",
                student.sizes());
  } else {
    TORCH_CHECK(divergence == 0, "teacher: None, but divergence ", divergence, " needs one");
  }
  if (targets) {
    check_vector("targets", *targets, device, at::kLong, student.size(0));
    p.targets = targets->const_data_ptr<int64_t>();
  }
  p.column_offset = column_offset;
  p.logit_scale = logit_scale;
  p.softcap = softcap;
  p.temperature = temperature;
  p.divergence = static_cast<Divergence>(divergence);
  TORCH_CHECK(!needs_mixture(p.divergence) || (beta > 0 && beta < 1), "beta: got ", beta,
              ", expected a value between 0 and 1, both excluded, for divergence ", divergence);
  p.beta = beta;
  return p;
}

inline void set_gradient_type(Problem& p, bool gradient_in_bfloat16) {
  TORCH_CHECK(!gradient_in_bfloat16 || p.element == Element::kFloat32,
              "gradient_in_bfloat16: True, but the gradient of a 16-bit tile takes the tile's own type; pass False");
  p.gradient_in_bfloat16 = gradient_in_bfloat16;
}

inline void set_entry_clip(Problem& p, double entry_clip) {
  TORCH_CHECK(entry_clip >= 0, "entry_clip: got ", entry_clip, ", expected 0 (none) or more");
  p.entry_clip = p.divergence == Divergence::kNone ? 0.0 : entry_clip;
}

inline void check_clip(const Problem& p, double entry_clip) {
  TORCH_CHECK(p.entry_clip > 0, "entry_clip: got ", entry_clip, " with divergence ", static_cast<int>(p.divergence),
              ", expected more than 0 and a divergence");
}

inline VisitTerms make_visit(const at::Tensor& student, bool has_teacher, bool has_targets,
                             const OptionalTensor& loss_weight, double policy_gradient, double cross_entropy,
                             double entropy, int64_t gate_sign, double gate_threshold, at::Tensor& statistics,
                             at::Tensor& active) {
  const at::Device device = student.device();
  const int64_t rows = student.size(0);
  check_matrix("statistics", statistics, device, at::kFloat, rows, kStatistics);
  check_vector("active", active, device, at::kBool, rows);
  TORCH_CHECK(gate_sign >= -2 && gate_sign <= 1, "gate_sign: got ", gate_sign, ", expected -2, -1, 0 or 1");
  const bool needs_advantage = gate_sign != -2 || policy_gradient != 0;
  TORCH_CHECK(has_targets || !(needs_advantage || cross_entropy != 0),
              "targets: None, but a gate, policy_gradient or cross_entropy needs them");
  TORCH_CHECK(has_teacher || !needs_advantage, "teacher: None, but a gate or policy_gradient needs one");
  VisitTerms v;
  if (loss_weight) {
    check_vector("loss_weight", *loss_weight, device, at::kFloat, rows);
    v.loss_weight = loss_weight->const_data_ptr<float>();
  }
  v.policy_gradient = policy_gradient;
  v.cross_entropy = cross_entropy;
  v.entropy = entropy;
  v.gate_sign = gate_sign;
  v.gate_threshold = gate_threshold;
  v.statistics = statistics.data_ptr<float>();
  v.active = active.data_ptr<bool>();
  return v;
}

inline void check_state(const at::Tensor& state, at::Device device, int64_t rows) {
  check_matrix("state", state, device, at::kDouble, rows, kStateColumns);
}

inline void check_mixture(const Problem& p) {
  TORCH_CHECK(needs_mixture(p.divergence), "divergence: got ", static_cast<int>(p.divergence),
              ", expected 3, 4 or 5 (one sweep is enough)");
}

inline void check_finish(const at::Tensor& state, bool has_teacher, int64_t divergence) {
  TORCH_CHECK(divergence >= 0 && divergence <= 5, "divergence: got ", divergence, ", expected 0 to 5");
  TORCH_CHECK(has_teacher || divergence == 0, "has_teacher: False, but divergence ", divergence, " needs one");
  TORCH_CHECK(state.dim() == 2, "state: expected [rows, ", kStateColumns, "], got ", state.sizes());
  check_state(state, state.device(), state.size(0));
}

inline void check_row_terms(const at::Tensor& student, const at::Tensor& statistics, const at::Tensor& term_weights) {
  check_matrix("statistics", statistics, student.device(), at::kFloat, student.size(0), kStatistics);
  check_matrix("term_weights", term_weights, student.device(), at::kFloat, student.size(0), 3);
}

inline void check_gather(const at::Tensor& tile, const at::Tensor& active) {
  TORCH_CHECK(has_plain_rows(tile), "tile: expected [rows, columns] with contiguous, non-overlapping rows, got ",
              tile.sizes(), " with strides ", tile.strides());
  check_vector("active", active, tile.device(), at::kBool, tile.size(0));
}

}  // namespace selfdistill
