"""Trackers get what the logs get; here one that needs no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tiny_runs import lines

from selfdistill.config import Config, ConfigError
from selfdistill.training.loop import train
from selfdistill.training.trackers import TrackerError


class Notebook(GeneralTracker):
    """Keeps what it is told."""

    name = "notebook"
    requires_logging_directory = True
    kept: dict[str, Any]

    def __init__(self, run_name: str, logging_dir: Path, *, broken: bool = False) -> None:
        super().__init__(_blank=True)
        if broken:
            raise ValueError("no network")
        type(self).kept = {"run": run_name, "dir": logging_dir, "logged": [], "finished": False}

    @property
    def tracker(self) -> dict[str, Any]:
        return self.kept

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.kept["config"] = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.kept["logged"].append((step, values))

    def finish(self) -> None:
        self.kept["finished"] = True


def make_config(solver_dir: Path, output_dir: Path, tracker: dict[str, Any]) -> Config:
    return Config.model_validate(
        {
            "model": str(solver_dir),
            "output_dir": output_dir,
            "device": "cpu",
            "task": {"step_counts": [1]},
            "method": {"name": "refsol", "group_size": 2},
            "steps": 2,
            "prompts_per_step": 1,
            "rollout": {"max_new_tokens": 4},
            "evaluation": {"every": 2, "problems": 2, "samples": 1},
            "trackers": [tracker],
        }
    )


def test_a_tracker_gets_every_figure(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What accelerate's register_tracker_class does, and undone behind the test.
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    run = tmp_path / "run"
    train(make_config(solver_dir, run, {"name": "notebook", "project": "mine"}))
    kept = Notebook.kept
    assert (kept["run"], kept["dir"], kept["finished"]) == ("mine", run / "notebook", True)
    assert kept["config"]["rollout.max_new_tokens"] == 4
    assert all(isinstance(v, (bool, int, float, str)) for v in kept["config"].values())
    steps = [(step, values) for step, values in kept["logged"] if "train/loss" in values]
    metrics = lines(run, "metrics.jsonl")
    assert [(step, values["train/loss"]) for step, values in steps] == [
        (line["step"], line["loss"]) for line in metrics
    ]
    assert "train/seconds/rollout" in steps[0][1]
    values = [values["dev/avg_at_k"] for _, values in kept["logged"] if "dev/avg_at_k" in values]
    assert values == [line["avg_at_k"]["value"] for line in lines(run, "evaluations.jsonl")]


def test_a_tracker_that_is_not_there_or_does_not_start_is_named(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    with pytest.raises(ConfigError, match=r"there is no 'paper', expected .* tensorboard"):
        train(make_config(solver_dir, tmp_path / "a", {"name": "paper"}))
    options = {"name": "notebook", "options": {"broken": True}}
    with pytest.raises(TrackerError, match=r"notebook does not start \(ValueError: no network"):
        train(make_config(solver_dir, tmp_path / "b", options))
