from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from selfdistill.config import Config
from selfdistill.critic.textgen.interface import Generation
from selfdistill.model.folder import UnusableModelError
from selfdistill.planning import checks
from selfdistill.planning.dry_run import dry_run, show_prompts, stand_in, step_shape
from selfdistill.planning.estimates import ModelShape
from selfdistill.tasks.arithmetic.tokenizer import build_tokenizer
from selfdistill.tasks.interface import Problem, TaskError


def shown(config: Config, *, color: bool = False) -> str:
    system = "standard" if color else None
    console = Console(file=io.StringIO(), width=140, force_terminal=color, color_system=system)
    dry_run(config, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_it_needs_no_weights(solver_dir: Path, tmp_path: Path) -> None:
    (solver_dir / "model.safetensors").unlink()
    config = Config.model_validate(
        {
            "model": str(solver_dir),
            "output_dir": tmp_path / "run",
            "rollout": {"max_new_tokens": 20},
        }
    )
    text = shown(config)
    assert "stepalign on the arithmetic task; 60 steps of 8 problems x 8 rollouts" in text
    assert not (tmp_path / "run").exists()
    for phrase in (
        "student prompt, ",
        "teacher prompt, ",
        "[shared prefix, ",
        "[teacher only, ",
        "<critique>",
        "0 leave no room for 20 new tokens",
        "optimizer (AdamW)",
        "teacher (base)",
        "rollout cache",
        "store (one visit",
        "together",
        "student backward",
        "a program writes it",
    ):
        assert phrase in text, phrase
    assert "\x1b[" not in text
    assert "\x1b[32m" in shown(config, color=True)  # the shared prefix is green
    assert "shard:" not in text
    sharded = shown(config.model_copy(update={"shard": True}))
    assert "GiB / R instead, and the whole copy that samples" in sharded


def test_marks_stand_where_the_tokens_part() -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer("12 + 3 + 4", add_special_tokens=False)["input_ids"]
    student, teacher = show_prompts(tokenizer, [*ids[:3], ids[4]], [*ids[:3], ids[0], ids[4]])
    shared = tokenizer.decode(ids[:3])
    assert f"[shared prefix, 3 tokens]{shared}[student only, 1 tokens]" in student.plain
    assert f"[shared prefix, 3 tokens]{shared}[teacher only, 2 tokens]" in teacher.plain


def test_epochs_and_a_method_without_a_teacher(solver_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"q": f"{i} + 1", "a": i + 1}) + "\n" for i in range(10, 30))
    )
    (tmp_path / "b.jsonl").write_text(json.dumps({"q": "1 + 1", "a": 2}) + "\n")
    task = {
        "name": "jsonl",
        "splits": {"train": str(path), "dev": str(tmp_path / "b.jsonl")},
        "question": "q",
        "answer": "a",
        "instruction": "",
        "checker": "plain",
    }
    config = Config.model_validate(
        {
            "model": str(solver_dir),
            "output_dir": tmp_path,
            "task": task,
            "steps": 10,
            "method": {"name": "grpo", "group_size": 2},
        }
    )
    text = shown(config)
    assert "20 training problems; 10 steps of 8 problems x 2 rollouts, 4.0 epochs" in text
    assert "grpo shows nobody more than the student sees" in text
    assert "student prompt, " in text
    assert "teacher prompt, " not in text
    assert "teacher (" not in text
    assert "teacher forward" not in text
    problem = Problem("p", "1 + 1", "2", reference="")
    stands = stand_in(Config(model="m", output_dir=tmp_path), problem)
    assert stands is not None
    assert stands.kind == "critique"
    assert "stands here" in stands.text


def test_a_model_that_is_not_there_says_how_to_get_it(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = Config(model="nobody/has-this-model", output_dir=tmp_path)
    with pytest.raises(UnusableModelError, match="hf download nobody/has-this-model"):
        shown(config)
    (solver_dir / "config.json").unlink()
    with pytest.raises(UnusableModelError, match=r"holds no whole model.* it holds .*tokenizer"):
        shown(Config(model=str(solver_dir), output_dir=tmp_path))


def test_an_engine_of_its_own_has_a_cache_and_a_copy_of_the_weights() -> None:
    model = ModelShape(
        parameters=1000, matrix_parameters=900, hidden=8, intermediate=16, layers=1, heads=1,
        kv_heads=1, head_dim=8, vocabulary=16, trained=1000,
    )  # fmt: skip

    def engine_bytes(engine: dict[str, object]) -> int | None:
        rollout = {"engine": engine}
        config = Config.model_validate({"model": "m", "output_dir": "o", "rollout": rollout})
        return step_shape(config, model, prompt=5, context=5).engine_bytes

    assert engine_bytes({"name": "transformers"}) is None
    settings = {"name": "vllm", "kv_cache_gib": 2}
    assert engine_bytes({**settings, "dtype": "bfloat16"}) == 2 * 2**30 + 2000
    assert engine_bytes({**settings, "dtype": "float32"}) == 2 * 2**30 + 4000


def test_it_tries_splits_checker_and_critic(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"q": f"What is {i} + 1?", "a": str(i + 1), "r": f"<answer> {i + (i != 3)}"}
        for i in range(12)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "model": str(solver_dir),
        "output_dir": tmp_path / "run",
        "device": "cpu",
        "rollout": {"max_new_tokens": 9},
        "task": {
            "name": "jsonl",
            "question": "q",
            "answer": "a",
            "reference": "r",
            "splits": {"all": str(tmp_path / "d.jsonl"), "counts": {"dev": 4}},
        },
        "method": {
            "name": "stepalign",
            "critic": {
                "name": "llm",
                "engine": {"name": "server", "model": "m", "base_url": "http://localhost:9/v1"},
            },
        },
    }
    asked = []

    class Fake:
        def generate(self, prompts: list[str]) -> list[tuple[int, Generation]]:
            asked.extend(prompts)
            answer = "<case>A</case><first_change>0</first_change><text>x</text>"
            return [(0, Generation(answer, finished=True))]

    monkeypatch.setattr(checks, "build_text_generator", lambda *args, **kwargs: Fake())
    console = Console(file=io.StringIO(), width=400)
    dry_run(Config.model_validate(settings), console, ask_critic=True)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "Problems: train 8, dev 4, test 0." in text
    assert "Evaluations ask 4 dev problems" in text
    # One of the data's own solutions has an answer that is not the problem's.
    assert "Of 8 solutions in the data the checker finds" in text
    assert "which is a critique of case A" in text
    assert len(asked) == 1
    settings["task"] = {"name": "jsonl", "question": "q", "answer": "a", "splits": {}}
    settings["task"]["splits"] = {"train": str(tmp_path / "d.jsonl")}
    with pytest.raises(TaskError, match="no dev problems"):
        dry_run(Config.model_validate(settings), console)
