r"""Units after an answer, and currencies before it: 18 km/h, $18, 18\text{ cm}^2, 18 apples.

Units of one dimension are compared by their factors (2 m is 200 cm). A word that is no known unit
counts what it names: 18 apples are not 18 oranges.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from selfdistill.tasks.answers.numbers import is_number_word

_SECOND, _METRE, _GRAM, _LITRE, _DOLLAR = "second", "metre", "gram", "litre", "dollar"


def _table() -> dict[str, tuple[Fraction, str, int]]:
    """Return what each name of a unit stands for: a factor, a base unit, and its power."""
    rows: list[tuple[str, str, str, int]] = [
        ("mm millimeter millimetre", "0.001", _METRE, 1),
        ("cm centimeter centimetre", "0.01", _METRE, 1),
        ("dm decimeter decimetre", "0.1", _METRE, 1),
        ("m meter metre", "1", _METRE, 1),
        ("km kilometer kilometre", "1000", _METRE, 1),
        ("inch inches in", "0.0254", _METRE, 1),
        ("ft foot feet", "0.3048", _METRE, 1),
        ("yd yard", "0.9144", _METRE, 1),
        ("mi mile", "1609.344", _METRE, 1),
        ("hectare ha", "10000", _METRE, 2),
        ("mg milligram", "0.001", _GRAM, 1),
        ("g gram gm", "1", _GRAM, 1),
        ("kg kilogram kilo", "1000", _GRAM, 1),
        ("tonne", "1000000", _GRAM, 1),
        ("pound lb £ gbp", "1", "pound", 1),  # of weight or money, the question knows
        ("ounce oz", "1/16", "pound", 1),
        ("ms millisecond", "0.001", _SECOND, 1),
        ("s sec second", "1", _SECOND, 1),
        ("min minute", "60", _SECOND, 1),
        ("h hr hour", "3600", _SECOND, 1),
        ("d day", "86400", _SECOND, 1),
        ("week", "604800", _SECOND, 1),
        ("month", "1", "month", 1),
        ("yr year", "12", "month", 1),
        ("ml milliliter millilitre", "0.001", _LITRE, 1),
        ("l L liter litre", "1", _LITRE, 1),
        ("gal gallon", "1", "gallon", 1),
        ("$ dollar usd us$ buck", "1", _DOLLAR, 1),
        ("cent ¢", "0.01", _DOLLAR, 1),
        ("€ euro eur", "1", "euro", 1),
        ("¥ yen jpy", "1", "yen", 1),
        ("₹ rupee rs inr", "1", "rupee", 1),
        ("^{\\circ} degree deg", "1", "degree", 1),
        ("^{\\circ}c celsius", "1", "celsius", 1),
        ("^{\\circ}f fahrenheit", "1", "fahrenheit", 1),
        ("rad radian", "1", "radian", 1),
        ("% percent pct", "1/100", "", 0),
        ("N newton", "1", "newton", 1),
        ("J joule", "1", "joule", 1),
        ("W watt", "1", "watt", 1),
        ("V volt", "1", "volt", 1),
        ("A amp ampere", "1", "ampere", 1),
        ("K kelvin", "1", "kelvin", 1),
        ("hz hertz", "1", "hertz", 1),
        ("mol mole", "1", "mole", 1),
    ]
    return {
        name: (Fraction(factor), base, power)
        for names, factor, base, power in rows
        for name in names.split()
    }


_UNITS = _table()
_SPEEDS = {"mph": "mi/h", "kmh": "km/h", "kph": "km/h", "kmph": "km/h", "rpm": "revolution/min"}
# Words after a number that say something else than what is counted.
_NO_UNITS = (
    "or and to plus minus times not no more less than least most over under half third thirds "
    "quarter quarters dozen hundred thousand million billion trillion squared cubed factorial root "
    "mod base if but between about divided choose double twice triple point negative by is"
)
_SKIPPED = "of the in total each a an"

_CURRENCY = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<unit>US\$|\$|€|£|¥|₹|(?:USD|EUR|GBP|Rs)\b\.?)\s*(?=[-+\d.\\])"
)
_DEGREES_OF = re.compile(r"\bdegrees?\s+(celsius|fahrenheit|[CF])\b", re.IGNORECASE)
_REMAINDER = re.compile(r"(.*\S)\s*\(mod (\w+)\)")
_FUNCTION = re.compile(r"\\(?:arc)?(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])|\\(?:log|ln|exp)$")
_BOUNDARY = re.compile(
    r"(?<=[\w})\]!.])\s+(?=[^\W\d_]|[$€£¥₹¢%^(])|(?<=[\d})\]!])(?=[^\W\d_]|[$€£¥₹¢%]|\^\{\\circ)"
)
_PREFIX = re.compile(r"(?:(square|sq\.?)|(cubic|cu\.?))\s+", re.IGNORECASE)
_FACTOR = re.compile(
    r"(?P<name>\^\{\\circ\}(?:\s?[CF]\b)?|US\$|[$€£¥₹¢%]|[^\W\d_]+(?:\s+[^\W\d_]+){0,4}?)\.?"
    r"(?:\s*\^\s*\{?(?P<power>-?\d)\}?)?"
)
_PER = re.compile(r"\s*/\s*|\s+(?:per|an?)\s+", re.IGNORECASE)
_PRODUCT = re.compile(r"\s*(?:\\cdot\s*|\*|\\times\s*|-)\s*")


_PART = re.compile(r"(?P<count>\d+(?:\.\d+)?)\s*(?P<name>[^\W\d_]+)(?:\s*(?:,|\band\b)\s*|\s+|$)")
_PARTS = re.compile(rf"(?:{re.sub('[?]P<[a-z]+>', '?:', _PART.pattern)}){{2,4}}")


@dataclass(frozen=True)
class Unit:
    """What a number counts.

    Attributes:
        factor: of the base units.
        bases: each base unit with its power; none for a percentage.
        words: what else is counted, in the singular; empty for known units alone.
    """

    factor: Fraction
    bases: frozenset[tuple[str, int]]
    words: frozenset[str] = frozenset()

    @property
    def is_value(self) -> bool:
        """True for percentages and degrees: 50 % is 0.5, and 180 degrees are pi."""
        return not self.words and self.bases in (frozenset(), {("degree", 1)})

    def agrees_with(self, other: Unit) -> bool:
        """True when both count the same, whatever their factors."""
        same_words = self.words == other.words or bool(self.words & other.words)
        return self.bases == other.bases and same_words


def split_unit(text: str, *, glued_letters: bool) -> tuple[str, Unit | None]:
    """Split a normalised answer into its number or expression and its unit.

    Args:
        text: such as "18 km/h"; without a unit it comes back as it is.
        glued_letters: take "5m" for five metres, not for a product.
    """
    currency = _CURRENCY.match(text)
    if currency:
        body, _ = split_unit(currency["sign"] + text[currency.end() :], glued_letters=False)
        return body, read_unit(currency["unit"])
    remainder = _REMAINDER.fullmatch(text)
    if remainder:
        return remainder[1], Unit(Fraction(1), frozenset(), frozenset({f"mod {remainder[2]}"}))
    parts = _sum_of_parts(text)
    if parts is not None:
        return parts
    text = _DEGREES_OF.sub(lambda found: rf"^{{\circ}}{found[1][0]}", text)
    for boundary in _BOUNDARY.finditer(text):
        body, rest = text[: boundary.start()].strip(), text[boundary.end() :].strip()
        rest = rest[1:-1] if rest[0] == "(" and rest[-1] == ")" else rest
        if len(rest) == 1 and rest.isalpha():  # more often a variable
            if not body[-1:].isdigit() and body[-1:] not in tuple("})]"):
                continue
            if not boundary[0] and not glued_letters:
                continue
        unit = read_unit(rest) if _is_countable(body) else None
        if unit is not None:
            return body, unit
    return text, None


def _sum_of_parts(text: str) -> tuple[str, Unit] | None:
    """Read 1 hour 30 minutes as 3/2 hours: parts of one dimension, each unit smaller."""
    if not _PARTS.fullmatch(text):
        return None
    parts = [(Fraction(found["count"]), read_unit(found["name"])) for found in _PART.finditer(text)]
    units = [unit for _, unit in parts if unit is not None and unit.bases]
    if len(units) < len(parts) or any(not unit.agrees_with(units[0]) for unit in units):
        return None
    factors = [unit.factor for unit in units]
    if factors != sorted(set(factors), reverse=True):
        return None
    total = sum(count * factor for (count, _), factor in zip(parts, factors, strict=True))
    return str(Fraction(total) / factors[0]), units[0]


def _is_countable(body: str) -> bool:
    """True unless it has a word or a function: not for "July 4" hours, nor sin 30 degrees."""
    words = re.findall(r"(?<![\\a-zA-Z])[^\W\d_]{3,}", body)
    return all(map(is_number_word, words)) and not _FUNCTION.search(body)


@lru_cache(maxsize=10_000)
def read_unit(text: str) -> Unit | None:
    """Return the unit that a text names, as a whole, or None."""
    above, *below = _PER.split(_SPEEDS.get(text.lower().rstrip("."), text))
    unit = Unit(Fraction(1), frozenset())
    for sign, product in [(1, above), *((-1, part) for part in below)]:
        for part in _PRODUCT.split(product):
            factor = _read_factor(part.strip(), sign)
            if factor is None:
                return None
            unit = _product(unit, factor)
    return unit


def _read_factor(text: str, sign: int) -> Unit | None:
    """Read a unit without "per": cm, square cm, cm^{2}, red apples."""
    power = 1
    prefix = _PREFIX.match(text)
    if prefix:
        power, text = (2 if prefix[1] else 3), text[prefix.end() :]
    found = _FACTOR.fullmatch(text)
    if found is None:
        return None
    if found["power"]:
        power = int(found["power"])
    power *= sign
    known = _known(found["name"])
    if known is not None:
        factor, base, base_power = known
        bases = frozenset({(base, base_power * power)}) if base else frozenset()
        return Unit(factor**power, bases)
    words = [word for word in found["name"].lower().split() if word not in _SKIPPED.split()]
    if not words or any(word in _NO_UNITS.split() or len(word) < 2 for word in words):
        return None
    if len(words) == 1 and words[0] in ("th", "st", "nd", "rd"):
        return Unit(Fraction(1), frozenset())
    if any(len(word) == 2 for word in words):
        return None  # a product of two letters rather than a word
    return Unit(Fraction(1), frozenset(), frozenset(_singular(word) for word in words))


def _known(name: str) -> tuple[Fraction, str, int] | None:
    if len(name) > 1:  # N is newton, n is not
        name = name.lower().replace("} ", "}")
    return _UNITS.get(name) or _UNITS.get(name.removesuffix("s")) or _UNITS.get(_singular(name))


def _singular(word: str) -> str:
    for ending, instead in (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("xes", "x")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word.removesuffix(ending) + instead
    return word.removesuffix("s") if len(word) > 3 and not word.endswith("ss") else word


def _product(a: Unit, b: Unit) -> Unit:
    powers: dict[str, int] = dict(a.bases)
    for base, power in b.bases:
        powers[base] = powers.get(base, 0) + power
    bases = frozenset((base, power) for base, power in powers.items() if power)
    return Unit(a.factor * b.factor, bases, a.words | b.words)
