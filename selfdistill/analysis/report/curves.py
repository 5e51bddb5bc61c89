"""Learning curves of several runs, over training steps or over rollouts."""

from __future__ import annotations

from collections.abc import Sequence

from selfdistill.analysis.comparison import Group, Metric, Point, run_curve
from selfdistill.analysis.report.charts import STYLES, Series, line_chart

TITLES: dict[Metric, tuple[str, str]] = {
    "avg_at_k": ("Avg@k", "right answers (%)"),
    "maj_at_k": ("Maj@k", "problems (%)"),
    "pass_at_k": ("Pass@k", "problems (%)"),
    "mean_tokens": ("Answer length", "tokens"),
}


def learning_curves(groups: Sequence[Group]) -> str:
    """Return the charts of all metrics twice, with a switch that shows one of the two.

    The switch needs no script: a style rule hides what belongs to the other choice.
    """
    choices = {"steps": "training steps", "rollouts": "rollouts learned from"}
    switch = "".join(
        f'<input type="radio" name="axis" id="axis-{name}"{" checked" * (name == "steps")}>'
        f'<label for="axis-{name}">{label}</label>'
        for name, label in choices.items()
    )
    charts = "".join(
        f'<div class="charts pairs by-{name}">'
        f"{''.join(metric_chart(groups, metric, by=name, x_label=label) for metric in TITLES)}"
        "</div>"
        for name, label in choices.items()
    )
    return f'<div class="switch"><span>Horizontal axis:</span>{switch}{charts}</div>'


def metric_chart(groups: Sequence[Group], metric: Metric, *, by: str, x_label: str) -> str:
    """Return one chart: the mean curve of each group, and its seeds thin where there are several.

    Args:
        groups: at most as many as there are colours, or colours repeat.
        metric: what to show.
        by: "steps" or "rollouts".
        x_label: of the horizontal axis.
    """
    thin, thick = [], []
    for i, group in enumerate(groups):
        colour = STYLES[i % len(STYLES)]
        # Intervals at the same step stand beside each other.
        shift = 4.0 * (i - (len(groups) - 1) / 2)
        if len(group.runs) > 1:
            for run in group.runs:
                points = run_curve(run, metric)
                name = f"{group.label}, seed {run.config.get('seed')}"
                thin.append(Series(name, f"{colour} thin", _xy(points, by), shift=shift))
        points = group.curves[metric]
        intervals = [(p.low, p.high) for p in points if p.low is not None and p.high is not None]
        thick.append(
            Series(
                group.label,
                colour,
                _xy(points, by),
                intervals if len(intervals) == len(points) else (),
                shift=shift,
            )
        )
    title, y_label = TITLES[metric]
    return line_chart(
        title, [*thin, *thick], x_label=x_label, y_label=y_label, percent=metric != "mean_tokens"
    )


def _xy(points: Sequence[Point], by: str) -> list[tuple[float, float]]:
    return [(p.rollouts if by == "rollouts" else p.step, p.value) for p in points]
