"""StepAlignFB: the teacher sees a critique aligned step by step with this very attempt."""

from __future__ import annotations

from collections.abc import Sequence

from selfdistill.context import TeacherContext
from selfdistill.critic import Critic
from selfdistill.methods.loss import Loss
from selfdistill.rollout import Rollout
from selfdistill.tasks import Problem


class StepAlign:
    """Step-aligned feedback (arXiv 2606.11173).

    The critic copies what is right word by word and rewrites from the first wrong step on, so that
    the teacher agrees with the attempt up to the error and disagrees sharply at it.

    Args:
        critic: writes one critique for each rollout.
        group_size: rollouts drawn for each prompt.
        loss: what is minimised on the completion tokens.
    """

    name = "stepalign"

    def __init__(self, *, critic: Critic, group_size: int, loss: Loss) -> None:
        self.critic = critic
        self.group_size = group_size
        self.loss = loss

    def contexts(
        self, problems: Sequence[Problem], groups: Sequence[Sequence[Rollout]]
    ) -> list[list[TeacherContext]]:
        """Return the critique of every rollout."""
        attempts = [
            (problem, rollout.text)
            for problem, group in zip(problems, groups, strict=True)
            for rollout in group
        ]
        critiques = iter(
            self.critic.critique(
                [problem for problem, _ in attempts], [text for _, text in attempts]
            )
        )
        return [
            [TeacherContext("critique", next(critiques).text) for _ in group] for group in groups
        ]
