"""A model behind an OpenAI-compatible HTTP server: vLLM, SGLang, llama.cpp, or a hosted one.

The server renders its own chat template; whether it reads a text that spells control tokens as
such is up to it. What it answers is text again, and goes through `selfdistill.chat` like any other.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from email.message import Message

from selfdistill.config import ServerTextEngine
from selfdistill.rollout import EngineError
from selfdistill.textgen import Generation

_TRY_AGAIN = {408, 409, 425, 429}  # and 500 and above: busy, starting, or restarting
_LONGEST_WAIT = 60.0  # seconds between two attempts, whatever the server asks for


class ServerGenerator:
    """Answers prompts over HTTP (implements `selfdistill.textgen.TextGenerator`).

    Args:
        config: where the server is, which model, and how patient to be.
        sleep: waits for so many seconds between attempts.
    """

    def __init__(
        self, config: ServerTextEngine, *, sleep: Callable[[float], None] = time.sleep
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

        Raises:
            EngineError: the server refused a request, or gave no answer in all attempts; raised
                after the answers to the other requests under way were yielded.
        """
        failure: EngineError | None = None
        with ThreadPoolExecutor(self._config.concurrency) as pool:
            places: dict[Future[Generation], int] = {
                pool.submit(self._ask, prompt): place for place, prompt in enumerate(prompts)
            }
            try:
                for future in as_completed(places):
                    try:
                        yield places[future], future.result()
                    except CancelledError:
                        continue
                    except EngineError as error:
                        failure = failure or error
                        _cancel(places)
            finally:  # the caller may have stopped asking
                _cancel(places)
        if failure is not None:
            raise failure

    def _ask(self, prompt: str) -> Generation:
        attempts = self._config.retries + 1
        for attempt in range(attempts):
            wait = self._config.backoff * 2**attempt
            try:
                return self._post(prompt)
            except urllib.error.HTTPError as error:
                with error:
                    body = error.read(500).decode(errors="replace")
                reason = f"HTTP {error.code} {error.reason}: {body}"
                if error.code not in _TRY_AGAIN and error.code < 500:
                    raise EngineError(f"{self._url} refused the request: {reason}") from error
                wait = max(wait, _retry_after(error.headers))
            except (OSError, http.client.HTTPException) as error:
                reason = f"{type(error).__name__}: {error}"
            except (ValueError, LookupError, TypeError) as error:
                reason = f"not a chat completion ({type(error).__name__}: {error})"
            if attempt + 1 < attempts:
                self._sleep(min(wait, _LONGEST_WAIT))
        raise EngineError(
            f"{self._url} gave no answer in {attempts} attempts, the last: {reason}. Is the server "
            f"up, and does it serve {self._config.model!r}? The checkpoints written so far are "
            "intact: go on from the last one with --resume"
        )

    def _post(self, prompt: str) -> Generation:
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
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=config.timeout) as response:
            choice = json.loads(response.read())["choices"][0]
        # A reasoning model that ran out of tokens before its answer has no content.
        text = choice["message"]["content"] or ""
        return Generation(str(text), finished=choice.get("finish_reason") != "length")


def _cancel(futures: dict[Future[Generation], int]) -> None:
    for future in futures:
        future.cancel()


def _retry_after(headers: Message) -> float:
    """Seconds that the server asks to wait; 0 if it does not, or names a date."""
    try:
        return float(headers.get("Retry-After", "0"))
    except ValueError:
        return 0.0
