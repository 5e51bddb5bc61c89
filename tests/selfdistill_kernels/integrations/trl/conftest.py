"""TRL reports the start of every trainer to its makers, unless it runs under CI."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")
