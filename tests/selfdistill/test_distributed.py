from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import ROOT, assert_close_runs, forked_runs, lines, ranks_settings

from selfdistill.config import Config, save_config
from selfdistill.distributed import ALONE, Ranks
from selfdistill.runlog import JsonLines
from selfdistill.train import train


def test_two_ranks_give_the_result_of_one(sharp_solver_dir: Path, tmp_path: Path) -> None:
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
            name: ranks_settings(sharp_solver_dir, tmp_path / name, **changes)
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


@pytest.mark.slow
def test_torchrun_starts_a_run(sharp_solver_dir: Path, tmp_path: Path) -> None:
    config = ranks_settings(sharp_solver_dir, tmp_path / "together", steps=1, prompts_per_step=2)
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
    assert_close_runs(tmp_path / "alone", tmp_path / "together", smooth=False)
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
