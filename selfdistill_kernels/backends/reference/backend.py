"""The oracle: materialises [N, V] in plain torch, runs on every device.

Each line is a line of docs/math.md. It computes in float64 on the CPU and in float32 elsewhere
(not every device has float64); speed and memory are not its business.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from selfdistill_kernels.advantage import Gate
from selfdistill_kernels.backends.interface import (
    Entries,
    Expected,
    Gradients,
    LinearInputs,
    Needs,
    rows_with_gradient,
)
from selfdistill_kernels.backends.reference.divergence import (
    divergence_gradient,
    divergence_of,
    expectation,
)
from selfdistill_kernels.backends.reference.rounding import RoundedRows
from selfdistill_kernels.objective import Objective
from selfdistill_kernels.parallel.shard import VocabularyShard
from selfdistill_kernels.statistics import Column, statistics_dtype
from selfdistill_kernels.token_loss import active_tokens, term_weights_of
from selfdistill_kernels.tolerance import Rounding


@dataclass(frozen=True)
class _Distribution:
    """Logits, log-probs and normalisers of n tokens."""

    logits: Tensor  # [n, V]
    logprobs: Tensor  # [n, V]
    maximum: Tensor  # [n]
    logsum: Tensor  # [n]

    @classmethod
    def of(cls, logits: Tensor, shard: VocabularyShard | None) -> _Distribution:
        maximum = logits.amax(dim=1)
        if shard is not None:
            maximum = shard.largest(maximum)
        centred = logits - maximum[:, None]
        logsum = _over_ranks(centred.exp().sum(dim=1), shard).log()
        return cls(logits, centred - logsum[:, None], maximum, logsum)

    def entropy(self, shard: VocabularyShard | None) -> Tensor:
        return _over_ranks(-expectation(self.logprobs, self.logprobs), shard)


class ReferenceBackend:
    """The backend in plain torch, which the others are compared with."""

    def statistics(self, inputs: LinearInputs, objective: Objective, workspace: int) -> Tensor:
        rows = inputs.existing_rows()
        student, teacher = _distributions(inputs, rows)
        found = student.maximum.new_zeros((rows.numel(), len(Column)))
        found[:, Column.STUDENT_SHIFT] = student.maximum
        found[:, Column.STUDENT_LOGSUM] = student.logsum
        found[:, Column.ENTROPY] = student.entropy(inputs.shard)
        if inputs.targets is not None:
            found[:, Column.STUDENT_LOGPROB] = _at_targets(student.logprobs, inputs, rows)
        if teacher is not None:
            found[:, Column.TEACHER_SHIFT] = teacher.maximum
            found[:, Column.TEACHER_LOGSUM] = teacher.logsum
            found[:, Column.TEACHER_ENTROPY] = teacher.entropy(inputs.shard)
            if inputs.targets is not None:
                found[:, Column.TEACHER_LOGPROB] = _at_targets(teacher.logprobs, inputs, rows)
            divergence, pivot = _row_constants(student, teacher, objective, inputs.shard)
            found[:, Column.DIVERGENCE] = divergence
            found[:, Column.PIVOT] = pivot
        size, dtype = inputs.student_hidden.shape[0], inputs.student_hidden.dtype
        statistics = found.new_zeros((size, len(Column))).index_copy(0, rows, found)
        return statistics.to(statistics_dtype(dtype))

    def keep(
        self,
        inputs: LinearInputs,
        objective: Objective,
        expected: Expected,
        workspace: int,
        rounding: Rounding | None = None,
    ) -> None:
        """Keep nothing: the backward pass makes the logits again."""

    def top_k(self, inputs: LinearInputs, k: int, of_teacher: bool, workspace: int) -> Tensor:
        rows = inputs.existing_rows()
        student, teacher = _distributions(inputs, rows)
        found = teacher if of_teacher else student
        assert found is not None
        chosen = found.logits.topk(k, dim=1, sorted=False).indices
        return chosen.new_zeros((inputs.student_hidden.shape[0], k)).index_copy_(0, rows, chosen)

    def gradient(
        self,
        inputs: LinearInputs,
        objective: Objective,
        statistics: Tensor,
        term_weights: Tensor,
        needs: Needs,
        workspace: int,
        entries: Entries | None = None,
        rounding: Rounding | None = None,
    ) -> Gradients:
        rows = rows_with_gradient(inputs, term_weights, entries).nonzero().squeeze(1)
        student, teacher = _distributions(inputs, rows)
        weights = term_weights[rows].to(student.logits.dtype)
        log_s, p_s = student.logprobs, student.logprobs.exp()
        gradient = torch.zeros_like(log_s)
        if teacher is not None:
            # Row constants anew rather than from `statistics`, which is rounded to float32.
            constants = _row_constants(student, teacher, objective, inputs.shard)
            slope = divergence_gradient(
                log_s, teacher.logprobs, *constants, objective,
                lambda sums: _over_ranks(sums, inputs.shard),
            )  # fmt: skip
            # A weight of 0 is no gradient, whatever the row holds (an infinite KL that is clipped).
            gradient += torch.where(weights[:, 0:1] == 0, 0.0, weights[:, 0:1] * slope)
        gradient += weights[:, 1:2] * p_s
        if inputs.targets is not None:
            target, is_here = _targets(inputs, rows)
            gradient.scatter_add_(1, target, torch.where(is_here, -weights[:, 1:2], 0.0))
        entropy = student.entropy(inputs.shard)[:, None]
        gradient -= weights[:, 2:3] * torch.where(p_s == 0, p_s, p_s * (log_s + entropy))
        gradient = inputs.transform.chain(gradient, student.logits)
        if entries is not None:
            entries.write_into(gradient, rows, 0)
        if rounding is not None:
            return _rounded(inputs, rows, gradient, needs, rounding)
        return _through_head(inputs, rows, gradient, needs)

    def visit(
        self,
        inputs: LinearInputs,
        objective: Objective,
        gate: Gate | None,
        loss_weight: Tensor,
        old_logprobs: Tensor | None,
        needs: Needs,
        workspace: int,
        rounding: Rounding | None = None,
    ) -> tuple[Tensor, Tensor, Gradients]:
        statistics = self.statistics(inputs, objective, workspace)
        active = active_tokens(statistics, loss_weight, inputs.exists, gate)
        weights = term_weights_of(objective, statistics, loss_weight * active, old_logprobs)
        return (
            statistics,
            active,
            self.gradient(inputs, objective, statistics, weights, needs, workspace, None, rounding)
            if needs
            else Gradients(None, None, None),
        )


def _distributions(
    inputs: LinearInputs, rows: Tensor
) -> tuple[_Distribution, _Distribution | None]:
    on_cpu = inputs.student_hidden.device.type == "cpu"
    dtype = torch.float64 if on_cpu else torch.float32

    def distribution(hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> _Distribution:
        raw = hidden[rows].to(dtype)
        if weight is not None:
            raw = raw @ weight.to(dtype).T
        return _Distribution.of(
            inputs.transform.apply(raw, None if bias is None else bias.to(dtype)), inputs.shard
        )

    student = distribution(inputs.student_hidden, inputs.weight, inputs.bias)
    if inputs.teacher_hidden is None:
        return student, None
    return student, distribution(inputs.teacher_hidden, inputs.teacher_head, inputs.teacher_bias)


def _over_ranks(sums: Tensor, shard: VocabularyShard | None) -> Tensor:
    """Sums over the shard's entries as sums over the vocabulary."""
    return sums if shard is None else shard.total(sums)


def _row_constants(
    student: _Distribution,
    teacher: _Distribution,
    objective: Objective,
    shard: VocabularyShard | None,
) -> tuple[Tensor, Tensor]:
    """Divergence [n] and pivot [n]; both are sums over the vocabulary."""
    divergence, pivot = divergence_of(student.logprobs, teacher.logprobs, objective)
    return _over_ranks(divergence, shard), _over_ranks(pivot, shard)


def _targets(inputs: LinearInputs, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The targets [n, 1] of some rows, and whether each is an entry of this shard."""
    assert inputs.targets is not None
    target = inputs.targets[rows, None]
    is_here = (target >= 0) & (target < inputs.vocabulary)
    return torch.where(is_here, target, 0), is_here


def _at_targets(logprobs: Tensor, inputs: LinearInputs, rows: Tensor) -> Tensor:
    """[n] the log-probs of the targets."""
    target, is_here = _targets(inputs, rows)
    found = torch.where(is_here, logprobs.gather(1, target), 0.0)
    return _over_ranks(found[:, 0], inputs.shard)


def _through_head(inputs: LinearInputs, rows: Tensor, gradient: Tensor, needs: Needs) -> Gradients:
    """Multiply the gradient through the head: dH = dz W, dW = dz^T h, db = sum dz."""
    hidden = weight = bias = None
    if needs.hidden:
        hidden = torch.zeros_like(inputs.student_hidden)
        head = inputs.weight
        made = gradient if head is None else gradient @ head.to(gradient.dtype)
        hidden[rows] = made.to(hidden.dtype)
    if needs.weight:
        assert inputs.weight is not None
        weight = gradient.T @ inputs.student_hidden[rows].to(gradient.dtype)
        weight = weight.to(inputs.weight.dtype)
    if needs.bias:
        assert inputs.bias is not None
        bias = gradient.sum(dim=0).to(inputs.bias.dtype)
    return Gradients(hidden, weight, bias)


def _rounded(
    inputs: LinearInputs, rows: Tensor, gradient: Tensor, needs: Needs, rounding: Rounding
) -> Gradients:
    """The same for a gradient that may have an error."""
    rounding.begin(hidden=needs.hidden, weight=needs.weight)
    rounded = RoundedRows(inputs, rows, gradient, rounding)
    made = _through_head(inputs, rows, rounded.gradient, needs)
    if made.weight is not None:
        rounded.note_weight(made.weight.to(gradient.dtype))
    if made.hidden is None:
        return made
    hidden = torch.zeros_like(made.hidden)
    hidden[rows] = rounded.hidden().to(hidden.dtype)
    return made._replace(hidden=hidden)
