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

LOOPS = {
    1: [ROOT / "csrc/cpu/rows.inl", ROOT / "csrc/cpu/clip.inl"],
    2: [*(ROOT / "csrc/cuda").glob("*.cu")],
    3: [KERNELS / "backends/triton/rows.py"],
    4: [KERNELS / "backends/triton/sweep.py", KERNELS / "backends/triton/gradient.py"],
}


def table(title: str = "Where it is computed") -> list[list[str]]:
    """The rows of a section's table, each as its cells."""
    page = (ROOT / "docs/math.md").read_text()
    section = page.split(f"## {title}\n")[1].split("\n## ")[0]
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


@pytest.mark.parametrize("row", table("Who sums over a row"), ids=lambda row: row[0])
def test_loops_exist(row: list[str]) -> None:
    for column, files in LOOPS.items():
        source = "\n".join(file.read_text() for file in files)
        assert names(row[column])
        for name in names(row[column]):
            assert re.search(rf"(def |void |RowState |\)\s+){name}\(", source), name


@pytest.mark.parametrize("row", table(), ids=lambda row: row[0])
def test_tests_exist(row: list[str]) -> None:
    assert names(row[4])
    for name in names(row[4]):
        file, _, function = name.partition("::")
        assert f"def {function}(" in (ROOT / "tests/selfdistill_kernels" / file).read_text(), name
