"""What every loss offers to the training loop."""

from __future__ import annotations

from typing import Protocol

from selfdistill.model.layout import PromptGroup
from selfdistill.model.lm_head import LMHead
from selfdistill.model.scoring import ScoredTokens
from selfdistill_kernels import DistillationOutput


class Loss(Protocol):
    """Turns scored tokens into a loss and per-token statistics.

    Attributes:
        needs_old_logprobs: whether it compares the student with the policy that sampled. Both are
            taken at the sampling temperature, with nothing cut off (`Rollout.policy_logprobs`).
    """

    needs_old_logprobs: bool

    def denominator(self, group: PromptGroup) -> int:
        """Return what a group adds to the denominator of the step's mean loss."""
        ...

    def learns_from(self, group: PromptGroup) -> bool:
        """Return False when the group has no gradient whatever the models say about it."""
        ...

    def __call__(
        self, scored: ScoredTokens, student: LMHead, teacher: LMHead, *, normalizer: float
    ) -> DistillationOutput:
        """Return the sum over tokens divided by `normalizer`.

        Args:
            scored: the tokens of whole groups.
            student, teacher: the heads; without a teacher the second one is not looked at.
            normalizer: the sum of the denominators of all groups of the step.
        """
        ...
