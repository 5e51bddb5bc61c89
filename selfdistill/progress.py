"""Progress bars with rates and time left."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from selfdistill.visible import visible


class RateColumn(ProgressColumn):
    """How fast it goes, in the unit that reads best."""

    def render(self, task: Task) -> Text:
        """Return "2.5/s" or "3.1 s each"."""
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")


class NoteColumn(ProgressColumn):
    """A free text, the task's field `note`."""

    def render(self, task: Task) -> Text:
        """Return it as it is."""
        return Text(visible(task.fields["note"]))


def progress_bars(console: Console) -> Progress:
    """Return a context manager for bars; tasks carry a free text in the field `note`."""
    return Progress(
        TextColumn("{task.description:<9}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(),
        NoteColumn(),
        console=console,
    )
