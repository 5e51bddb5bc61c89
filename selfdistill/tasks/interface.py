"""What every task offers to the trainer: problems, answer checking, steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from selfdistill.errors import UserError

SPLITS = ("train", "dev", "test")


FeedbackDetail = Literal["answer", "step"]
"""What feedback tells: whether the answer is right, or also the first wrong step."""


class TaskError(UserError):
    """Problems that are missing, ambiguous, or cannot be read; the message says what to mend."""


@dataclass(frozen=True)
class Problem:
    """One question with what is known about its answer.

    Attributes:
        id: stable identifier, unique within a task.
        question: the text that student and teacher both see.
        answer: the canonical final answer.
        reference: a complete reference solution (RefSol's context); empty where the data has none.
    """

    id: str
    question: str
    answer: str
    reference: str


@dataclass(frozen=True)
class Verdict:
    """What the checker says about one response.

    Attributes:
        answer: the final answer that was read from the response, or None when there is none.
        correct: True when that answer equals the problem's answer (the binary reward).
        strict: True when the answer and every step are right and none is missing. A task that
            cannot judge steps asks for a right answer in the format of its instruction.
        first_wrong_step: 1-based number of the earliest wrong step, or None.
        wrong_span: character span (start, stop) of that step in the response, or None.
        complete: True when the response ends with an answer (False: it ran out of tokens).
        undecided: True when the checker ran out of time; then `correct` is False.
        score: a reward that is more than right or wrong, from tasks that have one.
    """

    answer: str | None
    correct: bool
    strict: bool
    first_wrong_step: int | None
    wrong_span: tuple[int, int] | None
    complete: bool
    undecided: bool = False
    score: float | None = None

    @property
    def reward(self) -> float:
        """What the rollout is worth to methods that learn from rewards."""
        return float(self.correct) if self.score is None else self.score


class Task(Protocol):
    """A source of problems with a checker.

    Attributes:
        name: as written in a configuration.
        instruction: how to write the answer, said after each question; may be empty.
        strict_means: what `Verdict.strict` demands beside the right answer, for tables; empty
            where the instruction asks for no more.
    """

    name: str
    instruction: str
    strict_means: str

    def size(self, split: str) -> int | None:
        """Return how many problems a split has; None: as many as anybody asks for."""
        ...

    def problems(self, *, split: str, count: int, seed: int = 0) -> list[Problem]:
        """Return `count` distinct problems of a split ("train", "dev", "test").

        Splits never overlap. The first problems stay the same when more are asked for.
        """
        ...

    def check(self, problem: Problem, response: str) -> Verdict:
        """Judge one response; never raises on malformed text."""
        ...

    def majorities(self, groups: Sequence[Sequence[str]]) -> list[str | None]:
        """Return the majority answer (Maj@k) of each group; ties go to the earliest.

        Empty answers have no vote; None where no other is there.
        """
        ...


@runtime_checkable
class BatchTask(Protocol):
    """What a task may offer whose checker takes time: judging many responses at once."""

    def check_all(self, attempts: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """Judge responses as `check` does, within one time limit for all of them."""
        ...


@runtime_checkable
class StepTask(Protocol):
    """What a task may offer that knows where the steps of a response are."""

    def step_spans(self, response: str) -> list[tuple[int, int]]:
        """Return the character span (start, stop) of each step, in order, the answer included."""
        ...


@runtime_checkable
class FeedbackTask(Protocol):
    """What a task may offer that has words of its own for a verdict."""

    def feedback(
        self, problem: Problem, response: str, verdict: Verdict, *, detail: FeedbackDetail
    ) -> str:
        """Say what the checker found; an empty text when there is nothing to say."""
        ...


@runtime_checkable
class SteppedTask(Task, StepTask, FeedbackTask, Protocol):
    """A task that knows the steps of a response, judges each of them and can write it rightly.

    A task with this gives `Verdict.first_wrong_step` and `Verdict.wrong_span`.
    """

    def leading_steps(self, problem: Problem, response: str) -> list[str]:
        """Return, verbatim, the right steps that a response starts with."""
        ...

    def write_steps(self, problem: Problem, *, first: int, like: str) -> list[str]:
        """Write the right steps from number `first` on, and the answer, worded as in `like`."""
        ...


@runtime_checkable
class MistakenTask(SteppedTask, Protocol):
    """A task that can also write a response as somebody who errs does."""

    def mistake(self, problem: Problem, response: str, *, at: float) -> str:
        """Return a right response with one step wrong, from whose result the others go on.

        Args:
            problem: the problem.
            response: one that meets every demand.
            at: from 0 to 1 (excluded), which of the steps.
        """
        ...


def check_all(task: Task, attempts: Sequence[tuple[Problem, str]]) -> list[Verdict]:
    """Judge many responses, at once where the task can, else one after the other."""
    if isinstance(task, BatchTask):
        return task.check_all(attempts)
    return [task.check(problem, response) for problem, response in attempts]
