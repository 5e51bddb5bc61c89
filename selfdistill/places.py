"""Where results go: tried before the work starts, one process at a time, nothing lost unasked."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from selfdistill.errors import UserError

LOCK = ".lock"


class PlaceTakenError(UserError):
    """A file or a folder that somebody else uses, or that already holds something."""


@contextmanager
def alone_in(folder: Path, *, lock: str = LOCK) -> Iterator[None]:
    """Keep every other process out of a folder; it is created, and it can be written.

    The lock is the operating system's, so a process that was killed holds nothing. Its file stays;
    a folder that was created here and in which nothing else was made is removed again.

    Args:
        folder: which one.
        lock: the name of the lock file in it, for folders in which several processes may work.

    Raises:
        PlaceTakenError: another process holds the lock.
        OSError: the folder cannot be created or written.
    """
    created = not folder.exists()
    try_folder(folder)
    # One object for each path: a caller that holds the lock may call what takes it again.
    held = FileLock(folder / lock, timeout=0, is_singleton=True)
    try:
        held.acquire()
    except Timeout as error:
        raise PlaceTakenError(
            f"another process works in {folder} (it holds {lock} there): wait until it has ended, "
            "or choose another folder"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # somebody removed it, or has just put something there
            if created and [path.name for path in folder.iterdir()] == [lock]:
                (folder / lock).unlink()
                folder.rmdir()
        held.release()


def try_files(files: Iterable[Path], *, overwrite: bool) -> None:
    """Make sure that files can be written, before the work whose results they take starts.

    Args:
        files: their folders are created.
        overwrite: what is there may be replaced.

    Raises:
        PlaceTakenError: one is there already, or is a folder.
        OSError: a folder cannot be created or written.
    """
    for path in files:
        if path.is_dir():
            raise PlaceTakenError(f"{path} is a folder, expected the name of a file for --output")
        if not overwrite and (path.exists() or path.is_symlink()):
            raise PlaceTakenError(
                f"{path} is there already: choose another --output, or replace it with --overwrite"
            )
        try_folder(path.parent)


def try_folder(folder: Path) -> None:
    """Create a folder unless it is there, and write something into it for a moment.

    Raises:
        OSError: it cannot be created or written; the message names it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(
            f"cannot write into {folder}: {error.strerror or error}. Choose another place, or mend "
            "this one"
        ) from error
