from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import ROOT, tiny_config

from selfdistill.config import Config, OptimizerConfig, StepAlignMethod
from selfdistill.errors import UserError
from selfdistill.evaluation.intervals import Interval
from selfdistill.prediction.forecast import Forecast, estimate_cost, grpo_forecast, predict
from selfdistill.prediction.law import read_laws
from selfdistill.prediction.probe import probe
from selfdistill.prediction.tables import cost_line, prediction_tables
from selfdistill.prediction.unseen import unseen_in_distillation, unseen_in_optimizer
from selfdistill.training.solver import load_solver


def shipped(tmp_path: Path, **changes: object) -> Config:
    return Config.model_validate(
        {
            "model": str(ROOT / "examples" / "arithmetic" / "solver"),
            "output_dir": tmp_path / "run",
            "device": "cpu",
            "task": {"name": "arithmetic"},
            "method": {"name": "stepalign", "group_size": 1},
            "rollout": {"max_new_tokens": 96},
            "optimizer": {"learning_rate": 3e-4},
            **changes,
        }
    )


def by_label(forecasts: tuple[Forecast, ...]) -> dict[str, Forecast]:
    return {forecast.label: forecast for forecast in forecasts}


def test_the_miniature_gets_a_forecast(tmp_path: Path) -> None:
    found = predict(shipped(tmp_path), methods="stepalign,refsol", attempts=128)
    forecasts = by_label(found.forecasts)
    assert list(forecasts) == ["stepalign", "refsol", "grpo"]
    for forecast in forecasts.values():
        assert forecast.outside == ()
        assert forecast.gain is not None
        assert forecast.gain.low < forecast.gain.value < forecast.gain.high
    # At eight rollouts a step: eight prompts with one each, or one group of eight.
    assert (forecasts["stepalign"].prompts, forecasts["stepalign"].group_size) == (8, 1)
    assert (forecasts["grpo"].prompts, forecasts["grpo"].group_size) == (1, 8)
    assert 0.25 < forecasts["stepalign"].gain.value < 0.75
    assert found.advice.method is not None
    assert found.advice.method in found.advice.reasons[0]
    assert json.loads(found.to_json())["forecasts"][0]["label"] == "stepalign"
    text = "\n".join(table.markdown() for table in prediction_tables(found))
    for phrase in ("| refsol | 8 x 1 | +", "share of \\|A\\| on the wrong step", "a miniature"):
        assert phrase in text
    assert "% of the training with its evaluations" in cost_line(found)
    assert not (tmp_path / "run").exists()


def test_what_was_never_seen_has_a_gap_and_no_forecast(solver_dir: Path, tmp_path: Path) -> None:
    config = tiny_config(solver_dir, tmp_path / "run")
    found = predict(config, attempts=8)
    assert all(forecast.gain is None for forecast in found.forecasts)
    assert all("this model" in forecast.outside for forecast in found.forecasts)
    assert found.advice.method is None  # random weights: nothing is right, nothing is better
    text = prediction_tables(found)[-1].note
    assert "They know nothing about " in text
    assert "; this model: where a gain is missing, the gap is what there is" in text
    assert "It says nothing about how many steps that takes" in text


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"teacher": {"name": "live"}}, ["method.teacher: live"]),
        ({"loss": {"objective": {"name": "jsd"}}}, ["method.loss.objective: jsd"]),
        ({"loss": {"advantage_mask": {"threshold": 0.1}}}, ["method.loss.advantage_mask"]),
        (
            {"loss": {"token_selection": {"rule": "entropy", "share": 0.2}}},
            ["method.loss.token_selection"],
        ),
        ({"loss": {"entry_clip": 0.05}}, ["method.loss.entry_clip: 0.05"]),
        ({"loss": {"divergence_clip": 0.05}}, ["method.loss.divergence_clip: 0.05"]),
        (
            {"loss": {"position_weight": {"name": "linear", "over": 50}}},
            ["method.loss.position_weight: linear"],
        ),
        ({"loss": {"top_k": {"k": 8}}}, ["method.loss.top_k"]),
        ({"loss": {"reduction": "sequence_mean"}}, ["method.loss.reduction: sequence_mean"]),
        ({"loss": {"temperature": 0.7}}, ["method.loss.temperature: 0.7"]),
        ({"reward": {}}, ["method.reward"]),
        ({"critic": {"name": "scribe", "error_rate": 0.2}}, ["method.critic.error_rate: 0.2"]),
        ({"critic": {"name": "scribe", "copying": "full_repetition"}}, []),
        ({}, []),
    ],
)
def test_settings_that_no_law_was_fitted_to_are_named(
    section: dict[str, Any], said: list[str]
) -> None:
    assert unseen_in_distillation(StepAlignMethod.model_validate(section)) == said


def test_settings_of_optimiser_and_rewards_are_compared_too() -> None:
    measured = OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_steps=0)
    assert unseen_in_optimizer(measured) == []
    changed = measured.model_copy(update={"weight_decay": 0.1, "betas": (0.9, 0.999)})
    assert unseen_in_optimizer(changed) == [
        "optimizer.betas: [0.9, 0.999]",
        "optimizer.weight_decay: 0.1",
    ]


def test_a_forecast_names_what_was_never_seen(solver_dir: Path, tmp_path: Path) -> None:
    mask = {"name": "refsol", "loss": {"advantage_mask": {"threshold": 0.1}}}
    changes = {"method": mask, "adapter": {"r": 2}, "optimizer": {"weight_decay": 0.1}}
    found = predict(tiny_config(solver_dir, tmp_path / "run", **changes), attempts=2)
    for phrase in ("adapters", "optimizer.weight_decay: 0.1"):
        assert all(phrase in forecast.outside for forecast in found.forecasts)
    assert "method.loss.advantage_mask" in found.forecasts[0].outside
    assert found.probe.contexts[0].masked is not None
    grpo = {"name": "grpo", "group_size": 2, "normalize_std": False}
    found = predict(tiny_config(solver_dir, tmp_path / "run", method=grpo), attempts=2)
    assert "method.normalize_std: false" in found.forecasts[0].outside


@pytest.mark.parametrize("name", ["contrast", "wrong_step"])
def test_a_method_that_no_law_covers_is_named(solver_dir: Path, tmp_path: Path, name: str) -> None:
    config = tiny_config(solver_dir, tmp_path / "run", method={"name": name, "group_size": 4})
    found = predict(config, attempts=2)
    own = by_label(found.forecasts)[name]
    assert (own.gain, own.outside) == (None, (f"the method {name}",))
    assert found.advice.method != name
    assert f"the method {name}" in prediction_tables(found)[-1].note


def test_a_budget_far_beyond_the_fitted_is_named(tmp_path: Path) -> None:
    found = predict(shipped(tmp_path, steps=5000), attempts=16)
    (text,) = found.forecasts[0].outside
    assert text.startswith("effort 5e+03 (fitted from ")


def test_the_fitted_range_is_judged_by_what_was_measured(tmp_path: Path, solver_dir: Path) -> None:
    """A wide interval that reaches into the range is no reason to forecast."""
    config = tiny_config(solver_dir, tmp_path / "run", method={"name": "grpo", "group_size": 8})
    strong = replace(probe(config, [], attempts=2), student=Interval(0.58, 0.3, 0.8))
    found = grpo_forecast(config, strong, read_laws(), load_solver(config))
    assert found is not None
    assert any(text.startswith("student 0.58 (fitted from ") for text in found.outside)


def test_a_teacher_that_disputes_right_steps_is_refused(tmp_path: Path) -> None:
    task = {"name": "arithmetic", "reference_order": "reversed"}
    method = {"name": "refsol", "group_size": 1}
    found = predict(shipped(tmp_path, task=task, method=method), attempts=32)
    refused = found.forecasts[0]
    assert refused.gain is None
    assert "a teacher that disputes right steps (refsol)" in refused.outside
    assert found.probe.contexts[0].gap.low > 0  # it is better than the student all the same
    assert found.advice.method != "refsol"


def test_grpo_alone_needs_no_teacher(solver_dir: Path, tmp_path: Path) -> None:
    config = tiny_config(solver_dir, tmp_path / "run", method={"name": "grpo", "group_size": 4})
    found = predict(config, attempts=8)
    assert list(by_label(found.forecasts)) == ["grpo"]
    assert found.forecasts[0].group_size == 4
    assert len(prediction_tables(found)) == 1
    assert cost_line(found).startswith("The probe took ")
    with pytest.raises(UserError, match="is not a method"):
        predict(config, methods="nothing", attempts=2)


def test_one_rollout_a_step_makes_no_group(solver_dir: Path, tmp_path: Path) -> None:
    config = tiny_config(solver_dir, tmp_path / "run", method={"name": "refsol", "group_size": 1})
    assert list(by_label(predict(config, attempts=2).forecasts)) == ["refsol"]


def test_the_cost_counts_steps_and_evaluations(solver_dir: Path, tmp_path: Path) -> None:
    config = tiny_config(solver_dir, tmp_path / "run", steps=5)  # 1 x 2 rollouts, evaluated thrice
    measured = replace(probe(config, [], attempts=2), tokens=10.0, sampling=1.0, scoring=0.5)
    cost = estimate_cost(config, measured)
    assert cost.step == pytest.approx(2 * 10 * (1.0 + 2 * 0.5))
    assert cost.training == pytest.approx(5 * cost.step + 4 * 2 * 1 * 10)
