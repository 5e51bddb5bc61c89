"""The loss where models rule entries out (logits of -inf), by its definition on the entries that
remain: a probability of 0 adds nothing to a mean (docs/math.md, infinities)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kernel_cases import Case, assert_no_worse_than_torch, make_case
from torch import Tensor

from selfdistill_kernels import (
    Objective,
    distillation_from_logits,
    fused_linear_distillation,
)

INF = float("inf")
# Which of the two models rules entries out.
BANS = ["student", "teacher", "both"]


def losses_of_the_rest(
    z_s: Tensor, z_t: Tensor, targets: Tensor, objective: Objective
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss [N] of logits [N, V], and the statistics [N] of the same names as in the output.

    Plain torch and autograd in the dtype of the logits. A gradient flows from the loss to z_s, also
    to its entries of -inf.
    """
    z_t = z_t.detach()
    in_s, in_t = z_s > -INF, z_t > -INF
    log_s = z_s - z_s.logsumexp(1, keepdim=True)  # an entry of -inf adds e^-inf = 0
    log_t = z_t - z_t.logsumexp(1, keepdim=True)
    beta = objective.beta
    mixture = (1 - beta) * log_s.exp() + beta * log_t.exp()

    def mean(values: Tensor, log_p: Tensor, inside: Tensor) -> Tensor:
        """[N] sum of p values over the entries inside [N, V]; values [n] are of those alone."""
        rows = inside.nonzero()[:, 0]
        return torch.zeros_like(log_p[:, 0]).index_add(0, rows, log_p[inside].exp() * values)

    def kl(log_p: Tensor, log_q: Tensor, inside: Tensor) -> Tensor:
        return mean(log_p[inside] - log_q, log_p, inside)

    divergence = {
        "none": lambda: torch.zeros_like(log_s[:, 0]),
        "forward_kl": lambda: kl(log_t, log_s[in_t], in_t),
        "reverse_kl": lambda: kl(log_s, log_t[in_s], in_s),
        "jsd": lambda: (
            beta * kl(log_t, mixture[in_t].log(), in_t)
            + (1 - beta) * kl(log_s, mixture[in_s].log(), in_s)
        ),
        "skew_kl": lambda: kl(log_t, mixture[in_t].log(), in_t),
        "skew_reverse_kl": lambda: kl(log_s, mixture[in_s].log(), in_s),
    }[objective.kernel_divergence]()
    log_s_y, log_t_y = (x.gather(1, targets[:, None])[:, 0] for x in (log_s, log_t))
    advantage = (log_t_y - log_s_y).detach()
    entropy = -mean(log_s[in_s], log_s, in_s)
    loss = divergence + objective.entropy * entropy
    if objective.cross_entropy:
        loss = loss - objective.cross_entropy * log_s_y
    if objective.policy_gradient:
        loss = loss - objective.policy_gradient * advantage * log_s_y
    statistics = {
        "divergence": divergence,
        "student_logprob": log_s_y,
        "teacher_logprob": log_t_y,
        "advantage": advantage,
        "entropy": entropy,
        "teacher_entropy": -mean(log_t[in_t], log_t, in_t),
    }
    return loss, {name: column.detach() for name, column in statistics.items()}


def is_infinite(divergence: str, ban: str) -> bool:
    """Whether the divergence averages over entries that only the other model rules out."""
    return (divergence, ban) in (("forward_kl", "student"), ("reverse_kl", "teacher"))


@dataclass
class BannedCase:
    """A problem with two heads whose biases, of -inf here and there, rule entries out.

    Attributes:
        case: with the student's bias.
        teacher_bias: [V].
    """

    case: Case
    teacher_bias: Tensor

    def cast(self, dtype: torch.dtype) -> BannedCase:
        return BannedCase(self.case.cast(dtype), self.teacher_bias.to(dtype))

    def logits(self) -> tuple[Tensor, Tensor]:
        """z [N, V] of both models."""
        case = self.case
        scale, cap, temperature = (
            case.options.get(name, default)
            for name, default in (("logit_scale", 1.0), ("softcap", None), ("temperature", 1.0))
        )

        def of(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            scores = (hidden @ weight.T + bias) * scale
            return (cap * torch.tanh(scores / cap) if cap else scores) / temperature

        assert case.teacher_weight is not None
        assert case.bias is not None
        return (
            of(case.student_hidden, case.weight, case.bias),
            of(case.teacher_hidden, case.teacher_weight, self.teacher_bias),
        )


def make_banned_case(
    ban: str, entries: Tensor, tokens: int = 6, vocabulary: int = 2100, **options: float
) -> BannedCase:
    """float64; `entries` [n] are ruled out by the student, the teacher or both, no target is."""
    case = make_case(tokens, 5, vocabulary, bias=True, seed=3, **options)
    assert case.bias is not None
    # The teacher's head is its own only to have a bias of its own.
    case.teacher_weight, teacher_bias = case.weight.clone(), case.bias.clone()
    allowed = torch.ones(vocabulary, dtype=torch.bool)
    allowed[entries] = False
    case.targets = allowed.nonzero()[:, 0][-tokens:]
    # What a negative scale turns into -inf.
    lowest = -INF if options.get("logit_scale", 1.0) > 0 else INF
    if ban != "teacher":
        case.bias[entries] = lowest
    if ban != "student":
        teacher_bias[entries] = lowest
    return BannedCase(case, teacher_bias)


def assert_is_the_loss_of_the_rest(
    problem: BannedCase,
    objective: Objective,
    *,
    dtype: torch.dtype = torch.float32,
    roundings: int = 8,
    of_logits: bool = False,
    **options: Any,
) -> None:
    """The sum of the losses, statistics and gradients against the definition in float64, with the
    error of the same definition in float32. What is infinite there is so here.

    With `of_logits` by `distillation_from_logits`, else from the hidden states.
    """
    if of_logits:
        logits = tuple(z.to(dtype) for z in problem.logits())
        names: tuple[str, ...] = ("logits",)
    else:
        names = ("student_hidden", "weight", "bias")

    def definition(wanted: torch.dtype) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, ...]]:
        targets = problem.case.targets
        if of_logits:
            leaves = [logits[0].to(wanted, copy=True).requires_grad_()]
            z_s, z_t = leaves[0], logits[1].to(wanted)
        else:
            cast = problem.cast(wanted)
            leaves = cast.case.leaves()
            z_s, z_t = cast.logits()
        loss, columns = losses_of_the_rest(z_s, z_t, targets, objective)
        return loss.sum().detach(), columns, torch.autograd.grad(loss.sum(), leaves)

    exact_loss, exact, exact_gradients = definition(torch.float64)
    plain_loss, plain, plain_gradients = definition(torch.float32)
    common: dict[str, Any] = {"objective": objective, "reduction": "sum", **options}
    if of_logits:
        leaves = [logits[0].clone().requires_grad_()]
        # In place the logits may not be a leaf.
        student = leaves[0] * 1.0 if options.get("in_place") else leaves[0]
        out = distillation_from_logits(student, logits[1], problem.case.targets, **common)
    else:
        cast = problem.cast(dtype)
        leaves = cast.case.leaves()
        out = cast.case.call(fused_linear_distillation, teacher_bias=cast.teacher_bias, **common)
    gradients = torch.autograd.grad(out.loss, leaves)
    # A sum over tokens whose terms, log-probs among them, are of order 8.
    size = 8.0 * len(problem.case.targets)
    compare("loss", out.loss[None], plain_loss[None], exact_loss[None], floor=size)
    for name in exact:
        compare(name, getattr(out, name), plain[name], exact[name], floor=1.0)
    for name, ours, theirs, true in zip(
        names, gradients, plain_gradients, exact_gradients, strict=True
    ):
        compare(f"d {name}", ours, theirs.to(dtype), true, roundings=roundings)


def compare(name: str, ours: Tensor, plain: Tensor, exact: Tensor, **options: Any) -> None:
    """`assert_no_worse_than_torch` where the value is finite, and the same infinities elsewhere."""
    assert not exact.isnan().any(), name
    finite = exact.isfinite()
    assert torch.equal(ours[~finite].double(), exact[~finite]), name
    if finite.any():
        assert_no_worse_than_torch(name, ours[finite], plain[finite], exact[finite], **options)
