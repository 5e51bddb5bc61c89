"""StepAlignFB: the teacher sees a critique aligned step by step with this very attempt."""

from __future__ import annotations

from collections.abc import Sequence

from selfdistill.context import TeacherContext
from selfdistill.critic import Critic, Critique
from selfdistill.evaluate import Attempts
from selfdistill.methods.loss import Loss


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
    needs_context = True

    def __init__(self, *, critic: Critic, group_size: int, loss: Loss) -> None:
        self.critic = critic
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
        return [[_context(next(critiques)) for _ in attempt.rollouts] for attempt in attempts]


def _context(critique: Critique) -> TeacherContext | None:
    return TeacherContext("critique", critique.text) if critique.text.strip() else None
