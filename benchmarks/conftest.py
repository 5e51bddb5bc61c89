"""Collects bench_*.py, which a plain `pytest` leaves alone; those for a GPU only with `-m gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.problems import Shape

NO_GPU = "No GPU that torch can use: nothing was measured."


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    # A file that is named on the command line pytest collects by itself.
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks of the loss")
    group.addoption(
        "--shape",
        type=Shape.parse,
        metavar="N/H/V",
        help="tokens, hidden size, vocabulary (default: 256/256/16384, on a GPU 8192/4096/128256)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if "gpu" not in config.getoption("markexpr"):
        config.hook.pytest_deselected(items=on_gpu)
        items[:] = [item for item in items if item not in on_gpu]
    elif not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if "gpu" in config.getoption("markexpr") and not torch.cuda.is_available():
        terminalreporter.write_line(NO_GPU)
