"""The step that is timed samples, scores and learns, and what was measured is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import bench_trainer_step
from benchmarks.bench_trainer_step import TrainerStep
from benchmarks.step import ModelSize

SIZE = ModelSize(
    layers=2, hidden=32, intermediate=48, heads=2, kv_heads=1, head_dim=16, vocabulary=97
)


def test_every_round_takes_the_same_step() -> None:
    step = TrainerStep(SIZE, prompts=2, group=2, new_tokens=6)
    step.run()
    tokens, gradients = step.tokens, [p.grad.clone() for p in step.learning if p.grad is not None]
    assert len(gradients) == 2 * 7 * 2
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    assert all(len(row) == 6 for group in tokens for row in group)
    assert list(step.seconds) == ["rollout", "student and teacher", "loss", "backward", "update"]
    step.run()
    assert step.tokens == tokens


def test_it_writes_what_it_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        bench_trainer_step,
        "ModelSize",
        lambda layers, vocabulary: replace(SIZE, layers=layers, vocabulary=vocabulary),
    )
    given = ["--layers", "1", "--vocabulary", "97", "--new-tokens", "3", "--rounds", "1"]
    bench_trainer_step.main([*given, "--output", str(tmp_path)])
    table = (tmp_path / "trainer_step.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[-2:]] == ["update", "step"]
    assert (tmp_path / "trainer_step.json").exists()
