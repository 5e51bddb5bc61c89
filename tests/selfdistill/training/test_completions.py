from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import assert_same_run, lines, tiny_config
from tiny_tokenizers import byte_level

from selfdistill.analysis.completions import NoCompletionsError, read_step, show
from selfdistill.config import CompletionsConfig, Config
from selfdistill.training.completions import CompletionLog, saved
from selfdistill.training.loop import train


def make_config(solver_dir: Path, output_dir: Path, **changes: Any) -> Config:
    settings = {
        "method": {"name": "stepalign", "group_size": 2},
        "prompts_per_step": 3,
        "tokens_per_microbatch": 64,
        "rollout": {"max_new_tokens": 6},
        "completions": {},
    }
    return tiny_config(solver_dir, output_dir, **settings | changes)


def test_every_rollout_is_kept_with_what_the_teacher_thought(
    sharp_solver_dir: Path, tmp_path: Path
) -> None:
    config = make_config(sharp_solver_dir, tmp_path / "run")
    train(config)
    metrics = lines(tmp_path / "run", "metrics.jsonl")
    for step in (1, 2):
        records = read_step(tmp_path / "run", step)
        assert len(records) == 6
        for record in records:
            assert len(record["tokens"]) == len(record["logprobs"])
            assert "".join(record["tokens"]).startswith(record["text"])
            assert record["context"]["kind"] == "critique"
            assert len(record["advantages"]) == len(record["tokens"])
        rewards = [record["reward"] for record in records]
        assert sum(rewards) / 6 == metrics[step - 1]["reward"]
        # Each token has the advantage that the step's mean was made of.
        advantages = [a for record in records for a in record["advantages"]]
        assert len(advantages) == metrics[step - 1]["tokens"]
        mean = sum(advantages) / len(advantages)
        assert mean == pytest.approx(metrics[step - 1]["advantage"], rel=1e-4, abs=1e-5)
    text = "\n".join(str(part) for part in show(read_step(tmp_path / "run", None), most=2))
    assert "step 2, problem " in text
    assert "rollout 1: reward 0, wrong" in text
    assert "largest advantage " in text
    assert "the teacher's critique:" in text
    with pytest.raises(NoCompletionsError, match="of 2 steps from 1 to 2"):
        read_step(tmp_path / "run", 3)
    with pytest.raises(NoCompletionsError, match="without `completions: null`"):
        read_step(tmp_path, None)
    # What is kept changes nothing, and a run may begin or end to keep it.
    train(make_config(sharp_solver_dir, tmp_path / "silent", completions=None))
    assert_same_run(tmp_path / "run", tmp_path / "silent")
    train(make_config(sharp_solver_dir, tmp_path / "silent", steps=3), resume=True)
    assert [*saved(tmp_path / "silent" / "completions")] == [3]


def test_a_rollout_that_taught_nothing_has_no_advantages(solver_dir: Path, tmp_path: Path) -> None:
    method = {"name": "grpo", "group_size": 2}
    train(make_config(solver_dir, tmp_path / "run", method=method, max_empty_steps=None))
    for record in read_step(tmp_path / "run", 1):
        assert record["context"] is None
        # A random model earns nothing, so no group is read.
        assert record["advantages"] is None


def test_the_oldest_files_go_and_later_ones_are_forgotten(tmp_path: Path) -> None:
    settings = CompletionsConfig(every=2, max_mib=1)
    log = CompletionLog(tmp_path, settings, byte_level())
    large = [{"text": "x" * 400_000}]
    for step in filter(log.keeps, range(1, 9)):
        log.write(step, large)
    folder = tmp_path / "completions"
    assert sorted(saved(folder)) == [6, 8]
    assert json.loads(saved(folder)[8].read_text())["step"] == 8
    log.write(10, large * 4)  # one step may be more than the limit
    assert sorted(saved(folder)) == [10]
    log.keep_until(9)
    assert saved(folder) == {}


def test_only_steps_that_are_kept_are_recorded(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[CompletionLog] = []
    records = CompletionLog.records

    def count(log: CompletionLog, *args: Any) -> list[dict[str, Any]]:
        made.append(log)
        return records(log, *args)

    monkeypatch.setattr(CompletionLog, "records", count)
    train(make_config(solver_dir, tmp_path, steps=3, completions={"every": 2}))
    assert len(made) == 1
    assert [*saved(tmp_path / "completions")] == [2]


def test_a_logged_number_is_the_passes(sharp_solver_dir: Path, tmp_path: Path) -> None:
    # One pass for everything and one pass for each problem say the same about each token.
    for name, tokens in [("one", 10_000), ("many", 1)]:
        train(make_config(sharp_solver_dir, tmp_path / name, steps=1, tokens_per_microbatch=tokens))
    one, many = (
        torch.tensor([a for r in read_step(tmp_path / name, 1) for a in r["advantages"]])
        for name in ("one", "many")
    )
    # Both are rounded to 5 digits.
    torch.testing.assert_close(one, many, rtol=1e-4, atol=3e-5)
