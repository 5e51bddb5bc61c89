"""Entries of a divergence that are clipped one by one, for every backend that clips them."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from kernel_cases import Case, check_against_torch, materialised_losses
from torch import Tensor

from selfdistill_kernels import Objective, distillation_from_logits, fused_linear_distillation

INF = float("inf")
CLIP = 0.05


def clipped_rows(case: Case, objective: Objective) -> Tensor:
    """[N] bool, the tokens in which an entry is clipped."""
    without = replace(objective, entry_clip=None)
    return materialised_losses(case, objective)[1] != materialised_losses(case, without)[1]


def check_clip(case64: Case, objective: Objective, *, dtype=torch.float32, **options) -> Tensor:
    """Losses, divergences and gradients against autograd of the definition; `clipped_rows`."""
    bound = clipped_rows(case64, objective)
    assert bound.any(), "nothing is clipped"

    def plain(case):
        loss, divergence, _ = materialised_losses(case, objective)
        return {"loss": loss.mean(), "divergence": divergence}, loss.mean()

    def ours(case):
        out = case.call(fused_linear_distillation, objective=objective, **options)
        return {"loss": out.loss.mean(), "divergence": out.divergence}, out.loss.mean()

    size = float(materialised_losses(case64, objective)[0].abs().mean())
    check_against_torch(case64, plain, ours, dtype=dtype, loss_size=size)
    return bound


def check_unclipped_bits(case64: Case, objective: Objective, **options) -> None:
    """A clip that nothing exceeds changes no bit."""
    case = case64.cast(torch.float32)
    found = []
    for clip in (None, 40.0):
        leaves = case.leaves()
        out = case.call(
            fused_linear_distillation, objective=replace(objective, entry_clip=clip), **options
        )
        found.append([out.loss, out.divergence, *torch.autograd.grad(out.loss.sum(), leaves)])
    for without, beside in zip(*found, strict=True):
        assert torch.equal(without, beside)


def check_bits_of_rows(case64: Case, objective: Objective, backend: str) -> None:
    """Rows in which no entry is clipped keep their bits, beside others."""
    bound = clipped_rows(case64, objective)
    assert bound.any()
    case = case64.cast(torch.float32)
    logits = [h @ case.weight.T for h in (case.student_hidden, case.teacher_hidden)]
    gradients = []
    for clip in (None, objective.entry_clip):
        leaf = logits[0].clone().requires_grad_()
        out = distillation_from_logits(
            leaf, logits[1], objective=replace(objective, entry_clip=clip), backend=backend
        )
        gradients.append(torch.autograd.grad(out.loss, leaf)[0])
    same = (gradients[0] == gradients[1]).all(dim=1)
    assert torch.equal(same, ~bound)


def check_edge(divergence: str, backend: str) -> None:
    """The largest part of a row, from a little below the clip to a little above it."""
    generator = torch.Generator().manual_seed(5)
    student, teacher = torch.randn(2, 1, 40, generator=generator, dtype=torch.float64)

    def parts(z):
        log_s, log_t = z.log_softmax(1), teacher.log_softmax(1)
        mixture = torch.logaddexp(log_s, log_t) - torch.tensor(2.0).log()
        of_t = log_t.exp() * (log_t - (log_s if divergence == "forward_kl" else mixture))
        of_s = log_s.exp() * (log_s - (log_t if divergence == "reverse_kl" else mixture))
        return {"jsd": (of_t + of_s) / 2, "skew_kl": of_t, "forward_kl": of_t}.get(divergence, of_s)

    largest = float(parts(student).max())
    gradients = []
    for factor in (1 - 1e-3, 1 + 1e-3):
        clip = factor * largest
        leaf = student.clone().requires_grad_()
        (exact,) = torch.autograd.grad(parts(leaf).clamp(max=clip).sum(), leaf)
        leaf = student.float().requires_grad_()
        out = distillation_from_logits(
            leaf, teacher.float(), objective=Objective(divergence, entry_clip=clip),
            reduction="sum", backend=backend,
        )  # fmt: skip
        gradients.append(torch.autograd.grad(out.loss, leaf)[0])
        torch.testing.assert_close(gradients[-1].double(), exact, rtol=1e-5, atol=1e-6)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3, "the gradient jumps at the clip"


def check_exactly_at_the_clip(backend: str) -> None:
    """A part that is the clip is not clipped: it is log V of a teacher that is sure of an entry."""
    teacher = torch.tensor([[0.0, -INF, -INF, -INF]])
    largest = math.log(4.0)
    at = torch.tensor(largest, dtype=torch.float32)
    for clip, expected in ((at, -0.75), (at.nextafter(torch.tensor(0.0)), 0.0)):
        leaf = torch.zeros(1, 4, requires_grad=True)
        objective = Objective("forward_kl", entry_clip=clip.item())
        out = distillation_from_logits(leaf, teacher, objective=objective, backend=backend)
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        torch.testing.assert_close(gradient[0, 0].item(), expected, rtol=1e-6, atol=1e-6)


def check_infinite_part(divergence: str, side: int, backend: str) -> None:
    """What one model rules out has its limit, and no gradient where that is the clip."""
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(2, 4, 40, generator=generator)
    logits[side, 2, 5:9] = -INF
    objective = Objective(divergence, entry_clip=CLIP)
    leaf = logits[0].clone().requires_grad_()
    out = distillation_from_logits(
        leaf, logits[1], objective=objective, reduction="none", backend=backend
    )
    (gradient,) = torch.autograd.grad(out.loss.sum(), leaf)
    # By hand.
    log_s, log_t = logits.double().log_softmax(2)
    p_s, p_t = log_s.exp(), log_t.exp()
    if divergence in ("forward_kl", "reverse_kl"):
        p, log_p, log_q = (p_t, log_t, log_s) if side == 0 else (p_s, log_s, log_t)
        part = torch.where(p > 0, p * (log_p - log_q), 0.0)
        slope = -p_t if side == 0 else p_s * (log_s - log_t + 1)
    else:
        mixture = 0.5 * (p_s + p_t)
        of_t = torch.where(p_t > 0, p_t * (log_t - mixture.log()), 0.0)
        of_s = torch.where(p_s > 0, p_s * (log_s - mixture.log()), 0.0)
        part = of_t if divergence == "skew_kl" else 0.5 * (of_t + of_s)
        slope = 0.5 * (-p_s * p_t / mixture if divergence == "skew_kl" else of_s)
    slope = torch.where(part > CLIP, 0.0, slope)
    torch.testing.assert_close(out.loss.detach().double(), part.clamp(max=CLIP).sum(1))
    exact = slope - p_s * slope.sum(1, keepdim=True)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-6)


def check_broken_token_alone(divergence: str, backend: str) -> None:
    """A NaN stays in its token."""
    generator = torch.Generator().manual_seed(7)
    student, teacher = torch.randn(2, 5, 40, generator=generator)
    found = []
    for broken in (False, True):
        leaf = student.clone()
        if broken:
            leaf[3, 7] = float("nan")
        leaf.requires_grad_()
        out = distillation_from_logits(
            leaf, teacher, objective=Objective(divergence, entry_clip=0.01), reduction="none",
            backend=backend,
        )  # fmt: skip
        found.append((out.loss.detach(), torch.autograd.grad(out.loss.sum(), leaf)[0]))
    others = [0, 1, 2, 4]
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean[others], dirty[others])
        assert dirty[3].isnan().any()
