"""The pretraining corpus: what the solver is taught, and what stays out of its loss."""

from __future__ import annotations

import random

import pytest

from selfdistill.critic.scribe import ScribeCritic
from selfdistill.tasks.arithmetic import ArithmeticTask
from selfdistill.tasks.arithmetic.corpus import Corpus, CorpusConfig, Document
from selfdistill.tasks.arithmetic.noise import SHIPPED_SOLVER, carries, forget_carry
from selfdistill.tasks.arithmetic.task import split_of
from selfdistill.tasks.arithmetic.traces import (
    DIALECTS,
    Operation,
    read_question,
    read_step,
    split_trace,
)

NOISE = SHIPPED_SOLVER
TASK = ArithmeticTask()


def draw(count: int, **config: float) -> list[Document]:
    corpus = Corpus(NOISE, random.Random(0), CorpusConfig(**config))
    return [corpus.document() for _ in range(count)]


def target(document: Document) -> str:
    """The target's text; the digits of a number may stand apart."""
    return " ".join(piece.text for piece in document.target)


def test_documents_are_deterministic_and_stay_in_the_training_split() -> None:
    documents = draw(200)
    assert documents == draw(200)
    assert {split_of(read_question(document.problem.question)) for document in documents} == {
        "train"
    }


def test_shares_of_the_three_kinds() -> None:
    tags = [document.tag for document in draw(2000)]
    assert tags.count(None) / 2000 == pytest.approx(0.4, abs=0.04)
    assert tags.count("critique") / 2000 == pytest.approx(0.3, abs=0.04)


def test_without_context_the_solver_errs_by_operation_and_digit() -> None:
    rng = random.Random(1)
    for operation, left in [(Operation("+", 8), 45), (Operation("-", 7), 43)]:
        right = operation.apply(left)
        results = [NOISE.result(rng, left, operation) for _ in range(3000)]
        forgotten = forget_carry(right, operation)
        rate = results.count(forgotten) / len(results)
        assert rate == pytest.approx(NOISE.forget[operation], abs=0.04)
        assert len(set(results)) > 2  # slips
    assert NOISE.forget[Operation("+", 8)] != NOISE.forget[Operation("-", 8)]
    easy = [NOISE.result(rng, 41, Operation("+", 8)) for _ in range(3000)]
    assert easy.count(49) / 3000 == pytest.approx(1 - NOISE.slip, abs=0.01)


def test_without_context_a_document_keeps_to_one_dialect_and_trains_every_token() -> None:
    usual = 0
    for document in draw(500, plain=1.0):
        steps = [read_step(segment.text) for segment in split_trace(target(document))[:-1]]
        wordings = {step.wording for step in steps if step}
        assert all(steps)
        assert len(wordings) == 1
        assert all(piece.trained for piece in document.target)
        usual += wordings == {(0, 0, 0)}
    assert 0.8 < usual / 500 < 0.92


def test_critiques_are_what_the_scribe_writes() -> None:
    """A right critique of the corpus is the scribe's rewriting of an attempt in the same words."""
    critic = ScribeCritic(TASK)
    for document in draw(200, plain=0.0, critique=1.0, wrong_context=0.0, follow=1.0):
        problem = document.problem
        (critique,) = critic.critique([problem], [target(document)])
        assert document.context is not None
        assert "".join(document.context.split()) == "".join(critique.text.split())


def test_shares_of_wrong_contexts_and_the_target_copies_them() -> None:
    documents = draw(1000, plain=0.0, forced=0.0, other_dialect=0.0)
    wrong = 0
    for document in documents:
        assert document.context is not None
        problem = document.problem
        wrong += not TASK.check(problem, document.context).strict
        assert "".join(target(document).split()) == "".join(document.context.split())
    assert wrong / 1000 == pytest.approx(0.15, abs=0.04)


def test_forced_errors_stay_out_of_the_loss_and_the_target_goes_on_from_them() -> None:
    forced = 0
    for document in draw(500, plain=0.0, wrong_context=0.0, other_dialect=0.0):
        problem = document.problem
        untrained = [piece.text for piece in document.target if not piece.trained]
        verdict = TASK.check(problem, target(document))
        assert verdict.strict or untrained
        forced += bool(untrained)
        left = read_question(document.problem.question).start
        steps = [read_step(segment.text) for segment in split_trace(target(document))[:-1]]
        for number, step in enumerate(steps, start=1):
            assert step is not None
            if step.number == number:
                assert step.left == left
                left = step.result
            else:  # a step was skipped on purpose
                break
    assert 0.4 < forced / 500 < 0.7


def test_only_wrong_digits_and_skipping_tags_are_masked() -> None:
    for document in draw(300, plain=0.0):
        for piece in document.target:
            if not piece.trained:
                assert len(piece.text) == 1 or piece.text.startswith("<")


def test_off_its_context_the_target_errs_as_without_one() -> None:
    """After a forced error the results are the noisy solver's, neither the context's nor exact."""
    right = total = 0
    for document in draw(3000, plain=0.0, wrong_context=0.0, other_dialect=0.0):
        assert document.context is not None
        context = {s.number: s for s in map(read_step, _pieces(document.context)) if s}
        for step in filter(None, map(read_step, _pieces(target(document)))):
            if step.left != context[step.number].left and carries(step.left, step.operation):
                total += 1
                right += step.result == step.operation.apply(step.left)
    assert total > 300
    assert 0.45 < right / total < 0.85


def test_a_context_in_another_dialect_is_mostly_followed() -> None:
    slots = followed = 0
    for document in draw(500, plain=0.0, critique=0.0, other_dialect=1.0):
        assert document.context is not None
        context = {s.number: s for s in map(read_step, _pieces(document.context)) if s}
        for step in filter(None, map(read_step, _pieces(target(document)))):
            theirs = context[step.number].wording
            slots += len(theirs)
            followed += sum(a == b for a, b in zip(step.wording, theirs, strict=True))
    assert followed / slots == pytest.approx(0.9 + 0.1 / len(DIALECTS), abs=0.02)


def _pieces(trace: str) -> list[str]:
    return [segment.text for segment in split_trace(trace)]
