"""Peer success: the teacher sees another rollout of the same prompt that got the answer right."""

from __future__ import annotations

from collections.abc import Sequence

from selfdistill.config import PeerMethod
from selfdistill.methods.distillation import distillation_method
from selfdistill.methods.method import Contexts, Method
from selfdistill.prompts.context import TeacherContext
from selfdistill.rollout.attempts import Attempts
from selfdistill.tasks.interface import Task


def peer(settings: PeerMethod, task: Task) -> Method:
    """Build feedback by a successful peer's rollout, verbatim, as the reference solution.

    No solution from outside is needed: the group teaches itself, as far as one of it succeeds.
    """
    return distillation_method(settings, task, successful_peers)


def successful_peers(attempts: Sequence[Attempts]) -> Contexts:
    """Return a successful peer of every rollout, None where there is none.

    A rollout sees the next successful one of its group, round-robin, and never itself.
    """
    return [
        [_peer_of(place, attempt) for place in range(len(attempt.rollouts))] for attempt in attempts
    ]


def _peer_of(place: int, attempt: Attempts) -> TeacherContext | None:
    size = len(attempt.rollouts)
    for other in ((place + step) % size for step in range(1, size)):
        if attempt.verdicts[other].correct:
            return TeacherContext("reference", attempt.rollouts[other].text)
    return None
