"""Interleaved timing: machines drift, so every contender runs in every round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

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
    return _cuda_seconds if device == "cuda" else _wall_seconds


def _wall_seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = step()
    seconds = time.perf_counter() - start
    del result  # gradients are released off the clock
    return seconds


def _cuda_seconds(step: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    result = step()
    stop.record()
    torch.cuda.synchronize()
    del result
    return float(start.elapsed_time(stop)) / 1e3


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
