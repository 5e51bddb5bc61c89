"""Rows of raw scores and the loss upon them, for every driver of csrc/divergence.h."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DIVERGENCES = [0, 1, 2, 3, 4, 5]
(
    STUDENT_SHIFT, STUDENT_LOGSUM, TEACHER_SHIFT, TEACHER_LOGSUM, STUDENT_LOGPROB,
    TEACHER_LOGPROB, ENTROPY, TEACHER_ENTROPY, DIVERGENCE, PIVOT,
) = range(10)  # fmt: skip
MIXED = {"policy_gradient": 0.5, "cross_entropy": 0.2, "entropy": 0.1}
TRANSFORMS = [
    {},
    {"bias": True},
    {"bias": True, "scale": 1.3, "softcap": 8.0, "temperature": 0.7},
    {"scale": 0.8, "temperature": 1.7},
]


@dataclass(frozen=True)
class Row:
    """A problem: raw tiles and the loss upon them."""

    student: Tensor
    teacher: Tensor
    targets: Tensor
    weight: Tensor
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0
    temperature: float = 1.0
    divergence: int = 1
    beta: float = 0.3
    policy_gradient: float = 0.0
    cross_entropy: float = 0.0
    entropy: float = 0.0


def make_rows(
    rows: int = 6, columns: int = 507, *, spread: float = 3.0, closeness: float = 1.0,
    offset: float = 0.0, teacher_offset: float = 0.0, bias: bool = False, seed: int = 0,
    **options: float,
) -> Row:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    student = spread * torch.randn(rows, columns, generator=g)
    teacher = student + closeness * torch.randn(rows, columns, generator=g)
    return Row(
        student + offset,
        teacher + offset + teacher_offset,
        torch.randint(columns, (rows,), generator=g),
        torch.rand(rows, generator=g) + 0.5,
        torch.randn(columns, generator=g) if bias else None,
        torch.randn(columns, generator=g) if bias else None,
        **options,
    )


def visit(
    p: Row, *, teacher: bool = True, targets: bool = True, loss: bool = True, gate_sign: int = -2,
    gate_threshold: float = 0.0, bfloat16: bool = False, active: Tensor | None = None,
    ops: Any = torch.ops.selfdistill,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(gradient or what is left in the student's tile, statistics, active) of one row_visit_."""
    rows = p.student.shape[0]
    tile = p.student.clone()
    statistics = torch.full((rows, 10), math.nan)
    active = torch.ones(rows, dtype=torch.bool) if active is None else active.clone()
    ops.row_visit_(
        tile, p.teacher.clone() if teacher else None, p.student_bias,
        p.teacher_bias if teacher else None, p.targets if targets else None,
        p.weight if loss else None, p.scale, p.softcap, p.temperature, p.divergence, p.beta,
        p.policy_gradient, p.cross_entropy, p.entropy, gate_sign, gate_threshold, bfloat16,
        statistics, active,
    )  # fmt: skip
    return tile, statistics, active


def oracle(p: Row, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(gradient, statistics without their normalisers) by plain torch in `dtype`."""

    def logits(raw: Tensor, bias: Tensor | None) -> Tensor:
        u = raw if bias is None else raw + bias.to(dtype)
        u = u * p.scale
        if p.softcap:
            u = p.softcap * torch.tanh(u / p.softcap)
        return u / p.temperature

    raw = p.student.detach().to(dtype, copy=True).requires_grad_()
    s = torch.log_softmax(logits(raw, p.student_bias), -1)
    t = torch.log_softmax(logits(p.teacher.to(dtype), p.teacher_bias), -1)
    m = torch.log((1 - p.beta) * s.exp() + p.beta * t.exp())

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a.exp() * (a - b)).sum(-1)

    divergence = [
        lambda: 0.0 * s.sum(-1),
        lambda: kl(t, s),
        lambda: kl(s, t),
        lambda: p.beta * kl(t, m) + (1 - p.beta) * kl(s, m),
        lambda: kl(t, m),
        lambda: kl(s, m),
    ][p.divergence]()
    s_y, t_y = (x.gather(1, p.targets[:, None])[:, 0] for x in (s, t))
    entropy, teacher_entropy = (-(x.exp() * x).sum(-1) for x in (s, t))
    loss = (
        divergence
        - p.policy_gradient * (t_y - s_y).detach() * s_y
        - p.cross_entropy * s_y
        + p.entropy * entropy
    )
    (gradient,) = torch.autograd.grad((loss * p.weight.to(dtype)).sum(), raw)
    columns = [s_y, t_y, entropy, teacher_entropy, divergence]
    return gradient, torch.stack([c.detach() for c in columns], 1)


def assert_as_good_as_torch(p: Row, gradient: Tensor, statistics: Tensor) -> None:
    """Error against float64 at most twice that of plain torch, plus two roundings.

    Stricter than exactness.assert_no_worse_than_torch: norms of whole tiles are hardly luck.
    """
    exact, plain = oracle(p, torch.float64), oracle(p, torch.float32)
    for name, ours, e, t in (
        ("gradient", gradient, exact[0], plain[0]),
        *((f"column {STUDENT_LOGPROB + i}", statistics[:, STUDENT_LOGPROB + i], *columns)
          for i, columns in enumerate(zip(exact[1].T, plain[1].T, strict=True))),
    ):  # fmt: skip
        size = e.norm()
        error, allowed = (ours.double() - e).norm(), 2 * (t.double() - e).norm() + 1.5e-7 * size
        assert error <= allowed, f"{name}: error {error / size:.1e}, allowed {allowed / size:.1e}"
