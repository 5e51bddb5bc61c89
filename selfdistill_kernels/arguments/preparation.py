"""From the arguments of a public function to what `_distillation` and the operators take.

A public function puts its arguments into three objects (`Models`, `PerToken`, `Settings`), and
`prepare` makes the three of them that everything below receives: `LinearInputs`, `TokenTerms` and
`LossOptions`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from selfdistill_kernels.advantage import SIGNS, AdvantageMask, Gate
from selfdistill_kernels.arguments.checks import (
    check_companions,
    check_head,
    check_in_place,
    check_logits,
    check_normalizer,
    check_per_token,
    check_reduction,
    check_targets_given,
    check_teacher,
    check_tolerance,
    check_top_k,
    require_tensor,
)
from selfdistill_kernels.autocast import autocast_dtype
from selfdistill_kernels.backends.interface import LinearInputs, Needs
from selfdistill_kernels.backends.registry import choose_backend
from selfdistill_kernels.logits import LogitTransform
from selfdistill_kernels.objective import Objective
from selfdistill_kernels.options import LossOptions
from selfdistill_kernels.parallel.operands import agreed_shard, local_operands
from selfdistill_kernels.statistics import statistics_dtype
from selfdistill_kernels.tolerance import GradientTolerance, Rounding


@dataclass(frozen=True)
class Models:
    """Who is scored: hidden states and heads, or logits, checked against each other.

    Attributes:
        name: of the argument that `student_hidden` was, for messages.
        student_hidden, teacher_hidden: [..., H] and [..., H_t], or logits [..., V] without a head;
            no teacher for log-probs of one model.
        weight, teacher_weight, bias, teacher_bias: as in LinearInputs.
        group: the ranks that hold the other rows of the heads; None where they are whole.
    """

    name: str
    student_hidden: Tensor
    teacher_hidden: Tensor | None
    weight: Tensor | None = None
    teacher_weight: Tensor | None = None
    bias: Tensor | None = None
    teacher_bias: Tensor | None = None
    group: dist.ProcessGroup | None = None

    @classmethod
    def of_two(
        cls,
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        weight: Tensor,
        teacher_weight: Tensor | None,
        bias: Tensor | None,
        teacher_bias: Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> Models:
        """Student and teacher, cast as autocast asks. Raises TypeError or ValueError."""
        operands, group = local_operands(
            {"student_hidden": student_hidden, "teacher_hidden": teacher_hidden},
            {
                "weight": weight,
                "teacher_weight": teacher_weight,
                "bias": bias,
                "teacher_bias": teacher_bias,
            },
            group,
        )
        student_hidden = require_tensor("student_hidden", operands["student_hidden"])
        teacher_hidden = require_tensor("teacher_hidden", operands["teacher_hidden"])
        weight = require_tensor("weight", operands["weight"])
        teacher_weight, bias, teacher_bias = (
            operands[name] for name in ("teacher_weight", "bias", "teacher_bias")
        )
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
        check_teacher(leading, weight, teacher_hidden, teacher_weight, teacher_bias)
        if teacher_weight is None and teacher_bias is None:
            teacher_bias = bias
        return cls(
            "student_hidden",
            student_hidden,
            teacher_hidden,
            weight,
            teacher_weight,
            bias,
            teacher_bias,
            group,
        )

    @classmethod
    def of_one(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> Models:
        """One model, cast as autocast asks. Raises TypeError or ValueError."""
        operands, group = local_operands(
            {"hidden": hidden}, {"weight": weight, "bias": bias}, group
        )
        hidden = require_tensor("hidden", operands["hidden"])
        weight = require_tensor("weight", operands["weight"])
        bias = operands["bias"]
        autocast = autocast_dtype(hidden.device)
        if autocast is not None:
            hidden, weight = _cast(hidden, autocast), _cast(weight, autocast)
            bias = None if bias is None else _cast(bias, autocast)
        check_head("model", "hidden", hidden, "weight", weight, "bias", bias)
        return cls("hidden", hidden, None, weight, bias=bias, group=group)

    @classmethod
    def of_logits(cls, student: Tensor, teacher: Tensor, *, in_place: bool) -> Models:
        """Logits of student and teacher. Raises TypeError or ValueError."""
        check_logits(student, teacher)
        if in_place:
            check_in_place(student, teacher)
        return cls("student_logits", student, teacher)

    @property
    def leading(self) -> tuple[int, ...]:
        """The shape [...] of the tokens."""
        return tuple(self.student_hidden.shape[:-1])

    @property
    def vocabulary(self) -> int:
        """The size V of the vocabulary, or with a group of this rank's part of it."""
        return self.student_hidden.shape[-1] if self.weight is None else self.weight.shape[0]


@dataclass(frozen=True)
class PerToken:
    """The optional tensors [...] with one value for each token, as they were given."""

    targets: Tensor | None
    mask: Tensor | None
    ignore_index: int
    token_weight: Tensor | None = None
    old_logprobs: Tensor | None = None
    step_ids: Tensor | None = None

    def check(self, models: Models) -> None:
        """Raise unless shapes, devices and kinds of value are right."""
        for name, value, kind in (
            ("targets", self.targets, "int"),
            ("mask", self.mask, "mask"),
            ("token_weight", self.token_weight, "float"),
            ("old_logprobs", self.old_logprobs, "float"),
            ("step_ids", self.step_ids, "int"),
        ):
            check_per_token(name, value, models.leading, models.name, models.student_hidden, kind)

    def existing(self, models: Models) -> Tensor:
        """[...] bool, True where a token exists."""
        mask = self.mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask != 0
        if self.targets is None:
            device = models.student_hidden.device
            return (
                torch.ones(models.leading, dtype=torch.bool, device=device)
                if mask is None
                else mask
            )
        counted = self.targets != self.ignore_index
        return counted if mask is None else mask & counted


@dataclass(frozen=True)
class Settings:
    """The arguments that are no tensors of tokens or models; `workspace` in bytes, 0 for "auto"."""

    objective: Objective
    transform: LogitTransform
    workspace: int
    backend: str
    advantage_mask: AdvantageMask | None = None
    reduction: str = "mean"
    normalizer: float | Tensor | None = None
    in_place: bool = False
    tolerance: GradientTolerance | None = None


@dataclass(frozen=True)
class TokenTerms:
    """What the loss of each of the N tokens counts.

    Attributes:
        leading: the shape [...] that the tokens had.
        exists: [N] bool.
        loss_weight: [N], the token's weight over the denominator.
        old_logprobs: [N] or None, for importance weights.
        step_ids: [N] int64 or None: unique over the batch, -1 outside of steps.
        advantage_mask: which tokens carry a gradient.
        reduced: whether the losses are summed up.
        in_one_visit: whether the loss of a token is known when its row of logits is visited.
    """

    leading: tuple[int, ...]
    exists: Tensor
    loss_weight: Tensor
    old_logprobs: Tensor | None
    step_ids: Tensor | None
    advantage_mask: AdvantageMask | None
    reduced: bool
    in_one_visit: bool


def prepare(
    models: Models, tokens: PerToken, settings: Settings
) -> tuple[LinearInputs, TokenTerms, LossOptions]:
    """Check the arguments against each other and flatten them to N tokens.

    Raises:
        TypeError, ValueError: bad input; the message names the argument.
        RuntimeError: a named backend that is not available here.
    """
    objective, mask = settings.objective, settings.advantage_mask
    leading, student = models.leading, models.student_hidden
    # Everything that can be refused is refused before any tensor is made.
    tokens.check(models)
    check_reduction(settings.reduction, leading)
    check_normalizer(settings.normalizer)
    check_targets_given(models.name, objective, mask, tokens.targets)
    check_companions(objective, mask, tokens.old_logprobs, tokens.step_ids)
    is_sharded = models.group is not None
    backend = choose_backend(
        settings.backend,
        device=student.device,
        dtype=student.dtype,
        is_sharded=is_sharded,
    )

    check_tolerance(settings.tolerance, objective, backend, student.device, is_sharded=is_sharded)

    # A backend may give loss and gradient in one visit of the logits where no token's loss waits
    # for those of others; a gradient in the place of the logits needs just that.
    token_local = mask is None or mask.is_token_local
    # The loss of a shard's row is known when the other ranks have seen theirs.
    in_one_visit = (
        settings.reduction != "none" and objective.top_k is None and token_local and not is_sharded
    )
    if settings.in_place and not in_one_visit:
        raise ValueError(
            "in_place: needs the loss of each token in one visit, so no reduction='none', top_k, "
            "top_fraction or per_step; leave in_place out"
        )

    # From here on there are N tokens, whatever shape they came in.
    exists = tokens.existing(models)
    loss_weight = loss_weights(
        exists, tokens.token_weight, settings.reduction, settings.normalizer, student.dtype
    )
    old_logprobs = tokens.old_logprobs
    if old_logprobs is not None:
        old_logprobs = _flat(_constant(old_logprobs)).to(loss_weight.dtype)
    needs = _needs(models, in_place=settings.in_place)
    # What decides which sums the ranks of a sharded head exchange.
    exchange = (backend, objective, mask, settings.transform, needs.hidden)
    inputs = _linear_inputs(models, tokens, exists, settings.transform, exchange)
    check_top_k(objective, inputs.whole_vocabulary)
    terms = TokenTerms(
        leading=leading,
        exists=_flat(exists),
        loss_weight=loss_weight,
        old_logprobs=old_logprobs,
        step_ids=None if tokens.step_ids is None else _flat_step_ids(tokens.step_ids, leading),
        advantage_mask=mask,
        reduced=settings.reduction != "none",
        in_one_visit=in_one_visit,
    )
    options = LossOptions(
        settings.transform,
        objective,
        Gate(SIGNS[mask.sign], mask.threshold) if mask is not None and token_local else None,
        needs,
        settings.workspace,
        backend,
        None
        if settings.tolerance is None
        else Rounding.of(settings.tolerance, inputs.student_hidden),
    )
    return inputs, terms, options


def _linear_inputs(
    models: Models,
    tokens: PerToken,
    exists: Tensor,
    transform: LogitTransform,
    exchange: tuple[object, ...],
) -> LinearInputs:
    """Flatten the models' tensors, and cut the teacher's off from the graph behind them."""
    inputs = LinearInputs(
        _flat_rows(models.student_hidden),
        None if models.teacher_hidden is None else _flat_rows(_constant(models.teacher_hidden)),
        models.weight,
        None if models.teacher_weight is None else _constant(models.teacher_weight),
        models.bias,
        None if models.teacher_bias is None else _constant(models.teacher_bias),
        None if tokens.targets is None else _flat(tokens.targets).to(torch.int64),
        _flat(exists),
        transform,
    )
    if models.group is None:
        return inputs
    hidden = {models.name: inputs.student_hidden}
    if inputs.teacher_hidden is not None:
        hidden["teacher_hidden"] = inputs.teacher_hidden
    shard = agreed_shard(
        models.group,
        size=models.vocabulary,
        hidden=hidden,
        exists=_flat(exists),
        targets=inputs.targets,
        settings=repr(exchange),
    )
    targets = None if inputs.targets is None else inputs.targets - shard.start
    return replace(inputs, targets=targets, shard=shard)


def _needs(models: Models, *, in_place: bool) -> Needs:
    """Return which gradients autograd would ask for."""
    hidden, weight, bias = (
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (models.student_hidden, models.weight, models.bias)
    )
    return Needs(hidden, weight, bias, in_place=in_place and hidden)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as autocast would: float64 and integers stay as they are."""
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def _constant(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def _flat(per_token: Tensor) -> Tensor:
    """Return [...] as [N]."""
    return per_token if per_token.dim() == 1 else per_token.reshape(-1)


def _flat_rows(rows: Tensor) -> Tensor:
    """Return [..., H] as [N, H]."""
    return rows if rows.dim() == 2 else rows.reshape(-1, rows.shape[-1])


def _flat_step_ids(step_ids: Tensor, leading: tuple[int, ...]) -> Tensor:
    """[N] int64 step numbers that are unique over the batch, -1 outside of steps."""
    time = leading[-1] if leading else 1
    step_ids = step_ids.to(torch.int64).reshape(-1, time)
    first = torch.arange(step_ids.shape[0], device=step_ids.device)[:, None] * time
    # A number beyond the time axis names no step of this sequence.
    inside = (step_ids >= 0) & (step_ids < time)
    return torch.where(inside, step_ids + first, torch.full_like(step_ids, -1)).reshape(-1)


def loss_weights(
    exists: Tensor,
    token_weight: Tensor | None,
    reduction: str,
    normalizer: float | Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """[N] what each token's loss is multiplied by: token weight over denominator.

    Args:
        exists: [..., T] bool, False for tokens that count nowhere.
        token_weight: [..., T] or None.
        reduction, normalizer: as in `fused_linear_distillation`.
        dtype: of the hidden states or logits; weights have that of their statistics.
    """
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
