// Gradients of logits rounded at random, so that few entries are left: part of rows.inl, after candidates.inl.
//
// An entry of size e below tau becomes tau with probability e / tau, else 0: right on average, with the variance
// e (tau - e). tau is a row's own, as large as the error of its dH may be.

// ---- a row ------------------------------------------------------------------------------------------------------------

// A row's gradient, evaluated where a sweep lets it. GradientTerms as in gradient_row.
struct RoundedRow {
  const Problem& p;
  const RowLogits& logits;
  bool divergent;
  int64_t target;
  GradientTerms terms;
  Transform transform;
  Gradient<float> gradient;
  Screen screen;
  Bound bound;
  float at_target = 0.0f, teacher_entropy;
  double least = 0.0;  // threshold for which all candidates are there

  RoundedRow(const Problem& problem, const RowLogits& row, int64_t target_column, const float* statistics,
             const float* weights)
      : p(problem), logits(row), target(target_column), teacher_entropy(statistics[kTeacherEntropy]) {
    const bool has_bias = row.student && row.student->bias;
    transform = make_transform(p.logit_scale, p.softcap, p.temperature, has_bias);
    divergent = p.divergence != Divergence::kNone && weights[0] != 0.0f;
    terms = gradient_terms(p, transform, statistics, weights[0], weights[1], weights[2]);
    const Divergence divergence = divergent ? p.divergence : Divergence::kNone;
    const bool entropy = weights[2] != 0.0f;
    gradient = gradient_of<float>(divergence, entropy);
    screen = entropy ? screen_with<true>(divergence) : screen_with<false>(divergence);
    bound = make_bound(divergence, terms);
    if (!divergent) bound.divergence = 0.0f;
    if (target >= 0) {
      const float z = row.student ? logit_at(*row.student, target) : row.student_target;
      const float t = !divergent ? 0.0f : row.teacher ? logit_at(*row.teacher, target) : row.teacher_target;
      at_target = gradient.target(z, t, terms);
      if (transform.ceiling > 0.0f) at_target *= cap_derivative(z, transform);
    }
    if (row.floor > -INFINITY) least = least_threshold();
  }

  // An entry that was left out had a priority below the floor. Its bound now is larger by this factor at most: its
  // log-prob has fallen since, and its log-ratio moved, by no more than the log-sum-exps have grown.
  double least_threshold() const {
    const double student_grown = (double)terms.n.student + terms.n.student_low - logits.student_before;
    const double teacher_grown = divergent ? (double)terms.n.teacher + terms.n.teacher_low - logits.teacher_before : 0.0;
    const double grown = (student_grown > teacher_grown ? student_grown : teacher_grown) + 1e-3;
    double factor = bound.token + bound.entropy * (grown + fabsf(terms.entropy)) +
                    bound.divergence * (bound.rest * grown + bound.pivot);
    if (factor < bound.entropy) factor = bound.entropy;
    if (factor < bound.divergence * bound.rest) factor = bound.divergence * bound.rest;
    return factor * exp2((double)logits.floor + kBend + 0.01);
  }

  // Whether the candidates for a threshold are all there.
  bool has_all(double threshold) const { return least == 0.0 || (threshold > FLT_MIN ? threshold : FLT_MIN) >= least; }
  bool has_sample(double threshold) const { return has_all(threshold / kSampleSpread); }

  // Size of an entry whose probability is near 1: what thresholds are relative to.
  float scale() const { return bound.token + bound.entropy * (1.0f + terms.entropy) + bound.divergence; }

  // Near 0 for a row whose distributions have nearly all of their mass on one entry, else 1.
  double uncertainty() const {
    const float entropy = divergent ? larger(terms.entropy, teacher_entropy) : terms.entropy;
    return entropy > 1.0f ? 1.0 : entropy > 1e-6f ? entropy : 1e-6;
  }

  // Calls take(column, gradient, luck) for every candidate but the target, in ascending order, until it says no.
  template <class Take>
  void sweep(double threshold, bool is_sample, const Stream& stream, Candidates& found, const Take& take) const {
    float student_buffer[kBlock], teacher_buffer[kBlock];
    const float room = (float)log2(threshold > FLT_MIN ? threshold : FLT_MIN);
    found.count = 0;
    const bool is_kept = logits.columns != nullptr;
    const int64_t columns = is_kept ? logits.count : p.columns;
    for (int64_t j = 0; j < columns; j += kBlock) {
      const int64_t n = columns - j < kBlock ? columns - j : kBlock;
      const float* s = is_kept ? logits.kept_student + j : logits.student->transformed(j, n, student_buffer);
      const float* t = nullptr;
      if (divergent) t = is_kept ? logits.kept_teacher + j : logits.teacher->transformed(j, n, teacher_buffer);
      screen(s, t, is_kept ? logits.columns + j : kPlaces.at, is_kept ? 0 : j, n, terms, bound, room, is_sample, stream,
             found);
      if (found.count < kBlock && j + n < columns) continue;
      const int count = found.count;
      // Whole vectors: what lies behind is room.
      const int whole = (count + kLanes - 1) / kLanes * kLanes;
      for (int i = count; i < whole; ++i) found.student[i] = found.teacher[i] = 0.0f;
      gradient.block(found.student, found.teacher, whole, terms, transform, found.gradient);
      for (int i = 0; i < count; ++i) {
        if (found.column[i] != target && !take(found.column[i], found.gradient[i], found.luck[i])) return;
      }
      found.count = 0;
    }
  }
};

// ---- the threshold of a row -------------------------------------------------------------------------------------------

// Entries of a row, each for 1 / its probability of them.
struct Sample {
  static constexpr int kRoom = 4096;
  float gradient[kRoom], size[kRoom];   // e, |e|
  float first[kRoom], second[kRoom];    // |e| d and e^2 d over the probability, d the column's spread
  int32_t column[kRoom];
  int count = 0;

  bool add(int32_t at, float e, float spread, float probability) {
    if (count == kRoom) return false;
    const float share = spread / probability;
    gradient[count] = e;
    size[count] = fabsf(e);
    first[count] = fabsf(e) * share;
    second[count] = e * e * share;
    column[count++] = at;
    return true;
  }
};

struct Moments {
  double first = 0.0, second = 0.0;
  float largest = 0.0f;
};

// Sums over the entries below a threshold.
Moments moments_below(const Sample& sample, float threshold) {
  Vector first{}, second{}, top{};
  for (int i = 0; i < sample.count; i += kLanes) {  // behind the last there are zeros
    const Vector size = load(sample.size + i);
    const auto below = size < threshold;
    first += select(below, load(sample.first + i), Vector{});
    second += select(below, load(sample.second + i), Vector{});
    top = larger(select(below, size, Vector{}), top);
  }
  return {sum_lanes(first), sum_lanes(second), max_lanes(top)};
}

// to += by * (W[column] - c)
template <class Element>
void add_head_row(const RoundingHead& head, int64_t column, float by, float* to) {
  const Element* row = static_cast<const Element*>(head.weight) + column * head.hidden;
  int64_t k = 0;
  for (; k + kLanes <= head.hidden; k += kLanes) {
    store(to + k, load(to + k) + by * (load(row + k) - load(head.centre + k)));
  }
  for (; k < head.hidden; ++k) to[k] += by * (widened(row[k]) - head.centre[k]);
}

// |dH|^2 of a row: entries that hold a large part of sum e^2 d are multiplied out, the others taken for orthogonal.
double squared_norm(const RoundingHead& head, const Sample& sample, float* sum) {
  constexpr float kPart = 1.0f / 64.0f;  // so that they are no more than 64
  const double all = moments_below(sample, INFINITY).second;
  const float large = kPart * (float)all;
  double multiplied = 0.0, squares = 0.0;
  memset(sum, 0, head.hidden * sizeof(float));
  for (int i = 0; i < sample.count; ++i) {
    if (!(sample.second[i] > large)) continue;
    multiplied += sample.second[i];
    (head.is_bfloat16 ? add_head_row<uint16_t> : add_head_row<float>)(head, sample.column[i], sample.gradient[i], sum);
  }
  for (int64_t k = 0; k < head.hidden; ++k) squares += (double)sum[k] * sum[k];
  return squares + (all - multiplied);
}

// The largest tau whose variance, sum over |e| < tau of |e| (tau - |e|) d, is no more than `variance`; 0 if there is none.
float threshold_for(const Sample& sample, double variance) {
  // Convex and rising in tau: Newton's steps come down from above. Above all entries, the sums stay as they are.
  double tau = INFINITY;
  for (int step = 0; step < 32; ++step) {
    const Moments below = moments_below(sample, (float)tau);
    if (!(below.first > 0.0)) break;
    const double next = (variance + below.second) / below.first;
    if (!isfinite(next)) return 0.0f;  // float32 could not hold the sums: an exact row
    if (!(next < tau * (1.0 - 1e-3))) return (float)tau;
    tau = next;
  }
  return isfinite(tau) ? (float)tau : 0.0f;
}

// What rounding needs to work on a row, one for each thread; behind it lie `limit` columns, as many values, and [hidden].
struct RoundingSpace {
  Candidates candidates;
  Sample sample;
  int32_t* columns;
  float *values, *sum;
};

int64_t rounding_space(int64_t limit, int64_t hidden) { return sizeof(RoundingSpace) + 4 * (2 * limit + hidden); }

// Of the allowed variance, what the threshold is chosen for: a sample of a row does not know it exactly.
static constexpr double kShare = 0.75;
// Probabilities of a sample are 1 for entries of this part of the row's scale, at first; a row that is sure of itself has
// small entries only. At least so many entries make a sample, where the row has them.
static constexpr double kSamplePart = 0x1p-14, kLeastPart = 0x1p-90;
static constexpr int kLeastSample = 256;

float choose_threshold(const RoundedRow& row, const RoundingHead& head, double tolerance, int64_t key,
                       RoundingSpace& space) {
  Sample& sample = space.sample;
  const Stream stream(key, kSampling);
  const int64_t least = row.p.columns / 4 < kLeastSample ? row.p.columns / 4 : kLeastSample;
  bool is_above = false;
  for (double part = kSamplePart * row.uncertainty();;) {
    sample.count = 0;
    bool fits = row.has_sample(part * row.scale());
    if (fits) row.sweep(part * row.scale(), true, stream, space.candidates, [&](int32_t column, float e, float level) {
      const float probability = level < 127.0f ? from_bits((uint32_t)(level * 0x1p23f)) : 1.0f;
      return (fits = sample.add(column, e, head.spread[column], probability));
    });
    if (row.target >= 0 && fits) fits = sample.add((int32_t)row.target, row.at_target, head.spread[row.target], 1.0f);
    if (!fits) {
      part *= 8.0;
      is_above = true;
    } else if (sample.count >= least || is_above || part < kLeastPart) {
      break;
    } else {
      part *= 0x1p-5;
    }
  }
  for (int i = sample.count; i < sample.count + kLanes && i < Sample::kRoom; ++i) {
    sample.size[i] = sample.first[i] = sample.second[i] = 0.0f;
  }
  const double norm = squared_norm(head, sample, space.sum);
  return threshold_for(sample, kShare * tolerance * tolerance * norm);
}

struct Rounded {
  int64_t count = 0;
  double variance = 0.0, own_variance = 0.0;  // of dH, and of the entries themselves
  bool fits = true;
};

// Writes the entries of a row for a threshold, and where each slab's begin.
Rounded round_row(const RoundedRow& row, const RoundingHead& head, float tau, int64_t limit, int64_t key,
                  const SparseRows& to, int32_t* starts, RoundingSpace& space) {
  Rounded made;
  int64_t slab = 0;
  bool target_waits = row.target >= 0 && row.at_target != 0.0f;
  const auto put = [&](int64_t column, float value) {
    if (made.count == limit) return (made.fits = false);
    for (; slab * to.slab <= column; ++slab) starts[slab] = (int32_t)made.count;
    space.columns[made.count] = (int32_t)column;
    space.values[made.count++] = value;
    return true;
  };
  row.sweep(tau, false, Stream(key, kRounding), space.candidates, [&](int32_t column, float e, float luck) {
    if (target_waits && row.target < column) {
      target_waits = false;
      if (!put(row.target, row.at_target)) return false;
    }
    const float size = fabsf(e);
    if (size >= tau) return e == 0.0f || put(column, e);
    if (!(size > luck * tau)) return true;
    const double own = (double)tau * (tau - size);
    made.variance += own * head.spread[column];
    made.own_variance += own;
    return put(column, copysignf(tau, e));
  });
  if (target_waits && made.fits) put(row.target, row.at_target);
  for (; slab <= to.slabs; ++slab) starts[slab] = (int32_t)made.count;
  return made;
}

// From all entries of a row, with the exponentials that rounding it avoids: the variance of dH and of the entries, and the
// most that the lot of one entry moves dH and an entry.
void moments_of(const RoundedRow& row, const RoundingHead& head, float tau, int64_t key, RoundingSpace& space, float* to) {
  double variance = 0.0, own_variance = 0.0;
  float spread = 0.0f;
  // Nothing stays below a threshold of 0: what is left out is smaller than a normal number.
  row.sweep(0.0, false, Stream(key, kRounding), space.candidates, [&](int32_t column, float e, float) {
    const float size = fabsf(e);
    if (size == 0.0f || size >= tau) return true;
    const double own = (double)size * (tau - size);
    variance += own * head.spread[column];
    own_variance += own;
    spread = larger(spread, head.spread[column]);
    return true;
  });
  to[0] = (float)variance;
  to[1] = (float)own_variance;
  to[2] = tau * sqrtf(spread);
  to[3] = own_variance > 0.0 ? tau : 0.0f;
}

bool is_finite(const float* statistics, const float* weights) {
  float sum = 0.0f;
  for (int i = 0; i < kStatistics; ++i) {
    // An infinite log-prob is the target's own; it comes to a row through its weight.
    if (i != kStudentLogprob && i != kTeacherLogprob) sum += fabsf(statistics[i]);
  }
  for (int i = 0; i < 3; ++i) sum += fabsf(weights[i]);
  return isfinite(sum);
}

RoundingSpace* make_space(void* scratch, int64_t limit) {
  RoundingSpace* space = static_cast<RoundingSpace*>(scratch);
  space->columns = reinterpret_cast<int32_t*>(space + 1);
  space->values = reinterpret_cast<float*>(space->columns + limit);
  space->sum = space->values + limit;
  return space;
}

// Rounds a row into the memory of `to`, which may be that of its logits; false where that would be no gain.
bool round_into(const Problem& p, const RowLogits& logits, int64_t target, const float* statistics, const float* weights,
                const RoundingHead& head, const Rounding& rounding, const SparseRows& to, RoundingSpace& space, int64_t r) {
  int32_t* starts = to.starts + r * (to.slabs + 1);
  float* variance = rounding.variance + 2 * r;
  float* moments = rounding.moments ? rounding.moments + 4 * r : nullptr;
  variance[0] = variance[1] = 0.0f;
  if (moments) memset(moments, 0, 4 * sizeof(float));
  if (weights[0] == 0.0f && weights[1] == 0.0f && weights[2] == 0.0f) {
    for (int64_t slab = 0; slab <= to.slabs; ++slab) starts[slab] = 0;
    return true;
  }
  Rounded made;
  made.fits = false;
  const int64_t key = rounding.keys[r];
  if (is_finite(statistics, weights)) {
    const RoundedRow row(p, logits, target, statistics, weights);
    if (isfinite(row.least)) {
      const float tau = choose_threshold(row, head, rounding.tolerance, key, space);
      if (row.has_all(tau)) made = round_row(row, head, tau, rounding.limit, key, to, starts, space);
      if (moments && made.fits) moments_of(row, head, tau, key, space, moments);
    }
  }
  if (!made.fits) {
    starts[0] = -1;
    return false;
  }
  variance[0] = (float)made.variance;
  variance[1] = (float)made.own_variance;
  float* row = to.rows + r * to.stride;
  memcpy(row, space.columns, made.count * sizeof(int32_t));
  memcpy(row + to.capacity, space.values, made.count * sizeof(float));
  return true;
}

void round_rows(const Problem& p, const float* statistics, const float* term_weights, const RoundingHead& head,
                const Rounding& rounding, const SparseRows& to, void* scratch, int64_t begin, int64_t end) {
  RoundingSpace* space = make_space(scratch, rounding.limit);
  for (int64_t r = begin; r < end; ++r) {
    const float* weights = term_weights + 3 * r;
    const float* found = statistics + r * kStatistics;
    const Row student(p.student, p, r), teacher(p.teacher, p, r);
    const int64_t target = target_column(p, r);
    RowLogits logits;
    logits.student = &student;
    logits.teacher = &teacher;
    if (round_into(p, logits, target, found, weights, head, rounding, to, *space, r)) continue;
    gradient_row_as(p, student, teacher, target, found, weights[0], weights[1], weights[2]);
  }
}

// The same from what one sweep has kept.
void settle_rows(const Problem& p, const CandidateRows& from, const float* statistics, const float* term_weights,
                 const RoundingHead& head, const Rounding& rounding, const SparseRows& to, void* scratch, int64_t begin,
                 int64_t end) {
  RoundingSpace* space = make_space(scratch, rounding.limit);
  for (int64_t r = begin; r < end; ++r) {
    const float* marks = from.marks + r * CandidateRows::kMarks;
    const CandidateRow row = candidate_row(from, r, rounding.keys[r]);
    RowLogits logits;
    logits.columns = row.columns;
    logits.kept_student = row.student;
    logits.kept_teacher = row.teacher;
    logits.count = row.count;
    logits.floor = marks[0];
    logits.student_before = marks[1];
    logits.teacher_before = marks[2];
    logits.student_target = marks[3];
    logits.teacher_target = marks[4];
    round_into(p, logits, target_column(p, r), statistics + r * kStatistics, term_weights + 3 * r, head, rounding, to,
               *space, r);
  }
}
