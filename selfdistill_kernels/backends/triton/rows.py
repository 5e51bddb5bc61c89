"""Statistics and gradient of rows of logits in memory: a `store` tile, or the caller's own."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from selfdistill_kernels.backends.triton.clip import (
    carried,
    clip_sums,
    clipped_gradient_tile,
    finish_clipped,
    largest_part,
    most_of_kl,
    most_of_mixture,
)
from selfdistill_kernels.backends.triton.columns import (
    DIVERGENCE_WEIGHT,
    ENTROPY_WEIGHT,
    PIVOT,
    ROW_DIVERGENCE,
    STATISTICS,
    STUDENT_ENTROPY,
    STUDENT_LOGPROB,
    STUDENT_LOGSUM,
    STUDENT_SHIFT,
    TEACHER_LOGSUM,
    TEACHER_SHIFT,
    TERMS,
    TOKEN_WEIGHT,
)
from selfdistill_kernels.backends.triton.divergence import (
    JSD,
    LOWEST_MAXIMUM,
    REVERSE_KL,
    cap_derivative,
    finish_first,
    finish_mixture,
    gradient_tile,
    kl_of,
    mixture_sums,
    moved_student,
    student_sums,
)
from selfdistill_kernels.backends.triton.launch import Warps
from selfdistill_kernels.backends.triton.online import moved_both
from selfdistill_kernels.backends.triton.problem import Problem, RowTile
from selfdistill_kernels.backends.triton.tiles import logits_of

STATISTICS_BLOCK = 2048
# The bound keeps the assembler from spilling a register or two to fit one block more.
STATISTICS_WARPS = Warps(8, max_registers=255)
GRADIENT_BLOCK = 1024
GRADIENT_WARPS = Warps(8)
# Lanes of eight warps at most. In a smaller block several lanes would hold one column, and where
# the gradient takes the place of the logits one of them might read what another has written.
LEAST_GRADIENT_BLOCK = 512


@triton.jit
def load_logits(
    raw, bias, first, vocabulary, slope, rest, ceiling,
    HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits [1, BLOCK] of a row from entry `first`, as `logits_of` gives them."""
    column = first + tl.arange(0, BLOCK)
    scores = tl.load(raw + column, mask=column < vocabulary, other=0.0).to(tl.float32)
    return logits_of(
        scores[None, :],
        bias,
        column,
        vocabulary,
        slope,
        rest,
        ceiling,
        HAS_BIAS,
        SCALED,
        CAPPED,
        MASKED,
    )


# Sizes that no address depends on: one compilation serves all of them.
@triton.jit(do_not_specialize=["vocabulary"])
def row_statistics_kernel(
    student, teacher, bias, teacher_bias, targets, tokens, statistics,
    vocabulary, stride, slope, rest, ceiling, beta, entry_clip,
    DIVERGENCE: tl.constexpr, FIRST: tl.constexpr, HAS_TEACHER: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr, HAS_TARGETS: tl.constexpr,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row, one reading of it (two for the mixture divergences).

    And one more of a row in which an entry's part of the divergence may exceed `entry_clip`.

    student, teacher [r, vocabulary] raw scores, rows `stride` apart; tokens [r] int64, the token of
    a row, -1 for none. Writes statistics [N, 10] of these tokens. Sums are float32 within a block
    of the row and between blocks, float64 in the finish.
    """
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row)
    if token < 0:
        return
    raw_s = student + row * stride
    raw_t = raw_s
    if HAS_TEACHER:
        raw_t = teacher + row * stride

    max_s = tl.full((1,), LOWEST_MAXIMUM, dtype=tl.float32)
    max_t = max_s
    sum_s = tl.zeros((1,), dtype=tl.float32)
    sum_t = sum_s
    excess = sum_s
    moment = sum_s
    curvature = sum_s
    moment_s = sum_s
    moment_t = sum_s
    largest = sum_s
    for first in range(0, vocabulary, BLOCK):
        z_s = load_logits(
            raw_s, bias, first, vocabulary, slope, rest, ceiling, HAS_BIAS, SCALED, CAPPED,
            MASKED, BLOCK,
        )  # fmt: skip
        new_s = tl.maximum(max_s, tl.max(z_s, 1))
        add_s, add_moment_s = student_sums(z_s, new_s[:, None], 1)
        if HAS_TEACHER:
            z_t = load_logits(
                raw_t, teacher_bias, first, vocabulary, slope, rest, ceiling, HAS_TEACHER_BIAS,
                SCALED, CAPPED, MASKED, BLOCK,
            )  # fmt: skip
            new_t = tl.maximum(max_t, tl.max(z_t, 1))
            add_t, add_moment_t = student_sums(z_t, new_t[:, None], 1)
            if entry_clip is not None and DIVERGENCE < JSD:
                largest = tl.maximum(
                    carried(largest, max_s - new_s, max_t - new_t, DIVERGENCE),
                    largest_part(z_s, z_t, new_s[:, None], new_t[:, None], DIVERGENCE),
                )
            sum_s, sum_t, excess, moment, curvature, moment_s, moment_t = moved_both(
                z_s, z_t, max_s, max_t, new_s, new_t, sum_s, sum_t, excess, moment, curvature,
                moment_s, moment_t, FIRST,
            )  # fmt: skip
            max_t = new_t
            sum_t += add_t
            moment_t += add_moment_t
        else:
            sum_s, moment_s = moved_student(max_s - new_s, sum_s, moment_s)
        max_s = new_s
        sum_s += add_s
        moment_s += add_moment_s

    target_s = tl.zeros((1,), dtype=tl.float32)
    target_t = target_s
    if HAS_TARGETS:
        y = tl.load(targets + token).to(tl.int32)
        at_target = load_logits(
            raw_s, bias, y, vocabulary, slope, rest, ceiling, HAS_BIAS, SCALED, CAPPED, MASKED, 1,
        )  # fmt: skip
        target_s = tl.max(at_target, 1)
        if HAS_TEACHER:
            at_target = load_logits(
                raw_t, teacher_bias, y, vocabulary, slope, rest, ceiling, HAS_TEACHER_BIAS,
                SCALED, CAPPED, MASKED, 1,
            )  # fmt: skip
            target_t = tl.max(at_target, 1)
    to = statistics + token * STATISTICS + tl.zeros((1,), dtype=tl.int32)
    always = tl.full((1,), True, dtype=tl.int1)
    shift_s, low_s, shift_t, low_t = finish_first(
        to, always, max_s.to(tl.float64), max_t.to(tl.float64), sum_s.to(tl.float64),
        sum_t.to(tl.float64), excess.to(tl.float64), moment.to(tl.float64),
        curvature.to(tl.float64), moment_s.to(tl.float64), moment_t.to(tl.float64),
        target_s.to(tl.float64), target_t.to(tl.float64), FIRST, HAS_TEACHER, HAS_TARGETS,
    )  # fmt: skip

    if DIVERGENCE >= JSD:
        student_sum = tl.zeros((1,), dtype=tl.float32)
        teacher_sum = student_sum
        pivot = student_sum
        kappa = student_sum
        for first in range(0, vocabulary, BLOCK):
            z_s = load_logits(
                raw_s, bias, first, vocabulary, slope, rest, ceiling, HAS_BIAS, SCALED, CAPPED,
                MASKED, BLOCK,
            )  # fmt: skip
            z_t = load_logits(
                raw_t, teacher_bias, first, vocabulary, slope, rest, ceiling, HAS_TEACHER_BIAS,
                SCALED, CAPPED, MASKED, BLOCK,
            )  # fmt: skip
            add_student, add_teacher, add_pivot, add_kappa = mixture_sums(
                z_s, z_t, shift_s[:, None], low_s[:, None], shift_t[:, None],
                low_t[:, None], beta, DIVERGENCE, 1,
            )  # fmt: skip
            student_sum += add_student
            teacher_sum += add_teacher
            pivot += add_pivot
            kappa += add_kappa
        divergence, pivot_column = finish_mixture(
            student_sum.to(tl.float64), teacher_sum.to(tl.float64), pivot.to(tl.float64),
            kappa.to(tl.float64), beta, DIVERGENCE,
        )  # fmt: skip
        most = most_of_mixture(divergence, DIVERGENCE)
    elif entry_clip is not None:
        kl = kl_of(
            sum_s.to(tl.float64), sum_t.to(tl.float64), excess.to(tl.float64),
            moment.to(tl.float64), curvature.to(tl.float64), DIVERGENCE,
        )  # fmt: skip
        divergence = kl.to(tl.float32)
        pivot_column = divergence if DIVERGENCE == REVERSE_KL else tl.zeros_like(divergence)
        most = most_of_kl(
            largest.to(tl.float64), sum_s.to(tl.float64), sum_t.to(tl.float64), DIVERGENCE
        ).to(tl.float32)

    if entry_clip is not None:
        value = tl.zeros((1,), dtype=tl.float32)
        own_slope = value
        clipped = value
        stop = tl.where(tl.max(most, 0) > entry_clip, vocabulary, 0)
        for first in range(0, stop, BLOCK):
            z_s = load_logits(
                raw_s, bias, first, vocabulary, slope, rest, ceiling, HAS_BIAS, SCALED, CAPPED,
                MASKED, BLOCK,
            )  # fmt: skip
            z_t = load_logits(
                raw_t, teacher_bias, first, vocabulary, slope, rest, ceiling, HAS_TEACHER_BIAS,
                SCALED, CAPPED, MASKED, BLOCK,
            )  # fmt: skip
            add_value, add_slope, add_clipped = clip_sums(
                z_s, z_t, shift_s[:, None], low_s[:, None], shift_t[:, None], low_t[:, None],
                beta, entry_clip, DIVERGENCE, 1,
            )  # fmt: skip
            value += add_value
            own_slope += add_slope
            clipped += add_clipped
        without_clip, without_clip_pivot = divergence, pivot_column
        divergence, pivot_column = finish_clipped(
            value.to(tl.float64), own_slope.to(tl.float64), clipped.to(tl.float64), entry_clip,
            beta, DIVERGENCE,
        )  # fmt: skip
        divergence = tl.where(clipped > 0.0, divergence, without_clip)
        pivot_column = tl.where(clipped > 0.0, pivot_column, without_clip_pivot)
    if DIVERGENCE >= JSD or entry_clip is not None:
        tl.store(to + ROW_DIVERGENCE, divergence)
        tl.store(to + PIVOT, pivot_column)


def row_statistics(problem: Problem, tile: RowTile, statistics: Tensor) -> None:
    """Fill statistics [N, 10] of the tokens of a tile."""
    block = min(STATISTICS_BLOCK, triton.next_power_of_2(problem.vocabulary))
    problem.launch(
        row_statistics_kernel,
        tile.tokens.numel(),
        STATISTICS_WARPS,
        {**tile.arguments(problem), "statistics": statistics},
        {
            **tile.constants(problem),
            "FIRST": problem.first_divergence,
            "MASKED": problem.vocabulary % block != 0,
            "BLOCK": block,
        },
    )


# ---- gradient ------------------------------------------------------------------------------------


# Sizes that no address depends on: one compilation serves all of them.
@triton.jit(do_not_specialize=["vocabulary"])
def row_gradient_kernel(
    student, teacher, bias, teacher_bias, targets, tokens, statistics, term_weights, loss_scale,
    to, vocabulary, stride, to_stride, slope, rest, ceiling, beta, entry_clip, chain,
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
    weights = term_weights + token * TERMS
    divergence_weight = tl.load(weights + DIVERGENCE_WEIGHT, mask=token >= 0, other=0.0)
    token_weight = tl.load(weights + TOKEN_WEIGHT, mask=token >= 0, other=0.0)
    entropy_weight = tl.load(weights + ENTROPY_WEIGHT, mask=token >= 0, other=0.0)
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
    of_row = statistics + token * STATISTICS
    shift_s = tl.load(of_row + STUDENT_SHIFT)
    low_s = tl.load(of_row + STUDENT_LOGSUM)
    shift_t = tl.load(of_row + TEACHER_SHIFT)
    low_t = tl.load(of_row + TEACHER_LOGSUM)
    logprob = tl.load(of_row + STUDENT_LOGPROB)
    entropy = tl.load(of_row + STUDENT_ENTROPY)
    divergence = tl.load(of_row + ROW_DIVERGENCE)
    pivot = tl.load(of_row + PIVOT)
    target = -1
    if HAS_TARGETS:
        target = tl.load(targets + token).to(tl.int32)
    for first in range(0, vocabulary, BLOCK):
        column = first + tl.arange(0, BLOCK)
        z_s = load_logits(
            raw_s, bias, first, vocabulary, slope, rest, ceiling, HAS_BIAS, SCALED, CAPPED,
            MASKED, BLOCK,
        )  # fmt: skip
        z_t = z_s
        if HAS_TEACHER:
            z_t = load_logits(
                raw_t, teacher_bias, first, vocabulary, slope, rest, ceiling, HAS_TEACHER_BIAS,
                SCALED, CAPPED, MASKED, BLOCK,
            )  # fmt: skip
        if entry_clip is None:
            dz = gradient_tile(
                z_s, z_t, (column == target)[None, :], logprob, shift_s, low_s, shift_t,
                low_t, entropy, divergence, pivot, factor * divergence_weight,
                factor * token_weight, factor * entropy_weight, beta, DIVERGENCE, ENTROPY,
            )  # fmt: skip
        else:
            dz = clipped_gradient_tile(
                z_s, z_t, (column == target)[None, :], logprob, shift_s, low_s, shift_t, low_t,
                entropy, pivot, factor * divergence_weight, factor * token_weight,
                factor * entropy_weight, beta, entry_clip, DIVERGENCE, ENTROPY,
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
    block = min(GRADIENT_BLOCK, triton.next_power_of_2(problem.vocabulary))
    block = max(block, LEAST_GRADIENT_BLOCK)
    problem.launch(
        row_gradient_kernel,
        tile.tokens.numel(),
        GRADIENT_WARPS,
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
