"""The exact scribe: schema A-D of arXiv 2606.11173, case by case."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any, cast

import pytest

from selfdistill.config.methods import ScribeCriticConfig
from selfdistill.critic.scribe import Copying, ScribeCritic
from selfdistill.tasks.arithmetic import ArithmeticTask
from selfdistill.tasks.arithmetic.corpus import Corpus, CorpusConfig
from selfdistill.tasks.arithmetic.noise import SolverNoise
from selfdistill.tasks.arithmetic.traces import Operation, Question, read_step, split_trace

TASK = ArithmeticTask()
PROBLEM = TASK.problem(Question(47, (Operation("+", 8), Operation("+", 5), Operation("+", 9))))
ONE = "<step_1> now 47 plus 8 makes 55"
TWO = "<step_2> now 55 plus 5 makes 60"
THREE = "<step_3> now 60 plus 9 makes 69"
ANSWER = "<answer> 69"
RIGHT = " ".join([ONE, TWO, THREE, ANSWER])


@pytest.mark.parametrize(
    ("response", "case", "first", "text"),
    [
        pytest.param(RIGHT, "A", None, RIGHT, id="A-verbatim"),
        pytest.param(
            RIGHT.replace("47", "4 7"), "A", None, RIGHT.replace("47", "4 7"), id="A-to-the-letter"
        ),
        pytest.param(f"{ONE} {THREE} {ANSWER}", "B", 2, RIGHT, id="B-inserts-the-missing-step"),
        pytest.param(f"{TWO} {THREE} {ANSWER}", "B", 1, RIGHT, id="B-first-step-missing"),
        pytest.param(f"{THREE} {ANSWER}", "B", 1, RIGHT, id="B-two-steps-missing"),
        pytest.param(ANSWER, "B", 1, RIGHT, id="B-answer-alone"),
        pytest.param(
            f"{ONE} <step_3> so 6 0 gain 9 yields 69 {ANSWER}",
            "B",
            2,
            f"{ONE} {TWO} <step_3> so 6 0 gain 9 yields 69 {ANSWER}",
            id="B-keeps-the-rest-verbatim",
        ),
        pytest.param(
            f"{ONE} <step_2> now 55 plus 6 makes 60 {THREE} {ANSWER}",
            "B",
            2,
            RIGHT,
            id="B-unjustified-step-is-rewritten",
        ),
        pytest.param(f"{RIGHT} now", "B", 4, RIGHT, id="B-drops-what-follows-the-answer"),
        pytest.param(f"{ONE} {TWO} <step_3> now 6", "C", 3, RIGHT, id="C-finishes"),
        pytest.param("", "C", 1, RIGHT, id="C-empty"),
        pytest.param(f"{ONE} {TWO} {THREE}", "C", 4, RIGHT, id="C-answer-missing"),
        pytest.param(
            f"{ONE} <step_2> now 55 plus 5 makes 50 <step_3> now 50 plus 9 makes 59 <answer> 59",
            "D",
            2,
            RIGHT,
            id="D-rewrites-from-the-first-wrong-step",
        ),
        pytest.param(
            "<step_1> so 4 7 gain 8 yields 55 <step_2> so 55 gain 5 yields 50 <answer> 50",
            "D",
            2,
            "<step_1> so 4 7 gain 8 yields 55 <step_2> so 55 gain 5 yields 60 "
            "<step_3> so 60 gain 9 yields 69 <answer> 69",
            id="D-keeps-the-attempts-dialect",
        ),
        pytest.param(f"{ONE} {TWO} {THREE} <answer> 79", "D", 4, RIGHT, id="D-wrong-answer-line"),
        pytest.param("plus ( 9", "C", 1, RIGHT, id="C-one-piece-of-trash"),
        pytest.param(f"7 7 {RIGHT[:-2]}70", "D", 1, RIGHT, id="D-trash-first"),
    ],
)
def test_schema(response: str, case: str, first: int | None, text: str) -> None:
    (critique,) = ScribeCritic(TASK).critique([PROBLEM], [response])
    assert (critique.case, critique.first_wrong_step) == (case, first)
    assert critique.text == text


def test_wrong_step_is_never_quoted_and_right_ones_always_are() -> None:
    noise = SolverNoise.draw(seed=0, low=0.05, high=0.6)
    corpus = Corpus(noise, random.Random(0), CorpusConfig(plain=1.0))
    documents = [corpus.document() for _ in range(300)]
    problems = [document.problem for document in documents]
    attempts = [" ".join(piece.text for piece in document.target) for document in documents]
    critiques = ScribeCritic(TASK).critique(problems, attempts)
    assert {critique.case for critique in critiques} >= {"A", "D"}
    for problem, attempt, critique in zip(problems, attempts, critiques, strict=True):
        assert TASK.check(problem, critique.text).strict
        assert critique.text.startswith(" ".join(TASK.leading_steps(problem, attempt)))
        span = TASK.check(problem, attempt).wrong_span
        marked = "" if span is None else attempt[slice(*span)]
        if critique.case == "D" and marked.startswith(f"<step_{critique.first_wrong_step}>"):
            assert marked not in critique.text


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="responses: got 1 for 2 problems"):
        ScribeCritic(TASK).critique([PROBLEM, PROBLEM], [RIGHT])


WRONG_TWO = "<step_2> now 55 plus 5 makes 50"
WRONG_REST = "<step_3> now 50 plus 9 makes 59 <answer> 59"


@pytest.mark.parametrize(
    ("copying", "response", "text"),
    [
        # D: one thing changes at a time, what is said before and at the wrong step.
        ("partial_repetition", f"{ONE} {WRONG_TWO} {WRONG_REST}", RIGHT),
        (
            "full_repetition",
            f"{ONE} {WRONG_TWO} {WRONG_REST}",
            f"{ONE} {WRONG_TWO} {THREE} {ANSWER}",
        ),
        ("omission", f"{ONE} {WRONG_TWO} {WRONG_REST}", f"{TWO} {THREE} {ANSWER}"),
        # A wrong answer line is quoted, and nothing is left to go on with.
        ("full_repetition", f"{ONE} {TWO} {THREE} <answer> 79", f"{ONE} {TWO} {THREE} <answer> 79"),
        ("omission", f"{ONE} {TWO} {THREE} <answer> 79", ANSWER),
        # Trash in the answer's place is quoted, too, but then the answer follows.
        (
            "full_repetition",
            f"{ONE} {TWO} {THREE} <step_4> now 69 <answer> 69",
            f"{ONE} {TWO} {THREE} <step_4> now 69 {ANSWER}",
        ),
        # A, fully correct: there is nothing wrong to quote, and nothing new to write.
        ("full_repetition", RIGHT, RIGHT),
        ("omission", RIGHT, ""),
        # C, cut off: as ever, less the trace.
        ("full_repetition", f"{ONE} {TWO} <step_3> now 6", RIGHT),
        ("omission", f"{ONE} {TWO} <step_3> now 6", f"{THREE} {ANSWER}"),
        # The attempt's own words, whatever is left out.
        (
            "omission",
            "<step_1> so 47 gain 8 yields 45 <answer> 45",
            RIGHT.replace("now", "so").replace("plus", "gain").replace("makes", "yields"),
        ),
    ],
)
def test_copying(copying: Copying, response: str, text: str) -> None:
    (critique,) = ScribeCritic(TASK, copying=copying).critique([PROBLEM], [response])
    assert critique.text == text


def test_a_critic_that_errs_writes_one_wrong_step_and_goes_on_from_it() -> None:
    """As often as asked, in the attempt's own words, and the same for the same attempt."""
    problems = TASK.problems(split="train", count=400)
    attempts = [problem.reference for problem in problems]
    critic = ScribeCritic(TASK, error_rate=0.2)
    critiques = critic.critique(problems, attempts)
    assert critiques == critic.critique(problems, attempts)
    verdicts = [TASK.check(p, c.text) for p, c in zip(problems, critiques, strict=True)]
    wrong = [i for i, verdict in enumerate(verdicts) if not verdict.strict]
    assert 50 < len(wrong) < 110
    assert {verdicts[i].first_wrong_step for i in wrong} == {1, 2, 3, 4, 5, 6}
    for i in wrong:
        first = verdicts[i].first_wrong_step
        assert first is not None
        steps = [read_step(segment.text) for segment in split_trace(critiques[i].text)[:-1]]
        assert all(step is not None for step in steps)
        # What follows is right for whoever believes the wrong result.
        for before, after in pairwise(steps[first - 1 :]):
            assert after.left == before.result
            assert after.result == after.operation.apply(after.left)
        assert critiques[i].text.endswith(f"<answer> {steps[-1].result:02d}")
    never = ScribeCritic(TASK).critique(problems, attempts)
    assert [critique.text for critique in never] == attempts


def test_errors_need_a_task_that_can_write_them_and_whole_critiques() -> None:
    class Exact:
        name = "exact"

    with pytest.raises(TypeError, match="the exact task cannot write mistakes"):
        ScribeCritic(cast(Any, Exact()), error_rate=0.1)
    with pytest.raises(ValueError, match="error_rate is for critiques that repeat partially"):
        ScribeCriticConfig(copying="omission", error_rate=0.1)
