"""The public functions: values, gradients, reductions, masks, edge cases, on every backend."""

from __future__ import annotations

import math
import warnings
from statistics import fmean, stdev

import pytest
import torch
from exactness import assert_no_worse_than_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DIVERGENCES,
    Case,
    assert_results,
    check_against_torch,
    make_case,
    materialised_losses,
    plain_results,
    results,
)

from selfdistill_kernels import (
    AdvantageMask,
    FusedLinearDistillationLoss,
    Objective,
    distillation_from_logits,
    fused_linear_distillation,
    fused_linear_logprobs,
)
from selfdistill_kernels.backends.native import backend as native_backend
from selfdistill_kernels.backends.native import gemm
from selfdistill_kernels.backends.native.plan import copied_bytes

OBJECTIVES = [
    *[Objective(name, beta=0.3) for name in DIVERGENCES],
    Objective("jsd", beta=0.0),
    Objective("jsd", beta=1.0),
    Objective("none", policy_gradient=1.0),
    Objective("none", cross_entropy=1.0),
    Objective("forward_kl", policy_gradient=0.3, cross_entropy=0.2, entropy=-0.1),
]
OPTIONS = [
    {},
    {"temperature": 0.7},
    {"logit_scale": 1.7, "softcap": 6.0, "temperature": 1.3},
]
STATISTICS = (
    "divergence",
    "student_logprob",
    "teacher_logprob",
    "advantage",
    "entropy",
    "teacher_entropy",
)


def check_against_float64(case64, objective, backend, dtype=torch.float32, roundings=8, **kwargs):
    """Loss, statistics and gradients of one case, against float64 and plain float32 torch."""

    def plain(case):
        loss, divergence, extra = oracle(case, objective)
        values = {"loss": loss.mean(), "divergence": divergence, **extra}
        return values, loss.mean()

    def ours(case):
        out = case.call(fused_linear_distillation, objective=objective, backend=backend, **kwargs)
        return {"loss": out.loss, **statistics_of(out)}, out.loss

    size = float(oracle(case64, objective)[0].abs().mean())
    check_against_torch(case64, plain, ours, dtype=dtype, roundings=roundings, loss_size=size)


def statistics_of(out):
    values = {name: getattr(out, name) for name in STATISTICS}
    assert all(value.dtype == torch.float32 for value in values.values())
    return values


def oracle(case, objective):
    """materialised_losses, with the end points of beta as they are defined."""
    kind = objective.kernel_divergence
    terms = (objective.policy_gradient, objective.cross_entropy, objective.entropy)
    return materialised_losses(case, Objective(kind, objective.beta, *terms))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients(objective, options, bias, backend):
    case = make_case(9, 65, 507, bias=bias, seed=3, **options)
    check_against_float64(case, objective, backend)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_two_heads_of_different_hidden_size(objective, backend):
    # Unrelated heads give nearly disjoint distributions, where the gradient of the skew KL is a
    # small difference of constants near 1.
    case = make_case(6, 17, 123, teacher_hidden=29, bias=True, seed=4)
    check_against_float64(case, objective, backend, roundings=48)


@pytest.mark.parametrize("objective", OBJECTIVES[:5], ids=str)
# With the float32 sums of dH, copies and widened columns; slabs of some columns, and one tile.
@pytest.mark.parametrize("workspace", ["auto", 4 * (11 * 64 + 507 * 11), 80_000])
@pytest.mark.parametrize("widening", [False, True])
def test_bfloat16_inputs(objective, workspace, widening, backend, monkeypatch):
    """`widening`: the way of processors without 16-bit matrix products, whatever runs this."""
    if widening:
        for module in (gemm, native_backend):
            monkeypatch.setattr(module, "is_widened", lambda weight: weight is not None)
    case = make_case(11, 64, 507, seed=5)
    check_against_float64(case, objective, backend, torch.bfloat16, workspace=workspace)


@pytest.mark.parametrize(
    ("tokens", "hidden", "vocabulary"),
    [(1, 1, 1), (1, 65, 2), (3, 123, 17), (252, 8, 507), (2, 5, 50257)],
)
def test_odd_shapes(tokens, hidden, vocabulary, backend):
    check_against_float64(
        make_case(tokens, hidden, vocabulary, seed=6), Objective("forward_kl"), backend
    )


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_error_on_average(objective, temperature, backend):
    """Over many problems, the error is no larger than plain torch's (geometric mean of ratios:
    single problems differ by luck, and now and then by a lot)."""
    ratios: dict[str, list[float]] = {"divergence": [], "dH": [], "dW": []}
    for seed in range(40):
        case64 = make_case(9, 65, 507, seed=seed, temperature=temperature)
        leaves64 = case64.leaves()
        loss64, divergence64, _ = oracle(case64, objective)
        exact = [divergence64.detach(), *torch.autograd.grad(loss64.mean(), leaves64)]
        plain = case64.cast(torch.float32)
        plain_leaves = plain.leaves()
        loss, divergence, _ = oracle(plain, objective)
        torchs = [divergence.detach(), *torch.autograd.grad(loss.mean(), plain_leaves)]
        case = case64.cast(torch.float32)
        leaves = case.leaves()
        out = case.call(fused_linear_distillation, objective=objective, backend=backend)
        ours = [out.divergence, *torch.autograd.grad(out.loss, leaves)]
        for ratio, a, b, e in zip(ratios.values(), ours, torchs, exact, strict=True):
            if e.any():
                ratio.append(math.log(((a - e).norm() / (b - e).norm()).item()))
    for name, logs in ratios.items():
        if logs:
            # Two standard errors, about 0.1: which of 40 problems round badly hangs on the machine.
            mean, error = fmean(logs), stdev(logs) / math.sqrt(len(logs))
            assert mean - 2 * error <= math.log(1.1), (
                f"{name}: {math.exp(mean):.2f} times the error of plain torch"
            )


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_small_problem(data):
    tokens = data.draw(st.integers(1, 20), label="tokens")
    vocabulary = data.draw(st.integers(1, 70), label="vocabulary")
    objective = data.draw(st.sampled_from(OBJECTIVES), label="objective")
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    rows = data.draw(st.integers(2, 8), label="workspace rows")
    backend = data.draw(st.sampled_from(["reference", "native"]), label="backend")
    case64 = make_case(tokens, 5, vocabulary, seed=data.draw(st.integers(0, 99)), bias=True)

    def plain(case):
        loss = (oracle(case, objective)[0] * mask).sum() / max(int(mask.sum()), 1)
        return {"loss": loss}, loss

    def ours(case):
        out = case.call(
            fused_linear_distillation,
            objective=objective,
            mask=mask,
            workspace=(4 * vocabulary + copied_bytes(5, 2)) * rows,
            backend=backend,
        )
        return {"loss": out.loss}, out.loss

    torchs, exact = plain_results(case64, plain)
    found = results(case64.cast(torch.float32), ours)
    # On so few numbers plain torch may be exact by luck, and a gradient may be nothing but the
    # difference of two probabilities near 1. Logits are below 32, so that a log-prob has 32 times
    # the rounding of 1, and hidden states and weights below 4: so many roundings of a loss of 1.
    for name, value in found.items():
        assert_no_worse_than_torch(name, value, torchs[name], exact[name], floor=4.0, roundings=32)


@pytest.mark.parametrize("objective", OBJECTIVES[:5], ids=str)
def test_common_offset_costs_no_digits_of_the_kernel(objective, backend):
    # The offset is in a bias, so that the logits themselves are rounded alike for everyone.
    case = make_case(5, 16, 211, bias=True, seed=7)
    case.bias = torch.round(case.bias * 8) / 8 + 500.0
    check_against_float64(case, objective, backend)


@pytest.mark.parametrize("objective", OBJECTIVES[:5], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 37])
def test_teacher_equal_to_student_is_exactly_zero(objective, dtype, tokens, backend):
    case = make_case(tokens, 33, 509, seed=8).cast(dtype)
    case.teacher_hidden = case.student_hidden.clone()
    leaves = case.leaves()
    out = case.call(fused_linear_distillation, objective=objective, backend=backend)
    assert out.loss.item() == 0.0
    assert not out.divergence.any()
    assert not out.advantage.any()
    for gradient in torch.autograd.grad(out.loss, leaves):
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", ["whole", "ends in one row", "gathered"])
def test_teacher_equal_to_student_is_exactly_zero_in_every_shape(dtype, tile, backend):
    """One row of a product has other last bits in another place, by its size and the library."""
    objective = Objective("jsd", 0.3)
    for tokens in range(1, 71):
        for hidden in (1, 7, 16, 33, 40, 63, 79)[tokens % 2 :: 2]:
            case = make_case(tokens, hidden, 37, seed=tokens).cast(dtype)
            case.teacher_hidden = case.student_hidden.clone()
            options: dict = {}
            if tile == "ends in one row" and tokens > 1:
                # Slabs whose tiles hold tokens - 1 rows at most.
                options["workspace"] = (8 * 16 + copied_bytes(hidden, 2)) * (tokens - 1)
                options["workspace"] += 4 * hidden * (tokens + 2 * 37)
            if tile == "gathered":
                options["mask"] = torch.arange(tokens) % 3 > 0
            leaves = case.leaves()
            out = case.call(
                fused_linear_distillation, objective=objective, backend=backend, **options
            )
            assert out.loss.item() == 0.0, (tokens, hidden)
            for gradient in torch.autograd.grad(out.loss, leaves):
                assert not gradient.any(), (tokens, hidden)


@pytest.mark.parametrize("objective", OBJECTIVES[:5], ids=str)
def test_a_token_with_the_students_hidden_states_is_exactly_zero_among_others(objective, backend):
    case = make_case(9, 33, 101, seed=3).cast(torch.float32)
    case.teacher_hidden[4] = case.student_hidden[4]
    leaves = case.leaves()
    out = case.call(fused_linear_distillation, objective=objective, backend=backend)
    gradient = torch.autograd.grad(out.loss, leaves)[0]
    equal = torch.arange(9) == 4
    assert torch.equal(out.divergence == 0, equal)
    assert torch.equal((gradient == 0).all(dim=1), equal)


def test_nearly_equal_distributions_keep_their_digits(backend):
    case64 = make_case(8, 64, 2048, seed=9)
    case64.teacher_hidden = case64.student_hidden + 1e-4 * torch.randn(8, 64, dtype=torch.float64)
    case = case64.cast(torch.float32)
    # The inputs are rounded to float32 first: the oracle sees the same problem.
    exact = oracle(case.cast(torch.float64), Objective("forward_kl"))[1]
    plain = oracle(case, Objective("forward_kl"))[1]
    out = case.call(fused_linear_distillation, backend=backend)
    error = ((out.divergence - exact).abs() / exact).max()
    plain_error = ((plain - exact).abs() / exact).max()
    assert error <= plain_error


class TestMask:
    """`mask` False or `ignore_index`: the token does not exist."""

    def test_hidden_states_of_missing_tokens_are_never_read(self, backend):
        case64 = make_case(6, 8, 31, bias=True)
        mask = torch.tensor([True, False, True, True, False, True])

        def plain(case):
            loss, divergence, extra = oracle(case, Objective("forward_kl"))
            values = {
                name: value * mask for name, value in (extra | {"divergence": divergence}).items()
            }
            return values, loss[mask].mean()

        case = case64.cast(torch.float32)
        case.student_hidden[~mask] = float("nan")
        case.teacher_hidden[~mask] = float("nan")
        case.targets = torch.where(mask, case.targets, 10**9)

        def ours(case):
            out = case.call(fused_linear_distillation, mask=mask, backend=backend)
            assert out.active.tolist() == mask.tolist()
            return statistics_of(out), out.loss

        found = results(case, ours)
        assert_results(found, *plain_results(case64, plain))
        assert not found["d student_hidden"][~mask].any()
        for name in STATISTICS:
            assert not found[name][~mask].any()

    def test_ignore_index_is_a_mask(self, backend):
        case = make_case(4, 8, 31).cast(torch.float32)
        mask = torch.tensor([True, True, False, True])
        expected = case.call(fused_linear_distillation, mask=mask, backend=backend)
        case.targets[2] = -7
        out = case.call(fused_linear_distillation, ignore_index=-7, backend=backend)
        assert torch.equal(out.loss, expected.loss)
        assert torch.equal(out.active, mask)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "sequence_mean", "none"])
    @pytest.mark.parametrize("tokens", [0, 3])
    def test_nothing_to_learn_from(self, reduction, tokens, backend):
        case = make_case(2 * tokens, 8, 31, bias=True).cast(torch.float32)
        leaves = case.leaves()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = fused_linear_distillation(
                case.student_hidden.view(2, tokens, 8),
                case.teacher_hidden.view(2, tokens, 8),
                case.weight,
                case.targets.view(2, tokens),
                bias=case.bias,
                mask=torch.zeros(2, tokens, dtype=torch.bool),
                reduction=reduction,
                backend=backend,
            )
            grads = torch.autograd.grad(out.loss.sum(), leaves)
        assert out.loss.sum() == 0
        assert out.divergence.shape == (2, tokens)
        for gradient, leaf in zip(grads, leaves, strict=True):
            assert gradient.shape == leaf.shape
            assert not gradient.any()


class TestAdvantageMask:
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize(
        "advantage_mask",
        [
            AdvantageMask(threshold=0.8),
            AdvantageMask(threshold=0.5, sign="negative"),
            AdvantageMask(threshold=0.5, sign="positive"),
            AdvantageMask(top_fraction=0.3),
            AdvantageMask(threshold=0.5, sign="negative", top_fraction=0.2),
            AdvantageMask(threshold=1e9),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("rows", [2, 5, 64])
    def test_dropped_tokens(self, advantage_mask, reduction, rows, backend):
        """They keep their statistics, get no gradient and stay in the denominator."""
        case64 = make_case(23, 9, 57, bias=True, seed=11)
        objective = Objective("reverse_kl", cross_entropy=0.1)
        size = oracle(case64, objective)[2]["advantage"]
        keep = {"any": size.abs(), "negative": -size, "positive": size}[advantage_mask.sign]
        keep = keep > advantage_mask.threshold
        if advantage_mask.top_fraction is not None:
            count = -(-int(23 * advantage_mask.top_fraction * 1000) // 1000)
            ranked = torch.where(keep, size.abs(), -1.0).argsort(descending=True)[:count]
            keep &= torch.zeros(23, dtype=torch.bool).index_fill(0, ranked, True)

        def plain(case):
            loss, divergence, _ = oracle(case, objective)
            total = (loss * keep).sum() / 23
            return {"loss": total, "divergence": divergence}, total

        def ours(case):
            out = case.call(
                fused_linear_distillation,
                objective=objective,
                advantage_mask=advantage_mask,
                reduction=reduction,
                workspace=4 * 57 * rows,
                backend=backend,
            )
            assert torch.equal(out.active, keep)
            loss = out.loss if reduction == "mean" else out.loss.sum() / 23
            return {"loss": loss, "divergence": out.divergence}, loss

        check_against_torch(case64, plain, ours)


def test_dropped_tokens_lose_the_gradient_of_their_divergence_too(backend):
    case = make_case(23, 9, 57, seed=11).cast(torch.float32)
    leaves = case.leaves()
    out = case.call(
        fused_linear_distillation,
        advantage_mask=AdvantageMask(0.8), reduction="none", backend=backend,
    )  # fmt: skip
    assert 0 < out.active.sum() < 23
    hidden, _ = torch.autograd.grad(out.divergence.sum(), leaves)
    assert hidden[out.active].any(dim=1).all()
    assert not hidden[~out.active].any()


class TestClips:
    """Weights that depend on the token's own statistics."""

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("workspace", ["auto", 4 * 2 * 57 * 3])
    def test_divergence_clip(self, reduction, workspace, backend):
        case64 = make_case(23, 9, 57, bias=True, seed=31)
        base = Objective("jsd", 0.3, cross_entropy=0.1)
        limit = float(oracle(case64, base)[1].median()) + 1e-3

        def plain(case):
            loss, divergence, _ = oracle(case, base)
            loss = (loss - divergence + divergence.clamp(max=limit)).mean()
            return {"loss": loss, "divergence": divergence}, loss

        def ours(case):
            out = case.call(
                fused_linear_distillation,
                objective=Objective("jsd", 0.3, cross_entropy=0.1, divergence_clip=limit),
                reduction=reduction, workspace=workspace, backend=backend,
            )  # fmt: skip
            assert out.divergence.max() > limit, "statistics are not clipped"
            return {"loss": out.loss.mean(), "divergence": out.divergence}, out.loss.mean()

        check_against_torch(case64, plain, ours)

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("workspace", ["auto", 4 * 2 * 57 * 3])
    def test_importance_clip(self, reduction, workspace, backend):
        case64 = make_case(23, 9, 57, bias=True, seed=32)
        base = Objective("forward_kl", policy_gradient=0.5)
        own = oracle(case64, base)[2]["student_logprob"]
        old = (own + torch.linspace(-2, 2, 23, dtype=torch.float64)).float()
        assert 5 < ((own - old).exp() > 2.0).sum() < 18, "some tokens are clipped and some are not"

        def terms(case):
            loss, _, extra = oracle(case, base)
            return loss * (extra["student_logprob"] - old).exp().clamp(max=2.0)

        def plain(case):
            loss = terms(case).mean()
            return {"loss": loss}, loss

        def ours(case):
            out = case.call(
                fused_linear_distillation,
                objective=Objective("forward_kl", policy_gradient=0.5, importance_clip=2.0),
                old_logprobs=old, reduction=reduction, workspace=workspace, backend=backend,
            )  # fmt: skip
            return {"loss": out.loss.mean()}, out.loss.mean()

        check_against_torch(case64, plain, ours, loss_size=float(terms(case64).abs().mean()))


def test_per_step_mask(backend):
    """A step is active when the mean advantage of its existing tokens passes."""
    case = make_case(12, 8, 31, seed=33).cast(torch.float32)
    steps = torch.tensor([[0, 0, 0, 2, 2, -1], [0, 0, 5, 5, 5, 9]])
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 1] = False

    def call(**options):
        return fused_linear_distillation(
            case.student_hidden.view(2, 6, 8), case.teacher_hidden.view(2, 6, 8), case.weight,
            case.targets.view(2, 6), mask=mask, backend=backend, **options,
        )  # fmt: skip

    advantage = call().advantage
    expected = torch.zeros(2, 6, dtype=torch.bool)
    for row in range(2):
        for step in (0, 2, 5):
            there = (steps[row] == step) & mask[row]
            if there.any():
                expected[row, there] = advantage[row, there].mean() < -0.2
    assert 0 < expected.sum() < 10
    gate = AdvantageMask(0.2, "negative", per_step=True)
    out = call(advantage_mask=gate, step_ids=steps)
    assert torch.equal(out.active, expected)


class TestReduction:
    @pytest.mark.parametrize(
        ("reduction", "normalizer", "plain_reduction"),
        [
            ("none", None, lambda tokens, mask: tokens),
            ("sum", None, lambda tokens, mask: tokens.sum()),
            ("mean", None, lambda tokens, mask: tokens.sum() / mask.sum()),
            ("mean", 5, lambda tokens, mask: tokens.sum() / 5),
            ("mean", torch.tensor(5.0), lambda tokens, mask: tokens.sum() / 5),
            (
                "sequence_mean",
                None,
                lambda tokens, mask: (tokens.sum(1) / mask.sum(1).clamp(min=1)).sum() / 3,
            ),
            (
                "sequence_mean",
                12,
                lambda tokens, mask: (tokens.sum(1) / mask.sum(1).clamp(min=1)).sum() / 12,
            ),
        ],
    )
    def test_all_reductions(self, reduction, normalizer, plain_reduction, backend):
        case64 = make_case(12, 8, 31)
        mask = torch.tensor([1, 1, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.bool).view(3, 4)
        weight = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))

        def plain(case):
            loss = oracle(case, Objective("forward_kl"))[0].view(3, 4) * weight * mask
            loss = plain_reduction(loss, mask)
            return {"loss": loss}, loss.sum()

        def ours(case):
            loss = fused_linear_distillation(
                case.student_hidden.view(3, 4, 8),
                case.teacher_hidden.view(3, 4, 8),
                case.weight,
                case.targets.view(3, 4),
                mask=mask,
                token_weight=weight,
                reduction=reduction,
                normalizer=normalizer,
                backend=backend,
            ).loss
            return {"loss": loss}, loss.sum()

        check_against_torch(case64, plain, ours)

    @pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
    def test_any_upstream_gradient_of_per_token_losses(self, objective, backend):
        case64 = make_case(10, 9, 57, bias=True, seed=12)
        generator = torch.Generator().manual_seed(0)
        upstream, upstream_divergence = torch.randn(2, 10, generator=generator)
        upstream[3] = 0
        upstream_divergence[3] = 0

        def total(loss, divergence):
            result = (loss * upstream).sum()
            if objective.divergence != "none":
                result = result + (divergence * upstream_divergence).sum()
            return {}, result

        def plain(case):
            loss, divergence, _ = oracle(case, objective)
            return total(loss, divergence)

        def ours(case):
            out = case.call(
                fused_linear_distillation, objective=objective, reduction="none", backend=backend
            )
            return total(out.loss, out.divergence)

        check_against_torch(case64, plain, ours)

    def test_accumulated_chunks_equal_the_whole_batch(self, backend):
        case64 = make_case(12, 8, 31)

        def plain(case):
            return {}, oracle(case, Objective("forward_kl"))[0].mean()

        def ours(case):
            losses = [
                fused_linear_distillation(
                    case.student_hidden[chunk],
                    case.teacher_hidden[chunk],
                    case.weight,
                    case.targets[chunk],
                    normalizer=12,
                    backend=backend,
                ).loss
                for chunk in (slice(0, 5), slice(5, 12))
            ]
            return {}, losses[0] + losses[1]

        check_against_torch(case64, plain, ours)


class TestAutograd:
    def test_scaled_loss_scales_gradients(self, backend):
        case = make_case(5, 8, 31).cast(torch.float32)
        leaves = case.leaves()
        loss = case.call(fused_linear_distillation, backend=backend).loss
        once = torch.autograd.grad(loss, leaves, retain_graph=True)
        thrice = torch.autograd.grad(3.0 * loss, leaves)
        assert not any(gradient.requires_grad for gradient in (*once, *thrice))
        again = case.call(fused_linear_distillation, backend=backend).loss
        assert not any(g.requires_grad for g in torch.autograd.grad(again, leaves))
        for a, b in zip(once, thrice, strict=True):
            torch.testing.assert_close(3.0 * a, b)  # 1.3e-6: one product by 3, rounded by 6e-8

    def test_retained_graph_gives_the_same_gradient_again(self, backend):
        """The gradient made in the forward pass must survive being accumulated into."""
        case = make_case(5, 8, 31).cast(torch.float32)
        case.leaves()
        loss = case.call(fused_linear_distillation, backend=backend).loss
        loss.backward(retain_graph=True)
        first = case.weight.grad.clone()
        loss.backward(retain_graph=True)
        loss.backward()
        torch.testing.assert_close(case.weight.grad, 3 * first)  # two sums, each rounded by 6e-8

    def test_used_twice_in_one_graph(self, backend):
        case = make_case(5, 8, 31).cast(torch.float32)
        case.leaves()
        one = torch.autograd.grad(
            case.call(fused_linear_distillation, backend=backend).loss, case.weight
        )[0]
        two = case.call(fused_linear_distillation, backend=backend).loss + (
            2 * case.call(fused_linear_distillation, backend=backend).loss
        )
        # Three calls of one shape; a product and a sum are rounded by 6e-8.
        torch.testing.assert_close(torch.autograd.grad(two, case.weight)[0], 3 * one)

    def test_nothing_flows_to_the_teacher(self, backend):
        case = make_case(5, 8, 31, teacher_hidden=9).cast(torch.float32)
        case.leaves()
        case.teacher_hidden.requires_grad_()
        case.teacher_weight.requires_grad_()
        case.call(fused_linear_distillation, backend=backend).loss.backward()
        assert case.teacher_hidden.grad is None
        assert case.teacher_weight.grad is None

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_frozen_head_gets_no_gradient(self, reduction, backend):
        case64 = make_case(5, 8, 31, bias=True)
        torchs, exact = plain_results(
            case64, lambda case: ({}, oracle(case, Objective("forward_kl"))[0].mean())
        )
        case = case64.cast(torch.float32)
        case.student_hidden.requires_grad_()
        loss = case.call(fused_linear_distillation, reduction=reduction, backend=backend).loss
        (loss.sum() / (5 if reduction == "none" else 1)).backward()
        assert case.weight.grad is None
        name = "d student_hidden"
        assert_no_worse_than_torch(name, case.student_hidden.grad, torchs[name], exact[name])

    def test_only_the_loss_carries_a_gradient(self, backend):
        case = make_case(5, 8, 31).cast(torch.float32)
        case.leaves()
        out = case.call(fused_linear_distillation, backend=backend)
        assert out.loss.requires_grad
        for name in (*STATISTICS, "active"):
            assert not getattr(out, name).requires_grad
        out = case.call(fused_linear_distillation, reduction="none", backend=backend)
        assert out.divergence.requires_grad
        for name in (*STATISTICS[1:], "active"):
            assert not getattr(out, name).requires_grad

    def test_no_grad_gives_the_same_values(self, backend):
        case = make_case(5, 8, 31).cast(torch.float32)
        case.leaves()
        expected = case.call(fused_linear_distillation, backend=backend)
        with torch.no_grad():
            out = case.call(fused_linear_distillation, backend=backend)
        assert not out.loss.requires_grad
        assert torch.equal(out.loss, expected.loss)

    def test_double_backward_is_refused(self, backend):
        case = make_case(5, 8, 31).cast(torch.float32)
        case.leaves()
        loss = case.call(fused_linear_distillation, backend=backend).loss
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(loss, case.weight, create_graph=True)


def test_module_is_the_function(backend):
    case = make_case(5, 8, 31).cast(torch.float32)
    options = {"objective": Objective("jsd", 0.2), "temperature": 0.9, "reduction": "sum"}
    module = FusedLinearDistillationLoss(**options, backend=backend)
    out = module(case.student_hidden, case.teacher_hidden, case.weight, case.targets)
    expected = case.call(fused_linear_distillation, **options, backend=backend)
    assert torch.equal(out.loss, expected.loss)


def test_without_targets(backend):
    case = make_case(5, 8, 31).cast(torch.float32)
    out = fused_linear_distillation(
        case.student_hidden, case.teacher_hidden, case.weight, backend=backend
    )
    expected = case.call(fused_linear_distillation, backend=backend)
    assert torch.equal(out.loss, expected.loss)
    assert out.student_logprob is None
    assert out.advantage is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs(dtype, backend):
    case64 = make_case(9, 16, 77, bias=True, seed=13)
    upstream = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))

    def values(logprobs, entropy):
        total = (logprobs * upstream[0] + entropy * upstream[1]).sum()
        return {"logprobs": logprobs, "entropy": entropy}, total

    def plain(case):
        scores = case.student_hidden @ case.weight.T + case.bias
        logprobs = torch.log_softmax(scores / 0.8, dim=-1)
        picked = logprobs.gather(1, case.targets[:, None])[:, 0]
        return values(picked, -(logprobs.exp() * logprobs).sum(-1))

    def ours(case):
        out = fused_linear_logprobs(
            case.student_hidden, case.weight, case.targets,
            bias=case.bias, temperature=0.8, backend=backend,
        )  # fmt: skip
        assert out.logprobs.dtype == torch.float32
        return values(out.logprobs, out.entropy)

    check_against_torch(case64, plain, ours, dtype=dtype)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_from_logits(objective, reduction, backend):
    case64 = make_case(9, 16, 77, seed=14, temperature=0.8)
    # A head that leaves what it gets, so that the hidden states are logits.
    logits = Case(
        *((hidden @ case64.weight.T).float().double()
          for hidden in (case64.student_hidden, case64.teacher_hidden)),
        torch.eye(77, dtype=torch.float64), case64.targets, options=case64.options,
    )  # fmt: skip

    def plain(case):
        loss, divergence, _ = oracle(case, objective)
        return {"loss": loss.mean(), "divergence": divergence}, loss.mean()

    torchs, exact = plain_results(logits, plain)
    student = logits.student_hidden.float()
    before = student.clone()
    student.requires_grad_()
    out = distillation_from_logits(
        student, logits.teacher_hidden.float(), case64.targets,
        objective=objective, temperature=0.8, reduction=reduction, backend=backend,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(out.loss.mean(), student)
    found = {"loss": out.loss.mean(), "divergence": out.divergence, "d student_hidden": gradient}
    assert_results(found, *({name: given[name] for name in found} for given in (torchs, exact)))
    assert torch.equal(student.detach(), before), "the caller's logits are not overwritten"


def test_same_bits_from_run_to_run(backend):
    case = make_case(50, 32, 999, seed=15).cast(torch.float32)
    leaves = case.leaves()
    runs = [
        torch.autograd.grad(case.call(fused_linear_distillation, backend=backend).loss, leaves)
        for _ in range(3)
    ]
    for again in runs[1:]:
        for a, b in zip(runs[0], again, strict=True):
            assert torch.equal(a, b)
