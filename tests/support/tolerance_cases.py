"""Problems for a gradient tolerance, and their gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from selfdistill_kernels import DistillationOutput, Objective, fused_linear_distillation

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
