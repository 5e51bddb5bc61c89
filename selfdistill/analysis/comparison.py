"""Runs beside each other: learning curves, held-out accuracy, paired differences, settings.

Runs that differ in nothing but the seed (and in where they were computed) are one group: its curve
is the mean over the seeds, and its intervals resample seeds and problems.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import TypeAdapter, ValidationError

from selfdistill.config import load_config
from selfdistill.errors import UserError
from selfdistill.evaluation.intervals import SHARES, Bounds, Interval
from selfdistill.evaluation.resampling import crossed_difference, crossed_mean
from selfdistill.evaluation.scores import Evaluation, ProblemScore
from selfdistill.runlog import JsonLines
from selfdistill.training.checkpoint import CheckpointStore
from selfdistill.training.state_file import read_state, refuse_other

Metric: TypeAlias = Literal["avg_at_k", "maj_at_k", "pass_at_k", "mean_tokens"]

# What may differ between the runs of one group: the seed, and what does not change what is learned.
IGNORED = ("seed", "output_dir", "device", "shard", "checkpoint", "max_empty_steps")
# Where an evaluation on problems that chose nothing is looked for, in this order.
HELD_OUT_FILES = ("held_out.json", "held_out_after.json")


class NotARunError(UserError):
    """A folder without the files of a training run."""


@dataclass(frozen=True)
class RunCurve:
    """One training run as its files tell it.

    Attributes:
        name: unique among the compared runs.
        config: the configuration, flattened: {"method.name": "stepalign", ...}.
        rollouts_per_step: attempts that one step learns from.
        steps: when it was evaluated.
        evaluations: on the dev split, one for each of `steps`.
        held_out: on problems that neither training nor the choice of a checkpoint saw, or None.
    """

    name: str
    config: dict[str, Any]
    rollouts_per_step: int
    steps: tuple[int, ...]
    evaluations: tuple[Evaluation, ...]
    held_out: Evaluation | None = None

    @property
    def best(self) -> int:
        """The place of the best evaluation, the first of equals, as `checkpoints/best` has it."""
        values = [e.merit for e in self.evaluations]
        return values.index(max(values))


@dataclass(frozen=True)
class Point:
    """A metric after some training.

    Attributes:
        step: optimiser steps.
        rollouts: attempts learned from until then.
        value: mean over problems (and seeds).
        low, high: its 95 % interval; None where the problems' own values were not recorded.
    """

    step: int
    rollouts: int
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed only.

    Attributes:
        label: short, and unique among the groups.
        runs: at least one.
        curves: for each metric, the mean curve over the steps that all runs were evaluated at.
    """

    label: str
    runs: tuple[RunCurve, ...]
    curves: dict[Metric, tuple[Point, ...]]


@dataclass(frozen=True)
class Final:
    """What a group ends with.

    Attributes:
        label: of the group.
        split: "test": `RunCurve.held_out`. "dev": the best evaluation while training, which is
            optimistic, because it was chosen for being the best.
        seeds, problems, samples: how much was measured.
        mean_tokens: mean length of an answer, which older files give without an interval.
        metrics: mean and interval of each metric; None where it cannot be had.
    """

    label: str
    split: str
    seeds: int
    problems: int
    samples: int
    mean_tokens: float
    metrics: dict[Metric, Interval | None]


@dataclass(frozen=True)
class Difference:
    """Second minus first group, paired by problem.

    Attributes:
        first, second: labels of the groups.
        split: see `Final`.
        metrics: the difference of each metric; None where it cannot be had.
    """

    first: str
    second: str
    split: str
    metrics: dict[Metric, Interval | None]


@dataclass(frozen=True)
class Comparison:
    """Everything that the page shows.

    Attributes:
        groups: in the order in which their first runs were given.
        finals: one for each group.
        differences: of every pair of groups that were measured on the same problems.
        settings: for each configuration key that differs between groups, the value of each group
            by label.
    """

    groups: tuple[Group, ...]
    finals: tuple[Final, ...]
    differences: tuple[Difference, ...]
    settings: dict[str, dict[str, Any]]


METRICS: tuple[Metric, ...] = ("avg_at_k", "maj_at_k", "pass_at_k", "mean_tokens")


def read_run_curve(folder: Path, *, name: str | None = None) -> RunCurve:
    """Read a run, finished or not.

    Args:
        folder: of `selfdistill train` or `selfdistill demo`.
        name: how to call it; the folder's name by default.

    Raises:
        NotARunError: config.yaml or evaluations.jsonl is missing, empty, or something else.
        ConfigError: config.yaml is no configuration.
        LogError: evaluations.jsonl is no log.
        CheckpointError: config.yaml is not what the last checkpoint was trained with.
    """
    config_file = folder / "config.yaml"
    lines = JsonLines(folder / "evaluations.jsonl").read()
    if not config_file.is_file() or not lines:
        raise NotARunError(
            f"{folder} holds no evaluated run: expected config.yaml and evaluations.jsonl with at "
            "least one line, as `selfdistill train` writes them"
        )
    config = load_config(config_file)
    settings = config.model_dump(mode="json")
    last = CheckpointStore(folder / "checkpoints").last
    if last.exists():
        refuse_other(last, read_state(last), config=settings)
    try:
        evaluations = TypeAdapter(tuple[Evaluation, ...]).validate_python(lines)
        steps = TypeAdapter(tuple[int, ...]).validate_python([line.get("step") for line in lines])
    except ValidationError as error:
        first = error.errors()[0]
        raise NotARunError(
            f"{folder / 'evaluations.jsonl'} holds a record that is no evaluation: "
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {first['input']!r:.80}"
        ) from error
    return RunCurve(
        name=name or folder.name,
        config=flatten(settings),
        rollouts_per_step=config.prompts_per_step * config.method.group_size,
        steps=steps,
        evaluations=evaluations,
        held_out=_read_held_out(folder),
    )


def _read_held_out(folder: Path) -> Evaluation | None:
    adapter = TypeAdapter(Evaluation | dict[str, Any])
    for name in HELD_OUT_FILES:
        if (folder / name).is_file():
            found = adapter.validate_json((folder / name).read_text("utf-8"))
            # The demo keeps the seconds beside it.
            if isinstance(found, dict):
                found = TypeAdapter(Evaluation).validate_python(found["evaluation"])
            return found
    return None


def compare(runs: Sequence[RunCurve]) -> Comparison:
    """Group runs by configuration and compare the groups.

    Raises:
        ValueError: no runs, or two of the same name.
    """
    names = [run.name for run in runs]
    if not runs or len(set(names)) < len(names):
        raise ValueError(f"runs must be one or more with different names, got {names}")
    grouped: dict[Any, list[RunCurve]] = {}
    for run in runs:
        settings = tuple(
            (k, repr(v)) for k, v in sorted(run.config.items()) if k.split(".")[0] not in IGNORED
        )
        grouped.setdefault((settings, _problem_ids(run.evaluations[0])), []).append(run)
    members = list(grouped.values())
    configs = [group[0].config for group in members]
    groups = tuple(
        Group(label, tuple(group), {metric: mean_curve(group, metric) for metric in METRICS})
        for label, group in zip(labels(configs), members, strict=True)
    )
    return Comparison(
        groups=groups,
        finals=tuple(final(group) for group in groups),
        differences=tuple(
            difference
            for first, second in combinations(groups, 2)
            if (difference := paired_difference(first, second)) is not None
        ),
        settings={
            key: {g.label: c.get(key) for g, c in zip(groups, configs, strict=True)}
            for key in differing(configs)
        },
    )


def mean_curve(runs: Sequence[RunCurve], metric: Metric) -> tuple[Point, ...]:
    """Return the mean curve of runs on the same problems, at the steps that all of them have."""
    points = []
    for step in sorted(set.intersection(*(set(run.steps) for run in runs))):
        at = [run.evaluations[run.steps.index(step)] for run in runs]
        interval = mean_score(at, metric)
        value = sum(_value(evaluation, metric) for evaluation in at) / len(at)
        points.append(
            Point(
                step=step,
                rollouts=step * runs[0].rollouts_per_step,
                value=value,
                low=None if interval is None else interval.low,
                high=None if interval is None else interval.high,
            )
        )
    return tuple(points)


def run_curve(run: RunCurve, metric: Metric) -> tuple[Point, ...]:
    """Return the curve of one run."""
    return mean_curve([run], metric)


def mean_score(evaluations: Sequence[Evaluation], metric: Metric) -> Interval | None:
    """Return a metric's mean over seeds and problems; None without values of the problems."""
    scores = problem_scores(evaluations, metric)
    return None if scores is None else crossed_mean(scores, bounds=_BOUNDS[metric])


def problem_scores(evaluations: Sequence[Evaluation], metric: Metric) -> list[list[float]] | None:
    """Return [seeds, problems] values of a metric, or None when they were not recorded.

    Raises:
        ValueError: the evaluations are not of the same problems in the same order.
    """
    if len({_problem_ids(evaluation) for evaluation in evaluations}) > 1:
        raise ValueError(
            "evaluations must be of the same problems in the same order: "
            f"got {[len(e.problems) for e in evaluations]} problems that differ"
        )
    score = _SCORES[metric]
    rows = [[score(p, e.samples) for p in e.problems] for e in evaluations]
    known = [[value for value in row if value is not None] for row in rows]
    return known if known == rows else None


_SCORES: dict[Metric, Callable[[ProblemScore, int], float | None]] = {
    "avg_at_k": lambda problem, samples: problem.correct / samples,
    "maj_at_k": lambda problem, samples: float(problem.majority),
    "pass_at_k": lambda problem, samples: float(problem.correct > 0),
    "mean_tokens": lambda problem, samples: problem.mean_tokens,
}


# Between which a problem's score lies; lengths have no end.
_BOUNDS: dict[Metric, Bounds | None] = {
    "avg_at_k": SHARES,
    "maj_at_k": SHARES,
    "pass_at_k": SHARES,
    "mean_tokens": None,
}


def final(group: Group) -> Final:
    """Return what a group ends with: held out where all its runs have that, else the best step."""
    split, evaluations = _last(group)
    return Final(
        label=group.label,
        split=split,
        seeds=len(group.runs),
        problems=len(evaluations[0].problems),
        samples=evaluations[0].samples,
        mean_tokens=sum(e.mean_tokens for e in evaluations) / len(evaluations),
        metrics={metric: mean_score(evaluations, metric) for metric in METRICS},
    )


def paired_difference(first: Group, second: Group) -> Difference | None:
    """Return second - first on the same problems, or None where there are none."""
    for held_out in (True, False):
        a, b = (_measured(group, held_out=held_out) for group in (first, second))
        if a and b and _problem_ids(a[0]) == _problem_ids(b[0]):
            break
    else:
        return None
    metrics: dict[Metric, Interval | None] = {}
    for metric in METRICS:
        x, y = problem_scores(a, metric), problem_scores(b, metric)
        bounds = _BOUNDS[metric]
        metrics[metric] = crossed_difference(x, y, bounds=bounds) if x and y else None
    return Difference(first.label, second.label, a[0].split, metrics)


def _last(group: Group) -> tuple[str, list[Evaluation]]:
    evaluations = _measured(group, held_out=True) or _measured(group, held_out=False)
    return evaluations[0].split, evaluations


def _measured(group: Group, *, held_out: bool) -> list[Evaluation]:
    """One evaluation for each run, or none at all."""
    if not held_out:
        return [run.evaluations[run.best] for run in group.runs]
    found = [run.held_out for run in group.runs if run.held_out is not None]
    same = len({_problem_ids(evaluation) for evaluation in found}) == 1
    return found if same and len(found) == len(group.runs) else []


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as {"a.b": value}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values are not all the same, those of IGNORED left out."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return [
        key
        for key in keys
        if key.split(".")[0] not in IGNORED
        and any(config.get(key) != configs[0].get(key) for config in configs)
    ]


def labels(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a short name for each configuration: its method, and what tells it from the others."""
    names = [str(config.get("method.name", "?")) for config in configs]
    for key in differing(configs):
        if len(set(names)) == len(names):
            break
        if key == "method.name":
            continue
        parts = [f"{key.rsplit('.', 1)[-1]}={config.get(key)}" for config in configs]
        # Only where it tells apart what has the same name so far.
        told = {
            name: len({p for n, p in zip(names, parts, strict=True) if n == name}) > 1
            for name in names
        }
        names = [
            f"{name}, {part}" if told[name] else name
            for name, part in zip(names, parts, strict=True)
        ]
    return [
        name if names.count(name) == 1 else f"{name} ({names[:i].count(name) + 1})"
        for i, name in enumerate(names)
    ]


def _value(evaluation: Evaluation, metric: Metric) -> float:
    found = getattr(evaluation, metric)
    return float(found.value if isinstance(found, Interval) else found)


def _problem_ids(evaluation: Evaluation) -> tuple[str, ...]:
    return tuple(problem.problem_id for problem in evaluation.problems)
