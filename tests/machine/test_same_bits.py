"""What must not change a bit, and what Triton's interpreter computes bit for bit, too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from amd_machine.execute import Schedule
from amd_machine.launch import Compiled, Machine
from interpreted_launches import Recorder, interpreted
from kernel_cases import make_case
from slow import slow_but

from selfdistill_kernels import AdvantageMask, Objective, fused_linear_distillation
from selfdistill_kernels.backends.triton import plan
from selfdistill_kernels.backends.triton.gather import gather_rows
from selfdistill_kernels.backends.triton.product import hidden_product, weight_product
from selfdistill_kernels.tools.audit.record import MACHINES

ARCHITECTURES = ("gfx942", "gfx950")


def everything(on_machine, machine, dtype=torch.bfloat16):
    """Loss, statistics and gradients of a recomputing and of a storing call."""
    on_machine(machine)
    found = []
    for gate in (AdvantageMask(0.05), None):
        case = make_case(17, 56, 150, bias=True, seed=1, dtype=dtype)
        leaves = case.leaves()
        out = case.call(
            fused_linear_distillation, objective=Objective("jsd", 0.3), backend="triton",
            advantage_mask=gate,
        )  # fmt: skip
        found += [
            out.loss, out.divergence, out.student_logprob, out.teacher_logprob, out.entropy,
            *torch.autograd.grad(out.loss, leaves),
        ]  # fmt: skip
    return found


def without_preload(compiled: Compiled) -> Compiled:
    """Starts where firmware does that knows nothing of arguments in registers."""
    return replace(compiled, kernel=replace(compiled.kernel, entry=0, preloaded=0))


def all_far(job):
    """As for tensors in large storage."""
    return replace(job, near=())


@pytest.mark.parametrize("architecture", slow_but(["gfx942"], ARCHITECTURES))
def test_order_turns_addresses_and_entry_change_no_bit(on_machine, architecture):
    """Workgroups and waves in any order, 64-bit addresses in place of buffers, the other entry."""
    expected = everything(on_machine, Machine(architecture))
    assert all(torch.isfinite(tensor).all() for tensor in expected)
    for other in (
        Machine(architecture, Schedule(seed=0)),
        Machine(architecture, Schedule(seed=1)),
        Machine(architecture, told=all_far),
        Machine(architecture, change=without_preload),
    ):
        found = everything(on_machine, other)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert other.launched
    far = everything(on_machine, Machine(architecture, told=all_far))
    assert all(torch.equal(a, b) for a, b in zip(far, expected, strict=True))


@pytest.mark.parametrize("architecture", slow_but(["gfx950"], ARCHITECTURES))
def test_copies_and_exact_products_are_the_interpreters(architecture, tmp_path, uninitialised):
    """Gathers, and products of small integers, whose sums float32 holds exactly."""
    recorder = Recorder(Machine(architecture))
    generator = torch.Generator().manual_seed(0)

    def integers(*shape, dtype=torch.bfloat16):
        return torch.randint(-4, 5, shape, generator=generator).to(dtype)

    index = torch.tensor([3, -1, 0, 16, 2])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        gather_rows(torch.randn(17, 70, generator=generator).to(dtype), index, dtype, recorder)
        gather_rows(
            torch.randn(17, 70, generator=generator), index, dtype, recorder, torch.tensor([0.25])
        )
        machine = MACHINES[architecture]
        tile = plan.configuration(machine, "product", dtype.itemsize)
        count = torch.tensor([13])
        dz = integers(17, 200, dtype=dtype)
        dz[13:] = 0
        made = torch.zeros(17, 72)
        hidden_product(
            machine, tile, recorder, dz, integers(200, 72, dtype=dtype), count, made, add=True
        )
        to = torch.empty(200, 72, dtype=dtype)
        weight_product(machine, tile, recorder, dz, integers(17, 72, dtype=dtype), count, to, None)
        assert made[:13].abs().max() > 4
    names = {name for _, name, *_ in recorder.launches}
    assert names == {"gather_kernel", "product_kernel"}
    for ours, theirs in zip(recorder.after, interpreted(recorder, tmp_path), strict=True):
        for name, value in ours.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, theirs[name]), name
