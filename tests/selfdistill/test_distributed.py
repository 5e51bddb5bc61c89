from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import ROOT, forked_runs, lines, tensors

from selfdistill.config import Config, save_config
from selfdistill.distributed import ALONE, Ranks
from selfdistill.runlog import JsonLines
from selfdistill.train import train


def settings(solver_dir: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(solver_dir),
        "output_dir": str(output_dir),
        "task": {"step_counts": [1, 2]},
        "method": {"name": "stepalign", "group_size": 2},
        "device": "cpu",
        "steps": 3,
        "prompts_per_step": 3,
        "rollout": {"max_new_tokens": 6},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
        "evaluation": {"every": 2, "problems": 3, "samples": 2},
        **changes,
    }


def assert_close_runs(alone: Path, together: Path) -> None:
    for log in ("metrics.jsonl", "evaluations.jsonl"):
        expected, got = lines(alone, log), lines(together, log)
        assert len(expected) == len(got)
        for one, other in zip(expected, got, strict=True):
            assert one.keys() == other.keys()
            for name, value in one.items():
                if isinstance(value, float):
                    assert other[name] == pytest.approx(value, rel=1e-5, abs=1e-9), name
                else:
                    assert other[name] == value, name
    expected_tensors, got_tensors = tensors(alone), tensors(together)
    assert expected_tensors.keys() == got_tensors.keys()
    for name, tensor in expected_tensors.items():
        if name.startswith("rng"):
            continue  # of the process at large; a run draws from generators of its own
        error = (got_tensors[name].double() - tensor.double()).norm()
        # AdamW divides by the gradient's size: elements whose gradient is noise move at random.
        tolerance = 1e-5 if name.startswith("optimizer") else 1e-6
        assert error <= tolerance * tensor.double().norm() + 1e-12, name


def test_two_ranks_give_the_result_of_one(solver_dir: Path, tmp_path: Path) -> None:
    dropping = {"advantage_mask": {"threshold": 1e-3, "sign": "positive"}}
    cases = {
        "plain": {},
        "lora": {"adapter": {"r": 2}, "tokens_per_microbatch": 1},
        # One rank has no problem at all.
        "one problem": {
            "prompts_per_step": 1,
            "method": {"name": "stepalign", "group_size": 2, "teacher": {"name": "ema"}},
        },
        # Hardly a token is active, on one rank none at all in some step.
        "mask": {
            "prompts_per_step": 2,
            "rollout": {"max_new_tokens": 1},
            "method": {"name": "stepalign", "group_size": 1, "loss": dropping},
        },
    }
    request = {
        "cases": {
            name: settings(solver_dir, tmp_path / name, **changes)
            for name, changes in cases.items()
        }
    }
    answer = forked_runs("ranks", request, tmp_path)
    for name in cases:
        assert answer[name]["ranks_agree"], name
        assert_close_runs(tmp_path / name / "1", tmp_path / name / "2")
    active = [
        line["active"] * line["tokens"] for line in lines(tmp_path / "mask/2", "metrics.jsonl")
    ]
    assert any(count < 2 for count in active)  # so one of the two ranks had none


def test_torchrun_starts_a_run(solver_dir: Path, tmp_path: Path) -> None:
    config = settings(solver_dir, tmp_path / "together", steps=1, prompts_per_step=2)
    save_config(Config.model_validate(config), tmp_path / "config.yaml")
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [sys.executable, "-m", *torchrun, "-m", "selfdistill", "train", tmp_path / "config.yaml"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Best held-out Avg@2") == 1  # only one rank speaks
    train(Config.model_validate({**config, "output_dir": tmp_path / "alone"}))
    assert_close_runs(tmp_path / "alone", tmp_path / "together")
    assert len(JsonLines(tmp_path / "together" / "metrics.jsonl").read()) == 1


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_cover_everything_once(count: int, size: int) -> None:
    shares = [Ranks(rank, size).share(count) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_nothing_is_communicated() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    ALONE.sum_gradients([parameter])
    assert parameter.grad is None
    assert ALONE.is_main
    assert ALONE.sum(1.5, 2) == [1.5, 2]
    assert ALONE.gather([1, 2]) == [1, 2]
    assert not ALONE.any(False)
