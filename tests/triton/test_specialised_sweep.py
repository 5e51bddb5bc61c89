"""The specialised sweep, emulated, in the place of today's under the interpreter."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from exactness import assert_no_worse_than_torch
from kernel_cases import make_case, materialised_losses
from specialised_cases import CLUSTERS, emulated_sweep, needs_gluon
from triton_case import STATISTICS, check

from selfdistill_kernels import AdvantageMask, Objective, fused_linear_distillation
from selfdistill_kernels.backends.triton import backend

pytestmark = needs_gluon
GATE = AdvantageMask(0.05)  # behind which a loss is swept


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "skew_kl"])
def test_statistics(monkeypatch, divergence, cluster):
    """Rows and vocabulary that end within tiles, two rounds of the ring, two clusters or programs.

    A second sweep, that of a mixture, is today's.
    """
    sweep = partial(emulated_sweep, cluster=cluster, clusters=3 - cluster, seed=cluster)
    monkeypatch.setattr(backend, "sweep", sweep)
    case, objective = make_case(81, 192, 300, seed=3), Objective(divergence, beta=0.3)
    mask = torch.arange(81) % 9 != 4

    def plain(dtype):
        _, divergence, others = materialised_losses(case.cast(dtype), objective)
        return {"divergence": divergence, **others}

    given = case.cast(torch.bfloat16)
    given.student_hidden[~mask] = float("nan")
    with torch.no_grad():
        out = given.call(
            fused_linear_distillation, objective=objective, backend="triton", mask=mask,
            advantage_mask=GATE,
        )  # fmt: skip
    torchs, exact = plain(torch.float32), plain(torch.float64)
    for name in STATISTICS:
        assert_no_worse_than_torch(
            name, getattr(out, name)[mask], torchs[name][mask], exact[name][mask]
        )


def test_gradients(monkeypatch):
    monkeypatch.setattr(backend, "sweep", partial(emulated_sweep, cluster=1))
    case = make_case(66, 64, 130, seed=3)
    check(case, Objective("forward_kl"), torch.bfloat16, advantage_mask=GATE)


def test_equal_models_have_a_divergence_of_exactly_nothing(monkeypatch):
    monkeypatch.setattr(backend, "sweep", partial(emulated_sweep, cluster=1))
    case = make_case(3, 64, 130, closeness=0.0, dtype=torch.bfloat16)
    with torch.no_grad():
        out = case.call(
            fused_linear_distillation, objective="forward_kl", backend="triton",
            advantage_mask=GATE,
        )  # fmt: skip
    assert (out.divergence == 0.0).all()
    assert (out.student_logprob == out.teacher_logprob).all()
