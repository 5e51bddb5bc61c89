"""Results as tables, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from selfdistill.evaluation.intervals import Interval
from selfdistill.evaluation.scores import Evaluation
from selfdistill.visible import visible

MISSING = "\N{EN DASH}"


@dataclass(frozen=True)
class TextTable:
    """A table whose cells are text already; the first column names the rows.

    Attributes:
        title: a few words.
        head: names of the columns; the first one may be empty.
        rows: as many cells as there are columns.
        note: a sentence about the figures, or empty.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def rich(self) -> Table:
        """Return the table for a terminal."""
        table = Table(
            title=_text(self.title),
            title_justify="left",
            caption=_text(self.note),
            caption_justify="left",
        )
        for i, name in enumerate(self.head):
            table.add_column(_text(name), justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*map(_text, row))
        return table

    def markdown(self) -> str:
        """Return the table as Markdown, the title in bold above and the note below it."""
        lines = [self.head, ["---", *["---:"] * (len(self.head) - 1)], *self.rows]
        table = "\n".join(f"| {' | '.join(map(_escape_cell, line))} |" for line in lines)
        return "\n\n".join(filter(None, (f"**{self.title}**", table, self.note))) + "\n"


def _text(text: str) -> Text:
    """Text that a terminal shows as it is, brackets and all."""
    return Text(visible(text))


def _escape_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def evaluation_table(evaluations: Mapping[str, Evaluation]) -> Table:
    """Return a table with one column for each named evaluation of the same problems."""
    first = next(iter(evaluations.values()))
    k = first.samples
    table = Table(
        title=f"{len(first.problems)} {first.split} problems, {k} attempts each, 95 % intervals",
        title_justify="left",
    )
    table.add_column("")
    for name in evaluations:
        table.add_column(_text(name), justify="right")
    strict = [(f"Avg@{k}, {first.strict_means}", "strict_avg_at_k")] if first.strict_means else []
    for label, metric in (
        (f"Avg@{k}", "avg_at_k"),
        *strict,
        (f"Maj@{k}", "maj_at_k"),
        (f"Pass@{k}", "pass_at_k"),
    ):
        table.add_row(label, *(percent(getattr(e, metric)) for e in evaluations.values()))
    if any(e.mean_reward is not None for e in evaluations.values()):
        means = (e.mean_reward for e in evaluations.values())
        table.add_row("mean reward", *(MISSING if m is None else f"{m:.3f}" for m in means))
    for label, count in (
        ("attempts undecided, count as wrong", "undecided"),
        ("problems left out, too long", "too_long"),
    ):
        counts = [getattr(e, count) for e in evaluations.values()]
        if any(counts):
            table.add_row(label, *map(str, counts))
    return table


def percent(interval: Interval | None, *, sign: bool = False) -> str:
    """Return "36.5 % [33.1, 39.8]"; with `sign`, a difference in points: "+3.1 [+1.0, +5.2]".

    Where there is nothing, an en dash.
    """
    if interval is None:
        return MISSING
    form, unit = ("+.1f", "") if sign else (".1f", " %")
    value, low, high = (
        format(100 * x, form) for x in (interval.value, interval.low, interval.high)
    )
    return f"{value}{unit} [{low}, {high}]"


def number(interval: Interval | None, form: str = "+.3f") -> str:
    """Return "-8.12 [-9.10, -7.21]" in a format; an en dash where there is nothing."""
    if interval is None:
        return MISSING
    value, low, high = (format(x, form) for x in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"
