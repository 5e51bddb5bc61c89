// What one sweep over slabs of the vocabulary keeps of a row, so that it can be rounded when its log-sum-exp is known: part
// of rows.inl, after screen.inl.
//
// An entry of the gradient takes part in a sample or in the rounded row where a random number times a threshold lies below
// its bound (screen.inl). Its priority is log2 of what the threshold may be at most for that: the bound over the smaller one
// of its two random numbers, for weights of 1 and the log-sum-exps so far. These only grow, so that priorities only fall. A
// row keeps what has a priority of its floor or more, and where its memory is full the floor rises. No entry that was left
// out is missed by a threshold above the floor, whatever the sweep knew when it left it out. Below the floor the row's
// gradient is exact. Where the floor lies hangs on the row's own lots, too, which biases those of the keys that do not fall
// back: a row that did for 52 % of its keys had entries whose sum was low by 5.3e-5, and a dH off by 3 % of its error.

// Logits of a row: all of them, or those that one sweep has kept (candidates.inl).
struct RowLogits {
  const Row *student = nullptr, *teacher = nullptr;  // of a whole row
  const int32_t* columns = nullptr;                  // else of the logits that were kept
  const float *kept_student = nullptr, *kept_teacher = nullptr;
  int64_t count = 0;
  // Of a row that was not kept whole: log2 of the priority that an entry left out cannot have, the log-sum-exps after the
  // first slab, and the logits of the target.
  float floor = -INFINITY, student_before = 0.0f, teacher_before = 0.0f, student_target = 0.0f, teacher_target = 0.0f;
};

// A sample is kept as if its threshold were so many times that of the entries: it needs fewer.
static constexpr float kSampleSpread = 8.0f;
// Priorities are counted in quarters of a power of two, from 2^kLowestPriority on.
static constexpr int kBins = 1024, kLowestPriority = -126;

// The candidates of one row, and what they are measured by.
struct CandidateRow {
  int32_t* columns;
  float *student, *teacher;
  int64_t capacity;
  int32_t count;
  float floor;
  GradientTerms terms;
  Bound bound;
  Stream sampling, rounding;
};

template <Divergence kDivergence, bool kEntropyTerm, class R, class B>
SELFDISTILL_FN R priority(R student, R teacher, B column, const GradientTerms& terms, const Bound& bound,
                          const Stream& sampling, const Stream& rounding) {
  const R luck = smaller(uniform(column, sampling) * kSampleSpread, uniform(column, rounding));
  return log2_bound<kDivergence, kEntropyTerm>(student, teacher, terms, bound) - bent_log2(luck);
}

// Adds logits of columns [first, first + n), for which there is room and that of a vector.
template <Divergence kDivergence, bool kEntropyTerm>
void add_candidates(const float* student, const float* teacher, int64_t first, int64_t n, CandidateRow& row) {
  constexpr bool kTeacher = kDivergence != Divergence::kNone;
  const GradientTerms terms = row.terms;  // what is written below cannot change a copy
  const Bound bound = row.bound;
  const Stream sampling = row.sampling, rounding = row.rounding;
  const float floor = row.floor;
  int32_t* const columns = row.columns;
  float *const to_student = row.student, *const to_teacher = row.teacher;
  int count = row.count;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vector s = load(student + i), t = kTeacher ? load(teacher + i) : Vector{};
    const VectorBits column = load_columns(kPlaces.at + i) + (uint32_t)first;
    const Vector level = priority<kDivergence, kEntropyTerm>(s, t, column, terms, bound, sampling, rounding);
    const uint32_t mask = mask_of(level >= floor);
    store_lanes(mask, from_bits(column), columns + count);
    store_lanes(mask, s, to_student + count);
    if constexpr (kTeacher) store_lanes(mask, t, to_teacher + count);
    count += __builtin_popcount(mask);
  }
  for (; i < n; ++i) {
    const float s = student[i], t = kTeacher ? teacher[i] : 0.0f;
    const uint32_t column = (uint32_t)(first + i);
    if (!(priority<kDivergence, kEntropyTerm>(s, t, column, terms, bound, sampling, rounding) >= floor)) continue;
    columns[count] = (int32_t)column;
    to_student[count] = s;
    if constexpr (kTeacher) to_teacher[count] = t;
    ++count;
  }
  row.count = count;
}

// Raises the floor until no more than `wanted` candidates are left. `priorities` has room for all.
template <Divergence kDivergence, bool kEntropyTerm>
void raise_floor(CandidateRow& row, int64_t wanted, float* priorities) {
  constexpr bool kTeacher = kDivergence != Divergence::kNone;
  int32_t bins[kBins] = {};
  // Whole vectors: what lies behind the last is memory of the row.
  for (int i = 0; i < row.count; i += kLanes) {
    const Vector t = kTeacher ? load(row.teacher + i) : Vector{};
    store(priorities + i, priority<kDivergence, kEntropyTerm>(load(row.student + i), t, load_columns(row.columns + i),
                                                              row.terms, row.bound, row.sampling, row.rounding));
  }
  for (int i = 0; i < row.count; ++i) {
    const float place = (priorities[i] - kLowestPriority) * 4.0f;
    ++bins[place > 0.0f ? (place < kBins ? (int)place : kBins - 1) : 0];
  }
  int64_t left = 0;
  int edge = kBins;
  while (edge > 0 && left + bins[edge - 1] <= wanted) left += bins[--edge];
  row.floor = larger(row.floor, edge * 0.25f + kLowestPriority);
  int count = 0;
  for (int i = 0; i < row.count; i += kLanes) {
    uint32_t mask = mask_of(load(priorities + i) >= row.floor);
    if (row.count - i < kLanes) mask &= (1u << (row.count - i)) - 1;
    // In place: what is written lies before what is still to be read.
    const Vector columns = from_bits(load_columns(row.columns + i)), student = load(row.student + i);
    const Vector teacher = kTeacher ? load(row.teacher + i) : Vector{};
    store_lanes(mask, columns, row.columns + count);
    store_lanes(mask, student, row.student + count);
    if constexpr (kTeacher) store_lanes(mask, teacher, row.teacher + count);
    count += __builtin_popcount(mask);
  }
  row.count = count;
}

struct Emission {
  void (*add)(const float*, const float*, int64_t, int64_t, CandidateRow&);
  void (*raise_floor)(CandidateRow&, int64_t, float*);
};

template <bool kEntropyTerm>
Emission emission_with(Divergence divergence) {
#define SELFDISTILL_CASE(D) \
  case D:                   \
    return {add_candidates<D, kEntropyTerm>, raise_floor<D, kEntropyTerm>}
  switch (divergence) {
    SELFDISTILL_CASE(Divergence::kForwardKL);
    SELFDISTILL_CASE(Divergence::kReverseKL);
    SELFDISTILL_CASE(Divergence::kJSD);
    SELFDISTILL_CASE(Divergence::kSkewKL);
    SELFDISTILL_CASE(Divergence::kSkewReverseKL);
    default:
      return {add_candidates<Divergence::kNone, kEntropyTerm>, raise_floor<Divergence::kNone, kEntropyTerm>};
  }
#undef SELFDISTILL_CASE
}

// Terms of a row with log-sum-exps, and a bound for weights of 1.
void measure(const Problem& p, double student, double teacher, CandidateRow& row) {
  row.terms = GradientTerms{};
  row.terms.beta = (float)p.beta;
  row.terms.n.student = (float)student;
  row.terms.n.student_low = (float)(student - row.terms.n.student);
  row.terms.n.teacher = (float)teacher;
  row.terms.n.teacher_low = (float)(teacher - row.terms.n.teacher);
  row.terms.n.ratio = make_log_ratio(student, teacher);
  const float rest = make_bound(p.divergence, row.terms).rest > 0.0f ? 1.0f : 0.0f;
  row.bound = Bound{1.0f, 1.0f, rest, 1.0f, 0.0f};
}

CandidateRow candidate_row(const CandidateRows& from, int64_t r, int64_t key) {
  float* memory = from.rows + r * from.stride;
  return {reinterpret_cast<int32_t*>(memory), memory + from.capacity,
          from.has_teacher ? memory + 2 * from.capacity : nullptr, from.capacity, from.counts[r],
          from.marks[r * CandidateRows::kMarks], GradientTerms{}, Bound{}, Stream(key, kSampling), Stream(key, kRounding)};
}

// Of a full row, what is left: the rest is room for the next block, and so that it is not full again at once.
int64_t kept_of(int64_t capacity) { return capacity / 8 * 5; }

void emit_rows(const Problem& p, bool entropy_term, const double* state, const int64_t* keys, const CandidateRows& into,
               float* scratch, int64_t begin, int64_t end) {
  const Emission emission = entropy_term ? emission_with<true>(p.divergence) : emission_with<false>(p.divergence);
  float student_buffer[kBlock], teacher_buffer[kBlock];
  for (int64_t r = begin; r < end; ++r) {
    const Row student(p.student, p, r), teacher(p.teacher, p, r);
    float* marks = into.marks + r * CandidateRows::kMarks;
    if (p.column_offset == 0) {
      into.counts[r] = 0;
      marks[0] = into.floor;
    }
    RowState found;
    memcpy(&found, state + r * kStateColumns, sizeof found);
    CandidateRow row = candidate_row(into, r, keys[r]);
    const double teacher_lse = into.has_teacher ? found.teacher_max + log(found.teacher_sum) : 0.0;
    measure(p, found.student_max + log(found.student_sum), teacher_lse, row);
    if (p.column_offset == 0) {
      marks[1] = row.terms.n.student + row.terms.n.student_low;
      marks[2] = row.terms.n.teacher + row.terms.n.teacher_low;
      marks[3] = marks[4] = 0.0f;
    }
    // A model without a distribution, so far or at all: nothing is kept, and the row will be dense.
    if (!isfinite(row.terms.n.student + row.terms.n.teacher)) row.floor = INFINITY;
    for (int64_t j = 0; j < p.columns && row.floor < INFINITY; j += kBlock) {
      const int64_t n = p.columns - j < kBlock ? p.columns - j : kBlock;
      const auto is_full = [&] { return row.count + n + kLanes > row.capacity; };
      if (is_full()) emission.raise_floor(row, kept_of(row.capacity), scratch);
      if (is_full()) {  // priorities above all bins: no floor makes room
        row.floor = INFINITY;
        break;
      }
      const float* s = student.transformed(j, n, student_buffer);
      const float* t = into.has_teacher ? teacher.transformed(j, n, teacher_buffer) : nullptr;
      emission.add(s, t, p.column_offset + j, n, row);
    }
    into.counts[r] = row.floor < INFINITY ? row.count : 0;
    marks[0] = row.floor;
    const int64_t target = target_column(p, r);
    if (target < 0) continue;
    marks[3] = logit_at(student, target);
    if (into.has_teacher) marks[4] = logit_at(teacher, target);
  }
}
