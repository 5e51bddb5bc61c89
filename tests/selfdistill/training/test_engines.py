"""The training loop with engines and critics that have weights, or a will, of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from completion_server import Answer, Server, completion
from rich.console import Console
from safetensors.torch import load_file

from selfdistill.cli import main
from selfdistill.config import Config, ConfigError, save_config
from selfdistill.rollout.engine import EngineError
from selfdistill.rollout.transformers_engine import TransformersEngine
from selfdistill.runlog import JsonLines
from selfdistill.training import loop
from selfdistill.training.distributed import Ranks
from selfdistill.training.loop import train


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def make_config(solver_dir: Path, output_dir: Path, **changes: Any) -> Config:
    settings: dict[str, Any] = {
        "model": str(solver_dir),
        "output_dir": output_dir,
        "task": {"step_counts": [1, 2]},
        "method": {"name": "stepalign", "group_size": 2},
        "device": "cpu",
        "steps": 3,
        "prompts_per_step": 2,
        "rollout": {"max_new_tokens": 12},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0},
        "evaluation": {"every": 3, "problems": 2, "samples": 1},
    }
    return Config.model_validate({**settings, **changes})


def metrics(run: Path) -> list[dict[str, Any]]:
    return JsonLines(run / "metrics.jsonl").read()


def test_the_engine_hears_of_every_change_of_the_weights(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    step = torch.optim.AdamW.step

    def record(name: str, function: Any) -> Any:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            events.append(name)
            return function(*args, **kwargs)

        return recorded

    monkeypatch.setattr(torch.optim.AdamW, "step", record("update", step))
    for name in ("sync", "generate"):
        monkeypatch.setattr(
            TransformersEngine, name, record(name, getattr(TransformersEngine, name))
        )
    train(make_config(solver_dir, tmp_path / "run", steps=2))
    assert events == ["generate", *["generate", "update", "sync"] * 2, "generate"]
    events.clear()
    train(make_config(solver_dir, tmp_path / "run", steps=3), resume=True)
    assert events == ["sync", "generate", "update", "sync", "generate"]
    assert [line["engine_disagreement"] for line in metrics(tmp_path / "run")] == [None] * 3


def test_a_dead_engine_leaves_the_last_good_checkpoint(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make_config(solver_dir, tmp_path / "whole"))
    generate = TransformersEngine.generate
    calls = 0

    def dies(self: TransformersEngine, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:  # one evaluation and two steps before
            raise EngineError("the engine died")
        return generate(self, *args, **kwargs)

    config = make_config(solver_dir, tmp_path / "run")
    monkeypatch.setattr(TransformersEngine, "generate", dies)
    with pytest.raises(EngineError, match="the engine died"):
        train(config)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]
    train(config, resume=True)
    last = Path("checkpoints/last/model.safetensors")
    expected, got = load_file(tmp_path / "whole" / last), load_file(tmp_path / "run" / last)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize("fallback", ["drop", "reference"])
def test_nonsense_of_a_critic_is_counted(
    solver_dir: Path, tmp_path: Path, server: Server, fallback: str
) -> None:
    def answer(prompt: str, before: int) -> Answer:
        if len(server.requests) % 4 == 0:  # one rollout of each step
            return completion("I would rather not.")
        return completion(
            "<think>hm</think><case>D</case><first_change>1</first_change>"
            "<text><step_1> so <|im_end|> <eos> <answer> 4</text>"
        )

    server.answer = answer
    engine = {
        "name": "server",
        "base_url": server.url,
        "model": "judge",
        "concurrency": 1,
        "cache": str(tmp_path / "cache"),
    }
    critic = {"name": "llm", "engine": engine, "check_answer": False, "fallback": fallback}
    method = {"name": "stepalign", "group_size": 2, "critic": critic}
    train(make_config(solver_dir, tmp_path / "run", method=method, steps=2))
    other = "none" if fallback == "drop" else "reference"
    for line in metrics(tmp_path / "run"):
        assert line["contexts"] == {"critique": 3, other: 1}
        assert line["dropped"] == (fallback == "drop")
        assert line["kl"] > 0
    assert len(list((tmp_path / "cache").glob("*/*.json"))) == len(server.requests) == 8


def test_a_missing_vllm_is_named_with_its_remedy(
    solver_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    config = make_config(solver_dir, tmp_path / "run", rollout={"engine": {"name": "vllm"}})
    save_config(config, tmp_path / "config.yaml")
    monkeypatch.setattr(sys, "argv", ["selfdistill", "train", str(tmp_path / "config.yaml")])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert "pip install vllm" in capsys.readouterr().err


@pytest.mark.parametrize(
    "engine",
    [{"name": "vllm"}, {"name": "vllm_server", "base_urls": ["http://127.0.0.1:9/v1"]}],
    ids=["vllm", "vllm_server"],
)
def test_an_engine_with_weights_of_its_own_takes_no_part_in_sharding(
    tmp_path: Path, engine: dict[str, Any]
) -> None:
    """It needs whole weights, and so does the comparison; known before anything is loaded."""
    settings = {"adapter": {"r": 2}, "rollout": {"engine": engine}, "shard": True}
    config = make_config(tmp_path / "none", tmp_path / "run", **settings)
    with pytest.raises(ConfigError, match="set shard: false"):
        loop._train(config, Ranks(0, 2), console=Console(quiet=True))
