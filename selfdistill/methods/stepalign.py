"""StepAlignFB: the teacher sees a critique aligned step by step with this very attempt."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from functools import partial
from typing import Literal, TypeAlias

from selfdistill.config import StepAlignMethod
from selfdistill.critic.build import build_critic
from selfdistill.critic.interface import Critic, Critique, critique_all
from selfdistill.methods.distillation import distillation_method
from selfdistill.methods.method import Contexts, Method
from selfdistill.model.device import resolve_device
from selfdistill.prompts.context import TeacherContext
from selfdistill.rollout.attempts import Attempts
from selfdistill.tasks.interface import Problem, Task

Fallback: TypeAlias = Literal["drop", "reference"]


def stepalign(settings: StepAlignMethod, task: Task, *, device: str, today: date | None) -> Method:
    """Build step-aligned feedback (arXiv 2606.11173).

    The critic copies what is right word by word and rewrites from the first wrong step on, so that
    the teacher agrees with the attempt up to the error and disagrees sharply at it.

    Args:
        settings: of the method; the critic is among them.
        task: see `build_critic`.
        device, today: see `build_method`.

    Raises:
        ConfigError: see `build_critic`.
    """
    critic = build_critic(settings.critic, task, device=resolve_device(device), today=today)
    fallback = settings.critic.fallback if settings.critic.name == "llm" else "drop"
    contexts = partial(critiques, critic, fallback=fallback)
    return distillation_method(settings, task, contexts, critic=critic)


def critiques(
    critic: Critic, attempts: Sequence[Attempts], *, fallback: Fallback = "drop"
) -> Contexts:
    """Return the critique of every rollout; None where the critic has nothing to say.

    Args:
        critic: writes one critique for each rollout.
        attempts: judged rollouts.
        fallback: what a rollout without a usable critique gets: nothing ("drop"), or the reference
            solution where the problem has one.
    """
    return [
        [_context(attempt.problem, critique, fallback) for critique in found]
        for attempt, found in zip(attempts, critique_all(critic, attempts), strict=True)
    ]


def _context(
    problem: Problem, critique: Critique | None, fallback: Fallback
) -> TeacherContext | None:
    if critique is not None and critique.text.strip():
        return TeacherContext("critique", critique.text)
    if fallback == "reference" and problem.reference.strip():
        return TeacherContext("reference", problem.reference)
    return None
