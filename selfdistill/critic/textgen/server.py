"""A model behind an OpenAI-compatible HTTP server: vLLM, SGLang, llama.cpp, or a hosted one.

The server renders its own chat template; whether it reads a text that spells control tokens as
such is up to it. What it answers is text again, and goes through `selfdistill.prompts.chat` like
any other.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from email.message import Message
from typing import Any

from selfdistill.config import ServerTextEngine
from selfdistill.critic.textgen.interface import Generation
from selfdistill.rollout.engine import EngineError

_TRY_AGAIN = {408, 409, 425, 429}  # and 500 and above: busy, starting, or restarting
_LONGEST_WAIT = 60.0  # seconds between two attempts, whatever the server asks for
_LONGEST_BODY = 8 << 20  # bytes; an answer of 100,000 tokens has less than one million
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class ServerGenerator:
    """Answers prompts over HTTP (implements `selfdistill.critic.textgen.interface.TextGenerator`).

    Redirects are not followed: the key would travel along, and whatever is found there would be
    taken for an answer.

    Args:
        config: where the server is, which model, and how patient to be.
        sleep: waits for so many seconds between attempts; by default not beyond the call's end.
    """

    def __init__(
        self, config: ServerTextEngine, *, sleep: Callable[[float], None] | None = None
    ) -> None:
        self._config = config
        self._sleep = sleep
        self._url = f"{config.base_url.rstrip('/')}/chat/completions"
        deciding = {"name", "base_url", "model", "max_new_tokens", "extra_body"}
        self.identity = json.dumps(config.model_dump(mode="json", include=deciding), sort_keys=True)

    def check(self, prompt: str) -> None:
        """Do nothing: how much its model reads is the server's own affair."""

    def generate(self, prompts: Sequence[str]) -> Iterator[tuple[int, Generation]]:
        """Yield the answers as they come in, several requests at a time.

        When the caller stops asking, or is interrupted, all connections are cut.

        Raises:
            EngineError: the server refused a request, or gave no answer in all attempts; raised
                after the answers to the other requests under way were yielded.
        """
        call = _Call()
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for place in range(len(prompts)):
            waiting.put(place)
        # Answers and errors with their places, and None from each thread that has ended.
        found: queue.SimpleQueue[tuple[int, Generation | Exception] | None] = queue.SimpleQueue()

        def work() -> None:
            with suppress(queue.Empty):
                while not call.ended.is_set():
                    place = waiting.get_nowait()
                    try:
                        found.put((place, self._ask(prompts[place], call)))
                    except Exception as error:
                        call.ended.set()  # nothing new is asked
                        found.put((place, error))
            found.put(None)

        running = min(self._config.concurrency, len(prompts))
        for _ in range(running):
            # Daemons, so that a process that wants to end does not wait for a silent server.
            threading.Thread(target=work, daemon=True).start()
        failure: Exception | None = None
        try:
            while running:
                result = found.get()
                if result is None:
                    running -= 1
                elif isinstance(result[1], Exception):
                    failure = failure or result[1]
                else:
                    yield result[0], result[1]
        finally:
            call.cut()
        if failure is not None:
            raise failure

    def _ask(self, prompt: str, call: _Call) -> Generation:
        attempts = self._config.retries + 1
        for attempt in range(attempts):
            wait = self._config.backoff * 2**attempt
            try:
                return read_completion(self._post(prompt, call))
            except _HTTPRefusal as error:
                reason = str(error)
                if 300 <= error.status < 400:
                    raise EngineError(
                        f"{self._url} sends to another address ({reason}), which is not followed, "
                        "because the key would travel along: give the address that answers as "
                        "base_url"
                    ) from error
                if error.status not in _TRY_AGAIN and error.status < 500:
                    raise EngineError(f"{self._url} refused the request: {reason}") from error
                wait = max(wait, error.retry_after)
            except (OSError, http.client.HTTPException) as error:
                reason = f"{type(error).__name__}: {error}"
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                reason = f"not a chat completion ({type(error).__name__}: {error})"
            if call.is_cut or attempt + 1 == attempts:
                break
            wait = min(wait, _LONGEST_WAIT)
            call.wait(wait) if self._sleep is None else self._sleep(wait)
        raise EngineError(
            f"{self._url} gave no answer in {attempts} attempts, the last: {reason}. Is the server "
            f"up, and does it serve {self._config.model!r}? The checkpoints written so far are "
            "intact: go on from the last one with --resume"
        )

    def _post(self, prompt: str, call: _Call) -> bytes:
        config = self._config
        body = {
            "model": config.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": config.max_new_tokens,
            **config.extra_body,
        }
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(config.api_key_variable)
        if key:
            if not (key.isascii() and key.isprintable()):
                # http.client would say so, too, but with the key in its message.
                raise EngineError(
                    f"the environment variable {config.api_key_variable} holds a character that no "
                    "HTTP header may have, such as a line break: set it to the bare key"
                )
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        with call.wire(config.total_timeout) as wire:
            try:
                with _opener(wire).open(request, timeout=config.timeout) as response:
                    answer: bytes = response.read(_LONGEST_BODY + 1)
            except urllib.error.HTTPError as error:
                with error:
                    raise _HTTPRefusal(error) from error
            except (OSError, http.client.HTTPException):
                wire.check()
                raise
            wire.check()
        if len(answer) > _LONGEST_BODY:
            raise ValueError(f"it has more than {_LONGEST_BODY >> 20} MiB")
        return answer


def read_completion(body: bytes) -> Generation:
    """Read what a server answered.

    Raises:
        ValueError, LookupError, TypeError, RecursionError: it is not a chat completion.
    """
    choice = json.loads(body)["choices"][0]
    text = _LONE_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", _text(choice["message"]["content"]))
    return Generation(text, finished=choice.get("finish_reason") != "length")


def _text(content: Any) -> str:
    """Return the text of a message: a string, or a list of parts of which some are text."""
    if content is None:  # a reasoning model that ran out of tokens before its answer
        return ""
    if isinstance(content, list):
        texts = [part["text"] for part in content if part["type"] == "text"]
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)
    if isinstance(content, str):
        return content
    raise TypeError(f"the content is a {type(content).__name__}, expected text")


class _HTTPRefusal(Exception):
    """An answer with another status than success."""

    def __init__(self, error: urllib.error.HTTPError) -> None:
        self.status = error.code
        self.retry_after = _retry_after(error.headers)
        place = error.headers.get("Location")
        body = error.read(500).decode(errors="replace")
        super().__init__(
            f"HTTP {error.code} {error.reason}: {body}" + (f" (to {place})" if place else "")
        )


def _retry_after(headers: Message) -> float:
    """Seconds that the server asks to wait; 0 if it does not, or names a date."""
    try:
        return float(headers.get("Retry-After", "0"))
    except ValueError:
        return 0.0


class _Call:
    """The requests of one call of `generate`.

    Attributes:
        ended: nothing new is asked.
        is_cut: nobody waits for the answers any more.
    """

    def __init__(self) -> None:
        self.ended = threading.Event()
        self._cut = threading.Event()
        self._wires: set[_Wire] = set()
        self._lock = threading.Lock()

    @property
    def is_cut(self) -> bool:
        return self._cut.is_set()

    def wait(self, seconds: float) -> None:
        """Sleep, but not beyond the end of the call."""
        self._cut.wait(seconds)

    def cut(self) -> None:
        """End all requests under way."""
        self.ended.set()
        self._cut.set()
        with self._lock:
            for wire in self._wires:
                wire.cut("the call was given up")

    @contextmanager
    def wire(self, seconds: float) -> Iterator[_Wire]:
        """Lend a connection for at most so many seconds."""
        wire = _Wire()
        limit = threading.Timer(seconds, wire.cut, [f"no whole answer within {seconds:g} seconds"])
        limit.daemon = True
        with self._lock:
            self._wires.add(wire)
        if self.is_cut:
            wire.cut("the call was given up")
        limit.start()
        try:
            yield wire
        finally:
            limit.cancel()
            with self._lock:
                self._wires.discard(wire)


class _Wire:
    """The connection of one request, which another thread may cut.

    A time limit of a socket counts from byte to byte: a server that drips never meets it.
    """

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._why: str | None = None
        self._lock = threading.Lock()

    def hold(self, connection: socket.socket) -> None:
        """Take the connection as soon as it is there."""
        with self._lock:
            self._socket = connection
            if self._why is not None:
                self._shut()

    def cut(self, why: str) -> None:
        """End the connection, and with it the read that waits for the other side."""
        with self._lock:
            self._why = self._why or why
            self._shut()

    def check(self) -> None:
        """Raise when the connection was cut: what was read is not all.

        Raises:
            TimeoutError: it was.
        """
        if self._why is not None:
            raise TimeoutError(self._why)

    def _shut(self) -> None:
        if self._socket is not None:
            with suppress(OSError):  # it has ended by itself
                self._socket.shutdown(socket.SHUT_RDWR)


def _opener(wire: _Wire) -> urllib.request.OpenerDirector:
    """Return what sends a request over a wire: proxies of the environment, but no redirects."""

    class Plain(http.client.HTTPConnection):
        def connect(self) -> None:
            super().connect()
            wire.hold(self.sock)

    class Secure(http.client.HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            wire.hold(self.sock)

    class PlainHandler(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Plain, req)

    class SecureHandler(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Secure, req)

    class NoRedirects(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *args: Any, **kwargs: Any) -> None:
            return None  # so the redirect itself is the answer, an error

    return urllib.request.build_opener(PlainHandler, SecureHandler, NoRedirects)
