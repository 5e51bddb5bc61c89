"""docs/api.md has every public function and class, and none that does not exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import selfdistill_kernels
from selfdistill_kernels import integrations

PAGE = Path(__file__).resolve().parents[2] / "docs/api.md"
LISTED = re.findall(r"^::: (\S+)$", PAGE.read_text(), flags=re.MULTILINE)


def test_public_names_are_listed() -> None:
    public = {
        f"{package.__name__}.{name}"
        for package in (selfdistill_kernels, integrations)
        for name in package.__all__
    }
    assert public - set(LISTED) == set()


def test_listed_names_exist() -> None:
    for name in LISTED:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
