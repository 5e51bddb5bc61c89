"""Trackers get what the logs get; here tensorboard, and stand-ins that need no network."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from rich.console import Console
from tiny_runs import lines, tiny_config

from selfdistill.config import Config, ConfigError
from selfdistill.training.divergence import DivergedError
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


class Offline(Notebook):
    """Starts, and then finds no network."""

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        raise ConnectionError("no network to log to")

    def finish(self) -> None:
        raise ConnectionError("nobody to say goodbye to")


def make_config(solver_dir: Path, output_dir: Path, *trackers: dict[str, Any]) -> Config:
    return tiny_config(solver_dir, output_dir, trackers=trackers)


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


def test_tensorboard_reads_back_every_figure(solver_dir: Path, tmp_path: Path) -> None:
    reason = "needs tensorboard, which requirements.txt has: pip install tensorboard"
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason=reason
    )
    run = tmp_path / "run"
    # A run that goes on writes on.
    for steps in (2, 3):
        config = tiny_config(
            solver_dir, run, steps=steps, trackers=[{"name": "tensorboard", "project": "mine"}]
        )
        train(config, resume=True)
    events = accumulator.EventAccumulator(str(run / "tensorboard" / "mine"))
    events.Reload()
    told = {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }
    metrics, evaluations = lines(run, "metrics.jsonl"), lines(run, "evaluations.jsonl")
    assert [line["step"] for line in evaluations] == [0, 2, 3]
    for name in ("loss", "reward", "grad_norm", "learning_rate", "tokens"):
        # An event is a float32.
        assert told[f"train/{name}"] == pytest.approx(
            {line["step"]: line[name] for line in metrics}, rel=1e-6
        )
    assert told["dev/mean_tokens"] == pytest.approx(
        {line["step"]: line["mean_tokens"] for line in evaluations}, rel=1e-6
    )
    assert told["train/contexts/reference"] == {1: 2, 2: 2, 3: 2}
    (noted, _) = sorted((run / "tensorboard" / "mine").rglob("hparams.yml"))
    assert yaml.safe_load(noted.read_text())["rollout.max_new_tokens"] == 4


def test_a_tracker_that_is_not_there_or_does_not_start_is_named(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    with pytest.raises(ConfigError, match=r"there is no 'paper', expected .* tensorboard"):
        train(make_config(solver_dir, tmp_path / "a", {"name": "paper"}))
    options = {"name": "notebook", "options": {"broken": True}}
    with pytest.raises(TrackerError, match=r"notebook does not start \(ValueError: no network"):
        train(make_config(solver_dir, tmp_path / "b", options))


def test_a_tracker_that_fails_ends_no_run(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "offline", Offline)
    written = StringIO()
    console = Console(file=written, width=60)
    trackers = [{"name": "notebook"}, {"name": "offline"}]
    result = train(make_config(solver_dir, tmp_path / "a", *trackers), console=console)
    assert result.step == 2
    assert len(lines(tmp_path / "a", "metrics.jsonl")) == 2
    said = written.getvalue()
    assert said.count("the tracker offline failed at log (ConnectionError: no network") == 1
    assert said.count("the tracker offline failed at finish (ConnectionError: nobody") == 1
    assert Notebook.kept["finished"]
    assert len([1 for _, values in Notebook.kept["logged"] if "train/loss" in values]) == 2

    # What ends a run itself is not hidden behind a tracker that does not end.
    def diverge(*args: object) -> None:
        raise DivergedError("the run's own error")

    monkeypatch.setattr("selfdistill.training.loop.refuse_divergence", diverge)
    with pytest.raises(DivergedError, match="the run's own error"):
        train(make_config(solver_dir, tmp_path / "b", *trackers), console=console)
    assert Notebook.kept["finished"]
