"""Strategy `one sweep`: rounded gradients where whole rows of logits have no room.

Slabs of the vocabulary outermost, as in recompute.py, but the logits are made once. While a slab is
there, each token keeps the entries of it that a rounding might still let stay (csrc/cpu/
candidates.inl); when the last one has passed, its log-sum-exp decides which of them do. 2 GEMMs and
sparse products instead of 2 + 4 rho. A token whose candidates had no room gets its exact gradient
from the second sweep of recompute.py.

Workspace: the tile [r, c] of each model, its float32 sums for the tokens that get an exact
gradient, and the candidates of all tokens, or of as many as have room together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from selfdistill_kernels.backends.interface import Gradients, LinearInputs, Needs
from selfdistill_kernels.backends.native import memory
from selfdistill_kernels.backends.native.candidates import CandidatePlan, least_priority
from selfdistill_kernels.backends.native.recompute import GradientSweep, Shared, statistics_of
from selfdistill_kernels.backends.native.rounding import Rounder, SparseTile
from selfdistill_kernels.backends.native.rows import RowKernels, Tile
from selfdistill_kernels.backends.tokens import Tokens

# Of some tokens and their statistics [n, 10]: what the gradient shall be made from, statistics
# [n, 10] and the weights [n, 3] of the terms.
Weigh = Callable[[Tokens, Tensor], tuple[Tensor, Tensor]]


def gradients(
    kernels: RowKernels,
    plan: CandidatePlan,
    tokens: Tokens,
    needs: Needs,
    rounder: Rounder,
    weigh: Weigh,
) -> Gradients:
    """Rounded gradients of some tokens, and exact ones of those that have no room."""
    with memory.workspace(plan.elements, kernels.inputs.device) as space:
        made = _Sums(kernels, plan, needs, rounder, space)
        for part in _groups(tokens, plan):
            candidates = Candidates(
                kernels, plan, part, rounder.keys, rounder.relative_error, space
            )
            statistics, weights = weigh(part, candidates.statistics)
            made.add(candidates, statistics, weights)
        return made.finish()


def settled(
    kernels: RowKernels,
    plan: CandidatePlan,
    space: Tensor,
    candidates: Candidates,
    needs: Needs,
    rounder: Rounder,
    statistics: Tensor,
    weights: Tensor,
) -> Gradients:
    """The same from candidates of all tokens in `space`, for statistics [n, 10] and weights
    [n, 3]."""
    made = _Sums(kernels, plan, needs, rounder, space)
    made.add(candidates, statistics, weights)
    return made.finish()


def _groups(tokens: Tokens, plan: CandidatePlan) -> Iterator[Tokens]:
    """Tokens whose candidates lie in the workspace together, about as many each time."""
    count = max(-(-tokens.count // plan.tokens), 1)
    size = max(-(-tokens.count // count), 1)
    for first in range(0, tokens.count, size):
        yield tokens.part(first, min(first + size, tokens.count))


class Candidates:
    """What one sweep keeps of some tokens.

    Args:
        kernels: the problem.
        plan: with room for the tokens.
        tokens: the n tokens.
        keys: [N] int64, what the random numbers of each token follow from.
        relative_error: that dH of a token may have.
        space: memory of plan.elements.

    Attributes:
        tokens: as above.
        statistics: [n, 10].
    """

    def __init__(
        self,
        kernels: RowKernels,
        plan: CandidatePlan,
        tokens: Tokens,
        keys: Tensor,
        relative_error: float,
        space: Tensor,
    ) -> None:
        self.tokens, self._plan = tokens, plan
        size = (tokens.count, plan.parts, plan.capacity)
        rows = space[plan.tiles.elements :][: tokens.count * plan.parts * plan.capacity].view(size)
        counts = rows.new_empty(tokens.count, dtype=torch.int32)
        marks = rows.new_empty((tokens.count, 5))
        self._rows = rows, counts, marks
        of_tokens = tokens.of(keys)
        vocabulary = kernels.inputs.vocabulary
        floor = least_priority(relative_error, vocabulary, plan.capacity)

        def watch(tile: Tile, first: int, last: int, state: Tensor) -> None:
            part = slice(first, last)
            kernels.emit(
                tile,
                state,
                plan.terms,
                of_tokens[part],
                floor,
                rows[part],
                counts[part],
                marks[part],
            )

        buffer = space[: plan.tiles.tile_elements]
        self.statistics = statistics_of(kernels, plan.tiles, tokens, buffer, watch)

    def settle(
        self, kernels: RowKernels, rounder: Rounder, statistics: Tensor, weights: Tensor
    ) -> SparseTile:
        """They become entries, in the same memory."""
        return rounder.settle(
            kernels, self.tokens, self._plan.terms, self._rows, statistics, weights,
            self._plan.slab,
        )  # fmt: skip


class _Sums:
    """The gradients of one group of tokens after the other."""

    def __init__(
        self,
        kernels: RowKernels,
        plan: CandidatePlan,
        needs: Needs,
        rounder: Rounder,
        space: Tensor,
    ) -> None:
        inputs, dtype = kernels.inputs, kernels.inputs.student_hidden.dtype
        assert inputs.weight is not None
        self._kernels, self._inputs, self._plan = kernels, inputs, plan
        self._needs, self._rounder, self._space = needs, rounder, space
        self._hidden = torch.zeros_like(inputs.student_hidden) if needs.hidden else None
        self._weight = self._weight_sum = self._bias = None
        if needs.weight:
            self._weight = self._weight_sum = memory.empty(
                inputs.weight.shape, inputs.device, dtype
            )
            if plan.weight_bytes:
                sums = space[plan.elements - plan.weight_bytes // 4 :]
                self._weight_sum = sums.view(inputs.weight.shape)
        if needs.bias:
            self._bias = torch.zeros(inputs.vocabulary, device=inputs.device)
        self._is_first, self._has_dense = True, False

    def add(self, candidates: Candidates, statistics: Tensor, weights: Tensor) -> None:
        """The gradients of a group, for statistics [n, 10] and weights [n, 3]."""
        rounder = self._rounder
        entries = candidates.settle(self._kernels, rounder, statistics, weights)
        tokens = entries.tokens
        if self._hidden is not None:
            tokens.put(self._hidden, rounder.hidden_gradient(entries).to(self._hidden.dtype))
        is_dense = entries.is_dense
        self._has_dense = bool(is_dense.any())
        if self._has_dense:
            self._add_exact(entries, is_dense, statistics, weights)
        elif self._weight_sum is not None:
            rounder.weight_gradient(
                entries, out=self._weight_sum, add=self._before(self._weight_sum), bias=self._bias
            )
        elif self._bias is not None:
            rounder.bias_gradient(entries, out=self._bias)
        self._is_first = False

    def _before(self, weight: Tensor) -> Tensor | None:
        """The part of dW that earlier groups have made."""
        return None if self._is_first else weight

    def _add_exact(
        self, entries: SparseTile, is_dense: Tensor, statistics: Tensor, weights: Tensor
    ) -> None:
        """The gradients of tokens without room, and the head's of the others with them."""
        inputs, rounder = self._inputs, self._rounder
        weight, bias = self._weight_sum, self._bias

        def begin(start: int, out: Tensor) -> None:
            part = slice(start, start + out.shape[0])
            add = None if weight is None else self._before(weight[part])
            rounder.weight_slab(
                entries, start, out=out, add=add, bias=None if bias is None else bias[part]
            )

        if weight is not None:
            rounder.note_weight(entries)
        elif bias is not None:
            rounder.bias_gradient(entries, out=bias)
        tokens = entries.tokens.take(is_dense.nonzero().squeeze(1))
        sweep = GradientSweep(
            self._kernels, tokens, self._plan.tiles, self._needs, self._space,
            Shared(self._hidden, weight, bias, begin),
        )  # fmt: skip
        sweep.run(
            _whole(statistics, entries.tokens, inputs),
            _whole(weights, entries.tokens, inputs),
            None,
        )

    def finish(self) -> Gradients:
        if self._weight is not None:
            assert self._weight_sum is not None
            if self._is_first:
                self._weight.zero_()
            elif self._weight_sum is not self._weight:
                self._weight.copy_(self._weight_sum)
            self._rounder.finish(self._weight, is_sparse=not self._has_dense)
        dtype = self._inputs.student_hidden.dtype
        return Gradients(
            self._hidden, self._weight, None if self._bias is None else self._bias.to(dtype)
        )


def _whole(rows: Tensor, tokens: Tokens, inputs: LinearInputs) -> Tensor:
    """Rows [n, ...] of some tokens as [N, ...], zeros elsewhere."""
    whole = rows.new_zeros((inputs.student_hidden.shape[0], rows.shape[1]))
    tokens.put(whole, rows)
    return whole
