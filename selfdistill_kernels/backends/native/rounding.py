"""Gradients of logits that are rounded at random to few entries, and their products.

Whole rows of scores only: a row's threshold follows from all of it. What cannot be rounded, or
would need too many entries, is an exact gradient; that is within every tolerance.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from selfdistill_kernels.backends.interface import LinearInputs
from selfdistill_kernels.backends.lots import centre_of, copies_of, keys_of
from selfdistill_kernels.backends.native.rows import LossTerms, RowKernels, Tile
from selfdistill_kernels.backends.tokens import Tokens
from selfdistill_kernels.tolerance import Rounding, relative_bound

# Columns of the head that an entry's products read and write together: a part of a core's caches.
SLAB = 1024
# Rows that are visited together.
BLOCK = 32
# Rows of dW whose norm is taken together.
NORM_ROWS = 2048
# Of a row's columns, the share of entries from which on library products are faster.
DENSE_SHARE = 1 / 6
# A library product for a few dense rows reads and writes all of dW: up to one row of so many, they
# are multiplied as if they were sparse.
FEW = 32


# Of some rows of a tile: statistics [r, 10] and weights [r, 3] of the terms.
Terms = Callable[[Tile, slice], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Centred:
    """A head [V, H] around a row c: an entry's product takes W_j - c, where that is allowed.

    Attributes:
        weight: [V, H].
        centre: [H] float32, the mean row, or zeros where the rows of a gradient do not sum to 0.
        spread: [V] float32, |W_j - c|^2.
    """

    weight: Tensor
    centre: Tensor
    spread: Tensor

    @classmethod
    def of(cls, inputs: LinearInputs) -> Centred:
        assert inputs.weight is not None
        weight, centre = inputs.weight.detach(), centre_of(inputs)
        return cls(weight, centre, torch.ops.selfdistill.rounding_spread(weight, centre))


@dataclass(frozen=True)
class SparseTile:
    """Rounded gradients of r tokens, in the memory of their scores or of their candidates.

    Attributes:
        tokens: the r tokens.
        scores: [r, V] float32: what `row_round_` left there, or [r, ...]: what `row_settle_` did.
        starts: [r, slabs + 1] int32, where the entries of each slab begin; -1 first in a dense row.
        variance: [r, 2] float32, summed over the elements of dH and over the entries.
        moments: [r, 4] float32 for bounds: the same two of all entries, and the most that the lot
            of one entry moves dH and an entry.
    """

    tokens: Tokens
    scores: Tensor
    starts: Tensor
    variance: Tensor
    moments: Tensor | None
    dense_in_bfloat16: bool
    slab: int = SLAB
    is_whole: bool = True  # else a dense row holds nothing

    @functools.cached_property
    def with_dense(self) -> bool:
        """Whether the products take the dense rows along."""
        return self.is_whole and int((self.starts[:, 0] < 0).sum()) <= self.starts.shape[0] // FEW

    @property
    def is_dense(self) -> Tensor:
        """[r] bool, the rows that are left to library products."""
        return (self.starts[:, 0] < 0) & (not self.with_dense)

    @property
    def operands(self) -> tuple[Tensor, Tensor, int, bool, bool]:
        """What the sparse products take of it."""
        return self.scores, self.starts, self.slab, self.with_dense, self.dense_in_bfloat16


class Rounder:
    """Rounds the gradients of one call.

    Args:
        inputs: the problem; its head is whole.
        rounding: what is allowed, and where the errors go.
    """

    def __init__(self, inputs: LinearInputs, rounding: Rounding) -> None:
        assert inputs.weight is not None
        assert inputs.shard is None
        self._inputs, self._rounding = inputs, rounding
        self.head = Centred.of(inputs)
        # Of all tokens, those without a gradient, too.
        self._keys = keys_of(
            inputs, Tokens(inputs.student_hidden.shape[0]), rounding.tolerance.seed
        )
        self._copies = copies_of(self._keys)
        self._weight_variance = self._squares = 0.0
        # Of all entries, for a bound: the variance of dW, and the most that one lot moves it.
        self._whole_variance = self._step = 0.0

    def round(self, kernels: RowKernels, tile: Tile, terms: Terms) -> SparseTile:
        """The scores of whole rows become rounded gradients."""
        rows, columns = tile.student.shape
        starts = tile.student.new_empty((rows, -(-columns // SLAB) + 1), dtype=torch.int32)
        variance = tile.student.new_empty((rows, 2))
        tolerance = self._rounding.tolerance
        bounds = tolerance.bound_risk is not None
        moments = tile.student.new_empty((rows, 4)) if bounds else None
        keys = tile.tokens.of(self._keys)
        # A few rows at a time, so that they are still in the cache when they are read again.
        for first in range(0, rows, BLOCK):
            some = slice(first, min(first + BLOCK, rows))
            part = Tile(
                tile.tokens.part(some.start, some.stop),
                tile.student[some],
                None if tile.teacher is None else tile.teacher[some],
                0,
            )
            kernels.round(
                part, *terms(part, some),
                self.head.weight, self.head.centre, self.head.spread,
                keys[some], tolerance.relative_error,
                min(int(DENSE_SHARE * columns), columns // 2), SLAB, starts[some],
                variance[some], None if moments is None else moments[some],
            )  # fmt: skip
        narrow = kernels.head.narrow_gradient
        return SparseTile(tile.tokens, tile.student, starts, variance, moments, narrow)

    @property
    def relative_error(self) -> float:
        """What dH of a token may have."""
        return self._rounding.tolerance.relative_error

    @property
    def keys(self) -> Tensor:
        """[N] int64, what the random numbers of each token follow from."""
        return self._keys

    def settle(
        self,
        kernels: RowKernels,
        tokens: Tokens,
        terms: LossTerms,
        candidates: tuple[Tensor, Tensor, Tensor],
        statistics: Tensor,
        term_weights: Tensor,
        slab: int,
    ) -> SparseTile:
        """The candidates [r, ...] of tokens become rounded gradients."""
        memory, vocabulary = candidates[0], self.head.weight.shape[0]
        count, capacity = memory.shape[0], memory.shape[2]
        starts = memory.new_empty((count, -(-vocabulary // slab) + 1), dtype=torch.int32)
        variance = memory.new_empty((count, 2))
        kernels.settle(
            tokens, terms, candidates, statistics, term_weights,
            self.head.weight, self.head.centre, self.head.spread, tokens.of(self._keys),
            self._rounding.tolerance.relative_error, min(int(DENSE_SHARE * vocabulary), capacity),
            slab, starts, variance,
        )  # fmt: skip
        entries = memory.flatten(1)  # of no tokens, too
        return SparseTile(tokens, entries, starts, variance, None, False, slab, is_whole=False)

    def hidden_gradient(self, tile: SparseTile) -> Tensor:
        """Part of dH, [r, H] float32, zeros for rows that are left; notes its error."""
        head = self.head
        made = tile.scores.new_empty((tile.scores.shape[0], head.weight.shape[1]))
        torch.ops.selfdistill.sparse_hidden_gradient_(
            *tile.operands, head.weight, head.centre, made
        )
        sizes, said = torch.linalg.vector_norm(made, dim=1), self._rounding.error
        error = tile.variance[:, 0].sqrt() / sizes
        error.masked_fill_(tile.variance[:, 0] == 0, 0.0)
        tile.tokens.put(said.hidden, error)
        if tile.moments is not None:
            assert said.hidden_bound is not None
            variance, _, step, _ = tile.moments.unbind(1)
            bound = relative_bound(variance, step, sizes, self._rounding.log_risk)
            tile.tokens.put(said.hidden_bound, bound)
        return made

    def weight_gradient(
        self, tile: SparseTile, *, out: Tensor, add: Tensor | None, bias: Tensor | None
    ) -> None:
        """out [V, H] = entries^T hidden (+ add [V, H] float32); bias [V] += their sums."""
        self._squares = self.weight_slab(tile, 0, out=out, add=add, bias=bias)
        self.note_weight(tile)

    def weight_slab(
        self, tile: SparseTile, start: int, *, out: Tensor, add: Tensor | None, bias: Tensor | None
    ) -> float:
        """The same of columns from `start` on; returns the sum of the squares of `out`."""
        hidden = tile.tokens.of(self._inputs.student_hidden).contiguous()
        vocabulary = self.head.weight.shape[0]
        squares: float = torch.ops.selfdistill.sparse_weight_gradient_(
            *tile.operands, hidden, add, out, bias, start, vocabulary
        )
        return squares

    def note_weight(self, tile: SparseTile) -> None:
        """Add to the error of dW what is said of a tile."""
        hidden = tile.tokens.of(self._inputs.student_hidden)
        lengths = torch.linalg.vector_norm(hidden, dim=1, dtype=torch.float32)
        copies = tile.tokens.of(self._copies)
        self._weight_variance += float((tile.variance[:, 1] * copies) @ lengths.square())
        if tile.moments is not None:
            _, whole, _, step = tile.moments.unbind(1)
            self._whole_variance += float((whole * copies) @ lengths.square())
            self._step = max(self._step, float((step * copies * lengths).max()))

    def bias_gradient(self, tile: SparseTile, *, out: Tensor) -> None:
        """out [V] += the sums of the entries, where no dW is made with them."""
        torch.ops.selfdistill.sparse_bias_gradient_(*tile.operands, out)

    def finish(self, weight: Tensor, *, is_sparse: bool) -> None:
        """Note the error of dW [V, H], which only entries have made if `is_sparse`."""
        if not (self._weight_variance or self._whole_variance):
            return
        squares, said = self._squares, self._rounding.error
        if not is_sparse:
            # By parts: torch takes a 16-bit tensor as a whole to float32, or one element at a time.
            parts = weight.split(NORM_ROWS)
            squares = sum(float(torch.linalg.vector_norm(part.float())) ** 2 for part in parts)
        said.weight.fill_((self._weight_variance / squares) ** 0.5 if squares else math.inf)
        if said.weight_bound is not None:
            variance, step, size = torch.tensor([self._whole_variance, self._step, squares**0.5])
            bound = relative_bound(variance, step, size, self._rounding.log_risk)
            said.weight_bound.copy_(bound)
