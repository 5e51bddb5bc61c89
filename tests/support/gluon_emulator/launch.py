"""Runs a grid of clusters of programs, and the operations of Gluon that take part in a schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from gluon_emulator.memory import (
    ITEM_BYTES,
    Barrier,
    Buffer,
    Copy,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from gluon_emulator.schedule import Clock, Fault, Schedule, Thread, join
from gluon_emulator.tensor import Functions, Pointer, tensor
from gluon_emulator.translate import Edits, Translation

WHOLE = "one barrier for the whole cluster"


@dataclass(frozen=True)
class Descriptor:
    """A tensor descriptor of a matrix of 16-bit elements, which are kept as float32.

    Attributes:
        matrix: [rows, columns]. block: rows and columns of a copy, of the whole cluster.
        divided: each program of a cluster copies its part of the block's rows; else all of it.
    """

    matrix: np.ndarray
    block: tuple[int, ...]
    divided: bool
    dtype = np.float32

    @classmethod
    def of(cls, descriptor: Any) -> Descriptor:
        """From what a launch on a GPU is given."""
        bases = [list(basis) for basis in descriptor.layout.cga_layout or []]
        if bases not in ([], [[0, 0]], [[1, 0]]):
            raise NotImplementedError(f"a layout over the cluster of {bases}")
        matrix = descriptor.base.detach().float().numpy()
        return cls(matrix, tuple(descriptor.block_shape), bases == [[1, 0]])

    @property
    def layout(self) -> None:
        return None


def launch(
    kernel: Any,
    programs: int,
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    *,
    cluster: int = 1,
    seed: int = 0,
    edits: Edits | None = None,
) -> None:
    """Run `programs` clusters, one after another.

    Args:
        kernel: a gluon.jit function, whose last statement is its warp_specialize.
        programs: clusters of the grid, of `cluster` programs each.
        arguments, constants: by name, as a launch on a GPU takes them; tensors are on the CPU.
        seed: of the schedule.
        edits: function -> (text, what it reads instead): a fault to plant.

    Raises:
        Fault: what the emulator noticed. ValueError: an edit whose text is not there once.
    """
    given = {name: _argument(value) for name, value in arguments.items()}
    for number in range(programs):
        _Cluster(number, programs, cluster, seed + number, edits or {}).run(
            kernel, {**given, **constants}
        )


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Pointer(value.view(-1).numpy())
    if isinstance(value, int):
        return tensor(value)
    if value is None:
        return None
    return Descriptor.of(value)


class _Cluster:
    """The programs that share memory.

    Attributes:
        places: what a program has at an allocation's index, by (program, allocation, index).
        copies: all that were begun.
    """

    def __init__(self, number: int, programs: int, size: int, seed: int, edits: Edits) -> None:
        self.number, self.programs, self.size, self.edits = number, programs, size, edits
        self.schedule = Schedule(seed)
        self.places: dict[tuple[int, int, int], Any] = {}
        self.copies: list[Copy] = []

    def run(self, kernel: Any, arguments: Mapping[str, Any]) -> None:
        threads: list[Thread] = []
        for rank in range(self.size):
            program = _Program(self, rank)
            program.translation.function(kernel)(**arguments)
            threads += program.partitions
        with np.errstate(all="ignore"):
            self.schedule.run(threads)
        for copy in self.copies:
            if not copy.awaited:
                raise Fault(f"{copy.name} was never waited for")


class _Program:
    """One program of a cluster: its shared memory, its partitions, and what its code calls."""

    def __init__(self, cluster: _Cluster, rank: int) -> None:
        self.cluster, self.rank, self.schedule = cluster, rank, cluster.schedule
        self.partitions: list[Thread] = []
        self._allocations = 0
        self.translation = Translation(
            modules={
                "mbarrier": SimpleNamespace(
                    MBarrierLayout=lambda bases=None: WHOLE if bases == [[0]] else None,
                    init=self._init,
                    wait=self._wait,
                    arrive=self._arrive,
                    expect=self._expect,
                ),
                "language": self._language(),
            },
            functions={
                "async_load": self._async_load,
                "async_copy_global_to_shared": self._async_load,
                "fence_async_shared": lambda: None,  # orders stores, and there are none
                "warpgroup_mma": self._warpgroup_mma,
                "warpgroup_mma_wait": partial(warpgroup_mma_wait, self.schedule),
            },
            edits=cluster.edits,
        )

    def _language(self) -> Any:
        names = {n: getattr(Functions, n) for n in dir(Functions) if not n.startswith("_")}
        return SimpleNamespace(
            **names,
            program_id=lambda axis: tensor(self.cluster.number),
            num_programs=lambda axis: self.cluster.programs,
            allocate_shared_memory=self._allocate,
            store=self._store,
            warp_specialize=self._warp_specialize,
        )

    def _store(self, pointer: Pointer, value: Any, mask: Any = None) -> None:
        rows = value.shape[0] // self.cluster.size
        pointer.store(value, mask, slice(self.rank * rows, (self.rank + 1) * rows))

    def _allocate(self, dtype: Any, shape: list[int], layout: Any) -> Any:
        number = self._allocations
        self._allocations += 1
        leader = 0 if layout == WHOLE else None
        for index in range(shape[0]):
            name = f"{number}[{index}] of program {self.rank}"
            self.cluster.places[self.rank, number, index] = (
                Barrier(f"barrier {name}", (number, index), leader)
                if dtype is np.int64
                else Buffer(f"buffer {name}", (number, index), shape[1:])
            )
        rank = self.rank if leader is None else leader
        return SimpleNamespace(index=lambda at: self.cluster.places[rank, number, int(at)])

    def _warp_specialize(self, parts: list[Any], warps: list[int], registers: list[int]) -> None:
        assert len(parts) == len(warps) + 1 == len(registers) + 1
        for number, (function, arguments) in enumerate(parts):
            name = f"{function.__name__} {number} of program {self.rank}"
            self.partitions.append(Thread(name, partial(function, *arguments)))

    # ---- barriers, copies, products --------------------------------------------------------------

    def _init(self, barrier: Barrier, count: int) -> None:
        """A barrier of the whole cluster counts the arrivals of all programs."""
        barrier.count = count if barrier.leader is None else count * self.cluster.size

    def _wait(self, barrier: Barrier, phase: Any) -> None:
        if barrier.leader not in (None, self.rank):
            return  # only the first program of a cluster waits for what all arrive at
        parity = int(phase)
        self.schedule.pause(lambda: barrier.has_ended(parity), f"parity {parity} of {barrier.name}")
        join(self.schedule.thread.clock, barrier.known)
        for event in barrier.known:
            if isinstance(event, Copy):
                event.awaited = True

    def _arrive(self, barrier: Barrier, pred: Any = True) -> None:
        self.schedule.pause()
        if pred:
            barrier.arrive(self.schedule.thread)

    def _expect(self, barrier: Barrier, number: int) -> None:
        self.schedule.pause()
        barrier.expect(self.schedule.thread, int(number))

    def _async_load(
        self, source: Descriptor, at: list[Any], ready: Barrier, to: Buffer, multicast: bool = False
    ) -> None:
        self.schedule.pause()
        if multicast and self.rank != 0:
            return  # the first program copies for all of them
        thread = self.schedule.thread
        row, column = (int(x) for x in at)
        rows = slice(0, source.block[0])
        if source.divided:
            part = source.block[0] // self.cluster.size
            rows = slice(self.rank * part, (self.rank + 1) * part)
        inside = source.matrix[row + rows.start : row + rows.stop, column:][:, : source.block[1]]
        values = np.zeros((rows.stop - rows.start, source.block[1]), np.float32)
        values[: inside.shape[0], : inside.shape[1]] = inside
        for rank in range(self.cluster.size) if multicast else [self.rank]:
            buffer: Buffer = self.cluster.places[(rank, *to.where)]
            barrier: Barrier = self.cluster.places[(rank, *ready.where)]
            copy = Copy(f"the copy of [{row}, {column}]")
            self.cluster.copies.append(copy)
            buffer.begin_copy(thread, copy)
            known = {**thread.clock, copy: 1}
            self.schedule.events.append(partial(_land, buffer, barrier, rows, values, known))

    def _warpgroup_mma(self, left: Any, right: Any, to: Any, use_acc: Any, is_async: bool) -> Any:
        assert is_async
        return warpgroup_mma(self.schedule, left, right, to, bool(use_acc))


def _land(buffer: Buffer, ready: Barrier, rows: slice, values: np.ndarray, known: Clock) -> None:
    buffer.values[rows] = values
    buffer.landed = True
    ready.receive(ITEM_BYTES * values.size, known)
