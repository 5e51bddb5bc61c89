"""Questions that leave no room for an answer, in every place that asks them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from selfdistill.analysis.draw import draw_attempts
from selfdistill.cli import app
from selfdistill.config import Config, save_config
from selfdistill.evaluation.scores import Evaluation
from selfdistill.filtering import FilterSettings, filter_problems
from selfdistill.runlog import JsonLines
from selfdistill.tasks.arithmetic.tokenizer import build_tokenizer
from selfdistill.tasks.interface import TaskError
from selfdistill.training.loop import train
from selfdistill.training.solver import load_solver

LONG = "9 + 9 " * 40


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    folder = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def data(path: Path, questions: list[str]) -> str:
    lines = [
        json.dumps({"id": q[:9].strip(), "question": q, "answer": "9", "solution": "9"})
        for q in questions
    ]
    path.write_text("\n".join(lines))
    return str(path)


def settings(tmp_path: Path, model: Path, *, dev: list[str], **prompt: Any) -> Config:
    splits = {
        "train": data(tmp_path / "train.jsonl", ["1 + 8", "2 + 7"]),
        "dev": data(tmp_path / "dev.jsonl", dev),
    }
    return Config.model_validate(
        {
            "model": str(model),
            "output_dir": str(tmp_path / "run"),
            "device": "cpu",
            "task": {
                "name": "jsonl", "splits": splits, "id": "id", "reference": "solution",
                "instruction": "", "checker": "plain",
            },
            "method": {"name": "refsol", "group_size": 2},
            "steps": 1,
            "prompts_per_step": 2,
            "prompt": prompt,
            "rollout": {"max_new_tokens": 4},
            "evaluation": {"problems": len(dev), "samples": 2, "every": 1},
        }
    )  # fmt: skip


def test_a_long_dev_question_is_left_out_and_counted(tmp_path: Path, model: Path) -> None:
    """It stopped the run at step 0, although `too_long` is drop."""
    dev = ["3 + 6", f"0 + {LONG}", "4 + 5"]
    config = settings(tmp_path, model, dev=dev, too_long="drop")
    train(config)
    lines = JsonLines(tmp_path / "run" / "evaluations.jsonl").read()
    assert [line["step"] for line in lines] == [0, 1]
    for line in lines:
        assert line["too_long"] == 1
        assert {problem["problem_id"] for problem in line["problems"]} == {"3 + 6", "4 + 5"}


def test_the_command_lines_evaluation_leaves_it_out_as_well(tmp_path: Path, model: Path) -> None:
    config = settings(tmp_path, model, dev=["3 + 6", f"0 + {LONG}"], too_long="drop")
    path, output = tmp_path / "run.yaml", tmp_path / "result.json"
    save_config(config, path)
    command = ["evaluate", str(path), "--split", "dev", "--problems", "2", "--samples", "2"]
    result = CliRunner().invoke(app, [*command, "--output", str(output)])
    assert result.exception is None, result.output
    assert "problems left out, too long" in result.output
    evaluation = Evaluation.from_json(output.read_text())
    assert evaluation.too_long == 1
    assert len(evaluation.problems) == 1


@pytest.mark.parametrize("too_long", ["error", "drop"])
def test_what_cannot_be_asked_is_said_before_anything_is_sampled(
    tmp_path: Path, model: Path, too_long: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfdistill.rollout.attempts.sample", lambda *args, **kwargs: 1 / 0)
    dev = [f"0 + {LONG}"] if too_long == "drop" else ["3 + 6", f"0 + {LONG}"]
    config = settings(tmp_path, model, dev=dev, too_long=too_long)
    expected = rf"1 of {len(dev)} problems leave no room for 4 new tokens .* such as '0 \+ 9 \+ 9'"
    with pytest.raises(TaskError, match=expected):
        train(config)


def test_the_filter_and_the_analysis_leave_it_out(tmp_path: Path, model: Path) -> None:
    dev = [f"0 + {LONG}", "3 + 6", "4 + 5"]
    config = settings(tmp_path, model, dev=dev, too_long="drop")
    solver = load_solver(config)
    draw = draw_attempts(solver, split="dev", attempts=2, problems=3, samples=1, seed=0)
    assert {group.problem.id for group in draw.attempts} == {"3 + 6", "4 + 5"}
    critic = {"name": "llm", "engine": {"name": "server", "model": "m", "base_url": "http://x/v1"}}
    method = {"name": "stepalign", "critic": critic}
    config = Config.model_validate({**config.model_dump(), "method": method})
    # Whatever is right is too easy here, so that nobody is asked for a critique.
    filter_settings = FilterSettings(samples=1, below=0, split="dev")  # type: ignore[arg-type]
    report = filter_problems(
        config, tmp_path / "kept.jsonl", filter_settings, console=Console(quiet=True)
    )
    assert {problem.id for problem in report.examined} == {"3 + 6", "4 + 5"}
