"""What a run measures about itself: JSON lines, seconds per phase, peak memory."""

from __future__ import annotations

import json
import os
import resource
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selfdistill.errors import UserError
from selfdistill.json_text import parse_json


class LogError(UserError):
    """A log that holds something else than records; the message names file and line."""


class JsonLines:
    """A file with one JSON object a line, each with a "step"; survives being cut anywhere.

    Args:
        path: the file; it need not exist.

    Attributes:
        follower: is told every record that is added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.follower: Callable[[dict[str, Any]], None] | None = None

    def append(self, record: dict[str, Any]) -> None:
        """Add one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.follower is not None:
            self.follower(record)

    def read(self) -> list[dict[str, Any]]:
        """Return the records; a torn last line, which a killed process leaves, is left out.

        Raises:
            LogError: another line is not a JSON object: this is no log, or somebody changed it.
        """
        if not self.path.exists():
            return []
        records = []
        # A process writes a line together with its end, so only what has no end may be torn.
        *lines, rest = self.path.read_bytes().split(b"\n")
        for number, line in enumerate([*lines, rest], start=1):
            if not line.strip():
                continue
            try:
                record = parse_json(line)
                if not isinstance(record, dict):
                    raise ValueError(f"it is a {type(record).__name__}")
            except ValueError as error:
                if number > len(lines):
                    break
                raise LogError(
                    f"{self.path}, line {number} is not a JSON object ({error}), and a log has one "
                    "in each line: mend the file, or move it away"
                ) from error
            records.append(record)
        return records

    def keep_until(self, step: int) -> None:
        """Forget what lies after `step`: a resumed run will write it again.

        Raises:
            LogError: see `read`; or a record has no step.
        """
        records = self.read()
        for record in records:
            if not isinstance(record.get("step"), int):
                raise LogError(
                    f"{self.path} holds a record without a step, so it is not the log of a run: "
                    "move it away"
                )
        kept = [record for record in records if record["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))


class Clock:
    """Seconds per phase of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed


def peak_rss_mib() -> float:
    """Return the highest resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step: a reader sees the old text or the new, whole.

    Processes that write the same file do not disturb each other; the last one counts.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
