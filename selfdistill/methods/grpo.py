"""GRPO: no teacher; the group's own binary rewards say which rollouts to make more likely."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from selfdistill.config import GRPOMethod
from selfdistill.methods.method import Contexts, Method
from selfdistill.model.layout import PromptGroup
from selfdistill.model.lm_head import LMHead
from selfdistill.model.scoring import ScoredTokens
from selfdistill.rollout.attempts import Attempts
from selfdistill_kernels import DistillationOutput, fused_linear_logprobs


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


class GRPOLoss:
    """The clipped policy gradient of group-normalised rewards, with an optional KL penalty.

    For a token y of rollout i, S the student and S_old the policy that sampled it, both at the
    sampling temperature:

        ratio = S(y) / S_old(y)           A_i = (r_i - mean(r)) / std(r) over the rollout's group
        loss  = -min(ratio A_i, clip(ratio, 1 - clip_low, 1 + clip_high) A_i) + kl_coefficient * k3
        k3    = R(y) / S(y) - log(R(y) / S(y)) - 1            of the frozen base model R

    std has the denominator G - 1; R is what others call the reference model. k3 is an unbiased,
    never negative estimate of KL(S || R) from the sampled token: it needs one more forward product
    with the head, where the exact divergence needs one more backward product as well.

    Rollouts with A = 0 have no gradient without the KL penalty, nor have clipped tokens; neither
    costs a backward product. A group whose rewards are all equal need not even be read
    (`learns_from`); its tokens stay in the denominator, so that a rare success weighs no more than
    one of many.

    Args:
        temperature: at which the rollouts were sampled.
        clip_low, clip_high: how far the ratio may fall and rise before the gradient stops.
        normalize_std: divide the advantage by the group's standard deviation.
        kl_coefficient: weight of k3; 0 needs no base model.
    """

    needs_old_logprobs = True

    def __init__(
        self,
        *,
        temperature: float,
        clip_low: float,
        clip_high: float,
        normalize_std: bool,
        kl_coefficient: float,
    ) -> None:
        self.temperature = temperature
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.normalize_std = normalize_std
        self.kl_coefficient = kl_coefficient

    def denominator(self, group: PromptGroup) -> int:
        """Return the tokens of the group, read or not."""
        return group.num_tokens

    def learns_from(self, group: PromptGroup) -> bool:
        """Return False for a group whose rewards are all equal, unless the KL penalty reads it."""
        return self.kl_coefficient > 0 or len(set(_known("group.rewards", group.rewards))) > 1

    def __call__(
        self, scored: ScoredTokens, student: LMHead, teacher: LMHead, *, normalizer: float
    ) -> DistillationOutput:
        """Return the sum over tokens divided by `normalizer` (the tokens of the whole step).

        Of the statistics, `advantage` is A_i on each token and `divergence` is k3 (0 without a
        KL penalty).

        Raises:
            ValueError: rewards, sampling log-probs or the base model's states are missing.
        """
        rewards = _known("scored.rewards", scored.rewards)
        old_logprobs = _known("scored.old_logprobs", scored.old_logprobs)
        advantage = group_advantages(
            rewards, scored.rollout_group, normalize_std=self.normalize_std
        )[scored.rollout_index]
        logprobs, entropy = self._logprobs(scored.student_hidden, scored.targets, student)
        ratio = torch.exp(logprobs - old_logprobs)
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        surrogate = torch.minimum(ratio * advantage, clipped * advantage)
        loss = -surrogate
        # Beyond the clip, on the side that the advantage pushes to, nothing is left to gain.
        active = torch.where(advantage > 0, ratio <= clipped, ratio >= clipped) & (advantage != 0)
        divergence, base_logprobs = torch.zeros_like(logprobs), None
        if self.kl_coefficient > 0:
            hidden = _known("scored.teacher_hidden", scored.teacher_hidden)
            with torch.no_grad():
                base_logprobs, _ = self._logprobs(hidden, scored.targets, teacher)
            log_ratio = base_logprobs - logprobs
            divergence = torch.expm1(log_ratio) - log_ratio
            loss = loss + self.kl_coefficient * divergence
            active = active | (log_ratio != 0)
        return DistillationOutput(
            loss=loss.sum() / normalizer,
            divergence=divergence.detach(),
            student_logprob=logprobs.detach(),
            teacher_logprob=base_logprobs,
            advantage=advantage,
            entropy=entropy.detach(),
            teacher_entropy=torch.zeros_like(entropy),
            active=active.detach(),
        )

    def _logprobs(self, hidden: Tensor, targets: Tensor, head: LMHead) -> tuple[Tensor, Tensor]:
        found = fused_linear_logprobs(
            hidden,
            head.weight,
            targets,
            bias=head.bias,
            temperature=self.temperature,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
        )
        return found.logprobs, found.entropy


T = TypeVar("T")


def _known(name: str, value: T | None) -> T:
    if value is None:
        raise ValueError(
            f"{name} is missing: GRPO needs the rewards and sampling log-probs of every rollout, "
            "and a teacher's states for its KL penalty"
        )
    return value


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
