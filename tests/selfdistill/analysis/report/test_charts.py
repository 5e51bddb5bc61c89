from __future__ import annotations

import pytest

from selfdistill.analysis.report.charts import ticks


def test_ticks_are_round_and_cover_the_values() -> None:
    assert ticks(60, whole=True) == [0, 20, 40, 60]
    assert ticks(0.096) == pytest.approx([0, 0.02, 0.04, 0.06, 0.08, 0.1])
    assert ticks(0) == [0, 1]
    assert ticks(3, whole=True) == [0, 1, 2, 3]
    for highest in (0.003, 0.7, 1.01, 9.9, 12345):
        found = ticks(highest)
        assert found[-2] < highest <= found[-1] * (1 + 1e-9)
        assert 4 <= len(found) <= 7
