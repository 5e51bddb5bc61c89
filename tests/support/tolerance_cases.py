"""Problems for a gradient tolerance, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from selfdistill_kernels import (
    DistillationOutput,
    GradientTolerance,
    Objective,
    fused_linear_distillation,
)

TOKENS, HIDDEN, VOCABULARY = 48, 48, 4003
RISK = 1e-6
OBJECTIVES: dict[str, str | Objective] = {
    "forward_kl": "forward_kl",
    "reverse_kl": "reverse_kl",
    "jsd": Objective("jsd", beta=0.3),
    "skew_kl": Objective("skew_kl", beta=0.1),
    "skew_reverse_kl": Objective("skew_reverse_kl", beta=0.2),
    "cross_entropy": "cross_entropy",
    "policy_gradient": "policy_gradient",
    "entropy": Objective("none", entropy=-0.5, cross_entropy=0.1),
    "all": Objective("reverse_kl", policy_gradient=0.5, cross_entropy=0.2, entropy=0.1),
    "clipped": Objective("forward_kl", divergence_clip=0.5, cross_entropy=0.3),
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"logit_scale": 1.3, "temperature": 0.8},
    "capped": {"softcap": 30.0},
    "weighted": {"mask": True, "token_weight": True},
}


def problem(
    *, dtype: torch.dtype = torch.float32, trained: bool = True, seed: int = 0, **sizes: int
) -> dict[str, Tensor]:
    """Distributions from nearly sure to broad, as a language model has them."""
    tokens, hidden = sizes.get("tokens", TOKENS), sizes.get("hidden", HIDDEN)
    vocabulary = sizes.get("vocabulary", VOCABULARY)
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = 4.0 / math.sqrt(hidden) * randn(vocabulary, hidden) + 0.3 * randn(1, hidden)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    boost = 6.0 * torch.rand(tokens, 1, generator=generator)
    student = randn(tokens, hidden) + boost * torch.nn.functional.normalize(weight[targets], dim=1)
    teacher = student + 0.3 * randn(tokens, hidden)
    return {
        "student_hidden": student.to(dtype).requires_grad_(),
        "teacher_hidden": teacher.to(dtype),
        "weight": weight.to(dtype).requires_grad_(trained),
        "targets": targets,
    }


def loss_of(tensors: dict[str, Tensor], **options: Any) -> DistillationOutput:
    made: dict[str, Any] = dict(options)
    tokens, vocabulary = tensors["targets"].shape[0], tensors["weight"].shape[0]
    generator = torch.Generator().manual_seed(7)
    if made.pop("bias", False):
        made["bias"] = tensors.get("bias", torch.randn(vocabulary, generator=generator))
    if made.get("mask") is True:
        made["mask"] = torch.rand(tokens, generator=generator) < 0.8
    if made.get("token_weight") is True:
        made["token_weight"] = torch.randn(tokens, generator=generator)
    made |= {name: tensor for name, tensor in tensors.items() if name != "bias"}
    return fused_linear_distillation(**made)


def gradients(
    tensors: dict[str, Tensor], upstream: Tensor | None = None, **options: Any
) -> tuple[dict[str, Tensor], DistillationOutput]:
    """The gradients of the leaves, in float64."""
    out = loss_of(tensors, **options)
    leaves = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    made = torch.autograd.grad(out.loss, list(leaves.values()), upstream)
    return dict(zip(leaves, (g.double() for g in made), strict=True)), out


def assert_error_is_reported(
    tensors: dict[str, Tensor],
    tolerance: float | GradientTolerance,
    *,
    factor: float = 1.3,
    upstream: Tensor | None = None,
    rounding: float = 0.0,
    **options: Any,
) -> DistillationOutput:
    """Over all tokens, and of dW, what is measured is what is said and what is allowed."""
    exact_options = {**options, "backend": "reference"}
    exact, before = gradients(tensors, upstream, **exact_options)
    made, out = gradients(tensors, upstream, gradient_tolerance=tolerance, **options)
    assert before.gradient_error is None
    said = out.gradient_error
    assert said is not None
    error = (made["student_hidden"] - exact["student_hidden"]).norm(dim=-1)
    size = exact["student_hidden"].norm(dim=-1)
    has = size > 0
    if isinstance(tolerance, GradientTolerance):
        tolerance = tolerance.relative_error
    measured = (error[has] / size[has]).square().mean().sqrt()
    predicted = said.hidden.double()[has].square().mean().sqrt()
    assert 0 < predicted <= factor * tolerance
    assert measured <= factor * predicted + rounding
    assert (error[~has] == 0).all()
    assert (said.hidden[~has] == 0).all()
    if said.hidden_bound is not None:
        assert_bounds_hold(said.hidden_bound, error, size)
        # Of a use: what Bernstein's inequality makes of a standard error.
        assert (said.hidden_bound[has] <= 20 * tolerance).double().mean() > 0.5
    if "weight" in made:
        measured = (made["weight"] - exact["weight"]).norm() / exact["weight"].norm()
        assert measured <= factor * said.weight + rounding
        if said.weight_bound is not None:
            assert measured <= said.weight_bound + 1e-5
            assert said.weight < said.weight_bound < math.inf
    else:
        assert said.weight.isnan()
        assert said.weight_bound is None or said.weight_bound.isnan()
    return out


def assert_bounds_hold(bound: Tensor, error: Tensor, size: Tensor) -> None:
    """Up to what float32 products lose anyway."""
    assert (error <= (bound.double() + 1e-5) * size).all()


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
