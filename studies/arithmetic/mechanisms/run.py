"""`selfdistill reproduce --study mechanisms`: do what is left of the plan, write the results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from selfdistill.visible import say
from studies.arithmetic.mechanisms.arms import Arm, Scale
from studies.arithmetic.mechanisms.findings import collect
from studies.arithmetic.mechanisms.job_list import build_plan
from studies.arithmetic.mechanisms.page import TEXT, write_results
from studies.arithmetic.reproduce.machine import environment
from studies.arithmetic.reproduce.run import run_jobs


def reproduce(
    model: str,
    scale: Scale,
    arms: Sequence[Arm],
    *,
    output: Path,
    results: Path,
    workers: int,
    command: str,
    console: Console | None = None,
) -> bool:
    """Run what is left and write the results; see the older study's function of this name.

    Args:
        model, output, results, workers, command, console: as there.
        scale: how much is computed.
        arms: which ones; those that are finished in `output` are on the page, too.

    Returns:
        False when an interrupt stopped it; what is finished by then is on the page.

    Raises:
        PlaceTakenError: `results` holds something else, or another process works in `output`.
        PlanChangedError: `output` holds jobs of another plan.
        ValueError: fewer than one worker.
    """
    console = console or Console()
    plan = build_plan(model, scale, arms)
    finished = run_jobs(
        plan, TEXT, output=output, results=results, workers=workers, console=console
    )
    findings = collect(output, scale)
    where = environment(command=command, workers=workers, seconds=findings.seconds)
    write_results(findings, scale, where, results)
    say(console, f"Results: {(results / TEXT.page).resolve()}")
    return finished
