"""The operators that torch sees: schemas, fake kernels and autograd.

    selfdistill::linear_loss                 scalar loss; makes its gradients in the forward visit
    selfdistill::linear_statistics           per-token statistics [N, 10]; differentiable
    selfdistill::linear_statistics_backward  makes the logits of tokens with a gradient again

All three are functional, so torch.compile and AOT autograd take them whole. With `weight` None the
"hidden states" are logits already (distillation_from_logits).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selfdistill_kernels.advantage import Gate
from selfdistill_kernels.backends.interface import Gradients, Needs
from selfdistill_kernels.logits import LogitTransform
from selfdistill_kernels.objective import Objective
from selfdistill_kernels.options import LossOptions
from selfdistill_kernels.passes import Sweep, linear_inputs, sweep, sweep_gradient, visit
from selfdistill_kernels.statistics import Column, statistics_dtype
from selfdistill_kernels.tolerance import GradientTolerance, Rounding

# Columns of the statistics through which a gradient flows, with their sign in `term_weights`.
_TERM_COLUMNS = ((Column.DIVERGENCE, 1.0), (Column.STUDENT_LOGPROB, -1.0), (Column.ENTROPY, 1.0))


def _returned(gradients: Gradients, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return dH, dW, db as an operator does: an empty tensor of its own where one is not needed."""
    hidden, weight, bias = (like.new_empty(0) if g is None else g for g in gradients)
    return hidden, weight, bias


def _fake_gradients(
    student_hidden: Tensor,
    _teacher_hidden: Tensor | None,
    weight: Tensor | None,
    _teacher_weight: Tensor | None,
    bias: Tensor | None,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_returned` gives, without values; both operators end in (needs, workspace, backend)."""
    *_, need_hidden, need_weight, need_bias, _workspace, _backend = others

    def like(tensor: Tensor | None, needed: bool) -> Tensor:
        if tensor is None or not needed:
            return student_hidden.new_empty(0)
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    return like(student_hidden, need_hidden), like(weight, need_weight), like(bias, need_bias)


@torch.library.custom_op("selfdistill::linear_loss", mutates_args=())
def linear_loss(
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
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    divergence: str,
    beta: float,
    policy_gradient: float,
    cross_entropy: float,
    entropy: float,
    divergence_clip: float | None,
    importance_clip: float | None,
    entry_clip: float | None,
    gate_sign: int | None,
    gate_threshold: float,
    tolerance: float | None,
    seed: int,
    bound_risk: float | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    workspace: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss [], statistics [N, 10], active [N], dH [N, H], dW [V, H], db [V] and the table of
    a `Rounding`, without rows if there is no tolerance.

    Gradients that are not needed are empty tensors.
    """
    rounding = None
    if tolerance is not None:
        rounding = Rounding.of(GradientTolerance(tolerance, seed, bound_risk), student_hidden)
    options = LossOptions(
        LogitTransform(logit_scale, softcap, temperature),
        Objective(
            divergence, beta, policy_gradient, cross_entropy, entropy, divergence_clip,
            importance_clip, entry_clip=entry_clip,
        ),
        None if gate_sign is None else Gate(gate_sign, gate_threshold),
        Needs(need_hidden, need_weight, need_bias),
        workspace,
        backend,
        rounding,
    )  # fmt: skip
    loss, statistics, active, gradients = visit(
        student_hidden, teacher_hidden, weight, teacher_weight, bias, teacher_bias, targets,
        exists, loss_weight, old_logprobs, options,
    )  # fmt: skip
    errors = (
        student_hidden.new_empty((0, student_hidden.shape[0] + 1), dtype=torch.float32)
        if rounding is None
        else rounding.table
    )
    return (loss, statistics, active, *_returned(gradients, student_hidden), errors)


@linear_loss.register_fake
def _(
    student_hidden: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, dtype = student_hidden.shape[0], statistics_dtype(student_hidden.dtype)
    tolerance, _seed, bound_risk = others[-8:-5]
    errors = 0 if tolerance is None else 1 if bound_risk is None else 2
    return (
        student_hidden.new_empty((), dtype=dtype),
        student_hidden.new_empty((tokens, len(Column)), dtype=dtype),
        student_hidden.new_empty(tokens, dtype=torch.bool),
        *_fake_gradients(student_hidden, *others),
        student_hidden.new_empty((errors, tokens + 1), dtype=torch.float32),
    )


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.argument_count = len(inputs)
    needs = inputs[-5:-2]
    ctx.save_for_backward(
        *(saved if needed else None for needed, saved in zip(needs, output[3:6], strict=True))
    )
    ctx.set_materialize_grads(False)


def linear_loss_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    refuse_double_backward()
    gradients: list[Tensor | None] = [None] * ctx.argument_count
    if grad_loss is None:
        return tuple(gradients)
    factor = _factor(grad_loss)
    for position, saved in zip((0, 2, 4), ctx.saved_tensors, strict=True):
        if saved is not None:
            # Where nothing is to be multiplied, the tensor itself is handed over.
            gradients[position] = (
                saved.detach() if factor is None else saved * factor.to(saved.dtype)
            )
    return tuple(gradients)


def refuse_double_backward() -> None:
    # The saved gradients are constants to autograd: a second derivative would be silently wrong.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "selfdistill_kernels: double backward (create_graph=True) is not supported"
        )


def _factor(grad_loss: Tensor) -> Tensor | None:
    """What gradients are multiplied by; None for 1 where they may be given away, as in
    loss.backward()."""
    # A subclass is a tracer's tensor, which has no value to look at.
    if type(grad_loss) is Tensor and grad_loss.device.type == "cpu":
        keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph()
        if not keeps_graph and grad_loss.item() == 1.0:
            return None
    return grad_loss


linear_loss.register_autograd(linear_loss_backward, setup_context=_save_gradients)


@torch.library.custom_op("selfdistill::linear_statistics", mutates_args=())
def linear_statistics(
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    weight: Tensor | None,
    teacher_weight: Tensor | None,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    targets: Tensor | None,
    exists: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    divergence: str,
    beta: float,
    entry_clip: float | None,
    top_k: int,
    top_k_of: str,
    tail: bool,
    workspace: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return statistics [N, 10] (statistics.Column), zero where no token exists, the support [N, k]
    of a top-k divergence and its log-probs [2, N, k] (top_k = 0: the whole vocabulary, k = 0).

    A gradient flows through DIVERGENCE, STUDENT_LOGPROB and ENTROPY.
    """
    inputs = linear_inputs(
        student_hidden, teacher_hidden, weight, teacher_weight, bias, teacher_bias, targets,
        exists, LogitTransform(logit_scale, softcap, temperature),
    )  # fmt: skip
    objective = divergence_alone(divergence, beta, entry_clip, top_k, top_k_of, tail)
    found, _ = sweep(inputs, objective, workspace, backend)
    return found.statistics, found.support, found.logprobs


def divergence_alone(
    divergence: str,
    beta: float,
    entry_clip: float | None,
    top_k: int,
    top_k_of: str = "student",
    tail: bool = True,
) -> Objective:
    """What the schemas of the statistics say of an objective; `top_k` is 0 for none."""
    # "none" alone is no objective; the entropy term makes it one without needing a target.
    return Objective(
        divergence, beta, entropy=1.0, top_k=top_k or None, top_k_of=top_k_of, tail=tail,
        entry_clip=entry_clip,
    )  # fmt: skip


@linear_statistics.register_fake
def _(student_hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    tokens, top_k = student_hidden.shape[0], others[-5]
    dtype = statistics_dtype(student_hidden.dtype)
    return (
        student_hidden.new_empty((tokens, len(Column)), dtype=dtype),
        student_hidden.new_empty((tokens, top_k), dtype=torch.int64),
        student_hidden.new_empty((2, tokens, top_k), dtype=dtype),
    )


@torch.library.custom_op("selfdistill::linear_statistics_backward", mutates_args=())
def linear_statistics_backward(
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    weight: Tensor | None,
    teacher_weight: Tensor | None,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    targets: Tensor | None,
    exists: Tensor | None,
    statistics: Tensor,
    support: Tensor,
    logprobs: Tensor,
    term_weights: Tensor,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    divergence: str,
    beta: float,
    entry_clip: float | None,
    tail: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    workspace: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dH, dW, db for the weights [N, 3] of divergence, -log S(y) and entropy."""
    inputs = linear_inputs(
        student_hidden, teacher_hidden, weight, teacher_weight, bias, teacher_bias, targets,
        exists, LogitTransform(logit_scale, softcap, temperature),
    )  # fmt: skip
    objective = divergence_alone(divergence, beta, entry_clip, support.shape[1], tail=tail)
    gradients = sweep_gradient(
        inputs, objective, Sweep(statistics, support, logprobs), term_weights,
        Needs(need_hidden, need_weight, need_bias), workspace, backend,
    )  # fmt: skip
    return _returned(gradients, student_hidden)


@linear_statistics_backward.register_fake
def _(student_hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(student_hidden, *others)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:8], *output)
    ctx.mark_non_differentiable(*output[1:])
    *ctx.options, _top_k, _top_k_of, tail, workspace, backend = inputs[8:]
    ctx.tail, ctx.execution = tail, (workspace, backend)
    ctx.argument_count = len(inputs)


def term_weights(grad: Tensor) -> Tensor:
    """The gradient of statistics [N, 10] as weights [N, 3] of divergence, -log S(y), entropy."""
    return torch.stack([sign * grad[:, column] for column, sign in _TERM_COLUMNS], dim=1)


def _linear_statistics_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    refuse_double_backward()
    *tensors, statistics, support, logprobs = ctx.saved_tensors
    needs = [ctx.needs_input_grad[position] for position in (0, 2, 4)]
    made = linear_statistics_backward(
        *tensors, statistics, support, logprobs, term_weights(grad), *ctx.options, ctx.tail,
        *needs, *ctx.execution,
    )  # fmt: skip
    gradients: list[Tensor | None] = [None] * ctx.argument_count
    for position, needed, gradient in zip((0, 2, 4), needs, made, strict=True):
        if needed:
            gradients[position] = gradient
    return tuple(gradients)


linear_statistics.register_autograd(_linear_statistics_backward, setup_context=_save_inputs)
