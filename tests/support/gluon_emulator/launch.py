"""Translates a Gluon kernel's functions to plain Python, and runs a grid of clusters."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from gluon_emulator.memory import (
    ITEM_BYTES,
    Barrier,
    Buffer,
    Copy,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from gluon_emulator.schedule import Fault, Schedule, Thread, join
from gluon_emulator.tensor import Functions, Pointer, tensor

Edits = Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Descriptor:
    """A tensor descriptor of a matrix of 16-bit elements, kept as float32.

    Attributes:
        matrix: [rows, columns]. block: rows and columns of a copy, of the whole cluster.
        divided: each program of a cluster copies its part of the block's rows; else all of it.
    """

    matrix: np.ndarray
    block: tuple[int, int]
    divided: bool

    dtype = np.float32

    @property
    def block_type(self) -> Any:
        return SimpleNamespace(shape=list(self.block))

    @property
    def layout(self) -> bool:
        return self.divided


def launch(
    kernel: Any,
    arguments: Mapping[str, Any],
    *,
    programs: int,
    cluster: int = 1,
    seed: int = 0,
    edits: Edits | None = None,
) -> None:
    """Run `programs` clusters, one after another.

    Args:
        kernel: a gluon.jit function, whose last statement is its warp_specialize.
        arguments: by name. Arrays are flat memory, Descriptors and numbers themselves.
        programs: clusters of the grid, of `cluster` programs each.
        seed: of the schedule.
        edits: function -> (text, what it reads instead): a fault to plant.

    Raises:
        Fault: what the emulator noticed. ValueError: an edit whose text is not there once.
    """
    for number in range(programs):
        _Cluster(number, programs, cluster, seed + number, edits or {}).run(kernel, arguments)


class _Cluster:
    def __init__(self, number: int, programs: int, size: int, seed: int, edits: Edits) -> None:
        self.number, self.programs, self.size, self.edits = number, programs, size, edits
        self.schedule = Schedule(seed)
        self.places: dict[tuple[int, int, int], Barrier | Buffer] = {}
        self.copies: list[Copy] = []

    def run(self, kernel: Any, arguments: Mapping[str, Any]) -> None:
        threads = [
            thread
            for rank in range(self.size)
            for thread in _Program(self, rank).threads(kernel, arguments)
        ]
        with np.errstate(all="ignore"):
            self.schedule.run(threads)
        for copy in self.copies:
            if not copy.awaited:
                raise Fault(f"{copy.name} was never waited for")


class _Program:
    """One program of a cluster: its functions, its shared memory and its partitions."""

    def __init__(self, cluster: _Cluster, rank: int) -> None:
        self.cluster, self.rank = cluster, rank
        self.schedule = cluster.schedule
        self.allocations = 0
        self.partitions: list[Thread] = []
        self._translated: dict[int, Any] = {}

    def threads(self, kernel: Any, arguments: Mapping[str, Any]) -> list[Thread]:
        """Run the kernel as far as its partitions."""
        self._translate(kernel)(
            **{
                name: Pointer(value) if isinstance(value, np.ndarray) else
                tensor(value) if isinstance(value, int) and name.islower() else value
                for name, value in arguments.items()
            }
        )  # fmt: skip
        return self.partitions

    # ---- translation -----------------------------------------------------------------------------

    def _translate(self, value: Any) -> Any:
        """A global of the kernel as this program sees it."""
        if isinstance(value, ModuleType):
            return {"mbarrier": self._mbarrier, "tma": None}.get(
                value.__name__.rpartition(".")[2], self._language
            )()  # type: ignore[misc]
        if hasattr(value, "value") and type(value).__name__ == "constexpr":
            return value.value
        own = getattr(self, f"_{getattr(value, '__name__', '')}", None)
        if own is not None and not hasattr(value, "fn"):
            return own
        if hasattr(value, "fn"):
            return self._function(value.fn)
        return value

    def _function(self, function: FunctionType) -> Any:
        if id(function) not in self._translated:
            scope: dict[str, Any] = {"__builtins__": __builtins__}
            code = self._edited(function)
            made = FunctionType(code, scope, function.__name__, function.__defaults__)
            self._translated[id(function)] = made
            for name in code.co_names:
                if name in function.__globals__:
                    scope[name] = self._translate(function.__globals__[name])
        return self._translated[id(function)]

    def _edited(self, function: FunctionType) -> Any:
        if function.__name__ not in self.cluster.edits:
            return function.__code__
        old, new = self.cluster.edits[function.__name__]
        source = textwrap.dedent(inspect.getsource(function))
        source = source[re.search(r"^def ", source, re.MULTILINE).start() :]  # type: ignore[union-attr]
        if source.count(old) != 1:
            raise ValueError(f"{function.__name__} does not read {old!r} once")
        scope: dict[str, Any] = {}
        exec("from __future__ import annotations\n" + source.replace(old, new), scope)
        return scope[function.__name__].__code__

    # ---- gl --------------------------------------------------------------------------------------

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
        number = self.allocations
        self.allocations += 1
        for index in range(shape[0]):
            where = (number, index)
            name = f"{'barrier' if dtype is np.int64 else 'buffer'} {number}[{index}]"
            made: Barrier | Buffer = (
                Barrier(f"{name} of program {self.rank}", 0 if layout == "whole" else None)
                if dtype is np.int64
                else Buffer(f"{name} of program {self.rank}", np.full(shape[1:], np.nan, np.float32))
            )
            self.cluster.places[(self.rank, *where)] = made
        return SimpleNamespace(index=lambda index: self._at(number, int(index), layout))

    def _at(self, number: int, index: int, layout: Any) -> Any:
        rank = 0 if layout == "whole" else self.rank
        place = self.cluster.places[(rank, number, index)]
        place.where = (number, index)  # type: ignore[union-attr]
        return place

    def _warp_specialize(self, parts: list[Any], warps: list[int], registers: list[int]) -> None:
        for number, (function, arguments) in enumerate(parts):
            name = f"{function.__name__} {number}" + (
                f" of program {self.rank}" if self.cluster.size > 1 else ""
            )
            self.partitions.append(Thread(name, self.rank, partial(function, *arguments)))

    # ---- barriers, copies, products --------------------------------------------------------------

    def _mbarrier(self) -> Any:
        return SimpleNamespace(
            MBarrierLayout=lambda bases=None: "whole" if bases == [[0]] else "own",
            init=self._init,
            wait=self._wait,
            arrive=self._arrive,
            expect=self._expect,
        )

    def _init(self, barrier: Barrier, count: int) -> None:
        whole = barrier.leader is not None
        barrier.init(count * self.cluster.size if whole else count)

    def _wait(self, barrier: Barrier, phase: Any) -> None:
        if barrier.leader not in (None, self.rank):
            return
        parity = int(phase)
        self.schedule.pause(
            lambda: barrier.has_ended(parity), f"parity {parity} of {barrier.name}"
        )
        join(self.schedule.thread.clock, barrier.known)
        for name in barrier.known:
            if isinstance(name, Copy):
                name.awaited = True

    def _arrive(self, barrier: Barrier, pred: Any = True) -> None:
        self.schedule.pause()
        if pred:
            barrier.arrive(self.schedule.thread)

    def _expect(self, barrier: Barrier, number: int) -> None:
        self.schedule.pause()
        barrier.expect(self.schedule.thread, int(number))

    def _async_load(
        self, source: Descriptor, at: list[Any], barrier: Any, to: Any, multicast: bool = False
    ) -> None:
        self.schedule.pause()
        if multicast and self.rank != 0:
            return
        thread = self.schedule.thread
        row, column = (int(x) for x in at)
        rows = slice(0, source.block[0])
        if source.divided:
            part = source.block[0] // self.cluster.size
            rows = slice(self.rank * part, (self.rank + 1) * part)
        values = np.zeros((rows.stop - rows.start, source.block[1]), np.float32)
        inside = source.matrix[row + rows.start : row + rows.stop, column:][:, : source.block[1]]
        values[: inside.shape[0], : inside.shape[1]] = inside
        for rank in range(self.cluster.size) if multicast else [self.rank]:
            buffer: Any = self.cluster.places[(rank, *to.where)]
            ready: Any = self.cluster.places[(rank, *barrier.where)]
            copy = Copy(f"the copy of [{row}, {column}]")
            self.cluster.copies.append(copy)
            buffer.begin_copy(thread, copy)
            self.schedule.events.append(
                partial(_land, buffer, ready, rows, values, {**thread.clock, copy: 1})
            )

    _async_copy_global_to_shared = _async_load

    def _fence_async_shared(self) -> None:
        """Orders writes that are no copies; there are none."""

    def _warpgroup_mma(self, left: Any, right: Any, to: Any, use_acc: Any, is_async: bool) -> Any:
        assert is_async
        return warpgroup_mma(self.schedule, left, right, to, bool(use_acc))

    def _warpgroup_mma_wait(self, outstanding: int, deps: Any) -> Any:
        return warpgroup_mma_wait(self.schedule, outstanding, deps)


def _land(
    buffer: Buffer, ready: Barrier, rows: slice, values: np.ndarray, clock: dict[Any, int]
) -> None:
    buffer.values[rows] = values
    buffer.landed = True
    ready.receive(ITEM_BYTES * values.size, clock)


Runner = Callable[..., None]
