"""What compilers made for the tests, kept by everything that it was made from.

A name in the cache is a hash of the contents of all files and settings that went into the making,
so that nothing in it is ever out of date. `make clean` empties it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / "build" / "tests"
UNUSED_DAYS = 14  # afterwards a file is removed


def name_of(name: str, files: Sequence[Path], settings: Sequence[str]) -> str:
    """`name` after a hash of all names and contents of files, and of the settings."""
    digest = hashlib.sha256()
    parts = [setting.encode() for setting in settings]
    for path in files:
        parts += [path.name.encode(), path.read_bytes()]
    for part in (str(len(settings)).encode(), *parts):
        digest.update(len(part).to_bytes(8, "little") + part)
    return f"{digest.hexdigest()[:32]}-{name}"


def made_once(
    name: str,
    make: Callable[[Path], object],
    *,
    files: Sequence[Path],
    settings: Sequence[str],
    cache: Path = CACHE,
) -> Path:
    """The file that `make(path)` writes, made at the first call only.

    Several processes may ask for one file: one of them makes it, the others wait.

    Args:
        name: Ends the file's name.
        files: Everything that `make` reads and that may change.
        settings: Everything else that changes what it writes: command, versions of programs.
    """
    cache.mkdir(parents=True, exist_ok=True)
    made = cache / name_of(name, files, settings)
    with made.with_name(f"{made.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            _remove_unused(cache)
            partial = made.with_name(f"partial-{made.name}")
            make(partial)
            partial.rename(made)
        os.utime(made)
    return made


def _remove_unused(cache: Path) -> None:
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    for path in cache.iterdir():
        if path.stat().st_mtime < oldest:
            path.unlink(missing_ok=True)
