"""Logits of -inf, +inf and NaN (docs/math.md, infinities) in the Triton kernels."""

from __future__ import annotations

import math

import pytest
import torch
from banned_entries import BANS, INF, assert_is_the_loss_of_the_rest, make_banned_case
from kernel_cases import DIVERGENCES, make_case

from selfdistill_kernels import (
    AdvantageMask,
    Objective,
    distillation_from_logits,
    fused_linear_distillation,
    fused_linear_logprobs,
)

OBJECTIVES = [
    *[Objective(name, beta=0.3) for name in DIVERGENCES],
    Objective("jsd", beta=0.6, policy_gradient=0.3, cross_entropy=0.2, entropy=-0.1),
]
VOCABULARY = 150
# The first tile, and the first slab of a small workspace, hold nothing else.
BANNED = torch.cat([torch.arange(70), torch.arange(71, 140, 7)])
SLABS = 9 * 4 * 64
# Under the interpreter the maximum of a tile of NaNs is numpy's.
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice")


@pytest.mark.parametrize("ban", BANS)
@pytest.mark.parametrize(
    "options",
    [{}, {"workspace": SLABS}, {"of_logits": True}],
    ids=["store", "recompute", "logits"],
)
def test_values_and_gradients(ban, options):
    problem = make_banned_case(ban, BANNED, vocabulary=VOCABULARY)
    for objective in OBJECTIVES:
        if (objective.divergence, ban) != ("reverse_kl", "teacher"):
            assert_is_the_loss_of_the_rest(problem, objective, backend="triton", **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", [None, AdvantageMask(0.0)], ids=["store", "recompute"])
def test_16_bit_inputs(dtype, gate):
    problem = make_banned_case("both", BANNED, vocabulary=VOCABULARY)
    assert_is_the_loss_of_the_rest(
        problem, OBJECTIVES[-1], dtype=dtype, backend="triton", advantage_mask=gate
    )


@pytest.mark.parametrize("ban", BANS)
@pytest.mark.parametrize(
    "transform",
    [{"temperature": 0.7}, {"logit_scale": -0.8}, {"softcap": 4.0, "temperature": 1.7}],
    ids=str,
)
def test_transforms(ban, transform):
    problem = make_banned_case(ban, BANNED, vocabulary=VOCABULARY, **transform)
    for objective in (OBJECTIVES[0], OBJECTIVES[-1]):
        assert_is_the_loss_of_the_rest(problem, objective, backend="triton")


@pytest.mark.parametrize("path", ["logits", "recompute"])
@pytest.mark.parametrize("model", ["student", "teacher"])
@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl", "skew_kl", "cross_entropy"])
def test_what_is_infinite_stays_in_its_own_token(objective, model, path):
    """An entry, everything of -inf, +inf and NaN in one row each; the others keep their bits."""
    case = make_case(9, 5, VOCABULARY, seed=3).cast(torch.float32)
    case.weight[:, 0] = case.weight[:, 0].abs() + 0.1
    bad = torch.tensor([2, 4, 6])
    good = torch.tensor([0, 1, 3, 5, 7, 8])
    values = torch.tensor([-INF, INF, math.nan])
    results = []
    for is_bad in (False, True):
        hidden = [case.student_hidden.clone(), case.teacher_hidden.clone()]
        if path != "logits":
            if is_bad:
                hidden[model == "teacher"][bad, 0] = values
            leaf = hidden[0].requires_grad_()
            out = fused_linear_distillation(
                leaf, hidden[1], case.weight, case.targets, objective=objective, reduction="sum",
                workspace=SLABS, backend="triton",
            )  # fmt: skip
        else:
            logits = [h @ case.weight.T for h in hidden]
            if is_bad:
                logits[model == "teacher"][bad] = values[:, None]
                logits[model == "teacher"][7, 11] = -INF
            leaf = logits[0].requires_grad_()
            out = distillation_from_logits(
                leaf, logits[1], case.targets, objective=objective, reduction="sum",
                backend="triton",
            )  # fmt: skip
            good = torch.tensor([0, 1, 3, 5, 8])
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        results.append((out, gradient))
    (clean, clean_gradient), (out, gradient) = results
    for name in ("divergence", "student_logprob", "teacher_logprob", "entropy", "teacher_entropy"):
        assert torch.equal(getattr(out, name)[good], getattr(clean, name)[good])
    assert torch.equal(gradient[good], clean_gradient[good])
    assert getattr(out, f"{model}_logprob")[bad].isnan().all()
    if objective != "cross_entropy":
        assert out.divergence[bad].isnan().all()
        assert gradient[bad].isnan().any(1).all()
    elif model == "student":
        assert gradient[bad].isnan().any(1).all()
    if path == "logits":
        infinite = (objective, model) in (("forward_kl", "student"), ("reverse_kl", "teacher"))
        assert (out.divergence[7] == INF) == infinite
        assert gradient[7].isfinite().all() != ((objective, model) == ("reverse_kl", "teacher"))


def test_a_clipped_infinity_has_no_gradient():
    for divergence, model in (("forward_kl", 0), ("reverse_kl", 1)):
        logits = list(torch.randn(2, 4, VOCABULARY, generator=torch.Generator().manual_seed(1)))
        logits[model][2, 7] = -INF
        leaf = logits[0].requires_grad_()
        out = distillation_from_logits(
            leaf, logits[1], objective=Objective(divergence, divergence_clip=1e3), reduction="sum",
            backend="triton",
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        assert out.loss.isfinite()
        assert torch.equal(gradient[2], torch.zeros(VOCABULARY))
        assert gradient[[0, 1, 3]].any(1).all()


@pytest.mark.parametrize("ban", BANS)
def test_targets_that_are_ruled_out(ban):
    problem = make_banned_case(ban, BANNED, vocabulary=VOCABULARY)
    problem.case.targets[2] = 5
    cast = problem.cast(torch.float32)
    out = cast.case.call(
        fused_linear_distillation, objective="jsd", teacher_bias=cast.teacher_bias,
        backend="triton",
    )  # fmt: skip
    assert (out.student_logprob[2] == -INF) == (ban != "teacher")
    assert (out.teacher_logprob[2] == -INF) == (ban != "student")
    assert out.loss.isfinite()


def test_logprobs_of_banned_entries():
    case = make_banned_case("student", BANNED, vocabulary=VOCABULARY).case.cast(torch.float32)
    case.targets[1] = 3
    leaves = case.leaves()
    results = []
    for backend in ("triton", "reference"):
        out = fused_linear_logprobs(
            case.student_hidden, case.weight, case.targets, bias=case.bias, backend=backend
        )
        assert out.logprobs[1] == -INF
        total = out.logprobs.sum() + 0.3 * out.entropy.sum()
        results.append((*out, *torch.autograd.grad(total, leaves)))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
