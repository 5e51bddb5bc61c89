from __future__ import annotations

import pytest

from benchmarks.timing import EventTimer, Timing, clock_for, interleave, rotate
from selfdistill_kernels.tools.event_clock import EventClock


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


class Stream:
    """A stream: work is queued, takes its time later, and events note when they are reached."""

    def __init__(self) -> None:
        self.queue: list[float | FakeEvent] = []
        self.seconds = 0.0
        self.waits = 0

    def synchronize(self) -> None:
        self.waits += 1
        for item in self.queue:
            if isinstance(item, FakeEvent):
                item.at = self.seconds
            else:
                self.seconds += item
        self.queue = []

    def event(self) -> FakeEvent:
        return FakeEvent(self)


class FakeEvent:
    """torch.cuda.Event on a Stream."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.at: float | None = None

    def record(self) -> None:
        self.stream.queue.append(self)

    def synchronize(self) -> None:
        self.stream.synchronize()

    def elapsed_time(self, end_event: FakeEvent) -> float:
        assert self.at is not None
        assert end_event.at is not None
        return (end_event.at - self.at) * 1e3  # milliseconds, as torch's


def test_event_clock_times_the_queued_work_and_nothing_before():
    stream = Stream()
    clock = EventClock(stream.event, stream.synchronize)
    stream.queue.append(5.0)  # of somebody else
    assert clock(lambda: stream.queue.append(0.25)) == pytest.approx(0.25)
    assert clock(lambda: stream.queue.extend([0.5, 0.25])) == pytest.approx(0.75)


def test_event_clock_releases_the_result_off_the_clock():
    stream = Stream()

    class Result:
        def __del__(self):
            stream.queue.append(9.0)

    clock = EventClock(stream.event, stream.synchronize)
    assert clock(Result) == 0.0


def test_event_timer_is_a_clock_of_the_stream():
    stream = Stream()
    timer = EventTimer(stream.event)
    start = timer()
    stream.queue.append(0.5)
    middle = timer()
    stream.queue.append(2.0)
    assert (start, middle - start, timer() - middle) == (0.0, 0.5, 2.0)


def test_on_a_gpu_the_clock_is_made_of_events():
    assert isinstance(clock_for("cuda"), EventClock)
    assert not isinstance(clock_for("cpu"), EventClock)


def test_inputs_take_turns():
    step = rotate([lambda: "a", lambda: "b"])
    assert [step() for _ in range(5)] == list("ababa")
    with pytest.raises(ValueError, match="at least one"):
        rotate([])
