"""Small problems in several processes: a kernel takes seconds to compile and nothing to run.

Each process takes every K-th group of problems and writes what it found into a file of its own. The
first wrong value ends all of them.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.section import Section, Wrong, WrongValueError
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.values import Case, cases, check_all, groups
from benchmarks.memory import ROOT
from benchmarks.report import Table

PAUSE = 0.2  # seconds between two looks at the processes
GRACE = 8.0


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
    section.left_out += [f"{name}: no time" for name in left]
    section.save()


def check_values(setting: Setting, section: Section, command: list[str]) -> None:
    """Start the processes, join what they found.

    Args:
        command: starts one; the number of the process, its seconds and its file are appended.
    """
    files = [section.file.with_name(f"values-{n}.json") for n in range(setting.workers)]
    for file in files:
        file.unlink(missing_ok=True)
    running = [
        subprocess.Popen(
            [*command, "--worker", str(n), "--seconds", str(section.left), "--file", str(file)],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for n, file in enumerate(files)
    ]  # fmt: skip
    # A process that hangs in a kernel sees no clock; it gets a little longer than the others, and
    # less than this section, which is ended from outside, too.
    while any(process.poll() is None for process in running) and section.left > -GRACE:
        if any(_wrong_in(file) for file in files):
            break
        time.sleep(PAUSE)
    for number, process in enumerate(running):
        if process.poll() is None:
            process.kill()
            section.left_out.append(f"process {number} of the small problems: ended from outside")
        _, errors = process.communicate()
        if process.returncode not in (0, -9):
            raise RuntimeError(f"values, process {number}: {errors.strip()[-2000:]}")
    join(section, files)


def join(section: Section, files: list[Path]) -> None:
    """Sum up the files of the processes: counts by path and dtype, and the first wrong value."""
    passed: list[dict[str, Any]] = []
    for file in files:
        if not file.exists():
            continue
        record = json.loads(file.read_text())
        passed += record["data"]["passed"]
        section.left_out += record["left_out"]
        if record["wrong"] is not None and section.wrong is None:
            found = record["wrong"]
            section.wrong = Wrong(**{**found, "entry": tuple(found["entry"])})
        file.unlink()
    section.data["passed"] = passed
    section.tables.append(values_table(passed))
    section.save()


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
