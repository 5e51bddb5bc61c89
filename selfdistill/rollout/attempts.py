"""Attempts at problems: rollouts with the checker's verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from selfdistill.rollout.engine import Rollout, RolloutEngine, SamplingParams, sample
from selfdistill.tasks.interface import Problem, Task, Verdict, check_all


@dataclass(frozen=True)
class Attempts:
    """All attempts at one problem with their verdicts."""

    problem: Problem
    rollouts: list[Rollout]
    verdicts: list[Verdict]


def sample_attempts(
    engine: RolloutEngine,
    render: Callable[[Problem], list[int]],
    task: Task,
    problems: Sequence[Problem],
    *,
    samples: int,
    params: SamplingParams,
    progress: Callable[[int], None] | None = None,
) -> list[Attempts]:
    """Draw and judge `samples` attempts at each problem.

    Args:
        engine: samples the attempts.
        render: turns a problem into the student's prompt (token ids).
        task: judges the attempts.
        problems: what to solve.
        samples: attempts per problem.
        params: sampling temperature, length limit and seed.
        progress: called with the number of problems just finished.
    """
    attempts: list[Attempts] = []
    # Small portions, so that progress shows; every problem keeps the random stream of its place.
    portion = 16
    for start in range(0, len(problems), portion):
        batch = problems[start : start + portion]
        groups = sample(
            engine,
            [render(problem) for problem in batch],
            group_size=samples,
            params=replace(params, seed=params.seed + start),
            names=[f"problem {problem.id!r}" for problem in batch],
        )
        attempts += judge(task, batch, groups)
        if progress is not None:
            progress(len(batch))
    return attempts


def judge(
    task: Task, problems: Sequence[Problem], groups: Sequence[list[Rollout]]
) -> list[Attempts]:
    """Check every rollout; one group of rollouts for each problem."""
    pairs = list(zip(problems, groups, strict=True))
    verdicts = iter(
        check_all(task, [(problem, rollout.text) for problem, group in pairs for rollout in group])
    )
    return [
        Attempts(problem, group, list(islice(verdicts, len(group)))) for problem, group in pairs
    ]
