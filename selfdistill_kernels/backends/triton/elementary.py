"""Elementary functions for Triton; the twin of csrc/elementary.h."""

from __future__ import annotations

import triton
import triton.language as tl

# Below this |x|, series in x replace differences of exponentials.
NEAR = tl.constexpr(0.34)


@triton.jit
def exponential_tail(x):
    """(e^x - 1 - x) / x^2 for |x| < NEAR, relative error 1.3e-7."""
    h = tl.fma(x, 0.0013901296770200133, 0.008363170549273491)
    h = tl.fma(h, x, 0.04166685417294502)
    h = tl.fma(h, x, 0.16666577756404877)
    return tl.fma(h, x, 0.5)


@triton.jit
def expm1_rest(x):
    """expm1(x) - x for |x| < NEAR."""
    if x.dtype == tl.float64:
        e = tl.exp(x)
        log_e = tl.log(e)
        expm1 = tl.where(e == 1.0, x, (e - 1.0) * (x / tl.where(e == 1.0, 1.0, log_e)))
        return expm1 - x
    else:
        return x * x * exponential_tail(x)


@triton.jit
def log1p(x):
    """log(1 + x) for |x| < 0.5, float64."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def logarithm_deficit(x):
    """x - log(1 + x) for sqrt(1/2) - 1 <= x <= sqrt(2) - 1, relative error 1e-7."""
    g = tl.fma(x, 0.07778051495552063, -0.12777352333068848)
    g = tl.fma(g, x, 0.13114041090011597)
    g = tl.fma(g, x, -0.14196144044399261)
    g = tl.fma(g, x, 0.1662709265947342)
    g = tl.fma(g, x, -0.20001636445522308)
    g = tl.fma(g, x, 0.2500077784061432)
    g = tl.fma(g, x, -0.33333325386047363)
    g = tl.fma(g, x, 0.4999999701976776)
    return x * x * g


@triton.jit
def hyperbolic_tangent(x):
    size = tl.abs(x)
    u = x * x
    t = tl.fma(u, -0.005704986862838268, 0.0206390880048275)
    t = tl.fma(t, u, -0.05373971536755562)
    t = tl.fma(t, u, 0.13331441581249237)
    t = tl.fma(t, u, -0.3333328068256378)
    small = tl.fma(x, u * t, x)
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(size, 10.0)) + 1.0)
    return tl.where(size < 0.625, small, tl.where(x < 0.0, -large, large))
