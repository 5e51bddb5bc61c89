"""What a method is: what the self-teacher sees, and the loss that makes the student follow it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from selfdistill.methods.loss import Loss
from selfdistill.prompts.context import TeacherContext
from selfdistill.rollout.attempts import Attempts


class Method(Protocol):
    """One way of learning from one's own rollouts; a new one is one file.

    Attributes:
        name: as written in a configuration.
        group_size: rollouts drawn for each prompt.
        loss: what is minimised on the completion tokens.
        needs_context: True when a rollout without context teaches nothing and is left out; False
            when the teacher (or the reference model) then sees what the student sees.
    """

    name: str
    group_size: int
    loss: Loss
    needs_context: bool

    def contexts(self, attempts: Sequence[Attempts]) -> list[list[TeacherContext | None]]:
        """Return what the teacher sees beside the question: one entry per rollout.

        None: there is nothing to show for this rollout.
        """
        ...
