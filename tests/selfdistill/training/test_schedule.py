from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import assert_same_run, lines, tiny_config
from transformers import get_scheduler

import selfdistill.training.loop
from selfdistill.config import Config, ConfigError, load_config
from selfdistill.training.checkpoint import CheckpointError
from selfdistill.training.held_out import evaluate
from selfdistill.training.loop import train, warm_up
from selfdistill.training.schedule import learning_rates


def run_of(**changes: Any) -> Config:
    optimizer = {"learning_rate": 0.5, "warmup_steps": 3, **changes}
    return Config.model_validate(
        {"model": "m", "output_dir": "o", "steps": 10, "optimizer": optimizer}
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("cosine_with_restarts", {"num_cycles": 2}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("polynomial", {"power": 2.0}),
        ("inverse_sqrt", {}),
        ("warmup_stable_decay", {"num_decay_steps": 4}),
    ],
)
def test_rates_are_those_of_transformers(name: str, options: dict[str, Any]) -> None:
    rates = learning_rates(run_of(schedule=name, schedule_options=options))
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    schedule = get_scheduler(name, optimizer, 3, 11, scheduler_specific_kwargs=options)
    expected = []
    for _ in range(10):
        optimizer.step()
        schedule.step()
        expected += schedule.get_last_lr()
    assert [rates(step) for step in range(1, 11)] == expected
    assert min(expected) > 0
    assert len({*expected}) > 3


def test_a_constant_rate_has_a_warm_up_and_options_are_checked() -> None:
    rates = warm_up(run_of().optimizer)
    assert [rates(step) for step in (1, 2, 3, 10)] == [0.5 / 3, 1 / 3, 0.5, 0.5]
    for name, options in [("linear", {"power": 2}), ("warmup_stable_decay", {})]:
        with pytest.raises(ConfigError, match=rf"schedule {name} of transformers does not take"):
            learning_rates(run_of(schedule=name, schedule_options=options))


def test_a_rate_as_people_write_it_is_a_number(tmp_path: Path) -> None:
    """YAML 1.1 takes 1e-1 for a text where no type says otherwise."""
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: m\noutput_dir: o\nmethod: {name: environment}\nsteps: 10\noptimizer:\n"
        "  {schedule: cosine_with_min_lr, schedule_options: {min_lr_rate: 1e-1}, warmup_steps: 0}\n"
    )
    config = load_config(file)
    assert config.optimizer.schedule_options == {"min_lr_rate": 0.1}
    # The schedule is one step longer than the run.
    at_the_end = learning_rates(config)(10) / config.optimizer.learning_rate
    assert 0.1 <= at_the_end <= 0.13


def make_config(solver_dir: Path, output_dir: Path, **changes: Any) -> Config:
    settings = {
        "steps": 6,
        "optimizer": {"schedule": "cosine", "warmup_steps": 1, "learning_rate": 1e-3},
        "evaluation": {"every": 1, "problems": 2, "samples": 1, "patience": 3},
    }
    return tiny_config(solver_dir, output_dir, **settings | changes)


def test_a_stopped_run_goes_on_bit_for_bit_with_a_schedule_until_patience_ends(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = (make_config(solver_dir, tmp_path / name) for name in ("whole", "parts"))
    # A random model solves nothing: every evaluation is as good as the one before training.
    result = train(whole)
    assert (result.step, result.interrupted, result.best_step) == (3, False, 0)
    rates = [line["learning_rate"] for line in lines(tmp_path / "whole", "metrics.jsonl")]
    expected = learning_rates(whole)
    assert rates == [expected(step) for step in (1, 2, 3)]

    stops: list[int] = []

    def interrupted(*args: Any, **options: Any) -> Any:
        state = evaluate(*args, **options)
        if args[2].step in stops:
            options["interrupt"].requested = True
        return state

    monkeypatch.setattr(selfdistill.training.loop, "evaluate", interrupted)
    for stops[:] in ([1], [2]):
        assert train(parts, resume=True).interrupted
    stops.clear()
    ended = train(parts, resume=True)
    assert (ended.step, ended.interrupted) == (3, False)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    # It has come to its end, and with other rates it would be another run.
    assert train(parts, resume=True) == ended
    with pytest.raises(CheckpointError, match="another configuration: steps"):
        train(make_config(solver_dir, tmp_path / "parts", steps=8), resume=True)


def test_a_schedule_that_never_ends_lets_a_run_have_more_steps(
    solver_dir: Path, tmp_path: Path
) -> None:
    optimizer = {"schedule": "inverse_sqrt", "warmup_steps": 1, "learning_rate": 1e-3}
    settings: dict[str, Any] = {
        "optimizer": optimizer,
        "evaluation": {"every": 9, "problems": 2, "samples": 1},
    }
    train(make_config(solver_dir, tmp_path / "whole", steps=3, **settings))
    train(make_config(solver_dir, tmp_path / "more", steps=2, **settings))
    train(make_config(solver_dir, tmp_path / "more", steps=3, **settings), resume=True)
    whole, more = (lines(tmp_path / name, "metrics.jsonl") for name in ("whole", "more"))
    assert whole == more
    assert len({line["learning_rate"] for line in whole}) == 3


def test_checkpoints_are_kept_as_asked(solver_dir: Path, tmp_path: Path) -> None:
    for keep, names in [(1, [0, 4]), (3, [0, 2, 3, 4]), ("all", [0, 1, 2, 3, 4])]:
        run = tmp_path / str(keep)
        train(
            make_config(
                solver_dir,
                run,
                steps=4,
                checkpoint={"keep": keep},
                evaluation={"every": 9, "problems": 2, "samples": 1},
            )
        )
        saved = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
        assert saved == [f"step-{step:06d}" for step in names]
