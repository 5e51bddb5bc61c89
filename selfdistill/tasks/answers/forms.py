r"""What kinds of answers there are, and reading a normalised text as one of them.

Choices and times of the day; collections (tuples, intervals, sets, lists, unions); statements
(x = 10). What is none of these is a quantity, an expression or words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from selfdistill.tasks.answers.brackets import matching_bracket, split_outside_brackets
from selfdistill.tasks.answers.numbers import read_number
from selfdistill.tasks.answers.units import split_unit
from selfdistill.tasks.answers.words import key_of

# Choices and times --------------------------------------------------------------------------------

_CHOICE = re.compile(
    r"(?:(?P<name>option|choice)\s+)?"
    r"(?:\((?P<inner>[A-Ja-j])\)|(?P<before>[A-Ja-j])[).:](?=\s|$)|(?P<alone>[A-Ja-j])$)"
    r"(?:\s+(?P<text>\S.*))?",
    re.IGNORECASE,
)
_CLOCK = re.compile(r"(?P<hour>\d{1,2})(?::(?P<minute>\d\d))?\s*(?P<half>[ap])\.?\s*m\.?", re.I)


@dataclass(frozen=True)
class Choice:
    """One of several given answers.

    Attributes:
        letter: as it is written.
        marked: True where it cannot be a variable: (a), "option a".
        text: what follows the letter, such as the answer itself.
    """

    letter: str
    marked: bool
    text: str

    def agrees_with(self, other: Choice) -> bool:
        """True for the same letter; its case counts where both may be variables."""
        if self.marked or other.marked:
            return self.letter.upper() == other.letter.upper()
        return self.letter == other.letter


def read_choice(text: str) -> Choice | None:
    """Return the choice that a text is: A, (A), A), option A, (A) 18."""
    found = _CHOICE.fullmatch(text)
    if found is None:
        return None
    letter = found["inner"] or found["before"] or found["alone"]
    return Choice(
        letter, marked=bool(found["name"]) or not found["alone"], text=found["text"] or ""
    )


def read_clock(text: str) -> int | None:
    """Return the minutes after midnight of a time such as 6:00 PM."""
    found = _CLOCK.fullmatch(text)
    if found is None or not 1 <= int(found["hour"]) <= 12 or int(found["minute"] or 0) > 59:
        return None
    afternoon = 12 if found["half"].lower() == "p" else 0
    return (int(found["hour"]) % 12 + afternoon) * 60 + int(found["minute"] or 0)


# Collections --------------------------------------------------------------------------------------

_SEPARATOR = re.compile(r"\s*[,;]\s*(?:and\b|or\b)?\s*|\s+(?:and|or)\s+", re.IGNORECASE)
_SPACED_SEPARATOR = re.compile(r"\s*(?:,\s|;)\s*(?:and\b|or\b)?\s*|\s+(?:and|or)\s+", re.IGNORECASE)
_UNION = re.compile(r"\\cup(?![a-zA-Z])")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_PLUS_MINUS = re.compile(r"\\pm(?![a-zA-Z])\s*")


@dataclass(frozen=True)
class Collection:
    r"""Several answers in one.

    Attributes:
        brackets: "()", "[)" and the like, "{}" for a set, "" for a list, "u" for a union.
        items: normalised.
    """

    brackets: str
    items: tuple[str, ...]

    @property
    def is_ordered(self) -> bool:
        """True for tuples and intervals."""
        return self.brackets not in ("", "{}", "u")


def read_collection(text: str) -> Collection | None:
    """Return the tuple, interval, set, list or union that a text is, with two items or more."""
    union = split_outside_brackets(text, _UNION)
    if len(union) > 1:
        return Collection("u", tuple(union))
    inner = _inside_brackets(text)
    if inner is not None:
        items = split_outside_brackets(inner, _SEPARATOR)
        opening = text.removeprefix("\\")[0]
        items = _expand(items) if opening == "{" else items
        return Collection(opening + text[-1], tuple(items)) if len(items) > 1 else None
    body, _ = split_unit(text, glued_letters=True)
    # 1,234 is one number, and so is "2 and a half hours".
    items = [text] if read_number(body) is not None else _expand(_split_list(text))
    return Collection("", tuple(items)) if len(items) > 1 and all(items) else None


def _split_list(text: str) -> list[str]:
    """Split at commas, semicolons, "and", "or"; 1,234 is a number beside commas with spaces."""
    items: list[str] = []
    for item in split_outside_brackets(text, _SPACED_SEPARATOR):
        whole = _THOUSANDS.fullmatch(item)
        items += [item] if whole else split_outside_brackets(item, _SEPARATOR)
    return items


def _expand(items: Iterable[str]) -> list[str]:
    r"""Write an item with \pm as two."""
    expanded: list[str] = []
    for item in items:
        if len(_PLUS_MINUS.findall(item)) == 1:
            plus = _PLUS_MINUS.sub(lambda found: "+" if found.start() else "", item)
            expanded += [plus, _PLUS_MINUS.sub("-", item)]
        else:
            expanded.append(item)
    return expanded


def without_brackets(text: str) -> str:
    """Drop brackets around everything, those of a set of one element among them."""
    while text:
        inner = _inside_brackets(text)
        if inner is None or len(split_outside_brackets(inner, _SEPARATOR)) > 1 or not inner:
            break
        text = inner
    return text


def _inside_brackets(text: str) -> str | None:
    start = 1 if text.startswith("\\{") else 0
    if text[start : start + 1] not in ("(", "[", "{") or not text:
        return None
    if matching_bracket(text, start) != len(text) - 1:
        return None
    return text[start + 1 : -1].removesuffix("\\").strip()


# Statements ---------------------------------------------------------------------------------------

_INEQUALITY = re.compile(r"<|>|\\(?:le|ge|ne)(?![a-zA-Z])")
_EQUALS = re.compile(r"=|\\approx(?![a-zA-Z])")
_NAME = re.compile(
    r"""(?:\\[a-zA-Z]+(?![a-zA-Z])|[^\W\d_]|['\s{}])+
        (?:_(?:\w|\{[^{}]*\}))?
        (?:\s*\([^()+*/=]*\))?\s*
        |\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])+\s*\)\s*""",
    re.VERBOSE,
)
_FUNCTION = re.compile(r"\\(?:frac|sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|cdot|times|div|pm)\b")


@dataclass(frozen=True)
class Statement:
    """A text with an equals sign.

    Attributes:
        name: what is said to be equal (x, f(x), AB, "total cost"), or None for an equation.
        values: what it is equal to; all sides where there is no name.
    """

    name: str | None
    values: tuple[str, ...]

    @property
    def sides(self) -> int:
        """How many texts the equals signs part; 1 for a text without any."""
        return len(self.values) + (self.name is not None)

    @property
    def is_equation(self) -> bool:
        """True for sides that are equal for some values of variables only."""
        several = self.name is None and len(self.values) > 1
        return several and any(map(_has_variables, self.values))

    def names_the_same(self, other: Statement) -> bool:
        """True when both say of one thing what it is, or neither says of what."""
        if self.name is None or other.name is None:
            return self.name is other.name and not (self.is_equation or other.is_equation)
        return key_of(self.name) == key_of(other.name)


def read_statement(text: str) -> Statement:
    """Split a text at its equals signs; without one it is a value without a name."""
    first, *rest = split_outside_brackets(text, _EQUALS)
    if rest and _is_name(first):
        return Statement(first, tuple(rest))
    if len(rest) == 1 and _is_name(rest[0]):
        return Statement(rest[0], (first,))
    return Statement(None, (first, *rest))


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and _FUNCTION.search(text) is None


def _has_variables(text: str) -> bool:
    body, _ = split_unit(text, glued_letters=True)
    return re.search(r"[^\W\d_eEi]", re.sub(r"\\[a-zA-Z]+", " ", body)) is not None


def is_inequality(text: str) -> bool:
    return _INEQUALITY.search(text) is not None
