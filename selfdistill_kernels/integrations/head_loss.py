"""The loss between two heads, whatever their adapters, scales and soft caps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from selfdistill_kernels.advantage import AdvantageMask
from selfdistill_kernels.arguments.checks import (
    check_normalizer,
    check_per_token,
    check_reduction,
    workspace_bytes,
)
from selfdistill_kernels.arguments.preparation import loss_weights
from selfdistill_kernels.autocast import autocast_dtype
from selfdistill_kernels.integrations.heads import Head, HeadValues, UnsupportedHeadError
from selfdistill_kernels.loss import (
    DistillationOutput,
    distillation_from_logits,
    fused_linear_distillation,
)
from selfdistill_kernels.objective import Objective
from selfdistill_kernels.ops import refuse_double_backward
from selfdistill_kernels.parallel.operands import is_dtensor
from selfdistill_kernels.tolerance import GradientTolerance

AUTO_WORKSPACE = 256 * 2**20  # bytes; as much as the CPU kernels keep
# Student, teacher, and what the transform of one of them needs in passing.
MATRICES_A_CHUNK = 3


def fused_head_distillation(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student: Head | HeadValues,
    teacher: Head | HeadValues | None = None,
    targets: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    objective: str | Objective = "forward_kl",
    advantage_mask: AdvantageMask | None = None,
    step_ids: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    workspace: str | int = "auto",
    backend: str = "auto",
    gradient_tolerance: float | Literal["rounding"] | GradientTolerance | None = None,
) -> DistillationOutput:
    """`fused_linear_distillation` for heads with a scale, a soft cap and LoRA adapters each.

    With LoRA on a head the logits are h W^T + s (h A^T) B^T, a chunk of tokens at a time: neither
    W + s B A nor [tokens, vocabulary] is made, and gradients flow to A and B. So are two models
    with different soft caps or dtypes computed. Everything else takes the fused kernels.

    Args:
        student_hidden, teacher_hidden, targets, mask, token_weight, old_logprobs: as in
            `fused_linear_distillation`.
        objective, advantage_mask, step_ids, ignore_index, temperature: as there.
        reduction, normalizer, backend: as there.
        gradient_tolerance: as there; chunks have none.
        student: its head; gradients flow to the weight, bias and adapters that require them.
        teacher: its head, None when the teacher is the student; no gradient.
        workspace: as in `fused_linear_distillation`; with chunks the bytes of their logits,
            256 MiB with "auto".

    Returns:
        DistillationOutput.

    Raises:
        UnsupportedHeadError: a head that cannot be read (see `Head`), or chunks with a head in
            shards.
        TypeError, ValueError: bad input; with chunks also reduction="none" and advantage masks that
            compare tokens with each other.
    """
    student = student.values if isinstance(student, Head) else student
    if teacher is None:
        teacher = student
    teacher = teacher.values if isinstance(teacher, Head) else teacher
    shared: dict[str, Any] = {
        "objective": objective,
        "advantage_mask": advantage_mask,
        "ignore_index": ignore_index,
        "temperature": temperature,
        "backend": backend,
    }
    if is_dtensor(teacher.weight) and not is_dtensor(student.weight):
        teacher = _gathered(teacher, teacher_hidden.dtype)
    cast = autocast_dtype(student_hidden.device) is not None
    two_dtypes = student.weight.dtype != teacher.weight.dtype and not cast
    if student.low_rank or teacher.low_rank or student.softcap != teacher.softcap or two_dtypes:
        if is_dtensor(student.weight) or is_dtensor(teacher.weight):
            raise UnsupportedHeadError(
                "heads in shards (DTensors) need one soft cap and one dtype for both models, and "
                "no LoRA on either head"
            )
        if gradient_tolerance is not None:
            raise ValueError(
                "gradient_tolerance: LoRA on a head, two soft caps or dtypes have the exact "
                "gradient only; pass None"
            )
        if step_ids is not None:
            raise ValueError("step_ids: only used by advantage_mask with per_step=True")
        return _by_chunks(
            student_hidden, teacher_hidden, student, teacher, targets, mask, token_weight,
            old_logprobs, reduction, normalizer, workspace, shared,
        )  # fmt: skip
    ratio = teacher.logit_scale / student.logit_scale
    # A shared head shares its bias: another bias, or another scale of the same, makes two heads.
    own = (
        teacher.weight is not student.weight
        or teacher.bias is not student.bias
        or (ratio != 1.0 and teacher.bias is not None)
    )
    teacher_bias = teacher.bias if own else None
    if ratio != 1.0:
        teacher_hidden = teacher_hidden * ratio
        teacher_bias = None if teacher_bias is None else teacher_bias * ratio
    return fused_linear_distillation(
        student_hidden,
        teacher_hidden,
        student.weight,
        targets,
        bias=student.bias,
        teacher_weight=teacher.weight if own else None,
        teacher_bias=teacher_bias,
        mask=mask,
        token_weight=token_weight,
        old_logprobs=old_logprobs,
        step_ids=step_ids,
        logit_scale=student.logit_scale,
        softcap=student.softcap,
        reduction=reduction,
        normalizer=normalizer,
        workspace=workspace,
        gradient_tolerance=gradient_tolerance,
        **shared,
    )


def _gathered(head: HeadValues, dtype: torch.dtype) -> HeadValues:
    """A head that FSDP2 put back into shards when the forward of its model was over, gathered once.
    It has no gradient, and under mixed precision the dtype of the hidden states, as in there."""
    weight, bias = (
        part.full_tensor().detach().to(dtype) if is_dtensor(part) else part
        for part in (head.weight, head.bias)
    )
    assert weight is not None
    return replace(head, weight=weight, bias=bias)


@torch.compiler.disable(reason="LoRA on a head and two soft caps or dtypes run eagerly")
def _by_chunks(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student: HeadValues,
    teacher: HeadValues,
    targets: Tensor | None,
    mask: Tensor | None,
    token_weight: Tensor | None,
    old_logprobs: Tensor | None,
    reduction: str,
    normalizer: float | Tensor | None,
    workspace: str | int,
    shared: dict[str, Any],
) -> DistillationOutput:
    """Compute the loss with its gradients from logits of a few tokens at a time."""
    leading = tuple(student_hidden.shape[:-1])
    objective = Objective.of(shared["objective"])
    advantage_mask = shared["advantage_mask"]
    check_reduction(reduction, leading)
    check_normalizer(normalizer)
    if reduction == "none":
        raise ValueError(
            "reduction: 'none' is not supported with LoRA on a head, two soft caps or dtypes"
        )
    if advantage_mask is not None and not advantage_mask.is_token_local:
        raise ValueError(
            "advantage_mask: top_fraction and per_step compare tokens with each other, which is "
            "not supported with LoRA on a head, two soft caps or dtypes; use a threshold or a sign"
        )
    for name, value, kind in (
        ("targets", targets, "int"),
        ("mask", mask, "mask"),
        ("token_weight", token_weight, "float"),
        ("old_logprobs", old_logprobs, "float"),
    ):
        check_per_token(name, value, leading, "student_hidden", student_hidden, kind)
    exists = student_hidden.new_ones(leading, dtype=torch.bool) if mask is None else mask != 0
    if targets is not None:
        exists = exists & (targets != shared["ignore_index"])
    # A chunk is summed with the weights that its tokens have among all of them.
    weights = loss_weights(exists, token_weight, reduction, normalizer, student_hidden.dtype)

    # What gets a gradient: each is added up over the chunks, because no chunk's graph may stay.
    parts = student.low_rank
    candidates = [student.weight, student.bias, *(t for part in parts for t in (part.a, part.b))]
    learned = [t for t in candidates if t is not None and t.requires_grad]
    has_grad = torch.is_grad_enabled()
    if has_grad and student_hidden.requires_grad:
        learned.insert(0, student_hidden)
    elif not has_grad:
        learned = []
    # Rows, which zeros in the strides of a transposed tensor would not give.
    totals = [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in learned]

    # As many tokens as the workspace has room for, at least one.
    vocabulary = student.weight.shape[0]
    budget = workspace_bytes(workspace) or AUTO_WORKSPACE
    each = MATRICES_A_CHUNK * vocabulary * student_hidden.element_size()
    outputs: list[DistillationOutput] = []
    for rows in _chunks(exists.numel(), max(1, budget // each)):
        present = exists.reshape(-1)[rows]

        # Rows without a token may hold anything; products with A would carry a NaN on.
        def existing(hidden: Tensor, rows: slice = rows, present: Tensor = present) -> Tensor:
            flat = hidden.reshape(-1, hidden.shape[-1])[rows]
            return torch.where(present[:, None], flat, torch.zeros_like(flat))

        with torch.no_grad():
            teacher_logits = teacher.logits(existing(teacher_hidden))
        hidden = existing(student_hidden.detach()).requires_grad_(student_hidden.requires_grad)
        logits = student.logits(hidden)
        dtype = torch.promote_types(logits.dtype, teacher_logits.dtype)
        logits, teacher_logits = logits.to(dtype), teacher_logits.to(dtype)
        output = distillation_from_logits(
            logits,
            teacher_logits,
            None if targets is None else targets.reshape(-1)[rows],
            mask=present,
            token_weight=weights[rows],
            old_logprobs=None if old_logprobs is None else old_logprobs.reshape(-1)[rows],
            reduction="sum",
            in_place=bool(learned) and objective.top_k is None,
            **shared,
        )
        if learned:
            wanted = [hidden if tensor is student_hidden else tensor for tensor in learned]
            found = torch.autograd.grad(output.loss, wanted)
            for tensor, total, gradient in zip(learned, totals, found, strict=True):
                if tensor is student_hidden:
                    total.reshape(-1, total.shape[-1])[rows] = gradient
                else:
                    total.add_(gradient)
        outputs.append(output)
    merged = _merge(outputs, leading)
    if learned:
        merged["loss"] = _KnownGradients.apply(merged["loss"], tuple(totals), *learned)
    return DistillationOutput(**merged)


def _chunks(tokens: int, size: int) -> Iterator[slice]:
    for start in range(0, max(tokens, 1), size):
        yield slice(start, start + size)


def _merge(outputs: list[DistillationOutput], leading: tuple[int, ...]) -> dict[str, Any]:
    """Add up the losses, and put the per-token results together in the shape [...]."""
    merged: dict[str, Any] = {}
    for name in (field.name for field in fields(DistillationOutput)):
        values = [getattr(output, name) for output in outputs]
        if name == "loss":
            merged[name] = torch.stack([value.detach() for value in values]).sum()
        else:
            merged[name] = None if values[0] is None else torch.cat(values).reshape(leading)
    return merged


class _KnownGradients(torch.autograd.Function):
    """A loss whose gradients were made with it: loss [], gradients, then what they belong to."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], *_: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()  # a result of its own, which callers may scale in place

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        scaled = (gradient * grad_loss.to(gradient.dtype) for gradient in ctx.saved_tensors)
        return (None, None, *scaled)
