"""Where and how results were made."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import transformers


@dataclass(frozen=True)
class Environment:
    """Where and how the results were made.

    Attributes:
        command: what was typed.
        workers: processes, of one thread each.
        minutes: working time of all jobs divided by the workers.
        commit: of the repository, or None outside of one.
        python, torch, transformers, numpy: versions.
        machine: processor, cores and memory.
    """

    command: str
    workers: int
    minutes: float
    commit: str | None
    python: str
    torch: str
    transformers: str
    numpy: str
    machine: str


def environment(*, command: str, workers: int, seconds: float) -> Environment:
    """Describe this machine and its software."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Environment(
        command=command,
        workers=workers,
        minutes=seconds / workers / 60,
        commit=_commit(),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        numpy=numpy.__version__,
        machine=f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}",
    )


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
