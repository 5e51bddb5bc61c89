"""Adapters of libraries that compute cross entropy from hidden states, and nothing else of ours.

Each builder is one of `contender.Contender.build`: mean cross entropy of the sampled tokens.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from benchmarks.contender import Step, StepResult, gradients
from benchmarks.problems import Problem
from selfdistill_kernels import fused_linear_logprobs


def ours_cross_entropy(problem: Problem, *, backend: str = "auto") -> Step:
    """`fused_linear_logprobs`: per-token log-probs, so the backward pass recomputes the logits."""

    def step() -> StepResult:
        out = fused_linear_logprobs(
            problem.student_hidden, problem.weight, problem.targets, backend=backend
        )
        return gradients(-out.logprobs.mean(), problem.student_hidden, problem.weight)

    return step


def liger_cross_entropy(problem: Problem) -> Step:
    """Liger's fused linear cross entropy (Triton; gradients in the forward pass, row chunks)."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss_of = LigerFusedLinearCrossEntropyLoss()

    def step() -> StepResult:
        loss = loss_of(problem.weight, problem.student_hidden, problem.targets)
        return gradients(loss, problem.student_hidden, problem.weight)

    return step


def cut_cross_entropy(problem: Problem, *, implementation: str) -> Step:
    """Apple's Cut Cross Entropy.

    Args:
        implementation: "cce" leaves out blocks whose gradient is below the rounding of bfloat16,
            "cce_exact" does not.
    """
    from cut_cross_entropy import linear_cross_entropy

    def step() -> StepResult:
        loss = linear_cross_entropy(
            problem.student_hidden, problem.weight, problem.targets, impl=implementation
        )
        return gradients(loss, problem.student_hidden, problem.weight)

    return step


def core_cross_entropy(problem: Problem, *, rows: int | None = None) -> Step:
    """torch's own linear_cross_entropy, whole or by chunks of rows.

    Raises:
        NotImplementedError: this torch has none.
    """
    if not hasattr(F, "linear_cross_entropy"):
        raise NotImplementedError(f"torch {torch.__version__} has no linear_cross_entropy")
    options = None if rows is None else torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)

    def step() -> StepResult:
        loss = F.linear_cross_entropy(
            problem.student_hidden, problem.weight, problem.targets, options=options
        )
        return gradients(loss, problem.student_hidden, problem.weight)

    return step


def quack_cross_entropy(problem: Problem) -> Step:
    """quack's chunked linear cross entropy (CuTe; 16-bit inputs, V and N multiples of 8)."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def step() -> StepResult:
        loss = chunked_linear_cross_entropy(
            problem.student_hidden, problem.weight, problem.targets, reduction="mean"
        )
        return gradients(loss, problem.student_hidden, problem.weight)

    return step
