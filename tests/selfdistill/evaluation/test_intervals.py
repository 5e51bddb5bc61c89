from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from selfdistill.evaluation.intervals import (
    Interval,
    bootstrap,
    standard_error,
    student_quantile,
    widen,
)
from selfdistill.evaluation.resampling import crossed_difference, crossed_mean, share_interval
from selfdistill.evaluation.scores import summarize

Scores = NDArray[np.float64]


def drawn(values: Scores) -> Interval:
    """The bootstrap alone."""
    picks = np.random.default_rng(0).integers(0, len(values), (10_000, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


@pytest.mark.parametrize("count", [1, 2, 3, 10, 29, 30, 200])
def test_nothing_right_is_not_zero_for_certain(count: int) -> None:
    # With a success rate above `high`, nothing would be right in less than 2.5 % of the cases.
    high = 1 - 0.025 ** (1 / count)
    nothing = bootstrap([0.0] * count)
    assert (nothing.value, nothing.low, nothing.high) == pytest.approx((0, 0, high))
    everything = bootstrap([1.0] * count)
    assert (everything.value, everything.low, everything.high) == pytest.approx((1, 1 - high, 1))
    assert crossed_mean([[0.0] * count] * 3) == nothing
    assert share_interval([0] * count, [7] * count) == nothing


def test_two_problems_say_next_to_nothing() -> None:
    for values in ([0.25, 0.25], [0.25, 0.5], [0.0, 1.0]):
        found = bootstrap(values)
        assert found.high - found.low > 0.9
    for values in ([0.5], [0.25]):
        assert bootstrap(values) == Interval(values[0], 0.0, 1.0)


@pytest.mark.parametrize("count", [30, 64, 100, 200])
def test_many_problems_keep_the_bootstrap(count: int) -> None:
    rng = np.random.default_rng(count)
    scores = rng.binomial(12, rng.beta(1, 2, count)) / 12
    found = bootstrap(scores.tolist())
    assert (found.value, found.low, found.high) == pytest.approx(
        (scores.mean(), drawn(scores).low, drawn(scores).high)
    )
    yes = (rng.random(count) < 0.5).astype(float)
    assert bootstrap(yes.tolist()).low == pytest.approx(drawn(yes).low)


def test_a_rare_success_among_many_is_uncertain() -> None:
    values = [0.0] * 199 + [1.0]
    found = bootstrap(values)
    assert found.low == 0
    # 1 of 200: Wilson's interval ends at 2.8 %, resampling at 1.5 %.
    assert found.high == pytest.approx(0.0278, abs=2e-4)


def test_an_interval_is_only_ever_widened() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 5, 29, 30, 50):
        scores = rng.random(count)
        inside, around = drawn(scores), bootstrap(scores.tolist())
        assert around.low <= inside.low <= around.value <= inside.high <= around.high
        assert around.low >= 0
        assert around.high <= 1


WORLDS: dict[str, tuple[Callable[[np.random.Generator, int], Scores], float]] = {
    "mixed": (lambda rng, n: rng.binomial(4, rng.beta(0.5, 0.9, n)) / 4, 0.5 / 1.4),
    "rare": (lambda rng, n: rng.binomial(4, 0.3 * (rng.random(n) < 0.1)) / 4, 0.03),
    "yes or no": (lambda rng, n: (rng.random(n) < 0.4).astype(float), 0.4),
}


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("count", [2, 3, 5, 10, 20])
def test_the_true_mean_lies_inside_as_often_as_said(name: str, count: int) -> None:
    """The bootstrap alone holds it in 17 to 96 % of these cases."""
    draw, true = WORLDS[name]
    rng = np.random.default_rng(7)
    inside, tries = 0, 300
    for _ in range(tries):
        values = draw(rng, count)
        picks = rng.integers(0, count, (400, count))
        low, high = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
        found = widen(
            Interval(float(values.mean()), float(low), float(high)),
            error=standard_error(values),
            count=count,
            bounds=(0.0, 1.0),
        )
        inside += found.low <= true <= found.high
    # 95 %, less 2.5 standard errors of this very count.
    assert inside / tries >= 0.95 - 2.5 * math.sqrt(0.95 * 0.05 / tries)


def test_differences_of_few_problems_are_uncertain() -> None:
    equal = crossed_difference([[0.5, 0.5]], [[0.5, 0.5]])
    assert equal.value == 0
    assert equal.low < -0.9
    assert equal.high > 0.9
    many = crossed_difference([[0.5] * 60], [[0.75] * 60])
    assert (many.low, many.high) == (0.25, 0.25)


def test_lengths_have_no_bounds() -> None:
    lengths = [10.0, 14.0, 12.0]
    found = crossed_mean([lengths], bounds=None)
    # Student's interval of three values.
    assert found.high == pytest.approx(12 + 4.3027 * 2 / math.sqrt(3), rel=1e-4)
    assert crossed_mean([[10.0]], bounds=None) == Interval(10.0, 10.0, 10.0)
    many = (100 * np.random.default_rng(0).random(40)).tolist()
    assert bootstrap(many, bounds=None).high == pytest.approx(drawn(np.asarray(many)).high)


def test_students_distribution() -> None:
    known = {1: 12.7062, 2: 4.3027, 5: 2.5706, 10: 2.2281, 28: 2.0484, 1000: 1.9623}
    for freedom, quantile in known.items():
        assert student_quantile(freedom) == pytest.approx(quantile, abs=2e-4)
    assert student_quantile(0) == math.inf


def test_summaries_use_it() -> None:
    from selfdistill.rollout.attempts import Attempts
    from selfdistill.rollout.engine import Rollout
    from selfdistill.tasks.arithmetic import ArithmeticTask
    from selfdistill.tasks.interface import Verdict

    task = ArithmeticTask(step_counts=(1,))
    wrong = Verdict("1", False, False, None, None, True)
    attempts = [
        Attempts(problem, [Rollout([1], [0.0], "", True)] * 4, [wrong] * 4)
        for problem in task.problems(split="dev", count=2)
    ]
    found = summarize(attempts, task, split="dev")
    for metric in ("avg_at_k", "maj_at_k", "pass_at_k", "strict_avg_at_k"):
        assert getattr(found, metric).high == pytest.approx(0.8419, abs=1e-4)
