"""What the vLLM engine asks of vLLM where no GPU and no second rank is at hand, with a stand-in."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_solvers import write_solver

from selfdistill.config import VLLMEngineConfig
from selfdistill.rollout.engine import SamplingParams
from selfdistill.rollout.vllm_engine import VLLMEngine
from selfdistill.tasks.arithmetic.tokenizer import build_tokenizer

Make = Callable[..., VLLMEngine]


class StandIn:
    """Notes what it is asked; every completion is one end-of-sequence token."""

    def __init__(self, asked: list[str], options: dict[str, Any]) -> None:
        self.asked = asked
        self.options = options
        self.detached = 0

        def detach() -> None:
            self.detached += 1

        core = SimpleNamespace(_finalizer=SimpleNamespace(detach=detach))
        self.llm_engine = SimpleNamespace(engine_core=core)

    def generate(self, requests: list[Any], *args: Any, **options: Any) -> list[Any]:
        self.asked.append("generate")
        token = SimpleNamespace(token_ids=[2], logprobs=[{2: SimpleNamespace(logprob=-1.0)}])
        return [SimpleNamespace(outputs=[token]) for _ in requests]

    def sleep(self, *, level: int) -> None:
        self.asked.append(f"sleep {level}")

    def wake_up(self) -> None:
        self.asked.append("wake")

    def collective_rpc(self, name: str, args: Any) -> None:
        self.asked.append(name)

    def reset_prefix_cache(self) -> bool:
        return True


@pytest.fixture
def asked() -> list[str]:
    return []


@pytest.fixture
def make(
    asked: list[str], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Make:
    folder = str(write_solver(tmp_path_factory.mktemp("model")))
    fake: Any = SimpleNamespace(
        LLM=lambda source, **options: StandIn(asked, options),
        SamplingParams=lambda **options: options,
    )
    monkeypatch.setitem(sys.modules, "vllm", fake)
    return lambda **settings: VLLMEngine(folder, build_tokenizer(), VLLMEngineConfig(**settings))


@pytest.mark.parametrize("sleeps", [True, False])
def test_it_sleeps_between_rollouts_and_wakes_for_whatever_comes(
    make: Make, asked: list[str], sleeps: bool
) -> None:
    engine = make(sleep=sleeps)
    model: Any = torch.nn.Module()
    layer = torch.nn.Linear(2, 2)
    model.get_output_embeddings = model.get_input_embeddings = lambda: layer
    params = SamplingParams(max_new_tokens=1)
    engine.generate([[1]], group_size=1, params=params)
    engine.generate([[1]], group_size=1, params=params)
    engine.sync(model)
    engine.generate([[1]], group_size=1, params=params)
    expected = [
        *("generate", "sleep 1", "wake", "generate", "sleep 1"),
        *("wake", "load_student_weights", "generate", "sleep 1"),
    ]
    assert asked == [what for what in expected if sleeps or what not in ("sleep 1", "wake")]
    assert engine._llm.options["enable_sleep_mode"] == sleeps


def test_each_of_several_ranks_starts_its_own_at_once(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = make()
    assert "_llm" not in vars(alone)
    for name, value in {"is_initialized": True, "get_world_size": 2, "get_rank": 1}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")  # the first GPU of the second machine
    engine = make()
    llm = vars(engine)["_llm"]
    assert llm.options["distributed_executor_backend"] == "external_launcher"
    assert llm.detached == 1
    assert (os.environ["RANK"], os.environ["LOCAL_RANK"]) == ("1", "0")
