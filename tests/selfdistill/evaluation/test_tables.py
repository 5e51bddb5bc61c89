from __future__ import annotations

import io
import re
from dataclasses import replace

from rich.console import Console

from selfdistill.evaluation.intervals import Interval
from selfdistill.evaluation.scores import Evaluation, ProblemScore
from selfdistill.evaluation.tables import evaluation_table, percent


def test_intervals_read_as_percent_and_differences_as_points() -> None:
    assert percent(Interval(0.3654, 0.33, 0.3999)) == "36.5 % [33.0, 40.0]"
    assert percent(Interval(0.051, -0.01, 0.112), sign=True) == "+5.1 [-1.0, +11.2]"


def test_every_metric_stands_under_its_evaluation() -> None:
    def evaluation(shift: float) -> Evaluation:
        values = [Interval(x + shift, x + shift, x + shift) for x in (0.1, 0.2, 0.3, 0.4)]
        score = ProblemScore("p", 1, 1, True)
        return Evaluation(
            "test",
            5,
            *values,
            finished=1,
            mean_tokens=9,
            problems=(score,),
            strict_means="in the step format",
        )

    output = io.StringIO()
    Console(file=output, width=80).print(
        evaluation_table({"before": evaluation(0), "after": evaluation(0.5)})
    )
    text = output.getvalue()
    assert "1 test problems, 5 attempts each" in text
    rows = {
        "Pass@5": ("10.0 %", "60.0 %"),
        "Maj@5": ("20.0 %", "70.0 %"),
        "Avg@5 ": ("30.0 %", "80.0 %"),
        "Avg@5, in the step format": ("40.0 %", "90.0 %"),
    }
    for label, (before, after) in rows.items():
        (line,) = (line for line in text.splitlines() if label in line)
        assert line.index(before) < line.index(after)


def test_a_demand_that_nobody_made_has_no_row() -> None:
    score = ProblemScore("p", 1, 0, True)
    evaluation = Evaluation("test", 2, *[Interval(1, 1, 1)] * 4, 1.0, 9.0, (score,))
    assert "Avg@2, every step right" in evaluation_table({"a": evaluation}).columns[0]._cells
    without = evaluation_table({"a": replace(evaluation, strict_means="")})
    assert without.columns[0]._cells == ["Avg@2", "Maj@2", "Pass@2"]


def test_what_was_not_judged_is_said_where_there_is_some() -> None:
    def rows(**counts: int) -> str:
        output = io.StringIO()
        score = ProblemScore("p", 1, 1, True)
        evaluation = Evaluation("test", 2, *[Interval(1, 1, 1)] * 4, 1.0, 9.0, (score,), **counts)
        Console(file=output, width=80).print(evaluation_table({"a": evaluation}))
        return output.getvalue()

    assert "undecided" not in rows()
    assert "left out" not in rows()
    assert re.search(r"attempts undecided, count as wrong .* 3 ", rows(undecided=3))
    assert re.search(r"problems left out, too long .* 4 ", rows(too_long=4))
