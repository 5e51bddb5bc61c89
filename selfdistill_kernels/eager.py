"""Eager calls of the scalar loss, around the operator `selfdistill::linear_loss`.

The operator's Python layers cost more than the rest of a small problem (docs/decisions), and an
operator may not overwrite its arguments. Same functions, same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selfdistill_kernels.backends.interface import LinearInputs
from selfdistill_kernels.ops import (
    linear_loss,
    linear_loss_backward,
    refuse_double_backward,
    visit,
)
from selfdistill_kernels.options import LossOptions


def call_linear_loss(
    inputs: LinearInputs, loss_weight: Tensor, old_logprobs: Tensor | None, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Return loss [], statistics [N, 10] and active [N], differentiable as `linear_loss` is."""
    tensors = (*inputs.tensors(), loss_weight, old_logprobs)
    if options.needs.in_place:
        return LogitsLossInPlace.apply(*tensors, options)
    if _is_traced(tensors):
        loss, statistics, active, *_ = linear_loss(*tensors, *options.loss_scalars())
        return loss, statistics, active
    return _EagerLoss.apply(*tensors, options)


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
