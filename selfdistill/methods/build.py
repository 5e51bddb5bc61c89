"""The configured method."""

from __future__ import annotations

from collections import Counter

from selfdistill.config import Config, ConfigError, LossConfig
from selfdistill.critic.build import build_critic
from selfdistill.critic.llm import LLMCritic
from selfdistill.methods.distillation import DistillationLoss
from selfdistill.methods.environment import Environment
from selfdistill.methods.grpo import GRPO, GRPOLoss
from selfdistill.methods.method import Method
from selfdistill.methods.peer import Peer
from selfdistill.methods.refsol import RefSol
from selfdistill.methods.stepalign import StepAlign
from selfdistill.model.device import resolve_device
from selfdistill.tasks.interface import SteppedTask, Task


def build_method(config: Config, task: Task) -> Method:
    """Build the configured method.

    Raises:
        ConfigError: the loss asks for steps that the task does not know; or see `build_critic`.
    """
    settings = config.method
    if settings.name == "grpo":
        return GRPO(
            group_size=settings.group_size,
            loss=GRPOLoss(
                temperature=config.rollout.temperature,
                clip_low=settings.clip_low,
                clip_high=settings.clip_high,
                normalize_std=settings.normalize_std,
                kl_coefficient=0.0 if settings.kl is None else settings.kl.coefficient,
            ),
        )
    loss = DistillationLoss(settings.loss)
    _check_steps_known(settings.loss, task)
    match settings.name:
        case "stepalign":
            critic = settings.critic
            return StepAlign(
                critic=build_critic(
                    critic, task, device=resolve_device(config.device), today=config.prompt.date
                ),
                group_size=settings.group_size,
                loss=loss,
                fallback=critic.fallback if critic.name == "llm" else "drop",
            )
        case "refsol":
            return RefSol(group_size=settings.group_size, loss=loss)
        case "peer":
            return Peer(group_size=settings.group_size, loss=loss)
        case "environment":
            return Environment(
                task=task, detail=settings.detail, group_size=settings.group_size, loss=loss
            )


def why_without_context(method: Method) -> Counter[str]:
    """Count why rollouts of the last `contexts` call got none, where a critic can tell."""
    if isinstance(method, StepAlign) and isinstance(method.critic, LLMCritic):
        return method.critic.unusable
    return Counter()


def _check_steps_known(loss: LossConfig, task: Task) -> None:
    if isinstance(task, SteppedTask):
        return
    mask = loss.advantage_mask
    asked = {
        "advantage_mask.per_step": mask is not None and mask.per_step,
        "stop_after_first_wrong_step": loss.stop_after_first_wrong_step,
    }
    for name, is_set in asked.items():
        if is_set:
            raise ConfigError(
                f"method.loss.{name} is set, but the task {task.name!r} does not know the steps of "
                "a response: leave it out, or give the task `step_spans` and verdicts on steps"
            )
