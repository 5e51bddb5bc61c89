from __future__ import annotations

import pytest

from selfdistill.tasks.answers.expressions import MOST_DEPTH, as_expression, is_too_large
from selfdistill.tasks.answers.normalize import MOST_CHARACTERS


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("0.25", r"\frac{1}{4}"),
        ("1.414214", "1.414214"),
        ("1e3", r"\frac{1000}{1}"),
        ("2 1/2", r"\frac{5}{2}"),
        ("2(3)", r"2 \cdot (3)"),
        ("(x)(y)", r"(x) \cdot (y)"),
        (r"x + 2\frac{1}{2}", r"x + (2 + \frac{1}{2})"),
        (r"x\frac{1}{2}", r"x\frac{1}{2}"),
        ("3e2x", "3e2x"),
        ("x + 3e2", r"x + (3 \cdot 10^{2})"),
        ("50% x", r"50\% x"),
    ],
)
def test_expressions_are_written_so_that_they_are_read_rightly(text: str, expression: str) -> None:
    assert as_expression(text) == expression


@pytest.mark.parametrize(
    "text",
    ["", "Monday", "no solution", "3:4", "52_8 + 1", "1 2 x", "1.000.000x", "0,5x", "x...", "x(",
     r"0.\overline{3}x", "x mod 3", "é + 1", "x; y"],
)  # fmt: skip
def test_what_math_verify_misreads_is_not_handed_over(text: str) -> None:
    assert as_expression(text) is None


@pytest.mark.parametrize(
    ("text", "too_large"),
    [
        ("x" * MOST_CHARACTERS, False),
        ("x" * (MOST_CHARACTERS + 1), True),
        ("(" * MOST_DEPTH + "x" + ")" * MOST_DEPTH, False),
        ("(" * (MOST_DEPTH + 1) + "x" + ")" * (MOST_DEPTH + 1), True),
        ("2^{1234}", False),
        ("2^{12345}", True),
        ("x^{-12345}", True),
        ("1234!", False),
        ("12345!", True),
        ("2^{3^2}", False),
        ("2^{10^5}", True),
        ("x^{2^{2^{2}}}", True),
        ("x^2^2^2", True),
        ("x^2 + y^2 + z^2", False),
        ("a^2b^2c^2", False),
    ],
)
def test_what_takes_long_to_compute_is_known_by_its_look(text: str, too_large: bool) -> None:
    assert is_too_large(text) == too_large
