"""The fused loss on the Triton backend, whoever runs its kernels, against float64."""

from __future__ import annotations

import torch
from kernel_cases import assert_results, materialised_losses, plain_results, results

from selfdistill_kernels import fused_linear_distillation

STATISTICS = (
    "divergence",
    "student_logprob",
    "teacher_logprob",
    "advantage",
    "entropy",
    "teacher_entropy",
)


def check(case64, objective, dtype=torch.float32, *, roundings=8, mask=None, **options):
    """Loss, statistics and gradients, against float64 and plain float32 torch."""
    keep = torch.ones(case64.targets.shape, dtype=torch.bool) if mask is None else mask
    gate = options.get("advantage_mask")
    losses, _, statistics = materialised_losses(case64, objective)
    # Both sides keep the tokens that float64 keeps; thresholds lie far from any advantage.
    active = keep if gate is None else gate.select(statistics["advantage"], keep)

    def plain(case):
        loss, divergence, extra = materialised_losses(case, objective)
        total = torch.where(active, loss, torch.zeros_like(loss)).sum() / keep.sum()
        values = {"divergence": divergence, **extra}
        return {"loss": total, **{name: v[keep] for name, v in values.items()}}, total

    def ours(case):
        out = case.call(
            fused_linear_distillation, objective=objective, backend="triton", mask=mask, **options
        )
        values = {name: getattr(out, name) for name in STATISTICS}
        assert not any(value[~keep].any() for value in values.values())
        return {"loss": out.loss, **{name: v[keep] for name, v in values.items()}}, out.loss

    case = case64.cast(dtype)
    if mask is not None:  # rows that are no token are never read
        case.student_hidden[~mask] = float("nan")
        case.teacher_hidden[~mask] = float("nan")
    assert_results(
        results(case, ours),
        *plain_results(case64, plain),
        loss_size=float(losses.detach()[active].abs().sum() / keep.sum()),
        roundings=roundings,
    )
