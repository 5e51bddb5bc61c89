"""Small problems in several processes: a kernel takes seconds to compile and nothing to run.

Each process takes every K-th group of problems and writes what it found into a file of its own. The
first wrong value ends all of them. A problem that is neither right nor wrong, nor left out for lack
of time, is one whose kernel hung or whose process was ended: that is a failure, too.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.section import Section, Wrong, WrongValueError
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.values import Case, cases, check_all, groups
from benchmarks.memory import ROOT
from benchmarks.report import Table

PAUSE = 0.2  # seconds between two looks at the processes
# Of a section's time, that in which a problem may begin; the last one compiles in what is left.
BEGINNING = 0.85
# Seconds after a section's time at which a process that still runs hangs. Less than the section
# itself gets, which is ended from outside, too.
GRACE = 8.0
NO_TIME = ": no time"


def share_of(setting: Setting, number: int) -> list[Case]:
    """The problems of one process of setting.workers."""
    everything = groups(cases(setting.dtypes, setting.sizes))
    return [case for group in everything[number :: setting.workers] for case in group]


def work(setting: Setting, section: Section, chosen: list[Case]) -> None:
    """What one process does: check, and leave counts and the first wrong value in the section."""
    passed: list[dict[str, Any]] = []
    section.data["passed"] = passed
    try:
        for case, share in check_all(chosen, setting.device, lambda name: section.left > 0):
            passed.append(
                {"problem": case.name, "kernels": case.kernels, "error of allowed": round(share, 4)}
            )
            section.save()
    except WrongValueError as error:
        section.wrong = error.wrong
    left = [case.name for case in chosen[len(passed) + (section.wrong is not None) :]]
    section.left_out += [name + NO_TIME for name in left]
    section.save()


def check_values(setting: Setting, section: Section, command: list[str]) -> None:
    """Start the processes, join what they found.

    Args:
        command: starts one; the number of the process, its seconds and its file are appended.

    Raises:
        RuntimeError: no value was wrong, but a process broke, or hung, or left problems unchecked.
    """
    files = [section.file.with_name(f"values-{n}.json") for n in range(setting.workers)]
    logs = [file.with_suffix(".stderr") for file in files]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for number, (file, log) in enumerate(zip(files, logs, strict=True)):
            file.unlink(missing_ok=True)
            seconds = str(BEGINNING * section.left)
            own = ["--worker", str(number), "--seconds", seconds, "--file", str(file)]
            with log.open("wb") as errors:  # a pipe that nobody reads would stop who writes
                running.append(
                    subprocess.Popen(
                        [*command, *own], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors
                    )
                )
        while any(process.poll() is None for process in running) and section.left > -GRACE:
            if any(_wrong_in(file) for file in files):
                break
            time.sleep(PAUSE)
    finally:
        late = _end(running)
    unchecked = join(section, files, [share_of(setting, n) for n in range(setting.workers)])
    notes, messages = [], []
    for number, (process, log) in enumerate(zip(running, logs, strict=True)):
        note = _note(process.returncode, number in late, unchecked[number])
        if note is not None:
            notes.append(f"process {number} of the small problems {note}")
            messages.append(log.read_text(errors="replace").strip()[-2000:])
        log.unlink()
    if not notes:
        return
    if section.wrong is not None:
        section.left_out += notes  # the wrong value ended them, or is told before them
        section.save()
        return
    # Of the messages one: the notes, which name the processes and problems, come last.
    raise RuntimeError("\n".join([*list(filter(None, messages))[:1], *notes]))


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> set[int]:
    """Kill those that still run, wait for all; returns the numbers of those that were killed."""
    late = {number for number, process in enumerate(processes) if process.poll() is None}
    for number in late:
        processes[number].kill()
    for process in processes:
        process.wait()
    return late


def _note(status: int, late: bool, unchecked: Sequence[str]) -> str | None:
    """How a process ended and where; None where it did all that it should."""
    if not unchecked and status in (0, 1):
        return None  # 1: of its wrong value, which its file holds
    by_us = late and status == -signal.SIGKILL
    how = "was ended from outside" if by_us else f"ended with status {status}"
    if not unchecked:
        return how
    return f"{how} at {unchecked[0]!r}: {len(unchecked)} problems were not checked"


def join(section: Section, files: list[Path], shares: list[list[Case]]) -> list[list[str]]:
    """Sum up the files of the processes: counts by path and dtype, and the first wrong value.

    Args:
        files, shares: of each process: what it wrote, and the problems that it had.

    Returns:
        Of each process the problems of which nothing is known, in the order of its work.
    """
    passed: list[dict[str, Any]] = []
    unchecked = []
    for file, share in zip(files, shares, strict=True):
        known: set[str] = set()
        if file.exists():
            record = json.loads(file.read_text())
            passed += record["data"]["passed"]
            section.left_out += record["left_out"]
            known |= {one["problem"] for one in record["data"]["passed"]}
            known |= {line.removesuffix(NO_TIME) for line in record["left_out"]}
            found = record["wrong"]
            if found is not None:
                known.add(found["problem"])
                if section.wrong is None:
                    section.wrong = Wrong(**{**found, "entry": tuple(found["entry"])})
            file.unlink()
        unchecked.append([case.name for case in share if case.name not in known])
    section.data["passed"] = passed
    section.tables.append(values_table(passed))
    section.save()
    return unchecked


def values_table(passed: list[dict[str, Any]]) -> Table:
    """How many problems of each path and dtype passed, and how near the worst came."""
    by_kind: dict[tuple[str, str], list[float]] = {}
    for one in passed:
        path, _, dtype, *_ = one["problem"].split()
        by_kind.setdefault((path, dtype), []).append(one["error of allowed"])
    body = [
        (path, dtype, str(len(shares)), f"{max(shares):.2f}")
        for (path, dtype), shares in sorted(by_kind.items())
    ]
    return Table(
        "Small problems against float64", ("path", "dtype", "right", "worst / allowed"), body
    )


def _wrong_in(file: Path) -> bool:
    return file.exists() and json.loads(file.read_text())["wrong"] is not None
