from __future__ import annotations

import numpy as np
import pytest

from selfdistill.evaluation.intervals import bootstrap
from selfdistill.evaluation.resampling import (
    crossed_difference,
    crossed_mean,
    quotient_interval,
    ratio_intervals,
)


def test_a_ratio_of_means_over_equal_rows_is_the_plain_bootstrap() -> None:
    values = [0.0, 1.0, 1.0, 0.25, 0.5] * 6
    (found,) = ratio_intervals([[v] for v in values], [[1.0]] * 30)
    expected = bootstrap(values)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx(
        (expected.value, expected.low, expected.high)
    )


def test_rows_weigh_as_much_as_their_denominators() -> None:
    (found,) = ratio_intervals([[6.0], [-1.0]], [[3.0], [1.0]])
    assert found is not None
    assert found.value == pytest.approx(5 / 4)
    # Resamples hold the first row twice, the second twice, or one of each.
    assert (found.low, found.high) == pytest.approx((-1.0, 2.0))


def test_columns_without_anything_are_none_and_resamples_that_miss_them_are_left_out() -> None:
    nothing, rare = ratio_intervals([[0.0, 2.0], [0.0, 0.0]], [[0.0, 4.0], [0.0, 0.0]])
    assert nothing is None
    assert rare is not None
    assert (rare.value, rare.low, rare.high) == (0.5, 0.5, 0.5)
    assert ratio_intervals(np.zeros((0, 2)), np.zeros((0, 2))) == [None, None]
    with pytest.raises(ValueError, match=r"\(2, 1\) and \(1, 1\)"):
        ratio_intervals([[1.0], [2.0]], [[1.0]])


def test_a_quotient_of_ratios_sees_the_same_rows_on_both_sides() -> None:
    rng = np.random.default_rng(0)
    share = rng.random(40)
    found = quotient_interval(np.stack([share, 3 * share], 1), np.ones((40, 2)))
    assert found is not None
    # Each ratio varies between resamples, their quotient does not.
    assert (found.value, found.low, found.high) == pytest.approx((3, 3, 3))
    apart = quotient_interval(np.stack([share, 3 * rng.permutation(share)], 1), np.ones((40, 2)))
    assert apart is not None
    assert apart.value == pytest.approx(3)
    assert apart.low < 2.7 < 3.3 < apart.high
    assert quotient_interval([[0.0, 1.0]], [[1.0, 1.0]]) is None
    often_zero = quotient_interval([[0, 1], [1, 1], [0, 1], [0, 1]], np.ones((4, 2)))
    assert often_zero is not None
    assert (often_zero.value, often_zero.high) == (4.0, np.inf)
    assert 1 <= often_zero.low < 4
    assert quotient_interval([[1.0, 0.0]], [[1.0, 0.0]]) is None
    with pytest.raises(ValueError, match=r"\[rows, 2\]"):
        quotient_interval([[1.0]], [[1.0]])


def test_one_seed_gives_the_interval_over_problems() -> None:
    values = [0.0, 0.5, 0.25, 1.0, 1.0, 0.0]
    found, expected = crossed_mean([values]), bootstrap(values)
    assert (found.value, found.low, found.high) == pytest.approx(
        (expected.value, expected.low, expected.high)
    )
    with pytest.raises(ValueError, match="seeds, problems"):
        crossed_mean([])


def test_seeds_that_disagree_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    problems = rng.random(50)
    equal = crossed_mean([problems, problems, problems])
    apart = crossed_mean([problems - 0.3, problems, problems + 0.3])
    assert apart.value == pytest.approx(equal.value)
    assert apart.low == pytest.approx(equal.value - 0.3, abs=0.1)
    assert apart.high - apart.low > 2 * (equal.high - equal.low)


def test_differences_are_paired_by_problem() -> None:
    rng = np.random.default_rng(1)
    hard = rng.random(80)
    found = crossed_difference([hard, hard], [hard + 0.1])
    # The same rise on every problem: the spread of the problems must not show.
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    shuffled = crossed_difference([hard], [rng.permutation(hard) + 0.1])
    assert shuffled.value == pytest.approx(0.1)
    assert shuffled.low < 0.05 < 0.15 < shuffled.high
    with pytest.raises(ValueError, match="80 and 3"):
        crossed_difference([hard], [hard[:3]])
