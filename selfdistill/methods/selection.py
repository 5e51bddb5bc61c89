"""Tokens that are worth learning from, chosen before the loss (TIP, arXiv 2604.14084).

The loss visits the rows of its mask alone: a token that was not chosen costs one row of the scores
that choose, and no more. With share r and a head that learns, in products of all tokens with the
head, where the whole loss has 4 (scores of student and teacher, gradients of states and head):
"entropy" 1 + 4 r, "confident" 2 + 4 r.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from selfdistill.config import TokenSelectionConfig
from selfdistill.model.lm_head import LMHead
from selfdistill.model.scoring import ScoredTokens
from selfdistill_kernels import DistillationOutput, fused_linear_logprobs
from selfdistill_kernels.integrations import fused_head_distillation


def selected_loss(
    settings: TokenSelectionConfig,
    scored: ScoredTokens,
    fused: Callable[..., DistillationOutput],
    student: LMHead,
    *,
    temperature: float,
    mask: Tensor | None,
) -> DistillationOutput:
    """Return the loss of the tokens that the rule keeps of each rollout.

    With "entropy" the others have no divergence and no advantage (0), because the teacher's scores
    of them are not computed; their entropy is there with either rule.

    Args:
        settings: the rule, and the share of each rollout's tokens (rounded up).
        scored: the tokens.
        fused: the loss; takes a mask.
        student: the head.
        temperature: of the loss.
        mask: [T] bool, the tokens that are compared at all; None: all of them.
    """
    if settings.rule == "entropy":
        with torch.no_grad():
            entropy = _entropy(scored, student, temperature)
        kept = _largest(entropy, scored, settings.share)
        return replace(fused(mask=kept if mask is None else kept & mask), entropy=entropy)
    with torch.no_grad():
        output = fused()
    sure = torch.cat([own <= own.median() for own in _by_rollout(output.entropy, scored)])
    ranked = torch.where(sure, output.divergence, -torch.inf)
    kept = _largest(ranked, scored, settings.share)
    kept = kept if mask is None else kept & mask
    return replace(output, loss=fused(mask=kept).loss, active=kept)


def _entropy(scored: ScoredTokens, student: LMHead, temperature: float) -> Tensor:
    """[T] of the student's next-token distributions, nats."""
    hidden, head = scored.student_hidden, student.values
    if head.low_rank:  # the one function that knows adapters of the head wants two models
        return fused_head_distillation(hidden, hidden, head, head, temperature=temperature).entropy
    return fused_linear_logprobs(
        hidden,
        head.weight,
        scored.targets,
        bias=head.bias,
        temperature=temperature,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
    ).entropy


def _by_rollout(values: Tensor, scored: ScoredTokens) -> Sequence[Tensor]:
    return values.split([int(length) for length in scored.rollout_index.bincount()])


def _largest(values: Tensor, scored: ScoredTokens, share: float) -> Tensor:
    """[T] bool, of each rollout the share with the largest values; never one of -infinity."""
    kept = []
    for own in _by_rollout(values, scored):
        chosen = torch.zeros_like(own, dtype=torch.bool)
        chosen[own.topk(math.ceil(share * len(own))).indices] = True
        kept.append(chosen & (own > -torch.inf))
    return torch.cat(kept)
