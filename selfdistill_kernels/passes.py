"""What the operators do, without their schemas: the forward and backward passes of a loss."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selfdistill_kernels.autocast import autocast_dtype
from selfdistill_kernels.backends.interface import (
    Entries,
    Expected,
    Gradients,
    Kept,
    LinearInputs,
    Needs,
)
from selfdistill_kernels.backends.registry import get_backend
from selfdistill_kernels.logits import LogitTransform
from selfdistill_kernels.objective import Objective
from selfdistill_kernels.options import LossOptions
from selfdistill_kernels.parallel.shard import VocabularyShard
from selfdistill_kernels.statistics import Column
from selfdistill_kernels.token_loss import token_losses
from selfdistill_kernels.tolerance import Rounding
from selfdistill_kernels.top_k import (
    joined_support,
    support_logprobs,
    top_k_divergence,
    top_k_gradient,
)


class Sweep(NamedTuple):
    """What a sweep without a gradient finds.

    Attributes:
        statistics: [N, 10] (statistics.Column), zero where no token exists.
        support: [N, k] int64 of a top-k divergence; k = 0 for one over the whole vocabulary.
        logprobs: [2, N, k], log S and log T of the support.
    """

    statistics: Tensor
    support: Tensor
    logprobs: Tensor


def visit(
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    weight: Tensor | None,
    teacher_weight: Tensor | None,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    targets: Tensor | None,
    exists: Tensor | None,
    loss_weight: Tensor,
    old_logprobs: Tensor | None,
    options: LossOptions,
) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """Return loss [], statistics [N, 10], active [N] and the gradients that are needed."""
    objective = options.objective
    inputs = linear_inputs(
        student_hidden, teacher_hidden, weight, teacher_weight, bias, teacher_bias, targets,
        exists, options.transform,
    )  # fmt: skip
    with _float32_products(student_hidden):
        statistics, active, gradients = get_backend(options.backend).visit(
            inputs, objective, options.gate, loss_weight, old_logprobs, options.needs,
            options.workspace, options.rounding,
        )  # fmt: skip
    losses = token_losses(objective, statistics, loss_weight, active, old_logprobs)
    loss = losses.sum(dtype=torch.float64).to(statistics.dtype)
    return loss, statistics, active, gradients


def sweep(
    inputs: LinearInputs,
    objective: Objective,
    workspace: int,
    backend: str,
    expected: Expected | None = None,
    rounding: Rounding | None = None,
) -> tuple[Sweep, Kept | None]:
    """Statistics, and what the backend kept for a gradient that is expected."""
    hidden, chosen, top_k = inputs.student_hidden, get_backend(backend), objective.top_k or 0
    whole = objective if top_k == 0 else _without_divergence(objective)
    with _float32_products(hidden):
        kept = None
        found = (
            None if expected is None else chosen.keep(inputs, whole, expected, workspace, rounding)
        )
        if found is None:
            statistics = chosen.statistics(inputs, whole, workspace)
        else:
            statistics, kept = found
        support = hidden.new_empty((hidden.shape[0], 0), dtype=torch.int64)
        logprobs = statistics.new_empty((2, hidden.shape[0], 0))
        if top_k > 0:
            of_teacher = objective.top_k_of == "teacher"
            here = min(top_k, inputs.vocabulary)
            best = None if kept is None else kept.top_k(inputs, here, of_teacher)
            if best is None:
                best = chosen.top_k(inputs, here, of_teacher, workspace)
            support = best
            exact = support_logprobs(inputs, statistics, support)
            if inputs.shard is not None:
                support, exact = joined_support(inputs.shard, objective, support, exact)
            divergences = top_k_divergence(objective, exact, tail=objective.tail)
            statistics[:, Column.DIVERGENCE] = divergences
            if inputs.exists is not None:
                statistics[~inputs.exists, Column.DIVERGENCE] = 0
            logprobs = exact.to(statistics.dtype)
    return Sweep(statistics, support, logprobs), kept


def sweep_gradient(
    inputs: LinearInputs,
    objective: Objective,
    found: Sweep,
    term_weights: Tensor,
    needs: Needs,
    workspace: int,
    backend: str,
    kept: Kept | None = None,
    rounding: Rounding | None = None,
) -> Gradients:
    """The gradient for the weights [N, 3] of divergence, -log S(y) and entropy; dH of the whole
    vocabulary, dW and db of the shard where there is one."""

    def gradient_of(
        inputs: LinearInputs, objective: Objective, weights: Tensor, entries: Entries | None
    ) -> Gradients:
        statistics = found.statistics
        if kept is not None:
            made = kept.gradient(inputs, objective, statistics, weights, needs, entries, rounding)
            if made is not None:
                return made
        return get_backend(backend).gradient(
            inputs, objective, statistics, weights, needs, workspace, entries, rounding
        )

    with _float32_products(inputs.student_hidden):
        if objective.top_k is None:
            made = gradient_of(inputs, objective, term_weights, None)
        else:
            without = _without_divergence(objective)
            made = top_k_gradient(
                lambda inputs, weights, entries: gradient_of(inputs, without, weights, entries),
                inputs, objective, found.statistics, term_weights, found.support, found.logprobs,
            )  # fmt: skip
    if inputs.shard is None or made.hidden is None:
        return made
    # In float32: each rank has rounded its part, and the sum is rounded once.
    hidden = inputs.shard.total(made.hidden.to(found.statistics.dtype))
    return made._replace(hidden=hidden.to(made.hidden.dtype))


def _without_divergence(objective: Objective) -> Objective:
    # "none" alone is no objective; the entropy term makes it one without needing a target.
    return Objective("none", objective.beta, entropy=1.0)


def linear_inputs(
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    weight: Tensor | None,
    teacher_weight: Tensor | None,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    targets: Tensor | None,
    exists: Tensor | None,
    transform: LogitTransform,
    shard: VocabularyShard | None = None,
) -> LinearInputs:
    """The operands of an operator, contiguous. Raises ValueError for a target that is no entry."""
    inputs = LinearInputs(
        student_hidden.contiguous(),
        None if teacher_hidden is None else teacher_hidden.contiguous(),
        None if weight is None else weight.contiguous(),
        None if teacher_weight is None else teacher_weight.contiguous(),
        bias,
        teacher_bias,
        targets,
        exists,
        transform,
        shard,
    )
    if targets is not None:
        _check_targets(inputs, targets)
    return inputs


def _check_targets(inputs: LinearInputs, targets: Tensor) -> None:
    vocabulary = inputs.whole_vocabulary
    start = 0 if inputs.shard is None else inputs.shard.start
    if inputs.device.type in ("cuda", "meta"):
        # Reading a value would make the host wait for the device: the device checks by itself.
        valid = (targets >= -start) & (targets < vocabulary - start)
        if inputs.exists is not None:
            valid |= ~inputs.exists
        torch._assert_async(valid.all(), "targets: a token id lies outside the vocabulary")
        return
    if inputs.tokens.count == 0:
        return
    low, high = (int(bound) + start for bound in inputs.tokens.of(targets).aminmax())
    if low < 0 or high >= vocabulary:
        bad = low if low < 0 else high
        raise ValueError(
            f"targets: token id {bad} lies outside the vocabulary [0, {vocabulary}); tokens to "
            "leave out take `ignore_index` or a False in `mask`"
        )


def _float32_products(like: Tensor) -> AbstractContextManager[Any]:
    """Autocast has done its work before the operator; inside, nothing may be rounded again."""
    if autocast_dtype(like.device) is None:
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)
