"""The loss of a token from its statistics: who is active, what each term weighs, what it costs."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from selfdistill_kernels.advantage import Gate, token_gate
from selfdistill_kernels.objective import Objective
from selfdistill_kernels.statistics import Column, advantage_of


def active_tokens(
    statistics: Tensor, loss_weight: Tensor, exists: Tensor | None, gate: Gate | None
) -> Tensor:
    """[N] bool, the tokens that carry a gradient: they exist, have a weight and pass the gate."""
    active = loss_weight != 0
    if exists is not None:
        active &= exists
    if gate is not None:
        active &= token_gate(advantage_of(statistics), gate.sign, gate.threshold)
    return active


def importance_of(objective: Objective, logprob: Tensor, old_logprobs: Tensor | None) -> Tensor:
    """[N] truncated importance weight min(S(y) / S_old(y), clip), a constant."""
    if objective.importance_clip is None:
        return torch.ones_like(logprob)
    assert old_logprobs is not None
    # Clamped before exp: a ratio that overflows is clipped anyway, and 0 * inf must not occur.
    log_ratio = (logprob.detach() - old_logprobs).clamp(-20.0, 20.0)
    return log_ratio.exp().clamp(max=objective.importance_clip)


def term_weights_of(
    objective: Objective, statistics: Tensor, loss_weight: Tensor, old_logprobs: Tensor | None
) -> Tensor:
    """[N, 3] weights of divergence, -log S(y) and entropy for a weighted sum of token losses."""
    importance = importance_of(objective, statistics[:, Column.STUDENT_LOGPROB], old_logprobs)
    # Tokens without a weight may hold anything: 0 * nan must not occur.
    weight = torch.where(loss_weight == 0, loss_weight, loss_weight * importance)
    likelihood: float | Tensor = objective.cross_entropy
    if objective.policy_gradient:  # 0 * inf must not occur
        likelihood = likelihood + objective.policy_gradient * advantage_of(statistics)
    divergence = weight * float(objective.divergence != "none")
    if objective.divergence_clip is not None:
        clipped = statistics[:, Column.DIVERGENCE] > objective.divergence_clip
        divergence = divergence.masked_fill(clipped, 0.0)
    return torch.stack(
        [
            divergence,
            torch.where(weight == 0, weight, weight * likelihood),
            weight * objective.entropy,
        ],
        dim=1,
    )


def token_losses(
    objective: Objective,
    statistics: Tensor,
    loss_weight: Tensor,
    active: Tensor,
    old_logprobs: Tensor | None,
) -> Tensor:
    """Weighted loss of each token, [N], exactly 0 where a token is not active.

    Differentiable with respect to the statistics' DIVERGENCE, STUDENT_LOGPROB and ENTROPY.
    """
    # What a token without a loss holds may be infinite, and 0 times its derivative would be NaN.
    statistics = torch.where(active[:, None], statistics, 0.0)
    logprob = statistics[:, Column.STUDENT_LOGPROB]
    terms = []
    if objective.divergence != "none":
        divergence = statistics[:, Column.DIVERGENCE]
        if objective.divergence_clip is not None:
            divergence = divergence.clamp(max=objective.divergence_clip)
        terms.append(divergence)
    if objective.policy_gradient:
        terms.append(-objective.policy_gradient * advantage_of(statistics).detach() * logprob)
    if objective.cross_entropy:
        terms.append(-objective.cross_entropy * logprob)
    if objective.entropy:
        terms.append(objective.entropy * statistics[:, Column.ENTROPY])
    loss = functools.reduce(torch.add, terms)
    if objective.importance_clip is not None:
        loss = loss * importance_of(objective, logprob, old_logprobs)
    return torch.where(active, loss * loss_weight, 0.0)
