"""The study of the repository: it runs from a clone, and is no part of the installed package."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from selfdistill.errors import UserError

STUDY = Path("studies", "arithmetic")
EXAMPLE = Path("examples", "arithmetic")


class NoCheckoutError(UserError):
    """There is no clone of the repository where one is looked for."""


def find_checkout() -> Path:
    """Return the clone: the folder that holds the package, else the working directory.

    Raises:
        NoCheckoutError: neither has the study and the solver that it trains.
    """
    repository = Path(__file__).resolve().parents[1]
    needed = (STUDY / "__init__.py", EXAMPLE / "demo.yaml", EXAMPLE / "solver" / "config.json")
    for folder in (repository, Path.cwd()):
        if all((folder / path).is_file() for path in needed):
            return folder
    raise NoCheckoutError(
        f"{STUDY}/ and {EXAMPLE}/ are neither in {repository} nor in the working directory: the "
        "study and its solver come with the repository, not with the installed package. Run this "
        "in a clone of it"
    )


def load_study(module: str) -> Any:
    """Import a module of the clone's study, such as "demo.run".

    Raises:
        NoCheckoutError: see `find_checkout`.
    """
    root = str(find_checkout())
    if root not in sys.path:
        sys.path.append(root)  # worker processes inherit it
    return importlib.import_module(".".join((*STUDY.parts, module)))
