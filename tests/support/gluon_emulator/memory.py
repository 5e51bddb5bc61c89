"""Shared memory, barriers in it, copies into it and products from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gluon_emulator.schedule import Clock, Fault, Race, Schedule, Thread, join
from gluon_emulator.tensor import Tensor

ITEM_BYTES = 2  # of the 16-bit elements, which are kept as float32


@dataclass(eq=False)
class Barrier:
    """An mbarrier: its phase ends when all have arrived and all expected bytes have.

    Attributes:
        name: for messages. where: number of its allocation, and index in it.
        leader: rank of the only program that waits for it; None: each program has its own.
        count: arrivals that end a phase. arrived, bytes: those of this phase, bytes yet to come.
        phase: number of phases that have ended. arriving: what those who arrived knew; known: the
                same of the last phase that ended.
    """

    name: str
    where: tuple[int, int]
    leader: int | None
    count: int = 0
    arrived: int = 0
    bytes: int = 0
    phase: int = 0
    arriving: Clock = field(default_factory=dict)
    known: Clock = field(default_factory=dict)

    def arrive(self, thread: Thread) -> None:
        self.arrived += 1
        if self.arrived > self.count:
            raise Fault(f"{thread.name} is one too many in a phase of {self.name}")
        thread.publish(self.arriving)
        self._end_phase()

    def expect(self, thread: Thread, number: int) -> None:
        self.bytes += number
        self.arrive(thread)

    def receive(self, number: int, clock: Clock) -> None:
        """Bytes of a copy have landed, perhaps before they were expected."""
        self.bytes -= number
        join(self.arriving, clock)
        self._end_phase()

    def has_ended(self, parity: int) -> bool:
        """Whether the last phase of that parity is over; that before the first has parity 1."""
        return self.phase % 2 != parity

    def _end_phase(self) -> None:
        if self.arrived == self.count and self.bytes == 0:
            self.phase += 1
            self.arrived = 0
            self.known, self.arriving = self.arriving, {}


@dataclass(eq=False)
class Copy:
    """A bulk copy in flight, or landed."""

    name: str
    awaited: bool = False


class Buffer:
    """A tile in shared memory: NaN until a copy has landed.

    Attributes:
        name: for messages. where: number of its allocation, and index in it.
        copy: that writes it, or wrote it last; landed: whether it has.
        read: when each thread had read it last. open: products in flight that read it.
    """

    def __init__(self, name: str, where: tuple[int, int], shape: list[int]) -> None:
        self.name, self.where = name, where
        self.values = np.full(shape, np.nan, np.float32)
        self.copy: Copy | None = None
        self.landed = False
        self.read: Clock = {}
        self.open = 0

    def permute(self, order: tuple[int, ...]) -> View:
        """The transposed view."""
        assert tuple(order) == (1, 0)
        return View(self)

    def begin_copy(self, thread: Thread, copy: Copy) -> None:
        """The copy may write from now on.

        Raises:
            Race: somebody reads it still, or may, or another copy is on its way.
        """
        if self.copy is not None and not self.landed:
            raise Race(f"{copy.name} into {self.name}, where {self.copy.name} is on its way")
        unknown = [name for name, at in self.read.items() if thread.clock.get(name, 0) < at]
        if self.open or unknown:
            who = ", ".join(map(str, unknown)) or "a product in flight"
            raise Race(f"{copy.name} into {self.name}, which {who} may still read")
        self.copy, self.landed = copy, False
        self.values[...] = np.nan

    def begin_read(self, thread: Thread) -> None:
        """A product of this thread reads it from now on.

        Raises:
            Race: the thread did not wait for the copy.
        """
        if self.copy is None or self.copy not in thread.clock:
            what = self.copy.name if self.copy else "a copy that never began"
            raise Race(f"{thread.name} reads {self.name} without having waited for {what}")
        self.open += 1

    def end_read(self, thread: Thread) -> None:
        """The product is done."""
        self.open -= 1
        self.read[thread.name] = thread.time


@dataclass(eq=False)
class View:
    """A buffer, transposed."""

    buffer: Buffer


class Accumulator:
    """The sum of products of which some are in flight; a Tensor once they were waited for."""

    def __init__(self, value: Tensor | None = None) -> None:
        self.value = value

    def __getattr__(self, name: str) -> Any:
        raise Fault(f"the result of a product in flight is used ({name}): wait for it first")


@dataclass(eq=False)
class Product:
    """A product in flight; `to` gets its value when the thread waits for it."""

    left: Buffer
    right: View
    use: bool
    source: Tensor | Accumulator
    to: Accumulator

    def finish(self, thread: Thread) -> None:
        """Multiply what the buffers hold now."""
        product = (self.left.values @ self.right.buffer.values.T).astype(np.float32)
        before = self.source.value if isinstance(self.source, Accumulator) else self.source
        self.to.value = (product + before if self.use else product).view(Tensor)
        self.left.end_read(thread)
        self.right.buffer.end_read(thread)


def warpgroup_mma(
    schedule: Schedule, left: Buffer, right: View, source: Tensor | Accumulator, use: bool
) -> Accumulator:
    """Issue a product of the thread that runs."""
    thread = schedule.thread
    left.begin_read(thread)
    right.buffer.begin_read(thread)
    product = Product(left, right, use, source, Accumulator())
    thread.reading.append(product)
    schedule.pause()
    return product.to


def warpgroup_mma_wait(
    schedule: Schedule, outstanding: int, deps: tuple[Tensor | Accumulator, ...]
) -> tuple[Tensor | Accumulator, ...]:
    """Finish all products of the thread but the last `outstanding`."""
    schedule.pause()
    thread = schedule.thread
    while len(thread.reading) > outstanding:
        product = thread.reading.pop(0)
        assert isinstance(product, Product)
        product.finish(thread)
    return tuple(
        dep.value if isinstance(dep, Accumulator) and dep.value is not None else dep for dep in deps
    )
