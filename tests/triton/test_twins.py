"""Triton's mathematics names the functions of csrc/divergence.h that it repeats."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_twin_that_is_named_exists():
    ours = (ROOT / "selfdistill_kernels/backends/triton/divergence.py").read_text()
    theirs = set(re.findall(r"(\w+)\(", (ROOT / "csrc/divergence.h").read_text()))
    named = re.findall(r"Twin: (\w+)", ours)
    assert len(named) > 10
    assert set(named) <= theirs
