"""What `make test`, `make test-all` and `.ci/run` start, and what their status tells."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def program(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        command, cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An environment that is set up, whose Python says what it was asked and fails on $FAILING."""
    folder = tmp_path / "venv"
    program(
        folder / "bin/python",
        'echo "interpret=${TRITON_INTERPRET:-0} threads=$OMP_NUM_THREADS $*"\n'
        'test "${TRITON_INTERPRET:-0}" != "$FAILING"',
    )
    for stamp in (".requirements", ".extension", ".nvcc"):
        (folder / stamp).touch()
    return folder


@pytest.mark.parametrize("target", ["test", "test-all"])
@pytest.mark.parametrize("failing", ["0", "1", "none"])
@pytest.mark.parametrize("jobs", [[], ["-j", "4"]], ids=["one job", "jobs"])
def test_both_parts_run_and_the_status_tells_both(venv, target, failing, jobs):
    done = run(["make", target, *jobs, f"VENV={venv}"], FAILING=failing, TRITON_INTERPRET="0")
    main, triton = done.stdout.splitlines()
    assert main.startswith("interpret=0 threads=1 -m pytest")
    assert triton.startswith("interpret=1 threads=1 -m pytest")
    assert triton.endswith("tests/triton")
    for line in (main, triton):
        assert (" -m not slow" in line) == (target == "test")
    assert (done.returncode == 0) == (failing == "none")


def test_ci_runs_everything_and_its_status_tells_all(tmp_path):
    program(tmp_path / "make", 'echo "$1"\ntest "$1" != "$FAILING"')
    for name in ("qemu-aarch64", "aarch64-linux-gnu-g++"):  # or it would install them
        program(tmp_path / name, "exit 1")

    def ci(failing: str) -> tuple[list[str], int]:
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        done = run([str(ROOT / ".ci/run")], PATH=path, FAILING=failing)
        # The installation that goes on meanwhile says its own word at any time.
        return [word for word in done.stdout.split() if word != "--silent"], done.returncode

    targets, status = ci("none")
    assert {"lint", "test-all"} <= set(targets)
    assert status == 0
    for failing in targets:
        assert ci(failing) == (targets, 1)
