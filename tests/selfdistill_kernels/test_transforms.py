"""torch.func and forward mode: right as plain torch is, or refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from exactness import assert_no_worse_than_torch
from kernel_cases import make_case, materialised_losses
from torch import Tensor, nn
from torch.autograd import forward_ad

from selfdistill_kernels import Objective, fused_linear_distillation, fused_linear_logprobs

CASE = make_case(5, 8, 41, seed=3, bias=True)
TOP_K = Objective("forward_kl", top_k=6)


def loss_of(hidden: Tensor, weight: Tensor, objective: str | Objective, **options) -> Tensor:
    case = CASE.cast(hidden.dtype)
    return fused_linear_distillation(
        hidden, case.teacher_hidden, weight, case.targets, bias=case.bias, objective=objective,
        teacher_weight=case.weight, teacher_bias=case.bias, **options,
    ).loss  # fmt: skip


def scalar(hidden: Tensor, weight: Tensor, backend: str) -> Tensor:
    return loss_of(hidden, weight, "reverse_kl", backend=backend)


def per_token(hidden: Tensor, weight: Tensor, backend: str) -> Tensor:
    return loss_of(hidden, weight, "reverse_kl", reduction="none", backend=backend).mean()


def top_k(hidden: Tensor, weight: Tensor, backend: str) -> Tensor:
    return loss_of(hidden, weight, TOP_K, backend=backend)


def logprobs(hidden: Tensor, weight: Tensor, backend: str) -> Tensor:
    case = CASE.cast(hidden.dtype)
    found = fused_linear_logprobs(hidden, weight, case.targets, bias=case.bias, backend=backend)
    return found.logprobs.mean()


FUNCTIONS = [scalar, per_token, top_k, logprobs]


def plain(function: Callable, hidden: Tensor, weight: Tensor) -> Tensor:
    case = CASE.cast(hidden.dtype)
    case.teacher_weight = case.weight
    case.student_hidden, case.weight = hidden, weight
    if function is logprobs:
        scores = torch.log_softmax(hidden @ weight.T + case.bias, -1)
        return scores.gather(1, case.targets[:, None]).mean()
    # The materialised teacher has no bias where it has a head of its own: put it into the head.
    ones = torch.ones(5, 1, dtype=hidden.dtype)
    case.teacher_hidden = torch.cat([case.teacher_hidden, ones], dim=1)
    case.teacher_weight = torch.cat([case.teacher_weight, case.bias[:, None]], dim=1)
    objective = TOP_K if function is top_k else Objective("reverse_kl")
    return materialised_losses(case, objective)[0].mean()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_grad(function: Callable, backend: str) -> None:
    def gradients(dtype: torch.dtype, compute: Callable) -> dict[str, Tensor]:
        case = CASE.cast(dtype)
        found = torch.func.grad(compute, argnums=(0, 1))(case.student_hidden, case.weight)
        return dict(zip(("hidden", "weight"), found, strict=True))

    ours = gradients(torch.float32, lambda h, w: function(h, w, backend))
    torchs, exact = (
        gradients(dtype, lambda h, w: plain(function, h, w))
        for dtype in (torch.float32, torch.float64)
    )
    assert_no_worse_than_torch("gradient", ours, torchs, exact)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_vmap_of_grad_is_one_by_one(function: Callable, backend: str) -> None:
    case = CASE.cast(torch.float32)
    batch = torch.stack([case.student_hidden, 2.0 * case.student_hidden, -case.student_hidden])

    def gradient(hidden: Tensor) -> Tensor:
        return torch.func.grad(function)(hidden, case.weight, backend)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = torch.func.vmap(gradient)(batch)
        values = torch.func.vmap(lambda hidden: function(hidden, case.weight, backend))(batch)
    assert torch.equal(found, torch.stack([gradient(hidden) for hidden in batch]))
    expected = torch.stack([function(hidden, case.weight, backend) for hidden in batch])
    torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functional_call(function: Callable) -> None:
    case = CASE.cast(torch.float32)
    model = nn.Linear(8, 8)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        hidden = torch.func.functional_call(model, parameters, (case.student_hidden,))
        return function(hidden, case.weight, "reference")

    found = torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()})
    function(model(case.student_hidden), case.weight, "reference").backward()
    torch.testing.assert_close(found, {name: p.grad for name, p in model.named_parameters()})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_forward_mode_is_refused(function: Callable) -> None:
    case = CASE.cast(torch.float32)
    hidden, tangent = case.student_hidden, torch.ones_like(case.student_hidden)

    def loss(hidden: Tensor) -> Tensor:
        return function(hidden, case.weight, "reference")

    for derivative in (
        lambda: torch.func.jvp(loss, (hidden,), (tangent,)),
        lambda: torch.func.jacfwd(loss)(hidden),
        lambda: torch.func.hessian(loss)(hidden),
    ):
        with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
            derivative()
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="forward-mode derivatives"),
    ):
        loss(forward_ad.make_dual(hidden, tangent))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_second_derivatives_are_refused(function: Callable) -> None:
    case = CASE.cast(torch.float32)

    def slope(hidden: Tensor) -> Tensor:
        return torch.func.grad(function)(hidden, case.weight, "reference").square().sum()

    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.func.grad(slope)(case.student_hidden)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_teacher_of_inference_mode(function: Callable, backend: str) -> None:
    case = CASE.cast(torch.float32)
    with torch.inference_mode():
        teacher, targets = case.teacher_hidden.clone(), case.targets.clone()
    case.student_hidden.requires_grad_()

    def gradient(teacher: Tensor, targets: Tensor) -> Tensor:
        if function is logprobs:
            loss = fused_linear_logprobs(
                case.student_hidden, case.weight, targets, backend=backend
            ).logprobs.sum()
        else:
            loss = fused_linear_distillation(
                case.student_hidden, teacher, case.weight, targets, backend=backend,
                objective=TOP_K if function is top_k else "forward_kl",
                reduction="none" if function is per_token else "mean",
            ).loss.sum()  # fmt: skip
        (found,) = torch.autograd.grad(loss, case.student_hidden)
        return found

    assert torch.equal(gradient(teacher, targets), gradient(case.teacher_hidden, case.targets))
