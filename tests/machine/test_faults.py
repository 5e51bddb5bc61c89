"""What the machine notices: faults planted in shipped kernels, and in small ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from amd_machine.assembly import assemble, run_assembly
from amd_machine.execute import Fault, Race, Schedule
from amd_machine.launch import Compiled, Machine
from amd_machine.program import Program, operations
from kernel_cases import make_case
from triton_case import check

from selfdistill_kernels import AdvantageMask, Objective
from selfdistill_kernels.backends.triton.gather import gather_rows
from selfdistill_kernels.backends.triton.launch import Warps

GATE = AdvantageMask(0.05)


def recompute(on_machine, machine, launch=None):
    """A problem that ends within tiles, through sweep, gradient and products, against float64."""
    on_machine(machine, launch)
    case = make_case(17, 56, 150, seed=3)
    check(case, Objective("forward_kl"), torch.bfloat16, advantage_mask=GATE)


def without(compiled: Compiled, at: int) -> Compiled:
    """The same code, and nothing in place of one instruction."""
    program = replace(compiled.program, table=compiled.program.table.copy())
    program.table[at]["operation"] = operations()["S_NOP"]
    return replace(compiled, program=program)


def swapped_operands(compiled: Compiled) -> Compiled:
    """A B in place of B A: what a wrong layout of operands amounts to."""
    program = replace(compiled.program, table=compiled.program.table.copy())
    for at in program.indices("MFMA"):
        program.table[at]["source"][:2] = program.table[at]["source"][1::-1].copy()
    return replace(compiled, program=program)


def test_a_wrong_order_of_matrix_operands_is_caught(on_machine):
    with pytest.raises(AssertionError, match="relative error"):
        recompute(on_machine, Machine("gfx942", change=swapped_operands))


def test_an_unmasked_tail_is_caught(on_machine):
    """The vocabulary ends within a tile, and the kernels are told that it does not."""
    machine = Machine("gfx942")

    def unmasked(kernel, programs, shape, arguments, constants):
        told = {**constants, "MASKED": False} if "MASKED" in constants else constants
        machine(kernel, programs, shape, arguments, told)

    with pytest.raises((Fault, AssertionError)):
        recompute(on_machine, machine, unmasked)


def test_a_store_past_the_end_is_caught():
    @triton.jit
    def reaching(to, BLOCK: tl.constexpr):
        tl.store(to + tl.arange(0, BLOCK), 1.0)

    to = torch.zeros(256)
    with pytest.raises(Fault, match=r"outside of the launch's tensors.*STORE"):
        Machine("gfx942")(reaching, 1, Warps(1), {"to": to[:200]}, {"BLOCK": 256})


def test_a_wrong_pointer_range_is_caught():
    """A row 2 GiB behind the first: read by 64-bit addresses unless something claims otherwise."""
    rows = 2**31 // 128 + 2
    source = torch.empty(rows, 64, dtype=torch.bfloat16)  # takes memory where it is touched
    source[-1] = torch.arange(64)
    index = torch.tensor([rows - 1])
    machine = Machine("gfx942")
    found = gather_rows(source, index, torch.bfloat16, machine)
    assert torch.equal(found[0], source[-1])
    assert "source" in machine.launched[0].compiled.job.far

    def claim(job):
        return replace(job, near=tuple(name for name, kind in job.signature if kind[0] == "*"))

    wrong = gather_rows(source, index, torch.bfloat16, Machine("gfx942", told=claim))
    assert not torch.equal(wrong[0], source[-1])


def test_reading_what_nobody_wrote_is_caught(on_machine):
    """Without one of the sweep's first loads its registers hold poison, which is no number."""

    def forgetful(compiled: Compiled) -> Compiled:
        if compiled.job.name != "sweep":
            return compiled
        return without(compiled, compiled.program.indices("BUFFER_LOAD")[0])

    with pytest.raises((AssertionError, Fault)):
        recompute(on_machine, Machine("gfx942", change=forgetful))


EXCHANGE = """
    v_lshlrev_b32 v1, 2, v0
    ds_write_b32 v1, v0
    s_waitcnt lgkmcnt(0)
    s_barrier
    v_xor_b32 v1, 0x100, v1
    ds_read_b32 v2, v1
    s_barrier
    ds_write_b32 v1, v2
"""


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_waves_that_nothing_orders_are_caught_in_any_order(seed):
    """Two waves write, exchange and overwrite; each of the two barriers is needed."""
    waves = run_assembly(EXCHANGE, lds=512, waves=2, seed=seed)
    assert (waves[0].vectors[2] == np.arange(64, 128)).all()
    barriers = Program.of(assemble(EXCHANGE)).indices("S_BARRIER")
    assert len(barriers) == 2
    with pytest.raises(Fault, match="nothing orders"):
        run_assembly(EXCHANGE, lds=512, waves=2, seed=seed, removed_barrier=barriers[0])


def test_workgroups_that_write_one_place_are_caught():
    @triton.jit
    def racing(to):
        tl.store(to, tl.program_id(0))

    with pytest.raises(Fault, match="nothing orders"):
        Machine("gfx942")(racing, 3, Warps(1), {"to": torch.zeros(1, dtype=torch.int32)}, {})


# ---- barriers ------------------------------------------------------------------------------------


class BarrierByBarrier:
    """A launcher that runs the first launch of each kernel once more without each of its barriers.

    Attributes:
        noticed: kernel -> barriers without which two waves touch a byte unordered.
        redundant: kernel -> barriers that order no two accesses of the launch; without them, in
            shuffled turns, every bit is the same.
    """

    def __init__(self, architecture: str) -> None:
        self.machine = Machine(architecture, Schedule(seed=1))
        self.noticed: dict[str, int] = {}
        self.redundant: dict[str, int] = {}

    def __call__(self, kernel, programs, shape, arguments, constants):
        tensors = [v for v in arguments.values() if isinstance(v, torch.Tensor)]
        before = [tensor.clone() for tensor in tensors]
        self.machine(kernel, programs, shape, arguments, constants)
        compiled = self.machine.launched[-1].compiled
        name = compiled.job.name
        if name in self.noticed:
            return
        after = [tensor.clone() for tensor in tensors]
        self.noticed[name] = self.redundant[name] = 0
        for at in compiled.program.indices("S_BARRIER"):
            if not compiled.program.hits[at]:
                continue
            schedule = Schedule(seed=2, removed_barrier=at)
            again = [
                Machine(self.machine.architecture, schedule),
                Machine(
                    self.machine.architecture,
                    Schedule(seed=3),
                    change=lambda compiled, at=at: without(compiled, at),
                ),
            ]
            try:
                for machine in again:
                    for tensor, value in zip(tensors, before, strict=True):
                        tensor.copy_(value)
                    machine(kernel, programs, shape, arguments, constants)
                    for tensor, value in zip(tensors, after, strict=True):
                        assert torch.equal(tensor.nan_to_num(), value.nan_to_num())
                self.redundant[name] += 1
            except Race:
                self.noticed[name] += 1
        for tensor, value in zip(tensors, after, strict=True):
            tensor.copy_(value)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gfx942", "gfx950"])
def test_every_barrier_is_needed_or_orders_nothing(on_machine, architecture, capsys):
    barriers = BarrierByBarrier(architecture)
    on_machine(barriers.machine, barriers)
    for divergence, gate in (("forward_kl", None), ("skew_kl", GATE)):
        case = make_case(17, 56, 150, seed=3)
        check(case, Objective(divergence, 0.3), torch.bfloat16, advantage_mask=gate)
    with capsys.disabled():
        print(f"\n{architecture}: needed {barriers.noticed}, redundant {barriers.redundant}")
    with_lds = {"row_statistics", "sweep", "mixture", "gradient", "product"}
    assert with_lds <= barriers.noticed.keys()
    assert all(barriers.noticed[name] for name in with_lds)
