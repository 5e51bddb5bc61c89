"""`selfdistill reproduce`: print the budget, do what is left of the plan, write the results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from selfdistill.visible import say
from studies.arithmetic.reproduce.arms import Scale
from studies.arithmetic.reproduce.budget import job_seconds, minutes
from studies.arithmetic.reproduce.findings import collect
from studies.arithmetic.reproduce.job_list import Job, Study, build_plan
from studies.arithmetic.reproduce.machine import environment
from studies.arithmetic.reproduce.page_text import PageText
from studies.arithmetic.reproduce.results import TEXT, write_results
from studies.arithmetic.reproduce.schedule import run_plan


def reproduce(
    model: str,
    scale: Scale,
    studies: Sequence[Study],
    *,
    output: Path,
    results: Path,
    workers: int,
    command: str,
    console: Console | None = None,
) -> bool:
    """Run what is left and write the results.

    Args:
        model: the shipped solver's folder.
        scale: how much is computed.
        studies: which ones.
        output: the runs; what is finished there is skipped.
        results: README.md, results.json and plots.
        workers: processes of one thread each.
        command: how this was started, for the record.
        console: where progress goes; the standard output by default.

    Returns:
        False when an interrupt stopped it; the same call goes on from there.

    Raises:
        PlaceTakenError: `results` holds something else, or another process works in `output`.
        PlanChangedError: `output` holds jobs of another plan.
        ValueError: fewer than one worker.
    """
    console = console or Console()
    plan = build_plan(model, scale, studies)
    if not run_jobs(plan, TEXT, output=output, results=results, workers=workers, console=console):
        return False
    findings = collect(output, scale)
    where = environment(command=command, workers=workers, seconds=findings.seconds)
    write_results(findings, scale, where, results)
    say(console, f"Results: {(results / TEXT.page).resolve()}")
    return True


def run_jobs(
    plan: Sequence[Job],
    text: PageText,
    *,
    output: Path,
    results: Path,
    workers: int,
    console: Console,
) -> bool:
    """Check where the results go, say what the plan costs, and do what is left of it.

    Args:
        plan: the jobs.
        text: of the page that the study writes.
        output, results, workers, console: see `reproduce`.

    Returns:
        False when an interrupt stopped it; that is said, too.

    Raises:
        PlaceTakenError, PlanChangedError, ValueError: see `reproduce`.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}, expected at least 1")
    text.refuse_foreign_results(results)
    console.print(budget_table(plan, workers=workers))
    finished = run_plan(plan, output, workers=workers, console=console)
    if not finished:
        console.print("Stopped; the same command goes on from there.")
    return finished


def budget_table(plan: Sequence[Job], *, workers: int) -> Table:
    """Return what will run and how long it should take."""
    table = Table(
        title=f"{len(plan)} jobs, about {minutes(plan, workers=workers):.0f} minutes with "
        f"{workers} worker(s) of one thread",
        title_justify="left",
    )
    for name in ("part", "jobs", "thread minutes"):
        table.add_column(name, justify="left" if name == "part" else "right")
    counts = Counter(job.part for job in plan)
    for part, count in counts.items():
        seconds = sum(job_seconds(job) for job in plan if job.part == part)
        table.add_row(part, str(count), f"{seconds / 60:.1f}")
    return table
