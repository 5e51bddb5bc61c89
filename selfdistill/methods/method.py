"""What a method is: what the self-teacher sees, and the loss that makes the student follow it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from selfdistill.critic.interface import Critic
from selfdistill.methods.loss import Loss
from selfdistill.prompts.context import TeacherContext
from selfdistill.rollout.attempts import Attempts

Contexts: TypeAlias = list[list[TeacherContext | None]]
"""What the teacher sees beside the question: a list for each problem, an entry for each rollout;
None where there is nothing to show."""
Gather: TypeAlias = Callable[[list[Any]], list[Any]]
"""From this rank's items to those of all ranks, in their order."""


@dataclass(frozen=True)
class Method:
    """One way of learning from one's own rollouts.

    Attributes:
        name: as written in a configuration.
        group_size: rollouts drawn for each prompt.
        loss: what is minimised on the completion tokens.
        contexts: says what the teacher sees with each of the judged rollouts.
        needs_context: True when a rollout without context teaches nothing and is left out; False
            when the teacher (of GRPO: the base model) then sees what the student sees.
        needs_steps: True when the loss must know the step of each token.
        stops_at_wrong_step: True when nothing behind a rollout's first wrong step counts.
        reads_context: False when nobody reads the contexts: they only say where an attempt is
            wrong (`TeacherContext.wrong_span`), and the loss must know its tokens.
        complete: adds to the contexts of this rank's attempts what only those of all ranks can say;
            it is given a function that returns the items of all ranks in order. None: nothing.
        critic: who writes the contexts, if somebody does.
    """

    name: str
    group_size: int
    loss: Loss
    contexts: Callable[[Sequence[Attempts]], Contexts]
    needs_context: bool = True
    needs_steps: bool = False
    stops_at_wrong_step: bool = False
    reads_context: bool = True
    complete: Callable[[Sequence[Attempts], Contexts, Gather], Contexts] | None = None
    critic: Critic | None = None

    @property
    def unusable(self) -> Counter[str]:
        """Answers to the last call of `contexts` that were no critique, counted by reason."""
        return Counter() if self.critic is None else self.critic.unusable
