"""Charts: figures of a page, whose colours come from its style, and plots that stand alone.

Figures of a page (`line_chart`, `bars`, `interval_rows`) are parts of an HTML document. Plots
(`line_plot`, `dot_plot`) are SVG files of their own, with points that have intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from selfdistill.analysis.report.text import isolated, plain
from selfdistill.evaluation.intervals import Interval

# Colours that differ for the colour-blind, too, in the order in which they are used up.
STYLES = ("one", "two", "three", "four", "five", "six")
WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 42


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        name: for the legend.
        style: the CSS classes: a colour of STYLES, and "thin" for a curve that others sum up.
        points: (x, y) in order of x.
        intervals: (low, high) of each point, or empty.
        joined: a line joins the points; else they are diamonds.
        shift: moves the curve to the right (pixels of the drawing), so that intervals at the same
            x do not hide each other.
    """

    name: str
    style: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float]] = ()
    joined: bool = True
    shift: float = 0.0

    @property
    def is_thin(self) -> bool:
        """True when the legend leaves this curve out."""
        return "thin" in self.style.split()


@dataclass(frozen=True)
class Axes:
    """Two linear axes from 0 to the last tick.

    Attributes:
        x_label, y_label: with units.
        x_ticks, y_ticks: in data units.
        scale: what y is multiplied with to be shown, 100 for percent.
    """

    x_label: str
    y_label: str
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    scale: float

    def x(self, value: float) -> float:
        """Return the horizontal place of a value."""
        return LEFT + value / self.x_ticks[-1] * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Return the vertical place of a value."""
        return HEIGHT - BOTTOM - value / self.y_ticks[-1] * (HEIGHT - TOP - BOTTOM)

    def shown(self, y: float) -> str:
        """Return a value of y as text."""
        return f"{self.scale * y:.3g}"

    def svg(self) -> str:
        """Draw grid, ticks and labels."""
        horizontal = "".join(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self.y(y):.1f}" '
            f'y2="{self.y(y):.1f}"/>'
            f'<text class="y" x="{LEFT - 6}" y="{self.y(y) + 4:.1f}">{self.shown(y)}</text>'
            for y in self.y_ticks
        )
        vertical = "".join(
            f'<text class="x" x="{self.x(x):.1f}" y="{HEIGHT - BOTTOM + 17}">{x:g}</text>'
            for x in self.x_ticks
        )
        middle = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
        return (
            f"{horizontal}{vertical}"
            f'<text class="x" x="{middle[0]}" y="{HEIGHT - 6}">{plain(self.x_label)}</text>'
            f'<text class="x" transform="translate(12 {middle[1]}) rotate(-90)">'
            f"{plain(self.y_label)}</text>"
        )


def line_chart(
    title: str, series: Sequence[Series], *, x_label: str, y_label: str, percent: bool = False
) -> str:
    """Return a figure; with `percent`, y lies in [0, 1] and the axis shows 100 y."""
    series = [s for s in series if s.points]
    if not series:
        return (
            f'<figure><h3>{isolated(title)}</h3><p class="missing">Not measured yet.</p></figure>'
        )
    axes = Axes(
        x_label=x_label,
        y_label=y_label,
        x_ticks=ticks(max(x for s in series for x, _ in s.points), whole=True),
        y_ticks=[0, 0.25, 0.5, 0.75, 1.0]
        if percent
        else ticks(max(y for s in series for y in _heights(s))),
        scale=100 if percent else 1,
    )
    legend = "".join(
        f'<span class="key {s.style}"><i></i>{isolated(s.name)}</span>'
        for s in series
        if not s.is_thin
    )
    return (
        f"<figure><h3>{isolated(title)}</h3><figcaption>{legend}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{plain(title)}">'
        f"{axes.svg()}{''.join(_curve(s, axes) for s in series)}</svg></figure>"
    )


def _heights(series: Series) -> list[float]:
    return [y for _, y in series.points] + [high for _, high in series.intervals]


def _curve(series: Series, axes: Axes) -> str:
    parts = []
    if series.joined:
        path = " ".join(f"{axes.x(x) + series.shift:.1f},{axes.y(y):.1f}" for x, y in series.points)
        parts.append(f'<polyline points="{path}"/>')
    for i, (x, y) in enumerate(series.points):
        across, down = axes.x(x) + series.shift, axes.y(y)
        interval = ""
        if series.intervals:
            low, high = series.intervals[i]
            interval = f" [{axes.shown(low)}, {axes.shown(high)}]"
            parts.append(
                f'<line class="bar" x1="{across:.1f}" x2="{across:.1f}" '
                f'y1="{axes.y(low):.1f}" y2="{axes.y(high):.1f}"/>'
            )
        size = 4 if series.intervals else 2
        turn = "" if series.joined else ' transform="rotate(45)"'
        corner = size if series.joined else 0
        parts.append(
            f'<g transform="translate({across:.1f} {down:.1f})"><rect x="{-size}" y="{-size}" '
            f'width="{2 * size}" height="{2 * size}" rx="{corner}"{turn}/><title>'
            f"{plain(series.name)}&#10;{plain(axes.x_label)} {x:g}: {axes.shown(y)}{interval} "
            f"{plain(axes.y_label)}</title></g>"
        )
    return f'<g class="{series.style}">{"".join(parts)}</g>'


def bars(rows: Sequence[tuple[str, float, str]], *, style: str = "one") -> str:
    """Return horizontal bars from (label, size, text beside the bar)."""
    largest = max((size for _, size, _ in rows), default=0.0) or 1.0
    return "".join(
        f'<div class="bar-row"><span>{isolated(label)}</span><span class="track">'
        f'<i class="{style}" style="width:{100 * size / largest:.1f}%"></i></span>'
        f"<span>{isolated(text)}</span></div>"
        for label, size, text in rows
    )


def ticks(highest: float, *, whole: bool = False) -> list[float]:
    """Return 0 and round numbers up to `highest` or a little above, about five in all."""
    if not highest > 0:
        return [0.0, 1.0]
    magnitude = 10.0 ** math.floor(math.log10(highest / 4))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude * 5 >= highest)
    if whole:
        step = max(1.0, math.ceil(step))
    return [i * step for i in range(math.ceil(highest / step - 1e-9) + 1)]


def interval_rows(
    rows: Sequence[tuple[str, Interval]], *, scale: float = 1.0, form: str = "+.1f"
) -> str:
    """Return intervals on one horizontal axis with a line at 0, a row each.

    Args:
        rows: label and interval.
        scale: what values are multiplied with to be shown, 100 for points.
        form: how a value is written.
    """
    low = min([0.0, *(interval.low for _, interval in rows)])
    high = max([0.0, *(interval.high for _, interval in rows)])
    width = (high - low) or 1.0

    def place(value: float) -> str:
        return f"{100 * (value - low) / width:.1f}%"

    def shown(value: float) -> str:
        return format(scale * value, form).replace("-", "&minus;")

    return "".join(
        f'<div class="bar-row"><span>{isolated(label)}</span><span class="track range">'
        f'<u style="left:{place(0.0)}"></u><i class="{"one" if interval.value >= 0 else "two"}" '
        f'style="left:{place(interval.low)};right:calc(100% - {place(interval.high)})"></i>'
        f'<b style="left:{place(interval.value)}"></b></span>'
        f"<span>{shown(interval.value)} [{shown(interval.low)}, {shown(interval.high)}]</span>"
        "</div>"
        for label, interval in rows
    )


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


def line_plot(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    x_names: Sequence[tuple[float, str]] = (),
    scale: float = 1.0,
    note: str = "",
    beside: bool = True,
) -> str:
    """Return curves over a linear horizontal axis, with 95 % intervals.

    Args:
        title: of the plot.
        lines: what is drawn.
        x_label, y_label: with units.
        x_names: places of the horizontal axis with their names; numbers from 0 by default.
        scale: what values are multiplied with to be shown, 100 for percent.
        note: a line below the title.
        beside: lines at the same x stand a little beside each other.
    """
    # The axes follow from all lines together, and end where a tick stands.
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

    # The grid is drawn first, so that curves lie above it.
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
        shift = 5.0 * (i - (len(lines) - 1) / 2) if beside else 0.0
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
