// The mathematics of a row for the CPU's and CUDA's row kernels: statistics of two distributions over the vocabulary, the
// merge of partial statistics, and the gradient of every loss with respect to the student's logits. Triton has the same in
// backends/triton/divergence.py and the oracle in plain torch; tests hold the three equal.
//
// Written for a "real" R that is a float or a vector of floats. The including file first supplies SELFDISTILL_FN and the
// functions of csrc/elementary.h for its R (csrc/cpu/vector.h, csrc/cuda/device.h).
//
// Notation. z: logits, z = cap(scale * (raw + bias)) / temperature, cap(u) = softcap * tanh(u / softcap). S, p_s: student;
// T, p_t: teacher; m = beta T + (1 - beta) S; L: log-sum-exp; x = log-ratio of teacher to student.
//
// Why so many digits survive. KL of nearly equal distributions is of second order in x, and so are all sums kept for it:
// sum e_s (x e^x - expm1(x)) instead of sum e_t x, and the excess sum (e_t - e_s) = sum e_s expm1(x) instead of the
// difference of two rounded sums. x is formed from z_t - z_s, which is exact when they are close. When the teacher is the
// student, bit for bit, x is 0 and so are the divergence and its gradient.
//
// A logit of -inf rules its entry out (docs/math.md, infinities). Drivers read it as kLowest: its probability is 0 as well,
// and what that multiplies is finite. So nothing here meets 0 * inf; the infinite values are put in by finish().
#pragma once

#include <float.h>
#include <math.h>
#include <stdint.h>

namespace selfdistill {

enum class Divergence : int {
  kNone = 0,
  kForwardKL = 1,      // KL(T || S)
  kReverseKL = 2,      // KL(S || T)
  kJSD = 3,            // beta KL(T || m) + (1 - beta) KL(S || m)
  kSkewKL = 4,         // KL(T || m)
  kSkewReverseKL = 5,  // KL(S || m)
};

// Those over the mixture m need both normalisers first: a second sweep.
SELFDISTILL_FN constexpr bool needs_mixture(Divergence d) { return (int)d >= (int)Divergence::kJSD; }

// Columns of the float32 statistics. L = shift + logsum; the shift is L rounded to float32, so that a common
// offset of the logits costs nothing and the pair holds L to about 14 digits.
enum Statistic : int {
  kStudentShift = 0,
  kStudentLogsum = 1,  // log sum exp(z - shift)
  kTeacherShift = 2,
  kTeacherLogsum = 3,
  kStudentLogprob = 4,  // of the target; 0 without targets
  kTeacherLogprob = 5,
  kEntropy = 6,
  kTeacherEntropy = 7,
  kDivergence = 8,
  // Forward KL: what clipped entries have of T; reverse KL: the KL; JSD: KL(S || m); skew KL: see skew_pivot(); skew
  // reverse KL: sum p_s r + 1 - beta. Where an entry is clipped: see csrc/clip.h.
  kPivot = 9,
  kStatistics = 10,
};

// Below this |x|, series in x replace differences of exponentials. exponential_tail and logarithm_deficit hold there.
static constexpr float kNear = 0.34f;
// The lowest logit: an entry that its model rules out. The maximum of nothing but such entries lies above: e is 0 for all.
static constexpr float kLowest = -1e30f;
static constexpr float kLowestMaximum = 0.5f * kLowest;
// Below this log-probability float32 has none but 0.
static constexpr float kLeastLogprob = -87.33654f;

// ---- logits -----------------------------------------------------------------------------------------------------------

struct Transform {
  float slope;     // before the cap
  float rest;      // what rounding took from it: a relative error here would grow with the logits
  float ceiling;   // softcap / temperature, or 0: no cap
  bool identity;   // z == raw
};

SELFDISTILL_FN Transform make_transform(double scale, double softcap, double temperature, bool has_bias) {
  Transform t;
  const double slope = softcap > 0 ? scale / softcap : scale / temperature;
  t.slope = (float)slope;
  t.rest = (float)(slope - (double)t.slope);
  t.ceiling = (float)(softcap > 0 ? softcap / temperature : 0.0);
  t.identity = !has_bias && t.ceiling == 0.0f && t.slope == 1.0f;
  return t;
}

template <class R>
SELFDISTILL_FN R transform_logit(R raw_plus_bias, const Transform& t) {
  // An infinity has no rest: `rest` may be 0 or have another sign than the slope.
  const R finite = at_most(at_least(raw_plus_bias, -FLT_MAX), FLT_MAX);
  const R u = raw_plus_bias * t.slope + finite * t.rest;
  return t.ceiling > 0.0f ? t.ceiling * hyperbolic_tangent(u) : u;
}

// dz / draw without the cap's own derivative, which cap_derivative() gives from z.
SELFDISTILL_FN float transform_slope(const Transform& t) { return t.ceiling > 0.0f ? t.slope * t.ceiling : t.slope; }

template <class R>
SELFDISTILL_FN R cap_derivative(R z, const Transform& t) {
  const R tanh = z * (1.0f / t.ceiling);
  return (1.0f - tanh) * (1.0f + tanh);
}

// ---- log-ratio --------------------------------------------------------------------------------------------------------

// x = (z_t - centre_t) - (z_s - centre_s). Where the centres are close, so are the logits that matter, and z_t - z_s is
// exact: then the difference comes first. Otherwise each logit goes to its own centre first.
struct LogRatio {
  float student, teacher, rest;
};

SELFDISTILL_FN LogRatio make_log_ratio(double student_centre, double teacher_centre) {
  const double offset = teacher_centre - student_centre;
  LogRatio r;
  const bool close = fabs(offset) < 0.5;
  r.student = close ? 0.0f : (float)student_centre;
  r.teacher = close ? 0.0f : (float)teacher_centre;
  r.rest = (float)(offset - ((double)r.teacher - (double)r.student));
  return r;
}

template <class R>
SELFDISTILL_FN R log_ratio(R student, R teacher, const LogRatio& r) {
  return ((teacher - r.teacher) - (student - r.student)) - r.rest;
}

// ---- first sweep: sums around the maxima, and their merge ------------------------------------------------------------

// Sums over a part of the vocabulary. With e = exp(z - max) and x = (z_t - max_t) - (z_s - max_s):
struct RowState {
  double student_max, teacher_max;
  double student_sum, teacher_sum;        // sum e
  double excess;                          // sum (e_t - e_s)
  double moment;                          // forward: sum e_t x; reverse: sum e_s x
  double curvature;                       // forward: sum e_s (x e^x - expm1(x)); reverse: sum e_s (expm1(x) - x)
  double student_moment, teacher_moment;  // sum e (z - max)
  double student_target, teacher_target;  // z of the target, once its column was seen
  double student_mixture, teacher_mixture;  // second sweep: KL(S || m); KL(T || m)
  double pivot, kappa;                      // the pivot of Statistic; for skew KL kappa - 1 and kappa = sum p_s p_t / m
  double exposed;  // forward: the largest z_t that the student rules out; reverse: the largest z_s that the teacher does
  double clipped, clipped_value, clipped_slope;  // second sweep of csrc/clip.h
};
static constexpr int kStateColumns = 19;  // a row of the float64 state is a RowState
static_assert(sizeof(RowState) == kStateColumns * sizeof(double), "state row");

template <class R>
struct FirstSums {
  R student, teacher, excess, moment, curvature, student_moment, teacher_moment;
};

struct Centre {
  float student, teacher;  // the maxima
  LogRatio ratio;
};

template <bool kTeacher, Divergence kDivergence, class R>
SELFDISTILL_FN void first_element(R student, R teacher, const Centre& centre, FirstSums<R>& sums) {
  const R a = student - centre.student;
  const R e_s = exponential(a);
  sums.student += e_s;
  sums.student_moment += e_s * a;
  if constexpr (kTeacher) {
    const R b = teacher - centre.teacher;
    const R e_t = exponential(b);
    sums.teacher += e_t;
    sums.teacher_moment += e_t * b;
    if constexpr (kDivergence != Divergence::kNone) {
      const R x = log_ratio(student, teacher, centre.ratio);
      const R xx = x * x;
      const auto near = xx < kNear * kNear;
      const R h = exponential_tail(x);
      const R difference = select(near, e_s * (xx * h + x), e_t - e_s);
      sums.excess += difference;
      if constexpr (kDivergence == Divergence::kForwardKL) {
        sums.moment += e_t * x;
        sums.curvature += select(near, (e_s * xx) * ((1.0f - h) + x * h), e_t * x - difference);
      }
      if constexpr (kDivergence == Divergence::kReverseKL) {
        sums.moment += e_s * x;
        sums.curvature += select(near, (e_s * xx) * h, difference - e_s * x);
      }
    }
  }
}

// The same sums around other maxima (exact; a = exp(max - max'), c = what x gains).
SELFDISTILL_FN void move_maxima(RowState& s, double student_max, double teacher_max, Divergence divergence) {
  const double by_s = s.student_max - student_max, by_t = s.teacher_max - teacher_max;
  const double a_s = exp(by_s), a_t = exp(by_t), c = by_t - by_s;
  const double grow = fabs(c) < 0.5 ? a_s * expm1(c) : a_t - a_s;  // a_t - a_s
  if (divergence == Divergence::kForwardKL) {
    const double lift = fabs(c) < 0.5 ? a_t * (c + expm1(-c)) : a_t * c - grow;
    s.curvature = a_t * (s.curvature + c * s.excess) + s.student_sum * lift;
    s.moment = a_t * (s.moment + c * s.teacher_sum);
  } else if (divergence == Divergence::kReverseKL) {
    const double lift = fabs(c) < 0.5 ? a_s * (expm1(c) - c) : grow - a_s * c;
    s.curvature = a_s * s.curvature + s.excess * grow + s.student_sum * lift;
    s.moment = a_s * (s.moment + c * s.student_sum);
  }
  s.excess = a_t * s.excess + s.student_sum * grow;
  s.student_moment = a_s * (s.student_moment + by_s * s.student_sum);
  s.teacher_moment = a_t * (s.teacher_moment + by_t * s.teacher_sum);
  s.student_sum *= a_s;
  s.teacher_sum *= a_t;
  s.student_max = student_max;
  s.teacher_max = teacher_max;
}

SELFDISTILL_FN void raise_maxima(RowState& s, double student_max, double teacher_max, Divergence divergence) {
  if (student_max > s.student_max || teacher_max > s.teacher_max) {
    move_maxima(s, student_max > s.student_max ? student_max : s.student_max,
                teacher_max > s.teacher_max ? teacher_max : s.teacher_max, divergence);
  }
}

// into += from, two disjoint parts of the vocabulary. Targets and the second sweep are not part of it.
SELFDISTILL_FN void merge(RowState& into, RowState from, Divergence divergence) {
  raise_maxima(into, from.student_max, from.teacher_max, divergence);
  raise_maxima(from, into.student_max, into.teacher_max, divergence);
  into.student_sum += from.student_sum;
  into.teacher_sum += from.teacher_sum;
  into.excess += from.excess;
  into.moment += from.moment;
  into.curvature += from.curvature;
  into.student_moment += from.student_moment;
  into.teacher_moment += from.teacher_moment;
  if (from.exposed > into.exposed) into.exposed = from.exposed;
}

// ---- finish -----------------------------------------------------------------------------------------------------------

SELFDISTILL_FN double student_lse(const RowState& s) { return s.student_max + log(s.student_sum); }

// L_t - L_s, from the excess where that is the accurate way (it is not summed without a divergence).
SELFDISTILL_FN double lse_difference(const RowState& s, Divergence divergence) {
  const double u = s.excess / s.student_sum;
  const bool near = divergence != Divergence::kNone && fabs(u) < 0.5;
  return (s.teacher_max - s.student_max) + (near ? log1p(u) : log(s.teacher_sum) - log(s.student_sum));
}

SELFDISTILL_FN double finish_kl(const RowState& s, Divergence divergence) {
  const double u = s.excess / s.student_sum;
  const bool near = fabs(u) < 0.5;
  const double log_sums = near ? log1p(u) : log(s.teacher_sum) - log(s.student_sum);
  if (divergence == Divergence::kForwardKL) {
    return near ? s.curvature / s.teacher_sum + (u / (1.0 + u) - log_sums) : s.moment / s.teacher_sum - log_sums;
  }
  return near ? s.curvature / s.student_sum + (log_sums - u) : log_sums - s.moment / s.student_sum;
}

// 0 <= kappa <= 1, near 1 for close distributions, near 0 for distant ones. One float keeps the digits of both:
// kappa - 1 (not positive) in the upper half, kappa (positive) in the lower. Of nearly equal distributions kappa - 1 is a
// sum whose terms cancel, and what the roundings leave above 0 would be read as a small kappa.
SELFDISTILL_FN float skew_pivot(double kappa_less_1, double kappa) {
  if (kappa > 0.0 && kappa < 0.5) return (float)kappa;
  return kappa_less_1 > 0.0 ? 0.0f : (float)kappa_less_1;
}

// (z - max) - log_sum, -inf for an entry that is ruled out.
SELFDISTILL_FN float logprob(double z, double max, double log_sum) {
  const float inside = (float)((z - max) - log_sum);
  return z <= kLowest ? inside - INFINITY : inside;
}

SELFDISTILL_FN void finish(RowState s, bool has_teacher, bool has_targets, Divergence divergence, double beta,
                           float* statistics) {
  // A model that rules out everything has no distribution.
  if (s.student_sum == 0.0) s.student_sum = NAN;
  if (s.teacher_sum == 0.0) s.teacher_sum = s.excess = NAN;
  for (int i = 0; i < kStatistics; ++i) statistics[i] = 0.0f;
  const double log_s = log(s.student_sum), lse_s = s.student_max + log_s;
  statistics[kStudentShift] = (float)lse_s;
  statistics[kStudentLogsum] = (float)((s.student_max - (double)statistics[kStudentShift]) + log_s);
  statistics[kEntropy] = (float)(log_s - s.student_moment / s.student_sum);
  if (has_targets) statistics[kStudentLogprob] = logprob(s.student_target, s.student_max, log_s);
  if (!has_teacher) return;
  const double log_t = (s.student_max - s.teacher_max) + log_s + lse_difference(s, divergence);
  statistics[kTeacherShift] = (float)(s.teacher_max + log_t);
  statistics[kTeacherLogsum] = (float)((s.teacher_max - (double)statistics[kTeacherShift]) + log_t);
  statistics[kTeacherEntropy] = (float)(log_t - s.teacher_moment / s.teacher_sum);
  if (has_targets) statistics[kTeacherLogprob] = logprob(s.teacher_target, s.teacher_max, log_t);
  switch (divergence) {
    case Divergence::kNone:
      break;
    case Divergence::kForwardKL:
    case Divergence::kReverseKL: {
      const double lse = divergence == Divergence::kForwardKL ? s.teacher_max + log_t : lse_s;
      const double kl = finish_kl(s, divergence);
      statistics[kDivergence] = s.exposed - lse > kLeastLogprob && !isnan(kl) ? INFINITY : (float)kl;
      if (divergence == Divergence::kReverseKL) statistics[kPivot] = statistics[kDivergence];
      break;
    }
    case Divergence::kJSD:
      statistics[kDivergence] = (float)(beta * s.teacher_mixture + (1.0 - beta) * s.student_mixture);
      statistics[kPivot] = (float)s.student_mixture;
      break;
    case Divergence::kSkewKL:
      statistics[kDivergence] = (float)s.teacher_mixture;
      statistics[kPivot] = skew_pivot(s.pivot, s.kappa);
      break;
    case Divergence::kSkewReverseKL:
      statistics[kDivergence] = (float)s.student_mixture;
      statistics[kPivot] = (float)s.pivot;
      break;
  }
}

// ---- the two distributions of a finished row --------------------------------------------------------------------------

struct Normalised {
  float student, student_low, teacher, teacher_low;  // L = shift + low
  LogRatio ratio;
};

SELFDISTILL_FN Normalised normalised(const float* statistics) {
  Normalised n;
  n.student = statistics[kStudentShift];
  n.student_low = statistics[kStudentLogsum];
  n.teacher = statistics[kTeacherShift];
  n.teacher_low = statistics[kTeacherLogsum];
  n.ratio = make_log_ratio((double)n.student + (double)n.student_low, (double)n.teacher + (double)n.teacher_low);
  return n;
}

template <class R>
SELFDISTILL_FN R student_logprob(R z, const Normalised& n) {
  return (z - n.student) - n.student_low;
}
// The low part goes in where the argument is reduced, and costs no rounding.
template <class R>
SELFDISTILL_FN R student_probability(R z, const Normalised& n) {
  return exponential(z - n.student, n.student_low);
}
template <class R>
SELFDISTILL_FN R teacher_probability(R z, const Normalised& n) {
  return exponential(z - n.teacher, n.teacher_low);
}

// p_t - p_s, never as the difference of two roundings of nearly equal numbers.
template <class R>
SELFDISTILL_FN R probability_difference(R p_s, R p_t, R x) {
  const R xx = x * x;
  return select(xx < kNear * kNear, p_s * (xx * exponential_tail(x) + x), p_t - p_s);
}

// ---- second sweep: the mixture m = beta T + (1 - beta) S ------------------------------------------------------------

template <class R>
struct Mixture {
  R log_student, log_teacher;          // log(m / p_s), log(m / p_t)
  R share_student;                     // 1 - p_s/m
  R share_teacher;                     // 1 - p_t/m where |x| < kNear, -p_t/m elsewhere: no digits lost in either
  R deficit_student, deficit_teacher;  // v - log(1 + v) for v = m/p_s - 1 and for v = m/p_t - 1; only where |x| < kNear
};

// Far from 0 everything comes from n = e^-|x| <= 1, so that nothing overflows.
template <class R>
SELFDISTILL_FN Mixture<R> mixture(R x, float beta) {
  const float rest = 1.0f - beta;
  const R size = absolute(x);
  const auto near = size < kNear;
  const auto up = x > 0.0f;
  const R v = beta * ((x * x) * exponential_tail(x) + x);
  const R y = rest * ((x * x) * exponential_tail(-x) - x);
  const R n = exponential(-size);
  const R one = splat<R>(1.0f);
  const R m = select(up, beta + rest * n, rest + beta * n);  // m / max(p_s, p_t)
  const R log_m = logarithm(m);
  Mixture<R> r;
  r.deficit_student = logarithm_deficit(v);
  r.deficit_teacher = logarithm_deficit(y);
  r.log_student = select(near, v - r.deficit_student, select(up, log_m + size, log_m));
  r.log_teacher = select(near, y - r.deficit_teacher, select(up, log_m, log_m + size));
  r.share_student = select(near, v, m - select(up, n, one)) / select(near, 1.0f + v, m);
  r.share_teacher = select(near, y, -select(up, one, n)) / select(near, 1.0f + y, m);
  return r;
}

template <class R>
struct SecondSums {
  R student, teacher, pivot, kappa;
};

template <Divergence kDivergence, class R>
SELFDISTILL_FN void second_element(R student, R teacher, const Normalised& n, float beta, SecondSums<R>& sums) {
  const R x = log_ratio(student, teacher, n.ratio);
  const R p_s = student_probability(student, n);
  const R p_t = teacher_probability(teacher, n);
  const R difference = probability_difference(p_s, p_t, x);
  const Mixture<R> m = mixture(x, beta);
  const auto near = absolute(x) < kNear;
  // KL(S || m) = sum p_s (v - log(1 + v)), v = m/p_s - 1, because sum p_s v = 0. Every term is >= 0.
  if constexpr (kDivergence != Divergence::kSkewKL) {
    sums.student += select(near, p_s * m.deficit_student, beta * difference - p_s * m.log_student);
  }
  if constexpr (kDivergence != Divergence::kSkewReverseKL) {
    sums.teacher += select(near, p_t * m.deficit_teacher, (beta - 1.0f) * difference - p_t * m.log_teacher);
  }
  if constexpr (kDivergence == Divergence::kSkewKL) {
    sums.pivot -= p_s * select(near, m.share_teacher, 1.0f + m.share_teacher);
    sums.kappa += p_s * select(near, 1.0f - m.share_teacher, -m.share_teacher);
  }
  if constexpr (kDivergence == Divergence::kSkewReverseKL) {
    sums.pivot += p_s * ((1.0f - beta) * m.share_student - m.log_student);
  }
}

// ---- gradient ---------------------------------------------------------------------------------------------------------

struct GradientTerms {
  Normalised n;
  float beta, entropy, pivot;                             // the row's values
  float divergence_weight, token_weight, entropy_weight;  // of the divergence, of -log p_s(y), of the entropy
};

// d loss / d z_s of one element that is not the target. The target's own part is target_gradient().
template <Divergence kDivergence, bool kEntropyTerm, class R>
SELFDISTILL_FN R gradient_element(R student, R teacher, const GradientTerms& t) {
  const R p_s = student_probability(student, t.n);
  R slope = splat<R>(t.token_weight);
  if constexpr (kEntropyTerm) slope = slope - t.entropy_weight * (student_logprob(student, t.n) + t.entropy);
  if constexpr (kDivergence == Divergence::kNone) return p_s * slope;
  const R x = log_ratio(student, teacher, t.n.ratio);
  if constexpr (kDivergence == Divergence::kForwardKL) {
    const R p_t = teacher_probability(teacher, t.n);
    return p_s * (slope - t.divergence_weight * t.pivot) - t.divergence_weight * probability_difference(p_s, p_t, x);
  }
  R g = x;
  if constexpr (kDivergence == Divergence::kReverseKL) g = -(x + t.pivot);
  if constexpr (needs_mixture(kDivergence)) {
    const Mixture<R> m = mixture(x, t.beta);
    const float rest = 1.0f - t.beta;
    if constexpr (kDivergence == Divergence::kJSD) g = -rest * (m.log_student + t.pivot);
    if constexpr (kDivergence == Divergence::kSkewKL) {
      const float kappa = t.pivot > 0.0f ? t.pivot : 1.0f + t.pivot;
      const float kappa_less_1 = t.pivot > 0.0f ? t.pivot - 1.0f : t.pivot;
      const auto near = absolute(x) < kNear;
      g = rest * (m.share_teacher + select(near, splat<R>(kappa_less_1), splat<R>(kappa)));
    }
    // r = log(p_s/m) - (1 - beta) p_s/m, here plus the constant 1 - beta, which its mean takes away again.
    if constexpr (kDivergence == Divergence::kSkewReverseKL) g = (rest * m.share_student - m.log_student) - t.pivot;
  }
  return p_s * (slope + t.divergence_weight * g);
}

// The target's element: -log p_s(y) adds token_weight (p_s - 1), written without cancellation.
template <Divergence kDivergence, bool kEntropyTerm>
SELFDISTILL_FN float target_gradient(float student, float teacher, GradientTerms t) {
  const float weight = t.token_weight;
  t.token_weight = 0.0f;
  const float rest = gradient_element<kDivergence, kEntropyTerm>(student, teacher, t);
  return rest + weight * (float)expm1((double)student_logprob(student, t.n));
}

}  // namespace selfdistill
