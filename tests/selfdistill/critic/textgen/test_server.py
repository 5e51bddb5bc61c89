"""The HTTP client against a real server on the loopback interface."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from completion_server import Answer, Server, completion

from selfdistill.config import ServerTextEngine
from selfdistill.critic.textgen.build import build_text_generator
from selfdistill.critic.textgen.interface import Generation
from selfdistill.critic.textgen.server import ServerGenerator
from selfdistill.rollout.engine import EngineError


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def settings(server: Server, **overrides: Any) -> ServerTextEngine:
    values = {"base_url": server.url, "model": "judge", "max_new_tokens": 7, "timeout": 5.0}
    return ServerTextEngine(**{**values, **overrides})


def answers(generator: ServerGenerator, prompts: list[str]) -> list[Generation]:
    found = dict(generator.generate(prompts))
    return [found[place] for place in range(len(prompts))]


def test_answers_keep_their_places_and_requests_say_all(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")

    def answer(prompt: str, _: int) -> Answer:
        time.sleep(0.02 * (3 - int(prompt[-1])))  # the last one is ready first
        return completion(None, "length") if prompt == "q2" else completion(prompt.upper())

    server.answer = answer
    extra = {"chat_template_kwargs": {"enable_thinking": True}}
    generator = ServerGenerator(
        settings(server, api_key_variable="JUDGE_KEY", extra_body=extra, concurrency=3)
    )
    assert answers(generator, ["q0", "q1", "q2"]) == [
        Generation("Q0", True),
        Generation("Q1", True),
        Generation("", False),
    ]
    assert set(server.paths) == {"/v1/chat/completions"}
    assert server.headers[0]["Authorization"] == "Bearer secret"
    request = min(server.requests, key=lambda r: r["messages"][0]["content"])
    assert request == {
        "model": "judge",
        "messages": [{"role": "user", "content": "q0"}],
        "temperature": 0,
        "max_tokens": 7,
        **extra,
    }
    assert "secret" not in generator.identity


def test_no_more_requests_at_once_than_allowed(server: Server) -> None:
    def answer(prompt: str, _: int) -> Answer:
        time.sleep(0.03)
        return completion(prompt)

    server.answer = answer
    prompts = [f"q{i}" for i in range(8)]
    assert len(answers(ServerGenerator(settings(server, concurrency=2)), prompts)) == 8
    assert server.most_at_once == 2


def test_busy_broken_and_silent_servers_are_asked_again(server: Server) -> None:
    troubles: list[Answer] = [
        (429, {"Retry-After": "9"}, "busy"),
        (503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, "starting"),
        (200, {}, '{"choices": [{"mess'),
        (200, {}, '{"error": "odd"}'),
        (200, {}, ""),  # replaced by silence below
    ]

    def answer(prompt: str, before: int) -> Answer:
        if before == 4:
            time.sleep(0.5)
        return troubles[before] if before < len(troubles) else completion("at last")

    server.answer = answer
    waits: list[float] = []
    generator = ServerGenerator(settings(server, timeout=0.2, backoff=0.5), sleep=waits.append)
    assert answers(generator, ["q"]) == [Generation("at last", True)]
    assert waits == [9.0, 1.0, 2.0, 4.0, 8.0]


def test_a_refused_request_is_not_repeated_and_says_why(server: Server) -> None:
    server.answer = lambda prompt, _: (404, {}, '{"message": "no model judge"}')
    with pytest.raises(EngineError, match=r"HTTP 404 .*no model judge"):
        answers(ServerGenerator(settings(server)), ["q"])
    assert len(server.requests) == 1


def test_a_dead_server_ends_the_call_after_what_it_answered(server: Server) -> None:
    def answer(prompt: str, _: int) -> Answer:
        return completion("fine") if prompt == "good" else (500, {}, "boom")

    server.answer = answer
    generator = ServerGenerator(
        settings(server, retries=1, concurrency=1), sleep=lambda seconds: None
    )
    found: list[int] = []
    with pytest.raises(EngineError, match=r"no answer in 2 attempts.*HTTP 500.*boom.*--resume"):
        found.extend(place for place, _ in generator.generate(["good", "bad", *["late"] * 50]))
    assert 0 in found
    assert len(server.requests) < 20  # what was not under way was never asked
    server.close()
    with pytest.raises(EngineError, match=r"ConnectionRefused|URLError"):
        answers(generator, ["good"])


def test_answers_are_kept_on_disk_if_a_folder_is_named(server: Server, tmp_path: Any) -> None:
    config = settings(server, cache=tmp_path)
    for _ in range(2):
        assert dict(build_text_generator(config, device="cpu").generate(["a", "b"])) == {
            0: Generation("A", True),
            1: Generation("B", True),
        }
    assert len(server.requests) == 2
