"""Divergences of two distributions from their log-probs; each line is a line of docs/math.md."""

from __future__ import annotations

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
    log_s: Tensor, log_t: Tensor, divergence: Tensor, pivot: Tensor, objective: Objective
) -> Tensor:
    """d divergence / d student logits, [n, V]."""
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
