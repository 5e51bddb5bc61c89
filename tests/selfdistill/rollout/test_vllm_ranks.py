"""Several ranks and several servers with the real vLLM: tiny random models, float32."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
from process_groups import in_processes
from tiny_runs import assert_close_runs, lines
from vllm_models import TOKENIZER, VLLMServer, disagreement, moved, save, tiny
from vllm_ranks import rank_of_runs, replayed

from selfdistill.config import Config, VLLMServerEngineConfig
from selfdistill.rollout.engine import EngineError, SamplingParams
from selfdistill.rollout.vllm_server_engine import VLLMServerEngine
from selfdistill.training.loop import train

# `make test-vllm` is for these tests: there a vLLM that cannot be imported fails them.
if os.environ.get("SELFDISTILL_REQUIRE_VLLM") != "1":
    pytest.importorskip(
        "vllm",
        reason="needs vllm: make test-vllm; with a GPU also pip install vllm",
    )

# See test_vllm_engine.py.
NATS = 1e-4
PROMPTS = [[1, 4, *[9, 10, 11, 12] * 10, 5], [1, 4, 8, 5], [1, 4, 7, 13, 14, 5]]
PARAMS = SamplingParams(temperature=1.3, max_new_tokens=16, seed=3)


def run_settings(folder: Path, output_dir: Path, engine: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": str(folder),
        "output_dir": str(output_dir),
        "device": "cpu",
        "task": {"step_counts": [1, 2]},
        "method": {"name": "stepalign", "group_size": 2, "loss": {"importance_clip": 2}},
        "steps": 3,
        "prompts_per_step": 3,
        "rollout": {"max_new_tokens": 8, "engine": engine},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0},
        "evaluation": {"every": 2, "problems": 3, "samples": 1},
        "max_empty_steps": None,
    }


@pytest.mark.parametrize("shared", [False, True], ids=["an engine each", "one engine"])
def test_two_ranks_give_the_result_of_one_without_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """vLLM samples on both and follows; one rank then learns from the same token ids.

    Of the three problems of a step one rank has one and the other two, also where they sample
    together.
    """
    # vLLM 0.32 gives the memory that ranks share on a CPU the same name in every run, and does not
    # start where one that was killed, or ended as these forks do, has left it.
    for left in Path("/dev/shm").glob("-tp:*-cpushm_*"):
        left.unlink()
    save(tiny(tied=True, seed=0), tmp_path / "model")
    vllm = {
        "name": "vllm", "dtype": "float32", "max_length": 256, "kv_cache_gib": 0.125,
        "enforce_eager": True, "tensor_parallel_size": 2 if shared else 1,
    }  # fmt: skip
    kinds: dict[str, dict[str, int] | None] = {"whole": None, "adapter": {"r": 2}}
    in_processes(
        rank_of_runs,
        [
            run_settings(tmp_path / "model", tmp_path / f"{kind}-two", vllm) | {"adapter": adapter}
            for kind, adapter in kinds.items()
        ],
        tmp_path,
    )
    for kind, adapter in kinds.items():
        two, one = tmp_path / f"{kind}-two", tmp_path / f"{kind}-one"
        parts = [json.loads((two / f"drawn-{rank}.json").read_text()) for rank in (0, 1)]
        assert all(parts)
        records = lines(two, "metrics.jsonl")
        assert all(record["engine_disagreement"] < NATS for record in records)
        alone = run_settings(tmp_path / "model", one, {"name": "transformers"})
        replayed(alone | {"adapter": adapter}, parts[0] | parts[1], monkeypatch)
        assert_close_runs(one, two, not_compared={"engine_disagreement"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tiny(tied=True, seed=1), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def servers(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[VLLMServer]]:
    logs = tmp_path_factory.mktemp("logs")
    running = [VLLMServer(folder, logs / f"{number}.log") for number in range(2)]
    try:
        for server in running:
            server.wait()
        yield running
    finally:
        for server in running:
            server.kill()


def engine_of(folder: str, servers: list[VLLMServer], **settings: Any) -> VLLMServerEngine:
    urls = tuple(server.url for server in servers)
    config = VLLMServerEngineConfig(
        base_urls=urls, **{"dtype": "float32", "patience": 0.0, **settings}
    )
    return VLLMServerEngine(folder, TOKENIZER, config)


def adapted(folder: str) -> Any:
    names = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]
    base = tiny(tied=True, seed=1).__class__.from_pretrained(folder)
    return peft.get_peft_model(base, peft.LoraConfig(r=5, lora_alpha=10, target_modules=names))


def test_adapters_are_loaded_into_running_servers(folder: str, servers: list[VLLMServer]) -> None:
    engine, model = engine_of(folder, servers), adapted(folder)
    groups = engine.generate(PROMPTS, group_size=4, params=PARAMS)
    for _ in range(5):
        assert disagreement(model, PROMPTS, groups, 1.3) < NATS
        moved(model, 0.05)
        assert disagreement(model, PROMPTS, groups, 1.3) > 1e-2
        engine.sync(model)
        groups = engine.generate(PROMPTS, group_size=4, params=PARAMS)
    assert disagreement(model, PROMPTS, groups, 1.3) < NATS
    rollouts = [rollout for group in groups for rollout in group]
    assert len({tuple(rollout.token_ids) for rollout in rollouts}) == len(rollouts)
    assert {rollout.finished for rollout in rollouts} == {True, False}


def test_what_a_server_cannot_load_is_named(folder: str, servers: list[VLLMServer]) -> None:
    base = adapted(folder).get_base_model()
    wide = peft.get_peft_model(base, peft.LoraConfig(r=16, target_modules=["q_proj"]))
    with pytest.raises(EngineError, match=r"does not load the adapter: HTTP .*rank.*max-lora-rank"):
        engine_of(folder, servers).sync(wide)


def test_a_run_draws_ahead(folder: str, servers: list[VLLMServer], tmp_path: Path) -> None:
    engine = {
        "name": "vllm_server", "base_urls": [server.url for server in servers],
        "dtype": "float32", "max_staleness": 1,
    }  # fmt: skip
    settings = run_settings(Path(folder), tmp_path / "run", engine)
    train(Config.model_validate(settings | {"adapter": {"r": 2}}))
    records = lines(tmp_path / "run", "metrics.jsonl")
    assert len(records) == 3
    assert all(record["engine_disagreement"] < NATS for record in records)


def test_a_server_that_is_killed_in_the_middle_of_a_step_loses_nothing(
    folder: str, servers: list[VLLMServer]
) -> None:
    """The last test of the two servers: it ends them."""
    engine, model = engine_of(folder, servers, concurrency=1), moved(adapted(folder), 0.05)
    engine.sync(model)
    params = SamplingParams(temperature=1.3, max_new_tokens=64, seed=5)
    drawing = engine.begin(PROMPTS, group_size=12, params=params)
    time.sleep(0.1)
    servers[0].kill()
    groups = drawing.finish()
    assert [len(group) for group in groups] == [12, 12, 12]
    assert disagreement(model, PROMPTS, groups, 1.3) < NATS
    away = [server.away for server in engine.servers._servers]
    assert away[0] is not None
    assert away[1] is None
    servers[1].kill()
    with pytest.raises(EngineError) as caught:
        engine.generate(PROMPTS, group_size=1, params=PARAMS)
    assert all(server.url in str(caught.value) for server in servers)
