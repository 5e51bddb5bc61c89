"""Training with servers of vLLM, stand-ins for them here, and with rollouts drawn ahead."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from tiny_runs import (
    SmoothAdamW,
    assert_close_runs,
    assert_same_run,
    forked_runs,
    lines,
    ranks_settings,
)
from vllm_stand_in import StandIn

from selfdistill.config import Config
from selfdistill.planning.dry_run import dry_run
from selfdistill.rollout.engine import EngineError
from selfdistill.rollout.vllm_server_engine import Drawing, VLLMServerEngine
from selfdistill.training import loop
from selfdistill.training.agreement import EngineMismatchError
from selfdistill.training.loop import train
from selfdistill.training.state_file import CheckpointError


@pytest.fixture
def servers(sharp_solver_dir: Path) -> Iterator[list[StandIn]]:
    running = [StandIn(sharp_solver_dir) for _ in range(2)]
    yield running
    for server in running:
        server.die()


def settings(servers: list[StandIn], output_dir: Path, **changes: Any) -> dict[str, Any]:
    engine = {
        "name": "vllm_server",
        "base_urls": [server.url for server in servers],
        "dtype": "float32",
        "patience": 0,
        "max_staleness": changes.pop("max_staleness", 1),
    }
    return {
        **ranks_settings(servers[0].folder, output_dir),
        "adapter": {"r": 2},
        "method": {"name": "refsol", "group_size": 2, "loss": {"importance_clip": 2}},
        "rollout": {"max_new_tokens": 4, "engine": engine},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0},
        "steps": 3,
        "evaluation": {"every": 2, "problems": 2, "samples": 1},
        **changes,
    }


def config_of(*args: Any, **changes: Any) -> Config:
    return Config.model_validate(settings(*args, **changes))


@pytest.mark.parametrize("staleness", [0, 1])
def test_what_is_drawn_when_and_by_which_weights(
    servers: list[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, staleness: int
) -> None:
    events: list[str] = []

    def record(kind: type, name: str, label: str) -> None:
        function = getattr(kind, name)

        def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
            if label == "begin":
                size = kwargs["params"].max_new_tokens
                events.append(f"{len(args[0]) * kwargs['group_size']} of {size}")
            else:
                events.append(label)
            return function(self, *args, **kwargs)

        monkeypatch.setattr(kind, name, recorded)

    record(VLLMServerEngine, "begin", "begin")
    record(VLLMServerEngine, "sync", "sync")
    record(torch.optim.AdamW, "step", "update")
    record(Drawing, "finish", "finish")
    config = config_of(servers, tmp_path / "run", max_staleness=staleness, steps=3)
    config = config.model_copy(
        update={"rollout": config.rollout.model_copy(update={"max_new_tokens": 18})}
    )
    train(config)
    evaluation = ["2 of 18", "finish"]
    if staleness == 0:
        step = ["6 of 18", "finish", "update", "sync"]
        assert events == [*evaluation, *step, *step, *evaluation, *step, *evaluation]
    else:
        drawing, probe, done = ["6 of 18"], ["2 of 8", "finish"], ["update", "finish", "sync"]
        assert events == [
            *evaluation,
            *drawing, "finish", *drawing, *done,
            *probe, *drawing, *done, *evaluation,
            *probe, "update", "sync", *evaluation,
        ]  # fmt: skip
    records = lines(tmp_path / "run", "metrics.jsonl")
    assert all(0 <= record["engine_disagreement"] < 1e-4 for record in records)
    assert all(record["grad_norm"] > 0 for record in records)
    # Every evaluation samples from the weights of its step, and so does the last one; then the
    # servers are left without an adapter.
    gc.collect()
    loaded = [body["lora_name"] for path, body in servers[0].asked if path == "load_lora_adapter"]
    drawn = [body["model"] for path, body in servers[0].asked if path == "completions"]
    assert drawn[-1] == loaded[-1]
    assert servers[0].asked[-1] == ("unload_lora_adapter", {"lora_name": loaded[-1]})
    assert [server.adapters for server in servers] == [[] for _ in servers]


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(
    servers: list[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, staleness: int
) -> None:
    changes = {"max_staleness": staleness, "steps": 3}
    train(config_of(servers, tmp_path / "whole", **changes))
    judge, calls = loop.judge, 0

    def dies(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise EngineError("the critic is gone")
        return judge(*args)

    monkeypatch.setattr(loop, "judge", dies)
    with pytest.raises(EngineError, match="the critic is gone"):
        train(config_of(servers, tmp_path / "stopped", **changes))
    last = tmp_path / "stopped" / "checkpoints" / "last"
    assert (last / "rollouts.json").exists() == bool(staleness)
    assert len(lines(tmp_path / "stopped", "metrics.jsonl")) == 2
    # Servers may have moved meanwhile.
    moved = [servers[1], StandIn(servers[0].folder)]
    go_on = config_of(moved, tmp_path / "stopped", **changes)
    train(go_on, resume=True)
    moved[1].die()
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    # Behind the last step nothing was drawn.
    assert not (last / "rollouts.json").exists()
    if staleness:
        with pytest.raises(CheckpointError, match=r"steps \(3 there, 6 here\)"):
            train(go_on.model_copy(update={"steps": 6}), resume=True)


def test_rollouts_of_the_weights_before_are_weighed(servers: list[StandIn], tmp_path: Path) -> None:
    """With a clip under every ratio all weights are the clip; far above, they are the ratios."""
    losses = []
    for clip in (1e-3, 1e3):
        method = {"name": "refsol", "group_size": 2, "loss": {"importance_clip": clip}}
        train(config_of(servers, tmp_path / f"{clip}", method=method, steps=2))
        losses.append([line["loss"] for line in lines(tmp_path / f"{clip}", "metrics.jsonl")])
    ratios = [high / (low / 1e-3) for low, high in zip(*losses, strict=True)]
    assert ratios[0] == pytest.approx(1, abs=1e-4)  # of the weights at hand
    assert abs(ratios[1] - 1) > 1e-3


@pytest.mark.slow
def test_two_ranks_give_the_result_of_one_and_one_goes_on_alone(
    servers: list[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = settings(servers, tmp_path / "ranks", steps=3, checkpoint={"keep": "all"})
    # One request after the other, so that a rank still draws when the other has all it needs.
    case["rollout"]["engine"]["concurrency"] = 1
    for server in servers:
        server.delay = 0.1
    answer = forked_runs("ranks", {"cases": {"ranks": case}}, tmp_path)
    assert answer["ranks"]["ranks_agree"]
    assert_close_runs(tmp_path / "ranks" / "1", tmp_path / "ranks" / "2")
    # Each adapter was handed to each server once by each of the two runs.
    for server in servers:
        assert server.count("load_lora_adapter") == 3 + 3
    # One rank takes over what two have drawn.
    shutil.copytree(tmp_path / "ranks" / "2", tmp_path / "one", symlinks=True)
    last = tmp_path / "one" / "checkpoints" / "last"
    last.unlink()
    last.symlink_to("step-000002")
    assert [len(group) for group in json.loads((last / "rollouts.json").read_text())] == [2, 2, 2]
    monkeypatch.setattr(torch.optim, "AdamW", SmoothAdamW)
    train(Config.model_validate({**case, "output_dir": tmp_path / "one"}), resume=True)
    assert_close_runs(tmp_path / "ranks" / "2", tmp_path / "one")


def test_stale_servers_are_found_while_rollouts_are_drawn_ahead(
    servers: list[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, forgotten = servers[1].answer, []

    def remembers(path: str, body: dict[str, Any]) -> tuple[int, str]:
        if path == "unload_lora_adapter":
            forgotten.append(servers[1]._models[body["lora_name"]])
        return answer(path, body)

    def keeps_the_old_one(path: str, body: dict[str, Any]) -> tuple[int, str]:
        if path == "load_lora_adapter":
            servers[1]._models[body["lora_name"]] = forgotten[0]
            return 200, "Success"
        return answer(path, body)

    monkeypatch.setattr(servers[1], "answer", remembers)
    train(config_of(servers, tmp_path / "first", steps=1))
    gc.collect()
    monkeypatch.setattr(servers[1], "answer", keeps_the_old_one)
    with pytest.raises(EngineMismatchError, match="processed_logprobs"):
        train(config_of(servers, tmp_path / "run", seed=1))
    assert len(lines(tmp_path / "run", "metrics.jsonl")) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": None}, "set adapter: {}, or rollout.engine.name: vllm"),
        ({"method": {"name": "refsol"}}, "set method.loss.importance_clip"),
        ({"top_p": 0.9}, "set them to 0, 1 and 0"),
        ({"adapter": {"r": 513}}, "up to rank 512"),
        ({"max_staleness": 2}, "less than or equal to 1"),
        ({"base_urls": []}, "at least 1 item"),
        ({"base_urls": ["localhost:8000"]}, "match pattern"),
        ({"base_urls": ["http://me:secret@host/v1"]}, "match pattern"),
    ],
)
def test_combinations_without_a_meaning_are_refused(
    servers: list[StandIn], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    wanted = settings(servers, tmp_path)
    for name, value in changes.items():
        where = wanted["rollout"]["engine"] if name in wanted["rollout"]["engine"] else wanted
        where = wanted["rollout"] if name == "top_p" else where
        where[name] = value
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(wanted)


def test_grpo_weighs_by_itself(servers: list[StandIn], tmp_path: Path) -> None:
    config = config_of(servers, tmp_path / "run", method={"name": "grpo", "group_size": 2})
    assert config.rollout.engine.max_staleness == 1


def test_a_dry_run_asks_no_server(servers: list[StandIn], tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    dry_run(config_of(servers, tmp_path / "run"), console)
    assert "on the servers" in console.export_text()
    assert servers[0].asked == []
