// Whole rows: statistics, gate and, in place, the gradient. One block a row of [rows, columns].
//
// Bytes an element (float32, with a teacher; csrc/cuda/row.cuh and gradient.cuh have the parts):
//   statistics alone                     8
//   forward and reverse KL with gradient 20   8 + 8 read, 4 written; bfloat16 gradient 18
//   mixture divergences with gradient    28   8 + 8 + 8 read, 4 written; 26
//   no divergence, no teacher            12   4 + 4 read, 4 written; 10
// of which the later sweeps find in the L2 cache what fits of the rows that are under way.
// Kept between sweeps: one row's state in shared memory. A row that the gate drops is only read.
#include "gradient.cuh"

namespace selfdistill {
namespace cuda {
namespace {

// Thread 0 of a row whose sums are complete: statistics, gate, and what the gradient sweep needs.
template <Divergence kDivergence, class T>
__device__ __forceinline__ void finish_row(const Call& call, const VisitTerms& v, const Row<T>& student,
                                           const Row<T>& teacher, int64_t row, Shared& shared) {
  const Problem& p = call.p;
  const bool has_teacher = teacher.raw != nullptr;
  finish(shared.row, has_teacher, p.targets != nullptr, kDivergence, p.beta, shared.statistics);
  float* const to = v.statistics + row * kStatistics;
  for (int i = 0; i < kStatistics; ++i) to[i] = shared.statistics[i];
  const float advantage = shared.statistics[kTeacherLogprob] - shared.statistics[kStudentLogprob];
  const float weight = v.loss_weight ? v.loss_weight[row] : 1.0f;
  const bool active = v.active[row] && weight != 0.0f && passes_gate(v, advantage);
  v.active[row] = active;
  shared.has_gradient = active && v.loss_weight;
  if (!shared.has_gradient) return;
  const double token = v.cross_entropy + (v.policy_gradient != 0.0 ? v.policy_gradient * advantage : 0.0);
  shared.terms = make_terms(shared.statistics, p.beta, student.transform, weight, weight * token, weight * v.entropy);
  if (shared.target < 0) return;
  shared.at_target = gradient_at_target<kDivergence>(student, teacher, shared.target, shared.terms);
}

template <class T, bool kTeacher, Divergence kDivergence>
__global__ void __launch_bounds__(kThreads, kBlocks) visit_kernel(const Call call, const VisitTerms v) {
  __shared__ Shared shared;
  const Problem& p = call.p;
  const int64_t row = blockIdx.x;
  const Row<T> student(p.student, call.student, row), teacher(p.teacher, call.teacher, row);
  constexpr Divergence kFirst = needs_mixture(kDivergence) ? Divergence::kJSD : kDivergence;
  first_sweep<kTeacher, kFirst>(student, teacher, call.columns, shared.row, shared);
  if (threadIdx.x == 0) {
    const int target = (int)target_column(p, row);
    shared.target = target;
    if (p.targets) {  // the host has checked them; a NaN shows if it has not
      shared.row.student_target = target >= 0 ? student.logit(target) : nanf("");
      if (kTeacher) shared.row.teacher_target = target >= 0 ? teacher.logit(target) : nanf("");
    }
  }
  if constexpr (needs_mixture(kDivergence)) {
    if (threadIdx.x == 0) {
      finish(shared.row, true, false, kDivergence, p.beta, shared.statistics);
      shared.terms.n = normalised(shared.statistics);
    }
    __syncthreads();
    const Normalised normal = shared.terms.n;
    second_sweep<kDivergence>(student, teacher, call.columns, normal, (float)p.beta, shared.row, shared);
  }
  if (threadIdx.x == 0) finish_row<kDivergence>(call, v, student, teacher, row, shared);
  __syncthreads();
  if (shared.has_gradient) {
    write_gradient<kDivergence>(student, teacher, call.columns, p.gradient_in_bfloat16, shared);
  } else if (v.loss_weight && v.gate_sign == -2) {
    clear_row(student, call.columns, p.gradient_in_bfloat16);
  }
}

using Kernel = void (*)(Call, VisitTerms);

template <class T>
Kernel kernel_of(bool has_teacher, Divergence divergence) {
  if (!has_teacher) return visit_kernel<T, false, Divergence::kNone>;
  switch (divergence) {
    case Divergence::kForwardKL:
      return visit_kernel<T, true, Divergence::kForwardKL>;
    case Divergence::kReverseKL:
      return visit_kernel<T, true, Divergence::kReverseKL>;
    case Divergence::kJSD:
      return visit_kernel<T, true, Divergence::kJSD>;
    case Divergence::kSkewKL:
      return visit_kernel<T, true, Divergence::kSkewKL>;
    case Divergence::kSkewReverseKL:
      return visit_kernel<T, true, Divergence::kSkewReverseKL>;
    default:
      return visit_kernel<T, true, Divergence::kNone>;
  }
}

}  // namespace

const char* visit(const Problem& p, const VisitTerms& v, int64_t rows, Stream stream) {
  const Kernel kernel = for_element(
      p.element, [&](auto element) { return kernel_of<decltype(element)>(p.teacher.data != nullptr, p.divergence); });
  return launch(kernel, rows, kThreads, stream, Call(p), v);
}

}  // namespace cuda
}  // namespace selfdistill
