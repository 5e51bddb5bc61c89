"""Logits of -inf, +inf and NaN (docs/math.md, infinities), on every backend and instruction set."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from banned_entries import (
    BANS,
    INF,
    assert_is_the_loss_of_the_rest,
    is_infinite,
    losses_of_the_rest,
    make_banned_case,
)
from kernel_cases import DIVERGENCES, make_case
from torch import Tensor

from selfdistill_kernels import (
    AdvantageMask,
    Objective,
    distillation_from_logits,
    fused_linear_distillation,
    fused_linear_logprobs,
)
from selfdistill_kernels.backends.registry import native_problem

OBJECTIVES = [
    *[Objective(name, beta=0.3) for name in DIVERGENCES],
    Objective("none", policy_gradient=1.0),
    Objective("jsd", beta=0.6, policy_gradient=0.3, cross_entropy=0.2, entropy=-0.1),
]
# The first block of the native rows and the first slabs hold nothing else.
BANNED = torch.cat([torch.arange(1100), torch.arange(1101, 2100, 7)])
# Too little for a row of both models.
SLABS = 12_000


@pytest.fixture(params=["reference", "avx512", "avx2", "default"])
def any_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, and the native rows of each instruction set."""
    if request.param == "reference":
        yield "reference"
        return
    problem = native_problem()
    assert problem is None, problem
    best = torch.ops.selfdistill.cpu_capability()
    try:
        torch.ops.selfdistill.set_cpu_capability(request.param)
    except RuntimeError:
        pytest.skip(f"this processor has no {request.param}")
    yield "native"
    torch.ops.selfdistill.set_cpu_capability(best)


@pytest.mark.parametrize("ban", BANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"workspace": SLABS}, {"of_logits": True}, {"of_logits": True, "in_place": True}],
    ids=["store", "recompute", "logits", "logits in place"],
)
def test_values_and_gradients(ban, dtype, options, any_backend):
    problem = make_banned_case(ban, BANNED)
    for objective in OBJECTIVES:
        if (objective.divergence, ban) == ("reverse_kl", "teacher"):
            continue  # test_infinite_reverse_kl
        assert_is_the_loss_of_the_rest(
            problem, objective, dtype=dtype, backend=any_backend, **options
        )


@pytest.mark.parametrize("ban", BANS)
@pytest.mark.parametrize(
    "transform",
    [
        {"temperature": 0.7},
        {"temperature": 1.7},
        {"logit_scale": -0.8},  # a bias of +inf becomes a logit of -inf
        {"logit_scale": 1.3, "softcap": 4.0, "temperature": 0.7},  # bans nothing
        {"logit_scale": -1.3, "softcap": 4.0},
    ],
    ids=str,
)
def test_transforms(ban, transform, any_backend):
    problem = make_banned_case(ban, BANNED, **transform)
    for objective in OBJECTIVES:
        if (objective.divergence, ban) == ("reverse_kl", "teacher") and "softcap" not in transform:
            continue
        assert_is_the_loss_of_the_rest(problem, objective, backend=any_backend)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("divergence", "ban"), [("forward_kl", "student"), ("reverse_kl", "teacher")]
)
def test_an_infinite_divergence_shows_in_its_own_token(divergence, ban, in_place, any_backend):
    assert is_infinite(divergence, ban)
    z_s, z_t, targets = rows()
    clean = run(z_s, z_t, targets, divergence, any_backend)
    (z_s if ban == "student" else z_t)[2, 5] = -INF
    exact = losses_of_the_rest(z_s.double(), z_t.double(), targets, Objective(divergence))[1]
    divergences, gradient = run(z_s, z_t, targets, divergence, any_backend, in_place=in_place)
    assert divergences[2] == exact["divergence"][2] == INF
    assert_others_alike((divergences, gradient), clean, 2)
    if divergence == "forward_kl":  # p_s - p_t, as autograd says
        difference = z_s[2].double().softmax(0) - z_t[2].double().softmax(0)
        torch.testing.assert_close(gradient[2].double(), difference, rtol=1e-5, atol=1e-7)
    else:
        assert not gradient[2].isfinite().all()
    # A clip takes the infinity for what it is: much.
    clipped = Objective(divergence, divergence_clip=3.0)
    values, gradient = run(z_s, z_t, targets, clipped, any_backend, reduction="none")
    assert values[2] == 3.0
    assert torch.equal(gradient[2], torch.zeros_like(gradient[2]))


@pytest.mark.parametrize("ban", BANS)
@pytest.mark.parametrize("objective", ["cross_entropy", "forward_kl", "policy_gradient"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_target_that_is_ruled_out(ban, objective, reduction, backend):
    z_s, z_t, targets = rows()
    clean = run(z_s, z_t, targets, objective, backend)
    if ban != "teacher":
        z_s[2, targets[2]] = -INF
    if ban != "student":
        z_t[2, targets[2]] = -INF
    leaf = z_s.clone().requires_grad_()
    out = distillation_from_logits(
        leaf, z_t, targets, objective=objective, reduction=reduction, backend=backend
    )
    assert out.student_logprob[2] == -INF or ban == "teacher"
    assert out.teacher_logprob[2] == -INF or ban == "student"
    expected = {"student": INF, "teacher": -INF, "both": math.nan}[ban]
    assert str(out.advantage[2].item()) == str(expected)
    (gradient,) = torch.autograd.grad(out.loss.sum(), leaf)
    assert_others_alike((out.divergence, gradient), clean, 2)
    loss = out.loss[2] if reduction == "none" else out.loss
    if objective == "policy_gradient":
        assert str(loss.item()) == str({"student": INF, "teacher": -INF, "both": math.nan}[ban])
        assert not gradient[2].isfinite().all()
        return
    assert (loss == INF) == (ban == "student" or (objective, ban) == ("cross_entropy", "both"))
    z64 = z_s.double().requires_grad_()
    losses, _ = losses_of_the_rest(z64, z_t.double(), targets, Objective.of(objective))
    (exact,) = torch.autograd.grad(losses[2], z64)
    torch.testing.assert_close(gradient[2].double(), exact[2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("value", [-INF, INF, math.nan], ids=["all -inf", "+inf", "nan"])
@pytest.mark.parametrize("model", ["student", "teacher"])
@pytest.mark.parametrize("path", ["logits", "store", "recompute"])
def test_a_row_without_a_distribution_stays_alone(value, model, path, any_backend):
    """A NaN in its own token; the others have the bits that they have without it."""
    for divergence in DIVERGENCES:
        objective = Objective(divergence, beta=0.3, entropy=0.1)
        if path == "logits":
            z_s, z_t, targets = rows()
            clean = run(z_s, z_t, targets, objective, any_backend)
            z = z_s if model == "student" else z_t
            z[2, 2 if value != -INF else slice(None)] = value
            found = run(z_s, z_t, targets, objective, any_backend)
        else:
            # A hidden state that makes all logits what they should be.
            workspace = "auto" if path == "store" else SLABS
            case = make_case(6, 5, 2100, seed=3).cast(torch.float32)
            case.weight[:, 0] = case.weight[:, 0].abs() + 0.1
            clean = run_fused(case, objective, any_backend, workspace)
            hidden = case.student_hidden if model == "student" else case.teacher_hidden
            hidden[2, 0] = value
            found = run_fused(case, objective, any_backend, workspace)
        assert found[0][2].isnan()
        assert found[1][2].isnan().any()
        assert_others_alike(found, clean, 2)


@pytest.mark.parametrize("value", [-INF, INF, math.nan])
@pytest.mark.parametrize("workspace", ["auto", SLABS], ids=["store", "recompute"])
def test_a_broken_token_without_a_weight_leaves_no_trace(value, workspace, backend):
    """With a weight its NaN reaches dW, as it must."""
    case = make_case(6, 5, 2100, seed=3).cast(torch.float32)
    others = torch.arange(6) != 2
    options = {"objective": Objective("jsd", entropy=0.1), "backend": backend}

    def gradients(**more: object) -> tuple[Tensor, ...]:
        leaves = case.leaves()
        out = case.call(
            fused_linear_distillation, reduction="sum", workspace=workspace, **options, **more
        )
        return torch.autograd.grad(out.loss, leaves)

    case.student_hidden[2, 0] = value
    assert gradients()[1].isnan().any()
    found = gradients(token_weight=others.float())
    expected = gradients(mask=others)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ban", BANS)
@pytest.mark.parametrize(
    "mask",
    [
        AdvantageMask(sign="negative"),
        AdvantageMask(sign="positive"),
        AdvantageMask(sign="negative", top_fraction=0.9),
        AdvantageMask(sign="positive", top_fraction=0.9),
    ],
    ids=str,
)
def test_advantage_masks(ban, mask, backend):
    """+inf is positive, -inf negative and NaN is kept; who is dropped leaves no trace."""
    z_s, z_t, targets = rows()
    objective = Objective("reverse_kl", beta=0.3, policy_gradient=1.0)
    options = {"advantage_mask": mask, "reduction": "sum"}
    if ban != "teacher":
        z_s[2, targets[2]] = -INF
    if ban != "student":
        z_t[2, targets[2]] = -INF
    leaf = z_s.clone().requires_grad_()
    out = distillation_from_logits(
        leaf, z_t, targets, objective=objective, backend=backend, **options
    )
    kept = {"student": "positive", "teacher": "negative", "both": mask.sign}[ban] == mask.sign
    assert out.active[2] == kept
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    assert out.loss.isfinite() != kept
    assert gradient[2].isfinite().all() != kept
    assert gradient[torch.arange(6) != 2].isfinite().all()
    if not kept:
        assert torch.equal(gradient[2], torch.zeros_like(gradient[2]))


def test_the_advantage_of_a_step_is_that_of_its_own_tokens(backend):
    z_s, z_t, targets = (x[None] for x in rows())
    z_s[0, 2, targets[0, 2]] = -INF
    leaf = z_s.clone().requires_grad_()
    out = distillation_from_logits(
        leaf, z_t, targets, objective="jsd", backend=backend, reduction="sum",
        advantage_mask=AdvantageMask(sign="negative", per_step=True),
        step_ids=torch.tensor([[0, 1, 1, 1, 2, -1]]),
    )  # fmt: skip
    assert not out.active[0, 1:4].any()  # a mean of +inf
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("ban", BANS)
@pytest.mark.parametrize("top_k_of", ["student", "teacher"])
@pytest.mark.parametrize(("top_k", "tail"), [(5, True), (5, False), (30, False)])
def test_top_k(ban, top_k_of, top_k, tail, backend):
    """(30, False): more than the 20 entries that are left. A model without any probability on the
    support has no distribution over it: NaN."""
    banned = torch.arange(40)
    problem = make_banned_case(ban, banned, vocabulary=60)
    targets = problem.case.targets
    z_s, z_t = (z.to(torch.bfloat16).float() for z in problem.logits())
    for name in DIVERGENCES:
        terms = {"cross_entropy": 0.2, "entropy": 0.1}
        objective = Objective(name, beta=0.3, top_k=top_k, top_k_of=top_k_of, tail=tail, **terms)
        leaf = z_s.clone().requires_grad_()
        out = distillation_from_logits(
            leaf, z_t, targets, objective=objective, reduction="sum", backend=backend
        )
        (gradient,) = torch.autograd.grad(out.loss, leaf)

        exact_leaf = z_s.double().requires_grad_()
        both = torch.log_softmax(exact_leaf, 1), torch.log_softmax(z_t.double(), 1)
        support = both[top_k_of == "teacher"].topk(top_k, dim=1).indices
        buckets = [log_p.gather(1, support) for log_p in both]
        if tail:
            rest = [1.0 - log_p.exp().sum(1, keepdim=True) for log_p in buckets]
            buckets = [torch.cat([b, r.log()], 1) for b, r in zip(buckets, rest, strict=True)]
        divergences, exact = losses_of_the_rest(
            *buckets, targets.clamp(max=0), Objective(name, 0.3)
        )
        others, _ = losses_of_the_rest(
            exact_leaf, z_t.double(), targets, Objective("none", **terms)
        )
        undefined = torch.stack([(b == -INF).all(1) for b in buckets]).any(0)
        expected = exact["divergence"].masked_fill(undefined, math.nan)
        torch.testing.assert_close(
            out.divergence.double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True
        )
        # An infinite forward KL has a gradient.
        good = ~undefined if name == "forward_kl" else expected.isfinite()
        if good.any():
            total = (divergences + others)[good].sum()
            (exact_gradient,) = torch.autograd.grad(total, exact_leaf)
            torch.testing.assert_close(
                gradient[good].double(), exact_gradient[good], rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace", ["auto", SLABS // 2], ids=["store", "recompute"])
def test_logprobs(dtype, workspace, backend):
    case = make_banned_case("student", BANNED).case
    case.targets[1] = 3  # ruled out
    results = []
    for wanted in (dtype, torch.float64):
        cast = case.cast(wanted)
        leaves = cast.leaves()
        if wanted == torch.float64:
            z = cast.student_hidden @ cast.weight.T + cast.bias
            _, columns = losses_of_the_rest(z, z, cast.targets, Objective("none", entropy=1.0))
            losses, _ = losses_of_the_rest(
                z, z, cast.targets, Objective("none", cross_entropy=-1.0, entropy=0.3)
            )
            out = (columns["student_logprob"], columns["entropy"])
            total = losses.sum()
        else:
            out = fused_linear_logprobs(
                cast.student_hidden, cast.weight, cast.targets, bias=cast.bias,
                workspace=workspace, backend=backend,
            )  # fmt: skip
            total = out[0].sum() + 0.3 * out[1].sum()
        results.append(([x.detach() for x in out], torch.autograd.grad(total, leaves)))
    (values, gradients), (exact, exact_gradients) = results
    assert values[0][1] == -INF
    for a, b in zip(values, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients, exact_gradients, strict=True):
        error = (a.double() - b).norm() / b.norm()
        assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_models_with_banned_entries_give_exact_zero(divergence, backend):
    case = make_banned_case("both", BANNED).case.cast(torch.float32)
    case.teacher_hidden, case.teacher_weight = case.student_hidden.clone(), None
    leaves = case.leaves()
    out = case.call(
        fused_linear_distillation, objective=Objective(divergence, beta=0.3), backend=backend
    )
    assert not out.divergence.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(out.loss, leaves))


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Logits [6, 507] of student and teacher, targets [6]."""
    g = torch.Generator().manual_seed(4)
    z_s = 2 * torch.randn(6, 507, generator=g)
    z_t = z_s + torch.randn(6, 507, generator=g)
    return z_s, z_t, torch.randint(10, 507, (6,), generator=g)


def run(
    z_s: Tensor, z_t: Tensor, targets: Tensor, objective: str | Objective, backend: str, *,
    reduction: str = "sum", in_place: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Divergences, or losses with reduction "none", and the gradient of their sum."""
    leaf = z_s.clone().requires_grad_()
    out = distillation_from_logits(
        leaf * 1.0 if in_place else leaf, z_t, targets, objective=objective, reduction=reduction,
        in_place=in_place, backend=backend,
    )  # fmt: skip
    values = out.loss.detach() if reduction == "none" else out.divergence
    return values, torch.autograd.grad(out.loss.sum(), leaf)[0]


def run_fused(
    case: object, objective: Objective, backend: str, workspace: str | int
) -> tuple[Tensor, Tensor]:
    """Divergences and dH; the head is frozen."""
    hidden = case.student_hidden.clone().requires_grad_()
    out = fused_linear_distillation(
        hidden, case.teacher_hidden, case.weight, case.targets, objective=objective,
        reduction="sum", workspace=workspace, backend=backend,
    )  # fmt: skip
    return out.divergence, torch.autograd.grad(out.loss, hidden)[0]


def assert_others_alike(
    found: tuple[Tensor, Tensor], clean: tuple[Tensor, Tensor], row: int
) -> None:
    others = torch.arange(len(found[0])) != row
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a[others], b[others])
