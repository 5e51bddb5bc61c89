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

from selfdistill_kernels.backends import memory
from selfdistill_kernels.backends.base import Gate, Gradients, Needs
from selfdistill_kernels.backends.rows import RowKernels
from selfdistill_kernels.plan import TilePlan


def visit(
    kernels: RowKernels,
    tokens: Tensor,
    plan: TilePlan,
    *,
    gate: Gate | None,
    loss_weight: Tensor | None,
    old_logprobs: Tensor | None,
    needs: Needs,
    statistics: Tensor,
) -> tuple[Tensor, Gradients]:
    """Visit all tokens.

    Args:
        kernels: the problem.
        tokens: [n] int64, the tokens that exist.
        plan: of strategy "store".
        gate: token-local advantage mask, or None.
        loss_weight: [N] float32, or None for statistics only.
        old_logprobs: [N] or None, for importance weights.
        needs: the gradients that are wanted.
        statistics: [N, 10], filled for `tokens`.

    Returns:
        active [N] bool and the gradients.
    """
    active = torch.zeros(statistics.shape[0], dtype=torch.bool)
    wants_gradient = bool(needs) and loss_weight is not None
    with memory.workspace(plan.heads * plan.rows * plan.columns) as buffer:
        pending = _Pending(kernels, buffer.view(-1, plan.columns), needs)
        for rows in _cut(tokens, pending, plan.heads):
            tile = kernels.tile(rows, 0, plan.columns, pending.free_rows, with_teacher=True)
            weight = None if loss_weight is None else loss_weight[rows]
            old = None if old_logprobs is None else old_logprobs[rows]
            found, chosen = kernels.visit(tile, weight if wants_gradient else None, gate, old)
            statistics[rows] = found
            if weight is not None:
                active[rows] = chosen & (weight != 0)
            if wants_gradient:
                if needs.in_place:
                    kernels.inputs.student_hidden[rows[~chosen]] = 0
                pending.take(kernels.keep_active(tile, chosen, gate))
        return active, pending.finish()


def _cut(tokens: Tensor, pending: _Pending, heads: int) -> Iterator[Tensor]:
    """Yield the tokens of each tile, as many as the workspace has room for at that time."""
    start, total = 0, tokens.numel()
    while start < total:
        room = pending.make_room().shape[0] // heads
        tiles = -(-(total - start) // room)
        stop = start + -(-(total - start) // tiles)  # even tiles: no small last one
        yield tokens[start:stop]
        start = stop


class _Pending:
    """The workspace, the gradient rows that wait in it, and the gradients made so far."""

    def __init__(self, kernels: RowKernels, buffer: Tensor, needs: Needs) -> None:
        inputs = kernels.inputs
        self._kernels, self._inputs, self._buffer = kernels, inputs, buffer
        self._waiting: list[Tensor] = []  # tokens of the first `_count` rows, in order
        self._count = 0
        self._hidden: Tensor | None = None
        if needs.hidden:
            student = inputs.student_hidden
            # Rows are read before they are written, in place too.
            self._hidden = student if needs.in_place else torch.zeros_like(student)
        self._weight: Tensor | None = None
        if needs.weight:
            assert inputs.weight is not None
            self._weight = memory.empty(inputs.weight.shape, inputs.weight.dtype)
        self._weight_sum: Tensor | None = None  # float32, of the rows so far
        self._bias = torch.zeros(inputs.vocabulary) if needs.bias else None

    @property
    def free_rows(self) -> Tensor:
        return self._buffer[self._count :]

    def make_room(self) -> Tensor:
        """The rows of the workspace for the next tile."""
        # Below a quarter of the workspace it is cheaper to wait for more rows than to read and
        # write all of dW for a few.
        if 4 * self._count >= self._buffer.shape[0]:
            self._flush(last=False)
        return self.free_rows

    def take(self, tokens: Tensor) -> None:
        """Keep the gradients of `tokens`, the first of the free rows."""
        self._waiting.append(tokens)
        self._count += tokens.numel()

    def _flush(self, *, last: bool) -> None:
        """The gradient GEMMs of the waiting rows. Only the last may round dW to its dtype."""
        if self._count == 0:
            return
        rows, head = torch.cat(self._waiting), self._kernels.head
        gradient = self._kernels.gradient_rows(self._buffer[: self._count])
        if self._hidden is not None:
            made = head.hidden_gradient(gradient, 0, gradient.shape[1])
            self._hidden.index_copy_(0, rows, made.to(self._hidden.dtype))
        if self._weight is not None:
            out = self._weight
            if not last and out.dtype != torch.float32:
                out = memory.empty(out.shape) if self._weight_sum is None else self._weight_sum
            hidden = self._inputs.student_hidden[rows]
            head.weight_gradient(gradient, hidden, out=out, add=self._weight_sum)
            self._weight_sum = out
        if self._bias is not None:
            self._bias += gradient.sum(dim=0, dtype=torch.float32)
        self._waiting, self._count = [], 0

    def finish(self) -> Gradients:
        self._flush(last=True)
        if self._weight is not None:
            if self._weight_sum is None:
                self._weight.zero_()
            elif self._weight_sum is not self._weight:
                self._weight.copy_(self._weight_sum)
        dtype = self._inputs.student_hidden.dtype
        return Gradients(
            self._hidden, self._weight, None if self._bias is None else self._bias.to(dtype)
        )
