"""gradient_tolerance where it is asked for in other ways: of log-probs, and in compiled graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerance_cases import OBJECTIVES, RISK, gradients, problem
from torch import Tensor

from selfdistill_kernels import (
    GradientTolerance,
    RoundedLogprobOutput,
    fused_linear_distillation,
    fused_linear_logprobs,
)


def logprob_gradients(
    tensors: dict[str, Tensor], backend: str, tolerance: Any, **options: Any
) -> tuple[list[Tensor], Any]:
    leaves = [tensors[name] for name in ("student_hidden", "weight")]
    leaves = [tensor for tensor in leaves if tensor.requires_grad]
    out = fused_linear_logprobs(
        tensors["student_hidden"], tensors["weight"], tensors["targets"],
        backend=backend, gradient_tolerance=tolerance, **options,
    )  # fmt: skip
    upstream = torch.linspace(0.5, 1.5, out.logprobs.shape[0])
    loss = out.logprobs @ upstream
    if options.get("entropy") != "detached":
        loss = loss + 0.3 * out.entropy @ upstream
    return [made.double() for made in torch.autograd.grad(loss, leaves)], out


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("entropy", ["differentiable", "detached"])
def test_logprobs(backend: str, entropy: str, trained: bool) -> None:
    tensors = problem(trained=trained)
    tolerance = GradientTolerance(0.02, bound_risk=RISK)
    exact, plain = logprob_gradients(tensors, "reference", None, entropy=entropy)
    made, out = logprob_gradients(tensors, backend, tolerance, entropy=entropy)
    assert not hasattr(plain, "gradient_error")
    assert isinstance(out, RoundedLogprobOutput)
    said = out.gradient_error
    assert said.hidden_bound is not None
    error, size = (made[0] - exact[0]).norm(dim=1), exact[0].norm(dim=1)
    predicted = said.hidden.double().square().mean().sqrt()
    assert 0 < predicted <= 1.3 * 0.02
    assert (error / size).square().mean().sqrt() <= 1.3 * predicted
    assert (error <= (said.hidden_bound.double() + 1e-5) * size).all()
    if trained:
        measured = (made[1] - exact[1]).norm() / exact[1].norm()
        assert 0 < measured <= 1.3 * said.weight
        assert said.weight_bound is not None
        assert measured <= said.weight_bound
    else:
        assert said.weight.isnan()


@pytest.mark.parametrize("trained", [True, False])
def test_logprobs_whose_logits_are_made_again(trained: bool) -> None:
    tensors = problem(trained=trained)
    small = 46 * (4 * 4003 + 16 * 48)
    exact, _ = logprob_gradients(tensors, "reference", None)
    made, out = logprob_gradients(tensors, "native", 0.02, workspace=small)
    for a, b in zip(made, exact, strict=True):
        assert 0 < (a - b).norm() <= 2 * 0.02 * b.norm()
    assert (out.gradient_error.hidden > 0).any()


def test_logprobs_keep_their_values_and_their_shape(backend: str) -> None:
    tensors = problem()
    hidden, targets = tensors["student_hidden"].view(6, 8, -1), tensors["targets"].view(6, 8)
    exact = fused_linear_logprobs(hidden, tensors["weight"], targets, backend=backend)
    out = fused_linear_logprobs(
        hidden, tensors["weight"], targets, backend=backend, gradient_tolerance=0.02
    )
    assert isinstance(out, RoundedLogprobOutput)
    assert out.gradient_error.hidden.shape == (6, 8)
    assert out.gradient_error.hidden.isnan().all()
    assert torch.equal(out.logprobs, exact.logprobs)
    assert torch.equal(out.entropy, exact.entropy)


@pytest.mark.parametrize(("objective", "risk"), [("forward_kl", None), ("all", RISK)])
def test_a_compiled_loss_is_one_graph(objective: str, risk: float | None) -> None:
    torch.compiler.reset()
    tensors = problem(tokens=12, vocabulary=1009)
    leaves = [tensors["student_hidden"], tensors["weight"]]
    tolerance = GradientTolerance(0.02, seed=5, bound_risk=risk)

    def step() -> tuple[Tensor, ...]:
        out = fused_linear_distillation(
            **tensors, objective=OBJECTIVES[objective], gradient_tolerance=tolerance
        )
        assert out.gradient_error is not None
        return (out.loss, *(error for error in out.gradient_error if error is not None))

    expected = step()
    loss, *errors = torch.compile(step, fullgraph=True, backend="aot_eager")()
    assert len(errors) == (2 if risk is None else 4)
    assert (errors[0] > 0).any()
    assert not any(error.requires_grad for error in errors)
    for a, b in zip((loss, *errors), expected, strict=True):
        assert torch.equal(a, b)
    compiled = torch.autograd.grad(loss, leaves)
    for a, b in zip(compiled, torch.autograd.grad(expected[0], leaves), strict=True):
        assert torch.equal(a, b)


def test_a_compiled_loss_of_single_tokens_breaks_the_graph_and_is_right() -> None:
    torch.compiler.reset()
    tensors = problem(tokens=12, vocabulary=1009)

    def step() -> Any:
        return fused_linear_distillation(**tensors, reduction="none", gradient_tolerance=0.02)

    made = torch.compile(step, backend="aot_eager")()
    (compiled,) = torch.autograd.grad(made.loss.sum(), [tensors["student_hidden"]])
    eager, out = gradients(tensors, torch.ones(12), reduction="none", gradient_tolerance=0.02)
    assert torch.equal(compiled.double(), eager["student_hidden"])
    assert torch.equal(made.gradient_error.hidden, out.gradient_error.hidden)
