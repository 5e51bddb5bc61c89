from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import ROOT

from selfdistill.runlog import JsonLines
from studies.arithmetic.predict.cells import best_so_far, own_cells, study_cells
from studies.arithmetic.predict.conditions import AFTERWARDS, MIDDLE, OWN, STUDY

RESULTS = ROOT / "docs" / "results" / "results.json"


def test_cells_of_the_study_are_those_of_its_page() -> None:
    cells = study_cells(RESULTS)
    gains = {(cell.condition.name, cell.steps): 100 * cell.gain for cell in cells}
    # docs/results: 34.1 % before; RefSol, rare wording, 8 x 1: 53.3 and 81.6 %.
    assert gains["refsol-5-8x1", 20] == pytest.approx(53.3 - 34.1, abs=0.1)
    assert gains["refsol-5-8x1", 50] == pytest.approx(81.6 - 34.1, abs=0.1)
    assert gains["omission-8x1", 50] == pytest.approx(0.0, abs=0.1)
    assert {cell.condition for cell in cells} == set(STUDY)
    with_teacher = [c for c in cells if c.condition.method["name"] != "grpo"]
    assert sum(not c.condition.kept_out for c in with_teacher) >= 24


def test_whole_conditions_are_kept_out() -> None:
    for condition in (*STUDY, *OWN, *AFTERWARDS):
        if (
            condition.stratum == MIDDLE
            or condition.dialect in (2, 4)
            or condition.order != "question"
        ):
            assert condition.kept_out, condition.name
    names = [condition.name for condition in (*STUDY, *OWN, *AFTERWARDS)]
    assert len(set(names)) == len(names)


def evaluation(step: int, correct: list[int]) -> dict[str, object]:
    return {"step": step, "samples": 10, "problems": [{"correct": c} for c in correct]}


def test_the_best_weights_are_chosen_by_other_problems(tmp_path: Path) -> None:
    # The even problems like step 10 best and the odd ones step 20; each choice is tried on the
    # others.
    lines = [
        evaluation(0, [1, 1, 1, 1]),
        evaluation(10, [9, 3, 9, 3]),
        evaluation(20, [5, 8, 5, 8]),
        evaluation(30, [10, 10, 10, 10]),
    ]
    assert best_so_far(lines, 20) == pytest.approx(((0.5 - 0.1) + (0.3 - 0.1)) / 2)
    assert best_so_far(lines, 30) == pytest.approx(0.9)
    assert best_so_far(lines, 0) == 0
    # Runs that are not finished have no cells.
    log = JsonLines(tmp_path / "runs" / OWN[0].name / "evaluations.jsonl")
    log.path.parent.mkdir(parents=True)
    for line in lines:
        log.append(line)
    assert own_cells(tmp_path) == []
    (log.path.parent / "done.json").write_text("{}")
    assert [cell.steps for cell in own_cells(tmp_path)] == [10, 20, 30]
