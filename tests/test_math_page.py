"""docs/math.md says which function computes what, and which test holds it: those exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "selfdistill_kernels"
# The columns of the table and where their names are: a name is that of a function or a class.
COLUMNS = {
    1: [ROOT / "csrc/divergence.h"],
    2: [KERNELS / "backends/triton/divergence.py"],
    3: [*(KERNELS / "backends/reference").glob("*.py"), KERNELS / "logits.py"],
}


def table() -> list[list[str]]:
    """The rows of "Where it is computed", each as its cells."""
    page = (ROOT / "docs/math.md").read_text()
    section = page.split("## Where it is computed\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("row", table(), ids=lambda row: row[0])
def test_functions_exist(row: list[str]) -> None:
    for column, files in COLUMNS.items():
        source = "\n".join(file.read_text() for file in files)
        assert names(row[column])
        for name in names(row[column]):
            assert re.search(rf"\b(def|class|R|float|double|void|Mixture<R>) {name}\b", source), (
                name
            )


@pytest.mark.parametrize("row", table(), ids=lambda row: row[0])
def test_tests_exist(row: list[str]) -> None:
    assert names(row[4])
    for name in names(row[4]):
        file, _, function = name.partition("::")
        assert f"def {function}(" in (ROOT / "tests/selfdistill_kernels" / file).read_text(), name
