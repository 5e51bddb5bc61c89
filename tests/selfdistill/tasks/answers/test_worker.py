"""The process that compares: run here with its own clock and a comparison that never ends."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("math_verify", reason="pip install 'math-verify[antlr4_13_2]>=0.8'")

# A comparison that takes for ever, in Python; and one that swallows every Exception on its way.
SLOW_ALGEBRA = """
import sys
from selfdistill.tasks.answers import worker

def for_ever(gold, answer):
    while answer == "s+l+o+w":
        try:
            sum(range(1000))
        except Exception:
            pass
    if answer == "m+e+m":
        raise MemoryError
    return gold == "x"

worker.SECONDS = 0.2
worker.same_expression = for_ever
worker.main()
"""


def answers(*command: str, questions: list[tuple[str, str]]) -> list[object]:
    lines = "".join(json.dumps(question) + "\n" for question in questions)
    result = subprocess.run(
        [sys.executable, *command], input=lines, capture_output=True, text=True, check=True
    )
    ready, *verdicts = result.stdout.splitlines()
    assert ready == "ready"
    return [json.loads(verdict) for verdict in verdicts]


def test_each_line_gets_one_verdict() -> None:
    found = answers(
        "-m",
        "selfdistill.tasks.answers.worker",
        questions=[
            ("x", "2x/2"),
            ("2A", "2a"),
            (r"\{1, \sqrt{8}\}", r"2\sqrt{2}, 1"),
            ("7", "}{"),
            ("7", "12345!"),
            ("x\n", "\ud800"),
        ],
    )
    assert found == [True, False, True, False, None, False]


def test_what_takes_too_long_is_undecided_and_the_next_one_is_not() -> None:
    questions = [("x", "y+1"), ("x", "s+l+o+w"), ("x", "m+e+m"), ("z", "y+1"), ("x", "s+l+o+w")]
    assert answers("-c", SLOW_ALGEBRA, questions=questions) == [True, None, None, False, None]
