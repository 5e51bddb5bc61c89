"""What a section of the run found, kept on disk as it goes, and how much time it has left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.report import Table


@dataclass(frozen=True)
class Wrong:
    """The first value that is not what float64 says, and what a person needs to mend it.

    Attributes:
        kernels: that had a part in it.
        problem: its name, and its sizes in words.
        result: which of the results; entry: index of the worst entry.
        expected, got: that entry; error: the largest difference over the result's size.
        allowed: the largest error that passes; plain: that of plain torch in float32 on the device.
        repeat: the command that computes this problem alone.
    """

    kernels: str
    problem: str
    result: str
    entry: tuple[int, ...]
    expected: float
    got: float
    error: float
    allowed: float
    plain: float
    repeat: str

    def lines(self) -> list[str]:
        """For a person."""
        return [
            f"WRONG VALUE: {self.problem}",
            f"kernels: {self.kernels}",
            f"result: {self.result}, worst at {list(self.entry)}: expected {self.expected:.9g}, "
            f"got {self.got:.9g}",
            f"error {self.error:.3g} of the result's size, allowed {self.allowed:.3g}, plain "
            f"float32 torch here {self.plain:.3g}",
            f"alone: {self.repeat}",
        ]


class WrongValueError(RuntimeError):
    """Ends a run: nothing is timed that computes something else."""

    def __init__(self, wrong: Wrong) -> None:
        super().__init__("\n".join(wrong.lines()))
        self.wrong = wrong


@dataclass
class Section:
    """One section; `save` after each thing that it found, in case it is ended from outside.

    Attributes:
        name: of the section.
        seconds: that it may take.
        file: where it is kept.
        now: a monotonic clock, in seconds.
        tables, data: for the page and for programs; plots: names of files beside `file`.
        left_out: what there was no time, memory or library for, and why.
        wrong: the value that ended it.
    """

    name: str
    seconds: float
    file: Path
    now: Callable[[], float] = time.monotonic
    tables: list[Table] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    plots: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    wrong: Wrong | None = None

    def __post_init__(self) -> None:
        self._began = self.now()

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.seconds - (self.now() - self._began)

    def has_time(self, what: str, seconds: float) -> bool:
        """Whether `seconds` are left for something, which is named as left out if not."""
        enough = self.left >= seconds
        if not enough:
            self.left_out.append(f"{what}: no time")
            self.save()
        return enough

    def save(self) -> None:
        """Write `file`."""
        record = {
            "name": self.name,
            "seconds": round(self.seconds - self.left, 1),
            "tables": [table._asdict() for table in self.tables],
            "data": self.data,
            "plots": self.plots,
            "left_out": self.left_out,
            "wrong": None if self.wrong is None else asdict(self.wrong),
        }
        scratch = self.file.with_suffix(".part")
        scratch.write_text(json.dumps(record, indent=1) + "\n")
        scratch.replace(self.file)
