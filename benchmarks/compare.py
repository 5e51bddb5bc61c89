"""Time every contender on the same problems, in one process and interleaved.

    python -m benchmarks.compare --output runs/benchmarks
    python -m benchmarks.compare --shapes 512/576/49152 --dtypes float32 --contenders ours torch

Each contender first gives its loss and gradients on a small problem and is compared with float64;
then those on the timed problem are compared among contenders. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks import arguments
from benchmarks.checks import Errors, check, check_agreement
from benchmarks.environment import environment
from benchmarks.memory import MEBIBYTE, peak_extra_bytes
from benchmarks.peers import Contender, Step, contenders, floor, materialised, ours, plan_of
from benchmarks.problems import BETAS, DTYPES, SHAPES, Shape, make_problem
from benchmarks.report import (
    Entry,
    Overhead,
    ProblemResult,
    Results,
    WorkspacePoint,
    print_table,
    problem_table,
)
from benchmarks.timing import Timing, clock_for, interleave

Tick = Callable[[str], None]

WORKSPACES = (32, 64, 128, 256, 320, 512)
OVERHEAD_SHAPE = Shape(8, 64, 512)
OVERHEAD_CALLS = 100
OVERHEAD_ROUNDS = 30


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    args = _parse(argv)
    console = Console()
    if args.device == "cuda" and not torch.cuda.is_available():
        console.print("No GPU that torch can use: nothing was measured.")
        return
    torch.set_num_threads(args.threads)
    chosen = _choose(contenders(args.workspace), args.contenders)
    running = [contender for contender in chosen if contender.is_installed]
    names = ("divergence", "rounds", "workspace")
    results = Results(environment(args.device), {name: getattr(args, name) for name in names})
    for contender in chosen:
        if contender not in running:
            results.settings[f"without {contender.key}"] = f"{contender.requires} is not installed"
    for fact, value in (results.environment | results.settings).items():
        console.print(f"{fact}: {value}", highlight=False)

    for dtype in args.dtypes:
        with _progress(console, len(running)) as tick:
            errors = {}
            for contender in running:
                tick(f"check {contender.key}, {dtype}")
                errors[contender.key] = check(
                    contender, DTYPES[dtype], device=args.device, divergence=args.divergence
                )
        for shape in args.shapes:
            with _progress(console, len(running) * (args.rounds + 2 + args.memory)) as tick:
                found = compare(shape, dtype, running, errors, args, tick)
            results.problems.append(found)
            print_table(console, problem_table(found))
            results.write(args.output)
    if args.workspaces and args.device == "cpu":
        shape = max(args.shapes, key=lambda shape: shape.vocabulary)
        for dtype in args.dtypes:
            with _progress(console, (len(args.workspaces) + 2) * (args.rounds + 1)) as tick:
                results.workspaces += sweep_workspaces(shape, dtype, args, tick)
    if args.overhead:
        results.overhead += [measure_overhead(dtype, args) for dtype in args.dtypes]
    paths = results.write(args.output)
    for table in results.other_tables():
        print_table(console, table)
    for path in paths:
        console.print(f"wrote {path}", highlight=False)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shapes", nargs="+", type=arguments.shape, default=SHAPES, metavar="N/H/V")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    add("--contenders", nargs="+", choices=contenders(), metavar="NAME",
        help=f"all by default; floors come along: {', '.join(contenders())}")  # fmt: skip
    add("--divergence", choices=BETAS, default="reverse_kl")
    add("--rounds", type=arguments.positive, default=7, help="timed rounds, after a discarded one")
    add("--threads", type=arguments.positive, default=torch.get_num_threads())
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--workspace", default="auto", type=arguments.workspace, help="of ours: MiB, or auto")
    add("--workspaces", nargs="*", type=arguments.positive, default=WORKSPACES, metavar="MIB",
        help="also time ours with these, on the shape of the largest vocabulary")  # fmt: skip
    add("--no-memory", dest="memory", action="store_false",
        help="leave out the peaks, each of which takes a process of its own")  # fmt: skip
    add("--overhead", action="store_true", help="also time calls on a tiny problem")
    add("--output", type=Path, default=Path("runs/benchmarks"), metavar="DIR")
    return parser.parse_args(argv)


def _choose(known: dict[str, Contender], keys: Sequence[str] | None) -> list[Contender]:
    """The named contenders, or all, with their floors; in the order of the tables."""
    wanted = set(known if keys is None else keys)
    wanted |= {known[key].floor for key in wanted}
    return [contender for contender in known.values() if contender.key in wanted]


def compare(
    shape: Shape,
    dtype: str,
    running: Sequence[Contender],
    errors: dict[str, Errors],
    args: argparse.Namespace,
    tick: Tick,
) -> ProblemResult:
    """Time the contenders on one problem and measure their memory."""
    options = {"device": args.device, "divergence": args.divergence}
    problem = make_problem(shape, DTYPES[dtype], **options)
    steps = {contender.key: contender.build(problem) for contender in running}
    check_agreement(running, steps, DTYPES[dtype], on_step=tick)
    timings = interleave(steps, args.rounds, clock=clock_for(args.device), on_step=tick)
    entries = []
    for contender in running:
        key, floor_time = contender.key, timings[contender.floor]
        plain = timings.get("torch" if contender.trained_head else "torch_frozen")
        entry = Entry(
            key=key,
            label=contender.label,
            floor=contender.floor,
            timing=timings[key],
            over_floor=timings[key].over(floor_time),
            over_floor_by_round=timings[key].over_by_round(floor_time),
            speedup=None if plain is None else plain.over(timings[key]),
            errors=errors[key],
        )
        if contender.is_ours and args.device == "cpu":
            trained = contender.trained_head
            plan = plan_of(shape, DTYPES[dtype], trained_head=trained, workspace=args.workspace)
            entry = replace(entry, plan=plan.describe())
        entries.append(entry)
    del problem, steps
    if args.memory:
        for i, entry in enumerate(entries):
            tick(f"memory of {entry.key}")
            if entry.is_floor:
                continue
            peak = peak_extra_bytes(entry.key, shape, dtype, workspace=args.workspace, **options)
            entries[i] = replace(entry, peak_extra_bytes=peak)
    return ProblemResult(str(shape), dtype, entries)


def sweep_workspaces(
    shape: Shape, dtype: str, args: argparse.Namespace, tick: Tick
) -> list[WorkspacePoint]:
    """Time ours, head trained, with each workspace and with the one that it chooses itself."""
    problem = make_problem(shape, DTYPES[dtype], divergence=args.divergence)
    given: list[int | str] = [mebibytes * MEBIBYTE for mebibytes in args.workspaces]
    steps = {str(w): ours(problem, workspace=w) for w in [*given, "auto"]}
    timings = interleave(
        {"floor": floor(problem)} | steps,
        args.rounds,
        clock=clock_for(args.device),
        on_step=lambda key: tick(f"workspace {key}"),
    )
    points = []
    for workspace in [*given, "auto"]:
        plan = plan_of(shape, DTYPES[dtype], trained_head=True, workspace=workspace)
        timing = timings[str(workspace)]
        points.append(
            WorkspacePoint(
                str(shape),
                dtype,
                workspace,
                plan.strategy,
                plan.bytes,
                plan.describe(),
                timing,
                timing.over(timings["floor"]),
                timing.over_by_round(timings["floor"]),
            )
        )
    return points


def measure_overhead(dtype: str, args: argparse.Namespace) -> Overhead:
    """Time calls on a tiny problem, ours beside materialised torch."""
    problem = make_problem(
        OVERHEAD_SHAPE, DTYPES[dtype], device=args.device, divergence=args.divergence
    )
    timings = interleave(
        {"ours": _repeated(ours(problem)), "torch": _repeated(materialised(problem))},
        OVERHEAD_ROUNDS,
        clock=clock_for(args.device),
    )
    per_call = {
        key: Timing([seconds / OVERHEAD_CALLS for seconds in timing.seconds])
        for key, timing in timings.items()
    }
    return Overhead(str(OVERHEAD_SHAPE), dtype, per_call["ours"], per_call["torch"])


def _repeated(step: Step) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(OVERHEAD_CALLS):
            step()

    return steps


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Tick]:
    """A bar with what runs now and the time left; yields the function that advances it."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    # Drawn between steps only: a thread that draws would take time from what is timed.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("start", total=total)

        def tick(name: str) -> None:
            progress.update(task, description=name, advance=1, refresh=True)

        yield tick


if __name__ == "__main__":
    main()
