"""Second sweep: the divergences over the mixture m, once both normalisers are known."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from selfdistill_kernels.backends.triton.divergence import mixture_sums
from selfdistill_kernels.backends.triton.problem import Problem, Selection
from selfdistill_kernels.backends.triton.tiles import logits_of, parts, score_tiles, work_item

MIXTURE_COLUMNS = 4


# Sizes that no address depends on: one compilation serves all of them.
@triton.jit(do_not_specialize=["capacity", "vocabulary", "pieces", "piece_tiles", "group_rows"])
def mixture_kernel(
    student, teacher, head, teacher_head, bias, teacher_bias, tokens, count, statistics, partial,
    capacity, vocabulary, size, teacher_size, pieces, piece_tiles, group_rows,
    slope, rest, ceiling, alpha,
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
    KL(S||m), KL(T||m), the pivot and kappa.
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
        of_row = statistics + token * 10
        reference_s = tl.load(of_row, mask=inside, other=0.0)[:, None]
        low_s = tl.load(of_row + 1, mask=inside, other=0.0)[:, None]
        reference_t = tl.load(of_row + 2, mask=inside, other=0.0)[:, None]
        low_t = tl.load(of_row + 3, mask=inside, other=0.0)[:, None]

        sum_student = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
        sum_teacher = sum_student
        sum_pivot = sum_student
        sum_kappa = sum_student
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
                    parts_s[part],
                    bias,
                    columns,
                    vocabulary,
                    slope,
                    rest,
                    ceiling,
                    HAS_BIAS,
                    SCALED,
                    CAPPED,
                    MASKED,
                )
                z_t = logits_of(
                    parts_t[part], teacher_bias, columns, vocabulary, slope, rest, ceiling,
                    HAS_TEACHER_BIAS, SCALED, CAPPED, MASKED,
                )  # fmt: skip
                add_student, add_teacher, add_pivot, add_kappa = mixture_sums(
                    z_s, z_t, reference_s, low_s, reference_t, low_t, alpha, DIVERGENCE, 1
                )
                sum_student += add_student
                sum_teacher += add_teacher
                sum_pivot += add_pivot
                sum_kappa += add_kappa

        to = partial + piece.to(tl.int64) * 4 * capacity + row
        tl.store(to, sum_student, mask=inside)
        tl.store(to + 1 * capacity, sum_teacher, mask=inside)
        tl.store(to + 2 * capacity, sum_pivot, mask=inside)
        tl.store(to + 3 * capacity, sum_kappa, mask=inside)


def sweep_mixture(
    problem: Problem,
    selection: Selection,
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
) -> Tensor:
    """Partial sums [pieces, 4, capacity] for rows whose normalisers are in statistics [N, 10]."""
    tile = problem.configuration("mixture")
    plan = problem.sweep_plan(tile, student, teacher)
    partial = torch.empty(
        (plan.pieces, MIXTURE_COLUMNS, selection.capacity),
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
            "alpha": problem.objective.beta,
        },
        {**constants, "DIVERGENCE": problem.divergence},
    )
    return partial
