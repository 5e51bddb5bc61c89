"""Every contender gives the loss and the gradients of float64 before it is timed."""

from __future__ import annotations

import functools
import sys
from dataclasses import astuple, replace
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.checks import WrongResultError, check, check_agreement, truth
from benchmarks.contender import StepResult
from benchmarks.peers import contenders, plan_of
from benchmarks.problems import BETAS, Shape, make_problem
from selfdistill_kernels.backends import registry

CONTENDERS = contenders()
EAGER = [key for key, contender in CONTENDERS.items() if not contender.compiled]


# Gradients come back in bfloat16, rounded by 2^-8 of their binade, and may be made of a gradient of
# the logits that was rounded before: two and a half such roundings.
IN_BFLOAT16 = 1e-2


@functools.cache
def allowed_in_float32(objective: str) -> float:
    """Three times the worst error of plain torch on the same problem, plus a few roundings."""
    known = contenders(objective=objective)
    plain = [e for e in astuple(check(known["torch"], torch.float32, objective=objective)) if e]
    return 3 * max(plain) + 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("objective", BETAS)
@pytest.mark.parametrize("key", EAGER)
def test_float32_equals_the_truth(key, objective):
    errors = check(CONTENDERS[key], torch.float32, objective=objective)
    assert errors.within(allowed_in_float32(objective))


@pytest.mark.parametrize("key", EAGER)
def test_bfloat16_equals_the_truth(key):
    """What keeps float32 logits is exact to the rounding of its gradients; the rest is not."""
    errors = check(CONTENDERS[key], torch.bfloat16)
    if not CONTENDERS[key].rounds_logits:
        assert errors.loss is None or errors.loss < allowed_in_float32("reverse_kl")
        assert errors.within(IN_BFLOAT16)


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in CONTENDERS if key not in EAGER])
def test_compiled_equals_the_truth(key):
    errors = check(CONTENDERS[key], torch.float32)
    assert errors.within(allowed_in_float32("reverse_kl"))


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
    assert check_agreement(running, steps, torch.float32, on_step=called.append) == {}
    assert called == list(steps)
    result = steps["trl"]()
    wrong = StepResult(result.loss, result.hidden * 1.01, result.weight)

    def out_of_memory():
        raise torch.cuda.OutOfMemoryError("no memory\nfor that")

    # Libraries are left out with the reason, ours ends the run.
    failures = check_agreement(
        running, steps | {"trl": lambda: wrong, "liger_128": out_of_memory}, torch.float32
    )
    assert failures["trl"].startswith("WrongResultError: trl at the timed shape: Errors(")
    assert failures["liger_128"] == "OutOfMemoryError: no memory"
    with pytest.raises(torch.cuda.OutOfMemoryError):
        check_agreement(running, steps | {"ours": out_of_memory}, torch.float32)
    # All are compared with plain torch, wherever it stands: what is wrong of ours is not booked as
    # an error of torch.
    plain = CONTENDERS["torch"]
    with pytest.raises(WrongResultError, match="ours at the timed shape"):
        check_agreement(
            [*running, plain],
            steps | {"ours": lambda: wrong, "torch": plain.build(problem)},
            torch.float32,
        )
    # Without it, the first of those that keep all tokens.
    with pytest.raises(WrongResultError, match="ours"):
        check_agreement(
            sorted(running, key=lambda contender: contender.is_ours),
            steps | {"ours": lambda: wrong},
            torch.float32,
        )


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
    without = replace(registry.found(), native_problem="not built")
    monkeypatch.setattr(registry, "_FOUND", without)
    with pytest.raises(RuntimeError, match="native: not built"):
        CONTENDERS["ours"].build(make_problem(Shape(8, 16, 64), torch.float32))


# ---- cross entropy -------------------------------------------------------------------------------

CROSS_ENTROPY = contenders(objective="cross_entropy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key", ["floor", "ours", "torch"])
def test_cross_entropy_equals_the_truth(key, dtype):
    contender = CROSS_ENTROPY[key]
    errors = check(contender, dtype, objective="cross_entropy")
    if not contender.rounds_logits:
        allowed = allowed_in_float32("cross_entropy")
        assert errors.within(allowed if dtype == torch.float32 else IN_BFLOAT16)


def test_the_truth_of_cross_entropy_is_not_that_of_a_divergence():
    problem = make_problem(Shape(8, 16, 64), torch.float32, objective="cross_entropy")
    logits = problem.student_hidden.double() @ problem.weight.double().T
    expected = torch.nn.functional.cross_entropy(logits, problem.targets)
    torch.testing.assert_close(truth(problem).loss, expected.detach())


def test_the_floor_of_cross_entropy_scores_one_model():
    step = CROSS_ENTROPY["floor"].build(
        make_problem(Shape(8, 16, 32), torch.float32, objective="cross_entropy")
    )
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == 3 * 2 * 8 * 16 * 32


class FakeLibrary(ModuleType):
    """A library for cross entropy, by plain torch; keeps the options that it was called with."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.options: dict[str, object] = {}

    def __call__(self, hidden, weight, targets, **options):
        self.options = options
        return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), targets)


@pytest.mark.parametrize(
    ("key", "module", "function", "options"),
    [
        ("cce", "cut_cross_entropy", "linear_cross_entropy", {"impl": "cce"}),
        ("cce_exact", "cut_cross_entropy", "linear_cross_entropy", {"impl": "cce_exact"}),
        (
            "quack",
            "quack.linear_cross_entropy",
            "chunked_linear_cross_entropy",
            {"reduction": "mean"},
        ),
    ],
)
def test_adapters_hand_over_what_the_libraries_take(key, module, function, options, monkeypatch):
    """Hidden states, head, targets, in this order; loss and gradients come back right."""
    library = FakeLibrary(module)
    setattr(library, function, library)
    for name in (module.split(".")[0], module):
        monkeypatch.setitem(sys.modules, name, library)
    check(CROSS_ENTROPY[key], torch.float32, objective="cross_entropy")
    assert library.options == options


# ---- what cannot run here says why ---------------------------------------------------------------


def test_a_missing_package_is_named_with_its_command():
    contender = replace(CROSS_ENTROPY["quack"], requires="no_such_module")
    assert contender.missing("cuda") == (
        "no_such_module is not installed: pip install 'quack-kernels'"
    )


def test_what_needs_a_gpu_says_so(monkeypatch):
    contender = replace(CROSS_ENTROPY["quack"], requires="torch")
    assert contender.missing("cpu") == "runs on a GPU only"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert contender.missing("cuda") == "needs compute capability 9.0, this GPU has 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert contender.missing("cuda", "float32") == "takes bfloat16, not float32"
    assert contender.missing("cuda", "bfloat16") is None


def test_cuda_rows_are_a_contender_of_their_own_on_a_gpu(monkeypatch):
    assert "ours_rows" not in CONTENDERS
    rows = contenders(device="cuda")["ours_rows"]
    without = replace(registry.found(), cuda_problem="install nvcc")
    monkeypatch.setattr(registry, "_FOUND", without)
    assert rows.missing("cuda") == "install nvcc"
    monkeypatch.setattr(registry, "_FOUND", replace(without, cuda_problem=None))
    assert rows.missing("cuda") is None
