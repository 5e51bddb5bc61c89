"""The public functions: values, gradients, reductions, masks, edge cases, on every backend."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DIVERGENCES,
    assert_no_worse_than_torch,
    make_case,
    materialised_losses,
)

from selfdistill_kernels import (
    AdvantageMask,
    FusedLinearDistillationLoss,
    Objective,
    distillation_from_logits,
    fused_linear_distillation,
    fused_linear_logprobs,
)
from selfdistill_kernels.backends import gemm, native
from selfdistill_kernels.plan import copied_bytes

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
    leaves64 = case64.leaves()
    loss64, divergence64, extra64 = oracle(case64, objective)
    grads64 = torch.autograd.grad(loss64.mean(), leaves64)
    plain = case64.cast(torch.float32)
    plain_leaves = plain.leaves()
    plain_loss, plain_divergence, plain_extra = oracle(plain, objective)
    plain_grads = torch.autograd.grad(plain_loss.mean(), plain_leaves)

    case = case64.cast(dtype)
    leaves = case.leaves()
    out = case.call(fused_linear_distillation, objective=objective, backend=backend, **kwargs)
    grads = torch.autograd.grad(out.loss, leaves)
    assert_no_worse_than_torch("loss", out.loss, plain_loss.mean(), loss64.mean().detach())
    exact = {"divergence": divergence64.detach(), **extra64}
    torchs = {"divergence": plain_divergence.detach(), **plain_extra}
    for name in STATISTICS:
        value = getattr(out, name)
        assert value.dtype == torch.float32
        # Sums of logits of order 1 and more cannot be better than their roundings.
        assert_no_worse_than_torch(name, value, torchs[name], exact[name], floor=1.0)
    for name, ours, torchs_, exact_ in zip(
        ("student_hidden", "weight", "bias"), grads, plain_grads, grads64, strict=False
    ):
        assert ours.dtype == dtype
        rounded = torchs_.to(dtype)
        assert_no_worse_than_torch(f"d {name}", ours, rounded, exact_, roundings=roundings)


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
        for module in (gemm, native):
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
        mean = math.exp(sum(logs) / max(len(logs), 1))
        assert mean <= 1.1, f"{name}: {mean:.2f} times the error of plain torch"


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
    leaves64 = case64.leaves()
    loss64 = (oracle(case64, objective)[0] * mask).sum() / max(int(mask.sum()), 1)
    grads64 = torch.autograd.grad(loss64, leaves64)
    case = case64.cast(torch.float32)
    leaves = case.leaves()
    out = case.call(
        fused_linear_distillation,
        objective=objective,
        mask=mask,
        workspace=(4 * vocabulary + copied_bytes(5, 2)) * rows,
        backend=backend,
    )
    grads = torch.autograd.grad(out.loss, leaves)
    torch.testing.assert_close(out.loss.double(), loss64, rtol=2e-4, atol=2e-5)
    for ours, exact in zip(grads, grads64, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-3, atol=2e-5)


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
        case = make_case(6, 8, 31, bias=True).cast(torch.float32)
        mask = torch.tensor([True, False, True, True, False, True])
        kept = make_case(6, 8, 31, bias=True).cast(torch.float32)
        kept.student_hidden = kept.student_hidden[mask]
        kept.teacher_hidden = kept.teacher_hidden[mask]
        kept.targets = kept.targets[mask]
        expected_leaves = kept.leaves()
        expected = kept.call(fused_linear_distillation, backend=backend)
        expected_grads = torch.autograd.grad(expected.loss, expected_leaves)

        case.student_hidden[~mask] = float("nan")
        case.teacher_hidden[~mask] = float("nan")
        case.targets[~mask] = 10**9
        leaves = case.leaves()
        out = case.call(fused_linear_distillation, mask=mask, backend=backend)
        grads = torch.autograd.grad(out.loss, leaves)
        torch.testing.assert_close(out.loss, expected.loss)
        torch.testing.assert_close(grads[0][mask], expected_grads[0])
        assert not grads[0][~mask].any()
        torch.testing.assert_close(grads[1], expected_grads[1])
        torch.testing.assert_close(grads[2], expected_grads[2])
        assert out.active.tolist() == mask.tolist()
        for name in STATISTICS:
            assert not getattr(out, name)[~mask].any()

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
        leaves64 = case64.leaves()
        objective = Objective("reverse_kl", cross_entropy=0.1)
        loss64, divergence64, extra64 = oracle(case64, objective)
        size = extra64["advantage"]
        keep = {"any": size.abs(), "negative": -size, "positive": size}[advantage_mask.sign]
        keep = keep > advantage_mask.threshold
        if advantage_mask.top_fraction is not None:
            count = -(-int(23 * advantage_mask.top_fraction * 1000) // 1000)
            ranked = torch.where(keep, size.abs(), -1.0).argsort(descending=True)[:count]
            keep &= torch.zeros(23, dtype=torch.bool).index_fill(0, ranked, True)
        expected = torch.autograd.grad((loss64 * keep).sum() / 23, leaves64)

        case = case64.cast(torch.float32)
        leaves = case.leaves()
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
        torch.testing.assert_close(loss.double(), (loss64 * keep).sum() / 23, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out.divergence.double(), divergence64, rtol=1e-4, atol=1e-5)
        for ours, exact in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-6)


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
        leaves64 = case64.leaves()
        base = Objective("jsd", 0.3, cross_entropy=0.1)
        loss64, divergence64, _ = oracle(case64, base)
        limit = float(divergence64.detach().median()) + 1e-3
        loss64 = loss64 - divergence64 + divergence64.clamp(max=limit)
        expected = torch.autograd.grad(loss64.mean(), leaves64)
        case = case64.cast(torch.float32)
        leaves = case.leaves()
        out = case.call(
            fused_linear_distillation,
            objective=Objective("jsd", 0.3, cross_entropy=0.1, divergence_clip=limit),
            reduction=reduction, workspace=workspace, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(out.loss.mean().double(), loss64.mean(), rtol=1e-5, atol=1e-6)
        assert out.divergence.max() > limit, "statistics are not clipped"
        grads = torch.autograd.grad(out.loss.mean(), leaves)
        for ours, exact in zip(grads, expected, strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    @pytest.mark.parametrize("workspace", ["auto", 4 * 2 * 57 * 3])
    def test_importance_clip(self, reduction, workspace, backend):
        case64 = make_case(23, 9, 57, bias=True, seed=32)
        leaves64 = case64.leaves()
        loss64, _, extra64 = oracle(case64, Objective("forward_kl", policy_gradient=0.5))
        old = extra64["student_logprob"] + torch.linspace(-2, 2, 23, dtype=torch.float64)
        ratio = (extra64["student_logprob"] - old).exp().clamp(max=2.0)
        assert 5 < (ratio == 2.0).sum() < 18, "some tokens are clipped and some are not"
        expected = torch.autograd.grad((loss64 * ratio).mean(), leaves64)
        case = case64.cast(torch.float32)
        leaves = case.leaves()
        out = case.call(
            fused_linear_distillation,
            objective=Objective("forward_kl", policy_gradient=0.5, importance_clip=2.0),
            old_logprobs=old.float(), reduction=reduction, workspace=workspace, backend=backend,
        )  # fmt: skip
        grads = torch.autograd.grad(out.loss.mean(), leaves)
        for ours, exact in zip(grads, expected, strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-6)


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
    def test_all_reductions_against_each_other(self, backend):
        case = make_case(12, 8, 31).cast(torch.float32)
        mask = torch.tensor([1, 1, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1], dtype=torch.bool).view(3, 4)
        weight = torch.rand(3, 4)

        def call(reduction, **options):
            return fused_linear_distillation(
                case.student_hidden.view(3, 4, 8),
                case.teacher_hidden.view(3, 4, 8),
                case.weight,
                case.targets.view(3, 4),
                mask=mask,
                token_weight=weight,
                reduction=reduction,
                backend=backend,
                **options,
            )

        tokens = call("none").loss
        assert tokens.shape == (3, 4)
        torch.testing.assert_close(tokens, call("none").divergence * weight * mask)
        torch.testing.assert_close(call("sum").loss, tokens.sum())
        torch.testing.assert_close(call("mean").loss, tokens.sum() / mask.sum())
        torch.testing.assert_close(call("mean", normalizer=5).loss, tokens.sum() / 5)
        torch.testing.assert_close(
            call("mean", normalizer=torch.tensor(5.0)).loss, tokens.sum() / 5
        )
        per_sequence = tokens.sum(1) / mask.sum(1).clamp(min=1)
        torch.testing.assert_close(call("sequence_mean").loss, per_sequence.sum() / 3)
        torch.testing.assert_close(
            call("sequence_mean", normalizer=12).loss, per_sequence.sum() / 12
        )

    @pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
    def test_any_upstream_gradient_of_per_token_losses(self, objective, backend):
        case64 = make_case(10, 9, 57, bias=True, seed=12)
        upstream, upstream_divergence = torch.randn(2, 10, dtype=torch.float64)
        upstream[3] = 0
        upstream_divergence[3] = 0
        leaves64 = case64.leaves()
        loss64, divergence64, _ = oracle(case64, objective)
        total = (loss64 * upstream).sum()
        if objective.divergence != "none":
            total = total + (divergence64 * upstream_divergence).sum()
        expected = torch.autograd.grad(total, leaves64)
        case = case64.cast(torch.float32)
        leaves = case.leaves()
        out = case.call(
            fused_linear_distillation, objective=objective, reduction="none", backend=backend
        )
        total = (out.loss * upstream).sum()
        if objective.divergence != "none":
            total = total + (out.divergence * upstream_divergence).sum()
        for ours, exact in zip(torch.autograd.grad(total, leaves), expected, strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=2e-4, atol=1e-5)

    def test_accumulated_chunks_equal_the_whole_batch(self, backend):
        case = make_case(12, 8, 31).cast(torch.float32)
        leaves = case.leaves()
        whole = torch.autograd.grad(
            case.call(fused_linear_distillation, backend=backend).loss, leaves
        )
        for chunk in (slice(0, 5), slice(5, 12)):
            fused_linear_distillation(
                case.student_hidden[chunk],
                case.teacher_hidden[chunk],
                case.weight,
                case.targets[chunk],
                normalizer=12,
                backend=backend,
            ).loss.backward()
        torch.testing.assert_close(case.student_hidden.grad, whole[0])
        torch.testing.assert_close(case.weight.grad, whole[1])


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
            torch.testing.assert_close(3.0 * a, b)

    def test_retained_graph_gives_the_same_gradient_again(self, backend):
        """The gradient made in the forward pass must survive being accumulated into."""
        case = make_case(5, 8, 31).cast(torch.float32)
        case.leaves()
        loss = case.call(fused_linear_distillation, backend=backend).loss
        loss.backward(retain_graph=True)
        first = case.weight.grad.clone()
        loss.backward(retain_graph=True)
        loss.backward()
        torch.testing.assert_close(case.weight.grad, 3 * first)

    def test_used_twice_in_one_graph(self, backend):
        case = make_case(5, 8, 31).cast(torch.float32)
        case.leaves()
        one = torch.autograd.grad(
            case.call(fused_linear_distillation, backend=backend).loss, case.weight
        )[0]
        two = case.call(fused_linear_distillation, backend=backend).loss + (
            2 * case.call(fused_linear_distillation, backend=backend).loss
        )
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
        case = make_case(5, 8, 31, bias=True).cast(torch.float32)
        trained = make_case(5, 8, 31, bias=True).cast(torch.float32)
        trained.leaves()
        trained.call(fused_linear_distillation, backend=backend).loss.backward()
        case.student_hidden.requires_grad_()
        loss = case.call(fused_linear_distillation, reduction=reduction, backend=backend).loss
        (loss.sum() / (5 if reduction == "none" else 1)).backward()
        assert case.weight.grad is None
        torch.testing.assert_close(case.student_hidden.grad, trained.student_hidden.grad)

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
    upstream = torch.randn(2, 9, dtype=torch.float64)
    leaves64 = case64.leaves()
    scores = case64.student_hidden @ case64.weight.T + case64.bias
    logprobs = torch.log_softmax(scores / 0.8, dim=-1)
    picked = logprobs.gather(1, case64.targets[:, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    expected = torch.autograd.grad((picked * upstream[0] + entropy * upstream[1]).sum(), leaves64)
    case = case64.cast(dtype)
    leaves = case.leaves()
    out = fused_linear_logprobs(
        case.student_hidden, case.weight, case.targets,
        bias=case.bias, temperature=0.8, backend=backend,
    )  # fmt: skip
    assert out.logprobs.dtype == torch.float32
    torch.testing.assert_close(out.logprobs.double(), picked.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropy.double(), entropy.detach(), rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(
        (out.logprobs * upstream[0] + out.entropy * upstream[1]).sum(), leaves
    )
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for ours, exact in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_from_logits(objective, reduction, backend):
    case64 = make_case(9, 16, 77, seed=14, temperature=0.8)
    student = (case64.student_hidden @ case64.weight.T).float()
    teacher = (case64.teacher_hidden @ case64.weight.T).float()
    case64.student_hidden, case64.teacher_hidden = student.double(), teacher.double()
    case64.weight = torch.eye(77, dtype=torch.float64)
    case64.student_hidden.requires_grad_()
    loss64 = oracle(case64, objective)[0]
    (expected,) = torch.autograd.grad(loss64.mean(), case64.student_hidden)
    before = student.clone()
    student.requires_grad_()
    out = distillation_from_logits(
        student, teacher, case64.targets,
        objective=objective, temperature=0.8, reduction=reduction, backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(
        out.loss.mean().double(), loss64.mean().detach(), rtol=1e-5, atol=1e-6
    )
    (gradient,) = torch.autograd.grad(out.loss.mean(), student)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)
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
