"""Peer success: the teacher sees another rollout of the same prompt that got the answer right."""

from __future__ import annotations

from collections.abc import Sequence

from selfdistill.methods.loss import Loss
from selfdistill.prompts.context import TeacherContext
from selfdistill.rollout.attempts import Attempts


class Peer:
    """A successful peer's rollout, verbatim, as the reference solution.

    No solution from outside is needed: the group teaches itself, as far as one of it succeeds. A
    rollout sees the next successful one of its group, counted in a circle, and never itself; where
    there is none it has no context and is left out.

    Args:
        group_size: rollouts drawn for each prompt, at least 2.
        loss: what is minimised on the completion tokens.
    """

    name = "peer"
    needs_context = True

    def __init__(self, *, group_size: int, loss: Loss) -> None:
        self.group_size = group_size
        self.loss = loss

    def contexts(self, attempts: Sequence[Attempts]) -> list[list[TeacherContext | None]]:
        """Return a successful peer of every rollout, None where there is none."""
        return [
            [self._peer_of(place, attempt) for place in range(len(attempt.rollouts))]
            for attempt in attempts
        ]

    def _peer_of(self, place: int, attempt: Attempts) -> TeacherContext | None:
        size = len(attempt.rollouts)
        for other in ((place + step) % size for step in range(1, size)):
            if attempt.verdicts[other].correct:
                return TeacherContext("reference", attempt.rollouts[other].text)
        return None
