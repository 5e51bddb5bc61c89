"""Bootstrap intervals of ratios over grouped attempts, and of scores over seeds and problems."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from selfdistill.evaluation.intervals import (
    BOOTSTRAP_RESAMPLES,
    SEED,
    SHARES,
    Bounds,
    Interval,
    standard_error,
    widen,
)

_LEVELS = (0.025, 0.975)


def ratio_intervals(numerators: ArrayLike, denominators: ArrayLike) -> list[Interval | None]:
    """Return sum / sum of every column with its 95 % interval, rows resampled with replacement.

    A row holds the sums over what belongs together (the attempts at one problem), so that tokens
    of one attempt and attempts at one problem are not taken for independent. All columns see the
    same resamples.

    Args:
        numerators: [rows, columns].
        denominators: [rows, columns], not negative.

    Returns:
        One interval per column; None where the denominators add up to 0.

    Raises:
        ValueError: the shapes differ or are not two-dimensional.
    """
    top = np.asarray(numerators, dtype=np.float64)
    bottom = np.asarray(denominators, dtype=np.float64)
    if top.shape != bottom.shape or top.ndim != 2:
        raise ValueError(
            f"numerators and denominators must both be [rows, columns], got {top.shape} and "
            f"{bottom.shape}"
        )
    if not len(top):
        return [None] * top.shape[1]
    ratios = _resampled_ratios(top, bottom)
    intervals: list[Interval | None] = []
    for column, (numerator, denominator) in enumerate(zip(top.sum(0), bottom.sum(0), strict=True)):
        if not denominator:
            intervals.append(None)
            continue
        # A resample may miss every row that has such tokens; it says nothing then.
        low, high = np.nanquantile(ratios[:, column], _LEVELS)
        intervals.append(Interval(float(numerator / denominator), float(low), float(high)))
    return intervals


def quotient_interval(numerators: ArrayLike, denominators: ArrayLike) -> Interval | None:
    """Return how many times the ratio of the second column that of the first is, rows resampled.

    Both columns see the same resamples: what makes a row extreme in both does not widen the
    interval.

    Args:
        numerators: [rows, 2], not negative.
        denominators: [rows, 2], not negative.

    Returns:
        None where either ratio, or its quotient, does not exist.

    Raises:
        ValueError: the shapes differ or are not [rows, 2].
    """
    top = np.asarray(numerators, dtype=np.float64)
    bottom = np.asarray(denominators, dtype=np.float64)
    if top.shape != bottom.shape or top.ndim != 2 or top.shape[1] != 2:
        raise ValueError(
            f"numerators and denominators must both be [rows, 2], got {top.shape} and "
            f"{bottom.shape}"
        )
    first, second = ratio_intervals(top, bottom)
    if first is None or second is None or not first.value:
        return None
    ratios = _resampled_ratios(top, bottom)
    with np.errstate(invalid="ignore", divide="ignore"):
        quotients = ratios[:, 1] / ratios[:, 0]
        low, high = np.nanquantile(quotients, _LEVELS)
    if np.isnan(high):  # between infinities, where a resample's first ratio is 0
        high = np.inf
    return Interval(second.value / first.value, float(low), float(high))


def share_interval(numerators: ArrayLike, denominators: ArrayLike) -> Interval:
    """Return sum / sum of what is part of something, such as right attempts of all attempts.

    Args:
        numerators, denominators: [problems]; the first are at most the second.

    Raises:
        ValueError: the denominators add up to 0.
    """
    part, whole = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    (found,) = ratio_intervals(part[:, None], whole[:, None])
    if found is None:
        raise ValueError("denominators must not add up to 0")
    deviations = (part - found.value * whole) / whole.mean()
    return widen(found, error=standard_error(deviations), count=len(part), bounds=SHARES)


def crossed_mean(scores: ArrayLike, *, bounds: Bounds | None = SHARES) -> Interval:
    """Return the mean of scores [seeds, problems], both resampled with replacement.

    With one seed this is `intervals.bootstrap` over the problems.

    Args:
        scores: [seeds, problems].
        bounds: between which they lie; see `intervals.widen`.

    Raises:
        ValueError: no scores, or not [seeds, problems].
    """
    data = _matrix("scores", scores)
    rng = np.random.default_rng(SEED)
    problems = _weights(data.shape[1], rng)
    means = ((_weights(data.shape[0], rng) @ data) * problems).sum(1) / data.size
    low, high = np.quantile(means, _LEVELS)
    drawn = Interval(float(data.mean()), float(low), float(high))
    error = standard_error(data.mean(0))
    return widen(drawn, error=error, count=data.shape[1], bounds=bounds)


def crossed_difference(
    first: ArrayLike, second: ArrayLike, *, bounds: Bounds | None = SHARES
) -> Interval:
    """Return mean(second) - mean(first), paired by problem, with its 95 % interval.

    Args:
        first, second: scores [seeds, problems] of the same problems in the same order; the number
            of seeds may differ. Problems are resampled together, the seeds of each side alone.
        bounds: between which the scores lie; see `intervals.widen`.

    Raises:
        ValueError: no scores, not [seeds, problems], or different numbers of problems.
    """
    a, b = _matrix("first", first), _matrix("second", second)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"first and second must be scores of the same problems, got {a.shape[1]} and "
            f"{b.shape[1]} problems"
        )
    rng = np.random.default_rng(SEED)
    problems = _weights(a.shape[1], rng)
    per_problem = _weights(len(b), rng) @ b / len(b) - _weights(len(a), rng) @ a / len(
        a
    )  # [resamples, problems]
    low, high = np.quantile((per_problem * problems).sum(1) / a.shape[1], _LEVELS)
    differences = b.mean(0) - a.mean(0)
    width = None if bounds is None else bounds[1] - bounds[0]
    return widen(
        Interval(float(differences.mean()), float(low), float(high)),
        error=standard_error(differences),
        count=len(differences),
        bounds=None if width is None else (-width, width),
    )


def _resampled_ratios(top: NDArray[np.float64], bottom: NDArray[np.float64]) -> NDArray[np.float64]:
    """The ratio of every column in every resample, [resamples, columns]; nan for 0 / 0."""
    weights = _weights(len(top), np.random.default_rng(SEED))
    with np.errstate(invalid="ignore"):
        return (weights @ top) / (weights @ bottom)


def _matrix(name: str, scores: ArrayLike | Sequence[Sequence[float]]) -> NDArray[np.float64]:
    data = np.asarray(scores, dtype=np.float64)
    if data.ndim != 2 or not data.size:
        raise ValueError(f"{name} must be scores [seeds, problems], got shape {data.shape}")
    return data


def _weights(size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """How often each of `size` rows is drawn in each resample, [resamples, size]."""
    picks = rng.integers(0, size, (BOOTSTRAP_RESAMPLES, size))
    picks += size * np.arange(BOOTSTRAP_RESAMPLES)[:, None]
    counts = np.bincount(picks.ravel(), minlength=BOOTSTRAP_RESAMPLES * size)
    return counts.reshape(BOOTSTRAP_RESAMPLES, size).astype(np.float64)
