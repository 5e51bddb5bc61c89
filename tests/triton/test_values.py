"""Values and gradients of the Triton kernels against float64, under the interpreter."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    DIVERGENCES,
    assert_no_worse_than_torch,
    make_case,
    materialised_losses,
)

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
STATISTICS = (
    "divergence",
    "student_logprob",
    "teacher_logprob",
    "advantage",
    "entropy",
    "teacher_entropy",
)
CAPPED = {"logit_scale": 1.7, "softcap": 6.0, "temperature": 1.3}


def check(case64, objective, dtype=torch.float32, *, roundings=8, mask=None, **options):
    """Loss, statistics and gradients, against float64 and plain float32 torch."""
    keep = torch.ones(case64.targets.shape, dtype=torch.bool) if mask is None else mask
    gate = options.get("advantage_mask")

    def reference(case):
        leaves = case.leaves()
        loss, divergence, extra = materialised_losses(case, objective)
        kept = keep if gate is None else gate.select(active["advantage"], keep)
        total = torch.where(kept, loss, torch.zeros_like(loss)).sum() / keep.sum()
        values = {"divergence": divergence.detach(), **extra}
        return total.detach(), values, torch.autograd.grad(total, leaves)

    # Both sides keep the tokens that float64 keeps; thresholds lie far from any advantage.
    active = materialised_losses(case64, objective)[2]
    exact_loss, exact, exact_grads = reference(case64)
    torch_loss, torchs, torch_grads = reference(case64.cast(torch.float32))
    case = case64.cast(dtype)
    if mask is not None:  # rows that are no token are never read
        case.student_hidden[~mask] = float("nan")
        case.teacher_hidden[~mask] = float("nan")
    leaves = case.leaves()
    out = case.call(
        fused_linear_distillation, objective=objective, backend="triton", mask=mask, **options
    )
    grads = torch.autograd.grad(out.loss, leaves)
    assert_no_worse_than_torch("loss", out.loss, torch_loss, exact_loss, floor=1.0)
    for name in STATISTICS:
        value = getattr(out, name)
        assert not value[~keep].any()
        assert_no_worse_than_torch(
            name, value[keep], torchs[name][keep], exact[name][keep], floor=1.0
        )
    for name, ours, theirs, true in zip(
        ("student_hidden", "weight", "bias"), grads, torch_grads, exact_grads, strict=False
    ):
        assert ours.dtype == dtype
        assert_no_worse_than_torch(f"d {name}", ours, theirs.to(dtype), true, roundings=roundings)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("teacher_hidden", [None, 29], ids=["shared", "two heads"])
@pytest.mark.parametrize("selection", ["dense", "masked", "advantage-masked"])
@pytest.mark.parametrize("options", [{"bias": True}, CAPPED], ids=["bias", "soft cap"])
def test_values_and_gradients(objective, teacher_hidden, selection, options):
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
    ("tokens", "hidden", "vocabulary"), [(1, 65, 2), (3, 123, 17), (252, 8, 507), (2, 64, 1031)]
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
    case = make_case(7, 17, 123, seed=3).cast(torch.float32)
    found = {}
    for backend in ("reference", "triton"):
        student = (case.student_hidden @ case.weight.T).requires_grad_() * 1.0
        out = distillation_from_logits(
            student, case.teacher_hidden @ case.weight.T, case.targets,
            objective=Objective("reverse_kl", top_k=top_k), mask=torch.arange(7) != 2,
            in_place=in_place, backend=backend,
        )  # fmt: skip
        found[backend] = (out.divergence, *torch.autograd.grad(out.loss, student))
    for a, b in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES[:5], ids=str)
def test_dense_slabs(objective):
    """Without a gate and in little memory: slabs of the vocabulary through the library GEMMs."""
    check(make_case(11, 24, 300, bias=True, seed=9), objective, workspace=11 * 4 * 64)


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
    torch.testing.assert_close(out.divergence.double(), exact, rtol=2e-3, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_from_logits(objective, reduction):
    case = make_case(6, 17, 300, seed=2)
    student, teacher = (h @ case.weight.T for h in (case.student_hidden, case.teacher_hidden))
    mask = torch.tensor([True, True, False, True, True, False])
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaf = student.to(dtype).requires_grad_()
        out = distillation_from_logits(
            leaf, teacher.to(dtype), case.targets, objective=objective, mask=mask,
            softcap=9.0, reduction=reduction, backend=backend,
        )  # fmt: skip
        results.append((out.loss, out.divergence, *torch.autograd.grad(out.loss.sum(), leaf)))
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).abs().max() <= 4e-6 * exact.abs().max().clamp(min=0.1)


def test_logprobs():
    case = make_case(6, 64, 300, seed=2)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        hidden = case.student_hidden.to(dtype, copy=True).requires_grad_()
        weight = case.weight.to(dtype, copy=True).requires_grad_()
        out = fused_linear_logprobs(hidden, weight, case.targets, backend=backend)
        total = out.logprobs.sum() + 0.3 * out.entropy.sum()
        results.append((*out, *torch.autograd.grad(total, (hidden, weight))))
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).abs().max() <= 4e-6 * exact.abs().max()


def test_frozen_head_gets_no_gradient_and_clips_work():
    case = make_case(8, 16, 90, seed=11)
    objective = Objective("reverse_kl", divergence_clip=0.5, importance_clip=1.2)
    old = torch.full((8,), -3.0)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        cast = case.cast(dtype)
        hidden = cast.student_hidden.requires_grad_()
        out = cast.call(
            fused_linear_distillation, objective=objective, backend=backend, old_logprobs=old
        )
        results.append((out.loss, *torch.autograd.grad(out.loss, hidden)))
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()


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
