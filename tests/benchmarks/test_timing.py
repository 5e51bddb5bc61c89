from __future__ import annotations

import pytest

from benchmarks.timing import Timing, clock_for, interleave


def test_each_round_runs_all_and_starts_one_further():
    calls = []
    steps = {key: (lambda key=key: calls.append(key)) for key in "abc"}

    def clock(step):
        step()
        return float(len(calls))

    timings = interleave(steps, 2, clock=clock)
    assert "".join(calls) == "abc" + "bca" + "cab"
    # The first round is discarded.
    assert timings == {"a": Timing([6.0, 8.0]), "b": Timing([4.0, 9.0]), "c": Timing([5.0, 7.0])}


def test_on_step_hears_of_each_call():
    heard = []
    interleave({"a": int, "b": int}, 1, clock=lambda step: 0.0, on_step=heard.append)
    assert heard == ["a", "b", "b", "a"]


def test_rounds_below_one_are_refused():
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        interleave({"a": int}, 0, clock=clock_for("cpu"))


def test_ratios_and_spread():
    floor, own = Timing([1.0, 2.0, 4.0]), Timing([3.0, 3.0, 4.0])
    assert own.median == 3.0
    assert own.over(floor) == 1.5
    assert own.over_by_round(floor) == 1.5  # of 3, 1.5 and 1
    assert Timing([1.0, 2.0, 3.0, 4.0, 5.0]).spread == pytest.approx(2 / 3)
    assert Timing([1.0]).spread == 0.0


def test_drift_between_rounds_cancels_within_them():
    floor, own = Timing([1.0, 10.0, 100.0]), Timing([2.0, 20.0, 200.0])
    assert own.over_by_round(floor) == 2.0


def test_wall_clock_leaves_the_release_of_results_out():
    """A result whose release is slow: the clock stops before."""
    import time

    class Slow:
        def __del__(self):
            time.sleep(0.5)

    assert clock_for("cpu")(Slow) < 0.4
