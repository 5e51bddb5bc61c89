"""Records of a data set, and the text in their fields."""

from __future__ import annotations

import datetime
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from selfdistill.tasks.interface import TaskError

Role = Literal["question", "answer", "reference", "id"]

# Beyond it a float64 holds not every integer.
_LARGEST_EXACT_FLOAT = 2**53
# Numbers with more zeros than this stay in scientific notation.
_MOST_ZEROS = 50


class WrittenFloat(float):
    """A number with a decimal point or exponent that remembers how it was written.

    Attributes:
        literal: its text, which a float may not hold exactly.
    """

    def __new__(cls, literal: str) -> WrittenFloat:
        number = super().__new__(cls, literal)
        number.literal = literal
        return number

    literal: str


@dataclass(frozen=True)
class Row:
    """One record and where it comes from, for messages."""

    fields: Mapping[str, Any]
    place: str

    def text(self, field: str, role: Role) -> str:
        """Return what a field holds, as the text that a person would have written.

        Answers and identifiers may be numbers: 0.0000001 stays that, and no digit is lost.

        Args:
            field: its name in the data.
            role: the setting that names it.

        Raises:
            TaskError: there is no such field, it is empty, it holds something else, or the library
                that read it has changed it.
        """
        value = self.fields.get(field)
        if role in ("answer", "id") and _is_number(value):
            return self._number(value, field, role)
        if not isinstance(value, str) or not value.strip():
            raise self._unusable(value, field, role)
        surrogate = next((i for i, c in enumerate(value) if "\ud800" <= c <= "\udfff"), None)
        if surrogate is not None:
            raise TaskError(
                f"{self.place}: field {field!r} (task.{role}) has half a character at position "
                f"{surrogate} ({value[surrogate]!a}), expected Unicode text; write the whole "
                "character, or leave it out"
            )
        return value.strip()

    def _number(self, value: Any, field: str, role: Role) -> str:
        if isinstance(value, int):
            return str(value)
        written = value.literal if isinstance(value, WrittenFloat) else str(value)
        if not math.isfinite(value) and not isinstance(value, WrittenFloat):
            raise self._unusable(value, field, role)
        if type(value) is float and abs(value) >= _LARGEST_EXACT_FLOAT:
            raise TaskError(
                f"{self.place}: field {field!r} (task.{role}) holds {value!r} in a column of "
                "float64 numbers, which have no more than 15 digits for certain, so the number "
                "may have lost some; expected text or a whole number. The datasets library makes "
                "such a column of integers beyond 64 bits, and of integers beside decimals: read "
                "the file with task.name: jsonl, or save the column as text"
            )
        return plain_decimal(written)

    def _unusable(self, value: Any, field: str, role: Role) -> TaskError:
        expected = "text or a number" if role in ("answer", "id") else "text"
        came = f"holds {reprlib.repr(value)}" if field in self.fields else "is missing"
        if isinstance(value, (datetime.date, datetime.time, datetime.timedelta)):
            return TaskError(
                f"{self.place}: field {field!r} (task.{role}) {came}, expected {expected}. The "
                "datasets library takes a column of dates for points in time, and how they were "
                "written is lost: read the file with task.name: jsonl, or save the column as text"
            )
        fields = ", ".join(map(_printable, self.fields))
        return TaskError(
            f"{self.place}: field {field!r} (task.{role}) {came}, expected {expected}; mend the "
            f"row, name another field (the row has {fields}), or leave such rows out (task.where)"
        )


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, Decimal)) and not isinstance(value, bool)


def plain_decimal(literal: str) -> str:
    """Write a number without an exponent (1e-07 is 0.0000001), unless it has too many zeros."""
    number = Decimal(literal)
    exponent = number.as_tuple().exponent
    if not isinstance(exponent, int) or abs(exponent) > _MOST_ZEROS:
        return literal
    return format(number, "f")
