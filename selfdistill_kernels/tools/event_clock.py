"""Time on a GPU's own clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Event(Protocol):
    """What the clocks use of torch.cuda.Event."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end_event: Any) -> float: ...


def cuda_event() -> Event:
    """A mark on the GPU's current stream that takes the time."""
    event: Event = torch.cuda.Event(enable_timing=True)
    return event


class EventClock:
    """Seconds between two events around a call, on an otherwise idle stream.

    Args:
        new_event: makes a torch.cuda.Event.
        synchronize: waits until the GPU is idle.
    """

    def __init__(
        self,
        new_event: Callable[[], Event] = cuda_event,
        synchronize: Callable[[], object] = torch.cuda.synchronize,
    ) -> None:
        self._new_event = new_event
        self._synchronize = synchronize

    def __call__(self, step: Callable[[], object]) -> float:
        start, stop = self._new_event(), self._new_event()
        self._synchronize()
        start.record()
        result = step()
        stop.record()
        stop.synchronize()
        del result  # gradients are released off the clock
        return start.elapsed_time(stop) / 1e3
