"""All contenders sample from the same model, and what is timed is the same work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import bench_rollout
from benchmarks.bench_rollout import RolloutProblem, check, contenders, random_model, random_prompts
from benchmarks.step import ModelSize
from selfdistill.tasks.arithmetic.tokenizer import build_tokenizer

SIZE = ModelSize(
    layers=1, hidden=32, intermediate=48, heads=2, kv_heads=1, head_dim=16, vocabulary=97
)


def problem() -> RolloutProblem:
    return RolloutProblem(
        model=random_model(SIZE, new_tokens=12),
        tokenizer=build_tokenizer(),
        prompts=random_prompts(3, vocabulary=97),
        group_size=2,
        new_tokens=12,
        rows=4,
    )


def test_contenders_give_ragged_rollouts_and_greedy_ones_are_the_same() -> None:
    rollouts = problem()
    check(rollouts)
    for sample in contenders(rollouts).values():
        lengths = [len(row) for row in sample(1.0)]
        assert len(lengths) == 6
        assert len(set(lengths)) > 2
        assert max(lengths) <= 12


def test_other_rollouts_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts = problem()
    other = replace(rollouts, prompts=[[5, 6, 7]] * 3, group_size=1)
    found = contenders(other)["engine"]
    monkeypatch.setattr(bench_rollout, "_engine", lambda problem, temperature: found(temperature))
    with pytest.raises(RuntimeError, match="engine: 0 of 3 greedy rollouts"):
        check(rollouts)


def test_the_command_writes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_rollout, "ModelSize", lambda layers=1: replace(SIZE, layers=layers))
    threads = torch.get_num_threads()
    arguments = {"layers": 1, "prompts": 2, "group": 2, "new-tokens": 6, "rounds": 1, "threads": 1}
    given = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    bench_rollout.main([*given, "--output", str(tmp_path)])
    torch.set_num_threads(threads)
    table = (tmp_path / "rollout.md").read_text()
    assert "### 2 x 2 rollouts" in table
    assert all(f"| {name} |" in table for name in ("engine", "generate"))
