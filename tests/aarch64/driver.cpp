// Reads problems from a file, visits their rows with the kernels of csrc/cpu/rows.inl, and writes what they leave behind.
// tests/aarch64/test_rows.py writes the one file and reads the other; it also compiles this for each processor.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../../csrc/cpu/vector.h"
// (divergence.h is written in the functions of vector.h)
#include "../../csrc/cpu/rows.h"

using namespace selfdistill;

namespace {

// The head of a problem in the file. float32 arrays follow: both tiles [rows, stride], both biases [columns], the weight
// [rows]; and the targets, int64 [rows].
struct Head {
  int64_t rows, columns, stride;
  int64_t divergence, has_bias, bfloat16;
  int64_t split;  // columns of the first of two slabs
  double scale, softcap, temperature, beta;
  double policy_gradient, cross_entropy, entropy;
};

template <class T>
std::vector<T> read(FILE* file, int64_t count) {
  std::vector<T> values(count);
  if (fread(values.data(), sizeof(T), values.size(), file) != values.size()) {
    fprintf(stderr, "the file of problems ends early\n");
    exit(1);
  }
  return values;
}

template <class T>
void write(FILE* file, const std::vector<T>& values) {
  if (fwrite(values.data(), sizeof(T), values.size(), file) != values.size()) {
    perror("results");
    exit(1);
  }
}

// Columns [begin, end) of a problem.
Problem slab_of(const Problem& whole, int64_t begin, int64_t end) {
  Problem slab = whole;
  slab.columns = end - begin;
  slab.column_offset = begin;
  for (Tile* tile : {&slab.student, &slab.teacher}) {
    tile->data = static_cast<float*>(tile->data) + begin;
    if (tile->bias) tile->bias += begin;
  }
  return slab;
}

// The statistics and the tile with its gradient: once by a visit of whole rows, once by slabs of columns, as where logits
// are computed twice.
void solve(FILE* from, FILE* to, const Head& head) {
  const auto student = read<float>(from, head.rows * head.stride), teacher = read<float>(from, head.rows * head.stride);
  const auto student_bias = read<float>(from, head.columns), teacher_bias = read<float>(from, head.columns);
  const auto weight = read<float>(from, head.rows);
  const auto targets = read<int64_t>(from, head.rows);

  auto student_tile = student, teacher_tile = teacher;
  Problem p;
  p.student = {student_tile.data(), head.stride, head.has_bias ? student_bias.data() : nullptr};
  p.teacher = {teacher_tile.data(), head.stride, head.has_bias ? teacher_bias.data() : nullptr};
  p.targets = targets.data();
  p.columns = head.columns;
  p.logit_scale = head.scale;
  p.softcap = head.softcap;
  p.temperature = head.temperature;
  p.divergence = static_cast<Divergence>(head.divergence);
  p.beta = head.beta;
  p.gradient_in_bfloat16 = head.bfloat16;

  std::vector<float> statistics(head.rows * kStatistics);
  const auto active = std::make_unique<bool[]>(head.rows);
  std::fill_n(active.get(), head.rows, true);
  VisitTerms v;
  v.loss_weight = weight.data();
  v.policy_gradient = head.policy_gradient;
  v.cross_entropy = head.cross_entropy;
  v.entropy = head.entropy;
  v.statistics = statistics.data();
  v.active = active.get();
  isa_default::kernels.visit(p, v, 0, head.rows);
  write(to, statistics);
  write(to, student_tile);

  student_tile = student;
  teacher_tile = teacher;
  std::vector<double> state(head.rows * kStateColumns);
  const Problem slabs[] = {slab_of(p, 0, head.split), slab_of(p, head.split, head.columns)};
  isa_default::kernels.statistics(slabs[0], true, state.data(), 0, head.rows);
  isa_default::kernels.statistics(slabs[1], false, state.data(), 0, head.rows);
  if (needs_mixture(p.divergence)) {
    for (const Problem& slab : slabs) isa_default::kernels.mixture(slab, state.data(), 0, head.rows);
  }
  std::vector<float> term_weights(3 * head.rows);
  for (int64_t r = 0; r < head.rows; ++r) {
    RowState row;
    memcpy(&row, state.data() + r * kStateColumns, sizeof row);
    float* s = statistics.data() + r * kStatistics;
    finish(row, true, true, p.divergence, p.beta, s);
    const double advantage = s[kTeacherLogprob] - s[kStudentLogprob];
    term_weights[3 * r] = weight[r];
    term_weights[3 * r + 1] = (float)(weight[r] * (head.cross_entropy + head.policy_gradient * advantage));
    term_weights[3 * r + 2] = (float)(weight[r] * head.entropy);
  }
  // Each slab's gradient takes the front of its own columns, in bfloat16 too.
  for (const Problem& slab : slabs) {
    isa_default::kernels.gradient(slab, statistics.data(), term_weights.data(), 0, head.rows);
  }
  write(to, statistics);
  write(to, student_tile);
}

}  // namespace

int main(int, char** argv) {
  FILE *from = fopen(argv[1], "rb"), *to = fopen(argv[2], "wb");
  if (!from || !to) {
    perror("driver PROBLEMS RESULTS");
    return 1;
  }
  const int64_t problems = read<int64_t>(from, 1)[0];
  for (int64_t i = 0; i < problems; ++i) solve(from, to, read<Head>(from, 1)[0]);
  return fclose(to) == 0 ? 0 : 1;
}
