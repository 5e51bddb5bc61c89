"""One constant negative advantage on the first wrong step: where, and nothing about how much."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date

import torch
from torch import Tensor

from selfdistill.config import ConfigError, WrongStepMethod
from selfdistill.critic.build import build_critic
from selfdistill.critic.interface import Critic, Critique, critique_all
from selfdistill.methods.method import Contexts, Method
from selfdistill.methods.policy_gradient import PolicyGradientLoss, known
from selfdistill.model.device import resolve_device
from selfdistill.model.layout import PromptGroup
from selfdistill.model.lm_head import LMHead
from selfdistill.model.scoring import ScoredTokens
from selfdistill.prompts.context import TeacherContext
from selfdistill.rollout.attempts import Attempts
from selfdistill.tasks.interface import StepTask, Task


def wrong_step(
    settings: WrongStepMethod, task: Task, *, temperature: float, device: str, today: date | None
) -> Method:
    """Build the penalty on the first wrong step.

    From what is reported of arXiv 2608.31046: one constant negative advantage on the wrong step
    matches the teacher's advantages. Ours are that a critic says which step it is, that only
    attempts with a wrong answer (case D of its schema) are blamed, and the clipped ratio.

    Args:
        settings: of the method; the critic is among them.
        task: must know the steps of a response.
        temperature: at which the rollouts are sampled.
        device, today: see `build_method`.

    Raises:
        ConfigError: the task knows no steps; or see `build_critic`.
    """
    if not isinstance(task, StepTask):
        raise ConfigError(
            f"method wrong_step: the task {task.name!r} does not know the steps of a response, so "
            "none can be blamed: choose another method, or let the task implement `StepTask`"
        )
    steps: StepTask = task
    critic = build_critic(settings.critic, task, device=resolve_device(device), today=today)
    loss = WrongStepLoss(
        penalty=settings.penalty,
        temperature=temperature,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        kl_coefficient=0.0 if settings.kl is None else settings.kl.coefficient,
    )
    return Method(
        settings.name,
        settings.group_size,
        loss,
        lambda attempts: blamed(steps, critic, attempts),
        needs_context=False,
        reads_context=False,
        critic=critic,
    )


def blamed(task: StepTask, critic: Critic, attempts: Sequence[Attempts]) -> Contexts:
    """Return the critique of every rollout with its first wrong step; None without a critique.

    Args:
        task: knows where the steps of a response are.
        critic: says which one is the first wrong one.
        attempts: judged rollouts.
    """
    return [
        [
            _context(task, rollout.text, critique)
            for rollout, critique in zip(attempt.rollouts, found, strict=True)
        ]
        for attempt, found in zip(attempts, critique_all(critic, attempts), strict=True)
    ]


def _context(task: StepTask, response: str, critique: Critique | None) -> TeacherContext | None:
    if critique is None or not critique.text.strip():
        return None
    span, number = None, critique.first_wrong_step
    if critique.case == "D" and number is not None:
        steps = task.step_spans(response)
        span = steps[number - 1] if number <= len(steps) else None  # a step that is missing
    return TeacherContext("critique", critique.text, span)


class WrongStepLoss(PolicyGradientLoss):
    """The policy gradient of -penalty on the tokens of the first wrong step, 0 on all others.

    A group without a wrong step is not read without the KL penalty.

    Args:
        temperature, clip_low, clip_high, kl_coefficient: see `PolicyGradientLoss`.
        penalty: how large the negative advantage is.
    """

    def __init__(
        self,
        *,
        penalty: float,
        temperature: float,
        clip_low: float,
        clip_high: float,
        kl_coefficient: float = 0.0,
    ) -> None:
        super().__init__(
            temperature=temperature,
            clip_low=clip_low,
            clip_high=clip_high,
            kl_coefficient=kl_coefficient,
        )
        self.penalty = penalty

    def advantages(self, scored: ScoredTokens, logprobs: Tensor, teacher: LMHead) -> Tensor:
        """Return [T] -penalty on wrong tokens, else 0."""
        wrong = known("scored.wrong", scored.wrong)
        return torch.zeros_like(logprobs).masked_fill(wrong, -self.penalty)

    def has_advantages(self, group: PromptGroup) -> bool:
        """Return False for a group without a wrong step."""
        return any(map(any, known("group.wrong", group.wrong)))
