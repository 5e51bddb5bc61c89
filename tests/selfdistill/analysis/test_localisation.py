from __future__ import annotations

import pytest
import torch
from token_records import record

from selfdistill.analysis.localisation import (
    gemm_count,
    localisation_table,
    localise,
    mask_effects,
    overall,
    profile,
    share_times,
    suggest,
)
from selfdistill.evaluation.intervals import Interval
from selfdistill_kernels import AdvantageMask


def value(interval: Interval | None) -> float:
    assert interval is not None
    return interval.value


def test_localisation_looks_before_at_and_after_the_wrong_step() -> None:
    found = localise(
        [
            record([0.2, 0.4, -3.0, 1.0, 0.0], (2, 4), [0, 0, 3, 0, 1]),
            record([-0.3, -5.0], (1, 2), problem="q"),
            record([9.0, 9.0], None),
        ]
    )
    assert (found.attempts, found.problems) == (2, 2)
    assert value(found.mean_before) == pytest.approx((0.2 + 0.4 - 0.3) / 3)
    assert value(found.mean_at) == pytest.approx((-3 + 1 - 5) / 3)
    assert value(found.mean_after) == pytest.approx(0)
    assert value(found.lowest_at) == pytest.approx(-4)
    assert value(found.share_at) == pytest.approx(9 / 9.9)
    assert value(found.tokens_at) == pytest.approx(3 / 7)
    assert value(found.negative_before) == pytest.approx(1 / 3)
    assert value(found.kl_share_at) == pytest.approx(3 / 4)
    # Either attempt alone, or both: what the resamples can be.
    assert found.mean_at is not None
    assert (found.mean_at.low, found.mean_at.high) == pytest.approx((-5.0, -1.0))
    nothing = localise([record([1.0], None)])
    assert (nothing.attempts, nothing.mean_before, nothing.share_at) == (0, None, None)


def test_how_many_times_the_share_is_compares_the_same_attempts() -> None:
    sharp = [record([0.0, -3.0], (1, 2)), record([1.0, -3.0], (1, 2), problem="q")]
    blunt = [record([2.0, -2.0], (1, 2)), record([2.0, -1.0], (1, 2), problem="q")]
    right = record([5.0, 5.0], None, problem="r")
    found = share_times([*sharp, right], [*blunt, right])
    assert value(found) == pytest.approx((6 / 7) / (3 / 7))
    ours, theirs = localise(sharp).share_at, localise(blunt).share_at
    assert value(found) == pytest.approx(value(ours) / value(theirs))
    assert found is not None
    # Both resamples of one problem alone: 1 / 0.5 and 0.75 / (1 / 3).
    assert (found.low, found.high) == pytest.approx((2.0, 2.25))
    assert share_times([right], [right]) is None
    with pytest.raises(ValueError, match="one at p beside one at q"):
        share_times(sharp, blunt[::-1])


def test_attempts_at_one_problem_are_resampled_together() -> None:
    records = [record([0.0, a], (1, 2)) for a in (-1.0, -3.0)]
    found = localise(records).mean_at
    assert found is not None
    assert (found.value, found.low, found.high) == (-2.0, -2.0, -2.0)


def test_an_error_in_the_first_step_has_nothing_before_it() -> None:
    found = localise([record([-9.0, 0.5], (0, 1))])
    assert found.mean_before is None
    assert found.negative_before is None
    assert value(found.mean_at) == -9.0
    table = localisation_table("t", {"a": found})
    cells = {row[0]: row[1] for row in table.rows}
    assert cells["mean A before the first wrong step (nats)"] == "\N{EN DASH}"
    assert cells["mean A within it"] == "-9.000 [-9.000, -9.000]"
    assert "-9.000 [-9.000, -9.000]" in table.markdown()


def test_whole_attempts_need_no_steps() -> None:
    found = overall([record([0.5, -0.5, -0.05, 0.05], None, [1, 2, 3, 4])])
    assert (found.attempts, found.problems) == (1, 1)
    assert value(found.mean) == pytest.approx(0)
    assert value(found.magnitude) == pytest.approx(1.1 / 4)
    assert value(found.kl) == pytest.approx(2.5)
    assert value(found.negative) == pytest.approx(1 / 4)
    assert overall([]).mean is None


def test_the_profile_counts_from_the_start_of_the_wrong_step() -> None:
    found = profile(
        [record([0.1, 0.2, -3.0, 1.0], (2, 3)), record([0.4, -1.0], (1, 2)), record([7.0], None)],
        reach=1,
    )
    assert [(p.offset, p.tokens) for p in found] == [(-1, 2), (0, 2), (1, 1)]
    assert [p.mean for p in found] == pytest.approx([0.3, -2.0, 1.0])


def test_masks_keep_what_the_loss_would_keep() -> None:
    advantage = [0.0, 0.05, -0.1, -0.5, 2.0, -4.0]
    kl = [1.0, 0.0, 1.0, 2.0, 3.0, 3.0]
    effects = mask_effects(
        [record(advantage[:3], None, kl[:3]), record(advantage[3:], None, kl[3:], problem="q")],
        thresholds=(0.0, 0.1),
        signs=("any", "negative", "positive"),
    )
    assert [(e.sign, e.threshold) for e in effects] == [
        (sign, threshold) for sign in ("any", "negative", "positive") for threshold in (0.0, 0.1)
    ]
    for e in effects:
        kept = AdvantageMask(threshold=e.threshold, sign=e.sign).select(
            torch.tensor(advantage, dtype=torch.float64), torch.ones(6, dtype=torch.bool)
        )
        rho = kept.double().mean().item()
        assert e.rho.value == pytest.approx(rho)
        sizes = torch.tensor(advantage, dtype=torch.float64).abs()
        assert value(e.advantage_kept) == pytest.approx((sizes[kept].sum() / 6.65).item())
        assert value(e.kl_kept) == pytest.approx(torch.tensor(kl)[kept].sum().item() / 10)
        assert e.gemms == pytest.approx(
            {
                "store": 2 + 2 * rho,
                "store, head frozen": 2 + rho,
                "recompute": 2 + 4 * rho,
                "recompute, head frozen": 2 + 3 * rho,
            }
        )
        assert e.saved["store"] == pytest.approx(1 - (2 + 2 * rho) / 4)
        assert e.saved["recompute, head frozen"] == pytest.approx(1 - (2 + 3 * rho) / 5)
    any_01 = effects[1]
    assert any_01.rho.value == pytest.approx(3 / 6)  # |A| = 0.1 is not above 0.1
    assert gemm_count("store", 1.0) == 4


def test_the_suggested_mask_has_the_fewest_tokens_that_keep_enough() -> None:
    effects = mask_effects([record([0.02] * 50 + [-5.0] * 2 + [0.5] * 2, None)])
    chosen = suggest(effects, kept=0.9)
    assert chosen is not None
    assert (chosen.sign, chosen.threshold) == ("any", 0.03)
    assert chosen.rho.value == pytest.approx(4 / 54)
    everything = suggest(effects, kept=1.0)
    assert everything is not None
    assert everything.rho.value == 1.0
    assert suggest(mask_effects([record([0.0, 0.0], None)])) is None
