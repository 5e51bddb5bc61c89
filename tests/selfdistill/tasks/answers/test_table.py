"""The table of answers: what a person says about each, what we say, what math-verify alone says."""

from __future__ import annotations

import importlib.metadata

import pytest
from plain_math_verify import MEASURED_WITH, measured, read_table

from selfdistill.tasks.answers import MathVerifyChecker, PlainChecker

ROWS = read_table()

# The pairs of shared/reports that made this table necessary: (gold, answer, what a person says).
REPORTED = [
    ("2 1/2", "1.5", "no"),
    ("2 1/2", "2.5", "yes"),
    ("235", r"1\,234\text{ cm}", "no"),
    ("1234", r"1\,234\text{ cm}", "yes"),
    ("0", r"1\,000\text{ m}", "no"),
    ("0", r"0.\overline{3}", "no"),
    ("52_8", "52_9", "no"),
    ("x+y=3", "3", "no"),
    ("3e", "1e3", "no"),
    ("1000", "1e3", "yes"),
    ("-1", "i^2", "yes"),
    ("0.5", r"\sin 30^\circ", "yes"),
    (r"\sqrt{2}", "√2", "yes"),
    ("x²", "x^2", "yes"),
    ("½", "0.5", "yes"),
    ("18", r"\$18", "yes"),
    ("18", r"\text{18 dollars}", "yes"),
    ("18", "18 dollars", "yes"),
    ("18", "18 km/h", "yes"),
    ("18", "**18**", "yes"),
    ("June 20", r"\text{June 20}", "yes"),
    (r"\text{6:00 PM}", "6:00 PM", "yes"),
    (r"\text{True}", "True", "yes"),
    (r"10 \bmod 3", "3", "no"),
    ("100", "100.0000001", "no"),
    ("0.5", "0.5000001", "no"),
    ("18", "18!", "no"),
    ("a", "A", "no"),
    ("A", "(a)", "yes"),
    ("0.0000001", "1e-07", "yes"),
    ("0.0000001", "e-7", "no"),
]


@pytest.fixture(scope="module")
def checker() -> MathVerifyChecker:
    pytest.importorskip("math_verify", reason="pip install 'math-verify[antlr4_13_2]>=0.8'")
    return MathVerifyChecker()


def test_the_table_is_large_and_has_every_pair_once() -> None:
    assert len({(row.gold, row.answer) for row in ROWS}) == len(ROWS) >= 650
    assert {(row.gold, row.answer, row.same) for row in ROWS} >= set(REPORTED)
    assert {row.same for row in ROWS} == {"yes", "no"}


def test_every_verdict_is_the_one_of_a_person(checker: MathVerifyChecker) -> None:
    verdicts = checker.decide([(row.gold, row.answer) for row in ROWS])
    wrong = [
        (row, verdict)
        for row, verdict in zip(ROWS, verdicts, strict=True)
        if verdict is not (row.same == "yes")
    ]
    assert wrong == []


def test_without_algebra_nothing_wrong_is_right_and_most_of_the_rest_is() -> None:
    checker = PlainChecker()
    verdicts = {row: checker.equal(row.gold, row.answer) for row in ROWS}
    assert [row for row, verdict in verdicts.items() if verdict and row.same == "no"] == []
    missed = [row for row, verdict in verdicts.items() if not verdict and row.same == "yes"]
    # What is left for math-verify are expressions, those in collections and statements among them.
    assert len(missed) < 0.2 * len(ROWS)
    without = {"currency", "number", "percent", "thousands", "repeating", "base", "text", "choice"}
    assert not without & {row.kind for row in missed}


DRESSES = {
    "box": r"\boxed{%s}",
    "dollars": "$%s$",
    "display": "\\[\n%s\n\\]",
    "bold": "**%s**",
    "sentence": "The answer is %s.",
    "spaces": "  %s \n",
}
# These have such a dress already, or end in dots that belong to them.
PLAIN_ROWS = [
    row
    for row in ROWS
    if row.kind != "markdown" and not set("$*`") & set(row.answer) and row.answer[-1] not in "."
]


@pytest.mark.parametrize("dress", DRESSES)
def test_dress_changes_no_verdict(dress: str) -> None:
    checker = PlainChecker()
    changed = [
        row
        for row in PLAIN_ROWS
        if checker.equal(row.gold, DRESSES[dress] % row.answer)
        != checker.equal(row.gold, row.answer)
    ]
    assert changed == []


@pytest.mark.slow
def test_the_columns_of_math_verify_are_what_it_says() -> None:
    """Run `python -m plain_math_verify` to write them anew."""
    install = f"pip install 'math-verify[antlr4_13_2]=={MEASURED_WITH}'"
    pytest.importorskip("math_verify", reason=install)
    if importlib.metadata.version("math_verify") != MEASURED_WITH:
        pytest.skip(f"another version is installed, with other verdicts: {install}")
    assert [row for row in ROWS if measured(row) != row] == []
