"""Collects bench_*.py, which a plain `pytest` leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.problems import Shape


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if file_path.match("bench_*.py"):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks of the loss")
    group.addoption(
        "--shape",
        type=Shape.parse,
        default=Shape(256, 256, 16384),
        metavar="N/H/V",
        help="tokens, hidden size, vocabulary (default: %(default)s)",
    )
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu")
