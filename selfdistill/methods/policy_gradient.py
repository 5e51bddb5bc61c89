"""The policy gradient that several methods feed: each says what a token's advantage is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

import torch
from torch import Tensor

from selfdistill.model.layout import PromptGroup
from selfdistill.model.lm_head import LMHead
from selfdistill.model.scoring import ScoredTokens
from selfdistill_kernels import DistillationOutput, fused_linear_logprobs


class PolicyGradientLoss(ABC):
    """The clipped policy gradient of per-token advantages, with an optional KL penalty.

    For a token y with the advantage A, S the student and S_old the policy that sampled it, both at
    the sampling temperature:

        ratio = S(y) / S_old(y)
        loss  = -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) + kl_coefficient * k3
        k3    = R(y) / S(y) - log(R(y) / S(y)) - 1            of the frozen base model R

    R is what others call the reference model. k3 is an unbiased, never negative estimate of
    KL(S || R) from the sampled token: it needs one more forward product with the head, where the
    exact divergence needs one more backward product as well.

    Tokens with A = 0 have no gradient without the KL penalty, nor have clipped tokens; neither
    costs a backward product. A group that has no others need not even be read (`learns_from`); its
    tokens stay in the denominator.

    Args:
        temperature: at which the rollouts were sampled.
        clip_low, clip_high: how far the ratio may fall and rise before the gradient stops.
        kl_coefficient: weight of k3; 0 needs no base model.
    """

    needs_old_logprobs = True

    def __init__(
        self,
        *,
        temperature: float,
        clip_low: float,
        clip_high: float,
        kl_coefficient: float = 0.0,
    ) -> None:
        self.temperature = temperature
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.kl_coefficient = kl_coefficient

    @abstractmethod
    def advantages(self, scored: ScoredTokens, logprobs: Tensor, teacher: LMHead) -> Tensor:
        """Return [T] the advantage of each token, a constant.

        Args:
            scored: the tokens of whole groups.
            logprobs: [T] log S(y), without gradient.
            teacher: the teacher's head, where there is a teacher.
        """

    @abstractmethod
    def has_advantages(self, group: PromptGroup) -> bool:
        """Return False when all advantages of a group are known to be 0."""

    def denominator(self, group: PromptGroup) -> int:
        """Return the tokens of the group, read or not."""
        return group.num_tokens

    def learns_from(self, group: PromptGroup) -> bool:
        """Return False for a group without advantages, unless the KL penalty reads it."""
        return self.kl_coefficient > 0 or self.has_advantages(group)

    def __call__(
        self, scored: ScoredTokens, student: LMHead, teacher: LMHead, *, normalizer: float
    ) -> DistillationOutput:
        """Return the sum over tokens divided by `normalizer` (the tokens of the whole step).

        Of the statistics, `advantage` is A and `divergence` is k3 (0 without a KL penalty).

        Raises:
            ValueError: what the advantages are made of, sampling log-probs or the base model's
                states are missing.
        """
        old_logprobs = known("scored.old_logprobs", scored.old_logprobs)
        logprobs, entropy = self.logprobs(scored.student_hidden, scored.targets, student)
        advantage = self.advantages(scored, logprobs.detach(), teacher)
        ratio = torch.exp(logprobs - old_logprobs)
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        surrogate = torch.minimum(ratio * advantage, clipped * advantage)
        loss = -surrogate
        # Beyond the clip, on the side that the advantage pushes to, nothing is left to gain.
        active = torch.where(advantage > 0, ratio <= clipped, ratio >= clipped) & (advantage != 0)
        divergence, base_logprobs = torch.zeros_like(logprobs), None
        if self.kl_coefficient > 0:
            hidden = known("scored.teacher_hidden", scored.teacher_hidden)
            with torch.no_grad():
                base_logprobs, _ = self.logprobs(hidden, scored.targets, teacher)
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

    def logprobs(self, hidden: Tensor, targets: Tensor, head: LMHead) -> tuple[Tensor, Tensor]:
        """Return log-probs of the targets and entropies, [T] each, at the sampling temperature."""
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


def known(name: str, value: T | None) -> T:
    """Return what a policy gradient cannot do without.

    Raises:
        ValueError: it is None.
    """
    if value is None:
        raise ValueError(
            f"{name} is missing: a policy gradient needs the sampling log-probs of every rollout "
            "and what its advantages are made of, and a teacher's states for its KL penalty"
        )
    return value
