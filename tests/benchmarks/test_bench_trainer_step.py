"""The two steps that are timed are the same step, and only one of them is peft's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import bench_trainer_step
from benchmarks.bench_trainer_step import TrainerStep, as_before, check
from benchmarks.step import ModelSize
from selfdistill.model.adapted_linear import AdaptedLinear

SIZE = ModelSize(
    layers=2, hidden=32, intermediate=48, heads=2, kv_heads=1, head_dim=16, vocabulary=97
)


def test_both_steps_sample_and_learn_the_same() -> None:
    step = TrainerStep(SIZE, prompts=2, group=2, new_tokens=6)
    same, error = check(step)
    assert same == 4
    assert 0 < error < 1e-4
    assert list(step.seconds) == ["rollout", "student and teacher", "loss", "backward", "update"]
    assert all(len(row) == 6 for group in step.tokens for row in group)


def test_only_the_earlier_step_has_pefts_layers() -> None:
    student = TrainerStep(SIZE).student

    def count() -> int:
        return sum(type(module) is AdaptedLinear for module in student.modules())

    assert count() == 2 * 7
    with as_before(student):
        assert count() == 0
    assert count() == 2 * 7


def test_other_gradients_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = TrainerStep(SIZE, prompts=1, group=2, new_tokens=4)
    gradients = step.gradients
    factors = iter([1.0, 1.1])

    def scaled() -> list[object]:
        factor = next(factors)
        return [factor * gradient for gradient in gradients()]

    monkeypatch.setattr(step, "gradients", scaled)
    with pytest.raises(RuntimeError, match="gradients differ by"):
        check(step)


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
