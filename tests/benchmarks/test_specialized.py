"""Loops are found in machine code, and the loops to mark are still written as they were."""

from __future__ import annotations

import pytest

from benchmarks.specialized import LOOPS, Loop, attainable, loops, marked
from selfdistill_kernels.backends.triton.sweep import sweep_kernel

# A loop in a loop; behind the code, a wait that jumps back into the inner one, and one that spins.
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;            /* 0x00 */
        /*0010*/                   FADD R2, R2, R3 ;                 /* 0x00 */
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R8, gdesc[UR8], R8 ;
        /*0030*/              @!P0 BRA 0x80 ;
        /*0040*/               @P1 BRA 0x20 ;
        /*0050*/                   FMUL R2, R2, R4 ;
        /*0060*/               @P2 BRA P3, 0x10 ;
        /*0070*/                   EXIT ;
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R0], R5 ;
        /*0090*/              @!P0 BRA 0x80 ;
        /*00a0*/                   BRA 0x40 ;
"""


def test_loops_by_hand():
    assert loops(SASS) == [
        Loop(0x10, 0x60, instructions=3, tensor=0, depth=0),
        Loop(0x20, 0x40, instructions=3, tensor=1, depth=1),
        Loop(0x80, 0x90, instructions=2, tensor=0, depth=0),
    ]
    assert [str(loop) for loop in loops(SASS)] == ["3 (0)", ">3 (1)", "2 (0)"]


@pytest.mark.parametrize("name", LOOPS)
def test_a_marked_loop_is_other_code(name):
    function, _ = LOOPS[name]
    shipped, source = sweep_kernel.cache_key, function.src
    with marked(name):
        assert function.src.count("warp_specialize=True") == 1
        assert sweep_kernel.cache_key != shipped
    assert function.src == source
    assert sweep_kernel.cache_key == shipped


def test_a_loop_that_is_written_otherwise_is_named(monkeypatch):
    monkeypatch.setitem(LOOPS, "tiles", (sweep_kernel, "range(nothing)"))
    with (
        pytest.raises(ValueError, match="the loop over tiles no longer reads 'range"),
        marked("tiles"),
    ):
        pass


def test_the_attainable_share_by_hand():
    """64 steps of 1,024 clocks, which shared memory makes 1,152; two warps share a scheduler."""
    assert attainable(0) == pytest.approx(1024 / 1152)
    assert attainable(5000) == pytest.approx(65536 / (73728 + 10000))
    assert attainable(5000, stages_ahead=4) == pytest.approx(65536 / (73728 + 10000 - 4 * 512))
    assert attainable(1000, stages_ahead=4, hidden=1024) == pytest.approx(1024 / 1152)
