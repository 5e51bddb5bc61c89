"""Training that teaches nothing: it says so at once, and ends with the counts."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from completion_server import Answer, Server, completion
from rich.console import Console
from tiny_runs import tensors

import selfdistill.training.loop
from selfdistill import cli
from selfdistill.config import Config, save_config
from selfdistill.critic.llm import LLMCritic
from selfdistill.critic.textgen.server import ServerGenerator
from selfdistill.runlog import JsonLines
from selfdistill.training.empty_steps import NothingLearnedError
from selfdistill.training.loop import train


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def make_config(solver: Path, output: Path, **changes: Any) -> Config:
    settings: dict[str, Any] = {
        "model": str(solver),
        "output_dir": output,
        "task": {"step_counts": [1]},
        "method": {"name": "grpo", "group_size": 2},
        "device": "cpu",
        "steps": 20,
        "prompts_per_step": 2,
        "rollout": {"max_new_tokens": 3},
        "evaluation": {"every": 50, "problems": 1, "samples": 1},
        "checkpoint": {"every": 50},
    }
    return Config.model_validate({**settings, **changes})


def with_critic(server: Server, **critic: Any) -> dict[str, Any]:
    engine = {"name": "server", "base_url": server.url, "model": "judge", "retries": 0}
    return {
        "name": "stepalign",
        "group_size": 2,
        "critic": {"name": "llm", "engine": engine, **critic},
    }


def run(config: Config, *, resume: bool = False) -> tuple[str, str]:
    """Train until it is refused; return what was printed and the error."""
    output = io.StringIO()
    with pytest.raises(NothingLearnedError) as caught:
        train(config, resume=resume, console=Console(file=output, width=1000))
    return output.getvalue(), str(caught.value)


def critique(text: str) -> Answer:
    return completion(f"<case>D</case><first_change>1</first_change><text>{text}</text>")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (
            lambda prompt, _: completion("I cannot help with that."),
            "the answer does not have the form <case>, <first_change>, <text>",
        ),
        (lambda prompt, _: completion(None, "length"), "the length limit cut the answer off"),
        (lambda prompt, _: critique("<answer> -1"), "the critique's own final answer is wrong"),
    ],
)
def test_a_critic_without_a_usable_answer(
    solver_dir: Path, tmp_path: Path, server: Server, answer: Callable[..., Answer], reason: str
) -> None:
    server.answer = answer
    config = make_config(
        solver_dir, tmp_path / "run", method=with_critic(server), max_empty_steps=3
    )
    printed, error = run(config)
    reasons = f"nothing to show to the teacher (4: {reason})"
    assert f"Step 1 taught nothing: of 4 rollouts 4 had {reasons}" in printed
    assert printed.count("taught nothing") == 1
    assert "the last 3 of 3 steps taught nothing: of 12 rollouts 12 had nothing to show" in error
    assert f"(12: {reason})" in error
    assert "critic.fallback" in error
    assert len(JsonLines(tmp_path / "run" / "metrics.jsonl").read()) == 3
    assert (tmp_path / "run" / "checkpoints" / "last").resolve().name == "step-000003"


def test_groups_that_are_all_tied(solver_dir: Path, tmp_path: Path) -> None:
    printed, error = run(make_config(solver_dir, tmp_path / "run"))
    assert "4 gave no signal (all rewards of a prompt are equal)" in printed
    assert "the last 10 of 10 steps" in error
    assert "raise prompts_per_step or group_size" in error


def test_a_mask_that_keeps_nothing(solver_dir: Path, tmp_path: Path) -> None:
    method = {"name": "refsol", "group_size": 2, "loss": {"advantage_mask": {"threshold": 1e9}}}
    _, error = run(make_config(solver_dir, tmp_path / "run", method=method, max_empty_steps=2))
    assert "the advantage mask keeps none" in error
    assert "Lower method.loss.advantage_mask.threshold" in error


def test_a_short_run_that_taught_nothing_is_no_success(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(solver_dir, tmp_path / "run", steps=2)
    save_config(config, tmp_path / "run.yaml")
    monkeypatch.setattr(sys, "argv", ["selfdistill", "train", str(tmp_path / "run.yaml")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1


def test_steps_before_an_interruption_count_and_one_that_teaches_begins_anew(
    solver_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(solver_dir, tmp_path / "run", steps=2, max_empty_steps=3)
    run(config)  # two of two
    run(config, resume=True)  # and nothing is left to do
    longer = config.model_copy(update={"steps": 9})
    _, error = run(longer, resume=True)
    assert "the last 3 of 3 steps" in error

    judge = selfdistill.training.loop.judge
    calls = 0

    def right_once(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        attempts = judge(*args)
        if calls == 1:  # the rewards of one group differ
            verdicts = attempts[0].verdicts
            verdicts[0] = type(verdicts[0])("1", True, True, None, None, True)
        return attempts

    monkeypatch.setattr(selfdistill.training.loop, "judge", right_once)
    _, error = run(longer, resume=True)
    assert "the last 3 of 7 steps" in error  # step 4 taught something


def test_null_goes_on_whatever_happens(solver_dir: Path, tmp_path: Path) -> None:
    config = make_config(solver_dir, tmp_path / "run", steps=12, max_empty_steps=None)
    assert train(config, console=Console(file=io.StringIO())).step == 12
    assert tensors(tmp_path / "run")


def test_a_critic_counts_the_answers_of_one_call(server: Server) -> None:
    answers = {"a": completion("no form"), "b": completion(None, "length"), "c": critique("fine")}
    server.answer = lambda prompt, _: answers[prompt[-1]]
    config = Config.model_validate(
        {"model": "m", "output_dir": "o", "method": with_critic(server)}
    ).method.critic.engine
    critic = LLMCritic(ServerGenerator(config))
    critic.prompt = lambda problem, response: response  # type: ignore[method-assign]
    for _ in range(2):
        found = critic.critique([None] * 3, ["a", "b", "c"])  # type: ignore[list-item]
        assert [critique is not None for critique in found] == [False, False, True]
        assert dict(critic.unusable) == {
            "the answer does not have the form <case>, <first_change>, <text>": 1,
            "the length limit cut the answer off": 1,
        }
