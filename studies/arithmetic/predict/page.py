"""The table and the plot of docs/predict.md: cells kept out, misses included."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from selfdistill.analysis.report.charts import COLOURS, Line, line_plot
from selfdistill.evaluation.intervals import Interval
from selfdistill.evaluation.tables import TextTable, number, percent
from selfdistill.prediction.law import Fitted, Laws, effort, forecast_distillation, forecast_grpo
from selfdistill.runlog import write_atomically
from studies.arithmetic.predict.cells import Cell
from studies.arithmetic.predict.conditions import MIDDLE, RATE, Condition
from studies.arithmetic.predict.fit import r_squared
from studies.arithmetic.predict.measure import read_probe

BEGIN, END = "<!-- written by python -m studies.arithmetic.predict -->", "<!-- end -->"
PLOT = "predict.svg"
WITH_TEACHER = "all with a teacher"
AND_REFUSED = "with those that are refused, by the law alone"


def write_page(docs: Path, laws: Laws, kept_out: Sequence[Cell], output: Path) -> None:
    """Write the plot, and the figures between the two marks of docs/predict.md.

    Args:
        docs: the folder.
        laws: fitted without these cells.
        kept_out: cells with their measured gains.
        output: of the study, with a probe of every condition.
    """
    refused = [cell for cell in kept_out if is_refused(output, cell.condition)]
    kept_out = [cell for cell in kept_out if cell not in refused]
    forecasts = [forecast_cell(laws, cell, output) for cell in kept_out]
    write_atomically(docs / PLOT, plot(kept_out, forecasts))
    page = docs / "predict.md"
    before, _, rest = page.read_text("utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    alone = [forecast_cell(laws, cell, output) for cell in refused]
    tables = [
        summary_table(kept_out, forecasts, refused, alone),
        cells_table(kept_out, forecasts),
        refused_table(refused, alone, output),
    ]
    text = "\n".join([*(table.markdown() for table in tables), law_line(laws)])
    write_atomically(page, f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def forecast_cell(laws: Laws, cell: Cell, output: Path) -> Interval:
    """Return what `selfdistill predict` would have said before the run."""
    condition = cell.condition
    found = read_probe(output, condition)
    spent = effort(condition.config("any", output), cell.steps)
    if condition.method["name"] == "grpo":
        return forecast_grpo(laws.grpo, found.student, float(condition.shape[0]), spent)
    (context,) = found.contexts
    assert context.localisation.share_at is not None
    elsewhere = 1 - context.localisation.share_at.value
    fitted = laws.distillation
    return forecast_distillation(fitted, context.gap, found.student, elsewhere, spent)


def is_refused(output: Path, condition: Condition) -> bool:
    """Tell whether a condition's teacher disputes right steps, so that there is no forecast."""
    return any(c.disputes_right_steps for c in read_probe(output, condition).contexts)


def kind_of(condition: Condition) -> str:
    """Return why a condition is kept out, or that it is GRPO's."""
    if condition.method["name"] == "grpo":
        return "GRPO, middle difficulty"
    if condition.method["name"] == "peer":
        return "a peer's answer as context"
    if condition.order == "reversed":
        return "a reference by another path"
    if condition.rate != RATE:
        return "a third of the learning rate"
    if condition.shape[0] != 8:
        return "2 rollouts a step"
    return "middle difficulty" if condition.stratum == MIDDLE else "another dialect"


def summary_table(
    kept_out: Sequence[Cell],
    forecasts: Sequence[Interval],
    refused: Sequence[Cell],
    alone: Sequence[Interval],
) -> TextTable:
    """Return how near the forecasts were, for each kind of cell and for all with a teacher.

    Args:
        kept_out: cells with a forecast.
        forecasts: theirs.
        refused: cells that get none.
        alone: what the law would have said of them.
    """
    kinds: dict[str, list[int]] = {WITH_TEACHER: [], AND_REFUSED: []}
    for i, cell in enumerate(kept_out):
        kind = kind_of(cell.condition)
        kinds.setdefault(kind, []).append(i)
        if cell.condition.method["name"] != "grpo":
            kinds[WITH_TEACHER].append(i)
    kinds[AND_REFUSED] = [
        *kinds[WITH_TEACHER],
        *range(len(kept_out), len(kept_out) + len(refused)),
    ]
    kept_out, forecasts = [*kept_out, *refused], [*forecasts, *alone]
    rows = []
    for kind, places in kinds.items():
        measured = [kept_out[i].gain for i in places]
        expected = [forecasts[i] for i in places]
        errors = 100 * np.abs([m - e.value for m, e in zip(measured, expected, strict=True)])
        inside = sum(e.low <= m <= e.high for m, e in zip(measured, expected, strict=True))
        r2 = r_squared(measured, [e.value for e in expected])
        rows.append(
            [
                kind,
                str(len(places)),
                f"{r2:.2f}",
                f"{np.median(errors):.1f}",
                f"{errors.max():.1f}",
                f"{inside} of {len(places)}",
            ]
        )
    return TextTable(
        "How near the forecasts of cells kept out were",
        ["", "cells", "R2", "median error, points", "largest", "measured gain within the interval"],
        rows,
    )


def cells_table(kept_out: Sequence[Cell], forecasts: Sequence[Interval]) -> TextTable:
    """Return every cell that was kept out."""
    rows = [
        [
            f"{cell.condition.label}",
            str(cell.steps),
            f"{100 * cell.gain:+.1f}",
            percent(expected, sign=True),
            f"{100 * (expected.value - cell.gain):+.1f}",
            "" if expected.low <= cell.gain <= expected.high else "outside",
        ]
        for cell, expected in zip(kept_out, forecasts, strict=True)
    ]
    head = ["", "steps", "measured gain", "forecast", "forecast - measured", "interval"]
    return TextTable("Cells kept out, points of Avg@k", head, rows)


def refused_table(refused: Sequence[Cell], alone: Sequence[Interval], output: Path) -> TextTable:
    """Return the cells that get no forecast, with what the law would have said."""
    rows = [
        [
            cell.condition.label,
            str(cell.steps),
            f"{100 * cell.gain:+.1f}",
            percent(expected, sign=True),
            number(read_probe(output, cell.condition).contexts[0].localisation.mean_before, "+.2f"),
        ]
        for cell, expected in zip(refused, alone, strict=True)
    ]
    head = ["", "steps", "measured gain", "the law alone", "mean A before the first wrong step"]
    return TextTable("Refused: the teacher disputes right steps", head, rows)


def law_line(laws: Laws) -> str:
    """Return the coefficients, and what they were fitted to."""

    def one(fitted: Fitted) -> str:
        values = ", ".join(
            f"{name} {value:.2f}" for name, value in zip(fitted.names, fitted.values, strict=True)
        )
        error = 100 * np.median(np.abs(fitted.residuals))
        return (
            f"{values}; {fitted.cells} cells of {fitted.conditions} conditions, each condition "
            f"forecast without itself: median error {error:.1f} points"
        )

    return f"With a teacher: {one(laws.distillation)}.\n\nGRPO: {one(laws.grpo)}.\n"


def plot(kept_out: Sequence[Cell], forecasts: Sequence[Interval]) -> str:
    """Return forecast over measured gain, by the kind of cell; on the line both agree."""
    kinds: dict[str, list[tuple[float, Interval]]] = {}
    for cell, expected in zip(kept_out, forecasts, strict=True):
        kinds.setdefault(kind_of(cell.condition), []).append((100 * cell.gain, expected))
    highest = max(cell.gain for cell in kept_out)
    ends = [(100 * x, Interval(x, x, x)) for x in (0.0, highest)]
    return line_plot(
        "Forecast and measured gain of cells that the fit never saw",
        [
            Line("forecast = measured", COLOURS[0], ends),
            *(
                Line(
                    kind,
                    COLOURS[(i + 1) % len(COLOURS)],
                    sorted(points, key=lambda p: p[0]),
                    joined=False,
                )
                for i, (kind, points) in enumerate(kinds.items())
            ),
        ],
        x_label="measured gain (points of Avg@k)",
        y_label="forecast (points)",
        scale=100,
        note="95 % intervals: probe, coefficients, and what the law leaves",
        beside=False,
    )
