"""Gains that were measured: those of docs/results, and those of this study's own runs.

A gain is the Avg@k of the best weights so far, minus that before training. docs/results measured
it on test problems after 20 and 50 steps, of weights that dev problems chose, and has dev curves
of its main table, from which the cells after 10 and 30 steps come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from selfdistill.json_text import parse_json
from selfdistill.runlog import JsonLines
from studies.arithmetic.predict.conditions import (
    AFTERWARDS,
    EASY,
    HARD,
    MIDDLE,
    MILESTONES,
    OWN,
    STUDY,
    Condition,
)
from studies.arithmetic.predict.measure import is_trained
from studies.arithmetic.reproduce.arms import COPYING, RARE_DIALECT

# As docs/results orders its strata.
_STRATA = (HARD, MIDDLE, EASY)


@dataclass(frozen=True)
class Cell:
    """What a condition gained.

    Attributes:
        condition: how it was trained.
        steps: of training.
        before: share of right answers before training, of the problems that the gain is of.
        gain: as a share: 0.5 is 50 points.
    """

    condition: Condition
    steps: int
    before: float
    gain: float


def study_cells(results: Path) -> list[Cell]:
    """Return the cells of docs/results/results.json.

    Raises:
        OSError: there is no such file.
    """
    found = parse_json(results.read_bytes())
    return [cell for condition in STUDY for cell in _study_cells(found, condition)]


def own_cells(output: Path) -> list[Cell]:
    """Return the cells of the runs of this study that are finished."""
    cells = []
    for condition in filter(partial(is_trained, output), (*OWN, *AFTERWARDS)):
        evaluations = JsonLines(output / "runs" / condition.name / "evaluations.jsonl").read()
        steps = {line["step"] for line in evaluations}
        before = (_avg(evaluations[0], 0) + _avg(evaluations[0], 1)) / 2
        cells += [
            Cell(condition, step, before, best_so_far(evaluations, step))
            for step in MILESTONES
            if step in steps
        ]
    return cells


def best_so_far(evaluations: Sequence[dict[str, Any]], steps: int) -> float:
    """Return the gain of the best weights up to a step, which other problems chose.

    Each half of the problems chooses for the other one: the highest of several figures of one
    half would be too high.
    """
    chances = [line for line in evaluations if line["step"] <= steps]
    halves = [[_avg(line, half) for line in chances] for half in (0, 1)]
    best = [max(range(len(chances)), key=half.__getitem__) for half in halves]
    return sum(half[best[1 - i]] - half[0] for i, half in enumerate(halves)) / 2


def _avg(evaluation: dict[str, Any], half: int) -> float:
    problems = evaluation["problems"][half::2]
    return sum(p["correct"] for p in problems) / (len(problems) * evaluation["samples"])


def _study_cells(found: dict[str, Any], condition: Condition) -> list[Cell]:
    label = _label(condition)
    if condition.stratum is not None:
        part = found["difficulty"][_STRATA.index(condition.stratum)]
    elif condition.method.get("critic"):
        part = found["copying"]
    elif label.startswith("RefSol, dialect"):
        part = found["wording"][condition.dialect]
    else:
        part = found["main"]
    before = part.get("base", found["main"]["base"])
    cells = [
        Cell(condition, row["steps"], _value(before), _value(row) - _value(before))
        for row in part["rows"]
        if row["label"] == label
    ]
    if part is found["main"]:
        curve = {point["step"]: point["avg"]["value"] for point in part["curves"][label]}
        for steps in set(MILESTONES) - {cell.steps for cell in cells}:
            best = max(value for step, value in curve.items() if step <= steps)
            cells.append(Cell(condition, steps, curve[0], best - curve[0]))
    return sorted(cells, key=lambda cell: cell.steps)


def _value(row: dict[str, Any]) -> float:
    return float(row["metrics"]["avg_at_k"]["value"])


def _label(condition: Condition) -> str:
    shape = f"{condition.shape[0]} x {condition.shape[1]}"
    if condition.method["name"] == "grpo":
        return f"GRPO, {shape}"
    if copying := condition.method.get("critic", {}).get("copying"):
        return COPYING[copying]
    if condition.method["name"] == "stepalign":
        return f"StepAlignFB, {shape}"
    if condition.dialect in (0, RARE_DIALECT):
        wording = "rare" if condition.dialect else "usual"
        return f"RefSol, {wording} wording, {shape}"
    return f"RefSol, dialect {condition.dialect}"
