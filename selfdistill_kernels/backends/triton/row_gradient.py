"""Gradient of rows of logits that exist already; in place where the dtypes agree."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from selfdistill_kernels.backends.triton.divergence import cap_derivative, gradient_tile
from selfdistill_kernels.backends.triton.launch import Warps
from selfdistill_kernels.backends.triton.problem import Problem, RowTile
from selfdistill_kernels.backends.triton.row_statistics import load_logits

BLOCK = 1024
WARPS = Warps(8)


# Sizes that no address depends on: one compilation serves all of them.
@triton.jit(do_not_specialize=["vocabulary"])
def row_gradient_kernel(
    student, teacher, bias, teacher_bias, targets, tokens, statistics, term_weights, loss_scale,
    to, vocabulary, stride, to_stride, slope, rest, ceiling, alpha, chain,
    DIVERGENCE: tl.constexpr, ENTROPY: tl.constexpr, HAS_TEACHER: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr, HAS_TARGETS: tl.constexpr,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row. Rows without a token or a weight are not read and get zeros.

    student, teacher [r, vocabulary] raw scores; to [r, vocabulary], which may be `student` itself:
    a thread writes only what it has read. tokens [r] (-1 for none); statistics [N, 10];
    term_weights [N, 3]; loss_scale [1] or None.
    """
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row)
    raw_s = student + row * stride
    raw_t = raw_s
    if HAS_TEACHER:
        raw_t = teacher + row * stride
    weights = term_weights + token * 3
    divergence_weight = tl.load(weights, mask=token >= 0, other=0.0)
    token_weight = tl.load(weights + 1, mask=token >= 0, other=0.0)
    entropy_weight = tl.load(weights + 2, mask=token >= 0, other=0.0)
    out = to + row * to_stride
    if (divergence_weight == 0.0) & (token_weight == 0.0) & (entropy_weight == 0.0):
        for first in range(0, vocabulary, BLOCK):
            column = first + tl.arange(0, BLOCK)
            zero = tl.zeros((BLOCK,), dtype=to.dtype.element_ty)
            tl.store(out + column, zero, mask=column < vocabulary)
        return
    factor = chain
    if loss_scale is not None:
        factor = chain * tl.load(loss_scale)
    of_row = statistics + token * 10
    reference_s = tl.load(of_row)
    low_s = tl.load(of_row + 1)
    reference_t = tl.load(of_row + 2)
    low_t = tl.load(of_row + 3)
    logprob = tl.load(of_row + 4)
    entropy = tl.load(of_row + 6)
    divergence = tl.load(of_row + 8)
    pivot = tl.load(of_row + 9)
    target = -1
    if HAS_TARGETS:
        target = tl.load(targets + token).to(tl.int32)
    for first in range(0, vocabulary, BLOCK):
        column = first + tl.arange(0, BLOCK)
        z_s = load_logits(
            raw_s,
            bias,
            first,
            vocabulary,
            slope,
            rest,
            ceiling,
            HAS_BIAS,
            SCALED,
            CAPPED,
            MASKED,
            BLOCK,
        )
        z_t = z_s
        if HAS_TEACHER:
            z_t = load_logits(
                raw_t, teacher_bias, first, vocabulary, slope, rest, ceiling, HAS_TEACHER_BIAS,
                SCALED,
                CAPPED, MASKED, BLOCK,
            )  # fmt: skip
        dz = gradient_tile(
            z_s, z_t, (column == target)[None, :], logprob, reference_s, low_s, reference_t,
            low_t, entropy, divergence, pivot, factor * divergence_weight, factor * token_weight,
            factor * entropy_weight, alpha, DIVERGENCE, ENTROPY,
        )  # fmt: skip
        if CAPPED:
            dz *= cap_derivative(z_s, ceiling)
        tl.store(
            out + column[None, :],
            dz.to(to.dtype.element_ty),
            mask=column[None, :] < vocabulary,
        )


def row_gradient(
    problem: Problem,
    tile: RowTile,
    statistics: Tensor,
    term_weights: Tensor,
    loss_scale: Tensor | None,
    to: Tensor,
) -> None:
    """Write the gradient of a tile's rows into to [r, V].

    statistics [N, 10]; term_weights [N, 3] float32; loss_scale [1], a power of two for float16.
    """
    block = min(BLOCK, triton.next_power_of_2(problem.vocabulary))
    problem.launch(
        row_gradient_kernel,
        tile.tokens.numel(),
        WARPS,
        {
            **tile.arguments(problem),
            "statistics": statistics,
            "term_weights": term_weights,
            "loss_scale": loss_scale,
            "to": to,
            "to_stride": to.stride(0),
            "chain": problem.chain,
        },
        {
            **tile.constants(problem),
            "ENTROPY": problem.objective.entropy != 0.0,
            "MASKED": problem.vocabulary % block != 0,
            "BLOCK": block,
        },
    )
