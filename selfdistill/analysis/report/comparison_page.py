"""The page of `selfdistill compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter

from selfdistill.analysis.comparison import Comparison, Difference
from selfdistill.analysis.report.charts import interval_rows
from selfdistill.analysis.report.comparison_tables import (
    difference_table,
    final_table,
    runs_table,
    settings_table,
)
from selfdistill.analysis.report.curves import learning_curves
from selfdistill.analysis.report.document import document, html_table
from selfdistill.analysis.report.text import isolated
from selfdistill.runlog import write_atomically

TITLE = "Training runs compared"
FILES = ("compare.md", "compare.json", "compare.html")


def write_comparison(comparison: Comparison, folder: Path) -> Path:
    """Write `FILES` into a folder; return the page."""
    tables = (
        final_table(comparison.finals),
        difference_table(comparison.differences),
        settings_table(comparison),
        runs_table(comparison),
    )
    write_atomically(
        folder / "compare.md", f"# {TITLE}\n\n" + "\n".join(t.markdown() for t in tables)
    )
    write_atomically(
        folder / "compare.json", TypeAdapter(Comparison).dump_json(comparison, indent=1).decode()
    )
    page = folder / "compare.html"
    write_atomically(page, comparison_page(comparison))
    return page


def comparison_page(comparison: Comparison) -> str:
    """Return one self-contained HTML page."""
    runs = sum(len(group.runs) for group in comparison.groups)
    names = ", ".join(group.label for group in comparison.groups)
    differences = (
        f"{html_table(difference_table(comparison.differences))}"
        f"{difference_chart(comparison.differences)}"
        if comparison.differences
        else '<p class="missing">No two groups were measured on the same problems.</p>'
    )
    return document(
        TITLE,
        f"<header><h1>{TITLE}</h1>"
        f'<p class="lead">{_count(runs, "run")} in {_count(len(comparison.groups), "group")} '
        f"(one configuration each, with one or more seeds): {isolated(names)}.</p></header>"
        '<section id="curves"><h2>While training</h2><p>Evaluated on the dev split. Vertical bars '
        "are 95&nbsp;% intervals over problems and seeds; thin curves are single seeds, "
        "thick ones their mean. Methods that draw more rollouts a step see more data at the same "
        "step: compare them over rollouts. Hover over a point for its value.</p>"
        f"{learning_curves(comparison.groups)}</section>"
        f'<section id="result"><h2>In the end</h2>{html_table(final_table(comparison.finals))}'
        "</section>"
        f'<section id="differences"><h2>Beyond chance?</h2>{differences}</section>'
        '<section id="reproduction"><h2>What was run</h2>'
        f"{html_table(settings_table(comparison), figures=False)}"
        f"{html_table(runs_table(comparison))}</section>",
    )


def difference_chart(differences: Sequence[Difference]) -> str:
    """Return the differences of Avg@k as intervals around 0."""
    rows = [
        (f"{d.second} minus {d.first}", interval)
        for d in differences
        if (interval := d.metrics["avg_at_k"]) is not None
    ]
    return f"<h3>Difference of Avg@k, points</h3>{interval_rows(rows, scale=100)}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
