// The sums of csrc/clip.h, between the sweeps over slabs and their end. One block a row of [rows, columns].
//
// Bytes an element (float32): 8 read. Of the two KLs only in rows in which an entry may be clipped, as their KL tells; of
// the divergences over the mixture in every row, because a slab does not know theirs.
#include "row.cuh"
// (clip.h is written in the functions of device.h)
#include "../clip.h"

namespace selfdistill {
namespace cuda {
namespace {

// False only where no part of a KL exceeds the clip. By p log(p/q) >= p - q the negative parts add up to no less than
// -sum max(q - p, 0), and that is no less than -sqrt(KL / 2) (Pinsker).
SELFDISTILL_FN bool kl_may_exceed(float kl, double clip) {
  const double half = kl > 0.0f ? 0.5 * kl : 0.0;
  return 1.001 * (2.0 * half + sqrt(half + 1e-5)) > clip;
}

template <Divergence kDivergence, class T>
__device__ __forceinline__ void clip_sweep(const Row<T>& student, const Row<T>& teacher, int columns,
                                           const ClipTerms& terms, RowState& state, Shared& shared) {
  ClipSums<float> sums{};
#pragma unroll 1
  for (int begin = (columns - 1) / kStep * kStep; begin >= 0; begin -= kStep) {
    float s[4 * kQuads], t[4 * kQuads];
    load_step<true>(student, teacher, begin, columns, s, t);
    ClipSums<float> step{0.0f, 0.0f, sums.count};
    // A quad after the other: with both at a time the JSD takes more registers than there are.
    static_assert(kQuads == 2, "two quads");
#pragma unroll 1
    for (int q = 0; q < kQuads; ++q) {
#pragma unroll
      for (int i = 0; i < 4; ++i) clip_element<kDivergence>(q ? s[4 + i] : s[i], q ? t[4 + i] : t[i], terms, step);
    }
    sums.value += step.value;
    sums.slope += step.slope;
    sums.count = step.count;
  }
  const float mine[3] = {sums.value, sums.slope, sums.count};
  double total[3];
  block_sum<3>(mine, total, shared);
  if (threadIdx.x == 0) {
    state.clipped_value += total[0] + total[2] * terms.clip;
    state.clipped_slope += total[1];
    state.clipped += total[2];
  }
}

// One block less than elsewhere: with 80 registers a thread the skew KL's spills 8 bytes on sm_100 and sm_120.
template <class T, Divergence kDivergence>
__global__ void __launch_bounds__(kThreads, kBlocks - 1) clip_kernel(const Call call, float beta, float clip, double* state) {
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
  if (!needs_mixture(kDivergence) && !kl_may_exceed(shared.statistics[Statistic::kDivergence], p.entry_clip)) return;
  const ClipTerms terms = {shared.terms.n, beta, clip, 0.0f};
  clip_sweep<kDivergence>(student, teacher, call.columns, terms, shared.row, shared);
  if (threadIdx.x == 0) store_state(state, row, shared.row);
}

using Kernel = void (*)(Call, float, float, double*);

template <class T>
Kernel kernel_of(Divergence divergence) {
  switch (divergence) {
    case Divergence::kForwardKL:
      return clip_kernel<T, Divergence::kForwardKL>;
    case Divergence::kReverseKL:
      return clip_kernel<T, Divergence::kReverseKL>;
    case Divergence::kJSD:
      return clip_kernel<T, Divergence::kJSD>;
    case Divergence::kSkewKL:
      return clip_kernel<T, Divergence::kSkewKL>;
    default:
      return clip_kernel<T, Divergence::kSkewReverseKL>;
  }
}

}  // namespace

const char* clip(const Problem& p, double* state, int64_t rows, Stream stream) {
  const Kernel kernel =
      for_element(p.element, [&](auto element) { return kernel_of<decltype(element)>(p.divergence); });
  return launch(kernel, rows, kThreads, stream, Call(p), (float)p.beta, (float)p.entry_clip, state);
}

}  // namespace cuda
}  // namespace selfdistill
