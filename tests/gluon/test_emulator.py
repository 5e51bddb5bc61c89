"""The emulator on kernels small enough to follow by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gluon_emulator import Deadlock, Fault, Race, launch
from gluon_emulator.memory import Barrier
from gluon_emulator.schedule import Thread
from gluon_emulator.tensor import Functions, fma, tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
LEFT = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
RIGHT = torch.tensor([[5.0, 6.0], [7.0, 8.0]], dtype=torch.bfloat16)


def descriptor(matrix: torch.Tensor, block: tuple[int, int] = (2, 2)) -> SimpleNamespace:
    """What the emulator reads of a tensor descriptor; a real one has no block so small."""
    return SimpleNamespace(base=matrix, block_shape=block, layout=SimpleNamespace(cga_layout=None))


@gluon.jit
def _copies(left, right, tiles, ready, row):
    mbarrier.expect(ready, 16)
    copy(left, [row, 0], ready, tiles.index(0))
    copy(right, [0, 0], ready, tiles.index(1))


@gluon.jit
def _multiplies(to, tiles, ready):
    mbarrier.wait(ready, 0)
    total = gl.zeros((2, 2), gl.float32, None)
    total = warpgroup_mma(tiles.index(0), tiles.index(1).permute((1, 0)), total, is_async=True,
                          use_acc=True)  # fmt: skip
    total = warpgroup_mma_wait(0, deps=(total,))[0]
    at = gl.arange(0, 2, None)
    gl.store(to + at[:, None] * 2 + at[None, :], total)


@gluon.jit
def product_kernel(left, right, to, row, ARRIVALS: gl.constexpr):
    """left[row:] right^T of 2 x 2 tiles: one partition copies, the other multiplies."""
    tiles = gl.allocate_shared_memory(gl.bfloat16, [2, 2, 2], None)
    ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout()).index(0)
    mbarrier.init(ready, count=ARRIVALS)
    gl.warp_specialize(
        [(_multiplies, (to, tiles, ready)), (_copies, (left, right, tiles, ready, row))], [1], [24]
    )


def product(row: int = 0, arrivals: int = 1, seed: int = 0, size: int = 4, **edits: tuple) -> list:
    to = torch.full((size,), float("nan"))
    arguments = {"left": descriptor(LEFT), "right": descriptor(RIGHT), "to": to, "row": row}
    launch(product_kernel, 1, arguments, {"ARRIVALS": arrivals}, seed=seed, edits=edits)
    return to.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_a_product(seed):
    assert product(seed=seed) == [17.0, 23.0, 39.0, 53.0]  # [[1, 2], [3, 4]] [[5, 7], [6, 8]]


def test_a_copy_past_the_end_brings_zeros():
    assert product(row=1) == [39.0, 53.0, 0.0, 0.0]


def test_who_does_not_wait_is_told_so():
    with pytest.raises(Race, match=r"_multiplies 0 of program 0 reads buffer 0\[0\]"):
        product(_multiplies=("mbarrier.wait(ready, 0)", "pass"))


def test_who_waits_for_ever_is_told_so():
    with pytest.raises(
        Deadlock, match=r"_multiplies 0 of program 0 for parity 0 of barrier 1\[0\]"
    ):
        product(arrivals=2)


def test_an_arrival_too_many_is_told():
    with pytest.raises(Fault, match=r"one too many in a phase of barrier 1\[0\]"):
        product(_copies=("mbarrier.expect(ready, 16)",
                         "mbarrier.expect(ready, 16); mbarrier.arrive(ready)"))  # fmt: skip


def test_a_store_past_the_end_is_told():
    with pytest.raises(Fault, match="an access at 3 of 3 elements"):
        product(size=3)


def test_a_copy_that_nobody_waits_for_is_told():
    with pytest.raises(Fault, match=r"the copy of \[0, 0\] was never waited for"):
        product(_multiplies=("mbarrier.wait(ready, 0)", "return"))


def test_a_result_in_flight_is_no_tensor():
    with pytest.raises(Fault, match="a product in flight"):
        product(_multiplies=("warpgroup_mma_wait(0", "warpgroup_mma_wait(1"))


def test_phases_of_a_barrier():
    """Two arrivals and 8 bytes end a phase, in whatever order they come."""
    barrier, thread = Barrier("a barrier", (0, 0), None, count=2), Thread("a thread", lambda: None)
    assert barrier.has_ended(1)  # the phase before the first
    assert not barrier.has_ended(0)
    barrier.receive(8, {"the copy": 1})
    barrier.arrive(thread)
    barrier.expect(thread, 16)
    assert not barrier.has_ended(0)
    barrier.receive(8, {"another": 1})
    assert barrier.has_ended(0)
    assert not barrier.has_ended(1)
    assert barrier.known == {"the copy": 1, "another": 1, "a thread": 2}


def test_an_access_is_known_once_its_thread_arrived_after_it():
    thread, clock = Thread("a thread", lambda: None), {}
    before = thread.time
    thread.publish(clock)
    assert clock["a thread"] == before < thread.time


def test_numbers_are_rounded_as_on_a_gpu():
    a = np.float32(1 + 2**-12)
    assert fma(a, a, np.float32(-1)) == np.float32(2**-11 + 2**-24)  # a product in float32 is less
    larger = Functions.maximum(tensor([np.nan, 1.0]), tensor([2.0, np.nan]))
    assert larger.tolist() == [2.0, 1.0]
    total = tensor([1.0, 2.0], np.float32)
    other = total
    other += 1.0
    assert (total.tolist(), other.tolist(), other.dtype) == ([1.0, 2.0], [2.0, 3.0], np.float32)
