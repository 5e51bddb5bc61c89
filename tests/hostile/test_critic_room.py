"""A critic that has no room for its answer is found before anything is sampled."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from selfdistill.config import Config, ConfigError
from selfdistill.critic.llm import SHORTEST_PROMPT
from selfdistill.critic.textgen.cache import CachedGenerator
from selfdistill.critic.textgen.interface import Generation
from selfdistill.critic.textgen.local import load_local_generator
from selfdistill.planning.dry_run import dry_run
from selfdistill.tasks.arithmetic.tokenizer import build_tokenizer
from selfdistill.training.loop import train

TOKENIZER = build_tokenizer()


def save_model(folder: Path, *, positions: int) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=positions,
        eos_token_id=TOKENIZER.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def settings(tmp_path: Path, *, positions: int, max_new_tokens: int, **engine: Any) -> Config:
    critic = save_model(tmp_path / "critic", positions=positions)
    solver = save_model(tmp_path / "solver", positions=256)
    settings = {"model": str(critic), "name": "transformers", "max_new_tokens": max_new_tokens}
    return Config.model_validate(
        {
            "model": str(solver),
            "output_dir": str(tmp_path / "run"),
            "device": "cpu",
            "task": {"step_counts": [1]},
            "method": {
                "name": "stepalign",
                "group_size": 2,
                "critic": {"name": "llm", "engine": {**settings, **engine}},
            },
            "rollout": {"max_new_tokens": 8},
        }
    )


def shown(config: Config) -> str:
    console = Console(file=io.StringIO(), width=200)
    dry_run(config, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def shortest(tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many tokens the critic is told besides question and attempt."""
    folder = tmp_path_factory.mktemp("critic")
    config = settings(folder, positions=4096, max_new_tokens=8)
    engine = load_local_generator(config.method.critic.engine, device="cpu")
    return len(engine._chat.encode(SHORTEST_PROMPT))


def test_no_room_for_any_answer_is_refused_before_the_first_evaluation(
    tmp_path: Path, shortest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path, positions=shortest + 30, max_new_tokens=31)

    def sampled(*args: object, **kwargs: object) -> None:
        raise AssertionError("nothing may be sampled")

    monkeypatch.setattr("selfdistill.rollout.engine.sample", sampled)
    monkeypatch.setattr("selfdistill.training.questions.sample", sampled)
    monkeypatch.setattr("selfdistill.rollout.attempts.sample", sampled)
    expected = (
        rf"method\.critic\.engine\.max_new_tokens is 31: with the {shortest} tokens .* more than "
        rf"the {shortest + 30} positions of its model\. Expected less than 30, "
    )
    for action in (train, shown):
        with pytest.raises(ConfigError, match=expected):
            action(config)


def test_the_cache_and_vllms_own_limit_are_asked_as_well(tmp_path: Path, shortest: int) -> None:
    config = settings(tmp_path, positions=shortest + 30, max_new_tokens=31)
    inner = load_local_generator(config.method.critic.engine, device="cpu")
    with pytest.raises(ConfigError, match="max_new_tokens is 31"):
        CachedGenerator(inner, tmp_path / "cache").check(SHORTEST_PROMPT)
    engine = {"name": "vllm", "max_length": shortest + 10}
    config = settings(tmp_path, positions=4096, max_new_tokens=31, **engine)
    with pytest.raises(ConfigError, match=f"the {shortest + 10} positions"):
        load_local_generator(config.method.critic.engine, device="cpu").check(SHORTEST_PROMPT)


def test_a_dry_run_says_how_long_an_attempt_may_be(tmp_path: Path, shortest: int) -> None:
    text = shown(settings(tmp_path, positions=4096, max_new_tokens=31))
    assert "has 4096 positions: about" in text
    assert "for an attempt of up to 8 (enough for all)" in text
    text = shown(settings(tmp_path, positions=shortest + 40, max_new_tokens=31))
    assert f"has {shortest + 40} positions: about" in text
    assert "(longer ones get no critique)" in text


def test_an_attempt_that_is_too_long_gets_no_critique_and_stops_nobody(
    tmp_path: Path, shortest: int
) -> None:
    config = settings(tmp_path, positions=shortest + 60, max_new_tokens=20)
    generator = load_local_generator(config.method.critic.engine, device="cpu")
    prompts = ["4 + 7", SHORTEST_PROMPT + " 4" * 100, "8"]
    answers = dict(generator.generate(prompts))
    assert answers[1] == Generation("", finished=False)
    assert answers[0] == dict(generator.generate(["4 + 7"]))[0]
    assert answers[2] == dict(generator.generate(["8"]))[0]
    assert dict(generator.generate(prompts[1:2])) == {0: Generation("", finished=False)}
