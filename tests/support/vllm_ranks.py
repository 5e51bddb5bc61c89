"""One rank of a run that samples with vLLM, and the same run given the same token ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tiny_runs import SmoothAdamW

from selfdistill.config import Config
from selfdistill.rollout.engine import Rollout, SamplingParams
from selfdistill.training import loop, solver

# By prompt and seed of its stream: the rollouts that somebody drew.
Drawn = dict[str, list[dict[str, Any]]]


def recording(generate: Callable[..., Any], drawn: Drawn) -> Callable[..., Any]:
    """Write down what an engine draws."""

    def generate_and_write(
        prompts: Sequence[Sequence[int]], *, group_size: int, params: SamplingParams
    ) -> list[list[Rollout]]:
        groups: list[list[Rollout]] = generate(prompts, group_size=group_size, params=params)
        for place, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
            drawn[_key(prompt, params.seed + place)] = [asdict(rollout) for rollout in group]
        return groups

    return generate_and_write


class Replay:
    """Returns what somebody drew (implements `selfdistill.rollout.engine.RolloutEngine`)."""

    def __init__(self, drawn: Drawn) -> None:
        self._drawn = drawn

    def generate(
        self, prompts: Sequence[Sequence[int]], *, group_size: int, params: SamplingParams
    ) -> list[list[Rollout]]:
        return [
            [Rollout(**rollout) for rollout in self._drawn[_key(prompt, params.seed + place)]]
            for place, prompt in enumerate(prompts)
        ]

    def wait_for_group(self) -> None:
        pass

    def sync(self, model: torch.nn.Module) -> None:
        pass


def _key(prompt: Sequence[int], seed: int) -> str:
    return f"{list(prompt)} {seed}"


def rank_of_runs(rank: int, runs: Sequence[dict[str, Any]]) -> None:
    """Train as one rank of the group that is there; what it drew goes to drawn-RANK.json."""
    torch.optim.AdamW = SmoothAdamW  # type: ignore[misc]
    load = loop.load_solver
    for settings in runs:
        loop.load_solver = load
        _rank_of_a_run(rank, settings)


def _rank_of_a_run(rank: int, settings: dict[str, Any]) -> None:
    config = Config.model_validate(settings)
    drawn: Drawn = {}
    load = loop.load_solver

    def load_and_record(*args: Any) -> Any:
        loaded = load(*args)
        engine: Any = loaded.engine
        engine.generate = recording(engine.generate, drawn)
        return loaded

    loop.load_solver = load_and_record  # type: ignore[assignment]
    loop.train(config, console=Console(quiet=True))
    path = Path(settings["output_dir"], f"drawn-{rank}.json")
    path.write_text(json.dumps(drawn))


def replayed(settings: dict[str, Any], drawn: Drawn, monkeypatch: Any) -> None:
    """Train alone, with the rollouts that somebody drew."""
    monkeypatch.setattr(torch.optim, "AdamW", SmoothAdamW)
    load = solver.load_solver
    monkeypatch.setattr(
        loop, "load_solver", lambda *args: replace(load(*args), engine=Replay(drawn))
    )
    loop.train(Config.model_validate(settings), console=Console(quiet=True))
