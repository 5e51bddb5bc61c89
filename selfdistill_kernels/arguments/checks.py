"""Early errors: each names the argument, what came and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from selfdistill_kernels.advantage import AdvantageMask
from selfdistill_kernels.objective import Objective
from selfdistill_kernels.tolerance import GradientTolerance

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "sequence_mean", "none")


def require_tensor(name: str, value: object) -> Tensor:
    """Raise TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    return value


def require_float(name: str, value: Tensor) -> None:
    """Raise TypeError unless `value` holds floats."""
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating-point dtype, got {value.dtype}")


def require_shape(name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Raise ValueError unless `value` has exactly the expected shape."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(
            f"{name}: expected shape {tuple(expected)} ({meaning}), got {tuple(value.shape)}"
        )


def require_same(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless dtype (TypeError) and device (ValueError) agree with another tensor's."""
    require_device(name, value, other_name, other)
    if value.dtype != other.dtype:
        raise TypeError(
            f"{name}: expected dtype {other.dtype} like {other_name}, got {value.dtype}; "
            "cast one of them"
        )


def require_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both live on one device."""
    if value.device != other.device:
        raise ValueError(
            f"{name}: expected device {other.device} like {other_name}, got {value.device}"
        )


def check_head(
    role: str,
    hidden_name: str,
    hidden: Tensor,
    weight_name: str,
    weight: Tensor,
    bias_name: str,
    bias: Tensor | None,
) -> None:
    """Check hidden states [..., H] against an lm_head [V, H] and its bias [V]."""
    for name, value in ((hidden_name, hidden), (weight_name, weight)):
        require_float(name, require_tensor(name, value))
    if hidden.dim() < 1:
        raise ValueError(f"{hidden_name}: expected shape [..., H], got a scalar")
    if weight.dim() != 2:
        raise ValueError(f"{weight_name}: expected shape [V, H], got {tuple(weight.shape)}")
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"{weight_name}: an empty lm_head {tuple(weight.shape)} has no tokens")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{hidden_name}: hidden size {hidden.shape[-1]} does not match {weight_name} "
            f"{tuple(weight.shape)} (expected [..., {weight.shape[1]}] for the {role})"
        )
    require_same(weight_name, weight, hidden_name, hidden)
    if bias is not None:
        require_float(bias_name, require_tensor(bias_name, bias))
        require_shape(bias_name, bias, (weight.shape[0],), "one value a vocabulary entry")
        require_same(bias_name, bias, weight_name, weight)


def check_teacher(
    leading: tuple[int, ...],
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
) -> None:
    """Check the teacher's hidden states and head against the student's head and shape [...]."""
    shared = teacher_weight is None
    check_head(
        "teacher, which shares `weight` because teacher_weight is None" if shared else "teacher",
        "teacher_hidden",
        teacher_hidden,
        "weight" if teacher_weight is None else "teacher_weight",
        weight if teacher_weight is None else teacher_weight,
        "teacher_bias",
        teacher_bias,
    )
    require_shape(
        "teacher_hidden",
        teacher_hidden,
        (*leading, teacher_hidden.shape[-1]),
        "the leading shape of student_hidden, then the teacher's hidden size",
    )
    if teacher_weight is not None and teacher_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"teacher_weight: expected the student's vocabulary of {weight.shape[0]} rows, got "
            f"{tuple(teacher_weight.shape)}"
        )
    if teacher_hidden.dtype != weight.dtype or teacher_hidden.device != weight.device:
        raise TypeError(
            f"teacher_hidden: expected {weight.dtype} on {weight.device} like weight, got "
            f"{teacher_hidden.dtype} on {teacher_hidden.device}"
        )


def check_logits(student: Tensor, teacher: Tensor) -> None:
    """Check the student's logits [..., V] and the teacher's against them."""
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        require_float(name, require_tensor(name, logits))
        if logits.dim() < 1 or logits.shape[-1] == 0:
            raise ValueError(f"{name}: expected shape [..., V], got {tuple(logits.shape)}")
    require_shape("teacher_logits", teacher, tuple(student.shape), "that of student_logits")
    require_same("teacher_logits", teacher, "student_logits", student)


def check_in_place(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Raise ValueError unless logits may be overwritten by their gradient."""
    if torch.compiler.is_compiling():
        raise ValueError("in_place: not supported under torch.compile; leave it out there")
    if student_logits.is_leaf and student_logits.requires_grad:
        raise ValueError(
            "in_place: student_logits is a leaf that requires a gradient, whose values autograd "
            "does not let go; pass the output of the model's head"
        )
    if not student_logits.is_contiguous():
        raise ValueError(
            f"in_place: student_logits must be contiguous, got strides {student_logits.stride()}"
        )
    storages = (logits.untyped_storage() for logits in (student_logits, teacher_logits))
    # Empty ones all lie at address 0.
    if student_logits.numel() > 0 and len({storage.data_ptr() for storage in storages}) == 1:
        raise ValueError("in_place: student_logits and teacher_logits share their memory")


def check_per_token(
    name: str,
    value: Tensor | None,
    leading: tuple[int, ...],
    like_name: str,
    like: Tensor,
    kind: str,
) -> None:
    """Check an optional per-token tensor: shape [...], device, and "int", "mask" or "float"."""
    if value is None:
        return
    require_tensor(name, value)
    require_shape(name, value, leading, f"the leading shape of {like_name}")
    require_device(name, value, like_name, like)
    integers = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
    fits = {
        "int": value.dtype in integers,
        "mask": value.dtype == torch.bool or value.dtype in integers,
        "float": value.dtype in FLOATS,
    }[kind]
    if not fits:
        wanted = "bool or integer" if kind == "mask" else kind
        raise TypeError(f"{name}: expected a tensor of {wanted} values, got {value.dtype}")


def check_reduction(reduction: str, leading: tuple[int, ...]) -> None:
    """Raise ValueError for an unknown reduction, or one that the shape cannot serve."""
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction: unknown {reduction!r}; expected one of {', '.join(REDUCTIONS)}"
        )
    if reduction == "sequence_mean" and len(leading) < 2:
        raise ValueError(
            "reduction: 'sequence_mean' averages over the last token dimension first; expected "
            f"student_hidden of shape [batch, time, H], got leading shape {leading}"
        )


def check_normalizer(normalizer: float | Tensor | None) -> None:
    """Raise unless `normalizer` is None, a number > 0 or a tensor with one element.

    A tensor's value is not read: it may live on another device or in a traced graph.
    """
    if normalizer is None:
        return
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(
                f"normalizer: expected one number, got a tensor of shape {tuple(normalizer.shape)}"
            )
    elif isinstance(normalizer, bool) or not isinstance(normalizer, (int, float)):
        raise TypeError(f"normalizer: expected a number or a tensor, got {normalizer!r}")
    elif not normalizer > 0:
        raise ValueError(f"normalizer: expected a number > 0, got {normalizer}")


def check_targets_given(
    input_name: str,
    objective: Objective,
    advantage_mask: AdvantageMask | None,
    targets: Tensor | None,
) -> None:
    """Raise ValueError where something is defined by sampled tokens that were not given."""
    if targets is not None:
        return
    if objective.needs_targets:
        raise ValueError(
            "targets: policy_gradient, cross_entropy and importance_clip are defined by the "
            "sampled tokens; pass "
            f"targets of the leading shape of {input_name}"
        )
    if advantage_mask is not None:
        raise ValueError(
            "targets: advantage_mask needs the sampled tokens to know their advantage; pass "
            f"targets of the leading shape of {input_name}"
        )


def check_top_k(objective: Objective, vocabulary: int) -> None:
    """Raise ValueError for more entries than there are."""
    if objective.top_k is not None and objective.top_k > vocabulary:
        raise ValueError(
            f"objective: top_k must be at most the vocabulary of {vocabulary}, got "
            f"{objective.top_k}"
        )


def check_tolerance(
    tolerance: GradientTolerance | None,
    objective: Objective,
    backend: str,
    device: torch.device,
    *,
    is_sharded: bool,
) -> None:
    """Raise ValueError where there is no other gradient than the exact one."""
    if tolerance is None:
        return
    if objective.top_k is not None:
        reason = "an objective with top_k has the exact gradient only"
    elif objective.entry_clip is not None:
        reason = "an objective with entry_clip has the exact gradient only"
    elif is_sharded:
        reason = "a head that is sharded along the vocabulary has the exact gradient only"
    elif backend == "triton" or device.type != "cpu":
        reason = f"backend {backend!r} on {device.type!r} makes the exact gradient only"
    else:
        return
    raise ValueError(f"gradient_tolerance: {reason}; pass None")


def check_companions(
    objective: Objective,
    advantage_mask: AdvantageMask | None,
    old_logprobs: Tensor | None,
    step_ids: Tensor | None,
) -> None:
    """Raise ValueError where one of two arguments that go together is missing."""
    for name, value, wanted, owner in (
        (
            "old_logprobs",
            old_logprobs,
            objective.importance_clip is not None,
            "objective.importance_clip",
        ),
        (
            "step_ids",
            step_ids,
            advantage_mask is not None and advantage_mask.per_step,
            "advantage_mask.per_step",
        ),
    ):
        if (value is not None) != wanted:
            state = "missing" if wanted else "given"
            raise ValueError(
                f"{name}: {state}, but {owner} is {'set' if wanted else 'not set'}; the two go "
                "together"
            )


def workspace_bytes(workspace: str | int) -> int:
    """Resolve the workspace option to bytes, 0 for "auto"."""
    if workspace == "auto":
        return 0
    if isinstance(workspace, bool) or not isinstance(workspace, int):
        raise TypeError(f"workspace: expected 'auto' or a number of bytes, got {workspace!r}")
    if workspace <= 0:
        raise ValueError(f"workspace: expected a positive number of bytes, got {workspace}")
    return workspace
