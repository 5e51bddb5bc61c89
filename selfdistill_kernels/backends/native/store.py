"""Strategy `store`: row tiles that span the vocabulary, each visited once.

Workspace [B, V] float32, the only thing of vocabulary size besides dW:

    rows [0, p)          gradients of logits of active tokens that wait for their GEMMs
    rows [p, p + r)      the student's logits of the next r tokens
    rows [p + r, p + 2r) the teacher's, made by the same GEMM when they share the head

Each visited row becomes statistics and, if its token is active, a gradient in place; active rows
then move up to the waiting ones. So a token that the mask drops costs its forward GEMM only, and
gradient GEMMs always see many rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from selfdistill_kernels.advantage import Gate
from selfdistill_kernels.backends.interface import Gradients, Needs
from selfdistill_kernels.backends.native import memory
from selfdistill_kernels.backends.native.plan import TilePlan
from selfdistill_kernels.backends.native.rounding import Rounder, SparseTile, Terms
from selfdistill_kernels.backends.native.rows import RowKernels, Tile
from selfdistill_kernels.backends.tokens import Tokens


def visit(
    kernels: RowKernels,
    plan: TilePlan,
    *,
    gate: Gate | None,
    loss_weight: Tensor | None,
    old_logprobs: Tensor | None,
    needs: Needs,
    statistics: Tensor,
    rounder: Rounder | None = None,
) -> tuple[Tensor, Gradients]:
    """Visit all tokens.

    Args:
        kernels: the problem.
        plan: of strategy "store".
        gate: token-local advantage mask, or None.
        loss_weight: [N] float32, or None for statistics only.
        old_logprobs: [N] or None, for importance weights.
        needs: the gradients that are wanted.
        statistics: [N, 10], filled for the tokens that exist.
        rounder: for gradients with an error.

    Returns:
        active [N] bool and the gradients.
    """
    inputs = kernels.inputs
    # A token that does not exist has no gradient; the visit takes away from the others.
    active = (
        torch.ones(statistics.shape[0], dtype=torch.bool, device=inputs.device)
        if inputs.exists is None
        else inputs.exists.clone()
    )
    wants_gradient = bool(needs) and loss_weight is not None
    with memory.workspace(plan.elements, inputs.device) as space:
        pending = _Pending(kernels, space, plan, needs, rounder)
        for tokens in _cut(inputs.tokens, pending, plan.models):
            tile = kernels.tile(tokens, 0, plan.columns, pending.free, with_teacher=True)
            weight = tokens.of(loss_weight) if loss_weight is not None and needs else None
            old = None if old_logprobs is None else tokens.of(old_logprobs)
            found, chosen = tokens.of(statistics), tokens.of(active)
            dense = chosen
            if rounder is not None and weight is not None:
                dense = pending.round(
                    tile, _weigher(kernels, weight, gate, old, statistics=found, active=chosen)
                )
            else:
                kernels.visit(tile, weight, gate, old, statistics=found, active=chosen)
            if not tokens.is_range:
                tokens.put(statistics, found)
                tokens.put(active, chosen)
            if wants_gradient:
                if needs.in_place:
                    dropped = tokens.take((~chosen).nonzero().squeeze(1)).indices(inputs.device)
                    inputs.student_hidden.index_fill_(0, dropped, 0)
                pending.take(kernels.keep_active(tile, dense, gate))
        gradients = pending.finish()
    if loss_weight is not None and not wants_gradient:
        active &= loss_weight != 0
    return active, gradients


def score(kernels: RowKernels, plan: TilePlan, space: Tensor, statistics: Tensor) -> Tile:
    """The raw scores of every token that exists, in the front of `space`; fills statistics [N, 10]
    for them. All tokens must fit one tile of the plan."""
    tokens = kernels.inputs.tokens
    tile = kernels.tile(tokens, 0, plan.columns, space[: plan.tile_elements], with_teacher=True)
    tokens.put(statistics, kernels.statistics(tile))
    return tile


def multiply(
    kernels: RowKernels, plan: TilePlan, space: Tensor, tile: Tile, needs: Needs
) -> Gradients:
    """The GEMMs of a gradient that `kernels.gradient` left in a tile in the front of `space`."""
    pending = _Pending(kernels, space, plan, needs, None)
    pending.take(tile.tokens)
    return pending.finish()


def round_and_multiply(
    kernels: RowKernels,
    plan: TilePlan,
    space: Tensor,
    tile: Tile,
    needs: Needs,
    rounder: Rounder,
    statistics: Tensor,
    term_weights: Tensor,
) -> Gradients:
    """The gradients, rounded, of a tile of scores in the front of `space`, for statistics [N, 10]
    and weights [N, 3]."""
    pending = _Pending(kernels, space, plan, needs, rounder)
    tokens = tile.tokens
    pending.take_rounded(tile, tokens.of(statistics), tokens.of(term_weights))
    return pending.finish()


def rounded_gradients(
    kernels: RowKernels,
    plan: TilePlan,
    tokens: Tokens,
    needs: Needs,
    rounder: Rounder,
    statistics: Tensor,
    term_weights: Tensor,
) -> Gradients:
    """The same for tokens whose scores are made again, a tile at a time."""
    with_teacher = bool((term_weights[:, 0] != 0).any())
    with memory.workspace(plan.elements, kernels.inputs.device) as space:
        pending = _Pending(kernels, space, plan, needs, rounder)
        for part in _cut(tokens, pending, plan.models):
            tile = kernels.tile(part, 0, plan.columns, pending.free, with_teacher=with_teacher)
            pending.take_rounded(tile, part.of(statistics), part.of(term_weights))
        return pending.finish()


def _weigher(
    kernels: RowKernels,
    loss_weight: Tensor,
    gate: Gate | None,
    old_logprobs: Tensor | None,
    *,
    statistics: Tensor,
    active: Tensor,
) -> Terms:
    """Terms of a tile's rows that fill their part of statistics [r, 10] and active [r]."""

    def terms(part: Tile, rows: slice) -> tuple[Tensor, Tensor]:
        old = None if old_logprobs is None else old_logprobs[rows]
        found = statistics[rows]
        weights = kernels.weigh(
            part, loss_weight[rows], gate, old, statistics=found, active=active[rows]
        )
        return found, weights

    return terms


def _cut(tokens: Tokens, pending: _Pending, models: int) -> Iterator[Tokens]:
    """Yield the tokens of each tile, as many as the workspace has room for at that time."""
    start, total = 0, tokens.count
    while start < total:
        room = pending.make_room() // models
        tiles = -(-(total - start) // room)
        stop = start + -(-(total - start) // tiles)  # even tiles: no small last one
        yield tokens.part(start, stop)
        start = stop


class _Pending:
    """The workspace, the gradient rows that wait in it, and the gradients made so far."""

    def __init__(
        self,
        kernels: RowKernels,
        space: Tensor,
        plan: TilePlan,
        needs: Needs,
        rounder: Rounder | None,
    ) -> None:
        inputs = kernels.inputs
        self._rounder = rounder
        self._kernels, self._inputs, self._needs = kernels, inputs, needs
        self._buffer, self._sums = space[: plan.tile_elements], space[plan.tile_elements :]
        self._columns = plan.columns
        self._total = plan.models * plan.rows  # rows of the workspace
        self._has_dense = False  # whether a library product made a part
        self._waiting: list[Tokens] = []  # of the first `_count` rows, in order
        self._count = 0
        # Logits in place: rows are read before they are written.
        self._hidden = inputs.student_hidden if needs.in_place else None
        self._weight: Tensor | None = None
        if needs.weight:
            assert inputs.weight is not None
            self._weight = memory.empty(inputs.weight.shape, inputs.device, inputs.weight.dtype)
        self._weight_sum: Tensor | None = None  # float32, of the rows so far
        self._bias = torch.zeros(inputs.vocabulary, device=inputs.device) if needs.bias else None

    @property
    def free(self) -> Tensor:
        """The rows of the workspace for the next tile, flat."""
        return self._buffer[self._count * self._columns :] if self._count else self._buffer

    def make_room(self) -> int:
        """Rows of the workspace for the next tile."""
        # Below a quarter of the workspace it is cheaper to wait for more rows than to read and
        # write all of dW for a few.
        if 4 * self._count >= self._total:
            self._flush(last=False)
        return self._total - self._count

    def take(self, tokens: Tokens) -> None:
        """Keep the gradients of `tokens`, the first of the free rows."""
        self._waiting.append(tokens)
        self._count += tokens.count

    def round(self, tile: Tile, terms: Terms) -> Tensor:
        """Round the gradients of a tile and multiply them into the gradients; returns [r] bool, the
        rows that are left as dense gradients."""
        assert self._rounder is not None
        made = self._rounder.round(self._kernels, tile, terms)
        dense = made.is_dense
        if not dense.all():
            self._add_sparse(self._rounder, made, is_all=not dense.any())
        return dense

    def take_rounded(self, tile: Tile, statistics: Tensor, term_weights: Tensor) -> None:
        """Round a tile of scores in the first of the free rows for known statistics [r, 10] and
        weights [r, 3], and keep what is left dense."""
        dense = self.round(tile, lambda _, rows: (statistics[rows], term_weights[rows]))
        self.take(self._kernels.keep_active(tile, dense, None))

    def _add_sparse(self, rounder: Rounder, tile: SparseTile, *, is_all: bool) -> None:
        student = self._inputs.student_hidden
        if self._needs.hidden:
            if self._hidden is None:
                self._hidden = torch.zeros_like(student)
            tile.tokens.put(self._hidden, rounder.hidden_gradient(tile).to(student.dtype))
        if self._weight is not None:
            out = self._weight
            is_only = is_all and tile.tokens.count == self._inputs.tokens.count
            if not is_only and out.dtype != torch.float32:
                out = self._sums[: out.numel()].view(out.shape)
            rounder.weight_gradient(tile, out=out, add=self._weight_sum, bias=self._bias)
            self._weight_sum = out
        elif self._bias is not None:
            rounder.bias_gradient(tile, out=self._bias)

    def _flush(self, *, last: bool) -> None:
        """Multiply the waiting rows into the gradients; only the last call may round dW."""
        if self._count == 0:
            return
        self._has_dense = True
        inputs, head = self._inputs, self._kernels.head
        tokens = Tokens.join(self._waiting, inputs.device)
        rows = self._buffer[: self._count * self._columns].view(self._count, self._columns)
        gradient = self._kernels.gradient_rows(rows)
        if self._needs.hidden:
            student = inputs.student_hidden
            made = head.hidden_gradient(gradient, 0, gradient.shape[1]).to(student.dtype)
            if tokens.is_range and tokens.count == student.shape[0] and inputs.weight is not None:
                self._hidden = made  # of all tokens at once
            else:
                if self._hidden is None:
                    self._hidden = torch.zeros_like(student)
                tokens.put(self._hidden, made)
        if self._weight is not None:
            out = self._weight
            if not last and out.dtype != torch.float32:
                out = self._sums[: out.numel()].view(out.shape)
            hidden = tokens.of(inputs.student_hidden)
            head.weight_gradient(gradient, hidden, out=out, add=self._weight_sum)
            self._weight_sum = out
        if self._bias is not None:
            self._bias += gradient.sum(dim=0, dtype=torch.float32)
        self._waiting, self._count = [], 0

    def finish(self) -> Gradients:
        self._flush(last=True)
        student = self._inputs.student_hidden
        if self._needs.hidden and self._hidden is None:
            self._hidden = torch.zeros_like(student)
        if self._weight is not None:
            if self._weight_sum is None:
                self._weight.zero_()
            elif self._weight_sum is not self._weight:
                self._weight.copy_(self._weight_sum)
            if self._rounder is not None:
                self._rounder.finish(self._weight, is_sparse=not self._has_dense)
        bias = None if self._bias is None else self._bias.to(student.dtype)
        return Gradients(self._hidden, self._weight, bias)
