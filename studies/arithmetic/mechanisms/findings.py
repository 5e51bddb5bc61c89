"""What the finished jobs say, as numbers.

All intervals are 95 % bootstrap intervals that resample problems and training seeds; differences
are paired by problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selfdistill.analysis.comparison import Metric, mean_score, problem_scores
from selfdistill.evaluation.intervals import Bounds, Interval
from selfdistill.evaluation.resampling import crossed_difference, crossed_mean
from selfdistill.evaluation.scores import Evaluation
from selfdistill.runlog import JsonLines
from studies.arithmetic.mechanisms.arms import ARMS, REFERENCES, Arm, Scale
from studies.arithmetic.mechanisms.job_list import BASE, rate_names, run_names
from studies.arithmetic.reproduce.behaviour import Behaviour
from studies.arithmetic.reproduce.jobs import (
    Result,
    behaviour_file,
    read_held_out,
    read_result,
    read_with_context,
)


@dataclass(frozen=True)
class Outside:
    """Problems unlike those of training: the share of right answers, and of steps before the first
    wrong one."""

    right: Interval
    leading: Interval


@dataclass(frozen=True)
class Row:
    """A solver on test problems, over the seeds of its training.

    Attributes:
        key, label: of the arm; "base" for the solver before training.
        avg, pass_at_k: Avg@k and Pass@k.
        distinct: different traces among the attempts whose every step is right, a problem.
        surprisal: the entropy of a token (nats), as its unbiased estimate from sampled tokens.
        tokens: length of an answer.
        outside: by name.
        per_seed: Avg@k of each run.
        learning_rate: the one that was chosen; None before training.
        dev: best dev Avg@k of each rate that was tried; None for a run that diverged.
        best_steps: the step of each run whose weights were kept, counted in its last run.
        differences: Avg@k minus that of each reference, by key.
        seconds: working time of the arm's jobs.
    """

    key: str
    label: str
    avg: Interval
    pass_at_k: Interval
    distinct: Interval
    surprisal: Interval
    tokens: Interval
    outside: dict[str, Outside]
    per_seed: list[float]
    learning_rate: float | None
    dev: dict[str, float | None]
    best_steps: list[int]
    differences: dict[str, Interval]
    seconds: float


@dataclass(frozen=True)
class Findings:
    """Everything that is finished.

    Attributes:
        base: the solver before training; None until it was measured.
        teacher: its Avg with a critique of its own attempt: what a fixed teacher can do.
        rows: the finished arms.
        missing: labels of the others.
        seconds: working time of all jobs.
    """

    base: Row | None
    teacher: Interval | None
    rows: dict[str, Row]
    missing: list[str]
    seconds: float


def collect(output: Path, scale: Scale, arms: Sequence[Arm] = ARMS) -> Findings:
    """Read what is there; an arm counts when all of its jobs are finished."""
    scores = {arm.key: found for arm in arms if (found := _scores(output, scale, arm)) is not None}
    rows = {arm.key: _arm_row(output, scale, arm, scores) for arm in arms if arm.key in scores}
    measured = read_result(output, BASE)
    return Findings(
        base=None if measured is None else _base_row(output, scale, measured),
        teacher=None if measured is None else read_with_context(output / BASE).avg_at_k,
        rows=rows,
        missing=[arm.label for arm in arms if arm.key not in rows],
        seconds=sum(row.seconds for row in rows.values()) + (measured.seconds if measured else 0.0),
    )


def _scores(output: Path, scale: Scale, arm: Arm) -> list[list[float]] | None:
    """Avg of each seed and problem; None where a job is not finished."""
    names = [*rate_names(arm, scale), *run_names(arm, scale)]
    if any(read_result(output, name) is None for name in names):
        return None
    evaluations = [read_held_out(output / name) for name in run_names(arm, scale)]
    return problem_scores(evaluations, "avg_at_k")


def _arm_row(output: Path, scale: Scale, arm: Arm, scores: dict[str, list[list[float]]]) -> Row:
    names = run_names(arm, scale)
    rates = [_result(output, name) for name in rate_names(arm, scale)]
    results = [_result(output, name) for name in names]
    return _row(
        arm.key,
        arm.label,
        scale,
        [output / name for name in names],
        learning_rate=results[0].learning_rate,
        dev={
            f"{rate:g}": None if result.diverged else result.best_metric
            for rate, result in zip(scale.rates, rates, strict=True)
        },
        best_steps=[_best_step(output / name) for name in names],
        differences={
            other.key: crossed_difference(scores[other.key], scores[arm.key])
            for other in REFERENCES
            if other.key in scores and other.key != arm.key
        },
        seconds=sum(result.seconds for result in [*rates, *results]),
    )


def _base_row(output: Path, scale: Scale, measured: Result) -> Row:
    return _row(
        "base",
        "before training",
        scale,
        [output / BASE],
        learning_rate=None,
        dev={},
        best_steps=[],
        differences={},
        seconds=measured.seconds,
    )


def _row(
    key: str,
    label: str,
    scale: Scale,
    folders: Sequence[Path],
    *,
    learning_rate: float | None,
    dev: dict[str, float | None],
    best_steps: list[int],
    differences: dict[str, Interval],
    seconds: float,
) -> Row:
    evaluations = [read_held_out(folder) for folder in folders]
    within = [Behaviour.read(behaviour_file(folder)) for folder in folders]
    return Row(
        key=key,
        label=label,
        avg=_metric(evaluations, "avg_at_k"),
        pass_at_k=_metric(evaluations, "pass_at_k"),
        distinct=_mean(within, "distinct", bounds=(0.0, float(scale.samples))),
        surprisal=_mean(within, "surprisal", bounds=None),
        tokens=_mean(within, "tokens", bounds=None),
        outside={name: _outside(folders, name) for name in scale.outside},
        per_seed=[evaluation.avg_at_k.value for evaluation in evaluations],
        learning_rate=learning_rate,
        dev=dev,
        best_steps=best_steps,
        differences=differences,
        seconds=seconds,
    )


def _outside(folders: Sequence[Path], name: str) -> Outside:
    found = [Behaviour.read(behaviour_file(folder, name)) for folder in folders]
    return Outside(
        _mean(found, "right", bounds=(0.0, 1.0)), _mean(found, "leading", bounds=(0.0, 1.0))
    )


def _mean(found: Sequence[Behaviour], name: str, *, bounds: Bounds | None) -> Interval:
    return crossed_mean([getattr(each, name) for each in found], bounds=bounds)


def _metric(evaluations: Sequence[Evaluation], metric: Metric) -> Interval:
    interval = mean_score(evaluations, metric)
    assert interval is not None  # of evaluations with the scores of each problem
    return interval


def _result(output: Path, name: str) -> Result:
    result = read_result(output, name)
    assert result is not None  # `_scores` has looked
    return result


def _best_step(folder: Path) -> int:
    lines = JsonLines(folder / "evaluations.jsonl").read()
    return int(max(lines, key=lambda line: line["avg_at_k"]["value"])["step"])
