"""What every backend receives and returns; one definition for the oracle, CPU and GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from selfdistill_kernels.logits import LogitTransform
from selfdistill_kernels.objective import Objective
from selfdistill_kernels.statistics import advantage_of


@dataclass(frozen=True)
class LinearInputs:
    """Hidden states and heads of N tokens, flattened and checked.

    Attributes:
        student_hidden: [N, H].
        teacher_hidden: [N, H_t], or None when only the student is wanted.
        weight: [V, H], the student's lm_head, or None when the hidden states are logits already.
        teacher_weight: [V, H_t], or None when the teacher shares `weight`.
        bias, teacher_bias: [V] or None.
        targets: [N] int64 or None; only read where `exists`.
        exists: [N] bool or None (all tokens exist). Rows that do not exist are never read.
        transform: bias -> scale -> soft cap -> temperature.
    """

    student_hidden: Tensor
    teacher_hidden: Tensor | None
    weight: Tensor | None
    teacher_weight: Tensor | None
    bias: Tensor | None
    teacher_bias: Tensor | None
    targets: Tensor | None
    exists: Tensor | None
    transform: LogitTransform

    @property
    def teacher_head(self) -> Tensor | None:
        """[V, H_t], whichever head the teacher uses; None when its hidden states are logits."""
        return self.weight if self.teacher_weight is None else self.teacher_weight

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.student_hidden.shape[1] if self.weight is None else self.weight.shape[0]

    def existing_rows(self) -> Tensor:
        """[n] int64, the rows that are tokens."""
        if self.exists is None:
            return torch.arange(self.student_hidden.shape[0], device=self.student_hidden.device)
        return self.exists.nonzero().squeeze(1)


@dataclass(frozen=True)
class Gate:
    """The token-local part of an AdvantageMask, as the kernels take it."""

    sign: int
    threshold: float


@dataclass(frozen=True)
class Needs:
    """Which gradients the caller wants; a frozen weight costs no dW."""

    hidden: bool
    weight: bool
    bias: bool

    def __bool__(self) -> bool:
        return self.hidden or self.weight or self.bias


class Gradients(NamedTuple):
    """Gradients in the dtype of their inputs; None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Backend(Protocol):
    """The three visits of the vocabulary that the operators are made of.

    `statistics` tensors are [N, 10] (see statistics.Column), zero in rows that do not exist.
    """

    def statistics(self, inputs: LinearInputs, objective: Objective, workspace: int) -> Tensor:
        """One sweep, no gradient."""
        ...

    def gradient(
        self,
        inputs: LinearInputs,
        objective: Objective,
        statistics: Tensor,
        term_weights: Tensor,
        needs: Needs,
        workspace: int,
    ) -> Gradients:
        """Gradient of sum_i w_i0 divergence_i + w_i1 (-log S(y_i)) + w_i2 H(S_i).

        `term_weights` is [N, 3]; rows where all three are zero cost nothing.
        """
        ...

    def visit(
        self,
        inputs: LinearInputs,
        objective: Objective,
        gate: Gate | None,
        loss_weight: Tensor,
        needs: Needs,
        workspace: int,
    ) -> tuple[Tensor, Tensor, Gradients]:
        """Statistics [N, 10], active tokens [N] bool and the gradient of
        sum_i active_i loss_weight_i loss_i, where everything is known before the visit."""
        ...


def term_weights_of(objective: Objective, statistics: Tensor, loss_weight: Tensor) -> Tensor:
    """[N, 3] weights of divergence, -log S(y) and entropy for a weighted sum of token losses."""
    divergence = float(objective.divergence != "none")
    likelihood = objective.cross_entropy + objective.policy_gradient * advantage_of(statistics)
    return torch.stack(
        [
            loss_weight * divergence,
            torch.where(loss_weight == 0, loss_weight, loss_weight * likelihood),
            loss_weight * objective.entropy,
        ],
        dim=1,
    )
