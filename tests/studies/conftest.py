"""What studies are tried on."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_solvers import write_solver


@pytest.fixture
def solver_dir(tmp_path: Path) -> Path:
    """Return a folder like the shipped solver's, with random weights."""
    return write_solver(tmp_path / "solver")
