r"""Reads numbers exactly, in every spelling that people use for them.

Decimals, fractions, mixed numbers (2 1/2 is 5/2), periods (0.\overline{3} is 1/3), powers of ten
(1e3, 1.2 \times 10^5), bases (52_8), and words (seventeen, 18 million). math-verify is never asked
about two numbers: it reads several of these as something else.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import floor

from selfdistill.tasks.answers.brackets import matching_bracket

_MOST_DIGITS = 1_000
_LARGEST_EXPONENT = 1_000

_DIGITS = r"\d{1,3}(?:,\d{3})+|\d+"
_PLAIN = re.compile(rf"(?P<whole>{_DIGITS})?(?:\.(?P<decimals>\d*))?")
_SCIENTIFIC = re.compile(
    r"(?P<number>[\d.,]+)\s*"
    r"(?:[eE]\s*(?P<e>[+-]?\d+)"
    r"|(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{\s*(?P<braced>[+-]?\d+)\s*\}|(?P<bare>[+-]?\d+)))"
)
_FRACTION = re.compile(
    r"(?P<top>[+-]?[\d.,]+)\s*/\s*(?P<bottom>[+-]?[\d.,]+)"
    r"|\\frac\{(?P<frac_top>[+-]?[\d.,]+)\}\{(?P<frac_bottom>[+-]?[\d.,]+)\}"
)
_MIXED = re.compile(
    rf"(?P<whole>{_DIGITS})(?:\s+(?:and\s+)?(?P<a>\d+)\s*/\s*(?P<b>\d+)"
    r"|\s*(?:and\s+)?\\frac\{(?P<c>\d+)\}\{(?P<d>\d+)\})"
)
_PERIOD = re.compile(
    r"(?P<whole>\d*)\.(?P<fixed>\d*)"
    r"(?:\\(?:overline|bar|dot)\s*\{(?P<braced>\d+)\}|\\(?:bar|dot)\s*(?P<bare>\d)|\((?P<round>\d+)\))"
)
_DOTS = re.compile(r"(?P<whole>\d*)\.(?P<decimals>\d+)\s*\.\.\.")
_BASE = re.compile(r"(?P<digits>[\dA-Z]+)_(?:\{\s*(?P<braced>\w+)\s*\}|(?P<bare>\d+))")
_MINUS = re.compile(r"(?:minus|negative)\s+(?=[\w.\\])", re.IGNORECASE)
_MODULO = re.compile(r"(\d+)\s+mod\s+(\d+)")

_ONES = "zero one two three four five six seven eight nine"
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = {word: value for value, word in enumerate(f"{_ONES} {_TEENS}".split())} | {
    word: 10 * value for value, word in enumerate(_TENS.split(), start=2)
}
_MULTIPLES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 1_000,
    "million": 1_000_000,
    "billion": 1_000_000_000,
    "trillion": 1_000_000_000_000,
}
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "tenth": 10}
_MULTIPLE = re.compile(rf"(?P<number>.+?)\s+(?P<word>{'|'.join(_MULTIPLES)})s?", re.IGNORECASE)
_AND_PART = re.compile(
    r"(?:(?P<number>.+?)\s+and\s+)?(?P<count>an?|one|two|three)[\s-]+"
    rf"(?P<part>{'|'.join(_PARTS)})s?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Number:
    """A rational number as it was written.

    Attributes:
        value: exactly.
        places: how many digits are after the point; None where it is no decimal number.
        base: the base that stands beside it, or None.
        digits: what was written beside a base, so that it can be read in another one.
    """

    value: Fraction
    places: int | None = None
    base: int | None = None
    digits: str = ""


def is_number_word(word: str) -> bool:
    """True for a word that is part of a number: seven, twenty, million, half."""
    word = word.lower()
    return any(word in names for names in (_WORDS, _MULTIPLES, _PARTS)) or word == "and"


def read_number(text: str) -> Number | None:
    """Return the number that a normalised text is, as a whole, or None."""
    text = text.strip()
    if len(text) > _MOST_DIGITS:
        return None
    text = _MINUS.sub("-", text) if _MINUS.match(text) else text
    if text[:1] in ("+", "-"):
        number = read_number(text[1:]) if text[1:].strip()[:1] not in ("+", "-") else None
        if number is None or text[0] == "+":
            return number
        return Number(-number.value, number.places, number.base, number.digits)
    if text[:1] == "(" and matching_bracket(text, 0) == len(text) - 1:
        return read_number(text[1:-1])
    for read in _READERS:
        number = read(text)
        if number is not None:
            return number
    return None


def same_number(gold: Number, answer: Number) -> bool:
    r"""True when a person would call both the same number.

    Equal values; a fraction and its decimals, rounded or cut off after six or more of them; and
    decimals that differ only beyond the 15th digit, where binary floating point has its noise. A
    number without a base is read in the base of the gold one.
    """
    if gold.base is not None and answer.base is None:
        return _in_base(_spelled(answer), gold.base) == gold.value
    if gold.value == answer.value:
        return True
    if gold.places is not None and answer.places is not None:
        noisy = max(gold.places, answer.places) >= 15
        return noisy and abs(gold.value - answer.value) * 10**15 < abs(gold.value)
    if answer.places is not None:
        return _rounds_to(gold.value, answer)
    return gold.places is not None and _rounds_to(answer.value, gold)


def is_approximation(number: Number) -> bool:
    """True for a decimal with six digits or more, both after the point and in all."""
    return (number.places or 0) >= 6 and abs(number.value) * 10 ** (number.places or 0) >= 10**5


def _rounds_to(value: Fraction, decimal: Number) -> bool:
    if not is_approximation(decimal) or (value < 0) != (decimal.value < 0):
        return False
    scale = 10 ** (decimal.places or 0)
    exact, written = abs(value) * scale, abs(decimal.value) * scale
    return written in (floor(exact), floor(exact + Fraction(1, 2)))


def _spelled(number: Number) -> str:
    return str(number.value) if number.value.denominator == 1 else ""


# One reader for each spelling ---------------------------------------------------------------------


def _decimal(text: str) -> Number | None:
    found = _PLAIN.fullmatch(text)
    if found is None or not (found["whole"] or found["decimals"]):
        return None
    whole, decimals = (found["whole"] or "0").replace(",", ""), found["decimals"]
    value = Fraction(int(whole + (decimals or "")), 10 ** len(decimals or ""))
    return Number(value, places=len(decimals or ""))


def _scientific(text: str) -> Number | None:
    found = _SCIENTIFIC.fullmatch(text)
    number = _decimal(found["number"]) if found else None
    if found is None or number is None:
        return None
    exponent = int((found["e"] or found["braced"] or found["bare"])[:10])
    if abs(exponent) > _LARGEST_EXPONENT:
        return None
    places = max(0, (number.places or 0) - exponent)
    return Number(number.value * Fraction(10) ** exponent, places=places)


def _fraction(text: str) -> Number | None:
    found = _FRACTION.fullmatch(text)
    if found is None:
        return None
    top = read_number(found["top"] or found["frac_top"])
    bottom = read_number(found["bottom"] or found["frac_bottom"])
    if top is None or bottom is None or bottom.value == 0:
        return None
    return Number(top.value / bottom.value)


def _mixed(text: str) -> Number | None:
    found = _MIXED.fullmatch(text)
    if found is None:
        return None
    top, bottom = int(found["a"] or found["c"]), int(found["b"] or found["d"])
    if not 0 < top < bottom:
        return None
    return Number(int(found["whole"].replace(",", "")) + Fraction(top, bottom))


def _period(text: str) -> Number | None:
    found = _PERIOD.fullmatch(text)
    if found is None:
        return None
    period = found["braced"] or found["bare"] or found["round"]
    return Number(_repeating(found["whole"], found["fixed"], period))


def _dots(text: str) -> Number | None:
    """Read 0.333... and 0.142857142857...: the shortest period that is there at least twice."""
    found = _DOTS.fullmatch(text)
    if found is None:
        return None
    decimals = found["decimals"]
    for length in range(1, len(decimals) // 2 + 1):
        period = decimals[-length:]
        if decimals.endswith(period * 2) and (length > 1 or decimals.endswith(period * 3)):
            return Number(_repeating(found["whole"], decimals, period))
    return None


def _repeating(whole: str, fixed: str, period: str) -> Fraction:
    start = Fraction(int((whole or "0") + fixed), 10 ** len(fixed))
    return start + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))


def _with_base(text: str) -> Number | None:
    found = _BASE.fullmatch(text)
    if found is None or (len(found["digits"]) == 1 and found["digits"].isalpha()):
        return None  # the first is no number, the second a variable with an index
    name = found["braced"] or found["bare"]
    base = int(name) if name.isdecimal() and len(name) < 3 else _WORDS.get(name.lower(), 0)
    value = _in_base(found["digits"], base)
    return None if value is None else Number(Fraction(value), base=base, digits=found["digits"])


def _in_base(digits: str, base: int) -> int | None:
    if not 2 <= base <= 36:
        return None
    try:
        return int(digits, base)
    except ValueError:
        return None


def _modulo(text: str) -> Number | None:
    found = _MODULO.fullmatch(text)
    if found is None or int(found[2]) == 0:
        return None
    return Number(Fraction(int(found[1]) % int(found[2])))


def _words(text: str) -> Number | None:
    tens, _, ones = text.lower().replace(" ", "-").partition("-")
    if tens not in _WORDS:
        return None
    if ones and (_WORDS[tens] < 20 or not 0 < _WORDS.get(ones, 0) < 10):
        return None
    return Number(Fraction(_WORDS[tens] + _WORDS.get(ones, 0)), places=0)


def _multiple(text: str) -> Number | None:
    found = _MULTIPLE.fullmatch(text)
    if found is None:
        return None
    word = found["number"].lower()
    number = Number(Fraction(1)) if word in ("a", "an") else read_number(found["number"])
    return None if number is None else Number(number.value * _MULTIPLES[found["word"].lower()])


def _and_part(text: str) -> Number | None:
    found = _AND_PART.fullmatch(text)
    if found is None:
        return None
    whole = read_number(found["number"]) if found["number"] else Number(Fraction(0))
    count = _WORDS.get(found["count"].lower(), 1)
    part = found["part"].lower()
    if whole is None or whole.value.denominator != 1:
        return None
    return Number(whole.value + Fraction(count, _PARTS[part]))


_READERS: tuple[Callable[[str], Number | None], ...] = (
    _decimal,
    _scientific,
    _fraction,
    _mixed,
    _period,
    _dots,
    _with_base,
    _modulo,
    _words,
    _multiple,
    _and_part,
)
