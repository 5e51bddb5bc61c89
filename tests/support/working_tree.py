"""The files of the working tree: what git knows, and what it would take."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def files() -> list[Path]:
    """Every file, relative to the root. Needs git and a clone."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    names = (Path(name) for name in listed.split("\0") if name)
    return [name for name in names if (ROOT / name).is_file()]


def copy_to(folder: Path) -> None:
    """Copy every file into a folder, which need not exist."""
    for name in files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
