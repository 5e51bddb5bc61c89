"""StepAlignFB: the teacher sees a critique aligned step by step with this very attempt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from selfdistill.critic.interface import Critic, Critique
from selfdistill.methods.loss import Loss
from selfdistill.prompts.context import TeacherContext
from selfdistill.rollout.attempts import Attempts
from selfdistill.tasks.interface import Problem


class StepAlign:
    """Step-aligned feedback (arXiv 2606.11173).

    The critic copies what is right word by word and rewrites from the first wrong step on, so that
    the teacher agrees with the attempt up to the error and disagrees sharply at it.

    Args:
        critic: writes one critique for each rollout.
        fallback: what a rollout without a usable critique gets: nothing ("drop"), or the reference
            solution where the problem has one.
        group_size: rollouts drawn for each prompt.
        loss: what is minimised on the completion tokens.
    """

    name = "stepalign"
    needs_context = True

    def __init__(
        self,
        *,
        critic: Critic,
        group_size: int,
        loss: Loss,
        fallback: Literal["drop", "reference"] = "drop",
    ) -> None:
        self.critic = critic
        self.fallback = fallback
        self.group_size = group_size
        self.loss = loss

    def contexts(self, attempts: Sequence[Attempts]) -> list[list[TeacherContext | None]]:
        """Return the critique of every rollout; None where the critic has nothing to say."""
        critiques = iter(
            self.critic.critique(
                [attempt.problem for attempt in attempts for _ in attempt.rollouts],
                [rollout.text for attempt in attempts for rollout in attempt.rollouts],
            )
        )
        return [
            [self._context(attempt.problem, next(critiques)) for _ in attempt.rollouts]
            for attempt in attempts
        ]

    def _context(self, problem: Problem, critique: Critique | None) -> TeacherContext | None:
        if critique is not None and critique.text.strip():
            return TeacherContext("critique", critique.text)
        if self.fallback == "reference" and problem.reference.strip():
            return TeacherContext("reference", problem.reference)
        return None
