"""How a loss is computed, besides its tensors."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

from selfdistill_kernels.advantage import Gate
from selfdistill_kernels.backends.interface import Needs
from selfdistill_kernels.logits import LogitTransform
from selfdistill_kernels.objective import Objective
from selfdistill_kernels.tolerance import Rounding


@dataclass(frozen=True)
class LossOptions:
    """One object from the public functions down to the operators, whose schemas take scalars only.

    Attributes:
        transform: bias -> scale -> soft cap -> temperature.
        objective: the loss of a token.
        gate: the token-local part of an advantage mask; None without one, or where the mask is not
            token-local.
        needs: the gradients that are made in the forward visit.
        workspace: bytes, 0 for "auto".
        backend: a name other than "auto".
        rounding: the error that the gradients may have, or None.
    """

    transform: LogitTransform
    objective: Objective
    gate: Gate | None
    needs: Needs
    workspace: int
    backend: str
    rounding: Rounding | None = None

    def loss_scalars(self) -> tuple[Any, ...]:
        """The same, as the schema of `linear_loss` spells it."""
        transform, objective, gate, needs = self.transform, self.objective, self.gate, self.needs
        return (
            transform.logit_scale, transform.softcap, transform.temperature,
            objective.divergence, objective.beta, objective.policy_gradient,
            objective.cross_entropy, objective.entropy,
            objective.divergence_clip, objective.importance_clip, objective.entry_clip,
            None if gate is None else gate.sign, 0.0 if gate is None else gate.threshold,
            *((None, 0, None) if self.rounding is None else astuple(self.rounding.tolerance)),
            needs.hidden, needs.weight, needs.bias, self.workspace, self.backend,
        )  # fmt: skip

    def statistics_scalars(self, vocabulary: int) -> tuple[Any, ...]:
        """What concerns the statistics, as the schema of `linear_statistics` spells it."""
        transform, objective = self.transform, self.objective
        # A bucket for the rest of the vocabulary would be empty where all of it is compared.
        tail = objective.tail and objective.top_k != vocabulary
        return (
            transform.logit_scale, transform.softcap, transform.temperature,
            objective.divergence, objective.beta, objective.entry_clip,
            objective.top_k or 0, objective.top_k_of, tail, self.workspace, self.backend,
        )  # fmt: skip
