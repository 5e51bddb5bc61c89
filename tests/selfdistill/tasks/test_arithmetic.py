"""The arithmetic task: problems, splits, and a checker that nothing can trip."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from selfdistill.tasks.arithmetic import ArithmeticTask
from selfdistill.tasks.arithmetic.task import split_of
from selfdistill.tasks.arithmetic.traces import (
    DIALECTS,
    Operation,
    Question,
    Step,
    read_question,
    read_step,
    split_trace,
)
from selfdistill.tasks.interface import Problem

QUESTION = Question(47, (Operation("+", 8), Operation("+", 5), Operation("+", 9)))
RIGHT = (
    "<step_1> now 47 plus 8 makes 55 <step_2> now 55 plus 5 makes 60 "
    "<step_3> now 60 plus 9 makes 69 <answer> 69"
)
TASK = ArithmeticTask()
PROBLEM = TASK.problem(QUESTION)


def test_problem_holds_question_answer_and_a_reference_that_passes() -> None:
    assert PROBLEM.question == "47 + 8 + 5 + 9 mod 100"
    assert PROBLEM.answer == "69"
    assert PROBLEM.reference == RIGHT
    assert TASK.check(PROBLEM, RIGHT).strict


@pytest.mark.parametrize("dialect", range(len(DIALECTS)))
def test_references_keep_to_their_dialect_and_are_strictly_right(dialect: int) -> None:
    task = ArithmeticTask(reference_dialect=dialect)
    for problem in task.problems(split="dev", count=20):
        assert task.check(problem, problem.reference).strict
        steps = [read_step(segment.text) for segment in split_trace(problem.reference)[:-1]]
        assert {step.wording for step in steps if step} == {(dialect, dialect, dialect)}
        assert all(steps)


def test_a_reference_by_another_path_reaches_the_same_answer() -> None:
    problem = ArithmeticTask(reference_order="reversed").problem(QUESTION)
    assert problem.reference == (
        "<step_1> now 47 plus 9 makes 56 <step_2> now 56 plus 5 makes 61 "
        "<step_3> now 61 plus 8 makes 69 <answer> 69"
    )
    assert replace(problem, reference=RIGHT) == PROBLEM
    verdict = TASK.check(problem, problem.reference)
    assert verdict.correct
    assert verdict.first_wrong_step == 1  # as an attempt it would not follow the question


def test_problems_are_deterministic_distinct_and_differ_by_seed() -> None:
    first = TASK.problems(split="train", count=200, seed=3)
    assert first == TASK.problems(split="train", count=200, seed=3)
    assert first[:50] == TASK.problems(split="train", count=50, seed=3)
    assert len({problem.id for problem in first}) == 200
    assert first != TASK.problems(split="train", count=200, seed=4)


def test_splits_are_disjoint_whatever_the_seed() -> None:
    questions = {
        split: {
            p.question for seed in (0, 1) for p in TASK.problems(split=split, count=300, seed=seed)
        }
        for split in ("train", "dev", "test")
    }
    assert not questions["train"] & questions["dev"]
    assert not questions["train"] & questions["test"]
    assert not questions["dev"] & questions["test"]
    assert all(split_of(read_question(q)) == split for split in questions for q in questions[split])


def test_chains_have_one_sign_so_that_forgotten_carries_cannot_cancel() -> None:
    for problem in TASK.problems(split="test", count=100):
        assert (
            len({operation.sign for operation in read_question(problem.question).operations}) == 1
        )


def test_bad_arguments_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="step_counts: got"):
        ArithmeticTask(step_counts=(0, 5))
    with pytest.raises(ValueError, match="step_counts: got"):
        ArithmeticTask(step_counts=())
    with pytest.raises(ValueError, match="reference_dialect: got 6"):
        ArithmeticTask(reference_dialect=6)
    with pytest.raises(ValueError, match="split: got 'validation'"):
        TASK.problems(split="validation", count=1)
    with pytest.raises(ValueError, match="count: got -1"):
        TASK.problems(split="test", count=-1)
    with pytest.raises(ValueError, match="too few distinct"):
        ArithmeticTask(step_counts=(1,)).problems(split="test", count=1000)
    with pytest.raises(ValueError, match="question: got"):
        read_question("what is 2 + 2 ?")


def test_spaced_digits_mean_the_same_number() -> None:
    spaced = RIGHT.replace("47", "4 7").replace("69", "6 9")
    assert TASK.check(PROBLEM, spaced).strict
    assert TASK.check(PROBLEM, spaced).answer == "69"


def test_slots_of_different_dialects_may_be_mixed() -> None:
    mixed = RIGHT.replace("now 55 plus 5 makes", "from 55 then up 5 which is")
    assert TASK.check(PROBLEM, mixed).strict


# response, answer, correct, first wrong step, text at the marked span, complete
JUDGED = {
    "wrong result": (
        "<step_1> now 47 plus 8 makes 45 <step_2> now 45 plus 5 makes 50 "
        "<step_3> now 50 plus 9 makes 59 <answer> 59",
        ("59", False, 1, "<step_1> now 47 plus 8 makes 45", True),
    ),
    "operand does not continue": (
        RIGHT.replace("now 60 plus", "now 61 plus"),
        ("69", True, 3, "<step_3> now 61 plus 9 makes 69", True),
    ),
    "another operation than the question's": (
        RIGHT.replace("55 plus 5", "55 plus 6"),
        ("69", True, 2, "<step_2> now 55 plus 6 makes 60", True),
    ),
    "another sign than the question's": (
        RIGHT.replace("55 plus 5", "55 minus 5"),
        ("69", True, 2, "<step_2> now 55 minus 5 makes 60", True),
    ),
    "a step is missing": (
        "<step_1> now 47 plus 8 makes 55 <step_3> now 60 plus 9 makes 69 <answer> 69",
        ("69", True, 2, "<step_3> now 60 plus 9 makes 69", True),
    ),
    "steps swapped": (
        "<step_2> now 55 plus 5 makes 60 <step_1> now 47 plus 8 makes 55 <answer> 69",
        ("69", True, 1, "<step_2> now 55 plus 5 makes 60", True),
    ),
    "answer does not repeat the result": (
        RIGHT.replace("<answer> 69", "<answer> 79"),
        ("79", False, 4, "<answer> 79", True),
    ),
    "answer alone": ("<answer> 69", ("69", True, 1, "<answer> 69", True)),
    "text after the answer": (RIGHT + " now", ("69", True, 4, "<answer> 69 now", True)),
    "a step after the answer": (
        RIGHT + " <step_4> now 69 plus 9 makes 78",
        ("69", True, 5, "<step_4> now 69 plus 9 makes 78", True),
    ),
    "text before the first step": ("well 4 " + RIGHT, ("69", True, 1, "well 4", True)),
    "cut off inside a step": (
        "<step_1> now 47 plus 8 makes 55 <step_2> now 55 plus 5 makes 6",
        (None, False, None, None, False),
    ),
    "cut off after a wrong step": (
        "<step_1> now 47 plus 8 makes 45 <step_2> now",
        (None, False, 1, "<step_1> now 47 plus 8 makes 45", False),
    ),
    "last whole step wrong, no answer": (
        "<step_1> now 47 plus 8 makes 45",
        (None, False, 1, "<step_1> now 47 plus 8 makes 45", False),
    ),
    "cut off inside the answer": (RIGHT[:-1], (None, False, None, None, False)),
    "three digits are no answer": (RIGHT + "1", (None, False, None, None, False)),
    "nothing": ("", (None, False, None, None, False)),
    "trash": ("plus ( <unk> ] 7 \n", (None, False, None, None, False)),
}


@pytest.mark.parametrize("case", JUDGED)
def test_check_finds_the_earliest_wrong_step_and_its_span(case: str) -> None:
    response, (answer, correct, step, marked, complete) = JUDGED[case]
    verdict = TASK.check(PROBLEM, response)
    assert (verdict.answer, verdict.correct, verdict.complete) == (answer, correct, complete)
    assert verdict.first_wrong_step == step
    assert not verdict.strict
    span = verdict.wrong_span
    assert (None if span is None else response[span[0] : span[1]]) == marked


def test_check_judges_later_steps_by_the_traces_own_state() -> None:
    two_errors = RIGHT.replace("60 <step_3> now 60", "61 <step_3> now 61").replace("69", "79")
    assert TASK.check(PROBLEM, two_errors).first_wrong_step == 2


def test_check_never_raises_on_damaged_traces() -> None:
    rng = random.Random(0)
    problems = TASK.problems(split="test", count=10)
    for _ in range(500):
        problem = rng.choice(problems)
        words = problem.reference.split()
        for _ in range(rng.randrange(6)):
            at = rng.randrange(len(words))
            words[at : at + rng.randrange(3)] = rng.choices([*words, "<answer>", "<step_999>"], k=2)
        verdict = TASK.check(problem, " ".join(words))
        assert verdict.strict <= verdict.correct <= verdict.complete
        assert (verdict.first_wrong_step is None) == (verdict.wrong_span is None)


def test_majority_ignores_missing_answers_and_ties_go_to_the_earliest() -> None:
    groups = [["", "12", "34", "34"], ["12", "34", "34", "12"], ["", ""], []]
    assert TASK.majorities(groups) == ["34", "12", None, None]


def test_steps_are_written_in_the_words_of_the_attempt() -> None:
    attempt = "<step_1> so 47 gain 8 yields 55 <step_2> from 55 gain 5 yields 50"
    assert TASK.leading_steps(PROBLEM, attempt) == ["<step_1> so 47 gain 8 yields 55"]
    assert TASK.write_steps(PROBLEM, first=2, like=attempt) == [
        "<step_2> from 55 gain 5 yields 60",
        "<step_3> from 60 gain 9 yields 69",
        "<answer> 69",
    ]
    assert TASK.write_steps(PROBLEM, first=3, like="nothing to read")[0] == (
        "<step_3> now 60 plus 9 makes 69"
    )


def test_written_steps_and_questions_read_back() -> None:
    for sign in ("+", "-"):
        for wording in [(0, 0, 0), (3, 2, 5), (5, 4, 3)]:
            step = Step(7, 3, Operation("+" if sign == "+" else "-", 4), 99, wording)
            assert read_step(str(step)) == step
    assert read_question(str(QUESTION)) == QUESTION
    assert replace(PROBLEM, question="4 7 + 8 + 5 + 9 mod 1 0 0") != PROBLEM
    assert read_question("4 7 + 8 + 5 + 9 mod 1 0 0") == QUESTION


def test_modulo_wraps_both_ways() -> None:
    assert Operation("+", 8).apply(95) == 3
    assert Operation("-", 8).apply(3) == 95
    problem: Problem = TASK.problem(Question(3, (Operation("-", 8),)))
    assert (problem.answer, problem.reference) == (
        "95",
        "<step_1> now 03 minus 8 makes 95 <answer> 95",
    )
