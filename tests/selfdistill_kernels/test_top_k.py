"""Top-k divergences: against float64 from the definition, against TRL, and their limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DIVERGENCES, assert_no_worse_than_torch, make_case, materialised_losses

from selfdistill_kernels import (
    AdvantageMask,
    Objective,
    distillation_from_logits,
    fused_linear_distillation,
)
from selfdistill_kernels.backends import native_problem
from selfdistill_kernels.plan import MEBIBYTE, copied_bytes

SHAPES = {
    "plain": {},
    "everything": {
        "bias": True,
        "temperature": 0.8,
        "logit_scale": 0.5,
        "softcap": 6.0,
        "teacher_hidden": 9,
    },
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("top_k_of", ["student", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_against_float64(divergence, top_k_of, tail, shape, backend):
    objective = Objective(
        divergence, beta=0.3, policy_gradient=0.4, cross_entropy=0.2, entropy=0.1,
        top_k=10, top_k_of=top_k_of, tail=tail,
    )  # fmt: skip
    exact, plain, ours = (make_case(seed=5, **SHAPES[shape]).cast(d) for d in DTYPES)
    results = []
    for case in (exact, plain):
        leaves = case.leaves()
        loss, divergence_, _ = materialised_losses(case, objective)
        results.append((divergence_, *torch.autograd.grad(loss.mean(), leaves)))
    leaves = ours.leaves()
    out = ours.call(fused_linear_distillation, objective=objective, backend=backend)
    found = (out.divergence, *torch.autograd.grad(out.loss, leaves))
    for name, a, b, c in zip(("divergence", "dH", "dW", "db"), found, *results[::-1], strict=False):
        assert_no_worse_than_torch(name, a, b, c)


DTYPES = (torch.float64, torch.float32, torch.float32)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tail", [True, False])
def test_trl_sdpo_top_k_loss(tail, alpha, backend):
    from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss

    ours, theirs = (make_case(12, 16, 97, seed=21).cast(torch.float32) for _ in range(2))
    our_leaves, their_leaves = ours.leaves(), theirs.leaves()
    expected = compute_topk_self_distillation_loss(
        theirs.student_hidden @ theirs.weight.T,
        theirs.teacher_hidden @ theirs.weight.T.detach(),
        distillation_topk=8, distillation_alpha=alpha, distillation_add_tail=tail,
    )  # fmt: skip
    objective = Objective("jsd", beta=alpha, top_k=8, tail=tail)
    out = ours.call(
        fused_linear_distillation, objective=objective, reduction="none", backend=backend
    )
    torch.testing.assert_close(out.loss, expected, rtol=1e-4, atol=1e-5)
    made = torch.autograd.grad(out.loss.mean(), our_leaves)
    for a, b in zip(made, torch.autograd.grad(expected.mean(), their_leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_every_entry_is_the_whole_divergence(divergence, backend):
    case, other = (make_case(vocabulary=33).cast(torch.float32) for _ in range(2))
    leaves, others = case.leaves(), other.leaves()
    whole = case.call(fused_linear_distillation, objective=divergence, backend=backend)
    out = other.call(
        fused_linear_distillation, objective=Objective(divergence, top_k=33), backend=backend
    )
    torch.testing.assert_close(out.divergence, whole.divergence, rtol=1e-5, atol=1e-6)
    made = torch.autograd.grad(out.loss, others)
    for a, b in zip(made, torch.autograd.grad(whole.loss, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@given(
    k=st.integers(1, 40),
    tokens=st.integers(0, 9),
    slack=st.integers(0, 4000),
    seed=st.integers(0, 99),
    kept=st.integers(0, 511),
)
@settings(max_examples=60, deadline=None)
def test_small_workspaces_and_masks(k, tokens, slack, seed, kept):
    """Slabs of any size find the same support; tokens that do not exist are never read."""
    assert native_problem() is None, native_problem()
    case = make_case(tokens, 5, 40, seed=seed).cast(torch.float32)
    mask = torch.tensor([bool(kept >> i & 1) for i in range(tokens)], dtype=torch.bool)
    case.student_hidden[~mask] = torch.nan
    leaves = case.leaves()
    options = {"objective": Objective("reverse_kl", top_k=k), "mask": mask}
    expected = case.call(fused_linear_distillation, backend="reference", **options)
    wanted = torch.autograd.grad(expected.loss, leaves)
    out = case.call(
        fused_linear_distillation,
        backend="native",
        workspace=8 * 16 + copied_bytes(5, 2) + slack,
        **options,
    )
    torch.testing.assert_close(out.divergence, expected.divergence, rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(out.loss, leaves), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_from_logits(backend):
    case, other = (make_case(seed=3).cast(torch.float32) for _ in range(2))
    objective = Objective("forward_kl", top_k=6, top_k_of="teacher")
    case.leaves()
    out = case.call(fused_linear_distillation, objective=objective, backend=backend)
    student = (other.student_hidden @ other.weight.T).requires_grad_()
    direct = distillation_from_logits(
        student, other.teacher_hidden @ other.weight.T, objective=objective, backend=backend
    )
    torch.testing.assert_close(direct.divergence, out.divergence, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(direct.loss, student)
    (expected,) = torch.autograd.grad(out.loss, case.student_hidden)
    torch.testing.assert_close(gradient @ other.weight, expected, rtol=1e-4, atol=1e-6)


def test_advantage_mask_drops_rows(backend):
    case = make_case(20, seed=8).cast(torch.float32)
    case.leaves()
    out = case.call(
        fused_linear_distillation, objective=Objective("reverse_kl", top_k=5),
        advantage_mask=AdvantageMask(top_fraction=0.3), backend=backend,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(out.loss, case.student_hidden)
    assert 0 < int(out.active.sum()) < 20
    assert torch.equal(gradient.ne(0).any(dim=1), out.active)


def test_bfloat16_is_as_good_as_float32_on_the_same_values(backend):
    """float32 statistics from bfloat16 inputs; gradients round as the full divergence's do."""
    objective = Objective("forward_kl", top_k=12)
    case, plain, exact = (
        make_case(30, 32, 200, seed=4).cast(d)
        for d in (torch.bfloat16, torch.float32, torch.float64)
    )
    leaves, exact_leaves = case.leaves(), exact.leaves()
    out = case.call(fused_linear_distillation, objective=objective, backend=backend)
    loss, divergence, _ = materialised_losses(exact, objective)
    _, plain_divergence, _ = materialised_losses(plain, objective)
    assert_no_worse_than_torch("divergence", out.divergence, plain_divergence, divergence)
    wanted = torch.autograd.grad(loss.mean(), exact_leaves)
    for a, b in zip(torch.autograd.grad(out.loss, leaves), wanted, strict=True):
        assert (a.double() - b).abs().max() <= 8e-3 * b.abs().max()


def test_a_bad_row_stays_alone(backend):
    case = make_case(5).cast(torch.float32)
    with torch.no_grad():
        case.student_hidden[2] = torch.inf
    case.leaves()
    out = case.call(
        fused_linear_distillation, objective=Objective("forward_kl", top_k=4), reduction="none",
        backend=backend,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(out.loss.sum(), case.student_hidden)
    good = torch.tensor([True, True, False, True, True])
    assert torch.equal(out.divergence.isfinite(), good)
    assert torch.equal(gradient.isfinite().all(dim=1), good)


def test_no_logits_in_memory():
    """The workspace bounds what the sweep for the support takes, too."""
    assert native_problem() is None, native_problem()
    case = make_case(64, 8, 20_000, seed=1).cast(torch.float32)
    case.leaves()
    seen: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                seen.append(out.untyped_storage().nbytes())
            return out

    with Watch():
        case.call(
            fused_linear_distillation, objective=Objective("forward_kl", top_k=4),
            workspace=MEBIBYTE // 2, backend="native",
        ).loss.backward()  # fmt: skip
    assert seen
    assert max(seen) <= max(MEBIBYTE, 4 * case.weight.numel())  # [64, 20000] would be 5 MB


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_k": 3, "divergence": "none", "entropy": 1.0}, "needs a divergence"),
        ({"top_k": 3, "top_k_of": "both"}, "'student' or 'teacher'"),
    ],
)
def test_bad_objectives(options, message):
    with pytest.raises(ValueError, match=message):
        Objective(**options)


def test_more_entries_than_the_vocabulary():
    with pytest.raises(ValueError, match="top_k must be at most the vocabulary of 101, got 102"):
        make_case().call(fused_linear_distillation, objective=Objective(top_k=102))
