"""The configured critic."""

from __future__ import annotations

from datetime import date
from functools import partial

from selfdistill.config import ConfigError, CriticConfig
from selfdistill.critic.interface import Critic
from selfdistill.tasks.interface import SteppedTask, Task, check_all


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
        ConfigError: the scribe was asked for, and the task knows no steps; or a language model has
            no room for an answer.
        UnusableModelError: a local model cannot be loaded.
        EngineError: its engine cannot start.
    """
    match config.name:
        case "scribe":
            from selfdistill.critic.scribe import ScribeCritic

            if not isinstance(task, SteppedTask):
                raise ConfigError(
                    "method.critic: the scribe rewrites steps that the task can check and write, "
                    f"and the task is {task.name}, which knows no steps: choose another critic or "
                    "another method"
                )
            return ScribeCritic(task, copying=config.copying, error_rate=config.error_rate)
        case "llm":
            from selfdistill.critic.llm import SHORTEST_PROMPT, LLMCritic
            from selfdistill.critic.textgen.build import build_text_generator

            generator = build_text_generator(config.engine, device=device, today=today)
            generator.check(SHORTEST_PROMPT)
            return LLMCritic(
                generator,
                check=partial(check_all, task) if config.check_answer else None,
                show_reference=config.show_reference,
            )
