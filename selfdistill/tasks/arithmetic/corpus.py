"""The corpus that gives the base solver its noise and its in-context abilities.

Nothing outside pretraining uses this: a solver's weakness lives in what it was trained to write.
Disclosed by construction: the forgotten carries, the slips, the shares of the dialects, that a
context is followed, and that a trace which left its context goes on from its own state.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal

from selfdistill.tasks.arithmetic.noise import SolverNoise, carries, forget_carry, slip
from selfdistill.tasks.arithmetic.task import ArithmeticTask, draw_question, split_of
from selfdistill.tasks.arithmetic.traces import DIALECTS, Question, Step, Wording, write_answer
from selfdistill.tasks.interface import Problem

DIALECT_SHARES = (0.86, 0.07, 0.03, 0.02, 0.01, 0.01)
"""How often the solver writes each dialect of its own accord."""

_TASK = ArithmeticTask()

ContextTag = Literal["critique", "reference"]


@dataclass(frozen=True)
class Piece:
    """A piece of a target text; `trained` False keeps its tokens out of the loss."""

    text: str
    trained: bool = True


@dataclass(frozen=True)
class Document:
    """One pretraining document: a problem, a context or none, and the target that follows."""

    problem: Problem
    tag: ContextTag | None
    context: str | None
    target: list[Piece]


@dataclass(frozen=True)
class CorpusConfig:
    """What the documents are made of; shares and rates lie in [0, 1].

    Attributes:
        plain: share of documents without context.
        critique: share of the others whose context is a critique (the rest: a reference).
        other_dialect: share of contexts that are not worded in the attempt's own dialect but in
            any one, drawn evenly (a critique keeps to the attempt's, so references only).
        follow: how often a slot of the target takes the context's words where the two differ.
        wrong_context: share of contexts that hold errors, which the target copies.
        forced: share of context documents whose target strays from the context.
        forced_rate: how often a step of such a target is wrong; wrong digits are not trained.
    """

    plain: float = 0.4
    critique: float = 0.5
    other_dialect: float = 0.5
    follow: float = 0.9
    wrong_context: float = 0.15
    forced: float = 0.8
    forced_rate: float = 0.25
    step_counts: tuple[int, ...] = (4, 5, 6)


@dataclass
class Corpus:
    """An endless stream of documents, all on questions of the training split."""

    noise: SolverNoise
    rng: random.Random
    config: CorpusConfig = field(default_factory=CorpusConfig)

    def question(self) -> Question:
        """Draw a question of the training split."""
        while True:
            question = draw_question(self.rng, self.config.step_counts)
            if split_of(question) == "train":
                return question

    def document(self) -> Document:
        """Draw one document."""
        rng, config = self.rng, self.config
        question = self.question()
        problem = _TASK.problem(question)
        own = rng.choices(range(len(DIALECTS)), DIALECT_SHARES)[0]
        if rng.random() < config.plain:
            return Document(problem, None, None, self._plain_target(question, own))
        tag: ContextTag = "critique" if rng.random() < config.critique else "reference"
        dialect = own
        if tag == "reference" and rng.random() < config.other_dialect:
            dialect = rng.randrange(len(DIALECTS))
        results = question.states()[1:]
        if rng.random() < config.wrong_context:
            results = self._wrong_results(question)
        context = _steps(question, results, dialect)
        text = " ".join([*map(str, context), write_answer(results[-1])])
        return Document(problem, tag, text, self._context_target(question, own, context))

    def _wrong_results(self, question: Question) -> list[int]:
        while True:
            state, results = question.start, []
            for operation in question.operations:
                state = self.noise.result(self.rng, state, operation)
                results.append(state)
            if results != question.states()[1:]:
                return results

    def _plain_target(self, question: Question, dialect: int) -> list[Piece]:
        """Write the solver's own attempt: noisy, in one dialect."""
        state = question.start
        pieces = []
        for number, operation in enumerate(question.operations, start=1):
            result = self.noise.result(self.rng, state, operation)
            if self.rng.random() >= self.noise.skip:
                step = Step(number, state, operation, result, (dialect, dialect, dialect))
                pieces.append(Piece(str(step)))
            state = result
        return [*pieces, Piece(write_answer(state))]

    def _context_target(self, question: Question, own: int, context: list[Step]) -> list[Piece]:
        """Write an attempt that follows a context as long as it is in the context's state.

        Forced errors (and skipped steps) stand where the solver's own rollouts have them, outside
        the loss; afterwards the target goes on from its own state, as noisy as without context.
        """
        rng = self.rng
        forced = rng.random() < self.config.forced
        state = question.start
        pieces: list[Piece] = []
        tag_trained = True
        for step in context:
            target = result = step.result
            if state != step.left:
                target = result = self.noise.result(rng, state, step.operation)
            elif forced and rng.random() < self.config.forced_rate:
                right = step.operation.apply(state)
                carried = carries(state, step.operation)
                result = forget_carry(right, step.operation) if carried else slip(rng, right)
            if forced and rng.random() < self.noise.skip:
                tag_trained = False
            else:
                written = Step(step.number, state, step.operation, result, self._wording(own, step))
                pieces += _masked(str(written), f"{target:02d}", tag_trained)
                tag_trained = True
            state = result
        tag, number = write_answer(state).split()
        return [*pieces, Piece(tag, tag_trained), Piece(number)]

    def _wording(self, own: int, step: Step) -> Wording:
        opening, verb, equals = (
            theirs if self.rng.random() < self.config.follow else own for theirs in step.wording
        )
        return opening, verb, equals


def _steps(question: Question, results: list[int], dialect: int) -> list[Step]:
    wording = (dialect, dialect, dialect)
    lefts = [question.start, *results]
    return [
        Step(number, lefts[number - 1], operation, results[number - 1], wording)
        for number, operation in enumerate(question.operations, start=1)
    ]


def _masked(step: str, result: str, tag_trained: bool) -> list[Piece]:
    """Cut a step into pieces; its tag and the digits that differ from `result` may be masked."""
    tag, body = step.split(" ", 1)
    body, written = body.rsplit(" ", 1)
    digits = [Piece(digit, digit == wanted) for digit, wanted in zip(written, result, strict=True)]
    return [Piece(tag, tag_trained), Piece(body), *digits]
