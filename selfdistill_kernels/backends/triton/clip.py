"""A divergence whose entries are clipped one by one, sum over v of min(f_v, clip).

The twin of csrc/clip.h. Which entries are clipped depends on both normalisers, so that their sums
take a look of their own at the logits, in rows only whose largest f_v may exceed the clip. These
sums take the place of the divergence and its pivot.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from selfdistill_kernels.backends.triton.divergence import (
    FORWARD_KL,
    INFINITY,
    JSD,
    LOWEST,
    NONE,
    REVERSE_KL,
    SKEW_KL,
    gradient_tile,
    log_ratio,
    log_ratio_centres,
    mixture,
    probability,
    skew_pivot,
    weighed_by,
)
from selfdistill_kernels.backends.triton.elementary import NEAR
from selfdistill_kernels.objective import Objective

# What a bound is raised by: float32 sums, and an entry at the clip that rounds to either side.
RELATIVE_MARGIN = tl.constexpr(1.001)
ABSOLUTE_MARGIN = tl.constexpr(1e-5)


# ---- bounds of a row's largest f_v ---------------------------------------------------------------


@triton.jit
def carried(largest, by_s, by_t, DIVERGENCE: tl.constexpr):
    """A bound `largest` of a KL's parts around other maxima; by = old maximum - new maximum <= 0.

    Around the maxima a part is e_t x (forward) or -e_s x (reverse), e <= 1. Float32 or float64.
    """
    drift = by_t - by_s  # what x gains
    if DIVERGENCE == FORWARD_KL:
        shrunk = tl.exp(by_t)
    else:
        shrunk = tl.exp(by_s)
        drift = -drift
    return shrunk * weighed_by(shrunk, largest + tl.maximum(drift, 0.0))


@triton.jit
def largest_part(z_s, z_t, max_s, max_t, DIVERGENCE: tl.constexpr):
    """The largest part of a KL in a tile around the maxima, which broadcast against it.

    Made of values of `divergence.pair_sums`, which the compiler makes once.
    """
    centre_s, centre_t, rest = log_ratio_centres(max_s, 0.0, max_t, 0.0)
    x = log_ratio(z_s, z_t, centre_s, centre_t, rest)
    if DIVERGENCE == FORWARD_KL:
        e = tl.exp(z_t - max_t)
        part = tl.where((z_s <= LOWEST) & (e > 0.0), INFINITY, e * x)
    else:
        e = tl.exp(z_s - max_s)
        part = -tl.where((z_t <= LOWEST) & (e > 0.0), -INFINITY, e * x)
    return tl.max(part, 1)


@triton.jit
def most_of_kl(largest, sum_s, sum_t, DIVERGENCE: tl.constexpr):
    """From the bound around the maxima to one of the row's largest f_v; float64."""
    log_sums = tl.log(sum_t) - tl.log(sum_s)
    if DIVERGENCE == FORWARD_KL:
        most = (largest + tl.maximum(-log_sums, 0.0)) / sum_t
    else:
        most = (largest + tl.maximum(log_sums, 0.0)) / sum_s
    return most * RELATIVE_MARGIN + ABSOLUTE_MARGIN


@triton.jit
def most_of_mixture(divergence, DIVERGENCE: tl.constexpr):
    """A bound of the largest f_v from a finished divergence over the mixture: `may_be_clipped`."""
    most = divergence
    if DIVERGENCE != JSD:
        most += tl.sqrt(tl.maximum(0.5 * divergence, 0.0) + ABSOLUTE_MARGIN)
    return most * RELATIVE_MARGIN + ABSOLUTE_MARGIN


def may_be_clipped(divergence: Tensor, objective: Objective) -> Tensor:
    """[N] bool, False only where a divergence [N] tells that no part of it exceeds the clip.

    The parts of the JSD are not negative. Those of the others, p log(p/q), may be: by
    p log(p/q) >= p - q the negative ones add up to no less than -sum max(q - p, 0), and that is no
    less than -sqrt(divergence / 2) (Pinsker).
    """
    most = divergence
    if objective.kernel_divergence != "jsd":
        half = (0.5 * divergence).clamp(min=0.0)
        most = divergence + torch.sqrt(half + ABSOLUTE_MARGIN.value)
    return most * RELATIVE_MARGIN.value + ABSOLUTE_MARGIN.value > (objective.entry_clip or 0.0)


# ---- the sums of a row in which an entry is clipped ----------------------------------------------


@triton.jit
def entry_of(
    z_s, z_t, shift_s, low_s, shift_t, low_t, beta, DIVERGENCE: tl.constexpr
):  # fmt: skip
    """f_v, what an entry adds to the divergence, and d f_v / d log p_s(v). Twin: entry_of."""
    centre_s, centre_t, rest = log_ratio_centres(shift_s, low_s, shift_t, low_t)
    x = log_ratio(z_s, z_t, centre_s, centre_t, rest)
    p_s = probability(z_s, shift_s, low_s)
    p_t = probability(z_t, shift_t, low_t)
    if DIVERGENCE == FORWARD_KL:
        value = tl.where((z_s <= LOWEST) & (p_t > 0.0), INFINITY, p_t * x)
        slope = -p_t
    elif DIVERGENCE == REVERSE_KL:
        value = tl.where((z_t <= LOWEST) & (p_s > 0.0), INFINITY, -(p_s * x))
        slope = p_s * (1.0 - x)
    else:
        share = 1.0 - beta
        log_s, log_t, share_s, share_t, deficit_s, deficit_t = mixture(x, beta)
        near = tl.abs(x) < NEAR
        # beta (m - p_t) + (1 - beta) (m - p_s) = 0: of log(m/p) only deficits count in the JSD.
        if DIVERGENCE == JSD:
            student = tl.where(near, p_s * deficit_s, -(p_s * log_s))
            teacher = tl.where(near, p_t * deficit_t, -(p_t * log_t))
            value = beta * teacher + share * student
            slope = -share * (p_s * log_s)
        elif DIVERGENCE == SKEW_KL:
            value = -(p_t * log_t)
            slope = -share * (p_s * tl.where(near, 1.0 - share_t, -share_t))
        else:
            value = -(p_s * log_s)
            slope = p_s * ((beta + share * share_s) - log_s)
    return value, slope


@triton.jit
def clip_sums(
    z_s, z_t, shift_s, low_s, shift_t, low_t, beta, entry_clip, DIVERGENCE: tl.constexpr,
    AXIS: tl.constexpr,
):  # fmt: skip
    """Value and slope summed over the entries of a tile that are not clipped, and how many are.

    Twin: clip_element.
    """
    value, slope = entry_of(z_s, z_t, shift_s, low_s, shift_t, low_t, beta, DIVERGENCE)
    clipped = value > entry_clip
    return (
        tl.sum(tl.where(clipped, 0.0, value), AXIS),
        tl.sum(tl.where(clipped, 0.0, slope), AXIS),
        tl.sum(tl.where(clipped, 1.0, 0.0), AXIS),
    )


@triton.jit
def finish_clipped(value, slope, count, entry_clip, beta, DIVERGENCE: tl.constexpr):
    """Divergence and pivot, float32, of a row in which an entry is clipped; the sums are float64.

    With this pivot `gradient_tile` gives the elements of the entries that are not clipped.

    Twin: finish_clipped.
    """
    if DIVERGENCE == FORWARD_KL:
        pivot = (1.0 + slope).to(tl.float32)
    elif DIVERGENCE == REVERSE_KL:
        pivot = (slope - 1.0).to(tl.float32)
    elif DIVERGENCE == JSD:
        pivot = (slope / (1.0 - beta)).to(tl.float32)
    elif DIVERGENCE == SKEW_KL:
        kappa = -slope / (1.0 - beta)
        pivot = skew_pivot(kappa - 1.0, kappa)
    else:
        pivot = (slope - beta).to(tl.float32)
    return (value + count * entry_clip).to(tl.float32), pivot


# ---- gradient ------------------------------------------------------------------------------------


@triton.jit
def slope_of_pivot(pivot, beta, DIVERGENCE: tl.constexpr):
    """The sum of the slopes again. Twin: slope_of_pivot."""
    if DIVERGENCE == FORWARD_KL:
        slope = pivot - 1.0
    elif DIVERGENCE == REVERSE_KL:
        slope = pivot + 1.0
    elif DIVERGENCE == JSD:
        slope = (1.0 - beta) * pivot
    elif DIVERGENCE == SKEW_KL:
        slope = (beta - 1.0) * tl.where(pivot > 0.0, pivot, 1.0 + pivot)
    else:
        slope = pivot + beta
    return slope


@triton.jit
def clipped_gradient_tile(
    z_s, z_t, is_target, logprob, shift_s, low_s, shift_t, low_t, entropy, pivot,
    divergence_weight, token_weight, entropy_weight, beta, entry_clip,
    DIVERGENCE: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """`divergence.gradient_tile` where entries are clipped.

    A clipped entry has no slope of its own: of the divergence only what p_s has of the others'.
    Where none of a row is clipped the bits are those of `gradient_tile`: there the pivot is 0 for
    the forward KL and the divergence for the reverse one. Twin: clipped_gradient.
    """
    gradient = gradient_tile(
        z_s, z_t, is_target, logprob, shift_s, low_s, shift_t, low_t, entropy, pivot, pivot,
        divergence_weight, token_weight, entropy_weight, beta, DIVERGENCE, ENTROPY,
    )  # fmt: skip
    p_s = probability(z_s, shift_s, low_s)
    if DIVERGENCE == FORWARD_KL:
        gradient -= divergence_weight * (p_s * pivot)
    at_clipped = gradient_tile(
        z_s, z_s, is_target, logprob, shift_s, low_s, shift_t, low_t, entropy, pivot, pivot,
        divergence_weight, token_weight, entropy_weight, beta, NONE, ENTROPY,
    )  # fmt: skip
    at_clipped -= divergence_weight * (p_s * slope_of_pivot(pivot, beta, DIVERGENCE))
    value, _ = entry_of(z_s, z_t, shift_s, low_s, shift_t, low_t, beta, DIVERGENCE)
    return tl.where(value > entry_clip, at_clipped, gradient)
