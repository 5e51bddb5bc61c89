// The functions of csrc/elementary.h for a GPU's float, the two 16-bit types, and how a kernel is started.
//
// Without nvcc the functions compile for the host too; for the kernels something must then define the names of CUDA and
// selfdistill::cuda::launch (tests/cuda/emulation.h).
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define SELFDISTILL_FN static __host__ __device__ __forceinline__
#else
#define SELFDISTILL_FN static inline __attribute__((always_inline))
#endif

namespace selfdistill {

// 2^x, 0 below the smallest normal number; 2 ulp on the GPU.
SELFDISTILL_FN float power_of_two(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// e^(x - low) for x <= 88 and a small low, 0 below the smallest normal number. The special function unit's power of two
// is cheaper than the polynomial of the CPU; what the rounding of its argument took comes back to first order.
SELFDISTILL_FN float exponential(float x, float low) {
  const float t = x * 0x1.715476p+0f;
  const float rest = fmaf(t, 0x1.05c610p-29f, fmaf(-t, 0x1.62e430p-1f, x)) - low;  // x - t log(2)
  const float y = power_of_two(t);
  return x < -87.33654f ? 0.0f : fmaf(y, rest, y);
}
SELFDISTILL_FN float exponential(float x) { return exponential(x, 0.0f); }

}  // namespace selfdistill

#include "../elementary.h"

namespace selfdistill {

// ---- 16-bit elements --------------------------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

SELFDISTILL_FN float widen(float x) { return x; }
SELFDISTILL_FN float widen(BFloat16 x) { return from_bits((uint32_t)x.bits << 16); }
SELFDISTILL_FN float widen(Float16 x) {
#ifdef __CUDACC__
  return __half2float(__half(__half_raw{x.bits}));
#else
  _Float16 half;
  memcpy(&half, &x, sizeof half);
  return (float)half;
#endif
}

SELFDISTILL_FN void narrow(float x, float& to) { to = x; }
SELFDISTILL_FN void narrow(float x, BFloat16& to) { to.bits = (uint16_t)bfloat16_bits<uint32_t>(x); }
SELFDISTILL_FN void narrow(float x, Float16& to) {
#ifdef __CUDACC__
  to.bits = __half_raw(__float2half_rn(x)).x;
#else
  const _Float16 half = (_Float16)x;
  memcpy(&to, &half, sizeof half);
#endif
}

// ---- launch -----------------------------------------------------------------------------------------------------------

#ifdef __CUDACC__
namespace cuda {

// Returns nullptr, or what went wrong with the launch.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (blocks == 0) return nullptr;
  kernel<<<(unsigned)blocks, threads, 0, stream>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
#endif

}  // namespace selfdistill
