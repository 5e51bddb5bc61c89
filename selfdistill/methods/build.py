"""The configured method."""

from __future__ import annotations

from datetime import date

from selfdistill.config import DistillationMethod, MethodConfig
from selfdistill.methods.method import Method
from selfdistill.tasks.interface import Task


def build_method(
    settings: MethodConfig, task: Task, *, temperature: float, device: str, today: date | None
) -> Method:
    """Build the configured method; the others are not loaded.

    Args:
        settings: which method, and how.
        task: what it teaches.
        temperature: at which the rollouts are sampled.
        device: where a critic that is a language model of this process runs.
        today: the date that its chat template is told; None: that of this day.

    Raises:
        ConfigError: the loss asks for steps that the task does not know; or see `build_critic`.
    """
    match settings.name:
        case "grpo":
            from selfdistill.methods.grpo import grpo

            return grpo(settings, temperature=temperature)
        case "wrong_step":
            from selfdistill.methods.wrong_step import wrong_step

            return wrong_step(settings, task, temperature=temperature, device=device, today=today)
        case "contrast":
            from selfdistill.methods.contrast import contrast

            return contrast(settings, task, temperature=temperature, device=device, today=today)
    method = _distillation(settings, task, device=device, today=today)
    if settings.reward is None:
        return method
    from selfdistill.methods.rewarded import rewarded

    return rewarded(method, settings.reward, temperature=temperature)


def _distillation(
    settings: DistillationMethod, task: Task, *, device: str, today: date | None
) -> Method:
    """Build a method whose student follows a self-teacher."""
    match settings.name:
        case "stepalign":
            from selfdistill.methods.stepalign import stepalign

            return stepalign(settings, task, device=device, today=today)
        case "refsol":
            from selfdistill.methods.refsol import refsol

            return refsol(settings, task)
        case "peer":
            from selfdistill.methods.peer import peer

            return peer(settings, task)
        case "environment":
            from selfdistill.methods.environment import environment

            return environment(settings, task)
