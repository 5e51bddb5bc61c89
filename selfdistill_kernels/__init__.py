"""Fused losses for self-distillation of language models, without [tokens, vocabulary] tensors."""

from selfdistill_kernels.advantage import AdvantageMask
from selfdistill_kernels.backends.native.memory import release_workspace
from selfdistill_kernels.logprobs import (
    LogprobOutput,
    RoundedLogprobOutput,
    fused_linear_logprobs,
)
from selfdistill_kernels.loss import (
    DistillationOutput,
    FusedLinearDistillationLoss,
    distillation_from_logits,
    fused_linear_distillation,
)
from selfdistill_kernels.objective import Objective
from selfdistill_kernels.tolerance import GradientError, GradientTolerance

__version__ = "0.1.0"

__all__ = [
    "AdvantageMask",
    "DistillationOutput",
    "FusedLinearDistillationLoss",
    "GradientError",
    "GradientTolerance",
    "LogprobOutput",
    "Objective",
    "RoundedLogprobOutput",
    "distillation_from_logits",
    "fused_linear_distillation",
    "fused_linear_logprobs",
    "release_workspace",
]
