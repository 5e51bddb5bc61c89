"""Do two final answers mean the same? math-verify where it is installed, else numbers and strings.

math-verify turns answers into sympy expressions. Some take minutes or gigabytes, and its own time
limit is a signal, which only a main thread can have. So it runs in a worker process
(`selfdistill.tasks.math_worker`) that is killed when it does not answer.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from multiprocessing import connection
from typing import Literal, Protocol

from selfdistill.tasks import TaskError
from selfdistill.tasks.steps import read_boxed

CheckerName = Literal["auto", "math-verify", "plain"]

INSTALL_MATH_VERIFY = "pip install 'math-verify[antlr4_13_2]>=0.8'"
# Importing sympy and math-verify takes about two seconds on a quiet machine.
START_SECONDS = 120.0
# The worker gives up by itself after math_worker.SECONDS for each of its three stages.
ANSWER_SECONDS = 20.0
_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_SPACING = re.compile(r"\\[,;:! ]|\\left(?![a-z])|\\right(?![a-z])|\s+")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")
_FRACTION = re.compile(
    r"(?P<sign>[+-]?)(\\[dt]?frac\{(?P<a>-?\d+)\}\{(?P<b>\d+)\}|(?P<c>\d+)/(?P<d>\d+))"
)
# Longer numbers are compared as strings: Python refuses to read thousands of digits.
_MOST_DIGITS = 200


class AnswerChecker(Protocol):
    """Compares final answers.

    Attributes:
        name: of the kind, for people.
    """

    name: str

    def equal(self, gold: str, answer: str) -> bool:
        """True when `answer` means the same as `gold`; never raises on malformed text."""
        ...


def build_checker(name: CheckerName) -> AnswerChecker:
    """Return the checker of that name; "auto" takes math-verify when it is there.

    Raises:
        TaskError: math-verify was asked for and is not installed.
    """
    if name == "plain":
        return PlainChecker()
    if importlib.util.find_spec("math_verify") is not None:
        return MathVerifyChecker()
    if name == "math-verify":
        raise TaskError(
            f"task.checker is math-verify, which is not installed: {INSTALL_MATH_VERIFY}"
        )
    warnings.warn(
        "math-verify is not installed, so answers are compared as numbers and strings only "
        r"(\frac{1}{2} equals 0.5, but 2\sqrt{2} does not equal \sqrt{8}): " + INSTALL_MATH_VERIFY,
        stacklevel=2,
    )
    return PlainChecker()


class PlainChecker:
    """Numbers by value, everything else letter by letter, spaces and LaTeX delimiters aside."""

    name = "plain numbers and strings"

    def equal(self, gold: str, answer: str) -> bool:
        """True when both are the same number or the same text."""
        gold, answer = normalize(gold), normalize(answer)
        if gold == answer:
            return bool(gold)
        a, b = read_number(gold), read_number(answer)
        return a is not None and a == b


class MathVerifyChecker:
    """math-verify in a worker process; answers that it cannot decide in time are not equal.

    Safe to use from several threads; one comparison runs at a time.

    Attributes:
        undecided: comparisons that killed the worker, or were too slow to be stopped otherwise.
    """

    name = "math-verify"

    def __init__(self, *, answer_seconds: float = ANSWER_SECONDS) -> None:
        self.undecided = 0
        self._answer_seconds = answer_seconds
        self._plain = PlainChecker()
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[str] | None = None
        self._ask_once = lru_cache(maxsize=100_000)(self._ask)

    def equal(self, gold: str, answer: str) -> bool:
        """True when math-verify, or a plain comparison, finds both equal."""
        if self._plain.equal(gold, answer):
            return True
        numbers = [read_number(normalize(text)) for text in (gold, answer)]
        if all(number is not None and number.denominator == 1 for number in numbers):
            return False  # two different integers: nothing to be found out
        with self._lock:
            return self._ask_once(gold, answer)

    def _ask(self, gold: str, answer: str) -> bool:
        worker = self._worker or self._start()
        assert worker.stdin is not None
        try:
            worker.stdin.write(json.dumps([gold, answer]) + "\n")
            worker.stdin.flush()
            line = self._read(worker, self._answer_seconds)
        except OSError:  # the worker died after the comparison before
            line = ""
        except BaseException:  # an interrupt: its answer must not be taken for that of the next
            self._drop(worker)
            raise
        if not line:
            self._drop(worker)
            self.undecided += 1
            return False
        return bool(json.loads(line))

    def _start(self) -> subprocess.Popen[str]:
        worker = subprocess.Popen(
            [sys.executable, "-m", "selfdistill.tasks.math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the trainer
        )
        self._worker = worker
        weakref.finalize(self, _end, worker)
        if not self._read(worker, START_SECONDS):
            self._drop(worker)
            raise TaskError(
                "the math-verify worker did not start; `python -m selfdistill.tasks.math_worker` "
                "shows why. Or compare numbers and strings only: task.checker: plain"
            )
        return worker

    def _drop(self, worker: subprocess.Popen[str]) -> None:
        self._worker = None
        _end(worker)

    @staticmethod
    def _read(worker: subprocess.Popen[str], seconds: float) -> str:
        """Return one line of the worker, or nothing when it is too slow or dead."""
        assert worker.stdout is not None
        # One line answers one question, so no line ever waits in the buffer of `stdout`.
        ready = connection.wait([worker.stdout.fileno()], seconds)
        return worker.stdout.readline() if ready else ""


def _end(worker: subprocess.Popen[str]) -> None:
    worker.kill()
    worker.wait()
    for stream in (worker.stdin, worker.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # what was not written yet has no reader any more
                stream.close()


def majority(answers: Sequence[str], equal: Callable[[str, str], bool]) -> str | None:
    """Return the first answer of the largest class of equal ones; ties go to the earliest class."""
    counts: dict[str, int] = {}
    for answer in answers:
        if not answer:
            continue
        known = next((other for other in counts if equal(other, answer)), answer)
        counts[known] = counts.get(known, 0) + 1
    return max(counts, key=lambda answer: counts[answer]) if counts else None


def normalize(text: str) -> str:
    r"""Drop delimiters, an outer \boxed{}, spacing and a final full stop; case of whole words."""
    text = text.strip()
    for opening, closing in _DELIMITERS:
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening):
            text = text[len(opening) : len(text) - len(closing)].strip()
    boxed = read_boxed(text)
    if boxed is not None and text == rf"\boxed{{{boxed}}}":
        text = boxed
    text = _SPACING.sub("", text.removesuffix("."))
    return text.casefold() if text.isalpha() and len(text) > 1 else text


def read_number(text: str) -> Fraction | None:
    """Return the value of an integer, decimal or fraction of integers, else None."""
    if len(text) > _MOST_DIGITS:
        return None
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if _NUMBER.fullmatch(text):
        return Fraction(text)
    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    top, bottom = int(match["a"] or match["c"]), int(match["b"] or match["d"])
    return None if bottom == 0 else Fraction(-top if match["sign"] == "-" else top, bottom)
