"""Both sweeps over the vocabulary: GEMMs and sums of rows, no logit leaves the registers.

The first keeps the online statistics; the second runs for the divergences over the mixture m, once
the first has given both normalisers. It also runs, with other sums, over rows in which an entry may
be clipped.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from selfdistill_kernels.backends.triton.clip import clip_sums
from selfdistill_kernels.backends.triton.columns import (
    CLIPPED,
    CURVATURE,
    EXCESS,
    KAPPA_SUM,
    MIXTURE_STATE,
    MOMENT,
    PIVOT_SUM,
    SLOPE_SUM,
    STATE,
    STATISTICS,
    STUDENT_LOGSUM,
    STUDENT_MAX,
    STUDENT_MIXTURE,
    STUDENT_MOMENT,
    STUDENT_SHIFT,
    STUDENT_SUM,
    STUDENT_TARGET,
    TEACHER_LOGSUM,
    TEACHER_MAX,
    TEACHER_MIXTURE,
    TEACHER_MOMENT,
    TEACHER_SHIFT,
    TEACHER_SUM,
    TEACHER_TARGET,
    VALUE_SUM,
)
from selfdistill_kernels.backends.triton.divergence import (
    LOWEST_MAXIMUM,
    mixture_sums,
    moved_student,
    student_sums,
)
from selfdistill_kernels.backends.triton.online import moved_both
from selfdistill_kernels.backends.triton.problem import Problem, Selection
from selfdistill_kernels.backends.triton.tiles import (
    logits_of,
    parts,
    score_tile,
    score_tiles,
    work_item,
)


# Sizes that no address depends on: one compilation serves all of them.
@triton.jit(do_not_specialize=["capacity", "vocabulary", "pieces", "piece_tiles", "group_rows"])
def sweep_kernel(
    student, teacher, head, teacher_head, bias, teacher_bias, targets, tokens, count, partial,
    capacity, vocabulary, size, teacher_size, pieces, piece_tiles, group_rows,
    slope, rest, ceiling,
    DIVERGENCE: tl.constexpr, HAS_TEACHER: tl.constexpr, SHARED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr, HAS_TARGETS: tl.constexpr,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Persistent programs; a work item is a row block and a piece of `piece_tiles` column tiles.

    student [capacity, size], teacher [capacity, teacher_size], head [vocabulary, size],
    targets [N] int64, tokens [capacity] int64 (compact row -> token), count [1] int64.
    Writes partial [pieces, 11, capacity] float32 for rows < count: each element once, by one
    program, so the result does not depend on the order of programs. Saves 2 N V logits.
    """
    WIDTH: tl.constexpr = BLOCK_COLUMNS // PARTS
    rows = tl.load(count).to(tl.int32)
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    tiles = tl.cdiv(vocabulary, BLOCK_COLUMNS)
    for item in range(tl.program_id(0), row_blocks * pieces, tl.num_programs(0)):
        row_block, piece = work_item(item, row_blocks, pieces, group_rows)
        first_row = row_block * BLOCK_ROWS
        row = first_row + tl.arange(0, BLOCK_ROWS)
        inside = row < rows
        if HAS_TARGETS:
            token = tl.load(tokens + row, mask=inside, other=0)
            target = tl.load(targets + token, mask=inside, other=-1).to(tl.int32)

        max_s = tl.full((BLOCK_ROWS,), LOWEST_MAXIMUM, dtype=tl.float32)
        max_t = max_s
        sum_s = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
        sum_t = sum_s
        excess = sum_s
        moment = sum_s
        curvature = sum_s
        moment_s = sum_s
        moment_t = sum_s
        target_s = sum_s
        target_t = sum_s
        first_tile = piece * piece_tiles
        for tile in range(first_tile, tl.minimum(first_tile + piece_tiles, tiles)):
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
            for part in tl.static_range(PARTS):
                columns = first_column + part * WIDTH + tl.arange(0, WIDTH)
                z_s = logits_of(
                    parts_s[part], bias, columns, vocabulary, slope, rest, ceiling, HAS_BIAS,
                    SCALED, CAPPED, MASKED,
                )  # fmt: skip
                new_s = tl.maximum(max_s, tl.max(z_s, 1))
                add_s, add_moment_s = student_sums(z_s, new_s[:, None], 1)
                if HAS_TARGETS:
                    hit = columns[None, :] == target[:, None]
                    target_s += tl.sum(tl.where(hit, z_s, 0.0), 1)
                if HAS_TEACHER:
                    z_t = logits_of(
                        parts_t[part], teacher_bias, columns, vocabulary, slope, rest, ceiling,
                        HAS_TEACHER_BIAS, SCALED, CAPPED, MASKED,
                    )  # fmt: skip
                    new_t = tl.maximum(max_t, tl.max(z_t, 1))
                    add_t, add_moment_t = student_sums(z_t, new_t[:, None], 1)
                    sum_s, sum_t, excess, moment, curvature, moment_s, moment_t = moved_both(
                        z_s, z_t, max_s, max_t, new_s, new_t, sum_s, sum_t, excess, moment,
                        curvature, moment_s, moment_t, DIVERGENCE,
                    )  # fmt: skip
                    if HAS_TARGETS:
                        target_t += tl.sum(tl.where(hit, z_t, 0.0), 1)
                    max_t = new_t
                    sum_t += add_t
                    moment_t += add_moment_t
                else:
                    sum_s, moment_s = moved_student(max_s - new_s, sum_s, moment_s)
                max_s = new_s
                sum_s += add_s
                moment_s += add_moment_s

        to = partial + piece.to(tl.int64) * STATE * capacity + row
        tl.store(to + STUDENT_MAX * capacity, max_s, mask=inside)
        tl.store(to + TEACHER_MAX * capacity, max_t, mask=inside)
        tl.store(to + STUDENT_SUM * capacity, sum_s, mask=inside)
        tl.store(to + TEACHER_SUM * capacity, sum_t, mask=inside)
        tl.store(to + EXCESS * capacity, excess, mask=inside)
        tl.store(to + MOMENT * capacity, moment, mask=inside)
        tl.store(to + CURVATURE * capacity, curvature, mask=inside)
        tl.store(to + STUDENT_MOMENT * capacity, moment_s, mask=inside)
        tl.store(to + TEACHER_MOMENT * capacity, moment_t, mask=inside)
        tl.store(to + STUDENT_TARGET * capacity, target_s, mask=inside)
        tl.store(to + TEACHER_TARGET * capacity, target_t, mask=inside)


def sweep(
    problem: Problem, selection: Selection, student: Tensor, teacher: Tensor | None
) -> Tensor:
    """Partial states [pieces, 11, capacity] of compact rows student [capacity, H] and teacher."""
    tile = problem.configuration("sweep")
    plan = problem.sweep_plan(tile, student, teacher)
    partial = torch.empty(
        (plan.pieces, STATE.value, selection.capacity),
        dtype=torch.float32,
        device=student.device,
    )
    arguments, constants = problem.scores(student, teacher, tile)
    targets = problem.inputs.targets
    problem.launch(
        sweep_kernel,
        plan.programs,
        tile,
        {
            **arguments,
            "targets": targets,
            "tokens": selection.tokens,
            "count": selection.count,
            "partial": partial,
            "pieces": plan.pieces,
            "piece_tiles": plan.piece_tiles,
            "group_rows": plan.group_rows,
        },
        {
            **constants,
            "DIVERGENCE": problem.first_divergence,
            "HAS_TARGETS": targets is not None,
        },
    )
    return partial


# ---- second sweep --------------------------------------------------------------------------------


# Sizes that no address depends on: one compilation serves all of them.
@triton.jit(do_not_specialize=["capacity", "vocabulary", "pieces", "piece_tiles", "group_rows"])
def mixture_kernel(
    student, teacher, head, teacher_head, bias, teacher_bias, tokens, count, statistics, partial,
    capacity, vocabulary, size, teacher_size, pieces, piece_tiles, group_rows,
    slope, rest, ceiling, beta, entry_clip,
    DIVERGENCE: tl.constexpr, HAS_TEACHER: tl.constexpr, SHARED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_TEACHER_BIAS: tl.constexpr,
    SCALED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The walk of sweep_kernel; shapes and invariants as there.

    statistics [N, 10] holds the normalisers. Writes partial [pieces, 4, capacity] float32: sums for
    KL(S||m), KL(T||m), the pivot and kappa. With an entry_clip, of any divergence, clip.clip_sums:
    the values and the slopes that are left, and the number of entries that are clipped.
    """
    WIDTH: tl.constexpr = BLOCK_COLUMNS // PARTS
    rows = tl.load(count).to(tl.int32)
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    tiles = tl.cdiv(vocabulary, BLOCK_COLUMNS)
    for item in range(tl.program_id(0), row_blocks * pieces, tl.num_programs(0)):
        row_block, piece = work_item(item, row_blocks, pieces, group_rows)
        first_row = row_block * BLOCK_ROWS
        row = first_row + tl.arange(0, BLOCK_ROWS)
        inside = row < rows
        token = tl.load(tokens + row, mask=inside, other=0)
        of_row = statistics + token * STATISTICS
        shift_s = tl.load(of_row + STUDENT_SHIFT, mask=inside, other=0.0)[:, None]
        low_s = tl.load(of_row + STUDENT_LOGSUM, mask=inside, other=0.0)[:, None]
        shift_t = tl.load(of_row + TEACHER_SHIFT, mask=inside, other=0.0)[:, None]
        low_t = tl.load(of_row + TEACHER_LOGSUM, mask=inside, other=0.0)[:, None]

        sum_student = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
        sum_teacher = sum_student
        sum_pivot = sum_student
        sum_kappa = sum_student
        sum_value = sum_student
        sum_slope = sum_student
        sum_count = sum_student
        first_tile = piece * piece_tiles
        for tile in range(first_tile, tl.minimum(first_tile + piece_tiles, tiles)):
            first_column = tile * BLOCK_COLUMNS
            score_s, score_t = score_tiles(
                student, teacher, head, teacher_head, first_row, first_column, capacity,
                vocabulary, size, teacher_size, SHARED, BLOCK_ROWS, BLOCK_COLUMNS,
                BLOCK_HIDDEN, DESCRIPTORS, EVEN, PRECISION,
            )  # fmt: skip
            parts_s = parts(score_s, PARTS)
            parts_t = parts(score_t, PARTS)
            for part in tl.static_range(PARTS):
                columns = first_column + part * WIDTH + tl.arange(0, WIDTH)
                z_s = logits_of(
                    parts_s[part], bias, columns, vocabulary, slope, rest, ceiling, HAS_BIAS,
                    SCALED, CAPPED, MASKED,
                )  # fmt: skip
                z_t = logits_of(
                    parts_t[part], teacher_bias, columns, vocabulary, slope, rest, ceiling,
                    HAS_TEACHER_BIAS, SCALED, CAPPED, MASKED,
                )  # fmt: skip
                if entry_clip is None:
                    add_student, add_teacher, add_pivot, add_kappa = mixture_sums(
                        z_s, z_t, shift_s, low_s, shift_t, low_t, beta, DIVERGENCE, 1
                    )
                    sum_student += add_student
                    sum_teacher += add_teacher
                    sum_pivot += add_pivot
                    sum_kappa += add_kappa
                else:
                    add_value, add_slope, add_count = clip_sums(
                        z_s, z_t, shift_s, low_s, shift_t, low_t, beta, entry_clip, DIVERGENCE, 1
                    )
                    sum_value += add_value
                    sum_slope += add_slope
                    sum_count += add_count

        to = partial + piece.to(tl.int64) * MIXTURE_STATE * capacity + row
        if entry_clip is None:
            tl.store(to + STUDENT_MIXTURE * capacity, sum_student, mask=inside)
            tl.store(to + TEACHER_MIXTURE * capacity, sum_teacher, mask=inside)
            tl.store(to + PIVOT_SUM * capacity, sum_pivot, mask=inside)
            tl.store(to + KAPPA_SUM * capacity, sum_kappa, mask=inside)
        else:
            tl.store(to + VALUE_SUM * capacity, sum_value, mask=inside)
            tl.store(to + SLOPE_SUM * capacity, sum_slope, mask=inside)
            tl.store(to + CLIPPED * capacity, sum_count, mask=inside)


def second_sweep(
    problem: Problem,
    selection: Selection,
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
    *,
    of_clipped: bool = False,
) -> Tensor:
    """Partial sums [pieces, 4, capacity] for rows whose normalisers are in statistics [N, 10]: of
    the mixture, or `of_clipped` entries."""
    tile = problem.configuration("mixture")
    plan = problem.sweep_plan(tile, student, teacher)
    partial = torch.empty(
        (plan.pieces, MIXTURE_STATE.value, selection.capacity),
        dtype=torch.float32,
        device=student.device,
    )
    arguments, constants = problem.scores(student, teacher, tile)
    problem.launch(
        mixture_kernel,
        plan.programs,
        tile,
        {
            **arguments,
            "tokens": selection.tokens,
            "count": selection.count,
            "statistics": statistics,
            "partial": partial,
            "pieces": plan.pieces,
            "piece_tiles": plan.piece_tiles,
            "group_rows": plan.group_rows,
            "beta": problem.objective.beta,
            "entry_clip": problem.entry_clip if of_clipped else None,
        },
        {**constants, "DIVERGENCE": problem.divergence},
    )
    return partial
