"""Eager calls, around the operators linear_loss and linear_statistics of ops.py.

The operators' Python layers cost more than the rest of a small problem (docs/decisions). An
operator may not overwrite its arguments either, nor lend memory from its forward to its backward
pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selfdistill_kernels.backends.interface import Expected, LinearInputs, Needs
from selfdistill_kernels.logits import LogitTransform
from selfdistill_kernels.ops import (
    divergence_alone,
    linear_loss,
    linear_loss_backward,
    linear_statistics,
    refuse_double_backward,
    term_weights,
)
from selfdistill_kernels.options import LossOptions
from selfdistill_kernels.passes import Sweep, linear_inputs, sweep, sweep_gradient, visit

NO_TRANSFORMS = (
    "gradient_tolerance: not under transforms of torch.func, nor where losses of single tokens, "
    "ranked masks or log-probs meet dispatch modes or tensor subclasses; pass None for the exact "
    "gradient"
)


def call_linear_loss(
    inputs: LinearInputs, loss_weight: Tensor, old_logprobs: Tensor | None, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss [], statistics [N, 10] and active [N], differentiable as `linear_loss` is."""
    tensors = (*inputs.tensors(), loss_weight, old_logprobs)
    if options.needs.in_place:
        return LogitsLossInPlace.apply(*tensors, options)
    rounding = options.rounding
    if _is_traced(tensors):
        is_transformed = (
            not torch.compiler.is_compiling()
            and torch._C._functorch.peek_interpreter_stack() is not None
        )
        if rounding is not None and is_transformed:
            raise NotImplementedError(NO_TRANSFORMS)
        loss, statistics, active, *_, errors = linear_loss(*tensors, *options.loss_scalars())
        if rounding is not None:
            rounding.table.copy_(errors.detach())
        return loss, statistics, active
    return _EagerLoss.apply(*tensors, options)


def call_linear_statistics(
    inputs: LinearInputs, options: LossOptions, expected: Expected
) -> Tensor:
    """Return statistics [N, 10], differentiable as those of `linear_statistics` are."""
    tensors, scalars = inputs.tensors(), options.statistics_scalars(inputs.whole_vocabulary)
    if inputs.shard is None and options.rounding is None and _is_traced(tensors):
        statistics, *_ = linear_statistics(*tensors, *scalars)
        return statistics
    apply = _EagerStatistics.apply
    if options.rounding is not None:
        apply = _outside_of_graphs(apply, tensors)
    elif torch.compiler.is_compiling():
        # An operator takes no process group: the graph breaks here.
        apply = torch.compiler.disable(apply)
    wanted = expected if expected.needs and not _hooks_are_active() else None
    return apply(*tensors, scalars, wanted, inputs.shard, options.rounding)


def _outside_of_graphs(apply: Any, tensors: tuple[Tensor | None, ...]) -> Any:
    """`apply` with a gradient tolerance: its errors are known in the backward pass, and an operator
    may not write what its forward pass has returned, so that a graph breaks there. Raises
    NotImplementedError for other tracers."""
    if torch.compiler.is_compiling():
        return torch.compiler.disable(apply)
    if _is_traced(tensors):
        raise NotImplementedError(NO_TRANSFORMS)
    return apply


def _hooks_are_active() -> bool:
    """Whether saved tensors go elsewhere (checkpointing, save_on_cpu): then nothing shall be kept
    beside them, which they might not fit later."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is not None


def _is_traced(tensors: tuple[Tensor | None, ...]) -> bool:
    """True when somebody watches (torch.compile, a dispatch mode, functorch, a tensor subclass) or
    there are no values."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(
            tensor is not None
            and (type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta)
            for tensor in tensors
        )
    )


class _EagerLoss(torch.autograd.Function):
    """`linear_loss` without its operator: its tensors, then a LossOptions. Returns loss, statistics
    and active."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        # Not with a setup_context of its own: torch then binds the arguments by `inspect`.
        loss, statistics, active, gradients = visit(*arguments)
        ctx.argument_count = len(arguments)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(statistics, active)
        ctx.set_materialize_grads(False)
        return loss, statistics, active

    backward = staticmethod(linear_loss_backward)


class _EagerStatistics(torch.autograd.Function):
    """`linear_statistics` without its operator: its tensors, its scalars in a tuple, what is
    expected of the backward pass, if there is one, the shard, and what the gradient may be wrong
    by. Returns statistics."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        tensors, (scalars, expected, ctx.shard, ctx.rounding) = arguments[:8], arguments[8:]
        *transform, divergence, beta, clip, top_k, top_k_of, tail, workspace, backend = scalars
        ctx.transform, ctx.execution = LogitTransform(*transform), (workspace, backend)
        ctx.objective = divergence_alone(divergence, beta, clip, top_k, top_k_of, tail)
        inputs = linear_inputs(*(*tensors, ctx.transform, ctx.shard))
        found, ctx.kept = sweep(inputs, ctx.objective, workspace, backend, expected, ctx.rounding)
        ctx.save_for_backward(*tensors, *found)
        return found.statistics

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_double_backward()
        saved = ctx.saved_tensors  # once: a hook, as of checkpointing, may make them anew
        tensors, found, kept = saved[:8], Sweep(*saved[8:]), ctx.kept
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.kept = None  # this node may live as long as the loss
        needs = Needs(*(ctx.needs_input_grad[position] for position in (0, 2, 4)))
        workspace, backend = ctx.execution
        gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        gradients[0], gradients[2], gradients[4] = sweep_gradient(
            linear_inputs(*(*tensors, ctx.transform, ctx.shard)), ctx.objective, found,
            term_weights(grad), needs, workspace, backend, kept, ctx.rounding,
        )  # fmt: skip
        return tuple(gradients)


class LogitsLossInPlace(torch.autograd.Function):
    """`linear_loss` of logits [N, V] that become their own gradient, with `needs.in_place`.

    Arguments and results are those of `_EagerLoss`.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        student = logits.detach()  # shares the version: who saved these logits hears of the change
        loss, statistics, active, (gradient, _, _) = visit(student, *others)
        assert gradient is not None
        if gradient.data_ptr() != student.data_ptr():
            student.copy_(gradient)
        else:
            exists = others[6]
            student[~exists] = 0
        ctx.gradient, ctx.argument_count = student, 1 + len(others)
        ctx.mark_non_differentiable(statistics, active)
        return loss, statistics, active

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Any, ...]:
        refuse_double_backward()
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError(
                "in_place: backward ran twice, but the logits hold one gradient; call the loss "
                "again or leave in_place out"
            )
        if not (grad_loss.device.type == "cpu" and grad_loss.item() == 1.0):
            gradient.mul_(grad_loss.to(gradient.dtype))
        return (gradient, *(None,) * (ctx.argument_count - 1))
