"""Critics turn a student's attempt into the step-aligned text that the self-teacher sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from selfdistill.rollout.attempts import Attempts
from selfdistill.tasks.interface import Problem

CritiqueCase = Literal["A", "B", "C", "D"]


@dataclass(frozen=True)
class Critique:
    """A faithful scribe's rewriting of one attempt (arXiv 2606.11173, schema A-D).

    Attributes:
        case: A fully correct, B right answer with a step missing, C incomplete, D wrong.
        text: the critique, ready to be rendered as teacher context; empty: nothing to say.
        first_wrong_step: 1-based number of the first rewritten step, or None.
    """

    case: CritiqueCase
    text: str
    first_wrong_step: int | None


class Critic(Protocol):
    """Anything that critiques a batch of attempts.

    Attributes:
        unusable: how many answers of the last call were no critique, by reason.
    """

    unusable: Counter[str]

    def critique(
        self, problems: Sequence[Problem], responses: Sequence[str]
    ) -> Sequence[Critique | None]:
        """Return one critique per (problem, response) pair, in order.

        None: the critic has nothing usable to say about this one.
        """
        ...


def critique_all(critic: Critic, attempts: Sequence[Attempts]) -> list[list[Critique | None]]:
    """Return the critique of every rollout, a list for each problem."""
    found = iter(
        critic.critique(
            [attempt.problem for attempt in attempts for _ in attempt.rollouts],
            [rollout.text for attempt in attempts for rollout in attempt.rollouts],
        )
    )
    return [[next(found) for _ in attempt.rollouts] for attempt in attempts]
