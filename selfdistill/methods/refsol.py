"""RefSol: the teacher sees the complete reference solution, whatever the attempt was."""

from __future__ import annotations

from collections.abc import Sequence

from selfdistill.context import TeacherContext
from selfdistill.methods.loss import Loss
from selfdistill.rollout import Rollout
from selfdistill.tasks import Problem


class RefSol:
    """Reference-solution feedback (arXiv 2606.11173).

    Args:
        group_size: rollouts drawn for each prompt.
        loss: what is minimised on the completion tokens.
    """

    name = "refsol"

    def __init__(self, *, group_size: int, loss: Loss) -> None:
        self.group_size = group_size
        self.loss = loss

    def contexts(
        self, problems: Sequence[Problem], groups: Sequence[Sequence[Rollout]]
    ) -> list[list[TeacherContext]]:
        """Return the problem's reference, once for every rollout."""
        return [
            [TeacherContext("reference", problem.reference)] * len(group)
            for problem, group in zip(problems, groups, strict=True)
        ]
