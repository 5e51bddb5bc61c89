"""The engine that asks servers of vLLM, with stand-ins for them (`vllm_stand_in.py`).

tests/selfdistill/rollout/test_vllm_ranks.py asks real ones.
"""

from __future__ import annotations

import gc
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_solvers import write_solver
from transformers import AutoModelForCausalLM
from vllm_stand_in import StandIn

from selfdistill.config import VLLMServerEngineConfig
from selfdistill.rollout import vllm_servers
from selfdistill.rollout.engine import EngineError, NotANumberError, Rollout, SamplingParams, sample
from selfdistill.rollout.transformers_engine import TransformersEngine
from selfdistill.rollout.vllm_server_engine import VLLMServerEngine
from selfdistill.tasks.arithmetic.tokenizer import build_tokenizer

PROMPTS = [[1, 4, 8, 5], [1, 4, 7, 13, 14, 5], [1, 5]]
PARAMS = SamplingParams(temperature=1.3, max_new_tokens=6, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_solver(tmp_path_factory.mktemp("solver"))


@pytest.fixture
def servers(folder: Path) -> Iterator[list[StandIn]]:
    running = [StandIn(folder) for _ in range(2)]
    yield running
    for server in running:
        server.die()


def engine_of(servers: list[StandIn], **settings: Any) -> VLLMServerEngine:
    usual = {"dtype": "float32", "patience": 0.0, "concurrency": 2}
    urls = tuple(server.url for server in servers)
    config = VLLMServerEngineConfig(**{"base_urls": urls, **usual, **settings})
    return VLLMServerEngine(str(servers[0].folder), build_tokenizer(), config)


def adapted(folder: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder)
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))


def moved(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def answers(groups: list[list[Rollout]]) -> list[list[list[int]]]:
    return [[rollout.token_ids for rollout in group] for group in groups]


def expected(model: Any, requests: list[dict[str, Any]]) -> dict[int, list[int]]:
    """By seed: what the model itself samples for the requests of a server."""
    own = TransformersEngine(model, build_tokenizer())
    found = {}
    for body in requests:
        params = replace(PARAMS, seed=body["seed"])
        ((rollout,),) = own.generate([body["prompt"]], group_size=1, params=params)
        found[body["seed"]] = rollout.token_ids
    return found


def test_prompts_are_shared_and_adapters_follow(folder: Path, servers: list[StandIn]) -> None:
    engine, model = engine_of(servers), adapted(folder)
    first = engine.generate(PROMPTS, group_size=2, params=PARAMS)
    assert [server.count("completions") for server in servers] == [4, 2]
    assert servers[0].asked[1][1]["model"] == str(folder)
    names = []
    for _ in range(3):
        engine.sync(moved(model))
        (name,) = servers[0].adapters  # the one before is unloaded
        assert servers[1].adapters == [name]
        names.append(name)
        for server in servers:
            server.asked.clear()
        groups = engine.generate(PROMPTS, group_size=2, params=PARAMS)
        bodies = [body for server in servers for _, body in server.asked]
        assert {body["model"] for body in bodies} == {name}
        assert len({body["seed"] for body in bodies}) == 6
        wanted = sorted(expected(model, bodies).values())
        assert sorted(ids for group in answers(groups) for ids in group) == wanted
        assert groups != first
        assert engine.generate(PROMPTS, group_size=2, params=PARAMS) == groups
    assert len(set(names)) == 3
    # Prompt i draws from the stream of seed + i, so shares of several ranks are those of one.
    rest = engine.generate(PROMPTS[1:], group_size=2, params=replace(PARAMS, seed=4))
    assert rest == groups[1:]
    # Two engines, of two runs or of one that was started again, have names of their own.
    other = engine_of(servers)
    other.sync(model)
    assert len(servers[0].adapters) == 2


def test_the_last_adapter_leaves_the_servers_with_the_engine(
    folder: Path, servers: list[StandIn]
) -> None:
    engine = engine_of(servers)
    engine.sync(moved(adapted(folder)))
    assert [len(server.adapters) for server in servers] == [1, 1]
    servers[1].die()  # nobody waits for one that is gone
    del engine
    gc.collect()
    assert servers[0].adapters == []


def test_the_folder_for_adapters_is_chosen(
    folder: Path, servers: list[StandIn], tmp_path: Path
) -> None:
    engine, model = engine_of(servers, adapters=tmp_path / "shared"), adapted(folder)
    for _ in range(2):
        engine.sync(model)
        (kept,) = (tmp_path / "shared").iterdir()  # the one before is deleted
        assert kept.name == servers[0].adapters[-1]
        assert (kept / "adapter_model.safetensors").is_file()
    del engine
    assert not [*(tmp_path / "shared").iterdir()]
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match=r"cannot write the adapter .*rollout.engine.adapters"):
        engine_of(servers, adapters=tmp_path / "file").sync(model)


@pytest.mark.parametrize("lives", [0, 1, 3])
def test_what_a_dead_server_had_left_is_asked_of_the_other(
    folder: Path, servers: list[StandIn], lives: int
) -> None:
    engine = engine_of(servers)
    engine.sync(moved(adapted(folder)))
    whole = engine.generate(PROMPTS, group_size=4, params=PARAMS)
    servers[0].lives = lives
    assert engine.generate(PROMPTS, group_size=4, params=PARAMS) == whole
    # It stays away until the weights change next; then it is asked again, and missed.
    assert engine.generate(PROMPTS, group_size=4, params=PARAMS) == whole
    engine.sync(moved(adapted(folder)))
    assert engine.generate(PROMPTS, group_size=4, params=PARAMS) != whole


def test_a_server_that_comes_back_gets_the_adapter(folder: Path, servers: list[StandIn]) -> None:
    engine = engine_of(servers[:1], patience=20.0)
    engine.sync(moved(adapted(folder)))
    whole = engine.generate(PROMPTS, group_size=2, params=PARAMS)
    servers[0].lives = 2
    again: list[StandIn] = []
    timer = threading.Timer(0.3, lambda: again.append(StandIn(folder, port=servers[0].port)))
    timer.start()
    try:
        assert engine.generate(PROMPTS, group_size=2, params=PARAMS) == whole
        assert again[0].adapters == servers[0].adapters
    finally:
        timer.join()
        again[0].die()


def test_one_that_has_forgotten_the_adapter_is_away(folder: Path, servers: list[StandIn]) -> None:
    engine = engine_of(servers)
    engine.sync(moved(adapted(folder)))
    whole = engine.generate(PROMPTS, group_size=2, params=PARAMS)
    servers[1]._models.clear()
    assert engine.generate(PROMPTS, group_size=2, params=PARAMS) == whole
    assert servers[1].count("completions") <= 2 + 2


def test_all_dead_names_all(folder: Path, servers: list[StandIn]) -> None:
    engine = engine_of(servers)
    for server in servers:
        server.die()
    with pytest.raises(EngineError, match=r"no server of .* answers") as caught:
        engine.generate(PROMPTS, group_size=1, params=PARAMS)
    for server in servers:
        assert server.url in str(caught.value)
    assert "Connect" in str(caught.value)
    assert "--resume" in str(caught.value)
    with pytest.raises(EngineError, match="no server of"):
        engine.sync(adapted(folder))


@pytest.mark.parametrize(
    ("path", "reply", "message"),
    [
        ("models", (307, ""), "sends to another address"),
        ("models", (200, "[]"), r"answers: .*list of models"),
        ("models", (200, "<html>"), r"answers: .*no JSON"),
        ("models", (503, "starting"), r"answers: .*HTTP 503: starting"),
        ("models", (401, "Unauthorized"), "refused the request: HTTP 401: Unauthorized"),
        ("completions", (400, "too long"), "refused the request: HTTP 400: too long"),
        ("completions", (500, "nan"), r"answers: .*HTTP 500: nan"),
        ("completions", (200, '{"choices": []}'), r"answers: .*no completion"),
        ("completions", (200, '{"choices": [{"text": "4"}]}'), r"without token ids.*0\.10\.2"),
    ],
)
def test_what_a_server_says_is_passed_on(
    servers: list[StandIn], path: str, reply: tuple[int, str], message: str
) -> None:
    for server in servers:
        server.replies[path] = reply
    with pytest.raises(EngineError, match=message):
        engine_of(servers).generate(PROMPTS, group_size=1, params=PARAMS)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((404, "Not Found"), "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        ((500, "LoRA rank 2 is greater"), "rank 2 is greater.*--max-lora-rank"),
    ],
)
def test_an_adapter_that_is_refused(
    folder: Path, servers: list[StandIn], reply: tuple[int, str], message: str
) -> None:
    servers[1].replies["load_lora_adapter"] = reply
    with pytest.raises(EngineError, match=message):
        engine_of(servers).sync(adapted(folder))


def test_a_silent_server_is_left(servers: list[StandIn]) -> None:
    whole = engine_of(servers).generate(PROMPTS, group_size=1, params=PARAMS)
    servers[0].delay = 5.0
    start = time.monotonic()
    engine = engine_of(servers, timeout=0.5)
    assert engine.generate(PROMPTS, group_size=1, params=PARAMS) == whole
    assert time.monotonic() - start < 5.0  # or it would have waited


def test_one_that_is_there_and_answers_no_request_ends_the_run(servers: list[StandIn]) -> None:
    for server in servers:
        server.replies["completions"] = (500, "out of order")
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"no server of .* answers: .*out of order"):
        engine_of(servers, patience=0.3).generate(PROMPTS, group_size=1, params=PARAMS)
    assert time.monotonic() - start < 30.0


def test_a_request_that_one_server_fails_is_asked_of_the_other(servers: list[StandIn]) -> None:
    whole = engine_of(servers).generate(PROMPTS[:1], group_size=2, params=PARAMS)
    servers[0].replies["completions"] = (500, "out of order")
    assert engine_of(servers).generate(PROMPTS[:1], group_size=2, params=PARAMS) == whole


def test_one_that_takes_connections_and_says_nothing_is_away_at_once(
    folder: Path, servers: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_servers, "_CONNECT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        engine = engine_of(servers[:1], base_urls=(servers[0].url, url), timeout=60.0)
        start = time.monotonic()
        engine.sync(adapted(folder))
        assert time.monotonic() - start < 30.0


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_one_that_is_not_there_just_now_gets_no_adapter_and_ends_nothing(
    folder: Path, servers: list[StandIn], status: int
) -> None:
    servers[1].replies["load_lora_adapter"] = (status, "later")
    engine = engine_of(servers)
    engine.sync(moved(adapted(folder)))
    engine.generate(PROMPTS, group_size=2, params=PARAMS)
    assert servers[1].count("completions") == 0


def test_what_a_server_cut_short_is_asked_of_the_other(servers: list[StandIn]) -> None:
    whole = engine_of(servers).generate(PROMPTS, group_size=2, params=PARAMS)

    def spoil(choice: dict[str, Any]) -> None:
        choice["token_ids"], choice["finish_reason"] = choice["token_ids"][:1], "abort"
        choice["logprobs"]["token_logprobs"] = choice["logprobs"]["token_logprobs"][:1]

    servers[0].spoil = spoil
    assert engine_of(servers).generate(PROMPTS, group_size=2, params=PARAMS) == whole


@pytest.mark.parametrize("ids", [[4] * 50, [1000000]])
def test_tokens_that_were_not_asked_for_are_refused(servers: list[StandIn], ids: list[int]) -> None:
    def spoil(choice: dict[str, Any]) -> None:
        choice["token_ids"] = ids
        choice["logprobs"]["token_logprobs"] = [-1.0] * len(ids)

    servers[0].spoil = spoil
    with pytest.raises(EngineError, match=rf"answered with {len(ids)} tokens up to {max(ids)}"):
        engine_of(servers).generate(PROMPTS, group_size=1, params=PARAMS)


def test_a_model_without_numbers_is_named(servers: list[StandIn]) -> None:
    def spoil(choice: dict[str, Any]) -> None:
        choice["logprobs"]["token_logprobs"][1] = -9999.0  # what vLLM writes for a NaN

    servers[1].spoil = spoil
    with pytest.raises(NotANumberError, match=r"second: .* for token 1 of"):
        sample(
            engine_of(servers),
            PROMPTS,
            group_size=1,
            params=PARAMS,
            names=["first", "second", "third"],
        )


def test_bad_input_is_named(folder: Path, servers: list[StandIn]) -> None:
    engine = engine_of(servers)
    with pytest.raises(ValueError, match="is empty"):
        engine.generate([[]], group_size=1, params=PARAMS)
    with pytest.raises(ValueError, match="256 positions"):
        engine.generate([[1] * 251], group_size=1, params=PARAMS)
    with pytest.raises(ValueError, match="without a PEFT adapter"):
        engine.sync(AutoModelForCausalLM.from_pretrained(folder))


def test_the_key_travels_in_a_header_and_bad_ones_do_not(
    servers: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    engine = engine_of(servers)
    assert engine.servers._client.headers["Authorization"] == "Bearer secret"
    monkeypatch.setenv("VLLM_API_KEY", "secret\n")
    with pytest.raises(EngineError, match="VLLM_API_KEY holds a character") as caught:
        engine_of(servers)
    assert "secret" not in str(caught.value)


def test_a_missing_client_is_named(servers: list[StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(EngineError, match="pip install httpx2"):
        engine_of(servers)


def test_rollouts_are_drawn_while_something_else_is_done(servers: list[StandIn]) -> None:
    engine = engine_of(servers)
    whole = engine.generate(PROMPTS, group_size=2, params=PARAMS)
    here: Callable[[], int] = lambda: sum(s.count("completions") for s in servers)  # noqa: E731
    before = here()
    for server in servers:
        server.delay = 0.05
    drawing = engine.begin(PROMPTS, group_size=2, params=PARAMS)
    while here() < before + 6:  # all are asked though nobody waits for the answers
        time.sleep(0.005)
    assert drawing.finish() == whole
    for server in servers:
        server.lives = 0
    drawing = engine.begin(PROMPTS, group_size=2, params=PARAMS)
    with pytest.raises(EngineError, match="no server of"):
        drawing.finish()
