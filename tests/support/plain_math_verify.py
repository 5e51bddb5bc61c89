"""What math-verify alone says about each row of the table of answers.

    PYTHONPATH=tests/support python -m plain_math_verify

writes its two columns anew: "bare" for the texts as they are, "dollars" for the same between
dollar signs (where they have no delimiters of their own), as its README asks for.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

TABLE = Path(__file__).parents[1] / "selfdistill" / "tasks" / "answers" / "answer_table.tsv"
MEASURED_WITH = "0.9.0"
_DELIMITERS = ("$", r"\(", r"\[", r"\boxed")


@dataclass(frozen=True)
class Row:
    """One pair of answers.

    Attributes:
        kind: what it is an example of.
        gold: the right answer.
        answer: the one that is judged.
        same: "yes" when a person says that both mean the same, else "no".
        bare: what plain math-verify says.
        dollars: what it says when both stand between dollar signs.
    """

    kind: str
    gold: str
    answer: str
    same: str
    bare: str
    dollars: str


class _Table(csv.excel_tab):
    quoting = csv.QUOTE_NONE
    quotechar = None
    lineterminator = "\n"


def read_table(path: Path = TABLE) -> list[Row]:
    """Return the rows of the table, which has the names of the columns first."""
    with path.open(encoding="utf-8", newline="") as file:
        names, *rows = csv.reader(file, dialect=_Table)
    assert names == [field.name for field in fields(Row)]
    return [Row(*row) for row in rows]


def write_table(rows: Iterable[Row], path: Path = TABLE) -> None:
    """Write what `read_table` reads."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, dialect=_Table)
        writer.writerow([field.name for field in fields(Row)])
        writer.writerows(map(astuple, rows))


def plainly(gold: str, answer: str) -> str:
    """Return "yes" when math-verify finds two texts equal, else "no"."""
    from math_verify import parse, verify

    return "yes" if verify(parse(gold), parse(answer)) else "no"


def between_dollars(text: str) -> str:
    """Return a text as mathematics, delimiters and all."""
    return text if any(mark in text for mark in _DELIMITERS) else f"${text}$"


def measured(row: Row) -> Row:
    """Return the row with the columns of math-verify measured now."""
    return replace(
        row,
        bare=plainly(row.gold, row.answer),
        dollars=plainly(between_dollars(row.gold), between_dollars(row.answer)),
    )


if __name__ == "__main__":
    write_table([measured(row) for row in read_table()])
