"""gradient_tolerance: the error that a gradient may have, is said to have, and has."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tolerance_cases import (
    HIDDEN,
    KINDS,
    OBJECTIVES,
    RISK,
    TOKENS,
    VOCABULARY,
    assert_error_is_reported,
    gradients,
    loss_of,
    problem,
    threads,
)
from torch import Tensor

from selfdistill_kernels import (
    AdvantageMask,
    FusedLinearDistillationLoss,
    GradientTolerance,
    Objective,
)
from selfdistill_kernels.backends.dispatch import decide
from selfdistill_kernels.backends.registry import found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_error_is_what_is_said(objective: str, kind: str) -> None:
    # Under a cap no centre makes the head's rows smaller: more entries are needed.
    tolerance = 0.05 if kind == "capped" else 0.02
    out = assert_error_is_reported(
        problem(),
        GradientTolerance(tolerance, bound_risk=RISK),
        objective=OBJECTIVES[objective],
        backend="native",
        **KINDS[kind],
    )
    assert out.gradient_error is not None
    assert out.gradient_error.hidden_bound is not None


@pytest.mark.parametrize("objective", ["reverse_kl", "all"])
def test_the_reference_rounds_too(objective: str) -> None:
    tolerance = GradientTolerance(0.02, bound_risk=RISK)
    assert_error_is_reported(
        problem(), tolerance, objective=OBJECTIVES[objective], backend="reference"
    )


def test_bounds_of_both_backends_agree() -> None:
    """One is summed in float32 from logits of a product, the other in float64."""
    tensors = problem(tokens=8)
    bounds = []
    for backend in ("native", "reference"):
        tolerance = GradientTolerance(0.02, bound_risk=RISK)
        _, out = gradients(tensors, backend=backend, gradient_tolerance=tolerance)
        assert out.gradient_error is not None
        assert out.gradient_error.hidden_bound is not None
        assert out.gradient_error.weight_bound is not None
        bounds.append([*out.gradient_error.hidden_bound, out.gradient_error.weight_bound])
    for native, reference in zip(*bounds, strict=True):
        # Thresholds from a sample are not those from the whole row.
        assert 0.6 < native / reference < 1.6


def test_a_smaller_risk_has_wider_bounds_and_the_same_gradient(backend: str) -> None:
    tensors = problem(tokens=6)
    plain, _ = gradients(tensors, backend=backend, gradient_tolerance=0.02)
    before = torch.zeros(6)
    for risk in (0.5, 1e-3, 1e-9):
        tolerance = GradientTolerance(0.02, bound_risk=risk)
        made, out = gradients(tensors, backend=backend, gradient_tolerance=tolerance)
        assert all(torch.equal(made[name], plain[name]) for name in plain)
        assert out.gradient_error is not None
        bound = out.gradient_error.hidden_bound
        assert bound is not None
        assert (bound > before).all()
        before = bound


def test_without_a_risk_there_are_no_bounds() -> None:
    _, out = gradients(problem(tokens=4), gradient_tolerance=0.02)
    assert out.gradient_error is not None
    assert out.gradient_error.hidden_bound is None
    assert out.gradient_error.weight_bound is None


def test_a_bound_is_infinite_where_the_gradient_may_be_zero() -> None:
    from selfdistill_kernels.tolerance import relative_bound

    variance, step = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 0.0])
    made = torch.tensor([4.0, 1.0, 0.0])
    bound = relative_bound(variance, step, made, log_risk=2.0)  # an error of 2 at most
    assert bound.tolist() == [1.0, math.inf, 0.0]


@pytest.mark.parametrize("wrong", [0.0, 1.0, -0.1, math.nan])
def test_risks_that_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="gradient_tolerance: bound_risk"):
        GradientTolerance(0.02, bound_risk=wrong)
    with pytest.raises(TypeError, match="gradient_tolerance: bound_risk"):
        GradientTolerance(0.02, bound_risk=True)


def test_both_backends_draw_the_same_lots() -> None:
    tensors = problem()
    exact, _ = gradients(tensors, backend="reference")
    errors = []
    for backend in ("native", "reference"):
        made, _ = gradients(tensors, backend=backend, gradient_tolerance=0.02)
        errors.append((made["weight"] - exact["weight"]).flatten())
    # Thresholds differ a little, and lots of their own would have a correlation near 0.
    assert torch.corrcoef(torch.stack(errors))[0, 1] > 0.5


def test_gradients_are_right_on_average(backend: str) -> None:
    tensors = problem(tokens=12, vocabulary=1009)
    exact, _ = gradients(tensors, backend="reference")
    one, mean = [], {name: torch.zeros_like(g) for name, g in exact.items()}
    seeds = 64
    for seed in range(seeds):
        made, _ = gradients(
            tensors, backend=backend, gradient_tolerance=GradientTolerance(0.05, seed)
        )
        one.append({name: (made[name] - exact[name]).norm() for name in exact})
        for name in exact:
            mean[name] += made[name] / seeds
    for name in exact:
        typical = torch.stack([error[name] for error in one]).square().mean().sqrt()
        left = (mean[name] - exact[name]).norm()
        assert left <= 1.3 * typical / math.sqrt(seeds), name
        assert left >= 0.7 * typical / math.sqrt(seeds), name  # the seeds are not all the same


def test_copies_of_a_token_count_in_the_error_of_the_head(backend: str) -> None:
    """They draw the same lots, so that their errors add up."""
    tensors = problem(tokens=6)
    for name in ("student_hidden", "teacher_hidden", "targets"):
        tensors[name] = tensors[name].detach().repeat_interleave(16, 0)
    tensors["student_hidden"].requires_grad_()
    exact, _ = gradients(tensors, backend="reference")
    measured, said = [], []
    for seed in range(8):
        made, out = gradients(
            tensors, backend=backend, gradient_tolerance=GradientTolerance(0.02, seed)
        )
        assert out.gradient_error is not None
        measured.append((made["weight"] - exact["weight"]).norm() / exact["weight"].norm())
        said.append(out.gradient_error.weight.double())
    ratio = torch.stack(measured).square().mean().sqrt() / torch.stack(said).mean()
    assert 1 / 1.3 <= ratio <= 1.3


def test_float64_is_rounded_too() -> None:
    tensors = {name: t.detach() for name, t in problem(tokens=8).items()}
    for name in ("student_hidden", "teacher_hidden", "weight"):
        tensors[name] = tensors[name].double()
    for name in ("student_hidden", "weight"):
        tensors[name].requires_grad_()
    assert_error_is_reported(tensors, 0.02)


def test_weights_beyond_float32_leave_the_gradient_exact() -> None:
    tensors = problem(tokens=8)
    weight = torch.full((8,), 1e22)
    exact, _ = gradients(tensors, backend="native", token_weight=weight)
    made, out = gradients(tensors, backend="native", token_weight=weight, gradient_tolerance=0.02)
    assert out.gradient_error is not None
    for name in exact:
        assert (made[name] - exact[name]).norm() <= 1e-5 * exact[name].norm(), name
    assert (out.gradient_error.hidden == 0).all()


def test_what_is_not_made_has_no_error(backend: str) -> None:
    tensors = problem(tokens=8)
    frozen = {name: tensor.detach() for name, tensor in tensors.items()}
    errors = loss_of(frozen, backend=backend, gradient_tolerance=0.02).gradient_error
    assert errors is not None
    assert errors.hidden.isnan().all()
    assert errors.weight.isnan()
    frozen["weight"].requires_grad_()
    _, out = gradients(frozen, backend=backend, gradient_tolerance=0.02)
    assert out.gradient_error is not None
    assert out.gradient_error.hidden.isnan().all()
    assert out.gradient_error.weight > 0


def test_equal_models_have_no_gradient(backend: str) -> None:
    tensors = problem()
    tensors["teacher_hidden"] = tensors["student_hidden"].detach()
    for objective in ("forward_kl", "reverse_kl", "jsd"):
        made, out = gradients(
            tensors, backend=backend, objective=objective, gradient_tolerance="rounding"
        )
        assert out.gradient_error is not None
        assert out.loss == 0
        assert all((gradient == 0).all() for gradient in made.values())
        assert (out.gradient_error.hidden == 0).all()
        assert out.gradient_error.weight == 0


def test_micro_batches_and_threads_draw_the_same_lots() -> None:
    tensors, tolerance = problem(tokens=48), 0.02
    whole, _ = gradients(tensors, backend="native", gradient_tolerance=tolerance, reduction="sum")
    exact, _ = gradients(tensors, backend="native", reduction="sum")
    error = (whole["student_hidden"] - exact["student_hidden"]).norm()
    with threads(2):
        again, _ = gradients(
            tensors, backend="native", gradient_tolerance=tolerance, reduction="sum"
        )
    parts = []
    for rows in (slice(0, 7), slice(7, 48)):
        part = {
            name: tensor if name == "weight" else tensor.detach()[rows].clone()
            for name, tensor in tensors.items()
        }
        part["student_hidden"].requires_grad_()
        made, _ = gradients(part, backend="native", gradient_tolerance=tolerance, reduction="sum")
        parts.append(made["student_hidden"])
    # A product has other last bits in another shape; other lots would be 1.4 times the error.
    assert (torch.cat(parts) - whole["student_hidden"]).norm() < 0.1 * error
    assert (again["student_hidden"] - whole["student_hidden"]).norm() < 0.1 * error


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_rows_have_the_same_bits_with_any_number_of_threads(softcap: float | None) -> None:
    from selfdistill_kernels.backends.interface import LinearInputs
    from selfdistill_kernels.backends.native.rounding import Rounder
    from selfdistill_kernels.backends.native.rows import RowKernels, Tile
    from selfdistill_kernels.logits import LogitTransform
    from selfdistill_kernels.tolerance import Rounding

    tensors = {name: tensor.detach() for name, tensor in problem(tokens=33).items()}
    inputs = LinearInputs(
        tensors["student_hidden"], tensors["teacher_hidden"], tensors["weight"], None, None, None,
        tensors["targets"], None, LogitTransform(1.0, softcap, 1.0),
    )  # fmt: skip
    kernels = RowKernels(inputs, Objective.of("forward_kl"), 0)
    scores = torch.empty(2 * 33 * VOCABULARY)
    kernels.tile(inputs.tokens, 0, VOCABULARY, scores, with_teacher=True)
    weights = torch.tensor([1.0, 0.0, 0.0]).repeat(33, 1)
    made = []
    for count in (1, 2, 5):
        with threads(count):
            tile = kernels.tile(
                inputs.tokens, 0, VOCABULARY, torch.empty_like(scores), with_teacher=True
            )
            assert tile.teacher is not None
            both = scores.view(2 * 33, VOCABULARY).clone()
            tile.student.copy_(both[:33])
            tile.teacher.copy_(both[33:])
            rounding = Rounding.of(GradientTolerance(0.05), tensors["student_hidden"])
            rounder = Rounder(inputs, rounding)
            statistics = kernels.statistics(tile)

            def terms(_: Tile, rows: slice, found: Tensor = statistics) -> tuple[Tensor, Tensor]:
                return found[rows], weights[rows]

            sparse = rounder.round(kernels, tile, terms)
            assert not sparse.is_dense.all()
            weight = torch.empty(VOCABULARY, HIDDEN)
            rounder.weight_gradient(sparse, out=weight, add=None, bias=None)
            made.append((sparse.starts, rounder.hidden_gradient(sparse), weight))
    for other in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], other, strict=True))


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none"},
        {"reduction": "none", "workspace": 35 * (8 * VOCABULARY + 16 * HIDDEN)},
        {"advantage_mask": AdvantageMask(top_fraction=0.5)},
        {"advantage_mask": AdvantageMask(sign="negative")},
        {"workspace": 35 * (8 * VOCABULARY + 16 * HIDDEN)},
        {"objective": OBJECTIVES["clipped"]},
        {"bias": True, "reduction": "sum"},
    ],
    ids=["per token", "per token, tiles", "ranked", "gated", "tiles", "two visits", "bias"],
)
def test_every_path_to_a_gradient(options: dict[str, Any], trained: bool) -> None:
    tensors = problem(trained=trained)
    if "bias" in options:
        tensors["bias"] = torch.randn(VOCABULARY).requires_grad_(trained)
    upstream = None
    if options.get("reduction") == "none":
        upstream = torch.linspace(-1.0, 2.0, TOKENS)
        upstream[3] = 0.0
    assert_error_is_reported(tensors, 0.02, upstream=upstream, backend="native", **options)


def test_where_no_row_is_whole_the_gradient_is_exact() -> None:
    tensors, small = problem(), 60_000
    exact, _ = gradients(tensors, backend="native", workspace=small)
    made, out = gradients(tensors, backend="native", workspace=small, gradient_tolerance=0.02)
    assert out.gradient_error is not None
    assert all(torch.equal(made[name], exact[name]) for name in exact)
    assert (out.gradient_error.hidden == 0).all()
    assert out.gradient_error.weight == 0


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("flat", [[4], [1, 4, 5]], ids=["few", "more"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flat_rows_stay_exact(
    dtype: torch.dtype, flat: list[int], trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would need more entries than products are worth; for a few rows no library product
    goes through all of dW."""
    from selfdistill_kernels.backends.native.rounding import SparseTile

    left: list[int] = []
    found = vars(SparseTile)["is_dense"].fget

    def noted(tile: SparseTile) -> Tensor:
        left.append(int(found(tile).sum()))
        return found(tile)

    monkeypatch.setattr(SparseTile, "is_dense", property(noted))
    tensors = problem(dtype=dtype, trained=trained)
    tensors["bias"] = torch.linspace(-0.1, 0.1, VOCABULARY).to(dtype).requires_grad_()
    with torch.no_grad():
        tensors["student_hidden"][flat] *= 0.01
        tensors["teacher_hidden"][flat] = 0.02 * torch.randn(len(flat), HIDDEN).to(dtype)
    exact, _ = gradients(tensors, backend="native", bias=True)
    made, out = gradients(tensors, backend="native", bias=True, gradient_tolerance=0.01)
    assert left == [0 if len(flat) == 1 else len(flat)]
    assert out.gradient_error is not None
    error = out.gradient_error.hidden
    assert (error[flat] == 0).all()
    assert (error > 0).sum() > TOKENS // 2
    far = (made["student_hidden"] - exact["student_hidden"])[flat].norm()
    assert far <= 20 * torch.finfo(dtype).eps * exact["student_hidden"][flat].norm()
    rounding = 2 * torch.finfo(torch.bfloat16).eps if dtype == torch.bfloat16 else 0.0
    measured = (made["bias"] - exact["bias"]).norm() / exact["bias"].norm()
    assert measured <= 0.05 + rounding
    if trained:
        measured = (made["weight"] - exact["weight"]).norm() / exact["weight"].norm()
        assert measured <= 1.3 * out.gradient_error.weight + rounding


@pytest.mark.parametrize("trained", [True, False])
def test_bfloat16_heads(trained: bool) -> None:
    out = assert_error_is_reported(
        problem(dtype=torch.bfloat16, trained=trained),
        0.02,
        backend="native",
        rounding=torch.finfo(torch.bfloat16).eps,
    )
    assert out.gradient_error is not None
    assert (out.gradient_error.hidden > 0).sum() > TOKENS // 2


def test_a_smaller_tolerance_is_kept() -> None:
    errors = []
    for tolerance in (0.1, 0.03, 0.01):
        out = assert_error_is_reported(problem(), tolerance, backend="native")
        assert out.gradient_error is not None
        errors.append(float(out.gradient_error.hidden.square().mean().sqrt()))
        assert errors[-1] > 0.3 * tolerance
    assert errors == sorted(errors, reverse=True)


def test_what_is_not_finite_stays_in_its_token() -> None:
    tensors = problem()
    with torch.no_grad():
        tensors["student_hidden"][2] = math.nan
    made, out = gradients(tensors, backend="native", gradient_tolerance=0.02)
    exact, _ = gradients(tensors, backend="native")
    assert out.gradient_error is not None
    assert made["student_hidden"][2].isnan().all()
    others = [row for row in range(TOKENS) if row != 2]
    far = (made["student_hidden"] - exact["student_hidden"])[others].norm(dim=1)
    assert (far <= 0.1 * exact["student_hidden"][others].norm(dim=1)).all()


def test_banned_entries(backend: str) -> None:
    tensors = problem()
    bias = torch.zeros(VOCABULARY)
    bias[100:400] = -math.inf
    targets = tensors["targets"]
    targets[(targets >= 100) & (targets < 400)] = 0
    tensors["bias"] = bias
    made, _ = gradients(tensors, backend=backend, bias=True, gradient_tolerance=0.02)
    exact, _ = gradients(tensors, backend="reference", bias=True)
    assert (made["weight"][100:400] == 0).all()
    far = (made["student_hidden"] - exact["student_hidden"]).norm()
    assert far <= 0.04 * exact["student_hidden"].norm()


def test_errors_come_with_the_backward_pass() -> None:
    tensors = problem()
    out = loss_of(tensors, reduction="none", gradient_tolerance=0.02)
    assert out.gradient_error is not None
    assert out.gradient_error.hidden.isnan().all()
    out.loss.sum().backward()
    assert (out.gradient_error.hidden > 0).any()
    assert out.gradient_error.weight > 0


def test_the_module_takes_it() -> None:
    tensors = problem()
    module = FusedLinearDistillationLoss(gradient_tolerance=0.02)
    out = module(**tensors)
    assert out.gradient_error is not None
    assert (out.gradient_error.hidden > 0).any()
    with pytest.raises(ValueError, match="gradient_tolerance"):
        FusedLinearDistillationLoss(gradient_tolerance=2.0)


@pytest.mark.parametrize("wrong", [0.0, 1.0, -1e-3, math.nan, math.inf, "exact", "2e-3"])
def test_values_that_are_refused(wrong: float | str) -> None:
    with pytest.raises(ValueError, match="gradient_tolerance"):
        loss_of(problem(), gradient_tolerance=wrong)


def test_a_seed_has_64_bits() -> None:
    GradientTolerance(1e-2, seed=-(2**63))
    with pytest.raises(ValueError, match="seed: expected 64 bits, got 9223372036854775808"):
        GradientTolerance(1e-2, seed=2**63)


@pytest.mark.parametrize("wrong", [True, [1e-3]])
def test_types_that_are_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match="gradient_tolerance"):
        loss_of(problem(), gradient_tolerance=wrong)


def test_what_has_no_tolerance_says_so() -> None:
    tensors = problem()
    with pytest.raises(ValueError, match="gradient_tolerance: an objective with top_k"):
        loss_of(tensors, objective=Objective(top_k=4), gradient_tolerance=0.02)
    if decide("auto", device="cuda", dtype=torch.float32, found=found()).backend == "triton":
        with pytest.raises(ValueError, match="gradient_tolerance: backend 'triton'"):
            loss_of(
                {name: tensor.cuda() for name, tensor in tensors.items()}, gradient_tolerance=0.02
            )


def test_transforms_say_so() -> None:
    tensors = problem()

    def of(hidden: Tensor) -> Tensor:
        return loss_of({**tensors, "student_hidden": hidden}, gradient_tolerance=0.02).loss

    with pytest.raises(NotImplementedError, match="gradient_tolerance"):
        torch.func.grad(of)(tensors["student_hidden"].detach())
