"""The specialised sweep, emulated, in the place of today's under the interpreter."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from kernel_cases import make_case
from specialised_cases import emulated_sweep
from triton_case import check

from selfdistill_kernels import AdvantageMask, Objective
from selfdistill_kernels.backends.triton import backend

GATE = AdvantageMask(0.05)  # behind which a loss is swept


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_loss_statistics_and_gradients(monkeypatch, divergence, cluster):
    """Rows, vocabulary and pieces that end within tiles; NaN in rows that take no part."""
    monkeypatch.setattr(backend, "sweep", partial(emulated_sweep, cluster=cluster, seed=cluster))
    case = make_case(150, 192, 300, seed=3)
    mask = torch.rand(150, generator=torch.Generator().manual_seed(1)) < 0.9
    check(
        case, Objective(divergence, beta=0.3, policy_gradient=0.5), torch.bfloat16, mask=mask,
        advantage_mask=GATE,
    )  # fmt: skip


def test_equal_models_have_a_divergence_of_exactly_nothing(monkeypatch):
    monkeypatch.setattr(backend, "sweep", partial(emulated_sweep, cluster=1))
    case = make_case(3, 64, 130, closeness=0.0, dtype=torch.bfloat16)
    from selfdistill_kernels import fused_linear_distillation

    out = case.call(
        fused_linear_distillation, objective="forward_kl", backend="triton", advantage_mask=GATE
    )
    assert (out.divergence == 0.0).all()
    assert (out.student_logprob == out.teacher_logprob).all()
