"""Accuracy as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table

from selfdistill.evaluate import Evaluation, Interval


def evaluation_table(evaluations: Mapping[str, Evaluation]) -> Table:
    """Return a table with one column for each named evaluation of the same problems."""
    first = next(iter(evaluations.values()))
    k = first.samples
    table = Table(
        title=f"{len(first.problems)} {first.split} problems, {k} attempts each, "
        "95 % bootstrap intervals",
        title_justify="left",
    )
    table.add_column("")
    for name in evaluations:
        table.add_column(name, justify="right")
    for label, metric in (
        (f"Avg@{k}", "avg_at_k"),
        (f"Avg@{k}, every step right", "strict_avg_at_k"),
        (f"Maj@{k}", "maj_at_k"),
        (f"Pass@{k}", "pass_at_k"),
    ):
        table.add_row(label, *(percent(getattr(e, metric)) for e in evaluations.values()))
    return table


def percent(interval: Interval, *, sign: bool = False) -> str:
    """Return "36.5 % [33.1, 39.8]"; with `sign`, a difference in points: "+3.1 [+1.0, +5.2]"."""
    form, unit = ("+.1f", "") if sign else (".1f", " %")
    value, low, high = (
        format(100 * x, form) for x in (interval.value, interval.low, interval.high)
    )
    return f"{value}{unit} [{low}, {high}]"
