from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from selfdistill.evaluation.intervals import bootstrap
from selfdistill.evaluation.scores import (
    Evaluation,
    avg_difference,
    majorities_are_correct,
    pass_at_k,
    summarize,
)
from selfdistill.rollout.attempts import Attempts, sample_attempts
from selfdistill.rollout.engine import Rollout, SamplingParams
from selfdistill.tasks.arithmetic import ArithmeticTask
from selfdistill.tasks.interface import Problem, Verdict

TASK = ArithmeticTask()


class ScriptedEngine:
    """Answers each prompt with the texts that a script holds for it."""

    def __init__(self, script: dict[int, list[str]]) -> None:
        self.script = script
        self.calls: list[tuple[int, SamplingParams]] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], *, group_size: int, params: SamplingParams
    ) -> list[list[Rollout]]:
        self.calls.append((len(prompts), params))
        return [
            [Rollout([1, 2], [-0.1, -0.1], text, True) for text in self.script[prompt[0]]]
            for prompt in prompts
        ]


def verdict(answer: str | None, *, correct: bool, strict: bool = False) -> Verdict:
    return Verdict(answer, correct, strict, None, None, answer is not None)


def evaluation(correct: list[int], *, samples: int = 4, prefix: str = "p") -> Evaluation:
    rollout = Rollout([1], [0.0], "", True)
    attempts = [
        Attempts(
            Problem(f"{prefix}{i}", "", "1", ""),
            [rollout] * samples,
            [verdict("1", correct=True)] * c + [verdict("2", correct=False)] * (samples - c),
        )
        for i, c in enumerate(correct)
    ]
    return summarize(attempts, TASK, split="test")


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_attempt(k: int) -> None:
    for correct in range(6):
        outcomes = [True] * correct + [False] * (5 - correct)
        subsets = list(itertools.combinations(outcomes, k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(5, correct, k) == pytest.approx(expected)


def test_pass_at_k_refuses_impossible_counts() -> None:
    with pytest.raises(ValueError, match="k must lie between 1 and samples=4, got 5"):
        pass_at_k(4, 2, 5)
    with pytest.raises(ValueError, match="correct must lie between 0 and samples=4, got 5"):
        pass_at_k(4, 5, 2)


def test_bootstrap_interval_is_that_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(0.3, 1.0, 400)
    interval = bootstrap(values.tolist(), bounds=None)
    margin = 1.96 * values.std() / 20
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - margin, abs=0.1 * margin)
    assert interval.high == pytest.approx(values.mean() + margin, abs=0.1 * margin)
    assert bootstrap(values.tolist(), bounds=None) == interval
    with pytest.raises(ValueError, match="values"):
        bootstrap([])


def test_majority_counts_by_answer_not_by_attempt() -> None:
    wrong = [verdict(answer, correct=False) for answer in ("10", "20", "30")]
    right = [verdict("42", correct=True)] * 2
    groups = [
        [*wrong, *right],
        [*wrong, wrong[1], wrong[1], *right],
        [verdict(None, correct=False)] * 3,
    ]
    assert majorities_are_correct(TASK, groups) == [True, False, False]


def test_summary_counts_each_metric() -> None:
    result = evaluation([0, 1, 3, 4])
    assert result.avg_at_k.value == pytest.approx(8 / 16)
    assert result.pass_at_k.value == pytest.approx(3 / 4)
    assert result.maj_at_k.value == pytest.approx(2 / 4)
    assert result.strict_avg_at_k.value == 0
    assert result.avg_at_k.low < 0.5 < result.avg_at_k.high
    assert Evaluation.from_json(result.to_json()) == result


def test_attempts_are_sampled_in_portions_with_seeds_of_their_own() -> None:
    problems = TASK.problems(split="dev", count=20)
    # Even problems: one attempt copies the reference; odd problems: none does.
    script = {
        i: [problem.reference if i % 2 == 0 else "", "<answer> 1"]
        for i, problem in enumerate(problems)
    }
    index = {problem.id: i for i, problem in enumerate(problems)}
    engine = ScriptedEngine(script)
    done: list[int] = []
    attempts = sample_attempts(
        engine,
        lambda problem: [index[problem.id]],
        TASK,
        problems,
        samples=2,
        params=SamplingParams(temperature=0.9, max_new_tokens=11, seed=100),
        progress=done.append,
    )
    assert [a.problem for a in attempts] == problems
    assert sum(done) == 20
    assert len({params.seed for _, params in engine.calls}) == len(engine.calls) > 1
    assert all((p.temperature, p.max_new_tokens) == (0.9, 11) for _, p in engine.calls)
    result = summarize(attempts, TASK, split="dev")
    assert result.pass_at_k.value == 0.5
    assert result.strict_avg_at_k.value == 0.25
    assert result.strict_means == "every step right"


def test_unequal_attempts_are_refused() -> None:
    problem = Problem("p", "", "1", "")
    rollout = Rollout([1], [0.0], "", True)
    wrong = verdict("2", correct=False)
    with pytest.raises(ValueError, match=r"same number of rollouts.*\[1, 2\]"):
        summarize(
            [Attempts(problem, [rollout], [wrong]), Attempts(problem, [rollout] * 2, [wrong] * 2)],
            TASK,
            split="dev",
        )


def test_paired_difference_is_sharper_than_two_intervals() -> None:
    before = evaluation([0, 1, 2, 3] * 10)
    after = evaluation([1, 2, 3, 4] * 10)
    difference = avg_difference(before, after)
    assert difference.value == pytest.approx(0.25)
    # Every problem rose alike: the pairs know it, the two intervals alone do not.
    assert difference.low == pytest.approx(0.25)
    assert after.avg_at_k.low - before.avg_at_k.high < 0.1
    with pytest.raises(ValueError, match="same problems"):
        avg_difference(before, evaluation([1, 2, 3, 4] * 10, prefix="q"))
