"""What the finished jobs say, as numbers: no sentence is written here.

All intervals are 95 % bootstrap intervals that resample problems and training seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from selfdistill.analysis.comparison import (
    METRICS,
    Metric,
    mean_curve,
    mean_score,
    problem_scores,
    read_run_curve,
)
from selfdistill.errors import UserError
from selfdistill.evaluation.intervals import Interval
from selfdistill.evaluation.resampling import crossed_difference
from selfdistill.evaluation.scores import Evaluation
from selfdistill.runlog import JsonLines
from selfdistill.tasks.arithmetic.corpus import DIALECT_SHARES
from studies.arithmetic.reproduce.arms import (
    ARMS,
    COPYING,
    MAIN_ARMS,
    RARE_DIALECT,
    SIDE_ARMS,
    USUAL_DIALECT,
    Arm,
    Scale,
    copying_arm,
    dialect_arm,
)
from studies.arithmetic.reproduce.job_list import folder_of, rate_names
from studies.arithmetic.reproduce.jobs import (
    Result,
    TokenFigures,
    chosen_rate,
    read_figures,
    read_held_out,
    read_result,
    read_with_context,
)


@dataclass(frozen=True)
class Rates:
    """How the learning rate of an arm was chosen.

    Attributes:
        label: of the arm.
        dev: the best dev Avg@k of each learning rate; None for a run that diverged.
        chosen: the rate with the best of them.
        at_edge: True when that is the lowest or the highest that was tried.
    """

    label: str
    dev: dict[float, float | None]
    chosen: float
    at_edge: bool


@dataclass(frozen=True)
class Row:
    """An arm on test problems after some training, over its seeds.

    Attributes:
        label: of the arm.
        steps: of training; 0 for the solver before it.
        seeds: how many runs.
        metrics: Avg@k, Maj@k, Pass@k and the mean tokens of an answer.
        strict: Avg@k, demanding that every step is right.
        per_seed: Avg@k of each run.
        learning_rate: None for the solver before training.
        best_steps: the step of each run whose weights were kept.
        diverged: how many runs did.
    """

    label: str
    steps: int
    seeds: int
    metrics: dict[Metric, Interval | None]
    strict: float
    per_seed: list[float]
    learning_rate: float | None
    best_steps: list[int]
    diverged: int

    @property
    def avg(self) -> Interval:
        """Avg@k, which every row has."""
        interval = self.metrics["avg_at_k"]
        assert interval is not None
        return interval


def row_of(rows: Sequence[Row], label: str, steps: int) -> Row:
    """Return the row of an arm after so many steps."""
    return next(row for row in rows if (row.label, row.steps) == (label, steps))


@dataclass(frozen=True)
class Gap:
    """Avg@k of `second` minus that of `first`, both after so many steps, paired by problem."""

    first: str
    second: str
    steps: int
    difference: Interval


@dataclass(frozen=True)
class CurvePoint:
    """Dev Avg@k after some steps, mean over seeds."""

    step: int
    avg: Interval


@dataclass(frozen=True)
class Main:
    """The table: the solver, its teacher, an arm a row at each milestone; gaps; dev curves."""

    base: Row
    teacher: Row
    rows: list[Row]
    gaps: list[Gap]
    curves: dict[str, list[CurvePoint]]


@dataclass(frozen=True)
class Copying:
    """The ways of copying: figures by token, and what training with each leads to."""

    tokens: dict[str, TokenFigures]
    rows: list[Row]


@dataclass(frozen=True)
class Stratum:
    """Problems of one predicted base success.

    Attributes:
        predicted: range of the predicted success.
        base: the solver before training.
        teacher: the same with a critique of its attempt: what StepAlignFB's fixed teacher can do.
        rows: the arms.
        gaps: of the arms to each other.
    """

    predicted: tuple[float, float]
    base: Row
    teacher: Row
    rows: list[Row]
    gaps: list[Gap]


@dataclass(frozen=True)
class Dose:
    """RefSol with references in one dialect.

    Attributes:
        dialect: its index.
        share: how often the solver writes it of its own accord.
        rows: after training with one rollout a prompt, one for each milestone.
        tokens: the advantage under such a reference.
    """

    dialect: int
    share: float
    rows: list[Row]
    tokens: TokenFigures


@dataclass(frozen=True)
class Findings:
    """Everything; a study that is not finished is None.

    Attributes:
        rates, main, copying, difficulty, wording: the studies.
        jobs: how many are finished.
        seconds: their working time, summed over the workers.
    """

    rates: list[Rates]
    main: Main | None
    copying: Copying | None
    difficulty: list[Stratum] | None
    wording: list[Dose] | None
    jobs: int
    seconds: float


class NotFinishedError(UserError):
    """A job whose numbers are wanted has not run."""


def collect(output: Path, scale: Scale) -> Findings:
    """Read what is there; a study counts as a whole or not at all."""
    reader = _Reader(output, scale)
    results = [TypeAdapter(Result).validate_json(p.read_bytes()) for p in _result_files(output)]
    return Findings(
        rates=reader.rates(),
        main=_if_finished(reader.main),
        copying=_if_finished(reader.copying),
        difficulty=_if_finished(reader.difficulty),
        wording=_if_finished(reader.wording),
        jobs=len(results),
        seconds=sum(result.seconds for result in results),
    )


T = TypeVar("T")


def _if_finished(study: Callable[[], T]) -> T | None:
    try:
        return study()
    except NotFinishedError:
        return None


def _result_files(output: Path) -> list[Path]:
    return sorted(output.glob("*/**/result.json"))


class _Reader:
    def __init__(self, output: Path, scale: Scale) -> None:
        self.output = output
        self.scale = scale

    def rates(self) -> list[Rates]:
        """Return the choice of each arm whose candidates are all there."""
        found = []
        for arm in MAIN_ARMS:
            results = [read_result(self.output, name) for name in rate_names(arm, self.scale)]
            if None not in results:
                found.append(self._rates(arm))
        return found

    def _rates(self, arm: Arm) -> Rates:
        names = rate_names(arm, self.scale)
        dev: dict[float, float | None] = {}
        for rate, name in zip(self.scale.rates, names, strict=True):
            result = self._finished(name)
            dev[rate] = None if result.diverged else result.best_metric
        chosen = chosen_rate(names, self.output)
        return Rates(arm.label, dev, chosen, chosen in (self.scale.rates[0], self.scale.rates[-1]))

    def main(self) -> Main:
        """Return the main table."""
        seeds = self.scale.seeds
        folders = {arm.label: folder_of("main", arm.key) for arm in MAIN_ARMS}
        return Main(
            base=self._base("main/base"),
            teacher=self._teacher("main/base"),
            rows=self._rows(folders, seeds),
            gaps=self._gaps(folders, seeds),
            curves={label: self._curve(folder, seeds) for label, folder in folders.items()},
        )

    def copying(self) -> Copying:
        """Return the ways of copying; partial repetition is the main table's StepAlignFB."""
        main = folder_of("main", ARMS["stepalign-8x1"].key)
        others = {
            label: folder_of("copy", copying_arm(name).key)
            for name, label in COPYING.items()
            if name != "partial_repetition"
        }
        return Copying(
            tokens=self._tokens("copy/tokens"),
            rows=[
                *self._rows({COPYING["partial_repetition"]: main}, self.scale.seeds),
                *self._rows(others, self.scale.side_seeds),
            ],
        )

    def difficulty(self) -> list[Stratum]:
        """Return the strata, the hardest first."""
        seeds = self.scale.side_seeds
        strata = []
        for stratum in self.scale.strata:
            folders = {
                arm.label: folder_of("difficulty", arm.key, stratum=stratum) for arm in SIDE_ARMS
            }
            strata.append(
                Stratum(
                    predicted=stratum,
                    base=self._base(folder_of("difficulty", "base", stratum=stratum)),
                    teacher=self._teacher(folder_of("difficulty", "base", stratum=stratum)),
                    rows=self._rows(folders, seeds),
                    gaps=self._gaps(folders, seeds),
                )
            )
        return strata

    def wording(self) -> list[Dose]:
        """Return RefSol by dialect; the ends of the axis are rows of the main table."""
        tokens = self._tokens("wording/tokens")
        ends = {USUAL_DIALECT: ARMS["refsol-8x1"], RARE_DIALECT: ARMS["refsol-rare-8x1"]}
        doses = []
        for dialect in sorted({*ends, *self.scale.dialects}):
            if dialect in ends:
                folder, seeds = folder_of("main", ends[dialect].key), self.scale.seeds
            else:
                folder = folder_of("wording", dialect_arm(dialect).key)
                seeds = self.scale.wording_seeds
            rows = self._rows({dialect_arm(dialect).label: folder}, seeds)
            doses.append(Dose(dialect, DIALECT_SHARES[dialect], rows, tokens[f"dialect {dialect}"]))
        return doses

    def _finished(self, name: str) -> Result:
        result = read_result(self.output, name)
        if result is None:
            raise NotFinishedError(name)
        return result

    def _tokens(self, name: str) -> dict[str, TokenFigures]:
        self._finished(name)
        return read_figures(self.output, name)

    def _base(self, name: str) -> Row:
        self._finished(name)
        return _make_row("before training", 0, [read_held_out(self.output / name)], [], [])

    def _teacher(self, name: str) -> Row:
        self._finished(name)
        label = "before training, with a critique"
        return _make_row(label, 0, [read_with_context(self.output / name)], [], [])

    def _rows(self, folders: dict[str, str], seeds: Sequence[int]) -> list[Row]:
        """Return a row for each folder and milestone."""
        rows = []
        for label, folder in folders.items():
            names = [f"{folder}/seed-{seed}" for seed in seeds]
            results = [self._finished(name) for name in names]
            for steps in self.scale.milestones:
                best = [self._best_step(name, steps) for name in names]
                rows.append(_make_row(label, steps, self._held_out(names, steps), results, best))
        return rows

    def _held_out(self, names: Sequence[str], steps: int) -> list[Evaluation]:
        step = None if steps == self.scale.milestones[-1] else steps
        return [read_held_out(self.output / name, step=step) for name in names]

    def _best_step(self, name: str, until: int) -> int:
        lines = JsonLines(self.output / name / "evaluations.jsonl").read()
        best = max(
            (line for line in lines if line["step"] <= until),
            key=lambda line: line["avg_at_k"]["value"],
        )
        return int(best["step"])

    def _gaps(self, folders: dict[str, str], seeds: Sequence[int]) -> list[Gap]:
        gaps = []
        for steps in self.scale.milestones:
            scores = {
                label: problem_scores(
                    self._held_out([f"{folder}/seed-{seed}" for seed in seeds], steps), "avg_at_k"
                )
                for label, folder in folders.items()
            }
            gaps += [
                Gap(first, second, steps, crossed_difference(a, b))
                for (first, a), (second, b) in combinations(scores.items(), 2)
                if a is not None and b is not None
            ]
        return gaps

    def _curve(self, folder: str, seeds: Sequence[int]) -> list[CurvePoint]:
        runs = [read_run_curve(self.output / folder / f"seed-{seed}") for seed in seeds]
        return [
            CurvePoint(point.step, Interval(point.value, point.low, point.high))
            for point in mean_curve(runs, "avg_at_k")
            if point.low is not None and point.high is not None
        ]


def _make_row(
    label: str,
    steps: int,
    held_out: Sequence[Evaluation],
    results: Sequence[Result],
    best_steps: list[int],
) -> Row:
    return Row(
        label=label,
        steps=steps,
        seeds=len(results),
        metrics={metric: mean_score(held_out, metric) for metric in METRICS},
        strict=sum(e.strict_avg_at_k.value for e in held_out) / len(held_out),
        per_seed=[e.avg_at_k.value for e in held_out] if results else [],
        learning_rate=results[0].learning_rate if results else None,
        best_steps=best_steps,
        diverged=sum(result.diverged is not None for result in results),
    )
