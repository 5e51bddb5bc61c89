"""Every mechanism in whole runs of the shipped solver: it learns, resumes, and shares its work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import (
    ROOT,
    assert_close_runs,
    assert_same_run,
    forked_runs,
    lines,
    ranks_settings,
    tensors,
    tiny_config,
)

from selfdistill.export import export
from selfdistill.training.loop import train

SOLVER = ROOT / "examples" / "arithmetic" / "solver"
METHODS: dict[str, dict[str, Any]] = {
    "reward": {
        "name": "stepalign",
        "group_size": 4,
        "reward": {"coefficient": 0.5},
        "loss": {"advantage_mask": {"threshold": 0.1}},
    },
    "wrong step": {"name": "wrong_step", "group_size": 2},
    "wrong step, near the base model": {"name": "wrong_step", "group_size": 2, "kl": {}},
    "contrast": {"name": "contrast", "group_size": 2, "teacher": {"name": "live"}},
    "contrast with other problems": {"name": "contrast", "group_size": 1, "against": "other"},
    "position": {
        "name": "refsol",
        "group_size": 1,
        "loss": {"position_weight": {"name": "linear", "over": 12}},
    },
}


def settings(method: dict[str, Any]) -> dict[str, Any]:
    return {
        "task": {"step_counts": [4]},
        "method": method,
        "prompts_per_step": 2,
        "rollout": {"max_new_tokens": 48},
        "completions": None,
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
        "evaluation": {"every": 1, "problems": 1, "samples": 1},
        "max_empty_steps": None,
    }


@pytest.mark.parametrize("name", METHODS)
def test_stopped_and_resumed_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    runs = [tmp_path / "whole", tmp_path / "parts"]
    whole, parts = (tiny_config(SOLVER, run, **settings(METHODS[name])) for run in runs)
    train(whole)
    train(parts.model_copy(update={"steps": 1}))
    before = tensors(runs[1])
    train(parts, resume=True)
    assert_same_run(*runs)
    assert any((before[key] != value).any() for key, value in tensors(runs[1]).items())
    assert all(line["active"] > 0 for line in lines(runs[0], "metrics.jsonl"))


def test_two_ranks_give_the_result_of_one(tmp_path: Path) -> None:
    names = ("reward", "wrong step", "contrast with other problems")
    cases = {
        name: ranks_settings(SOLVER, tmp_path / name, **settings(METHODS[name]), steps=2)
        for name in names
    }
    answer = forked_runs("ranks", {"cases": cases}, tmp_path)
    for name in names:
        assert answer[name]["ranks_agree"], name
        assert_close_runs(tmp_path / name / "1", tmp_path / name / "2")


@pytest.mark.parametrize("adapter", [None, {"r": 2}], ids=["full", "lora"])
def test_one_method_goes_on_where_another_ended(
    adapter: dict[str, Any] | None, tmp_path: Path
) -> None:
    """As docs/trainer.md says: export the first run, and name the folder as the model."""
    first, second, model = tmp_path / "first", tmp_path / "second", tmp_path / "model"
    changes: dict[str, Any] = {"adapter": adapter, "steps": 1}
    greedy = {"every": 1, "problems": 8, "samples": 1, "sampling": {"temperature": 0}}
    stepalign = {"name": "stepalign", "group_size": 1}
    train(tiny_config(SOLVER, first, **settings(stepalign) | {"evaluation": greedy}, **changes))
    export(first, model, checkpoint="last")
    later = settings(METHODS["wrong step"]) | {"evaluation": greedy}
    train(tiny_config(model, second, **later, **changes))
    ended, began = (lines(run, "evaluations.jsonl") for run in (first, second))
    assert {**ended[-1], "step": 0} == began[0]
