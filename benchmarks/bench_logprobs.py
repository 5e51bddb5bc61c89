"""Log-probs and entropy of one model, without and with a backward pass, over the bare GEMMs.

pytest benchmarks/bench_logprobs.py --benchmark-only [--shape N/H/V]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.problems import DTYPES, Problem, Shape, make_problem
from selfdistill_kernels import fused_linear_logprobs

Results = list[Tensor]
LOSSES = {"forward": False, "backward": True}
# Of the largest value; gradients of bfloat16 inputs are rounded to bfloat16.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}


def floor(problem: Problem, backward: bool) -> Results:
    """One GEMM, and dH and dW behind it."""
    hidden, weight = problem.student_hidden.detach(), problem.weight.detach()
    logits = hidden @ weight.T
    return [logits @ weight, logits.T @ hidden] if backward else [logits]


def ours(problem: Problem, backward: bool) -> Results:
    """`fused_linear_logprobs`; its backward pass makes the logits again."""
    hidden, weight, targets = problem.student_hidden, problem.weight, problem.targets
    if not backward:
        with torch.no_grad():
            found = fused_linear_logprobs(hidden, weight, targets)
            return [found.logprobs, found.entropy]
    loss = fused_linear_logprobs(hidden, weight, targets).logprobs.mean()
    return list(torch.autograd.grad(loss, [hidden, weight]))


def materialised(problem: Problem, backward: bool) -> Results:
    """log_softmax of all logits."""
    hidden, weight, targets = problem.student_hidden, problem.weight, problem.targets
    with torch.set_grad_enabled(backward):
        logits = hidden @ weight.T
        logprobs = torch.log_softmax(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=1
        )
        chosen = logprobs.gather(1, targets[:, None])[:, 0]
        if not backward:
            return [chosen, -(logprobs.exp() * logprobs).sum(1)]
    return list(torch.autograd.grad(chosen.mean(), [hidden, weight]))


def in_float64(problem: Problem, backward: bool) -> Results:
    """Of the same values."""
    student, weight = (
        tensor.detach().double().requires_grad_()
        for tensor in (problem.student_hidden, problem.weight)
    )
    return materialised(replace(problem, student_hidden=student, weight=weight), backward)


@pytest.mark.parametrize("contender", [floor, ours, materialised], ids=lambda f: f.__name__)
@pytest.mark.parametrize("backward", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_logprobs(
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    dtype: str,
    backward: bool,
    contender: Callable[[Problem, bool], Results],
) -> None:
    """Check against the materialised one, then time."""
    shape = request.config.getoption("--shape") or Shape(256, 256, 16384)
    problem = make_problem(shape, DTYPES[dtype])
    if contender is ours:
        for made, exact in zip(ours(problem, backward), in_float64(problem, backward), strict=True):
            assert (made - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()
    benchmark.group = f"logprobs, N/H/V {shape}, {dtype}, backward {backward}"
    benchmark.pedantic(contender, args=(problem, backward), rounds=6, warmup_rounds=2)
