from __future__ import annotations

from pathlib import Path

import pytest

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
