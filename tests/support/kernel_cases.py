"""Problems, and the plain torch that every backend is held against: float64, and float32 beside."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from exactness import assert_no_worse_than_torch
from torch import Tensor

from selfdistill_kernels import Objective

DIVERGENCES = ["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"]


@dataclass
class Case:
    """One problem; tensors in the dtype under test."""

    student_hidden: Tensor
    teacher_hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    teacher_weight: Tensor | None = None
    options: dict[str, float] = field(default_factory=dict)

    def cast(self, dtype: torch.dtype) -> Case:
        def to(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(dtype)

        return replace(
            self,
            student_hidden=to(self.student_hidden),
            teacher_hidden=to(self.teacher_hidden),
            weight=to(self.weight),
            bias=to(self.bias),
            teacher_weight=to(self.teacher_weight),
        )

    def leaves(self) -> list[Tensor]:
        """The tensors that get a gradient, made to require it."""
        found = [self.student_hidden, self.weight]
        if self.bias is not None:
            found.append(self.bias)
        return [tensor.requires_grad_() for tensor in found]

    def call(self, function: Callable, **options: object) -> object:
        return function(
            self.student_hidden,
            self.teacher_hidden,
            self.weight,
            self.targets,
            bias=self.bias,
            teacher_weight=self.teacher_weight,
            **self.options,
            **options,
        )


def make_case(
    tokens: int = 7,
    hidden: int = 13,
    vocabulary: int = 101,
    *,
    seed: int = 0,
    bias: bool = False,
    teacher_hidden: int | None = None,
    closeness: float = 0.5,
    dtype: torch.dtype = torch.float64,
    **options: float,
) -> Case:
    """Correlated student and teacher, as in self-distillation; values are exact in bfloat16."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16).to(dtype)

    student = randn(tokens, hidden)
    if teacher_hidden is None:
        teacher = (student + closeness * randn(tokens, hidden)).to(torch.bfloat16).to(dtype)
    else:
        teacher = randn(tokens, teacher_hidden)
    return Case(
        student,
        teacher,
        randn(vocabulary, hidden),
        torch.randint(0, vocabulary, (tokens,), generator=generator),
        bias=randn(vocabulary) if bias else None,
        teacher_weight=None if teacher_hidden is None else randn(vocabulary, teacher_hidden),
        options=options,
    )


# Values by name, and the scalar whose gradients are wanted.
Compute = Callable[[Case], tuple[dict[str, Tensor], Tensor]]


def materialised_losses(case: Case, objective: Objective) -> tuple[Tensor, Tensor, dict]:
    """Per-token loss and divergence by plain torch and autograd, in the case's dtype.

    Written from the definitions (log_softmax, kl), not from the formulas of the backends.
    """
    scale = case.options.get("logit_scale", 1.0)
    cap = case.options.get("softcap")
    temperature = case.options.get("temperature", 1.0)

    def logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        scores = hidden @ weight.T
        if bias is not None:
            scores = scores + bias
        scores = scores * scale
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        return torch.log_softmax(scores / temperature, dim=-1)

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return p.exp() * (p - q)

    student = logprobs(case.student_hidden, case.weight, case.bias)
    head = case.weight if case.teacher_weight is None else case.teacher_weight
    teacher_bias = case.bias if case.teacher_weight is None else None
    teacher = logprobs(case.teacher_hidden, head, teacher_bias).detach()
    full_student, full_teacher = student, teacher
    if objective.top_k is not None:
        owner = student if objective.top_k_of == "student" else teacher
        support = owner.detach().topk(objective.top_k, dim=1).indices
        student, teacher = (_buckets(p.gather(1, support), objective) for p in (student, teacher))
    beta = objective.beta
    if objective.divergence in ("jsd", "skew_kl", "skew_reverse_kl"):
        mixture = torch.logaddexp(student + math.log(1 - beta), teacher + math.log(beta))
    entries = {
        "none": lambda: torch.zeros_like(student),
        "forward_kl": lambda: kl(teacher, student),
        "reverse_kl": lambda: kl(student, teacher),
        "jsd": lambda: beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture),
        "skew_kl": lambda: kl(teacher, mixture),
        "skew_reverse_kl": lambda: kl(student, mixture),
    }[objective.divergence]()
    if objective.entry_clip is not None:
        entries = entries.clamp(max=objective.entry_clip)
    divergence = entries.sum(-1)
    student, teacher = full_student, full_teacher
    index = case.targets[:, None]
    student_logprob = student.gather(1, index)[:, 0]
    teacher_logprob = teacher.gather(1, index)[:, 0]
    advantage = (teacher_logprob - student_logprob).detach()
    entropy = -(student.exp() * student).sum(-1)
    loss = (
        divergence
        - objective.policy_gradient * advantage * student_logprob
        - objective.cross_entropy * student_logprob
        + objective.entropy * entropy
    )
    extra = {
        "student_logprob": student_logprob,
        "teacher_logprob": teacher_logprob,
        "advantage": advantage,
        "entropy": entropy,
        "teacher_entropy": -(teacher.exp() * teacher).sum(-1),
    }
    return loss, divergence, {k: v.detach() for k, v in extra.items()}


def _buckets(logprobs: Tensor, objective: Objective) -> Tensor:
    """Log-probs [N, k] of the support with the log of the remaining mass, or normalised."""
    if not objective.tail:
        return torch.log_softmax(logprobs, dim=1)
    rest = 1.0 - logprobs.exp().sum(dim=1, keepdim=True)
    return torch.cat([logprobs, rest.log()], dim=1)


def results(case: Case, compute: Compute) -> dict[str, Tensor]:
    """The values that `compute` returns, and the gradients of the total that it returns beside."""
    leaves = case.leaves()
    values, total = compute(case)
    names = ("d student_hidden", "d weight", "d bias")
    gradients = zip(names, torch.autograd.grad(total, leaves), strict=False)
    return {name: value.detach() for name, value in values.items()} | dict(gradients)


def plain_results(case64: Case, compute: Compute) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`results` by plain torch in float32 and in float64: what is allowed, and what is right."""
    torchs, exact = (results(case64.cast(d), compute) for d in (torch.float32, torch.float64))
    return torchs, exact


def assert_results(
    found: dict[str, Tensor],
    torchs: dict[str, Tensor],
    exact: dict[str, Tensor],
    *,
    loss_size: float = 0.0,
    roundings: int = 8,
) -> None:
    """assert_no_worse_than_torch of every result.

    Args:
        loss_size: what the terms of the result "loss" are in the mean, where they differ in sign.
        roundings: of the gradients.
    """
    assert found.keys() == exact.keys()
    for name, ours in found.items():
        gradient = name.startswith("d ")
        if ours.dtype.itemsize == 2:
            # Rounded once, as plain torch's float32 is here; where the gradient of the logits is
            # rounded on the way to 16-bit products, that error is no larger.
            roundings = 1
        # Log-probs and what is made of them are sums of order 1 and more: they cannot be better
        # than their roundings.
        assert_no_worse_than_torch(
            name,
            ours,
            torchs[name].to(ours.dtype),
            exact[name],
            floor=0.0 if gradient else loss_size if name == "loss" else 1.0,
            roundings=roundings if gradient else 8,
        )


def check_against_torch(
    case64: Case,
    plain: Compute,
    ours: Compute,
    *,
    dtype: torch.dtype = torch.float32,
    **limits: Any,
) -> None:
    """Hold `ours` in `dtype` against `plain` in float64, with the errors of `plain` in float32.

    `limits` are those of assert_results.
    """
    torchs, exact = plain_results(case64, plain)
    assert_results(results(case64.cast(dtype), ours), torchs, exact, **limits)
