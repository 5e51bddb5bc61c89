"""The arithmetic task: problems, the exact checker, and the right way to write any step."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from selfdistill.tasks.arithmetic.traces import (
    ANSWER_TAG,
    DIALECTS,
    MAX_STEPS,
    MODULUS,
    Operation,
    Question,
    Segment,
    Sign,
    Step,
    Wording,
    read_answer,
    read_question,
    read_step,
    split_trace,
    write_answer,
)
from selfdistill.tasks.interface import FeedbackDetail, Problem, Verdict

_SPLIT_SHARES = {"train": range(80), "dev": range(80, 90), "test": range(90, 100)}
_SMALLEST_DIGIT = 2


def _digest(question: Question) -> str:
    return hashlib.sha256(str(question).encode()).hexdigest()


def split_of(question: Question) -> str:
    """Return the split that a question belongs to: a function of its text alone."""
    bucket = int(_digest(question)[:8], 16) % 100
    return next(split for split, buckets in _SPLIT_SHARES.items() if bucket in buckets)


def draw_question(rng: random.Random, step_counts: Sequence[int]) -> Question:
    """Draw a same-sign chain: all plus or all minus, so that forgotten carries cannot cancel."""
    sign: Sign = rng.choice(("+", "-"))
    operations = tuple(
        Operation(sign, rng.randint(_SMALLEST_DIGIT, 9)) for _ in range(rng.choice(step_counts))
    )
    return Question(rng.randrange(MODULUS), operations)


class ArithmeticTask:
    """Chains of one-digit additions or subtractions modulo 100, solved step by step.

    Implements `Task`, and what `selfdistill.critic.scribe.ScribeCritic` needs (`MistakenTask`).

    Args:
        step_counts: the numbers of operations a question may have, each between 1 and 9.
        reference_dialect: index into `DIALECTS` of the wording of `Problem.reference`; 0 is the
            shipped solver's usual one, the last ones are rare in its own writing.
        reference_order: of the operations in `Problem.reference`; "reversed" is another path to the
            same answer, whose steps are not those of the question.
        predicted_success: only questions that the shipped solver is predicted to solve at a rate
            of at least the first and less than the second number; None takes all questions.

    Raises:
        ValueError: a step count, the dialect or the range of success is out of range.
    """

    name = "arithmetic"
    instruction = ""
    strict_means = "every step right"

    def __init__(
        self,
        *,
        step_counts: Sequence[int] = (4, 5, 6),
        reference_dialect: int = 0,
        reference_order: Literal["question", "reversed"] = "question",
        predicted_success: tuple[float, float] | None = None,
    ) -> None:
        if not step_counts or not all(1 <= count <= MAX_STEPS for count in step_counts):
            raise ValueError(
                f"step_counts: got {tuple(step_counts)}, expected one or more numbers "
                f"between 1 and {MAX_STEPS}"
            )
        if not 0 <= reference_dialect < len(DIALECTS):
            raise ValueError(
                f"reference_dialect: got {reference_dialect}, expected 0 to {len(DIALECTS) - 1}"
            )
        if predicted_success is not None and not 0 <= predicted_success[0] < predicted_success[1]:
            raise ValueError(
                f"predicted_success: got {predicted_success}, expected two rates, the lower first"
            )
        self.step_counts = tuple(step_counts)
        self.reference_dialect = reference_dialect
        self.reference_order = reference_order
        self.predicted_success = predicted_success
        # A rare range of success takes seconds to draw, and each evaluation asks for the same.
        self._drawn: dict[tuple[str, int, int], list[Problem]] = {}

    def size(self, split: str) -> None:
        """There are far more problems than a run can use."""

    def problems(self, *, split: str, count: int, seed: int = 0) -> list[Problem]:
        """Return `count` distinct problems of a split; the same arguments give the same problems.

        Splits are disjoint by construction: the hash of a question decides where it belongs.
        Two seeds of one split may share a few problems.

        Raises:
            ValueError: an unknown split, a negative count, or more problems than there are.
        """
        if split not in _SPLIT_SHARES:
            raise ValueError(f"split: got {split!r}, expected one of {sorted(_SPLIT_SHARES)}")
        if count < 0:
            raise ValueError(f"count: got {count}, expected 0 or more")
        key = (split, count, seed)
        if key not in self._drawn:
            self._drawn[key] = self._draw(split, count, seed)
        return list(self._drawn[key])

    def _draw(self, split: str, count: int, seed: int) -> list[Problem]:
        rng = random.Random(f"{self.name}/{split}/{seed}")
        questions: dict[str, Question] = {}
        draws_left = (100 if self.predicted_success is None else 10_000) * (count + 10)
        while len(questions) < count:
            if draws_left == 0:
                raise ValueError(
                    f"count: got {count}, but step_counts={self.step_counts} and "
                    f"predicted_success={self.predicted_success} offer too few distinct {split} "
                    "questions; ask for fewer, allow longer chains or a wider range"
                )
            draws_left -= 1
            question = draw_question(rng, self.step_counts)
            if self._is_as_hard_as_asked(question) and split_of(question) == split:
                questions[str(question)] = question
        return [self.problem(question) for question in questions.values()]

    def _is_as_hard_as_asked(self, question: Question) -> bool:
        if self.predicted_success is None:
            return True
        from selfdistill.tasks.arithmetic.noise import SHIPPED_SOLVER

        low, high = self.predicted_success
        return low <= SHIPPED_SOLVER.success(question) < high

    def problem(self, question: Question) -> Problem:
        """Wrap a question with its answer and its reference solution."""
        dialect = self.reference_dialect
        solved = question
        if self.reference_order == "reversed":
            solved = replace(question, operations=question.operations[::-1])
        return Problem(
            id=f"{self.name}-{_digest(question)[:16]}",
            question=str(question),
            answer=f"{question.states()[-1]:02d}",
            reference=" ".join(_write(solved, 1, lambda _: (dialect, dialect, dialect))),
        )

    def check(self, problem: Problem, response: str) -> Verdict:
        """Judge one response; never raises on malformed text.

        Step k is wrong when it is missing, is not numbered k, does not continue the result of
        step k - 1, does not apply the question's operation k, or has a wrong result. The answer
        counts as one more step: it must repeat the last result and end the response. A missing
        step is marked (`wrong_span`) at what was written in its place. The last piece of a
        response without an answer counts as cut off, not as wrong, when it is not a whole step.
        """
        answer = read_answer(response)
        leading, flaw = _judge(read_question(problem.question), response)
        whole = len(leading) == len(read_question(problem.question).operations) + 1
        return Verdict(
            answer=answer,
            correct=answer == problem.answer,
            strict=whole and flaw is None,
            first_wrong_step=None if flaw is None else len(leading) + 1,
            wrong_span=None if flaw is None else (flaw.start, flaw.stop),
            complete=answer is not None,
        )

    def majorities(self, groups: Sequence[Sequence[str]]) -> list[str | None]:
        """Return the majority answer of each group (see `Task`); answers are equal as texts."""
        counts = [Counter(filter(None, answers)) for answers in groups]
        return [max(count, key=lambda answer: count[answer], default=None) for count in counts]

    def leading_steps(self, problem: Problem, response: str) -> list[str]:
        """Return, verbatim, the right steps that a response starts with (the answer is none)."""
        question = read_question(problem.question)
        leading, _ = _judge(question, response)
        return [segment.text for segment in leading[: len(question.operations)]]

    def write_steps(self, problem: Problem, *, first: int, like: str) -> list[str]:
        """Write the right steps from number `first` on, and the answer, worded as in `like`.

        Step k takes the words of the step k of `like`; where that cannot be read, those of the
        nearest step that can, and without any the usual dialect's. `first` is at least 1.
        """
        return _write(read_question(problem.question), first, _wording_of(like))

    def mistake(self, problem: Problem, response: str, *, at: float) -> str:
        """Return a right response with one step wrong, from whose result the others go on.

        A result that changes the tens digit forgets to, as the shipped solver does; any other one
        is off by 1. Words are those of the response.
        """
        from selfdistill.tasks.arithmetic.noise import carries, forget_carry

        question = read_question(problem.question)
        number = 1 + int(at * len(question.operations))
        left = question.states()[number - 1]
        operation, *rest = question.operations[number - 1 :]
        right = operation.apply(left)
        if carries(left, operation):
            wrong = forget_carry(right, operation)
        else:
            wrong = right + (1 if right % 10 < 9 else -1)
        wording = _wording_of(response)
        return " ".join(
            [
                *self.leading_steps(problem, response)[: number - 1],
                str(Step(number, left, operation, wrong, wording(number))),
                *_write(Question(wrong, tuple(rest)), 1, wording, after=number),
            ]
        )

    def step_spans(self, response: str) -> list[tuple[int, int]]:
        """Return the character spans of a response's pieces: steps, answer, text before them."""
        return [(segment.start, segment.stop) for segment in split_trace(response)]

    def feedback(
        self, problem: Problem, response: str, verdict: Verdict, *, detail: FeedbackDetail
    ) -> str:
        """Say in the solver's vocabulary what is wrong: `<step_2> is wrong <answer> 17 is wrong`.

        A missing answer is a wrong one.
        """
        said = []
        if detail == "step" and verdict.first_wrong_step is not None:
            at_answer = verdict.first_wrong_step > len(read_question(problem.question).operations)
            tag = ANSWER_TAG if at_answer else f"<step_{verdict.first_wrong_step}>"
            said.append(f"{tag} is wrong")
        answer = ANSWER_TAG if verdict.answer is None else f"{ANSWER_TAG} {verdict.answer}"
        return " ".join([*said, f"{answer} is {'right' if verdict.correct else 'wrong'}"])


def _wording_of(response: str) -> Callable[[int], Wording]:
    """Return the words of each step of a response; see `ArithmeticTask.write_steps`."""
    wordings: dict[int, Wording] = {}
    for segment in split_trace(response):
        step = read_step(segment.text)
        if step is not None:
            wordings.setdefault(step.number, step.wording)

    def wording(number: int) -> Wording:
        nearest = min(wordings, key=lambda known: abs(known - number), default=None)
        return (0, 0, 0) if nearest is None else wordings[nearest]

    return wording


def _write(
    question: Question, first: int, wording: Callable[[int], Wording], *, after: int = 0
) -> list[str]:
    """Write the right steps from `first` on, and the answer; numbers go on from `after`."""
    states = question.states()
    steps = [
        str(
            Step(
                after + number,
                states[number - 1],
                operation,
                states[number],
                wording(after + number),
            )
        )
        for number, operation in enumerate(question.operations, start=1)
        if number >= first
    ]
    return [*steps, write_answer(states[-1])]


def _judge(question: Question, response: str) -> tuple[list[Segment], Segment | None]:
    """Return the right segments that the response starts with, and the first flawed one."""
    operations = question.operations
    segments = split_trace(response)
    answered = read_answer(response) is not None
    state = question.start
    for index, segment in enumerate(segments):
        leading = segments[:index]
        if index < len(operations):
            step = read_step(segment.text)
            right = Step(index + 1, state, operations[index], operations[index].apply(state))
            if step is not None and replace(step, wording=right.wording) == right:
                state = right.result
                continue
        elif index == len(operations):
            step = None
            if "".join(segment.text.split()) == ANSWER_TAG + f"{state:02d}":
                continue
        else:
            return leading, segment
        cut_off = not answered and step is None and segment is segments[-1]
        return leading, None if cut_off else segment
    return segments, None
