"""Divergence over the k most likely entries and one bucket for the rest (docs/math.md, top-k).

The support K belongs to the student or the teacher. Both distributions become k + 1 buckets: the
entries of K with their true probabilities, and a tail of 1 - sum_K p; without a tail, K alone,
normalised. Only [N, k] log-probs are needed, from k dot products a token and the normalisers that
a sweep left in the statistics.

With g = dD / d log-bucket (a softmax over buckets) and tail masses q:

    dD / dz_v = g_v  on K,   (g_tail / q_S) p_S(v)  off K
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from selfdistill_kernels.backends.interface import Entries, Gradients, LinearInputs
from selfdistill_kernels.backends.reference.divergence import divergence_gradient, divergence_of
from selfdistill_kernels.objective import Objective
from selfdistill_kernels.statistics import Column

# A tail below this mass counts as this much: 1 - sum_K p has no digits left there.
LEAST_TAIL = 1e-7
# Elements of the head that are gathered at a time: they stay in the cache.
GATHERED = 1 << 19


def support_logprobs(inputs: LinearInputs, statistics: Tensor, support: Tensor) -> Tensor:
    """[2, N, k] float64, log S and log T of the support [N, k]; 0 where no token exists."""
    assert inputs.teacher_hidden is not None
    rows = inputs.existing_rows()
    chosen, found = support[rows], statistics[rows].double()
    logprobs = found.new_zeros((2, *support.shape))
    for side, (hidden, head, bias, column) in enumerate(
        (
            (inputs.student_hidden, inputs.weight, inputs.bias, Column.STUDENT_SHIFT),
            (
                inputs.teacher_hidden,
                inputs.teacher_head,
                inputs.teacher_bias,
                Column.TEACHER_SHIFT,
            ),
        )
    ):
        raw = _selected_scores(hidden, head, rows, chosen).double()
        if bias is not None:
            raw = raw + bias.double()[chosen]
        normalizer = found[:, column] + found[:, column + 1]
        logprobs[side, rows] = inputs.transform.apply(raw, None) - normalizer[:, None]
    return logprobs


def top_k_divergence(objective: Objective, logprobs: Tensor, *, tail: bool) -> Tensor:
    """Divergence [N] float64 of the log-probs [2, N, k] of the support."""
    student, teacher = (_buckets(side, tail=tail) for side in logprobs)
    return divergence_of(student, teacher, objective)[0]


def top_k_gradient(
    gradient_of: Callable[[LinearInputs, Tensor, Entries], Gradients],
    inputs: LinearInputs,
    objective: Objective,
    statistics: Tensor,
    term_weights: Tensor,
    support: Tensor,
    logprobs: Tensor,
) -> Gradients:
    """The gradient where the first of the weights [N, 3] is that of the top-k divergence.

    `gradient_of` makes a gradient without a divergence from inputs, term weights and entries.
    """
    # First over the k + 1 buckets, where the divergence is an ordinary one.
    k, tail = support.shape[1], objective.tail
    student, teacher = (_buckets(side.double(), tail=tail) for side in logprobs)
    constants = divergence_of(student, teacher, objective)
    slope = divergence_gradient(student, teacher, *constants, objective)
    found, (weight, likelihood, entropy) = statistics.double(), term_weights.double().split(1, 1)
    # d loss / d logits off the support is dense p_S, and that of the other terms.
    dense = slope[:, k:] * (-student[:, k:]).exp() if tail else torch.zeros_like(weight)
    # A weight of 0 is no gradient, whatever the row holds.
    dense, on_support = (torch.where(weight == 0, 0.0, weight * g) for g in (dense, slope[:, :k]))

    # The other terms look at the target too, which is an entry of the support or one more.
    indices, log_s, gradient = support, logprobs[0].double(), on_support
    if inputs.targets is not None:
        target = inputs.targets[:, None]
        log_y = found[:, Column.STUDENT_LOGPROB, None]
        same = support == target
        at_target = torch.where(same, on_support, 0.0).sum(dim=1, keepdim=True)
        at_target = torch.where(same.any(dim=1, keepdim=True), at_target, dense * log_y.exp())
        indices, log_s = torch.cat([support, target], dim=1), torch.cat([log_s, log_y], dim=1)
        gradient = torch.cat([on_support, at_target], dim=1) - likelihood * (indices == target)
    p_s = log_s.exp()
    gradient = gradient + likelihood * p_s
    surprise = torch.where(p_s == 0, 0.0, log_s + found[:, Column.ENTROPY, None])
    gradient = gradient - entropy * p_s * surprise
    normalizer = found[:, Column.STUDENT_SHIFT] + found[:, Column.STUDENT_LOGSUM]
    gradient = inputs.transform.chain(gradient, log_s + normalizer[:, None])

    has_gradient = (term_weights != 0).any(dim=1, keepdim=True)
    weights = term_weights.clone()
    weights[:, 0] = 0
    weights[:, 1] += dense[:, 0].to(weights.dtype)
    return gradient_of(
        replace(inputs, targets=None),
        weights,
        Entries(indices, torch.where(has_gradient, gradient, 0.0)),
    )


def _buckets(logprobs: Tensor, *, tail: bool) -> Tensor:
    """Return log-probs [N, k + 1] of the support and the rest; [N, k], normalised, without it."""
    inside = logprobs.logsumexp(dim=1, keepdim=True)
    if not tail:
        return logprobs - inside
    rest = torch.log(-torch.expm1(inside.clamp(max=-LEAST_TAIL)))
    return torch.cat([logprobs, rest], dim=1)


def _selected_scores(hidden: Tensor, head: Tensor | None, rows: Tensor, chosen: Tensor) -> Tensor:
    """Raw scores [n, k] of the entries chosen [n, k], at least float32; hidden is [N, H]."""
    if head is None:
        return hidden[rows].gather(1, chosen)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    made = hidden.new_empty(chosen.shape, dtype=dtype)
    step = max(1, GATHERED // max(1, chosen.shape[1] * hidden.shape[1]))
    for first in range(0, rows.numel(), step):
        part = slice(first, first + step)
        gathered = head[chosen[part]].to(dtype)  # [r, k, H]
        made[part] = torch.bmm(gathered, hidden[rows[part], :, None].to(dtype)).squeeze(2)
    return made
