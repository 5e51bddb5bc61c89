"""The commands `demo` and `reproduce`; typer reads them at every start, so they import late."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from selfdistill.errors import EXIT_INTERRUPTED


def demo(
    output: Annotated[Path, typer.Option(help="Where the run goes.")] = Path("runs/demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over.")] = False,
    seed: Annotated[int, typer.Option(help="Of training; the demo's own is 0.")] = 0,
) -> None:
    """Watch a small solver improve itself in a few minutes, and open the report.

    Runs studies/arithmetic of the clone that holds this package, else of the working directory.
    """
    from selfdistill.checkout import EXAMPLE, find_checkout, load_study
    from selfdistill.config import load_config

    run = load_study("demo.run")
    settings = load_config(find_checkout() / EXAMPLE / "demo.yaml")
    settings = settings.model_copy(update={"output_dir": output, "seed": seed})
    if run.demo(settings, fresh=fresh) is None:
        raise typer.Exit(EXIT_INTERRUPTED)


def reproduce(
    output: Annotated[
        Path | None,
        typer.Option(help="Where the runs go; runs/reproduce or, with --quick, its own folder."),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="Where tables and plots go; docs/results or, with --quick, in output."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few steps, problems and seeds: to see it work.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Worker processes of one thread each.")] = 2,
    only: Annotated[
        str | None, typer.Option(help="Parts: main,copy,difficulty,wording, or a study's arms.")
    ] = None,
    study: Annotated[
        Literal["paper", "mechanisms"], typer.Option(help="What is asked; see docs/results.")
    ] = "paper",
) -> None:
    """Ask the paper's question in miniature: GRPO, RefSol and StepAlignFB; about an hour.

    Runs studies/arithmetic of the clone that holds this package, else of the working directory.
    """
    from selfdistill.checkout import EXAMPLE, find_checkout, load_study

    name = "reproduce" if study == "paper" else study
    arms, jobs_of, run = (load_study(f"{name}.{part}") for part in ("arms", "job_list", "run"))
    output = output or Path(f"runs/{name}-quick" if quick else f"runs/{name}")
    finished = run.reproduce(
        str(find_checkout() / EXAMPLE / "solver"),
        arms.QUICK if quick else arms.FULL,
        jobs_of.parse_studies(only),
        output=output,
        results=results or (output / "results" if quick else Path("docs/results")),
        workers=jobs,
        command=" ".join(["selfdistill", *sys.argv[1:]]),
    )
    if not finished:
        raise typer.Exit(EXIT_INTERRUPTED)
