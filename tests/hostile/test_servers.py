"""Servers of critics that lead elsewhere, flood, drip, stay silent, or answer with odd shapes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from completion_server import Answer, Server, completion
from pydantic import ValidationError
from raw_server import RawServer
from tiny_runs import ROOT

import selfdistill.critic.textgen.server
from selfdistill.config import Config, ServerTextEngine, save_config
from selfdistill.critic.textgen.interface import Generation
from selfdistill.critic.textgen.server import ServerGenerator
from selfdistill.rollout.engine import EngineError

Open = Callable[[Callable[[socket.socket], None]], RawServer]


@pytest.fixture
def raw() -> Iterator[Open]:
    servers: list[RawServer] = []

    def start(answer: Callable[[socket.socket], None]) -> RawServer:
        servers.append(RawServer(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def generator(url: str, **overrides: Any) -> ServerGenerator:
    values: dict[str, Any] = {"base_url": url, "model": "judge", "timeout": 20.0, "retries": 0}
    return ServerGenerator(ServerTextEngine(**{**values, **overrides}), sleep=lambda _: None)


def ask(url: str, **overrides: Any) -> Generation:
    ((_, answer),) = generator(url, **overrides).generate(["question"])
    return answer


@pytest.mark.parametrize("status", [300, 301, 302, 303, 304, 305, 307, 308, 399])
def test_a_redirect_is_not_followed_and_the_key_stays(
    server: Server, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    elsewhere = Server()
    try:
        place = f"{elsewhere.url}/chat/completions"
        server.answer = lambda prompt, _: (status, {"Location": place}, "")
        with pytest.raises(
            EngineError, match=rf"sends to another address .HTTP {status}"
        ) as caught:
            ask(server.url, retries=3)
        assert place in str(caught.value)
        assert "base_url" in str(caught.value)
        assert "secret" not in str(caught.value)
        assert (len(server.requests), elsewhere.requests) == (1, [])
    finally:
        elsewhere.close()


def test_only_http_is_an_address() -> None:
    for url in ("file:///etc/hostname", "ftp://host/v1", "data:,x", "host:8000/v1", "https://"):
        with pytest.raises(ValidationError, match="base_url"):
            ServerTextEngine(base_url=url, model="judge")


@pytest.mark.parametrize("length", ["Content-Length: 100000000000\r\n", ""])
def test_a_flood_is_cut_off(raw: Open, monkeypatch: pytest.MonkeyPatch, length: str) -> None:
    monkeypatch.setattr(selfdistill.critic.textgen.server, "_LONGEST_BODY", 1 << 20)
    sent = 0

    def flood(connection: socket.socket) -> None:
        nonlocal sent
        connection.sendall(f"HTTP/1.1 200 OK\r\n{length}\r\n".encode())
        while sent < 100 << 20:
            sent += connection.send(b'{"choices": [' + b"[" * 65_000)

    with pytest.raises(EngineError, match="more than 1 MiB"):
        ask(raw(flood).url)
    assert sent < 50 << 20  # buffers of the system hold a few megabytes


@pytest.mark.parametrize(
    "head",
    [
        b"",  # drips within the status line
        b"HTTP/1.1 200 OK\r\nX-Slow: ",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 90000\r\n\r\n",
        b"HTTP/1.1 503 Busy\r\nContent-Length: 90000\r\n\r\n",
    ],
)
def test_a_server_that_drips_meets_a_total_limit(raw: Open, head: bytes) -> None:
    """Its bytes come far more often than `timeout`, which therefore never ends the request."""
    server = raw(lambda connection: server.drip(connection, head))
    with pytest.raises(EngineError, match=r"no whole answer within 0\.5 seconds|HTTP 503"):
        ask(server.url, total_timeout=0.5)
    assert server.asked == 1


def test_a_caller_that_stops_asking_waits_for_nobody(raw: Open) -> None:
    first = threading.Event()

    def answer(connection: socket.socket) -> None:
        if first.is_set():
            server.drip(connection, b"HTTP/1.1 200 OK\r\n\r\n")
        first.set()
        _, _, body = completion("fine")
        connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())

    server = raw(answer)
    before = set(threading.enumerate())
    answers = generator(server.url, concurrency=1).generate(["a", "b", "c"])
    assert next(answers) == (0, Generation("fine", True))
    answers.close()
    for thread in set(threading.enumerate()) - before:
        if thread.name.endswith("(work)"):
            thread.join(timeout=20)
            assert not thread.is_alive()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}], "one two"),
        ([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "so"}], "so"),
        ([], ""),
        (None, ""),
        ("\ud800 lone \udfff", "\N{REPLACEMENT CHARACTER} lone \N{REPLACEMENT CHARACTER}"),
        ("\N{GRINNING FACE}", "\N{GRINNING FACE}"),
    ],
)
def test_odd_shapes_of_content_are_read(server: Server, content: Any, text: str) -> None:
    server.answer = lambda prompt, _: body_of(content)
    assert ask(server.url) == Generation(text, True)


def body_of(content: Any) -> Answer:
    choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    return 200, {}, json.dumps({"choices": [choice]})


@pytest.mark.parametrize(
    "body",
    [
        body_of({"text": "a mapping"})[2],
        body_of(7)[2],
        body_of(["text"])[2],
        body_of([{"type": "text", "text": ["deep"]}])[2],
        body_of([{"text": "no type"}])[2],
        '{"choices": []}',
        '{"choices": [{}]}',
        "[]",
        "null",
        "[" * 100_000,
        '{"choices": ' + "9" * 5000 + "}",
        "<html>login</html>",
    ],
    ids=lambda body: body[:40],
)
def test_what_is_no_completion_is_said_to_be_none(server: Server, body: str) -> None:
    server.answer = lambda prompt, _: (200, {}, body)
    with pytest.raises(EngineError, match=r"in 1 attempts, the last: not a chat completion"):
        ask(server.url)


@pytest.mark.parametrize("key", ["secret\n", "se\rcret", "s\N{EURO SIGN}cret"])
def test_a_key_that_is_no_header_is_not_printed(
    server: Server, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(EngineError, match="environment variable OPENAI_API_KEY") as caught:
        ask(server.url)
    assert "cret" not in str(caught.value)
    assert not server.requests


def test_ctrl_c_twice_ends_a_run_whose_critic_is_silent(
    raw: Open, solver_dir: Path, tmp_path: Path
) -> None:
    asked = threading.Event()

    def silent(connection: socket.socket) -> None:
        asked.set()
        server.closing.wait()

    server = raw(silent)
    engine = {"name": "server", "base_url": server.url, "model": "judge"}
    config = Config.model_validate(
        {
            "model": str(solver_dir),
            "output_dir": tmp_path / "run",
            "device": "cpu",
            "task": {"step_counts": [1]},
            "method": {"name": "stepalign", "critic": {"name": "llm", "engine": engine}},
            "rollout": {"max_new_tokens": 3},
            "prompts_per_step": 1,
            "evaluation": {"problems": 1, "samples": 1},
        }
    )
    save_config(config, tmp_path / "run.yaml")
    process = subprocess.Popen(
        [sys.executable, "-m", "selfdistill", "train", str(tmp_path / "run.yaml")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A test run in the background inherits an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert asked.wait(120)
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        for line in process.stdout:
            if "once more to stop at once" in line:
                break
        process.send_signal(signal.SIGINT)
        # Without a cut it would wait for `timeout`, 600 seconds, and for five more attempts.
        process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode != 0
    assert (tmp_path / "run" / "checkpoints" / "last" / "state.json").exists()
