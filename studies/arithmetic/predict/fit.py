"""The coefficients of both laws: least errors, conditions left out and drawn again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selfdistill.prediction.law import Fitted

# Conditions drawn again, each with all its cells.
RESAMPLES = 200
# An error of this size, 5 points, is neither small nor large.
LARGE = 0.05


@dataclass(frozen=True)
class Observed:
    """A cell as a law sees it.

    Attributes:
        condition: its name; cells of one condition belong together.
        steps: of training.
        gain: measured, a share.
        known: what the law is given, in its order.
    """

    condition: str
    steps: int
    gain: float
    known: tuple[float, ...]


def fit(
    law: Callable[..., Tensor],
    observed: Sequence[Observed],
    *,
    names: Sequence[str],
    known: Sequence[str],
    start: Sequence[float],
) -> Fitted:
    """Fit a law to cells.

    Args:
        law: of `selfdistill.prediction.law`.
        observed: the cells.
        names: of the coefficients.
        known: of what the law is given, in its order.
        start: where the search for coefficients begins.
    """
    conditions = sorted({cell.condition for cell in observed})
    values = least_errors(law, observed, start)
    residuals = []
    for left_out in conditions:
        others = least_errors(law, [c for c in observed if c.condition != left_out], values)
        residuals += [
            cell.gain - predict(law, others, cell)
            for cell in observed
            if cell.condition == left_out
        ]
    rng = np.random.default_rng(0)
    resampled = []
    for _ in range(RESAMPLES):
        drawn = rng.choice(conditions, len(conditions))
        cells = [cell for name in drawn for cell in observed if cell.condition == name]
        resampled.append(tuple(least_errors(law, cells, values)))
    columns = zip(*(cell.known for cell in observed), strict=True)
    return Fitted(
        names=tuple(names),
        values=tuple(values),
        resampled=tuple(resampled),
        residuals=tuple(residuals),
        ranges={n: (min(c), max(c)) for n, c in zip(known, columns, strict=True)},
        cells=len(observed),
        conditions=len(conditions),
    )


def least_errors(
    law: Callable[..., Tensor], observed: Sequence[Observed], start: Sequence[float]
) -> list[float]:
    """Return the coefficients with the least errors, near `start` where cells are few.

    Small errors count by their squares and large ones by their size ("soft L1"), so that a context
    that follows no law does not bend the law of the others.
    """
    gains = torch.tensor([cell.gain for cell in observed], dtype=torch.float64)
    known = [
        torch.tensor(k, dtype=torch.float64) for k in zip(*(c.known for c in observed), strict=True)
    ]
    beginning = torch.tensor(start, dtype=torch.float64)
    coefficients = beginning.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [coefficients], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9
    )

    def error() -> Tensor:
        search.zero_grad()
        errors = (law(coefficients, *known) - gains) / LARGE
        loss = ((1 + errors.square()).sqrt() - 1).sum()
        # A coefficient that no cell speaks about stays where it was.
        loss = loss + 1e-3 * (coefficients - beginning).square().sum()
        loss.backward()
        return loss

    search.step(error)
    return coefficients.detach().tolist()


def predict(law: Callable[..., Tensor], coefficients: Sequence[float], cell: Observed) -> float:
    """Return the gain that a law expects in a cell."""
    known = [torch.tensor(k, dtype=torch.float64) for k in cell.known]
    return float(law(torch.tensor(coefficients, dtype=torch.float64), *known))


def r_squared(measured: Sequence[float], expected: Sequence[float]) -> float:
    """Return 1 - squared errors / squared deviations from the mean of what was measured."""
    a, b = np.asarray(measured), np.asarray(expected)
    return float(1 - ((a - b) ** 2).sum() / ((a - a.mean()) ** 2).sum())
