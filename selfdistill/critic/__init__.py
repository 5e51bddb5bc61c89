"""Critics turn a student's attempt into the step-aligned text that the self-teacher sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Literal, Protocol

from selfdistill.config import ConfigError, CriticConfig
from selfdistill.tasks import Problem, Task, check_all

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
    """Anything that critiques a batch of attempts."""

    def critique(
        self, problems: Sequence[Problem], responses: Sequence[str]
    ) -> Sequence[Critique | None]:
        """Return one critique per (problem, response) pair, in order.

        None: the critic has nothing usable to say about this one.
        """
        ...


def build_critic(
    config: CriticConfig, task: Task, *, device: str, today: date | None = None
) -> Critic:
    """Build the configured critic.

    Args:
        config: which critic.
        task: knows right steps (the scribe) and right answers (the language model).
        device: where a language model of this process runs.
        today: the date that its chat template is told; None: that of this day.

    Raises:
        ConfigError: the scribe was asked for, and the task is not the arithmetic one; or a
            language model has no room for an answer.
        UnusableModelError: a local model cannot be loaded.
        EngineError: its engine cannot start.
    """
    match config.name:
        case "scribe":
            from selfdistill.critic.scribe import ScribeCritic
            from selfdistill.tasks.arithmetic import ArithmeticTask

            if not isinstance(task, ArithmeticTask):
                raise ConfigError(
                    "method.critic: the scribe writes steps of the arithmetic task only, and the "
                    f"task is {task.name}: choose another critic or another method"
                )
            return ScribeCritic(task, copying=config.copying)
        case "llm":
            from selfdistill.critic.llm import SHORTEST_PROMPT, LLMCritic
            from selfdistill.critic.textgen import build_text_generator

            generator = build_text_generator(config.engine, device=device, today=today)
            generator.check(SHORTEST_PROMPT)
            return LLMCritic(
                generator,
                check=partial(check_all, task) if config.check_answer else None,
                show_reference=config.show_reference,
            )
