"""Partial states of the pieces of a vocabulary become the statistics of whole rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from selfdistill_kernels.backends.triton.divergence import (
    LOWEST_MAXIMUM,
    finish_first,
    moved,
)
from selfdistill_kernels.backends.triton.launch import Warps
from selfdistill_kernels.backends.triton.problem import Problem, Selection

BLOCK_ROWS = 2
WARPS = Warps(8)


@triton.jit
def _piece_values(partial, column, capacity, pieces, row, piece, inside, other):
    """Column of all pieces, [BLOCK_ROWS, BLOCK_PIECES] float64."""
    at = (piece[None, :].to(tl.int64) * 11 + column) * capacity + row[:, None]
    return tl.load(partial + at, mask=inside, other=other).to(tl.float64)


# Sizes that no address depends on: one compilation serves all of them.
@triton.jit(do_not_specialize=["capacity", "pieces"])
def merge_kernel(
    partial, tokens, count, statistics, capacity, pieces,
    DIVERGENCE: tl.constexpr, HAS_TEACHER: tl.constexpr, HAS_TARGETS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_PIECES: tl.constexpr,
):  # fmt: skip
    """One program a few rows, all pieces at once, in float64 and in a fixed order.

    partial [pieces, 11, capacity] float32, tokens [capacity], count [1], statistics [N, 10] float32
    (columns 0 to 8 of the tokens that take part are written).
    """
    rows = tl.load(count).to(tl.int32)
    first = tl.program_id(0) * BLOCK_ROWS
    if first >= rows:
        return
    row = first + tl.arange(0, BLOCK_ROWS)
    piece = tl.arange(0, BLOCK_PIECES)
    inside = (row[:, None] < rows) & (piece[None, :] < pieces)

    piece_max_s = _piece_values(partial, 0, capacity, pieces, row, piece, inside, LOWEST_MAXIMUM)
    piece_max_t = _piece_values(partial, 1, capacity, pieces, row, piece, inside, LOWEST_MAXIMUM)
    max_s = tl.max(piece_max_s, 1)
    max_t = tl.max(piece_max_t, 1)
    sum_s, sum_t, excess, moment, curvature, moment_s, moment_t = moved(
        piece_max_s - max_s[:, None],
        piece_max_t - max_t[:, None],
        _piece_values(partial, 2, capacity, pieces, row, piece, inside, 0.0),
        _piece_values(partial, 3, capacity, pieces, row, piece, inside, 0.0),
        _piece_values(partial, 4, capacity, pieces, row, piece, inside, 0.0),
        _piece_values(partial, 5, capacity, pieces, row, piece, inside, 0.0),
        _piece_values(partial, 6, capacity, pieces, row, piece, inside, 0.0),
        _piece_values(partial, 7, capacity, pieces, row, piece, inside, 0.0),
        _piece_values(partial, 8, capacity, pieces, row, piece, inside, 0.0),
        DIVERGENCE,
    )
    target_s = _piece_values(partial, 9, capacity, pieces, row, piece, inside, 0.0)
    target_t = _piece_values(partial, 10, capacity, pieces, row, piece, inside, 0.0)
    token = tl.load(tokens + row, mask=row < rows, other=0)
    finish_first(
        statistics + token * 10, row < rows, max_s, max_t, tl.sum(sum_s, 1), tl.sum(sum_t, 1),
        tl.sum(excess, 1), tl.sum(moment, 1), tl.sum(curvature, 1), tl.sum(moment_s, 1),
        tl.sum(moment_t, 1), tl.sum(target_s, 1), tl.sum(target_t, 1),
        DIVERGENCE, HAS_TEACHER, HAS_TARGETS,
    )  # fmt: skip


def merge(problem: Problem, selection: Selection, partial: Tensor, statistics: Tensor) -> None:
    """Fill statistics [N, 10] of the selected tokens from partial [pieces, 11, capacity]."""
    inputs = problem.inputs
    problem.launch(
        merge_kernel,
        triton.cdiv(selection.capacity, BLOCK_ROWS),
        WARPS,
        {
            "partial": partial,
            "tokens": selection.tokens,
            "count": selection.count,
            "statistics": statistics,
            "capacity": selection.capacity,
            "pieces": partial.shape[0],
        },
        {
            "DIVERGENCE": problem.first_divergence,
            "HAS_TEACHER": inputs.teacher_hidden is not None,
            "HAS_TARGETS": inputs.targets is not None,
            "BLOCK_ROWS": BLOCK_ROWS,
            "BLOCK_PIECES": triton.next_power_of_2(partial.shape[0]),
        },
    )
