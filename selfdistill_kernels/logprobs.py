"""The public function for log-probs: prepare the arguments, call an operator."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch.distributed as dist
from torch import Tensor

from selfdistill_kernels.arguments import (
    Models,
    PerToken,
    Settings,
    prepare,
    require_tensor,
    workspace_bytes,
)
from selfdistill_kernels.backends.interface import Expected
from selfdistill_kernels.logits import LogitTransform
from selfdistill_kernels.objective import Objective
from selfdistill_kernels.statistics import Column
from selfdistill_kernels.tolerance import GradientError, GradientTolerance, errors_of
from selfdistill_kernels.transforms import call_linear_statistics


class LogprobOutput(NamedTuple):
    """Per-token results of `fused_linear_logprobs`, [...] float32; `entropy` is differentiable
    unless that was called with entropy="detached"."""

    logprobs: Tensor
    entropy: Tensor


class RoundedLogprobOutput(NamedTuple):
    """The same with a `gradient_tolerance`: `gradient_error` is NaN until the backward pass."""

    logprobs: Tensor
    entropy: Tensor
    gradient_error: GradientError


@overload
def fused_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    group: dist.ProcessGroup | None = ...,
    ignore_index: int = ...,
    temperature: float = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    entropy: str = ...,
    workspace: str | int = ...,
    backend: str = ...,
    gradient_tolerance: None = None,
) -> LogprobOutput: ...


@overload
def fused_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    group: dist.ProcessGroup | None = ...,
    ignore_index: int = ...,
    temperature: float = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    entropy: str = ...,
    workspace: str | int = ...,
    backend: str = ...,
    gradient_tolerance: float | Literal["rounding"] | GradientTolerance,
) -> RoundedLogprobOutput: ...


def fused_linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    entropy: str = "differentiable",
    workspace: str | int = "auto",
    backend: str = "auto",
    gradient_tolerance: float | Literal["rounding"] | GradientTolerance | None = None,
) -> LogprobOutput | RoundedLogprobOutput:
    """log-probs of the targets and entropy, without materialising [tokens, vocabulary].

    What is differentiable is so with respect to hidden, weight and bias. Where all tokens fit the
    workspace, one call at a time keeps it until its backward pass; else that makes the logits of
    tokens with a non-zero upstream gradient again.

    Args:
        hidden: [..., H]; weight: [V, H]; targets: [...] int.
        entropy: "differentiable", or "detached" for one without a gradient: with a frozen head,
            however many tokens there are, dH then needs no second look at the logits.
        the rest: as in `fused_linear_distillation`.

    Returns:
        LogprobOutput(logprobs, entropy), [...] float32, 0 where no token exists; with a
        gradient_tolerance RoundedLogprobOutput, which has its errors beside them.

    Raises:
        TypeError, ValueError: bad input; the message names the argument.
    """
    if entropy not in ("differentiable", "detached"):
        raise ValueError(f"entropy: expected 'differentiable' or 'detached', got {entropy!r}")
    settings = Settings(
        Objective(divergence="none", entropy=1.0),
        LogitTransform(logit_scale, softcap, temperature),
        workspace_bytes(workspace),
        backend,
        reduction="sum",
        tolerance=GradientTolerance.of(gradient_tolerance),
    )
    models = Models.of_one(hidden, weight, bias, group)
    tokens = PerToken(require_tensor("targets", targets), mask, ignore_index)
    inputs, terms, options = prepare(models, tokens, settings)
    terms_wanted = (False, True, entropy == "differentiable")
    expected = Expected(options.needs, terms_wanted, None, is_ranked=False)
    statistics = call_linear_statistics(inputs, options, expected)
    entropies = statistics if entropy == "differentiable" else statistics.detach()
    found = LogprobOutput(
        statistics[:, Column.STUDENT_LOGPROB].reshape(terms.leading),
        entropies[:, Column.ENTROPY].reshape(terms.leading),
    )
    errors = errors_of(options.rounding, terms.leading)
    return found if errors is None else RoundedLogprobOutput(*found, errors)
