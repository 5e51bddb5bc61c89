// A divergence whose entries are clipped one by one, sum over v of min(f_v, clip), for the row kernels of
// CPUs and CUDA; in the functions that divergence.h is written in. Triton has the same in
// backends/triton/clip.py. Its sums take the place of the divergence and its pivot, so that
// gradient_element() gives the elements of the other entries.
#pragma once

#include "divergence.h"

namespace selfdistill {

// f_v, what an entry adds to the divergence, and d f_v / d log p_s(v).
template <class R>
struct Entry {
  R value, slope;
};

template <Divergence kDivergence, class R>
SELFDISTILL_FN Entry<R> entry_of(R student, R teacher, const Normalised& n, float beta) {
  const R x = log_ratio(student, teacher, n.ratio);
  if constexpr (kDivergence == Divergence::kForwardKL) {
    const R p_t = teacher_probability(teacher, n);
    const auto infinite = (student <= kLowest) & (p_t > 0.0f);
    return {select(infinite, splat<R>(INFINITY), p_t * x), -p_t};
  }
  const R p_s = student_probability(student, n);
  if constexpr (kDivergence == Divergence::kReverseKL) {
    const auto infinite = (teacher <= kLowest) & (p_s > 0.0f);
    return {select(infinite, splat<R>(INFINITY), -(p_s * x)), p_s * (1.0f - x)};
  }
  const float rest = 1.0f - beta;
  const R p_t = teacher_probability(teacher, n);
  const Mixture<R> m = mixture(x, beta);
  const auto near = absolute(x) < kNear;
  // beta (m - p_t) + (1 - beta) (m - p_s) = 0: of log(m/p) only the deficits count in the JSD.
  if constexpr (kDivergence == Divergence::kJSD) {
    const R student_part = select(near, p_s * m.deficit_student, -(p_s * m.log_student));
    const R teacher_part = select(near, p_t * m.deficit_teacher, -(p_t * m.log_teacher));
    return {beta * teacher_part + rest * student_part, -rest * (p_s * m.log_student)};
  }
  if constexpr (kDivergence == Divergence::kSkewKL) {
    return {-(p_t * m.log_teacher), -rest * (p_s * select(near, 1.0f - m.share_teacher, -m.share_teacher))};
  }
  return {-(p_s * m.log_student), p_s * ((beta + rest * m.share_student) - m.log_student)};
}

struct ClipTerms {
  Normalised n;
  float beta, clip;
  float level;  // see may_exceed()
};

SELFDISTILL_FN ClipTerms make_clip_terms(const Normalised& n, Divergence divergence, double beta, double clip) {
  double log_size = log(4.0) - 1.0;  // log u <= u / 4 + log 4 - 1
  if (divergence == Divergence::kJSD) log_size = log(-beta * log(beta) - (1.0 - beta) * log(1.0 - beta));
  if (divergence == Divergence::kSkewKL) log_size = log(-log(beta));
  if (divergence == Divergence::kSkewReverseKL) log_size = log(-log(1.0 - beta));
  return {n, (float)beta, (float)clip, (float)(log(clip) - log_size - 0.01)};
}

// False only where f_v is below the clip, and without an exponential: most entries stop here. KL: log(p x) <= log p + x / 4
// + log 4 - 1; over a mixture f_v is at most the larger probability times a constant.
template <Divergence kDivergence, class R>
SELFDISTILL_FN auto may_exceed(R student, R teacher, const ClipTerms& t) {
  const R s = student - t.n.student, u = teacher - t.n.teacher;
  if constexpr (kDivergence == Divergence::kForwardKL) return u + 0.25f * (u - s) > t.level;
  if constexpr (kDivergence == Divergence::kReverseKL) return s + 0.25f * (s - u) > t.level;
  if constexpr (kDivergence == Divergence::kJSD) return larger(s, u) > t.level;
  if constexpr (kDivergence == Divergence::kSkewKL) return u > t.level;
  if constexpr (kDivergence == Divergence::kSkewReverseKL) return s > t.level;
}

// Of the entries that are not clipped, and the number of those that are.
template <class R>
struct ClipSums {
  R value, slope, count;
};

template <Divergence kDivergence, class R>
SELFDISTILL_FN void clip_element(R student, R teacher, const ClipTerms& t, ClipSums<R>& sums) {
  const Entry<R> e = entry_of<kDivergence>(student, teacher, t.n, t.beta);
  const auto clipped = e.value > t.clip;
  const R zero = splat<R>(0.0f);
  sums.value += select(clipped, zero, e.value);
  sums.slope += select(clipped, zero, e.slope);
  sums.count += select(clipped, splat<R>(1.0f), zero);
}

// What takes the pivot's place where entries are clipped, from the sum of the slopes (Entry) of all others: gradient_element
// then gives theirs.
SELFDISTILL_FN float clipped_pivot(double slope, Divergence divergence, double beta) {
  switch (divergence) {
    case Divergence::kForwardKL:
      return (float)(1.0 + slope);
    case Divergence::kReverseKL:
      return (float)(slope - 1.0);
    case Divergence::kJSD:
      return (float)(slope / (1.0 - beta));
    case Divergence::kSkewKL:
      return skew_pivot(-slope / (1.0 - beta) - 1.0, -slope / (1.0 - beta));
    default:
      return (float)(slope - beta);
  }
}
// And back.
SELFDISTILL_FN float slope_of_pivot(float pivot, Divergence divergence, float beta) {
  switch (divergence) {
    case Divergence::kForwardKL:
      return pivot - 1.0f;
    case Divergence::kReverseKL:
      return pivot + 1.0f;
    case Divergence::kJSD:
      return (1.0f - beta) * pivot;
    case Divergence::kSkewKL:
      return (beta - 1.0f) * (pivot > 0.0f ? pivot : 1.0f + pivot);
    default:
      return pivot + beta;
  }
}

// After finish(): the statistics of a row in which an entry is clipped.
SELFDISTILL_FN void finish_clipped(const RowState& s, Divergence divergence, double beta, float* statistics) {
  if (!(s.clipped > 0.0)) return;
  statistics[kDivergence] = (float)s.clipped_value;
  statistics[kPivot] = clipped_pivot(s.clipped_slope, divergence, beta);
}

// A clipped entry's element: of the divergence only what p_s has of the other entries' slopes.
SELFDISTILL_FN float clipped_gradient(float student, const GradientTerms& t, Divergence divergence, bool is_target) {
  GradientTerms own = t;
  own.token_weight = (is_target ? 0.0f : t.token_weight) - t.divergence_weight * slope_of_pivot(t.pivot, divergence, t.beta);
  const float g = gradient_element<Divergence::kNone, true>(student, 0.0f, own);
  return is_target ? g + t.token_weight * (float)expm1((double)student_logprob(student, t.n)) : g;
}

}  // namespace selfdistill
