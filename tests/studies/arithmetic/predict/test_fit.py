from __future__ import annotations

import pytest
import torch

from selfdistill.prediction.law import distillation_gain
from studies.arithmetic.predict import fit as fitting
from studies.arithmetic.predict.fit import Observed, fit, least_errors, predict, r_squared

TRUE = (0.9, 0.2, 3.0, 1.5, 0.3)
START = (1.0, 0.0, 2.5, 1.0, 0.1)


def cells(*, spoiled: bool = False) -> list[Observed]:
    found = []
    law = torch.tensor(TRUE, dtype=torch.float64)
    for i, (gap, student, elsewhere) in enumerate(
        [(0.5, 0.4, 0.2), (0.5, 0.3, 0.7), (0.7, 0.1, 0.4), (0.1, 0.4, 0.5), (0.6, 0.2, 0.9)]
    ):
        for spent in (5.0, 15.0, 25.0, 45.0):
            known = (gap, student, elsewhere, spent)
            given = [torch.tensor(k, dtype=torch.float64) for k in known]
            gain = float(distillation_gain(law, *given))
            found.append(Observed(f"c{i}", int(spent), 0.0 if spoiled and i == 4 else gain, known))
    return found


def test_the_coefficients_behind_cells_are_found() -> None:
    found = least_errors(distillation_gain, cells(), START)
    assert found == pytest.approx(TRUE, abs=0.05)
    # One context that follows no law bends the others less than its errors are large.
    bent = least_errors(distillation_gain, cells(spoiled=True), START)
    errors = [abs(predict(distillation_gain, bent, c) - c.gain) for c in cells()[:16]]
    assert sorted(errors)[8] < 0.05


def test_a_fit_knows_its_doubt_and_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "RESAMPLES", 3)
    names, known = ("a", "b", "c", "d", "e"), ("gap", "student", "elsewhere", "effort")
    found = fit(distillation_gain, cells(), names=names, known=known, start=START)
    assert (found.cells, found.conditions) == (20, 5)
    assert found.ranges["gap"] == (0.1, 0.7)
    assert found.ranges["effort"] == (5.0, 45.0)
    assert len(found.resampled) == 3
    # Cells are forecast without their own condition: here that changes little.
    assert max(map(abs, found.residuals)) < 0.05
    spoiled = fit(distillation_gain, cells(spoiled=True), names=names, known=known, start=START)
    assert min(spoiled.residuals) < -0.3


def test_r_squared() -> None:
    assert r_squared([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1
    assert r_squared([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]) == 0
    assert r_squared([1.0, 2.0], [2.0, 1.0]) == -3
