"""Line charts as inline SVG and bars as HTML; colours come from the page's style."""

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
