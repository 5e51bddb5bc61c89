"""gradient_tolerance where rows of logits have no room: what one sweep keeps of them is enough."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tolerance_cases import (
    KINDS,
    OBJECTIVES,
    assert_error_is_reported,
    gradients,
    problem,
    threads,
)
from torch import Tensor

from selfdistill_kernels import AdvantageMask, GradientTolerance, Objective, fused_linear_logprobs
from selfdistill_kernels.backends.interface import LinearInputs
from selfdistill_kernels.backends.native import backend, one_sweep
from selfdistill_kernels.backends.native.candidates import CandidatePlan
from selfdistill_kernels.backends.native.rounding import Rounder, SparseTile
from selfdistill_kernels.backends.native.rows import RowKernels, Tile
from selfdistill_kernels.logits import LogitTransform
from selfdistill_kernels.tolerance import Rounding

# More columns than a row keeps, so that floors rise; tokens whose candidates have room together.
SIZES = {"tokens": 24, "hidden": 24, "vocabulary": 11003}
TOGETHER = 1_700_000
APART = 1_000_000  # of 15 tokens


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[CandidatePlan]:
    """Those that were used."""
    used: list[CandidatePlan] = []
    made = one_sweep.Candidates.__init__

    def noted(self: Any, kernels: Any, plan: CandidatePlan, *others: Any) -> None:
        used.append(plan)
        made(self, kernels, plan, *others)

    monkeypatch.setattr(one_sweep.Candidates, "__init__", noted)
    # Few tokens are a test here, on any processor.
    monkeypatch.setattr(backend, "FAST_CAPACITY", 0)
    whole = backend.rounding_plan_for

    def small(inputs: Any, needs: Any, workspace: int) -> Any:
        plan = whole(inputs, needs, workspace)
        return None if plan is None or plan.rows < inputs.tokens.count else plan

    monkeypatch.setattr(backend, "rounding_plan_for", small)
    monkeypatch.setattr("selfdistill_kernels.backends.native.candidates.LEAST_TOKENS", 1)
    return used


@pytest.mark.parametrize("kind", ["plain", "bias", "capped"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_error_is_what_is_said(objective: str, kind: str, plans: list[CandidatePlan]) -> None:
    out = assert_error_is_reported(
        problem(**SIZES), 0.05 if kind == "capped" else 0.02,
        # Entries cancel under a cap, which a sample does not see.
        factor=1.4 if kind == "capped" else 1.3,
        objective=OBJECTIVES[objective], backend="native", workspace=TOGETHER, **KINDS[kind],
    )  # fmt: skip
    assert len(plans) == 1
    assert out.gradient_error is not None
    # Most rows have room; the others are exact.
    assert (out.gradient_error.hidden > 0).sum() > SIZES["tokens"] // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"workspace": APART},
        {"reduction": "none", "workspace": TOGETHER},
        {"reduction": "none", "workspace": APART},
        {"advantage_mask": AdvantageMask(top_fraction=0.5), "workspace": TOGETHER},
        {"advantage_mask": AdvantageMask(sign="negative"), "workspace": TOGETHER},
        {"bias": True, "mask": True, "token_weight": True, "workspace": APART},
    ],
    ids=["groups", "per token", "per token, groups", "ranked", "gated", "bias, groups"],
)
def test_every_path_to_a_gradient(
    options: dict[str, Any], trained: bool, dtype: torch.dtype, plans: list[CandidatePlan]
) -> None:
    tensors = problem(dtype=dtype, trained=trained, **SIZES)
    if "bias" in options:
        bias = torch.randn(SIZES["vocabulary"], generator=torch.Generator().manual_seed(1))
        tensors["bias"] = bias.to(dtype).requires_grad_(trained)
    if dtype == torch.bfloat16 and trained and options["workspace"] == APART:
        options = {**options, "workspace": APART + 5 * SIZES["vocabulary"] * SIZES["hidden"]}
    upstream = None
    if options.get("reduction") == "none":
        upstream = torch.linspace(-1.0, 2.0, SIZES["tokens"])
        upstream[3] = 0.0
    assert_error_is_reported(
        tensors, 0.02, upstream=upstream, backend="native",
        rounding=2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0, **options,
    )  # fmt: skip
    assert plans


def test_one_sweep_serves_a_backward_pass(plans: list[CandidatePlan]) -> None:
    """Candidates wait for it: no logits are made again, but where somebody else has the memory."""
    tensors = problem(**{**SIZES, "vocabulary": 16411})
    hidden, weight = tensors["student_hidden"], tensors["weight"]

    def logprobs() -> Tensor:
        return fused_linear_logprobs(
            hidden, weight, tensors["targets"], gradient_tolerance=0.02, workspace=1_200_000,
            backend="native", entropy="detached",
        ).logprobs  # fmt: skip

    first, second = logprobs(), logprobs()
    assert len(plans) == 1
    made = torch.autograd.grad(first.sum(), [hidden, weight])
    assert len(plans) == 1
    again = torch.autograd.grad(second.sum(), [hidden, weight])
    assert len(plans) == 2
    # Statistics of slabs of another shape have other last bits; other lots would be far away.
    for one, other in zip(made, again, strict=True):
        assert (one - other).norm() <= 0.1 * 0.02 * one.norm()


def kernel_problem(softcap: float | None) -> tuple[LinearInputs, Tile]:
    """Scores of a product, which other shapes would give other last bits."""
    tensors = {name: tensor.detach() for name, tensor in problem(**SIZES).items()}
    inputs = LinearInputs(
        tensors["student_hidden"], tensors["teacher_hidden"], tensors["weight"], None, None, None,
        tensors["targets"], None, LogitTransform(1.0, softcap, 1.0),
    )  # fmt: skip
    scores = torch.empty(2 * SIZES["tokens"] * SIZES["vocabulary"])
    kernels = RowKernels(inputs, Objective.of("forward_kl"), 0)
    return inputs, kernels.tile(inputs.tokens, 0, SIZES["vocabulary"], scores, with_teacher=True)


def entries_of(tile: SparseTile, row: int) -> tuple[Tensor, Tensor]:
    """Columns and values of a row."""
    end, middle = int(tile.starts[row, -1]), tile.scores.shape[1] // 2
    return tile.scores[row, :end].view(torch.int32), tile.scores[row, middle : middle + end]


@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl", "jsd", "cross_entropy"])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_candidates_have_the_entries_of_whole_rows(softcap: float | None, objective: str) -> None:
    """Bit for bit, with any number of threads and any slabs: nothing that a rounding may let stay
    was left out, and no lot was drawn twice."""
    inputs, scores = kernel_problem(softcap)
    assert scores.teacher is not None
    chosen = Objective.of(OBJECTIVES[objective])
    kernels = RowKernels(inputs, chosen, 0)
    statistics = kernels.statistics(scores)
    terms = (chosen.terms[0], chosen.terms[1], chosen.terms[2])
    weights = torch.tensor([[0.7, 0.4, 0.1]]) * torch.tensor([terms])
    weights = weights.repeat(SIZES["tokens"], 1)
    rounder = Rounder(inputs, Rounding.of(GradientTolerance(0.05), inputs.student_hidden))
    whole = rounder.round(
        kernels,
        Tile(scores.tokens, scores.student.clone(), scores.teacher, 0),
        lambda _, rows: (statistics[rows], weights[rows]),
    )
    tokens, vocabulary = SIZES["tokens"], SIZES["vocabulary"]
    for columns, count, floor in ((1024, 1, -24.0), (4096, 2, -math.inf), (vocabulary, 5, -30.0)):
        with threads(count):
            candidates = (
                torch.empty(tokens, 3 if terms[0] else 2, 8192),
                torch.empty(tokens, dtype=torch.int32), torch.empty(tokens, 5),
            )  # fmt: skip
            state = kernels.new_state(tokens)
            for sweep in range(1 + kernels.needs_second_sweep):
                for start in range(0, vocabulary, columns):
                    part = slice(start, min(start + columns, vocabulary))
                    tile = Tile(
                        scores.tokens, scores.student[:, part].contiguous(),
                        scores.teacher[:, part].contiguous(), start,
                    )  # fmt: skip
                    if sweep:
                        kernels.accumulate_second(tile, state)
                    else:
                        kernels.accumulate(tile, state)
                    if sweep == kernels.needs_second_sweep:
                        kernels.emit(tile, state, terms, rounder.keys, floor, *candidates)
            assert (candidates[1] < 8192).all()
            made = rounder.settle(
                kernels, scores.tokens, terms, candidates, statistics, weights, 1024
            )
        # With a threshold from the same sample, for which some have no room.
        chosen_rows = [
            row
            for row in (made.starts[:, 0] >= 0).nonzero().squeeze(1).tolist()
            if whole.starts[row, 0] >= 0
            and entries_of(made, row)[1].abs().mode().values
            == entries_of(whole, row)[1].abs().mode().values
        ]
        assert len(chosen_rows) > tokens // (2 if columns < vocabulary else 4)
        for row in chosen_rows:
            assert torch.equal(made.starts[row], whole.starts[row])
            pairs = zip(entries_of(made, row), entries_of(whole, row), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
            assert torch.equal(made.variance[row], whole.variance[row])


def test_gradients_are_right_on_average(plans: list[CandidatePlan]) -> None:
    tensors = problem(**{**SIZES, "tokens": 8})
    exact, _ = gradients(tensors, backend="reference")
    one, mean = [], {name: torch.zeros_like(g) for name, g in exact.items()}
    seeds = 64
    for seed in range(seeds):
        made, _ = gradients(
            tensors, backend="native", workspace=600_000,
            gradient_tolerance=GradientTolerance(0.05, seed),
        )  # fmt: skip
        one.append({name: (made[name] - exact[name]).norm() for name in exact})
        for name in exact:
            mean[name] += made[name] / seeds
    assert len(plans) == seeds
    for name in exact:
        typical = torch.stack([error[name] for error in one]).square().mean().sqrt()
        left = (mean[name] - exact[name]).norm()
        assert 0.7 * typical / math.sqrt(seeds) <= left <= 1.3 * typical / math.sqrt(seeds), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [True, False])
def test_flat_rows_have_no_room_and_stay_exact(
    dtype: torch.dtype, trained: bool, plans: list[CandidatePlan]
) -> None:
    tensors, flat = problem(dtype=dtype, trained=trained, **SIZES), [1, 4, 5]
    tensors["bias"] = torch.linspace(-0.1, 0.1, SIZES["vocabulary"]).to(dtype).requires_grad_()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        tensors["student_hidden"][flat] *= 0.01
        near = torch.randn(len(flat), SIZES["hidden"], generator=generator)
        tensors["teacher_hidden"][flat] = 0.02 * near.to(dtype)
    exact, _ = gradients(tensors, backend="native", bias=True)
    made, out = gradients(
        tensors, backend="native", bias=True, gradient_tolerance=0.01, workspace=TOGETHER
    )
    assert plans
    assert out.gradient_error is not None
    assert (out.gradient_error.hidden[flat] == 0).all()
    far = (made["student_hidden"] - exact["student_hidden"])[flat].norm()
    assert far <= 20 * torch.finfo(dtype).eps * exact["student_hidden"][flat].norm()
    rounding = 2 * torch.finfo(torch.bfloat16).eps if dtype == torch.bfloat16 else 0.0
    measured = (made["bias"] - exact["bias"]).norm() / exact["bias"].norm()
    assert measured <= 0.05 + rounding
    if trained:
        measured = (made["weight"] - exact["weight"]).norm() / exact["weight"].norm()
        assert measured <= 1.3 * out.gradient_error.weight + rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_rows_go_into_the_gradient_at_once(
    dtype: torch.dtype, plans: list[CandidatePlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No [N, H] beside dH for the exact rows of each group."""
    tensors, made = problem(dtype=dtype, trained=False, **SIZES), []
    with torch.no_grad():
        tensors["student_hidden"] *= 0.01
    zeros_like = torch.zeros_like

    def noted(tensor: Tensor, *others: Any, **options: Any) -> Tensor:
        made.append(tensor.shape)
        return zeros_like(tensor, *others, **options)

    monkeypatch.setattr(torch, "zeros_like", noted)
    _, out = gradients(tensors, backend="native", gradient_tolerance=0.01, workspace=APART)
    assert len(plans) > 1
    assert out.gradient_error is not None
    assert (out.gradient_error.hidden == 0).all()
    assert made.count(tensors["student_hidden"].shape) == 1


@pytest.mark.parametrize("banned", [-math.inf, torch.finfo(torch.float32).min, -1e30])
def test_rows_that_are_not_finite_stay_with_themselves(
    banned: float, plans: list[CandidatePlan]
) -> None:
    """Nothing but banned entries in the first slabs: no candidates, and the exact gradient."""
    tensors = {**problem(**SIZES)}
    tensors["bias"] = torch.zeros(SIZES["vocabulary"])
    tensors["bias"][:9000] = banned
    tensors["targets"] = 9000 + tensors["targets"] % 2000
    exact, _ = gradients(tensors, backend="native", bias=True)
    made, out = gradients(
        tensors, backend="native", bias=True, gradient_tolerance=0.02, workspace=TOGETHER
    )
    assert plans
    assert out.gradient_error is not None
    for name in exact:
        assert (made[name] - exact[name]).norm() <= 0.05 * exact[name].norm(), name


@pytest.mark.parametrize("banned", [torch.finfo(torch.float32).min, -1e30])
def test_what_is_kept_never_leaves_its_row(banned: float) -> None:
    """Before any entry that is not banned, log-probs are infinite: no floor leaves those out."""
    inputs, scores = kernel_problem(None)
    rows, columns = scores.student.shape
    assert scores.teacher is not None
    scores.student[:, :9000] = banned
    kernels = RowKernels(inputs, Objective.of("forward_kl"), 0)
    size = rows * 3 * 4096
    memory = torch.full((2 * size,), 7.0)  # with room behind it
    candidates = (
        memory[:size].view(rows, 3, 4096),
        torch.empty(rows, dtype=torch.int32),
        torch.empty(rows, 5),
    )
    state, keys = kernels.new_state(rows), torch.arange(rows)
    for start in range(0, columns, 1024):
        part = slice(start, start + 1024)
        tile = Tile(
            scores.tokens, scores.student[:, part].contiguous(),
            scores.teacher[:, part].contiguous(), start,
        )  # fmt: skip
        kernels.accumulate(tile, state)
        kernels.emit(tile, state, (True, False, False), keys, -24.0, *candidates)
        assert (candidates[1] == 0).all()
    assert (candidates[2][:, 0] == math.inf).all()
    assert (memory[size:] == 7.0).all()


def test_no_token_at_all(plans: list[CandidatePlan]) -> None:
    """With less workspace than a row of logits takes."""
    tensors = problem(**{**SIZES, "vocabulary": 40_003})
    made, out = gradients(
        tensors, torch.ones(SIZES["tokens"]), backend="native", gradient_tolerance=0.02,
        workspace=150_000, reduction="none", mask=torch.zeros(SIZES["tokens"], dtype=torch.bool),
    )  # fmt: skip
    assert plans
    assert not any(gradient.any() for gradient in made.values())
    assert out.gradient_error is not None
    assert not out.gradient_error.hidden.any()


def test_plans() -> None:
    sizes = {"hidden": 576, "vocabulary": 49152, "models": 2, "itemsize": 4, "need_hidden": True}
    terms = (True, False, False)

    def plan(tokens: int, workspace: int, **others: Any) -> CandidatePlan | None:
        options = {**sizes, "need_weight": True, "terms": terms, **others}
        return CandidatePlan.choose(tokens=tokens, workspace=workspace, **options)

    small = plan(512, 12 << 20)
    assert small is not None
    assert small.bytes <= 12 << 20
    assert small.tokens < 512
    assert small.capacity == 4096
    large = plan(512, 96 << 20)
    assert large is not None
    assert large.bytes <= 96 << 20
    assert (large.tokens, large.capacity) == (512, 8192)
    assert plan(512, 3 << 20) is None
    # A 16-bit dW of several groups wants float32 sums, which have no room.
    assert plan(512, 12 << 20, itemsize=2) is None
    frozen = plan(512, 12 << 20, itemsize=2, need_weight=False)
    assert frozen is not None
    assert frozen.bytes <= 12 << 20
    assert "one sweep" in large.describe()


def test_bounds_need_all_entries(plans: list[CandidatePlan]) -> None:
    """So that without room for whole rows the gradient is exact."""
    tolerance = GradientTolerance(0.02, bound_risk=1e-6)
    tensors, small = problem(**SIZES), 90_000
    made, out = gradients(tensors, backend="native", workspace=small, gradient_tolerance=tolerance)
    exact, _ = gradients(tensors, backend="native", workspace=small)
    assert not plans
    assert all(torch.equal(made[name], exact[name]) for name in exact)
    assert out.gradient_error is not None
    assert out.gradient_error.hidden_bound is not None
    assert (out.gradient_error.hidden_bound == 0).all()
