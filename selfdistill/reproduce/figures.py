"""Plots as SVG files that stand alone: points with intervals, over an axis or row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from selfdistill.analysis.report.charts import ticks
from selfdistill.analysis.report.text import plain
from selfdistill.evaluation.intervals import Interval

# Told apart by the colour-blind, too (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_INK, _MUTED, _GRID = "#1f2328", "#57606a", "#d8dee4"
_WIDTH = 720
_HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
    'height="{height}" font-family="Helvetica, Arial, sans-serif" font-size="13" fill="{ink}">'
    '<rect width="{width}" height="{height}" fill="#ffffff"/>'
)


@dataclass(frozen=True)
class Line:
    """One curve: (x, interval) in order of x, as a line or as points alone."""

    name: str
    colour: str
    points: Sequence[tuple[float, Interval]]
    joined: bool = True


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    x_names: Sequence[tuple[float, str]] = (),
    scale: float = 1.0,
    note: str = "",
) -> str:
    """Return curves over a linear horizontal axis, with 95 % intervals.

    Args:
        title: of the plot.
        lines: what is drawn; those at the same x stand a little beside each other.
        x_label, y_label: with units.
        x_names: places of the horizontal axis with their names; numbers from 0 by default.
        scale: what values are multiplied with to be shown, 100 for percent.
        note: a line below the title.
    """
    xs = [x for line in lines for x, _ in line.points]
    names = list(x_names) or [(x, f"{x:g}") for x in ticks(max(xs))]
    values = [v for line in lines for _, i in line.points for v in (i.low, i.high)]
    levels = _levels([scale * v for v in values])
    left, right, top, bottom, height = 70, 20, 78 + 20 * ((len(lines) - 1) // 3), 60, 420
    margin = 0.04 * ((max(x for x, _ in names) - min(x for x, _ in names)) or 1.0)
    low_x, high_x = min(x for x, _ in names) - margin, max(x for x, _ in names) + margin

    def across(x: float) -> float:
        return left + (x - low_x) / (high_x - low_x) * (_WIDTH - left - right)

    def down(shown: float) -> float:
        share = (shown - levels[0]) / (levels[-1] - levels[0])
        return height - bottom - share * (height - top - bottom)

    parts = [_start(title, note, height)]
    for level in levels:
        parts.append(_grid_line(left, down(level), _WIDTH - right, down(level), strong=level == 0))
        parts.append(_text(left - 8, down(level) + 4, f"{level:g}", anchor="end", colour=_MUTED))
    for x, name in names:
        parts.append(_text(across(x), height - bottom + 20, name, anchor="middle", colour=_MUTED))
    parts.append(_text((left + _WIDTH - right) / 2, height - 14, x_label, anchor="middle"))
    middle = (top + height - bottom) / 2
    parts.append(
        f'<text transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">'
        f"{plain(y_label)}</text>"
    )
    for i, line in enumerate(lines):
        shift = 5.0 * (i - (len(lines) - 1) / 2)
        places = [(across(x) + shift, interval) for x, interval in line.points]
        if line.joined:
            path = " ".join(f"{x:.1f},{down(scale * p.value):.1f}" for x, p in places)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="2"/>'
            )
        for x, p in places:
            low, high, value = (down(scale * v) for v in (p.low, p.high, p.value))
            parts.append(_stroke(x, low, x, high, line.colour))
            parts.append(f'<circle cx="{x:.1f}" cy="{value:.1f}" r="4" fill="{line.colour}"/>')
        key_x, key_y = left + 215 * (i % 3), 56 + 20 * (i // 3)
        parts.append(f'<circle cx="{key_x}" cy="{key_y}" r="5" fill="{line.colour}"/>')
        parts.append(_text(key_x + 10, key_y + 4, line.name))
    return "".join(parts) + "</svg>\n"


@dataclass(frozen=True)
class Dots:
    """A row of a dot plot: its name and one interval (or none) for each series."""

    name: str
    values: Sequence[Interval | None]


def dot_plot(
    title: str,
    rows: Sequence[Dots],
    series: Sequence[tuple[str, str]],
    *,
    x_label: str,
    scale: float = 1.0,
    note: str = "",
) -> str:
    """Return one row for each name and, in it, a point with its interval for each series.

    Args:
        title: of the plot.
        rows: what is drawn, from top to bottom.
        series: name and colour; a single one has no legend.
        x_label: with units.
        scale: what values are multiplied with to be shown.
        note: a line below the title.
    """
    values = [scale * v for row in rows for i in row.values if i for v in (i.low, i.high)]
    levels = _levels(values)
    left, right, top, row_height = 250, 30, 78, 16 * len(series) + 14
    height = top + row_height * len(rows) + 56

    def across(shown: float) -> float:
        return left + (shown - levels[0]) / (levels[-1] - levels[0]) * (_WIDTH - left - right)

    parts = [_start(title, note, height)]
    for level in levels:
        parts.append(_grid_line(across(level), top, across(level), height - 50, strong=level == 0))
        parts.append(
            _text(across(level), height - 34, f"{level:g}", anchor="middle", colour=_MUTED)
        )
    parts.append(_text((left + _WIDTH - right) / 2, height - 12, x_label, anchor="middle"))
    for i, row in enumerate(rows):
        first = top + i * row_height + 15
        parts.append(_text(left - 12, first + 8 * (len(series) - 1) + 4, row.name, anchor="end"))
        for j, ((_, colour), interval) in enumerate(zip(series, row.values, strict=True)):
            if interval is None:
                continue
            y = first + 16 * j
            low, high, value = (
                across(scale * v) for v in (interval.low, interval.high, interval.value)
            )
            parts.append(_stroke(low, y, high, y, colour))
            parts.append(f'<circle cx="{value:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>')
    for j, (name, colour) in enumerate(series if len(series) > 1 else ()):
        parts.append(f'<circle cx="{left + 150 * j}" cy="56" r="5" fill="{colour}"/>')
        parts.append(_text(left + 10 + 150 * j, 60, name))
    return "".join(parts) + "</svg>\n"


def _levels(values: Sequence[float]) -> list[float]:
    """Return round numbers that hold all values and 0."""
    highest, lowest = max([*values, 0.0]), min([*values, 0.0])
    step = ticks(max(highest, -lowest))[1]
    below = -int(lowest // step)
    above = -int(-highest // step)
    return [round(i * step, 10) for i in range(-below, max(above, 1 - below) + 1)]


def _start(title: str, note: str, height: float) -> str:
    head = _HEAD.format(width=_WIDTH, height=height, ink=_INK)
    return (
        f'{head}<title>{plain(title)}</title><text x="20" y="24" font-size="16" '
        f'font-weight="bold">{plain(title)}</text>{_text(20, 42, note, colour=_MUTED)}'
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", colour: str = _INK) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{plain(text)}</text>'
    )


def _grid_line(x1: float, y1: float, x2: float, y2: float, *, strong: bool) -> str:
    colour = _MUTED if strong else _GRID
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _stroke(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        'stroke-width="2.5" stroke-opacity="0.6"/>'
    )
