from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from selfdistill import cli
from selfdistill.config import load_config

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem) for path in sorted(EXAMPLES.rglob("*.yaml"))],
)
def test_every_example_is_a_configuration(path: Path) -> None:
    load_config(path)


def test_the_papers_run_has_the_papers_hyperparameters() -> None:
    config = load_config(EXAMPLES / "paper_qwen3_1.7b.yaml")
    assert config.adapter is not None
    assert (config.adapter.r, config.adapter.alpha) == (64, 128)
    assert (config.optimizer.learning_rate, config.prompts_per_step) == (5e-6, 32)
    assert (config.rollout.temperature, config.rollout.max_new_tokens) == (1.1, 2048)
    method = config.method
    assert method.name == "stepalign"
    assert (method.group_size, method.teacher.name, method.loss.objective.name) == (
        1,
        "base",
        "forward_kl",
    )
    assert config.prompt.student_template == {"enable_thinking": False}
    assert config.prompt.teacher_template == {"enable_thinking": True}


def test_the_ancestor_differs_where_it_says() -> None:
    config, paper = (
        load_config(EXAMPLES / f"{name}.yaml") for name in ("paper_opsd", "paper_qwen3_1.7b")
    )
    assert (config.rollout.top_p, config.rollout.top_k) == (0.95, 20)
    assert config.optimizer.max_grad_norm == 0.1
    assert (config.method.name, config.method.loss.entry_clip) == ("refsol", 0.05)
    assert config.adapter == paper.adapter
    same = ("learning_rate", "betas", "schedule", "warmup_steps")
    for name in same:
        assert getattr(config.optimizer, name) == getattr(paper.optimizer, name)
    # Every setting that both files have, and differently, is marked.
    ours, theirs = (_settings(EXAMPLES / f"{n}.yaml") for n in ("paper_opsd", "paper_qwen3_1.7b"))
    for name, (value, comment) in ours.items():
        differs = name in theirs and theirs[name][0] != value and "runs/" not in value
        assert not differs or "DIFFERS" in comment, name
    for name in ("method.loss.entry_clip", "rollout.top_p", "rollout.top_k"):
        assert "DIFFERS" in ours[name][1]


def _settings(path: Path) -> dict[str, tuple[str, str]]:
    """Value and comment of each setting on a line of its own, by its place."""
    found, places = {}, []
    for line in path.read_text().splitlines():
        match = re.match(r"( *)(\w+): ?([^#]*?) *(#.*)?$", line)
        if match:
            depth = len(match[1]) // 2
            places = [*places[:depth], match[2]]
            found[".".join(places)] = (match[3], match[4] or "")
    return found


def test_the_ancestors_recipe_runs_dry_on_a_tiny_model(
    solver_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = {
        "model": solver_dir, "output_dir": tmp_path / "run", "device": "cpu",
        "precision": "float32", "task": "{name: arithmetic}", "prompts_per_step": 2, "steps": 1,
        "rollout.engine": "{name: transformers}", "rollout.max_new_tokens": 8,
        "prompt": "{}", "evaluation.problems": 2,
    }  # fmt: skip
    arguments = [f"{name}={value}" for name, value in overrides.items()]
    command = ["selfdistill", "train", str(EXAMPLES / "paper_opsd.yaml"), "--dry-run", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    printed = capsys.readouterr()
    assert not caught.value.code, printed.err
    assert "[shared prefix, " in printed.out
