"""Correctness, tiles, time, memory and a training step on the GPU at hand, in nine minutes.

    make gpu                                          all of it, into runs/gpu
    python -m benchmarks.gpu --section values         one section
    python -m benchmarks.gpu --section values --problem 'sweep ...'   one small problem
    python -m benchmarks.gpu --rehearse               all of it on a CPU, tiny, no time is one

It needs torch and triton; transformers and pydantic for the training step; the libraries that it
compares with where they are installed, and matplotlib for a plot. It installs nothing and asks no
network. The status is 1 where a value was wrong or a section failed, 0 where something was left out
for lack of time or of a library. docs/gpu-run.md says how to read the page.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.gpu.page import TITLES, write, wrong_of
from benchmarks.gpu.section import Section, WrongValueError
from benchmarks.gpu.setting import SECTIONS, Setting, on_a_gpu, rehearsal
from benchmarks.memory import ROOT

NO_GPU = "No GPU that torch can use: nothing was measured."
# Seconds that the page takes, and that a section may be late before it is ended from outside.
FOR_THE_PAGE, LATE = 5.0, 15.0
# Seconds without which a section is not begun: torch alone takes some to import.
LEAST = 5.0
# Where these fail, nothing after them is worth a time.
CORRECTNESS = ("values", "whole")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = _parse(argv)
    setting = rehearsal() if args.rehearse else on_a_gpu()
    if setting.device == "cuda" and not torch.cuda.is_available():
        print(NO_GPU)
        return 1
    if args.rehearse and os.environ.get("TRITON_INTERPRET") != "1":
        print("A rehearsal runs under Triton's interpreter: set TRITON_INTERPRET=1.")
        return 1
    args.output.mkdir(parents=True, exist_ok=True)
    if args.section is not None:
        return run_section(args, setting)
    return run_all(args, setting)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/gpu"), metavar="DIR")
    add("--minutes", type=float, default=9.0, help="that all of it may take (default: 9)")
    add("--section", choices=SECTIONS, help="this one only")
    add("--problem", metavar="NAME", help="with --section values: this problem only")
    add("--rehearse", action="store_true", help="on a CPU: tiny problems, no time is one")
    add("--seconds", type=float, default=600.0, help="that one section may take")
    add("--file", type=Path, help="what one section writes (default: in --output)")
    add("--worker", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run_all(args: argparse.Namespace, setting: Setting) -> int:
    """Each section in a process of its own: what breaks or hangs one leaves the others alone."""
    end = time.monotonic() + 60 * args.minutes - FOR_THE_PAGE
    facts = environment(setting.device)
    if args.rehearse:
        facts = {**facts, "device": f"rehearsal on {facts['device']}: no time here is one"}
    _tuned_tiles(args).unlink(missing_ok=True)  # of an earlier run, perhaps of another GPU
    sections: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    status = 0
    for number, name in enumerate(SECTIONS):
        # What the sections before did not use goes to those that follow, by their shares.
        following = sum(setting.shares[later] for later in SECTIONS[number:])
        left = end - time.monotonic() - LATE
        seconds = max(left, 0.0) * setting.shares[name] / following
        file = args.output / f"{name}.json"
        file.unlink(missing_ok=True)
        print(f"{TITLES[name]}: up to {seconds:.0f} s", flush=True)
        error = None
        if Section(name, seconds, file).has_time("all of it", LEAST):
            error = _started(args, name, seconds, file)
        if file.exists():
            sections.append(json.loads(file.read_text()))
            wrong = wrong_of(sections[-1])
            if wrong is not None:
                print("\n".join(wrong.lines()), flush=True)
                status, error = 1, None
        if error is not None:
            failures[name] = error
            status = 1
            print(f"{TITLES[name]} failed: {error.splitlines()[-1]}", flush=True)
        write(args.output, facts, sections, failures)
        if status and name in CORRECTNESS:
            break
    for path in write(args.output, facts, sections, failures):
        print(f"wrote {path}")
    return status


def _started(args: argparse.Namespace, name: str, seconds: float, file: Path) -> str | None:
    """Run a section in a process; None, or why it failed."""
    tuned = {"SELFDISTILL_AUTOTUNE_FILE": str(_tuned_tiles(args).resolve())}
    if name in ("losses", "step"):
        tuned["SELFDISTILL_AUTOTUNE"] = "1"
    with subprocess.Popen(
        [*_command(args, name), "--seconds", str(seconds), "--file", str(file.resolve())],
        cwd=ROOT, env=os.environ | tuned, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            _, errors = process.communicate(timeout=seconds + LATE)
        except subprocess.TimeoutExpired:
            return f"ended from outside after {seconds + LATE:.0f} s"
        finally:
            # With the processes that it started, however it ended: Ctrl-C does not reach them.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return None if process.returncode == 0 else errors.strip()[-3000:] or "no message"


def _tuned_tiles(args: argparse.Namespace) -> Path:
    """What `tiles` writes, and what `losses` and `step` run with."""
    found: Path = args.output / "tuned_tiles.json"
    return found


def _command(args: argparse.Namespace, name: str) -> list[str]:
    own = ["--rehearse"] if args.rehearse else []
    output = str(args.output.resolve())
    return [sys.executable, "-m", "benchmarks.gpu", "--section", name, "--output", output, *own]


def run_section(args: argparse.Namespace, setting: Setting) -> int:
    """One section in this process; 1 and the wrong value on the terminal where there is one."""
    name = args.section
    file = args.file or args.output / f"{name}.json"
    section = Section(name, args.seconds, file)
    try:
        _fill(section, args, setting)
    except WrongValueError as error:
        section.wrong = error.wrong
    section.save()
    if section.wrong is not None:
        print("\n".join(section.wrong.lines()), file=sys.stderr)
        return 1
    return 0


def _fill(section: Section, args: argparse.Namespace, setting: Setting) -> None:
    """Imports what the section needs only: a library that is missing costs that section."""
    command = _command(args, section.name)
    match section.name:
        case "values":
            from benchmarks.gpu import workers
            from benchmarks.gpu.values import cases

            if args.problem is not None:
                known = {case.name: case for case in cases(setting.dtypes, setting.sizes)}
                if args.problem not in known:
                    names = "\n".join(known)
                    raise SystemExit(f"--problem: expected one of\n{names}\ngot {args.problem!r}")
                workers.work(setting, section, [known[args.problem]])
            elif args.worker is not None:
                workers.work(setting, section, workers.share_of(setting, args.worker))
            else:
                workers.check_values(setting, section, command)
        case "whole":
            from benchmarks.gpu.whole import check_whole

            check_whole(setting, section)
        case "tiles":
            from benchmarks.gpu import tiles

            if args.worker is not None:
                tiles.compile_share(setting, section, args.worker)
            else:
                tiles.tune(setting, section, command)
        case "losses":
            from benchmarks.gpu.losses import compare_losses

            compare_losses(setting, section)
        case "step":
            try:
                from benchmarks.gpu.training_step import measure_steps
            except ImportError as error:
                section.left_out.append(f"all of it: {error}")
            else:
                measure_steps(setting, section)
        case "specialised":
            try:
                from benchmarks.gpu.specialised import compare_sweeps
            except ImportError as error:  # a Triton without Gluon
                section.left_out.append(f"all of it: {error}")
            else:
                compare_sweeps(setting, section)


if __name__ == "__main__":
    sys.exit(main())
