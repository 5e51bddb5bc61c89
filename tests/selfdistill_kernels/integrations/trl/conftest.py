"""TRL reports the start of every trainer to its makers, unless it runs under CI.

requirements.txt has TRL; where other versions are tried without it, these tests are not collected.
"""

from __future__ import annotations

import importlib.util

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("trl") else ["test_*.py"]


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")
