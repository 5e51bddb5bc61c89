"""The short page repeats the study's figures, and none that the study does not have."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
# 88.8 % [87.2, 90.2] and +30.6 [+22.9, +39.8].
FIGURE = re.compile(r"[+-]?\d+\.\d(?: %)? \[[+-]?\d+\.\d, [+-]?\d+\.\d\]")
ROW = re.compile(r"^\| (?:8|64) \| (\w+,.*?) \| (\S.*?\]) \| (\S.*?\]) \|$", re.MULTILINE)


def test_figures_are_the_studys() -> None:
    page, study = ((DOCS / name).read_text() for name in ("which-method.md", "results/README.md"))
    figures = FIGURE.findall(page)
    assert len(figures) > 25
    assert not [figure for figure in figures if figure not in study]


def test_rows_are_those_of_the_table() -> None:
    page, study = ((DOCS / name).read_text() for name in ("which-method.md", "results/README.md"))
    rows = ROW.findall(page.replace("**", ""))
    assert len(rows) == 8
    for name, *cells in rows:
        for steps, cell in zip((20, 50), cells, strict=True):
            assert f"| {name} | {steps} | {cell} |" in study, name
