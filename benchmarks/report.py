"""What a run found, as Markdown, JSON, a terminal table and two plots."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.checks import Errors
from benchmarks.memory import MEBIBYTE
from benchmarks.timing import Timing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console

OURS, PEER = "#2563a8", "#b4b9c0"


MARKERS = {"store": "o", "recompute": "s"}


class Table(NamedTuple):
    """Cells for Markdown and the terminal; the first column is the name of a row."""

    title: str
    head: tuple[str, ...]
    body: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Entry:
    """One contender on one problem.

    Attributes:
        floor: key of the bare GEMMs that it is compared with.
        over_floor: median time over the floor's median.
        over_floor_by_round: median over rounds of time over the floor's time in that round.
        errors: on the check problem, against float64.
        speedup: time of materialised torch, with the same gradients, over this time; or None.
        peak_extra_bytes: beyond inputs and gradients; None if not measured.
        plan: tiles of ours, None for others.
        predicted: seconds of the cost model (benchmarks.cost), None where it has none.
    """

    key: str
    label: str
    floor: str
    timing: Timing
    over_floor: float
    over_floor_by_round: float
    errors: Errors
    speedup: float | None = None
    peak_extra_bytes: int | None = None
    plan: str | None = None
    predicted: float | None = None

    @property
    def is_floor(self) -> bool:
        return self.key == self.floor


@dataclass(frozen=True)
class ProblemResult:
    """All contenders on one shape, dtype and objective.

    Attributes:
        failures: why a contender of others is not among the entries, by key.
    """

    shape: str
    dtype: str
    entries: list[Entry]
    objective: str = "reverse_kl"
    failures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkspacePoint:
    """Ours, head trained, with one workspace (bytes given, or "auto") and the plan it led to."""

    shape: str
    dtype: str
    workspace: int | str
    strategy: str
    plan_bytes: int
    plan: str
    timing: Timing
    over_floor: float
    over_floor_by_round: float


@dataclass(frozen=True)
class Overhead:
    """Seconds per call on a tiny problem, where only the path to the kernels costs time."""

    shape: str
    dtype: str
    ours: Timing
    torch: Timing


@dataclass
class Results:
    """Everything of one run, filled as it goes."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    problems: list[ProblemResult] = field(default_factory=list)
    workspaces: list[WorkspacePoint] = field(default_factory=list)
    overhead: list[Overhead] = field(default_factory=list)

    def write(self, folder: Path) -> list[Path]:
        """Write results.json, table.md and the plots for which there are results."""
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / "results.json", folder / "table.md"]
        written[0].write_text(json.dumps(asdict(self), indent=1) + "\n")
        written[1].write_text(self.markdown())
        if self.problems:
            written.append(folder / "time_over_floor.png")
            plot_time_over_floor(self.problems, written[-1])
        if self.workspaces:
            written.append(folder / "time_over_workspace.png")
            plot_workspaces(self.workspaces, written[-1])
        return written

    def markdown(self) -> str:
        """Every table, below a line for each fact of environment and settings."""
        lines = [f"- {key}: {value}" for key, value in (self.environment | self.settings).items()]
        for problem in self.problems:
            lines += [*markdown_table(problem_table(problem)), ""]
            plans = {e.plan: e.label for e in reversed(problem.entries) if e.plan is not None}
            lines += [f"- {label}: {plan}" for plan, label in reversed(plans.items())]
            lines += [f"- without {key}: {why}" for key, why in problem.failures.items()]
        for table in self.other_tables():
            lines += markdown_table(table)
        return "\n".join(lines) + "\n"

    def other_tables(self) -> Iterator[Table]:
        """What is not measured once a problem: workspaces, call overhead, errors."""
        if self.workspaces:
            yield workspace_table(self.workspaces)
        if self.overhead:
            yield overhead_table(self.overhead)
        kinds = {(problem.objective, problem.dtype): problem for problem in self.problems}
        for problem in kinds.values():
            yield error_table(problem)


def problem_table(problem: ProblemResult) -> Table:
    """Times, and what the cost model predicted where it knows the GPU."""
    body = []
    has_prediction = any(entry.predicted is not None for entry in problem.entries)
    for entry in problem.entries:
        timing, peak = entry.timing, entry.peak_extra_bytes
        cells: tuple[str, ...] = (
            entry.label,
            f"{timing.median:.3g}",
            f"{timing.spread:.0%}",
            f"{entry.over_floor:.2f}",
            f"{entry.over_floor_by_round:.2f}",
            "" if entry.speedup is None else f"{entry.speedup:.2f}x",
            "" if peak is None else f"{peak / MEBIBYTE:.0f}",
        )
        if has_prediction:
            cells += ("" if entry.predicted is None else f"{entry.predicted:.3g}",)
        body.append(cells)
    head = ("", "seconds", "spread", "over floor", "by round", "vs torch", "extra MiB")
    return Table(title(problem), (*head, "predicted") if has_prediction else head, body)


def workspace_table(points: list[WorkspacePoint]) -> Table:
    body = [
        (
            point.dtype,
            "auto" if point.workspace == "auto" else f"{int(point.workspace) / MEBIBYTE:.0f}",
            f"{point.plan_bytes / MEBIBYTE:.0f}",
            point.strategy,
            f"{point.timing.median:.3g}",
            f"{point.over_floor:.2f}",
            f"{point.over_floor_by_round:.2f}",
        )
        for point in points
    ]
    head = ("", "given MiB", "used MiB", "strategy", "seconds", "over floor", "by round")
    return Table(f"Workspace, N/H/V {points[0].shape}", head, body)


def overhead_table(found: list[Overhead]) -> Table:
    body = [
        (
            one.dtype,
            f"{one.ours.median * 1e6:.0f}",
            f"{one.torch.median * 1e6:.0f}",
            f"{one.ours.over(one.torch):.2f}",
        )
        for one in found
    ]
    head = ("", "selfdistill us", "torch us", "ratio")
    return Table(f"Call overhead, N/H/V {found[0].shape}", head, body)


def error_table(problem: ProblemResult) -> Table:
    body = []
    for entry in problem.entries:
        if not entry.is_floor:
            found = (entry.errors.loss, entry.errors.hidden, entry.errors.weight)
            body.append(
                (entry.label, *("-" if error is None else f"{error:.0e}" for error in found))
            )
    name = f"Errors against float64, {problem.objective}, {problem.dtype}"
    return Table(name, ("", "loss", "dH", "dW"), body)


def title(problem: ProblemResult) -> str:
    return f"{problem.objective}, N/H/V {problem.shape}, {problem.dtype}"


def markdown_table(table: Table) -> list[str]:
    """Lines, the title among them."""
    lines = [table.head, ("---",) + ("---:",) * (len(table.head) - 1), *table.body]
    return ["", f"### {table.title}", "", *("| " + " | ".join(line) + " |" for line in lines)]


def print_table(console: Console, table: Table) -> None:
    """Draw it on a terminal of 80 columns or more."""
    # Not at the top: `make gpu` makes the same tables where rich need not be installed.
    import rich.box
    import rich.table

    drawn = rich.table.Table(
        title=table.title,
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    for column in table.head:
        drawn.add_column(column, justify="right" if column else "left", no_wrap=not column)
    for cells in table.body:
        drawn.add_row(*cells)
    console.print(drawn)


def plot_time_over_floor(problems: list[ProblemResult], path: Path) -> None:
    """One panel a problem, a row an objective and dtype; one bar a contender, the floor at 1."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(problem.shape for problem in problems))
    kinds = list(dict.fromkeys((problem.objective, problem.dtype) for problem in problems))
    most = max(len(problem.entries) for problem in problems)
    size = (1.5 + 4.2 * len(shapes), 1.0 + (0.27 * most + 0.6) * len(kinds))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(kinds), len(shapes), squeeze=False, sharey="row")
    for panel in axes.flat:
        panel.set_visible(False)
    for problem in problems:
        panel = axes[kinds.index((problem.objective, problem.dtype)), shapes.index(problem.shape)]
        panel.set_visible(True)
        _bars(panel, problem)
    figure.suptitle("Forward + backward, time over the bare GEMMs (line at 1)", fontsize=11)
    figure.savefig(path, dpi=140)


def _bars(panel: Axes, problem: ProblemResult) -> None:
    entries = [entry for entry in problem.entries if not entry.is_floor]
    # A gap between those that train the head and those with a frozen one.
    heights = [i + 0.7 * (entry.floor != entries[0].floor) for i, entry in enumerate(entries)]
    times = [entry.over_floor for entry in entries]
    colours = [OURS if entry.key.startswith("ours") else PEER for entry in entries]
    panel.axvline(1.0, color="black", linewidth=0.9, zorder=0)
    bars = panel.barh(heights, times, color=colours, height=0.72)
    for text in panel.bar_label(bars, fmt="%.2f", padding=2, fontsize=8):
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    panel.set_yticks(heights, [entry.label for entry in entries])
    panel.set_xlim(0, 1.12 * max([*times, 1.0]))
    panel.set_title(title(problem), fontsize=9)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)
    if not panel.yaxis_inverted():
        panel.invert_yaxis()


def plot_workspaces(points: list[WorkspacePoint], path: Path) -> None:
    """Time over the floor against the bytes that the plan uses; one line a dtype."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    panel = figure.subplots()
    for dtype in dict.fromkeys(point.dtype for point in points):
        own = sorted((p for p in points if p.dtype == dtype), key=lambda p: p.plan_bytes)
        xy = [(point.plan_bytes / MEBIBYTE, point.over_floor) for point in own]
        (line,) = panel.plot(*zip(*xy, strict=True), linewidth=1.2, label=dtype)
        for point, at in zip(own, xy, strict=True):
            panel.plot(*at, MARKERS[point.strategy], color=line.get_color(), markersize=6)
            if point.workspace == "auto":
                panel.plot(*at, "o", color=line.get_color(), markersize=14, fillstyle="none")
    for label, marker, size, fill in (
        *((strategy, marker, 6, "full") for strategy, marker in MARKERS.items()),
        ("chosen by auto", "o", 12, "none"),
    ):
        panel.plot([], [], marker, color="0.3", markersize=size, fillstyle=fill, label=label)
    panel.axhline(1.0, color="black", linewidth=0.9)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set_ylim(bottom=min(0.9, panel.get_ylim()[0]))
    panel.set_xlabel("workspace used, MiB")
    panel.set_ylabel("time over the bare GEMMs")
    panel.set_title(f"selfdistill, head trained, N/H/V {points[0].shape}", fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    figure.savefig(path, dpi=140)
