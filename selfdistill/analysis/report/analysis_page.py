"""The page of `selfdistill analyze`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter

from selfdistill.analysis.localisation import ProfilePoint
from selfdistill.analysis.report.analysis_tables import (
    analysis_tables,
    masks_table,
    missing_note,
    summary_line,
)
from selfdistill.analysis.report.charts import STYLES, Series, interval_rows, line_chart
from selfdistill.analysis.report.document import document, html_table
from selfdistill.analysis.report.heatmap import FULL_COLOUR, LEGEND, heat_map, verdict
from selfdistill.analysis.report.text import isolated
from selfdistill.analysis.run import Example, MethodAnalysis, RunAnalysis
from selfdistill.evaluation.intervals import Interval
from selfdistill.runlog import write_atomically

TITLE = "Where the teacher disagrees"
FILES = ("analysis.md", "analysis.json", "analysis.html")
CONTEXT_NAMES = {"stepalign": "critique", "refsol": "reference solution"}


def write_analysis(analysis: RunAnalysis, folder: Path) -> Path:
    """Write `FILES` into a folder; return the page."""
    tables = [*analysis_tables(analysis), *map(masks_table, analysis.methods)]
    lead = "\n\n".join(filter(None, (summary_line(analysis), missing_note(analysis))))
    write_atomically(
        folder / "analysis.md",
        f"# Per-token advantage\n\n{lead}\n\n" + "\n".join(t.markdown() for t in tables),
    )
    write_atomically(
        folder / "analysis.json", TypeAdapter(RunAnalysis).dump_json(analysis, indent=1).decode()
    )
    page = folder / "analysis.html"
    write_atomically(page, analysis_page(analysis))
    return page


def analysis_page(analysis: RunAnalysis) -> str:
    """Return one self-contained HTML page."""
    note = missing_note(analysis)
    lead = f'<p class="lead">{isolated(summary_line(analysis))}</p>'
    lead += f"<p><b>{isolated(note)}</b></p>" if note else ""
    tables = "".join(
        map(html_table, [*analysis_tables(analysis), *map(masks_table, analysis.methods)])
    )
    return document(
        TITLE,
        f"<header><h1>{TITLE}</h1>{lead}</header>"
        f"{charts(analysis)}{examples(analysis)}"
        f'<section id="tables"><h2>All figures</h2>{tables}</section>',
    )


def charts(analysis: RunAnalysis) -> str:
    """The figures that matter most: where the advantage lies, and what masks keep."""
    methods = analysis.methods
    parts = []
    if analysis.knows_steps:
        parts.append(
            "<p>Attempts whose first error follows a right step.</p>"
            + _rows(methods, "Mean advantage before the first wrong step (nats)", "mean_before")
            + _rows(methods, "&hellip; within it", "mean_at")
            + _rows(methods, "&hellip; at its lowest token, mean over attempts", "lowest_at")
            + _rows(methods, "&hellip; after it", "mean_after")
            + _rows(methods, "Share of all |advantage| on it (%)", "share_at", scale=100)
            + _rows(
                methods,
                "Right tokens before it that the teacher rejects (%)",
                "negative_before",
                scale=100,
            )
            + profiles(methods)
        )
    kept = "".join(
        line_chart(
            f"Of {what}, what a mask |A| > threshold keeps",
            [
                _mask_curve(method, field, STYLES[i % len(STYLES)])
                for i, method in enumerate(methods)
            ],
            x_label="active tokens (%)",
            y_label="kept (%)",
            percent=True,
        )
        for what, field in (("the sum of |A|", "advantage_kept"), ("the KL", "kl_kept"))
    )
    return (
        f'<section id="figures"><h2>How local it is</h2>{"".join(parts)}'
        f'<div class="charts pairs">{kept}</div></section>'
    )


def profiles(methods: Sequence[MethodAnalysis]) -> str:
    """The mean advantage around the start of the wrong step, a strip for each method."""
    strips = "".join(
        f'<div class="bar-row"><span>{isolated(method.label)}</span>{_strip(method.profile)}'
        "<span></span></div>"
        for method in methods
    )
    return (
        "<h3>Mean advantage around the start of the wrong step</h3>"
        "<p>A cell is a token; the mark is the first token of the wrong step. "
        f"Hover over a cell for its value.</p>{LEGEND}{strips}"
    )


def examples(analysis: RunAnalysis) -> str:
    """Attempts as heat maps, every method's below each other."""
    cards = "".join(example(e, analysis.methods) for e in analysis.examples)
    if not cards:
        return ""
    return (
        '<section id="examples"><h2>The same attempts under every context</h2>'
        "<p>From the one that the first method's teacher disputes most sharply to the one that it "
        f"disputes least.</p>{LEGEND}{cards}</section>"
    )


def example(example: Example, methods: Sequence[MethodAnalysis]) -> str:
    """One attempt."""
    record = example.records[0]
    maps = "".join(
        f"<h4>{isolated(method.label)}</h4>{verdict(record) if i == 0 else ''}"
        f"{heat_map(record, context_name=CONTEXT_NAMES.get(method.settings['name'], 'context'))}"
        for i, (method, record) in enumerate(zip(methods, example.records, strict=True))
    )
    return (
        f"<article><h3>Question <code>{isolated(record.question)}</code>, right answer "
        f"<code>{isolated(record.answer)}</code></h3>{maps}</article>"
    )


def _rows(methods: Sequence[MethodAnalysis], title: str, field: str, *, scale: float = 1.0) -> str:
    found: list[tuple[str, Interval]] = [
        (m.label, interval)
        for m in methods
        if (interval := getattr(m.later_wrong, field)) is not None
    ]
    if not found:
        return ""
    form = "+.2f" if scale == 1.0 else ".1f"
    return f"<h3>{title}</h3>{interval_rows(found, scale=scale, form=form)}"


def _strip(points: Sequence[ProfilePoint]) -> str:
    cells = "".join(
        f'<i class="{"neg" if p.mean < 0 else "pos"}{" mark" * (p.offset == 0)}" '
        f'style="--a:{min(1.0, abs(p.mean) / FULL_COLOUR):.2f}" '
        f'title="{p.offset:+d} tokens&#10;{p.mean:+.3f} nats, mean of {p.tokens}"></i>'
        for p in points
    )
    return f'<span class="strip">{cells}</span>'


def _mask_curve(method: MethodAnalysis, field: str, style: str) -> Series:
    points = [
        (100 * effect.rho.value, kept)
        for effect in sorted(method.masks, key=lambda effect: effect.rho.value)
        if effect.sign == "any" and (kept := getattr(effect, field)) is not None
    ]
    return Series(
        method.label,
        style,
        [(x, kept.value) for x, kept in points],
        [(kept.low, kept.high) for _, kept in points],
    )
