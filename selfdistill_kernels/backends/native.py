"""CPU backend: library GEMMs around the compiled row kernels of csrc/ (strategy `store`).

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
from dataclasses import dataclass

import torch
from torch import Tensor

from selfdistill_kernels.backends.base import Gate, Gradients, LinearInputs, Needs
from selfdistill_kernels.backends.gemm import Gemm, gemm_for
from selfdistill_kernels.objective import DIVERGENCES, Objective
from selfdistill_kernels.plan import TilePlan
from selfdistill_kernels.statistics import Column

_NO_GATE = Gate(sign=-2, threshold=0.0)


class NativeBackend:
    """Backend over torch.ops.selfdistill.row_*; float32 and bfloat16 inputs on the CPU."""

    def statistics(self, inputs: LinearInputs, objective: Objective, workspace: int) -> Tensor:
        sweep = _Sweep.of(inputs, objective, Needs(False, False, False), workspace)
        statistics = _new_statistics(inputs)
        sweep.visit(statistics, active=None, loss_weight=None, gate=_NO_GATE)
        return statistics

    def visit(
        self,
        inputs: LinearInputs,
        objective: Objective,
        gate: Gate | None,
        loss_weight: Tensor,
        needs: Needs,
        workspace: int,
    ) -> tuple[Tensor, Tensor, Gradients]:
        sweep = _Sweep.of(inputs, objective, needs, workspace)
        statistics = _new_statistics(inputs)
        active = torch.zeros(statistics.shape[0], dtype=torch.bool)
        gradients = sweep.visit(statistics, active, loss_weight, gate or _NO_GATE)
        return statistics, active, gradients

    def gradient(
        self,
        inputs: LinearInputs,
        objective: Objective,
        statistics: Tensor,
        term_weights: Tensor,
        needs: Needs,
        workspace: int,
    ) -> Gradients:
        sweep = _Sweep.of(inputs, objective, needs, workspace)
        return sweep.gradient(statistics, term_weights.to(torch.float32))


def _new_statistics(inputs: LinearInputs) -> Tensor:
    return torch.zeros((inputs.student_hidden.shape[0], len(Column)), dtype=torch.float32)


@dataclass
class _Sweep:
    """One pass over the tokens of a problem."""

    inputs: LinearInputs
    objective: Objective
    needs: Needs
    gemm: Gemm
    plan_workspace: int
    student_bias: Tensor | None
    teacher_bias: Tensor | None

    @classmethod
    def of(cls, inputs: LinearInputs, objective: Objective, needs: Needs, workspace: int) -> _Sweep:
        def float_bias(bias: Tensor | None) -> Tensor | None:
            return None if bias is None else bias.to(torch.float32)

        return cls(
            inputs,
            objective,
            needs,
            gemm_for(inputs),
            workspace,
            float_bias(inputs.bias),
            float_bias(inputs.teacher_bias),
        )

    def visit(
        self,
        statistics: Tensor,
        active: Tensor | None,
        loss_weight: Tensor | None,
        gate: Gate,
    ) -> Gradients:
        """Statistics of all existing tokens and, unless `loss_weight` is None, gradients of the
        active ones."""
        inputs, objective, transform = self.inputs, self.objective, self.inputs.transform
        tokens = inputs.existing_rows()
        plan = self._plan(tokens.numel())
        accumulator = _Accumulator.of(inputs, self.needs, self.gemm, plan)
        for rows in _cut(tokens, plan, accumulator):
            student, teacher = self._logits(rows, accumulator.free_rows, with_teacher=True)
            found = statistics.new_empty((rows.numel(), len(Column)))
            weight = None if loss_weight is None else loss_weight[rows].to(torch.float32)
            chosen = torch.ones(rows.numel(), dtype=torch.bool)
            torch.ops.selfdistill.row_visit_(
                student, teacher, self.student_bias, self.teacher_bias,
                None if inputs.targets is None else inputs.targets[rows],
                weight if self.needs else None,
                transform.logit_scale, transform.softcap or 0.0, transform.temperature,
                DIVERGENCES[objective.kernel_divergence], objective.beta,
                objective.policy_gradient, objective.cross_entropy, objective.entropy,
                gate.sign, gate.threshold, self.gemm.narrow_gradient, found, chosen,
            )  # fmt: skip
            statistics[rows] = found
            if active is not None and weight is not None:
                active[rows] = chosen & (weight != 0)
            if self.needs:
                accumulator.take(student, rows, chosen)
        return accumulator.finish()

    def gradient(self, statistics: Tensor, term_weights: Tensor) -> Gradients:
        """Recompute the logits of the tokens with a weight and push them through the gradient."""
        inputs, objective, transform = self.inputs, self.objective, self.inputs.transform
        chosen = (term_weights != 0).any(dim=1)
        if inputs.exists is not None:
            chosen &= inputs.exists
        tokens = chosen.nonzero().squeeze(1)
        with_teacher = (
            inputs.teacher_hidden is not None
            and objective.divergence != "none"
            and bool((term_weights[:, 0] != 0).any())
        )
        plan = self._plan(tokens.numel())
        accumulator = _Accumulator.of(inputs, self.needs, self.gemm, plan)
        for rows in _cut(tokens, plan, accumulator):
            student, teacher = self._logits(rows, accumulator.free_rows, with_teacher)
            torch.ops.selfdistill.row_gradient_(
                student, teacher, self.student_bias, self.teacher_bias,
                None if inputs.targets is None else inputs.targets[rows],
                statistics[rows], term_weights[rows],
                transform.logit_scale, transform.softcap or 0.0, transform.temperature,
                DIVERGENCES[objective.kernel_divergence] if with_teacher else 0, objective.beta,
                0, self.gemm.narrow_gradient,
            )  # fmt: skip
            accumulator.take(student, rows, chosen=None)
        return accumulator.finish()

    def _plan(self, tokens: int) -> TilePlan:
        return TilePlan.store(
            tokens=tokens,
            vocabulary=self.inputs.vocabulary,
            heads=1 if self.inputs.teacher_hidden is None else 2,
            workspace=self.plan_workspace,
        )

    def _logits(
        self, rows: Tensor, free: Tensor, with_teacher: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Raw scores of `rows` in the first free rows, the student's above the teacher's."""
        inputs, r = self.inputs, rows.numel()
        student = inputs.student_hidden[rows]
        if inputs.teacher_hidden is None or not with_teacher:
            self.gemm.logits(student, inputs.weight, out=free[:r])
            return free[:r], None
        teacher = inputs.teacher_hidden[rows]
        if inputs.teacher_weight is None:
            # One reading of the head serves both.
            self.gemm.logits(torch.cat([student, teacher]), inputs.weight, out=free[: 2 * r])
        else:
            self.gemm.logits(student, inputs.weight, out=free[:r])
            self.gemm.logits(teacher, inputs.teacher_weight, out=free[r : 2 * r])
        return free[:r], free[r : 2 * r]


def _cut(tokens: Tensor, plan: TilePlan, accumulator: _Accumulator) -> Iterator[Tensor]:
    """Yield the token rows of each tile, as many as the workspace has room for at that time."""
    start, total = 0, tokens.numel()
    while start < total:
        room = accumulator.free_rows.shape[0] // plan.heads
        tiles = -(-(total - start) // room)
        stop = start + -(-(total - start) // tiles)  # even tiles: no small last one
        yield tokens[start:stop]
        start = stop


@dataclass
class _Accumulator:
    """The workspace, the gradient rows that wait in it, and the gradients made so far."""

    inputs: LinearInputs
    needs: Needs
    gemm: Gemm
    buffer: Tensor  # [B, V] float32
    waiting: list[Tensor]  # token rows of buffer[:pending], in order
    pending: int
    hidden: Tensor | None
    weight: Tensor | None  # float32 until finish()
    bias: Tensor | None
    has_weight: bool

    @classmethod
    def of(cls, inputs: LinearInputs, needs: Needs, gemm: Gemm, plan: TilePlan) -> _Accumulator:
        vocabulary = inputs.vocabulary
        weight_shape = () if inputs.weight is None else inputs.weight.shape
        return cls(
            inputs,
            needs,
            gemm,
            buffer=torch.empty((plan.buffer_rows, plan.vocabulary), dtype=torch.float32),
            waiting=[],
            pending=0,
            hidden=torch.zeros_like(inputs.student_hidden) if needs.hidden else None,
            weight=torch.empty(weight_shape, dtype=torch.float32) if needs.weight else None,
            bias=torch.zeros(vocabulary, dtype=torch.float32) if needs.bias else None,
            has_weight=False,
        )

    @property
    def free_rows(self) -> Tensor:
        return self.buffer[self.pending :]

    def take(self, gradient: Tensor, rows: Tensor, chosen: Tensor | None) -> None:
        """Keep the active gradient rows, which lie at the front of the free rows."""
        if chosen is not None:
            order = torch.ops.selfdistill.gather_active_rows_(gradient, chosen)
            rows = rows[order]
        self.waiting.append(rows)
        self.pending += rows.numel()
        # Below a quarter of the workspace it is cheaper to wait for more rows than to read and
        # write all of dW for a few.
        if 4 * self.pending >= self.buffer.shape[0]:
            self.flush()

    def flush(self) -> None:
        """The gradient GEMMs of the waiting rows."""
        if self.pending == 0:
            return
        rows = torch.cat(self.waiting)
        gradient = self.gemm.gradient_view(self.buffer[: self.pending])
        if self.hidden is not None:
            made = self.gemm.hidden_gradient(gradient, self.inputs.weight)
            self.hidden.index_copy_(0, rows, made.to(self.hidden.dtype))
        if self.weight is not None:
            hidden = self.inputs.student_hidden[rows]
            self.gemm.add_weight_gradient(gradient, hidden, self.weight, first=not self.has_weight)
            self.has_weight = True
        if self.bias is not None:
            self.bias += gradient.sum(dim=0, dtype=torch.float32)
        self.waiting, self.pending = [], 0

    def finish(self) -> Gradients:
        self.flush()
        if self.weight is not None and not self.has_weight:
            self.weight.zero_()
        bias = None
        if self.bias is not None:
            assert self.inputs.bias is not None
            bias = self.bias.to(self.inputs.bias.dtype)
        weight = None
        if self.weight is not None:
            weight = self.weight.to(self.inputs.student_hidden.dtype)
        return Gradients(self.hidden, weight, bias)
