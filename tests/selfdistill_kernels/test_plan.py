"""The tile plan keeps its budget, makes the choices that were measured, and says what it does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfdistill_kernels.plan import AUTO_CAP, AUTO_TOKENS, FEW_TOKENS, MEBIBYTE, TilePlan

SMALL = {"hidden": 576, "vocabulary": 49152}
LARGE = {"hidden": 1024, "vocabulary": 151936}


def plan(**changes):
    given = {"tokens": 4096, **SMALL, "heads": 2, "itemsize": 4, "need_weight": True}
    return TilePlan.choose(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "strategy", "rows"),
    [
        ({}, "store", AUTO_TOKENS),
        ({"tokens": 100}, "store", 100),
        ({"tokens": 3}, "store", 3),
        ({"tokens": 0}, "store", 1),
        ({"heads": 1}, "store", AUTO_TOKENS),
        (LARGE, "store", AUTO_CAP // (8 * 151936)),
        # Rows that the GEMM of dW likes less are left out, where there are several tiles of them.
        ({**LARGE, "workspace": 64 * MEBIBYTE}, "store", 47),
        ({**LARGE, "workspace": 64 * MEBIBYTE, "need_weight": False}, "store", 55),
        ({**LARGE, "workspace": 64 * MEBIBYTE, "tokens": 50}, "store", 50),
        # Few rows: dW would be read and written for each of them ...
        ({**LARGE, "workspace": 32 * MEBIBYTE}, "recompute", 512),
        # ... unless there is no dW, or there are no more tokens.
        ({**LARGE, "workspace": 32 * MEBIBYTE, "need_weight": False}, "store", 27),
        ({**LARGE, "workspace": 32 * MEBIBYTE, "tokens": 20}, "store", 20),
        # 16-bit inputs: one tile, or a float32 dW beside several where it fits, else slabs.
        ({"itemsize": 2, "tokens": 512}, "store", 512),
        ({"itemsize": 2}, "store", (AUTO_CAP - 4 * 49152 * 576) // (8 * 49152)),
        ({"itemsize": 2, "workspace": 160 * MEBIBYTE}, "store", 138),
        ({"itemsize": 2, "workspace": 128 * MEBIBYTE}, "recompute", 512),
        ({**LARGE, "itemsize": 2}, "recompute", 512),
    ],
)
def test_choices(changes, strategy, rows):
    made = plan(**changes)
    assert (made.strategy, made.rows) == (strategy, rows)


@given(
    tokens=st.integers(0, 10_000),
    vocabulary=st.integers(1, 300_000),
    heads=st.sampled_from([1, 2]),
    itemsize=st.sampled_from([2, 4]),
    need_weight=st.booleans(),
    spare=st.integers(0, 10**8),
)
def test_a_given_budget_is_kept(tokens, vocabulary, heads, itemsize, need_weight, spare):
    budget = heads * 4 * min(16, vocabulary) + spare
    made = plan(
        tokens=tokens,
        vocabulary=vocabulary,
        heads=heads,
        itemsize=itemsize,
        need_weight=need_weight,
        workspace=budget,
    )
    assert made.rows >= 1
    assert 1 <= made.columns <= vocabulary
    assert made.bytes <= budget
    if made.strategy == "store":
        assert made.columns == vocabulary
        assert made.rows >= min(FEW_TOKENS, tokens) or not need_weight


def test_too_small_a_budget_is_refused():
    with pytest.raises(ValueError, match=r"workspace: 127 bytes .*at least 128 bytes"):
        plan(workspace=127)


def test_describe_names_strategy_tile_and_bytes():
    assert plan().describe() == (
        "store (one visit, 2 + 2 rho GEMMs): tiles of 512 tokens x 49152 logits x 2 models, "
        "192.0 MiB"
    )
    assert plan(**LARGE, workspace=32 * MEBIBYTE).describe() == (
        "recompute (two sweeps over slabs, 2 + 4 rho GEMMs): tiles of 512 tokens x 8192 logits x "
        "2 models, 32.0 MiB"
    )
