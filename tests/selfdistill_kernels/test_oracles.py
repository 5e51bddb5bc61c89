"""Agreement with what the field already uses: TRL and sdpo-rl on the same numbers."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import make_case

from selfdistill_kernels import Objective, distillation_from_logits, fused_linear_distillation


def case32():
    return make_case(12, 16, 97, seed=21).cast(torch.float32)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_trl_chunked_divergence(beta, backend):
    """TRL's beta = 0 is forward KL, 1 reverse KL, in between the generalised JSD."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    ours, theirs = case32(), case32()
    our_leaves, their_leaves = ours.leaves(), theirs.leaves()
    out = ours.call(
        fused_linear_distillation,
        objective=Objective("jsd", beta=beta), reduction="none", temperature=0.9, backend=backend,
    )  # fmt: skip
    head = theirs.weight.detach()
    value = ChunkedDivergenceFunction.apply(
        theirs.student_hidden, theirs.weight, None, theirs.teacher_hidden, head, None, beta, 0.9
    )
    divergence = value[0] if isinstance(value, tuple) else value
    torch.testing.assert_close(out.loss, divergence.reshape(12), rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(out.loss.mean(), our_leaves)
    expected = torch.autograd.grad(divergence.mean(), their_leaves)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_trl_gkd(beta, backend):
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    case = case32()
    student, teacher = case.student_hidden @ case.weight.T, case.teacher_hidden @ case.weight.T
    out = distillation_from_logits(
        student, teacher, objective=Objective("jsd", beta=beta), temperature=0.9,
        reduction="sum", backend=backend,
    )  # fmt: skip
    expected = GKDTrainer.generalized_jsd_loss(
        student[None], teacher[None], beta=beta, temperature=0.9
    )
    torch.testing.assert_close(out.loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_trl_sdpo_full_logits(divergence, backend):
    from trl.experimental.sdpo.loss_utils import compute_divergence

    case = case32()
    student = torch.log_softmax(case.student_hidden @ case.weight.T, -1)
    teacher = torch.log_softmax(case.teacher_hidden @ case.weight.T, -1)
    alpha = {"forward_kl": 0.0, "reverse_kl": 1.0}[divergence]
    expected = compute_divergence(student[None], teacher[None], alpha)
    out = case.call(
        fused_linear_distillation, objective=divergence, reduction="none", backend=backend
    )
    torch.testing.assert_close(out.loss, expected.reshape(12), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("divergence", "alpha"), [("forward_kl", 0.0), ("reverse_kl", 1.0)])
def test_sdpo_rl_full_vocabulary(divergence, alpha, backend):
    """lasgroup's loss with every token in the "top k" is the exact divergence, token mean."""
    from sdpo_rl.distillation import compute_self_distillation_loss

    case = case32()
    mask = torch.arange(12).view(2, 6) % 5 != 0
    student = torch.log_softmax(case.student_hidden @ case.weight.T, -1).view(2, 6, -1)
    teacher = torch.log_softmax(case.teacher_hidden @ case.weight.T, -1).view(2, 6, -1)
    index = case.targets.view(2, 6, 1)
    expected, _ = compute_self_distillation_loss(
        student.gather(2, index)[..., 0], teacher.gather(2, index)[..., 0], mask.float(),
        student_topk_log_probs=student, teacher_topk_log_probs=teacher,
        alpha=alpha, is_clip=None, add_tail=False,
    )  # fmt: skip
    out = fused_linear_distillation(
        case.student_hidden.view(2, 6, -1), case.teacher_hidden.view(2, 6, -1), case.weight,
        case.targets.view(2, 6), mask=mask, objective=divergence, backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(out.loss, expected, rtol=1e-4, atol=1e-5)


def test_sdpo_rl_sampled_token_policy_gradient(backend):
    """Its fallback, log-ratio (detached) times log-prob, is our policy gradient."""
    from sdpo_rl.distillation import compute_self_distillation_loss

    ours, theirs = case32(), case32()
    our_leaves, their_leaves = ours.leaves(), theirs.leaves()
    out = ours.call(fused_linear_distillation, objective="policy_gradient", backend=backend)
    student = torch.log_softmax(theirs.student_hidden @ theirs.weight.T, -1)
    teacher = torch.log_softmax(theirs.teacher_hidden @ theirs.weight.detach().T, -1)
    index = theirs.targets[:, None]
    expected, _ = compute_self_distillation_loss(
        student.gather(1, index).T, teacher.gather(1, index).T, torch.ones(1, 12), is_clip=None
    )
    torch.testing.assert_close(out.loss, expected, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(out.loss, our_leaves)
    for a, b in zip(grads, torch.autograd.grad(expected, their_leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("beta", [0.3, 0.5])
def test_liger_chunked_jsd(beta, backend):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    ours, theirs = case32(), case32()
    our_leaves, their_leaves = ours.leaves(), theirs.leaves()
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False, chunk_size=4
    )
    expected = loss(
        theirs.student_hidden, theirs.weight, theirs.teacher_hidden, theirs.weight.detach(),
        theirs.targets,
    )  # fmt: skip
    out = ours.call(
        fused_linear_distillation, objective=Objective("jsd", beta=beta), backend=backend
    )
    torch.testing.assert_close(out.loss, expected, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(out.loss, our_leaves)
    for a, b in zip(grads, torch.autograd.grad(expected, their_leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("objective", "alpha"),
    [
        (Objective("forward_kl"), 0.0),
        (Objective("jsd", beta=0.5), 0.5),
        (Objective("reverse_kl"), 1.0),
    ],
    ids=str,
)
def test_trl_sdpo_full_logit_loss_with_importance_clipping(objective, alpha, backend):
    from trl.experimental.sdpo.loss_utils import (
        apply_importance_sampling_clipping,
        compute_full_logit_self_distillation_loss,
    )

    ours, theirs = case32(), case32()
    our_leaves, their_leaves = ours.leaves(), theirs.leaves()
    student = (theirs.student_hidden @ theirs.weight.T)[None]
    teacher = (theirs.teacher_hidden @ theirs.weight.detach().T)[None]
    loss = compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=alpha)
    logprobs = torch.log_softmax(student, -1).gather(2, theirs.targets[None, :, None])[..., 0]
    old = logprobs.detach() + torch.linspace(-1.5, 1.5, 12)
    expected = apply_importance_sampling_clipping(loss, logprobs, old, 1.5).mean()
    out = ours.call(
        fused_linear_distillation,
        objective=Objective(objective.divergence, objective.beta, importance_clip=1.5),
        old_logprobs=old[0], backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(out.loss, expected, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(out.loss, our_leaves)
    for a, b in zip(grads, torch.autograd.grad(expected, their_leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_trl_sdpo_sampled_token_loss(backend):
    from trl.experimental.sdpo.loss_utils import compute_sampled_token_self_distillation_loss

    case = case32()
    student, teacher = case.student_hidden @ case.weight.T, case.teacher_hidden @ case.weight.T
    expected = compute_sampled_token_self_distillation_loss(
        student[None], teacher[None], case.targets[None], distillation_alpha=1.0
    )
    out = case.call(
        fused_linear_distillation, objective="policy_gradient", reduction="none", backend=backend
    )
    torch.testing.assert_close(out.loss, expected[0], rtol=1e-4, atol=1e-5)
