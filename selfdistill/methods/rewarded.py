"""Rewards beside a self-teacher: GRPO's policy gradient and a divergence in one loss."""

from __future__ import annotations

from dataclasses import replace

from selfdistill.config import GroupRewards
from selfdistill.methods.distillation import DistillationLoss
from selfdistill.methods.grpo import GRPOLoss
from selfdistill.methods.method import Method
from selfdistill.model.layout import PromptGroup
from selfdistill.model.lm_head import LMHead
from selfdistill.model.scoring import ScoredTokens
from selfdistill_kernels import DistillationOutput


def rewarded(method: Method, settings: GroupRewards, *, temperature: float) -> Method:
    """Return a method that learns from rewards, too.

    Rollouts without context are kept: their reward counts, for them and for their group.

    Args:
        method: its student follows a self-teacher.
        settings: of the policy gradient.
        temperature: at which the rollouts are sampled.
    """
    assert isinstance(method.loss, DistillationLoss)
    loss = RewardedLoss(method.loss, settings, temperature=temperature)
    return replace(method, loss=loss, needs_context=False)


class RewardedLoss:
    """divergence + coefficient * policy gradient, of the same tokens in the same denominator.

    The models read the rollouts once. Each term makes logits of its own, and skips the backward
    product of the tokens that it gives no gradient. Where the teacher sees no more of a rollout
    than the student, its divergence does not count.

    Args:
        distillation: the divergence from the self-teacher, with its mask.
        settings: of the policy gradient.
        temperature: at which the rollouts are sampled.
    """

    needs_old_logprobs = True

    def __init__(
        self, distillation: DistillationLoss, settings: GroupRewards, *, temperature: float
    ) -> None:
        self.distillation = distillation
        self.policy = GRPOLoss(
            temperature=temperature,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            normalize_std=settings.normalize_std,
        )
        self.coefficient = settings.coefficient

    def denominator(self, group: PromptGroup) -> int:
        """Return the tokens of the group."""
        return self.policy.denominator(group)

    def learns_from(self, group: PromptGroup) -> bool:
        """Return True where the teacher sees something, or rewards differ."""
        seen = any(prompt != group.student_prompt for prompt in group.teacher_prompts)
        return seen or self.policy.learns_from(group)

    def __call__(
        self, scored: ScoredTokens, student: LMHead, teacher: LMHead, *, normalizer: float
    ) -> DistillationOutput:
        """Return the sum over tokens divided by `normalizer` (the tokens of the whole step).

        Of the statistics, divergence and advantage are the self-teacher's (0 without context), and
        `active` says which tokens have a gradient from either term.

        Raises:
            ValueError: what one of the two needs is missing.
        """
        heads = (student, teacher)
        assert scored.has_context is not None  # a teacher has scored
        seen = self.distillation(
            scored,
            *heads,
            normalizer=normalizer,
            mask=scored.has_context[scored.rollout_index],
        )
        rewarded = self.policy(scored, *heads, normalizer=normalizer)
        return replace(
            seen,
            loss=seen.loss + self.coefficient * rewarded.loss,
            student_logprob=rewarded.student_logprob,
            entropy=rewarded.entropy,
            active=seen.active | rewarded.active,
        )
