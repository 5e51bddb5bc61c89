"""The statistics of tokens whose vocabulary lies in parts on several ranks, and their gradient.

Forward: each rank sweeps its part and the ranks join their sums, O(N) numbers (O(N k) for top-k).
Backward: dW and db are the rank's own; dH [N, H] is added up over the ranks, as that of the input
of every column-parallel layer is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selfdistill_kernels import ops
from selfdistill_kernels.backends.interface import Backend, LinearInputs, Needs
from selfdistill_kernels.backends.registry import get_backend
from selfdistill_kernels.logits import LogitTransform
from selfdistill_kernels.options import LossOptions
from selfdistill_kernels.parallel.shard import VocabularyShard
from selfdistill_kernels.statistics import Column
from selfdistill_kernels.top_k import support_logprobs, top_k_divergence, top_k_gradient


def sharded_statistics(
    tensors: tuple[Tensor | None, ...],
    transform: LogitTransform,
    shard: VocabularyShard,
    options: LossOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `selfdistill::linear_statistics` returns; a support counts from the shard's start.

    Args:
        tensors: those of LinearInputs, with the shard's rows of the heads and targets [N] that
            count from the vocabulary's start.
        transform, shard: as in LinearInputs.
        options: how the loss is computed.
    """
    statistics, support, logprobs = _ShardedStatistics.apply(*tensors, transform, shard, options)
    return statistics, support, logprobs


class _ShardedStatistics(torch.autograd.Function):
    """Takes the arguments of `sharded_statistics`, one after the other."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, transform, shard, options = arguments
        inputs = _local_inputs(tensors, transform, shard)
        if tensors[6] is not None:
            ops.check_targets(inputs, tensors[6], shard.vocabulary)
        objective, chosen = options.objective, get_backend(options.backend)
        compared = "none" if objective.top_k else objective.divergence
        with ops._float32_products(inputs.student_hidden):
            statistics = chosen.statistics(
                inputs, ops._divergence_only(compared, objective.beta), options.workspace
            )
            support = statistics.new_empty((statistics.shape[0], 0), dtype=torch.int64)
            exact = statistics.new_empty((2, statistics.shape[0], 0))
            if objective.top_k:
                support, exact = _joined_support(chosen, inputs, shard, statistics, options)
                statistics[:, Column.DIVERGENCE] = top_k_divergence(
                    objective, exact, tail=_has_tail(options, shard)
                )
                if inputs.exists is not None:
                    statistics[~inputs.exists, Column.DIVERGENCE] = 0
        logprobs = exact.to(statistics.dtype)
        ctx.save_for_backward(*tensors, statistics, support, logprobs)
        ctx.mark_non_differentiable(support, logprobs)
        ctx.problem = (transform, shard, options)
        return statistics, support, logprobs

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        ops.refuse_double_backward()
        *tensors, statistics, support, logprobs = ctx.saved_tensors
        transform, shard, options = ctx.problem
        inputs = _local_inputs(tensors, transform, shard)
        objective = ops._divergence_only(options.objective.divergence, options.objective.beta)
        chosen, weights = get_backend(options.backend), ops._term_weights(grad)
        needs = Needs(*(ctx.needs_input_grad[position] for position in (0, 2, 4)))
        with ops._float32_products(inputs.student_hidden):
            if options.objective.top_k:
                hidden, weight, bias = top_k_gradient(
                    chosen, inputs, objective, statistics, weights, support, logprobs,
                    needs, options.workspace, tail=_has_tail(options, shard),
                )  # fmt: skip
            else:
                hidden, weight, bias = chosen.gradient(
                    inputs, objective, statistics, weights, needs, options.workspace
                )
        if hidden is not None:
            # In float32: each rank has rounded its part, and the sum is rounded once.
            hidden = shard.total(hidden.to(statistics.dtype)).to(hidden.dtype)
        return (hidden, None, weight, None, bias, *(None,) * 6)


def _local_inputs(
    tensors: Sequence[Tensor | None], transform: LogitTransform, shard: VocabularyShard
) -> LinearInputs:
    """Targets checked against the vocabulary, then counted from the shard's start."""
    (
        student_hidden, teacher_hidden, weight, teacher_weight, bias, teacher_bias, targets, exists,
    ) = tensors  # fmt: skip
    assert student_hidden is not None
    assert weight is not None
    return LinearInputs(
        student_hidden.contiguous(),
        None if teacher_hidden is None else teacher_hidden.contiguous(),
        weight.contiguous(),
        None if teacher_weight is None else teacher_weight.contiguous(),
        bias,
        teacher_bias,
        None if targets is None else targets - shard.start,
        exists,
        transform,
        shard,
    )


def _has_tail(options: LossOptions, shard: VocabularyShard) -> bool:
    """Whether a top-k divergence has a bucket for the rest of the vocabulary."""
    return options.objective.tail and options.objective.top_k != shard.vocabulary


def _joined_support(
    backend: Backend,
    inputs: LinearInputs,
    shard: VocabularyShard,
    statistics: Tensor,
    options: LossOptions,
) -> tuple[Tensor, Tensor]:
    """The most likely entries [N, k] of the whole vocabulary, counted from the shard's start, and
    their log-probs [2, N, k] float64.

    Each rank offers its own k most likely entries with their log-probs: 3 k numbers a token.
    """
    k, of_teacher = options.objective.top_k, options.objective.top_k_of == "teacher"
    assert k is not None
    here = min(k, shard.size)
    entries = backend.top_k(inputs, here, of_teacher, options.workspace)
    logprobs = support_logprobs(inputs, statistics, entries)
    # A shard of fewer than k entries offers some that no other can be worse than.
    pad = (0, k - here)
    logprobs = torch.nn.functional.pad(logprobs, pad, value=-torch.inf)
    places = torch.nn.functional.pad(entries + shard.start, pad, value=-1)
    offers = shard.gathered(torch.cat([logprobs, places.to(logprobs.dtype)[None]]))
    offers = offers.permute(1, 2, 0, 3).flatten(2)  # [3, N, ranks k]
    best = offers[int(of_teacher)].topk(k, dim=1, sorted=False).indices
    student, teacher, places = offers.gather(2, best.expand(3, -1, -1))
    return places.to(torch.int64) - shard.start, torch.stack([student, teacher])
