"""Attempts to look at, drawn from a solver until enough of them went wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from selfdistill.analysis.tokens import Place, erroneous_attempts
from selfdistill.evaluation.intervals import Interval
from selfdistill.evaluation.resampling import share_interval
from selfdistill.rollout.attempts import Attempts, sample_attempts
from selfdistill.training.solver import Solver, sampling_params

# Groups drawn and judged at once.
PORTION = 16


# Draw at most so many times the attempts that were asked for: a good solver errs seldom.
PATIENCE = 10


@dataclass(frozen=True)
class Draw:
    """Attempts and which of them to look at.

    Attributes:
        attempts: whole groups.
        wrong: places of those that went wrong.
        as_they_come: places of the first ones drawn, whatever became of them.
    """

    attempts: list[Attempts]
    wrong: list[Place]
    as_they_come: list[Place]

    @property
    def chosen(self) -> list[Place]:
        """Each place once, in the order of drawing."""
        return sorted({*self.wrong, *self.as_they_come})


def draw_attempts(
    solver: Solver,
    *,
    split: str,
    attempts: int,
    problems: int,
    samples: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> Draw:
    """Draw groups, portion by portion, until enough attempts went wrong or too many were drawn.

    Args:
        solver: writes the attempts.
        split: which problems.
        attempts: how many wrong ones, and how many as they come, to choose.
        problems: gone through as often as it takes.
        samples: attempts at each problem at a time.
        seed: of the sampled tokens.
        progress: called with the number of wrong attempts so far.
    """
    params = sampling_params(solver.config.rollout, seed)
    size = solver.task.size(split)
    count = problems if size is None else min(problems, size)
    asked, _ = solver.with_room(solver.task.problems(split=split, count=count))
    groups: list[Attempts] = []
    wrong: list[Place] = []
    while len(wrong) < attempts and samples * len(groups) < PATIENCE * attempts:
        start = len(groups) % len(asked)
        groups += sample_attempts(
            solver.engine,
            solver.context.student_prompt,
            solver.task,
            asked[start : start + PORTION],
            samples=samples,
            params=replace(params, seed=seed + len(groups)),
        )
        wrong = erroneous_attempts(groups, limit=attempts)
        if progress is not None:
            progress(len(wrong))
    drawn = [(i, j) for i, group in enumerate(groups) for j in range(len(group.rollouts))]
    return Draw(groups, wrong, drawn[:attempts])


def share_solved(attempts: Sequence[Attempts]) -> Interval:
    """Return the share of attempts with the right answer, problems resampled."""
    right: dict[str, list[float]] = {}
    for group in attempts:
        total = right.setdefault(group.problem.id, [0.0, 0.0])
        total[0] += sum(verdict.correct for verdict in group.verdicts)
        total[1] += len(group.verdicts)
    return share_interval(*zip(*right.values(), strict=True))
