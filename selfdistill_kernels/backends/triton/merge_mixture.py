"""Partial sums of the second sweep become divergence and pivot of whole rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from selfdistill_kernels.backends.triton.divergence import finish_mixture
from selfdistill_kernels.backends.triton.launch import Warps
from selfdistill_kernels.backends.triton.problem import Problem, Selection

BLOCK_ROWS = 8
WARPS = Warps(4)


@triton.jit
def _total(partial, column, capacity, row, piece, inside):
    """Sum of a column over the pieces, [BLOCK_ROWS] float64."""
    at = (piece[None, :].to(tl.int64) * 4 + column) * capacity + row[:, None]
    return tl.sum(tl.load(partial + at, mask=inside, other=0.0).to(tl.float64), 1)


# Sizes that no address depends on: one compilation serves all of them.
@triton.jit(do_not_specialize=["capacity", "pieces"])
def merge_mixture_kernel(
    partial, tokens, count, statistics, capacity, pieces, alpha,
    DIVERGENCE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_PIECES: tl.constexpr,
):  # fmt: skip
    """partial [pieces, 4, capacity] float32; columns 8 and 9 of statistics [N, 10] are written."""
    rows = tl.load(count).to(tl.int32)
    first = tl.program_id(0) * BLOCK_ROWS
    if first >= rows:
        return
    row = first + tl.arange(0, BLOCK_ROWS)
    piece = tl.arange(0, BLOCK_PIECES)
    inside = (row[:, None] < rows) & (piece[None, :] < pieces)
    divergence, pivot = finish_mixture(
        _total(partial, 0, capacity, row, piece, inside),
        _total(partial, 1, capacity, row, piece, inside),
        _total(partial, 2, capacity, row, piece, inside),
        _total(partial, 3, capacity, row, piece, inside),
        alpha,
        DIVERGENCE,
    )
    token = tl.load(tokens + row, mask=row < rows, other=0)
    tl.store(statistics + token * 10 + 8, divergence, mask=row < rows)
    tl.store(statistics + token * 10 + 9, pivot, mask=row < rows)


def merge_mixture(
    problem: Problem, selection: Selection, partial: Tensor, statistics: Tensor
) -> None:
    """Fill divergence and pivot of the selected tokens from partial [pieces, 4, capacity]."""
    problem.launch(
        merge_mixture_kernel,
        triton.cdiv(selection.capacity, BLOCK_ROWS),
        WARPS,
        {
            "partial": partial,
            "tokens": selection.tokens,
            "count": selection.count,
            "statistics": statistics,
            "capacity": selection.capacity,
            "pieces": partial.shape[0],
            "alpha": problem.objective.beta,
        },
        {
            "DIVERGENCE": problem.divergence,
            "BLOCK_ROWS": BLOCK_ROWS,
            "BLOCK_PIECES": triton.next_power_of_2(partial.shape[0]),
        },
    )
