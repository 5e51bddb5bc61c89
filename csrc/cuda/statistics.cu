// Streaming over slabs of the vocabulary: the two sweeps and their end. One block a row of [rows, columns], one thread a
// row of the state [rows, 19].
//
// Bytes an element (float32): either sweep 8 read, 4 without a teacher. A state is 152 bytes a row, twice a slab.
#include "row.cuh"
// (clip.h is written in the functions of device.h)
#include "../clip.h"

namespace selfdistill {
namespace cuda {
namespace {

template <class T, bool kTeacher, Divergence kDivergence>
__global__ void __launch_bounds__(kThreads, kBlocks) statistics_kernel(const Call call, bool first, double* state) {
  __shared__ Shared shared;
  const Problem& p = call.p;
  const int64_t row = blockIdx.x;
  const Row<T> student(p.student, call.student, row), teacher(p.teacher, call.teacher, row);
  RowState& slab = shared.row;
  first_sweep<kTeacher, kDivergence>(student, teacher, call.columns, slab, shared);
  if (threadIdx.x != 0) return;
  if (!first) {
    const RowState before = load_state(state, row);
    slab.student_target = before.student_target;
    slab.teacher_target = before.teacher_target;
    merge(slab, before, kDivergence);
  }
  const int target = (int)target_column(p, row);
  if (target >= 0) {
    slab.student_target = student.logit(target);
    if (kTeacher) slab.teacher_target = teacher.logit(target);
  }
  store_state(state, row, slab);
}

template <class T, Divergence kDivergence>
__global__ void __launch_bounds__(kThreads, kBlocks) mixture_kernel(const Call call, double* state) {
  __shared__ Shared shared;
  const Problem& p = call.p;
  const int64_t row = blockIdx.x;
  const Row<T> student(p.student, call.student, row), teacher(p.teacher, call.teacher, row);
  if (threadIdx.x == 0) {
    shared.row = load_state(state, row);
    finish(shared.row, true, false, kDivergence, p.beta, shared.statistics);
    shared.terms.n = normalised(shared.statistics);
  }
  __syncthreads();
  const Normalised normal = shared.terms.n;
  second_sweep<kDivergence>(student, teacher, call.columns, normal, (float)p.beta, shared.row, shared);
  if (threadIdx.x == 0) store_state(state, row, shared.row);
}

__global__ void finish_kernel(const double* state, bool has_teacher, bool has_targets, Divergence divergence,
                              double beta, float* statistics, int64_t rows) {
  const int64_t row = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const RowState s = load_state(state, row);
  finish(s, has_teacher, has_targets, divergence, beta, statistics + row * kStatistics);
  finish_clipped(s, divergence, beta, statistics + row * kStatistics);
}

using StatisticsKernel = void (*)(Call, bool, double*);
using MixtureKernel = void (*)(Call, double*);

template <class T>
StatisticsKernel statistics_kernel_of(bool has_teacher, Divergence divergence) {
  if (!has_teacher) return statistics_kernel<T, false, Divergence::kNone>;
  switch (divergence) {
    case Divergence::kNone:
      return statistics_kernel<T, true, Divergence::kNone>;
    case Divergence::kForwardKL:
      return statistics_kernel<T, true, Divergence::kForwardKL>;
    case Divergence::kReverseKL:
      return statistics_kernel<T, true, Divergence::kReverseKL>;
    default:  // a mixture: its first sweep only normalises
      return statistics_kernel<T, true, Divergence::kJSD>;
  }
}

template <class T>
MixtureKernel mixture_kernel_of(Divergence divergence) {
  switch (divergence) {
    case Divergence::kJSD:
      return mixture_kernel<T, Divergence::kJSD>;
    case Divergence::kSkewKL:
      return mixture_kernel<T, Divergence::kSkewKL>;
    default:
      return mixture_kernel<T, Divergence::kSkewReverseKL>;
  }
}

}  // namespace

const char* statistics(const Problem& p, bool first, double* state, int64_t rows, Stream stream) {
  const StatisticsKernel kernel = for_element(p.element, [&](auto element) {
    return statistics_kernel_of<decltype(element)>(p.teacher.data != nullptr, p.divergence);
  });
  return launch(kernel, rows, kThreads, stream, Call(p), first, state);
}

const char* mixture(const Problem& p, double* state, int64_t rows, Stream stream) {
  const MixtureKernel kernel =
      for_element(p.element, [&](auto element) { return mixture_kernel_of<decltype(element)>(p.divergence); });
  return launch(kernel, rows, kThreads, stream, Call(p), state);
}

const char* finish(const double* state, bool has_teacher, bool has_targets, Divergence divergence, double beta,
                   float* statistics, int64_t rows, Stream stream) {
  constexpr int kRows = 128;
  return launch(finish_kernel, (rows + kRows - 1) / kRows, kRows, stream, state, has_teacher, has_targets, divergence,
                beta, statistics, rows);
}

}  // namespace cuda
}  // namespace selfdistill
