"""Programs write disjoint places, and no kernel reads outside of its tensors."""

from __future__ import annotations

import interpreter
import pytest
import torch
from kernel_cases import make_case

from selfdistill_kernels import AdvantageMask, Objective, fused_linear_distillation

GATE = AdvantageMask(0.05)


def everything(case, objective, **options):
    """Loss, statistics and gradients, one list of tensors."""
    leaves = case.leaves()
    out = case.call(fused_linear_distillation, objective=objective, backend="triton", **options)
    return [
        out.loss, out.divergence, out.student_logprob, out.teacher_logprob, out.entropy,
        *torch.autograd.grad(out.loss, leaves),
    ]  # fmt: skip


@pytest.mark.parametrize("divergence", ["forward_kl", "skew_kl"])
@pytest.mark.parametrize("gate", [None, GATE], ids=["store", "recompute"])
def test_order_of_programs_does_not_change_a_bit(divergence, gate):
    objective = Objective(divergence, 0.3)
    # Every kernel has several programs, most of them one for each token.
    case = make_case(21, interpreter.RAGGED_HIDDEN, 140, bias=True, seed=1, dtype=torch.float32)
    expected = everything(case, objective, advantage_mask=gate)
    for seed in range(2):
        with interpreter.shuffled(seed):
            found = everything(case, objective, advantage_mask=gate)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_race_would_show():
    """The shuffle does change the result of programs that depend on their order."""
    import triton
    import triton.language as tl

    @triton.jit
    def racing(to):
        tl.store(to, tl.program_id(0))

    seen = set()
    for seed in range(4):
        to = torch.zeros(1, dtype=torch.int32)
        with interpreter.shuffled(seed):
            racing[(8,)](to)
        seen.add(to.item())
    assert len(seen) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [64, 65], ids=["descriptors", "pointers"])
@pytest.mark.parametrize("gate", [None, GATE], ids=["store", "recompute"])
def test_no_access_outside_of_tensors(dtype, hidden, gate):
    """Every tensor of every launch is checked element by element (interpreter.guarded)."""
    case = make_case(9, hidden, 203, bias=True, seed=2, softcap=20.0).cast(dtype)
    expected = everything(case, Objective("jsd", 0.3), advantage_mask=gate)
    with interpreter.guarded() as guard:
        found = everything(case, Objective("jsd", 0.3), advantage_mask=gate)
    assert guard.launches > 3
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_access_outside_would_be_caught():
    import triton
    import triton.language as tl
    from triton.runtime.errors import InterpreterError

    @triton.jit
    def reaching(source, to):
        tl.store(to, tl.load(source + 4))

    with interpreter.guarded(), pytest.raises(InterpreterError, match="outside"):
        reaching[(1,)](torch.zeros(8)[:4], torch.zeros(1))
