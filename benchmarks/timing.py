"""Interleaved timing: machines drift, so every contender runs in every round."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from selfdistill_kernels.tools.event_clock import Event, EventClock, cuda_event

T = TypeVar("T")

Clock = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender in each round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance of the quartiles over the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median

    def over(self, floor: Timing) -> float:
        """Ratio of the medians."""
        return self.median / floor.median

    def over_by_round(self, floor: Timing) -> float:
        """Median of the ratios within each round; drift between rounds cancels."""
        return statistics.median(
            own / other for own, other in zip(self.seconds, floor.seconds, strict=True)
        )


def clock_for(device: str) -> Clock:
    """Seconds of one call: wall clock on a CPU, events on the stream of a GPU."""
    return EventClock() if device == "cuda" else _wall_seconds


def _wall_seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = step()
    seconds = time.perf_counter() - start
    del result  # gradients are released off the clock
    return seconds


class EventTimer:
    """A timer for pytest-benchmark: seconds on the GPU's clock, once the stream has come to here.

    Args:
        new_event: makes a torch.cuda.Event.
    """

    def __init__(self, new_event: Callable[[], Event] = cuda_event) -> None:
        self._new_event = new_event
        self._last: Event | None = None
        self._seconds = 0.0

    def __call__(self) -> float:
        event = self._new_event()
        event.record()
        event.synchronize()
        if self._last is not None:
            # Summed here: an event's distance is a float32, too coarse after some minutes.
            self._seconds += self._last.elapsed_time(event) / 1e3
        self._last = event
        return self._seconds


def rotate(steps: Sequence[Callable[[], T]]) -> Callable[[], T]:
    """One step after the other, again and again: the inputs of a call are not in any cache.

    Raises:
        ValueError: no step.
    """
    if not steps:
        raise ValueError("steps: expected at least one")
    turns = itertools.cycle(steps)
    return lambda: next(turns)()


def interleave(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    clock: Clock,
    on_step: Callable[[str], None] = lambda key: None,
) -> dict[str, Timing]:
    """Run every step once a round, starting one further each round; the first round is discarded.

    Args:
        steps: what to time, by key.
        rounds: timed rounds, at least 1.
        clock: seconds of one call.
        on_step: called with the key before each call.

    Raises:
        ValueError: rounds < 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    keys = list(steps)
    seconds: dict[str, list[float]] = {key: [] for key in keys}
    for turn in range(rounds + 1):
        first = turn % max(len(keys), 1)
        for key in keys[first:] + keys[:first]:
            on_step(key)
            elapsed = clock(steps[key])
            if turn > 0:
                seconds[key].append(elapsed)
    return {key: Timing(found) for key, found in seconds.items()}
