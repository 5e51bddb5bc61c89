"""A step of the online sums of two models, which both kernels of the first sweep take."""

from __future__ import annotations

import triton
import triton.language as tl

from selfdistill_kernels.backends.triton.divergence import NONE, moved, pair_sums


@triton.jit
def moved_both(
    z_s, z_t, max_s, max_t, new_s, new_t, sum_s, sum_t, excess, moment, curvature, moment_s,
    moment_t, DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """`moved` to the maxima new_s and new_t, with what a tile of logits adds to the sums of both.

    z_s, z_t [rows, columns]; all others [rows] float32. What each model adds to its own sums (sum_*
    and moment_*) is left to the caller.
    """
    sum_s, sum_t, excess, moment, curvature, moment_s, moment_t = moved(
        max_s - new_s, max_t - new_t, sum_s, sum_t, excess, moment, curvature, moment_s, moment_t,
        DIVERGENCE,
    )  # fmt: skip
    if DIVERGENCE != NONE:
        add_excess, add_moment, add_curvature = pair_sums(
            z_s, z_t, new_s[:, None], new_t[:, None], DIVERGENCE, 1
        )
        excess += add_excess
        moment += add_moment
        curvature += add_curvature
    return sum_s, sum_t, excess, moment, curvature, moment_s, moment_t
