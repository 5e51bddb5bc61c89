// The CPU side of csrc/bindings.cpp: checks, threads over rows, choice of the instruction set.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#include "vector.h"
// (divergence.h is written in the functions of vector.h)
#include "../checks.h"
#include "../library.h"
#include "rows.h"

namespace selfdistill {
namespace {

using at::Tensor;

// ---- instruction sets -------------------------------------------------------------------------------------------------

struct Capability {
  const char* name;
  bool available;
  const Kernels* kernels;
};

const std::vector<Capability>& capabilities() {  // best first
  static const std::vector<Capability> all = {
#if defined(__x86_64__)
      {"avx512",
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"),
       &isa_avx512::kernels},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), &isa_avx2::kernels},
#endif
      {"default", true, &isa_default::kernels},
  };
  return all;
}

const Capability& find_capability(const std::string& name) {
  for (const Capability& c : capabilities()) {
    if (name == c.name) {
      TORCH_CHECK(c.available, "capability: this processor has no ", name);
      return c;
    }
  }
  TORCH_CHECK(false, "capability: got '", name, "', expected 'default', or on x86-64 'avx2' or 'avx512'");
}

const Capability& first_capability() {
  if (const char* name = std::getenv("SELFDISTILL_CPU_CAPABILITY")) return find_capability(name);
  for (const Capability& c : capabilities()) {
    if (c.available) return c;
  }
  return capabilities().back();
}

std::atomic<const Capability*>& capability() {
  static std::atomic<const Capability*> chosen = &first_capability();
  return chosen;
}


}  // namespace

const Kernels& kernels() { return *capability().load()->kernels; }

namespace {

std::string cpu_capability() { return capability().load()->name; }

void set_cpu_capability(std::string name) { capability() = &find_capability(name); }

template <class F>
void over_rows(int64_t rows, const F& f) {
  at::parallel_for(0, rows, 1, f);
}

// ---- operators --------------------------------------------------------------------------------------------------------

void row_visit_(Tensor& student, const OptionalTensor& teacher, const OptionalTensor& student_bias,
                const OptionalTensor& teacher_bias, const OptionalTensor& targets, const OptionalTensor& loss_weight,
                double logit_scale, double softcap, double temperature, int64_t divergence, double beta,
                double policy_gradient, double cross_entropy, double entropy, int64_t gate_sign, double gate_threshold,
                bool gradient_in_bfloat16, Tensor& statistics, Tensor& active, double entry_clip) {
  Problem p = make_problem(student, teacher, student_bias, teacher_bias, targets, logit_scale, softcap, temperature,
                           divergence, beta, 0);
  set_gradient_type(p, gradient_in_bfloat16);
  set_entry_clip(p, entry_clip);
  const VisitTerms v = make_visit(student, teacher.has_value(), targets.has_value(), loss_weight, policy_gradient,
                                  cross_entropy, entropy, gate_sign, gate_threshold, statistics, active);
  const int64_t rows = student.size(0);
  if (targets) {
    for (int64_t r = 0; r < rows; ++r) {
      TORCH_CHECK(p.targets[r] >= 0 && p.targets[r] < p.columns, "targets: got ", p.targets[r], " in row ", r,
                  ", expected 0 to ", p.columns - 1);
    }
  }
  const Kernels& k = kernels();
  over_rows(rows, [&](int64_t begin, int64_t end) { k.visit(p, v, begin, end); });
}

void row_statistics_(const Tensor& student, const OptionalTensor& teacher, const OptionalTensor& student_bias,
                     const OptionalTensor& teacher_bias, const OptionalTensor& targets, double logit_scale,
                     double softcap, double temperature, int64_t divergence, int64_t column_offset, bool first,
                     Tensor& state) {
  // The first sweep does not depend on beta; any valid one passes the check.
  const Problem p = make_problem(student, teacher, student_bias, teacher_bias, targets, logit_scale, softcap,
                                 temperature, divergence, 0.5, column_offset);
  const int64_t rows = student.size(0);
  check_state(state, student.device(), rows);
  double* to = state.data_ptr<double>();
  const Kernels& k = kernels();
  over_rows(rows, [&](int64_t begin, int64_t end) { k.statistics(p, first, to, begin, end); });
}

void row_mixture_(const Tensor& student, const Tensor& teacher, const OptionalTensor& student_bias,
                  const OptionalTensor& teacher_bias, double logit_scale, double softcap, double temperature,
                  int64_t divergence, double beta, Tensor& state) {
  const Problem p = make_problem(student, teacher, student_bias, teacher_bias, std::nullopt, logit_scale, softcap,
                                 temperature, divergence, beta, 0);
  check_mixture(p);
  const int64_t rows = student.size(0);
  check_state(state, student.device(), rows);
  double* to = state.data_ptr<double>();
  const Kernels& k = kernels();
  over_rows(rows, [&](int64_t begin, int64_t end) { k.mixture(p, to, begin, end); });
}

void row_clip_(const Tensor& student, const Tensor& teacher, const OptionalTensor& student_bias,
               const OptionalTensor& teacher_bias, double logit_scale, double softcap, double temperature,
               int64_t divergence, double beta, double entry_clip, Tensor& state) {
  Problem p = make_problem(student, teacher, student_bias, teacher_bias, std::nullopt, logit_scale, softcap, temperature,
                           divergence, beta, 0);
  set_entry_clip(p, entry_clip);
  check_clip(p, entry_clip);
  const int64_t rows = student.size(0);
  check_state(state, student.device(), rows);
  double* to = state.data_ptr<double>();
  const Kernels& k = kernels();
  over_rows(rows, [&](int64_t begin, int64_t end) { k.clip(p, to, begin, end); });
}

Tensor row_finish(const Tensor& state, bool has_teacher, bool has_targets, int64_t divergence, double beta) {
  check_finish(state, has_teacher, divergence);
  const int64_t rows = state.size(0);
  Tensor statistics = at::empty({rows, kStatistics}, state.options().dtype(at::kFloat));
  const double* from = state.const_data_ptr<double>();
  float* to = statistics.data_ptr<float>();
  over_rows(rows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      RowState row;
      memcpy(&row, from + r * kStateColumns, sizeof row);
      finish(row, has_teacher, has_targets, static_cast<Divergence>(divergence), beta, to + r * kStatistics);
      finish_clipped(row, static_cast<Divergence>(divergence), beta, to + r * kStatistics);
    }
  });
  return statistics;
}

void row_gradient_(Tensor& student, const OptionalTensor& teacher, const OptionalTensor& student_bias,
                   const OptionalTensor& teacher_bias, const OptionalTensor& targets, const Tensor& statistics,
                   const Tensor& term_weights, double logit_scale, double softcap, double temperature,
                   int64_t divergence, double beta, int64_t column_offset, bool gradient_in_bfloat16,
                   double entry_clip) {
  Problem p = make_problem(student, teacher, student_bias, teacher_bias, targets, logit_scale, softcap, temperature,
                           divergence, beta, column_offset);
  set_gradient_type(p, gradient_in_bfloat16);
  set_entry_clip(p, entry_clip);
  check_row_terms(student, statistics, term_weights);
  const int64_t rows = student.size(0);
  const float* from = statistics.const_data_ptr<float>();
  const float* weights = term_weights.const_data_ptr<float>();
  const Kernels& k = kernels();
  over_rows(rows, [&](int64_t begin, int64_t end) { k.gradient(p, from, weights, begin, end); });
}

Tensor gather_active_rows_(Tensor& tile, const Tensor& active) {
  check_gather(tile, active);
  const int64_t rows = tile.size(0);
  const bool* is_active = active.const_data_ptr<bool>();
  int64_t count = 0;
  for (int64_t r = 0; r < rows; ++r) count += is_active[r];
  Tensor order = at::empty({count}, active.options().dtype(at::kLong));
  int64_t* to = order.data_ptr<int64_t>();
  std::vector<int64_t> holes;  // places to fill; to[hole] says from where. No source is a hole: any order is right.
  int64_t source = count;
  for (int64_t r = 0; r < count; ++r) {
    to[r] = r;
    if (is_active[r]) continue;
    while (!is_active[source]) ++source;
    to[r] = source++;
    holes.push_back(r);
  }
  char* data = static_cast<char*>(tile.data_ptr());
  const int64_t bytes = tile.size(1) * tile.element_size(), stride = tile.stride(0) * tile.element_size();
  over_rows(static_cast<int64_t>(holes.size()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) memcpy(data + holes[i] * stride, data + to[holes[i]] * stride, bytes);
  });
  return order;
}

}  // namespace
}  // namespace selfdistill

SELFDISTILL_LIBRARY_IMPL(CPU, m) {
  m.impl("row_visit_", selfdistill::row_visit_);
  m.impl("row_statistics_", selfdistill::row_statistics_);
  m.impl("row_mixture_", selfdistill::row_mixture_);
  m.impl("row_clip_", selfdistill::row_clip_);
  m.impl("row_finish", selfdistill::row_finish);
  m.impl("row_gradient_", selfdistill::row_gradient_);
  m.impl("gather_active_rows_", selfdistill::gather_active_rows_);
}

SELFDISTILL_LIBRARY_IMPL(CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", selfdistill::cpu_capability);
  m.impl("set_cpu_capability", selfdistill::set_cpu_capability);
}
