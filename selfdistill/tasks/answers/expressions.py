r"""What of a normalised answer is handed to math-verify, and how it is written there.

math-verify reads some texts as something else than a person does (docs/decisions, and
tests/selfdistill/tasks/answer_table.tsv with its verdicts beside ours). Those never reach it: they
are written in another way here, or refused.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

from selfdistill.tasks.answers.brackets import depth_of_brackets
from selfdistill.tasks.answers.normalize import MOST_CHARACTERS
from selfdistill.tasks.answers.numbers import Number, is_approximation, read_number
from selfdistill.tasks.answers.words import is_words

MOST_DEPTH = 20
"""Deeper brackets are not compared as mathematics."""

# Exponents and factorials with more digits are a task for a computer, not an answer.
_MOST_EXPONENT_DIGITS = 4
_LARGE_EXPONENT = re.compile(rf"\^\s*\{{?\s*-?\s*\d{{{_MOST_EXPONENT_DIGITS + 1}}}")
_LARGE_FACTORIAL = re.compile(rf"\d{{{_MOST_EXPONENT_DIGITS + 1}}}\s*\}}?\)?\s*!")
_POWER_IN_EXPONENT = re.compile(r"\^\s*\{?\s*(\d+)\s*\^\s*\{?\s*(\d+)")
_TOWER = re.compile(r"(?:\^\s*(?:\{[^{}]*|\d+\s*|[a-zA-Z]\s*)){2}\^")
# A ratio or a time, a remainder, an ellipsis, quotation marks, a number with a base, two numbers
# side by side, two decimal points in one number, a decimal comma.
_MISREAD = re.compile(
    r"""[:?"#$;]|\bmod\b|\.\.|\d_|\d\s+\d|\d\.\d+\.|\d,\d|\\(?:overline|bar|dot)\s*\{\d"""
)
_PERCENT = re.compile(r"(?<!\\)%")
_POWER_OF_TEN = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?!\w)")
_DECIMAL = re.compile(r"(?<![\w.])\d*\.\d+(?!\.?\d)")
_PRODUCT = re.compile(r"(?<=\d)\s*(?=\()|(?<=\))\s*(?=[(\d])")
_MIXED = re.compile(r"(?<![\w.}])(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}")


def is_too_large(text: str) -> bool:
    """True for what would take long to compute: long texts, deep brackets, large powers."""
    depth = depth_of_brackets(text)
    return (
        len(text) > MOST_CHARACTERS
        or (depth is not None and depth > MOST_DEPTH)
        or _LARGE_EXPONENT.search(text) is not None
        or _LARGE_FACTORIAL.search(text) is not None
        or _TOWER.search(text) is not None
        or any(_is_large_power(*found.groups()) for found in _POWER_IN_EXPONENT.finditer(text))
    )


def _is_large_power(base: str, exponent: str) -> bool:
    """True for a power of more than `_MOST_EXPONENT_DIGITS` digits; it is not computed."""
    return len(exponent) > 2 or math.log10(int(base) or 1) * int(exponent) > _MOST_EXPONENT_DIGITS


def as_expression(text: str) -> str | None:
    """Return how math-verify is to read a normalised text, or None for what it is not to read."""
    number = read_number(text)
    if number is not None:
        return _number(number, text)
    if not text or is_words(text) or _MISREAD.search(text) or depth_of_brackets(text) is None:
        return None
    if not text.isascii():
        return None
    text = _POWER_OF_TEN.sub(r"(\1 \\cdot 10^{\2})", text)
    text = _MIXED.sub(_sum_of_mixed, text)
    text = _PRODUCT.sub(r" \\cdot ", text)  # it reads 2(3) as the mixed number 2 + 3
    text = _DECIMAL.sub(_fraction_of_decimal, text)
    return _PERCENT.sub(r"\\%", text)


def _number(number: Number, text: str) -> str:
    r"""Exactly, as a fraction: with decimals math-verify compares six digits after the point.

    Except for a decimal long enough to be meant as an approximation (1.414214 for \sqrt{2}).
    """
    if is_approximation(number) and re.fullmatch(r"[+-]?\d*\.\d+", text):
        return text
    return rf"\frac{{{number.value.numerator}}}{{{number.value.denominator}}}"


def _fraction_of_decimal(found: re.Match[str]) -> str:
    value = Fraction(found[0])
    return rf"{{\frac{{{value.numerator}}}{{{value.denominator}}}}}"


def _sum_of_mixed(found: re.Match[str]) -> str:
    whole, top, bottom = found.groups()
    return rf"({whole} + \frac{{{top}}}{{{bottom}}})" if int(top) < int(bottom) else found[0]
