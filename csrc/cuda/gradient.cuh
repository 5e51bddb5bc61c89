// The gradient of a row, written over its scores: of the block code of row.cuh.
#pragma once

#include "row.cuh"
// (clip.h is written in the functions of device.h)
#include "../clip.h"

namespace selfdistill {
namespace cuda {

SELFDISTILL_FN GradientTerms make_terms(const float* statistics, double beta, const Transform& transform,
                                        double divergence_weight, double token_weight, double entropy_weight) {
  const double slope = transform_slope(transform);
  GradientTerms terms;
  terms.n = normalised(statistics);
  terms.beta = (float)beta;
  terms.entropy = statistics[kEntropy];
  terms.pivot = statistics[kPivot];
  terms.divergence_weight = (float)(slope * divergence_weight);
  terms.token_weight = (float)(slope * token_weight);
  terms.entropy_weight = (float)(slope * entropy_weight);
  return terms;
}

// Whether an entry's part of the divergence is clipped.
template <Divergence kDivergence>
SELFDISTILL_FN bool is_clipped(float student, float teacher, const GradientTerms& terms, float clip) {
  return entry_of<kDivergence>(student, teacher, terms.n, terms.beta).value > clip;
}

template <Divergence kDivergence, bool kClips = false, class T>
__device__ __forceinline__ float gradient_at_target(const Row<T>& student, const Row<T>& teacher, int target,
                                                    const GradientTerms& terms, float clip = 0.0f) {
  const float z = student.logit(target);
  const float t = kDivergence == Divergence::kNone ? 0.0f : teacher.logit(target);
  float g = target_gradient<kDivergence, true>(z, t, terms);
  if constexpr (kClips) {
    if (is_clipped<kDivergence>(z, t, terms, clip)) g = clipped_gradient(z, terms, kDivergence, true);
  }
  return student.transform.ceiling > 0.0f ? g * cap_derivative(z, student.transform) : g;
}

// The gradient takes the place of the student's row. In bfloat16 it fills the first half: the block then walks from left
// to right and nobody writes a step before everybody has read it. In the row's own type it starts at the end, for the L2.
template <Divergence kDivergence, bool kClips, class T, class Out>
__device__ __forceinline__ void gradient_sweep(const Row<T>& student, const Row<T>& teacher, int columns,
                                               const Shared& shared, float clip) {
  constexpr bool kTeacher = kDivergence != Divergence::kNone;
  constexpr bool kShrinks = sizeof(Out) < sizeof(T);
  const GradientTerms terms = shared.terms;
  const int target = shared.target;
  Out* const to = reinterpret_cast<Out*>(student.raw);
  const int last = (columns - 1) / kStep * kStep;
#pragma unroll 1
  for (int done = 0; done < columns; done += kStep) {
    const int begin = kShrinks ? done : last - done;
    float s[4 * kQuads], t[4 * kQuads] = {};
    load_step<kTeacher>(student, teacher, begin, columns, s, t);
#pragma unroll
    for (int i = 0; i < 4 * kQuads; ++i) {
      const float z = s[i];
      s[i] = gradient_element<kDivergence, true>(z, t[i], terms);
      if constexpr (kClips) {
        if (is_clipped<kDivergence>(z, t[i], terms, clip)) s[i] = clipped_gradient(z, terms, kDivergence, false);
      }
      if (student.transform.ceiling > 0.0f) s[i] *= cap_derivative(z, student.transform);
    }
    if constexpr (kShrinks) __syncthreads();
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int j = Row<T>::column(begin, q);
      if (target - j >= 0 && target - j < 4) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[4 * q + i] = target == j + i ? shared.at_target : s[4 * q + i];
      }
      store_quad(to, student.raw_aligned, j, columns, s + 4 * q);
    }
  }
}

template <class T>
__device__ __forceinline__ void clear_row(const Row<T>& student, int columns, bool in_bfloat16) {
  const float zeros[4] = {};
#pragma unroll 1
  for (int j = Row<T>::column(0, 0); j < columns; j += 4 * kThreads) {
    if (in_bfloat16) {
      store_quad(reinterpret_cast<BFloat16*>(student.raw), student.raw_aligned, j, columns, zeros);
    } else {
      store_quad(student.raw, student.raw_aligned, j, columns, zeros);
    }
  }
}

// `shared.terms`, `shared.target` and `shared.at_target` were written before the last barrier.
template <Divergence kDivergence, bool kClips = false, class T>
__device__ __forceinline__ void write_gradient(const Row<T>& student, const Row<T>& teacher, int columns,
                                               bool in_bfloat16, const Shared& shared, float clip = 0.0f) {
  if constexpr (sizeof(T) == 4) {
    if (in_bfloat16) return gradient_sweep<kDivergence, kClips, T, BFloat16>(student, teacher, columns, shared, clip);
  }
  gradient_sweep<kDivergence, kClips, T, T>(student, teacher, columns, shared, clip);
}

}  // namespace cuda
}  // namespace selfdistill
