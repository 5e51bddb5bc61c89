"""GRPO: no teacher; the group's own binary rewards say which rollouts to make more likely."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from selfdistill.config import GRPOMethod
from selfdistill.methods.method import Contexts, Method
from selfdistill.methods.policy_gradient import PolicyGradientLoss, known
from selfdistill.model.layout import PromptGroup
from selfdistill.model.lm_head import LMHead
from selfdistill.model.scoring import ScoredTokens
from selfdistill.rollout.attempts import Attempts


def grpo(settings: GRPOMethod, *, temperature: float) -> Method:
    """Build group-relative policy optimisation (arXiv 2402.03300).

    The baseline of arXiv 2606.11173: the rollouts of a prompt are compared with each other.

    Args:
        settings: of the method.
        temperature: at which the rollouts are sampled.
    """
    loss = GRPOLoss(
        temperature=temperature,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        normalize_std=settings.normalize_std,
        kl_coefficient=0.0 if settings.kl is None else settings.kl.coefficient,
    )
    return Method(settings.name, settings.group_size, loss, no_contexts, needs_context=False)


def no_contexts(attempts: Sequence[Attempts]) -> Contexts:
    """Return no context: the base model, if it is asked, sees what the student sees."""
    return [[None] * len(attempt.rollouts) for attempt in attempts]


class GRPOLoss(PolicyGradientLoss):
    """The policy gradient of group-normalised rewards (see `PolicyGradientLoss`).

    A token of rollout i has the advantage A_i = (r_i - mean(r)) / std(r) over the rollout's group;
    std has the denominator G - 1. A group whose rewards are all equal is not read without the KL
    penalty; its tokens stay in the denominator, so that a rare success weighs no more than one of
    many.

    Args:
        temperature, clip_low, clip_high, kl_coefficient: see `PolicyGradientLoss`.
        normalize_std: divide the advantage by the group's standard deviation.
    """

    def __init__(
        self,
        *,
        temperature: float,
        clip_low: float,
        clip_high: float,
        normalize_std: bool,
        kl_coefficient: float = 0.0,
    ) -> None:
        super().__init__(
            temperature=temperature,
            clip_low=clip_low,
            clip_high=clip_high,
            kl_coefficient=kl_coefficient,
        )
        self.normalize_std = normalize_std

    def advantages(self, scored: ScoredTokens, logprobs: Tensor, teacher: LMHead) -> Tensor:
        """Return [T] A_i on each token of rollout i."""
        rewards = known("scored.rewards", scored.rewards)
        return group_advantages(rewards, scored.rollout_group, normalize_std=self.normalize_std)[
            scored.rollout_index
        ]

    def has_advantages(self, group: PromptGroup) -> bool:
        """Return False for a group whose rewards are all equal."""
        return len(set(known("group.rewards", group.rewards))) > 1


def group_advantages(rewards: Tensor, group: Tensor, *, normalize_std: bool) -> Tensor:
    """Return each rollout's reward relative to its group.

    Args:
        rewards: [R] float.
        group: [R] int64, the group of each rollout.
        normalize_std: divide by the group's standard deviation (denominator G - 1).

    Returns:
        [R] (r - mean) / std, or r - mean; exactly 0 in a group whose rewards are all equal.
    """
    advantages = torch.zeros_like(rewards)
    for number in group.unique():
        of_group = group == number
        own = rewards[of_group]
        if (own == own[0]).all():
            continue
        own = own - own.mean()
        advantages[of_group] = own / own.std() if normalize_std else own
    return advantages
