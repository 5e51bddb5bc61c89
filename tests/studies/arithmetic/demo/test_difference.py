from __future__ import annotations

import pytest

from selfdistill.evaluation.intervals import Interval, bootstrap
from selfdistill.evaluation.scores import Evaluation, ProblemScore
from studies.arithmetic.demo.difference import avg_difference


def evaluation(correct: list[int], *, samples: int = 4, prefix: str = "p") -> Evaluation:
    unused = Interval(0.0, 0.0, 0.0)
    return Evaluation(
        split="test",
        samples=samples,
        pass_at_k=unused,
        maj_at_k=unused,
        avg_at_k=bootstrap([c / samples for c in correct]),
        strict_avg_at_k=unused,
        finished=1.0,
        mean_tokens=1.0,
        problems=tuple(ProblemScore(f"{prefix}{i}", c, c, False) for i, c in enumerate(correct)),
    )


def test_paired_difference_is_sharper_than_two_intervals() -> None:
    before = evaluation([0, 1, 2, 3] * 10)
    after = evaluation([1, 2, 3, 4] * 10)
    difference = avg_difference(before, after)
    assert difference.value == pytest.approx(0.25)
    # Every problem rose alike: the pairs know it, the two intervals alone do not.
    assert difference.low == pytest.approx(0.25)
    assert after.avg_at_k.low - before.avg_at_k.high < 0.1
    with pytest.raises(ValueError, match="same problems"):
        avg_difference(before, evaluation([1, 2, 3, 4] * 10, prefix="q"))


def test_a_single_problem_says_little_about_others() -> None:
    alone = evaluation([2])
    assert avg_difference(alone, alone).high > 0.9
