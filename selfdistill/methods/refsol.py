"""RefSol: the teacher sees the complete reference solution, whatever the attempt was."""

from __future__ import annotations

from collections.abc import Sequence

from selfdistill.methods.loss import Loss
from selfdistill.prompts.context import TeacherContext
from selfdistill.rollout.attempts import Attempts


class RefSol:
    """Reference-solution feedback (arXiv 2606.11173).

    Args:
        group_size: rollouts drawn for each prompt.
        loss: what is minimised on the completion tokens.
    """

    name = "refsol"
    needs_context = True

    def __init__(self, *, group_size: int, loss: Loss) -> None:
        self.group_size = group_size
        self.loss = loss

    def contexts(self, attempts: Sequence[Attempts]) -> list[list[TeacherContext | None]]:
        """Return the problem's reference, once for every rollout."""
        return [
            [TeacherContext("reference", attempt.problem.reference)] * len(attempt.rollouts)
            for attempt in attempts
        ]
