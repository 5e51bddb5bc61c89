"""The operators as torch sees them: opcheck, gradcheck, torch.compile, autocast."""

from __future__ import annotations

import shutil

import pytest
import torch
from kernel_cases import DIVERGENCES, make_case

from selfdistill_kernels import (
    Objective,
    distillation_from_logits,
    fused_linear_distillation,
    fused_linear_logprobs,
)
from selfdistill_kernels.autocast import WITHOUT_AUTOCAST, autocast_dtype
from selfdistill_kernels.ops import (
    linear_loss,
    linear_statistics,
    linear_statistics_backward,
)


def op_tensors(requires_grad=True, teacher=True):
    case = make_case(5, 8, 31, bias=True).cast(torch.float32)
    if requires_grad:
        case.leaves()
    exists = torch.tensor([True, True, False, True, True])
    return (
        case.student_hidden,
        case.teacher_hidden if teacher else None,
        case.weight,
        None,
        case.bias,
        case.bias.detach() if teacher else None,
        case.targets,
        exists,
    )


NO_TOLERANCE = (None, 0, None)


@pytest.mark.parametrize(
    ("needs", "gate", "tolerance", "clip"),
    [
        ((True, True, True), None, NO_TOLERANCE, None),
        ((True, True, True), None, NO_TOLERANCE, 0.05),
        ((True, True, True), -1, NO_TOLERANCE, None),
        ((True, False, False), None, NO_TOLERANCE, None),
        ((True, False, False), -1, NO_TOLERANCE, 0.05),
        # With all gradients: the error of one that is not made is NaN, which no check finds equal.
        ((True, True, True), None, (0.1, 3, None), None),
        ((True, True, True), None, (0.1, 3, 1e-6), None),
    ],
)
def test_opcheck_loss(needs, gate, tolerance, clip, backend):
    tensors = op_tensors()
    if not needs[1]:
        tensors = (tensors[0], *(t if t is None else t.detach() for t in tensors[1:]))
    weight = torch.full((5,), 0.25)
    terms = ("forward_kl", 0.5, 0.1, 0.2, 0.3)
    arguments = (
        *tensors, weight, None, 1.0, None, 1.0, *terms, None, None, clip, gate, 0.1, *tolerance,
        *needs, 0, backend,
    )  # fmt: skip
    torch.library.opcheck(linear_loss, arguments)


TOP_K = [(0, "student", True), (3, "student", True), (2, "teacher", False)]


@pytest.mark.parametrize(
    ("teacher", "top_k"), [*((True, top_k) for top_k in TOP_K), (False, TOP_K[0])]
)
def test_opcheck_statistics(teacher, top_k, backend):
    divergence = "jsd" if teacher else "none"
    tensors = op_tensors(teacher=teacher)
    arguments = (*tensors, 1.0, 5.0, 0.8, divergence, 0.5, None, *top_k, 0, backend)
    torch.library.opcheck(linear_statistics, arguments)


@pytest.mark.parametrize("top_k", TOP_K)
def test_opcheck_statistics_backward(top_k, backend):
    tensors = op_tensors(requires_grad=False)
    options = (1.0, 5.0, 0.8, "jsd", 0.5, None)
    statistics, *support = linear_statistics(*tensors, *options, *top_k, 0, backend)
    arguments = (
        *tensors, statistics, *support, torch.rand(5, 3), *options, top_k[2], True, True, True, 0,
        backend,
    )  # fmt: skip
    torch.library.opcheck(linear_statistics_backward, arguments)


@pytest.mark.parametrize("divergence", [*DIVERGENCES, "none"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(divergence, reduction):
    """Finite differences in float64, on the oracle. The advantage is a constant by definition,
    so that the policy gradient has no primitive to difference; test_loss.py covers it."""
    case = make_case(3, 4, 7, bias=True, temperature=0.8, softcap=4.0)
    objective = Objective(divergence, beta=0.3, cross_entropy=0.2, entropy=-0.3)

    def loss(student_hidden, weight, bias):
        # The teacher keeps the head of the unperturbed case: no gradient flows to it.
        return fused_linear_distillation(
            student_hidden, case.teacher_hidden, weight, case.targets,
            teacher_weight=case.weight.detach(), teacher_bias=case.bias.detach(), bias=bias,
            objective=objective, reduction=reduction, backend="reference", **case.options,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, [leaf.clone() for leaf in case.leaves()])


def test_gradcheck_logprobs_and_logits():
    case = make_case(3, 4, 7)

    def logprobs(hidden, weight):
        out = fused_linear_logprobs(hidden, weight, case.targets, backend="reference")
        return out.logprobs, out.entropy

    assert torch.autograd.gradcheck(logprobs, case.leaves())
    student, teacher = torch.randn(2, 3, 7, dtype=torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logits: distillation_from_logits(logits, teacher, case.targets).loss, [student]
    )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_gradients_equal_eager_ones_bitwise(reduction, compiler, backend):
    if compiler == "inductor" and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor compiles C++ for the CPU; install g++ or clang++")
    torch.compiler.reset()
    case = make_case(6, 8, 31, bias=True).cast(torch.float32)
    leaves = case.leaves()
    mask = torch.tensor([True, True, False, True, True, True])

    def step(student_hidden, teacher_hidden, weight, bias):
        out = fused_linear_distillation(
            student_hidden * 1.5, teacher_hidden, weight, case.targets,
            bias=bias, mask=mask, reduction=reduction, backend=backend,
        )  # fmt: skip
        # No sum: in which order a compiler adds is its own business, and its processor's.
        return out.loss * 2.0, out.advantage

    arguments = (case.student_hidden, case.teacher_hidden, case.weight, case.bias)
    eager_loss, eager_advantage = step(*arguments)
    upstream = torch.ones_like(eager_loss)
    eager = torch.autograd.grad(eager_loss, leaves, upstream)
    loss, advantage = torch.compile(step, fullgraph=True, backend=compiler)(*arguments)
    compiled = torch.autograd.grad(loss, leaves, upstream)
    assert torch.equal(loss, eager_loss)
    assert torch.equal(advantage, eager_advantage)
    for a, b in zip(compiled, eager, strict=True):
        assert torch.equal(a, b)


def test_autocast_is_traced(backend):
    torch.compiler.reset()
    case = make_case(5, 8, 31, bias=True).cast(torch.float32)
    leaves = case.leaves()

    def step(hidden, teacher_hidden, weight, bias):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logprobs = fused_linear_logprobs(
                hidden, weight, case.targets, bias=bias, backend=backend
            ).logprobs
            loss = fused_linear_distillation(
                hidden, teacher_hidden, weight, bias=bias, backend=backend
            ).loss
        return loss + logprobs.sum()

    arguments = (case.student_hidden, case.teacher_hidden, case.weight, case.bias)
    loss = step(*arguments)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(compiled, loss)
    for a, b in zip(
        torch.autograd.grad(compiled, leaves), torch.autograd.grad(loss, leaves), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [*WITHOUT_AUTOCAST, "cpu", "cuda", "mps", "xpu"])
def test_devices_without_autocast_are_known(kind):
    assert torch.amp.is_autocast_available(kind) == (kind not in WITHOUT_AUTOCAST)
    assert autocast_dtype(torch.device(kind)) is None


def test_autocast_casts_like_a_linear_layer(backend):
    case = make_case(5, 8, 31).cast(torch.float32)
    case.leaves()
    expected = case.cast(torch.bfloat16).call(fused_linear_distillation, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = case.call(fused_linear_distillation, backend=backend)
    assert torch.equal(out.divergence, expected.divergence)
    out.loss.backward()
    assert case.weight.grad.dtype == torch.float32


def test_autocast_takes_hidden_states_that_are_rounded_already(backend):
    """A model under autocast hands over bfloat16 states beside its float32 lm_head."""
    case = make_case(5, 8, 31, bias=True).cast(torch.float32)
    case.leaves()
    rounded = case.cast(torch.bfloat16)
    expected = rounded.call(fused_linear_distillation, backend=backend)
    expected_logprobs = fused_linear_logprobs(
        rounded.student_hidden, rounded.weight, rounded.targets, bias=rounded.bias, backend=backend
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        case.student_hidden = rounded.student_hidden
        out = case.call(fused_linear_distillation, backend=backend)
        logprobs = fused_linear_logprobs(
            case.student_hidden, case.weight, case.targets, bias=case.bias, backend=backend
        )
    assert torch.equal(out.divergence, expected.divergence)
    assert torch.equal(logprobs.logprobs, expected_logprobs.logprobs)
    out.loss.backward()
    assert case.weight.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone():
    case = make_case(5, 8, 31)
    expected = case.call(fused_linear_distillation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case.call(fused_linear_distillation).divergence, expected.divergence)
