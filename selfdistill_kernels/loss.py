"""The public functions: prepare the arguments, call an operator, reduce."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from selfdistill_kernels.advantage import AdvantageMask
from selfdistill_kernels.arguments import (
    Models,
    PerToken,
    Settings,
    TokenTerms,
    check_reduction,
    prepare,
    workspace_bytes,
)
from selfdistill_kernels.backends.dispatch import check_backend_name
from selfdistill_kernels.backends.interface import Expected, LinearInputs
from selfdistill_kernels.logits import LogitTransform
from selfdistill_kernels.objective import Objective
from selfdistill_kernels.options import LossOptions
from selfdistill_kernels.statistics import Column, advantage_of
from selfdistill_kernels.token_loss import token_losses
from selfdistill_kernels.tolerance import GradientError, GradientTolerance, errors_of
from selfdistill_kernels.transforms import call_linear_loss, call_linear_statistics


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
        gradient_error: relative standard errors of dH [...] and dW, or None without a
            `gradient_tolerance`.
    """

    loss: Tensor
    divergence: Tensor
    student_logprob: Tensor | None
    teacher_logprob: Tensor | None
    advantage: Tensor | None
    entropy: Tensor
    teacher_entropy: Tensor
    active: Tensor
    gradient_error: GradientError | None = None


# For torch.export, torch.func and whoever else looks for the tensors of a result.
torch.export.register_dataclass(
    DistillationOutput, serialized_type_name=f"{__name__}.{DistillationOutput.__name__}"
)


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
    group: dist.ProcessGroup | None = None,
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
    gradient_tolerance: float | Literal["rounding"] | GradientTolerance | None = None,
) -> DistillationOutput:
    """Self-distillation loss from hidden states, without materialising [tokens, vocabulary].

    Logits are z = cap(logit_scale * (h W^T + b)) / temperature. Gradients flow from `loss` (and
    from `divergence` with reduction="none") to student_hidden, weight and bias, never to the
    teacher. Source: arXiv 2606.11173; formulas and tests against float64 in docs/math.md.

    Args:
        student_hidden: [..., H] last hidden states of the student (after the final norm).
        teacher_hidden: [..., H_t] of the self-teacher, aligned token by token; no gradient.
        weight: [V, H] lm_head; frozen (requires_grad False) costs no dW. A DTensor with Shard(0),
            as ColwiseParallel makes of it, stays in its shards (docs/parallel.md).
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
        group: makes plain tensors shards: its ranks hold the rows of the vocabulary in order, and
            weight, teacher_weight, bias and teacher_bias are this rank's; all else is the same on
            all ranks. Forward and backward are collectives then.
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
        gradient_tolerance: None for the exact gradient. A number is the relative standard error
            that each token's dH may have, "rounding" that of bfloat16 (2e-3): the gradient of the
            logits is rounded at random to few entries, right on average, and its products become
            sparse (docs/tolerance.md). The output says what error came of it.

    Returns:
        DistillationOutput.

    Raises:
        TypeError, ValueError: bad input; the message names the argument.
    """
    settings = Settings(
        Objective.of(objective),
        LogitTransform(logit_scale, softcap, temperature),
        workspace_bytes(workspace),
        backend,
        advantage_mask,
        reduction,
        normalizer,
        tolerance=GradientTolerance.of(gradient_tolerance),
    )
    models = Models.of_two(
        student_hidden, teacher_hidden, weight, teacher_weight, bias, teacher_bias, group
    )
    tokens = PerToken(targets, mask, ignore_index, token_weight, old_logprobs, step_ids)
    return _distillation(*prepare(models, tokens, settings))


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
    settings = Settings(
        Objective.of(objective),
        LogitTransform(1.0, softcap, temperature),
        workspace_bytes(workspace),
        backend,
        advantage_mask,
        reduction,
        normalizer,
        in_place,
    )
    models = Models.of_logits(student_logits, teacher_logits, in_place=in_place)
    tokens = PerToken(targets, mask, ignore_index, token_weight, old_logprobs, step_ids)
    return _distillation(*prepare(models, tokens, settings))


def _distillation(
    inputs: LinearInputs, terms: TokenTerms, options: LossOptions
) -> DistillationOutput:
    """Call an operator, and give its results the shape [...] of the tokens."""
    if terms.in_one_visit:
        loss, statistics, active = call_linear_loss(
            inputs, terms.loss_weight, terms.old_logprobs, options
        )
        frozen = statistics.detach()
    else:
        # The loss of a token, or its gradient, is not known when its row is visited: statistics
        # first, and the backward pass makes the gradients of the tokens that carry one.
        kept, mask = terms.exists, terms.advantage_mask
        expected = Expected(
            options.needs,
            options.objective.terms,
            options.gate,
            is_ranked=mask is not None and not mask.is_token_local,
        )
        statistics = call_linear_statistics(inputs, options, expected)
        frozen = statistics.detach()
        if mask is not None:
            kept = mask.select(advantage_of(frozen), kept, terms.step_ids)
        active = kept & (terms.loss_weight != 0)
        losses = token_losses(
            options.objective, statistics, terms.loss_weight, active, terms.old_logprobs
        )
        loss = losses.sum() if terms.reduced else losses.reshape(terms.leading)

    leading = terms.leading
    shaped = frozen.reshape(*leading, frozen.shape[1])
    divergence = shaped[..., Column.DIVERGENCE]
    if not terms.reduced:
        # Dropped tokens keep their value and lose their gradient.
        differentiable = statistics[:, Column.DIVERGENCE].reshape(leading)
        divergence = torch.where(kept.reshape(leading), differentiable, divergence)
    student_logprob = teacher_logprob = advantage = None
    if inputs.targets is not None:
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
        gradient_error=errors_of(options.rounding, leading),
    )


class FusedLinearDistillationLoss(nn.Module):
    """Module form of `fused_linear_distillation`; holds the options, not the head.

    Args:
        objective, advantage_mask, ignore_index, temperature, logit_scale, softcap, reduction,
        workspace, backend, gradient_tolerance: as in `fused_linear_distillation`; checked here.
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
        gradient_tolerance: float | Literal["rounding"] | GradientTolerance | None = None,
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
        self.gradient_tolerance = GradientTolerance.of(gradient_tolerance)

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
        group: dist.ProcessGroup | None = None,
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
            group=group,
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
            gradient_tolerance=self.gradient_tolerance,
        )

    def extra_repr(self) -> str:
        tolerance = self.gradient_tolerance
        rounded = "" if tolerance is None else f", gradient_tolerance={tolerance.relative_error:g}"
        return f"{self.objective}, reduction={self.reduction!r}, backend={self.backend!r}{rounded}"
