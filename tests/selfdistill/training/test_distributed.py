from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import ROOT, assert_close_runs, forked_runs, lines, ranks_settings

from selfdistill.config import Config, save_config
from selfdistill.runlog import JsonLines
from selfdistill.training.distributed import ALONE, Ranks
from selfdistill.training.loop import train


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


def test_what_is_left_out_does_not_depend_on_the_ranks(
    sharp_solver_dir: Path, tmp_path: Path
) -> None:
    """Questions of nine operations leave no room; of some steps one rank's share has no others."""
    config = ranks_settings(
        sharp_solver_dir,
        tmp_path / "drop",
        task={"step_counts": [1, 9]},
        method={"name": "refsol", "group_size": 2},
        prompt={"max_length": 32, "too_long": "drop"},
        rollout={"max_new_tokens": 6},
        prompts_per_step=4,
        steps=4,
        evaluation={"every": 9, "problems": 1, "samples": 1},
        seed=2,
    )
    answer = forked_runs("ranks", {"cases": {"drop": config}}, tmp_path)
    assert answer["drop"]["ranks_agree"]
    assert_close_runs(tmp_path / "drop" / "1", tmp_path / "drop" / "2")


def test_a_message_counts_what_all_ranks_left_out(solver_dir: Path, tmp_path: Path) -> None:
    """Some problems of a step do not fit and the rest earns no reward; then none of a step fits."""
    changes = {
        "task": {"step_counts": [1, 9]},
        "method": {"name": "grpo", "group_size": 2},
        "rollout": {"max_new_tokens": 6},
        "prompt": {"max_length": 32, "too_long": "drop"},
        "evaluation": {"every": 99, "problems": 1, "samples": 1},
        "seed": 2,
    }
    kinds = {
        "some": {"prompts_per_step": 4, "max_empty_steps": 3},
        "none": {"prompts_per_step": 2, "steps": 12},
    }
    cases = {
        f"{name} {size}": {
            "config": ranks_settings(solver_dir, tmp_path / f"{name}-{size}", **changes, **kind),
            "does": "raise",
            "rank": None,
            "size": size,
        }
        for name, kind in kinds.items()
        for size in (1, 3)
    }
    said = forked_runs("failures", {"cases": cases}, tmp_path)
    for name, expected in {
        "some": r"NothingLearnedError: .* of 24 rollouts ([2-9]|1\d) did not fit, \d+ gave no",
        "none": r"TaskError: none of the 2 problems of a step leaves room for 6 new tokens",
    }.items():
        alone = said[f"{name} 1"]["0"]
        assert re.match(expected, alone), alone
        assert set(said[f"{name} 3"].values()) == {alone}


def test_ranks_with_other_problems_are_refused(solver_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "task.py"
    file.write_text(
        "import os\n"
        "def problems():\n"
        "    return [{'prompt': f'{os.getpid()} + {i}', 'answer': '1'} for i in range(40)]\n"
        "def reward(completions, **columns):\n"
        "    return [0.0 for _ in completions]\n"
    )
    settings = ranks_settings(
        solver_dir,
        tmp_path / "run",
        task={"name": "python", "file": str(file)},
        method={"name": "grpo", "group_size": 2},
    )
    case = {"config": settings, "does": "raise", "rank": None, "size": 2}
    (said,) = forked_runs("failures", {"cases": {"apart": case}}, tmp_path).values()
    assert set(said.values()) == {
        "ConfigError: the ranks do not read the same dev problems, training problems: each runs "
        "the task itself, so what it draws at random needs a seed"
    }


def test_the_rank_that_failed_is_named_by_the_others(solver_dir: Path, tmp_path: Path) -> None:
    cases = {
        f"{does} {rank} of {size}": {
            "config": ranks_settings(solver_dir, tmp_path / f"{does}-{rank}-{size}"),
            "does": does,
            "rank": rank,
            "size": size,
        }
        for does, rank, size in [
            ("raise", 1, 2),
            ("raise", 0, 2),
            ("raise", 1, 3),
            ("kill", 1, 2),
            ("kill", 0, 2),
            ("kill", 2, 3),
        ]
    }
    for name, said in forked_runs("failures", {"cases": cases}, tmp_path).items():
        does, failed, _, size = name.split()
        assert len(said) == int(size)
        own = said.pop(failed)
        assert own == (None if does == "kill" else "EngineError: the critic is gone"), name
        why = {
            "raise": f"rank {failed} failed with EngineError: the critic is gone.",
            "kill": f"rank {failed} does not answer (killed,",
        }[does]
        for rank, text in said.items():
            assert text is not None
            assert text.startswith(f"RankFailedError: {why}"), (name, rank, text)
            assert f"Rank {rank} of {size} cannot go on without it" in text
            assert "--resume" in text


def test_a_refusal_of_the_first_rank_is_heard_by_all(solver_dir: Path, tmp_path: Path) -> None:
    config = ranks_settings(solver_dir, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 4}\n')
    said = forked_runs(
        "failures",
        {"cases": {"taken": {"config": config, "does": "raise", "rank": 5, "size": 2}}},
        tmp_path,
    )["taken"]
    assert said["0"].startswith("RunExistsError: ")
    assert "rank 0 failed with RunExistsError: " in said["1"]


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
