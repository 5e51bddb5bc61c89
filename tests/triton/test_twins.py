"""Triton's mathematics names the functions of csrc that it repeats."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "least"), [("divergence", 10), ("clip", 4)])
def test_every_twin_that_is_named_exists(name, least):
    ours = (ROOT / f"selfdistill_kernels/backends/triton/{name}.py").read_text()
    theirs = set(re.findall(r"(\w+)\(", (ROOT / f"csrc/{name}.h").read_text()))
    named = re.findall(r"Twin: (\w+)", ours)
    assert len(named) >= least
    assert set(named) <= theirs
