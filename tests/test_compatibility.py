"""pyproject.toml's ranges are those that a run of tests/version_matrix.py stands for."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from selfdistill_kernels.backends.triton_versions import TESTED_TRITON
from tests.triton_matrix import PAGE, TARGETS, TITLE, cell, rows_of, section

ROOT = Path(__file__).parents[1]
# Ranges that this table cannot speak for: they need a GPU, or an environment of their own, or speak
# to servers only.
ELSEWHERE = {"flash-attn", "vllm", "httpx2"}


def table(part: int = 0) -> list[dict[str, str]]:
    """The rows of docs/compatibility.md, each by column; part 1 is the table of the Tritons."""
    text = (ROOT / "docs/compatibility.md").read_text().split(TITLE)[part]
    lines = [
        [cell.strip() for cell in line.strip("| \n").split(" | ")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    head, _, *rows = lines
    return [dict(zip(head, row, strict=True)) for row in rows]


def requirements() -> list[Requirement]:
    """What users install: the dependencies and the extras, but for the developers'."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11 or later")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [
        r for name, rs in project["optional-dependencies"].items() if name != "dev" for r in rs
    ]
    found = [Requirement(r) for r in [*project["dependencies"], *extras]]
    python = Requirement(f"python{project['requires-python']}")
    return [python, *(r for r in found if r.name not in ELSEWHERE)]


def test_ranges_start_and_end_where_a_row_does():
    rows = table()
    for requirement in requirements():
        tested = sorted({Version(row[canonicalize_name(requirement.name)]) for row in rows})
        for version in tested:
            assert requirement.specifier.contains(version), f"{requirement}: {version} was tested"
        bounds = {s.operator: Version(s.version) for s in requirement.specifier}
        assert bounds.get(">=") == tested[0] or _same(bounds.get(">="), tested[0]), (
            f"{requirement}: the lowest that was tested is {tested[0]}"
        )
        if requirement.name == "python":
            continue  # an upper end of Python keeps solvers from solving; the wheels are of all
        above = bounds.get("<")
        assert above is not None, f"{requirement}: no upper end"
        assert _next(above, tested[-1]), (
            f"{requirement}: the highest that was tested is {tested[-1]}"
        )


def _same(bound: Version | None, tested: Version) -> bool:
    """>=2.9 promises 2.9.0, for which any 2.9.x stands."""
    return bound is not None and bound.micro == 0 and bound.release[:2] == tested.release[:2]


def _next(above: Version, tested: Version) -> bool:
    """The upper end is the next minor release, or, for packages that keep to it, the next major."""
    major, minor = tested.major, tested.minor
    return above.release in {(major, minor + 1), (major + 1,)}


def test_one_triton_anew_leaves_the_other_rows():
    page = PAGE.read_text("utf-8")
    assert page.endswith(section(rows_of(page)))


def test_auto_takes_the_tritons_of_the_table_and_no_others():
    assert tuple(row["Triton"] for row in table(1)) == TESTED_TRITON
    assert {row["triton"] for row in table(0)} <= set(TESTED_TRITON)
    for row in table(1):
        for target in TARGETS:
            assert row[target].partition(":")[0].isdigit(), f"{row['Triton']}, {target}"
            assert "does not compile" not in row[target], f"{row['Triton']}, {target}"


def test_a_cell_tells_what_is_said_against_which_kernels():
    passes, spills = {"kernel": "sweep", "refusals": []}, {"kernel": "sweep", "refusals": ["bad"]}
    assert cell([passes, passes]) == "2"
    assert cell([passes, spills, spills]) == "3: 2 sweep bad"
