"""A teacher that is made anew: when, from which weights, and after a stop as without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import assert_same_run, tiny_config

import selfdistill.training.loop
from selfdistill.config import (
    BaseTeacherConfig,
    Config,
    EvaluationConfig,
    RefreshedTeacherConfig,
    TeacherConfig,
)
from selfdistill.training.checkpoint import TrainState
from selfdistill.training.held_out import evaluate, refresh_is_due
from selfdistill.training.loop import train


def state(step: int, *, evaluated: int | None, best: int | None) -> TrainState:
    return TrainState(step, evaluated, best, None if best is None else 0.5, {}, "")


def test_it_is_time_after_so_many_steps_or_when_an_evaluation_found_nothing_better() -> None:
    every_third, stalled = RefreshedTeacherConfig(every=3), RefreshedTeacherConfig()
    settings = EvaluationConfig(every=2)

    def due(state: TrainState, teacher: TeacherConfig | None) -> bool:
        return refresh_is_due(state, teacher, settings)

    steps = [state(step, evaluated=None, best=None) for step in range(1, 7)]
    assert [due(each, every_third) for each in steps] == [False, False, True] * 2
    assert not any(due(each, stalled) for each in steps)
    assert due(state(4, evaluated=4, best=2), stalled)
    assert not due(state(4, evaluated=4, best=4), stalled)
    assert not due(state(5, evaluated=4, best=2), stalled)
    assert not due(state(5, evaluated=5, best=2), stalled)  # of the last step, by chance
    going_back = RefreshedTeacherConfig(every=2, from_best=True)
    assert due(state(4, evaluated=4, best=2), going_back)
    assert not due(state(4, evaluated=2, best=2), going_back)  # the evaluation was put off
    for teacher in (None, BaseTeacherConfig()):
        assert not due(state(4, evaluated=4, best=0), teacher)


def make_config(
    solver_dir: Path,
    output_dir: Path,
    every: int | None,
    *,
    from_best: bool = False,
    **changes: Any,
) -> Config:
    settings = {
        "steps": 5,
        "method": {
            "name": "stepalign",
            "group_size": 2,
            "teacher": {"name": "refreshed", "every": every, "from_best": from_best},
        },
        "optimizer": {"warmup_steps": 0, "learning_rate": 1e-3},
        "evaluation": {"every": 2, "problems": 3, "samples": 1},
        "checkpoint": {"keep": "all", "every": 1},
    }
    return tiny_config(solver_dir, output_dir, **settings | changes)


# The step whose student teaches after each step. A random model solves nothing, so that no
# evaluation (after steps 2 and 4; that of the last step does not count) is better than the first.
@pytest.mark.parametrize(
    ("every", "teaches"), [(3, [0, 0, 3, 3, 3]), (None, [0, 2, 2, 4, 4])], ids=["every", "stalled"]
)
def test_the_teacher_is_the_student_of_the_step_before(
    solver_dir: Path, tmp_path: Path, every: int | None, teaches: list[int]
) -> None:
    train(make_config(solver_dir, tmp_path / "run", every))
    checkpoints = tmp_path / "run" / "checkpoints"
    weights = [load_file(checkpoints / f"step-{n:06d}" / "model.safetensors") for n in range(6)]
    name = "model.layers.0.mlp.up_proj.weight"
    assert len({weight[name].sum().item() for weight in weights}) == 6
    for step, source in enumerate(teaches, start=1):
        teacher = load_file(checkpoints / f"step-{step:06d}" / "teacher.safetensors")
        assert torch.equal(teacher[name], weights[source][name]), step


def test_the_student_goes_back_to_the_best_checkpoint_with_the_optimiser(
    solver_dir: Path, tmp_path: Path
) -> None:
    """Nothing is better than the first evaluation here, so the run starts again and again."""
    train(make_config(solver_dir, tmp_path, None, from_best=True))
    checkpoints = [tmp_path / "checkpoints" / f"step-{step:06d}" for step in range(6)]
    first, _, second, third, fourth, _ = (load_file(c / "model.safetensors") for c in checkpoints)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        assert torch.equal(second[name], first[name])
        assert not torch.equal(third[name], first[name])
        assert torch.equal(fourth[name], first[name])
        teacher = load_file(checkpoints[5] / "teacher.safetensors")
        assert torch.equal(teacher[name], first[name])
    moments = [load_file(checkpoint / "optimizer.safetensors") for checkpoint in checkpoints]
    assert moments[2] == {} != moments[3]  # those of the start, before the first step
    assert {tensor.item() for name, tensor in moments[5].items() if name.endswith("step")} == {1.0}


def test_going_back_needs_evaluated_steps_and_rollouts_of_its_own(solver_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"every: got 3.* multiple of evaluation.every \(2\)"):
        make_config(solver_dir, Path("run"), 3, from_best=True)
    assert make_config(solver_dir, Path("run"), 4, from_best=True).method.teacher.every == 4


@pytest.mark.parametrize(
    ("every", "from_best", "stops_at"),
    [(None, False, 2), (None, True, 2), (2, False, 2), (2, True, 2), (2, True, 0)],
)
def test_a_run_that_stopped_in_the_deciding_evaluation_goes_on_with_the_same_bits(
    solver_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every: int | None,
    from_best: bool,
    stops_at: int,
) -> None:
    # More problems than are attempted at once: an evaluation ends early between two portions.
    evaluation = {"every": 2, "problems": 20, "samples": 1}
    whole, parts = (
        make_config(
            solver_dir, tmp_path / name, every, from_best=from_best, steps=4, evaluation=evaluation
        )
        for name in ("whole", "parts")
    )
    stops: list[int] = []

    def rated(*args: Any, **options: Any) -> TrainState:
        """Stop where asked; where `every` decides, the student of step 2 is the best one."""
        state = args[2]
        options["interrupt"].requested = state.step in stops
        result = evaluate(*args, **options)
        assert (result.evaluated_step == state.step) == (state.step not in stops)
        if every is None or result.evaluated_step != 2:
            return result
        return replace(result, best_step=2, best_metric=0.5)

    monkeypatch.setattr(selfdistill.training.loop, "evaluate", rated)
    train(whole)
    stops.append(stops_at)
    assert train(parts).interrupted
    stops.clear()
    last = tmp_path / "parts" / "checkpoints" / "last"
    assert not last.exists() if stops_at == 0 else last.resolve().name == "step-000002"
    train(parts, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
