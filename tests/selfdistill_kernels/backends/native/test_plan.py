"""The tile plan keeps its budget, makes the choices that were measured, and says what it does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processors import NEEDS_BFLOAT16
from slow import slow_but

from selfdistill_kernels import (
    distillation_from_logits,
    fused_linear_distillation,
    fused_linear_logprobs,
    release_workspace,
)
from selfdistill_kernels.backends.interface import LinearInputs, Needs
from selfdistill_kernels.backends.native import backend as native_backend
from selfdistill_kernels.backends.native import gemm, recompute
from selfdistill_kernels.backends.native import kept as kept_backend
from selfdistill_kernels.backends.native.backend import plan_for
from selfdistill_kernels.backends.native.caches import Caches
from selfdistill_kernels.backends.native.plan import (
    AUTO_CAP,
    AUTO_TOKENS,
    FEW_TOKENS,
    MEBIBYTE,
    NARROW_COLUMNS,
    SLAB_COLUMNS,
    TilePlan,
    copied_bytes,
)
from selfdistill_kernels.logits import LogitTransform

SMALL = {"hidden": 576, "vocabulary": 49152}
LARGE = {"hidden": 1024, "vocabulary": 151936}
# Of the machine on which the choices were measured; the tests do not depend on theirs.
MEASURED = Caches(300 * MEBIBYTE, "sysfs")


def plan(**changes):
    given = {
        "tokens": 4096, **SMALL, "models": 2, "itemsize": 4, "need_weight": True, "caches": MEASURED
    }  # fmt: skip
    return TilePlan.choose(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "strategy", "rows"),
    [
        ({}, "store", AUTO_TOKENS),
        ({"tokens": 100}, "store", 100),
        ({"tokens": 3}, "store", 3),
        ({"tokens": 0}, "store", 1),
        ({"models": 1}, "store", AUTO_TOKENS),
        (LARGE, "store", AUTO_CAP // (8 * 151936)),
        # Rows that the GEMM of dW likes less are left out, where there are several tiles of them.
        ({**LARGE, "workspace": 64 * MEBIBYTE}, "store", 47),
        ({**LARGE, "workspace": 64 * MEBIBYTE, "need_weight": False}, "store", 54),
        ({**LARGE, "workspace": 64 * MEBIBYTE, "tokens": 50}, "store", 50),
        # Few rows: dW would be read and written for each of them ...
        ({**LARGE, "workspace": 32 * MEBIBYTE}, "recompute", 512),
        # ... unless there is no dW, or there are no more tokens.
        ({**LARGE, "workspace": 32 * MEBIBYTE, "need_weight": False}, "store", 27),
        ({**LARGE, "workspace": 32 * MEBIBYTE, "tokens": 20}, "store", 20),
        # 16-bit inputs: one tile, or a float32 dW beside several where it fits, else slabs.
        ({"itemsize": 2, "tokens": 512}, "store", 512),
        ({"itemsize": 2}, "store", (AUTO_CAP - 4 * 49152 * 576) // (8 * 49152)),
        ({"itemsize": 2, "workspace": 160 * MEBIBYTE}, "store", 135),
        ({"itemsize": 2, "workspace": 128 * MEBIBYTE}, "recompute", 512),
        ({**LARGE, "itemsize": 2}, "recompute", 512),
    ],
)
def test_choices(changes, strategy, rows):
    made = plan(**changes)
    assert (made.strategy, made.rows) == (strategy, rows)


@pytest.mark.parametrize(
    ("mebibytes", "shape", "columns"),
    [
        (300, SMALL, SLAB_COLUMNS),
        (300, LARGE, 6144),  # of a 32 MiB workspace, copies of 512 hidden states take 8
        (32, SMALL, 1920),  # 16 MiB of 576 * 8 + 2 * 4 * 512 bytes a column
        (32, LARGE, 1360),
        (4, LARGE, NARROW_COLUMNS),
    ],
)
def test_slabs_fit_half_of_the_last_cache(mebibytes, shape, columns):
    caches = Caches(mebibytes * MEBIBYTE, "sysfs")
    made = plan(**shape, workspace=32 * MEBIBYTE, tokens=60_000, caches=caches)
    if made.strategy == "store":
        made = TilePlan.slabs(
            **shape, tokens=60_000, models=2, itemsize=4, need_weight=True, caches=caches
        )
    assert made.columns == columns
    assert f"slabs for a {mebibytes} MiB last-level cache (sysfs)" in made.describe()


def test_the_processors_caches_mean_nothing_on_a_gpu():
    tiny = Caches(MEBIBYTE, "sysfs")
    made = plan(**LARGE, workspace=32 * MEBIBYTE, caches=tiny, on_gpu=True)
    assert (made.columns, made.caches) == (6144, None)
    assert "cache" not in made.describe()


def test_sums_of_16_bit_inputs_are_part_of_the_plan():
    """float32 dH of all tokens, and a slab of dW where several tiles make one."""
    given = {**LARGE, "itemsize": 2}
    several = plan(**given)
    assert several.sum_bytes == 4 * 4096 * 1024 + 4 * several.columns * 1024
    assert plan(**given, need_hidden=False).sum_bytes == 4 * several.columns * 1024
    one = plan(**given, tokens=500, workspace=48 * MEBIBYTE)
    assert (one.strategy, one.sum_bytes) == ("recompute", 4 * 500 * 1024)
    assert "float32 sums" in one.describe()
    assert plan(**LARGE, workspace=32 * MEBIBYTE).sum_bytes == 0


@settings(deadline=None)
@given(
    tokens=st.integers(0, 10_000),
    hidden=st.integers(1, 3000),
    vocabulary=st.integers(1, 300_000),
    models=st.sampled_from([1, 2]),
    itemsize=st.sampled_from([2, 4]),
    need_weight=st.booleans(),
    widens=st.booleans(),
    spare=st.integers(0, 10**8),
)
def test_a_given_budget_is_kept(
    tokens, hidden, vocabulary, models, itemsize, need_weight, widens, spare
):
    least = min(16, vocabulary)
    budget = models * 4 * least + copied_bytes(hidden, models) + spare
    if itemsize < 4:
        budget += 4 * hidden * (max(tokens, 1) + least * need_weight)
    budget += 4 * least * hidden * widens
    made = plan(
        tokens=tokens,
        hidden=hidden,
        vocabulary=vocabulary,
        models=models,
        itemsize=itemsize,
        need_weight=need_weight,
        workspace=budget,
        widened_hidden=hidden * widens,
    )
    assert made.rows >= 1
    assert 1 <= made.columns <= vocabulary
    assert made.bytes <= budget
    if made.strategy == "store":
        assert made.columns == vocabulary
        assert made.rows >= min(FEW_TOKENS, tokens) or not need_weight


def test_too_small_a_budget_is_refused():
    # Two rows of 16 logits, and copies of the hidden states of their token.
    needed = 128 + 16 * 576
    with pytest.raises(ValueError, match=rf"workspace: 127 bytes .*at least {needed} bytes"):
        plan(workspace=127)
    assert plan(workspace=needed).bytes == needed
    # 4,096 tokens: dH and 16 rows of dW in float32 beside them.
    needed += 4 * 576 * (4096 + 16)
    with pytest.raises(ValueError, match=rf"at least {needed} bytes .*sums of dH"):
        plan(itemsize=2, workspace=needed - 1)
    assert plan(itemsize=2, workspace=needed).bytes == needed


def test_describe_names_strategy_tile_and_bytes():
    assert plan().describe() == (
        "store (one visit, 2 + 2 rho GEMMs): tiles of 512 tokens x 49152 logits x 2 models, "
        "196.5 MiB"
    )
    assert plan(**LARGE, workspace=32 * MEBIBYTE).describe() == (
        "recompute (two sweeps over slabs, 2 + 4 rho GEMMs): tiles of 512 tokens x 6144 logits x "
        "2 models, 32.0 MiB; slabs for a 300 MiB last-level cache (sysfs)"
    )


def peak_bytes(step) -> int:
    """Most bytes of tensors that `step` holds at a time."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


PATHS = {
    "float32": torch.float32,
    "bfloat16 as it is": torch.bfloat16,
    "bfloat16 widened": torch.bfloat16,
}


@pytest.fixture(params=PATHS)
def path(request, monkeypatch) -> torch.dtype:
    """A way of the products; the dtype that takes it. Widening runs on every processor."""
    if request.param == "bfloat16 widened":
        monkeypatch.setattr(gemm, "is_widened", lambda weight: weight is not None)
        monkeypatch.setattr(native_backend, "is_widened", lambda weight: weight is not None)
        monkeypatch.setattr(recompute, "is_widened", lambda weight: weight is not None)
        monkeypatch.setattr(kept_backend, "is_widened", lambda weight: weight is not None)
    elif request.param == "bfloat16 as it is" and not torch.ops.selfdistill.gemm_bf16_available():
        pytest.skip(NEEDS_BFLOAT16)
    return PATHS[request.param]


# Tokens, hidden size, vocabulary; the gathered ones miss every fifth token.
HELD = (2000, 256, 4096)
SHAPES = ["plain", "gathered", "two heads"]


@pytest.mark.parametrize("kilobytes", slow_but([4500, 24000], [4500, 8000, 24000]))
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_call_holds_no_more_than_its_plan(path, kilobytes, trained, shape):
    tokens, hidden, vocabulary = HELD
    student, teacher = torch.randn(2, tokens, hidden).to(path)
    weight = torch.randn(vocabulary, hidden).mul(0.1).to(path).requires_grad_(trained)
    student.requires_grad_()
    exists = torch.arange(tokens) % 5 > 0 if shape == "gathered" else None
    teacher_weight = None
    if shape == "two heads":
        teacher_weight = weight.detach() + 1
    budget = 1000 * kilobytes
    inputs = LinearInputs(
        student, teacher, weight, teacher_weight, None, None, None, exists, LogitTransform()
    )
    made = plan_for(inputs, Needs(True, trained, False), budget)
    assert made.bytes <= budget

    def step() -> None:
        loss = fused_linear_distillation(
            student, teacher, weight, mask=exists, teacher_weight=teacher_weight,
            workspace=budget, backend="native",
        ).loss  # fmt: skip
        loss.backward()

    gradients = path.itemsize * (tokens * hidden + trained * vocabulary * hidden)
    check_held(step, made, gradients, [student, weight])


@pytest.mark.parametrize("kilobytes", [4500, 24000, 60000])
@pytest.mark.parametrize("trained", [True, False])
def test_log_probs_hold_no_more_than_their_plan(path, kilobytes, trained):
    """The largest of the plans: of the statistics, and of gradients that are made later, by slabs
    or from all scores, which 60 MB hold until then."""
    tokens, hidden, vocabulary = HELD
    student = torch.randn(tokens, hidden).to(path).requires_grad_()
    weight = torch.randn(vocabulary, hidden).mul(0.1).to(path).requires_grad_(trained)
    targets = torch.zeros(tokens, dtype=torch.int64)
    inputs = LinearInputs(student, None, weight, None, None, None, targets, None, LogitTransform())
    swept = plan_for(inputs, native_backend.NO_NEEDS, 1000 * kilobytes)
    needs = Needs(True, trained, False)
    made = native_backend.slabs_for(inputs, tokens, needs, 1000 * kilobytes)
    kept = plan_for(inputs, needs, 1000 * kilobytes)
    assert (kept.strategy == "store" and kept.rows == tokens) == (kilobytes == 60000)

    def step() -> None:
        fused_linear_logprobs(
            student, weight, targets, workspace=1000 * kilobytes, backend="native"
        ).logprobs.sum().backward()

    gradients = path.itemsize * (tokens * hidden + trained * vocabulary * hidden)
    largest = max(made, swept, kept, key=lambda plan: plan.bytes)
    check_held(step, largest, gradients, [student, weight])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kilobytes", [1500, 8000])
@pytest.mark.parametrize("gathered", [False, True])
def test_logits_of_a_caller_hold_no_more_than_the_plan(dtype, kilobytes, gathered):
    tokens, vocabulary = 600, 4096
    student, teacher = torch.randn(2, tokens, vocabulary).to(dtype)
    student.requires_grad_()
    exists = torch.arange(tokens) % 5 > 0 if gathered else None
    inputs = LinearInputs(student, teacher, None, None, None, None, None, exists, LogitTransform())
    made = plan_for(inputs, Needs(True, False, False), 1000 * kilobytes)

    def step() -> None:
        distillation_from_logits(
            student, teacher, mask=exists, workspace=1000 * kilobytes, backend="native"
        ).loss.backward()

    check_held(step, made, dtype.itemsize * tokens * vocabulary, [student])


def check_held(step, made, gradients: int, leaves) -> None:
    """`step` holds at most its plan, its gradients (bytes) and what the statistics take."""
    step()  # libraries pack and keep what they like
    release_workspace()
    for leaf in leaves:
        leaf.grad = None
    most = peak_bytes(step)
    assert 4 * made.models * made.rows * made.columns + gradients <= most
    assert most <= made.bytes + gradients + 256 * leaves[0].shape[0]


def test_recomputation_makes_its_kernels_once(monkeypatch):
    """Of a head they hold widened biases, and the choice of its products."""
    made = []

    class Counted(native_backend.RowKernels):
        def __init__(self, *arguments):
            made.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(native_backend, "RowKernels", Counted)
    hidden, weight = torch.randn(9, 8, requires_grad=True), torch.randn(64, 8, requires_grad=True)
    fused_linear_distillation(
        hidden, hidden.detach() + 1, weight, workspace=8 * 32, backend="native"
    ).loss.backward()
    assert weight.grad.any()
    assert len(made) == 1
