"""What a run's folder holds so far; everything may be missing but the folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from selfdistill.analysis.localisation import Localisation, localise
from selfdistill.analysis.tokens import TokenAnalysis
from selfdistill.evaluation.intervals import Interval
from selfdistill.evaluation.scores import Evaluation
from selfdistill.runlog import JsonLines
from studies.arithmetic.demo.difference import avg_difference


@dataclass(frozen=True)
class HeldOutStage:
    """The test split, either before or after training.

    Attributes:
        evaluation: accuracy, or None when it was not measured yet.
        seconds: what measuring it took.
        attempts: the wrong attempts that were scored token by token.
        localisation: how the advantage lies around the first wrong step of these attempts.
    """

    evaluation: Evaluation | None
    seconds: float
    attempts: list[TokenAnalysis]
    localisation: Localisation | None

    def right_attempts(self, problem_id: str) -> int | None:
        """Return how many attempts at a problem were right, or None when it was not asked."""
        problems = self.evaluation.problems if self.evaluation else ()
        return next((p.correct for p in problems if p.problem_id == problem_id), None)


@dataclass(frozen=True)
class Run:
    """A run's files, read.

    Attributes:
        folder: where they lie.
        config_yaml, config: the configuration, as written and parsed; empty when there is none.
        before, after: the held-out problems.
        metrics: one record for each finished step.
        evaluations: one record for each evaluation on the dev split.
        summary: of a finished demo, else None.
    """

    folder: Path
    config_yaml: str
    config: dict[str, Any]
    before: HeldOutStage
    after: HeldOutStage
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any] | None

    @property
    def rise(self) -> Interval | None:
        """How much held-out Avg@k rose, paired by problem."""
        if self.before.evaluation is None or self.after.evaluation is None:
            return None
        return avg_difference(self.before.evaluation, self.after.evaluation)

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of working time of each phase; interruptions are left out."""
        total: dict[str, float] = {}
        # Later evaluations are phases of the step that they follow; the first has no step.
        for record in [*self.metrics, *self.evaluations[:1]]:
            for phase, seconds in record["seconds"].items():
                total[phase] = total.get(phase, 0.0) + seconds
        held_out = self.before.seconds + self.after.seconds
        return {**total, "held_out": held_out} if held_out else total

    @property
    def peak_rss_mib(self) -> float | None:
        """Highest resident memory of any process that worked on this run."""
        peaks = [line["peak_rss_mib"] for line in [*self.metrics, self.summary or {}] if line]
        return max(peaks, default=None)

    @property
    def token_counts(self) -> tuple[int, int]:
        """Tokens that student and teacher would have read without sharing prefixes, and did."""
        unshared = sum(line["unshared_tokens"] for line in self.metrics)
        return unshared, sum(line["packed_tokens"] for line in self.metrics)


def read_run(folder: Path) -> Run:
    """Read what a finished or interrupted run has left.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give the folder of a run")
    config = folder / "config.yaml"
    config_yaml = config.read_text("utf-8") if config.exists() else ""
    return Run(
        folder=folder,
        config_yaml=config_yaml,
        config=yaml.safe_load(config_yaml) or {},
        before=_read_stage(folder, "before"),
        after=_read_stage(folder, "after"),
        metrics=JsonLines(folder / "metrics.jsonl").read(),
        evaluations=JsonLines(folder / "evaluations.jsonl").read(),
        summary=_read_json(folder / "summary.json"),
    )


def _read_stage(folder: Path, name: str) -> HeldOutStage:
    held_out = _read_json(folder / f"held_out_{name}.json") or {}
    analysis = _read_json(folder / f"analysis_{name}.json") or {}
    attempts = TypeAdapter(list[TokenAnalysis]).validate_python(analysis.get("attempts", []))
    return HeldOutStage(
        evaluation=TypeAdapter(Evaluation | None).validate_python(held_out.get("evaluation")),
        seconds=held_out.get("seconds", 0.0),
        attempts=attempts,
        localisation=localise(attempts) if attempts else None,
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text("utf-8")) if path.exists() else None
