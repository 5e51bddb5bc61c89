"""What is asked about the rollouts of an engine with weights of its own before they are used."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from selfdistill.config import RolloutConfig
from selfdistill.methods.method import Method
from selfdistill.model.lm_head import LMHead
from selfdistill.model.weights import Student
from selfdistill.rollout.engine import Rollout
from selfdistill.training.agreement import check_agreement, with_own_logprobs
from selfdistill.training.solver import sampling_params


def check_engine(
    settings: RolloutConfig,
    step: int,
    student: Student,
    head: LMHead,
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Sequence[Rollout]],
    attention: str,
) -> float | None:
    """Compare the log-probs of an engine that has weights of its own with the student's.

    One prompt's rollouts are enough, of several servers one for each (the first prompts go to one
    server each): wrong weights are wrong everywhere.

    Returns:
        The largest difference in nats, or None when there is nothing to compare at this step.

    Raises:
        EngineMismatchError: it is larger than the configured tolerance.
    """
    engine = settings.engine
    if engine.name == "transformers" or step % engine.check_every != 0 or not groups:
        return None
    engines = len(engine.base_urls) if engine.name == "vllm_server" else 1
    exact = engine.dtype == "float32" and student.dtype == torch.float32
    return check_agreement(
        student,
        head,
        prompts[:engines],
        groups[:engines],
        params=sampling_params(settings, 0),
        tolerance=engine.tolerance or (1e-4 if exact else 1.0),
        attention=attention,
    )


def complete_logprobs(
    settings: RolloutConfig,
    method: Method,
    student: Student,
    head: LMHead,
    prompts: Sequence[Sequence[int]],
    groups: list[list[Rollout]],
    attention: str,
) -> list[list[Rollout]]:
    """Return rollouts that know how likely the student itself would have drawn each token.

    Engines with weights of their own do not say it, where sampling cuts something off.
    """
    cuts = sampling_params(settings, 0).truncates
    if settings.engine.name == "transformers" or not (cuts and method.loss.needs_old_logprobs):
        return groups
    return with_own_logprobs(
        student, head, prompts, groups, temperature=settings.temperature, attention=attention
    )
