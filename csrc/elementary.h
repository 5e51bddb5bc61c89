// The elementary functions that csrc/divergence.h is written in, over a "real" R: a float or a vector of floats.
//
// The including file first supplies SELFDISTILL_FN and, for a vector R: bits, from_bits, select, larger, smaller, to_float
// (csrc/cpu/vector.h); for a float they are here. A NaN stays a NaN in every function, and tanh(+-inf) is +-1. Largest
// errors, in units of the last place, are in the comments; tests/selfdistill_kernels/backends/native/test_rows.py measures
// what they add up to.
#pragma once

#include <stdint.h>
#include <string.h>

namespace selfdistill {

SELFDISTILL_FN uint32_t bits(float x) {
  uint32_t b;
  memcpy(&b, &x, sizeof b);
  return b;
}
SELFDISTILL_FN float from_bits(uint32_t b) {
  float x;
  memcpy(&x, &b, sizeof x);
  return x;
}

SELFDISTILL_FN float select(bool condition, float yes, float no) { return condition ? yes : no; }
template <class R>
SELFDISTILL_FN R splat(float value) {
  return R{} + value;
}
template <class R>
SELFDISTILL_FN R absolute(R x) {
  return from_bits(bits(x) & 0x7fffffffu);
}
SELFDISTILL_FN float to_float(uint32_t x) { return (float)(int32_t)x; }
// The second where either is a NaN.
SELFDISTILL_FN float larger(float a, float b) { return a > b ? a : b; }
SELFDISTILL_FN float smaller(float a, float b) { return a < b ? a : b; }
// A NaN stays one.
template <class R>
SELFDISTILL_FN R at_least(R x, float bound) {
  return larger(splat<R>(bound), x);
}
template <class R>
SELFDISTILL_FN R at_most(R x, float bound) {
  return smaller(splat<R>(bound), x);
}

// h(x) = (e^x - 1 - x) / x^2 for |x| <= log(2)/2 (minimax, relative error 1.3e-7): the part of the exponential that no
// rounding of 1 + x can hide. exp, expm1 and the second-order sums of the divergences all come from it.
template <class R>
SELFDISTILL_FN R exponential_tail(R x) {
  R h = x * 0x1.6c6a06p-10f + 0x1.120b5cp-7f;
  h = h * x + 0x1.5555bap-5f;
  h = h * x + 0x1.5554dep-3f;
  return h * x + 0.5f;
}

// e^(x - low) for x <= 88 and a small low, below 1.1 ulp; 0 below the smallest normal number.
template <class R>
SELFDISTILL_FN R exponential(R x, float low) {
  // Adding 1.5 * 2^23 rounds to an integer and leaves it, plus the exponent's bias, in the low bits.
  const float round = 0x1.8p23f + 127.0f;
  const R shifted = x * 0x1.715476p+0f + round;
  const R n = shifted - round;
  const R r = ((x - n * 0x1.62e400p-1f) - n * 0x1.7f7d1cp-20f) - low;  // log(2) in two parts, n times the first is exact
  const R power = from_bits(bits(shifted) << 23);
  const R result = power * ((r * r) * exponential_tail(r) + r) + power;
  return select(x < -87.33654f, splat<R>(0.0f), result);
}
template <class R>
SELFDISTILL_FN R exponential(R x) {
  return exponential(x, 0.0f);
}

// x - log(1 + x) for sqrt(1/2) - 1 <= x <= sqrt(2) - 1, second order in x and without cancellation (relative error 1e-7).
template <class R>
SELFDISTILL_FN R logarithm_deficit(R x) {
  R g = x * 0x1.3e96c8p-4f - 0x1.05ae20p-3f;
  g = g * x + 0x1.0c9358p-3f;
  g = g * x - 0x1.22bcaep-3f;
  g = g * x + 0x1.5485dap-3f;
  g = g * x - 0x1.99a22ep-3f;
  g = g * x + 0x1.00020ap-2f;
  g = g * x - 0x1.555550p-2f;
  g = g * x + 0x1.fffffep-2f;
  return (x * x) * g;
}

// log(x) for positive normal x, below 1 ulp away from 1.
template <class R>
SELFDISTILL_FN R logarithm(R x) {
  const auto offset = bits(x) - 0x3f3504f3u;  // sqrt(1/2): the mantissa lands in [sqrt(1/2), sqrt(2))
  const auto exponent = offset & 0xff800000u;
  const R m = from_bits(bits(x) - exponent) - 1.0f;
  const R k = to_float(exponent) * 0x1p-23f;
  return k * 0x1.62e400p-1f + (m - (logarithm_deficit(m) - k * 0x1.7f7d1cp-20f));
}

// tanh(x), below 1.5 ulp.
template <class R>
SELFDISTILL_FN R hyperbolic_tangent(R x) {
  const R size = absolute(x);
  const R u = x * x;
  R t = u * -0x1.75e1ccp-8f + 0x1.52269cp-6f;
  t = t * u - 0x1.b83c5ap-5f;
  t = t * u + 0x1.110726p-3f;
  t = t * u - 0x1.555532p-2f;
  const R small = x + x * (u * t);
  const R capped = select(size > 10.0f, splat<R>(10.0f), size);  // 1 - tanh(10) is below half an ulp
  const R large = 1.0f - 2.0f / (exponential(2.0f * capped) + 1.0f);
  const R signed_large = from_bits(bits(large) | (bits(x) & 0x80000000u));
  return select(size < 0.625f, small, signed_large);
}

// float32 to bfloat16, to nearest even; a NaN stays one.
template <class B, class R>
SELFDISTILL_FN B bfloat16_bits(R x) {
  const B b = bits(x);
  const B rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  const B nan = (b >> 16) | 0x40u;
  return (x == x) ? rounded : nan;
}

}  // namespace selfdistill
