"""One real problem against float64: many tiles, offsets that 32 bits do not count.

Truth is the definition in float64 on the same device, a few rows at a time: the forward KL's
gradient of the logits is (p_student - p_teacher) / N.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.section import Section, Wrong, WrongValueError
from benchmarks.gpu.setting import Setting
from benchmarks.problems import DTYPES, Problem, make_problem
from benchmarks.report import Table
from selfdistill_kernels import (
    AdvantageMask,
    distillation_from_logits,
    fused_linear_distillation,
)

# Of the result's largest value; gradients come back in 16 bits, and their sums are of 16-bit terms.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
ROWS = 256  # that truth takes at a time
CHOSEN = 64  # entries of the vocabulary whose dW is compared


@dataclass(frozen=True)
class Truth:
    """In float64: the loss, dH of every token [N, H], dW [CHOSEN, H] of the entries `chosen`."""

    loss: Tensor
    hidden: Tensor
    weight: Tensor
    chosen: Tensor


def truth(problem: Problem) -> Truth:
    """Compute it."""
    tokens, _, vocabulary = (
        problem.shape.tokens,
        problem.shape.hidden,
        problem.shape.vocabulary,
    )
    head = problem.weight.detach().double()
    # The first and the last entries, and some between.
    chosen = torch.linspace(0, vocabulary - 1, min(CHOSEN, vocabulary)).long().to(head.device)
    loss = head.new_zeros(())
    weight = head.new_zeros((chosen.numel(), head.shape[1]))
    hidden = []
    for rows in torch.arange(tokens, device=head.device).split(ROWS):
        own = problem.student_hidden.detach()[rows].double()
        student = torch.log_softmax(own @ head.T, dim=1)
        teacher = torch.log_softmax(problem.teacher_hidden[rows].double() @ head.T, dim=1)
        loss += (teacher.exp() * (teacher - student)).sum() / tokens
        slope = (student.exp() - teacher.exp()) / tokens
        hidden.append(slope @ head)
        weight += slope[:, chosen].T @ own
    return Truth(loss, torch.cat(hidden), weight, chosen)


def check_whole(setting: Setting, section: Section) -> None:
    """Check the fused loss on every path, then logits of a caller.

    Raises:
        WrongValueError: the first wrong value.
    """
    body: list[tuple[str, ...]] = []
    section.tables.append(
        Table(f"Against float64 at N/H/V {setting.whole}", ("path", "result", "error"), body)
    )
    section.data["errors"] = found = {}
    for path, result, error in _checked(setting, section):
        body.append((path, result, f"{error:.1e}"))
        found[f"{path}, {result}"] = error
        section.save()


def _checked(setting: Setting, section: Section) -> Iterator[tuple[str, str, float]]:
    if not section.has_time("a problem of real size", 20.0):
        return
    dtype = DTYPES[setting.dtype]
    problem = make_problem(
        setting.whole, dtype, device=setting.device, objective="forward_kl", seed=1
    )
    exact = truth(problem)
    paths: dict[str, dict[str, Any]] = {
        "tiles of logits (row_statistics, row_gradient)": {},
        "slabs (sweep, merge, gradient)": {"workspace": setting.slab_bytes},
        "advantage mask that keeps all (sweep, merge, gradient, product)": {
            "advantage_mask": AdvantageMask(0.0)
        },
    }
    for path, options in paths.items():
        if not section.has_time(path, 5.0):
            return
        out = fused_linear_distillation(
            problem.student_hidden, problem.teacher_hidden, problem.weight, problem.targets,
            objective="forward_kl", backend="triton", **options,
        )  # fmt: skip
        made = torch.autograd.grad(out.loss, [problem.student_hidden, problem.weight])
        results = {
            "loss": (out.loss.detach()[None], exact.loss[None]),
            "d hidden": (made[0], exact.hidden),
            "d weight": (made[1][exact.chosen], exact.weight),
        }
        for result, (got, want) in results.items():
            yield path, result, _error(path, str(problem.shape), result, got, want, dtype)
        del out, made, results
    del problem, exact
    if setting.wide is not None and section.has_time("logits beyond 32-bit offsets", 10.0):
        yield from _wide_logits(setting.wide, dtype, setting.device)


def _wide_logits(
    size: tuple[int, int], dtype: torch.dtype, device: str
) -> Iterator[tuple[str, str, float]]:
    """The last rows of logits whose elements 32 bits do not count."""
    tokens, vocabulary = size
    generator = torch.Generator(device).manual_seed(2)
    student, teacher = (
        torch.randn(size, generator=generator, device=device, dtype=dtype) for _ in range(2)
    )
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator, device=device)
    out = distillation_from_logits(
        student.requires_grad_(), teacher, targets, objective="forward_kl", backend="triton"
    )
    (made,) = torch.autograd.grad(out.loss, student)
    last = slice(max(0, tokens - 4), tokens)
    own, other = (
        torch.log_softmax(logits.detach()[last].double(), dim=1) for logits in (student, teacher)
    )
    path, where = "logits of a caller (row_statistics, row_gradient)", f"{tokens}/{vocabulary}"
    divergence = (other.exp() * (other - own)).sum(1)
    results = {
        "divergence of the last rows": (out.divergence.detach()[last], divergence),
        "d logits of the last rows": (made[last], (own.exp() - other.exp()) / tokens),
    }
    for result, (got, want) in results.items():
        yield path, result, _error(path, where, result, got, want, dtype)


def _error(
    path: str, shape: str, result: str, got: Tensor, want: Tensor, dtype: torch.dtype
) -> float:
    got, want = got.double(), want.double()
    gap = (got - want).abs()
    error = float(gap.max() / want.abs().max())
    allowed = TOLERANCE[dtype]
    if error <= allowed:
        return error
    flat = gap.nan_to_num(nan=float("inf")).argmax()
    entry = tuple(int(i) for i in torch.unravel_index(flat, gap.shape))
    raise WrongValueError(
        Wrong(
            kernels=path,
            problem=f"forward_kl, N/H/V {shape}, {dtype}",
            result=result,
            entry=entry,
            expected=float(want[entry]),
            got=float(got[entry]),
            error=error,
            allowed=allowed,
            plain=float("nan"),
            repeat="python -m benchmarks.gpu --section whole",
        )
    )
