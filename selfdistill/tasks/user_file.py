"""A Python file of the person who runs the trainer: loaded, called, and named where it is wrong."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, TypeVar

from selfdistill.tasks.interface import TaskError

Function = Callable[..., Any]
T = TypeVar("T")


class UserFile:
    """Functions of a file, whose errors name file and line.

    The file may import what lies beside it. It is run once for each object of this class.

    Args:
        path: the file.
        setting: of the configuration that names it, for messages.

    Raises:
        TaskError: there is no such file, or it fails while it is run.
    """

    def __init__(self, path: Path, *, setting: str) -> None:
        self.path = path
        try:
            self.source = path.read_bytes()
        except OSError as error:
            raise TaskError(f"{setting}: cannot read {path}: {error.strerror}") from error
        name = f"selfdistill_file_{path.stem}"
        spec = importlib.util.spec_from_loader(name, loader=None, origin=str(path))
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        module.__file__ = str(path)
        # As for a program, but behind what is installed, so that a file there hides no library.
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))
        # Dataclasses and pickle look a module up by its name.
        sys.modules[name] = module
        self._module = module
        self._guarded(self._run, module, what="the file")

    def _run(self, module: ModuleType) -> None:
        # Without the `from __future__` of this module, which would make texts of its annotations.
        code: CodeType = compile(self.source, str(self.path), "exec", dont_inherit=True)
        exec(code, module.__dict__)

    def function(self, name: str) -> Function | None:
        """Return a function of the file; None where it has none of this name.

        Raises:
            TaskError: something else has that name.
        """
        found = getattr(self._module, name, None)
        if found is not None and not callable(found):
            raise TaskError(
                f"{self.path}: {name} is a {type(found).__name__}, expected a function: rename it"
            )
        return found

    def call(self, function: Function, *args: Any, **kwargs: Any) -> Any:
        """Call one of the file's functions, which may be `async`.

        Raises:
            TaskError: it raised something; the message has the line, and what it was.
        """

        def run() -> Any:
            result = function(*args, **kwargs)
            return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result

        return self._guarded(run, what=name_of(function), fallback=self.place(function))

    def place(self, function: Function) -> str:
        """Return the file and the line where a function begins."""
        code = getattr(inspect.unwrap(function), "__code__", None)
        return f"{self.path}" if code is None else f"{code.co_filename}, line {code.co_firstlineno}"

    def _guarded(
        self, function: Callable[..., T], *args: Any, what: str, fallback: str | None = None
    ) -> T:
        try:
            return function(*args)
        except Exception as error:  # a program of somebody else
            if isinstance(error, SyntaxError) and error.filename == str(self.path):
                place = f"{self.path}, line {error.lineno}"
            else:
                place = self._line(error) or fallback or str(self.path)
            raise TaskError(
                f"{place}: {what} failed with {type(error).__name__}: {error}"
            ) from error

    def _line(self, error: Exception) -> str | None:
        """Return the last line of the file, or of one beside it, that an error came through."""
        frames = traceback.extract_tb(error.__traceback__)
        for frame in reversed(frames):
            if Path(frame.filename).parent == self.path.parent:
                return f"{frame.filename}, line {frame.lineno}"
        return None


def name_of(function: Function) -> str:
    """Return what a function is called in messages."""
    return getattr(function, "__name__", type(function).__name__)


def accepted(function: Function, offered: Collection[str]) -> tuple[set[str], set[str]]:
    """Return which of the offered keyword arguments a function takes, and which others it needs."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        takes = set(offered)
    else:
        takes = {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY} & set(offered)
    needs = {
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    return takes, needs - takes


async def _awaited(result: Any) -> Any:
    return await result
