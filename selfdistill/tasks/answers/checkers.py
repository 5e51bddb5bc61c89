"""The checkers that a task can name: plain comparison, and math-verify in processes of its own."""

from __future__ import annotations

import importlib.util
import sys
import time
import warnings
from collections import OrderedDict
from collections.abc import Generator, Sequence
from typing import Literal, Protocol

from selfdistill.tasks.answers.equality import compare
from selfdistill.tasks.answers.pool import Question, WorkerPool, usable_cpus
from selfdistill.tasks.interface import TaskError

CheckerName = Literal["auto", "math-verify", "plain"]

INSTALL_MATH_VERIFY = "pip install 'math-verify[antlr4_13_2]>=0.8'"
_WORKER = (sys.executable, "-m", "selfdistill.tasks.answers.worker")
_MOST_WORKERS = 4
_MOST_REMEMBERED = 100_000


class AnswerChecker(Protocol):
    """Compares final answers.

    Attributes:
        name: of the kind, for people.
    """

    name: str

    def decide(
        self, pairs: Sequence[Question], *, seconds: float | None = None
    ) -> list[bool | None]:
        """Return for each (gold, answer) whether both mean the same; None where it is undecided.

        Never raises on malformed text.

        Args:
            pairs: the right answer first.
            seconds: a limit for all pairs together; without one each has its own.
        """
        ...

    def equal(self, gold: str, answer: str) -> bool:
        """True when `answer` means the same as `gold`; what is undecided is not equal."""
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


def _plainly(gold: str, answer: str) -> tuple[bool | None, bool]:
    """Return the verdict without algebra, and whether algebra may decide what it leaves open."""
    is_open = False

    def leave_open(first: str, second: str) -> None:
        nonlocal is_open
        is_open = True

    verdict = compare(gold, answer, leave_open)
    return verdict, verdict is None and is_open


class PlainChecker:
    """Numbers by value, texts by their letters, and collections of them; no algebra."""

    name = "plain numbers and strings"

    def decide(
        self, pairs: Sequence[Question], *, seconds: float | None = None
    ) -> list[bool | None]:
        """Return for each (gold, answer) whether both mean the same; never undecided."""
        return [self.equal(gold, answer) for gold, answer in pairs]

    def equal(self, gold: str, answer: str) -> bool:
        """True when both are the same number, the same text, or collections of such."""
        return bool(_plainly(gold, answer)[0])


class MathVerifyChecker:
    """As `PlainChecker`; the expressions that are left are compared by math-verify.

    Safe to use from several threads.

    Args:
        pool: the processes in which math-verify runs.
    """

    name = "math-verify"

    def __init__(self, pool: WorkerPool | None = None) -> None:
        size = min(_MOST_WORKERS, usable_cpus())
        self._pool = pool or WorkerPool(_WORKER, size=size)
        self._known: OrderedDict[Question, bool | None] = OrderedDict()

    def decide(
        self, pairs: Sequence[Question], *, seconds: float | None = None
    ) -> list[bool | None]:
        """Return for each (gold, answer) whether both mean the same; None where it is undecided.

        Too long, too deep or too large an answer is undecided at once. A pair whose own time was
        not enough stays undecided; one for which no time was left is tried again in the next call.

        Raises:
            TaskError: the processes do not start.
        """
        verdicts: dict[Question, bool | None] = {}
        asked: list[Question] = []
        for pair in dict.fromkeys(pairs):
            verdicts[pair], is_open = _plainly(*pair)
            if is_open and pair in self._known:
                verdicts[pair] = self._known[pair]
            elif is_open:
                asked.append(pair)
        if asked:
            for number, verdict in self._pool.ask(asked, seconds=seconds).items():
                verdicts[asked[number]] = self._known[asked[number]] = verdict
        while len(self._known) > _MOST_REMEMBERED:
            self._known.popitem(last=False)
        return [verdicts[pair] for pair in pairs]

    def equal(self, gold: str, answer: str) -> bool:
        """True when math-verify, or a plain comparison, finds both equal."""
        return bool(self.decide([(gold, answer)])[0])


def majorities(
    groups: Sequence[Sequence[str]], checker: AnswerChecker, *, seconds: float | None = None
) -> list[str | None]:
    """Return of each group the first answer of the largest class of equal ones.

    Ties go to the earliest class. Empty answers belong to none; a group without others has None.

    Args:
        groups: answers that vote together.
        checker: says which are equal; what it leaves undecided is not.
        seconds: a limit for all groups together.
    """
    end = None if seconds is None else time.monotonic() + seconds
    votes = [_vote(answers) for answers in groups]
    winners: dict[int, str | None] = {}
    verdicts: dict[int, bool | None] = dict.fromkeys(range(len(votes)))
    while True:
        # A group compares one pair after the other, all groups at once.
        pairs: dict[int, Question] = {}
        for place, verdict in verdicts.items():
            try:
                pairs[place] = votes[place].send(verdict)
            except StopIteration as stop:
                winners[place] = stop.value
        if not pairs:
            return [winners[place] for place in range(len(votes))]
        left = None if end is None else max(0.0, end - time.monotonic())
        decided = checker.decide(list(pairs.values()), seconds=left)
        verdicts = dict(zip(pairs, decided, strict=True))


def _vote(answers: Sequence[str]) -> Generator[Question, bool | None, str | None]:
    """Ask about pairs of answers, one after the other, and return the winner."""
    counts: dict[str, int] = {}
    for answer in filter(None, answers):
        for known in counts:
            if known == answer or (yield known, answer):
                counts[known] += 1
                break
        else:
            counts[answer] = 1
    return max(counts, key=lambda answer: counts[answer], default=None)
