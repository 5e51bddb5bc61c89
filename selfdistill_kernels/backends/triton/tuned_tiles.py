"""The tiles that kernels run with: the shipped ones, or those that `autotune` found on this GPU.

`SELFDISTILL_AUTOTUNE=1` makes a backend take tuned tiles where the file has some. The file is
~/.cache/selfdistill/triton.json, or the one that SELFDISTILL_AUTOTUNE_FILE names. Both are
read once in a process, so that a launch asks neither the environment nor a disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from selfdistill_kernels.backends.triton.plan import (
    Configuration,
    Kind,
    Machine,
    configuration,
    key_of,
)


@dataclass(frozen=True)
class Tiles:
    """Which tile a GEMM kernel runs with.

    Attributes:
        fixed: tiles in place of all others, for tuning.
        tuned: tiles by `plan.key_of`, in place of the shipped ones.
    """

    fixed: Mapping[Kind, Configuration] = field(default_factory=dict)
    tuned: Mapping[str, Configuration] = field(default_factory=dict)

    def of(self, machine: Machine, kind: Kind, itemsize: int, *, heavy: bool) -> Configuration:
        """The tile of one kernel; the arguments are those of `plan.configuration`."""
        tile = self.fixed.get(kind) or self.tuned.get(key_of(machine, kind, itemsize, heavy=heavy))
        return tile or configuration(machine, kind, itemsize, heavy=heavy)


@cache
def tiles_in_use() -> Tiles:
    """The tiles that the environment asks for, settled when a process first asks.

    Raises:
        ValueError: the file of tuned tiles is no such table.
    """
    asked = os.environ.get("SELFDISTILL_AUTOTUNE") == "1"
    return Tiles(tuned=read_tuned(cache_file()) if asked else {})


def cache_file() -> Path:
    """Return the file in which tuned tiles are kept."""
    named = os.environ.get("SELFDISTILL_AUTOTUNE_FILE")
    return Path(named) if named else Path.home() / ".cache" / "selfdistill" / "triton.json"


def read_tuned(path: Path) -> dict[str, Configuration]:
    """Tuned tiles by plan.key_of; empty without a file.

    Raises:
        ValueError: the file is no such table.
    """
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text())
        return {key: Configuration(**entry) for key, entry in entries.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: not a table of tuned tiles ({error}); delete it and tune again"
        ) from error


def save_tuned(path: Path, key: str, tile: Configuration) -> None:
    """Add or replace one entry."""
    entries = {k: asdict(v) for k, v in read_tuned(path).items()} | {key: asdict(tile)}
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(entries, indent=1) + "\n")
    scratch.replace(path)
