"""Gradient of the logits of one slab of the vocabulary, for active rows only."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from selfdistill_kernels.backends.triton.clip import clipped_gradient_tile
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
from selfdistill_kernels.backends.triton.divergence import cap_derivative, gradient_tile
from selfdistill_kernels.backends.triton.problem import Problem, Selection
from selfdistill_kernels.backends.triton.tiles import (
    logits_of,
    parts,
    score_tile,
    score_tiles,
    work_item,
)


# Sizes that no address depends on: one compilation serves all of them.
@triton.jit(do_not_specialize=["capacity", "vocabulary", "start", "group_rows"])
def gradient_kernel(
    student, teacher, head, teacher_head, bias, teacher_bias, targets, tokens, count, statistics,
    term_weights, loss_scale, to,
    capacity, vocabulary, size, teacher_size, start, width, group_rows,
    slope, rest, ceiling, beta, entry_clip, chain,
    DIVERGENCE: tl.constexpr, ENTROPY: tl.constexpr, HAS_TEACHER: tl.constexpr,
    SHARED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr,
    HAS_TARGETS: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Persistent programs; a work item is one tile of dz.

    student [capacity, size] and teacher: compact active rows; head [vocabulary, size]: the slab,
    which begins at entry `start`; statistics [N, 10]; term_weights [N, 3]; loss_scale [1] or None.
    Writes to [capacity, width] in the GEMM's dtype: gradients for rows < count, zeros in the rest
    of their last block. Each element once, by one program. Saves N V logits and gradients.
    """
    WIDTH: tl.constexpr = BLOCK_COLUMNS // PARTS
    rows = tl.load(count).to(tl.int32)
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    tiles = tl.cdiv(vocabulary, BLOCK_COLUMNS)
    for item in range(tl.program_id(0), row_blocks * tiles, tl.num_programs(0)):
        row_block, tile = work_item(item, row_blocks, tiles, group_rows)
        first_row = row_block * BLOCK_ROWS
        first_column = tile * BLOCK_COLUMNS
        if HAS_TEACHER:
            score_s, score_t = score_tiles(
                student, teacher, head, teacher_head, first_row, first_column, capacity,
                vocabulary, size, teacher_size, SHARED, BLOCK_ROWS, BLOCK_COLUMNS,
                BLOCK_HIDDEN, DESCRIPTORS, EVEN, PRECISION,
            )  # fmt: skip
        else:
            score_s = score_tile(
                student, head, first_row, first_column, capacity, vocabulary, size,
                BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_HIDDEN, DESCRIPTORS, EVEN, PRECISION,
            )  # fmt: skip
            score_t = score_s
        parts_s = parts(score_s, PARTS)
        parts_t = parts(score_t, PARTS)

        row = first_row + tl.arange(0, BLOCK_ROWS)
        inside = row < rows
        token = tl.load(tokens + row, mask=inside, other=0)
        target = tl.full((BLOCK_ROWS,), -1, dtype=tl.int32)
        if HAS_TARGETS:
            target = tl.load(targets + token, mask=inside, other=-1).to(tl.int32) - start
        of_row = statistics + token * STATISTICS
        shift_s = tl.load(of_row + STUDENT_SHIFT, mask=inside, other=0.0)[:, None]
        low_s = tl.load(of_row + STUDENT_LOGSUM, mask=inside, other=0.0)[:, None]
        shift_t = tl.load(of_row + TEACHER_SHIFT, mask=inside, other=0.0)[:, None]
        low_t = tl.load(of_row + TEACHER_LOGSUM, mask=inside, other=0.0)[:, None]
        logprob = tl.load(of_row + STUDENT_LOGPROB, mask=inside, other=0.0)[:, None]
        entropy = tl.load(of_row + STUDENT_ENTROPY, mask=inside, other=0.0)[:, None]
        divergence = tl.load(of_row + ROW_DIVERGENCE, mask=inside, other=0.0)[:, None]
        pivot = tl.load(of_row + PIVOT, mask=inside, other=0.0)[:, None]
        factor = chain
        if loss_scale is not None:
            factor = chain * tl.load(loss_scale)
        weights = term_weights + token * TERMS
        divergence_weight = tl.load(weights + DIVERGENCE_WEIGHT, mask=inside, other=0.0)
        divergence_weight = (factor * divergence_weight)[:, None]
        token_weight = tl.load(weights + TOKEN_WEIGHT, mask=inside, other=0.0)
        token_weight = (factor * token_weight)[:, None]
        entropy_weight = tl.load(weights + ENTROPY_WEIGHT, mask=inside, other=0.0)
        entropy_weight = (factor * entropy_weight)[:, None]

        for part in tl.static_range(PARTS):
            column = first_column + part * WIDTH + tl.arange(0, WIDTH)
            z_s = logits_of(
                parts_s[part], bias, column, vocabulary, slope, rest, ceiling, HAS_BIAS, SCALED,
                CAPPED, MASKED,
            )  # fmt: skip
            z_t = z_s
            if HAS_TEACHER:
                z_t = logits_of(
                    parts_t[part], teacher_bias, column, vocabulary, slope, rest, ceiling,
                    HAS_TEACHER_BIAS, SCALED, CAPPED, MASKED,
                )  # fmt: skip
            is_target = column[None, :] == target[:, None]
            if entry_clip is None:
                dz = gradient_tile(
                    z_s, z_t, is_target, logprob, shift_s, low_s, shift_t, low_t, entropy,
                    divergence, pivot, divergence_weight, token_weight, entropy_weight, beta,
                    DIVERGENCE, ENTROPY,
                )  # fmt: skip
            else:
                dz = clipped_gradient_tile(
                    z_s, z_t, is_target, logprob, shift_s, low_s, shift_t, low_t, entropy, pivot,
                    divergence_weight, token_weight, entropy_weight, beta, entry_clip,
                    DIVERGENCE, ENTROPY,
                )  # fmt: skip
            if CAPPED:
                dz *= cap_derivative(z_s, ceiling)
            # Rows that nobody asked for may hold anything: 0 * inf must not occur.
            dz = tl.where(inside[:, None], dz, 0.0).to(to.dtype.element_ty)
            at = to + row[:, None].to(tl.int64) * width + column[None, :]
            tl.store(at, dz, mask=(row[:, None] < capacity) & (column[None, :] < vocabulary))


def slab_gradient(
    problem: Problem,
    selection: Selection,
    student: Tensor,
    teacher: Tensor | None,
    statistics: Tensor,
    term_weights: Tensor,
    loss_scale: Tensor | None,
    start: int,
    stop: int,
    to: Tensor,
) -> None:
    """Write dz of entries [start, stop) into to [capacity, >= stop - start].

    student and teacher: compact rows of the selection; statistics [N, 10]; term_weights [N, 3];
    loss_scale [1], a power of two for float16.
    """
    tile = problem.configuration("gradient")
    inputs = problem.inputs
    arguments, constants = problem.scores(student, teacher, tile, start, stop)
    plan = problem.sweep_plan(tile, student, teacher)
    problem.launch(
        gradient_kernel,
        plan.programs,
        tile,
        {
            **arguments,
            "targets": inputs.targets,
            "tokens": selection.tokens,
            "count": selection.count,
            "statistics": statistics,
            "term_weights": term_weights,
            "loss_scale": loss_scale,
            "to": to,
            "start": start,
            "width": to.stride(0),
            "group_rows": plan.group_rows,
            "beta": problem.objective.beta,
            "entry_clip": problem.entry_clip,
            "chain": problem.chain,
        },
        {
            **constants,
            "DIVERGENCE": problem.divergence,
            "ENTROPY": problem.objective.entropy != 0.0,
            "HAS_TARGETS": inputs.targets is not None,
        },
    )
