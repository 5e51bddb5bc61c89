"""How questions and solution traces of the arithmetic task are written and read back.

A question is a chain `47 + 8 + 5 + 9 mod 100`. A trace has one step an operation and an answer:

    <step_1> now 47 plus 8 makes 55 <step_2> now 55 plus 5 makes 60 ... <answer> 69

A step has three slots of words (open, verb, equals). A dialect is one set of words for them;
reading accepts any mixture of dialects, slot by slot.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias

MODULUS = 100
MAX_STEPS = 9
ANSWER_TAG = "<answer>"

Sign: TypeAlias = Literal["+", "-"]
Wording: TypeAlias = tuple[int, int, int]
"""The dialect of each slot of one step: open, verb, equals."""


@dataclass(frozen=True)
class Dialect:
    """The words of one dialect, a phrase a slot; the verb depends on the operation."""

    open: str
    plus: str
    minus: str
    equals: str


DIALECTS: tuple[Dialect, ...] = (
    Dialect("now", "plus", "minus", "makes"),
    Dialect("from", "add", "subtract", "get"),
    Dialect("take", "then up", "then down", "giving"),
    Dialect("have", "increased by", "decreased by", "which is"),
    Dialect("with", "raise", "lower", "reaching"),
    Dialect("so", "gain", "lose", "yields"),
)


@dataclass(frozen=True)
class Operation:
    """Add or subtract one digit, modulo 100."""

    sign: Sign
    digit: int

    def apply(self, value: int) -> int:
        """Return the right result for a start `value` in [0, 100)."""
        change = self.digit if self.sign == "+" else -self.digit
        return (value + change) % MODULUS


@dataclass(frozen=True)
class Question:
    """A start in [0, 100) and the operations to apply to it, in order."""

    start: int
    operations: tuple[Operation, ...]

    def __str__(self) -> str:
        chain = " ".join(f"{operation.sign} {operation.digit}" for operation in self.operations)
        return f"{self.start:02d} {chain} mod {MODULUS}"

    def states(self) -> list[int]:
        """Return the start and the right result of every step (len(operations) + 1 values)."""
        states = [self.start]
        for operation in self.operations:
            states.append(operation.apply(states[-1]))
        return states


@dataclass(frozen=True)
class Step:
    """One written step: `<step_number> open left verb digit equals result`."""

    number: int
    left: int
    operation: Operation
    result: int
    wording: Wording = (0, 0, 0)

    def __str__(self) -> str:
        opening, verb, equals = (DIALECTS[dialect] for dialect in self.wording)
        verb_words = verb.plus if self.operation.sign == "+" else verb.minus
        return (
            f"<step_{self.number}> {opening.open} {self.left:02d} {verb_words} "
            f"{self.operation.digit} {equals.equals} {self.result:02d}"
        )


@dataclass(frozen=True)
class Segment:
    """A piece of a trace from one tag to the next, with its character span, blanks trimmed."""

    text: str
    start: int
    stop: int


def write_answer(value: int) -> str:
    """Write the closing line of a trace."""
    return f"{ANSWER_TAG} {value:02d}"


def _any_phrase(phrases: list[str]) -> str:
    return "(" + "|".join(phrase.replace(" ", r"\s+") for phrase in phrases) + ")"


_NUMBER = r"(\d\s*\d)"
_STEP = re.compile(
    r"<step_(\d+)>\s*"
    + r"\s*".join(
        [
            _any_phrase([dialect.open for dialect in DIALECTS]),
            _NUMBER,
            _any_phrase([verb for dialect in DIALECTS for verb in (dialect.plus, dialect.minus)]),
            r"(\d)",
            _any_phrase([dialect.equals for dialect in DIALECTS]),
            _NUMBER,
        ]
    )
)
_ANSWER = re.compile(rf"{ANSWER_TAG}\s*{_NUMBER}(?!\s*\d)")
_TAG = re.compile(rf"<step_\d+>|{ANSWER_TAG}")
_QUESTION = re.compile(rf"\s*{_NUMBER}((?:\s*[+-]\s*\d)+)\s*mod\s*1\s*0\s*0\s*")
_OPERATION = re.compile(r"([+-])\s*(\d)")

_OPEN_DIALECT = {dialect.open: index for index, dialect in enumerate(DIALECTS)}
_VERB_MEANING: dict[str, tuple[int, Sign]] = {
    **{dialect.plus: (index, "+") for index, dialect in enumerate(DIALECTS)},
    **{dialect.minus: (index, "-") for index, dialect in enumerate(DIALECTS)},
}
_EQUALS_DIALECT = {dialect.equals: index for index, dialect in enumerate(DIALECTS)}


def _number(text: str) -> int:
    return int("".join(text.split()))


def read_question(text: str) -> Question:
    """Read a question back; raises ValueError when `text` is not one."""
    match = _QUESTION.fullmatch(text)
    if match is None:
        raise ValueError(
            f"question: got {text!r}, expected a chain such as '47 + 8 + 5 mod 100' "
            "(take it from ArithmeticTask.problems)"
        )
    operations = tuple(
        Operation("+" if sign == "+" else "-", int(digit))
        for sign, digit in _OPERATION.findall(match[2])
    )
    return Question(_number(match[1]), operations)


def read_step(text: str) -> Step | None:
    """Read one step written in any mixture of dialects; None when `text` is anything else."""
    match = _STEP.fullmatch(text)
    if match is None:
        return None
    number, opening, left, verb, digit, equals, result = match.groups()
    verb_dialect, sign = _VERB_MEANING[" ".join(verb.split())]
    wording = (
        _OPEN_DIALECT[" ".join(opening.split())],
        verb_dialect,
        _EQUALS_DIALECT[" ".join(equals.split())],
    )
    return Step(int(number), _number(left), Operation(sign, int(digit)), _number(result), wording)


def read_answer(text: str) -> str | None:
    """Return the first answer in `text` as two digits ("05"), or None."""
    match = _ANSWER.search(text)
    return None if match is None else f"{_number(match[1]):02d}"


def split_trace(text: str) -> list[Segment]:
    """Cut a response at its step and answer tags; text before the first tag is a segment too."""
    cuts = [0, *(match.start() for match in _TAG.finditer(text)), len(text)]
    segments = []
    for start, stop in pairwise(cuts):
        piece = text[start:stop]
        trimmed = piece.strip()
        if trimmed:
            start += len(piece) - len(piece.lstrip())
            segments.append(Segment(trimmed, start, start + len(trimmed)))
    return segments
