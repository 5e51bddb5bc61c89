// Entries whose part of the divergence is clipped: part of rows.inl, before the gradient.
//
// Few entries of a row are: may_exceed() rules out nearly all others without an exponential, so that a row where nothing is
// clipped costs a look at its logits, and keeps its statistics and its gradient bit for bit.

using FindClipped = int (*)(const float*, const float*, int64_t, const ClipTerms&, int32_t*);
using ClipBlock = void (*)(const float*, const float*, int64_t, const ClipTerms&, RowState&);

template <Divergence kDivergence>
bool exceeds(float student, float teacher, const ClipTerms& terms) {
  return entry_of<kDivergence>(student, teacher, terms.n, terms.beta).value > terms.clip;
}

// The columns of a block's clipped entries; returns how many there are.
template <Divergence kDivergence>
int find_clipped(const float* student, const float* teacher, int64_t n, const ClipTerms& terms, int32_t* columns) {
  VectorInt lanes{};
  bool found = false;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    lanes |= may_exceed<kDivergence>(load(student + j), load(teacher + j), terms);
  }
  for (int i = 0; i < kLanes; ++i) found |= lanes[i] != 0;
  for (; j < n; ++j) found |= may_exceed<kDivergence>(student[j], teacher[j], terms);
  int count = 0;
  if (!found) return count;
  for (j = 0; j < n; ++j) {
    if (!may_exceed<kDivergence>(student[j], teacher[j], terms)) continue;
    if (exceeds<kDivergence>(student[j], teacher[j], terms)) columns[count++] = (int32_t)j;
  }
  return count;
}

template <Divergence kDivergence>
void clip_block(const float* student, const float* teacher, int64_t n, const ClipTerms& terms, RowState& state) {
  ClipSums<Vector> lanes{};
  ClipSums<float> tail{};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    clip_element<kDivergence>(load(student + j), load(teacher + j), terms, lanes);
  }
  for (; j < n; ++j) clip_element<kDivergence>(student[j], teacher[j], terms, tail);
  const double count = sum_lanes(lanes.count) + tail.count;
  state.clipped += count;
  state.clipped_value += sum_lanes(lanes.value) + tail.value + count * terms.clip;
  state.clipped_slope += sum_lanes(lanes.slope) + tail.slope;
}

struct Clip {
  FindClipped find;
  ClipBlock add;
};

Clip clip_of(Divergence divergence) {
#define SELFDISTILL_CASE(D) \
  case D:                   \
    return {find_clipped<D>, clip_block<D>}
  switch (divergence) {
    SELFDISTILL_CASE(Divergence::kForwardKL);
    SELFDISTILL_CASE(Divergence::kReverseKL);
    SELFDISTILL_CASE(Divergence::kJSD);
    SELFDISTILL_CASE(Divergence::kSkewKL);
    default:
      return {find_clipped<Divergence::kSkewReverseKL>, clip_block<Divergence::kSkewReverseKL>};
  }
#undef SELFDISTILL_CASE
}

// The sums of a row or of a slab of it, of which `is_whole` says that it is the row: where nothing is clipped, none.
void clip_sweep(const Problem& p, const Row& student, const Row& teacher, bool is_whole, RowState& state) {
  float statistics[kStatistics];
  finish(state, true, false, p.divergence, p.beta, statistics);
  const ClipTerms terms = make_clip_terms(normalised(statistics), p.divergence, p.beta, p.entry_clip);
  const Clip clip = clip_of(p.divergence);
  float student_buffer[kBlock], teacher_buffer[kBlock];
  int32_t columns[kBlock];
  bool is_clipped = !is_whole;
  for (int64_t j = 0; j < p.columns && !is_clipped; j += kBlock) {
    const int64_t n = p.columns - j < kBlock ? p.columns - j : kBlock;
    const float* s = student.logits(j, n, student_buffer);
    is_clipped = clip.find(s, teacher.logits(j, n, teacher_buffer), n, terms, columns) > 0;
  }
  if (!is_clipped) return;
  for (int64_t j = 0; j < p.columns; j += kBlock) {
    const int64_t n = p.columns - j < kBlock ? p.columns - j : kBlock;
    const float* s = student.logits(j, n, student_buffer);
    clip.add(s, teacher.logits(j, n, teacher_buffer), n, terms, state);
  }
}

void clip_sums(const Problem& p, double* state, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    RowState row;
    memcpy(&row, state + r * kStateColumns, sizeof row);
    clip_sweep(p, Row(p.student, p, r), Row(p.teacher, p, r), false, row);
    memcpy(state + r * kStateColumns, &row, sizeof row);
  }
}
