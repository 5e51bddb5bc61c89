"""Time every contender on the same problems, in one process and interleaved.

    python -m benchmarks.compare --output runs/benchmarks
    python -m benchmarks.compare --shapes 512/576/49152 --dtypes float32 --contenders ours torch
    python -m benchmarks.compare --device cuda

Each contender first gives its loss and gradients on a small problem and is compared with float64;
then those on the timed problem are compared with plain torch's. A library that fails is left out
and named; a failure of ours ends the run. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
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
from benchmarks.checks import Errors, check, check_agreement, excuse
from benchmarks.contender import Contender, Step
from benchmarks.environment import environment
from benchmarks.memory import MEBIBYTE, peak_extra_bytes
from benchmarks.peers import contenders, floor, materialised, ours, plan_of
from benchmarks.problems import DTYPES, OBJECTIVES, SHAPES, Shape, make_problem
from benchmarks.report import (
    Entry,
    Overhead,
    ProblemResult,
    Results,
    WorkspacePoint,
    print_table,
    problem_table,
)
from benchmarks.timing import Timing, clock_for, interleave, rotate

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
    names = ("objectives", "rounds", "sets", "workspace")
    results = Results(environment(args.device), {name: getattr(args, name) for name in names})
    for fact, value in (results.environment | results.settings).items():
        console.print(f"{fact}: {value}", highlight=False)

    for objective in args.objectives:
        known = contenders(args.workspace, device=args.device, objective=objective)
        chosen = _choose(known, args.contenders)
        for dtype in args.dtypes:
            with _progress(console, len(chosen)) as tick:
                errors, failures = check_all(chosen, objective, dtype, args, tick)
            for key, why in failures.items():
                line = f"without {key}, {objective}, {dtype}: {why}"
                console.print(line, highlight=False, soft_wrap=True)
            running = [contender for contender in chosen if contender.key in errors]
            for shape in args.shapes:
                with _progress(console, len(running) * (args.rounds + 2 + args.memory)) as tick:
                    found = compare(shape, objective, dtype, running, errors, args, tick)
                found = replace(found, failures=failures | found.failures)
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
    names = list(contenders(device="cuda") | contenders(objective="cross_entropy"))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    # fmt: off
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--shapes", nargs="+", type=arguments.shape, metavar="N/H/V",
        help="; ".join(f"{on}: {', '.join(map(str, own))}" for on, own in SHAPES.items()))
    add("--dtypes", nargs="+", choices=DTYPES, help="cpu: all; cuda: bfloat16")
    add("--contenders", nargs="+", choices=names, metavar="NAME",
        help=f"all by default; floors come along: {', '.join(names)}")
    add("--objectives", nargs="+", choices=OBJECTIVES,
        help="cpu: reverse_kl; cuda: cross_entropy too, which has contenders of its own")
    add("--sets", type=arguments.positive,
        help="problems that the calls go through in turn, against caches; cpu: 1; cuda: 3")
    add("--rounds", type=arguments.positive, default=7, help="timed rounds, after a discarded one")
    add("--threads", type=arguments.positive, default=torch.get_num_threads())
    add("--workspace", default="auto", type=arguments.workspace, help="of ours: MiB, or auto")
    add("--workspaces", nargs="*", type=arguments.positive, default=WORKSPACES, metavar="MIB",
        help="also time ours with these, on the shape of the largest vocabulary")
    add("--no-memory", dest="memory", action="store_false",
        help="leave out the peaks, each of which takes a process of its own")
    add("--overhead", action="store_true", help="also time calls on a tiny problem")
    add("--output", type=Path, default=Path("runs/benchmarks"), metavar="DIR")
    # fmt: on
    args = parser.parse_args(argv)
    on_gpu = args.device == "cuda"
    args.shapes = args.shapes or SHAPES[args.device]
    args.dtypes = args.dtypes or (["bfloat16"] if on_gpu else list(DTYPES))
    args.objectives = args.objectives or ["reverse_kl", *["cross_entropy"] * on_gpu]
    args.sets = args.sets or (3 if on_gpu else 1)
    return args


def _choose(known: dict[str, Contender], keys: Sequence[str] | None) -> list[Contender]:
    """The named contenders that there are, or all, with floors; in the order of the tables."""
    wanted = set(known if keys is None else keys) & set(known)
    wanted |= {known[key].floor for key in wanted}
    return [contender for contender in known.values() if contender.key in wanted]


def check_all(
    chosen: Sequence[Contender], objective: str, dtype: str, args: argparse.Namespace, tick: Tick
) -> tuple[dict[str, Errors], dict[str, str]]:
    """Errors on the small problem of those that run, and why the others do not."""
    errors, failures = {}, {}
    for contender in chosen:
        tick(f"check {contender.key}, {dtype}")
        missing = contender.missing(args.device, dtype)
        if missing is not None:
            failures[contender.key] = missing
            continue
        try:
            errors[contender.key] = check(
                contender, DTYPES[dtype], device=args.device, objective=objective
            )
        except Exception as error:
            failures[contender.key] = excuse(contender, error)
    return errors, failures


def _predicted(key: str, shape: Shape, objective: str, dtype: str, device: str) -> float | None:
    """Seconds of the cost model, None on a GPU that it does not know and without triton, whose
    kernels' plan it asks."""
    if device != "cuda" or find_spec("triton") is None:
        return None
    from benchmarks.cost import gpu_named
    from benchmarks.roofline import predict

    gpu = gpu_named(torch.cuda.get_device_name())
    return None if gpu is None else predict(key, shape, objective, dtype, gpu)


def compare(
    shape: Shape,
    objective: str,
    dtype: str,
    running: Sequence[Contender],
    errors: dict[str, Errors],
    args: argparse.Namespace,
    tick: Tick,
) -> ProblemResult:
    """Time the contenders on one problem and measure their memory."""
    options = {"device": args.device, "objective": objective}
    problems = [
        make_problem(shape, DTYPES[dtype], seed=seed, **options) for seed in range(args.sets)
    ]
    steps = {
        contender.key: rotate([contender.build(problem) for problem in problems])
        for contender in running
    }
    failures = check_agreement(running, steps, DTYPES[dtype], on_step=tick)
    running = [contender for contender in running if contender.key not in failures]
    steps = {contender.key: steps[contender.key] for contender in running}
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
            predicted=_predicted(key, shape, objective, dtype, args.device),
        )
        if contender.is_ours and args.device == "cpu":
            trained = contender.trained_head
            plan = plan_of(shape, DTYPES[dtype], trained_head=trained, workspace=args.workspace)
            entry = replace(entry, plan=plan.describe())
        entries.append(entry)
    del problems, steps
    if args.device == "cuda":
        torch.cuda.empty_cache()  # the processes that measure memory share the GPU
    if args.memory:
        for i, entry in enumerate(entries):
            tick(f"memory of {entry.key}")
            if entry.is_floor:
                continue
            peak = peak_extra_bytes(entry.key, shape, dtype, workspace=args.workspace, **options)
            entries[i] = replace(entry, peak_extra_bytes=peak)
    return ProblemResult(str(shape), dtype, entries, objective, failures)


def sweep_workspaces(
    shape: Shape, dtype: str, args: argparse.Namespace, tick: Tick
) -> list[WorkspacePoint]:
    """Time ours, head trained, with each workspace and with the one that it chooses itself."""
    problem = make_problem(shape, DTYPES[dtype])
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
    problem = make_problem(OVERHEAD_SHAPE, DTYPES[dtype], device=args.device)
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
