from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import tiny_config

from selfdistill.evaluation.intervals import Interval
from selfdistill.prediction.law import (
    distillation_gain,
    effort,
    forecast,
    forecast_distillation,
    forecast_grpo,
    grpo_gain,
    read_laws,
)


def of(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_the_effort_is_the_sum_of_the_rates(tmp_path: Path) -> None:
    def config(**optimizer: object) -> float:
        made = tiny_config(tmp_path, tmp_path, optimizer=optimizer, steps=10)
        return effort(made)

    assert config(learning_rate=3e-4, warmup_steps=0) == pytest.approx(10)
    assert config(learning_rate=3e-4, warmup_steps=4) == pytest.approx(0.25 + 0.5 + 0.75 + 7)
    assert config(learning_rate=1e-4, warmup_steps=0) == pytest.approx(10 / 3)
    falling = config(learning_rate=3e-4, warmup_steps=0, schedule="linear")
    assert falling == pytest.approx(sum(range(1, 11)) / 11)
    twice = tiny_config(
        tmp_path,
        tmp_path,
        updates_per_step=2,
        optimizer={"learning_rate": 3e-4, "warmup_steps": 0},
    )
    assert effort(twice, 5) == pytest.approx(10)


def test_a_student_comes_as_near_as_the_gap_allows() -> None:
    law = torch.tensor(read_laws().distillation.values, dtype=torch.float64)
    reached = float(law[0] + law[1] * 0.3)
    gains = [
        float(distillation_gain(law, of(0.5), of(0.3), of(0.5), of(e))) for e in (1, 10, 50, 1e4)
    ]
    assert gains == sorted(gains)
    assert gains[-1] == pytest.approx(0.5 * reached)
    # What lies elsewhere than on the error has to be learned, too.
    slow = distillation_gain(law, of(0.5), of(0.3), of(0.9), of(10.0))
    assert float(slow) < gains[1]


def test_grpo_gains_more_from_more_groups_up_to_all_that_is_wrong() -> None:
    law = torch.tensor(read_laws().grpo.values, dtype=torch.float64)
    few, many, end = (
        float(grpo_gain(law, of(0.4), of(groups), of(spent)))
        for groups, spent in ((1.0, 30.0), (8.0, 30.0), (8.0, 1e6))
    )
    assert 0 < few < many < end
    assert end == pytest.approx(0.6, abs=1e-3)


def test_an_interval_holds_what_is_unknown() -> None:
    fitted = read_laws().distillation
    gap = Interval(0.5, 0.4, 0.6)
    known = (Interval(0.35, 0.3, 0.4), 0.5, 45.0)
    found = forecast(distillation_gain, fitted, gap, *known)
    assert found.low < found.value < found.high
    assert found == forecast(distillation_gain, fitted, gap, *known)
    vague = forecast(distillation_gain, fitted, Interval(0.5, 0.1, 0.9), *known)
    assert vague.high - vague.low > found.high - found.low
    # Without doubt about probe and coefficients, what the law leaves is left.
    sure = replace(fitted, resampled=(fitted.values,), residuals=(-0.1, 0.0, 0.1))
    exact = forecast(distillation_gain, sure, 0.5, 0.35, 0.5, 45.0)
    assert exact.high - exact.low == pytest.approx(0.2)


def test_the_numbers_of_the_package_are_whole() -> None:
    laws = read_laws()
    assert laws.command == "python -m studies.arithmetic.predict"
    for fitted, least in ((laws.distillation, 24), (laws.grpo, 12)):
        assert fitted.cells >= least
        assert len(fitted.residuals) == fitted.cells
        assert {len(row) for row in fitted.resampled} == {len(fitted.values), len(fitted.names)}


def test_no_forecast_goes_beyond_the_gap_or_beyond_all_right() -> None:
    laws = read_laws()
    strong = Interval(0.578, 0.55, 0.6)
    # The law alone has more of the gap than there is: 0.81 + 0.40 * 0.578 > 1.
    coefficients = torch.tensor(laws.distillation.values, dtype=torch.float64)
    assert distillation_gain(coefficients, of(0.391), of(0.578), of(0.3), of(1e4)) > 0.391
    found = forecast_distillation(laws.distillation, Interval(0.391, 0.37, 0.41), strong, 0.3, 1e4)
    assert found.value == pytest.approx(0.391)
    assert found.high <= 1 - strong.value
    grpo = forecast_grpo(laws.grpo, strong, 8.0, 1e4)
    assert grpo.value <= grpo.high <= 1 - strong.value


def test_the_coefficients_are_in_doubt_too() -> None:
    for law, fitted, known in (
        (distillation_gain, read_laws().distillation, (0.5, 0.35, 0.5, 10.0)),
        (grpo_gain, read_laws().grpo, (0.35, 8.0, 10.0)),
    ):
        found = forecast(law, replace(fitted, residuals=(0.0,)), *known)
        assert found.low < found.value < found.high
