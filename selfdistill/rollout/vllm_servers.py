"""Servers of vLLM that share requests: what one that goes away had left is asked of the others.

Nothing is lost, because a request is done only when its answer is there: each has a seed of its own
and can be asked anywhere and again.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from selfdistill.config import VLLMServerEngineConfig
from selfdistill.json_text import parse_json
from selfdistill.rollout.engine import EngineError

_CONNECT = 10.0  # seconds until a machine that says nothing counts as away, and what has no work
_BUSY = (429, 502, 503, 504)  # said by a server, or a proxy before it, that is not there just now
_POLL = 1.0  # seconds between two tries to reach a server when none is left
_UNASKED = "was not asked yet"


class _Away(Exception):
    """A server gave no answer, or none that can be used."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: the name that requests call it by, and the folder where a server reads it."""

    name: str
    folder: str


@dataclass
class _Server:
    url: str
    away: str | None = _UNASKED
    model: str = ""
    max_length: int | None = None


class Servers:
    """All servers of a run, and the adapter that they sample from.

    Args:
        settings: where they are, and how patient to be.

    Raises:
        EngineError: the HTTP client is not installed, or the key cannot be sent.
    """

    def __init__(self, settings: VLLMServerEngineConfig) -> None:
        self._http = _client_library()
        self._settings = settings
        self._servers = [_Server(url.rstrip("/")) for url in settings.base_urls]
        self._adapter: Adapter | None = None
        self._client = self._http.Client(
            headers=_key(settings.api_key_variable),
            timeout=self._http.Timeout(settings.timeout, connect=_CONNECT),
            limits=self._http.Limits(max_connections=None),
        )

    @property
    def max_length(self) -> int | None:
        """Most tokens of a prompt and its completion that all servers at hand take."""
        lengths = [s.max_length for s in self._living() if s.max_length is not None]
        return min(lengths, default=None)

    def complete(self, bodies: Sequence[Mapping[str, Any]], homes: Sequence[int]) -> list[Any]:
        """Return the first choice of each completion.

        Args:
            bodies: the requests, without the name of the model.
            homes: a number for each; equal ones go to one server as long as no server goes away.

        Raises:
            EngineError: a server refused a request, or all of them are away.
        """
        answers: dict[int, Any] = {}
        fruitless: float | None = None
        # A round for whatever is left; the next one knows which servers are away.
        while waiting := [place for place in range(len(bodies)) if place not in answers]:
            living = self._living()
            queues: list[deque[int]] = [deque() for _ in living]
            for place in waiting:
                queues[homes[place] % len(living)].append(place)
            refusals: list[Exception] = []

            def work(
                server: _Server, queue: deque[int], refusals: list[Exception] = refusals
            ) -> None:
                while server.away is None and not refusals:
                    try:
                        place = queue.popleft()
                    except IndexError:
                        return
                    try:
                        answers[place] = self._complete(server, bodies[place])
                    except _Away as error:
                        server.away = str(error)
                    except Exception as error:
                        refusals.append(error)

            # Daemons, so that a process that wants to end does not wait for a silent server.
            threads = [
                threading.Thread(target=work, args=(server, queue), daemon=True)
                for server, queue in zip(living, queues, strict=True)
                for _ in range(min(self._settings.concurrency, len(queue)))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if refusals:
                raise refusals[0]
            # A server that says that it is there, and answers no request, does not help.
            if len(waiting) > len(bodies) - len(answers) or self._some_live():
                fruitless = None
                continue
            now = time.monotonic()
            fruitless = now if fruitless is None else fruitless
            if now - fruitless >= self._settings.patience:
                raise self._nobody_answers()
        return [answers[place] for place in range(len(bodies))]

    def adopt(self, adapter: Adapter, *, loads: bool) -> None:
        """Sample from another adapter from now on; servers that were away are asked again.

        Args:
            adapter: the new one; the one before is forgotten.
            loads: whether to hand it to the servers; False where another rank has done so.

        Raises:
            EngineError: a server refused it, or all of them are away.
        """
        previous, self._adapter = self._adapter, adapter
        for server in self._servers:
            if not loads:
                server.away = _UNASKED
            elif self._revive(server) and previous is not None:
                self._forget(server, previous)
        self._living()

    def leave(self) -> None:
        """Have the servers at hand forget the adapter; nothing is asked of them after this."""
        if self._adapter is None:
            return
        self._client.timeout = self._http.Timeout(_CONNECT)  # nothing waits for a silent one
        for server in self._servers:
            if server.away is None:
                self._forget(server, self._adapter)

    def _living(self) -> list[_Server]:
        """Return the servers that answer, after some patience if none does."""
        deadline = time.monotonic() + self._settings.patience
        while True:
            for server in self._servers:
                if server.away == _UNASKED:
                    self._revive(server)
            if self._some_live():
                return [server for server in self._servers if server.away is None]
            if time.monotonic() >= deadline:
                raise self._nobody_answers()
            time.sleep(_POLL)
            for server in self._servers:
                self._revive(server)

    def _some_live(self) -> bool:
        return any(server.away is None for server in self._servers)

    def _nobody_answers(self) -> EngineError:
        each = "; ".join(f"{server.url} ({server.away})" for server in self._servers)
        return EngineError(
            f"no server of rollout.engine.base_urls answers: {each}. Start them (docs/"
            "several-gpus.md has the command), then go on with --resume: the checkpoints written "
            "so far are intact"
        )

    def _revive(self, server: _Server) -> bool:
        """Ask a server what it has, and give it the adapter where it lacks it."""
        try:
            found = self._ask(server, "models")
            try:
                models = {entry["id"]: entry for entry in found["data"]}
                base = next(entry for entry in models.values() if entry.get("parent") is None)
                server.model, server.max_length = base["id"], base.get("max_model_len")
            except (LookupError, TypeError, AttributeError, StopIteration):
                raise _Away("its list of models is none of vLLM's") from None
            if self._adapter is not None and self._adapter.name not in models:
                self._load(server, self._adapter)
            server.away = None
        except _Away as error:
            server.away = str(error)
        return server.away is None

    def _load(self, server: _Server, adapter: Adapter) -> None:
        body = {"lora_name": adapter.name, "lora_path": adapter.folder}
        status, text = self._send(server, "load_lora_adapter", body)
        if status == 200 or "already been loaded" in text:  # by another rank, at the same time
            return
        if status in _BUSY:
            raise _Away(f"HTTP {status}: {text}")
        if status >= 500:
            # It is what a broken adapter and one of too large a rank get, too: no other try helps.
            text += ". Does --max-lora-rank reach adapter.r?"
        if status in (404, 405):
            text += (
                ". Start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True; it must "
                f"read {adapter.folder} (rollout.engine.adapters)"
            )
        raise EngineError(f"{server.url} does not load the adapter: HTTP {status}: {text}")

    def _forget(self, server: _Server, adapter: Adapter) -> None:
        try:  # a server that has started anew never knew it
            self._send(server, "unload_lora_adapter", {"lora_name": adapter.name})
        except _Away as error:
            server.away = str(error)

    def _complete(self, server: _Server, body: Mapping[str, Any]) -> Any:
        model = server.model if self._adapter is None else self._adapter.name
        answer = self._ask(server, "completions", {"model": model, **body})
        try:
            choice = answer["choices"][0]
            # A server that shuts down hands out what it has.
            is_whole = choice.get("finish_reason") in (None, "stop", "length")
        except (LookupError, TypeError, AttributeError):
            raise _Away(f"no completion: {str(answer)[:200]}") from None
        if not is_whole:
            raise _Away(f"it ended a completion by {choice['finish_reason']!r}")
        return choice

    def _ask(self, server: _Server, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Return the JSON that a server answers."""
        status, text = self._send(server, path, body)
        if 300 <= status < 400:
            raise EngineError(
                f"{server.url}/{path} sends to another address (HTTP {status}), which is not "
                "followed: give the address that answers in rollout.engine.base_urls"
            )
        if status == 404 and self._adapter is not None:
            raise _Away(f"it does not know the adapter any more (HTTP 404: {text})")
        if 400 <= status < 500 and status not in _BUSY:
            raise EngineError(f"{server.url}/{path} refused the request: HTTP {status}: {text}")
        if status != 200:
            raise _Away(f"HTTP {status}: {text}")
        try:
            return parse_json(text.encode())
        except ValueError as error:
            raise _Away(f"no JSON ({error})") from None

    def _send(
        self, server: _Server, path: str, body: Mapping[str, Any] | None = None
    ) -> tuple[int, str]:
        """Return status and text of an answer; an error's text is cut."""
        url = f"{server.url}/{path}"
        try:
            if body is None:
                answer = self._client.get(url, timeout=_CONNECT)
            else:
                answer = self._client.post(url, json=body)
        except (self._http.HTTPError, self._http.InvalidURL) as error:
            raise _Away(f"{type(error).__name__}: {error}".removesuffix(": ")) from None
        text: str = answer.text
        return answer.status_code, text if answer.status_code == 200 else text[:500]


def _client_library() -> ModuleType:
    try:
        import httpx2
    except ImportError as error:
        raise EngineError(
            f"rollout.engine vllm_server needs httpx2 ({error}): pip install httpx2"
        ) from error
    return httpx2


def _key(variable: str) -> dict[str, str]:
    key = os.environ.get(variable)
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise EngineError(
            f"the environment variable {variable} holds a character that no HTTP header may have, "
            "such as a line break: set it to the bare key"
        )
    return {"Authorization": f"Bearer {key}"}
