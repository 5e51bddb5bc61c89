// Every kernel over heap buffers of exactly the size it may touch. Prints a hash of all results.
//
// With -fsanitize=address,undefined an access beyond a buffer, or a 16-byte access where none is allowed, ends the process.
// With several SELFDISTILL_EMULATION_SEED the hash tells whether a result depends on the order of threads.
#include <initializer_list>
#include <random>

#include "../../csrc/cuda/rows.h"

using namespace selfdistill;

namespace {

std::mt19937 generator(0);

template <class T>
struct Buffer {
  explicit Buffer(int64_t size, int64_t shift = 0)
      : bytes((size_t)(size + shift) * sizeof(T)),
        memory(static_cast<char*>(std::calloc(bytes, 1))),
        data((T*)memory + shift) {}
  ~Buffer() { std::free(memory); }
  Buffer(const Buffer&) = delete;
  size_t bytes;
  char* memory;
  T* data;
};

uint64_t hash = 14695981039346656037u;

template <class T>
void add_to_hash(const Buffer<T>& buffer) {
  for (size_t i = 0; i < buffer.bytes; ++i) hash = (hash ^ (unsigned char)buffer.memory[i]) * 1099511628211u;
}

void fill(Buffer<float>& buffer, int64_t size) {
  std::normal_distribution<float> normal(0.0f, 3.0f);
  for (int64_t i = 0; i < size; ++i) buffer.data[i] = normal(generator);
}

void check(const char* error) {
  if (error) emulation::fail(error);
}

void run(int64_t rows, int64_t columns, int64_t padding, int64_t shift, int divergence, Element element) {
  const int64_t stride = columns + padding, size = (rows - 1) * stride + columns;
  Buffer<float> student(size, shift), teacher(size, shift / 2), bias(columns, shift);
  Buffer<int64_t> targets(rows), order(rows), holes(rows), count(1);
  Buffer<float> weight(rows), statistics(rows * kStatistics), terms(rows * 3);
  Buffer<double> state(rows * kStateColumns);
  Buffer<bool> active(rows);
  // 16-bit elements: the front half of the same buffers, which then are too large. Float32 is the sharp test.
  fill(student, size);
  fill(teacher, size);
  fill(bias, columns);
  fill(terms, rows * 3);
  for (int64_t r = 0; r < rows; ++r) {
    targets.data[r] = (r * 977) % columns;
    weight.data[r] = r % 4 == 3 ? 0.0f : 1.0f;
    active.data[r] = r % 3 != 1;
  }
  Problem p;
  p.element = element;
  p.student = {student.data, stride, bias.data};
  p.teacher = {teacher.data, stride, nullptr};
  p.targets = targets.data;
  p.columns = columns;
  p.divergence = (Divergence)divergence;
  p.softcap = 8.0;
  VisitTerms v;
  v.loss_weight = weight.data;
  v.cross_entropy = 0.5;
  v.gate_sign = divergence % 2 ? 0 : -2;
  v.statistics = statistics.data;
  v.active = active.data;
  p.gradient_in_bfloat16 = element == Element::kFloat32 && divergence % 2;
  check(cuda::statistics(p, true, state.data, rows, nullptr));
  check(cuda::statistics(p, false, state.data, rows, nullptr));
  if (needs_mixture(p.divergence)) check(cuda::mixture(p, state.data, rows, nullptr));
  p.entry_clip = divergence ? 0.02 : 0.0;
  if (divergence) check(cuda::clip(p, state.data, rows, nullptr));
  check(cuda::finish(state.data, true, true, p.divergence, 0.5, statistics.data, rows, nullptr));
  check(cuda::gradient(p, statistics.data, terms.data, rows, nullptr));
  p.entry_clip = 0.0;
  check(cuda::gradient(p, statistics.data, terms.data, rows, nullptr));
  check(cuda::visit(p, v, rows, nullptr));
  check(cuda::plan_gather(active.data, rows, order.data, holes.data, count.data, nullptr));
  const int64_t bytes = element == Element::kFloat32 ? 4 : 2;
  check(cuda::gather(student.data, columns * bytes, stride * bytes, order.data, count.data, rows, nullptr));
  add_to_hash(student);
  add_to_hash(teacher);
  add_to_hash(state);
  add_to_hash(statistics);
  add_to_hash(active);
  add_to_hash(count);
}

}  // namespace

int main() {
  for (const int divergence : {0, 1, 2, 3, 4, 5}) {
    for (const int64_t columns : {1, 507, 2049}) {
      for (const int64_t shift : {0, 1}) run(5, columns, divergence, shift, divergence, Element::kFloat32);
      run(3, columns, 3, 0, divergence, Element::kBFloat16);
    }
    run(3, 4100, 0, 0, divergence, Element::kFloat16);
  }
  std::printf("%016llx\n", (unsigned long long)hash);
}
