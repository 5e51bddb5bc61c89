"""Questions of a predicted base success."""

from __future__ import annotations

import random

import pytest

from selfdistill.tasks.arithmetic import ArithmeticTask
from selfdistill.tasks.arithmetic.noise import SHIPPED_SOLVER, SolverNoise
from selfdistill.tasks.arithmetic.traces import Operation, Question, read_question

PLUS_7, PLUS_2 = Operation("+", 7), Operation("+", 2)


def test_success_is_the_product_over_steps():
    noise = SolverNoise(forget={PLUS_7: 0.4, PLUS_2: 0.9}, slip=0.1)
    # 95 + 7 carries and 02 + 2 does not.
    assert noise.success(Question(95, (PLUS_7, PLUS_2))) == pytest.approx(0.6 * 0.9)
    assert noise.success(Question(1, (PLUS_7,))) == pytest.approx(0.9)


def test_predicted_success_is_how_often_the_noise_leaves_a_chain_alone():
    question = Question(47, (PLUS_7, Operation("+", 9), PLUS_2))
    rng = random.Random(0)
    right = 0
    for _ in range(20_000):
        state = question.start
        for operation in question.operations:
            state = SHIPPED_SOLVER.result(rng, state, operation)
        right += state == question.states()[-1]
    assert right / 20_000 == pytest.approx(SHIPPED_SOLVER.success(question), abs=0.012)


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_only_questions_of_the_range_are_drawn(split: str):
    task = ArithmeticTask(predicted_success=(0.3, 0.5))
    problems = task.problems(split=split, count=50)
    assert len({problem.id for problem in problems}) == 50
    for problem in problems:
        assert 0.3 <= SHIPPED_SOLVER.success(read_question(problem.question)) < 0.5


def test_a_range_keeps_splits_apart_and_repeats_itself():
    task = ArithmeticTask(predicted_success=(0.08, 0.14))
    drawn = {split: task.problems(split=split, count=40) for split in ("train", "dev", "test")}
    assert len({problem.id for problems in drawn.values() for problem in problems}) == 120
    again = ArithmeticTask(predicted_success=(0.08, 0.14)).problems(split="dev", count=60)
    assert again[:40] == drawn["dev"]
    assert task.problems(split="dev", count=40) == drawn["dev"]


def test_what_was_drawn_cannot_be_changed_from_outside():
    task = ArithmeticTask()
    task.problems(split="dev", count=3).clear()
    assert len(task.problems(split="dev", count=3)) == 3


def test_ranges_that_hold_nothing_are_refused():
    with pytest.raises(ValueError, match=r"predicted_success: got \(0.5, 0.3\)"):
        ArithmeticTask(predicted_success=(0.5, 0.3))
    with pytest.raises(ValueError, match="too few distinct dev questions"):
        ArithmeticTask(step_counts=[1], predicted_success=(0.0, 0.01)).problems(
            split="dev", count=1
        )
