"""Values and gradients of the Triton kernels against float64, under the interpreter."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from interpreter import RAGGED_HIDDEN
from kernel_cases import (
    DIVERGENCES,
    Case,
    assert_results,
    check_against_torch,
    make_case,
    materialised_losses,
    plain_results,
)
from slow import slow_but
from triton_case import check

from selfdistill_kernels import (
    AdvantageMask,
    Objective,
    distillation_from_logits,
    fused_linear_distillation,
    fused_linear_logprobs,
)

OBJECTIVES = [
    *[Objective(name, beta=0.3) for name in DIVERGENCES],
    Objective("none", policy_gradient=1.0),
    Objective("forward_kl", policy_gradient=0.3, cross_entropy=0.2, entropy=-0.1),
]
CAPPED = {"logit_scale": 1.7, "softcap": 6.0, "temperature": 1.3}


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("teacher_hidden", [None, 29], ids=["shared", "two heads"])
@pytest.mark.parametrize(
    ("selection", "transform"),
    slow_but(
        [("dense", "bias"), ("advantage-masked", "soft cap")],
        product(("dense", "masked", "advantage-masked"), ("bias", "soft cap")),
    ),
)
def test_values_and_gradients(objective, teacher_hidden, selection, transform):
    options = {"bias": {"bias": True}, "soft cap": CAPPED}[transform]
    case = make_case(7, 17, 123, teacher_hidden=teacher_hidden, seed=3, **options)
    chosen = {}
    if selection != "dense":
        chosen["mask"] = torch.tensor([True, False, True, True, False, True, True])
    if selection == "advantage-masked":
        chosen["advantage_mask"] = AdvantageMask(0.05)
    # Unrelated heads give nearly disjoint distributions, where the gradient of the skew KL is a
    # small difference of constants near 1.
    check(case, objective, roundings=8 if teacher_hidden is None else 48, **chosen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", [None, AdvantageMask(0.05)], ids=["store", "recompute"])
@pytest.mark.parametrize("objective", [OBJECTIVES[0], OBJECTIVES[2]], ids=str)
def test_16_bit_inputs(dtype, gate, objective):
    """H = 64: the loads go through tensor descriptors; float16 weighs tokens with 1/N."""
    check(make_case(11, 64, 507, seed=5), objective, dtype, advantage_mask=gate)


@pytest.mark.parametrize(
    ("tokens", "hidden", "vocabulary"),
    [(1, 65, 2), (3, 123, 17), pytest.param(252, 8, 507, marks=pytest.mark.slow), (2, 64, 1031)],
)
@pytest.mark.parametrize("gate", [None, AdvantageMask(0.0)], ids=["store", "recompute"])
def test_odd_shapes(tokens, hidden, vocabulary, gate):
    case = make_case(tokens, hidden, vocabulary, seed=6)
    check(case, Objective("forward_kl"), advantage_mask=gate)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("workspace", ["auto", 7 * 4 * 64], ids=["one slab", "slabs"])
def test_top_k(tail, workspace):
    objective = Objective(
        "reverse_kl", policy_gradient=0.4, cross_entropy=0.2, entropy=0.1, top_k=9, tail=tail
    )
    case = make_case(7, 17, 123, bias=True, seed=3, **CAPPED)
    check(case, objective, mask=torch.arange(7) != 2, workspace=workspace)


@pytest.mark.parametrize(("in_place", "top_k"), [(False, None), (True, None), (False, 5)], ids=str)
def test_logits_of_a_caller(in_place, top_k):
    mask = torch.arange(7) != 2
    objective = Objective("reverse_kl", top_k=top_k)

    def plain(case):
        loss, divergence, _ = materialised_losses(case, objective)
        return {"divergence": divergence * mask}, loss[mask].mean()

    def ours(case):
        out = distillation_from_logits(
            case.student_hidden @ case.weight.T, case.teacher_hidden @ case.weight.detach().T,
            case.targets, objective=objective, mask=mask, in_place=in_place, backend="triton",
        )  # fmt: skip
        return {"divergence": out.divergence}, out.loss

    check_against_torch(make_case(7, 17, 123, seed=3), plain, ours)


@pytest.mark.parametrize("objective", OBJECTIVES[:5], ids=str)
def test_dense_slabs(objective):
    """Without a gate and in little memory: slabs of the vocabulary through the library GEMMs."""
    check(make_case(11, RAGGED_HIDDEN, 300, bias=True, seed=9), objective, workspace=11 * 4 * 64)


def test_store_in_several_tiles(monkeypatch):
    """dW adds up in float32 over tiles of rows."""
    from selfdistill_kernels.backends.triton import plan

    monkeypatch.setattr(plan, "STORE_ROWS", 4)
    for dtype in (torch.float32, torch.bfloat16):
        check(
            make_case(11, 24, 130, bias=True, seed=9), OBJECTIVES[0], dtype,
            workspace=5 * 130 * 10,
        )  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES[:5], ids=str)
@pytest.mark.parametrize("gate", [None, AdvantageMask(0.0)], ids=["store", "recompute"])
def test_common_offset_costs_no_digits(objective, gate):
    case = make_case(5, 16, 211, bias=True, seed=7)
    case.bias = torch.round(case.bias * 8) / 8 + 500.0
    check(case, objective, advantage_mask=gate)


@pytest.mark.parametrize("objective", OBJECTIVES[:5], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace", ["auto", 5 * 4 * 64], ids=["store", "recompute"])
def test_teacher_equal_to_student_is_exactly_zero(objective, dtype, workspace):
    case = make_case(5, 33, 150, seed=8).cast(dtype)
    case.teacher_hidden = case.student_hidden.clone()
    leaves = case.leaves()
    out = case.call(
        fused_linear_distillation, objective=objective, backend="triton", workspace=workspace
    )
    assert out.loss.item() == 0.0
    assert not out.divergence.any()
    assert not out.advantage.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(out.loss, leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 17, pytest.param(65, marks=pytest.mark.slow)])
def test_teacher_equal_to_student_is_exactly_zero_in_other_shapes(tokens, dtype):
    """Single rows, tiles that end in one row, hidden sizes on both sides of a block, gaps."""
    for hidden in (33, 79):
        for mask in (None, torch.arange(tokens) % 3 == 0):
            case = make_case(tokens, hidden, 37, seed=tokens).cast(dtype)
            case.teacher_hidden = case.student_hidden.clone()
            leaves = case.leaves()
            out = case.call(
                fused_linear_distillation, objective=Objective("jsd", 0.3), backend="triton",
                mask=mask,
            )  # fmt: skip
            assert out.loss.item() == 0.0, hidden
            for gradient in torch.autograd.grad(out.loss, leaves):
                assert not gradient.any(), hidden


@pytest.mark.parametrize("objective", OBJECTIVES[:5], ids=str)
def test_close_distributions_keep_their_digits(objective):
    """KL of order 1e-6: sums of first-order terms would leave nothing of it in float32."""
    case64 = make_case(6, 16, 200, seed=4)
    generator = torch.Generator().manual_seed(1)
    noise = 1e-3 * torch.randn(6, 16, generator=generator, dtype=torch.float64)
    case64.teacher_hidden = (case64.student_hidden + noise).float().double()
    exact = materialised_losses(case64, objective)[1]
    out = case64.cast(torch.float32).call(
        fused_linear_distillation, objective=objective, backend="triton"
    )
    assert exact.max() < 1e-4
    # Plain float32 has no digits here. Logits of order 4 are rounded by 2e-7, the difference of the
    # two models is of order 4e-3 and the divergence goes with its square: 1e-4, and a sum more.
    torch.testing.assert_close(out.divergence.double(), exact, rtol=2e-3, atol=0)


def test_skew_kl_of_peaked_and_nearly_equal_distributions():
    """What the roundings of kappa - 1, whose terms cancel, leave above 0 is no small kappa."""
    generator = torch.Generator().manual_seed(0)
    student = 8.0 * torch.randn(64, 16, generator=generator)
    teacher = student + 1e-3 * torch.randn(64, 16, generator=generator)

    def gradient(dtype, backend):
        logits = student.to(dtype).requires_grad_()
        out = distillation_from_logits(
            logits, teacher.to(dtype), objective=Objective("skew_kl", beta=0.3), reduction="sum",
            backend=backend,
        )  # fmt: skip
        return torch.autograd.grad(out.loss, logits)[0]

    far = gradient(torch.float32, "triton") - gradient(torch.float64, "reference")
    assert far.norm(dim=1).max() <= 1e-5


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_from_logits(objective, reduction):
    case64 = make_case(6, 17, 300, seed=2, softcap=9.0)
    # A head that leaves what it gets, so that the hidden states are logits.
    student, teacher = (
        (hidden @ case64.weight.T).float().double()
        for hidden in (case64.student_hidden, case64.teacher_hidden)
    )
    head = torch.eye(300, dtype=torch.float64)
    logits = Case(student, teacher, head, case64.targets, options=case64.options)
    mask = torch.tensor([True, True, False, True, True, False])

    def total(loss):
        return loss[mask].mean() if reduction == "mean" else loss[mask].sum()

    def plain(case):
        loss, divergence, _ = materialised_losses(case, objective)
        return {"loss": total(loss), "divergence": divergence * mask}, total(loss)

    torchs, exact = plain_results(logits, plain)
    leaf = student.float().requires_grad_()
    out = distillation_from_logits(
        leaf, teacher.float(), case64.targets, objective=objective, mask=mask,
        softcap=9.0, reduction=reduction, backend="triton",
    )  # fmt: skip
    found = {"loss": out.loss.sum(), "divergence": out.divergence}
    (found["d student_hidden"],) = torch.autograd.grad(found["loss"], leaf)
    size = float(total(materialised_losses(logits, objective)[0].detach().abs()))
    assert_results(
        found, *({name: given[name] for name in found} for given in (torchs, exact)),
        loss_size=size,
    )  # fmt: skip


def test_logprobs():
    def values(logprobs, entropy):
        return {"logprobs": logprobs, "entropy": entropy}, logprobs.sum() + 0.3 * entropy.sum()

    def plain(case):
        logprobs = torch.log_softmax(case.student_hidden @ case.weight.T, -1)
        own = logprobs.gather(1, case.targets[:, None])[:, 0]
        return values(own, -(logprobs.exp() * logprobs).sum(-1))

    def ours(case):
        return values(
            *fused_linear_logprobs(case.student_hidden, case.weight, case.targets, backend="triton")
        )

    check_against_torch(make_case(6, 64, 300, seed=2), plain, ours)


def test_frozen_head_gets_no_gradient_and_clips_work():
    case64 = make_case(8, 16, 90, seed=11)
    objective = Objective("reverse_kl", divergence_clip=0.5, importance_clip=1.2)
    own = materialised_losses(case64, Objective("reverse_kl"))[2]["student_logprob"]
    old = (own + torch.linspace(-1, 1, 8, dtype=torch.float64)).float()

    def plain(case):
        _, divergence, extra = materialised_losses(case, Objective("reverse_kl"))
        ratio = (extra["student_logprob"] - old).exp()
        assert (divergence > 0.5).any(), "no divergence is clipped"
        assert (ratio > 1.2).any(), "no ratio is clipped"
        loss = (divergence.clamp(max=0.5) * ratio.clamp(max=1.2)).mean()
        return {"loss": loss}, loss

    torchs, exact = plain_results(case64, plain)
    case = case64.cast(torch.float32)
    hidden = case.student_hidden.requires_grad_()
    out = case.call(
        fused_linear_distillation, objective=objective, backend="triton", old_logprobs=old
    )
    found = {"loss": out.loss, "d student_hidden": torch.autograd.grad(out.loss, hidden)[0]}
    assert_results(found, *({name: given[name] for name in found} for given in (torchs, exact)))


def test_no_tokens():
    for size, mask in ((0, None), (3, torch.zeros(3, dtype=torch.bool))):
        hidden = torch.randn(size, 8, requires_grad=True)
        weight = torch.randn(20, 8, requires_grad=True)
        out = fused_linear_distillation(
            hidden, hidden.detach(), weight, mask=mask, backend="triton"
        )
        out.loss.backward()
        assert out.loss.item() == 0.0
        assert not hidden.grad.any()
        assert not weight.grad.any()
