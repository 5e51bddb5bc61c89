// The block code of the row kernels: one block walks one row of a tile [rows, columns], the student's and the teacher's
// side by side.
//
// Steps of kStep columns: a thread holds kQuads quads of four neighbouring columns of each model, so that a warp reads
// 512 contiguous bytes of float32 with one 16-byte load a lane (8-byte loads for 16-bit logits). A row that does not start
// on such an address, and the last quad of a row, are read element by element; the sums are the same bits either way.
// A row begins at a 64-bit offset of its
// tile; within a row 32 bits are enough (kMostColumns). No atomics: two runs give the same bits.
//
// Bytes and flops an element of a row (one student and one teacher score, float32, no transform), from device memory:
//   first sweep     8 read                     about 45 flop  (forward and reverse KL)
//   second sweep    8 read                     about 95 flop  (the mixture divergences only)
//   gradient        8 read, 4 written          25 flop (forward KL) to 80 flop (mixtures); bfloat16 gradients: 2 written
// Without a teacher 4 are read. 16-bit logits halve all of these. csrc/cuda/README.md has the sums of each kernel.
#pragma once

#include "rows.h"

namespace selfdistill {
namespace cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocks = 3;  // of a multiprocessor, at least: up to 80 registers a thread
constexpr int kQuads = 2;
constexpr int kSums = 7;  // of a sweep, at most
constexpr int kStep = 4 * kQuads * kThreads;
constexpr unsigned kWholeWarp = 0xffffffffu;

struct Shared {
  float student_top[2][kWarps], teacher_top[2][kWarps];
  double sums[kSums][kWarps];
  RowState row;  // written by thread 0
  float statistics[kStatistics];
  GradientTerms terms;
  int target;  // the column, or -1
  float at_target;
  bool has_gradient;
};

// ---- one model's row --------------------------------------------------------------------------------------------------

template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T value[4];
};

template <class T>
__device__ __forceinline__ bool aligned(const T* from) {
  return reinterpret_cast<uintptr_t>(from) % sizeof(Quad<T>) == 0;
}

// Columns j to j + 3 of a row that has `columns`.
template <class T>
__device__ __forceinline__ Quad<T> load_quad(const T* row, bool is_aligned, int j, int columns) {
  if (is_aligned && j + 4 <= columns) return *reinterpret_cast<const Quad<T>*>(row + j);
  Quad<T> quad{};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (j + i < columns) quad.value[i] = row[j + i];
  }
  return quad;
}

template <class T>
__device__ __forceinline__ void store_quad(T* row, bool is_aligned, int j, int columns, const float* values) {
  Quad<T> quad;
#pragma unroll
  for (int i = 0; i < 4; ++i) narrow(values[i], quad.value[i]);
  if (is_aligned && j + 4 <= columns) {
    *reinterpret_cast<Quad<T>*>(row + j) = quad;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (j + i < columns) row[j + i] = quad.value[i];
  }
}

template <class T>
struct Row {
  T* raw;  // nullptr: the model is absent
  const float* bias;
  Transform transform;
  bool raw_aligned, bias_aligned;

  __device__ __forceinline__ Row(const Tile& tile, const Transform& t, int64_t row)
      : raw(tile.data ? static_cast<T*>(tile.data) + row * tile.stride : nullptr),
        bias(tile.bias),
        transform(t),
        raw_aligned(aligned(raw)),
        bias_aligned(aligned(bias)) {}

  // The first column of a thread's quad in the step that begins at `begin`.
  static __device__ __forceinline__ int column(int begin, int quad) {
    return begin + 4 * (quad * kThreads + (int)threadIdx.x);
  }

  __device__ __forceinline__ void load(int begin, int columns, Quad<T> (&quads)[kQuads]) const {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) quads[q] = load_quad(raw, raw_aligned, column(begin, q), columns);
  }

  // None is below kLowest; beyond the end of the row they are as if ruled out.
  __device__ __forceinline__ void logits(const Quad<T> (&quads)[kQuads], int begin, int columns,
                                         float (&z)[4 * kQuads]) const {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int j = column(begin, q);
#pragma unroll
      for (int i = 0; i < 4; ++i) z[4 * q + i] = widen(quads[q].value[i]);
      if (!transform.identity) {
        if (bias) {
          const Quad<float> b = load_quad(bias, bias_aligned, j, columns);
#pragma unroll
          for (int i = 0; i < 4; ++i) z[4 * q + i] += b.value[i];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) z[4 * q + i] = transform_logit(z[4 * q + i], transform);
      }
      if (j + 4 > columns) {
#pragma unroll
        for (int i = 0; i < 4; ++i) z[4 * q + i] = j + i < columns ? z[4 * q + i] : kLowest;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) z[4 * q + i] = at_least(z[4 * q + i], kLowest);
    }
  }

  __device__ __forceinline__ float logit(int column) const {
    float z = widen(raw[column]);
    if (bias) z += bias[column];
    return at_least(transform.identity ? z : transform_logit(z, transform), kLowest);
  }
};

// Logits of a step. The loads of both models are under way before the first is used.
template <bool kTeacher, class T>
__device__ __forceinline__ void load_step(const Row<T>& student, const Row<T>& teacher, int begin, int columns,
                                          float (&s)[4 * kQuads], float (&t)[4 * kQuads]) {
  Quad<T> student_quads[kQuads], teacher_quads[kQuads];
  student.load(begin, columns, student_quads);
  if constexpr (kTeacher) teacher.load(begin, columns, teacher_quads);
  student.logits(student_quads, begin, columns, s);
  if constexpr (kTeacher) teacher.logits(teacher_quads, begin, columns, t);
}

// ---- reductions -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float largest(const float (&z)[4 * kQuads]) {
  float top = kLowestMaximum;
#pragma unroll
  for (int i = 0; i < 4 * kQuads; ++i) top = fmaxf(top, z[i]);
  return top;
}

__device__ __forceinline__ float warp_max(float top) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(kWholeWarp, top, offset));
  return top;
}

__device__ __forceinline__ float block_max(float top, float* of_warps) {
  top = warp_max(top);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = top;
  __syncthreads();
  top = of_warps[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) top = fmaxf(top, of_warps[w]);
  return top;
}

// Sums over the block of N numbers a thread, added up in float64; valid in the first warp.
template <int N>
__device__ __forceinline__ void block_sum(const float* mine, double* total, Shared& shared) {
  static_assert(N <= kSums, "Shared::sums");
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    double sum = mine[i];
#pragma unroll 1
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, offset);
    if (lane == 0) shared.sums[i][warp] = sum;
  }
  __syncthreads();
  if (warp != 0) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    double sum = shared.sums[i][lane % kWarps];
#pragma unroll 1
    for (int offset = kWarps / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, offset);
    total[i] = sum;
  }
}

// ---- sweeps -----------------------------------------------------------------------------------------------------------

// The sums of divergence.h hold around any centre that is not far below the maximum. A thread starts from the maxima of
// the row's first step, the same for the whole block, and moves only when a logit is far above: almost never, so that
// moving (in float64) costs nothing and lanes do not diverge.
constexpr float kSlack = 16.0f;

SELFDISTILL_FN Centre make_centre(float student, float teacher) {
  return {student, teacher, make_log_ratio(student, teacher)};
}

SELFDISTILL_FN void add(FirstSums<float>& into, const FirstSums<float>& from) {
  into.student += from.student;
  into.teacher += from.teacher;
  into.excess += from.excess;
  into.moment += from.moment;
  into.curvature += from.curvature;
  into.student_moment += from.student_moment;
  into.teacher_moment += from.teacher_moment;
}

// The same sums around a higher centre.
template <Divergence kDivergence>
__device__ __forceinline__ void raise_centre(FirstSums<float>& sums, Centre& centre, float student, float teacher) {
  RowState s{};
  s.student_max = centre.student;
  s.teacher_max = centre.teacher;
  s.student_sum = sums.student;
  s.teacher_sum = sums.teacher;
  s.excess = sums.excess;
  s.moment = sums.moment;
  s.curvature = sums.curvature;
  s.student_moment = sums.student_moment;
  s.teacher_moment = sums.teacher_moment;
  raise_maxima(s, student, teacher, kDivergence);
  centre = make_centre((float)s.student_max, (float)s.teacher_max);
  sums = {(float)s.student_sum, (float)s.teacher_sum,     (float)s.excess,        (float)s.moment,
          (float)s.curvature,   (float)s.student_moment, (float)s.teacher_moment};
}

// Sums of a row or of a slab of it; valid in thread 0.
template <bool kTeacher, Divergence kDivergence, class T>
__device__ __forceinline__ void first_sweep(const Row<T>& student, const Row<T>& teacher, int columns,
                                            RowState& state, Shared& shared) {
  Centre centre{};
  FirstSums<float> sums{};
  float exposed = kLowest;
  int begin = 0;
#pragma unroll 1
  while (begin < columns) {
    float s[4 * kQuads], t[4 * kQuads] = {};
    load_step<kTeacher>(student, teacher, begin, columns, s, t);
    const float s_top = largest(s), t_top = kTeacher ? largest(t) : 0.0f;
    if (begin == 0) {
      const float s_centre = block_max(s_top, shared.student_top[0]);
      centre = make_centre(s_centre, kTeacher ? block_max(t_top, shared.teacher_top[0]) : 0.0f);
    } else if (s_top > centre.student + kSlack || t_top > centre.teacher + kSlack) {
      raise_centre<kDivergence>(sums, centre, s_top, t_top);
      continue;  // and read the step again: nothing but the sums stays in registers meanwhile
    }
    FirstSums<float> step{};  // eight elements first: short sums keep their digits
#pragma unroll
    for (int i = 0; i < 4 * kQuads; ++i) {
      first_element<kTeacher, kDivergence>(s[i], t[i], centre, step);
      if constexpr (kDivergence == Divergence::kForwardKL) exposed = s[i] <= kLowest ? fmaxf(exposed, t[i]) : exposed;
      if constexpr (kDivergence == Divergence::kReverseKL) exposed = t[i] <= kLowest ? fmaxf(exposed, s[i]) : exposed;
    }
    add(sums, step);
    begin += kStep;
  }
  const float s_centre = block_max(centre.student, shared.student_top[1]);
  const float t_centre = kTeacher ? block_max(centre.teacher, shared.teacher_top[1]) : 0.0f;
  if (s_centre > centre.student || t_centre > centre.teacher) raise_centre<kDivergence>(sums, centre, s_centre, t_centre);
  if constexpr (kDivergence == Divergence::kForwardKL || kDivergence == Divergence::kReverseKL) {
    exposed = block_max(exposed, shared.student_top[0]);
  }
  const float mine[kSums] = {sums.student, sums.student_moment, sums.teacher,  sums.teacher_moment,
                             sums.excess,  sums.moment,         sums.curvature};
  double total[kSums] = {};
  constexpr int kUsed = !kTeacher                                ? 2
                        : kDivergence == Divergence::kNone       ? 4
                        : kDivergence == Divergence::kForwardKL  ? 7
                        : kDivergence == Divergence::kReverseKL  ? 7
                                                                 : 5;
  block_sum<kUsed>(mine, total, shared);
  if (threadIdx.x != 0) return;
  state = RowState{};
  state.student_max = s_centre;
  state.teacher_max = t_centre;
  state.student_sum = total[0];
  state.student_moment = total[1];
  state.teacher_sum = total[2];
  state.teacher_moment = total[3];
  state.excess = total[4];
  state.moment = total[5];
  state.curvature = total[6];
  state.exposed = exposed;
}

// The sums over the mixture, added to `state` by thread 0. From the end of the row: the L2 cache still
// holds what the first sweep read last.
template <Divergence kDivergence, class T>
__device__ __forceinline__ void second_sweep(const Row<T>& student, const Row<T>& teacher, int columns,
                                             const Normalised& normal, float beta, RowState& state, Shared& shared) {
  SecondSums<float> sums{};
#pragma unroll 1
  for (int begin = (columns - 1) / kStep * kStep; begin >= 0; begin -= kStep) {
    float s[4 * kQuads], t[4 * kQuads];
    load_step<true>(student, teacher, begin, columns, s, t);
    SecondSums<float> step{};
#pragma unroll
    for (int i = 0; i < 4 * kQuads; ++i) second_element<kDivergence>(s[i], t[i], normal, beta, step);
    sums.student += step.student;
    sums.teacher += step.teacher;
    sums.pivot += step.pivot;
    sums.kappa += step.kappa;
  }
  const float mine[4] = {sums.student, sums.teacher, sums.pivot, sums.kappa};
  double total[4];
  block_sum<4>(mine, total, shared);
  if (threadIdx.x == 0) {
    state.student_mixture += total[0];
    state.teacher_mixture += total[1];
    state.pivot += total[2];
    state.kappa += total[3];
  }
}

// ---- states ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ RowState load_state(const double* state, int64_t row) {
  RowState s;
  memcpy(&s, state + row * kStateColumns, sizeof s);
  return s;
}

__device__ __forceinline__ void store_state(double* state, int64_t row, const RowState& s) {
  memcpy(state + row * kStateColumns, &s, sizeof s);
}

// ---- launches ---------------------------------------------------------------------------------------------------------

// A problem as the kernels take it.
struct Call {
  Problem p;
  int columns;
  Transform student, teacher;

  explicit Call(const Problem& problem)
      : p(problem),
        columns((int)p.columns),
        student(make_transform(p.logit_scale, p.softcap, p.temperature, p.student.bias != nullptr)),
        teacher(make_transform(p.logit_scale, p.softcap, p.temperature, p.teacher.bias != nullptr)) {}
};

// f(a value of the elements' type).
template <class F>
auto for_element(Element element, const F& f) {
  switch (element) {
    case Element::kBFloat16:
      return f(BFloat16{});
    case Element::kFloat16:
      return f(Float16{});
    default:
      return f(float{});
  }
}

}  // namespace cuda
}  // namespace selfdistill
