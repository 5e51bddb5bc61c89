"""The tile plan keeps its budget and says what it does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfdistill_kernels.plan import AUTO_CAP, AUTO_ROWS, TilePlan


def plan(**changes):
    given = {"tokens": 4096, "vocabulary": 49152, "heads": 2, "workspace": 0}
    return TilePlan.store(**{**given, **changes})


def test_auto_choices():
    assert plan().buffer_rows == 2 * AUTO_ROWS
    assert plan(tokens=3).buffer_rows == 6
    assert plan(heads=1).buffer_rows == AUTO_ROWS
    assert plan(vocabulary=151936).bytes <= AUTO_CAP
    # A vocabulary whose single row passes the cap still gets one tile.
    assert plan(vocabulary=AUTO_CAP).buffer_rows == 2


@given(
    tokens=st.integers(0, 10_000),
    vocabulary=st.integers(1, 300_000),
    heads=st.sampled_from([1, 2]),
    spare=st.integers(0, 10**8),
)
def test_a_given_budget_is_kept(tokens, vocabulary, heads, spare):
    budget = heads * 4 * vocabulary + spare
    made = plan(tokens=tokens, vocabulary=vocabulary, heads=heads, workspace=budget)
    assert heads <= made.buffer_rows
    assert made.bytes <= budget


def test_too_small_a_budget_is_refused():
    with pytest.raises(ValueError, match="at least 393216 bytes"):
        plan(workspace=393215)


def test_describe_names_tile_and_bytes():
    assert plan().describe() == "store: 256 tokens x 2 heads x 49152 logits a tile, 96.0 MiB"
