// Vectors of float32, for which csrc/elementary.h gives the functions that csrc/divergence.h is written in.
//
// GCC/Clang vector extensions: the same source becomes AVX-512, AVX2, SSE2 or NEON code, by the flags of the file that
// includes it. Everything has internal linkage and no library template is instantiated here, so that code compiled
// for a newer processor can never be linked into the path of an older one.
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace selfdistill {

#if defined(__AVX512F__)
static constexpr int kLanes = 16;
#elif defined(__AVX2__)
static constexpr int kLanes = 8;
#else
static constexpr int kLanes = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t VectorInt __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VectorBits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VectorHalf __attribute__((vector_size(2 * kLanes)));

#define SELFDISTILL_FN static inline __attribute__((always_inline))

SELFDISTILL_FN Vector load(const float* from) {
  Vector v;
  memcpy(&v, from, sizeof v);
  return v;
}
SELFDISTILL_FN void store(float* to, Vector v) { memcpy(to, &v, sizeof v); }
SELFDISTILL_FN void store(float* to, float v) { *to = v; }

SELFDISTILL_FN VectorBits bits(Vector x) { return (VectorBits)x; }
SELFDISTILL_FN Vector from_bits(VectorBits x) { return (Vector)x; }
SELFDISTILL_FN Vector select(VectorInt condition, Vector yes, Vector no) { return condition ? yes : no; }
// The second where either is a NaN. (One instruction on x86-64, which compilers make two of if left to themselves.)
SELFDISTILL_FN Vector larger(Vector a, Vector b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
SELFDISTILL_FN Vector smaller(Vector a, Vector b) {
#if defined(__AVX512F__)
  return _mm512_maskz_min_ps(0xffff, a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}
SELFDISTILL_FN Vector to_float(VectorBits x) { return __builtin_convertvector((VectorInt)x, Vector); }

}  // namespace selfdistill

#include "../elementary.h"

namespace selfdistill {

SELFDISTILL_FN void store(uint16_t* to, Vector v) {
  const VectorHalf half = __builtin_convertvector(bfloat16_bits<VectorBits>(v), VectorHalf);
  memcpy(to, &half, sizeof half);
}
SELFDISTILL_FN void store(uint16_t* to, float v) { *to = (uint16_t)bfloat16_bits<uint32_t>(v); }
SELFDISTILL_FN Vector load(const uint16_t* bfloat16) {
  VectorHalf half;
  memcpy(&half, bfloat16, sizeof half);
  return from_bits(__builtin_convertvector(half, VectorBits) << 16);
}
SELFDISTILL_FN float widened(uint16_t bfloat16) { return from_bits((uint32_t)bfloat16 << 16); }
SELFDISTILL_FN float widened(float x) { return x; }

// In float64, by halves.
SELFDISTILL_FN double sum_lanes(Vector v) {
  typedef float Half __attribute__((vector_size(2 * kLanes)));
  typedef double WideHalf __attribute__((vector_size(4 * kLanes)));
  Half half[2];
  memcpy(half, &v, sizeof v);
  const WideHalf wide = __builtin_convertvector(half[0], WideHalf) + __builtin_convertvector(half[1], WideHalf);
  double total = 0.0;
  for (int i = 0; i < kLanes / 2; ++i) total += wide[i];
  return total;
}
SELFDISTILL_FN float max_lanes(Vector v) {
  float top = v[0];
  for (int i = 1; i < kLanes; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

}  // namespace selfdistill
