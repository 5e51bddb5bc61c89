// Gradient of a slab from finished statistics, in place. One block a row of [rows, columns].
//
// Bytes an element (float32): 8 read and 4 written (bfloat16 gradient: 2), 4 and 4 where the divergence has no weight.
// A row without any weight is only written.
#include "gradient.cuh"

namespace selfdistill {
namespace cuda {
namespace {

template <Divergence kDivergence, bool kClips, class T>
__device__ __forceinline__ void gradient_row(const Call& call, const Row<T>& student, const Row<T>& teacher, int64_t row,
                                             const float* statistics, const float* weights, Shared& shared) {
  const Problem& p = call.p;
  if (threadIdx.x == 0) {
    const int target = (int)target_column(p, row);
    shared.target = target;
    shared.terms = make_terms(statistics, p.beta, student.transform, weights[0], weights[1], weights[2]);
    if (target >= 0) {
      shared.at_target =
          gradient_at_target<kDivergence, kClips>(student, teacher, target, shared.terms, (float)p.entry_clip);
    }
  }
  __syncthreads();
  write_gradient<kDivergence, kClips>(student, teacher, call.columns, p.gradient_in_bfloat16, shared,
                                      (float)p.entry_clip);
}

template <class T, Divergence kDivergence, bool kClips>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gradient_kernel(const Call call, const float* statistics, const float* term_weights) {
  __shared__ Shared shared;
  const Problem& p = call.p;
  const int64_t row = blockIdx.x;
  const Row<T> student(p.student, call.student, row), teacher(p.teacher, call.teacher, row);
  const float* const weights = term_weights + 3 * row;
  statistics += row * kStatistics;
  if (weights[0] == 0.0f && weights[1] == 0.0f && weights[2] == 0.0f) {  // also where the row holds NaN
    clear_row(student, call.columns, p.gradient_in_bfloat16);
  } else if (kDivergence == Divergence::kNone || weights[0] == 0.0f) {
    gradient_row<Divergence::kNone, false>(call, student, teacher, row, statistics, weights, shared);
  } else {
    gradient_row<kDivergence, kClips>(call, student, teacher, row, statistics, weights, shared);
  }
}

using Kernel = void (*)(Call, const float*, const float*);

template <class T, bool kClips>
Kernel kernel_of(Divergence divergence) {
  switch (divergence) {
    case Divergence::kForwardKL:
      return gradient_kernel<T, Divergence::kForwardKL, kClips>;
    case Divergence::kReverseKL:
      return gradient_kernel<T, Divergence::kReverseKL, kClips>;
    case Divergence::kJSD:
      return gradient_kernel<T, Divergence::kJSD, kClips>;
    case Divergence::kSkewKL:
      return gradient_kernel<T, Divergence::kSkewKL, kClips>;
    case Divergence::kSkewReverseKL:
      return gradient_kernel<T, Divergence::kSkewReverseKL, kClips>;
    default:
      return gradient_kernel<T, Divergence::kNone, false>;
  }
}

}  // namespace

const char* gradient(const Problem& p, const float* statistics, const float* term_weights, int64_t rows, Stream stream) {
  const Kernel kernel = for_element(p.element, [&](auto element) {
    using T = decltype(element);
    return p.entry_clip > 0.0 ? kernel_of<T, true>(p.divergence) : kernel_of<T, false>(p.divergence);
  });
  return launch(kernel, rows, kThreads, stream, Call(p), statistics, term_weights);
}

}  // namespace cuda
}  // namespace selfdistill
