"""Threads of which one runs at a time, in an order that a seed decides, and their vector clocks."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Hashable, Iterable

Clock = dict[Hashable, int]


class Fault(RuntimeError):
    """The kernel does what a GPU would not forgive."""


class Race(Fault):
    """An access that no barrier orders after the one before."""


class Deadlock(Fault):
    """Everybody waits."""


class Stopped(BaseException):
    """Ends a thread because another one failed."""


def join(clock: Clock, other: Clock) -> None:
    """Make `clock` know all that `other` knows."""
    for name, time in other.items():
        clock[name] = max(time, clock.get(name, 0))


class Thread:
    """A partition of a program.

    Attributes:
        name: for messages, and in clocks. clock: what it knows of everybody's steps.
        condition: that it waits for, in words `waits_for`.
        reading: products in flight, the oldest first (memory.Product).
    """

    def __init__(self, name: str, body: Callable[[], None]) -> None:
        self.name = name
        self.clock: Clock = {name: 1}
        self.reading: list[object] = []
        self._body = body
        self._go = threading.Semaphore(0)
        self.condition: Callable[[], bool] | None = None
        self.waits_for = ""
        self.finished = False

    @property
    def time(self) -> int:
        """Its own step, which others know once it has arrived somewhere after it."""
        return self.clock[self.name]

    def publish(self, clock: Clock) -> None:
        """Tell `clock` all that happened so far; what follows is later."""
        join(clock, self.clock)
        self.clock[self.name] += 1


class Schedule:
    """Runs threads and events in turns.

    Args:
        seed: of the order. Each seed is one interleaving, the same each time.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._back = threading.Semaphore(0)
        self._current: Thread | None = None
        self._error: BaseException | None = None
        self._stopping = False
        self.events: list[Callable[[], None]] = []

    @property
    def thread(self) -> Thread:
        """The one that runs."""
        assert self._current is not None
        return self._current

    def pause(self, until: Callable[[], bool] | None = None, what: str = "") -> None:
        """Let others go first; come back once `until` holds."""
        thread = self.thread
        thread.condition, thread.waits_for = until, what
        self._back.release()
        thread._go.acquire()
        if self._stopping:
            raise Stopped

    def run(self, threads: Iterable[Thread]) -> None:
        """Run all of them to their ends, and all events.

        Raises:
            Deadlock: nothing can go on.
            Exception: the first that a thread raised.
        """
        threads = list(threads)
        workers = [threading.Thread(target=self._work, args=(t,), daemon=True) for t in threads]
        for worker in workers:
            worker.start()
        try:
            while any(not thread.finished for thread in threads) or self.events:
                self._step(threads)
        finally:
            self._stopping = True
            for thread in threads:
                thread._go.release()
            for worker in workers:
                worker.join()

    def _step(self, threads: list[Thread]) -> None:
        ready = [t for t in threads if not t.finished and (not t.condition or t.condition())]
        chosen = self._random.randrange(len(ready) + len(self.events) or 1)
        if not ready and not self.events:
            waiting = "; ".join(f"{t.name} for {t.waits_for}" for t in threads if not t.finished)
            raise Deadlock(f"everybody waits: {waiting}")
        if chosen >= len(ready):
            self.events.pop(chosen - len(ready))()
            return
        self._current = ready[chosen]
        self._current._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def _work(self, thread: Thread) -> None:
        thread._go.acquire()
        try:
            if not self._stopping:
                thread._body()
        except Stopped:
            pass
        except BaseException as error:  # told by `run`, in the caller's thread
            self._error = error
        finally:
            thread.finished = True
            self._back.release()
