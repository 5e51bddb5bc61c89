from __future__ import annotations

import datetime
from decimal import Decimal
from typing import Any

import pytest

from selfdistill.tasks.interface import TaskError
from selfdistill.tasks.rows import Row, WrittenFloat, plain_decimal


def row(value: Any) -> Row:
    return Row({"f": value, "other": 1}, "data.jsonl, line 7")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (" 18 dollars\n", "18 dollars"),
        (18, "18"),
        (2**70 + 1, str(2**70 + 1)),
        (WrittenFloat("1e-07"), "0.0000001"),
        (WrittenFloat("0.12345678901234567890"), "0.12345678901234567890"),
        (WrittenFloat("1.50"), "1.50"),
        (WrittenFloat("1e999"), "1e999"),
        (1e-07, "0.0000001"),
        (1e15, "1000000000000000.0"),
        (Decimal("1.10"), "1.10"),
    ],
)
def test_answers_are_what_a_person_would_have_written(value: Any, text: str) -> None:
    assert row(value).text("f", "answer") == text
    assert row(value).text("f", "id") == text


@pytest.mark.parametrize(
    "value", [None, True, [1], {"a": 1}, "", " ", b"x", float("nan"), float("inf"), float("-inf")]
)
def test_what_is_no_answer_is_refused_with_place_and_field(value: Any) -> None:
    message = (
        r"^data\.jsonl, line 7: field 'f' \(task\.answer\) holds .*, expected text or a number; "
        r"mend the row, name another field \(the row has f, other\), .*task\.where\)$"
    )
    with pytest.raises(TaskError, match=message):
        row(value).text("f", "answer")


@pytest.mark.parametrize("value", [5, 0.5, None, ["x"], False])
def test_questions_and_references_are_text(value: Any) -> None:
    for role in ("question", "reference"):
        with pytest.raises(
            TaskError, match=rf"line 7: field 'f' \(task\.{role}\).* expected text;"
        ):
            row(value).text("f", role)  # type: ignore[arg-type]


def test_a_missing_field_is_named() -> None:
    with pytest.raises(TaskError, match=r"field 'g' \(task\.id\) is missing, .*has f, other"):
        row(1).text("g", "id")


def test_half_a_character_is_refused() -> None:
    with pytest.raises(
        TaskError, match=r"line 7: field 'f' .*at position 3 \('\\ud83d'\)"
    ) as caught:
        row("abc\ud83d").text("f", "question")
    str(caught.value).encode()


def test_what_a_library_has_changed_is_refused() -> None:
    for value in (2.0**53, -1e20):
        with pytest.raises(TaskError, match=r"float64.*expected text or a whole number.*jsonl"):
            row(value).text("f", "answer")
    for moment in (datetime.datetime(2020, 1, 1), datetime.date(2020, 1, 1), datetime.time(12)):
        with pytest.raises(TaskError, match=r"points in time.*task\.name: jsonl"):
            row(moment).text("f", "answer")


def test_decimals_without_exponents() -> None:
    assert plain_decimal("1E+16") == "10000000000000000"
    assert plain_decimal("-2.5e-3") == "-0.0025"
    assert plain_decimal("1e51") == "1e51"


def test_a_written_float_is_a_float() -> None:
    assert WrittenFloat("0.10") == 0.1
    assert WrittenFloat("0.10").literal == "0.10"
