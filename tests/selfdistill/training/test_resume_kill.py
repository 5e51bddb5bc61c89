from __future__ import annotations

from pathlib import Path

from tiny_runs import assert_same_run, forked_runs, tensors


def test_killed_at_any_moment_and_resumed_gives_the_same_bits(
    solver_dir: Path, tmp_path: Path
) -> None:
    config = {
        "model": str(solver_dir),
        "output_dir": str(tmp_path / "runs"),
        "task": {"step_counts": [1]},
        "method": {"name": "stepalign", "group_size": 2, "teacher": {"name": "ema", "decay": 0.8}},
        "precision": "bfloat16",
        "device": "cpu",
        "steps": 6,
        "prompts_per_step": 1,
        "rollout": {"max_new_tokens": 4},
        "optimizer": {"learning_rate": 1e-2},
        "evaluation": {"every": 3, "problems": 1, "samples": 1},
    }
    answer = forked_runs("kill", {"config": config, "kills": 20, "seed": 0}, tmp_path)
    assert sum(answer["kills"].values()) == 20
    assert len(answer["kills"]) >= 5  # random moments, and several places of the code
    runs = tmp_path / "runs"
    names = {name.split("/")[0] for name in tensors(runs / answer["undisturbed"])}
    assert names == {
        "model.safetensors",
        "optimizer.safetensors",
        "rng.safetensors",
        "teacher.safetensors",
    }
    for name in answer["finished"]:
        assert_same_run(runs / answer["undisturbed"], runs / name)
        leftovers = [path.name for path in (runs / name / "checkpoints").glob(".*")]
        assert not leftovers
