"""Partial states of the pieces of a vocabulary become the statistics of whole rows: both sweeps."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from selfdistill_kernels.backends.triton.clip import finish_clipped
from selfdistill_kernels.backends.triton.columns import (
    CLIPPED,
    CURVATURE,
    EXCESS,
    KAPPA_SUM,
    MIXTURE_STATE,
    MOMENT,
    PIVOT,
    PIVOT_SUM,
    ROW_DIVERGENCE,
    SLOPE_SUM,
    STATE,
    STATISTICS,
    STUDENT_MAX,
    STUDENT_MIXTURE,
    STUDENT_MOMENT,
    STUDENT_SUM,
    STUDENT_TARGET,
    TEACHER_MAX,
    TEACHER_MIXTURE,
    TEACHER_MOMENT,
    TEACHER_SUM,
    TEACHER_TARGET,
    VALUE_SUM,
)
from selfdistill_kernels.backends.triton.divergence import (
    LOWEST_MAXIMUM,
    finish_first,
    finish_mixture,
    moved,
)
from selfdistill_kernels.backends.triton.launch import Warps
from selfdistill_kernels.backends.triton.problem import Problem, Selection

BLOCK_ROWS = 2
WARPS = Warps(8)
MIXTURE_BLOCK_ROWS = 8
MIXTURE_WARPS = Warps(4)


@triton.jit
def _piece_values(partial, column, capacity, pieces, row, piece, inside, other):
    """Column of all pieces, [BLOCK_ROWS, BLOCK_PIECES] float64."""
    at = (piece[None, :].to(tl.int64) * STATE + column) * capacity + row[:, None]
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

    piece_max_s = _piece_values(
        partial, STUDENT_MAX, capacity, pieces, row, piece, inside, LOWEST_MAXIMUM
    )
    piece_max_t = _piece_values(
        partial, TEACHER_MAX, capacity, pieces, row, piece, inside, LOWEST_MAXIMUM
    )
    max_s = tl.max(piece_max_s, 1)
    max_t = tl.max(piece_max_t, 1)
    sum_s, sum_t, excess, moment, curvature, moment_s, moment_t = moved(
        piece_max_s - max_s[:, None],
        piece_max_t - max_t[:, None],
        _piece_values(partial, STUDENT_SUM, capacity, pieces, row, piece, inside, 0.0),
        _piece_values(partial, TEACHER_SUM, capacity, pieces, row, piece, inside, 0.0),
        _piece_values(partial, EXCESS, capacity, pieces, row, piece, inside, 0.0),
        _piece_values(partial, MOMENT, capacity, pieces, row, piece, inside, 0.0),
        _piece_values(partial, CURVATURE, capacity, pieces, row, piece, inside, 0.0),
        _piece_values(partial, STUDENT_MOMENT, capacity, pieces, row, piece, inside, 0.0),
        _piece_values(partial, TEACHER_MOMENT, capacity, pieces, row, piece, inside, 0.0),
        DIVERGENCE,
    )
    target_s = _piece_values(partial, STUDENT_TARGET, capacity, pieces, row, piece, inside, 0.0)
    target_t = _piece_values(partial, TEACHER_TARGET, capacity, pieces, row, piece, inside, 0.0)
    token = tl.load(tokens + row, mask=row < rows, other=0)
    finish_first(
        statistics + token * STATISTICS, row < rows, max_s, max_t, tl.sum(sum_s, 1),
        tl.sum(sum_t, 1), tl.sum(excess, 1), tl.sum(moment, 1), tl.sum(curvature, 1),
        tl.sum(moment_s, 1), tl.sum(moment_t, 1), tl.sum(target_s, 1), tl.sum(target_t, 1),
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


# ---- second sweep --------------------------------------------------------------------------------


@triton.jit
def _total(partial, column, capacity, row, piece, inside):
    """Sum of a column over the pieces, [BLOCK_ROWS] float64."""
    at = (piece[None, :].to(tl.int64) * MIXTURE_STATE + column) * capacity + row[:, None]
    return tl.sum(tl.load(partial + at, mask=inside, other=0.0).to(tl.float64), 1)


# Sizes that no address depends on: one compilation serves all of them.
@triton.jit(do_not_specialize=["capacity", "pieces"])
def merge_mixture_kernel(
    partial, tokens, count, statistics, capacity, pieces, beta, entry_clip,
    DIVERGENCE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_PIECES: tl.constexpr,
):  # fmt: skip
    """partial [pieces, 4, capacity] float32; columns 8 and 9 of statistics [N, 10] are written.

    With an entry_clip the sums are those of clip.clip_sums, and only rows with a clipped entry are
    written.
    """
    rows = tl.load(count).to(tl.int32)
    first = tl.program_id(0) * BLOCK_ROWS
    if first >= rows:
        return
    row = first + tl.arange(0, BLOCK_ROWS)
    piece = tl.arange(0, BLOCK_PIECES)
    inside = (row[:, None] < rows) & (piece[None, :] < pieces)
    if entry_clip is None:
        divergence, pivot = finish_mixture(
            _total(partial, STUDENT_MIXTURE, capacity, row, piece, inside),
            _total(partial, TEACHER_MIXTURE, capacity, row, piece, inside),
            _total(partial, PIVOT_SUM, capacity, row, piece, inside),
            _total(partial, KAPPA_SUM, capacity, row, piece, inside),
            beta,
            DIVERGENCE,
        )
    else:
        clipped = _total(partial, CLIPPED, capacity, row, piece, inside)
        divergence, pivot = finish_clipped(
            _total(partial, VALUE_SUM, capacity, row, piece, inside),
            _total(partial, SLOPE_SUM, capacity, row, piece, inside),
            clipped,
            entry_clip,
            beta,
            DIVERGENCE,
        )
    token = tl.load(tokens + row, mask=row < rows, other=0)
    finished = row < rows
    if entry_clip is not None:
        finished = finished & (clipped > 0.0)
    tl.store(statistics + token * STATISTICS + ROW_DIVERGENCE, divergence, mask=finished)
    tl.store(statistics + token * STATISTICS + PIVOT, pivot, mask=finished)


def merge_second(
    problem: Problem,
    selection: Selection,
    partial: Tensor,
    statistics: Tensor,
    *,
    of_clipped: bool = False,
) -> None:
    """Fill divergence and pivot of the selected tokens from partial [pieces, 4, capacity] of
    `sweep.second_sweep`."""
    problem.launch(
        merge_mixture_kernel,
        triton.cdiv(selection.capacity, MIXTURE_BLOCK_ROWS),
        MIXTURE_WARPS,
        {
            "partial": partial,
            "tokens": selection.tokens,
            "count": selection.count,
            "statistics": statistics,
            "capacity": selection.capacity,
            "pieces": partial.shape[0],
            "beta": problem.objective.beta,
            "entry_clip": problem.entry_clip if of_clipped else None,
        },
        {
            "DIVERGENCE": problem.divergence,
            "BLOCK_ROWS": MIXTURE_BLOCK_ROWS,
            "BLOCK_PIECES": triton.next_power_of_2(partial.shape[0]),
        },
    )
