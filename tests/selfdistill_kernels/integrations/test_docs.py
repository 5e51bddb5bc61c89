"""docs/integrations.md names tests that exist, in the files that it names."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def test_every_cell_that_works_names_a_test() -> None:
    text = (ROOT / "docs/integrations.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text[text.index("## What was tried") :].splitlines()
        if line.startswith("|")
    ]
    head, _, *body = rows
    files = [re.search(r"`(\S+\.py)`", cell) for cell in head]
    for row in body:
        assert len(row) == len(head)
        for cell, file in zip(row[1:], files[1:], strict=True):
            assert file is not None
            other = re.search(r"of `(\S+\.py)`", cell)
            source = (HERE / (other or file)[1]).read_text()
            tests = re.findall(r"`(test_\w+)`", cell)
            assert tests or "works" not in cell
            for test in tests:
                assert f"def {test}(" in source, f"{test} is not in {(other or file)[1]}"


def test_examples_that_are_named_exist() -> None:
    text = (ROOT / "docs/integrations.md").read_text()
    named = set(re.findall(r"\.\./(examples/\w+\.py)", text))
    assert named == {f"examples/{path.name}" for path in (ROOT / "examples").glob("kernels_*.py")}
