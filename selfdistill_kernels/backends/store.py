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
    pending = _Pending(kernels, plan, needs)
    wants_gradient = bool(needs) and loss_weight is not None
    for rows in _cut(tokens, pending, plan.heads):
        tile = kernels.tile(rows, 0, plan.columns, pending.free_rows, with_teacher=True)
        weight = None if loss_weight is None else loss_weight[rows]
        old = None if old_logprobs is None else old_logprobs[rows]
        found, chosen = kernels.visit(tile, weight if wants_gradient else None, gate, old)
        statistics[rows] = found
        if weight is not None:
            active[rows] = chosen & (weight != 0)
        if wants_gradient:
            pending.take(kernels.keep_active(tile, chosen, gate))
    return active, pending.finish()


def _cut(tokens: Tensor, pending: _Pending, heads: int) -> Iterator[Tensor]:
    """Yield the tokens of each tile, as many as the workspace has room for at that time."""
    start, total = 0, tokens.numel()
    while start < total:
        room = pending.free_rows.shape[0] // heads
        tiles = -(-(total - start) // room)
        stop = start + -(-(total - start) // tiles)  # even tiles: no small last one
        yield tokens[start:stop]
        start = stop


class _Pending:
    """The workspace, the gradient rows that wait in it, and the gradients made so far."""

    def __init__(self, kernels: RowKernels, plan: TilePlan, needs: Needs) -> None:
        inputs = kernels.inputs
        self._kernels, self._inputs = kernels, inputs
        self._buffer = torch.empty((plan.heads * plan.rows, plan.columns), dtype=torch.float32)
        self._waiting: list[Tensor] = []  # tokens of the first `_count` rows, in order
        self._count = 0
        self._hidden = torch.zeros_like(inputs.student_hidden) if needs.hidden else None
        self._weight: Tensor | None = None
        if needs.weight:
            assert inputs.weight is not None
            self._weight = torch.empty(inputs.weight.shape, dtype=torch.float32)
        self._has_weight = False
        self._bias = torch.zeros(plan.columns, dtype=torch.float32) if needs.bias else None

    @property
    def free_rows(self) -> Tensor:
        return self._buffer[self._count :]

    def take(self, tokens: Tensor) -> None:
        """Keep the gradients of `tokens`, the first of the free rows."""
        self._waiting.append(tokens)
        self._count += tokens.numel()
        # Below a quarter of the workspace it is cheaper to wait for more rows than to read and
        # write all of dW for a few.
        if 4 * self._count >= self._buffer.shape[0]:
            self._flush()

    def _flush(self) -> None:
        """The gradient GEMMs of the waiting rows."""
        if self._count == 0:
            return
        rows, head = torch.cat(self._waiting), self._kernels.head
        gradient = self._kernels.gradient_rows(self._buffer[: self._count])
        if self._hidden is not None:
            made = head.hidden_gradient(gradient, 0, gradient.shape[1])
            self._hidden.index_copy_(0, rows, made.to(self._hidden.dtype))
        if self._weight is not None:
            hidden = self._inputs.student_hidden[rows]
            head.weight_gradient(gradient, hidden, out=self._weight, add=self._has_weight)
            self._has_weight = True
        if self._bias is not None:
            self._bias += gradient.sum(dim=0, dtype=torch.float32)
        self._waiting, self._count = [], 0

    def finish(self) -> Gradients:
        self._flush()
        if self._weight is not None and not self._has_weight:
            self._weight.zero_()
        dtype = self._inputs.student_hidden.dtype
        return Gradients(
            self._hidden,
            None if self._weight is None else self._weight.to(dtype),
            None if self._bias is None else self._bias.to(dtype),
        )
