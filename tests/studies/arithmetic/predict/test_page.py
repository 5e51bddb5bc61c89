"""docs/predict.md has the figures of the numbers in the package."""

from __future__ import annotations

import re

from tiny_runs import ROOT

from selfdistill.prediction.law import read_laws
from studies.arithmetic.predict.page import BEGIN, END, law_line

PAGE = (ROOT / "docs" / "predict.md").read_text("utf-8")


def test_the_coefficients_are_the_packages() -> None:
    assert law_line(read_laws()) in PAGE
    assert PAGE.index(BEGIN) < PAGE.index(law_line(read_laws())) < PAGE.index(END)


def test_the_summary_follows_from_the_cells() -> None:
    points = r"[+-]\d+\.\d"
    row = rf"^\| (.+?) \| \d+ \| ({points}) \| ({points}) \[.*?\] \| ({points}) \| (.*?) ?\|$"
    cells = re.findall(row, PAGE, re.MULTILINE)
    taught = [row for row in cells if not row[0].startswith("GRPO")]
    assert len(taught) >= 12
    inside = sum(row[4] == "" for row in taught)
    errors = sorted(abs(float(row[3])) for row in taught)
    middle = (errors[(len(errors) - 1) // 2] + errors[len(errors) // 2]) / 2
    summary = re.search(
        r"^\| all with a teacher \| (\d+) \| \S+ \| (\S+) \| (\S+) \| (.*?) \|$", PAGE, re.M
    )
    assert summary is not None
    assert int(summary[1]) == len(taught)
    assert abs(float(summary[2]) - middle) < 0.11
    assert abs(float(summary[3]) - errors[-1]) < 0.11
    assert summary[4] == f"{inside} of {len(taught)}"
