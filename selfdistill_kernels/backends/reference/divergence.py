"""Divergences of two distributions from their log-probs; each line is a line of docs/math.md."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from selfdistill_kernels.objective import Objective


def expectation(logprobs: Tensor, values: Tensor) -> Tensor:
    """sum_v p_v values_v, where p_v = 0 contributes 0 even for an infinite value."""
    probs = logprobs.exp()
    return torch.where(probs == 0, probs, probs * values).sum(dim=1)


def _log_mixture(base: Tensor, other: Tensor, share: float) -> Tensor:
    """log((1 - share) e^base + share e^other): from the larger one, so that nothing overflows and
    two equal arguments give exactly themselves."""
    larger_is_other = other > base
    gap = torch.expm1(-(other - base).abs())
    return torch.where(
        larger_is_other, other + torch.log1p((1.0 - share) * gap), base + torch.log1p(share * gap)
    )


def divergence_of(log_s: Tensor, log_t: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Divergence [n] and the gradient's row constant [n]."""
    whole, pivot = _whole_divergence(log_s, log_t, objective)
    if objective.entry_clip is None or objective.kernel_divergence == "none":
        return whole, pivot
    values, _ = _entries(log_s, log_t, objective)
    clipped = values > objective.entry_clip
    is_clipped = clipped.any(dim=1)
    return torch.where(is_clipped, values.clamp(max=objective.entry_clip).sum(dim=1), whole), pivot


def _entries(log_s: Tensor, log_t: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """What each entry adds to the divergence, f_v, and d f_v / d log p_s(v), both [n, V]."""
    kind, beta = objective.kernel_divergence, objective.beta
    rest = 1.0 - beta

    def weighted(logprobs: Tensor, values: Tensor | float) -> Tensor:
        probs = logprobs.exp()
        return torch.where(probs == 0, probs, probs * values)

    if kind == "forward_kl":
        return weighted(log_t, log_t - log_s), -log_t.exp()
    if kind == "reverse_kl":
        return weighted(log_s, log_s - log_t), weighted(log_s, log_s - log_t + 1.0)
    log_m = _log_mixture(log_s, log_t, beta)
    student, teacher = weighted(log_s, log_s - log_m), weighted(log_t, log_t - log_m)
    if kind == "jsd":
        return beta * teacher + rest * student, rest * student
    if kind == "skew_kl":
        return teacher, -rest * weighted(log_s, (log_t - log_m).exp())
    return student, weighted(log_s, log_s - log_m + 1.0 - rest * (log_s - log_m).exp())


def _whole_divergence(log_s: Tensor, log_t: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    kind, beta = objective.kernel_divergence, objective.beta
    zero = log_s.new_zeros(log_s.shape[0])
    if kind == "none":
        return zero, zero
    if kind == "forward_kl":
        return expectation(log_t, log_t - log_s), zero
    if kind == "reverse_kl":
        return expectation(log_s, log_s - log_t), zero
    log_m = _log_mixture(log_s, log_t, beta)
    if kind == "jsd":
        student = expectation(log_s, log_s - log_m)
        teacher = expectation(log_t, log_t - log_m)
        return beta * teacher + (1.0 - beta) * student, student
    if kind == "skew_kl":
        return expectation(log_t, log_t - log_m), expectation(log_s, torch.expm1(log_t - log_m))
    return expectation(log_s, log_s - log_m), expectation(log_s, _skew_slope(log_s, log_m, beta))


def _skew_slope(log_s: Tensor, log_m: Tensor, beta: float) -> Tensor:
    """r of math.md, shifted by its constant so that equal distributions give exactly 0."""
    return log_s - log_m - (1.0 - beta) * torch.expm1(log_s - log_m)


def divergence_gradient(
    log_s: Tensor,
    log_t: Tensor,
    divergence: Tensor,
    pivot: Tensor,
    objective: Objective,
    over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Tensor:
    """d divergence / d student logits, [n, V]; `over_ranks` adds up sums [n] over shards."""
    whole = _whole_gradient(log_s, log_t, divergence, pivot, objective)
    if objective.entry_clip is None or objective.kernel_divergence == "none":
        return whole
    values, slopes = _entries(log_s, log_t, objective)
    clipped = values > objective.entry_clip
    slopes = torch.where(clipped, 0.0, slopes)
    made = slopes - log_s.exp() * over_ranks(slopes.sum(dim=1))[:, None]
    is_clipped = over_ranks(clipped.sum(dim=1).to(log_s.dtype)) > 0
    return torch.where(is_clipped[:, None], made, whole)


def _whole_gradient(
    log_s: Tensor, log_t: Tensor, divergence: Tensor, pivot: Tensor, objective: Objective
) -> Tensor:
    divergence, pivot = divergence[:, None], pivot[:, None]
    kind, beta = objective.kernel_divergence, objective.beta
    p_s = log_s.exp()
    if kind == "none":
        return torch.zeros_like(log_s)
    if kind == "forward_kl":
        # p_s - p_t from the larger of the two: keeps its digits when they nearly agree.
        p_t = log_t.exp()
        gap = torch.expm1(-(log_t - log_s).abs())
        difference = torch.where(log_t > log_s, p_t * gap, -p_s * gap)
        return torch.where((p_s == 0) & (p_t == 0), p_s, difference)
    if kind == "reverse_kl":
        return torch.where(p_s == 0, p_s, p_s * (log_s - log_t - divergence))
    log_m = _log_mixture(log_s, log_t, beta)
    if kind == "jsd":
        inner = (1.0 - beta) * (log_s - log_m - pivot)
    elif kind == "skew_kl":
        inner = (1.0 - beta) * (pivot - torch.expm1(log_t - log_m))
    else:
        inner = _skew_slope(log_s, log_m, beta) - pivot
    return torch.where(p_s == 0, p_s, p_s * inner)
