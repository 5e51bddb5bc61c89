"""95 % intervals of means over problems: a bootstrap, and more than that for few problems.

A bootstrap draws again what was seen: of two problems that nobody solved every resample says 0, so
its interval is [0, 0]. Where there are few problems, or hardly one that differs from a bound, its
bounds are widened to those of a score interval with the effective number of problems (Korn and
Graubard 1998; Dean and Pagano 2015), which is conservative there and never used elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

BOOTSTRAP_RESAMPLES = 10_000
# Of the resampling: the same scores have the same interval.
SEED = 0

# With fewer problems than this a bootstrap is not trusted alone.
FEW = 30
# Nor is it with fewer effective problems than this at either bound.
RARE = 10.0

_NORMAL = 1.959964  # 97.5 % of a normal distribution lie below
_TAIL = 0.025


# The least and the greatest score that a problem can have.
Bounds: TypeAlias = tuple[float, float]
SHARES: Bounds = (0.0, 1.0)


@dataclass(frozen=True)
class Interval:
    """A mean over problems and its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap(values: Sequence[float], *, bounds: Bounds | None = SHARES) -> Interval:
    """The mean and its 95 % percentile interval, problems resampled with replacement.

    Args:
        values: of each problem.
        bounds: between which they lie; see `widen`.

    Raises:
        ValueError: no values.
    """
    if not len(values):
        raise ValueError("values must hold at least one problem's score, got none")
    data: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(SEED).integers(0, len(data), (BOOTSTRAP_RESAMPLES, len(data)))
    low, high = np.quantile(data[picks].mean(axis=1), [_TAIL, 1 - _TAIL])
    drawn = Interval(float(data.mean()), float(low), float(high))
    return widen(drawn, error=standard_error(data), count=len(data), bounds=bounds)


def standard_error(values: NDArray[np.float64]) -> float:
    """Return that of the mean of values [problems]; 0 for a single one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def widen(interval: Interval, *, error: float, count: int, bounds: Bounds | None) -> Interval:
    """Return an interval that holds the given one, and is wider where there are few problems.

    Args:
        interval: a mean over problems with its bootstrap interval.
        error: standard error of the mean, from the spread of the problems; 0 where all are equal.
        count: problems.
        bounds: the least and the greatest score that a problem can have; None: there are none, and
            a single problem says nothing about the others.
    """
    quantile = student_quantile(count - 1) if count < FEW else _NORMAL
    if bounds is None:
        if count >= FEW or count == 1:
            return interval
        return _joined(
            interval, interval.value - quantile * error, interval.value + quantile * error
        )
    lowest, width = bounds[0], bounds[1] - bounds[0]
    share = (interval.value - lowest) / width
    # How many independent yes or no answers would tell as much; equal scores count once each.
    spread = error > 1e-9 * width  # what is less is rounding
    effective = share * (1 - share) * (width / error) ** 2 if spread else float(count)
    if count >= FEW and effective * min(share, 1 - share) >= RARE:
        return interval
    low, high = _score_interval(share, effective, quantile, count)
    return _joined(interval, lowest + width * low, lowest + width * high)


def _score_interval(
    share: float, effective: float, quantile: float, count: int
) -> tuple[float, float]:
    """Return Wilson's interval of a share; at 0 and 1 the exact one of as many problems."""
    if share in (0.0, 1.0):
        unseen = 1 - _TAIL ** (1 / count)
        return (0.0, unseen) if share == 0.0 else (1 - unseen, 1.0)
    if math.isinf(quantile):
        return 0.0, 1.0
    weight = quantile**2 / effective
    centre = (share + weight / 2) / (1 + weight)
    half = (
        quantile
        / (1 + weight)
        * math.sqrt(share * (1 - share) / effective + weight**2 / (4 * quantile**2))
    )
    return max(0.0, centre - half), min(1.0, centre + half)


def _joined(interval: Interval, low: float, high: float) -> Interval:
    return Interval(interval.value, min(interval.low, low), max(interval.high, high))


@cache
def student_quantile(freedom: int) -> float:
    """Return what 97.5 % of Student's distribution lie below, infinity for no degree of freedom.

    With t = sqrt(freedom) tan(angle) the density is cos(angle) ** (freedom - 1), which is easily
    integrated.
    """
    if freedom < 1:
        return math.inf
    angle = np.linspace(0.0, math.pi / 2, 100_001)
    density = np.cos(angle) ** (freedom - 1)
    share = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    place = np.interp((0.5 - _TAIL) / 0.5, share / share[-1], angle)
    return math.sqrt(freedom) * math.tan(float(place))
