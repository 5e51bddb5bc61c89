"""The public functions: check, flatten, call an operator, reduce."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from selfdistill_kernels.advantage import SIGNS, AdvantageMask
from selfdistill_kernels.autocast import autocast_dtype
from selfdistill_kernels.backends import check_backend_name, choose_backend
from selfdistill_kernels.backends.base import Gate, Needs, token_losses
from selfdistill_kernels.logits import LogitTransform
from selfdistill_kernels.objective import Objective
from selfdistill_kernels.ops import (
    LogitsLossInPlace,
    LossOptions,
)
from selfdistill_kernels.statistics import Column, advantage_of, statistics_dtype
from selfdistill_kernels.transforms import call_linear_loss, call_linear_statistics
from selfdistill_kernels.validation import (
    check_head,
    check_normalizer,
    check_per_token,
    check_reduction,
    require_float,
    require_same,
    require_shape,
    require_tensor,
    workspace_bytes,
)


@dataclass(frozen=True)
class DistillationOutput:
    """Loss and per-token statistics; [...] is the leading shape of the inputs.

    Statistics are float32 (float64 for float64 inputs), in nats, 0 where no token exists.

    Attributes:
        loss: scalar, or [...] with reduction="none".
        divergence: [...] of the objective's divergence alone.
        student_logprob: [...] log S(y), or None without targets.
        teacher_logprob: [...] log T(y), or None without targets.
        advantage: [...] log T(y) - log S(y), or None without targets.
        entropy: [...] entropy of the student.
        teacher_entropy: [...] entropy of the teacher.
        active: [...] bool, tokens that carry a gradient.
    """

    loss: Tensor
    divergence: Tensor
    student_logprob: Tensor | None
    teacher_logprob: Tensor | None
    advantage: Tensor | None
    entropy: Tensor
    teacher_entropy: Tensor
    active: Tensor


class LogprobOutput(NamedTuple):
    """Per-token results of `fused_linear_logprobs`, [...] float32, both differentiable."""

    logprobs: Tensor
    entropy: Tensor


def fused_linear_distillation(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    *,
    teacher_weight: Tensor | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    step_ids: Tensor | None = None,
    objective: str | Objective = "forward_kl",
    advantage_mask: AdvantageMask | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    workspace: str | int = "auto",
    backend: str = "auto",
) -> DistillationOutput:
    """Self-distillation loss from hidden states, without materialising [tokens, vocabulary].

    Logits are z = cap(logit_scale * (h W^T + b)) / temperature. Gradients flow from `loss` (and
    from `divergence` with reduction="none") to student_hidden, weight and bias, never to the
    teacher. Source: arXiv 2606.11173; formulas and tests against float64 in docs/math.md.

    Args:
        student_hidden: [..., H] last hidden states of the student (after the final norm).
        teacher_hidden: [..., H_t] of the self-teacher, aligned token by token; no gradient.
        weight: [V, H] lm_head; frozen (requires_grad False) costs no dW.
        targets: [...] int, the sampled tokens y. Needed by log-probs, advantage, policy gradient
            and cross entropy.
        teacher_weight: [V, H_t], None when the teacher shares `weight` and `bias`.
        bias, teacher_bias: [V] or None. With a shared head, teacher_bias None means `bias`.
        mask: [...] bool, or integers of which 0 is False as in completion_mask of transformers and
            TRL; False where no token exists; such rows are never read (NaN is fine).
        token_weight: [...] float, multiplies each token's loss (not the denominator).
        old_logprobs: [...] float, log-probs of the policy that sampled the tokens, for an
            objective's `importance_clip`.
        step_ids: [..., time] int for AdvantageMask(per_step=True): the tokens of one step of a
            sequence share a number in [0, time); negative outside of steps.
        objective: a divergence name or an Objective.
        advantage_mask: which tokens carry a gradient; dropped ones keep their statistics and stay
            in the denominator.
        ignore_index: a target with this value means that the token does not exist.
        temperature, logit_scale, softcap: see above; apply to both models.
        reduction: "mean" over existing tokens, "sum", "sequence_mean" (mean over the last token
            dimension, then over sequences, empty ones included) or "none".
        normalizer: replaces the denominator: of "mean", "sum" and "none" the number of tokens, of
            "sequence_mean" the number of sequences. For gradient accumulation and data
            parallelism, pass the whole batch's.
        workspace: bytes for tiles of logits, for what their products take beside them (copies of
            hidden states, columns widened to float32) and, with 16-bit inputs, for float32 sums; or
            "auto". Too little is an error that names the least.
        backend: "auto", "triton", "native" or "reference" (`selfdistill doctor` says what runs).

    Returns:
        DistillationOutput.

    Raises:
        TypeError, ValueError: bad input; the message names the argument.
    """
    student_hidden = require_tensor("student_hidden", student_hidden)
    teacher_hidden = require_tensor("teacher_hidden", teacher_hidden)
    weight = require_tensor("weight", weight)
    autocast = autocast_dtype(student_hidden.device)
    if autocast is not None:
        student_hidden, teacher_hidden, weight = (
            _cast(tensor, autocast) for tensor in (student_hidden, teacher_hidden, weight)
        )
        teacher_weight, bias, teacher_bias = (
            None if tensor is None else _cast(tensor, autocast)
            for tensor in (teacher_weight, bias, teacher_bias)
        )
    check_head("student", "student_hidden", student_hidden, "weight", weight, "bias", bias)
    leading = tuple(student_hidden.shape[:-1])
    _check_teacher(leading, weight, teacher_hidden, teacher_weight, bias, teacher_bias)
    if teacher_weight is None and teacher_bias is None:
        teacher_bias = bias
    return _distillation(
        "student_hidden",
        student_hidden,
        teacher_hidden,
        weight,
        teacher_weight,
        bias,
        teacher_bias,
        targets,
        mask=mask,
        token_weight=token_weight,
        old_logprobs=old_logprobs,
        step_ids=step_ids,
        objective=objective,
        advantage_mask=advantage_mask,
        ignore_index=ignore_index,
        transform=LogitTransform(logit_scale, softcap, temperature),
        reduction=reduction,
        normalizer=normalizer,
        workspace=workspace,
        backend=backend,
    )


def distillation_from_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    step_ids: Tensor | None = None,
    objective: str | Objective = "forward_kl",
    advantage_mask: AdvantageMask | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    in_place: bool = False,
    workspace: str | int = "auto",
    backend: str = "auto",
) -> DistillationOutput:
    """The same loss for people who already hold logits.

    Args:
        student_logits: [..., V]; carries the gradient.
        teacher_logits: [..., V]; no gradient.
        in_place: overwrite student_logits by their gradient instead of making another [..., V].
            For scalar losses that need no second look at the logits; one backward, not under
            torch.compile. Autograd refuses if somebody else saved these logits for backward.
        the rest: as in `fused_linear_distillation` (temperature and soft cap are applied here).

    Returns:
        DistillationOutput.

    Raises:
        TypeError, ValueError: bad input; the message names the argument.
    """
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        require_float(name, require_tensor(name, logits))
        if logits.dim() < 1 or logits.shape[-1] == 0:
            raise ValueError(f"{name}: expected shape [..., V], got {tuple(logits.shape)}")
    require_shape(
        "teacher_logits", teacher_logits, tuple(student_logits.shape), "that of student_logits"
    )
    require_same("teacher_logits", teacher_logits, "student_logits", student_logits)
    if in_place:
        _check_in_place(student_logits, teacher_logits)
    return _distillation(
        "student_logits",
        student_logits,
        teacher_logits,
        None,
        None,
        None,
        None,
        targets,
        mask=mask,
        token_weight=token_weight,
        old_logprobs=old_logprobs,
        step_ids=step_ids,
        objective=objective,
        advantage_mask=advantage_mask,
        ignore_index=ignore_index,
        transform=LogitTransform(1.0, softcap, temperature),
        reduction=reduction,
        normalizer=normalizer,
        in_place=in_place,
        workspace=workspace,
        backend=backend,
    )


def _distillation(
    input_name: str,
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor | None,
    teacher_weight: Tensor | None,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
    targets: Tensor | None,
    *,
    mask: Tensor | None,
    token_weight: Tensor | None,
    old_logprobs: Tensor | None,
    step_ids: Tensor | None,
    objective: str | Objective,
    advantage_mask: AdvantageMask | None,
    ignore_index: int,
    transform: LogitTransform,
    reduction: str,
    normalizer: float | Tensor | None,
    workspace: str | int,
    backend: str,
    in_place: bool = False,
) -> DistillationOutput:
    """Flatten, call an operator, reduce; with `weight` None the hidden states are logits."""
    objective = Objective.of(objective)
    budget = workspace_bytes(workspace)
    leading = tuple(student_hidden.shape[:-1])
    _check_tokens(input_name, leading, student_hidden, targets, mask, token_weight)
    check_per_token("old_logprobs", old_logprobs, leading, input_name, student_hidden, "float")
    check_per_token("step_ids", step_ids, leading, input_name, student_hidden, "int")
    check_reduction(reduction, leading)
    check_normalizer(normalizer)
    _check_targets_given(input_name, objective, advantage_mask, targets)
    vocabulary = student_hidden.shape[-1] if weight is None else weight.shape[0]
    if objective.top_k is not None and objective.top_k > vocabulary:
        raise ValueError(
            f"objective: top_k must be at most the vocabulary of {vocabulary}, got "
            f"{objective.top_k}"
        )
    _check_companions(objective, advantage_mask, old_logprobs, step_ids)
    name = choose_backend(backend, device=student_hidden.device, dtype=student_hidden.dtype)

    exists = _existing(leading, student_hidden.device, targets, mask, ignore_index)
    loss_weight = _loss_weight(exists, token_weight, reduction, normalizer, student_hidden.dtype)
    tensors = (
        _flat_rows(student_hidden),
        _flat_rows(_constant(teacher_hidden)),
        weight,
        None if teacher_weight is None else _constant(teacher_weight),
        bias,
        None if teacher_bias is None else _constant(teacher_bias),
        None if targets is None else _flat(targets).to(torch.int64),
        _flat(exists),
    )
    flat_old_logprobs = (
        None if old_logprobs is None else _flat(_constant(old_logprobs)).to(loss_weight.dtype)
    )

    two_visits = (
        reduction == "none"
        or objective.top_k is not None
        or not (advantage_mask is None or advantage_mask.is_token_local)
    )
    if in_place and two_visits:
        raise ValueError(
            "in_place: needs the loss of each token in one visit, so no reduction='none', top_k, "
            "top_fraction or per_step; leave in_place out"
        )
    if two_visits:
        # The loss of a token is not known when its row is visited: statistics first, and the
        # backward pass recomputes the logits of the tokens that carry a gradient.
        statistics, *_ = call_linear_statistics(
            tensors, transform.logit_scale, transform.softcap, transform.temperature,
            objective.divergence, objective.beta,
            objective.top_k or 0, objective.top_k_of,
            objective.tail and objective.top_k != vocabulary, budget, name,
        )  # fmt: skip
        frozen = statistics.detach()
        kept = _flat(exists)
        if advantage_mask is not None:
            steps = None if step_ids is None else _flat_step_ids(step_ids, leading)
            kept = advantage_mask.select(advantage_of(frozen), kept, steps)
        active = kept & (loss_weight != 0)
        per_token = token_losses(objective, statistics, loss_weight, active, flat_old_logprobs)
        loss = per_token.reshape(leading) if reduction == "none" else per_token.sum()
    else:
        has_grad = torch.is_grad_enabled()
        needs = Needs(
            has_grad and student_hidden.requires_grad,
            has_grad and weight is not None and weight.requires_grad,
            has_grad and bias is not None and bias.requires_grad,
        )
        gate = (
            None if advantage_mask is None
            else Gate(SIGNS[advantage_mask.sign], advantage_mask.threshold)
        )  # fmt: skip
        options = LossOptions(transform, objective, gate, needs, budget, name)
        arguments = (*tensors, loss_weight, flat_old_logprobs)
        if in_place and needs.hidden:
            loss, statistics, active = LogitsLossInPlace.apply(*arguments, options)
        else:
            loss, statistics, active = call_linear_loss(arguments, options)
        frozen = statistics.detach()

    shaped = frozen.reshape(*leading, frozen.shape[1])
    divergence = shaped[..., Column.DIVERGENCE]
    if reduction == "none":
        # Dropped tokens keep their value and lose their gradient.
        differentiable = statistics[:, Column.DIVERGENCE].reshape(leading)
        divergence = torch.where(kept.reshape(leading), differentiable, divergence)
    student_logprob = teacher_logprob = advantage = None
    if targets is not None:
        student_logprob = shaped[..., Column.STUDENT_LOGPROB]
        teacher_logprob = shaped[..., Column.TEACHER_LOGPROB]
        advantage = teacher_logprob - student_logprob
    return DistillationOutput(
        loss=loss,
        divergence=divergence,
        student_logprob=student_logprob,
        teacher_logprob=teacher_logprob,
        advantage=advantage,
        entropy=shaped[..., Column.ENTROPY],
        teacher_entropy=shaped[..., Column.TEACHER_ENTROPY],
        active=active.reshape(leading),
    )


def _flat(per_token: Tensor) -> Tensor:
    """[...] as [N]."""
    return per_token if per_token.dim() == 1 else per_token.reshape(-1)


def _flat_rows(rows: Tensor) -> Tensor:
    """[..., H] as [N, H]."""
    return rows if rows.dim() == 2 else rows.reshape(-1, rows.shape[-1])


def fused_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    workspace: str | int = "auto",
    backend: str = "auto",
) -> LogprobOutput:
    """log-probs of the targets and entropy, without materialising [tokens, vocabulary].

    Both results are differentiable with respect to hidden, weight and bias; the backward pass
    recomputes the logits of tokens with a non-zero upstream gradient.

    Args:
        hidden: [..., H]; weight: [V, H]; targets: [...] int; the rest as in
            `fused_linear_distillation`.

    Returns:
        LogprobOutput(logprobs, entropy), [...] float32, 0 where no token exists.

    Raises:
        TypeError, ValueError: bad input; the message names the argument.
    """
    transform = LogitTransform(logit_scale, softcap, temperature)
    budget = workspace_bytes(workspace)
    hidden = require_tensor("hidden", hidden)
    weight = require_tensor("weight", weight)
    autocast = autocast_dtype(hidden.device)
    if autocast is not None:
        hidden, weight = _cast(hidden, autocast), _cast(weight, autocast)
        bias = None if bias is None else _cast(bias, autocast)
    check_head("model", "hidden", hidden, "weight", weight, "bias", bias)
    leading = tuple(hidden.shape[:-1])
    require_tensor("targets", targets)
    _check_tokens("hidden", leading, hidden, targets, mask, None)
    name = choose_backend(backend, device=hidden.device, dtype=hidden.dtype)
    exists = _existing(leading, hidden.device, targets, mask, ignore_index)
    tensors = (
        hidden.reshape(-1, hidden.shape[-1]), None, weight, None, bias, None,
        _flat(targets).to(torch.int64), _flat(exists),
    )  # fmt: skip
    statistics, *_ = call_linear_statistics(
        tensors,
        transform.logit_scale, transform.softcap, transform.temperature,
        "none", 0.5, 0, "student", True, budget, name,
    )  # fmt: skip
    return LogprobOutput(
        statistics[:, Column.STUDENT_LOGPROB].reshape(leading),
        statistics[:, Column.ENTROPY].reshape(leading),
    )


class FusedLinearDistillationLoss(nn.Module):
    """Module form of `fused_linear_distillation`; holds the options, not the head.

    Args:
        objective, advantage_mask, ignore_index, temperature, logit_scale, softcap, reduction,
        workspace, backend: as in `fused_linear_distillation`; checked here.
    """

    def __init__(
        self,
        *,
        objective: str | Objective = "forward_kl",
        advantage_mask: AdvantageMask | None = None,
        ignore_index: int = -100,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        reduction: str = "mean",
        workspace: str | int = "auto",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.objective = Objective.of(objective)
        LogitTransform(logit_scale, softcap, temperature)
        workspace_bytes(workspace)
        check_reduction(reduction, (1, 1))
        check_backend_name(backend)
        self.advantage_mask = advantage_mask
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.reduction = reduction
        self.workspace = workspace
        self.backend = backend

    def forward(
        self,
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        weight: Tensor,
        targets: Tensor | None = None,
        *,
        teacher_weight: Tensor | None = None,
        bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        mask: Tensor | None = None,
        token_weight: Tensor | None = None,
        old_logprobs: Tensor | None = None,
        step_ids: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> DistillationOutput:
        """See `fused_linear_distillation`."""
        return fused_linear_distillation(
            student_hidden,
            teacher_hidden,
            weight,
            targets,
            teacher_weight=teacher_weight,
            bias=bias,
            teacher_bias=teacher_bias,
            mask=mask,
            token_weight=token_weight,
            old_logprobs=old_logprobs,
            step_ids=step_ids,
            normalizer=normalizer,
            objective=self.objective,
            advantage_mask=self.advantage_mask,
            ignore_index=self.ignore_index,
            temperature=self.temperature,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            reduction=self.reduction,
            workspace=self.workspace,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{self.objective}, reduction={self.reduction!r}, backend={self.backend!r}"


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast does: float64 stays, and so does what holds no floats."""
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def _constant(tensor: Tensor) -> Tensor:
    """Without the graph behind it."""
    return tensor.detach() if tensor.requires_grad else tensor


def _check_teacher(
    leading: tuple[int, ...],
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    bias: Tensor | None,
    teacher_bias: Tensor | None,
) -> None:
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


def _check_in_place(student_logits: Tensor, teacher_logits: Tensor) -> None:
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


def _check_tokens(
    input_name: str,
    leading: tuple[int, ...],
    hidden: Tensor,
    targets: Tensor | None,
    mask: Tensor | None,
    token_weight: Tensor | None,
) -> None:
    check_per_token("targets", targets, leading, input_name, hidden, "int")
    check_per_token("mask", mask, leading, input_name, hidden, "mask")
    check_per_token("token_weight", token_weight, leading, input_name, hidden, "float")


def _check_targets_given(
    input_name: str,
    objective: Objective,
    advantage_mask: AdvantageMask | None,
    targets: Tensor | None,
) -> None:
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


def _check_companions(
    objective: Objective,
    advantage_mask: AdvantageMask | None,
    old_logprobs: Tensor | None,
    step_ids: Tensor | None,
) -> None:
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


def _flat_step_ids(step_ids: Tensor, leading: tuple[int, ...]) -> Tensor:
    """[N] int64 step numbers that are unique over the batch, -1 outside of steps."""
    time = leading[-1] if leading else 1
    step_ids = step_ids.to(torch.int64).reshape(-1, time)
    first = torch.arange(step_ids.shape[0], device=step_ids.device)[:, None] * time
    # A number beyond the time axis names no step of this sequence.
    inside = (step_ids >= 0) & (step_ids < time)
    return torch.where(inside, step_ids + first, torch.full_like(step_ids, -1)).reshape(-1)


def _existing(
    leading: tuple[int, ...],
    device: torch.device,
    targets: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
) -> Tensor:
    """[...] bool, True where a token exists."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask != 0
    if targets is None:
        return torch.ones(leading, dtype=torch.bool, device=device) if mask is None else mask
    counted = targets != ignore_index
    return counted if mask is None else mask & counted


def _loss_weight(
    exists: Tensor,
    token_weight: Tensor | None,
    reduction: str,
    normalizer: float | Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """[N] what each token's loss is multiplied by: token weight over denominator."""
    weight = exists.to(statistics_dtype(dtype))
    if token_weight is not None:
        token_weight = token_weight.detach().to(weight.dtype)
        weight = torch.where(exists, token_weight, torch.zeros_like(weight))
    if reduction == "sequence_mean":
        weight = weight / exists.sum(dim=-1, keepdim=True).clamp(min=1)
        sequences = math.prod(exists.shape[:-1])
        weight = weight / (max(sequences, 1) if normalizer is None else normalizer)
    elif normalizer is not None:
        weight = weight / normalizer
    elif reduction == "mean":
        weight = weight / exists.sum().clamp(min=1)
    return _flat(weight)
