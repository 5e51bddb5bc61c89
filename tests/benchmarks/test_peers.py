"""Every contender gives the loss and the gradients of float64 before it is timed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.checks import WrongResultError, check, check_agreement, truth
from benchmarks.peers import StepResult, contenders, plan_of
from benchmarks.problems import BETAS, Shape, make_problem
from selfdistill_kernels import backends

CONTENDERS = contenders()
EAGER = [key for key, contender in CONTENDERS.items() if not contender.compiled]


@pytest.mark.parametrize("divergence", BETAS)
@pytest.mark.parametrize("key", EAGER)
def test_float32_equals_the_truth(key, divergence):
    errors = check(CONTENDERS[key], torch.float32, divergence=divergence)
    assert errors.within(2e-5)


@pytest.mark.parametrize("key", EAGER)
def test_bfloat16_equals_the_truth(key):
    """What keeps float32 logits is exact to the rounding of its gradients; the rest is not."""
    errors = check(CONTENDERS[key], torch.bfloat16)
    if not CONTENDERS[key].rounds_logits:
        assert errors.loss is None or errors.loss < 1e-5
        assert errors.within(1e-2)


@pytest.mark.parametrize("key", [key for key in CONTENDERS if key not in EAGER])
def test_compiled_equals_the_truth(key):
    assert check(CONTENDERS[key], torch.float32).within(2e-5)


def test_a_mask_drops_tokens_and_keeps_the_denominator():
    problem = make_problem(Shape(40, 16, 97), torch.float32)
    kept = problem.active(0.2)
    whole, masked = truth(problem), truth(problem, 0.2)
    assert torch.equal(masked.hidden[~kept], torch.zeros(32, 16, dtype=torch.float64))
    torch.testing.assert_close(masked.hidden[kept], whole.hidden[kept])


@pytest.mark.parametrize(
    ("spoil", "dtype"),
    [
        (lambda result: result._replace(loss=result.loss * 1.01), torch.float32),
        (lambda result: result._replace(hidden=result.hidden * 1.01), torch.float32),
        (lambda result: result._replace(weight=result.weight * 1.01), torch.float32),
        (lambda result: result._replace(hidden=result.hidden * float("nan")), torch.float32),
        (lambda result: result._replace(weight=None), torch.float32),
        (lambda result: result._replace(hidden=result.hidden * 2), torch.bfloat16),
    ],
)
def test_check_refuses_a_wrong_result(spoil, dtype):
    plain = CONTENDERS["torch"]

    def build(problem):
        step = plain.build(problem)
        return lambda: spoil(step())

    with pytest.raises(WrongResultError, match="torch"):
        check(replace(plain, build=build), dtype)


def test_check_refuses_a_frozen_head_that_pays_for_dw():
    with pytest.raises(WrongResultError, match="frozen"):
        check(replace(CONTENDERS["torch"], trained_head=False), torch.float32)


def test_agreement_at_the_timed_shape():
    problem = make_problem(Shape(32, 16, 97), torch.float32)
    running = [CONTENDERS[key] for key in ("floor", "ours", "ours_rho_0.2", "trl", "liger_128")]
    steps = {contender.key: contender.build(problem) for contender in running}
    called = []
    check_agreement(running, steps, torch.float32, on_step=called.append)
    assert called == list(steps)
    result = steps["trl"]()
    steps["trl"] = lambda: StepResult(result.loss, result.hidden * 1.01, result.weight)
    with pytest.raises(WrongResultError, match="trl"):
        check_agreement(running, steps, torch.float32)


@pytest.mark.parametrize(("key", "gemms"), [("floor", 4), ("floor_frozen", 3)])
def test_floor_is_its_gemms_and_nothing_else(key, gemms):
    shape = Shape(8, 16, 32)
    step = CONTENDERS[key].build(make_problem(shape, torch.float32))
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == gemms * 2 * 8 * 16 * 32
    assert set(counter.get_flop_counts()["Global"]) == {torch.ops.aten.mm}


def test_every_contender_has_its_floor():
    for contender in CONTENDERS.values():
        assert CONTENDERS[contender.floor].trained_head == contender.trained_head


def test_workspace_reaches_ours_and_its_plan():
    problem = make_problem(Shape(8, 16, 64), torch.float32)
    with pytest.raises(ValueError, match="workspace"):
        contenders(workspace=8)["ours"].build(problem)()
    plan = plan_of(problem.shape, torch.float32, trained_head=True, workspace=2048)
    assert plan.bytes <= 2048 < plan_of(problem.shape, torch.float32, trained_head=True).bytes


def test_ours_is_never_the_fallback(monkeypatch):
    without = replace(backends.found(), native_problem="not built")
    monkeypatch.setattr(backends, "_FOUND", without)
    step = CONTENDERS["ours"].build(make_problem(Shape(8, 16, 64), torch.float32))
    with pytest.raises(RuntimeError, match="not built"):
        step()
