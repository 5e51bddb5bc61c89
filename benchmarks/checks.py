"""Nothing is timed before it has given the right loss and gradients on a small problem."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.contender import Contender, Step, StepResult
from benchmarks.peers import materialised_loss
from benchmarks.problems import CHECK_SHAPE, EVEN_CHECK_SHAPE, Problem, make_problem

# Largest error allowed, relative to the largest value; gradients come back in the inputs' dtype.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# Logits of size 20 rounded to bfloat16 are off by 0.06, and so are log-probs.
TOLERANCE_ROUNDED_LOGITS = 0.3
# What others are compared with at the timed shape, the first of them that runs there.
PLAIN = ("torch", "torch_frozen")


class WrongResultError(RuntimeError):
    """A contender does not compute what it is timed for."""


@dataclass(frozen=True)
class Errors:
    """Largest error against float64, relative to the largest value; None where there is none."""

    loss: float | None
    hidden: float | None
    weight: float | None

    def within(self, tolerance: float) -> bool:
        """False for NaN."""
        return all(error <= tolerance for error in asdict(self).values() if error is not None)


def truth(problem: Problem, rho: float | None = None) -> StepResult:
    """Loss and gradients by float64 autograd from the definition, on the problem's own values."""
    hidden, head = (
        tensor.detach().double().requires_grad_()
        for tensor in (problem.student_hidden, problem.weight)
    )
    teacher = problem.teacher_hidden.double()
    # Dropped tokens have no loss, and stay in the denominator.
    kept = (
        torch.ones_like(problem.targets, dtype=torch.bool) if rho is None else problem.active(rho)
    )
    loss = materialised_loss(
        hidden[kept], teacher[kept], head, problem.targets[kept], problem.objective
    )
    loss = loss * kept.double().mean()
    dh, dw = torch.autograd.grad(loss, [hidden, head])
    return StepResult(loss.detach(), dh, dw)


def check(
    contender: Contender,
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    objective: str = "reverse_kl",
) -> Errors:
    """Compare a contender with the truth on a small problem.

    Raises:
        WrongResultError: an error above the tolerance, or a dW for a frozen head.
    """
    even = objective == "cross_entropy" and not contender.is_ours
    shape = EVEN_CHECK_SHAPE if even else CHECK_SHAPE
    problem = make_problem(shape, dtype, device=device, objective=objective)
    result = contender.build(problem)()
    if contender.is_floor:
        return Errors(None, None, None)
    if (result.weight is not None) != contender.trained_head:
        raise WrongResultError(f"{contender.key}: dW is computed for a frozen head, or missing")
    expected = truth(problem, contender.rho)
    errors, tolerance = _errors(result, expected), _tolerance(contender, dtype)
    if not errors.within(tolerance):
        raise WrongResultError(f"{contender.key}, {dtype}: {errors}, allowed {tolerance}")
    return errors


def check_agreement(
    running: Sequence[Contender],
    steps: Mapping[str, Step],
    dtype: torch.dtype,
    *,
    on_step: Callable[[str], None] = lambda key: None,
) -> dict[str, str]:
    """Run every step once and compare loss and dH of those that keep all tokens with plain torch's.

    On a problem too large for float64, where the small check does not reach: many tiles, the whole
    vocabulary, tiles of ours that were tuned for it. Without plain torch the first that keeps all
    tokens stands for it.

    Returns:
        Why a contender of others did not get through (out of memory, a wrong result), by key.

    Raises:
        WrongResultError: ours differs by more than the tolerances of both.
    """
    expected: StepResult | None = None
    allowed = 0.0
    failures: dict[str, str] = {}
    for contender in sorted(running, key=lambda contender: contender.key not in PLAIN):
        on_step(contender.key)
        try:
            result = steps[contender.key]()
            if contender.is_floor or contender.rho is not None:
                continue
            tolerance = _tolerance(contender, dtype)
            if expected is None:
                expected, allowed = result._replace(weight=None), tolerance
                continue
            errors = _errors(result, expected)
            if not errors.within(tolerance + allowed):
                raise WrongResultError(f"{contender.key} at the timed shape: {errors}")
        except Exception as error:
            failures[contender.key] = excuse(contender, error)
    return failures


def excuse(contender: Contender, error: Exception) -> str:
    """Why a library is left out of the tables, in one line; libraries fail in many ways.

    Raises:
        Exception: the error itself where it is ours, or the floor's.
    """
    if contender.is_ours or contender.is_floor:
        raise error
    return (f"{type(error).__name__}: {error}".splitlines() or [""])[0][:200]


def _tolerance(contender: Contender, dtype: torch.dtype) -> float:
    rounded = contender.rounds_logits and dtype != torch.float32
    return TOLERANCE_ROUNDED_LOGITS if rounded else TOLERANCE[dtype]


def _errors(result: StepResult, expected: StepResult) -> Errors:
    return Errors(*(_error(got, want) for got, want in zip(result, expected, strict=True)))


def _error(got: Tensor | None, want: Tensor | None) -> float | None:
    if got is None or want is None:
        return None
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max())
