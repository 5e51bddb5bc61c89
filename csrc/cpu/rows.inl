// The row kernels. Included by rows_<isa>.cpp, each compiled with the flags of its instruction set.
#include "vector.h"
// (the order matters: divergence.h is written in the functions of vector.h)
#include "rows.h"

namespace selfdistill {
namespace SELFDISTILL_ISA {
namespace {

// float32 lanes add up 64 elements, then go to float64. A block of both models and of both buffers stays in the L1 cache.
constexpr int kBlock = 64 * kLanes;

SELFDISTILL_FN void prefetch(const float* from) { __builtin_prefetch(from); }

using FirstBlock = void (*)(const float*, const float*, int64_t, const Centre&, RowState&);
using SecondBlock = void (*)(const float*, const float*, int64_t, const Normalised&, float, RowState&);
template <class Out>
using GradientBlock = void (*)(const float*, const float*, int64_t, const GradientTerms&, const Transform&, Out*);
using TargetGradient = float (*)(float, float, GradientTerms);

template <bool kTeacher, Divergence kDivergence>
void first_block(const float* student, const float* teacher, int64_t n, const Centre& centre, RowState& state) {
  FirstSums<Vector> lanes{};
  FirstSums<float> tail{};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    prefetch(student + kBlock + j);  // the next block arrives while this one is computed
    if constexpr (kTeacher) prefetch(teacher + kBlock + j);
    first_element<kTeacher, kDivergence>(load(student + j), kTeacher ? load(teacher + j) : Vector{}, centre, lanes);
  }
  for (; j < n; ++j) {
    first_element<kTeacher, kDivergence>(student[j], kTeacher ? teacher[j] : 0.0f, centre, tail);
  }
  state.student_sum += sum_lanes(lanes.student) + tail.student;
  state.student_moment += sum_lanes(lanes.student_moment) + tail.student_moment;
  if constexpr (kTeacher) {
    state.teacher_sum += sum_lanes(lanes.teacher) + tail.teacher;
    state.teacher_moment += sum_lanes(lanes.teacher_moment) + tail.teacher_moment;
  }
  if constexpr (kDivergence != Divergence::kNone) state.excess += sum_lanes(lanes.excess) + tail.excess;
  if constexpr (kDivergence == Divergence::kForwardKL || kDivergence == Divergence::kReverseKL) {
    state.moment += sum_lanes(lanes.moment) + tail.moment;
    state.curvature += sum_lanes(lanes.curvature) + tail.curvature;
  }
}

FirstBlock first_block_of(bool has_teacher, Divergence divergence) {
  if (!has_teacher) return first_block<false, Divergence::kNone>;
  switch (divergence) {
    case Divergence::kNone:
      return first_block<true, Divergence::kNone>;
    case Divergence::kForwardKL:
      return first_block<true, Divergence::kForwardKL>;
    case Divergence::kReverseKL:
      return first_block<true, Divergence::kReverseKL>;
    default:  // a mixture: its first sweep only normalises
      return first_block<true, Divergence::kJSD>;
  }
}

template <Divergence kDivergence>
void second_block(const float* student, const float* teacher, int64_t n, const Normalised& normal, float beta,
                  RowState& state) {
  SecondSums<Vector> lanes{};
  SecondSums<float> tail{};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    second_element<kDivergence>(load(student + j), load(teacher + j), normal, beta, lanes);
  }
  for (; j < n; ++j) second_element<kDivergence>(student[j], teacher[j], normal, beta, tail);
  state.student_mixture += sum_lanes(lanes.student) + tail.student;
  state.teacher_mixture += sum_lanes(lanes.teacher) + tail.teacher;
  state.pivot += sum_lanes(lanes.pivot) + tail.pivot;
  if constexpr (kDivergence == Divergence::kSkewKL) state.kappa += sum_lanes(lanes.kappa) + tail.kappa;
}

SecondBlock second_block_of(Divergence divergence) {
  switch (divergence) {
    case Divergence::kJSD:
      return second_block<Divergence::kJSD>;
    case Divergence::kSkewKL:
      return second_block<Divergence::kSkewKL>;
    default:
      return second_block<Divergence::kSkewReverseKL>;
  }
}

// `to` may be the student's own memory, also as bfloat16: it is read before it is written, from left to right.
template <Divergence kDivergence, bool kEntropyTerm, class Out>
void gradient_block(const float* student, const float* teacher, int64_t n, const GradientTerms& terms,
                    const Transform& transform, Out* to) {
  constexpr bool kTeacher = kDivergence != Divergence::kNone;
  const bool capped = transform.ceiling > 0.0f;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const Vector z = load(student + j);
    Vector g = gradient_element<kDivergence, kEntropyTerm>(z, kTeacher ? load(teacher + j) : Vector{}, terms);
    if (capped) g *= cap_derivative(z, transform);
    store(to + j, g);
  }
  for (; j < n; ++j) {
    const float z = student[j];
    float g = gradient_element<kDivergence, kEntropyTerm>(z, kTeacher ? teacher[j] : 0.0f, terms);
    if (capped) g *= cap_derivative(z, transform);
    store(to + j, g);
  }
}

template <class Out>
struct Gradient {
  GradientBlock<Out> block;
  TargetGradient target;
};

template <class Out, bool kEntropyTerm>
Gradient<Out> gradient_with(Divergence divergence) {
#define SELFDISTILL_CASE(D) \
  case D:                   \
    return {gradient_block<D, kEntropyTerm, Out>, target_gradient<D, kEntropyTerm>}
  switch (divergence) {
    SELFDISTILL_CASE(Divergence::kForwardKL);
    SELFDISTILL_CASE(Divergence::kReverseKL);
    SELFDISTILL_CASE(Divergence::kJSD);
    SELFDISTILL_CASE(Divergence::kSkewKL);
    SELFDISTILL_CASE(Divergence::kSkewReverseKL);
    default:
      return {gradient_block<Divergence::kNone, kEntropyTerm, Out>, target_gradient<Divergence::kNone, kEntropyTerm>};
  }
#undef SELFDISTILL_CASE
}

template <class Out>
Gradient<Out> gradient_of(Divergence divergence, bool entropy_term) {
  return entropy_term ? gradient_with<Out, true>(divergence) : gradient_with<Out, false>(divergence);
}

float largest(const float* z, int64_t n) {
  float top = z[0];
  int64_t j = 0;
  if (n >= 4 * kLanes) {  // four chains hide the latency of a comparison
    Vector lanes[4] = {load(z), load(z + kLanes), load(z + 2 * kLanes), load(z + 3 * kLanes)};
    for (j = 4 * kLanes; j + 4 * kLanes <= n; j += 4 * kLanes) {
      for (int i = 0; i < 4; ++i) {
        const Vector next = load(z + j + i * kLanes);
        lanes[i] = select(next > lanes[i], next, lanes[i]);
      }
    }
    for (int i = 1; i < 4; ++i) lanes[0] = select(lanes[i] > lanes[0], lanes[i], lanes[0]);
    top = max_lanes(lanes[0]);
  }
  for (; j < n; ++j) top = z[j] > top ? z[j] : top;
  return top;
}

// Whether an entry is -inf, or below every logit that counts.
bool rules_out_any(const float* z, int64_t n) {
  VectorInt lanes{};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) lanes |= load(z + j) <= kLowest;
  bool found = false;
  for (int i = 0; i < kLanes; ++i) found |= lanes[i] != 0;
  for (; j < n; ++j) found |= z[j] <= kLowest;
  return found;
}

// One model's row, block by block: raw values in, logits out. `to` has room for a block and may be the row itself.
struct Row {
  float* raw;  // nullptr: the model is absent
  const float* bias;
  Transform transform;
  bool is_transformed = false;  // into logits, none below kLowest

  Row(const Tile& tile, const Problem& p, int64_t row)
      : raw(tile.data ? static_cast<float*>(tile.data) + row * tile.stride : nullptr),
        bias(tile.bias),
        transform(make_transform(p.logit_scale, p.softcap, p.temperature, tile.bias != nullptr)) {}

  // May hold -inf.
  const float* transformed(int64_t j, int64_t n, float* to) const {
    const float* from = raw + j;
    if (is_transformed || transform.identity) return from;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      const Vector u = bias ? load(from + i) + load(bias + j + i) : load(from + i);
      store(to + i, transform_logit(u, transform));
    }
    for (; i < n; ++i) to[i] = transform_logit(bias ? from[i] + bias[j + i] : from[i], transform);
    return to;
  }

  // None below kLowest.
  const float* logits(int64_t j, int64_t n, float* to) const {
    const float* z = transformed(j, n, to);
    return is_transformed ? z : raised(z, n, to);
  }

  static const float* raised(const float* z, int64_t n, float* to) {
    if (!rules_out_any(z, n)) return z;
    for (int64_t i = 0; i < n; ++i) to[i] = at_least(z[i], kLowest);
    return to;
  }

  Row after_transform() const {
    Row r = *this;
    r.is_transformed = true;
    return r;
  }
};

// The largest logit of `model` in a block among the entries that the other model rules out.
double exposed_in(const float* model, const float* other, int64_t n, double so_far) {
  for (int64_t j = 0; j < n; ++j) {
    if (other[j] <= kLowest && model[j] > so_far) so_far = model[j];
  }
  return so_far;
}

// Adds a block to the sums of a row, around the maxima of all so far.
void add_block(const Problem& p, FirstBlock add, const float* student, const float* teacher, int64_t n, bool is_first,
               RowState& state) {
  const float s_max = at_least(largest(student, n), kLowestMaximum);
  const float t_max = teacher ? at_least(largest(teacher, n), kLowestMaximum) : 0.0f;
  if (is_first) {
    state.student_max = s_max;
    state.teacher_max = t_max;
  } else {
    raise_maxima(state, s_max, t_max, p.divergence);
  }
  Centre centre;
  centre.student = (float)state.student_max;
  centre.teacher = (float)state.teacher_max;
  centre.ratio = make_log_ratio(state.student_max, state.teacher_max);
  add(student, teacher, n, centre, state);
}

bool is_nan(const RowState& state) { return isnan(state.student_moment + state.teacher_moment); }

// Sums of a row or of a slab of it, around its maxima. In place: the row holds logits afterwards.
RowState first_sweep(const Problem& p, const Row& student, const Row& teacher, bool in_place) {
  const FirstBlock add = first_block_of(teacher.raw != nullptr, p.divergence);
  float student_buffer[kBlock], teacher_buffer[kBlock];
  RowState state{};
  state.exposed = kLowest;
  for (int64_t j = 0; j < p.columns; j += kBlock) {
    const int64_t n = p.columns - j < kBlock ? p.columns - j : kBlock;
    float* const s_to = in_place ? student.raw + j : student_buffer;
    float* const t_to = in_place ? teacher.raw + j : teacher_buffer;
    const float* s = student.transformed(j, n, s_to);
    const float* t = teacher.raw ? teacher.transformed(j, n, t_to) : nullptr;
    const RowState before = state;
    add_block(p, add, s, t, n, j == 0, state);
    // An entry of -inf has left 0 * inf in a moment: the block again, without. So finding it costs the others nothing.
    if (!is_nan(state) || is_nan(before)) continue;
    state = before;
    s = Row::raised(s, n, s_to);
    if (t) t = Row::raised(t, n, t_to);
    add_block(p, add, s, t, n, j == 0, state);
    if (p.divergence == Divergence::kForwardKL) state.exposed = exposed_in(t, s, n, state.exposed);
    if (p.divergence == Divergence::kReverseKL) state.exposed = exposed_in(s, t, n, state.exposed);
  }
  return state;
}

void second_sweep(const Problem& p, const Row& student, const Row& teacher, RowState& state) {
  float statistics[kStatistics];
  finish(state, true, false, p.divergence, p.beta, statistics);
  const Normalised normal = normalised(statistics);
  const SecondBlock add = second_block_of(p.divergence);
  float student_buffer[kBlock], teacher_buffer[kBlock];
  for (int64_t j = 0; j < p.columns; j += kBlock) {
    const int64_t n = p.columns - j < kBlock ? p.columns - j : kBlock;
    add(student.logits(j, n, student_buffer), teacher.logits(j, n, teacher_buffer), n, normal, (float)p.beta, state);
  }
}

#include "clip.inl"

float logit_at(const Row& row, int64_t column) {
  float z;
  return *row.logits(column, 1, &z);
}

GradientTerms gradient_terms(const Problem& p, const Transform& transform, const float* statistics,
                             double divergence_weight, double token_weight, double entropy_weight) {
  const double slope = transform_slope(transform);
  GradientTerms terms;
  terms.n = normalised(statistics);
  terms.beta = (float)p.beta;
  terms.entropy = statistics[kEntropy];
  terms.pivot = statistics[kPivot];
  terms.divergence_weight = (float)(slope * divergence_weight);
  terms.token_weight = (float)(slope * token_weight);
  terms.entropy_weight = (float)(slope * entropy_weight);
  return terms;
}

template <class Out>
void gradient_row(const Problem& p, const Row& student, const Row& teacher, int64_t target, const float* statistics,
                  double divergence_weight, double token_weight, double entropy_weight) {
  const Transform transform = make_transform(p.logit_scale, p.softcap, p.temperature, student.bias != nullptr);
  const bool divergent = p.divergence != Divergence::kNone && divergence_weight != 0.0;
  Out* to = reinterpret_cast<Out*>(student.raw);
  if (!divergent && token_weight == 0.0 && entropy_weight == 0.0) {  // also where the row holds NaN
    memset(to, 0, (size_t)p.columns * sizeof(Out));
    return;
  }
  const GradientTerms terms =
      gradient_terms(p, transform, statistics, divergence_weight, token_weight, entropy_weight);
  const Gradient<Out> gradient =
      gradient_of<Out>(divergent ? p.divergence : Divergence::kNone, entropy_weight != 0.0);
  float at_target = 0.0f;
  if (target >= 0) {  // before the row is overwritten
    const float z = logit_at(student, target);
    at_target = gradient.target(z, divergent ? logit_at(teacher, target) : 0.0f, terms);
    if (transform.ceiling > 0.0f) at_target *= cap_derivative(z, transform);
  }
  const bool clips = divergent && p.entry_clip > 0.0;
  const Clip clip = clip_of(p.divergence);
  const ClipTerms clip_terms =
      clips ? make_clip_terms(terms.n, p.divergence, p.beta, p.entry_clip) : ClipTerms{};
  float student_buffer[kBlock], teacher_buffer[kBlock], clipped[kBlock];
  int32_t columns[kBlock];
  for (int64_t j = 0; j < p.columns; j += kBlock) {
    const int64_t n = p.columns - j < kBlock ? p.columns - j : kBlock;
    const float* s = student.logits(j, n, student_buffer);
    const float* t = divergent ? teacher.logits(j, n, teacher_buffer) : nullptr;
    const int count = clips ? clip.find(s, t, n, clip_terms, columns) : 0;
    for (int i = 0; i < count; ++i) {  // before the block is overwritten
      const float z = s[columns[i]];
      clipped[i] = clipped_gradient(z, terms, p.divergence, j + columns[i] == target);
      if (transform.ceiling > 0.0f) clipped[i] *= cap_derivative(z, transform);
      if (j + columns[i] == target) at_target = clipped[i];
    }
    gradient.block(s, t, n, terms, transform, to + j);
    for (int i = 0; i < count; ++i) store(to + j + columns[i], clipped[i]);
  }
  if (target >= 0) store(to + target, at_target);
}

void gradient_row_as(const Problem& p, const Row& student, const Row& teacher, int64_t target, const float* statistics,
                     double divergence_weight, double token_weight, double entropy_weight) {
  (p.gradient_in_bfloat16 ? gradient_row<uint16_t> : gradient_row<float>)(p, student, teacher, target, statistics,
                                                                          divergence_weight, token_weight, entropy_weight);
}

void visit(const Problem& p, const VisitTerms& v, int64_t begin, int64_t end) {
  const bool has_teacher = p.teacher.data != nullptr;
  for (int64_t r = begin; r < end; ++r) {
    const Row raw_student(p.student, p, r), raw_teacher(p.teacher, p, r);
    const int64_t target = target_column(p, r);
    RowState state = first_sweep(p, raw_student, raw_teacher, true);
    const Row student = raw_student.after_transform(), teacher = raw_teacher.after_transform();
    if (target >= 0) {
      state.student_target = logit_at(student, target);
      if (has_teacher) state.teacher_target = logit_at(teacher, target);
    }
    if (needs_mixture(p.divergence)) second_sweep(p, student, teacher, state);
    if (p.entry_clip > 0.0) clip_sweep(p, student, teacher, true, state);
    float* statistics = v.statistics + r * kStatistics;
    finish(state, has_teacher, target >= 0, p.divergence, p.beta, statistics);
    finish_clipped(state, p.divergence, p.beta, statistics);

    const float advantage = statistics[kTeacherLogprob] - statistics[kStudentLogprob];
    const float weight = v.loss_weight ? v.loss_weight[r] : 1.0f;
    v.active[r] = v.active[r] && weight != 0.0f && passes_gate(v, advantage);
    if (!v.loss_weight || !v.active[r]) continue;
    const double token = v.cross_entropy + (v.policy_gradient != 0.0 ? v.policy_gradient * advantage : 0.0);
    gradient_row_as(p, student, teacher, target, statistics, weight, weight * token, weight * v.entropy);
  }
}

void statistics(const Problem& p, bool first, double* state, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const Row student(p.student, p, r), teacher(p.teacher, p, r);
    RowState slab = first_sweep(p, student, teacher, false);
    const int64_t target = target_column(p, r);
    if (target >= 0) {
      slab.student_target = logit_at(student, target);
      if (teacher.raw) slab.teacher_target = logit_at(teacher, target);
    }
    double* row = state + r * kStateColumns;
    if (!first) {
      RowState whole;
      memcpy(&whole, row, sizeof whole);
      merge(whole, slab, p.divergence);
      if (target >= 0) {
        whole.student_target = slab.student_target;
        whole.teacher_target = slab.teacher_target;
      }
      slab = whole;
    }
    memcpy(row, &slab, sizeof slab);
  }
}

void mixture_sums(const Problem& p, double* state, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    RowState row;
    memcpy(&row, state + r * kStateColumns, sizeof row);
    second_sweep(p, Row(p.student, p, r), Row(p.teacher, p, r), row);
    memcpy(state + r * kStateColumns, &row, sizeof row);
  }
}

void gradient(const Problem& p, const float* statistics, const float* term_weights, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const float* w = term_weights + 3 * r;
    gradient_row_as(p, Row(p.student, p, r), Row(p.teacher, p, r), target_column(p, r), statistics + r * kStatistics,
                    w[0], w[1], w[2]);
  }
}

void widen(const uint16_t* bfloat16, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(bfloat16 + i));
  for (; i < count; ++i) to[i] = widened(bfloat16[i]);
}

void narrow(const float* from, int64_t count, uint16_t* bfloat16) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(bfloat16 + i, load(from + i));
  for (; i < count; ++i) store(bfloat16 + i, from[i]);
}

#include "screen.inl"
#include "rounding.inl"
#include "sparse.inl"

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    visit, statistics, mixture_sums, clip_sums, gradient, widen, narrow,
    {spread, round_rows, rounding_space, sparse_hidden_gradient, sparse_weight_gradient},
};

}  // namespace SELFDISTILL_ISA
}  // namespace selfdistill
