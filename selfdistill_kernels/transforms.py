"""torch.func.grad, vmap and jacrev of the losses; what cannot be differentiated is refused by name.

torch.func wants an autograd function whose context is set up apart from its forward, which costs an
eager call more than it should (see eager.py), and derivatives of derivatives that raise instead of
being zero. The numbers are those of the operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from selfdistill_kernels import eager, ops, passes
from selfdistill_kernels.backends.interface import Expected, LinearInputs
from selfdistill_kernels.options import LossOptions

NO_FORWARD_MODE = (
    "selfdistill_kernels: forward-mode derivatives (torch.func.jvp, jacfwd, hessian, forward_ad) "
    "are not supported; use backward, torch.func.grad or vjp"
)
NO_SHARDS = (
    "selfdistill_kernels: the transforms of torch.func do not go through heads that are sharded "
    "along the vocabulary; use backward"
)
NO_SECOND_DERIVATIVE = (
    "selfdistill_kernels: second derivatives (hessian, grad of grad) are not supported"
)


def call_linear_loss(
    inputs: LinearInputs, loss_weight: Tensor, old_logprobs: Tensor | None, options: LossOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """`eager.call_linear_loss`, under the transforms of torch.func, too."""
    tensors = (*inputs.tensors(), loss_weight, old_logprobs)
    refuse_forward_mode(tensors)
    if is_transformed() and not options.needs.in_place and options.rounding is None:
        loss, statistics, active, *_ = _TransformedLoss.apply(*tensors, options)
        return loss, statistics, active
    return eager.call_linear_loss(inputs, loss_weight, old_logprobs, options)


def call_linear_statistics(
    inputs: LinearInputs, options: LossOptions, expected: Expected
) -> Tensor:
    """`eager.call_linear_statistics`, under the transforms of torch.func, too."""
    refuse_forward_mode(inputs.tensors())
    operands: tuple[Any, ...] = (*map(_saveable, inputs.tensors()), inputs.transform, inputs.shard)
    inputs = LinearInputs(*operands)
    if is_transformed() and options.rounding is None:
        if inputs.shard is not None:
            raise NotImplementedError(NO_SHARDS)
        scalars = options.statistics_scalars(inputs.vocabulary)
        statistics, *_ = _TransformedStatistics.apply(*inputs.tensors(), *scalars)
        return statistics
    return eager.call_linear_statistics(inputs, options, expected)


def refuse_forward_mode(tensors: tuple[Any, ...]) -> None:
    """Raise NotImplementedError for a tensor with a tangent, which an operator would drop."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(NO_FORWARD_MODE)


def _saveable(tensor: Tensor | None) -> Tensor | None:
    """Copy what was made in inference mode, which autograd cannot keep for the backward pass."""
    if tensor is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return tensor
    return tensor.clone() if tensor.is_inference() else tensor


def is_transformed() -> bool:
    """True inside of a transform of torch.func that runs eagerly."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
    )


class _Transformed(torch.autograd.Function):
    """The base of the three functions below."""

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(NO_FORWARD_MODE)


class _TransformedLoss(_Transformed):
    """The operands and results of the operator `linear_loss`; its options as one LossOptions."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        refuse_forward_mode(arguments)
        loss, statistics, active, gradients = passes.visit(*arguments)
        return (loss, statistics, active, *ops._returned(gradients, arguments[0]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        needs = inputs[-1].needs
        wanted = zip((needs.hidden, needs.weight, needs.bias), output[3:], strict=True)
        ctx.save_for_backward(*(gradient if needed else None for needed, gradient in wanted))
        ctx.argument_count = len(inputs)
        ctx.mark_non_differentiable(*output[1:3])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
        # The gradients are results as well: who differentiates them asks for a second derivative.
        if any(other is not None for other in others):
            raise RuntimeError(NO_SECOND_DERIVATIVE)
        gradients: list[Tensor | None] = [None] * ctx.argument_count
        if grad_loss is not None:
            for position, saved in zip((0, 2, 4), ctx.saved_tensors, strict=True):
                if saved is not None:
                    gradients[position] = saved * grad_loss.to(saved.dtype)
        return tuple(gradients)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, ...]:
        return _one_by_one(_TransformedLoss.apply, info, in_dims, arguments)


class _TransformedStatistics(_Transformed):
    """The operands and results of the operator `linear_statistics`."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        refuse_forward_mode(arguments)
        return ops.linear_statistics(*arguments)

    setup_context = staticmethod(ops._save_inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        *tensors, statistics, support, logprobs = ctx.saved_tensors
        needs = [ctx.needs_input_grad[position] for position in (0, 2, 4)]
        made = _StatisticsGradient.apply(
            *tensors, statistics, support, logprobs, ops.term_weights(grad), *ctx.options,
            ctx.tail, *needs, *ctx.execution,
        )  # fmt: skip
        gradients: list[Tensor | None] = [None] * ctx.argument_count
        for position, needed, gradient in zip((0, 2, 4), needs, made, strict=True):
            if needed:
                gradients[position] = gradient
        return tuple(gradients)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, ...]:
        return _one_by_one(_TransformedStatistics.apply, info, in_dims, arguments)


class _StatisticsGradient(_Transformed):
    """The operands and results of the operator `linear_statistics_backward`."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        refuse_forward_mode(arguments)
        return ops.linear_statistics_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Any, ...]:
        raise RuntimeError(NO_SECOND_DERIVATIVE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, ...]:
        return _one_by_one(_StatisticsGradient.apply, info, in_dims, arguments)


def _one_by_one(
    function: Any, info: Any, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Run vmap as a loop: a problem is large, and several have no row kernel in common."""
    found = [
        function(
            *(
                argument if dim is None else argument.select(dim, index)
                for argument, dim in zip(arguments, in_dims, strict=True)
            )
        )
        for index in range(info.batch_size)
    ]
    stacked = tuple(torch.stack(column) for column in zip(*found, strict=True))
    return stacked, (0,) * len(stacked)
