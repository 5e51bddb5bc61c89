"""The oracle: materialises [N, V] in plain torch, runs on every device.

Each line is a line of docs/math.md. It computes in float64 on the CPU and in float32 elsewhere
(not every device has float64); speed and memory are not its business.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from selfdistill_kernels.backends.base import (
    Gate,
    Gradients,
    LinearInputs,
    Needs,
    active_tokens,
    term_weights_of,
)
from selfdistill_kernels.objective import Objective
from selfdistill_kernels.statistics import Column, statistics_dtype


@dataclass(frozen=True)
class _Distribution:
    """Logits, log-probs and normalisers of n tokens."""

    logits: Tensor  # [n, V]
    logprobs: Tensor  # [n, V]
    maximum: Tensor  # [n]
    logsum: Tensor  # [n]

    @classmethod
    def of(cls, logits: Tensor) -> _Distribution:
        maximum = logits.amax(dim=1)
        centred = logits - maximum[:, None]
        logsum = centred.exp().sum(dim=1).log()
        return cls(logits, centred - logsum[:, None], maximum, logsum)

    def entropy(self) -> Tensor:
        return -_expectation(self.logprobs, self.logprobs)


def _expectation(logprobs: Tensor, values: Tensor) -> Tensor:
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


class ReferenceBackend:
    """Backend in plain torch."""

    def statistics(self, inputs: LinearInputs, objective: Objective, workspace: int) -> Tensor:
        rows = inputs.existing_rows()
        student, teacher = _distributions(inputs, rows)
        found = student.maximum.new_zeros((rows.numel(), len(Column)))
        found[:, Column.STUDENT_REFERENCE] = student.maximum
        found[:, Column.STUDENT_LOGSUM] = student.logsum
        found[:, Column.ENTROPY] = student.entropy()
        if inputs.targets is not None:
            target = inputs.targets[rows, None]
            found[:, Column.STUDENT_LOGPROB] = student.logprobs.gather(1, target)[:, 0]
        if teacher is not None:
            found[:, Column.TEACHER_REFERENCE] = teacher.maximum
            found[:, Column.TEACHER_LOGSUM] = teacher.logsum
            found[:, Column.TEACHER_ENTROPY] = teacher.entropy()
            if inputs.targets is not None:
                found[:, Column.TEACHER_LOGPROB] = teacher.logprobs.gather(1, target)[:, 0]
            divergence, pivot = _divergence(student.logprobs, teacher.logprobs, objective)
            found[:, Column.DIVERGENCE] = divergence
            found[:, Column.PIVOT] = pivot
        size, dtype = inputs.student_hidden.shape[0], inputs.student_hidden.dtype
        statistics = found.new_zeros((size, len(Column))).index_copy(0, rows, found)
        return statistics.to(statistics_dtype(dtype))

    def gradient(
        self,
        inputs: LinearInputs,
        objective: Objective,
        statistics: Tensor,
        term_weights: Tensor,
        needs: Needs,
        workspace: int,
    ) -> Gradients:
        chosen = (term_weights != 0).any(dim=1)
        if inputs.exists is not None:
            chosen &= inputs.exists
        rows = chosen.nonzero().squeeze(1)
        student, teacher = _distributions(inputs, rows)
        weights = term_weights[rows].to(student.logits.dtype)
        log_s, p_s = student.logprobs, student.logprobs.exp()
        gradient = torch.zeros_like(log_s)
        if teacher is not None:
            # Row constants anew rather than from `statistics`, which is rounded to float32.
            constants = _divergence(log_s, teacher.logprobs, objective)
            slope = _divergence_gradient(log_s, teacher.logprobs, *constants, objective)
            gradient += weights[:, 0:1] * slope
        if inputs.targets is not None:
            gradient += weights[:, 1:2] * p_s
            target = inputs.targets[rows, None]
            gradient.scatter_add_(1, target, -weights[:, 1:2])
        entropy = student.entropy()[:, None]
        gradient -= weights[:, 2:3] * torch.where(p_s == 0, p_s, p_s * (log_s + entropy))
        return _through_head(inputs, rows, inputs.transform.chain(gradient, student.logits), needs)

    def visit(
        self,
        inputs: LinearInputs,
        objective: Objective,
        gate: Gate | None,
        loss_weight: Tensor,
        old_logprobs: Tensor | None,
        needs: Needs,
        workspace: int,
    ) -> tuple[Tensor, Tensor, Gradients]:
        statistics = self.statistics(inputs, objective, workspace)
        active = active_tokens(statistics, loss_weight, inputs.exists, gate)
        weights = term_weights_of(objective, statistics, loss_weight * active, old_logprobs)
        return (
            statistics,
            active,
            self.gradient(inputs, objective, statistics, weights, needs, workspace)
            if needs
            else Gradients(None, None, None),
        )


def _distributions(
    inputs: LinearInputs, rows: Tensor
) -> tuple[_Distribution, _Distribution | None]:
    on_cpu = inputs.student_hidden.device.type == "cpu"
    dtype = torch.float64 if on_cpu else torch.float32

    def distribution(hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> _Distribution:
        raw = hidden[rows].to(dtype)
        if weight is not None:
            raw = raw @ weight.to(dtype).T
        return _Distribution.of(
            inputs.transform.apply(raw, None if bias is None else bias.to(dtype))
        )

    student = distribution(inputs.student_hidden, inputs.weight, inputs.bias)
    if inputs.teacher_hidden is None:
        return student, None
    return student, distribution(inputs.teacher_hidden, inputs.teacher_head, inputs.teacher_bias)


def _divergence(log_s: Tensor, log_t: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Divergence [n] and the gradient's row constant [n]."""
    kind, beta = objective.kernel_divergence, objective.beta
    zero = log_s.new_zeros(log_s.shape[0])
    if kind == "none":
        return zero, zero
    if kind == "forward_kl":
        return _expectation(log_t, log_t - log_s), zero
    if kind == "reverse_kl":
        return _expectation(log_s, log_s - log_t), zero
    log_m = _log_mixture(log_s, log_t, beta)
    if kind == "jsd":
        student = _expectation(log_s, log_s - log_m)
        teacher = _expectation(log_t, log_t - log_m)
        return beta * teacher + (1.0 - beta) * student, student
    if kind == "skew_kl":
        return _expectation(log_t, log_t - log_m), _expectation(log_s, torch.expm1(log_t - log_m))
    return _expectation(log_s, log_s - log_m), _expectation(log_s, _skew_slope(log_s, log_m, beta))


def _skew_slope(log_s: Tensor, log_m: Tensor, beta: float) -> Tensor:
    """r of math.md, shifted by its constant so that equal distributions give exactly 0."""
    return log_s - log_m - (1.0 - beta) * torch.expm1(log_s - log_m)


def _divergence_gradient(
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


def _through_head(inputs: LinearInputs, rows: Tensor, gradient: Tensor, needs: Needs) -> Gradients:
    """The gradient GEMMs: dH = dz W, dW = dz^T h, db = sum dz."""
    hidden = weight = bias = None
    if needs.hidden:
        hidden = torch.zeros_like(inputs.student_hidden)
        head = inputs.weight
        made = gradient if head is None else gradient @ head.to(gradient.dtype)
        hidden[rows] = made.to(hidden.dtype)
    if needs.weight:
        assert inputs.weight is not None
        weight = gradient.T @ inputs.student_hidden[rows].to(gradient.dtype)
        weight = weight.to(inputs.weight.dtype)
    if needs.bias:
        assert inputs.bias is not None
        bias = gradient.sum(dim=0).to(inputs.bias.dtype)
    return Gradients(hidden, weight, bias)
