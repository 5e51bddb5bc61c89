r"""From a probe and a budget to the gain: two laws of a few numbers, fitted on a miniature.

*A student that follows a self-teacher* comes as near to it as the budget allows:

    gain = (c + h s) g (1 - exp(-(e / tau)^m)),   log tau = t + d log x

g is the gap, the teacher's share of right answers minus s, the student's (arXiv 2605.30070: the gap
predicts the gain linearly); c + h s how much of it is reached in the end, less by weak students (a
forecast takes at most 1, which students beyond those of the fit would exceed); e the effort, the
sum of the learning rates of all steps in units of 3e-4 (Adam moves a weight by about its rate a
step); x the share of |A| of wrong attempts that lies off the first wrong step. What is worded
otherwise has to be learned, too: the more that is, the later answers get better. How many rollouts
a step has is not in it: from 2 to 64 it made no difference that could be fitted.

*GRPO* has no teacher and no such ceiling:

    gain = (1 - s) (1 - exp(-(e p^b / u)^n))

p is the groups of a step, one for each prompt; the law of those alone that hold right and wrong
rollouts was worse. It was fitted to groups of eight, 1 and 8 a step.

The numbers (`miniature.json`) come from `python -m studies.arithmetic.predict`: a solver of 2.2 M
parameters on chained arithmetic. Another model, task or loss has numbers of its own; what carries
over is the order of magnitude of e, and that a fixed teacher has no more to teach than the gap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files

import torch
from pydantic import TypeAdapter
from torch import Tensor

from selfdistill.config import Config
from selfdistill.evaluation.intervals import Interval
from selfdistill.training.loop import warm_up

REFERENCE_RATE = 3e-4
FILE = "miniature.json"
# Draws behind an interval, and their seed: the same probe has the same forecast.
DRAWS = 4000
SEED = 0
LEVELS = (0.025, 0.975)


@dataclass(frozen=True)
class Fitted:
    """One law's numbers.

    Attributes:
        names: of the coefficients.
        values: as the law takes them.
        resampled: likewise, each fitted to conditions drawn again.
        residuals: measured - forecast gain of every cell, its condition left out of the fit.
        ranges: name -> (lowest, highest) of what the law was given.
        cells, conditions: how many it was fitted to.
    """

    names: tuple[str, ...]
    values: tuple[float, ...]
    resampled: tuple[tuple[float, ...], ...]
    residuals: tuple[float, ...]
    ranges: dict[str, tuple[float, float]]
    cells: int
    conditions: int


@dataclass(frozen=True)
class Laws:
    """Both laws, the command that fitted them, and the weights of the solver that they are of."""

    command: str
    solver_sha256: str
    distillation: Fitted
    grpo: Fitted


def read_laws() -> Laws:
    """Return the numbers that come with the package."""
    text = files("selfdistill.prediction").joinpath(FILE).read_text("utf-8")
    return TypeAdapter(Laws).validate_json(text)


def effort(config: Config, steps: int | None = None) -> float:
    """Return the sum of the learning rates of the first steps (default: all), in units of 3e-4."""
    rate_of = warm_up(config.optimizer)
    if config.optimizer.schedule != "constant":
        from selfdistill.training.schedule import learning_rates

        rate_of = learning_rates(config)
    updates = config.updates_per_step
    taken = range(1, (config.steps if steps is None else steps) + 1)
    return updates * sum(map(rate_of, taken)) / REFERENCE_RATE


def distillation_gain(
    coefficients: Tensor,
    gap: Tensor,
    student: Tensor,
    elsewhere: Tensor,
    effort: Tensor,
    *,
    most: float = math.inf,
) -> Tensor:
    """Return the gain; all of the same shape, or [cells] beside coefficients [5].

    Args:
        coefficients: [..., 5] c, h, t, d and log m of the module's first law.
        gap: teacher - student, shares of right answers.
        student: share of right answers.
        elsewhere: share of |A| of wrong attempts off the first wrong step.
        effort: see `effort`.
        most: of the gap that is reached, as a share.
    """
    reached, stronger, time, slope, shape = coefficients.unbind(-1)
    scaled = effort.log() - time - slope * elsewhere.log()
    part = (reached + stronger * student).clamp(max=most)
    return part * gap * (1 - (-(shape.exp() * scaled).exp()).exp())


def grpo_gain(coefficients: Tensor, student: Tensor, groups: Tensor, effort: Tensor) -> Tensor:
    """Return the gain of GRPO.

    Args:
        coefficients: [..., 3] b, log u and log n of the module's second law.
        student: share of right answers.
        groups: of a step.
        effort: see `effort`.
    """
    share, time, shape = coefficients.unbind(-1)
    scaled = effort.log() + share * groups.log() - time
    return (1 - student) * (1 - (-(shape.exp() * scaled).exp()).exp())


def forecast_distillation(
    fitted: Fitted, gap: Interval, student: Interval, elsewhere: float, effort: float
) -> Interval:
    """Return the gain of a self-teacher: at most the gap, and no more than all answers are right.

    Args:
        fitted: the first law's numbers.
        gap, student, elsewhere, effort: see `distillation_gain`.
    """
    law = partial(distillation_gain, most=1.0)
    return forecast(law, fitted, gap, student, elsewhere, effort, highest=1 - student.value)


def forecast_grpo(fitted: Fitted, student: Interval, groups: float, effort: float) -> Interval:
    """Return the gain of GRPO: no more than that all answers are right.

    Args:
        fitted: the second law's numbers.
        student, groups, effort: see `grpo_gain`.
    """
    return forecast(grpo_gain, fitted, student, groups, effort, highest=1 - student.value)


def forecast(
    law: Callable[..., Tensor],
    fitted: Fitted,
    *known: Interval | float,
    lowest: float = -1.0,
    highest: float = 1.0,
) -> Interval:
    """Return the gain with an interval for what is unknown: probe, coefficients, and the rest.

    Args:
        law: `distillation_gain` or `grpo_gain`.
        fitted: its numbers.
        known: what it is given, in its order; an Interval is drawn from as from a normal
            distribution.
        lowest, highest: no gain is beyond them.
    """
    generator = torch.Generator().manual_seed(SEED)

    def draw(value: Interval | float) -> Tensor:
        if not isinstance(value, Interval):
            return torch.full((DRAWS,), float(value), dtype=torch.float64)
        error = (value.high - value.low) / (2 * 1.96)
        noise = torch.randn(DRAWS, generator=generator, dtype=torch.float64)
        return (value.value + error * noise).clamp(1e-4 if value.low >= 0 else -1.0, 1.0)

    def one_of(rows: Sequence[Sequence[float]] | Sequence[float]) -> Tensor:
        table = torch.tensor(rows, dtype=torch.float64)
        return table[torch.randint(len(table), (DRAWS,), generator=generator)]

    drawn = law(one_of(fitted.resampled), *map(draw, known)) + one_of(fitted.residuals)
    low, high = drawn.clamp(lowest, highest).quantile(torch.tensor(LEVELS, dtype=torch.float64))
    point = law(
        torch.tensor(fitted.values, dtype=torch.float64),
        *(
            torch.tensor(k.value if isinstance(k, Interval) else k, dtype=torch.float64)
            for k in known
        ),
    )
    value = float(point.clamp(lowest, highest))
    return Interval(value, min(value, float(low)), max(value, float(high)))
