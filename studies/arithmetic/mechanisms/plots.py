"""The figures of the page, as SVG files."""

from __future__ import annotations

from selfdistill.analysis.report.charts import COLOURS, Dots, dot_plot
from studies.arithmetic.mechanisms.findings import Findings, Row


def make_plots(findings: Findings) -> dict[str, str]:
    """Return the figures by file name; none before anything is finished."""
    rows = ranked(findings)
    if not rows:
        return {}
    return {
        "mechanisms.svg": dot_plot(
            "Accuracy on held-out problems",
            [Dots(row.label, [row.avg]) for row in rows],
            [("Avg", COLOURS[0])],
            x_label="right answers (%)",
            scale=100,
            note="95 % intervals over problems and training seeds; 8 rollouts a step unless said",
        ),
        "mechanisms-diversity.svg": dot_plot(
            "How many different right traces a problem has",
            [Dots(row.label, [row.distinct]) for row in rows],
            [("distinct", COLOURS[2])],
            x_label="different traces, every step right, among the attempts at a problem",
            note="95 % intervals over problems and training seeds",
        ),
    }


def ranked(findings: Findings) -> list[Row]:
    """Return all rows, the most accurate first."""
    rows = [*findings.rows.values(), *([] if findings.base is None else [findings.base])]
    return sorted(rows, key=lambda row: -row.avg.value)
