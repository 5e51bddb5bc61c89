// Compaction: the active rows of a tile move to its front, without the host knowing how many they are.
//
// Only rows beyond the last kept place move, each into a hole before it: no source is a destination, so all blocks of
// gather_kernel may run at once. Bytes: twice those of the rows that move.
#include "row.cuh"

namespace selfdistill {
namespace cuda {
namespace {

// One block. order [rows]: the places that the first `count` rows come from; holes [rows]: scratch.
__global__ void __launch_bounds__(kThreads) plan_gather_kernel(const bool* active, int64_t rows, int64_t* order,
                                                               int64_t* holes, int64_t* count) {
  __shared__ int64_t counted[2][kThreads];
  __shared__ int64_t kept;  // active rows among the first `total`
  const int64_t share = (rows + kThreads - 1) / kThreads;
  const int64_t begin = share * threadIdx.x < rows ? share * threadIdx.x : rows;
  const int64_t end = begin + share < rows ? begin + share : rows;
  int64_t own = 0;
#pragma unroll 1
  for (int64_t r = begin; r < end; ++r) own += active[r];
  int buffer = 0;
  counted[0][threadIdx.x] = own;
  __syncthreads();
#pragma unroll 1
  for (int distance = 1; distance < kThreads; distance *= 2, buffer ^= 1) {
    int64_t sum = counted[buffer][threadIdx.x];
    if ((int)threadIdx.x >= distance) sum += counted[buffer][threadIdx.x - distance];
    counted[buffer ^ 1][threadIdx.x] = sum;
    __syncthreads();
  }
  const int64_t total = counted[buffer][kThreads - 1];
  const int64_t before = counted[buffer][threadIdx.x] - own;  // active rows before `begin`
  if (threadIdx.x == 0) {
    *count = total;
    kept = total;  // if all rows are active
  }
  __syncthreads();
  int64_t seen = before;
#pragma unroll 1
  for (int64_t r = begin; r < end; ++r) {
    if (r == total) kept = seen;
    if (r < total && active[r]) order[r] = r;
    if (r < total && !active[r]) holes[r - seen] = r;
    seen += active[r];
  }
  __syncthreads();
  seen = before;
#pragma unroll 1
  for (int64_t r = begin; r < end; ++r) {
    if (r >= total && active[r]) order[holes[seen - kept]] = r;
    seen += active[r];
  }
}

template <class Unit>
__global__ void __launch_bounds__(kThreads) gather_kernel(Unit* tile, int64_t units, int64_t stride,
                                                          const int64_t* order, const int64_t* count) {
  const int64_t row = blockIdx.x;
  if (row >= *count || order[row] == row) return;
  Unit* const to = tile + row * stride;
  const Unit* const from = tile + order[row] * stride;
  for (int64_t i = threadIdx.x; i < units; i += kThreads) to[i] = from[i];
}

template <class Unit>
const char* gather_units(void* tile, int64_t row_bytes, int64_t stride_bytes, const int64_t* order, const int64_t* count,
                         int64_t rows, Stream stream) {
  constexpr int64_t kSize = sizeof(Unit);
  return launch(gather_kernel<Unit>, rows, kThreads, stream, static_cast<Unit*>(tile), row_bytes / kSize,
                stride_bytes / kSize, order, count);
}

}  // namespace

const char* plan_gather(const bool* active, int64_t rows, int64_t* order, int64_t* holes, int64_t* count, Stream stream) {
  return launch(plan_gather_kernel, 1, kThreads, stream, active, rows, order, holes, count);
}

const char* gather(void* tile, int64_t row_bytes, int64_t stride_bytes, const int64_t* order, const int64_t* count,
                   int64_t rows, Stream stream) {
  const int64_t all = (int64_t)(reinterpret_cast<uintptr_t>(tile) | (uintptr_t)row_bytes | (uintptr_t)stride_bytes);
  const auto move = all % 16 == 0  ? gather_units<Quad<float>>
                    : all % 4 == 0 ? gather_units<float>
                    : all % 2 == 0 ? gather_units<uint16_t>
                                   : gather_units<uint8_t>;
  return move(tile, row_bytes, stride_bytes, order, count, rows, stream);
}

}  // namespace cuda
}  // namespace selfdistill
