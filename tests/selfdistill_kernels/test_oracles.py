"""Agreement with what the field already uses: TRL, sdpo-rl and Liger on the same numbers.

Their own functions say what is right, in float64, and how exact float32 can be, in float32.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    assert_results,
    check_against_torch,
    make_case,
    materialised_losses,
    plain_results,
    results,
)

from selfdistill_kernels import Objective, distillation_from_logits, fused_linear_distillation

CASE = make_case(12, 16, 97, seed=21)


def logits_of(case):
    """Student and teacher; the head learns from the student alone."""
    return case.student_hidden @ case.weight.T, case.teacher_hidden @ case.weight.detach().T


def logprobs_of(case):
    return [torch.log_softmax(logits, -1) for logits in logits_of(case)]


def ours(**options):
    """The mean of per-token losses with these options."""

    def compute(case):
        loss = case.call(fused_linear_distillation, reduction="none", **options).loss
        return {"tokens": loss}, loss.mean()

    return compute


def tokens(loss):
    return {"tokens": loss.reshape(12)}, loss.mean()


def check_both_in_float32(case64, definition, theirs, fused):
    """For functions that compute in float32 whatever they get: both against the definition."""
    torchs, exact = plain_results(case64, definition)
    for compute in (theirs, fused):
        assert_results(results(case64.cast(torch.float32), compute), torchs, exact)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_trl_chunked_divergence(beta, backend):
    """TRL's beta = 0 is forward KL, 1 reverse KL, in between the generalised JSD."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def theirs(case):
        value = ChunkedDivergenceFunction.apply(
            case.student_hidden, case.weight, None, case.teacher_hidden, case.weight.detach(), None,
            beta, 0.9,
        )  # fmt: skip
        return tokens(value[0] if isinstance(value, tuple) else value)

    case64 = make_case(12, 16, 97, seed=21, temperature=0.9)
    definition = Objective(Objective("jsd", beta=beta).kernel_divergence, beta)
    check_both_in_float32(
        case64,
        lambda case: tokens(materialised_losses(case, definition)[0]),
        theirs,
        ours(objective=Objective("jsd", beta=beta), backend=backend),
    )


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_trl_gkd(beta, backend):
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    def theirs(case):
        student, teacher = logits_of(case)
        loss = GKDTrainer.generalized_jsd_loss(
            student[None], teacher[None], beta=beta, temperature=0.9
        )
        return {"loss": loss}, loss

    def from_logits(case):
        loss = distillation_from_logits(
            *logits_of(case), objective=Objective("jsd", beta=beta), temperature=0.9,
            reduction="sum", backend=backend,
        ).loss  # fmt: skip
        return {"loss": loss}, loss

    check_against_torch(CASE, theirs, from_logits)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_trl_sdpo_full_logits(divergence, backend):
    from trl.experimental.sdpo.loss_utils import compute_divergence

    alpha = {"forward_kl": 0.0, "reverse_kl": 1.0}[divergence]

    def theirs(case):
        student, teacher = logprobs_of(case)
        return tokens(compute_divergence(student[None], teacher[None], alpha))

    check_against_torch(CASE, theirs, ours(objective=divergence, backend=backend))


@pytest.mark.parametrize(("divergence", "alpha"), [("forward_kl", 0.0), ("reverse_kl", 1.0)])
def test_sdpo_rl_full_vocabulary(divergence, alpha, backend):
    """lasgroup's loss with every token in the "top k" is the exact divergence, token mean."""
    from sdpo_rl.distillation import compute_self_distillation_loss

    mask = torch.arange(12).view(2, 6) % 5 != 0

    def theirs(case):
        student, teacher = (logprobs.view(2, 6, -1) for logprobs in logprobs_of(case))
        index = case.targets.view(2, 6, 1)
        loss, _ = compute_self_distillation_loss(
            student.gather(2, index)[..., 0], teacher.gather(2, index)[..., 0],
            mask.to(student.dtype),
            student_topk_log_probs=student, teacher_topk_log_probs=teacher,
            alpha=alpha, is_clip=None, add_tail=False,
        )  # fmt: skip
        return {"loss": loss}, loss

    def masked(case):
        loss = fused_linear_distillation(
            case.student_hidden.view(2, 6, -1), case.teacher_hidden.view(2, 6, -1), case.weight,
            case.targets.view(2, 6), mask=mask, objective=divergence, backend=backend,
        ).loss  # fmt: skip
        return {"loss": loss}, loss

    check_against_torch(CASE, theirs, masked)


def test_sdpo_rl_sampled_token_policy_gradient(backend):
    """Its fallback, log-ratio (detached) times log-prob, is our policy gradient."""
    from sdpo_rl.distillation import compute_self_distillation_loss

    def theirs(case):
        index = case.targets[:, None]
        student, teacher = (logprobs.gather(1, index).T for logprobs in logprobs_of(case))
        loss, _ = compute_self_distillation_loss(
            student, teacher, torch.ones_like(student), is_clip=None
        )
        return {"loss": loss}, loss

    def policy_gradient(case):
        loss = case.call(
            fused_linear_distillation, objective="policy_gradient", backend=backend
        ).loss
        return {"loss": loss}, loss

    check_against_torch(CASE, theirs, policy_gradient)


@pytest.mark.parametrize("beta", [0.3, 0.5])
def test_liger_chunked_jsd(beta, backend):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    liger = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False, chunk_size=4
    )
    objective = Objective("jsd", beta=beta)

    def theirs(case):
        loss = liger(
            case.student_hidden, case.weight, case.teacher_hidden, case.weight.detach(),
            case.targets,
        )  # fmt: skip
        return {"loss": loss}, loss

    def fused(case):
        loss = case.call(fused_linear_distillation, objective=objective, backend=backend).loss
        return {"loss": loss}, loss

    def definition(case):
        loss = materialised_losses(case, objective)[0].mean()
        return {"loss": loss}, loss

    check_both_in_float32(CASE, definition, theirs, fused)


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

    student, _ = logprobs_of(CASE)
    logprobs = student.gather(1, CASE.targets[:, None])[:, 0]
    old = (logprobs + torch.linspace(-1.5, 1.5, 12, dtype=torch.float64)).float()

    def theirs(case):
        student, teacher = (logits[None] for logits in logits_of(case))
        loss = compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=alpha)
        logprobs = torch.log_softmax(student, -1)
        logprobs = logprobs.gather(2, case.targets[None, :, None])[..., 0]
        return tokens(
            apply_importance_sampling_clipping(loss, logprobs, old[None].to(loss.dtype), 1.5)
        )

    clipped = Objective(objective.divergence, objective.beta, importance_clip=1.5)
    check_against_torch(CASE, theirs, ours(objective=clipped, old_logprobs=old, backend=backend))


def test_trl_sdpo_sampled_token_loss(backend):
    from trl.experimental.sdpo.loss_utils import compute_sampled_token_self_distillation_loss

    def theirs(case):
        student, teacher = logits_of(case)
        return tokens(
            compute_sampled_token_self_distillation_loss(
                student[None], teacher[None], case.targets[None], distillation_alpha=1.0
            )
        )

    check_against_torch(CASE, theirs, ours(objective="policy_gradient", backend=backend))
