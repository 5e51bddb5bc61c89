from __future__ import annotations

from fractions import Fraction

import pytest

from selfdistill.tasks.answers.numbers import read_number, same_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("042", 42),
        ("-.5", Fraction(-1, 2)),
        ("1,234.50", Fraction(2469, 2)),
        ("1e3", 1000),
        (r"1.2 \times 10^{-3}", Fraction(12, 10_000)),
        ("-(3)", -3),
        ("minus 3", -3),
        (r"\frac{-1.5}{3}", Fraction(-1, 2)),
        ("2 1/2", Fraction(5, 2)),
        (r"-2\frac{1}{2}", Fraction(-5, 2)),
        (r"0.1\overline{6}", Fraction(1, 6)),
        ("0.142857142857...", Fraction(1, 7)),
        ("52_8", 42),
        ("7F_{16}", 127),
        ("twenty-one", 21),
        ("1.5 million", 1_500_000),
        ("two and a half", Fraction(5, 2)),
        ("17 mod 5", 2),
    ],
)
def test_numbers_are_read_exactly(text: str, value: Fraction) -> None:
    number = read_number(text)
    assert number is not None
    assert number.value == value


@pytest.mark.parametrize(
    "text",
    ["", ".", "-", "1,23", "1/0", "1 2", "2 3/2", "--1", "52_9a", "82_8", "A_{12}", "1e99999",
     "3.14159...", "x", "twenty-twelve", "1" * 2_000],
)  # fmt: skip
def test_what_is_no_number_is_none(text: str) -> None:
    assert read_number(text) is None


def test_decimals_may_stand_for_a_fraction_that_they_round() -> None:
    def same(gold: str, answer: str) -> bool:
        numbers = read_number(gold), read_number(answer)
        assert numbers[0] is not None
        assert numbers[1] is not None
        return same_number(numbers[0], numbers[1])

    assert same("2/3", "0.666667")
    assert same("0.666666", "2/3")
    assert not same("2/3", "0.666668")
    assert not same("2/3", "0.6667")
    assert not same("-2/3", "0.666667")
    assert not same("1/3000000", "0.000000")
    assert not same("0.5", "0.5000001")
    assert same("0.3", "0.30000000000000004")
    assert not same("0.3", "0.300000000000004")
