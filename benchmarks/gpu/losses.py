"""The loss beside what it cannot avoid and what people use: time, memory, all in one process.

Each contender first gives loss and gradients of a small problem, then all are compared at the timed
size, then they are timed in turns. A library that fails is named; a failure of ours ends the run.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.checks import Errors, check, check_agreement, excuse
from benchmarks.contender import Contender, Step
from benchmarks.gpu.section import Section
from benchmarks.gpu.setting import Setting
from benchmarks.memory import MEBIBYTE, measure
from benchmarks.peers import contenders, ours
from benchmarks.problems import DTYPES, Shape, make_problem
from benchmarks.report import Entry, ProblemResult, plot_time_over_floor, problem_table
from benchmarks.timing import interleave

OBJECTIVES = ("reverse_kl", "cross_entropy")
# Ours before the peers: what the run is for comes first. The floors come along.
FIRST = (
    "floor", "ours", "ours_slabs", "ours_rho_0.2", "torch", "core", "core_chunks", "cce", "quack",
    "liger", "liger_1024", "trl", "torch_compile", "cce_exact", "ours_rho_0.5", "ours_rho_0.05",
    "floor_frozen", "ours_frozen", "torch_frozen", "trl_frozen",
)  # fmt: skip
# Seconds that must be left before a contender is begun: some compile for half a minute.
TO_BEGIN, TO_COMPILE = 5.0, 45.0
# Seconds that a contender takes after it: agreement, rounds and peak are some ten calls at a real
# size. A problem needs them for the floor, ours and torch at least.
TO_TIME, AT_LEAST = 2.5, 3
PLOT = "losses.png"


def chosen(objective: str, slab_bytes: int) -> list[Contender]:
    """The contenders of an objective in the order in which they are begun; ours are Triton's."""
    known = contenders(device="cuda", objective=objective)
    known.pop("ours_rows", None)  # csrc/cuda needs a compiler; its page has figures of its own
    for key, contender in known.items():
        if contender.is_ours:
            known[key] = replace(contender, build=_through_triton(contender.build))
    if objective != "cross_entropy":
        known["ours_slabs"] = Contender(
            "ours_slabs", f"selfdistill, {slab_bytes // MEBIBYTE} MiB",
            partial(ours, backend="triton", workspace=slab_bytes),
        )  # fmt: skip
    return [known[key] for key in FIRST if key in known]


def _through_triton(build: Any) -> Any:
    return partial(build, backend="triton")


def compare_losses(setting: Setting, section: Section) -> None:
    """Check, time and measure every contender on every shape while there is time."""
    results: list[ProblemResult] = []
    section.data["problems"] = kept = []
    for shape in setting.shapes:
        for objective in OBJECTIVES:
            what = f"{objective} at {shape}"
            if not section.has_time(what, AT_LEAST * (TO_TIME + TO_BEGIN)):
                continue
            found = compare(setting, section, shape, objective)
            if not found.entries:
                continue
            results.append(found)
            kept.append(asdict(found))
            section.tables.append(problem_table(found))
            section.left_out += [f"{key}, {what}: {why}" for key, why in found.failures.items()]
            section.plots = _plot(results, section.file.with_name(PLOT))
            section.save()


def compare(setting: Setting, section: Section, shape: Shape, objective: str) -> ProblemResult:
    """All contenders on one problem."""
    device, dtype = setting.device, DTYPES[setting.dtype]
    problem = make_problem(shape, dtype, device=device, objective=objective)
    errors: dict[str, Errors] = {}
    failures: dict[str, str] = {}
    steps: dict[str, Step] = {}
    running: list[Contender] = []
    for contender in chosen(objective, setting.slab_bytes):
        key = contender.key
        needed = TO_TIME * (len(running) + 1)
        needed += TO_COMPILE if contender.compiled else TO_BEGIN
        if section.left < needed:
            failures[key] = "no time"
            continue
        missing = contender.missing(device, setting.dtype)
        if missing is not None:
            failures[key] = missing
            continue
        try:
            errors[key] = check(contender, dtype, device=device, objective=objective)
            steps[key] = contender.build(problem)
        except Exception as error:
            failures[key] = excuse(contender, error)
            continue
        running.append(contender)
    failures |= check_agreement(running, steps, dtype)
    running = [contender for contender in running if contender.key not in failures]
    # A frozen head without its floor has nothing to stand beside.
    running = [c for c in running if c.is_floor or c.floor in steps]
    timings = interleave(
        {c.key: steps[c.key] for c in running}, setting.rounds, clock=setting.clock()
    )
    entries = []
    for contender in running:
        key, least = contender.key, timings[contender.floor]
        plain = timings.get("torch" if contender.trained_head else "torch_frozen")
        entries.append(
            Entry(
                key=key,
                label=contender.label,
                floor=contender.floor,
                timing=timings[key],
                over_floor=timings[key].over(least),
                over_floor_by_round=timings[key].over_by_round(least),
                errors=errors[key],
                speedup=None if plain is None else plain.over(timings[key]),
                peak_extra_bytes=None if contender.is_floor else measure(steps[key], device),
            )
        )
    return ProblemResult(str(shape), setting.dtype, entries, objective, failures)


def _plot(results: list[ProblemResult], path: Path) -> list[str]:
    try:
        plot_time_over_floor(results, path)
    except ImportError:  # matplotlib is not among what a GPU machine must have
        return []
    return [path.name]
