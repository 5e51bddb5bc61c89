"""Parameters of which `make test` runs some and `make test-all` every one."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(fast: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """All values for `pytest.mark.parametrize`, marked slow unless they are among the fast ones.

    A tuple holds the values of several parameters.
    """

    def marked(value: Any) -> Any:
        parts = value if isinstance(value, tuple) else (value,)
        return pytest.param(*parts, marks=pytest.mark.slow)

    return [value if value in fast else marked(value) for value in values]
