// The CUDA side of csrc/bindings.cpp: checks, the current stream, and the kernels of csrc/cuda/*.cu.
//
// Nothing here waits for the device but gather_active_rows_, which returns a tensor as long as there are active rows.
// Targets are not checked (that would wait); a target outside of the vocabulary gives a NaN.
#include <Python.h>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "device.h"
// (divergence.h is written in the functions of device.h)
#include "../checks.h"
#include "../library.h"
#include "rows.h"

namespace selfdistill {
namespace {

using at::Tensor;

#ifndef SELFDISTILL_DEVICE_TYPE  // tests/cuda runs the same code on the host
#define SELFDISTILL_DEVICE_TYPE at::kCUDA
#endif

void check_device(const char* name, const Tensor& t) {
  TORCH_CHECK(t.device().type() == SELFDISTILL_DEVICE_TYPE, name, ": expected a CUDA tensor like the others, got one on ",
              t.device());
}

void check_student(const Tensor& t) {
  check_device("student", t);
  TORCH_CHECK(t.dim() != 2 || t.size(1) <= cuda::kMostColumns, "student: got ", t.sizes(), ", expected at most ",
              cuda::kMostColumns, " columns; cut the vocabulary into slabs");
}

void check_launch(const char* error) { TORCH_CHECK(!error, "selfdistill: a CUDA kernel could not start: ", error); }

cuda::Stream stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

void row_visit_(Tensor& student, const OptionalTensor& teacher, const OptionalTensor& student_bias,
                const OptionalTensor& teacher_bias, const OptionalTensor& targets, const OptionalTensor& loss_weight,
                double logit_scale, double softcap, double temperature, int64_t divergence, double beta,
                double policy_gradient, double cross_entropy, double entropy, int64_t gate_sign, double gate_threshold,
                bool gradient_in_bfloat16, Tensor& statistics, Tensor& active, double entry_clip) {
  check_student(student);
  Problem p = make_problem(student, teacher, student_bias, teacher_bias, targets, logit_scale, softcap, temperature,
                           divergence, beta, 0, true);
  set_gradient_type(p, gradient_in_bfloat16);
  TORCH_CHECK(entry_clip == 0, "entry_clip: got ", entry_clip, ", but a visit on CUDA clips no entries; pass 0, and call ",
              "row_statistics_, row_clip_, row_finish and row_gradient_");
  const VisitTerms v = make_visit(student, teacher.has_value(), targets.has_value(), loss_weight, policy_gradient,
                                  cross_entropy, entropy, gate_sign, gate_threshold, statistics, active);
  const c10::DeviceGuard guard(student.device());
  check_launch(cuda::visit(p, v, student.size(0), stream()));
}

void row_statistics_(const Tensor& student, const OptionalTensor& teacher, const OptionalTensor& student_bias,
                     const OptionalTensor& teacher_bias, const OptionalTensor& targets, double logit_scale,
                     double softcap, double temperature, int64_t divergence, int64_t column_offset, bool first,
                     Tensor& state) {
  check_student(student);
  // The first sweep does not depend on beta; any valid one passes the check.
  const Problem p = make_problem(student, teacher, student_bias, teacher_bias, targets, logit_scale, softcap,
                                 temperature, divergence, 0.5, column_offset, true);
  check_state(state, student.device(), student.size(0));
  const c10::DeviceGuard guard(student.device());
  check_launch(cuda::statistics(p, first, state.data_ptr<double>(), student.size(0), stream()));
}

void row_mixture_(const Tensor& student, const Tensor& teacher, const OptionalTensor& student_bias,
                  const OptionalTensor& teacher_bias, double logit_scale, double softcap, double temperature,
                  int64_t divergence, double beta, Tensor& state) {
  check_student(student);
  const Problem p = make_problem(student, teacher, student_bias, teacher_bias, std::nullopt, logit_scale, softcap,
                                 temperature, divergence, beta, 0, true);
  check_mixture(p);
  check_state(state, student.device(), student.size(0));
  const c10::DeviceGuard guard(student.device());
  check_launch(cuda::mixture(p, state.data_ptr<double>(), student.size(0), stream()));
}

void row_clip_(const Tensor& student, const Tensor& teacher, const OptionalTensor& student_bias,
               const OptionalTensor& teacher_bias, double logit_scale, double softcap, double temperature,
               int64_t divergence, double beta, double entry_clip, Tensor& state) {
  check_student(student);
  Problem p = make_problem(student, teacher, student_bias, teacher_bias, std::nullopt, logit_scale, softcap, temperature,
                           divergence, beta, 0, true);
  set_entry_clip(p, entry_clip);
  check_clip(p, entry_clip);
  check_state(state, student.device(), student.size(0));
  const c10::DeviceGuard guard(student.device());
  check_launch(cuda::clip(p, state.data_ptr<double>(), student.size(0), stream()));
}

Tensor row_finish(const Tensor& state, bool has_teacher, bool has_targets, int64_t divergence, double beta) {
  check_device("state", state);
  check_finish(state, has_teacher, divergence);
  const c10::DeviceGuard guard(state.device());
  Tensor statistics = at::empty({state.size(0), kStatistics}, state.options().dtype(at::kFloat));
  check_launch(cuda::finish(state.const_data_ptr<double>(), has_teacher, has_targets,
                            static_cast<Divergence>(divergence), beta, statistics.data_ptr<float>(), state.size(0),
                            stream()));
  return statistics;
}

void row_gradient_(Tensor& student, const OptionalTensor& teacher, const OptionalTensor& student_bias,
                   const OptionalTensor& teacher_bias, const OptionalTensor& targets, const Tensor& statistics,
                   const Tensor& term_weights, double logit_scale, double softcap, double temperature,
                   int64_t divergence, double beta, int64_t column_offset, bool gradient_in_bfloat16,
                   double entry_clip) {
  check_student(student);
  Problem p = make_problem(student, teacher, student_bias, teacher_bias, targets, logit_scale, softcap, temperature,
                           divergence, beta, column_offset, true);
  set_gradient_type(p, gradient_in_bfloat16);
  set_entry_clip(p, entry_clip);
  check_row_terms(student, statistics, term_weights);
  const c10::DeviceGuard guard(student.device());
  check_launch(cuda::gradient(p, statistics.const_data_ptr<float>(), term_weights.const_data_ptr<float>(),
                              student.size(0), stream()));
}

Tensor gather_active_rows_(Tensor& tile, const Tensor& active) {
  check_device("tile", tile);
  check_gather(tile, active);
  const c10::DeviceGuard guard(tile.device());
  const int64_t rows = tile.size(0);
  const auto options = active.options().dtype(at::kLong);
  const Tensor order = at::empty({rows}, options), holes = at::empty({rows}, options), count = at::empty({1}, options);
  const auto size = static_cast<int64_t>(tile.element_size());
  check_launch(cuda::plan_gather(active.const_data_ptr<bool>(), rows, order.data_ptr<int64_t>(),
                                 holes.data_ptr<int64_t>(), count.data_ptr<int64_t>(), stream()));
  check_launch(cuda::gather(tile.data_ptr(), tile.size(1) * size, tile.stride(0) * size, order.data_ptr<int64_t>(),
                            count.data_ptr<int64_t>(), rows, stream()));
  return order.narrow(0, 0, count.item<int64_t>());  // waits for the count; the move goes on
}

}  // namespace
}  // namespace selfdistill

SELFDISTILL_LIBRARY_IMPL(CUDA, m) {
  m.impl("row_visit_", selfdistill::row_visit_);
  m.impl("row_statistics_", selfdistill::row_statistics_);
  m.impl("row_mixture_", selfdistill::row_mixture_);
  m.impl("row_clip_", selfdistill::row_clip_);
  m.impl("row_finish", selfdistill::row_finish);
  m.impl("row_gradient_", selfdistill::row_gradient_);
  m.impl("gather_active_rows_", selfdistill::gather_active_rows_);
}

SELFDISTILL_MODULE(_cuda)
