"""Problems and the float64 oracle that every backend is held against."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
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
        return (p.exp() * (p - q)).sum(-1)

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
    divergence = {
        "none": lambda: torch.zeros_like(student[:, 0]),
        "forward_kl": lambda: kl(teacher, student),
        "reverse_kl": lambda: kl(student, teacher),
        "jsd": lambda: beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture),
        "skew_kl": lambda: kl(teacher, mixture),
        "skew_reverse_kl": lambda: kl(student, mixture),
    }[objective.divergence]()
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


def assert_no_worse_than_torch(
    name: str,
    ours: Tensor,
    torchs: Tensor,
    exact: Tensor,
    *,
    factor: float = 3.0,
    floor: float = 0,
    roundings: int = 8,
) -> None:
    """Largest error against float64 at most `factor` times that of plain torch on this one problem
    (both are luck: test_error_on_average compares means), plus a few roundings of the largest
    value or of `floor`."""
    scale = exact.abs().max().clamp(min=max(floor, 1e-30))
    error = (ours.double() - exact).abs().max() / scale
    allowed = factor * (torchs.double() - exact).abs().max() / scale
    allowed = allowed + roundings * torch.finfo(ours.dtype).eps
    assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"
